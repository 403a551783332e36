"""Step 4's report: log lines, data_report.json, data_report.html, and the histograms as PNG files.

The page shows what became of every source's records, the language mix asked for and reached, how
long documents and conversations are, and one conversation of every source as the model sees it,
with the tokens that the loss is computed on marked.
"""

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_ja import plots
from chatglm_ja.bases import families
from chatglm_ja.bases.interface import ModelTokenizer
from chatglm_ja.data.cleaning import Fate
from chatglm_ja.data.document_index import DocumentIndex
from chatglm_ja.data.settings import PrepareDataConfig, parse_shares
from chatglm_ja.data.token_store import LABELS
from chatglm_ja.messages import IGNORE_INDEX
from chatglm_ja.reports.render import Table, render_template
from chatglm_ja.storage.files import write_json

Counts = Mapping[str, Any]

# Counts of conversations of which a part is kept.
CUT = ("shortened", "opening left out")


def write_report(
    folder: Path,
    counts: Counts,
    config: PrepareDataConfig,
    texts: DocumentIndex | None,
    conversations: DocumentIndex | None,
    examples: np.ndarray | None,
) -> None:
    """Write the report; `examples` are the conversations that are trained on.

    Without texts, or without conversations, the page has no section on them.
    """
    write_json(folder / "data_report.json", counts)
    parts: dict[str, Any] = {"pretrain": None, "sft": None}
    if texts is not None:
        pretrain = counts["pretrain"]
        mix = []  # the share asked for and reached, and the tokens
        for language, share in parse_shares(config.shares).items():
            tokens = (pretrain[name][language] for name in ("train_tokens", "validation_tokens"))
            shares = (share, pretrain["train_shares"][language])
            mix.append([language, *(f"{s:.2%}" for s in shares), *(f"{t:,}" for t in tokens)])
        parts["pretrain"] = {
            "mix": mix,
            "totals": _describe_pretrain(pretrain),
            "fates": fate_table(pretrain["sources"], "documents", "train_tokens", "repeats"),
            "lengths": draw_lengths(texts, texts.kept_documents(), folder / "pretrain_lengths.png"),
        }
    if conversations is not None and examples is not None:
        sft = counts["sft"]
        parts["sft"] = {
            "totals": _describe_sft(sft),
            "fates": fate_table(sft["sources"], "documents", *CUT, "train_examples"),
            "lengths": draw_lengths(conversations, examples, folder / "sft_lengths.png"),
            "examples": choose_examples(config, conversations, examples),
        }
    page = render_template("data_report.html.jinja", **parts)
    (folder / "data_report.html").write_text(page, encoding="utf-8")


def describe_counts(counts: Counts) -> Iterator[str]:
    """Yield a log line for every source, then one for each of the data sets."""
    parts = [counts[name] for name in ("pretrain", "sft") if name in counts]
    for source in (source for part in parts for source in part["sources"]):
        dropped = [
            f"{name} {source[name]:,}" for name in _present_fates([source]) if name is not Fate.KEPT
        ]
        cut = [f"{name} {source[name]:,}" for name in CUT if source.get(name)]
        yield (
            f"{source['name']}: {source.get('documents', 0):,} read, "
            f"{source.get('kept', 0):,} kept"
            + (f"; dropped: {', '.join(dropped)}" if dropped else "")
            + (f"; cut: {', '.join(cut)}" if cut else "")
        )
    if "pretrain" in counts:
        yield f"pretraining: {_describe_pretrain(counts['pretrain'])}"
    if "sft" in counts:
        yield f"fine-tuning: {_describe_sft(counts['sft'])}"


def _describe_pretrain(counts: Counts) -> str:
    training = ", ".join(
        f"{name} {tokens:,} ({counts['train_shares'][name]:.2%})"
        for name, tokens in counts["train_tokens"].items()
    )
    validation = ", ".join(
        f"{name} {tokens:,}" for name, tokens in counts["validation_tokens"].items()
    )
    return (
        f"{counts['blocks']:,} blocks of {counts['block_size']:,} tokens, fill rate "
        f"{counts['fill']:.2%}, {counts['tail_tokens_dropped']:,} tail tokens dropped; "
        f"training tokens {training}; validation tokens {validation}"
    )


def _describe_sft(counts: Counts) -> str:
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in counts["train_examples"].items())
    return (
        f"conversations {kinds}; {counts['train_bins']:,} bins of {counts['max_length']:,} tokens, "
        f"fill rate {counts['train_fill']:.2%}"
    )


def _present_fates(sources: list[dict[str, Any]]) -> list[Fate]:
    """Return `kept` and the fates that any record of the sources had, in the order of Fate."""
    return [name for name in Fate if name is Fate.KEPT or any(s.get(name) for s in sources)]


def fate_table(sources: list[dict[str, Any]], total: str, *others: str) -> Table:
    """Return a row for every source, with a column for every fate that any record had.

    `total` names the count that comes before the fates, `others` those that come after them.
    """
    columns = [total, *_present_fates(sources), *others]
    rows = [[s["name"], *(f"{s.get(name, 0):,}" for name in columns)] for s in sources]
    return ["source", *(name.replace("_", " ") for name in columns)], rows


def draw_lengths(index: DocumentIndex, documents: np.ndarray, path: Path) -> str:
    """Draw a histogram of tokens per document for every source; write PNG and return SVG."""
    sources = np.unique(index.source[documents]).tolist()
    columns = min(3, len(sources))
    rows = -(-len(sources) // columns)
    figure, grid = plots.make_figure(
        3.4 * columns, 2.1 * rows, nrows=rows, ncols=columns, squeeze=False
    )
    longest = int(index.length[documents].max())
    edges = np.geomspace(3, max(longest, 16) + 1, 41)
    for axes in grid.flat[len(sources) :]:
        axes.axis("off")
    for axes, number in zip(grid.flat, sources, strict=False):
        lengths = index.length[documents][index.source[documents] == number]
        axes.hist(lengths, bins=edges, color="#5b7db8")
        axes.set_xscale("log")
        title = index.sources[number].title
        # The plot's font has no Japanese; the table on the page has the name.
        name = title if title.isascii() else f"source {number + 1}"
        axes.set_title(
            f"{name}\n{len(lengths):,}, median {int(np.median(lengths)):,}",
            fontsize=9,
            parse_math=False,
        )
        axes.tick_params(labelsize=8)
    plots.save_png(figure, path)
    return plots.to_svg(figure)


def choose_examples(
    config: PrepareDataConfig, index: DocumentIndex, examples: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Yield a short conversation of every source: its origin, and the runs of `split_example`."""
    tokenizer = families.load_tokenizer(config.tokenizer)
    for number, source in enumerate(index.sources):
        documents = examples[index.source[examples] == number]
        if not len(documents):
            continue
        # The first one of at most 400 tokens, or if there is none, the first.
        chosen = int(documents[np.argmax(index.length[documents] <= 400)])
        ids, labels = index.read_document(chosen), index.read_document(chosen, LABELS)
        yield {
            "origin": f"{source.title}, record {int(index.record[chosen]):,}",
            "runs": split_example(tokenizer, ids.tolist(), labels.tolist()),
        }


def split_example(
    tokenizer: ModelTokenizer, ids: list[int], labels: list[int]
) -> list[tuple[bool, list[tuple[bool, str]]]]:
    """Split a tokenized conversation into runs that are trained on or not.

    Returns (is trained on, [(is a special token, text)]) for every run.
    """
    runs = []
    pairs = zip(ids, labels, strict=True)
    for is_trained, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        parts: list[tuple[bool, str]] = []
        for is_special, tokens in groupby(
            (token for token, _ in run), key=tokenizer.special_ids.__contains__
        ):
            if is_special:
                parts += [(True, tokenizer.pieces[token]) for token in tokens]
            else:
                parts.append((False, tokenizer.decode(list(tokens))))
        runs.append((is_trained, parts))
    return runs
