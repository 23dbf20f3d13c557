"""Checkpoints of the hub, against a small hub of our own: fetched, resumed, refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tael.errors import TaelError
from tael.weights import hub, store
from tael.weights.catalogue import CHECKPOINTS, Checkpoint, HubOrigin

REVISION = "ad9f0ae0864d7fbcd1cd905e3c6c5b069cc8b562"
REPOSITORY = "somebody/a-model"
NAMED = Checkpoint("a-model", "a model", "MIT", "somebody", 1000, 2000, HubOrigin(REPOSITORY, REVISION))


class FakeHub:
    """A repository at one revision: its listing, and its files with ranges."""

    def __init__(self) -> None:
        weights = bytes(range(256)) * 4096
        self.files = {
            "config.json": b'{"model_type": "llama"}',
            "model-00001-of-00002.safetensors": weights,
            "model-00002-of-00002.safetensors": weights[::-1],
            "tokenizer.json": b"{}" * 50,
            "LICENSE": b"MIT",
            "modeling_evil.py": b"import os",
            "pytorch_model.bin": b"\x80\x04pickle",
            "original/consolidated.safetensors": b"other",
            ".gitattributes": b"*",
        }
        self.listed: dict[str, bytes] = dict(self.files)
        """What the checksums are made of."""
        self.sha = REVISION
        self.stop_after: int | None = None
        """Break the connection after this many bytes of a file."""
        self.requests: list[tuple[str, str | None]] = []
        self.status = 200

    def listing(self) -> dict:
        siblings = []
        for name, content in self.listed.items():
            row: dict = {"rfilename": name, "size": len(content), "blobId": git_blob(content)}
            if name.endswith((".safetensors", ".bin")):
                row["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            siblings.append(row)
        return {"id": REPOSITORY, "modelId": REPOSITORY, "sha": self.sha, "siblings": siblings, "tags": []}


def git_blob(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> FakeHub:
        return self.server.hub  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        self.hub.requests.append((self.path, self.headers.get("Range")))
        if self.hub.status != 200:
            self.answer(
                self.hub.status, b"{}", ("X-Error-Code", "EntryNotFound" if self.hub.status == 404 else "Other")
            )
        elif self.path.startswith(f"/api/models/{REPOSITORY}/revision/{REVISION}"):
            self.answer(200, json.dumps(self.hub.listing()).encode())
        elif (match := re.fullmatch(rf"/{REPOSITORY}/resolve/{REVISION}/(.+)", self.path)) is None:
            self.answer(404, b"{}")
        elif match[1] in self.hub.files:
            self.send_file(self.hub.files[match[1]])
        else:
            self.answer(404, b"{}")

    def answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        part = content[start:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        stop = self.hub.stop_after
        if stop is not None and len(part) > stop:
            self.wfile.write(part[:stop])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(part)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def remote() -> Iterator[tuple[FakeHub, str]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = FakeHub()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub, f"http://localhost:{server.server_port}"  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TAEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(CHECKPOINTS, NAMED.name, NAMED)
    # The retries of huggingface_hub wait a second each.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    return tmp_path / "cache"


def test_fetched_checked_and_published(remote, cache):
    there, endpoint = remote
    lines: list[str] = []
    asked: list[str] = []
    folder = store.pull("a-model", lines.append, lambda needs: asked.append(needs) or True, endpoint)
    names = {
        "config.json",
        "tokenizer.json",
        "LICENSE",
        *(n for n in there.files if re.match(r"model-.*safetensors", n)),
    }
    assert {path.name for path in folder.iterdir()} == names | {"manifest.json"}
    assert all((folder / name).read_bytes() == there.files[name] for name in names)
    assert "0.00B parameters; 0.0 GB on disk; in memory 0.0 GB in bf16" in asked[0]
    assert lines and lines[-1].startswith("fetching a-model: 0.00 of 0.00 GB")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["revision"] == REVISION and set(manifest["files"]) == names
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert store.resolve("a-model") == folder and store.is_pulled(NAMED)
    before = len(there.requests)
    assert store.pull("a-model", endpoint=endpoint) == folder and len(there.requests) == before


def test_nothing_is_fetched_when_the_user_says_no(remote, cache):
    there, endpoint = remote
    with pytest.raises(TaelError, match="nothing was fetched"):
        store.pull("a-model", agree=lambda needs: False, endpoint=endpoint)
    assert len(there.requests) == 1 and not list(cache.rglob("*.safetensors"))


def test_an_interrupted_fetch_goes_on_where_it_stopped(remote, cache):
    there, endpoint = remote

    class Interrupt(Exception): ...

    def stop(line: str) -> None:
        if "00002-of" in line:
            raise Interrupt

    with pytest.raises(Interrupt):
        store.pull("a-model", stop, endpoint=endpoint)
    [part] = [path for path in (cache / "models").iterdir() if path.name.startswith(".part-")]
    whole, begun = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert (part / whole).read_bytes() == there.files[whole] and not store.is_pulled(NAMED)
    (part / begun).write_bytes(there.files[begun][:1000])
    there.requests.clear()
    folder = store.pull("a-model", endpoint=endpoint)
    assert (f"/{REPOSITORY}/resolve/{REVISION}/{begun}", "bytes=1000-") in there.requests
    assert not any(whole in path for path, _ in there.requests)
    assert (folder / begun).read_bytes() == there.files[begun]


def test_a_broken_connection_is_taken_up_again(remote, monkeypatch, capfd):
    there, endpoint = remote
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)
    there.stop_after = 300_000
    folder = store.pull("a-model", endpoint=endpoint)
    begun = "model-00002-of-00002.safetensors"
    assert (folder / begun).read_bytes() == there.files[begun]
    assert [asked for path, asked in there.requests if begun in path][1] == "bytes=300000-"
    assert capfd.readouterr() == ("", "")


def test_a_server_that_ignores_ranges(remote, cache, monkeypatch):
    there, endpoint = remote
    monkeypatch.setattr(Handler, "send_file", lambda self, content: self.answer(200, content))
    name = "model-00001-of-00002.safetensors"
    part = hub._part_dir(NAMED)
    part.mkdir(parents=True)
    (part / name).write_bytes(there.files[name][:1000])
    assert (store.pull("a-model", endpoint=endpoint) / name).read_bytes() == there.files[name]


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json"])
def test_a_wrong_checksum_is_refused(remote, cache, name):
    there, endpoint = remote
    right = there.files[name]
    there.files[name] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(TaelError, match=rf"{name} is not the file the hub's listing names"):
        store.pull("a-model", endpoint=endpoint)
    assert not store.is_pulled(NAMED) and not (hub._part_dir(NAMED) / name).exists()
    there.files[name] = right
    assert (store.pull("a-model", endpoint=endpoint) / name).read_bytes() == right


def test_a_longer_leftover_is_thrown_away(remote):
    there, endpoint = remote
    part = hub._part_dir(NAMED)
    part.mkdir(parents=True)
    (part / "config.json").write_bytes(b"x" * 1000)
    assert (store.pull("a-model", endpoint=endpoint) / "config.json").read_bytes() == there.files["config.json"]


def test_another_revision_is_refused(remote, cache):
    there, endpoint = remote
    there.sha = "0" * 40
    with pytest.raises(TaelError, match="answers with revision 000000000000 where ad9f0ae0864d was asked for"):
        store.pull("a-model", endpoint=endpoint)


def test_a_repository_without_safetensors(remote, cache):
    there, endpoint = remote
    there.listed = {"pytorch_model.bin": b"x", "config.json": b"{}", "../evil.safetensors": b"x"}
    with pytest.raises(TaelError, match="holds no safetensors"):
        store.pull("a-model", endpoint=endpoint)


def test_no_network_is_one_line(cache, monkeypatch):
    with pytest.raises(TaelError, match="a-model: the Hugging Face hub is out of reach") as caught:
        store.pull("a-model", endpoint="http://localhost:9")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TaelError, match=r"HF_HUB_OFFLINE is set|out of reach"):
        store.pull("a-model", endpoint="http://localhost:9")


def test_the_network_that_goes_away(remote, cache):
    there, endpoint = remote
    listing = hub.list_files(NAMED, endpoint)
    there.status = 500
    with pytest.raises(TaelError, match="out of reach; what is fetched stays"):
        hub.fetch_hub(listing, endpoint=endpoint)
    there.status = 404
    with pytest.raises(TaelError, match="the hub does not have somebody/a-model@ad9f0ae0864d"):
        hub.fetch_hub(listing, endpoint=endpoint)


def test_too_little_disk(remote, cache, monkeypatch):
    there, endpoint = remote
    usage = shutil.disk_usage("/")._replace(free=hub._RESERVE_BYTES)
    monkeypatch.setattr("tael.weights.hub.shutil.disk_usage", lambda path: usage)
    with pytest.raises(TaelError, match=r"needs 1\.1 GB under .*, where 1\.1 GB are free; .*TAEL_CACHE"):
        store.pull("a-model", agree=lambda needs: pytest.fail("asked"), endpoint=endpoint)
    assert len(there.requests) == 1


def test_a_damaged_folder_is_fetched_again(remote, cache):
    _, endpoint = remote
    folder = store.pull("a-model", endpoint=endpoint)
    (folder / "tokenizer.json").write_bytes(b"")
    assert not store.is_pulled(NAMED)
    with pytest.raises(TaelError, match="is not on this machine yet; fetch it with `tael pull a-model`"):
        store.resolve("a-model")
    assert store.pull("a-model", endpoint=endpoint) == folder and store.is_pulled(NAMED)
