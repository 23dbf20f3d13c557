"""`tael compare` from the outside: two small recipes to a table, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from tael.cli import app
from tael.compare import Record

MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def recipe(folder: Path, stem: str, **changes: object) -> Path:
    text = folder / "text.jsonl"
    if not text.exists():
        words = [
            f"line {i}: the {i % 7} brown foxes jump over {i % 5} lazy dogs, again and again." for i in range(300)
        ]
        text.write_text("".join(json.dumps({"text": line}) + "\n" for line in words))
    table = {
        "name": stem,
        "tokenizer": {"vocab_size": 320},
        "data": {"path": str(text), "holdout": 0.05},
        "model": {"model_type": "llama", **MODEL},
        "stages": {"pretrain": {"kind": "pretrain", "steps": 6, "batch_size": 2, "sequence_length": 16}},
    }
    path = folder / f"{stem}.toml"
    path.write_text(tomli_w.dumps({**table, **changes}))
    return path


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    return result.exit_code, result.output


def test_two_recipes(tmp_path: Path) -> None:
    one = recipe(tmp_path, "one")
    two = recipe(tmp_path, "two", model={"model_type": "qwen3", **MODEL})
    run_dir = tmp_path / "out"
    code, output = call(one, two, "--seeds", 2, "--run-dir", run_dir, "--json")
    assert code == 0, output
    found = json.loads(output[output.index("{\n") :])
    assert [row["name"] for row in found["rows"]] == ["one", "two"]
    assert found["rows"][0]["reached"] == found["rows"][0]["seeds"] == 2
    assert found["baseline"] == "one"
    kept = Record(run_dir / "curves.jsonl").curves()
    assert sorted((c.name, c.seed, c.last.step) for c in kept) == [(n, s, 6) for n in ("one", "two") for s in (0, 1)]
    assert "<svg" in (run_dir / "compare.svg").read_text()
    # What is finished is not trained again; a third seed is.
    code, _ = call(one, two, "--seeds", 3, "--run-dir", run_dir)
    assert code == 0
    again = Record(run_dir / "curves.jsonl").curves()
    assert again[:4] == kept and len(again) == 6


def test_equal_recipes_and_seeds_are_equal_bits(tmp_path: Path) -> None:
    one, same = recipe(tmp_path, "one"), recipe(tmp_path, "same")
    assert call(one, same, "--seeds", 1, "--run-dir", tmp_path / "out")[0] == 0
    first, second = Record(tmp_path / "out" / "curves.jsonl").curves()
    assert [p.bits_per_byte for p in first.points] == [p.bits_per_byte for p in second.points]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": {"vocab_size": 330}}, ["two", "[tokenizer] differs from that of one"]),
        ({"base": "smollm2-135m"}, ["two: starts from a model"]),
        ({"stages": {"sft": {"kind": "sft"}}}, ["two: has no pretrain stage"]),
        (
            {"stages": {"p": {"kind": "pretrain", "steps": 6, "sequence_length": 24}}},
            ["two: sequence_length 24 differs from one's 16"],
        ),
        ({"name": "one"}, ["two recipes are named 'one'"]),
    ],
)
def test_what_does_not_compare(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    one, two = recipe(tmp_path, "one"), recipe(tmp_path, "two", **changes)
    code, output = call(one, two, "--run-dir", tmp_path / "out")
    assert code == 1
    assert all(word in " ".join(output.split()) for word in words), output
    assert not (tmp_path / "out").exists()


def test_one_is_no_comparison(tmp_path: Path) -> None:
    code, output = call(recipe(tmp_path, "one"))
    assert code == 1 and "Name two recipes or more" in output
    code, output = call(recipe(tmp_path, "one"), recipe(tmp_path, "two"), "--baseline", "tow")
    assert code == 1 and "no recipe is named 'tow'" in output and "two" in output
