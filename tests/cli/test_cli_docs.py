"""docs/cli.md is made from the program's help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from midblock.cli.app import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_page_has_every_command_and_its_options(tmp_path: Path) -> None:
    script = tmp_path / "generate_cli.py"
    script.write_text((REPOSITORY / "docs" / "generate_cli.py").read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run([sys.executable, str(script)], check=True, timeout=120)
    page = (tmp_path / "cli.md").read_text(encoding="utf-8")
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == list(COMMANDS)
    assert "--token-samples" in page.split("## profile")[1].split("## lens")[0]
