"""Step 2's report: the pieces that were added and dropped, and what changed in each language.

report = {
    "policy", "guarantee": str,
    "counts": MergedVocabulary.counts(),
    "first_new_id": id of the first added piece, "added": [piece], "dropped": {reason: [piece]},
    "languages": {language: {**Segmentation.row(), "used_share": share of the new pieces,
                             "changed": [{"line", "before": [piece], "after": [piece],
                                          "new": [whether a piece of `after` was added]}],
                             "rust_differs": lines with other ids in tokenizer.json, only if the
                             pipeline itself reads another file}},
}

Added and dropped pieces are written as a person reads them, see `spell_piece`; tokenizer.json has
them as the tokenizer does. The page lists all of them, and a script of a few lines filters the
lists. Without the script the lists are whole.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chatglm_ja import plots
from chatglm_ja.bases.interface import ModelTokenizer
from chatglm_ja.reports.render import Table, render_template
from chatglm_ja.reports.verdict import name_language
from chatglm_ja.storage.files import write_json
from chatglm_ja.vocabulary.merging import MergedVocabulary, Segmentation
from chatglm_ja.vocabulary.policies import Policy

Report = Mapping[str, Any]

REASONS = {
    "already_known": "already in the base",
    "outside_policy": "not admitted by the policy",
    "unspellable": "made with a character that has no piece",
    "unreachable": "unreachable (the base's own merges always come first)",
    "past_max_new_pieces": "beyond --max-new-pieces (used less often)",
}

# The columns of the table of languages: key of a row, format, title, meaning.
COLUMNS = (
    ("lines", "{:,}", "lines", "held-out lines that both tokenizers segmented"),
    ("identical_lines", "{:,}", "as before", "lines that keep their tokens"),
    ("covered_lines", "{:,}", "guaranteed", "lines that the policy must not change"),
    ("tokens_per_char_before", "{:.3f}", "before", "tokens per character, by the base's tokenizer"),
    ("tokens_per_char_after", "{:.3f}", "after", "the same, by the merged tokenizer"),
    ("used_share", "{:.1%}", "pieces used", "share of the new pieces that occur in these lines"),
    ("new_token_share", "{:.1%}", "new tokens", "share of the tokens after that are new pieces"),
    (
        "rust_differs",
        "{:,}",
        "files differ",
        "lines on which tokenizer.json and tokenizer.model differ",
    ),
)

# A language keeps its tokens if at most this share of its lines changes: some quote Japanese.
FEW_CHANGED = 0.001
# One whose lines change gains from it if it needs at least this share of tokens less.
WORTHWHILE = 0.1


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
            {
                "line": line,
                "before": before.spell(line),
                "after": after.spell(line),
                "new": [index >= before.size for index in after.encode(line)],
            }
            for line in result.changed
        ]

    def spell(pieces: list[str]) -> list[str]:
        return [spell_piece(merged.vocabulary.content_of(piece)) for piece in pieces]

    return {
        "policy": policy,
        "guarantee": policy.describe_guarantee(in_bytes=merged.vocabulary.in_bytes),
        "counts": merged.counts(),
        "languages": rows,
        "first_new_id": after.first_new_id,
        "added": spell(merged.added),
        "dropped": {reason: spell(pieces) for reason, pieces in merged.dropped.items()},
    }


def spell_piece(content: str | bytes) -> str:
    r"""Return a piece, of characters or bytes, on one line without blanks.

    A space is ▁, as sentencepiece writes it. \x and two digits are a byte of a character that the
    piece holds only a part of; other characters that cannot be seen have Python's escapes, too.
    """
    text = content.decode("utf-8", "backslashreplace") if isinstance(content, bytes) else content
    visible = text.replace(" ", "▁")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in visible)


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
    languages = report["languages"]
    colors = plots.language_colors(languages)
    added = [
        f"{index} {piece}" for index, piece in enumerate(report["added"], report["first_new_id"])
    ]
    lists = [("added, each after its id", added)]
    for reason, dropped in report["dropped"].items():
        is_added = report["policy"] == "all" and reason in ("unspellable", "unreachable")
        lists.append(
            (REASONS[reason] + (", but added under this policy" if is_added else ""), dropped)
        )
    return render_template(
        "merge_report.html.jinja",
        base=name,
        verdict=describe_verdict(report),
        policy=next(policy for policy in Policy if policy == report["policy"]),
        guarantee=report["guarantee"],
        sizes=_sizes(report["counts"]),
        few_changed=FEW_CHANGED,
        worthwhile=WORTHWHILE,
        colors=colors,
        name_language=name_language,
        facts={language: list(_judge(row)) for language, row in languages.items()},
        chart=_draw_tokens_per_char(languages, colors),
        has_bytes=any("\\x" in piece for _, pieces in lists for piece in pieces),
        lists=[(title, pieces) for title, pieces in lists if pieces],
        segmentation=_language_table(languages),
        languages=languages,
    )


def describe_verdict(report: Report) -> str:
    """Return in a sentence what the merge gains, and what it costs."""
    gains, costs, unchanged = [], [], []
    for language, row in report["languages"].items():
        before, after = (row[f"tokens_per_char_{time}"] for time in ("before", "after"))
        name, changed = name_language(language), row["lines"] - row["identical_lines"]
        if not changed:
            unchanged.append(name)
        elif _saving(row) >= WORTHWHILE:
            gains.append(f"{name} needs {after:.3f} instead of {before:.3f} tokens per character")
        else:
            costs.append(f"{changed:,} of {row['lines']:,} {name} lines changed")
    if unchanged:
        costs.append(f"no {' or '.join(unchanged)} line changed")
    parts = [", ".join(part) for part in (gains, costs) if part]
    return f"{report['counts']['added']:,} new pieces: {'; '.join(parts)}."


def _saving(row: Mapping[str, float]) -> float:
    """Return the share of a language's tokens that the new pieces save."""
    return 1 - row["tokens_per_char_after"] / (row["tokens_per_char_before"] or 1)


def _judge(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what a merge means for a language: good, bad or quiet, and a sentence."""
    before, after = (f"{row[f'tokens_per_char_{time}']:.3f}" for time in ("before", "after"))
    lines, changed = row["lines"], row["lines"] - row["identical_lines"]
    if changed <= FEW_CHANGED * lines:
        kept = f"{row['identical_lines']:,} of {lines:,}" if changed else f"All {lines:,}"
        yield "good", f"{kept} held-out lines are segmented as before."
        yield "quiet", f"{after} tokens per character"
        return
    saving = f"{before} → {after} tokens per character: {_saving(row):.0%} fewer"
    if _saving(row) >= WORTHWHILE:
        yield "good", saving
        yield "quiet", f"{changed:,} of {lines:,} held-out lines are segmented anew."
    else:
        yield "bad", f"{changed:,} of {lines:,} held-out lines are segmented otherwise."
        yield "quiet", saving
    if row["used_share"]:
        yield "quiet", f"{row['used_share']:.0%} of the new pieces occur in them."


def _language_table(
    languages: Mapping[str, Mapping[str, Any]],
) -> tuple[Table, dict[str, str]]:
    """Return a row for every language, and what its columns mean; none is all zeros."""
    rows = languages.values()
    columns = [column for column in COLUMNS if any(row.get(column[0]) for row in rows)]
    table = [
        [language, *(form.format(row.get(key, 0)) for key, form, *_ in columns)]
        for language, row in languages.items()
    ]
    return (["language", *(title for _, _, title, _ in columns)], table), {
        title: meaning for _, _, title, meaning in columns if meaning
    }


def _draw_tokens_per_char(
    languages: Mapping[str, Mapping[str, Any]], colors: Mapping[str, str]
) -> str:
    """Draw tokens per character before and after the merge, as bars in the languages' colors."""
    figure, axes = plots.make_figure(5, 0.6 + 0.55 * len(languages))
    for offset, time, alpha in ((-0.19, "before", 0.4), (0.19, "after", 1.0)):
        values = [row[f"tokens_per_char_{time}"] for row in languages.values()]
        places = [index + offset for index in range(len(languages))]
        bars = axes.barh(places, values, 0.36, color=[*colors.values()], alpha=alpha)
        axes.bar_label(bars, [f"{value:.3f} {time}" for value in values], padding=3, fontsize=8)
    axes.set(
        yticks=range(len(languages)), yticklabels=list(languages), xlabel="tokens per character"
    )
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.25)
    return plots.to_svg(figure)
