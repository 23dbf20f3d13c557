"""One small tokenizer for all tests of the data room."""

from __future__ import annotations

import pytest

from tael.data import Tokenizer, train_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. What is 12 + 30? It is 42.\n",
    "def add(first, second):\n    return first + second\n",
    "I think that <think> is a word like any other, and so is </think>, is it not?\n" * 3,
    "Ein Wort, ein Ding, ein Wörtchen. 漢字とかな。\n",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 4, 420)
