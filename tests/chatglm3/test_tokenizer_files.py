"""tokenizer.json gives sentencepiece's ids; the chat template gives those that are trained."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template as compile_template

from chatglm_ja.bases.chatglm3 import ChatGLM3Base
from chatglm_ja.chatglm3 import chat_format, tokenizer, tokenizer_files
from chatglm_ja.data import conversations
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.errors import DataError
from chatglm_ja.messages import IGNORE_INDEX, Message
from chatglm_ja.sources import Source
from chatglm_ja.vocabulary import merging
from chatglm_ja.vocabulary.policies import Policy
from tests.conftest import DATA, SHARED, demo_texts, needs_real_tokenizer

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
    base = ChatGLM3Base.open(SHARED / "chatglm3-6b").vocabulary
    learned = base.read_learned(SHARED / "reference" / "ja_bpe.model")
    merging.merge_pieces(base, learned, Policy.JAPANESE).vocabulary.save(folder)
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


def template_ids(fast: Any, messages: Any, tools: Any = None) -> list[int]:
    ids: list[int] = fast.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_dict=False
    )
    return ids


def check_example(fast: Any, encoder: Any, messages: Any, trained: Any, tools: Any = None) -> None:
    """The template gives the ids, and the mask the labels, of the conversation that is trained."""
    given = fast.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, labels = chat_format.build_example(encoder, trained)
    assert given["input_ids"] == ids
    assert given["assistant_masks"] == [int(label != IGNORE_INDEX) for label in labels]


def test_the_chat_template_gives_the_prompts_ids(
    fast: Any, encoder: Any, conversation: Any
) -> None:
    """The line break that ends an empty header too, unless the model may call a tool."""
    call = {"role": "assistant", "metadata": "run", "content": "x = 1\n"}
    listed = {"role": "system", "content": chat_format.write_tools([{"name": "run"}])}
    for messages, header in (
        (conversation[:2], "\n"),
        (conversation[:4], "\n"),
        ([{"role": "user", "content": ""}], "\n"),
        ([{"role": "user", "content": "  people, philosophy\n\n sops "}], "\n"),
        ([listed, *conversation[1:2]], None),
        ([call], None),
        ([call, {"role": "observation", "content": "1"}], None),
    ):
        ids = chat_format.build_prompt_ids(encoder, messages)
        assert template_ids(fast, messages) == [*ids, *(encoder.encode(header) if header else [])]
        assert chat_format.build_prompt_ids(fast, messages) == ids


def test_served_answers_do_not_begin_with_a_line_break(
    fast: Any, encoder: Any, conversation: Any
) -> None:
    """What is left for the model to generate, after the prompt's ids, is the answer alone."""
    ids, _ = chat_format.build_example(encoder, conversation)
    prompt = template_ids(fast, conversation[:4])
    assert ids[: len(prompt)] == prompt
    assert fast.decode(ids[len(prompt) :], skip_special_tokens=True) == "どういたしまして。"


def test_the_chat_template_marks_what_is_trained(
    fast: Any, encoder: Any, conversation: Any
) -> None:
    context_only = {**conversation[2], "loss": False}
    for messages in (
        conversation,
        [*conversation[:2], context_only, *conversation[3:]],
        [*conversation[:2], context_only],
        [{"role": "assistant", "content": ""}, {"role": "assistant", "content": "峠\n"}],
    ):
        check_example(fast, encoder, messages, messages)
    for path in ("train_sft", "heldout_sft"):
        source = Source("ja", f"{DATA}/{path}.jsonl.gz", name=path)
        for number, messages in enumerate(SourceReader().conversations(source)):
            if number % 10 == 0:
                check_example(fast, encoder, messages, messages)
    # Nothing follows a question that is still to be answered.
    ids = fast.apply_chat_template(conversation[:2], return_dict=False)
    assert ids == chat_format.build_prompt_ids(encoder, conversation[:2])[:-1]


def read_messages(messages: Any, tools: Any = None) -> list[Message]:
    """Read the messages as step 4 does."""
    found = conversations.read_messages({"messages": messages, "tools": tools}, None)
    assert isinstance(found, list)
    return found


@settings(max_examples=200, deadline=None)
@given(
    arguments=st.dictionaries(
        st.sampled_from(["city", "items", "x"]),
        st.recursive(
            st.one_of(
                st.none(), st.booleans(), st.integers(), st.floats(-1024, 1024, width=32),
                st.text(st.sampled_from("a大'\"\\\n\t\r\u3000\xa0\u200d👩{}%")),
            ),
            lambda values: st.lists(values) | st.dictionaries(st.text("ab'"), values),
            max_leaves=6,
        ),
    )
)  # fmt: skip
def test_the_arguments_of_calls_are_written_as_they_are_trained(
    fast: Any, encoder: Any, arguments: Any
) -> None:
    call = {"function": {"name": "clock", "arguments": arguments}}
    asked = {"role": "user", "content": "x"}
    written = {"role": "assistant", "metadata": "clock"}
    written["content"] = chat_format.write_call(arguments)
    messages = [asked, {"role": "assistant", "tool_calls": [call]}]
    check_example(fast, encoder, messages, [asked, written])


def test_the_roles_of_openai_are_those_of_chatglm3(fast: Any, encoder: Any) -> None:
    messages = [
        {"role": "developer", "content": "d"}, {"role": "user", "content": "u"},
        {"role": "assistant", "metadata": "run", "content": "c"},
        {"role": "tool", "content": "t"}, {"role": "assistant", "content": "a"},
    ]  # fmt: skip
    check_example(fast, encoder, messages, read_messages(messages))


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
            trained = read_messages(messages, listed)
            ids = template_ids(fast, messages, listed)
            assert ids == chat_format.build_prompt_ids(encoder, trained)
        check_example(fast, encoder, [user, asked], read_messages([user, asked], tools), tools)
    for calls, problem in (
        ([call, call], "several calls at once"),
        ([{"function": {"name": "clock", "arguments": "{}"}}], "are not an object"),
    ):
        with pytest.raises(Exception, match=problem):
            template_ids(fast, [user, {"role": "assistant", "content": "", "tool_calls": calls}])
    with pytest.raises(Exception, match="a message of user makes a call: only the assistant"):
        template_ids(fast, [{**user, "tool_calls": [call]}])


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
    texts = [encoder.decode(row).replace(" ", "").rstrip("\n") for row in (ids, exact)]
    assert texts[0] == texts[1]


# What Jinja2, llama.cpp and @huggingface/jinja have in common, as far as the template uses it.
SHARED_FILTERS = {"upper", "lower", "tojson", "length", "items"}
SHARED_TESTS = {"string", "mapping", "iterable", "boolean", "none", "defined"}
SHARED_METHODS = {"replace", "split"}


def test_the_chat_template_uses_only_what_other_interpreters_have() -> None:
    """All of them, and Jinja2, rendered 1,975 conversations alike: docs/evaluation.md."""
    template = tokenizer_files.CHAT_TEMPLATE
    plain = re.sub(r"{% (end)?generation %}", "", template)  # known to all three, but not to jinja2
    tree = jinja2.Environment().parse(plain)
    assert {node.name for node in tree.find_all(jinja2.nodes.Filter)} <= SHARED_FILTERS
    assert {node.name for node in tree.find_all(jinja2.nodes.Test)} <= SHARED_TESTS
    calls = [node.node for node in tree.find_all(jinja2.nodes.Call)]
    methods = {node.attr for node in calls if isinstance(node, jinja2.nodes.Getattr)}
    assert methods <= SHARED_METHODS
    # In llama.cpp an escape is one letter.
    assert set(re.findall(r"\\(.)", template)) <= set("\\ntr'")


# Renders [template, [values, ...]] from standard input; a case that is refused gives null.
NPM_RENDERER = """
const {Template} = require("@huggingface/jinja");
const [template, cases] = JSON.parse(require("fs").readFileSync(0));
const renderer = new Template(template);
const render = (values) => { try { return renderer.render(values); } catch { return null; } };
console.log(JSON.stringify(cases.map(render)));
"""


def test_the_npm_package_renders_the_same(conversation: Any) -> None:
    """NODE_PATH names the node_modules with @huggingface/jinja; see docs/evaluation.md."""
    node = shutil.which("node")
    probe = [str(node), "-e", "require('@huggingface/jinja')"]
    if node is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("needs node, and @huggingface/jinja in NODE_PATH")
    values = {"items": "大'阪\n\\", "days": [1.5, None, True], "more": {"a": '"', "b": {}}}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": values}}]}
    user = {"role": "user", "content": "people <|user|> sop eop sopsop 1sop _eop </s>"}
    parts = {"role": "developer", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}
    cases = [
        {"messages": conversation}, {"messages": [*conversation, user]},
        {"messages": [parts, user, {**call, "content": "c"}, {"role": "tool", "content": "12"}]},
        {"messages": [user, call], "tools": [{"name": "f", "parameters": {"type": "object"}}]},
        {"messages": [{"role": "moderator", "content": "x"}]}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    ]  # fmt: skip
    sources = [Source("ja", f"{DATA}/{name}_sft.jsonl.gz") for name in ("train", "heldout")]
    for source in sources:
        cases += [{"messages": messages} for messages in SourceReader().conversations(source)]
    cases += [case | {"add_generation_prompt": True} for case in cases]
    template = compile_template(tokenizer_files.CHAT_TEMPLATE)

    def render(values: Any) -> str | None:
        try:
            return template.render(**values)
        except jinja2.TemplateError:
            return None

    given = json.dumps([tokenizer_files.CHAT_TEMPLATE, cases])
    command = [node, "-e", NPM_RENDERER]
    said = subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout
    rendered = json.loads(said)
    assert rendered == [render(case) for case in cases]
    assert rendered.count(None) == 6


def test_parts_of_text_are_one_text(fast: Any, encoder: Any) -> None:
    parts = [
        {"type": "text", "text": "東京"},
        {"text": "です"},
        {"type": "input_text", "text": "。"},
    ]
    messages = [{"role": "user", "content": parts}]
    ids = template_ids(fast, [{"role": "user", "content": "東京です。"}])
    assert template_ids(fast, messages) == ids
    assert (
        template_ids(fast, read_messages([*messages, {"role": "assistant", "content": "x"}])[:1])
        == ids
    )
    for part in ({"type": "image"}, {"type": "image", "text": "x"}, {"type": "text"}, "x", 5):
        with pytest.raises(Exception, match="a message has a part that is not text"):
            template_ids(fast, [{"role": "user", "content": [*parts, part]}])


@pytest.mark.parametrize("content", [None, 5, {"type": "text", "text": "x"}])
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
