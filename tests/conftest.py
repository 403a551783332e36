"""Small real things to test on: ChatGLM3's own layout in miniature, and the demo's texts."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja import chat, corpus, dataset, export, tokenizer, vocabulary
from chatglm_ja.config import Source, TrainTokenizerConfig

PROJECT = Path(__file__).resolve().parents[1]
FIXTURES = PROJECT / "tests" / "fixtures"
DATA = PROJECT / "demo" / "data"
SHARED = PROJECT.parent / "shared"

TRAINER_SETTINGS = TrainTokenizerConfig(output_dir=Path(), sources=()).trainer_settings()

needs_real_tokenizer = pytest.mark.skipif(
    not (SHARED / "chatglm3-6b" / "tokenizer.model").is_file(),
    reason="needs ChatGLM3-6B's tokenizer.model in ../shared/chatglm3-6b",
)


def demo_texts(language: str, count: int, split: str = "train") -> list[str]:
    source = Source(language, str(DATA / f"{split}_{language}.jsonl.gz"))
    return list(itertools.islice(corpus.read_texts(source), count))


@pytest.fixture(scope="session")
def base_dir() -> Path:
    """A complete checkpoint in ChatGLM3's own layout with random weights, 4,000 pieces."""
    return FIXTURES / "tiny_chatglm3"


@pytest.fixture(scope="session")
def base_proto(base_dir: Path) -> Any:
    return tokenizer.read_model(base_dir / tokenizer.MODEL_FILE)


@pytest.fixture(scope="session")
def ja_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Japanese BPE model of 2,500 pieces, trained on pages of the demo."""
    folder = tmp_path_factory.mktemp("ja")
    learned = vocabulary.train(
        corpus.training_lines(demo_texts("ja", 300), {}),
        vocab_size=2500,
        character_coverage=0.9995,
        num_threads=2,
        settings=TRAINER_SETTINGS,
    )
    vocabulary.save_learned(learned, folder)
    return folder


@pytest.fixture(scope="session")
def merge(base_proto: Any, ja_dir: Path) -> vocabulary.Merge:
    return vocabulary.merge(base_proto, vocabulary.read_learned(ja_dir), "japanese")


@pytest.fixture(scope="session")
def merged_dir(merge: vocabulary.Merge, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    export.save(merge.proto, folder)
    return folder


@pytest.fixture(scope="session")
def encoder(merged_dir: Path) -> Any:
    return tokenizer.load(merged_dir)


@pytest.fixture(scope="session")
def resized_dir(base_dir: Path, merged_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from chatglm_ja import checkpoint, resize

    folder = tmp_path_factory.mktemp("resized")
    resize.resize_checkpoint(
        checkpoint.Checkpoint(base_dir),
        merged_dir,
        folder,
        init="subtoken_mean",
        output_bias=0.0,
        output_layout="glm",
        pad_to_multiple=64,
        max_shard_bytes=400_000,
        seed=0,
    )
    return folder


@pytest.fixture(scope="session")
def data_dir(encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretraining blocks of 64 tokens and SFT bins of 128."""
    folder = tmp_path_factory.mktemp("data")
    dataset.write_pretraining(
        folder,
        encoder,
        [Source(name, str(DATA / f"train_{name}.jsonl.gz")) for name in ("ja", "zh", "en")],
        {"ja": 0.76, "zh": 0.12, "en": 0.12},
        total_tokens=8_000,
        validation_tokens=1_500,
        max_repeats=1.0,
        block_size=64,
        num_threads=2,
    )
    dataset.write_sft(
        folder,
        encoder,
        [Source("ja", str(DATA / "heldout_sft.jsonl.gz"), where=("kind", "ja"))],
        {"ja": 1.0},
        examples=8,
        validation_examples=2,
        max_length=256,
        seed=0,
    )
    return folder


@pytest.fixture
def copy_of() -> Callable[[Path, Path], Path]:
    """Copy a folder, writable, so that a test can break it."""

    def copy(source: Path, target: Path) -> Path:
        shutil.copytree(source, target)
        return target

    return copy


@pytest.fixture(scope="session")
def conversation() -> list[chat.Message]:
    return [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "日本の首都はどこですか？"},
        {"role": "assistant", "content": "東京です。"},
        {"role": "user", "content": "ありがとう"},
        {"role": "assistant", "content": "どういたしまして。"},
    ]
