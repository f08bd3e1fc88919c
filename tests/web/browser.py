"""A real Chromium without a screen, for tests of the page. Where there is none, they are left out."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import machine_lacks

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--window-size=1280,1000"),
)


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A browser with a new profile, that records what it logs and what it asks for."""
    try:
        from selenium import webdriver
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        machine_lacks("selenium is not installed")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    browser, driver = paths
    if browser is None or driver is None:
        machine_lacks("there is no chromium with a chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    try:
        made = webdriver.Chrome(options=options, service=Service(driver))
    except WebDriverException as error:
        machine_lacks(f"chromium does not start: {str(error)[:200]}")
    try:
        yield made
    finally:
        made.quit()


def asked_for(driver: Any) -> list[str]:
    """URLs of all requests since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def be_a_phone(driver: Any) -> None:
    """Show the page as a phone does."""
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def prefer(driver: Any, scheme: str) -> None:
    """Ask for "light" or "dark"."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
