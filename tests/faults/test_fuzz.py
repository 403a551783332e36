"""Files from outside, made up at random: each is read, or refused in one line that names it.

FUZZ_EXAMPLES is how many files each test tries. A few are the same on every run; many are others:

    FUZZ_EXAMPLES=2000 python -m pytest tests/faults/test_fuzz.py
"""

import contextlib
import functools
import gzip
import json
import math
import os
import shutil
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatglm_ja import (
    answers,
    base_config,
    chat,
    checkpoint,
    conversations,
    corpus,
    encoding,
    export,
    multiple_choice,
    pretrain_data,
    records,
    sft_data,
    sources,
    tokenizer,
    units,
    vocabulary,
)
from chatglm_ja.artifacts import MANIFEST, Output, history, open_artifact, read_manifest
from chatglm_ja.checkpoints import Checkpoints
from chatglm_ja.errors import ConfigError, DataError, UserError
from chatglm_ja.records import Reject
from chatglm_ja.sources import Source
from tests.conftest import FIXTURES
from tests.faults.ledger import Ledger, Row
from tests.test_artifacts import Config

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "50"))
SECONDS = 20  # what takes longer hangs
LONGEST_MESSAGE = 4000
BASE = FIXTURES / "tiny_chatglm3"
SHARD = "model-00002-of-00003.safetensors"

SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 50,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


TRIED: Counter[str] = Counter()
HANDLED: Counter[str] = Counter()


def fuzz(title: str, *strategies: Any, **named: Any) -> Callable[[Any], Any]:
    """A test that is called with many inputs, which are counted."""

    def decorate(test: Any) -> Any:
        @functools.wraps(test)
        def counted(*given: Any, **fixtures: Any) -> None:
            try:
                test(*given, **fixtures)
            except Exception:  # an input that hypothesis gives up is none of them
                TRIED[title] += 1
                raise
            TRIED[title] += 1
            HANDLED[title] += 1

        return SETTINGS(given(*strategies, **named)(counted))

    return decorate


@pytest.fixture(scope="module", autouse=True)
def entries_of_the_page(ledger: Ledger) -> Iterator[None]:
    yield
    for title, tried in TRIED.items():
        ledger.tables["fuzz"][title] = Row(tried, HANDLED[title])


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        yield Path(name)


@contextlib.contextmanager
def refusals() -> Iterator[list[str]]:
    """What bad input may end with: a UserError of one line, or the system's own OSError."""

    def too_slow(*_: Any) -> None:
        pytest.fail(f"still busy after {SECONDS} seconds")

    said: list[str] = []
    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SECONDS)
    try:
        yield said
    except UserError as error:
        said.append(str(error))
        assert said[0].isascii() or said[0].encode("utf-8", "surrogatepass")
        assert said[0].splitlines() == [said[0]], f"not one line: {said[0]!r}"
        assert len(said[0]) <= LONGEST_MESSAGE, said[0]
    except OSError as error:
        assert error.errno, repr(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- What files are made of ---------------------------------------------------------------------

SPELLINGS = (*tokenizer.SPECIAL_TOKENS, "<s>", "</s>", "<unk>", "<0x0A>", tokenizer.SPACE)
any_text = st.text(st.characters(), max_size=20) | st.sampled_from(
    [*SPELLINGS, "../x", "/etc/passwd", "..", ".", "", "a\nb", "\0", "\ud800", "x" * 5000]
)
numbers = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 1, True, 0.5, 2**31, 2**63, 2**64, 10**9, 10**400, -(10**18)])
)
scalars = st.none() | st.booleans() | numbers | any_text


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


def values(leaves: st.SearchStrategy[Any] = scalars, keys: Any = any_text) -> Any:
    """Any JSON value."""
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=8,
    )


any_value = values()
# A depth that the parser of JSON takes may be too deep for everything else.
deep = st.sampled_from([90, 300, 700, 900, 950, 970, 980, 990, 1500, 5000]).flatmap(
    lambda depth: st.sampled_from(
        [nested(depth), nested(depth, '{"a":', "1" + "}")[: depth * 5] + "1" + "}" * depth]
    )
)


def json_texts(of: st.SearchStrategy[Any]) -> st.SearchStrategy[str]:
    """JSON with what can be in a file and not in a Python value: repeated keys, depth."""
    return of.map(json.dumps) | deep | deep.map(lambda text: f'{{"text": {text}}}')


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with some cut out, replaced, put in or repeated; or cut off."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        size = draw(st.sampled_from([0, 1, 2, 8, 100, len(content)]))
        part = draw(
            st.binary(max_size=8)
            | st.sampled_from([b"\0" * 8, b"\xff" * 8, content[start : start + size]])
        )
        content = content[:start] + part + content[start + size :]
    return content


def changed(valid: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A dictionary in which a few values, at any depth, are others, or gone."""

    @st.composite
    def change(draw: st.DrawFn) -> dict[str, Any]:
        whole = json.loads(json.dumps(valid))
        for _ in range(draw(st.integers(1, 3))):
            place = whole
            while place:
                key = draw(st.sampled_from(sorted(place)))
                if not isinstance(place[key], dict) or draw(st.booleans()):
                    break
                place = place[key]
            if not place:
                continue
            kind = draw(st.sampled_from(["replace", "remove", "rename"]))
            value = place.pop(key)
            if kind == "replace":
                place[key] = draw(any_value)
            elif kind == "rename":
                place[draw(any_text)] = value
        return whole

    return change()


# --- Checkpoints --------------------------------------------------------------------------------


def read_checkpoint(changes: dict[str, bytes]) -> None:
    """A copy of the base, some of whose files are others, read as step 3 reads it."""
    with folder() as copy:
        for path in BASE.iterdir():
            if path.name not in changes:
                (copy / path.name).symlink_to(path)
        for name, content in changes.items():
            (copy / name).write_bytes(content)
        with refusals():
            opened = checkpoint.Checkpoint(copy)
            opened.size()
            assert sum(tensor.numel() for _, tensor in opened.glm_tensors()) > 0
        with refusals():
            checkpoint.describe(copy)
            assert all(name for name, _ in checkpoint.stored_tensors(copy))
        with refusals():
            checkpoint.read_tensor(copy, "transformer.output_layer.weight")


HEADER_BYTES = struct.unpack("<Q", (BASE / SHARD).read_bytes()[:8])[0]
HEADER = json.loads((BASE / SHARD).read_bytes()[8 : 8 + HEADER_BYTES])
DATA = (BASE / SHARD).read_bytes()[8 + HEADER_BYTES :]
BIN_NAME = "pytorch_model.bin"


@st.composite
def shards(draw: st.DrawFn) -> bytes:
    """A file of tensors with a header that says something else."""
    header = draw(
        json_texts(changed(HEADER))
        | any_value.map(json.dumps)
        | changed(dict(list(HEADER.items())[:2])).map(
            lambda some: json.dumps(HEADER)[:-1] + ", " + json.dumps(some)[1:]
        )
        | st.sampled_from(["F8_E4M3", "I64", "BOOL", "F64", "F4", "C64", "BF16", "x", "F32"]).map(
            lambda dtype: json.dumps(HEADER).replace("F16", dtype)
        )
        | st.integers(-(2**70), 2**70).map(
            lambda number: json.dumps(HEADER).replace("[0,", f"[{number},").replace("64", "65")
        )
        | st.just(json.dumps(HEADER))
    ).encode()
    length = draw(
        st.just(len(header))
        | st.integers(0, 2**64 - 1)
        | st.sampled_from([0, 2**63, 2**64 - 1, 10**8, len(header) - 1, len(header) + 1])
    )
    return struct.pack("<Q", length) + header + draw(st.just(DATA) | st.binary(max_size=50))


@fuzz(
    "safetensors files: headers, offsets, bytes",
    st.binary(max_size=200) | shards() | damaged((BASE / SHARD).read_bytes()),
)
def test_shards(content: bytes) -> None:
    read_checkpoint({SHARD: content})


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("bin") / BIN_NAME
    torch.save({"transformer.output_layer.weight": torch.zeros(4, 4)}, path)
    return path.read_bytes()


@fuzz("`pytorch_model.bin`", data=st.data())
def test_pickled_shards(data: st.DataObject, pickled: bytes) -> None:
    content = data.draw(st.binary(max_size=200) | damaged(pickled))
    with folder() as copy:
        (copy / "config.json").symlink_to(BASE / "config.json")
        (copy / BIN_NAME).write_bytes(content)
        with refusals():
            checkpoint.Checkpoint(copy)
        with refusals():
            checkpoint.read_tensor(copy, "transformer.output_layer.weight")


INDEX = json.loads((BASE / checkpoint.INDEX_FILE).read_bytes())


@fuzz(
    "indices of weights",
    st.binary(max_size=100)
    | json_texts(any_value | changed(INDEX)).map(str.encode)
    | st.builds(
        lambda name, file: json.dumps({"weight_map": {**INDEX["weight_map"], name: file}}).encode(),
        st.sampled_from(sorted(INDEX["weight_map"])),
        any_value | st.sampled_from(["config.json", "tokenizer.model", SHARD, "./" + SHARD]),
    ),
)
def test_indices(content: bytes) -> None:
    read_checkpoint({checkpoint.INDEX_FILE: content})


CONFIG = json.loads((BASE / "config.json").read_bytes())


@fuzz(
    "config.json",
    st.binary(max_size=100)
    | json_texts(any_value | changed(CONFIG)).map(str.encode)
    | st.dictionaries(
        st.sampled_from([*base_config.SIZES, "rope_ratio", "_name_or_path", "quantization_bit"]),
        scalars,
        min_size=1,
        max_size=2,
    ).map(lambda some: json.dumps(CONFIG | some).encode()),
)
def test_configurations(content: bytes) -> None:
    read_checkpoint({"config.json": content})
    with folder() as copy:
        (copy / "config.json").write_bytes(content)
        with refusals():
            base_config.read_config(copy)
    with folder() as copy:
        (copy / "config.json").write_bytes(content)
        with refusals():
            checkpoint.load_glm(copy, None, "auto") if b'"glm"' not in content else None


# --- Tokenizers ---------------------------------------------------------------------------------

MODEL = (BASE / tokenizer.MODEL_FILE).read_bytes()
PIECE = tokenizer.messages.ModelProto.SentencePiece
LEARNED = ("し", "ま", "す", "しま", "します", "込む", "<|user|>")


def without_bytes(proto: Any) -> None:
    proto.trainer_spec.byte_fallback = False
    del proto.pieces[3:]


NORMAL, UNKNOWN, CONTROL = PIECE.NORMAL, PIECE.UNKNOWN, PIECE.CONTROL
# To a model with only the pieces that every base has.
ODD_MODELS: dict[str, Callable[[Any], object]] = {
    "no longer piece": lambda proto: None,
    "no piece but characters": lambda proto: proto.pieces.add(piece="a", score=-1),
    "a score that is no number": lambda proto: proto.pieces.add(piece="a", score=math.nan),
    "a score without an end": lambda proto: proto.pieces.add(piece="a", score=-math.inf),
    "a piece twice": lambda proto: proto.pieces.add(piece="<s>", score=-1),
    "no UTF-8": lambda proto: proto.MergeFromString(b"\n\x04\n\x02\xff\xfe"),
    "no UTF-8 twice": lambda proto: proto.MergeFromString(b"\n\x04\n\x02\xff\xfe" * 2),
    "an empty piece": lambda proto: proto.pieces.add(piece="", score=-1),
    "a space in a piece": lambda proto: proto.pieces.add(piece="a b", score=-1),
    "a zero in a piece": lambda proto: proto.pieces.add(piece="\0\0", score=-1),
    "no unknown piece": lambda proto: proto.pieces.pop(0),
    "no beginning": lambda proto: proto.pieces.pop(1),
    "no end": lambda proto: proto.pieces.pop(2),
    "a control piece of a letter": lambda proto: proto.pieces.add(piece="a", type=CONTROL),
    "another order": lambda proto: proto.pieces.reverse(),
    "an end that is text": lambda proto: setattr(proto.pieces[2], "type", NORMAL),
    "more control pieces": lambda proto: proto.pieces.add(piece="<pad>", type=CONTROL),
    "a merged model": lambda proto: proto.pieces.add(piece="sop", type=CONTROL),
    "a piece for users": lambda proto: proto.pieces.add(piece="ab", type=PIECE.USER_DEFINED),
    "an unused piece": lambda proto: proto.pieces.add(piece="します", type=PIECE.UNUSED),
    "a byte too few": lambda proto: proto.pieces.pop(),
    "a mark at the end": lambda p: setattr(p.trainer_spec, "treat_whitespace_as_suffix", True),
    "no bytes": without_bytes,
    "a damaged map": lambda p: setattr(p.normalizer_spec, "precompiled_charsmap", b"\4\0\0\0abcd"),
    "the other map": lambda p: setattr(p.denormalizer_spec, "precompiled_charsmap", b"\4\0\0\0a"),
}


def small_model() -> Any:
    proto = tokenizer.parse_model(MODEL, Path("tiny"))
    del proto.pieces[3 + 256 :]
    return proto


@st.composite
def models(draw: st.DrawFn) -> bytes:
    """A well-formed ModelProto that is odd."""
    proto = small_model() if draw(st.booleans()) else tokenizer.parse_model(MODEL, Path("tiny"))
    score = st.floats(-1e6, 0, width=32) | st.sampled_from([0.0, math.nan, math.inf, -3.4e38])
    text = st.text(min_size=1, max_size=4) | st.sampled_from(
        [*SPELLINGS, "", "a", "し", "ます", "\0", "的的", " ", "a b", "\n", "します", "▁▁"]
    )
    kind = st.sampled_from([NORMAL] * 6 + [UNKNOWN, CONTROL, 4, 5, 6])
    for _ in range(draw(st.integers(0, 4))):
        piece = PIECE(piece=draw(text), score=draw(score), type=draw(kind))
        if draw(st.integers(0, 3)):
            proto.pieces.append(piece)
        else:
            proto.pieces[draw(st.integers(0, len(proto.pieces) - 1))].CopyFrom(piece)
    for change in draw(st.lists(st.sampled_from(sorted(ODD_MODELS)), max_size=1)):
        ODD_MODELS[change](proto)
    content: bytes = proto.SerializeToString()
    # A field that says that it is longer, a text that is no UTF-8.
    return content + draw(st.sampled_from([b""] * 8 + [b"\n\x7f", b"\n\x04\n\x02\xff\xfe"]))


@fuzz(
    "sentencepiece models: bytes, and well-formed odd ones",
    st.binary(max_size=200) | damaged(MODEL) | models() | models(),
)
def test_tokenizer_models(content: bytes) -> None:
    check_model(content)


@pytest.mark.parametrize("change", ODD_MODELS)
def test_odd_tokenizer_models(change: str) -> None:
    proto = small_model()
    ODD_MODELS[change](proto)
    check_model(proto.SerializeToString())


def check_model(content: bytes) -> None:
    """As step 2 reads the base's and step 1's, and merges; then as step 4 encodes with them."""
    with folder() as copy:
        (copy / "config.json").symlink_to(BASE / "config.json")
        (copy / tokenizer.MODEL_FILE).write_bytes(content)
        (copy / vocabulary.JA_MODEL_FILE).write_bytes(content)
        with refusals():
            base = tokenizer.read_base(copy)
            check_merge(copy, base, [PIECE(piece=text) for text in LEARNED])
        with refusals():
            learned = vocabulary.read_learned(copy)
            check_merge(copy, tokenizer.read_base(BASE), learned.pieces)


def check_merge(target: Path, base: Any, pieces: Iterable[Any]) -> None:
    learned = small_model()
    del learned.pieces[:]
    learned.pieces.extend(pieces)
    merged = vocabulary.merge(base, learned, "japanese").proto
    assert [p.piece for p in merged.pieces[:3]] == ["<unk>", "<s>", "</s>"]
    assert all(math.isfinite(piece.score) for piece in merged.pieces)
    texts = ["", "します 的 a\n", "<|user|>"]
    export.save(merged, target)
    loaded = tokenizer.load(target)
    encoded = [loaded.encode(text) for text in texts]
    assert [ids.tolist() for ids in encoding.CorpusEncoder(merged).encode(texts)] == encoded
    assert export.line_encoder(merged)(texts) == encoded
    chat.build_example(loaded, [{"role": "user", "content": text} for text in texts])


# --- Records ------------------------------------------------------------------------------------

names = st.sampled_from(
    ["text", "id", "kind", "messages", "instruction", "output", "history", "system", "question",
     "choices", "answer", "conversations", "prompt", "response"]
)  # fmt: skip
roles = st.sampled_from(["user", "human", "USER", "assistant", "gpt", "system", "tool", "x", ""])
message = st.fixed_dictionaries(
    {},
    optional={
        "role": roles | any_value,
        "from": roles | any_value,
        "content": any_text | any_value,
        "value": any_text | any_value,
        "metadata": any_text | any_value,
        "tools": any_value,
    },
)


@st.composite
def dialogues(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Messages that alternate, most of them."""
    speakers = draw(st.sampled_from([["user", "assistant"], ["human", "gpt"], ["user", "tool"]]))
    talk: list[dict[str, Any]] = []
    if draw(st.booleans()):
        talk.append({"role": "system", "content": draw(any_text), "tools": draw(any_value)})
    for turn in range(draw(st.integers(1, 6))):
        content = draw(any_text.filter(str.strip) | any_text)
        talk.append({"role": speakers[turn % 2], "content": content})
        if draw(st.integers(0, 4)) == 0:
            talk[-1]["metadata"] = draw(any_text | any_value)
    return talk


columns_of_record = st.dictionaries(names, any_value, max_size=4) | st.fixed_dictionaries(
    {},
    optional={
        "text": any_text,
        "id": any_value,
        "messages": dialogues() | st.lists(message, max_size=4) | any_value,
        "instruction": any_text,
        "input": any_text | st.none(),
        "output": any_text,
        "system": any_text,
        "history": st.lists(st.lists(any_text, min_size=2, max_size=2), max_size=2) | any_value,
        "question": any_text,
        "choices": st.lists(any_text, max_size=3),
        "answer": st.integers(0, 3) | any_value,
    },
)
DEEP_RECORDS = (
    '{"id": %s, "text": "x", "kind": "k"}',
    '{"id": 1, "text": "x", "kind": %s}',
    '{"messages": [{"role": %s, "content": "x"}]}',
    '{"messages": [{"role": "user", "content": "x", "metadata": %s}], "id": %s}',
    '{"question": %s, "choices": ["a", "b"], "answer": 1}',
    '{"question": "q", "choices": ["a", "b"], "answer": %s}',
)
deep_records = deep.flatmap(
    lambda text: st.sampled_from(DEEP_RECORDS).map(lambda form: form.replace("%s", text))
)
ODD_LINES = (
    b'{"text": "a", "text": 1}', b'{"id": 1, "id": [], "text": ""}', b"\xef\xbb\xbf{}",
    b'{"text": "\\ud800"}', b'{"text": "\\u0000"}', b'{"text": NaN, "id": Infinity}',
    b'{"\\ud800": 1}', b'{"text": 1' + b"0" * 5000 + b"}", b'{"id": 1' + b"0" * 4290 + b"}",
    b" " + b"= " * 3000 + b"x", b" " + b"= = " * 3000 + b"x", b" = " + b" " * 9000 + b"x",
    b'" x' * 60_000, b" = Title = ", b'{"text": " ' + b"= " * 3000 + b'x"}',
)  # fmt: skip
lines = (
    columns_of_record.map(json.dumps).map(str.encode)
    | json_texts(any_value).map(str.encode)
    | deep_records.map(str.encode)
    | st.binary(max_size=30)
    | st.sampled_from(ODD_LINES)
)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A name's ending, and what a file with it holds."""
    ending = draw(st.sampled_from(sources.ENDINGS))
    found = draw(st.lists(lines, max_size=6))
    separator = draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n"]))
    content = separator.join(found) + draw(st.sampled_from([b"", b"\n"]))
    if ".json" in ending and ".jsonl" not in ending and draw(st.booleans()):
        content = b"[" + b",".join(found) + b"]"
    if ending == ".parquet":
        content = b"PAR1" + content + b"PAR1"
    if draw(st.integers(0, 4)) == 0:
        content = draw(damaged(content))
    if ending.endswith(".gz"):
        content = gzip.compress(content, mtime=0)
        if draw(st.booleans()):
            content = draw(damaged(content))
    return ending, content


forms = st.builds(
    Source,
    st.sampled_from(["ja", "zh", "en", "code"]),
    st.just("unused"),
    columns=st.none() | st.sampled_from(["text", "messages", "instruction>output", "a+b>c", "id"]),
    where=st.none() | st.sampled_from([("kind", "k"), ("id", "1")]),
    format=st.sampled_from(["records", "records", "wikitext"]),
    id_column=st.sampled_from(["id", "id", None, "text"]),
)


@fuzz(
    "JSONL, JSON, text, parquet, gzip, wikitext",
    files(),
    forms,
    st.sampled_from([1, 30, records.CHUNK_BYTES]),
)
def test_records(merged_dir: Path, file: tuple[str, bytes], form: Source, chunk_bytes: int) -> None:
    check_records(merged_dir, *file, form, chunk_bytes)


@pytest.mark.parametrize("form", [Source("ja", "x"), Source("en", "x", format="wikitext")])
@pytest.mark.parametrize("ending", [".jsonl", ".txt", ".json"])
def test_odd_records(merged_dir: Path, ending: str, form: Source) -> None:
    content = b"\n".join(ODD_LINES)
    check_records(merged_dir, ending, content, form, records.CHUNK_BYTES)


@pytest.mark.parametrize("line", DEEP_RECORDS)
def test_deep_records(merged_dir: Path, tmp_path: Path, line: str) -> None:
    """How deep is too deep does not depend on who reads the record, and from where."""
    form = Source("ja", "x", where=("kind", "k") if '"kind": %s' in line else None)
    for depth in (50, 150, 960, 980, 5000):
        content = line.replace("%s", nested(depth)).encode()
        for name, whole in (("a.jsonl", content), ("a.json", b"[" + content + b"]")):
            check_records(merged_dir, Path(name).suffix, whole, form, records.CHUNK_BYTES)
            (tmp_path / name).write_bytes(whole)
            source = Source("ja", str(tmp_path / name))
            found = [
                pair for chunk in records.chunks(source) for pair in records.records(chunk, source)
            ]
            assert isinstance(found[0][1], Reject) == (depth > records.MAX_DEPTH)


def check_records(
    merged_dir: Path, ending: str, content: bytes, form: Source, chunk_bytes: int
) -> None:
    """No line is lost: it becomes a text or a conversation, or a record with what is wrong."""
    with folder() as work:
        path = work / f"a{ending}"
        path.write_bytes(content)
        source = Source(**{**vars(form), "path": str(path)})
        with refusals() as said:
            chunks = list(records.chunks(source, chunk_bytes))
            read = [pair for chunk in chunks for pair in records.records(chunk, source)]
            check_numbers(read)
            if ending in (".jsonl", ".txt") and source.where is None:
                rest = content.removeprefix(b"\xef\xbb\xbf") if chunk_bytes > 2 else content
                found = rest.removesuffix(b"\n").split(b"\n") if rest else []
                if ending == ".jsonl":
                    found = [line for line in found if not is_blank(line)]
                assert len(read) == len(found)
            prepare = pretrain_data.Preparer(merged_dir, "NFKC", 1, True, True, None)
            check_units(prepare, chunks, source, work, "t")
            prepare_sft = sft_data.Preparer(merged_dir, 64, True)
            check_units(prepare_sft, chunks, source, work, "c")
        assert not said, "step 4 counts what is wrong"
        with refusals():
            assert all(isinstance(text, str) for text in corpus.read_texts(source))
        with refusals():
            assert all(conversations.read_conversations(source))
        with refusals():
            multiple_choice.read([source])


def is_blank(line: bytes) -> bool:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return False
    return not text or text.isspace()


def check_numbers(read: Sequence[tuple[int, Any]]) -> None:
    numbers = [number for number, _ in read]
    assert numbers == sorted(set(numbers))
    for _, record in read:
        assert isinstance(record, dict) or (record.reason and isinstance(record.detail, str))


def check_units(
    prepare: Any, chunks: Sequence[records.Chunk], source: Source, work: Path, to: str
) -> None:
    """What is read is kept, dropped by a filter or rejected; all of it is counted."""
    for index, chunk in enumerate(chunks):
        meta = prepare(units.Task(source, chunk, work / f"{to}{index}"))
        assert all(number > 0 and reason for number, reason, _ in meta["rejects"])
        if source.format == "records":
            read = len(list(records.records(chunk, source)))
            assert meta["found"] + len(meta["rejects"]) == read


# --- Conversations ------------------------------------------------------------------------------


@fuzz(
    "conversations, in all their formats",
    record=st.fixed_dictionaries({"messages": dialogues()})
    | st.fixed_dictionaries({"messages": st.lists(message, max_size=5)})
    | columns_of_record
    | st.dictionaries(any_text | names, any_value, max_size=4),
    columns=st.none() | st.sampled_from(["messages", "instruction+input>output", "a"]) | any_text,
)
def test_conversations(
    record: dict[str, Any], columns: str | None, encoder: Any, both: Any
) -> None:
    """What is accepted can be encoded, and no text in it becomes a special token."""
    with refusals() as said:
        messages = conversations.read_messages(record, columns)
    assert not said, "a bad conversation is rejected, not an error"
    if isinstance(messages, Reject):
        assert messages.reason and messages.detail
        return
    special = {chat.special_id(encoder, token): token for token in tokenizer.SPECIAL_TOKENS}
    marks = special | {0: "<unk>", 1: "<s>", 2: "</s>"}
    placed = ["[gMASK]", "sop", *(f"<|{message['role']}|>" for message in messages)]
    for each in both:
        ids, labels = chat.build_example(each, messages)
        assert [marks[i] for i in ids if i in marks] == [*placed, "</s>"]
        assert all(label in (chat.IGNORE, i) for i, label in zip(ids, labels, strict=True))
        prompt = chat.build_prompt_ids(each, messages)
        assert [marks[i] for i in prompt if i in marks] == [*placed, "<|assistant|>"]
        assert prompt[:-1] == ids[:-1]


@pytest.fixture(scope="module")
def both(encoder: Any, merge: vocabulary.Merge) -> list[Any]:
    """The merged tokenizer in both of its forms."""
    return [encoder, export.transformers_tokenizer(merge.proto)]


# --- Manifests ----------------------------------------------------------------------------------

STEP = "step1_x"


def publish(path: Path) -> dict[str, Any]:
    """A small artifact "a", made from another beside it, "base"; returns its manifest."""
    for name, step, made_from in (("base", "step0_x", ()), ("a", STEP, ("step0_x",))):
        inputs = [open_artifact(path / "base", f"{other}.py") for other in made_from]
        output = Output(Config(output_dir=path / name, size=1), step, inputs)
        with output.write() as working:
            (working / "data.txt").write_text("content")
    manifest: dict[str, Any] = json.loads((path / "a" / MANIFEST).read_text(encoding="utf-8"))
    return manifest


with folder() as _made:
    VALID_MANIFEST = publish(_made)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published")
    publish(path)
    return path


RUN = {"seed": 1, "step4_prepare_data": "abc"}


@fuzz(
    "manifests of artifacts",
    json_texts(any_value | changed(VALID_MANIFEST)) | st.binary(max_size=50),
)
def test_manifests(published: Path, content: str | bytes) -> None:
    raw = content.encode() if isinstance(content, str) else content
    with folder() as made:
        work = made / "work"
        shutil.copytree(published, work)
        inputs = [open_artifact(work / "base", "step0_x.py")]
        for name in ("a", "base"):
            manifest = work / name / MANIFEST
            before = manifest.read_bytes()
            manifest.write_bytes(raw)
            with refusals():
                read_manifest(work / name)
            with refusals():
                history(work / "a")
            with refusals():
                opened = open_artifact(work / "a", f"{STEP}.py")
                Output(Config(output_dir=work / "b"), "step2_x", [opened]).describe()
            for overwrite in (False, True):
                config = Config(output_dir=work / name, size=1, overwrite=overwrite)
                with refusals():
                    Output(config, STEP, inputs).is_settled()
            manifest.write_bytes(before)


with folder() as _made:
    _checkpoints = Checkpoints(_made, RUN, keep=1)
    with _checkpoints.write(1) as _working:
        assert _working is not None
        (_working / "weights.safetensors").write_bytes(b"weights")
    VALID_CHECKPOINT = json.loads((_made / "step-000001" / MANIFEST).read_bytes())


@fuzz(
    "manifests of checkpoints",
    json_texts(any_value | changed(VALID_CHECKPOINT)) | st.binary(max_size=50),
    st.booleans(),
)
def test_checkpoint_manifests(content: str | bytes, overwrite: bool) -> None:
    raw = content.encode() if isinstance(content, str) else content
    with folder() as work:
        path = work / "step-000001"
        path.mkdir()
        (path / "weights.safetensors").write_bytes(b"weights")
        (path / MANIFEST).write_bytes(raw)
        with refusals():
            assert Checkpoints(work, RUN, keep=1).start(overwrite) in (None, path)


# --- YAML ---------------------------------------------------------------------------------------

ODD_YAML = (
    "!!bool x", '!!int ""', "!!timestamp x", '!!float ""', "1" + ":1" * 400 + ".0", "!!int 0x",
    "&a [*a]", '"\\ud800"', '"\\UFFFFFFFF"', "!!binary é", "2001-99-99", "{<<: 3}", "? [a]",
    "!!python/object:os.system x", "[" * 400, "- " * 400, "\0", "%YAML 9", "a: b: c", "\t",
)  # fmt: skip
# Lists of lists of the same list: short to write, and 10^9 entries to whoever writes it out.
LEVELS = [f"&{b} [{','.join(['*' + a] * 10)}]" for a, b in pairwise("abcdefghij")]
BOMB = f"[&a [x], {', '.join(LEVELS)}]"
BOMBS = [
    form.replace("?", BOMB)
    for form in ("?", "- ?", "- {language: ?, path: a.txt}", "- {language: ja, path: ?}",
                 "- {language: ja, path: a.txt, where: {a: ?}}", "{ja: ?}",
                 "- {language: ja, path: a.txt, weight: ?, format: ?, x: ?}")
]  # fmt: skip
source_fields = st.sampled_from(
    ["language", "path", "name", "columns", "subset", "where", "weight", "format", "id_column", "x"]
)
entries = st.dictionaries(source_fields, any_value, max_size=4) | st.builds(
    lambda more: {"language": "ja", "path": "a.jsonl", **more},
    st.dictionaries(source_fields, any_value, max_size=2),
)
yaml_texts = (
    st.text(max_size=60)
    | st.text("-:[]{}!&*<>|'\"%@#,? \nab1.", max_size=40)
    | st.sampled_from(ODD_YAML)
    | st.builds("- {{language: ja, path: a.jsonl, name: {}}}".format, st.sampled_from(ODD_YAML))
    | st.lists(entries, max_size=3).map(yaml.safe_dump)
    | st.dictionaries(st.sampled_from(["ja", "zh", "code", "x"]) | scalars, any_value).map(
        yaml.safe_dump
    )
    | st.dictionaries(st.sampled_from(["ja", "code"]), st.lists(any_text, max_size=3)).map(
        yaml.safe_dump
    )
).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=40)


@fuzz("YAML files of sources and questions", yaml_texts)
def test_yaml(content: bytes) -> None:
    check_yaml(content)


@pytest.mark.parametrize("text", [*ODD_YAML, *BOMBS])
def test_odd_yaml(text: str) -> None:
    check_yaml(text.encode())


def check_yaml(content: bytes) -> None:
    with folder() as work:
        path = work / "a.yaml"
        path.write_bytes(content)
        for failure in (ConfigError, DataError):
            with refusals():
                sources.load_yaml(path, failure)
        with refusals():
            prompts = answers.read_prompts(path, ["ja"])
            assert all(isinstance(text, str) for asked in prompts.values() for text in asked)
        with contextlib.chdir(work), refusals():
            for source in sources.read_argument(str(path)):
                check_source(source)


@fuzz(
    "sources on the command line",
    any_text.map(lambda text: text.replace("*", "").replace("/", ""))
    | st.text("ja=#@?.[]~", max_size=12),
)
def test_source_arguments(argument: str) -> None:
    for text in (argument, f"ja={argument}"):
        with folder() as work, contextlib.chdir(work), refusals():
            for source in sources.read_argument(text):
                check_source(source)


def check_source(source: Source) -> None:
    assert str(source) and source.title
    sources.contradictions([source])
    source.settings()
    if ".." not in source.path and not source.path.startswith("/"):
        source.files()


def test_messages_are_one_line() -> None:
    assert str(DataError("a\nb\x1b[1m\u2028c")) == "a b [1m c"
    assert len(str(DataError("x" * 10**6))) <= LONGEST_MESSAGE
