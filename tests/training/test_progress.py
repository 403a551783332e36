"""The loss plot: what it draws, and that it is written."""

from pathlib import Path

from chatglm_ja import plots
from chatglm_ja.training import progress

HISTORY = [
    {"step": 0, "eval_ja_loss": 4.0, "eval_zh_loss": 3.5, "eval_ja_bits_per_char": 5.0},
    {"step": 10, "loss": 3.0},
    {"step": 20, "loss": 2.0, "grad_norm": 1.0},
    {"step": 20, "eval_ja_loss": 2.5, "eval_zh_loss": 3.0},
]


def drawn(scale: str) -> dict[str, list[tuple[float, float]]]:
    """The points of every curve, by its label."""
    _, axis = plots.make_figure(4, 3)
    progress.draw_losses(axis, HISTORY, 1000, scale)
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axis.lines}


def test_training_and_validation_losses_are_drawn_over_tokens() -> None:
    assert drawn("linear") == {
        "training": [(10_000, 3.0), (20_000, 2.0)],
        "validation ja": [(0, 4.0), (20_000, 2.5)],
        "validation zh": [(0, 3.5), (20_000, 3.0)],
    }
    # Without step 0, which a logarithmic axis cannot show.
    assert drawn("log") == {
        "training": [(10_000, 3.0), (20_000, 2.0)],
        "validation ja": [(20_000, 2.5)],
        "validation zh": [(20_000, 3.0)],
    }


def test_the_picture_is_written_with_the_curves(tmp_path: Path) -> None:
    progress.plot_losses(HISTORY, 1000, tmp_path)
    picture = (tmp_path / progress.LOSS_PLOT_FILE).read_bytes()
    assert picture.startswith(b"\x89PNG")
    # It shows the history: other losses give another picture.
    changed = [entry | {"loss": 2.9} if "loss" in entry else entry for entry in HISTORY]
    progress.plot_losses(changed, 1000, tmp_path)
    assert (tmp_path / progress.LOSS_PLOT_FILE).read_bytes() != picture


def test_the_picture_does_not_depend_on_the_order_of_entries(tmp_path: Path) -> None:
    """A checkpoint sorts them."""
    pictures = []
    for order in (list, reversed):
        history = [dict(order(list(entry.items()))) for entry in HISTORY]
        progress.plot_losses(history, 1000, tmp_path)
        pictures.append((tmp_path / progress.LOSS_PLOT_FILE).read_bytes())
    assert pictures[0] == pictures[1]


def test_no_picture_without_training_losses(tmp_path: Path) -> None:
    progress.plot_losses(HISTORY[:1], 1000, tmp_path)
    assert not list(tmp_path.iterdir())
