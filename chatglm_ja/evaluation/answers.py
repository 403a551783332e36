"""The questions of step 7, and how a model answers them: language, loops, ends.

Every question is asked twice, greedy and sampled. Of the answers it is told how many are in the
question's language and end by themselves, and how much they repeat themselves (repetition.py).
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chatglm_ja.chatglm3 import chat_format
from chatglm_ja.data import cleaning, conversations
from chatglm_ja.data.readers import check_characters
from chatglm_ja.errors import DataError
from chatglm_ja.evaluation import repetition
from chatglm_ja.inference import generation
from chatglm_ja.inference.generation import GREEDY, Answer, Sampling
from chatglm_ja.sources import Source, load_yaml

WAYS = ("greedy", "sampled")

Talk = Sequence[chat_format.Message]  # a conversation that the model shall answer


def read_prompts(path: Path, languages: Collection[str]) -> dict[str, list[str]]:
    """A YAML file that maps languages, or `code`, to lists of questions.

    Raises DataError for anything else in it, such as a language that is neither one of `languages`
    nor one that can be told by its letters.
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


def read_held_out(sources: Iterable[Source]) -> dict[str, list[list[conversations.Message]]]:
    """The conversations of every kind. DataError for a source without any, or with a bad one."""
    held_out: dict[str, list[list[conversations.Message]]] = {}
    for source in sources:
        found = list(conversations.read_conversations(source))
        if not found:
            raise DataError(f"source {source.title} holds no conversation that ends with an answer")
        held_out.setdefault(source.language, []).extend(found)
    return held_out


def ask(
    model: Any,
    encoder: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    title: str,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, list[Answer]]:
    """The answers to all prompts (token ids), by way."""
    return {
        way: generation.generate_answers(
            model, encoder, prompts, max_new_tokens,
            sampling=GREEDY if way == "greedy" else sampling, seed=seed, batch_size=batch_size,
            title=f"{title}, {way}",
        )
        for way in WAYS
    }  # fmt: skip


def measure_answers(answers: Sequence[Answer], kinds: Sequence[str]) -> dict[str, Any]:
    """How some answers are, to questions of these kinds (a language, or code), as shares of them;
    `in_language` is None where no kind is one whose letters can be told."""
    fits: list[bool] = []
    for kind in dict.fromkeys(kinds):
        texts = [answer.text for answer, of in zip(answers, kinds, strict=True) if of == kind]
        fits += cleaning.in_language(texts, kind) or []
    parts = [repetition.split_units(answer.text) for answer in answers]
    return {
        "questions": len(answers),
        "in_language": sum(fits) / len(fits) if fits else None,
        "ended": sum(answer.stopped for answer in answers) / len(answers),
        "repeated": sum(map(repetition.repeated_share, parts)) / len(parts),
        "longest_loop": max(map(repetition.longest_loop, parts)),
    }


def answers_by_question(
    asked: Sequence[tuple[str, str]], given: Mapping[str, Sequence[Answer]]
) -> list[dict[str, Any]]:
    """For every (kind, question) the answers to it."""
    return [
        {
            "language": kind,
            "question": question,
            **{way: dataclasses.asdict(answers[index]) for way, answers in given.items()},
        }
        for index, (kind, question) in enumerate(asked)
    ]


def measures_by_kind(
    kinds: Sequence[str], given: Mapping[str, Sequence[Answer]]
) -> list[dict[str, Any]]:
    """The measures of every kind and way."""
    rows = []
    for kind in dict.fromkeys(kinds):
        places = [place for place, of in enumerate(kinds) if of == kind]
        for way, answers in given.items():
            of_kind = [answers[place] for place in places]
            rows.append(
                {"kind": kind, "way": way, **measure_answers(of_kind, [kind] * len(of_kind))}
            )
    return rows
