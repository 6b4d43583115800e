"""gpt/device.py: what "auto" decides on machines that these tests do not run on."""

import shutil

import pytest
import torch

from gpt import device as module
from gpt.device import select_compile, select_device, select_precision
from gpt.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("capabilities, precision", [
    ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True, "avx512_bf16": True}, "bf16"),
    ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, "float32"), ({}, "float32")])
def test_auto_precision_on_a_cpu_is_bf16_where_native(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert select_precision("auto", CPU) == precision
    assert select_precision("fp16", CPU) == "fp16"
    assert select_precision("auto", torch.device("mps")) == "float32"


@pytest.mark.parametrize("capability, precision", [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")])
def test_auto_precision_on_a_gpu_follows_its_generation(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert select_precision("auto", GPU) == precision


def test_auto_compiles_on_gpus_that_can_be_compiled_for(monkeypatch):
    """With a compiler; a slim container has none. Never on a CPU, unless asked."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(module, "Path", lambda *parts: type("Header", (), {"exists": lambda self: True})())
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert select_compile("auto", GPU) == (True, "") == select_compile(True, CPU)
    assert select_compile("auto", CPU) == (False, "") == select_compile(False, GPU)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    compile, why_not = select_compile("auto", GPU)
    assert not compile and "a C compiler (gcc or clang)" in why_not
    with pytest.raises(UserError, match="--compile true needs a C compiler"):
        select_compile(True, GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert select_compile("auto", GPU) == (False, "")


def test_auto_device_prefers_cuda_then_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device("auto").type == "cuda"
