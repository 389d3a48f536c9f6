"""Prefill and decode on the CPU beside transformers (torch, sdpa) and llama.cpp: same float32 weights, one run.

Two more rows are Razor with narrower weights: bfloat16 (and such a cache), and int8 (and a float32 cache).

    python -m benchmarks.cpu [--model smollm2] [--context 2048 --context 8000] [--new-tokens 32] [--out FILE]

`--model` is a GGUF file, or the name of a packaged one. Its tensors are dequantised to float32 once, into a GGUF file
that all sides read. Each row runs in a process of its own, so that its peak resident memory is its own; the sides take
turns at every context. llama.cpp is left out, with a line that says so, where `llama-cpp-python` is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from razor_jax.checkpoint.hub import find
from razor_jax.evals.bench import machine
from razor_jax.evals.provenance import write_json

RESULTS = Path(__file__).parent / "results" / "cpu.json"
THREADS = os.cpu_count() or 1
PEERS = ("transformers", "llama.cpp")
NARROW = {"razor bfloat16": {"dtype": "bfloat16"}, "razor int8": {"dtype": "float32", "weights": "int8"}}


def write_float32(source: Path, target: Path) -> None:
    """Write a GGUF file again with every tensor in float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        # The writer sets these itself.
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prompt(vocabulary: int, context: int) -> list[int]:
    """Return the tokens that every side reads."""
    return np.random.default_rng(0).integers(0, vocabulary, context).tolist()


def run_transformers(file: Path, context: int, new_tokens: int) -> dict:
    """Return one timed prompt and `new_tokens` greedy steps after a short warm-up."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, attn_implementation="sdpa", dtype=torch.float32
    )
    tokens = torch.tensor([prompt(model.config.vocab_size, context)])
    with torch.inference_mode():
        model(tokens[:, :64], use_cache=True)
        started = time.perf_counter()
        out = model(tokens, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - started
        cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        steps = []
        for _ in range(new_tokens):
            started = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            steps.append(time.perf_counter() - started)
    layers = [layer for layer in cache.layers if layer.keys is not None]
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return {"prefill_seconds": prefill, "decode_seconds": sum(steps) / len(steps), "kv_bytes": kv_bytes}


def run_llama_cpp(file: Path, context: int, new_tokens: int) -> dict:
    """Return the same through llama-cpp-python with a float32 cache."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(file),
        n_ctx=context + new_tokens + 8,
        n_threads=THREADS,
        n_threads_batch=THREADS,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    tokens = prompt(model.n_vocab(), context)
    model.eval(tokens[:64])
    model.reset()
    started = time.perf_counter()
    model.eval(tokens)
    prefill = time.perf_counter() - started
    steps = []
    for _ in range(new_tokens):
        started = time.perf_counter()
        model.eval([model.sample(temp=0.0)])
        steps.append(time.perf_counter() - started)
    described = {key.split(".", 1)[-1]: value for key, value in model.metadata.items()}
    heads, width = int(described["attention.head_count_kv"]), int(described["embedding_length"])
    width //= int(described["attention.head_count"])
    # 2 (K and V) × layers × KV heads × width × 4 bytes
    kv_bytes = 2 * int(described["block_count"]) * heads * width * 4 * model.n_ctx()
    return {"prefill_seconds": prefill, "decode_seconds": sum(steps) / len(steps), "kv_bytes": kv_bytes}


def run_razor(model: str, context: int, new_tokens: int, *, dense: bool, **kind: str) -> dict:
    """Return the same through `razor_jax.generate`; the second of two runs is timed."""
    import razor_jax
    from razor_jax.evals.bench import measure

    # By its name: the packaged heads are found by the weights of the original file.
    params = razor_jax.load(model, **(kind or {"dtype": "float32"}))
    policy = None if dense else params.razor or razor_jax.RazorConfig()
    speed = measure(params, policy, context=context, new_tokens=new_tokens, repeats=1)
    return {
        "prefill_seconds": speed.prefill_seconds,
        "decode_seconds": speed.decode_seconds,
        "compile_seconds": speed.compile_seconds,
        "kv_bytes": speed.kv.allocated_bytes,
        "kv": str(speed.kv),
    }


def worker(side: str, model: str, file: Path, context: int, new_tokens: int) -> None:
    """Print one side's figures as JSON."""
    if side in PEERS:
        run = run_transformers if side == "transformers" else run_llama_cpp
        row = run(file, context, new_tokens)
    else:
        row = run_razor(model, context, new_tokens, dense=side == "dense", **NARROW.get(side, {}))
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(row))


def main(
    model: str = "smollm2",
    context: Annotated[list[int] | None, typer.Option(help="Prompt tokens; 2,048 and 8,000 by default.")] = None,
    new_tokens: int = 32,
    out: Annotated[Path, typer.Option(help="JSON of the rows.")] = RESULTS,
    side: Annotated[str, typer.Option(hidden=True)] = "",
    file: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Compare transformers, llama.cpp, our dense attention and Razor, also with narrow weights."""
    context = context or [2048, 8000]
    if side:
        worker(side, model, file, context[0], new_tokens)
        return
    sides = ["transformers", "llama.cpp", "dense", "razor", *NARROW]
    if importlib.util.find_spec("llama_cpp") is None:
        sides.remove("llama.cpp")
        print("llama.cpp is left out: llama-cpp-python is not installed")
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model-f32.gguf"
        write_float32(find(model), weights)
        for length in context:
            found = {}
            for name in sides:
                found[name] = _run(name, model, weights, length, new_tokens)
                rows.append({"side": name, "context": length, **found[name]})
                show(name, length, found)
    write_json(out, {"command": "python -m benchmarks.cpu", "model": model, "machine": versions(), "rows": rows})
    print(f"\n{versions()}\nwritten to {out}")


def _run(name: str, model: str, weights: Path, context: int, new_tokens: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.cpu", "--side", name, "--model", model, "--file", str(weights)]
    command += ["--context", str(context), "--new-tokens", str(new_tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} at {context} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def versions() -> dict[str, str]:
    """Return the machine and the versions of the peers."""
    from importlib.metadata import version

    peers = ("torch", "transformers", "llama-cpp-python")
    installed = [name for name in peers if importlib.util.find_spec(name.replace("-python", "").replace("-", "_"))]
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    today = time.strftime("%Y-%m-%d")
    return {**machine(), "cpu": cpu, "date": today} | {name: version(name) for name in installed}


def show(name: str, context: int, rows: dict) -> None:
    """Print one line, with its ratios to the peers and to our dense attention."""
    row = rows[name]

    def over(other: str, phase: str) -> str:
        return f"{rows[other][phase] / row[phase]:.2f}× {other}"

    others = [peer for peer in PEERS if peer in rows and peer != name and name not in PEERS]
    prefill = ", ".join(over(peer, "prefill_seconds") for peer in others)
    ours = ["dense"] if name.startswith("razor") else []
    decode = ", ".join(over(peer, "decode_seconds") for peer in [*others, *ours])
    line = f"{context:6d} {name:14s} prefill {context / row['prefill_seconds']:6.0f} tok/s"
    line += f" ({prefill})" * bool(prefill) + f"  decode {1 / row['decode_seconds']:6.2f} tok/s"
    line += f" ({decode})" * bool(decode) + f"  KV {row['kv_bytes'] / 2**20:6.1f} MiB  peak {row['peak_mib']:6.0f} MiB"
    if "compile_seconds" in row:
        line += f"  compile {row['compile_seconds']:.0f} s"
    print(line, flush=True)


if __name__ == "__main__":
    typer.run(main)
