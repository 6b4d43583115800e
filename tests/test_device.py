"""gpt/device.py: what "auto" selects on machines that these tests do not run on."""

import pytest
import torch

from gpt.device import find_micro_batch_size, select_compile, select_device, select_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_precision_is_a_16_bit_dtype_if_native(monkeypatch):
    """Emulated on a CPU, bf16 is several times slower."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert select_precision("auto", GPU) == "fp16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert select_precision("auto", GPU) == "bf16"
    for name, expected in (("avx512_f", "float32"), ("avx512_bf16", "bf16"), ("amx_bf16", "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        assert select_precision("auto", CPU) == expected


@pytest.mark.parametrize("compiler, expected", [("clang", True), (None, False)])
def test_auto_compiles_on_a_gpu_if_there_is_a_compiler(monkeypatch, compiler, expected):
    """Slim containers have none."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr("shutil.which", lambda name: name == compiler)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert select_compile("auto", GPU) is expected


@pytest.mark.parametrize("limit, expected", [(1000, 96), (95, 64), (0, 1)])
def test_micro_batch_is_the_largest_divisor_that_fits(limit, expected):
    """Of 192 sequences, at most 100 at a time, on a device with room for `limit`."""
    sizes = range(100, 1, -1)
    assert find_micro_batch_size(192, sizes, lambda size: size <= limit) == expected


def test_a_machine_with_two_gpus_uses_the_first_or_the_selected_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert select_device("auto").type == "cuda"
    assert select_device("cuda:1") == current[0] == torch.device("cuda", 1)
