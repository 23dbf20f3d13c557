"""Checkpoints from the Hugging Face hub: listed, weighed against the disk, fetched with resume, checked, published.

Only weights in safetensors, JSON and tokenizer files are fetched: no code, no pickles. Files grow in a `.part` folder
of the cache, so that an interrupted fetch goes on where it stopped; each is held against the hub's sha256 (Git LFS)
or blob id (small files). The folder takes its place by one rename, with a manifest of what it holds.

`huggingface_hub.hf_hub_download` throws a partial file away when it is stopped (2.4 does), so that a file of many
gigabytes would start over: its listing and its http_get are used, and the file is ours.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tael.data.fetch import Progress, cache_dir
from tael.errors import TaelError
from tael.files import sha256_of, sync, write_whole
from tael.weights.catalogue import Checkpoint, HubOrigin

WANTED = ("*.safetensors", "*.json", "tokenizer.model", "tiktoken.model", "*.jinja", "LICENSE*")
MANIFEST = "manifest.json"
_RESERVE_BYTES = 1 << 30
"""Disk that stays free whatever is fetched."""
_SECONDS_BETWEEN_WORDS = 1.0


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as the hub describes it: `sha256` for large files, else git's `blob` id."""

    name: str
    size: int
    sha256: str | None
    blob: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """What a fetch will bring."""

    checkpoint: Checkpoint
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def hub_dir(checkpoint: Checkpoint) -> Path:
    """Where the checkpoint's folder is once it is fetched."""
    return cache_dir() / "models" / f"{checkpoint.name}-{_origin(checkpoint).revision[:12]}"


def is_pulled(folder: Path) -> bool:
    """Whether the folder was published whole and its files still have their sizes."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(files) and all((folder / name).stat().st_size == known["size"] for name, known in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def list_files(checkpoint: Checkpoint, endpoint: str | None = None) -> Listing:
    """Ask the hub what the pinned revision holds.

    Raises TaelError when the hub is out of reach, does not know the revision, or the revision holds no safetensors.
    """
    from huggingface_hub import HfApi

    origin = _origin(checkpoint)
    with _hub_errors(checkpoint):
        info = HfApi(endpoint=endpoint).model_info(origin.repository, revision=origin.revision, files_metadata=True)
    if info.sha != origin.revision:
        raise TaelError(
            f"{checkpoint.name}: the hub answers with revision {str(info.sha)[:12]} where {origin.revision[:12]} was "
            "asked for; nothing was fetched"
        )
    files = tuple(_described(checkpoint, sibling) for sibling in info.siblings or [] if _wanted(sibling.rfilename))
    if not any(file.name.endswith(".safetensors") for file in files):
        raise TaelError(f"{checkpoint.name}: {origin.repository} holds no safetensors at this revision")
    return Listing(checkpoint, files)


def check_disk(listing: Listing) -> None:
    """Raise TaelError unless what is still to fetch fits the disk, with a gigabyte to spare."""
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    part = _part_dir(listing.checkpoint)
    there = sum(path.stat().st_size for path in part.glob("*") if path.is_file()) if part.is_dir() else 0
    needed, free = max(listing.size - there, 0) + _RESERVE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise TaelError(
            f"{listing.checkpoint.name}: needs {needed / 1e9:.1f} GB under {folder}, where {free / 1e9:.1f} GB are "
            "free; free some, or set TAEL_CACHE to a folder on another disk"
        )


def fetch_hub(listing: Listing, progress: Progress | None = None, endpoint: str | None = None) -> Path:
    """Fetch, check and publish the files of `listing`; the folder.

    What an earlier call left behind is gone on with. Raises TaelError when the hub is out of reach, a file is not
    what the hub's listing says (it is removed), or the disk is full.
    """
    folder, part = hub_dir(listing.checkpoint), _part_dir(listing.checkpoint)
    if is_pulled(folder):
        return folder
    check_disk(listing)
    part.mkdir(parents=True, exist_ok=True)
    known: dict[str, dict[str, Any]] = {}
    done = 0
    for file in listing.files:
        say = _Said(progress, listing, file, done)
        digest = _fetch_file(listing.checkpoint, file, part / file.name, say, endpoint)
        known[file.name] = {"size": file.size, "sha256": digest}
        done += file.size
    origin = _origin(listing.checkpoint)
    manifest = {"repository": origin.repository, "revision": origin.revision, "files": known}
    write_whole(part / MANIFEST, json.dumps(manifest, indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    sync(folder.parent)
    return folder


# --------------------------------------------------------------------- helpers


def _origin(checkpoint: Checkpoint) -> HubOrigin:
    if not isinstance(checkpoint.origin, HubOrigin):
        raise TypeError(f"{checkpoint.name} does not come from the hub")
    return checkpoint.origin


def _part_dir(checkpoint: Checkpoint) -> Path:
    folder = hub_dir(checkpoint)
    return folder.with_name(f".part-{folder.name}")


def _wanted(name: str) -> bool:
    """Files of the repository's top folder that Tael reads; a name with a path in it is never one."""
    return (
        Path(name).name == name
        and not name.startswith(".")
        and name != MANIFEST
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in WANTED)
    )


def _described(checkpoint: Checkpoint, sibling: Any) -> RemoteFile:
    sha256 = getattr(sibling.lfs, "sha256", None) if sibling.lfs else None
    if not isinstance(sibling.size, int) or not (sha256 or sibling.blob_id):
        raise TaelError(f"{checkpoint.name}: the hub gives no size or checksum for '{sibling.rfilename}'")
    return RemoteFile(sibling.rfilename, sibling.size, sha256, sibling.blob_id)


def _fetch_file(checkpoint: Checkpoint, file: RemoteFile, path: Path, say: _Said, endpoint: str | None) -> str:
    """Bring `path` to its full size and check it; its sha256."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    origin = _origin(checkpoint)
    have = path.stat().st_size if path.is_file() else 0
    if have > file.size:
        path.unlink()
        have = 0
    if have < file.size or not path.exists():
        url = hf_hub_url(origin.repository, file.name, revision=origin.revision, endpoint=endpoint)
        with _hub_errors(checkpoint), path.open("ab") as out:
            http_get(
                url,
                _Watched(out, say, have),  # type: ignore[arg-type]  as much of a file as http_get asks for
                resume_size=have,
                headers=build_hf_headers(),
                expected_size=file.size,
                tqdm_class=_silent_bar(),
            )
        sync(path)
    digest = sha256_of(path)
    if not _matches(file, path, digest):
        path.unlink()
        raise TaelError(
            f"{checkpoint.name}: {file.name} is not the file the hub's listing names (its checksum differs); it was "
            "removed, the same command fetches it again"
        )
    return digest


def _matches(file: RemoteFile, path: Path, digest: str) -> bool:
    if path.stat().st_size != file.size:
        return False
    if file.sha256 is not None:
        return digest == file.sha256
    content = path.read_bytes()  # small: large files are in LFS
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest() == file.blob


class _Said:
    """Tells `progress` how far the fetch is, at most once a second."""

    def __init__(self, progress: Progress | None, listing: Listing, file: RemoteFile, done: int) -> None:
        self.progress, self.listing, self.file, self.done = progress, listing, file, done
        self.last = 0.0

    def __call__(self, size: int) -> None:
        now = time.monotonic()
        if self.progress is not None and (now - self.last > _SECONDS_BETWEEN_WORDS or size == self.file.size):
            self.last = now
            total = f"{(self.done + size) / 1e9:.2f} of {self.listing.size / 1e9:.2f} GB"
            self.progress(f"fetching {self.listing.checkpoint.name}: {total} ({self.file.name})")


class _Watched:
    """A file that counts what is written."""

    def __init__(self, out: BinaryIO, say: Callable[[int], None], size: int) -> None:
        self.out, self.say, self.size = out, say, size

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.say(self.size)
        return self.out.write(data)

    def truncate(self, size: int | None = None) -> int:
        self.size = self.out.tell() if size is None else size
        return self.out.truncate(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.out, name)


def _silent_bar() -> type:
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent


@contextlib.contextmanager
def _hub_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Everything that goes wrong between here and the hub, in a line; huggingface_hub's own words are left out."""
    from huggingface_hub import errors

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except errors.GatedRepoError:
        raise TaelError(
            f"{checkpoint.name}: its authors ask for consent; give it on the hub, then set HF_TOKEN"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError):
        raise TaelError(f"{checkpoint.name}: the hub does not have {checkpoint.pin}") from None
    except errors.OfflineModeIsEnabled:
        raise TaelError(f"{checkpoint.name}: HF_HUB_OFFLINE is set; unset it to fetch") from None
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError):
            raise  # the disk: full, or not to be written
        raise _out_of_reach(checkpoint, error) from None
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3", "huggingface_hub")):
            raise
        raise _out_of_reach(checkpoint, error) from None
    finally:
        logger.setLevel(level)


def _out_of_reach(checkpoint: Checkpoint, error: Exception) -> TaelError:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return TaelError(
        f"{checkpoint.name}: the Hugging Face hub is out of reach; what is fetched stays, the same command goes on "
        f"from there ({said})"
    )
