"""What a stage minimises, as a function of (model, batch): knows nothing of optimisers, devices or steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tael.data import Batch
from tael.model.config import ModelConfig
from tael.model.moe import Routing
from tael.model.transformer import Transformer
from tael.recipe import TrainSettings
from tael.train.balance import sequence_balance_loss
from tael.train.losses import linear_cross_entropy


@dataclass
class Loss:
    """`total` is differentiated; `metrics` are means over the tokens to learn; `routing` feeds the balance."""

    total: Tensor
    metrics: dict[str, float]
    routing: list[Routing] = field(default_factory=list)


class Work(NamedTuple):
    """Tokens that passed the model in a step (sampled ones included) and floating-point operations."""

    tokens: int
    flops: float


class Objective(Protocol):
    """`__call__` returns the mean loss over `batch.tokens_to_learn`; `work` what the step on `batch` costs."""

    def __call__(self, model: Transformer, batch: Any) -> Loss: ...

    def work(self, config: ModelConfig, batch: Any) -> Work: ...


class LanguageModelling:
    """Next token + lambda / D sum of MTP depths + alpha times the sequence-wise balance loss (V3 eq. 24, 25, 17).

    For pretraining and SFT alike; the targets of `Batch` say what is learned.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings

    def __call__(self, model: Transformer, batch: Batch) -> Loss:
        settings = self.settings
        documents = batch.document_ids if settings.mask_documents else None
        hidden, routing = model.features(batch.tokens, documents)
        count = max(batch.tokens_to_learn, 1)
        loss = linear_cross_entropy(hidden, model.lm_head.weight, batch.targets) / count
        metrics, total = {"loss": loss.item()}, loss
        if settings.mtp_weight and len(model.mtp):
            mtp_loss, extra = mtp_cross_entropy(model, hidden, batch, documents)
            metrics["mtp_loss"] = mtp_loss.item()
            total = total + settings.mtp_weight * mtp_loss
            routing = routing + extra
        if settings.balance_loss_weight and routing:
            k = model.config.num_experts_per_tok
            weights = (batch.targets >= 0).sum(1) / count  # by tokens, so that parts of a batch add up to the whole
            balance = torch.stack([sequence_balance_loss(r, k, weights) for r in routing]).sum()
            metrics["balance_loss"] = balance.item() / len(routing)
            total = total + settings.balance_loss_weight * balance
        return Loss(total, metrics, routing)

    def work(self, config: ModelConfig, batch: Batch) -> Work:
        tokens = batch.tokens.numel()
        return Work(tokens, tokens * config.flops_per_token(batch.tokens.shape[1] / 2))


def mtp_targets(batch: Batch, depth: int) -> Tensor:
    """Targets [B, T] of MTP depth `depth`: position t is to predict token t + depth + 1.

    -100 past the row's end, where that token is not to be learned, and where it belongs to another document.
    """
    targets = torch.full_like(batch.targets, -100)
    targets[:, :-depth] = batch.targets[:, depth:]
    same = batch.document_ids[:, depth:] == batch.document_ids[:, :-depth]
    targets[:, :-depth] = targets[:, :-depth].masked_fill(~same, -100)
    return targets


def mtp_cross_entropy(
    model: Transformer, hidden: Tensor, batch: Batch, documents: Tensor | None
) -> tuple[Tensor, list[Routing]]:
    """Mean over depths of the sum of cross-entropies over T (V3 eq. 24, 25).

    T counts the main loss's tokens to learn for every depth, as in the paper, though a depth can predict a few
    less: only so do the parts of a batch add up to the whole.
    """
    depths, count = len(model.mtp), max(batch.tokens_to_learn, 1)
    tokens = torch.cat((batch.tokens, batch.tokens[:, -1:].expand(-1, depths)), dim=1)  # the tail is never learned
    losses, routing = [], []
    for depth, features in enumerate(model.mtp_features(hidden, tokens, documents), start=1):
        targets = mtp_targets(batch, depth)
        losses.append(linear_cross_entropy(features.hidden, model.lm_head.weight, targets) / count)
        routing += features.routing
    return torch.stack(losses).mean(), routing
