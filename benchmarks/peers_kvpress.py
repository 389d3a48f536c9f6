"""NVIDIA kvpress on the same checkpoint through transformers, as systems that `razor_jax.evals.protocol.run` takes.

Token ids are ours (`protocol.encode_example`); compression and answering are kvpress' pipeline, batch 1, greedy. Seen
working with kvpress 0.5.5, transformers 5.2 (it pins < 5.3: presses read `cache_position`) and torch 2.13 on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import types
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from kvpress.presses import duo_attention_press

from razor_jax import Params
from razor_jax.evals.conversation import encode_conversation, skip_repeated_token
from razor_jax.evals.protocol import Example, QuestionFormat, encode_example
from razor_jax.evals.table import Answered
from razor_jax.needles.facts import load_documents
from razor_jax.params import weights_fingerprint
from razor_jax.text.result import KVReport

Kept = Callable[[int], float]  # tokens of a document -> tokens that a KV head may keep on average


class Host:
    """A checkpoint folder loaded by transformers, in the params' type, and what its caches hold."""

    def __init__(self, folder: Path, params: Params):
        self.params = params
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # sdpa: several presses refuse eager attention.
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, str(params.dtype)), attn_implementation="sdpa"
        )
        self.model = self.model.eval().to(device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.pipeline = kvpress.KVPressTextGenerationPipeline(model=self.model, tokenizer=tokenizer)

    def ask(self, document: Sequence[int], questions: Sequence[Sequence[int]], press: Any, options: QuestionFormat):
        """Return answers, and the compressed document's cache as (bytes in memory, bytes not masked), both as
        bfloat16.
        """
        cache = transformers.DynamicCache()
        ids = {"context_ids": torch.tensor([document]), "questions_ids": [torch.tensor([q]) for q in questions]}
        with torch.no_grad():
            answers = self.pipeline._forward(ids, max_new_tokens=options.max_new_tokens, press=press, cache=cache)
        return tuple(answers), self._sizes(cache)  # the pipeline has cut the answers off again

    def talk(self, document: Sequence[int], turns: Sequence[Sequence[int]], press: Any, options: QuestionFormat):
        """Ask as `ask`, but each turn follows the answers before it, which stay in the cache."""
        cache, position = transformers.DynamicCache(), len(document)
        answers, last = [], []
        with torch.no_grad():
            with contextlib.nullcontext() if press is None else press(self.model):
                self.model.model(input_ids=self._tensor(document), past_key_values=cache)
            sizes = self._sizes(cache)
            for turn in turns:
                said, spoken = [], last + skip_repeated_token(last, list(turn))
                while len(said) < options.max_new_tokens and not (said and said[-1] in self.ends):
                    # A press leaves fewer keys than positions: transformers cannot count them.
                    where = torch.arange(position, position + len(spoken), device=self.model.device)[None]
                    logits = self.model(self._tensor(spoken), position_ids=where, past_key_values=cache).logits
                    position += len(spoken)
                    said.append(int(logits[0, -1].argmax()))
                    spoken = last = said[-1:]
                answers.append(str(self.pipeline.tokenizer.decode(said, skip_special_tokens=True)))
        return tuple(answers), sizes

    @property
    def ends(self) -> set[int]:
        found = self.model.generation_config.eos_token_id
        return set(found) if isinstance(found, list) else {found}

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([ids], device=self.model.device)

    def _sizes(self, cache: transformers.DynamicCache) -> tuple[int, int]:
        numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        masked = sum(len(found[0]) for found in map(_masked, self.model.model.layers) if found is not None)
        return 2 * numbers, 2 * numbers - masked * 4 * self.params.config.head_dim


def _masked(layer: Any) -> tuple[torch.Tensor, ...] | None:
    return getattr(layer.self_attn, "masked_key_indices", None)


@dataclasses.dataclass(frozen=True)
class Press:
    """One of kvpress' methods, or dense attention (`make` None), at the bytes that `kept` allows.

    `make(tokens, kept)` gives the press for a document. Bytes count a masked key as dropped, as its bytes would be by
    an implementation that really drops it. A `conversation` is one growing cache for all questions of a document.
    """

    name: str
    host: Host
    kept: Kept
    make: Callable[[int, float], Any] | None
    conversation: bool = False

    def identity(self) -> dict[str, Any]:
        versions = {name: metadata.version(name) for name in ("kvpress", "transformers", "torch")}
        at = 1024  # tokens; the budget as a number
        press = None if self.make is None else repr(self.make(at, self.kept(at)))
        found = {"weights": weights_fingerprint(self.host.params), "press": press, "budget": self.kept(at), **versions}
        return {**found, "conversation": True} if self.conversation else found

    def answer(
        self, examples: Sequence[Example], todo: Sequence[int], options: QuestionFormat
    ) -> Iterator[tuple[int, Answered]]:
        """Yield one document at a time. Raises ValueError for what the pipeline cannot do: questions inside the
        prefill.
        """
        if options.question_inside_prefill or options.stop:
            raise ValueError("kvpress answers after the document was compressed, and knows no stop strings")
        read, put = (encode_conversation, self.host.talk) if self.conversation else (encode_example, self.host.ask)
        for index in todo:
            document, questions = read(self.host.params, examples[index], options.form)
            press = None if self.make is None else self.make(len(document), self.kept(len(document)))
            started = time.perf_counter()
            answers, sizes = put(document, questions, press, options)
            yield index, Answered(answers, self._report(len(document), *sizes), len(document), _since(started))

    def _report(self, tokens: int, in_memory: int, kept: int) -> KVReport:
        c = self.host.params.config
        token = c.num_layers * c.num_kv_heads * 4 * c.head_dim
        what = "dense" if self.make is None else "evicts" if in_memory == kept else f"masks; holds {in_memory:,} bytes"
        return KVReport(
            setting=what,
            share=1.0 if self.make is None else 0.0,
            batch=1,
            capacity=tokens,
            dtype=f"{self.host.params.dtype}, counted as bfloat16",
            allocated_bytes=kept,
            dense_bytes=tokens * token,
            dropped_tokens=(tokens - kept // token,),
            implementation="transformers",
        )


def presses(host: Host, kept: Kept, conversation: bool) -> list[Press]:
    """Return dense attention, and every method that runs on a CPU without training or statistics of its own."""

    def at(press: type, **options: Any) -> Callable[[int, float], Any]:
        return lambda tokens, kept: press(compression_ratio=_ratio(tokens, kept), **options)

    def ada(tokens: int, kept: float) -> Any:
        scorer = kvpress.ExpectedAttentionPress(compression_ratio=_ratio(tokens, kept), epsilon=1e-2)
        return kvpress.AdaKVPress(press=scorer)

    found: dict[str, Callable[[int, float], Any] | None] = {
        "dense (transformers)": None,
        "KVzip": at(kvpress.KVzipPress),
        "KVzip, equal layers": at(kvpress.KVzipPress, layerwise=True),
        "AdaKV ExpectedAttention": ada,
        "ExpectedAttention": at(kvpress.ExpectedAttentionPress),
        "SnapKV": at(kvpress.SnapKVPress),
        "TOVA": at(kvpress.TOVAPress),
        "KeyDiff": at(kvpress.KeyDiffPress),
        "Knorm": at(kvpress.KnormPress),
        "StreamingLLM (kvpress)": at(kvpress.StreamingLLMPress),
        "DuoAttention on the fly": _duo(host),
    }
    return [Press(name, host, kept, make, conversation) for name, make in found.items()]


def _ratio(tokens: int, kept: float) -> float:
    """Return the compression ratio that leaves at least `kept` tokens, so a peer never holds fewer bytes."""
    return max(0.0, 1 - (math.ceil(kept) + 0.5) / tokens)


def _duo(host: Host) -> Callable[[int, float], Any]:
    """Return its sinks (128) and recent window (256) are fixed: the share of streaming heads makes the bytes. Its heads
    are scored on BookSum, which is not at hand: here on the training split's text.
    """
    texts = [text[:4000] for text in (d.text for d in load_documents("train")) if len(text) > 2000]

    class Rows:
        def to_pandas(self) -> Any:
            return self

        def sample(self, count: int, random_state: int) -> dict[str, Any]:
            chosen = [texts[i % len(texts)] for i in range(count)]
            return {"chapter": types.SimpleNamespace(tolist=lambda: chosen)}

    duo_attention_press.load_dataset = lambda *_, **__: Rows()
    config = host.params.config
    heads = config.num_layers * config.num_kv_heads

    def make(tokens: int, kept: float) -> Any:
        streaming = (1 - kept / tokens) / (1 - 384 / tokens) if tokens > 384 else 0.0
        share = min(heads, math.floor(heads * streaming)) / heads
        return kvpress.DuoAttentionPress(head_compression_ratio=share, on_the_fly_scoring=True)

    return make


def _since(started: float) -> float:
    return time.perf_counter() - started
