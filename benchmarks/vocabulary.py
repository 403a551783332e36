"""Compare methods of learning the Japanese vocabulary at the same number of new pieces.

Prints Markdown tables: learning methods, policies, the article's merge against step 2's (with
--ja-tokenizer), and the time of step 1 against bare sentencepiece. A tenth of the Japanese
documents, chosen by a hash of their text, is held out for evaluation. Chinese and English texts are
only segmented, never learned from, so all of them are evaluated.

    python benchmarks/vocabulary.py --base-model DIR --ja-tokenizer ja_bpe.model \\
        --sources ja=help_ja.jsonl.gz ja=docs_ja.jsonl.gz zh=docs_zh.jsonl.gz en=help_en.jsonl.gz
"""

import argparse
import functools
import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# In this folder; importing it makes the project's package importable.
import measuring
from measuring import Ratio, step_command

from chatglm_ja.bases.chatglm3 import ChatGLM3Base, ChatGLM3Tokenizer
from chatglm_ja.bases.interface import Vocabulary
from chatglm_ja.bases.sentencepiece_vocabulary import ChatGLM3Vocabulary
from chatglm_ja.chatglm3 import tokenizer
from chatglm_ja.cli import run
from chatglm_ja.data import corpus
from chatglm_ja.data.source_reader import SourceReader
from chatglm_ja.errors import ConfigError, DataError
from chatglm_ja.settings import CORES
from chatglm_ja.sources import Source
from chatglm_ja.vocabulary import learning, merging
from chatglm_ja.vocabulary.policies import Policy
from chatglm_ja.vocabulary.settings import TrainTokenizerConfig

DEFAULTS = TrainTokenizerConfig(output_dir=Path(), sources=())
# The article's settings for its Japanese model: sentencepiece's own defaults.
ARTICLE = replace(
    DEFAULTS,
    normalization="nmt_nfkc",
    keep_whitespace=False,
    split_digits=False,
    byte_fallback=False,
    dummy_prefix=True,
    split_by_script=True,
)
# Numbers of pieces that are continued from the base, beside --new-pieces.
SIZES = (10_000, 14_000, 20_000, 30_000, 40_000)
HELD_OUT_BYTE = 256 // 10


def is_held_out(text: str) -> bool:
    return hashlib.blake2b(text.encode(), digest_size=1).digest()[0] < HELD_OUT_BYTE


class Ways:
    """The learning methods; each returns a merged vocabulary with `size` new pieces."""

    def __init__(
        self, base: ChatGLM3Vocabulary, texts: Sequence[str], policy: Policy, size: int
    ) -> None:
        self.base, self.texts, self.policy, self.size = base, texts, policy, size

    def train(self, config: TrainTokenizerConfig, vocab_size: int) -> Any:
        """Return a model of `vocab_size` pieces, or of as many as the text yields."""
        while True:
            try:
                lines = corpus.training_lines(self.texts, {})
                return learning.train_sentencepiece(lines, replace(config, vocab_size=vocab_size))
            except DataError:
                vocab_size = round(0.8 * vocab_size)
                if vocab_size < self.size:
                    raise

    def first(self, config: TrainTokenizerConfig) -> merging.MergedVocabulary:
        """Merge the first pieces in learned order, just as many as `size` new pieces require."""
        learned = pieces_of(self.train(config, 4 * self.size))
        characters = [piece for piece in learned if len(piece) == 1]
        longer = [piece for piece in learned if len(piece) > 1]
        merge = functools.partial(merging.merge_pieces, self.base, policy=self.policy)
        low, high = 0, len(longer)  # bisect the number of merges
        while low < high:
            middle = (low + high) // 2
            if len(merge([*longer[:middle], *characters]).added) < self.size:
                low = middle + 1
            else:
                high = middle
        return merge([*longer[:low], *characters])

    def most_used(self, config: TrainTokenizerConfig) -> merging.MergedVocabulary:
        return merging.merge_pieces(
            self.base,
            pieces_of(self.train(config, 5 * self.size)),
            self.policy,
            max_new_pieces=self.size,
            ranking_texts=self.texts,
        )

    def continued(self) -> merging.MergedVocabulary:
        config = replace(
            DEFAULTS,
            method="continue",
            base_model=Path(),
            policy=self.policy,
            vocab_size=self.base.reserved + self.size,
        )
        lines = corpus.training_lines(self.texts, {})
        merges, characters = learning.continue_merges(self.base, lines, config)
        learned = [*map("".join, merges), *characters]
        return merging.merge_pieces(self.base, learned, self.policy)


def pieces_of(proto: Any) -> list[str]:
    """Return what was learned, without control and byte pieces."""
    return [piece.piece for piece in proto.pieces if piece.type == piece.NORMAL]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("\n" + measuring.table(head, rows), flush=True)


def ways_table(ways: Ways, held_out: Sequence[str]) -> Ratio:
    candidates: dict[str, Callable[[], merging.MergedVocabulary]] = {
        "sentencepiece, the article's settings": lambda: ways.first(ARTICLE),
        "… mixing scripts": lambda: ways.first(replace(ARTICLE, split_by_script=False)),
        "… and identity, digits apart, spaces kept": lambda: ways.first(
            replace(DEFAULTS, dummy_prefix=True)
        ),
        "… and no space before each line (`--method sentencepiece`)": lambda: ways.first(DEFAULTS),
        f"… {5 * ways.size:,} learned, the most used kept (`--max-new-pieces`)": lambda: (
            ways.most_used(DEFAULTS)
        ),
        "base's merges continued (`--method continue`)": ways.continued,
    }
    rows = [["base alone", "0", "", f"{tokens_per_char(ways.base, held_out):.4f}", "", ""]]
    reference = 0.0
    for name, learn in candidates.items():
        start = time.perf_counter()
        merged = learn()
        seconds = time.perf_counter() - start
        dropped = len(merged.dropped["unreachable"]) + len(merged.dropped["unspellable"])
        figure = tokens_per_char(merged.vocabulary, held_out)
        reference = reference or figure
        change = f"{100 * (figure / reference - 1):+.1f}%"
        row = [f"{len(merged.added):,}", f"{dropped:,}", f"{figure:.4f}", change, f"{seconds:.0f}"]
        rows.append([name, *row])
    head = ["learned with", "new pieces", "unreachable, dropped", "ja tokens/char", "", "seconds"]
    table(head, rows)
    return Ratio("tokens for held-out Japanese, to the article's settings", figure / reference)


def tokens_per_char(vocabulary: Vocabulary, texts: Sequence[str]) -> float:
    return sum(map(len, vocabulary.encode(texts))) / sum(map(len, texts))


def sizes_table(ways: Ways, held_out: Sequence[str]) -> None:
    rows = []
    for size in SIZES:
        merged = Ways(ways.base, ways.texts, ways.policy, size).continued()
        figure = tokens_per_char(merged.vocabulary, held_out)
        rows.append([f"{size:,}", f"{len(merged.added):,}", f"{figure:.4f}"])
    table(["pieces", "added", "ja tokens/char"], rows)


def policies_table(
    base: ChatGLM3Vocabulary,
    learned: Sequence[str],
    texts: dict[str, list[str]],
    policies: Sequence[Policy],
) -> None:
    before = ChatGLM3Tokenizer(base.proto)
    rows = []
    for policy in policies:
        merged = merging.merge_pieces(base, learned, policy)
        after = ChatGLM3Tokenizer(proto_of(merged))
        row, broken = [f"`{policy}`", f"{len(merged.added):,}"], 0
        for language, documents in texts.items():
            result = merging.compare_segmentation(before, after, documents, policy)
            broken += len(result.broken)
            if language == "ja":
                row.append(f"{result.row()['tokens_per_char_after']:.4f}")
            else:
                row.append(f"{result.lines - result.identical:,} of {result.lines:,}")
        rows.append([*row, f"{broken:,}"])
    head = ["tokens/char" if language == "ja" else "lines changed" for language in texts]
    names = [f"{language} {what}" for language, what in zip(texts, head, strict=True)]
    table(["policy", "new pieces", *names, "promised lines changed"], rows)


def proto_of(merged: merging.MergedVocabulary) -> Any:
    assert isinstance(merged.vocabulary, ChatGLM3Vocabulary)
    return merged.vocabulary.proto


def article_merge(base: Any, learned: Any) -> Any:
    """Merge as the article does: append every piece that the base does not have, with score 0.

    All new pieces then take precedence over the base's own merges.
    """
    merged = type(base)()
    merged.CopyFrom(base)
    known = {piece.piece for piece in base.pieces}
    for piece in learned.pieces:
        if piece.piece not in known:
            merged.pieces.add(piece=piece.piece, score=0.0)
    return merged


def merges_table(
    vocabulary: ChatGLM3Vocabulary, ja_tokenizer: Path, texts: dict[str, list[str]]
) -> Ratio:
    """Count the lines segmented differently after each merge of the same Japanese model."""
    base = vocabulary.proto
    before = tokenizer.make_processor(base)
    ours = merging.merge_pieces(vocabulary, vocabulary.read_learned(ja_tokenizer), Policy.JAPANESE)
    theirs = article_merge(base, tokenizer.read_proto(ja_tokenizer))
    merges = {
        "the article's": (theirs, len(theirs.pieces) - len(base.pieces)),
        "step 2": (proto_of(ours), len(ours.added)),
    }
    rows, shares = [], {}
    for name, (proto, added) in merges.items():
        after = tokenizer.make_processor(proto)
        row = [name, f"{added:,}"]
        for language, documents in texts.items():
            lines = [line for text in documents for line in text.split("\n") if line.strip()]
            new = after.encode(lines, num_threads=CORES)
            if language == "ja":
                row.append(f"{sum(map(len, new)) / sum(map(len, lines)):.4f}")
                continue
            old = before.encode(lines, num_threads=CORES)
            changed = sum(a != b for a, b in zip(old, new, strict=True))
            shares[name, language] = changed / len(lines)
            row.append(f"{changed:,} of {len(lines):,} ({shares[name, language]:.2%})")
        rows.append(row)
    head = ["merge", "pieces added", *texts]
    head[head.index("ja")] = "ja tokens/char"
    print("\nThe article's own Japanese model, merged; lines that are cut otherwise than before:")
    table(head, rows)
    return Ratio(
        "Chinese lines changed by step 2's merge, to those changed by the article's",
        shares["step 2", "zh"] / shares["the article's", "zh"],
    )


def time_table(texts: Sequence[str], vocab_size: int, repeats: int) -> Ratio:
    """Time step 1 as a program against bare sentencepiece in a fresh process, in turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = "".join(line + "\n" for line in corpus.training_lines(texts, {}))
        (folder / "ja.txt").write_text(lines, encoding="utf-8")
        settings = {**DEFAULTS.trainer_settings(), "max_sentence_length": 2**30}
        bare = (
            "import sentencepiece; sentencepiece.SentencePieceTrainer.train("
            f"input={str(folder / 'ja.txt')!r}, model_prefix={str(folder / 'bare')!r}, "
            f"model_type='bpe', vocab_size={vocab_size}, num_threads={CORES}, "
            f"character_coverage={DEFAULTS.character_coverage}, minloglevel=2, **{settings!r})"
        )
        step = step_command("step1_train_tokenizer", folder / "step1")
        step += ["--sources", f"ja={folder / 'ja.txt'}", "--method", "sentencepiece"]
        step += ["--vocab-size", str(vocab_size), "--overwrite"]
        seconds: dict[str, list[float]] = {"bare": [], "step 1": []}
        for _ in range(repeats):
            for kind, command in (("bare", [sys.executable, "-c", bare]), ("step 1", step)):
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                seconds[kind].append(time.perf_counter() - start)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    rows = [
        [kind, f"{median:.1f}", f"{median / medians['bare']:.2f}"]
        for kind, median in medians.items()
    ]
    table([f"{vocab_size:,} pieces with sentencepiece", "seconds", "ratio"], rows)
    return Ratio("time of step 1, to bare sentencepiece", medians["step 1"] / medians["bare"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-model", type=Path, required=True, help="ChatGLM3 folder")
    parser.add_argument(
        "--sources", nargs="+", required=True, metavar="SPEC", help="LANGUAGE=PATH; ja is required"
    )
    parser.add_argument(
        "--ja-tokenizer", type=Path, help="the article's Japanese model, to merge both ways"
    )
    parser.add_argument(
        "--new-pieces", type=int, default=12_000, help="number of new pieces (default: 12000)"
    )
    policies = {policy.value: policy for policy in Policy}
    parser.add_argument(
        "--policy",
        choices=policies,
        default="japanese",
        help="policy of the first table (default: japanese)",
    )
    parser.add_argument("--repeats", type=int, default=7, help="runs of the timing (default: 7)")
    arguments = parser.parse_args()
    base = ChatGLM3Base.open(arguments.base_model).vocabulary
    texts = {
        language: list(documents)
        for language, documents in SourceReader()
        .texts_by_language(map(Source.parse, arguments.sources))
        .items()
    }
    if "ja" not in texts:
        raise ConfigError("--sources name no Japanese text: expected ja=PATH")
    if arguments.ja_tokenizer and "zh" not in texts:
        raise ConfigError("--ja-tokenizer compares Chinese lines: expected zh=PATH among --sources")
    held_out = [text for text in texts["ja"] if is_held_out(text)]
    training = [text for text in texts["ja"] if not is_held_out(text)]
    print(
        f"Japanese: {sum(map(len, training)):,} characters to learn from, "
        f"{sum(map(len, held_out)):,} held out; {CORES} cores"
    )
    ways = Ways(base, training, policies[arguments.policy], arguments.new_pieces)
    ratios = [ways_table(ways, held_out)]
    print("\nOther numbers of pieces, continued:")
    sizes_table(ways, held_out)
    learned = ways.train(DEFAULTS, DEFAULTS.vocab_size)
    print(f"\nOne vocabulary of {len(learned.pieces):,} pieces under each policy:")
    policies_table(base, pieces_of(learned), {**texts, "ja": held_out}, list(Policy))
    if arguments.ja_tokenizer:
        ratios.append(merges_table(base, arguments.ja_tokenizer, {**texts, "ja": held_out}))
    ratios.append(time_table(training, DEFAULTS.vocab_size, arguments.repeats))
    measuring.conclude(ratios)


if __name__ == "__main__":
    run(main)
