"""The report's first picture: all stages in a few measures, as dots, in two parts.

The first has bits per character, as the change from the base; what is shaded is outside the limit
of the verdict. The second has shares in percent, a row for each language and measure.
"""

from collections.abc import Iterator
from typing import Any

from chatglm_ja import plots
from chatglm_ja.reports.eval_tables import Results
from chatglm_ja.reports.verdict import CHOICE_METRIC, LIMITS

_MARKERS = ("|", "^", "D")  # of the stages before the last one, which has a filled circle


def draw_stages(results: Results) -> list[str]:
    """Draw the parts that have values; return SVGs."""
    names = [stage["name"] for stage in results["stages"]]
    rows = list(_share_rows(results))
    languages = list(results["stages"][0]["languages"])
    colors = plots.language_colors([*languages, *(kind for kind, _, _ in rows)])
    drawn = [_draw_bits(results, names, colors)]
    if rows:
        figure, axes = plots.make_figure(5, 0.27 * len(rows) + 0.9)
        for place, (kind, _, values) in enumerate(rows):
            _draw_row(axes, place, values, colors[kind])
        axes.set_xlim(-3, 103)
        labels = [f"{plots.name_language(kind)}: {measure}" for kind, measure, _ in rows]
        _label(axes, names, labels, "percent; more is better")
        drawn.append(plots.to_svg(figure))
    return drawn


def _draw_bits(results: Results, names: list[str], colors: dict[str, str]) -> str:
    stages = results["stages"]
    languages = list(stages[0]["languages"])
    figure, axes = plots.make_figure(5, 0.4 * len(languages) + 0.9)
    for place, language in enumerate(languages):
        base = stages[0]["languages"][language]["bits_per_char"]
        values = [100 * (s["languages"][language]["bits_per_char"] / base - 1) for s in stages]
        _draw_row(axes, place, values, colors[language])
    axes.margins(x=0.08)
    left, right = axes.get_xlim()
    right = max(right, 200 * LIMITS.bits_per_char)
    for place in range(len(languages)):
        limit = 100 * LIMITS.bits_per_char if place else 0
        shade = {"color": "#b3261e", "alpha": 0.1, "linewidth": 0}
        axes.fill_betweenx([place - 0.4, place + 0.4], limit, right, **shade)
    axes.set_xlim(left, right)
    labels = [plots.name_language(language) for language in languages]
    _label(axes, names, labels, "bits per character: change from the base, %; less is better")
    return plots.to_svg(figure)


def _share_rows(results: Results) -> Iterator[tuple[str, str, list[float | None]]]:
    """Yield (language or kind, measure, value of every stage)."""
    stages = results["stages"]
    kinds = dict.fromkeys(
        [*stages[0]["languages"], *(row["kind"] for row in stages[0]["held_out"])]
    )
    for kind in kinds:
        for key, title in (("in_language", "in the language"), ("ended", "ended")):
            values = [
                row[key]
                for stage in stages
                for row in stage["held_out"]
                if row["kind"] == kind and row["way"] == "sampled"
            ]
            yield from _share_row(kind, f"answers {title}", values)
        means = [
            [row["mean"] for row in stage["probes"] if row["language"] == kind] for stage in stages
        ]
        yield from _share_row(
            kind, "in-context probes", [sum(m) / len(m) if m else None for m in means]
        )
        values = [
            stage["choices"][kind]["compared"][CHOICE_METRIC]["mean"]
            for stage in stages
            if kind in stage["choices"]
        ]
        yield from _share_row(kind, "multiple choice", values)


def _share_row(
    kind: str, measure: str, values: list[float | None]
) -> Iterator[tuple[str, str, list[float | None]]]:
    """Yield the row in percent, if any stage has a value."""
    if any(value is not None for value in values):
        yield kind, measure, [None if value is None else 100 * value for value in values]


def _draw_row(axes: Any, place: int, values: list[Any], color: str) -> None:
    """Draw a line from the lowest to the highest value, and a dot for each stage."""
    known = [value for value in values if value is not None]
    axes.plot([min(known), max(known)], [place, place], color=color, linewidth=1, alpha=0.5)
    for number, value in enumerate(values):
        if value is not None:
            axes.plot(value, place, **_marker(number, len(values), color))


def _marker(number: int, stages: int, color: str) -> dict[str, Any]:
    is_last = number == stages - 1
    return {
        "marker": "o" if is_last else _MARKERS[number],
        "markersize": 8 if is_last else 7,
        "color": color,
        "markerfacecolor": color if is_last else "white",
        "linestyle": "",
    }


def _label(axes: Any, stages: list[str], rows: list[str], unit: str) -> None:
    """Name the rows, the unit, and in a legend the stages."""
    from matplotlib.lines import Line2D

    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(labelsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(unit, fontsize=9)
    axes.axvline(0, color=plots.INK, linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [
        Line2D([], [], label=name, **_marker(number, len(stages), plots.INK))
        for number, name in enumerate(stages)
    ]
    axes.legend(
        handles=handles, ncols=len(stages), loc="lower right", bbox_to_anchor=(1, 1),
        frameon=False, fontsize=9, handletextpad=0.2, columnspacing=1,
    )  # fmt: skip
