"""Which files of a folder are data: splits, configurations, what is passed over, links, endings."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from chatglm_ja.errors import DataError
from chatglm_ja.source_files import COMPRESSIONS, ENDINGS, file_compression, file_format
from chatglm_ja.sources import Source

ROW = '{"text": "x"}\n'


def make_folder(folder: Path, *names: str, card: str | None = None) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ROW, encoding="utf-8")
    if card:
        (folder / "README.md").write_text(f"---\n{card}\n---\n", encoding="utf-8")
    return folder


def read(folder: Path, **fields: Any) -> tuple[list[str], list[str]]:
    """Return the names, below the folder, of the files that are read and that are passed over."""
    found = Source("ja", str(folder), **fields).find()
    assert list(found.files) == sorted(found.files)
    return [path.relative_to(folder).as_posix() for path in found.files], list(found.passed_over)


SHAPES = [
    ("a.jsonl", "b.jsonl", "sub/c.jsonl"),
    ("train.jsonl", "test.jsonl"),
    ("train.jsonl", "other.jsonl"),
    ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl",
     "data/test-00000-of-00001.jsonl", "data/odd_split-00000-of-00001.jsonl"),
    ("my-train-v1.jsonl", "my-dev-v1.jsonl"),
    ("train/a.jsonl", "validation/b.jsonl", "deep/test/c.jsonl"),
    ("part/training_2/a.jsonl", "valid/b.jsonl"),
    ("latest.jsonl", "contest.jsonl", "traindata.jsonl"),
    ("a.jsonl", ".hidden.jsonl", ".cache/x.jsonl", "._a.jsonl", "__pycache__/y.jsonl",
     ".ipynb_checkpoints/a-checkpoint.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize("names", SHAPES)
def test_a_folder_is_read_as_datasets_reads_it(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = make_folder(tmp_path / "corpus", *names)
    builder = datasets.load_dataset_builder(str(folder), cache_dir=str(tmp_path / "cache"))
    expected = sorted(os.path.relpath(path, folder) for path in builder.config.data_files["train"])
    files, passed_over = read(folder)
    assert files == expected
    # Everything else is named; a hidden folder is one name.
    named = {name.split("/")[0] for name in passed_over}
    assert named >= {name.split("/")[0] for name in set(names) - set(files)} - set(files)


def test_the_commonest_format_of_a_folder_is_read(tmp_path: Path) -> None:
    """As `datasets` does: a license is no text, and a table of statistics no data."""
    files, passed_over = read(make_folder(tmp_path / "a", "wiki.jsonl", "LICENSE.txt", "b.json"))
    assert (files, passed_over) == (["b.json", "wiki.jsonl"], ["LICENSE.txt"])
    assert read(make_folder(tmp_path / "b", "w.parquet", "stats.json"))[0] == ["w.parquet"]
    assert read(make_folder(tmp_path / "c", "1.txt", "2.txt", "w.jsonl"))[0] == ["1.txt", "2.txt"]


def test_caches_are_never_data(tmp_path: Path) -> None:
    files, passed_over = read(make_folder(tmp_path / "a", "x.arrow", "cache-0123.arrow"))
    assert (files, passed_over) == (["x.arrow"], ["cache-0123.arrow"])
    cache = make_folder(tmp_path / "datasets--o--n", "snapshots/a1/x.jsonl", "blobs/b")
    with pytest.raises(DataError, match=r"is the hub's cache of a data set: .*snapshots: a1"):
        read(cache)


def test_a_card_is_named_if_its_files_are_missing_or_its_names_are_no_texts(tmp_path: Path) -> None:
    card = "configs:\n- {config_name: 2023, data_files: gone/*.jsonl}"
    with pytest.raises(DataError, match=r"none of the files that its README.md lists, gone/"):
        read(make_folder(tmp_path / "a", "x.jsonl", card=card))
    two = card + "\n- {config_name: no, data_files: x.jsonl}"
    with pytest.raises(DataError, match="several configurations, 2023, False"):
        read(make_folder(tmp_path / "b", "x.jsonl", card=two))


def test_splits_are_chosen_and_listed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "data/train_sft-00000-of-00001.jsonl",
                         "data/test_sft-00000-of-00001.jsonl")  # fmt: skip
    with pytest.raises(DataError, match="no split 'train'; it has test_sft, train_sft, by"):
        read(folder)
    files, passed_over = read(folder, split="train_sft")
    assert files == ["data/train_sft-00000-of-00001.jsonl"]
    assert passed_over == ["data/test_sft-00000-of-00001.jsonl"]


CARD = """configs:
- config_name: v1
  data_files:
  - {split: train, path: one/tr*}
  - {split: test, path: one/te*}
- config_name: v2
  data_files: two/*"""


def test_configurations_of_a_card(tmp_path: Path) -> None:
    names = ("one/tr.jsonl", "one/te.jsonl", "two/a.jsonl", "two/b.json", "loose.jsonl")
    folder = make_folder(tmp_path / "a", *names, card=CARD)
    with pytest.raises(DataError, match=r"several configurations, v1, v2: choose one with @NAME"):
        read(folder)
    with pytest.raises(DataError, match="no configuration 'v3'; it has v1, v2"):
        read(folder, subset="v3")
    assert read(folder, subset="v1")[0] == ["one/tr.jsonl"]
    assert read(folder, subset="v1", split="test")[0] == ["one/te.jsonl"]
    assert read(folder, subset="v2")[0] == ["two/a.jsonl", "two/b.json"]
    default = CARD.replace("config_name: v2", "config_name: v2\n  default: true")
    assert read(make_folder(tmp_path / "b", *names, card=default))[0][0] == "two/a.jsonl"
    one_only = "configs:\n- config_name: x\n  data_dir: two"
    assert read(make_folder(tmp_path / "c", *names, card=one_only))[0][0] == "two/a.jsonl"
    with pytest.raises(DataError, match=r"YAML header of .*README\.md describes no data set"):
        read(make_folder(tmp_path / "d", *names, card="configs: [1"))
    with pytest.raises(DataError, match="has no configuration 'v1'; it has default"):
        read(make_folder(tmp_path / "e", *names), subset="v1")


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [str(i) for i in range(10)]})
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    assert read(tmp_path / "one")[0] == [f"data-0000{i}-of-00002.arrow" for i in (0, 1)]
    pair = datasets.DatasetDict(train=rows, test=rows)
    pair.save_to_disk(tmp_path / "two")
    files, passed_over = read(tmp_path / "two")
    assert files == ["train/data-00000-of-00001.arrow"]
    assert "test/data-00000-of-00001.arrow" in passed_over
    with pytest.raises(DataError, match="no split 'dev'; it has test, train"):
        read(tmp_path / "two", split="dev")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="looks like one of save_to_disk, but is damaged"):
        read(tmp_path / "one")


def test_descriptions_are_never_data(tmp_path: Path) -> None:
    names = ("a.jsonl", "dataset_infos.json", "dataset_info.json", "config.json", "notes.csv")
    files, passed_over = read(make_folder(tmp_path, *names))
    assert files == ["a.jsonl"]
    assert sorted(passed_over) == sorted(names[1:])
    pattern = Source("ja", f"{tmp_path}/*").find()
    assert [path.name for path in pattern.files] == ["a.jsonl"]
    assert len(pattern.passed_over) == 4
    with pytest.raises(DataError, match="which match 1 other files"):
        Source("ja", f"{tmp_path}/*.csv").find()


def test_links_are_followed_once(tmp_path: Path) -> None:
    real = make_folder(tmp_path / "real", "sub/a.jsonl")
    folder = make_folder(tmp_path / "folder", "b.jsonl")
    (folder / "linked").symlink_to(real)
    (folder / "c.jsonl").symlink_to(real / "sub/a.jsonl")
    (real / "loop").symlink_to(folder)
    (folder / "gone.jsonl").symlink_to(tmp_path / "nothing")
    files, passed_over = read(folder)
    assert files == ["b.jsonl", "c.jsonl", "linked/sub/a.jsonl"]
    assert passed_over == ["gone.jsonl"]
    assert len(Source("ja", f"{folder}/*/**/*.jsonl").files()) >= 1
    (tmp_path / "alias").symlink_to(folder)
    assert read(tmp_path / "alias")[0] == files
    with pytest.raises(DataError, match=r"not found .a link to a missing file."):
        Source("ja", str(folder / "gone.jsonl")).files()


@pytest.mark.parametrize("ending", ENDINGS)
def test_endings_in_any_case(tmp_path: Path, ending: str) -> None:
    for spelled in (ending, ending.upper()):
        path = Path(f"x.y{spelled}")
        assert file_format(path) == ENDINGS[ending]
        assert Source("ja", str(path)).name == "x.y"
        if (last := path.suffix.lower()) in COMPRESSIONS:
            assert file_compression(path) is COMPRESSIONS[last]
    assert read(make_folder(tmp_path, f"x{ending.upper()}"))[0] == [f"x{ending.upper()}"]


def test_a_missing_file_is_not_taken_for_a_data_set_of_the_hub() -> None:
    for path in ("wiki.csv", "./wiki", "a/b/c", "x.JSONL", "x.docx", "x.zip", "/abs", "a b", "*.x"):
        assert Source("ja", path).is_local(), path
        with pytest.raises(DataError, match=r"not found|no file matches"):
            Source("ja", path).files()
    for path in ("wikitext", "izumi-lab/wikipedia-ja-20230720", "allenai/c4.v1", "mc4.ja"):
        assert not Source("ja", path).is_local(), path


def test_a_list_of_rows_is_what_the_folder_holds(tmp_path: Path) -> None:
    """The splits of a downloaded data set are those that its card lists, as by name."""
    folder = make_folder(tmp_path / "set", "data/test-00000-of-00001.jsonl")
    (folder / "data/train-00000-of-00001.jsonl").write_text(ROW * 3)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: data/train-*}\n  - {split: test, path: data/test-*}\n---\n"
    )
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    (path,) = Source("ja", str(folder)).files()
    assert len(path.read_text().splitlines()) == len(rows) == 3
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows.to_list()


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl is a device or a pipe, expected a file"):
        Source("ja", str(tmp_path / "a.jsonl")).files()
