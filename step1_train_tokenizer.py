"""Step 1: train a sentencepiece BPE tokenizer on Japanese text.

Reads   the Japanese sources of constants.py
Writes  <artifacts>/step1_tokenizer/  ja_bpe.model, ja_bpe.vocab
Run     python step1_train_tokenizer.py
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import constants
from chatglm_ja import corpus
from chatglm_ja.artifacts import Output, open_file_input
from chatglm_ja.cli import run
from chatglm_ja.config import Source, TrainTokenizerConfig, parse

log = logging.getLogger(__name__)


def main() -> None:
    config = parse(TrainTokenizerConfig, __doc__, constants.STEP1)
    sources = [Source.parse(spec) for spec in config.sources]
    inputs = [open_file_input("japanese_corpus", *corpus.local_paths(sources))]
    output = Output(config.output_dir, Path(__file__).stem, config.arguments(), inputs)
    if output.is_settled(config.overwrite, config.check):
        return

    # Large libraries load after the settings are known to be good: --help answers at once.
    from tqdm.auto import tqdm

    from chatglm_ja import tokenizer

    def texts() -> Iterator[str]:
        for source in sources:
            for text in tqdm(corpus.read_texts(source), desc=source.path, unit=" documents"):
                output.counts["documents"] = output.counts.get("documents", 0) + 1
                output.counts["characters"] = output.counts.get("characters", 0) + len(text)
                yield text

    with output.write() as folder:
        tokenizer.train(
            texts(),
            folder,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            num_threads=config.num_threads,
            input_sentence_size=config.input_sentence_size,
        )
        output.counts["pieces"] = config.vocab_size
    log.info(
        "learned %d pieces from %d documents, %d characters: %s",
        output.counts["pieces"],
        output.counts["documents"],
        output.counts["characters"],
        config.output_dir,
    )


if __name__ == "__main__":
    run(main)
