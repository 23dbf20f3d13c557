"""The engine: prompts in, tokens out, through the paged latent cache.

    engine = Engine(model, tokenizer)
    completions = engine.generate([prompt_ids, ...], SamplingParams(max_tokens=64))
    for event in engine.stream("text or ids", max_tokens=64): print(event.text, end="")

    sequence = engine.submit(prompt_ids, params)          requests may come and go at any step
    while engine.busy: events = engine.step()

RL rollouts, `tael chat`, `tael complete`, evaluation and the service all sample here. What one request gets does not
depend on the others: not its random numbers, and its logits only by rounding.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Hashable, Iterator
from collections.abc import Sequence as List
from dataclasses import replace

import torch
from torch import Tensor

from tael.data import Tokenizer
from tael.engine.batch import StepBatch
from tael.engine.constrain import ConstraintCompiler
from tael.engine.drafting import MtpDrafter
from tael.engine.params import SamplingParams
from tael.engine.pool import Pool, fitting_size, make_pool, set_size
from tael.engine.runner import wants_mtp
from tael.engine.sampling import SamplerState, sample_rows
from tael.engine.scheduler import Work
from tael.engine.scoring import score
from tael.engine.sequence import Completion, EngineStats, Sequence, TokenEvent, Top
from tael.engine.settings import EngineSettings
from tael.engine.speculative import Draft, Drafter, Governor, NgramDrafter, verify
from tael.engine.watch import Opening, Watch, opening
from tael.errors import TaelError, did_you_mean
from tael.model.transformer import Transformer


class Engine:
    """Samples from `model` (used as it is, on its device and in its precision).

    `overrides` are EngineSettings fields, put over `settings`. Raises TaelError for contradictory settings, and for a
    cache that does not fit the memory.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        settings: EngineSettings | None = None,
        **overrides,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.settings = (settings or EngineSettings()).put(**overrides)
        self.stats = EngineStats()
        self._arrivals = itertools.count()
        self._events: list[TokenEvent] = []  # made, but not yet handed to who called `step`
        self._compiler: ConstraintCompiler | None = None
        self._pool: Pool | None = None
        self._drafter: Drafter | None = None
        self._governor = Governor() if self.settings.speculate == "auto" else None
        if self.settings.sizes_cache:
            self._open(set_size(model, self.settings))

    def _open(self, blocks: int) -> None:
        """Make a cache of `blocks` blocks, and whoever drafts over it."""
        settings = self.settings
        self._pool = make_pool(self.model, settings, blocks, self._pool)
        if settings.speculate == "off":
            return
        if wants_mtp(self.model, settings):
            self._drafter = MtpDrafter(self._pool.runner, len(self.model.mtp), settings.draft_tokens)
        else:
            self._drafter = NgramDrafter(settings.draft_tokens)

    @property
    def pool(self) -> Pool:
        """The cache and who runs on it; there is one once there has been a request."""
        if self._pool is None:
            raise TaelError("this engine has had no request yet and has no cache; set cache_tokens for one at once")
        return self._pool

    # ------------------------------------------------------------- one request

    def submit(
        self,
        prompt: List[int],
        params: SamplingParams,
        *,
        salt: Hashable = None,
        text: bool = True,
        begins: Opening | None = None,
    ) -> Sequence:
        """A request joins the waiting; its tokens come out of `step`.

        Sequences of different `salt` never share a prefix. `text`: events carry text (with a tokenizer). `begins`
        says how the answer begins; None: the prompt's last token does. Raises TaelError, and changes nothing, for a
        prompt or parameters that cannot be served.
        """
        sequence = self._make(prompt, params, salt, text, begins)
        context = self.model.config.max_position_embeddings
        self._provide([sequence.slots], [context] * self.settings.max_batch)
        self._join(sequence)
        return sequence

    def _make(
        self, prompt: List[int], params: SamplingParams, salt: Hashable, text: bool, begins: Opening | None = None
    ) -> Sequence:
        self.check_prompt(prompt, params.max_tokens)
        tokens = list(prompt)
        begins = begins or opening(tokens, self.tokenizer)
        state = self._sampler(tokens, params, begins)
        watched = text or params.stop or params.thinking_budget is not None
        watch = Watch(params, self.tokenizer if watched else None, thinking=begins == "thinking")
        return Sequence(len(tokens), tokens, params, next(self._arrivals), state, watch, salt)

    def _sampler(self, tokens: list[int], params: SamplingParams, begins: Opening) -> SamplerState:
        vocab_size, tokenizer, grammar = self.model.config.vocab_size, self.tokenizer, None
        if params.constraint is not None and tokenizer is not None:
            if self._compiler is None:
                self._compiler = ConstraintCompiler(tokenizer, vocab_size)
            grammar = self._compiler.compile(params.constraint, params.stop_ids)
        return SamplerState(
            params,
            tokens,
            vocab_size,
            grammar,
            thinking=begins == "thinking",
            free=begins == "free",
            think_id=tokenizer.think_id if tokenizer else None,
            end_think_id=tokenizer.end_think_id if tokenizer else None,
        )

    def _join(self, sequence: Sequence) -> None:
        self.pool.scheduler.add(sequence)
        for token in sequence.watch.forced:
            self._events += self._keep(sequence, token, 0.0, None)
        self._settle([sequence])

    def check_prompt(self, prompt: List[int], max_tokens: int) -> None:
        """Raise TaelError naming what is wrong with a prompt."""
        config = self.model.config
        if not len(prompt):
            raise TaelError("the prompt is empty: give at least one token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise TaelError(f"the prompt has a token outside 0..{config.vocab_size - 1}")
        if len(prompt) + max_tokens > config.max_position_embeddings:
            raise TaelError(
                f"prompt of {len(prompt)} tokens and max_tokens {max_tokens} do not fit the model's context of "
                f"{config.max_position_embeddings}; shorten the prompt or lower max_tokens"
            )

    def cancel(self, sequence: Sequence) -> None:
        """End a request at once, without an event; one that is over stays as it is."""
        if sequence.state != "finished":
            sequence.finish_reason = "cancelled"
            self._settle([sequence])

    # ------------------------------------------------------------ many requests

    def generate(self, prompts: List[List[int]], params: SamplingParams | List[SamplingParams]) -> list[Completion]:
        """Complete every prompt (token ids). One `params` for all means seeds seed, seed + 1, .. by place.

        Raises TaelError, before any work, for an empty prompt, an unknown token, or one that does not fit the model's
        context or the cache.
        """
        if isinstance(params, SamplingParams):
            params = [replace(params, seed=params.seed + i) for i in range(len(prompts))]
        if not prompts:
            return []
        sequences = [self._make(prompt, p, None, False) for prompt, p in zip(prompts, params, strict=True)]
        self._provide([s.slots for s in sequences])
        for sequence in sequences:
            self._join(sequence)
        for _ in self._run(sequences):
            pass
        for sequence in sequences:
            if sequence.error is not None:
                raise TaelError(sequence.error)
        return [Completion.of(sequence) for sequence in sequences]

    def stream(
        self, prompt: str | List[int], params: SamplingParams | None = None, **options
    ) -> Iterator[TokenEvent]:
        """Complete one prompt, yielding tokens as they come; `options` are SamplingParams fields, put over `params`.

        Raises TaelError, at the first token asked for, as `generate` does and for an unknown option. Closing the
        iterator ends the request.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise TaelError("this engine has no tokenizer: give the prompt as token ids")
            prompt = [*self.tokenizer.start_ids, *self.tokenizer.encode(prompt)]
        for name in options:
            if name not in SamplingParams.__dataclass_fields__:
                raise TaelError(
                    f"unknown sampling option '{name}'{did_you_mean(name, SamplingParams.__dataclass_fields__)}"
                )
        sequence = self._make(prompt, replace(params or SamplingParams(), **options), None, True)
        # A cache of no fixed size is made for prompts to come too: turns of a conversation share its beginning.
        self._provide([sequence.slots], [self.model.config.max_position_embeddings])
        self._join(sequence)
        yield from self._run([sequence])
        if sequence.error is not None:
            raise TaelError(sequence.error)

    def _run(self, sequences: list[Sequence]) -> Iterator[TokenEvent]:
        """Step until all of `sequences` are finished, yielding their events; those of others wait for `step`."""
        mine, others = set(map(id, sequences)), []
        try:
            while True:
                for event in self._advance():
                    if id(event.sequence) not in mine:
                        others.append(event)
                    elif event.finish_reason != "error":
                        yield event
                if all(s.state == "finished" for s in sequences):
                    return
        finally:
            self._events = others + self._events
            for sequence in sequences:
                self.cancel(sequence)

    def score(self, prompts: List[List[int]], temperature: float = 1.0) -> list[Tensor]:
        """Log-probabilities [T - 1] fp32 of every prompt's tokens from the second on, as the model reads them.

        Equal to the trainer's for the same tokens: the same products in the same order. Raises TaelError as
        `generate` does.
        """
        for prompt in prompts:
            self.check_prompt(prompt, 0)
        if not any(len(prompt) > 1 for prompt in prompts):
            return [torch.empty(0) for _ in prompts]
        self._provide([len(prompt) - 1 for prompt in prompts])
        return score(self.pool, prompts, temperature, self.settings.token_budget)

    def _provide(self, slots: List[int], wished: List[int] | None = None) -> None:
        """See to a cache in which a sequence of any of `slots` fits, and `wished` (None: all of them) together.

        A cache of no fixed size is made now if there is none, or made anew while it is idle and too small.
        """
        model, settings, pool = self.model, self.settings, self._pool
        if not settings.sizes_cache and (pool is None or not pool.scheduler.busy):
            blocks = fitting_size(model, settings, max(slots), slots if wished is None else wished)
            if pool is None or blocks > pool.blocks.num_blocks:
                self._open(blocks)
        usable = self.pool.blocks.usable * settings.block_size
        if max(slots) > usable:
            raise TaelError(
                f"a request of {max(slots)} tokens (prompt and max_tokens) can never fit the cache of {usable}; "
                "shorten it or raise cache_tokens"
            )

    # -------------------------------------------------------------------- steps

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._events) or (self._pool is not None and self.pool.scheduler.busy)

    def step(self) -> list[TokenEvent]:
        """One forward pass over whoever is next, and the tokens that came of it; [] when there is nothing to do."""
        return self._advance() if self.busy else []

    def _advance(self) -> list[TokenEvent]:
        events, self._events = self._events, []
        began, pool, generated = time.perf_counter(), self.pool, self.stats.generated_tokens
        plan = pool.scheduler.schedule(self._wanted_drafts)
        if not plan:
            return events
        drafts = self._propose(plan)
        tokens = [w.sequence.tokens[w.start : w.stop] + d.tokens for w, d in zip(plan, drafts, strict=True)]
        parts = [(t, w.start, w.sequence.table, w.expanded) for t, w in zip(tokens, plan, strict=True)]
        batch = StepBatch.build(parts)
        hidden = pool.runner.forward(batch)  # [N, D]
        kept = self._emit(plan, drafts, batch, hidden, events)
        for work, count in zip(plan, kept, strict=True):
            pool.scheduler.advance(work.sequence, work.start + count)
        if self._drafter is not None:
            starts = batch.starts.tolist()
            self._drafter.observe(plan, [hidden[s : s + n] for s, n in zip(starts, kept, strict=False)])
        self._settle([work.sequence for work in plan])
        self._count(plan, time.perf_counter() - began, self.stats.generated_tokens - generated)
        return events

    def _wanted_drafts(self, sequence: Sequence) -> int:
        if self._drafter is None or (self._governor is not None and not self._governor.drafting):
            return 0
        return self._drafter.most(sequence)

    def _propose(self, plan: list[Work]) -> list[Draft]:
        works = [work for work in plan if work.drafts]
        if self._drafter is None or not works:
            return [Draft()] * len(plan)
        found = dict(zip(map(id, works), self._drafter.propose(works), strict=True))
        return [found.get(id(work)) or Draft() for work in plan]

    def _emit(
        self, plan: list[Work], drafts: list[Draft], batch: StepBatch, hidden: Tensor, events: list[TokenEvent]
    ) -> list[int]:
        """Sample and verify; add to `events`, and say how many tokens of each work stay in the cache."""
        kept = [work.stop - work.start for work in plan]
        starts = batch.starts.tolist()
        rows, ends = [], [0]
        for i, (work, draft) in enumerate(zip(plan, drafts, strict=True)):
            if work.samples:
                rows += range(starts[i + 1] - len(draft.tokens) - 1, starts[i + 1])
            ends.append(len(rows))
        if not rows:
            return kept
        if len(rows) < len(hidden):
            hidden = hidden[torch.tensor(rows, device=hidden.device)]
        logits = self.pool.runner.logits(hidden)  # [n, V]
        plain = [i for i, work in enumerate(plan) if work.samples and not drafts[i].tokens]
        if plain:
            part = logits if len(plain) == len(rows) else logits[[ends[i] for i in plain]]
            events += self._sample([plan[i].sequence for i in plain], part)
        for i, draft in enumerate(drafts):
            if draft.tokens:
                kept[i] += self._verify(plan[i].sequence, draft, logits[ends[i] : ends[i + 1]], events)
        return kept

    def _verify(self, sequence: Sequence, draft: Draft, logits: Tensor, events: list[TokenEvent]) -> int:
        """Keep what stands the test, and the token after it; returns how many drafted tokens stay."""
        accepted = 0
        try:
            for found in verify(draft, logits, sequence.sampler):
                known = len(sequence.tokens)
                events += self._keep(sequence, found.token, found.logprob, found.top)
                accepted += found.drafted
                if sequence.finish_reason is not None or len(sequence.tokens) > known + 1:
                    break  # over, or the watch has put in a token of its own
        except TaelError as error:
            events.append(self._fail(sequence, str(error)))
        sequence.drafted += len(draft.tokens)
        sequence.accepted += accepted
        self.stats.drafted_tokens += len(draft.tokens)
        self.stats.accepted_tokens += accepted
        return accepted

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> list[TokenEvent]:
        """A token a sequence; one whose logits leave none ends by itself."""
        events: list[TokenEvent] = []
        try:
            sampled = [(sequences, sample_rows(logits, [s.sampler for s in sequences]))]
        except TaelError:
            sampled = []
            for row, sequence in enumerate(sequences):
                try:
                    sampled.append(([sequence], sample_rows(logits[row : row + 1], [sequence.sampler])))
                except TaelError as error:
                    events.append(self._fail(sequence, str(error)))
        for group, found in sampled:
            for sequence, token, logprob, top in zip(group, found.tokens, found.logprobs, found.top, strict=True):
                events += self._keep(sequence, token, logprob, top)
        return events

    def _keep(self, sequence: Sequence, token: int, logprob: float, top: Top) -> list[TokenEvent]:
        """A token joins the output; more than one event where the watch puts tokens in."""
        sequence.tokens.append(token)
        sequence.logprobs.append(logprob)
        if top is not None:
            sequence.top.append(top)
        sequence.sampler.accept(token)
        self.stats.generated_tokens += 1
        grammar = sequence.sampler.grammar
        if grammar is not None and grammar.fault:  # what was to come is no longer held to the constraint
            return [self._fail(sequence, f"constraint: it became too complex to go on with ({grammar.fault})")]
        seen = sequence.watch.push(token)
        reason, text = seen.finish_reason, seen.text
        if reason is None and sequence.sampler.is_done:
            reason, text = "stop", text + sequence.watch.finish()
        if reason is not None:
            sequence.finish_reason, sequence.stop_sequence = reason, seen.stop_sequence
        events = [TokenEvent(token, text, logprob, reason, sequence, top)]
        for forced in () if reason is not None else seen.forced:
            events += self._keep(sequence, forced, 0.0, None)
        return events

    def _fail(self, sequence: Sequence, error: str) -> TokenEvent:
        """End one request with an error."""
        sequence.finish_reason, sequence.error = "error", error
        return TokenEvent(-1, "", 0.0, "error", sequence)

    def _settle(self, sequences: List[Sequence]) -> None:
        """Those that are over give up their blocks; a failed one's may hold what is no number, for nobody to meet."""
        for sequence in sequences:
            if sequence.finish_reason is not None and sequence.state != "finished":
                if sequence.finish_reason == "error":
                    self.pool.discard(sequence.table)
                self.pool.scheduler.finish(sequence)
                if self._drafter is not None:
                    self._drafter.forget(sequence)

    def _count(self, plan: list[Work], seconds: float, generated: int) -> None:
        stats = self.stats
        prompt = sum(w.stop - w.start for w in plan if w.expanded)
        total = sum(w.stop - w.start + w.drafts for w in plan)
        for work in plan:
            passed = work.stop - work.start + work.drafts
            work.sequence.passed += passed
            work.sequence.seconds += seconds * passed / total
        if self._governor is not None and all(w.sequence.generated and not w.expanded for w in plan):
            self._governor.record(seconds, generated)
        stats.steps += 1
        stats.prompt_tokens += prompt
        first = [w.sequence for w in plan if w.expanded and w.start == w.sequence.cached]
        stats.cached_tokens += sum(s.cached for s in first if not s.preemptions)
        stats.preemptions = self.pool.scheduler.preemptions
        stats.prefill_seconds += seconds * prompt / total
        stats.decode_seconds += seconds * (1 - prompt / total)
