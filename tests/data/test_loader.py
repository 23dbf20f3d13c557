from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tael.data import IGNORED, Document, Example, Loader, Rows, Tokenizer, pack_documents, pack_examples
from tael.errors import TaelError


def _rows(count: int) -> Rows:
    """Row r holds the token r only."""
    return pack_examples([Example([r] * 5, [True] * 5) for r in range(count)], 4, 0)


@given(count=st.integers(1, 13), batch=st.integers(1, 20), seed=st.integers(0, 5))
def test_every_epoch_is_a_permutation(count: int, batch: int, seed: int) -> None:
    loader = Loader(_rows(count), batch, seed)
    steps = -(-3 * count // batch)
    drawn = [row for step in range(steps) for row in loader.row_indices(step)]
    for epoch in range(3):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))
    fresh = Loader(_rows(count), batch, seed)
    assert fresh.row_indices(steps - 1) == drawn[(steps - 1) * batch :]
    assert fresh.row_indices(0) == drawn[:batch]


@given(count=st.integers(1, 9), share=st.integers(1, 4), world=st.integers(1, 4), step=st.integers(0, 6))
def test_ranks_share_the_global_batch(count: int, share: int, world: int, step: int) -> None:
    whole = Loader(_rows(count), share * world, 1).batch(step)
    parts = [Loader(_rows(count), share * world, 1, rank, world).batch(step) for rank in range(world)]
    assert torch.equal(torch.cat([p.tokens for p in parts]), whole.tokens)
    assert torch.equal(torch.cat([p.targets for p in parts]), whole.targets)


def test_targets_follow_mask_and_documents(tokenizer: Tokenizer) -> None:
    rows = pack_documents([Document("ab 1", "x"), Document("c", "x")], tokenizer, 12, 0.0, 0)
    batch = Loader(rows, 1, 0).batch(0)
    assert batch.tokens.dtype == batch.targets.dtype == batch.document_ids.dtype == torch.int64
    assert batch.tokens.shape == batch.targets.shape == batch.document_ids.shape == (1, 12)
    following = torch.from_numpy(rows.tokens[:, 1:].astype(np.int64))
    learned = torch.from_numpy(rows.loss_mask[:, 1:])
    assert torch.equal(batch.targets, following.where(learned, torch.tensor(IGNORED)))
    assert batch.tokens_to_learn == int(learned.sum())
    at = batch.tokens[0].tolist().index(tokenizer.eos_id or 0)
    assert batch.targets[0, at] == IGNORED  # the next document's BOS


def test_no_target_crosses_into_another_document() -> None:
    rows = Rows(
        np.arange(4, dtype=np.uint16)[None],
        np.ones((1, 4), dtype=bool),
        np.array([[0, 0, 1, 1]], dtype=np.int32),
    )
    assert Loader(rows, 1, 0).batch(0).targets.tolist() == [[1, IGNORED, 3]]


def test_split_and_to_keep_all_rows() -> None:
    batch = Loader(_rows(7), 7, 0).batch(0)
    parts = batch.split(3)
    assert [len(p.tokens) for p in parts] == [3, 2, 2]
    assert torch.equal(torch.cat([p.targets for p in parts]), batch.targets)
    assert sum(p.tokens_to_learn for p in parts) == batch.tokens_to_learn
    assert batch.to("meta").tokens.device.type == "meta"
    for n in (0, 8):
        with pytest.raises(TaelError, match="cannot split"):
            batch.split(n)


def test_refusals() -> None:
    empty = Rows(np.zeros((0, 5), np.uint16), np.zeros((0, 5), bool), np.zeros((0, 5), np.int32))
    with pytest.raises(TaelError, match="no rows"):
        Loader(empty, 1, 0)
    with pytest.raises(TaelError, match="no multiple"):
        Loader(_rows(3), 3, 0, 0, 2)
    with pytest.raises(TaelError, match="rank 2"):
        Loader(_rows(3), 4, 0, 2, 2)
