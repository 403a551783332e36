"""Paths and settings of the three profiles; data only.

CHATGLM_JA_PROFILE    demo (default): a small ChatGLM3 and the texts in demo/data, on a CPU
                      smollm2: SmolLM2-135M-Instruct, a real model, and the demo's texts, on a CPU
                      chatglm3-6b: the real model, in the folder CHATGLM3_6B_DIR
CHATGLM_JA_ARTIFACTS  root of all results (default: artifacts/ beside this file)

STEP1 to STEP8 are the defaults of the steps' command lines. Settings not listed here have their
defaults in chatglm_ja/<room>/settings.py. For a Source see chatglm_ja/sources.py.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from chatglm_ja.errors import did_you_mean
from chatglm_ja.sources import Source

PROJECT_DIR = Path(__file__).resolve().parent
PROFILES = ("demo", "smollm2", "chatglm3-6b")
PROFILE = os.environ.get("CHATGLM_JA_PROFILE", "demo")
if PROFILE not in PROFILES:
    raise SystemExit(
        f"error: CHATGLM_JA_PROFILE is {PROFILE!r}, expected one of {', '.join(PROFILES)}"
        f"{did_you_mean(PROFILE, PROFILES)}"
    )
_artifacts = Path(os.environ.get("CHATGLM_JA_ARTIFACTS") or PROJECT_DIR / "artifacts")
ARTIFACTS_DIR = _artifacts.expanduser() / PROFILE
_base_model = os.environ.get("CHATGLM3_6B_DIR")
# What every step logs first.
PROFILE_LINE = f"profile {PROFILE}"
if PROFILE != "chatglm3-6b" and _base_model:
    PROFILE_LINE += (
        "; warning: it does not use CHATGLM3_6B_DIR, which is set: for the real model, run "
        "`export CHATGLM_JA_PROFILE=chatglm3-6b`"
    )

STEP1_DIR = ARTIFACTS_DIR / "step1_tokenizer"
STEP2_DIR = ARTIFACTS_DIR / "step2_tokenizer"
STEP3_DIR = ARTIFACTS_DIR / "step3_model"
STEP4_DIR = ARTIFACTS_DIR / "step4_data"
STEP5_DIR = ARTIFACTS_DIR / "step5_pt"
STEP6_DIR = ARTIFACTS_DIR / "step6_sft"
STEP7_DIR = ARTIFACTS_DIR / "step7_eval"
STEP8_DIR = ARTIFACTS_DIR / "step8_export"

# The new language comes first; the model must not lose the others.
LANGUAGES = ("ja", "zh", "en")
# The article's mix: shares of pretraining tokens, and shares of conversations.
SHARES: tuple[str, ...] = ("ja=76", "zh=12", "en=12")
SFT_SHARES: tuple[str, ...] = ("ja=52", "zh=22", "en=9", "code=17")

# How every step reads texts and conversations: Unicode form, and the share of bad records at most.
READING: dict[str, Any] = {"unicode_form": "NFC", "max_rejects": 0.01}

# Held out in every profile: steps 2 and 7 measure on the pages, step 7 asks the questions.
DEMO_DATA_DIR = PROJECT_DIR / "demo" / "data"
HELD_OUT_SOURCES = tuple(
    Source(language, f"{DEMO_DATA_DIR}/heldout_{language}.jsonl.gz") for language in LANGUAGES
)
EVALUATED_SOURCES: tuple[Source, ...] = HELD_OUT_SOURCES
HELD_OUT_CONVERSATIONS = tuple(
    Source(kind, f"{DEMO_DATA_DIR}/heldout_sft.jsonl.gz", where=("kind", kind))
    for kind in (*LANGUAGES, "code")
)
HELD_OUT_CHOICES = tuple(
    Source(language, f"{DEMO_DATA_DIR}/heldout_choice.jsonl.gz", where=("language", language))
    for language in LANGUAGES
)
# The language of the translations, and the columns of lines and translations.
HELD_OUT_PARALLEL = tuple(
    Source(
        language,
        f"{DEMO_DATA_DIR}/heldout_parallel.jsonl.gz",
        columns=f"{before}>{after}",
        name=f"{before}>{after}",
    )
    for language, before, after in (
        ("ja", "English", "Japanese"),
        ("ja", "Chinese", "Japanese"),
        ("zh", "English", "Chinese"),
        ("en", "Chinese", "English"),
    )
)

Settings = dict[str, Any]

if PROFILE == "demo":
    BASE_MODEL_DIR: Path | None = ARTIFACTS_DIR / "base_model"
    PRETRAIN_SOURCES: tuple[Source, ...] = tuple(
        Source(language, f"{DEMO_DATA_DIR}/train_{language}.jsonl.gz") for language in LANGUAGES
    )
    SFT_SOURCES: tuple[Source, ...] = tuple(
        Source(
            kind, f"{DEMO_DATA_DIR}/train_sft.jsonl.gz", where=("kind", kind), name=f"help-{kind}"
        )
        for kind in ("ja", "zh", "en", "code")
    )
    TOKENIZER: Settings = {"method": "continue", "vocab_size": 4000}
    DATA: Settings = {
        "total_tokens": 480_000,
        "validation_tokens": 15_000,
        "block_size": 256,
        "sft_examples": 1700,
        "sft_validation_examples": 80,
        "max_length": 256,
    }
    TRAINING: Settings = {
        "lora_rank": 16,
        "lora_alpha": 32,
        "decay_ratio": 0.2,
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "logging_steps": 25,
        "evaluations": 4,
    }
    PRETRAINING: Settings = {
        **TRAINING,
        "block_size": DATA["block_size"],
        "learning_rate": 4e-3,
        "embedding_learning_rate": 5e-4,
    }
    SFT: Settings = {
        **TRAINING,
        "block_size": DATA["max_length"],
        "learning_rate": 4e-3,
        "embedding_learning_rate": 1e-3,
        "epochs": 4.0,
        "replay": 0.4,
        "max_new_tokens": 160,
    }
    EVALUATION: Settings = {
        "window": 256,
        "max_chars": 20_000,
        "translations": 8,
        "max_new_tokens": 128,
        "answer_batch_size": 128,
    }
elif PROFILE == "smollm2":
    # The base knows English only. Chinese is not trained; step 2 shows that its lines stay.
    BASE_MODEL_DIR = ARTIFACTS_DIR / "base_model"
    EVALUATED_SOURCES = tuple(s for s in HELD_OUT_SOURCES if s.language != "zh")
    HELD_OUT_CHOICES = tuple(s for s in HELD_OUT_CHOICES if s.language != "zh")
    HELD_OUT_PARALLEL = tuple(
        dataclasses.replace(HELD_OUT_PARALLEL[0], columns=columns, name=columns, language=language)
        for language, columns in (("ja", "English>Japanese"), ("en", "Japanese>English"))
    )
    SHARES = ("ja=85", "en=15")
    SFT_SHARES = ("ja=70", "en=25", "code=5")
    PRETRAIN_SOURCES = tuple(
        Source(language, f"{DEMO_DATA_DIR}/train_{language}.jsonl.gz") for language in ("ja", "en")
    )
    SFT_SOURCES, HELD_OUT_CONVERSATIONS = (
        tuple(
            Source(kind, f"{DEMO_DATA_DIR}/{part}_sft_ja_en.jsonl.gz", where=("kind", kind))
            for kind in ("ja", "en", "code")
        )
        for part in ("train", "heldout")
    )
    TOKENIZER = {"method": "continue", "vocab_size": 4000}
    DATA = {
        "total_tokens": 480_000,
        "validation_tokens": 15_000,
        "block_size": 256,
        "sft_examples": 1800,
        "sft_validation_examples": 80,
        "max_length": 288,
    }
    TRAINING = {
        "precision": "bf16",  # on a CPU twice as fast as float32
        "lora_rank": 32,
        "lora_alpha": 64,
        "global_batch_size": 4,
        "micro_batch_size": 4,
        "logging_steps": 25,
        "evaluations": 4,
    }
    PRETRAINING = {
        **TRAINING,
        "block_size": DATA["block_size"],
        "learning_rate": 2e-3,
        "embedding_learning_rate": 3e-4,
        "warmup_ratio": 0.05,
    }
    SFT = {
        **TRAINING,
        "block_size": DATA["max_length"],
        "learning_rate": 5e-4,
        "embedding_learning_rate": 2e-4,
        "replay": 0.4,
        "max_new_tokens": 160,
    }
    EVALUATION = {
        "window": 512,
        "max_chars": 20_000,
        "max_new_tokens": 128,
        "answer_batch_size": 32,
    }
else:
    BASE_MODEL_DIR = Path(_base_model).expanduser() if _base_model else None
    PRETRAIN_SOURCES = (
        Source("ja", "izumi-lab/wikipedia-ja-20230720"),
        Source("ja", "globis-university/aozorabunko-clean"),
        Source("zh", "pleisto/wikipedia-cn-20230720-filtered", columns="completion"),
        # The article's is wikitext-103-v1: the same text with <unk> in place of rare words.
        Source("en", "Salesforce/wikitext", subset="wikitext-103-raw-v1", format="wikitext"),
    )
    # The article's fourth Japanese data set is available on request; it is used if its files, such
    # as ichikara-instruction-003-001-1.json, are there.
    _ichikara = Source(
        "ja",
        f"{PROJECT_DIR}/data/ichikara-instruction-*.json",
        name="ichikara-instruction",
        columns="text>output",
        id_column="ID",
    )
    SFT_SOURCES = (
        Source("ja", "kunishou/oasst2-chat-68k-ja", columns="conversations"),
        Source("ja", "kunishou/databricks-dolly-15k-ja", columns="instruction+input>output"),
        Source("ja", "fn-aka-mur/japanese_hh-rlhf-49k", columns="instruction+input>output"),
        *([_ichikara] if any((PROJECT_DIR / "data").glob(Path(_ichikara.path).name)) else []),
        Source("zh", "shibing624/alpaca-zh", columns="instruction+input>output"),
        Source("zh", "LooksJuicy/ruozhiba", columns="instruction>output"),
        # Only label 1 marks correct answers, about a thousand; the next two fill the share.
        Source("en", "microsoft/wiki_qa", where=("label", "1"), columns="question>answer"),
        Source("en", "databricks/databricks-dolly-15k", columns="instruction+context>response"),
        Source("en", "HuggingFaceH4/no_robots", columns="messages"),
        Source("code", "sahil2801/CodeAlpaca-20k", columns="instruction+input>output"),
        Source(
            "code",
            "iamtarun/python_code_instructions_18k_alpaca",
            columns="instruction+input>output",
        ),
    )
    # 78,539 ids with the base's 64,798: no more embedding rows than the article's model.
    TOKENIZER = {"method": "continue", "vocab_size": 14_000, "input_sentence_size": 1_000_000}
    DATA = {
        "total_tokens": 1_000_000_000,
        "decontaminate": HELD_OUT_SOURCES,
        "sft_examples": 200_000,
        "max_length": 1024,
        "block_size": 1024,
    }
    TRAINING = {
        "lora_rank": 64,
        "lora_alpha": 128,
        "gradient_checkpointing": "full",
        "compile": True,
        "save_steps": 1000,  # a checkpoint has 9 GB; half an hour on four RTX 4090
        # On four GPUs, one micro-batch of four blocks each: ZeRO-2 sends gradients once per step.
        "global_batch_size": 16,
        "micro_batch_size": 4,
    }
    PRETRAINING = {
        **TRAINING,
        "block_size": DATA["block_size"],
        "learning_rate": 2e-4,
        "embedding_learning_rate": 5e-5,
    }
    SFT = {
        **TRAINING,
        "block_size": DATA["max_length"],
        "learning_rate": 1e-4,
        "embedding_learning_rate": 2e-5,
        "replay": 0.4,
    }
    EVALUATION = {"window": 1024}

NEW_SOURCES = tuple(s for s in PRETRAIN_SOURCES if s.language == LANGUAGES[0])

STEP1: Settings = {
    **READING,
    "sources": NEW_SOURCES,
    "base_model": BASE_MODEL_DIR,
    "output_dir": STEP1_DIR,
    **TOKENIZER,
}
STEP2: Settings = {
    **READING,
    "base_model": BASE_MODEL_DIR,
    "ja_tokenizer": STEP1_DIR,
    "ranking_sources": NEW_SOURCES,
    "check_sources": HELD_OUT_SOURCES,
    "output_dir": STEP2_DIR,
}
STEP3: Settings = {
    "base_model": BASE_MODEL_DIR,
    "tokenizer": STEP2_DIR,
    "output_dir": STEP3_DIR,
}
STEP4: Settings = {
    **READING,
    "tokenizer": STEP2_DIR,
    "sources": PRETRAIN_SOURCES,
    "shares": SHARES,
    "sft_sources": SFT_SOURCES,
    "sft_shares": SFT_SHARES,
    "output_dir": STEP4_DIR,
    **DATA,
}
# The tokenizer is for --estimate.
STEP5: Settings = {
    "model": STEP3_DIR,
    "data": STEP4_DIR,
    "tokenizer": STEP2_DIR,
    "vocab_size": TOKENIZER["vocab_size"],
    "output_dir": STEP5_DIR,
    **PRETRAINING,
}
STEP6: Settings = {
    "model": STEP5_DIR,
    "data": STEP4_DIR,
    "tokenizer": STEP2_DIR,
    "vocab_size": TOKENIZER["vocab_size"],
    "output_dir": STEP6_DIR,
    **SFT,
}
STEP7: Settings = {
    **READING,
    "base_model": BASE_MODEL_DIR,
    "tokenizer": STEP2_DIR,
    "resized": STEP3_DIR,
    "pretrained": STEP5_DIR,
    "sft": STEP6_DIR,
    "sources": EVALUATED_SOURCES,
    "conversations": HELD_OUT_CONVERSATIONS,
    "choices": HELD_OUT_CHOICES,
    "parallel": HELD_OUT_PARALLEL,
    "prompts": PROJECT_DIR / "prompts" / f"{PROFILE}.yaml",
    "output_dir": STEP7_DIR,
    **EVALUATION,
}
STEP8: Settings = {
    "model": STEP6_DIR,
    "base_model": BASE_MODEL_DIR,
    "output_dir": STEP8_DIR,
}
