"""The model card: README.md, which Hugging Face shows for a folder of weights.

It says what the model was made from, with which settings, what step 7 measured, and how to use it.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chatglm_ja.reports.eval_report import render_markdown
from chatglm_ja.reports.render import render_template
from chatglm_ja.storage.files import publish_file

log = logging.getLogger(__name__)

CARD_FILE = "model_card.md"  # in step 7's folder
README = "README.md"  # the same in the model's folder
LICENSE = "MODEL_LICENSE"  # ChatGLM3-6B's, published beside its weights

Results = Mapping[str, Any]

# The steps whose settings are shown.
STEPS = {"step5_train_pt": "Continued pretraining", "step6_train_sft": "Instructions"}


def write_card(folder: Path, results: Results, base_dir: Path) -> None:
    """Write model_card.md; it links to the base's license if `base_dir` holds it."""
    steps = results["steps"]
    counts = steps.get("step4_prepare_data", {}).get("counts", {})
    settings = [
        (title, _setting_rows(steps[step])) for step, title in STEPS.items() if step in steps
    ]
    card = render_template(
        "model_card.md.jinja",
        languages=list(results["stages"][0]["languages"]),
        license_file=LICENSE if (base_dir / LICENSE).is_file() else None,
        results=render_markdown(results).rstrip(),
        data=list(_data_tables(counts)),
        settings=settings,
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _data_tables(
    counts: Mapping[str, Any],
) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield a table of the sources of each data set: its title, head and rows."""
    for part, title, columns in (
        ("pretrain", "Pretraining", ("documents", "train_documents", "train_tokens", "repeats")),
        ("sft", "Instructions", ("documents", "train_examples", "train_tokens")),
    ):
        rows = [
            [source["name"], *(f"{source[c]:,}" if c in source else "" for c in columns)]
            for source in counts.get(part, {}).get("sources", [])
        ]
        if rows:
            head = [column.removeprefix("train_") for column in columns[1:]]
            yield title, ["source", "read", *head], rows


def _setting_rows(manifest: Mapping[str, Any]) -> list[list[str]]:
    counts = dict(manifest["counts"])
    counts |= counts.pop("speed", {})
    values = {**manifest["arguments"], **counts}
    return [[f"`{name}`", str(value)] for name, value in values.items()]


def publish_card(results_dir: Path, model_dir: Path, base_dir: Path) -> None:
    """Copy the card, and the base's license if there is one, into the model's folder.

    The model's manifest does not list them, so the model counts as unchanged. If the folder is not
    writable, a warning is logged.
    """
    copies = {results_dir / CARD_FILE: model_dir / README}
    if (base_dir / LICENSE).is_file():
        copies[base_dir / LICENSE] = model_dir / LICENSE
    try:
        for source, target in copies.items():
            with publish_file(target) as partial:
                shutil.copyfile(source, partial)
        log.info("model card: %s", model_dir / README)
    except OSError as error:
        log.warning("could not write the model card to %s: %s", model_dir, error.strerror)
