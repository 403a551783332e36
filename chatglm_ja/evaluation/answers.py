"""The questions of step 7, a model's answers to them, and the measures of the answers.

Every question is answered in each of generation.DECODINGS. The measures are the shares of answers
in the question's language, of answers that end by themselves, and of repetition. Repetition is
counted over words, and over single characters of scripts without spaces (kana, Han) and marks, so
it does not depend on a tokenizer:

    "the cat, the cat"    the | cat | , | the | cat
    "猫が好き。"           猫 | が | 好 | き | 。
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_ja.chatglm3.chat_format import Message
from chatglm_ja.data import cleaning
from chatglm_ja.data.conversations import read_conversations
from chatglm_ja.data.readers import check_characters
from chatglm_ja.errors import DataError
from chatglm_ja.inference import generation
from chatglm_ja.inference.generation import DECODINGS, Answer, Sampling
from chatglm_ja.inference.models import LoadedModel
from chatglm_ja.sources import Source, load_yaml

NGRAM = 4
MIN_REPEATS = 3  # of a loop

_SINGLE = r"\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNITS = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]+|[^\w\s]")


def read_prompts(path: Path, languages: Collection[str]) -> dict[str, list[str]]:
    """Read a YAML file that maps languages, or `code`, to lists of questions.

    A language must be one of `languages`, or one that can be told by its letters. Raises DataError
    for anything else in the file.
    """
    known = list(dict.fromkeys([*languages, *cleaning.LANGUAGES, "code"]))
    if not path.exists():
        raise DataError(f"{path} not found: expected a YAML file of questions")
    prompts = load_yaml(path, DataError)
    if not isinstance(prompts, dict) or not prompts:
        raise DataError(f"{path} must map languages to lists of questions, as `ja: [...]`")
    for language, questions in prompts.items():
        if language not in known:
            raise DataError(f"{path}: unknown language {language!r}: expected {', '.join(known)}")
        if (
            not isinstance(questions, list)
            or not questions
            or not all(isinstance(question, str) and question.strip() for question in questions)
        ):
            raise DataError(f"{path}: {language} must be a list of questions, each a text")
        for number, question in enumerate(questions, start=1):
            if reject := check_characters(question):
                raise DataError(
                    f"{path}: {language}, question {number}: {reject.reason} ({reject.detail})"
                )
    return prompts


def read_held_out(sources: Iterable[Source]) -> dict[str, list[Sequence[Message]]]:
    """Read held-out conversations by kind. Raises DataError for an empty source or a bad record."""
    held_out: dict[str, list[Sequence[Message]]] = {}
    for source in sources:
        conversations = list(read_conversations(source))
        if not conversations:
            raise DataError(f"source {source.title} holds no conversation that ends with an answer")
        held_out.setdefault(source.language, []).extend(conversations)
    return held_out


def generate_decodings(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int = 0,
    batch_size: int = 32,
    title: str = "answers",
) -> dict[str, list[Answer]]:
    """Answer all prompts (token ids) in each of DECODINGS: name -> answers."""
    return {
        name: generation.generate_answers(
            model, prompts, max_new_tokens, sampling=choose_sampling(sampling), seed=seed,
            batch_size=batch_size, title=f"{title}, {name}",
        )
        for name, choose_sampling in DECODINGS.items()
    }  # fmt: skip


def measure_answers(answers: Sequence[Answer], kinds: Sequence[str]) -> dict[str, Any]:
    """Measure answers to questions of these kinds (a language, or code), one kind for each answer.

    `in_language`, `ended` and `repeated` are shares; `in_language` is None if no kind is a language
    that can be told by its letters. `longest_loop` is in units.
    """
    in_language: list[bool] = []
    for kind in dict.fromkeys(kinds):
        texts = [answer.text for answer, k in zip(answers, kinds, strict=True) if k == kind]
        in_language += cleaning.in_language(texts, kind) or []
    units = [split_units(answer.text) for answer in answers]
    return {
        "questions": len(answers),
        "in_language": sum(in_language) / len(in_language) if in_language else None,
        "ended": sum(answer.stopped for answer in answers) / len(answers),
        "repeated": sum(map(repeated_share, units)) / len(units),
        "longest_loop": max(map(longest_loop, units)),
    }


def measure_kinds(
    kinds: Sequence[str], answers: Mapping[str, Sequence[Answer]]
) -> list[dict[str, Any]]:
    """Measure the answers (by decoding) of every kind by itself."""
    rows = []
    for kind in dict.fromkeys(kinds):
        for decoding, all_answers in answers.items():
            own = [answer for answer, k in zip(all_answers, kinds, strict=True) if k == kind]
            measures = measure_answers(own, [kind] * len(own))
            rows.append({"kind": kind, "way": decoding, **measures})
    return rows


def pair_with_questions(
    questions: Sequence[tuple[str, str]], answers: Mapping[str, Sequence[Answer]]
) -> list[dict[str, Any]]:
    """Return a row for every (kind, question), with its answer in each decoding."""
    return [
        {
            "language": kind,
            "question": question,
            **{name: dataclasses.asdict(own[index]) for name, own in answers.items()},
        }
        for index, (kind, question) in enumerate(questions)
    ]


def split_units(text: str) -> list[str]:
    """Return the words, single characters and marks of a text, without the space between them."""
    return _UNITS.findall(text)


def repeated_share(units: Sequence[str], n: int = NGRAM) -> float:
    """Return the share of n-grams that occurred earlier in the same text: 1 - distinct / all.

    seq-rep-n of Welleck et al. 2020 (arXiv 1908.04319), over units instead of tokens. A text
    shorter than n repeats nothing.
    """
    grams = [tuple(units[start : start + n]) for start in range(len(units) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def longest_loop(units: Sequence[str]) -> int:
    """Return the length of the longest loop: a sequence of units at least three times in a row.

    It is 6 in "a b a b a b c", and 0 without a loop.
    """
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    codes = np.array([numbers[unit] for unit in units])
    longest = 0
    for period in range(1, len(codes) // MIN_REPEATS + 1):
        # The runs of units that equal the unit one period earlier lie between the breaks.
        breaks = np.flatnonzero(codes[period:] != codes[:-period])
        runs = np.diff(breaks, prepend=-1, append=len(codes) - period) - 1
        run = int(runs.max(initial=0))
        if run >= (MIN_REPEATS - 1) * period:
            longest = max(longest, run + period)
    return longest
