"""A tiny model and a tiny run, made once, and a caller for the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_recipe import SHAPE, SHAPE_LINES
from typer.testing import CliRunner

from tael.cli import app
from tael.data import train_tokenizer
from tael.model import ModelConfig, build_model
from tael.weights import save_model

TEXTS = ["What is 12+30-4? It is 38, says the quick brown fox.\n", "The lazy dog says nothing at all, as ever.\n"]
RECIPE = """
name = "tiny"
[tokenizer]
vocab_size = 320
[data]
path = "book.txt"
holdout = 0.2
[model]
{shape}
[stages.pretrain]
kind = "pretrain"
steps = 4
batch_size = 2
sequence_length = 32
precision = "fp32"
eval_every = 2
eval_documents = 2
[stages.sft]
kind = "sft"
steps = 3
examples = 60
batch_size = 4
sequence_length = 64
precision = "fp32"
eval_every = 3
eval_problems = 3
tasks = [{{ name = "chain", difficulty = {{ terms = 2, low = 10, high = 49, subtract = 0 }} }}]
[stages.rl]
kind = "rl"
steps = 2
problems = 2
group = 2
precision = "fp32"
eval_every = 2
eval_problems = 3
max_tokens = 8
require_thinking_gain = false
tasks = [{{ name = "chain", difficulty = {{ terms = 2, low = 10, high = 49, subtract = 0 }} }}]
"""


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`call("eval", ...)` in an empty working directory; the result has exit_code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TAEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))  # whose server this machine has is no test's concern

    def run(*arguments: str | Path, text: str | None = None):
        return CliRunner().invoke(app, [str(a) for a in arguments], input=text, prog_name="tael")

    return run


@pytest.fixture
def fails(call: Callable) -> Callable:
    """Call a command that must fail with exit code 1, nothing but one line on stderr; returns the line."""

    def run(*arguments: str | Path, text: str | None = None) -> str:
        result = call(*arguments, text=text)
        assert result.exit_code == 1, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        lines = result.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("tael: "), result.stderr
        return lines[0]

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model that writes any token with nearly the same probability."""
    tokenizer = train_tokenizer(TEXTS * 4, 300)
    config = ModelConfig.from_dict(
        SHAPE | {"vocab_size": 300, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    )
    folder = tmp_path_factory.mktemp("models") / "untrained"
    save_model(build_model(config), folder, tokenizer)
    return folder


def write_recipe(folder: Path) -> Path:
    """tiny.toml and its book.txt in `folder`."""
    words = TEXTS[0].split() + TEXTS[1].split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 40)) for i in range(1, 500)]
    (folder / "book.txt").write_text("\n\n".join(lines), encoding="utf-8")
    (folder / "tiny.toml").write_text(RECIPE.format(shape=SHAPE_LINES), encoding="utf-8")
    return folder / "tiny.toml"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """tiny.toml and its book.txt in the test's working directory."""
    return write_recipe(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/tiny, run once to its end."""
    folder = tmp_path_factory.mktemp("finished")
    write_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(app, ["run", "tiny.toml"], prog_name="tael")
    assert result.exit_code == 0, result.output
    (folder / "first-output.txt").write_text(result.stdout, encoding="utf-8")
    return folder


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run in the test's working directory; its runs/tiny."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs" / "tiny"
