"""The tokenizer in a GGUF file: sentencepiece's ids from llama.cpp's merges, and the prompts."""

import copy
import gzip
import itertools
import json
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.sandbox
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chatglm_ja.chatglm3 import chat_format, tokenizer
from chatglm_ja.export import gguf_tokenizer
from tests.conftest import DATA, FIXTURES, SHARED, demo_texts, needs_real_tokenizer
from tests.export.llama_cpp import LlamaTokenizer

Render = Callable[..., str]

HOSTILE = [
    "people and philosophy", "sop", "eop", "a sop b eop", "sopeop<sop>eop<eop>", "Sophie's people",
    "<|user|>", "<|assistant|>\n x</s>", "</s>", "<s>x", "<unk>", "[MASK][gMASK]sop", "<0x0A>",
    "🙂🏽‍💻", "\x01\x02\x1f\x7f", "a\tb\r\nc", "  two  spaces ", "\u2581",
    "\ufeffx\u200b", "é\u0301", "\U0010ffff", "1998年12月", "",
]  # fmt: skip


def as_llama(proto: Any) -> LlamaTokenizer:
    return LlamaTokenizer(
        gguf_tokenizer.name_tokens(proto),
        [piece.score for piece in proto.pieces],
        [piece.type for piece in proto.pieces],
    )


@pytest.fixture(scope="module")
def llama(merged_proto: Any) -> LlamaTokenizer:
    return as_llama(merged_proto)


@pytest.fixture(scope="module")
def render(merged_proto: Any) -> Render:
    """Render the template as llama-cpp-python does; the functions are llama.cpp's, too."""

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(gguf_tokenizer.write_chat_template(merged_proto))

    def render_prompt(messages: Any, **values: Any) -> str:
        values = {"add_generation_prompt": True, "raise_exception": raise_exception, **values}
        return template.render(messages=messages, **values)

    return render_prompt


def test_lines_have_sentencepieces_ids(llama: LlamaTokenizer, encoder: Any) -> None:
    for language in ("ja", "zh", "en"):
        texts = demo_texts(language, 100, "heldout")
        lines = [line for text in texts for line in text.split("\n") if line][:350]
        assert len(lines) == 350
        assert [llama.encode(line) for line in lines] == [encoder.encode(line) for line in lines]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_have_sentencepieces_ids(
    text: str, llama: LlamaTokenizer, encoder: Any
) -> None:
    assert llama.encode(text) == encoder.encode(text)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40))
def test_any_text_has_sentencepieces_ids(llama: LlamaTokenizer, encoder: Any, text: str) -> None:
    assert llama.encode(text) == encoder.encode(text)


def test_only_control_tokens_that_merges_can_form_are_renamed(merged_proto: Any) -> None:
    """The reference fails on them under their own names."""
    proto = merged_proto
    names = gguf_tokenizer.name_tokens(proto)
    changed = {
        piece.piece: name
        for piece, name in zip(proto.pieces, names, strict=True)
        if piece.piece != name
    }
    assert changed == {"sop": "<sop>", "eop": "<eop>"}
    own = as_llama(proto)
    own = LlamaTokenizer([piece.piece for piece in proto.pieces], own.scores, own.types)
    encoder = tokenizer.make_processor(proto)
    assert any(own.encode(text) != encoder.encode(text) for text in HOSTILE)
    # A name that is taken, or that pieces make, is not used either.
    more = copy.deepcopy(proto)
    for piece in ("<sop>", "s>", "<<eop"):
        more.pieces.add(piece=piece, score=-1e5, type=proto.SentencePiece.NORMAL)
    more.pieces.add(piece="<eop", score=-1e5, type=proto.SentencePiece.NORMAL)
    renamed = gguf_tokenizer.name_tokens(more)
    assert len(set(renamed)) == len(renamed)
    assert renamed[4003:4005] == ["<<sop>>", "<<eop>>"]
    for text in ("<sop>", "<s>", "<eop>", "</s>", "<<eop>>"):
        ids = as_llama(more).encode(text)
        assert ids == tokenizer.make_processor(more).encode(text)


def test_prompts_have_the_ids_of_the_chat_format(
    llama: LlamaTokenizer, render: Render, encoder: Any, conversation: Any
) -> None:
    with gzip.open(DATA / "heldout_sft.jsonl.gz", "rt", encoding="utf-8") as lines:
        asked = [json.loads(line)["messages"] for line in itertools.islice(lines, 100)]
    for messages in (
        *asked,
        conversation[:2],
        conversation[:4],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": "  people, philosophy\n\n sops sop eop "}],
        [{"role": "assistant", "metadata": "run", "content": "x = 1\n"}],
    ):
        expected = [*chat_format.build_prompt_ids(encoder, messages), *encoder.encode("\n")]
        assert llama.encode(render(messages), special=True) == expected


def test_the_template_maps_roles_and_ends_a_last_answer(
    llama: LlamaTokenizer, render: Render, encoder: Any, conversation: Any
) -> None:
    ours = [{"role": role, "content": "x"} for role in ("system", "observation")]
    theirs = [{"role": role, "content": "x"} for role in ("developer", "tool")]
    assert render(theirs) == render(ours)
    text = render(conversation, add_generation_prompt=False)
    assert llama.encode(text, special=True) == chat_format.build_example(encoder, conversation)[0]


@settings(max_examples=200, deadline=None)
@given(
    content=st.lists(
        st.sampled_from(
            [*tokenizer.SPECIAL_TOKENS, "<sop>", "<eop>", "<s>", "</s>", "<unk>",
             "<", "|>", "s", "op", "_", "の", "1", " ", "\n", "é", "\u0301"]
        )
    ).map("".join)
)  # fmt: skip
@example(content="<|<|user|>user|>")
def test_no_text_in_a_message_becomes_a_special_token(
    llama: LlamaTokenizer, render: Render, encoder: Any, content: str
) -> None:
    message = {"role": "user", "content": content, "metadata": content}
    ids = llama.encode(render([message]), special=True)
    controls = [encoder.id_to_piece(n) for n in ids if encoder.is_control(n) or n == 0]
    assert controls == ["[gMASK]", "sop", "<|user|>", "<|assistant|>"]
    exact = [*chat_format.build_prompt_ids(encoder, [message]), *encoder.encode("\n")]
    assert encoder.decode(ids).replace(" ", "") == encoder.decode(exact).replace(" ", "")


@pytest.mark.parametrize(
    ("message", "values", "problem"),
    [
        ({"role": "moderator", "content": "x"}, {}, "role moderator does not exist: expected sys"),
        ({"role": "user", "content": None}, {}, "no content of type text"),
        ({"role": "user", "content": "x"}, {"tools": [{"type": "function"}]}, "writes no tools"),
    ],
)
def test_what_the_template_cannot_write_is_refused(
    message: Any, values: Any, problem: str, render: Render
) -> None:
    with pytest.raises(ValueError, match=problem):
        render([message], **values)


def test_the_modelfile_names_the_file_and_llama_cpps_tokens(merged_proto: Any) -> None:
    text = gguf_tokenizer.write_modelfile(merged_proto, "model-F16.gguf")
    assert text.startswith('FROM ./model-F16.gguf\nTEMPLATE """[gMASK]<sop>{{ range .Messages }}')
    assert text.endswith(
        '<|assistant|>\n"""\nPARAMETER stop "</s>"\nPARAMETER stop "<|user|>"\n'
        'PARAMETER stop "<|observation|>"\nPARAMETER temperature 0.8\nPARAMETER top_p 0.8\n'
        "PARAMETER top_k 50\n"
    )


@needs_real_tokenizer
def test_chatglm3s_own_tokenizer_and_prompts() -> None:
    proto = tokenizer.read_proto(SHARED / "chatglm3-6b" / "tokenizer.model")
    proto = tokenizer.add_special_tokens(proto)
    llama, encoder = as_llama(proto), tokenizer.make_processor(proto)
    for language in ("ja", "zh", "en"):
        for line in demo_texts(language, 20, "heldout"):
            assert llama.encode(line) == encoder.encode(line)
    for text in HOSTILE:
        assert llama.encode(text) == encoder.encode(text)
    template = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(
        gguf_tokenizer.write_chat_template(proto)
    )
    for case in json.loads((FIXTURES / "chat_prompts.json").read_text()):
        if any("<|" in message["content"] for message in case["messages"]):
            continue  # the template breaks what spells a special token
        text = template.render(messages=case["messages"], add_generation_prompt=True)
        line_break = encoder.encode("\n")
        assert llama.encode(text, special=True) == [*case["prompt_ids"], *line_break]
