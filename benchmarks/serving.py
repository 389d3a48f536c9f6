"""Load of a server: Poisson arrivals, mixed lengths, clients that leave; dense against Razor at equal KV bytes.

    python benchmarks/serving.py --requests 60 --rate 2 --lengths 256 1024 3072 --cache-mib 24
    python benchmarks/serving.py --url http://127.0.0.1:8000 --name other --rate 2       # any OpenAI-compatible peer
    python benchmarks/serving.py --soak-seconds 600 --streams 1000

Without --url it starts `razor-jax serve` twice, with and without --dense, the same requests on each. Prints one JSON
document: per server, throughput, time to first token, gap between pieces of an answer (p50, p99), answers by how they
ended, and the server's own counters at the end. A soak reports memory of the server at its start and end as well.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import psutil

PREDICTION = (
    "written before the first run: with the bytes of three dense answers of full length, Razor holds eight at once; "
    "two cores decode eight rows for little more than three, so Razor answers 1.4 times as many tokens per second with "
    "razor-mini and 1.3 times with SmolLM2, and its median first token comes in a third of dense's time; the longest "
    "gap between two tokens is the same"
)
# One token each in most vocabularies.
WORDS = ("time", "people", "water", "house", "light", "story", "river", "music", "world", "night", "paper", "garden")


class Record:
    """Times of one request."""

    def __init__(self, length: int, tokens: int, leaves_after: int | None):
        self.length, self.tokens, self.leaves_after = length, tokens, leaves_after
        self.begin = self.end = 0.0
        self.times: list[float] = []  # of the pieces of the answer
        self.received = 0
        self.outcome = "unfinished"


def plan(arguments: argparse.Namespace) -> list[Record]:
    """Return the requests; the same for every server."""
    dice = random.Random(arguments.seed)
    records = []
    for _ in range(arguments.requests):
        tokens = dice.randint(*arguments.tokens)
        leaves = dice.randint(0, tokens - 1) if dice.random() < arguments.cancels else None
        records.append(Record(dice.choice(arguments.lengths), tokens, leaves))
    return records


async def ask(client: httpx.AsyncClient, model: str, record: Record, seed: int, words: bool = False) -> None:
    """Stream one answer, or leave after some of its tokens. The prompt is token ids, or `words`."""
    dice = random.Random(seed)
    body = {"model": model, "max_tokens": record.tokens, "stream": True, "temperature": 0}
    if words:
        body["prompt"] = " ".join(dice.choices(WORDS, k=record.length))
    else:
        body["prompt"] = [dice.randint(10, 2000) for _ in range(record.length)]
        # Every token ends a piece of the stream, also one without text.
        body["logprobs"] = 0
    record.begin = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                record.outcome = f"http {response.status_code}"
                return
            await _read(response, record)
    except httpx.HTTPError as error:
        record.outcome = type(error).__name__
    finally:
        record.end = time.perf_counter()


async def _read(response: httpx.Response, record: Record) -> None:
    async for line in response.aiter_lines():
        if record.leaves_after is not None and record.received >= record.leaves_after:
            record.outcome = "left"
            return
        if line == "data: [DONE]":
            return
        if not line.startswith("data: "):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            record.outcome = "error"
            return
        choice = event["choices"][0]
        if choice.get("finish_reason"):
            record.outcome = choice["finish_reason"]
        tokens = len((choice.get("logprobs") or {}).get("tokens") or ()) or bool(choice.get("text"))
        if tokens:
            record.times.append(time.perf_counter())
            record.received += tokens


async def load(
    url: str, model: str, records: Sequence[Record], rate: float, seed: int, words: bool = False
) -> dict[str, Any]:
    """Send requests at Poisson arrivals and return the figures."""
    dice = random.Random(seed + 1)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as client:
        begin, tasks = time.perf_counter(), []
        for index, record in enumerate(records):
            tasks.append(asyncio.create_task(ask(client, model, record, seed + index, words)))
            await asyncio.sleep(dice.expovariate(rate))
        await asyncio.gather(*tasks)
        return figures(records, time.perf_counter() - begin, words)


def figures(records: Sequence[Record], seconds: float, words: bool = False) -> dict[str, Any]:
    """Return throughput and latencies of finished requests. Answers to `words` come without a count of tokens."""
    finished = [record for record in records if record.outcome in ("stop", "length")]
    first = [record.times[0] - record.begin for record in finished if record.times]
    gaps = [later - sooner for record in finished for sooner, later in itertools.pairwise(record.times)]
    outcomes = [record.outcome for record in records]
    return {
        "seconds": round(seconds, 2),
        "requests": len(records),
        "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))},
        f"{'pieces' if words else 'tokens'}_per_second": round(sum(record.received for record in records) / seconds, 1),
        "first_token_seconds": quantiles(first),
        "gap_seconds": quantiles(gaps),
        "longest_gap_seconds": round(max(gaps, default=0.0), 4),
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50 and p99."""
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 4), "p99": round(cuts[98], 4)}


async def soak(url: str, model: str, arguments: argparse.Namespace, pid: int | None) -> dict[str, Any]:
    """Hold many streams for a time, with clients that leave, and return what was lost and how memory grew."""
    stop_at = time.monotonic() + arguments.soak_seconds
    outcomes: dict[str, int] = {}
    memory = [_memory(pid)]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)

    async def stream(client: httpx.AsyncClient, number: int) -> None:
        dice = random.Random(arguments.seed + number)
        while time.monotonic() < stop_at:
            tokens = dice.randint(*arguments.tokens)
            leaves = dice.randint(0, tokens - 1) if dice.random() < arguments.cancels else None
            record = Record(dice.choice(arguments.lengths), tokens, leaves)
            await ask(client, model, record, dice.randrange(2**30))
            outcomes[record.outcome] = outcomes.get(record.outcome, 0) + 1

    async def watch() -> None:
        while time.monotonic() < stop_at:
            await asyncio.sleep(min(10.0, arguments.soak_seconds / 4))
            memory.append(_memory(pid))

    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as client:
        begin = time.perf_counter()
        await asyncio.gather(watch(), *(stream(client, number) for number in range(arguments.streams)))
    return {
        "seconds": round(time.perf_counter() - begin, 1),
        "streams": arguments.streams,
        "requests": sum(outcomes.values()),
        "outcomes": dict(sorted(outcomes.items())),
        "server_mib": memory,
    }


def _memory(pid: int | None) -> float | None:
    return None if pid is None else round(psutil.Process(pid).memory_info().rss / 2**20, 1)


async def counters(url: str) -> dict[str, float]:
    """Return counters of a razor_jax server once it is idle; {} of another server."""
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        for _ in range(600):
            response = await client.get("/metrics")
            found = dict(re.findall(r"^razor_jax:(\w+)\{model_name=\"[^\"]*\"\} (\S+)$", response.text, re.MULTILINE))
            values = {name: float(value) for name, value in found.items() if "_bucket" not in name}
            if not values.get("num_requests_running") and not values.get("num_requests_waiting"):
                break
            await asyncio.sleep(0.1)
    names = ("compilations_total", "kv_cache_usage_perc", "kv_cache_bytes", "generation_tokens_total", "ticks_total")
    return {name: values[name] for name in names if name in values}


@contextlib.asynccontextmanager
async def served(arguments: argparse.Namespace, dense: bool) -> AsyncIterator[tuple[str, int]]:
    """Start `razor-jax serve` and yield its address and process id once it is ready."""
    command = [sys.executable, "-c", "from razor_jax.cli import main; main()", "serve", "--port", "0"]
    command += [
        "--model",
        arguments.model,
        "--dtype",
        arguments.dtype,
        "--served-name",
        arguments.name,
        "--slots",
        str(arguments.slots),
    ]
    command += ["--max-model-len", str(max(arguments.lengths) + arguments.tokens[1])]
    command += ["--cache-gib", str(arguments.cache_mib / 1024)] if arguments.cache_mib else []
    command += ["--request-seconds", "100000", *(["--dense"] if dense else [])]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = next(match[1] for line in process.stderr if (match := re.search(r"listening on (http://\S+);", line)))
        # Log lines must not fill the pipe.
        reader = asyncio.create_task(asyncio.to_thread(process.stderr.read))
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
            while (await client.get("/ready")).status_code != 200:
                if process.poll() is not None:
                    raise SystemExit("the server ended before it was ready")
                await asyncio.sleep(0.5)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    await reader


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of each server."""
    results: dict[str, Any] = {}
    words = arguments.words

    async def one(name: str, url: str, pid: int | None) -> None:
        if arguments.soak_seconds:
            results[name] = await soak(url, arguments.name, arguments, pid)
        else:
            # A first request pays for what a server does once.
            await load(url, arguments.name, [Record(min(arguments.lengths), 4, None)], 1.0, arguments.seed, words)
            results[name] = await load(url, arguments.name, plan(arguments), arguments.rate, arguments.seed, words)
        results[name]["counters"] = await counters(url)

    if arguments.url:
        await one(arguments.name, arguments.url, None)
        return results
    for dense in (False,) if arguments.soak_seconds else (False, True):
        async with served(arguments, dense) as (url, pid):
            await one("dense" if dense else "razor", url, pid)
    return results


def main() -> None:
    """Run the benchmark and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="measure a server that runs, instead of starting razor-jax")
    parser.add_argument("--name", default="benchmark", help="name of the model for the server")
    parser.add_argument("--model", default="razor-mini")
    parser.add_argument("--dtype", default="auto", help="type of the weights and the cache")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--cache-mib", type=float, help="KV cache of each server; default: all slots at full length")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rate", type=float, default=2.0, help="arrivals per second")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024], help="prompt tokens, drawn evenly")
    parser.add_argument("--words", action="store_true", help="prompts are words, for servers that take no token ids")
    parser.add_argument("--tokens", type=int, nargs=2, default=[8, 64], help="fewest and most new tokens")
    parser.add_argument("--cancels", type=float, default=0.1, help="share of clients that leave")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--soak-seconds", type=float, default=0.0, help="hold --streams at once for this time instead")
    parser.add_argument("--streams", type=int, default=1000)
    arguments = parser.parse_args()
    results = asyncio.run(measure(arguments))
    setting = {name: value for name, value in vars(arguments).items() if value is not None}
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "load_average": round(os.getloadavg()[0], 1)}
    print(json.dumps({"prediction": PREDICTION, "setting": setting, "machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
