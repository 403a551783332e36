"""Sources on a command line, in a YAML file, as files, folders, patterns and names."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.data.settings import PrepareDataConfig
from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.settings import parse
from chatglm_ja.sources import Source, read_argument, source_contradictions


def test_the_grammar_of_the_command_line() -> None:
    spec = "en=microsoft/wiki_qa@default?label=1#question>answer"
    assert Source.parse(spec) == Source(
        "en", "microsoft/wiki_qa", columns="question>answer", subset="default", where=("label", "1")
    )
    assert str(Source.parse(spec)) == spec
    assert Source.parse("ja=a/b.txt") == Source("ja", "a/b.txt", name="b")
    assert Source.parse("ja=/x@1/y#2/b.jsonl.gz#t") == Source(
        "ja", "/x@1/y#2/b.jsonl.gz", name="b", columns="t"
    )


def test_any_field_by_its_name() -> None:
    assert Source.parse("ja=b.txt,format=document,weight=2.5,name=books") == Source(
        "ja", "b.txt", name="books", format="document", weight=2.5
    )
    assert Source.parse("en=org/set@v1?a=b/c#t,split=test,revision=ab12,id_column=") == Source(
        "en", "org/set", columns="t", subset="v1", split="test", revision="ab12",
        where=("a", "b/c"), id_column=None,
    )  # fmt: skip
    assert Source.parse("ja=one,two.txt") == Source("ja", "one,two.txt")
    for spec, message in (
        ("ja=b.txt,format=book", "has format 'book', expected 'lines', 'paragraphs', 'document'"),
        ("ja=b.txt,weight=0", "has weight 0.0, expected greater than 0"),
        ("ja=b.txt,quality=good", "has quality 'good', expected 'web'"),
        ("ja=b.txt,weight=much", "has weight 'much', expected a valid number"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            Source.parse(spec)


@pytest.mark.parametrize(
    "name", ["a@1.jsonl", "a#b.txt", "a?b=c.jsonl", "a,name=b.txt", "a b.TXT", "a[1].jsonl", "ä*"]
)
@pytest.mark.parametrize("parent", ["plain", "x@1", "y#2", "z?k=v", "w,split=a"])
def test_a_path_that_exists_always_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parent: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(parent)
    folder.mkdir()
    is_folder = "." not in name
    path = folder / name
    file = path / "data.jsonl" if is_folder else path
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"a": "x"}\n')
    for spelled in [str(path), str(tmp_path / path)] + [f"{path}/"] * is_folder:
        source = Source.parse(f"ja={spelled}#a,weight=2")
        assert (source.path, source.columns, source.weight) == (spelled, "a", 2)
        assert [p.resolve() for p in source.files()] == [file.resolve()]
        assert Source.parse(f"ja={spelled}").path == spelled
        assert Source.parse(f"ja={spelled}?k=a/b").where == ("k", "a/b")


@pytest.mark.parametrize(
    ("written", "value", "is_equal"),
    [
        ("true", True, True), ("True", True, True), ("true", False, False), ("true", "true", True),
        ("1", 1, True), ("1", 1.0, True), ("1", "1", True), ("1.0", 1, True), ("1.0", "1", False),
        ("1", True, False), ("true", 1, False), ("0", False, False), ("null", None, True),
        ("null", 0, False), ("a/b", "a/b", True), ("", "", True), ('["a"]', ["a"], True),
        ("1e999", 1, False), ("[" * 5000, 1, False),
    ],
)  # fmt: skip
def test_conditions_compare_as_json(written: str, value: Any, is_equal: bool) -> None:
    assert Source("ja", "x", where=("k", written)).matches(value) is is_equal


def test_a_yaml_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_bytes("- {language: ja, path: 猫.txt}".encode("cp932"))
    with pytest.raises(ConfigError, match=r"mix\.yaml is not in UTF-8: convert it"):
        read_argument(str(path))


def test_a_pattern_below_a_folder_with_any_name(tmp_path: Path) -> None:
    (tmp_path / "[x]*").mkdir()
    (tmp_path / "[x]*" / "a.txt").touch()
    assert len(Source("ja", f"{tmp_path}/[x]*/*.txt").files()) == 1


def test_conditions_of_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text("".join(f"- {{language: ja, path: x, where: {{k: {v}}}}}\n"
                            for v in ("true", "1", "null", "'1'", "text")))  # fmt: skip
    assert [s.where[1] for s in read_argument(str(path)) if s.where] == [
        "true", "1", "null", "1", "text",
    ]  # fmt: skip


def test_what_a_file_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    path = f"ja={tmp_path}/a.jsonl"
    assert source_contradictions([Source.parse(f"{path},split=test")]) == [
        "ja/a is a file, which has no split 'test'"
    ]
    assert "no subset 'x'" in source_contradictions([Source.parse(f"{path}@x")])[0]
    assert "revision" in source_contradictions([Source.parse(f"{path},revision=1")])[0]
    assert not source_contradictions([Source.parse(f"ja={tmp_path},split=test")])
    with pytest.raises(DataError, match=r"format document is for \.txt files"):
        Source.parse(f"{path},format=document").files()


def test_names_that_are_no_utf_8_can_be_written(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xe3\x81\x82\xff.txt")
    Path(path).write_text("x")
    source = Source("ja", path)
    assert source.title == "ja/あ\\xff"
    source.title.encode()
    assert [os.fsencode(p) for p in Source("ja", str(tmp_path)).files()] == [os.fsencode(path)]


@pytest.mark.parametrize("spec", ["nothing", "ja=", "=x", "ja=x?label"])
def test_bad_source_specs(spec: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form"):
        Source.parse(spec)


def test_a_yaml_file_declares_sources(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(
        "- {language: ja, path: a.txt, name: wiki, columns: body, weight: 3}\n"
        "- {language: ja, path: org/books, where: {kind: novel}, weight: 1, id_column: null}\n"
        "- {language: en, path: org/wikitext, subset: v1, format: wikitext}\n"
    )
    assert read_argument(str(path)) == [
        Source("ja", "a.txt", name="wiki", columns="body", weight=3),
        Source("ja", "org/books", where=("kind", "novel"), weight=1, id_column=None),
        Source("en", "org/wikitext", subset="v1", format="wikitext"),
    ]
    defaults: dict[str, Any] = {
        "output_dir": Path("o"), "tokenizer": Path("t"), "total_tokens": 1, "sft_examples": 1,
        "sft_sources": (Source("ja", "x.jsonl"),), "sft_shares": ("ja=1",),
    }  # fmt: skip
    argv = ["--sources", str(path), "zh=z.txt", "--shares", "ja=1", "en=1", "zh=1"]
    config = parse(PrepareDataConfig, "", defaults, argv)
    assert [source.title for source in config.sources] == [
        "ja/wiki", "ja/books", "en/wikitext", "zh/z",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {language: ja", "is not YAML"),
        ("language: ja", "holds no sources: expected a list of mappings"),
        ("- ja=x.txt", "source 1 is 'ja=x.txt': expected a mapping"),
        ("- {language: ja}", "source 1 needs a path"),
        ("- {language: ja, path: x, colum: y}", "source 1 has colum: expected language, path"),
        ("- {language: ja, path: x, weight: heavy}", "has weight 'heavy', expected a valid number"),
        ("- {language: ja, path: x, weight: 0}", "has weight 0, expected greater than 0"),
        (
            "- {language: ja, path: x, format: xml}",
            "has format 'xml', expected 'lines', 'paragraphs', 'document' or 'wikitext'",
        ),
        ("- {language: ja, path: x, where: 5}", "has where 5, expected one COLUMN: VALUE"),
        ("- {language: ja, path: [x]}", "has path .'x'., expected a valid string"),
    ],
)
def test_a_bad_yaml_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_argument(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_yaml_file_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml could not be read"):
        read_argument("none.yaml")


def test_all_or_no_sources_of_a_language_have_weights() -> None:
    sources = [Source("ja", "a", weight=1), Source("ja", "b"), Source("en", "c")]
    assert source_contradictions(sources) == [
        "only some sources of ja have a weight: give one to all of them or to none"
    ]
    assert not source_contradictions([*sources[:1], *sources[2:]])


def test_files_folders_patterns_and_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.parquet", "sub/c.txt.gz", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in Source("ja", str(tmp_path)).files()] == ["a.parquet"]
    assert [p.name for p in Source("ja", f"{tmp_path}/**/*").files()] == [
        "a.parquet", "b.jsonl", "c.txt.gz",
    ]  # fmt: skip
    assert [p.name for p in Source("ja", f"{tmp_path}/*.jsonl").files()] == ["b.jsonl"]
    assert Source("ja", "izumi-lab/wikipedia").files() == []
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("no.jsonl", r"file no\.jsonl not found"),
        (f"{tmp_path}/no", "not found"),
        (f"{tmp_path}/*.json", "no file matches"),
        (f"{tmp_path}/empty", "holds no file that ends with"),
        (f"{tmp_path}/*.md", "no file matches .* which match 1 other files"),
        (
            f"{tmp_path}/README.md",
            "of no known format: expected .jsonl, .txt, .json .also compressed",
        ),
        (f"{tmp_path}/***/a.txt", "no file matches"),
        ("https://example.com/x.jsonl", "is a URL: download the file"),
    ):
        with pytest.raises(DataError, match=message):
            Source("ja", path).files()


def test_a_file_s_settings_exclude_its_path_and_a_data_set_s_include_its_name(
    tmp_path: Path,
) -> None:
    def settings(spec: str) -> dict[str, Any]:
        return Source.parse(spec).settings()

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("x")
    assert settings(f"ja={tmp_path}/a/x.txt") == settings(f"ja={tmp_path}/b/x.txt")
    assert settings("ja=some/dataset") != settings("ja=other/dataset")
