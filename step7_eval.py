"""Step 7: what the model gained and what it cost, from the base through every stage.

Reads   <base model>/, <artifacts>/step2_tokenizer/, step3_model/, step5_pt/ and step6_sft/, or one
        of the two
Writes  <artifacts>/step7_eval/  results.json, results.md, report.html, model_card.md;
        the card also as README.md into step6_sft/
Run     python step7_eval.py
        python step7_eval.py --chat      chat with the latest model in the terminal
        python step7_eval.py --web       ... on a web page, or with two models side by side
        python step7_eval.py --benchmarks-only --harness-tasks xwinograd_jp
                                         published benchmarks alone, on the latest model
"""

from chatglm_ja.cli import run  # first: it makes Ctrl-C during the other imports quiet

# isort: split
import dataclasses
import logging
from pathlib import Path

import constants
from chatglm_ja.bases import families
from chatglm_ja.evaluation.settings import EvalConfig
from chatglm_ja.inference import models
from chatglm_ja.settings import parse
from chatglm_ja.storage.files import read_json
from chatglm_ja.storage.inputs import Input, open_artifact, open_files, open_sources
from chatglm_ja.storage.manifest import read_history
from chatglm_ja.storage.output import Output

log = logging.getLogger(__name__)


def main() -> None:
    config = parse(EvalConfig, __doc__, constants.STEP7, profile=constants.PROFILE_LINE)
    if config.chat or config.web:
        chat_with_model(config)
        return
    if config.benchmarks_only:
        run_benchmarks(config)
        return
    compared = models.compared_stages(config.stages())
    inputs = [
        open_sources("held_out", config.sources),
        open_sources("held_out_conversations", config.conversations),
        open_sources("choices", config.choices),
        *open_benchmarks(config),
        open_sources("parallel", config.parallel),
        open_files("prompts", config.prompts),
        open_artifact(config.tokenizer, "step2_merge_tokenizer.py", every_byte=config.verify),
        *(opened for stage in compared for opened in stage.open(config.verify, config.tokenizer)),
    ]
    output = Output(config, Path(__file__).stem, inputs)
    if config.check:
        from chatglm_ja.evaluation import evaluate

        evaluate.Evaluation(config)
    if not output.prepare():
        if not config.check:
            show_results(config, compared[-1].folder)
        return

    from chatglm_ja.evaluation import evaluate, judged
    from chatglm_ja.reports import eval_report, model_card
    from chatglm_ja.training.train import HISTORY_FILE
    from chatglm_ja.vocabulary import merging
    from chatglm_ja.vocabulary.policies import Policy

    evaluation = evaluate.Evaluation(config)
    measured = [evaluation.evaluate_stage(stage) for stage in compared]
    answered = {stage["name"]: stage.pop("judged") for stage in measured}
    base = families.open_base(config.base_model)
    before, after = base.tokenizer, families.load_tokenizer(config.tokenizer)
    steps = read_history(compared[-1].folder) | {output.step: output.describe()}
    results = {
        "base": dataclasses.asdict(base.describe()),
        "model": compared[-1].describe(),
        "stages": measured,
        "segmentation": {
            language: merging.compare_segmentation(before, after, documents, Policy.ALL).row()
            for language, documents in evaluation.texts.items()
        },
        "samples": merging.sample_sentences(before, after, evaluation.texts),
        "curves": {
            eval_report.TRAINING_TITLES[stage.name]: read_json(stage.folder / HISTORY_FILE)
            for stage in compared
            if stage.name not in models.UNTRAINED
        },
        "steps": {step: manifest.model_dump() for step, manifest in steps.items()},
    }
    with output.write() as folder:
        eval_report.write_report(folder, results)
        model_card.write_card(folder, results, config.base_model)
        judged.write_answers(folder, answered)
    show_results(config, compared[-1].folder)


def open_benchmarks(config: EvalConfig) -> list[Input]:
    """Open the files of --tasks and --judge-questions."""
    return [
        open_files("tasks", *config.task_files()),
        open_files("judge_questions", *config.judge_questions),
    ]


def run_benchmarks(config: EvalConfig) -> None:
    """Run the benchmarks alone, on one stage; print their results.

    They are published as a folder of their own beside step 7's, which has the stage in its name.
    """
    from chatglm_ja.reports import eval_report

    stage = models.find_stage(models.finished_stages(config.stages()), config.stage)
    folder = config.output_dir.with_name(f"{config.output_dir.name}_{stage.name}")
    config = dataclasses.replace(config, output_dir=folder)
    inputs = [*open_benchmarks(config), *stage.open(config.verify)]
    output = Output(config, Path(__file__).stem, inputs)
    if config.check:
        from chatglm_ja.evaluation import benchmarks

        benchmarks.Benchmarks(config)
    if output.prepare():
        from chatglm_ja.evaluation import benchmarks, judged

        results = benchmarks.Benchmarks(config).run(stage, benchmarks.load_scorer(stage, config))
        answered = {stage.name: results.pop("judged")}
        with output.write() as working:
            eval_report.write_benchmarks(working, [{"name": stage.name, **results}])
            judged.write_answers(working, answered)
    if not config.check:
        print(eval_report.summarize_benchmarks(folder))


def show_results(config: EvalConfig, model_dir: Path) -> None:
    """Copy the model card into the last model's folder and print the summary of the results."""
    from chatglm_ja.reports import eval_report, model_card

    model_card.publish_card(config.output_dir, model_dir, config.base_model)
    results = read_json(config.output_dir / eval_report.RESULTS_FILE)
    print(eval_report.summarize(results, config.output_dir / eval_report.REPORT_FILE))


def chat_with_model(config: EvalConfig) -> None:
    """Chat in the terminal, or serve the chat page, until the user ends it."""
    stages = models.finished_stages(config.stages())
    stage = models.find_stage(stages, config.stage)
    from chatglm_ja.inference import chat
    from chatglm_ja.inference.generation import ChatOptions, Sampling

    options = ChatOptions(
        Sampling(config.temperature, config.top_p), config.max_new_tokens,
        unicode_form=config.unicode_form,
    )  # fmt: skip
    if config.web:
        from chatglm_ja.evaluation import answers
        from chatglm_ja.inference import web

        web.check_port(config.port)
        options = dataclasses.replace(options, seconds=config.answer_seconds)
        languages = [source.language for source in config.sources]
        prompts = answers.read_prompts(config.prompts, languages, config.unicode_form)
        examples = [questions[0] for questions in prompts.values()]
        web.serve(stages, stage, options, examples, config.port)
        return
    untrained = ", which has not been trained" if stage.name in models.UNTRAINED else ""
    log.info("chatting with %s, %s%s", stage.name, stage.folder, untrained)
    chat.chat_in_terminal(chat.load_model(stage), stage.name, options)


if __name__ == "__main__":
    run(main)
