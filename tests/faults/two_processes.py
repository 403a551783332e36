"""Step 5 in one of two processes, with NaN in one step of rank 1.

    two_processes.py loss|micro-batch|gradients NOTES flags of step 5

NaN is the loss of all micro-batches of the step, the loss of its second one, or its gradients.
Before every micro-batch each process appends the SHA-256 of the trained weights to NOTES-<rank>.
"""

import hashlib
import math
import os
import runpy
import sys
from collections import Counter
from typing import Any

import torch

from chatglm_ja.training.checkpoints import gather_tensors
from chatglm_ja.training.trainer import ResumableTrainer
from tests.pipeline import PROJECT

BAD_STEP = 3


def main() -> None:
    bad, notes, rank = sys.argv.pop(1), sys.argv.pop(1), os.environ["RANK"]
    compute = ResumableTrainer.compute_loss
    micro_batches: Counter[int] = Counter()
    step = ResumableTrainer.training_step

    def compute_badly(self: Any, *given: Any, **named: Any) -> Any:
        loss: Any = compute(self, *given, **named)
        step = self.state.global_step + 1
        micro_batches[step] += 1
        if (step, rank) != (BAD_STEP, "1") or (bad == "micro-batch" and micro_batches[step] != 2):
            return loss
        if bad != "gradients":
            return loss * math.nan
        loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    def noted(self: Any, *given: Any, **named: Any) -> torch.Tensor:
        weights = gather_tensors(self, wanted=True)
        digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values()))
        with open(f"{notes}-{rank}", "a", encoding="utf-8") as file:
            file.write(digest.hexdigest() + "\n")
        return step(self, *given, **named)

    ResumableTrainer.compute_loss = compute_badly  # type: ignore[method-assign]
    ResumableTrainer.training_step = noted  # type: ignore[method-assign]
    sys.argv[0] = str(PROJECT / "step5_train_pt.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
