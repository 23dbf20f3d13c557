"""Optimisers: Muon for the matrices, AdamW for embedding, head, router, norms and biases.

Muon (Jordan et al. 2024; as in Moonlight and DeepSeek-V4): the momentum of each matrix is replaced by the nearest
semi-orthogonal matrix, found by Newton-Schulz iterations (in bf16 where the hardware has it), and scaled to a
root-mean-square update of 0.2 times sqrt(max(rows, columns)) over rank, so that AdamW's rates and weight decay carry
over. Stacked experts [E, O, I] are E matrices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tael.recipe import OptimizerSettings
from tael.train.precision import compute_dtype

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic Newton-Schulz coefficients that push singular values towards 1 fastest (Jordan et al. 2024)."""

UPDATE_RMS = 0.2


def orthogonalise(matrices: Tensor, steps: int) -> Tensor:
    """Nearest semi-orthogonal matrix to each of `matrices` [n, r, c], roughly: singular values about 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    x = matrices.to(compute_dtype("auto", matrices.device))
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        # Fused, so that the sums are rounded once: half the error of separate operations.
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; decoupled weight decay. Parameters [r, c] or [n, r, c]; DTensors are gathered.

    `fused` are parameters [.., 2r, c] that hold two matrices each, one above the other (an expert's gate and up
    projections); they are orthogonalised apart, as they would be as parameters of their own.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float,
        weight_decay: float,
        steps: int,
        fused: Iterable[Tensor] = (),
    ) -> None:
        groups = [{"params": list(parameters), "stacked": 1}, {"params": list(fused), "stacked": 2}]
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; parameters of equal shape go through Newton-Schulz together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape[-2:]].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict) -> None:
        directions = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            buffer = state["momentum"]
            buffer.lerp_(parameter.grad, 1 - group["momentum"])
            direction = parameter.grad.lerp(buffer, group["momentum"])  # Nesterov
            full = direction.full_tensor() if isinstance(direction, DTensor) else direction
            rows, columns = full.shape[-2:]
            directions.append(full.reshape(-1, rows // group["stacked"], columns))
        updates = orthogonalise(torch.cat(directions), group["steps"])
        scale = UPDATE_RMS * max(updates.shape[-2:]) ** 0.5
        for parameter, update in zip(parameters, updates.split([len(d) for d in directions]), strict=True):
            whole = update.reshape(parameter.shape)
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(whole, alpha=-group["lr"] * scale)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes it: a matrix of the blocks, not embedding, head, router or norm."""
    return parameter.dim() >= 2 and not any(part in name for part in ("embed_tokens", "lm_head", "mlp.gate.weight"))


class Optimizer:
    """The optimisers of one model behind one `step`; rates are the settings' times `factor`."""

    def __init__(self, model: nn.Module, settings: OptimizerSettings) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        use_muon = settings.matrices == "muon"
        matrices = [p for name, p in named if use_muon and is_matrix(name, p)]
        matrix_ids = {id(p) for p in matrices}
        fused_ids = {id(p) for name, p in named if name.endswith("gate_up_proj")}
        decayed = [p for _, p in named if id(p) not in matrix_ids and p.dim() >= 2]
        plain = [p for _, p in named if id(p) not in matrix_ids and p.dim() < 2]
        matrix_rate = settings.matrix_learning_rate or settings.learning_rate
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(
                Muon(
                    [p for p in matrices if id(p) not in fused_ids],
                    matrix_rate,
                    settings.momentum,
                    settings.weight_decay,
                    settings.newton_schulz_steps,
                    fused=[p for p in matrices if id(p) in fused_ids],
                )
            )
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.parts.append(
            torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.learning_rate, betas=settings.betas)
        )
        self._peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]
        self._names = {id(p): name for name, p in named}
        self._parameters = [p for _, p in named]
        self._clip = settings.clip

    def step(self, factor: float) -> float:
        """Clip, update with every rate times `factor`, clear gradients; returns the gradient norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip)
        for part, peaks in zip(self.parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            part.step()
            part.zero_grad(set_to_none=True)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def named_state(self) -> dict[str, Tensor]:
        """Every state tensor by name, created where not there yet: what a checkpoint saves and loads in place."""
        result = {}
        for part in self.parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    state = part.state[parameter]
                    if isinstance(part, Muon):
                        state.setdefault("momentum", torch.zeros_like(parameter))
                    elif not state:
                        state["step"] = torch.tensor(0.0)
                        state["exp_avg"] = torch.zeros_like(parameter)
                        state["exp_avg_sq"] = torch.zeros_like(parameter)
                    for key, value in state.items():
                        result[f"{self._names[id(parameter)]}.{key}"] = value
        return result
