"""The C++ operator: the torch path's numbers, the same bits in any company, and no way to make it read astray."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tael.engine import Engine, SamplingParams
from tael.engine.batch import StepBatch
from tael.engine.native import NativeRunner, build, load_operator, obstacle
from tael.engine.native.weights import check_shape
from tael.errors import TaelError
from tael.model import ModelConfig, Transformer, build_model
from tael.weights.quantize import QuantizedEmbedding, QuantizedLinear, quantize_model

from .conftest import random_model

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"the operator needs {obstacle()}")

COMMON: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "moe_intermediate_size": 32,
}
YARN = {
    "type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 64,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
SHAPES = {
    "llama": ModelConfig(model_type="llama", num_key_value_heads=2, attention_bias=True, **COMMON),
    "qwen2": ModelConfig(model_type="qwen2", num_key_value_heads=2, tie_word_embeddings=True, **COMMON),
    "v3": ModelConfig(
        q_lora_rank=24,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
        **COMMON,
        **LATENT,
    ),
    "v2": ModelConfig(model_type="deepseek_v2", rope_scaling=YARN, n_shared_experts=2, **COMMON, **LATENT),
    "no shared experts": ModelConfig(n_shared_experts=0, **COMMON, **LATENT),
}
BLOCK = 4
BLOCKS = 200


def random_tokens(count: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(100) for _ in range(count)]


def runner(model: Transformer, dtype: torch.dtype | None = torch.float32) -> NativeRunner:
    return NativeRunner(model, BLOCKS, BLOCK, cache_dtype=dtype)


def read(to: NativeRunner, parts: list[tuple[list[int], int, list[int], bool]]) -> torch.Tensor:
    return to.logits(to.forward(StepBatch.build(parts)))


TABLE, OTHER = list(range(1, 90)), list(range(90, 190))


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest) -> Transformer:
    return random_model(SHAPES[request.param])


@torch.no_grad()
def test_logits_equal_torchs(model: Transformer) -> None:
    """Prompts of several lengths at once (more than a chunk of keys), then token by token across block borders."""
    prompts = [random_tokens(n, n) for n in (300, 5, 37)]
    tables = [list(range(1, 76)), [76, 77], list(range(78, 88))]
    wanted = torch.cat([model(torch.tensor([p]))[0] for p in prompts])
    found = read(runner(model), [(p, 0, t, True) for p, t in zip(prompts, tables, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    stepped = runner(model)
    steps = [read(stepped, [([token], i, tables[2], False)]) for i, token in enumerate(prompts[2])]
    torch.testing.assert_close(torch.cat(steps), wanted[305:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_weights(dtype: torch.dtype) -> None:
    """Weights are read as they are stored and multiplied in fp32: as the same values in fp32."""
    for name in ("llama", "v3"):
        model = random_model(SHAPES[name]).to(dtype)
        wide = build_model(SHAPES[name])
        wide.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
        tokens = random_tokens(40)
        found = read(runner(model), [(tokens, 0, TABLE, True)])
        torch.testing.assert_close(found, wide(torch.tensor([tokens]))[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 0.005), (torch.bfloat16, 0.05)])
@torch.no_grad()
def test_narrow_caches(model: Transformer, dtype: torch.dtype, limit: float) -> None:
    tokens = random_tokens(60)
    to = runner(model, dtype)
    assert to.cache_bytes == to.cache.untyped_storage().nbytes()
    found = torch.cat([read(to, [([t], i, TABLE, False)]) for i, t in enumerate(tokens)])
    assert (found - model(torch.tensor([tokens]))[0]).abs().mean() < limit


@torch.no_grad()
def test_mtp_equals_training() -> None:
    model = random_model(SHAPES["v3"])
    tokens = torch.tensor([random_tokens(37)])
    hidden = model.features(tokens).hidden
    wanted = model.mtp_features(hidden[:, :-1], tokens)[0].hidden[0]
    batch = StepBatch.build([(tokens[0, 1:].tolist(), 1, TABLE, True)])
    torch.testing.assert_close(runner(model).draft(1, batch, hidden[0, :-1]), wanted, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- formats


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 61])
@pytest.mark.parametrize(
    ("scheme", "group", "asymmetric"),
    [("int4", 32, False), ("int4", 32, True), ("int4", 64, False), ("int8", 32, False), ("w8a8", 32, False)],
)
def test_a_product_is_the_modules(scheme: Any, group: int, asymmetric: bool, rows: int) -> None:
    """Equal but for the order of sums, and for activations that lie between two codes to the last bit."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(83, 192, generator=generator)  # 83: the last panel is not full
    module = QuantizedLinear.from_float(weight, scheme, group, asymmetric)
    library = load_operator()
    packed = library.pack(scheme, module.codes, module.scales, module.minimums)
    matrix = library.packed_matrix(scheme, packed, 83, 192, asymmetric)
    x = torch.randn(rows, 192, generator=generator)
    error = (product(matrix, x) - module(x)).abs()
    assert error.max() < (1e-4 if scheme == "int8" else 0.2) and error.mean() < (1e-5 if scheme == "int8" else 1e-3)


def product(matrix: Any, x: torch.Tensor) -> torch.Tensor:
    """x [n, in] -> [n, out] through the operator's head."""
    library = load_operator()
    shape = library.Shape()
    shape.hidden, shape.heads, shape.kv_heads, shape.head_dim = x.shape[1], 1, 1, 8
    operator = library.Model(shape, 2)
    operator.set_ends(matrix, matrix, torch.ones(x.shape[1]))
    return operator.logits(x)


def test_extreme_codes() -> None:
    """Sums of the largest codes and activations of one sign do not wrap around."""
    library = load_operator()
    for scheme, code, value in (
        ("int4", 0xFF, 7.0),
        ("int4", 0x00, -8.0),
        ("w8a8", -127, -127.0),
        ("w8a8", 127, 127.0),
    ):
        kind = torch.uint8 if scheme == "int4" else torch.int8
        codes = torch.full((8, 32 if scheme == "int4" else 64), code, dtype=kind)
        packed = library.pack(scheme, codes, torch.ones(8, 2).half())
        matrix = library.packed_matrix(scheme, packed, 8, 64)
        for sign in (1.0, -1.0):
            found = product(matrix, torch.full((1, 64), sign))
            torch.testing.assert_close(found, torch.full((1, 8), 64 * value * sign))


@torch.no_grad()
def test_embedding_rows_are_exact() -> None:
    config = dataclasses.replace(SHAPES["llama"], num_hidden_layers=1, attention_bias=False)
    model = random_model(config)
    quantize_model(model, "int8")
    assert isinstance(model.embed_tokens, QuantizedEmbedding)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and name != "lm_head":
            module.scales.zero_()  # the layer adds nothing
    found = runner(model).forward(StepBatch.build([(list(range(100)), 0, TABLE, True)]))
    wanted = model.norm(model.embed_tokens(torch.arange(100)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scheme", ["int4", "int8", "w8a8"])
@torch.no_grad()
def test_quantised_models(model: Transformer, scheme: Any) -> None:
    copy = build_model(model.config)
    copy.load_state_dict(model.state_dict())
    quantize_model(copy, scheme)
    tokens = random_tokens(80)
    found, wanted = read(runner(copy), [(tokens, 0, TABLE, True)]), copy(torch.tensor([tokens]))[0]
    error = (found - wanted).abs()
    assert error.mean() < (1e-5 if scheme == "int8" else 0.05)


# ------------------------------------------------------------------ any company


@pytest.mark.parametrize("scheme", [None, "int4", "int8", "w8a8"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_same_bits_in_any_company(scheme: Any, data: st.DataObject) -> None:
    """A prompt in pieces, beside others that read and decode, gives the bits of the prompt alone."""
    name = data.draw(st.sampled_from(sorted(SHAPES)))
    model = _prepared(name, scheme)
    tokens, length = random_tokens(90, 1), data.draw(st.integers(1, 90))
    alone = read(runner(model, None), [(tokens[:length], 0, TABLE, True)])
    shared, at, found = runner(model, None), 0, []
    neighbour, place = random_tokens(300, 2), 0
    while at < length:
        some = data.draw(st.integers(1, length - at))
        count = data.draw(st.integers(0, 20))
        parts = [(tokens[at : at + some], at, TABLE, True)]
        if count:
            form = data.draw(st.booleans())
            parts.insert(data.draw(st.integers(0, 1)), (neighbour[place : place + count], place, OTHER, form))
        first = 0 if parts[0][2] is TABLE else count
        found.append(read(shared, parts)[first : first + some])
        at, place = at + some, place + count
    assert torch.equal(torch.cat(found), alone)


_MODELS: dict[tuple[str, Any], Transformer] = {}


def _prepared(name: str, scheme: Any) -> Transformer:
    if (name, scheme) not in _MODELS:
        model = random_model(SHAPES[name])
        if scheme:
            quantize_model(model, scheme)
        _MODELS[name, scheme] = model
    return _MODELS[name, scheme]


@pytest.mark.parametrize("name", ["llama", "v3"])
def test_an_engines_answers_are_the_same_bits_in_company(name: str) -> None:
    """Log-probabilities included, through preemption in a small cache."""
    model = _prepared(name, "int4")
    prompts = [random_tokens(3 + 5 * i, i) for i in range(6)]
    params = [SamplingParams(12, 0.8, 0.9, seed=i) for i in range(6)]

    def engine(**settings: Any) -> Engine:
        return Engine(model, backend="native", block_size=4, prefix_cache="prompts", **settings)

    alone = [engine().generate([p], [s])[0] for p, s in zip(prompts, params, strict=True)]
    small = engine(cache_tokens=80, token_budget=16, max_batch=6)
    for found, wanted in zip(small.generate(prompts, params), alone, strict=True):
        assert (found.tokens, found.logprobs) == (wanted.tokens, wanted.logprobs)
    assert small.stats.preemptions > 0


# ----------------------------------------------------------------------- limits


def test_training_in_place_is_seen() -> None:
    model = random_model(SHAPES["llama"])
    tokens = random_tokens(9)
    before = read(runner(model), [(tokens, 0, TABLE, True)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    after = read(runner(model), [(tokens, 0, TABLE, True)])
    assert not torch.equal(before, after)
    with torch.no_grad():
        torch.testing.assert_close(after, model(torch.tensor([tokens]))[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (([100], 0, TABLE, True), "outside the vocabulary"),
        (([-1], 0, TABLE, True), "outside the vocabulary"),
        (([1], 1024, list(range(1, 300)), True), "beyond the rope table"),
        (([1], 500, [1, 2], True), "beyond its block table"),
        (([1], 0, [BLOCKS], True), "outside the cache"),
        (([1], 0, [-1], True), "outside the cache"),
    ],
)
def test_nothing_is_read_astray(part: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(runner(_prepared("llama", None)), [part])


def test_shapes_it_does_not_take() -> None:
    with pytest.raises(TaelError, match="head_dim to be a multiple of 8, not 12"):
        check_shape(dataclasses.replace(SHAPES["llama"], head_dim=12))


def test_block_sizes_it_does_not_take() -> None:
    with pytest.raises(TaelError, match="block_size that is a power of two, not 24"):
        list(Engine(_prepared("llama", None), backend="native", block_size=24).stream([1, 2, 3], max_tokens=2))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "a C++ compiler ('no-such-compiler' is not there" in (obstacle() or "")
    with pytest.raises(TaelError, match="the engine runs on torch"):
        load_operator()


def test_an_old_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "processor_features", lambda: frozenset({"sse2", "fma"}))
    assert obstacle() == "a processor with avx2, f16c"
