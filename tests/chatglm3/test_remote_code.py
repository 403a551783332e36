"""ChatGLM3's own Python files, patched: embeddings accessible, special tokens at their old ids."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.chatglm3 import remote_code, tokenizer
from chatglm_ja.errors import DataError

Copy = Callable[[Path, Path], Path]

MODELING = """
class ChatGLMModel:
    def get_input_embeddings(self):
        return self.embedding.word_embeddings


class ChatGLMForConditionalGeneration(Base):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = Transformer(config)

    def forward(self):
        pass
"""

TOKENIZATION = """
class SPTokenizer:
    def __init__(self, model_path):
        self.sp_model = SentencePieceProcessor(model_file=model_path)
        self.n_words: int = self.sp_model.vocab_size()
        names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop",
                 "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
        self.special_tokens = {}
        self.index_special_tokens = {}
        for name in names:
            self.special_tokens[name] = self.n_words
            self.index_special_tokens[self.n_words] = name
            self.n_words += 1

    def encode(self, text):
        return self.sp_model.encode(text)
"""


def with_remote_code(folder: Path, modeling: str = MODELING, tokens: str = TOKENIZATION) -> Path:
    (folder / "modeling_chatglm.py").write_text(modeling)
    (folder / "tokenization_chatglm.py").write_text(tokens)
    (folder / "configuration_chatglm.py").write_text("raise RuntimeError('never run')\n")
    return folder


def test_two_files_are_patched_and_none_is_run(
    base_dir: Path, merged_dir: Path, merged_proto: Any, tmp_path: Path, copy_of: Copy
) -> None:
    base = with_remote_code(copy_of(base_dir, tmp_path / "base"))
    code = remote_code.read_code(base, 4000)
    for name in ("configuration_chatglm.py", "tokenizer_config.json"):
        assert code.pop(name) == (base / name).read_text()
    assert code.keys() == {"modeling_chatglm.py", "tokenization_chatglm.py"}

    class Base:
        def __init__(self, config: Any) -> None: ...

    class Transformer:
        def __init__(self, config: Any) -> None:
            self.embedding, self.output_layer = type("E", (), {"word_embeddings": 1})(), 2

    names: dict[str, Any] = {"Base": Base, "Transformer": Transformer}
    exec(code["modeling_chatglm.py"], names)
    model = names["ChatGLMForConditionalGeneration"](None)
    assert (model.get_input_embeddings(), model.get_output_embeddings()) == (1, 2)
    model.set_input_embeddings(3)
    model.set_output_embeddings(4)
    assert (model.get_input_embeddings(), model.get_output_embeddings()) == (3, 4)

    names = {"SentencePieceProcessor": tokenizer.sentencepiece.SentencePieceProcessor}
    exec(code["tokenization_chatglm.py"], names)
    loaded = names["SPTokenizer"](str(merged_dir / "tokenizer.model"))
    assert loaded.special_tokens["[MASK]"] == 4000
    assert loaded.special_tokens["<|observation|>"] == 4008
    assert loaded.index_special_tokens[4003] == "sop"
    assert loaded.n_words == len(merged_proto.pieces)


def test_patched_files_are_left_as_they_are(base_dir: Path, tmp_path: Path, copy_of: Copy) -> None:
    base = with_remote_code(copy_of(base_dir, tmp_path / "base"))
    code = remote_code.read_code(base, 4000)
    for name, text in code.items():
        (base / name).write_text(text)
    assert remote_code.read_code(base, 4000) == code


def test_a_base_without_one_of_the_two_files_has_no_code(
    base_dir: Path, tmp_path: Path, copy_of: Copy
) -> None:
    base = with_remote_code(copy_of(base_dir, tmp_path / "base"))
    (base / "tokenization_chatglm.py").unlink()
    assert remote_code.read_code(base, 4000) == {}


@pytest.mark.parametrize(
    ("modeling", "tokens", "message"),
    [
        ("class Other: pass", TOKENIZATION, "modeling_chatglm.py has no class ChatGLMFor"),
        (MODELING, "class SPTokenizer:\n    x = 1", "SPTokenizer has no __init__"),
        ("def broken(:", TOKENIZATION, "is not Python"),
    ],
)
def test_unknown_remote_code_is_refused(
    modeling: str, tokens: str, message: str, base_dir: Path, tmp_path: Path, copy_of: Copy
) -> None:
    base = with_remote_code(copy_of(base_dir, tmp_path / "base"), modeling, tokens)
    with pytest.raises(DataError, match=message):
        remote_code.read_code(base, 4000)
