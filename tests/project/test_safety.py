"""Nothing in src/ evaluates or unpickles what comes from outside, and nothing in the repository names a machine."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))

FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {
    "pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "sympy", "code", "codeop",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "os.system", "os.popen",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "pandas.read_pickle", "pandas.eval",
}  # fmt: skip
FORBIDDEN_KEYWORDS = {("weights_only", False), ("allow_pickle", True), ("shell", True), ("trust_remote_code", True)}


def findings(source: str) -> Iterator[str]:
    """What in `source` runs or unpickles text, as `line: name`."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # what a local name stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if module.split(".")[0] in FORBIDDEN_MODULES:
                    yield f"{node.lineno}: {module}"
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_BUILTINS and node.id not in names:
            yield f"{node.lineno}: {node.id}"
        elif isinstance(node, ast.Attribute | ast.Name) and _full_name(node, names) in FORBIDDEN_CALLS:
            yield f"{node.lineno}: {_full_name(node, names)}"
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if (keyword.arg, value) in FORBIDDEN_KEYWORDS:
                    yield f"{node.lineno}: {keyword.arg}={value}"


def _full_name(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_or_unpickles_text(path):
    assert list(findings(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "bad",
    [
        "eval(text)",
        "exec(text)",
        "map(eval, texts)",
        "compile(text, 'x', 'eval')",
        "import pickle",
        "from pickle import loads",
        "import numpy, marshal",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path)",
        "from torch import load\nload(path)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "from yaml import unsafe_load as read\nread(text)",
        "from sympy.parsing.sympy_parser import parse_expr",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "load(path, weights_only=False)",
        "import numpy\nnumpy.load(path, allow_pickle=True)",
        "import os\nos.system(text)",
    ],
)
def test_the_check_finds(bad):
    assert list(findings(bad))


@pytest.mark.parametrize(
    "good",
    [
        "model.eval()",
        "def evaluate(text): return text",
        "import yaml\nyaml.safe_load(text)",
        "import re\nre.compile('x')",
        "from re import compile\ncompile('x')",
        "import json\njson.load(file)",
        "import torch\nmodel = torch.compile(model)",
        "import subprocess\nsubprocess.run([program, text])",
    ],
)
def test_the_check_leaves_alone(good):
    assert list(findings(good)) == []


# Written in two parts, so that this file does not find itself.
MACHINE = re.compile(
    "|".join(
        (
            r"(?<![\w.])/" + r"(?:home|root|Users)/\w",
            r"(?<![\w.])/" + r"(?:tmp|var/tmp|work|mnt)/\w",
            r"/opt/" + r"(?:wheels|pypi)",
            r"file:" + r"///",
            r"--(?:extra-)?" + r"index-url|--find-" + r"links|--trusted-" + r"host",
            # but for the assistant's usual address
            r"https?://(?!localhost:8000)[^\s\"')]*(?:/" + r"simple\b|artifactory|nexus|:\d{4,5}\b)",
            r"https?://" + r"(?:10|127|192\.168|172\.\d+)\.\d+",
        )
    )
)


def tracked_files() -> list[Path]:
    """Files that are in git or would be added; none outside a clone."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_machine_or_a_package_index():
    files = tracked_files()
    if not files:
        pytest.skip("not in a git clone")
    found = []
    for path in files:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture
        found += [
            f"{path.relative_to(ROOT)}:{i}: {line.strip()[:100]}"
            for i, line in enumerate(lines, 1)
            if MACHINE.search(line)
        ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "see /ho" + "me/someone/x",
        "open('/t" + "mp/x')",
        "pip install --index" + "-url x",
        "http://mirror.example/sim" + "ple/torch",
        "fi" + "le:///srv/x",
    ],
)
def test_the_machine_check_finds(line):
    assert MACHINE.search(line)


@pytest.mark.parametrize(
    "line", ["https://tatoeba.org/home/", "a/tmp/b", "docs/home.md", "https://github.com/a/b/simplest"]
)
def test_the_machine_check_leaves_alone(line):
    assert not MACHINE.search(line)
