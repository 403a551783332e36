"""Random models, tokenizers and manifests: each is read, or refused with a one-line error."""

import json
import math
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from chatglm_ja.bases import loading
from chatglm_ja.bases.chatglm3 import ChatGLM3Base
from chatglm_ja.bases.sentencepiece_vocabulary import LEARNED_FILE, ChatGLM3Vocabulary
from chatglm_ja.chatglm3 import (
    base_config,
    chat_format,
    tokenizer,
    tokenizer_files,
)
from chatglm_ja.chatglm3.corpus_tokenizer import CorpusTokenizer
from chatglm_ja.chatglm3.weights import BaseWeights
from chatglm_ja.storage import weights
from chatglm_ja.storage.files import MANIFEST
from chatglm_ja.storage.inputs import open_artifact
from chatglm_ja.storage.manifest import read_history, read_manifest
from chatglm_ja.storage.output import Output
from chatglm_ja.storage.weight_files import INDEX_FILE
from chatglm_ja.training.checkpoints import Checkpoints
from chatglm_ja.vocabulary import merging
from chatglm_ja.vocabulary.policies import Policy
from tests.faults.fuzzing import (
    BASE,
    SHARD,
    SPELLINGS,
    any_value,
    changed,
    damaged,
    folder,
    fuzz,
    json_texts,
    refusals,
    scalars,
)
from tests.storage.test_output import Config

# --- Checkpoints --------------------------------------------------------------------------------


def read_checkpoint(changes: dict[str, bytes]) -> None:
    """Read a copy of the base with some files replaced, the way step 3 reads it."""
    with folder() as copy:
        for path in BASE.iterdir():
            if path.name not in changes:
                (copy / path.name).symlink_to(path)
        for name, content in changes.items():
            (copy / name).write_bytes(content)
        with refusals():
            opened = BaseWeights(copy)
            opened.size()
            assert sum(tensor.numel() for _, tensor in opened.glm_tensors()) > 0
        with refusals():
            weights.describe_tensors(copy)
            assert all(name for name, _ in weights.iterate_tensors(copy))
        with refusals():
            weights.read_tensor(copy, "transformer.output_layer.weight")


HEADER_BYTES = struct.unpack("<Q", (BASE / SHARD).read_bytes()[:8])[0]
HEADER = json.loads((BASE / SHARD).read_bytes()[8 : 8 + HEADER_BYTES])
DATA = (BASE / SHARD).read_bytes()[8 + HEADER_BYTES :]
BIN_NAME = "pytorch_model.bin"


@st.composite
def shards(draw: st.DrawFn) -> bytes:
    """Draw a safetensors file whose header may not match its tensors."""
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
            BaseWeights(copy)
        with refusals():
            weights.read_tensor(copy, "transformer.output_layer.weight")


INDEX = json.loads((BASE / INDEX_FILE).read_bytes())


@fuzz(
    "weight indices",
    st.binary(max_size=100)
    | json_texts(any_value | changed(INDEX)).map(str.encode)
    | st.builds(
        lambda name, file: json.dumps({"weight_map": {**INDEX["weight_map"], name: file}}).encode(),
        st.sampled_from(sorted(INDEX["weight_map"])),
        any_value | st.sampled_from(["config.json", "tokenizer.model", SHARD, "./" + SHARD]),
    ),
)
def test_indices(content: bytes) -> None:
    read_checkpoint({INDEX_FILE: content})


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
            loading.load_model(copy, "auto") if b'"glm"' not in content else None


# --- Tokenizers ---------------------------------------------------------------------------------

MODEL = (BASE / tokenizer.MODEL_FILE).read_bytes()
PIECE = tokenizer.messages.ModelProto.SentencePiece
LEARNED = ("し", "ま", "す", "しま", "します", "込む", "<|user|>")


def without_bytes(proto: Any) -> None:
    proto.trainer_spec.byte_fallback = False
    del proto.pieces[3:]


NORMAL, UNKNOWN, CONTROL = PIECE.NORMAL, PIECE.UNKNOWN, PIECE.CONTROL
# Changes to a model that has only the pieces of every base.
ODD_MODELS: dict[str, Callable[[Any], object]] = {
    "only the basic pieces": lambda proto: None,
    "only single characters": lambda proto: proto.pieces.add(piece="a", score=-1),
    "a NaN score": lambda proto: proto.pieces.add(piece="a", score=math.nan),
    "an infinite score": lambda proto: proto.pieces.add(piece="a", score=-math.inf),
    "a repeated piece": lambda proto: proto.pieces.add(piece="<s>", score=-1),
    "invalid UTF-8": lambda proto: proto.MergeFromString(b"\n\x04\n\x02\xff\xfe"),
    "invalid UTF-8 twice": lambda proto: proto.MergeFromString(b"\n\x04\n\x02\xff\xfe" * 2),
    "an empty piece": lambda proto: proto.pieces.add(piece="", score=-1),
    "a space in a piece": lambda proto: proto.pieces.add(piece="a b", score=-1),
    "NUL in a piece": lambda proto: proto.pieces.add(piece="\0\0", score=-1),
    "no unknown piece": lambda proto: proto.pieces.pop(0),
    "no start token": lambda proto: proto.pieces.pop(1),
    "no end token": lambda proto: proto.pieces.pop(2),
    "a letter as a control piece": lambda proto: proto.pieces.add(piece="a", type=CONTROL),
    "another order": lambda proto: proto.pieces.reverse(),
    "an end token of type normal": lambda proto: setattr(proto.pieces[2], "type", NORMAL),
    "more control pieces": lambda proto: proto.pieces.add(piece="<pad>", type=CONTROL),
    "a merged model": lambda proto: proto.pieces.add(piece="sop", type=CONTROL),
    "a user-defined piece": lambda proto: proto.pieces.add(piece="ab", type=PIECE.USER_DEFINED),
    "an unused piece": lambda proto: proto.pieces.add(piece="します", type=PIECE.UNUSED),
    "a missing byte piece": lambda proto: proto.pieces.pop(),
    "whitespace as suffix": lambda p: setattr(p.trainer_spec, "treat_whitespace_as_suffix", True),
    "no byte pieces": without_bytes,
    "a corrupt normalizer map": lambda p: setattr(
        p.normalizer_spec, "precompiled_charsmap", b"\4\0\0\0abcd"
    ),
    "a corrupt denormalizer map": lambda p: setattr(
        p.denormalizer_spec, "precompiled_charsmap", b"\4\0\0\0a"
    ),
}


def small_model() -> Any:
    proto = tokenizer.parse_proto(MODEL, Path("tiny"))
    del proto.pieces[3 + 256 :]
    return proto


@st.composite
def models(draw: st.DrawFn) -> bytes:
    """Draw a well-formed but unusual ModelProto."""
    proto = small_model() if draw(st.booleans()) else tokenizer.parse_proto(MODEL, Path("tiny"))
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
    # A field with a wrong length; a string of invalid UTF-8.
    return content + draw(st.sampled_from([b""] * 8 + [b"\n\x7f", b"\n\x04\n\x02\xff\xfe"]))


@fuzz(
    "sentencepiece models: bytes, and unusual well-formed ones",
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
    """Read the model as base and as step 1's output, merge it as step 2, tokenize as step 4."""
    with folder() as copy:
        (copy / "config.json").symlink_to(BASE / "config.json")
        (copy / tokenizer.MODEL_FILE).write_bytes(content)
        (copy / LEARNED_FILE).write_bytes(content)
        with refusals():
            check_merge(copy, ChatGLM3Base.open(copy).vocabulary, LEARNED)
        with refusals():
            base = ChatGLM3Base.open(BASE).vocabulary
            check_merge(copy, base, base.read_learned(copy))


def check_merge(target: Path, base: ChatGLM3Vocabulary, learned: Sequence[str]) -> None:
    extended = merging.merge_pieces(base, learned, Policy.JAPANESE).vocabulary
    assert isinstance(extended, ChatGLM3Vocabulary)
    merged = extended.proto
    assert [p.piece for p in merged.pieces[:3]] == ["<unk>", "<s>", "</s>"]
    assert all(math.isfinite(piece.score) for piece in merged.pieces)
    texts = ["", "します 的 a\n", "<|user|>"]
    tokenizer_files.save_tokenizer(merged, target)
    loaded = tokenizer.load_processor(target)
    encoded = [loaded.encode(text) for text in texts]
    assert [ids.tolist() for ids in CorpusTokenizer(merged).encode(texts)] == encoded
    assert tokenizer_files.make_line_encoder(merged)(texts) == encoded
    chat_format.build_example(loaded, [{"role": "user", "content": text} for text in texts])


# --- Manifests ----------------------------------------------------------------------------------

STEP = "step1_x"


def publish(path: Path) -> dict[str, Any]:
    """Publish a small artifact "a" made from another one, "base"; return its manifest."""
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
                read_history(work / "a")
            with refusals():
                opened = open_artifact(work / "a", f"{STEP}.py")
                Output(Config(output_dir=work / "b"), "step2_x", [opened]).describe()
            for overwrite in (False, True):
                config = Config(output_dir=work / name, size=1, overwrite=overwrite)
                with refusals():
                    Output(config, STEP, inputs).prepare()
            manifest.write_bytes(before)


with folder() as _made:
    _checkpoints = Checkpoints(_made, RUN, keep=1)
    _checkpoints.write(1, {"weights.safetensors": {"x": torch.zeros(1)}})
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
            assert Checkpoints(work, RUN, keep=1).find_newest(overwrite) in (None, path)
