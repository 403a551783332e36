"""Validation losses by language and source, and checks of conversations that name the source.

test_train.py compares the losses with the plain model.
"""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from chatglm_ja.bases import families
from chatglm_ja.bases.interface import ModelTokenizer
from chatglm_ja.chatglm3 import chat_format
from chatglm_ja.data import dataset
from chatglm_ja.data.dataset import SourceCount
from chatglm_ja.errors import DataError
from chatglm_ja.messages import Message
from chatglm_ja.training import validation
from chatglm_ja.training.validation import Validation
from tests.tiny_models import make_base

Example = tuple[list[int], list[int]]
QUESTION = {"role": "user", "content": "これは何ですか"}


@pytest.fixture
def example(encoder: Any) -> Callable[..., Example]:
    def build(*answers: str) -> Example:
        messages: list[Message] = []
        for answer in answers:
            messages += [QUESTION, {"role": "assistant", "content": answer}]
        return chat_format.build_example(encoder, messages or [QUESTION])

    return build


def rows_of(*bins: list[Example]) -> datasets.Dataset:
    """Bins of conversations, those at odd places being of source 1."""
    return datasets.Dataset.from_dict(
        {
            "input_ids": [[token for ids, _ in row for token in ids] for row in bins],
            "labels": [[label for _, labels in row for label in labels] for row in bins],
            "lengths": [[len(ids) for ids, _ in row] for row in bins],
            "sources": [[place % 2 for place in range(len(row))] for row in bins],
        }
    )


def test_languages_and_the_whole_are_means_over_tokens() -> None:
    titles = ("ja/a", "ja/b", "zh/a", "en/none")
    scored = Validation(datasets.Dataset.from_dict({}), titles, {"ja": 50})
    metrics = scored.metrics([10.0, 20.0, 9.0, 0.0], [5.0, 5.0, 3.0, 0.0])
    assert metrics["eval_ja_loss"] == 3.0
    assert metrics["eval_ja_bits_per_char"] == pytest.approx(30 / math.log(2) / 50)
    assert metrics["eval_zh_loss"] == 3.0
    assert metrics["source_ja/a_loss"] == 2.0
    assert metrics["source_ja/b_loss"] == 4.0
    assert metrics["source_ja/b_tokens"] == 5
    assert metrics["validation_loss"] == 3.0
    assert not [name for name in metrics if "en" in name.split("_")[1].split("/")]


def test_answers_are_scored_per_character(
    example: Callable[..., Example], encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "source_titles", lambda *_: ("ja/a", "zh/b"))
    rows = rows_of([example("はい", "いいえ"), example("好的")], [example("いい")])
    scored = Validation.prepare(rows, Path(), "sft", encoder)
    assert scored.characters == {"ja": 2 + 3 + 2, "zh": 2}


def test_sources_of_one_name_count_as_one() -> None:
    """As two files of one name in two folders."""
    scored = Validation(datasets.Dataset.from_dict({}), ("ja/a", "zh/b", "ja/a"), {"ja": 100})
    metrics = scored.metrics([100.0, 1.0, 50.0], [20.0, 1.0, 30.0])
    assert metrics["eval_ja_loss"] == metrics["source_ja/a_loss"] == 3.0
    assert metrics["eval_ja_bits_per_char"] == pytest.approx(150 / math.log(2) / 100)
    assert metrics["source_ja/a_tokens"] == 50
    assert metrics["validation_loss"] == pytest.approx(151 / 51)


def test_nothing_scored_is_no_loss() -> None:
    assert Validation(datasets.Dataset.from_dict({}), ("ja/a",), {}).metrics([0.0], [0.0]) == {}


def test_every_token_has_the_source_of_its_document() -> None:
    rows = [{"sources": [2, 0], "lengths": [1, 2]}, {"sources": [1], "lengths": [2]}]
    assert validation.token_sources(rows, 4).tolist() == [[2, 0, 0, 0], [1, 1, 0, 0]]


def test_data_without_a_manifest_names_no_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no manifest that names its sources"):
        dataset.source_titles(tmp_path, "sft")


def test_counts_are_those_of_the_rows(data_dir: Path, example: Callable[..., Example]) -> None:
    rows = rows_of([example("一"), example("二"), example("三")], [example("四")])
    counted = dataset.count_sources(rows, ["ja/a", "code/b", "ja/unused"])
    lengths = [len(example(text)[0]) for text in "一二三四"]
    assert counted == [
        SourceCount("ja/a", "ja", 3, lengths[0] + lengths[2] + lengths[3]),
        SourceCount("code/b", "code", 1, lengths[1]),
    ]
    assert dataset.count_sources(rows, ["ja/a", "ja/a"]) == [
        SourceCount("ja/a", "ja", 4, sum(lengths))
    ]
    packed = dataset.load_rows(data_dir, "sft", "train")
    assert dataset.count_sources(packed, ["ja/x"]) == dataset.count_sources(
        dataset.unpack_rows(packed), ["ja/x"]
    )


@pytest.fixture(scope="module")
def tokenizer(merged_dir: Path) -> ModelTokenizer:
    return families.load_tokenizer(merged_dir)


def test_good_conversations_pass(
    data_dir: Path, tokenizer: ModelTokenizer, example: Callable[..., Example]
) -> None:
    for split in ("train", "validation"):
        dataset.check_conversations(
            dataset.load_rows(data_dir, "sft", split), data_dir, split, tokenizer
        )
    rows = rows_of([example("はい")], [example("1", "b")])  # answers of one token
    dataset.check_conversations(rows, data_dir, "train", tokenizer)


def test_an_empty_answer_is_told_from_a_short_one_whatever_the_template_adds(
    data_dir: Path, tmp_path: Path
) -> None:
    """This template adds to the last answer as many tokens as a short one before it has."""
    folder = make_base("qwen3", tmp_path / "base", ["a b c"])
    path = folder / "chat_template.jinja"
    thought = "{% if loop.last and message.role == 'assistant' %}<think></think>{% endif %}"
    content = "{{ message.content }}"
    path.write_text(path.read_text().replace(content, thought + content))
    tokenizer = families.open_base(folder).tokenizer

    def example(*answers: str) -> Example:
        turns = ([QUESTION, {"role": "assistant", "content": answer}] for answer in answers)
        return tokenizer.build_example(list(itertools.chain.from_iterable(turns)))

    rows = rows_of(*([example("x" * length, "b")] for length in range(1, 30)), [example("b")])
    dataset.check_conversations(rows, data_dir, "train", tokenizer)
    for answers in (("", "b"), ("a", "")):
        with pytest.raises(DataError, match="has an empty answer"):
            dataset.check_conversations(rows_of([example(*answers)]), data_dir, "train", tokenizer)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("untrained", "has no token that is trained"),
        ("empty", "has an empty answer"),
        ("empty at the end", "has an empty answer"),
        ("labels", "has labels that are not its tokens"),
    ],
)
def test_a_bad_conversation_is_named_with_its_source(
    tmp_path: Path,
    data_dir: Path,
    tokenizer: ModelTokenizer,
    example: Callable[..., Example],
    copy_of: Callable[[Path, Path], Path],
    problem: str,
    message: str,
) -> None:
    data = copy_of(data_dir, tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["counts"]["sft"]["sources"] = [{"name": "ja/good"}, {"name": "code/bad"}]
    (data / "manifest.json").write_text(json.dumps(manifest))
    bad = {
        "untrained": example(),
        "empty": example("", "答え"),
        "empty at the end": example("答え", ""),
        "labels": (example("x")[0], [label and 7 for label in example("x")[1]]),
    }[problem]
    rows = rows_of([example("一"), example("二")], [example("三"), bad, example("四")])
    with pytest.raises(DataError, match=f"train conversation 4, from code/bad, {message}: "):
        dataset.check_conversations(rows, data, "train", tokenizer)
    with pytest.raises(DataError, match="これは何ですか"):
        dataset.check_conversations(rows, data, "train", tokenizer)


@pytest.mark.parametrize(
    "changes",
    [
        {"lengths": [[3], [5]]},  # the right sum, in the wrong rows
        {"lengths": [[4, 0], [4]], "sources": [[0, 0], [0]]},
        {"sources": [[0], [1]]},
        {"sources": [[0, 0], [0]]},
        {"labels": [[1, 2, 3], [1, 2, 3, 4]]},
    ],
)
def test_rows_that_contradict_themselves_are_refused(
    data_dir: Path, tokenizer: ModelTokenizer, changes: dict[str, list[list[int]]]
) -> None:
    """The data's manifest names one source."""
    good = {
        "input_ids": [[1, 2, 3, 4]] * 2,
        "labels": [[1, 2, 3, 4]] * 2,
        "lengths": [[4], [4]],
        "sources": [[0], [0]],
    }
    dataset.check_conversations(datasets.Dataset.from_dict(good), data_dir, "train", tokenizer)
    with pytest.raises(DataError, match="of a validation row do not match"):
        rows = datasets.Dataset.from_dict(good | changes)
        dataset.check_conversations(rows, data_dir, "validation", tokenizer)


def test_losses_stand_beside_those_before() -> None:
    sources = [SourceCount("ja/a", "ja", 1000, 50_000), SourceCount("zh/b", "zh", 5, 60)]
    history = [
        {"step": 0, "source_ja/a_loss": 3.0, "source_ja/a_tokens": 90.0, "eval_ja_loss": 3.0},
        {"step": 5, "loss": 2.0},
        {"step": 9, "source_ja/a_loss": 1.5, "source_ja/a_tokens": 90.0},
    ]
    before = validation.describe_losses(sources, history[:1])
    assert before[0].split() == ["source", "language", "examples", "tokens", "loss", "before"]
    assert before[1].split() == ["ja/a", "ja", "1,000", "50,000", "3.0000"]
    after = validation.describe_losses(sources, history)
    assert after[1].split() == ["ja/a", "ja", "1,000", "50,000", "3.0000", "1.5000"]
    # Nothing of this one was kept for validation.
    assert after[2].split() == ["zh/b", "zh", "5", "60", "-", "-"]
    assert len({len(line) for line in after}) == 1
    first, second = validation.losses_by_source(sources, history)
    assert first == {
        "source": "ja/a", "language": "ja", "examples": 1000, "tokens": 50_000,
        "scored_tokens": 90.0, "loss_before": 3.0, "loss": 1.5,
    }  # fmt: skip
    assert second["loss"] is None
    # A run that began without evaluations does not know what was before.
    late = validation.losses_by_source(sources, history[1:])[0]
    assert (late["loss_before"], late["loss"]) == (None, 1.5)
    assert validation.describe_losses(sources, history[1:])[1].split()[-2:] == ["-", "1.5000"]
