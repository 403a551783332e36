"""Build the demo's base model: a small but complete ChatGLM3 that knows Chinese and English.

Its files have ChatGLM3's layout (config.json of model type chatglm, fused query, key and value,
sharded fp16 safetensors with an index, a byte-fallback BPE tokenizer.model over Chinese and English
with nine special ids after its pieces), so that steps 2 and 3 read it like the 6B model. Every kana
and kanji has a piece, as in the real tokenizer, which has one for all but two of the kanji in the
demo's Japanese pages. The model is not trained on Japanese.

Reads   demo/data/train_zh.jsonl.gz, train_en.jsonl.gz, and the kanji in train_ja.jsonl.gz
Writes  <artifacts>/base_model/
Run     python demo/build_base_model.py
"""

import io
import itertools
import logging
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import constants
from chatglm_ja.cli import run
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.settings import StepConfig, parse, setting
from chatglm_ja.sources import Source
from chatglm_ja.storage.files import write_json
from chatglm_ja.storage.inputs import open_sources
from chatglm_ja.storage.output import Output

log = logging.getLogger(__name__)

KANA = {chr(code) for code in (*range(0x3041, 0x3094), *range(0x30A1, 0x30FB), ord("ー"))}
BLOCK_SIZE = 256
BATCH_BLOCKS = 4


@dataclass(frozen=True, kw_only=True)
class BaseModelConfig(StepConfig):
    sources: tuple[Source, ...] = setting("texts of the languages that the base knows")
    character_sources: tuple[Source, ...] = setting("texts whose Han characters get one piece each")
    vocab_size: int = setting("pieces of the base tokenizer", 8000, low=600)
    hidden_size: int = setting("hidden size of the model", 256, low=32)
    num_layers: int = setting("number of layers", 4, low=1)
    steps: int = setting("optimizer steps of pretraining", 500, low=1)
    learning_rate: float = setting("peak learning rate", 2e-3, low=0, high=1)
    seed: int = setting("seed of the weights and the order of the texts", 0, low=0)


DEFAULTS = {
    "sources": tuple(s for s in constants.PRETRAIN_SOURCES if s.language != "ja"),
    "character_sources": constants.STEP1["sources"],
    "output_dir": constants.BASE_MODEL_DIR,
}


def main() -> None:
    config = parse(BaseModelConfig, __doc__, DEFAULTS, profile=constants.PROFILE_LINE)
    inputs = [
        open_sources("base_texts", config.sources),
        open_sources("base_characters", config.character_sources),
    ]
    output = Output(config, Path(__file__).stem, inputs)
    if not output.prepare():
        return
    texts = [text for source in config.sources for text in SourceReader().texts(source)]
    random.Random(config.seed).shuffle(texts)
    characters = {
        c for s in config.character_sources for text in SourceReader().texts(s) for c in text
    }
    with output.write() as folder:
        train_tokenizer(texts, characters, config, folder)
        output.counts["final_loss"] = train_model(texts, config, folder)
    log.info("base model: %s", config.output_dir)


def train_tokenizer(
    texts: list[str], characters: set[str], config: BaseModelConfig, folder: Path
) -> None:
    """Train a BPE model with the settings in the trainer_spec of ChatGLM3's own."""
    import sentencepiece

    from chatglm_ja.vocabulary.policies import Policy

    kana_and_kanji = {character for character in characters if Policy.HAN.admits(character)}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n")),
        model_writer=model,
        vocab_size=config.vocab_size,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        byte_fallback=True,
        character_coverage=0.9995,
        required_chars="".join(sorted(KANA | kana_and_kanji)),
        max_sentence_length=1_000_000,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def chatglm_config(config: BaseModelConfig) -> dict[str, Any]:
    """Return the content of config.json."""
    from chatglm_ja.chatglm3 import base_config, tokenizer
    from chatglm_ja.vocabulary import embedding_rows

    vocabulary = config.vocab_size + len(tokenizer.SPECIAL_TOKENS)
    return {
        **base_config.REQUIRED_CONFIG,
        "architectures": ["ChatGLMModel"],
        "apply_query_key_layer_scaling": True,
        "attention_softmax_in_fp32": True,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.hidden_size * 5 // 2,
        "kv_channels": 32,
        "num_attention_heads": config.hidden_size // 32,
        "multi_query_group_num": 2,
        "layernorm_epsilon": 1e-5,
        "padded_vocab_size": embedding_rows.padded_rows(vocabulary, 128),
        "seq_length": 2048,
        "torch_dtype": "float16",
        "eos_token_id": tokenizer.EOS_ID,
        "pad_token_id": tokenizer.UNK_ID,
    }


def train_model(texts: list[str], config: BaseModelConfig, folder: Path) -> float:
    """Pretrain from random weights; return the mean loss of the last tenth of the steps.

    The loss is in nats per token.
    """
    import numpy as np
    import torch
    from tqdm.auto import tqdm
    from transformers import GlmForCausalLM, get_cosine_schedule_with_warmup

    from chatglm_ja.chatglm3 import base_config, chat_format, tensor_names
    from chatglm_ja.chatglm3.tokenizer import EOS_ID, add_special_tokens, make_processor, read_proto
    from chatglm_ja.data import packing
    from chatglm_ja.storage import weights
    from chatglm_ja.training.model import Collator, TrainingLoss

    torch.manual_seed(config.seed)
    tokenizer = make_processor(add_special_tokens(read_proto(folder / "tokenizer.model")))
    prefix = chat_format.prefix_ids(tokenizer)
    documents = [[*prefix, *ids, EOS_ID] for ids in tokenizer.encode(texts)]
    plan = packing.plan_concat(
        np.array([len(ids) for ids in documents]), BLOCK_SIZE, keep_tail=True
    )
    stream = np.concatenate(documents)
    blocks = [
        {
            "input_ids": stream[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE],
            "lengths": plan.length[first:end].tolist(),
        }
        for number, (first, end) in enumerate(itertools.pairwise(plan.bounds))
    ]
    raw_config = chatglm_config(config)
    rows = raw_config["padded_vocab_size"]
    model: Any = type("Model", (TrainingLoss, GlmForCausalLM), {})(
        base_config.glm_config(raw_config, rows, torch.float32)
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, config.steps // 20, config.steps)
    collate = Collator(document_mask=True)
    order: list[int] = []
    losses = []
    bar = tqdm(range(config.steps), desc="base model", unit=" steps")
    for _ in bar:
        while len(order) < BATCH_BLOCKS:
            order += torch.randperm(len(blocks)).tolist()
        batch, order = order[:BATCH_BLOCKS], order[BATCH_BLOCKS:]
        loss = model(**collate([blocks[index] for index in batch])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)

    read = model.state_dict().__getitem__
    half = (
        (name, tensor_names.to_chatglm(name, read).half().contiguous())
        for name in tensor_names.expected_shapes(raw_config)
    )
    weights.write_sharded(half, folder, max_shard_bytes=4_000_000)
    write_json(folder / "config.json", raw_config)
    tail = losses[-math.ceil(len(losses) / 10) :]
    return sum(tail) / len(tail)


if __name__ == "__main__":
    run(main)
