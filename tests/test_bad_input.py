"""User errors: exit status 2, one clear line, no traceback, nothing written. One case for each kind
of error; functions that read text, weights or examples have their own tests."""

import shlex

import numpy as np
import pytest

from gpt.checkpoint import save_model
from gpt.config import GPTConfig
from gpt.model import GPT
from tests.conftest import TINY, assert_user_error, run


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory, data_root):
    """Return a folder of valid and invalid data, checkpoints and config files."""
    folder = tmp_path_factory.mktemp("bad_inputs")
    (folder / "good").symlink_to(data_root)
    texts = {"empty.txt": " \n", "short.txt": "To be, or not to be",
             "broken.yaml": "a: [\n", "one.jsonl": '{"text": "a"}\n',
             "metrics.jsonl": '{"step": 1, "split": "val", "loss": 1}'}
    for name, content in texts.items():
        (folder / name).write_text(content)

    tokens = np.arange(1000, dtype=np.uint16)
    for name, train, meta in (("short", tokens[:20], "{}"), ("truncated", tokens, "{}"),
                              ("other_tokenizer", tokens, '{"tokenizer": "mine"}')):
        (folder / name).mkdir()
        np.save(folder / name / "train_00000.npy", train)
        np.save(folder / name / "val_00000.npy", tokens)
        (folder / name / "meta.json").write_text(meta)
    shard = folder / "truncated" / "train_00000.npy"
    shard.write_bytes(shard.read_bytes()[:500])

    model = GPT(GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=1, n_embd=4))
    for name, tokenizer in (("gpt2", "gpt2"), ("no_tokenizer", None)):
        save_model(folder / f"{name}.pt", model, step=1, tokenizer=tokenizer, train_config={})
    return folder


# Commands and the flags that their cases share; {} is the folder of `bad_inputs`, OUT an empty one.
COMMANDS = {
    "train": "scripts.train --data_root {}/good --log_dir OUT --max_steps 2 --sample_every 0 "
             + shlex.join(TINY),
    "generate": "scripts.generate --device cpu --log_dir OUT",
    "validate": "scripts.validate --model {}/gpt2.pt",
    "hellaswag": "scripts.eval_hellaswag --device cpu --log_dir OUT --checkpoint {}/gpt2.pt",
    "perplexity": "scripts.eval_perplexity --device cpu --checkpoint {}/gpt2.pt "
                  "--data {}/short.txt",
    "shakespeare": "prepare_shakespeare --out OUT --input {}/short.txt",
    "prepare": "scripts.prepare --out OUT --input {}/short.txt",
    "tokenizer": "scripts.train_tokenizer --out OUT --input {}/short.txt",
    "plot": "scripts.plot --out OUT.png {}/metrics.jsonl",
}
# (command, additional flags, part of the expected message)
CASES = [
    ("train", "--config {}/missing.yaml", "--config {}/missing.yaml: No such file"),
    ("train", "--config {}/broken.yaml", "broken.yaml is not a YAML file"),
    ("train", "--data_root {}/truncated", "train_00000.npy cannot be read"),
    ("train", "--data_root {}/short", "train_00000.npy has 20 tokens, one sequence needs"),
    ("train", "--data_root {}/short --seq_len auto", "no shard of more than 20 tokens"),
    ("train", "--data_root {}/other_tokenizer", "unknown tokenizer 'mine'"),
    ("train", "--max_lr nan", "--max_lr is nan"),
    ("train", "--device cuda:99", "device 'cuda:99' is not available"),
    ("train", "--model.n_head 3", "n_embd 16 is not divisible by n_head 3"),
    ("train", "--model.block_size 16", "--seq_len 32 exceeds block_size 16"),
    ("train", "--log_dir {}/empty.txt", "cannot write to log_dir '{}/empty.txt'"),
    ("train", "--init_from {}/gpt2.pt --model.block_size 33", "block_size is 33"),
    ("train", "--init_from {}/no_tokenizer.pt", "no_tokenizer.pt uses another tokenizer than the"),
    ("generate", "", "no checkpoint in log_dir"),
    ("generate", "--checkpoint {}/missing.pt", "no checkpoint '{}/missing.pt'"),
    ("generate", "--checkpoint {}/no_tokenizer.pt", "no known tokenizer"),
    ("generate", "--top_p 0", "top_p is 0"),
    ("validate", "--prompt 'a a a a a a a a a a a a a a a a a'", "prompt has 17 tokens"),
    ("hellaswag", "--data {}/empty.txt", "has no examples"),
    ("perplexity", "--data {}/empty.txt", "fewer than two tokens"),
    ("perplexity", "--stride 17", "stride is 17"),
    ("shakespeare", "--input {}/empty.txt", "empty.txt is too short to split"),
    ("prepare", "--input {}/one.jsonl", "no text for val"),
    ("prepare", "--tokenizer gpt3", "unknown tokenizer 'gpt3'"),
    ("prepare", "--out ''", "--out is empty"),
    ("tokenizer", "--out {}/empty.txt", "empty.txt exists and is not empty"),
    ("plot", "{}/good", "no losses in {}/good/metrics.jsonl"),
    ("plot", "--out OUT.docx", "out.docx has an unknown extension"),
]


@pytest.mark.parametrize("command, flags, expected", CASES,
                         ids=[f"{command} {flags}" for command, flags, _ in CASES])
def test_bad_input_is_one_error_line_and_writes_nothing(command, flags, expected, bad_inputs,
                                                        tmp_path):
    """An empty log_dir may be left behind."""
    line = f"-m {COMMANDS[command]} {flags}".replace("{}", str(bad_inputs))
    words = shlex.split(line.replace("OUT", str(tmp_path / "out")))
    assert_user_error(run(*words), expected.replace("{}", str(bad_inputs)))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
