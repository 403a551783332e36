"""The family transformers: a folder that AutoModelForCausalLM and AutoTokenizer load as they are.

That is without code of the model's own. The tokenizer is a BPE on bytes (SmolLM2, Qwen, Llama 3,
GLM-4-9B-hf, GPT-2), or one of sentencepiece with byte fallback (Llama 2, Mistral). Embeddings may
be tied. Conversations are written by the base's own chat template.

Step 2's tokenizer is tokenizer.json with more pieces, which AutoTokenizer loads. `FIRST_NEW_ID` in
its tokenizer_config.json says where they start, and `EOS_IDS` which tokens end a text. A model of
the later steps has the base's own class and tensor names.
"""

import copy
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from chatglm_ja.bases.byte_level_vocabulary import is_bytes, read_bytes
from chatglm_ja.bases.chat_template import ChatTemplate
from chatglm_ja.bases.interface import Base, Description, ModelTokenizer, Vocabulary
from chatglm_ja.bases.tokenizer_json import EOS_IDS, FIRST_NEW_ID, read_backend
from chatglm_ja.bases.vocabularies import open_vocabulary
from chatglm_ja.errors import DataError
from chatglm_ja.messages import Message, check_surrogates
from chatglm_ja.storage.files import read_json

if TYPE_CHECKING:
    import torch

    from chatglm_ja.storage.weights import Weights

# The special tokens with which models of this family end a document, where that is not eos_token:
# the eos_token of a chat model ends an answer.
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
# Buffers in older checkpoints, which are computed from the configuration; not weights.
BUFFER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(bias|masked_bias))$")


class TransformersTokenizer(ModelTokenizer):
    """A tokenizer as AutoTokenizer loads it; `eos_ids` are those of the model's generation."""

    def __init__(self, auto: Any, eos_ids: Sequence[int], first_new_id: int | None = None) -> None:
        self._auto = auto
        # As the model reads texts: special tokens that a text spells stay text.
        self._plain = Tokenizer.from_str(json.dumps(read_backend(auto)))
        self._plain.encode_special_tokens = True
        by_id = {index: piece for piece, index in auto.get_vocab().items()}
        self.size = max(by_id) + 1
        self.pieces = [by_id.get(index, "") for index in range(self.size)]
        self.first_new_id = self.size if first_new_id is None else first_new_id
        self.special_ids = frozenset(
            index for index, token in auto.added_tokens_decoder.items() if token.special
        )
        self.document_start = self._find_document_start()
        self._eos_ids = list(eos_ids)
        if not self._eos_ids:
            raise DataError(
                f"the tokenizer {auto.name_or_path} has no eos_token: expected one that ends a text"
            )
        ends = (auto.convert_tokens_to_ids(t) for t in DOCUMENT_ENDS if t in auto.get_vocab())
        self.document_end = next((i for i in ends if i in self.special_ids), self._eos_ids[0])
        self.pad_id = self.document_end if auto.pad_token_id is None else auto.pad_token_id

    @classmethod
    def open(cls, folder: Path) -> "TransformersTokenizer":
        """Load the tokenizer of step 2's folder, or of a model's. Raises DataError."""
        path = folder / "tokenizer_config.json"
        try:
            config = read_json(path)
            first_new_id, eos_ids = config[FIRST_NEW_ID], config[EOS_IDS]
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(
                f"{folder} holds no tokenizer of step 2: expected tokenizer.model (ChatGLM3), or "
                f"{FIRST_NEW_ID} and {EOS_IDS} in tokenizer_config.json"
            ) from None
        return cls(load_auto_tokenizer(folder), eos_ids, first_new_id)

    def _find_document_start(self) -> list[int]:
        """Return the ids that the tokenizer itself puts before a text."""
        with_special, alone = (
            self._plain.encode("a", add_special_tokens=added).ids for added in (True, False)
        )
        start = next(
            place
            for place in range(len(with_special))
            if with_special[place : place + len(alone)] == alone
        )
        return list(with_special[:start])

    def encode(self, text: str) -> list[int]:
        check_surrogates(text)
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._auto.decode(list(ids), skip_special_tokens=True))

    def spell(self, text: str) -> list[str]:
        return list(map(self._spell, self.encode(text)))

    def _spell(self, index: int) -> str:
        """Return the text of a token; if it holds a part of a character, its bytes."""
        text, piece = str(self._plain.decode([index])), self.pieces[index]
        if "\ufffd" not in text:
            return text
        return read_bytes(piece).hex(" ").upper() if is_bytes(piece) else piece

    def split_pieces(self, first: int) -> list[list[int]]:
        content = json.loads(self._plain.to_str())
        model, new = content["model"], {*self.pieces[first:]}
        model["vocab"] = {piece: i for piece, i in model["vocab"].items() if piece not in new}
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in new]
        base = Tokenizer.from_str(json.dumps(content)).model
        return [[token.id for token in base.tokenize(piece)] for piece in self.pieces[first:]]

    def to_transformers(self) -> Any:
        return copy.deepcopy(self._auto)

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._auto, self._eos_ids)

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer: those of the chat template, or without one of a text."""
        return self._template.stop_ids if self.has_chat_format else self._eos_ids

    @functools.cached_property
    def has_chat_format(self) -> bool:
        try:
            return bool(self._template.stop_ids)
        except DataError:  # none, or none that can be used; who needs one gets the error itself
            return False

    def build_prompt(self, messages: Sequence[Message]) -> list[int]:
        return self._template.build_prompt(messages)

    def build_example(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        return self._template.build_example(messages)


class TransformersBase(Base):
    """A base of this family: `config` is its AutoConfig, `auto` its AutoTokenizer."""

    def __init__(self, folder: Path, config: Any, auto: Any) -> None:
        self.folder, self.config, self.auto = folder, config, auto
        self.rows = config.vocab_size
        self.window = config.max_position_embeddings
        self.first_new_id = self.tokenizer.size

    @classmethod
    def open(cls, folder: Path) -> "TransformersBase":
        """Read and validate the configuration and the tokenizer; weights are read on demand.

        Raises DataError for what is no causal language model of transformers with full weights, and
        for embeddings without rows for all ids.
        """
        base = cls(folder, read_model_config(folder), load_auto_tokenizer(folder))
        if base.rows < base.first_new_id:
            raise DataError(
                f"{folder}: the tokenizer has {base.first_new_id:,} ids, but config.json has "
                f"vocab_size {base.rows:,}: expected a row for every id, those of added tokens too"
            )
        return base

    @functools.cached_property
    def tokenizer(self) -> TransformersTokenizer:
        return TransformersTokenizer(self.auto, self._read_eos_ids())

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        return open_vocabulary(self.auto, self._read_eos_ids(), self.folder)

    def _read_eos_ids(self) -> list[int]:
        """Return the ids that end a text: the tokenizer's eos_token, then those of the model."""
        path = self.folder / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}
        listed: list[int | None] = []
        for ids in (
            self.auto.eos_token_id,
            generation.get("eos_token_id"),
            getattr(self.config, "eos_token_id", None),
        ):
            listed += ids if isinstance(ids, list) else [ids]
        return list(dict.fromkeys(index for index in listed if index is not None))

    @functools.cached_property
    def _skeleton(self) -> Any:
        """The model without its weights."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config)

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """The names in the model of all stored tensors but BUFFERs, by their stored names.

        Some checkpoints hold the names of the model inside, without the prefix of the whole.
        """
        from chatglm_ja.storage.weights import read_weight_map

        model = self._skeleton
        names = model.state_dict().keys()
        return {
            name: name if name in names else f"{model.base_model_prefix}.{name}"
            for name in read_weight_map(self.folder)
            if not BUFFER.search(name)
        }

    @functools.cached_property
    def weights(self) -> "Weights":
        from chatglm_ja.storage.weights import Weights, read_weight_map

        # Tied matrices are one parameter; some checkpoints store the copy, too.
        if getattr(self._skeleton.get_output_embeddings(), "bias", None) is not None:
            raise DataError(
                f"{self.folder}: {type(self._skeleton).__name__} adds a bias to its logits, which "
                "new pieces would need, too: give another base"
            )
        needed = {name: tuple(p.shape) for name, p in self._skeleton.named_parameters()}
        known = self._skeleton.state_dict().keys()
        shapes = {old: needed.pop(new) for old, new in self._names.items() if new in needed}
        ignored = [
            name
            for name in read_weight_map(self.folder)
            if name not in self._names or (name not in shapes and self._names[name] in known)
        ]
        return Weights(self.folder, shapes | needed, ignored)

    @property
    def embeddings(self) -> dict[str, str]:
        from chatglm_ja.bases.modules import find_embeddings

        stored = {new: old for old, new in self._names.items()}
        names = [f"{name}.weight" for name in find_embeddings(self._skeleton)]
        return {stored[name]: name for name in names}

    def convert(self, name: str, tensor: "torch.Tensor") -> "Iterator[tuple[str, torch.Tensor]]":
        yield self._names[name], tensor

    def describe(self) -> Description:
        generation, tokenizer = self._generation(), self.tokenizer
        sampling = "it decodes greedily"
        if generation.do_sample:
            names = {"temperature": "temperature", "top p": "top_p", "top k": "top_k"}
            values = {title: getattr(generation, name) for title, name in names.items()}
            sampling = ", ".join(f"{title} {value}" for title, value in values.items() if value)
        license_file = next(
            (name for name in LICENSE_FILES if (self.folder / name).is_file()), None
        )
        named = read_json(self.folder / "config.json").get("_name_or_path") or self.folder.name
        return Description(
            name=Path(str(named)).name,
            model_class=type(self._skeleton).__name__,
            prefix="".join(tokenizer.pieces[index] for index in tokenizer.document_start),
            sampling=sampling,
            license_file=license_file,
        )

    def _generation(self) -> Any:
        """Return how the base generates; one that sets what only sampling uses samples."""
        if not (self.folder / "generation_config.json").is_file():
            return GenerationConfig.from_model_config(self.config)
        generation = GenerationConfig.from_pretrained(self.folder)
        if any(getattr(generation, name) for name in ("temperature", "top_p", "top_k")):
            generation.do_sample = True
        return generation

    def save_config(self, folder: Path, rows: int, ids: int) -> None:
        config = type(self.config).from_dict(self.config.to_dict())
        config.vocab_size, config.dtype = rows, self.weights.dtype
        config.__dict__.pop("auto_map", None)  # names code that is not in the new folder
        config.save_pretrained(folder)
        generation, tokenizer = self._generation(), self.tokenizer
        generation.eos_token_id = tokenizer.stop_ids
        generation.pad_token_id = tokenizer.pad_id
        generation.suppress_tokens = list(range(ids, rows)) or None
        generation.save_pretrained(folder)

    def load(self, dtype: "torch.dtype") -> Any:
        from chatglm_ja.bases.loading import load_model

        return load_model(self.folder, dtype).eval()


def read_model_config(folder: Path) -> Any:
    """Read config.json as transformers' configuration of a causal language model.

    Raises DataError for an architecture that transformers does not know without remote code, one
    that is no decoder, and quantized weights.
    """
    path = folder / "config.json"
    stored: Mapping[str, Any] = read_json(path)
    model_type = stored["model_type"]
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if expected is None and "auto_map" in stored:
        raise DataError(
            f"{path}: the model asks for remote code ({model_type} is unknown to transformers), "
            "which is never run: give a base in transformers' own layout, often published as -hf"
        )
    named = stored.get("architectures") or [expected]
    if expected is None or expected not in named:
        found = ", ".join(str(name) for name in named if name) or model_type
        raise DataError(
            f"{path}: {found} is no decoder that predicts the next token: give a causal language "
            "model, such as Llama, Qwen3 or GLM-4"
        )
    if stored.get("quantization_config"):
        raise DataError(
            f"{path}: the checkpoint is quantized: download it with fp16, bf16 or fp32 weights"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever transformers finds wrong with the values
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{path} is no configuration that transformers reads ({reason})") from None
    if config.get_text_config() is not config:
        raise DataError(
            f"{path}: {named[0]} reads more than text: give a base that reads texts alone"
        )
    for size in ("vocab_size", "max_position_embeddings"):
        if not isinstance(getattr(config, size, None), int):
            raise DataError(
                f"{path}: {named[0]} has no {size}, so its longest input or its ids are unknown: "
                "give another base"
            )
    return config


def load_auto_tokenizer(folder: Path) -> Any:
    """Load a folder's tokenizer with AutoTokenizer. Raises DataError if there is none."""
    try:
        auto = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever transformers and tokenizers find wrong
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder} has no tokenizer that transformers loads ({reason})") from None
    if not getattr(auto, "is_fast", False):
        raise DataError(f"{folder} has no tokenizer.json, and transformers cannot make one")
    return auto
