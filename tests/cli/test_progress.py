"""What a run shows: plain lines, and bars that fit 80 columns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tael.pipeline import Reporter
from tael.progress import LiveReporter, PlainReporter, clock, evaluation_words, make_reporter, step_words

ACCURACY = {"free": {"correct": 31, "total": 100}, "think": {"correct": 1, "total": 2}}


def test_words():
    step = {"loss": 2.5, "tokens_per_second": 9600.0}
    assert step_words(step) == ["loss 2.500", "9.60K tok/s"]
    rl = {"loss": 0.01, "reward": 0.5, "completion_tokens": 14.2, "think_rate": 0.6}
    assert step_words(rl) == ["reward 50%", "length 14", "thinks 60%"]
    assert evaluation_words({"bits_per_byte": 1.7}) == ["1.700 bits per byte"]
    assert evaluation_words({"accuracy": ACCURACY}) == ["right: free 31%, think 50%"]
    assert evaluation_words({"accuracy": {"free": {"correct": 0, "total": 0}}}) == [] == step_words({})
    assert [clock(s) for s in (0, 75, 4000, -1)] == ["0:00", "1:15", "1:06:40", "0:00"]


def test_plain_lines_come_now_and_then():
    now = [0.0]
    console = Console(file=io.StringIO(), width=80)
    reporter: Reporter = PlainReporter(console, every=10, now=lambda: now[0])
    reporter.stage("pretrain", "pretrain", 100, 20)
    for step in range(21, 101):
        now[0] += 1.0
        reporter.step(step, {"loss": 3.0})
    reporter.stage_done("pretrain", {})
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "pretrain: 100 steps, going on after step 20"
    assert lines[1] == "pretrain 21/100: loss 3.000, 0:01 gone, 1:19 left"
    assert lines[-2:] == ["pretrain 100/100: loss 3.000, 1:20", "pretrain: done in 80.0 s"]
    assert len(lines) == 1 + 1 + 7 + 1 + 1


def drive(reporter: Reporter) -> None:
    reporter.say("reading [bold]text[/bold]")
    reporter.stage("prepare", "prepare", 0, 0)
    reporter.stage_done("prepare", {})
    reporter.stage("sft", "sft", 12000, 6000)  # pretrain was done before
    reporter.step(6001, {"loss": 1.25, "tokens_per_second": 5000.0})
    reporter.evaluated(6001, {"accuracy": ACCURACY})


def rows(reporter: LiveReporter) -> list[str]:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, legacy_windows=False)
    console.print(reporter._view())
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    return [line.rstrip() for line in lines]


def test_bars_fit_and_say_where_every_stage_stands():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with LiveReporter(console, ["pretrain", "sft", "rl"]) as reporter:
        assert [row.split()[-1] for row in rows(reporter)[:4]] == ["waiting"] * 4
        drive(reporter)
        prepare, pretrain, sft, rl, words = rows(reporter)
        assert prepare.endswith("done, 0:00") and pretrain.endswith("done before") and rl.endswith("waiting")
        assert sft.startswith("sft") and "━" in sft and "6001/12000" in sft
        assert words == "  loss 1.250 · 5.00K tok/s · right: free 31%, think 50%"
        reporter.step(12000, {"loss": 1.0})
        reporter.stage_done("sft", {})
    assert rows(reporter)[2].endswith("done, 0:00") and rows(reporter)[3].endswith("done before")
    assert "reading [bold]text[/bold]" in console.file.getvalue()


def test_a_run_that_fails_leaves_the_terminal_whole():
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with pytest.raises(KeyboardInterrupt), LiveReporter(console, ["sft", "rl"]) as reporter:
        drive(reporter)
        raise KeyboardInterrupt
    assert rows(reporter)[1].endswith("stopped") and rows(reporter)[2].endswith("waiting")
    assert console.file.getvalue().rstrip("\r\n").endswith("\x1b[?25h")  # the cursor is back


def test_the_display_follows_the_console():
    assert isinstance(
        make_reporter(Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"})), LiveReporter
    )
    assert isinstance(make_reporter(Console(file=io.StringIO())), PlainReporter)
    assert isinstance(
        make_reporter(Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})), PlainReporter
    )
