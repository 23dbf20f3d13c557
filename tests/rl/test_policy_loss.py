"""The GRPO family: against loops written from the papers, and the properties any of them must have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tael.rl.policy_loss import group_advantages, informative, k3_divergence, policy_loss

LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
SETTINGS = {"clip_low": 0.2, "clip_high": 0.28, "importance_cap": 3.0}


def batch(seed: int = 0, b: int = 6, t: int = 5, spread: float = 0.4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return spread * torch.randn(b, t, generator=generator)

    old = -2 * torch.rand(b, t, generator=generator) - 0.1
    lengths = torch.randint(1, t + 1, (b, 1), generator=generator)
    return {
        "logprobs": (old + noise()).requires_grad_(),
        "sampler_logprobs": old + 2 * noise(),
        "old_logprobs": old,
        "advantages": torch.randn(b, generator=generator),
        "mask": torch.arange(t)[None] < lengths,
    }


def from_the_paper(data, loss, clip_low, clip_high, importance_cap, kl_weight, reference, max_length) -> float:
    """Token by token with Python floats, as the equations read."""
    logprobs, sampler, old, advantages, mask = (data[k].tolist() for k in data)
    outer, tokens = [], 0
    for i, advantage in enumerate(advantages):
        inner = []
        steps = [j for j in range(len(mask[i])) if mask[i][j]]
        sequence = math.exp(sum(logprobs[i][j] - old[i][j] for j in steps) / max(1, len(steps)))
        for j in steps:
            rho = sequence if loss == "gspo" else math.exp(logprobs[i][j] - old[i][j])
            if loss == "cispo":
                value = min(rho, 1 + clip_high) * advantage * logprobs[i][j]
            else:
                value = min(rho * advantage, max(1 - clip_low, min(1 + clip_high, rho)) * advantage)
            weight = math.exp(old[i][j] - sampler[i][j])
            value *= weight if weight <= importance_cap else 0.0
            if reference is not None:
                quotient = math.exp(reference[i][j].item() - logprobs[i][j])
                value -= kl_weight * (quotient - math.log(quotient) - 1)
            inner.append(value)
        tokens += len(steps)
        outer.append((sum(inner), max(1, len(steps))))
    if loss in ("dapo", "cispo"):
        return -sum(total for total, _ in outer) / tokens
    if loss == "dr_grpo":
        return -sum(total for total, _ in outer) / (len(outer) * max_length)
    return -sum(total / length for total, length in outer) / len(outer)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_equals_the_papers_equation(loss, seed: int, kl_weight: float) -> None:
    data = batch(seed)
    reference = data["old_logprobs"] + 0.3 if kl_weight else None
    value, metrics = policy_loss(
        **data, loss=loss, **SETTINGS, kl_weight=kl_weight, reference_logprobs=reference, max_length=9
    )
    expected = from_the_paper(data, loss, *SETTINGS.values(), kl_weight, reference, 9)
    assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert ("kl" in metrics) == bool(kl_weight)


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    assert informative(rewards).tolist() == [True, False, False]
    std = math.sqrt(1 / 3)
    scaled = group_advantages(rewards, scale=True)
    assert scaled[0].tolist() == pytest.approx([0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std], rel=1e-3)
    assert group_advantages(rewards, scale=False)[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    assert scaled[1:].eq(0).all() and group_advantages(rewards, scale=False)[1:].eq(0).all()


@settings(max_examples=50)
@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=4), st.booleans())
def test_advantages_sum_to_zero_and_ignore_a_shift(rewards: list[list[float]], scale: bool) -> None:
    tensor = torch.tensor(rewards)
    advantages = group_advantages(tensor, scale)
    assert advantages.isfinite().all()
    assert advantages.sum(dim=1).abs().max() < 1e-3
    assert (advantages[~informative(tensor)] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_descent_raises_what_was_good_and_lowers_what_was_bad(loss) -> None:
    data = batch(1)
    policy_loss(
        **data | {"old_logprobs": None, "sampler_logprobs": data["logprobs"].detach()}, loss=loss, **SETTINGS
    )[0].backward()
    gradient, mask = data["logprobs"].grad, data["mask"]
    assert gradient is not None
    signs = torch.sign(data["advantages"])[:, None].expand_as(mask)
    assert (torch.sign(gradient) == -signs)[mask].all()
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_no_advantage_no_gradient(loss) -> None:
    data = batch(2)
    data["advantages"] = torch.zeros(6)
    policy_loss(**data, loss=loss, **SETTINGS)[0].backward()
    assert data["logprobs"].grad is not None and (data["logprobs"].grad == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_may_hold_anything(loss) -> None:
    data = batch(3)
    clean, clean_metrics = policy_loss(**data, loss=loss, **SETTINGS)
    (clean_gradient,) = torch.autograd.grad(clean, data["logprobs"])
    dirty = {
        key: tensor.detach().masked_fill(~data["mask"], math.nan) if key.endswith("logprobs") else tensor
        for key, tensor in data.items()
    }
    dirty["logprobs"].requires_grad_()
    value, metrics = policy_loss(**dirty, loss=loss, **SETTINGS)
    (gradient,) = torch.autograd.grad(value, dirty["logprobs"])
    assert value == clean and metrics == clean_metrics
    assert torch.equal(gradient, clean_gradient)
    assert (gradient[~data["mask"]] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_order_of_the_sequences_does_not_matter(loss) -> None:
    data = batch(4)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    value = policy_loss(**data, loss=loss, **SETTINGS)[0]
    other = policy_loss(**{key: tensor[order] for key, tensor in data.items()}, loss=loss, **SETTINGS)[0]
    torch.testing.assert_close(value, other)


@pytest.mark.parametrize("loss", LOSSES)
def test_parts_add_up_to_the_whole(loss) -> None:
    data = batch(5)
    whole = policy_loss(**data, loss=loss, **SETTINGS, max_length=5)[0]
    counts = {"batch_sequences": 6, "batch_tokens": int(data["mask"].sum())}
    parts = [
        policy_loss(**{k: v[part] for k, v in data.items()}, loss=loss, **SETTINGS, max_length=5, **counts)[0]
        for part in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(whole, parts[0] + parts[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_no_old_policy_means_the_present_one(loss) -> None:
    data = batch(6)
    present = policy_loss(**data | {"old_logprobs": data["logprobs"].detach()}, loss=loss, **SETTINGS)
    none = policy_loss(**data | {"old_logprobs": None}, loss=loss, **SETTINGS)
    torch.testing.assert_close(present[0], none[0])
    assert present[1] == none[1]
    assert none[1]["clipped_low"] == none[1]["clipped_high"] == 0.0


def one_token(logprob: float, old: float, advantage: float, sampler: float | None = None, loss="grpo", **changes):
    tensor = torch.tensor([[logprob]], requires_grad=True)
    value, metrics = policy_loss(
        tensor, torch.tensor([[old if sampler is None else sampler]]), torch.tensor([[old]]),
        torch.tensor([advantage]), torch.ones(1, 1), loss=loss, **SETTINGS | changes,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(value, tensor)
    return value.item(), gradient.item(), metrics


def test_clipping_stops_the_gradient_on_one_side_only() -> None:
    up, down = math.log(1.5), math.log(0.5)
    assert one_token(up, 0.0, 1.0)[:2] == pytest.approx((-1.28, 0.0))
    assert one_token(up, 0.0, -1.0)[:2] == pytest.approx((1.5, 1.5))
    assert one_token(down, 0.0, -1.0)[:2] == pytest.approx((0.8, 0.0))
    assert one_token(down, 0.0, 1.0)[:2] == pytest.approx((-0.5, -0.5))
    assert one_token(up, 0.0, 1.0)[2]["clipped_high"] == 1.0
    assert one_token(down, 0.0, -1.0)[2]["clipped_low"] == 1.0
    # CISPO clips the weight, never the gradient.
    assert one_token(up, 0.0, 1.0, loss="cispo")[1] == pytest.approx(-1.28)


def test_sampler_mismatch_is_corrected_up_to_the_cap() -> None:
    assert one_token(-1.0, -1.0, 1.0, sampler=-1.0 - math.log(2))[1] == pytest.approx(-2.0)
    _, gradient, metrics = one_token(-1.0, -1.0, 1.0, sampler=-1.0 - math.log(4))
    assert gradient == 0.0
    assert metrics["importance_masked"] == 1.0
    assert metrics["logprob_gap"] == pytest.approx(math.log(4))
    assert one_token(-1.0, -1.0, 0.0, sampler=-200.0)[:2] == (0.0, 0.0)


def test_extreme_ratios_stay_finite() -> None:
    for loss in LOSSES:
        for advantage in (-1.0, 0.0, 1.0):
            value, gradient, _ = one_token(-0.1, -300.0, advantage, loss=loss)
            assert math.isfinite(value) and math.isfinite(gradient)


def test_an_empty_completion_is_no_division_by_zero() -> None:
    for loss in LOSSES:
        data = batch(7) | {"mask": torch.zeros(6, 5)}
        value, metrics = policy_loss(**data, loss=loss, **SETTINGS)
        assert value == 0 and all(metric == 0 for metric in metrics.values())


def test_k3_is_zero_at_the_reference_and_right_on_average() -> None:
    policy = torch.tensor([0.7, 0.2, 0.1])
    reference = torch.tensor([0.5, 0.3, 0.2])
    assert k3_divergence(policy.log(), policy.log()).abs().max() == 0
    estimate = (policy * k3_divergence(policy.log(), reference.log())).sum()
    torch.testing.assert_close(estimate, (policy * (policy / reference).log()).sum())


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="reference_logprobs is None"):
        policy_loss(**batch(), loss="grpo", **SETTINGS, kl_weight=0.1)
    with pytest.raises(ValueError, match="unknown loss 'ppo'"):
        policy_loss(**batch(), loss="ppo", **SETTINGS)  # pyright: ignore[reportArgumentType]
