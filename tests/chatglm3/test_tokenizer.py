"""ChatGLM3's tokenizer: which models are accepted, and that no text becomes a special token."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.bases.chatglm3 import ChatGLM3Base
from chatglm_ja.chatglm3 import tokenizer
from chatglm_ja.chatglm3.chat_format import first_new_id
from chatglm_ja.errors import DataError
from tests.conftest import FIXTURES, demo_texts


def test_no_text_becomes_a_special_token(encoder: Any) -> None:
    for token in (*tokenizer.SPECIAL_TOKENS, "<s>", "</s>", "<unk>"):
        ids = encoder.encode(f"a {token} b{token}")
        assert not any(encoder.is_control(index) or encoder.is_unknown(index) for index in ids)
        assert encoder.decode(ids) == f"a {token} b{token}"


def base_folder(folder: Path, proto: Any, **config: Any) -> Path:
    """Write a ChatGLM3 folder with only the files that step 2 reads."""
    fixture = FIXTURES / "tiny_chatglm3" / "config.json"
    changed = {**json.loads(fixture.read_text()), **config}
    (folder / "config.json").write_text(json.dumps(changed))
    (folder / tokenizer.MODEL_FILE).write_bytes(proto.SerializeToString())
    return folder


def test_a_base_needs_only_its_tokenizer_and_config(base_proto: Any, tmp_path: Path) -> None:
    assert ChatGLM3Base.open(base_folder(tmp_path, base_proto)).proto == base_proto


def test_the_first_new_id_of_a_base_is_that_of_its_merged_tokenizer(
    base_dir: Path, encoder: Any
) -> None:
    assert ChatGLM3Base.open(base_dir).first_new_id == first_new_id(encoder) == 4009


def test_a_merged_tokenizer_is_that_of_a_base_for_more_pieces(
    merged_proto: Any, tmp_path: Path
) -> None:
    base = ChatGLM3Base.open(base_folder(tmp_path, merged_proto, padded_vocab_size=100_000))
    assert base.first_new_id == len(merged_proto.pieces)
    again = tokenizer.add_special_tokens(base.proto, ["한국"])
    assert again.pieces[:-1] == merged_proto.pieces
    assert again.pieces[-1].score == merged_proto.pieces[-1].score - 1


def drop_a_special_token(proto: Any) -> None:
    del proto.pieces[4003]


def make_one_a_normal_piece(proto: Any) -> None:
    proto.pieces[4005].type = proto.SentencePiece.NORMAL


@pytest.mark.parametrize("damage", [drop_a_special_token, make_one_a_normal_piece])
def test_a_base_with_only_some_special_tokens_is_refused(
    damage: Callable[[Any], None], merged_proto: Any, tmp_path: Path
) -> None:
    proto = copy.deepcopy(merged_proto)
    damage(proto)
    with pytest.raises(DataError, match=r"holds \[MASK\], \[gMASK\].* as pieces, expected none of"):
        ChatGLM3Base.open(base_folder(tmp_path, proto, padded_vocab_size=100_000))


def test_a_base_without_rows_for_the_special_tokens_is_refused(
    base_proto: Any, tmp_path: Path
) -> None:
    rows = len(base_proto.pieces) + 8
    with pytest.raises(DataError, match=f"padded_vocab_size {rows}"):
        ChatGLM3Base.open(base_folder(tmp_path, base_proto, padded_vocab_size=rows))
    ChatGLM3Base.open(base_folder(tmp_path, base_proto, padded_vocab_size=rows + 1))


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x00" * 100])
def test_other_data_is_not_a_sentencepiece_model(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a sentencepiece model"):
        tokenizer.parse_proto(data, tmp_path / "x.model")


def test_a_unigram_model_is_refused(base_proto: Any, tmp_path: Path) -> None:
    proto = type(base_proto)()
    proto.CopyFrom(base_proto)
    proto.trainer_spec.model_type = 1
    with pytest.raises(DataError, match=r"x\.model is a unigram model"):
        tokenizer.parse_proto(proto.SerializeToString(), tmp_path / "x.model")


def test_documents_are_encoded_in_order(encoder: Any) -> None:
    texts = demo_texts("ja", 30, "heldout")
    encoded = list(tokenizer.encode_texts(encoder, iter(texts), num_threads=2, batch=7))
    assert encoded == [encoder.encode(text) for text in texts]
