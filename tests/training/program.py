"""A run under DeepSpeed in a process of its own, or in several: program.py SETTINGS FOLDER.

SETTINGS are JSON. Rank 0 writes its history, and what became of the rotary frequencies, to
FOLDER/report.json. Half precision is computed on the CPU, too, float16 included.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from chatglm_ja.training import adapter, train
from chatglm_ja.training.trainer import ResumableTrainer
from tests.pipeline import PROJECT
from tests.training.runs import checkpoints_in, config_for


def main() -> None:
    settings, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    model, data = Path(settings.pop("model")), Path(settings.pop("data"))
    config = config_for(model, data, folder, deepspeed=PROJECT / "ds_zero2.json", **settings)
    if config.precision == "fp16":
        adapter.choose_dtype = lambda config: torch.float16
        type(get_accelerator()).is_fp16_supported = lambda _: True
    report: dict[str, Any] = {}
    end_step = ResumableTrainer.end_step

    def noted(self: Any) -> None:
        rotary = self.model.get_base_model().model.rotary_emb
        exact, _ = rotary.compute_default_rope_parameters(rotary.config)
        report["weights"] = str(self.model.get_base_model().lm_head.weight.dtype)
        report["rotary"] = str(rotary.inv_freq.dtype), torch.equal(rotary.inv_freq, exact)
        end_step(self)

    ResumableTrainer.end_step = noted  # type: ignore[method-assign]
    is_first = os.environ["RANK"] == "0"
    result = train.train(config, "pretrain", folder if is_first else None, checkpoints_in(folder))
    if is_first:
        report["history"] = result["history"]
        (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
