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

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm_ja.errors import DataError
from chatglm_ja.storage.files import read_json, write_json

# Ours in tokenizer_config.json: the id of the first new piece, and the ids that end a text.
FIRST_NEW_ID, EOS_IDS = "first_new_id", "eos_token_ids"

Backend = Mapping[str, Any]  # the content of a tokenizer.json


def read_backend(auto: Any) -> dict[str, Any]:
    """Return a tokenizer's tokenizer.json, without what would make ids random or cut texts."""
    backend: dict[str, Any] = json.loads(auto.backend_tokenizer.to_str())
    model = {**backend["model"], "dropout": None}
    return {**backend, "model": model, "truncation": None, "padding": None}


def read_added_tokens(backend: Backend) -> dict[str, int]:
    """Return the ids of the added tokens, the special ones among them, by their text."""
    return {token["content"]: token["id"] for token in backend["added_tokens"]}


def count_ids(backend: Backend) -> int:
    """Return the id after the last one; unused ids before it count."""
    return 1 + max([*backend["model"]["vocab"].values(), *read_added_tokens(backend).values()])


def append_pieces_to_json(
    backend: Backend, known: Sequence[str | None], pieces: Sequence[str]
) -> Backend:
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


@dataclass(frozen=True)
class BaseTokenizer:
    """A base's tokenizer as AutoTokenizer loads it, and the ids with which the base ends a text."""

    auto: Any
    eos_ids: Sequence[int]

    @functools.cached_property
    def backend(self) -> Backend:
        """Its tokenizer.json, as `read_backend` returns it."""
        return read_backend(self.auto)

    def save(self, extended: Backend, folder: Path) -> None:
        """Write an extended tokenizer.json into a folder, with all other settings of the base.

        Raises DataError unless AutoTokenizer loads every added token from there as in the base.
        """
        from tokenizers import Tokenizer
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(extended)),
            **self.auto.special_tokens_map,
            extra_special_tokens=self.auto.extra_special_tokens,
            chat_template=self.auto.chat_template,
            padding_side=self.auto.padding_side,
            truncation_side=self.auto.truncation_side,
            model_max_length=self.auto.model_max_length,
            model_input_names=self.auto.model_input_names,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        ours = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            FIRST_NEW_ID: count_ids(self.backend),
            EOS_IDS: list(self.eos_ids),
        }
        write_json(path, read_json(path) | ours, indent=2)

        before, after = (
            {index: repr(token) for index, token in auto.added_tokens_decoder.items()}
            for auto in (self.auto, AutoTokenizer.from_pretrained(folder))
        )
        if before != after:
            changed = [i for i in sorted({*before, *after}) if before.get(i) != after.get(i)]
            raise DataError(
                f"{len(changed)} added tokens would change in the merged tokenizer, first id "
                f"{changed[0]}: {before.get(changed[0])} would become {after.get(changed[0])}: "
                "nothing was written"
            )
