"""Step 4's report: log lines, data_report.json, data_report.html, and the histograms as PNG files.

The page opens with the mix of languages asked for and reached, and what was dropped. Below it are
the fates of every source's records, samples of the dropped texts, whole training blocks as the
model reads them, a conversation of every source with the tokens that the loss is computed on
marked, the lengths of documents and conversations, and the first bad records.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_ja import plots
from chatglm_ja.bases import families
from chatglm_ja.bases.interface import ModelTokenizer
from chatglm_ja.data import dataset
from chatglm_ja.data.cleaning import Fate
from chatglm_ja.data.decontamination import CUT_OUT
from chatglm_ja.data.document_index import DocumentIndex
from chatglm_ja.data.packing import PackingPlan
from chatglm_ja.data.settings import PrepareDataConfig, parse_shares
from chatglm_ja.data.token_store import LABELS
from chatglm_ja.messages import IGNORE_INDEX
from chatglm_ja.reports.render import Table, render_template
from chatglm_ja.storage.files import write_json

Counts = Mapping[str, Any]
Facts = list[tuple[str, str]]  # good, bad or quiet; a sentence

# Counts of texts and conversations of which a part is kept.
CUT = (CUT_OUT, "shortened", "opening left out")
# What the counts in the tables mean; Fate explains the others.
MEANINGS = {
    "documents": "records that could be read",
    "train_tokens": "tokens that the source gives to the training blocks",
    "repeats": "how often its usable text is read for that; below 1, a part of it is",
    CUT_OUT: "kept without what they share with evaluation texts",
    "shortened": "kept without the oldest exchanges, which exceed --max-length",
    "opening left out": "kept without what the assistant says before the first question",
    "train_examples": "conversations that are trained on",
}

# A share is reached if it is at most this far from what was asked for.
SHARE_TOLERANCE = 0.005
# Text read more often than this teaches less each time (Muennighoff et al. 2023, arXiv 2305.16264).
MANY_REPEATS = 4
# A source of which more than this share is dropped may be mislabeled.
MUCH_DROPPED = 0.5

SAMPLED_BLOCKS = 3
SEARCHED_BLOCKS = 200  # the first of them, from which the samples are chosen
SHOWN_CHARACTERS = 160  # of the beginning, and of the end, of a document in a block
SHOWN_REJECTS = 3  # of each reason


def write_report(
    folder: Path,
    profile: str,
    counts: Counts,
    config: PrepareDataConfig,
    texts: tuple[DocumentIndex, PackingPlan] | None,
    conversations: tuple[DocumentIndex, np.ndarray] | None,
) -> None:
    """Write the report into the folder that holds rejects.jsonl.

    `texts` come with the plan of the training blocks, `conversations` with the numbers of those
    that are trained on. Without either, the page has no section on them.
    """
    write_json(folder / "data_report.json", counts)
    shares, sft_shares = parse_shares(config.shares), parse_shares(config.sft_shares)
    colors = plots.language_colors([*shares, *sft_shares])
    tokenizer = families.load_tokenizer(config.tokenizer)
    facts: dict[str, Facts] = {label: [] for label in colors}
    parts: dict[str, Any] = {"pretrain": None, "sft": None}
    mixes = []
    if texts:
        pretrain, index = counts["pretrain"], texts[0]
        for language, share in shares.items():
            facts[language] += judge_texts(language, share, pretrain)
        mixes.append(draw_mix("training tokens", pretrain["train_tokens"], colors))
        parts["pretrain"] = {
            "totals": _describe_pretrain(pretrain),
            "fates": fate_table(pretrain["sources"], "documents", *CUT, "train_tokens", "repeats"),
            "dropped": index.dropped_texts(),
            "blocks": sample_blocks(tokenizer, *texts),
            "lengths": draw_lengths(
                index, index.kept_documents(), colors, folder / "pretrain_lengths.png"
            ),
        }
    if conversations:
        sft = counts["sft"]
        for kind, share in sft_shares.items():
            facts[kind] += judge_conversations(kind, share, sft)
        mixes.append(draw_mix("training conversations", sft["train_examples"], colors))
        parts["sft"] = {
            "totals": _describe_sft(sft),
            "fates": fate_table(sft["sources"], "documents", *CUT, "train_examples"),
            "examples": choose_examples(tokenizer, *conversations),
            "lengths": draw_lengths(*conversations, colors, folder / "sft_lengths.png"),
        }
    page = render_template(
        "data_report.html.jinja",
        profile=profile,
        verdict=describe_verdict(counts),
        facts=facts,
        colors=colors,
        mixes=mixes,
        shown_characters=SHOWN_CHARACTERS,
        rejects=read_rejects(folder / "rejects.jsonl"),
        **parts,
    )
    # A detail of a bad record may hold a lone surrogate, which has no UTF-8 form.
    path = folder / "data_report.html"
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def describe_counts(counts: Counts) -> Iterator[str]:
    """Yield a log line for every source, then one for each of the data sets."""
    parts = [counts[name] for name in ("pretrain", "sft") if name in counts]
    for source in (source for part in parts for source in part["sources"]):
        dropped = [f"{fate} {count:,}" for fate, count in _dropped([source]).items()]
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


def _dropped(sources: Sequence[Mapping[str, Any]]) -> dict[Fate, int]:
    """Count the records of sources that are not kept, by their fates."""
    totals = {fate: sum(source.get(fate, 0) for source in sources) for fate in Fate}
    return {fate: total for fate, total in totals.items() if total and fate is not Fate.KEPT}


def describe_verdict(counts: Counts) -> list[str]:
    """Return in two sentences what is trained on, and what was dropped and why."""
    made, read, sources = [], [], []
    if "pretrain" in counts:
        pretrain = counts["pretrain"]
        tokens = sum(pretrain["train_tokens"].values())
        made.append(f"{tokens:,} tokens of text")
        read.append(f"{_count_read(pretrain['sources']):,} texts")
        sources += pretrain["sources"]
    if "sft" in counts:
        sft = counts["sft"]
        made.append(f"{sum(sft['train_examples'].values()):,} conversations")
        read.append(f"{_count_read(sft['sources']):,} conversations")
        sources += sft["sources"]
    dropped = ", ".join(f"{n:,} {fate.phrase}" for fate, n in _dropped(sources).items())
    return [
        f"The model is trained on {' and '.join(made)}.",
        f"Dropped of {' and '.join(read)}: {dropped or 'none'}.",
    ]


def _count_read(sources: Sequence[Mapping[str, Any]]) -> int:
    """Count the records of sources, bad ones included: each has one fate."""
    return sum(source.get(fate, 0) for source in sources for fate in Fate)


def judge_texts(language: str, asked: float, pretrain: Counts) -> Iterator[tuple[str, str]]:
    """Yield what became of a language's share of the text: good, bad or quiet, and a sentence."""
    tokens, sources = pretrain["train_tokens"], _sources_of(language, pretrain)
    yield _judge_share(language, asked, tokens, "tokens")
    usable = sum(source["tokens"] for source in sources) - pretrain["validation_tokens"][language]
    repeats = tokens[language] / max(usable, 1)
    if repeats <= 1:
        yield "quiet", f"{repeats:.0%} of the usable text"
    else:
        mark = "bad" if repeats > MANY_REPEATS else "quiet"
        yield mark, f"all of the usable text, {repeats:.2f} times"
    yield from _judge_dropped(sources, "texts")


def judge_conversations(kind: str, asked: float, sft: Counts) -> Iterator[tuple[str, str]]:
    """Yield the same for the conversations of a kind."""
    yield _judge_share(kind, asked, sft["train_examples"], "conversations")
    yield from _judge_dropped(_sources_of(kind, sft), "conversations")


def _sources_of(label: str, counts: Counts) -> list[Mapping[str, Any]]:
    return [s for s in counts["sources"] if dataset.title_language(s["name"]) == label]


def _judge_share(
    label: str, asked: float, amounts: Mapping[str, int], unit: str
) -> tuple[str, str]:
    reached = amounts[label] / sum(amounts.values())
    mark = "good" if abs(reached - asked) <= SHARE_TOLERANCE else "bad"
    return mark, f"{amounts[label]:,} {unit}: {reached:.1%}, asked for {asked:.1%}"


def _judge_dropped(sources: Sequence[Mapping[str, Any]], unit: str) -> Iterator[tuple[str, str]]:
    dropped, read = sum(_dropped(sources).values()), _count_read(sources)
    if dropped:
        mark = "bad" if dropped > MUCH_DROPPED * read else "quiet"
        yield mark, f"{dropped:,} of {read:,} {unit} dropped"


def draw_mix(title: str, amounts: Mapping[str, int], colors: Mapping[str, str]) -> str:
    """Draw the share of every language, or kind of conversations, as bars in their colors."""
    figure, axes = plots.make_figure(4.8, 0.6 + 0.35 * len(amounts))
    total = sum(amounts.values())
    shares = [100 * amount / total for amount in amounts.values()]
    names = [_plain(name, f"language {i}") for i, name in enumerate(amounts, start=1)]
    bars = axes.barh(names, shares, color=[colors[name] for name in amounts])
    axes.bar_label(bars, [f"{share:.1f}%" for share in shares], padding=3, fontsize=9)
    axes.set_title(f"{total:,} {title}", fontsize=10)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.margins(x=0.15)
    return plots.to_svg(figure)


def _plain(name: str, instead: str) -> str:
    """Return a name, or something else if the plots' font may lack its characters."""
    return name if name.isascii() else instead


def fate_table(
    sources: Sequence[Mapping[str, Any]], total: str, *others: str
) -> tuple[Table, dict[str, str]]:
    """Return a row for every source, with a column for every fate; and what the columns mean.

    `total` names the count that comes before the fates, `others` those that come after them. Counts
    that are zero for every source have no column.
    """
    counted = [*Fate, *others]
    columns = [total, *(n for n in counted if n is Fate.KEPT or any(s.get(n) for s in sources))]
    titles = {name: name.replace("_", " ") for name in columns}
    meanings = MEANINGS | {fate: fate.phrase for fate in Fate}
    rows = [[s["name"], *(f"{s.get(name, 0):,}" for name in columns)] for s in sources]
    return (["source", *titles.values()], rows), {titles[n]: meanings[n] for n in columns}


def draw_lengths(
    index: DocumentIndex, documents: np.ndarray, colors: Mapping[str, str], path: Path
) -> list[str]:
    """Draw a histogram of tokens per document for every source.

    Returns an SVG for each, and writes all of them as one PNG.
    """
    lengths, source_of = index.length[documents], index.source[documents]
    longest = int(lengths.max()) + 1
    # A decade at least, so that the axis has two labels.
    edges = np.geomspace(min(int(lengths.min()), max(longest // 10, 1)), longest, 41)
    steps = (1, 3) if edges[-1] < 1000 * edges[0] else (1,)
    ticks = [n * 10**power for power in range(10) for n in steps]
    ticks = [tick for tick in ticks if edges[0] <= tick <= edges[-1]]

    def draw(axes: Any, number: int) -> None:
        source, own = index.sources[number], lengths[source_of == number]
        axes.hist(own, bins=edges, color=colors[source.language])
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        name = _plain(source.title, f"source {number + 1}")
        title = f"{name}\n{len(own):,}, median {int(np.median(own)):,}"
        axes.set_title(title, fontsize=9, parse_math=False)
        axes.tick_params(labelsize=8)

    sources = np.unique(source_of).tolist()
    figures = []
    for number in sources:
        figure, axes = plots.make_figure(3.3, 2)
        draw(axes, number)
        figures.append(plots.to_svg(figure))
    columns = min(3, len(sources))
    rows = -(-len(sources) // columns)
    figure, grid = plots.make_figure(
        3.3 * columns, 2 * rows, nrows=rows, ncols=columns, squeeze=False
    )
    for axes, number in zip(grid.flat, sources, strict=False):
        draw(axes, number)
    for axes in grid.flat[len(sources) :]:
        axes.axis("off")
    plots.save_png(figure, path)
    return figures


def sample_blocks(
    tokenizer: ModelTokenizer, index: DocumentIndex, blocks: PackingPlan
) -> Iterator[dict[str, Any]]:
    """Yield a few training blocks with their texts, as the model reads them.

    Together they show many languages, and boundaries between texts.
    """
    blocks = blocks.take(np.arange(min(SEARCHED_BLOCKS, len(blocks))))
    owners = [index.sources[number] for number in index.source[blocks.item]]
    segments = [range(*bounds) for bounds in itertools.pairwise(blocks.bounds.tolist())]
    languages = [{owners[i].language for i in inside} for inside in segments]
    left, seen = list(range(len(segments))), set[str]()
    for _ in range(min(SAMPLED_BLOCKS, len(left))):
        chosen = max(left, key=lambda n: (len(languages[n] - seen), len(segments[n]) > 1))
        left.remove(chosen)
        seen |= languages[chosen]
        texts = []
        for i in segments[chosen]:
            document, start = int(blocks.item[i]), int(blocks.start[i])
            end = start + int(blocks.length[i])
            ids = index.read_document(document)
            texts.append(
                {
                    "title": owners[i].title,
                    "language": owners[i].language,
                    "tokens": end - start,
                    "starts": start == 0,
                    "ends": end == len(ids),
                    "parts": split_special(tokenizer, ids[start:end].tolist()),
                }
            )
        yield {"number": chosen + 1, "texts": texts}


def choose_examples(
    tokenizer: ModelTokenizer, index: DocumentIndex, examples: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Yield a short conversation of every source: its origin, and the runs of `split_example`."""
    for number, source in enumerate(index.sources):
        documents = examples[index.source[examples] == number]
        if not len(documents):
            continue
        # The first one of at most 400 tokens, or if there is none, the first.
        chosen = int(documents[np.argmax(index.length[documents] <= 400)])
        ids, labels = index.read_document(chosen), index.read_document(chosen, LABELS)
        yield {
            "origin": f"{source.title}, record {int(index.record[chosen]):,}",
            "kind": source.language,
            "runs": split_example(tokenizer, ids.tolist(), labels.tolist()),
        }


def split_example(
    tokenizer: ModelTokenizer, ids: list[int], labels: list[int]
) -> list[tuple[bool, list[tuple[bool, str]]]]:
    """Split a tokenized conversation into runs that are trained on or not.

    Returns (is trained on, the parts of `split_special`) for every run.
    """
    pairs = zip(ids, labels, strict=True)
    return [
        (is_trained, split_special(tokenizer, [token for token, _ in run]))
        for is_trained, run in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX)
    ]


def split_special(tokenizer: ModelTokenizer, ids: Sequence[int]) -> list[tuple[bool, str]]:
    """Split tokens into special ones and the texts between: (is a special token, text)."""
    parts: list[tuple[bool, str]] = []
    for is_special, tokens in itertools.groupby(ids, key=tokenizer.special_ids.__contains__):
        if is_special:
            parts += [(True, tokenizer.pieces[token]) for token in tokens]
        else:
            parts.append((False, tokenizer.decode(list(tokens))))
    return parts


def read_rejects(path: Path) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """Return of every reason in rejects.jsonl, the most frequent first: number, the first rows."""
    counts, first = Counter[str](), dict[str, list[dict[str, Any]]]()
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, file):
            counts[row["reason"]] += 1
            if counts[row["reason"]] <= SHOWN_REJECTS:
                first.setdefault(row["reason"], []).append(row)
    return [(reason, count, first[reason]) for reason, count in counts.most_common()]
