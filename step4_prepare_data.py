"""Step 4: pack pretraining texts into blocks and conversations into training examples.

Reads   the sources of constants.py, <artifacts>/step2_tokenizer/
Writes  <artifacts>/step4_data/  pretrain_*.arrow, sft_*.arrow, data_report.html, rejects.jsonl
Run     python step4_prepare_data.py
        python step4_prepare_data.py --sft-examples 0      texts only
        python step4_prepare_data.py --total-tokens 0      conversations only
        RAY_ADDRESS=HOST:PORT python step4_prepare_data.py  on a Ray cluster (docs/scaling.md)

If a run is killed, re-run the command to resume; the output is byte-identical.
"""

from chatglm_ja.cli import run  # first: it makes Ctrl-C during the other imports quiet

# isort: split
import dataclasses
import logging
from pathlib import Path

import constants
from chatglm_ja.data.settings import PrepareDataConfig, parse_shares
from chatglm_ja.settings import parse
from chatglm_ja.storage.inputs import open_artifact, open_sources
from chatglm_ja.storage.output import Output

log = logging.getLogger(__name__)


def main() -> None:
    config = parse(PrepareDataConfig, __doc__, constants.STEP4, profile=constants.PROFILE_LINE)
    shares, sft_shares = parse_shares(config.shares), parse_shares(config.sft_shares)
    inputs = [
        open_sources("texts", config.sources),
        open_sources("conversations", config.sft_sources),
        open_artifact(config.tokenizer, "step2_merge_tokenizer.py", every_byte=config.verify),
    ]
    if config.decontaminate:
        inputs.append(open_sources("evaluation_texts", config.decontaminate))
    output = Output(config, Path(__file__).stem, inputs, unfinished="work")
    if not output.prepare():
        return

    from chatglm_ja.data import cluster, hub, prepare_conversations, prepare_texts, resume
    from chatglm_ja.reports import data_report

    if cluster.is_named():
        cpus = cluster.connect(config.output_dir.parent)
        config = dataclasses.replace(config, num_processes=cpus)
    for source in (*config.sft_sources, *config.sources):
        if not source.is_local():  # fail on a wrong name now, not after hours
            hub.download(source)
    output.require_disk_space()  # that the downloads have left
    report = config.output_dir.with_name(config.output_dir.name + ".rejects.jsonl")
    contents = resume.content_keys(config, inputs)
    contents["shards"] = [{"inputs": output.lineage, **output.arguments}]
    with output.write() as folder, resume.open_folders(output.unfinished, **contents) as work:
        (shards,) = work["shards"]
        rejects = resume.RejectsFile(shards / "rejects.jsonl", report, config.max_rejects)
        conversations = texts = None
        # Conversations first: they take minutes, texts take hours, and either may lack data.
        if config.sft_sources:
            index = prepare_conversations.prepare(config, work["conversations"])
            rejects.check(index)
            output.counts["sft"], examples = prepare_conversations.write(
                index, config, sft_shares, shards
            )
            conversations = index, examples
        if config.sources:
            index = prepare_texts.prepare(config, work["texts"])
            rejects.check(index)
            output.counts["pretrain"], blocks = prepare_texts.write(index, config, shares, shards)
            texts = index, blocks
        data_report.write_report(
            shards, constants.PROFILE, output.counts, config, texts, conversations
        )
        resume.link_files(shards, folder)
    for line in data_report.describe_counts(output.counts):
        log.info("%s", line)
    log.info("training data: %s; data_report.html describes it", config.output_dir)


if __name__ == "__main__":
    run(main)
