"""Dense attention by others, for comparison in `benchmarks.attention`.

JAX peers are functions. Torch peers (SDPA, flash-attn, FlashInfer) run in their own process, before JAX takes the
device's memory. That process prints one JSON row per line:

    python -m benchmarks.attention_peers '{"shapes": [[8, 131072]], "heads": [8, 4, 128], "layers": 32, "repeats": 7}'

Every peer is first checked against a float64 softmax at a small size. B batch, K KV heads, G query heads per KV head,
H head width, S slots.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# bfloat16 against float64, max|a-b| / max|b|.
TOLERANCE = 8e-3


class Peer(NamedTuple):
    """A dense attention, `call(q [B,K,G,H], k, v, lengths) -> [B,K,G,H]`, with k and v in its own layout."""

    name: str
    call: Callable[..., Any]
    slots_first: bool  # k and v are [B,S,K,H], not [B,K,S,H]
    ragged: bool = True  # takes lengths; otherwise every row is full


def lengths_of(batch: int, context: int, ragged: bool) -> np.ndarray:
    """Return the lengths of the rows, int32 [B]: all full, or evenly from an eighth to full, ascending."""
    first = context // 8 if ragged else context
    return np.linspace(first, context, batch).astype(np.int32) if batch > 1 else np.full(1, context, np.int32)


def layers_that_fit(layer_bytes: int, most: int, memory: int) -> int:
    """Return how many dense layers to time, so that a copy of one layer and the rest of a run still fit."""
    return min(most, max(0, int(0.75 * memory) // layer_bytes - 1))


def softmax_oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return attention in float64, q [B,K,G,H] over slots [0, lengths[b]) of k, v [B,K,S,H]."""
    logits = np.einsum("bkgh,bksh->bkgs", q.astype(np.float64), k.astype(np.float64)) / np.sqrt(q.shape[-1])
    valid = np.arange(k.shape[2]) < lengths[:, None, None, None]
    weights = np.where(valid, np.exp(logits - logits.max(-1, keepdims=True)), 0.0)
    return np.einsum("bkgs,bksh->bkgh", weights / weights.sum(-1, keepdims=True), v.astype(np.float64))


def error_of(a: Any, b: Any) -> float:
    """Return max|a-b| / max|b|, computed in NumPy; NaN if any value is NaN."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.abs(a - b).max() / np.abs(b).max())


def small_case(heads: tuple[int, int, int], ragged: bool, slots: int = 2048) -> tuple[np.ndarray, ...]:
    """Return random q [2,K,G,H], k, v [2,K,S,H] and lengths for a check."""
    K, G, H = heads
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, K, *shape, H)).astype(np.float32) for shape in ((G,), (slots,), (slots,)))
    return q, k, v, lengths_of(2, slots, ragged)


# --- JAX


def _dot_product(implementation: str, packed: bool) -> Callable[..., jax.Array]:
    """Return a call of `jax.nn.dot_product_attention`.

    If `packed`, the query heads of a KV head are passed as tokens of one head, so that K and V are read once.
    """

    def call(q, k, v, lengths):
        B, K, G, H = q.shape
        rows = q.swapaxes(1, 2) if packed else q.reshape(B, 1, K * G, H)
        out = jax.nn.dot_product_attention(
            rows,
            k,
            v,
            key_value_seq_lengths=lengths,
            implementation=implementation,  # pyright: ignore[reportArgumentType]
        )
        return out.swapaxes(1, 2) if packed else out.reshape(q.shape)

    return call


def _pallas_gqa(q, k, v, lengths):
    from jax.experimental.pallas.ops.gpu import decode_attention

    B, K, G, H = q.shape
    return decode_attention.gqa(q.reshape(B, K * G, H), k, v, kv_seq_len=lengths).reshape(q.shape)


def _pallas_mqa(q, k, v, lengths):
    """Run the kernel under `gqa` in the layout that it wants, which avoids a transposed copy of the cache."""
    from jax.experimental.pallas.ops.gpu import decode_attention

    B, K, _, H = q.shape
    q_, k_, v_ = (x.reshape(B * K, -1, H) for x in (q, k, v))
    return decode_attention.mqa(q_, k_, v_, kv_seq_len=jnp.repeat(lengths, K), block_k=128).reshape(q.shape)


def jax_peers() -> tuple[Peer, ...]:
    """Return the dense peers that a JAX program can call; some run on NVIDIA GPUs only."""
    return (
        Peer("cuDNN", _dot_product("cudnn", packed=False), slots_first=True),
        Peer("cuDNN, heads packed", _dot_product("cudnn", packed=True), slots_first=True),
        Peer("jax.nn xla", _dot_product("xla", packed=False), slots_first=True),
        Peer("Pallas gqa of JAX", _pallas_gqa, slots_first=True),
        Peer("Pallas mqa of JAX, our layout", _pallas_mqa, slots_first=False),
    )


def check_jax(peer: Peer, heads: tuple[int, int, int]) -> float:
    """Return the peer's error on ragged lengths."""
    q, k, v, lengths = small_case(heads, ragged=True)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    want = softmax_oracle(*(np.asarray(x, np.float32) for x in (q, k, v)), lengths)
    if peer.slots_first:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return error_of(jax.jit(peer.call)(q, k, v, jnp.asarray(lengths)).astype(jnp.float32), want)


def cudnn_causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Run causal prefill in one call, q [B,T,N,H], k and v [B,T,K,H]."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def xla_causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Run the same without cuDNN, for runs at tiny sizes on other devices."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


# --- torch, in its own process


def torch_rows(request: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    """Run the torch peers of `request` in a process, and return the rows that it printed within `seconds`.

    A row has name, batch, context, ragged, layers, and either seconds per layer and error, or a note with the reason.
    """
    command = [sys.executable, "-m", "benchmarks.attention_peers", json.dumps(request)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code = subprocess.run(command, stdout=out, stderr=err, timeout=seconds).returncode
            failure = f"ended with code {code}" if code else ""
        except subprocess.TimeoutExpired:
            failure = f"stopped after {seconds:.0f} s"
        out.seek(0)
        err.seek(0)
        # A stopped process may leave an incomplete line.
        lines = [line for line in out if line.endswith("}\n")]
        last = (err.read().strip().splitlines() or [""])[-1]
    rows = [json.loads(line) for line in lines]
    return rows + ([{"name": "torch", "note": f"the process {failure}; {last}"[:300]}] if failure else [])


def main(request: dict[str, Any]) -> None:
    """Time every torch peer on every shape, and print each row when it is done."""

    def print_row(**row: Any) -> None:
        print(json.dumps(row), flush=True)

    if importlib.util.find_spec("torch") is None:
        print_row(name="torch", note="torch is not installed")
        return
    import torch

    device = request.get("device", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        print_row(name="torch", note=f"torch {torch.__version__} has no CUDA here")
        return
    memory = torch.cuda.mem_get_info()[0] if device == "cuda" else 2**30
    K, G, H = heads = tuple(request["heads"])
    for peer in _torch_peers(print_row):
        try:
            error = _check_torch(peer, heads, device)
        except Exception as problem:
            print_row(name=peer.name, note=f"failed: {_first_line(problem)}")
            continue
        if not error <= TOLERANCE:
            print_row(name=peer.name, error=error, note="refused: wrong result")
            continue
        for batch, context in request["shapes"]:
            layers = layers_that_fit(batch * context * K * 2 * H * 2, request["layers"], memory)
            for ragged in (False, True)[: 1 + (peer.ragged and batch > 1)]:
                row = {"name": peer.name, "batch": batch, "context": context, "ragged": ragged, "layers": layers}
                try:
                    if layers < 2:
                        raise MemoryError(f"two layers do not fit {memory / 2**30:.0f} GiB")
                    lengths = lengths_of(batch, context, ragged)
                    if device == "cuda":
                        torch.cuda.empty_cache()
                    total = _time_torch(peer, (batch, K, G, context, H), layers, lengths, request["repeats"], device)
                    print_row(**row, seconds=total / layers, error=error)
                except Exception as problem:
                    print_row(**row, note=f"failed: {_first_line(problem)}")


def _first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".strip().splitlines()[0][:200]


def _torch_peers(print_row: Callable[..., None]) -> Iterator[Peer]:
    """Yield the peers whose packages are installed, and print a row for the others."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def sdpa(backend: SDPBackend, packed: bool):
        def call(q, k, v, lengths):
            B, K, G, H = q.shape
            with sdpa_kernel(backend):
                if packed:
                    return scaled_dot_product_attention(q, k, v)
                return scaled_dot_product_attention(q.reshape(B, K * G, 1, H), k, v, enable_gqa=True).reshape(q.shape)

        return call

    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        yield Peer(f"torch SDPA {name}", sdpa(backend, packed=False), slots_first=False, ragged=False)
        yield Peer(f"torch SDPA {name}, heads packed", sdpa(backend, packed=True), slots_first=False, ragged=False)

    for module, make in (("flash_attn", _flash_attn), ("flashinfer", _flashinfer)):
        if importlib.util.find_spec(module) is None:
            print_row(name=module, note=f"{module} is not installed")
            continue
        try:
            yield make()
        except Exception as problem:
            print_row(name=module, note=f"cannot be imported: {_first_line(problem)}")


def _flash_attn() -> Peer:
    from flash_attn import flash_attn_with_kvcache  # pyright: ignore[reportMissingImports]

    def call(q, k, v, lengths):
        B, K, G, H = q.shape
        return flash_attn_with_kvcache(q.reshape(B, 1, K * G, H), k, v, cache_seqlens=lengths).reshape(q.shape)

    return Peer("flash-attn with KV cache", call, slots_first=True)


def _flashinfer(page: int = 16) -> Peer:
    """Return paged decode, planned once per set of lengths, as a server does for all layers of a step."""
    import flashinfer  # pyright: ignore[reportMissingImports]
    import torch

    plans: dict[int, Any] = {}

    def plan(q, k, lengths):
        B, K, G, H = q.shape
        pages = (lengths + page - 1) // page
        first = torch.arange(B, device=q.device) * (k.shape[1] // page)
        indices = torch.cat([f + torch.arange(int(n), device=q.device) for f, n in zip(first, pages, strict=True)])
        bounds = torch.cat([torch.zeros(1, device=q.device), pages.cumsum(0)])
        workspace = torch.empty(512 << 20, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        last = ((lengths - 1) % page + 1).int()
        types = {"q_data_type": q.dtype, "kv_data_type": k.dtype}
        wrapper.plan(bounds.int(), indices.int(), last, K * G, K, H, page, **types)
        return wrapper

    def call(q, k, v, lengths):
        if lengths.data_ptr() not in plans:
            plans.clear()
            plans[lengths.data_ptr()] = plan(q, k, lengths)
        B, K, G, H = q.shape
        pools = tuple(x.view(-1, page, K, H) for x in (k, v))
        return plans[lengths.data_ptr()].run(q.reshape(B, K * G, H), pools).reshape(q.shape)

    return Peer("FlashInfer paged", call, slots_first=True)


def _check_torch(peer: Peer, heads: tuple[int, int, int], device: str) -> float:
    import torch

    *arrays, lengths = small_case(heads, peer.ragged)
    q, k, v = (torch.tensor(x, dtype=torch.bfloat16, device=device) for x in arrays)
    want = softmax_oracle(*(x.float().cpu().numpy() for x in (q, k, v)), lengths)
    if peer.slots_first:
        k, v = (x.transpose(1, 2).contiguous() for x in (k, v))
    got = peer.call(q, k, v, torch.tensor(lengths, device=device))
    return error_of(got.float().cpu().numpy(), want)


def _time_torch(peer: Peer, shape: tuple[int, ...], layers: int, lengths, repeats: int, device: str) -> float:
    """Return the median seconds of all layers in sequence. Each query waits for the output of the layer before."""
    import torch

    B, K, G, S, H = shape
    on_gpu = device == "cuda"
    cache_shape = (B, S, K, H) if peer.slots_first else (B, K, S, H)

    def noise(size):
        return torch.empty(size, dtype=torch.bfloat16, device=device).uniform_(-1.7, 1.7)

    q, n = noise((B, K, G, H)), torch.tensor(lengths, device=device)
    caches = [(noise(cache_shape), noise(cache_shape)) for _ in range(layers)]

    def step():
        rows = q
        for k, v in caches:
            rows = q + peer.call(rows, k, v, n)
        return rows

    def wait():
        if on_gpu:
            torch.cuda.synchronize()

    with torch.inference_mode():
        for _ in range(2):
            step()
        run: Callable[[], Any] = step
        # A peer that cannot be captured is timed with its launches.
        with contextlib.suppress(RuntimeError):
            run = _captured(step) if on_gpu else step
        wait()
        started = time.perf_counter()
        run()
        wait()
        calls = max(1, min(100, int(0.05 / max(time.perf_counter() - started, 1e-6)))) if on_gpu else 1
        samples = []
        for _ in range(repeats):
            started = time.perf_counter()
            for _ in range(calls):
                run()
            wait()
            samples.append((time.perf_counter() - started) / calls)
    return statistics.median(samples)


def _captured(step: Callable[[], Any]) -> Callable[[], None]:
    """Return the step as one CUDA graph, which a server replays without time between launches."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
