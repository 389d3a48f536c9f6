"""EleutherAI's lm-evaluation-harness on a compressed cache.

The harness (0.4.13) looks `--model` up in a table that installed packages cannot extend. Importing this module adds
`razor_jax` to it, so this command runs the harness's command line with all its options:

    razor-jax eval harness --model_args pretrained=FOLDER,window=4096 --tasks …

From Python: `lm_eval.simple_evaluate(model=RazorLM(params, razor=…), tasks=[…])`. Needs lm-eval, the extra `evals`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from ..checkpoint.hub import load
from ..config import RazorConfig, check_int
from ..params import Params
from ..text.generate import generate, prefill
from ..text.policy import Policy, choose_policy
from ..text.prompts import capacity_bucket
from ..text.result import KVReport, Result
from ..text.scoring import score
from .harness_requests import RequestOptions, RequestTokens, Tokens, check_batch_size

logger = logging.getLogger(__name__)

# Names in `--model_args` beside `pretrained` and `dense`: arguments of `load`, of the policy, and of `RazorLM`.
LOAD = ("dtype", "heads", "implementation")
POLICY = ("window", "sinks", "compensation", "kv_dtype", "prefill_chunk")
OWN = ("batch_size", "max_length", "max_gen_toks", "question_tokens", "exact", "add_bos_token", "think_end_token")
OWN += ("enable_thinking", "seed")


@register_model("razor_jax")
class RazorLM(TemplateLM):
    """The harness's model over `Params` and a cache policy. Tokenizes and truncates like its `hf` model.

    All scored and generated tokens are read from the compressed cache. Exact prefill attends densely and would give the
    first answer token (all of a one-letter answer). So the last `question_tokens` of a context are read after the
    cache is compressed.

    Args:
      params: with a tokenizer.
      razor: as in `generate`.
      batch_size: requests per batch; requests of similar length share one.
      max_length: most tokens of context and continuation together; default: the checkpoint's positions.
      max_gen_toks: most tokens of an answer if the task sets no limit.
      question_tokens: tokens at the end of a context that are read after compression; with 0, prefill gives the first
        answer token.
      exact: whether to score continuations token by token, as in `score`.
      add_bos_token: whether texts get a BOS; default: as in tokenizer.json.
      enable_thinking: variable for the chat template.
      think_end_token: text up to and including it is removed from an answer.
      seed: seed of sampled answers.
    """

    def __init__(
        self,
        params: Params,
        *,
        razor: Policy = "auto",
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        question_tokens: int = 1,
        exact: bool = False,
        add_bos_token: bool | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if params.assets is None or params.assets.tokenizer_json is None:
            raise ValueError("the harness works on text: give params with a tokenizer.json")
        self.params, self.assets = params, params.assets
        self.razor = choose_policy(params, razor)
        self.batch_size = check_batch_size(batch_size)
        longest = params.config.max_position_embeddings
        self.max_length = check_int("max_length", longest if max_length is None else max_length, 2)
        self.max_gen_toks = check_int("max_gen_toks", max_gen_toks, 1)
        self.question_tokens = check_int("question_tokens", question_tokens, 0)
        self.exact, self.add_bos_token = exact, add_bos_token
        self.enable_thinking, self.think_end_token = enable_thinking, think_end_token
        self._seeds = itertools.count(check_int("seed", seed, 0))
        self._caches: list[KVReport] = []  # one per request

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> RazorLM:
        """Make the model from `--model_args`. Raise ValueError for names that are not in LOAD, POLICY or OWN."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        # The harness always names a CUDA device, but JAX has already chosen one.
        unused = {name: given.pop(name) for name in ("device", "max_batch_size") if name in given}
        if unused:
            logger.info("razor_jax runs on %s; %s is not used", jax.devices()[0].device_kind, unused)
        args = {name: value for name, value in {**given, **arg_dict}.items() if value is not None}
        pretrained, dense = args.pop("pretrained", None), args.pop("dense", False)
        unknown = sorted(set(args) - {*LOAD, *POLICY, *OWN})
        if unknown or pretrained is None:
            problem = f"{', '.join(unknown)} is unknown" if unknown else "pretrained=FOLDER is missing"
            known = ", ".join(("pretrained", "dense", *LOAD, *POLICY, *OWN))
            raise ValueError(f"model_args: {problem}; allowed are {known}")
        loading, changes, own = ({name: args[name] for name in names if name in args} for names in (LOAD, POLICY, OWN))
        if dense and (changes or "heads" in loading):
            raise ValueError(f"model_args: dense=true has no cache policy: leave out {', '.join([*changes, 'heads'])}")
        check_batch_size(own.get("batch_size", 1))  # Before gigabytes are read.
        params = load(pretrained, **({"heads": None} if dense else {}), **loading)
        policy = None if dense else dataclasses.replace(params.razor or RazorConfig(), **changes)
        return cls(params, razor=policy, **own)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> RazorLM:
        """Make the model from a string like `a=1,b=2`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return self._special("eos_token", self.assets.eos_ids[:1])

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text without context: BOS, or the end-of-text token, as in transformers."""
        names, bos = dict(self.assets.special_tokens), self.assets.bos_id
        if "bos_token" in names or ("eos_token" not in names and bos is not None):
            return self._special("bos_token", (bos,) if bos is not None else ())
        return self.eot_token_id

    def _special(self, name: str, otherwise: Sequence[int]) -> int:
        """Return the id of a special token from the tokenizer, or from `otherwise`, as in transformers."""
        content = dict(self.assets.special_tokens).get(name)
        ids = otherwise if content is None else self.assets.encode(content, add_special=False)
        if len(ids) != 1:
            raise ValueError(f"{self.assets.source or 'the tokenizer'} has no {name}: name it in tokenizer_config.json")
        return ids[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Tokens:
        """Return the ids of a text, without a second BOS if the text begins with one."""
        add = add_special_tokens if add_special_tokens is not None else self.add_bos_token
        prefix = self.assets.decode([self.prefix_token_id], skip_special=False)
        if add_special_tokens is None and prefix and string.startswith(prefix):
            add = False
        return self.assets.encode(string, add_special=add is not False)

    @property
    def tokenizer_name(self) -> str:
        return f"{self.assets.source.strip('/').replace('/', '__')}__{self.assets.digest[:12]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the checkpoint's chat template, for the results file."""
        if isinstance(chat_template, str):
            raise ValueError(f"chat template {chat_template!r}: only the checkpoint's default template is supported")
        return self.assets.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the prompt of a conversation; without a generation prompt, the last message stays open."""
        variables = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        try:
            if add_generation_prompt:
                return self.assets.apply_chat(chat_history, variables=variables)
            return self.assets.continue_chat(chat_history, variables)
        except ValueError as error:
            spoken = [message for message in chat_history if message["role"] != "system"]
            if len(spoken) == len(chat_history):
                raise
            text = self.apply_chat_template(spoken, add_generation_prompt)
            logger.warning("the system message is left out, because the chat template refuses it: %s", error)
            return text

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, in windows of `max_length` with as much context as fits."""
        owners, windows = [], []
        for index, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                owners.append(index)
                windows.append((None, *make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-probability, is greedy) for each request (cache key, context ids, continuation ids)."""
        rows = [self._scored(context, continuation) for _, context, continuation in requests]
        self._warn_truncated([len(context) for _, context, _ in requests], [len(row.context) for row in rows])
        answers: list[Any] = [None] * len(requests)
        caches = []
        lengths = [len(row.context) + len(row.scored) for row in rows]
        for batch, padded in self._batches(lengths, "scoring", disable_tqdm):
            read, fed = ([getattr(rows[i], name) for i in padded] for name in ("read", "fed"))
            scores = score(self.params, read, fed, exact=self.exact, razor=self.razor)
            assert isinstance(scores, list)
            for index, found in zip(batch, scores, strict=False):
                held = len(rows[index].held)
                logprob = found.logprobs[held:].sum(dtype="float64")
                answers[index] = (float(logprob), bool(found.greedy[held:].all()))
                caches.append(found.kv)
                if (key := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answers[index])
        self._record_caches(caches)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answers, each up to its first stop string."""
        arguments: list[Any] = [request.args for request in requests]
        alike: dict[str, list[int]] = {}  # indices by options: only requests with the same options share a batch
        for index, (_, given) in enumerate(arguments):
            alike.setdefault(json.dumps(given, sort_keys=True), []).append(index)
        answers, caches = [""] * len(requests), []
        for group in alike.values():
            given = arguments[group[0]][1]
            options = RequestOptions.of(
                given,
                self.params,
                self.eot_token_id,
                self.max_length,
                self.max_gen_toks,
                whole=self.question_tokens == 0,
            )
            contexts = [self.tok_encode(arguments[index][0]) for index in group]
            rows = [RequestTokens.of(context[-options.room :], self.question_tokens) for context in contexts]
            self._warn_truncated([len(context) for context in contexts], [len(row.context) for row in rows])
            for batch, padded in self._batches([len(row.context) for row in rows], "answering", disable_tqdm):
                for at, result in zip(batch, self._generate([rows[i] for i in padded], options), strict=False):
                    text = self.assets.decode(result.tokens)
                    answers[group[at]] = postprocess_generated_text(text, options.until, self.think_end_token)
                    caches.append(result.kv)
                    self.cache_hook.add_partial("generate_until", arguments[group[at]], answers[group[at]])
        self._record_caches(caches)
        return answers

    def _generate(self, rows: list[RequestTokens], options: RequestOptions) -> list[Result]:
        """Return the answers of a batch. If one context is too short to hold tokens back, none does."""
        call: dict[str, Any] = {
            "max_new_tokens": options.new_tokens,
            "sampling": options.sampling,
            "seed": next(self._seeds),
            "stop": options.strings,
        }
        if not all(row.held for row in rows):
            return generate(options.params, [row.context for row in rows], razor=self.razor, **call)
        capacity = capacity_bucket(max(len(row.context) for row in rows) + options.new_tokens)
        cache = prefill(options.params, [row.read for row in rows], razor=self.razor, capacity=capacity)
        return generate(options.params, [row.held for row in rows], cache=cache, **call)

    def _scored(self, context: Tokens, continuation: Tokens) -> RequestTokens:
        """Return the tokens of a scoring request, its context cut from the left as in `hf`."""
        if not 1 <= len(continuation) <= self.max_length:
            raise ValueError(
                f"a continuation has {len(continuation):,} tokens: must be from 1 to max_length={self.max_length:,}"
            )
        return RequestTokens.of(
            context[-(self.max_length + 1 - len(continuation)) :], self.question_tokens, continuation
        )

    def _batches(self, lengths: list[int], what: str, quiet: bool) -> Iterator[tuple[list[int], list[int]]]:
        """Yield index batches, longest requests first: the batch, and the same repeated to full size."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        size = max(1, min(self.batch_size, len(order)))
        with tqdm(total=len(order), desc=f"razor_jax, {what}", disable=quiet) as bar:
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                yield batch, (batch + batch[-1:] * size)[:size]
                bar.update(len(batch))

    def _warn_truncated(self, before: list[int], after: list[int]) -> None:
        """Warn if contexts were truncated from `before` to `after` tokens."""
        cut = sum(a < b for a, b in zip(after, before, strict=True))
        if cut:
            warnings.warn(
                f"{cut:,} of {len(before):,} contexts were cut from the left, the longest from {max(before):,} tokens, "
                f"to fit max_length={self.max_length:,}",
                stacklevel=3,
            )

    def _record_caches(self, caches: list[KVReport]) -> None:
        """Record the caches, and warn of requests without compression: they say nothing about it."""
        self._caches += caches
        idle = sum(not kv.engaged for kv in caches)
        if idle and self.razor is not None:
            warnings.warn(
                f"nothing was compressed in {idle:,} of {len(caches):,} requests, so they had dense attention: they "
                f"are too short for this setting ({caches[0].setting}), or every KV head keeps everything",
                stacklevel=3,
            )

    def get_model_info(self) -> dict[str, Any]:
        """Return policy, number of compressed requests and bytes, for the harness's results file."""
        total = sum(kv.dense_bytes for kv in self._caches), sum(kv.allocated_bytes for kv in self._caches)
        return {
            "model_num_parameters": sum(x.size for x in jax.tree.leaves(self.params.weights)),
            "model_dtype": str(self.params.dtype),
            "razor": {
                "setting": "dense" if self.razor is None else self.razor.describe(),
                "share": 1.0 if self.razor is None else self.params.heads_or_all.share,
                "question_tokens": self.question_tokens,
                "requests": len(self._caches),
                "requests_compressed": sum(kv.engaged for kv in self._caches),
                "kv_bytes_ratio": total[0] / total[1] if self._caches else None,
            },
        }
