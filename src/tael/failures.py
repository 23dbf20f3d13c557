"""What a user sees when something fails: one line on stderr and exit code 1, no traceback.

That is for what a user can mend: TaelError, a full disk, files that cannot be read, Ctrl-C, memory that runs out.
Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

import typer

from tael.errors import TaelError

_FULL = "no space left on device"


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Turn a failure of the block that a user can act on into a line on stderr and `typer.Exit(1)`."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader has gone: typer ends quietly
    except (KeyboardInterrupt, Exception) as error:
        line = explain(error)
        if line is None:
            raise
        rank = os.environ.get("RANK", "0")
        print(f"tael: {'' if rank == '0' else f'process {rank}: '}{line}", file=sys.stderr)
        raise typer.Exit(1) from None


def explain(error: BaseException) -> str | None:
    """The line for `error`, or None when it is a bug."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if isinstance(error, TaelError):
        return " ".join(str(error).split())
    if _disk_is_full(error):
        place = getattr(error, "filename", None)
        return f"{f'{place}: ' if place else ''}no space left on the disk; free some, and the same command goes on"
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or _no_memory(error):
        return "out of memory; lower batch_size, set micro_batch_size, or take a smaller model or context"
    return None


def _disk_is_full(error: BaseException) -> bool:
    """Whether `error` or what it came from is a full disk; safetensors and torch only say so in words."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        if isinstance(current, OSError) and current.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if _FULL in str(current).lower():
            return True
        seen.append(current)
        current = current.__cause__ or current.__context__
    return False


def _no_memory(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
