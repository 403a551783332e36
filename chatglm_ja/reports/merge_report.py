"""Step 2's report: what was added and dropped, and what it did to every language.

report = {
    "policy", "guarantee": str,
    "counts": Merge.counts(), "dropped": {reason: [piece]},
    "languages": {language: {**Segmentation.row(), "used_share": share of the new pieces,
                             "changed": [{"line", "before": [piece], "after": [piece]}],
                             "rust_differs": lines that tokenizer.json cuts otherwise}},
}
"""

import html
from collections.abc import Iterator, Mapping
from typing import Any

from chatglm_ja import plots
from chatglm_ja.chatglm3.tokenizer import SPECIAL_TOKENS
from chatglm_ja.reports import render
from chatglm_ja.vocabulary import segmentation
from chatglm_ja.vocabulary.merging import MergedVocabulary
from chatglm_ja.vocabulary.policies import Policy
from chatglm_ja.vocabulary.segmentation import Segmentation

Report = Mapping[str, Any]

REASONS = {
    "already_known": "in the base already",
    "outside_policy": "not admitted by the policy",
    "unspellable": "needs a character that has no piece",
    "unreachable": "no text encodes to it: the base's merges take its parts first",
    "past_max_new_pieces": "used less than those kept by --max-new-pieces",
}


def build_report(
    policy: Policy,
    merged: MergedVocabulary,
    languages: Mapping[str, Segmentation],
    before: Any,
    after: Any,
) -> Report:
    """The report of a merge, measured on each language's lines with two processors."""
    rows = {}
    for language, result in languages.items():
        rows[language] = {
            **result.row(),
            "used_share": len(result.used) / max(len(merged.added), 1),
            "rust_differs": len(result.rust_differs),
            "changed": [
                {
                    "line": line,
                    "before": before.encode(line, out_type=str),
                    "after": after.encode(line, out_type=str),
                }
                for line in result.changed
            ],
        }
    return {
        "policy": policy,
        "guarantee": policy.guarantee,
        "counts": merged.counts(),
        "languages": rows,
        "dropped": merged.dropped,
    }


def headline(merged: MergedVocabulary) -> str:
    """What became of the learned pieces, as a log line."""
    counts, added = merged.counts(), set(merged.added)
    # Under the policy `all` some are named there that are added all the same.
    left_out = {name: len(set(merged.dropped.get(name, ())) - added) for name in REASONS}
    fates = [f"{count:,} {REASONS[name]}" for name, count in left_out.items() if count]
    return (
        f"{counts['added']:,} pieces added to {counts['base_pieces']:,} of the base and "
        f"{len(SPECIAL_TOKENS)} special tokens: {counts['vocabulary']:,} ids"
        + "".join(f"; {fate}" for fate in fates)
    )


def summary(report: Report) -> Iterator[str]:
    """A log line for every language."""
    for language, row in report["languages"].items():
        yield (
            f"{language}: {row['identical_lines']:,} of {row['lines']:,} lines segmented as before "
            f"(promised: {row['covered_lines']:,}), tokens per character "
            f"{row['tokens_per_char_before']:.3f} -> {row['tokens_per_char_after']:.3f}, "
            f"{100 * row['used_share']:.1f}% of the new pieces used, tokenizer.json = "
            f"tokenizer.model on {row['lines'] - row['rust_differs']:,} lines"
        )


def html_page(report: Report) -> str:
    """The report as one HTML document."""
    counts = report["counts"]
    fates = [["added", f"{counts['added']:,}"]]
    examples = []
    for reason, dropped in report["dropped"].items():
        kept = report["policy"] == "all" and reason in ("unspellable", "unreachable")
        meaning = REASONS[reason] + (", added all the same" if kept else "")
        fates.append([meaning, f"{len(dropped):,}"])
        if dropped:
            examples.append(f"<p>{meaning}: the first of them</p>{render.pieces(dropped[:20])}")
    sections = [
        "<h1>New pieces in ChatGLM3's tokenizer</h1>",
        f"<p>Policy <b>{report['policy']}</b>. {html.escape(report['guarantee'])}</p>",
        f"<p>{counts['base_pieces']:,} pieces of the base, 9 special tokens, "
        f"{counts['added']:,} new pieces: {counts['vocabulary']:,} ids.</p>",
        "<h2>Pieces</h2>",
        render.table(["learned pieces", "number"], fates),
        *examples,
        "<h2>Languages</h2>",
        "<p>Measured on held-out lines.</p>",
        render.table(*segmentation.segmentation_table(report["languages"])),
        _chart(report),
        render.table(
            ["language", "promised lines", "new pieces used", "of the tokens", "tokenizer.json"],
            [
                [
                    language,
                    f"{row['covered_lines']:,}",
                    f"{100 * row['used_share']:.1f}%",
                    f"{100 * row['new_token_share']:.1f}%",
                    f"differs on {row['rust_differs']:,} lines",
                ]
                for language, row in report["languages"].items()
            ],
        ),
        *_changed_lines(report),
    ]
    return render.document("ChatGLM3: merged tokenizer", sections)


def _changed_lines(report: Report) -> Iterator[str]:
    for language, row in report["languages"].items():
        if row["changed"]:
            yield f"<h2>First lines of {html.escape(language)} that are cut otherwise now</h2>"
        for change in row["changed"]:
            yield f"<p>Before: {len(change['before'])} tokens</p>{render.pieces(change['before'])}"
            yield f"<p>After: {len(change['after'])} tokens</p>{render.pieces(change['after'])}"


def _chart(report: Report) -> str:
    """Tokens per character, before and after, as bars."""
    names = list(report["languages"])
    figure, axes = plots.figure(7, 0.7 + 0.55 * len(names))
    for offset, key, colour in ((-0.18, "before", "#b9c2d3"), (0.18, "after", "#2f6fd6")):
        values = [row[f"tokens_per_char_{key}"] for row in report["languages"].values()]
        places = [index + offset for index in range(len(names))]
        bars = axes.barh(places, values, height=0.34, label=key, color=colour)
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="tokens per character")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    axes.legend(frameon=False, loc="lower right")
    return plots.svg(figure)
