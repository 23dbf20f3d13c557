"""Multi-token prediction against transformers' MtpModel, through a saved folder, which checks the names too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tael.model import ModelConfig, build_model
from tael.weights import save_model

transformers = pytest.importorskip("transformers")
layers = pytest.importorskip("transformers.modeling_layers")


@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_against_transformers(depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_nextn_predict_layers=depth, routed_scaling_factor=2.5
    )
    model = build_model(config, seed=1, zero_residual=False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.3 * noise if "norm" in name and tensor.dim() == 1 else 0.2 * noise)
    save_model(model, tmp_path / "model")

    kind: Any = transformers.DeepseekV3ForCausalLM
    # transformers knows MTP tensors by the layer number 61 of the released model; ours come after layer 1.
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[23]\..*"])
    main = kind.from_pretrained(tmp_path / "model", attn_implementation="eager", experts_implementation="eager")
    theirs = layers.MtpModel.from_pretrained(main).eval()

    length = 17
    tokens = torch.randint(0, config.vocab_size, (2, length + depth), generator=generator)
    with torch.no_grad():
        ours = model.mtp_features(model.features(tokens[:, :length]).hidden, tokens)
        hidden = main.model(tokens[:, :length], use_cache=False).last_hidden_state
        for k in range(depth):
            # transformers counts positions from the embedded token; a common shift changes nothing under RoPE.
            positions = torch.arange(k + 1, k + 1 + length).unsqueeze(0)
            hidden = theirs.forward_layer(k, hidden, positions, None, input_ids=tokens[:, k + 1 : k + 1 + length])
            mine, other = model.logits(ours[k].hidden), theirs._project_to_logits(hidden)
            assert ((mine - other).abs().max() / other.abs().max()).item() < 1e-4
    assert len(ours) == depth
    assert all(len(features.routing) == 1 for features in ours)
