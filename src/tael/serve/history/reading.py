"""A file that a user gives, whichever kind it is."""

from __future__ import annotations

from tael.serve.history.exchange import decoded, from_json
from tael.serve.history.markdown import from_markdown
from tael.serve.history.tree import Tree


def read_export(data: bytes | str) -> list[Tree]:
    """The conversations of a JSON or Markdown file, for `History.insert`. Raises TaelError for anything else."""
    text = decoded(data)
    return from_json(text) if text.lstrip()[:1] in ("{", "[") else from_markdown(text)
