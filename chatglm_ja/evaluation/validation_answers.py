"""A fine-tuned model's answers to validation questions, to look at when the training has ended.

The prompts are the beginnings of conversations that were kept from training, as step 4 prepared
them, up to their first answer; so they need no file of questions, and each comes with the answer
that was expected. Figures over many questions are step 7's.

    ja  次の文を日本語に翻訳してください。⏎Click to open the Fields dialog.
        expected  クリックするとフィールドダイアログが開きます。
        greedy    クリックするとフィールドダイアログを開きます。 ■
        sampled   フィールドダイアログを開きます。 ■           ■ ended by itself, … cut at the limit
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch

from chatglm_ja.chatglm3 import chat_format, tokenizer
from chatglm_ja.cli import is_main_process
from chatglm_ja.data import dataset
from chatglm_ja.evaluation import answers
from chatglm_ja.inference import generation, models
from chatglm_ja.training.settings import SftConfig

log = logging.getLogger(__name__)

Sample = dict[str, Any]


def print_samples(config: SftConfig) -> None:
    """Let the merged model answer `config.samples` questions of every kind, and print the answers.

    The model is published already: whatever happens here costs the samples only.
    """
    if not is_main_process():
        return
    rows = dataset.unpack_rows(dataset.load_rows(config.data, "sft", "validation"))
    kinds = [dataset.title_language(title) for title in dataset.source_titles(config.data, "sft")]
    places: dict[str, list[int]] = {kind: [] for kind in kinds}
    for place, (number,) in enumerate(rows["sources"]):
        places[kinds[number]].append(place)
    asked = [
        (kind, rows[place])
        for kind, of_kind in places.items()
        for place in of_kind[: config.samples]
    ]
    if not asked:
        return
    try:
        print(describe(_answered(config, asked)))
    except torch.OutOfMemoryError as error:
        log.warning("no sample answers, the GPU's memory is full: %s", str(error).split(". ")[0])


def _answered(config: SftConfig, asked: Sequence[tuple[str, Any]]) -> list[Sample]:
    encoder = tokenizer.load_processor(config.output_dir)
    splits = [_split(row["labels"]) for _, row in asked]
    prompts = [row["input_ids"][:start] for (_, row), (start, _) in zip(asked, splits, strict=True)]
    model = models.load_model(config.output_dir)
    given = answers.ask(
        model,
        encoder,
        prompts,
        config.max_new_tokens,
        generation.Sampling(),
        "answers",
        config.seed,
    )
    return [
        {
            "kind": kind,
            "question": _text(encoder, row["input_ids"][:start]),
            "expected": _text(encoder, row["input_ids"][start:end]),
            **{name: dataclasses.asdict(of_way[index]) for name, of_way in given.items()},
        }
        for index, ((kind, row), (start, end)) in enumerate(zip(asked, splits, strict=True))
    ]


def describe(samples: Sequence[Sample]) -> str:
    """The samples as lines, and how many answers ended by themselves."""
    lines = ["answers to questions that were kept from training; ■ ended by itself, … cut"]
    for sample in samples:
        lines.append(f"{sample['kind']:<4}  {_line(sample['question'])}")
        lines.append(f"      expected  {_line(sample['expected'])}")
        for name in answers.WAYS:
            end = "■" if sample[name]["stopped"] else "…"
            lines.append(f"      {name:<8}  {_line(sample[name]['text'])} {end}")
    ended = ", ".join(
        f"{sum(sample[name]['stopped'] for sample in samples)} of {len(samples)} {name}"
        for name in answers.WAYS
    )
    return "\n".join([*lines, f"ended by themselves: {ended}"])


def _split(labels: Sequence[int]) -> tuple[int, int]:
    """Where a conversation's first answer begins, and what ends it stands."""
    start = next(place for place, label in enumerate(labels) if label != chat_format.IGNORE_INDEX)
    rest = range(start, len(labels))
    end = next((place for place in rest if labels[place] == chat_format.IGNORE_INDEX), len(labels))
    return start, end - 1


def _text(encoder: Any, ids: list[int]) -> str:
    """Special tokens have no text."""
    return encoder.decode(ids).strip()


def _line(text: str, width: int = 160) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= width else text[: width - 1] + "…"
