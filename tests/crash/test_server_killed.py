"""kill -9 of a server in mid-answer: keys, the table of what was served, and conversations are whole at restart."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from tael.serve.history import History
from tael.serve.store import FILE, Store

SERVER = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from scripted import loader, scripted_model
from tael.serve.running import serve
from tael.serve.settings import ModelSpec, ServeSettings
model = scripted_model(lambda prompt: " ".join(map(str, range(300))) if "count" in prompt else "Hello.", context=4096)
settings = ServeSettings(port=0, state=Path(sys.argv[1]), models=(ModelSpec(name="tiny", model="m", context=4096),))
asyncio.run(serve(settings, loader({"m": model}), started=lambda service, server, port: print(port, flush=True)))
"""


@pytest.mark.parametrize("after", [1, 7, 20])
def test_killed_in_mid_answer(tmp_path: Path, after: int) -> None:
    """Clients stream while the process dies; what they saw finished is written down, and the files open."""
    store = Store(tmp_path / FILE)
    key, secret = store.add_key("anna")
    store.close()
    history = History(tmp_path / "conversations.sqlite")
    head = history.create("local", "tiny", "kept")
    question = history.add("local", head.id, None, "user", "Hi")
    history.add("local", head.id, question.id, "assistant", "Half an ans", state="running")
    history.close()
    api = Path(__file__).parents[1] / "api"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_CURRENT_TEST", None)  # NiceGUI would take itself to be under test
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path), str(api)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    url = f"http://localhost:{process.stdout.readline().strip()}"
    finished: list[str] = []
    enough = threading.Event()

    def client(text: str) -> None:
        try:
            while True:
                body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "stream": True}
                headers = {"authorization": f"Bearer {secret}"}
                with httpx.stream(
                    "POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60
                ) as found:
                    name = ""
                    for line in found.iter_lines():
                        if line == "data: [DONE]":
                            finished.append(name)
                            if len(finished) >= after:
                                enough.set()
                        elif line.startswith("data: "):
                            name = json.loads(line[6:])["id"]
        except httpx.HTTPError:
            enough.set()

    clients = [threading.Thread(target=client, args=(text,)) for text in ("Hi", "count", "Hi again")]
    for each in clients:
        each.start()
    assert enough.wait(60)
    process.send_signal(signal.SIGKILL)
    for each in clients:
        each.join(60)
    assert process.wait(60) == -signal.SIGKILL and len(finished) >= after

    with sqlite3.connect(tmp_path / FILE) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        rows = {row[0] for row in connection.execute("SELECT request_id FROM served WHERE status = 200")}
    assert set(finished) <= rows
    store = Store(tmp_path / FILE)
    assert store.find(secret) == key and store.spent(key.id) > 0
    store.close()
    history = History(tmp_path / "conversations.sqlite")
    states = [(node.content, node.state) for node in history.nodes("local", head.id)]
    assert states == [("Hi", "done"), ("Half an ans", "interrupted")]  # marked so when the server started
    history.close()
