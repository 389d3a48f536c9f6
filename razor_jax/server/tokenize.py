"""Texts to token ids, off the event loop: the server answers others meanwhile."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..tokenizer.assets import Assets

THREADS = 16  # Most of them wait for a process: long texts must not keep short ones from a thread.
LONG = 200_000  # Characters from which a text goes to a process: encoding it here would stop the interpreter for long.
_PROGRAM = Path(__file__).with_name("tokenizer_worker.py")
_Value = TypeVar("_Value")


class Tokenizer:
    """A tokenizer that many threads share.

    Short texts are encoded in the calling thread: `tokenizers` only reads a tokenizer that nobody changes. Long texts
    are encoded one after the other in a process, which starts with the first of them.
    """

    def __init__(self, assets: Assets):
        self.assets = assets
        self._threads = concurrent.futures.ThreadPoolExecutor(THREADS, "razor-jax-prompts")
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    async def off_loop(self, work: Callable[[], _Value]) -> _Value:
        """Run `work` in a thread and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def encode(self, text: str, add_special: bool) -> np.ndarray:
        """Return the token ids int32 [T] of a text, from any thread. Raises ValueError for lone surrogates."""
        if len(text) < LONG:
            return np.asarray(self.assets.encode(text, add_special), np.int32)
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("the text has lone surrogates, which are not Unicode text") from error
        with self._lock:
            return self._encode_there(data, add_special)

    def close(self) -> None:
        """End threads and process."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _encode_there(self, data: bytes, add_special: bool) -> np.ndarray:
        try:
            process = self._process or self._start()
            _send(process, data, add_special)
            assert process.stdout is not None
            (count,) = struct.unpack("=q", process.stdout.read(8))
            ids = process.stdout.read(4 * count)
            if len(ids) != 4 * count:
                raise EOFError
            return np.frombuffer(ids, np.int32)
        except (BrokenPipeError, EOFError, struct.error) as error:
            self._process = None
            raise RuntimeError("the tokenizer process ended: is there memory for a text this long?") from error

    def _start(self) -> subprocess.Popen[bytes]:
        paths = json.dumps([os.path.abspath(path) for path in sys.path if path])
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_PROGRAM), paths], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        _send(self._process, self.assets._backend.to_str().encode(), False)
        return self._process


def _send(process: subprocess.Popen[bytes], data: bytes, add_special: bool) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps({"bytes": len(data), "add_special": add_special}).encode() + b"\n")
    process.stdin.write(data)
    process.stdin.flush()


def token_text(assets: Assets, token: int) -> tuple[str, bytes]:
    """Return what a token shows, and its bytes; a part of a character shows as U+FFFD."""
    written = assets._backend.id_to_token(token)
    if written is None:  # The model's vocabulary may be larger than the tokenizer's.
        return "", b""
    text = assets.decode([token], skip_special=False)
    if all(letter in _BYTE_OF for letter in written) and "\N{REPLACEMENT CHARACTER}" in text:
        return text, bytes(_BYTE_OF[letter] for letter in written)
    if len(written) == 6 and written.startswith("<0x"):
        return text, bytes([int(written[3:5], 16)])
    return text, text.encode()


def _byte_letters() -> dict[str, int]:
    """Return the byte of each letter in which byte-level BPE writes its tokens (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_letters()
