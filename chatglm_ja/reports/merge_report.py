"""Step 2's report: the pieces that were added and dropped, and what changed in each language.

report = {
    "policy", "guarantee": str,
    "counts": MergedVocabulary.counts(), "dropped": {reason: [piece]},
    "languages": {language: {**Segmentation.row(), "used_share": share of the new pieces,
                             "changed": [{"line", "before": [piece], "after": [piece]}],
                             "rust_differs": lines with other ids in tokenizer.json}},
}
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chatglm_ja import plots
from chatglm_ja.chatglm3.tokenizer import SPECIAL_TOKENS
from chatglm_ja.reports.render import render_template
from chatglm_ja.storage.files import write_json
from chatglm_ja.vocabulary.merging import MergedVocabulary, Segmentation, segmentation_table
from chatglm_ja.vocabulary.policies import Policy

Report = Mapping[str, Any]

REASONS = {
    "already_known": "already in the base",
    "outside_policy": "not admitted by the policy",
    "unspellable": "made with a character that has no piece",
    "unreachable": "unreachable (the base's own merges always come first)",
    "past_max_new_pieces": "beyond --max-new-pieces (used less often)",
}


def build_report(
    policy: Policy,
    merged: MergedVocabulary,
    languages: Mapping[str, Segmentation],
    before: Any,
    after: Any,
) -> Report:
    """Build the report of a merge; `before` and `after` are sentencepiece processors."""
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


def write_report(folder: Path, report: Report) -> None:
    """Write merge_report.json and merge_report.html."""
    write_json(folder / "merge_report.json", report, indent=2)
    (folder / "merge_report.html").write_text(render_html(report), encoding="utf-8")


def describe_merge(merged: MergedVocabulary) -> str:
    """Return a log line: how many pieces were added, and why the others were not."""
    added = set(merged.added)
    # Policy `all` adds the unspellable and unreachable pieces that `dropped` lists.
    left_out = {name: len(set(merged.dropped.get(name, ())) - added) for name in REASONS}
    reasons = [f"{count:,} {REASONS[name]}" for name, count in left_out.items() if count]
    return _sizes(merged.counts()) + (f"; not added: {', '.join(reasons)}" if reasons else "")


def _sizes(counts: Mapping[str, int]) -> str:
    return (
        f"{counts['added']:,} new pieces added to {counts['base_pieces']:,} base pieces and "
        f"{len(SPECIAL_TOKENS)} special tokens: {counts['vocabulary']:,} ids"
    )


def describe_languages(report: Report) -> Iterator[str]:
    """Yield a log line for every language."""
    for language, row in report["languages"].items():
        yield (
            f"{language}: {row['identical_lines']:,} of {row['lines']:,} lines segmented as before "
            f"({row['covered_lines']:,} guaranteed), {row['tokens_per_char_before']:.3f} -> "
            f"{row['tokens_per_char_after']:.3f} tokens per character, {row['used_share']:.1%} of "
            f"the new pieces used, tokenizer.json and tokenizer.model agree on "
            f"{row['lines'] - row['rust_differs']:,} lines"
        )


def render_html(report: Report) -> str:
    """Return the report as an HTML page."""
    fates = [["added", f"{report['counts']['added']:,}"]]
    examples = []
    for reason, dropped in report["dropped"].items():
        is_added = report["policy"] == "all" and reason in ("unspellable", "unreachable")
        meaning = REASONS[reason] + (", but added under this policy" if is_added else "")
        fates.append([meaning, f"{len(dropped):,}"])
        if dropped:
            examples.append((meaning, dropped[:20]))
    coverage = [
        [
            language,
            f"{row['covered_lines']:,}",
            f"{row['used_share']:.1%}",
            f"{row['new_token_share']:.1%}",
            f"{row['rust_differs']:,} lines",
        ]
        for language, row in report["languages"].items()
    ]
    return render_template(
        "merge_report.html.jinja",
        policy=report["policy"],
        guarantee=report["guarantee"],
        sizes=_sizes(report["counts"]),
        fates=fates,
        examples=examples,
        segmentation=segmentation_table(report["languages"]),
        chart=_draw_tokens_per_char(report["languages"]),
        coverage=coverage,
        languages=report["languages"],
    )


def _draw_tokens_per_char(languages: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw tokens per character before and after the merge, as bars."""
    figure, axes = plots.make_figure(7, 0.7 + 0.55 * len(languages))
    for offset, key, color in ((-0.18, "before", "#b9c2d3"), (0.18, "after", "#2f6fd6")):
        values = [row[f"tokens_per_char_{key}"] for row in languages.values()]
        positions = [index + offset for index in range(len(languages))]
        bars = axes.barh(positions, values, height=0.34, label=key, color=color)
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.set(
        yticks=range(len(languages)), yticklabels=list(languages), xlabel="tokens per character"
    )
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    axes.legend(frameon=False, loc="lower right")
    return plots.to_svg(figure)
