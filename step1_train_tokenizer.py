"""Step 1: learn Japanese pieces, as a sentencepiece BPE model.

With sentencepiece from characters, or by continuing the merges of the base's own tokenizer.

Reads   the Japanese sources of constants.py; for --method continue <base model>/
Writes  <artifacts>/step1_tokenizer/  ja_bpe.model, ja_bpe.vocab
Run     python step1_train_tokenizer.py
"""

import itertools
import logging
from collections.abc import Iterable
from pathlib import Path

import constants
from chatglm_ja.cli import run
from chatglm_ja.data import corpus
from chatglm_ja.settings import parse
from chatglm_ja.storage.inputs import open_base_tokenizer, open_sources
from chatglm_ja.storage.output import Output
from chatglm_ja.vocabulary.settings import TrainTokenizerConfig

log = logging.getLogger(__name__)


def main() -> None:
    config = parse(TrainTokenizerConfig, __doc__, constants.STEP1)
    inputs = [open_sources("japanese_corpus", config.sources)]
    base_model = config.base_model if config.method == "continue" else None
    if base_model:
        inputs.append(open_base_tokenizer(base_model))
    output = Output(config, Path(__file__).stem, inputs)
    if not output.prepare():
        return

    # Large libraries load after the settings are known to be good: --help answers at once.
    from tqdm.auto import tqdm

    from chatglm_ja.chatglm3 import tokenizer
    from chatglm_ja.vocabulary import learning

    with output.write() as folder:
        texts = itertools.chain.from_iterable(
            tqdm(corpus.read_texts(source), desc=source.path, unit=" documents")
            for source in config.sources
        )
        lines: Iterable[str] = corpus.training_lines(texts, output.counts)
        if config.input_sentence_size:
            lines = corpus.sample_lines(lines, config.input_sentence_size, config.seed)
            output.counts["lines_sampled"] = len(lines)
        if base_model:
            learned = learning.continue_merges(
                tokenizer.read_base_proto(base_model),
                lines,
                config.policy,
                vocab_size=config.vocab_size,
                character_coverage=config.character_coverage,
                num_threads=config.num_threads,
                max_piece_length=config.max_piece_length,
            )
        else:
            learned = learning.train_sentencepiece(
                lines,
                vocab_size=config.vocab_size,
                character_coverage=config.character_coverage,
                num_threads=config.num_threads,
                settings=config.trainer_settings(),
            )
        learning.save_learned(learned, folder)
        output.counts["pieces"] = len(learned.pieces)
    read = [f"{output.counts[what]:,} {what}" for what in ("documents", "lines", "characters")]
    log.info(
        "learned %s pieces, control and byte pieces included, from %s",
        f"{output.counts['pieces']:,}",
        ", ".join(read),
    )
    log.info("pieces: %s", config.output_dir)


if __name__ == "__main__":
    run(main)
