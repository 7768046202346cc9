"""The documentation's gate can fail, and what the pages promise of the site holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import midblock

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
pytest.importorskip("material", reason="the extra 'docs' is not installed")
pytest.importorskip("mkdocstrings", reason="the extra 'docs' is not installed")


def the_line_of_make_docs() -> list[str]:
    """The arguments of mkdocs in the target that `.ci/run` calls."""
    assert "make docs" in (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(r"^\t\$\(BIN\)/mkdocs (.+)$", makefile, flags=re.MULTILINE)
    return line.split()


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mkdocs", *the_line_of_make_docs()], cwd=folder, text=True,
                          capture_output=True, check=False, timeout=300,
                          env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the site is built from, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, folder / "docs")
    shutil.copytree(REPOSITORY / "examples", folder / "examples")
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"):
        shutil.copy(REPOSITORY / name, folder)
    (folder / "src").symlink_to(REPOSITORY / "src")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_asks_no_other_host(site: Path) -> None:
    pages = sorted((site / "site").rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]+src=[\"']?((?:https?:)?//[^\"' >]+)", text)
        loaded += re.findall(r"<link(?![^>]+rel=[\"']?canonical)[^>]+href=[\"']?((?:https?:)?//[^\"' >]+)", text)
        assert loaded == [], page.name
        assert "arithmatex" not in text, f"{page.name}: a formula was not typeset"
    for style in (site / "site").rglob("*.css"):
        assert re.findall(r"url\([\"']?(?:https?:)?//", style.read_text(encoding="utf-8")) == [], style.name


def test_a_dead_link_a_dead_anchor_and_a_page_outside_the_navigation_fail(site: Path) -> None:
    page = site / "docs" / "quickstart.md"
    page.write_text(page.read_text(encoding="utf-8") + "\n[gone](no-such-page.md) [lost](cli.md#no-such-heading)\n",
                    encoding="utf-8")
    (site / "docs" / "lonely.md").write_text("# Lonely\n", encoding="utf-8")
    done = build(site)
    assert done.returncode != 0
    for fault in ("no-such-page.md", "no-such-heading", "lonely.md"):
        assert fault in done.stderr


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    page = (site / "site" / "api.html").read_text(encoding="utf-8")
    headings = set(re.findall(r'<h3 id="midblock\.(?:\w+\.)*(\w+)"', page))
    assert set(midblock.__all__) - {"__version__", *midblock._MODULES} <= headings


def test_nothing_points_at_the_design() -> None:
    """Readers do not have the design document: a reference is the paper's equation or a page."""
    files = [REPOSITORY / "README.md", *DOCS.rglob("*.md"), *(REPOSITORY / "src").rglob("*.py"),
             *(REPOSITORY / "tests").rglob("*.py"), *(REPOSITORY / "benchmarks").rglob("*.py")]
    assert [str(f) for f in files if f != Path(__file__) and "DESIGN" in f.read_text(encoding="utf-8")] == []


def test_the_readme_links_the_papers() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert "https://arxiv.org/abs/2604.11838" in text
    assert "https://arxiv.org/abs/2410.17875" in text


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_of_root_pages_exist(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (REPOSITORY / target).exists(), target
