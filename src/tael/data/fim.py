"""Fill in the middle: a document is cut in three and told as prefix, suffix, middle (PSM).

`<fim_begin>prefix<fim_hole>suffix<fim_end>middle`, at rate 0.1 in DeepSeek-V3 (arXiv 2412.19437,
section 4.1). The cuts are at characters, not tokens, since a user's cursor stands anywhere, also inside what would be
one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tael.data.tokenizer import Tokenizer
from tael.errors import TaelError


@dataclass(frozen=True, slots=True)
class Cut:
    """A text in three parts: `prefix + middle + suffix` is the text."""

    prefix: str
    middle: str
    suffix: str


@dataclass(frozen=True, slots=True)
class FimTokens:
    """Ids of the three marks of the PSM order."""

    begin: int
    hole: int
    end: int


def fim_tokens(tokenizer: Tokenizer) -> FimTokens:
    """The tokenizer's fill-in-the-middle marks; raises TaelError when it has none."""
    begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    if begin is None or hole is None or end is None:
        raise TaelError("the tokenizer has no fill-in-the-middle tokens; set data.fim_rate=0")
    return FimTokens(begin, hole, end)


def cut_text(text: str, rate: float, generator: np.random.Generator) -> Cut | None:
    """Cut `text` at two places drawn uniformly with probability `rate`, else None; any part may be empty."""
    if generator.random() >= rate:
        return None
    first, second = sorted(int(i) for i in generator.integers(0, len(text) + 1, size=2))
    return Cut(text[:first], text[first:second], text[second:])


def join_psm(marks: FimTokens, prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int]) -> list[int]:
    """`<fim_begin>prefix<fim_hole>suffix<fim_end>middle` as ids."""
    return [marks.begin, *prefix, marks.hole, *suffix, marks.end, *middle]


def encode_fim_prompt(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """Ids after which the model writes the middle: PSM up to `<fim_end>`; raises TaelError without marks."""
    return join_psm(fim_tokens(tokenizer), tokenizer.encode(prefix), [], tokenizer.encode(suffix))


def undo_psm(marks: FimTokens, tokens: Sequence[int]) -> tuple[list[int], list[int], list[int]] | None:
    """`(prefix, middle, suffix)` ids of a sequence in PSM order, or None when it is not in that order."""
    ids = list(tokens)
    if not ids or ids[0] != marks.begin or marks.hole not in ids or marks.end not in ids:
        return None
    hole, end = ids.index(marks.hole), ids.index(marks.end)
    if end < hole:
        return None
    return ids[1:hole], ids[end + 1 :], ids[hole + 1 : end]
