"""gpt/device.py: what "auto" selects on machines that these tests do not run on."""

import sys
from types import SimpleNamespace

import pytest
import torch

from gpt.device import (
    find_micro_batch_size,
    select_compile,
    select_device,
    select_precision,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("capabilities, precision", [
    ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_f": True}, "float32")])
def test_auto_precision_on_a_cpu_is_bf16_if_native(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert select_precision("auto", CPU) == precision
    assert select_precision("fp16", CPU) == "fp16"
    assert select_precision("auto", torch.device("mps")) == "float32"


@pytest.mark.parametrize("capability, precision", [((8, 0), "bf16"), ((7, 5), "fp16")])
def test_auto_precision_on_a_gpu_follows_its_generation(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert select_precision("auto", GPU) == precision


def test_auto_compiles_on_volta_and_later_with_triton_and_a_compiler(monkeypatch):
    """Slim containers have no compiler. On a CPU it compiles only if requested."""
    def auto(*programs, capability=(7, 0), has_triton=True):
        triton = SimpleNamespace(__spec__="installed") if has_triton else None
        monkeypatch.setattr("shutil.which", lambda name: name if name in programs else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setitem(sys.modules, "triton", triton)
        return select_compile("auto", GPU)

    monkeypatch.delenv("CC", raising=False)
    assert auto("clang") is auto("gcc") is True
    assert auto("gcc", capability=(6, 1)) is auto("gcc", has_triton=False) is auto() is False
    monkeypatch.setenv("CC", "clang")
    assert auto("clang") and not auto("gcc")
    assert select_compile("auto", CPU) is select_compile(False, GPU) is False
    assert select_compile(True, CPU) is True


@pytest.mark.parametrize("limit, expected", [(1000, 96), (95, 64), (20, 16), (5, 4), (0, 1)])
def test_micro_batch_is_the_largest_divisor_that_fits(limit, expected):
    """Of 192 sequences, at most 100 at a time, on a device with room for `limit`."""
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    assert find_micro_batch_size(192, range(100, 1, -1), fits) == expected
    assert all(192 % size == 0 for size in tried)


def test_auto_device_prefers_cuda_then_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # an old driver, for example
    assert select_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device("auto").type == "cuda"
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert select_device("cuda:1") == torch.device("cuda", 1) == chosen[0]
