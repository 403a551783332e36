"""SIGKILL at random moments: the resumed run's output is byte-identical."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from chatglm_ja.training.checkpoints import BEFORE_DECAY, OPTIMIZER, WEIGHTS
from tests.faults.forks import Forks
from tests.faults.ledger import Ledger
from tests.pipeline import STEPS, Runner

KILLS = 204  # over all six steps
SHORT_KILLS = 12
# Save a checkpoint after every step, so that a kill can hit one.
MORE = {5: ["--save-steps", "1"], 6: ["--save-steps", "1"], 4: ["--num-processes", "1"]}


def files_of(folder: Path) -> Any:
    """Return the size and SHA-256 of every file."""
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]


@pytest.mark.parametrize("script", STEPS[:6])
def test_a_killed_step_ends_with_the_same_bytes(
    pipeline: Runner, forks: Forks, ledger: Ledger, thorough: bool, script: str
) -> None:
    number = STEPS.index(script) + 1
    root = pipeline.folder / f"kills{number}"
    flags = [*MORE.get(number, []), "--output-dir"]
    undisturbed = forks.small(script, *flags, str(root / "undisturbed"))
    assert undisturbed.status == 0, undisturbed.said
    target = root / "killed"
    flags.append(str(target))
    moments = random.Random(number)
    kills = 0
    while kills < (KILLS if thorough else SHORT_KILLS) // 6:
        moment = moments.uniform(0, undisturbed.seconds)
        ended = forks.small(script, *flags, kill_after=moment)
        if ended.status == 0:
            shutil.rmtree(target)  # it finished before the kill
            continue
        assert ended.status == -9, ended.said
        kills += 1
        with ledger.trial("kills", script.removesuffix(".py")):
            again = forks.small(script, *flags)
            assert again.status == 0, again.said
            assert files_of(target) == files_of(root / "undisturbed")
            # Nothing else is left: no lock, no unfinished work, no checkpoint but one.
            kept = ("", ".tensorboard", BEFORE_DECAY)
            allowed = {f"{name}{suffix}" for name in ("undisturbed", "killed") for suffix in kept}
            assert {path.name for path in root.iterdir()} <= allowed
            for name in (WEIGHTS, OPTIMIZER) if (root / f"killed{BEFORE_DECAY}").exists() else ():
                found, expected = (
                    (root / f"{run}{BEFORE_DECAY}" / name).read_bytes()
                    for run in ("killed", "undisturbed")
                )
                assert found == expected
        shutil.rmtree(target)
    shutil.rmtree(root)
