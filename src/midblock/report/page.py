"""One HTML file from runs: no request leaves it, and nothing from outside becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
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
    heading = printable(title or "; ".join(dict.fromkeys(r.pair for r in runs if r.models)) or "midblock report")
    payload = {"charts": [_packed(c) for c in charts], "findings": findings, "sections": SECTIONS, "title": heading}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    page = environment.from_string((assets / "report.html.j2").read_text(encoding="utf-8")).render(
        title=heading, style=Markup(style), refresh=refresh,
        scripts=[Markup(s) for s in scripts],
        hashes=[_csp_hash(s) for s in scripts], payload=Markup(_script_safe(payload)),
        findings=found, runs=[_listed(r) for r in runs],
        left_out=[LeftOut(printable(o.folder), printable(o.reason)) for o in left_out],
        version=__version__, made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    return page, findings


def _packed(chart: Chart) -> Chart:
    """The chart with its rows by columns, each text once: names repeat in every row, and a page must stay small."""
    columns: list[dict[str, Any]] = []
    for place in range(len(chart["columns"])):
        values = [row[place] for row in chart["rows"]]
        if any(isinstance(v, str) for v in values):
            known: dict[Any, int] = {}
            columns.append({"at": [known.setdefault(v, len(known)) for v in values], "of": list(known)})
        else:
            columns.append({"values": values})
    return {**{k: v for k, v in chart.items() if k != "rows"}, "packed": columns}


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _script_safe(value: Any) -> str:
    """JSON that cannot end the element that it stands in."""
    text = json.dumps(json_ready(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})


def _listed(run: Run) -> dict[str, str]:
    """One line of the list of runs."""
    versions = run.record.get("versions") if isinstance(run.record.get("versions"), dict) else {}
    seconds = run.record.get("seconds")
    return {k: printable(str(v)) for k, v in {
        "command": run.command, "folder": run.folder, "models": run.pair, "data": run.data or "none",
        "rows": f"{len(run.frame):,}", "time": f"{seconds:,.0f} s" if isinstance(seconds, int | float) else "",
        "dtype": ", ".join(dict.fromkeys(str(m.get("dtype", "")) for m in run.models.values())),
        "torch": versions.get("torch", "") if isinstance(versions, dict) else ""}.items()}
