"""Growing the input and output embeddings by a row for every new piece.

    rows   0 .......... old-1 | old ............. vocabulary-1 | ... padded-1
           the base's, exact  | new pieces, initialised        | zero, suppressed in generation

Sub-token mean: a new piece starts as the mean of the rows of the tokens that the base tokenizer
cuts it into, in both matrices (arXiv:2505.20133 and arXiv:2407.05841 compare initialisations;
it beats the mean of all rows, which beats random rows).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from chatglm_ja import chat, checkpoint, export, tokenizer
from chatglm_ja.errors import DataError

Init = Literal["subtoken_mean", "mean", "random"]


def padded_rows(vocabulary: int, multiple: int) -> int:
    """The number of rows for `vocabulary` ids: the next multiple, which GPUs multiply faster."""
    return -(-vocabulary // multiple) * multiple


def resize_rows(
    weight: torch.Tensor,
    old_ids: int,
    subtokens: Sequence[Sequence[int]],
    rows: int,
    init: Init,
    generator: torch.Generator,
) -> torch.Tensor:
    """Grow a [base rows, hidden] matrix to [rows, hidden], of the same dtype.

    Rows below `old_ids` are copied bit by bit. Row `old_ids + i` starts from the base ids
    `subtokens[i]`; means are taken in float32. Rows after the last piece are zero.
    """
    resized = torch.zeros(rows, weight.shape[1], dtype=weight.dtype)
    resized[:old_ids] = weight[:old_ids]
    old = weight[:old_ids].float()
    new = resized[old_ids : old_ids + len(subtokens)]
    if init == "subtoken_mean":
        for row, ids in zip(new, subtokens, strict=True):
            row.copy_(old[list(ids)].mean(dim=0))
    elif init == "mean":
        new.copy_(old.mean(dim=0))
    else:
        noise = torch.randn(new.shape, generator=generator)
        new.copy_(old.mean(dim=0) + noise * old.std(dim=0))
    return resized


def base_subtokens(processor: Any, first_new_id: int) -> list[list[int]]:
    """For every piece from `first_new_id` on, the base ids that spelled its text before.

    The merged tokenizer's own base part is used: a model of all pieces below `first_new_id`,
    without the dummy prefix, because a piece stands inside a text.
    """
    proto = tokenizer.parse_model(processor.serialized_model_proto(), Path("merged tokenizer"))
    # sentencepiece reads its own mark of a space as one.
    pieces = [piece.piece for piece in proto.pieces[first_new_id:]]
    del proto.pieces[first_new_id:]
    return tokenizer.processor(proto, dummy_prefix=False).encode(pieces)


def resize_checkpoint(
    base: checkpoint.Checkpoint,
    tokenizer_dir: Path,
    output_dir: Path,
    *,
    init: Init,
    pad_to_multiple: int,
    max_shard_bytes: int,
    seed: int,
) -> dict[str, int]:
    """Write the base as a GlmForCausalLM with rows for the merged tokenizer's ids.

    Also writes the tokenizer and a generation configuration with ChatGLM3's three stop ids, in
    which the padding rows are suppressed. Returns counts of rows; see `verify`.
    """
    processor = tokenizer.load(tokenizer_dir)
    base_pieces = len(tokenizer.read_model(base.folder / tokenizer.MODEL_FILE).pieces)
    old_ids = base_pieces + len(tokenizer.SPECIAL_TOKENS)
    vocabulary = processor.get_piece_size()
    subtokens = base_subtokens(processor, old_ids)
    rows = padded_rows(vocabulary, pad_to_multiple)
    generator = torch.Generator().manual_seed(seed)

    def resized() -> Any:
        for name, tensor in base.glm_tensors():
            if name in (checkpoint.GLM_EMBEDDING, checkpoint.GLM_LM_HEAD):
                tensor = resize_rows(tensor, old_ids, subtokens, rows, init, generator)
            yield name, tensor

    progress = tqdm(resized(), desc="resizing", unit=" tensors")
    checkpoint.write_sharded(progress, output_dir, max_shard_bytes)
    checkpoint.glm_config(base.config, rows, base.dtype).save_pretrained(output_dir)
    padding = list(range(vocabulary, rows))
    GenerationConfig(
        bos_token_id=tokenizer.BOS_ID,
        eos_token_id=chat.stop_ids(processor),
        pad_token_id=tokenizer.UNK_ID,
        suppress_tokens=padding or None,
    ).save_pretrained(output_dir)
    export.copy_files(tokenizer_dir, output_dir)
    verify(base, output_dir, old_ids, rows)
    return {
        "old_rows": base.config["padded_vocab_size"],
        "new_rows": rows,
        "kept": old_ids,
        "initialised": len(subtokens),
        "padding": len(padding),
    }


def verify(base: checkpoint.Checkpoint, folder: Path, old_ids: int, rows: int) -> None:
    """Reopen a resized model: the number of rows, and the base's rows bit by bit."""
    for old_name, name in (
        (checkpoint.EMBEDDING, checkpoint.GLM_EMBEDDING),
        (checkpoint.OUTPUT_LAYER, checkpoint.GLM_LM_HEAD),
    ):
        written = checkpoint.read_tensor(folder, name)
        old = base.tensor(old_name)
        if written.shape != (rows, old.shape[1]) or written.dtype != old.dtype:
            raise DataError(f"{folder}: {name} was written as {written.dtype} {written.shape}")
        integers = {2: torch.int16, 4: torch.int32}[old.element_size()]
        # Compared as integers, so that NaN equals itself and -0 differs from 0.
        if not torch.equal(written[:old_ids].view(integers), old[:old_ids].view(integers)):
            raise DataError(f"{folder}: {name} differs from the base in rows 0 to {old_ids - 1}")
