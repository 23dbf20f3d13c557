"""A real server in a thread, for tests that speak to it as clients do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tael.serve import models
from tael.serve.journal import Journal
from tael.serve.running import Server, serve
from tael.serve.service import Service
from tael.serve.settings import ModelSpec, ServeSettings

DEADLINE = 30.0


@dataclass
class Running:
    """A server that is up."""

    service: Service
    server: Server
    port: int
    thread: threading.Thread
    failures: list[BaseException] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    def on_loop(self, work: Callable[[], Any]) -> None:
        """Run `work` on the server's event loop."""
        self.server._loop.call_soon_threadsafe(work)

    def stop(self) -> None:
        self.on_loop(self.server.stop)
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive(), "the server does not stop"


@contextmanager
def running(
    state: Path, specs: list[ModelSpec], loader: models.Loader, journal: Any = None, **options: Any
) -> Iterator[Running]:
    """Serve `specs` on a free port until the block ends."""
    defaults: dict[str, Any] = {"port": 0, "pages": False, "grace": 5.0}
    settings = ServeSettings(state=state, models=tuple(specs), **(defaults | options))
    up, box, failures = threading.Event(), [], []

    def started(service: Service, server: Server, port: int) -> None:
        box.append((service, server, port))
        up.set()

    def work() -> None:
        try:
            asyncio.run(serve(settings, loader, Journal(journal), started))
        except BaseException as error:
            failures.append(error)
        finally:
            up.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert up.wait(DEADLINE)
    if not box:
        raise failures[0]
    found = Running(*box[0], thread, failures)
    try:
        yield found
    finally:
        if thread.is_alive():
            found.stop()
    assert not failures, failures
