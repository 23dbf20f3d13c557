"""Experts that stay in the mapped files: the same numbers, no copy in memory, and the notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tael.errors import TaelError
from tael.model import ModelConfig, build_model
from tael.weights import load_model, save_model
from tael.weights.mapped import MappedExperts, load_mapped
from tael.weights.reader import dequantise_blocks

V3 = ModelConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, moe_intermediate_size=32)
V2 = ModelConfig(
    model_type="deepseek_v2",
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=2,
    n_shared_experts=2,
    n_routed_experts=6,
)
LLAMA = ModelConfig(model_type="llama", vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
TOKENS = torch.arange(60).view(3, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [V3, V2, LLAMA], ids=["v3", "v2", "llama"])
def test_mapped_equals_unmapped(config: ModelConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    save_model(build_model(config, zero_residual=False), tmp_path / "m", dtype=dtype)
    mapped, whole = load_mapped(tmp_path / "m"), load_model(tmp_path / "m")
    with torch.no_grad():
        assert torch.allclose(mapped(TOKENS), whole(TOKENS), atol=1e-5)
    stacks = [module for module in mapped.modules() if isinstance(module, MappedExperts)]
    assert len(stacks) == len(config.moe_layers)
    for index, stack in zip(config.moe_layers, stacks, strict=True):
        down = whole.layers[index].mlp.experts.down_proj
        assert all(torch.equal(w.values.float(), down[e]) for e, w in enumerate(stack.down))
        assert all(w.values.dtype == dtype for w in stack.gate + stack.up + stack.down)


def test_fp8_experts_stay_fp8(tmp_path: Path) -> None:
    save_model(build_model(V3, zero_residual=False), tmp_path / "m", dtype=torch.float32)
    file, config = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "config.json"
    tensors = load_file(file)
    for name in [n for n in tensors if ".experts." in n]:
        weight = tensors[name]
        scale = torch.rand(-(-weight.shape[0] // 16), -(-weight.shape[1] // 24)) * 1e-3 + 1e-4
        tensors[name] = (100 * torch.randn(weight.shape)).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, file)
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 24]}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": quantization}))
    mapped, whole = load_mapped(tmp_path / "m"), load_model(tmp_path / "m")
    assert mapped.layers[1].mlp.experts.up[0].values.dtype == torch.float8_e4m3fn
    with torch.no_grad():
        assert torch.allclose(mapped(TOKENS), whole(TOKENS), atol=1e-4)


def test_blocks_with_ragged_edges() -> None:
    raw = torch.randn(5, 7).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 3)
    expected = raw.float() * scale.repeat_interleave(2, 0)[:5].repeat_interleave(3, 1)[:, :7]
    assert torch.equal(dequantise_blocks(raw, scale, (2, 3)), expected)


RESIDENT = """
import sys, torch
from tael.weights.mapped import MappedExperts, load_mapped
torch.set_num_threads(1)
def anonymous():
    return 1024 * sum(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))
load_mapped(sys.argv[1])
before = anonymous()
model = load_mapped(sys.argv[2])
experts = [m for m in model.modules() if isinstance(m, MappedExperts)]
total = sum(float(w.values.view(torch.int16).max()) for m in experts for w in m.gate + m.up + m.down)
size = sum(w.values.nbytes for m in experts for w in m.gate + m.up + m.down)
print(anonymous() - before, size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory figures")
def test_experts_are_not_copied(tmp_path: Path) -> None:
    """Every expert read, and the process's own memory has grown by the rest of the model only."""
    big = ModelConfig(
        vocab_size=96, hidden_size=512, num_hidden_layers=2, moe_intermediate_size=512, n_routed_experts=48
    )
    save_model(build_model(big), tmp_path / "big", dtype=torch.bfloat16)
    save_model(build_model(V3), tmp_path / "small")
    command = [sys.executable, "-c", RESIDENT, str(tmp_path / "small"), str(tmp_path / "big")]
    grown, size = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert size == 2 * 48 * 3 * 512 * 512  # 75 MB
    assert grown < size / 2


def test_notice_when_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(build_model(V3), tmp_path / "m")
    lines: list[str] = []
    load_mapped(tmp_path / "m", notice=lines.append)
    assert not lines
    monkeypatch.setattr("tael.weights.mapped.psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    load_mapped(tmp_path / "m", notice=lines.append)
    assert len(lines) == 1 and "quantise the model to int4" in lines[0]


def test_not_saved_without_its_experts(tmp_path: Path) -> None:
    save_model(build_model(V3), tmp_path / "m")
    with pytest.raises(TaelError, match="cannot be saved"):
        save_model(load_mapped(tmp_path / "m"), tmp_path / "again")
    with pytest.raises(TaelError, match="no such model folder"):
        load_mapped(tmp_path / "nothing")
