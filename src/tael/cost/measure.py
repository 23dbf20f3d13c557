"""What this machine can do, measured: matrix FLOP/s, memory bandwidth, and the peak memory of this process.

Utilisation is reported against `matrix_peak`, not against a data sheet: a matrix product of fixed size is the
most this machine gave on the day, so the figure compares like with like on a shared or throttled host.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch

BUDGET_SECONDS = 0.7
REPETITIONS = 8


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Shortest time of one call, over up to REPETITIONS calls within BUDGET_SECONDS (at least one)."""
    best, began = float("inf"), time.perf_counter()
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now - began > BUDGET_SECONDS:
            break
    return best


def _noise(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def matrix_peak(device: str | torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, n = 1024 on a CPU and 8192 elsewhere: 2 n^3 over the best time.

    The clock reads real time, so the result varies by a few per cent; call it once a run and keep the number.
    """
    device = torch.device(device)
    size = 1024 if device.type == "cpu" else 8192
    left = _noise((size, size), device, dtype)
    right = _noise((size, size), device, dtype)
    with torch.no_grad():
        small = left[:128, :128].contiguous()
        _best_seconds(lambda: small @ small, device)  # start threads and libraries
        return 2.0 * size**3 / _best_seconds(lambda: left @ right, device)


def read_bandwidth(device: str | torch.device = "cpu") -> float:
    """Bytes a second read from memory by a sum over 128 MiB on a CPU and 1 GiB elsewhere (larger than caches)."""
    device = torch.device(device)
    count = (128 if device.type == "cpu" else 1024) * 2**20 // 4
    values = torch.ones(count, dtype=torch.float32, device=device)
    with torch.no_grad():
        return 4.0 * count / _best_seconds(values.sum, device)


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, or since `reset_peak_memory` where the system has that.

    Linux gives VmHWM (ru_maxrss never falls and is inherited over exec, so it serves only where /proc is
    missing); Windows gives the peak working set; any other system getrusage.
    """
    if sys.platform == "win32":
        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_memory() -> None:
    """Have malloc return to the system what is free in its heap, which glibc otherwise keeps; elsewhere nothing."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # no such library or function here
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory() -> bool:
    """Let `peak_memory_bytes` count from now on, for one stage; False where the system cannot (not Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
