"""Cache writes: the reference against Python lists of tokens, the TPU kernels against the reference.

Every slot, scale and mean that a row does not use holds NaN, or for int8 any number, and must keep its bits. What the
interpreter cannot show (tiles, hidden copies of a cache) is in `tests/aot`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from razor_jax.kernels.cache_write import CacheWrite, GroupArrays, tpu, xla

from ..support import oracle

K = 2
TYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")


def by_arguments(write):
    """Return a backend's `write` that takes the fields of `CacheWrite` as arguments."""

    def run(group, tokens, lengths, counts, window, sinks, **options):
        return write(CacheWrite(group, tokens, lengths, counts, window, sinks), **options)

    return run


reference = jax.jit(by_arguments(xla.write), static_argnames="sinks")
kernel = jax.jit(by_arguments(functools.partial(tpu.write, interpret=True)), static_argnames=("sinks", "block"))

# Slots, sinks, tokens of the call, and each row's window, length and count. A window of None is a full group.
RAGGED = {
    "token": (96, 4, 1, [92, 92, 92, 37, 37, 1, 92, 37], [0, 3, 4, 40, 41, 9, 300, 200], [1, 1, 1, 1, 1, 1, 1, 0]),
    "token, no sinks": (96, 0, 1, [96, 96, 37, 37, 1], [0, 95, 37, 36, 7], [1, 1, 1, 1, 1]),
    "few tokens": (96, 4, 5, [92, 92, 37, 37, 92, 37], [0, 2, 39, 200, 94, 80], [5, 4, 5, 3, 5, 0]),
    # The end of a tile, two laps, a chunk longer than the ring into an empty cache and into a wrapped one.
    "chunk": (160, 4, 40, [156, 156, 37, 37, 8, 130], [0, 127, 0, 90, 300, 255], [40, 40, 40, 39, 40, 0]),
    "chunk, no sinks": (160, 0, 40, [160, 37, 39, 40, 41], [150, 90, 200, 200, 200], [40, 40, 40, 40, 40]),
    "long chunk": (288, 4, 300, [284, 260, 37, 284, 284], [0, 500, 0, 3, 700], [300, 300, 299, 128, 0]),
    "full, token": (96, 0, 1, None, [0, 31, 32, 95, 50], [1, 1, 1, 1, 0]),
    "full, few tokens": (96, 0, 5, None, [0, 30, 91, 7, 50], [5, 5, 5, 1, 0]),
    "full, chunk": (288, 0, 40, None, [0, 100, 248, 127, 128, 50], [40, 40, 40, 1, 40, 0]),
    "full, long chunk": (416, 0, 300, None, [0, 116, 100, 5], [300, 300, 150, 0]),
}


def values(*shape, dtype, seed):
    """Random values of the type."""
    rng = np.random.default_rng([seed, *shape])
    if dtype == "int8":
        return rng.integers(-127, 128, shape, np.int8)
    return rng.standard_normal(shape).astype(ml_dtypes.float8_e4m3fn if dtype == "float8_e4m3fn" else jnp.dtype(dtype))


def poison(shape, dtype):
    return values(*shape, dtype=dtype, seed=99) if dtype == "int8" else np.full(shape, np.nan, jnp.dtype(dtype))


class History:
    """All tokens that a batch ever sees, and the expected group once each row has seen some of them."""

    def __init__(self, S, sinks, windows, total, H, dtype, compensation=True):
        self.shape, self.sinks, self.windows = (len(total), K, S, H), sinks, windows
        self.compensation = compensation and windows is not None
        shape = (len(total), K, max(total), H)
        self.k, self.v = (values(*shape, dtype=dtype, seed=seed) for seed in (1, 2))
        self.k_scale = self.v_scale = None
        if dtype == "int8":
            uniform = np.random.default_rng(3).uniform
            self.k_scale, self.v_scale = (uniform(0.01, 0.02, (*shape[:2], 1, shape[2])).astype("f") for _ in "kv")

    def tokens(self, starts, counts, T) -> GroupArrays:
        """Tokens [starts[b], starts[b] + counts[b]) of each row, poison up to T."""
        out = []
        for x in (self.k, self.v, self.k_scale, self.v_scale):
            if x is None:
                out.append(None)
                continue
            axis = 2 if x.shape[2] > 1 or x is self.k or x is self.v else 3
            shape = list(x.shape)
            shape[axis] = T
            chunk = np.moveaxis(poison(shape, x.dtype.name), axis, 2)
            for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
                chunk[b, :, :count] = np.moveaxis(x, axis, 2)[b, :, start : start + count]
            out.append(np.moveaxis(chunk, 2, axis))
        return GroupArrays(*out)

    def group(self, lengths, before: GroupArrays | None = None) -> GroupArrays:
        """The group after lengths[b] tokens of each row, appended to lists one by one; the rest as in `before`."""
        B, _, S, H = self.shape
        if before is None:
            scale = None if self.k_scale is None else poison((B, K, 1, S), "float32")
            mean = poison((B, K, 1, H), "float32") if self.compensation else None
            before = GroupArrays(*(poison(self.shape, self.k.dtype.name) for _ in "kv"), scale, scale, mean, mean)
        after = GroupArrays(*(None if x is None else np.array(x) for x in before))
        for b, h in np.ndindex(B, K):
            head = oracle.Head(self.sinks, self.windows and self.windows[b], dtype=np.float64)
            for position in range(lengths[b]):
                head.push(
                    *(self.real(x, s, b, h, position) for x, s in ((self.k, self.k_scale), (self.v, self.v_scale)))
                )
            for position, *_ in head.first + head.recent:
                slot = head.slot(position)
                after.k[b, h, slot], after.v[b, h, slot] = self.k[b, h, position], self.v[b, h, position]
                if self.k_scale is not None:
                    after.k_scale[b, h, 0, slot] = self.k_scale[b, h, 0, position]
                    after.v_scale[b, h, 0, slot] = self.v_scale[b, h, 0, position]
            if self.compensation and head.dropped:
                after.k_mean[b, h, 0], after.v_mean[b, h, 0] = head.means
        return after

    @staticmethod
    def real(x, scale, b, h, position):
        token = x[b, h, position].astype(np.float64)
        return token if scale is None else token * np.float64(scale[b, h, 0, position])


def same_bits(got, want):
    for name in ("k", "v", "k_scale", "v_scale"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8), err_msg=name)


def same_means(got, want, limit):
    for name in ("k_mean", "v_mean"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=name)  # NaN equals NaN alone


def arguments(case, dtype, H=128, compensation=True):
    """(group, tokens, lengths, counts, window, sinks) of a case, and the expected group."""
    S, sinks, T, windows, lengths, counts = case
    total = [a + b for a, b in zip(lengths, counts, strict=True)]
    history = History(S, sinks, windows, total, H, dtype, compensation)
    group = history.group(lengths)
    numbers = (np.array(lengths, np.int32), np.array(counts, np.int32))
    window = None if windows is None else np.array(windows, np.int32)
    new = history.tokens(lengths, counts, T)
    given = jax.tree.map(jnp.asarray, (group, new, *numbers, window))
    return (*given, sinks), history.group(total, before=group)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((n, "float32") for n in RAGGED), *((n, t) for n in ("token", "few tokens") for t in TYPES[1:])],
)
def test_reference_is_one_by_one_rolling(name, dtype):
    given, want = arguments(RAGGED[name], dtype, H=8)
    got = reference(*given)
    same_bits(got, want)
    same_means(got, want, 1e-5)


def kernel_is_the_reference(name, dtype, H):
    given, _ = arguments(RAGGED[name], dtype, H)
    got, want = kernel(*given, block=128), reference(*given)
    same_bits(got, want)
    same_means(got, want, 1e-6)


# Every case and every type once, with one of the head widths; the full product is slow.
QUICK = [
    *((name, "float32", 128 if i % 2 else 64) for i, name in enumerate(RAGGED)),
    *(("token", dtype, 128 if i % 2 else 64) for i, dtype in enumerate(TYPES[1:])),
    *(("few tokens", dtype, 64 if i % 2 else 128) for i, dtype in enumerate(TYPES[1:])),
]


@pytest.mark.parametrize(("name", "dtype", "H"), QUICK)
def test_kernel_is_the_reference(name, dtype, H):
    kernel_is_the_reference(name, dtype, H)


@pytest.mark.slow
@pytest.mark.parametrize("H", [128, 64])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", RAGGED)
def test_kernel_is_the_reference_everywhere(name, dtype, H):
    kernel_is_the_reference(name, dtype, H)


@settings(max_examples=15, deadline=None)
@given(st.data())
@pytest.mark.parametrize("T", [1, 40])
def test_any_lengths_counts_and_windows(T, data):
    """Kernel and lists agree for any lengths, counts and windows."""
    S, sinks, B = 160, 4, 3
    windows, lengths, counts = (
        data.draw(st.lists(st.integers(low, high), min_size=B, max_size=B), label=label)
        for label, low, high in (("window", 1, S - sinks), ("length", 0, 2 * S), ("count", 0, T))
    )
    given, want = arguments((S, sinks, T, windows, lengths, counts), "float32")
    got = kernel(*given, block=128)
    same_bits(got, want)
    same_means(got, want, 1e-5)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_full_group_takes_any_lengths_and_counts(data):
    S, T, B = 288, 40, 3
    lengths = data.draw(st.lists(st.integers(0, S - T), min_size=B, max_size=B), label="length")
    counts = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B), label="count")
    given, want = arguments((S, 0, T, None, lengths, counts), "float32")
    same_bits(kernel(*given, block=128), want)


def test_a_windowed_group_without_a_compensation_token():
    for name in ("token", "few tokens"):
        given, want = arguments(RAGGED[name], "int8", compensation=False)
        got = kernel(*given, block=128)
        same_bits(got, want)
        assert got.k_mean is None
        assert got.v_mean is None


@pytest.mark.parametrize("name", ["token", "chunk"])
def test_uninitialised_memory_stays_out(name):
    """In the detailed interpreter outputs and padding are NaN until written, and every access is checked."""
    S, *case = RAGGED[name]
    # If a block reaches past the end of an aliased array, this interpreter returns the padded array.
    given, want = arguments((256 if name == "chunk" else S, *case), "float32")
    run = by_arguments(functools.partial(tpu.write, interpret=pltpu.InterpretParams()))
    got = jax.jit(run, static_argnames="sinks")(*given)
    same_bits(got, want)
    same_means(got, want, 1e-5)


def test_a_row_without_a_window_yet_keeps_its_bits():
    """W is 0 until a row has its first tokens."""
    for T in (1, 5):
        given, want = arguments((96, 4, T, [50, 50], [0, 60], [0, T]), "float32")
        group, new, lengths, counts, window, sinks = given
        got = kernel(group, new, lengths, counts, window.at[0].set(0), sinks, block=128)
        same_bits(got, want)
        same_means(got, want, 1e-5)


def test_steps_visit_what_is_touched_and_load_what_survives():
    """In blocks of 128, slots [100, 400) of a row are blocks 0 to 3; blocks 1 and 2 need not be read."""
    lengths, counts = np.array([100, 0], np.int32), np.array([300, 0], np.int32)
    steps, longest = tpu._steps(tpu._runs(lengths, counts, None, 0, 512), 128, 5)
    assert longest == 4
    np.testing.assert_array_equal(steps.block[0], [0, 1, 2, 3, 3])
    np.testing.assert_array_equal(steps.read[0], [0, 0, 0, 3, 3])
    np.testing.assert_array_equal(steps.token[0, :4], [-100, 28, 156, 284])
    np.testing.assert_array_equal(steps.first[0, :4], [100, 0, 0, 0])
    np.testing.assert_array_equal(steps.last[0], [128, 128, 128, 16, 0])
    np.testing.assert_array_equal(steps.last[1], 0)


@pytest.mark.parametrize(
    ("H", "dtype", "reason"),
    [(96, "float32", "head width H=96"), (128, "float16", "cache is float16"), (64, "int8", None)],
)
def test_unsupported_groups_have_a_reason(H, dtype, reason):
    x = jax.ShapeDtypeStruct((1, 1, 32, H), dtype)
    said = tpu.unsupported(GroupArrays(x, x))
    assert said is reason is None or reason in said


def in_pages(group: GroupArrays, page: int):
    """Return the rows of a group as pools of shuffled pages, and their block table.

    The pools have two pages more than the rows: the last belongs to no row, the other is free.
    """
    B, pages = group.k.shape[0], group.k.shape[2] // page
    order = np.random.default_rng(5).permutation(B * pages + 1).astype(np.int32)
    table = order[: B * pages].reshape(B, pages)

    def pool(x, axis):
        if x is None:
            return None
        rows = np.moveaxis(np.asarray(x), axis, 2).reshape(B, K, pages, page, -1)
        out = poison((B * pages + 2, K, page, rows.shape[-1]), np.asarray(x).dtype.name)
        out[table] = rows.swapaxes(1, 2)
        return jnp.asarray(np.moveaxis(out, 2, axis))

    shape = (pool(group.k, 2), pool(group.v, 2), pool(group.k_scale, 3), pool(group.v_scale, 3))
    return GroupArrays(*shape, group.k_mean, group.v_mean), table


def paged_writes_are_those_of_rows(write, name, dtype, H, page):
    (group, *rest), _ = arguments(RAGGED[name], dtype, H)
    want, table = in_pages(reference(group, *rest), page)
    pools, _ = in_pages(group, page)
    # Entries that no token reaches name no page, and a row without tokens may have the pages of any other.
    lengths, counts, window, sinks = rest[1:]
    S = group.k.shape[2]
    last = np.minimum(np.asarray(lengths + counts), S if window is None else np.asarray(window) + sinks)
    given = np.where(np.arange(table.shape[1]) * page < last[:, None], table, 10**6)
    given[np.asarray(counts) == 0] = table[0]
    got = write(pools, *rest, jnp.asarray(given))
    same_bits(got, want)
    same_means(got, want, 1e-6)


def with_table(write):
    def run(group, tokens, lengths, counts, window, sinks, table):
        return write(CacheWrite(group, tokens, lengths, counts, window, sinks, table))

    return jax.jit(run, static_argnames="sinks")


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in RAGGED), ("token", "int8"), ("chunk", "int8")]
)
def test_pages_hold_what_rows_hold(name, dtype):
    paged_writes_are_those_of_rows(with_table(xla.write), name, dtype, H=8, page=16)


@pytest.mark.parametrize("H", [128, 64])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["token", "token, no sinks", "full, token"])
def test_the_kernel_writes_a_token_to_its_page(name, dtype, H):
    # A page is whole tiles, also where slots are on the lanes.
    (group, *given), _ = arguments((384, *RAGGED[name][1:]), dtype, H)
    want, table = in_pages(reference(group, *given), 128)
    pools, _ = in_pages(group, 128)
    got = with_table(functools.partial(tpu.write, interpret=True))(pools, *given, jnp.asarray(table))
    same_bits(got, want)
    same_means(got, want, 1e-6)
