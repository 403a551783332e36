"""The weights of a model folder: read tensor by tensor, written as shards.

Weights are safetensors with or without an index, or pytorch_model-*.bin shards. The latter are
pickles: they are loaded with weights_only, which runs no code, and memory-mapped. Tensors stream
from input shards to output shards, so memory holds one output shard, whatever the model's size.
"""

import functools
import json
import logging
import math
import pickle
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open

from chatglm_ja.errors import DataError
from chatglm_ja.storage.files import (
    FileRecord,
    describe_absence,
    is_utf8,
    join_inside,
    read_json,
    write_hashed,
    write_json,
)
from chatglm_ja.storage.recognition import recognize, recognize_folder
from chatglm_ja.storage.weight_files import INDEX, INDEX_FILE, WEIGHT_FILES

log = logging.getLogger(__name__)

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Weights:
    """The weights of a model folder: validated as a whole on opening, read tensor by tensor.

    `shapes` are those that its config.json gives, by name; a tensor whose name is in `ignored` may
    be there, and is not read. Tensors of mixed dtypes are cast to `dtype`, the one that most of the
    weights have. Raises DataError if a shard is missing or
    truncated, if a tensor is missing or unexpected, or if it has another shape.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        ignored: Collection[str] = (),
    ) -> None:
        self._folder = folder
        self._shard_of = read_weight_map(folder)
        self._shapes = shapes
        missing = sorted(self._shapes.keys() - self._shard_of.keys())
        extra = sorted(self._shard_of.keys() - self._shapes.keys() - {*ignored})
        if missing or extra:
            if found := recognize(extra):
                raise DataError(f"{folder} has a tensor {found[0]}: {found[1]}")
            problem = f"has no tensor {missing[0]}" if missing else f"has a tensor {extra[0]}"
            raise DataError(f"{folder} {problem}: its config.json describes another model")
        weights: Counter[str] = Counter()  # by dtype
        for path, shard, names in _open_shards(folder, self._shard_of):
            for name in (name for name in names if name in self._shapes):
                dtype, shape = shard.describe(name)
                weights[dtype] += math.prod(shape)
                problem = ""
                if shape != self._shapes[name]:
                    problem = f"has shape {shape}, but config.json gives {self._shapes[name]}"
                elif dtype not in DTYPES:
                    problem = f"is of dtype {dtype}, expected one of {', '.join(DTYPES)}"
                if problem:
                    found = recognize([f"{name} {dtype} {shape}"])
                    hint = f": {found[1]}" if found else ""
                    raise DataError(f"{path}: {name} {problem}{hint}")
        (commonest, _), *others = weights.most_common()
        self.dtype = DTYPES[commonest]
        if others:
            shown = ", ".join(f"{count:,} weights in {dtype}" for dtype, count in others)
            log.warning("%s holds %s: they are cast to %s, as the others are",
                        folder, shown, commonest)  # fmt: skip
        # One shard is open at a time.
        self._open = functools.lru_cache(maxsize=1)(lambda name: _open_shard(folder / name))

    def size(self) -> int:
        """Return the size of all weights in bytes."""
        return sum(map(math.prod, self._shapes.values())) * self.dtype.itemsize

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor by its name, in `dtype`.

        Raises DataError if it was stored in another one, and has values that are too large.
        """
        stored = self._open(self._shard_of[name]).read(name)
        tensor = stored.to(self.dtype)
        if tensor is not stored and not torch.equal(tensor.isfinite(), stored.isfinite()):
            raise DataError(
                f"{self._folder}: {name} is {stored.dtype}, with values that {self.dtype} cannot "
                "hold: convert the checkpoint to one dtype"
            )
        return tensor

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over all tensors with their names, shard by shard."""
        for name in sorted(self._shapes, key=self.place):
            yield name, self.tensor(name)

    def place(self, name: str) -> tuple[str, str]:
        """Return a key that sorts names by their shards, each of which is then opened once."""
        return self._shard_of[name], name


@dataclass(frozen=True)
class _Shard:
    """An open weight file; `describe` gives a tensor's dtype and shape without reading it."""

    names: list[str]
    describe: Callable[[str], tuple[str, tuple[int, ...]]]
    read: Callable[[str], torch.Tensor]


def _open_safetensors(path: Path) -> _Shard:
    try:
        file: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        if not is_utf8(path):
            raise DataError(
                f"{path} is not valid UTF-8, so safetensors cannot open it: rename the folder, or "
                "give a relative path"
            ) from None
        raise DataError(f"{path} is truncated or damaged ({error}): download it again") from None

    def describe(name: str) -> tuple[str, tuple[int, ...]]:
        view = file.get_slice(name)
        return view.get_dtype(), tuple(view.get_shape())

    return _Shard(list(file.keys()), describe, file.get_tensor)


def _open_bin(path: Path) -> _Shard:
    """Open a pytorch_model.bin: a pickle that may hold nothing but tensors."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise DataError(
            f"{path} holds more than tensors, and code in it is never run: download the "
            "safetensors form of the checkpoint"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(
            f"{path} is truncated, damaged or too old to be mapped ({reason}): download it again"
        ) from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        found = (
            f", but of {', '.join(map(repr, [*tensors][:4]))}" if isinstance(tensors, dict) else ""
        )
        raise DataError(
            f"{path} is not a dictionary of tensors{found}: expected weights as "
            "model.save_pretrained(...) saves them"
        )

    def describe(name: str) -> tuple[str, tuple[int, ...]]:
        dtype = tensors[name].dtype
        return DTYPE_NAMES.get(dtype, str(dtype)), tuple(tensors[name].shape)

    return _Shard(list(tensors), describe, tensors.__getitem__)


def _open_shard(path: Path, names: Iterable[str] = ()) -> _Shard:
    """Open a file of either format. Raises DataError if it lacks one of the tensors."""
    if not path.is_file():
        absent = describe_absence(path)
        raise DataError(f"{path} {absent}, but the index names it: download it again")
    shard = _open_safetensors(path) if path.suffix == ".safetensors" else _open_bin(path)
    stored = set(shard.names)
    for name in names:
        if name not in stored:
            raise DataError(f"{path} lacks {name}, which the index places there")
    return shard


def _open_shards(
    folder: Path, weight_map: Mapping[str, str]
) -> Iterator[tuple[Path, _Shard, list[str]]]:
    """Open one shard after another; yield its path and the names of its tensors too."""
    shards: dict[str, list[str]] = {}
    for name, shard_name in weight_map.items():
        shards.setdefault(shard_name, []).append(name)
    for shard_name, names in sorted(shards.items()):
        yield folder / shard_name, _open_shard(folder / shard_name, names), names


class _Index(BaseModel):
    """The index of sharded weights."""

    weight_map: dict[str, str]


def read_weight_map(folder: Path) -> dict[str, str]:
    """Return the file that holds each tensor, by the tensor's name."""
    for name in WEIGHT_FILES:
        path = folder / (name + INDEX)
        if path.is_file():
            try:
                weight_map = _Index.model_validate(read_json(path)).weight_map
            except ValueError:
                raise DataError(f"{path} is not an index of weights: download it again") from None
            for shard_name in set(weight_map.values()):
                join_inside(folder, shard_name)
            return weight_map
        if (folder / name).is_file():
            return dict.fromkeys(_open_shard(folder / name).names, name)
    expected = ", ".join(file for name in WEIGHT_FILES for file in (name + INDEX, name))
    found = recognize_folder(folder)
    means = f", but {found}" if found else ": expected the weights of the model"
    raise DataError(f"{folder} holds none of {expected}{means}")


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """Read one tensor of a model folder. Raises DataError if the folder has no such tensor."""
    weight_map = read_weight_map(folder)
    if name not in weight_map:
        raise DataError(f"{folder} has no tensor {name}: expected a model of an earlier step")
    return _open_shard(folder / weight_map[name], [name]).read(name)


def iterate_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over all tensors of a model folder with their names, shard by shard."""
    for _, shard, names in _open_shards(folder, read_weight_map(folder)):
        for name in names:
            yield name, shard.read(name)


def describe_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype (as in DTYPES) and shape of every tensor of a model folder, by name."""
    shards = _open_shards(folder, read_weight_map(folder))
    return {name: shard.describe(name) for _, shard, names in shards for name in names}


def write_sharded(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, max_shard_bytes: int
) -> dict[str, FileRecord]:
    """Write named tensors as safetensors shards with an index, in the order they come.

    Returns the records of the shards by file name. A shard is closed before the tensor that would
    take it over `max_shard_bytes`.
    """
    shards: list[tuple[FileRecord, list[str]]] = []
    pending: dict[str, torch.Tensor] = {}
    total = size = 0

    def close_shard() -> None:
        nonlocal pending, size
        path = folder / f"shard-{len(shards)}"
        shards.append((write_hashed(path, _serialize(pending)), list(pending)))
        pending, size = {}, 0

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > max_shard_bytes:
            close_shard()
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    close_shard()
    records: dict[str, FileRecord] = {}
    weight_map: dict[str, str] = {}
    for index, (record, names) in enumerate(shards):  # how many there are is part of their names
        file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index}").rename(folder / file_name)
        records[file_name] = record
        weight_map |= dict.fromkeys(names, file_name)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX_FILE, content, indent=2)
    return records


def _serialize(tensors: Mapping[str, torch.Tensor]) -> list[bytes | memoryview]:
    """Return the parts of a safetensors file: its header, and the tensors where they lie in memory.

    The bytes are those of safetensors' own `save_file`, which cannot hash what it writes.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes | memoryview] = []
    start = 0
    for name, tensor in ordered:
        end = start + tensor.nbytes
        dtype, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        parts.append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # which aligns the tensors
    return [len(text).to_bytes(8, "little") + text, *parts]
