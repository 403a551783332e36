"""Open questions whose answers a judge is to rate: MT-Bench, ELYZA-tasks-100 and their like.

Two forms of records are read, from lines of JSON or from a CSV file:

    {"question_id": 1, "category": "coding", "turns": ["...", "..."]}      MT-Bench, Japanese too
    input,output,eval_aspect                                               ELYZA-tasks-100

The turns of a conversation are answered one after another, each after the model's own answers to
those before it. The answers are files that FastChat's judge reads, one line for each question; all
columns of the question stay in it, so a judge finds reference and criteria there too:

    answers/NAME/STAGE.jsonl
        {"question_id": 1, "category": ..., "turns": [...], "model_id": "sft",
         "choices": [{"index": 0, "turns": [answers], "ended": [true, false]}],
         "generate_params": {"temperature": 0.8, "top_p": 0.8, "top_k": 50, "max_new_token": 256}}

An answer has not `ended` if it was cut at the limit.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chatglm_ja.data import cleaning
from chatglm_ja.data.readers import Record, Reject, check_characters
from chatglm_ja.errors import DataError
from chatglm_ja.evaluation.settings import EvalConfig
from chatglm_ja.inference import generation
from chatglm_ja.inference.generation import Answer, Sampling
from chatglm_ja.inference.models import LoadedModel
from chatglm_ja.messages import Message

FOLDER = "answers"


@dataclass(frozen=True)
class JudgedQuestion:
    """The user's turns of a conversation, and the columns that a judge may need."""

    turns: tuple[str, ...]
    record: Record


Questions = Mapping[str, Sequence[JudgedQuestion]]  # by the name of their file
Answered = dict[str, list[Record]]  # the lines of a stage, by the name of the file


def read_questions(paths: Iterable[Path]) -> Questions:
    """Read the questions of every file; one without an id gets its number, from 1.

    Raises DataError for a file that is no file of questions, for any bad question, and for two of
    one id: an average over a part of a benchmark is no result of it.
    """
    return {path.stem: _read_file(path) for path in paths}


def _read_file(path: Path) -> list[JudgedQuestion]:
    questions: dict[str, JudgedQuestion] = {}
    try:
        for number, record in enumerate(_read_records(path), start=1):
            parsed = _parse_question(record, number)
            if isinstance(parsed, Reject):
                raise DataError(f"{path} question {number}: {parsed.reason} ({parsed.detail})")
            name = str(parsed.record["question_id"])
            if name in questions:
                raise DataError(
                    f"{path} question {number}: the question_id {name} again: expected one for "
                    "each question, by which a judge finds the answer"
                )
            questions[name] = parsed
    except OSError as error:
        raise DataError(f"{path} could not be read ({error.strerror})") from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise DataError(
            f"{path} is no file of questions ({error}): expected lines of JSON, or a .csv file, in "
            "UTF-8"
        ) from None
    if not questions:
        raise DataError(f"{path} holds no question: expected one at least")
    return list(questions.values())


def _read_records(path: Path) -> Iterator[Record]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        for row in csv.DictReader(io.StringIO(text, newline="")):
            if None in row or None in row.values():
                raise ValueError("its lines have different numbers of columns")
            yield dict(row)
        return
    for line in text.split("\n"):
        if line.strip():
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"found {line[:40]!r} on a line")
            yield record


def _parse_question(record: Record, number: int) -> JudgedQuestion | Reject:
    turns = record.get("turns", [record.get("input")])
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
        return Reject(
            "no turns",
            f"found the columns {', '.join(record)}; expected turns, a list of texts (MT-Bench), "
            "or input, a text (ELYZA-tasks-100)",
        )
    for turn in turns:
        if reject := check_characters(turn):
            return reject
        if not cleaning.clean(turn, "none"):
            return Reject("empty turn", "expected visible characters")
    return JudgedQuestion(tuple(turns), {"question_id": number, **record, "turns": turns})


def answer_questions(
    config: EvalConfig, questions: Questions, model: LoadedModel, stage: str
) -> Answered:
    """Answer all questions, sampled as --temperature and --top-p say; return the lines to write.

    Raises DataError if a conversation becomes too long for the model.
    """
    sampling = Sampling(config.temperature, config.top_p)
    settings = {**dataclasses.asdict(sampling), "max_new_token": config.max_new_tokens}
    return {
        name: [
            {
                **question.record,
                "model_id": stage,
                "choices": [
                    {
                        "index": 0,
                        "turns": [answer.text for answer in answers],
                        "ended": [answer.stopped for answer in answers],
                    }
                ],
                "generate_params": settings,
            }
            for question, answers in zip(
                group, _converse(config, group, model, sampling, f"{stage}: {name}"), strict=True
            )
        ]
        for name, group in questions.items()
    }


def _converse(
    config: EvalConfig,
    questions: Sequence[JudgedQuestion],
    model: LoadedModel,
    sampling: Sampling,
    title: str,
) -> list[list[Answer]]:
    """Return the answers to the turns of every question; a batch holds one turn of many."""
    conversations: list[list[Message]] = [[] for _ in questions]
    answers: list[list[Answer]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        places = [place for place, q in enumerate(questions) if turn < len(q.turns)]
        for place in places:
            text = cleaning.clean(questions[place].turns[turn], config.unicode_form)
            conversations[place].append({"role": "user", "content": text})
        prompts = [model.tokenizer.build_prompt(conversations[place]) for place in places]
        generation.check_lengths(model, prompts, config.max_new_tokens, f"{title}, turn {turn + 1}")
        generated = generation.generate_answers(
            model, prompts, config.max_new_tokens, sampling=sampling,
            batch_size=config.answer_batch_size, title=f"{title}, turn {turn + 1}",
        )  # fmt: skip
        for place, answer in zip(places, generated, strict=True):
            answers[place].append(answer)
            conversations[place].append({"role": "assistant", "content": answer.text})
    return answers


def write_answers(folder: Path, answered: Mapping[str, Answered]) -> None:
    """Write the lines of every stage (stage -> name -> lines) below a folder."""
    for stage, by_name in answered.items():
        for name, lines in by_name.items():
            path = folder / FOLDER / name / f"{stage}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            path.write_text(text, encoding="utf-8")
