"""Ctrl-C ends the program within a stated time, whatever the main thread does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from razor_jax.cli.terminal import INTERRUPTED, PATIENCE

BUSY = {
    "a long call outside Python": "hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10**9)",
    "Python": "[time.sleep(0.05) for _ in range(10**6)]",
    "a thread that never ends": "threading.Thread(target=lambda: time.sleep(600)).start() or time.sleep(600)",
    "an end of Python that never comes": "atexit.register(time.sleep, 600) and time.sleep(600)",
}
PROGRAM = """
import atexit, hashlib, threading, time
from razor_jax.cli import app, terminal

@app.app.command()
def busy():
    print("busy", flush=True)
    {}

app.main()
"""


@pytest.mark.parametrize("work", BUSY.values(), ids=BUSY)
def test_ctrl_c_ends_the_program_in_time(work):
    command = [sys.executable, "-c", PROGRAM.format(work), "busy"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout.readline() == "busy\n"
            time.sleep(0.3)
            program.send_signal(signal.SIGINT)
            assert program.wait(timeout=30 * PATIENCE) == INTERRUPTED  # the work takes many minutes
        finally:
            program.kill()


HANDLED = """
import ctypes, signal, time
from razor_jax.cli import app, terminal

@app.app.command()
def busy():
    try:
        # Two signals without a step of Python between them.
        list(map(ctypes.CDLL(None)["raise"], [signal.SIGINT, signal.SIGINT]))
    except KeyboardInterrupt:
        print("handled", flush=True)
    time.sleep(2 * terminal.PATIENCE)
    print("alive", flush=True)

app.main()
"""


def test_ctrl_c_twice_that_was_handled_once_ends_nothing():
    command = [sys.executable, "-c", HANDLED, "busy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 * PATIENCE)
    assert (done.stdout, done.returncode) == ("handled\nalive\n", 0), done.stderr


LOST = """
import ctypes, gc, signal, time
from razor_jax.cli import app, terminal

@app.app.command()
def busy():
    # As when Ctrl-C falls into a collection of garbage: Python drops what a callback raises.
    gc.callbacks.append(lambda *_: (gc.callbacks.clear(), ctypes.CDLL(None)["raise"](signal.SIGINT), [0] * 3))
    gc.collect()
    time.sleep(60)

app.main()
"""


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost():
    command = [sys.executable, "-c", LOST, "busy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 * PATIENCE)
    assert done.returncode == INTERRUPTED, done.stderr
    assert "Traceback" not in done.stderr
