"""Watching one answer: its text as it grows, and every reason to end it or to step in.

    watch = Watch(params, tokenizer, thinking=opening(prompt, tokenizer) == "thinking")
    seen = watch.push(token)      # text to show, finish_reason, and tokens the engine has to put in next

All work is O(1) a token (amortised): only the last few tokens are decoded, only text that could still become a stop
string is looked at, and repetition is counted, not searched for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from tael.data import Tokenizer
from tael.engine.params import SamplingParams
from tael.errors import TaelError

FinishReason = Literal["stop", "length", "loop"]
Opening = Literal["thinking", "free", "answer"]

_BROKEN = "\ufffd"


def opening(prompt_ids: Sequence[int], tokenizer: Tokenizer | None) -> Opening:
    """How an answer begins after `prompt_ids`: inside thoughts (the prompt ends in `<think>`), as the model likes (in
    `<｜Assistant｜>`), or with the answer itself (in anything else)."""
    last = prompt_ids[-1] if len(prompt_ids) else None
    if tokenizer is None or last is None:
        return "answer"
    if last == tokenizer.think_id:
        return "thinking"
    return "free" if last == tokenizer.assistant_id else "answer"


@dataclass(frozen=True)
class Watched:
    """What one token brought."""

    text: str = ""
    """Text that is certain now: whole characters, and no part of a stop string."""
    finish_reason: FinishReason | None = None
    forced: tuple[int, ...] = ()
    """Tokens the engine has to put in next instead of sampling: `</think>` when the thinking budget is spent."""
    stop_sequence: str | None = None
    """The stop string that ended the answer."""


class Watch:
    """One answer on its way; `push` every token of it, also those put in by force."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer | None = None, *, thinking: bool = False) -> None:
        """`thinking`: the prompt ends inside thoughts. Raises TaelError for stop strings without a tokenizer."""
        if params.stop and tokenizer is None:
            raise TaelError("stop strings need a tokenizer: give stop_ids, or an engine with a tokenizer")
        self.params, self.count = params, 0
        self.thinking = thinking
        """True while inside thoughts."""
        self.thought_tokens = 0
        """Tokens inside thoughts so far, `<think>` and `</think>` not counted."""
        self._think_id = tokenizer.think_id if tokenizer else None
        self._end_think_id = tokenizer.end_think_id if tokenizer else None
        self._stop_ids = frozenset(params.stop_ids)
        self._decoder = Detokenizer(tokenizer) if tokenizer else None
        self._stops = StopStrings(params.stop)
        self._loops = LoopGuard() if params.loop_guard else None
        self._over = False

    @property
    def forced(self) -> tuple[int, ...]:
        """What has to come next; look here before the first token too (a budget of 0)."""
        budget = self.params.thinking_budget
        if not self.thinking or budget is None or self.thought_tokens < budget or self._end_think_id is None:
            return ()
        return (self._end_think_id,)

    def push(self, token: int) -> Watched:
        """The next token of the answer. With a finish_reason, `text` is all that was still held back."""
        self.count += 1
        answering = not self.thinking
        cut = token in self.forced
        self._follow_thoughts(token)
        may_stop = self.count >= self.params.min_tokens
        if token in self._stop_ids and may_stop:
            return Watched(self.finish(), "stop")
        if cut and self._decoder:
            self._decoder.drop()
        text = self._decoder.push(token) if self._decoder else ""
        stopped = None
        if answering and may_stop and self.params.stop:
            text, stopped = self._stops.push(text)
        if stopped is not None:
            self._over = True
            return Watched(text, "stop", stop_sequence=stopped)
        if self.count >= self.params.max_tokens:
            return self._end(text, "length")
        if self._loops is not None and self._loops.push(token):
            return Watched(text + self.finish(), "loop")
        return Watched(text, forced=self.forced)

    def _end(self, text: str, reason: FinishReason) -> Watched:
        return Watched(text + self.finish(), reason)

    def _follow_thoughts(self, token: int) -> None:
        if token == self._end_think_id:
            self.thinking = False
        elif token == self._think_id and self.count == 1:
            self.thinking = True
        else:
            self.thought_tokens += self.thinking

    def finish(self) -> str:
        """What was still held back, where the answer ends here; empty the second time."""
        if self._over:
            return ""
        self._over = True
        rest = self._decoder.finish() if self._decoder else ""
        return self._stops.finish() + rest


class Detokenizer:
    """Text of a growing list of tokens, never half a character; together it is the tokenizer's decoding of them all.

    Only a window of recent tokens is decoded. A few shown tokens stay in it, since some decoders treat the first one
    differently (SentencePiece's drops a space there).
    """

    LONGEST = 12  # tokens in the window before it is cut
    KEPT = 4
    BROKEN = 8  # tokens beyond LONGEST after which bytes are broken for sure: of real text, 4 bytes make a character

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that were given out
        self._text = ""

    def push(self, token: int) -> str:
        """Text that `token` makes certain."""
        if token in self._tokenizer.special_ids:
            return ""
        self._window.append(token)
        self._text = self._tokenizer.decode(self._window)
        # U+FFFD at the end may be a character whose last bytes are to come (some decoders write one for each byte);
        # all before is certain.
        new = self._show(len(self._text.rstrip(_BROKEN)))
        if len(self._window) > self.LONGEST:
            new += self._cut()
        return new

    def _show(self, end: int) -> str:
        """The window's text up to `end` that was not given out."""
        new = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return new

    def _cut(self) -> str:
        """Forget all but the last tokens; text that this makes certain.

        Easy where everything is shown, which in real text is soon. In broken bytes the end may still be an unfinished
        character (of at most 3 bytes). Of four neighbouring borders one is whole: the text after it decodes alike
        without what is before it.
        """
        decode = self._tokenizer.decode
        broken = self._shown < len(self._text)
        if broken and len(self._window) <= self.LONGEST + self.BROKEN:
            return ""
        for kept in range(self.KEPT, self.KEPT + 4):
            tail = decode(self._window[-kept:])
            head = decode(self._window[:-kept]) if broken else self._text[: -len(tail)]
            if tail and head + tail == self._text:
                new = self._show(len(head))
                self._window, self._text, self._shown = self._window[-kept:], tail, self._shown - len(head)
                return new
        return ""

    def drop(self) -> None:
        """Forget a character that is not whole yet: what comes next was not written to finish it."""
        while self._window and self._shown < len(self._text):
            self._window.pop()
            self._text = self._tokenizer.decode(self._window)
        self._shown = min(self._shown, len(self._text))

    def finish(self) -> str:
        """The rest: bytes that never became a character, as U+FFFD."""
        return self._show(len(self._text))


class StopStrings:
    """Finds the first of some strings to be complete in a text that comes in pieces, whatever the pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._held = ""  # the end of the text so far that could begin a stop string

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is in no stop string, and the stop string that is complete now (what follows it is dropped)."""
        if not text:
            return "", None
        whole = self._held + text
        ends = [(at + len(stop), stop) for stop in self._stops if (at := whole.find(stop)) >= 0]
        if ends:
            # The first to end, as if characters came singly; of those the longest, which is listed first.
            end, stop = min(ends, key=lambda found: found[0])
            self._held = ""
            return whole[: end - len(stop)], stop
        keep = max((self._overlap(whole, stop) for stop in self._stops), default=0)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep], None

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


class LoopGuard:
    """Tells when the newest tokens are one block of at most 128 tokens over and over.

    A block of p tokens is a loop once its repetition covers 4 p + 124 tokens: 128 equal tokens (a run of 40 may be a
    drawing), 23 rounds of 8 tokens, 8 rounds of 32, 5 of 128. Looked at every 16 tokens, for all periods at once: a
    counter a period says for how many tokens each has been equal to the one a period before.
    """

    EVERY = 16
    LONGEST = 128

    def __init__(self) -> None:
        self._history = np.full(self.LONGEST + self.EVERY, -1, dtype=np.int64)
        self._new: list[int] = []
        self._matches = np.zeros(self.LONGEST, dtype=np.int64)  # of period p at [p - 1]
        periods = np.arange(1, self.LONGEST + 1)
        self._limit = 3 * periods + 124  # the first block has nothing before it to be equal to

    def push(self, token: int) -> bool:
        """True when the tokens so far end in a loop."""
        self._new.append(token)
        if len(self._new) < self.EVERY:
            return False
        self._history = np.concatenate([self._history[self.EVERY :], np.array(self._new)])
        self._new.clear()
        # before[t] are the LONGEST tokens before new token t, oldest first
        before = sliding_window_view(self._history[:-1], self.LONGEST)
        equal = (before == self._history[self.LONGEST :, None])[::-1, ::-1]  # [newest first, period 1 first]
        run = np.logical_and.accumulate(equal).sum(0)
        self._matches = np.where(run == self.EVERY, self._matches + self.EVERY, run)
        return bool((self._matches >= self._limit).any())
