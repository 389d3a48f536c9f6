"""Chat templates that would run for ever or fill the memory are stopped; the process that renders them is replaced."""

from __future__ import annotations

import concurrent.futures
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from razor_jax.tokenizer import template_process
from razor_jax.tokenizer.assets import Assets

USER = [{"role": "user", "content": "hello"}]
LOOP = (
    "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% for k in r %}BODY{% endfor %}{% endfor %}{% endfor %}"
)
GROW = "{% set n = namespace(x=START) %}{% for i in range(60) %}{% set n.x = STEP %}{% endfor %}END"


def grow(start: str, step: str, end: str) -> str:
    return GROW.replace("START", start).replace("STEP", step).replace("END", end)


TOO_LONG = {
    "nested loops": LOOP.replace("BODY", ""),
    "nested loops of text": LOOP.replace("BODY", "{% if loop.last %}x{% endif %}"),
    "a power": "{{ (10 ** 9) ** (10 ** 9) % 7 }}",
    "lists of lists": grow("[1]", "[n.x, n.x]", "{{ n.x | string | length }}"),
    "a comparison of lists of lists": grow("[1]", "[n.x, n.x]", "{% set m = n.x %}")
    + grow("[1]", "[n.x, n.x]", "{{ m == n.x }}"),
}
TOO_LARGE = {
    "a repeated string": "{{ ('x' * 10 ** 10) | length }}",
    "a repeated list": "{{ ([0] * 10 ** 10) | length }}",
    "doubled strings": grow("'x'", "n.x ~ n.x", "{{ n.x | length }}"),
    "doubled sums": grow("'x'", "n.x + n.x", "{{ n.x | length }}"),
    "a centred word": "{{ ('x' | center(10 ** 10)) | length }}",
    "a justified word": "{{ 'x'.ljust(10 ** 10) | length }}",
    "a wide number": "{{ ('%10000000000d' % 1) | length }}",
    "a wide format": "{{ '{:>10000000000}'.format('x') | length }}",
    "a replacement": "{{ ('x' * 10 ** 6).replace('x', 'y' * 10 ** 6) | length }}",
    "joined loops": "{{ range(99999) | map('string') | map('center', 99999) | join | length }}",
}
TOO_MUCH_TEXT = {"a long string": "{{ 'x' * 10 ** 7 }}", "many strings": LOOP.replace("BODY", "xxxxxxxxxx")}


@pytest.fixture
def two_seconds(monkeypatch):
    monkeypatch.setattr(template_process, "SECONDS", 2)


def render(template: str) -> str:
    return Assets(chat_template=template, source="some/model").apply_chat(USER)


def assert_works():
    assert render("{{ messages[0].content }} {{ 1 + 1 }}") == "hello 2"


@pytest.mark.usefixtures("two_seconds")
@pytest.mark.parametrize("template", TOO_LONG.values(), ids=TOO_LONG.keys())
def test_a_template_that_does_not_end_is_stopped(template):
    with pytest.raises(ValueError, match="chat template of some/model: the chat template runs longer than 2 seconds"):
        render(template)
    assert_works()


@pytest.mark.parametrize("template", TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_a_template_that_fills_the_memory_is_stopped(template):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"needs more than 512 MiB of memory and was stopped"):
        render(template)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB of this process
    assert_works()


@pytest.mark.parametrize("template", TOO_MUCH_TEXT.values(), ids=TOO_MUCH_TEXT.keys())
def test_a_template_that_writes_without_end_is_stopped(template):
    with pytest.raises(ValueError, match=r"the chat template writes more than 1,00\d,\d+ characters and was stopped"):
        render(template)
    assert_works()


def test_the_limits_grow_with_the_messages():
    content = "é\n" * 2_000_000
    assets = Assets(chat_template="{% for m in messages %}{{ m.content }}{{ m.content | trim }}{% endfor %}")
    assert assets.apply_chat([{"role": "user", "content": content}]) == content + content.rstrip()


@pytest.mark.usefixtures("two_seconds")
def test_templates_are_stopped_in_threads_too():
    bombs = [TOO_LONG["nested loops"], TOO_LARGE["a repeated string"], "{{ messages[0].content }}"] * 2
    with concurrent.futures.ThreadPoolExecutor(len(bombs)) as pool:
        runs = [pool.submit(render, template) for template in bombs]
        errors = [run.exception() for run in runs]
    assert [str(error).split("the chat template ")[-1][:22] for error in errors] == [
        "runs longer than 2 sec",
        "needs more than 512 Mi",
        "None",
    ] * 2
    assert runs[2].result() == runs[5].result() == "hello"


def test_an_interrupted_answer_is_not_taken_for_the_next():
    assert_works()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(KeyboardInterrupt):
        render(TOO_LONG["nested loops"])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert_works()


def test_a_process_that_was_killed_is_replaced():
    assert_works()
    process = template_process.PROCESS._process
    assert process is not None
    process.kill()
    process.wait()
    assert_works()


def program(code: str) -> str:
    """Run a program that renders templates; return what it prints."""
    code = (
        "import os, time, warnings; warnings.simplefilter('ignore')\n"
        "from razor_jax.tokenizer import template_process\n"
        "from razor_jax.tokenizer.assets import Assets\n"
        "def say(x): return Assets(chat_template=x).apply_chat([{'role': 'user', 'content': 'hello'}])\n"
    ) + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr == ""
    return done.stdout


def test_a_fork_renders_in_a_process_of_its_own():
    printed = program(
        "say('a')\n"
        "child = os.fork()\n"
        "for i in range(200): assert say(f'{child > 0} {i}') == f'{child > 0} {i}'\n"
        "if child: print(os.waitpid(child, 0)[1], flush=True)\n"
    )
    assert printed == "0\n"


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"])
def test_no_process_is_left_behind(end):
    worker = int(program(f"say('a'); print(template_process.PROCESS._process.pid, flush=True)\n{end}"))
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


def test_a_template_reaches_no_file_and_no_code():
    secret = os.path.abspath(__file__)
    for template in (
        "{% include '" + secret + "' %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{{ strftime_now.__globals__['sys'] }}",
    ):
        with pytest.raises(ValueError, match=r"failed: (SecurityError|TypeError)"):
            render(template)


def test_variables_are_plain_data():
    with pytest.raises(ValueError, match="variables of a chat template must be plain JSON data"):
        Assets(chat_template="x").apply_chat(USER, variables={"tools": [print]})
