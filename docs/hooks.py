"""What MkDocs does besides: pages that come from the code and from the repository's root, and formulas.

Formulas are typeset while the site is built: browsers draw MathML themselves, so that no page needs a script or a
font from anywhere.
"""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import generate_cli  # beside this file, where MkDocs looks for a hook's modules
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import midblock
from midblock.quantities import FAMILIES, Quantity, quantities

DOCS = Path(__file__).resolve().parent
# pages of the site that live at the repository's root, where people and hosts look for them
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md"}
NOTEBOOKS = sorted((DOCS.parent / "examples").glob("*.ipynb"))
_INLINE = re.compile(r'<span class="arithmatex">\\\((.+?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.+?)\\\]\s*</div>', re.DOTALL)
# level of a measure -> what it is taken of, and the commands that give it
_LEVELS = {
    "token": ("the token states $Z$ ($T \\times d$) of a sample; mean over samples", "profile"),
    "dataset": ("the pooled states $X$ ($N \\times d$), one row per sample", "profile"),
    "views": ("augmented views of each sample's pooled state", "profile"),
    "weight": ("the weight matrices of a block", "weights"),
    "logits": ("the distribution of the next token", "lens, swap, merge, steer"),
    "gradient": ("the gradient of the loss in a block's weights", "gradients"),
    "block": ("input and output of a block, or its update", "locate, importance"),
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page for each family of measures into the navigation."""
    pages = [{label: f"measures/{family}.md"} for family, label in FAMILIES.items()]
    for entry in config.nav or []:
        if "Measures" in entry:
            entry["Measures"] += pages
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are written elsewhere: commands' help, measures, and what lies at the root."""
    pages = {"cli.md": generate_cli.page()}
    pages["api-metrics.md"] = modules_page("metrics", "Metrics", (
        "The formulas as pure functions of tensors, importable from `midblock.metrics`; no models, no files. What each "
        "means is under [Measures](measures/index.md)."))
    pages["api-stats.md"] = modules_page("stats", "Statistics", (
        "Intervals, tests and power as pure functions of arrays, importable from `midblock.stats`."))
    pages |= {f"measures/{family}.md": family_page(family) for family in FAMILIES}
    pages |= {f"examples/{path.stem}.md": notebook_page(path) for path in NOTEBOOKS}
    pages["api.md"] = api_page()
    for name, source in ROOT_PAGES.items():
        text = (DOCS.parent / source).read_text(encoding="utf-8")
        for page, other in ROOT_PAGES.items():
            text = text.replace(f"]({other})", f"]({page})")
        pages[name] = text.replace("](docs/", "](")
    for name, text in pages.items():
        written = files.get_file_from_path(name)
        if written is not None:
            files.remove(written)
        files.append(File.generated(config, name, content=text))
    return files


def api_page() -> str:
    """docs/api.md, and every public name that it does not place itself."""
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    placed = set(re.findall(r"^::: midblock(?:\.\w+)*\.(\w+)$", text, flags=re.MULTILINE))
    others = [name for name in midblock.__all__
              if name not in placed and name != "__version__" and name not in midblock._MODULES]
    return text.replace("<!-- others -->", "\n".join(f"::: midblock.{name}" for name in others))


def modules_page(package: str, title: str, introduction: str) -> str:
    """The reference of every public module of a package."""
    parts = [f"# {title}", introduction]
    for path in sorted((DOCS.parent / "src" / "midblock" / package).glob("[!_]*.py")):
        heading = "CKA" if path.stem == "cka" else path.stem.replace("_", " ").capitalize()
        parts.append(f"## {heading}\n\n::: midblock.{package}.{path.stem}\n    options:\n"
                     "      show_root_heading: false\n      show_root_toc_entry: false")
    return "\n\n".join(parts) + "\n"


def family_page(family: str) -> str:
    """The page of a family: an introduction and a figure where there are, then one section per measure."""
    introduction = DOCS / "measures" / "_introductions" / f"{family}.md"
    figure = DOCS / "assets" / "measures" / f"{family}.svg"
    parts = [f"# {FAMILIES[family]}"]
    if introduction.exists():
        parts.append(introduction.read_text(encoding="utf-8").strip())
    if figure.exists():
        parts.append(f"![{FAMILIES[family]} over the depth of SmolLM2](../assets/measures/{family}.svg)")
    parts += [section(measure) for measure in quantities(family=family)]
    return "\n\n".join(parts) + "\n"


def section(measure: Quantity) -> str:
    """What a record says of its measure."""
    taken_of, commands = _LEVELS[measure.level]
    facts = {"Metric": f"`{measure.name}`", "Taken of": taken_of + ("; of both models" if measure.paired else ""),
             "Unit": measure.unit,
             "No change": f"{measure.unchanged:g}" if measure.paired else "a difference of 0",
             "Interval": interval(measure),
             "Source": measure.source,
             "Function": f"`midblock.metrics.{measure.function.partition(':')[2]}`"
             if isinstance(measure.function, str) and measure.function else "",
             "Commands": ", ".join(f"[{c}](../cli.md#{c})" for c in commands.split(", ")),
             "Variants": "; ".join(measure.variants)}
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value)
    formula = f"$$\n{measure.formula}\n$$\n\n" if measure.formula else ""
    return f"## {measure.label}\n\n{formula}{measure.reading}\n\n| | |\n|---|---|\n{rows}"


def interval(measure: Quantity) -> str:
    """Where the interval of a measure comes from."""
    if measure.level != "dataset":
        return _INTERVALS[measure.level]
    if measure.spectrum:
        return {"bootstrap": "bootstrap over samples, eigenvalues to first order", "none": "none",
                "groups": "jackknife over ten groups of samples"}[measure.interval]
    return ("bootstrap over samples" if measure.resampled else "delete-one jackknife over samples" if measure.jackknife
            else "Student's t over samples; of a value for the whole data set a jackknife over ten groups of samples")


_INTERVALS = {"token": "Student's t over samples", "views": "jackknife over ten groups of samples",
              "weight": "none: every weight is compared, nothing is sampled",
              "logits": "bootstrap over samples, tokens pooled", "gradient": "Student's t over batches",
              "block": "Student's t over samples or batches, where there are several"}


def notebook_page(path: Path) -> str:
    """An executed notebook: its text, its code, and what that printed and drew."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                parts.append(f"![Figure](data:image/png;base64,{''.join(data['image/png']).replace(chr(10), '')})")
            elif "text/html" in data:
                table = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL)
                parts.append(re.sub(r' (border|class)="[^"]*"', "", table))
            else:
                parts.append(f"```text\n{''.join(data.get('text/plain', '')).rstrip()}\n```")
    return "\n\n".join(parts) + f"\n\n*This page is the notebook `examples/{path.name}`, as it ran.*\n"


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Typeset the formulas of a page."""
    def math(display: str) -> Any:
        return lambda found: convert(unescape(found.group(1)).strip(), display=display)

    return _INLINE.sub(math("inline"), _BLOCK.sub(math("block"), html))
