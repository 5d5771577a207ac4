"""The report in a browser: nothing logged or fetched, never wider than a phone, light and dark."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.chromium import EXECUTABLE, Chromium
from support.report_runs import four_runs, gammas, metrics, widths

from polarfast.engine.report import write_report

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed")


@pytest.fixture
def four(tmp_path: Path) -> list[Path]:
    return four_runs(tmp_path)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    chromium = Chromium(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(
    browser: Chromium, four: list[Path], count: int, width: int, dark: bool
) -> None:
    out = write_report(four[:count], four[0].parent / "report.html")
    browser.open(out, width, dark=dark)
    assert browser.run("innerWidth") == width
    browser.run("document.querySelectorAll('details').forEach(block => block.open = true)")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    # Wide tables have a box that scrolls; nothing else sticks out of the page.
    outside = """[...document.querySelectorAll('body *')].filter(element =>
        !element.closest('.scroll, nav, pre, svg') &&
        element.getBoundingClientRect().right > document.documentElement.clientWidth + 1
    ).map(element => element.outerHTML.slice(0, 90))"""
    assert browser.run(outside) == []
    tables = browser.run("document.querySelectorAll('table').length")
    assert tables == (2 if count == 1 else 3)
    assert browser.run("document.querySelector('h1').textContent") == (
        "plain" if count == 1 else "4 runs"
    )
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(16, 19, 24)" if dark else "rgb(246, 247, 249)")
    assert browser.messages == [] and browser.requests == [out.resolve().as_uri()]


def test_script_reads_values_off_and_goes_back_in_time(browser: Chromium, four: list[Path]) -> None:
    out = write_report(four, four[0].parent / "report.html")
    browser.open(out, 1280)
    browser.run("document.querySelectorAll('.curves')[1].focus()")  # accuracy
    press = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}))"
    browser.run(press)
    browser.run(press)
    shown = browser.run("document.querySelector('.readout').innerText").split()
    expected = {f"{metrics(12, 6, 18)[16]['accuracy']:.2f}"}
    assert shown[:2] == ["epoch", "17"]
    assert {word for word in shown if re.fullmatch(r"\d+\.\d+", word)} == expected
    browser.run("document.activeElement.blur()")
    assert browser.run("document.querySelectorAll('.readout').length") == 0
    slider = "document.querySelector('.slider input')"
    assert browser.run(f"{slider}.offsetParent !== null")  # the script shows it
    browser.run(f"{slider}.value = 0; {slider}.dispatchEvent(new Event('input'))")
    assert browser.run("document.querySelector('.slider output').textContent") == "epoch 1"
    bars = browser.run("document.querySelector('.past').getAttribute('d')")
    counts = gammas(widths(6), 12)["counts"][0, 0].reshape(25, 4).sum(1)
    assert bars.count("M") == int((counts > 0).sum())
    style = "getComputedStyle(document.querySelector('.smalls .stay')).display"
    assert browser.run(style) == "none"
    assert browser.messages == []
