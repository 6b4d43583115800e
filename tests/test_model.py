"""gpt/model.py is GPT-2: parameter counts as published, loss and gradients as in transformers."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt.config import GPT2_CONFIGS, GPTConfig
from gpt.model import GPT, attention
from gpt.pretrained import TRANSPOSED


def small_model(**changes):
    torch.manual_seed(0)
    sizes = dict(block_size=20, vocab_size=50, n_layer=2, n_head=3, n_embd=24)
    return GPT(GPTConfig(**(sizes | changes)))


@pytest.mark.parametrize("size, parameters", [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
    ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_sizes_have_the_parameters_of_the_released_models(size, parameters):
    """The tied embedding is counted once."""
    with torch.device("meta"):
        assert GPT(GPTConfig(**GPT2_CONFIGS[size])).num_parameters() == parameters


def test_loss_and_gradients_equal_those_of_transformers(tmp_path):
    """With random biases and layer norms, too. test_pretrained.py compares logits."""
    torch.manual_seed(0)
    hf_model = GPT2LMHeadModel(GPT2Config(
        vocab_size=211, n_positions=20, n_layer=3, n_head=5, n_embd=40)).eval()
    for parameter in hf_model.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.3)
    hf_model.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    idx = torch.randint(211, (3, 20))
    loss, hf_loss = model(idx[:, :-1], idx[:, 1:]), hf_model(idx, labels=idx).loss
    assert loss.item() == pytest.approx(hf_loss.item(), rel=1e-5)
    loss.backward()
    hf_loss.backward()
    for name, parameter in model.named_parameters():
        expected = hf_model.transformer.get_parameter(name).grad
        if name.endswith(TRANSPOSED):
            expected = expected.T
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), name


def test_dropout_is_off_in_eval_mode():
    model, idx = small_model(dropout=0.5), torch.randint(50, (2, 16))
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


@pytest.mark.parametrize("T, masked", [(64, False), (65, False), (40, True)])
def test_attention_under_cpu_autocast_is_within_the_rounding_of_bfloat16(T, masked):
    """Up to 8 x 8 tokens, without a mask, it is not fused."""
    torch.manual_seed(0)
    qkv = torch.randn(3, 4, 2, T, 8)
    mask = (torch.rand(4, 1, T, T).tril() + torch.eye(T) > 0.5) if masked else None
    expected = F.scaled_dot_product_attention(*qkv, mask, is_causal=not masked)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(*qkv.bfloat16(), mask)
    assert (y - expected).norm() < 0.01 * expected.norm()


def test_compiled_loss_has_no_graph_break():
    """fullgraph=True would raise at one; a second length makes the shapes dynamic."""
    model = small_model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for T in (8, 20):
        idx = torch.randint(50, (2, T))
        with torch.autocast("cpu", torch.bfloat16):
            loss, expected = compiled(idx, idx), model(idx, idx)
        assert loss.item() == pytest.approx(expected.item())
