"""The page in a headless browser, against a real server with a tiny model."""

import re
import shutil
from collections.abc import Iterator

import pytest

from tests.e2e.process import Server

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

pytestmark = pytest.mark.e2e

_CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    if _CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=_CHROMIUM, args=_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: "playwright.Browser", tiny_server: Server) -> Iterator["playwright.Page"]:
    """The loaded page; a message on its console, or a request to another host, fails the test."""
    context = browser.new_context()
    page = context.new_page()
    complaints: list[str] = []
    foreign: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda sent: None if sent.url.startswith(tiny_server.url) else foreign.append(sent.url),
    )
    page.goto(f"{tiny_server.url}/")
    playwright.expect(page.locator("#status")).to_contain_text("ready", timeout=20_000)
    yield page
    context.close()
    # A refused request is reported by the browser itself; the page shows it as well.
    assert [text for text in complaints if "status of 400" not in text] == []
    assert foreign == []


def ask(page: "playwright.Page", text: str, **options: str) -> None:
    for name, value in options.items():
        page.locator(f"#{name}").fill(value)
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")
    playwright.expect(page.locator("#send")).to_be_visible(timeout=30_000)


def test_a_chat_streams_and_shows_what_was_read(page: "playwright.Page") -> None:
    ask(page, "a long question " * 12, max_tokens="12", temperature="0", seed="1")
    answer = page.locator(".turn.assistant")
    playwright.expect(answer.locator(".meta")).to_contain_text("tokens/s")
    playwright.expect(answer.locator(".meta")).to_contain_text("first token")
    tokens = answer.locator(".tok")
    assert 1 <= tokens.count() <= 12
    # Blocks of 16 tokens, of which a head reads 4.
    playwright.expect(page.locator("#fig-blocks")).to_contain_text(re.compile(r"^4of \d+, 16 "))
    tokens.first.hover()
    playwright.expect(page.locator("#token-label")).to_have_text(re.compile("^1 of "))
    playwright.expect(tokens.first).to_have_class(re.compile("chosen"))
    assert page.evaluate("getComputedStyle(document.body).fontSize") == "15px"


def test_the_map_can_be_read_with_the_keyboard(page: "playwright.Page") -> None:
    ask(page, "hello there, reader", max_tokens="4")
    page.locator("#map").press("ArrowRight")
    page.locator("#map").press("ArrowDown")
    title = page.locator("#inspect-title")
    playwright.expect(title).to_contain_text("Block 0 (always read), tokens 0 to 15")
    playwright.expect(title).to_contain_text("Layer 0, KV head 1 reads it")
    playwright.expect(page.locator("#inspect-text")).to_contain_text("<|im_start|>user")
    page.locator("#mode-answer").click()
    playwright.expect(title).to_contain_text("reads it for 100% of the tokens")


# In the page: the tiny model would be done before a click from outside arrives.
_STOP_AT_FIRST_TOKEN = """() => new MutationObserver((changes, observer) => {
    if (!document.querySelector(".turn.assistant .tok")) return;
    observer.disconnect();
    document.getElementById("stop").click();
}).observe(document.body, { childList: true, subtree: true })"""


def go_on(route: "playwright.Route") -> None:
    """Ask for an answer that does not end by itself."""
    route.continue_(post_data=route.request.post_data_json | {"ignore_eos": True})


def test_an_answer_can_be_stopped_and_the_chat_goes_on(page: "playwright.Page") -> None:
    page.route("**/v1/chat/completions", go_on, times=1)
    page.locator("#max_tokens").fill("600")
    page.locator("#prompt").fill("go")
    page.evaluate(_STOP_AT_FIRST_TOKEN)
    page.locator("#send").click()
    playwright.expect(page.locator(".meta")).to_contain_text("stopped")
    ask(page, "again", max_tokens="3")
    assert page.locator(".turn.user").count() == 2
    page.locator("#clear").click()
    playwright.expect(page.locator("#welcome")).to_be_visible()


def test_a_refusal_is_shown_and_the_question_kept(page: "playwright.Page") -> None:
    ask(page, "word " * 2000)
    playwright.expect(page.locator(".problem")).to_contain_text("max_model_len")
    assert page.locator(".turn").count() == 0
    assert page.locator("#prompt").input_value().startswith("word word")


def test_markup_of_the_reader_stays_text(page: "playwright.Page") -> None:
    ask(page, "<img src=x onerror=alert(1)><script>alert(2)</script>", max_tokens="2")
    assert page.locator("#log img, #log script").count() == 0
    playwright.expect(page.locator(".turn.user")).to_contain_text("<img src=x")
