"""Two processes under torchrun (gloo, fully_shard) train as one does: losses, weights, loads, checkpoints."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tael.rl import rollout
from tael.train import Parallel, Stopped

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

WORKER = Path(__file__).with_name("worker.py")
specification = importlib.util.spec_from_file_location("tael_distributed_worker", WORKER)
assert specification is not None and specification.loader is not None
worker = importlib.util.module_from_spec(specification)
specification.loader.exec_module(worker)

ALONE = Parallel(torch.device("cpu"))
JOBS: dict[str, dict[str, Any]] = {
    "muon": {"kind": "lm", "steps": 6},
    "adamw": {"kind": "lm", "steps": 4, "matrices": "adamw", "micro": 2},
    "bf16": {"kind": "lm", "steps": 4, "precision": "bf16"},
    "interrupted": {"kind": "lm", "steps": 6, "interrupt": [1, 3]},
    "taken_over": {"kind": "lm", "steps": 6},
    "full": {"kind": "lm", "steps": 6, "full_disk": 3},
    "rl": {"kind": "rl", "steps": 4, "loss": "dapo"},
    "rl_few_rows": {"kind": "rl", "steps": 2, "loss": "grpo", "micro": 7},
    "rl_bf16": {"kind": "rl", "steps": 2, "loss": "dapo", "precision": "bf16"},
}
JOBS = {name: {"name": name, **job} for name, job in JOBS.items()}


@pytest.fixture(scope="module", autouse=True)
def reward_comes_back() -> Iterator[None]:
    """The worker puts a reward of its own in place: here, in the tests' process, it must not stay."""
    kept = rollout.reward
    yield
    rollout.reward = kept


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of runs with one process, folder of the same runs with two)."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for name in ("muon", "adamw", "bf16", "rl", "rl_few_rows", "rl_bf16"):
        alone = worker.build(JOBS[name], ALONE, one)
        alone.run()
    with pytest.raises(Stopped):  # one process stops here, two go on from it
        worker.build({**JOBS["taken_over"], "interrupt": [0, 3]}, ALONE, two).run()
    (two / "jobs.json").write_text(json.dumps(list(JOBS.values())))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(WORKER), str(two)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return one, two


def lines(directory: Path, kind: str) -> list[dict[str, Any]]:
    clock = ("kind", "seconds", "tokens_per_second")
    read = map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in line.items() if k not in clock} for line in read if line["kind"] == kind]


def outcomes(directory: Path) -> list[dict[str, Any]]:
    return [json.loads((directory / f"outcome-{rank}.json").read_text()) for rank in (0, 1)]


def weights(job: dict[str, Any], directory: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint, read by one process."""
    trainer = worker.build(job, ALONE, directory)
    assert trainer.resume() > 0
    return trainer._tensors()


def assert_equal_steps(alone: list[dict[str, Any]], together: list[dict[str, Any]], tolerance: float = 1e-5) -> None:
    """Muon's bf16 turns a last bit of a gradient into 1e-5 of a norm; every loss is held to `tolerance`."""
    assert len(alone) == len(together)
    for first, second in zip(alone, together, strict=True):
        assert second.pop("grad_norm", 0) == pytest.approx(first.pop("grad_norm", 0), rel=1e-4)
        assert second == pytest.approx(first, rel=tolerance, abs=tolerance), first["step"]


def assert_equal_runs(job: dict[str, Any], one: Path, two: Path, tolerance: float = 1e-5) -> None:
    name = job["name"]
    assert_equal_steps(lines(one / name, "step"), lines(two / name, "step"), tolerance)
    loads = [lines(folder / name, "load") for folder in (one, two)]
    assert loads[0] == loads[1] and loads[0]
    assert lines(one / name, "eval") == lines(two / name, "eval")


def assert_equal_weights(job: dict[str, Any], one: Path, two: Path, tolerance: float) -> None:
    alone, together = weights(job, one), weights(job, two)
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    biases = [name for name in alone if name.endswith("e_score_correction_bias")]
    assert all(torch.equal(together[name], alone[name]) for name in biases)
    assert any(alone[name].any() for name in biases)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_language_modelling(runs: tuple[Path, Path], name: str) -> None:
    """MoE, MTP, balance loss, clip, masked tokens spread unevenly; every term of every step, loads and biases."""
    assert_equal_runs(JOBS[name], *runs)
    assert_equal_weights(JOBS[name], *runs, tolerance=1e-4)


def test_gathered_model_and_counts(runs: tuple[Path, Path]) -> None:
    """The whole model comes out in the main process; tokens and FLOPs are counted over both."""
    alone = weights(JOBS["adamw"], runs[0])
    total = sum(float(t.double().abs().sum()) for n, t in alone.items() if n.startswith("model.") and "bias" not in n)
    main, other = outcomes(runs[1] / "adamw")
    assert main["gathered"] == pytest.approx(total, rel=1e-5)
    state = json.loads((runs[0] / "adamw" / "step-000004" / "state.json").read_text())
    for outcome in (main, other):
        assert outcome["tokens"] == state["tokens"] and outcome["flops"] == pytest.approx(state["flops"])
        assert not outcome["separate_twin"]


def test_bf16(runs: tuple[Path, Path]) -> None:
    """Mixed precision of fully_shard in place of the twin: near, not equal; parameters and state stay fp32."""
    alone, together = lines(runs[0] / "bf16", "step"), lines(runs[1] / "bf16", "step")
    for first, second in zip(alone, together, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=2e-3)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=3e-2)
    assert all(not outcome["separate_twin"] for outcome in outcomes(runs[1] / "bf16"))
    assert all(tensor.dtype == torch.float32 for tensor in weights(JOBS["bf16"], runs[1]).values())


def test_one_interrupted_process_stops_both_and_one_goes_on(runs: tuple[Path, Path]) -> None:
    """Ctrl-C reaches rank 1 only. Both stop after step 3 with a checkpoint, from which a single process goes on."""
    one, two = runs
    for outcome in outcomes(two / "interrupted"):
        assert outcome["error"] == "Stopped: stopped at step 3 of 6; the same command goes on from there"
    trainer = worker.build({**JOBS["interrupted"], "interrupt": None}, ALONE, two)
    assert trainer.resume() == 3
    trainer.run()
    assert_equal_steps(lines(one / "muon", "step"), lines(two / "interrupted", "step"))


def test_two_go_on_from_one(runs: tuple[Path, Path]) -> None:
    one, two = runs
    assert all(o["error"] is None and o["steps"] == 6 for o in outcomes(two / "taken_over"))
    assert_equal_steps(lines(one / "muon", "step"), lines(two / "taken_over", "step"))


def test_full_disk_ends_both(runs: tuple[Path, Path]) -> None:
    """The main process alone finds the disk full: the other one does not wait for ever, step 2 stays."""
    for outcome in outcomes(runs[1] / "full"):
        assert outcome["error"].startswith("TaelError") and "step-000004: cannot write" in outcome["error"]
    assert [p.name for p in (runs[1] / "full").glob("*step-*")] == ["step-000002"]


def test_no_thread_of_the_process_group_outlives_it(runs: tuple[Path, Path]) -> None:
    """One that does can abort a process whose work is done; see `Parallel.finish`."""
    for rank in (0, 1):
        threads = json.loads((runs[1] / f"threads-{rank}.json").read_text())
        if not threads:
            pytest.skip("this system does not name a process's threads")
        assert not [name for name in threads if "gloo" in name]


@pytest.mark.parametrize("name", ["rl", "rl_few_rows"])
def test_reinforcement_learning(runs: tuple[Path, Path], name: str) -> None:
    """Both sample the same completions; each trains on its rows, filled up where there are too few."""
    assert_equal_runs(JOBS[name], *runs, tolerance=2e-5)
    assert any(line["kept_groups"] for line in lines(runs[1] / name, "step"))
    assert outcomes(runs[1] / name)[1]["tokens"] == lines(runs[1] / name, "step")[-1]["tokens"]


def test_reinforcement_learning_bf16(runs: tuple[Path, Path]) -> None:
    """Sampling through a sharded model in mixed precision; the sampler is as near the trainer as with one process."""
    for outcome in outcomes(runs[1] / "rl_bf16"):
        assert outcome["error"] is None and outcome["steps"] == 2
    gaps = [[line["logprob_gap"] for line in lines(f / "rl_bf16", "step") if "logprob_gap" in line] for f in runs]
    assert gaps[0] and max(gaps[1]) < 2 * max(gaps[0]) + 0.01
