"""A custom tokenizer through data preparation, training and export,
by the commands of docs/data.md."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from gpt import checkpoint
from gpt.errors import UserError
from gpt.model import GPT
from gpt.shards import find_shards, open_shard, read_meta, read_tokenizer
from gpt.text_files import assign_split
from gpt.tokenizer import Tokenizer
from scripts.eval_perplexity import read_data
from tests.conftest import TEXT, TINY, metrics, run

SPEECHES = [speech for speech in TEXT.read_text().split("\n\n") if speech.strip()]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a folder with text, tokenizer, data, a run and its export."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "speeches.jsonl").write_text(
        "".join(json.dumps({"text": speech}) + "\n" for speech in SPEECHES))
    text = ["--input", folder / "speeches.jsonl", "--val_fraction", "0.2"]
    for args in (("scripts.train_tokenizer", *text, "--vocab_size", "600",
                  "--out", folder / "tokenizer"),
                 ("scripts.prepare", *text, "--tokenizer", folder / "tokenizer",
                  "--out", folder / "data"),
                 ("scripts.train", *TINY, "--data_root", folder / "data",
                  "--log_dir", folder / "log", "--max_steps", 3, "--eval_tokens", 10**6),
                 ("scripts.export", "--log_dir", folder / "log", "--out", folder / "export")):
        done = run("-m", *args)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_tokenizer_learns_from_the_train_split_only(project):
    """A tokenizer trained on validation text would bias every val loss."""
    train = [speech for speech in SPEECHES if assign_split(speech, 0.2) == "train"]
    table = (project / "tokenizer" / "tokenizer.tiktoken").read_text()
    assert table == Tokenizer.train(train, 600).merge_table


def test_data_and_checkpoint_carry_the_tokenizer(project):
    """Later commands must not need a tokenizer flag."""
    meta = read_meta(project / "data")
    table = (project / "tokenizer" / "tokenizer.tiktoken").read_text()
    assert read_tokenizer(project / "data", meta).merge_table == table
    assert (meta["vocab_size"], meta["dtype"]) == (600, "uint16")
    content = checkpoint.load_checkpoint(project / "log" / "model_00003.pt")
    assert content["config"]["vocab_size"] == 600 and content["tokenizer"] == table
    done = run("-m", "scripts.generate", "--log_dir", project / "log", "--prompt", "Before we",
               "--max_new_tokens", 20)
    assert done.returncode == 0 and done.stdout.startswith("Before we"), done.stderr


def test_bits_per_byte_follow_the_formula(project):
    """-log2 of the probability of the validation text, divided by its bytes:
    comparable across tokenizers."""
    content = checkpoint.load_checkpoint(project / "log" / "model_00003.pt")
    model, tokenizer = GPT.from_checkpoint(content).eval(), Tokenizer(content["tokenizer"])
    tokens = torch.from_numpy(open_shard(find_shards(project / "data", "val")[0]).astype("int64"))
    n = (len(tokens) - 1) // 32
    x, y = tokens[:n * 32].view(n, 32), tokens[1:n * 32 + 1].view(n, 32)
    with torch.no_grad():
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
    bits = loss.item() / math.log(2)
    n_bytes = len(tokenizer.decode(y.flatten().tolist()).replace("<|endoftext|>", "").encode())
    bits_per_byte = metrics(project / "log", "val")[3]["bits_per_byte"]
    assert bits_per_byte == pytest.approx(bits / n_bytes, rel=1e-5)


def test_exported_tokenizer_loads_in_transformers_and_gpt(project):
    tokenizer = Tokenizer.load(project / "data")
    hf_tokenizer = AutoTokenizer.from_pretrained(project / "export")
    text = TEXT.read_text() + " naïve café 東京 🙂  \t\n\n  12345 don't I'll  'twas"
    assert hf_tokenizer(text)["input_ids"] == tokenizer.encode(text)
    assert hf_tokenizer.eos_token_id == tokenizer.end_of_text == 599
    assert checkpoint.load_checkpoint(project / "export")["tokenizer"] == tokenizer.merge_table


def test_data_of_another_tokenizer_is_rejected(project, tmp_path):
    """Token ids of one tokenizer are noise to a model trained with another."""
    with pytest.raises(UserError, match="has tokenizer bpe600-.*, but the model has gpt2"):
        read_data(str(project / "data"), Tokenizer())
    Tokenizer.train(SPEECHES, 500).save(tmp_path)
    with pytest.raises(UserError, match="names the tokenizer bpe600-.*, "
                                        "but tokenizer.tiktoken is bpe500-"):
        read_tokenizer(tmp_path, read_meta(project / "data"))
