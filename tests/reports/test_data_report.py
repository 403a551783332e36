"""Step 4's page: the mix, what became of the records, lengths, and what is trained."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chatglm_ja.chatglm3.chat_format import build_prompt_ids
from chatglm_ja.chatglm3.tokenizer import EOS_ID, load_processor
from chatglm_ja.data.token_store import TOKENS
from chatglm_ja.messages import IGNORE_INDEX
from chatglm_ja.reports import data_report
from chatglm_ja.sources import Source
from tests.reports.pages import table_rows

COUNTS = {
    "pretrain": {
        "blocks": 1560, "block_size": 128, "fill": 0.995, "tail_tokens_dropped": 32,
        "train_tokens": {"ja": 15168, "zh": 4800}, "validation_tokens": {"ja": 961, "zh": 952},
        "train_shares": {"ja": 0.7596, "zh": 0.2404},
        "sources": [
            {"name": "ja/wiki", "documents": 1482, "language": 107, "near_duplicate": 11,
             "kept": 1364, "train_tokens": 15168, "repeats": 0.038},
            {"name": "zh/<b>", "documents": 9, "empty": 0, "kept": 9, "train_tokens": 4800},
        ],
    },
    "sft": {
        "train_examples": {"ja": 31, "code": 10}, "train_bins": 17, "max_length": 256,
        "train_fill": 0.9713,
        "sources": [{"name": "ja/talks", "documents": 936, "too long": 7, "kept": 929,
                     "shortened": 2, "opening left out": 1, "train_examples": 31}],
    },
}  # fmt: skip


def make_index(titles: list[tuple[str, str]], documents: list[tuple[int, list[int], int]]) -> Any:
    """Return an index of documents: number of the source, ids, length of the prompt."""

    def read_document(number: int, suffix: str = TOKENS) -> np.ndarray:
        _, ids, prompt = documents[number]
        return np.array(ids if suffix == TOKENS else [IGNORE_INDEX] * prompt + ids[prompt:])

    return SimpleNamespace(
        sources=[Source(language, "unused", name) for language, name in titles],
        source=np.array([source for source, _, _ in documents]),
        record=np.arange(len(documents)) + 1234,
        length=np.array([len(ids) for _, ids, _ in documents]),
        kept_documents=lambda: np.arange(len(documents)),
        read_document=read_document,
    )


@pytest.fixture
def page(tmp_path: Path, merged_dir: Path) -> str:
    tokenizer = load_processor(merged_dir)
    conversations = []
    for source, repeats in ((0, 500), (0, 1), (0, 2), (2, 1)):  # the first is too long to show
        prompt = build_prompt_ids(
            tokenizer, [{"role": "user", "content": "質問 <script>" * repeats}]
        )
        answer = [*tokenizer.encode("**答え**\n& more"), EOS_ID]
        conversations.append((source, [*prompt, *answer], len(prompt)))
    config: Any = SimpleNamespace(tokenizer=merged_dir, shares=("ja=3", "zh=1"))
    data_report.write_report(
        tmp_path,
        COUNTS,
        config,
        make_index([("ja", "wiki"), ("zh", "<b>")], [(0, [5] * 9, 0), (1, [5] * 90, 0)]),
        make_index([("ja", "talks"), ("ja", "unused"), ("code", "例")], conversations),
        np.arange(4),
    )
    return (tmp_path / "data_report.html").read_text(encoding="utf-8")


def test_the_page_shows_the_mix_asked_for_and_reached(page: str) -> None:
    rows = table_rows(page)
    assert rows[:3] == [
        ["language", "asked for", "share", "training tokens", "validation tokens"],
        ["ja", "75.00%", "75.96%", "15,168", "961"],
        ["zh", "25.00%", "24.04%", "4,800", "952"],
    ]
    assert "1,560 blocks of 128 tokens, fill rate 99.50%, 32 tail tokens dropped" in page
    assert "17 bins of 256 tokens, fill rate 97.13%" in page


def test_the_page_shows_what_became_of_the_records(page: str) -> None:
    rows = table_rows(page)
    assert rows[3:] == [
        ["source", "documents", "language", "near duplicate", "kept", "train tokens", "repeats"],
        ["ja/wiki", "1,482", "107", "11", "1,364", "15,168", "0.038"],
        ["zh/<b>", "9", "0", "0", "9", "4,800", "0"],
        [
            "source",
            "documents",
            "too long",
            "kept",
            "shortened",
            "opening left out",
            "train examples",
        ],
        ["ja/talks", "936", "7", "929", "2", "1", "31"],
    ]


@pytest.mark.parametrize(("part", "other"), [("pretrain", "sft"), ("sft", "pretrain")])
def test_the_page_of_one_kind_of_data_has_no_section_on_the_other(
    tmp_path: Path, merged_dir: Path, part: str, other: str
) -> None:
    config: Any = SimpleNamespace(tokenizer=merged_dir, shares=("ja=3", "zh=1"))
    index = make_index([("ja", "wiki"), ("zh", "b")], [(0, [5] * 9, 0), (1, [5] * 90, 0)])
    indexes = (index, None, None) if part == "pretrain" else (None, index, np.arange(2))
    data_report.write_report(tmp_path, {part: COUNTS[part]}, config, *indexes)
    page = (tmp_path / "data_report.html").read_text(encoding="utf-8")
    assert page.count("<figure><svg") == 1
    assert ("Pretraining" in page, "Fine-tuning" in page) == (part == "pretrain", part == "sft")
    assert not (tmp_path / f"{other}_lengths.png").exists()
    lines = list(data_report.describe_counts({part: COUNTS[part]}))
    assert len(lines) == 1 + len([line for line in lines if " read, " in line]) > 1


def test_the_page_shows_lengths_and_they_are_files_too(page: str, tmp_path: Path) -> None:
    assert page.count("<figure><svg") == 2
    # Matplotlib writes the text of a title beside its shape.
    assert "1, median 9" in page and "1, median 90" in page
    assert "source 3" in page  # its name is Japanese
    for name in ("pretrain_lengths.png", "sft_lengths.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "data_report.json").read_text()) == COUNTS


def test_the_page_marks_what_is_trained(page: str) -> None:
    assert "<script>" not in page and "zh/<b>" not in page
    examples = re.findall(r'<small>(.*?)</small></p>\s*<div class="example">(.*?)</div>', page,
                          flags=re.DOTALL)  # fmt: skip
    # The first short one of each source that has any.
    assert [origin for origin, _ in examples] == ["ja/talks, record 1,235", "code/例, record 1,237"]
    for _, shown in examples:
        prompt, trained = shown.split("<mark>")
        assert '<span class="special">&lt;|user|&gt;</span>\n 質問 &lt;script&gt;' in prompt
        assert re.fullmatch(
            r" ?\*\*答え\*\*\n&amp; more<span class=\"special\">&lt;/s&gt;</span></mark>", trained
        )


def test_log_lines_say_what_was_kept_and_dropped() -> None:
    lines = list(data_report.describe_counts(COUNTS))
    assert lines[:3] == [
        "ja/wiki: 1,482 read, 1,364 kept; dropped: language 107, near_duplicate 11",
        "zh/<b>: 9 read, 9 kept",
        "ja/talks: 936 read, 929 kept; dropped: too long 7; cut: shortened 2, opening left out 1",
    ]
    assert lines[3].startswith("pretraining: 1,560 blocks") and "zh 4,800 (24.04%)" in lines[3]
    assert lines[4].startswith("fine-tuning: conversations ja 31, code 10; 17 bins")
