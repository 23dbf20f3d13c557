"""kill -9 while an answer streams: the conversation is whole up to the last update that was acknowledged."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tael.serve.history import History, path_to

WRITER = """
import sys
from tael.serve.history import History
history = History(sys.argv[1])
head = history.create("local", "small")
question = history.add("local", head.id, None, "user", "count")
answer = history.add("local", head.id, question.id, "assistant", model="small", state="running")
text = ""
for step in range(100000):
    text += f"{step} "
    history.update("local", answer.id, content=text, reasoning="r" * step, figures={"tokens": step})
    print(step, flush=True)
"""


def stream_and_kill(path: Path, after: int) -> int:
    """Kill the writer once it has acknowledged `after`; returns the last step it acknowledged."""
    command = [sys.executable, "-c", WRITER, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= after:
            break
    process.send_signal(signal.SIGKILL)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    return max([after, *map(int, rest.split())])


@pytest.mark.parametrize("after", [0, 17, 120])
def test_an_answer_is_whole_up_to_the_last_acknowledged_update(tmp_path, after):
    path = tmp_path / "conversations.sqlite"
    acknowledged = stream_and_kill(path, after)

    history = History(path)
    (head,) = history.heads("local")
    question, answer = path_to(history.nodes("local", head.id), head.leaf)
    assert (question.content, question.state, answer.state) == ("count", "done", "running")
    step = answer.figures["tokens"]
    assert step in (acknowledged, acknowledged + 1)  # the next may have been written and not yet said
    assert answer.content == "".join(f"{i} " for i in range(step + 1)) and answer.reasoning == "r" * step

    assert history.recover() == 1
    assert history.node("local", answer.id).state == "interrupted"
    assert history.node("local", answer.id).content == answer.content
    assert history.heads("local", f"{step}")[0].id == head.id  # and it is found
    history.update("local", answer.id, content=answer.content + "on", state="done")
    history.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
