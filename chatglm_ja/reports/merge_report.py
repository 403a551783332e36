"""Step 2's report: the pieces that were added and dropped, and what changed in each language.

report = {
    "policy", "guarantee": str,
    "counts": MergedVocabulary.counts(), "dropped": {reason: [piece]},
    "languages": {language: {**Segmentation.row(), "used_share": share of the new pieces,
                             "changed": [{"line", "before": [piece], "after": [piece]}],
                             "rust_differs": lines with other ids in tokenizer.json, only if the
                             pipeline itself reads another file}},
}
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chatglm_ja import plots
from chatglm_ja.bases.interface import ModelTokenizer
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
    before: ModelTokenizer,
    after: ModelTokenizer,
) -> Report:
    """Build the report of a merge; `before` and `after` are the tokenizers compared."""
    rows: dict[str, dict[str, Any]] = {}
    for language, result in languages.items():
        rows[language] = {
            **result.row(),
            "used_share": len(result.used) / max(len(merged.added), 1),
        }
        if result.rust_differs is not None:
            rows[language]["rust_differs"] = len(result.rust_differs)
        rows[language]["changed"] = [
            {"line": line, "before": before.spell(line), "after": after.spell(line)}
            for line in result.changed
        ]
    return {
        "policy": policy,
        "guarantee": policy.describe_guarantee(in_bytes=merged.vocabulary.in_bytes),
        "counts": merged.counts(),
        "languages": rows,
        "dropped": merged.dropped,
    }


def write_report(folder: Path, report: Report, name: str) -> None:
    """Write merge_report.json and merge_report.html; `name` is the base's."""
    write_json(folder / "merge_report.json", report, indent=2)
    (folder / "merge_report.html").write_text(render_html(report, name), encoding="utf-8")


def describe_merge(merged: MergedVocabulary) -> str:
    """Return a log line: how many pieces were added, and why the others were not."""
    added = set(merged.added)
    # Policy `all` adds the unspellable and unreachable pieces that `dropped` lists.
    left_out = {name: len(set(merged.dropped.get(name, ())) - added) for name in REASONS}
    reasons = [f"{count:,} {REASONS[name]}" for name, count in left_out.items() if count]
    return _sizes(merged.counts()) + (f"; not added: {', '.join(reasons)}" if reasons else "")


def _sizes(counts: Mapping[str, int]) -> str:
    special = counts["vocabulary"] - counts["base_pieces"] - counts["added"]
    return (
        f"{counts['added']:,} new pieces added to {counts['base_pieces']:,} base pieces and "
        f"{special:,} special tokens: {counts['vocabulary']:,} ids"
    )


def describe_languages(report: Report) -> Iterator[str]:
    """Yield a log line for every language."""
    for language, row in report["languages"].items():
        line = (
            f"{language}: {row['identical_lines']:,} of {row['lines']:,} lines segmented as before "
            f"({row['covered_lines']:,} guaranteed), {row['tokens_per_char_before']:.3f} -> "
            f"{row['tokens_per_char_after']:.3f} tokens per character, {row['used_share']:.1%} of "
            "the new pieces used"
        )
        if "rust_differs" in row:
            agreed = row["lines"] - row["rust_differs"]
            line += f", tokenizer.json and tokenizer.model agree on {agreed:,} lines"
        yield line


def render_html(report: Report, name: str) -> str:
    """Return the report as an HTML page; `name` is the base's."""
    fates = [["added", f"{report['counts']['added']:,}"]]
    examples = []
    for reason, dropped in report["dropped"].items():
        is_added = report["policy"] == "all" and reason in ("unspellable", "unreachable")
        meaning = REASONS[reason] + (", but added under this policy" if is_added else "")
        fates.append([meaning, f"{len(dropped):,}"])
        if dropped:
            examples.append((meaning, dropped[:20]))
    head = ["language", "guaranteed lines", "new pieces used", "new among all tokens"]
    coverage = []
    for language, row in report["languages"].items():
        shares = (f"{row[share]:.1%}" for share in ("used_share", "new_token_share"))
        coverage.append([language, f"{row['covered_lines']:,}", *shares])
        if "rust_differs" in row:
            coverage[-1].append(f"{row['rust_differs']:,} lines")
    if any("rust_differs" in row for row in report["languages"].values()):
        head.append("tokenizer.json differs on")
    return render_template(
        "merge_report.html.jinja",
        base=name,
        policy=report["policy"],
        guarantee=report["guarantee"],
        sizes=_sizes(report["counts"]),
        fates=fates,
        examples=examples,
        segmentation=segmentation_table(report["languages"]),
        chart=_draw_tokens_per_char(report["languages"]),
        coverage=(head, coverage),
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
