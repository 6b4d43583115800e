"""gpt/text_files.py: documents of any format, unchanged, and one line for what is not text."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyarrow import csv, feather, parquet

from gpt import text_files
from gpt.errors import UserError
from gpt.text_files import TextConfig, assign_split, cut_chunks, find_sources, read_batches
from gpt.tokenizer import Tokenizer
from scripts.eval_perplexity import read_data
from scripts.prepare import PrepareConfig, main
from tests.conftest import ROOT, TEXT

SPEECHES = [speech for speech in TEXT.read_text().split("\n\n") if speech.strip()]
STRANGE = ["NA", "null", "1234", "a\r\nb\r", "  two spaces  ", "naïve 東京 🙂", "\ufeffmark",
           "<|endoftext|> is a token", "x" * 3000, "with \t tab, comma, and \"quotes\""]
TEXTS = [*SPEECHES[:40], *STRANGE]
GPT2 = Tokenizer()


def read(*paths: Path | str, **options) -> dict[str, list[str]]:
    """Return the documents of each split, which come in batches of bounded size."""
    config = TextConfig(input=list(map(str, paths)), **options)
    documents: dict[str, list[str]] = {"train": [], "val": []}
    for batch in read_batches(find_sources(config), config):
        assert sum(len(text) for _, _, text in batch) < 2**21
        for split, begins, text in batch:
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
    return b"".join(json.dumps({"id": 1, "text": text}).encode() + b"\n" for text in texts)


def gzip(content: bytes) -> bytes:
    return pa.compress(content, "gzip", asbytes=True)


def table(writer, *args, **options) -> bytes:
    """Return the file that a writer of pyarrow makes of TEXTS."""
    sink = pa.BufferOutputStream()
    writer(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), sink, *args, **options)
    return sink.getvalue().to_pybytes()


# The values of other keys change their types; Python converts at most 4,300 digits to an integer.
# There are blank lines, null and blank texts.
MIXED = (b'{"id": [1], "text": null}\n\n{"id": {"a": 1}, "text": " \\n"}\n \n'
         b'{"text": null, "id": ' + b"9" * 5000 + b"}\n" + jsonl(TEXTS))
ARRAY = json.dumps([{"id": 1, "text": text} for text in TEXTS], indent=2).encode()


FILES = {
    "a.NDJSON": b"\xef\xbb\xbf" + jsonl(TEXTS),
    "a.jsonlines": MIXED,
    "a.json": b"\xef\xbb\xbf\n" + ARRAY,
    "a.csv": table(csv.write_csv),
    "a.tsv": table(csv.write_csv, csv.WriteOptions(delimiter="\t")),
    "a[1].parquet": table(parquet.write_table, row_group_size=7),
    "a*.arrow": table(feather.write_feather, compression="uncompressed", chunksize=20),
    "A.JSONL.GZ": gzip(jsonl(TEXTS[:9])) + gzip(jsonl(TEXTS[9:])),
    "a.json.zst": pa.compress(ARRAY, "zstd", asbytes=True),
}


@pytest.mark.parametrize("name", FILES)
def test_tables_keep_every_text_unchanged(tmp_path, name):
    documents = read(write(tmp_path / name, FILES[name]), val_fraction=0.3)
    for split in ("train", "val"):
        assert documents[split] == [text for text in TEXTS if assign_split(text, 0.3) == split]


def test_folders_are_read_once_without_hidden_files_and_descriptions(tmp_path):
    """A folder with links to itself, what `save_to_disk` writes, a clone of a dataset."""
    notes = tmp_path / "notes"
    write(notes / "one" / "a.md", SPEECHES[0])
    write(notes / "README.md", SPEECHES[1])
    write(notes / ".obsidian" / "b.md", "hidden")
    (notes / "c.md").symlink_to(notes / "one" / "a.md")
    (notes / "loop").symlink_to(notes)
    documents = read(notes, notes / "one" / "a.md", f"{notes}/*/*.md", val_fraction=0)
    assert documents["train"] == SPEECHES[1::-1]
    datasets.Dataset.from_dict({"text": SPEECHES[:9]}).save_to_disk(tmp_path / "saved")
    write(tmp_path / "saved" / "README.md", "a description")
    write(tmp_path / "saved" / "cache-0123.arrow", "intermediate results")
    assert read(tmp_path / "saved", val_fraction=0)["train"] == SPEECHES[:9]


def test_standard_input_and_pipes(tmp_path):
    """They can be read only once, but the part for validation is known at the end."""
    line = 'cat "$1" | "$2" -m scripts.prepare --input - <(cat "$1") --out "$0"'
    done = subprocess.run(["bash", "-c", line, tmp_path, TEXT, sys.executable], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    train, val = (GPT2.decode(np.load(tmp_path / f"{split}_00000.npy")).split("<|endoftext|>")
                  for split in ("train", "val"))
    for i in (1, 2):
        assert train[i] + val[i] == TEXT.read_text()


@pytest.mark.parametrize("text", ["one line without an end", "one with an end\n", "a\nb",
                                  "\n" * 50 + "x" * 50, "long " * 2_000_000, "a\r\n" * 100])
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
    lines = write(tmp_path / "b.jsonl", jsonl(TEXT.read_text().splitlines()))
    (train,), (val,) = read(lines, join_rows=True).values()
    assert train + val == TEXT.read_text()


@given(text=st.text(alphabet="ab1'.,é東\u00a0 \n\r\t<|>", min_size=50, max_size=400),
       block=st.integers(1, 60), size=st.integers(4, 40))
@settings(max_examples=400, deadline=None)
def test_cut_chunks_keeps_the_tokens_of_the_document(text, block, size):
    """A document in chunks must give the same ids as in one string, wherever a block of the file
    ends, if every chunk has the end of a word."""
    blocks = (text[i:i + block] for i in range(0, len(text), block))
    with mock.patch.multiple(text_files, MIN_CHUNK=size, MAX_CHUNK=size + 30):
        chunks = [chunk[1:] for chunk in cut_chunks("train", blocks)]
    assume(all(len(chunk) < size + 30 for _, chunk in chunks))
    ids = np.concatenate([GPT2.encode_documents([chunk]) for chunk in chunks])
    assert ids.tolist() == [50256, *GPT2.encode(text)]


def test_assign_split_depends_on_the_document_alone():
    """Otherwise more documents could move validation text to train,
    and losses would not be comparable."""
    val = {text for text in SPEECHES if assign_split(text, 0.1) == "val"}
    assert 0.03 < len(val) / len(SPEECHES) < 0.2
    assert val <= {text for text in SPEECHES if assign_split(text, 0.2) == "val"}


@pytest.mark.parametrize(("name", "content", "said"), [
    ("windows.txt", "text".encode("utf-16"), "not plain text: .*iconv -f UTF-16 -t UTF-8"),
    ("books.tar.gz", gzip(b"a.txt\0\0\0"), "is not plain text: unpack an archive"),
    ("edu/edufineweb_train_000001.npy", b"\x93NUMPY", "holds token ids.*--data_root"),
    ("novel.txt", "un café noir".encode("latin1"),
     r"near b'un caf\\xe9 noir'.*iconv -f WINDOWS-1252"),
    ("a.jsonl", b'{"text": "one"}\n{"text": \n', "a.jsonl, line 2: broken JSON"),
    ("chat.json", b'[{"author": 1, "content": "one"}]', "row 1 .*columns are: author, content"),
    ("a.csv", b"id,text\n1,Hello, world\n", "near line 2: broken table .expected 2 cells"),
    ("quote.csv", b'id,text\n1,"Hello\n', "broken table .unexpected end of data"),
    ("long.jsonl", jsonl(["x" * 2000]), "row 1 has 2,000 characters, more than 1,000"),
    ("long.csv", "text\n" + "x" * 2000, "field larger than field limit .1000"),
    ("src/a.py", "pass", "src' has no .txt, .md,.*/src/.*py'"),
    ("missing.t*t", None, "matches no files: pass files, folders or a pattern in quotes"),
])
def test_what_is_not_text_is_named(tmp_path, monkeypatch, name, content, said):
    monkeypatch.setattr(text_files, "MAX_ROW", 1000)
    if content:
        write(tmp_path / name, content)
    with pytest.raises(UserError, match=said):
        read(tmp_path / name.split("/")[0])


def test_text_gives_the_same_tokens_to_every_command(tmp_path):
    """Perplexity is measured on the tokens that training would read: of a byte order mark, millions
    of spaces before a word (on which tiktoken fails), a long word, rows of a compressed table."""
    word = " " * 3_000_000 + "x" * 1_200_000
    write(tmp_path / "in" / "a.txt", "\ufeff" + word)
    write(tmp_path / "in" / "b.jsonl.gz", gzip(jsonl(SPEECHES)))
    source, out = str(tmp_path / "in"), str(tmp_path / "out")
    main(PrepareConfig(input=[source], out=out, val_fraction=0))
    tokens, = read_data(source, GPT2)
    assert tokens.tolist() == np.load(f"{out}/train_00000.npy").tolist()
    assert GPT2.decode(tokens).split("<|endoftext|>") == ["", word, *SPEECHES]
