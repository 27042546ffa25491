"""The Space as its visitors meet it: in a browser, and by gradio's client. The app runs in a process of its own."""

import json
import os
import re
import shutil
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import pairwise

import httpx
import pytest
from demo_model import save_demo_model, serving
from gradio_client import Client, handle_file
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from aligngpt_hub.demo.space import TEMPLATE, Model, render_space


QUESTION = "what is in the picture?"
EXAMPLES = json.loads((TEMPLATE / "examples" / "examples.json").read_text())
# the Space's folder has to do without this project's packages
ALONE = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_aligngpt", "aligngpt_trainers", "aligngpt_hub", "aligngpt_playground"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, ".")
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_demo_model(tmp_path_factory.mktemp("models") / "demo")


@pytest.fixture(scope="module")
def app(model_folder, tmp_path_factory):
    """The address of a rendered Space, and its folder."""
    home = tmp_path_factory.mktemp("space")
    folder = render_space(home / "space", Model("user/demo", "0" * 40, []))
    variables = {
        "MODEL_ID": str(model_folder),
        "GRADIO_TEMP_DIR": str(home / "uploads"),
        "HF_MODULES_CACHE": str(home / "modules"),
    }
    with serving(["-c", ALONE], r"[Rr]unning on local URL:\s+(http://\S+)", folder, **variables) as match:
        yield match.group(1).rstrip("/"), folder


@pytest.fixture(scope="module")
def client(app):
    return Client(app[0], verbose=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images that are fine and that are not."""
    folder = tmp_path_factory.mktemp("files")
    whole = (TEMPLATE / "examples" / "teddy-and-car.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "heavy.png").write_bytes(whole + bytes(11 * 2**20))
    Image.new("1", (9000, 6000)).save(folder / "wide.png")
    Image.open(TEMPLATE / "examples" / "teddy-and-car.png").convert("RGB").resize((300, 150)).save(folder / "fine.jpg")
    return folder


# ---- by gradio's client ----


def test_answers_come_in_pieces_and_with_their_alignment(client, files):
    pieces = list(client.submit(handle_file(str(files / "fine.jpg")), QUESTION, -1, api_name="/ask"))
    assert len(pieces) > 5
    texts = [text for text, _ in pieces]
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(texts))
    assert "bus" in texts[-1]
    alignment = pieces[-1][1]
    assert sum(alignment["gate"]) == pytest.approx(1, abs=1e-3) and alignment["shares"][7] == 1
    assert alignment["ending"] == "end" and all(seen is None for _, seen in pieces[:-1])
    steered, alignment = client.predict(handle_file(str(files / "fine.jpg")), QUESTION, 3, api_name="/ask")
    assert "pizza" in steered and steered != texts[-1]
    assert alignment["shares"] == [0, 0, 0, 1, 0, 0, 0, 0]


def test_many_quick_requests_are_answered_or_told_to_wait(app, client, files):
    image = handle_file(str(files / "fine.jpg"))
    expected = client.predict(image, "what?", 5, api_name="/ask")[0]

    def ask(_):
        try:
            return client.predict(image, "what?", 5, api_name="/ask")[0]
        except Exception as error:
            return error

    with ThreadPoolExecutor(60) as pool:
        outcomes = list(pool.map(ask, range(60)))
    answered = [outcome for outcome in outcomes if isinstance(outcome, str)]
    refused = [str(outcome) for outcome in outcomes if not isinstance(outcome, str)]
    assert set(answered) == {expected} and len(answered) >= 32
    assert refused and all("Queue is full" in reason for reason in refused), set(refused)
    # and the server is as it was
    assert client.predict(image, "what?", 5, api_name="/ask")[0] == expected


def test_refusals_say_what_is_wrong(client, files):
    for name, question, level, message in [
        ("broken.png", QUESTION, -1, "damaged and cannot be read"),
        ("wide.png", QUESTION, -1, "9000 x 6000 pixels"),
        ("fine.jpg", "", -1, "no question yet"),
        ("fine.jpg", "an <image>?", -1, "holds <image>"),
        ("fine.jpg", QUESTION, 8, "not in the list of choices"),
    ]:
        with pytest.raises(Exception, match=re.escape(message)):
            client.predict(handle_file(str(files / name)), question, level, api_name="/ask")


def test_eleven_megabytes_are_refused(app, client, files):
    with pytest.raises(ValueError, match="exceeds the maximum file size of 10485760 bytes"):
        client.predict(handle_file(str(files / "heavy.png")), QUESTION, -1, api_name="/ask")
    # by the server too, whatever a client thinks
    with (files / "heavy.png").open("rb") as file:
        answer = httpx.post(f"{app[0]}/gradio_api/upload", files={"files": ("heavy.png", file)})
    assert answer.status_code == 413


def test_no_other_file_is_readable(app, files):
    url, folder = app
    for path in ("/etc/passwd", folder / "app.py", folder / "settings.json", "app.py", files / "fine.jpg"):
        assert httpx.get(f"{url}/gradio_api/file={path}").status_code == 403
    image = str(folder / "examples" / "whale-and-balloon.png")
    for payload in (
        {"path": image},
        {"path": image, "meta": {"_type": "gradio.FileData"}},
        {"path": None, "url": image},
        {"path": f"{url}/x.png", "url": f"{url}/x.png", "meta": {"_type": "gradio.FileData"}},
    ):
        asked = httpx.post(f"{url}/gradio_api/call/ask", json={"data": [payload, QUESTION, -1]}).json()
        said = httpx.get(f"{url}/gradio_api/call/ask/{asked['event_id']}", timeout=30).text
        assert said.startswith("event: error"), (payload, said)


def test_only_asking_is_open_to_programs(client):
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/ask"]


# ---- in a browser ----


BROWSER, DRIVER = (shutil.which(names[0]) or shutil.which(names[-1]) for names in (
    ("chromium", "google-chrome"), ("chromedriver", "chromium.chromedriver"),
))  # fmt: skip
# `make test` installs both where it may; on CI, where it may, a skip would hide what is promised
NO_BROWSER = not (BROWSER and DRIVER)
needs_browser = pytest.mark.skipif(NO_BROWSER and not os.environ.get("CI"), reason="no chromium on this machine")


def open_browser(width: int, height: int) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument(f"--window-size={width},{height}")
    if width < 500:
        metrics = {"width": width, "height": height, "pixelRatio": 1}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    options.binary_location = BROWSER
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


# every text that the answer's bubble shows
WATCH = """
window.seen = [];
new MutationObserver(() => {
  const bubble = [...document.querySelectorAll("#chat .bot.message")].pop();
  const text = bubble ? bubble.innerText.trim() : "";
  if (text && text !== window.seen[window.seen.length - 1]) window.seen.push(text);
}).observe(document.querySelector("#chat"), {subtree: true, childList: true, characterData: true});
"""


class Page:
    """The page in a browser, in the words of its visitors."""

    def __init__(self, driver: webdriver.Chrome, url: str):
        self.driver = driver
        driver.get(url)
        self.until(lambda: self.element("ask").is_displayed())

    def element(self, name: str):
        return self.driver.find_element(By.ID, name)

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, condition, seconds: float = 60):
        end, last = time.monotonic() + seconds, None
        while time.monotonic() < end:
            try:
                if found := condition():
                    return found
            # an element may be replaced while it is read
            except Exception as error:
                last = error
            time.sleep(0.05)
        status = [element.text for element in self.all("#status, #notice")]
        raise AssertionError(f"waited in vain; the page says {status}; {last}")

    def upload(self, path):
        self.all("#image input[type=file]")[0].send_keys(str(path))

    def write(self, text: str):
        self.until(lambda: self.all("#question textarea")[0].is_enabled())
        self.all("#question textarea")[0].send_keys(text)

    def answers(self, chat: str = "chat") -> list[str]:
        return [element.text for element in self.all(f"#{chat} .bot.message")]

    def says(self, text: str, where: str = "status"):
        self.until(lambda: text in self.element(where).text)

    def answered(self, count: int, chat: str = "chat") -> str:
        self.until(lambda: len(self.answers(chat)) == count and "Answered" in self.element("status").text)
        return self.answers(chat)[-1]

    def choose(self, control: str, index: int):
        self.all(f"#{control} input")[index].click()

    def shares(self) -> list[list[str]]:
        """The shares in each table of bars."""
        return [
            [cell.text for cell in table.find_elements(By.CSS_SELECTOR, ".share")] for table in self.all("table.levels")
        ]


@pytest.fixture(scope="module")
def desktop(app):
    if NO_BROWSER:
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop("no chromium and chromedriver on this machine")
    driver = open_browser(1280, 900)
    yield driver
    driver.quit()


@needs_browser
def test_upload_ask_and_see_the_alignment(app, desktop, files):
    page = Page(desktop, app[0])
    page.upload(files / "fine.jpg")
    page.says("ready (300 x 150 pixels)", "notice")
    page.write(QUESTION)
    page.driver.execute_script(WATCH)
    page.element("ask").click()
    answer = page.answered(1)
    # it was seen while it grew
    grown = page.driver.execute_script("return window.seen")
    assert len(grown) > 2 and grown[-1] == answer
    assert all(answer.startswith(text) for text in grown), grown
    (shares,) = page.shares()
    assert len(shares) == 8 and shares[7] == "1.00" and "1.00" not in shares[:7]
    # 300 x 150 padded to a square: two of the four rows of patches are the image's
    assert len(page.all("#heat rect")) == 8
    assert page.all("#heat svg")[0].get_attribute("aria-label").startswith("Heat map of 4 by 4 patches")

    page.choose("level", 4)
    page.element("retry").click()
    page.until(lambda: page.shares() and page.shares()[0][3] == "1.00")
    fixed = page.answered(1)
    assert fixed != answer and "pizza" in fixed
    assert page.all("table.levels caption")[0].text == "Fixed at level 3"

    page.write("where?")
    page.element("ask").click()
    page.answered(2)
    assert [element.text for element in page.all("#chat .user.message")] == [QUESTION, "where?"]
    page.element("clear").click()
    page.until(lambda: not page.answers() and not page.all("#heat svg") and not page.all("table.levels"))


@needs_browser
def test_an_example_brings_its_questions_and_sampling_is_a_setting(app, desktop):
    page = Page(desktop, app[0])
    page.all("#examples button")[1].click()
    page.says("ready", "notice")
    offered = [button for button in page.all("#suggestions button") if button.is_displayed()]
    assert [button.text for button in offered] == EXAMPLES[1]["questions"]
    assert page.element("question").find_element(By.CSS_SELECTOR, "textarea").get_attribute("value") == offered[0].text
    offered[1].click()
    page.until(lambda: page.all("#question textarea")[0].get_attribute("value") == EXAMPLES[1]["questions"][1])
    page.element("ask").click()
    greedy = page.answered(1)
    page.all("#sampling button")[0].click()
    length = page.until(lambda: [each for each in page.all("#sampling input[type=number]") if each.is_displayed()])[-1]
    length.send_keys(Keys.CONTROL, "a")
    length.send_keys("1" + Keys.TAB)
    page.element("retry").click()
    page.until(lambda: "It was cut" in page.element("status").text)
    assert greedy.startswith(page.answers()[-1]) and len(page.answers()[-1]) < len(greedy)


# an image that another program has put on the clipboard
COPY = """
const done = arguments[arguments.length - 1];
const bytes = Uint8Array.from(atob(arguments[0]), letter => letter.charCodeAt(0));
const item = new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})});
navigator.clipboard.write([item]).then(() => done("copied"), error => done(String(error)));
"""


@needs_browser
def test_a_pasted_image(app, desktop):
    page = Page(desktop, app[0])
    allowed = {"origin": app[0], "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    desktop.execute_cdp_cmd("Browser.grantPermissions", allowed)
    content = BytesIO()
    Image.new("RGB", (120, 90), "red").save(content, "PNG")
    assert desktop.execute_async_script(COPY, b64encode(content.getvalue()).decode()) == "copied"
    page.all("#image button[aria-label='Paste from clipboard']")[0].click()
    page.says("ready (120 x 90 pixels)", "notice")
    page.write(QUESTION + Keys.ENTER)
    assert page.answered(1)


@needs_browser
def test_two_levels_side_by_side(app, client, desktop, files):
    page = Page(desktop, app[0])
    page.upload(files / "fine.jpg")
    page.says("ready", "notice")
    page.choose("level", 5)
    page.element("compare").find_element(By.CSS_SELECTOR, "input").click()
    page.until(lambda: page.element("other").is_displayed())
    page.choose("second", 4)
    page.write(QUESTION + Keys.ENTER)
    first, second = page.answered(1), page.answered(1, "other")
    image = handle_file(str(files / "fine.jpg"))
    expected = [client.predict(image, QUESTION, level, api_name="/ask")[0] for level in (4, 3)]
    assert [first, second] == expected and first != second
    assert [shares.index("1.00") for shares in page.shares()] == [4, 3]
    left, right = (page.element(name).rect for name in ("chat", "other"))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    page.until(lambda: "Fixed at level 4" in page.element("chat").text and "level 3" in page.element("other").text)


@needs_browser
def test_errors_stand_where_they_belong_and_nothing_is_lost(app, desktop, files):
    page = Page(desktop, app[0])
    page.write(QUESTION)
    page.element("ask").click()
    page.says("There is no image yet")
    page.upload(files / "broken.png")
    page.says("The image is damaged and cannot be read: image file is truncated.", "notice")
    assert page.all("#notice [role=alert]")
    page.upload(files / "heavy.png")
    page.until(lambda: "exceed the maximum allowed size" in page.all(".toast-body")[-1].text)
    page.upload(files / "fine.jpg")
    page.says("ready", "notice")
    # the question that could not be asked is still there
    assert page.all("#question textarea")[0].get_attribute("value") == QUESTION
    page.element("ask").click()
    page.answered(1)
    page.write("what is <image>?" + Keys.ENTER)
    page.says("holds <image>")
    assert len(page.answers()) == 1
    # another image, another conversation
    page.all("#image button[aria-label='Remove Image']")[0].click()
    page.until(lambda: not page.answers())


@needs_browser
def test_a_phones_width_by_keyboard_and_screen_reader(app):
    driver = open_browser(390, 844)
    try:
        page = Page(driver, app[0])
        # from the top of the page to an example, and from there to the answer, without a pointer
        for _ in range(12):
            driver.switch_to.active_element.send_keys(Keys.TAB)
            if driver.switch_to.active_element.text.startswith("Example"):
                break
        driver.switch_to.active_element.send_keys(Keys.ENTER)
        page.says("ready (384 x 384 pixels)", "notice")
        page.until(lambda: page.all("#question textarea")[0].get_attribute("value"))
        page.all("#question textarea")[0].send_keys(Keys.ENTER)
        page.answered(1)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        for name in ("image", "level", "chat", "question", "ask", "bars", "heat"):
            box = page.element(name).rect
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] > 20, (name, box)
        nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        roles = ("button", "textbox", "radio", "checkbox", "table", "image")
        named = [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node.get("ignored") and node.get("role", {}).get("value") in roles
        ]
        # icons inside buttons that have a name need none
        assert [role for role, name in named if not name and role != "image"] == []
        assert {name.split(" of ")[0] for role, name in named if role == "image"} >= {
            "Heat map",
            "The image that is asked about",
        }
        asked = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        urls = {entry["params"]["request"]["url"] for entry in asked if entry["method"] == "Network.requestWillBeSent"}
        assert urls and all(url.startswith((app[0], "data:", "blob:")) for url in urls), urls
    finally:
        driver.quit()
