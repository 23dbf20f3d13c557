"""Held-out text in bits per byte, which compares models whatever their tokenizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tael.data import IGNORED, Document, Tokenizer
from tael.engine.work import NO_WORK
from tael.errors import TaelError
from tael.model.transformer import Transformer
from tael.train.objective import Work


@dataclass(frozen=True)
class TextResult:
    """Bits per byte over all documents, its 95% half-width (by document), and how much was read.

    `work` counts the tokens that passed the model, padding too, and what that cost.
    """

    bits_per_byte: float
    half_width: float
    documents: int
    bytes: int
    work: Work = NO_WORK

    def as_dict(self) -> dict[str, float]:
        return {
            "bits_per_byte": round(self.bits_per_byte, 5),
            "bits_per_byte_half_width": round(self.half_width, 5),
            "documents": self.documents,
            "bytes": self.bytes,
        }


@torch.no_grad()
def bits_per_byte(
    model: Transformer, tokenizer: Tokenizer, documents: Sequence[Document], sequence_length: int, batch: int = 32
) -> TextResult:
    """-log2 p of every document's tokens over its UTF-8 bytes.

    Each document is read alone, from a BOS token, in windows of `sequence_length` tokens without overlap: a window
    does not see the one before it, so long documents are judged a little too hard, never too mildly.
    Raises TaelError when there is no text.
    """
    texts = [d.text for d in documents if d.text]
    if not texts:
        raise TaelError("no text to evaluate: every document is empty")
    sizes = torch.tensor([len(text.encode("utf-8", "replace")) for text in texts], dtype=torch.float64)
    nats = torch.zeros(len(texts), dtype=torch.float64)
    windows = _windows(tokenizer, texts, sequence_length)
    windows.sort(key=lambda w: len(w[1]), reverse=True)  # like lengths together: less padding
    device, work = model.norm.weight.device, NO_WORK
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        tokens, targets = _pad([ids for _, ids in part])
        work = _and(work, model, tokens)
        hidden = model.features(tokens.to(device)).hidden  # [B, T, D]
        index = targets.clamp_min(0).to(device).unsqueeze(-1)
        # The head as a module: a quantised one has its own product.
        logprobs = model.logits(hidden).float().log_softmax(-1).gather(-1, index).squeeze(-1).cpu()
        sums = (logprobs * (targets != IGNORED)).sum(1).double()  # [B]
        nats.index_add_(0, torch.tensor([index for index, _ in part]), -sums)
    bits = nats / math.log(2)
    value = float(bits.sum() / sizes.sum())
    # Ratio estimator: the spread of each document's bits around value * bytes (Cochran 1977, section 6.4).
    spread = float(((bits - value * sizes) ** 2).sum().sqrt() / sizes.sum())
    return TextResult(value, 1.96 * spread, len(texts), int(sizes.sum()), work)


def _and(work: Work, model: Transformer, tokens: Tensor) -> Work:
    """`work`, and one forward pass over `tokens` [B, T]."""
    count, width = tokens.numel(), tokens.shape[1]
    return Work(work.tokens + count, work.flops + count * model.config.flops_per_token(width / 2, training=False))


def _windows(tokenizer: Tokenizer, texts: list[str], length: int) -> list[tuple[int, list[int]]]:
    """(document, up to length + 1 tokens): the first of each window is context, the others are predicted."""
    first = [tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id or 0]
    windows = []
    for index, ids in enumerate(tokenizer.encode_batch(texts)):
        whole = first + ids
        windows += [(index, whole[s : s + length + 1]) for s in range(0, len(whole) - 1, length)]
    return windows


def _pad(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """tokens [B, T] and targets [B, T] (-100 beyond the end) of sequences of T + 1 tokens at most."""
    width = max(len(s) for s in sequences) - 1
    tokens = torch.zeros(len(sequences), width, dtype=torch.int64)
    targets = torch.full((len(sequences), width), IGNORED)
    for row, ids in enumerate(sequences):
        values = torch.tensor(ids)
        tokens[row, : len(ids) - 1] = values[:-1]
        targets[row, : len(ids) - 1] = values[1:]
    return tokens, targets
