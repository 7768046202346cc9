"""The base of all settings models, and how their faults are told."""

from __future__ import annotations

import contextlib
import difflib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from midblock.errors import SettingsError

__all__ = ["Extras", "Settings", "as_keys", "as_options", "bounds_of", "choices_of", "extras_of", "faults_of",
           "name_of", "option_name", "setting", "without_none"]


class Extras(dict[str, Any]):
    """What a field says beyond pydantic's own: ``metavar``, ``old`` names, whether it is an option (``cli``)."""


def setting(default: Any = ..., *, help: str, metavar: str | None = None, old: Sequence[str] = (),
            cli: bool = True, **bounds: Any) -> Any:
    """Declare one setting: its default, its help and its bounds.

    Args:
        default: Value where nothing is given; ``...`` for a setting that must be given.
        help: One sentence for ``--help``, the docs and editors; units in words.
        metavar: Placeholder in help, such as ``N`` or ``max|rows``; choices show by themselves.
        old: Earlier names, which still work and say so.
        cli: Whether the command line offers it as an option.
        **bounds: pydantic's own (``ge``, ``gt``, ``le``, ``lt``, ``min_length``, ``pattern``).
    """
    extras = Extras(metavar=metavar, old=tuple(old), cli=cli)
    return Field(default, description=help, json_schema_extra=extras, **bounds)


def extras_of(field: FieldInfo) -> Extras:
    """The `Extras` of a field, with defaults where it was declared without `setting`."""
    found = field.json_schema_extra
    return found if isinstance(found, Extras) else Extras(metavar=None, old=(), cli=True)


def option_name(name: str) -> str:
    """A field's name as the command line spells it.

    Example:
        >>> option_name("token_samples")
        '--token-samples'
    """
    return "--" + name.replace("_", "-")


_naming: ContextVar[Callable[[str], str]] = ContextVar("naming", default=str)


def name_of(field: str) -> str:
    """A field's name in the words of the caller: ``samples`` in Python and YAML, ``--samples`` on the command line.

    For messages of validators that speak of several fields.
    """
    return _naming.get()(field)


@contextlib.contextmanager
def _named(naming: Callable[[str], str]) -> Iterator[None]:
    token = _naming.set(naming)
    try:
        yield
    finally:
        _naming.reset(token)


@contextlib.contextmanager
def as_options() -> Iterator[None]:
    """Faults name fields as command-line options while this lasts."""
    with _named(option_name):
        yield


@contextlib.contextmanager
def as_keys() -> Iterator[None]:
    """Faults name fields as a file's keys while this lasts, or while the decorated function runs."""
    with _named(str):
        yield


_LARGEST = 2**53


class Settings(BaseModel):
    """Base of every settings model: frozen, unknown names refused, no NaN or infinity, all faults at once.

    Sequences may be given as text with commas (``"q,k,v"``), as the command line does.

    Raises:
        SettingsError: any field unknown, missing, of a wrong type or out of its bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, defer_build=True,
                              use_attribute_docstrings=True, protected_namespaces=())

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError("; ".join(faults_of(error, type(self))) + ".") from None

    # models inside models are validated by pydantic itself, so that a fault keeps its whole path
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        known = dict(values)
        for name, field in cls.model_fields.items():
            for old in extras_of(field)["old"]:
                if old in known and name not in known:
                    known[name] = known.pop(old)
        return known

    @field_validator("*", mode="before")
    @classmethod
    def _plain_values(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = without_none(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and annotation in (int, float):
            raise ValueError(f"must be a number, got {value}")
        if isinstance(value, str) and get_origin(annotation) in (list, tuple):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("*")
    @classmethod
    def _exact_as_floats(cls, value: Any) -> Any:
        """No whole number beyond those that a float holds exactly: the libraries below compute with it."""
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int) and abs(number) > _LARGEST:
                raise ValueError(f"must be at most {_LARGEST:,} in size")
        return value

    @classmethod
    def of(cls, settings: Self | None, overrides: Mapping[str, Any]) -> Self:
        """``settings`` (or the defaults) with single fields replaced and everything validated anew."""
        return (cls if settings is None else type(settings))(
            **{**({} if settings is None else settings.given()), **overrides})

    def replace(self, **overrides: Any) -> Self:
        """A validated copy with some fields replaced."""
        return type(self).of(self, overrides)

    def given(self) -> dict[str, Any]:
        """The fields that were given, not those that have their default."""
        return {name: getattr(self, name) for name in self.model_fields_set}


def without_none(annotation: Any) -> Any:
    """``X`` of ``X | None``; anything else as it is."""
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [a for a in get_args(annotation) if a is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return annotation


_PLAIN = (("ge", 0), ("ge", 1), ("gt", 0), ("lt", 2**32))
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def bounds_of(field: FieldInfo) -> str:
    """The bounds of a number in words; limits that only say "not negative" or "a 32-bit seed" are left out.

    Example:
        >>> class S(Settings):
        ...     warmup: float = setting(0.05, help="Share of the steps.", ge=0, lt=1)
        >>> bounds_of(S.model_fields["warmup"])
        'less than 1'
    """
    return ", ".join(f"{word} {getattr(limit, key)}" for limit in field.metadata
                     for key, word in _BOUNDS.items()
                     if hasattr(limit, key) and (key, getattr(limit, key)) not in _PLAIN)


_TYPES = {"int_parsing": "a whole number", "int_type": "a whole number", "int_from_float": "a whole number",
          "float_parsing": "a number", "float_type": "a number", "finite_number": "a finite number",
          "bool_parsing": "true or false", "bool_type": "true or false", "string_type": "text",
          "list_type": "a list", "tuple_type": "a list", "path_type": "a path", "dict_type": "a mapping",
          "model_type": "a mapping of keys"}


def faults_of(error: ValidationError, model: type[BaseModel] | None = None, *, unknown: str = "setting") -> list[str]:
    """One phrase per fault, each beginning with the field in the caller's words.

    Args:
        error: From validating ``model``.
        model: To name what it knows where a name is unknown.
        unknown: What a name is called (setting, key).
    """
    lines: dict[str, None] = {}
    for fault in error.errors():
        # unions put the branch that was tried into the path, and pydantic the wrappers; a reader knows only the keys
        path = [str(p) for p in fault["loc"] if not (isinstance(p, str) and (
            "[" in p or "(" in p or p in ("int", "float", "str", "bool", "none") or p[:1].isupper()))]
        name = ".".join([name_of(path[0]), *path[1:]]) if path else ""
        lines[_fault(fault, name, path, model, unknown)] = None
    return list(lines)


def _fault(fault: Any, name: str, path: list[str], model: type[BaseModel] | None, unknown: str) -> str:
    kind, limits, value = fault["type"], fault.get("ctx", {}), fault["input"]
    try:
        shown = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        shown = "a number of thousands of digits"
    got = f", got {shown if len(shown) <= 60 else shown[:57] + '...'}"
    if kind == "extra_forbidden":
        if len(path) > 1 or model is None:
            return f"{name}: unknown {unknown}"
        near = difflib.get_close_matches(path[0], model.model_fields, n=1)
        known = ", ".join(name_of(n) for n in model.model_fields)
        return f"unknown {unknown} {name}" + (f"; did you mean {name_of(near[0])}?" if near else f"; there are {known}")
    if kind == "missing":
        return f"{name} is missing"
    for key, word in _BOUNDS.items():
        if key in limits:
            limit = limits[key]
            return f"{name} must be {word} {f'{limit:g}' if isinstance(limit, float) else limit}{got}"
    if kind in ("literal_error", "enum"):
        return f"{name} {shown} is not one of {limits['expected'].replace(chr(39), '').replace(' or ', ', ')}"
    if kind in _TYPES:
        return f"{name} must be {_TYPES[kind]}{got}"
    if kind in ("value_error", "assertion_error"):
        text = str(limits.get("error", fault["msg"])).rstrip(".")
        return text if not name or name in text else f"{name} {text}" if text.startswith("must ") else f"{name}: {text}"
    return f"{name}: {fault['msg'][:1].lower()}{fault['msg'][1:]}{got}"


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """The words that a field of choices takes; empty for any other field."""
    annotation = without_none(field.annotation)
    return tuple(str(a) for a in get_args(annotation)) if get_origin(annotation) is Literal else ()
