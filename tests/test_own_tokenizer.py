"""The commands of docs/data.md with a tokenizer of one's own: data, a run, its evaluation and its
export, against transformers."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from gpt.checkpoint import load_checkpoint
from gpt.errors import UserError
from gpt.model import GPT
from gpt.text_files import assign_split
from gpt.tokenizer import Tokenizer
from scripts.eval_perplexity import read_data
from tests.conftest import TINY, metrics, run
from tests.test_pretrained import assert_same_logits
from tests.test_text_files import SPEECHES, jsonl, write
from tests.test_tokenizer import TEXTS


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a folder with text, tokenizer, data, a run and its export."""
    folder = tmp_path_factory.mktemp("project")
    text = ["--input", write(folder / "a.jsonl", jsonl(SPEECHES)), "--val_fraction", 0.2, "--out"]
    for args in (("scripts.train_tokenizer", *text, folder / "tokenizer", "--vocab_size", 600),
                 ("scripts.prepare", *text, folder / "data", "--tokenizer", folder / "tokenizer"),
                 ("scripts.train", *TINY, "--data_root", folder / "data", "--log_dir",
                  folder / "log", "--max_steps", 3, "--eval_tokens", 10**6),
                 ("scripts.export", "--log_dir", folder / "log", "--out", folder / "export")):
        done = run("-m", *args)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_tokenizer_learns_from_the_train_split_only(project):
    """A tokenizer trained on validation text would bias every val loss."""
    train = [speech for speech in SPEECHES if assign_split(speech, 0.2) == "train"]
    learned = Tokenizer.load(project / "tokenizer")
    assert learned.merge_table == Tokenizer.train(train, 600).merge_table


def test_bits_per_byte_follow_the_formula(project):
    """-log2 of the probability of the validation text, divided by its bytes: comparable across
    tokenizers."""
    tokens = np.load(project / "data" / "val_00000.npy")
    n = (len(tokens) - 1) // 32 * 32
    text = Tokenizer.load(project / "data").decode(tokens[1:n + 1])
    n_bytes = len(text.replace("<|endoftext|>", "").encode())
    record = metrics(project / "log", "val")[3]
    bits = record["loss"] * n / math.log(2)
    assert record["bits_per_byte"] == pytest.approx(bits / n_bytes, rel=1e-5)


def test_export_has_the_same_logits_in_transformers_and_loads_again(project):
    """With the tokenizer: later commands need no flag for it."""
    saved, export = load_checkpoint(project / "log"), project / "export"
    model = GPT.from_checkpoint(load_checkpoint(project / "log")).eval()
    hf_model = GPT2LMHeadModel.from_pretrained(export, activation_function="gelu_pytorch_tanh")
    assert_same_logits(model, hf_model)
    assert hf_model.config.n_ctx == 32  # llama.cpp's converter reads n_ctx
    assert hf_model.generation_config.eos_token_id == 599
    loaded = load_checkpoint(export)
    assert loaded["config"] == saved["config"]
    torch.testing.assert_close(loaded["model"], saved["model"], rtol=0, atol=0)
    table = Tokenizer.load(project / "tokenizer").merge_table
    assert loaded["tokenizer"] == saved["tokenizer"] == table
    loss = metrics(project / "log", "val")[3]["loss"]
    assert f"Validation loss: {loss:.4f}" in (export / "README.md").read_text()


def test_exported_tokenizer_gives_the_same_ids_in_transformers(project):
    tokenizer = Tokenizer.load(project / "data")
    hf_tokenizer = AutoTokenizer.from_pretrained(project / "export")
    text = TEXTS + "<|endoftext|>"
    assert hf_tokenizer(text).input_ids == tokenizer.encode(text, allow_special=True)
    assert hf_tokenizer.eos_token == "<|endoftext|>" and hf_tokenizer.model_max_length == 32


def test_validate_reports_agreement(project):
    done = run("-m", "scripts.validate", "--model", project / "log")
    assert done.returncode == 0 and "the models agree" in done.stdout, done.stdout + done.stderr


def test_data_of_another_tokenizer_is_rejected(project):
    """Token ids of one tokenizer are noise to a model trained with another."""
    with pytest.raises(UserError, match="has tokenizer bpe600-.*, but the model has gpt2"):
        read_data(str(project / "data"), Tokenizer())
