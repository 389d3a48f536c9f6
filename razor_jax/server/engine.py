"""The engine: continuous batching on one thread over a cache in pages.

    engine = RazorEngine(params, slots=16, capacity=8192, cache_bytes=2 * 2**30)
    engine.start()                              # compiles, then runs ticks on its own thread
    engine.submit(generation, listener)

A tick drops what was cancelled, asks the scheduler for a plan, runs one chunk of prefill, then one block of decode
steps over all slots. So the longest gap between two tokens of an answer is one chunk and one block, whatever arrives.

**An answer depends on its request alone.** The request cuts its chunks, its seed and token count choose the draws of
its row, and rows of a program do not see each other. Checkpoints cut the prompt into segments. Each segment is one call
of the library, so an answer with `checkpoints=(n,)` is that of
`generate(params, prompt[n:], cache=prefill(params, prompt[:n]))`.

While an answer with a grammar runs, a block is one step, because the host must see each token before the next mask.
"""

from __future__ import annotations

import collections
import itertools
import logging
import threading
import time
from collections.abc import Sequence

import jax
import numpy as np

from .. import compilation
from ..cache import ring_length
from ..config import check_int
from ..functional import cache_spec
from ..methods.base import CacheMethod
from ..params import Params, weights_fingerprint
from ..text.policy import Policy, choose_policy
from ..text.row_output import RowOutput, end_ids
from . import pages as paging
from . import programs, scheduler
from .engine_answer import Answer, checkpoints, cuts, token_logprobs
from .engine_device import Device
from .generation import Delta, EngineStats, Finished, Generation, Listener, Refused, TokenLogprob
from .prefix import Prefix, PrefixStore, chain

log = logging.getLogger("razor_jax")

_NOT_FINITE = (
    "the logits of this answer are not finite: its prompt meets a damaged weight, or the type of the model overflows; "
    "load it with dtype='float32', or fetch the checkpoint again"
)


class RazorEngine:
    """An engine for one model on one device; see `generation.Engine`."""

    def __init__(
        self,
        params: Params,
        *,
        razor: Policy = "auto",
        slots: int = 8,
        capacity: int | None = None,
        cache_bytes: int | None = None,
        typical_tokens: int | None = None,
        page_tokens: int | None = None,
        chunk: int = 256,
        block: int = 8,
        prefills: int = 2,
        max_waiting: int = 1024,
        prefix_bytes: int | None = None,
    ):
        """Choose the sizes and check that they fit; nothing is allocated before `start`.

        Args:
          razor: cache policy, None for dense attention; see `generate`.
          slots: answers that run at once.
          capacity: most tokens of an answer, prompt and output; None for 8,192, or what the model was trained for if
            that is less.
          cache_bytes: of pages and compensation tokens; None for what all slots at their capacity take, or half of the
            free memory if that is less.
          typical_tokens: tokens of an answer for which full and windowed pages run out together; None for half of the
            capacity.
          page_tokens: tokens per page; None for 128, or 64 where attention runs on XLA.
          chunk: prompt tokens per prefill step.
          block: most decode steps per tick.
          prefills: prompts whose prefill may be under way; each takes `staging_bytes`.
          max_waiting: most requests in the queue.
          prefix_bytes: part of the cache for prefixes of prompts; None for an eighth, 0 for none.

        Raises:
          ValueError: a size out of range, a mesh, ALiBi, or another cache method.
          MemoryError: the cache does not fit the device.
        """
        compilation.track_compilation()
        if params.placement is not None:
            raise ValueError(f"params on {params.placement}: the engine runs on one device; load without mesh=")
        if params.config.alibi:
            raise ValueError("an ALiBi model: the engine serves models with rotary embedding only")
        for name, value in (("slots", slots), ("chunk", chunk), ("block", block)):
            check_int(name, value, 1)
        self.params = params
        policy = choose_policy(params, razor)
        if isinstance(policy, CacheMethod):
            raise ValueError(f"razor={policy}: the engine serves a RazorConfig, or None for dense attention")
        most = min(8192, params.config.max_position_embeddings)
        capacity = check_int("capacity", most if capacity is None else capacity, 1)
        spec = cache_spec(params, policy, capacity)
        page = page_tokens or (64 if spec.implementation == "xla" else 128)
        typical = check_int("typical_tokens", -(-capacity // 2) if typical_tokens is None else typical_tokens, 1)
        self.layout = paging.choose_layout(spec, slots, page, cache_bytes, typical, prefix_bytes)
        self._block, self._prefills = block, prefills
        self._segment_tokens = capacity
        if policy is not None and policy.prefill_chunk is not None:
            self._segment_tokens = min(capacity, policy.prefill_chunk)
        elif policy is None and params.config.rope.kind != "dynamic":
            # Dense attention in small calls is exact, so a chunk needs no staging for the rest of the prompt.
            self._segment_tokens = min(capacity, chunk)
        self._staged_tokens = -(-self._segment_tokens // chunk) * chunk
        self.staging_bytes = prefills * programs.staging_bytes(params, self._staged_tokens)
        paging.check_memory(self.layout.cache_bytes, self.staging_bytes)
        self._state = scheduler.start(
            scheduler.SchedulerConfig(
                slots, self.layout.pools, capacity, chunk, max_waiting=max_waiting, prefills=prefills
            )
        )
        self._root = repr((weights_fingerprint(params), spec.heads, spec.razor, spec.dtype, chunk, page)).encode()
        self._wake = threading.Condition()  # guards everything that other threads read or write
        self._answers: dict[str, Answer] = {}
        self._thread: threading.Thread | None = None
        self._ready = self._draining = self._stopped = False
        self._finished = collections.Counter[str]()
        self._tokens = collections.Counter[str]()
        self._ticks, self._last_tick, self._compilations = 0, time.monotonic(), 0

    # What other threads call.

    def start(self) -> None:
        """Compile every program, then run ticks on a thread of the engine."""
        self.compile()
        self._thread = threading.Thread(target=self._run, name="razor-engine", daemon=True)
        self._thread.start()

    def compile(self) -> None:
        """Allocate the cache and compile every program. A caller that runs `tick` itself needs no `start`."""
        with compilation.log_compilation("the engine"):
            self._allocate()
            self._device.run_every_program()
        self._ready = True

    @property
    def ready(self) -> bool:
        """Whether the programs are compiled and the engine does not drain."""
        return self._ready and not self._draining and not self._stopped

    def submit(self, generation: Generation, listener: Listener) -> None:
        """Put an answer into the queue. Raises Refused."""
        answer = self._new_answer(generation, listener)
        request = scheduler.Request(
            generation.id,
            len(generation.prompt),
            generation.max_tokens,
            tuple(stop for _, stop in answer.segments[:-1]),
        )
        with self._wake:
            if self._draining or self._stopped:
                raise Refused("draining", "the server shuts down and takes no new requests: send it to another server")
            state, refusal = scheduler.submit(self._state, request)
            if refusal is not None:
                raise Refused(refusal.reason, refusal.message)
            self._state, self._answers[generation.id] = state, answer
            self._wake.notify()

    def cancel(self, id: str) -> None:
        """End an answer within one tick with reason "cancelled"."""
        with self._wake:
            if id in self._answers:
                self._answers[id].cancelled = True
                self._wake.notify()

    def drain(self, seconds: float) -> bool:
        """Refuse new answers, wait for the others, and stop. Return whether all finished in time.

        What has not finished in time is cancelled.
        """
        end = time.monotonic() + seconds
        with self._wake:
            self._draining = True
            in_time = self._wake.wait_for(lambda: not self._answers, max(0.0, end - time.monotonic()))
            for answer in self._answers.values():
                answer.cancelled = True
            self._stopped = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        return in_time

    def stats(self) -> EngineStats:
        """Return a snapshot at once, also while a program runs."""
        spec, layout = self.layout.spec, self.layout
        with self._wake:
            used = dense = dropped = 0
            for answer in self._answers.values():
                if answer.running is None:
                    continue
                n = answer.held + max(0, answer.count - 1)
                kept = min(n, spec.sinks + answer.window) if spec.razor is not None else n
                dropped += n - kept
                dense += n * paging.dense_token_bytes(spec)
                for windowed in layout.kinds:
                    used += (kept if windowed else n) * paging.token_bytes(spec, windowed)
                used += paging.compensation_bytes(spec) if n > kept else 0
            free = self._state.free_pages
            return EngineStats(
                running=len(self._state.running),
                waiting=len(self._state.waiting),
                slots=layout.slots,
                pages_used=tuple(pages - len(left) for pages, left in zip(layout.pages, free, strict=True)),
                pages=layout.pages,
                cache_bytes=layout.cache_bytes,
                used_bytes=used,
                dense_bytes=dense,
                prompt_tokens=self._tokens["prompt"],
                completion_tokens=self._tokens["completion"],
                cached_tokens=self._tokens["cached"],
                finished=dict(self._finished),
                compilations=self._compilations,
                ticks=self._ticks,
                last_tick_age=time.monotonic() - self._last_tick,
                dropped_tokens=dropped,
            )

    # What the engine's thread calls.

    def tick(self) -> bool:
        """Run one chunk of prefill and one block of decode steps. Return whether there was work."""
        programs_before = compilation.totals()[0]
        self._drop_cancelled()
        with self._wake:
            self._find_prefixes()
            self._state, plan = scheduler.tick(self._state)
        for running in plan.admitted:
            self._admit(running)
        if plan.chunk is not None:
            self._prefill(plan.chunk)
        self._decode()
        self._drop_cancelled()
        self._compilations += compilation.totals()[0] - programs_before
        self._ticks += 1
        self._last_tick = time.monotonic()
        return bool(plan.chunk or plan.decode)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._answers or self._stopped)
                if self._stopped and not self._answers:
                    return
            try:
                self.tick()
            except Exception as error:  # A program that failed has taken the cache with it.
                log.exception("the engine lost its cache and starts with an empty one")
                for id in list(self._answers):
                    self._finish(id, "error", f"the engine failed: {error}")
                self._allocate()

    def _new_answer(self, generation: Generation, listener: Listener) -> Answer:
        """Return a live answer. Raises ValueError for what no engine can run."""
        vocabulary = self.params.config.vocab_size
        if not generation.prompt or not all(0 <= token < vocabulary for token in generation.prompt):
            raise ValueError(f"prompt: must have at least one token, each within 0 … {vocabulary - 1}")
        if not all(0 <= token < vocabulary for token, _ in generation.logit_bias):
            raise ValueError(f"logit_bias: each token must be within 0 … {vocabulary - 1}")
        if generation.logprobs is not None and not 0 <= generation.logprobs <= programs.TOP_LOGPROBS:
            raise ValueError(f"logprobs={generation.logprobs}: must be None or within 0 … {programs.TOP_LOGPROBS}")
        output = RowOutput(self.params.assets, generation.stop, generation.max_tokens)
        stop_ids = end_ids(self.params.assets, generation.stop)
        answer = Answer(generation, listener, output, stop_ids, self._segments(generation))
        # Log probabilities of the prompt need all of its logits.
        if self.layout.prefixes and not generation.prompt_logprobs:
            answer.keys = chain(self._root, generation.prompt, checkpoints(generation))
        return answer

    def _segments(self, generation: Generation) -> tuple[tuple[int, int], ...]:
        """Return start and stop of the calls of the library that a prompt consists of."""
        parts = []
        for start, stop in itertools.pairwise((0, *cuts(generation), len(generation.prompt))):
            # Streaming prefill cuts further.
            steps = [*range(start, stop, self._segment_tokens), stop]
            parts += itertools.pairwise(steps)
        return tuple(parts)

    def _allocate(self) -> None:
        """Make the empty device state and an empty store of prefixes."""
        self._device = Device(
            self.params, self.layout, self._staged_tokens, self._prefills, self._state.config.chunk, self._block
        )
        self._store = PrefixStore(self.layout.pages, self.layout.prefix_pages, self.layout.prefixes)

    # The steps of a tick.

    def _find_prefixes(self) -> None:
        """Let waiting requests start behind the longest stored prefix of their prompts."""
        for waiting in self._state.waiting:
            answer = self._answers[waiting.request.id]
            keys = [key for tokens, key in answer.keys.items() if tokens < len(answer.generation.prompt)]
            found = [each for each in map(self._store.find, keys) if each is not None]
            tokens, shared = (found[-1].tokens, self._shared(found[-1])) if found else (0, ())
            if (waiting.reused, waiting.shared) != (tokens, shared):
                self._state = scheduler.reuse(self._state, waiting.request.id, tokens, shared)

    def _shared(self, prefix: Prefix) -> tuple[tuple[int, ...], ...]:
        """Return the pages of a prefix that rows share: those of the full groups that are complete."""
        complete = prefix.tokens // self.layout.page_tokens
        return tuple(
            () if windowed else pages[:complete]
            for pages, windowed in zip(prefix.pages, self.layout.kinds, strict=True)
        )

    def _admit(self, running: scheduler.Running) -> None:
        """Give a request its slot, with the pages of the prefix that it starts behind."""
        answer = self._answers[running.request.id]
        shared = running.shared or ((),) * len(running.pages)
        for table, first, own in zip(self._device.tables, shared, running.pages, strict=True):
            table[running.slot, : len(first) + len(own)] = (*first, *own)
        if running.reused:
            key = answer.keys[running.reused]
            prefix = self._store.find(key)
            assert prefix is not None, "nothing is evicted between the plan and its admissions"
            self._store.touch(key)
            self._store.pin(shared)
            sources = [pages[len(first) :] for pages, first in zip(prefix.pages, shared, strict=True)]
            targets = [own[: len(pages)] for pages, own in zip(sources, running.pages, strict=True)]
            self._device.copy_prefix(sources, targets, running.slot, prefix.entry, restore=True)
            answer.held, answer.window, answer.reused = prefix.tokens, prefix.window, prefix.tokens
        with self._wake:
            answer.running = running
            self._tokens["prompt"] += running.request.prompt_tokens
            self._tokens["cached"] += running.reused

    def _store_prefix(self, answer: Answer, tokens: int) -> None:
        """Keep the cache of a row that has just seen the first `tokens` of its prompt, if there is room."""
        spec, page = self.layout.spec, self.layout.page_tokens
        held = [min(tokens, spec.sinks + answer.window) if windowed else tokens for windowed in self.layout.kinds]
        needs = [-(-each // page) for each in held]
        prefix = self._store.add(answer.keys[tokens], tokens, answer.window, needs)
        if prefix is not None:
            sources = [
                table[answer.slot, :need].tolist() for table, need in zip(self._device.tables, needs, strict=True)
            ]
            self._device.copy_prefix(sources, prefix.pages, answer.slot, prefix.entry, restore=False)

    def _prefill(self, chunk: scheduler.Chunk) -> None:
        """Run a chunk, write the segment if it was its last, and choose the first token after the last segment."""
        answer = self._answers[chunk.id]
        generation, slot = answer.generation, chunk.slot
        if answer.staging is None:
            taken = {each.staging for each in self._live()}
            answer.staging = next(index for index in range(self._prefills) if index not in taken)
        start, stop = next(segment for segment in answer.segments if chunk.stop <= segment[1])
        if not answer.window:
            # The window is that of the first call of the library, which streaming prefill cuts once more.
            spec, first = self.layout.spec, min([*cuts(generation), len(generation.prompt)])
            answer.window = spec.capacity if spec.razor is None else int(ring_length(spec.razor, first))
        tokens = generation.prompt[chunk.start : chunk.stop]
        following = generation.prompt[chunk.start + 1 : chunk.stop + 1]
        numbers = (start, answer.window, stop - start, chunk.start - start, len(tokens))
        logits, scores = self._device.prefill_chunk(
            slot, answer.staging, tokens, following, numbers, score=generation.prompt_logprobs
        )
        if generation.prompt_logprobs:
            found = tuple(np.asarray(x)[: len(following)] for x in scores)
            answer.prompt_logprobs += token_logprobs(following, found, generation.logprobs or 0)
        if chunk.stop < stop:
            return
        self._device.write_segment(slot, answer.staging, numbers)
        with self._wake:
            answer.held = stop
        if stop in answer.keys:
            self._store_prefix(answer, stop)
        if chunk.last:
            answer.staging = None
            self._first_token(answer, logits)

    def _first_token(self, answer: Answer, logits: jax.Array) -> None:
        """Choose the first token of an answer from the logits [1, V] after its prompt."""
        generation = answer.generation
        allowed = None
        if generation.grammar is not None:
            allowed = self._mask(answer)
            if allowed is None:
                return
        self._device.set_row(
            answer.slot,
            length=answer.held,
            window=answer.window,
            limit=generation.max_tokens,
            stop_ids=answer.stop_ids,
            seed=generation.seed % 2**32,
            sampling=generation.sampling,
        )
        self._receive(
            answer,
            *self._device.start_row(answer.slot, generation.prompt, generation.logit_bias, allowed, logits),
        )

    def _mask(self, answer: Answer) -> np.ndarray | None:
        """Return which tokens the grammar of an answer allows next; end the answer and return None if it fails."""
        assert answer.generation.grammar is not None
        try:
            mask = np.asarray(answer.generation.grammar.mask(), bool)
            if mask.shape != (self.params.config.vocab_size,) or not mask.any():
                raise ValueError(f"its mask {mask.shape} allows {int(mask.sum())} tokens")
        except Exception as error:
            self._finish(answer.generation.id, "error", f"the grammar failed: {error}")
            return None
        return mask

    def _decode(self) -> None:
        """Run a block of decode steps, and hand out what it adds."""
        answers = [each for each in self._live() if each.running and self._device.rows.live[each.slot]]
        for answer in answers:
            if answer.generation.grammar is not None:
                mask = self._mask(answer)
                if mask is not None:
                    self._device.set_allowed(answer.slot, mask)
        answers = [each for each in answers if self._device.rows.live[each.slot]]
        if not answers:
            return
        left = max(each.generation.max_tokens - each.count for each in answers)
        grammar = any(each.generation.grammar is not None for each in answers)
        score = any(each.generation.logprobs is not None for each in answers)
        out = self._device.decode_block(1 if grammar else min(left, self._block), score=score)
        for answer in answers:
            slot = answer.slot
            new = out.count[slot] - answer.count
            self._device.rows.length[slot] += new
            self._receive(answer, out.tokens[slot, :new], bool(out.failed[slot]), [x[slot] for x in out.logprobs])

    def _receive(self, answer: Answer, tokens: np.ndarray, failed: bool, scores: Sequence[np.ndarray]) -> None:
        """Append tokens to an answer, tell its listener, and end it if it is complete."""
        generation, output, slot = answer.generation, answer.output, answer.slot
        before = len(output.tokens)
        output.push(tokens.tolist())
        new = tuple(output.tokens[before:])
        with self._wake:
            answer.count += len(tokens)
            self._tokens["completion"] += len(new)
        self._device.rows.count[slot] = answer.count
        if len(tokens):
            self._device.rows.token[slot] = tokens[-1]
        found: list[TokenLogprob] = []
        if generation.logprobs is not None:
            found = token_logprobs(new, scores, generation.logprobs)
        prompt, answer.prompt_logprobs = tuple(answer.prompt_logprobs), []
        if new:
            self._tell(answer, Delta(output.take(), new, tuple(found), prompt))
        if failed and not output.finished:
            output.fail()
            self._finish(generation.id, "error", _NOT_FINITE)
        elif output.finished:
            self._finish(generation.id, output.finish_reason)
        elif generation.grammar is not None:
            try:
                for token in new:
                    generation.grammar.accept(token)
            except Exception as error:
                self._finish(generation.id, "error", f"the grammar failed: {error}")

    def _live(self) -> list[Answer]:
        with self._wake:
            return list(self._answers.values())

    def _drop_cancelled(self) -> None:
        with self._wake:
            cancelled = [id for id, answer in self._answers.items() if answer.cancelled]
        for id in cancelled:
            self._finish(id, "cancelled")

    def _finish(self, id: str, reason, message: str = "") -> None:
        """End a live answer: free its slot and pages, then tell its listener."""
        with self._wake:
            answer = self._answers.pop(id)
            self._state = scheduler.release(self._state, id)
            self._finished[reason] += 1
            if answer.running is not None:
                self._device.rows.live[answer.slot] = False
                if answer.running.shared:
                    self._store.unpin(answer.running.shared)
            if not self._answers:
                self._wake.notify_all()
        rest = answer.output.take()
        if rest:
            self._tell(answer, Delta(rest, ()))
        generation = answer.generation
        self._tell(
            answer,
            Finished(reason, len(generation.prompt), len(answer.output.tokens), answer.reused, message),
        )

    def _tell(self, answer: Answer, event: Delta | Finished) -> None:
        """Call a listener. One that raises loses its answer, nothing else."""
        try:
            answer.listener(event)
        except Exception:
            log.exception("the listener of request %r failed: its answer is cancelled", answer.generation.id)
            answer.cancelled = True


__all__: Sequence[str] = ("RazorEngine",)
