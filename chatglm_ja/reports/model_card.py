"""The model card: README.md beside the weights, which Hugging Face shows.

It says what the model was made from, with which settings, what step 7 measured, and how to use it.
"""

import logging
import shutil
from pathlib import Path

from chatglm_ja.reports.eval_report import RESULTS_FILE, render_markdown
from chatglm_ja.reports.eval_tables import Results
from chatglm_ja.reports.render import render_template
from chatglm_ja.sources import HUB_NAME
from chatglm_ja.storage.files import publish_file, read_json

log = logging.getLogger(__name__)

CARD_FILE = "model_card.md"  # in step 7's folder; README.md in the model's
# Beside ours. Of a license in the same folder, the hub's metadata can name no other file.
LICENSE = "LICENSE"


def write_card(folder: Path, results: Results, base_dir: Path) -> None:
    """Write model_card.md."""
    (folder / CARD_FILE).write_text(render_card(results, base_dir), encoding="utf-8")


def render_card(results: Results, base_dir: Path) -> str:
    """Return the model card; it links to the base's license if `base_dir` holds it."""
    steps, settings = results["steps"], []
    for step, title in (
        ("step5_train_pt", "Continued pretraining"),
        ("step6_train_sft", "Instructions"),
    ):
        if step in steps:
            counts = dict(steps[step]["counts"])
            speed = counts.pop("speed", {})
            values = {**steps[step]["arguments"], **counts, **speed}
            settings.append((title, [[f"`{name}`", str(values[name])] for name in values]))
    counts = steps.get("step4_prepare_data", {}).get("counts", {})
    data = []
    for part, title, columns in (
        ("pretrain", "Pretraining", ("documents", "train_documents", "train_tokens", "repeats")),
        ("sft", "Instructions", ("documents", "train_examples", "train_tokens")),
    ):
        head = ["source", "read", *(column.removeprefix("train_") for column in columns[1:])]
        rows = [
            [source["name"], *(f"{source[c]:,}" if c in source else "" for c in columns)]
            for source in counts.get(part, {}).get("sources", [])
        ]
        if rows:
            data.append((title, head, rows))
    return render_template(
        "model_card.md.jinja",
        metadata=_describe_for_hub(results, base_dir),
        languages=list(results["stages"][0]["languages"]),
        stages=[stage["name"] for stage in results["stages"]],
        base=results["base"],
        license_file=LICENSE if _has_license(results, base_dir) else None,
        results=render_markdown(results).rstrip(),
        data=data,
        settings=settings,
    )


def _describe_for_hub(results: Results, base_dir: Path) -> str:
    """Return a card's metadata as YAML.

    The base's name is the one that its config.json gives, if it is one of the hub.
    """
    from huggingface_hub import ModelCardData

    path = base_dir / "config.json"
    name = str(read_json(path).get("_name_or_path")) if path.is_file() else ""
    base_name = name if "/" in name and HUB_NAME.fullmatch(name) else None
    base, license_link = results["base"], None
    if _has_license(results, base_dir):
        license_link = LICENSE
    elif base_name and base["license_file"]:
        license_link = f"https://huggingface.co/{base_name}/blob/main/{base['license_file']}"
    arguments = results["steps"].get("step4_prepare_data", {}).get("arguments", {})
    sources = [*arguments.get("sources", []), *arguments.get("sft_sources", [])]
    # The paths of local files are not recorded.
    datasets = dict.fromkeys(source["path"] for source in sources if "path" in source)
    return ModelCardData(
        language=list(results["stages"][0]["languages"]),
        base_model=base_name,
        datasets=list(datasets) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        license="other",
        license_name=base["license_name"] if license_link else None,
        license_link=license_link,
    ).to_yaml()


def _has_license(results: Results, base_dir: Path) -> bool:
    """Return whether the base's folder holds its license."""
    name = results.get("base", {}).get("license_file")
    return name is not None and (base_dir / name).is_file()


def publish_card(results_dir: Path, model_dir: Path, base_dir: Path) -> None:
    """Copy the card, and the base's license if there is one, into the model's folder.

    The model's manifest does not list them, so the model counts as unchanged. If the folder is not
    writable, a warning is logged.
    """
    card = model_dir / "README.md"
    copies = {results_dir / CARD_FILE: card}
    results = read_json(results_dir / RESULTS_FILE)
    if _has_license(results, base_dir):
        copies[base_dir / results["base"]["license_file"]] = model_dir / LICENSE
    try:
        for source, target in copies.items():
            with publish_file(target) as partial:
                shutil.copyfile(source, partial)
        log.info("model card: %s", card)
    except OSError as error:
        log.warning("could not write the model card to %s: %s", model_dir, error.strerror)
