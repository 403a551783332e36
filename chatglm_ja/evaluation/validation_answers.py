"""Answers to validation questions, printed at the end of fine-tuning.

The prompts are the starts of validation conversations, as step 4 prepared them, up to their first
answer. So no file of questions is needed, and the expected answer is known. Step 7 has the measures
over many questions.

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

from chatglm_ja.chatglm3.chat_format import IGNORE_INDEX
from chatglm_ja.cli import is_main_process
from chatglm_ja.data import dataset
from chatglm_ja.evaluation.answers import generate_decodings
from chatglm_ja.inference.generation import DECODINGS, Sampling
from chatglm_ja.inference.models import load_model
from chatglm_ja.training.settings import SftConfig

log = logging.getLogger(__name__)

Sample = dict[str, Any]  # kind, question, expected, and the answer in each decoding


def print_samples(config: SftConfig) -> None:
    """Let the merged model answer `config.samples` questions of every kind; print the answers.

    The model is published already, so a full GPU is only logged.
    """
    if not is_main_process():
        return
    rows = dataset.unpack_rows(dataset.load_rows(config.data, "sft", "validation"))
    kinds = [dataset.title_language(title) for title in dataset.source_titles(config.data, "sft")]
    chosen: dict[str, list[Any]] = {kind: [] for kind in kinds}
    for place, (source,) in enumerate(rows["sources"]):
        if len(chosen[kinds[source]]) < config.samples:
            chosen[kinds[source]].append(rows[place])
    questions = [(kind, row) for kind, group in chosen.items() for row in group]
    if not questions:
        return
    try:
        print(describe_samples(_answer_questions(config, questions)))
    except torch.OutOfMemoryError as error:
        log.warning("no sample answers, the GPU's memory is full: %s", str(error).split(". ")[0])


def _answer_questions(config: SftConfig, questions: Sequence[tuple[str, Any]]) -> list[Sample]:
    """Answer questions, given as (kind, row of the SFT data)."""
    model = load_model(config.output_dir)
    spans = [_find_first_answer(row["labels"]) for _, row in questions]
    decodings = generate_decodings(
        model,
        [row["input_ids"][:start] for (_, row), (start, _) in zip(questions, spans, strict=True)],
        config.max_new_tokens,
        Sampling(),
        seed=config.seed,
    )

    def decode(ids: list[int]) -> str:
        return model.tokenizer.decode(ids).strip()  # special tokens have no text

    return [
        {
            "kind": kind,
            "question": decode(row["input_ids"][:start]),
            "expected": decode(row["input_ids"][start:end]),
            **{name: dataclasses.asdict(answers[index]) for name, answers in decodings.items()},
        }
        for index, ((kind, row), (start, end)) in enumerate(zip(questions, spans, strict=True))
    ]


def _find_first_answer(labels: Sequence[int]) -> tuple[int, int]:
    """Return where a conversation's first answer starts, and where the token that ends it is."""
    start = next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
    rest = range(start, len(labels))
    end = next((place for place in rest if labels[place] == IGNORE_INDEX), len(labels))
    return start, end - 1


def describe_samples(samples: Sequence[Sample]) -> str:
    """Format the samples as lines; the last one counts the answers that ended by themselves."""

    def shorten(text: str, width: int = 160) -> str:
        text = text.replace("\n", "⏎")
        return text if len(text) <= width else text[: width - 1] + "…"

    lines = ["answers to validation questions; ■ ended by itself, … cut at the limit"]
    for sample in samples:
        lines.append(f"{sample['kind']:<4}  {shorten(sample['question'])}")
        lines.append(f"      expected  {shorten(sample['expected'])}")
        for name in DECODINGS:
            end = "■" if sample[name]["stopped"] else "…"
            lines.append(f"      {name:<8}  {shorten(sample[name]['text'])} {end}")
    ended = ", ".join(
        f"{sum(sample[name]['stopped'] for sample in samples)} of {len(samples)} {name}"
        for name in DECODINGS
    )
    return "\n".join([*lines, f"ended by themselves: {ended}"])
