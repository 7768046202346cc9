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
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the site is built from, whose page of Python names is short to build."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, folder / "docs")
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(REPOSITORY / name, folder)
    (folder / "src").symlink_to(REPOSITORY / "src")
    return folder


def test_make_docs_builds_and_fails_on_a_dead_link_and_on_a_page_outside_the_navigation(copy: Path) -> None:
    good = build(copy)
    assert good.returncode == 0, good.stdout + good.stderr
    page = copy / "docs" / "quickstart.md"
    text = page.read_text(encoding="utf-8")
    try:
        page.write_text(text + "\n[gone](no-such-page.md)\n", encoding="utf-8")
        dead = build(copy)
        page.write_text(text + "\n[gone](cli.md#no-such-heading)\n", encoding="utf-8")
        anchor = build(copy)
    finally:
        page.write_text(text, encoding="utf-8")
    assert dead.returncode != 0
    assert "no-such-page.md" in dead.stderr
    assert anchor.returncode != 0
    assert "no-such-heading" in anchor.stderr
    lonely = copy / "docs" / "lonely.md"
    lonely.write_text("# Lonely\n", encoding="utf-8")
    try:
        outside = build(copy)
    finally:
        lonely.unlink()
    assert outside.returncode != 0
    assert "lonely.md" in outside.stderr


def test_the_site_asks_no_other_host(copy: Path) -> None:
    assert build(copy).returncode == 0
    for page in sorted((copy / "site").rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]+src=[\"']?((?:https?:)?//[^\"' >]+)", text)
        loaded += re.findall(r"<link(?![^>]+rel=[\"']?canonical)[^>]+href=[\"']?((?:https?:)?//[^\"' >]+)", text)
        assert loaded == [], page.name
        assert "arithmatex" not in text, f"{page.name}: a formula was not typeset"
    for style in (copy / "site").rglob("*.css"):
        assert re.findall(r"url\([\"']?(?:https?:)?//", style.read_text(encoding="utf-8")) == [], style.name


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^::: midblock\.(?:\w+\.)*(\w+)$", page, flags=re.MULTILINE))
    assert set(midblock.__all__) - {"__version__", *midblock._MODULES} <= documented


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
