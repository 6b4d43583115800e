"""gpt/loss.py against cross-entropy over all logits."""

import json

import pytest
import torch
import torch.nn.functional as F

from gpt.loss import CHUNK_SIZE, linear_cross_entropy


def full_logits_loss(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def make_inputs(N, V, C):
    """Return random hidden states, LM head and targets."""
    torch.manual_seed(0)
    return (torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True),
            torch.randint(V, (N,)))


def relative_errors(loss, x, weight, targets):
    """Return the errors of the loss and of its gradients relative to float64."""
    expected = full_logits_loss(x.double(), weight.double(), targets)
    # 3: the incoming gradient is used, not assumed to be 1
    grads = torch.autograd.grad(3 * loss, (x, weight))
    expected_grads = torch.autograd.grad(3 * expected, (x, weight))
    pairs = [(loss, expected), *zip(grads, expected_grads, strict=True)]
    return [((value - reference).norm() / reference.norm()).item() for value, reference in pairs]


@pytest.mark.parametrize("N, V", [(1, 7), (CHUNK_SIZE["cpu"], 64), (2 * CHUNK_SIZE["cpu"] + 1, 70)])
def test_loss_and_gradients_equal_those_of_full_logits(N, V):
    """Chunks, and gradients computed in the forward pass, are exact."""
    inputs = make_inputs(N, V, 8)
    loss = linear_cross_entropy(*inputs)
    assert max(relative_errors(loss, *inputs)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_under_autocast_errs_no_more_than_full_logits(dtype):
    """Gradients of a mean over many tokens do not vanish in fp16."""
    inputs = make_inputs(2 * CHUNK_SIZE["cpu"] + 1, 503, 32)
    with torch.autocast("cpu", dtype):
        loss, reference = linear_cross_entropy(*inputs), full_logits_loss(*inputs)
    assert loss.dtype == torch.float32
    errors, most = relative_errors(loss, *inputs), relative_errors(reference, *inputs)
    assert errors[0] < 1e-3
    assert errors[1] < 1.1 * most[1]
    assert errors[2] < 1.1 * most[2]


def test_memory_is_less_than_half_of_that_for_full_logits(tmp_path):
    """Every allocation of a forward and backward pass counts."""
    inputs = make_inputs(4096, 8000, 32)
    peaks = []
    for loss in (linear_cross_entropy, full_logits_loss):
        with torch.profiler.profile(profile_memory=True) as profile:
            loss(*inputs).backward()
        profile.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        peaks.append(max(event["args"]["Total Allocated"] for event in events
                         if event["name"] == "[memory]"))
    print(f"peak memory {peaks[0] / 1e6:.0f} MB, with full logits {peaks[1] / 1e6:.0f} MB")
    assert peaks[0] < 0.5 * peaks[1]
