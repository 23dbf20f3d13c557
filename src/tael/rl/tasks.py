"""Reasoning problems with exact answers: seeded generators, worked traces, and verifiers that never raise.

A `Task` is one family of problems; its difficulty is a handful of integers with stated ranges (`Task.ranges`).
`TASKS` names the families, `make_task` binds one to the difficulty a recipe asks for, and `problems` draws a
train or a test set. The two sets are disjoint by construction: a stable hash of the prompt decides the side.

Verifiers judge text a model wrote, so they are total: bounded length, ASCII digits only, no eval and no
conversion of unbounded text. A worked trace is a list of steps joined by `;`, each true on its own.
"""

from __future__ import annotations

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from tael.errors import TaelError, did_you_mean
from tael.recipe import TaskSettings

Split = Literal["train", "test"]

MAX_ANSWER_CHARACTERS = 256
"""No right answer is longer; a longer text is wrong without being read."""
_MAX_DEPTH = 32
_MAX_DRAWS = 10_000  # draws without a new problem after which a task's split counts as empty
_MAX_COUNTDOWN_DRAWS = 1_000
_TEST_SHARE = 10  # one prompt in ten
_WHITESPACE = " \t\r\n"


@dataclass(frozen=True)
class Problem:
    """One problem: `prompt` is the user's message, `worked` goes inside <think>, `answer` is one right answer."""

    task: str
    prompt: str
    answer: str
    worked: str


class Range(NamedTuple):
    """Allowed values of one difficulty number, both ends included."""

    low: int
    high: int
    default: int
    meaning: str


class Task(ABC):
    """One family of problems; stateless. Subclasses give `name`, `ranges`, `_generate` and, at need, `verify`."""

    name: ClassVar[str]
    ranges: ClassVar[dict[str, Range]]

    @property
    def defaults(self) -> dict[str, int]:
        """The difficulty used where a recipe says nothing; the allowed values are in `ranges`."""
        return {key: allowed.default for key, allowed in self.ranges.items()}

    def complete(self, difficulty: Mapping[str, int]) -> dict[str, int]:
        """`difficulty` checked and filled up with the defaults; raises TaelError naming the wrong number."""
        for key, value in difficulty.items():
            if key not in self.ranges:
                known = did_you_mean(key, self.ranges)
                raise TaelError(f"task '{self.name}' has no difficulty number '{key}'{known}")
            low, high, _, meaning = self.ranges[key]
            if not low <= value <= high:
                raise TaelError(f"task '{self.name}': {key} is {value}, must be {low} to {high} ({meaning})")
        full = self.defaults | dict(difficulty)
        if "low" in full and full["low"] > full["high"]:
            raise TaelError(f"task '{self.name}': low {full['low']} is above high {full['high']}")
        return full

    def generate(self, generator: random.Random, difficulty: Mapping[str, int]) -> Problem:
        """One problem drawn with `generator`; numbers missing from `difficulty` take their defaults."""
        return self._generate(generator, self.complete(difficulty))

    @abstractmethod
    def _generate(self, generator: random.Random, difficulty: dict[str, int]) -> Problem: ...

    def verify(self, problem: Problem, text: str) -> bool:
        """Whether `text` is exactly a right answer to `problem`; total, never raises."""
        return same_integer(problem.answer, text)


def same_integer(answer: str, text: str) -> bool:
    """Whether `text` is the integer `answer` (canonical decimal): ASCII, no leading zeros, one optional `+`.

    ASCII whitespace around it is ignored. The comparison is of strings, so nothing is ever converted.
    """
    if len(text) > MAX_ANSWER_CHARACTERS:
        return False
    body = text.strip(_WHITESPACE)
    if body.startswith("+") and not answer.startswith("-"):
        body = body[1:]
    return body == answer


class Addition(Task):
    """`47+38=?` worked in columns from the right, carries and borrows shown: `7+8=15;4+3+1=8`."""

    name = "addition"
    ranges: ClassVar = {
        "digits": Range(1, 18, 2, "most digits of either number"),
        "subtract": Range(0, 1, 1, "1: half of the problems are differences, never below zero"),
    }

    def _generate(self, generator: random.Random, difficulty: dict[str, int]) -> Problem:
        a, b = (generator.randrange(10 ** difficulty["digits"]) for _ in range(2))
        minus = generator.random() < 0.5 and difficulty["subtract"] == 1
        if minus:
            a, b = max(a, b), min(a, b)
            return Problem(self.name, f"{a}-{b}=?", str(a - b), ";".join(_subtract_columns(a, b)))
        return Problem(self.name, f"{a}+{b}=?", str(a + b), ";".join(_add_columns(a, b)))


def _columns(a: int, b: int) -> list[tuple[int, int]]:
    """Digit pairs of two non-negative numbers, the units first."""
    width = max(len(str(a)), len(str(b)))
    return [(int(x), int(y)) for x, y in zip(f"{a:0{width}}"[::-1], f"{b:0{width}}"[::-1], strict=True)]


def _add_columns(a: int, b: int) -> list[str]:
    steps, carry = [], 0
    for x, y in _columns(a, b):
        total = x + y + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return steps


def _subtract_columns(a: int, b: int) -> list[str]:
    steps, borrow = [], 0
    for x, y in _columns(a, b):
        below = x - y - borrow < 0
        top = x + 10 if below else x
        steps.append(f"{top}-{y}{'-1' if borrow else ''}={top - y - borrow}")
        borrow = int(below)
    return steps


class Chain(Task):
    """`18-14+22=?` worked from the left: `18-14=4;4+22=26`. No partial result is below zero."""

    name = "chain"
    ranges: ClassVar = {
        "terms": Range(2, 20, 3, "numbers in the chain"),
        "low": Range(0, 999_999, 1, "smallest number"),
        "high": Range(0, 999_999, 30, "largest number"),
        "subtract": Range(0, 1, 1, "1: signs are drawn, 0: sums only"),
    }

    def _generate(self, generator: random.Random, difficulty: dict[str, int]) -> Problem:
        numbers = [generator.randint(difficulty["low"], difficulty["high"]) for _ in range(difficulty["terms"])]
        total, prompt, steps = numbers[0], str(numbers[0]), []
        for number in numbers[1:]:
            minus = generator.random() < 0.5 and difficulty["subtract"] == 1 and total >= number
            sign, result = ("-", total - number) if minus else ("+", total + number)
            steps.append(f"{total}{sign}{number}={result}")
            prompt += f"{sign}{number}"
            total = result
        return Problem(self.name, f"{prompt}=?", str(total), ";".join(steps))


class Multiply(Task):
    """`34*7=?` worked digit by digit, the products added up: `4*7=28;30*7=210;28+210=238`."""

    name = "multiply"
    ranges: ClassVar = {
        "digits": Range(1, 8, 2, "most digits of the first factor"),
        "factor_digits": Range(1, 8, 2, "most digits of the second factor"),
    }

    def _generate(self, generator: random.Random, difficulty: dict[str, int]) -> Problem:
        a = generator.randrange(10 ** difficulty["digits"])
        b = generator.randrange(10 ** difficulty["factor_digits"])
        total, steps = 0, []
        for y in _places(b):
            for x in _places(a):
                steps.append(f"{x}*{y}={x * y}")
                if total:
                    steps.append(f"{total}+{x * y}={total + x * y}")
                total += x * y
        return Problem(self.name, f"{a}*{b}=?", str(a * b), ";".join(steps or [f"{a}*{b}=0"]))


def _places(number: int) -> list[int]:
    """`number` as digits times powers of ten, the units first, zeros left out: 304 -> [4, 300]."""
    return [int(digit) * 10**i for i, digit in enumerate(reversed(str(number))) if digit != "0"]


class Sort(Task):
    """`sort 5,2,9` by taking the smallest again and again: `5,2,9>2;5,9>5;9>9`, answer `2,5,9`."""

    name = "sort"
    ranges: ClassVar = {
        "length": Range(2, 12, 4, "numbers in the list"),
        "low": Range(0, 999_999, 0, "smallest number"),
        "high": Range(0, 999_999, 99, "largest number"),
    }

    def _generate(self, generator: random.Random, difficulty: dict[str, int]) -> Problem:
        numbers = [generator.randint(difficulty["low"], difficulty["high"]) for _ in range(difficulty["length"])]
        rest, steps = list(numbers), []
        while rest:
            steps.append(f"{_joined(rest)}>{min(rest)}")
            rest.remove(min(rest))
        return Problem(self.name, f"sort {_joined(numbers)}", _joined(sorted(numbers)), ";".join(steps))

    def verify(self, problem: Problem, text: str) -> bool:
        """Whether `text` is the sorted list; whitespace around the numbers is ignored. Total."""
        if len(text) > MAX_ANSWER_CHARACTERS:
            return False
        return ",".join(part.strip(_WHITESPACE) for part in text.split(",")) == problem.answer


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


class Countdown(Task):
    """`2,3,5->17`: reach the target with + - * and each number at most once; answer `3*5+2`.

    The trace goes step by step, `3*5=15;15+2=17`. The prompt lists the numbers in ascending order, so that a
    problem of the test set is not one of the train set in another order. The target is none of the numbers.
    """

    name = "countdown"
    ranges: ClassVar = {
        "numbers": Range(2, 6, 3, "numbers given"),
        "high": Range(2, 99, 20, "largest number given"),
        "target": Range(3, 9999, 100, "largest target and partial result"),
    }

    def _generate(self, generator: random.Random, difficulty: dict[str, int]) -> Problem:
        for _ in range(_MAX_COUNTDOWN_DRAWS):
            numbers = [generator.randint(1, difficulty["high"]) for _ in range(difficulty["numbers"])]
            found = _countdown_solution(generator, numbers, difficulty["target"])
            if found is not None and found[0] not in numbers:
                target, answer, worked = found
                return Problem(self.name, f"{_joined(sorted(numbers))}->{target}", answer, worked)
        raise TaelError(f"task 'countdown': no problem found for {difficulty}; raise target or lower numbers")

    def verify(self, problem: Problem, text: str) -> bool:
        """Whether `text` is an expression over the given numbers that makes the target. Total."""
        given = re.fullmatch(r"([0-9]{1,4}(?:,[0-9]{1,4}){0,9})->([0-9]{1,6})", problem.prompt)
        if given is None:
            return False
        numbers = Counter(int(number) for number in given[1].split(","))
        return evaluate(text, numbers) == int(given[2])


def _countdown_solution(generator: random.Random, numbers: Sequence[int], limit: int) -> tuple[int, str, str] | None:
    """Target, expression and trace that use all `numbers` in order, partial results in 1..limit."""
    total, expression, steps, is_sum = numbers[0], str(numbers[0]), [], False
    for number in numbers[1:]:
        results = {"+": total + number, "-": total - number, "*": total * number}
        if number == 1 or total == 1:
            del results["*"]
        allowed = [sign for sign, result in results.items() if 1 <= result <= limit]
        if not allowed:
            return None
        sign = generator.choice(allowed)
        if sign == "*" and is_sum:
            expression = f"({expression})"
        is_sum = sign != "*"
        steps.append(f"{total}{sign}{number}={results[sign]}")
        expression += f"{sign}{number}"
        total = results[sign]
    return total, expression, ";".join(steps)


def evaluate(text: str, numbers: Counter[int]) -> int | None:
    """Value of an expression of `numbers` (each as often as counted, at most), `+ - * ( )`; None if it is none.

    Grammar: sum = product {(+|-) product}; product = atom {* atom}; atom = number | ( sum ). No signs, no
    leading zeros, ASCII only, at most 256 characters and 32 parentheses deep. Total: never raises.
    """
    tokens = _tokens(text)
    if tokens is None or Counter(int(token) for token in tokens if token.isdigit()) - numbers:
        return None
    parser = _Parser(tokens)
    value = parser.sum(0)
    return value if parser.position == len(tokens) else None


def _tokens(text: str) -> list[str] | None:
    if len(text) > MAX_ANSWER_CHARACTERS:
        return None
    if re.fullmatch(r"(?:[ \t\r\n]|[-+*()]|(?<![0-9])(?:0|[1-9][0-9]{0,5})(?![0-9]))*", text) is None:
        return None
    return re.findall(r"[0-9]+|[-+*()]", text)


class _Parser:
    """Recursive descent over tokens; every method returns None where the text is no expression."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0

    def take(self, *wanted: str) -> str | None:
        """The next token if it is one of `wanted`, which is then consumed."""
        if self.position < len(self.tokens) and self.tokens[self.position] in wanted:
            self.position += 1
            return self.tokens[self.position - 1]
        return None

    def sum(self, depth: int) -> int | None:
        value = self.product(depth)
        while value is not None and (sign := self.take("+", "-")):
            right = self.product(depth)
            if right is None:
                return None
            value = value + right if sign == "+" else value - right
        return value

    def product(self, depth: int) -> int | None:
        value = self.atom(depth)
        while value is not None and self.take("*"):
            right = self.atom(depth)
            value = None if right is None else value * right
        return value

    def atom(self, depth: int) -> int | None:
        if self.take("("):
            value = self.sum(depth + 1) if depth < _MAX_DEPTH else None
            return value if self.take(")") else None
        if self.position < len(self.tokens) and self.tokens[self.position].isdigit():
            self.position += 1
            return int(self.tokens[self.position - 1])
        return None


TASKS: dict[str, Task] = {task.name: task for task in (Addition(), Chain(), Multiply(), Sort(), Countdown())}


def task_named(name: str) -> Task:
    """The task called `name`; raises TaelError with the nearest name."""
    if name not in TASKS:
        raise TaelError(f"unknown task '{name}'{did_you_mean(name, TASKS)}")
    return TASKS[name]


def verify(problem: Problem, text: str) -> bool:
    """Whether `text` is a right answer to `problem`, judged by the problem's own task. Total in `text`."""
    return task_named(problem.task).verify(problem, text)


@dataclass(frozen=True)
class ReadyTask:
    """A task bound to a complete, checked difficulty."""

    task: Task
    difficulty: Mapping[str, int]
    weight: float = 1.0

    def generate(self, generator: random.Random) -> Problem:
        """One problem of this difficulty."""
        return self.task.generate(generator, self.difficulty)

    def verify(self, problem: Problem, text: str) -> bool:
        """`Task.verify`."""
        return self.task.verify(problem, text)


def make_task(settings: TaskSettings) -> ReadyTask:
    """The task a recipe names, its difficulty checked and completed; raises TaelError naming what is wrong."""
    task = task_named(settings.name)
    return ReadyTask(task, task.complete(settings.difficulty), settings.weight)


def split_of(prompt: str) -> Split:
    """The side a prompt belongs to, by BLAKE2b of its text: one in ten is `test`, whatever seed or task drew it."""
    digest = hashlib.blake2b(prompt.encode("utf-8"), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % _TEST_SHARE == 0 else "train"


def problems(tasks: Sequence[TaskSettings], seed: int, count: int, split: Split) -> list[Problem]:
    """`count` problems of one split, a pure function of the arguments; tasks are drawn by their weights.

    The train split may repeat a problem; the test split never does: a task that has no further test problem
    leaves its share to the others. Raises TaelError when a task has no problem in the split at all, and when
    the tasks together hold fewer than `count` distinct test problems.
    """
    if not tasks:
        raise TaelError("no tasks to draw problems from; name at least one under 'tasks'")
    generator = random.Random(f"tael problems {split} {seed}")
    open_tasks = [make_task(settings) for settings in tasks]
    seen: set[str] = set()
    drawn: list[Problem] = []
    while len(drawn) < count:
        ready = generator.choices(open_tasks, [task.weight for task in open_tasks])[0]
        problem = _draw(ready, generator, split, seen)
        if problem is not None:
            drawn.append(problem)
            if split == "test":
                seen.add(problem.prompt)
            continue
        shown = ", ".join(f"{key}={value}" for key, value in ready.difficulty.items())
        if not any(other.task == ready.task.name for other in drawn):
            raise TaelError(f"task '{ready.task.name}' with {shown} has no {split} problem; make it harder")
        open_tasks.remove(ready)
        if not open_tasks:
            raise TaelError(
                f"asked for {count} distinct {split} problems, found {len(drawn)}; ask for fewer or make "
                f"the tasks harder (last tried: '{ready.task.name}' with {shown})"
            )
    return drawn


def _draw(ready: ReadyTask, generator: random.Random, split: Split, seen: set[str]) -> Problem | None:
    for _ in range(_MAX_DRAWS):
        problem = ready.generate(generator)
        if split_of(problem.prompt) == split and problem.prompt not in seen:
            return problem
    return None
