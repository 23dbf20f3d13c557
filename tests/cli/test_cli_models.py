"""Commands on a model: complete, eval, convert, models, pull; and the command line itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tael
from tael.cli import app
from tael.cost.ledger import Ledger
from tael.failures import explain
from tael.weights import load_model


def test_complete(call, model):
    result = call("complete", model, "What is", "--max-tokens", "5")
    assert result.exit_code == 0 and result.stdout.startswith("What is")
    told = [json.loads(call("complete", model, "What is", "--max-tokens", "5", "--json").stdout) for _ in range(2)]
    assert told[0]["tokens"] == 5 and told[0]["finish_reason"] == "length"
    assert told[0]["text"] == told[1]["text"]
    assert result.stdout == f"What is{told[0]['text']}\n"


def test_complete_from_standard_input_fills_the_context_at_most(call, model):
    told = json.loads(call("complete", model, "-", "--json", text="x " * 40).stdout)
    assert told["prompt"] == "x " * 40 and 1 <= told["tokens"] <= 128


def test_complete_refuses(fails, model):
    assert "do not fit the model's context of 160" in fails("complete", model, "a", "--max-tokens", "200", "--json")
    assert "top_p must be in" in fails("complete", model, "a", "--top-p", "2", "--json")
    assert "temperature must be 0 or more" in fails("complete", model, "a", "--temperature=-1", "--json")
    assert "device 'nothing'" in fails("complete", model, "a", "--device", "nothing")


@pytest.mark.parametrize(
    "command", [("complete", "nope", "x"), ("chat", "nope"), ("eval", "nope"), ("convert", "nope", "y", "--to", "hf")]
)
def test_an_unknown_model_is_one_line(fails, command):
    assert "nope: no such model folder or run" in fails(*command)


def test_a_damaged_model_is_one_line(fails, model, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.safetensors").write_bytes(b"junk" * 100)
    assert "damaged or incomplete safetensors file" in fails("complete", folder, "x")


def test_eval_with_tasks_and_text(call, model, tmp_path):
    (tmp_path / "more.txt").write_text("The quick brown fox.\n" * 200)
    arguments = (
        "eval",
        model,
        "--task",
        "chain:terms=2,low=10,high=49,subtract=0",
        "--problems",
        "6",
        "--text",
        "more.txt",
    )
    rows = json.loads(call(*arguments, "--json").stdout)
    assert [row.get("mode") for row in rows] == ["free", "think", "direct", None]
    assert all(row["total"] == 6 for row in rows[:3]) and rows[3]["bits_per_byte"] > 1
    table = call(*arguments).stdout
    assert "right, free" in table and "bits per byte" in table
    assert all(len(line) <= 80 for line in table.splitlines())
    entries = Ledger(Path("runs/ledger.sqlite")).entries()
    assert [(e.run, e.stage, e.kind) for e in entries] == [(model.stem, "eval", "evaluation")] * 4
    assert all(e.tokens > 0 and e.flops > 0 and e.seconds > 0 and e.dollars > 0 for e in entries)


def test_eval_takes_problems_and_text_from_the_run(call, run_folder):
    rows = json.loads(call("eval", "tiny", "--problems", "3", "--json").stdout)
    assert [row["suite"] for row in rows] == ["reasoning"] * 3 + ["text"]
    summary = json.loads((run_folder / "summary.json").read_text())
    assert {row["mode"]: row["correct"] for row in rows[:3]} == {
        mode: value["correct"] for mode, value in summary["accuracy"]["after"].items()
    }
    [text] = json.loads(call("eval", "runs/tiny/pretrain/model", "--suite", "text", "--json").stdout)
    assert text["bits_per_byte"] == pytest.approx(summary["bits_per_byte"], abs=1e-4)
    lines = json.loads(call("costs", "tiny", "--json").stdout)
    assert [line["entries"] for line in lines if line["stage"] == "eval" and line["kind"] == "evaluation"] == [3]


def test_eval_refuses(fails, model, tmp_path):
    assert "unknown suite 'reasonin'; did you mean 'reasoning'?" in fails("eval", model, "--suite", "reasonin")
    assert "no run says which problems" in fails("eval", model, "--suite", "reasoning")
    assert "--text FILE" in fails("eval", model, "--suite", "text")
    assert "no such file" in fails("eval", model, "--suite", "text", "--text", "missing.txt")
    assert "unknown task 'chian'; did you mean 'chain'?" in fails("eval", model, "--task", "chian")
    assert "did you mean 'terms'?" in fails("eval", model, "--task", "chain:term=3")
    assert "no NAME=NUMBER" in fails("eval", model, "--task", "chain:terms=three")


def test_convert(call, fails, model, tmp_path):
    assert call("convert", model, "as-is", "--to", "hf").stdout == "as-is\n"
    assert (tmp_path / "as-is/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert (tmp_path / "as-is/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert call("convert", model, "half", "--to", "hf", "--dtype", "bf16").exit_code == 0
    half, full = load_model(tmp_path / "half").state_dict(), load_model(model).state_dict()
    assert all(torch.allclose(half[name], full[name], rtol=1e-2) for name in full)
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert call("convert", "half", "again", "--to", "hf").exit_code == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "half/model.safetensors").read_bytes()
    assert "is there already" in fails("convert", model, "half", "--to", "hf")
    assert call("convert", model, "half", "--to", "hf", "--overwrite").exit_code == 0
    assert "--quant does not go with --to hf" in fails("convert", model, "x", "--to", "hf", "--quant", "q8_0")


def test_convert_to_gguf_and_back(call, fails, model, tmp_path):
    assert call("convert", model, "m.gguf", "--to", "gguf", "--quant", "f32").stdout == "m.gguf\n"
    told = [
        json.loads(call("complete", each, "What is", "--max-tokens", "5", "--json").stdout)
        for each in (model, tmp_path / "m.gguf")
    ]
    assert told[0]["text"] == told[1]["text"]
    assert call("convert", "m.gguf", "back", "--to", "hf").exit_code == 0
    before, after = load_model(model).state_dict(), load_model(tmp_path / "back").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "must be a file that ends in .gguf" in fails("convert", model, "x", "--to", "gguf")
    assert "--dtype does not go with --to gguf" in fails(
        "convert", model, "x.gguf", "--to", "gguf", "--dtype", "bf16"
    )
    assert "is there already" in fails("convert", model, "m.gguf", "--to", "gguf")
    assert call("convert", model, "m.gguf", "--to", "gguf", "--overwrite").exit_code == 0


def test_models_and_pull(call, fails, run_folder):
    told = json.loads(call("models", "--json").stdout)
    named = {source["name"]: source for source in told["sources"]}
    assert named["chitchat"]["licence"] == "MIT" and named["chitchat"]["package"].startswith("chitchat-dataset==")
    assert told["models"] == [{"name": "tiny", "model": "runs/tiny/rl/model"}]
    checkpoints = {row["name"]: row for row in told["checkpoints"]}
    assert checkpoints["smollm2-135m"]["licence"] == "Apache-2.0" and not checkpoints["smollm2-135m"]["pulled"]
    assert checkpoints["moonlight-16b-a3b"]["memory_bytes"]["int4"] < 9.1e9
    table = call("models").stdout
    assert "chitchat" in table and "tiny" in table and "deepseek-v2-lite-chat" in table
    assert all(len(line) <= 80 for line in table.splitlines())
    pulled = call("pull", "python-stdlib")
    assert Path(pulled.stdout.strip()).is_dir() and "PSF-2.0" in pulled.stderr
    assert "unknown name 'chitcat'; did you mean 'chitchat'?" in fails("pull", "chitcat")


@pytest.mark.parametrize(
    "arguments",
    [
        ("nothing",),
        ("run",),
        ("run", "a.toml", "--what"),
        ("complete", "m"),
        ("convert", "a", "b", "--to", "onnx"),
        ("eval", "m", "--problems", "many"),
    ],
)
def test_wrong_usage_is_2(call, arguments):
    result = call(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_every_command_has_help(call):
    for name in [command.name or command.callback.__name__ for command in app.registered_commands]:
        assert call(name, "--help").exit_code == 0
        assert name in call("--help").stdout
    assert call("--version").stdout == f"tael {tael.__version__}\n"


def _tael(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tael", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_help_does_not_wait_for_torch():
    code = "import sys, tael.cli; sys.exit(bool({'torch', 'pydantic', 'rich', 'tokenizers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert _tael("--version").stdout == f"tael {tael.__version__}\n"


def test_a_reader_that_leaves_early_is_no_error():
    command = f"'{sys.executable}' -m tael models | head -n 1; exit ${{PIPESTATUS[1]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, "-m", "tael", "models", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "space" in done.stderr


def test_what_is_a_users_failure_and_what_is_a_bug():
    full = RuntimeError("save failed")
    full.__cause__ = OSError("I/O error: No space left on device (os error 28)")
    assert "no space left" in (explain(full) or "")
    assert explain(PermissionError(13, "Permission denied", "x/y")) == "x/y: Permission denied"
    assert explain(tael.errors.TaelError("two\nlines")) == "two lines"
    assert "out of memory" in (explain(torch.cuda.OutOfMemoryError("CUDA")) or "")
    assert explain(ValueError("a bug")) is None and explain(RuntimeError("a bug")) is None


def test_a_bug_keeps_its_traceback(call, model, monkeypatch):
    def broken(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(tael, "load_model", broken)
    result = call("complete", model, "x")
    assert isinstance(result.exception, ValueError)


def test_importing_tael_is_cheap_and_offers_the_api(model):
    code = "import sys, tael; assert 'torch' not in sys.modules; tael.Engine; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=os.environ | {"OMP_NUM_THREADS": "1"})
    transformer, tokenizer = tael.load_model(model), tael.load_tokenizer(model)
    assert transformer(torch.tensor([[1, 2, 3]])).shape == (1, 3, 300)
    events = list(tael.Engine(transformer, tokenizer).stream("What", max_tokens=3))
    assert len(events) == 3
    assert tael.load_tokenizer(model / "tokenizer.json").vocab_size == tokenizer.vocab_size
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tael.nothing  # noqa: B018
