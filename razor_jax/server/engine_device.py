"""What the engine holds on its devices, and its programs as methods that update it.

A method that changes something returns nothing and takes integers, arrays and tuples of them, so that `hosts` can send
its calls to other processes. What the host must know is asked for by `prompt_scores`, `first_token` and `block_output`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..functional import placement_of
from ..models.transformer import Block
from ..params import Params
from ..text.logprobs import Logprobs
from ..text.sampling import Sampling, rules, set_rule
from . import on_mesh, programs
from .pages import Layout
from .programs import Rows

STOP_IDS = 16  # most stop ids per row that the device looks for; the host looks for all of them

Pages = tuple[np.ndarray, ...]  # page ids per pool


class RowTokens(NamedTuple):
    """Tokens that a row gained.

    Attributes:
      tokens: int32 [n]. failed: whether the next logits were not finite; then there is no token for them.
      logprobs: of at least n tokens, [≥ n] and twice [≥ n, 20].
    """

    tokens: np.ndarray
    failed: bool
    logprobs: tuple[np.ndarray, ...]


class Device:
    """The cache, staging buffers and vocabulary state of all rows. The small numbers of rows are NumPy arrays."""

    def __init__(self, params: Params, layout: Layout, staged_tokens: int, prefills: int, chunk: int, block: int):
        """Allocate an empty cache, and `prefills` staging buffers for `staged_tokens` tokens.

        `chunk`: prompt tokens per prefill step. `block`: most decode steps per call.
        """
        self._params, self._layout, self._spec = params, layout, layout.spec
        self._chunk, self._block = chunk, block
        self._ends = {name: weight for name, weight in params.weights.items() if not name.startswith("blocks_")}
        self._layers = layout.init()
        self._means = programs.init_means(self._layers, max(1, layout.prefixes), self._spec)
        self._staging = [programs.init_staging(params, staged_tokens, self._spec) for _ in range(prefills)]
        vocabulary = params.config.vocab_size
        self._vocabulary = on_mesh.allocate(
            lambda: programs.Vocabulary.init(layout.slots, vocabulary), on_mesh.pin_whole, self._spec
        )
        constants = np.ones(vocabulary, bool), np.zeros(vocabulary, np.float32), np.zeros((1, vocabulary), np.float32)
        self._all_allowed, self._no_bias, self._logits = map(
            jnp.asarray, placement_of(self._spec).to_devices(constants)
        )
        self._tables = tuple(np.zeros((layout.slots, width), np.int32) for width in layout.widths)
        self._rows = init_rows(layout.slots)
        self._prompt_scores: Logprobs | None = None
        self._first: RowTokens | None = None
        self._output: dict[int, RowTokens] = {}

    def run_every_program(self) -> None:
        """Run each program once without effect, so that all are compiled."""
        nothing, none = np.zeros(0, np.int32), tuple(np.zeros(0, np.int32) for _ in self._tables)
        self.prefill_chunk(0, 0, (0, 1, 1, 0, 1), nothing, nothing, 0)
        self.write_segment(0, 0, (0, 1, 0, 0, 0))
        empty = jax.tree.leaves(init_rows(1))
        self.start_row(0, tuple(empty), nothing, nothing, np.zeros(0, np.float32), self._every_token())
        self.end_row(0)
        self.decode_block(0, 0)
        self.set_allowed(0, self._every_token())
        self.copy_prefix(0, 0, 0, none, none)
        jax.block_until_ready((self._layers, self._vocabulary))

    def _every_token(self) -> np.ndarray:
        return np.ones(self._params.config.vocab_size, bool)

    # What changes something.

    def set_pages(self, slot: int, pages: Pages) -> None:
        """Give a row its pages, in the order of its tokens."""
        for table, ids in zip(self._tables, pages, strict=True):
            table[slot, : len(ids)] = ids

    def prefill_chunk(
        self,
        slot: int,
        staging: int,
        numbers: tuple[int, ...],
        tokens: np.ndarray,
        targets: np.ndarray,
        score: int,
    ) -> None:
        """Run a chunk of a segment through all layers; see `programs.layer_chunk` for `numbers`.

        With `score` the log probabilities of the targets can be asked for.
        """
        config, weights, staged = self._params.config, self._params.weights, self._staging[staging]
        spec, mix = self._spec, placement_of(self._spec).mix
        row = (self._row_tables(slot), np.int32(slot), np.asarray(numbers, np.int32))
        x = programs.embed_chunk(config, self._ends, _padded(tokens, self._chunk, 0)[None], spec=spec)
        for index, layer in enumerate(self._layers):
            block = Block(config, config.first_like(index), mix)
            x, staged[index] = programs.layer_chunk(
                block, weights[f"blocks_{index}"], x, layer, staged[index], *row, spec=spec
            )
        aims = _padded(targets, self._chunk, 0)
        self._logits, self._prompt_scores = programs.chunk_logits(
            config, self._ends, x, aims, row[2][4], np.bool_(score), spec=spec
        )

    def write_segment(self, slot: int, staging: int, numbers: tuple[int, ...]) -> None:
        """Write a staged segment to the pages of its row, with the numbers of its last chunk."""
        row = (self._row_tables(slot), np.int32(slot), np.asarray(numbers, np.int32))
        self._layers = tuple(
            programs.write_layer(layer, staged, *row, spec=self._spec)
            for layer, staged in zip(self._layers, self._staging[staging], strict=True)
        )

    def start_row(
        self,
        slot: int,
        numbers: tuple[np.ndarray, ...],
        prompt: np.ndarray,
        bias_tokens: np.ndarray,
        biases: np.ndarray,
        allowed: np.ndarray | None,
    ) -> None:
        """Make a row live, and choose its first token from the logits after the last chunk.

        Args:
          numbers: leaves of `row_numbers`.
          prompt: token ids.
          bias_tokens, biases: what is added to the logits of these tokens.
          allowed: bool [V], None for all tokens.
        """
        for all_rows, own in zip(jax.tree.leaves(self._rows), numbers, strict=True):
            all_rows[slot] = own[0]
        seen = np.zeros(self._logits.shape[1], bool)
        seen[prompt] = True
        # On a mesh an array and one on its devices would be two programs.
        to_devices = placement_of(self._spec).to_devices
        bias = self._no_bias
        if len(bias_tokens):
            summed = np.zeros(self._logits.shape[1], np.float32)
            np.add.at(summed, bias_tokens, biases)
            bias = to_devices(summed)
        self._vocabulary, token, failed, scores = programs.start_row(
            self._vocabulary,
            jax.tree.map(lambda x: x[slot : slot + 1].copy(), self._rows),
            np.int32(slot),
            seen,
            bias,
            self._all_allowed if allowed is None else to_devices(allowed),
            self._logits,
            spec=self._spec,
        )
        broken = bool(np.asarray(failed)[0])
        tokens = np.asarray(token)[: int(not broken)]
        self._rows.count[slot] = len(tokens)
        self._rows.token[slot : slot + len(tokens)] = tokens
        self._first = RowTokens(tokens, broken, tuple(map(np.asarray, scores)))

    def decode_block(self, steps: int, score: int) -> None:
        """Run `programs.decode_block`, and count its tokens."""
        rows = self._rows
        self._layers, self._vocabulary, out = programs.decode_block(
            self._params,
            self._layers,
            self._vocabulary,
            rows,
            self._tables,
            np.int32(steps),
            np.bool_(score),
            spec=self._spec,
            block=self._block,
        )
        tokens, failed, scores = jax.tree.map(np.asarray, (out.tokens, out.failed, out.logprobs))
        self._output = {}
        for slot in np.flatnonzero(rows.live).tolist():
            new = int(np.asarray(out.count)[slot] - rows.count[slot])
            if new:
                rows.token[slot] = tokens[slot, new - 1]
                rows.length[slot] += new
                rows.count[slot] += new
            found = tuple(x[slot] for x in scores)
            self._output[slot] = RowTokens(tokens[slot, :new], bool(failed[slot]), found)

    def end_row(self, slot: int) -> None:
        """End a row: it decodes no more."""
        self._rows.live[slot] = False

    def set_allowed(self, slot: int, allowed: np.ndarray) -> None:
        """Run `programs.set_allowed`."""
        self._vocabulary = programs.set_allowed(self._vocabulary, np.int32(slot), allowed, spec=self._spec)

    def copy_prefix(self, slot: int, entry: int, restore: int, sources: Pages, targets: Pages) -> None:
        """Run `programs.copy_prefix` on page ids."""
        widths, nowhere = self._layout.widths, np.iinfo(np.int32).max
        self._layers, self._means = programs.copy_prefix(
            self._layers,
            self._means,
            tuple(_padded(pages, width, 0) for pages, width in zip(sources, widths, strict=True)),
            tuple(_padded(pages, width, nowhere) for pages, width in zip(targets, widths, strict=True)),
            np.int32(slot),
            np.int32(entry),
            np.bool_(restore),
            spec=self._spec,
        )

    # What the host must know. On process 0 of several, `hosts.Leader` has the same methods.

    def prompt_scores(self) -> tuple[np.ndarray, ...]:
        """Return the log probabilities of the last chunk's targets."""
        assert self._prompt_scores is not None
        return tuple(map(np.asarray, self._prompt_scores))

    def first_token(self) -> RowTokens:
        """Return the first token of the row that was started last."""
        assert self._first is not None
        return self._first

    def block_output(self) -> dict[int, RowTokens]:
        """Return what each live row gained by the last block of decode steps, by slot."""
        return self._output

    def flush(self) -> None:
        """End a tick. Here everything has run already."""

    def beat(self) -> None:
        """Pass time without work."""

    def close(self) -> None:
        """Free the memory of the cache."""
        for array in jax.tree.leaves((self._layers, self._means, self._staging, self._vocabulary)):
            array.delete()

    def _row_tables(self, slot: int) -> tuple[np.ndarray, ...]:
        # Copies: a program may still read them when the slot gets other pages.
        return tuple(table[slot : slot + 1].copy() for table in self._tables)


def init_rows(rows: int) -> Rows:
    """Return the numbers of rows without a request."""
    integers = {name: np.zeros(rows, np.int32) for name in ("length", "window", "token", "count", "limit")}
    stop_ids, seed = np.full((rows, STOP_IDS), -1, np.int32), np.zeros(rows, np.uint32)
    return Rows(**integers, live=np.zeros(rows, bool), stop_ids=stop_ids, seed=seed, sampling=rules(rows))


def row_numbers(
    length: int, window: int, limit: int, stop_ids: Sequence[int], seed: int, sampling: Sampling
) -> tuple[np.ndarray, ...]:
    """Return the leaves of the numbers of one live row that has read its prompt."""
    row = init_rows(1)
    row.length[0], row.window[0], row.limit[0], row.seed[0], row.live[0] = length, window, limit, seed, True
    row.stop_ids[0, : len(stop_ids[:STOP_IDS])] = stop_ids[:STOP_IDS]
    set_rule(row.sampling, 0, sampling)
    return tuple(jax.tree.leaves(row))


def _padded(numbers: Sequence[int] | np.ndarray, length: int, rest: int) -> np.ndarray:
    """Return numbers as int32 [length], the end filled with `rest`."""
    out = np.full(length, rest, np.int32)
    out[: len(numbers)] = numbers
    return out


__all__: Sequence[str] = ("STOP_IDS", "Device", "Pages", "RowTokens", "init_rows", "row_numbers")
