"""The pictures of the pages in docs/: a real server, real models, a headless browser.

python docs/screenshots.py            needs runs/demo (make demo) and smollm2-135m (tael pull); about a minute
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

DOCS = Path(__file__).parent
PORT = 8017
URL = f"http://localhost:{PORT}"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
PATIENCE = 240_000


def main() -> None:
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "tael", "serve", "smollm2-135m", "demo", "--port", str(PORT)]
        server = subprocess.Popen([*command, "--state", state, "--no-log"], cwd=DOCS.parent)
        try:
            wait_until_ready(server)
            with sync_playwright() as play:
                browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
                take(browser)
                browser.close()
        finally:
            server.terminate()
            server.wait(60)


def wait_until_ready(server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if urllib.request.urlopen(f"{URL}/ready").status == 200:
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit("the server does not come up")


def take(browser: Browser) -> None:
    light = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
    chat(light, "demo", ["14+33+49+17=?"], "chat-thinking.png")
    dark = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="dark")
    question = "Name three cities of France, as a short list."
    chat(dark, "smollm2-135m", [question], "chat-dark.png")
    compare(browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light"))
    runs = browser.new_page(viewport={"width": 1280, "height": 1100}, color_scheme="light")
    runs.goto(f"{URL}/runs")
    runs.wait_for_load_state("networkidle")
    runs.wait_for_timeout(3000)  # the curves are drawn
    runs.screenshot(path=DOCS / "runs.png")
    plan = browser.new_page(viewport={"width": 1280, "height": 1500}, color_scheme="light")
    plan.goto(f"{URL}/plan?model=deepseek-v3&chips=2048&price=2")
    plan.get_by_role("img", name=re.compile("^Dollars over the link's speed")).wait_for()
    plan.wait_for_timeout(1000)  # the curves are drawn
    plan.screenshot(path=DOCS / "plan.png")
    phone = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="light")
    phone.goto(URL)
    phone.wait_for_load_state("networkidle")
    phone.screenshot(path=DOCS / "chat-phone.png")


def chat(page: Page, model: str, questions: list[str], name: str) -> None:
    """Ask `model`, wait for the answers to end, and take a picture."""
    page.goto(URL)
    page.wait_for_load_state("networkidle")
    choose_model(page, model)
    for question in questions:
        page.get_by_role("textbox", name="Message").fill(question)
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Stop").wait_for(timeout=PATIENCE)
        page.get_by_role("button", name="Stop").wait_for(state="detached", timeout=PATIENCE)
    page.wait_for_timeout(500)
    page.screenshot(path=DOCS / name)


def choose_model(page: Page, model: str) -> None:
    page.get_by_role("button", name=re.compile("^Model: ")).click()
    page.get_by_role("menuitemradio", name=re.compile(f"^{model}")).click()


def compare(page: Page) -> None:
    """The same question to both, and a vote."""
    page.goto(f"{URL}/compare")
    page.wait_for_load_state("networkidle")
    page.get_by_label("Prompt", exact=True).fill("How was your day?")
    page.get_by_label("Most tokens").evaluate("field => field.closest('details').open = true")
    page.get_by_label("Most tokens").fill("80")
    page.get_by_role("button", name="Ask both").click()
    better = page.get_by_role("button", name="Left is better")
    page.wait_for_function("button => !button.disabled", arg=better.element_handle(), timeout=PATIENCE)
    page.get_by_label("Most tokens").evaluate("field => field.closest('details').open = false")
    page.screenshot(path=DOCS / "compare.png")


if __name__ == "__main__":
    main()
