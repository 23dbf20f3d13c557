"""What a comparison has measured: curves of quality over what was spent, one JSON line a finished training."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tael.errors import TaelError

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Point(BaseModel):
    """Held-out quality after so much training. seconds: of training alone, by the comparison's clock."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    tokens: int
    flops: Amount
    seconds: Amount
    bits_per_byte: Amount


class Curve(BaseModel):
    """One finished training: what it was (`setup` tells its settings from others' of that name), how it went."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    seed: int
    setup: str
    clock: str
    """"processor" or "wall": what `seconds` are."""
    threads: int
    parameters_total: int
    parameters_active: int
    cache_bytes_per_token: int
    flops_per_token: Amount
    """Of training."""
    points: Annotated[tuple[Point, ...], Field(min_length=1)]

    @property
    def last(self) -> Point:
        return self.points[-1]

    def reach(self, bits_per_byte: float) -> Point | None:
        """The first evaluation at or below `bits_per_byte`; None where there was none."""
        return next((point for point in self.points if point.bits_per_byte <= bits_per_byte), None)

    def interpolated(self, bits_per_byte: float) -> float | None:
        """Seconds at which a straight line between evaluations crosses `bits_per_byte`; None where none does."""
        for before, after in zip(self.points, self.points[1:], strict=False):
            if after.bits_per_byte <= bits_per_byte < before.bits_per_byte:
                share = (before.bits_per_byte - bits_per_byte) / (before.bits_per_byte - after.bits_per_byte)
                return before.seconds + share * (after.seconds - before.seconds)
        return self.points[0].seconds if self.points[0].bits_per_byte <= bits_per_byte else None


class Record:
    """Finished curves in the file at `path`, appended whole; a line cut off by a crash is passed over."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, curves: Iterable[Curve]) -> None:
        """Append `curves`; they are on the disk when this returns. Raises TaelError when they cannot be."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("\n" if torn else "") + "".join(curve.model_dump_json() + "\n" for curve in curves))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise TaelError(f"{self.path}: cannot be written: {error.strerror}") from None

    def curves(self) -> list[Curve]:
        """All finished curves, in the order they were added."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(Curve.model_validate(json.loads(line)))
            except (ValueError, ValidationError, RecursionError):
                continue
        return found

    def find(self, name: str, seed: int, setup: str) -> Curve | None:
        """The finished training of that name, seed and setup."""
        key = (name, seed, setup)
        return next((c for c in self.curves() if (c.name, c.seed, c.setup) == key), None)
