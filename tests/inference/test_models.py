"""Which stages there are to compare."""

import logging
from pathlib import Path

import pytest

from chatglm_ja.inference.models import STAGES, Stage, compared_stages
from tests.conftest import write_manifest


def make_stages(folder: Path, *finished: str) -> list[Stage]:
    for name in finished:
        (folder / name).mkdir()
        write_manifest(folder / name, {})
    return [Stage(name, folder / name) for name in STAGES]


@pytest.mark.parametrize("left_out", ["pretrained", "sft"])
def test_one_trained_stage_may_be_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, left_out: str
) -> None:
    stages = make_stages(tmp_path, *({"resized", "pretrained", "sft"} - {left_out}))
    with caplog.at_level(logging.INFO):
        compared = compared_stages(stages)
    assert [stage.name for stage in compared] == [name for name in STAGES if name != left_out]
    (line,) = caplog.messages
    assert f"without the stage {left_out}" in line and str(STAGES[left_out]) in line


def test_opening_says_which_step_to_run_if_none_is_trained(tmp_path: Path) -> None:
    stages = make_stages(tmp_path, "resized")
    assert compared_stages(stages) == stages
