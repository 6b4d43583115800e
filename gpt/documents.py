"""Documents: whatever text a person has, in files or on the Hugging Face hub, as a stream that needs little memory.

A document is a row of a table, a file of text, or what lies between two separators. A long one comes in pieces, cut
before white space, where GPT-2's expression always begins a new word: its tokens are those of the whole.

Files are opened here and not by the builders of `datasets`: those read a text file as one string (440 MB of text took
3.3 GB), turn "NA" in a CSV into nothing and CR LF into LF, give up on JSON whose other columns change their types, name
neither file nor line, and read JSON row by row at 10 MB/s. For a data set of the hub `datasets` finds the files, and
then they are read like local ones.
"""

import codecs
import csv
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa

from gpt.errors import UserError

KINDS = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet")
CODECS = {".gz": "gzip", ".zst": "zstd"}
BLOCK = 2**20  # bytes that are read at once, and characters in a batch for the tokenizer
LONGEST = 4 * BLOCK  # characters without white space after which a document is cut anywhere
LONGEST_ROW = 32 * BLOCK  # bytes of a line or a row: more are taken for a mistake, for they need memory
BETWEEN_OBJECTS = re.compile(r"[\s,\[\]]*")
WORD_END = re.compile(r"\S(?=[ \t\r\n])")
Piece = tuple[bool, str]  # whether a document begins with it, and text


@dataclass(kw_only=True)
class TextConfig:
    """Settings of all commands that read text."""

    # Text
    input: list[str] = field(default_factory=list)
    """files, folders, patterns: text, JSON, CSV, Parquet"""
    dataset: str | None = None
    """instead: a data set of the Hugging Face hub"""
    name: str | None = None
    """its configuration"""
    revision: str | None = None
    """its version: a branch, a tag or a commit"""
    split: str = "train"
    """its split"""
    text_column: str = "text"
    """column or key with the text"""
    documents: Literal["auto", "row", "file"] = "auto"
    """a row, a file; auto: file if text, row if table"""
    document_separator: str | None = None
    """text between two documents; \\n ends a line"""
    val_fraction: float = 0.1
    """share for validation; of a single text its end"""
    errors: Literal["strict", "replace"] = "strict"
    """not UTF-8: strict stops, replace goes on"""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction is {self.val_fraction}: it must be at least 0 and below 1")
        if self.document_separator:
            self.document_separator = self.document_separator.replace("\\n", "\n")


@dataclass
class Source:
    """A file to read."""

    path: str
    size: int  # bytes on disk
    split: str | None = None  # where its documents go; None: chosen for each
    single: bool = False  # it is one text, and all there is: its end is for validation
    by_document: bool = False  # one part of the work takes every N-th document only; where files are shared out, all


@dataclass
class Batch:
    """About 1 MB of text: its pieces by split, where to go on after it, and the share of all bytes read by then."""

    pieces: dict[str, list[Piece]]
    position: dict[str, Any]
    share: float


def find_sources(config: TextConfig, split: str | None = None) -> list[Source]:
    """The files that `config` asks for, each once; folders and patterns in order of their names.

    split: where all their documents go. Raises UserError where there are none or the hub cannot be reached.
    """
    if (config.dataset is None) == (not config.input):
        raise UserError("pass text as --input FILE, FOLDER or PATTERN, or a data set of the hub as --dataset NAME")
    paths = hub_files(config) if config.dataset else [path for entry in config.input for path in local_files(entry)]
    unique: dict[str, str] = {}
    for path in paths:
        unique.setdefault(path if "://" in path else os.path.realpath(path), path)
    sources = [Source(path, file_size(path), split) for path in unique.values()]
    sources[0].single = (len(sources) == 1 and config.documents != "row" and not config.document_separator
                         and kind_of(sources[0].path) in (None, ".txt", ".md"))
    return sources


def local_files(entry: str) -> list[str]:
    """The files of one --input: itself, all text in a folder and those below it, or what a pattern matches."""
    path = Path(entry)
    if not entry:
        raise UserError("input has an empty name: pass files, folders or a pattern in quotes")
    if path.is_dir():
        found = [str(file) for file in sorted(path.rglob("*")) if kind_of(str(file)) and file.is_file()
                 and not any(part.startswith(".") for part in file.relative_to(path).parts)]
    elif path.is_file():
        found = [entry]
    else:
        found = sorted(match for match in glob.glob(entry, recursive=True) if os.path.isfile(match))
    if not found:
        what = f"no {', '.join(KINDS)} in it" if path.is_dir() else "no such file, and no file matches it"
        raise UserError(f"input {entry!r}: {what}; pass files, folders or a pattern in quotes")
    return found


def hub_files(config: TextConfig) -> list[str]:
    """The files of a split of a data set, at the commit that is newest now. Raises UserError."""
    import datasets  # seconds

    try:
        builder = datasets.load_dataset_builder(config.dataset, config.name, revision=config.revision)
    except Exception as error:  # of the network, the hub or the disk
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"dataset {config.dataset!r} cannot be had from the Hugging Face hub ({reason}); without a "
                        f"network pass --input with files that hold its text") from None
    files = builder.config.data_files or {}
    if config.split not in files:
        raise UserError(f"dataset {config.dataset!r} has no files for split {config.split!r}, it has: "
                        f"{', '.join(map(str, files)) or 'none'}")
    unknown = [str(path) for path in files[config.split] if not kind_of(str(path))]
    if unknown:
        raise UserError(f"dataset {config.dataset!r} has files like {unknown[0]}: expected {', '.join(KINDS)}; "
                        f"download and convert them, and pass --input")
    return [str(path) for path in files[config.split]]


def kind_of(path: str) -> str | None:
    """The extension of a path that says how to read it, below .gz and .zst; None if it is not one we know."""
    name = path.lower()
    for codec in CODECS:
        name = name.removesuffix(codec)
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def open_file(path: str) -> BinaryIO:
    """A file of this machine, or of the hub (`hf://…`)."""
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()


def file_size(path: str) -> int:
    with naming(path), open_file(path) as file:
        return file.seek(0, io.SEEK_END)


class naming:
    """Turns what goes wrong while a file is read into a UserError that names it."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self) -> "naming":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, UserError) or not isinstance(error, Exception):
            return
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise UserError(f"{self.path} cannot be read ({reason})") from None


def share_out(sources: list[Source], part: int, parts: int) -> list[Source]:
    """What part `part` of `parts` reads: every parts-th file, or, where there are fewer files, all of them for every
    parts-th document in each."""
    if len(sources) >= parts:
        return sources[part::parts]
    return [replace(source, by_document=True) for source in sources]


def read_batches(sources: list[Source], config: TextConfig, part: int = 0, parts: int = 1,
                 begin: dict[str, Any] | None = None) -> Iterator[Batch]:
    """The documents of `sources` in order, each in its split, "train" or "val".

    begin: the `position` of the batch after which to go on. Raises UserError that names the file, and the byte or the
    line, where one cannot be read.
    """
    at = {"file": 0, "piece": 0, "document": -1, "split": "train", "mine": True, **(begin or {})}
    total, before = sum(source.size for source in sources) or 1, 0
    pieces: dict[str, list[Piece]] = {"train": [], "val": []}
    characters = 0
    for number, source in enumerate(sources):
        before += source.size
        if number < at["file"]:
            continue
        if number > at["file"]:
            at |= {"file": number, "piece": 0}
        with naming(source.path), open_file(source.path) as file:
            stream = read_pieces(file, source.path, config)
            single = source.single and source.split is None and config.val_fraction > 0
            if single:
                stream = cut_in_two(stream, count_characters(source.path, config), config.val_fraction)
            for i, (starts, text) in enumerate(stream):
                if i < at["piece"]:  # read before the interruption
                    continue
                if starts:
                    at["document"] += 1
                    at["mine"] = not source.by_document or at["document"] % parts == part
                    at["split"] = (source.split or (("train", "val")[at["document"]] if single else
                                                    split_of(text, config.val_fraction)))
                at["piece"] += 1
                if at["mine"]:
                    pieces[at["split"]].append((starts, text))
                    characters += len(text)
                if characters >= BLOCK:
                    yield Batch(pieces, dict(at), (before - source.size + min(file.tell(), source.size)) / total)
                    pieces, characters = {"train": [], "val": []}, 0
    yield Batch(pieces, {**at, "file": len(sources)}, 1.0)


def split_of(text: str, val_fraction: float) -> str:
    """The split of a document: "val" for a share of them that depends on its first 65,536 characters alone, so that a
    document stays where it is when others are added."""
    digest = hashlib.blake2b(text[:2**16].encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


def count_characters(path: str, config: TextConfig) -> int:
    with open_file(path) as file:
        return sum(len(text) for _, text in read_pieces(file, path, config))


def cut_in_two(pieces: Iterator[Piece], characters: int, val_fraction: float) -> Iterator[Piece]:
    """One document as two, the second its last `val_fraction`, from the end of a line on if there is one near."""
    cut, seen = math.floor(characters * (1 - val_fraction)), 0
    for starts, text in pieces:
        if seen <= cut < seen + len(text):
            at = text.find("\n", cut - seen, cut - seen + BLOCK // 16) + 1
            at = at if 0 < at < len(text) else cut - seen
            yield from ((starts, text[:at]), (True, text[at:])) if at else ((True, text),)
        else:
            yield starts, text
        seen += len(text)


def read_pieces(file: BinaryIO, path: str, config: TextConfig) -> Iterator[Piece]:
    """The documents in an open file, in pieces of 1 to 4 MB at most, without those that are empty."""
    kind = kind_of(path)
    if kind == ".parquet":
        rows = parquet_rows(file, path, config.text_column)
    else:
        codec = next((codec for suffix, codec in CODECS.items() if path.lower().endswith(suffix)), None)
        plain = io.BufferedReader(pa.CompressedInputStream(file, codec), BLOCK) if codec else file
        if kind in (".jsonl", ".json"):
            rows = json_rows(plain, path, config)
        elif kind == ".csv":
            rows = csv_rows(plain, path, config)
        elif config.documents == "row":
            rows = (line.rstrip("\r\n") for _, line in read_lines(plain, path, config.errors))
        else:
            yield from cut_documents(read_text(plain, path, config.errors), config.document_separator)
            return
    if config.documents == "file":
        yield from cut_documents(in_blocks(row if row.endswith("\n") else row + "\n" for row in rows),
                                 config.document_separator)
    elif config.document_separator:
        for row in rows:
            yield from cut_documents([row], config.document_separator)
    else:
        for row in rows:
            if len(row) >= 2 * BLOCK:
                yield from cut_documents([row], None)
            elif row and not row.isspace():
                yield True, row


def in_blocks(texts: Iterable[str]) -> Iterator[str]:
    """Short texts joined to blocks of about 1 MB."""
    block, size = [], 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= BLOCK:
            yield "".join(block)
            block, size = [], 0
    yield "".join(block)


def cut_documents(blocks: Iterable[str], separator: str | None) -> Iterator[Piece]:
    """A text that comes in blocks as documents, which lie between separators and the newlines around them."""
    rest, starts = "", True
    for block in blocks:
        rest += block
        if separator:
            *done, rest = rest.split(separator)
            for text in done:
                yield from cut_pieces(text, starts, separator, ended=True)
                starts = True
            if starts:
                rest = rest.lstrip("\r\n")
        rest, starts = yield from cut_pieces(rest, starts, separator, ended=False)
    yield from cut_pieces(rest, starts, separator, ended=True)


def cut_pieces(text: str, starts: bool, separator: str | None,
               ended: bool) -> Generator[Piece, None, tuple[str, bool]]:
    """Yield the pieces of a document or of what is known of it; returns the rest of it, and whether that starts it."""
    if ended and separator:
        text = text.rstrip("\r\n")
        text = text.lstrip("\r\n") if starts else text
    begin, end = 0, len(text) - (0 if ended else len(separator or ""))  # where a separator may be about to begin
    while len(text) - begin >= 2 * BLOCK:
        found = WORD_END.search(text, begin + BLOCK, min(end, begin + LONGEST))
        if not found and not ended and end - begin < LONGEST:
            break
        at = found.end() if found else min(begin + LONGEST, end)
        yield starts, text[begin:at]
        starts, begin = False, at
    if not ended:
        return text[begin:], starts
    if begin < len(text) and not (starts and text.isspace()):
        yield starts, text[begin:]
    return "", True


def read_text(file: BinaryIO, path: str, errors: str) -> Iterator[str]:
    """The text of a UTF-8 file in blocks, without a byte order mark."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(errors), 0
    while True:
        block, waiting = file.read(BLOCK), len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
            yield text if offset else text.removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise not_utf8(path, offset - waiting + error.start) from None
        if not block:
            return
        offset += len(block)


def read_lines(file: BinaryIO, path: str, errors: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1 and their ends."""
    offset = 0
    for number in itertools.count(1):
        if not (line := file.readline(LONGEST_ROW)):
            return
        if len(line) == LONGEST_ROW:
            raise UserError(f"{path}, line {number} is longer than {LONGEST_ROW:,} bytes: break it into several")
        try:
            text = line.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise not_utf8(path, offset + error.start) from None
        offset += len(line)
        yield number, text.removeprefix("\ufeff") if number == 1 else text


def not_utf8(path: str, offset: int) -> UserError:
    return UserError(f"{path} is not UTF-8 text at byte {offset}: convert it, or pass --errors replace to go on")


def json_rows(file: BinaryIO, path: str, config: TextConfig) -> Iterator[str]:
    """The texts of a JSON file: of objects in lines of their own, one after the other, or in an array."""
    decode, text, at, line, column = json.JSONDecoder().raw_decode, "", 0, 1, config.text_column
    for block in read_text(file, path, config.errors):
        line += text.count("\n", 0, at)  # lines before `text`
        text, at = text[at:] + block, 0
        while True:
            at += len(BETWEEN_OBJECTS.match(text, at)[0])  # type: ignore[index]  # it matches nothing, too
            try:
                value, end = decode(text, at)
            except (ValueError, RecursionError) as error:
                if len(text) - at > LONGEST_ROW or (not block and at < len(text)):
                    reason = getattr(error, "msg", error) if not block else f"no end within {LONGEST_ROW:,} characters"
                    where = f"{path}, line {line + text.count(chr(10), 0, at)}"
                    raise UserError(f"{where}: broken JSON ({reason}); expected objects such as "
                                    f"{{\"{column}\": \"…\"}}") from None
                break  # it goes on in the next block
            row = value.get(column) if type(value) is dict else None
            if type(row) is not str:
                row = text_in(value, column, f"{path}, line {line + text.count(chr(10), 0, at)}")
            yield row
            at = end


def csv_rows(file: BinaryIO, path: str, config: TextConfig) -> Iterator[str]:
    """The texts of a CSV file, whose first line has the names of the columns."""
    csv.field_size_limit(LONGEST_ROW)
    rows = csv.DictReader((line for _, line in read_lines(file, path, config.errors)), strict=True)
    try:
        for row in rows:
            yield text_in(row, config.text_column, f"{path}, line {rows.line_num}")
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: broken CSV ({error}); is a quotation mark missing?") from None


def parquet_rows(file: BinaryIO, path: str, column: str) -> Iterator[str]:
    """The texts of a Parquet file, some rows at a time."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK)  # else it reads a row group at once
    text_in(dict.fromkeys(table.schema_arrow.names), column, path)
    number = 0
    for i in range(table.num_row_groups):
        group = table.metadata.row_group(i)
        rows = max(1, min(1000, group.num_rows * BLOCK // max(group.total_byte_size, 1)))
        for batch in table.iter_batches(batch_size=rows, row_groups=[i], columns=[column]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield text_in({column: value}, column, f"{path}, row {number}")


def text_in(row: Any, column: str, where: str) -> str:
    """The text of a row, "" where it is null. Raises UserError that says `where` there is none."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object such as {{\"{column}\": \"…\"}}, found {type(row).__name__}")
    if column not in row:
        raise UserError(f"{where} has no {column!r}: pass --text_column with one of "
                        f"{', '.join(map(str, list(row)[:20])) or 'its columns (it has none)'}")
    if not isinstance(text := row[column], str | None):
        raise UserError(f"{where}: {column!r} is not text but {type(text).__name__}; pass another --text_column")
    return text or ""
