"""Prefill and decode on the CPU beside transformers (torch, sdpa): same weights, same prompt, one run.

    python -m benchmarks.cpu [--context 4096 --context 16384] [--new-tokens 16]

A 100M-parameter random Llama (12 layers, 12 query and 4 KV heads, H = 64), float32. Each row runs in a process
of its own, so that its peak resident memory is its own. Writes benchmarks/results/cpu.json.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import typer

RESULTS = Path(__file__).parent / "results" / "cpu.json"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 32768,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
# 14 of 48 KV heads, 29 %: unevenly, layers with none and with all among them
RETRIEVAL = ((), (0,), (0, 1), (2,), (), (0, 1, 2, 3), (1,), (3,), (0, 2), (), (1,), (2,))
WINDOW = 1024


def make_checkpoint(folder: Path) -> None:
    """Write random weights to disk, which both sides read."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    model.save_pretrained(folder)


def run_transformers(folder: Path, context: int, new_tokens: int) -> dict:
    """Return one timed prompt and `new_tokens` greedy steps after a short warm-up."""
    import numpy as np
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    prompt = torch.tensor(np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (1, context)))
    with torch.inference_mode():
        model(prompt[:, :64], use_cache=True)
        started = time.perf_counter()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - started
        cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        steps = []
        for _ in range(new_tokens):
            started = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            steps.append(time.perf_counter() - started)
    # 2 (K and V) × layers × KV heads × width × 4 bytes
    kv_bytes = 2 * 12 * 4 * 64 * 4 * (context + new_tokens)
    return {"prefill_seconds": prefill, "decode_seconds": sum(steps) / len(steps), "kv_bytes": kv_bytes}


def run_razor(folder: Path, context: int, new_tokens: int, *, dense: bool) -> dict:
    """Return the same through `razor_jax.generate`; the second of two runs is timed."""
    import razor_jax
    from razor_jax.evals.bench import measure

    split = razor_jax.HeadSplit(RETRIEVAL, 4)
    params = razor_jax.load(folder, heads=split)
    policy = None if dense else razor_jax.RazorConfig.compact(window=WINDOW)
    speed = measure(params, policy, context=context, new_tokens=new_tokens, repeats=1)
    return {
        "prefill_seconds": speed.prefill_seconds,
        "decode_seconds": speed.decode_seconds,
        "compile_seconds": speed.compile_seconds,
        "kv_bytes": speed.kv.allocated_bytes,
        "kv": str(speed.kv),
    }


def worker(side: str, folder: Path, context: int, new_tokens: int) -> None:
    """Print one side's figures as JSON."""
    if side == "transformers":
        row = run_transformers(folder, context, new_tokens)
    else:
        row = run_razor(folder, context, new_tokens, dense=side == "dense")
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(row))


def machine() -> dict:
    """Return the machine that the figures were measured on."""
    import jax
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "date": date.today().isoformat(),
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": "python -m benchmarks.cpu",
    }


def main(context: list[int] = [4096, 16384], new_tokens: int = 16, side: str = "", folder: Path = Path()) -> None:  # noqa: B006
    """Compare transformers, our dense attention and Razor; `--side` and `--folder` are for the worker processes."""
    if side:
        worker(side, folder, context[0], new_tokens)
        return
    report = {"machine": machine(), "rows": []}
    with tempfile.TemporaryDirectory() as checkpoint:
        make_checkpoint(Path(checkpoint))
        for length in context:
            rows = {}
            for name in ("transformers", "dense", "razor"):
                command = [sys.executable, "-m", "benchmarks.cpu", "--side", name, "--folder", checkpoint]
                command += ["--context", str(length), "--new-tokens", str(new_tokens)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{name} at {length} failed:\n{done.stderr[-2000:]}")
                rows[name] = json.loads(done.stdout.strip().splitlines()[-1])
                report["rows"].append({"side": name, "context": length, **rows[name]})
                show(name, length, rows)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{report['machine']}\nwritten to {RESULTS}")


def show(name: str, context: int, rows: dict) -> None:
    """Print one line, with its ratios to transformers and to our dense attention."""
    row, peer = rows[name], rows["transformers"]
    prefill = peer["prefill_seconds"] / row["prefill_seconds"]
    decode = peer["decode_seconds"] / row["decode_seconds"]
    line = (
        f"{context:6d} {name:12s} prefill {context / row['prefill_seconds']:7.0f} tok/s ({prefill:4.2f}×)  "
        f"decode {1 / row['decode_seconds']:6.2f} tok/s ({decode:4.2f}×)  "
        f"KV {row['kv_bytes'] / 2**20:6.1f} MiB  peak {row['peak_mib']:6.0f} MiB"
    )
    if name == "razor":
        line += f"  decode {rows['dense']['decode_seconds'] / row['decode_seconds']:.2f}× our dense"
    if "compile_seconds" in row:
        line += f"  compile {row['compile_seconds']:.0f} s"
    print(line, flush=True)


if __name__ == "__main__":
    typer.run(main)
