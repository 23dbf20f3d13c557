"""Devices without having them: the choice, and a whole training pass on the meta device.

The meta device carries shapes and types but no numbers: a tensor the model forgot to make on its own device shows.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tael.errors import TaelError
from tael.model import ModelConfig, Transformer
from tael.train.balance import expert_load, sequence_balance_loss
from tael.train.losses import linear_cross_entropy
from tael.train.parallel import choose_device
from tael.train.precision import choose_precision


def test_auto_takes_cuda_when_it_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("auto") == torch.device("cuda", 3)
    assert choose_device("cuda:1") == torch.device("cuda", 1)


def test_auto_falls_back_to_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    for name in ("cuda", "mps"):
        with pytest.raises(TaelError, match="use device"):
            choose_device(name)
    with pytest.raises(TaelError, match="is not a device"):
        choose_device("gpu please")


class OnlyOn(TorchDispatchMode):
    """Refuses every operation that makes a tensor on another device (scalars that torch wraps by itself excepted)."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != self.device and tensor.dim():
                raise AssertionError(f"{func} made a tensor on {tensor.device}")
        return out


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v2", "qwen2"])
def test_a_training_pass_stays_on_its_device(model_type):
    mtp = 1 if model_type == "deepseek_v3" else 0
    config = ModelConfig(
        model_type=model_type, num_hidden_layers=2, num_nextn_predict_layers=mtp, n_group=2, topk_group=1
    )
    with torch.device("meta"):
        model = Transformer(config).bfloat16()
        tokens, documents = torch.zeros(2, 17, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int64)
    with OnlyOn("meta"):
        hidden, routing = model.features(tokens[:, :16], documents)
        loss = linear_cross_entropy(hidden, model.lm_head.weight, tokens[:, 1:])
        for decided in routing:
            loss = loss + sequence_balance_loss(decided, config.num_experts_per_tok) + expert_load(decided).sum()
        for features in model.mtp_features(hidden, tokens, documents):
            loss = loss + linear_cross_entropy(features.hidden, model.lm_head.weight, tokens[:, 1:])
        loss.backward()
    assert hidden.shape == (2, 16, config.hidden_size)
    assert len(routing) == (0 if model_type == "qwen2" else 1)
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in model.parameters())


def test_auto_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for able, wanted in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        assert choose_precision("auto", cpu) == wanted
        assert choose_precision("bf16", cpu) == "bf16" and choose_precision("fp32", cpu) == "fp32"


def compiled_by_onednn(**environment: str) -> int:
    """How many kernels oneDNN compiles, by its own log, for 300 convolutions of different width, each done twice."""
    program = """
import torch
from tael.train.precision import limit_kernel_cache
limit_kernel_cache()
weight = torch.ones(8, 8, 3, 3)
for _ in range(2):
    for width in range(8, 308):
        torch.nn.functional.conv2d(torch.ones(2, 8, 8, width), weight)
"""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ONEDNN_")}
    kept |= {"ONEDNN_VERBOSE": "profile_create", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", program], env=kept, capture_output=True, text=True, check=True)
    return sum("create:cache_miss" in line and ",convolution," in line for line in done.stdout.splitlines())


def test_onednn_keeps_fewer_kernels_unless_the_user_says_otherwise() -> None:
    """oneDNN itself is asked: with 256 kept, every one of 300 is compiled again the second time."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("a torch without oneDNN")
    assert compiled_by_onednn(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024") == 300
    assert compiled_by_onednn() == 600
