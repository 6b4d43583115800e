"""Read documents of any size from text, JSON, CSV and Parquet files and from the Hugging Face Hub.

A text file is one document, and its last part is used for validation. Each row of a table is a
document, and a hash of its text assigns it to train or val.

Files are not read with the builders of `datasets`: those read a text file as one string, turn "NA"
in a CSV into null and CR LF into LF, fail on JSON whose other columns change type, and their
errors name neither file nor row.
"""

import contextlib
import csv
import glob
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TextIO

import pyarrow as pa

from gpt.errors import UserError

TEXT, TABLES = (".txt", ".md"), (".jsonl", ".json", ".csv", ".parquet")
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
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

    input: list[str] = field(default_factory=list)  # text/JSON/CSV/Parquet files, folders, patterns
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

    path: str
    version: str  # changes when the content does
    size: int = 0  # bytes on disk; 0 if unknown
    split: str | None = None  # "train" or "val" for all of its text; None: depends on the document
    tables: Any = None  # an iterable dataset, if it is on the Hub
    file: BinaryIO | None = None  # set when reading starts

    @property
    def position(self) -> int:
        """Bytes read."""
        if self.file is None or self.file.closed:
            return self.size
        return min(self.file.tell(), self.size)

    @property
    def is_table(self) -> bool:
        return self.tables is not None or extension(self.path) in TABLES


def find_sources(config: TextConfig, split: str | None = None) -> list[Source]:
    """Return the sources of `config`, each file once;
    the files of a folder or pattern are sorted by name.

    split: "train" or "val" for all their text.
    Raises UserError if there are none or the Hub cannot be reached.
    """
    if (config.dataset is None) == (not config.input):
        raise UserError("pass either --input (files, folders or a pattern) or --dataset "
                        "(a name on the Hub)")
    if config.dataset is not None:
        return [find_dataset(config, split)]
    paths: dict[str, str] = {}
    for path in itertools.chain.from_iterable(map(find_files, config.input)):
        # Read by the given name: a link's target may lack the extension.
        paths.setdefault(os.path.realpath(path), path)
    sources = []
    for path in paths.values():
        stat = os.stat(path)
        sources.append(Source(path, f"{stat.st_size} {stat.st_mtime_ns}", stat.st_size, split))
    return sources


def find_files(entry: str) -> list[str]:
    """Return the files of one --input: a file, folder or pattern.

    Raises UserError if there are none.
    """
    if os.path.isfile(entry):
        return [entry]
    is_folder = os.path.isdir(entry)
    pattern = os.path.join(glob.escape(entry), "**") if is_folder else entry
    files = [path for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(path)]
    if is_folder:
        files = [path for path in files if extension(path) in TEXT + TABLES]
    if not files:
        problem = f"has no {', '.join(TEXT + TABLES)} files" if is_folder else "matches no files"
        raise UserError(f"input {entry!r} {problem}: pass files, folders or a pattern in quotes")
    return files


def find_dataset(config: TextConfig, split: str | None) -> Source:
    """Return a split of a Hub dataset, for streaming. Raises UserError if it cannot be loaded."""
    import datasets  # takes seconds

    try:
        builder = datasets.load_dataset_builder(config.dataset, config.dataset_config,
                                                revision=config.revision)
        tables = builder.as_streaming_dataset(split=config.split).with_format("arrow")
    except Exception as error:  # the network, the Hub or the disk; or there is no such split
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"cannot load --dataset {config.dataset} from the Hugging Face Hub "
                        f"({reason}): check the name and the network, "
                        f"or pass files as --input") from None
    return Source(f"{config.dataset} ({config.split})", str(builder.hash), split=split,
                  tables=tables)


def extension(path: str) -> str:
    """Return the lower-case extension of a path, without .gz or .zst."""
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSION else suffix


def read_batches(sources: list[Source], config: TextConfig) -> Iterator[tuple[list[Chunk], float]]:
    """Yield all documents in order, in batches:
    (chunks of about READ_SIZE characters, fraction of all bytes read so far or 0 if unknown).

    A chunk that continues a document is the first of its batch, so that tokens do not depend on
    batch boundaries. Raises UserError with the file, and in a table the row, that cannot be read.
    """
    batch: list[Chunk] = []
    n_chars, done, total = 0, 0, sum(source.size for source in sources)
    for source in sources:
        for chunk in read_chunks(source, config):
            _, begins, text = chunk
            if batch and (n_chars >= READ_SIZE or not begins):
                fraction = (done + source.position) / total if total else 0.0
                yield batch, fraction
                batch, n_chars = [], 0
            batch.append(chunk)
            n_chars += len(text)
        done += source.size
    yield batch, 1.0


def read_chunks(source: Source, config: TextConfig) -> Iterator[Chunk]:
    """Yield the non-blank documents of a source as chunks.

    Raises UserError if it cannot be read.
    """
    try:
        if source.is_table and not config.join_rows:
            documents = read_rows(source, config.text_column)
        elif config.document_separator:
            documents = split_documents(read_text(source, config), config.document_separator)
        else:
            by_split = itertools.groupby(split_text(source, config), lambda item: item[0])
            for split, blocks in by_split:
                yield from cut_chunks(split, (block for _, block in blocks))
            return
        for text in documents:
            split = source.split or assign_split(text, config.val_fraction)
            if len(text) >= MAX_CHUNK:
                yield from cut_chunks(split, [text])
            elif text and not text.isspace():
                yield split, True, text
    except UserError:
        raise
    except UnicodeDecodeError as error:
        data, start = error.object, error.start
        before = data[max(start - 40, 0):start].decode(errors="ignore").split("\n")[-1]
        raise UserError(f"{source.path} is not UTF-8 (byte 0x{data[start]:02x} after {before!r}): "
                        f"convert it, for example with iconv -f LATIN1 -t UTF-8") from None
    except Exception as error:  # a damaged file, the disk or the network, from any of the readers
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise UserError(f"cannot read {source.path} ({reason})") from None


def assign_split(text: str, val_fraction: float) -> str:
    """Return "val" for `val_fraction` of all documents, else "train", by a hash of the first 65,536
    characters: a document stays in its split when others are added."""
    digest = hashlib.blake2b(text[:2**16].encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


def split_text(source: Source, config: TextConfig) -> Iterator[tuple[str, str]]:
    """Yield (split, block) of a text whose last `val_fraction`, from the start of a line on,
    is for validation."""
    if source.split or not config.val_fraction:
        yield from ((source.split or "train", block) for block in read_text(source, config))
        return
    n_chars = sum(map(len, read_text(source, config)))
    cut, seen, split = int(n_chars * (1 - config.val_fraction)), 0, "train"
    for block in read_text(source, config):
        start, seen = max(cut - seen, 0), seen + len(block)
        if split == "train" and start < len(block):
            line_end = block.find("\n", start, len(block) - 1) + 1
            is_last, is_next = seen == n_chars, start == 0
            # is_last, is_next: no line ends in the rest of the text, or of the block before.
            if line_end or is_last or is_next:
                yield split, block[:line_end or start]
                split, block = "val", block[line_end or start:]
        yield split, block


def split_documents(blocks: Iterable[str], separator: str) -> Iterator[str]:
    """Yield the documents between separators, without surrounding newlines,
    of a text that comes in blocks."""
    rest = ""
    for block in blocks:
        *documents, rest = (rest + block).split(separator)
        yield from (document.strip("\r\n") for document in documents)
        if len(rest) > MAX_ROW:
            raise UserError(f"no --document_separator {separator!r} within {MAX_ROW:,} characters: "
                            f"pass another one")
    yield rest.strip("\r\n")


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


def read_text(source: Source, config: TextConfig) -> Iterator[str]:
    """Yield a text file in blocks, or the rows of a table as lines."""
    if source.is_table:
        rows = read_rows(source, config.text_column)
        return (row if row.endswith("\n") else row + "\n" for row in rows)
    return read_blocks(source)


@contextlib.contextmanager
def open_text(source: Source) -> Iterator[TextIO]:
    """Open a UTF-8 file, plain or compressed, without its byte order mark
    and with line endings unchanged."""
    with open(source.path, "rb") as source.file:
        compression = COMPRESSION.get(os.path.splitext(source.path.lower())[1])
        stream = pa.input_stream(source.file, compression, READ_SIZE)
        buffer = io.BufferedReader(stream, READ_SIZE)
        yield io.TextIOWrapper(buffer, encoding="utf-8-sig", newline="")


def read_blocks(source: Source) -> Iterator[str]:
    """Yield a text file in blocks of READ_SIZE characters."""
    with open_text(source) as file:
        while block := file.read(READ_SIZE):
            yield block


def read_rows(source: Source, column: str) -> Iterator[str]:
    """Yield the text of each row of a table; skip nulls.

    Raises UserError with file and row if a row has no text.
    """
    file_format = ".parquet" if source.tables is not None else extension(source.path)
    rows = {".csv": csv_rows, ".parquet": arrow_rows}.get(file_format, json_rows)(source, column)
    for number, row in rows:
        text = row.get(column) if isinstance(row, dict) else None
        if isinstance(text, str):
            yield text
            continue
        where = f"{source.path}, {'row' if file_format == '.parquet' else 'line'} {number}"
        if not isinstance(row, dict):
            raise UserError(f'{where}: expected an object such as {{"{column}": "…"}}, '
                            f"found {type(row).__name__}")
        if column not in row:
            raise UserError(f"{where} has no column {column!r}: pass --text_column with one of "
                            f"{', '.join(map(str, list(row)[:20]))}")
        if text is not None:
            raise UserError(f"{where}: column {column!r} holds {type(text).__name__}, not text: "
                            f"pass another --text_column")


def json_rows(source: Source, column: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of each JSON object: one per line, concatenated, or in an array."""
    decode, skip_separators = json.JSONDecoder().raw_decode, re.compile(r"[\s,\[\]]*").match
    text, end, line = "", 0, 1
    for block in itertools.chain(read_blocks(source), [""]):
        text, end = text[end:] + block, 0
        while True:
            begin = skip_separators(text, end).end()  # type: ignore[union-attr]  # always matches
            line += text.count("\n", end, begin)
            try:
                value, end = decode(text, begin)
            except (ValueError, RecursionError) as error:
                end = begin
                if begin == len(text) or (block and len(text) - begin < MAX_ROW):
                    break  # the rest is in the next block
                reason = getattr(error, "msg", error)
                raise UserError(f"{source.path}, line {line}: broken JSON ({reason}): expected "
                                f'objects such as {{"{column}": "…"}}') from None
            yield line, value
            line += text.count("\n", begin, end)


def csv_rows(source: Source, column: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, row) of a CSV file whose first line has the column names."""
    csv.field_size_limit(MAX_ROW)
    with open_text(source) as file:
        rows = csv.reader(file, strict=True)
        try:
            names = next(rows, [])
            for row in filter(None, rows):
                if len(row) != len(names):
                    raise csv.Error(f"{len(row)} cells, but {len(names)} column names")
                yield rows.line_num, dict(zip(names, row, strict=True))
        except csv.Error as error:
            raise UserError(f"{source.path}, line {rows.line_num}: broken CSV ({error}): "
                            f"check for a missing quotation mark") from None


def arrow_rows(source: Source, column: str) -> Iterator[tuple[int, Any]]:
    """Yield (number, row) of a Parquet file or a Hub dataset, with only `column` if it exists."""
    if source.tables is None:
        tables = read_parquet(source, column)
    else:
        tables = (table.select([column]) if column in table.column_names else table
                  for table in source.tables.iter(batch_size=100))
    yield from enumerate((row for table in tables for row in table.to_pylist()), 1)


def read_parquet(source: Source, column: str) -> Iterator[pa.RecordBatch]:
    """Yield a Parquet file in batches of about READ_SIZE bytes."""
    import pyarrow.parquet as pq

    with open(source.path, "rb") as source.file:
        # Reads a buffer at a time, not whole row groups.
        parquet = pq.ParquetFile(source.file, pre_buffer=False, buffer_size=READ_SIZE)
        row_groups = range(parquet.num_row_groups)
        n_bytes = sum(parquet.metadata.row_group(i).total_byte_size for i in row_groups)
        batch_size = max(1, min(1000, parquet.metadata.num_rows * READ_SIZE // max(n_bytes, 1)))
        columns = [column] if column in parquet.schema_arrow.names else None
        yield from parquet.iter_batches(batch_size, columns=columns)
