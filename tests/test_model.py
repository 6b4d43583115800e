"""gpt/model.py is GPT-2: parameter counts as published, logits and gradients as in transformers."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt.config import GPT2_CONFIGS, GPTConfig
from gpt.model import GPT, attention


@pytest.mark.parametrize("size, parameters", [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
    ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_num_parameters_equals_the_released_model(size, parameters):
    """The tied embedding is counted once."""
    with torch.device("meta"):
        assert GPT(GPTConfig(**GPT2_CONFIGS[size])).num_parameters() == parameters


def transposed(name, tensor):
    """Return a tensor as transformers' Conv1D stores it:
    the four matrices of a block are (in, out)."""
    return tensor.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor


@pytest.mark.parametrize("n_layer, n_head, n_embd, block_size, B, T", [
    (1, 1, 8, 16, 1, 1), (3, 5, 40, 20, 3, 19), (2, 4, 64, 128, 2, 128)])
def test_logits_loss_and_gradients_equal_transformers(n_layer, n_head, n_embd, block_size, B, T):
    """Covers LayerNorm, causal attention, GELU, positions and weight tying."""
    torch.manual_seed(n_layer)
    model = GPT(GPTConfig(block_size, 211, n_layer, n_head, n_embd))
    for parameter in model.parameters():  # away from the small initial values, biases and norms too
        torch.nn.init.normal_(parameter, mean=0.02, std=0.3)
    hf_model = GPT2LMHeadModel(GPT2Config(vocab_size=211, n_positions=block_size, n_embd=n_embd,
                                          n_layer=n_layer, n_head=n_head)).eval()
    hf_model.transformer.load_state_dict(
        {name: transposed(name, p) for name, p in model.state_dict().items()})
    hf_model.tie_weights()
    idx = torch.randint(211, (B, T + 1))
    loss, logits = model(idx[:, :-1], idx[:, 1:]), model(idx[:, :-1])
    hf_logits = hf_model(idx[:, :-1]).logits
    hf_loss = F.cross_entropy(hf_logits.flatten(0, 1), idx[:, 1:].flatten())
    assert (logits - hf_logits).abs().max() <= 1e-4
    assert loss.item() == pytest.approx(hf_loss.item(), rel=1e-5)
    loss.backward()
    hf_loss.backward()
    for name, parameter in hf_model.transformer.named_parameters():
        grad = transposed(name, model.get_parameter(name).grad)
        assert (grad - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name


def test_initial_weights_follow_gpt2():
    """Standard deviation 0.02, in residual projections 0.02 / sqrt(2 n_layer):
    the first loss is ln(vocab_size)."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=5000, n_layer=8, n_head=4, n_embd=128))
    for name, value in model.state_dict().items():
        if name.endswith("bias"):
            assert torch.all(value == 0), name
        elif "ln_" in name:
            assert torch.all(value == 1), name
        else:
            expected = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert value.std().item() == pytest.approx(expected, rel=0.03), name
    idx = torch.randint(5000, (4, 64))
    assert model(idx, idx.roll(-1, 1)).item() == pytest.approx(math.log(5000), abs=0.1)


def small_model(**changes):
    torch.manual_seed(0)
    defaults = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16)
    return GPT(GPTConfig(**(defaults | changes)))


def test_dropout_is_off_in_eval_mode():
    model, idx = small_model(dropout=0.5), torch.randint(50, (2, 16))
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


@pytest.mark.parametrize("T, D, masked", [(1, 8, False), (64, 8, False), (65, 8, False),
                                          (40, 16, True)])
def test_attention_under_cpu_autocast_equals_the_formula(T, D, masked):
    """Up to 8 * D tokens use another kernel than longer or masked sequences;
    both are within bfloat16 rounding."""
    torch.manual_seed(T)
    q, k, v, grad = torch.randn(4, 2, 3, T, D, dtype=torch.float64)
    mask = torch.rand(2, 1, T, T) < 0.5 if masked else torch.ones(T, T, dtype=torch.bool)
    mask = mask.tril() | torch.eye(T, dtype=torch.bool)
    q.requires_grad_()
    expected = (q @ k.mT / math.sqrt(D)).masked_fill(~mask, -math.inf).softmax(-1) @ v
    expected_grad, = torch.autograd.grad(expected, q, grad)
    inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(*inputs, mask if masked else None)
    y_grad, = torch.autograd.grad(y, inputs[0], grad.to(y.dtype))
    assert (y - expected).norm() < 0.01 * expected.norm()
    assert (y_grad - expected_grad).norm() <= 0.02 * expected_grad.norm()


def test_attention_under_cpu_autocast_applies_dropout():
    """Half of the attention weights are zero and the others doubled:
    with all values 1 the mean stays 1."""
    q, v = torch.zeros(4, 4, 32, 8), torch.ones(4, 4, 32, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, q, v), v.bfloat16())
        y = attention(q, q, v, dropout_p=0.5)
    assert y.mean().item() == pytest.approx(1, abs=0.1) and y.std() > 0.1


def test_compiled_loss_has_no_graph_break():
    """fullgraph=True would raise at one; under autocast, at two sequence lengths."""
    model = small_model(block_size=96)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for T in (32, 96):
        idx = torch.randint(50, (2, T))
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(idx, idx)
        loss.backward()
        expected = F.cross_entropy(model(idx).flatten(0, 1), idx.flatten())
        assert loss.item() == pytest.approx(expected.item(), abs=0.01)
