"""Step 4: pack pretraining texts into blocks and conversations into training examples.

Reads   the sources of constants.py, <artifacts>/step2_tokenizer/
Writes  <artifacts>/step4_data/  pretrain_*.arrow, sft_*.arrow
Run     python step4_prepare_data.py
"""

import logging
from pathlib import Path

import constants
from chatglm_ja import corpus
from chatglm_ja.artifacts import Output, open_artifact, open_file_input
from chatglm_ja.cli import run
from chatglm_ja.config import PrepareDataConfig, Source, parse, parse_shares

log = logging.getLogger(__name__)


def main() -> None:
    config = parse(PrepareDataConfig, __doc__, constants.STEP4)
    sources = [Source.parse(spec) for spec in config.sources]
    sft_sources = [Source.parse(spec) for spec in config.sft_sources]
    shares, sft_shares = parse_shares(config.shares), parse_shares(config.sft_shares)
    inputs = [
        open_file_input("texts", *corpus.local_paths(sources)),
        open_file_input("conversations", *corpus.local_paths(sft_sources)),
        open_artifact(config.tokenizer, "step2_merge_tokenizer.py"),
    ]
    output = Output(config.output_dir, Path(__file__).stem, config.arguments(), inputs)
    if output.is_settled(config.overwrite, config.check):
        return

    from chatglm_ja import dataset, tokenizer

    processor = tokenizer.load(config.tokenizer)
    with output.write() as folder:
        # The conversations first: they take minutes, the texts hours, and either can lack data.
        output.counts["sft"] = dataset.write_sft(
            folder,
            processor,
            sft_sources,
            sft_shares,
            examples=config.sft_examples,
            validation_examples=config.sft_validation_examples,
            max_length=config.max_length,
            seed=config.seed,
        )
        output.counts["pretrain"] = dataset.write_pretraining(
            folder,
            processor,
            sources,
            shares,
            total_tokens=config.total_tokens,
            validation_tokens=config.validation_tokens,
            max_repeats=config.max_repeats,
            block_size=config.block_size,
            num_threads=config.num_threads,
        )
    for name, counts in output.counts.items():
        log.info("%s: %s", name, dataset.describe(counts))
    log.info("training data: %s", config.output_dir)


if __name__ == "__main__":
    run(main)
