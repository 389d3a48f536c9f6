"""A program that encodes long texts in a process of its own.

The list of a million ids is built and freed in one step of the interpreter, which would stop every stream of the
server. This program imports only tokenizers and the standard library.

A request is a line of JSON, {"bytes": n, "add_special": bool}, and n bytes of UTF-8. An answer is the number of ids as
8 bytes, and the ids as int32, both in the order of the machine. The first request is the tokenizer itself.
"""

from __future__ import annotations

import array
import json
import signal
import struct
import sys

if __name__ == "__main__":  # Started without the site module, which would double the start time.
    sys.path[:] = json.loads(sys.argv[1])

import tokenizers


def main() -> None:
    """Answer requests until stdin ends, as it does when the parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent.
    _, text = _read()
    tokenizer = tokenizers.Tokenizer.from_str(text)
    while True:
        add_special, text = _read()
        ids = tokenizer.encode(text, add_special_tokens=add_special).ids
        sys.stdout.buffer.write(struct.pack("=q", len(ids)) + array.array("i", ids).tobytes())
        sys.stdout.buffer.flush()


def _read() -> tuple[bool, str]:
    line = sys.stdin.buffer.readline()
    if not line:
        raise SystemExit
    request = json.loads(line)
    return request["add_special"], sys.stdin.buffer.read(request["bytes"]).decode()


if __name__ == "__main__":
    main()
