"""scripts.prepare: any text, the same documents and the same bytes however the work is done."""

import csv
import errno
import gzip
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt import documents
from gpt.documents import TextConfig, cut_documents, find_sources, read_batches, split_of
from gpt.errors import UserError
from gpt.shards import ShardWriter, read_meta
from gpt.tokenizer import get_tokenizer
from scripts import prepare
from scripts.prepare import PrepareConfig
from tests.conftest import ROOT, TEXT, Fork, assert_refused, run, start

SPEECHES = [speech for speech in TEXT.read_text().split("\n\n") if speech.strip()]
GPT2 = get_tokenizer()


def tokens_of(texts: list[str]) -> list[int]:
    """The plain way: <|endoftext|>, then the text, one document after the other."""
    return [token for text in texts for token in [50256, *GPT2.encode_ordinary(text)]]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


def read_split(folder: Path, split: str) -> list[int]:
    return np.concatenate([np.load(path) for path in sorted(folder.glob(f"{split}_*.npy"))]).tolist()


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


STRANGE = ["NA", "null", "1234", "a\r\nb\r", "  two spaces  ", "naïve 東京 🙂", "<|endoftext|> is a token", "x" * 3000,
           "\ufeffmark"]
TEXTS = [*SPEECHES[:60], *STRANGE]


@pytest.mark.parametrize("kind", ["jsonl", "json", "pretty.json", "csv", "parquet", "jsonl.gz", "jsonl.zst", "json.zst",
                                  "two members.jsonl.gz", "mixed.jsonl"])
def test_every_format_gives_the_documents_as_they_are(tmp_path, kind):
    """A text that a reader changes, loses or splits is not the text that people wanted to train on."""
    path, lines = tmp_path / f"texts.{kind}", jsonl(TEXTS)
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    if kind == "csv":
        as_csv(path, TEXTS)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "id": range(len(TEXTS))}), path, row_group_size=7)
    elif kind == "mixed.jsonl":  # other keys that change their types, empty lines, null and empty texts
        others = [{"text": None, "id": [1]}, {"text": "", "id": {"a": 1}}, {"text": " \n", "id": "s"}]
        write(path, "\n\n".join(map(json.dumps, [*others, *rows, *others])))
    else:
        content = {"json": json.dumps(rows), "pretty.json": json.dumps(rows, indent=2, ensure_ascii=False),
                   "json.zst": json.dumps(rows)}.get(kind, lines).encode()
        if kind == "two members.jsonl.gz":
            half = content.index(b"\n", len(content) // 2) + 1
            content = gzip.compress(content[:half]) + gzip.compress(content[half:])
        else:
            content = gzip.compress(content) if kind.endswith(".gz") else content
        write(path, zstd(content) if kind.endswith(".zst") else content)
    prepare.main(PrepareConfig(input=[str(path)], out=str(tmp_path / "out"), val_fraction=0.3, num_workers=2))
    for split in ("train", "val"):
        mine = [text for text in TEXTS if split_of(text, 0.3) == split]
        assert read_split(tmp_path / "out", split) == tokens_of(mine)
        about = read_meta(tmp_path / "out")["splits"][split]
        expected = {"tokens": len(tokens_of(mine)), "documents": len(mine),
                    "bytes": sum(len(text.encode()) for text in mine), "shards": 1}
        assert {key: about[key] for key in expected} == expected
    assert len(mine) > 10


def test_files_folders_and_patterns_each_file_once(tmp_path):
    """Text files are a document each; a file that two patterns match must not be trained on twice."""
    for i, text in enumerate(SPEECHES[:12]):
        write(tmp_path / "in" / f"{i:02d}" / f"speech.{('txt', 'md')[i % 2]}", text)
    write(tmp_path / "in" / "picture.png", b"\x89PNG")
    words = [tmp_path / "in", str(tmp_path / "in" / "*" / "*.txt"), tmp_path / "in" / "00" / "speech.txt"]
    done = run("-m", "scripts.prepare", "--input", *words, "--out", tmp_path / "out", "--val_fraction", "0")
    assert done.returncode == 0, done.stderr
    assert "12 documents" in done.stdout
    assert read_split(tmp_path / "out", "train") == tokens_of(SPEECHES[:12])
    done = run("-m", "scripts.prepare", "--check", tmp_path / "out")
    assert done.returncode == 0 and "12 documents of" in done.stdout and SPEECHES[0].split("\n")[0] in done.stdout


@pytest.mark.parametrize("name", ["play.txt", "play.txt.gz"])
def test_of_a_single_text_the_end_is_for_validation(tmp_path, name):
    """There is one document: nothing of it may be lost, and the cut is at the end of a line."""
    text = TEXT.read_text()
    write(tmp_path / name, gzip.compress(text.encode()) if name.endswith("gz") else text)
    prepare.main(PrepareConfig(input=[str(tmp_path / name)], out=str(tmp_path / "out"), val_fraction=0.2))
    parts = [GPT2.decode(read_split(tmp_path / "out", split)[1:]) for split in ("train", "val")]
    assert "".join(parts) == text and parts[0].endswith("\n")
    assert len(parts[1]) == pytest.approx(0.2 * len(text), abs=100)


def test_separators_and_other_ways_to_choose_documents(tmp_path):
    """TinyStories' text files have <|endoftext|> between stories; WikiText's rows are lines of one text."""
    stories = write(tmp_path / "stories.txt", "\n<|endoftext|>\n\n".join(SPEECHES[:30]) + "\n<|endoftext|>\n")
    common = dict(val_fraction=0, num_workers=1)
    prepare.main(PrepareConfig(input=[str(stories)], out=str(tmp_path / "a"), document_separator="<|endoftext|>",
                               **common))
    assert read_split(tmp_path / "a", "train") == tokens_of(SPEECHES[:30])
    lines = TEXT.read_text().split("\n")
    table = write(tmp_path / "lines.jsonl", jsonl(lines))
    prepare.main(PrepareConfig(input=[str(table)], out=str(tmp_path / "b"), documents="file", **common))
    assert read_split(tmp_path / "b", "train") == tokens_of(["\n".join([*lines, ""])])
    prepare.main(PrepareConfig(input=[str(TEXT)], out=str(tmp_path / "c"), documents="row", **common))
    assert read_split(tmp_path / "c", "train") == tokens_of([line for line in lines if line.strip()])
    special = write(tmp_path / "special.txt", "one<|endoftext|>two")
    prepare.main(PrepareConfig(input=[str(special)], out=str(tmp_path / "d"), allow_special=True, **common))
    assert read_split(tmp_path / "d", "train") == tokens_of(["one", "two"])


def test_validation_from_elsewhere_or_the_first_tokens(tmp_path):
    """A validation text that is trained on too measures nothing."""
    one, two = write(tmp_path / "a.jsonl", jsonl(SPEECHES[:50])), write(tmp_path / "b.jsonl", jsonl(SPEECHES[50:60]))
    prepare.main(PrepareConfig(input=[str(one)], val_input=[str(two)], out=str(tmp_path / "x")))
    assert read_split(tmp_path / "x", "train") == tokens_of(SPEECHES[:50])
    assert read_split(tmp_path / "x", "val") == tokens_of(SPEECHES[50:60])
    prepare.main(PrepareConfig(input=[str(one)], val_tokens=700, out=str(tmp_path / "y"), shard_size=500))
    assert read_split(tmp_path / "y", "val") == tokens_of(SPEECHES[:50])[:700]
    assert read_split(tmp_path / "y", "train") == tokens_of(SPEECHES[:50])[700:]


def test_a_data_set_of_the_hub(tmp_path):
    """Its files are found by `datasets` (here in a folder, where no network is), its splits are the run's."""
    for i, texts in enumerate((SPEECHES[:20], SPEECHES[20:30])):
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": texts}), tmp_path / "set" / "data" / f"train-{i:05d}-of-00002.parquet")
    pq.write_table(pa.table({"text": SPEECHES[30:40]}), tmp_path / "set" / "data" / "validation-00000-of-00001.parquet")
    words = ["-m", "scripts.prepare", "--dataset", tmp_path / "set", "--out", tmp_path / "out"]
    done = run(*words, "--val_split", "validation")
    assert done.returncode == 0, done.stderr
    assert read_split(tmp_path / "out", "train") == tokens_of(SPEECHES[:30])
    assert read_split(tmp_path / "out", "val") == tokens_of(SPEECHES[30:40])
    assert_refused(run(*words, "--val_split", "test"), "no files for split 'test'", "train, validation")
    words[-1] = tmp_path / "other"
    assert_refused(run(*words, "--text_column", "txt"), "train-00000-of-00002.parquet", "'txt'", "text")


def test_no_document_twice_and_none_of_the_output(tmp_path):
    """A link to a file, a validation file inside the input folder, a second run into a folder of the input."""
    for i in range(3):
        write(tmp_path / f"{i}.jsonl", jsonl(SPEECHES[10 * i:10 * i + 10]))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "0.jsonl")
    write(tmp_path / ".cache" / "hidden.txt", "not meant")
    out = tmp_path / "out"
    for _ in range(2):
        prepare.main(PrepareConfig(input=[str(tmp_path)], val_input=[str(tmp_path / "2.jsonl")], out=str(out)))
        write(out / "notes.txt", "a text that was put beside the shards")
    assert read_split(out, "train") == tokens_of(SPEECHES[:20])
    assert read_split(out, "val") == tokens_of(SPEECHES[20:30])


def test_a_part_without_text_is_a_part(tmp_path):
    """More parts than documents, or files that are empty: --merge must not wait for what will never come."""
    for i, text in enumerate(["", jsonl(SPEECHES[:3]), ""]):
        write(tmp_path / "in" / f"{i}.jsonl", text)
    config = dict(input=[str(tmp_path / "in")], out=str(tmp_path / "out"), val_fraction=0, parts=3)
    for part in range(3):
        prepare.main(PrepareConfig(**config, part=part))
    with pytest.raises(UserError, match="parts 2 there, 3 here|parts 3 there, 2 here"):
        prepare.main(PrepareConfig(**config | {"parts": 2}))
    prepare.main(PrepareConfig(merge=True, out=config["out"]))
    assert read_split(tmp_path / "out", "train") == tokens_of(SPEECHES[:3])


def test_white_space_without_end_has_its_tokens(tmp_path):
    """tiktoken's expression gives up on a million spaces in a row: such a text is cut, and nothing of it is lost."""
    text = "before" + " " * 1_500_000 + "after"
    config = PrepareConfig(input=[str(write(tmp_path / "a.jsonl", jsonl([text])))], out=str(tmp_path / "out"),
                           val_fraction=0)
    prepare.main(config)
    assert GPT2.decode(read_split(tmp_path / "out", "train")[1:]) == text


def test_input_that_changed_is_not_gone_on_with(tmp_path):
    """Half of the shards from one text and half from another would be the data of neither."""
    file = write(tmp_path / "a.jsonl", jsonl(SPEECHES))
    config = PrepareConfig(input=[str(file)], out=str(tmp_path / "out"), shard_size=500, val_fraction=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK", 4000)
        patch.setattr(ShardWriter, "close", stop_at_third(ShardWriter.close))
        with pytest.raises(OSError, match="No space"):
            prepare.main(config)
    file.write_bytes(file.read_bytes().replace(b"the", b"THE"))
    with pytest.raises(UserError, match="changed"):
        prepare.main(config)


def stop_at_third(close):
    """A ShardWriter.close for which the disk is full from the third shard on."""
    def full(self):
        if self.shards == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        close(self)
    return full


@given(text=st.text(alphabet=st.sampled_from("ab1'.,é東\u00a0 \n\r\t<|>"), max_size=400) | st.text(max_size=200),
       separator=st.sampled_from([None, "<|>", "\n\n", "a"]), block=st.integers(1, 60), sizes=st.integers(4, 40))
@settings(max_examples=400, deadline=None)
def test_pieces_have_the_tokens_of_the_whole(text, separator, block, sizes):
    """A book in pieces must give the ids that it gives as one string, wherever a block of the file ends."""
    before = documents.BLOCK, documents.LONGEST
    documents.BLOCK, documents.LONGEST = sizes, 10_000
    try:
        pieces = list(cut_documents((text[i:i + block] for i in range(0, len(text), block)), separator))
    finally:
        documents.BLOCK, documents.LONGEST = before
    found: list[list[str]] = []
    for starts, piece in pieces:
        assert piece
        if starts:
            found.append([])
        found[-1].append(piece)
    expected = [part.strip("\r\n") for part in text.split(separator)] if separator else [text]
    expected = [part for part in expected if part and not part.isspace()]
    assert ["".join(document) for document in found if not "".join(document).isspace()] == expected
    for document in found:
        tokens = [token for piece in document for token in GPT2.encode_ordinary(piece)]
        assert tokens == GPT2.encode_ordinary("".join(document))


def test_text_without_white_space_is_cut_all_the_same(monkeypatch):
    """Memory must stay bounded for a file of one endless word."""
    monkeypatch.setattr(documents, "BLOCK", 10)
    monkeypatch.setattr(documents, "LONGEST", 40)
    pieces = list(cut_documents(["x" * 7] * 100, None))
    assert "".join(text for _, text in pieces) == "x" * 700
    assert [starts for starts, _ in pieces] == [True] + [False] * (len(pieces) - 1)
    assert max(len(text) for _, text in pieces) <= 60


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """4 MB in three files, of which one is a single long document."""
    folder = tmp_path_factory.mktemp("big")
    write(folder / "a.jsonl", jsonl([f"{i} {speech}" for i in range(16) for speech in SPEECHES]))
    write(folder / "b.txt", TEXT.read_text() * 60)
    more = jsonl([f"{speech} {i}" for i in range(16) for speech in SPEECHES])
    write(folder / "c.jsonl.gz", gzip.compress(more.encode()))
    return folder


BIG = ["--shard_size", "50000", "--val_fraction", "0.2"]


@pytest.fixture(scope="module")
def undisturbed(big, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run("-m", "scripts.prepare", "--input", big, "--out", out, *BIG, "--num_workers", 1)
    assert done.returncode == 0, done.stderr
    return out


def test_the_plain_loop_finds_the_same_tokens(big, undisturbed):
    """The whole of it against one call of the tokenizer a document."""
    texts = [json.loads(line)["text"] for line in (big / "a.jsonl").read_text().splitlines()]
    texts += [(big / "b.txt").read_text()]
    texts += [json.loads(line)["text"] for line in gzip.decompress((big / "c.jsonl.gz").read_bytes()).splitlines()]
    for split in ("train", "val"):
        mine = [text for text in texts if split_of(text, 0.2) == split]
        assert read_split(undisturbed, split) == tokens_of(mine)
        sizes = [len(np.load(path, mmap_mode="r")) for path in sorted(undisturbed.glob(f"{split}_*.npy"))]
        assert set(sizes[:-1]) == {50000} and 0 < sizes[-1] <= 50000


@pytest.mark.parametrize("workers", [2, 5])
def test_the_same_bytes_whatever_the_number_of_workers(big, undisturbed, tmp_path, workers):
    """Data that depends on the machine cannot be compared."""
    prepare.main(PrepareConfig(input=[str(big)], out=str(tmp_path / "out"), shard_size=50000, val_fraction=0.2,
                               num_workers=workers))
    assert shards(tmp_path / "out") == shards(undisturbed)


def test_killed_and_resumed_it_writes_the_same_bytes(big, undisturbed, tmp_path):
    """Hours of work must survive kill -9, twice, at any moment; what is unfinished must not be taken for data."""
    out = tmp_path / "out"
    words = ["-m", "scripts.prepare", "--input", big, "--out", out, *BIG, "--num_workers", "2"]
    record = out / "prepare_00000_of_00001.json"
    for noted in (1, 6):  # shards that are done and noted
        process = start(*words)
        while process.poll() is None and not (
                record.exists() and json.loads(record.read_text())["splits"]["train"]["shards"] >= noted):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was over too soon"
        with pytest.raises(UserError, match="not prepared to its end"):
            read_meta(out)
    assert_refused(run(*words, "--shard_size", "60000"), "other settings", "shard_size 50000 there, 60000 here")
    done = run(*words)
    assert done.returncode == 0 and "going on" in done.stdout, done.stdout + done.stderr
    assert shards(out) == shards(undisturbed)
    assert sorted(path.name for path in out.iterdir()) == ["meta.json", *shards(undisturbed)]
    assert read_meta(out)["splits"] == read_meta(undisturbed)["splits"]
    assert "nothing to do" in run(*words).stdout
    assert_refused(run(*words, "--val_fraction", "0.1"), "other settings", "val_fraction 0.2 there, 0.1 here")


def test_a_full_disk_loses_nothing(big, undisturbed, tmp_path, monkeypatch):
    """The shards before it stay, and the same command goes on when there is room."""
    out = tmp_path / "out"
    words = ["-m", "scripts.prepare", "--input", big, "--out", out, *BIG, "--shard_size", "400000"]
    done = subprocess.run(["bash", "-c", 'ulimit -f 700; exec "$0" "$@"', sys.executable, *map(str, words)],
                          capture_output=True, text=True, cwd=ROOT)
    assert_refused(done, "train_00000.npy", "free disk space and run it again")
    assert not out.exists()
    config = PrepareConfig(input=[str(big)], out=str(out), shard_size=50000, val_fraction=0.2)
    synced, sync = [], ShardWriter.sync

    def full(writer: ShardWriter) -> None:
        synced.append(writer)
        if len(synced) > 14:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(writer)

    monkeypatch.setattr(ShardWriter, "sync", full)
    with pytest.raises(OSError, match="No space"):
        prepare.main(config)
    monkeypatch.undo()
    assert 0 < len(shards(out)) < len(shards(undisturbed))
    prepare.main(config)
    assert shards(out) == shards(undisturbed)


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_make_the_whole(big, undisturbed, tmp_path, parts):
    """Each document once, whether there are more parts than files or not, and one meta.json for all."""
    out = tmp_path / "out"
    words = ["-m", "scripts.prepare", "--input", big, "--out", out, *BIG, "--parts", parts]
    forks = [Fork(*words, "--part", part) for part in range(parts - 1)]
    assert all(fork.result().returncode == 0 for fork in forks)
    assert_refused(run("-m", "scripts.prepare", "--merge", "--out", out), f"1 of {parts} parts", str(parts - 1))
    with pytest.raises(UserError, match="--merge"):
        read_meta(out)
    assert run(*words, "--part", parts - 1).returncode == 0
    done = run("-m", "scripts.prepare", "--merge", "--out", out)
    assert done.returncode == 0, done.stderr
    for split in ("train", "val"):
        found, expected = (Counter(documents_in(folder, split)) for folder in (out, undisturbed))
        assert found == expected
        mine, theirs = (read_meta(folder)["splits"][split] for folder in (out, undisturbed))
        assert {**mine, "shards": 0} == {**theirs, "shards": 0}
    assert run("-m", "scripts.prepare", "--check", out).returncode == 0


def documents_in(folder: Path, split: str) -> list[tuple[int, ...]]:
    """The documents of a split; of parts, those that a shard's end cuts are joined: part I has shards I, I + N, …"""
    parts = read_meta(folder)["settings"]["parts"]
    found = []
    for part in range(parts):
        mine = [np.load(path) for path in sorted(folder.glob(f"{split}_*.npy")) if int(path.stem[-5:]) % parts == part]
        tokens = np.concatenate([np.zeros(0, np.uint16), *mine])
        found += [tuple(document.tolist()) for document in np.split(tokens, np.flatnonzero(tokens == 50256))[1:]]
    return found


def test_documents_keep_their_split_when_others_are_added():
    """Training on what was validation text yesterday would make the losses of two runs incomparable."""
    chosen = {text: split_of(text, 0.1) for text in SPEECHES}
    assert 0.03 < sum(split == "val" for split in chosen.values()) / len(chosen) < 0.2
    more = {text: split_of(text, 0.1) for text in ["another", *reversed(SPEECHES)]}
    assert all(more[text] == split for text, split in chosen.items())
    assert {text for text in chosen if chosen[text] == "val"} <= {t for t in SPEECHES if split_of(t, 0.2) == "val"}


def test_memory_does_not_grow_with_the_input(tmp_path, monkeypatch):
    """What is read at once is a megabyte or four, of a file of any size, in every format that can be long."""
    text = TEXT.read_text()
    write(tmp_path / "long.txt", text * 400)
    write(tmp_path / "array.json", json.dumps([{"text": text}] * 300))
    config = TextConfig(input=[str(tmp_path)])
    largest = max(sum(len(text) for pieces in batch.pieces.values() for _, text in pieces)
                  for batch in read_batches(find_sources(config), config))
    assert largest < 5 * documents.BLOCK


def test_check_finds_what_is_wrong(tmp_path):
    """Truncated, overwritten, of another type, or gone."""
    out = tmp_path / "out"
    prepare.main(PrepareConfig(input=[str(TEXT)], out=str(out), shard_size=4000))
    check = ["-m", "scripts.prepare", "--check", out]
    assert run(*check).returncode == 0
    shard = sorted(out.glob("train_*.npy"))[1]
    good = shard.read_bytes()
    for content, word in ((good[:-100], "truncated"), (good[:-2] + b"\xff\xff", "65535"), (None, "meta.json says")):
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(UserError, match=word):
            prepare.main(PrepareConfig(check=str(out)))
    np.save(shard, np.zeros(4000, np.int64))
    assert_refused(run(*check), shard.name, "int64", "uint16")
