"""The one training loop: pretraining, SFT and RL differ only in their source of batches and their objective.

A step: batch -> micro-batches -> loss and gradients -> clip and update -> selection bias -> log. Everything random in
step n is drawn from generators seeded by (seed, n) inside the source, so a run that was stopped, by Ctrl-C or
kill -9, and goes on from its checkpoint ends at the same bits as one that was not.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from tael.data import Batch, Loader
from tael.errors import TaelError
from tael.files import write_whole
from tael.model.transformer import Transformer
from tael.recipe import StageSettings
from tael.train.balance import expert_load, update_selection_bias
from tael.train.checkpoint import load_latest, save_checkpoint
from tael.train.fp8 import emulate_fp8
from tael.train.objective import Objective
from tael.train.optim import Optimizer
from tael.train.parallel import Parallel
from tael.train.precision import Twin, compute_dtype
from tael.train.schedule import learning_rate_factor


class Stopped(TaelError):
    """The user asked to stop; the work so far is in a checkpoint."""


class BatchLike(Protocol):
    """What the loop needs of a batch: this process's share of a step's work."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def tokens_to_learn(self) -> int: ...
    def split(self, parts: int, /) -> list[Any]: ...
    def to(self, device: torch.device, /) -> Any: ...


class Source(Protocol):
    """Batches by step number: the same step and weights give the same batch. RL draws its batch from `model`.

    `metrics` says what else is to be logged of the last batch (reward, completion length, ...).
    """

    metrics: dict[str, float]

    def batch(self, step: int, model: Transformer) -> BatchLike: ...


class LoaderSource:
    """Packed text as a Source: the model plays no part."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.metrics: dict[str, float] = {}

    def batch(self, step: int, model: Transformer) -> Batch:
        return self.loader.batch(step)


@dataclass
class StageResult:
    """What a stage did since it began, stops and restarts included. seconds: wall-clock time, with evaluation."""

    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    step_seconds: float = 0.0
    """The part of `seconds` spent in training steps."""
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainerSetup:
    """Everything about a stage but model, source and objective."""

    directory: Path
    steps: int
    settings: StageSettings
    parallel: Parallel
    micro_batches: int = 1
    bias_update_speed: float = 0.0
    peak_flops: float | None = None
    """Measured matrix peak of the device, FLOP/s, for the utilisation column."""
    evaluate: Callable[[Transformer, int], dict[str, Any]] | None = None
    """(compute model, steps done) -> metrics of an "eval" line; at the start, every eval_every, and at the end."""
    on_step: Callable[[int, dict[str, Any]], None] | None = None
    on_saved: Callable[[StageResult, StageResult], None] | None = None
    """(result at the last call or at the resume, result now), after each checkpoint: for the ledger."""


class Trainer:
    """Runs one stage; see the module's text. `model` [fp32] is trained in place."""

    def __init__(self, model: Transformer, source: Source, objective: Objective, setup: TrainerSetup) -> None:
        settings, self.setup, self.objective = setup.settings, setup, objective
        parallel = setup.parallel
        dtype = compute_dtype(settings.precision, parallel.device)
        model.to(parallel.device)
        if settings.precision == "fp8-emulated":
            emulate_fp8(model)
        self.model = parallel.shard(model, dtype)
        # Under fully_shard the mixed-precision policy is the twin.
        self.twin = Twin(self.model, dtype if parallel.mesh is None else torch.float32)
        self.optimizer = Optimizer(self.model, settings.optimizer)
        self.result, self._recorded, self._resumed = StageResult(), StageResult(), False
        self.source = source
        self._log = MetricsLog(setup.directory / "metrics.jsonl", parallel.is_main)

    def run(self) -> StageResult:
        """Train to the last step, from the newest checkpoint if there is one. Raises Stopped on Ctrl-C or SIGTERM."""
        setup, resumed_at = self.setup, self.resume()
        began, before = time.perf_counter(), self.result.seconds
        with stop_on_signal() as stopping:
            if resumed_at == 0:
                self._evaluate()
            while self.result.steps < setup.steps:
                self.step()
                self.result.seconds = before + time.perf_counter() - began
                done = self.result.steps
                if done % setup.settings.eval_every == 0 or done == setup.steps:
                    self._evaluate()
                    self.result.seconds = before + time.perf_counter() - began
                stop = self._anyone(stopping.is_set())
                if stop or done == setup.steps or done % setup.settings.checkpoint_every == 0:
                    self._save()
                if stop and done < setup.steps:
                    raise Stopped(f"stopped at step {done} of {setup.steps}; the same command goes on from there")
        return self.result

    # ---------------------------------------------------------------- one step

    def step(self) -> None:
        """One training step, logged; `run` takes them all. For callers that take turns between several trainers."""
        setup, began = self.setup, time.perf_counter()
        step = self.result.steps
        batch = self.source.batch(step, self.twin.compute)
        metrics, loads, learned = self._forward_backward(batch)
        factor = learning_rate_factor(step, setup.steps, setup.settings.schedule)
        if learned:
            norm = self.optimizer.step(factor)
            self.twin.sync()
            self._check(metrics, norm)
            metrics["grad_norm"] = norm
        if loads and setup.bias_update_speed:
            update_selection_bias(self.model, loads, setup.bias_update_speed)
        seconds = time.perf_counter() - began
        result = self.result
        done, flops = setup.parallel.total(self.objective.work(self.model.config, batch))
        tokens = int(done)
        result.steps, result.tokens, result.flops = step + 1, result.tokens + tokens, result.flops + flops
        result.step_seconds += seconds
        metrics |= {"learning_rate": setup.settings.optimizer.learning_rate * factor, **self.source.metrics}
        self._report(metrics, loads, tokens, flops, seconds)

    def _forward_backward(self, batch: BatchLike) -> tuple[dict[str, float], list[Tensor], int]:
        """Gradients of the mean over all tokens to learn, whatever the number of micro-batches and processes."""
        setup, parallel = self.setup, self.setup.parallel
        totals = torch.tensor([float(batch.tokens_to_learn)])
        learned = int(parallel.sum(totals.to(parallel.device)).item())
        metrics: dict[str, float] = {}
        loads: list[Tensor] = []
        if not learned:
            return metrics, loads, 0
        for part in batch.split(setup.micro_batches):
            share = part.tokens_to_learn / learned
            loss = self.objective(self.twin.compute, part.to(parallel.device))
            (loss.total * (share * parallel.world_size)).backward()  # fully_shard averages over processes
            self.twin.collect_gradients()
            for key, value in loss.metrics.items():
                metrics[key] = metrics.get(key, 0.0) + value * share
            new = [expert_load(r) for r in loss.routing]
            loads = [a + b for a, b in zip(loads, new, strict=True)] if loads else new
        if parallel.mesh is not None:
            values = parallel.sum(torch.tensor(list(metrics.values()), device=parallel.device))
            metrics = dict(zip(metrics, values.tolist(), strict=True))
            loads = [parallel.sum(load) for load in loads]
        return metrics, loads, learned

    def _check(self, metrics: dict[str, float], norm: float) -> None:
        if not all(torch.isfinite(torch.tensor([*metrics.values(), norm]))):
            raise TaelError(
                f"{self.setup.directory.name}: loss or gradient is no longer finite at step {self.result.steps + 1}; "
                "begin again with a lower stages.*.optimizer.learning_rate and --fresh (the run is moved aside)"
            )

    def _report(
        self, metrics: dict[str, Any], loads: list[Tensor], tokens: int, flops: float, seconds: float
    ) -> None:
        result, setup = self.result, self.setup
        metrics |= {
            "tokens": result.tokens,
            "seconds": round(result.seconds + seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
        }
        if setup.peak_flops:
            metrics["utilisation"] = round(flops / seconds / (setup.peak_flops * setup.parallel.world_size), 4)
        if loads:
            metrics["load_max_over_mean"] = round(max(float(load.max() / load.mean()) for load in loads), 3)
        self._log.write("step", result.steps, metrics)
        if loads and (result.steps % 20 == 0 or result.steps == setup.steps):
            shares = [[round(v, 4) for v in (load / load.sum()).tolist()] for load in loads]
            self._log.write("load", result.steps, {"layers": shares})
        if setup.on_step:
            setup.on_step(result.steps, metrics)

    def _evaluate(self) -> None:
        if self.setup.evaluate is None:
            return
        metrics = self.setup.evaluate(self.twin.compute, self.result.steps)
        if metrics:
            self.result.metrics |= metrics
            self._log.write("eval", self.result.steps, {"seconds": round(self.result.seconds, 3), **metrics})

    # ------------------------------------------------------- stop and resume

    def _anyone(self, flag: bool) -> bool:
        if self.setup.parallel.mesh is None:
            return flag
        value = torch.tensor([float(flag)], device=self.setup.parallel.device)
        return bool(self.setup.parallel.sum(value).item())

    def _tensors(self) -> dict[str, Tensor]:
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # a forward without backward (evaluation) leaves the root's parameters gathered
        tensors = {f"model.{name}": p.data for name, p in self.model.named_parameters()}
        tensors |= {f"model.{name}": buffer for name, buffer in self.model.named_buffers()}
        return tensors | {f"optimizer.{name}": value for name, value in self.optimizer.named_state().items()}

    def _save(self) -> None:
        setup, now = self.setup, replace(self.result)
        save_checkpoint(
            setup.directory, self._tensors(), asdict(now), setup.parallel, setup.settings.keep_checkpoints
        )
        if setup.on_saved:
            setup.on_saved(self._recorded, now)
        self._recorded = now

    def resume(self) -> int:
        """Load the newest checkpoint if there is one, once; returns the steps already done. `run` does it too."""
        if self._resumed:
            return self.result.steps
        self._resumed = True
        state = load_latest(self.setup.directory, self._tensors(), self.setup.parallel)
        if state is not None:
            self.result = StageResult(**state)
            self.twin.sync()
        self._recorded = replace(self.result)
        self._log.cut(self.result.steps if state is not None else -1)
        return self.result.steps


class MetricsLog:
    """metrics.jsonl: one JSON object a line, flushed line by line; only the main process writes."""

    def __init__(self, path: Path, active: bool) -> None:
        self.path, self.active = path, active

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self.active:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            except OSError as error:
                raise TaelError(
                    f"{self.path}: cannot write: {error.strerror}; what was saved before is kept"
                ) from None

    def cut(self, step: int) -> None:
        """Drop what was logged after `step`: those steps will be taken again."""
        if not self.active or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        write_whole(self.path, "".join(kept))


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
