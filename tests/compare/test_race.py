"""Turns, the record, and what is made of the curves: with contestants whose quality and speed are known."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tael.compare import Curve, Point, Record, race, standings
from tael.compare.picture import curves_picture
from tael.compare.race import FRACTIONS
from tael.errors import TaelError


@dataclass
class Scripted:
    """Loses a tenth of its bits a step; `log` takes down whose turn it was."""

    name: str
    steps: int
    log: list[str] = field(default_factory=list)
    seed: int = 0
    setup: str = "s"
    parameters_total: int = 10
    parameters_active: int = 5
    cache_bytes_per_token: int = 4
    flops_per_token: float = 60.0
    tokens_per_step: int = 7
    done: int = 0

    def step(self) -> None:
        self.log.append(self.name)
        self.done += 1

    def bits_per_byte(self) -> float:
        return 8.0 * 0.9**self.done


def curve(name: str, seed: int, ends: list[tuple[float, float]], tokens: int = 100) -> Curve:
    """From (seconds, bits per byte)."""
    points = tuple(
        Point(step=i + 1, tokens=tokens * (i + 1), flops=6.0 * tokens * (i + 1), seconds=seconds, bits_per_byte=bits)
        for i, (seconds, bits) in enumerate(ends)
    )
    return Curve(
        name=name, seed=seed, setup="x", clock="processor", threads=1, parameters_total=10, parameters_active=10,
        cache_bytes_per_token=8, flops_per_token=6.0, points=points,
    )  # fmt: skip


def test_everyone_takes_every_step_in_turns() -> None:
    log: list[str] = []
    long, short = Scripted("long", 40, log), Scripted("short", 20, log)
    curves = race([long, short], slice_seconds=0.0)
    assert (long.done, short.done) == (40, 20)
    first = log[: log.index("short") + 1]
    assert len(first) <= 3  # a slice of no time is a step or two, so that the other's turn comes
    assert [c.last.step for c in curves] == [40, 20]
    assert curves[0].last.tokens == 280
    assert curves[0].last.flops == 280 * 60.0


def test_evaluations_stand_where_they_should() -> None:
    (found,) = race([Scripted("one", 100)])
    assert [point.step for point in found.points] == [round(100 * share) for share in FRACTIONS]
    assert all(p.bits_per_byte == pytest.approx(8.0 * 0.9**p.step, abs=1e-6) for p in found.points)
    assert [p.seconds for p in found.points] == sorted(p.seconds for p in found.points)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 30), st.integers(1, 30))
def test_any_number_of_steps_ends_with_an_evaluation(one: int, other: int) -> None:
    for found, steps in zip(race([Scripted("a", one), Scripted("b", other)]), (one, other), strict=True):
        assert found.last.step == steps
        assert [p.step for p in found.points] == sorted({p.step for p in found.points})


def test_the_record_keeps_what_is_whole(tmp_path: Path) -> None:
    record = Record(tmp_path / "deep" / "curves.jsonl")
    assert record.curves() == []
    first, second = curve("a", 0, [(1.0, 3.0)]), curve("b", 1, [(2.0, 2.5)])
    record.add([first])
    with record.path.open("a", encoding="utf-8") as file:
        file.write('{"name": "torn", "se')  # as a crash leaves it
    record.add([second])
    assert record.curves() == [first, second]
    assert record.find("b", 1, "x") == second
    assert record.find("b", 1, "another setup") is None


def test_strange_lines_are_passed_over(tmp_path: Path) -> None:
    record = Record(tmp_path / "curves.jsonl")
    good = curve("a", 0, [(1.0, 3.0)])
    record.path.write_text("[]\nnull\n" + "[" * 100_000 + '\n{"name": 1}\n' + good.model_dump_json() + "\n")
    assert record.curves() == [good]


def test_standings_by_hand() -> None:
    curves = [
        curve("base", 0, [(50.0, 3.0), (100.0, 2.0)]),
        curve("base", 1, [(50.0, 3.0), (110.0, 2.2)]),
        curve("ours", 0, [(10.0, 2.5), (20.0, 2.1), (30.0, 1.9)]),
        curve("ours", 1, [(10.0, 2.5), (22.0, 2.2), (33.0, 2.0)]),
        curve("slow", 0, [(300.0, 2.3)]),
        curve("slow", 1, [(300.0, 2.1)]),
    ]
    result = standings(curves, dollars_per_hour=3.6, baseline="base")
    assert result.target == 2.2  # the baseline's last quality on its worst seed
    base, ours, slow = result.rows
    assert base.seconds is not None and (base.seconds.low, base.seconds.high) == (100.0, 110.0)
    assert ours.seconds is not None and (ours.seconds.low, ours.seconds.high) == (20.0, 22.0)
    assert ours.dollars == pytest.approx(0.021)
    assert ours.cheaper is not None and (ours.cheaper.low, ours.cheaper.high) == (5.0, 5.0)
    assert base.cheaper is not None and base.cheaper.median == 1.0
    assert (slow.reached, slow.seconds, slow.cheaper) == (1, None, None)
    assert ours.tokens is not None and ours.tokens.median == 200


def test_the_baseline_reaches_its_own_target_on_every_seed() -> None:
    curves = [curve("base", seed, [(5.0, 3.0), (9.0, bits)]) for seed, bits in enumerate((2.3, 2.1, 2.2))]
    (row,) = standings(curves, 1.0, "base").rows
    assert row.reached == row.seeds == 3


def test_who_to_compare_with() -> None:
    curves = [curve("base", 0, [(5.0, 3.0)])]
    with pytest.raises(TaelError, match=r"no contestant is named 'bas'.*base"):
        standings(curves, 1.0, "bas")
    with pytest.raises(TaelError, match="at which quality"):
        standings(curves, 1.0)
    assert standings(curves, 1.0, target=2.0).rows[0].seconds is None


def test_between_evaluations() -> None:
    found = curve("a", 0, [(10.0, 3.0), (20.0, 2.0)])
    assert found.interpolated(2.5) == pytest.approx(15.0)
    assert found.interpolated(3.5) == 10.0
    assert found.interpolated(1.0) is None


def test_a_training_too_quick_to_time_is_drawn_all_the_same() -> None:
    drawn = curves_picture([curve("a", 0, [(0.0, 3.0), (2.0, 2.0)])])
    assert drawn.count("<polyline") == 1 and "nan" not in drawn
    assert standings([curve("a", 0, [(0.0, 3.0)])], 1.0, "a").rows[0].tokens_per_second > 0


def test_the_picture_names_everyone_and_escapes() -> None:
    curves = [curve("<b>&ours", 0, [(1.0, 3.0), (2.0, 2.0)]), curve("base", 0, [(1.0, 3.0), (9.0, 2.1)])]
    for axis in ("seconds", "flops", "tokens"):
        drawn = curves_picture(curves, 2.1, axis)
        assert drawn.count("<polyline") == 2
        assert "<b>" not in drawn and "&lt;b&gt;&amp;ours ends at 2.000" in drawn
        assert "stroke-dasharray" in drawn
