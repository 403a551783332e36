"""ChatGLM3 checkpoints as published, read tensor by tensor, and sharded safetensors, written.

Weights are safetensors with or without an index, or pytorch_model-*.bin shards. The latter are
pickles: they are loaded with weights_only, which runs no code, and mapped, not read. Tensors
stream from the input shards to the output shards, so that memory holds one output shard, whatever
the model's size.
"""

import json
import math
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from chatglm_ja.chatglm3 import tensor_names
from chatglm_ja.chatglm3.base_config import read_config
from chatglm_ja.errors import DataError
from chatglm_ja.storage.files import read_json, resolve_inside

INDEX_FILE = "model.safetensors.index.json"
# Index and single file, in the order of preference.
WEIGHT_FILES = (
    (INDEX_FILE, "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class BaseWeights:
    """A ChatGLM3 checkpoint folder: checked as a whole on opening, read one tensor at a time.

    Raises DataError when a shard or a tensor is missing, left over, truncated, or has a shape
    other than config.json's sizes give.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self._shard_of = _weight_map(folder)
        self._names = _by_shard(self._shard_of)
        self._open: tuple[str, _SafetensorsShard | _BinShard] | None = None
        shapes = tensor_names.expected_shapes(self.config)
        missing = sorted(shapes.keys() - self._shard_of.keys())
        extra = sorted(self._shard_of.keys() - shapes.keys() - set(tensor_names.IGNORED))
        if missing or extra:
            problem = f"has no tensor {missing[0]}" if missing else f"has a tensor {extra[0]}"
            raise DataError(f"{folder} {problem}: its config.json describes another model")
        self.dtype = self._check_tensors(shapes)

    def size(self) -> int:
        """Bytes of all weights."""
        shapes = tensor_names.expected_shapes(self.config).values()
        return sum(math.prod(shape) for shape in shapes) * self.dtype.itemsize

    def tensor(self, name: str) -> torch.Tensor:
        return self._shard(self._shard_of[name]).read(name)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights, in the order of the shards, so that each is read once from front to back."""
        for name in sorted(self._shard_of, key=lambda name: (self._shard_of[name], name)):
            if name not in tensor_names.IGNORED:
                yield name, self.tensor(name)

    def glm_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights under GlmForCausalLM's names and in its shapes."""
        for name, tensor in self.tensors():
            yield from tensor_names.to_glm(name, tensor, self.config)

    def _shard(self, name: str) -> "_SafetensorsShard | _BinShard":
        """One shard is open at a time."""
        if self._open is None or self._open[0] != name:
            self._open = (name, _open_shard(self.folder / name, self._names[name]))
        return self._open[1]

    def _check_tensors(self, shapes: dict[str, tuple[int, ...]]) -> torch.dtype:
        dtypes: dict[str, str] = {}  # each dtype, with the first tensor that has it
        for shard_name, names in self._names.items():
            shard = self._shard(shard_name)
            for name in names:
                if name in tensor_names.IGNORED:
                    continue
                dtype, shape = shard.describe(name)
                dtypes.setdefault(dtype, name)
                if shape != shapes[name]:
                    raise DataError(
                        f"{self.folder / shard_name}: {name} has shape {shape}, but config.json "
                        f"gives {shapes[name]}"
                    )
        if len(dtypes) != 1 or not dtypes.keys() <= DTYPES.keys():
            found = ", ".join(f"{dtype} ({name})" for dtype, name in dtypes.items())
            raise DataError(f"{self.folder} holds {found}: expected one of {', '.join(DTYPES)}")
        return DTYPES[next(iter(dtypes))]


class _SafetensorsShard:
    """A file of tensors: their names, dtypes and shapes, and each of them when asked for."""

    def __init__(self, path: Path) -> None:
        try:
            self._file: Any = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise DataError(
                f"{path} is truncated or damaged ({error}): download it again"
            ) from None

    def names(self) -> list[str]:
        return list(self._file.keys())

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        view = self._file.get_slice(name)
        return view.get_dtype(), tuple(view.get_shape())

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor


class _BinShard:
    """The same of a pytorch_model.bin: a pickle, of which nothing but tensors is accepted."""

    def __init__(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise DataError(
                f"{path} holds more than tensors, and code in it is never run: get the "
                "safetensors form of the checkpoint"
            ) from None
        except (RuntimeError, EOFError, ValueError, OSError) as error:
            reason = str(error).split("\n")[0]
            raise DataError(
                f"{path} is truncated, damaged or too old to be mapped ({reason}): download it "
                "again"
            ) from None
        if not isinstance(content, dict) or not all(
            isinstance(tensor, torch.Tensor) for tensor in content.values()
        ):
            raise DataError(f"{path} is no dictionary of tensors: expected ChatGLM3's weights")
        self._tensors: dict[str, torch.Tensor] = content

    def names(self) -> list[str]:
        return list(self._tensors)

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        tensor = self._tensors[name]
        known = {dtype: short for short, dtype in DTYPES.items()}
        return known.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def _open_shard(path: Path, names: Iterable[str] = ()) -> _SafetensorsShard | _BinShard:
    """A file that must hold the tensors of these names."""
    if not path.is_file():
        raise DataError(f"{path} not found, but the index names it: download it again")
    shard = _SafetensorsShard(path) if path.suffix == ".safetensors" else _BinShard(path)
    stored = set(shard.names())
    for name in names:
        if name not in stored:
            raise DataError(f"{path} lacks {name}, which the index places there")
    return shard


def write_sharded(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, max_shard_bytes: int
) -> None:
    """Write named tensors as safetensors shards with an index, in the order they come.

    A shard is closed before the tensor that would take it over `max_shard_bytes`.
    """
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal pending, size
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending, size = {}, 0

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > max_shard_bytes:
            flush()
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index}").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """One tensor of a model folder."""
    weight_map = _weight_map(folder)
    if name not in weight_map:
        raise DataError(f"{folder} has no tensor {name}: expected a model of the steps before")
    return _open_shard(folder / weight_map[name], [name]).read(name)


def iterate_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a model folder, in the order of its shards."""
    for shard_name, names in _by_shard(_weight_map(folder)).items():
        shard = _open_shard(folder / shard_name, names)
        for name in names:
            yield name, shard.read(name)


def describe_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a model folder."""
    described = {}
    for shard_name, names in _by_shard(_weight_map(folder)).items():
        shard = _open_shard(folder / shard_name, names)
        described.update({name: shard.describe(name) for name in names})
    return described


def _weight_map(folder: Path) -> dict[str, str]:
    """The name of every tensor, and of the file that holds it."""
    for index_name, single_name in WEIGHT_FILES:
        index, single = folder / index_name, folder / single_name
        if index.is_file():
            return _read_index(index)
        if single.is_file():
            return dict.fromkeys(_open_shard(single).names(), single_name)
    looked_for = ", ".join(name for pair in WEIGHT_FILES for name in pair)
    raise DataError(f"{folder} holds none of {looked_for}: expected ChatGLM3's weights")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json(path)["weight_map"]
    except (ValueError, KeyError, TypeError):
        weight_map = None
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard_name, str) for shard_name in weight_map.values()
    ):
        raise DataError(f"{path} is not an index of weights: download it again")
    for shard_name in set(weight_map.values()):
        resolve_inside(path.parent, shard_name)
    return weight_map


def _by_shard(weight_map: Mapping[str, str]) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for name, shard_name in weight_map.items():
        shards.setdefault(shard_name, []).append(name)
    return dict(sorted(shards.items()))
