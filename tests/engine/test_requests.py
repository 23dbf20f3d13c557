"""Requests that come and go: events, cancelling, scoring, figures, and what is refused without disturbing others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch

from tael.data import Tokenizer
from tael.engine import Engine, EngineSettings, SamplingParams, Sequence, TokenEvent, runner
from tael.engine.constrain import Constraint
from tael.errors import TaelError
from tael.model import Transformer, build_model
from tael.train.losses import token_logprobs

from .conftest import GQA, MLA, random_model

SMALL: dict[str, Any] = {"block_size": 4, "cache_tokens": 96, "max_batch": 4, "token_budget": 12}


def drain(engine: Engine) -> list[TokenEvent]:
    events = []
    while engine.busy:
        events += engine.step()
        engine.pool.scheduler.check_integrity()
    return events


def tokens_of(events: list[TokenEvent], sequence: Sequence) -> list[int]:
    return [event.token for event in events if event.sequence is sequence]


def test_steps_bring_what_generate_brings(model: Transformer) -> None:
    prompts = [[1, 2, 3], [4] * 30, [5, 6], list(range(40)), [7]]
    params = [SamplingParams(12, seed=i) for i in range(5)]
    wanted = Engine(model).generate(prompts, params)
    engine = Engine(model, **SMALL)
    events, sequences = [], []
    for prompt, p in zip(prompts, params, strict=True):
        sequences.append(engine.submit(prompt, p))
        events += engine.step()
    events += drain(engine)
    for sequence, completion in zip(sequences, wanted, strict=True):
        assert tokens_of(events, sequence) == sequence.output == completion.tokens
        assert sequence.logprobs == pytest.approx(completion.logprobs, abs=1e-5)
        assert (sequence.state, sequence.finish_reason) == ("finished", "length")
        assert [e.finish_reason for e in events if e.sequence is sequence] == [None] * 11 + ["length"]
    assert engine.step() == [] and not engine.busy


def test_cancel(model: Transformer) -> None:
    """Waiting, reading, decoding or over: it stops at once, and the others go on."""
    engine = Engine(model, **SMALL)
    wanted = engine.generate([[1, 2]], SamplingParams(20, seed=3))[0].tokens
    one = engine.submit([1, 2], SamplingParams(20, seed=3))
    decoding = engine.submit([3, 4], SamplingParams(20))
    events = engine.step() + engine.step()
    reading = engine.submit(list(range(30)), SamplingParams(20))
    events += engine.step()
    waiting = engine.submit([5] * 40, SamplingParams(30))
    assert (reading.state, waiting.state) == ("running", "waiting")
    for sequence in (decoding, reading, waiting):
        engine.cancel(sequence)
        engine.cancel(sequence)
        assert (sequence.state, sequence.finish_reason) == ("finished", "cancelled")
    events += drain(engine)
    assert tokens_of(events, one) == wanted
    assert len(tokens_of(events, decoding)) == len(decoding.output) == 3
    engine.cancel(one)
    assert one.finish_reason == "length"


def test_generate_and_stream_beside_submitted_requests(model: Transformer) -> None:
    """Events of the others wait for `step`; a stream that is closed early leaves nothing behind."""
    engine = Engine(model, **SMALL)
    wanted = engine.generate([[1, 2]], SamplingParams(10, seed=3))[0].tokens
    other = engine.submit([1, 2], SamplingParams(10, seed=3))
    stream = engine.stream([3, 4], max_tokens=30)
    assert len([next(stream) for _ in range(3)]) == 3
    stream.close()  # type: ignore[attr-defined]
    assert len(engine.generate([[5]], SamplingParams(4))[0].tokens) == 4
    assert tokens_of(drain(engine), other) == wanted
    assert engine.pool.blocks.available == engine.pool.blocks.usable


def test_salts_and_settings_say_who_shares(model: Transformer) -> None:
    prompt, params = list(range(20)), SamplingParams(9, 0.0)
    engine = Engine(model, **SMALL)
    cached = []
    for salt in ("a", "a", "b", None, None):
        sequence = engine.submit(prompt, params, salt=salt)
        drain(engine)
        cached.append(sequence.cached)
    assert cached == [0, 16, 0, 0, 16]
    answer = engine.generate([prompt], params)[0]
    assert (answer.prompt_tokens, answer.cached_tokens) == (20, 16)
    turn = [*prompt, *answer.tokens, 3]
    assert engine.generate([turn], params)[0].cached_tokens == 28
    prompts_only = Engine(model, **SMALL, prefix_cache="prompts")
    prompts_only.generate([prompt], params)
    assert prompts_only.generate([turn], params)[0].cached_tokens == 20
    off = Engine(model, **SMALL, prefix_cache="off")
    assert [off.generate([prompt], params)[0].cached_tokens for _ in range(2)] == [0, 0]


def test_stats(model: Transformer) -> None:
    engine = Engine(model, **SMALL)
    engine.generate([list(range(20))] * 2, SamplingParams(5))
    stats = engine.stats
    assert (stats.generated_tokens, stats.prompt_tokens, stats.cached_tokens) == (10, 24, 16)
    assert stats.steps == 7  # the prompt in two steps, then the other's rest beside the first one's second token
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0 and stats.preemptions == 0


def test_alternatives_come_with_the_events(model: Transformer) -> None:
    for event in Engine(model).stream([1, 2], max_tokens=4, temperature=0.0, logprobs=3):
        assert event.top is not None and len(event.top) == 3
        assert event.top[0] == (event.token, pytest.approx(event.logprob))


# --------------------------------------------------------------------- scoring


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(1, 9), (3, 17), (8, 40)])
def test_scores_are_the_trainers_bit_for_bit(model: Transformer, shape: tuple[int, int], temperature: float) -> None:
    tokens = torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model.features(tokens[:, :-1]).hidden
        wanted = token_logprobs(hidden, model.lm_head.weight, tokens[:, 1:], temperature)
    found = Engine(model).score(tokens.tolist(), temperature)
    assert torch.equal(torch.stack(found), wanted)


def test_scores_of_uneven_prompts(model: Transformer) -> None:
    prompts = [[1], list(range(30)), [3, 4], [5] * 9, list(range(60, 0, -1))]
    engine = Engine(model, **SMALL)
    busy = engine.submit([1, 2, 3], SamplingParams(8))
    engine.step()
    for prompt, found in zip(prompts, engine.score(prompts), strict=True):
        with torch.no_grad():
            law = model(torch.tensor([prompt]))[0, :-1].log_softmax(-1)
        wanted = law.gather(-1, torch.tensor(prompt[1:], dtype=torch.int64).unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    engine.pool.scheduler.check_integrity()
    drain(engine)
    assert len(busy.output) == 8
    assert engine.score([]) == [] and engine.score([[3]])[0].shape == (0,)
    with pytest.raises(TaelError, match="outside"):
        engine.score([[1, 99]])


# ------------------------------------------------------- forms, budgets, stops


@pytest.fixture(scope="module")
def speaker(tokenizer: Tokenizer) -> Transformer:
    config = replace(MLA, vocab_size=tokenizer.vocab_size, max_position_embeddings=256, num_nextn_predict_layers=1)
    return random_model(config)


@pytest.mark.parametrize("speculate", [None, "mtp", "ngram"])
def test_constrained_answers(speaker: Transformer, tokenizer: Tokenizer, speculate: str | None) -> None:
    """Whatever the model would like to say, it says one of the choices, with drafts as without."""
    options: dict[str, Any] = {"speculate": "on", "drafter": speculate, "draft_tokens": 3} if speculate else {}
    engine = Engine(speaker, tokenizer, **options)
    constraint = Constraint.choice(["brown fox", "quick", "naïve"])
    found = set()
    for seed in range(12):
        events = list(engine.stream("The quick brown", constraint=constraint, seed=seed, max_tokens=30))
        found.add("".join(event.text for event in events))
        assert events[-1].finish_reason == "stop"
    assert found <= {"brown fox", "quick", "naïve"} and len(found) > 1
    plain = Engine(speaker, tokenizer).stream("The", constraint=constraint, temperature=0.0, max_tokens=30)
    drafted = engine.stream("The", constraint=constraint, temperature=0.0, max_tokens=30)
    assert [e.token for e in drafted] == [e.token for e in plain]


@pytest.mark.parametrize("speculate", ["off", "on"])
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_thoughts_end_with_the_budget(
    speaker: Transformer, tokenizer: Tokenizer, budget: int, speculate: Any
) -> None:
    """`</think>` is put in, read as any token, and the answer goes on from it."""
    assert tokenizer.think_id is not None
    prompt = [*tokenizer.encode("The quick"), tokenizer.think_id]
    params = SamplingParams(12, 0.0, thinking_budget=budget, logit_bias={tokenizer.end_think_id or 0: -100})
    engine = Engine(speaker, tokenizer, speculate=speculate)
    completion = engine.generate([prompt], params)[0]
    assert completion.tokens.index(tokenizer.end_think_id or 0) == budget
    assert completion.logprobs[budget] == 0.0 and len(completion.tokens) == 12
    events = list(engine.stream(prompt, params))
    assert [e.token for e in events] == completion.tokens
    rest = engine.generate([prompt + completion.tokens[: budget + 1]], SamplingParams(11 - budget, 0.0))[0]
    assert rest.tokens == completion.tokens[budget + 1 :]


def test_who_submits_may_say_how_the_answer_begins(speaker: Transformer, tokenizer: Tokenizer) -> None:
    """A prompt inside thoughts that does not end in `<think>`, as some chat templates write it."""
    engine = Engine(speaker, tokenizer)
    prompt = [tokenizer.think_id or 0, *tokenizer.encode("quick")]
    params = SamplingParams(8, 0.0, thinking_budget=2, logit_bias={tokenizer.end_think_id or 0: -100})
    said = engine.submit(prompt, params, begins="thinking")
    unsaid = engine.submit(prompt, params)
    drain(engine)
    assert said.output[2] == tokenizer.end_think_id
    assert tokenizer.end_think_id not in unsaid.output


def test_stop_strings(speaker: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(speaker, tokenizer)
    free = "".join(e.text for e in engine.stream("The", temperature=0.0, max_tokens=30))
    stop = free[5:8]
    events = list(engine.stream("The", temperature=0.0, max_tokens=30, stop=(stop,)))
    assert "".join(e.text for e in events) == free[: free.index(stop)]
    assert events[-1].finish_reason == "stop" and events[-1].sequence is not None
    assert events[-1].sequence.stop_sequence == stop


# --------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch must be a whole number of 1 or more, not 0"),
        ({"block_size": True}, "block_size must be a whole number"),
        ({"token_budget": 3, "max_batch": 4}, "token_budget 3 is less than max_batch 4"),
        ({"cache_tokens": 64, "cache_bytes": 10**6}, "give cache_tokens or cache_bytes, not both"),
        ({"cache_tokens": 3}, "less than one block of 16"),
        ({"cache_bytes": 100}, "less than two blocks"),
        ({"cache_tokens": 10**13}, "are free; lower cache_tokens"),
        ({"draft_tokens": 4}, "draft_tokens may be at most 3, not 4"),
        ({"speculate": "maybe"}, "speculate must be one of off, auto, on, not 'maybe'"),
        ({"backend": "gpu"}, "backend must be one of auto, torch, native, not 'gpu'"),
        ({"max_batsh": 3}, "unknown engine setting 'max_batsh'; did you mean 'max_batch'"),
    ],
)
def test_settings_are_checked(model: Transformer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaelError, match=message) as error:
        Engine(model, **options)
    assert "\n" not in str(error.value)


def test_a_native_runner_that_is_not_there(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tael.engine.native.obstacle", lambda: "a C++ compiler")
    with pytest.raises(TaelError, match='backend "native": the C\\+\\+ operator needs a C\\+\\+ compiler; or use'):
        Engine(model, backend="native").generate([[1]], SamplingParams(1))
    assert isinstance(runner.make_runner(model, EngineSettings(), 4), runner.TorchRunner)


def test_a_wrong_request_disturbs_nobody(model: Transformer) -> None:
    engine = Engine(model, block_size=4, cache_tokens=40, max_batch=2)
    wanted = engine.generate([[1, 2]], SamplingParams(20, seed=3))[0].tokens
    good = engine.submit([1, 2], SamplingParams(20, seed=3))
    events = engine.step()
    wrong: list[tuple[list[int], SamplingParams, str]] = [
        ([], SamplingParams(3), "the prompt is empty"),
        ([64], SamplingParams(3), "outside 0..63"),
        ([1] * 30, SamplingParams(30), "a request of 59 tokens .* can never fit the cache of 40"),
        ([1] * 90, SamplingParams(30), "do not fit the model's context of 96"),
        ([1], SamplingParams(3, stop_ids=(99,)), "stop_ids names token 99"),
        ([1], SamplingParams(3, stop=("x",)), "stop strings need a tokenizer"),
        ([1], SamplingParams(3, constraint=Constraint("json_object")), "needs a tokenizer"),
    ]
    for prompt, params, message in wrong:
        with pytest.raises(TaelError, match=message):
            engine.submit(prompt, params)
        with pytest.raises(TaelError, match=message):
            engine.generate([[1], prompt], [SamplingParams(2), params])
        assert engine.pool.scheduler.running == [good] and not engine.pool.scheduler.waiting
    assert tokens_of(events + drain(engine), good) == wanted


def test_numbers_that_are_none_stay_with_their_request(model: Transformer) -> None:
    """A token whose embedding is broken: its request fails alone, and leaves nothing behind in the cache."""
    broken = build_model(model.config)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.embed_tokens.weight[63] = float("nan")
    params = [SamplingParams(9, 0.0, logit_bias={63: -100}) for _ in range(3)]
    prompts = [[1, 2, 3], [4, 5, 6, 63, 7, 8, 9, 10, 11, 12], [13] * 7]
    for options in ({}, {"speculate": "on", "drafter": "ngram"}):
        engine = Engine(broken, block_size=4, cache_tokens=64, **options)
        sequences = [engine.submit(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        events = drain(engine)
        for i in (0, 2):
            assert tokens_of(events, sequences[i]) == Engine(broken).generate([prompts[i]], params[:1])[0].tokens
        assert (sequences[1].finish_reason, sequences[1].state) == ("error", "finished")
        assert [e.finish_reason for e in events if e.sequence is sequences[1]] == ["error"]
        with pytest.raises(TaelError, match="no token is left to choose"):
            list(engine.stream(prompts[1], params[1]))
        for _ in range(3):  # through every block
            found = engine.generate([[3] * 40, [2] * 9], params[:2])
            assert len(found[0].tokens) == 9


def test_the_cache_of_a_plain_engine(model: Transformer) -> None:
    """As large as what is asked for, and made anew when that is more; a chat's is made once."""
    engine = Engine(model)
    with pytest.raises(TaelError, match="no request yet"):
        _ = engine.pool
    engine.generate([[1] * 20] * 3, SamplingParams(13))
    assert engine.pool.blocks.usable == 3 * 2 + 3
    first = engine.pool
    engine.generate([[1] * 20], SamplingParams(13))
    assert engine.pool is first
    engine.generate([[1] * 60], SamplingParams(30))
    assert engine.pool is first  # six blocks
    engine.generate([[1] * 60] * 2, SamplingParams(30))
    assert engine.pool is not first
    chat = Engine(model)
    list(chat.stream([1], max_tokens=2))
    kept = chat.pool
    list(chat.stream([1] * 80, max_tokens=16))
    assert chat.pool is kept


def test_a_large_context_does_not_cost_its_memory() -> None:
    """Pages of the cache are taken when they are written: 1 GB of it is there at once, and hardly any is used."""
    model = build_model(replace(GQA, max_position_embeddings=2**21))
    before = psutil.Process().memory_info().rss
    engine = Engine(model)
    assert len(list(engine.stream([1, 2, 3], max_tokens=5))) == 5
    held = engine.pool.runner.cache_bytes
    assert held > 5e8
    assert psutil.Process().memory_info().rss - before < 0.2 * held


def test_a_grammar_that_gives_up_fails_its_request(speaker: Transformer, tokenizer: Tokenizer) -> None:
    """What came until then is not passed off as what was asked for."""
    engine = Engine(speaker, tokenizer)
    constraint = Constraint.regex("(brown fox){40}")
    stop = tokenizer.eos_id
    assert stop is not None
    sequence = engine.submit(tokenizer.encode("The"), SamplingParams(60, constraint=constraint))
    other = engine.submit(tokenizer.encode("The"), SamplingParams(10, temperature=0.0))
    engine.step()
    assert sequence.sampler.grammar is not None
    sequence.sampler.grammar._matcher.consume_token(stop)  # not allowed there: as good as too complex
    drain(engine)
    assert sequence.finish_reason == "error" and (sequence.error or "").startswith("constraint: ")
    assert other.finish_reason == "length"
