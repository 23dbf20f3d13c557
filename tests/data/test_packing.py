from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tael.data import (
    PADDING_DOCUMENT,
    Document,
    Example,
    Rows,
    Tokenizer,
    fim_tokens,
    pack_documents,
    pack_examples,
    undo_psm,
)
from tael.errors import TaelError

texts = st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=8)


def _unpack(rows: Rows) -> list[list[int]]:
    """Documents back from rows that overlap by one token."""
    flat = np.concatenate([rows.tokens[0, :1], rows.tokens[:, 1:].ravel()])
    ids = np.concatenate([rows.document_ids[0, :1], rows.document_ids[:, 1:].ravel()])
    return [flat[ids == i].tolist() for i in range(ids.max() + 1)]


@given(texts=texts, length=st.integers(1, 40))
def test_every_token_is_predicted_exactly_once(tokenizer: Tokenizer, texts: list[str], length: int) -> None:
    rows = pack_documents([Document(t, "x") for t in texts], tokenizer, length, 0.0, 0)
    documents = [[tokenizer.bos_id, *tokenizer.encode(t), tokenizer.eos_id] for t in texts]
    assert _unpack(rows) == documents
    assert rows.tokens.shape == rows.loss_mask.shape == rows.document_ids.shape == (len(rows), length + 1)
    assert (rows.tokens[1:, 0] == rows.tokens[:-1, -1]).all()
    predicted = rows.tokens[:, 1:][rows.loss_mask[:, 1:]].tolist()
    assert predicted == [token for document in documents for token in document[1:]]
    padding = rows.document_ids == PADDING_DOCUMENT
    assert not rows.loss_mask[padding].any()
    assert not padding[:-1].any()


@given(texts=texts, seed=st.integers(0, 99))
def test_fim_documents_hold_the_same_text(tokenizer: Tokenizer, texts: list[str], seed: int) -> None:
    rows = pack_documents([Document(t, "x") for t in texts], tokenizer, 16, 1.0, seed)
    for text, document in zip(texts, _unpack(rows), strict=True):
        parts = undo_psm(fim_tokens(tokenizer), document[1:-1])
        assert parts is not None
        assert "".join(tokenizer.decode(part) for part in parts) == text
    again = pack_documents([Document(t, "x") for t in texts], tokenizer, 16, 1.0, seed)
    assert np.array_equal(rows.tokens, again.tokens)


def test_many_batches_keep_the_order(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document(f"text {i}", "x") for i in range(50)]
    whole = pack_documents(documents, tokenizer, 16, 0.5, 3)
    monkeypatch.setattr("tael.data.packing._BATCH_CHARACTERS", 20)
    assert np.array_equal(whole.tokens, pack_documents(documents, tokenizer, 16, 0.5, 3).tokens)


def test_nothing_to_pack_is_refused(tokenizer: Tokenizer) -> None:
    for documents in ([], [Document("", "x")]):
        with pytest.raises(TaelError, match="no text"):
            pack_documents(documents, tokenizer, 8, 0.0, 0)
    with pytest.raises(TaelError, match="no example"):
        pack_examples([], 8, 0)


examples = st.lists(
    st.lists(st.tuples(st.integers(0, 70_000), st.booleans()), min_size=1, max_size=20).map(
        lambda pairs: Example([t for t, _ in pairs], [m for _, m in pairs])
    ),
    min_size=1,
    max_size=20,
)


@given(examples=examples, length=st.integers(4, 24))
def test_examples_stay_whole(examples: list[Example], length: int) -> None:
    rows = pack_examples(examples, length, 0)
    assert rows.truncated == sum(len(e.tokens) > length + 1 for e in examples)
    for index, example in enumerate(examples):
        where = np.argwhere(rows.document_ids == index)
        kept = min(len(example.tokens), length + 1)
        assert len({row for row, _ in where}) == 1
        columns = [column for _, column in where]
        assert columns == list(range(columns[0], columns[0] + kept))
        here = (where[:, 0], where[:, 1])
        assert rows.tokens[here].tolist() == example.tokens[:kept]
        assert rows.loss_mask[here].tolist() == [False, *example.loss_mask[1:kept]]
    assert not rows.loss_mask[rows.document_ids == PADDING_DOCUMENT].any()
    # Any-fit: two rows that would fit into one are never left.
    used = np.sort((rows.document_ids != PADDING_DOCUMENT).sum(axis=1))
    assert len(used) < 2 or used[0] + used[1] > length + 1


def test_rows_are_saved_and_mapped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = pack_examples([Example([1, 2, 3], [False, True, True])] * 5, 7, 0)
    rows.save(tmp_path / "rows")
    loaded = Rows.load(tmp_path / "rows")
    assert isinstance(loaded.tokens, np.memmap)
    for name in ("tokens", "loss_mask", "document_ids"):
        assert np.array_equal(getattr(rows, name), getattr(loaded, name))
    assert (loaded.tokens.dtype, loaded.sequence_length, loaded.truncated) == (np.uint16, 7, 0)


@pytest.mark.parametrize("damage", ["missing", "cut", "junk", "pickle", "shape"])
def test_damaged_rows_are_refused(tmp_path: Path, damage: str) -> None:
    pack_examples([Example([1, 2, 3], [True] * 3)] * 5, 7, 0).save(tmp_path)
    path = tmp_path / "tokens.npy"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "junk":
        path.write_bytes(b"junk")
    elif damage == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        np.save(path, np.zeros((1, 2), dtype=np.uint16))
    with pytest.raises(TaelError, match="pack"):
        Rows.load(tmp_path)
