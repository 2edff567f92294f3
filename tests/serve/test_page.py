"""The chat page in a browser, connected to a server: what a user types, clicks and sees."""

from __future__ import annotations

import json
import re
import shutil
import time
from importlib import resources

import httpx
import pytest

from hqlt.data import load_tokenizer
from hqlt.language.template import chat_tokens
from tests.serve.browser import Browser, browsing
from tests.serve.conftest import served
from tests.serve.test_openai import MODEL, alone

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
PAGE = (resources.files("hqlt.serve") / "page.html").read_text(encoding="utf-8")
TOKENS = 12


def test_the_page_loads_no_other_resources():
    assert not re.search(r"https?:|//\w+\.|@import|\bsrc=|url\(", PAGE)
    assert "innerHTML" not in PAGE and "insertAdjacentHTML" not in PAGE and "document.write" not in PAGE
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', PAGE)
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert CHROMIUM is not None
    with browsing(CHROMIUM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def url():
    with served(MODEL) as url:
        yield url


class User:
    """Reads the page as text and uses it with keys and by the labels of its buttons."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser, self.url = browser, url
        browser.look(1280, 800)
        browser.visit(url)
        browser.until("document.title === 'small' || document.getElementById('settings').open")

    def see(self, selector: str) -> list[str]:
        """The texts of the visible elements that match a selector."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].filter((x) => x.checkVisibility())"
        return self.browser.ask(f"{found}.map((x) => x.innerText.trim())")

    def press(self, name: str, place: str = "body", last: bool = True) -> None:
        """Click a button by its text or label: the last (or first) with this name."""
        at = -1 if last else 0
        self.browser.ask(
            f"[...document.querySelectorAll({json.dumps(place + ' button')})].filter((x) => x.checkVisibility() && "
            f"[x.textContent, x.ariaLabel].includes({json.dumps(name)})).at({at}).click()"
        )

    def send(self, text: str) -> None:
        self.browser.ask("document.getElementById('question').focus()")
        self.browser.type(text)
        self.browser.press("Enter", 13)

    def wait(self) -> None:
        """Wait until no answer is being generated."""
        self.browser.until("document.getElementById('send').textContent === 'Send'")

    def set(self, **fields: object) -> None:
        if not self.see("#settings"):
            self.press("Settings")
        for name, value in fields.items():
            self.browser.ask(f"document.getElementById({json.dumps(name)}).value = {json.dumps(str(value))}")
        self.press("Done")

    def texts(self) -> list[str]:
        return self.see("#log .text")

    def counts(self) -> list[tuple[int, int]]:
        """Tokens read and reused for each answer."""
        lines = " ".join(self.see("#log .figures"))
        return [(int(read), int(reused)) for read, reused in re.findall(r"(\d+) read, (\d+) reused", lines)]


@pytest.fixture
def user(browser, url):
    user = User(browser, url)
    user.set(temperature=0, max_tokens=TOKENS)
    return user


def answers_to(questions: list[str]) -> list[str]:
    """The answer to each question, given the conversation before it."""
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        text = alone(bytes(chat_tokens(load_tokenizer("bytes"), messages)), TOKENS)
        messages.append({"role": "assistant", "content": text})
    return [message["content"].strip() for message in messages[1::2]]


@needs_browser
def test_a_conversation(user):
    """Ask, regenerate, edit, fork and delete; each turn reads only new tokens."""
    questions = ["Where is the Louvre?", "<img src=x onerror='document.title=1'><b>Where?</b>"]
    one, two = answers_to(questions)
    for question in questions:
        user.send(question)
        user.wait()
    assert user.texts() == [questions[0], one, questions[1], two]
    assert user.browser.ask("document.querySelectorAll('img, #log b').length") == 0
    (first, none), (second, reused) = user.counts()
    assert none == 0 and reused > first and second < len(questions[1]) + 40
    assert all(re.match(r"first token after \d+\.\d\d s", line) for line in user.see("#log .figures"))

    user.browser.ask("document.querySelector('#log .turn:last-child button').focus()")  # Regenerate
    user.browser.press("Enter", 13)
    user.wait()
    assert user.browser.ask("document.activeElement.id") == "log"
    assert user.texts()[-1] == two and user.counts()[-1] == (1, second + reused - 1)

    user.browser.ask("document.getElementById('question').focus()")
    user.browser.press("ArrowUp", 38)
    assert user.browser.ask("document.getElementById('question').value") == questions[1]
    user.browser.press("Escape", 27)
    assert user.see("#notice") == []
    user.press("Edit")
    assert user.see("#notice span") == ["Your edited question will replace the last one."]
    user.browser.ask("document.getElementById('question').select()")
    user.send("Why?")
    user.wait()
    assert user.texts()[2:] == ["Why?", answers_to([questions[0], "Why?"])[1]] and user.counts()[-1][1] > first

    user.press("Fork", last=False)
    assert user.texts() == [questions[0], one] and len(user.see("#list li")) == 2
    again = User(user.browser, user.url)
    assert again.texts() == [] and again.see("#list li button:first-child") == [questions[0]] * 2
    again.browser.ask("document.querySelectorAll('#list li button')[2].click()")
    assert len(again.texts()) == 4
    again.browser.ask("confirm = () => true; document.querySelectorAll('#list li button')[1].click()")
    assert len(again.see("#list li")) == 1


@needs_browser
def test_stopping_an_answer(user, url):
    """With the button and with Escape: its row is freed, and the text so far stays."""
    user.set(max_tokens=16_000)
    for i, stop in enumerate((lambda: user.press("Stop"), lambda: user.browser.press("Escape", 27))):
        user.send("Where is the Louvre?")
        user.browser.until("document.querySelector('.running .text')?.textContent.length > 20")
        stop()
        user.wait()
        assert len(user.texts()) == 2 * i + 2 and len(user.texts()[-1]) > 20
        assert re.fullmatch(r"first token after \d\.\d\d s\s+stopped", user.see("#log .figures")[-1])
        end = time.monotonic() + 60
        while httpx.get(f"{url}/health").json()["running"]:
            assert time.monotonic() < end
    user.set(max_tokens=TOKENS)
    user.send("Why?")
    user.wait()
    assert user.counts()[-1][1] > 0  # the states were stored


@needs_browser
def test_leaving_the_page_during_an_answer(user, url):
    """The text so far is restored; a question without an answer is back in the input field."""
    user.set(max_tokens=16_000)
    user.send("Where is the Louvre?")
    user.browser.until("document.querySelector('.running .text')?.textContent.length > 20")
    again = User(user.browser, url)
    again.press("Where is the Louvre?", "#list")
    assert again.texts()[0] == "Where is the Louvre?" and len(again.texts()[1]) > 20
    again.browser.ask("fetch = () => new Promise(() => {})")  # a server that does not respond
    again.send("Why?")
    again.browser.ask("localStorage.setItem('hqlt.chat.broken', '{')")
    once_more = User(user.browser, url)
    once_more.press("Where is the Louvre?", "#list")
    assert len(once_more.texts()) == 2 and once_more.browser.ask("document.getElementById('question').value") == "Why?"


@needs_browser
def test_a_refused_question_can_be_sent_again(user):
    user.set(max_tokens=20_000)
    user.send("Where is the Louvre?")
    user.browser.until("document.querySelector('#notice .wrong')")
    assert "max_tokens: expected 1 to 16,384 tokens, got 20,000" in user.see("#notice")[0]
    assert user.texts() == [] and user.browser.ask("document.getElementById('question').value") != ""
    user.set(max_tokens=TOKENS)
    user.press("Send")
    user.browser.until("document.querySelectorAll('#log .figures').length")
    assert user.texts() == ["Where is the Louvre?", *answers_to(["Where is the Louvre?"])]


@needs_browser
def test_the_api_key_is_requested_and_not_stored(browser):
    with served(MODEL, keys=["secret"]) as url:
        user = User(browser, url)
        user.browser.until("document.querySelector('#notice .wrong')")
        user.set(key="secret", temperature=0, max_tokens=TOKENS)
        user.browser.until("document.title === 'small'")
        assert user.see("#notice") == []
        user.send("Where is the Louvre?")
        user.browser.until("document.querySelectorAll('#log .figures').length")
        assert user.texts()[1:] == answers_to(["Where is the Louvre?"])
        assert "secret" not in browser.ask("JSON.stringify({...localStorage}) + document.cookie")


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_layout_and_colour_scheme(user, width, dark):
    """Nothing overflows, also at the width of a phone, and dark mode is dark."""
    browser = user.browser
    user.send("Where is the Louvre, " + "and the longest word of all, " * 9 + "a" * 200 + "?")
    browser.until("document.querySelectorAll('#log .figures').length")
    browser.look(width, 800, dark)
    wide = "[...document.querySelectorAll('main *')].filter((x) => x.getBoundingClientRect().right > innerWidth)"
    assert browser.ask(f"{wide}.length + document.documentElement.scrollWidth") == width
    (red, *_) = map(int, re.findall(r"\d+", browser.ask("getComputedStyle(document.body).backgroundColor")))
    assert (red < 50) == dark
    assert bool(user.see("#list li")) == (width == 1280)
    if width == 400:
        user.press("Conversations")
        assert len(user.see("#list li")) == 1
        browser.press("Escape", 27)
        assert user.see("#list li") == []
