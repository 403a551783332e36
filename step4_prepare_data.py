"""Step 4: pack pretraining texts into blocks and conversations into training examples.

Reads   the sources of constants.py, <artifacts>/step2_tokenizer/
Writes  <artifacts>/step4_data/  pretrain_*.arrow, sft_*.arrow, data_report.html, rejects.jsonl
Run     python step4_prepare_data.py

A run that is killed goes on where it was when it is started again with the same settings.
"""

import logging
from pathlib import Path

import constants
from chatglm_ja.artifacts import Output, open_artifact, open_file_input
from chatglm_ja.cli import run
from chatglm_ja.config import PrepareDataConfig, parse_shares
from chatglm_ja.settings import parse
from chatglm_ja.sources import local_files

log = logging.getLogger(__name__)


def main() -> None:
    config = parse(PrepareDataConfig, __doc__, constants.STEP4)
    shares, sft_shares = parse_shares(config.shares), parse_shares(config.sft_shares)
    inputs = [
        open_file_input("texts", *local_files(config.sources)),
        open_file_input("conversations", *local_files(config.sft_sources)),
        open_artifact(config.tokenizer, "step2_merge_tokenizer.py"),
    ]
    if config.decontaminate:
        inputs.append(open_file_input("evaluation_texts", *local_files(config.decontaminate)))
    output = Output(config.output_dir, Path(__file__).stem, config.arguments(), inputs)
    if output.is_settled(config.overwrite, config.check):
        return

    from chatglm_ja import data_report, pretrain_data, sft_data, workspace

    read = {source.role: source.fingerprint for source in inputs}
    with output.write(resumable=True) as folder:
        work = workspace.open_folders(
            folder / "work",
            texts={"inputs": read, **pretrain_data.contents(config)},
            conversations={"inputs": read, **sft_data.contents(config)},
            shards={"inputs": read, **config.arguments()},
        )
        rejects = workspace.Rejects(
            work["shards"] / "rejects.jsonl",
            config.output_dir.with_name(config.output_dir.name + ".rejects.jsonl"),
            config.max_rejects,
        )
        # The conversations first: they take minutes, the texts hours, and either can lack data.
        conversations = sft_data.prepare(config, work["conversations"])
        rejects.check(conversations)
        sft, examples = sft_data.write(conversations, config, sft_shares, work["shards"])
        texts = pretrain_data.prepare(config, work["texts"])
        rejects.check(texts)
        pretrain = pretrain_data.write(texts, config, shares, work["shards"])
        output.counts.update(pretrain=pretrain, sft=sft)
        data_report.write(work["shards"], output.counts, config, texts, conversations, examples)
        workspace.close(folder / "work", work["shards"])
    for line in data_report.summary(output.counts):
        log.info("%s", line)
    log.info("training data: %s; data_report.html shows what is in it", config.output_dir)


if __name__ == "__main__":
    run(main)
