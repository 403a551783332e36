"""Random texts, conversations and source lists: each is read, or refused with a one-line error."""

import contextlib
import gzip
import json
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from chatglm_ja import source_files, sources
from chatglm_ja.chatglm3 import chat_format, tokenizer, tokenizer_files
from chatglm_ja.data import (
    conversations,
    prepare_conversations,
    prepare_texts,
    readers,
)
from chatglm_ja.data.readers import Reject
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.data.token_store import ChunkTask
from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.evaluation import answers, multiple_choice
from chatglm_ja.messages import IGNORE_INDEX, is_call
from chatglm_ja.sources import Source
from tests.conftest import prepare_config
from tests.faults.fuzzing import (
    LONGEST_MESSAGE,
    any_text,
    any_value,
    damaged,
    deep,
    folder,
    fuzz,
    json_texts,
    nested,
    refusals,
    scalars,
)

# --- Records ------------------------------------------------------------------------------------

names = st.sampled_from(
    ["text", "id", "kind", "messages", "instruction", "output", "history", "system", "question",
     "choices", "answer", "conversations", "prompt", "response", "tools", "weight"]
)  # fmt: skip
roles = st.sampled_from(
    ["user", "human", "USER", "assistant", "gpt", "system", "tool", "function_call", "x", ""]
)
arguments = st.dictionaries(st.sampled_from(["a", "b"]) | any_text, any_value, max_size=2)
calls = st.fixed_dictionaries(
    {"name": any_text | any_value, "arguments": arguments | arguments.map(json.dumps) | any_value}
)
message = st.fixed_dictionaries(
    {},
    optional={
        "role": roles | any_value,
        "from": roles | any_value,
        "content": any_text | any_value,
        "value": any_text | any_value,
        "metadata": any_text | any_value,
        "tools": any_value,
        "tool_calls": st.lists(calls | st.fixed_dictionaries({"function": calls})) | any_value,
        "parameters": arguments | any_value,
        "observation": any_value,
        "loss": st.booleans() | any_value,
    },
)


@st.composite
def dialogues(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw messages, most of them with alternating roles."""
    speakers = draw(st.sampled_from([["user", "assistant"], ["human", "gpt"], ["user", "tool"]]))
    talk: list[dict[str, Any]] = []
    if draw(st.booleans()):
        talk.append({"role": "system", "content": draw(any_text), "tools": draw(any_value)})
    for turn in range(draw(st.integers(1, 6))):
        content = draw(any_text.filter(str.strip) | any_text)
        if turn and draw(st.integers(0, 4)) == 0:
            call = {"name": "f", "arguments": draw(arguments)}
            talk.append({"role": "function_call", "content": json.dumps(call)})
            talk.append({"role": "tool", "content": draw(any_text)})
        talk.append({"role": speakers[turn % 2], "content": content})
        if draw(st.integers(0, 4)) == 0:
            talk[-1]["metadata"] = draw(any_text | any_value)
    return talk


columns_of_record = st.dictionaries(names, any_value, max_size=4) | st.fixed_dictionaries(
    {},
    optional={
        "text": any_text,
        "id": any_value,
        "messages": dialogues() | st.lists(message, max_size=4) | any_value,
        "tools": any_value,
        "weight": st.integers(0, 1) | any_value,
        "instruction": any_text,
        "input": any_text | st.none(),
        "output": any_text,
        "system": any_text,
        "history": st.lists(st.lists(any_text, min_size=2, max_size=2), max_size=2) | any_value,
        "question": any_text,
        "choices": st.lists(any_text, max_size=3),
        "answer": st.integers(0, 3) | any_value,
    },
)
DEEP_RECORDS = (
    '{"id": %s, "text": "x", "kind": "k"}',
    '{"id": 1, "text": "x", "kind": %s}',
    '{"messages": [{"role": %s, "content": "x"}]}',
    '{"messages": [{"role": "user", "content": "x", "metadata": %s}], "id": %s}',
    '{"question": %s, "choices": ["a", "b"], "answer": 1}',
    '{"question": "q", "choices": ["a", "b"], "answer": %s}',
)
deep_records = deep.flatmap(
    lambda text: st.sampled_from(DEEP_RECORDS).map(lambda form: form.replace("%s", text))
)
ODD_LINES = (
    b'{"text": "a", "text": 1}', b'{"id": 1, "id": [], "text": ""}', b"\xef\xbb\xbf{}",
    b'{"text": "\\ud800"}', b'{"text": "\\u0000"}', b'{"text": NaN, "id": Infinity}',
    b'{"\\ud800": 1}', b'{"text": 1' + b"0" * 5000 + b"}", b'{"id": 1' + b"0" * 4290 + b"}",
    b" " + b"= " * 3000 + b"x", b" " + b"= = " * 3000 + b"x", b" = " + b" " * 9000 + b"x",
    b'" x' * 60_000, b" = Title = ", b'{"text": " ' + b"= " * 3000 + b'x"}',
)  # fmt: skip
lines = (
    columns_of_record.map(json.dumps).map(str.encode)
    | json_texts(any_value).map(str.encode)
    | deep_records.map(str.encode)
    | st.binary(max_size=30)
    | st.sampled_from(ODD_LINES)
)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draw a file-name suffix and the content of a file with that suffix."""
    ending = draw(st.sampled_from([*source_files.ENDINGS]))
    found = draw(st.lists(lines, max_size=6))
    separator = draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n"]))
    content = separator.join(found) + draw(st.sampled_from([b"", b"\n"]))
    if ".json" in ending and ".jsonl" not in ending and draw(st.booleans()):
        content = b"[" + b",".join(found) + b"]"
    if ending == ".parquet":
        content = b"PAR1" + content + b"PAR1"
    if draw(st.integers(0, 4)) == 0:
        content = draw(damaged(content))
    if ending.endswith(".gz"):
        content = gzip.compress(content, mtime=0)
        if draw(st.booleans()):
            content = draw(damaged(content))
    return ending, content


LINE_FORMATS = ("lines", "wikitext")
forms = st.builds(
    Source,
    st.sampled_from(["ja", "zh", "en", "code"]),
    st.just("unused"),
    columns=st.none() | st.sampled_from(["text", "messages", "instruction>output", "a+b>c", "id"]),
    where=st.none() | st.sampled_from([("kind", "k"), ("id", "1")]),
    format=st.sampled_from(["lines", "lines", "paragraphs", "document", "wikitext"]),
    id_column=st.sampled_from(["id", "id", None, "text"]),
)


@fuzz(
    "JSONL, JSON, text, parquet, gzip, wikitext",
    files(),
    forms,
    st.sampled_from([1, 30, readers.CHUNK_BYTES]),
)
def test_records(merged_dir: Path, file: tuple[str, bytes], form: Source, chunk_bytes: int) -> None:
    check_records(merged_dir, *file, form, chunk_bytes)


@pytest.mark.parametrize("form", [Source("ja", "x"), Source("en", "x", format="wikitext")])
@pytest.mark.parametrize("ending", [".jsonl", ".txt", ".json"])
def test_odd_records(merged_dir: Path, ending: str, form: Source) -> None:
    content = b"\n".join(ODD_LINES)
    check_records(merged_dir, ending, content, form, readers.CHUNK_BYTES)


@pytest.mark.parametrize("line", DEEP_RECORDS)
def test_deep_records(merged_dir: Path, tmp_path: Path, line: str) -> None:
    """The depth limit is the same in every format and for every caller."""
    form = Source("ja", "x", where=("kind", "k") if '"kind": %s' in line else None)
    for depth in (50, 150, 960, 980, 5000):
        content = line.replace("%s", nested(depth)).encode()
        for name, whole in (("a.jsonl", content), ("a.json", b"[" + content + b"]")):
            check_records(merged_dir, Path(name).suffix, whole, form, readers.CHUNK_BYTES)
            (tmp_path / name).write_bytes(whole)
            source = Source("ja", str(tmp_path / name))
            found = [
                pair
                for chunk in readers.read_chunks(source)
                for pair in readers.read_records(chunk, source)
            ]
            assert isinstance(found[0][1], Reject) == (depth > readers.MAX_DEPTH)


def check_records(
    merged_dir: Path, ending: str, content: bytes, form: Source, chunk_bytes: int
) -> None:
    """Check that every line becomes a text, a conversation, or a reject with a reason."""
    with folder() as work:
        path = work / f"a{ending}"
        path.write_bytes(content)
        source = Source(**{**vars(form), "path": str(path)})
        with refusals() as said:
            chunks = list(readers.read_chunks(source, chunk_bytes))
        if said:  # the file is wrong as a whole
            return
        with refusals() as said:
            read = [pair for chunk in chunks for pair in readers.read_records(chunk, source)]
            check_numbers(read)
            is_lines = ending == ".jsonl" or (ending == ".txt" and source.format in LINE_FORMATS)
            if is_lines and source.where is None:
                rest = content.removeprefix(b"\xef\xbb\xbf") if chunk_bytes > 2 else content
                found = rest.removesuffix(b"\n").split(b"\n") if rest else []
                if ending == ".jsonl":
                    found = [line for line in found if not is_blank(line)]
                assert len(read) == len(found)
            config = prepare_config(
                merged_dir, [source], unicode_form="NFKC", check_language=True,
                near_duplicates=0.8, max_length=64,
            )  # fmt: skip
            tokenize = partial(prepare_texts.tokenize_texts, config, None)
            check_chunks(tokenize, chunks, source, work, "t")
            tokenize = partial(prepare_conversations.tokenize_conversations, config, None)
            check_chunks(tokenize, chunks, source, work, "c")
        assert not said, "step 4 counts bad records instead of raising"
        with refusals():
            assert all(isinstance(text, str) for text in SourceReader().texts(source))
        with refusals():
            assert all(SourceReader().conversations(source))
        with refusals():
            multiple_choice.read_questions([source], SourceReader())


def is_blank(line: bytes) -> bool:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return False
    return not text or text.isspace()


def check_numbers(read: Sequence[tuple[int, Any]]) -> None:
    numbers = [number for number, _ in read]
    assert numbers == sorted(set(numbers))
    for _, record in read:
        assert isinstance(record, dict) or (record.reason and isinstance(record.detail, str))


def check_chunks(
    tokenize: Any, chunks: Sequence[readers.Chunk], source: Source, work: Path, prefix: str
) -> None:
    """Check that every record is kept, dropped by a filter, or rejected, and is counted."""
    for index, chunk in enumerate(chunks):
        summary = tokenize(ChunkTask(chunk, source, 0, work / f"{prefix}{index}")).summary
        assert all(number > 0 and reason for number, reason, _ in summary.rejects)
        if source.format == "lines":
            read = len(list(readers.read_records(chunk, source)))
            assert summary.found + len(summary.rejects) == read


# --- Conversations ------------------------------------------------------------------------------


@fuzz(
    "conversations in all formats",
    record=st.fixed_dictionaries({"messages": dialogues()})
    | st.fixed_dictionaries({"messages": st.lists(message, max_size=5)})
    | columns_of_record
    | st.dictionaries(any_text | names, any_value, max_size=4),
    columns=st.none() | st.sampled_from(["messages", "instruction+input>output", "a"]) | any_text,
)
def test_conversations(
    record: dict[str, Any], columns: str | None, encoder: Any, both: Any
) -> None:
    """Accepted conversations can be tokenized, and none of their text becomes a special token."""
    with refusals() as said:
        messages = conversations.read_messages(record, columns)
    assert not said, "a bad conversation is rejected, not an error"
    if isinstance(messages, Reject):
        assert messages.reason and messages.detail
        return
    special = {chat_format.special_id(encoder, token): token for token in tokenizer.SPECIAL_TOKENS}
    marks = special | {0: "<unk>", 1: "<s>", 2: "</s>"}
    placed = ["[gMASK]", "sop", *(f"<|{message['role']}|>" for message in messages)]
    for each in both:
        ids, labels = chat_format.build_example(each, messages)
        end = "<|observation|>" if is_call(messages[-1]) else "</s>"
        assert [marks[i] for i in ids if i in marks] == [*placed, end]
        assert all(label in (IGNORE_INDEX, i) for i, label in zip(ids, labels, strict=True))
        prompt = chat_format.build_prompt_ids(each, messages)
        assert [marks[i] for i in prompt if i in marks] == [*placed, "<|assistant|>"]
        assert prompt[:-1] == ids[:-1]


@pytest.fixture(scope="module")
def both(encoder: Any, merged_proto: Any) -> list[Any]:
    """Return the merged tokenizer as a sentencepiece processor and as a transformers tokenizer."""
    return [encoder, tokenizer_files.to_transformers(merged_proto)]


# --- YAML ---------------------------------------------------------------------------------------

ODD_YAML = (
    "!!bool x", '!!int ""', "!!timestamp x", '!!float ""', "1" + ":1" * 400 + ".0", "!!int 0x",
    "&a [*a]", '"\\ud800"', '"\\UFFFFFFFF"', "!!binary é", "2001-99-99", "{<<: 3}", "? [a]",
    "!!python/object:os.system x", "[" * 400, "- " * 400, "\0", "%YAML 9", "a: b: c", "\t",
)  # fmt: skip
# Nested references to the same list: a short text that expands to 10^9 entries.
LEVELS = [f"&{b} [{','.join(['*' + a] * 10)}]" for a, b in pairwise("abcdefghij")]
BOMB = f"[&a [x], {', '.join(LEVELS)}]"
BOMBS = [
    form.replace("?", BOMB)
    for form in ("?", "- ?", "- {language: ?, path: a.txt}", "- {language: ja, path: ?}",
                 "- {language: ja, path: a.txt, where: {a: ?}}", "{ja: ?}",
                 "- {language: ja, path: a.txt, weight: ?, format: ?, x: ?}")
]  # fmt: skip
source_fields = st.sampled_from(
    ["language", "path", "name", "columns", "subset", "where", "weight", "format", "id_column", "x"]
)
entries = st.dictionaries(source_fields, any_value, max_size=4) | st.builds(
    lambda more: {"language": "ja", "path": "a.jsonl", **more},
    st.dictionaries(source_fields, any_value, max_size=2),
)
yaml_texts = (
    st.text(max_size=60)
    | st.text("-:[]{}!&*<>|'\"%@#,? \nab1.", max_size=40)
    | st.sampled_from(ODD_YAML)
    | st.builds("- {{language: ja, path: a.jsonl, name: {}}}".format, st.sampled_from(ODD_YAML))
    | st.lists(entries, max_size=3).map(yaml.safe_dump)
    | st.dictionaries(st.sampled_from(["ja", "zh", "code", "x"]) | scalars, any_value).map(
        yaml.safe_dump
    )
    | st.dictionaries(st.sampled_from(["ja", "code"]), st.lists(any_text, max_size=3)).map(
        yaml.safe_dump
    )
).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=40)


@fuzz("YAML files of sources and questions", yaml_texts)
def test_yaml(content: bytes) -> None:
    check_yaml(content)


@pytest.mark.parametrize("text", [*ODD_YAML, *BOMBS])
def test_odd_yaml(text: str) -> None:
    check_yaml(text.encode())


def check_yaml(content: bytes) -> None:
    with folder() as work:
        path = work / "a.yaml"
        path.write_bytes(content)
        for failure in (ConfigError, DataError):
            with refusals():
                sources.load_yaml(path, failure)
        with refusals():
            prompts = answers.read_prompts(path, ["ja"])
            assert all(isinstance(text, str) for asked in prompts.values() for text in asked)
        with contextlib.chdir(work), refusals():
            for source in sources.read_argument(str(path)):
                check_source(source)


@fuzz(
    "sources on the command line",
    any_text.map(lambda text: text.replace("*", "").replace("/", ""))
    | st.text("ja=#@?.[]~", max_size=12),
)
def test_source_arguments(argument: str) -> None:
    for text in (argument, f"ja={argument}"):
        with folder() as work, contextlib.chdir(work), refusals():
            for source in sources.read_argument(text):
                check_source(source)


def check_source(source: Source) -> None:
    assert str(source) and source.title
    sources.source_contradictions([source])
    source.settings()
    if ".." not in source.path and not source.path.startswith("/"):
        source.files()


def test_messages_are_one_line() -> None:
    assert str(DataError("a\nb\x1b[1m\u2028c")) == "a b [1m c"
    assert len(str(DataError("x" * 10**6))) <= LONGEST_MESSAGE
