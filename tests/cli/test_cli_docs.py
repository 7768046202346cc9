"""docs/cli.md says what the program's help says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from midblock.cli.app import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_page_of_commands_is_not_stale() -> None:
    done = subprocess.run([sys.executable, str(REPOSITORY / "docs" / "generate_cli.py"), "--check"],
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_has_every_command() -> None:
    page = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == list(COMMANDS)


def test_a_stale_page_is_noticed(tmp_path: Path) -> None:
    script = tmp_path / "generate_cli.py"
    script.write_text((REPOSITORY / "docs" / "generate_cli.py").read_text(encoding="utf-8"), encoding="utf-8")
    check = [sys.executable, str(script), "--check"]
    assert subprocess.run(check, capture_output=True, timeout=120, check=False).returncode == 1
    subprocess.run([sys.executable, str(script)], check=True, timeout=120)
    assert subprocess.run(check, capture_output=True, timeout=120, check=False).returncode == 0
    page = tmp_path / "cli.md"
    page.write_text(page.read_text(encoding="utf-8").replace("--segments", "--parts"), encoding="utf-8")
    stale = subprocess.run(check, capture_output=True, text=True, timeout=120, check=False)
    assert stale.returncode == 1
    assert "make cli-docs" in stale.stderr
