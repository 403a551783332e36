"""Filter and deduplicate a corpus with datatrove, for step 4 to read.

    python3 -m venv dt && dt/bin/pip install "datatrove[io,processing]==0.10.1"
    dt/bin/python docs/datatrove_example.py demo/data "train_ja.jsonl.gz" data/datatrove_ja
    python step4_prepare_data.py --sources "ja=data/datatrove_ja/texts/*.jsonl.gz" --shares ja=1 \\
        --near-duplicates 0 --sft-examples 0 --total-tokens 250000 --output-dir artifacts/datatrove

Texts that repeat their own lines or paragraphs are dropped (Rae et al. 2021, arXiv 2112.11446), and
of near-duplicates all but one are, by MinHash of 5-grams of characters: Japanese has no spaces
between words. On several machines SlurmPipelineExecutor or RayPipelineExecutor takes the place of
LocalPipelineExecutor; with more --tasks than files, tasks have nothing to read.
"""

import argparse
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WordTokenizer

# Without its diacritics が would be か.
CONFIG = MinhashConfig(n_grams=5, norm_config=TextNormConfig(norm_unicode_diacritics=False))


class Characters(WordTokenizer):
    """Makes a word of every character but spaces."""

    def word_tokenize(self, text: str) -> list[str]:
        return list("".join(text.split()))

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="of the files")
    parser.add_argument("pattern", help="names of the .jsonl files, which may be compressed")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tasks", type=int, default=1)
    arguments = parser.parse_args()
    output, tasks = arguments.output, arguments.tasks

    def run(name: str, pipeline: list[Any], tasks: int = tasks) -> None:
        logs = str(output / "logs" / name)  # a stage that is finished there is not run again
        LocalPipelineExecutor(pipeline, tasks, workers=2, logging_dir=logs).run()

    filtered, work = str(output / "filtered"), output / "minhash"
    signatures, buckets, removed = (str(work / n) for n in ("signatures", "buckets", "removed"))
    # Of characters the n-grams of words say nothing.
    repetition = GopherRepetitionFilter(top_n_grams=(), dup_n_grams=(), language=Characters())
    read = JsonlReader(arguments.folder, glob_pattern=arguments.pattern)
    run("filter", [read, repetition, JsonlWriter(filtered)])
    run("sign", [JsonlReader(filtered), MinhashDedupSignature(signatures, CONFIG, Characters())])
    run("match", [MinhashDedupBuckets(signatures, buckets, config=CONFIG)], CONFIG.num_buckets)
    run("cluster", [MinhashDedupCluster(buckets, removed, CONFIG)], 1)
    texts = JsonlWriter(str(output / "texts"))
    run("write", [JsonlReader(filtered), MinhashDedupFilter(removed), texts])


if __name__ == "__main__":
    main()
