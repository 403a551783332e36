"""Step 1: learn Japanese pieces for the base's vocabulary.

sentencepiece learns them from characters, or --method continue continues the base's own merges.

Reads   the Japanese sources of constants.py; for --method continue <base model>/
Writes  <artifacts>/step1_tokenizer/  ja_bpe.vocab, and ja_bpe.model, or for a base with byte-level
        BPE ja_merges.txt
Run     python step1_train_tokenizer.py
"""

from chatglm_ja.cli import run  # first: it makes Ctrl-C during the other imports quiet

# isort: split
import itertools
import logging
from collections.abc import Iterable
from pathlib import Path

import constants
from chatglm_ja.bases.families import open_base, open_base_tokenizer
from chatglm_ja.data import corpus
from chatglm_ja.settings import parse
from chatglm_ja.storage.inputs import open_sources
from chatglm_ja.storage.output import Output
from chatglm_ja.vocabulary.settings import TrainTokenizerConfig

log = logging.getLogger(__name__)


def main() -> None:
    config = parse(TrainTokenizerConfig, __doc__, constants.STEP1, profile=constants.PROFILE_LINE)
    inputs = [open_sources("japanese_corpus", config.sources)]
    base_model = config.base_model if config.method == "continue" else None
    if base_model:
        inputs.append(open_base_tokenizer(base_model))
    output = Output(config, Path(__file__).stem, inputs)
    if not output.prepare():
        return

    # Heavy libraries are imported only now, so that --help and errors in settings are immediate.
    from tqdm.auto import tqdm

    from chatglm_ja.bases.sentencepiece_vocabulary import save_model
    from chatglm_ja.data.source_reader import SourceReader
    from chatglm_ja.vocabulary import learning

    reader = SourceReader(config)

    with output.write() as folder:
        texts = itertools.chain.from_iterable(
            tqdm(reader.texts(source), desc=source.title, unit=" documents")
            for source in config.sources
        )
        lines: Iterable[str] = config.policy.probe(corpus.training_lines(texts, output.counts))
        if config.input_sentence_size:
            lines = corpus.sample_lines(lines, config.input_sentence_size, config.seed)
            output.counts["lines_sampled"] = len(lines)
        counted = "pieces, control and byte pieces included,"
        if base_model:
            base = open_base(base_model).vocabulary
            base.save_learned(*learning.continue_merges(base, lines, config), folder)
            counted = counted if base.reserved else "merges"
        else:
            save_model(learning.train_sentencepiece(lines, config), folder)
        output.counts.update(pieces=config.vocab_size, rejected=reader.rejected)
    log.info(
        "learned {pieces:,} {counted} from {documents:,} documents, {lines:,} lines, "
        "{characters:,} characters".format_map({**output.counts, "counted": counted})
    )
    log.info("pieces: %s", config.output_dir)


if __name__ == "__main__":
    run(main)
