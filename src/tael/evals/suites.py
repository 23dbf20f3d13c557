"""What `tael eval` runs: named suites over a model, as rows for --json and as a table.

`reasoning` asks held-out problems in every way of answering, `text` measures bits per byte. What to ask and read
comes from the run that made the model, unless the caller says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from tael.data import Document, Tokenizer
from tael.data.files import read_jsonl
from tael.engine.work import sum_work
from tael.errors import TaelError, did_you_mean
from tael.evals.perplexity import bits_per_byte
from tael.evals.reasoning import MODES, reasoning_accuracy
from tael.model.transformer import Transformer
from tael.recipe import PretrainSettings, Recipe, RlSettings, SftSettings, TaskSettings, load_recipe
from tael.rl.tasks import make_task, problems
from tael.train.objective import Work

SUITES = ("reasoning", "text")
Row = dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """The run a model folder belongs to."""

    directory: Path
    recipe: Recipe

    def tasks(self) -> list[TaskSettings]:
        """The tasks of the run's last stage that has some."""
        found = [stage.tasks for stage in self.recipe.stages.values() if isinstance(stage, SftSettings | RlSettings)]
        return next((tasks for tasks in reversed(found) if tasks), [])

    def answer_tokens(self) -> int:
        """Tokens an answer may have: what RL allowed."""
        return max((s.max_tokens for s in self.recipe.stages.values() if isinstance(s, RlSettings)), default=64)

    def pretraining(self) -> PretrainSettings:
        """How the run's text was read; defaults when it had no pretraining."""
        found = (s for s in self.recipe.stages.values() if isinstance(s, PretrainSettings))
        return next(found, PretrainSettings())

    def held_out(self) -> list[Document]:
        """The documents the run kept out of training, as many as it evaluates on."""
        path = self.directory / "data" / "held-out.jsonl"
        if not path.exists():
            return []
        rows = [Document(str(row.get("text", "")), str(row.get("source", ""))) for _, row in read_jsonl(path)]
        return rows[: self.pretraining().eval_documents]


def find_origin(model_folder: Path) -> Origin | None:
    """The run of RUN/STAGE/model; None for a model from elsewhere."""
    run = model_folder.absolute().parent.parent
    return Origin(run, load_recipe(run / "recipe.toml")) if (run / "recipe.toml").is_file() else None


def parse_task(text: str) -> TaskSettings:
    """`chain:terms=3,low=10` -> TaskSettings; raises TaelError naming the unknown task or number."""
    name, _, rest = text.partition(":")
    difficulty: dict[str, int] = {}
    for pair in filter(None, (part.strip() for part in rest.split(","))):
        key, separator, value = pair.partition("=")
        try:
            difficulty[key.strip()] = int(value)
        except ValueError:
            separator = ""
        if not separator:
            raise TaelError(f"--task {text}: '{pair}' is no NAME=NUMBER; write it as chain:terms=3,low=10,high=49")
    task = TaskSettings(name=name.strip(), difficulty=difficulty)
    make_task(task)
    return task


def check_suites(names: Sequence[str]) -> None:
    """Raise TaelError for a suite there is not."""
    for name in names:
        if name not in SUITES:
            raise TaelError(f"unknown suite '{name}'{did_you_mean(name, SUITES)}")


def reasoning_rows(
    model: Transformer, tokenizer: Tokenizer, tasks: list[TaskSettings], count: int, seed: int, max_tokens: int
) -> tuple[list[Row], Work]:
    """One row a way of answering: greedy accuracy on `count` held-out problems of the set `seed`; what it took."""
    asked, rows, works = problems(tasks, seed, count, "test"), [], []
    for mode in MODES:
        result = reasoning_accuracy(model, tokenizer, asked, mode, max_tokens)
        low, high = result.accuracy.interval()
        accuracy = {"accuracy": result.accuracy.share, "low": low, "high": high}
        rows.append({"suite": "reasoning", "mode": mode, **accuracy, **result.as_dict()})
        works.append(result.work)
    return rows, sum_work(works)


def text_rows(
    model: Transformer, tokenizer: Tokenizer, documents: Sequence[Document], sequence_length: int
) -> tuple[list[Row], Work]:
    """One row: bits per byte over `documents`, read in windows of `sequence_length` tokens; what it took."""
    result = bits_per_byte(model, tokenizer, documents, min(sequence_length, model.config.max_position_embeddings))
    return [{"suite": "text", **result.as_dict()}], result.work


def results_table(rows: Sequence[Row], title: str) -> Table:
    """The rows for the terminal; fits 80 columns."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("Suite", no_wrap=True)
    table.add_column("Measure", no_wrap=True)
    for name in ("Result", "95%", "Over", "Length", "Thinks"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["suite"], *(_reasoning_cells(row) if row["suite"] == "reasoning" else _text_cells(row)))
    return table


def _reasoning_cells(row: Row) -> tuple[str, ...]:
    interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
    length, thinks = f"{row['completion_tokens']:.1f}", f"{row['think_rate']:.0%}"
    return f"right, {row['mode']}", f"{row['accuracy']:.1%}", interval, str(row["total"]), length, thinks


def _text_cells(row: Row) -> tuple[str, ...]:
    low, high = (row["bits_per_byte"] + sign * row["bits_per_byte_half_width"] for sign in (-1, 1))
    return "bits per byte", f"{row['bits_per_byte']:.3f}", f"{low:.3f} to {high:.3f}", str(row["documents"]), "", ""
