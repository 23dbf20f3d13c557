"""The one exception a user is meant to see, and the helper that finds the name they probably meant.

`TaelError` carries one line: what was wrong, where, what to do. The CLI prints it to stderr and exits 1.
Everything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TaelError(Exception):
    """A failure the user can act on; `str(error)` is one line saying what, where and what to do."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest of `valid`, or the sorted list of them when none is near."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else f"; valid are: {', '.join(names)}"
