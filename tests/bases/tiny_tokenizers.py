"""Tiny BPE tokenizers as folders that AutoTokenizer loads, trained on a few English lines."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chatglm_ja.chatglm3 import tokenizer, tokenizer_files
from tests.conftest import demo_texts

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
Change = Callable[[dict[str, Any]], None]


def make_byte_level(folder: Path, change: Change = lambda content: None, size: int = 400) -> Any:
    """Save a byte-level BPE with the tokens SPECIAL after its vocabulary, and load it.

    `change` alters the content of tokenizer.json before that.
    """
    bpe = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(parts)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(demo_texts("en", 10), trainer)
    bpe.add_special_tokens(list(SPECIAL))
    return _save(folder, json.loads(bpe.to_str()), change, eos_token=SPECIAL[0])


def _save(folder: Path, content: dict[str, Any], change: Change, **settings: Any) -> Any:
    change(content)
    changed = Tokenizer.from_str(json.dumps(content))
    PreTrainedTokenizerFast(tokenizer_object=changed, **settings).save_pretrained(folder)
    # As downloaded, rather than as the library writes it.
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def make_llama(folder: Path, change: Change = lambda content: None) -> Any:
    """Save a sentencepiece BPE of Llama 2's kind, tokenizer.model and tokenizer.json; load it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(demo_texts("en", 10)), model_writer=model, model_type="bpe",
        vocab_size=500, byte_fallback=True, normalization_rule_name="identity", split_digits=True,
        remove_extra_whitespaces=False, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    proto = tokenizer.parse_proto(model.getvalue(), Path("tokenizer.model"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    # The same BPE, with two of Llama's special tokens.
    content = json.loads(tokenizer_files.build_fast_tokenizer(with_control(proto)).to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < len(proto.pieces)]
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {k: v for k, v in vocab.items() if v < len(proto.pieces)}
    content["post_processor"] = None

    def add_tokens(content: dict[str, Any]) -> None:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added = {"id": len(proto.pieces), "content": "<pad>", "special": True, **flags}
        content["added_tokens"].append(added)
        change(content)

    return _save(folder, content, add_tokens, eos_token="</s>", bos_token="<s>", pad_token="<pad>")


def with_control(proto: Any) -> Any:
    """Return the model with ChatGLM3's special tokens, as `build_fast_tokenizer` expects them."""
    return tokenizer.add_special_tokens(proto)
