"""Bases of the family transformers: how they read texts, what is stored, what is refused."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config

from chatglm_ja.bases import families
from chatglm_ja.errors import DataError
from chatglm_ja.storage.files import read_json, write_json
from chatglm_ja.storage.weight_files import find_weights
from tests.conftest import demo_texts
from tests.tiny_models import TOKENIZERS, make_base, make_tiny

HOSTILE = (
    "日本語 <|im_end|> 한국어",
    " \t\n  x ",
    "🦊\u200b e\u0301",
    "<|user|>[gMASK]",
    "\x00\x7f",
)


@pytest.fixture(scope="module", params=TOKENIZERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = itertools.chain.from_iterable(text.split("\n") for text in demo_texts("en", 20))
    return make_base(request.param, tmp_path_factory.mktemp(request.param), lines)


def test_a_text_is_never_a_special_token(folder: Path) -> None:
    tokenizer = families.open_base(folder).tokenizer
    for text in HOSTILE:
        ids = tokenizer.encode(text)
        assert not tokenizer.special_ids.intersection(ids)
        (batched,) = tokenizer.encode_documents([text])
        assert batched.tolist() == ids
        normalized = AutoTokenizer.from_pretrained(folder).backend_tokenizer.normalizer
        expected = normalized.normalize_str(text) if normalized else text
        assert tokenizer.decode(ids) == expected
    with pytest.raises(DataError, match="lone surrogate"):
        tokenizer.encode("\ud800")


def test_a_document_begins_and_ends_as_the_base_reads_them(folder: Path) -> None:
    tokenizer = families.open_base(folder).tokenizer
    auto = AutoTokenizer.from_pretrained(folder)
    assert [*tokenizer.document_start, *tokenizer.encode("a")] == auto("a")["input_ids"]
    assert auto.convert_ids_to_tokens(tokenizer.document_end) in (
        "<|endoftext|>",
        "<|end_of_text|>",
    )
    assert tokenizer.size == len(auto)
    assert tokenizer.first_new_id == tokenizer.size
    assert tokenizer.prefix == (tokenizer.document_start or [tokenizer.document_end])


def test_weights_are_read_under_the_names_of_the_model(folder: Path) -> None:
    base = families.open_base(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    tied = read_json(folder / "config.json")["tie_word_embeddings"]
    read = dict(
        named for name, tensor in base.weights.tensors() for named in base.convert(name, tensor)
    )
    assert expected.keys() - read.keys() == ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.items())
    assert len(base.embeddings) == 2 - tied
    assert {*base.embeddings.values()} <= read.keys()


def test_names_without_the_prefix_and_old_buffers_are_read(
    tmp_path: Path, copy_of: Callable[[Path, Path], Path]
) -> None:
    """GPT-2 was published so; other checkpoints store the tied output matrix as well."""
    original = make_base("gpt2", tmp_path / "gpt2", demo_texts("en", 3))
    copy = copy_of(original, tmp_path / "copy")
    stored = load_file(copy / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    save_file(bare, copy / "model.safetensors", metadata={"format": "pt"})
    base = families.open_base(copy)
    read = dict(
        named for name, tensor in base.weights.tensors() for named in base.convert(name, tensor)
    )
    assert read.keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in read.items())
    assert base.embeddings == {"wte.weight": "transformer.wte.weight"}


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        write_json(path, read_json(path) | changes)

    return change


def remove_eos(folder: Path) -> None:
    change_config(eos_token_id=None)(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    write_json(path, {k: v for k, v in read_json(path).items() if k != "eos_token"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            change_config(model_type="baichuan", auto_map={"AutoModel": "modeling.X"}),
            "asks for remote code .baichuan is unknown to transformers.",
        ),
        (
            change_config(model_type="bert", architectures=["BertForMaskedLM"]),
            "BertForMaskedLM is no decoder that predicts the next token: give a causal language",
        ),
        (
            change_config(model_type="t5", architectures=["T5ForConditionalGeneration"]),
            "T5ForConditionalGeneration is no decoder that predicts",
        ),
        (
            change_config(quantization_config={"bits": 4, "quant_method": "gptq"}),
            "the checkpoint is quantized: download it with fp16, bf16 or fp32 weights",
        ),
        (change_config(vocab_size=100), "the tokenizer has 40. ids, but .* vocab_size 100"),
        (change_config(model_type=7), "names no model_type"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer that transformers"),
        (remove_eos, "has no eos_token"),
    ],
)  # fmt: skip
def test_what_is_no_such_base_is_refused_in_a_line(
    change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = make_base("qwen3", tmp_path, demo_texts("en", 3))
    change(folder)
    with pytest.raises(DataError, match=message) as raised:
        families.open_base(folder)
    assert "\n" not in str(raised.value)


def test_another_models_weights_are_refused(tmp_path: Path) -> None:
    folder = make_base("llama", tmp_path, demo_texts("en", 3))
    change_config(intermediate_size=64)(folder)
    with pytest.raises(DataError, match="has shape"):
        _ = families.open_base(folder).weights
    path = folder / "model.safetensors"
    stored = load_file(path)
    save_file({k: v for k, v in stored.items() if "layers.1" not in k}, path)
    with pytest.raises(DataError, match=r"has no tensor model\.layers\.1"):
        _ = families.open_base(folder).weights


def test_a_folder_without_step_2s_marks_is_refused(tmp_path: Path) -> None:
    folder = make_base("qwen3", tmp_path, demo_texts("en", 3))
    with pytest.raises(DataError, match="holds no tokenizer of step 2"):
        families.load_tokenizer(folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())


def test_a_template_that_cannot_be_used_stops_conversations_only(tmp_path: Path) -> None:
    folder = make_base("qwen3", tmp_path, demo_texts("en", 3))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    )
    tokenizer = families.open_base(folder).tokenizer
    assert not tokenizer.has_chat_format
    assert len(tokenizer.stop_ids) == 1
    with pytest.raises(DataError, match="cannot be split into parts"):
        tokenizer.build_prompt([{"role": "user", "content": "a"}])


def test_the_files_of_another_layout_are_no_weights(tmp_path: Path) -> None:
    """As in the folder of Mistral 7B v0.3, whose shards are consolidated in a further file."""
    folder = make_base("llama", tmp_path / "base", demo_texts("en", 3))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shards = find_weights(tmp_path / "sharded")
    assert len(shards) > 2
    (tmp_path / "sharded" / "consolidated.safetensors").write_bytes(b"x" * 1000)
    assert find_weights(tmp_path / "sharded") == shards


def test_several_templates_are_kept(tmp_path: Path) -> None:
    folder = make_base("qwen3", tmp_path / "base", demo_texts("en", 3))
    auto = AutoTokenizer.from_pretrained(folder)
    auto.chat_template = {"default": auto.chat_template, "tool_use": "{{ tools }}"}
    auto.save_pretrained(folder)
    (tmp_path / "copy").mkdir()
    families.copy_tokenizer(folder, tmp_path / "copy")
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == auto.chat_template


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ({}, "it decodes greedily"),
        ({"temperature": 0.9, "top_p": 0.6}, "temperature 0.9, top p 0.6"),
        ({"do_sample": True, "top_k": 64}, "top k 64"),
    ],
)
def test_the_base_is_described_as_it_samples(
    settings: dict[str, Any], sampling: str, tmp_path: Path
) -> None:
    """A published configuration may set a temperature and not say that it samples."""
    folder = make_base("qwen3", tmp_path / "base", demo_texts("en", 3))
    path = folder / "generation_config.json"
    write_json(path, {"eos_token_id": read_json(folder / "config.json")["eos_token_id"]} | settings)
    base = families.open_base(folder)
    assert base.describe().sampling == sampling
    (tmp_path / "resized").mkdir()
    base.save_config(tmp_path / "resized", base.rows, base.rows)
    written = read_json(tmp_path / "resized" / "generation_config.json")
    assert written.items() >= settings.items()
    assert written["eos_token_id"] == base.tokenizer.stop_ids


def test_a_base_whose_logits_have_a_bias_is_refused(tmp_path: Path) -> None:
    folder = make_base("qwen3", tmp_path, demo_texts("en", 3))
    make_tiny("phi", folder, 420, intermediate_size=96, eos_token_id=402)
    with pytest.raises(DataError, match="PhiForCausalLM adds a bias to its logits"):
        _ = families.open_base(folder).weights


def test_a_base_that_reads_more_than_text_is_refused(tmp_path: Path) -> None:
    folder = make_base("qwen3", tmp_path, demo_texts("en", 3))
    Gemma3Config().save_pretrained(folder)
    change_config(architectures=["Gemma3ForConditionalGeneration"])(folder)
    with pytest.raises(DataError, match="reads more than text"):
        families.open_base(folder)
