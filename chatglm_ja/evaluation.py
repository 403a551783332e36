"""What every stage of the model is measured on, and the measures of one.

languages      bits per character and byte, tokens per character, characters per second
kept           against the base, over the base's ids: do the logits differ, how far did the
               distribution of the next token move
answers        to the questions of the prompts file, greedy and sampled; and how they are
choices        multiple choice, by language
held_out       how held-out questions are answered, by kind: of the last stage only
harness        tasks of lm-evaluation-harness
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chatglm_ja import answers, chat, corpus, generation, likelihood, multiple_choice
from chatglm_ja.config import EvalConfig
from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.harness import Tasks
from chatglm_ja.stages import Stage

log = logging.getLogger(__name__)

# The beginnings of texts whose logits are compared with the base's, which are kept meanwhile.
COMPARED_TEXTS = 2
COMPARED_TOKENS = 128

Results = dict[str, Any]


@dataclass(frozen=True)
class Material:
    """What the stages are measured on."""

    texts: Mapping[str, Sequence[str]]
    questions: Sequence[tuple[str, str]]  # (language or code, question)
    conversations: Mapping[str, Sequence[answers.Talk]]
    choices: Mapping[str, Sequence[multiple_choice.Question]]


def read(config: EvalConfig) -> Material:
    """Read all of it, before any model is loaded. DataError for what is empty or bad."""
    texts = {
        language: corpus.take_characters(all_texts, config.max_chars)
        for language, all_texts in corpus.texts_by_language(config.sources).items()
    }
    for language, of_language in texts.items():
        if not any(of_language):
            raise DataError(f"--sources hold no {language} text: there is nothing to score")
    prompts = answers.read_prompts(config.prompts, list(texts))
    return Material(
        texts,
        [(language, question) for language in prompts for question in prompts[language]],
        answers.read_held_out(config.conversations),
        multiple_choice.read(config.choices),
    )


class Evaluation:
    """Measures the stages one after the other, the base first: the others are compared with it."""

    def __init__(self, config: EvalConfig, material: Material) -> None:
        self.config = config
        self.material = material
        self.sampling = generation.Sampling(config.temperature, config.top_p)
        self.tasks = Tasks(config.harness_tasks, config.harness_folder, config.harness_limit)
        self.task_manager = self.tasks.open() if config.harness_tasks else None
        self._ids: dict[str, list[list[int]]] = {}  # of the base, of the texts that are compared
        self._base_logits: dict[str, list[torch.Tensor]] = {}

    def of_stage(self, stage: Stage, *, is_last: bool) -> Results:
        """The measures of a stage."""
        config, material = self.config, self.material
        model, encoder = stage.load()
        if config.window > model.config.max_position_embeddings:
            raise ConfigError(
                f"--window {config.window} is more than the {model.config.max_position_embeddings} "
                f"positions of {stage.folder}"
            )
        kinds = [kind for kind, _ in material.questions]
        talks: list[answers.Talk] = [
            [{"role": "user", "content": question}] for _, question in material.questions
        ]
        held_out = material.conversations if is_last else {}
        held_out_kinds = [kind for kind, of_kind in held_out.items() for _ in of_kind]
        talks += [talk[:-1] for of_kind in held_out.values() for talk in of_kind]
        speed = generation.tokens_per_second(model, encoder, chat.build_prompt_ids(encoder, []))
        languages = self._languages(model, encoder, speed)
        log.info(
            "%s: bits per character %s",
            stage.name,
            ", ".join(f"{name} {row['bits_per_char']:.3f}" for name, row in languages.items()),
        )
        given = answers.ask(
            model,
            encoder,
            [chat.build_prompt_ids(encoder, talk) for talk in talks],
            config.max_new_tokens,
            self.sampling,
            title=f"{stage.name}: answers",
        )
        own = {way: of_way[: len(kinds)] for way, of_way in given.items()}
        rest = {way: of_way[len(kinds) :] for way, of_way in given.items()}
        return {
            "name": stage.name,
            "languages": languages,
            "kept": self._kept(model, encoder),
            "answers": answers.by_question(material.questions, own),
            "answering": {way: answers.measure(of_way, kinds) for way, of_way in own.items()},
            "held_out": answers.by_kind(held_out_kinds, rest),
            "choices": multiple_choice.evaluate(
                model, encoder, material.choices, config.window, config.batch_size
            ),
            "harness": self._harness(stage, model),
        }

    def _languages(self, model: Any, encoder: Any, speed: float) -> Results:
        rows = {}
        for language, texts in self.material.texts.items():
            score = likelihood.score_texts(
                model, encoder, texts, self.config.window, self.config.batch_size
            )
            rows[language] = {
                **dataclasses.asdict(score),
                "bits_per_char": score.bits_per_char,
                "bits_per_byte": score.bits_per_byte,
                "tokens_per_char": score.tokens_per_char,
                "chars_per_second": speed / score.tokens_per_char,
            }
        return rows

    def _kept(self, model: Any, encoder: Any) -> Results:
        """How far the logits are from the base's on the same ids; empty for the base itself."""
        if not self._ids:
            prefix = chat.prefix_ids(encoder)
            self._ids = {
                language: [
                    [*prefix, *encoder.encode(text)[:COMPARED_TOKENS]]
                    for text in texts[:COMPARED_TEXTS]
                ]
                for language, texts in self.material.texts.items()
            }
            rows = encoder.get_piece_size()
            self._base_logits = {
                language: likelihood.logits(model, ids, rows) for language, ids in self._ids.items()
            }
            return {}
        kept = {}
        for language, base_logits in self._base_logits.items():
            rows = base_logits[0].shape[1]
            old = torch.cat(base_logits).float()
            new = torch.cat(likelihood.logits(model, self._ids[language], rows)).float()
            moved = likelihood.divergence(old, new)
            kept[language] = {
                "tokens": len(old),
                "largest_difference": (old - new).abs().max().item(),
                "divergence_bits": moved.mean().item(),
            }
        return kept

    def _harness(self, stage: Stage, model: Any) -> list[dict[str, Any]]:
        if self.task_manager is None:
            return []
        return self.tasks.run(
            self.task_manager,
            model,
            stage.auto_tokenizer(),
            self.config.window,
            self.config.batch_size,
        )
