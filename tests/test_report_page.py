"""report.html in a real browser: nothing is loaded, nothing is cut off, every part can be reached by keyboard and read
by a screen reader (axe-core), on paper and without JavaScript too. tests/browser_setup.sh installs Chromium."""

import io
import os
import re
import shutil
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import ROOT
from html_tree import tree
from PIL import Image
from playwright.sync_api import sync_playwright

from eval.report import page as made
from eval.sections.page import Context, data_uri
from pso.config import load

ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    if (path := shutil.which("chromium")) is None:
        reason = "chromium: not installed; tests/browser_setup.sh installs it"
        could = os.environ.get("CI") == "true" and os.geteuid() == 0 and Path("/usr/bin/apt-get").exists()
        pytest.fail(reason) if could else pytest.skip(reason)
    with sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield one
        one.close()


@pytest.fixture(scope="module")
def committed(tmp_path_factory) -> Path:
    """The page of the tables and claims that the repository holds."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(made(Context(load({"scale": "miniature"}), ROOT / "results")))
    return path


@pytest.fixture(scope="module")
def whole(smoke) -> Path:
    """The page of a whole run, with its pictures."""
    return smoke / "results" / "smoke" / "report.html"


class Opened:
    """A page with what it asked for and what it complained of."""

    def __init__(self, browser, file: Path, **settings) -> None:
        self.context = browser.new_context(offline=True, **settings)
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def __enter__(self):
        return self.page

    def __exit__(self, *_) -> None:
        self.context.close()


def elsewhere(opened: Opened, file: Path) -> list[str]:
    return [url for url in opened.asked if url != file.as_uri() and not url.startswith("data:")]


@pytest.fixture(params=["committed", "whole"])
def file(request) -> Path:
    return request.getfixturevalue(request.param)


# ---- what everyone sees ----


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_it_is_quiet_loads_nothing_and_fits(browser, file, viewport):
    with (opened := Opened(browser, file, viewport=viewport)) as page:
        for detail in page.locator("details").all()[:20]:
            detail.evaluate("one => { one.open = true; }")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= viewport["width"], "the page is wider than the window"
        assert (opened.said, elsewhere(opened, file)) == ([], [])


def test_a_request_would_be_noticed_and_is_refused_by_the_page_itself(browser, tmp_path, committed):
    path = tmp_path / "report.html"
    path.write_text(committed.read_text().replace("</main>", '<img alt="" src="https://example.org/x.png"></main>'))
    opened = Opened(browser, path)
    with opened:
        assert "Content Security Policy" in " ".join(opened.said)


def serious(page, options: dict | None = None) -> list[tuple[str, str]]:
    found = [one for one in Axe().run(page, options=options).response["violations"]]
    return [(one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")]


# axe takes minutes for ten thousand elements; what a template repeats is the same, so a few of each are looked at
FEW = """() => {
  for (const one of document.querySelectorAll("tbody, ul, ol, dl.facts, #claim-groups")) {
    [...one.children].slice(4, -2).forEach((child) => child.remove());
  }
  const details = new Map();
  for (const one of document.querySelectorAll("details")) {
    const number = details.get(one.parentElement) || 0;
    details.set(one.parentElement, number + 1);
    if (number < 3) one.open = true;
    else one.remove();
  }
}"""


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_serious(browser, whole, viewport):
    with Opened(browser, whole, viewport=viewport, color_scheme="light") as page:
        page.evaluate(FEW)
        assert page.locator("main > section").count() >= 5 and page.locator(".verdict:visible").count() > 50
        assert serious(page) == []
        page.emulate_media(color_scheme="dark")
        assert serious(page, {"runOnly": ["color-contrast"]}) == []  # the one rule that colours decide


def test_axe_would_find_it(browser, committed):
    with Opened(browser, committed) as page:
        page.locator("main").evaluate(
            'one => { one.innerHTML = \'<p style="color: #bbb">pale</p><img src="data:,">\'; }'
        )
        assert {name for name, _ in serious(page)} == {"color-contrast", "image-alt"}


def test_dark_is_dark_and_the_button_turns_it(browser, committed):
    def lightness(page) -> int:
        return sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))

    with Opened(browser, committed, color_scheme="dark") as page:
        assert lightness(page) < 150
        button = page.get_by_role("button", name="Colours")
        button.click()
        assert lightness(page) == 3 * 255 and "light" in button.inner_text()
        button.click()
        assert lightness(page) < 150 and "dark" in button.inner_text()


# ---- counts ----


def test_the_browser_shows_what_the_file_holds(browser, file):
    written = tree(file.read_text())
    with Opened(browser, file) as page:
        assert page.locator("#tables table.cells").count() == len(written.all("table", of="cells")) >= 9
        assert page.locator(".claim:visible").count() == len(written.all("li", of="claim")) == 85
        assert page.locator("main > section").count() == len(written.one("nav").all("a"))


def test_the_pictures_of_a_whole_run_are_there(browser, whole):
    with Opened(browser, whole) as page:
        broken = page.locator("img[src]").evaluate_all(
            "all => Promise.all(all.map((one) => one.decode().then(() => [], () => [one.alt])))"
        )
        assert sum(broken, []) == [] and page.locator("button.zoom").count() > 20


# ---- keyboard ----


FOCUSED = """(() => {
  const one = document.activeElement;
  const name = (one.getAttribute("aria-label") || one.textContent).slice(0, 40);
  return one === document.body ? "" : `${one.tagName} ${one.className} ${one.id} ${name}`;
})()"""


def stops(page, limit: int = 400) -> list[str]:
    """What the Tab key goes through, from the top."""
    found = []
    for _ in range(limit):
        page.keyboard.press("Tab")
        now = page.evaluate(FOCUSED)
        if not now:
            break
        found.append(now)
    return found


def test_tab_reaches_navigation_filters_switches_and_scroll_regions(browser, committed):
    with Opened(browser, committed, viewport=PHONE) as page:
        found = stops(page)
        assert found[0].startswith("A skip")
        for wanted in ("A   Tables", "BUTTON  theme", "INPUT  show-intervals", "BUTTON   holds", "DIV scroll  table1"):
            assert any(one.startswith(wanted) for one in found), (wanted, found[:40])


def test_the_bar_shows_the_section_in_sight(browser, whole):
    with Opened(browser, whole, viewport=PHONE, reduced_motion="reduce") as page:
        page.locator("#provenance").evaluate("one => one.scrollIntoView()")
        current = page.locator("nav a[aria-current]")
        page.wait_for_function("() => document.querySelector('nav a[aria-current]')?.hash === '#provenance'")
        box, bar = current.bounding_box(), page.locator("nav").bounding_box()
        assert bar["x"] <= box["x"] and box["x"] + box["width"] <= bar["x"] + bar["width"] + 1


def test_a_scroll_region_scrolls_by_key_and_keeps_the_labels_in_sight(browser, committed):
    with Opened(browser, committed, viewport=PHONE) as page:
        region = page.locator("#table-table1 .scroll").first
        region.focus()
        for _ in range(8):
            page.keyboard.press("ArrowRight")
        page.wait_for_function("one => one.scrollLeft > 50", arg=region.element_handle())
        label, box = region.locator("tbody th[scope=row]").first.bounding_box(), region.bounding_box()
        assert abs(label["x"] - box["x"]) < 2


def test_the_filter_of_claims(browser, committed):
    written = tree(committed.read_text())
    with Opened(browser, committed) as page:
        button = page.get_by_role("button", name=re.compile("^fails"))
        button.focus()
        page.keyboard.press("Enter")
        number = len(written.all("li", of="claim", data_kind="fails"))
        assert page.locator(".claim:visible").count() == number > 0 and button.get_attribute("aria-pressed") == "true"
        assert page.locator("#claims .filter-told").inner_text() == f"{number} of 85 shown"
        assert page.locator("[data-group]:visible").count() < page.locator("[data-group]").count()
        link = page.locator("#false-in-paper a").first  # to a claim that may be hidden now
        link.press("Enter")
        assert page.locator(page.evaluate("location.hash")).is_visible()
        page.get_by_role("button", name=re.compile("^all")).press("Enter")
        assert page.locator(".claim:visible").count() == 85


def test_what_stands_in_a_cell_is_chosen_by_key(browser, committed):
    with Opened(browser, committed) as page:
        for name, kind in {
            "show-intervals": ".interval",
            "show-verdicts": ".said",
            "show-paper": "td > .paper",
        }.items():
            shown = page.locator(f"#table-table1 .scroll >> nth=0 >> {kind}").first
            assert shown.is_visible()
            page.locator(f"#{name}").press("Space")
            assert not shown.is_visible()


@pytest.fixture
def pictures(committed, tmp_path) -> Path:
    """The page with a section of two pictures, of 8 x 4 and 4 x 8 pixels."""
    buttons = []
    for name, size in (("first", (8, 4)), ("second", (4, 8))):
        file = io.BytesIO()
        Image.new("RGB", size, "teal").save(file, "PNG")
        buttons.append(
            f'<button type="button" class="zoom"><img alt="{name}" src="{data_uri(file.getvalue())}"></button>'
        )
    path = tmp_path / "report.html"
    path.write_text(committed.read_text().replace("</main>", f"<section>{''.join(buttons)}</section></main>"))
    return path


def test_a_picture_is_enlarged_by_whole_numbers_and_left_by_escape(browser, pictures):
    with Opened(browser, pictures) as page:
        first, second = page.locator("button.zoom").all()
        first.focus()
        page.keyboard.press("Enter")
        dialog = page.locator("dialog.zoom")
        picture, text = dialog.locator("img"), dialog.locator("p")
        assert dialog.is_visible() and text.inner_text() == "first"
        page.wait_for_function("one => one.width > 8", arg=picture.element_handle())
        across, down = picture.evaluate("one => [one.width / one.naturalWidth, one.height / one.naturalHeight]")
        assert across == down == int(across) > 20
        assert picture.evaluate("one => getComputedStyle(one).imageRendering") == "pixelated"
        page.keyboard.press("ArrowRight")
        assert text.inner_text() == "second" and dialog.locator("span").first.inner_text() == "2 of 2"
        page.keyboard.press("ArrowRight")
        assert text.inner_text() == "first"
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Escape")
        assert not dialog.is_visible()
        assert second.evaluate("one => one === document.activeElement"), "of the picture that was seen last"


# ---- without JavaScript, and on paper ----


def test_without_javascript_everything_can_be_read(browser, file):
    with Opened(browser, file, java_script_enabled=False) as page:
        assert page.locator(".claim").first.is_visible() and page.locator(".claim:visible").count() == 85
        assert not page.locator(".filter").first.is_visible() and not page.locator("#theme").is_visible()
        cell = page.locator("#table-table1 table.cells td:has(.verdict)").first
        assert cell.locator(".interval").is_visible() and cell.locator(".paper").is_visible()
        page.locator("#show-paper").uncheck()
        assert not cell.locator(".paper").is_visible()
        details = page.locator("#claims details").first
        details.locator("summary").click()
        assert details.get_attribute("open") is not None


def test_on_paper_details_are_open_and_controls_are_gone(browser, committed, tmp_path):
    with Opened(browser, committed, color_scheme="dark") as page:
        hidden = page.locator(".claim details dl").first
        assert not hidden.is_visible()
        short = len(page.pdf(prefer_css_page_size=True))
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        assert hidden.is_visible() and not page.locator(".filter").first.is_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        page.emulate_media(media="screen")
        assert not hidden.is_visible()
        content = page.pdf(prefer_css_page_size=True)
        assert content.startswith(b"%PDF") and len(content) > 100_000 and short > 100_000
