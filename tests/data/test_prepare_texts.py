"""Pretraining blocks: exact shares, every document accounted for, byte-identical after kills."""

import dataclasses
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatglm_ja.chatglm3 import chat_format
from chatglm_ja.chatglm3.tokenizer import EOS_ID
from chatglm_ja.data import (
    corpus,
    dataset,
    near_duplicates,
    prepare_texts,
    readers,
    rejects,
    token_store,
)
from chatglm_ja.data.cleaning import Fate
from chatglm_ja.data.resume import RejectsFile
from chatglm_ja.data.settings import parse_shares
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source
from tests.conftest import DATA, demo_texts, prepare_config, source_folders, write_pretraining


def write(folder: Path, name: str, texts: list[str]) -> Source:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(name[:2], str(path))


def documents(folder: Path, split: str) -> list[list[int]]:
    """Split the blocks' tokens after each end of a document; the last part may be incomplete."""
    stream = [t for ids in dataset.load_rows(folder, "pretrain", split)["input_ids"] for t in ids]
    parts: list[list[int]] = [[]]
    for token in stream:
        parts[-1].append(token)
        if token == EOS_ID:
            parts.append([])
    return parts


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_blocks_hold_the_documents_with_real_ends(
    tmp_path: Path, merged_dir: Path, encoder: Any, packing: str
) -> None:
    lines = [f"文書 {i} </s> です。" for i in range(60)]
    source = write(tmp_path, "ja", lines)
    prefix = chat_format.prefix_ids(encoder)
    expected = {(*prefix, *encoder.encode(line), EOS_ID) for line in lines}
    total = sum(map(len, expected))
    config = prepare_config(
        merged_dir, [source], total_tokens=total, block_size=32, packing=packing
    )
    counts = write_pretraining(tmp_path, config)
    rows = dataset.load_rows(tmp_path, "pretrain", "train")
    dropped = counts["tail_tokens_dropped"]
    assert dropped == (total % 32 if packing == "concat" else 0)
    assert sum(map(len, rows["input_ids"])) == total - dropped
    for row in rows:
        assert sum(row["lengths"]) == len(row["input_ids"]) <= 32
        assert row["sources"] == [0] * len(row["lengths"])
        # A length ends where a document ends, or where the block does.
        ends = [row["input_ids"][end - 1] for end in itertools.accumulate(row["lengths"])]
        assert ends[:-1] == [EOS_ID] * (len(ends) - 1)
        assert sum(token == EOS_ID for token in row["input_ids"]) == ends.count(EOS_ID)
    *whole, last = map(tuple, documents(tmp_path, "train"))
    assert len(set(whole)) == len(whole) and set(whole) <= expected
    if packing == "best_fit":
        assert set(whole) == expected
    else:
        # Only the dropped tail is missing: documents as long as it, and the rest of the last one.
        missing = expected - set(whole)
        assert sum(map(len, missing)) == dropped + len(last)
        assert not last or any(document[: len(last)] == last for document in missing)
        assert counts["fill"] == 1.0


def test_best_fit_cuts_no_document_that_fits(tmp_path: Path, merged_dir: Path) -> None:
    sources = [Source("ja", str(DATA / "train_ja.jsonl.gz"))]
    config = prepare_config(
        merged_dir, sources, total_tokens=60_000, block_size=512, packing="best_fit"
    )
    counts = write_pretraining(tmp_path, config)
    rows = dataset.load_rows(tmp_path, "pretrain", "train")
    prefix = token_store.load_tokenizer(merged_dir).document_start
    begun = whole = 0
    for row in rows:
        start = 0
        for length in row["lengths"]:
            ids = row["input_ids"][start : start + length]
            begun += ids[:2] == prefix
            whole += ids[:2] == prefix and ids[-1] == EOS_ID
            start += length
    # Only what is longer than a block is cut, besides the document at the end of the budget.
    assert begun - whole <= counts["documents_cut"] + 1
    assert sum(map(len, rows["input_ids"])) == 60_000
    assert counts["fill"] > 0.97


def test_shares_are_exact(tmp_path: Path, merged_dir: Path, encoder: Any) -> None:
    """Counted in the blocks; every language has a character of its own."""
    samples = {"ja": "あああ。", "zh": "们们们。", "en": "eee."}
    sources = [
        write(tmp_path, name, [text + str(i) for i in range(900)]) for name, text in samples.items()
    ]
    config = prepare_config(
        merged_dir, sources, shares=("ja=76", "zh=12", "en=12"), total_tokens=6400, block_size=32
    )
    counts = write_pretraining(tmp_path, config)
    assert counts["train_tokens"] == {"ja": 4864, "zh": 768, "en": 768}
    stream = [
        t for ids in dataset.load_rows(tmp_path, "pretrain", "train")["input_ids"] for t in ids
    ]
    assert len(stream) == 6400
    kinds = list(dataset.load_rows(tmp_path, "pretrain", "train"))
    by_source = np.zeros(3)
    for row in kinds:
        for number, length in zip(row["sources"], row["lengths"], strict=True):
            by_source[number] += length
    assert by_source.tolist() == [4864, 768, 768]
    for number, text in enumerate(samples.values()):
        sign = encoder.encode(text)[1]
        start = 0
        for row in kinds[:20]:
            start = 0
            for owner, length in zip(row["sources"], row["lengths"], strict=True):
                if owner != number:
                    assert sign not in row["input_ids"][start : start + length]
                start += length


def test_no_validation_document_is_trained_on(tmp_path: Path, merged_dir: Path) -> None:
    lines = [f"これは文書番号 {i} です。" for i in range(400)]
    # Every document twice: copies of validation documents must not be trained on.
    source = write(tmp_path, "ja", lines + lines)
    config = prepare_config(
        merged_dir, [source], total_tokens=5000, validation_tokens=200, max_repeats=2.0
    )
    counts = write_pretraining(tmp_path, config)
    validation = {tuple(part) for part in documents(tmp_path, "validation")[:-1]}
    train = {tuple(part) for part in documents(tmp_path, "train")[:-1]}
    assert len(validation) > 5
    assert not validation & train
    assert len(train) > 200
    assert counts["sources"][0]["duplicate"] == 400
    rows = dataset.load_rows(tmp_path, "pretrain", "validation")
    assert sum(map(len, rows["input_ids"])) == counts["validation_tokens"]["ja"] <= 200


def test_validation_rows_have_their_language(data_dir: Path) -> None:
    rows = dataset.load_rows(data_dir, "pretrain", "train")
    assert len(rows) == 8000 // 64
    validation = dataset.load_rows(data_dir, "pretrain", "validation")
    assert set(validation["language"]) == {"ja", "zh", "en"}
    for row in validation:
        assert {("ja", "zh", "en")[number] for number in row["sources"]} == {row["language"]}


def test_every_document_is_accounted_for(tmp_path: Path, merged_dir: Path) -> None:
    base = "".join(demo_texts("ja", 40))[:4000]
    near = base.replace("する", "します", 3)
    other = "".join(demo_texts("ja", 80)[41:])[:5000]
    held_out = "評価だけに使う独特な言い回しは、訓練する文書のどこにも現れてはならない。"
    rows: list[dict[str, Any]] = [
        {"text": base, "id": 1},
        {"text": near, "id": 2},  # near duplicate
        {"text": base, "id": 3},  # duplicate
        {"text": "別の文書です。", "id": 1},  # id seen
        {"text": " \n", "id": 5},  # empty
        {"text": "短い", "id": 6},  # short
        {"text": "English text in a Japanese corpus.", "id": 7},  # language
        {"text": "前置き。" + held_out + "後書き。", "id": 8},  # contaminated
        {"text": 5, "id": 9},  # wrong type
        {"text": other[:2500] + held_out + other[2500:], "id": 100},  # a part is contaminated
        *({"text": f"問題のない文書の番号は{i:,}です。", "id": 10 + i} for i in range(50)),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": held_out}) + "\n")
    config = prepare_config(
        merged_dir, [Source("ja", str(path))], total_tokens=1000, min_characters=5,
        check_language=True, near_duplicates=0.8, max_repeats=5.0,
        decontaminate=(Source("ja", str(tmp_path / "held.jsonl")),),
    )  # fmt: skip
    counts = write_pretraining(tmp_path, config)["sources"][0]
    expected = {
        "documents": 59, "rejected": 2, "empty": 1, "short": 1, "language": 1, "contaminated": 1,
        "duplicate": 1, "near_duplicate": 1, "kept": 52, "evaluation text cut out": 1,
    }  # fmt: skip
    assert {name: counts[name] for name in expected} == expected


def flawed(folder: Path) -> list[Source]:
    """Sources of several formats and many chunks, with bad records here and there."""
    lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(demo_texts("ja", 300))]
    lines[7], lines[100] = "{", json.dumps({"text": 1})
    lines[200] = json.dumps({"text": "番号の同じ文書です。", "id": 3})
    (folder / "ja.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "zh.txt").write_text("\n".join(t.replace("\n", " ") for t in demo_texts("zh", 200)))
    (folder / "en.json").write_text(json.dumps([{"text": t} for t in demo_texts("en", 100)]))
    return [
        Source("ja", str(folder / "ja.jsonl.gz")),
        Source("zh", str(folder / "zh.txt")),
        Source("en", str(folder / "en.json")),
    ]


def test_the_plan_names_the_documents_of_the_blocks(tmp_path: Path, merged_dir: Path) -> None:
    sources = flawed(tmp_path)
    shares = ("ja=76", "zh=12", "en=12")
    config = prepare_config(
        merged_dir, sources, shares=shares, total_tokens=3000, validation_tokens=500, block_size=64
    )
    index = prepare_texts.prepare(config, source_folders(tmp_path / "texts", sources))
    _, plan = prepare_texts.write(index, config, parse_shares(shares), tmp_path)
    parts = [
        index.read_document(int(document))[start : start + length]
        for document, start, length in zip(plan.item, plan.start, plan.length, strict=True)
    ]
    rows = dataset.load_rows(tmp_path, "pretrain", "train")
    assert np.concatenate(parts).tolist() == list(itertools.chain(*rows["input_ids"]))


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make many chunks, shards and near-duplicate searches of little text."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(readers.read_chunks, "__defaults__", (20_000,))
    monkeypatch.setattr(dataset, "SHARD_TOKENS", 3000)
    monkeypatch.setattr(near_duplicates, "DOCUMENTS_PER_PROCESS", 1)


def make_files(
    folder: Path, tokenizer: Path, sources: list[Source], **changes: Any
) -> dict[str, bytes]:
    """Prepare sources of three languages in a folder; return its files, and what was dropped."""
    folder.mkdir(exist_ok=True)
    config = prepare_config(
        tokenizer, sources, shares=("ja=76", "zh=12", "en=12"), total_tokens=20_000,
        validation_tokens=1500, block_size=64, near_duplicates=0.8, check_language=True, **changes,
    )  # fmt: skip
    index = prepare_texts.prepare(config, source_folders(folder / "texts", config.sources))
    RejectsFile(folder / "rejects.jsonl", folder.parent / "report", 0.05).check(index)
    prepare_texts.write(index, config, parse_shares(config.shares), folder)
    dropped = {"dropped": repr(index.dropped_texts()).encode()}
    return dropped | {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_processes_and_interruptions_change_no_byte(
    tmp_path: Path, merged_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch)
    sources = [dataclasses.replace(source, quality="web") for source in flawed(tmp_path)]

    def make(name: str, **changes: Any) -> dict[str, bytes]:
        return make_files(tmp_path / name, merged_dir, sources, **changes)

    undisturbed = make("one")
    assert b"Fate.UNNATURAL" in undisturbed["dropped"]
    assert len([name for name in undisturbed if name.startswith("pretrain_train")]) == 7
    assert len(list((tmp_path / "one" / "texts").glob("*/*.json"))) > 10
    assert len(undisturbed["rejects.jsonl"].splitlines()) == 3
    assert make("two", num_processes=2) == undisturbed

    # Interrupted while reading, while searching near-duplicates, and while writing the shards.
    calls = itertools.count()
    read_documents = corpus.read_documents

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return read_documents(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "read_documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make("three")
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "three/texts").glob("*/*.json")}
    assert len(finished) == 4
    for module, name in ((near_duplicates, "_count_equal"), (dataset, "_make_batch")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                make("three")
    # Chunks that were corrupted meanwhile are tokenized again.
    first, second = sorted(finished)[:2]
    content = bytearray(first.with_suffix(".tokens").read_bytes())
    content[99] ^= 1
    first.with_suffix(".tokens").write_bytes(content)
    second.write_text("[]")
    assert make("three") == undisturbed
    del finished[first], finished[second]
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())


def test_samples_of_dropped_texts_do_not_depend_on_the_chunks(
    tmp_path: Path, merged_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = [f"This is page {i} of the English ones. It is not in Japanese.\n" for i in range(60)]
    menus = ["\n".join(f"商品{i}情報{j}" for j in range(60)) + "の一覧" for i in range(60)]
    texts = [*foreign, *menus, *foreign, "", "短い"]
    source = dataclasses.replace(write(tmp_path, "ja", texts), quality="web")
    config = prepare_config(merged_dir, [source], check_language=True, min_characters=5)
    found = []
    for size in (2_000, 10**6):
        monkeypatch.setattr(readers.read_chunks, "__defaults__", (size,))
        folders = source_folders(tmp_path / str(size), [source])
        index = prepare_texts.prepare(config, folders)
        found.append(index.dropped_texts())
        counts = index.counts(0)
        assert (counts["language"], counts["no_sentences"], counts["empty"]) == (120, 60, 1)
    assert found[0] == found[1]
    assert [text.excerpt for text in found[0].pop(Fate.SHORT)] == ["短い"]
    for fate, group in ((Fate.LANGUAGE, foreign), (Fate.NO_SENTENCES, menus)):
        samples = found[0].pop(fate)
        places = [next(i for i, t in enumerate(group) if t.startswith(s.excerpt)) for s in samples]
        assert len(set(places)) == token_store.SAMPLES
        for place, sample in zip(places, samples, strict=True):
            start = 1 if group is foreign else 1 + len(foreign)
            assert sample.origin == f"ja/ja, record {start + place}"
    assert not found[0]


def test_the_seed_and_only_the_seed_draws_other_documents(tmp_path: Path, merged_dir: Path) -> None:
    source = Source("ja", str(DATA / "train_ja.jsonl.gz"))
    blocks = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        write_pretraining(
            tmp_path / name, prepare_config(merged_dir, [source], total_tokens=4000, seed=seed)
        )
        blocks.append(dataset.load_rows(tmp_path / name, "pretrain", "train")["input_ids"][:])
    assert blocks[0] == blocks[1] != blocks[2]


def test_bad_records_are_in_the_rejects_file_and_too_many_are_an_error(
    tmp_path: Path, merged_dir: Path
) -> None:
    rows = ['{"text": "良い文書です。"}'] * 97 + ["{", '{"body": 1}', '{"text": 1}']
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows))
    config = prepare_config(merged_dir, [Source("ja", str(path))])
    index = prepare_texts.prepare(config, source_folders(tmp_path / "texts", config.sources))
    report = tmp_path / "report.jsonl"
    RejectsFile(tmp_path / "rejects.jsonl", report, 0.03).check(index)
    assert not report.exists()
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(r["file"], r["line"], r["reason"]) for r in rejects] == [
        ("a.jsonl", 98, "broken JSON"),
        ("a.jsonl", 99, "missing column"),
        ("a.jsonl", 100, "wrong type"),
    ]
    with pytest.raises(
        DataError,
        match=r"more than 2.00% of the records are bad in ja/a: 3 of 100 records \(broken JSON 1, "
        r"missing column 1, wrong type 1\): see .*report.jsonl, then fix them or raise --max-rej",
    ):
        RejectsFile(tmp_path / "rejects.jsonl", report, 0.02).check(index)
    assert len(report.read_text().splitlines()) == 3


def test_reading_stops_early_if_most_records_are_bad(
    tmp_path: Path, merged_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers.read_chunks, "__defaults__", (1000,))
    monkeypatch.setattr(rejects, "EARLY_RECORDS", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "列の名前が違う"}\n' * 20_000)
    config = prepare_config(merged_dir, [Source("ja", str(path))])
    index = prepare_texts.prepare(config, source_folders(tmp_path / "texts", config.sources))
    assert 1000 <= index.records_read(0) < 2000


def test_too_little_text_is_an_error(tmp_path: Path, merged_dir: Path) -> None:
    source = write(tmp_path, "ja", ["短い"])
    with pytest.raises(DataError, match=r"ja has \d+ tokens for a share of 1,000"):
        write_pretraining(tmp_path, prepare_config(merged_dir, [source]))
    with pytest.raises(DataError, match="4 tokens do not fill a block of 16"):
        write_pretraining(tmp_path, prepare_config(merged_dir, [source], total_tokens=4))


def test_wikitext_lines_become_articles(tmp_path: Path, merged_dir: Path) -> None:
    rows = ["", " = Title = \n", " A well @-@ known text . \n", " = Other = \n", " Text . \n"]
    source = write(tmp_path, "en", rows)
    source = Source("en", source.path, format="wikitext")
    counts = write_pretraining(
        tmp_path, prepare_config(merged_dir, [source], total_tokens=16, max_repeats=9.0)
    )
    assert counts["sources"][0]["documents"] == 2


def test_tokens_decode_to_the_cleaned_text(tmp_path: Path, merged_dir: Path, encoder: Any) -> None:
    """Nothing between reading and packing changes a text."""
    texts = demo_texts("ja", 20)
    source = write(tmp_path, "ja", texts)
    assert list(SourceReader().texts(source)) == texts
    config = prepare_config(merged_dir, [source])
    index = prepare_texts.prepare(config, source_folders(tmp_path / "texts", [source]))
    for number, text in enumerate(texts):
        ids = index.read_document(number)
        assert encoder.decode(ids[2:-1].tolist()) == text.strip()


def test_documents_that_are_mostly_fragments_are_warned_of(
    tmp_path: Path, merged_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The example is a novel in short lines, of which the filter for short texts leaves nothing."""
    novel = tmp_path / "novel.txt"
    novel.write_text("\n\n".join(["吾輩は猫である。\n名前はまだ無い。" * 9] * 5), encoding="utf-8")
    counts = {}
    for form in ("lines", "paragraphs", "document"):
        source = Source("ja", str(novel), format=form)
        config = prepare_config(merged_dir, [source], min_characters=32)
        caplog.clear()
        folders = source_folders(tmp_path / form, config.sources)
        counts[form] = prepare_texts.prepare(config, folders).counts(0)
        warnings = [line for line in caplog.messages if "fewer than 100 characters" in line]
        assert len(warnings) == (form == "lines")
        if warnings:
            assert "ja/novel: most of its 54 documents" in warnings[0]
            assert "format=paragraphs or format=document" in warnings[0]
    kept = {form: (count["documents"], count["kept"]) for form, count in counts.items()}
    assert kept == {"lines": (54, 0), "paragraphs": (5, 5), "document": (1, 1)}
