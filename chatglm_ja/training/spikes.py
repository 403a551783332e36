"""Which steps a run learns from: not from those whose loss or gradients are no numbers, or jump.

A step that is not learned from changes no weight; several in a row end the run with advice. The
decisions follow from numbers that all processes share, so that all come to the same.
"""

import logging
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from chatglm_ja.errors import DataError

log = logging.getLogger(__name__)

# Passes whose mean loss a later one is compared with; before there are as many, the largest loss
# counts, from so few on.
RECENT_PASSES = 20
FIRST_PASSES = 3


class SpikeGuard:
    """Judges the passes and steps of a run; steps count from 1.

    max_jump       times the usual loss that a pass may have
    max_skipped    steps in a row that may be skipped
    """

    def __init__(self, max_jump: float, max_skipped: int) -> None:
        self.max_jump = max_jump
        self.max_skipped = max_skipped
        self.recent: deque[float] = deque(maxlen=RECENT_PASSES)
        self.lowest = math.inf  # mean of so many in a row
        self.skipped = 0  # steps in a row
        self._spoiled = 0  # the last step with a bad pass
        self._judged = 0  # the last step whose gradients were judged

    @property
    def usual(self) -> float:
        """The mean loss of the last passes, NaN before there is any."""
        return sum(self.recent) / len(self.recent) if self.recent else math.nan

    def accepts(self, step: int, loss: float, has_tokens: bool) -> bool:
        """Whether to learn from a pass of this loss per token; a bad one spoils the later passes
        of its step. Raises DataError when it is hopeless."""
        if self._spoiled == step:
            return False
        if loss == 0.0 and not self.recent:
            raise DataError("the loss of the first step is 0: its rows train no token")
        # A run that diverges slowly takes the mean of its last passes along, but not the lowest.
        before = self.lowest
        if FIRST_PASSES <= len(self.recent) < RECENT_PASSES:
            before = max(self.recent)
        if not (math.isfinite(loss) and loss <= self.max_jump * before):
            self._spoiled = step
            self._skip(step, f"the training loss is {loss:.4g}")
            return False
        if has_tokens:
            self.recent.append(loss)
        if len(self.recent) == RECENT_PASSES:
            self.lowest = min(self.lowest, self.usual)
        return True

    def judge_gradients(self, step: int, norm: float) -> None:
        """Count what became of a step that is over, by the norm of its gradients."""
        if step == self._judged:
            return
        self._judged = step
        if self._spoiled == step:
            return  # which has been said
        if math.isfinite(norm):
            self.skipped = 0
        else:
            self._skip(step, f"the norm of the gradients is {norm:.4g}")

    def state(self) -> dict[str, Any]:
        """What a run that is resumed goes on with, for JSON."""
        lowest = self.lowest if math.isfinite(self.lowest) else None  # JSON has no infinity
        return {"recent_losses": list(self.recent), "lowest_loss": lowest}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.recent.extend(state["recent_losses"])
        self.lowest = state.get("lowest_loss") or math.inf

    def _skip(self, step: int, reason: str) -> None:
        """Warn of a step that changes no weight; raises DataError after too many in a row."""
        self.skipped += 1
        cure = "lower --learning-rate and --embedding-learning-rate, or use --precision bf16"
        if not self.recent:
            raise DataError(f"{reason} at step {step}: {cure}")
        before = f"after a loss of {self.usual:.4g} before"
        if self.skipped > self.max_skipped:
            raise DataError(
                f"{reason} at step {step}, {before}, and {self.skipped - 1} steps in a row were "
                f"skipped for that: {cure}"
            )
        log.warning("step %d is skipped: %s, %s", step, reason, before)
