"""A headless Chromium for tests of pages, driven through chromedriver; a skip where there is none."""

import base64
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.webdriver import WebDriver

SCREENSHOTS = os.environ.get("BRAINSCALE_TEST_SCREENSHOTS")
"""A folder to keep the screenshots in, for people to look at."""
FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars")
CELLS = """return Array.from(arguments[0].tBodies[0].rows, row => Array.from(
row.cells, cell => [cell.textContent.trim(), cell.dataset.value ?? null]))"""


@contextmanager
def running() -> Iterator[WebDriver]:
    """A browser that ends with the context."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no headless Chromium: install Debian's packages chromium and chromium-driver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        found = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
        try:
            yield found
        finally:
            found.quit()


def open_page(browser: WebDriver, path: Path, width: int = 1280, dark: bool = False) -> None:
    """Open a file, shown this many CSS pixels wide, and forget what was logged before."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(path.absolute().as_uri())


def complaints(browser: WebDriver) -> list[str]:
    """What the console says of warnings and errors since the page was opened."""
    return [line["message"] for line in browser.get_log("browser") if line["level"] in ("WARNING", "SEVERE")]


def requests(browser: WebDriver) -> list[str]:
    """What was loaded since the page was opened."""
    lines = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    return [line["params"]["request"]["url"] for line in lines if line["method"] == "Network.requestWillBeSent"]


def screenshot(browser: WebDriver, name: str) -> bytes:
    """The whole page as PNG; kept under this name where SCREENSHOTS says so."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    width = browser.execute_script("return window.innerWidth")
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)  # so that nothing waits to be scrolled to
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    data = base64.b64decode(picture["data"])
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        (Path(SCREENSHOTS) / f"{name}.png").write_bytes(data)
    return data


def cells(browser: WebDriver, table: Any) -> list[list[tuple[str, str | None]]]:
    """(text, data-value) of every cell of a table's body, as its rows now lie."""
    return [[(text, value) for text, value in row] for row in browser.execute_script(CELLS, table)]
