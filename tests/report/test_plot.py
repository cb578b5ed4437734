import io
import json
import re
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from gpt2.cli import main
from gpt2.errors import UserError
from gpt2.report.plot import HEIGHT, WIDTH, draw, plot_run, series, smooth


def make_rows(steps, eval_every=0):
    rows = []
    for step in range(1, steps + 1):
        loss = 3 + 8 * np.exp(-60 * step / steps)
        row = {"step": step, "loss": loss, "lr": 6e-4 / step, "grad_norm": 0.3 + 1 / step}
        rows.append({**row, "tokens_per_second": 1e6, "seconds": step / 2, "tokens": 1024 * step})
        if eval_every and step % eval_every == 0:
            rows.append({"step": step, "val_loss": loss + 0.1})
    return rows


def write(folder, rows, tail=""):
    text = "".join(json.dumps(row) + "\n" for row in rows) + tail
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def lines(axes):
    return [(line.get_xdata(), line.get_ydata()) for line in axes.lines]


@pytest.mark.parametrize("steps", [1, 2, 300])
def test_png_has_the_expected_size(tmp_path, steps):
    write(tmp_path, make_rows(steps), tail='{"step": 4, "los')
    path = plot_run(tmp_path)
    assert path == tmp_path / "loss.png"
    image = imread(path)
    assert image.shape[:2] == (HEIGHT, WIDTH)
    assert image.std() > 0.01  # not a blank sheet
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_target_may_be_elsewhere(tmp_path):
    write(tmp_path, make_rows(3))
    target = tmp_path / "pictures" / "run.png"
    assert plot_run(tmp_path, target) == target
    assert target.read_bytes().startswith(b"\x89PNG")


def test_panels_and_lines():
    figure = draw(make_rows(300, eval_every=100), "demo")
    loss, rate, norm, speed = figure.axes
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:2] == ["Loss (nats per token)", "Learning rate"]
    assert titles[2:] == ["Gradient norm", "Throughput (tokens/s)"]
    assert len(loss.lines) == 3  # raw, smoothed, validation
    assert [len(axes.lines) for axes in (rate, norm, speed)] == [1, 1, 1]
    steps, values = lines(loss)[2]
    assert list(steps) == [100, 200, 300]
    assert values[2] == pytest.approx(3.1 + 8 * np.exp(-60))
    texts = [text.get_text() for text in loss.get_legend().get_texts()]
    assert texts == ["training, smoothed: 3.0000", "validation: 3.1000"]
    assert figure.get_suptitle() == "demo: 300 steps, 307k tokens, 2m30s of training"
    assert speed.get_ylim()[0] == 0
    assert norm.get_yscale() == "log"


@pytest.mark.parametrize("rows", [
    make_rows(1), make_rows(300, eval_every=50), make_rows(30, eval_every=30),
    [row | {"grad_norm": 0.31 + row["step"] / 1000} for row in make_rows(20, eval_every=10)],
])  # fmt: skip
def test_legends_cover_no_curve_and_axes_have_ticks(rows):
    figure = draw(rows, "demo")
    figure.savefig(io.BytesIO())  # places all
    boxes = [axes.get_window_extent() for axes in figure.axes]
    for axes in figure.axes:
        if legend := axes.get_legend():
            assert not any(legend.get_window_extent().overlaps(box) for box in boxes)
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            texts = {t.label1.get_text() for t in ticks if low <= t.get_loc() <= high}
            assert len(texts - {""}) >= 2, (axes.get_title(), texts)


def test_the_first_fall_does_not_squeeze_a_long_run():
    loss = draw(make_rows(1000), "demo").axes[0]
    low, high = loss.get_ylim()
    assert low < 3
    assert 4 < high < 7


def test_a_validation_loss_that_rises_stays_in_the_picture():
    """As of a fine-tuning that learns its few texts by heart."""
    rows = make_rows(400)
    for row in rows:
        row.pop("val_loss", None)
        if row["step"] % 40 == 0:
            row["val_loss"] = 3.0 + row["step"] / 100
    low, high = draw(rows, "demo").axes[0].get_ylim()
    assert low < 3.4
    assert 7 < high < 8


def test_short_runs_are_shown_whole_and_raw():
    loss = draw(make_rows(30), "demo").axes[0]
    assert len(loss.lines) == 1
    assert loss.get_ylim()[1] > loss.lines[0].get_ydata()[0]


def test_token_axis_only_where_tokens_grow_evenly():
    even = draw(make_rows(10), "demo").axes[0].child_axes
    assert [axis.get_xlabel() for axis in even] == ["tokens"]
    uneven = [row | {"tokens": row["step"] ** 2} for row in make_rows(10)]
    assert draw(uneven, "demo").axes[0].child_axes == []
    without = [{"step": 1, "loss": 3.0}]
    assert draw(without, "demo").axes[0].child_axes == []


def test_missing_fields_leave_a_note(tmp_path):
    figure = draw([{"step": 5, "loss": 4.0}], "demo")
    notes = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert notes == [[], ["not recorded"], ["not recorded"], ["not recorded"]]
    write(tmp_path, [{"step": 1, "nonfinite": ["loss"]}])  # a run that blew up at once
    assert plot_run(tmp_path).stat().st_size > 1000


def test_a_loss_that_ended_as_nan_is_not_the_last_one():
    rows = [{"step": n, "loss": 4.0, "val_loss": 3.0} for n in (1, 2)]
    lost = {"step": 3, "nonfinite": ["loss", "val_loss"]}

    def labels(rows):
        return [text.get_text() for text in draw(rows, "demo").axes[0].get_legend().get_texts()]

    assert labels([*rows, lost]) == ["training: 4.0000, then NaN", "validation: 3.0000, then NaN"]
    assert labels([rows[0], lost, rows[1]]) == ["training: 4.0000", "validation: 3.0000"]


def test_series_takes_the_last_of_repeated_steps_and_no_nan():
    rows = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 5.0}, {"step": 2, "loss": 2.0}]
    rows += [{"step": 3, "loss": float("nan")}, {"step": 4}]
    steps, values = series(rows, "loss")
    assert list(steps) == [1, 2]
    assert list(values) == [5.0, 2.0]


def test_smoothing_keeps_a_line_and_calms_noise():
    ramp = np.arange(1000.0)
    assert smooth(ramp)[5:-5] == pytest.approx(ramp[5:-5])
    assert len(smooth(np.ones(3))) == 3
    noise = np.random.default_rng(0).normal(size=2000)
    assert smooth(noise).std() < 0.3
    assert smooth(np.full(999, 7.0)) == pytest.approx(np.full(999, 7.0))  # also at both ends


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no .*metrics\.jsonl; name the folder of a run"):
        plot_run(tmp_path)
    write(tmp_path, [], tail='{"ste')
    with pytest.raises(UserError, match="holds no steps yet"):
        plot_run(tmp_path)


def test_drawing_leaves_pyplot_alone(tmp_path):
    write(tmp_path, make_rows(2))
    before = "matplotlib.pyplot" in sys.modules
    plot_run(tmp_path)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_where_a_picture_cannot_be_written_another_place_is_named(tmp_path, capsys):
    """As of the run of somebody else."""
    (tmp_path / "run").mkdir()
    write(tmp_path / "run", make_rows(3))
    assert main(["plot", str(tmp_path / "run"), f"--out={tmp_path}/a.png"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/a.png\n"
    assert not (tmp_path / "run/loss.png").exists()
    assert main(["plot", str(tmp_path / "run"), f"--out={tmp_path}/a.png/b.png"]) == 2
    said = r"a.png/b.png: cannot write there \(.*\); name another file by --out=\n"
    assert re.search(said, capsys.readouterr().err)


def test_a_picture_of_another_kind_is_refused(tmp_path):
    write(tmp_path, make_rows(5))
    with pytest.raises(UserError, match=r"c\.pdf: pictures are PNG files; name it \.png"):
        plot_run(tmp_path, tmp_path / "c.pdf")
    assert not (tmp_path / "c.pdf").exists()
    for name in ("lr_0.001", "c.PNG", "plain"):
        plot_run(tmp_path, tmp_path / name)
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
