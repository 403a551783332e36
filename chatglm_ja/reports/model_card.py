"""The card of a fine-tuned model: README.md, as people expect it beside published weights.

It says what the model was made from, with which settings, what it measured and how it is used, by
the manifests of the steps and the results of step 7, which writes it.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chatglm_ja.reports import markdown

log = logging.getLogger(__name__)

CARD_FILE = "model_card.md"  # in step 7's folder
README = "README.md"  # the same in the model's
LICENCE = "MODEL_LICENSE"  # ChatGLM3-6B's, as published beside its weights

Results = Mapping[str, Any]

# The steps whose settings are shown.
STEPS = {
    "step5_train_pt": "Continued pretraining",
    "step6_train_sft": "Instructions",
}

USE = """\
The folder is a plain `GlmForCausalLM` with its tokenizer and chat template; nothing needs remote
code. `FOLDER` is where it lies.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto", device_map="auto")
messages = [{"role": "user", "content": "日本の首都はどこですか？"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)
output = model.generate(**inputs, max_new_tokens=256, do_sample=True, temperature=0.8, top_p=0.8)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1]:], skip_special_tokens=True))
```

The tokenizer puts `[gMASK] sop` before a text, and the chat template holds it already: a prompt
that was made as text (`tokenize=False`) is encoded with `add_special_tokens=False`.

As a server with OpenAI's interface, and a chat in the terminal:

```bash
transformers serve FOLDER          # pip install "transformers[serving]"
transformers chat FOLDER           # in a second terminal
vllm serve FOLDER --served-model-name chatglm3-ja     # or by vLLM, without further settings
```
"""

LICENCE_TEXT = """\
The weights were trained from the base model's and inherit its licence. ChatGLM3-6B's is free for
academic research, and for commercial use after registration with its publisher{file}. The data
sets above have licences of their own.
"""


def render(results: Results, tables: str, base_dir: Path) -> str:
    """The card as Markdown, with the results as `tables`; it names the base's licence if that lies
    in the base's folder."""
    licensed = (base_dir / LICENCE).is_file()
    languages = list(results["stages"][0]["languages"])
    licence = ["license: other"]
    if licensed:
        licence += ["license_name: chatglm3-6b", f"license_link: {LICENCE}"]
    lines = [
        "---",
        f"language: [{', '.join(languages)}]",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *licence,
        "---",
        "",
        f"# ChatGLM3 that learned another language: {languages[0]}",
        "",
        "A model of ChatGLM3's architecture: its vocabulary was extended by pieces of that "
        "language, its embeddings resized, its pretraining continued (LoRA on the transformer and "
        "the embeddings in full, together), and it was fine-tuned on instructions.",
        "",
        "## Results",
        "",
        tables.rstrip(),
        "",
        "## Data",
        "",
        *_data(results["steps"]),
        "## Settings",
        "",
        *_settings(results["steps"]),
        "## Use",
        "",
        USE,
        "## Licence",
        "",
        LICENCE_TEXT.format(file=f" ({LICENCE} in this folder)" if licensed else ""),
    ]
    return "\n".join(lines)


def _data(steps: Mapping[str, Any]) -> Iterator[str]:
    """The sources, with what was taken of them."""
    counts = steps.get("step4_prepare_data", {}).get("counts", {})
    for part, title, columns in (
        ("pretrain", "Pretraining", ("documents", "train_documents", "train_tokens", "repeats")),
        ("sft", "Instructions", ("documents", "train_examples", "train_tokens")),
    ):
        sources = counts.get(part, {}).get("sources")
        if sources:
            rows = [
                [source["name"], *(_count(source.get(c)) for c in columns)] for source in sources
            ]
            head = ["source", *(column.removeprefix("train_") for column in columns)]
            head[1] = "read"
            yield from (f"{title}, by source:", "", *markdown.markdown_table(head, rows), "")


def _count(value: Any) -> str:
    return "" if value is None else f"{value:,}"


def _settings(steps: Mapping[str, Any]) -> Iterator[str]:
    for step, title in STEPS.items():
        if step in steps:
            arguments, counts = steps[step]["arguments"], dict(steps[step]["counts"])
            counts |= counts.pop("speed", {})
            rows = [[f"`{name}`", str(value)] for name, value in {**arguments, **counts}.items()]
            yield from (f"{title}:", "", *markdown.markdown_table(["setting", "value"], rows), "")


def place(results_dir: Path, model_dir: Path, base_dir: Path) -> None:
    """Put the card, and the base's licence if there is one, into the model's folder.

    They are not among the files of its manifest: the model stays the same. A folder that cannot
    be written to is left as it is, with a word.
    """
    copies = {results_dir / CARD_FILE: model_dir / README}
    if (base_dir / LICENCE).is_file():
        copies[base_dir / LICENCE] = model_dir / LICENCE
    try:
        for source, target in copies.items():
            partial = target.with_name(f".{target.name}.writing")
            shutil.copyfile(source, partial)
            partial.replace(target)
        log.info("model card: %s", model_dir / README)
    except OSError as error:
        log.warning("no model card in %s: %s", model_dir, error.strerror)
