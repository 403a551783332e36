"""Reading: the formats, what is refused and how it is said; mixing to exact shares."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from chatglm_ja import corpus
from chatglm_ja.config import Source
from chatglm_ja.errors import ConfigError, DataError


def write(path: Path, text: str | bytes) -> Source:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Source("ja", str(path))


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    texts = ["一つ目", "二つ目\u2028の文書"]
    lines = "".join(json.dumps({"text": t, "id": 1}) + "\n" for t in texts)
    sources = [
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "a.jsonl.gz", gzip.compress(lines.encode())),
        write(tmp_path / "a.txt", "\n".join(texts) + "\n\n"),
        write(tmp_path / "a.json", json.dumps([{"text": t} for t in texts])),
    ]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    sources.append(Source("ja", str(tmp_path / "a.parquet")))
    for source in sources:
        assert list(corpus.read_texts(source)) == texts, source.path


def test_sources_of_a_language_take_turns(tmp_path: Path) -> None:
    sources = [
        write(tmp_path / "a.txt", "a1\na2\na3"),
        write(tmp_path / "b.txt", "b1"),
        Source("zh", str(tmp_path / "a.txt")),
    ]
    texts = {label: list(stream) for label, stream in corpus.texts_by_language(sources).items()}
    assert texts == {"ja": ["a1", "b1", "a2", "a3"], "zh": ["a1", "a2", "a3"]}


def test_columns_and_conditions(tmp_path: Path) -> None:
    rows = [{"body": "x", "label": 1}, {"body": "y", "label": 0}]
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    source = Source.parse(f"en={tmp_path}/a.jsonl?label=1#body")
    assert list(corpus.read_texts(source)) == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is not a JSON object"),
        (
            "a.jsonl",
            '{"body": "x"}\n',
            "record 1 has no text in column 'text'; its columns are body",
        ),
        ("a.jsonl", '{"text": 5}\n', "no text in column 'text'"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "lone surrogate"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:-20], "damaged gzip file"),
        ("a.jsonl.gz", b"plain", "damaged gzip file"),
        ("a.docx", b"x", "expected a .txt, .jsonl"),
        ("a.json", '{"text": "x"}', "is not a JSON list of objects"),
        ("a.json", b"\xff", "is not UTF-8"),
        ("a.json.gz", b"plain", "damaged gzip file"),
        ("a.parquet", b"plain", "is not a parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    source = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        list(corpus.read_texts(source))


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.jsonl not found"):
        list(corpus.read_texts(Source("ja", str(tmp_path / "nothing.jsonl"))))


def test_a_data_set_is_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes a folder as a name; the streaming path is the one of the hub."""
    folder = tmp_path / "my_dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "ある文"}\n', encoding="utf-8")
    monkeypatch.setattr(corpus, "is_local", lambda source: False)
    assert list(corpus.read_texts(Source("ja", str(folder)))) == ["ある文"]


def test_conversation_formats(tmp_path: Path) -> None:
    expected = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    records = {
        "messages": {"messages": expected},
        "conversations": {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
        },
        "instruction+input>output": {"instruction": "q", "input": "", "output": "a"},
    }
    for fields, record in records.items():
        write(tmp_path / "a.jsonl", json.dumps(record))
        source = Source("ja", str(tmp_path / "a.jsonl"), fields=fields)
        assert list(corpus.read_conversations(source)) == [expected]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": "hello"}, "no list of messages"),
        ({"messages": [{"role": "moderator", "content": "x"}]}, "role 'moderator'"),
        ({"messages": [{"role": "user", "content": None}]}, "content of type NoneType"),
        ({"text": "x"}, "its columns: text"),
    ],
)
def test_bad_conversations_are_named(tmp_path: Path, record: object, message: str) -> None:
    source = write(tmp_path / "a.jsonl", json.dumps(record))
    with pytest.raises(DataError, match=message):
        list(corpus.read_conversations(source))


def test_mix_gives_exact_shares_interleaved() -> None:
    streams = {
        "ja": iter([[1] * 30] * 100),
        "zh": iter([[2] * 7] * 100),
        "en": iter([[3] * 11] * 100),
    }
    tokens = [
        label
        for label, ids in corpus.mix(streams, {"ja": 0.76, "zh": 0.12, "en": 0.12}, 1000)
        for _ in ids
    ]
    assert len(tokens) == 1000
    assert [tokens.count(label) for label in ("ja", "zh", "en")] == [760, 120, 120]
    # Interleaved: every half holds its share up to one document.
    assert abs(tokens[:500].count("ja") - 380) <= 30


def test_mix_says_what_is_missing() -> None:
    streams = {"ja": iter([[1] * 10] * 100), "zh": iter([[2] * 10])}
    with pytest.raises(DataError, match=r"zh has 10 tokens for a share of 120: lower --total.* 83"):
        list(corpus.mix(streams, {"ja": 0.88, "zh": 0.12}, 1000))


@pytest.mark.parametrize("spec", ["nothing", "ja=", "=x", "ja=x?label"])
def test_bad_source_specs(spec: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form"):
        Source.parse(spec)


def test_take_characters_takes_whole_texts() -> None:
    texts = ["aaaa", "bbb", "c"]
    assert corpus.take_characters(texts, 7) == ["aaaa", "bbb"]
    assert corpus.take_characters(texts, 2) == ["aaaa"]


def test_training_lines_are_counted_and_hold_text() -> None:
    counts: dict[str, int] = {}
    lines = list(corpus.training_lines(["一\n\n 二 ", "\u3000\n", "三"], counts))
    assert lines == ["一", " 二 ", "三"]
    assert counts == {"documents": 3, "lines": 3, "characters": 5}


def test_a_corpus_without_text_or_with_an_endless_line_is_refused() -> None:
    with pytest.raises(DataError, match="hold no text"):
        list(corpus.training_lines(["", " \n"], {}))
    endless = "line\n" + "あ" * (corpus.MAX_LINE_CHARACTERS + 1)
    with pytest.raises(DataError, match=r"document 2 has a line of 1,000,001 .* starts 'あああ"):
        list(corpus.training_lines(["short", endless], {}))
    assert len(list(corpus.training_lines([endless[:-1]], {}))) == 2


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_without_line_breaks_is_never_held(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "MAX_RECORD_CHARACTERS", 1000)
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 100)
    source = write(tmp_path / name, '{"text": "short"}\n' + "x" * 5000)
    with pytest.raises(DataError, match="line 2 is longer than 1,000 characters"):
        list(corpus.read_records(source))


def test_blocks_do_not_cut_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 3)
    lines = ["a", "", "bcd", "ef\u2028gh", "あいうえお", "last"]
    source = write(tmp_path / "a.txt", "\r\n".join(lines))
    assert list(corpus.read_texts(source)) == [line for line in lines if line]
    assert [record["text"] for record in corpus.read_records(source)] == lines


def test_a_sample_is_uniform_and_repeatable() -> None:
    assert corpus.sample_lines(iter("abc"), 5, seed=0) == ["a", "b", "c"]
    numbers = [str(n) for n in range(50)]
    assert corpus.sample_lines(numbers, 5, seed=1) == corpus.sample_lines(numbers, 5, seed=1)
    assert corpus.sample_lines(numbers, 5, seed=1) != corpus.sample_lines(numbers, 5, seed=2)
    taken = Counter(n for seed in range(2000) for n in corpus.sample_lines(numbers, 5, seed))
    # 2000 draws of 5 in 50: 200 each, with a standard deviation of 13.
    assert len(taken) == 50 and all(130 < count < 270 for count in taken.values())
