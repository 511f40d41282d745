"""The page in a real browser: Chromium, driven by Playwright, against a real server with a scripted model."""

import shutil
import threading

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome in PATH (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="the dev group of the workspace has playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """open_page(server) -> a page on which no script has failed, nothing was blocked and no other host was asked."""
    complaints, contexts = [], []

    def open_it(server, **options):
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(5_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if "Content Security" in said.text else None)
        page.on(
            "request",
            lambda asked: asked.url.startswith((server.url, "data:", "blob:")) or complaints.append(asked.url),
        )
        page.goto(server.url)
        page.get_by_text("ghostvis-test").wait_for()
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []


def test_a_person_uploads_a_picture_asks_and_watches_the_answer_grow(serve, scripted, png, tmp_path, open_page):
    (tmp_path / "red.png").write_bytes(png)
    model = scripted("I see <b>a</b> red circle.", gate=threading.Event())
    page = open_page(serve(model))
    assert page.get_by_label("Send").is_disabled()
    with page.expect_file_chooser() as chooser:
        page.get_by_label("Add pictures").click()
    chooser.value.set_files(tmp_path / "red.png")
    page.get_by_alt_text("Picture 1 for the next question").wait_for()
    page.get_by_label("Your question").fill("What is it?")
    page.keyboard.press("Enter")

    answer = page.locator(".assistant p")
    page.locator(".assistant.writing").get_by_text(
        "I", exact=True
    ).wait_for()  # the first word, before the others exist
    assert page.get_by_alt_text("Picture you showed").evaluate("image => image.naturalWidth") == 40
    model.gate.set()
    page.locator(".assistant:not(.writing)").wait_for()
    assert answer.inner_text() == "I see <b>a</b> red circle."
    content = model.asked[0][0]["content"]
    assert (content[0]["image"].size, content[1]["text"]) == ((40, 30), "What is it?")

    page.get_by_label("Your question").fill("Sure?")
    page.keyboard.press("Enter")
    page.locator(".assistant:not(.writing)").nth(1).wait_for()
    assert [message["role"] for message in model.asked[1]] == ["user", "assistant", "user"]
    assert model.asked[1][2]["content"] == "Sure?"

    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0
    page.get_by_label("Your question").fill("Hello")
    page.get_by_label("Send").click()
    page.locator(".assistant:not(.writing)").wait_for()
    assert model.asked[2] == [{"role": "user", "content": "Hello"}]


def test_stop_keeps_what_was_said_and_frees_the_model(serve, scripted, open_page, eventually):
    model = scripted("one two three four five six", gate=threading.Event())
    page = open_page(serve(model))
    page.get_by_label("Your question").fill("Count")
    page.keyboard.press("Enter")
    page.get_by_text("one", exact=True).wait_for()
    page.get_by_label("Stop the answer").click()
    page.get_by_text("stopped", exact=True).wait_for()
    assert page.locator(".assistant p").inner_text() == "one"
    model.gate.set()
    eventually(lambda: model.writing == 0)
    assert model.words_said < 6


def test_a_question_that_fails_is_given_back_with_its_picture(serve, scripted, png, open_page):
    model = scripted(error=ValueError("a bug"))
    page = open_page(serve(model))
    page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png})
    page.get_by_alt_text("Picture 1 for the next question").wait_for()
    page.get_by_label("Your question").fill("What?")
    page.keyboard.press("Enter")
    page.get_by_role("alert").get_by_text("internal error").wait_for()
    assert page.get_by_label("Your question").input_value() == "What?"
    assert page.locator(".turn").count() == 0
    model.error = None
    page.keyboard.press("Enter")
    page.locator(".assistant:not(.writing)").wait_for()
    assert [part["type"] for part in model.asked[-1][0]["content"]] == ["image", "text"]
    assert page.get_by_role("alert").count() == 0


def test_pictures_are_taken_by_drop_and_paste_and_can_be_removed(serve, scripted, png, open_page):
    page = open_page(serve(scripted()))
    for kind, holder in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(
            """([kind, holder, bytes]) => {
              const data = new DataTransfer();
              data.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
              const event = kind === "drop" ? DragEvent : ClipboardEvent;
              document.dispatchEvent(new event(kind, { [holder]: data, bubbles: true, cancelable: true }));
            }""",
            [kind, holder, list(png)],
        )
    page.get_by_alt_text("Picture 2 for the next question").wait_for()
    page.get_by_label("Remove picture 1").click()
    assert page.locator("#waiting img").count() == 1


def test_the_page_fits_a_phone(serve, scripted, open_page):
    page = open_page(serve(scripted("word " * 200 + "x" * 300)), viewport={"width": 360, "height": 640})
    page.get_by_label("Your question").fill("A long " + "question " * 20 + "y" * 200)
    page.get_by_label("Send").click()
    page.locator(".assistant:not(.writing)").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.get_by_label("Send").bounding_box()
    assert box["y"] + box["height"] <= 640
