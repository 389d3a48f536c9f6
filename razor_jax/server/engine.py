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
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from .. import compilation
from ..cache import CacheSpec, ring_length
from ..config import check_int
from ..functional import cache_spec
from ..memory import free_bytes
from ..params import Params, nonfinite
from ..text.policy import Policy, choose_policy
from ..text.row_output import RowOutput, end_ids
from ..text.sampling import rules, set_rule
from . import pages as paging
from . import programs, scheduler
from .generation import Delta, EngineStats, Finished, Generation, Listener, Refused, TokenLogprob
from .pages import Layout

log = logging.getLogger("razor_jax")

_STOP_IDS = 16  # most stop ids per row that the device looks for; the host looks for all of them


@dataclasses.dataclass
class _Answer:
    """A live answer.

    Attributes:
      running: its slot and pages, None while it waits.
      staging: index of the staging buffer during prefill.
      held: prompt tokens in the pages; those of a segment join once it is written.
      window: W, 0 before its first segment has run.
      count: tokens generated on the device.
    """

    generation: Generation
    listener: Listener
    output: RowOutput
    segments: tuple[tuple[int, int], ...]
    running: scheduler.Running | None = None
    staging: int | None = None
    held: int = 0
    window: int = 0
    count: int = 0
    reused: int = 0
    cancelled: bool = False
    prompt_logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)

    @property
    def slot(self) -> int:
        assert self.running is not None
        return self.running.slot


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

        Raises:
          ValueError: a size out of range, a mesh, or ALiBi.
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
        capacity = check_int("capacity", capacity or min(8192, params.config.max_position_embeddings), 1)
        spec = cache_spec(params, policy, capacity)
        page = page_tokens or (64 if spec.implementation == "xla" else 128)
        typical = check_int("typical_tokens", typical_tokens or -(-capacity // 2), 1)
        self.layout = _choose_layout(spec, slots, page, cache_bytes, typical)
        self._block, self._prefills = block, prefills
        self._segment_tokens = capacity
        if policy is not None and policy.prefill_chunk is not None:
            self._segment_tokens = min(capacity, policy.prefill_chunk)
        self._staged_tokens = -(-self._segment_tokens // chunk) * chunk
        self.staging_bytes = prefills * programs.staging_bytes(params, self._staged_tokens)
        _check_memory(self.layout.cache_bytes, self.staging_bytes)
        self._state = scheduler.start(
            scheduler.SchedulerConfig(
                slots, self.layout.pools, capacity, chunk, max_waiting=max_waiting, prefills=prefills
            )
        )
        self._wake = threading.Condition()  # guards everything that other threads read or write
        self._answers: dict[str, _Answer] = {}
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
            self._run_every_program()
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

    def _new_answer(self, generation: Generation, listener: Listener) -> _Answer:
        """Return a live answer. Raises ValueError for what no engine can run."""
        vocabulary = self.params.config.vocab_size
        if not generation.prompt or not all(0 <= token < vocabulary for token in generation.prompt):
            raise ValueError(f"prompt: must have at least one token, each within 0 … {vocabulary - 1}")
        if not all(0 <= token < vocabulary for token, _ in generation.logit_bias):
            raise ValueError(f"logit_bias: each token must be within 0 … {vocabulary - 1}")
        if generation.logprobs is not None and not 0 <= generation.logprobs <= programs.TOP_LOGPROBS:
            raise ValueError(f"logprobs={generation.logprobs}: must be None or within 0 … {programs.TOP_LOGPROBS}")
        output = RowOutput(self.params.assets, generation.stop, generation.max_tokens)
        return _Answer(generation, listener, output, self._segments(generation))

    def _segments(self, generation: Generation) -> tuple[tuple[int, int], ...]:
        """Return start and stop of the calls of the library that a prompt consists of."""
        length = len(generation.prompt)
        cuts = sorted({0, *(cut for cut in generation.checkpoints if 0 < cut < length), length})
        parts = []
        for start, stop in itertools.pairwise(cuts):
            # Streaming prefill cuts further.
            steps = [*range(start, stop, self._segment_tokens), stop]
            parts += itertools.pairwise(steps)
        return tuple(parts)

    def _allocate(self) -> None:
        """Make the empty device state and forget all rows."""
        slots = self.layout.slots
        self._layers = self.layout.init()
        self._staging = [programs.init_staging(self.params, self._staged_tokens) for _ in range(self._prefills)]
        self._vocabulary = programs.Vocabulary.init(slots, self.params.config.vocab_size)
        self._all_allowed = jax.device_put(np.ones(self.params.config.vocab_size, bool))
        self._no_bias = jax.device_put(np.zeros(self.params.config.vocab_size, np.float32))
        self._tables = tuple(np.zeros((slots, width), np.int32) for width in self.layout.widths)
        sampling, greedy = rules(slots)
        zeros = lambda: np.zeros(slots, np.int32)  # noqa: E731
        self._rows = programs.Rows(
            zeros(),
            zeros(),
            zeros(),
            zeros(),
            zeros(),
            np.zeros(slots, bool),
            np.full((slots, _STOP_IDS), -1, np.int32),
            np.zeros(slots, np.uint32),
            sampling,
            greedy,
        )

    def _run_every_program(self) -> None:
        """Run each program once without effect."""
        chunk = self._state.config.chunk
        self._chunk(0, 0, np.zeros(chunk, np.int32), np.zeros(chunk, np.int32), programs.as_int32(0, 1, 1, 0, 1), False)
        self._write(0, 0, programs.as_int32(0, 1, 0))
        logits = np.zeros((1, self.params.config.vocab_size), np.float32)
        self._start(0, np.zeros(logits.shape[1], bool), self._no_bias, self._all_allowed, jax.device_put(logits))
        self._steps(0, False)
        self._allow(0, self._all_allowed)
        jax.block_until_ready((self._layers, self._vocabulary))

    # The programs, on the state of the engine.

    def _row_tables(self, slot: int) -> tuple[np.ndarray, ...]:
        # Copies: a program may still read them when the slot gets other pages.
        return tuple(table[slot : slot + 1].copy() for table in self._tables)

    def _chunk(
        self, slot: int, staging: int, tokens: np.ndarray, targets: np.ndarray, numbers: np.ndarray, score: bool
    ):
        logits, scores, self._staging[staging] = programs.prefill_chunk(
            self.params,
            self._layers,
            self._staging[staging],
            self._row_tables(slot),
            np.int32(slot),
            tokens[None],
            targets,
            numbers,
            np.bool_(score),
            spec=self.layout.spec,
        )
        return logits, scores

    def _write(self, slot: int, staging: int, numbers: np.ndarray) -> None:
        self._layers = programs.write_segment(
            self._layers,
            self._staging[staging],
            self._row_tables(slot),
            np.int32(slot),
            numbers,
            spec=self.layout.spec,
        )

    def _start(self, slot: int, seen: np.ndarray, bias, allowed, logits: jax.Array):
        row = jax.tree.map(lambda x: x[slot : slot + 1], self._rows)
        self._vocabulary, token, failed, scores = programs.start_row(
            self._vocabulary, row, np.int32(slot), seen, bias, allowed, logits
        )
        return token, failed, scores

    def _steps(self, steps: int, score: bool) -> programs.BlockOutput:
        self._layers, self._vocabulary, out = programs.decode_block(
            self.params,
            self._layers,
            self._vocabulary,
            self._rows,
            self._tables,
            np.int32(steps),
            np.bool_(score),
            spec=self.layout.spec,
            block=self._block,
        )
        return out

    def _allow(self, slot: int, allowed) -> None:
        self._vocabulary = programs.set_allowed(self._vocabulary, np.int32(slot), allowed)

    # The steps of a tick.

    def _admit(self, running: scheduler.Running) -> None:
        answer = self._answers[running.request.id]
        answer.running = running
        for table, pages in zip(self._tables, running.pages, strict=True):
            table[running.slot, : len(pages)] = pages
        self._tokens["prompt"] += running.request.prompt_tokens

    def _prefill(self, chunk: scheduler.Chunk) -> None:
        """Run a chunk, write the segment if it was its last, and choose the first token after the last segment."""
        answer = self._answers[chunk.id]
        generation, slot = answer.generation, chunk.slot
        if answer.staging is None:
            taken = {each.staging for each in self._live()}
            answer.staging = next(index for index in range(self._prefills) if index not in taken)
        start, stop = next(segment for segment in answer.segments if chunk.stop <= segment[1])
        if not answer.window:
            razor = self.layout.spec.razor
            answer.window = self.layout.spec.capacity if razor is None else int(ring_length(razor, stop - start))
        tokens, targets = (np.zeros(self._state.config.chunk, np.int32) for _ in range(2))
        part = generation.prompt[chunk.start : chunk.stop]
        following = generation.prompt[chunk.start + 1 : chunk.stop + 1]
        tokens[: len(part)], targets[: len(following)] = part, following
        numbers = programs.as_int32(start, answer.window, stop - start, chunk.start - start, len(part))
        logits, scores = self._chunk(slot, answer.staging, tokens, targets, numbers, generation.prompt_logprobs)
        if generation.prompt_logprobs:
            found = tuple(np.asarray(x)[: len(following)] for x in scores)
            answer.prompt_logprobs += _token_logprobs(following, found, generation.logprobs or 0)
        if chunk.stop < stop:
            return
        self._write(slot, answer.staging, numbers[:3])
        answer.held = stop
        if chunk.last:
            answer.staging = None
            self._first_token(answer, logits)

    def _first_token(self, answer: _Answer, logits: jax.Array) -> None:
        generation, slot, rows = answer.generation, answer.slot, self._rows
        rows.length[slot], rows.window[slot] = answer.held, answer.window
        rows.token[slot], rows.count[slot], rows.limit[slot], rows.live[slot] = 0, 0, generation.max_tokens, True
        stop_ids = end_ids(self.params.assets, generation.stop)[:_STOP_IDS]
        rows.stop_ids[slot] = -1
        rows.stop_ids[slot, : len(stop_ids)] = stop_ids
        rows.seed[slot] = generation.seed % 2**32
        set_rule(rows.sampling, rows.greedy, slot, generation.sampling)
        seen = np.zeros(self.params.config.vocab_size, bool)
        seen[list(generation.prompt)] = True
        bias = self._no_bias
        if generation.logit_bias:
            bias = np.zeros(self.params.config.vocab_size, np.float32)
            for token, value in generation.logit_bias:
                bias[token] += value
        allowed = self._all_allowed if generation.grammar is None else self._mask(answer)
        if allowed is None:
            return
        token, failed, scores = self._start(slot, seen, bias, allowed, logits)
        tokens, failed = np.asarray(token), np.asarray(failed)
        self._receive(answer, tokens[: int(not failed[0])], tuple(np.asarray(x) for x in scores), bool(failed[0]))

    def _mask(self, answer: _Answer) -> np.ndarray | None:
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
        answers = [each for each in self._live() if each.running and self._rows.live[each.slot]]
        for answer in answers:
            if answer.generation.grammar is not None:
                mask = self._mask(answer)
                if mask is not None:
                    self._allow(answer.slot, mask)
        answers = [each for each in answers if self._rows.live[each.slot]]
        if not answers:
            return
        left = max(each.generation.max_tokens - each.count for each in answers)
        grammar = any(each.generation.grammar is not None for each in answers)
        score = any(each.generation.logprobs is not None for each in answers)
        out = self._steps(1 if grammar else min(left, self._block), score)
        tokens, counts, failed = (np.asarray(x) for x in (out.tokens, out.count, out.failed))
        scores = tuple(np.asarray(x) for x in out.logprobs) if score else ()
        for answer in answers:
            slot = answer.slot
            new = counts[slot] - answer.count
            self._rows.length[slot] += new + bool(failed[slot])
            self._receive(answer, tokens[slot, :new], tuple(x[slot] for x in scores), bool(failed[slot]))

    def _receive(self, answer: _Answer, tokens: np.ndarray, scores: tuple[np.ndarray, ...], failed: bool) -> None:
        """Append tokens to an answer, tell its listener, and end it if it is complete."""
        generation, output, slot = answer.generation, answer.output, answer.slot
        before = len(output.tokens)
        output.push(tokens.tolist())
        new = tuple(output.tokens[before:])
        with self._wake:
            answer.count += len(tokens)
            self._tokens["completion"] += len(new)
        self._rows.count[slot] = answer.count
        if len(tokens):
            self._rows.token[slot] = tokens[-1]
        found: list[TokenLogprob] = []
        if generation.logprobs is not None:
            found = _token_logprobs(new, scores, generation.logprobs)
        prompt, answer.prompt_logprobs = tuple(answer.prompt_logprobs), []
        if new:
            self._tell(answer, Delta(output.take(), new, tuple(found), prompt))
        if failed and not output.finished:
            output.fail()
            self._finish(generation.id, "error", nonfinite(self.params))
        elif output.finished:
            self._finish(generation.id, output.finish_reason)
        elif generation.grammar is not None:
            try:
                for token in new:
                    generation.grammar.accept(token)
            except Exception as error:
                self._finish(generation.id, "error", f"the grammar failed: {error}")

    def _live(self) -> list[_Answer]:
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
                self._rows.live[answer.slot] = False
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

    def _tell(self, answer: _Answer, event: Delta | Finished) -> None:
        """Call a listener. One that raises loses its answer, nothing else."""
        try:
            answer.listener(event)
        except Exception:
            log.exception("the listener of request %r failed: its answer is cancelled", answer.generation.id)
            answer.cancelled = True


def _choose_layout(
    spec: CacheSpec, slots: int, page_tokens: int, cache_bytes: int | None, typical_tokens: int
) -> Layout:
    """Return the layout for `cache_bytes`; None for all slots at their capacity or half of the free memory."""
    none = (0,) * len(paging.kinds(spec))
    widths = Layout(spec, slots, page_tokens, none, none).widths
    layout = Layout(spec, slots, page_tokens, tuple(slots * width for width in widths), none)
    if cache_bytes is None:
        free = free_bytes(jax.local_devices()[0])
        if free is None or layout.cache_bytes <= free // 2:
            return layout
        cache_bytes = free // 2
    pages = paging.pages_for_bytes(spec, slots, page_tokens, cache_bytes, typical_tokens)
    return dataclasses.replace(layout, pages=pages)


def _check_memory(cache: int, staging: int) -> None:
    """Raise MemoryError if the device has not enough free bytes for the cache and the staging buffers."""
    free = free_bytes(jax.local_devices()[0])
    if free is not None and cache + staging > free:
        raise MemoryError(
            f"the cache takes {cache / 2**30:,.2f} GiB and the staging buffers of prefill {staging / 2**30:,.2f} GiB, "
            f"and {free / 2**30:,.2f} GiB are free: lower cache_bytes, capacity or prefills, or give a policy with "
            "prefill_chunk, whose staging buffers hold one chunk"
        )


def _token_logprobs(tokens: Iterable[int], scores: tuple[np.ndarray, ...], top: int) -> list[TokenLogprob]:
    """Return the records of tokens; `scores` are arrays [n] and [n, 20] of at least as many."""
    chosen, ids, values = scores
    return [
        TokenLogprob(
            int(token),
            float(chosen[i]),
            tuple((int(a), float(b)) for a, b in zip(ids[i, :top], values[i, :top], strict=True)),
        )
        for i, token in enumerate(tokens)
    ]


__all__: Sequence[str] = ("RazorEngine",)
