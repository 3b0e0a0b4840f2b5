"""The report page in headless Chromium: it renders, the console is silent, its buttons work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvsieve.bench.report import audits, public, reading, speed
from kvsieve.cli import app

from .test_report import ROWS
from .test_summary import asked, audited, scored, timed

selenium = pytest.importorskip("selenium", reason="needs selenium to drive a browser")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None or DRIVER is None,
        reason="needs chromium and chromedriver (Debian: apt-get install chromium-driver)",
    ),
    pytest.mark.filterwarnings("default::ResourceWarning"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    rows = [*ROWS, scored("tova", 500, 0.6, budget="50%", depth=[0.1 * i for i in range(10)])]
    (folder / reading.FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    audit = [audited(), audited("fair", begin=1.0)]
    (folder / audits.FILE).write_text("".join(json.dumps(row) + "\n" for row in audit))
    (folder / speed.FILE).write_text(json.dumps(timed()) + "\n")
    (folder / public.FILE).write_text(json.dumps(asked("snapkv", 0.5)) + "\n")
    made = folder / "page.html"
    done = CliRunner().invoke(app, ["report", str(folder), "-o", str(made)])
    assert done.exit_code == 0, done.output
    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for switch in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    browser.set_window_size(1000, 900)
    browser.get(page.as_uri())
    return browser


def all_of(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def press(browser: Any, button: Any) -> None:
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()


def test_it_renders_without_a_word_on_the_console(opened: Any) -> None:
    assert "kvsieve" in opened.title
    assert opened.get_log("browser") == []
    figures = all_of(opened, "figure svg")
    assert figures and all(f.size["width"] > 200 and f.size["height"] > 100 for f in figures)
    for name in ("overview", "depth", "audit", "speed", "public", "origin", "glossary"):
        assert all_of(opened, f"#{name}"), name


def test_a_tab_shows_its_budget_alone(opened: Any) -> None:
    tabs, panels = all_of(opened, "#overview .tab"), all_of(opened, "#overview .panel")
    assert len(tabs) == len(panels) > 1
    for tab in tabs:
        press(opened, tab)
        shown = [panel.get_attribute("id") for panel in panels if panel.is_displayed()]
        assert shown == [tab.get_attribute("data-tab")]


def test_a_legend_hides_its_line(opened: Any) -> None:
    (section, *_) = all_of(opened, "main section:has(button.series)")
    button = section.find_element("css selector", "button.series")
    line = section.find_element(
        "css selector", f"figure [id*='-series{button.get_attribute('data-series')}-']"
    )
    assert line.value_of_css_property("display") != "none"
    press(opened, button)
    assert line.value_of_css_property("display") == "none"
    press(opened, button)
    assert line.value_of_css_property("display") != "none"


def test_a_column_sorts_its_table(opened: Any) -> None:
    table = all_of(opened, "#overview .panel:not([hidden]) table")[0]
    names = lambda: [row.text.split()[0] for row in table.find_elements("css selector", "tbody tr")]  # noqa: E731
    head = table.find_element("css selector", "th button")
    press(opened, head)
    up = names()
    press(opened, head)
    assert up != names() and sorted(up) == sorted(names())
    assert table.find_element("css selector", "th").get_attribute("aria-sort") == "descending"


def test_a_phone_needs_no_sideways_scrolling(opened: Any) -> None:
    # The narrowest window of headless Chromium is wider than a phone: emulate one.
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        wide = opened.execute_script(
            "return [document.documentElement.scrollWidth, window.innerWidth]"
        )
        assert wide[0] <= wide[1] == 390
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_differ(opened: Any, scheme: str) -> None:
    opened.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    colour = all_of(opened, "body")[0].value_of_css_property("background-color")
    light = sum(map(int, colour.removeprefix("rgba(").removesuffix(")").split(",")[:3])) > 382
    assert light == (scheme == "light")
