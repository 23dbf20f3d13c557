"""Runs read while they are written, and started, stopped, resumed as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_recipe import tiny_recipe

from tael.cost.ledger import Entry, Ledger
from tael.errors import TaelError
from tael.serve import run_files, run_process
from tael.serve.run_files import Tail
from tael.serve.run_process import Process, is_locked, read_process
from tael.serve.run_views import seconds_a_step
from tael.serve.runs import RunBook

DEADLINE = 180.0


@pytest.fixture(autouse=True)
def _one_thread_and_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored, which children inherit; the server has a handler."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def book(tmp_path: Path) -> RunBook:
    (tmp_path / "recipes").mkdir()
    words = [f"{word}{i % 7}" for i, word in enumerate(("the", "quick", "fox", "says", "it", "is", "38") * 3)]
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 40)) for i in range(1, 300)]
    (tmp_path / "book.txt").write_text("\n\n".join(lines), encoding="utf-8")
    text = tiny_recipe(tmp_path / "book.txt", 4)
    (tmp_path / "recipes" / "tiny.toml").write_text(text, encoding="utf-8")
    return RunBook(tmp_path / "runs", tmp_path / "recipes")


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {DEADLINE:.0f} s for {what}")
        threading.Event().wait(0.05)


# --------------------------------------------------------------------- reading


def step(number: int, **more: float) -> dict:
    where = {"tokens": number * 64, "seconds": number * 2.0, "tokens_per_second": 32.0}
    return {"kind": "step", "step": number, "loss": 8.0 / number, "learning_rate": 1e-3, **where, **more}


RECIPE = """name = "made"
[price]
dollars_per_hour = 36.0
[stages.pretrain]
kind = "pretrain"
steps = 10
batch_size = 2
sequence_length = 32
[stages.sft]
kind = "sft"
steps = 5
batch_size = 4
sequence_length = 32
[stages.rl]
kind = "rl"
steps = 3
"""


def write_run(directory: Path, steps: int = 4) -> Path:
    (directory / "pretrain").mkdir(parents=True)
    (directory / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    metrics = directory / "pretrain" / "metrics.jsonl"
    append(metrics, *(step(i) for i in range(1, steps + 1)))
    return metrics


def append(path: Path, *lines: dict | str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)


def test_what_is_left_is_told_from_the_steps_so_far(book):
    write_run(book.root / "made")
    view = book.run("made")
    first, second, third = view.stages
    assert (first.step, first.steps, first.state, first.progress) == (4, 10, "begun", 0.4)
    assert first.seconds_left == pytest.approx(6 * 2.0)  # two seconds a step
    assert second.seconds_left == pytest.approx(5 * 4 * 32 / 32.0)  # its tokens at 32 a second
    assert third.seconds_left is None and view.prediction.unknown == ["rl"]
    assert view.prediction.seconds_left == pytest.approx(12 + 20)
    assert view.whole.dollars == pytest.approx(8 * 0.01)  # a cent a second
    assert view.prediction.dollars == pytest.approx(0.08 + 0.32)
    assert "rl" in view.prediction.basis
    assert view.head.progress == pytest.approx(0.4 / 3) and view.head.stage == "pretrain"


def test_nothing_is_predicted_before_the_second_step(book):
    write_run(book.root / "made", steps=1)
    told = book.run("made").prediction
    assert told.dollars is None and told.seconds_left is None and told.unknown == ["pretrain", "sft", "rl"]


def test_an_equal_run_tells_how_long_a_stage_takes(book):
    for name in ("made", "before"):
        write_run(book.root / name)
    (book.root / "before" / "rl").mkdir()
    result = {"steps": 3, "tokens": 1, "seconds": 50.0, "metrics": {}}
    (book.root / "before" / "rl" / "result.json").write_text(json.dumps(result), encoding="utf-8")
    book.runs()
    assert book.run("made").prediction.unknown == []
    assert book.run("made").stages[2].seconds_left == 50.0
    (book.root / "before" / "recipe.toml").write_text(RECIPE.replace("steps = 3", "steps = 4"), encoding="utf-8")
    assert book.run("made").stages[2].seconds_left is None


def test_curves_stand_over_steps_tokens_seconds_and_dollars(book):
    metrics = write_run(book.root / "made")
    append(metrics, {"kind": "eval", "step": 3, "seconds": 7.0, "bits_per_byte": 2.5})
    append(metrics, {"kind": "eval", "step": 4, "accuracy": {"free": {"correct": 1, "total": 4}}})
    append(metrics, {"kind": "load", "step": 4, "layers": [[0.5, 0.25, 0.25, 0], [0.25, 0.25, 0.25, 0.25]]})
    series = book.run("made").stages[0].series
    assert series["loss"].values == [8.0, 4.0, pytest.approx(8 / 3), 2.0]
    assert series["loss"].along("tokens") == [64, 128, 192, 256]
    assert series["loss"].along("dollars") == pytest.approx([0.02, 0.04, 0.06, 0.08])
    assert (series["bits_per_byte"].steps, series["bits_per_byte"].tokens) == ([3.0], [192.0])
    assert series["accuracy.free"].values == [0.25] and "accuracy.think" not in series
    assert series["balance.0"].values == [2.0] and series["balance.1"].values == [1.0]
    assert "reward" not in series


def test_the_stages_own_clock_goes_on_where_the_ledger_stops(book):
    write_run(book.root / "made")
    entry = Entry(
        run="made", stage="pretrain", kind="pretrain", started="2025-01-20T00:00:00Z", tokens=128, flops=1.0,
        seconds=4.0, peak_memory_bytes=1, price_per_hour=36.0, dollars=0.04, steps=2,
    )  # fmt: skip
    Ledger(book.root / "ledger.sqlite").add(entry)
    assert book.run("made").whole.dollars == pytest.approx(0.08)
    (book.root / "made" / "pretrain" / "result.json").write_text("{}", encoding="utf-8")
    assert book.run("made").whole.dollars == pytest.approx(0.04)  # done: the ledger has all of it


def test_a_damaged_ledger_is_a_note(book):
    write_run(book.root / "made")
    (book.root / "ledger.sqlite").write_bytes(b"no database at all" * 100)
    view = book.run("made")
    assert view.whole.dollars == pytest.approx(0.08) and "not a file of Tael's costs" in view.notes[0]
    assert "<html" in book.report("made")


def test_a_long_stage_is_kept_and_shown_thinned(book, monkeypatch):
    metrics = write_run(book.root / "made", steps=1)
    monkeypatch.setattr(run_files, "MOST_STEPS", 1000)
    append(metrics, *(step(i) for i in range(2, 3002)))
    stage = book.run("made").stages[0]
    assert (stage.step, stage.seconds) == (3001, 6002.0) and seconds_a_step(book.run("made").record.stages[0]) == 2.0
    loss = stage.series["loss"]
    assert len(loss.values) <= 501 and (loss.steps[0], loss.steps[-1]) == (1.0, 3001.0)
    assert all(value == 8.0 / at for at, value in zip(loss.steps, loss.values, strict=True))
    assert loss.tokens == [64 * at for at in loss.steps]
    assert len(book.run("made").record.stages[0].steps) <= 1000


def test_a_half_written_line_waits(book):
    metrics = write_run(book.root / "made")
    line = json.dumps(step(5)) + "\n"
    for end in (1, len(line) // 2, len(line) - 1):
        with metrics.open("a", encoding="utf-8") as file:
            file.write(line[len(file_end(metrics)) : end])
        assert book.run("made").stages[0].step == 4
    with metrics.open("a", encoding="utf-8") as file:
        file.write(line[len(file_end(metrics)) :])
    assert book.run("made").stages[0].step == 5


def file_end(path: Path) -> str:
    """What stands after the last line's end."""
    return path.read_text(encoding="utf-8").rpartition("\n")[2]


def test_only_what_is_new_is_read(book, monkeypatch):
    metrics = write_run(book.root / "made", steps=50)
    book.run("made")
    seen = []
    own = Tail.read

    def read(self: Tail) -> tuple[list[str], bool]:
        lines, anew = own(self)
        seen.extend(lines)
        return lines, anew

    monkeypatch.setattr(Tail, "read", read)
    assert book.run("made").stages[0].step == 50 and seen == []
    append(metrics, step(51))
    assert book.run("made").stages[0].step == 51 and seen == [json.dumps(step(51))]


def test_a_file_that_was_cut_after_a_resume_is_read_anew(book):
    metrics = write_run(book.root / "made", steps=9)
    assert book.run("made").stages[0].step == 9
    kept = "".join(metrics.read_text(encoding="utf-8").splitlines(keepends=True)[:3])
    partial = metrics.with_suffix(".partial")
    partial.write_text(kept, encoding="utf-8")
    partial.replace(metrics)
    append(metrics, step(4, loss=1.0))
    assert book.run("made").stages[0].series["loss"].values == [8.0, 4.0, pytest.approx(8 / 3), 1.0]


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=6)),
       cuts=st.lists(st.integers(0, 60), max_size=6))  # fmt: skip
def test_however_a_file_grows_every_line_comes_once(tmp_path_factory, lines, cuts):
    path = tmp_path_factory.mktemp("tail") / "lines"
    data = "".join(f"{line}\n" for line in lines).encode()
    tail, got = Tail(path), []
    path.write_bytes(b"")
    written = 0
    for end in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
        with path.open("ab") as file:
            file.write(data[written:end])
        written = end
        got += tail.read()[0]
    assert got == [line for line in lines if line.strip()]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "null", '{"kind": "step"}', '{"kind": "step", "step": "x"}', '{"kind": "step", "step": NaN}',
     '{"kind": "step", "step": 5, "loss": {"a": 1}}', '{"kind": "load", "step": 5, "layers": [[0, -1], 3]}',
     '{"kind": "eval", "step": 5, "accuracy": {"free": {"correct": 9, "total": 4}}}', "[" * 5000, "\x00\xff",
     '{"kind": "eval", "step": 1e999, "bits_per_byte": "low"}'],
)  # fmt: skip
def test_lines_that_make_no_sense_are_left_out(book, line):
    append(write_run(book.root / "made"), line)
    view = book.run("made")
    assert view.stages[0].series["loss"].values[:4] == [8.0, 4.0, pytest.approx(8 / 3), 2.0]
    assert [head.name for head in book.runs()] == ["made"]


@pytest.mark.parametrize("name", ["recipe.toml", "summary.json", "run.json", "process.json", "pretrain/result.json"])
@pytest.mark.parametrize(
    "content", [b"\xff\x00", b"[1, 2]", b'{"stages": 3, "name": [1], "accuracy": 7}', b"stages = 3"]
)
def test_files_that_make_no_sense_stop_nobody(book, name, content):
    write_run(book.root / "made")
    (book.root / "made" / name).write_bytes(content)
    assert book.runs()[0].state in ("stopped", "finished")
    book.run("made")


def test_a_run_in_a_line(book):
    write_run(book.root / "made")
    append(write_run(book.root / "other"), {"kind": "eval", "step": 4, "bits_per_byte": 2.5})
    os.utime(book.root / "made" / "pretrain" / "metrics.jsonl", (4e9, 4e9))
    first, second = book.runs()
    assert (first.name, first.updated) == ("made", 4e9)
    assert "2.50 bits per byte" in second.headline and second.state == "stopped" and not second.ours
    (book.root / "other" / "summary.json").write_text('{"finished": true}', encoding="utf-8")
    assert book.runs()[1].state == "finished"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../made", "made/pretrain", "/etc", "a\x00b", "nope", "ledger.sqlite", None]
)
def test_no_name_leaves_the_folder(book, name):
    write_run(book.root / "made")
    write_run(book.root.parent / "outside")
    for action in (book.run, book.stop, book.resume, book.report):
        with pytest.raises(TaelError, match="no such run"):
            action(name)


# -------------------------------------------------------------------- processes


def test_a_reused_process_id_is_not_taken_for_the_run(book):
    write_run(book.root / "made")
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        began = psutil.Process(other.pid).create_time()
        place = book.root / "made" / "process.json"
        place.write_text(json.dumps({"pid": other.pid, "started": began, "recipe": "tiny.toml", "overrides": []}))
        assert book.runs()[0].state == "running"
        place.write_text(
            json.dumps({"pid": other.pid, "started": began - 60, "recipe": "tiny.toml", "overrides": []})
        )
        assert book.runs()[0].state == "stopped"
        with pytest.raises(TaelError, match="is not running"):
            book.stop("made")
        assert other.poll() is None
    finally:
        other.communicate(b"\n", timeout=30)
    assert Process(other.pid, began, "tiny.toml", []).find() is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"pid": "1", "started": 0, "recipe": "", "overrides": []}',
        '{"pid": -1, "started": 0, "recipe": "", "overrides": []}',
        '{"pid": true, "started": 0, "recipe": "", "overrides": []}',
        '{"pid": 1, "started": [], "recipe": "", "overrides": []}',
        '{"pid": 1, "started": 0, "recipe": "", "overrides": [1]}',
    ],
)
def test_a_process_record_that_makes_no_sense_is_none(tmp_path, text):
    (tmp_path / "process.json").write_text(text, encoding="utf-8")
    assert read_process(tmp_path) is None


def test_a_run_begun_in_a_terminal_is_known_by_its_lock(book):
    write_run(book.root / "made")
    lock = book.root / "made" / ".lock"
    take = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
    code = f"{take}; print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    try:
        assert is_locked(book.root / "made") and book.runs()[0].state == "running"
        with pytest.raises(TaelError, match="begun elsewhere"):
            book.stop("made")
        with pytest.raises(TaelError, match="running already"):
            book.resume("made")
    finally:
        holder.communicate(b"\n", timeout=30)
    assert book.runs()[0].state == "stopped"


def test_the_lock_is_tried_where_the_system_lists_none(book, tmp_path, monkeypatch):
    monkeypatch.setattr(run_process, "_LOCKS", tmp_path / "none")
    test_a_run_begun_in_a_terminal_is_known_by_its_lock(book)


@pytest.mark.parametrize(
    ("said", "state", "reason"),
    [
        ("tael: stopped at step 3 of 9; the same command goes on from there", "stopped", "stopped at step 3"),
        ("tael: made: 'seed' differs", "failed", "'seed' differs"),
        ("Traceback (most recent call last):\n  x\nRuntimeError: bad", "failed", "RuntimeError: bad"),
        ("pretrain 3/9: loss 2.0", "failed", "without a word"),
        ("", "failed", "without a word"),
    ],
)
def test_why_a_run_has_ended(book, said, state, reason):
    write_run(book.root / "made")
    (book.root / "made" / "output.log").write_text(f"$ tael run x\n{said}\n", encoding="utf-8")
    head = book.runs()[0]
    assert head.state == state and reason in head.reason


def test_what_the_process_says_is_shown_without_control_characters(book):
    write_run(book.root / "made")
    (book.root / "made" / "output.log").write_bytes(b"x" * 200_000 + b"\n\x1b[31mred\x1b[0m\x07\n\xff\n")
    first, *rest = book.run("made").log
    assert set(first) == {"x"} and len(first) < 70_000 and rest == ["red", "�"]


def test_a_run_is_started_stopped_and_resumed_to_its_end(book):
    head = book.start("tiny.toml", "try-1", {"stages.pretrain.steps": 3000, "seed": "7"})
    assert head.state == "running" and head.ours
    directory = book.root / "try-1"
    process = read_process(directory)
    assert process is not None and process.overrides == ["stages.pretrain.steps=3000", "seed=7"]
    for wrong in (lambda: book.start("tiny.toml", "try-1"), lambda: book.resume("try-1")):
        with pytest.raises(TaelError, match="running already"):
            wrong()
    until(lambda: book.run("try-1").stages[:1] != [] and book.run("try-1").stages[0].step > 2, "the first steps")

    again = RunBook(book.root, book.folder)  # as after the server was restarted
    assert again.runs()[0].state == "running" and again.runs()[0].ours
    assert again.run("try-1").record.recipe["seed"] == 7
    again.stop("try-1")
    until(lambda: (book.runs()[0].state, process.find()) == ("stopped", None), "the stop")
    head = book.runs()[0]
    assert head.reason.startswith("stopped at step ") and 0 < head.progress < 1 and head.dollars > 0
    done = book.run("try-1").stages[0].step
    assert any("goes on from there" in line for line in book.run("try-1").log)
    with pytest.raises(TaelError, match="is there already; resume it"):
        book.start("tiny.toml", "try-1")

    # To its end, without waiting for three thousand steps: what is left is made short in the run's own recipe.
    saved = (directory / "recipe.toml").read_text(encoding="utf-8")
    (directory / "recipe.toml").write_text(saved.replace("steps = 3000", f"steps = {done + 2}"), encoding="utf-8")
    assert again.resume("try-1").state == "running"
    until(lambda: book.runs()[0].state == "finished", f"the end; log: {book.run('try-1').log}")
    view = book.run("try-1")
    assert view.stages[0].step == done + 2 and view.prediction.seconds_left == 0.0
    assert any(f"going on after step {done}" in line for line in view.log)
    assert view.head.headline.startswith("text: ") and "try-1" in book.report("try-1")
    assert [samples[0] for samples in view.samples] == ["pretrain"]
    with pytest.raises(TaelError, match="is finished"):
        again.resume("try-1")
    until(lambda: book._children == [] or not any(c.poll() is None for c in book._children), "the children's end")


def test_a_run_that_fails_says_why(book):
    (book.folder.parent / "book.txt").write_bytes(b"")
    book.start("tiny.toml")
    until(lambda: book.runs()[0].state != "running", "the end")
    head = book.runs()[0]
    assert head.name == "tiny" and head.state == "failed" and "is empty" in head.reason


def test_no_more_runs_than_the_machine_bears(book, monkeypatch):
    for i in range(4):
        write_run(book.root / f"made-{i}")
    monkeypatch.setattr(RunBook, "_alive", lambda self, directory: directory.exists())
    with pytest.raises(TaelError, match="4 runs are at work"):
        book.start("tiny.toml", "fifth")
    assert not (book.root / "fifth").exists()


# ---------------------------------------------------------- what browsers may send


def test_recipes(book):
    (book.folder / "wrong.toml").write_text("name = 3", encoding="utf-8")
    (book.folder / "notes.txt").write_text("no recipe", encoding="utf-8")
    tiny, wrong = book.recipes()
    assert (tiny.file, tiny.name, tiny.description, tiny.stages) == ("tiny.toml", "tiny", "A few steps", ["pretrain"])
    assert tiny.values["stages.pretrain.steps"] == 4 and tiny.problem == ""
    assert wrong.file == "wrong.toml" and "name" in wrong.problem


@pytest.mark.parametrize(
    "recipe", ["../book.txt", "nope.toml", "", "sub/tiny.toml", "../recipes/tiny.toml", "/etc/passwd"]
)
def test_only_recipes_of_the_folder_are_run(book, recipe):
    (book.folder / "sub").mkdir()
    (book.folder / "sub" / "tiny.toml").write_text((book.folder / "tiny.toml").read_text())
    with pytest.raises(TaelError, match="no such recipe"):
        book.start(recipe, "x")
    assert not book.root.exists()


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "A", "a b", "a" * 41, "-x", "x\n", "a.b", "ä", 3])
def test_only_plain_names_are_given(book, name):
    with pytest.raises(TaelError, match="name "):
        book.start("tiny.toml", name)
    assert not book.root.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.path": "/etc/passwd"}, "names files or models"),
        ({"data": "{path = '/etc/passwd'}"}, "names files or models"),
        ({"data.dataset": "someone/x"}, "names files or models"),
        ({"base": "/srv/model"}, "names files or models"),
        ({"tokenizer.path": "/srv/model"}, "names files or models"),
        ({"stages.pretrain": "{kind = 'sft', dialogues = ['/etc/x.jsonl']}"}, "names files or models"),
        ({"stages.other.kind": "pretrain"}, "has the stages of its recipe"),
        ({"name": "other"}, "own field"),
        ({"stages./srv/x.kind": "pretrain"}, "write a key"),
        ({"--fresh": "1"}, "unknown key"),
        ({"": "1"}, "write a key"),
        ({"seed=1 --run-dir": "x"}, "write a key"),
        ({"seed": "1\n2"}, "one line of text"),
        ({"seed": "9" * 5000}, "one line of text"),
        ({"seed": ["1"]}, "give a number"),
        ({"seed": None}, "give a number"),
        ({"seed": "seven"}, "seed"),
        ({"stages.pretrain.stps": 3}, "did you mean 'steps'"),
        ({"stages.pretrain.steps": 0}, "stages.pretrain.steps"),
        ({"stages.pretrain.steps": float("nan")}, "stages.pretrain.steps"),
        ({"model.num_attention_heads": 0}, "num_attention_heads"),
    ],
)
def test_overrides_are_data(book, overrides, message):
    with pytest.raises(TaelError, match=message) as caught:
        book.start("tiny.toml", "x", overrides)
    assert "\n" not in str(caught.value)
    assert not book.root.exists()


def test_no_other_folder_is_taken_for_a_run(book):
    (book.root / "data").mkdir(parents=True)
    with pytest.raises(TaelError, match="no run is there"):
        book.start("tiny.toml", "data")
    assert book.runs() == []
