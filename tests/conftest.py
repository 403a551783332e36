"""Small real things to test on: ChatGLM3's own layout in miniature, and the demo's texts."""

import fcntl
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.bases.sentencepiece_vocabulary import ChatGLM3Vocabulary, save_model
from chatglm_ja.chatglm3 import tokenizer
from chatglm_ja.data import corpus, prepare_conversations, prepare_texts
from chatglm_ja.data.settings import PrepareDataConfig, parse_shares
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.inference.models import LoadedModel
from chatglm_ja.messages import Message
from chatglm_ja.sources import Source
from chatglm_ja.storage.files import MANIFEST, read_json, write_json
from chatglm_ja.storage.manifest import Manifest
from chatglm_ja.vocabulary import learning, merging
from chatglm_ja.vocabulary.policies import Policy
from chatglm_ja.vocabulary.settings import TrainTokenizerConfig
from tests.pipeline import PROJECT, SMALL, Runner

# In the background of a script, or under nohup, SIGINT is ignored: child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

FIXTURES = PROJECT / "tests" / "fixtures"
DATA = PROJECT / "demo" / "data"
SHARED = PROJECT.parent / "shared"

TRAIN_CONFIG = TrainTokenizerConfig(output_dir=Path(), sources=(), vocab_size=2500, num_threads=2)

needs_real_tokenizer = pytest.mark.skipif(
    not (SHARED / "chatglm3-6b" / "tokenizer.model").is_file(),
    reason="needs ChatGLM3-6B's tokenizer.model in ../shared/chatglm3-6b",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run tests/faults/ in one pytest-xdist worker, first; any worker runs the rest."""
    from xdist.scheduler import LoadScopeScheduling

    class FaultsTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "faults" if nodeid.startswith("tests/faults/") else nodeid

    return FaultsTogether(config, log)


def demo_texts(language: str, count: int, split: str = "train") -> list[str]:
    source = Source(language, str(DATA / f"{split}_{language}.jsonl.gz"))
    return list(itertools.islice(SourceReader().texts(source), count))


@pytest.fixture(scope="session")
def base_dir() -> Path:
    """A complete checkpoint in ChatGLM3's own layout with random weights, 4,000 pieces."""
    return FIXTURES / "tiny_chatglm3"


@pytest.fixture(scope="session")
def base_proto(base_dir: Path) -> Any:
    return tokenizer.read_proto(base_dir / tokenizer.MODEL_FILE)


@pytest.fixture(scope="session")
def ja_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Japanese BPE model of 2,500 pieces, trained on pages of the demo."""
    folder = tmp_path_factory.mktemp("ja")
    lines = corpus.training_lines(demo_texts("ja", 300), {})
    save_model(learning.train_sentencepiece(lines, TRAIN_CONFIG), folder)
    return folder


@pytest.fixture(scope="session")
def base_vocabulary(base_proto: Any) -> ChatGLM3Vocabulary:
    return ChatGLM3Vocabulary(base_proto)


@pytest.fixture(scope="session")
def merge(base_vocabulary: ChatGLM3Vocabulary, ja_dir: Path) -> merging.MergedVocabulary:
    learned = base_vocabulary.read_learned(ja_dir)
    return merging.merge_pieces(base_vocabulary, learned, Policy.JAPANESE)


@pytest.fixture(scope="session")
def merged_proto(merge: merging.MergedVocabulary) -> Any:
    assert isinstance(merge.vocabulary, ChatGLM3Vocabulary)
    return merge.vocabulary.proto


@pytest.fixture(scope="session")
def merged_dir(merge: merging.MergedVocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    merge.vocabulary.save(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(merged_dir: Path) -> Any:
    return tokenizer.load_processor(merged_dir)


@pytest.fixture(scope="session")
def resized_dir(base_dir: Path, merged_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from chatglm_ja.bases.chatglm3 import ChatGLM3Base
    from chatglm_ja.vocabulary import embedding_rows
    from chatglm_ja.vocabulary.settings import ResizeModelConfig

    folder = tmp_path_factory.mktemp("resized")
    config = ResizeModelConfig(
        output_dir=folder, base_model=base_dir, tokenizer=merged_dir, output_bias=0.0,
        max_shard_gb=0.001,
    )  # fmt: skip
    embedding_rows.resize_checkpoint(ChatGLM3Base.open(base_dir), config, folder)
    return folder


@pytest.fixture(scope="session")
def model(resized_dir: Path, merged_dir: Path) -> LoadedModel:
    """The resized model and the merged tokenizer, in memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from chatglm_ja.bases.chatglm3 import ChatGLM3Tokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(resized_dir, dtype=torch.float32)
    return LoadedModel(loaded.eval(), ChatGLM3Tokenizer.open(merged_dir))


def prepare_config(tokenizer_dir: Path, sources: list[Source], **changes: Any) -> PrepareDataConfig:
    """Settings of step 4 that take texts as they are; the shares are equal if none are given."""
    sft_sources = changes.pop("sft_sources", (Source("ja", "none.jsonl"),))
    settings: dict[str, Any] = {
        "output_dir": Path("unused"),
        "tokenizer": tokenizer_dir,
        "sources": tuple(sources),
        "shares": tuple(f"{name}=1" for name in dict.fromkeys(s.language for s in sources)),
        "total_tokens": 1000,
        "validation_tokens": 0,
        "max_repeats": 1.0,
        "block_size": 16,
        "min_characters": 1,
        "check_language": False,
        "near_duplicates": 0.0,
        "sft_sources": tuple(sft_sources),
        "sft_shares": tuple(f"{n}=1" for n in dict.fromkeys(s.language for s in sft_sources)),
        "sft_examples": 1,
        "sft_validation_examples": 0,
        "max_length": 256,
        "num_processes": 1,
    }
    return PrepareDataConfig(**{**settings, **changes})


def source_folders(parent: Path, sources: Sequence[Source]) -> list[Path]:
    folders = [parent / str(number) for number in range(len(sources))]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return folders


def write_pretraining(folder: Path, config: PrepareDataConfig) -> dict[str, Any]:
    index = prepare_texts.prepare(config, source_folders(folder / "texts", config.sources))
    return prepare_texts.write(index, config, parse_shares(config.shares), folder)[0]


def write_sft(folder: Path, config: PrepareDataConfig) -> dict[str, Any]:
    index = prepare_conversations.prepare(
        config, source_folders(folder / "conversations", config.sft_sources)
    )
    return prepare_conversations.write(index, config, parse_shares(config.sft_shares), folder)[0]


def write_manifest(folder: Path, counts: dict[str, Any]) -> None:
    """What a step would have said of what it made, as far as counts go."""
    manifest = Manifest(
        step="step4_prepare_data", arguments={}, counts=counts, inputs={}, lineage={},
        fingerprint="0" * 64, files={},
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.model_dump_json())


@pytest.fixture(scope="session")
def data_dir(merged_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretraining blocks of 64 tokens and SFT bins of 256."""
    folder = tmp_path_factory.mktemp("data")
    config = prepare_config(
        merged_dir,
        [Source(name, str(DATA / f"train_{name}.jsonl.gz")) for name in ("ja", "zh", "en")],
        shares=("ja=76", "zh=12", "en=12"),
        total_tokens=8_000,
        validation_tokens=1_500,
        block_size=64,
        sft_sources=[Source("ja", str(DATA / "heldout_sft.jsonl.gz"), where=("kind", "ja"))],
        sft_examples=8,
        sft_validation_examples=2,
    )
    counts = {"pretrain": write_pretraining(folder, config), "sft": write_sft(folder, config)}
    write_manifest(folder, counts)
    return folder


@pytest.fixture
def copy_of() -> Callable[[Path, Path], Path]:
    """Copy a folder, writable, so that a test can break it."""

    def copy(source: Path, target: Path) -> Path:
        shutil.copytree(source, target)
        return target

    return copy


@pytest.fixture(scope="session")
def conversation() -> list[Message]:
    return [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "日本の首都はどこですか？"},
        {"role": "assistant", "content": "東京です。"},
        {"role": "user", "content": "ありがとう"},
        {"role": "assistant", "content": "どういたしまして。"},
    ]


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """The finished pipeline: every step has run. The first worker that needs it builds it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers
    runner = Runner(folder / "pipeline")
    printed = folder / "pipeline.json"
    with open(folder / "pipeline.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            runner.root.mkdir()
            for script in SMALL:
                result = runner.small(script)
                assert result.returncode == 0, f"{script}\n{result.stderr}"
                runner.said[script] = result.stdout
            write_json(printed, runner.said)
    runner.said = read_json(printed)
    return runner


@pytest.fixture
def unlocked(pipeline: Runner, tmp_path: Path) -> Runner:
    """A copy of the finished pipeline, for a test that changes it."""
    subprocess.run(["cp", "-a", str(pipeline.folder), str(tmp_path)], check=True)
    return Runner(tmp_path)
