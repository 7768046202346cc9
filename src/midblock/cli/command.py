"""From a function with settings to a command with options.

A command's function names what it needs::

    @command("midblock profile BASE SFT --data gsm8k")
    def profile(models: Chain, data: Data, settings: ProfileSettings, load: ChainLoadSettings, out: Out) -> None: ...

`expand` replaces each parameter whose annotation is a `Settings` class by one option per field, with the field's
default, bounds and help, and builds the object before the function is called. `command` adds what every command has:
`--json`, `--quiet` and examples.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from midblock.cli import console
from midblock.cli.options import Json, Quiet, examples
from midblock.errors import SettingsError
from midblock.settings.base import Settings, as_options, bounds_of, choices_of, extras_of, option_name, without_none

__all__ = ["command", "expand"]

_ALWAYS = (inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json),
           inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet))


def command(*lines: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command of the program, with lines to copy under its help (its attribute ``epilog``)."""
    def made(function: Callable[..., None]) -> Callable[..., None]:
        options = expand(function)
        own: inspect.Signature = options.__signature__  # type: ignore[attr-defined]

        @functools.wraps(options)
        def run(*, as_json: bool, quiet: bool, **values: Any) -> None:
            options(**values)  # --json and --quiet were told to the console as they were read

        run.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[*own.parameters.values(), *_ALWAYS])
        run.__annotations__ = options.__annotations__ | {p.name: p.annotation for p in _ALWAYS}
        run.epilog = examples(*lines)  # type: ignore[attr-defined]
        return run
    return made


def expand(function: Callable[..., None]) -> Callable[..., None]:
    """A function for ``app.command`` whose settings parameters have become options.

    Settings of all parameters are checked together; every fault is told at once.

    Raises:
        TypeError: two settings of one command have the same name (a fault of the program).
    """
    hints = typing.get_type_hints(function, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Settings)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in groups:
            parameters += _options(groups[name])
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[name]))
    names = [p.name for p in parameters]
    if twice := {n for n in names if names.count(n) > 1}:
        raise TypeError(f"{function.__name__}: {', '.join(sorted(twice))} declared twice")

    @functools.wraps(function)
    def command(**values: Any) -> None:
        faults: list[str] = []
        built: dict[str, Any] = {}
        for name, model in groups.items():
            try:
                built[name] = _build(model, values)
            except SettingsError as error:
                faults.append(str(error).removesuffix("."))
        if faults:
            raise typer.BadParameter("; ".join(faults) + ".")
        with as_options():  # what the library finds wrong is told in the words of the command line too
            function(**values, **built)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _build(model: type[Settings], values: dict[str, Any]) -> Settings:
    """Take the fields of one model out of the options and validate them; what has its default counts as not given."""
    given: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        for old in extras_of(field)["old"]:
            value = values.pop(old, None)
            if value:
                console.warn(f"{option_name(old)} is now {option_name(name)}; the old name still works in this "
                             "version.")
                given[name] = value
        if name in values:
            value = values.pop(name)
            if value is not None and value != _shown_default(field):
                given[name] = value
    with as_options():
        return model(**given)


def _options(model: type[Settings]) -> Iterator[inspect.Parameter]:
    for name, field in model.model_fields.items():
        extras = extras_of(field)
        if not extras["cli"]:
            continue
        yield _option(name, field, hidden=False)
        for old in extras["old"]:
            yield _option(old, field, hidden=True)


def _option(name: str, field: FieldInfo, *, hidden: bool) -> inspect.Parameter:
    extras = extras_of(field)
    kind = without_none(field.annotation)
    flag = kind is bool
    choices = choices_of(field)
    kind = kind if kind in (bool, int, float, Path) else str
    default = None if hidden else _shown_default(field)
    required = field.is_required() and not hidden
    limits = bounds_of(field)
    spelling = option_name(name)
    if flag and (default is True or (field.default is None and not hidden)):
        spelling += f"/--no-{spelling[2:]}"
    info = typer.Option(
        spelling, hidden=hidden, show_default=default is not None and not (flag and not default),
        metavar=None if flag else extras["metavar"] or "|".join(choices) or None,
        help=(field.description or "") + (f" ({limits})" if limits else ""))
    annotation = Annotated[kind, info] if required or default is not None else Annotated[kind | None, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation,
                             default=inspect.Parameter.empty if required else default)


def _shown_default(field: FieldInfo) -> Any:
    """The default as the command line spells it: sequences as words with commas."""
    default = field.get_default(call_default_factory=True)
    if isinstance(default, list | tuple):
        return ",".join(str(v) for v in default) or None
    return default
