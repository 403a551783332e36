"""In-context learning: what a model does with a text that it has just read.

Continued pretraining can leave bits per character as they are and still cost this ability (arXiv
2506.00288). A probe's answer is in its text and nowhere else, so it needs no knowledge. The text is
made of words, or starts of lines, of held-out pages, in an order that no page has:

    copy        セル 行 列 -> セル 行 列        recall 256  範囲を: グラフ
                印刷 式 値 -> ?                             印刷す: セルの
    reverse     セル 行 列 -> 列 行 セル                    範囲を: ?
                印刷 式 値 -> ?             labels      「形式」を選択します -> B
                                                        选择单元格并打开菜单 -> Y
                                                        グラフの種類を変える -> ?

copy, reverse   lists of words, each with itself in the same or the opposite order; the wrong
                answers are the words of the last list in other orders
recall N        pairs of words that fill N tokens of the base, and the first word of one; the wrong
                answers are the second words of others (arXiv 2307.03172 has random keys, too)
labels          lines of two languages, each with the letter of its language; the letters are
                arbitrary (arXiv 2303.03846)
repeat          a passage, and the same passage again: the share of its bits that a model saves
                because it has just read it, as the repeated sequences of arXiv 2209.11895

Several questions share a context, so the model reads it once. The model's answer is the choice that
gains most by the text (acc_gain in multiple_choice.py); of the same words in several orders, the
likeliest. repeat has no wrong answers to tell it from, and no chance level: it sees the first signs
of the ability in a model that is too small for the other probes, and the first of its loss.
"""

import bisect
import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chatglm_ja.bases.interface import ModelTokenizer
from chatglm_ja.data import language_id
from chatglm_ja.evaluation.answers import SINGLE_CHARACTERS
from chatglm_ja.evaluation.likelihood import Scorer
from chatglm_ja.evaluation.multiple_choice import ChoiceQuestion, chance, judge_questions
from chatglm_ja.evaluation.paired import Baseline

RECALL_TOKENS = (256, 512, 1024, 2048)
CONTEXTS = 4  # of a probe in a language
QUESTIONS = 8  # about each context
CHOICES = 4
LIST_WORDS = 3
EXAMPLES = 4  # of copy and reverse, and of each label
LINE_CHARACTERS = 24
PASSAGE_CHARACTERS = 64  # of repeat
SAVED = "saved"  # the metric of repeat
LABELS = "ABCDEFGHJKMNPRSTUVWXYZ"
MIN_WORDS = 40

# Words; of scripts without spaces, stretches that a list can hold.
_WORD = re.compile(
    rf"(?<![{SINGLE_CHARACTERS}])[{SINGLE_CHARACTERS}]{{2,4}}|[^\W\d_{SINGLE_CHARACTERS}]{{4,9}}"
)


@dataclass(frozen=True)
class Probe:
    """The questions of one kind in one language.

    `metric` is one of multiple_choice.METRICS, or SAVED for questions whose only choice is right.
    """

    language: str
    name: str
    questions: list[ChoiceQuestion]
    metric: str = "acc_gain"

    @property
    def chance(self) -> float:
        """The mean value of a model that does not use the text."""
        return 0.0 if self.metric == SAVED else chance(self.questions)

    def measure(self, scorer: Scorer, title: str) -> list[float]:
        """Return for every question 1 if it is answered rightly, else 0; of SAVED, the share."""
        if self.metric != SAVED:
            return judge_questions(scorer, self.questions, [self.metric], title)[self.metric]
        again = scorer.score_continuations([(q.text, q.choices) for q in self.questions], title)
        first = scorer.score_continuations([(q.text[-1], q.choices) for q in self.questions], title)
        return [1 - own / alone for (own,), (alone,) in zip(again, first, strict=True)]


def build_probes(
    texts: Mapping[str, Sequence[str]], tokenizer: ModelTokenizer, window: int
) -> list[Probe]:
    """Make the probes of every language from its held-out texts; the same for the same texts.

    `tokenizer` is the base's, which measures contexts; none is longer than `window`. A language
    whose texts have fewer than MIN_WORDS words has no probes.
    """
    lines = {
        language: _find_lines(group, language, LINE_CHARACTERS) for language, group in texts.items()
    }
    languages = list(texts)
    probes = []
    for place, language in enumerate(languages):
        words = _find_words(texts[language], language)
        if len(words) < MIN_WORDS:
            continue
        draw = random.Random(language)
        for name, order in (("copy", 1), ("reverse", -1)):
            questions = [q for _ in range(CONTEXTS) for q in _ask_lists(words, order, draw)]
            probes.append(Probe(language, name, questions, "acc"))
        other = languages[place - 1]  # of two languages, each once as the first
        if other != language and min(len(lines[language]), len(lines[other])) > EXAMPLES:
            pair = (lines[language], lines[other])
            questions = [q for _ in range(CONTEXTS) for q in _ask_labels(pair, draw)]
            probes.append(Probe(language, "labels", questions))
        for tokens in RECALL_TOKENS:
            if tokens > window:
                break
            questions = [
                q for _ in range(CONTEXTS) for q in _ask_pairs(words, tokenizer, tokens, draw)
            ]
            if questions:
                probes.append(Probe(language, f"recall {tokens}", questions))
        passages = _find_lines(texts[language], language, PASSAGE_CHARACTERS)
        if questions := list(_ask_again(passages, tokenizer, window, draw)):
            probes.append(Probe(language, "repeat", questions, SAVED))
    return probes


def score_probes(
    scorer: Scorer, probes: Sequence[Probe], baseline: Baseline, title: str = "probes"
) -> list[dict[str, Any]]:
    """Return a row for every probe: the mean of what it measures, compared with the base's."""
    rows = []
    for probe in probes:
        label = f"{title} {probe.language} {probe.name}"
        values = probe.measure(scorer, label)
        rows.append(
            {
                "language": probe.language,
                "probe": probe.name,
                "chance": probe.chance,
                **baseline.compare(("probes", probe.language, probe.name), values),
            }
        )
    return rows


def _find_words(texts: Sequence[str], language: str) -> list[str]:
    """Return the distinct words of the texts that are in the language's script, in order."""
    words = list(dict.fromkeys(word for text in texts for word in _WORD.findall(text)))
    fits = language_id.in_language(words, language)
    return words if fits is None else [w for w, is_own in zip(words, fits, strict=True) if is_own]


def _find_lines(texts: Sequence[str], language: str, length: int) -> list[str]:
    """Return the starts of the distinct long lines that are in the language's script."""
    lines = dict.fromkeys(line[:length] for text in texts for line in text.split("\n"))
    long = [line for line in lines if len(line) == length]
    fits = language_id.in_language(long, language)
    return long if fits is None else [x for x, is_own in zip(long, fits, strict=True) if is_own]


def _ask_lists(words: Sequence[str], order: int, draw: random.Random) -> Iterator[ChoiceQuestion]:
    """Yield questions after examples of lists that are copied (`order` 1) or reversed (-1)."""
    lists = [draw.sample(words, LIST_WORDS) for _ in range(EXAMPLES + QUESTIONS)]
    context = "".join(f"{' '.join(own)} -> {' '.join(own[::order])}\n" for own in lists[:EXAMPLES])
    for own in lists[EXAMPLES:]:
        # Not the opposite order: a model that can only copy would always choose it.
        others = [list(p) for p in itertools.permutations(own) if list(p) not in (own, own[::-1])]
        choices = [own[::order], *draw.sample(others, CHOICES - 1)]
        texts = [f" {' '.join(choice)}" for choice in choices]
        yield _make_question(f"{context}{' '.join(own)} ->", texts, draw)


def _ask_labels(
    pair: tuple[Sequence[str], Sequence[str]], draw: random.Random
) -> Iterator[ChoiceQuestion]:
    """Yield questions after lines of two languages with their labels."""
    labels = draw.sample(LABELS, 2)
    examples = [
        (line, label)
        for lines, label in zip(pair, labels, strict=True)
        for line in draw.sample(list(lines), EXAMPLES)
    ]
    draw.shuffle(examples)
    context = "".join(f"{line} -> {label}\n" for line, label in examples)
    known = {line for line, _ in examples}
    for _ in range(QUESTIONS):
        side = draw.randrange(2)
        line = draw.choice([line for line in pair[side] if line not in known])
        choices = [f" {labels[side]}", f" {labels[1 - side]}"]
        yield _make_question(f"{context}{line} ->", choices, draw)


def _ask_pairs(
    words: Sequence[str], tokenizer: ModelTokenizer, tokens: int, draw: random.Random
) -> Iterator[ChoiceQuestion]:
    """Yield questions about pairs of words that fill `tokens` tokens; none if words run out."""

    def size(text: str) -> int:
        return len(tokenizer.encode(text))

    drawn = draw.sample(words, len(words))
    keys, values = drawn[::2], drawn[1::2]
    pairs = list(zip(keys, values, strict=False))
    lines = [f"{key}: {value}\n" for key, value in pairs]
    # A question adds a key and any value; what their tokens are depends on what precedes them.
    question = f"{max(keys, key=size)}: {max(values, key=size)}"
    room = tokens - len(tokenizer.prefix) - size(question) - 4
    counts = range(len(lines) + 1)
    count = bisect.bisect(counts, room, key=lambda n: size("".join(lines[:n]))) - 1
    if count == len(pairs) or count < CHOICES:
        return
    pairs, context = pairs[:count], "".join(lines[:count])
    for key, value in draw.sample(pairs, min(QUESTIONS, count)):
        others = draw.sample([other for _, other in pairs if other != value], CHOICES - 1)
        choices = [f" {choice}" for choice in (value, *others)]
        yield _make_question(f"{context}{key}:", choices, draw)


def _ask_again(
    passages: Sequence[str], tokenizer: ModelTokenizer, window: int, draw: random.Random
) -> Iterator[ChoiceQuestion]:
    """Yield passages that are asked for after themselves, as many as other probes ask questions."""
    room = (window - len(tokenizer.prefix)) // 2 - 1
    short = [passage for passage in passages if len(tokenizer.encode(passage)) < room]
    for passage in draw.sample(short, min(CONTEXTS * QUESTIONS, len(short))):
        yield ChoiceQuestion(f"{passage}\n", (passage,), 0)


def _make_question(text: str, choices: list[str], draw: random.Random) -> ChoiceQuestion:
    """Return a question whose right answer, the first choice, is put in any place.

    Of choices that are equally likely the first counts as the answer.
    """
    right = choices[0]
    draw.shuffle(choices)
    return ChoiceQuestion(text, tuple(choices), choices.index(right))
