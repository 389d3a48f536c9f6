"""What process 0 says, heard by all."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def broadcast_from_process_0(make: Callable[[], Any]) -> Any:
    """Call `make` on process 0 and return its JSON values on every process.

    Raises, on every process, the ValueError or OSError that it raises.
    """
    if jax.process_count() == 1:
        return make()
    message: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            message = {"value": make()}
        except (ValueError, OSError) as error:
            # Were it raised here alone, the others would wait for a message that never comes.
            message = {"error": str(error)}
    message = _broadcast(message)
    if "error" in message:
        raise ValueError(message["error"])
    return message["value"]


def _broadcast(message: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps(message).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    # Few sizes, because each is a program.
    padded = np.zeros(max(1024, 1 << (size - 1).bit_length()), np.uint8)
    if jax.process_index() == 0:
        padded[:size] = np.frombuffer(data, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))[:size]))
