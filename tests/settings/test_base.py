"""The base of all settings: one declaration, every fault at once, in the caller's words."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from pydantic import model_validator

from midblock.errors import SettingsError
from midblock.settings.base import Settings, as_options, bounds_of, faults_of, name_of, option_name, setting


class Inner(Settings):
    depth: int = setting(1, ge=1, help="How deep.")


class Sample(Settings):
    samples: int = setting(200, ge=2, help="How many.")
    warmup: float = setting(0.05, ge=0, lt=1, help="Share.")
    order: Literal["length", "random"] = setting("length", help="Of rows.")
    modules: tuple[str, ...] = setting(("q", "k"), help="Matrices.")
    alphas: list[float] = setting([0.0], help="Sizes.")
    rank: int | None = setting(None, help="Rank.")
    chat: bool = setting(False, old=("conversation",), help="Chat format.")
    inner: Inner = setting(Inner(), help="Nested.")

    @model_validator(mode="after")
    def _fits(self) -> Sample:
        if self.rank == 13:
            raise ValueError(f"{name_of('rank')} and {name_of('samples')} exclude each other")
        return self


def test_defaults_and_given() -> None:
    s = Sample(samples=3)
    assert (s.samples, s.warmup, s.given()) == (3, 0.05, {"samples": 3})
    assert s.replace(warmup=0.5).given() == {"samples": 3, "warmup": 0.5}
    assert Sample.of(None, {}) == Sample()
    assert Sample.of(s, {"samples": 4}).samples == 4


def test_every_fault_is_told_at_once_in_pythons_words() -> None:
    with pytest.raises(SettingsError) as caught:
        Sample(samples=1, warmup=1.0, order="size", rank="many")
    text = str(caught.value)
    assert "samples must be at least 2, got 1" in text
    assert "warmup must be less than 1, got 1.0" in text
    assert "order 'size' is not one of length, random" in text
    assert "rank must be a whole number, got 'many'" in text
    assert "--" not in text


def test_the_command_line_reads_options() -> None:
    with as_options(), pytest.raises(SettingsError) as caught:
        Sample(samples=1, rank=1.5)
    assert "--samples must be at least 2" in str(caught.value)
    assert "--rank must be a whole number" in str(caught.value)
    with pytest.raises(SettingsError, match=r"^samples must"):  # only while it lasts
        Sample(samples=1)


@pytest.mark.parametrize(("convert", "expected"), [(False, "rank and samples exclude"),
                                                   (True, "--rank and --samples exclude")])
def test_validators_speak_the_callers_words(convert: bool, expected: str) -> None:
    if convert:
        with as_options(), pytest.raises(SettingsError, match=expected):
            Sample(rank=13)
    else:
        with pytest.raises(SettingsError, match=expected):
            Sample(rank=13)


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"unknown setting sampels; did you mean samples\?"):
        Sample(sampels=3)
    with pytest.raises(SettingsError, match=r"unknown setting zzz; there are samples, warmup"):
        Sample(zzz=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "nan", "many", None, [1], True])
def test_what_is_not_a_finite_number_is_refused(value: object) -> None:
    with pytest.raises(SettingsError, match="warmup"):
        Sample(warmup=value)


def test_a_flag_is_not_a_number_and_a_number_is_not_cut() -> None:
    with pytest.raises(SettingsError, match="samples must be a number, got True"):
        Sample(samples=True)
    with pytest.raises(SettingsError, match="samples must be a whole number"):
        Sample(samples=2.5)


def test_sequences_from_words_with_commas() -> None:
    s = Sample(modules="q, v,", alphas="0,.5,1")
    assert (s.modules, s.alphas) == (("q", "v"), [0.0, 0.5, 1.0])
    with pytest.raises(SettingsError, match=r"alphas\.1 must be a number, got 'x'"):
        Sample(alphas="0,x")


def test_an_old_name_still_works() -> None:
    assert Sample(conversation=True).chat
    assert not Sample(conversation=False).chat


def test_a_fault_in_a_nested_model_keeps_its_path() -> None:
    with pytest.raises(SettingsError, match=r"inner\.depth must be at least 1, got 0"):
        Sample(inner={"depth": 0})
    with pytest.raises(SettingsError, match=r"inner\.deep: unknown setting"):
        Sample(inner={"deep": 0})


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Sample().samples = 3


def test_names_and_bounds() -> None:
    assert option_name("a_b") == "--a-b"
    assert bounds_of(Sample.model_fields["samples"]) == "at least 2"
    assert bounds_of(Sample.model_fields["rank"]) == ""


def test_faults_without_a_model() -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError) as caught:
        Sample.model_validate({"nonsense": 1})
    assert faults_of(caught.value, unknown="key") == ["nonsense: unknown key"]


def _whole_numbers() -> list[tuple[type[Settings], str]]:
    """Every setting of every command that is a whole number, or some."""
    import midblock.settings  # noqa: F401  (all models)

    def below(model: type[Settings]) -> list[type[Settings]]:
        return [model, *(m for child in model.__subclasses__() for m in below(child))]

    return sorted({(model, name) for model in below(Settings) if model.__module__.startswith("midblock.")
                   for name, field in model.model_fields.items()
                   if re.search(r"\bint\b", str(field.annotation))}, key=str)


@pytest.mark.parametrize(("model", "name"), _whole_numbers(), ids=str)
@pytest.mark.parametrize("value", [2**53 + 1, 10**40, 10**5000], ids=["2**53+1", "10**40", "10**5000"])
def test_no_setting_takes_a_number_beyond_floats(model: type[Settings], name: str, value: int) -> None:
    """Steps of forty digits were a traceback from deep below."""
    for given in (value, [value]):
        with pytest.raises(SettingsError, match=name):
            model(**{name: given})
