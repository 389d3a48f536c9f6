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

import logging
import threading
import time
from collections.abc import Sequence

import jax
import numpy as np

from .. import compilation
from ..params import Params
from ..text.logprobs import TokenLogprob, token_logprobs
from ..text.policy import Policy
from . import hosts, scheduler
from .engine_answer import Answer, allowed_tokens, first_window, new_answer
from .engine_device import Device, row_numbers
from .engine_prefixes import Prefixes, page_arrays, row_pages
from .engine_sizes import choose_sizes
from .engine_stats import Counters, snapshot
from .generation import Delta, EngineStats, Finished, Generation, Listener, Refused

log = logging.getLogger("razor_jax")

_IDLE_SECONDS = 5.0  # between messages of an idle process 0: the others wait in a collective, which can time out
_NOT_FINITE = (
    "the logits of this answer are not finite: its prompt meets a damaged weight, or the type of the model overflows; "
    "load it with dtype='float32', or fetch the checkpoint again"
)


class RazorEngine:
    """An engine for one model, on one device, a mesh, or a mesh of several hosts; see `generation.Engine`.

    On several hosts every process makes the same engine. Process 0 starts it, the others call `follow`.
    """

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

        Arguments and errors are those of `engine_sizes.choose_sizes`.
        """
        compilation.track_compilation()
        self.params = params
        self.sizes = choose_sizes(
            params,
            razor,
            slots=slots,
            capacity=capacity,
            cache_bytes=cache_bytes,
            typical_tokens=typical_tokens,
            page_tokens=page_tokens,
            chunk=chunk,
            block=block,
            prefills=prefills,
            max_waiting=max_waiting,
            prefix_bytes=prefix_bytes,
        )
        self.layout = self.sizes.layout
        self.failure: Exception | None = None
        self._root = self.sizes.prefix_root(params)
        self._state = scheduler.start(self.sizes.scheduler)
        self._wake = threading.Condition()  # guards everything that other threads read or write
        self._answers: dict[str, Answer] = {}
        self._thread: threading.Thread | None = None
        self._ready = self._draining = self._stopped = False
        self._counters = Counters()

    # What other threads call.

    def start(self) -> None:
        """Compile every program, then run ticks on a thread of the engine."""
        self.compile()
        self._thread = threading.Thread(target=self._run, name="razor-engine", daemon=True)
        self._thread.start()

    def compile(self) -> None:
        """Allocate the cache and compile every program. A caller that runs `tick` itself needs no `start`."""
        with compilation.log_compilation("the engine"):
            self._allocate().run_every_program()
            hosts.meet()
        self._ready = True

    @property
    def ready(self) -> bool:
        """Whether the programs are compiled and the engine does not drain."""
        return self._ready and not self._draining and not self._stopped

    def submit(self, generation: Generation, listener: Listener) -> None:
        """Put an answer into the queue. Raises Refused."""
        answer = new_answer(generation, listener, self.params, self.sizes, self._root)
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
            if not self._answers:
                self._counters.last_tick = time.monotonic()  # until now there was nothing to do
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
        with self._wake:
            return snapshot(self.layout, self._state, self._answers.values(), self._counters)

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
        self._device.flush()
        self._counters.compilations += compilation.totals()[0] - programs_before
        self._counters.ticks += 1
        self._counters.last_tick = time.monotonic()
        return bool(plan.chunk or plan.decode)

    def follow(self) -> None:
        """Run what process 0 decides until it stops, in a process that is not process 0."""
        self.compile()
        assert isinstance(self._device, Device)
        hosts.follow(self._device)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                try:
                    self.tick()
                except Exception as error:
                    self._recover(error)
        except Exception as error:
            self._fail(error)

    def _wait_for_work(self) -> bool:
        """Wait until an answer is live. Return False once the engine has stopped and none is."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._answers or self._stopped, _IDLE_SECONDS)
                if self._answers:
                    return True
                if self._stopped:
                    break
            self._device.beat()
        self._device.close()
        return False

    def _recover(self, error: Exception) -> None:
        """Start with an empty cache: a program that failed may have taken the old one, or parts, with it.

        Raises the error on several hosts, because the other processes may have failed elsewhere or not at all.
        """
        if jax.process_count() > 1:
            raise error
        log.exception("the engine lost its cache and starts with an empty one")
        self._end_all(error)
        self._device.close()  # Two caches may not fit.
        self._allocate()

    def _fail(self, error: Exception) -> None:
        """End all answers and the engine."""
        log.error("the engine ends: %s", error)
        with self._wake:
            self.failure, self._stopped = error, True
        self._end_all(error)

    def _end_all(self, error: Exception) -> None:
        for id in list(self._answers):
            self._finish(id, "error", f"the engine failed: {error}")

    def _allocate(self) -> Device:
        """Make the empty device state and an empty store of prefixes."""
        sizes = self.sizes
        device = Device(self.params, self.layout, sizes.staged_tokens, sizes.prefills, sizes.chunk, sizes.block)
        leads = jax.process_count() > 1 and jax.process_index() == 0
        self._device = hosts.Leader(device) if leads else device
        self._prefixes = Prefixes(self.layout, self._device)
        return device

    # The steps of a tick.

    def _find_prefixes(self) -> None:
        """Let waiting requests start behind the longest stored prefix of their prompts."""
        for waiting in self._state.waiting:
            found = self._prefixes.longest(self._answers[waiting.request.id])
            if (waiting.reused, waiting.shared) != found:
                self._state = scheduler.reuse(self._state, waiting.request.id, *found)

    def _admit(self, running: scheduler.Running) -> None:
        """Give a request its slot, with the pages of the prefix that it starts behind."""
        answer = self._answers[running.request.id]
        self._device.set_pages(running.slot, page_arrays(row_pages(running)))
        if running.reused:
            prefix = self._prefixes.restore(answer, running)
            answer.held, answer.window, answer.reused = prefix.tokens, prefix.window, prefix.tokens
        with self._wake:
            answer.running = running
            self._counters.tokens["prompt"] += running.request.prompt_tokens
            self._counters.tokens["cached"] += running.reused

    def _prefill(self, chunk: scheduler.Chunk) -> None:
        """Run a chunk, write the segment if it was its last, and choose the first token after the last segment."""
        answer = self._answers[chunk.id]
        generation, slot = answer.generation, chunk.slot
        if answer.staging is None:
            taken = {each.staging for each in self._live()}
            answer.staging = next(index for index in range(self.sizes.prefills) if index not in taken)
        start, stop = next(segment for segment in answer.segments if chunk.stop <= segment[1])
        if not answer.window:
            answer.window = first_window(generation, self.layout.spec)
        tokens = np.asarray(generation.prompt[chunk.start : chunk.stop], np.int32)
        score = generation.prompt_logprobs
        following = np.asarray(generation.prompt[chunk.start + 1 : chunk.stop + 1] if score else (), np.int32)
        numbers = (start, answer.window, stop - start, chunk.start - start, len(tokens))
        self._device.prefill_chunk(slot, answer.staging, numbers, tokens, following, int(score))
        if score:
            found = [x[: len(following)] for x in self._device.prompt_scores()]
            answer.prompt_logprobs += token_logprobs(following.tolist(), found, generation.logprobs or 0)
        if chunk.stop < stop:
            return
        self._device.write_segment(slot, answer.staging, numbers)
        with self._wake:
            answer.held = stop
        if stop in answer.keys:
            self._prefixes.keep(answer, stop)
        if chunk.last:
            answer.staging = None
            self._first_token(answer)

    def _first_token(self, answer: Answer) -> None:
        """Choose the first token of an answer from the logits after its prompt."""
        generation = answer.generation
        allowed = None
        if generation.grammar is not None:
            allowed = self._mask(answer)
            if allowed is None:
                return
        numbers = row_numbers(
            answer.held,
            answer.window,
            generation.max_tokens,
            answer.stop_ids,
            generation.seed % 2**32,
            generation.sampling,
        )
        biased = np.asarray([token for token, _ in generation.logit_bias], np.int32)
        biases = np.asarray([bias for _, bias in generation.logit_bias], np.float32)
        prompt = np.asarray(generation.prompt, np.int32)
        self._device.start_row(answer.slot, numbers, prompt, biased, biases, allowed)
        answer.decodes = True
        self._receive(answer, *self._device.first_token())

    def _mask(self, answer: Answer) -> np.ndarray | None:
        """Return which tokens the grammar of an answer allows next; end the answer and return None if it fails."""
        try:
            return allowed_tokens(answer.generation, self.params.config.vocab_size)
        except Exception as error:
            self._finish(answer.generation.id, "error", f"the grammar failed: {error}")
            return None

    def _decode(self) -> None:
        """Run a block of decode steps, and hand out what it adds."""
        for answer in self._live():
            if answer.decodes and answer.generation.grammar is not None:
                mask = self._mask(answer)
                if mask is not None:
                    self._device.set_allowed(answer.slot, mask)
        answers = [each for each in self._live() if each.decodes]
        if not answers:
            return
        left = max(each.generation.max_tokens - each.count for each in answers)
        grammar = any(each.generation.grammar is not None for each in answers)
        score = any(each.generation.logprobs is not None for each in answers)
        self._device.decode_block(1 if grammar else min(left, self.sizes.block), int(score))
        output = self._device.block_output()
        for answer in answers:
            self._receive(answer, *output[answer.slot])

    def _receive(self, answer: Answer, tokens: np.ndarray, failed: bool, scores: Sequence[np.ndarray]) -> None:
        """Append tokens to an answer, tell its listener, and end it if it is complete."""
        generation, output = answer.generation, answer.output
        before = len(output.tokens)
        output.push(tokens.tolist())
        new = tuple(output.tokens[before:])
        with self._wake:
            answer.count += len(tokens)
            self._counters.tokens["completion"] += len(new)
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
            self._counters.finished[reason] += 1
            if answer.decodes:
                self._device.end_row(answer.slot)
            if answer.running is not None:
                self._prefixes.release(answer.running)
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
