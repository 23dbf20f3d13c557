"""The server's life: bind, load, serve, and stop so that nobody loses an answer.

The first Ctrl-C or SIGTERM lets running answers finish, for `grace` seconds; then they are returned as they are. The
second one ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from tael.errors import TaelError
from tael.serve.app import make_app
from tael.serve.journal import Journal
from tael.serve.models import Loader
from tael.serve.service import Service
from tael.serve.settings import ServeSettings
from tael.serve.store import FILE, Store, default_state

FLUSH = 0.3
"""Seconds for last bytes to leave after the last answer has ended."""


class Server(uvicorn.Server):
    """uvicorn, stopping as the module says."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self._loop = service, asyncio.get_running_loop()
        self._ending: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving; unlike uvicorn's, they are not raised again at the end, which would cut
        short what comes after."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._service.stopping:
            self.force_exit = True
        self._service.begin_stop()
        self._loop.call_soon_threadsafe(self._begin)
        super().handle_exit(sig, frame)

    def stop(self) -> None:
        """As a first signal would; from the event loop."""
        self._service.begin_stop()
        self._begin()
        self.should_exit = True

    def _begin(self) -> None:
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        await self._service.finish()
        while self._service.visits:
            await asyncio.sleep(0.02)
        await asyncio.sleep(FLUSH)
        self.force_exit = True  # pages hold their connections open for ever


def state_directory(settings: ServeSettings) -> Path:
    return settings.state or default_state()


def open_service(settings: ServeSettings, loader: Loader | None = None, journal: Journal | None = None) -> Service:
    """A service over the state directory. Raises TaelError; refuses to be reached from elsewhere without a key."""
    store = Store(state_directory(settings) / FILE)
    if not settings.is_local and not store.any_keys():
        store.close()
        raise TaelError(
            f"--host {settings.host}: others could reach this server, and there is no key yet; make one with "
            "`tael keys add NAME`"
        )
    try:
        return Service(settings, store, loader, journal)
    except TaelError:  # of its price list
        store.close()
        raise


def bind(settings: ServeSettings) -> socket.socket:
    """The listening socket. Raises TaelError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TaelError(f"{settings.host} port {settings.port}: {reason}; choose another with --port") from None


def _add_pages(app: FastAPI, service: Service) -> None:
    from tael.serve.history import History  # NiceGUI takes a second to import
    from tael.serve.pages import add_pages
    from tael.serve.pages.answering import Answering
    from tael.serve.runs import RunBook

    settings = service.settings
    state = state_directory(settings)
    history = History(state / "conversations.sqlite")
    runbook = RunBook(settings.runs, settings.recipes)
    authenticate, required = service.authenticate, service.keys_required
    add_pages(app, service, history, Answering(service, history), runbook, authenticate, required, state)


async def serve(
    settings: ServeSettings,
    loader: Loader | None = None,
    journal: Journal | None = None,
    started: Callable[[Service, Server, int], None] = lambda service, server, port: None,
) -> None:
    """Serve until a signal comes. `started` is told once the port is open."""
    sock = bind(settings)
    try:
        service = open_service(settings, loader, journal)
    except BaseException:
        sock.close()
        raise
    try:
        app = make_app(service)
        if settings.pages:
            _add_pages(app, service)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=int(settings.grace) + 5,
            ws_ping_interval=20,
            server_header=False,
        )
        server = Server(config, service)
        started(service, server, sock.getsockname()[1])
        await server.serve(sockets=[sock])
    finally:
        await service.close()
        sock.close()
