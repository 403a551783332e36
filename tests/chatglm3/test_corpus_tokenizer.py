"""The corpus tokenizer gives sentencepiece's ids for any text, whatever was tokenized before."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm_ja.bases.chatglm3 import ChatGLM3Base
from chatglm_ja.chatglm3 import corpus_tokenizer, tokenizer
from chatglm_ja.chatglm3.corpus_tokenizer import CorpusTokenizer
from chatglm_ja.errors import DataError
from chatglm_ja.vocabulary import merging
from chatglm_ja.vocabulary.policies import Policy
from tests.conftest import SHARED, demo_texts, needs_real_tokenizer

ODD = [
    "", " ", "  a", "▁", "a▁b", "\n", "\n\n", "a\nb ", "</s>", "<0x0A>", "[gMASK] sop <|user|>",
    "\u3000字下げ", "𠮷野家", "がき\u3099", "a" * 3000, "=" * 500, "1998年12月", "🙂👨\u200d👩",
    "\ufffd\0\x07", "東" * 40, "the the the", "\t\tcode  x", "𝔘𝔫𝔦", "ｶﾞ①", "e\u0301", "   ",
]  # fmt: skip


def check(merged: Any, texts: list[str], fast: CorpusTokenizer | None = None) -> None:
    processor = tokenizer.make_processor(merged)
    encoded = (fast or CorpusTokenizer(merged)).encode(texts)
    assert [ids.tolist() for ids in encoded] == [processor.encode(text) for text in texts]
    assert all(ids.dtype == np.int32 for ids in encoded)


def test_all_kinds_of_texts(merged_proto: Any) -> None:
    fast = CorpusTokenizer(merged_proto)
    for texts in (ODD, ODD[::-1], [], [""], ["", ""], demo_texts("ja", 60) + ODD):
        check(merged_proto, texts, fast)
    for text in ODD:
        check(merged_proto, [text])


def test_documents(merged_proto: Any) -> None:
    for language in ("ja", "zh", "en"):
        check(merged_proto, demo_texts(language, 400))


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8")), max_size=5))
def test_arbitrary_texts(texts: list[str], merged_proto: Any) -> None:
    check(merged_proto, texts)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_texts_of_pieces(data: st.DataObject, merged_proto: Any) -> None:
    """Halves of pieces beside each other: what could be joined and is not, and the reverse."""
    pieces = st.sampled_from([piece.piece for piece in merged_proto.pieces])
    part = st.builds(lambda p, i, j: p[i : i + j], pieces, st.integers(0, 3), st.integers(1, 8))
    check(merged_proto, ["".join(data.draw(st.lists(part, max_size=12)))])


def test_a_small_table_and_a_short_memory_cost_no_exactness(
    merged_proto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hash collisions in the table of pairs, and a cache that is cleared."""
    monkeypatch.setattr(corpus_tokenizer, "PAIR_BITS", 8)
    monkeypatch.setattr(corpus_tokenizer, "MAX_CACHED", 50)
    fast = CorpusTokenizer(merged_proto)
    texts = demo_texts("ja", 50) + ODD + demo_texts("zh", 50)
    for start in range(0, len(texts), 10):
        check(merged_proto, texts[start : start + 10], fast)


def test_pieces_that_the_user_defined_are_never_cut(merged_proto: Any) -> None:
    proto = type(merged_proto)()
    proto.CopyFrom(merged_proto)
    for piece in ("a\n\nb", "。。", "\n\n"):
        proto.pieces.add(piece=piece, score=0.0, type=proto.SentencePiece.USER_DEFINED)
    check(proto, ["xa\n\nby", "文。。。文", "\n\n\n\n", "a\n\n\nb", *ODD])


def test_another_kind_of_tokenizer_is_refused(merged_proto: Any) -> None:
    proto = type(merged_proto)()
    proto.CopyFrom(merged_proto)
    proto.normalizer_spec.remove_extra_whitespaces = True
    with pytest.raises(DataError, match="normalizes text or has no byte fallback"):
        CorpusTokenizer(proto)


@needs_real_tokenizer
@pytest.mark.parametrize("language", ["ja", "zh", "en"])
def test_the_real_tokenizer(language: str) -> None:
    base = ChatGLM3Base.open(SHARED / "chatglm3-6b").vocabulary
    learned = base.read_learned(SHARED / "reference" / "ja_bpe.model")
    merged: Any = merging.merge_pieces(base, learned, Policy.JAPANESE).vocabulary
    check(merged.proto, demo_texts(language, 300) + ODD)
