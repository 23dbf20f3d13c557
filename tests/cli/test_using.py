"""complete, chat, bench and eval: what their options reach, constraints, figures, benches."""

from __future__ import annotations

import json
import re

import pytest
import torch

from tael import load_model, load_tokenizer, shell, using
from tael.benchmark import Plan, weight_bytes
from tael.engine import Engine, EngineSettings
from tael.errors import TaelError
from tael.loading import USUAL_CONTEXT, choose_backend, find_model, load, load_engine, load_transformer
from tael.recipe import PriceSettings
from tael.weights import load_mapped, save_gguf
from tael.weights.quantize import is_quantized

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}


@pytest.fixture
def asked(monkeypatch):
    """What the last `Engine.stream` was asked with: (engine, prompt, params)."""
    seen = []
    real = Engine.stream

    def stream(self, prompt, params=None, **options):
        seen.append((self, prompt, params))
        return real(self, prompt, params, **options)

    monkeypatch.setattr(Engine, "stream", stream)
    return seen


@pytest.mark.parametrize("command", ["complete", "chat"])
def test_options_reach_the_engine(call, model, asked, command):
    drawn = ("--max-tokens=7", "--temperature=0.4", "--top-p=0.9", "--top-k=11", "--min-p=0.05", "--seed=5")
    formed = ("--repetition-penalty=1.2", "--stop=ab", "--stop=cd", "--thinking-budget=9", "--choice=yes")
    options = (*drawn, *formed, "--choice=no", "--speculate=on", "--backend=torch", "--context=96")
    prompt = ("What is",) if command == "complete" else ()
    result = call(command, model, *prompt, *options, text="What is\n")
    assert result.exit_code == 0, result.output
    engine, _, params = asked[0]
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (7, 0.4, 0.9, 11)
    assert (params.min_p, params.repetition_penalty, params.seed, params.stop) == (0.05, 1.2, 5, ("ab", "cd"))
    assert params.thinking_budget == 9 and params.loop_guard and params.constraint.value == ("yes", "no")
    assert params.stop_ids == engine.tokenizer.stop_ids
    assert (engine.settings.backend, engine.settings.speculate) == ("torch", "on")
    assert engine.settings.cache_tokens <= 96 + 32


def test_speculation_is_off_without_mtp_modules(call, model, asked):
    call("complete", model, "What is", "--max-tokens", "3")
    assert asked[0][0].settings.speculate == "off" and asked[0][0].settings.backend == "torch"


@pytest.mark.parametrize(
    ("options", "form"),
    [
        (("--regex", "[ab]{3,5}c"), r"[ab]{3,5}c"),
        (("--choice", "left", "--choice", "right"), r"left|right"),
        (("--json-schema", json.dumps(SCHEMA)), r"\{\s*\"n\"\s*:\s*-?\d+\s*\}"),
        (("--json-schema", "schema.json"), r"\{\s*\"n\"\s*:\s*-?\d+\s*\}"),
    ],
)
def test_answers_take_the_form_asked_for(call, model, tmp_path, options, form):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    told = json.loads(call("complete", model, "Say:", "--max-tokens", "120", *options, "--json").stdout)
    assert told["finish_reason"] == "stop" and re.fullmatch(form, told["text"]), told["text"]


def test_a_json_object_in_the_chat(call, model):
    result = call("chat", model, "--json-object", "--max-tokens", "60", "--temperature", "0", text="/think off\nGo\n")
    assert result.exit_code == 0 and result.stdout.lstrip().startswith("{")


def test_constraints_that_cannot_be(fails, model):
    assert "give one of --json-object" in fails("complete", model, "x", "--json-object", "--regex", "a")
    assert "no such file, and not JSON" in fails("complete", model, "x", "--json-schema", "nowhere.json")
    assert "the schema is not JSON" in fails("complete", model, "x", "--json-schema", "{nonsense")
    assert "cannot use this regex" in fails("complete", model, "x", "--regex", "(", "--json")
    assert "--context 900: this model's context is 160" in fails("complete", model, "x", "--context", "900")
    assert "more than --context 20" in fails("complete", model, "x", "--context", "20", "--max-tokens", "30")
    assert "leave --quantize" in fails("complete", model, "x", "--quantize", "int8", "--map-experts")


def test_a_stop_string_ends_the_answer(call, model):
    whole = json.loads(call("complete", model, "What", "--max-tokens", "30", "--json").stdout)["text"]
    stop = whole[8:10]
    told = json.loads(call("complete", model, "What", "--max-tokens", "30", "--stop", stop, "--json").stdout)
    assert told["finish_reason"] == "stop" and told["text"] == whole[: whole.index(stop)]


def test_figures_after_an_answer(call, model):
    result = call("complete", model, "What is", "--max-tokens", "5", "--price", "3600")
    line = result.stderr.splitlines()[-1]
    assert re.fullmatch(r"5 tokens, [\d.,]+ tok/s, first after [\d.]+ s, \$[\d.]+; cut off by the token limit", line)
    told = json.loads(call("complete", model, "What is", "--max-tokens", "5", "--price", "3600", "--json").stdout)
    assert told["dollars"] == pytest.approx(told["seconds"], abs=1e-6) and told["prompt_tokens"] >= 2
    assert 0 < told["first_token_seconds"] <= told["seconds"] and told["tokens_per_second"] > 0
    assert PriceSettings().dollars_per_hour == shell.PRICE


def test_the_second_turn_finds_the_first_in_the_cache(call, model):
    text = "What is 12+30-4? It is 38, says the quick brown fox.\nAnd now?\n"
    result = call("chat", model, "--max-tokens", "8", text=text)
    lines = [line for line in result.stderr.splitlines() if "tok/s" in line]
    assert "cached" not in lines[0] and int(re.search(r"(\d+) of \d+ prompt tokens cached", lines[1])[1]) >= 16


def test_quantised_on_load(call, model, asked):
    options = ("--max-tokens", "3", "--backend", "torch")
    wide = load_transformer(model, "cpu", "int8")
    assert is_quantized(wide)
    assert call("complete", model, "What", "--quantize", "int8", *options).exit_code == 0
    assert is_quantized(asked[-1][0].model)
    assert call("complete", model, "What", "--quantize", "int3", *options).exit_code == 2


def test_a_gguf_file_can_keep_its_codes_and_be_quantised(model, tmp_path, monkeypatch, fails):
    save_gguf(load_model(model), tmp_path / "m.gguf", load_tokenizer(model), "q8_0")
    assert is_quantized(load(str(tmp_path / "m.gguf"), backend="torch", quantize="keep").model)
    assert not is_quantized(load(str(tmp_path / "m.gguf"), backend="torch").model)  # small: as floats
    monkeypatch.setattr("tael.loading.SMALL_FILE", 1000)
    assert is_quantized(load(str(tmp_path / "m.gguf"), backend="torch").model)
    assert "--quantize keep is for .gguf files" in fails("complete", model, "x", "--quantize", "keep")
    save_gguf(load_model(model), tmp_path / "f.gguf", load_tokenizer(model), "f16")
    assert not is_quantized(load(str(tmp_path / "f.gguf"), backend="torch").model)
    assert is_quantized(load(str(tmp_path / "f.gguf"), backend="torch", quantize="int8").model)


def test_experts_left_in_the_file_give_the_same_answer(call, model):
    plain, mapped = (
        json.loads(call("complete", model, "What", "--max-tokens", "6", *more, "--json").stdout)["text"]
        for more in ((), ("--map-experts",))
    )
    assert plain == mapped
    gate, up, down = load_mapped(model).layers[1].mlp.experts.expert(1)
    assert gate.shape == up.shape == (16, 32) and down.shape == (32, 16)


def test_eval_of_a_quantised_model(call, model, tmp_path):
    (tmp_path / "more.txt").write_text("The quick brown fox.\n" * 50)
    arguments = ("eval", model, "--suite", "text", "--text", "more.txt", "--json")
    [plain], [rounded] = (json.loads(call(*arguments, *more).stdout) for more in ((), ("--quantize", "int8")))
    assert rounded["bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=0.01)
    assert rounded["bits_per_byte"] != plain["bits_per_byte"]


def test_bench(call, model):
    result = call("bench", model, "--quick", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert {"model", "machine", "parameters", "backend", "prefill", "decode", "cache_bytes_per_token"} <= set(told)
    assert {"weight_bytes", "weight_bytes_per_token", "read_gb_per_second", "achieved_gb_per_second"} <= set(told)
    assert [row["tokens"] for row in told["prefill"]] == [128]
    assert [(row["requests"], row["speculation"]) for row in told["decode"]] == (
        [(1, None), (4, None), (1, "n-gram"), (4, "n-gram")]
    )
    assert all(row["tokens_per_second"]["median"] > 0 for row in told["prefill"] + told["decode"])
    assert told["cache_bytes_per_token"] == 2 * 24 * 4 and told["bandwidth_percent"] > 0
    assert told["weight_bytes_per_token"] < told["weight_bytes"]
    table = call("bench", model, "--quick").stdout
    assert "Plain read of memory" in table and all(len(line) <= 80 for line in table.splitlines())


def test_a_plan_fits_the_context():
    assert Plan.of(8192, 5, False).prompts == (128, 512, 2048)
    assert Plan.of(600, 5, False).prompts == (128, 512) and Plan.of(100, 5, False).prompts == (99,)
    assert Plan.of(40, 5, True).tokens == 16 and Plan.of(8192, 5, True).rounds == 1
    with pytest.raises(TaelError, match="too small to measure"):
        Plan.of(10, 1, False)


def test_weights_a_token_reads(model):
    transformer = load_model(model)
    config = transformer.config
    total, step = weight_bytes(transformer)
    assert total == 4 * config.parameters() + 4 * config.n_routed_experts  # the router's selection bias
    active = config.parameters(active=True, embedding=False, mtp=False)
    assert step == 4 * active + 4 * config.n_routed_experts


# --------------------------------------------------------------------- loading


def test_load_engine(model):
    engine, tokenizer, place = load_engine(str(model), context=64, backend="torch")
    assert place == find_model(str(model)) and engine.tokenizer is tokenizer
    assert "".join(event.text for event in engine.stream("What", max_tokens=4)) != ""
    with pytest.raises(TaelError, match="can never fit"):
        list(engine.stream("What", max_tokens=120))
    loaded = load(str(model), backend="torch")
    assert loaded.context() == 160 < USUAL_CONTEXT and "0.0M parameters in float32, run by torch" in loaded.greeting


def test_who_runs_the_passes(model, monkeypatch):
    from tael.engine.native import build, weights

    transformer, said = load_model(model), []
    assert choose_backend(transformer, "torch", said.append) == "torch"
    monkeypatch.setattr(build, "is_built", lambda: False)
    assert choose_backend(transformer, "auto", said.append) == "torch" and not said
    monkeypatch.setattr(build, "is_built", lambda: True)
    monkeypatch.setattr(build, "load_operator", lambda notify: None)
    assert choose_backend(transformer, "auto", said.append) == "native"
    monkeypatch.setattr(weights, "check_shape", _refuse)
    assert choose_backend(transformer, "auto", said.append) == "torch" and "slower" in said[-1]
    with pytest.raises(TaelError, match="not for it"):
        choose_backend(transformer, "native", said.append)


def _refuse(config) -> None:
    raise TaelError("not for it")


def test_release_is_off_for_others():
    assert not EngineSettings().release and using.constraint(False, None, None, None) is None
    assert torch.get_num_threads() == 1
