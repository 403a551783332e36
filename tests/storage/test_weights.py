"""Shards: the bytes of safetensors' own files, hashed while they are written."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chatglm_ja.errors import DataError
from chatglm_ja.settings import StepConfig
from chatglm_ja.storage import weights
from chatglm_ja.storage.files import write_hashed
from chatglm_ja.storage.manifest import read_manifest
from chatglm_ja.storage.output import Output

MEGABYTE = 2**20


def bytes_read() -> int:
    """The bytes that this process has read by system calls, from the page cache too."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError


def test_shards_are_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5).half(),
        "transposed": torch.randn(4, 6).half().T,
        "名": torch.randn(7),
        "a.scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "a": torch.randn(2, 2).bfloat16(),
    }
    half = ["b", "transposed", "empty"]  # in two shards; no file mixes the two halves
    tensors["empty"] = tensors["empty"].half()
    order = half + [name for name in tensors if name not in half]
    size = sum(tensors[name].nbytes for name in half)
    records = weights.write_sharded(((n, tensors[n]) for n in order), tmp_path, size)
    assert list(records) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for (name, record), names in zip(records.items(), (half, order[3:]), strict=True):
        own = {n: tensors[n].contiguous() for n in names}
        save_file(own, tmp_path / "expected", metadata={"format": "pt"})
        content = (tmp_path / name).read_bytes()
        assert content == (tmp_path / "expected").read_bytes()
        assert record.bytes == len(content)
        assert record.sha256 == hashlib.sha256(content).hexdigest()


def test_a_published_shard_is_not_read_again(tmp_path: Path) -> None:
    output = Output(StepConfig(output_dir=tmp_path / "model"), "step3_x", [])
    output.prepare()
    before = bytes_read()
    with output.write() as folder:
        tensors = ((f"{i}", torch.full((4, MEGABYTE // 4), float(i))) for i in range(4))
        output.records = weights.write_sharded(tensors, folder, 8 * MEGABYTE)
    assert bytes_read() - before < MEGABYTE
    manifest = read_manifest(tmp_path / "model")
    assert manifest
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) == 2
    for path in shards:
        expected = hashlib.sha256(path.read_bytes()).hexdigest()
        assert manifest.files[path.name].sha256 == expected
    assert len(manifest.files) == 3  # with the index


def test_a_full_disk_is_one_error_that_names_the_file() -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_hashed(Path("/dev/full"), [b"header", memoryview(bytes(4 * MEGABYTE))])


def test_a_bad_tensor_after_the_first_shard_leaves_nothing(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((f"{i}", torch.zeros(8)) for i in range(3))
        raise DataError("weights are too large")

    output = Output(StepConfig(output_dir=tmp_path / "model"), "step3_x", [])
    output.prepare()
    with pytest.raises(DataError, match="weights are too large"), output.write() as folder:
        weights.write_sharded(tensors(), folder, 32)
    assert not list(tmp_path.iterdir())
