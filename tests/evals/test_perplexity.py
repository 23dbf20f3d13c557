"""Bits per byte against a plain one-document-at-a-time computation, and its laws."""

from __future__ import annotations

import math

import pytest
import torch

from tael.data import Document, train_tokenizer
from tael.errors import TaelError
from tael.evals.perplexity import bits_per_byte
from tael.model import ModelConfig, build_model

TEXTS = ["the cat sat on the mat\n", "a much longer story about a cat, a mat and a héron \U0001f600 " * 5, "x"]


@pytest.fixture(scope="module")
def parts():
    tokenizer = train_tokenizer(TEXTS, 300)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, intermediate_size=48)
    return build_model(config, seed=3, zero_residual=False), tokenizer


def plain_bits(model, tokenizer, text: str, length: int) -> float:
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    nats = 0.0
    for start in range(0, len(ids) - 1, length):
        window = torch.tensor([ids[start : start + length + 1]])
        with torch.no_grad():
            logits = model(window[:, :-1])
        nats += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
    return nats / math.log(2)


@pytest.mark.parametrize("length", [8, 64, 512])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_plain_computation(parts, length, batch):
    model, tokenizer = parts
    documents = [Document(text, "test") for text in TEXTS]
    result = bits_per_byte(model, tokenizer, documents, length, batch)
    size = sum(len(text.encode()) for text in TEXTS)
    wanted = sum(plain_bits(model, tokenizer, text, length) for text in TEXTS) / size
    assert result.bits_per_byte == pytest.approx(wanted, rel=1e-5)
    assert result.bytes == size and result.documents == len(TEXTS)


def test_order_of_documents_does_not_matter(parts):
    model, tokenizer = parts
    documents = [Document(text, "test") for text in TEXTS]
    forward = bits_per_byte(model, tokenizer, documents, 16)
    backward = bits_per_byte(model, tokenizer, documents[::-1], 16)
    assert forward.bits_per_byte == pytest.approx(backward.bits_per_byte, rel=1e-6)


def test_equal_documents_leave_no_spread(parts):
    model, tokenizer = parts
    result = bits_per_byte(model, tokenizer, [Document(TEXTS[0], "test")] * 4, 16)
    assert result.half_width == pytest.approx(0.0, abs=1e-6)


def test_no_text_is_an_error_in_words(parts):
    model, tokenizer = parts
    with pytest.raises(TaelError, match="no text"):
        bits_per_byte(model, tokenizer, [Document("", "test")], 16)
