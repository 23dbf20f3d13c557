"""Conversations kept: trees of messages in SQLite, searched, exported and imported, and votes between two answers."""

from tael.serve.history.store import History
from tael.serve.history.tree import Head, Node, Role, State, Tree, leaf_below, path_to, siblings
from tael.serve.history.votes import Vote, preferences

__all__ = [
    "Head",
    "History",
    "Node",
    "Role",
    "State",
    "Tree",
    "Vote",
    "leaf_below",
    "path_to",
    "preferences",
    "siblings",
]
