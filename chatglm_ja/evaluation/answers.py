"""Questions, a model's answers to them in each of generation.DECODINGS, and their measures.

Questions are those of a file of prompts, and held-out conversations up to their last answer.

The measures are the shares of answers in the question's language, of answers that end by
themselves, and of repetition. Repetition is counted over words, and over single characters of
scripts without spaces (kana, Han) and marks, so it does not depend on a tokenizer:

    "the cat, the cat"    the | cat | , | the | cat
    "猫が好き。"           猫 | が | 好 | き | 。

How like the expected answer an answer is, chrF says (Popović 2015): the agreement of character
n-grams, 0 to 100, which needs no words, and so no segmenter of Japanese. The other measures pass a
model whose answers are fluent and have nothing to do with the question.

At the end of fine-tuning, answers to validation questions are printed. The prompts are the starts
of validation conversations, as step 4 prepared them, up to their first answer. So no file of
questions is needed, and the expected answer is known.

    ja  次の文を日本語に翻訳してください。⏎Click to open the Fields dialog.
        expected  クリックするとフィールドダイアログが開きます。
        greedy    クリックするとフィールドダイアログを開きます。 ■
        sampled   フィールドダイアログを開きます。 ■           ■ ended by itself, … cut at the limit
"""

import dataclasses
import itertools
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chatglm_ja.cli import is_main_process
from chatglm_ja.data import cleaning, dataset, language_id
from chatglm_ja.data.readers import check_characters
from chatglm_ja.data.settings import UNICODE_FORM
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.errors import DataError
from chatglm_ja.evaluation.paired import Baseline
from chatglm_ja.inference import generation
from chatglm_ja.inference.generation import DECODINGS, Answer, Sampling
from chatglm_ja.inference.models import LoadedModel, load_model
from chatglm_ja.messages import IGNORE_INDEX, Message
from chatglm_ja.sources import Source, load_yaml
from chatglm_ja.training.settings import SftConfig

log = logging.getLogger(__name__)

MIN_REPEATS = 3  # of a loop
EXAMPLES = 10  # held-out questions whose answers are shown

SINGLE_CHARACTERS = (
    r"\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_UNITS = re.compile(rf"[{SINGLE_CHARACTERS}]|[^\W{SINGLE_CHARACTERS}]+|[^\w\s]")


def read_prompts(
    path: Path, languages: Collection[str], unicode_form: str = UNICODE_FORM
) -> dict[str, list[str]]:
    """Read a YAML file that maps languages, or `code`, to lists of questions, which are cleaned.

    A language must be one of `languages`, or one that can be told by its letters. Raises DataError
    for anything else in the file.
    """
    known = list(dict.fromkeys([*languages, *language_id.LANGUAGES, "code"]))
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
            questions[number - 1] = cleaning.clean(question, unicode_form)
            if not questions[number - 1]:
                raise DataError(f"{path}: {language}, question {number} has no visible character")
    return prompts


@dataclass(frozen=True, eq=False)  # the same question twice is two questions
class Question:
    """A conversation that ends with a question; `kind` is the language of its answer, or code."""

    kind: str
    messages: Sequence[Message]
    expected: str | None = None  # the answer

    @property
    def text(self) -> str:
        """The texts of all messages."""
        return "\n".join(message["content"] for message in self.messages)


Answered = Mapping[str, Mapping[Question, Answer]]  # by decoding


def read_questions(
    prompts: Path, held_out: Iterable[Source], languages: Collection[str], reader: SourceReader
) -> tuple[list[Question], list[Question]]:
    """Read the questions of the prompts file, and held-out ones, each with the expected answer.

    Raises DataError for a bad file (see `read_prompts`) and for a source without conversations.
    """
    asked = [
        Question(kind, [{"role": "user", "content": text}])
        for kind, texts in read_prompts(prompts, languages, reader.unicode_form).items()
        for text in texts
    ]
    expecting = []
    for source in held_out:
        conversations = list(reader.conversations(source))
        if not conversations:
            raise DataError(f"source {source.title} holds no conversation that ends with an answer")
        for *messages, answer in conversations:
            expecting.append(Question(source.language, messages, answer["content"]))
    return asked, expecting


def choose_examples(questions: Sequence[Question], count: int = EXAMPLES) -> list[Question]:
    """Return the first questions of every kind in turn, sorted by kind."""
    kinds = list(dict.fromkeys(question.kind for question in questions))
    groups = [[question for question in questions if question.kind == kind] for kind in kinds]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*groups))
    chosen = [question for question in in_turn if question is not None][:count]
    return sorted(chosen, key=lambda question: kinds.index(question.kind))


def generate_decodings(
    model: LoadedModel,
    prompts: Mapping[str, Mapping[Question, list[int]]],
    max_new_tokens: int,
    sampling: Sampling,
    **options: Any,
) -> Answered:
    """Answer the prompts (ids) of each of DECODINGS.

    `options` are those of generation.generate_answers: `batch_size`, `seed`, `title`.
    """
    answered = {}
    title = options.pop("title", "answers")
    for name, choose_sampling in DECODINGS.items():
        options |= {"sampling": choose_sampling(sampling), "title": f"{title}, {name}"}
        ids = list(prompts[name].values())
        answers = generation.generate_answers(model, ids, max_new_tokens, **options)
        answered[name] = dict(zip(prompts[name], answers, strict=True))
    return answered


def measure_answers(answers: Mapping[Question, Answer]) -> dict[str, Any]:
    """Measure answers.

    `in_language`, `ended` and `repeated` are shares; `in_language` is None if no question is in a
    language that can be told by its letters. `longest_loop` is in units.
    """
    in_language: list[bool] = []
    for kind in dict.fromkeys(question.kind for question in answers):
        texts = [answer.text for question, answer in answers.items() if question.kind == kind]
        in_language += language_id.in_language(texts, kind) or []
    units = [split_units(answer.text) for answer in answers.values()]
    return {
        "questions": len(answers),
        "in_language": sum(in_language) / len(in_language) if in_language else None,
        "ended": sum(answer.stopped for answer in answers.values()) / len(answers),
        "repeated": sum(map(repeated_share, units)) / len(units),
        "longest_loop": max(map(longest_loop, units)),
    }


def measure_kinds(questions: Sequence[Question], answered: Answered) -> list[dict[str, Any]]:
    """Measure the answers to the questions of every kind, in each decoding, by themselves."""
    return [
        {
            "kind": kind,
            "way": decoding,
            **measure_answers({q: answers[q] for q in questions if q.kind == kind}),
        }
        for kind in dict.fromkeys(question.kind for question in questions)
        for decoding, answers in answered.items()
    ]


def measure_likeness(
    answers: Mapping[Question, Answer], baseline: Baseline
) -> list[dict[str, Any]]:
    """Return for every kind of question the chrF of the answers, compared with the base's.

    Questions without an expected answer do not count.
    """
    pairs: dict[str, list[tuple[str, str]]] = {}
    for question, answer in answers.items():
        if question.expected is not None:
            pairs.setdefault(question.kind, []).append((answer.text, question.expected))
    return [
        {"kind": kind, **baseline.compare(("likeness", kind), score_chrf(own))}
        for kind, own in pairs.items()
    ]


def score_chrf(pairs: Iterable[tuple[str, str]]) -> list[float]:
    """Return the chrF of each text and its reference, as sacrebleu computes it for a sentence."""
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    return [chrf.sentence_score(text, [reference]).score for text, reference in pairs]


def pair_with_questions(questions: Sequence[Question], answered: Answered) -> list[dict[str, Any]]:
    """Return a row for every question, with its answer in each decoding."""
    return [
        {
            "language": question.kind,
            "question": question.text,
            "expected": question.expected,
            **{name: dataclasses.asdict(answers[question]) for name, answers in answered.items()},
        }
        for question in questions
    ]


def split_units(text: str) -> list[str]:
    """Return the words, single characters and marks of a text, without the space between them."""
    return _UNITS.findall(text)


def repeated_share(units: Sequence[str], n: int = 4) -> float:
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


def print_samples(config: SftConfig) -> None:
    """Let the merged model answer `config.samples` questions of every kind; print the answers.

    The model is published already, so a full GPU is only logged.
    """
    if not is_main_process():
        return
    rows = dataset.unpack_rows(dataset.load_rows(config.data, "sft", "validation"))
    kinds = [dataset.title_language(title) for title in dataset.source_titles(config.data, "sft")]
    chosen: dict[str, list[Any]] = {kind: [] for kind in kinds}
    for place, (source,) in enumerate(rows["sources"]):
        if len(chosen[kinds[source]]) < config.samples:
            chosen[kinds[source]].append(rows[place])
    questions = [(kind, row) for kind, group in chosen.items() for row in group]
    if not questions:
        return
    try:
        print(describe_samples(_answer_questions(config, questions)))
    except torch.OutOfMemoryError as error:
        log.warning("no sample answers, the GPU's memory is full: %s", str(error).split(". ")[0])


def _answer_questions(
    config: SftConfig, questions: Sequence[tuple[str, Any]]
) -> list[dict[str, Any]]:
    """Answer questions, given as (kind, row of the SFT data); see `pair_with_questions`."""
    model = load_model(config.output_dir)
    prompts = {}
    for kind, row in questions:
        start, end = _find_first_answer(row["labels"])
        ids = row["input_ids"][:start]
        # Special tokens have no text.
        text, expected = (
            model.tokenizer.decode(part).strip() for part in (ids, row["input_ids"][start:end])
        )
        prompts[Question(kind, [{"role": "user", "content": text}], expected)] = ids
    answered = generate_decodings(
        model,
        dict.fromkeys(DECODINGS, prompts),
        config.max_new_tokens,
        Sampling(),
        seed=config.seed,
    )
    return pair_with_questions(list(prompts), answered)


def _find_first_answer(labels: Sequence[int]) -> tuple[int, int]:
    """Return where a conversation's first answer starts, and where the token that ends it is."""
    groups = itertools.groupby(range(len(labels)), key=lambda place: labels[place] != IGNORE_INDEX)
    first = next(list(places) for is_answer, places in groups if is_answer)
    return first[0], first[-1]


def describe_samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """Format the samples as lines; the last one counts the answers that ended by themselves."""

    def shorten(text: str, width: int = 160) -> str:
        text = text.replace("\n", "⏎")
        return text if len(text) <= width else text[: width - 1] + "…"

    lines = ["answers to validation questions; ■ ended by itself, … cut at the limit"]
    for sample in samples:
        lines.append(f"{sample['language']:<4}  {shorten(sample['question'])}")
        lines.append(f"      expected  {shorten(sample['expected'])}")
        for name in DECODINGS:
            end = "■" if sample[name]["stopped"] else "…"
            lines.append(f"      {name:<8}  {shorten(sample[name]['text'])} {end}")
    ended = ", ".join(
        f"{sum(sample[name]['stopped'] for sample in samples)} of {len(samples)} {name}"
        for name in DECODINGS
    )
    return "\n".join([*lines, f"ended by themselves: {ended}"])
