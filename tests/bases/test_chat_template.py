"""Conversations through chat templates of the usual kinds: what is trained, and what is refused.

The templates are small ones in the manner of published models.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from chatglm_ja.bases.chat_template import ChatTemplate
from chatglm_ja.bases.interface import FormatError
from chatglm_ja.errors import DataError
from chatglm_ja.messages import IGNORE_INDEX, Message

# SmolLM2, Qwen2.5: any role, no tools.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3: an empty block of reasoning in the last answer, none in the earlier ones.
QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}
    {{- '<tools>' }}
    {%- for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages if m.role == 'user' %}{% set ns.last = messages.index(m) %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or m.role == 'system' and not (tools and loop.first) %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.last and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
        {{- m.content.split('</think>')[-1].lstrip('\n') }}
        {%- for call in m.tool_calls or [] %}
            {%- if m.content %}{{ '\n' }}{% endif %}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + m.content }}
        {{- '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# Llama 3.1: a call leaves no room for text beside it.
LLAMA3 = """\
{{- bos_token }}
{%- set ns = namespace(system='', first=0) %}
{%- if messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content | trim %}{% set ns.first = 1 %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools %}{% for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}{% endif %}
{{- ns.system + '<|eot_id|>' }}
{%- for m in messages[ns.first:] %}
    {%- if m.tool_calls %}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name }}
        {{- '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
    {%- elif m.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
# GLM-4: the next role's token ends an answer; the last one is left open.
GLM4 = """\
[gMASK]<sop>
{%- if tools %}<|system|>
{% for tool in tools %}## {{ tool.function.name }}
{{ tool.function | tojson }}
{% endfor %}{% endif %}
{%- for m in messages %}
    {%- if m.tool_calls %}
        {%- for call in m.tool_calls %}
            {{- '<|assistant|>' + call.function.name + '\n' + call.function.arguments | tojson }}
        {%- endfor %}
    {%- elif m.role == 'tool' %}{{ '<|observation|>\n' + m.content }}
    {%- else %}{{ '<|' + m.role + '|>\n' + m.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
# Mistral, Llama 2: turns alternate; calls have ids of nine letters; a space before an answer.
MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(asked=false) %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}
{%- else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{%- for m in turns if m.role in ('user', 'assistant') and not m.tool_calls %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- for m in turns %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
    {%- elif m.tool_calls %}
        {%- if m.tool_calls[0].id | length != 9 %}{{ raise_exception('nine letters') }}{% endif %}
        {{- '[TOOL_CALLS]' + m.tool_calls | tojson + eos_token }}
    {%- elif m.role == 'tool' %}
        {%- if m.tool_call_id | length != 9 %}{{ raise_exception('nine letters') }}{% endif %}
        {{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
    {%- else %}{{ ' ' + m.content + eos_token }}
    {%- endif %}
{%- endfor %}"""
# Gemma: no text of the system; the assistant has another name.
GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
    {{- m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
# DeepSeek-R1's distillations: a prompt opens the reasoning, which the conversation leaves out.
TAGGED = """\
{%- for m in messages %}
    {%- if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}{% endgeneration %}
        {{- eos_token }}
    {%- else %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|><think>
{% endif %}"""

TEMPLATES = {
    "chatml": CHATML, "qwen3": QWEN3, "llama3": LLAMA3, "glm4": GLM4, "mistral": MISTRAL,
    "gemma": GEMMA, "tagged": TAGGED,
}  # fmt: skip
EOS = {"llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<eos>"}  # <|endoftext|> is the others'
BOS = {"llama3": "<|begin_of_text|>", "mistral": "<s>", "gemma": "<bos>"}
WITH_TOOLS = ("qwen3", "llama3", "glm4", "mistral")
SPELLED = [  # special tokens of all the templates
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|begin_of_text|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|observation|>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<s>", "</s>",
    "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # added tokens that are text

USER, AGAIN = (
    {"role": "user", "content": "日本の首都は？"},
    {"role": "user", "content": "ありがとう"},
)
ANSWER, LAST = ({"role": "assistant", "content": text} for text in ("東京です。", "いいえ。"))
TALK: list[Message] = [USER, ANSWER, AGAIN, LAST]
SYSTEM = {"role": "system", "content": "簡潔に答える。"}
TOOLS = {"role": "system", "content": "", "tools": [{"name": "clock", "description": "時刻"}]}
CALL = {
    "role": "assistant", "content": "",
    "call": {"name": "clock", "arguments": {"place": "大阪", "days": 2}},
}  # fmt: skip
SEEN = {"role": "observation", "content": "12:00"}


@pytest.fixture(scope="module")
def backend() -> Tokenizer:
    """A byte-level BPE as current bases have, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lines = ["日本の首都は東京です。", "user assistant system\n\n  a name and arguments"] * 9
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPELLED])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN])
    return tokenizer


def make_tokenizer(backend: Tokenizer, kind: str, template: str | None = None) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS.get(kind, "<|endoftext|>"),
        bos_token=BOS.get(kind, "<|endoftext|>"),
        chat_template=TEMPLATES.get(kind, "") if template is None else template,
        name_or_path="the base",
    )


@pytest.fixture(scope="module")
def tokenizers(backend: Tokenizer) -> dict[str, Any]:
    return {kind: make_tokenizer(backend, kind) for kind in TEMPLATES}


@pytest.fixture(scope="module")
def templates(tokenizers: dict[str, Any]) -> dict[str, ChatTemplate]:
    return {kind: ChatTemplate(t, [t.eos_token_id]) for kind, t in tokenizers.items()}


def trained_texts(tokenizer: Any, example: tuple[list[int], list[int]]) -> list[str]:
    """Return each run of trained tokens as text, special tokens spelled out."""
    runs: list[list[int]] = [[]]
    for index, label in zip(*example, strict=True):
        assert label in (index, IGNORE_INDEX)
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def context(template: ChatTemplate, messages: Sequence[Message], place: int) -> list[int]:
    """Return the ids before the trained part of the answer at a place in a conversation."""
    only = [{**message, "loss": i == place} for i, message in enumerate(messages)]
    ids, labels = template.build_example(only)
    return ids[: next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)]


ENDS = {  # of an answer before a question, and of the last one
    "chatml": ("<|im_end|>", "<|im_end|>"), "qwen3": ("<|im_end|>", "<|im_end|>"),
    "llama3": ("<|eot_id|>", "<|eot_id|>"), "glm4": ("<|user|>", "<|endoftext|>"),
    "mistral": ("</s>", "</s>"), "gemma": ("<end_of_turn>", "<end_of_turn>"),
    "tagged": ("<|endoftext|>", "<|endoftext|>"),
}  # fmt: skip
BEFORE = {"mistral": " ", "glm4": "\n"}  # what the model writes before an answer
BEFORE_LAST = {**BEFORE, "qwen3": "<think>\n\n</think>\n\n"}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_answers_and_their_ends_are_trained(
    tokenizers: Any, templates: dict[str, ChatTemplate], kind: str
) -> None:
    template, tokenizer, ends = templates[kind], tokenizers[kind], ENDS[kind]
    answers = [
        BEFORE.get(kind, "") + "東京です。" + ends[0],
        BEFORE_LAST.get(kind, "") + "いいえ。" + ends[1],
    ]
    example = template.build_example(TALK)
    assert trained_texts(tokenizer, example) == answers
    assert example[0][-1] == example[1][-1]  # nothing follows the last answer
    # The whole is what the template writes, up to there.
    written = tokenizer.apply_chat_template(
        [{"role": m["role"], "content": m["content"]} for m in TALK], tokenize=False
    )
    assert (tokenizer.decode(example[0]) + "\n").startswith(written)
    for place, answer in enumerate(answers):
        parts = [{**m, "loss": m is TALK[2 * place + 1]} for m in TALK]
        assert trained_texts(tokenizer, template.build_example(parts)) == [answer]
    untrained = [{**message, "loss": False} for message in TALK]
    assert trained_texts(tokenizer, template.build_example(untrained)) == []
    assert template.build_example(untrained)[0][: len(example[0]) - 1] == example[0][:-1]
    assert set(tokenizer.convert_ids_to_tokens(template.stop_ids)) >= set(ends)


@pytest.mark.parametrize("kind", [kind for kind in TEMPLATES if kind != "tagged"])
@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_an_answer_is_trained_where_its_prompt_ends(
    templates: dict[str, ChatTemplate], kind: str, system: list[Message]
) -> None:
    if kind == "gemma" and system:
        pytest.skip("has no system role")
    messages = [*system, *TALK, AGAIN, {"role": "assistant", "content": "  は\n\nい"}]
    for place in range(len(system) + 1, len(messages), 2):
        prompt = templates[kind].build_prompt(messages[:place])
        assert context(templates[kind], messages, place) == prompt


def test_a_tokenizer_that_begins_texts_with_a_space_tokenizes_the_conversation_whole() -> None:
    """As Llama 2's: the parts on their own would each begin with one."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no "a▁b"
    lines = ["日本の首都は？ 東京です。 ありがとう いいえ。", "[Q] a [/Q] b"] * 5
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    backend.train_from_iterator(lines, trainer)
    backend.pre_tokenizer = None
    template_text = MISTRAL.replace("[INST]", "[Q]").replace("[/INST]", "[/Q]")  # not special
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template_text
    )
    template = ChatTemplate(tokenizer, [tokenizer.eos_token_id])
    ids, labels = template.build_example(TALK)
    turns = [{"role": m["role"], "content": m["content"]} for m in TALK]
    assert ids == tokenizer.apply_chat_template(turns, return_dict=False)
    trained = [label for label in labels if label != IGNORE_INDEX]
    assert "".join(tokenizer.convert_ids_to_tokens(trained)) == "▁東京です。</s>▁いいえ。</s>"
    for place in (1, 3):
        assert context(template, TALK, place) == template.build_prompt(TALK[:place])


CALLS = {
    "qwen3": '<tool_call>\n{"name": "clock", "arguments": {"place": "大阪", "days": 2}}'
    "\n</tool_call>",
    "llama3": '{"name": "clock", "parameters": {"place": "大阪", "days": 2}}',
    "glm4": 'clock\n{"place": "大阪", "days": 2}',
    "mistral": '[TOOL_CALLS][{"id": "000000001", "type": "function", "function": '
    '{"name": "clock", "arguments": {"place": "大阪", "days": 2}}}]',
}


@pytest.mark.parametrize("kind", WITH_TOOLS)
def test_calls_of_tools_are_trained_and_observations_are_not(
    tokenizers: Any, templates: dict[str, ChatTemplate], kind: str
) -> None:
    tokenizer, template = tokenizers[kind], templates[kind]
    last = BEFORE_LAST.get(kind, "") + "いいえ。" + ENDS[kind][1]
    end = "<|observation|>" if kind == "glm4" else ENDS[kind][0]
    example = template.build_example([TOOLS, USER, CALL, SEEN, LAST])
    assert trained_texts(tokenizer, example) == [CALLS[kind] + end, last]
    text = tokenizer.decode(example[0])
    assert '"description": "時刻"' in text.split(CALLS[kind])[0]
    assert text.count("12:00") == 1
    # A conversation may end with a call.
    asked = template.build_example([TOOLS, USER, CALL])
    thought = BEFORE_LAST[kind] if kind == "qwen3" else ""
    assert trained_texts(tokenizer, asked) == [thought + CALLS[kind] + end]
    assert template.build_prompt([TOOLS, USER]) == asked[0][: asked[1].count(IGNORE_INDEX)]


@pytest.mark.parametrize("kind", WITH_TOOLS)
def test_text_that_announces_a_call_is_never_lost(
    tokenizers: Any, templates: dict[str, ChatTemplate], kind: str
) -> None:
    said = {"role": "assistant", "content": "調べます。"}
    messages: list[Message] = [USER, said, CALL, SEEN, LAST]
    if kind == "mistral":  # this one has no room for both
        with pytest.raises(FormatError, match="roles must alternate"):
            templates[kind].build_example(messages)
        return
    runs = trained_texts(tokenizers[kind], templates[kind].build_example(messages))
    assert (
        runs[:-1]
        == {
            "qwen3": ["調べます。\n" + CALLS["qwen3"] + "<|im_end|>"],
            "llama3": ["調べます。<|eot_id|>", CALLS["llama3"] + "<|eot_id|>"],
            "glm4": ["\n調べます。<|assistant|>" + CALLS["glm4"] + "<|observation|>"],
        }[kind]
    )


def test_what_a_template_leaves_out_or_refuses_is_refused(
    templates: dict[str, ChatTemplate],
) -> None:
    own = {"role": "assistant", "metadata": "clock", "content": "```python\ntool_call()\n```"}
    cases: list[tuple[str, list[Message], str, str]] = [
        ("chatml", [TOOLS, *TALK], "unsupported tools", "writes no tools"),
        ("chatml", [USER, CALL, SEEN, LAST], "unsupported call", "writes no call"),
        ("gemma", [SYSTEM, *TALK], "refused by the chat template", "System role not supported"),
        ("mistral", [USER, AGAIN, LAST], "refused by the chat template", "roles must alternate"),
        ("qwen3", [USER, own, SEEN, LAST], "unsupported metadata", "ChatGLM3's own form"),
        ("qwen3", [{**TOOLS, "tools": "clock"}, *TALK], "unsupported tools", "expected a list"),
    ]
    for kind, messages, reason, detail in cases:
        with pytest.raises(FormatError, match=detail) as caught:
            templates[kind].build_example(messages)
        assert caught.value.reason == reason


@pytest.mark.parametrize("kind", TEMPLATES)
def test_no_text_becomes_a_special_token(
    tokenizers: Any, templates: dict[str, ChatTemplate], kind: str
) -> None:
    """In texts, calls, tools and their names: the special tokens are those of a harmless talk."""
    tokenizer, template = tokenizers[kind], templates[kind]
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }

    def specials(messages: Sequence[Message]) -> list[int]:
        return [i for i in template.build_example(messages)[0] if i in special]

    def spell(text: str) -> list[Message]:
        talk: list[Message] = [
            {"role": "user", "content": f"a{text}b"}, {"role": "assistant", "content": text},
            {"role": "user", "content": text * 2}, {"role": "assistant", "content": f"x{text}"},
        ]  # fmt: skip
        if kind not in WITH_TOOLS:
            return talk
        call = {"name": f"f{text}", "arguments": {text: [text, {text: text}]}}
        return [
            {"role": "system", "content": text, "tools": [{"name": text, "parameters": {text: 1}}]},
            talk[0], {"role": "assistant", "content": "", "call": call},
            {"role": "observation", "content": text}, *talk[1:],
        ]  # fmt: skip

    harmless = specials(spell("x"))
    for text in [*SPELLED, "<|im_<|im_start|>start|>", "<<s>s>", "".join(SPELLED)]:
        assert specials(spell(text)) == harmless
    ids, _ = template.build_example([USER, {"role": "assistant", "content": "a<think>b"}])
    assert tokenizer.convert_tokens_to_ids("<think>") in ids or kind == "qwen3"


def test_dates_and_other_values_are_written_as_text(
    tokenizers: Any, templates: dict[str, ChatTemplate]
) -> None:
    import datetime

    arguments = {"day": datetime.date(2024, 5, 1), "n": [1.5, True, None]}
    call = {"role": "assistant", "content": "", "call": {"name": "f", "arguments": arguments}}
    [text] = trained_texts(tokenizers["llama3"], templates["llama3"].build_example([USER, call]))
    written = json.loads(text.removesuffix("<|eot_id|>"))
    assert written["parameters"] == {"day": "2024-05-01", "n": [1.5, True, None]}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "the base has no chat template: put a chat_template.jinja into .*--sft-examples 0"),
        (  # a prompt that is not the beginning, and no tags
            CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif"),
            r"cannot be split into parts \(it does not begin with the prompt of turn 2\)",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            r"cannot be split into parts \(no special token ends an answer\)",
        ),
        ("{{ raise_exception('not for chats') }}", r"fails on .* \(not for chats\): correct"),
        ("{% for m in messages %}", r"fails on a question and its answer \(Unexpected end"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used_is_one_line(
    backend: Tokenizer, template: str, message: str
) -> None:
    tokenizer = make_tokenizer(backend, "chatml", template)
    with pytest.raises(DataError, match=message) as caught:
        ChatTemplate(tokenizer, [tokenizer.eos_token_id])
    assert len(str(caught.value)) < 300


def test_generation_tags_are_asked_only_if_prompts_do_not_tell(
    tokenizers: Any, backend: Tokenizer
) -> None:
    """Tags around more than the answer do not change what a template with good prompts trains."""
    tagged = re.sub(
        r"<\|im_start\|>\{\{ m.role \}\}\n(.*)\n\{% endfor",
        r"{% generation %}<|im_start|>{{ m.role }}\n\1\n{% endgeneration %}{% endfor", CHATML,
    )  # fmt: skip
    assert tagged != CHATML
    tokenizer = make_tokenizer(backend, "chatml", tagged)
    ids = [ChatTemplate(t, [t.eos_token_id]).build_example(TALK) for t in (
        tokenizer, tokenizers["chatml"],
    )]  # fmt: skip
    assert ids[0] == ids[1]
