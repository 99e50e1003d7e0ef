"""Rows of pictures against the pictures themselves, and what other figures draw."""

import numpy as np
import pytest
from PIL import Image

from curves import plots
from notebooks import figures


def drawn(figure):
    """The pixels of a figure, (H, W, 3) uint8, and its texts by what they say."""
    (axis,) = figure.axes
    return axis.images[0].get_array(), {text.get_text(): text for text in axis.texts}


def test_pictures_stand_in_rows_under_their_captions(tmp_path):
    """Pixel for pixel, enlarged by a whole number; columns line up, a blank stays white, headings
    begin over their own columns; a written file has the figure's size.
    """
    rng = np.random.default_rng(0)
    one, two, three = rng.integers(0, 255, (3, 50, 50, 3), np.uint8)
    rows, groups = {"image": [one, None], "base": [two, three]}, {"mine": 1, "yours": 1, "no": 0}
    figure = plots.picture_rows(rows, ["$a_1$ & $b$", "x" * 90], groups=groups, title="step 3")
    canvas, texts = drawn(figure)
    at = {name: text.get_position() for name, text in texts.items()}
    assert {"image", "base", "mine", "yours", "step 3", "$a_1$ & $b$"} <= set(at) and "no" not in at
    left, right = int(at["mine"][0]), int(at["yours"][0])
    assert right - left > 150 and at["$a_1$ & $b$"][0] == left
    for name, row in rows.items():
        top = round(at[name][1]) - 75
        for x, picture in zip((left, right), row, strict=True):
            cell = canvas[top : top + 150, x : x + 150]
            want = np.full((50, 50, 3), 255) if picture is None else picture
            np.testing.assert_array_equal(cell, want.repeat(3, 0).repeat(3, 1))
    longest = max(len(line) for text in at for line in text.split("\n"))
    assert longest <= 22 and not any(text.get_parse_math() for text in texts.values())
    plots.write(figure, tmp_path / "new" / "grid.png")
    with Image.open(tmp_path / "new" / "grid.png") as image:
        assert image.size == (canvas.shape[1], canvas.shape[0])


@pytest.mark.parametrize(
    "label", ["base", "dropout-raw @400", "WWWWWWWWWWWWWWWW", "\U0001f600 $x$"]
)
def test_labels_of_rows_are_not_cut(label):
    """Whole within the figure, and clear of the pictures."""
    picture = np.zeros((50, 50, 3), np.uint8)
    figure = plots.picture_rows({label: [picture]})
    canvas, texts = drawn(figure)
    extent = texts[plots.short(label, 16)].get_window_extent()
    first = np.nonzero((canvas == 0).all(2).any(0))[0][0]  # column of the first picture
    assert extent.x0 >= 0 and extent.x1 <= first


def test_large_pictures_are_made_smaller():
    """A grid of Stable Diffusion's fits a screen."""
    assert plots.at_size(np.zeros((512, 512, 3), np.uint8)).shape == (224, 224, 3)
    assert plots.at_size(np.zeros((48, 48, 3), np.uint8)).shape == (144, 144, 3)
    assert plots.short("one two three four five six", 9, 2) == "one two\nthree..."


def test_captioned_pictures_fill_rows(tmp_path):
    """Five in rows of three, without labels beside them: two rows, of which the second has a
    blank.
    """
    pictures = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((50, 50, 3), np.uint8)
    plots.captioned(pictures, list("abcde"), 3, tmp_path / "pictures.png")
    with Image.open(tmp_path / "pictures.png") as image:
        found = np.asarray(image.convert("RGB"))
    sizes = [(found == k).all(2).sum() for k in range(1, 6)]
    assert min(sizes) == 150 * 150 and found.shape[1] == 8 + 3 * 156 + 2
    rows = [np.nonzero((found == k).all(2).any(1))[0][0] for k in range(1, 6)]
    assert rows[0] == rows[2] < rows[3] == rows[4]


def test_roc_curve_against_a_loop():
    """At the i-th highest score of a non-member: the share of non-members and of members that are
    not below it, from nobody to everybody.
    """
    rng = np.random.default_rng(0)
    member, nonmember = rng.normal(1, 1, 9), rng.normal(size=7)
    rates, hits = plots.roc_curve(member, nonmember)
    assert (rates[0], hits[0], rates[-1]) == (0, 0, 1)
    for i, cut in enumerate(sorted(nonmember, reverse=True), 1):
        assert rates[i] == pytest.approx((nonmember >= cut).mean())
        assert hits[i] == pytest.approx((member >= cut).mean())


def test_privacy_against_quality():
    """Every adapter at its loss and the AUC of its headline attack, with the ends of the interval;
    the steps of one run are joined, and named.
    """

    def model(loss, auc):
        head = {"attack": "SimA", "auc": auc, "auc_interval": [auc - 0.1, auc + 0.05]}
        return {"held_out_loss": loss, "headline": head}

    places = {"runs/lora @400": (0.1, 0.9), "runs/lora @50": (0.2, 0.7), "runs/smp": (0.15, 0.8)}
    records = [
        {"run": run, "step": int(run[-3:].strip("@")) if "@" in run else None}
        | {"method": run[5:].split(" ")[0], "adapted": model(*at), "base": model(0.3, 0.5)}
        for run, at in places.items()
    ]
    (axis,) = plots.privacy_against_quality(records).axes
    bars = {bar.get_label(): bar for bar in axis.containers}
    assert set(bars) == {"base, no adapter", "lora", "smp"}
    line, _, (ends,) = bars["lora"]
    assert line.get_color() == plots.COLOURS["lora"]
    np.testing.assert_allclose(line.get_xydata(), [(0.2, 0.7), (0.1, 0.9)])
    np.testing.assert_allclose(ends.get_segments()[1][:, 1], [0.8, 0.95])
    assert [text.get_text() for text in axis.texts] == ["step 50", "step 400"]


def test_runs_are_drawn_in_their_colours():
    """A method has its colour, a control of it the same one dashed; both lines hold the values."""
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]
    figure = figures.runs_over_steps({"smp": rows, "smp, no clip": rows}, {"loss": "loss"})
    method, control = figure.axes[0].lines
    assert method.get_color() == control.get_color() == plots.COLOURS["smp"]
    assert (method.get_linestyle(), control.get_linestyle()) == ("-", "--")
    assert method.get_xdata().tolist() == [1, 3] and method.get_ydata().tolist() == [2, 1]


def test_bound_is_split_into_its_two_parts():
    """Proposition 2: the dashed line is the bound less its constant."""
    row = {"step": 5, "hessian_norm": 2.0, "hessian_bound": 7.0, "bound_constant": 4.0}
    figure = figures.bound_along_run({"smp": [row, {"step": 6}]})
    bound, norm, carried = (line.get_ydata().tolist() for line in figure.axes[0].lines)
    assert (bound, norm, carried) == ([7.0], [2.0], [3.0])


def test_long_runs_are_smoothed():
    """Of 60 values and more the line is the mean of the last five, over a pale one of all."""
    values = np.random.default_rng(0).normal(size=80) + 5
    rows = [{"step": k, "loss": v} for k, v in enumerate(values)]
    (axis,) = figures.runs_over_steps({"smp": rows}, {"loss": "a title " * 9}).axes
    pale, line = axis.lines
    np.testing.assert_array_equal(pale.get_ydata(), values)
    for k in (0, 3, 50, 79):
        window = [values[max(i, 0)] for i in range(k - 4, k + 1)]
        assert line.get_ydata()[k] == pytest.approx(np.mean(window))
    assert "\n" in axis.get_title()


def test_a_walk_shades_what_is_described():
    """The dotted line is the gradient's, the ground is shaded up to the reach on both sides."""
    steps = np.linspace(-1, 1, 5)
    (axis,) = figures.walks({"L": (steps, steps**2, -2.0, 0.5, 0 * steps)}).axes
    said, control, change = (line.get_ydata().tolist() for line in axis.lines)
    assert (said, control, change) == ([2, 1, 0, -1, -2], [0] * 5, [1, 0.25, 0, 0.25, 1])
    assert (axis.patches[0].get_x(), axis.patches[0].get_width()) == (-0.5, 1.0)
