from __future__ import annotations

from tael.rl.rewards import reward
from tael.rl.tasks import Problem

PROBLEM = Problem("chain", "18-14+22=?", "26", "18-14=4;4+22=26")


def test_only_a_finished_right_answer_earns() -> None:
    assert reward(PROBLEM, "26", finished=True) == 1.0
    assert reward(PROBLEM, " 26\n", finished=True) == 1.0
    assert reward(PROBLEM, "26", finished=False) == 0.0
    assert reward(PROBLEM, "27", finished=True) == 0.0
    assert reward(PROBLEM, "18-14=4;4+22=26", finished=True) == 0.0
    assert reward(PROBLEM, "", finished=True) == 0.0
    assert reward(PROBLEM, None, finished=True) == 0.0
