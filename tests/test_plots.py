"""The grid of pictures against a composition in numpy, and what two figures of runs draw."""

import numpy as np
import pytest
from PIL import Image

import plots
from notebooks import figures


def composed(images, columns, scale, gap):
    """The grid, written out: picture i in row i // columns, on white."""
    n, height, width, _ = images.shape
    h, w, rows = scale * height + gap, scale * width + gap, -(-n // columns)
    canvas = np.full((rows * h + gap, columns * w + gap, 3), 255, np.uint8)
    for i in range(n):
        y, x = gap + i // columns * h, gap + i % columns * w
        for dy in range(scale * height):
            for dx in range(scale * width):
                canvas[y + dy, x + dx] = images[i, dy // scale, dx // scale]
    return canvas


@pytest.mark.parametrize(
    ("count", "columns", "scale", "gap"),
    [(6, 3, 2, 2), (5, 3, 2, 2), (2, 4, 2, 2), (4, 1, 3, 1), (1, 2, 1, 0)],
)
def test_image_grid_is_the_composition(tmp_path, count, columns, scale, gap):
    """Pixel for pixel: full rows, a last row that is not full, fewer pictures than columns."""
    images = np.random.default_rng(0).integers(0, 256, (count, 5, 7, 3), np.uint8)
    path = tmp_path / "new folder" / "grid.png"
    plots.image_grid(images, columns, path, scale, gap)
    with Image.open(path) as image:
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), composed(images, columns, scale, gap))


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
    pale, line = figures.runs_over_steps({"smp": rows}, {"loss": "a title " * 9}).axes[0].lines
    np.testing.assert_array_equal(pale.get_ydata(), values)
    for k in (0, 3, 50, 79):
        window = [values[max(i, 0)] for i in range(k - 4, k + 1)]
        assert line.get_ydata()[k] == pytest.approx(np.mean(window))
    assert (
        figures.runs_over_steps({"smp": rows}, {"loss": "a title " * 9})
        .axes[0]
        .get_title()
        .count("\n")
    )


def test_a_walk_shades_what_is_described():
    """The dotted line is the gradient's, the ground is shaded up to the reach on both sides."""
    steps = np.linspace(-1, 1, 5)
    (axis,) = figures.walks({"L": (steps, steps**2, -2.0, 0.5, 0 * steps)}).axes
    said, control, change = (line.get_ydata().tolist() for line in axis.lines)
    assert (said, control, change) == ([2, 1, 0, -1, -2], [0] * 5, [1, 0.25, 0, 0.25, 1])
    assert (axis.patches[0].get_x(), axis.patches[0].get_width()) == (-0.5, 1.0)
