"""Tasks: generated answers verify, nothing else does, no text raises, traces are true, splits are apart."""

from __future__ import annotations

import ast
import operator
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tael.errors import TaelError
from tael.recipe import TaskSettings
from tael.rl.tasks import TASKS, Problem, evaluate, make_task, problems, split_of, task_named, verify

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def value_of(expression: str) -> int:
    """Python's own parser as the oracle for arithmetic (not the code under test)."""

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        assert isinstance(node, ast.BinOp)
        return OPERATORS[type(node.op)](walk(node.left), walk(node.right))

    return walk(ast.parse(expression.strip(), mode="eval").body)


@st.composite
def drawn(draw: st.DrawFn, names: tuple[str, ...] = tuple(TASKS)) -> Problem:
    task = TASKS[draw(st.sampled_from(names))]
    difficulty = {}
    for key, allowed in task.ranges.items():
        difficulty[key] = draw(st.integers(allowed.low, min(allowed.high, max(allowed.default, 9))))
    if "low" in difficulty:
        difficulty["low"] = min(difficulty["low"], difficulty["high"])
    if task.name == "countdown":
        difficulty |= {"high": max(difficulty["high"], 10), "target": max(difficulty["target"], 60)}
    return task.generate(random.Random(draw(st.integers(0, 2**32))), difficulty)


@given(drawn(), st.text(" \t\n", max_size=3))
def test_the_generated_answer_is_right(problem: Problem, space: str) -> None:
    assert verify(problem, problem.answer)
    assert verify(problem, space + problem.answer + space)


@given(drawn(("addition", "chain", "multiply")))
def test_the_answer_is_the_value_of_the_prompt(problem: Problem) -> None:
    assert problem.prompt.endswith("=?")
    assert value_of(re.sub(r"\b0+(?=\d)", "", problem.prompt[:-2])) == int(problem.answer)


@given(drawn(("addition", "chain", "multiply", "countdown")))
def test_every_step_of_a_trace_is_true(problem: Problem) -> None:
    for step in problem.worked.split(";"):
        left, right = step.split("=")
        assert value_of(left) == int(right), problem
    last = int(problem.worked.split("=")[-1])
    if problem.task == "countdown":
        assert last == value_of(problem.answer) == int(problem.prompt.split("->")[1])
    elif problem.task != "addition":
        assert last == int(problem.answer)


@given(drawn(("addition",)))
def test_columns_spell_the_answer(problem: Problem) -> None:
    results = [int(step.split("=")[1]) for step in problem.worked.split(";")]
    spelt = sum(result % 10 * 10**i for i, result in enumerate(results[:-1])) + results[-1] * 10 ** (len(results) - 1)
    assert str(spelt) == problem.answer


@given(drawn(("sort",)))
def test_sort_takes_the_smallest_each_time(problem: Problem) -> None:
    rest = [int(number) for number in problem.prompt.removeprefix("sort ").split(",")]
    assert problem.answer == ",".join(map(str, sorted(rest)))
    for step in problem.worked.split(";"):
        left, taken = step.split(">")
        assert left == ",".join(map(str, rest)) and int(taken) == min(rest)
        rest.remove(int(taken))
    assert rest == []


@given(drawn(("addition", "chain", "multiply")), st.integers())
def test_every_other_integer_is_wrong(problem: Problem, other: int) -> None:
    assert verify(problem, str(other)) == (other == int(problem.answer))
    for near in (int(problem.answer) + d for d in (-10, -1, 1, 10)):
        assert not verify(problem, str(near))


@settings(max_examples=300)
@given(drawn(), st.one_of(st.text(), st.text("0123456789+-*() ,=;", max_size=40), st.text("²٣５Ⅷ⑴-+ 1", max_size=6)))
def test_verify_never_raises(problem: Problem, text: str) -> None:
    assert verify(problem, text) in (True, False)
    assert verify(Problem(problem.task, text, text, ""), text) in (True, False)


NUMERIC = Problem("chain", "20+6=?", "26", "")


@pytest.mark.parametrize("text", ["26", " 26\n", "+26", "\t26 "])
def test_numeric_accepts(text: str) -> None:
    assert verify(NUMERIC, text)


@pytest.mark.parametrize(
    "text",
    ["", "+", "-26", "026", "26.0", "26.", "2 6", "2_6", "++26", "+ 26", "26=26", "26 26", "the answer is 26", "0x1a",
     "٢٦", "２６", "2６", "²⁶", "26\x00", "26\u00a0", "\ufeff26", "26" * 200, "2.6e1", "#### 26"],
)  # fmt: skip
def test_numeric_refuses(text: str) -> None:
    assert not verify(NUMERIC, text)


def test_signs() -> None:
    negative = Problem("chain", "", "-5", "")
    assert verify(negative, " -5 ")
    assert not any(verify(negative, text) for text in ("5", "+5", "+-5", "--5", "- 5", "−5"))
    zero = Problem("chain", "", "0", "")
    assert verify(zero, "0") and verify(zero, "+0")
    assert not verify(zero, "-0") and not verify(zero, "00")


GAME = Problem("countdown", "2,3,5->17", "3*5+2", "")


@pytest.mark.parametrize("text", ["3*5+2", "2+5*3", " ( 2 ) + ((3*5)) ", "2 + 3 * 5\n", "(3*5)+2"])
def test_countdown_accepts(text: str) -> None:
    assert verify(GAME, text)


@pytest.mark.parametrize(
    "text",
    ["", "17", "3*5", "3*5+2=17", "2+3+5+7", "3*5+1+1", "5+5+5+2", "(3*5+2", "3*5+2)", "()", "3*5+2+", "+3*5+2",
     "3(5)+2", "3 5*+2", "3**5", "03*5+2", "3*5-(-2)", "３*5+2", "3*5+²", "3×5+2", "5*3,+2", "34//2",
     "__import__('os')", "3*5+2#", "3 * 5 + 2" + " " * 300, "(" * 100 + "17" + ")" * 100],
)  # fmt: skip
def test_countdown_refuses(text: str) -> None:
    assert not verify(GAME, text)


def test_countdown_depth_is_bounded() -> None:
    for depth, right in ((31, True), (32, True), (33, False), (100, False)):
        assert verify(Problem("countdown", "4,17->17", "", ""), "(" * depth + "17" + ")" * depth) is right


def expressions(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(inner, st.sampled_from("+-*"), inner).map("".join) | inner.map("({})".format)


@given(st.recursive(st.integers(0, 99).map(str), expressions, max_leaves=12))
def test_expressions_have_pythons_value(expression: str) -> None:
    numbers = Counter(int(token) for token in re.findall(r"\d+", expression))
    if len(expression) <= 256:
        assert evaluate(expression, numbers) == value_of(expression)
        few = numbers - Counter([next(iter(numbers))])
        assert evaluate(expression, few) is None


def test_ten_megabytes_are_wrong() -> None:
    """A verifier that converted or recursed over these would take minutes or raise; the bound refuses them unread."""
    for text in ("9" * 10_000_000, "(" * 10_000_000, " " * 10_000_000 + "26", "1+" * 5_000_000, "1," * 5_000_000):
        assert not any(verify(problem, text) for problem in (NUMERIC, GAME, Problem("sort", "", "1", "")))


def test_sort_verifies_strictly() -> None:
    problem = Problem("sort", "sort 5,2,9", "2,5,9", "")
    assert verify(problem, " 2, 5 ,9\n")
    assert not any(
        verify(problem, text) for text in ("2 5 9", "2,5", "2,5,9,", "5,2,9", "02,5,9", "2,5,９", "[2,5,9]")
    )


@pytest.mark.parametrize("name", list(TASKS))
def test_splits_are_disjoint_and_repeatable(name: str) -> None:
    wanted = [TaskSettings(name=name)]
    train, test = problems(wanted, 1, 1500, "train"), problems(wanted, 2, 150, "test")
    assert not {problem.prompt for problem in train} & {problem.prompt for problem in test}
    assert len({problem.prompt for problem in test}) == len(test) == 150
    assert {split_of(problem.prompt) for problem in train} == {"train"}
    assert problems(wanted, 1, 1500, "train") == train
    assert problems(wanted, 2, 150, "test") == test
    assert problems(wanted, 3, 150, "test") != test
    assert problems(wanted, 2, 40, "test") == test[:40]


def test_the_same_problem_of_two_tasks_is_on_one_side() -> None:
    addition = TaskSettings(name="addition", difficulty={"digits": 1})
    chain = TaskSettings(name="chain", difficulty={"terms": 2, "low": 0, "high": 9})
    train = {problem.prompt for problem in problems([addition], 0, 2000, "train")}
    test = {problem.prompt for problem in problems([chain], 0, 8, "test")}
    assert not train & test


def test_problems_do_not_depend_on_the_process() -> None:
    code = (
        "from tael.rl.tasks import problems; from tael.recipe import TaskSettings;"
        "print([p.prompt for p in problems([TaskSettings(name='chain')], 7, 5, 'test')])"
    )
    here = [problem.prompt for problem in problems([TaskSettings(name="chain")], 7, 5, "test")]
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == str(here)


def test_one_prompt_in_ten_is_test() -> None:
    share = sum(split_of(f"{a}+{b}=?") == "test" for a in range(100) for b in range(100)) / 10_000
    assert abs(share - 0.1) < 0.015


def test_weights_are_kept() -> None:
    wanted = [TaskSettings(name="chain", weight=3), TaskSettings(name="addition", weight=1)]
    counts = Counter(problem.task for problem in problems(wanted, 0, 2000, "train"))
    assert abs(counts["chain"] / 2000 - 0.75) < 0.04


def test_a_small_task_leaves_its_share_to_the_others() -> None:
    wanted = [TaskSettings(name="addition", difficulty={"digits": 1}), TaskSettings(name="chain")]
    test = problems(wanted, 0, 200, "test")
    assert len({problem.prompt for problem in test}) == 200
    assert 0 < sum(problem.task == "addition" for problem in test) < 30


def test_too_small_a_space_is_an_error() -> None:
    with pytest.raises(TaelError, match=r"asked for 200 distinct test problems, found \d+; .*digits=1"):
        problems([TaskSettings(name="addition", difficulty={"digits": 1})], 0, 200, "test")
    with pytest.raises(TaelError, match=r"'chain' with .* has no test problem"):
        problems([TaskSettings(name="chain", difficulty={"low": 3, "high": 3, "subtract": 0})], 0, 1, "test")
    with pytest.raises(TaelError, match="no tasks"):
        problems([], 0, 1, "train")
    with pytest.raises(TaelError, match="no problem found"):
        TASKS["countdown"].generate(random.Random(0), {"numbers": 6, "high": 99, "target": 3})


def test_wrong_settings_name_what_is_valid() -> None:
    with pytest.raises(TaelError, match="unknown task 'chian'; did you mean 'chain'"):
        make_task(TaskSettings(name="chian"))
    with pytest.raises(TaelError, match="no difficulty number 'term'; did you mean 'terms'"):
        make_task(TaskSettings(name="chain", difficulty={"term": 3}))
    with pytest.raises(TaelError, match="terms is 99, must be 2 to 20"):
        make_task(TaskSettings(name="chain", difficulty={"terms": 99}))
    with pytest.raises(TaelError, match="low 9 is above high 3"):
        make_task(TaskSettings(name="chain", difficulty={"low": 9, "high": 3}))
    with pytest.raises(TaelError, match="unknown task"):
        task_named("")


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_defaults_lie_in_their_ranges_and_both_ends_generate(task) -> None:
    assert task.complete({}) == task.defaults
    hardest = {key: allowed.high for key, allowed in task.ranges.items()}
    for difficulty in (task.defaults, hardest):
        problem = task.generate(random.Random(0), difficulty)
        assert problem.task == task.name and verify(problem, problem.answer)
        assert (problem.prompt + problem.answer + problem.worked).isascii()


def test_chain_looks_as_documented() -> None:
    ready = make_task(TaskSettings(name="chain"))
    problem = ready.generate(random.Random(0))
    assert re.fullmatch(r"\d+([+-]\d+){2}=\?", problem.prompt)
    assert re.fullmatch(r"\d+[+-]\d+=\d+;\d+[+-]\d+=\d+", problem.worked)
    assert ready.verify(problem, problem.answer)
