"""The chat page in a browser, against a server: what a person types, presses and sees."""

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


def test_one_file_that_loads_nothing_from_elsewhere():
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


class Person:
    """Sees the page as text, and uses it by keys and by the names on its buttons."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser, self.url = browser, url
        browser.look(1280, 800)
        browser.visit(url)
        browser.until("document.title === 'small' || document.getElementById('settings').open")

    def see(self, selector: str) -> list[str]:
        """The texts of what a selector finds and is not hidden."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].filter((x) => x.checkVisibility())"
        return self.browser.ask(f"{found}.map((x) => x.innerText.trim())")

    def press(self, name: str, place: str = "body", last: bool = True) -> None:
        """A button, by its text or label: the last (or first) of this name."""
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
        """Until no answer runs."""
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
        """Of each answer: tokens read, and reused."""
        lines = " ".join(self.see("#log .figures"))
        return [(int(read), int(reused)) for read, reused in re.findall(r"(\d+) read, (\d+) reused", lines)]


@pytest.fixture
def person(browser, url):
    person = Person(browser, url)
    person.set(temperature=0, max_tokens=TOKENS)
    return person


def answers_to(questions: list[str]) -> list[str]:
    """Each, to all that was said before."""
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        text = alone(bytes(chat_tokens(load_tokenizer("bytes"), messages)), TOKENS)
        messages.append({"role": "assistant", "content": text})
    return [message["content"].strip() for message in messages[1::2]]


@needs_browser
def test_a_conversation(person):
    """Asked, asked again, changed, forked and kept; each turn reads only what is new."""
    questions = ["Where is the Louvre?", "<img src=x onerror='document.title=1'><b>Where?</b>"]
    one, two = answers_to(questions)
    for question in questions:
        person.send(question)
        person.wait()
    assert person.texts() == [questions[0], one, questions[1], two]
    assert person.browser.ask("document.querySelectorAll('img, #log b').length") == 0
    (first, none), (second, reused) = person.counts()
    assert none == 0 and reused > first and second < len(questions[1]) + 40
    assert all(re.match(r"first token after \d+\.\d\d s", line) for line in person.see("#log .figures"))

    person.browser.ask("document.querySelector('#log .turn:last-child button').focus()")  # Regenerate
    person.browser.press("Enter", 13)
    person.wait()
    assert person.browser.ask("document.activeElement.id") == "log"
    assert person.texts()[-1] == two and person.counts()[-1] == (1, second + reused - 1)

    person.browser.ask("document.getElementById('question').focus()")
    person.browser.press("ArrowUp", 38)
    assert person.browser.ask("document.getElementById('question').value") == questions[1]
    person.browser.press("Escape", 27)
    assert person.see("#notice") == []
    person.press("Edit")
    assert person.see("#notice span") == ["Your changed question takes the place of the last one."]
    person.browser.ask("document.getElementById('question').select()")
    person.send("Why?")
    person.wait()
    assert person.texts()[2:] == ["Why?", answers_to([questions[0], "Why?"])[1]] and person.counts()[-1][1] > first

    person.press("Fork", last=False)
    assert person.texts() == [questions[0], one] and len(person.see("#list li")) == 2
    again = Person(person.browser, person.url)
    assert again.texts() == [] and again.see("#list li button:first-child") == [questions[0]] * 2
    again.browser.ask("document.querySelectorAll('#list li button')[2].click()")
    assert len(again.texts()) == 4
    again.browser.ask("confirm = () => true; document.querySelectorAll('#list li button')[1].click()")
    assert len(again.see("#list li")) == 1


@needs_browser
def test_an_answer_that_is_stopped(person, url):
    """By the button and by Escape: its row is free, and what was said stays."""
    person.set(max_tokens=16_000)
    for i, stop in enumerate((lambda: person.press("Stop"), lambda: person.browser.press("Escape", 27))):
        person.send("Where is the Louvre?")
        person.browser.until("document.querySelector('.running .text')?.textContent.length > 20")
        stop()
        person.wait()
        assert len(person.texts()) == 2 * i + 2 and len(person.texts()[-1]) > 20
        assert re.fullmatch(r"first token after \d\.\d\d s\s+stopped", person.see("#log .figures")[-1])
        end = time.monotonic() + 60
        while httpx.get(f"{url}/health").json()["running"]:
            assert time.monotonic() < end
    person.set(max_tokens=TOKENS)
    person.send("Why?")
    person.wait()
    assert person.counts()[-1][1] > 0  # the states of what was read are there


@needs_browser
def test_a_page_that_is_left_in_the_middle(person, url):
    """What was said so far is there again; a question to which nothing was is in its field again."""
    person.set(max_tokens=16_000)
    person.send("Where is the Louvre?")
    person.browser.until("document.querySelector('.running .text')?.textContent.length > 20")
    again = Person(person.browser, url)
    again.press("Where is the Louvre?", "#list")
    assert again.texts()[0] == "Where is the Louvre?" and len(again.texts()[1]) > 20
    again.browser.ask("fetch = () => new Promise(() => {})")  # a server that does not answer
    again.send("Why?")
    again.browser.ask("localStorage.setItem('hqlt.chat.broken', '{')")
    once_more = Person(person.browser, url)
    once_more.press("Where is the Louvre?", "#list")
    assert len(once_more.texts()) == 2 and once_more.browser.ask("document.getElementById('question').value") == "Why?"


@needs_browser
def test_what_the_server_refuses_can_be_sent_again(person):
    person.set(max_tokens=20_000)
    person.send("Where is the Louvre?")
    person.browser.until("document.querySelector('#notice .wrong')")
    assert "max_tokens: expected 1 to 16,384 tokens of an answer, got 20,000" in person.see("#notice")[0]
    assert person.texts() == [] and person.browser.ask("document.getElementById('question').value") != ""
    person.set(max_tokens=TOKENS)
    person.press("Send")
    person.browser.until("document.querySelectorAll('#log .figures').length")
    assert person.texts() == ["Where is the Louvre?", *answers_to(["Where is the Louvre?"])]


@needs_browser
def test_a_key_is_asked_for_and_not_kept(browser):
    with served(MODEL, keys=["secret"]) as url:
        person = Person(browser, url)
        person.browser.until("document.querySelector('#notice .wrong')")
        person.set(key="secret", temperature=0, max_tokens=TOKENS)
        person.browser.until("document.title === 'small'")
        assert person.see("#notice") == []
        person.send("Where is the Louvre?")
        person.browser.until("document.querySelectorAll('#log .figures').length")
        assert person.texts()[1:] == answers_to(["Where is the Louvre?"])
        assert "secret" not in browser.ask("JSON.stringify({...localStorage}) + document.cookie")


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_as_it_looks(person, width, dark):
    """Nothing is cut off at the side, at the width of a phone either, and dark is dark."""
    browser = person.browser
    person.send("Where is the Louvre, " + "and the longest word of all, " * 9 + "a" * 200 + "?")
    browser.until("document.querySelectorAll('#log .figures').length")
    browser.look(width, 800, dark)
    wide = "[...document.querySelectorAll('main *')].filter((x) => x.getBoundingClientRect().right > innerWidth)"
    assert browser.ask(f"{wide}.length + document.documentElement.scrollWidth") == width
    (red, *_) = map(int, re.findall(r"\d+", browser.ask("getComputedStyle(document.body).backgroundColor")))
    assert (red < 50) == dark
    assert bool(person.see("#list li")) == (width == 1280)
    if width == 400:
        person.press("Conversations")
        assert len(person.see("#list li")) == 1
        browser.press("Escape", 27)
        assert person.see("#list li") == []
