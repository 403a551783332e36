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

from chatglm_ja.chatglm3 import chat_format, loading
from chatglm_ja.data import corpus
from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.evaluation import answers, likelihood, multiple_choice
from chatglm_ja.evaluation.harness import HarnessTasks
from chatglm_ja.evaluation.settings import EvalConfig
from chatglm_ja.inference import generation
from chatglm_ja.inference.models import Stage

log = logging.getLogger(__name__)

# The beginnings of texts whose logits are compared with the base's, which are kept meanwhile.
COMPARED_TEXTS = 4
COMPARED_TOKENS = 128

Results = dict[str, Any]


@dataclass(frozen=True)
class EvaluationData:
    """What the stages are measured on."""

    texts: Mapping[str, Sequence[str]]
    questions: Sequence[tuple[str, str]]  # (language or code, question)
    conversations: Mapping[str, Sequence[answers.Talk]]
    choices: Mapping[str, Sequence[multiple_choice.ChoiceQuestion]]


def read_data(config: EvalConfig) -> EvaluationData:
    """Read all of it, before any model is loaded. DataError for what is empty or bad."""
    texts = {
        language: corpus.take_characters(all_texts, config.max_chars)
        for language, all_texts in corpus.texts_by_language(config.sources).items()
    }
    for language, of_language in texts.items():
        if not any(of_language):
            raise DataError(f"--sources hold no {language} text: there is nothing to score")
    prompts = answers.read_prompts(config.prompts, list(texts))
    return EvaluationData(
        texts,
        [(language, question) for language in prompts for question in prompts[language]],
        answers.read_held_out(config.conversations),
        multiple_choice.read_questions(config.choices),
    )


class Evaluation:
    """Measures the stages one after the other, the base first: the others are compared with it."""

    def __init__(self, config: EvalConfig, material: EvaluationData) -> None:
        self.config = config
        self.material = material
        self.sampling = generation.Sampling(config.temperature, config.top_p)
        self.tasks = HarnessTasks(config.harness_tasks, config.harness_folder, config.harness_limit)
        self.task_manager = self.tasks.open() if config.harness_tasks else None
        self._ids: dict[str, list[list[int]]] = {}  # of the base, of the texts that are compared
        self._base_logits: dict[str, loading.Logits] = {}
        self._base_rows = 0
        self._speeds: dict[int, float] = {}  # tokens per second, by the rows of the embeddings

    def of_stage(self, stage: Stage, *, is_last: bool) -> Results:
        """The measures of a stage."""
        config, material = self.config, self.material
        log.info("%s: loading %s", stage.name, stage.folder)
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
        languages = self._languages(stage, model, encoder)
        log.info(
            "%s: bits per character %s",
            stage.name,
            ", ".join(f"{name} {row['bits_per_char']:.3f}" for name, row in languages.items()),
        )
        given = answers.ask(
            model,
            encoder,
            [chat_format.build_prompt_ids(encoder, talk) for talk in talks],
            config.max_new_tokens,
            self.sampling,
            batch_size=config.answer_batch_size,
            title=f"{stage.name}: answers",
        )
        own = {way: of_way[: len(kinds)] for way, of_way in given.items()}
        rest = {way: of_way[len(kinds) :] for way, of_way in given.items()}
        return {
            "name": stage.name,
            "languages": languages,
            "kept": self._kept(model, encoder),
            "answers": answers.answers_by_question(material.questions, own),
            "answering": {
                way: answers.measure_answers(of_way, kinds) for way, of_way in own.items()
            },
            "held_out": answers.measures_by_kind(held_out_kinds, rest),
            "choices": multiple_choice.score_questions(
                model,
                encoder,
                material.choices,
                config.window,
                config.batch_size,
                title=f"{stage.name}: choices",
            ),
            "harness": self._harness(stage, model, encoder),
        }

    def _languages(self, stage: Stage, model: Any, encoder: Any) -> Results:
        size = model.config.vocab_size
        if size not in self._speeds:  # stages of one size compute the same
            prompt = chat_format.build_prompt_ids(encoder, [])
            self._speeds[size] = generation.tokens_per_second(model, encoder, prompt)
        rows = {}
        for language, texts in self.material.texts.items():
            score = likelihood.score_texts(
                model,
                encoder,
                texts,
                self.config.window,
                self.config.batch_size,
                title=f"{stage.name}: scoring {language}",
            )
            rows[language] = {
                **dataclasses.asdict(score),
                "bits_per_char": score.bits_per_char,
                "bits_per_byte": score.bits_per_byte,
                "tokens_per_char": score.tokens_per_char,
                "chars_per_second": self._speeds[size] / score.tokens_per_char,
            }
        return rows

    def _kept(self, model: Any, encoder: Any) -> Results:
        """How far the logits are from the base's on the same ids; empty for the base itself."""
        prefix = chat_format.prefix_ids(encoder)
        is_base = not self._ids
        if is_base:
            self._ids = {
                language: [
                    [*prefix, *encoder.encode(text)[:COMPARED_TOKENS]]
                    for text in texts[:COMPARED_TEXTS]
                ]
                for language, texts in self.material.texts.items()
            }
            self._base_rows = encoder.get_piece_size()
        kept = {}
        for language, ids in self._ids.items():
            # From where the first token of the text is predicted.
            parts = [
                (values[len(prefix) - 1 :], total[len(prefix) - 1 :])
                for values, total in loading.compute_logits(model, ids, self._base_rows)
            ]
            found = (torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts]))
            if is_base:
                self._base_logits[language] = found
                continue
            old = self._base_logits[language]
            kept[language] = {
                "tokens": len(found[0]),
                "largest_difference": (old[0].float() - found[0].float()).abs().max().item(),
                "divergence_bits": likelihood.divergence(old, found).mean().item(),
            }
        return kept

    def _harness(self, stage: Stage, model: Any, encoder: Any) -> list[dict[str, Any]]:
        if self.task_manager is None:
            return []
        return self.tasks.run(
            self.task_manager,
            model,
            encoder,
            stage.auto_tokenizer(),
            self.config.window,
            self.config.batch_size,
        )
