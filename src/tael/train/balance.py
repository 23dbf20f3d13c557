"""Keeping experts equally busy: the bias update without auxiliary loss, and the sequence-wise loss beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tael.model.moe import MixtureOfExperts, Routing, count_choices
from tael.model.transformer import Transformer


def expert_load(routing: Routing) -> Tensor:
    """How many (token, expert) pairs each expert got, [E] float."""
    experts = routing.scores.shape[-1]
    return count_choices(routing.choice, experts).float()


def moe_modules(model: Transformer) -> list[MixtureOfExperts]:
    """The MoE parts in the order in which `features` and `mtp_features` report their routing."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


@torch.no_grad()
def update_selection_bias(model: Transformer, loads: list[Tensor], speed: float) -> None:
    """Move each expert's bias by `speed`: down where it got more than the mean load, up where less.

    V3 section 2.1.2. loads: one [E] a MoE layer, over the whole batch of the step.
    """
    for module, load in zip(moe_modules(model), loads, strict=False):
        if hasattr(module.gate, "e_score_correction_bias"):
            module.gate.e_score_correction_bias += speed * torch.sign(load.mean() - load)


def sequence_balance_loss(routing: Routing, k: int, weights: Tensor | None = None) -> Tensor:
    """Complementary sequence-wise loss without its weight alpha: mean over sequences of sum_i f_i P_i.

    V3 eq. 17 to 20.

    `weights` [B], adding up to 1, weigh the sequences; None weighs them equally.
    f_i = E/(K T) times how often expert i is among a token's top K by *unbiased* score, P_i = mean over the
    sequence of the score normalised over all experts. 1 when perfectly balanced.
    """
    scores = routing.scores  # [B, T, E]
    experts = scores.shape[-1]
    top = scores.detach().topk(k, dim=-1).indices
    chosen = F.one_hot(top, experts).sum((1, 2)).float()  # [B, E]
    frequency = chosen * (experts / (k * scores.shape[1]))
    probability = (scores / scores.sum(-1, keepdim=True)).mean(1)  # [B, E]
    each = (frequency * probability).sum(-1)  # [B]
    return each.mean() if weights is None else (each * weights).sum()
