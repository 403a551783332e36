"""Where texts and conversations come from: local files, or data sets that `datasets` loads by name.

A source is declared in constants.py, on a command line, or in a YAML file:

    Source("ja", "izumi-lab/wikipedia-ja-20230720", columns="text")      constants.py
    --sources ja=data/wiki.parquet zh=pleisto/wikipedia-cn#completion    LANGUAGE=PATH[...]
    --sources mix.yaml                                                   a list of mappings:

        - {language: ja, path: data/wiki/*.parquet, columns: text, weight: 3}
        - {language: ja, path: globis-university/aozorabunko-clean, name: aozora, weight: 1}

Nothing here opens a data file or imports a large library: a command line is checked at once.
"""

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from chatglm_ja.errors import ConfigError, DataError, UserError

FORM = "LANGUAGE=PATH_OR_DATASET[@SUBSET][?COLUMN=VALUE][#COLUMNS]"
# The formats that are read, by the ending of the name; the text formats also with .gz.
ENDINGS = (".jsonl", ".txt", ".json", ".parquet", ".jsonl.gz", ".txt.gz", ".json.gz")
GLOB_CHARACTERS = frozenset("*[")


@dataclass(frozen=True)
class Source:
    """A source of texts, or of conversations.

    language    what it counts as in the mix: a language, or a kind of conversations as "code"
    path        a file, a folder or a pattern (data/*.parquet) of files, or a data set's name
    name        in reports; by default the last part of the path
    columns     texts: the column that holds the text ("text");
                conversations: the column of messages, or QUESTION[+QUESTION...]>ANSWER columns;
                by default found by the formats' usual names, see conversations.py
    subset      the configuration of a data set that has several
    where       (COLUMN, VALUE): only the records whose column has that value
    weight      share of its language's tokens against the other sources of the language, which
                must then have one too; by default all documents of a language are one pool
    format      wikitext: rows are lines of articles in the WikiText corpora's markup
    id_column   records whose value in this column the file had before are rejected; None: not
                looked at
    """

    language: str
    path: str
    name: str = ""
    columns: str | None = None
    subset: str | None = None
    where: tuple[str, str] | None = None
    weight: float | None = None
    format: Literal["records", "wikitext"] = "records"
    id_column: str | None = "id"

    def __post_init__(self) -> None:
        if not self.name:
            last = Path(self.path).name
            ending = next((e for e in sorted(ENDINGS, key=len)[::-1] if last.endswith(e)), "")
            object.__setattr__(self, "name", last.removesuffix(ending))

    @classmethod
    def parse(cls, spec: str) -> Self:
        """Read the form of the command line."""
        language, equals, rest = spec.partition("=")
        # A folder's name may hold any character: @, ? and # count after the last slash only.
        folder, slash, rest = rest.rpartition("/")
        rest, _, columns = rest.partition("#")
        rest, question, condition = rest.partition("?")
        file, _, subset = rest.partition("@")
        column, _, value = condition.partition("=")
        if not (language and equals and file) or (question and not (column and value)):
            raise ConfigError(f"source {spec!r} is not of the form {FORM}")
        where = (column, value) if question else None
        path = folder + slash + file
        return cls(language, path, columns=columns or None, subset=subset or None, where=where)

    @property
    def title(self) -> str:
        return f"{self.language}/{self.name}"

    def __str__(self) -> str:
        where = f"?{self.where[0]}={self.where[1]}" if self.where else ""
        columns = f"#{self.columns}" if self.columns else ""
        subset = f"@{self.subset}" if self.subset else ""
        return f"{self.language}={self.path}{subset}{where}{columns}"

    def is_local(self) -> bool:
        """Whether the path names files here, which may be missing, rather than a data set."""
        path = Path(self.path)
        return path.is_absolute() or path.exists() or self._is_pattern() or _is_known(path)

    def files(self) -> list[Path]:
        """The local files, in the order of their names; empty for the name of a data set.

        Raises DataError for what looks like a path and holds no file.
        """
        path = Path(self.path)
        if not self.is_local():
            return []
        if path.is_dir():
            found = [file for file in path.rglob("*") if file.is_file() and _is_known(file)]
            missing = f"folder {path} holds no file that ends with one of {', '.join(ENDINGS)}"
        elif self._is_pattern():
            found = self._matches()
            missing = f"no file matches {path}"
        else:
            found = [path] if path.exists() else []
            missing = f"file {path} not found"
        if not found:
            raise DataError(f"source {self.title}: {missing}")
        unknown = [file for file in found if not _is_known(file)]
        if unknown:
            known = ", ".join(ENDINGS)
            raise DataError(f"source {self.title}: {unknown[0]} does not end with one of {known}")
        return sorted(found)

    def _matches(self) -> list[Path]:
        path = Path(self.path)
        anchor = Path(path.anchor)
        try:
            return [file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file()]
        except ValueError as error:
            raise DataError(f"source {self.title}: {path} is no pattern ({error})") from None

    def _is_pattern(self) -> bool:
        return not GLOB_CHARACTERS.isdisjoint(self.path) and not Path(self.path).exists()

    def changed(self) -> list[int]:
        """When the files were changed last, in nanoseconds: of large ones samples are hashed."""
        return [path.stat().st_mtime_ns for path in self.files()]

    def settings(self) -> dict[str, Any]:
        """What shapes the result beside the content of files, which may lie anywhere."""
        chosen = dataclasses.asdict(self)
        if self.is_local():
            del chosen["path"]
        return {name: value for name, value in chosen.items() if value is not None}


def _is_known(path: Path) -> bool:
    return path.name.endswith(ENDINGS)


def read_argument(argument: str) -> list[Source]:
    """The sources that a command-line argument names: one, or those of a YAML file."""
    if "=" not in argument and argument.endswith((".yaml", ".yml")):
        return read_yaml(Path(argument))
    return [Source.parse(argument)]


def read_yaml(path: Path) -> list[Source]:
    """The sources of a YAML file: a list of mappings with the fields of `Source`."""
    entries = load_yaml(path, ConfigError)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path} holds no sources: expected a list of mappings")
    return [_from_mapping(entry, f"{path} source {i}") for i, entry in enumerate(entries, 1)]


def load_yaml(path: Path, failure: type[UserError]) -> Any:
    """What a YAML file holds, whatever that is; a `failure` if it cannot be read."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise failure(f"{path} could not be read ({error.strerror})") from None
    except Exception as error:  # PyYAML's own, and what `!!bool x` or a date of month 13 ends with
        reason = " ".join(str(error).split())
        raise failure(f"{path} is not YAML ({reason})") from None


def _from_mapping(entry: Any, origin: str) -> Source:
    # reprlib writes out a few entries and levels: a file's aliases make 10^9 of a line's.
    known = {field.name: field for field in dataclasses.fields(Source)}
    if not isinstance(entry, Mapping):
        raise ConfigError(
            f"{origin} is {reprlib.repr(entry)}: expected a mapping with language and path"
        )
    unknown = sorted(str(name) for name in entry if name not in known)
    if unknown:
        raise ConfigError(f"{origin} has {', '.join(unknown)}: expected {', '.join(known)}")
    problems = [f"needs a {name}" for name in ("language", "path") if not entry.get(name)]
    values = dict(entry)
    where = values.get("where")
    pairs = list(where.items()) if isinstance(where, Mapping) else []
    if len(pairs) == 1 and not isinstance(pairs[0][1], Mapping | list):
        values["where"] = (str(pairs[0][0]), str(pairs[0][1]))
    elif where is not None:
        problems.append("has a where that is not one COLUMN: VALUE")
    weight = values.get("weight")
    if weight is not None and not _is_positive(weight):
        problems.append(f"has weight {reprlib.repr(weight)}, expected a positive number")
    if values.get("format", "records") not in ("records", "wikitext"):
        problems.append(
            f"has format {reprlib.repr(values['format'])}, expected records or wikitext"
        )
    for name in ("language", "path", "name", "columns", "subset", "id_column"):
        if not isinstance(values.get(name), str | None):
            problems.append(f"has {name} {reprlib.repr(values[name])}, expected text")
    if isinstance(values.get("path"), str) and "\0" in values["path"]:
        problems.append("has NUL in its path")
    if problems:
        raise ConfigError(f"{origin} {'; '.join(problems)}")
    return Source(**values)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


def source_contradictions(sources: Iterable[Source]) -> list[str]:
    """What is wrong with the sources: one sentence each."""
    sources = list(sources)
    problems = [
        f"{source.title} is a file, which has no subset {source.subset!r}"
        for source in sources
        if source.subset and source.is_local()
    ]
    weights: dict[str, set[bool]] = {}
    for source in sources:
        weights.setdefault(source.language, set()).add(source.weight is not None)
    return problems + [
        f"the sources of {language} have a weight in part: give one to all of them or to none"
        for language, kinds in weights.items()
        if len(kinds) > 1
    ]
