"""Reading ChatGLM3 checkpoints tensor by tensor, and writing sharded safetensors.

Weights are safetensors with or without an index, or pytorch_model-*.bin shards. The latter are
pickles: they are loaded with weights_only, which runs no code, and memory-mapped. Tensors stream
from input shards to output shards, so memory holds one output shard, whatever the model's size.
"""

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
from chatglm_ja.chatglm3.model_files import INDEX, INDEX_FILE, WEIGHT_FILES
from chatglm_ja.errors import DataError
from chatglm_ja.storage.files import read_json, resolve_inside, write_json

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class BaseWeights:
    """The weights of a ChatGLM3 folder: validated as a whole on opening, read tensor by tensor.

    `config` is the folder's config.json, which is read if it is not given. Raises DataError if a
    shard is missing or truncated, if a tensor is missing or unexpected, or if its shape is not the
    one that config.json gives.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.config = read_config(folder) if config is None else config
        self._shard_of = _weight_map(folder)
        self._names = _group_by_shard(self._shard_of)
        self._open: tuple[str, _SafetensorsShard | _BinShard] | None = None
        self._shapes = tensor_names.expected_shapes(self.config)
        missing = sorted(self._shapes.keys() - self._shard_of.keys())
        extra = sorted(self._shard_of.keys() - self._shapes.keys() - set(tensor_names.IGNORED))
        if missing or extra:
            problem = f"has no tensor {missing[0]}" if missing else f"has a tensor {extra[0]}"
            raise DataError(f"{folder} {problem}: its config.json describes another model")
        self.dtype = self._check_tensors()

    def size(self) -> int:
        """Return the size of all weights in bytes."""
        return sum(map(math.prod, self._shapes.values())) * self.dtype.itemsize

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor by ChatGLM3's name."""
        return self._shard(self._shard_of[name]).read(name)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over all tensors by ChatGLM3's names, shard by shard."""
        for name in sorted(self._shapes, key=lambda name: (self._shard_of[name], name)):
            yield name, self.tensor(name)

    def glm_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over all tensors with the names and shapes of GlmForCausalLM."""
        for name, tensor in self.tensors():
            yield from tensor_names.to_glm(name, tensor, self.config)

    def _shard(self, name: str) -> "_SafetensorsShard | _BinShard":
        """Open a shard; one is open at a time."""
        if self._open is None or self._open[0] != name:
            self._open = (name, _open_shard(self.folder / name, self._names[name]))
        return self._open[1]

    def _check_tensors(self) -> torch.dtype:
        """Check all shapes and return the one dtype. Raises DataError if they do not fit."""
        dtypes: dict[str, str] = {}  # dtype -> the first tensor that has it
        for shard_name, names in self._names.items():
            shard = self._shard(shard_name)
            for name in (name for name in names if name not in tensor_names.IGNORED):
                dtype, shape = shard.describe(name)
                dtypes.setdefault(dtype, name)
                if shape != self._shapes[name]:
                    raise DataError(
                        f"{self.folder / shard_name}: {name} has shape {shape}, but config.json "
                        f"gives {self._shapes[name]}"
                    )
        if len(dtypes) != 1 or not dtypes.keys() <= DTYPES.keys():
            shown = ", ".join(f"{dtype} ({name})" for dtype, name in dtypes.items())
            raise DataError(f"{self.folder} holds {shown}: expected one of {', '.join(DTYPES)}")
        return DTYPES[next(iter(dtypes))]


class _SafetensorsShard:
    """A safetensors file: names, dtypes and shapes of its tensors, each read on demand."""

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
    """A pytorch_model.bin with the same interface: a pickle that may hold nothing but tensors."""

    def __init__(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise DataError(
                f"{path} holds more than tensors, and code in it is never run: download the "
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
            raise DataError(f"{path} is not a dictionary of tensors: expected ChatGLM3's weights")
        self._tensors: dict[str, torch.Tensor] = content

    def names(self) -> list[str]:
        return list(self._tensors)

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        tensor = self._tensors[name]
        names = {dtype: name for name, dtype in DTYPES.items()}
        return names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def _open_shard(path: Path, names: Iterable[str] = ()) -> _SafetensorsShard | _BinShard:
    """Open a file of either format. Raises DataError if it lacks one of the tensors."""
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
    for index, names in enumerate(shards):  # the number of shards is part of their names
        file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index}").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX_FILE, content, indent=2)


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """Read one tensor of a model folder. Raises DataError if the folder has no such tensor."""
    weight_map = _weight_map(folder)
    if name not in weight_map:
        raise DataError(f"{folder} has no tensor {name}: expected a model of an earlier step")
    return _open_shard(folder / weight_map[name], [name]).read(name)


def iterate_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over all tensors of a model folder with their names, shard by shard."""
    for shard, names in _shards(folder):
        for name in names:
            yield name, shard.read(name)


def describe_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype (as in DTYPES) and shape of every tensor of a model folder, by name."""
    return {name: shard.describe(name) for shard, names in _shards(folder) for name in names}


def _shards(folder: Path) -> Iterator[tuple[_SafetensorsShard | _BinShard, list[str]]]:
    for shard_name, names in _group_by_shard(_weight_map(folder)).items():
        yield _open_shard(folder / shard_name, names), names


def _group_by_shard(weight_map: Mapping[str, str]) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for name, shard_name in weight_map.items():
        shards.setdefault(shard_name, []).append(name)
    return dict(sorted(shards.items()))


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the file that holds each tensor, by the tensor's name."""
    for name in WEIGHT_FILES:
        index, single = folder / (name + INDEX), folder / name
        if index.is_file():
            return _read_index(index)
        if single.is_file():
            return dict.fromkeys(_open_shard(single).names(), name)
    expected = ", ".join(file for name in WEIGHT_FILES for file in (name + INDEX, name))
    raise DataError(f"{folder} holds none of {expected}: expected ChatGLM3's weights")


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
