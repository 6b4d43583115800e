"""GPT-2 in Hugging Face's format, against transformers:
gpt/pretrained.py, scripts.export, scripts.validate."""

import copy
import dataclasses
import json
import re
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gpt.checkpoint import load_checkpoint, save_model
from gpt.config import GPTConfig
from gpt.errors import UserError
from gpt.model import GPT
from gpt.pretrained import find_tokenizer, save_pretrained
from gpt.tokenizer import Tokenizer
from scripts import cli, export, validate
from tests.conftest import ROOT, TEXT, random_gpt2, run


@pytest.fixture(scope="module")
def hf_model():
    """Return a random GPT-2 of transformers that runs the same PyTorch kernels as ours:
    fused attention and GELU."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        n_layer=2, n_head=3, n_embd=24, n_positions=48, vocab_size=97, initializer_range=0.3,
        activation_function="gelu_pytorch_tanh", attn_implementation="sdpa")).eval()


def assert_same_logits(model, hf_model, tolerance=0.0):
    """Compare the logits of three sequences in float32; tolerance 0 means bit by bit."""
    idx = torch.randint(model.config.vocab_size, (3, model.config.block_size))
    with torch.no_grad():
        logits, hf_logits = model(idx), hf_model(idx).logits
    assert hf_logits.std() > 0.01
    difference = (logits - hf_logits).abs().max().item()
    print(f"\nlargest difference: {difference:.1e}")
    assert difference <= tolerance


def test_logits_match_transformers(tmp_path):
    """By default transformers computes GPT-2's GELU in Python, which rounds differently."""
    random_gpt2(tmp_path, n_layer=5, n_head=9, n_embd=63, n_positions=31, initializer_range=0.3)
    assert_same_logits(GPT.from_pretrained(tmp_path), GPT2LMHeadModel.from_pretrained(tmp_path),
                       tolerance=1e-4)


def old_weights(hf_model):
    """Return the state dict as in OpenAI's pickles, with causal masks."""
    masks = {"bias": torch.ones(1, 1, 48, 48).tril(), "masked_bias": torch.tensor(-1e4)}
    return hf_model.state_dict() | {f"transformer.h.{i}.attn.{name}": masks[name]
                                    for i in range(2) for name in masks}


SAVE = {
    "sharded": lambda model, folder: model.save_pretrained(folder, max_shard_size="40kB"),
    "float16": lambda model, folder: model.half().save_pretrained(folder),
    "no prefix": lambda model, folder: model.transformer.save_pretrained(folder),
    "pickle": lambda model, folder: torch.save(old_weights(model), folder / "pytorch_model.bin"),
}


@pytest.mark.parametrize("file_format", SAVE)
def test_load_reads_every_file_format(hf_model, tmp_path, file_format):
    """The logits equal those of the saved model bit by bit."""
    hf_model = copy.deepcopy(hf_model)
    hf_model.config.save_pretrained(tmp_path)
    SAVE[file_format](hf_model, tmp_path)
    assert_same_logits(GPT.from_pretrained(tmp_path), hf_model.float())


def test_from_pretrained_applies_overrides(hf_model, tmp_path):
    """Dropout is set as passed; a smaller block_size keeps the first positions."""
    hf_model.save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path / "model.safetensors")["config"]["n_embd"] == 24
    model = GPT.from_pretrained(tmp_path, dropout=0.5, block_size=7)
    assert model.config.dropout == 0.5 and not model.training
    assert_same_logits(model, hf_model)


@pytest.mark.parametrize("settings, tensors, message", [
    ({"activation_function": "gelu"}, {}, "activation_function 'gelu' is not supported"),
    ({"model_type": "llama"}, {}, "model_type 'llama'"),
    ({}, {"transformer.wpe.weight": torch.ones(40, 24)}, "mismatched weight"),
    ({}, {"transformer.h.1.mlp.c_fc.bias": None}, "missing weight transformer.h.1.mlp.c_fc.bias"),
    ({}, {"lm_head.weight": torch.ones(97, 24)}, "lm_head.weight differs"),
    ({}, {"transformer.wpe.weight": torch.full((48, 24), torch.nan)}, "infinite or NaN"),
    ({"n_layer": 1}, {}, "unexpected weight transformer.h.1."),
])
def test_load_rejects_unsupported_models_by_name(hf_model, tmp_path, settings, tensors, message):
    hf_model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf_model.config.to_dict() | settings))
    tensors = load_file(tmp_path / "model.safetensors") | tensors
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None},
              tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"^cannot load .*{re.escape(message)}.*$"):
        load_checkpoint(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n"


@pytest.mark.parametrize("name, content, message", [
    ("model.safetensors", POINTER, "Git LFS pointer, run `git lfs pull`"),
    ("tokenizer.json", b"{", "the tokenizer in .* is damaged"),
])
def test_load_names_what_is_wrong_with_a_folder(hf_model, tmp_path, name, content, message):
    if name == "tokenizer.json":
        hf_model.save_pretrained(tmp_path)
    hf_model.config.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^.*{message}.*$"):
        load_checkpoint(tmp_path)


def test_load_names_an_unreachable_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="^cannot load 'me/nothing' .*cached snapshot"):
        load_checkpoint("me/nothing")


@pytest.mark.parametrize("repository", ["nanoGPT", "nanoGPT without biases", "build-nanogpt"])
def test_checkpoints_of_nanogpt_are_loaded(tmp_path, monkeypatch, repository):
    """The files here have the same names, types and padded vocabulary as theirs."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50304, n_layer=2, n_head=2, n_embd=8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = {f"transformer.{name}": weight for name, weight in model.state_dict().items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    sizes = dict(block_size=16, vocab_size=50304, n_layer=2, n_head=2, n_embd=8)
    if repository == "build-nanogpt":
        # Its file is a script: the class is pickled as __main__.GPTConfig.
        its_class = dataclasses.make_dataclass("GPTConfig", sizes, namespace={
            "__module__": "__main__"})
        monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", its_class, raising=False)
        content = {"model": weights, "config": its_class(**sizes), "step": 19072, "val_loss": 3.07}
    else:
        if repository == "nanoGPT without biases":
            for name in [name for name in weights if name.endswith("bias")]:
                weights.pop(name).zero_()
        weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        weights = {f"_orig_mod.{name}": weight for name, weight in weights.items()}
        content = {"model": weights, "optimizer": {"state": {}}, "config": {"device": "cuda"},
                   "model_args": sizes | {"bias": True, "dropout": 0.0}, "iter_num": 19072,
                   "best_val_loss": torch.tensor(3.07)}
    torch.save(content, tmp_path / "ckpt.pt")
    checkpoint = load_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint["step"] == 19072 and checkpoint["tokenizer"] == "gpt2"
    idx = torch.randint(50304, (3, 16))
    with torch.no_grad():
        assert torch.equal(GPT.from_checkpoint(checkpoint)(idx), model(idx))


def test_find_tokenizer_compares_vocabularies(tmp_path):
    """A vocabulary of 50,257 tokens may not be GPT-2's;
    for our own tokenizers see tests/test_own_tokenizer.py."""
    vocab = Tokenizer().vocab()
    merges = "\n".join(map(" ".join, Tokenizer().merges()))
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    reversed_vocab = dict(zip(vocab, reversed(vocab.values()), strict=True))
    for content, expected in ((vocab, "gpt2"), (reversed_vocab, None)):
        (tmp_path / "vocab.json").write_text(json.dumps(content))
        assert find_tokenizer(tmp_path, 50257) == expected
    assert find_tokenizer(tmp_path / "empty", 50257) == "gpt2"
    assert find_tokenizer(tmp_path / "empty", 97) is None


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Return a log_dir with the checkpoint and the log of a run,
    and its export by scripts.export."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=16, dropout=0.2))
    for parameter in model.parameters():  # biases too
        torch.nn.init.normal_(parameter, std=0.3)
    save_model(folder / "model_00002.pt", model, step=2, tokenizer="gpt2", train_config={
        "data_root": "my_data", "total_batch_size": 256, "init_from": "scratch", "max_lr": 0.01})
    (folder / "metrics.jsonl").write_text('{"split": "val", "step": 2, "loss": 8.5}\n')
    done = run("-m", "scripts.export", "--log_dir", folder, "--out", folder / "export")
    assert done.returncode == 0 and "model_00002.pt: step 2" in done.stderr, done.stderr
    return folder


def test_export_has_the_same_logits_in_transformers_and_loads_again(run_dir):
    saved, loaded = load_checkpoint(run_dir / "model_00002.pt"), load_checkpoint(run_dir / "export")
    hf_model = GPT2LMHeadModel.from_pretrained(run_dir / "export",
                                               activation_function="gelu_pytorch_tanh")
    model = GPT.from_checkpoint(saved | {"model": dict(saved["model"])})
    assert_same_logits(model.eval(), hf_model)
    assert hf_model.config.n_ctx == 32  # llama.cpp's converter reads n_ctx
    assert hf_model.config.resid_pdrop == 0.2
    assert hf_model.generation_config.eos_token_id == 50256
    assert loaded["tokenizer"] == "gpt2" and loaded["config"] == saved["config"] | {"dropout": 0.0}
    assert loaded["model"].keys() == saved["model"].keys()
    assert all(torch.equal(loaded["model"][name], tensor)
               for name, tensor in saved["model"].items())
    card = (run_dir / "export" / "README.md").read_text()
    for text in ("`my_data` for 2 steps (512 tokens)", "Validation loss: 8.5000", "max_lr: 0.01",
                 "2 layers, 2 heads"):
        assert text in card


def test_export_has_the_same_token_ids_in_transformers(run_dir):
    hf_tokenizer, tokenizer = AutoTokenizer.from_pretrained(run_dir / "export"), Tokenizer()
    assert hf_tokenizer.model_max_length == 32 and hf_tokenizer.eos_token == "<|endoftext|>"
    for text in (TEXT.read_text(),
                 "A  b\n\n\t c'll 12<|endoftext|>émigré 東京 🙂 don't", " "):
        ids = tokenizer.encode(text, allow_special=True)
        assert hf_tokenizer(text).input_ids == ids
        assert hf_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_export_is_all_or_nothing(run_dir, tmp_path):
    """A folder that is not empty is rejected, and a full disk leaves no partial export."""
    with pytest.raises(UserError, match="exists and is not empty"):
        export.main(export.ExportConfig(log_dir=str(run_dir), out=str(run_dir)))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # bytes per file
    try:
        with pytest.raises(UserError, match="cannot write .*File too large"):
            export.main(export.ExportConfig(log_dir=str(run_dir), out=str(tmp_path / "out")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


def test_load_and_save_need_little_more_memory_than_the_weights(tmp_path):
    """At most 1.2 times their size, without the pages of the mapped file, which the system can
    drop. A model of raw token ids is exported without a tokenizer."""
    code = """if True:
        import pathlib, re, sys
        from gpt.pretrained import load_pretrained, save_pretrained
        from transformers import GPT2LMHeadModel
        def bytes_of(name):
            status = open("/proc/self/status").read()
            return 1024 * int(re.search(name + r":\\s+(\\d+)", status)[1])
        before = bytes_of("RssAnon")
        checkpoint = load_pretrained(sys.argv[1])
        print(bytes_of("VmHWM") - bytes_of("RssFile") - before)
        open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts anew
        before += bytes_of("RssFile")
        save_pretrained(checkpoint, pathlib.Path(sys.argv[2]))
        print(bytes_of("VmHWM") - before)
    """
    config, copy_dir = GPTConfig(vocab_size=100), tmp_path / "copy"
    copy_dir.mkdir()
    save_pretrained({"model": GPT(config).state_dict(), "config": vars(config), "tokenizer": None},
                    tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    done = subprocess.run([sys.executable, "-c", code, tmp_path, copy_dir], cwd=ROOT,
                          capture_output=True, text=True)
    assert max(map(int, done.stdout.split())) <= 1.2 * size, done.stdout + done.stderr
    assert not list(copy_dir.glob("tokenizer*"))


def test_validate_reports_agreement(run_dir):
    done = run("-m", "scripts.validate", "--model", run_dir / "model_00002.pt",
               "--prompt", "Hello world", "--top", "3")
    assert done.returncode == 0 and "the models agree" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("Hello world") == 2 and done.stdout.count("%") == 6


def test_validate_exits_with_1_on_a_difference(gpt2_folder, monkeypatch, capsys):
    """One weight differs."""
    checkpoint = load_checkpoint(gpt2_folder)
    checkpoint["model"]["h.1.mlp.c_fc.bias"][3] += 0.1
    monkeypatch.setattr(validate, "load_checkpoint", lambda name: checkpoint)
    monkeypatch.setattr(sys, "argv", ["validate", "--model", str(gpt2_folder)])
    with pytest.raises(SystemExit) as exited:
        cli.run_cli(validate.main, validate.ValidateConfig)
    assert exited.value.code == 1 and "the models DISAGREE" in capsys.readouterr().out
