"""Which of two answers was better: what a later preference training learns from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Vote:
    """One judgement; of a tie, `chosen` and `rejected` are just the two answers."""

    id: int
    owner: str
    created: str
    prompt: list[dict[str, Any]]
    """Messages as OpenAI writes them."""
    chosen: str
    rejected: str
    chosen_model: str
    rejected_model: str
    tie: bool
    note: str


def preferences(votes: Iterable[Vote]) -> str:
    """JSONL in TRL's conversational preference format, models and time added. Ties prefer nothing: left out."""
    return "".join(json.dumps(_preference(vote), ensure_ascii=False) + "\n" for vote in votes if not vote.tie)


@dataclass(frozen=True)
class Standing:
    """How one model fared."""

    model: str
    won: int
    lost: int
    even: int


def standings(votes: Iterable[Vote]) -> list[Standing]:
    """Every model that was voted on, the one that won the largest part first (a tie is half a win)."""
    counts: dict[str, list[int]] = {}
    for vote in votes:
        for model, place in ((vote.chosen_model, 0), (vote.rejected_model, 1)):
            counts.setdefault(model, [0, 0, 0])[2 if vote.tie else place] += 1
    ranked = [Standing(model, *count) for model, count in counts.items()]
    return sorted(ranked, key=lambda each: (-(each.won + each.even / 2) / sum(counts[each.model]), each.model))


def _preference(vote: Vote) -> dict[str, Any]:
    return {
        "prompt": vote.prompt,
        "chosen": [{"role": "assistant", "content": vote.chosen}],
        "rejected": [{"role": "assistant", "content": vote.rejected}],
        "chosen_model": vote.chosen_model,
        "rejected_model": vote.rejected_model,
        "created": vote.created,
        "note": vote.note,
    }
