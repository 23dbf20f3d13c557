"""Balance of experts against V3's equations written out as loops, and by hand."""

from __future__ import annotations

import pytest
import torch

from tael.model import ModelConfig, build_model
from tael.model.moe import Routing
from tael.train.balance import expert_load, moe_modules, sequence_balance_loss, update_selection_bias


def plain_balance_loss(scores: list[list[list[float]]], k: int) -> float:
    """V3 eq. 17 to 20 without alpha, one sequence after the other."""
    total = 0.0
    for sequence in scores:
        length, experts = len(sequence), len(sequence[0])
        for i in range(experts):
            frequency = probability = 0.0
            for token in sequence:
                best = sorted(range(experts), key=lambda e: -token[e])[:k]
                frequency += (experts / (k * length)) * (i in best)  # eq. 18
                probability += token[i] / sum(token) / length  # eq. 19, 20
            total += frequency * probability  # eq. 17
    return total / len(scores)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_sequence_loss_equals_the_loops(k: int) -> None:
    scores = torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    routing = Routing(scores, scores.topk(k).indices)
    assert float(sequence_balance_loss(routing, k)) == pytest.approx(plain_balance_loss(scores.tolist(), k))


def test_sequence_loss_by_hand() -> None:
    """Two tokens, two experts, top 1: f = (2, 0), P = (0.7, 0.3), so 1.4; the choice with bias plays no part."""
    scores = torch.tensor([[[0.8, 0.2], [0.3, 0.2]]])
    assert float(sequence_balance_loss(Routing(scores, torch.tensor([[[1], [1]]])), 1)) == pytest.approx(1.4)
    even = torch.tensor([[[0.6, 0.4], [0.4, 0.6]]])
    assert float(sequence_balance_loss(Routing(even, even.topk(1).indices), 1)) == pytest.approx(1.0)


def test_sequence_loss_weighs_sequences() -> None:
    scores = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0))
    routing = Routing(scores, scores.topk(1).indices)
    parts = [sequence_balance_loss(Routing(s[None], c[None]), 1) for s, c in zip(*routing, strict=True)]
    weighed = sequence_balance_loss(routing, 1, torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(weighed, 0.25 * parts[0] + 0.75 * parts[1])


def test_gradient_lowers_the_busy_expert() -> None:
    scores = torch.tensor([[[0.9, 0.1, 0.1], [0.8, 0.2, 0.1]]], requires_grad=True)
    sequence_balance_loss(Routing(scores, scores.topk(1).indices), 1).backward()
    assert scores.grad is not None
    assert (scores.grad[..., 0] > 0).all() and (scores.grad[..., 1:] < 0).all()


def test_expert_load_counts_choices() -> None:
    routing = Routing(torch.zeros(1, 3, 4), torch.tensor([[[0, 1], [0, 3], [0, 1]]]))
    assert expert_load(routing).tolist() == [3, 2, 0, 1]


def test_bias_moves_against_the_load() -> None:
    config = ModelConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=3, n_routed_experts=4, num_nextn_predict_layers=1
    )
    model = build_model(config)
    modules = moe_modules(model)
    names = {module: name for name, module in model.named_modules()}
    assert [names[module] for module in modules] == ["layers.1.mlp", "layers.2.mlp", "mtp.0.block.mlp"]
    loads = [torch.tensor(values) for values in ([4.0, 0, 2, 2], [1.0, 1, 1, 1], [0.0, 0, 0, 8])]
    update_selection_bias(model, loads, 0.5)
    update_selection_bias(model, loads[:2], 0.25)  # MTP left out, as where its weight is 0
    biases = [module.gate.e_score_correction_bias.tolist() for module in modules]
    assert biases == [[-0.75, 0.75, 0, 0], [0, 0, 0, 0], [0.5, 0.5, 0.5, -0.5]]
