"""Figures: what is drawn equals the table; files are deterministic; labels do not collide."""

from __future__ import annotations

import itertools
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from midblock.errors import OutputError, SettingsError
from midblock.figures import MAX_HEIGHT, depth_lines, heatmap, lines, save_figure, scatter_pareto, segment_bars
from midblock.figures.matrices import PIXELS
from midblock.quantities import MATRICES
from midblock.results import Estimate, Table

NAN = float("nan")


def table(metrics=("prompt_entropy", "cka"), layers=7):
    rng = np.random.default_rng(0)
    rows = Table()
    for metric in metrics:
        for h in range(layers):
            a, d = rng.random(), rng.normal(0, 0.1)
            if metric == "cka":
                rows.add("hidden", h, metric, "pair", Estimate(a, a - 0.1, a + 0.1, 50))
                continue
            rows.add("hidden", h, metric, "base", Estimate(a, a - 0.1, a + 0.1, 50))
            rows.add("hidden", h, metric, "sft", Estimate(a + d, a + d - 0.1, a + d + 0.1, 50))
            rows.add("hidden", h, metric, "difference", Estimate(d, d - 0.05, d + 0.05, 48))
    return rows.frame()


def drawn(ax, label):
    return next(line for line in ax.lines if line.get_label() == label)


def cells(image):
    """The matrix that an image shows: the pixels of a cell are alike, and its middle is where its numbers say."""
    pixels = image.get_array()
    shown = pixels[PIXELS // 2::PIXELS, PIXELS // 2::PIXELS]
    rows, columns = shown.shape
    assert image.get_extent() == pytest.approx((-0.5, columns - 0.5, rows - 0.5, -0.5))
    again = np.ma.array(np.kron(shown.data, np.ones((PIXELS, PIXELS))),
                        mask=np.kron(np.ma.getmaskarray(shown), np.ones((PIXELS, PIXELS), dtype=bool)))
    assert np.array_equal(np.ma.getmaskarray(again), np.ma.getmaskarray(pixels))
    assert np.ma.allequal(again, pixels)
    return shown


def arms(values, **extra):
    v = np.asarray(values, dtype=float)
    names = ["11111", "10000", "01000", "00100", "00010", "00001"][:v.size]
    return pd.DataFrame({"layer": names, "value": v, "low": v - 0.05, "high": v + 0.05, "n": 200, **extra})


def test_depth_lines_draws_the_tables_values_in_the_right_panels():
    frame = table()
    fig = depth_lines(frame.sample(frac=1, random_state=1), ["prompt_entropy", "cka"])
    models, change, pair = fig.axes
    for ax, side, label in ((models, "base", "base"), (models, "sft", "sft"),
                            (change, "difference", "difference"), (pair, "pair", "pair score")):
        metric = "cka" if side == "pair" else "prompt_entropy"
        expected = frame[(frame.metric == metric) & (frame.side == side)]
        assert drawn(ax, label).get_ydata().tolist() == expected.value.tolist()
        assert drawn(ax, label).get_xdata().tolist() == list(range(7))
    band = change.collections[0].get_paths()[0].vertices[:, 1]
    expected = frame[frame.side == "difference"]
    assert band.min() == pytest.approx(expected.low.min())
    assert band.max() == pytest.approx(expected.high.max())
    assert any(set(line.get_ydata()) == {0.0} for line in change.lines)
    assert models.get_ylabel().replace("\n", " ") == "Prompt entropy (share of the maximum)"
    assert pair.get_xlabel() == "hidden state h (0 = embeddings)"
    assert {t.get_text() for t in fig.legends[0].get_texts()} == {"base", "sft", "difference", "pair score"}


def test_depth_lines_has_relative_depth_on_top():
    ax = depth_lines(table(["gini"]), num_layers=30).axes[0]
    assert [(t.get_text(), t.xy) for t in ax.texts] == [("depth 0", (0, 1)), ("0.5", (15, 1)), ("1", (30, 1))]
    assert ax.get_xlim()[1] > 30


def test_panels_below_each_other_share_their_ticks_and_draw_few_lines():
    fig = depth_lines(table(["prompt_entropy", "gini", "curvature"], layers=31))
    assert [ax.xaxis.get_visible() for ax in fig.axes] == [False] * 4 + [True] * 2
    assert len({ax.get_xlim() for ax in fig.axes}) == 1
    assert fig.axes[-1].get_xticks().tolist() == [0, 5, 10, 15, 20, 25, 30]
    for ax in fig.axes:
        low, high = ax.get_ylim()
        assert 3 <= len(ax.get_yticks()) <= 5
        assert all(low <= y <= high for y in ax.get_yticks())
        assert not any(t.gridline.get_visible() or t.tick1line.get_visible() for t in ax.yaxis.get_major_ticks())


def test_undefined_layers_are_gaps_not_zeros():
    frame = table(["gini"])
    frame.loc[frame.layer.isin([2, 3]), ["value", "low", "high"]] = NAN
    ax = depth_lines(frame).axes[0]
    assert np.isnan(drawn(ax, "base").get_ydata()[[2, 3]]).all()
    frame[["value", "low", "high"]] = NAN
    texts = [t.get_text() for t in depth_lines(frame).axes[0].texts]
    assert texts[0] == "undefined at every layer"


def test_depth_lines_hue_splits_the_sides():
    frame = pd.concat([table(["gini"]).assign(stage=s) for s in ("sft", "dpo")])
    frame.loc[frame.stage == "dpo", "value"] += 1
    fig = depth_lines(frame, hue="stage")
    assert {"sft", "dpo"} <= {line.get_label() for line in fig.axes[1].lines}
    assert (drawn(fig.axes[1], "dpo").get_ydata() - drawn(fig.axes[1], "sft").get_ydata()
            == pytest.approx(1.0))
    with pytest.raises(SettingsError, match="several rows for layer 0"):
        depth_lines(frame)


def test_depth_lines_faults():
    frame = table()
    with pytest.raises(SettingsError, match="no metric 'lidar'"):
        depth_lines(frame, ["lidar"])
    with pytest.raises(SettingsError, match="needs column 'side'"):
        depth_lines(frame.drop(columns="side"))
    with pytest.raises(SettingsError, match="one kind"):
        depth_lines(pd.concat([frame, frame.assign(kind="block")]))
    with pytest.raises(SettingsError, match="segment_bars"):
        depth_lines(frame.assign(layer="0100x"))
    with pytest.raises(SettingsError, match="without rows"):
        depth_lines(frame.iloc[:0])


def test_a_csv_round_trip_draws_the_same(tmp_path):
    frame = table()
    frame.to_csv(tmp_path / "t.csv", index=False)
    again = pd.read_csv(tmp_path / "t.csv")
    assert (drawn(depth_lines(again).axes[0], "base").get_ydata().tolist()
            == pytest.approx(drawn(depth_lines(frame).axes[0], "base").get_ydata().tolist()))


def test_heatmap_is_centred_and_marks_undefined_cells():
    fig = heatmap([[0.5, NAN], [-2.0, 0.0]], ["a", "b"], ["x", "y"], "t", 0, label="r")
    image = fig.axes[0].images[0]
    assert (image.norm.vmin, image.norm.vcenter, image.norm.vmax) == (-2.0, 0.0, 2.0)
    assert cells(image).mask.tolist() == [[False, True], [False, False]]
    assert [t.get_text() for t in fig.axes[0].texts] == ["0.50", "–", "−2.00", "0.00"]
    assert fig.axes[1].get_ylabel() == "r"
    with pytest.raises(SettingsError, match="does not fit"):
        heatmap([[1.0]], ["a", "b"], ["x"])
    heatmap(np.full((2, 2), NAN), "ab", "xy").draw_without_rendering()


@pytest.mark.parametrize("shape", [(3, 3), (80, 7), (7, 80), (30, 30), (12, 12)])
def test_heatmap_labels_do_not_overlap(shape):
    rows = [f"model.layers.{i}.self_attn" for i in range(shape[0])]
    columns = [f"long_quantity_{i}" if shape[1] < 40 else i for i in range(shape[1])]
    fig = heatmap(np.random.default_rng(0).random(shape), rows, columns)
    assert_apart(fig, fig.axes[0].get_yticklabels(), axis=1)
    labels = fig.axes[0].get_xticklabels()
    if not labels[0].get_rotation():
        assert_apart(fig, labels, axis=0)
    assert len(labels) >= min(4, shape[1])


def assert_apart(fig: Figure, labels: list[Text], axis: int) -> None:
    fig.draw_without_rendering()
    spans = sorted((b.min[axis], b.max[axis]) for b in (t.get_window_extent() for t in labels if t.get_text()))
    assert all(a[1] <= b[0] + 0.5 for a, b in itertools.pairwise(spans))


def test_segment_bars_values_intervals_and_baseline():
    frame = arms([0.3, 0.4, NAN, 0.2])
    fig = segment_bars(frame, baseline="11111", value_label="accuracy (share)")
    ax = fig.axes[0]
    heights = [p.get_height() for p in ax.patches]
    assert heights[:2] == [0.3, 0.4]
    assert np.isnan(heights[2])
    assert [t.get_text() for t in ax.texts] == ["undefined"]
    segments = ax.collections[0].get_segments()
    assert np.array([(s[:, 1].min(), s[:, 1].max()) for s in segments]) == pytest.approx(
        np.array([(0.25, 0.35), (0.35, 0.45), (0.15, 0.25)]))
    assert any(list(line.get_ydata()) == [0.3, 0.3] for line in ax.lines)
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["11111 (baseline)"]
    assert ax.get_xlabel() == "segments (input side first)"
    assert segment_bars(frame, label_title="segments swapped").axes[0].get_xlabel() == "segments swapped"
    assert [t.get_text() for t in ax.get_xticklabels()] == frame.layer.tolist()


def test_segment_bars_lie_down_for_long_or_many_labels():
    names = [f"random blocks draw {i}" for i in range(30)]
    frame = pd.DataFrame({"arm": names, "value": np.linspace(-1, 1, 30)})
    fig = segment_bars(frame, label="arm")
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == names
    assert [p.get_width() for p in fig.axes[0].patches] == frame.value.tolist()
    assert_apart(fig, fig.axes[0].get_yticklabels(), axis=1)


def test_segment_bars_groups_and_faults():
    frame = pd.concat([arms([0.3, 0.4], head="base", metric="accuracy"),
                       arms([0.2, 0.5], head="sft", metric="accuracy")])
    fig = segment_bars(frame, metric="accuracy", hue="head")
    assert sorted(p.get_height() for p in fig.axes[0].patches) == [0.2, 0.3, 0.4, 0.5]
    assert fig.axes[0].get_ylabel() == "Accuracy (share)"
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["base", "sft"]
    with pytest.raises(SettingsError, match="several rows"):
        segment_bars(frame)
    with pytest.raises(SettingsError, match="no baseline '00111'"):
        segment_bars(arms([1, 2]), baseline="00111")
    with pytest.raises(SettingsError, match="no rows of metric"):
        segment_bars(frame, metric="loss")


def test_pareto_front_is_the_unbeaten_arms():
    frame = pd.DataFrame({"arm": list("abcde"), "ppl": [10, 11, 12, 11, NAN], "gain": [1, 3, 2, 2.5, 9]})
    fig = scatter_pareto(frame, "ppl", "gain", x_larger_is_better=False)
    front = drawn(fig.axes[0], "not beaten on both axes")
    assert list(zip(front.get_xdata(), front.get_ydata(), strict=True)) == [(10, 1), (11, 3)]
    assert {t.get_text() for t in fig.axes[0].texts} == set("abcd")
    assert "without a value: e" in {t.get_text() for t in fig.texts} | {fig.get_supxlabel()}
    assert fig.axes[0].get_xlabel() == "Ppl (lower is better)"
    other = drawn(scatter_pareto(frame, "ppl", "gain").axes[0], "not beaten on both axes")
    assert list(other.get_xdata()) == [11, 12]


def test_pareto_labels_do_not_overlap_each_other():
    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"arm": [f"arm {i:05d}" for i in range(14)], "x": rng.random(14), "y": rng.random(14)})
    fig = scatter_pareto(frame, "x", "y")
    fig.draw_without_rendering()
    boxes = [Text.get_window_extent(t) for t in fig.axes[0].texts]
    assert len(boxes) == 14
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_lines_sort_by_x_and_keep_groups():
    frame = pd.DataFrame({"step": [2, 1, 0, 0, 1], "loss": [0.1, 0.2, 0.3, 1.0, 2.0], "arm": list("aaabb")})
    fig = lines(frame, "step", "loss", "arm", log_y=True)
    assert drawn(fig.axes[0], "a").get_ydata().tolist() == [0.3, 0.2, 0.1]
    assert drawn(fig.axes[0], "b").get_xdata().tolist() == [0, 1]
    assert fig.axes[0].get_yscale() == "log"
    with pytest.raises(SettingsError, match="holds no numbers"):
        lines(frame, "arm", "loss")


def words(fig: Figure) -> list[str]:
    """Everything a reader can read."""
    fig.draw_without_rendering()
    return [t.get_text() for t in fig.findobj(Text) if t.get_text()]


def test_figures_speak_in_words_without_paths():
    frame = table(["prompt_entropy", "change_intensity_relative"]).assign(stage="sft-base")
    fig = depth_lines(frame, title="Scores of /home/someone/models/tuned-3")
    assert "Scores of tuned-3" in words(fig)
    assert not any("_" in w or "/home" in w for w in words(fig))
    assert {"base", "sft", "sft − base"} <= set(words(fig))
    assert "Prompt entropy, change\n(share of the maximum)" in words(fig)
    other = heatmap([[1.0]], ["/a/b/run-1"], ["owner/model"])
    assert {"run-1", "owner/model"} <= set(words(other))


def test_n_says_what_it_counts():
    frame = table(["gini"])
    assert {"n = 50 samples", "n = 48 samples"} <= set(words(depth_lines(frame)))
    frame["n"] = 50
    assert words(depth_lines(frame)).count("n = 50 samples") == 1, "one note where all panels have one n"
    gradients = frame[frame.side == "base"].assign(metric="gradient_norm", kind="block")
    assert "n = 50 batches" in words(depth_lines(gradients))
    weights = frame[frame.side == "difference"].assign(metric="weight_change", kind="block")
    assert not any("n =" in w for w in words(depth_lines(weights)))


def test_tuned_blocks_are_shaded_where_they_are():
    frame = table(["gini"])
    hidden = depth_lines(frame, shade=[2, 3]).axes[0]
    assert [(p.get_x(), p.get_x() + p.get_width()) for p in hidden.patches] == [(2.5, 3.5), (3.5, 4.5)]
    block = depth_lines(frame.assign(kind="block"), shade=[2])
    assert block.axes[0].patches[0].get_x() == 1.5
    assert "tuned blocks" in words(block)


def test_matrices_have_one_order_everywhere():
    rows = ["down", "k", "norm", "q"]
    fig = heatmap(np.arange(8).reshape(4, 2), rows, ["0", "1"])
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["q", "k", "down", "norm"]
    assert cells(fig.axes[0].images[0])[:, 0].tolist() == [6, 2, 0, 4]
    frame = pd.concat([table(["weight_change"]).query("side == 'difference'").assign(matrix=m) for m in rows])
    labels = [line.get_label() for line in depth_lines(frame, hue="matrix").axes[0].lines if line.get_label() in rows]
    assert labels == [m for m in MATRICES if m in rows]


def test_heatmap_marks_and_footnote():
    fig = heatmap([[0.5, 0.2], [0.2, 0.5]], list("ab"), list("ab"), marks=[["", "*"], ["*", ""]], footnote="n = 30")
    assert [t.get_text() for t in fig.axes[0].texts] == ["0.50", "0.20*", "0.20*", "0.50"]
    assert "n = 30" in words(fig)


def test_a_long_name_of_the_colours_stays_within_the_figure():
    fig = heatmap(np.random.default_rng(0).random((7, 30)), list("qkvogud"), range(30), title="t",
                  label="|<gradient, update>| at the tuned weights, nats a token of the data")
    fig.draw_without_rendering()
    name = fig.axes[-1].yaxis.label.get_window_extent()
    assert fig.bbox.y0 <= name.y0 < name.y1 <= fig.bbox.y1
    assert name.x1 <= fig.bbox.x1 + 1


@pytest.mark.parametrize("fig", [
    lambda: depth_lines(table([f"metric_{i}" for i in range(14)])),
    lambda: heatmap(np.random.default_rng(0).random((90, 90)), range(90), range(90)),
    lambda: segment_bars(pd.DataFrame({"arm": [f"random blocks draw {i}" for i in range(60)],
                                       "value": np.linspace(-1, 1, 60)}), label="arm")])
def test_no_figure_is_higher_than_a_screen(fig):
    made = fig()
    assert made.get_figheight() * 150 <= 1400
    assert made.get_figheight() <= MAX_HEIGHT
    if made.axes[0].get_yticklabels()[0].get_text().startswith("random"):
        assert_apart(made, made.axes[0].get_yticklabels(), axis=1)


def test_panels_do_not_overlap_and_hold_their_labels():
    fig = depth_lines(table(["prompt_entropy", "gini", "curvature"]), title="t")
    fig.draw_without_rendering()
    boxes = [ax.get_tightbbox() for ax in fig.axes]
    assert len(boxes) == 6
    assert not any(a.shrunk(0.98, 0.98).overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(b.x0 >= 0 and b.x1 <= fig.bbox.x1 + 1 for b in boxes)
    legend = fig.legends[0].get_window_extent()
    assert not any(legend.overlaps(b) for b in boxes)


def test_words_of_a_file_can_be_edited(tmp_path):
    svg, _ = save_figure(depth_lines(table(["gini"]), title="Some title"), tmp_path, "x")
    assert ">Some title</text>" in svg.read_text(encoding="utf-8")


def test_files_are_deterministic_and_complete(tmp_path):
    first = save_figure(depth_lines(table(), title="t"), tmp_path / "a" / "deep", "entropy")
    mpl.rcParams["lines.linewidth"] = 9  # the user's own settings change nothing and stay
    try:
        second = save_figure(depth_lines(table(), title="t"), tmp_path / "b", "entropy")
        assert mpl.rcParams["lines.linewidth"] == 9
    finally:
        mpl.rcdefaults()
    assert [p.name for p in first] == ["entropy.svg", "entropy.pdf"]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert b"dc:date" not in first[0].read_bytes()
    assert sorted(p.name for p in first[0].parent.iterdir()) == ["entropy.pdf", "entropy.svg"]


def test_save_figure_faults(tmp_path):
    fig = heatmap([[1.0]], ["a"], ["b"])
    with pytest.raises(SettingsError, match="plain file name"):
        save_figure(fig, tmp_path, "../x")
    with pytest.raises(SettingsError, match="not as gif"):
        save_figure(fig, tmp_path, "x", ("gif",))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save_figure(fig, tmp_path / "file", "x")


def test_no_pyplot_is_imported():
    code = "import sys, midblock.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
