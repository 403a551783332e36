"""The notebook, on the artifacts of a finished run."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.pipeline import PROJECT, Runner

NOTEBOOK = PROJECT / "demo/walkthrough.ipynb"


def test_it_runs_and_shows_pictures(pipeline: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in pipeline.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CHATGLM_JA_PROFILE", raising=False)
    notebook = nbformat.read(NOTEBOOK, 4)
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds >= {"image/png", "image/svg+xml", "text/html"}
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "ids before" in said and "bits per character" in said
    # What libraries print has the paths of this machine, and does not belong in the notebook.
    assert [output for output in outputs if output.get("name") == "stderr"] == []
