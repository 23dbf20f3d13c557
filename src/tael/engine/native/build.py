"""Compile the C++ operator at first use, through torch's extension loader, and keep it in the cache.

The library is kept under a name made of its sources, the compiler, torch and the processor's features, so that
another machine or version compiles anew. It is built in a folder of its own and renamed into place: a killed build
leaves nothing that a later one could trip over.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from tael.data.fetch import cache_dir
from tael.errors import TaelError

NAME = "tael_operator"
SOURCES = ("operator.cpp", "binding.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fno-math-errno", "-ffp-contract=off")
"""Contraction is off so that only the fused multiply-adds written down are fused: results do not hang on the
compiler."""

NEEDED = ("avx2", "fma", "f16c")
_FOLDER = Path(__file__).parent


def processor_features() -> frozenset[str]:
    """Flags of the processor as Linux lists them; empty elsewhere."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def obstacle() -> str | None:
    """Why the operator cannot be built here, in words that follow 'the C++ operator needs'; None when it can."""
    if platform.machine() not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"):
        return "an x86-64 processor under Linux"
    if missing := [name for name in NEEDED if name not in processor_features()]:
        return f"a processor with {', '.join(missing)}"
    if not shutil.which(_compiler()):
        return f"a C++ compiler ('{_compiler()}' is not there; on Debian: apt install g++)"
    return None


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.split("\n")[0]


@functools.lru_cache(maxsize=1)
def _key() -> str:
    digest = hashlib.sha256()
    for path in sorted([*_FOLDER.glob("*.h"), *_FOLDER.glob("*.cpp")]):
        digest.update(path.name.encode() + path.read_bytes())
    for part in (_version(_compiler()), torch.__version__, sys.version, *FLAGS, *sorted(processor_features())):
        digest.update(str(part).encode() + b"\0")
    return digest.hexdigest()[:16]


def _library() -> Path:
    return cache_dir() / "native" / f"{NAME}-{_key()}.so"


def is_built() -> bool:
    """Whether the operator can be had without compiling it first."""
    return obstacle() is None and _library().is_file()


def load_operator(notify: Callable[[str], None] | None = None) -> ModuleType:
    """The compiled module; compiled first (about a minute, `notify` is told so) where it is not in the cache.

    Raises TaelError in one line when it cannot be built here.
    """
    if found := obstacle():
        raise TaelError(f"the C++ operator needs {found}; without it the engine runs on torch (backend = 'torch')")
    if notify and not _library().is_file():
        notify("compiling the C++ operator (once, about a minute)")
    return _load()


@functools.lru_cache(maxsize=1)
def _load() -> ModuleType:
    library = _library()
    if not library.is_file():
        _build(library)
    return _import(library)


def _import(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, library)
    if spec is None or spec.loader is None:
        raise TaelError(f"{library}: cannot be loaded; delete it to have it compiled again")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise TaelError(f"{library}: cannot be loaded ({error}); delete it to have it compiled again") from None
    return module


def _build(library: Path) -> None:
    from torch.utils import cpp_extension

    # ninja is a Python package: its program lies beside the interpreter, which need not be on the path.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as part:
            cpp_extension.load(
                NAME,
                [str(_FOLDER / name) for name in SOURCES],
                extra_cflags=list(FLAGS),
                build_directory=part,
                is_python_module=False,
                is_standalone=False,
                with_cuda=False,
            )
            Path(part, f"{NAME}.so").replace(library)
    except OSError as error:
        raise TaelError(f"{library.parent}: cannot keep the operator there ({error}); set TAEL_CACHE") from None
    except (RuntimeError, subprocess.CalledProcessError) as error:
        lines = [line for line in str(error).splitlines() if "error" in line.lower()] or str(error).splitlines()
        said = lines[0].strip()[:200] if lines else "no reason given"
        raise TaelError(f"the C++ operator did not compile ({said}); the engine runs on torch without it") from None
