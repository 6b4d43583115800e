"""A user's mistakes: exit status 2, one clear line, no traceback, nothing written."""

import contextlib
import gzip
import io
import json
import math
import random
import runpy
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gpt import signals
from gpt.checkpoint import save_model
from gpt.config import GPTConfig
from gpt.model import GPT
from scripts import cli
from tests.conftest import ROOT, TINY, assert_refused, run

TRAIN = ("-m", "scripts.train", *TINY)
GENERATE = ("-m", "scripts.generate", "--device", "cpu")
PREPARE = ("prepare_shakespeare.py",)
TOKENS = ("-m", "scripts.prepare")
LEARN = ("-m", "scripts.train_tokenizer")
EXPORT = ("-m", "scripts.export")
VALIDATE = ("-m", "scripts.validate", "--model")
HELLASWAG = ("-m", "scripts.eval_hellaswag", "--device", "cpu")
PERPLEXITY = ("-m", "scripts.eval_perplexity", "--device", "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory, data_root):
    """A folder with one of each: data and checkpoints, good and bad."""
    folder = tmp_path_factory.mktemp("place")

    def data(name, train, val=None):
        (folder / name).mkdir()
        np.save(folder / name / "train_00000.npy", train)
        if val is not None:
            np.save(folder / name / "val_00000.npy", val)

    good = np.arange(1000, dtype=np.uint16)
    (folder / "empty").mkdir()
    data("no_val", good)
    data("two_dimensional", good.reshape(10, 100), good)
    data("floats", good / 2, good)
    data("short", good[:20], good)
    data("alien", np.full(1000, 60000, np.uint16), good)
    data("truncated", good, good)
    path = folder / "truncated" / "train_00000.npy"
    path.write_bytes(path.read_bytes()[:500])
    data("bad_meta", good, good)
    (folder / "bad_meta" / "meta.json").write_text("{")
    data("with_meta", good, good)
    (folder / "with_meta" / "meta.json").write_text('{"tokenizer": "gpt2", "vocab_size": 50257}')
    for name, meta in (("vocab_size_text", '{"vocab_size": "many"}'), ("vocab_size_zero", '{"vocab_size": 0}'),
                       ("vocab_size_float", '{"vocab_size": 3.5}'), ("tokenizer_list", '{"tokenizer": ["gpt2"]}'),
                       ("meta_list", "[1]")):
        data(name, good, good)
        (folder / name / "meta.json").write_text(meta)
    data("no_tokens", good[:0], good)
    (folder / "shard_folder" / "train_00000.npy").mkdir(parents=True)
    (folder / "damaged_run").mkdir()
    (folder / "damaged_run" / "model_00005.pt").write_text("not a checkpoint")
    data("other_tokenizer", good, good)
    (folder / "other_tokenizer" / "meta.json").write_text('{"tokenizer": "mine", "vocab_size": 1000}')

    model = GPT(GPTConfig(block_size=16, vocab_size=100, n_layer=1, n_head=1, n_embd=4))
    save_model(folder / "small_vocabulary.pt", model, step=1, val_loss=None, tokenizer="gpt2", train_config={})
    save_model(folder / "no_tokenizer.pt", model, step=1, val_loss=None, tokenizer=None, train_config={})
    wide = GPT(GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=1, n_embd=4))
    save_model(folder / "gpt2.pt", wide, step=1, val_loss=None, tokenizer="gpt2", train_config={})
    save_model(folder / "odd.pt", wide, step=1, val_loss=None, tokenizer=["x"], train_config=[])
    save_model(folder / "other_tokens.pt", wide, step=1, val_loss=None, tokenizer=None, train_config={})
    (folder / "cut.pt").write_bytes((folder / "no_tokenizer.pt").read_bytes()[:3000])
    (folder / "text.pt").write_text("not a checkpoint")
    torch.save({"model_args": {}, "iter_num": 3, "model": {}}, folder / "other.pt")

    (folder / "empty.txt").write_text(" \n")
    (folder / "latin1.txt").write_bytes(b"caf\xe9 " * 1000)
    (folder / "short.txt").write_text("To be, or not to be")
    (folder / "broken.yaml").write_text("a: [\n")
    (folder / "one_token.txt").write_text("To")
    data("alien_val", good, np.full(1000, 60000, np.uint16))
    example = {"ctx": "A cat", "endings": ["sits.", "flies.", "reads.", "rains."], "label": 0}
    for name, labels in (("examples", [0, 3]), ("no_label", [1, ""]), ("far_label", [4]), ("huge_label", [math.inf])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(example | {"label": x}) + "\n" for x in labels))
    (folder / "deep.jsonl").write_text("[" * 100_000)
    data("few", good[:100], good)
    data("unfinished", good, good)
    (folder / "unfinished" / "meta.json").write_text('{"complete": false, "command": "python -m scripts.prepare"}')
    (folder / "late.txt").write_text("abc def\n" * 150_000 + "caf\u00e9 \udcff", errors="surrogateescape")
    (folder / "late.csv").write_text("text\n" + "abc def\n" * 150_000 + "caf\u00e9 \udcff", errors="surrogateescape")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n\n{"text": \n{"text": "b"}\n')
    (folder / "cut.jsonl").write_text('{"text": "a"}\n{"text": "b')
    (folder / "numbers.json").write_text("[\n1, 2]")
    (folder / "rows.jsonl").write_text('{"title": "a", "body": "b"}\n{"title": 1, "body": "b"}\n')
    (folder / "rows.csv").write_text("title,body\na,b\n")
    pq.write_table(pa.table({"title": ["a"], "number": [1]}), folder / "rows.parquet")
    (folder / "one.jsonl").write_text('{"text": "a"}\n')
    for name in ("text.parquet", "text.txt.gz"):
        (folder / name).write_text("not what it says")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(9000))[:5000])
    (folder / "bad_tokenizer").mkdir()
    (folder / "bad_tokenizer" / "tokenizer.tiktoken").write_text("YQ== 0\nYg== 1\n")
    (folder / "file").write_text("a file where a folder should be")
    (folder / "good").symlink_to(data_root)
    return folder


# (command, words that the message must hold); {} is the folder above
CASES = [
    ((*TRAIN, "--data_root", "{}/missing"), ["data_root", "{}/missing", "prepare_shakespeare.py"]),
    ((*TRAIN, "--data_root", "{}/empty"), ["no shards for split train", "{}/empty"]),
    ((*TRAIN, "--data_root", "{}/no_val"), ["no shards for split val"]),
    ((*TRAIN, "--data_root", "{}/two_dimensional"), ["train_00000.npy", "(10, 100)", "1-D"]),
    ((*TRAIN, "--data_root", "{}/floats"), ["train_00000.npy", "float64", "integers"]),
    ((*TRAIN, "--data_root", "{}/short"), ["train_00000.npy has 20 tokens", "33"]),
    ((*TRAIN, "--data_root", "{}/truncated"), ["train_00000.npy cannot be read"]),
    ((*TRAIN, "--data_root", "{}/alien"), ["token id 60000 at position", "50256"]),
    ((*TRAIN, "--data_root", "{}/bad_meta"), ["meta.json is not a JSON object"]),
    ((*TRAIN, "--data_root", "{}/other_tokenizer"), ["unknown tokenizer 'mine'"]),
    ((*TRAIN, "--data_root", "{}/vocab_size_text"), ["meta.json has vocab_size 'many'", "whole number above 0"]),
    ((*TRAIN, "--data_root", "{}/vocab_size_zero"), ["meta.json has vocab_size 0"]),
    ((*TRAIN, "--data_root", "{}/vocab_size_float"), ["meta.json has vocab_size 3.5"]),
    ((*TRAIN, "--data_root", "{}/tokenizer_list"), ["tokenizer ['gpt2']"]),
    ((*TRAIN, "--data_root", "{}/meta_list"), ["meta.json is not a JSON object"]),
    ((*TRAIN, "--data_root", "{}/no_tokens"), ["train_00000.npy has 0 tokens"]),
    ((*TRAIN, "--data_root", "{}/shard_folder"), ["train_00000.npy cannot be read", "directory"]),
    ((*TRAIN, "--log_dir", "{}/damaged_run"), ["none of the 1 checkpoints", "damaged_run"]),
    ((*TRAIN, "--rank_timeout", "0"), ["rank_timeout is 0"]),
    ((*TRAIN, "--model.dropout", "1.5"), ["dropout is 1.5"]),
    ((*TRAIN, "--model.n_layer", "0"), ["n_layer is 0"]),
    ((*TRAIN, "--min_lr_ratio", "5"), ["min_lr_ratio is 5", "between 0 and 1"]),
    ((*TRAIN, "--grad_clip", "-1"), ["grad_clip is -1"]),
    ((*TRAIN, "--eval_tokens", "0"), ["eval_tokens is 0"]),
    ((*TRAIN, "--log_every", "0"), ["log_every is 0"]),
    ((*TRAIN, "--init_from", "{}"), ["'{}' has no config.json", "model_<step>.pt"]),
    ((*TRAIN, "--config", "{}/no_tokenizer.pt"), ["no_tokenizer.pt is not a YAML file"]),
    ((*TRAIN, "--total_batch_size", "1000"), ["total_batch_size 1000 is not divisible", "896 or 1024"]),
    ((*TRAIN, "--micro_batch_size", "0"), ["micro_batch_size is 0"]),
    ((*TRAIN, "--model.n_head", "3"), ["n_embd 16 is not divisible by n_head 3"]),
    ((*TRAIN, "--model.block_size", "16"), ["--seq_len 32 exceeds block_size 16"]),
    ((*TRAIN, "--data_root", "{}/with_meta", "--model.vocab_size", "50304"), ["50304", "50257", "never padded"]),
    ((*TRAIN, "--max_steps", "-1"), ["max_steps is -1"]),
    ((*TRAIN, "--seed", "18446744073709551616"), ["seed is 18446744073709551616"]),
    ((*TRAIN, "--max_lr", "0"), ["max_lr is 0"]),
    ((*TRAIN, "--max_lr", "nan"), ["max_lr is nan"]),
    ((*TRAIN, "--betas", "0.9", "1.0"), ["betas"]),
    ((*TRAIN, "--sample_prompts", "", "--sample_every", "1"), ["sample_prompts"]),
    ((*TRAIN, "--config", "{}/missing.yaml"), ["--config {}/missing.yaml: No such file"]),
    ((*TRAIN, "--config", "{}/broken.yaml"), ["broken.yaml is not a YAML file"]),
    ((*TRAIN, "--device", "gpu"), ["unknown device 'gpu'"]),
    ((*TRAIN, "--log_dir", "{}/file"), ["log_dir", "{}/file"]),
    ((*TRAIN, "--log_dir", "/proc/log"), ["log_dir", "/proc/log"]),
    ((*TRAIN, "--init_from", "{}/missing.pt"), ["no checkpoint", "missing.pt"]),
    ((*TRAIN, "--init_from", "{}/cut.pt"), ["cut.pt", "damaged"]),
    ((*TRAIN, "--init_from", "{}/other.pt"), ["other.pt", "not one of ours"]),
    ((*TRAIN, "--init_from", "{}/small_vocabulary.pt"), ["a vocabulary of 100 tokens", "50257"]),
    ((*GENERATE, "--log_dir", "{}/empty"), ["no checkpoint in log_dir", "scripts.train"]),
    ((*GENERATE, "--checkpoint", "{}/missing.pt"), ["no checkpoint", "missing.pt"]),
    ((*GENERATE, "--checkpoint", "{}/cut.pt"), ["cut.pt", "damaged"]),
    ((*GENERATE, "--checkpoint", "{}/text.pt"), ["text.pt", "not a .pt file"]),
    ((*GENERATE, "--checkpoint", "{}/other.pt"), ["other.pt", "not one of ours"]),
    ((*GENERATE, "--checkpoint", "{}/no_tokenizer.pt"), ["no known tokenizer"]),
    ((*GENERATE, "--checkpoint", "{}/small_vocabulary.pt", "--prompt", "world"), ["prompt 'world'", "100 tokens"]),
    ((*GENERATE, "--prompt", ""), ["prompt is empty"]),
    ((*GENERATE, "--checkpoint", "{}"), ["'{}' has no config.json", "model_<step>.pt"]),
    ((*GENERATE, "--log_dir", "{}/damaged_run"), ["none of the 1 checkpoints"]),
    ((*GENERATE, "--device", "cuda:99"), ["device 'cuda:99' is not available"]),
    ((*GENERATE, "--temperature", "-1"), ["temperature is -1"]),
    ((*GENERATE, "--top_p", "0"), ["top_p is 0"]),
    ((*GENERATE, "--num_samples", "0"), ["num_samples is 0"]),
    ((*TRAIN, "--init_from", "{}/other_tokens.pt", "--data_root", "{}/with_meta"), ["tokenizer None", "gpt2"]),
    ((*TRAIN, "--init_from", "{}/gpt2.pt", "--model.block_size", "33"), ["block_size 33", "16 positions"]),
    ((*TRAIN, "--init_from", "{}/gpt2.pt"), ["--seq_len 32 exceeds block_size 16"]),
    ((*TRAIN, "--hellaswag_every", "-1"), ["hellaswag_every is -1"]),
    ((*TRAIN, "--hellaswag_every", "1", "--hellaswag_data", "{}/missing.jsonl"), ["missing.jsonl", "cannot be read"]),
    ((*TRAIN, "--hellaswag_every", "1", "--model.vocab_size", "256"), ["no tokenizer is known"]),
    (EXPORT, ["no checkpoint in log_dir"]),
    ((*EXPORT, "--checkpoint", "{}/cut.pt"), ["cut.pt", "damaged"]),
    ((*EXPORT, "--checkpoint", "{}/gpt2.pt", "--out", "{}/file/x"), ["{}/file/"]),
    ((*EXPORT, "--checkpoint", "{}/odd.pt"), ["odd.pt is not one of ours", "no valid tokenizer, train_config"]),
    ((*EXPORT, "--checkpoint", "{}/gpt2.pt", "--out", "{}/file"), ["out '{}/file' is there already"]),
    ((*EXPORT, "--checkpoint", "{}/gpt2.pt", "--out", "/proc/x"), ["/proc"]),
    ((*VALIDATE, "{}/missing.pt"), ["no checkpoint", "missing.pt"]),
    ((*VALIDATE, "{}"), ["no config.json"]),
    ((*VALIDATE, "{}/gpt2.pt", "--prompt", "a " * 20), ["prompt has 21 tokens", "block_size 16"]),
    ((*VALIDATE, "{}/gpt2.pt", "--prompt", ""), ["prompt has 0 tokens"]),
    ((*VALIDATE, "{}/small_vocabulary.pt"), ["vocab_size 100"]),
    ((*VALIDATE, "{}/gpt2.pt", "--top", "0"), ["top is 0"]),
    ((*HELLASWAG, "--data", "{}/examples.jsonl"), ["no checkpoint in log_dir"]),
    ((*HELLASWAG, "--checkpoint", "{}/gpt2.pt", "--data", "{}/missing.jsonl"), ["missing.jsonl", "cannot be read"]),
    ((*HELLASWAG, "--checkpoint", "{}/gpt2.pt", "--data", "{}/latin1.txt"), ["latin1.txt", "cannot be read"]),
    ((*HELLASWAG, "--checkpoint", "{}/gpt2.pt", "--data", "{}/short.txt"), ["example 1 of", "short.txt", "endings"]),
    ((*HELLASWAG, "--checkpoint", "{}/gpt2.pt", "--data", "{}/empty.txt"), ["has no examples"]),
    ((*HELLASWAG, "--checkpoint", "{}/gpt2.pt", "--data", "{}/no_label.jsonl"), ["example 2 of", "label"]),
    ((*HELLASWAG, "--checkpoint", "{}/gpt2.pt", "--data", "{}/far_label.jsonl"), ["example 1 of", "label"]),
    ((*HELLASWAG, "--checkpoint", "{}/gpt2.pt", "--data", "{}/huge_label.jsonl"), ["example 1 of"]),
    ((*HELLASWAG, "--checkpoint", "{}/gpt2.pt", "--data", "{}/deep.jsonl"), ["example 1 of"]),
    ((*HELLASWAG, "--checkpoint", "{}/gpt2.pt", "--data", "{}/examples.jsonl", "--log_dir", "{}/file"), ["{}/file"]),
    ((*HELLASWAG, "--checkpoint", "{}/small_vocabulary.pt", "--data", "{}/examples.jsonl"), ["knows 100 tokens"]),
    ((*HELLASWAG, "--checkpoint", "{}/no_tokenizer.pt", "--data", "{}/examples.jsonl"), ["no known tokenizer"]),
    ((*HELLASWAG, "--checkpoint", "{}/gpt2.pt", "--data", "{}/examples.jsonl", "--limit", "-1"), ["limit is -1"]),
    ((*PERPLEXITY, "--data", "{}/short.txt"), ["no checkpoint in log_dir"]),
    ((*PERPLEXITY, "--checkpoint", "{}/gpt2.pt", "--data", "{}/missing.txt"), ["missing.txt", "cannot be read"]),
    ((*PERPLEXITY, "--checkpoint", "{}/gpt2.pt", "--data", "{}/latin1.txt"), ["latin1.txt", "UTF-8"]),
    ((*PERPLEXITY, "--checkpoint", "{}/gpt2.pt", "--data", "{}/one_token.txt"), ["fewer than two tokens"]),
    ((*PERPLEXITY, "--checkpoint", "{}/gpt2.pt", "--data", "{}/no_val"), ["no shards for split val"]),
    ((*PERPLEXITY, "--checkpoint", "{}/gpt2.pt", "--data", "{}/other_tokenizer"), ["unknown tokenizer 'mine'"]),
    ((*PERPLEXITY, "--checkpoint", "{}/gpt2.pt", "--data", "{}/alien_val"), ["token ids", "60000", "50256"]),
    ((*PERPLEXITY, "--checkpoint", "{}/gpt2.pt", "--data", "{}/short.txt", "--stride", "17"), ["stride is 17", "16"]),
    ((*PERPLEXITY, "--checkpoint", "{}/gpt2.pt", "--data", "{}/short.txt", "--stride", "-1"), ["stride is -1"]),
    ((*PERPLEXITY, "--checkpoint", "{}/small_vocabulary.pt", "--data", "{}/short.txt"), ["the model knows 0 to 99"]),
    ((*PREPARE, "--input", "{}/missing.txt"), ["cannot read --input {}/missing.txt"]),
    ((*PREPARE, "--input", "{}/one_token.txt"), ["one_token.txt is too short to split (1 tokens)"]),
    ((*PREPARE, "--input", "{}/latin1.txt"), ["latin1.txt", "position 3", "UTF-8"]),
    ((*PREPARE, "--input", "{}/short.txt", "--val_fraction", "1.5"), ["val_fraction is 1.5"]),
    ((*PREPARE, "--input", "{}/short.txt", "--out", "{}/file"), ["out", "{}/file"]),
    (TOKENS, ["--input", "--dataset"]),
    ((*TOKENS, "--input", "{}/no*.txt"), ["{}/no*.txt", "no match"]),
    ((*TOKENS, "--input", "{}/nowhere.txt"), ["nowhere.txt", "no such file"]),
    ((*TOKENS, "--input", "{}/empty"), ["{}/empty", ".parquet"]),
    ((*TOKENS, "--input", "{}/empty.txt"), ["no text"]),
    ((*TOKENS, "--input", "{}/latin1.txt"), ["latin1.txt is not UTF-8 (byte 0xe9 after 'caf')", "iconv"]),
    ((*TOKENS, "--input", "{}/late.txt"), ["late.txt is not UTF-8 (byte 0xff after 'caf\u00e9 ')"]),
    ((*TOKENS, "--input", "{}/late.csv"), ["late.csv is not UTF-8 (byte 0xff after 'caf\u00e9 ')"]),
    ((*TOKENS, "--input", "{}/broken.jsonl"), ["broken.jsonl, line 3", "broken JSON"]),
    ((*TOKENS, "--input", "{}/cut.jsonl"), ["cut.jsonl, line 2", "broken JSON"]),
    ((*TOKENS, "--input", "{}/numbers.json"), ["numbers.json, line 2", "found int"]),
    ((*TOKENS, "--input", "{}/rows.jsonl"), ["rows.jsonl, line 1 has no column 'text'", "title, body"]),
    ((*TOKENS, "--input", "{}/rows.jsonl", "--text_column", "title"), ["line 2", "column 'title' holds int, not text"]),
    ((*TOKENS, "--input", "{}/rows.csv"), ["rows.csv, line 2", "'text'", "title, body"]),
    ((*TOKENS, "--input", "{}/rows.parquet"), ["rows.parquet, row 1 has no column 'text'", "title, number"]),
    ((*TOKENS, "--input", "{}/rows.parquet", "--text_column", "number"), ["rows.parquet, row 1", "holds int"]),
    ((*TOKENS, "--input", "{}/text.parquet"), ["cannot read {}/text.parquet"]),
    ((*TOKENS, "--input", "{}/text.txt.gz"), ["cannot read {}/text.txt.gz"]),
    ((*TOKENS, "--input", "{}/cut.txt.gz"), ["cannot read {}/cut.txt.gz"]),
    ((*TOKENS, "--input", "{}/one.jsonl"), ["all of the text is in the train split", "--val_fraction (now 0.1)"]),
    ((*TOKENS, "--input", "{}/one.jsonl", "--val_fraction", "0.999"), ["all of the text is in the val split"]),
    ((*TOKENS, "--input", "{}/short.txt", "--tokenizer", "{}/missing"), ["unknown tokenizer '{}/missing'"]),
    ((*TOKENS, "--input", "{}/short.txt", "--tokenizer", "gpt3"), ["unknown tokenizer 'gpt3'", "train_tokenizer"]),
    ((*TOKENS, "--input", "{}/short.txt", "--tokenizer", "{}/bad_tokenizer"), ["bad_tokenizer", "damaged"]),
    ((*TOKENS, "--input", "{}/short.txt", "--out", "{}/file"), ["out", "{}/file"]),
    ((*TOKENS, "--input", "{}/short.txt", "--out", "{}/with_meta"), ["with_meta holds other data"]),
    ((*TOKENS, "--input", "{}/short.txt", "--out", "{}/no_val"), ["no_val holds other data"]),
    ((*TOKENS, "--input", "{}/short.txt", "--val_fraction", "1"), ["val_fraction is 1"]),
    ((*TOKENS, "--input", "{}/short.txt", "--shard_size", "0"), ["--shard_size is 0"]),
    ((*TOKENS, "--dataset", "x", "--val_split", "y", "--val_input", "{}/short.txt"), ["--val_input and --val_split"]),
    ((*TOKENS, "--input", "{}/short.txt", "--val_split", "test"), ["--val_split test", "--dataset"]),
    ((*TOKENS, "--input", "{}/short.txt", "--dataset", "x"), ["--input", "--dataset"]),
    ((*TOKENS, "--check", "{}/missing"), ["{}/missing", "no such folder"]),
    ((*TOKENS, "--check", "{}/truncated"), ["train_00000.npy", "truncated"]),
    ((*TOKENS, "--check", "{}/alien"), ["train_00000.npy", "60000", "50256"]),
    ((*LEARN, "--input", "{}/short.txt", "--vocab_size", "256"), ["vocab_size is 256", "257"]),
    ((*LEARN, "--input", "{}/empty.txt"), ["no text for training"]),
    ((*LEARN, "--input", "{}/latin1.txt"), ["latin1.txt", "byte 0xe9"]),
    ((*LEARN, "--input", "{}/short.txt", "--out", "{}/empty.txt"), ["empty.txt exists and is not empty"]),
    ((*TRAIN, "--data_root", "{}/unfinished"), ["incomplete: run `python -m scripts.prepare`"]),
    ((*TRAIN, "--data_root", "{}/short", "--seq_len", "auto"), ["train_00000.npy has 20 tokens", "33"]),
    ((*TRAIN, "--data_root", "{}/few", "--seq_len", "256", "--total_batch_size", "1024"),
     ["train_00000.npy has 100 tokens", "--seq_len 64"]),
]
if not torch.cuda.is_available():
    CASES.append(((*TRAIN, "--device", "cuda"), ["device 'cuda' is not available", "--device auto"]))


def run_here(*words):
    """Run a command as `run` does, in this process: a tenth of the time."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(ROOT):
            if words[0] == "-m":
                sys.argv = list(map(str, words[1:]))
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = list(map(str, words))
                runpy.run_path(words[0], run_name="__main__")
    except SystemExit as exit_:
        return subprocess.CompletedProcess(words, exit_.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = argv
    raise AssertionError(f"{words} did not exit")


def test_bad_input(place, tmp_path, monkeypatch):
    """Every case in a folder of its own, which must stay empty (an empty log folder is no loss).

    The first case of each command as typed, the others in this process.
    """
    monkeypatch.setattr(cli, "redirect_stdout_to_devnull", lambda: None)  # this process still needs it
    monkeypatch.setattr(signals, "StopHandler", lambda verbose: None)
    started = set()

    def attempt(number):
        words, expected = CASES[number]
        words = [word.replace("{}", str(place)) for word in words]
        out = tmp_path / str(number)
        if words[:2] == ["-m", "scripts.train"]:
            defaults = {"--data_root": place / "good", "--log_dir": out, "--max_steps": 2, "--sample_every": 0}
        else:
            makes_data = words[0] == PREPARE[0] or words[1] in (TOKENS[1], LEARN[1])
            defaults = {"--out": out} if makes_data else {"--log_dir": out}
            if "scripts.export" in words:
                defaults["--out"] = out / "export"
            elif "scripts.validate" in words:
                defaults = {}
        for flag, value in defaults.items():
            words += [] if flag in words else [flag, value]
        command = words[1] if words[0] == "-m" else words[0]
        done = (run_here if command in started else run)(*words)
        started.add(command)
        return words, [word.replace("{}", str(place)) for word in expected], done, out

    before = sorted(str(path) for path in place.rglob("*"))
    for words, expected, done, out in map(attempt, range(len(CASES))):
        print(*words, "->", done.stderr.strip())
        assert_refused(done, *expected)
        written = [path for path in out.rglob("*") if path.is_file()] if out.exists() else []
        if f"{place}/alien" not in words:  # a token is only seen when it is read
            assert not written, words
    assert sorted(str(path) for path in place.rglob("*")) == before
