"""`tael` and `python -m tael`: the command line, with an end that is quiet whatever happens.

The commands themselves are in tael.cli, which is imported inside the guard: Ctrl-C is answered in one line from the
first moment on.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys

from tael.interrupts import guard_start


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed with one line on stderr, 2 wrong usage."""
    guard_start()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may say what the terminal cannot
    code: object = 1
    try:
        from tael.cli import app

        app(prog_name="tael")
    except SystemExit as done:
        code = done.code
    except KeyboardInterrupt:
        print("tael: stopped", file=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to stop: a second Ctrl-C must not tear the end
    code = _flush() or code
    if code == 1:
        # Past the interpreter's own end: after a Ctrl-C inside exec() (an import, a dataclass) CPython 3.11 kills
        # itself there with SIGINT, although the exception was dealt with.
        os._exit(1)
    sys.exit(code)  # type: ignore[arg-type]


def _flush() -> int:
    """Write out what is still held back; 1 when nobody takes it any more."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"tael: standard output: {error.strerror}", file=sys.stderr)
        with contextlib.suppress(OSError):  # else the interpreter tries again on its way out
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    main()
