"""The settings of every step: one frozen dataclass each, which becomes its command line.

Defaults that differ between the profiles are in `constants.py`; settings.py does the rest.
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chatglm_ja import sources as source_checks
from chatglm_ja.errors import ConfigError
from chatglm_ja.files import read_json
from chatglm_ja.settings import StepConfig, flag, setting
from chatglm_ja.sources import Source

Policy = Literal["japanese", "kana", "han", "letters", "all"]
Init = Literal["subtoken_mean", "mean", "random"]
Layout = Literal["glm", "chatglm"]
CORES = len(os.sched_getaffinity(0))
# The models that step 7 compares, in the order in which they come about.
STAGES = ("base", "resized", "pretrained", "sft")
LATEST = "latest"


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(StepConfig):
    """Step 1. The settings from `normalization` on make the pieces fit the base's tokenizer."""

    sources: tuple[Source, ...] = setting(
        "texts of the new language: LANGUAGE=PATH_OR_DATASET[#COLUMN]"
    )
    method: Literal["sentencepiece", "continue"] = setting(
        "sentencepiece: learn from characters; continue: go on from the base's own merges, which "
        "gives shorter texts and no piece that the merge has to drop",
        "sentencepiece",
    )
    base_model: Path | None = setting(
        "ChatGLM3 folder, of which --method continue reads tokenizer.model and config.json", None
    )
    policy: Policy = setting("what --method continue may learn, as in step 2", "japanese")
    vocab_size: int = setting(
        "pieces to learn, control and byte pieces included", 20_000, low=300, high=1_000_000
    )
    character_coverage: float = setting(
        "share of the text's characters that get a piece; the rest stays bytes",
        0.9995,
        low=0.9,
        high=1.0,
    )
    input_sentence_size: int = setting(
        "train on at most this many lines, drawn at random (0: all)", 0, low=0
    )
    seed: int = setting("seed of that draw", 0, low=0)
    num_threads: int = setting("threads: all cores", CORES, low=1, affects_result=False)
    normalization: Literal["identity", "nfkc", "nmt_nfkc"] = setting(
        "the base does not normalise: pieces of normalised characters would never match raw text",
        "identity",
    )
    split_digits: bool = setting(
        "keep digits apart: the base does, and 1998 as one piece would change Chinese", True
    )
    byte_fallback: bool = setting(
        "spell characters without a piece in bytes, as the base does, instead of <unk>", True
    )
    keep_whitespace: bool = setting(
        "keep repeated and outer spaces: the base does, and text must decode to itself", True
    )
    dummy_prefix: bool = setting(
        "put a space before every line: the merged tokenizer does so only before a whole text, so "
        "that pieces learned with it at the start of a line would be lost on all other lines",
        False,
    )
    split_by_script: bool = setting(
        "never mix scripts in a piece: Japanese words do, as in 食べる", False
    )
    max_piece_length: int = setting(
        "characters of the longest piece; 16 as in the base, so that no piece is a whole sentence",
        16,
        low=1,
        high=512,
    )

    def contradictions(self) -> list[str]:
        problems = []
        if self.method == "sentencepiece" and self.policy != "japanese":
            problems.append("--policy is for --method continue; step 2 has one for all pieces")
        if self.method == "continue":
            if self.base_model is None:
                problems.append("--method continue needs --base-model: the ChatGLM3 folder")
            for name in ("normalization", "split_digits", "byte_fallback", "keep_whitespace",
                         "dummy_prefix", "split_by_script"):  # fmt: skip
                default = type(self).__dataclass_fields__[name].default
                if getattr(self, name) != default:
                    problems.append(f"{flag(name)} is for --method sentencepiece only")
        return problems

    def trainer_settings(self) -> dict[str, Any]:
        """The settings that fit the pieces to the base, by sentencepiece's names."""
        return {
            "normalization_rule_name": self.normalization,
            "split_digits": self.split_digits,
            "byte_fallback": self.byte_fallback,
            "remove_extra_whitespaces": not self.keep_whitespace,
            "add_dummy_prefix": self.dummy_prefix,
            "split_by_unicode_script": self.split_by_script,
            "max_sentencepiece_length": self.max_piece_length,
        }


@dataclass(frozen=True, kw_only=True)
class MergeTokenizerConfig(StepConfig):
    """Step 2."""

    base_model: Path = setting("ChatGLM3 folder; tokenizer.model and config.json are read")
    ja_tokenizer: Path = setting("output folder of step 1, or any sentencepiece BPE model file")
    policy: Policy = setting(
        "which pieces are added: japanese: with kana or a kanji that Chinese does not use; "
        "kana: with kana; han: with any Han character or kana; letters: for other languages, with "
        "a letter or vowel sign that is neither Han nor one of a to z; all: every piece, "
        "unreachable ones too. japanese, kana and letters leave Chinese and English as they are, "
        "han English",
        "japanese",
    )
    max_new_pieces: int = setting(
        "add at most this many pieces: those used most on --ranking-sources (0: no limit)", 0, low=0
    )
    ranking_sources: tuple[Source, ...] = setting(
        "texts for --max-new-pieces: LANGUAGE=PATH_OR_DATASET[#COLUMN]", ()
    )
    ranking_characters: int = setting(
        "characters of them that are read, taken from every source in turn", 20_000_000, low=1
    )
    check_sources: tuple[Source, ...] = setting(
        "texts to compare the base and the merged tokenizer on: LANGUAGE=PATH[#COLUMN]"
    )

    def contradictions(self) -> list[str]:
        if self.max_new_pieces and not self.ranking_sources:
            return ["--max-new-pieces needs --ranking-sources: texts to count the uses on"]
        return []

    def arguments(self) -> dict[str, Any]:
        """Without a limit of pieces, what they would be ranked on shapes nothing."""
        chosen = super().arguments()
        if not self.max_new_pieces:
            chosen = {k: v for k, v in chosen.items() if not k.startswith("ranking_")}
        return chosen


@dataclass(frozen=True, kw_only=True)
class ResizeModelConfig(StepConfig):
    """Step 3."""

    base_model: Path = setting(
        "ChatGLM3 folder: config.json, tokenizer.model, safetensors or .bin shards"
    )
    tokenizer: Path = setting("output folder of step 2")
    init: Init = setting(
        "new embedding rows: mean of the old rows of the piece's base tokens, mean of all old "
        "rows, or normal with the old rows' deviation",
        "subtoken_mean",
    )
    output_bias: float = setting(
        "how many times the mean of the base's padding rows is added to new output rows: more "
        "leaves more probability to the languages that the base knows",
        0.25,
        low=0,
        high=10,
    )
    layout: Layout = setting(
        "glm: transformers' own class, for steps 5 to 7; chatglm: the original names and files, "
        "for tools that know only those",
        "glm",
    )
    pad_to_multiple: int = setting("round the number of rows up to a multiple of this", 64, low=1)
    max_shard_gb: float = setting("size limit of an output file in GB", 2.0, low=0.001, high=1000)
    seed: int = setting("seed of --init random", 0, low=0)


@dataclass(frozen=True, kw_only=True)
class PrepareDataConfig(StepConfig):
    """Step 4."""

    tokenizer: Path = setting("output folder of step 2")
    sources: tuple[Source, ...] = setting(
        "pretraining texts: a YAML file of sources, or each as "
        "LANGUAGE=PATH_OR_DATASET[@SUBSET][?COLUMN=VALUE][#COLUMN]"
    )
    shares: tuple[str, ...] = setting("share of the tokens, LANGUAGE=SHARE", ())
    total_tokens: int = setting("tokens of pretraining blocks to make", low=1)
    max_repeats: float = setting(
        "how often a source's texts may be repeated to fill its share; up to 4 times cost little "
        "(arXiv 2305.16264)",
        4.0,
        low=1.0,
        high=1000,
    )
    block_size: int = setting("tokens in a pretraining block", 1024, low=8, high=2**20)
    packing: Literal["concat", "best_fit"] = setting(
        "concat: documents run on from block to block, every block is full; best_fit: only "
        "documents longer than a block are cut, and where a share ends",
        "concat",
    )
    validation_tokens: int = setting(
        "tokens kept from training for validation, over all languages", 2_000_000, low=0
    )
    unicode_form: Literal["NFC", "NFKC", "none"] = setting(
        "Unicode normalisation of texts; the tokenizer has none, and NFKC would take the "
        "full-width forms from Japanese",
        "NFC",
    )
    min_characters: int = setting("drop texts that are shorter", 32, low=1)
    check_language: bool = setting(
        "drop texts that are not written in the script of their language (ja, zh, en)", True
    )
    near_duplicates: float = setting(
        "drop texts this similar to an earlier one: Jaccard similarity of their 5-grams of "
        "characters, estimated with MinHash (0: keep them)",
        0.8,
        low=0,
        high=1,
    )
    decontaminate: tuple[Source, ...] = setting(
        "evaluation texts: pretraining texts that share 13 tokens in a row with them are dropped",
        (),
    )
    sft_sources: tuple[Source, ...] = setting(
        "conversations: a YAML file of sources, or each as "
        "KIND=PATH_OR_DATASET[@SUBSET][?COLUMN=VALUE][#COLUMNS], where COLUMNS is a column of "
        "messages or QUESTION[+QUESTION]>ANSWER columns"
    )
    sft_shares: tuple[str, ...] = setting("share of the conversations, KIND=SHARE", ())
    sft_examples: int = setting("conversations to take", low=1)
    sft_validation_examples: int = setting("conversations kept for validation", 1000, low=0)
    max_length: int = setting(
        "tokens of the longest conversation, and of an SFT bin", 1024, low=16, high=2**20
    )
    long_conversations: Literal["cut", "drop"] = setting(
        "what to do with longer ones: leave out their oldest exchanges, or drop them", "cut"
    )
    max_rejects: float = setting(
        "share of a source's records that may be bad before this stops", 0.01, low=0, high=1,
        affects_result=False,
    )  # fmt: skip
    seed: int = setting("seed of the draw and order of texts and conversations", 0, low=0)
    num_processes: int = setting(
        "processes that read and tokenise: all cores", CORES, low=1, affects_result=False
    )

    def contradictions(self) -> list[str]:
        problems = []
        for sources, shares, name in (
            (self.sources, self.shares, "--shares"),
            (self.sft_sources, self.sft_shares, "--sft-shares"),
        ):
            languages = {source.language for source in sources}
            named = set(parse_shares(shares))
            if languages != named:
                problems.append(
                    f"{name} names {', '.join(sorted(named)) or 'nothing'}, but the sources are "
                    f"{', '.join(sorted(languages))}"
                )
        problems += source_checks.contradictions(self.sources)
        problems += source_checks.contradictions(self.sft_sources)
        problems += [
            f"{source.title}: the format wikitext is for pretraining texts"
            for source in self.sft_sources
            if source.format == "wikitext"
        ]
        weighted = [source.title for source in self.sft_sources if source.weight is not None]
        if weighted:
            problems.append(
                f"{', '.join(weighted)}: a weight is for pretraining texts; conversations are "
                "drawn to --sft-shares"
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(StepConfig):
    """Steps 5 and 6: LoRA on the transformer, and the embeddings in full, together."""

    model: Path = setting("model folder to start from")
    data: Path = setting("output folder of step 4")
    block_size: int = setting(
        "tokens of a row, as step 4 prepared the data",
        1024,
        low=8,
        high=2**20,
        affects_result=False,
    )
    train_embeddings: bool = setting("train the input and output embeddings in full", True)
    embedding_rows: Literal["all", "new"] = setting(
        "which rows of the embeddings are trained; new: those of the added pieces only, with a "
        "sixth of the gradients and moments at 6B size",
        "all",
    )
    lora_rank: int = setting("rank of the LoRA matrices", 8, low=1)
    lora_alpha: int = setting("LoRA scale: the update is multiplied by alpha / rank", 16, low=0)
    lora_dropout: float = setting("dropout before the LoRA matrices", 0.0, low=0, high=0.9)
    learning_rate: float = setting(
        "peak learning rate of the LoRA matrices (0: the transformer stays as it is)",
        2e-4,
        low=0,
        high=1,
    )
    embedding_learning_rate: float = setting(
        "peak learning rate of the embeddings", 5e-5, low=0, high=1
    )
    warmup_ratio: float = setting("share of the steps with a rising rate", 0.03, low=0, high=0.9)
    weight_decay: float = setting("AdamW weight decay of the LoRA matrices", 0.0, low=0, high=1)
    max_grad_norm: float = setting("gradient clipping", 1.0, low=0)
    epochs: float = setting("passes over the data", 1.0, low=0, high=1e6)
    max_steps: int = setting("stop after this many optimizer steps (-1: --epochs)", -1, low=-1)
    global_batch_size: int = setting(
        "blocks per optimizer step, whatever the number of processes: they share them out",
        16,
        low=1,
    )
    micro_batch_size: int = setting(
        "at most so many blocks per forward pass and process; what is left of its share of the "
        "global batch is accumulated, at the price of more gradient traffic under ZeRO-2",
        4,
        low=1,
        affects_result=False,
    )
    packing: bool = setting(
        "train on packed rows, as step 4 made them; without, every document or conversation is a "
        "row, padded to the longest of its batch: slower, and the same losses",
        True,
    )
    document_mask: bool = setting(
        "restart positions and keep attention inside each document of a block", True
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto: bf16 where the GPU has it, else fp16; fp32 on a CPU", "auto"
    )
    gradient_checkpointing: bool = setting(
        "recompute activations: less memory, a third more time", False, affects_result=False
    )
    compile: bool = setting(
        "compile the layers with torch.compile: a later start, then faster on a GPU",
        False,
        affects_result=False,
    )
    deepspeed: Path | None = setting("DeepSpeed configuration file, as ds_zero2.json", None)
    estimate: int | None = setting(
        "print what training on so many GPUs takes in memory on each of them, and stop",
        None,
        low=1,
        affects_result=False,
    )
    evaluations: int = setting(
        "how often to score the validation set, evenly spaced and besides step 0 (0: never)",
        10,
        low=0,
        affects_result=False,
    )
    tracker: Literal["tensorboard", "wandb", "none"] = setting(
        "where the curves go while training: tensorboard: <output_dir>.tensorboard/; wandb: "
        "Weights & Biases, which is not among the requirements",
        "tensorboard",
        affects_result=False,
    )
    logging_steps: int = setting(
        "steps between two progress lines", 10, low=1, affects_result=False
    )
    save_steps: int = setting(
        "steps between two checkpoints, from which a run that was stopped or killed goes on",
        200,
        low=1,
        affects_result=False,
    )
    keep_checkpoints: int = setting("checkpoints to keep", 2, low=1, affects_result=False)
    stall_seconds: float = setting(
        "with several processes: end the run when one has made no progress for so long, as it "
        "waits for another; rank 0 writes a checkpoint in less",
        600.0,
        low=1,
        affects_result=False,
    )
    max_loss_jump: float = setting(
        "skip a step with a pass whose loss is more than this many times the lowest mean of 20 "
        "passes in a row, or, before there are as many, the largest one",
        3.0,
        low=1,
    )
    max_skipped_steps: int = setting(
        "stop when so many steps in a row were skipped, for a jump or a loss that is no number",
        5,
        low=1,
    )
    seed: int = setting("seed of the LoRA matrices and the order of the blocks", 42, low=0)

    def check_rows(self, prepared: int) -> None:
        """Raises ConfigError when the data was prepared with rows of another size."""
        if prepared != self.block_size:
            raise ConfigError(
                f"{self.data} has rows of {prepared} tokens, but --block-size is "
                f"{self.block_size}: prepare the data with that size, or set it to the data's"
            )

    def contradictions(self) -> list[str]:
        problems = []
        if self.deepspeed is not None:
            problems += _deepspeed_problems(self.deepspeed)
        if self.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
            problems.append("--tracker wandb needs its package: run `pip install wandb`")
        if self.embedding_rows == "new" and not self.train_embeddings:
            problems.append(
                "--embedding-rows new trains embeddings: leave out --no-train-embeddings"
            )
        if self.learning_rate == 0 and not self.train_embeddings:
            problems.append("--learning-rate 0 and --no-train-embeddings leave nothing to train")
        problems += _unshared(self.global_batch_size, self.estimate)
        if self.max_steps == 0 or (self.max_steps < 0 and self.epochs == 0):
            problems.append("--max-steps and --epochs leave nothing to train")
        return problems


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainingConfig):
    """Step 6."""

    samples: int = setting(
        "answers to validation questions of each kind that are shown at the end, greedy and "
        "sampled (0: none)",
        5,
        low=0,
        affects_result=False,
    )
    max_new_tokens: int = setting(
        "longest of these answers in tokens", 256, low=1, affects_result=False
    )


@dataclass(frozen=True, kw_only=True)
class EvalConfig(StepConfig):
    """Step 7."""

    base_model: Path = setting("the base model, in ChatGLM3's layout")
    tokenizer: Path = setting("output folder of step 2")
    resized: Path = setting("output folder of step 3")
    pretrained: Path = setting("output folder of step 5")
    sft: Path = setting("output folder of step 6")
    sources: tuple[Source, ...] = setting("held-out texts: LANGUAGE=PATH_OR_DATASET[#COLUMN]")
    max_chars: int = setting("characters scored per language", 200_000, low=1)
    window: int = setting("longest context in tokens when scoring long texts", 1024, low=8)
    prompts: Path = setting("YAML file of questions to answer: language -> list")
    conversations: tuple[Source, ...] = setting(
        "held-out conversations whose questions the fine-tuned model is asked: "
        "KIND=PATH_OR_DATASET[#COLUMNS], the kind being the language of the answers, or code",
        (),
    )
    choices: tuple[Source, ...] = setting(
        "multiple choice, LANGUAGE=PATH_OR_DATASET, with the columns question, choices (a list) "
        "and answer (the number of the right one, from 0)",
        (),
    )
    max_new_tokens: int = setting("longest answer in tokens", 256, low=1)
    temperature: float = setting(
        "how freely sampled answers are drawn (0: not at all, the likeliest token)",
        0.8,
        low=0,
        high=5,
    )
    top_p: float = setting(
        "sampled answers are drawn from the likeliest tokens of this share", 0.8, low=0.01, high=1
    )
    harness_tasks: tuple[str, ...] = setting(
        "tasks of lm-evaluation-harness by name; needs requirements-extras.txt", ()
    )
    harness_folder: Path | None = setting(
        "folder with YAML files of further tasks, which the harness lets name Python functions "
        "beside them: use only what you trust",
        None,
    )
    harness_limit: int = setting("documents of each task (0: all)", 0, low=0)
    batch_size: int = setting("windows scored at once", 16, low=1, affects_result=False)
    answer_batch_size: int = setting(
        "answers written at once; what is drawn for sampled ones depends on it", 32, low=1
    )
    chat: bool = setting("talk to a model in the terminal", False, affects_result=False)
    web: bool = setting(
        "talk to models on a page in the browser; needs requirements-extras.txt",
        False,
        affects_result=False,
    )
    stage: Literal[LATEST, *STAGES] = setting(  # type: ignore[valid-type]
        "which model --chat and --web talk to", LATEST, affects_result=False
    )
    port: int = setting(
        "port of --web, on this machine only", 7860, low=1, high=65535, affects_result=False
    )
    answer_seconds: float = setting(
        "longest time of an answer of --web", 300.0, low=1, affects_result=False
    )

    def contradictions(self) -> list[str]:
        problems = []
        if self.chat and self.web:
            problems.append("--chat and --web are two ways to talk: choose one")
        if self.harness_folder is not None and not self.harness_tasks:
            problems.append("--harness-folder needs --harness-tasks: the names of tasks to run")
        return problems


def _unshared(batch: int, processes: int | None) -> list[str]:
    """Why the processes, by default those of torchrun, cannot share a global batch; or nothing."""
    count = processes or int(os.environ.get("WORLD_SIZE", "1"))
    if batch % count == 0:
        return []
    return [
        f"--global-batch-size {batch} cannot be shared evenly by {count} processes: choose a "
        f"multiple of {count}"
    ]


def _deepspeed_problems(path: Path) -> list[str]:
    """What is wrong with a DeepSpeed configuration; one sentence each."""
    try:
        stage = read_json(path)["zero_optimization"]["stage"]
    except OSError:
        return [f"--deepspeed {path} not found"]
    except ValueError as error:
        return [f"--deepspeed {path} is not JSON ({error})"]
    except (KeyError, TypeError):
        return [f"--deepspeed {path} names no ZeRO stage: expected 2, as ds_zero2.json"]
    if stage == 3:
        # huggingface/peft#2450, deepspeedai/DeepSpeed#7669
        return [
            f"--deepspeed {path} asks for ZeRO stage 3, which shares out the weights too: with it, "
            "fully trained embeddings have been saved as empty tensors; use ds_zero2.json"
        ]
    return []


def parse_shares(specs: Sequence[str]) -> dict[str, float]:
    """`("ja=76", "zh=12", "en=12")` as fractions that add up to 1."""
    shares: dict[str, float] = {}
    for spec in specs:
        label, _, number = spec.partition("=")
        try:
            share = float(number)
        except ValueError:
            raise ConfigError(f"share {spec!r} is not of the form LABEL=NUMBER") from None
        if label in shares or not 0 < share < 1e9:
            raise ConfigError(f"share {spec!r} must be one positive number for each label")
        shares[label] = share
    if not shares:
        raise ConfigError("no shares are given: expected LABEL=NUMBER")
    total = sum(shares.values())
    return {label: share / total for label, share in shares.items()}
