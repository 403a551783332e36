"""Step 7: what the model gained and what it cost, from the base through every stage.

Reads   <base model>/, <artifacts>/step2_tokenizer/, step3_model/, step5_pt/, step6_sft/
Writes  <artifacts>/step7_eval/  results.json, results.md, report.html
Run     python step7_eval.py
"""

import json
import logging
from pathlib import Path
from typing import Any

import constants
from chatglm_ja import corpus
from chatglm_ja.artifacts import (
    Output,
    open_artifact,
    open_base_model,
    open_file_input,
    open_sources,
)
from chatglm_ja.cli import run
from chatglm_ja.config import EvalConfig
from chatglm_ja.settings import parse

log = logging.getLogger(__name__)

RESULTS_TABLE = "results.md"


def main() -> None:
    config = parse(EvalConfig, __doc__, constants.STEP7)
    pretrained = open_artifact(config.pretrained, "step5_train_pt.py")
    sft = open_artifact(config.sft, "step6_train_sft.py")
    inputs = [
        *open_base_model(config.base_model),
        open_sources("held_out", config.sources),
        open_sources("held_out_conversations", config.conversations),
        open_file_input("prompts", config.prompts),
        open_artifact(config.tokenizer, "step2_merge_tokenizer.py"),
        open_artifact(config.resized, "step3_resize_model.py"),
        pretrained,
        sft,
    ]
    output = Output(config.output_dir, Path(__file__).stem, config.arguments(), inputs)
    if output.is_settled(config.overwrite, config.check):
        if (config.output_dir / RESULTS_TABLE).exists():
            print((config.output_dir / RESULTS_TABLE).read_text(encoding="utf-8"))
        return

    from chatglm_ja import (
        checkpoint,
        evaluation,
        model,
        report,
        segmentation,
        tokenizer,
        training,
    )

    base_tokenizer = tokenizer.with_special_tokens(tokenizer.read_base(config.base_model))
    before = tokenizer.processor(base_tokenizer)
    after = tokenizer.load(config.tokenizer)
    prompts = evaluation.read_prompts(config.prompts)
    texts = {
        language: corpus.take_characters(all_texts, config.max_chars)
        for language, all_texts in corpus.texts_by_language(config.sources).items()
    }
    held_out = evaluation.read_held_out(config.conversations)

    def evaluate(name: str, candidate: Any, encoder: Any) -> dict[str, Any]:
        stage = evaluation.evaluate(
            name,
            candidate,
            encoder,
            texts,
            prompts,
            window=config.window,
            batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens,
        )
        scores = stage["languages"].items()
        bits = ", ".join(f"{language} {row['bits_per_char']:.3f}" for language, row in scores)
        log.info("%s: bits per character %s", name, bits)
        return stage

    base = checkpoint.load_base(config.base_model, model.compute_dtype())
    stages = [evaluate("base", base.to(evaluation.device()), before)]
    del base
    for name, folder in (
        ("resized", config.resized),
        ("pretrained", config.pretrained),
        ("sft", config.sft),
    ):
        candidate = evaluation.load_model(folder)
        stages.append(evaluate(name, candidate, after))
        if folder == config.sft:
            held_out_answers = evaluation.answer_held_out(
                candidate, after, held_out, config.max_new_tokens
            )
        del candidate  # before the next one is loaded

    sentence = corpus.sample_sentence(texts[next(iter(texts))])
    results = {
        "stages": stages,
        "held_out_answers": held_out_answers,
        "segmentation": {
            language: segmentation.compare(before, after, documents, "all").row()
            for language, documents in texts.items()
        },
        "sample": {
            "text": sentence,
            "before": before.encode(sentence, out_type=str),
            "after": after.encode(sentence, out_type=str),
        },
        "curves": {
            "Step 5, continued pretraining": training.read_history(config.pretrained),
            "Step 6, instructions": training.read_history(config.sft),
        },
        "lineage": output.lineage,
        "versions": sft.manifest["versions"],
    }
    table = report.markdown(results)
    with output.write() as folder:
        text = json.dumps(results, indent=1, ensure_ascii=False)
        (folder / "results.json").write_text(text + "\n", encoding="utf-8")
        (folder / RESULTS_TABLE).write_text(table, encoding="utf-8")
        (folder / "report.html").write_text(report.html_page(results), encoding="utf-8")
    print(table)
    log.info("report: %s", config.output_dir / "report.html")


if __name__ == "__main__":
    run(main)
