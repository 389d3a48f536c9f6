"""The sections of `benchmarks.attention`: their cases, in order, and their goals."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import razor_jax
from benchmarks import attention_peers as peers
from benchmarks import attention_programs as programs
from benchmarks.attention_programs import Cache, noise
from benchmarks.attention_rows import GIB, Case, ResultRow, WrongResult
from razor_jax import Params, RazorConfig
from razor_jax import cache as kv
from razor_jax.kernels.cache_write import GroupArrays
from razor_jax.models.config import ModelConfig
from razor_jax.params import abstract_weights

if TYPE_CHECKING:
    from benchmarks.attention import Bench


GOAL_BYTES = 64e6  # decode has goals if a layer has at least this many bytes
L2_BYTES = 64 * 2**20  # at least the L2 of an H200


def copy_section(bench: Bench) -> Iterator[Case]:
    """Yield the ceilings: a large copy two ways, a large read, a large matrix product."""
    size, n = bench.sizes.copy_bytes, bench.sizes.matrix

    def big() -> jax.Array:
        return noise(1, (size // 2**16, 2**15), jnp.dtype("bfloat16"))

    def copied(function: Callable[[jax.Array], jax.Array]) -> Callable[[ResultRow], None]:
        def measure(row: ResultRow) -> None:
            x, call = big(), jax.jit(function)
            bench.time(row, lambda: call(x))
            assert row.seconds is not None
            rates.append(row.bytes / row.seconds)
            row.extra["bytes_per_second"] = rates[-1]

        return measure

    def multiplied(row: ResultRow) -> None:
        a, b = (noise(i, (n, n), jnp.dtype("bfloat16")) for i in (2, 3))
        product = jax.jit(lambda a, b: (a @ b).astype(jnp.bfloat16))
        bench.time(row, lambda: product(a, b))
        assert row.seconds is not None
        bench.matrix_rate = row.flops / row.seconds
        row.extra["flops_per_second"] = bench.matrix_rate

    rates: list[float] = []
    yield Case(ResultRow("copy", "copy", "copy", bytes=2 * size), copied(jnp.copy))
    yield Case(ResultRow("copy", "negation", "copy", bytes=2 * size), copied(jnp.negative))
    if rates:
        # The faster of the two is the harder ceiling.
        bench.copy_rate = max(rates)
        bench.machine["copy_bytes_per_second"] = bench.copy_rate
    yield Case(ResultRow("copy", "sum: read only", "read", bytes=size), copied(lambda x: jnp.sum(x, dtype=jnp.float32)))
    yield Case(ResultRow("copy", f"bf16 product {n}³", "product", flops=2 * n**3), multiplied)


def decode_section(bench: Bench) -> Iterator[Case]:
    """Yield decode attention: one token per row over the caches of all layers."""
    sizes, model = bench.sizes, bench.sizes.model
    for row in bench.torch:
        yield Case(_torch_row(bench, row), None)
    for context, batch in sizes.shapes:
        both = (False, True)[: 1 + (batch > 1)]
        for ragged in both:
            lengths = peers.lengths_of(batch, context, ragged)
            for peer in bench.peers:
                yield _dense_case(bench, lengths, ragged, peer)
            # XLA runs at one shape only, to show the difference.
            others = ("xla",) if (context, batch) == sizes.shapes[0] else ()
            for implementation in dict.fromkeys((bench.implementation, *others)):
                yield _ours_case(bench, "decode", Cache.of(model, None, None, lengths, "bfloat16"), implementation)
        for kept in sizes.kept:
            for window, razor in sizes.policies:
                for ragged in both:
                    cache = Cache.of(model, kept, razor, peers.lengths_of(batch, context, ragged), "bfloat16")
                    yield _ours_case(bench, "decode", cache, bench.implementation, kept, window)


def int8_section(bench: Bench) -> Iterator[Case]:
    """Yield 8-bit caches, compared with bfloat16 caches of the same heads and window."""
    sizes, (kept, (window, razor)) = bench.sizes, (bench.sizes.kept[0], bench.sizes.policies[0])
    for context, batch in sizes.shapes:
        lengths = peers.lengths_of(batch, context, False)
        wide: ResultRow | None = None
        for dtype in ("bfloat16", "int8", "fp8"):
            cache = Cache.of(sizes.model, kept, razor, lengths, dtype)
            case = _ours_case(bench, "int8", cache, bench.implementation, kept, window)
            yield case
            wide = wide or case.row
            if case.row is not wide and case.row.seconds and wide.seconds:
                case.row.speedup, case.row.byte_ratio = (
                    wide.seconds / case.row.seconds,
                    wide.bytes / case.row.bytes,
                )
                if dtype == "int8" and wide.bytes >= GOAL_BYTES:
                    case.row.goal("× bfloat16", 1.7, case.row.speedup)


def _torch_row(bench: Bench, measured: dict[str, Any]) -> ResultRow:
    """Return the row of a measurement of the torch process."""
    model = bench.sizes.model
    row = ResultRow("decode", measured["name"], note=measured.get("note", ""), error=measured.get("error"))
    if "batch" in measured:
        lengths = peers.lengths_of(measured["batch"], measured["context"], measured["ragged"])
        cache = Cache.of(model, None, None, lengths, "bfloat16")
        row.batch, row.context, row.ragged = measured["batch"], measured["context"], measured["ragged"]
        row.layers, row.bytes = measured["layers"], cache.step_bytes // model.num_layers
        row.seconds = measured.get("seconds")
        _remember(bench, row)
    return row


def _remember(bench: Bench, row: ResultRow) -> None:
    """Remember the best dense peer of a batch, context and kind of lengths."""
    assert row.batch is not None
    assert row.context is not None
    where = (row.batch, row.context, row.ragged)
    if row.seconds and row.seconds < bench.best.get(where, ("", math.inf))[1]:
        bench.best[where] = (row.name, row.seconds)


def _dense_case(bench: Bench, lengths: np.ndarray, ragged: bool, peer: peers.Peer) -> Case:
    """Return the case of a JAX peer over as many dense layers as fit."""
    model = bench.sizes.model
    cache = Cache.of(model, None, None, lengths, "bfloat16")
    batch, context = len(lengths), int(lengths.max())
    layer_bytes = cache.spec.kv_bytes(batch) // model.num_layers
    layers = peers.layers_that_fit(layer_bytes, model.num_layers, bench.memory)
    row = ResultRow("decode", peer.name, batch=batch, context=context, ragged=ragged, layers=layers)
    row.bytes, row.alone = cache.step_bytes // model.num_layers, max(layers, 2) * layer_bytes
    _note_small(bench, row)

    def measure(row: ResultRow) -> None:
        heads = (model.num_kv_heads, model.group_size, model.head_dim)
        bench.verify(row, peer.name, lambda: peers.check_jax(peer, heads))
        K, G, H = heads
        shape = (batch, context, K, H) if peer.slots_first else (batch, K, context, H)
        bf16 = jnp.dtype("bfloat16")
        stored = tuple(tuple(noise(2 * i + j, shape, bf16) for j in (0, 1)) for i in range(layers))
        q = noise(99, (batch, K, G, H), bf16)
        step = functools.partial(
            programs.chain, q, stored, cache.row_counts, attend_layer=programs.PeerLayer(peer), probe=layers - 1
        )
        _, (rows, out) = bench.time(row, step)
        k, v = (x[-1:, :, -1:].swapaxes(1, 2) if peer.slots_first else x[-1:, -1:] for x in stored[-1])
        bench.check_error(row, programs.check_head(rows, out, GroupArrays(k, v), int(lengths[-1]), 0))
        _remember(bench, row)

    return Case(row, measure)


def _ours_case(
    bench: Bench, section: str, cache: Cache, implementation: str, kept: int | None = None, window: str | None = None
) -> Case:
    """Return the case of our kernel over a cache.

    A dense cache has as many layers as fit. A Razor cache has all layers, because each has its own shapes.
    """
    model, batch, context = bench.sizes.model, len(cache.lengths), int(cache.lengths.max())
    layers = model.num_layers
    if kept is None:
        # Without a kernel the compiler needs seconds per layer, so a few layers must do.
        most = layers if implementation == bench.implementation else 4
        layers = peers.layers_that_fit(cache.spec.kv_bytes(batch) // layers, most, bench.memory)
    ragged = bool((cache.lengths != context).any())
    name = f"razor_jax {implementation}, {'dense' if kept is None else 'Razor'}"
    row = ResultRow(section, name, batch=batch, context=context, ragged=ragged, kept=kept, window=window, layers=layers)
    row.dtype = {"float8_e4m3fn": "fp8"}.get(cache.spec.dtype, cache.spec.dtype)
    row.bytes = cache.step_bytes // model.num_layers
    row.alone = cache.spec.kv_bytes(batch) * max(layers, 2) // model.num_layers
    _note_small(bench, row)

    def measure(row: ResultRow) -> None:
        check = functools.partial(programs.check_decode, implementation, row.dtype)
        bench.verify(row, f"{implementation} {row.dtype}", check)
        stored = cache.layers(layers)
        # A layer with both groups, if any has both.
        probe = max(range(layers), key=lambda i: (len(stored[i]), i))
        q = noise(99, (batch, model.num_kv_heads, model.group_size, model.head_dim), jnp.dtype("bfloat16"))
        step = functools.partial(
            programs.chain, q, stored, cache.row_counts, attend_layer=programs.RazorLayer(implementation), probe=probe
        )
        _, (rows, out) = bench.time(row, step)
        first = 0
        for group in stored[probe]:
            heads = slice(first, first + group.k.shape[1])
            first = heads.stop
            windowed = group.k_mean is not None
            n = int(cache.dropped[-1]) if windowed else 0
            valid = int(cache.valid(windowed)[-1])
            bench.check_error(row, programs.check_head(rows[:, heads], out[:, heads], group, valid, n))
        if section == "decode" and implementation == bench.implementation:
            _decode_goals(bench, row, dense_bytes=int(cache.lengths.sum(dtype=np.int64)) * _token_bytes(model))

    return Case(row, measure)


def _note_small(bench: Bench, row: ResultRow) -> None:
    """Add a note if the caches of a step are so small that the chip keeps part of them from the step before."""
    if row.bytes * row.layers < 8 * L2_BYTES and not bench.sizes.smoke:
        row.note = "less than 8 × L2 in total, so L2 serves part of it; "


def _token_bytes(model: ModelConfig) -> int:
    """Return the bytes of a token in a dense bfloat16 layer."""
    return 2 * model.num_kv_heads * model.head_dim * 2


def _decode_goals(bench: Bench, row: ResultRow, dense_bytes: int) -> None:
    """Compare our row with the best dense peer and with the copy bandwidth."""
    assert row.seconds is not None
    assert row.batch is not None
    assert row.context is not None
    share = row.bytes / row.seconds / bench.copy_rate
    big = row.bytes >= GOAL_BYTES
    if big:
        row.goal("of copy bandwidth", 0.85, share)
    peer = bench.best.get((row.batch, row.context, row.ragged))
    if peer is None:
        return
    row.speedup, row.byte_ratio = peer[1] / row.seconds, dense_bytes / row.bytes
    row.extra["best_peer"] = peer[0]
    if big and row.kept is None:
        row.goal("× best dense peer", 1.0, row.speedup)
    elif big:
        row.goal("× best dense peer", 0.85 * row.byte_ratio, row.speedup)


def _causal_case(bench: Bench, section: str, tokens: int) -> Case:
    """Return the case of cuDNN's causal attention over a whole prompt in one layer."""
    model, name = bench.sizes.model, "XLA causal" if bench.on_cpu and not bench.plan else "cuDNN causal"
    K, G, H = model.num_kv_heads, model.group_size, model.head_dim
    row = ResultRow(section, name, batch=1, context=tokens, flops=_causal_flops(model, tokens))
    row.bytes = tokens * (_token_bytes(model) + 4 * K * G * H)
    row.alone = 2 * row.bytes
    causal = jax.jit(peers.xla_causal if bench.on_cpu else peers.cudnn_causal)

    def measure(row: ResultRow) -> None:
        q, k, v = (noise(i, (1, tokens, n, H), jnp.dtype("bfloat16")) for i, n in enumerate((K * G, K, K)))
        bench.time(row, lambda: causal(q, k, v))
        assert row.seconds is not None
        row.extra["flops_per_second"] = row.flops / row.seconds

    return Case(row, measure)


def _causal_flops(model: ModelConfig, tokens: int) -> int:
    """Return the multiplications and additions of causal attention in one layer."""
    return 4 * model.num_heads * model.head_dim * tokens * (tokens + 1) // 2


def prefill_section(bench: Bench) -> Iterator[Case]:
    """Yield exact prefill: a whole prompt in one call, one layer."""
    model = bench.sizes.model
    K, G, H = model.num_kv_heads, model.group_size, model.head_dim
    for tokens in bench.sizes.exact:
        case = _causal_case(bench, "prefill", tokens)
        yield case
        peer = case.row

        def measure(row: ResultRow, tokens: int = tokens, peer: ResultRow = peer) -> None:
            bench.verify(row, "causal", functools.partial(programs.check_causal, bench.implementation))
            shapes = ((1, K, tokens * G, H), (1, K, tokens, H), (1, K, tokens, H))
            q, k, v = (noise(i, shape, jnp.dtype("bfloat16")) for i, shape in enumerate(shapes))
            lengths = jnp.full((1,), tokens, jnp.int32)
            call = functools.partial(
                programs.exact, q, k, v, lengths, group_size=G, implementation=bench.implementation
            )
            out = bench.time(row, call)
            # The rows of the last token see everything, as in a decode step.
            bench.check_error(row, programs.check_head(q[:, :, -G:], out[:, :, -G:], GroupArrays(k, v), tokens, 0))
            assert row.seconds is not None
            row.extra["flops_per_second"] = row.flops / row.seconds
            if peer.seconds:
                row.speedup = peer.seconds / row.seconds
                row.goal(f"× {peer.name}", 0.8, row.speedup)

        ours = dataclasses.replace(peer, name=f"razor_jax {bench.implementation}, exact", seconds=None, note="")
        yield Case(dataclasses.replace(ours, extra={}, goals=[], compile_seconds=None), measure)


def streaming_section(bench: Bench) -> Iterator[Case]:
    """Yield a long prompt by chunks: each kind of layer, then the sum over the model's layers."""
    sizes, model = bench.sizes, bench.sizes.model
    tokens, razor, kept = sizes.stream, sizes.stream_policy, sizes.kept[0]
    assert razor.prefill_chunk is not None
    assert razor.window is not None
    chunk, window, sinks = razor.prefill_chunk, razor.window, razor.sinks
    peer = _causal_case(bench, "streaming", tokens)
    yield peer
    spec = Cache.of(model, kept, razor, np.asarray([tokens], np.int32), "bfloat16").spec
    K, G, H = model.num_kv_heads, model.group_size, model.head_dim
    dense = _causal_flops(model, tokens) // K
    # A windowed head sees at most the sinks and the window, half a chunk on average, and the mean.
    narrow = 4 * G * H * tokens * (min(sinks + window, tokens) + chunk // 2 + 1)

    def measure(row: ResultRow) -> None:
        bench.verify(row, "streaming", functools.partial(programs.check_stream, bench.implementation))
        layer = spec.heads.counts.index(row.extra["retrieval_heads"])
        shapes = ((1, K, tokens * G, H), (1, K, tokens, H), (1, K, tokens, H))
        q, k, v = (noise(i, shape, jnp.dtype("bfloat16")) for i, shape in enumerate(shapes))
        groups = []
        for heads, windowed, _ in spec.groups(layer):
            slots = [jnp.zeros((1, len(heads), spec.slots(windowed), H), jnp.bfloat16) for _ in range(2)]
            means = [jnp.zeros((1, len(heads), 1, H)) if windowed else None for _ in range(2)]
            groups.append(GroupArrays(*slots, None, None, *means))
        options = {"chunk": chunk, "window": window, "sinks": sinks, "implementation": bench.implementation}
        bench.time(row, lambda: programs.stream(q, k, v, tuple(groups), **options))

    rows = []
    for count in sorted(set(spec.heads.counts)):
        row = ResultRow(
            "streaming", f"razor_jax {bench.implementation}, {count} of {K} heads kept", batch=1, context=tokens
        )
        row.extra.update(retrieval_heads=count, model_layers=spec.heads.counts.count(count))
        row.flops = count * dense + (K - count) * narrow
        row.alone, row.window = peer.row.alone * 2, f"{window:,}, chunk {chunk:,}"
        row.kept = count
        rows.append(row)
        yield Case(row, measure)
    total = ResultRow("streaming", f"razor_jax {bench.implementation}, all layers", "prompt", 1, tokens, kept=kept)
    total.window, total.layers = f"{window:,}, chunk {chunk:,}", len(spec.heads.counts)
    total.flops = sum(row.flops * row.extra["model_layers"] for row in rows)
    if all(row.seconds for row in rows):
        total.seconds = sum(row.seconds * row.extra["model_layers"] for row in rows if row.seconds)
        total.note = "the sum of the rows above, each times its number of layers"
        if peer.row.seconds:
            total.speedup = len(spec.heads.counts) * peer.row.seconds / total.seconds
            total.goal(f"× one-shot {peer.row.name}", 2.0, total.speedup)
    yield Case(total, None)


def step_section(bench: Bench) -> Iterator[Case]:
    """Yield a whole decode step with random weights: tokens per second, memory, the largest batch."""
    sizes, model = bench.sizes, bench.sizes.model
    split = programs.uneven_split(model, sizes.kept[0])
    weights = abstract_weights(model, jnp.bfloat16)
    embedding = model.vocab_size * model.hidden_size * 2
    weight_bytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(weights))
    (wide, paper), (narrow, compact) = sizes.policies[0], sizes.policies[-1]
    policies = {"dense": None, narrow: compact, wide: paper}
    policies[f"{narrow} int8"] = dataclasses.replace(compact, kv_dtype="int8")
    params = functools.cache(lambda: Params(_random_weights(weights), model, split))

    def row_of(name: str, batch: int, context: int) -> ResultRow:
        razor = policies[name]
        kept = None if razor is None else sizes.kept[0]
        dtype = "bfloat16" if razor is None or razor.kv_dtype is None else razor.kv_dtype
        row = ResultRow("step", name, "step", batch, context, kept=kept, window=name, dtype=dtype)
        cache = Cache.of(model, kept, razor, np.full(batch, context, np.int32), dtype)
        # A step reads one line of the embedding table per row.
        row.bytes = weight_bytes - embedding + cache.step_bytes
        row.alone = weight_bytes + cache.spec.kv_bytes(batch)
        return row

    def largest(name: str, context: int) -> int:
        one = row_of(name, 1, context).alone - weight_bytes
        reserve = 0 if sizes.smoke else 2 * GIB  # temporaries
        fits = int((bench.memory - weight_bytes - reserve) // (one + 12 * model.vocab_size))  # float32 logits, copies
        return min(fits, 1) if sizes.smoke else fits

    for context in sizes.contexts:
        most = {name: largest(name, context) for name in policies}
        plan = [("dense", most["dense"]), (narrow, most["dense"]), (narrow, most[narrow]), (wide, most[wide])]
        plan += [(f"{narrow} int8", most[f"{narrow} int8"]), ("dense", 1), (narrow, 1)]
        dense: dict[int, ResultRow] = {}
        for name, batch in dict.fromkeys(plan):
            if batch < 1:
                yield Case(ResultRow("step", name, "step", 1, context, window=name, note="not one row fits"), None)
                continue

            def measure(row: ResultRow, context: int = context, dense: dict[int, ResultRow] = dense) -> None:
                # The batch fits by arithmetic, but the compiler's temporaries are only known now.
                for _ in range(3):
                    assert row.batch is not None
                    try:
                        _time_step(bench, row, params(), policies[row.name], context)
                        break
                    except jax.errors.JaxRuntimeError as problem:
                        if "RESOURCE_EXHAUSTED" not in str(problem) or row.batch == 1:
                            raise
                    note = f"{row.note}batch {row.batch} was out of memory; "
                    smaller = row_of(row.name, max(1, int(0.9 * row.batch)), context)
                    row.batch, row.bytes, row.alone, row.note = smaller.batch, smaller.bytes, smaller.alone, note
                    row.predicted_seconds = row.bytes / bench.copy_rate
                assert row.batch is not None
                base = dense.get(row.batch) if row.kept is not None else None
                if row.kept is None:
                    dense[row.batch] = row
                elif base is not None and base.seconds and row.seconds:
                    row.speedup, row.byte_ratio = base.seconds / row.seconds, base.bytes / row.bytes

            row = row_of(name, batch, context)
            row.extra["largest_batch"] = batch == most[name]
            yield Case(row, measure)


def _random_weights(weights: Any) -> Any:
    """Return random weights of these shapes, small enough to keep the residual stream in range. Norms are 1."""

    def fill(index: int, a: jax.ShapeDtypeStruct) -> jax.Array:
        if len(a.shape) == 1:
            return jnp.ones(a.shape, a.dtype)
        return 0.02 * noise(index, a.shape, a.dtype)

    leaves, tree = jax.tree.flatten(weights)
    return jax.tree.unflatten(tree, [fill(index, a) for index, a in enumerate(leaves)])


def _noisy_cache(params: Params, batch: int, capacity: int, razor: RazorConfig | None, prompt: int) -> kv.KVCache:
    """Return the library's cache of `batch` prompts, filled with noise. Nothing is allocated twice."""
    lengths = np.full(batch, prompt, np.int32)
    names: list[str] = []
    trees = []

    def empty() -> list[jax.Array]:
        cache = razor_jax.init_cache(params, batch=batch, capacity=capacity, razor=razor, prompt_lengths=lengths)
        flat, tree = jax.tree_util.tree_flatten_with_path(cache)
        names[:], trees[:] = [path[-1].name for path, _ in flat], [tree]
        return [leaf for _, leaf in flat]

    shapes = jax.eval_shape(empty)
    window = capacity if razor is None else kv.ring_length(razor, prompt)
    known = {"length": prompt, "window": window, "overflow": False, "k_scale": 1 / 74, "v_scale": 1 / 74}
    leaves = [
        jnp.full(a.shape, known[name], a.dtype) if name in known else noise(seed, a.shape, jnp.dtype(a.dtype))
        for seed, (name, a) in enumerate(zip(names, shapes, strict=True))
    ]
    return jax.tree.unflatten(trees[0], leaves)


def _time_step(bench: Bench, row: ResultRow, params: Params, razor: RazorConfig | None, context: int) -> None:
    """Time decode steps on a cache full of noise. Each step takes the token that the step before chose."""
    assert row.batch is not None
    batch, prompt = row.batch, context - bench.sizes.room
    cache = _noisy_cache(params, batch, context, razor, prompt)

    def step(params, cache, token):
        logits, cache = razor_jax.decode(params, cache, token)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache, jnp.max(logits)

    token = jnp.zeros((batch,), jnp.int32)
    started = time.perf_counter()
    program = jax.jit(step, donate_argnums=(1,)).lower(params, cache, token).compile()
    row.compile_seconds = time.perf_counter() - started
    calls = bench.sizes.room // (bench.sizes.repeats + 1)
    samples, largest = [], jnp.zeros(())
    for _ in range(bench.sizes.repeats + 1):  # the first is the warm-up
        started = time.perf_counter()
        for _ in range(calls):
            token, cache, largest = program(params, cache, token)
        jax.block_until_ready(token)
        samples.append((time.perf_counter() - started) / calls)
    if np.asarray(cache.overflow).any() or not np.isfinite(np.asarray(largest)):
        raise WrongResult("the cache overflowed, or the logits are not finite")
    row.seconds = statistics.median(samples[1:])
    memory, stats = program.memory_analysis(), bench.device.memory_stats() or {}
    row.extra |= {
        "tokens_per_second": batch / row.seconds,
        "kv_bytes": kv.allocated_bytes(cache),
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
        "bytes_in_use": stats.get("bytes_in_use"),
        "peak_bytes_so_far": stats.get("peak_bytes_in_use"),
        "spread": (max(samples[1:]) - min(samples[1:])) / row.seconds,
    }


SECTIONS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "copy": copy_section,
    "decode": decode_section,
    "int8": int8_section,
    "prefill": prefill_section,
    "streaming": streaming_section,
    "step": step_section,
}
