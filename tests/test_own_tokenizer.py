"""A tokenizer of one's own, from text to a folder for other tools."""

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import checkpoint
from gpt.errors import UserError
from gpt.model import GPT
from gpt.shards import find_shards, open_shard, read_meta, read_tokenizer
from gpt.text_files import assign_split
from gpt.tokenizer import Tokenizer
from tests.conftest import TEXT, TINY, assert_refused, metrics, run

LEARNED = Tokenizer.train([TEXT.read_text()[:20000]], 500)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Text, tokenizer, data, a run and its export, by the commands of the README."""
    folder = tmp_path_factory.mktemp("project")
    speeches = [speech for speech in TEXT.read_text().split("\n\n") if speech.strip()]
    (folder / "speeches.jsonl").write_text("".join(json.dumps({"text": speech}) + "\n" for speech in speeches))
    text = ["--input", folder / "speeches.jsonl", "--val_fraction", "0.2"]
    for words in (("scripts.train_tokenizer", *text, "--vocab_size", "600", "--out", folder / "tokenizer"),
                  ("scripts.prepare", *text, "--tokenizer", folder / "tokenizer", "--out", folder / "data"),
                  ("scripts.train", *TINY, "--data_root", folder / "data", "--log_dir", folder / "log", "--max_steps",
                   6, "--eval_every", 3, "--sample_every", 3, "--eval_tokens", 10**6),
                  ("scripts.export", "--log_dir", folder / "log", "--out", folder / "export")):
        done = run("-m", *words)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_it_learns_from_the_train_part_only(project):
    """A tokenizer that has seen the validation text flatters every run on it."""
    speeches = [json.loads(line)["text"] for line in (project / "speeches.jsonl").read_text().splitlines()]
    train = [speech for speech in speeches if assign_split(speech, 0.2) == "train"]
    assert (project / "tokenizer" / "tokenizer.tiktoken").read_text() == Tokenizer.train(train, 600).merge_table


def test_the_data_carry_it_into_training_and_the_checkpoint(project):
    """Nobody should have to say again which tokenizer it was."""
    meta = read_meta(project / "data")
    table = (project / "tokenizer" / "tokenizer.tiktoken").read_text()
    assert read_tokenizer(project / "data", meta).merge_table == table
    assert (meta["vocab_size"], meta["dtype"]) == (600, "uint16")
    path, content, _ = checkpoint.load_latest(project / "log", print)
    assert content["config"]["vocab_size"] == 600 and content["tokenizer"] == table
    done = run("-m", "scripts.generate", "--log_dir", project / "log", "--prompt", "Before we", "--max_new_tokens", 20)
    assert done.returncode == 0 and done.stdout.startswith("Before we"), done.stderr


def test_bits_per_byte_are_those_of_the_plain_formula(project):
    """-log2 of the probability of the validation text, divided by its bytes: what compares tokenizers."""
    _, content, _ = checkpoint.load_latest(project / "log", print)
    model, tokenizer = GPT.from_checkpoint(content).eval(), Tokenizer(content["tokenizer"])
    tokens = torch.from_numpy(open_shard(find_shards(project / "data", "val")[0]).astype("int64"))
    windows = (len(tokens) - 1) // 32
    x, y = tokens[:windows * 32].view(-1, 32), tokens[1:windows * 32 + 1].view(-1, 32)
    with torch.no_grad():
        bits = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item() / math.log(2)
    bits /= len(tokenizer.decode(y.flatten().tolist()).replace("<|endoftext|>", "").encode())
    assert metrics(project / "log", "val")[6]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    done = run("-m", "scripts.eval_perplexity", "--log_dir", project / "log", "--data", project / "data", "--stride",
               32)
    assert float(re.search(r"([\d.]+) bits per byte", done.stdout)[1]) == pytest.approx(bits, abs=0.01)


def test_other_tools_read_it(project):
    """transformers' tokenizer of the exported folder gives our ids, and the folder comes back whole."""
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.load(project / "data")
    theirs = AutoTokenizer.from_pretrained(project / "export")
    text = TEXT.read_text() + " naïve café 東京 🙂  \t\n\n  12345 don't I'll  'twas"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.end_of_text == 599
    assert checkpoint.load_checkpoint(project / "export")["tokenizer"] == tokenizer.merge_table
    done = run("-m", "scripts.validate", "--model", project / "export", "--prompt", "Before we proceed")
    assert done.returncode == 0, done.stdout + done.stderr


def test_data_of_another_tokenizer_are_refused(project, data_root, tmp_path):
    """Ids of one tokenizer are noise to a model of another."""
    done = run("-m", "scripts.eval_perplexity", "--checkpoint", project / "log" / "model_00006.pt", "--data", data_root)
    assert_refused(done, "0 to 599")
    done = run("-m", "scripts.train", *TINY, "--data_root", data_root, "--init_from", project / "export", "--log_dir",
               tmp_path / "log")
    assert_refused(done, "bpe600-", "gpt2")
    done = run("-m", "scripts.train_tokenizer", "--input", TEXT, "--out", project / "tokenizer")
    assert_refused(done, "exists and is not empty")
    (project / "data" / "tokenizer.tiktoken").write_text(LEARNED.merge_table)
    try:
        done = run("-m", "scripts.train", *TINY, "--data_root", project / "data", "--log_dir", tmp_path / "log")
        assert_refused(done, "bpe500-", "bpe600-")
    finally:
        (project / "data" / "tokenizer.tiktoken").write_text((project / "tokenizer" / "tokenizer.tiktoken").read_text())


@given(st.text() | st.binary().map(lambda data: data.decode("utf-8", "replace")))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(text):
    """A byte that has no token is text that cannot be learned."""
    ids = LEARNED.encode(text)
    assert LEARNED.decode(ids) == text
    assert LEARNED.token_lengths()[ids].sum() == len(text.encode())


@given(st.binary())
@settings(max_examples=100, deadline=None)
def test_any_bytes_have_tokens(data):
    encoding = LEARNED.encoding
    assert encoding.decode_bytes([encoding.encode_single_token(bytes([byte])) for byte in data]) == data


def test_it_encodes_as_the_library_that_learned_it():
    """tiktoken merges by the ranks of tokens, `tokenizers` by a list of pairs: on real text they must agree."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    words = {token: rank for token, rank in LEARNED.vocab().items() if rank < 499}
    theirs = tokenizers.Tokenizer(models.BPE(words, LEARNED.merges()))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = TEXT.read_text()
    assert theirs.encode(text).ids == LEARNED.encode(text)
    assert LEARNED.name.startswith("bpe500-") and LEARNED.n_vocab == 500
    assert len(LEARNED.encode(text)) < 0.55 * len(text.encode())


def test_tables_that_cannot_be_one_are_refused():
    """A checkpoint from elsewhere may hold anything."""
    lines = LEARNED.merge_table.splitlines(keepends=True)
    for broken in (lines[1:], lines[:-5] + lines[-4:], [*lines, lines[7]], [*lines[:-1], "!! 498\n"], ["a\n", "b\n"],
                   [*lines[:-1], "aGVsbG8= x\n"]):
        with pytest.raises(UserError, match="damaged"):
            Tokenizer("".join(broken))
    for size in (256, -1, 2**25):
        with pytest.raises(UserError, match="vocab_size"):
            Tokenizer.train(["text"], size)
    assert Tokenizer.train(["aaa"], 1000).n_vocab < 270  # no more pairs
