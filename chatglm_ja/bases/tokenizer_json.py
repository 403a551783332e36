"""tokenizer.json with new pieces, in a folder that AutoTokenizer loads without remote code.

    model.vocab     the base's pieces, its added tokens, the new pieces: every id is in the file
    model.merges    the base's, then those of the new pieces: every split into two pieces
    added_tokens    the base's

`tokenizers` ignores the ids of added tokens in the file. It looks them up in the vocabulary, and
numbers those that it does not find after its last piece. New pieces would move them, so they are
put into the vocabulary. No merge makes them there: their spelling remains text.

A piece has one split that texts produce, because whatever stands within its borders is merged in
the same way everywhere. The merges of its other splits never happen.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chatglm_ja.errors import DataError
from chatglm_ja.storage.files import read_json, write_json

FIRST_NEW_ID = "first_new_id"  # of tokenizer_config.json: the id of the first piece of step 2


def read_backend(tokenizer: Any) -> dict[str, Any]:
    """Return the tokenizer.json of a transformers tokenizer, without what makes ids random."""
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["dropout"] = None
    return backend | {"truncation": None, "padding": None}


def read_added_tokens(backend: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of the added tokens, the special ones among them, by their text."""
    return {token["content"]: token["id"] for token in backend["added_tokens"]}


def count_ids(backend: Mapping[str, Any]) -> int:
    """Return the id after the last one; unused ids before it count."""
    return 1 + max([*backend["model"]["vocab"].values(), *read_added_tokens(backend).values()])


def append_pieces_to_json(
    backend: Mapping[str, Any], known: Sequence[str | None], pieces: Sequence[str]
) -> dict[str, Any]:
    """Return a tokenizer.json with new pieces, whose ids follow the last.

    They are made from each other and from the `known` pieces.
    """
    model = backend["model"]
    first = count_ids(backend)
    vocab = model["vocab"] | read_added_tokens(backend)
    vocab |= {piece: first + rank for rank, piece in enumerate(pieces)}
    parts = {*known, *pieces}
    splits = ((piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece)))
    merges = [[left, right] for left, right in splits if left in parts and right in parts]
    model = {**model, "vocab": vocab, "merges": [*model["merges"], *merges]}
    return {**backend, "model": model}


def save_extended(
    tokenizer: Any, backend: Mapping[str, Any], first_new_id: int, folder: Path
) -> None:
    """Write the tokenizer.json `backend` into a folder, with all other settings of `tokenizer`.

    Raises DataError unless AutoTokenizer loads every added token from the folder as in the base.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    extended = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        **tokenizer.special_tokens_map,
        extra_special_tokens=tokenizer.extra_special_tokens,
        chat_template=tokenizer.chat_template,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        clean_up_tokenization_spaces=False,
    )
    extended.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", FIRST_NEW_ID: first_new_id}
    write_json(path, read_json(path) | config, indent=2)

    loaded = AutoTokenizer.from_pretrained(folder)
    before, after = (
        {id: repr(token) for id, token in side.added_tokens_decoder.items()}
        for side in (tokenizer, loaded)
    )
    if before != after:
        changed = sorted(dict(before.items() ^ after.items()))
        first = changed[0]
        raise DataError(
            f"{len(changed)} added tokens of the base would change in the merged tokenizer, first "
            f"id {first}: {before.get(first)} would become {after.get(first)}: nothing was written"
        )
