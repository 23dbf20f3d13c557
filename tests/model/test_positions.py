"""RoPE by hand, causality, and documents that cannot see each other."""

from __future__ import annotations

import math

import pytest
import torch

from tael.model import ModelConfig, Transformer, build_model
from tael.model.rope import make_rope, rotate, softmax_scale
from tael.model.transformer import document_mask

TINY = ModelConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_nextn_predict_layers=1)
DENSE = ModelConfig(model_type="llama", vocab_size=40, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2)


def model_of(config: ModelConfig) -> Transformer:
    model = build_model(config, seed=1, zero_residual=False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_rope_turns_interleaved_pairs() -> None:
    """Two pairs at theta 100: angles p and p / 10. Pair (0, 1), not (0, 2): the trap of the released weights."""
    config = ModelConfig(qk_rope_head_dim=4, rope_theta=100.0)
    rope = make_rope(config, torch.tensor([3]))
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    expected = torch.tensor([math.cos(3), math.sin(3), -math.sin(0.3), math.cos(0.3)])
    torch.testing.assert_close(rotate(x, rope).flatten(), expected)


def test_rope_turns_halves_for_llama() -> None:
    config = ModelConfig(model_type="llama", head_dim=4, rope_theta=100.0)
    rope = make_rope(config, torch.tensor([3]))
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    expected = torch.tensor([math.cos(3), -math.sin(0.3), math.sin(3), math.cos(0.3)])
    torch.testing.assert_close(rotate(x, rope).flatten(), expected)


def test_only_distance_matters() -> None:
    config = ModelConfig(qk_rope_head_dim=8)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    products = []
    for start in (0, 7, 100):
        turned = (
            rotate(query, make_rope(config, torch.tensor([start + 5]))),
            rotate(key, make_rope(config, torch.tensor([start]))),
        )
        products.append((turned[0] * turned[1]).sum())
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), rtol=1e-4, atol=1e-4)


def test_v3_softmax_scale() -> None:
    """FACTS of V3: 1/sqrt(192), times (0.1 ln 40 + 1) squared."""
    scaling = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = ModelConfig(qk_nope_head_dim=128, qk_rope_head_dim=64, rope_scaling=scaling)
    assert softmax_scale(config) == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(192))


@pytest.mark.parametrize("config", [TINY, DENSE], ids=["mla", "gqa"])
def test_the_future_does_not_matter(config: ModelConfig) -> None:
    model = model_of(config)
    tokens = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(3))
    changed = tokens.clone()
    changed[:, 11:] = (changed[:, 11:] + 7) % 40
    with torch.no_grad():
        torch.testing.assert_close(model(changed)[:, :11], model(tokens)[:, :11], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(changed)[:, 11:], model(tokens)[:, 11:])


def test_document_mask_by_hand() -> None:
    mask = document_mask(torch.tensor([[0, 0, 1]]))
    assert mask.tolist() == [[[[True, False, False], [True, True, False], [False, False, True]]]]


@pytest.mark.parametrize("config", [TINY, DENSE], ids=["mla", "gqa"])
def test_documents_do_not_see_each_other(config: ModelConfig) -> None:
    """Permuting the first document's tokens leaves the second's logits alone, and those are the document's own."""
    model = model_of(config)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 40, (1, 24), generator=generator)
    ids = torch.tensor([[0] * 10 + [1] * 14])
    shuffled = tokens.clone()
    shuffled[:, :10] = tokens[:, torch.randperm(10, generator=generator)]
    assert not torch.equal(shuffled, tokens)
    with torch.no_grad():
        base, other = model(tokens, ids), model(shuffled, ids)
        torch.testing.assert_close(other[:, 10:], base[:, 10:], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(other[:, :10], base[:, :10])
        # RoPE sees only distances, so the second document alone, from position 0, gives the same.
        torch.testing.assert_close(model(tokens[:, 10:]), base[:, 10:], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(tokens)[:, 10:], base[:, 10:], rtol=1e-3, atol=1e-3)


def test_mtp_keeps_to_documents_and_to_the_past() -> None:
    """Position t of depth 1 has seen tokens up to t + 1 of its document, and nothing else."""
    model = model_of(TINY)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 40, (1, 25), generator=generator)
    ids = torch.tensor([[0] * 10 + [1] * 14])

    def mtp(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden = model.features(tokens[:, :24], ids).hidden
            return model.mtp_features(hidden, tokens, ids)[0].hidden

    base = mtp(tokens)
    earlier, later = tokens.clone(), tokens.clone()
    earlier[:, :9] = (earlier[:, :9] + 5) % 40
    later[:, 18:] = (later[:, 18:] + 5) % 40
    torch.testing.assert_close(mtp(earlier)[:, 10:], base[:, 10:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mtp(later)[:, :17], base[:, :17], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mtp(later)[:, 17], base[:, 17])


def test_one_seed_one_model() -> None:
    first, second, third = build_model(TINY, 1), build_model(TINY, 1), build_model(TINY, 2)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(first.embed_tokens.weight, third.embed_tokens.weight)
    for name, parameter in first.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
    assert first.get_parameter("mtp.0.eh_proj.weight").any(), "a zero MTP projection would never learn"
