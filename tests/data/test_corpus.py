"""Text sources: documents with their records, samples from a stream of texts."""

import json
from collections import Counter
from pathlib import Path

import pytest

from chatglm_ja.data import corpus
from chatglm_ja.data.corpus import Document
from chatglm_ja.data.readers import read_chunks
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.errors import DataError
from chatglm_ja.sources import Source


def write(path: Path, text: str) -> Source:
    path.write_text(text, encoding="utf-8")
    return Source("ja", str(path))


def test_sources_of_a_language_take_turns(tmp_path: Path) -> None:
    sources = [
        write(tmp_path / "a.txt", "a1\na2\n\na3"),
        write(tmp_path / "b.txt", "b1"),
        Source("zh", str(tmp_path / "a.txt")),
    ]
    streams = SourceReader().texts_by_language(sources)
    texts = {language: list(stream) for language, stream in streams.items()}
    assert texts == {"ja": ["a1", "b1", "a2", "a3"], "zh": ["a1", "a2", "a3"]}


def test_documents_know_their_record_and_id(tmp_path: Path) -> None:
    rows = [{"body": "x", "key": 7}, {"body": 5, "key": 8}, {"body": "z"}]
    path = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, rows)) + "\n").path
    source = Source("en", path, columns="body", id_column="key")
    first, bad, last = corpus.read_documents(next(read_chunks(source)), source, "NFC")
    assert first == Document(1, "x", "7")
    assert isinstance(bad, tuple)
    assert (bad[0], bad[1].reason) == (3, "wrong type")
    assert last == Document(5, "z", None)


def test_a_missing_file_is_not_taken_for_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.jsonl not found"):
        list(SourceReader().texts(Source("ja", str(tmp_path / "nothing.jsonl"))))


def test_wikitext_rows_are_articles(tmp_path: Path) -> None:
    rows = ["", " = First = \n", "", " A well @-@ known text . \n", " = = Part = = \n",
            " More . \n", "", " = Second = \n", " Its text . \n"]  # fmt: skip
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    path = write(tmp_path / "a.jsonl", lines).path
    source = Source("en", path, format="wikitext")
    assert list(corpus.read_documents(next(read_chunks(source)), source, "NFC")) == [
        Document(2, "First\nA well-known text.\nPart\nMore."),
        Document(8, "Second\nIts text."),
    ]


@pytest.mark.parametrize(
    ("line", "restored"),
    [
        (" = Robert Boulter = \n", "Robert Boulter"),
        (" = = = Early life = = = \n", "Early life"),
        (" in 1978 @-@ 79 , 1 @,@ 000 and 2 @.@ 5 . \n", "in 1978-79, 1,000 and 2.5."),
        (" ( Japanese : 戦場 , lit . Valkyria ) , \n", "(Japanese: 戦場, lit. Valkyria),"),
        (" the game 's story and players ' choice \n", "the game's story and players ' choice"),
        (' called " Calamaty Raven " and " Gallia " . \n', 'called "Calamaty Raven" and "Gallia".'),
        (" x = 5 and y = 6 \n", "x = 5 and y = 6"),
        (" mail me @ home @-@ or not \n", "mail me @ home-or not"),
        ("", ""),
    ],
)
def test_wikitext_lines(line: str, restored: str) -> None:
    assert corpus.restore_line(line) == restored


def test_lines_before_the_first_title_are_an_article() -> None:
    lines = [(1, " An end . \n"), (2, " = Title = \n"), (3, "\n"), (4, " Text . \n")]
    assert list(corpus.join_articles(lines)) == [(1, "An end."), (2, "Title\nText.")]
    assert list(corpus.join_articles([])) == []


def test_take_characters_takes_whole_texts() -> None:
    texts = ["aaaa", "bbb", "c"]
    assert corpus.take_characters(texts, 7) == ["aaaa", "bbb"]
    assert corpus.take_characters(texts, 2) == ["aaaa"]


def test_training_lines_are_counted_and_not_blank() -> None:
    counts: dict[str, int] = {}
    lines = list(corpus.training_lines(["一\n\n 二 ", "\u3000\n", "三"], counts))
    assert lines == ["一", " 二 ", "三"]
    assert counts == {"documents": 3, "lines": 3, "characters": 5}


def test_a_corpus_without_text_is_refused() -> None:
    with pytest.raises(DataError, match="hold no text"):
        list(corpus.training_lines(["", " \n"], {}))


def test_a_sample_is_uniform_and_repeatable() -> None:
    assert corpus.sample_lines(iter("abc"), 5, seed=0) == ["a", "b", "c"]
    numbers = [str(n) for n in range(50)]
    assert corpus.sample_lines(numbers, 5, seed=1) == corpus.sample_lines(numbers, 5, seed=1)
    assert corpus.sample_lines(numbers, 5, seed=1) != corpus.sample_lines(numbers, 5, seed=2)
    counts = Counter(n for seed in range(2000) for n in corpus.sample_lines(numbers, 5, seed))
    # 2000 samples of 5 in 50: 200 each, with a standard deviation of 13.
    assert len(counts) == 50 and all(130 < count < 270 for count in counts.values())
