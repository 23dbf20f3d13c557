"""A run as a process of its own: begun, found again after the server was restarted, asked to stop.

RUN/process.json says which process it is, by its id and the moment it began (an id alone is given to another
process some day); RUN/output.log holds what it says. The lock that every `tael run` holds on its directory tells of
runs that were begun in a terminal.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tael.errors import TaelError
from tael.files import write_whole

PROCESS, OUTPUT, LOCK = "process.json", "output.log", ".lock"
SAME_MOMENT = 2.0
"""Seconds by which two readings of one process's beginning may differ, when the clock was set in between."""
TAIL_BYTES = 65_536
_LOCKS = Path("/proc/locks")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class Process:
    """What process.json holds. `overrides` are as after --set."""

    pid: int
    started: float
    recipe: str
    overrides: list[str]

    def find(self) -> psutil.Process | None:
        """The process, if it is still at work; another one that was given its id is not taken for it."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < SAME_MOMENT
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.Error, OverflowError):
            return None

    def interrupt(self) -> None:
        """Ctrl-C; raises TaelError when it has ended or belongs to somebody else."""
        process = self.find()
        if process is None:
            raise TaelError("the run's process has ended")
        try:
            process.send_signal(signal.SIGINT)
        except psutil.NoSuchProcess:
            raise TaelError("the run's process has ended") from None
        except psutil.AccessDenied:
            raise TaelError("the run's process belongs to another user; it cannot be stopped from here") from None


def launch(directory: Path, recipe: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    """Begin `tael run RECIPE` in `directory`, in a session of its own; raises TaelError when that cannot be."""
    command = [sys.executable, "-m", "tael", "run", str(recipe), "--run-dir", str(directory)]
    for override in overrides:
        command += ["--set", override]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / OUTPUT).open("ab") as output:
            output.write(f"$ tael run {recipe.name} {' '.join(overrides)}".rstrip().encode() + b"\n")
            output.flush()
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "100"},
            )
        record = Process(child.pid, _began(child.pid), recipe.name, overrides)
        write_whole(directory / PROCESS, json.dumps(asdict(record)))
    except OSError as error:
        raise TaelError(f"{directory.name}: cannot be started: {error.strerror or error}") from None
    return child


def _began(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:  # ended at once
        return time.time()


def read_process(directory: Path) -> Process | None:
    """What process.json says; None when it is not there or says nothing that makes sense."""
    try:
        value = json.loads((directory / PROCESS).read_text(encoding="utf-8"))
        process = Process(value["pid"], float(value["started"]), str(value["recipe"]), list(value["overrides"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    texts = all(isinstance(override, str) for override in process.overrides)
    return process if type(process.pid) is int and process.pid > 0 and texts else None


def is_locked(directory: Path) -> bool:
    """Whether a `tael run` is at work there, wherever it was started."""
    path = directory / LOCK
    try:
        found = path.stat()
    except OSError:
        return False
    if _LOCKS.exists():  # looked up, not tried: a try could meet, and refuse, a run that is just starting
        place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
        with contextlib.suppress(OSError):
            lines = (line.split() for line in _LOCKS.read_text().splitlines())
            return any("FLOCK" in words and place in words for words in lines)
    with contextlib.suppress(OSError), path.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def output_tail(directory: Path, lines: int = 200) -> list[str]:
    """The last lines of what the run's process has said; control characters are left out."""
    try:
        with (directory / OUTPUT).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [_ESCAPES.sub("", line) for line in text.splitlines()[-lines:]]


def last_words(directory: Path) -> tuple[bool, str]:
    """(whether it failed, why) of a process that has ended before the run was finished."""
    said = [line for line in output_tail(directory) if line.strip()]
    last = said[-1].strip() if said else ""
    if last.startswith("tael: stopped"):
        return False, last.removeprefix("tael: ")
    if last.startswith("tael: "):
        return True, last.removeprefix("tael: ")
    if any(line.startswith("Traceback ") for line in said):
        return True, last
    return True, "ended without a word: killed, out of memory, or the machine went down; resuming goes on"
