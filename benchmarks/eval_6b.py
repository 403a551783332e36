"""Time step 7 at the size of ChatGLM3-6B on one GPU, without its weights.

A model with random weights in the shape that DIR/config.json gives performs step 7's operations:
one answer at batch size 1, a batch of answers, and scoring the demo's held-out Chinese texts. Each
is timed with the number of embedding rows before and after the vocabulary is extended. The
tokenizer is the base's.

    python benchmarks/eval_6b.py --base-model DIR          # config.json and tokenizer.model
    python benchmarks/eval_6b.py --base-model DIR --layers 2 --answers 2      # on a CPU
"""

import argparse
import time
from pathlib import Path
from typing import Any

# In this folder; importing it makes the project's package importable.
import measuring
import torch
from measuring import Ratio

import constants
from chatglm_ja.bases.chatglm3 import ChatGLM3Base
from chatglm_ja.bases.loading import compute_dtype
from chatglm_ja.chatglm3 import base_config
from chatglm_ja.cli import run
from chatglm_ja.data import corpus
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.evaluation.likelihood import Scorer
from chatglm_ja.inference import generation, models
from chatglm_ja.inference.models import LoadedModel

NEW_ROWS = 78_592
MAX_NEW_TOKENS = 256
WINDOW = 1024
BATCH_SIZE = 16


def random_model(config: dict[str, Any], rows: int) -> Any:
    from transformers import GlmForCausalLM

    dtype = compute_dtype()
    with torch.device(models.choose_device()):
        torch.set_default_dtype(dtype)
        model: Any = GlmForCausalLM(base_config.glm_config(config, rows, dtype))
        torch.set_default_dtype(torch.float32)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base-model", type=Path, required=True, help="folder with config.json and tokenizer.model"
    )
    parser.add_argument("--layers", type=int, help="number of layers (default: from config.json)")
    parser.add_argument(
        "--answers", type=int, default=128, help="batch size of the answers (default: 128)"
    )
    options = parser.parse_args()
    base = ChatGLM3Base.open(options.base_model)
    config = dict(base.config)
    config["num_layers"] = options.layers or config["num_layers"]
    tokenizer = base.tokenizer
    source = next(source for source in constants.HELD_OUT_SOURCES if source.language == "zh")
    texts = corpus.take_characters(SourceReader().texts(source), 25_000)
    prompt = tokenizer.build_prompt([{"role": "user", "content": "你好"}])
    on_gpu = models.choose_device() == "cuda"
    columns: dict[int, list[float]] = {}
    for rows in (config["padded_vocab_size"], NEW_ROWS):
        model = LoadedModel(random_model(config, rows), tokenizer)
        alone = generation.tokens_per_second(model, prompt)
        start = time.perf_counter()
        answers = generation.generate_answers(
            model, [prompt] * options.answers, MAX_NEW_TOKENS, batch_size=options.answers
        )
        answering = time.perf_counter() - start
        start = time.perf_counter()
        score = Scorer(model, WINDOW, BATCH_SIZE).score_texts(texts)
        scoring = time.perf_counter() - start
        columns[rows] = [alone, answering, scoring]
        if on_gpu:
            columns[rows].append(torch.cuda.max_memory_allocated() / 2**30)
        del model
    longest = max(answer.tokens for answer in answers)
    titles = [
        "one answer alone, tokens/s",
        f"{options.answers} answers of {longest} tokens, seconds",
        f"{score.tokens:,} tokens scored, seconds",
        *(["peak memory, GiB"] if on_gpu else []),
    ]
    print(f"On {torch.cuda.get_device_name() if on_gpu else 'a CPU'}, {compute_dtype()}\n")
    rows_of_table = [
        [name, *(f"{value:.1f}" for value in values)]
        for name, *values in zip(titles, *columns.values(), strict=True)
    ]
    print(measuring.table(["", *(f"{rows:,} rows" for rows in columns)], rows_of_table))
    before, after = columns.values()
    measuring.conclude(
        Ratio(f"{name}: new rows to the base's", new / old)
        for name, old, new in zip(titles, before, after, strict=True)
    )


if __name__ == "__main__":
    run(main)
