"""The files of a source: formats and compressions by name, and which files of a folder are data.

A folder is read as `datasets` reads it. It may be

    a data set of the hub, downloaded or cloned    the configurations and splits that README.md
                                                   lists in its YAML header
    written by `save_to_disk`                      the Arrow files that its state.json lists
    any other folder                               splits by the usual names of files and folders:
                                                   train-00000-of-00002.parquet, test/a.jsonl;
                                                   without such names all files are the split train

Of files in several formats the commonest format is read: a LICENSE.txt beside wiki.parquet is no
text. Hidden files and folders, and the files that describe a data set, are never data. Whatever is
not read is returned, so that it can be named. `datasets` is imported only if a folder is listed.
"""

import glob
import itertools
import json
import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from chatglm_ja.errors import DataError


@dataclass(frozen=True)
class Compression:
    """The module whose `open` reads a compressed file, and its own errors for a corrupt one."""

    module: str
    errors: tuple[str, ...] = ()

    def open(self, path: Path) -> BinaryIO:
        """Open a file for reading its decompressed bytes."""
        return pkgutil.resolve_name(f"{self.module}:open")(path, "rb")

    def error_types(self) -> tuple[type[Exception], ...]:
        """Return the errors that mean a corrupt file; an OSError does so if it has no errno."""
        return (EOFError, OSError, *map(pkgutil.resolve_name, self.errors))


ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
# The formats that are read, by the ending of the file's name. Text formats may be compressed.
TEXT_FORMATS = ("jsonl", "txt", "json")
FORMATS = (*TEXT_FORMATS, "parquet", "arrow")
COMPRESSIONS = {
    ".gz": Compression("gzip", ("zlib.error",)),
    ".bz2": Compression("bz2"),
    ".xz": Compression("lzma", ("lzma.LZMAError",)),
    ".zst": Compression(ZSTD, (f"{ZSTD}.ZstdError",)),
}
UNCOMPRESSED = Compression("builtins")
# Every known ending, and the format it stands for.
ENDINGS = {f".{name}": name for name in FORMATS} | {
    f".{name}{ending}": name for ending in COMPRESSIONS for name in TEXT_FORMATS
}
KNOWN_ENDINGS = (
    f"{', '.join(f'.{name}' for name in TEXT_FORMATS)} (also compressed: "
    f"{', '.join(COMPRESSIONS)}), {', '.join(f'.{name}' for name in FORMATS[len(TEXT_FORMATS) :])}"
)
# The formats that `datasets` reads as one; of equally many files, the first is read.
FAMILIES = (("parquet",), ("jsonl", "json"), ("arrow",), ("txt",))
TRAIN = "train"
SHARD_NUMBER = re.compile(r"(.+)-\d{5}-of-\d{5}")


def file_ending(path: Path) -> str:
    """Return the known ending of a file's name, in any case, or an empty string."""
    name = path.name.lower()
    return next((ending for ending in ENDINGS if name.endswith(ending)), "")


def file_format(path: Path) -> str | None:
    """Return the format of a file, one of FORMATS, by its name; None for an unknown ending."""
    return ENDINGS.get(file_ending(path))


def file_compression(path: Path) -> Compression:
    """Return how a file is compressed, by its name."""
    return COMPRESSIONS.get(path.suffix.lower(), UNCOMPRESSED)


@dataclass(frozen=True)
class FoundFiles:
    """The files of a source, sorted, and the names of those beside them that are not read."""

    files: Sequence[Path]
    passed_over: Sequence[str] = ()


def match_pattern(pattern: str) -> FoundFiles:
    """Return the data files that match a glob pattern, in which ** is any number of folders.

    Raises DataError if there are none.
    """
    # Unlike Path.glob, glob follows links to folders and leaves out hidden files.
    # The part that exists is a name, whatever characters it has.
    root = next(str(path) for path in Path(pattern).parents if path.is_dir())
    rest = pattern if root == "." else glob.escape(root) + pattern[len(root) :]
    paths = [Path(name) for name in glob.glob(rest, recursive=True)]  # noqa: PTH207
    files = sorted(path for path in paths if path.is_file())
    data = [path for path in files if file_format(path) and not _is_description(path.name)]
    if not data:
        others = f", which match {len(files)} other files" * bool(files)
        raise DataError(f"no file matches {pattern} and ends with {KNOWN_ENDINGS}{others}")
    read = set(data)
    return FoundFiles(data, [str(path) for path in files if path not in read])


def list_folder(
    folder: Path, split: str, subset: str | None, names: Iterable[str] | None = None
) -> FoundFiles:
    """Return the files of one split and one configuration (`subset`) of a folder.

    `names` are those of the files if only README.md is there yet. Raises DataError if there are
    none, listing the splits or the configurations that exist.
    """
    if (folder / "snapshots").is_dir() and (folder / "blobs").is_dir():
        versions = ", ".join(sorted(path.name for path in (folder / "snapshots").iterdir()))
        raise DataError(
            f"folder {folder} is the hub's cache of a data set: give a version of it, a folder "
            f"below {folder / 'snapshots'}: {versions}"
        )
    data, others = _walk(folder) if names is None else _sort_names(folder, names)
    saved = _saved_splits(folder)
    if saved is None:
        root, card_splits = _card_splits(folder, subset)
        names = {path.relative_to(root).as_posix(): path for path in data if root in path.parents}
        listed = (
            _usual_splits(names)
            if card_splits is None
            else {split: _matching(names, patterns) for split, patterns in card_splits.items()}
        )
        splits = {split: [names[name] for name in found] for split, found in listed.items()}
        if data and not any(splits.values()):
            patterns = ", ".join(itertools.chain.from_iterable((card_splits or {}).values()))
            raise DataError(
                f"folder {folder} holds none of the files that its README.md lists, {patterns}, in "
                f"a known format: expected {KNOWN_ENDINGS}; name files with a pattern, such as "
                f"{folder}/*.jsonl"
            )
        if not data:
            counted = f": it holds {', '.join(others[:5])}" if others else ""
            raise DataError(
                f"folder {folder} holds no file that ends with {KNOWN_ENDINGS}{counted}"
            )
    elif subset:
        raise DataError(f"folder {folder} was written by save_to_disk: it has no subset {subset!r}")
    else:
        splits = saved
    if split not in splits:
        raise DataError(
            f"folder {folder} has no split {split!r}; it has {', '.join(sorted(splits))}, by its "
            "README.md or the names of its files: choose one with split=NAME, or name files with a "
            f"pattern, such as {folder}/*.jsonl"
        )
    files = _commonest_format(splits[split])
    if not files:
        raise DataError(f"folder {folder} holds no file of its split {split!r}: download it again")
    read = set(files)
    rest = [str(path.relative_to(folder)) for path in data if path not in read]
    return FoundFiles(sorted(files), rest + others)


def _is_description(name: str) -> bool:
    """Return whether a file describes a data set, or is a cache that `datasets` left beside it."""
    from datasets import data_files

    is_cache = name.startswith("cache-") and name.endswith(".arrow")
    return name in data_files.FILES_TO_IGNORE or name == "state.json" or is_cache


def _commonest_format(files: Sequence[Path]) -> list[Path]:
    """Return the files of the family of formats that most of them have."""
    families = ([path for path in files if file_format(path) in names] for names in FAMILIES)
    return max(families, key=len)


def _walk(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the data files below a folder, and the names of all else; links are followed.

    A hidden folder is one name. A folder that links lead to twice is read once.
    """
    data: list[Path] = []
    others: list[str] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        below = Path(root).relative_to(folder)
        hidden = [name for name in folders if name.startswith((".", "__"))]
        others += [f"{below / name}/" for name in hidden]
        folders[:] = sorted(set(folders) - set(hidden))
        files = [name for name in sorted(names) if Path(root, name).is_file()]
        others += [str(below / name) for name in sorted({*names} - {*files})]
        found, rest = _sort_names(folder, [(below / name).as_posix() for name in files])
        data += found
        others += rest
    return data, others


def _sort_names(folder: Path, names: Iterable[str]) -> tuple[list[Path], list[str]]:
    """Return the paths of those files in a folder that are data, and the names of the others."""
    data: list[Path] = []
    others: list[str] = []
    for name in names:
        *above, last = name.split("/")
        is_hidden = last.startswith(".") or any(part.startswith((".", "__")) for part in above)
        if is_hidden or _is_description(last) or not file_format(Path(last)):
            others.append(name)
        else:
            data.append(folder / name)
    return data, others


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return the names that one of some glob patterns matches."""
    from fsspec.utils import glob_translate

    regex = re.compile("|".join(glob_translate(pattern.removeprefix("./")) for pattern in patterns))
    return [name for name in names if regex.match(name)]


def _usual_splits(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the splits that the names of files tell, by the patterns of `datasets`.

    The first patterns that match count: data/SPLIT-00000-of-00001, then names of folders, then
    names of files. Other files are then in no split. If none matches, all are the split train.
    """
    from datasets import data_files

    names = list(names)
    splits: dict[str, list[str]] = {}
    for name in _matching(names, [data_files.SPLIT_PATTERN_SHARDED.replace("{split}", "*")]):
        if number := SHARD_NUMBER.match(name.rpartition("/")[2]):
            splits.setdefault(number[1], []).append(name)
    tables = iter(data_files.ALL_DEFAULT_PATTERNS)
    while not splits and (table := next(tables, None)):
        found = {str(split): _matching(names, patterns) for split, patterns in table.items()}
        splits = {split: matched for split, matched in found.items() if matched}
    return splits


def _card_splits(folder: Path, subset: str | None) -> tuple[Path, dict[str, list[str]] | None]:
    """Return the folder and the patterns of each split of a configuration that README.md lists.

    Without such a list there are no patterns. Raises DataError if README.md has several
    configurations and none is the default, or not this one.
    """
    configurations: Any = {}
    if (card := folder / "README.md").is_file():
        from datasets.utils.metadata import MetadataConfigs
        from huggingface_hub import DatasetCard

        try:
            header = DatasetCard.load(card).data
            listed = MetadataConfigs.from_dataset_card_data(header)
            # YAML reads the names 2023 and no as other types.
            configurations = MetadataConfigs({str(name): entry for name, entry in listed.items()})
        except Exception as error:  # of YAML, of the hub's client, of `datasets`
            reason = " ".join(str(error).split())
            raise DataError(
                f"the YAML header of {card} describes no data set ({reason}): mend it, or name the "
                f"files with a pattern, such as {folder}/*.jsonl"
            ) from None
    names = ", ".join(configurations) or "default"
    if subset is None and len(configurations) > 1:
        subset = configurations.get_default_config_name()
        if subset is None:
            raise DataError(
                f"folder {folder} has several configurations, {names}: choose one with @NAME"
            )
    if not configurations and subset in (None, "default"):
        return folder, None
    if subset is None:
        (subset,) = configurations
    if subset not in configurations:
        raise DataError(f"folder {folder} has no configuration {subset!r}; it has {names}")
    entry = configurations[subset]
    root = folder / (entry.get("data_dir") or "")
    if "data_files" not in entry:
        return root, None
    from datasets.data_files import sanitize_patterns

    return root, sanitize_patterns(entry["data_files"])


def _saved_splits(folder: Path) -> dict[str, list[Path]] | None:
    """Return the Arrow files by split of a folder that `save_to_disk` wrote, or None for another.

    A single saved split is found under its own name, and as the split train.
    """

    def files_of(saved: Path) -> tuple[str, list[Path]]:
        state = json.loads((saved / "state.json").read_bytes())
        return state.get("_split") or TRAIN, [saved / f["filename"] for f in state["_data_files"]]

    try:
        if (folder / "dataset_dict.json").is_file():
            names = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
            return {name: files_of(folder / name)[1] for name in names}
        if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            split, files = files_of(folder)
            return {TRAIN: files, split: files}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"folder {folder} looks like one of save_to_disk, but is damaged ({error}): save the "
            "data set again"
        ) from None
    return None
