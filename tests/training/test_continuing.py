"""A finished run that is given more data: it goes on from before its decay."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from chatglm_ja.data import dataset
from chatglm_ja.errors import ArtifactError, ConfigError
from chatglm_ja.storage.inputs import Input, merge_lineage
from chatglm_ja.storage.manifest import Manifest
from chatglm_ja.training import train
from chatglm_ja.training.adapter import ADAPTER
from chatglm_ja.training.checkpoints import PROGRESS, Checkpoints
from chatglm_ja.training.settings import TrainingConfig
from chatglm_ja.training.step import open_run
from tests.training.runs import checkpoints_in, config_for, interrupted_after


def test_a_continued_run_ends_as_one_that_had_all_data_at_once(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """A run of four steps goes on after its second: that and four more are a run of six."""
    # Every step has all rows, so that the order in which two runs draw them does not matter.
    rows = len(dataset.load_rows(data_dir, "pretrain", "train"))
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))

    def run(folder: Path, steps: int, continue_from: Path | None = None) -> dict[str, Any]:
        config = config_for(
            resized_dir, data_dir, folder, continue_from=continue_from, max_steps=steps,
            decay_ratio=2 / steps, warmup_ratio=0.0, global_batch_size=rows, micro_batch_size=16,
            epochs=9.0, evaluations=0, save_steps=1,
        )  # fmt: skip
        return train.train(config, "pretrain", folder, Checkpoints(folder / "checkpoints", {}, 1))

    run(whole, 6)
    run(first, 4)
    continued = first / "checkpoints"
    assert not (continued / "step-000002").exists()  # only the last one is kept
    with interrupted_after(1):
        run(second, 4, continued)
    history = run(second, 4, continued)["history"]
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert rates[:3] == [1e-2] * 3  # of the step after the constant phase, too
    assert rates[3] < 1e-2
    found, expected = (
        load_file(f / ADAPTER / "adapter_model.safetensors") for f in (second, whole)
    )
    assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_run_without_a_constant_phase_leaves_nothing_to_continue(
    resized_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    config = config_for(resized_dir, data_dir, tmp_path, max_steps=2, save_steps=1, evaluations=0)
    train.train(config, "pretrain", tmp_path, checkpoints_in(tmp_path))
    assert not (tmp_path / "checkpoints.before_decay").exists()


Change = Callable[[Path, dict[str, Any]], Any]
REFUSED: dict[str, tuple[Change, str]] = {
    "other step": (lambda _, m: m.update(step="step6"), "is not a result of step5"),
    "other scale": (lambda _, m: m["arguments"].update(lora_alpha=64), "lora_alpha=64, not 16"),
    "cosine": (
        lambda f, _: f.with_name("run.before_decay").rename(f.with_name("elsewhere")),
        "not found: expected the output of a run with a constant phase",
    ),
    "damaged": (
        lambda f, _: (f.with_name("run.before_decay") / PROGRESS).write_text("{"),
        f"{PROGRESS} has 1 bytes, expected",
    ),
    "of an unfinished run": (lambda _, m: m["arguments"].update(seed=1), "with seed=42, not 1"),
    "other model": (lambda _, m: m["lineage"].update(step3="b"), "was made with step3"),
}


@pytest.mark.parametrize("problem", [None, *REFUSED])
def test_what_cannot_be_continued_is_refused(tmp_path: Path, problem: str | None) -> None:
    config = TrainingConfig(model=tmp_path, data=tmp_path, output_dir=tmp_path / "next")
    folder, lineage = tmp_path / "run", {"step3": "a", "step4": "old data"}
    content: dict[str, Any] = {
        "step": "step5", "arguments": config.arguments() | {"lora_targets": []}, "counts": {},
        "inputs": {}, "lineage": lineage, "fingerprint": "f" * 64, "files": {},
    }  # fmt: skip
    change, message = REFUSED.get(problem or "", (lambda *_: None, ""))
    run = content["arguments"] | lineage
    if problem == "other model":
        run = run | {"step3": "b"}
    Checkpoints(tmp_path / "run.checkpoints", run, keep=1).write(3, {PROGRESS: {}}, True)
    folder.mkdir()
    change(folder, content)
    (folder / "manifest.json").write_text(Manifest(**content).model_dump_json())
    model = Input("step3", "a", {"step3": "a"})
    data = Input("step4", "new data", {"step4": "new data"})
    if problem is None:
        merged = merge_lineage([model, data, open_run(config, folder, "step5", model)])
        assert merged == {"step3": "a", "step4": "new data", "continued_run": "f" * 64}
        return
    with pytest.raises((ArtifactError, ConfigError), match=message):
        merge_lineage([model, data, open_run(config, folder, "step5", model)])


def test_a_run_is_not_continued_into_its_own_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the output folder as well: choose another"):
        TrainingConfig(
            model=tmp_path, data=tmp_path, output_dir=tmp_path / "run",
            continue_from=tmp_path / "." / "run",
        )  # fmt: skip
