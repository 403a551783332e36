"""All measures of step 7, stage by stage.

A measure is a method of Evaluation that returns the entries it adds to a stage's results:

languages      bits per character and byte, tokens per character, characters per second
kept           the distance from the base on the base's ids: the largest difference of the logits,
               and the divergence of the next token's distribution
answers        the answers, in each decoding, to some of the held-out questions and to those of the
               prompts file
answering      the measures of the answers to the prompts file
held_out       the measures of the answers to held-out questions by kind and decoding
likeness       how like the answers to held-out questions are to the expected ones, by kind
retention      the base's answers by language, and how the stage answers in its place
confusion      answers that leave the language of their question, by language
probes         in-context learning on texts made of held-out ones
translations   chrF of held-out lines, with and without examples
choices        multiple choice by language
tasks, judged, harness    see benchmarks.py

What is measured on items has its difference from the base on the same items; see paired.py.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch

from chatglm_ja.bases import loading
from chatglm_ja.bases.interface import FormatError
from chatglm_ja.data import corpus
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.errors import DataError
from chatglm_ja.evaluation import (
    answers,
    benchmarks,
    confusion,
    likelihood,
    multiple_choice,
    probes,
    retention,
    translation,
)
from chatglm_ja.evaluation.answers import Question
from chatglm_ja.evaluation.likelihood import Scorer
from chatglm_ja.evaluation.paired import Baseline
from chatglm_ja.evaluation.settings import EvalConfig
from chatglm_ja.inference import generation
from chatglm_ja.inference.generation import Answer
from chatglm_ja.inference.models import LAST_STAGE, Stage

log = logging.getLogger(__name__)

# The starts of texts on which logits are compared; the base's logits stay in memory.
COMPARED_TEXTS = 4
COMPARED_TOKENS = 128
TIMED_TEXT = "?"  # after which the speed of generation is measured

Results = dict[str, Any]


class Evaluation:
    """Measures the stages one by one. The base comes first: the others are compared with it.

    All data is read when it is made, before any model is loaded:

    texts           held-out texts by language
    prompts         questions of the prompts file
    held_out        held-out questions
    choices         multiple-choice questions by language
    directions      lines and their translations

    `baseline` holds what the stages are compared with: the first one's values.
    """

    def __init__(self, config: EvalConfig) -> None:
        """Read the data. Raises DataError for what is empty or bad."""
        self.config = config
        reader = SourceReader(config)
        self.texts = {
            language: corpus.take_characters(texts, config.max_chars)
            for language, texts in reader.texts_by_language(config.sources).items()
        }
        reader.check()
        for language, texts in self.texts.items():
            if not any(texts):
                raise DataError(f"--sources hold no {language} text: there is nothing to score")
        self.prompts, self.held_out = answers.read_questions(
            config.prompts, config.conversations, list(self.texts), reader
        )
        self.choices = multiple_choice.read_questions(config.choices, reader, config.choices_shots)
        self.benchmarks = benchmarks.Benchmarks(config)
        self.directions = translation.read_directions(config.parallel, reader, config.translations)
        self.told_languages = [kind for kind in self.texts if confusion.check_language(kind)]
        self.measures = [
            self._score_texts,
            self._compare_with_base,
            self._measure_answers,
            self._score_probes,
            self._measure_translations,
            self._score_choices,
            self.benchmarks.run,
        ]
        self.baseline = Baseline()
        self._base_ids: dict[str, list[list[int]]] = {}  # language -> the texts that are compared
        self._base_logits: dict[str, loading.Logits] = {}
        self._base_rows = 0
        self._base_answers: Mapping[Question, Answer] = {}  # sampled, to all questions
        self._probes: list[probes.Probe] = []
        self._speeds: dict[int, float] = {}  # rows of the embeddings -> tokens per second

    def evaluate_stage(self, stage: Stage) -> Results:
        """Return all measures of a stage. Raises ConfigError if its window is too short."""
        scorer = benchmarks.load_scorer(stage, self.config)
        results: Results = {"name": stage.name}
        for measure in self.measures:
            results |= measure(stage, scorer)
        return results

    def _score_texts(self, stage: Stage, scorer: Scorer) -> Results:
        model = scorer.model
        size = model.model.config.vocab_size
        if size not in self._speeds:  # models of one size are equally fast
            prompt = [*model.tokenizer.prefix, *model.tokenizer.encode(TIMED_TEXT)]
            self._speeds[size] = generation.tokens_per_second(model, prompt)
        rows = {}
        for language, texts in self.texts.items():
            score = scorer.score_texts(texts, f"{stage.name}: scoring {language}")
            rows[language] = {
                **dataclasses.asdict(score),
                "bits_per_char": score.bits_per_char,
                "bits_per_byte": score.bits_per_byte,
                "tokens_per_char": score.tokens_per_char,
                "chars_per_second": self._speeds[size] / score.tokens_per_char,
            }
        bits = ", ".join(f"{name} {row['bits_per_char']:.3f}" for name, row in rows.items())
        log.info("%s: bits per character %s", stage.name, bits)
        return {"languages": rows}

    def _compare_with_base(self, stage: Stage, scorer: Scorer) -> Results:
        """Compare the logits with the base's on the same ids; no entries for the base itself."""
        model = scorer.model
        prefix = model.tokenizer.prefix
        is_base = not self._base_ids
        if is_base:
            self._base_ids = {
                language: [
                    [*prefix, *model.tokenizer.encode(text)[:COMPARED_TOKENS]]
                    for text in texts[:COMPARED_TEXTS]
                ]
                for language, texts in self.texts.items()
            }
            self._base_rows = model.tokenizer.size
        rows = {}
        for language, ids in self._base_ids.items():
            parts = zip(*loading.compute_logits(model.model, ids, self._base_rows), strict=True)
            # The first token of the text is predicted at the end of the prefix.
            logits, totals = (torch.cat([p[len(prefix) - 1 :] for p in part]) for part in parts)
            new = (logits, totals)
            old = self._base_logits.setdefault(language, new)
            if not is_base:
                rows[language] = {
                    "tokens": len(new[0]),
                    "largest_difference": (old[0].float() - new[0].float()).abs().max().item(),
                    "divergence_bits": likelihood.compute_divergence(old, new).mean().item(),
                }
        return {"kept": rows}

    def _measure_answers(self, stage: Stage, scorer: Scorer) -> Results:
        """Measure the answers to all questions, generated together to fill the batches.

        Answers to all questions are sampled from every stage. The last one answers them greedily
        too, the others only those that are shown. Raises DataError for a held-out conversation
        that the base's format cannot express.
        """
        tokenizer = scorer.model.tokenizer
        if not tokenizer.has_chat_format:
            log.info("%s: no answers, the base has no chat template", stage.name)
            return {
                "answers": [], "answering": {}, "held_out": [], "likeness": [], "retention": {},
                "confusion": {},
            }  # fmt: skip
        is_last = stage.name == LAST_STAGE
        shown = [*answers.choose_examples(self.held_out), *self.prompts]
        every = [*self.prompts, *self.held_out]
        asked = {"greedy": every if is_last else shown, "sampled": every}
        try:
            prompts = {
                decoding: {question: tokenizer.build_prompt(question.messages) for question in own}
                for decoding, own in asked.items()
            }
        except FormatError as error:
            raise DataError(
                f"a held-out conversation has {error.reason} ({error.detail}): leave it out of "
                "--conversations"
            ) from None
        answered = answers.generate_decodings(
            scorer.model,
            prompts,
            self.config.max_new_tokens,
            generation.Sampling(self.config.temperature, self.config.top_p),
            batch_size=self.config.answer_batch_size,
            title=f"{stage.name}: answers",
        )
        return {
            "answers": answers.pair_with_questions(shown, answered),
            "answering": {
                decoding: answers.measure_answers({q: own[q] for q in self.prompts})
                for decoding, own in answered.items()
            },
            "held_out": answers.measure_kinds(
                self.held_out, answered if is_last else {"sampled": answered["sampled"]}
            ),
            "likeness": answers.measure_likeness(answered["sampled"], self.baseline),
            **self._compare_answers(answered["sampled"], scorer),
        }

    def _compare_answers(self, sampled: Mapping[Question, Answer], scorer: Scorer) -> Results:
        """Compare the sampled answers with the base's, language by language.

        The languages that the base knew are all but the first.
        """
        self._base_answers = self._base_answers or sampled
        kept: Results = {}
        confused: Results = {}
        for number, language in enumerate(self.texts):
            questions = [question for question in sampled if question.kind == language]
            if not questions:
                continue
            own = [sampled[question] for question in questions]
            if number:
                base = [self._base_answers[question] for question in questions]
                conversations = [question.messages for question in questions]
                kept[language] = retention.measure_retention(
                    language, conversations, base, own, scorer, self.baseline
                )
            if language in self.told_languages:
                texts = [answer.text for answer in own]
                asked = [question.text for question in questions]
                confused[language] = confusion.measure_confusion(
                    language, asked, texts, self.baseline
                )
        return {"retention": kept, "confusion": confused}

    def _score_probes(self, stage: Stage, scorer: Scorer) -> Results:
        if not self._probes:  # the base comes first: contexts are measured by its tokenizer
            self._probes = probes.build_probes(self.texts, scorer.model.tokenizer, scorer.window)
        title = f"{stage.name}: probes"
        return {"probes": probes.score_probes(scorer, self._probes, self.baseline, title)}

    def _measure_translations(self, stage: Stage, scorer: Scorer) -> Results:
        rows = translation.measure_translations(
            scorer.model,
            self.directions,
            self.baseline,
            self.config.answer_batch_size,
            f"{stage.name}: translations",
        )
        return {"translations": rows}

    def _score_choices(self, stage: Stage, scorer: Scorer) -> Results:
        title = f"{stage.name}: choices"
        rows = multiple_choice.score_questions(scorer, self.choices, self.baseline, title)
        return {"choices": rows}
