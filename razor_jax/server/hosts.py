"""An engine on several hosts: process 0 decides, and every process runs the same programs in the same order.

Process 0 alone has requests, scheduler and HTTP. Its engine calls the methods of `Leader`, which keeps the calls until
the engine needs a result or its tick ends. Then it broadcasts them as one int32 vector, and every process, itself
included, makes these calls on its own `Device`. So a tick is one broadcast, and one more for a first token and for log
probabilities of a prompt.

    vector     words that follow in all broadcasts of this message, then the words, zeros at the end
    words      per call: index of the method, its arguments as a tuple
    argument   integer: -1, value. None: -2. tuple: -3, length, its elements.
               array: index of its type, number of axes, shape, values as they are in memory, padded to whole words

All broadcasts have one size, so they are one program. A longer message takes several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, ParamSpec

import jax
import numpy as np
from jax.experimental import multihost_utils

from .engine_device import Device, RowTokens

WORDS = 1024  # int32 numbers per broadcast
_INTEGER, _NONE, _TUPLE = -1, -2, -3
_TYPES = (np.dtype(np.int32), np.dtype(np.uint32), np.dtype(np.float32), np.dtype(bool))

P = ParamSpec("P")


def _sent(method: Callable[Concatenate[Device, P], None]) -> Callable[Concatenate[Leader, P], None]:
    """Return a method of `Leader` that sends the call of a method of `Device`."""
    name = method.__name__

    def send(self: Leader, *args: P.args, **kwargs: P.kwargs) -> None:
        assert not kwargs, "calls are sent by position"
        self._calls.append((name, args))

    return send


class Leader:
    """The device of process 0: what it is told, every process does."""

    def __init__(self, device: Device):
        self._device = device
        self._calls: list[tuple[str, tuple[Any, ...]]] = []

    set_pages = _sent(Device.set_pages)
    copy_prefix = _sent(Device.copy_prefix)
    prefill_chunk = _sent(Device.prefill_chunk)
    write_segment = _sent(Device.write_segment)
    start_row = _sent(Device.start_row)
    set_allowed = _sent(Device.set_allowed)
    decode_block = _sent(Device.decode_block)
    end_row = _sent(Device.end_row)

    def prompt_scores(self) -> tuple[np.ndarray, ...]:
        self._run()
        return self._device.prompt_scores()

    def first_token(self) -> RowTokens:
        self._run()
        return self._device.first_token()

    def block_output(self) -> dict[int, RowTokens]:
        self._run()
        return self._device.block_output()

    def flush(self) -> None:
        """Send the calls if one of them runs a program. Others can wait for the next message."""
        if any(name not in _WITHOUT_PROGRAM for name, _ in self._calls):
            self._run()

    def beat(self) -> None:
        """Send a message, also if there is nothing to say: a process that hears nothing for long gives up."""
        self._run()

    def _run(self) -> None:
        calls, self._calls = self._calls, []
        _send(encode_calls(calls))
        for name, args in calls:
            getattr(self._device, name)(*args)

    def close(self) -> None:
        """Let the other processes leave `follow`."""
        self._calls.append((_CLOSE, ()))
        _send(encode_calls(self._calls))


_CLOSE = "close"
_WITHOUT_PROGRAM = ("set_pages", "end_row")
_METHODS = (
    "set_pages",
    "copy_prefix",
    "prefill_chunk",
    "write_segment",
    "start_row",
    "set_allowed",
    "decode_block",
    "end_row",
    _CLOSE,
)


def follow(device: Device) -> None:
    """Make the calls that process 0 sends, until it closes."""
    while True:
        for name, args in decode_calls(_receive()):
            if name == _CLOSE:
                return
            getattr(device, name)(*args)


def meet() -> None:
    """Wait until every process is here, and compile the broadcast."""
    if jax.process_count() > 1:
        _send(np.zeros(0, np.int32)) if jax.process_index() == 0 else _receive()


def _send(words: np.ndarray) -> None:
    message = np.concatenate([np.asarray([len(words)], np.int32), words])
    for first in range(0, len(message), WORDS):
        part = message[first : first + WORDS]
        multihost_utils.broadcast_one_to_all(np.pad(part, (0, WORDS - len(part))))


def _receive() -> np.ndarray:
    vector = _received_vector()
    count = int(vector[0])
    parts = [vector[1:]]
    while sum(map(len, parts)) < count:
        parts.append(_received_vector())
    return np.concatenate(parts)[:count]


def _received_vector() -> np.ndarray:
    return np.asarray(multihost_utils.broadcast_one_to_all(np.zeros(WORDS, np.int32)))


def encode_calls(calls: Sequence[tuple[str, tuple[Any, ...]]]) -> np.ndarray:
    """Return calls, names and arguments, as int32 words."""
    parts: list[Any] = []
    for name, args in calls:
        parts.append([_METHODS.index(name)])
        _encode(args, parts)
    return np.concatenate([np.asarray(part, np.int32) for part in parts]) if parts else np.zeros(0, np.int32)


def _encode(value: Any, parts: list[Any]) -> None:
    if value is None:
        parts.append([_NONE])
    elif isinstance(value, tuple):
        parts.append([_TUPLE, len(value)])
        for each in value:
            _encode(each, parts)
    elif isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value).tobytes()
        parts.append([_TYPES.index(value.dtype), value.ndim, *value.shape])
        parts.append(np.frombuffer(data + bytes(-len(data) % 4), np.int32))
    else:
        parts.append([_INTEGER, value])


def decode_calls(words: np.ndarray) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the calls of `encode_calls`."""
    reader = _Reader(words)
    while reader.at < len(words):
        name = _METHODS[reader.integer()]
        yield name, reader.value()


class _Reader:
    """Words, and how many of them were read."""

    def __init__(self, words: np.ndarray):
        self._words, self.at = words, 0

    def take(self, count: int) -> np.ndarray:
        self.at += count
        return self._words[self.at - count : self.at]

    def integer(self) -> int:
        return int(self.take(1)[0])

    def value(self) -> Any:
        kind = self.integer()
        if kind == _NONE:
            return None
        if kind == _INTEGER:
            return self.integer()
        if kind == _TUPLE:
            return tuple(self.value() for _ in range(self.integer()))
        dtype, shape = _TYPES[kind], tuple(self.integer() for _ in range(self.integer()))
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer(self.take(-(-size // 4)).tobytes()[:size], dtype).reshape(shape)


__all__: Sequence[str] = ("WORDS", "Leader", "decode_calls", "encode_calls", "follow", "meet")
