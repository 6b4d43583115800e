"""gpt/text_files.py: documents of any format, unchanged, and one line for what is not text."""

import bz2
import csv
import gzip
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import text_files
from gpt.errors import UserError
from gpt.text_files import TextConfig, assign_split, cut_chunks, find_sources, read_batches
from gpt.tokenizer import Tokenizer
from tests.conftest import ROOT, TEXT, run

SPEECHES = [speech for speech in TEXT.read_text().split("\n\n") if speech.strip()]
STRANGE = ["NA", "null", "1234", "a\r\nb\r", "  two spaces  ", "naïve 東京 🙂", "\ufeffmark",
           "<|endoftext|> is a token", "x" * 3000, "with \t tab, comma, and \"quotes\""]
TEXTS = [*SPEECHES[:40], *STRANGE]
GPT2 = Tokenizer()


def read(*paths: Path | str, **options) -> dict[str, list[str]]:
    """Return the documents of each split."""
    config = TextConfig(input=list(map(str, paths)), **options)
    documents: dict[str, list[str]] = {"train": [], "val": []}
    for split, begins, text in itertools.chain(*read_batches(find_sources(config), config)):
        if begins:
            documents[split].append(text)
        else:
            documents[split][-1] += text
    return documents


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(texts: list[str]) -> bytes:
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    return "\n".join([*lines, ""]).encode()


def table(texts: list[str], delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([["id", "text"], *enumerate(texts)])
    return file.getvalue().encode()


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), sink, row_group_size=7)
    return sink.getvalue().to_pybytes()


def arrow(new_file: Callable, texts: list[str]) -> bytes:
    sink, rows = pa.BufferOutputStream(), pa.table({"id": range(len(texts)), "text": texts})
    with new_file(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=20)
    return sink.getvalue().to_pybytes()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
# The values of other keys change their types; there are blank lines, null and blank texts.
MIXED = [{"id": [1], "text": None}, {"id": {"a": 1}, "text": ""}, {"id": "s", "text": " \n"}, *ROWS]
HUGE_NUMBER = b'{"text": "one", "id": ' + b"9" * 5000 + b"}\n"


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", jsonl(TEXTS)),
    ("a.NDJSON", b"\xef\xbb\xbf" + jsonl(TEXTS)),
    ("a.jsonlines", "\n\n".join(map(json.dumps, MIXED)).encode()),
    ("a.json", b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=2).encode()),
    ("lines.json", jsonl(TEXTS)),
    ("a.csv", table(TEXTS, ",")),
    ("a.tsv", table(TEXTS, "\t")),
    ("a.parquet", parquet(TEXTS)),
    ("stream[1].arrow", arrow(pa.ipc.new_stream, TEXTS)),
    ("file*.arrow", arrow(pa.ipc.new_file, TEXTS)),
    ("A.JSONL.GZ", gzip.compress(jsonl(TEXTS[:9])) + gzip.compress(jsonl(TEXTS[9:]))),
    ("a.json.zst", zstd(json.dumps(ROWS).encode())),
    ("a.csv.bz2", bz2.compress(table(TEXTS, ","))),
])
def test_tables_keep_every_text_unchanged(tmp_path, name, content):
    documents = read(write(tmp_path / name, content), val_fraction=0.3)
    for split in ("train", "val"):
        assert documents[split] == [text for text in TEXTS if assign_split(text, 0.3) == split]
    assert len(documents["val"]) > 5


def test_folders_are_read_once_without_hidden_files_and_descriptions(tmp_path):
    """A folder with links to itself, what `save_to_disk` writes, a clone of a dataset."""
    notes = tmp_path / "notes"
    for i in range(4):
        write(notes / f"{i}" / "a.md", SPEECHES[i])
    write(notes / "README.md", SPEECHES[4])
    write(notes / "picture.png", b"\x89PNG")
    write(notes / ".obsidian" / "b.md", "hidden")
    (notes / "c.md").symlink_to(notes / "0" / "a.md")
    write(notes / "old_data" / "meta.json", "{}")
    for name in ("one", "two"):
        (notes / name).symlink_to(notes)
    documents = read(notes, notes / "1" / "a.md", f"{notes}/*/*.md", val_fraction=0)
    assert sorted(documents["train"]) == sorted(SPEECHES[:5])
    datasets.Dataset.from_dict({"text": SPEECHES[:9]}).save_to_disk(tmp_path / "saved")
    write(tmp_path / "saved" / "README.md", "a description")
    write(tmp_path / "saved" / "cache-0123.arrow", "intermediate results")
    assert read(tmp_path / "saved", val_fraction=0)["train"] == SPEECHES[:9]


def test_standard_input_and_pipes(tmp_path):
    """They can be read only once, but the part for validation is known at the end."""
    rows = write(tmp_path / "rows", jsonl(SPEECHES[:20]))
    os.mkfifo(tmp_path / "pipe.jsonl")
    line = (f"cat {rows} > {tmp_path}/pipe.jsonl & cat {TEXT} | "
            f"{sys.executable} -m scripts.prepare --input - {tmp_path}/pipe.jsonl "
            f"--out {tmp_path}/out --val_fraction 0.2")
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    texts = {split: GPT2.decode(np.load(tmp_path / "out" / f"{split}_00000.npy"))
             .split("<|endoftext|>")[1:] for split in ("train", "val")}
    assert texts["train"][0] + texts["val"][0] == TEXT.read_text()
    assert sorted(texts["train"][1:] + texts["val"][1:]) == sorted(SPEECHES[:20])


@pytest.mark.parametrize("text", ["one line without an end", "a\nb", "\n" * 50 + "x" * 50,
                                  "long " * 2_000_000, "a\r\n" * 100])
def test_the_end_of_a_text_is_for_validation(tmp_path, text):
    """From the start of a line on, if there is one; no text is lost."""
    (train,), (val,) = read(write(tmp_path / "a.txt", text)).values()
    assert train + val == text
    line_end = text.find("\n", int(0.9 * len(text)), -1) + 1
    assert len(train) == (line_end or int(0.9 * len(text)))


def test_separators_and_joined_rows(tmp_path):
    """TinyStories' text files have <|endoftext|> between stories;
    WikiText's rows are lines of one text."""
    stories = write(tmp_path / "a.txt", "\n<|endoftext|>\n\n".join([*SPEECHES[:30], "", ""]))
    documents = read(stories, document_separator="<|endoftext|>", val_fraction=0)
    assert documents["train"] == SPEECHES[:30]
    lines = write(tmp_path / "b.jsonl", jsonl(TEXT.read_text().split("\n")))
    documents = read(lines, join_rows=True)
    assert "".join(documents["train"] + documents["val"]) == TEXT.read_text() + "\n"


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


def test_batches_are_bounded_for_large_files(tmp_path):
    """No chunk that continues a document follows another chunk."""
    write(tmp_path / "a.txt", TEXT.read_text() * 400)
    config = TextConfig(input=[str(tmp_path)])
    batches = list(read_batches(find_sources(config), config))
    assert max(sum(len(text) for _, _, text in batch) for batch in batches) < 2**21
    assert all(begins for batch in batches for _, begins, _ in batch[1:])


def test_assign_split_depends_on_the_document_alone():
    """Otherwise more documents could move validation text to train,
    and losses would not be comparable."""
    chosen = {text: assign_split(text, 0.1) for text in SPEECHES}
    val = {text for text in chosen if chosen[text] == "val"}
    assert 0.03 < len(val) / len(chosen) < 0.2
    assert val <= {text for text in SPEECHES if assign_split(text, 0.2) == "val"}


def tar_archive() -> bytes:
    """Return a .tar.gz file with a text."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.add(TEXT, "a.txt")
    return file.getvalue()


@pytest.mark.parametrize(("name", "content", "said"), [
    ("windows.txt", "text".encode("utf-16"), "not plain text: .*iconv -f UTF-16 -t UTF-8"),
    ("books.tar.gz", tar_archive(), "is not plain text: unpack an archive"),
    ("train.bin", np.arange(99, dtype=np.uint16).tobytes(), "of nanoGPT.*--data_root"),
    ("novel.txt", "un café noir".encode("latin1"),
     r"near b'un caf\\xe9 noir'.*iconv -f WINDOWS-1252"),
    ("a.json", b'[{"text": "one"}\n', "a.json, line 2: broken JSON"),
    ("a.jsonl", b'{"text": "one"}\n{"text": \n', "a.jsonl, line 2: broken JSON"),
    ("chat.json", b'[{"author": 1, "content": "one"}]', "row 1 .*columns are: author, content"),
    ("export.json", json.dumps({"name": "chat", "messages": []}, indent=1).encode(),
     "row 1 .*columns are: name, messages"),
    ("numbers.jsonl", b'{"text": 12}\n[1]\n', "row 1 has float in column 'text', expected text"),
    ("a.csv", b"id,text\n1,Hello, world\n", "near line 2: broken table .expected 2 cells"),
    ("quote.csv", b'id,text\n1,"Hello\n', "broken table .unexpected end of data"),
    ("long.jsonl", jsonl(["x" * 2000]), "row 1 has 2,000 characters, more than 1,000"),
    ("long.csv", table(["x" * 2000], ","), "field larger than field limit .1000"),
    ("missing.t*t", None, "matches no files: pass files, folders or a pattern in quotes"),
    ("src/a.py", b"pass", "src' has no .txt, .md,.*/src/.*py'"),
    ("edu/edufineweb_train_000001.npy", b"\x93NUMPY", "holds token ids.*--data_root"),
])
def test_what_is_not_text_is_named(tmp_path, monkeypatch, name, content, said):
    monkeypatch.setattr(text_files, "MAX_ROW", 1000)
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(UserError, match=said):
        read(path.parent if "/" in name else path)


def test_one_huge_number_does_not_stop_a_file(tmp_path):
    """Python converts at most 4,300 digits."""
    assert read(write(tmp_path / "a.jsonl", HUGE_NUMBER), val_fraction=0)["train"] == ["one"]


def test_text_gives_the_same_tokens_to_every_command(tmp_path):
    """Perplexity is measured on the tokens that training would read: of a byte order mark, a
    million spaces, rows of a compressed table."""
    from scripts.eval_perplexity import read_data

    write(tmp_path / "a.txt", b"\xef\xbb\xbf" + b"before" + b" " * 1_200_000 + b"after")
    write(tmp_path / "b.jsonl.gz", gzip.compress(jsonl(SPEECHES)))
    for name in ("a.txt", "b.jsonl.gz"):
        done = run("-m", "scripts.prepare", "--input", tmp_path / name, "--out", tmp_path / "out",
                   "--val_fraction", 0)
        assert done.returncode == 0, done.stderr
        tokens, = read_data(str(tmp_path / name), GPT2)
        assert tokens.tolist() == np.load(tmp_path / "out" / "train_00000.npy").tolist()
        for path in (tmp_path / "out").iterdir():
            path.unlink()
