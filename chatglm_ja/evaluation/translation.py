"""Translation of held-out lines without and with examples, the classic use of a context.

    Chinese: 选择单元格。          the examples: the shortest pairs
    Japanese: セルを選択します。
    Chinese: 打开文件。
    Japanese:                    the model goes on; its first line is the translation

The model reads plain text, which the base can do too. Translations are compared with the reference
by chrF. What examples add is the gain from the context; what the model knows of the languages is in
both.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.evaluation import answers
from chatglm_ja.evaluation.paired import Baseline
from chatglm_ja.inference import generation
from chatglm_ja.inference.models import LoadedModel
from chatglm_ja.sources import Source

SHOTS = (0, 4)
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Direction:
    """Pairs of lines, source and translation, and the names of the two languages in prompts.

    `language` is the code of the translations' language.
    """

    language: str
    source: str
    target: str
    pairs: list[tuple[str, str]]

    @property
    def title(self) -> str:
        return f"{self.source} > {self.target}"


def read_directions(sources: Iterable[Source], reader: SourceReader, count: int) -> list[Direction]:
    """Read `count` pairs of every source, and those that serve as examples.

    Raises ConfigError for a source without columns, DataError for one with too few pairs.
    """
    directions = []
    needed = max(SHOTS) + count
    for source in sources:
        names = (source.columns or "").split(">")
        if len(names) != 2:
            raise ConfigError(
                f"--parallel {source} names no columns: expected LANGUAGE=FILE#FROM>TO, the names "
                "of the columns with the line and its translation"
            )
        pairs = [
            (str(question["content"]), str(answer["content"]))
            for question, answer in reader.conversations(source)
        ]
        pairs = [pair for pair in pairs if not any("\n" in line for line in pair)]
        if len(pairs) < needed:
            raise DataError(
                f"source {source.title} holds {len(pairs)} pairs of single lines: expected "
                f"{needed}, {max(SHOTS)} of them examples"
            )
        # Short examples leave room in the window.
        pairs = sorted(pairs[:needed], key=lambda pair: len(pair[0]) + len(pair[1]))
        directions.append(Direction(source.language, names[0], names[1], pairs))
    return directions


def make_prompt(direction: Direction, line: str, shots: int) -> str:
    """Return the text that a model continues with the translation of a line."""
    given = [f"{direction.source}: {a}\n{direction.target}: {b}\n" for a, b in direction.pairs]
    return f"{''.join(given[:shots])}{direction.source}: {line}\n{direction.target}:"


def measure_translations(
    model: LoadedModel,
    directions: Sequence[Direction],
    baseline: Baseline,
    batch_size: int,
    title: str = "translations",
) -> list[dict[str, Any]]:
    """Return chrF and an example for every direction and number of examples, beside the base."""
    settings = [(direction, shots) for direction in directions for shots in SHOTS]
    prompts = [
        model.tokenizer.prefix + model.tokenizer.encode(make_prompt(direction, line, shots))
        for direction, shots in settings
        for line, _ in direction.pairs[max(SHOTS) :]
    ]
    room = model.window - MAX_NEW_TOKENS
    # A line may also end with a token that holds more than the line break; first_line cuts there.
    line_break = model.tokenizer.encode("a\n")[-1]
    answered = iter(
        generation.generate_answers(
            model,
            [prompt[-room:] for prompt in prompts],
            MAX_NEW_TOKENS,
            batch_size=batch_size,
            title=title,
            stop_ids=[*model.tokenizer.stop_ids, line_break],
        )
    )
    rows = []
    for direction, shots in settings:
        pairs = direction.pairs[max(SHOTS) :]
        lines = [first_line(next(answered).text) for _ in pairs]
        references = [reference for _, reference in pairs]
        scores = answers.score_chrf(zip(lines, references, strict=True))
        rows.append(
            {
                "language": direction.language,
                "direction": direction.title,
                "shots": shots,
                **baseline.compare(("chrf", direction.title, shots), scores),
                "example": {"source": pairs[0][0], "reference": pairs[0][1], "text": lines[0]},
            }
        )
    return rows


def first_line(text: str) -> str:
    """Return what a model wrote before it went on to the next pair."""
    return text.partition("\n")[0].strip()
