"""Held-out accuracy: a model that cannot know is not credited, answers are kept whole, and figures add up."""

from __future__ import annotations

from tael.data import train_tokenizer
from tael.evals.reasoning import MODES, reasoning_accuracy, samples
from tael.model import ModelConfig, build_model
from tael.recipe import TaskSettings
from tael.rl.tasks import problems

TASK = TaskSettings(name="chain", difficulty={"terms": 3, "low": 10, "high": 49})


def test_counts_and_samples_of_an_untrained_model():
    tokenizer = train_tokenizer(["12+34=46"] * 3, 300)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=1, intermediate_size=48)
    model = build_model(config, seed=1, zero_residual=False)
    asked = problems([TASK], 7, 12, "test")
    for mode in MODES:
        result = reasoning_accuracy(model, tokenizer, asked, mode, max_tokens=6, batch=5)
        assert (result.accuracy.correct, result.accuracy.total) == (0, 12)
        assert 1 <= result.completion_tokens <= 6
        if mode != "free":
            assert result.think_rate == (1.0 if mode == "think" else 0.0)
        lines = samples(result, mode, "before", 4)
        assert [line["prompt"] for line in lines] == [p.prompt for p in asked[:4]]
        assert all(line["expected"] == p.answer for line, p in zip(lines, asked, strict=False))
        assert not any(line["correct"] for line in lines)
