"""Where everything lies and with which settings it is made: two profiles, data only.

CHATGLM_JA_PROFILE    demo (default): a small ChatGLM3 and the texts in demo/data, on a CPU
                      chatglm3-6b: the real model, in the folder CHATGLM3_6B_DIR
CHATGLM_JA_ARTIFACTS  root of all results (default: artifacts/ beside this file)

STEP1 ... STEP7 are the defaults of the steps' command lines; what they leave out has its default
in chatglm_ja/config.py. A source is LABEL=PATH_OR_DATASET[@SUBSET][?COLUMN=VALUE][#COLUMNS].
"""

import os
from pathlib import Path
from typing import Any

PROJECT_DIR = Path(__file__).resolve().parent
PROFILES = ("demo", "chatglm3-6b")
PROFILE = os.environ.get("CHATGLM_JA_PROFILE", "demo")
if PROFILE not in PROFILES:
    raise SystemExit(
        f"error: CHATGLM_JA_PROFILE is {PROFILE!r}, expected one of {', '.join(PROFILES)}"
    )
ARTIFACTS_DIR = Path(os.environ.get("CHATGLM_JA_ARTIFACTS") or PROJECT_DIR / "artifacts") / PROFILE

STEP1_DIR = ARTIFACTS_DIR / "step1_tokenizer"
STEP2_DIR = ARTIFACTS_DIR / "step2_tokenizer"
STEP3_DIR = ARTIFACTS_DIR / "step3_model"
STEP4_DIR = ARTIFACTS_DIR / "step4_data"
STEP5_DIR = ARTIFACTS_DIR / "step5_pt"
STEP6_DIR = ARTIFACTS_DIR / "step6_sft"
STEP7_DIR = ARTIFACTS_DIR / "step7_eval"

# The article's mix: tokens of pretraining text, and numbers of conversations.
SHARES = ("ja=76", "zh=12", "en=12")
SFT_SHARES = ("ja=52", "zh=22", "en=9", "code=17")

Settings = dict[str, Any]

if PROFILE == "demo":
    DATA_DIR = PROJECT_DIR / "demo" / "data"
    BASE_MODEL_DIR: Path | None = ARTIFACTS_DIR / "base_model"
    PRETRAIN_SOURCES = tuple(
        f"{language}={DATA_DIR}/train_{language}.jsonl.gz" for language in ("ja", "zh", "en")
    )
    HELD_OUT_SOURCES = tuple(
        f"{language}={DATA_DIR}/heldout_{language}.jsonl.gz" for language in ("ja", "zh", "en")
    )
    SFT_SOURCES = tuple(
        f"{kind}={DATA_DIR}/train_sft.jsonl.gz?kind={kind}#messages"
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
        "micro_batch_size": 8,
        "logging_steps": 25,
        "evaluations": 4,
    }
    PRETRAINING: Settings = {
        **TRAINING,
        "learning_rate": 4e-3,
        "embedding_learning_rate": 5e-4,
    }
    SFT: Settings = {
        **TRAINING,
        "learning_rate": 2e-3,
        "embedding_learning_rate": 5e-4,
        "epochs": 2.0,
    }
    EVALUATION: Settings = {"window": 256, "max_chars": 40_000, "max_new_tokens": 64}
else:
    _folder = os.environ.get("CHATGLM3_6B_DIR")
    BASE_MODEL_DIR = Path(_folder) if _folder else None
    PRETRAIN_SOURCES = (
        "ja=izumi-lab/wikipedia-ja-20230720",
        "ja=globis-university/aozorabunko-clean",
        "zh=pleisto/wikipedia-cn-20230720-filtered#completion",
        "en=Salesforce/wikitext@wikitext-103-v1",
    )
    HELD_OUT_SOURCES = tuple(
        f"{language}={PROJECT_DIR}/demo/data/heldout_{language}.jsonl.gz"
        for language in ("ja", "zh", "en")
    )
    SFT_SOURCES = (
        "ja=kunishou/oasst2-chat-68k-ja#conversations",
        "ja=kunishou/databricks-dolly-15k-ja#instruction+input>output",
        "ja=fujiki/japanese_hh-rlhf-49k#instruction+input>output",
        # Given out on application; put the file here.
        f"ja={PROJECT_DIR}/data/ichikara-instruction-20231221-003.json#text>output",
        "zh=shibing624/alpaca-zh#instruction+input>output",
        "zh=LooksJuicy/ruozhiba#instruction>output",
        # Only its label 1 marks right answers, about a thousand; the next two fill the share.
        "en=microsoft/wiki_qa?label=1#question>answer",
        "en=databricks/databricks-dolly-15k#instruction+context>response",
        "en=HuggingFaceH4/no_robots#messages",
        "code=sahil2801/CodeAlpaca-20k#instruction+input>output",
        "code=iamtarun/python_code_instructions_18k_alpaca#instruction+input>output",
    )
    # With the base's 64,798 ids 78,539: no more embedding rows than the article's model has.
    TOKENIZER = {"method": "continue", "vocab_size": 14_000, "input_sentence_size": 1_000_000}
    DATA = {
        "total_tokens": 1_000_000_000,
        "sft_examples": 220_000,
        "max_length": 1024,
        "block_size": 1024,
    }
    TRAINING = {"gradient_checkpointing": True, "micro_batch_size": 4}
    PRETRAINING = {**TRAINING, "learning_rate": 2e-4, "embedding_learning_rate": 5e-5}
    SFT = {**TRAINING, "learning_rate": 1e-4, "embedding_learning_rate": 2e-5}
    EVALUATION = {"window": 1024}

JA_SOURCES = tuple(source for source in PRETRAIN_SOURCES if source.startswith("ja="))

STEP1: Settings = {
    "sources": JA_SOURCES,
    "base_model": BASE_MODEL_DIR,
    "output_dir": STEP1_DIR,
    **TOKENIZER,
}
STEP2: Settings = {
    "base_model": BASE_MODEL_DIR,
    "ja_tokenizer": STEP1_DIR,
    "ranking_sources": JA_SOURCES,
    "check_sources": HELD_OUT_SOURCES,
    "output_dir": STEP2_DIR,
}
STEP3: Settings = {
    "base_model": BASE_MODEL_DIR,
    "tokenizer": STEP2_DIR,
    "output_dir": STEP3_DIR,
}
STEP4: Settings = {
    "tokenizer": STEP2_DIR,
    "sources": PRETRAIN_SOURCES,
    "shares": SHARES,
    "sft_sources": SFT_SOURCES,
    "sft_shares": SFT_SHARES,
    "output_dir": STEP4_DIR,
    **DATA,
}
STEP5: Settings = {
    "model": STEP3_DIR,
    "data": STEP4_DIR,
    "output_dir": STEP5_DIR,
    **PRETRAINING,
}
STEP6: Settings = {
    "model": STEP5_DIR,
    "data": STEP4_DIR,
    "output_dir": STEP6_DIR,
    **SFT,
}
STEP7: Settings = {
    "base_model": BASE_MODEL_DIR,
    "tokenizer": STEP2_DIR,
    "resized": STEP3_DIR,
    "pretrained": STEP5_DIR,
    "sft": STEP6_DIR,
    "sources": HELD_OUT_SOURCES,
    "prompts": PROJECT_DIR / "prompts" / f"{PROFILE}.yaml",
    "output_dir": STEP7_DIR,
    **EVALUATION,
}
