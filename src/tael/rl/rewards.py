"""The reward of one completion: exact accuracy, nothing learned (DeepSeek-R1, section 2.2: rule-based rewards).

Format needs no term of its own: the answer is what stands after `</think>`, so a completion that never closes
its reasoning has no answer and earns nothing.
"""

from __future__ import annotations

from tael.rl.tasks import Problem, verify


def reward(problem: Problem, parsed_answer: str | None, finished: bool) -> float:
    """1.0 for a right answer, 0.0 otherwise.

    `parsed_answer` is the text after the reasoning, None where there was none to parse. `finished` says that the
    model ended its turn itself; a completion cut off by the token limit earns 0.0 even if a right answer is in it.
    """
    if not finished or parsed_answer is None:
        return 0.0
    return float(verify(problem, parsed_answer))
