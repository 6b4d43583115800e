"""User errors: exit status 2, one clear line, no traceback, nothing written. One case per error
message."""

import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest

from gpt.checkpoint import save_model
from gpt.config import GPTConfig
from gpt.model import GPT
from tests.conftest import ROOT, TINY, assert_user_error


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory, data_root):
    """Return a folder of valid and invalid data, checkpoints and config files."""
    folder = tmp_path_factory.mktemp("bad_inputs")

    def data(name, train, val=None, meta=None):
        (folder / name).mkdir()
        np.save(folder / name / "train_00000.npy", train)
        np.save(folder / name / "val_00000.npy", good if val is None else val)
        if meta is not None:
            (folder / name / "meta.json").write_text(meta)

    good = np.arange(1000, dtype=np.uint16)
    (folder / "good").symlink_to(data_root)
    (folder / "empty").mkdir()
    (folder / "file").write_text("a file where a folder should be")
    data("two_dimensional", good.reshape(10, 100))
    data("short", good[:20])
    data("alien_val", good, np.full(1000, 60000, np.uint16))
    data("truncated", good)
    shard = folder / "truncated" / "train_00000.npy"
    shard.write_bytes(shard.read_bytes()[:500])
    data("bad_meta", good, meta="{")
    data("gpt2_meta", good, meta='{"tokenizer": "gpt2", "vocab_size": 50257}')
    data("other_tokenizer", good, meta='{"tokenizer": "mine", "vocab_size": 1000}')

    for name, vocab_size, tokenizer in (("small_vocabulary", 100, "gpt2"),
                                        ("no_tokenizer", 50257, None), ("gpt2", 50257, "gpt2")):
        model = GPT(GPTConfig(block_size=16, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=4))
        save_model(folder / f"{name}.pt", model, step=1, tokenizer=tokenizer, train_config={})
    (folder / "damaged_run").mkdir()
    damaged = (folder / "gpt2.pt").read_bytes()[:3000]
    (folder / "damaged_run" / "model_00005.pt").write_bytes(damaged)

    texts = {"empty.txt": " \n", "short.txt": "To be, or not to be", "one_token.txt": "To",
             "broken.yaml": "a: [\n", "list.yaml": "- a\n",
             "one.jsonl": '{"text": "a"}\n'}
    for name, content in texts.items():
        (folder / name).write_text(content)
    (folder / "bad_tokenizer").mkdir()
    (folder / "bad_tokenizer" / "tokenizer.tiktoken").write_text("YQ== 0\nYg== 1\n")
    return folder


# Commands and the flags that their cases share; {} is the folder of `bad_inputs`, OUT an empty one.
COMMANDS = {
    "train": "scripts.train --data_root {}/good --log_dir OUT --max_steps 2 --sample_every 0 "
             + shlex.join(TINY),
    "generate": "scripts.generate --device cpu --log_dir OUT",
    "export": "scripts.export --log_dir OUT --out OUT/export",
    "validate": "scripts.validate --model {}/gpt2.pt",
    "hellaswag": "scripts.eval_hellaswag --device cpu --log_dir OUT "
                 "--data tests/data/hellaswag.jsonl",
    "perplexity": "scripts.eval_perplexity --device cpu --log_dir OUT --data {}/short.txt",
    "shakespeare": "prepare_shakespeare --out OUT --input {}/short.txt",
    "prepare": "scripts.prepare --out OUT",
    "tokenizer": "scripts.train_tokenizer --out OUT --input {}/short.txt",
}
# (command, additional flags, fragments of the expected message)
CASES = [
    ("train", "--config {}/missing.yaml", "--config {}/missing.yaml: No such file"),
    ("train", "--config {}/broken.yaml", "broken.yaml is not a YAML file"),
    ("train", "--config {}/list.yaml", "list.yaml has no settings"),
    ("train", "--config", "--config: expected one argument"),
    ("train", "--data_root {}/missing", "data_root '{}/missing' has no train_*.npy: run"),
    ("train", "--data_root {}/two_dimensional", "train_00000.npy", "1-D"),
    ("train", "--data_root {}/short --seq_len auto", "no shard of more than 20 tokens", "33"),
    ("train", "--data_root {}/short", "train_00000.npy has 20 tokens", "prepare more text"),
    ("train", "--data_root {}/truncated", "train_00000.npy cannot be read"),
    ("train", "--data_root {}/bad_meta", "meta.json is not a JSON object"),
    ("train", "--data_root {}/other_tokenizer", "unknown tokenizer 'mine'",
     "prepare the data again"),
    ("train", "--total_batch_size 1000", "total_batch_size 1000 is not divisible", "896 or 1024"),
    ("train", "--micro_batch_size 0", "micro_batch_size is 0"),
    ("train", "--max_lr nan", "--max_lr is nan", "at least 0 and below 2^63"),
    ("train", "--patience 2 --eval_every 0", "--patience needs validation", "--eval_every"),
    ("train", "--betas 0.9 1.0", "--betas are (0.9, 1.0)", "below 1"),
    ("train", "--device cuda:99", "device 'cuda:99' is not available", "found cpu"),
    ("train", "--model.n_layer 0", "n_layer is 0"),
    ("train", "--model.block_size -1", "block_size is -1"),
    ("train", "--model.n_head 3", "n_embd 16 is not divisible by n_head 3"),
    ("train", "--model.dropout 1.0", "dropout is 1.0"),
    ("train", "--model.block_size 16", "--seq_len 32 exceeds block_size 16"),
    ("train", "--log_dir {}/file", "log_dir", "{}/file"),
    ("train", "--log_dir {}/damaged_run", "none of the 1 checkpoints", "damaged_run"),
    ("train", "--init_from {}/gpt2.pt --model.block_size 33", "block_size is 33", "16 positions"),
    ("train", "--init_from {}/no_tokenizer.pt", "no_tokenizer.pt uses another tokenizer than the",
     "{}/good"),
    ("train", "--init_from {}", "cannot load '{}'", "model_<step>.pt"),
    ("generate", "", "no checkpoint in log_dir", "scripts.train"),
    ("generate", "--checkpoint {}/missing.pt", "no checkpoint", "missing.pt"),
    ("generate", "--checkpoint {}/damaged_run/model_00005.pt", "model_00005.pt", "damaged"),
    ("generate", "--checkpoint {}/no_tokenizer.pt", "no known tokenizer"),
    ("generate", "--checkpoint {}/small_vocabulary.pt --prompt world", "prompt 'world'",
     "100 tokens"),
    ("generate", "--prompt ''", "prompt is empty"),
    ("generate", "--temperature -1", "temperature is -1"),
    ("generate", "--top_p 0", "top_p is 0"),
    ("export", "--checkpoint {}/gpt2.pt --out {}/file", "--out {}/file exists"),
    ("export", "--checkpoint {}/gpt2.pt --out {}/file/x", "{}/file/"),
    ("validate", "--prompt 'a a a a a a a a a a a a a a a a a'", "prompt has 17 tokens",
     "block_size 16"),
    ("validate", "--top 0", "top is 0"),
    ("hellaswag", "--checkpoint {}/gpt2.pt --data {}/missing.jsonl", "missing.jsonl",
     "cannot be read"),
    ("hellaswag", "--checkpoint {}/gpt2.pt --data {}/empty.txt", "has no examples"),
    ("hellaswag", "--checkpoint {}/gpt2.pt --limit -1", "limit is -1"),
    ("perplexity", "--checkpoint {}/gpt2.pt --data {}/missing.txt", "matches no files"),
    ("perplexity", "--checkpoint {}/gpt2.pt --data {}/empty.txt", "fewer than two tokens"),
    ("perplexity", "--checkpoint {}/gpt2.pt --data {}/alien_val", "token id 60000", "50256"),
    ("perplexity", "--checkpoint {}/gpt2.pt --stride 17", "stride is 17", "16"),
    ("shakespeare", "--input {}/missing.txt", "'{}/missing.txt' matches no files"),
    ("shakespeare", "--input {}/one_token.txt", "one_token.txt is too short to split (1 tokens)"),
    ("shakespeare", "--val_fraction 1.5", "val_fraction is 1.5"),
    ("prepare", "", "--input", "--dataset"),
    ("prepare", "--input {}/empty.txt", "no text for train"),
    ("prepare", "--input {}/one.jsonl", "no text for val", "--val_fraction (now 0.1"),
    ("prepare", "--input {}/one.jsonl --val_input {}/one.jsonl", "no text for training"),
    ("prepare", "--input {}/one.jsonl --val_input {}/empty.txt", "no text for val"),
    ("prepare", "--input {}/short.txt --tokenizer gpt3", "unknown tokenizer 'gpt3'",
     "train_tokenizer"),
    ("prepare", "--input {}/short.txt --tokenizer {}/bad_tokenizer", "bad_tokenizer", "damaged"),
    ("prepare", "--input {}/short.txt --out ''", "--out is empty"),
    ("prepare", "--input {}/short.txt --out {}/gpt2_meta", "gpt2_meta holds other data"),
    ("prepare", "--input {}/short.txt --val_fraction 1", "val_fraction is 1"),
    ("prepare", "--input {}/short.txt --shard_size 0", "--shard_size is 0"),
    ("prepare", "--dataset x --val_split y --val_input {}/short.txt",
     "--val_input and --val_split"),
    ("prepare", "--input {}/short.txt --val_split test", "--val_split test", "--dataset"),
    ("tokenizer", "--vocab_size 256", "vocab_size is 256", "257"),
    ("tokenizer", "--max_bytes 0", "--max_bytes is 0"),
    ("tokenizer", "--input {}/empty.txt", "no text for training"),
    ("tokenizer", "--out {}/file", "file exists and is not empty"),
]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("command, flags, expected",
                         [(command, flags, expected) for command, flags, *expected in CASES],
                         ids=[f"{command} {flags}" for command, flags, *_ in CASES])
def test_bad_input_is_one_error_line_and_writes_nothing(command, flags, expected, bad_inputs,
                                                        tmp_path, monkeypatch, capsys):
    """Runs in this process, ten times as fast as a separate one. An empty log_dir may be left
    behind."""
    before = sorted(bad_inputs.rglob("*"))
    line = f"{COMMANDS[command]} {flags}".replace("{}", str(bad_inputs))
    line = line.replace("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    done = subprocess.CompletedProcess(line, ended.value.code, *capsys.readouterr())
    assert_user_error(done, *(text.replace("{}", str(bad_inputs)) for text in expected))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(bad_inputs.rglob("*")) == before
