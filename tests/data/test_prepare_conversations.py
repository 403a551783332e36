"""Fine-tuning data: shares, whole conversations, trained tokens in every example, full bins."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatglm_ja.bases.chatglm3 import ChatGLM3Tokenizer
from chatglm_ja.bases.interface import FormatError
from chatglm_ja.chatglm3 import chat_format
from chatglm_ja.chatglm3.tokenizer import EOS_ID
from chatglm_ja.data import dataset, packing, prepare_conversations, resume, token_store
from chatglm_ja.errors import DataError
from chatglm_ja.messages import IGNORE_INDEX
from chatglm_ja.sources import Source
from tests.conftest import DATA, prepare_config, source_folders, write_sft

UNUSED = [Source("ja", "unused.txt")]


def write(folder: Path, rows: list[Any]) -> Source:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source("ja", str(path))


def conversation(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


def examples(folder: Path) -> list[tuple[list[int], list[int]]]:
    parts = []
    for row in dataset.load_rows(folder, "sft", "train"):
        start = 0
        for length in row["lengths"]:
            span = slice(start, start + length)
            parts.append((row["input_ids"][span], row["labels"][span]))
            start += length
    return parts


def test_kinds_have_their_shares(tmp_path: Path, merged_dir: Path) -> None:
    kinds = ("ja", "zh", "en", "code")
    config = prepare_config(
        merged_dir,
        UNUSED,
        sft_sources=[
            Source(kind, str(DATA / "train_sft.jsonl.gz"), where=("kind", kind)) for kind in kinds
        ],
        sft_shares=("ja=52", "zh=22", "en=9", "code=17"),
        sft_examples=200,
        sft_validation_examples=20,
        max_length=512,
    )
    counts = write_sft(tmp_path, config)
    assert counts["train_examples"] == {"ja": 104, "zh": 44, "en": 18, "code": 34}
    assert sum(counts["validation_examples"].values()) == 20
    rows = dataset.load_rows(tmp_path, "sft", "train")
    assert sum(map(len, rows["lengths"])) == 200
    sources = [number for row in rows for number in row["sources"]]
    assert [sources.count(number) for number in range(4)] == [104, 44, 18, 34]


def test_every_source_has_validation_conversations(tmp_path: Path, merged_dir: Path) -> None:
    """In proportion to its size, at least one unless it has only one."""
    sources = []
    for name, count in (("large", 90), ("small", 4), ("tiny", 1)):
        (tmp_path / name).mkdir()
        path = write(
            tmp_path / name, [conversation(f"{name}{i}", f"答え{i}") for i in range(count)]
        )
        sources.append(Source("ja", path.path, name=name))
    config = prepare_config(
        merged_dir, UNUSED, sft_sources=sources, sft_examples=80, sft_validation_examples=12
    )
    write_sft(tmp_path, config)
    counts = {}
    for split in ("train", "validation"):
        rows = dataset.load_rows(tmp_path, "sft", split)
        numbers = [number for row in rows for number in row["sources"]]
        counts[split] = [numbers.count(number) for number in range(3)]
    assert counts["validation"] == [11, 1, 0]
    assert sum(counts["train"]) == 80


@pytest.mark.parametrize(
    ("sources", "count", "expected"),
    [
        ([0, 0, 1, 0, 1, 1], 2, [True, False, True, False, False, False]),
        ([0, 0, 1, 0, 1, 1], 1, [True, False, False, False, False, False]),
        ([0, 1], 2, [True, True]),
        ([0, 1], 0, [False, False]),
        ([3, 3, 3], 2, [True, True, False]),
        ([0, 1, 1], 1, [False, True, False]),
    ],
)
def test_the_first_of_each_source_are_held_out(
    sources: list[int], count: int, expected: list[bool]
) -> None:
    assert prepare_conversations._hold_out(np.array(sources), count).tolist() == expected


def test_bins_hold_whole_conversations(data_dir: Path) -> None:
    rows = dataset.load_rows(data_dir, "sft", "train")
    assert sum(len(lengths) for lengths in rows["lengths"]) == 8
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["lengths"]) <= 256
    for ids, labels in examples(data_dir):
        assert ids[-1] == labels[-1] == EOS_ID
        assert labels[0] == IGNORE_INDEX


def test_examples_have_the_chat_format(tmp_path: Path, merged_dir: Path, encoder: Any) -> None:
    rows = [conversation(f"質問{i}", f"答え{i}", "続き", "</s>と<|user|>") for i in range(5)]
    config = prepare_config(merged_dir, UNUSED, sft_sources=[write(tmp_path, rows)], sft_examples=5)
    write_sft(tmp_path, config)
    expected = [chat_format.build_example(encoder, row["messages"]) for row in rows]
    assert sorted(examples(tmp_path)) == sorted(expected)


def test_a_conversation_with_evaluation_text_is_dropped(tmp_path: Path, merged_dir: Path) -> None:
    held_out = "評価だけに使う独特な言い回しは、訓練する文書のどこにも現れてはならない。"
    rows = [conversation("質問", "前置き。" + held_out), conversation("質問", "答え")]
    (tmp_path / "held.txt").write_text(held_out + "\n")
    config = prepare_config(
        merged_dir, UNUSED, sft_sources=[write(tmp_path, rows)], sft_examples=1, total_tokens=0,
        decontaminate=(Source("ja", str(tmp_path / "held.txt")),),
    )  # fmt: skip
    source = write_sft(tmp_path, config)["sources"][0]
    assert (source["contaminated"], source["kept"]) == (1, 1)


def test_a_long_conversation_is_cut_at_a_turn_or_dropped(
    tmp_path: Path, merged_dir: Path, encoder: Any
) -> None:
    rows = [
        conversation("古い質問" * 20, "古い答え" * 20, "新しい質問", "新しい答え"),
        conversation("質問", "長い答え" * 200),
        conversation("質問", "答え"),
        conversation("質問", "答え", "答えのない質問"),
        conversation("質問", "答え"),
    ]
    rows[0]["messages"].insert(0, {"role": "system", "content": "指示"})
    settings: dict[str, Any] = {
        "sft_sources": [write(tmp_path, rows)], "max_length": 64, "sft_examples": 2,
    }  # fmt: skip
    counts = write_sft(tmp_path, prepare_config(merged_dir, UNUSED, **settings))
    source = counts["sources"][0]
    assert {name: source[name] for name in ("shortened", "too long", "duplicate", "kept")} == {
        "shortened": 1, "too long": 1, "duplicate": 1, "kept": 2,
    }  # fmt: skip
    assert source["no answer at the end"] == 1
    shortened = [rows[0]["messages"][0], *rows[0]["messages"][3:]]
    assert chat_format.build_example(encoder, shortened) in examples(tmp_path)
    for _, labels in examples(tmp_path):
        assert any(label != IGNORE_INDEX for label in labels)

    other = tmp_path / "drop"
    other.mkdir()
    settings |= {"long_conversations": "drop", "sft_examples": 1}
    counts = write_sft(other, prepare_config(merged_dir, UNUSED, **settings))
    assert counts["sources"][0]["too long"] == 2

    settings |= {"sft_examples": 2}
    with pytest.raises(DataError, match=r"too long 2, .*\): raise --max-length, lower"):
        write_sft(other, prepare_config(merged_dir, UNUSED, **settings))


def test_a_long_conversation_loses_as_little_as_possible(
    tmp_path: Path, merged_dir: Path, encoder: Any
) -> None:
    turns = [f"{kind}{n}" + "長" * (n * 7 % 5) for n in range(6) for kind in ("問", "答")]
    row = conversation(*turns)
    row["messages"].insert(0, {"role": "system", "content": "指示"})
    system, *messages = row["messages"]
    fitting = [
        chat_format.build_example(encoder, [system, *messages[first:]])
        for first in range(0, len(messages), 2)
    ]
    source = write(tmp_path, [row])
    lengths = [len(ids) for ids, _ in fitting]
    for max_length in {*lengths, *(length - 1 for length in lengths[:-1])}:
        folder = tmp_path / str(max_length)
        folder.mkdir()
        settings = {"sft_sources": [source], "max_length": max_length}
        write_sft(folder, prepare_config(merged_dir, UNUSED, **settings))
        assert examples(folder) == [next(e for e in fitting if len(e[0]) <= max_length)]
    settings["max_length"] = lengths[-1] - 1
    with pytest.raises(DataError, match="too long 1"):
        write_sft(tmp_path, prepare_config(merged_dir, UNUSED, **settings))


def test_answers_that_are_not_to_be_trained_stay_as_context(
    tmp_path: Path, merged_dir: Path, encoder: Any
) -> None:
    rows = [conversation("問一", "答一", "問二", "答二") for _ in range(5)]
    rows[0]["messages"][1]["loss"] = False
    rows[1]["messages"][3]["weight"] = 0  # equal but for what is trained: no duplicate
    rows[2]["messages"][3]["weight"] = 0
    rows[3]["train"] = False
    rows[4]["messages"][1]["masked"] = rows[4]["messages"][3]["masked"] = True
    config = prepare_config(merged_dir, UNUSED, sft_sources=[write(tmp_path, rows)], sft_examples=2)
    counts = write_sft(tmp_path, config)["sources"][0]
    assert (counts["no trained answer"], counts["duplicate"], counts["kept"]) == (2, 1, 2)
    whole, _ = chat_format.build_example(encoder, rows[0]["messages"])
    trained = []
    for ids, labels in examples(tmp_path):
        assert ids == whole
        trained.append([label for label in labels if label != IGNORE_INDEX])
    line_break, user = encoder.encode("\n"), encoder.piece_to_id("<|user|>")
    assert sorted(trained) == sorted(
        [
            [*line_break, *encoder.encode("答二"), EOS_ID],
            [*line_break, *encoder.encode("答一"), user],
        ]
    )


def test_a_cut_that_leaves_no_trained_answer_is_counted_as_such(
    tmp_path: Path, merged_dir: Path
) -> None:
    row = conversation("古い質問" * 20, "古い答え" * 20, "新しい質問", "新しい答え")
    row["messages"][3]["loss"] = False
    config = prepare_config(merged_dir, UNUSED, sft_sources=[write(tmp_path, [row])], max_length=64)
    with pytest.raises(DataError, match=r"\(dropped: no trained answer 1\)"):
        write_sft(tmp_path, config)


def test_a_conversation_with_tools(tmp_path: Path, merged_dir: Path, encoder: Any) -> None:
    """The same example from the forms of OpenAI, of ShareGPT and of ChatGLM3."""
    arguments, seen = {"city": "大阪"}, '{"time": 12}'
    spelled = {"name": "clock", "arguments": json.dumps(arguments)}
    user, answer = conversation("何時？", "正午。")["messages"]
    openai = [
        user, {"role": "assistant", "tool_calls": [{"function": spelled}]},
        {"role": "tool", "content": seen}, answer,
    ]  # fmt: skip
    sharegpt = [
        user, {"from": "function_call", "value": json.dumps(spelled)},
        {"from": "observation", "value": seen}, answer,
    ]  # fmt: skip
    call = {"name": "clock", "parameters": arguments, "observation": {"time": 12}}
    chatglm3 = [user, {"role": "tool", **call}, answer]
    tools = [{"name": "clock"}]
    source = write(
        tmp_path, [{"messages": m, "tools": tools} for m in (openai, sharegpt, chatglm3)]
    )
    counts = write_sft(tmp_path, prepare_config(merged_dir, UNUSED, sft_sources=[source]))
    assert (counts["sources"][0]["duplicate"], counts["sources"][0]["kept"]) == (2, 1)
    code = "```python\ntool_call(city='大阪')\n```"
    expected = [
        {"role": "system", "content": chat_format.write_tools(tools)},
        user,
        {"role": "assistant", "content": code, "metadata": "clock"},
        {"role": "observation", "content": seen},
        answer,
    ]
    assert examples(tmp_path) == [chat_format.build_example(encoder, expected)]


def test_openings_left_out_are_counted(tmp_path: Path, merged_dir: Path, encoder: Any) -> None:
    row = conversation("質問", "答え")
    opened = {"messages": [{"role": "assistant", "content": "続き"}, *row["messages"]]}
    source = write(tmp_path, [opened])
    counts = write_sft(tmp_path, prepare_config(merged_dir, UNUSED, sft_sources=[source]))
    assert (counts["sources"][0]["opening left out"], counts["sources"][0]["kept"]) == (1, 1)
    assert examples(tmp_path) == [chat_format.build_example(encoder, row["messages"])]


def test_conversations_equal_after_cutting_are_duplicates(tmp_path: Path, merged_dir: Path) -> None:
    rows = [
        conversation(f"質問{i}" * 30, "答え" * 30, "最後の質問", "最後の答え") for i in range(9)
    ]
    settings: dict[str, Any] = {"sft_sources": [write(tmp_path, rows)], "max_length": 64}
    counts = write_sft(tmp_path, prepare_config(merged_dir, UNUSED, **settings))
    assert (counts["sources"][0]["duplicate"], counts["sources"][0]["kept"]) == (8, 1)


def test_too_few_conversations_are_an_error(tmp_path: Path, merged_dir: Path) -> None:
    source = write(tmp_path, [conversation("q", "a")] * 2)
    config = prepare_config(
        merged_dir, UNUSED, sft_sources=[source], sft_examples=1, sft_validation_examples=3
    )
    with pytest.raises(
        DataError, match=r"ja has 1 usable .* share of 4 \(dropped: duplicate 1\): lower"
    ):
        write_sft(tmp_path, config)


def test_bins_are_full(merged_dir: Path, tmp_path: Path) -> None:
    """With 10,000 conversations of the demo's lengths, in the demo's bins and in larger ones."""
    config = prepare_config(
        merged_dir, UNUSED, sft_sources=[Source("ja", str(DATA / "train_sft.jsonl.gz"))]
    )
    index = prepare_conversations.prepare(
        config, source_folders(tmp_path / "chunks", config.sft_sources)
    )
    lengths = np.array(random.Random(0).choices(index.length.tolist(), k=10_000))
    for capacity in (256, 512, 1024):
        plan = packing.plan_best_fit(lengths, capacity)
        assert lengths.sum() / (len(plan) * capacity) >= 0.99


def test_bad_conversations_are_in_the_rejects_file(tmp_path: Path, merged_dir: Path) -> None:
    rows: list[Any] = [conversation(f"q{i}", "a") | {"id": i} for i in range(20)]
    rows[4] = conversation("q", " ")
    rows[7]["id"] = 2
    rows[9] = {"messages": []}
    config = prepare_config(merged_dir, UNUSED, sft_sources=[write(tmp_path, rows)])
    index = prepare_conversations.prepare(
        config, source_folders(tmp_path / "chunks", config.sft_sources)
    )
    resume.RejectsFile(tmp_path / "rejects.jsonl", tmp_path / "report", 0.5).check(index)
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(r["source"], r["line"], r["reason"]) for r in rejects] == [
        ("ja/a", 5, "empty answer"), ("ja/a", 8, "duplicate id"), ("ja/a", 10, "empty list"),
    ]  # fmt: skip


def test_what_the_base_s_format_cannot_express_is_a_bad_record(
    tmp_path: Path, merged_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Picky(ChatGLM3Tokenizer):
        def build_example(self, messages: Any) -> Any:
            if messages[0]["role"] == "system":
                raise FormatError("refused by the chat template", "no system role")
            return super().build_example(messages)

    monkeypatch.setattr(token_store, "load_tokenizer", Picky.open)
    rows = [conversation(f"q{i}", "a") for i in range(4)]
    rows[2]["messages"].insert(0, {"role": "system", "content": "s"})
    config = prepare_config(merged_dir, UNUSED, sft_sources=[write(tmp_path, rows)])
    index = prepare_conversations.prepare(
        config, source_folders(tmp_path / "chunks", config.sft_sources)
    )
    counts = index.counts(0)
    assert (counts["documents"], counts["rejected"], counts["kept"]) == (3, 1, 3)
    resume.RejectsFile(tmp_path / "rejects.jsonl", tmp_path / "report", 0.5).check(index)
    [reject] = map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    assert (reject["line"], reject["reason"]) == (3, "refused by the chat template")
    assert reject["detail"] == "no system role"
