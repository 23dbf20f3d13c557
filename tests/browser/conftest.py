"""A browser and servers of pages for tests.

Every page that a test opens is watched: a request to another host, an error in the console or a failed script fails
the test. A test waits for what it expects to see, never for time to pass.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

HERE = Path(__file__).parent
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 15_000
playwright_api.expect.set_options(timeout=PATIENCE_MS)


@dataclass
class Server:
    """A server as a process of its own, which says {"port": ..} on its first line."""

    base: str
    process: subprocess.Popen[str]

    def open(self, gate: str) -> None:
        """Let the scripted model go on that waits at this gate."""
        httpx.post(f"{self.base}/control/open/{gate}").raise_for_status()

    def bodies(self) -> list[dict[str, Any]]:
        """The requests that the scripted model got."""
        return httpx.get(f"{self.base}/control/bodies").json()


@contextlib.contextmanager
def serving(program: str, *arguments: str) -> Iterator[Server]:
    """Run `program`, a file beside this one, until the end of the block."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_CURRENT_TEST", None)  # NiceGUI would take itself to be under test
    command = [sys.executable, str(HERE / program), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"{program} did not start"
        yield Server(f"http://localhost:{json.loads(line)['port']}", process)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@dataclass
class Watched:
    """What must not happen on any page."""

    problems: list[str] = field(default_factory=list)

    def watch(self, context: Any, base: str) -> None:
        host = urlsplit(base).netloc

        def route(route: Any) -> None:
            if urlsplit(route.request.url).netloc == host or route.request.url.startswith(("data:", "blob:")):
                route.continue_()
            else:
                self.problems.append(f"asked another host: {route.request.url}")
                route.abort()

        context.route("**", route)
        context.on("page", self._page)

    def _page(self, page: Any) -> None:
        page.on("console", lambda m: self.problems.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    with playwright_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def contexts(browser: Any) -> Iterator[Callable[..., Any]]:
    """Make a browser of one person's, for pages of a server: contexts(server.base, viewport=..)."""
    made: list[Any] = []
    watched = Watched()

    def make(base: str, **options: Any) -> Any:
        context = browser.new_context(base_url=base, **{"viewport": {"width": 1200, "height": 800}} | options)
        context.set_default_timeout(PATIENCE_MS)
        watched.watch(context, base)
        made.append(context)
        return context

    yield make
    for context in made:
        context.close()
    assert watched.problems == []


@pytest.fixture(scope="session")
def start_server() -> Callable[..., contextlib.AbstractContextManager[Server]]:
    """`with start_server("pages_server.py", STATE) as server:`"""
    return serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The pages over the scripted model of pages_server.py; no key is asked for."""
    with serving("pages_server.py", str(tmp_path_factory.mktemp("pages"))) as started:
        yield started


@pytest.fixture
def page(server: Server, contexts: Callable[..., Any]) -> Any:
    """An empty chat."""
    opened = contexts(server.base).new_page()
    opened.goto("/")
    opened.wait_for_selector("#message")
    return opened
