"""Which dtype is loaded in, from planted and from measured rates."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time

import pytest
import torch
from transformers import LlamaConfig

from midblock.errors import SettingsError
from midblock.models import choose_dtype, dtypes, resolve_device

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def rates(monkeypatch):
    """Plant what the device reaches in float32 and in 16 bits."""
    def plant(full: float, half: float) -> None:
        monkeypatch.setattr(dtypes, "product_rates",
                            lambda config, device, narrow: {"float32": full, dtypes.dtype_name(narrow): half})
    return plant


@pytest.mark.parametrize("stored", HALVES)
@pytest.mark.parametrize(("full", "half", "gets"), [
    (38e9, 99e9, torch.bfloat16), (28e9, 19e9, torch.float32), (10e9, 0.15e9, torch.float32),
    (50e9, 50e9, torch.float32), (50e9, 51e9, torch.float32)])
def test_16_bits_only_where_they_are_faster(rates, caplog, stored, full, half, gets):
    rates(full, half)
    with caplog.at_level(logging.INFO, logger="midblock"):
        choice = choose_dtype("auto", stored=stored, device=CPU)
    assert choice.dtype == gets
    assert f"{full / 1e9:g} GFLOP/s in float32" in choice.reason
    assert caplog.messages == [f"dtype {choice.name}: {choice.reason}"]


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.int8])
def test_wider_checkpoints_lose_nothing(rates, stored):
    rates(1e9, 1e12)
    choice = choose_dtype("auto", stored=stored, device=CPU, parameters=1000)
    assert (choice.dtype, choice.reason) == (torch.float32, "as stored")


@pytest.mark.parametrize("stored", [torch.float32, *HALVES])
def test_where_float32_does_not_fit_it_is_16_bits(rates, monkeypatch, stored):
    rates(1e12, 1e9)
    monkeypatch.setattr(dtypes, "_memory_bytes", lambda device, spread=False: 16e9)
    one = {"stored": stored, "device": CPU, "parameters": 3_000_000_000}
    assert choose_dtype("auto", **one).dtype == torch.float32
    pair = choose_dtype("auto", **one, models=2)
    assert pair.dtype == torch.bfloat16
    assert pair.reason == "2 x 3.0B weights in float32 would take 24 of 16 GB of memory"


@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16", torch.float32, torch.bfloat16, torch.float16])
def test_what_is_asked_for_is_taken(asked):
    choice = choose_dtype(asked, stored=torch.float32, device=CPU)
    assert (choice.name, choice.reason) == (str(asked).removeprefix("torch."), "as asked")


@pytest.mark.parametrize("word", ["half", "float64", "", torch.int8])
def test_unknown_words_are_refused(word):
    with pytest.raises(SettingsError, match="auto, float32, bfloat16, float16"):
        choose_dtype(word, stored=torch.float32, device=CPU)


def test_a_dtype_that_the_device_cannot_multiply_in(monkeypatch):
    monkeypatch.setattr(dtypes, "_can_multiply", lambda dtype, device: dtype == torch.float32)
    with pytest.raises(SettingsError, match="bfloat16: PyTorch cannot multiply in it on the device meta"):
        choose_dtype("bfloat16", stored=torch.float32, device=torch.device("meta"))
    assert choose_dtype("auto", stored=torch.bfloat16, device=CPU).dtype == torch.float32


@pytest.mark.parametrize("width", [8, 576, 16384])
def test_the_measurement_is_short_and_remembered(monkeypatch, tmp_path, width):
    monkeypatch.setenv("MIDBLOCK_CACHE", str(tmp_path))
    config = LlamaConfig(hidden_size=width, intermediate_size=3 * width, num_attention_heads=1)
    started = time.perf_counter()
    found = dtypes.product_rates(config, CPU)
    assert time.perf_counter() - started < 10  # about a third of a second by itself; tests share their cores
    assert set(found) == {"float32", "bfloat16"}
    assert all(1e7 < rate < 1e14 for rate in found.values())
    monkeypatch.setattr(dtypes, "_time_products", lambda *a: pytest.fail("measured twice"))
    assert dtypes.product_rates(config, CPU) == found


def test_other_versions_and_dtypes_are_measured_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("MIDBLOCK_CACHE", str(tmp_path))
    planted = iter([1e9, 2e9, 3e9])
    monkeypatch.setattr(dtypes, "_time_products",
                        lambda shapes, device, narrow: {"float32": next(planted), dtypes.dtype_name(narrow): 1e9})
    assert dtypes.product_rates(None, CPU)["float32"] == 1e9
    assert dtypes.product_rates(None, CPU, torch.float16)["float32"] == 2e9
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert dtypes.product_rates(None, CPU)["float32"] == 3e9
    assert len(json.loads((tmp_path / "product-rates.json").read_text())) == 3


@pytest.mark.parametrize("content", ["", "[]", "{", '{"k": 3}', '{"k": {"float32": "fast"}}'])
def test_a_damaged_memory_is_measured_anew(monkeypatch, tmp_path, content):
    monkeypatch.setenv("MIDBLOCK_CACHE", str(tmp_path))
    (tmp_path / "product-rates.json").write_text(content)
    monkeypatch.setattr(dtypes, "_time_products", lambda *a: {"float32": 1e9, "bfloat16": 2e9})
    assert dtypes.product_rates(None, CPU) == {"float32": 1e9, "bfloat16": 2e9}
    assert len(json.loads((tmp_path / "product-rates.json").read_text())) == 1


def test_a_cache_that_cannot_be_written_costs_only_the_memory(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIDBLOCK_CACHE", str(tmp_path / "file" / "below"))
    assert set(dtypes.product_rates(None, CPU)) == {"float32", "bfloat16"}


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="a matter of x86")
def test_without_bfloat16_instructions_auto_is_float32(tmp_path):
    """The processor is told to do without them, in a process of its own."""
    code = ("import torch; from midblock.models import choose_dtype; "
            "print(choose_dtype('auto', stored=torch.bfloat16, device=torch.device('cpu')).name)")
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True,
                          env={**os.environ, **limits, "MIDBLOCK_CACHE": str(tmp_path)})
    assert done.stdout.split() == ["float32"]


def test_values_per_layer_are_no_value_for_all():
    class Heterogeneous:
        @property
        def head_dim(self) -> int:
            raise RuntimeError("differs by layer")
    assert dtypes.config_value(Heterogeneous(), "head_dim") is None
    assert dtypes.config_value(LlamaConfig(hidden_size=64), "hidden_size") == 64


def test_auto_device_is_a_device():
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    assert resolve_device("cpu") == CPU
    with pytest.raises(SettingsError, match=r"cuda:99.*use auto(,| or) cpu"):
        resolve_device("cuda:99")
