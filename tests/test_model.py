"""gpt/model.py is GPT-2: parameter counts as published, logits as in transformers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from gpt.config import GPT2_CONFIGS, GPTConfig
from gpt.errors import UserError
from gpt.model import GPT, attention


@pytest.mark.parametrize("size, parameters", [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
                                              ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_parameter_counts(size, parameters):
    """Those of the released models, the tied embedding counted once."""
    with torch.device("meta"):
        assert GPT(GPTConfig(**GPT2_CONFIGS[size])).num_parameters() == parameters


def hugging_face(model: GPT) -> GPT2LMHeadModel:
    """The same weights in transformers' GPT-2: the names are equal, Conv1D stores matrices transposed."""
    c = model.config
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd,
                                        n_layer=c.n_layer, n_head=c.n_head)).eval()
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {name: value.T if name.endswith(transposed) else value for name, value in model.state_dict().items()}
    theirs.transformer.load_state_dict(weights)  # strict: every name must be there
    theirs.tie_weights()
    return theirs


@pytest.mark.parametrize("n_layer, n_head, n_embd, block_size, B, T", [
    (1, 1, 8, 16, 1, 1), (2, 3, 24, 32, 2, 32), (3, 5, 40, 20, 3, 19), (2, 4, 64, 128, 2, 100)])
def test_logits_and_loss_equal_transformers(n_layer, n_head, n_embd, block_size, B, T):
    """Any mistake in norm, attention, GELU, positions or tying would show."""
    torch.manual_seed(n_layer)
    model = GPT(GPTConfig(block_size, 211, n_layer, n_head, n_embd)).eval()
    for parameter in model.parameters():  # away from the small initial values, biases and norms too
        torch.nn.init.normal_(parameter, mean=0.02, std=0.3)
    theirs = hugging_face(model)
    idx = torch.randint(211, (B, T + 1))
    with torch.no_grad():
        expected = theirs(idx[:, :-1]).logits
        logits = model(idx[:, :-1])
        loss = model(idx[:, :-1], idx[:, 1:])
    assert (logits - expected).abs().max() <= 1e-4
    reference = torch.nn.functional.cross_entropy(expected.flatten(0, 1), idx[:, 1:].flatten())
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)


def test_initial_weights():
    """GPT-2's: 0.02, residual projections 0.02 / sqrt(2 n_layer), so the first loss is about ln(vocab_size)."""
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


def test_nothing_looks_ahead():
    """A model that sees the next token learns nothing."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16)).eval()
    idx = torch.randint(50, (1, 16))
    changed = idx.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 50
    before, after = model(idx), model(changed)
    assert torch.allclose(before[0, :9], after[0, :9], atol=1e-6)
    assert not torch.allclose(before[0, 9], after[0, 9], atol=1e-3)


def test_dropout_is_for_training_only():
    """An evaluation with dropout would be noise; a training without it would ignore the setting."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16, dropout=0.5))
    idx = torch.randint(50, (2, 16))
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_too_long_a_context_is_an_error():
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(ValueError, match="17 tokens are more than block_size 16"):
        model(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("bad, words", [(dict(n_head=5), "n_embd 768 is not divisible by n_head 5"),
                                        (dict(n_layer=0), "n_layer is 0"), (dict(dropout=1.0), "dropout is 1.0"),
                                        (dict(block_size=-1), "block_size is -1")])
def test_impossible_shapes_are_refused(bad, words):
    with pytest.raises(UserError, match=words):
        GPTConfig(**bad)


@pytest.mark.parametrize("T, D", [(1, 8), (5, 8), (64, 8), (65, 8), (40, 16)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_under_cpu_autocast_matches_the_plain_formula(T, D, masked):
    """Short and long sequences take different ways in bfloat16; both are within its rounding of float64."""
    torch.manual_seed(T)
    q, k, v, towards = torch.randn(4, 2, 3, T, D, dtype=torch.float64)
    mask = torch.rand(2, 1, T, T) < 0.5 if masked else torch.ones(T, T, dtype=torch.bool)
    mask = mask.tril() | torch.eye(T, dtype=torch.bool)
    q.requires_grad_()
    scores = (q @ k.mT / math.sqrt(D)).masked_fill(~mask, -math.inf)
    expected = scores.softmax(-1) @ v
    expected_grad, = torch.autograd.grad(expected, q, towards)
    inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(*inputs, mask if masked else None)
    grad, = torch.autograd.grad(y, inputs[0], towards.to(y.dtype))
    assert (y - expected).norm() < 0.01 * expected.norm()
    assert (grad - expected_grad).norm() <= 0.02 * expected_grad.norm()


def test_attention_drops_out_under_cpu_autocast():
    """Half of the attention weights are zero and the others doubled: with all values 1 the mean stays 1."""
    q, v = torch.zeros(4, 4, 32, 8), torch.ones(4, 4, 32, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, q, v), v.bfloat16())
        y = attention(q, q, v, dropout_p=0.5)
    assert y.mean().item() == pytest.approx(1, abs=0.1) and y.std() > 0.1


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_compiled_loss_has_no_graph_break(precision, tmp_path):
    """fullgraph=True raises at a graph break; alone and inside DDP, as scripts/train.py wraps it, at two lengths."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=96, vocab_size=5000, n_layer=3, n_head=4, n_embd=192))  # more than a bucket of DDP
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for wrapped in (compiled, DistributedDataParallel(compiled, bucket_cap_mb=1)):
            for T in (32, 96):
                idx = torch.randint(5000, (2, T))
                with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                    loss = wrapped(idx, idx)
                    expected = F.cross_entropy(model(idx).flatten(0, 1).float(), idx.flatten())
                loss.backward()
                assert loss.item() == pytest.approx(expected.item(), abs=1e-5 if precision == torch.float32 else 0.01)
    finally:
        torch.distributed.destroy_process_group()
