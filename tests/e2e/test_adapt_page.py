"""The page of ``adapt.py page`` as a user has it: its server, and a browser without a window."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import psutil
import pytest
from script_runner import ROOT, script_environment

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = [
    *(name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None),
    *(name for name, path in (("chromium", CHROMIUM), ("chromium-driver", DRIVER)) if path is None),
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed"),
]
ROWS = [{"prompt": f"<b id='injected'>Say</b> {n}", "response": f"{{{{ 7 * 7 }}}} {n}"} for n in range(4)]
PROMPT = "<b id='injected'>Say</b> **it**"


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    """(process, address, folder of the adapters)."""
    folder = tmp_path_factory.mktemp("page")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--start", str(tiny_model), "--output", str(folder / "out"), "--port", str(port)]
    (folder / "tmp").mkdir()
    environment = {**script_environment(), "TMPDIR": str(folder / "tmp")}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "adapt.py", "page", *flags], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait(lambda: f"open {address} (Ctrl-C ends)" in (folder / "log").read_text(), 120)
        assert list((folder / "tmp").glob("adapt_page_*"))
        yield process, address, folder / "out"
        process.terminate()
        assert process.wait(30) == 0
        assert not list((folder / "tmp").glob("adapt_page_*"))  # uploads and archives
    finally:
        process.kill()
        process.wait()
        print((folder / "log").read_text()[-4000:])


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1200"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield found
    found.quit()


def wait(condition, seconds: float = 60):
    """What ``condition`` gives once it is true; a page that is still being built has not everything yet."""
    from selenium.common.exceptions import WebDriverException

    end, found = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except WebDriverException as error:
            found = error
        time.sleep(0.2)
    raise AssertionError(f"not after {seconds} s: {found}")


def part(browser, name: str):
    return browser.find_element("css selector", f"#{name} textarea, button#{name}, a #{name}")


def text(browser, name: str) -> str:
    return part(browser, name).get_attribute("value")


def test_examples_become_an_adapter_and_nothing_leaves_the_machine(server, browser, tmp_path):
    _, address, output = server
    browser.get(address)
    wait(lambda: part(browser, "pasted")).send_keys("\n".join(map(json.dumps, ROWS)))
    part(browser, "adapt").click()
    wait(lambda: "kept in" in text(browser, "summary"), 120)
    assert text(browser, "summary").startswith("adapted to 4 examples: adamw 0.001, 10 steps\n")
    record = json.loads((output / "adapter_1" / "adapt.json").read_text())
    shown = browser.find_element("css selector", "#figures").text
    assert f"{record['figures']['after']['loss']:.3f}" in shown
    wait(lambda: browser.find_elements("css selector", "#losses svg, #losses canvas"))

    part(browser, "prompt").send_keys(PROMPT)
    wait(lambda: part(browser, "ask").is_enabled())
    part(browser, "ask").click()
    wait(lambda: text(browser, "before") and text(browser, "after"))
    assert not browser.find_elements("css selector", "#injected")

    wait(lambda: part(browser, "download").is_enabled())
    part(browser, "download").click()
    archive = tmp_path / "adapter_1.zip"
    wait(archive.is_file)
    with zipfile.ZipFile(archive) as packed:
        names = {Path(name).name for name in packed.namelist()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "adapt.json"} <= names

    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert asked and [url for url in asked if not url.startswith((address, "data:", "blob:", "chrome:"))] == []


def test_unusable_examples_are_said_where_results_are(server, browser):
    _, address, output = server
    before = sorted(output.iterdir()) if output.exists() else []
    browser.get(address)
    wait(lambda: part(browser, "pasted")).send_keys('{"prompt": "<b id=\'injected\'>", "response"')
    part(browser, "adapt").click()
    assert wait(lambda: text(browser, "summary")).startswith("error: line 1 is no JSON")
    assert not part(browser, "ask").is_enabled() and not browser.find_elements("css selector", "#injected")
    assert (sorted(output.iterdir()) if output.exists() else []) == before


def test_the_server_is_for_this_machine_and_gives_no_other_files(server):
    process, address, output = server
    listening = [c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert set(listening) == {"127.0.0.1"}

    def status(path: str, body: bytes | None = None, **headers: str) -> int:
        try:
            with urllib.request.urlopen(urllib.request.Request(address + path, body, headers)) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    assert status("/") == 200
    for place in ("/etc/passwd", ROOT / "README.md", output / "adapter_1" / "README.md"):
        assert status(f"/gradio_api/file={place}") in (403, 404)
    for size, code in ((1000, 200), (5 * 1024**2, 413)):
        body = (
            b"--x\r\nContent-Disposition: form-data; name=files; filename=a.csv\r\n\r\n"
            + b"a" * size
            + b"\r\n--x--\r\n"
        )
        assert status("/gradio_api/upload", body, **{"Content-Type": "multipart/form-data; boundary=x"}) == code
