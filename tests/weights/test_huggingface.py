"""Model folders: round trips with transformers and with ourselves, FP8 blocks, shards, and every refusal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tael.errors import TaelError
from tael.model import ModelConfig, Transformer, build_model
from tael.weights import huggingface, load_model, save_model, to_hugging_face

V3 = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=6,
    moe_intermediate_size=8,
    n_group=3,
    topk_group=2,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    bos_token_id=0,
    eos_token_id=1,
)
YARN = {
    "type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
V2 = ModelConfig(
    model_type="deepseek_v2",
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    n_routed_experts=6,
    n_shared_experts=2,
    moe_intermediate_size=8,
    n_group=3,
    topk_group=1,
    rope_scaling=YARN,
    attention_bias=True,
)
LLAMA = ModelConfig(
    model_type="llama",
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_key_value_heads=2,
    head_dim=12,
    attention_bias=True,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
)
QWEN = ModelConfig(
    model_type="qwen2",
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)
ALL = {"v3": V3, "v2": V2, "llama": LLAMA, "qwen2": QWEN}
TOKENS = torch.arange(38).view(2, 19) % 48


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    model = build_model(config, seed=seed, zero_residual=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.3 * noise if "norm" in name and tensor.dim() == 1 else 0.2 * noise)
    return model


def assert_same_bits(ours: Transformer, theirs: Transformer) -> None:
    left, right = ours.state_dict(), theirs.state_dict()
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def rewrite(folder: Path, change: dict[str, Tensor | None] | None = None, **config: Any) -> None:
    """Replace (None: remove) tensors of a saved folder, and keys of its config.json."""
    tensors: dict[str, Any] = {**load_file(folder / "model.safetensors"), **(change or {})}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**table, **config}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(random_model(V3), tmp_path / "model")
    return tmp_path / "model"


# ------------------------------------------------------------------ round trips


@pytest.mark.parametrize("name", list(ALL))
def test_save_and_load_give_the_same_bits(name: str, tmp_path: Path) -> None:
    model = random_model(ALL[name])
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert_same_bits(model, again)
    assert torch.equal(model(TOKENS), again(TOKENS))
    assert all(p.requires_grad for p in again.parameters())
    assert again.config == ModelConfig.load(tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    if model.config.tie_word_embeddings:
        assert again.lm_head.weight is again.embed_tokens.weight


@pytest.mark.parametrize("name", list(ALL))
def test_transformers_loads_what_tael_saves(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = random_model(ALL[name])
    save_model(model, tmp_path / "model")
    other, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    extra = [key for key in info["unexpected_keys"] if not key.startswith("model.layers.2.")]  # 2: the MTP layer
    assert not extra
    assert other.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), other(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(ALL))
def test_tael_loads_what_transformers_saves(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_model(random_model(ALL[name]), tmp_path / "ours")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    other.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    assert model.config.num_nextn_predict_layers == 0  # transformers drops MTP and keeps the config's word for it
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), other(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_mtp_names_are_the_released_ones(folder: Path) -> None:
    names = {name.removeprefix("model.layers.2.") for name in load_file(folder / "model.safetensors")}
    released = {"embed_tokens.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    released |= {"shared_head.head.weight", "self_attn.kv_a_proj_with_mqa.weight", "input_layernorm.weight"}
    released |= {"mlp.experts.5.gate_proj.weight", "mlp.gate.e_score_correction_bias"}
    assert released <= names


def test_a_dense_model_keeps_its_mtp(tmp_path: Path) -> None:
    model = random_model(dataclasses.replace(LLAMA, num_nextn_predict_layers=2))
    save_model(model, tmp_path / "model")
    assert_same_bits(model, load_model(tmp_path / "model"))


def test_mtp_copies_may_be_missing(folder: Path) -> None:
    rewrite(folder, {"model.layers.2.embed_tokens.weight": None, "model.layers.2.shared_head.head.weight": None})
    assert_same_bits(random_model(V3), load_model(folder))


def test_bf16_keeps_the_selection_bias_exact(tmp_path: Path) -> None:
    model = random_model(V3)
    save_model(model, tmp_path / "model", dtype=torch.bfloat16)
    table = json.loads((tmp_path / "model" / "config.json").read_text())
    assert table["torch_dtype"] == "bfloat16"
    again = load_model(tmp_path / "model", dtype=torch.bfloat16)
    for name, tensor in again.state_dict().items():
        kind = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert tensor.dtype == kind
        assert torch.equal(tensor, model.state_dict()[name].to(kind))
    assert again(TOKENS).isfinite().all()


def test_shards_with_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    model = random_model(V3)
    save_model(model, tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for _, t in to_hugging_face(model))
    assert_same_bits(model, load_model(tmp_path / "model"))
    (tmp_path / "model" / files[1]).unlink()
    with pytest.raises(TaelError, match=files[1]):
        load_model(tmp_path / "model")


def test_fp8_blocks_are_dequantised(tmp_path: Path) -> None:
    """Quantised here by DeepSeek's rule, with blocks that do not divide the shape; every value must come back."""
    config = dataclasses.replace(V3, hidden_size=160, intermediate_size=200, num_nextn_predict_layers=0)
    model = random_model(config)
    save_model(model, tmp_path / "model")
    change: dict[str, Tensor | None] = {}
    expected = {}
    for name in ("model.layers.0.mlp.gate_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"):
        weight = load_file(tmp_path / "model" / "model.safetensors")[name]
        rows, columns = (-(-size // 128) for size in weight.shape)
        scale, stored = torch.empty(rows, columns), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        expected[name] = torch.empty_like(weight)
        for i in range(rows):
            for j in range(columns):
                block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                scale[i, j] = weight[block].abs().max() / 448
                stored[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
                expected[name][block] = stored[block].float() * scale[i, j]
        change |= {name: stored, f"{name}_scale_inv": scale}
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    rewrite(tmp_path / "model", change, quantization_config=quantization)
    again = load_model(tmp_path / "model")
    assert torch.equal(
        again.state_dict()["layers.0.mlp.gate_proj.weight"], expected["model.layers.0.mlp.gate_proj.weight"]
    )
    up = again.state_dict()["layers.1.mlp.experts.gate_up_proj"][3, config.moe_intermediate_size :]
    assert torch.equal(up, expected["model.layers.1.mlp.experts.3.up_proj.weight"])
    close = again.state_dict()["layers.0.mlp.gate_proj.weight"] - model.state_dict()["layers.0.mlp.gate_proj.weight"]
    assert 0 < close.abs().max() < 0.1
    rewrite(tmp_path / "model", {"model.layers.0.mlp.gate_proj.weight_scale_inv": None})
    with pytest.raises(TaelError, match="scale_inv"):
        load_model(tmp_path / "model")


def test_missing_bias_becomes_zero_and_known_extras_are_ignored(folder: Path) -> None:
    rewrite(
        folder,
        {
            "model.layers.1.mlp.gate.e_score_correction_bias": None,
            "model.layers.0.self_attn.rotary_emb.inv_freq": TOKENS,
        },
    )
    assert not load_model(folder).state_dict()["layers.1.mlp.gate.e_score_correction_bias"].any()


# ------------------------------------------------------------------ saving safely


def test_generation_config_and_tokenizer_are_written(tmp_path: Path) -> None:
    class Tokenizer:
        def save(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    save_model(random_model(V3), tmp_path / "model", tokenizer=Tokenizer())
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == 1
    assert (tmp_path / "model" / "tokenizer.json").exists()


def test_an_older_model_is_replaced_and_survives_a_failure(tmp_path: Path) -> None:
    class Broken:
        def save(self, folder: Path) -> None:
            raise OSError("disk full")

    first, second = random_model(V3, 1), random_model(V3, 2)
    save_model(first, tmp_path / "model")
    with pytest.raises(OSError, match="disk full"):
        save_model(second, tmp_path / "model", tokenizer=Broken())
    assert_same_bits(first, load_model(tmp_path / "model"))
    save_model(second, tmp_path / "model")
    assert_same_bits(second, load_model(tmp_path / "model"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "notes.txt").write_text("x")
    with pytest.raises(TaelError, match="precious"):
        save_model(random_model(V3), tmp_path / "precious")
    assert (tmp_path / "precious" / "notes.txt").exists()


# ------------------------------------------------------------------ refusals: one line, file and tensor named


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(TaelError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_missing_tensor(folder: Path) -> None:
    rewrite(folder, {"model.layers.1.mlp.experts.4.up_proj.weight": None})
    refused(folder, "model.layers.1.mlp.experts.4.up_proj.weight", "missing")


def test_missing_norm_is_not_left_at_chance(folder: Path) -> None:
    rewrite(folder, {"model.norm.weight": None})
    refused(folder, "model.norm.weight", "missing")


def test_missing_head_of_an_untied_model(folder: Path) -> None:
    rewrite(folder, {"lm_head.weight": None})
    refused(folder, "lm_head.weight", "missing")


def test_unexpected_tensor(folder: Path) -> None:
    rewrite(folder, {"model.layers.0.self_attn.q_norm.weight": torch.ones(3)})
    refused(folder, "model.layers.0.self_attn.q_norm.weight", "unexpected", "model.safetensors")


def test_mtp_tensors_without_mtp_in_the_config(folder: Path) -> None:
    rewrite(folder, num_nextn_predict_layers=0)
    refused(folder, "model.layers.2.", "num_nextn_predict_layers")


def test_misshapen_tensor(folder: Path) -> None:
    rewrite(folder, vocab_size=50)
    refused(folder, "model.embed_tokens.weight", "[48, 32]", "[50, 32]")


def test_mtp_table_that_differs(folder: Path) -> None:
    rewrite(folder, {"model.layers.2.shared_head.head.weight": torch.zeros(48, 32)})
    refused(folder, "shared_head.head.weight", "differs")


def test_tied_config_with_another_head(tmp_path: Path) -> None:
    save_model(random_model(QWEN), tmp_path / "model")
    rewrite(tmp_path / "model", {"lm_head.weight": torch.zeros(48, 32)})
    refused(tmp_path / "model", "lm_head.weight", "differs")


def test_integer_weights(folder: Path) -> None:
    rewrite(folder, {"model.norm.weight": torch.ones(32, dtype=torch.int8)})
    refused(folder, "model.norm.weight", "int8")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "model.safetensors", "damaged")


def test_noise_for_a_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)
    refused(folder, "model.safetensors", "damaged")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_opened(name: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(folder, name, "pickle")


def test_nothing_there(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere")
    refused(tmp_path, "config.json")
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../model.safetensors"}}'])
def test_broken_index(text: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "index.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("use_sliding_window", True),
        ("mlp_bias", True),
        ("partial_rotary_factor", 0.5),
        ("weight_block_size", [128]),
        ("hidden_act", "gelu"),
        ("model_type", "mamba"),
    ],
)
def test_configs_that_would_change_the_numbers(key: str, value: Any, folder: Path) -> None:
    if key == "weight_block_size":
        rewrite(folder, quantization_config={"quant_method": "fp8", key: value})
    else:
        rewrite(folder, **{key: value})
    refused(folder, "gptq" if key == "quantization_config" else key, "config.json")
