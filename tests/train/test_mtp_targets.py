"""Which token each MTP depth is taught at each place, laid out by hand."""

from __future__ import annotations

import torch

from tael.data import Batch
from tael.model import ModelConfig, build_model
from tael.recipe import TrainSettings
from tael.train.objective import LanguageModelling, mtp_targets

X = -100
TOKENS = torch.tensor([[10, 11, 12, 20, 21, 22, 23, 24]])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
BATCH = Batch(TOKENS, torch.tensor([[11, 12, X, 21, 22, 23, 24, 25]]), DOCUMENTS)


def test_depth_one_predicts_the_token_after_next() -> None:
    assert mtp_targets(BATCH, 1).tolist() == [[12, X, X, 22, 23, 24, 25, X]]


def test_depth_two() -> None:
    assert mtp_targets(BATCH, 2).tolist() == [[X, X, X, 23, 24, 25, X, X]]


def test_depth_beyond_the_row() -> None:
    assert mtp_targets(BATCH, 7).tolist() == [[X] * 8]


def test_a_document_of_one_token_between_two() -> None:
    """Token 12 alone is a document: nothing may be predicted across it, though the ids two places on agree again."""
    batch = Batch(
        torch.tensor([[10, 11, 12, 13, 14]]), torch.tensor([[11, X, X, 14, 15]]), torch.tensor([[0, 0, 1, 2, 2]])
    )
    assert mtp_targets(batch, 1).tolist() == [[X, X, X, 15, X]]


def test_what_is_not_to_be_learned_is_not_learned() -> None:
    """SFT: the prompt's tokens are no targets, for any depth."""
    batch = Batch(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[X, X, 4, 5]]), torch.zeros(1, 4, dtype=torch.int64))
    assert mtp_targets(batch, 1).tolist() == [[X, 4, 5, X]]


def test_loss_follows_the_paper() -> None:
    """V3 eq. 24, 25: every depth's sum over the tokens it can predict, divided by T, then lambda / D of the sum."""
    config = ModelConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, n_routed_experts=4, num_nextn_predict_layers=2
    )
    model = build_model(config, seed=1, zero_residual=False)
    settings = TrainSettings(mtp_weight=0.4, balance_loss_weight=0)
    loss = LanguageModelling(settings)(model, BATCH)
    hidden = model.features(TOKENS, DOCUMENTS).hidden
    padded = torch.cat((TOKENS, TOKENS[:, -2:]), dim=1)
    by_depth = []
    for depth, features in enumerate(model.mtp_features(hidden, padded, DOCUMENTS), start=1):
        logprobs = model.logits(features.hidden).log_softmax(-1)[0]
        wanted = mtp_targets(BATCH, depth)[0].tolist()
        by_depth.append(-sum(logprobs[t, token] for t, token in enumerate(wanted) if token != X) / 7)
    torch.testing.assert_close(torch.tensor(loss.metrics["mtp_loss"]), (by_depth[0] + by_depth[1]).detach() / 2)
    torch.testing.assert_close(loss.total - loss.metrics["loss"], 0.2 * (by_depth[0] + by_depth[1]))
