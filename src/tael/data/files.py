"""The user's own text: .txt, .jsonl and .parquet files, and data sets of a hub."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from tael.data.types import Document, Message, Role
from tael.errors import TaelError, did_you_mean

CHUNK_CHARACTERS = 4_000
"""About how long the documents are that a long text file is taken apart into."""
LONG_FILE_CHARACTERS = 100_000


def find_files(pattern: str) -> list[Path]:
    """Files a path or glob names, sorted; raises TaelError when there is none."""
    expanded = str(Path(pattern).expanduser())
    # Path.glob takes no absolute pattern.
    found = [expanded] if Path(expanded).exists() else glob.glob(expanded, recursive=True)  # noqa: PTH207
    paths = [Path(p) for p in found]
    files = sorted(p for p in paths if p.is_file())
    if files:
        return files
    if any(p.is_dir() for p in paths):
        raise TaelError(f"{pattern}: is a folder; name the files in it, as in '{pattern.rstrip('/')}/**/*.txt'")
    raise TaelError(f"{pattern}: no such file")


def read_text(path: Path) -> str:
    """Content of a UTF-8 text file; raises TaelError when it cannot be read, is empty, or is no text."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise TaelError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise TaelError(f"{path}: is no UTF-8 text (byte {error.start}); convert or leave it out") from None
    if "\0" in text:
        raise TaelError(f"{path}: is a binary file, not text")
    if not text.strip():
        raise TaelError(f"{path}: is empty")
    return text.replace("\r\n", "\n")


def split_long_text(text: str, size: int = CHUNK_CHARACTERS) -> list[str]:
    """Pieces of about `size` characters, joining to `text`; cut at blank lines where there are any, else at lines."""
    pieces: list[str] = []
    piece, length = [], 0
    lines = (line[i : i + size] for line in text.splitlines(keepends=True) for i in range(0, len(line), size))
    for line in lines:
        piece.append(line)
        length += len(line)
        if length >= 2 * size or (length >= size and not line.strip()):
            pieces.append("".join(piece))
            piece, length = [], 0
    if piece:
        pieces.append("".join(piece))
    return pieces


def _read_txt(path: Path, text_field: str, only: bool) -> Iterator[str]:
    text = read_text(path)
    # One file alone is taken apart too: text to hold out must come from somewhere.
    yield from split_long_text(text) if only or len(text) > LONG_FILE_CHARACTERS else [text]


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`path:line`, object) for every line that is not blank; raises TaelError naming the line that is no object."""
    empty = True
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                empty = False
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    raise TaelError(f"{where}: is no JSON") from None
                if not isinstance(row, dict):
                    raise TaelError(f"{where}: is no JSON object")
                yield where, row
    except OSError as error:
        raise TaelError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise TaelError(f"{path}: is no UTF-8 text") from None
    if empty:
        raise TaelError(f"{path}: is empty")


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise TaelError(f"{where}: no field '{field}'; set data.text_field{did_you_mean(field, map(str, row))}")
    if not isinstance(row[field], str):
        raise TaelError(f"{where}: '{field}' is no string")
    return row[field]


def _read_jsonl_texts(path: Path, text_field: str, only: bool) -> Iterator[str]:
    for where, row in read_jsonl(path):
        yield _text_of(row, text_field, where)


def _read_parquet(path: Path, text_field: str, only: bool) -> Iterator[str]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise TaelError(f"{path}: reading .parquet needs pyarrow; pip install 'tael[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                hint = did_you_mean(text_field, names)
                raise TaelError(f"{path}: no column '{text_field}'; set data.text_field{hint}")
            for batch in file.iter_batches(columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    if text is not None and not isinstance(text, str):
                        raise TaelError(f"{path}: column '{text_field}' is no text")
                    yield text or ""
    except (OSError, arrow.ArrowException) as error:
        raise TaelError(f"{path}: damaged, or no parquet file: {str(error).splitlines()[0][:120]}") from None


_READERS: dict[str, Callable[[Path, str, bool], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl_texts,
    ".parquet": _read_parquet,
}


def file_documents(pattern: str, text_field: str) -> Iterator[Document]:
    """Documents of the files a path or glob names, in the order of their names.

    A .txt file is one document, unless it is long or the only one: then it is taken apart at blank lines into
    documents of about 4,000 characters. Raises TaelError naming the file (and line) that is missing, empty, damaged
    or of another kind.
    """
    files = find_files(pattern)
    for path in files:
        if path.suffix.lower() not in _READERS:
            raise TaelError(f"{path}: Tael reads {', '.join(_READERS)} files, not '{path.suffix}'")
    return (
        Document(text, str(path))
        for path in files
        for text in _READERS[path.suffix.lower()](path, text_field, len(files) == 1)
        if text.strip()
    )


def dataset_documents(name: str, text_field: str) -> Iterator[Document]:
    """Stream a hub data set `NAME[:SPLIT]` (split "train" unless named) through the `datasets` extra."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise TaelError(f"data.dataset={name}: needs the datasets package; pip install 'tael[hub]'") from None
    path, _, split = name.partition(":")
    try:
        for number, row in enumerate(datasets.load_dataset(path, split=split or "train", streaming=True)):
            text = _text_of(dict(row), text_field, f"{name} row {number}")
            if text.strip():
                yield Document(text, name)
    except TaelError:
        raise
    except Exception as error:  # the hub's client raises many kinds; the user needs the reason, not the trace
        said = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise TaelError(f"data.dataset={name}: cannot be read: {said}") from None


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise TaelError(f"{where}: a message must be an object with 'role' and 'content' strings")
    role: Any = entry.get("role")
    if role not in get_args(Role):
        raise TaelError(f"{where}: unknown role {role!r}{did_you_mean(str(role), get_args(Role))}")
    reasoning = entry.get("reasoning", entry.get("reasoning_content"))
    if reasoning is not None and not isinstance(reasoning, str):
        raise TaelError(f"{where}: 'reasoning' is no string")
    return Message(role, entry["content"], reasoning)


def file_conversations(pattern: str) -> Iterator[list[Message]]:
    """Conversations of .jsonl files: a line is `{"messages": [{"role", "content", "reasoning"?}, ...]}`.

    Raises TaelError naming the line that is not so, or has no assistant message to learn from.
    """
    for path in find_files(pattern):
        for where, row in read_jsonl(path):
            entries = row.get("messages")
            if not isinstance(entries, list):
                raise TaelError(f"{where}: no 'messages' list")
            messages = [_message(entry, where) for entry in entries]
            if not any(m.role == "assistant" for m in messages):
                raise TaelError(f"{where}: no assistant message to learn from")
            yield messages
