from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tael.data import FimTokens, Tokenizer, cut_text, encode_fim_prompt, fim_tokens, join_psm, undo_psm
from tael.errors import TaelError

MARKS = FimTokens(100, 101, 102)
part = st.lists(st.integers(0, 99))


@given(text=st.text(), seed=st.integers(0, 1000))
def test_a_cut_keeps_the_text(text: str, seed: int) -> None:
    cut = cut_text(text, 1.0, np.random.default_rng(seed))
    assert cut is not None
    assert cut.prefix + cut.middle + cut.suffix == text
    assert cut_text(text, 0.0, np.random.default_rng(seed)) is None


@given(prefix=part, middle=part, suffix=part)
def test_psm_comes_apart_again(prefix: list[int], middle: list[int], suffix: list[int]) -> None:
    assert undo_psm(MARKS, join_psm(MARKS, prefix, middle, suffix)) == (prefix, middle, suffix)


@given(tokens=st.lists(st.integers(97, 103), max_size=8))
def test_undo_takes_anything(tokens: list[int]) -> None:
    parts = undo_psm(MARKS, tokens)
    assert parts is None or join_psm(MARKS, *parts) == tokens


def test_rate_is_kept() -> None:
    generator = np.random.default_rng(0)
    assert 60 < sum(cut_text("abc", 0.1, generator) is not None for _ in range(1000)) < 140


def test_prompt_ends_where_the_middle_begins(tokenizer: Tokenizer) -> None:
    ids = encode_fim_prompt(tokenizer, "def add(", "return 3")
    text = "<｜fim▁begin｜>def add(<｜fim▁hole｜>return 3<｜fim▁end｜>"
    assert tokenizer.decode(ids, skip_special=False) == text


def test_a_tokenizer_without_marks_is_refused() -> None:
    import tokenizers

    foreign = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(TaelError, match="fim_rate=0"):
        fim_tokens(foreign)
