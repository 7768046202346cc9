"""What MkDocs does besides: pages that come from the code and from the repository's root, and formulas.

Formulas are typeset while the site is built: browsers draw MathML themselves, so that no page needs a script or a
font from anywhere.
"""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import generate_cli  # beside this file, where MkDocs looks for a hook's modules
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# pages of the site that live at the repository's root, where people and hosts look for them
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_INLINE = re.compile(r'<span class="arithmatex">\\\((.+?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.+?)\\\]\s*</div>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are written elsewhere: the commands' help, and what lies at the root."""
    pages = {"cli.md": generate_cli.page()}
    for name, source in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        for page, other in ROOT_PAGES.items():
            text = text.replace(f"]({other})", f"]({page})")
        pages[name] = text.replace("](docs/", "](")
    for name, text in pages.items():
        stale = files.get_file_from_path(name)
        if stale is not None:
            files.remove(stale)
        files.append(File.generated(config, name, content=text))
    return files


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Typeset the formulas of a page."""
    def math(display: str) -> Any:
        return lambda found: convert(unescape(found.group(1)).strip(), display=display)

    return _INLINE.sub(math("inline"), _BLOCK.sub(math("block"), html))
