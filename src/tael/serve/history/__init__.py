"""Conversations kept: trees of messages in SQLite, searched, exported and imported, and votes between two answers."""

from tael.serve.history.exchange import from_json, to_json
from tael.serve.history.markdown import from_markdown, to_markdown
from tael.serve.history.reading import read_export
from tael.serve.history.store import History
from tael.serve.history.tree import Head, Node, Role, State, Tree, leaf_below, path_to, siblings
from tael.serve.history.votes import Standing, Vote, preferences, standings

__all__ = [
    "Head",
    "History",
    "Node",
    "Role",
    "Standing",
    "State",
    "Tree",
    "Vote",
    "from_json",
    "from_markdown",
    "leaf_below",
    "path_to",
    "preferences",
    "read_export",
    "siblings",
    "standings",
    "to_json",
    "to_markdown",
]
