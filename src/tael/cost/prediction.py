"""What a recipe was predicted to take on this machine, as plan.json holds it (`tael.cost.kept` writes it)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tael.cost.rundata import number, read_object
from tael.files import digest

if TYPE_CHECKING:
    from tael.cost.here import StagePlan
    from tael.recipe import Recipe

FILE = "plan.json"
MOST_STAGES = 100
MEMORY_NOTE = (
    "Memory is what training holds. What malloc keeps of freed pieces comes on top: 36% to 88% more in stages of the "
    "demo (docs/cost.md)."
)


@dataclass(frozen=True)
class Machine:
    """What a rate measured here holds for."""

    processor: str
    threads: int


@dataclass(frozen=True)
class Stage:
    """One stage as it was predicted; `seconds` with its evaluations."""

    name: str
    steps: float
    tokens: float
    flops: float
    seconds: float
    memory_bytes: float


@dataclass(frozen=True)
class Prediction:
    """A recipe's plan. `measured`: its steps were timed, else one matrix product stood in; `when`: ISO, UTC."""

    recipe: str
    measured: bool
    when: str
    machine: Machine
    price_per_hour: float
    stages: tuple[Stage, ...]

    @property
    def how(self) -> str:
        """As in `steps timed here, 2026-11-24`."""
        return f"{'steps timed here' if self.measured else 'rough'}, {self.when[:10]}"

    def dollars(self, seconds: float) -> float:
        return seconds / 3600 * self.price_per_hour

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def of(
        cls, recipe: Recipe, plans: Sequence[StagePlan], measured: bool, machine: Machine, price_per_hour: float
    ) -> Self:
        stages = tuple(Stage(p.name, p.steps, p.tokens, p.flops, p.seconds, p.memory_bytes) for p in plans)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(recipe_digest(recipe), measured, now, machine, price_per_hour, stages)


def recipe_digest(recipe: Recipe) -> str:
    """The same for two recipes that run the same: all values count but price and description."""
    table = recipe.model_dump(mode="json", exclude={"price", "description"})
    return digest(table)


def read_prediction(directory: Path) -> tuple[Prediction | None, str]:
    """(what plan.json says, or None; a note where the file is there and cannot be read)."""
    if not (directory / FILE).exists():
        return None, ""
    found = parse_prediction(read_object(directory / FILE))
    return found, "" if found else f"{FILE} is there but is no prediction of Tael's; it is left out."


def parse_prediction(table: dict[str, Any] | None) -> Prediction | None:
    """None for anything but what `Prediction.to_json` writes."""
    table = table or {}
    machine, price, stages = table.get("machine"), _amount(table.get("price_per_hour")), table.get("stages")
    when, digest, measured = table.get("when"), table.get("recipe"), table.get("measured")
    if not (isinstance(machine, dict) and isinstance(stages, list) and 0 < len(stages) <= MOST_STAGES):
        return None
    processor, threads = machine.get("processor"), machine.get("threads")
    known = [_stage(each) for each in stages]
    if not (isinstance(processor, str) and type(threads) is int and isinstance(digest, str) and _is_date(when)):
        return None
    if price is None or not isinstance(measured, bool) or None in known:
        return None
    read = tuple(each for each in known if each is not None)
    return Prediction(digest, measured, str(when), Machine(processor, threads), price, read)


def _stage(table: Any) -> Stage | None:
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        return None
    amounts = [_amount(table.get(key)) for key in ("steps", "tokens", "flops", "seconds", "memory_bytes")]
    known = [amount for amount in amounts if amount is not None]
    return Stage(table["name"], *known) if len(known) == len(amounts) else None


def _amount(value: Any) -> float | None:
    found = number(value)
    return found if found is not None and 0 <= found < 1e30 else None


def _is_date(text: Any) -> bool:
    try:
        datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return False
    return True
