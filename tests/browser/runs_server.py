"""A server of the runs and plan pages over made-up runs, as a process of its own.

    python tests/browser/runs_server.py FOLDER          FOLDER/runs and FOLDER/recipes; prints its port

/look shows the runs to somebody who may only look.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from nicegui import ui

from tael.serve.caller import LOCAL, Caller
from tael.serve.pages.frame import frame, serve_static
from tael.serve.pages.plan import plan_page
from tael.serve.pages.runs import add_reports, runs_page
from tael.serve.runs import RunBook


def main() -> None:
    folder = Path(sys.argv[1])
    book = RunBook(folder / "runs", folder / "recipes")
    app = FastAPI()

    def asks(request: Request) -> Caller | None:
        return None if "stranger" in request.query_params else LOCAL

    @ui.page("/runs")
    def runs() -> None:
        with frame("Runs", "/runs"):
            runs_page(book, LOCAL)

    @ui.page("/look")
    def look() -> None:
        with frame("Runs", "/runs"):
            runs_page(book, None)

    @ui.page("/plan")
    def plan() -> None:
        with frame("Plan", "/plan"):
            plan_page(folder / "recipes")

    serve_static()
    add_reports(book, asks)
    ui.run_with(
        app, dark=None, tailwind=False, storage_secret="for tests", show_welcome_message=False, reconnect_timeout=30.0
    )  # patience as in add_pages: a busy machine is late
    listener = socket.create_server(("localhost", 0))
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
