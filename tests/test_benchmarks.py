"""benchmarks/run.py calls every benchmark with flags it has, and writes the page."""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import PROJECT
from tests.pipeline import flags_of

FOLDER = PROJECT / "benchmarks"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import benchmarks/run.py with its folder on the import path, as when it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("run")
    for name in ("run", "measuring"):
        del sys.modules[name]


def options(**given: object) -> argparse.Namespace:
    nothing = dict.fromkeys(("base_model", "ja_tokenizer", "sources", "llamafactory", "only"))
    return argparse.Namespace(**nothing | {"work_dir": Path("work")} | given)


def test_every_benchmark_knows_its_flags(run: ModuleType) -> None:
    for benchmark in run.BENCHMARKS:
        flags = {*re.findall(r"--[\w-]+", benchmark.flags), *map(run.flag, benchmark.may_use)}
        assert flags <= flags_of(f"benchmarks/{benchmark.script}"), benchmark.script


def test_a_benchmark_that_cannot_run_says_what_it_needs(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    reasons = {b.script: run.missing(b, options()) for b in run.BENCHMARKS}
    assert reasons["startup.py"] == ""
    assert "needs --base-model and --ja-tokenizer and --llamafactory" in reasons["training.py"]
    assert "needs --base-model and --ja-tokenizer and --sources" in reasons["data.py"]
    assert "needs a GPU" in reasons["train_6b.py"]
    given = options(base_model=Path("base"), ja_tokenizer=Path("ja.model"), sources=["ja=a.txt"])
    reasons = {b.script: run.missing(b, given) for b in run.BENCHMARKS}
    assert reasons["data.py"] == reasons["vocabulary.py"] == reasons["resize_6b.py"] == ""


def test_the_page_has_the_ratios_first(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    measured, failed, *_ = (run.Section(benchmark) for benchmark in run.BENCHMARKS)
    program = tmp_path / measured.benchmark.script
    found = {
        "ratios": [{"what": "ours, to theirs", "value": 1.234, "aim": "1.2"}],
        "versions": {"theirs": {"torch": "9"}},
    }
    program.write_text(f"print('| a |\\n|---|\\n| 5 |')\nprint({json.dumps(found)!r})\n")
    values: dict[str, object] = {
        "base_model": "",
        "sources": [],
        "ja_tokenizer": None,
        "work_dir": tmp_path,
    }
    run.measure(measured, values)
    (tmp_path / failed.benchmark.script).write_text("raise SystemExit(3)\n")
    run.measure(failed, values)
    assert failed.missing == "failed with status 3"
    (tmp_path / failed.benchmark.script).write_text("print('no figures')\n")
    run.measure(silent := run.Section(failed.benchmark), values)
    assert silent.missing == "ended without figures: see vocabulary.out"
    command = run.own_command(options(sources=["ja=/secret/a.jsonl"]))
    page = run.page([measured, failed], command, "revision x")
    assert page.index("| ours, to theirs | **1.23** | 1.2 |") < page.index("| 5 |")
    assert "failed with status 3" in page
    assert "| theirs | torch 9 |" in page
    assert "--sources ja=a.jsonl" in page and "secret" not in page
