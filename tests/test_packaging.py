"""What is installed is what is imported: a light core, extras by use, and one line where an extra is absent."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import midblock
from midblock import extras
from midblock.errors import MissingExtraError

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# imported name -> name on the package index, where they differ
DISTRIBUTION = {"yaml": "pyyaml", "lm_eval": "lm-eval"}
# declared without an import in src: who needs it
USED_BY_OTHERS = {"gguf": "transformers, to read GGUF files", "accelerate": "the same"}
# imported where installed, and done without elsewhere
OPTIONAL = {"nltk", "wandb", "trackio", "tensorboard", "psutil", "IPython", "flash_attn", "codecarbon"}

BLOCK_EXTRAS = """
import sys
from midblock.extras import EXTRA_OF
for name in [*EXTRA_OF, "statsmodels"]:
    sys.modules[name] = None  # an import of it now raises ModuleNotFoundError
"""


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~ ]", r)[0].lower().replace("_", "-") for r in requirements}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"midblock", "__future__"}


IMPORTED = set().union(*(imported(p) for p in (REPOSITORY / "src").rglob("*.py")))
CORE = names(PROJECT["dependencies"])


def distribution(module: str) -> str:
    return DISTRIBUTION.get(module, module).lower().replace("_", "-")


def test_every_import_is_declared() -> None:
    of_extras = set(extras.EXTRA_OF)
    undeclared = {m for m in IMPORTED if distribution(m) not in CORE} - of_extras - OPTIONAL
    assert undeclared == set()


def test_every_core_dependency_is_used() -> None:
    assert CORE - {distribution(m) for m in IMPORTED} - set(USED_BY_OTHERS) == set()


@pytest.mark.parametrize(("module", "extra"), sorted(extras.EXTRA_OF.items()))
def test_an_extra_brings_what_its_line_promises(module: str, extra: str) -> None:
    assert distribution(module) not in CORE
    wanted = {distribution(module)}
    if extra == "evaluate":
        assert any(r.startswith("lm-eval[hf]") for r in PROJECT["optional-dependencies"][extra])
    assert wanted <= names(PROJECT["optional-dependencies"][extra])


def test_all_extras_of_commands_are_in_all() -> None:
    (line,) = PROJECT["optional-dependencies"]["all"]
    within = set(line.partition("[")[2].rstrip("]").split(","))
    # where a GPU or a 4-bit base is used
    assert within == set(extras.EXTRA_OF.values()) - {"quantized", "vllm"}


def test_constraints_pin_everything_declared() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    declared = CORE | set().union(*(names(r) for extra, r in PROJECT["optional-dependencies"].items()
                                    if extra not in ("quantized", "vllm")))
    assert declared - pinned - {"midblock"} == set()


def test_the_workflow_runs_the_gate_on_every_python_that_is_promised() -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["check"]
    promised = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.fullmatch(r".*:: 3\.\d+", c)]
    assert job["strategy"]["matrix"]["python"] == promised
    assert ".ci/run" in [step.get("run") for step in job["steps"]]


def run_blocked(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCK_EXTRAS + code], capture_output=True, text=True, check=False,
                          timeout=300)


def test_the_analyses_need_no_extra() -> None:
    done = run_blocked("""
import midblock
for name in ("load_pair", "load_data", "profile", "weights", "lens", "swap", "merge", "gradients", "steer",
             "correlate", "metrics", "stats", "segment_blocks"):
    getattr(midblock, name)
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("words", "line"), [
    (["tune", "smollm2", "--data", "arithmetic", "--mask", "01100", "--out", "OUT"],
     "midblock tune needs the package trl"),
    (["evaluate", "smollm2", "--task", "arithmetic"], "scoring the task arithmetic needs the package lm-eval"),
])
def test_a_command_without_its_extra_says_what_to_install(words: list[str], line: str, tmp_path: Path) -> None:
    given = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    done = run_blocked(f"from midblock.cli.app import run\nsys.exit(run({given}))")
    assert done.returncode == 2, done.stderr
    (error,) = [text for text in done.stderr.splitlines() if text.startswith("Error:")]
    assert line in error
    assert f"pip install 'midblock[{words[0]}]'" in error
    assert "Traceback" not in done.stderr


def test_the_library_says_what_to_install() -> None:
    done = run_blocked("""
import midblock
from midblock.errors import MissingExtraError
try:
    midblock.tune("smollm2", "arithmetic", mask="01100")
except MissingExtraError as error:
    print(error)
""")
    assert done.stdout == "midblock tune needs the package trl, which is not installed: pip install 'midblock[tune]'\n"


def test_another_missing_module_stays_a_bug() -> None:
    assert extras.missing(ModuleNotFoundError("No module named 'torhc'", name="torhc"), "midblock tune") is None
    assert extras.missing(ImportError("cannot import name 'x' from 'trl'", name="trl"), "midblock tune") is None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        midblock.nothing  # noqa: B018


def test_both_extras_of_a_sweep_are_named_at_once() -> None:
    error = extras.missing(ModuleNotFoundError("No module named 'peft'", name="peft.tuners"), "midblock sweep")
    assert isinstance(error, MissingExtraError)
    assert str(error).endswith("pip install 'midblock[tune,evaluate]'")
