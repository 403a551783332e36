"""Tiny models of the architectures that people use, with random weights, and bases made of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

# Of each architecture what sets it apart: tied embeddings (qwen3, gpt2), norms of queries and keys
# (qwen3), a fused MLP and rotation of half of a head (glm), absolute positions and transposed
# matrices (gpt2).
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 96, "tie_word_embeddings": False},
    "qwen3": {
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "glm": {
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "head_dim": 16,
        "attention_bias": True,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    },
    "gpt2": {"n_inner": 96, "tie_word_embeddings": True},
}


def make_tiny(kind: str, folder: Path, vocab_size: int = 320, **changes: Any) -> Path:
    """Save a model of two layers in float32 to `folder`, and return it.

    `kind` is a key of SIZES, or another model type of transformers with its sizes in `changes`.
    """
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "vocab_size": vocab_size,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(kind, **sizes | SIZES.get(kind, {}) | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # biases and norms would be zeros and ones
        parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder)
    return folder


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GLM_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}"
    "<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Of each kind: the special tokens, the document's start, eos_token, and the chat template.
TOKENIZERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str, str]] = {
    "llama": (
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
         "<|eot_id|>"),
        ("<|begin_of_text|>",), "<|eot_id|>", LLAMA_TEMPLATE,
    ),
    "qwen3": (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), (), "<|im_end|>", CHATML),
    "glm": (
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>",
         "<|observation|>"),
        ("[gMASK]", "<sop>"), "<|endoftext|>", GLM_TEMPLATE,
    ),
    "gpt2": (
        ("<|endoftext|>",), (), "<|endoftext|>", CHATML.replace("<|im_end|>", "<|endoftext|>"),
    ),
}  # fmt: skip


def make_base(kind: str, folder: Path, lines: Iterable[str], **changes: Any) -> Path:
    """Save a tiny base of a kind of TOKENIZERS to `folder`: the model, and a BPE on bytes.

    The BPE is trained on `lines`. As the published ones are: Llama's takes whole words of the
    vocabulary first and has its special tokens outside of it, Qwen's normalizes text to NFC.
    """
    special, start, eos, template = TOKENIZERS[kind]
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen3":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens(list(special))
    ids = [(token, tokenizer.token_to_id(token)) for token in special]
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*start, "$A"]), special_tokens=ids
        )
    auto = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, chat_template=template,
        bos_token=start[0] if kind == "llama" else None,
    )  # fmt: skip
    auto.save_pretrained(folder)
    eos_id = dict(ids)[eos]
    sizes = {"vocab_size": len(auto) + 3, "bos_token_id": eos_id, "eos_token_id": eos_id}
    return make_tiny(kind, folder, **sizes | changes)
