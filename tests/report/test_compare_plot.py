import io

import numpy as np
import pytest
from matplotlib.image import imread

from gpt2.errors import UserError
from gpt2.report import compare_plot
from gpt2.report.compare import find_groups
from gpt2.report.compare_plot import COLOURS, curve, draw_comparison, style
from gpt2.report.runs import find_runs

from .test_compare import write_run


def test_a_comparison_is_one_picture(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"a{seed}", (4, 3 + seed / 10), seed, run_name="$x_{")
        write_run(tmp_path / f"b{seed}", (4, 3.5 + seed / 10), seed, learning_rate=0.1)
    groups = find_groups(find_runs([tmp_path])).groups
    path = draw_comparison(groups, tmp_path / "pictures/compare.png")
    assert imread(path).std() > 0.01
    path.write_text("mine")
    with pytest.raises(UserError, match=r"is there and no picture"):
        draw_comparison(groups, path)


def test_a_recipe_has_a_colour_and_a_seed_its_label(tmp_path, monkeypatch):
    for seed in (1, 2):
        write_run(tmp_path / f"a{seed}", (4, 3 + seed / 10), seed)
        write_run(tmp_path / f"b{seed}", (4, 3.5 + seed / 10), seed, learning_rate=0.1)
    drawn = []
    monkeypatch.setattr(compare_plot, "save_figure", lambda figure, *_: drawn.append(figure))
    draw_comparison(find_groups(find_runs([tmp_path])).groups, tmp_path / "x.png")
    (figure,) = drawn
    figure.savefig(io.BytesIO())  # places all
    for axes in figure.axes[:3]:
        assert len({line.get_color() for line in axes.lines}) == 2
        assert [text.get_text() for text in axes.texts] == [" seed 1", " seed 2"] * 2
        (legend,) = figure.legends
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_curves_run_over_steps_tokens_and_seconds(tmp_path):
    (run,) = find_runs([write_run(tmp_path / "a", (4.0, 3.0))])
    for name, x in (("step", [50, 100]), ("tokens", [500, 1000]), ("seconds", [5, 10])):
        assert np.array_equal(curve(run, name), [x, [4.0, 3.0]])


def test_recipes_look_different():
    assert len({style(number) for number in range(4 * len(COLOURS))}) == 4 * len(COLOURS)
