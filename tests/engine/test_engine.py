"""The sampler is the trainer: the same log-probabilities, whatever else is in the batch; and clear errors."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tael.data import Tokenizer
from tael.engine import Completion, Engine, SamplingParams
from tael.engine.runner import TorchRunner
from tael.errors import TaelError
from tael.model import ModelConfig, Transformer, build_model
from tael.train.losses import token_logprobs


def random_prompts(count: int, seed: int = 0, longest: int = 20) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(64) for _ in range(generator.randint(1, longest))] for _ in range(count)]


@torch.no_grad()
def trainer_logprobs(
    model: Transformer, prompt: list[int], completion: Completion, temperature: float
) -> torch.Tensor:
    tokens = torch.tensor([prompt + completion.tokens])
    hidden = model.features(tokens[:, :-1]).hidden
    return token_logprobs(hidden, model.lm_head.weight, tokens[:, 1:], temperature)[0, len(prompt) - 1 :]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.9])
def test_logprobs_equal_the_trainers(model: Transformer, temperature: float) -> None:
    """Prompts of 1 to 20 tokens, so that both forms of MLA read them; ends at different times, so that rows leave."""
    prompts = random_prompts(7)
    params = [
        SamplingParams(4 + 5 * i, temperature, top_p=0.9 if i % 2 else 1.0, seed=i, stop_ids=(5, 6))
        for i in range(len(prompts))
    ]
    for prompt, completion in zip(prompts, Engine(model).generate(prompts, params), strict=True):
        wanted = trainer_logprobs(model, prompt, completion, temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, rtol=0, atol=1e-5)


def test_greedy_is_the_argmax_of_the_whole(model: Transformer) -> None:
    prompts = random_prompts(4, seed=1)
    completions = Engine(model).generate(prompts, SamplingParams(10, temperature=0))
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = list(prompt)
        for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
            with torch.no_grad():
                wanted = model(torch.tensor([tokens]))[0, -1].log_softmax(-1)
            assert token == int(wanted.argmax())
            assert logprob == pytest.approx(float(wanted.max()), abs=1e-5)
            tokens.append(token)


def test_a_request_is_the_same_alone_and_in_company(model: Transformer) -> None:
    """Any neighbours, any row, and whichever rows have left before."""
    engine, prompts = Engine(model), random_prompts(9, seed=2)
    generator = random.Random(3)
    params = [
        SamplingParams(generator.randint(1, 24), generator.choice([0.0, 0.8, 1.0, 1.3]), seed=100 + i)
        for i in range(len(prompts))
    ]
    alone = [engine.generate([prompt], [p])[0] for prompt, p in zip(prompts, params, strict=True)]
    for order in (list(range(9)), list(reversed(range(9))), generator.sample(range(9), 9), [4, 0, 7]):
        together = engine.generate([prompts[i] for i in order], [params[i] for i in order])
        for index, completion in zip(order, together, strict=True):
            assert completion.tokens == alone[index].tokens
            assert completion.logprobs == pytest.approx(alone[index].logprobs, abs=1e-5)
            assert completion.finish_reason == alone[index].finish_reason


def test_one_params_means_consecutive_seeds(model: Transformer) -> None:
    engine, prompts = Engine(model), [[1, 2, 3]] * 4
    together = engine.generate(prompts, SamplingParams(12, seed=40))
    for i, completion in enumerate(together):
        assert completion.tokens == engine.generate([[1, 2, 3]], [SamplingParams(12, seed=40 + i)])[0].tokens
    assert len({tuple(c.tokens) for c in together}) == 4
    assert [c.tokens for c in engine.generate(prompts, SamplingParams(12, seed=40))] == [c.tokens for c in together]


def test_a_longer_limit_only_adds(model: Transformer) -> None:
    engine = Engine(model)
    short, long = (engine.generate([[7, 8]], SamplingParams(n, seed=5))[0] for n in (6, 30))
    assert long.tokens[:6] == short.tokens and len(long.tokens) == 30


def test_stop_ids(model: Transformer) -> None:
    engine = Engine(model)
    free = engine.generate([[1, 2]], SamplingParams(30, seed=1))[0]
    stop = free.tokens[10]
    first = free.tokens.index(stop)
    ended = engine.generate([[1, 2]], SamplingParams(30, seed=1, stop_ids=(stop, 63)))[0]
    assert ended.tokens == free.tokens[: first + 1] and ended.finish_reason == "stop"
    assert len(ended.logprobs) == len(ended.tokens) and free.finish_reason == "length"
    last = engine.generate([[1, 2]], SamplingParams(first + 1, seed=1, stop_ids=(stop,)))[0]
    assert last.finish_reason == "stop"  # on the very last token allowed


def test_fills_the_context_exactly(model: Transformer) -> None:
    prompt = random_prompts(1, seed=4)[0]
    room = model.config.max_position_embeddings - len(prompt)
    completion = Engine(model).generate([prompt], SamplingParams(room, seed=2))[0]
    assert len(completion.tokens) == room
    torch.testing.assert_close(
        torch.tensor(completion.logprobs), trainer_logprobs(model, prompt, completion, 1.0), rtol=0, atol=1e-5
    )


def test_nothing_asked(model: Transformer) -> None:
    assert Engine(model).generate([], SamplingParams(3)) == []


def test_cache_bytes(model: Transformer) -> None:
    """What it says is what it holds: layers x blocks x slots x (R + P, or keys and values)."""
    config = model.config
    for dtype in (torch.float32, torch.bfloat16):
        runner = TorchRunner(model, 5, 33, dtype)
        held = runner.cache._entries.untyped_storage().nbytes()
        size = torch.empty(0, dtype=dtype).element_size()
        assert runner.cache_bytes == held == 5 * 33 * config.cache_bytes_per_token(size)
        assert not runner.cache._entries.any()


def test_bf16_model_samples(model: Transformer) -> None:
    copy = build_model(model.config)
    copy.load_state_dict(model.state_dict())
    completion = Engine(copy.bfloat16()).generate([[1, 2, 3]], SamplingParams(8, seed=1))[0]
    exact = trainer_logprobs(model, [1, 2, 3], completion, 1.0)
    assert (torch.tensor(completion.logprobs) - exact).abs().max() < 0.5


# ---------------------------------------------------------------------- stream


def text_model(tokenizer: Tokenizer, sequence: list[int]) -> Transformer:
    """A model that says `sequence`, whatever came before: position t's greedy token is sequence[t]."""
    config = ModelConfig(
        model_type="llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=256,
    )
    model = build_model(config)  # residual outputs are zero: only the token before decides
    assert len(set(sequence)) == len(sequence) and tokenizer.bos_id is not None
    with torch.no_grad():
        for before, after in zip([tokenizer.bos_id, *sequence], sequence, strict=False):
            model.embed_tokens.weight[before] = torch.randn(64, generator=torch.Generator().manual_seed(before))
            model.lm_head.weight[after] = model.embed_tokens.weight[before]
    return model


@pytest.mark.parametrize("text", ["漢字とかな", "🙂🙃", "naïve é", "a"])
def test_stream_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    """Characters of several bytes come whole, with the token that completes them; together they are the text."""
    tokens = list(dict.fromkeys(byte for character in text for byte in tokenizer.encode(character)))
    model = text_model(tokenizer, tokens)
    assert tokenizer.bos_id is not None
    options: dict[str, Any] = {"temperature": 0, "max_tokens": len(tokens)}
    events = list(Engine(model, tokenizer).stream([tokenizer.bos_id], **options))
    assert [e.token for e in events] == tokens
    assert "".join(e.text for e in events) == tokenizer.decode(tokens)
    assert not any("\ufffd" in event.text for event in events[:-1])
    assert [e.finish_reason for e in events] == [None] * (len(tokens) - 1) + ["length"]


def test_stream_splits_bytes_over_tokens(tokenizer: Tokenizer) -> None:
    """The four bytes of an emoji as four tokens: three silent ones, then the character."""
    raw = "🙂".encode()
    alphabet = {tokenizer.decode([i]): i for i in range(tokenizer.vocab_size)}
    by_byte = tokenizer.backend.get_vocab()
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = [ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("🙂")[0][0][i] for i in range(4)]
    tokens = [by_byte[symbol] for symbol in symbols]
    assert len(raw) == len(tokens) and "a" in alphabet
    model = text_model(tokenizer, [*tokens, alphabet["a"]])
    assert tokenizer.bos_id is not None
    texts = [e.text for e in Engine(model, tokenizer).stream([tokenizer.bos_id], temperature=0, max_tokens=5)]
    assert texts == ["", "", "", "🙂", "a"]
    cut = [e.text for e in Engine(model, tokenizer).stream([tokenizer.bos_id], temperature=0, max_tokens=2)]
    assert cut[0] == "" and set(cut[1]) == {"\ufffd"}  # ended inside the character: shown as broken, not lost


def test_stream_equals_generate(model: Transformer) -> None:
    engine = Engine(model)
    for params in (
        SamplingParams(20, seed=9),
        SamplingParams(20, 0.0),
        SamplingParams(20, seed=3, stop_ids=(1, 2, 3, 4)),
    ):
        completion = engine.generate([[5, 6, 7]], [params])[0]
        events = list(engine.stream([5, 6, 7], params))
        assert [e.token for e in events] == completion.tokens
        assert [e.logprob for e in events] == completion.logprobs
        assert events[-1].finish_reason == completion.finish_reason


def test_stream_options(model: Transformer) -> None:
    engine = Engine(model)
    by_options = [e.token for e in engine.stream([1], max_tokens=9, seed=4)]
    assert by_options == [e.token for e in engine.stream([1], SamplingParams(9, seed=4))]
    assert by_options == [e.token for e in engine.stream([1], SamplingParams(3, seed=4), max_tokens=9)]


def test_stream_of_text(tokenizer: Tokenizer) -> None:
    """A text prompt gets the tokenizer's BOS in front."""
    tokens = tokenizer.encode("The")
    assert tokenizer.bos_id is not None
    answer = next(i for i in range(100, tokenizer.vocab_size) if i not in tokens)
    model = text_model(tokenizer, [*tokens, answer])
    (event,) = Engine(model, tokenizer).stream("The", temperature=0, max_tokens=1)
    assert event.token == answer


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([64], {}, "outside 0..63"),
        ([3, -1], {}, "outside 0..63"),
        ([1] * 90, {"max_tokens": 7}, "do not fit the model's context of 96"),
        ([1], {"max_tokens": 0}, "max_tokens must be at least 1"),
        ([1], {"temperature": -0.1}, "temperature must be 0 or more"),
        ([1], {"temperature": float("nan")}, "temperature must be 0 or more"),
        ([1], {"top_p": 0.0}, "top_p must be in"),
        ([1], {"top_p": 1.01}, "top_p must be in"),
        ([1], {"top_p": float("nan")}, "top_p must be in"),
        ([1], {"temprature": 0.5}, "unknown sampling option 'temprature'; did you mean 'temperature'?"),
        ("text", {}, "this engine has no tokenizer"),
    ],
)
def test_errors(model: Transformer, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaelError, match=message.replace("?", r"\?")) as error:
        list(Engine(model).stream(prompt, **{"max_tokens": 4, **options}))
    assert "\n" not in str(error.value)


def test_one_wrong_prompt_is_named_before_any_work(model: Transformer) -> None:
    with pytest.raises(TaelError, match="empty"):
        Engine(model).generate([[1], []], SamplingParams(2))
