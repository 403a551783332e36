"""Loss spikes: a step with a non-finite or unusually large loss or gradient changes no weight.

The trainer compares the loss of each micro-batch with `SpikeGuard.limit` on the device, and makes
the gradients NaN if it is above. Optimizers skip a step with non-finite gradients. After each step
the host reads the losses and `SpikeGuard.end_step` counts them: too many skipped steps in a row end
the run. It is given the same numbers on all processes, so all decide alike.
"""

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from chatglm_ja.errors import DataError

log = logging.getLogger(__name__)

# A loss is compared with the lowest mean of WINDOW micro-batches in a row. Until there are as many,
# it is compared with the largest loss so far, provided that there are at least MIN_LOSSES.
WINDOW = 20
MIN_LOSSES = 3
FIX = "lower --learning-rate and --embedding-learning-rate, or use --precision bf16"


class SpikeGuard:
    """Keeps the recent losses, which set the limit for the next step, and counts skipped steps.

    max_jump       largest allowed ratio of a micro-batch's loss to the losses before it
    max_skipped    largest allowed number of skipped steps in a row
    """

    def __init__(self, max_jump: float, max_skipped: int) -> None:
        self.max_jump = max_jump
        self.max_skipped = max_skipped
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.lowest_mean = math.inf  # of WINDOW losses in a row
        self.skipped = 0  # steps in a row

    @property
    def mean(self) -> float:
        """The mean of the recent losses, NaN before the first."""
        return sum(self.recent) / len(self.recent) if self.recent else math.nan

    @property
    def limit(self) -> float:
        """The largest loss per token that a micro-batch of the next step may have."""
        # In a run that diverges slowly the recent mean rises with the loss; the lowest does not.
        is_early = MIN_LOSSES <= len(self.recent) < WINDOW
        return self.max_jump * (max(self.recent) if is_early else self.lowest_mean)

    def end_step(self, step: int, losses: Sequence[float], grad_norm: float) -> None:
        """Record a finished step, counted from 1; warn if it was skipped.

        `losses` has one loss per token for each micro-batch, 0 for one without trained tokens.
        Raises DataError if the first step has no trained token, if there is no good step before a
        skipped one, and if too many steps in a row were skipped.
        """
        limit = self.limit
        for loss in losses:
            if loss == 0.0 and not self.recent:
                raise DataError("the loss of the first step is 0: its rows train no token")
            if not (math.isfinite(loss) and loss <= limit):
                self._skip(step, f"the training loss is {loss:.4g}")
                return
            if loss:
                self.recent.append(loss)
            if len(self.recent) == WINDOW:
                self.lowest_mean = min(self.lowest_mean, self.mean)
        if not math.isfinite(grad_norm):
            self._skip(step, f"the norm of the gradients is {grad_norm:.4g}")
            return
        self.skipped = 0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores, as JSON values."""
        lowest = self.lowest_mean if math.isfinite(self.lowest_mean) else None
        return {"recent_losses": list(self.recent), "lowest_loss": lowest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.recent.extend(state["recent_losses"])
        self.lowest_mean = state.get("lowest_loss") or math.inf

    def _skip(self, step: int, reason: str) -> None:
        self.skipped += 1
        if not self.recent:
            raise DataError(f"{reason} at step {step}: {FIX}")
        before = f"after a loss of {self.mean:.4g} before"
        if self.skipped > self.max_skipped:
            raise DataError(
                f"{reason} at step {step}, {before}, and {self.skipped - 1} steps in a row were "
                f"skipped for that: {FIX}"
            )
        log.warning("step %d is skipped: %s, %s", step, reason, before)
