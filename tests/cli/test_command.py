"""Options made from settings models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import typer

from midblock.cli.command import expand
from midblock.settings import Settings, setting


class One(Settings):
    samples: int = setting(20, ge=2, metavar="N", help="How many.")
    order: Literal["length", "random"] = setting("length", help="Of rows.")
    modules: tuple[str, ...] = setting(("q", "k"), metavar="NAMES", help="Matrices.")
    rank: int | None = setting(None, help="Rank.")
    budget: int | str | None = setting(None, help="Budget.")
    packed: bool = setting(True, help="Packed.")
    paper_code: bool = setting(False, old=("earlier_code",), help="Paper code.")
    hidden: float = setting(0.5, cli=False, help="Not an option.")


class Two(Settings):
    folder: Path = setting(Path("x"), help="Where.")
    name: str = setting(help="Must be given.")


@pytest.fixture
def call() -> Callable[..., dict[str, Any]]:
    def run(*words: str) -> dict[str, Any]:
        got: dict[str, Any] = {}

        def command(one: One, two: Two) -> None:
            got.update(one=one, two=two)

        app = typer.Typer(add_completion=False)
        app.command()(expand(command))
        app(args=[*words], standalone_mode=False)
        return got

    return run


def test_options_become_settings(call: Callable[..., dict[str, Any]]) -> None:
    got = call("--samples", "3", "--modules", "q,v,o", "--name", "n", "--no-packed", "--folder", "a/b",
               "--budget", "900k")
    assert got["one"] == One(samples=3, modules=("q", "v", "o"), packed=False, budget="900k")
    assert got["two"] == Two(folder=Path("a/b"), name="n")
    assert got["one"].given() == {"samples": 3, "modules": ("q", "v", "o"), "packed": False, "budget": "900k"}


def test_defaults_are_the_models_own(call: Callable[..., dict[str, Any]]) -> None:
    got = call("--name", "n")
    assert got["one"] == One()
    assert got["one"].given() == {}


def test_faults_of_all_groups_are_told_at_once_as_options(call: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        call("--samples", "1", "--order", "size", "--name", "n")
    assert "--samples must be at least 2, got 1" in str(caught.value)
    assert "--order 'size' is not one of length, random" in str(caught.value)


def test_an_old_option_works_and_says_its_new_name(call: Callable[..., dict[str, Any]],
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--name", "n", "--earlier-code")["one"].paper_code
    assert "--earlier-code is now --paper-code" in capsys.readouterr().err


def test_what_is_no_option_is_refused(call: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(Exception, match="--hidden"):
        call("--name", "n", "--hidden", "1")
    with pytest.raises(Exception, match="name"):
        call()


def test_a_name_in_two_models_is_a_fault_of_the_program() -> None:
    def command(one: One, same: One) -> None: ...

    with pytest.raises(TypeError, match="samples"):
        expand(command)
