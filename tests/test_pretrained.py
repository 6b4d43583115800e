"""GPT-2 in Hugging Face's format, against transformers, and checkpoints of other repositories:
gpt/pretrained.py, scripts.export, scripts.validate. For exports of runs see
tests/test_own_tokenizer.py."""

import json
import resource
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from gpt.checkpoint import load_checkpoint
from gpt.config import GPTConfig
from gpt.errors import UserError
from gpt.model import GPT
from gpt.pretrained import find_tokenizer
from gpt.tokenizer import Tokenizer
from scripts import export, validate
from tests.conftest import random_gpt2


@pytest.fixture
def folder(tmp_path):
    """Return a random GPT-2 of transformers with clearly different logits."""
    return random_gpt2(tmp_path / "gpt2", vocab_size=97, initializer_range=0.3,
                       activation_function="gelu_pytorch_tanh")


@pytest.fixture
def hf_model(folder):
    return GPT2LMHeadModel.from_pretrained(folder)


def assert_same_logits(model, hf_model):
    """Compare the logits of three sequences."""
    idx = torch.randint(model.config.vocab_size, (3, model.config.block_size))
    with torch.no_grad():
        torch.testing.assert_close(model(idx), hf_model(idx).logits, rtol=1e-4, atol=1e-4)


def test_load_reads_several_files_in_float16(hf_model, tmp_path):
    hf_model.half().save_pretrained(tmp_path, max_shard_size="40kB")
    assert_same_logits(GPT.from_pretrained(tmp_path), hf_model.float())


def test_load_reads_old_names_and_causal_masks(hf_model, folder):
    """As in GPT-2's files on the Hub."""
    masks = {"h.0.attn.bias": torch.ones(1, 1, 48, 48).tril(),
             "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(hf_model.transformer.state_dict() | masks, folder / "model.safetensors",
              metadata={"format": "pt"})
    assert_same_logits(GPT.from_pretrained(folder), hf_model)


def test_from_pretrained_applies_overrides(hf_model, folder):
    """Dropout is set as passed; a smaller block_size keeps the first positions."""
    assert load_checkpoint(folder / "model.safetensors")["config"]["n_embd"] == 24
    model = GPT.from_pretrained(folder, dropout=0.5, block_size=7)
    assert model.config.dropout == 0.5 and not model.training
    assert_same_logits(model, hf_model)


@pytest.mark.parametrize("settings, tensors, message", [
    ({"activation_function": "gelu"}, {}, "activation_function 'gelu' is not supported"),
    ({"n_layer": 3}, {}, "missing weight transformer.h.2"),
    ({"n_layer": 1}, {}, "unexpected weight transformer.h.1"),
    ({}, {"transformer.wpe.weight": torch.ones(40, 24)}, "mismatched weight"),
    ({}, {"transformer.wpe.weight": torch.full((48, 24), torch.nan)}, "infinite or NaN"),
    ({}, {"lm_head.weight": torch.ones(97, 24)}, "lm_head.weight differs"),
])
def test_load_rejects_unsupported_models_by_name(folder, settings, tensors, message):
    config, weights = folder / "config.json", folder / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    save_file(load_file(weights) | tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"^cannot load .*{message}"):
        load_checkpoint(folder)


def test_load_names_what_is_wrong_with_a_folder(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer in .* is damaged"):
        load_checkpoint(folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="Git LFS pointer, run `git lfs pull`"):
        load_checkpoint(folder)


def test_load_names_an_unreachable_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="^cannot load 'me/nothing' .*cached snapshot"):
        load_checkpoint("me/nothing")


SIZES = dict(block_size=16, vocab_size=50304, n_layer=2, n_head=2, n_embd=8)


@pytest.fixture
def weights():
    """Return random weights by our names."""
    state = GPT(GPTConfig(**SIZES)).state_dict()
    return {name: torch.randn(state[name].shape) for name in state}


def assert_loads(content, weights, path):
    torch.save(content, path)
    checkpoint = load_checkpoint(path)
    assert checkpoint["step"] == 19072 and checkpoint["tokenizer"] == "gpt2"
    torch.testing.assert_close(checkpoint["model"], weights, rtol=0, atol=0)


def test_checkpoints_of_nanogpt_are_loaded(weights, tmp_path):
    """Compiled, with a causal mask, a padded vocabulary and, as by default, without biases."""
    saved = {"_orig_mod.lm_head.weight": weights["wte.weight"],
             "_orig_mod.transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16).tril()}
    for name in weights:
        if name.endswith("bias"):
            weights[name].zero_()
        else:
            saved[f"_orig_mod.transformer.{name}"] = weights[name]
    content = {"model": saved, "model_args": SIZES | {"bias": False}, "iter_num": 19072}
    assert_loads(content, weights, tmp_path / "ckpt.pt")


def test_checkpoints_of_build_nanogpt_are_loaded(weights, tmp_path, monkeypatch):
    """Its file is a script: the class of its config is pickled as __main__.GPTConfig."""
    saved = {f"transformer.{name}": weights[name] for name in weights}
    saved["lm_head.weight"] = weights["wte.weight"]
    its_class = type("GPTConfig", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", its_class, raising=False)
    config = its_class()
    vars(config).update(SIZES)
    content = {"model": saved, "config": config, "step": 19072}
    assert_loads(content, weights, tmp_path / "model_19072.pt")


def test_find_tokenizer_compares_vocabularies(tmp_path):
    """A vocabulary of 50,257 tokens may not be GPT-2's."""
    gpt2 = Tokenizer()
    vocab = gpt2.vocab()
    other = dict(zip(vocab, reversed(vocab.values()), strict=True))
    for each, expected in ((vocab, "gpt2"), (other, None)):
        GPT2Tokenizer(each, gpt2.merges()).save_pretrained(tmp_path)
        assert find_tokenizer(tmp_path, 50257) == expected


def test_export_is_all_or_nothing(folder, tmp_path):
    """A folder that is not empty is rejected, and a full disk leaves no partial export."""
    config = export.ExportConfig(checkpoint=str(folder), out=str(folder))
    with pytest.raises(UserError, match="exists and is not empty"):
        export.main(config)
    config.out = str(tmp_path / "out")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))  # bytes per file
    try:
        with pytest.raises(UserError, match="cannot write .*File too large"):
            export.main(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == [folder]


def test_validate_exits_with_1_on_a_difference(gpt2_folder, monkeypatch, capsys):
    """One weight differs."""
    checkpoint = load_checkpoint(gpt2_folder)
    checkpoint["model"]["h.1.mlp.c_fc.bias"][3] += 0.1
    monkeypatch.setattr(validate, "load_checkpoint", lambda name: checkpoint)
    assert validate.main(validate.ValidateConfig(str(gpt2_folder))) == 1
    assert "the models DISAGREE" in capsys.readouterr().out
