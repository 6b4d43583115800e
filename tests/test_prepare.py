"""scripts.prepare: identical shards for any number of workers and interruptions."""

import errno
import gzip
import itertools
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpt.shards
from gpt.errors import UserError
from gpt.shards import find_shards, read_meta
from gpt.text_files import assign_split
from gpt.tokenizer import Tokenizer
from scripts import prepare
from scripts.prepare import PrepareConfig
from tests.conftest import ROOT, TEXT, assert_user_error, run
from tests.test_text_files import SPEECHES, jsonl, parquet, table, write, zstd

GPT2 = Tokenizer()
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


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


def read_split(folder: Path, split: str) -> list[int]:
    paths = sorted(folder.glob(f"{split}_*.npy"))
    return np.concatenate([np.load(path) for path in paths]).tolist()


def test_prepare_says_what_it_made_and_how_to_train_on_it(tmp_path):
    """The command it names is for this folder; a second run does nothing."""
    words = ["-m", "scripts.prepare", "--input", TEXT, "--out", tmp_path / "my data"]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    tokens = {split: len(read_split(tmp_path / "my data", split)) for split in ("train", "val")}
    counts = f"{tokens['train']:,} train tokens and {tokens['val']:,} val tokens"
    assert f"Saved {counts} in {tmp_path / 'my data'}" in done.stdout
    begin = GPT2.decode(read_split(tmp_path / "my data", "val")[1:40]).split("\n")[0]
    assert f"the val text begins: {begin}\n" in done.stdout
    train = f"python -m scripts.train --data_root '{tmp_path / 'my data'}'"
    assert done.stdout.rstrip().endswith(train)
    assert f"is complete ({counts}): nothing to do" in run(*words).stdout


def test_prepare_reads_a_hub_dataset(tmp_path):
    """`datasets` streams it (here from a local folder); its splits become train and val."""
    data = tmp_path / "set" / "data"
    for i in range(2):
        write(data / f"train-{i:05d}-of-00002.parquet", parquet(SPEECHES[10 * i:10 * i + 10]))
    write(data / "validation-00000-of-00001.parquet", parquet(SPEECHES[30:40]))
    words = ["-m", "scripts.prepare", "--dataset", tmp_path / "set", "--out", tmp_path / "out"]
    done = run(*words, "--val_split", "validation")
    assert done.returncode == 0, done.stderr
    assert read_split(tmp_path / "out", "train") == tokens_of(SPEECHES[:20])
    assert read_split(tmp_path / "out", "val") == tokens_of(SPEECHES[30:40])
    words[-1] = tmp_path / "other"
    assert_user_error(run(*words, "--val_split", "test"), "Bad split: test", "train", "validation")
    assert_user_error(run(*words, "--text_column", "txt"), "row 1 has nothing in column 'txt'",
                      "columns are: id, text")


def test_validation_and_output_files_are_not_trained_on(tmp_path):
    """Both are inside the input folder here; a second run finds the same input."""
    for i in range(3):
        write(tmp_path / f"{i}.jsonl", jsonl(SPEECHES[10 * i:10 * i + 10]))
    write(tmp_path / "README.md", "about the data")
    for _ in range(2):
        prepare.main(PrepareConfig(input=[str(tmp_path)], val_input=[str(tmp_path / "2.jsonl")],
                                   out=str(tmp_path / "out")))
    assert read_split(tmp_path / "out", "train") == tokens_of(SPEECHES[:20])
    assert read_split(tmp_path / "out", "val") == tokens_of(SPEECHES[20:30])


@pytest.mark.parametrize("text", ["x" * 3_000_000, "before" + " " * 3_000_000 + "after"])
def test_prepare_encodes_very_long_words_and_whitespace(tmp_path, text):
    """Memory is bounded, and tiktoken, which fails on a million spaces, never gets them."""
    source = write(tmp_path / "a.jsonl", jsonl([text]))
    prepare.main(PrepareConfig(input=[str(source)], out=str(tmp_path / "out"), val_fraction=0))
    assert GPT2.decode(read_split(tmp_path / "out", "train")[1:]) == text


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """Return a folder with 4 MB in all formats, one file a single long document."""
    folder = tmp_path_factory.mktemp("big")
    numbered = [f"{i} {speech}" for i in range(3) for speech in SPEECHES]
    write(folder / "a.jsonl.gz", gzip.compress(jsonl(numbered)))
    write(folder / "b.txt", TEXT.read_text() * 60)
    write(folder / "c.csv", table(numbered, ","))
    write(folder / "d.jsonl.zst", zstd(jsonl(numbered)))
    write(folder / "e.parquet", parquet(numbered))
    return folder


BIG = ["--shard_size", "50000", "--val_fraction", "0.2"]


@pytest.fixture(scope="module")
def uninterrupted(big, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    done = run("-m", "scripts.prepare", "--input", big, "--out", out, *BIG, "--num_workers", 1)
    assert done.returncode == 0, done.stderr
    return out


def test_shards_equal_the_reference_encoding(big, uninterrupted):
    """A shard ends where a document ends, unless the document is longer than a shard."""
    numbered = [f"{i} {speech}" for i in range(3) for speech in SPEECHES]
    book = (big / "b.txt").read_text()
    cut = book.index("\n", int(0.8 * len(book))) + 1
    for split, part in (("train", book[:cut]), ("val", book[cut:])):
        rows = [text for text in numbered if assign_split(text, 0.2) == split]
        expected = [*rows, part, *rows, *rows, *rows]
        assert read_split(uninterrupted, split) == tokens_of(expected)
        paths = sorted(uninterrupted.glob(f"{split}_*.npy"))
        for path, following in itertools.pairwise(paths):
            n, tokens = len(np.load(path)), np.load(following)
            n_next = next(iter(np.flatnonzero(tokens[1:] == 50256) + 1),
                          len(tokens))  # of the next document
            assert n <= 50_000 < n + n_next if tokens[0] == 50256 else n == 50_000
        assert any(np.load(path)[0] != 50256 for path in paths)  # the book continues there
        assert read_meta(uninterrupted)["splits"][split] == {
            "shards": len(paths), "documents": len(expected), "tokens": len(tokens_of(expected))}


def test_shards_do_not_depend_on_num_workers(big, uninterrupted, tmp_path):
    """Otherwise the data would depend on the machine."""
    prepare.main(PrepareConfig(input=[str(big)], out=str(tmp_path / "out"), shard_size=50000,
                               val_fraction=0.2, num_workers=4))
    assert shards(tmp_path / "out") == shards(uninterrupted)


def test_prepare_resumes_after_sigkill_with_identical_shards(big, uninterrupted, tmp_path):
    """Killed as it puts a file into place: before, between and after shards of a long document,
    and before meta.json says that they exist."""
    out = tmp_path / "out"
    script = write(tmp_path / "kill_at.py", KILL_AT)
    words = ["--input", big, "--out", out, *BIG, "--num_workers", 2]
    for n in (2, 3, 12, 6):
        done = run(script, n, *words)
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        with pytest.raises(UserError, match="incomplete: run `python .* --num_workers 2`"):
            read_meta(out)
    assert_user_error(run("-m", "scripts.prepare", *words, "--shard_size", "60000"),
                      "holds other data", "--shard_size was 50000")
    done = run("-m", "scripts.prepare", *words)
    assert done.returncode == 0 and "resuming after" in done.stdout, done.stdout + done.stderr
    assert shards(out) == shards(uninterrupted)
    assert read_meta(out)["splits"] == read_meta(uninterrupted)["splits"]


def test_full_disk_keeps_complete_shards(big, uninterrupted, tmp_path, monkeypatch):
    """Complete shards stay, and the same command resumes when there is space;
    without any, --out is deleted."""
    out = tmp_path / "out"
    words = ["-m", "scripts.prepare", "--input", big, "--out", out, *BIG]
    done = subprocess.run(  # at most 20 kB per file: less than the first shard
        ["bash", "-c", 'ulimit -f 20; exec "$0" "$@"', sys.executable, *map(str, words)],
        capture_output=True, text=True, cwd=ROOT)
    assert_user_error(done, "_00000.npy: File too large")
    assert not out.exists()
    written, write_shard = [], gpt.shards.write_shard

    def full(*args):
        written.append(args)
        if len(written) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_shard(*args)

    config = PrepareConfig(input=[str(big)], out=str(out), shard_size=50000, val_fraction=0.2)
    monkeypatch.setattr("gpt.shards.write_shard", full)
    with pytest.raises(OSError, match="No space"):
        prepare.main(config)
    assert len(shards(out)) == 8
    prepare.main(config)
    assert shards(out) == shards(uninterrupted)


def test_prepare_rejects_changed_input(tmp_path):
    """Otherwise shards of two different texts could be mixed."""
    file = write(tmp_path / "a.jsonl", jsonl(SPEECHES))
    config = PrepareConfig(input=[str(file)], out=str(tmp_path / "out"), val_fraction=0)
    prepare.main(config)
    file.write_bytes(file.read_bytes().replace(b"the", b"some"))
    with pytest.raises(UserError, match="other data"):
        prepare.main(config)


def test_a_failed_preparation_leaves_a_tokenizer_alone(tmp_path):
    """Even if it is in the folder of --out."""
    Tokenizer.train(SPEECHES, 300).save(tmp_path)
    with pytest.raises(UserError, match="holds other data"):
        prepare.main(PrepareConfig(input=[str(TEXT)], tokenizer=str(tmp_path), out=str(tmp_path)))
    assert (tmp_path / "tokenizer.tiktoken").exists()


def test_missing_data_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for data_root, command in (
            ("shakespeare_data/bpe2048_", "python prepare_shakespeare.py"),
            ("tinystories_data", "scripts.prepare --config configs/data/tinystories.yaml"),
            ("my_data", "scripts.prepare --input FILES --out my_data")):
        with pytest.raises(UserError, match=f"'{data_root}' has no train_.*: run `.*{command}`"):
            find_shards(data_root, "train")


def test_shards_of_build_nanogpt_are_found(tmp_path):
    """Their names have a prefix and six digits."""
    for name in ("edufineweb_val_000000", "edufineweb_train_000001", "edufineweb_train_000002"):
        np.save(tmp_path / f"{name}.npy", np.arange(9, dtype=np.uint16))
    found = [path.name for path in find_shards(tmp_path, "train")]
    assert found == ["edufineweb_train_000001.npy", "edufineweb_train_000002.npy"]
