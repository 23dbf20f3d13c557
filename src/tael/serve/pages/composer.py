"""Where questions are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nicegui.element import Element

from tael.errors import TaelError
from tael.serve.pages.wishes import File, with_files


class Composer(Element, component="static/composer.js"):
    """`on_send` gets a question, its files in it; what raises TaelError is shown and stays to be changed."""

    def __init__(self, on_send: Callable[[str], Any], on_stop: Callable[[], Any]):
        super().__init__()
        self._on_send = on_send
        self.props.update({"busy": False, "placeholder": "Ask something"})
        self.on("send", lambda event: self._sent(event.args))
        self.on("stop", lambda: on_stop())

    def busy(self, busy: bool) -> None:
        """Show Stop in place of Send."""
        if self.props["busy"] != busy:
            self.props["busy"] = busy

    def _sent(self, given: Any) -> None:
        try:
            self._on_send(_question(given))
        except TaelError as error:
            self.run_method("fail", str(error))
        else:
            self.run_method("clear")


def _question(given: Any) -> str:
    """What a browser sent, which may be anything."""
    given = given if isinstance(given, dict) else {}
    files = given.get("files")
    files = [each for each in files if isinstance(each, dict)] if isinstance(files, list) else []
    text = str(given.get("text") or "").strip()
    question = with_files(text, [File(str(each.get("name") or ""), str(each.get("text") or "")) for each in files])
    if not question.strip():
        raise TaelError("write something first")
    return question
