"""Growing the input and output embeddings by a row for every new piece.

    rows   0 .......... old-1 | old ............. vocabulary-1 | ... padded-1
           the base's, exact  | new pieces, initialized        | padding, never generated

ChatGLM3 has padding rows of its own. They never were a target, so training has pushed their output
rows away from every context: adding their mean to a row makes its token less likely. Our output
padding rows are that mean, since rows of zeros would compete with real pieces. A fraction of it,
`output_bias`, can be added to the new pieces' output rows, so that they take less probability from
the languages that the base knows. Tied embeddings are one matrix, an output matrix without bias.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm

from chatglm_ja.bases import families, loading
from chatglm_ja.bases.interface import Base
from chatglm_ja.errors import DataError
from chatglm_ja.storage import weights
from chatglm_ja.storage.files import FileRecord, read_json, write_json
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
    given for the output matrix: the rows after the last piece are then the mean of the base's
    padding rows, or without these of all its rows, and `output_bias` times the mean of the padding
    rows is added to the new rows. In an input matrix the rows after the last piece are zero.
    """
    resized = torch.zeros(rows, weight.shape[1], dtype=weight.dtype)
    resized[:old_ids] = weight[:old_ids]
    new = resized[old_ids : old_ids + len(subtokens)]
    shift = torch.zeros(weight.shape[1])
    if output_bias is not None:
        has_padding = len(weight) > old_ids
        fill = weight[old_ids if has_padding else 0 :].mean(dim=0, dtype=torch.float32)
        resized[old_ids + len(subtokens) :] = fill.to(weight.dtype)
        if has_padding:
            shift = output_bias * fill
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
    base = families.open_base(config.base_model)
    merged = families.load_tokenizer(config.tokenizer)
    if list(base.tokenizer.pieces) != list(merged.pieces[: base.first_new_id]):
        raise DataError(
            f"{config.tokenizer} was merged with another base than {base.folder}: its first "
            f"{base.first_new_id} ids are other pieces; run step2_merge_tokenizer.py with this base"
        )
    _ = base.weights  # which validates them
    return base


def resize_checkpoint(
    base: Base, config: ResizeModelConfig, folder: Path
) -> tuple[dict[str, int], dict[str, FileRecord]]:
    """Write the base as a model of transformers with rows for the merged tokenizer's ids.

    Also writes config.json, generation_config.json and the tokenizer. Verifies the old rows in the
    written files. Returns the numbers of rows, and the records of the shards. `base` comes from
    `open_base`. Tied embeddings are one matrix, which starts like an input matrix.
    """
    tokenizer = families.load_tokenizer(config.tokenizer)
    subtokens = tokenizer.split_pieces(base.first_new_id)
    rows = padded_rows(tokenizer.size, config.pad_to_multiple)
    generator = torch.Generator().manual_seed(config.seed)
    *first, last = base.embeddings  # the same matrix if they are tied

    def resized() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in base.weights.tensors():
            if name in base.embeddings:
                bias = None
                if name == last:
                    bias = config.output_bias if first else 0.0
                tensor = resize_rows(
                    tensor, base.first_new_id, subtokens, rows, config.init, generator, bias
                )
            yield from base.convert(name, tensor)

    base.save_config(folder, rows, tokenizer.size)
    progress = tqdm(resized(), desc="resizing", unit=" tensors")
    records = weights.write_sharded(progress, folder, int(config.max_shard_gb * 1e9))
    families.copy_tokenizer(config.tokenizer, folder)
    path = folder / "tokenizer_config.json"  # tells other programs the longest input
    write_json(path, read_json(path) | {"model_max_length": base.window}, indent=2)
    _verify_rows(base, folder, rows)
    counts = {
        "old_rows": base.rows,
        "new_rows": rows,
        "kept": base.first_new_id,
        "initialised": len(subtokens),
        "padding": rows - tokenizer.size,
    }
    return counts, records


def _verify_rows(base: Base, folder: Path, rows: int) -> None:
    """Reopen a resized model and check the shape, the dtype, and the base's rows bit by bit."""
    old_ids = base.first_new_id
    for old_name, name in base.embeddings.items():
        old, written = base.weights.tensor(old_name), weights.read_tensor(folder, name)
        if written.shape != (rows, old.shape[1]) or written.dtype != old.dtype:
            raise DataError(f"{folder}: {name} was written as {written.dtype} {written.shape}")
        # Compared as integers, so that NaN equals itself and -0 differs from 0.
        integers = {2: torch.int16, 4: torch.int32}[old.element_size()]
        if not torch.equal(written[:old_ids].view(integers), old[:old_ids].view(integers)):
            raise DataError(f"{folder}: {name} differs from the base in rows 0 to {old_ids - 1}")


def verify_logits(base: Base, folder: Path) -> None:
    """Check that base and resized model give the same logits over the old ids, bit by bit.

    Both read a Chinese and an English text in float32; one model is in memory at a time. Raises
    DataError if the logits differ, and for a model that steps 5 and 6 cannot train.
    """
    old_ids = base.first_new_id
    tokenizer = base.tokenizer
    prompts = [[*tokenizer.document_start, *tokenizer.encode(text)] for text in VERIFIED_TEXTS]
    model = base.load(torch.float32)
    before = loading.compute_logits(model, prompts, old_ids)
    del model
    model = loading.load_model(folder, torch.float32).eval()
    loading.check_training(model, folder)
    after = loading.compute_logits(model, prompts, old_ids)
    for text, (old, _), (new, _) in zip(VERIFIED_TEXTS, before, after, strict=True):
        if not torch.equal(old, new):
            largest = (old - new).abs().max().item()
            raise DataError(
                f"{folder}: logits over the old ids differ from the base's by up to {largest:.2e} "
                f"on {text!r}"
            )
