# Copyright: Contributors to the kvmfleet.qcow2 collection
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a person finds on the page: by mouse, by keyboard, by a screen reader, on paper."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex

import fleet
import jsonschema
import pytest
from ansible_collections.kvmfleet.qcow2.plugins.filter.health_metrics import make_metrics
from prometheus_client.parser import text_string_to_metric_families
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

ROOT = pathlib.Path(__file__).parents[2]
AXE = pathlib.Path(os.environ["AXE"])
SIZES = [(1280, 900), (800, 1000), (390, 844)]
LOOKS = [(*size, dark) for size in SIZES for dark in (False, True)]


def violations(page):
    """Return what axe-core finds."""
    page.run(AXE.read_text(encoding="utf-8"))
    found = page.browser.execute_async_script("const done = arguments[0]; axe.run(document).then(done)")
    assert found["passes"]
    return [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found["violations"]]


def open_all(page):
    """Open the details of all VMs that are listed."""
    page.run("document.querySelectorAll('button.open[aria-expanded=false]').forEach((button) => button.click())")


@pytest.mark.parametrize(
    "name, width, height, dark", [*(("kinds", *look) for look in LOOKS), ("names", 1280, 900, False)]
)
def test_axe_finds_no_violation(page, name, width, height, dark):
    shown = page(name, width, height, dark=dark)
    open_all(shown)
    assert violations(shown) == []


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("name", ["kinds", "names", "well"])
def test_nothing_is_cut_off_at_the_side(page, name, width, height):
    shown = page(name, width, height)
    open_all(shown)
    assert shown.run("return document.documentElement.scrollWidth") == width


def test_dark_is_dark_and_light_is_light(page):
    colour = "return getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number)"
    assert min(page("well").run(colour)) > 200
    assert max(page("well", dark=True).run(colour)) < 60


def test_first_comes_what_needs_somebody_and_the_worst_first(page):
    shown = page("kinds")
    assert shown.one("h1").text == "Not every next increment is possible"
    heads = [element.text for element in shown.all("#needs li > p:first-child")]
    assert heads == [
        "host unreachable hv3.example.com",
        "only a full backup db on hv1.example.com",
        "unknown ldap on hv2.example.com",
        "needs attention wiki on hv2.example.com",
    ]
    assert "Connection refused" in shown.one("#needs").text
    sums = dict(zip(*([one.text for one in shown.all(f"#sums {name}")] for name in ("dt", "dd"))))
    assert sums["VMs"] == "8"
    assert sums["hosts not asked"] == "1"
    assert sums["only a full backup"] == "1"
    assert sums["the next increments copy"] == "1.2 GiB"


def test_a_fleet_in_order_says_so(page):
    shown = page("well")
    assert shown.one("h1").text == "Every next increment is possible"
    assert "Nothing." in shown.one("#needs").text


def test_the_remedy_can_be_copied(page):
    shown = page("kinds")
    code = shown.one("#needs li.full code")
    wanted = {"name": ["db"], "checkpoints": ["sunday"]}
    words = shlex.split(code.text)
    assert words[:-1] == ["ansible", "hv1.example.com", "-b", "-m", "kvmfleet.qcow2.domain_checkpoint", "-a"]
    assert json.loads(words[-1]) == wanted
    shown.one("#needs li.full .command button").click()
    shown.wait_for("return document.getElementById('said').textContent == 'Copied.'")
    shown.one("#search").send_keys(Keys.CONTROL, "v")
    assert shown.one("#search").get_attribute("value") == code.text


def test_search_takes_every_word_in_names_hosts_snapshots_and_images(page):
    shown = page("kinds")
    search = shown.one("#search")
    for words, names in [
        ("WEB", ["web1", "web2", "web3", "web10"]),
        ("web hv2", ["web3", "web10"]),
        ("wiki.b.qcow2", ["wiki"]),
        ("friday mail", ["mail"]),
        ("nothing-at-all", []),
    ]:
        search.clear()
        search.send_keys(words)
        assert shown.names() == names, words
        assert shown.one("#count").text == f"{len(names)} of 8 VMs"


def test_filters_and_the_way_back_to_all(page):
    shown = page("kinds")
    Select(shown.one("#health")).select_by_visible_text("in order")
    Select(shown.one("#host")).select_by_visible_text("hv1.example.com")
    assert shown.names() == ["mail", "web1", "web2"]
    shown.one("button[type=reset]").click()
    Select(shown.one("#snapshot")).select_by_visible_text("b")
    assert shown.names() == ["wiki"]
    Select(shown.one("#snapshot")).select_by_visible_text("on none")
    assert shown.names() == ["db", "ldap"]
    shown.one("button[type=reset]").click()
    assert len(shown.names()) == 8


def test_columns_sort_both_ways_and_numbers_as_numbers(page):
    shown = page("kinds")
    by_name = ["db", "ldap", "mail", "web1", "web2", "web3", "web10", "wiki"]
    shown.one("[data-column='0']").click()
    assert shown.names() == by_name
    assert shown.one("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    shown.one("[data-column='0']").click()
    assert shown.names() == by_name[::-1]
    assert shown.one("th[aria-sort]").get_attribute("aria-sort") == "descending"
    shown.one("[data-column='7']").click()  # the oldest snapshot, of which a VM may have none
    shown.one("[data-column='7']").click()
    assert shown.names()[0] == "wiki"
    assert shown.names()[-2:] == ["db", "ldap"]


def test_the_keyboard_alone_is_enough(page):
    shown = page("kinds")
    reached, body = [], shown.one("body")
    body.send_keys(Keys.TAB)
    assert shown.run("return document.activeElement.className") == "skip"
    for _press in range(80):
        body = shown.browser.switch_to.active_element
        reached.append(shown.run("return document.activeElement.id || document.activeElement.textContent"))
        if reached[-1] == "ldap":
            break
        body.send_keys(Keys.TAB)
    for wanted in ("Copy", "search", "health", "host", "snapshot", "Show all", "VM", "Host", "db", "ldap"):
        assert wanted in reached, wanted
    shown.browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert shown.browser.switch_to.active_element.get_attribute("aria-expanded") == "true"
    assert "does not exist. Mount it." in shown.one("tr.detail:not([hidden])").text
    shown.browser.switch_to.active_element.send_keys(Keys.SPACE)
    assert shown.all("tr.detail:not([hidden])") == []
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert shown.run(outline) == "solid"


def test_sorting_by_keyboard_leaves_the_focus_where_it_was(page):
    shown = page("kinds")
    shown.one("[data-column='1']").send_keys(Keys.ENTER)
    assert shown.browser.switch_to.active_element.text.startswith("Host")


def detail(page, name):
    """Return the opened detail of a VM."""
    (button,) = [one for one in page.all("#rows button.open") if one.text == name]
    button.click()
    return page.one(f"#{button.get_attribute('aria-controls')}")


def test_a_chain_is_drawn_with_its_snapshots_and_each_checkpoint_broken_where_it_is(page):
    found = detail(page("kinds"), "wiki")
    (svg,) = found.find_elements("css selector", "svg")
    assert svg.get_attribute("role") == "img"
    assert svg.get_attribute("aria-label") == "vda: 4 images, 3 checkpoints"
    assert len(svg.find_elements("css selector", "rect.image")) == 4
    words = svg.text
    for snapshot, age in [
        ("snapshot c", "20 days"),
        ("snapshot b", "30 days"),
        ("snapshot a", "50 days"),
        ("base", "50"),
    ]:
        assert re.search(f"{snapshot}.*{age}", words, re.DOTALL), words
    old, gap, crash = svg.find_elements("xpath", "./*[name()='g'][*[name()='title'][starts-with(., 'checkpoint')]]")
    count = {
        name: [len(lane.find_elements("css selector", mark)) for mark in ("circle.good", "path.cross", "path.bad.lane")]
        for name, lane in (("old", old), ("gap", gap), ("crash", crash))
    }
    assert count == {"old": [4, 0, 0], "gap": [2, 1, 2], "crash": [1, 2, 2]}


def test_the_table_below_tells_the_same_in_words(page):
    found = detail(page("kinds"), "wiki")
    rows = [row.text for row in found.find_elements("css selector", "table tr:has(> td)")]
    assert "valid" in rows[0]
    assert "records, records, records, records" in rows[0]
    assert "not valid: gap" in rows[1]
    assert "records, missing, records" in rows[1]
    assert "missing, broken, records" in rows[2]


def test_a_bitmap_in_the_memory_of_a_vm_is_no_broken_one(page):
    found = detail(page("kinds"), "web1")
    assert len(found.find_elements("css selector", "svg")) == 2
    assert found.find_elements("css selector", "path.cross, path.bad") == []
    assert len(found.find_elements("css selector", "svg circle.hollow.good")) == 6
    assert len(found.find_elements("css selector", "svg circle.good:not(.hollow)")) == 6


def test_names_stay_text(page):
    shown = page("names", 1280, 900)
    open_all(shown)
    assert fleet.MARK not in shown.browser.title
    assert shown.run("return document.querySelectorAll('img, b, main script').length") == 0
    text = shown.run("return document.body.textContent")
    assert "right\\u202eto\\u2066left" in text
    assert re.search("[\u202e\u2066\u0000\u2028]", text) is None
    assert "{{ 7 * 7 }}{% raw %}" in text
    assert "<script>document.title=" in text
    for name in fleet.HOSTILE[:4]:
        assert name in text


def test_what_is_broken_alike_has_its_command_once(page):
    shown = page("kinds")
    (needy,) = [one for one in shown.all("#needs li.attention") if "wiki" in one.text]
    commands = [shlex.split(one.text) for one in needy.find_elements("css selector", "code")]
    assert [list(json.loads(words[-1]))[1] for words in commands] == ["checkpoints", "checkpoints", "snapshot"]
    assert json.loads(commands[0][-1])["checkpoints"] == ["gap", "crash"]
    assert len(needy.find_elements("css selector", ".findings li")) == 5


def test_no_command_has_what_a_shell_or_ansible_would_run(page):
    shown = page("names")
    commands = [element.get_attribute("textContent") for element in shown.all("#needs code")]
    assert commands
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "ansible"
        assert words[2:5] == ["-b", "-m", "kvmfleet.qcow2.domain_checkpoint"]
        assert len(words) == 7
        assert json.loads(words[6])["name"]
        assert command.isascii()
        assert not re.search(r"\{[{%#]", command)


def test_nothing_is_fetched(page):
    shown = page("kinds")
    open_all(shown)
    assert shown.run("return performance.getEntriesByType('resource').length") == 0
    text = shown.path.read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?[^"'\s>)]+""", text)
    assert links == ['href="#fleet']


def test_the_policy_forbids_what_the_page_does_not_need(page):
    shown = page("well")
    shown.run("const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)")
    assert shown.run("return window.ran === undefined")
    assert any("Content Security Policy" in words for words in shown.complaints())


def test_20000_vms_are_below_20_megabytes_and_usable_in_3_seconds(page, pages):
    assert pages["large"].stat().st_size < 20e6
    shown = page("large")
    assert shown.one("#count").text == "20000 of 20000 VMs"
    assert shown.run("return performance.getEntriesByType('navigation')[0].loadEventEnd") < 3000
    assert len(shown.names()) == 100
    slowest = shown.run(
        """
        const took = [], search = document.getElementById("search");
        for (const words of ["vm123", "vm123-1", ""]) {
          const begun = performance.now();
          search.value = words;
          search.dispatchEvent(new Event("input"));
          took.push(performance.now() - begun);
        }
        const begun = performance.now();
        document.querySelector("[data-column='0']").click();
        return Math.max(...took, performance.now() - begun);
        """
    )
    assert slowest < 3000
    shown.one("#rows button.more").click()
    assert len(shown.names()) == 200
    assert shown.browser.switch_to.active_element.text == shown.names()[100]


def test_paper_gets_the_report_without_what_only_a_screen_needs(page):
    shown = page("kinds", dark=True, media="print")
    assert not shown.one("#choice").is_displayed()
    assert not shown.one("#needs .command button").is_displayed()
    assert shown.one("#needs code").is_displayed()
    assert shown.run("return getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"


def test_paper_gets_more_rows_than_a_screen(page):
    shown = page("large")
    shown.run("dispatchEvent(new Event('beforeprint'))")
    assert shown.run("return document.querySelectorAll('#rows th[scope=row]').length") == 2100


def test_without_scripts_the_report_is_there_as_lines(page):
    shown = page("names")
    shown.browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        shown.show()
        assert "This page needs JavaScript" in shown.one("noscript").text
        assert len(shown.all("noscript li")) > len(fleet.HOSTILE)
        assert shown.all("noscript script, noscript img, noscript b") == []
    finally:
        shown.browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_page_that_is_old_says_so(page):
    shown = page("well")
    assert shown.one("#stale").text == ""
    ended = json.loads(shown.run("return document.getElementById('data').textContent"))["ended"]
    text = shown.path.read_text(encoding="utf-8").replace(ended, "2026-01-01T00:00:00Z")
    old = shown.path.with_name("old.html")
    old.write_text(text, encoding="utf-8")
    shown.browser.get(old.as_uri())
    shown.complaints()
    assert re.fullmatch(r"That was \d+ days ago\.", shown.one("#stale").text)


@pytest.mark.parametrize("name", ["kinds", "names", "well"])
def test_the_report_is_as_its_schema_says(reports, name):
    schema = json.loads((ROOT / "docs/health.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(json.loads(reports[name]))


@pytest.mark.parametrize("name", ["kinds", "names"])
def test_the_metrics_are_what_prometheus_reads(reports, name):
    report = json.loads(reports[name])
    text = make_metrics(reports[name])
    families = {family.name: family for family in text_string_to_metric_families(text)}
    series = {(one.name, *sorted(one.labels.items())) for family in families.values() for one in family.samples}
    assert len(series) == sum(len(family.samples) for family in families.values())
    assert {label for family in families.values() for one in family.samples for label in one.labels} == {
        "host",
        "domain",
    }
    assert all(family.documentation and family.type == "gauge" for family in families.values())
    possible = {
        (one.labels["host"], one.labels["domain"]): one.value
        for one in families["kvmfleet_health_increment_possible"].samples
    }
    assert possible == {
        (host, domain["name"]): float(domain["health"] in ("ok", "attention"))
        for host, one in report["hosts"].items()
        for domain in one["domains"]
    }
