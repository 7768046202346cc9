"""The paper's figures and tables: what is drawn equals the tables of one study, and what is absent is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from midblock.cli.app import run
from midblock.errors import OutputError, SettingsError
from midblock.figures import MAX_HEIGHT
from midblock.figures.matrices import PIXELS
from midblock.figures.paper import WIDTHS, correlation_sheet, depth_sheet, pattern_sheet, swap_sheet
from midblock.report.paper import paper_figures
from midblock.results import Estimate, Table
from report.test_report import BLOCKS, a_run

CHAIN = {s: {"spec": f"models/{s}-1B", "fingerprint": s, "blocks": BLOCKS} for s in ("base", "sft", "dpo")}
MASKS = ("10000", "01000", "00100", "00010", "00001")
NASTY = "a$x^$_{b}|<i>&%"


def estimate(value: float, width: float = 0.01, n: int = 40) -> Estimate:
    return Estimate(value, value - width, value + width, n)


def a_study(folder: Path, models: dict[str, dict[str, object]] = CHAIN, data: tuple[str, ...] = ("gsm8k", "mmlu"),
            ) -> Path:
    """Two tuned stages on two data sets, as `midblock study` writes it, and a sweep; values depend on everything."""
    stages = list(models)
    comparisons = [(later, stages[0]) for later in stages[1:]]
    weights = Table()
    for later, earlier in comparisons:
        for b in range(BLOCKS):
            weights.add("block", b, "weight_change", "difference", b + len(later), n=9, stage=f"{later}-{earlier}",
                        matrix="qkvo", tensor=None)
    a_run(folder / "weights", "weights", weights, models=models, data="")
    for number, name in enumerate(data):
        profile, lens, swap, gradients = Table(), Table(), Table(), Table()
        for h in range(BLOCKS + 1):
            for place, stage in enumerate(stages):
                for metric, value in (("effective_rank", 5 + h + place), ("condition_number", 10.0 ** (h % 4 + 1)),
                                      ("spectral_norm", h * h + 1.0 + place), ("dataset_entropy", 0.5 + 0.01 * h)):
                    profile.add("hidden", h, metric, stage, estimate(value + number), stage=None)
                lens.add("hidden", h, "accuracy", stage, estimate(0.02 * h + 0.01 * place + 0.1 * number), stage=None)
            for later, earlier in comparisons:
                for metric, value in (("cka", 1 - 0.02 * h), ("cosine", 1 - 0.01 * h * len(later)),
                                      ("mean_shift", 0.3 * h)):
                    profile.add("hidden", h, metric, "pair", estimate(value + 0.001 * number),
                                stage=f"{later}-{earlier}")
        for b in range(BLOCKS):
            for stage in stages:
                gradients.add("block", b, "gradient_norm", stage, estimate(1.0 + b + number), matrix="all")
        for later, earlier in comparisons:
            for donor, recipient in ((later, earlier), (earlier, later)):
                for head in (donor, recipient):
                    for i, mask in enumerate(("00000", *MASKS)):
                        swap.add("segment", mask, "accuracy", recipient, estimate(0.4 + 0.01 * i + 0.05 * number),
                                 donor=donor, recipient=recipient, head=head, stage=f"{donor}-{recipient}")
        for command, table in (("profile", profile), ("lens", lens), ("swap", swap), ("gradients", gradients)):
            a_run(folder / str(number) / command, command, table, models=models, data=name)
    a_sweep(folder / "sweeps" / "one", {"base": next(iter(models.values()))})
    return folder


def a_sweep(folder: Path, models: dict[str, dict[str, object]], arms: tuple[str, ...] = (
        "11111", *MASKS, "100", "010", "001")) -> Path:
    table = Table()
    for role, task, metric in (("evaluation", "gsm8k", "accuracy"), ("retention", "pydocs", "perplexity")):
        for i, arm in enumerate(("base", *arms)):
            mask = "00000" if arm == "base" else arm
            table.add("segment", mask, metric, "base" if arm == "base" else "sft",
                      estimate(0.2 + 0.03 * i + (14 if role == "retention" else 0)), arm=arm, mask=mask, role=role,
                      task=task, seed=None, method="none" if arm == "base" else "lora", params=1000)
    return a_run(folder, "sweep", table, models=models)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("figures")
    a_study(home / "study")
    found = paper_figures([home / "study"], out=home / "out")
    assert set(found.absent) == {"table-2"}
    assert set(found.files) == {*(f"figure-{n}" for n in range(1, 8)), "table-1", "table-3", "table-4"}
    return home


def test_figures_1_to_7_are_pdf_and_svg_in_both_sizes(made: Path) -> None:
    for number in range(1, 8):
        for width, inches in (("one-column", WIDTHS["one"]), ("two-columns", WIDTHS["two"])):
            pdf = (made / "out" / f"figure-{number}-{width}.pdf").read_bytes()
            box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", pdf)
            assert box is not None
            assert float(box.group(1)) == pytest.approx(72 * inches, abs=0.5)
            assert float(box.group(2)) <= 72 * MAX_HEIGHT + 0.5
            svg = (made / "out" / f"figure-{number}-{width}.svg").read_text()
            assert "<text" not in svg  # glyphs are outlines: no font is needed to read it
            # every font of the PDF is in it, as TrueType; Type 3 is refused by many a publisher
            assert b"/Type3" not in pdf
            assert pdf.count(b"/FontFile2") >= 1


def test_equal_runs_give_equal_files(made: Path, tmp_path: Path) -> None:
    paper_figures([made / "study"], out=tmp_path)
    for path in sorted((made / "out").iterdir()):
        if path.name != "captions.md":
            assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_every_model_and_data_set_is_in_a_figures_numbers(made: Path) -> None:
    for number in (1, 2, 3, 6):
        frame = pd.read_csv(made / "out" / f"figure-{number}.csv")
        assert set(frame["model"]) == {"models/sft-1B", "models/dpo-1B"}
        assert set(frame["data"]) == {"gsm8k", "mmlu"}
    lens = pd.read_csv(made / "out" / "figure-3.csv")
    assert set(lens["side"]) == {"base", "tuned"}
    row = lens[(lens["model"] == "models/dpo-1B") & (lens["data"] == "mmlu") & (lens["side"] == "tuned")
               & (lens["layer"] == BLOCKS)]
    assert row["value"].tolist() == pytest.approx([0.02 * BLOCKS + 0.02 + 0.1])


def test_the_correlations_are_numpys(made: Path) -> None:
    found = pd.read_csv(made / "out" / "figure-5.csv").set_index(["model", "a", "b"])["pearson"]
    b = np.arange(BLOCKS)
    # block b stands beside hidden b + 1
    assert found["models/sft-1B", "weight_change", "mean_shift"] == pytest.approx(np.corrcoef(b, 0.3 * (b + 1))[0, 1])
    assert found["models/dpo-1B", "weight_change", "cka"] == pytest.approx(-1)
    assert found["models/dpo-1B", "cosine", "cosine"] == 1


def test_tables_are_latex_markdown_and_csv_with_the_sweeps_values(made: Path) -> None:
    table = pd.read_csv(made / "out" / "table-1.csv")
    assert table["segment"].tolist() == [1, 2, 3]
    assert table["value"].tolist() == pytest.approx([0.2 + 0.03 * i for i in (7, 8, 9)])
    text = (made / "out" / "table-1.tex").read_text()
    assert text.startswith("\\begin{tabular}")
    assert "0.4100 [0.4000, 0.4200]" in text
    assert "| models/base-1B | gsm8k | 1 |" in (made / "out" / "table-1.md").read_text()
    kept = pd.read_csv(made / "out" / "table-4.csv")
    assert kept["strategy"].tolist() == ["untuned", "11111", *MASKS, "100", "010", "001"]
    assert "allenai/OLMo-2-0425-1B" in (made / "out" / "table-3.md").read_text()


def test_captions_say_what_is_absent(made: Path, tmp_path: Path) -> None:
    assert "**Table 2** is not here: it needs a sweep with single tenths" in (made / "out" / "captions.md").read_text()
    weights = paper_figures([made / "study" / "weights"], out=tmp_path / "w")
    assert set(weights.files) == {"figure-4", "table-3"}
    assert weights.absent["figure-6"] == "it needs a swap, which is not among these runs"


def test_five_models_and_seven_data_sets_share_a_page() -> None:
    models, data = [f"model-{i}" for i in range(5)], [f"d{i}" for i in range(7)]
    rows = [{"model": m, "data": d, "side": "pair", "metric": metric, "depth": x, "value": x * i, "low": 0.0,
             "high": 1.0}
            for i, m in enumerate(models) for d in data for metric in ("cka", "cosine", "mean_shift")
            for x in (0.0, 0.5, 1.0)]
    pages = depth_sheet(pd.DataFrame(rows), ["cka", "cosine", "mean_shift"], "two")
    assert len(pages) == 1
    panels = [ax for ax in pages[0].axes if ax.get_visible()]
    assert len(panels) == 15
    assert [ax.get_title(loc="left") for ax in panels[:5]] == models
    assert len(pages[0].legends[0].get_texts()) == 7
    for page in [*pages, *depth_sheet(pd.DataFrame(rows), ["cka", "cosine", "mean_shift"], "one")]:
        assert page.get_figheight() <= MAX_HEIGHT
    swaps = [{"model": m, "data": d, "mask": mask, "donor": "tuned", "recipient": "base", "head": "base", "value": 0.5,
              "low": 0.4, "high": 0.6} for m in models for d in data for mask in ("00000", *MASKS)]
    assert len(swap_sheet(pd.DataFrame(swaps), "two")) == 1
    one = swap_sheet(pd.DataFrame(swaps), "one")
    assert len(one) > 1
    assert sum(ax.get_visible() for page in one for ax in page.axes) == 35


def test_the_reference_lines_are_the_models_as_they_are() -> None:
    rows = [{"model": "m", "data": "d", "mask": mask, "donor": donor, "recipient": recipient, "head": recipient,
             "value": value, "low": value, "high": value}
            for donor, recipient, level in (("tuned", "base", 0.3), ("base", "tuned", 0.6))
            for mask, value in (("00", level), ("10", level + 0.1), ("01", level - 0.1))]
    ax = swap_sheet(pd.DataFrame(rows), "one")[0].axes[0]
    lines = {line.get_label(): set(np.round(line.get_ydata(), 6)) for line in ax.lines}
    assert lines["base as it is"] == {0.3}
    assert lines["tuned as it is"] == {0.6}
    assert lines["tuned in base, base head"] == {0.4, 0.2}


@pytest.mark.parametrize("apart", [0.0, 0.02])
def test_heads_that_say_the_same_are_drawn_once(apart: float) -> None:
    rows = [{"model": "m", "data": "d", "mask": mask, "donor": donor, "recipient": recipient, "head": head,
             "value": value + apart * (head == "base"), "low": 0.0, "high": 1.0}
            for donor, recipient in (("tuned", "base"), ("base", "tuned")) for head in ("base", "tuned")
            for mask, value in (("00", 0.3), ("10", 0.4), ("01", 0.2))]
    ax = swap_sheet(pd.DataFrame(rows), "one")[0].axes[0]
    heads = ["tuned in base, base head", "tuned in base, tuned head", "base in tuned, base head",
             "base in tuned, tuned head"]
    assert {line.get_label() for line in ax.lines} == {"base as it is", "tuned as it is", *(
        heads if apart else ["tuned in base", "base in tuned"])}


def test_models_of_one_base_share_every_axis_and_others_those_without_a_models_units() -> None:
    rows = [{"model": m, "data": "d", "side": "pair", "metric": metric, "depth": x, "value": x * scale}
            for m, scale in (("a", 1.0), ("b", 9.0)) for metric in ("cka", "mean_shift") for x in (0.0, 1.0)]
    for one_base in (True, False):
        axes = depth_sheet(pd.DataFrame(rows), ["cka", "mean_shift"], "two", one_base=one_base)[0].axes
        assert axes[0].get_ylim() == axes[1].get_ylim()
        assert (axes[2].get_ylim() == axes[3].get_ylim()) == one_base


def test_a_logarithmic_axis_of_less_than_a_decade_has_several_labels() -> None:
    rows = [{"model": "a", "data": "d", "side": "base", "metric": "condition_number", "depth": x, "value": 30 + 300 * x,
             "low": np.nan, "high": np.nan} for x in (0.0, 0.5, 1.0)]
    figure = depth_sheet(pd.DataFrame(rows), ["condition_number"], "one")[0]
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_ylim()
    assert [t.get_text() for t in figure.axes[0].get_yticklabels() if low <= t.get_position()[1] <= high] == [
        "50", "100", "200"]


def test_two_sweeps_of_one_model_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for name in ("thirds", "tenths"):
        a_sweep(tmp_path / name, {"base": CHAIN["base"]}, ("111", "100", "010", "001"))
    paper_figures([tmp_path], out=tmp_path / "out", columns="one")
    assert set(pd.read_csv(tmp_path / "out" / "table-1.csv")["model"]) == {
        "models/base-1B (thirds)", "models/base-1B (tenths)"}


def test_a_failed_arm_is_named_and_the_baseline_is_a_line() -> None:
    rows = [{"model": "m, t", "metric": "accuracy", "arm": arm, "side": side, "value": value, "low": value,
             "high": value}
            for arm, side, value in (("base", "base", 0.1), ("111", "sft", 0.5), ("100", "sft", float("nan")))]
    ax = pattern_sheet(pd.DataFrame(rows), "one", {"m, t": "111"})[0].axes[0]
    assert [t.get_text() for t in ax.texts] == ["failed"]
    assert {line.get_label(): line.get_ydata()[0] for line in ax.lines} == {"baseline (grey)": 0.5, "untuned": 0.1}


def test_undefined_correlations_are_left_grey() -> None:
    square = pd.DataFrame([[1.0, np.nan], [np.nan, 1.0]], index=["cka", "cosine"], columns=["cka", "cosine"])
    figure = correlation_sheet({"m": square}, "two")[0]
    assert figure.axes[0].images[0].get_array().mask.sum() == 2 * PIXELS**2


def test_names_that_would_be_formulas_or_markup_are_text(tmp_path: Path) -> None:
    models = {s: {"spec": f"models/{s}{NASTY}", "fingerprint": s, "blocks": BLOCKS} for s in ("base", "sft")}
    a_study(tmp_path / "s", models, data=(NASTY, "$"))
    made = paper_figures([tmp_path / "s"], out=tmp_path / "out", columns="two")
    assert len(made.files) == 10
    assert "a\\$x" in (tmp_path / "out" / "table-4.tex").read_text()
    assert "\\|\\<i\\>" in (tmp_path / "out" / "table-4.md").read_text()


def test_a_users_style_lies_on_top(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    style = tmp_path / "mine.mplstyle"
    style.write_text("axes.prop_cycle: cycler('color', ['123456'])\nsvg.fonttype: none\n")
    paper_figures([made / "study"], out=tmp_path / "a", columns="one", style=style)
    drawn = (tmp_path / "a" / "figure-1-one-column.svg").read_text()
    assert "#123456" in drawn
    assert "<text" in drawn
    monkeypatch.setenv("MIDBLOCK_STYLE", str(style))
    paper_figures([made / "study"], out=tmp_path / "b", columns="one")
    assert (tmp_path / "b" / "figure-1-one-column.svg").read_text() == drawn


@pytest.mark.parametrize("text", ["no.such.key: 3", "font.size: large-ish", "nonsense"])
def test_a_style_that_matplotlib_does_not_know_is_one_error(made: Path, tmp_path: Path, text: str,
                                                            monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    style = tmp_path / "bad.mplstyle"
    style.write_text(text)
    with pytest.raises(SettingsError, match="is not a style of matplotlib"):
        paper_figures([made / "study"], out=tmp_path / "o", style=style)
    assert not (tmp_path / "o").exists()
    monkeypatch.setenv("MIDBLOCK_STYLE", str(style))
    assert run(["pairs"]) == 2
    assert "is not a style of matplotlib" in capsys.readouterr().err


def test_a_users_own_table_of_the_same_name_stays(made: Path, tmp_path: Path) -> None:
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "table-1.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"table-1\.tex is there, and is not as midblock wrote it"):
        paper_figures([made / "study"], out=tmp_path / "paper", columns="one")
    assert {p.name for p in (tmp_path / "paper").iterdir()} == {"table-1.tex"}
    (tmp_path / "paper" / "table-1.tex").rename(tmp_path / "mine.tex")
    first = paper_figures([made / "study"], out=tmp_path / "paper", columns="one").files
    assert paper_figures([made / "study"], out=tmp_path / "paper", columns="one").files == first
    assert all(p.is_file() for files in first.values() for p in files)


def test_the_command(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["figures", str(made / "study"), "--out", str(tmp_path / "o"), "--columns", "two", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["absent"]) == {"table-2"}
    assert not list((tmp_path / "o").glob("*one-column*"))
    (made / "study" / "sweeps" / "one" / "table.csv").write_text("edited")
    assert run(["figures", str(made / "study"), "--out", str(tmp_path / "p"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["left_out"]
    assert "figure-7" in told["absent"]
    with pytest.raises(OutputError, match="no finished run"):
        paper_figures([tmp_path / "o"], out=tmp_path / "q")
