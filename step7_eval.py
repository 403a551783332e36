"""Step 7: what the model gained and what it cost, from the base through every stage.

Reads   <base model>/, <artifacts>/step2_tokenizer/, step3_model/, step5_pt/, step6_sft/
Writes  <artifacts>/step7_eval/  results.json, results.md, report.html, model_card.md;
        the card also as README.md into step6_sft/
Run     python step7_eval.py
        python step7_eval.py --chat      talk to the latest model in the terminal
        python step7_eval.py --web       ... on a page in the browser, or to two side by side
"""

import json
import logging
from pathlib import Path

import constants
from chatglm_ja import model_card, space, stages
from chatglm_ja.artifacts import Output, history, open_artifact, open_file_input, open_sources
from chatglm_ja.cli import run
from chatglm_ja.config import EvalConfig
from chatglm_ja.settings import parse

log = logging.getLogger(__name__)

RESULTS_TABLE = "results.md"


def main() -> None:
    config = parse(EvalConfig, __doc__, constants.STEP7)
    if config.chat or config.web:
        talk(config)
        return
    compared = stages.of_config(config)
    inputs = [
        open_sources("held_out", config.sources),
        open_sources("held_out_conversations", config.conversations),
        open_sources("choices", config.choices),
        open_file_input("prompts", config.prompts),
        open_artifact(config.tokenizer, "step2_merge_tokenizer.py", every_byte=config.verify),
        *(opened for stage in compared for opened in stage.open(config.verify)),
    ]
    output = Output(config, Path(__file__).stem, inputs)
    if config.check:
        from chatglm_ja import evaluation

        evaluation.Evaluation(config, evaluation.read(config))
    if output.is_settled(space.REPORTS_BYTES):
        if not config.check:
            model_card.place(config.output_dir, config.sft, config.base_model)
            print((config.output_dir / RESULTS_TABLE).read_text(encoding="utf-8"))
        return

    from chatglm_ja import evaluation, report, segmentation, tokenizer, training

    material = evaluation.read(config)
    evaluated = evaluation.Evaluation(config, material)
    measured = [evaluated.of_stage(s, is_last=s is compared[-1]) for s in compared]
    before = tokenizer.processor(compared[0].tokenizer_model())
    after = tokenizer.load(config.tokenizer)
    results = {
        "stages": measured,
        "segmentation": {
            language: segmentation.compare(before, after, documents, "all").row()
            for language, documents in material.texts.items()
        },
        "samples": segmentation.samples(before, after, material.texts),
        "curves": {
            "Step 5, continued pretraining": training.read_history(config.pretrained),
            "Step 6, instructions": training.read_history(config.sft),
        },
        "steps": {**history(config.sft), output.step: output.describe()},
    }
    table = report.markdown(results)
    with output.write() as folder:
        text = json.dumps(results, indent=1, ensure_ascii=False)
        (folder / "results.json").write_text(text + "\n", encoding="utf-8")
        (folder / RESULTS_TABLE).write_text(table, encoding="utf-8")
        (folder / "report.html").write_text(report.html_page(results), encoding="utf-8")
        card = model_card.render(results, table, config.base_model)
        (folder / model_card.FILE).write_text(card, encoding="utf-8")
    model_card.place(config.output_dir, config.sft, config.base_model)
    print(table)
    log.info("report: %s", config.output_dir / "report.html")


def talk(config: EvalConfig) -> None:
    """Answer in the terminal, or serve the page, until the user ends it."""
    there = stages.finished(config)
    chosen = stages.named(there, config.stage)
    if config.web:
        from chatglm_ja import web

        web.check(config.port)
        web.serve(there, chosen, config)
        return
    chosen.open()
    from chatglm_ja import generation, terminal

    untrained = ", which has not been trained here" if chosen.name in ("base", "resized") else ""
    log.info("talking to %s, %s%s", chosen.name, chosen.folder, untrained)
    sampling = generation.Sampling(config.temperature, config.top_p)
    terminal.talk(*chosen.load(), config.max_new_tokens, sampling)


if __name__ == "__main__":
    run(main)
