"""Step 4's page: the mix, what became of the records, blocks, lengths, what is trained, rejects."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chatglm_ja import plots
from chatglm_ja.chatglm3.chat_format import build_prompt_ids
from chatglm_ja.chatglm3.tokenizer import EOS_ID, load_processor
from chatglm_ja.data.cleaning import Fate
from chatglm_ja.data.packing import plan_concat
from chatglm_ja.data.token_store import TOKENS, DroppedText
from chatglm_ja.messages import IGNORE_INDEX
from chatglm_ja.reports import data_report
from chatglm_ja.sources import Source
from tests.reports.pages import PHONE, loads_nothing, open_in_browser, table_rows

COUNTS: dict[str, dict[str, Any]] = {
    "pretrain": {
        "blocks": 1560, "block_size": 128, "fill": 0.995, "tail_tokens_dropped": 32,
        "train_tokens": {"ja": 15168, "zh": 4800}, "validation_tokens": {"ja": 961, "zh": 952},
        "train_shares": {"ja": 0.7596, "zh": 0.2404},
        "sources": [
            {"name": "ja/wiki", "documents": 1482, "language": 107, "near_duplicate": 11,
             "kept": 1364, "tokens": 4961, "train_tokens": 15168, "repeats": 3.792},
            {"name": "zh/<b>", "documents": 9, "empty": 0, "kept": 9, "tokens": 10552,
             "train_tokens": 4800},
        ],
    },
    "sft": {
        "train_examples": {"ja": 31, "code": 10}, "train_bins": 17, "max_length": 256,
        "train_fill": 0.9713,
        "sources": [{"name": "ja/talks", "documents": 936, "too long": 7, "kept": 929,
                     "shortened": 2, "opening left out": 0, "train_examples": 31}],
    },
}  # fmt: skip
REJECTS = [
    {"source": "zh/<b>", "file": "a.jsonl", "line": 1234 + i, "reason": "broken JSON",
     "detail": f"<script>{i}\udc80"}
    for i in range(5)
] + [
    {"source": "ja/wiki", "file": "b.jsonl", "line": 1, "reason": "duplicate id", "detail": "1"}
]  # fmt: skip


DROPPED = {
    Fate.LANGUAGE: [DroppedText(digest=(1, 2), origin="zh/<b>, record 5", excerpt="<p>abc\nd")],
    Fate.NO_SENTENCES: [
        DroppedText(digest=(i, 0), origin=f"ja/wiki, record {i}", excerpt=f"目次{i}")
        for i in (7, 8)
    ],
}


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
        dropped_texts=lambda: DROPPED,
        read_document=read_document,
    )


@pytest.fixture(scope="module")
def config(merged_dir: Path) -> Any:
    shares, sft_shares = ("ja=3", "zh=1"), ("ja=9", "code=1")
    return SimpleNamespace(tokenizer=merged_dir, shares=shares, sft_shares=sft_shares)


@pytest.fixture(scope="module")
def texts(merged_dir: Path) -> Any:
    """Two texts in three blocks: the second one begins in the second and ends in the third."""
    encode = load_processor(merged_dir).encode
    documents = [
        (0, [*encode("<i>雪国</i>"), *[5] * 20, EOS_ID], 0),
        (1, [*encode("长" * 600), EOS_ID], 0),
    ]
    index = make_index([("ja", "wiki"), ("zh", "<b>")], documents)
    return index, plan_concat(index.length, 20, keep_tail=True)


@pytest.fixture(scope="module")
def conversations(merged_dir: Path) -> Any:
    tokenizer = load_processor(merged_dir)
    talks = []
    for source, repeats in ((0, 500), (0, 1), (0, 2), (2, 1)):  # the first is too long to show
        prompt = build_prompt_ids(
            tokenizer, [{"role": "user", "content": "質問 <script>" * repeats}]
        )
        answer = [*tokenizer.encode("**答え**\n& more"), EOS_ID]
        talks.append((source, [*prompt, *answer], len(prompt)))
    return make_index([("ja", "talks"), ("ja", "unused"), ("code", "例")], talks), np.arange(4)


def write_page(
    folder: Path,
    config: Any,
    texts: Any,
    conversations: Any,
    counts: dict[str, Any] = COUNTS,
    rejects: list[dict[str, Any]] = REJECTS,
) -> str:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rejects]
    path = folder / "rejects.jsonl"
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    data_report.write_report(
        folder,
        "de<mo>",
        counts,
        config,
        texts if "pretrain" in counts else None,
        conversations if "sft" in counts else None,
    )
    return (folder / "data_report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def page(folder: Path, config: Any, texts: Any, conversations: Any) -> str:
    return write_page(folder, config, texts, conversations)


def facts(page: str) -> list[tuple[str, str]]:
    return re.findall(r'<li class="(\w+)">(.*?)</li>', page)


def test_the_page_opens_with_the_mix_and_what_was_dropped(page: str) -> None:
    assert "profile de&lt;mo&gt;" in page
    assert "The model is trained on 19,968 tokens of text and 41 conversations." in page
    assert (
        "Dropped of 1,491 texts and 936 conversations: 107 with less prose in their language than "
        "in others, 7 with a last exchange" in page
    )
    assert facts(page) == [
        ("bad", "15,168 tokens: 76.0%, asked for 75.0%"),
        ("quiet", "all of the usable text, 3.79 times"),
        ("quiet", "118 of 1,482 texts dropped"),
        ("bad", "31 conversations: 75.6%, asked for 90.0%"),
        ("quiet", "7 of 936 conversations dropped"),
        ("bad", "4,800 tokens: 24.0%, asked for 25.0%"),
        ("quiet", "50% of the usable text"),
        ("bad", "10 conversations: 24.4%, asked for 10.0%"),
    ]
    assert "1,560 blocks of 128 tokens, fill rate 99.50%, 32 tail tokens dropped" in page
    assert "17 bins of 256 tokens, fill rate 97.13%" in page


def test_limits_of_what_is_good() -> None:
    pretrain = COUNTS["pretrain"]
    judged = list(data_report.judge_texts("ja", 0.757, pretrain))
    assert judged[0] == ("good", "15,168 tokens: 76.0%, asked for 75.7%")
    source = {"name": "ja/wiki", "short": 6, "rejected": 1, "kept": 6, "tokens": 3000}
    marks = data_report.judge_texts("ja", 0.76, pretrain | {"sources": [source]})
    assert list(marks)[1:] == [
        ("bad", "all of the usable text, 7.44 times"), ("bad", "7 of 13 texts dropped"),
    ]  # fmt: skip


def test_the_page_shows_what_became_of_the_records(page: str) -> None:
    assert table_rows(page) == [
        ["source", "documents", "language", "near duplicate", "kept", "train tokens", "repeats"],
        ["ja/wiki", "1,482", "107", "11", "1,364", "15,168", "3.792"],
        ["zh/<b>", "9", "0", "0", "9", "4,800", "0"],
        ["source", "documents", "too long", "kept", "shortened", "train examples"],
        ["ja/talks", "936", "7", "929", "2", "31"],
    ]
    for row in table_rows(page):
        for title in row[1:] if row[0] == "source" else ():
            assert f"<li><b>{title}</b>: " in page


def test_the_page_shows_samples_of_dropped_texts(page: str) -> None:
    section = page.partition('<h2 id="dropped">')[2].partition("<h2")[0]
    assert re.findall("<h3>(.*?):", section) == ["language", "no sentences"]
    assert "&lt;p&gt;abc\nd" in section and "zh/&lt;b&gt;, record 5" in section
    assert section.index("目次7") < section.index("目次8")


def test_every_count_can_be_explained() -> None:
    sources = [dict.fromkeys([*Fate, *data_report.MEANINGS], 1) | {"name": "ja/x"}]
    _, meanings = data_report.fate_table(sources, "documents", *data_report.MEANINGS)
    assert all(meanings.values())


@pytest.mark.parametrize(("part", "other"), [("pretrain", "sft"), ("sft", "pretrain")])
def test_the_page_of_one_kind_of_data_has_no_section_on_the_other(
    tmp_path: Path, config: Any, texts: Any, conversations: Any, part: str, other: str
) -> None:
    counts, absent = {part: COUNTS[part]}, "sft_shares" if part == "pretrain" else "shares"
    config = SimpleNamespace(**vars(config) | {absent: ()})
    page = write_page(tmp_path, config, texts, conversations, counts)
    titles = re.findall("<h2.*?>(.*?)</h2>", page)
    assert ("Texts" in titles, "Conversations" in titles) == (part == "pretrain", part == "sft")
    assert re.findall('<a href="#(.*?)"', page) == re.findall('<h2 id="(.*?)"', page)
    assert not (tmp_path / f"{other}_lengths.png").exists()
    lines = list(data_report.describe_counts(counts))
    assert len(lines) == 1 + len([line for line in lines if " read, " in line]) > 1


def test_the_page_shows_blocks_and_their_boundaries(page: str) -> None:
    shown = re.findall(r"<h3>(Block \d+)</h3>(.*?)(?=<h)", page, flags=re.DOTALL)
    texts = {
        title: re.findall(r'<div class="example language".*?>(.*?)</div>', block, flags=re.DOTALL)
        for title, block in shown
    }
    # The second block has both languages; the others follow in order.
    assert list(texts) == ["Block 2", "Block 1", "Block 3"]
    first, (end, start), rest = texts["Block 1"], texts["Block 2"], texts["Block 3"]
    assert len(first) == len(rest) == 1
    assert "&lt;i&gt;雪国" in first[0] and "</small>" not in first[0].split("<small> continues")[0]
    assert end.startswith("<small>… continued </small>") and "continues …" not in end
    assert '<span class="special">&lt;/s&gt;</span><small class="origin">ja/wiki, ' in end
    assert "continued" not in start and start.endswith(" tokens</small>")
    assert ' continues …</small><small class="origin">zh/&lt;b&gt;, ' in start


def test_long_texts_are_shown_without_their_middle(tmp_path: Path, config: Any) -> None:
    encode = load_processor(config.tokenizer).encode
    ids = [*encode("始" + "长" * 1000 + "终"), EOS_ID]
    index = make_index([("zh", "x")], [(0, ids, 0)])
    config = SimpleNamespace(tokenizer=config.tokenizer, shares=("zh=1",), sft_shares=())
    counts = COUNTS["pretrain"] | {"train_tokens": {"zh": 1}}
    blocks = plan_concat(index.length, 2000, keep_tail=True)
    page = write_page(tmp_path, config, (index, blocks), None, {"pretrain": counts})
    size = data_report.SHOWN_CHARACTERS
    assert f'始{"长" * (size - 1)}<b class="quiet"> […] </b>{"长" * (size - 1)}终' in page


def test_the_page_shows_lengths_and_they_are_files_too(page: str, folder: Path) -> None:
    # Two mixes, and the lengths of four sources.
    assert page.count("<figure><svg") == 6
    # Matplotlib writes the text of a title beside its shape.
    assert "1, median " in page
    assert "source 3" in page  # its name is Japanese
    colors = plots.language_colors(["ja", "zh", "code"])
    pictures = re.findall("<svg.*?</svg>", page, re.DOTALL)[2:]
    for picture, language in zip(pictures, ("ja", "zh", "ja", "code"), strict=True):
        assert f"fill: {colors[language]}" in picture
    for name in ("pretrain_lengths.png", "sft_lengths.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "data_report.json").read_text()) == COUNTS


def test_the_page_marks_what_is_trained(page: str) -> None:
    assert "<script>" not in page and "zh/<b>" not in page and loads_nothing(page)
    examples = re.findall(
        r'<p><small>(.*?)</small></p>\s*<div class="example.*?>(.*?)</div>', page, flags=re.DOTALL
    )
    # The first short one of each source that has any.
    assert [origin for origin, _ in examples] == ["ja/talks, record 1,235", "code/例, record 1,237"]
    for _, shown in examples:
        prompt, trained = shown.split("<mark>")
        assert '<span class="special">&lt;|user|&gt;</span>\n 質問 &lt;script&gt;' in prompt
        assert re.fullmatch(
            r" ?\*\*答え\*\*\n&amp; more<span class=\"special\">&lt;/s&gt;</span></mark>", trained
        )


def test_the_page_shows_the_first_bad_records_of_each_reason(page: str) -> None:
    assert re.findall("<h3>(.*)</h3>", page)[-2:] == ["broken JSON: 5", "duplicate id: 1"]
    bad = re.findall(r"<li>(.*?): <span class=\"quiet\">(.*)</span></li>", page)
    assert bad == [
        *(
            (f"zh/&lt;b&gt;, a.jsonl record 1,23{4 + i}", rf"&lt;script&gt;{i}\udc80")
            for i in range(3)
        ),
        ("ja/wiki, b.jsonl record 1", "1"),
    ]
    assert '<a href="rejects.jsonl">' in page and "No record was bad" not in page


def test_without_bad_records_the_page_says_so(
    tmp_path: Path, config: Any, texts: Any, conversations: Any
) -> None:
    page = write_page(tmp_path, config, texts, conversations, rejects=[])
    assert "No record was bad." in page and "rejects" not in page


@pytest.mark.usefixtures("page")
def test_the_page_fits_a_phone(folder: Path) -> None:
    with open_in_browser(folder / "data_report.html", PHONE) as opened:
        charts = opened.locator("svg")
        assert all(charts.nth(i).bounding_box()["width"] > 250 for i in range(charts.count()))


def test_log_lines_say_what_was_kept_and_dropped() -> None:
    lines = list(data_report.describe_counts(COUNTS))
    assert lines[:3] == [
        "ja/wiki: 1,482 read, 1,364 kept; dropped: language 107, near_duplicate 11",
        "zh/<b>: 9 read, 9 kept",
        "ja/talks: 936 read, 929 kept; dropped: too long 7; cut: shortened 2",
    ]
    assert lines[3].startswith("pretraining: 1,560 blocks") and "zh 4,800 (24.04%)" in lines[3]
    assert lines[4].startswith("fine-tuning: conversations ja 31, code 10; 17 bins")
