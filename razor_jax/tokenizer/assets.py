"""Tokenizer, chat template and stop tokens of a checkpoint, and streaming detokenization."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from .added_tokens import AddedTokens
from .chat_template import Message, render, text_of

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # Decoders write it for bytes that are not (yet) UTF-8.
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # One byte of a character that the vocabulary lacks.
UTF8_BYTES = 4  # Longest character in bytes, and therefore in tokens.
MAX_PENDING = 16  # Number of delayed tokens above which a cut is searched for.
TEMPLATE_FILE = "chat_template.jinja"
_JSON_FILES = ("tokenizer_config", "special_tokens_map", "added_tokens", "generation_config", "config")
_MARK = "razor-jax-mark"  # Shows where a template writes a message.
TURN_ENDS = ("eos_token", "eot_token")  # Names of special tokens that end an answer.


@dataclasses.dataclass(frozen=True, eq=False)
class Assets:
    """Tokenizer, chat template and special tokens of one checkpoint, compared and hashed by content.

    Reading a folder twice gives equal assets. As static data of a jit argument, they share one compilation.

    Attributes:
      tokenizer_json: text of tokenizer.json with all added tokens. None if missing: prompts must then be token ids.
      chat_template: jinja template, None if the checkpoint has none.
      bos_id: beginning-of-text token, None if the checkpoint has none.
      eos_ids: tokens that end an answer.
      special_tokens: (name, content) pairs such as ("bos_token", "<s>"), which the template may use.
      tokenizer_config: text of tokenizer_config.json, which `write` preserves; not compared.
      generation_config: text of generation_config.json, which `write` preserves; not compared.
      source: the directory it was read from, for error messages; not compared.
    """

    tokenizer_json: str | None = None
    chat_template: str | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    special_tokens: tuple[tuple[str, str], ...] = ()
    tokenizer_config: str | None = dataclasses.field(default=None, compare=False, repr=False)
    generation_config: str | None = dataclasses.field(default=None, compare=False, repr=False)
    source: str = dataclasses.field(default="", compare=False)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the content."""
        sha = hashlib.sha256()
        for field in dataclasses.fields(self):
            if field.compare:
                value = getattr(self, field.name)
                content = value.encode() if isinstance(value, str) else json.dumps(value).encode()
                sha.update(f"{type(value).__name__} {len(content)} ".encode() + content)
        return sha.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Assets) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        size = None if self.tokenizer_json is None else self.vocab_size
        template = "none" if self.chat_template is None else f"{len(self.chat_template)} characters"
        return f"Assets(vocab_size={size}, bos_id={self.bos_id}, eos_ids={self.eos_ids}, template: {template})"

    @classmethod
    def read(cls, directory: str | pathlib.Path) -> Assets:
        """Return the assets of a Hugging Face model folder. Any file may be missing.

        As in transformers, chat_template.jinja wins over the template in tokenizer_config.json,
        generation_config.json over config.json, tokens that only tokenizer_config.json or its legacy files name
        are added (`AddedTokens`), and tokenizer.json alone says whether a text gets a BOS (its post-processor;
        `add_bos_token` in tokenizer_config.json is not read where it exists). Unlike there, the end token that
        tokenizer_config.json names ends an answer even if generation_config.json names another.
        """
        directory = pathlib.Path(directory)
        texts = {name: _text(directory / f"{name}.json") for name in _JSON_FILES}
        parsed = {name: _parsed(text, directory / f"{name}.json") for name, text in texts.items()}
        config = parsed["tokenizer_config"]
        try:
            added = AddedTokens.of(config, parsed["special_tokens_map"], parsed["added_tokens"])
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error
        assets = dataclasses.replace(
            cls(tokenizer_json=_text(directory / "tokenizer.json"), source=str(directory))._add(added),
            chat_template=_text(directory / TEMPLATE_FILE) or _default_template(config.get("chat_template"), directory),
            special_tokens=tuple((name, token.content) for name, token in added.named.items()),
            tokenizer_config=texts["tokenizer_config"],
            generation_config=texts["generation_config"],
        )
        configs = (parsed["generation_config"], parsed["config"])
        bos = _stated_ids(configs, "bos_token_id", directory) or assets._named_ids("bos_token")
        eos = (*_stated_ids(configs, "eos_token_id", directory), *assets._named_ids(*TURN_ENDS))
        return dataclasses.replace(assets, bos_id=bos[0] if bos else None, eos_ids=tuple(dict.fromkeys(eos)))

    def write(self, directory: str | pathlib.Path) -> None:
        """Write the files that `read` and transformers read. Reading them gives equal assets."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = _parsed(self.tokenizer_config, "tokenizer_config") | dict(self.special_tokens)
        config.pop("chat_template", None)
        if self.tokenizer_json is not None:
            config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        generation = _parsed(self.generation_config, "generation_config")
        if self.bos_id is not None:
            generation["bos_token_id"] = self.bos_id
        if self.eos_ids:
            generation["eos_token_id"] = self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids)
        files = {
            "tokenizer.json": self.tokenizer_json,
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) if config else None,
            "generation_config.json": json.dumps(generation, indent=2) if generation else None,
            TEMPLATE_FILE: self.chat_template,
        }
        for name, text in files.items():
            if text is not None:
                (directory / name).write_text(text, encoding="utf-8", newline="")

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the tokenizer, including added ones. V of the model may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def add_bos(self) -> bool:
        """Whether `encode` puts the BOS token before a text."""
        return self.bos_id is not None and self.encode("")[:1] == [self.bos_id]

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Return the token ids of a text. `add_special` adds special tokens such as BOS, as the checkpoint defines.

        Raises ValueError for text with lone surrogates.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special).ids
        except TypeError as error:
            raise ValueError(
                f"{text!r:.80} is not Unicode text: it has lone surrogates, which come from bytes that are not UTF-8; "
                "decode the bytes with their real encoding"
            ) from error

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of token ids, without special tokens by default."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def apply_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt text of a conversation, rendered with the chat template of the checkpoint.

        The template writes BOS itself: encode the result with `add_special=False`. `variables` are further names
        that the template reads, such as `enable_thinking`. Raises ValueError without a template, or as
        `chat_template.render`.
        """
        if self.chat_template is None:
            raise ValueError(
                f"{self.source or 'this model'} has no chat template (a base model?): pass a prompt string "
                f"instead of messages, or put a jinja template into {TEMPLATE_FILE} beside the model"
            )
        if "messages" in (variables or {}):
            raise ValueError("template_kwargs has 'messages', which are those of the prompt: leave it out")
        names = {
            **dict(self.special_tokens),
            "add_generation_prompt": add_generation_prompt,
            **(variables or {}),
        }
        where = f"chat template of {self.source}" if self.source else "chat template"
        return render(self.chat_template, messages, names, source=where)

    def continue_chat(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> str:
        """Return the prompt text of a conversation up to the end of its last message, for an answer that continues it.

        Raises ValueError if that message is empty or the template alters it, and as `apply_chat`.
        """
        text = self.apply_chat(messages, add_generation_prompt=False, variables=variables)
        marked = self.apply_chat([*messages[:-1], {**messages[-1], "content": _MARK}], False, variables)
        at, last = marked.find(_MARK), text_of(messages[-1])
        # A template may strip the message.
        written = next((each for each in (last, last.lstrip(), last.strip()) if text.startswith(each, at)), "")
        if not last.strip() or not written or text[:at] != marked[:at]:
            why = "the chat template alters it" if last.strip() else "it is empty"
            raise ValueError(f"{self.source or 'this model'}: the last message cannot be continued, because {why}")
        return text[:at] + written

    def _add(self, added: AddedTokens) -> Assets:
        """Return these assets with the tokens that tokenizer.json lacks."""
        if self.tokenizer_json is None or not (missing := added.missing(self._backend)):
            return self
        tokenizer = tokenizers.Tokenizer.from_str(self.tokenizer_json)
        tokenizer.add_tokens(missing)
        return dataclasses.replace(self, tokenizer_json=tokenizer.to_str())

    def _named_ids(self, *names: str) -> tuple[int, ...]:
        """Return the ids of special tokens by name, without those that the checkpoint lacks."""
        if self.tokenizer_json is None:
            return ()
        ids = [self._backend.token_to_id(content) for name, content in self.special_tokens if name in names]
        return tuple(i for i in ids if i is not None)

    @property
    def _backend(self) -> tokenizers.Tokenizer:
        if self.tokenizer_json is None:
            raise ValueError(_no_tokenizer(self.source))
        special = tuple(content for _, content in self.special_tokens)
        try:
            return _backend(self.tokenizer_json, special)
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(
                f"{self.source or 'this model'}: tokenizer.json cannot be read ({error}); it may be cut "
                "short or made by a newer `tokenizers`: fetch it again, or `pip install -U tokenizers`"
            ) from error


class Detokenizer:
    """Incremental decoder of a growing token sequence. All pieces together equal `assets.decode` of all ids.

    Text is delayed while its last character may still change, in an incomplete UTF-8 sequence or a run of byte
    tokens, which decodes as a whole. Each push decodes only the last few tokens.
    """

    def __init__(self, assets: Assets):
        self._assets = assets
        self._window: list[int] = []  # Tokens of the last piece as context, then the delayed ones.
        self._context = 0  # Number of window tokens already returned as text.

    def push(self, ids: Iterable[int]) -> str:
        """Append tokens and return the text that they complete, possibly ""."""
        # Dropped tokens (special, unknown) would separate a token from its left neighbour.
        printable = [int(i) for i in ids if _printable(self._assets, int(i))]
        self._window += printable
        pending = len(self._window) - self._context
        if not printable or BYTE_TOKEN.fullmatch(self._assets._backend.id_to_token(printable[-1]) or ""):
            return ""
        if not self._assets.decode(self._window).endswith(REPLACEMENT):
            return self._take(pending)
        return self._take(self._cut(pending)) if pending > MAX_PENDING else ""

    def flush(self) -> str:
        """Return the delayed text. Call it at the end of the sequence."""
        return self._take(len(self._window) - self._context)

    def _take(self, count: int) -> str:
        """Return the text of the next `count` tokens, decoded after their context."""
        before = self._assets.decode(self._window[: self._context])
        end = self._context + count
        text = self._assets.decode(self._window[:end])
        # Tokens without text do not tell whether a space precedes the next token: keep the older context.
        kept = self._context if self._assets.decode(self._window[self._context : end]) else 0
        self._window = self._window[kept:]
        self._context = end - kept
        return text[len(before) :]

    def _cut(self, pending: int) -> int:
        """Return the number of pending tokens that no later byte can change, in a stream of invalid UTF-8.

        If both sides of a cut decode to the same text as together, and a whole character follows it, then no
        character crosses the cut. Any four adjacent positions include such a cut.
        """
        whole = self._assets.decode(self._window)
        for behind in range(UTF8_BYTES, 2 * UTF8_BYTES):
            left, right = self._window[:-behind], self._window[-behind:]
            if self._assets.decode(left) + self._assets.decode(right) == whole:
                return pending - behind
        return 0


def find_stop(text: str, stops: Sequence[str], start: int = 0) -> tuple[int | None, int]:
    """Return the start of the first completed stop string (or None), and the length of text that is safe to show.

    All text before a stop string is safe. Without a match, all text is safe except an end that may grow into a stop
    string. The search begins at character `start`, the safe length of the previous call. The result does not
    depend on how the text was cut into pieces.
    """
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop, start)) >= 0]
    if found:
        at = min(found)[1]
        return at, at
    longest = max(
        (n for stop in stops for n in range(1, len(stop)) if n <= len(text) - start and text.endswith(stop[:n])),
        default=0,
    )
    return None, len(text) - longest


@functools.lru_cache(maxsize=8)
def _backend(tokenizer_json: str, special: tuple[str, ...]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    # Truncation and padding saved from training must not apply to prompts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # As in transformers: add tokens that only tokenizer_config.json names. Known tokens do not change.
    tokenizer.add_special_tokens([tokenizers.AddedToken(content, normalized=False) for content in special])
    return tokenizer


@functools.lru_cache(maxsize=8)
def _special_ids(assets: Assets) -> frozenset[int]:
    added = assets._backend.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special)


def _printable(assets: Assets, token: int) -> bool:
    return token not in _special_ids(assets) and assets._backend.id_to_token(token) is not None


def _default_template(stated: Any, source: pathlib.Path) -> str | None:
    """Return the template for conversations. A checkpoint may have several templates by name."""
    named = stated
    if isinstance(stated, list) and all(isinstance(each, Mapping) for each in stated):
        named = {each.get("name"): each.get("template", 0) for each in stated}
    templates = list(named.values()) if isinstance(named, Mapping) else [named]
    if not all(isinstance(template, str | None) for template in templates):
        raise ValueError(
            f'{source}: chat_template={stated!r}: must be a string, or a list of {{"name": …, "template": …}}'
        )
    if isinstance(named, Mapping):
        return named.get("default") or (templates[0] if len(templates) == 1 else None)
    return named


def _stated_ids(configs: Iterable[Mapping[str, Any]], key: str, source: pathlib.Path) -> tuple[int, ...]:
    """Return the token ids under `key` in the first config that has it. Raises ValueError if any has something else."""
    found: list[tuple[int, ...]] = []
    for config in configs:
        if (value := config.get(key)) is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise ValueError(f"{source}: {key}={value!r} must be a token id or a list of them")
            found.append(tuple(ids))
    return found[0] if found else ()


def _no_tokenizer(source: str) -> str:
    if not source:
        return "no tokenizer: pass token ids instead of text, or params read from a folder with a tokenizer.json"
    command = (
        f"python -c \"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('{source}', "
        f"use_fast=True).save_pretrained('{source}')\""
    )
    return f"{source} has no tokenizer.json: pass token ids instead of text, or make one with\n  {command}"


def _text(path: pathlib.Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): fetch it again") from error


def _parsed(text: str | None, path: pathlib.Path | str) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); it may be cut short: fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value
