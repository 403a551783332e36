"""Growing the input and output embeddings by a row for every new piece.

    rows   0 .......... old-1 | old ............. vocabulary-1 | ... padded-1
           the base's, exact  | new pieces, initialized        | padding, never generated

The base has padding rows of its own. They never were a target, so training has pushed their output
rows away from every context: adding their mean to a row makes its token less likely. Our output
padding rows are that mean, since rows of zeros would compete with real pieces. A fraction of it,
`output_bias`, can be added to the new pieces' output rows, so that they take less probability from
the languages that the base knows.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from chatglm_ja.bases import loading
from chatglm_ja.chatglm3 import chat_format, tokenizer
from chatglm_ja.chatglm3.base import Base
from chatglm_ja.chatglm3.base_config import MODEL_FILE, glm_config
from chatglm_ja.chatglm3.tensor_names import EMBEDDING, NAMES, OUTPUT_LAYER, to_glm
from chatglm_ja.chatglm3.tokenizer_files import copy_tokenizer_files, limit_length
from chatglm_ja.chatglm3.weights import load_base
from chatglm_ja.errors import DataError
from chatglm_ja.storage import weights
from chatglm_ja.vocabulary.initialization import Initialization, Subtokens
from chatglm_ja.vocabulary.settings import ResizeModelConfig, padded_rows

# The prompts of `verify_logits`.
VERIFIED_TEXTS = (
    "北京是中华人民共和国的首都，位于华北平原的北部。",
    "To open a file, choose it from the list and click the button.",
)


def resize_rows(
    weight: torch.Tensor,
    old_ids: int,
    subtokens: Subtokens,
    rows: int,
    init: Initialization,
    generator: torch.Generator,
    output_bias: float | None = None,
) -> torch.Tensor:
    """Grow a [base rows, hidden] matrix to [rows, hidden], of the same dtype.

    Rows below `old_ids` are copied bit by bit. Row `old_ids + i` is a new piece, which the base
    ids `subtokens[i]` spelled before; it is computed in float32 and rounded once. `output_bias` is
    given for the output matrix: the mean of the base's padding rows then fills the rows after the
    last piece, and `output_bias` times that mean is added to the new rows. In the input matrix the
    rows after the last piece are zero.
    """
    resized = torch.zeros(rows, weight.shape[1], dtype=weight.dtype)
    resized[:old_ids] = weight[:old_ids]
    new = resized[old_ids : old_ids + len(subtokens)]
    shift = torch.zeros(weight.shape[1])
    if output_bias is not None and len(weight) > old_ids:
        padding = weight[old_ids:].float().mean(dim=0)
        resized[old_ids + len(subtokens) :] = padding.to(weight.dtype)
        shift = output_bias * padding
    start = 0
    for values in init.new_rows(weight[:old_ids], subtokens, generator):
        new[start : start + len(values)] = values + shift
        start += len(values)
    return resized


def open_base(config: ResizeModelConfig) -> Base:
    """Open the base and check all that `resize_checkpoint` needs: names, shapes, dtypes, pieces.

    Reads the headers of the weights only. Raises DataError if the base is damaged or another
    model, or if the tokenizer was merged with another base.
    """
    base = Base.open(config.base_model)
    merged = tokenizer.read_proto(config.tokenizer / MODEL_FILE)
    pieces = [piece.piece for piece in merged.pieces[: base.first_new_id]]
    if [piece.piece for piece in tokenizer.add_special_tokens(base.proto).pieces] != pieces:
        raise DataError(
            f"{config.tokenizer} was merged with another base than {base.folder}: its first "
            f"{base.first_new_id} ids are other pieces; run step2_merge_tokenizer.py with this base"
        )
    _ = base.weights  # which validates them
    return base


def resize_checkpoint(base: Base, config: ResizeModelConfig, folder: Path) -> dict[str, int]:
    """Write the base as a GlmForCausalLM with rows for the merged tokenizer's ids.

    Also writes config.json, the tokenizer, and a generation configuration that samples as
    ChatGLM3's own chat does, stops at its three stop ids and suppresses the padding rows. Verifies
    the old rows in the written files. Returns the numbers of rows. `base` comes from `open_base`.
    """
    proto = tokenizer.read_proto(config.tokenizer / MODEL_FILE)
    pieces = [piece.piece for piece in proto.pieces]
    old_ids = base.first_new_id
    # The base part of the merged tokenizer tells how new pieces were spelled before; without the
    # dummy prefix, because they stand inside texts.
    del proto.pieces[old_ids:]
    subtokens = tokenizer.make_processor(proto, dummy_prefix=False).encode(pieces[old_ids:])
    rows = padded_rows(len(pieces), config.pad_to_multiple)
    generator = torch.Generator().manual_seed(config.seed)

    def resized() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in base.weights.tensors():
            if name in (EMBEDDING, OUTPUT_LAYER):
                bias = config.output_bias if name == OUTPUT_LAYER else None
                tensor = resize_rows(tensor, old_ids, subtokens, rows, config.init, generator, bias)
            yield from to_glm(name, tensor, base.config)

    progress = tqdm(resized(), desc="resizing", unit=" tensors")
    weights.write_sharded(progress, folder, int(config.max_shard_gb * 1e9))
    glm_config(base.config, rows, base.weights.dtype).save_pretrained(folder)
    copy_tokenizer_files(config.tokenizer, folder)
    limit_length(folder, base.config["seq_length"])
    GenerationConfig(
        do_sample=True,
        **chat_format.SAMPLING,
        bos_token_id=tokenizer.BOS_ID,
        eos_token_id=chat_format.stop_ids(tokenizer.load_processor(folder)),
        pad_token_id=tokenizer.UNK_ID,
        suppress_tokens=list(range(len(pieces), rows)) or None,
    ).save_pretrained(folder)
    _verify_rows(base, folder, rows)
    return {
        "old_rows": base.config["padded_vocab_size"],
        "new_rows": rows,
        "kept": old_ids,
        "initialised": len(subtokens),
        "padding": rows - len(pieces),
    }


def _verify_rows(base: Base, folder: Path, rows: int) -> None:
    """Reopen a resized model and check the shape, the dtype, and the base's rows bit by bit."""
    old_ids = base.first_new_id
    for old_name in (EMBEDDING, OUTPUT_LAYER):
        old, name = base.weights.tensor(old_name), NAMES[old_name]
        written = weights.read_tensor(folder, name)
        if written.shape != (rows, old.shape[1]) or written.dtype != old.dtype:
            raise DataError(f"{folder}: {name} was written as {written.dtype} {written.shape}")
        # Compared as integers, so that NaN equals itself and -0 differs from 0.
        integers = {2: torch.int16, 4: torch.int32}[old.element_size()]
        if not torch.equal(written[:old_ids].view(integers), old[:old_ids].view(integers)):
            raise DataError(f"{folder}: {name} differs from the base in rows 0 to {old_ids - 1}")


def verify_logits(base: Base, folder: Path) -> None:
    """Check that base and resized model give the same logits over the old ids, bit by bit.

    Both read a Chinese and an English text in float32; one model is in memory at a time. Raises
    DataError if the logits differ.
    """
    old_ids = base.first_new_id
    processor = tokenizer.load_processor(folder)
    prefix = chat_format.prefix_ids(processor)
    prompts = [[*prefix, *processor.encode(text)] for text in VERIFIED_TEXTS]
    model: Any = load_base(base.weights, torch.float32)
    before = loading.compute_logits(model, prompts, old_ids)
    del model
    model = loading.load_model(folder, torch.float32).eval()
    after = loading.compute_logits(model, prompts, old_ids)
    for text, (old, _), (new, _) in zip(VERIFIED_TEXTS, before, after, strict=True):
        if not torch.equal(old, new):
            largest = (old - new).abs().max().item()
            raise DataError(
                f"{folder}: logits over the old ids differ from the base's by up to {largest:.2e} "
                f"on {text!r}"
            )
