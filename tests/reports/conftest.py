"""Results of step 7, of three stages."""

from typing import Any

import pytest

from tests.reports.pages import EVIL


@pytest.fixture
def results() -> dict[str, Any]:
    def measured(share: float | None) -> dict[str, Any]:
        return {
            "questions": 8, "in_language": share, "ended": 0.5, "repeated": 0.25, "longest_loop": 9,
        }  # fmt: skip

    def stage(name: str, bits: float) -> dict[str, Any]:
        given = {"text": EVIL, "tokens": 3, "stopped": True}
        score = {
            "bits_per_char": bits, "bits_per_byte": bits / 2,
            "tokens_per_char": 0.5, "chars_per_second": 1234.5,
        }  # fmt: skip
        return {
            "name": name,
            "languages": {"ja": score},
            "kept": {},
            "answers": [
                {"language": "ja", "question": EVIL, "expected": expected, "greedy": given,
                 "sampled": given | {"text": "cut", "stopped": False}}
                for expected in (f"{EVIL} expected", None)
            ],
            "answering": {"greedy": measured(1.0), "sampled": measured(None)},
            "held_out": [],
            "choices": {},
            "tasks": [],
            "likeness": [],
            "retention": {},
            "confusion": {},
            "probes": [],
            "translations": [],
            "harness": [],
        }  # fmt: skip

    stages = [stage("base", 4.0), stage("resized", 3.75), stage("pretrained", 3.0)]
    same = {"tokens": 99, "largest_difference": 0.0, "divergence_bits": 0.0}
    stages[1]["kept"] = {"zh": same}
    stages[2]["kept"] = {"zh": same | {"largest_difference": 1.5, "divergence_bits": 0.25}}
    stages[2]["held_out"] = [
        {"kind": "ja", "way": "greedy", **measured(0.75)},
        {"kind": "code", "way": "greedy", **measured(None)},
    ]
    row = {
        "lines": 10,
        "identical_share": 0.5,
        "tokens_per_char_before": 1.0,
        "tokens_per_char_after": 0.5,
    }
    history = [
        {"step": 0, "eval_ja_loss": 5.0, "eval_ja_bits_per_char": 6.0},
        {"step": 5, "loss": 4.0},
        {"step": 9, "loss": 3.0, "eval_ja_loss": 3.0, "eval_ja_bits_per_char": 4.0},
    ]
    manifest = {
        "step": "step6_train_sft",
        "arguments": {"lora_rank": 8, "odd": EVIL},
        "counts": {"steps": 7, "speed": {"mfu": 0.25}},
        "fingerprint": "cd" * 32,
        "lineage": {"step2": "ab" * 32},
        "versions": {"torch": "2"},
    }
    base = {
        "name": "ChatGLM3", "model_class": "GlmForCausalLM", "prefix": "[gMASK] sop",
        "sampling": "temperature 0.8", "license_file": "MODEL_LICENSE",
        "license_name": "chatglm3-6b", "license_note": "Known to its publisher.",
    }  # fmt: skip
    return {
        "base": base,
        "model": {"name": "demo/<step6>", "date": "2030-01-02"},
        "stages": stages,
        "segmentation": {"ja": row},
        "samples": [
            {"language": "ja", "text": EVIL, "before": ["<", "b"], "after": ["<b"], "new": [True]},
            {"language": "en", "text": "a", "before": ["a"], "after": ["a"], "new": [False]},
        ],
        "curves": {"Step 5": history},
        "steps": {"step6_train_sft": manifest},
    }
