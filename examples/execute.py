"""Run the notebooks and keep what they print and draw: `make notebooks` does, after a change of the library.

    python examples/execute.py            writes the executed notebooks in place
    python examples/execute.py --check    runs them and leaves the files alone
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs; the first error ends it."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
                   ).execute()
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)  # times of day would differ in every run
        if "outputs" in cell:  # progress bars are of no use to a reader
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook


def main() -> None:
    """Run all of them."""
    for path in NOTEBOOKS:
        notebook = execute(path)
        if "--check" not in sys.argv[1:]:
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
