"""One HTML file from runs: no request leaves it, and nothing from outside becomes markup."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from midblock import __version__
from midblock.errors import OutputError
from midblock.reading import open_file, printable, user_path
from midblock.report.charts import SECTIONS, Chart, charts_of
from midblock.report.collect import LeftOut, Run, collect
from midblock.report.findings import findings_of
from midblock.results import json_ready
from midblock.writing import atomic_path, output_errors

__all__ = ["build_report", "render"]

_GENERATOR, _BEGINNING = b'<meta name="generator" content="midblock ', 4096
_LIMIT = 8_000_000
"""Bytes of a page, the bundle among them, from which on what is only detail is shortened."""
_SHORTER = (1000, 300, 100, 30)
"""Rows of a table and cells of a square of layers that are tried then, one after another; numbers have four digits
then, as the page shows them anyway."""


def build_report(folders: Sequence[Path | str], out: Path, *, title: str | None = None) -> dict[str, Any]:
    """Write the report of every finished run in the folders.

    Args:
        folders: Run folders, or folders that hold some (three levels down).
        out: The HTML file; an earlier page of midblock's is replaced.
        title: Heading; by default the models' names.

    Returns:
        ``path``, ``bytes``, the ``runs`` shown, what was ``left_out`` and why, and the ``findings``.

    Raises:
        OutputError: no finished run, the file is there and no page of midblock's, or it cannot be written.
        ModuleNotFoundError: plotly or jinja2 is absent (the extra ``report``).
    """
    out = user_path(out, error=OutputError)
    _require_own(out)
    runs, left_out = collect(folders)
    page, findings = render(runs, left_out, title=title)
    with atomic_path(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return {"path": str(out), "bytes": len(page.encode()), "findings": findings,
            "runs": [{"command": r.command, "folder": str(r.folder)} for r in runs],
            "left_out": [{"folder": o.folder, "reason": o.reason} for o in left_out]}


def _require_own(out: Path) -> None:
    """Refuse to replace a file that is no page of midblock's."""
    with output_errors(out):
        if not out.exists():
            return
    with open_file(out, error=OutputError) as stream:
        begins = stream.read(_BEGINNING)
    if _GENERATOR not in begins:
        raise OutputError(f"{out} is there and is no page that midblock wrote; name another file.")


def render(runs: Sequence[Run], left_out: Sequence[LeftOut] = (), *, title: str | None = None,
           refresh: int | None = None) -> tuple[str, dict[str, Any]]:
    """The page as text, and its findings.

    Args:
        runs: What it shows.
        left_out: What it names as left out.
        title: Heading; by default the models' names.
        refresh: Seconds after which an open page reads itself again, while a run goes on.

    Raises:
        ModuleNotFoundError: plotly or jinja2 is absent (the extra ``report``).
    """
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    charts = charts_of(runs)
    found = findings_of(runs, charts)
    findings = json_ready(found)
    assets = files("midblock.report") / "assets"
    style = (assets / "report.css").read_text(encoding="utf-8")
    # the bundle ends scripts of its own only inside strings, where this spelling means the same
    scripts = [get_plotlyjs().replace("</script", "<\\/script"), (assets / "report.js").read_text(encoding="utf-8")]
    heading = printable(title or _heading(runs))
    payload = _fitting(charts, {"findings": findings, "sections": SECTIONS, "title": heading},
                       _LIMIT - sum(len(s.encode()) for s in (*scripts, style)) - 30_000)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    page = environment.from_string((assets / "report.html.j2").read_text(encoding="utf-8")).render(
        title=heading, style=Markup(style), refresh=refresh,
        scripts=[Markup(s) for s in scripts],
        hashes=[_csp_hash(s) for s in scripts], payload=payload,
        findings=found, runs=[_listed(r) for r in runs],
        left_out=[LeftOut(printable(o.folder), printable(o.reason)) for o in left_out],
        version=__version__, made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    return page, findings


def _heading(runs: Sequence[Run]) -> str:
    """The pairs, else the models, of the runs."""
    names = list(dict.fromkeys(r.pair for r in runs if r.models))
    pairs = [name for name in names if " → " in name] or names
    return f"{len(pairs)} pairs: {'; '.join(pairs)}" if len(pairs) > 2 else "; ".join(pairs) or "midblock report"


def _fitting(charts: Sequence[Chart], rest: dict[str, Any], room: int) -> str:
    """Everything that the script shows, compressed, as text that can stand in a page; with less detail where it is
    longer than ``room``."""
    for cells in (None, *_SHORTER):
        shown = [c if cells is None else _shortened(c, cells) for c in charts]
        packed = [_packed(c, None if cells is None else 4) for c in shown]
        made = json.dumps(json_ready({"charts": packed, **rest}), allow_nan=False, ensure_ascii=False,
                          separators=(",", ":"))
        text = base64.b64encode(gzip.compress(made.encode(), 9, mtime=0)).decode()
        if len(text) <= room:
            break
    return text


def _shortened(chart: Chart, cells: int) -> Chart:
    """A table with its first rows only, a square of layers with every second one (third, ...); others as they are."""
    rows, note = chart["rows"], f"the page stays under {_LIMIT // 1_000_000} MB; all are in the run's folder."
    if len(rows) <= cells:
        return chart
    if chart["kind"] == "table":
        return {**chart, "rows": rows[:cells], "about": f"{chart['about']} First {cells} of {len(rows)} rows: {note}"}
    if chart["kind"] == "heatmap" and all(isinstance(v, int) for v in rows[0][:2]):
        step = math.ceil(math.sqrt(len(rows) / cells))
        last = max(max(row[:2]) for row in rows)
        kept = [r for r in rows if all((v - last) % step == 0 for v in r[:2])]
        return {**chart, "rows": kept, "about": f"{chart['about']} Every {step}. row and column: {note}"}
    return chart


def _packed(chart: Chart, digits: int | None = None) -> Chart:
    """The chart with its rows by columns, each text once: names repeat in every row, and a page must stay small."""
    columns: list[dict[str, Any]] = []
    for place in range(len(chart["columns"])):
        values = [row[place] for row in chart["rows"]]
        if any(isinstance(v, str) for v in values):
            known: dict[Any, int] = {}
            columns.append({"at": [known.setdefault(v, len(known)) for v in values], "of": list(known)})
        else:
            columns.append({"values": values if digits is None else [
                float(f"{v:.{digits}g}") if isinstance(v, float) else v for v in values]})
    return {**{k: v for k, v in chart.items() if k != "rows"}, "packed": columns}


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _listed(run: Run) -> dict[str, str]:
    """One line of the list of runs."""
    versions = run.record.get("versions") if isinstance(run.record.get("versions"), dict) else {}
    seconds = run.record.get("seconds")
    return {k: printable(str(v)) for k, v in {
        "command": run.command, "folder": run.folder, "models": run.pair, "data": run.data or "none",
        "rows": f"{len(run.frame):,}", "time": f"{seconds:,.0f} s" if isinstance(seconds, int | float) else "",
        "dtype": ", ".join(dict.fromkeys(str(m.get("dtype", "")) for m in run.models.values())),
        "torch": versions.get("torch", "") if isinstance(versions, dict) else ""}.items()}
