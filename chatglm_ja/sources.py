"""Sources of texts and conversations: local files, or data sets that `datasets` loads by name.

A source is declared in constants.py, on a command line, or in a YAML file:

    Source("ja", "izumi-lab/wikipedia-ja-20230720", columns="text")      constants.py
    --sources ja=data/wiki.parquet zh=pleisto/wikipedia-cn#completion    LANGUAGE=PATH[...]
    --sources mix.yaml                                                   a list of mappings:

        - {language: ja, path: data/wiki/*.parquet, columns: text, weight: 3}
        - {language: ja, path: globis-university/aozorabunko-clean, name: aozora, weight: 1}

Nothing here opens a data file or imports a large library, so a bad command line is refused at once.
"""

import dataclasses
import pkgutil
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

from annotated_types import Gt, Lt, MinLen

from chatglm_ja.errors import ConfigError, DataError, UserError

FORM = "LANGUAGE=PATH_OR_DATASET[@SUBSET][?COLUMN=VALUE][#COLUMNS]"
GLOB_CHARACTERS = frozenset("*[")


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


# The formats that are read, by the ending of the file's name. Text formats may be compressed.
TEXT_FORMATS = ("jsonl", "txt", "json")
FORMATS = (*TEXT_FORMATS, "parquet")
COMPRESSIONS = {
    ".gz": Compression("gzip", ("zlib.error",)),
}
UNCOMPRESSED = Compression("builtins")
# Every known ending, and the format it stands for.
ENDINGS = {f".{name}": name for name in FORMATS} | {
    f".{name}{ending}": name for ending in COMPRESSIONS for name in TEXT_FORMATS
}


def file_format(path: Path) -> str | None:
    """Return the format of a file, one of FORMATS, by its name; None for an unknown ending."""
    return next((name for ending, name in ENDINGS.items() if path.name.endswith(ending)), None)


def file_compression(path: Path) -> Compression:
    """Return how a file is compressed, by its name."""
    return COMPRESSIONS.get(path.suffix, UNCOMPRESSED)


@dataclass(frozen=True)
class Source:
    """A source of texts, or of conversations.

    language    the language it counts as in the mix; of conversations the kind, such as "code"
    path        a file, a folder or a pattern (data/*.parquet) of files, or a data set's name
    name        shown in reports; by default the last part of the path
    columns     texts: the column that holds the text ("text");
                conversations: the column of messages, or QUESTION[+QUESTION...]>ANSWER columns;
                by default recognized by the usual column names, see data/conversations.py
    subset      the configuration of a data set that has several
    where       (COLUMN, VALUE): use only records whose column has that value
    weight      share of its language's tokens relative to the other sources of the language, which
                must then have one too; by default all documents of a language are one pool
    format      wikitext: rows are lines of articles in the WikiText corpora's markup
    id_column   reject records whose value in this column occurred earlier in the file; None: do
                not check
    """

    # The constraints hold for YAML files; constants.py and the command line give what they parse.
    language: Annotated[str, MinLen(1)]
    path: Annotated[str, MinLen(1)]
    name: str | None = None
    columns: str | None = None
    subset: str | None = None
    where: tuple[str, str] | None = None
    weight: Annotated[float, Gt(0), Lt(1e9)] | None = None
    format: Literal["records", "wikitext"] = "records"
    id_column: str | None = "id"

    def __post_init__(self) -> None:
        if not self.name:
            last = Path(self.path).name
            ending = next((ending for ending in ENDINGS if last.endswith(ending)), "")
            object.__setattr__(self, "name", last.removesuffix(ending))

    @classmethod
    def parse(cls, spec: str) -> Self:
        """Parse a source as written on the command line; raise ConfigError if it is malformed."""
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
        """The name in messages and reports: LANGUAGE/NAME."""
        return f"{self.language}/{self.name}"

    def __str__(self) -> str:
        where = f"?{self.where[0]}={self.where[1]}" if self.where else ""
        columns = f"#{self.columns}" if self.columns else ""
        subset = f"@{self.subset}" if self.subset else ""
        return f"{self.language}={self.path}{subset}{where}{columns}"

    def is_local(self) -> bool:
        """Return True if the path names local files, which may be missing, not a data set."""
        path = Path(self.path)
        is_known = file_format(path) is not None
        return path.is_absolute() or path.exists() or self._is_pattern() or is_known

    def files(self) -> list[Path]:
        """Return the local files, sorted; none for the name of a data set.

        Raises DataError if the path looks like one of local files but there are none.
        """
        path = Path(self.path)
        if not self.is_local():
            return []
        known = ", ".join(ENDINGS)
        if path.is_dir():
            paths = [file for file in path.rglob("*") if file.is_file() and file_format(file)]
            problem = f"folder {path} holds no file that ends with one of {known}"
        elif self._is_pattern():
            paths = self._match_pattern()
            problem = f"no file matches {path}"
        else:
            paths = [path] if path.exists() else []
            problem = f"file {path} not found"
        if not paths:
            raise DataError(f"source {self.title}: {problem}")
        unknown = next((file for file in paths if not file_format(file)), None)
        if unknown:
            raise DataError(f"source {self.title}: {unknown} does not end with one of {known}")
        return sorted(paths)

    def _match_pattern(self) -> list[Path]:
        path = Path(self.path)
        anchor = Path(path.anchor)
        try:
            return [file for file in anchor.glob(str(path.relative_to(anchor))) if file.is_file()]
        except ValueError as error:
            raise DataError(f"source {self.title}: {path} is not a pattern ({error})") from None

    def _is_pattern(self) -> bool:
        return not GLOB_CHARACTERS.isdisjoint(self.path) and not Path(self.path).exists()

    def modification_times(self) -> list[int]:
        """Return the modification time of each file, in nanoseconds.

        The fingerprint of a large file is made from samples and may miss a change.
        """
        return [path.stat().st_mtime_ns for path in self.files()]

    def settings(self) -> dict[str, Any]:
        """Return what shapes the result besides file contents: where files lie does not count."""
        values = dataclasses.asdict(self)
        if self.is_local():
            del values["path"]
        return {name: value for name, value in values.items() if value is not None}


def read_argument(argument: str) -> list[Source]:
    """Return the sources that a command-line argument names: one, or those of a YAML file."""
    if "=" not in argument and argument.endswith((".yaml", ".yml")):
        return read_yaml(Path(argument))
    return [Source.parse(argument)]


def read_yaml(path: Path) -> list[Source]:
    """Read a YAML file of sources: a list of mappings with the fields of `Source`.

    Raises ConfigError if the file cannot be read or a field is missing, unknown or invalid.
    """
    entries = load_yaml(path, ConfigError)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path} holds no sources: expected a list of mappings")
    return [_validate(entry, f"{path} source {i}") for i, entry in enumerate(entries, 1)]


def load_yaml(path: Path, failure: type[UserError]) -> Any:
    """Return the content of a YAML file, of any type; raise `failure` if it cannot be read."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise failure(f"{path} could not be read ({error.strerror})") from None
    except Exception as error:  # PyYAML's own, and what `!!bool x` or a date of month 13 raises
        reason = " ".join(str(error).split())
        raise failure(f"{path} is not YAML ({reason})") from None


def _validate(entry: Any, origin: str) -> Source:
    """Check an entry of a YAML file against the fields of `Source`.

    Values are shown with reprlib, which prints a few entries and levels: with aliases, one line of
    YAML can stand for a list of 10^9 entries.
    """
    import pydantic

    if not isinstance(entry, Mapping):
        raise ConfigError(
            f"{origin} is {reprlib.repr(entry)}: expected a mapping with language and path"
        )
    values = dict(entry)
    match list(values["where"].items()) if isinstance(values.get("where"), Mapping) else []:
        case [(column, value)] if not isinstance(value, Mapping | list):
            values["where"] = (str(column), str(value))
    fields: dict[str, Any] = {
        field.name: (field.type, ... if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(Source)
    }
    config = pydantic.ConfigDict(extra="forbid", strict=True)
    problems = []
    try:
        pydantic.create_model("Entry", __config__=config, **fields).model_validate(values)
    except pydantic.ValidationError as error:
        for problem in error.errors():
            name, value = problem["loc"][0], reprlib.repr(problem["input"])
            if problem["type"] in ("extra_forbidden", "invalid_key"):
                problems.append(f"has {name}: expected {', '.join(fields)}")
            elif problem["type"] in ("missing", "string_too_short"):
                problems.append(f"needs a {name}")
            elif name == "where":
                problems.append(f"has where {value}, expected one COLUMN: VALUE")
            else:
                expected = problem["msg"].removeprefix("Input should be ")
                problems.append(f"has {name} {value}, expected {expected}")
    if isinstance(values.get("path"), str) and "\0" in values["path"]:
        problems.append("has NUL in its path")
    if problems:
        raise ConfigError(f"{origin} {'; '.join(problems)}")
    return Source(**values)


def source_contradictions(sources: Iterable[Source]) -> list[str]:
    """Return what is inconsistent among sources, one sentence each."""
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
        f"only some sources of {language} have a weight: give one to all of them or to none"
        for language, kinds in weights.items()
        if len(kinds) > 1
    ]
