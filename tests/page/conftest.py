# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Pages as the playbook makes them, in a real Chromium. See tests/run.sh, step page, for what is needed."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import fleet
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

HERE = pathlib.Path(__file__).parent
_PATIENCE = 10  # seconds


@pytest.fixture(scope="session")
def reports():
    """Return the reports, as JSON, by the name of the page that is made of each."""
    return {
        "kinds": fleet.of_every_kind(),
        "names": fleet.of_names(),
        "large": fleet.large(500, 40),
        "well": fleet.report({"hv1": [fleet.fine("web")]}),
    }


@pytest.fixture(scope="session")
def pages(reports, tmp_path_factory):
    """Return the files of the pages by name."""
    return make_pages(reports, tmp_path_factory.mktemp("pages"))


def make_pages(reports, folder):
    """Make pages in a folder, and return their files by name."""
    for name, report in reports.items():
        (folder / f"{name}.json").write_text(report, encoding="utf-8")
    command = [pathlib.Path(sys.executable).parent / "ansible-playbook", "-i", "localhost,", "-c", "local"]
    asked = json.dumps({"pages": list(reports), "folder": str(folder)})
    subprocess.run([*command, HERE / "render.yml", "-e", asked], check=True, cwd=folder)
    return {name: folder / f"{name}.html" for name in reports}


@pytest.fixture(scope="session")
def chromium():
    """Return the browser."""
    with browser() as started:
        yield started


@contextlib.contextmanager
def browser():
    """Start the browser. It has no network: whatever it would load fails."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    quiet = (
        "--headless=new",
        "--disable-gpu",
        "--hide-scrollbars",
        "--proxy-server=127.0.0.1:1",
        "--disable-extensions",
    )
    for argument in [*quiet, *(["--no-sandbox"] if os.geteuid() == 0 else [])]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(service=Service(shutil.which("chromedriver")), options=options)
    try:
        yield started
    finally:
        started.quit()


class Page:
    """A page that is shown."""

    def __init__(self, browser, path):
        self.browser, self.path = browser, path

    def show(self, width=1280, height=900, *, dark=False, media=""):
        """Load the page in a window of this size."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.browser.get(self.path.as_uri())
        return self

    def run(self, script, *arguments):
        """Return what a script returns."""
        return self.browser.execute_script(script, *arguments)

    def wait_for(self, script):
        """Wait until a script returns true; TimeoutException if it does not."""
        WebDriverWait(self.browser, _PATIENCE, poll_frequency=0.05).until(lambda _browser: self.run(script))

    def all(self, selector):
        """Return the elements of a selector."""
        return self.browser.find_elements("css selector", selector)

    def one(self, selector):
        """Return the first element of a selector."""
        return self.browser.find_element("css selector", selector)

    def names(self):
        """Return the names of the VMs that are listed, once the page has done what it has put off."""
        self.browser.execute_async_script("setTimeout(arguments[0])")  # after those that the page has set
        return [element.text for element in self.all("#rows th[scope=row] button")]

    def complaints(self):
        """Return what the browser has complained about: errors, and what the page was not allowed."""
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def page(chromium, pages):
    """Return a function that shows a page by its name."""

    def show(name, *size, **how):
        return Page(chromium, pages[name]).show(*size, **how)

    yield show
    assert Page(chromium, None).complaints() == []
