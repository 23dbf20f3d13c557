"""The project's own promises: import direction, short files, recipes that load, documents that name real things."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tael.cli import app
from tael.recipe import load_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_room_imports_only_the_rooms_before_it():
    program = Path(sys.executable).with_name("lint-imports")
    if not program.exists() and shutil.which("lint-imports") is None:
        pytest.skip("import-linter is not installed")
    command = [program if program.exists() else "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_loads(path):
    assert load_recipe(path).name


def test_what_is_not_python_is_packaged():
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["tael.cost"]
    templates = {f"templates/*{path.suffix}" for path in (ROOT / "src/tael/cost/templates").iterdir()}
    assert templates <= set(packaged)


def test_the_readme_names_every_command_and_only_files_that_are_there():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert all(f"`tael {name}" in README for name in commands)
    named = re.findall(r"\]\(([^)#:]+)\)|`((?:docs|recipes|bench|src|tests)/[\w./-]*)`", README)
    missing = {a or b for a, b in named if not (ROOT / (a or b)).exists()}
    assert missing == set()


def test_make_help_lists_the_targets():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    for target in ("setup", "demo", "test", "lint", "bench", "clean"):
        assert f"make {target}" in done.stdout
