"""Ctrl-C while the program starts, and while it works.

Python raises KeyboardInterrupt wherever it happens to be. In the midst of importing torch or pydantic that can get
lost, or come out as another error (seen: a SchemaError, and a run that simply went on). So `tael` starts with a
handler that ends the process at once, when nothing has been begun, and a command that has things to put in order
says with `interruptible` from where on it wants the exception.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """Signal handler: one line, exit code 1, no unwinding."""
    os.write(2, b"tael: stopped\n")
    os._exit(1)


def guard_start() -> None:
    """Let Ctrl-C end the process at once, unless whoever started it had Ctrl-C ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave_at_once)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt; enter it when all imports are done."""
    if signal.getsignal(signal.SIGINT) is not leave_at_once:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, leave_at_once)
