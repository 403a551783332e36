"""Which kind of vocabulary a transformers tokenizer has, and whether it can be extended."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatglm_ja.bases.byte_level_vocabulary import ByteLevelVocabulary
from chatglm_ja.bases.interface import Vocabulary
from chatglm_ja.bases.sentencepiece_vocabulary import LlamaVocabulary
from chatglm_ja.bases.tokenizer_json import BaseTokenizer
from chatglm_ja.chatglm3.base_config import MODEL_FILE
from chatglm_ja.errors import DataError

EXPECTED = (
    "expected byte-level BPE (SmolLM2, Qwen, Llama 3) or sentencepiece BPE (Llama 2, Mistral)"
)


def open_vocabulary(auto: Any, eos_ids: Sequence[int], folder: Path) -> Vocabulary:
    """Open the vocabulary of a fast tokenizer that AutoTokenizer loaded from a base's folder.

    Raises DataError for a kind that new pieces cannot be appended to.
    """
    base = BaseTokenizer(auto, eos_ids)
    backend = base.backend
    model = backend["model"]
    if model["type"] != "BPE":
        raise DataError(
            f"the tokenizer of {folder} is a {model['type']} model, which has no merges to "
            f"continue: {EXPECTED}"
        )
    if mark := model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise DataError(
            f"the tokenizer of {folder} marks the parts of words with {mark!r}, so its pieces are "
            f"not parts of the text: {EXPECTED}"
        )
    if _is_byte_level(backend["pre_tokenizer"]):
        return ByteLevelVocabulary(base)
    if not model["byte_fallback"]:
        raise DataError(
            f"the tokenizer of {folder} is BPE without bytes, which loses characters that have no "
            f"piece: {EXPECTED}"
        )
    if not (folder / MODEL_FILE).is_file():
        raise DataError(
            f"{folder} has no {MODEL_FILE}, which a sentencepiece BPE tokenizer is extended by: "
            "download it with the model"
        )
    return LlamaVocabulary.open(base, folder)


def _is_byte_level(pre_tokenizer: Any) -> bool:
    parts = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    return any(part.get("type") == "ByteLevel" for part in parts)
