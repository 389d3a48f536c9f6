"""Broadcasts of JSON values from process 0 to every process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def broadcast_from_process_0(make: Callable[[], Any]) -> Any:
    """Call `make` on process 0 and return its result, a JSON value, on every process.

    A ValueError or OSError that `make` raises becomes a ValueError on every process.
    """
    if jax.process_count() == 1:
        return make()
    message: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            message = {"value": make()}
        except (ValueError, OSError) as error:
            # Broadcast the error: if only process 0 raised, the others would wait for ever.
            message = {"error": str(error)}
    message = _broadcast(message)
    if "error" in message:
        raise ValueError(message["error"])
    return message["value"]


def _broadcast(message: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps(message).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    # Round up to a power of two: every size compiles a program.
    padded = np.zeros(max(1024, 1 << (size - 1).bit_length()), np.uint8)
    if jax.process_index() == 0:
        padded[:size] = np.frombuffer(data, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size]))
