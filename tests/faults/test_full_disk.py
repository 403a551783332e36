"""Full disk: a one-line error, an intact previous result, and a next run that succeeds."""

import shutil
from pathlib import Path

import pytest

from chatglm_ja.storage import files
from tests.faults.forks import Forks
from tests.faults.ledger import Ledger
from tests.pipeline import STEPS, Runner

# A write that makes a file larger than this fails, where it would fail on a full disk.
LIMIT = 16_384


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): files.digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("script", STEPS)
def test_a_full_disk_loses_nothing(
    unlocked: Runner, forks: Forks, ledger: Ledger, script: str
) -> None:
    (made,) = (p for p in unlocked.folder.glob(script[:5] + "_*") if not p.suffix)
    root = unlocked.folder / f"full{script[4]}"
    target = root / made.name
    shutil.copytree(made, target)
    # Link the inputs to where the manifest expects them.
    for other in unlocked.folder.iterdir():
        if other not in (made, root):
            (root / other.name).symlink_to(other)
    flags = ["--overwrite", "--output-dir", str(target)]
    before = contents(target)
    with ledger.trial("disk", script.removesuffix(".py")) as row:
        row.reads = forks.small(script, *flags, largest_file=LIMIT).error
        assert contents(target) == before
        for left in root.iterdir():
            assert not left.name.startswith("."), left
            assert not list(left.rglob("*.part"))
        again = forks.small(script, *flags)
        assert again.status == 0, again.said
        card = {"README.md"}  # step 7 writes it into step 6's folder
        assert contents(target).keys() == before.keys() - card
