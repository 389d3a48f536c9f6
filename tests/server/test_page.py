"""The page at /, in a real browser: a document, two questions, a stop, and an error."""

import shutil

import pytest

from tests.support import tiny
from tests.support.http_server import serve_script

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(params=["desktop", "phone"])
def visit(request, browser, server):
    """The page, of a window and of a phone. Nothing may come from elsewhere, and no script may fail."""
    width, height = (1000, 900) if request.param == "desktop" else (360, 740)
    context = browser.new_context(viewport={"width": width, "height": height})
    page, wrong = context.new_page(), []
    page.on("request", lambda each: wrong.append(each.url) if not each.url.startswith(server.url) else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(server.url)
    yield page
    assert not wrong
    # Nothing is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def test_two_questions_about_a_document_a_stop_and_an_error(visit, server):
    """What the page sends, what it shows, and that stop ends the answer on the server."""
    server.engine.script = lambda generation: f"answer {len(server.engine.seen)}"
    visit.fill("#document", "The keeper of the lighthouse is Ada. " * 20)
    assert "740 characters" in visit.inner_text("#size")
    for number, question in enumerate(("Who keeps it?", "Where does Ada live?")):
        visit.fill("#question", question)
        visit.press("#question", "Enter")
        visit.wait_for_selector(f"article:nth-child(1):has-text('{question}') .text:has-text('answer {number}')")
        visit.wait_for_selector("#ask:not([disabled])")
    facts = visit.inner_text("article:nth-child(1) .facts")
    assert "tokens/s" in facts
    assert "9 written" in facts
    first, second = server.engine.seen
    # The document is the checkpoint of both prompts.
    assert first.checkpoints == second.checkpoints
    assert first.prompt[: first.checkpoints[0]] == second.prompt[: first.checkpoints[0]]

    server.engine.script = lambda generation: "and so on " * 400
    visit.fill("#question", "Go on")
    visit.fill("#tokens", "3000")
    visit.click("#ask")
    visit.wait_for_selector("article:nth-child(1) .text:has-text('and so on')")
    visit.wait_for_selector("#load:text-matches('^1 ')")
    assert visit.inner_text("#dropped") == "7"
    assert visit.inner_text("#used") == "400 B"
    assert "1 of 8 pages" in visit.inner_text("#pools")
    visit.click("#stop")
    visit.wait_for_selector("article:nth-child(1) .facts:has-text('stopped')")
    server.wait_idle()
    assert len(server.engine.cancels) == 1

    visit.fill("#tokens", "100000")
    visit.fill("#question", "Too long")
    visit.click("#ask")
    visit.wait_for_selector("article.failed:has-text('must be an integer from 0 to 4,096')")


def test_the_page_sends_its_key(browser):
    """A server with a key: an error without it, an answer with it."""
    with serve_script(tiny.assets(), tiny.CONFIG.vocab_size, api_key="secret") as server:
        page = browser.new_page()
        page.goto(server.url)
        page.fill("#question", "hello")
        page.click("#ask")
        page.wait_for_selector("article.failed:has-text('wrong or missing key')")
        page.fill("#key", "secret")
        page.click("#ask")
        page.wait_for_selector("article:not(.failed):has-text('a scripted answer')")
        page.close()
