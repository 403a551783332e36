"""Compare speed and memory of continued pretraining with LLaMA-Factory 0.9.5 on one model and data.

The model is a ChatGLM3 of 4 layers and width 256 with random weights and the real tokenizer. Steps
2 and 3 add all pieces of a Japanese BPE model, which gives it 78,592 embedding rows, and step 4
packs the demo's texts into blocks of 1024 tokens. Step 5 and `llamafactory-cli train` start from
that folder and train on these blocks, 4 per step for --steps steps, with the same recipe: LoRA of
rank 8 on all projections and both embeddings in full, a single learning rate, AdamW, a cosine
schedule with the same warm-up, float32 on the CPU, no evaluation and no checkpoint during training.

Every run is a separate process with all cores. The ways take turns, --rounds times; the output
shows medians. Tokens/s use the Trainer's own `train_runtime`, which excludes imports, loading and
saving. Peak memory is the process's maximum from start to end, including saving or merging. Every
way trains on 4 blocks per step:

    LLaMA-Factory, 1 x 4    micro-batch 1 with gradient accumulation: its default
    LLaMA-Factory, 4 x 1    micro-batch 4
    step 5                  its default: micro-batch 4, attention inside documents
    step 5, 1 x 4           micro-batch 1: slower, less memory
    step 5, no mask         attention across documents, as in LLaMA-Factory's pretraining: the
                            computation is the same, and so are the losses

LLaMA-Factory needs its own environment; benchmarks/llamafactory_data.py says why:

    python3.11 -m venv lf
    lf/bin/pip install torch==2.13.0 llamafactory==0.9.5
    lf/bin/pip uninstall -y torchvision torchaudio
    touch lf/lib/python3.11/site-packages/torchaudio.py

    python benchmarks/training.py --base-model CHATGLM3_6B_DIR --ja-tokenizer ja_bpe.model \\
        --llamafactory lf/bin/python --work-dir SCRATCH

From CHATGLM3_6B_DIR only config.json and tokenizer.model are read. The prepared inputs stay in
--work-dir (0.3 GB) and are reused. Prints a table and a line of JSON.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

# In this folder; importing them makes the project's package importable.
import measuring
import peer
from measuring import Ratio
from peer import Recipe, Run, Way
from tqdm import tqdm

from chatglm_ja.cli import run

# ChatGLM3-6B's proportions, as far as four layers of this width allow.
SMALL = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 856,
    "num_attention_heads": 8,
    "multi_query_group_num": 2,
    "kv_channels": 32,
}
BLOCK_SIZE = 1024
BLOCKS_PER_STEP = 4
LEARNING_RATE = 2e-4
LORA_RANK = 8
LORA_ALPHA = 16

LLAMAFACTORY = "LLaMA-Factory, {} x {}"
USUAL = LLAMAFACTORY.format(1, BLOCKS_PER_STEP)
ONE_PASS = LLAMAFACTORY.format(BLOCKS_PER_STEP, 1)
OURS = "step 5"
OURS_ACCUMULATED = f"step 5, 1 x {BLOCKS_PER_STEP}"
OURS_NO_MASK = "step 5, no mask"


@dataclass(frozen=True)
class Prepared:
    """The inputs of all ways: the model, and the blocks in both formats."""

    model: Path
    data: Path
    blocks: Path


def main() -> None:
    arguments = parse_arguments()
    if arguments.task == "base":
        write_random_base(arguments.base_model, base_dir(arguments))
    elif arguments.task == "blocks":
        write_blocks(data_dir(arguments), blocks_dir(arguments))
    else:
        versions = peer.versions(arguments.llamafactory)
        ways = ways_to_train(arguments, prepare(arguments))
        runs = peer.take_turns(ways, arguments.rounds, arguments.work_dir)
        for way in (USUAL, ONE_PASS):
            runs[way] = [over_predicted(run) for run in runs[way]]
        print_table(arguments, runs)
        measuring.conclude(compared(runs), versions, steps=arguments.steps, **peer.recorded(runs))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base-model", type=Path, required=True, help="folder with config.json and tokenizer.model"
    )
    parser.add_argument(
        "--ja-tokenizer",
        type=Path,
        required=True,
        help="output folder of step 1, or a BPE model file",
    )
    peer.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    parser.add_argument("--task", choices=("base", "blocks"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    peer.check_arguments(parser, arguments, [arguments.base_model, arguments.ja_tokenizer])
    return arguments


def base_dir(arguments: argparse.Namespace) -> Path:
    return Path(arguments.work_dir, "base")


def data_dir(arguments: argparse.Namespace) -> Path:
    """Return the folder of exactly the blocks that the steps take, each trained on once."""
    return Path(arguments.work_dir, f"step4_{arguments.steps * BLOCKS_PER_STEP}_blocks")


def blocks_dir(arguments: argparse.Namespace) -> Path:
    return Path(arguments.work_dir, f"llamafactory_{arguments.steps * BLOCKS_PER_STEP}_blocks")


# Preparing


def prepare(arguments: argparse.Namespace) -> Prepared:
    """Make the model and the blocks, reusing what an earlier run finished."""
    work_dir: Path = arguments.work_dir
    work_dir.mkdir(parents=True, exist_ok=True)
    base, tokenizer, model = base_dir(arguments), work_dir / "step2", work_dir / "step3"
    data, blocks = data_dir(arguments), blocks_dir(arguments)
    # Run this file again for tasks whose libraries this process must not load.
    again = [__file__, *sys.argv[1:], "--task"]
    tasks: dict[str, list[str]] = {}
    if not base.exists():
        tasks["base"] = [sys.executable, *again, "base"]
    tasks["step2"] = measuring.step_command("step2_merge_tokenizer", tokenizer, base_model=base)
    tasks["step2"] += [f"--ja-tokenizer={arguments.ja_tokenizer}", "--policy=all"]
    tasks["step3"] = measuring.step_command(
        "step3_resize_model", model, base_model=base, tokenizer=tokenizer
    )
    tasks["step4"] = measuring.step_command("step4_prepare_data", data, tokenizer=tokenizer)
    tasks["step4"] += [
        f"--total-tokens={arguments.steps * BLOCKS_PER_STEP * BLOCK_SIZE}",
        f"--block-size={BLOCK_SIZE}",
        "--validation-tokens=0",
        # Step 4 requires conversations, although they are not used here.
        "--sft-examples=4",
        "--sft-validation-examples=0",
    ]
    if not blocks.exists():
        tasks["blocks"] = [arguments.llamafactory, *again, "blocks"]
    for name, command in tqdm(tasks.items(), desc="preparing"):
        peer.run_program(command, work_dir, name)
    return Prepared(model, data, blocks)


def write_random_base(source: Path, folder: Path) -> None:
    """Write a small random ChatGLM3 in the published layout, with `source`'s tokenizer.

    Its weights are float32: LLaMA-Factory trains in the stored dtype and fails on a CPU in float16.
    """
    import torch
    from transformers import GlmForCausalLM

    from chatglm_ja.chatglm3 import base_config, tensor_names, tokenizer
    from chatglm_ja.chatglm3.base_config import read_config
    from chatglm_ja.storage import weights

    config = read_config(source) | SMALL | {"torch_dtype": "float32"}
    torch.manual_seed(peer.SEED)
    model = GlmForCausalLM(
        base_config.glm_config(config, config["padded_vocab_size"], torch.float32)
    )
    unfinished = measuring.emptied(folder.with_suffix(".unfinished"))
    read = model.state_dict().__getitem__
    tensors = (
        (name, tensor_names.to_chatglm(name, read).contiguous())
        for name in tensor_names.expected_shapes(config)
    )
    weights.write_sharded(tensors, unfinished, 10**9)
    text = json.dumps(config, indent=1)
    (unfinished / "config.json").write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(source / tokenizer.MODEL_FILE, unfinished / tokenizer.MODEL_FILE)
    unfinished.rename(folder)


def write_blocks(data: Path, folder: Path) -> None:
    """Convert step 4's blocks to the format of LLaMA-Factory's `tokenized_path`.

    Runs under LLaMA-Factory's interpreter.
    """
    import datasets

    shards = sorted(data.glob("pretrain_train-*.arrow"))
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(s)) for s in shards])
    blocks = rows.to_dict()["input_ids"]
    masks = [[1] * len(block) for block in blocks]
    # Its collator makes the labels.
    saved = datasets.Dataset.from_dict({"input_ids": blocks, "attention_mask": masks})
    unfinished = measuring.emptied(folder.with_suffix(".unfinished"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(unfinished))
    unfinished.rename(folder)


# Measuring


def ways_to_train(arguments: argparse.Namespace, prepared: Prepared) -> dict[str, Way]:
    one_pass = Recipe(
        steps=arguments.steps,
        rows=BLOCKS_PER_STEP,
        micro_batch=BLOCKS_PER_STEP,
        block_size=BLOCK_SIZE,
        learning_rate=LEARNING_RATE,
        lora_rank=LORA_RANK,
        lora_alpha=LORA_ALPHA,
    )
    accumulated = replace(one_pass, micro_batch=1)
    tokens = arguments.steps * BLOCKS_PER_STEP * BLOCK_SIZE

    def theirs(recipe: Recipe) -> Way:
        return peer.llamafactory_way(
            arguments.llamafactory,
            recipe,
            tokens,
            stage="pt",
            model_name_or_path=str(prepared.model),
            tokenized_path=str(prepared.blocks),
            additional_target="embed_tokens,lm_head",
        )

    def ours(recipe: Recipe, *flags: str) -> Way:
        flags = (f"--embedding-learning-rate={LEARNING_RATE}", *flags)
        return peer.step_way(
            "step5_train_pt", recipe, tokens, *flags, model=prepared.model, data=prepared.data
        )

    return {
        USUAL: theirs(accumulated),
        ONE_PASS: theirs(one_pass),
        OURS: ours(one_pass),
        OURS_ACCUMULATED: ours(accumulated),
        OURS_NO_MASK: ours(one_pass, "--no-document-mask"),
    }


def over_predicted(run: Run) -> Run:
    """Rescale LLaMA-Factory's losses to means over the 1023 predicted tokens of a block.

    Its Trainer divides by all 1024, but the first token is not predicted.
    """
    return replace(run, losses=[loss * BLOCK_SIZE / (BLOCK_SIZE - 1) for loss in run.losses])


# Showing


def print_table(arguments: argparse.Namespace, runs: dict[str, list[Run]]) -> None:
    speed, memory = (peer.ratios(runs, field, USUAL) for field in peer.FIELDS)
    print(f"{arguments.steps} steps, {peer.CORES} cores, medians of {arguments.rounds} runs;")
    print(f"in brackets: to {USUAL}\n")
    rows = [
        [
            way,
            f"{peer.median(of_way, 'tokens_per_second'):,.0f} ({speed[way]:.2f})",
            f"{peer.median(of_way, 'peak_gb'):.2f} ({memory[way]:.2f})",
            f"{of_way[0].losses[0]:.4f}",
            f"{of_way[0].losses[-1]:.4f}",
        ]
        for way, of_way in runs.items()
    ]
    head = ["way", "tokens/s", "peak memory, GB", "first loss", "last loss"]
    print(measuring.table(head, rows))


def compared(runs: dict[str, list[Run]]) -> list[Ratio]:
    """Return ratios to LLaMA-Factory's default, for the same computation and for least memory."""
    return [
        *peer.compared(runs, OURS_NO_MASK, USUAL, "1.5", "0.65"),
        *peer.compared(runs, OURS_ACCUMULATED, USUAL, "1.5", "0.65"),
    ]


if __name__ == "__main__":
    run(main)
