"""Ctrl-C, SIGTERM and kill -9 in the middle of anything: the same command ends at the same bits."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

SCRIPT = Path(__file__).with_name("train_tiny.py")
STEPS = 12
CLOCK = ("seconds", "tokens_per_second")


def start(directory: Path, *options: str) -> subprocess.Popen[str]:
    directory.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), str(directory), str(STEPS), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], line: str, times: int = 1) -> None:
    """Read the process's output up to the `times`-th line that is `line`."""
    assert process.stdout is not None
    for found in process.stdout:
        times -= found.strip() == line
        if not times:
            return
    raise AssertionError(f"ended without {line!r}: {process.communicate()[1]}")


def finish(directory: Path) -> None:
    _, errors = (process := start(directory)).communicate(timeout=60)
    assert process.returncode == 0, errors


def fingerprint(directory: Path) -> tuple[dict[str, str], list[dict], dict]:
    """Newest checkpoint's tensors, the metrics and the state, without the clock's part.

    The tensors, not the file: safetensors writes them in an order of its own.
    """
    newest = max(directory.glob("step-*"))
    tensors: dict[str, Tensor] = {n: t for p in newest.glob("*.safetensors") for n, t in load_file(p).items()}
    digests = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    read = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if k not in CLOCK} for line in read]
    state = json.loads((newest / "state.json").read_text())
    return digests, metrics, {k: v for k, v in state.items() if "seconds" not in k}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[dict], dict]:
    directory = tmp_path_factory.mktemp("whole")
    finish(directory)
    found = fingerprint(directory)
    assert found[2]["steps"] == STEPS and len(found[1]) == STEPS + 1
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop(tmp_path: Path, whole, number: signal.Signals) -> None:
    """The step in hand is finished and saved, the exit says how to go on."""
    process = start(tmp_path / "run")
    wait_for(process, "step 4")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    last = output.strip().splitlines()[-1]
    assert last.startswith("stopped at step ") and last.endswith("the same command goes on from there")
    assert sorted((tmp_path / "run").glob("step-*"))[-1].name == f"step-{int(last.split()[3]):06d}"
    finish(tmp_path / "run")
    assert fingerprint(tmp_path / "run") == whole


@pytest.mark.parametrize("line", ["saving", "syncing"])
def test_killed_while_saving(tmp_path: Path, whole, line: str) -> None:
    """kill -9 with the second checkpoint half written: it is not there at all, the first one is."""
    process = start(tmp_path / "run", "1.0")
    wait_for(process, line, times=2 if line == "saving" else 7)
    process.kill()
    process.wait()
    names = sorted(p.name for p in (tmp_path / "run").iterdir() if "step" in p.name)
    assert names == [".step-000006.partial", "step-000003"]
    finish(tmp_path / "run")
    assert fingerprint(tmp_path / "run") == whole
    assert not list((tmp_path / "run").glob(".step*"))


def test_killed_at_random_moments(tmp_path: Path, whole) -> None:
    """kill -9 again and again, wherever it hits, until the run is through."""
    generator = random.Random(7)
    process = start(tmp_path / "run", "0.02")
    for _ in range(4):
        wait_for(process, "ready")
        time.sleep(generator.random() * 0.4)
        process.kill()
        process.wait()
        process = start(tmp_path / "run", "0.02")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert fingerprint(tmp_path / "run") == whole
