"""Sources of texts and conversations: local files, or data sets that `datasets` loads by name.

A source is declared in constants.py, on a command line, or in a YAML file:

    Source("ja", "izumi-lab/wikipedia-ja-20230720", columns="text")      constants.py
    --sources ja=data/wiki.parquet zh=pleisto/wikipedia-cn#completion    LANGUAGE=PATH[...]
    --sources ja=books.txt,format=paragraphs                             any field by its name
    --sources mix.yaml                                                   a list of mappings:

        - {language: ja, path: data/wiki/*.parquet, columns: text, weight: 3}
        - {language: ja, path: globis-university/aozorabunko-clean, name: aozora, weight: 1}

A path that exists is always a file or folder here, whatever characters it holds. Nothing here opens
a data file or imports a large library, so a bad command line is refused at once.
"""

import dataclasses
import json
import mimetypes
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Gt, Lt, MinLen

from chatglm_ja.errors import ConfigError, DataError, UserError
from chatglm_ja.source_files import (
    KNOWN_ENDINGS,
    TRAIN,
    FoundFiles,
    file_ending,
    file_format,
    list_folder,
    match_pattern,
)

FORM = "LANGUAGE=PATH_OR_DATASET[@SUBSET][?COLUMN=VALUE][#COLUMNS][,FIELD=VALUE...]"
GLOB_CHARACTERS = frozenset("*[")
# The name of a data set of the hub: at most one slash, no other characters.
HUB_NAME = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Source:
    """A source of texts, or of conversations.

    language    the language it counts as in the mix; of conversations the kind, such as "code"
    path        a file, a folder (see source_files.py), a pattern of files (data/*.parquet), or the
                name of a data set of the hub
    name        shown in reports; by default the last part of the path
    columns     texts: the column that holds the text ("text");
                conversations: the column of messages, or QUESTION[+QUESTION...]>ANSWER columns;
                by default recognized by the usual column names, see data/conversations.py
    subset      the configuration of a data set, or of a folder that holds one, that has several
    split       the split of a data set, or of a folder that holds one
    revision    the commit, branch or tag of a data set of the hub
    where       (COLUMN, VALUE): use only records whose column has that value; of another type than
                text, the value is written as in JSON: true, 1, null
    weight      share of its language's tokens relative to the other sources of the language, which
                must then have one too; by default all documents of a language are one pool
    format      what a text is. lines: a line of a .txt file, a record of another one;
                paragraphs: of a .txt file, what stands between empty lines; document: a whole .txt
                file; wikitext: rows are lines of articles in the WikiText corpora's markup
    quality     web: of texts, drop pages of menus, mojibake, keywords and other junk, see
                data/quality.py; None: do not judge them
    id_column   reject records whose value in this column occurred earlier in the file; None: do
                not check
    """

    # The constraints hold for YAML files; constants.py and the command line give what they parse.
    language: Annotated[str, MinLen(1)]
    path: Annotated[str, MinLen(1)]
    name: str | None = None
    columns: str | None = None
    subset: str | None = None
    split: Annotated[str, MinLen(1)] = TRAIN
    revision: str | None = None
    where: tuple[str, str] | None = None
    weight: Annotated[float, Gt(0), Lt(1e9)] | None = None
    format: Literal["lines", "paragraphs", "document", "wikitext"] = "lines"
    quality: Literal["web"] | None = None
    id_column: str | None = "id"

    def __post_init__(self) -> None:
        if not os.path.lexists(self.path):
            # A shell leaves the ~ of ja=~/wiki.txt to the program. (Path's method raises.)
            home = os.path.expanduser(self.path)  # noqa: PTH111
            object.__setattr__(self, "path", home)
        if not self.name:
            last = Path(self.path).name or Path(self.path).resolve().name or self.path
            ending = len(file_ending(Path(last)))
            object.__setattr__(self, "name", printable(last[:-ending] if ending else last))

    @classmethod
    def parse(cls, spec: str) -> Self:
        """Parse a source as written on the command line; raise ConfigError if it is malformed.

        The longest beginning that exists is the path. If none exists, the path ends at the first @,
        ?, # or ,FIELD= after its last slash.
        """
        language, _, rest = spec.partition("=")
        ends = [match.start() for match in _DELIMITER.finditer(rest)] + [len(rest)]
        end = next((end for end in reversed(ends) if end and os.path.exists(rest[:end])), None)
        if end is None:
            start = rest.partition("?")[0].rfind("/") + 1
            end = next(end for end in ends if end >= start)
        path, fields = rest[:end], _SUFFIX.fullmatch(rest[end:])
        if not (language and path and fields):
            raise ConfigError(f"source {spec!r} is not of the form {FORM}")
        values: dict[str, Any] = {"language": language, "path": path}
        values |= {name: fields[name] for name in ("subset", "columns") if fields[name]}
        if fields["where"]:
            column, _, value = fields["where"].partition("=")
            values["where"] = (column, value)
        options = _OPTION.split(fields["options"])[1:]
        for name, value in zip(options[::2], options[1::2], strict=True):
            is_number = name == "weight" and re.fullmatch(r"[\d.]+", value)
            values[name] = float(value) if is_number else value or None
        return cls(**values) if not options else cls(**_validate(values, f"source {spec!r}"))

    @property
    def title(self) -> str:
        """The name in messages and reports: LANGUAGE/NAME."""
        return f"{self.language}/{self.name}"

    def __str__(self) -> str:
        where = f"?{self.where[0]}={self.where[1]}" if self.where else ""
        columns = f"#{self.columns}" if self.columns else ""
        subset = f"@{self.subset}" if self.subset else ""
        split = f",split={self.split}" if self.split != TRAIN else ""
        return f"{self.language}={self.path}{subset}{where}{columns}{split}"

    def is_local(self) -> bool:
        """Return True if the path names local files, which may be missing, not a data set.

        Missing files are recognized by their names: wiki.csv, ./wiki, data/ja/wiki, *.txt.
        """
        return (
            os.path.lexists(self.path)
            or self._is_pattern()
            or not HUB_NAME.fullmatch(self.path)
            or file_format(Path(self.path)) is not None
            or mimetypes.guess_type(self.path, strict=False) != (None, None)
        )

    def find(self) -> FoundFiles:
        """Return the local files and what is passed over; none for the name of a data set.

        Raises DataError if the path looks like one of local files but there are none.
        """
        path = Path(self.path)
        if not self.is_local():
            return FoundFiles([])
        try:
            if path.is_dir():
                found = list_folder(path, self.split, self.subset)
            elif self._is_pattern():
                found = match_pattern(self.path)
            elif re.match(r"[a-z0-9+]+:/", self.path):
                raise DataError(f"{self.path} is a URL: download the file, and give its path")
            elif not os.path.exists(path):
                link = " (a link to a missing file)" if path.is_symlink() else ""
                known = "" if file_format(path) else f"; the formats are {KNOWN_ENDINGS}"
                raise DataError(f"file {path} not found{link}: check the path{known}")
            elif not path.is_file():
                raise DataError(f"{path} is a device or a pipe, expected a file")
            elif not file_format(path):
                raise DataError(f"{path} is of no known format: expected {KNOWN_ENDINGS}")
            else:
                found = FoundFiles([path])
        except DataError as error:
            raise DataError(f"source {self.title}: {error}") from None
        if self.format in TEXT_FILE_FORMATS and not any(
            file_format(p) == "txt" for p in found.files
        ):
            raise DataError(
                f"source {self.title}: format {self.format} is for .txt files, and {path} has none"
            )
        return found

    def files(self) -> list[Path]:
        """Return the local files, sorted; none for the name of a data set. Raises DataError."""
        return list(self.find().files)

    def matches(self, value: Any) -> bool:
        """Return whether a record's value is the one of `where`, as text or as JSON has it."""
        assert self.where
        if isinstance(value, str) or str(value) == self.where[1]:
            return str(value) == self.where[1]
        try:
            wanted = json.loads(self.where[1])
        except (ValueError, RecursionError):
            return False
        are_equal_kind = isinstance(value, bool) == isinstance(wanted, bool)
        return are_equal_kind and bool(value == wanted)

    def _is_pattern(self) -> bool:
        return not GLOB_CHARACTERS.isdisjoint(self.path) and not os.path.lexists(self.path)

    def modification_times(self) -> list[int]:
        """Return the modification time of each file, in nanoseconds.

        The fingerprint of a large file is made from samples and may miss a change.
        """
        return [path.stat().st_mtime_ns for path in self.files()]

    def settings(self) -> dict[str, Any]:
        """Return what shapes the result besides file contents: where files lie does not count."""
        values = dataclasses.asdict(self)
        if self.is_local():
            del values["path"], values["split"]
        return {name: value for name, value in values.items() if value is not None}


# A .txt file can be read as these; other files have records.
TEXT_FILE_FORMATS = ("paragraphs", "document")
_FIELDS = {field.name: field for field in dataclasses.fields(Source)}
_OPTION = re.compile(f",({'|'.join(_FIELDS.keys() - {'language', 'path', 'where'})})=")
_DELIMITER = re.compile(f"[@?#]|{_OPTION.pattern}")
_SUFFIX = re.compile(
    r"(?:@(?P<subset>[^?#,]+))?(?:\?(?P<where>[^=#]+=[^#]+?))?(?:#(?P<columns>.+?))?"
    rf"(?P<options>(?:{_OPTION.pattern}.*)?)"
)


def printable(name: str) -> str:
    """Return a file's name for reports; bytes that are no UTF-8 are escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


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
    return [read_entry(entry, f"{path} source {i}") for i, entry in enumerate(entries, start=1)]


def read_entry(entry: Any, origin: str) -> Source:
    """Return the source of an entry of a YAML file; raise ConfigError, naming its `origin`."""
    return Source(**_validate(entry, origin))


def as_entry(source: Source) -> dict[str, Any]:
    """Return the mapping of which `read_entry` makes an equal source."""
    values = dataclasses.asdict(source)
    if source.where is not None:
        values["where"] = dict([source.where])
    return {name: value for name, value in values.items() if value != _FIELDS[name].default}


def load_yaml(path: Path, failure: type[UserError]) -> Any:
    """Return the content of a YAML file, of any type; raise `failure` if it cannot be read."""
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise failure(
            f"{path} is not in UTF-8: convert it, such as with `iconv -f CP932 -t UTF-8`"
        ) from None
    except OSError as error:
        raise failure(f"{path} could not be read ({error.strerror})") from None
    except Exception as error:  # PyYAML's own, and what `!!bool x` or a date of month 13 raises
        reason = " ".join(str(error).split())
        raise failure(f"{path} is not YAML ({reason})") from None


def _validate(entry: Any, origin: str) -> dict[str, Any]:
    """Return an entry of a YAML file, checked against the fields of `Source`.

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
            written = value if isinstance(value, str) else json.dumps(value, default=str)
            values["where"] = (str(column), written)
    fields: dict[str, Any] = {
        field.name: (field.type, ... if field.default is dataclasses.MISSING else field.default)
        for field in _FIELDS.values()
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
    return values


def source_contradictions(sources: Iterable[Source]) -> list[str]:
    """Return what is inconsistent among sources, one sentence each."""
    sources = list(sources)
    problems = []
    for source in sources:
        if source.is_local() and source.revision:
            problems.append(f"{source.title} is local: a revision is of a data set of the hub")
        if source.is_local() and not os.path.isdir(source.path):
            for name, value in (("subset", source.subset), ("split", source.split)):
                if value not in (None, TRAIN):
                    problems.append(f"{source.title} is a file, which has no {name} {value!r}")
    weights: dict[str, set[bool]] = {}
    for source in sources:
        weights.setdefault(source.language, set()).add(source.weight is not None)
    return problems + [
        f"only some sources of {language} have a weight: give one to all of them or to none"
        for language, kinds in weights.items()
        if len(kinds) > 1
    ]
