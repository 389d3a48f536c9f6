"""Seconds from the shell to a short answer, with empty and with warm caches, beside transformers in the same run.

    python -m benchmarks.first_answer [--model smollm2] [--tokens 12] [--out FILE]

Each figure is a process of its own. *cold* has an empty cache folder: heads and compiled programs are found again.
*other sampler* and *other stop string* follow the warm run and show what a change of options compiles.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from razor_jax.checkpoint.hub import find
from razor_jax.evals.bench import machine
from razor_jax.evals.provenance import write_json

PROMPT = "Who wrote the play Hamlet?"
RUNS = {
    "cold": (),
    "warm": (),
    "warm again": (),
    "other stop string": ("--stop", "zzz"),
    "other temperature": ("--temperature", "0.7"),
    "other top-p": ("--temperature", "0.7", "--top-p", "0.9"),
}
TRANSFORMERS = """
import sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(2)
folder, file, prompt, tokens = sys.argv[1], sys.argv[2] or None, sys.argv[3], int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
print(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def main(
    model: str = "smollm2",
    tokens: Annotated[int, typer.Option(help="Tokens of the answer.")] = 12,
    out: Annotated[Path | None, typer.Option(help="JSON of the rows.")] = None,
) -> None:
    """Time the program from start to end, and print a ratio to transformers."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as caches:
        environment = {**os.environ, "XDG_CACHE_HOME": caches}
        for name, options in RUNS.items():
            command = [sys.executable, "-c", "from razor_jax.cli.app import main; main()", "generate", "-m", model]
            command += ["-p", PROMPT, "--max-new-tokens", str(tokens), "--json", *options]
            seconds, said = _run(command, environment)
            timings = json.loads(said)["results"][0]["timings"]
            rows.append({"run": name, "seconds": seconds, "compiling": round(timings["compile_seconds"], 2)})
            print(f"{name:18s} {seconds:6.1f} s ({timings['compile_seconds']:.1f} s of it compiling)", flush=True)
    path = find(model)
    folder, file = (path.parent, path.name) if path.is_file() else (path, "")
    peer, _ = _run([sys.executable, "-c", TRANSFORMERS, str(folder), file, PROMPT, str(tokens)], dict(os.environ))
    rows.append({"run": "transformers", "seconds": peer})
    print(f"{'transformers':18s} {peer:6.1f} s")
    cold, warm = (next(row["seconds"] for row in rows if row["run"] == name) for name in ("cold", "warm again"))
    print(f"cold {cold / peer:.2f}×, warm {warm / peer:.2f}× the time of transformers; {machine()}")
    if out is not None:
        write_json(out, {"model": model, "prompt": PROMPT, "tokens": tokens, "machine": machine(), "rows": rows})


def _run(command: list[str], environment: dict[str, str]) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return round(time.perf_counter() - start, 2), done.stdout


if __name__ == "__main__":
    typer.run(main)
