"""What step 4 made, for people to look at: counts in the terminal, data_report.json and a page.

The page shows, for every source, what became of its records; whether the mix is what was asked
for; how long documents and conversations are (also as PNG files); and a conversation of every
source as the model sees it, with the part that is trained marked.
"""

import html
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_ja import plots
from chatglm_ja.chatglm3 import tokenizer
from chatglm_ja.chatglm3.chat_format import IGNORE_INDEX
from chatglm_ja.data.document_index import DocumentIndex
from chatglm_ja.data.fates import Fate
from chatglm_ja.data.settings import PrepareDataConfig, parse_shares
from chatglm_ja.data.token_store import LABELS
from chatglm_ja.reports import render

Counts = Mapping[str, Any]

# A shown conversation is no longer than this, if there is one.
SHOWN_TOKENS = 400
PLOTS = {"pretrain": "pretrain_lengths.png", "sft": "sft_lengths.png"}


def write(
    folder: Path,
    counts: Counts,
    config: PrepareDataConfig,
    texts: DocumentIndex,
    conversations: DocumentIndex,
    examples: np.ndarray,
) -> None:
    """Write data_report.json, data_report.html and the plots; `examples` are those trained on."""
    report = json.dumps(counts, indent=1, ensure_ascii=False)
    (folder / "data_report.json").write_text(report + "\n", encoding="utf-8")
    pretrain, sft = counts["pretrain"], counts["sft"]
    sections = [
        "<h1>What the model learns from</h1>",
        "<h2>Pretraining</h2>",
        f"<p>{html.escape(_pretrain_line(pretrain))}</p>",
        render.table(*_mix(pretrain, parse_shares(config.shares))),
        "<h2>What became of the texts</h2>",
        render.table(*_fates(pretrain["sources"], "documents", "train_tokens", "repeats")),
        "<h2>Tokens of a document</h2>",
        _lengths(texts, texts.kept_documents(), folder / PLOTS["pretrain"]),
        "<h2>Fine-tuning</h2>",
        f"<p>{html.escape(_sft_line(sft))}</p>",
        render.table(*_fates(sft["sources"], "documents", "shortened", "train_examples")),
        "<h2>Tokens of a conversation</h2>",
        _lengths(conversations, examples, folder / PLOTS["sft"]),
        "<h2>Conversations as they are trained on</h2>",
        "<p>The loss counts what is <mark>marked</mark>.</p>",
        *_examples(config, conversations, examples),
    ]
    text = render.document("Training data", sections)
    (folder / "data_report.html").write_text(text, encoding="utf-8")


def summary(counts: Counts) -> Iterator[str]:
    """The counts in lines: a source each, then the two data sets."""
    for part in ("pretrain", "sft"):
        for source in counts[part]["sources"]:
            fates = (name for name in Fate if name is not Fate.KEPT and source.get(name))
            dropped = [f"{name} {source[name]:,}" for name in fates]
            parts = [f"{source.get('documents', 0):,} read", f"{source.get('kept', 0):,} kept"]
            if dropped:
                parts.append(f"dropped for: {', '.join(dropped)}")
            yield f"{source['name']}: {', '.join(parts)}"
    yield _pretrain_line(counts["pretrain"])
    yield _sft_line(counts["sft"])


def _pretrain_line(counts: Counts) -> str:
    shares = ", ".join(
        f"{name} {tokens:,} ({counts['train_shares'][name]:.2%})"
        for name, tokens in counts["train_tokens"].items()
    )
    held = ", ".join(f"{name} {tokens:,}" for name, tokens in counts["validation_tokens"].items())
    return (
        f"pretraining: {counts['blocks']:,} blocks of {counts['block_size']:,} tokens, "
        f"{counts['fill']:.2%} full, {counts['tail_tokens_dropped']:,} tokens left over; "
        f"tokens {shares}; for validation {held}"
    )


def _sft_line(counts: Counts) -> str:
    kinds = ", ".join(f"{kind} {n:,}" for kind, n in counts["train_examples"].items())
    return (
        f"fine-tuning: conversations {kinds}; {counts['train_bins']:,} bins of "
        f"{counts['max_length']:,} tokens, {counts['train_fill']:.2%} full"
    )


def _mix(counts: Counts, shares: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            language,
            f"{share:.2%}",
            f"{counts['train_shares'][language]:.2%}",
            f"{counts['train_tokens'][language]:,}",
            f"{counts['validation_tokens'][language]:,}",
        ]
        for language, share in shares.items()
    ]
    return ["language", "asked for", "share", "training tokens", "validation tokens"], rows


def _fates(
    sources: list[dict[str, Any]], found: str, *more: str
) -> tuple[list[str], list[list[str]]]:
    """A row for every source, a column for every fate that any record had."""
    fates = [name for name in Fate if name is Fate.KEPT or any(s.get(name) for s in sources)]
    columns = [found, *fates, *more]
    rows = [[s["name"], *(f"{s.get(name, 0):,}" for name in columns)] for s in sources]
    return ["source", *(name.replace("_", " ") for name in columns)], rows


def _lengths(index: DocumentIndex, documents: np.ndarray, path: Path) -> str:
    """Histograms of tokens, one for each source that has any, as a PNG file and as SVG."""
    numbers = [n for n in range(len(index.sources)) if (index.source[documents] == n).any()]
    columns = min(3, len(numbers))
    rows = -(-len(numbers) // columns)
    figure, axes = plots.figure(3.4 * columns, 2.1 * rows, nrows=rows, ncols=columns, squeeze=False)
    longest = int(index.length[documents].max())
    edges = np.geomspace(3, max(longest, 16) + 1, 41)
    for place, axis in enumerate(axes.flat):
        if place >= len(numbers):
            axis.axis("off")
            continue
        lengths = index.length[documents][index.source[documents] == numbers[place]]
        axis.hist(lengths, bins=edges, color="#5b7db8")
        axis.set_xscale("log")
        title = index.sources[numbers[place]].title
        # The font of the plot has no Japanese: such a name is in the table above.
        name = title if title.isascii() else f"source {numbers[place] + 1}"
        axis.set_title(
            f"{name}\n{len(lengths):,}, median {int(np.median(lengths)):,}",
            fontsize=9,
            parse_math=False,
        )
        axis.tick_params(labelsize=8)
    plots.save_png(figure, path)
    return f'<div class="scroll wide">{plots.svg(figure)}</div>'


def _examples(
    config: PrepareDataConfig, index: DocumentIndex, examples: np.ndarray
) -> Iterator[str]:
    """A short conversation of every source, as HTML."""
    encoder = tokenizer.load_processor(config.tokenizer)
    for number, source in enumerate(index.sources):
        mine = examples[index.source[examples] == number]
        if not len(mine):
            continue
        short = mine[index.length[mine] <= SHOWN_TOKENS]
        document = int((short if len(short) else mine)[0])
        ids, labels = index.read_document(document), index.read_document(document, LABELS)
        origin = f"{source.title}, record {int(index.record[document]):,}"
        yield f"<p><small>{html.escape(origin)}</small></p>"
        yield f'<div class="example">{marked(encoder, ids.tolist(), labels.tolist())}</div>'


def marked(encoder: Any, ids: list[int], labels: list[int]) -> str:
    """A tokenised conversation as HTML: special tokens coloured, what is trained marked."""
    out: list[str] = []
    run: list[int] = []

    def end_run() -> None:
        if run:
            out.append(html.escape(encoder.decode(run)))
            run.clear()

    trained = False
    for token, label in zip(ids, labels, strict=True):
        if (label != IGNORE_INDEX) != trained:
            end_run()
            out.append("</mark>" if trained else "<mark>")
            trained = not trained
        if encoder.is_control(token):
            end_run()
            piece = html.escape(encoder.id_to_piece(token))
            out.append(f'<span class="special">{piece}</span>')
        else:
            run.append(token)
    end_run()
    return "".join(out) + ("</mark>" if trained else "")
