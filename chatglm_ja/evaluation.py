"""Measures that do not depend on the vocabulary, and answers to look at.

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

from chatglm_ja import chat
from chatglm_ja.checkpoint import load_glm
from chatglm_ja.errors import DataError
from chatglm_ja.model import compute_dtype, token_losses_sum
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


@dataclass(frozen=True)
class Answer:
    """A model's answer; `stopped` says that it ended by itself, before the limit."""

    text: str
    tokens: int
    stopped: bool


@torch.inference_mode()
def answer(model: Any, encoder: Any, question: str, max_new_tokens: int) -> Answer:
    """Greedy answer to one question in ChatGLM3's conversation format."""
    prompt = chat.build_prompt_ids(encoder, [{"role": "user", "content": question}])
    input_ids = torch.tensor([prompt], device=model.device)
    stops = chat.stop_ids(encoder)
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=UNK_ID,
        # Rows without an id in the tokenizer: padding of the embeddings.
        suppress_tokens=list(range(encoder.get_piece_size(), model.config.vocab_size)) or None,
    )
    ids = output[0, len(prompt) :].tolist()
    stopped = bool(ids) and ids[-1] in stops
    return Answer(encoder.decode(ids[:-1] if stopped else ids).strip(), len(ids), stopped)


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
    """One stage of the report: the scores of every language and the answers to all questions."""
    languages = {}
    for language, documents in texts.items():
        score = score_texts(model, encoder, documents, window, batch_size)
        languages[language] = {
            **dataclasses.asdict(score),
            "bits_per_char": score.bits_per_char,
            "tokens_per_char": score.tokens_per_char,
        }
    asked = [(language, question) for language in prompts for question in prompts[language]]
    answers = []
    for language, question in tqdm(asked, desc=f"{name}: answers", leave=False):
        given = answer(model, encoder, question, max_new_tokens)
        answers.append({"language": language, "question": question, **dataclasses.asdict(given)})
    return {"name": name, "languages": languages, "answers": answers}


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
