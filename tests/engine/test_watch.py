"""The watch: text that comes whole and adds up, stop strings whatever the tokens, thoughts, limits, loops."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tael.data import Tokenizer
from tael.engine.params import SamplingParams
from tael.engine.watch import Detokenizer, LoopGuard, StopStrings, Watch, Watched, opening
from tael.errors import TaelError

QUICK = settings(max_examples=80, deadline=None, derandomize=True)


def run(watch: Watch, tokens: list[int]) -> list[Watched]:
    """What the watch says token by token, up to the end it finds."""
    seen = []
    for token in tokens:
        seen.append(watch.push(token))
        if seen[-1].finish_reason is not None:
            break
    return seen


def text_of(seen: list[Watched]) -> str:
    return "".join(one.text for one in seen)


# ---------------------------------------------------------------------- text


@QUICK
@given(data=st.data())
def test_text_adds_up_to_the_decoding(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Random tokens: bytes that make no character, special tokens between bytes, ids outside the vocabulary."""
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=120))
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokens]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(tokens)
    assert detokenizer.finish() == ""


@QUICK
@given(text=st.text(max_size=60), seed=st.integers(0, 99))
def test_no_half_characters(tokenizer: Tokenizer, text: str, seed: int) -> None:
    """Real text, byte by byte: what is shown is all characters that are whole so far."""
    byte = {bytes([b]): tokenizer.token_id(s) for b, s in _byte_symbols().items()}
    tokens = [byte[bytes([b])] for b in text.encode()]
    detokenizer, shown = Detokenizer(tokenizer), ""
    for count, token in enumerate(tokens, 1):
        assert token is not None
        shown += detokenizer.push(token)
        whole = text.encode()[:count].decode(errors="ignore")
        assert shown in (whole, whole.rstrip("\ufffd"))
    assert shown + detokenizer.finish() == text


def _byte_symbols() -> dict[int, str]:
    """GPT-2's table of bytes to characters."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + n) for n, b in enumerate(others)}


def _sentence_pieces() -> Tokenizer:
    """A tokenizer of the SentencePiece kind: a mark before words, bytes as <0xNN>, a space dropped at the start."""
    words = ["▁the", "▁fox", "ing", "▁", "a", "é", "▁漢"]
    vocabulary = {w: i for i, w in enumerate(["<unk>", *words, *(f"<0x{b:02X}>" for b in range(256))])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return Tokenizer(backend)


@QUICK
@given(parts=st.lists(st.sampled_from(["▁the", "▁fox", "ing", "▁", "a", "▁漢", "<s>", "漢", "🙂", "é"]), max_size=60))
def test_text_of_sentence_pieces(parts: list[str]) -> None:
    """Unknown characters come as byte tokens; the space at the start is dropped once, not per window."""
    tokenizer = _sentence_pieces()
    tokens = []
    for part in parts:
        known = tokenizer.token_id(part)
        names = [part] if known is not None else [f"<0x{b:02X}>" for b in part.encode()]
        tokens += [i for i in map(tokenizer.token_id, names) if i is not None]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokens]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", ["text", "broken"])
def test_the_window_stays_short(tokenizer: Tokenizer, kind: str) -> None:
    """Also when no character ever becomes whole."""
    symbols = _byte_symbols()
    one = tokenizer.encode("fox")[0] if kind == "text" else tokenizer.token_id(symbols[0x80])
    assert one is not None
    detokenizer = Detokenizer(tokenizer)
    for _ in range(500):
        detokenizer.push(one)
        assert len(detokenizer._window) <= Detokenizer.LONGEST + Detokenizer.BROKEN


# ---------------------------------------------------------------------- stop strings


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the first string to be complete, of several the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 4), max_size=30),
)
def test_stop_strings_whatever_the_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    wanted, wanted_stop = first_stop(text, stops)
    finder, shown, found, rest = StopStrings(stops), "", None, text
    for cut in [*cuts, len(text)]:
        piece, rest = rest[:cut], rest[cut:]
        new, found = finder.push(piece)
        shown += new
        assert wanted.startswith(shown)  # nothing is shown that would have to be taken back
        if found is not None:
            break
    assert (shown + finder.finish(), found) == (wanted, wanted_stop)


def test_stop_string_over_tokens(tokenizer: Tokenizer) -> None:
    """`brown` is found wherever the borders of tokens are, and neither it nor what follows is shown."""
    tokens = tokenizer.encode("The quick brown fox")
    letters = [i for c in "The quick brown fox" for i in tokenizer.encode(c)]
    for sequence in (tokens, letters):
        seen = run(Watch(SamplingParams(stop=("zebra", "brown")), tokenizer), sequence)
        assert text_of(seen) == "The quick "
        assert (seen[-1].finish_reason, seen[-1].stop_sequence) == ("stop", "brown")
    watch = Watch(SamplingParams(stop=("brown bear",)), tokenizer)
    seen = run(watch, letters)
    assert seen[-1].finish_reason is None and text_of(seen) == "The quick brown fox"
    watch = Watch(SamplingParams(stop=("fox trot",)), tokenizer)
    assert text_of(run(watch, letters)) == "The quick brown "
    assert watch.finish() == "fox" and watch.finish() == ""


def test_stop_string_on_the_last_token(tokenizer: Tokenizer) -> None:
    """A stop string wins over the limit; held-back text comes with the limit."""
    letters = [i for c in "abc" for i in tokenizer.encode(c)]
    seen = run(Watch(SamplingParams(3, stop=("bc",)), tokenizer), letters)
    assert (text_of(seen), seen[-1].finish_reason) == ("a", "stop")
    seen = run(Watch(SamplingParams(3, stop=("bcd",)), tokenizer), letters)
    assert ([one.text for one in seen], seen[-1].finish_reason) == (["a", "", "bc"], "length")


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    letters = [i for c in "a.b.c." for i in tokenizer.encode(c)]
    seen = run(Watch(SamplingParams(stop=(".",), min_tokens=4), tokenizer), letters)
    assert text_of(seen) == "a.b" and len(seen) == 4


# ---------------------------------------------------------------------- ends


def test_stop_ids_and_limit(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_id is not None
    word = tokenizer.encode("fox")
    params = SamplingParams(5, stop_ids=(tokenizer.eos_id, word[0]))
    seen = run(Watch(params, tokenizer), [tokenizer.encode("The")[0], tokenizer.eos_id])
    assert seen[-1] == Watched("", "stop")
    seen = run(Watch(params, tokenizer), [word[0]])
    assert seen == [Watched("", "stop")]  # a stop token is not part of the answer
    seen = run(Watch(SamplingParams(2), tokenizer), word * 3)
    assert len(seen) == 2 and seen[-1].finish_reason == "length"
    seen = run(Watch(SamplingParams(2, stop_ids=(7,))), [8, 7])
    assert [one.finish_reason for one in seen] == [None, "stop"]  # on the last token allowed; without a tokenizer


def test_unfinished_character_at_the_end(tokenizer: Tokenizer) -> None:
    """Shown as broken, not lost."""
    emoji = [tokenizer.token_id(_byte_symbols()[b]) for b in "🙂".encode()]
    tokens = [i for i in emoji if i is not None]
    assert len(tokens) == 4
    seen = run(Watch(SamplingParams(3), tokenizer), tokens)
    assert [one.text for one in seen] == ["", "", "\ufffd"]
    watch = Watch(SamplingParams(9), tokenizer)
    assert text_of(run(watch, tokens[:2])) == "" and watch.finish() == "\ufffd"
    assert [one.text for one in run(Watch(SamplingParams(9), tokenizer), tokens)] == ["", "", "", "🙂"]


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(TaelError, match="stop strings need a tokenizer"):
        Watch(SamplingParams(stop=("x",)))


# ---------------------------------------------------------------------- thoughts


def ids(tokenizer: Tokenizer) -> tuple[int, int, list[int]]:
    assert tokenizer.think_id is not None and tokenizer.end_think_id is not None
    return tokenizer.think_id, tokenizer.end_think_id, [i for c in "abcdef" for i in tokenizer.encode(c)]


@pytest.mark.parametrize("budget", [0, 1, 4])
@pytest.mark.parametrize("own", [False, True])
def test_thinking_budget(tokenizer: Tokenizer, budget: int, own: bool) -> None:
    """`</think>` is due after `budget` tokens of thought, in thoughts the prompt or the model itself began."""
    think, end_think, letters = ids(tokenizer)
    watch = Watch(SamplingParams(thinking_budget=budget), tokenizer, thinking=not own)
    if own:
        assert not watch.thinking and watch.forced == ()
        assert watch.push(think).forced == ((end_think,) if budget == 0 else ())
    for count, letter in enumerate(letters[:budget], 1):
        assert watch.thinking and watch.forced == ()
        assert watch.push(letter).forced == ((end_think,) if count == budget else ())
    assert watch.forced == (end_think,) and watch.thinking
    assert watch.push(end_think) == Watched()
    assert not watch.thinking and watch.forced == () and watch.thought_tokens == budget
    assert watch.push(letters[0]) == Watched("a")


def test_a_budget_that_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    """The unfinished character is dropped: no U+FFFD, and the answer cannot finish it."""
    _, end_think, letters = ids(tokenizer)
    emoji = [i for b in "🙂".encode() if (i := tokenizer.token_id(_byte_symbols()[b])) is not None]
    for thought in ([letters[0], emoji[0]], [letters[0], *emoji, *emoji[:3]], emoji[:2], letters[:3]):
        watch = Watch(SamplingParams(thinking_budget=len(thought)), tokenizer, thinking=True)
        seen = run(watch, [*thought, end_think, *letters])
        assert seen[len(thought) - 1].forced == (end_think,)
        assert text_of(seen) == tokenizer.decode(thought).rstrip("\ufffd") + "abcdef"
    watch = Watch(SamplingParams(thinking_budget=2), tokenizer, thinking=True)
    assert "🙂" not in text_of(run(watch, [*emoji[:2], end_think, *emoji[2:], *letters]))


def test_thoughts_that_end_in_time(tokenizer: Tokenizer) -> None:
    think, end_think, letters = ids(tokenizer)
    watch = Watch(SamplingParams(thinking_budget=2), tokenizer, thinking=True)
    seen = run(watch, [letters[0], end_think, *letters, think, *letters])
    assert all(one.forced == () for one in seen) and not watch.thinking  # a later <think> opens nothing
    assert Watch(SamplingParams(thinking_budget=0), tokenizer).forced == ()


def test_stop_strings_are_for_the_answer(tokenizer: Tokenizer) -> None:
    _, end_think, letters = ids(tokenizer)
    seen = run(Watch(SamplingParams(stop=("b",)), tokenizer, thinking=True), [*letters, end_think, *letters])
    assert text_of(seen) == "abcdef" + "a" and seen[-1].stop_sequence == "b"


def test_opening(tokenizer: Tokenizer) -> None:
    think, end_think, letters = ids(tokenizer)
    assert tokenizer.assistant_id is not None
    prompts = {think: "thinking", end_think: "answer", tokenizer.assistant_id: "free", letters[0]: "answer"}
    for last, wanted in prompts.items():
        assert opening([*letters, last], tokenizer) == wanted
    assert opening([], tokenizer) == opening([think], None) == "answer"


# ---------------------------------------------------------------------- loops


def loop_after(tokens: list[int]) -> int | None:
    guard = LoopGuard()
    return next((count for count, token in enumerate(tokens, 1) if guard.push(token)), None)


@pytest.mark.parametrize("period", [1, 2, 3, 7, 8, 16, 31, 32, 64, 127, 128])
@pytest.mark.parametrize("before", [0, 5, 200])
def test_loops_are_found(period: int, before: int) -> None:
    """Once the repetition covers 4 p + 124 tokens, and at most 16 tokens later."""
    generator = random.Random(period)
    prelude = [generator.randrange(1000) for _ in range(before)]
    block = [generator.randrange(1000, 2000) for _ in range(period)]
    found = loop_after(prelude + block * 1000)
    limit = before + 4 * period + 124
    assert found is not None and limit <= found < limit + 16


@pytest.mark.parametrize(
    "tokens",
    [
        [1] * 100 + [2],
        [3, *[4] * 40, 5] * 4,
        [n % 17 for n in range(180)],
        [t for n in range(400) for t in (1, 2, 3, n)],
        [t for n in range(60) for t in ([9] * 60 + [n])],
        list(range(129)) * 8,
    ],
)
def test_what_is_no_loop(tokens: list[int]) -> None:
    """Runs, drawings, lists that count: what repeats but changes, or ends, or is longer than is looked at."""
    assert loop_after(tokens) is None


def test_random_text_is_no_loop() -> None:
    generator = random.Random(1)
    assert loop_after([generator.randrange(3) for _ in range(20_000)]) is None


@QUICK
@given(
    blocks=st.lists(st.tuples(st.integers(1, 140), st.integers(1, 400), st.integers(1, 3)), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_loops_by_definition(blocks: list[tuple[int, int, int]], seed: int) -> None:
    """Against a direct count, for texts of few words that repeat blocks of any length."""
    generator = random.Random(seed)
    tokens: list[int] = []
    for period, length, words in blocks:
        block = [generator.randrange(words) for _ in range(period)]
        tokens += (block * length)[:length]
    runs = [0] * 129
    wanted = None
    for count in range(1, len(tokens) + 1):
        for p in range(1, min(129, count)):
            runs[p] = runs[p] + 1 if tokens[count - 1] == tokens[count - 1 - p] else 0
        if count % 16 == 0 and any(runs[p] + p >= 4 * p + 124 for p in range(1, 129)):
            wanted = count
            break
    assert loop_after(tokens) == wanted


def test_loop_guard_ends_an_answer(tokenizer: Tokenizer) -> None:
    word = tokenizer.encode("fox")
    params: dict[str, Any] = {"max_tokens": 1000}
    seen = run(Watch(SamplingParams(**params, loop_guard=True), tokenizer), word * 1000)
    assert seen[-1].finish_reason == "loop" and len(seen) < 150
    assert text_of(seen) == tokenizer.decode((word * 1000)[: len(seen)])
    assert run(Watch(SamplingParams(**params), tokenizer), word * 1000)[-1].finish_reason == "length"
    assert run(Watch(SamplingParams(**params, loop_guard=True)), [5] * 1000)[-1].finish_reason == "loop"


def test_work_does_not_grow_with_the_answer(tokenizer: Tokenizer) -> None:
    """Not a timing: the same number of decoded tokens for the thousandth token as for the hundredth."""
    decoded = []

    class Counting(Tokenizer):
        def decode(self, ids: Any, skip_special: bool = True) -> str:
            ids = list(ids)
            decoded.append(len(ids))
            return super().decode(ids, skip_special)

    watch = Watch(SamplingParams(4000, stop=("never",), loop_guard=True), Counting(tokenizer.backend))
    generator, totals = random.Random(0), []
    for _ in range(3):
        decoded.clear()
        for _ in range(1000):
            watch.push(generator.randrange(tokenizer.vocab_size))
        totals.append(sum(decoded))
    assert max(totals) < 1.2 * min(totals) and max(totals) < 40_000
