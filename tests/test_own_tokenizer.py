"""A custom tokenizer through data preparation, training and export, by the commands of
docs/data.md."""

import json
import math

import numpy as np
import pytest
from transformers import AutoTokenizer

from gpt.checkpoint import load_checkpoint
from gpt.errors import UserError
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
    learned = Tokenizer.load(project / "tokenizer")
    assert learned.merge_table == Tokenizer.train(train, 600).merge_table


def test_data_checkpoint_and_export_carry_the_tokenizer(project):
    """Later commands must not need a tokenizer flag."""
    table = Tokenizer.load(project / "tokenizer").merge_table
    assert read_tokenizer(project / "data", read_meta(project / "data")).merge_table == table
    for source in ("log", "export"):
        checkpoint = load_checkpoint(project / source)
        assert checkpoint["config"]["vocab_size"] == 600
        assert checkpoint["tokenizer"] == table


def test_bits_per_byte_follow_the_formula(project):
    """-log2 of the probability of the validation text, divided by its bytes: comparable across
    tokenizers."""
    tokens = open_shard(find_shards(project / "data", "val")[0])
    n = (len(tokens) - 1) // 32 * 32
    text = Tokenizer.load(project / "data").decode(tokens[1:n + 1].tolist())
    n_bytes = len(text.replace("<|endoftext|>", "").encode())
    record = metrics(project / "log", "val")[3]
    bits = record["loss"] * n / math.log(2)
    assert record["bits_per_byte"] == pytest.approx(bits / n_bytes, rel=1e-5)


def test_exported_tokenizer_gives_the_same_ids_in_transformers(project):
    tokenizer = Tokenizer.load(project / "data")
    hf_tokenizer = AutoTokenizer.from_pretrained(project / "export")
    text = TEXT.read_text() + " naïve café 東京 🙂  \t\n\n  12345 don't I'll  'twas"
    assert np.array_equal(hf_tokenizer(text)["input_ids"], tokenizer.encode(text))
    assert hf_tokenizer.eos_token_id == tokenizer.end_of_text == 599


def test_data_of_another_tokenizer_is_rejected(project, tmp_path):
    """Token ids of one tokenizer are noise to a model trained with another."""
    with pytest.raises(UserError, match="has tokenizer bpe600-.*, but the model has gpt2"):
        read_data(str(project / "data"), Tokenizer())
    Tokenizer.train(SPEECHES, 500).save(tmp_path)
    with pytest.raises(UserError, match="names the tokenizer bpe600-.* is bpe500-"):
        read_tokenizer(tmp_path, read_meta(project / "data"))
