"""Documents and examples to rows of equal length.

Documents are laid end to end and cut into rows of T+1 tokens that overlap by one, so that every token is predicted
exactly once and nothing is padded but the last row (DeepSeek-V3, arXiv 2412.19437, section 4.1: no cross-sample
masking there; V4 masks attention by `document_ids`). Examples are never cut apart: whole ones share a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tael.data.fim import Cut, FimTokens, cut_text, fim_tokens, join_psm
from tael.data.tokenizer import Tokenizer
from tael.data.types import Document, Example
from tael.errors import TaelError

PADDING_DOCUMENT = -1
_ARRAYS = ("tokens", "loss_mask", "document_ids")
_BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """N packed rows of T+1 tokens.

    `loss_mask[r, i]`: token i of row r is to be predicted (from what stands before it). `document_ids` tell apart the
    documents or examples of all rows; padding has -1. `truncated` counts examples that were cut at T+1 tokens.
    """

    tokens: NDArray[Any]  # [N, T+1] uint16 or uint32
    loss_mask: NDArray[np.bool_]  # [N, T+1]
    document_ids: NDArray[np.int32]  # [N, T+1]
    truncated: int = 0

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def sequence_length(self) -> int:
        """T: tokens a row predicts from."""
        return int(self.tokens.shape[1]) - 1

    def save(self, folder: str | Path) -> None:
        """Write the arrays as plain .npy files, and rows.json, into `folder` (made if missing)."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in _ARRAYS:
                np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
            (folder / "rows.json").write_text(json.dumps({"truncated": self.truncated}) + "\n", encoding="utf-8")
        except OSError as error:
            raise TaelError(f"{folder}: cannot write packed rows: {error.strerror or error}") from None

    @staticmethod
    def load(folder: str | Path) -> Rows:
        """Open rows written by `save`, memory-mapped; raises TaelError when they are missing or damaged."""
        folder = Path(folder)
        try:
            arrays = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS]
            truncated = int(json.loads((folder / "rows.json").read_text(encoding="utf-8"))["truncated"])
        except FileNotFoundError as error:
            raise TaelError(f"{error.filename}: no such file; pack the data again") from None
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise TaelError(
                f"{folder}: packed rows are damaged ({error}); delete the folder and pack again"
            ) from None
        tokens, loss_mask, document_ids = arrays
        kinds = (tokens.dtype.kind, loss_mask.dtype.kind, document_ids.dtype.kind)
        if tokens.ndim != 2 or len({a.shape for a in arrays}) != 1 or kinds != ("u", "b", "i"):
            raise TaelError(f"{folder}: packed rows are damaged (arrays do not match); delete the folder, pack again")
        return Rows(tokens, loss_mask, document_ids, truncated)


def _token_type(largest: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if largest < 2**16 else np.uint32


def _text_batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    """Texts in groups of about a million characters: enough for the parallel encoder, little enough for memory."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_with_cuts(
    tokenizer: Tokenizer, texts: list[str], rate: float, generator: np.random.Generator, marks: FimTokens
) -> Iterator[list[int]]:
    cuts = [cut_text(text, rate, generator) for text in texts]
    parts = [
        part
        for text, cut in zip(texts, cuts, strict=True)
        for part in ((cut.prefix, cut.middle, cut.suffix) if isinstance(cut, Cut) else (text,))
    ]
    encoded = iter(tokenizer.encode_batch(parts))
    for cut in cuts:
        yield next(encoded) if cut is None else join_psm(marks, *islice(encoded, 3))


def _encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, fim_rate: float, seed: int
) -> Iterator[list[int]]:
    if not fim_rate:
        for texts in _text_batches(documents):
            yield from tokenizer.encode_batch(texts)
        return
    marks, generator = fim_tokens(tokenizer), np.random.default_rng(seed)
    for texts in _text_batches(documents):
        yield from _encode_with_cuts(tokenizer, texts, fim_rate, generator, marks)


def pack_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, sequence_length: int, fim_rate: float, seed: int
) -> Rows:
    """Lay the documents end to end as BOS + tokens + EOS and cut them into rows of `sequence_length` + 1 tokens.

    Row r starts with the last token of row r-1, so every token but the documents' BOS is predicted exactly once; the
    last row is padded and the padding masked. With probability `fim_rate` a document is told in PSM order, drawn from
    `seed`. Documents without text are left out. Raises TaelError when nothing is left to pack.
    """
    ends = [[] if i is None else [i] for i in (tokenizer.bos_id, tokenizer.eos_id)]
    kind = _token_type(tokenizer.vocab_size - 1)
    encoded = _encode_documents((d for d in documents if d.text), tokenizer, fim_rate, seed)
    pieces = [np.array([*ends[0], *ids, *ends[1]], dtype=kind) for ids in encoded]
    if not pieces:
        raise TaelError("no text to pack: all documents are empty")
    lengths = [len(piece) for piece in pieces]
    tokens = np.concatenate(pieces)
    document_ids = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
    loss_mask = np.ones(len(tokens), dtype=bool)
    loss_mask[np.cumsum([0, *lengths[:-1]])] = False
    pad_id = next((i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None), 0)
    return Rows(
        _overlapping(tokens, sequence_length, pad_id),
        _overlapping(loss_mask, sequence_length, False),
        _overlapping(document_ids, sequence_length, PADDING_DOCUMENT),
    )


def _overlapping(flat: NDArray[Any], length: int, padding: int | bool) -> NDArray[Any]:
    """[M] -> [N, length + 1]: rows that start with the token the row before ended with."""
    count = max(1, -(-(len(flat) - 1) // length))
    padded = np.full(count * length + 1, padding, dtype=flat.dtype)
    padded[: len(flat)] = flat
    return np.lib.stride_tricks.sliding_window_view(padded, length + 1)[::length].copy()


class _BestFit:
    """Rows with room left, found by the least room that is enough."""

    def __init__(self, width: int) -> None:
        self.rows: list[list[int]] = []
        self._width = width
        self._by_room: list[list[int]] = [[] for _ in range(width + 1)]
        self._rooms = 0  # bit r: some row has exactly r tokens of room

    def add(self, index: int, length: int) -> None:
        enough = self._rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = self._by_room[room].pop()
            if not self._by_room[room]:
                self._rooms ^= 1 << room
        else:
            room, row = self._width, len(self.rows)
            self.rows.append([])
        self.rows[row].append(index)
        if left := room - length:
            self._by_room[left].append(row)
            self._rooms |= 1 << left


def pack_examples(examples: Sequence[Example], sequence_length: int, pad_id: int) -> Rows:
    """Put whole examples into rows of `sequence_length` + 1 tokens, each where the least room is left that is enough.

    An example longer than a row is cut at its end and counted in `Rows.truncated`. Deterministic: in the order given.
    Raises TaelError when there is no example.
    """
    width = sequence_length + 1
    packer = _BestFit(width)
    for index, example in enumerate(examples):
        if example.tokens:
            packer.add(index, min(len(example.tokens), width))
    if not packer.rows:
        raise TaelError("no example to pack")
    largest = max(pad_id, max(max(e.tokens, default=0) for e in examples))
    tokens = np.full((len(packer.rows), width), pad_id, dtype=_token_type(largest))
    loss_mask = np.zeros(tokens.shape, dtype=bool)
    document_ids = np.full(tokens.shape, PADDING_DOCUMENT, dtype=np.int32)
    for row, indices in enumerate(packer.rows):
        at = 0
        for index in indices:
            example = examples[index]
            end = min(at + len(example.tokens), width)
            tokens[row, at:end] = example.tokens[: end - at]
            loss_mask[row, at:end] = example.loss_mask[: end - at]
            loss_mask[row, at] = False  # nothing of its own stands before an example's first token
            document_ids[row, at:end] = index
            at = end
    return Rows(tokens, loss_mask, document_ids, sum(len(e.tokens) > width for e in examples))
