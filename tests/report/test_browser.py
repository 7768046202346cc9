"""The page in a real headless Chromium: no request, no console message, every control works."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from midblock.provenance import RunFolder
from midblock.report.page import build_report
from report.test_report import BLOCKS, EVIL, MODELS, a_run, profile_table, swap_table

pytest.importorskip("plotly")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian's package: chromium)")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs, two data sets, a swap, and names that would be markup."""
    folder = tmp_path_factory.mktemp("report")
    a_run(folder / "a", "profile", profile_table(), summary="Late.")
    a_run(folder / "b", "profile", profile_table("early"), data="mmlu")
    evil = {"base": {**MODELS["base"], "spec": EVIL[2]}, "sft": {**MODELS["sft"], "spec": EVIL[1]}}
    a_run(folder / "c", "profile", profile_table("middle"), models=evil, data=EVIL[3])
    swap = swap_table()
    for row in swap.rows:
        row["donor"] = EVIL[0]
    a_run(folder / "d", "swap", swap)
    build_report([folder], folder / "report.html")
    return folder


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.set_default_timeout(60_000)  # a busy machine is slow, not wrong
    opened.heard = []
    opened.on("console", lambda m: opened.heard.append((m.type, m.text)))
    opened.on("pageerror", lambda e: opened.heard.append(("error", str(e))))
    opened.on("dialog", lambda d: opened.heard.append(("dialog", d.message)))
    opened.asked = []
    opened.on("request", lambda r: opened.asked.append(r.url))
    opened.goto((folder / "report.html").as_uri())
    opened.wait_for_selector("#key .main-svg")
    yield opened
    assert opened.heard == []
    assert [u for u in opened.asked if not u.startswith(("file:", "blob:", "data:"))] == []
    assert len([u for u in opened.asked if u.startswith("file:")]) == 1
    opened.close()


def figure(page: Any, title: str) -> Any:
    return page.locator("#sections figure", has=page.locator("figcaption", has_text=title)).first


def traces(page: Any, title: str) -> Any:
    node = figure(page, title)
    node.scroll_into_view_if_needed()
    node.locator(".main-svg").first.wait_for()
    return node.locator(".plot-area").evaluate("p => p.data.filter(t => t.name).map(t => [t.name, t.x.length, t.y])")


def test_markup_in_names_stays_text(page: Any) -> None:
    text = page.locator("body").inner_text()
    assert EVIL[2] in text
    assert page.locator("img").count() == 0
    traces(page, "Change when a segment is swapped")  # plotly's own labels too: the fixture hears no dialog
    assert page.evaluate("document.querySelectorAll('script').length") == 3


def test_controls_choose_what_is_drawn(page: Any) -> None:
    assert len(traces(page, "Effective rank")) == 6  # three runs, two sides
    page.select_option("#choose-data", "gsm8k")
    assert [t[0] for t in traces(page, "Effective rank")] == ["base", "sft"]
    page.select_option("#choose-view", "difference")
    assert [t[0] for t in traces(page, "Effective rank")] == ["difference"]
    assert traces(page, "Cosine")[0][1] == BLOCKS + 1  # a pair's own score has no difference
    page.select_option("#choose-x", "layer")
    node = figure(page, "Effective rank").locator(".plot-area")
    assert node.evaluate("p => Math.max(...p.data.at(-1).x)") == BLOCKS


def test_what_is_drawn_is_the_table(page: Any, folder: Path) -> None:
    page.select_option("#choose-data", "gsm8k")
    frame = pd.read_csv(folder / "a" / "table.csv")
    own = frame[(frame["metric"] == "effective_rank") & (frame["side"] == "sft")].sort_values("layer")
    drawn = next(t for t in traces(page, "Effective rank") if t[0] == "sft")
    assert drawn[2] == pytest.approx(own["value"].tolist(), rel=1e-5)


def test_one_cursor_over_all_depth_figures_by_keyboard(page: Any) -> None:
    node = figure(page, "Effective rank")
    traces(page, "Effective rank")
    node.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    read = page.locator("#readout").inner_text()
    assert f"hidden {BLOCKS - 1}" in read
    assert page.locator("#key .cursor").first.evaluate("c => c.style.display") == "block"


@pytest.mark.parametrize("across", ["depth", "layer"])
def test_the_pointer_moves_the_cursor_of_every_depth_figure(page: Any, across: str) -> None:
    page.select_option("#choose-x", across)
    traces(page, "Effective rank")
    box = figure(page, "Effective rank").locator(".plot-area .bglayer").first.bounding_box()
    plot = figure(page, "Effective rank").locator(".plot-area")
    left, length, low, high = plot.evaluate("""p => { const x = p._fullLayout.xaxis;
        return [p.getBoundingClientRect().left + x._offset, x._length, ...x.range]; }""")
    for layer in (0, 3, BLOCKS):
        value = layer if across == "layer" else layer / BLOCKS
        page.mouse.move(left + length * (value - low) / (high - low), (box or {"y": 300, "height": 50})["y"] + 20)
        assert f"(hidden {layer})" in page.locator("#readout").inner_text()
    assert page.locator("#key .cursor").first.evaluate("c => c.style.display") == "block"


def test_tables_sort(page: Any) -> None:
    node = figure(page, "Effective rank")
    node.locator("summary", has_text="Data table").click()
    head = node.locator("th", has_text="value")
    head.wait_for()  # the table is made when it is opened
    column = "ths => [...ths].findIndex(h => h.textContent === 'value')"
    at = node.locator("th").evaluate_all(column)
    values = "(rows, at) => rows.map(r => Number(r.children[at].textContent.replace(/,/g, '')))"
    head.locator("button").click()
    up = node.locator("tbody tr").evaluate_all(values, at)
    assert up == sorted(up)
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    assert node.locator("tbody tr").evaluate_all(values, at) == sorted(up, reverse=True)


@pytest.mark.parametrize("kind", ["SVG", "PNG", "CSV"])
def test_downloads(page: Any, kind: str, tmp_path: Path) -> None:
    node = figure(page, "Effective rank")
    traces(page, "Effective rank")
    with page.expect_download() as download:
        node.locator(".tools button", has_text=kind).click()
    saved = tmp_path / "x"
    download.value.save_as(saved)
    assert download.value.suggested_filename == f"effective-rank.{kind.lower()}"
    begin = saved.read_bytes()[:40]
    assert {"SVG": b"<svg", "PNG": b"\x89PNG", "CSV": b"pair,data"}[kind] in begin


def test_dark_phone_and_names_for_screen_readers(page: Any) -> None:
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for node in page.locator("figure").all():
        for attribute in ("aria-labelledby", "aria-describedby"):
            assert page.locator(f"[id='{node.get_attribute(attribute)}']").inner_text() is not None
    assert page.locator("select:not([id])").count() == 0


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_no_serious_fault(page: Any, dark: bool) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    if dark:
        page.click("#theme")
    traces(page, "Effective rank")
    figure(page, "Effective rank").locator("summary", has_text="Data table").click()
    found = axe.Axe().run(page)
    serious = [f"{v['id']}: {v['help']} ({[n['html'][:120] for n in v['nodes'][:3]]})"
               for v in found.response["violations"]
               if v["impact"] in ("serious", "critical")]
    assert serious == []


def test_several_pairs_begin_with_one_and_hide_the_figures_of_the_others(browser: Any, tmp_path: Path) -> None:
    layers = pd.DataFrame([{"stage": "sft-base", "layer": a, "other": b, "cka_debiased": 0.5, "n": 9}
                           for a in range(4) for b in range(4)])
    for name in "abc":
        models = {**MODELS, "sft": {**MODELS["sft"], "spec": f"models/{name}"}}
        for data in ("gsm8k", "mmlu", "dolly"):
            with RunFolder(tmp_path / name / data, command="profile", settings={}) as run:
                run.record_inputs(models=models, data={"name": data})
                run.write_table(profile_table())
                run.write_table(layers, "layers.csv")
    build_report([tmp_path], tmp_path / "r.html")
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto((tmp_path / "r.html").as_uri())
    page.wait_for_selector("#key .main-svg")
    squares = page.locator("#sections figure.wide")
    assert squares.count() == 9
    assert page.locator("#choose-pair").input_value() == "models/base → models/a"
    assert page.locator("#sections figure.wide:visible").count() == 3
    assert len(traces(page, "Effective rank")) == 6  # three data sets, two sides
    page.select_option("#choose-pair", "")
    assert page.locator("#sections figure.wide:visible").count() == 9
    page.select_option("#choose-data", "mmlu")
    assert page.locator("#sections figure.wide:visible").count() == 3
    page.select_option("#choose-pair", "models/base → models/b")
    only, = page.locator("#sections figure.wide:visible figcaption").all_inner_texts()
    assert "models/base → models/b" in only
    assert "mmlu" in only
    page.close()


def test_a_table_that_stands_open_is_made_when_it_comes_near(browser: Any, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "lens", command="lens", settings={}) as run:
        run.record_inputs(models=MODELS, data={"name": "gsm8k"})
        run.write_table(profile_table())
        run.write_table(pd.DataFrame({"token": [f"t{i}" for i in range(50)], "share": 0.5}), "kl_tokens.csv")
    build_report([tmp_path], tmp_path / "r.html")
    page = browser.new_page(viewport={"width": 600, "height": 500})
    page.set_default_timeout(60_000)
    page.goto((tmp_path / "r.html").as_uri())
    page.wait_for_selector("#key .main-svg")
    node = figure(page, "Tokens of the data")
    assert node.locator("tr").count() == 0
    node.scroll_into_view_if_needed()
    node.locator("td").first.wait_for()
    assert node.locator("tbody tr").count() == 50
    page.close()
