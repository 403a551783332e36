"""tokenizer.json gives sentencepiece's ids; the chat template makes no special token of a text."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from chatglm_ja.chatglm3 import chat_format, tokenizer, tokenizer_files
from chatglm_ja.chatglm3.base import Base
from chatglm_ja.data import conversations
from chatglm_ja.errors import DataError
from chatglm_ja.vocabulary import learning, merging
from chatglm_ja.vocabulary.policies import Policy
from tests.conftest import SHARED, demo_texts, needs_real_tokenizer

ODD_TEXTS = [
    "", " ", "  two  spaces ", "\ttab\n\nlines\r\n", "😀👩‍👩‍👧‍👧 絵文字", "か\u3099 が",
    "ﾊﾝｶｸ ＦＵＬＬ", "1998年12月31日", "▁mark", "込働気図", "\u0000\u0007", "\U0010ffff", "𠮷野家",
    "..." * 50, "<0x41>", "philosophy of people", "<unk>",
]  # fmt: skip

# Any Unicode, and texts of few characters, where merges collide.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.text(st.sampled_from("かがきくけこのはるすーゝ々、。ｶﾞ\u3099込国 \n▁"), max_size=40),
    st.text(st.sampled_from("aab  .-=1\u00a0\u200b\t"), max_size=40),
    st.lists(st.sampled_from(["<|user|>", "sop", "</s>", "です", "ます", " ", "x"])).map("".join),
)


@pytest.fixture(scope="module")
def fast(merged_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(merged_dir)


def check_same(fast: Any, encoder: Any, text: str) -> None:
    ids = fast(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ids == encoder.encode(text), text
    # sentencepiece reads its symbol for a space as a space.
    assert fast.decode(ids) == encoder.decode(ids) == text.replace("▁", " ")
    assert not any(encoder.is_control(index) or encoder.is_unknown(index) for index in ids)


def test_auto_tokenizer_gives_the_same_ids_and_texts(fast: Any, encoder: Any) -> None:
    assert len(fast) == encoder.get_piece_size()
    for language in ("ja", "zh", "en"):
        for text in demo_texts(language, 80, "heldout"):
            for line in [text, *text.split("\n")]:
                check_same(fast, encoder, line)
    for text in ODD_TEXTS:
        check_same(fast, encoder, text)


@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
def test_any_text_gives_the_same_ids(fast: Any, encoder: Any, text: str) -> None:
    check_same(fast, encoder, text)


@pytest.fixture(scope="module")
def real_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """ChatGLM3-6B's tokenizer with the article's pieces, in both forms."""
    folder = tmp_path_factory.mktemp("real")
    base = Base.open(SHARED / "chatglm3-6b").proto
    learned = learning.read_learned(SHARED / "reference" / "ja_bpe.model")
    tokenizer_files.save_tokenizer(
        merging.merge_pieces(base, learned, Policy.JAPANESE).proto, folder
    )
    return AutoTokenizer.from_pretrained(folder), tokenizer.load_processor(folder)


@needs_real_tokenizer
@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
def test_any_text_gives_the_same_ids_with_the_real_tokenizer(
    real_pair: tuple[Any, Any], text: str
) -> None:
    check_same(*real_pair, text)


@needs_real_tokenizer
def test_real_lines_and_templates_agree(real_pair: tuple[Any, Any]) -> None:
    for language in ("ja", "zh", "en"):
        for text in demo_texts(language, 60, "heldout"):
            check_same(*real_pair, text)


def test_auto_tokenizer_knows_the_special_tokens(fast: Any, encoder: Any) -> None:
    for token in (*tokenizer.SPECIAL_TOKENS, "<s>", "</s>"):
        assert fast.convert_tokens_to_ids(token) == encoder.piece_to_id(token)
        assert fast(token, add_special_tokens=False).input_ids[-1] == encoder.piece_to_id(token)
    assert (fast.eos_token_id, fast.pad_token_id, fast.padding_side) == (2, 0, "left")


def test_words_that_hold_sop_and_eop_stay_words(fast: Any, encoder: Any, tmp_path: Path) -> None:
    """Without split_special_tokens, as most programs call it; also after saving it again."""
    fast.save_pretrained(tmp_path)
    for loaded in (fast, AutoTokenizer.from_pretrained(tmp_path)):
        for text in ("The people of philosophy.", "isotropic\nsophisticated: peoples"):
            assert loaded(text, add_special_tokens=False).input_ids == encoder.encode(text)


def template_ids(fast: Any, messages: Any) -> list[int]:
    ids: list[int] = fast.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    return ids


def test_the_chat_template_gives_the_prompts_ids(
    fast: Any, encoder: Any, conversation: Any
) -> None:
    for messages in (
        conversation[:2],
        conversation[:4],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": "  people, philosophy\n\n sops "}],
        [{"role": "assistant", "metadata": "run", "content": "x = 1\n"}],
    ):
        ids = chat_format.build_prompt_ids(encoder, messages)
        assert template_ids(fast, messages) == ids
        assert chat_format.build_prompt_ids(fast, messages) == ids


def test_the_chat_template_writes_tools_as_they_are_trained(fast: Any, encoder: Any) -> None:
    tools = [{"type": "function", "function": {"name": "clock", "description": "時刻 <now>"}}]
    arguments = {"city": "大'阪\n", "days": [1.5, None, True], "more": {"a": "b"}}
    call = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": arguments}}
    user = {"role": "user", "content": "何時？"}
    seen = {"role": "tool", "tool_call_id": "c", "content": "12:00"}
    for text in ("調べます。", None):
        asked = {"role": "assistant", "content": text, "tool_calls": [call]}
        for listed, messages in (
            (tools, [user, asked, seen]), (tools, [{"role": "system", "content": "s"}, user]),
            (None, [user, asked, seen, {"role": "assistant", "content": "正午です。"}, user]),
        ):  # fmt: skip
            ids = fast.apply_chat_template(
                messages, tools=listed, add_generation_prompt=True, return_dict=False
            )
            trained = conversations.read_messages({"messages": messages, "tools": listed}, None)
            assert isinstance(trained, list)
            assert ids == chat_format.build_prompt_ids(encoder, trained)
    for calls, problem in (
        ([call, call], "several calls at once"),
        ([{"function": {"name": "clock", "arguments": "{}"}}], "are not an object"),
    ):
        with pytest.raises(Exception, match=problem):
            template_ids(fast, [user, {"role": "assistant", "content": "", "tool_calls": calls}])


@settings(max_examples=200, deadline=None)
@given(
    content=st.lists(
        st.sampled_from(
            [*tokenizer.SPECIAL_TOKENS, "<s>", "</s>", "<unk>",
             "<", "|>", "s", "op", "_", "の", "1", " ", "\n", "é", "\u0301", "²"]
        )
    ).map("".join)
)  # fmt: skip
@example(content="sopsop eopsop")
@example(content="<|<|user|>user|>")
def test_no_text_in_a_message_becomes_a_special_token(
    fast: Any, encoder: Any, content: str
) -> None:
    """The template adds only its own special tokens, and changes messages by spaces only."""
    message = {"role": "user", "content": content, "metadata": content}
    ids = template_ids(fast, [message])
    controls = [encoder.id_to_piece(index) for index in ids if encoder.is_control(index)]
    assert controls == ["[gMASK]", "sop", "<|user|>", "<|assistant|>"]
    exact = chat_format.build_prompt_ids(encoder, [message])
    assert encoder.decode(ids).replace(" ", "") == encoder.decode(exact).replace(" ", "")


@pytest.mark.parametrize("content", [None, 5, [{"type": "text", "text": "x"}]])
def test_content_must_be_text(fast: Any, encoder: Any, content: Any) -> None:
    message = {"role": "user", "content": content}
    with pytest.raises(DataError, match="a message has content of type"):
        chat_format.build_prompt_ids(encoder, [message])
    with pytest.raises(Exception, match="a message has no content of type text"):
        template_ids(fast, [message])


def test_an_unknown_role_is_refused_by_the_template(fast: Any) -> None:
    with pytest.raises(Exception, match="role moderator does not exist: expected system, user"):
        template_ids(fast, [{"role": "moderator", "content": "hi"}])


@pytest.mark.parametrize("form", ["encoder", "fast"])
def test_a_lone_surrogate_is_refused(form: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(DataError, match="a message holds the lone surrogate"):
        chat_format.build_prompt_ids(
            request.getfixturevalue(form), [{"role": "user", "content": "a\ud83d"}]
        )
