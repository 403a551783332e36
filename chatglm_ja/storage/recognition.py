"""Recognizing a folder that is not a whole checkpoint, by the names in it.

Other tools leave folders that look like a model: adapters, wrapped or quantized weights, training
states, half of a download. One table says what each gives away, and what to do.
"""

import re
from collections.abc import Iterable
from pathlib import Path

# By a pattern of the names of its tensors or files: what the folder is, and what to do. A tensor
# may be given with its dtype and shape. The first pattern that matches counts, so a wrapper comes
# after what it wraps.
MEANINGS = {
    r"(^|[._])(lora|ia3|oft|boft|vera|hada|lokr)_|\.(base_layer|modules_to_save|original_module)\."
    r"|^adapter_(model|config)": (
        "it is an adapter, or is not merged with one: merge it into its base (in PEFT with "
        "merge_and_unload) and give the result"
    ),
    r"(prefix|prompt)_encoder\.|^prompt_embeddings": (
        "it comes from P-Tuning, whose prefix cannot be merged into the weights: give the base "
        "that was tuned"
    ),
    r"\.(qweight|qzeros|scales|g_idx|weight_scale|SCB|absmax|quant_map|nested_absmax|weight_format"
    r"|quant_state)\b| (torch\.)?(u?int|[IU]|float8|F8)\w*( |$)|\.gguf|ggml": (
        "it is quantized: download the model in fp16 or bf16"
    ),
    r"(^|\.)(module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module"
    r"|_flat_param|flat_param)\b|^base_model\.model\.": (
        "it was saved with a wrapper around the model (module: DDP or DeepSpeed, _orig_mod: "
        "torch.compile, base_model.model: PEFT): save the model inside, with "
        "accelerator.unwrap_model(model).save_pretrained(...)"
    ),
    r"^model\.(embed_tokens|layers|norm)\.": (
        "it has another layout or another number of layers than its config.json says"
    ),
    r"^(transformer\.)?(lm_head|v_head|value_head|score|classifier_head)\.": (
        "some tools add such a head, which the model does not use: remove it from the weights, or "
        "give the base that was trained"
    ),
    r" \((0,|0, 0)\)$": (
        "ZeRO-3 saves tensors empty: run DeepSpeed's zero_to_fp32.py on the checkpoint and give "
        "the result"
    ),
    r"^(global_step\d+|mp_rank_\d+|(bf16_)?zero_pp_rank_|zero_to_fp32)": (
        "it is a DeepSpeed checkpoint: run its zero_to_fp32.py and give the result"
    ),
    r"\.distcp$|^pytorch_model_fsdp": (
        "it is a sharded FSDP checkpoint: run `accelerate merge-weights` and give the result"
    ),
    r"^(snapshots|models--.*)$": (
        "it is the hub's cache: give the folder of the model in it, below snapshots/"
    ),
    r"\.(incomplete|aria2|part|crdownload)$|^\._+temp": (
        "its download has not finished: start it again"
    ),
    r"-of-\d{5}\.(safetensors|bin)$": "it lacks the index of its shards: download that file, too",
}


def recognize(evidence: Iterable[str]) -> tuple[str, str] | None:
    """Return a known name among those that a checkpoint should not have, and what it means."""
    names = sorted(evidence)
    for pattern, meaning in MEANINGS.items():
        for name in names:
            if re.search(pattern, name):
                return name, meaning
    return None


def recognize_folder(folder: Path) -> str | None:
    """Return what a folder is that lacks a file of a model, or None if that is not known."""
    found = recognize(path.name for path in folder.iterdir()) if folder.is_dir() else None
    return f"{found[0]}: {found[1]}" if found else None
