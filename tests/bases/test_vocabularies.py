"""Tokenizers that cannot be extended are refused when they are opened, each in one line."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chatglm_ja.bases.byte_level_vocabulary import ByteLevelVocabulary
from chatglm_ja.bases.sentencepiece_vocabulary import LlamaVocabulary
from chatglm_ja.bases.vocabularies import open_vocabulary
from chatglm_ja.chatglm3 import tokenizer
from chatglm_ja.errors import DataError
from tests.bases.tiny_tokenizers import make_byte_level, make_llama

VOCAB = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.WordPiece(VOCAB, unk_token="<unk>"), "is a WordPiece model, which has no merges"),
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0), "is a Unigram model, which has no"),
        (models.WordLevel(VOCAB, unk_token="<unk>"), "is a WordLevel model, which has no merges"),
        (models.BPE(VOCAB, [("a", "b")], unk_token="<unk>"), "is BPE without bytes, which loses"),
        (
            models.BPE({"a</w>": 0, "b": 1}, [], end_of_word_suffix="</w>"),
            "marks the parts of words with '</w>'",
        ),
        (
            models.BPE(VOCAB, [("a", "b")], unk_token="<unk>", byte_fallback=True),
            "has no tokenizer.model, which a sentencepiece BPE tokenizer is extended by",
        ),
    ],
)
def test_other_kinds_of_tokenizers_are_refused(model: Any, message: str, tmp_path: Path) -> None:
    bare = Tokenizer(model)
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match=message):
        open_vocabulary(PreTrainedTokenizerFast(tokenizer_object=bare), [0], tmp_path)


def test_the_two_kinds_are_told_apart(tmp_path: Path) -> None:
    byte_level = open_vocabulary(make_byte_level(tmp_path / "a"), [0], tmp_path / "a")
    assert isinstance(byte_level, ByteLevelVocabulary)
    llama = open_vocabulary(make_llama(tmp_path / "b"), [0], tmp_path / "b")
    assert isinstance(llama, LlamaVocabulary)


def test_a_tokenizer_model_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    auto = make_llama(tmp_path)
    path = tmp_path / tokenizer.MODEL_FILE
    proto = tokenizer.read_proto(path)
    proto.pieces[400].piece, proto.pieces[401].piece = (
        proto.pieces[401].piece,
        proto.pieces[400].piece,
    )
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(DataError, match=r"with id 400, but tokenizer\.json with 401"):
        open_vocabulary(auto, [0], tmp_path)
    proto.normalizer_spec.remove_extra_whitespaces = True
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(DataError, match="normalizes text or has no byte fallback"):
        open_vocabulary(auto, [0], tmp_path)
