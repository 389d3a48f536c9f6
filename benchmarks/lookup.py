"""Prompt-lookup decoding beside plain decoding, in the same run: tokens per call of the model, and speed.

    python -m benchmarks.lookup [--model smollm2] [--draft 8] [--questions 4] [--out FILE]

*quote* asks for a paragraph of the prompt word for word, *fact* for a planted fact, *free* for a text that the prompt
does not have. Plain and lookup answer the same question in turn, so load on the machine meets both. Decoding is timed
after the first token and without compilation, by the clock and in CPU time. `copied` is the share of the answers'
tokens that end four tokens of their prompt, `equal` whether all answers have the same tokens.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from tokenizers import Tokenizer

import razor_jax
from razor_jax import Params
from razor_jax.evals.provenance import provenance, write_json
from razor_jax.needles.facts import needle_document
from razor_jax.needles.text import load_documents
from razor_jax.text.session import Session

CAPACITY = 2048
RESULTS = Path(__file__).parent / "results"
PREDICTION = (
    "written before the first run: SmolLM2 quotes at 4.5 tokens per call and 2.5 times the speed of plain decoding, "
    "razor-mini answers facts at 2 tokens per call and 1.3 times the speed; free text runs at 1.1 tokens per call and "
    "0.9 times the speed, because one-token matches draft often and rarely hold"
)
SUBJECTS = ("the sea", "a good breakfast", "how rain forms", "an old bridge", "learning to cook", "a walk in winter")


@dataclasses.dataclass
class Side:
    """What one way of decoding took for all questions of a kind, after the first token of each answer."""

    tokens: int = 0
    calls: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def quotes(params: Params, count: int, tokens: int) -> list[Any]:
    """Return messages that ask for a paragraph of held-out prose word for word."""
    assert params.assets is not None
    prose = [p for d in load_documents("held_out") for p in d.paragraphs if 150 < len(p) < 400]
    found = []
    for index in range(count):
        rng = np.random.default_rng([7, index])
        lines: list[str] = []
        while sum(len(params.assets.encode(line, add_special=False)) for line in lines) < tokens:
            lines.append(prose[int(rng.integers(len(prose)))])
        start = " ".join(lines[int(rng.integers(len(lines)))].split()[:6])
        ask = f'Copy the paragraph that begins with "{start}" word for word.'
        found.append([{"role": "user", "content": "\n".join(lines) + f"\n\n{ask}"}])
    return found


def facts(params: Params, count: int, tokens: int) -> list[Any]:
    """Return messages that ask for a fact planted in held-out prose."""
    assert params.assets is not None
    assert params.assets.tokenizer_json is not None
    tokenizer = Tokenizer.from_str(params.assets.tokenizer_json)
    found = []
    for index in range(count):
        rng = np.random.default_rng([8, index])
        document = needle_document(rng, tokenizer, tokens=tokens, facts=4)
        question = document.facts[0].question
        found.append([{"role": "system", "content": document.text}, {"role": "user", "content": question}])
    return found


def free(params: Params, count: int, tokens: int) -> list[Any]:
    """Return messages that ask for a text of the model's own."""
    return [f"Write a short essay about {SUBJECTS[i % len(SUBJECTS)]}." for i in range(count)]


KINDS = {"quote": quotes, "fact": facts, "free": free}


def answer(params: Params, prompt: Any, draft: int | None, new_tokens: int, side: Side) -> list[int]:
    """Answer a question, add what decoding took to `side`, and return the tokens of prompt and answer."""
    # One capacity: no other question compiles anything.
    session = Session(params, prompt, max_new_tokens=new_tokens, draft=draft, capacity=CAPACITY)
    blocks = session.run()
    next(blocks)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in blocks:
        pass
    side.seconds += time.perf_counter() - wall
    side.cpu_seconds += time.process_time() - cpu
    new = len(session.rows[0].tokens) - 1
    side.tokens += new
    side.calls += new if session.text is None else int(session.text.calls)
    return [*session.prompts.rows[0], *session.rows[0].tokens]


def copied(text: list[int], prompt: int) -> int:
    """Return how many tokens after the first `prompt` end four tokens that the prompt has."""
    known = {tuple(text[i : i + 4]) for i in range(prompt - 3)}
    return sum(tuple(text[i - 3 : i + 1]) in known for i in range(prompt + 1, len(text)))


def compare(params: Params, prompts: Sequence[Any], draft: int, new_tokens: int) -> dict[str, Any]:
    """Return tokens per call with drafts, and the speed over that of plain decoding."""
    plain, lookup, equal, quoted = Side(), Side(), True, 0
    for warm_up in (None, draft):
        answer(params, prompts[0], warm_up, new_tokens, Side())
    for prompt in prompts:
        tokens = plain.tokens
        text = answer(params, prompt, None, new_tokens, plain)
        quoted += copied(text, len(text) - 1 - (plain.tokens - tokens))
        equal &= answer(params, prompt, draft, new_tokens, lookup) == text
    return {
        "draft": draft,
        "questions": len(prompts),
        "tokens": lookup.tokens,
        "copied": quoted / plain.tokens,
        "tokens_per_call": lookup.tokens / lookup.calls,
        "plain_tokens_per_second": plain.tokens / plain.seconds,
        "tokens_per_second": lookup.tokens / lookup.seconds,
        "speedup": plain.seconds / plain.tokens * lookup.tokens / lookup.seconds,
        "speedup_in_cpu_time": plain.cpu_seconds / plain.tokens * lookup.tokens / lookup.cpu_seconds,
        "equal": equal,
    }


def main(
    model: str = "razor-mini",
    kind: Annotated[list[str] | None, typer.Option(help="quote, fact, free; all by default.")] = None,
    draft: int = 8,
    questions: int = 4,
    tokens: int = 400,
    new_tokens: int = 96,
    note: str = "",
    out: Path | None = None,
) -> None:
    """Measure and write benchmarks/results/lookup-MODEL.json."""
    params = razor_jax.load(model, dtype="float32")
    rows = []
    for name in kind or list(KINDS):
        row = {"kind": name, **compare(params, KINDS[name](params, questions, tokens), draft, new_tokens)}
        rows.append(row)
        print(
            f"{name:6s} {row['copied']:.0%} copied, {row['tokens_per_call']:.2f} tokens per call, "
            f"{row['tokens_per_second']:.1f} tokens/s, {row['speedup']:.2f}× plain "
            f"({row['speedup_in_cpu_time']:.2f}× in CPU time), equal: {row['equal']}",
            flush=True,
        )
        # After each kind: a run that is cut short keeps what it measured.
        content = {"provenance": provenance(params, model), "note": note, "prediction": PREDICTION, "rows": rows}
        write_json(out or RESULTS / f"lookup-{Path(model).stem.lower()}.json", content)


if __name__ == "__main__":
    typer.run(main)
