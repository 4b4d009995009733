"""The report in a browser without a window, on a desk and on a phone, light and dark."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from compiled_adam.commands import report
from compiled_adam.commands.report_html import page
from compiled_adam.commands.report_run import load

from tests.logs import example, make_run, record

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
PICTURE = os.environ.get("REPORT_PICTURE")  # a file; with REPORT_OF the picture is of the run in that folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        if BROWSER is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no browser: apt-get install chromium, or playwright install chromium")
        made = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def opened(browser: Any) -> Callable[..., Any]:
    """Opens a page, and fails at its end for whatever the browser complained about or asked the network for."""

    @contextmanager
    def opened(file: Path, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page, said = context.new_page(), []
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda request: said.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        yield page
        assert said == []
        context.close()

    return opened


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("REPORT_OF") or example(tmp_path_factory.mktemp("browser") / "adapters"))
    out = tmp_path_factory.mktemp("page") / "report.html"
    out.write_text(page([load(folder)._replace(name="adapters")]))
    return out


# Pixels of each canvas that are not transparent: axes alone have fewer than a line and axes.
INK = """[...document.querySelectorAll('canvas')].map(canvas => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', {willReadFrequently: true});
  copy.drawImage(canvas, 0, 0);
  const bytes = copy.getImageData(0, 0, canvas.width, canvas.height).data;
  let count = 0;
  for (let i = 3; i < bytes.length; i += 4) count += bytes[i] > 0;
  return count;
})"""
WIDTHS = "[document.documentElement.scrollWidth, innerWidth]"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_drawn_without_errors_or_scrolling_sideways(
    width: int, scheme: str, one: Path, opened, tmp_path: Path
) -> None:
    with opened(one, width, scheme) as page:
        ink = page.evaluate(INK)
        assert len(ink) == len(page.evaluate("charts")) == 6 and min(ink) > 1000
        wide, inner = page.evaluate(WIDTHS)
        assert wide <= inner == width
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (back < "rgb(2") == (scheme == "dark"), back
        picture = page.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
        assert len(picture) > 30_000
        if PICTURE and (width, scheme) == (1280, "light"):
            page.screenshot(path=PICTURE, clip={"x": 0, "y": 0, "width": 1280, "height": 800}, full_page=True)


def test_values_ticks_and_the_switch(one: Path, opened) -> None:
    with opened(one) as page:
        box = page.locator(".u-over").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        sync_api.expect(page.locator(".u-value").first).to_have_text(re.compile("^15[01]$"))  # of 1 to 300
        values = page.locator(".u-legend").first.locator(".u-value").all_text_contents()
        assert values[3:] == ["2.0478", "2.0242"]  # of the nearest validation, at 150, and of the best, at 200
        button = page.locator("button").first
        before = page.evaluate(INK)
        button.click()
        assert button.get_attribute("aria-pressed") == "true" and page.evaluate(INK)[0] != before[0]
        page.reload()  # as a live page does
        assert page.locator("button").first.get_attribute("aria-pressed") == "true"
        for numbers, texts in (
            ("[2e-5, 1.5e-5, 0, 5.66, 5.6618, 1000, 12000, 0.001]", "2e-5 1.5e-5 0 5.66 5.662 1000 12K 0.001"),
            ("evenTicks(4.9, 7.2, 5)", "5 5.5 6 6.5 7"),
            ("evenTicks(1.01e-5, 1.99e-5, 5)", "1.2e-5 1.4e-5 1.6e-5 1.8e-5"),
            ("logTicks(0.3, 40)", "0.3 1 3 10 30"),
            ("logTicks(0.4, 3)", "0.5 1 2"),
            ("logTicks(5.1, 5.9)", "5.2 5.4 5.6 5.8"),
            ("logTicks(1e-30, 1e30)", "1e-30 1e-22 1e-14 1e-6 100 10B 1e18 1e26"),
        ):
            assert page.evaluate(f"{numbers}.map(short).join(' ')") == texts


def test_what_others_wrote_is_only_text(opened, tmp_path: Path) -> None:
    """The name of a folder, settings, prompts and answers, in one page and in a comparison on a phone."""
    (tmp_path / HOSTILE).parent.mkdir(parents=True)  # its slashes make folders in folders
    folder = make_run(tmp_path / HOSTILE, model=HOSTILE, **{HOSTILE: 1})
    record(folder, HOSTILE, [(HOSTILE, HOSTILE, HOSTILE)])
    other = make_run(tmp_path / ("another " * 12), 20, seed=2)
    for folders in ([folder], [folder, other]):
        report.write(folders, tmp_path / "page.html")
        with opened(tmp_path / "page.html", 390) as page:
            assert page.evaluate("window.hacked") is None
            assert HOSTILE in page.locator("main").inner_text()
            wide, inner = page.evaluate(WIDTHS)
            assert wide <= inner and min(page.evaluate(INK)) > 1000


def test_a_single_step_and_extreme_values_are_drawn(opened, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", 1)
    (line,) = (line for line in (folder / "log.jsonl").read_text().splitlines() if "tokens" in line)
    for old, new in (("", ""), ('"loss": 5.0', '"loss": -3.4e38'), ('"grad_norm": 2.0', '"grad_norm": 0')):
        (folder / "log.jsonl").write_text(f"{line.replace(old, new)}\n")
        report.write([folder], folder / "report.html")
        with opened(folder / "report.html") as page:
            assert min(page.evaluate(INK)) > 300
