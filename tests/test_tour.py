"""The lines of the README and of the quickstart run as they stand, one after another, offline."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {"README.md": REPOSITORY / "README.md", "quickstart.md": REPOSITORY / "docs" / "quickstart.md"}


def blocks(page: str, language: str) -> list[str]:
    text = PAGES[page].read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def lines(page: str) -> list[str]:
    """The program's lines of a page; installing is not repeated here."""
    whole = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    return [line for line in whole.splitlines() if line.startswith("midblock ")]


def scripts(page: str) -> list[str]:
    """The Python blocks of a page that neither are doctests nor need a network."""
    return [b for b in blocks(page, "python") if not b.startswith(">>>") and "datasets.load_dataset" not in b]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path) -> Path:
    """A folder as the reader's clone: the recipes lie in it. The embedded model is converted already."""
    assert smollm2_folder.is_dir()
    where = tmp_path_factory.mktemp("tour")
    (where / "recipes").symlink_to(REPOSITORY / "recipes")
    return where


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("MIDBLOCK_DATA", "MIDBLOCK_DEBUG")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


def test_the_tour_has_lines_and_says_how_long_they_take() -> None:
    tour = lines("README.md")
    assert len(tour) >= 12
    seconds = [int(n) for line in tour for n in re.findall(r"#\s+(\d+) s", line)]
    assert len(seconds) == len(tour), "a line of the tour does not say how long it takes"
    assert sum(seconds) <= 600
    assert len(lines("quickstart.md")) >= 3
    assert len(scripts("README.md")) == 1


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("page", list(PAGES))
def test_the_lines_of_a_page_run_as_they_stand(page: str, folder: Path) -> None:
    for line in lines(page):
        begun = time.perf_counter()
        done = subprocess.run(line, shell=True, cwd=folder, env=environment(), capture_output=True, text=True,
                              timeout=900, check=False)
        wanted = re.search(r"# exit code (\d)", line)
        assert done.returncode == int(wanted.group(1) if wanted else 0), f"{line}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, line
        sys.stdout.write(f"{time.perf_counter() - begun:6.1f} s  {line}\n")  # pytest -s shows what each line takes


@pytest.mark.slow
@pytest.mark.parametrize("page", list(PAGES))
def test_the_scripts_of_a_page_run_as_they_stand(page: str, folder: Path) -> None:
    for number, script in enumerate(scripts(page)):
        path = folder / f"{page}-{number}.py"
        path.write_text(script, encoding="utf-8")
        done = subprocess.run([sys.executable, str(path)], cwd=folder, env=environment(), capture_output=True,
                              text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
