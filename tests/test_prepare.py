"""scripts.prepare: identical shards for any number of workers and interruptions."""

import itertools
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gpt.errors import UserError
from gpt.shards import find_shards, read_meta
from gpt.text_files import assign_split
from gpt.tokenizer import Tokenizer
from scripts.prepare import PrepareConfig, main
from tests.conftest import ROOT, TEXT, assert_user_error, command, environment, run
from tests.test_text_files import GPT2, SPEECHES, TEXTS, gzip, jsonl, write

PREPARE = ["-m", "scripts.prepare", "--input"]
KILL_AT = """
import os, signal, sys
sys.path[0] = os.getcwd()
from scripts import cli, prepare
replace, n = os.replace, int(sys.argv.pop(1))
def kill_at(source, target):
    global n
    n -= 1
    if not n:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill_at
cli.run_cli(prepare.main, prepare.PrepareConfig)
"""


def tokens_of(texts: list[str]) -> list[int]:
    """Return the reference encoding: <|endoftext|> and the text of each document in turn."""
    return [token for text in texts for token in [50256, *GPT2.encode(text)]]


def shards(folder: Path, split: str = "") -> dict[str, list[int]]:
    return {path.name: np.load(path).tolist() for path in sorted(folder.glob(f"{split}*.npy"))}


def read_split(folder: Path, split: str) -> list[int]:
    return list(itertools.chain(*shards(folder, split).values()))


def test_prepare_says_what_it_made_and_how_to_train_on_it(tmp_path):
    """A second run does nothing, and one with another text is refused: shards of two texts could be
    mixed."""
    text, out = write(tmp_path / "a.txt", TEXT.read_text()), tmp_path / "my data"
    done = run(*PREPARE, text, "--out", out)
    train, val = (read_split(out, split) for split in ("train", "val"))
    counts = f"{len(train):,} train tokens and {len(val):,} val tokens"
    assert f"Saved {counts} in {out}" in done.stdout, done.stderr
    assert done.stdout.endswith(f"python -m scripts.train --data_root '{out}'\n")
    assert f"is complete ({counts}): nothing to do" in run(*PREPARE, text, "--out", out).stdout
    write(text, "another text")
    assert_user_error(run(*PREPARE, text, "--out", out), "holds other data")


def test_prepare_reads_a_hub_dataset(tmp_path):
    """`datasets` streams it (here from a local folder); its splits become train and val."""
    data, out = tmp_path / "data", tmp_path / "out"
    write(data / "train.jsonl", jsonl(SPEECHES[:20]))
    write(data / "validation.jsonl", jsonl(SPEECHES[20:30]))
    words = ["-m", "scripts.prepare", "--dataset", data, "--out", out, "--val_split"]
    assert_user_error(run(*words, "test"), "check its name, the split and the network")
    done = run(*words, "validation")
    assert done.returncode == 0, done.stderr
    assert read_split(out, "train") == tokens_of(SPEECHES[:20])
    assert read_split(out, "val") == tokens_of(SPEECHES[20:30])


def test_validation_and_output_files_are_not_trained_on(tmp_path, monkeypatch):
    """Both are inside the input folder here; a second run finds the same input. Read in many
    batches. In a document, <|endoftext|> is ordinary text, and half a character becomes U+FFFD."""
    monkeypatch.setattr("gpt.text_files.READ_SIZE", 50)
    train, val, out = [*TEXTS, "\ud800"], SPEECHES[40:50], tmp_path / "out"
    write(tmp_path / "a.jsonl", jsonl(train))
    val_file = write(tmp_path / "b.jsonl", jsonl(val))
    for _ in range(2):
        main(PrepareConfig(input=[str(tmp_path)], val_input=[str(val_file)], out=str(out)))
    assert (read_split(out, "train"), read_split(out, "val")) == (tokens_of(train), tokens_of(val))


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """Return a folder with a single long document between files of short ones."""
    folder = tmp_path_factory.mktemp("big")
    write(folder / "a.jsonl.gz", gzip(jsonl(SPEECHES * 5)))
    write(folder / "b.txt", TEXT.read_text() * 60)
    write(folder / "c.jsonl", jsonl(SPEECHES * 10))
    return folder


BIG = ["--shard_size", "50000", "--val_fraction", "0.2", "--num_workers"]


@pytest.fixture(scope="module")
def uninterrupted(big, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    done = run(*PREPARE, big, "--out", out, *BIG, 1)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_equal_the_reference_encoding(big, uninterrupted, split):
    """A shard ends where a document ends, unless the document is longer than a shard."""
    book = (big / "b.txt").read_text()
    cut = book.index("\n", int(0.8 * len(book))) + 1
    part = book[:cut] if split == "train" else book[cut:]
    rows = [text for text in SPEECHES if assign_split(text, 0.2) == split]
    documents = [*rows * 5, part, *rows * 10]
    assert read_split(uninterrupted, split) == tokens_of(documents)
    for tokens, following in itertools.pairwise(shards(uninterrupted, split).values()):
        if following[0] == 50256:
            assert len(tokens) <= 50_000
        else:  # the book continues
            assert len(tokens) == 50_000


def test_prepare_resumes_after_sigkill_with_identical_shards(big, uninterrupted, tmp_path):
    """Killed as it puts a file into place: before, between and after shards of a long document,
    and before meta.json says that they exist. The number of workers does not change the shards."""
    script, out = write(tmp_path / "kill_at.py", KILL_AT), tmp_path / "out"
    words = ["--input", big, "--out", out, *BIG, 2]
    for n in (2, 3, 12, 6):  # the N-th call of os.replace in the process
        done = run(script, n, *words)
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        with pytest.raises(UserError, match="incomplete: run `python .* --num_workers 2`"):
            read_meta(out)
    done = run("-m", "scripts.prepare", *words)
    assert done.returncode == 0 and "resuming after" in done.stdout, done.stdout + done.stderr
    assert shards(out) == shards(uninterrupted)
    assert read_meta(out)["splits"] == read_meta(uninterrupted)["splits"]


def test_full_disk_keeps_complete_shards(tmp_path):
    """The same command resumes when there is space. Here no file can exceed 20 kB at first: more
    than the shard of a short document before a long one."""
    texts, out = ["short", TEXT.read_text()], tmp_path / "out"
    words = [*PREPARE, write(tmp_path / "a.jsonl", jsonl(texts)), "--out", out, "--val_fraction",
             0, "--shard_size", 11_000]
    limited = ["bash", "-c", 'ulimit -f 20; "$@"', "bash", *command(*map(str, words))]
    done = subprocess.run(limited, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert_user_error(done, "_00001.npy: File too large")
    assert list(shards(out).values()) == [tokens_of(texts[:1])]
    assert run(*words).returncode == 0
    assert read_split(out, "train") == tokens_of(texts)


def test_a_failed_preparation_leaves_a_tokenizer_alone(tmp_path):
    """Even if it is in the folder of --out."""
    Tokenizer.train(SPEECHES, 300).save(tmp_path)
    with pytest.raises(UserError, match="holds other data"):
        main(PrepareConfig(input=[str(TEXT)], tokenizer=str(tmp_path), out=str(tmp_path)))
    assert (tmp_path / "tokenizer.tiktoken").exists()


def test_missing_data_names_the_command_that_makes_it(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for data_root, made_by in (
            ("shakespeare_data/bpe2048", "python prepare_shakespeare.py"),
            ("tinystories_data", "scripts.prepare --config configs/data/tinystories.yaml"),
            ("my_data", "scripts.prepare --input FILES --out my_data")):
        with pytest.raises(UserError, match=f"'{data_root}' has no train_.*: run `.*{made_by}`"):
            find_shards(data_root, "train")


def test_shards_of_build_nanogpt_are_found(tmp_path):
    """Their names have a prefix and six digits."""
    train = [tmp_path / f"edufineweb_train_00000{i}.npy" for i in (1, 2)]
    for path in (*train, tmp_path / "edufineweb_val_000000.npy"):
        path.touch()
    assert find_shards(tmp_path, "train") == train
