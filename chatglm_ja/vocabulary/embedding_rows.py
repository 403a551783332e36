"""Growing the input and output embeddings by a row for every new piece.

    rows   0 .......... old-1 | old ............. vocabulary-1 | ... padded-1
           the base's, exact  | new pieces, initialised        | padding, never generated

Sub-token mean: a new piece starts as the mean of the rows of the tokens that the base tokenizer
cuts it into, in both matrices (arXiv:2505.20133 and arXiv:2407.05841 compare initialisations).

The base has padding rows of its own. No text ever predicted them, so training has turned their
output rows against every context: their mean is the direction of "not now". Our output padding
is that mean, where rows of zeros would compete with real pieces; and a part of it, `output_bias`,
can be added to the new pieces' output rows, so that they take less probability from the languages
that the base knows.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from chatglm_ja.chatglm3 import (
    base_config,
    chat_format,
    loading,
    remote_code,
    tensor_names,
    tokenizer,
    tokenizer_files,
    weights,
)
from chatglm_ja.errors import DataError
from chatglm_ja.vocabulary.settings import Init, Layout

CHUNK_ROWS = 2048  # rows that are in float32 at a time
# What both models read for `verify_logits`.
VERIFIED_TEXTS = (
    "北京是中华人民共和国的首都，位于华北平原的北部。",
    "To open a file, choose it from the list and click the button.",
)


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
    output_bias: float | None = None,
) -> torch.Tensor:
    """Grow a [base rows, hidden] matrix to [rows, hidden], of the same dtype.

    Rows below `old_ids` are copied bit by bit. Row `old_ids + i` starts from the base ids
    `subtokens[i]`; means are taken in float32. `output_bias` is given for the output matrix: then
    the mean of the base's padding rows fills the rows after the last piece, and is added to the
    new rows `output_bias` times. Of the input matrix, the rows after the last piece are zero.
    """
    resized = torch.zeros(rows, weight.shape[1], dtype=weight.dtype)
    resized[:old_ids] = weight[:old_ids]
    new = resized[old_ids : old_ids + len(subtokens)]
    shift = torch.zeros(weight.shape[1])
    if output_bias is not None and len(weight) > old_ids:
        padding = weight[old_ids:].float().mean(dim=0)
        resized[old_ids + len(subtokens) :] = padding.to(weight.dtype)
        shift = output_bias * padding
    if init != "subtoken_mean":
        mean, deviation = _mean_and_deviation(weight[:old_ids])
    for start in range(0, len(new), CHUNK_ROWS):
        part = new[start : start + CHUNK_ROWS]
        if init == "subtoken_mean":
            values = _means(weight, subtokens[start : start + CHUNK_ROWS])
        elif init == "mean":
            values = mean.expand(len(part), -1)
        else:
            values = mean + torch.randn(part.shape, generator=generator) * deviation
        part.copy_(values + shift)
    return resized


def _means(weight: torch.Tensor, groups: Sequence[Sequence[int]]) -> torch.Tensor:
    """The mean of each group of rows, in float32."""
    sizes = torch.tensor([len(ids) for ids in groups])
    owners = torch.repeat_interleave(torch.arange(len(groups)), sizes)
    rows = weight[torch.tensor([index for ids in groups for index in ids])].float()
    sums = torch.zeros(len(groups), weight.shape[1]).index_add_(0, owners, rows)
    return sums / sizes.unsqueeze(1)


def _mean_and_deviation(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Over the rows, in float32, without a float32 copy of the whole matrix."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in weight.split(CHUNK_ROWS):
        total += part.double().sum(dim=0)
        squares += part.double().square().sum(dim=0)
    mean = total / len(weight)
    return mean.float(), (squares / len(weight) - mean.square()).clamp(min=0).sqrt().float()


def base_subtokens(processor: Any, first_new_id: int) -> list[list[int]]:
    """For every piece from `first_new_id` on, the base ids that spelled its text before.

    The merged tokenizer's own base part is used: a model of all pieces below `first_new_id`,
    without the dummy prefix, because a piece stands inside a text.
    """
    proto = tokenizer.parse_proto(processor.serialized_model_proto(), Path("merged tokenizer"))
    # sentencepiece reads its own mark of a space as one.
    pieces = [piece.piece for piece in proto.pieces[first_new_id:]]
    del proto.pieces[first_new_id:]
    return tokenizer.make_processor(proto, dummy_prefix=False).encode(pieces)


def resize_checkpoint(
    base: weights.BaseWeights,
    tokenizer_dir: Path,
    output_dir: Path,
    *,
    init: Init,
    output_bias: float,
    output_layout: Layout,
    pad_to_multiple: int,
    max_shard_bytes: int,
    seed: int,
) -> dict[str, int]:
    """Write the base with rows for the merged tokenizer's ids, in either layout.

    Also writes the tokenizer and a generation configuration with ChatGLM3's three stop ids, in
    which the padding rows are suppressed. Returns counts of rows; see `verify`.
    """
    processor = tokenizer.load_processor(tokenizer_dir)
    base_proto = tokenizer.read_base_proto(base.folder)
    old_ids = len(base_proto.pieces) + len(tokenizer.SPECIAL_TOKENS)
    vocabulary = processor.get_piece_size()
    kept = tokenizer.add_special_tokens(base_proto).pieces
    if [p.piece for p in kept] != [
        processor.id_to_piece(i) for i in range(min(old_ids, vocabulary))
    ]:
        raise DataError(
            f"{tokenizer_dir} was merged with another base than {base.folder}: its first {old_ids} "
            "ids are other pieces; run step2_merge_tokenizer.py with this base"
        )
    subtokens = base_subtokens(processor, old_ids)
    rows = padded_rows(vocabulary, pad_to_multiple)
    generator = torch.Generator().manual_seed(seed)

    def resized() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in base.tensors():
            if name in (tensor_names.EMBEDDING, tensor_names.OUTPUT_LAYER):
                bias = output_bias if name == tensor_names.OUTPUT_LAYER else None
                tensor = resize_rows(tensor, old_ids, subtokens, rows, init, generator, bias)
            if output_layout == "chatglm":
                yield name, tensor
            else:
                yield from tensor_names.to_glm(name, tensor, base.config)

    progress = tqdm(resized(), desc="resizing", unit=" tensors")
    weights.write_sharded(progress, output_dir, max_shard_bytes)
    padding = list(range(vocabulary, rows))
    _write_configs(base, output_dir, output_layout, rows, chat_format.stop_ids(processor), padding)
    has_own_code = output_layout == "chatglm" and remote_code.copy_patched_code(
        base.folder, output_dir, len(base_proto.pieces)
    )
    # ChatGLM3's own tokenizer code reads the sentencepiece model and nothing else.
    names = (tokenizer.MODEL_FILE,) if has_own_code else tokenizer_files.TOKENIZER_FILES
    tokenizer_files.copy_tokenizer_files(tokenizer_dir, output_dir, names)
    verify_rows(base, output_dir, output_layout, old_ids, rows)
    return {
        "old_rows": base.config["padded_vocab_size"],
        "new_rows": rows,
        "kept": old_ids,
        "initialised": len(subtokens),
        "padding": len(padding),
    }


def _write_configs(
    base: weights.BaseWeights,
    folder: Path,
    output_layout: Layout,
    rows: int,
    stop_ids: list[int],
    padding: list[int],
) -> None:
    from transformers import GenerationConfig

    if output_layout == "chatglm":
        text = json.dumps({**base.config, "padded_vocab_size": rows}, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    else:
        base_config.glm_config(base.config, rows, base.dtype).save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.BOS_ID,
        eos_token_id=stop_ids,
        pad_token_id=tokenizer.UNK_ID,
        suppress_tokens=padding or None,
    ).save_pretrained(folder)


def verify_rows(
    base: weights.BaseWeights, folder: Path, output_layout: Layout, old_ids: int, rows: int
) -> None:
    """Reopen a resized model: the number of rows, the dtype, and the base's rows bit by bit."""
    for old_name in (tensor_names.EMBEDDING, tensor_names.OUTPUT_LAYER):
        name = old_name if output_layout == "chatglm" else tensor_names.NAMES[old_name]
        written = weights.read_tensor(folder, name)
        old = base.tensor(old_name)
        if written.shape != (rows, old.shape[1]) or written.dtype != old.dtype:
            raise DataError(f"{folder}: {name} was written as {written.dtype} {written.shape}")
        integers = {2: torch.int16, 4: torch.int32}[old.element_size()]
        # Compared as integers, so that NaN equals itself and -0 differs from 0.
        if not torch.equal(written[:old_ids].view(integers), old[:old_ids].view(integers)):
            raise DataError(f"{folder}: {name} differs from the base in rows 0 to {old_ids - 1}")


def verify_logits(base_dir: Path, folder: Path, output_layout: Layout, old_ids: int) -> None:
    """Both models read Chinese and English: their logits over the old ids must be the same bits.

    In float32, each model in memory in turn. Raises DataError if they differ.
    """
    from transformers import GlmForCausalLM

    processor = tokenizer.load_processor(folder)
    prompts = [
        [*chat_format.prefix_ids(processor), *processor.encode(text)] for text in VERIFIED_TEXTS
    ]

    before = loading.compute_logits(loading.load_base(base_dir, torch.float32), prompts, old_ids)
    if output_layout == "chatglm":
        resized = loading.load_base(folder, torch.float32)
    else:
        resized = loading.load_glm(folder, GlmForCausalLM, torch.float32).eval()
    after = loading.compute_logits(resized, prompts, old_ids)
    for text, (old, _), (new, _) in zip(VERIFIED_TEXTS, before, after, strict=True):
        if not torch.equal(old, new):
            worst = (old - new).abs().max().item()
            raise DataError(
                f"{folder}: logits over the old ids differ from the base's by up to {worst:.2e} on "
                f"{text!r}"
            )
