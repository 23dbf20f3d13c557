"""Who asks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """A key's holder; `key_id` None is whoever sits at this machine (no key is asked for on loopback)."""

    key_id: int | None
    name: str

    @property
    def owner(self) -> str:
        """Under what name conversations are kept: those of one key are not seen by another."""
        return "local" if self.key_id is None else f"key:{self.key_id}"


LOCAL = Caller(None, "local")
