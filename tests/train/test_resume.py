"""Stopped and gone on equals never stopped, bit for bit; damaged and full disks end in one clear line."""

from __future__ import annotations

import errno
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tael.data import Message, Tokenizer, encode_example, train_tokenizer
from tael.engine import Engine, SamplingParams
from tael.errors import TaelError
from tael.model import ModelConfig, build_model
from tael.recipe import RlSettings, TaskSettings
from tael.rl.grpo import PolicyGradient
from tael.rl.rollout import Rollouts
from tael.rl.tasks import problems
from tael.train import Parallel, Stopped, Trainer, TrainerSetup
from tael.train import checkpoint as checkpoints
from tael.train.checkpoint import list_checkpoints


def everything(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer._tensors().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def stop_after(step: int) -> Any:
    def on_step(done: int, metrics: dict[str, Any]) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def evaluation(model, step: int) -> dict[str, Any]:
    """Uses the model, its caches and the global generator, as a careless callback might."""
    torch.manual_seed(step)
    completion = Engine(model).generate([[1, 2, 3]], SamplingParams(max_tokens=3, seed=step))[0]
    return {"first": completion.tokens[0]}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stops", [[1], [2, 5]])
def test_language_modelling(make_trainer, read_metrics, precision: str, stops: list[int]) -> None:
    options = {"steps": 7, "precision": precision, "micro_batches": 2, "balance_loss_weight": 0.01}
    whole = make_trainer("whole", setup={"evaluate": evaluation}, **options)
    whole.run()
    for step in stops:
        with pytest.raises(Stopped, match=f"stopped at step {step} of 7"):
            make_trainer("cut", setup={"evaluate": evaluation, "on_step": stop_after(step)}, **options).run()
    resumed = make_trainer("cut", setup={"evaluate": evaluation}, **options)
    resumed.run()
    assert_same(everything(whole), everything(resumed))
    assert read_metrics(whole.setup.directory) == read_metrics(resumed.setup.directory)
    assert [p.name for p in list_checkpoints(resumed.setup.directory)] == ["step-000006", "step-000007"]
    for key in ("steps", "tokens", "flops", "metrics"):
        assert getattr(whole.result, key) == getattr(resumed.result, key)


def test_lost_steps_are_taken_again(make_trainer, read_metrics) -> None:
    """Killed after step 5 with a checkpoint at 4: step 5 is logged once, half a line is dropped."""
    whole = make_trainer("whole", steps=6)
    whole.run()

    class Killed(BaseException):
        pass

    def kill(done: int, metrics: dict[str, Any]) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        make_trainer("killed", steps=6, setup={"on_step": kill}).run()
    directory = whole.setup.directory.parent / "killed"
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    (directory / ".step-000006.partial").mkdir()
    resumed = make_trainer("killed", steps=6)
    assert resumed.resume() == 4
    resumed.run()
    assert_same(everything(whole), everything(resumed))
    assert read_metrics(whole.setup.directory) == read_metrics(directory)
    assert not list(directory.glob(".step-*"))


def test_finished_stage_runs_no_further(make_trainer) -> None:
    first = make_trainer("done", steps=3)
    first.run()
    again = make_trainer("done", steps=3, setup={"on_step": stop_after(1)})
    assert again.run().steps == 3
    assert_same(everything(first), everything(again))


# ------------------------------------------------------------------------- RL


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["What is 1 + 2? 0123456789 Answer: three." * 4], 360)


RL = RlSettings(
    tasks=[TaskSettings(name="addition", difficulty={"digits": 1})],
    problems=4,
    group=4,
    max_tokens=6,
    mode="direct",
    checkpoint_every=2,
    eval_every=2,
    bias_update_speed=1e-3,
)


def warm_model(tokenizer: Tokenizer, config: ModelConfig) -> Any:
    """A model that sometimes answers with one digit and ends: RL then has something to learn from."""
    model = build_model(replace(config, vocab_size=tokenizer.vocab_size), seed=5, zero_residual=False)
    task = problems(RL.tasks, 0, 64, "train")
    examples = [encode_example(tokenizer, [Message("user", p.prompt), Message("assistant", p.answer)]) for p in task]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    width = max(len(e.tokens) for e in examples)
    tokens = torch.tensor([e.tokens + [0] * (width - len(e.tokens)) for e in examples])
    mask = torch.tensor([e.loss_mask + [False] * (width - len(e.loss_mask)) for e in examples])
    for _ in range(25):
        logprobs = model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        loss = -(logprobs * mask[:, 1:]).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def rl_trainer(directory: Path, model: Any, tokenizer: Tokenizer, precision: str, micro: int = 1, **setup) -> Trainer:
    directory.mkdir(exist_ok=True)
    settings = RL.model_copy(update={"precision": precision, "steps": 5})
    parts = TrainerSetup(directory, 5, settings, Parallel(torch.device("cpu")), micro, 1e-3)
    clone = build_model(model.config)
    clone.load_state_dict(model.state_dict())
    source = Rollouts(settings, tokenizer, seed=3)
    return Trainer(clone, source, PolicyGradient(settings), replace(parts, **setup))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_reinforcement_learning(tmp_path: Path, tokenizer, tiny, read_metrics, precision: str) -> None:
    model = warm_model(tokenizer, tiny)
    whole = rl_trainer(tmp_path / "whole", model, tokenizer, precision)
    whole.run()
    with pytest.raises(Stopped):
        rl_trainer(tmp_path / "cut", model, tokenizer, precision, evaluate=evaluation, on_step=stop_after(3)).run()
    resumed = rl_trainer(tmp_path / "cut", model, tokenizer, precision, evaluate=evaluation)
    resumed.run()
    assert_same(everything(whole), everything(resumed))
    found = [[m for m in read_metrics(tmp_path / n) if m["kind"] != "eval"] for n in ("whole", "cut")]
    assert found[0] == found[1]
    assert any(m.get("kept_groups") for m in found[0])  # it did learn something
    start = {f"model.{n}": t for n, t in model.state_dict().items()}
    assert not torch.equal(start["model.lm_head.weight"], everything(whole)["model.lm_head.weight"])


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo", "gspo", "cispo"])
def test_rl_accumulation_equals_the_whole(tmp_path: Path, tokenizer, tiny, loss: str) -> None:
    """Parts of a rollout add up to the whole, and rows that fill up teach nothing, for every loss of the family."""
    model = warm_model(tokenizer, tiny)
    found = []
    for micro in (1, 3, 40):
        trainer = rl_trainer(tmp_path / f"{loss}{micro}", model, tokenizer, "fp32", micro)
        trainer.objective.settings = RL.model_copy(update={"loss": loss})  # type: ignore[attr-defined]
        batch = next(b for b in (trainer.source.batch(s, trainer.model) for s in range(20)) if b.tokens_to_learn)
        assert batch.tokens.shape[0] in (4, 8, 12, 16)
        metrics, _, _ = trainer._forward_backward(batch)
        found.append(({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}, metrics))
    for gradients, metrics in found[1:]:
        assert metrics == pytest.approx(found[0][1], rel=1e-4, abs=1e-6)
        for name, gradient in found[0][0].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


# ------------------------------------------------------------ what can go wrong


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flip", "truncate", "missing", "state", "manifest", "nonsense"])
def test_damaged_newest_falls_back(make_trainer, caplog: pytest.LogCaptureFixture, how: str) -> None:
    whole = make_trainer("run", steps=4)
    whole.run()
    newest = list_checkpoints(whole.setup.directory)[-1]
    shard = next(newest.glob("*.safetensors"))
    if how == "flip":
        damage(shard)
    elif how == "truncate":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif how == "missing":
        shard.unlink()
    elif how == "state":
        (newest / "state.json").write_text("{}")
    elif how == "manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text('["a"]')
    again = make_trainer("run", steps=4)
    with caplog.at_level(logging.WARNING, "tael"):
        assert again.resume() == 2
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "tael"]
    assert "step-000004" in warning and "going back" in warning
    again.run()
    assert_same(everything(whole), everything(again))
    assert [p.name for p in list_checkpoints(again.setup.directory)] == ["step-000002", "step-000004"]


def test_all_damaged(make_trainer) -> None:
    trainer = make_trainer("run", steps=4)
    trainer.run()
    for path in trainer.setup.directory.glob("step-*/state.json"):
        path.write_text("")
    with pytest.raises(TaelError, match=r"damaged or missing; no other checkpoint is left: run with --fresh"):
        make_trainer("run", steps=4).run()


def test_damaged_newer_one_never_costs_a_good_one(make_trainer) -> None:
    """Going back before a damaged checkpoint with keep_checkpoints = 1, the next save keeps itself, not the wreck."""
    trainer = make_trainer("run", steps=8, keep_checkpoints=2)
    trainer.run()
    damage(next((trainer.setup.directory / "step-000008").glob("*.safetensors")))
    with pytest.raises(Stopped):
        make_trainer("run", steps=9, keep_checkpoints=1, setup={"on_step": stop_after(7)}).run()
    assert [p.name for p in list_checkpoints(trainer.setup.directory)] == ["step-000007"]


@pytest.mark.parametrize("when", ["shards", "finish"])
def test_full_disk(make_trainer, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """No room for the checkpoint of step 4: one line, that of step 2 stays, and with room the run goes on."""
    whole = make_trainer("whole", steps=6)
    whole.run()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    trainer = make_trainer("full", steps=6)
    with monkeypatch.context() as patch:

        def on_step(step: int, metrics: dict[str, Any]) -> None:
            def fail(*args: Any, **options: Any) -> Any:
                raise full

            if step == 4:
                if when == "shards":
                    patch.setattr(checkpoints.HuggingFaceStorageWriter, "write_data", fail)
                else:
                    patch.setattr(checkpoints, "_finish", fail)

        trainer.setup = replace(trainer.setup, on_step=on_step)
        with pytest.raises(
            TaelError, match="step-000004: cannot write the checkpoint: No space left on device"
        ) as error:
            trainer.run()
        assert "\n" not in str(error.value)
    directory = trainer.setup.directory
    assert [p.name for p in directory.iterdir() if "step" in p.name] == ["step-000002"]
    resumed = make_trainer("full", steps=6)
    assert resumed.resume() == 2
    resumed.run()
    assert_same(everything(whole), everything(resumed))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 64}, "weight is"),
        ({"num_hidden_layers": 1}, "missing"),
        ({"num_hidden_layers": 3}, "missing"),
    ],
)
def test_another_model_is_refused(make_trainer, tiny: ModelConfig, change: dict[str, int], named: str) -> None:
    make_trainer("run", steps=2).run()
    with pytest.raises(TaelError, match=f"does not fit this recipe's model .*{named}.*--fresh") as error:
        make_trainer("run", steps=2, config=replace(tiny, **change)).run()
    assert "\n" not in str(error.value)


def test_not_finite_stops_with_one_line(make_trainer) -> None:
    trainer = make_trainer("nan", steps=3)
    with torch.no_grad():
        trainer.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TaelError, match="no longer finite at step 1"):
        trainer.run()
    assert not list_checkpoints(trainer.setup.directory)
