"""Measures that do not depend on the vocabulary, and answers: how they are, and to look at.

Bits per character compares models with different tokenizers: the sum of the cross entropies of
a text's tokens, in bits, over the number of its characters. What it costs to say where the text
ends is not counted.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from chatglm_ja import chat, cleaning, conversations, generation
from chatglm_ja.checkpoint import load_glm
from chatglm_ja.errors import DataError
from chatglm_ja.model import compute_dtype, token_losses_sum
from chatglm_ja.sources import Source
from chatglm_ja.tokenizer import UNK_ID


@dataclass(frozen=True)
class Score:
    """What a model made of some texts."""

    characters: int
    tokens: int
    nats: float

    @property
    def bits_per_char(self) -> float:
        return self.nats / math.log(2) / self.characters

    @property
    def tokens_per_char(self) -> float:
        return self.tokens / self.characters


Window = tuple[list[int], int]  # input_ids, how many at their start are context only


def windows(ids: Sequence[int], context: int, size: int) -> Iterator[Window]:
    """Cut a text into windows of at most `size` tokens, in which every token is scored once.

    The first `context` ids (the prefix) are not scored. Later windows repeat half a window of
    tokens as context.
    """
    start, scored = 0, context
    while scored < len(ids):
        end = min(start + size, len(ids))
        yield list(ids[start:end]), scored - start
        start, scored = end - size // 2, end


@torch.inference_mode()
def score_texts(
    model: Any, encoder: Any, texts: Iterable[str], window: int, batch_size: int
) -> Score:
    """Score texts with a GlmForCausalLM and the sentencepiece processor of its tokenizer."""
    prefix = chat.prefix_ids(encoder)
    characters = tokens = 0
    cuts: list[Window] = []
    for text in texts:
        ids = encoder.encode(text)
        characters += len(text)
        tokens += len(ids)
        cuts += windows([*prefix, *ids], len(prefix), window)
    if not characters:
        raise DataError("there is no text to score: the held-out file is empty")
    # Windows of like length together: little padding. Padding comes after the text, where a
    # causal model's predictions cannot see it.
    cuts.sort(key=lambda cut: len(cut[0]))
    nats = 0.0
    for batch in tqdm(_batched(cuts, batch_size), desc="scoring", leave=False):
        longest = len(batch[-1][0])
        input_ids = torch.full((len(batch), longest), UNK_ID)
        labels = torch.full((len(batch), longest), chat.IGNORE)
        for row, (ids, context) in enumerate(batch):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, context : len(ids)] = torch.tensor(ids[context:])
        hidden = model.model(input_ids=input_ids.to(model.device), use_cache=False)
        nats += token_losses_sum(
            hidden.last_hidden_state, model.lm_head.weight, labels.to(model.device)
        ).item()
    return Score(characters, tokens, nats)


def _batched(items: Sequence[Window], size: int) -> list[Sequence[Window]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def evaluate(
    name: str,
    model: Any,
    encoder: Any,
    texts: Mapping[str, Sequence[str]],
    prompts: Mapping[str, Sequence[str]],
    *,
    window: int,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """One stage of the report: the scores of every language and greedy answers to all questions."""
    languages = {}
    for language, documents in texts.items():
        score = score_texts(model, encoder, documents, window, batch_size)
        languages[language] = {
            **dataclasses.asdict(score),
            "bits_per_char": score.bits_per_char,
            "tokens_per_char": score.tokens_per_char,
        }
    asked = [(language, question) for language in prompts for question in prompts[language]]
    given = generation.answer(
        model,
        encoder,
        [
            chat.build_prompt_ids(encoder, [{"role": "user", "content": question}])
            for _, question in asked
        ],
        max_new_tokens,
        title=f"{name}: answers",
    )
    answers = [
        {"language": language, "question": question, **dataclasses.asdict(answer)}
        for (language, question), answer in zip(asked, given, strict=True)
    ]
    return {"name": name, "languages": languages, "answers": answers}


def answer_held_out(
    model: Any,
    encoder: Any,
    held_out: Mapping[str, Sequence[Sequence[chat.Message]]],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """How the last questions of conversations are answered, by kind, greedy and sampled: the
    shares of answers in the language that the kind is, None where that cannot be told (of code),
    and of those that ended by themselves."""
    rows = []
    for kind, talks in held_out.items():
        prompts = [chat.build_prompt_ids(encoder, talk[:-1]) for talk in talks]
        for way in ("greedy", "sampled"):
            answers = generation.answer(
                model, encoder, prompts, max_new_tokens, sampled=way == "sampled",
                title=f"{kind}, {way}",
            )  # fmt: skip
            fits = cleaning.in_language([answer.text for answer in answers], kind)
            rows.append(
                {
                    "kind": kind,
                    "way": way,
                    "questions": len(answers),
                    "in_language": None if fits is None else sum(fits) / len(fits),
                    "ended": sum(answer.stopped for answer in answers) / len(answers),
                }
            )
    return rows


def read_held_out(sources: Iterable[Source]) -> dict[str, list[list[conversations.Message]]]:
    """The conversations of every kind. DataError for a source without any, or with a bad one."""
    held_out: dict[str, list[list[conversations.Message]]] = {}
    for source in sources:
        found = list(conversations.read_conversations(source))
        if not found:
            raise DataError(f"source {source.title} holds no conversation that ends with an answer")
        held_out.setdefault(source.language, []).extend(found)
    return held_out


def read_prompts(path: Path) -> dict[str, list[str]]:
    """A YAML file that maps a language to a list of questions."""
    try:
        prompts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} not found: expected a YAML file of questions") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(prompts, dict) or not prompts:
        raise DataError(f"{path} must map languages to lists of questions, as `ja: [...]`")
    for language, questions in prompts.items():
        if not isinstance(questions, list) or not all(isinstance(q, str) for q in questions):
            raise DataError(f"{path}: {language} must be a list of questions")
    return prompts


def load_model(folder: Path) -> Any:
    """A model folder of steps 3, 5 or 6, for evaluation."""
    from transformers import GlmForCausalLM

    model: Any = load_glm(folder, GlmForCausalLM, compute_dtype())
    return model.to(device()).eval()


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
