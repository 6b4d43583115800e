"""scripts.prepare: documents of any format,
and identical shards for any workers and interruptions."""

import csv
import errno
import gzip
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt.shards
from gpt import text_files
from gpt.errors import UserError
from gpt.shards import read_meta
from gpt.text_files import TextConfig, assign_split, cut_chunks, find_sources, read_batches
from gpt.tokenizer import Tokenizer
from scripts import prepare
from scripts.prepare import PrepareConfig
from tests.conftest import ROOT, TEXT, assert_user_error, run, start

SPEECHES = [speech for speech in TEXT.read_text().split("\n\n") if speech.strip()]
GPT2 = Tokenizer()


def tokens_of(texts: list[str]) -> list[int]:
    """Return the reference encoding: <|endoftext|> and the text of each document in turn."""
    return [token for text in texts for token in [50256, *GPT2.encode(text)]]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


def read_split(folder: Path, split: str) -> list[int]:
    paths = sorted(folder.glob(f"{split}_*.npy"))
    return np.concatenate([np.load(path) for path in paths]).tolist()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def as_csv(path: Path, texts: list[str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(texts))
    return path


STRANGE = ["NA", "null", "1234", "a\r\nb\r", "  two spaces  ", "naïve 東京 🙂",
           "<|endoftext|> is a token", "x" * 3000, "\ufeffmark"]
TEXTS = [*SPEECHES[:60], *STRANGE]


@pytest.mark.parametrize("kind", ["jsonl", "json", "pretty.json", "csv", "parquet", "jsonl.gz",
                                  "jsonl.zst", "json.zst", "two members.jsonl.gz", "mixed.jsonl"])
def test_prepare_keeps_documents_unchanged_in_every_format(tmp_path, kind):
    """Readers must not change, lose or split a text."""
    path, lines = tmp_path / f"texts.{kind}", jsonl(TEXTS)
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    if kind == "csv":
        as_csv(path, TEXTS)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "id": range(len(TEXTS))}), path, row_group_size=7)
    elif kind == "mixed.jsonl":
        # other keys that change their types, empty lines, null and empty texts
        others = [{"text": None, "id": [1]}, {"text": "", "id": {"a": 1}},
                  {"text": " \n", "id": "s"}]
        write(path, "\n\n".join(map(json.dumps, [*others, *rows, *others])))
    else:
        content = {"json": json.dumps(rows),
                   "pretty.json": json.dumps(rows, indent=2, ensure_ascii=False),
                   "json.zst": json.dumps(rows)}.get(kind, lines).encode()
        if kind == "two members.jsonl.gz":
            half = content.index(b"\n", len(content) // 2) + 1
            content = gzip.compress(content[:half]) + gzip.compress(content[half:])
        else:
            content = gzip.compress(content) if kind.endswith(".gz") else content
        write(path, zstd(content) if kind.endswith(".zst") else content)
    prepare.main(PrepareConfig(input=[str(path)], out=str(tmp_path / "out"), val_fraction=0.3,
                               num_workers=2))
    for split in ("train", "val"):
        mine = [text for text in TEXTS if assign_split(text, 0.3) == split]
        assert read_split(tmp_path / "out", split) == tokens_of(mine)
        about = read_meta(tmp_path / "out")["splits"][split]
        expected = {"tokens": len(tokens_of(mine)), "documents": len(mine),
                    "bytes": sum(len(text.encode()) for text in mine), "shards": 1}
        assert {key: about[key] for key in expected} == expected
    assert len(mine) > 10


def test_input_reads_files_folders_and_patterns_once(tmp_path):
    """Each text file is one document; a file that two patterns match is read once."""
    for i, text in enumerate(SPEECHES[:12]):
        write(tmp_path / "in" / f"{i:02d}" / f"speech.{('txt', 'md')[i % 2]}", text)
    write(tmp_path / "in" / "picture.png", b"\x89PNG")
    words = [tmp_path / "in", str(tmp_path / "in" / "*" / "*.txt"),
             tmp_path / "in" / "00" / "speech.txt"]
    done = run("-m", "scripts.prepare", "--input", *words, "--out", tmp_path / "out",
               "--val_fraction", "0")
    assert done.returncode == 0, done.stderr
    assert read_split(tmp_path / "out", "train") == tokens_of(SPEECHES[:12])
    done = run("-m", "scripts.prepare", "--check", tmp_path / "out")
    assert done.returncode == 0 and "12 documents," in done.stdout
    assert SPEECHES[0].split("\n")[0] in done.stdout


def test_text_file_ends_go_to_validation(tmp_path):
    """No text is lost, and each file is cut at the end of a line."""
    texts = {"a.txt": TEXT.read_text(), "b.txt.gz": TEXT.read_text().upper()}
    for name, text in texts.items():
        write(tmp_path / "in" / name, gzip.compress(text.encode()) if name.endswith("gz") else text)
    done = run("-m", "scripts.prepare", "--input", *(tmp_path / "in" / name for name in texts),
               "--out", tmp_path / "out", "--val_fraction", 0.2)
    assert done.returncode == 0, done.stderr
    books = [GPT2.decode(read_split(tmp_path / "out", split)).split("<|endoftext|>")[1:]
             for split in ("train", "val")]
    for text, train, val in zip(texts.values(), *books, strict=True):
        assert train + val == text and train.endswith("\n")
        assert len(val) == pytest.approx(0.2 * len(text), abs=100)


@pytest.mark.parametrize("text", ["one line without an end", "a\nb", "\n" * 50 + "x" * 50,
                                  "long " * 2_000_000])
def test_split_text_cuts_long_lines(tmp_path, text):
    source, = find_sources(TextConfig(input=[str(write(tmp_path / "a.txt", text))]))
    blocks = list(text_files.split_text(source, TextConfig(input=["a"])))
    train, val = ("".join(block for split, block in blocks if split == name)
                  for name in ("train", "val"))
    assert train + val == text and val and len(val) == pytest.approx(0.1 * len(text), abs=2**20)


def test_prepare_splits_at_separators_and_joins_rows(tmp_path):
    """TinyStories' text files have <|endoftext|> between stories;
    WikiText's rows are lines of one text."""
    stories = write(tmp_path / "stories.txt",
                    "\n<|endoftext|>\n\n".join(SPEECHES[:30]) + "\n<|endoftext|>\n")
    prepare.main(PrepareConfig(input=[str(stories)], out=str(tmp_path / "a"),
                               document_separator="<|endoftext|>", val_fraction=0))
    assert read_split(tmp_path / "a", "train") == tokens_of(SPEECHES[:30])
    lines = TEXT.read_text().split("\n")
    table = write(tmp_path / "lines.jsonl", jsonl(lines))
    prepare.main(PrepareConfig(input=[str(table)], out=str(tmp_path / "b"), join_rows=True,
                               val_fraction=0))
    assert read_split(tmp_path / "b", "train") == tokens_of(["\n".join([*lines, ""])])


def test_val_input_is_the_only_validation_text(tmp_path):
    """Validation text must not be trained on."""
    one = write(tmp_path / "a.jsonl", jsonl(SPEECHES[:50]))
    two = write(tmp_path / "b.jsonl", jsonl(SPEECHES[50:60]))
    prepare.main(PrepareConfig(input=[str(one)], val_input=[str(two)], out=str(tmp_path / "x")))
    assert read_split(tmp_path / "x", "train") == tokens_of(SPEECHES[:50])
    assert read_split(tmp_path / "x", "val") == tokens_of(SPEECHES[50:60])


def test_prepare_reads_a_hub_dataset(tmp_path):
    """`datasets` streams it (here from a local folder); its splits become train and val."""
    for i, texts in enumerate((SPEECHES[:20], SPEECHES[20:30])):
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}),
                       tmp_path / "set" / "data" / f"train-{i:05d}-of-00002.parquet")
    pq.write_table(pa.table({"id": range(10), "text": SPEECHES[30:40]}),
                   tmp_path / "set" / "data" / "validation-00000-of-00001.parquet")
    words = ["-m", "scripts.prepare", "--dataset", tmp_path / "set", "--out", tmp_path / "out"]
    for said in ("Saved", "nothing to do"):
        done = run(*words, "--val_split", "validation")
        assert done.returncode == 0 and said in done.stdout, done.stderr
    assert read_split(tmp_path / "out", "train") == tokens_of(SPEECHES[:30])
    assert read_split(tmp_path / "out", "val") == tokens_of(SPEECHES[30:40])
    words[-1] = tmp_path / "other"
    assert_user_error(run(*words, "--val_split", "test"), "Bad split: test", "train", "validation")
    assert_user_error(run(*words, "--text_column", "txt"), "row 1 has no column 'txt'", "id, text")


def test_prepare_skips_duplicates_and_its_own_output(tmp_path):
    """A link to a file, a validation file inside the input folder,
    a second run with --out inside the input folder."""
    for i in range(3):
        write(tmp_path / f"{i}.jsonl", jsonl(SPEECHES[10 * i:10 * i + 10]))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "0.jsonl")
    write(tmp_path / ".cache" / "hidden.txt", "not meant")
    out = tmp_path / "out"
    for _ in range(2):
        prepare.main(PrepareConfig(input=[str(tmp_path)], val_input=[str(tmp_path / "2.jsonl")],
                                   out=str(out)))
        write(out / "notes.txt", "a text file beside the shards")
    assert read_split(out, "train") == tokens_of(SPEECHES[:20])
    assert read_split(out, "val") == tokens_of(SPEECHES[20:30])


@given(text=(st.text(alphabet=st.sampled_from("ab1'.,é東\u00a0 \n\r\t<|>"), max_size=400)
             | st.text(max_size=200)),
       block=st.integers(1, 60), size=st.integers(4, 40))
@settings(max_examples=400, deadline=None)
def test_cut_chunks_keeps_the_tokens_of_the_document(text, block, size):
    """A document in chunks must give the same ids as in one string,
    wherever a block of the file ends."""
    before = text_files.MIN_CHUNK, text_files.MAX_CHUNK
    text_files.MIN_CHUNK, text_files.MAX_CHUNK = size, 10_000
    try:
        chunks = list(cut_chunks("train", (text[i:i + block] for i in range(0, len(text), block))))
    finally:
        text_files.MIN_CHUNK, text_files.MAX_CHUNK = before
    assert "".join(chunk for _, _, chunk in chunks) == ("" if text.isspace() else text)
    assert [begins for _, begins, _ in chunks] == [True, *[False] * (len(chunks) - 1)][:len(chunks)]
    if chunks:
        ids = np.concatenate([GPT2.encode_documents([chunk[1:]]) for chunk in chunks])
        assert ids.tolist() == [50256, *GPT2.encode(text)]


@pytest.mark.parametrize("text", ["x" * 3_000_000, "before" + " " * 3_000_000 + "after",
                                  "東" * 1_000_000 + " end"])
def test_prepare_encodes_very_long_words_and_whitespace(tmp_path, text):
    """Memory is bounded, and tiktoken, which fails on a million spaces, never gets them."""
    source = write(tmp_path / "a.jsonl", jsonl([text]))
    prepare.main(PrepareConfig(input=[str(source)], out=str(tmp_path / "out"), val_fraction=0))
    assert GPT2.decode(read_split(tmp_path / "out", "train")[1:]) == text


def test_read_batches_are_bounded_for_large_files(tmp_path):
    """About a megabyte is read at a time, however large the file."""
    text = TEXT.read_text()
    write(tmp_path / "long.txt", text * 400)
    write(tmp_path / "array.json", json.dumps([{"text": text}] * 300))
    config = TextConfig(input=[str(tmp_path)])
    batches = read_batches(find_sources(config), config)
    sizes, fractions = zip(*((sum(len(text) for _, _, text in batch), fraction)
                             for batch, fraction in batches), strict=True)
    assert max(sizes) < 2 * text_files.READ_SIZE
    assert sorted(fractions) == list(fractions) and fractions[-1] == 1


def test_assign_split_depends_on_the_document_alone():
    """Otherwise more documents could move validation text to train,
    and losses would not be comparable."""
    chosen = {text: assign_split(text, 0.1) for text in SPEECHES}
    assert 0.03 < sum(split == "val" for split in chosen.values()) / len(chosen) < 0.2
    val = {text for text in chosen if chosen[text] == "val"}
    assert val <= {text for text in SPEECHES if assign_split(text, 0.2) == "val"}


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """Return a folder with 10 MB in three files, one of them a single long document."""
    folder = tmp_path_factory.mktemp("big")
    write(folder / "a.jsonl", jsonl([f"{i} {speech}" for i in range(16) for speech in SPEECHES]))
    write(folder / "b.txt", TEXT.read_text() * 60)
    more = jsonl([f"{speech} {i}" for i in range(16) for speech in SPEECHES])
    write(folder / "c.jsonl.gz", gzip.compress(more.encode()))
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
    rows = [(big / "a.jsonl").read_text(),
            gzip.decompress((big / "c.jsonl.gz").read_bytes()).decode()]
    documents = [[json.loads(line)["text"] for line in text.splitlines()] for text in rows]
    book = (big / "b.txt").read_text()
    cut = book.index("\n", int(0.8 * len(book))) + 1
    for split, part in (("train", book[:cut]), ("val", book[cut:])):
        expected = [text for text in documents[0] if assign_split(text, 0.2) == split] + [part]
        expected += [text for text in documents[1] if assign_split(text, 0.2) == split]
        assert read_split(uninterrupted, split) == tokens_of(expected)
        paths = sorted(uninterrupted.glob(f"{split}_*.npy"))
        for path, following in itertools.pairwise(paths):
            n, tokens = len(np.load(path)), np.load(following)
            n_next = next(iter(np.flatnonzero(tokens[1:] == 50256) + 1),
                          len(tokens))  # of the next document
            assert n <= 50_000 < n + n_next if tokens[0] == 50256 else n == 50_000
        assert any(np.load(path)[0] != 50256 for path in paths)  # the book continues there
        stats = read_meta(uninterrupted)["splits"][split]
        assert (stats["documents"], stats["shards"]) == (len(expected), len(paths))


def test_shards_do_not_depend_on_num_workers(big, uninterrupted, tmp_path):
    """Otherwise the data would depend on the machine."""
    prepare.main(PrepareConfig(input=[str(big)], out=str(tmp_path / "out"), shard_size=50000,
                               val_fraction=0.2, num_workers=4))
    assert shards(tmp_path / "out") == shards(uninterrupted)


def test_prepare_resumes_after_sigkill_with_identical_shards(big, uninterrupted, tmp_path):
    """Killed twice, it keeps its complete shards;
    incomplete data is rejected until the same command finishes."""
    out = tmp_path / "out"
    words = ["-m", "scripts.prepare", "--input", big, "--out", out, *BIG, "--num_workers", "2"]
    for n_shards in (1, 12):
        process = start(*words)
        while process.poll() is None and len(shards(out)) < n_shards:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "finished before the kill"
        with pytest.raises(UserError, match=r"incomplete: run `python -m scripts.prepare "
                                            r"--input .* --num_workers 2`"):
            read_meta(out)
    assert_user_error(run(*words, "--shard_size", "60000"),
                      "holds other data", "--shard_size was 50000")
    done = run(*words)
    assert done.returncode == 0 and "resuming" in done.stdout, done.stdout + done.stderr
    assert shards(out) == shards(uninterrupted)
    assert sorted(path.name for path in out.iterdir()) == ["meta.json", *shards(uninterrupted)]
    assert read_meta(out)["splits"] == read_meta(uninterrupted)["splits"]
    assert "nothing to do" in run(*words).stdout


@pytest.mark.parametrize("lost", [["val_00000.npy"], ["train_00003.npy"],
                                  ["train_last", "val_last"]])
def test_prepare_names_or_rewrites_missing_shards(big, uninterrupted, tmp_path, lost):
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    last = {split: sorted(out.glob(f"{split}_*.npy"))[-1] for split in ("train", "val")}
    for name in lost:
        (last[name[:-5]] if name.endswith("last") else out / name).unlink()
    config = PrepareConfig(input=[str(big)], out=str(out), shard_size=50000, val_fraction=0.2)
    if lost[0].endswith("last"):
        prepare.main(config)
        assert shards(out) == shards(uninterrupted)
    else:
        with pytest.raises(UserError, match=f"{lost[0]} is missing"):
            prepare.main(config)


def test_full_disk_keeps_complete_shards(big, uninterrupted, tmp_path, monkeypatch):
    """Complete shards stay, and the same command resumes when there is space;
    without any, --out is deleted."""
    out = tmp_path / "out"
    words = ["-m", "scripts.prepare", "--input", big, "--out", out, *BIG]
    done = subprocess.run(  # at most 90 kB per file: less than the first shard
        ["bash", "-c", 'ulimit -f 90; exec "$0" "$@"', sys.executable, *map(str, words)],
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


def test_prepare_rejects_changed_input(big, tmp_path):
    """Otherwise shards of two different texts could be mixed."""
    file = write(tmp_path / "a.jsonl", jsonl(SPEECHES))
    config = PrepareConfig(input=[str(file)], out=str(tmp_path / "out"), val_fraction=0)
    prepare.main(config)
    file.write_bytes(file.read_bytes().replace(b"the", b"THE"))
    with pytest.raises(UserError, match="other data"):
        prepare.main(config)


def test_check_detects_damaged_and_missing_shards(tmp_path):
    """Truncated, overwritten or missing."""
    out = tmp_path / "out"
    prepare.main(PrepareConfig(input=[str(TEXT)], out=str(out), shard_size=4000))
    check = ["-m", "scripts.prepare", "--check", out]
    assert run(*check).returncode == 0
    shard = sorted(out.glob("train_*.npy"))[1]
    good = shard.read_bytes()
    for content, word in ((good[:-100], "truncated"), (good[:-2] + b"\xff\xff", "65535"),
                          (None, "meta.json says")):
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(UserError, match=word):
            prepare.main(PrepareConfig(check=str(out)))


def test_prepare_rejects_csv_rows_of_wrong_length(tmp_path):
    """An unquoted comma must not truncate a text."""
    path = write(tmp_path / "a.csv", "id,text\n1,Hello, world\n")
    with pytest.raises(UserError, match="line 2: broken CSV .3 cells, but 2 column names"):
        prepare.main(PrepareConfig(input=[str(path)], out=str(tmp_path / "out")))
