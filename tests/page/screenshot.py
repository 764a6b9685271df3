# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""screenshot.py FILE: the picture of the page in the documentation, of a small fleet with VMs of every kind."""

from __future__ import annotations

import base64
import pathlib
import sys
import tempfile

import conftest
import fleet

WIDTH = 1280
OPENED = "wiki"


def main():
    with tempfile.TemporaryDirectory() as folder, conftest.browser() as browser:
        pages = conftest.make_pages({"kinds": fleet.of_every_kind()}, pathlib.Path(folder))
        page = conftest.Page(browser, pages["kinds"]).show(WIDTH)
        (button,) = [one for one in page.all("#rows button.open") if one.text == OPENED]
        button.click()
        height = page.run("return document.documentElement.scrollHeight")
        area = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 1}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": area, "captureBeyondViewport": True})
    pathlib.Path(sys.argv[1]).write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    main()
