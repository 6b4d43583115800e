"""Read documents of any size from text, JSON, CSV, Parquet and Arrow files and from the Hugging
Face Hub.

A text file is one document, and its last part is used for validation. Each row of a table is a
document, and a hash of its text assigns it to train or val.
"""

import csv
import glob
import hashlib
import io
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from gpt.errors import UserError

STDIN = "/dev/stdin"
TEXT = (".txt", ".md")
JSON = (".jsonl", ".ndjson", ".jsonlines", ".json")
TABLES = (*JSON, ".csv", ".tsv", ".parquet", ".arrow")
# JSON files that describe a dataset: ours, and what `datasets` writes.
METADATA = ("meta.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json",
            "state.json")
TOKENS = {
    ".npy": "holds token ids, not text: pass its folder to scripts.train as --data_root",
    ".bin": "holds token ids of nanoGPT, not text: np.save('tokens/train_00000.npy', "
            "np.fromfile('train.bin', 'uint16')) makes it a shard for --data_root tokens"}
COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
READ_SIZE = 2**20  # characters per read and per batch
MAX_ROW = 2**25  # characters; longer rows are an error, to limit memory

# Documents are cut into chunks of this many characters, at the end of a word if there is one:
# GPT-2's regex always splits there, so the tokens stay the same. (tiktoken fails on 10^6
# white-space characters in a row.)
MIN_CHUNK, MAX_CHUNK = 500_000, 900_000
WORD_END = re.compile(r"\S(?=[ \t\r\n])")
Chunk = tuple[str, bool, str]  # "train" or "val", whether a document begins here, text


@dataclass(kw_only=True)
class TextConfig:
    """Settings shared by all commands that read text."""

    input: list[str] = field(default_factory=list)  # files, folders, patterns; -: standard input
    dataset: str | None = None  # dataset on the Hugging Face Hub, instead of --input
    dataset_config: str | None = None  # configuration of --dataset, such as wikitext-2-raw-v1
    revision: str | None = None  # branch, tag or commit of --dataset
    split: str = "train"  # split of --dataset
    text_column: str = "text"  # column or JSON key that holds the text
    join_rows: bool = False  # join the rows of a table as lines of one document
    document_separator: str | None = None  # text between documents; \n is a newline
    val_fraction: float = 0.1  # fraction for validation: of the rows, or of each text file

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val_fraction is {self.val_fraction}: "
                            f"must be at least 0 and below 1")
        if self.document_separator:
            self.document_separator = self.document_separator.replace("\\n", "\n")


@dataclass
class Source:
    """A file, or a split of a dataset on the Hub."""

    path: str  # or the name on the Hub
    size: int = 0  # bytes on disk, for the progress bar
    version: str = ""  # changes when the file does
    split: str | None = None  # "train" or "val" for all of its text; None: depends on the document
    hub_split: str | None = None  # split of a dataset on the Hub
    copy: Any = None  # the temporary copy of a pipe, which is deleted with this object

    @property
    def is_table(self) -> bool:
        return self.hub_split is not None or extension(self.path) in TABLES


def find_sources(config: TextConfig, split: str | None = None) -> list[Source]:
    """Return the sources of `config`, each file once; the files of a folder are sorted by name.

    split: "train" or "val" for all their text.
    Raises UserError if there are none.
    """
    if (config.dataset is None) == (not config.input):
        raise UserError("pass either --input (files, folders or a pattern) or --dataset "
                        "(a name on the Hub)")
    if config.dataset is not None:
        return [Source(config.dataset, split=split, hub_split=config.split)]
    paths: dict[str, str] = {}
    for entry in config.input:
        for path in find_files(entry):
            # Read by the given name: a link's target may lack the extension.
            paths.setdefault(os.path.realpath(path), path)
    sources = []
    for path in paths.values():
        source = Source(path, split=split)
        if path == STDIN or not os.path.isfile(path):  # a pipe can be read only once
            with open(path, "rb") as pipe:
                source.copy = temporary_copy(pipe, name=os.path.basename(path))
            source.path = source.copy.name
        stat = os.stat(source.path)
        source.version = f"{stat.st_size} {stat.st_mtime_ns}"
        source.size = stat.st_size
        sources.append(source)
    return sources


def find_files(entry: str) -> list[str]:
    """Return the files of one --input: a file, a folder or a pattern.

    Raises UserError if there are none.
    """
    entry = STDIN if entry == "-" else entry
    if os.path.isdir(entry):
        # rglob does not enter links to folders, which may form a circle.
        files = [str(path) for path in sorted(Path(entry).rglob("*")) if path.is_file()
                 and not any(part.startswith(".") for part in path.relative_to(entry).parts)]
        tokens = [path for path in files if extension(path) in TOKENS]
        files = [path for path in files if extension(path) in TEXT + TABLES
                 and not re.match(r"cache-.*\.arrow", os.path.basename(path))
                 and os.path.basename(path) not in METADATA]
        if any(extension(path) in TABLES for path in files):  # their README describes them
            files = [path for path in files if os.path.basename(path).lower() != "readme.md"]
        files = files or tokens  # open_text says what they are
        problem = (f"has no {', '.join(TEXT + TABLES)} files: pass others with a pattern in "
                   f"quotes, such as '{entry}/**/*.py'")
    else:
        files = [entry] if os.path.exists(entry) else sorted(glob.glob(entry, recursive=True))
        files = [path for path in files if not os.path.isdir(path)]
        problem = "matches no files: pass files, folders or a pattern in quotes"
    if not files:
        raise UserError(f"input {entry!r} {problem}")
    return files


def temporary_copy(lines: Iterable[bytes], name: str = "") -> Any:
    """Return a temporary file with these lines, whose name ends in `name`; it is deleted when it is
    closed."""
    file = tempfile.NamedTemporaryFile(suffix=f"-{name}")  # noqa: SIM115
    file.writelines(lines)
    file.flush()
    return file


def extension(path: str) -> str:
    """Return the extension of a path in lower case, ignoring .gz and the like."""
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSION else suffix


def read_batches(sources: list[Source], config: TextConfig) -> Iterator[list[Chunk]]:
    """Yield all documents in order, in batches of about READ_SIZE characters; on a terminal, with a
    progress bar.

    A chunk that continues a document is the first of its batch, so that tokens do not depend on
    batch boundaries. Raises UserError with the file, and in a table the row, that cannot be read.
    """
    batch: list[Chunk] = []
    n_chars = 0
    total = sum(source.size for source in sources) or None
    with tqdm(total=total, unit=" characters", unit_scale=True, disable=None) as bar:
        for source in sources:
            for chunk in read_chunks(source, config):
                _, begins, text = chunk
                if batch and (n_chars >= READ_SIZE or not begins):
                    yield batch
                    bar.update(n_chars)
                    batch, n_chars = [], 0
                batch.append(chunk)
                n_chars += len(text)
        yield batch


def read_chunks(source: Source, config: TextConfig) -> Iterator[Chunk]:
    """Yield the non-blank documents of a source as chunks.

    Raises UserError if it cannot be read.
    """
    try:
        for split, blocks in read_documents(source, config):
            yield from cut_chunks(split, blocks)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        near = error.object[max(error.start - 20, 0):error.end + 20]
        raise UserError(f"{source.path} is not UTF-8 (near {near!r}): convert it, for example with "
                        f"iconv -f WINDOWS-1252 -t UTF-8") from None
    except Exception as error:  # a damaged file, the disk or the network, from any of the readers
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        advice = ": check its name, the split and the network" if source.hub_split else ""
        raise UserError(f"cannot read {source.path} ({reason}){advice}") from None


def read_documents(source: Source, config: TextConfig) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield the documents of a source as (split, blocks of text)."""
    if source.is_table and config.join_rows:
        rows = read_rows(source, config)
        lines = (row if row.endswith("\n") else row + "\n" for row in rows)
        with temporary_copy(line.encode("utf-8", "replace") for line in lines) as copy:
            yield from read_documents(Source(copy.name, split=source.split), config)
    elif source.is_table or config.document_separator:
        if source.is_table:
            documents = read_rows(source, config)
        else:
            documents = split_documents(read_blocks(source), config.document_separator or "")
        for text in documents:
            yield source.split or assign_split(text, config.val_fraction), [text]
    else:
        for split, blocks in itertools.groupby(split_text(source, config), lambda item: item[0]):
            yield split, (block for _, block in blocks)


def assign_split(text: str, val_fraction: float) -> str:
    """Return "val" for `val_fraction` of all documents, else "train", by a hash of the first 65,536
    characters: a document stays in its split when others are added."""
    digest = hashlib.blake2b(text[:2**16].encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


def cut_chunks(split: str, blocks: Iterable[str]) -> Iterator[Chunk]:
    """Yield the chunks of a document that comes in blocks; nothing if it is blank."""
    rest, begins = "", True
    for block in blocks:
        rest += block
        while len(rest) >= MAX_CHUNK:
            word_end = WORD_END.search(rest, MIN_CHUNK, MAX_CHUNK)
            cut = word_end.end() if word_end else MAX_CHUNK
            yield split, begins, rest[:cut]
            rest, begins = rest[cut:], False
    if rest and not (begins and rest.isspace()):
        yield split, begins, rest


def split_text(source: Source, config: TextConfig) -> Iterator[tuple[str, str]]:
    """Yield (split, block) of a text file, whose last `val_fraction` is for validation: from the
    start of a line on, if one starts soon."""
    if source.split or not config.val_fraction:
        yield from ((source.split or "train", block) for block in read_blocks(source))
        return
    n_train = int((1 - config.val_fraction) * sum(map(len, read_blocks(source))))
    with open_text(source) as file:
        while block := file.read(min(n_train, READ_SIZE)):
            yield "train", block
            n_train -= len(block)
        line, rest = file.readline(READ_SIZE), file.read(READ_SIZE)
        yield "train" if line.endswith("\n") and rest else "val", line
        while rest:
            yield "val", rest
            rest = file.read(READ_SIZE)


def split_documents(blocks: Iterator[str], separator: str) -> Iterator[str]:
    """Yield the documents between separators, without surrounding newlines, of a text in blocks."""
    rest = ""
    for block in blocks:
        *documents, rest = (rest + block).split(separator)
        yield from (document.strip("\r\n") for document in documents)
        if len(rest) > MAX_ROW:
            raise UserError(f"no --document_separator {separator!r} within {MAX_ROW:,} characters: "
                            f"pass another one")
    yield rest.strip("\r\n")


def open_text(source: Source) -> TextIO:
    """Open a UTF-8 file, plain or compressed, without its byte order mark
    and with line endings unchanged. Raises UserError if it is not text."""
    compression = COMPRESSION.get(os.path.splitext(source.path.lower())[1])
    stream = pa.input_stream(source.path, compression, READ_SIZE)
    buffer = io.BufferedReader(stream, READ_SIZE)
    problem = TOKENS.get(extension(source.path))
    if not problem and b"\0" in buffer.peek(1):
        problem = ("is not plain text: unpack an archive; convert UTF-16 with iconv -f UTF-16 -t "
                   "UTF-8")
    if problem:
        raise UserError(f"{source.path} {problem}")
    return io.TextIOWrapper(buffer, encoding="utf-8-sig", newline="")


def read_blocks(source: Source) -> Iterator[str]:
    """Yield a text file in blocks of READ_SIZE characters."""
    with open_text(source) as file:
        while block := file.read(READ_SIZE):
            yield block


def read_rows(source: Source, config: TextConfig) -> Iterator[str]:
    """Yield the text of each row of a table; skip nulls.

    Raises UserError with file and row if a row has no text.
    """
    column = config.text_column
    if source.hub_split or extension(source.path) in (".parquet", ".arrow"):
        rows = arrow_rows(source, config)
    elif extension(source.path) in JSON:
        rows = json_rows(source, column)
    else:
        rows = csv_rows(source)
    for number, row in enumerate(rows, 1):
        columns = row if isinstance(row, dict) else {}
        text = columns.get(column, row)  # a row can be a string
        if text is None:
            continue
        where = f"{source.path}, row {number}"
        if not isinstance(text, str):
            found = type(text).__name__ if column in columns else "nothing"
            names = ", ".join(map(str, list(columns)[:20])) or "none"
            raise UserError(f"{where} has {found} in column {column!r}, expected text: pass "
                            f"another --text_column, its columns are: {names}")
        if len(text) > MAX_ROW:
            raise UserError(f"{where} has {len(text):,} characters, more than {MAX_ROW:,}: pass "
                            f"long texts as files")
        yield text


def json_rows(source: Source, column: str) -> Iterator[Any]:
    """Yield the values of JSON Lines, or of an array over any number of lines."""
    decode = json.JSONDecoder(parse_int=float).decode  # int() takes at most 4,300 digits
    is_first = True
    with open_text(source) as file:
        for number, text in enumerate(file, 1):
            if text.isspace():
                yield {column: None}
                continue
            try:
                try:
                    value = decode(text)
                except json.JSONDecodeError:
                    if not is_first:
                        raise
                    value = decode(text + file.read())
            except (json.JSONDecodeError, RecursionError) as error:
                line = number - 1 + getattr(error, "lineno", 1) if is_first else number
                raise UserError(f"{source.path}, line {line}: broken JSON "
                                f"({getattr(error, 'msg', error)}): expected objects such as "
                                f'{{"{column}": "…"}}, one per line or in an array') from None
            is_first = False
            yield from value if isinstance(value, list) else [value]


def csv_rows(source: Source) -> Iterator[dict]:
    """Yield the rows of a CSV or TSV file whose first line has the column names."""
    csv.field_size_limit(MAX_ROW)
    with open_text(source) as file:
        delimiter = "\t" if extension(source.path) == ".tsv" else ","
        rows = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for row in rows:
                if None in row or None in row.values():
                    raise csv.Error(f"expected {len(rows.fieldnames or [])} cells")
                yield row
        except csv.Error as error:
            raise UserError(f"{source.path}, near line {rows.line_num}: broken table ({error}): "
                            f"check for a missing quotation mark") from None


def arrow_rows(source: Source, config: TextConfig) -> Iterator[dict]:
    """Yield the rows of a Parquet or Arrow file or a Hub dataset, with only the text column if it
    exists."""
    column = config.text_column
    for table in arrow_tables(source, config):
        if column in table.schema.names:
            table = table.select([column])
        yield from table.to_pylist()


def arrow_tables(source: Source, config: TextConfig) -> Iterator[Any]:
    """Yield a Parquet or Arrow file or a Hub dataset in batches of rows."""
    if source.hub_split:
        import datasets  # takes half a second

        dataset = datasets.load_dataset(source.path, config.dataset_config, streaming=True,
                                        split=source.hub_split, revision=config.revision)
        yield from dataset.with_format("arrow").iter(batch_size=100)
    elif extension(source.path) == ".parquet":
        yield from pq.ParquetFile(source.path, pre_buffer=False).iter_batches(100)
    else:
        with pa.memory_map(source.path) as file:
            try:
                yield from pa.ipc.open_stream(file)
            except pa.ArrowInvalid:  # the other of the two formats
                reader = pa.ipc.open_file(file)
                yield from map(reader.get_batch, range(reader.num_record_batches))
