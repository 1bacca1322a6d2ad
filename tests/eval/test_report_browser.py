"""The report in a real browser, with the network off: by mouse, keyboard, ear, on a phone and on paper."""

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from eval.core.gate_file import read_gate
from eval.report.html import render_page as html_of
from tests.eval.report_run import VARIANTS, run_folder, unmeasured, variant

pytestmark = pytest.mark.browser

CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, a] = parse(getComputedStyle(at).backgroundColor);
      if (a === undefined || a === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const failures = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || element.closest("script, style, title, desc") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), drawn = element instanceof SVGElement;
    const [x, y] = [light(parse(drawn ? style.fill : style.color).slice(0, 3)), light(behind(element))];
    const ratio = (Math.max(x, y) + .05) / (Math.min(x, y) + .05);
    if (ratio < 4.5) failures.push(`${element.tagName}.${element.className} ${ratio.toFixed(2)}: ${element.textContent.slice(0, 30)}`);
  }
  return failures;
}"""
NAMELESS = """() => [...document.querySelectorAll("button, input, select, a, summary, [role=region], [role=img], nav, section")]
  .filter((element) => {
    const by = (element.getAttribute("aria-labelledby") ?? "").split(" ").map((id) => document.getElementById(id));
    const named = element.getAttribute("aria-label") || by.some((other) => other?.textContent.trim())
      || [...(element.labels ?? [])].some((label) => label.textContent.trim())
      || (/BUTTON|A|SUMMARY/.test(element.tagName) && element.textContent.trim());
    return !named;
  }).map((element) => element.outerHTML.slice(0, 80))"""
SORT = "table.budget thead button"


def absent() -> str | None:
    """What keeps this file from running, if anything does."""
    if find_spec("playwright") is None:
        return "playwright is not installed"
    return None if shutil.which("chromium") else "chromium is not on PATH"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """One browser for the file; where CI or REQUIRE_BROWSER is set, its absence is a failure."""
    if reason := absent():
        if os.environ.get("CI") or os.environ.get("REQUIRE_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> SimpleNamespace:
    """The gate of a run, its folder, and its report as a file; of one target no variant has figures, another has one of its own."""
    alone = variant(("only-gpu", *VARIANTS[6][1:]), "gpu", measured=False)
    run = run_folder(
        tmp_path_factory.mktemp("runs"), variants=[*map(variant, VARIANTS), alone, *unmeasured("phone")]
    )
    gate = read_gate(run)
    path = run / "report.html"
    path.write_text(html_of(gate, run, "name: demo"), encoding="utf-8")
    return SimpleNamespace(gate=gate, run=run, path=path)


@pytest.fixture
def visit(browser, demo) -> Iterator:
    """Opens a page; at the end there may be no request to a network and no message on the console."""
    contexts, requests, messages = [], [], []

    def opened(path: Path = demo.path, **settings):
        contexts.append(browser.new_context(offline=True, **settings))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(path.as_uri())
        if settings.get("java_script_enabled", True):
            page.wait_for_selector(".bar:not([hidden])")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert {url.partition(":")[0] for url in requests} <= {"file"}
    assert len(requests) == len(contexts)
    assert messages == []


def names(page) -> list[str]:
    return page.locator("tr.row th button").all_text_contents()


def test_columns_sort_up_and_down_and_what_was_not_measured_stays_last(visit):
    page = visit()
    assert names(page)[0] == "int8", "what is recommended comes first"
    target = page.locator(SORT, has_text="target")
    target.click()
    target.click()
    assert names(page)[:2] == ["only-gpu", "int8"], "what is equal stays as it was sorted before"
    head = page.locator(SORT, has_text="decode p50, ms")
    fastest = [row[0] for row in sorted(VARIANTS, key=lambda row: row[5])]
    head.click()
    assert names(page) == [*fastest, "only-gpu"]
    assert page.locator("th[aria-sort]").all_text_contents() == ["decode p50, ms"]
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    head.focus()
    page.keyboard.press("Enter")
    assert names(page) == [*fastest[::-1], "only-gpu"]
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    for i in range(page.locator(SORT).count()):
        page.locator(SORT).nth(i).click()
        assert len(names(page)) == len(VARIANTS) + 1
    page.locator(SORT).first.click()
    assert names(page) == sorted([*(row[0] for row in VARIANTS), "only-gpu"])


def test_rows_are_filtered_and_their_number_is_shown(visit):
    page = visit()
    status = page.get_by_role("status")
    assert status.text_content() == "9 of 9 rows shown"
    assert status.get_attribute("aria-live") == "polite"
    page.get_by_label("Target").select_option("gpu")
    assert names(page) == ["only-gpu"]
    assert status.text_content() == "1 of 1 rows shown that match, of 9"
    page.get_by_label("Target").select_option("")
    page.get_by_label("Verdict").select_option("FAIL")
    assert sorted(names(page)) == ["int8-bnb", "nf4"]
    page.get_by_role("searchbox").fill("BNB")
    assert names(page) == ["int8-bnb"]
    page.get_by_role("searchbox").fill("none such")
    assert status.text_content() == "0 of 0 rows shown that match, of 9"


def test_the_keyboard_alone_reaches_and_opens_the_evidence(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "h-budget"
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('open')"):
            break
    button = page.get_by_role("button", name="int8", exact=True)
    assert button.evaluate("element => element === document.activeElement")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    region = page.get_by_role("region", name="Evidence for int8 on cpu")
    assert not region.is_visible()
    page.keyboard.press("Enter")
    page.wait_for_selector(".open[aria-expanded=true]")
    assert region.is_visible()
    text = region.inner_text()
    for words in ("Parts of the gate", "link by link", "Slices", "Measured on cpu", "Under load", "Hashes"):
        assert words in text
    assert "a" * 64 in text
    page.keyboard.press("Space")
    page.wait_for_selector(".open[aria-expanded=false]:focus")
    assert not region.is_visible()


def test_all_rows_open_at_once_and_stay_open_when_sorted(visit):
    page = visit()
    page.get_by_role("button", name="Open all shown").click()
    page.wait_for_selector("#all:has-text('Close')")
    assert page.locator(".evidence:visible").count() == 9
    page.locator(SORT).first.click()
    assert page.locator(".evidence:visible").count() == 9
    page.get_by_role("button", name="Close all shown").click()
    page.wait_for_selector("#all:has-text('Open')")
    assert page.locator(".evidence:visible").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_a_name_and_can_be_seen(visit, scheme):
    page = visit(color_scheme=scheme)
    page.get_by_role("button", name="Open all shown").click()
    page.wait_for_selector("#all:has-text('Close')")
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate(CONTRAST) == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(ground[4:].split(",")[0]) > 128) == (scheme == "light")


def test_a_phone_scrolls_down_only_and_still_hears_a_table(visit):
    page = visit(viewport={"width": 390, "height": 740})
    page.get_by_role("button", name="Open all shown").click()
    page.wait_for_selector("#all:has-text('Close')")
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wide = "[...document.querySelectorAll('p, h1, h2, h3, dl, figure')].filter((e) => e.getBoundingClientRect().width > 390)"
    assert page.evaluate(f"{wide}.length") == 0
    fold = page.locator(".fold")
    assert fold.count() == 1, "five rows in one line"
    assert "phone: plain, int8, int4, wanda50, depth25: not measured yet" in fold.inner_text()
    assert page.locator("tr.row", has_text="not measured yet on gpu").count() == 1, (
        "of which no other row tells"
    )
    for name, first in (("The teacher and the fallback", "teacher T1"), ("Variant against variant", "int8")):
        region = page.get_by_role("region", name=f"{name}, may scroll sideways")
        assert region.locator("tbody th").first.inner_text() == first
        assert region.evaluate("e => e.getBoundingClientRect().right <= 390 && e.scrollWidth > e.clientWidth")
    unsure = page.locator("tbody", has=page.get_by_role("button", name="depth25", exact=True)).locator(
        ".why p"
    )
    assert "To pass: retention: about 5 seeds or 90 clusters" in unsure.first.inner_text()
    assert unsure.first.evaluate("e => e.getBoundingClientRect().right <= 390")
    session = page.context.new_cdp_session(page)
    roles = [
        node["role"]["value"]
        for node in session.send("Accessibility.getFullAXTree")["nodes"]
        if "role" in node
    ]
    assert roles.count("rowheader") >= 9
    assert roles.count("columnheader") >= page.locator(SORT).count()
    page.locator(SORT, has_text="decode p50").click()
    assert names(page)[0] == "depth25-int8"


def test_paper_shows_the_rows_without_controls(visit):
    page = visit()
    page.locator(".open").first.click()
    page.wait_for_selector(".open[aria-expanded=true]")
    page.emulate_media(media="print")
    for hidden in (".bar", "nav", ".skip"):
        assert not page.locator(hidden).first.is_visible()
    assert page.locator("tr.row:visible").count() == 9
    assert page.locator(".evidence:visible").count() == 1
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    # a head with controls would not be repeated on the next sheet
    assert page.evaluate(f"getComputedStyle(document.querySelector('{SORT}')).display") == "contents"
    sheet = page.pdf(prefer_css_page_size=True)
    assert 3 <= sheet.count(b"/Type /Page\n") <= 15


def test_without_a_script_everything_stands_open(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("tr.row:visible").count() == 9
    assert page.locator(".evidence:visible").count() == 9
    assert page.locator(".open:disabled").count() == 9
    assert not page.locator(".bar").is_visible()


def test_a_script_that_slips_in_does_not_run(browser, demo):
    page = browser.new_page()
    page.goto(demo.path.as_uri())
    page.evaluate(
        """() => { const one = document.createElement("script"); one.textContent = "window.slipped = 1";
        document.body.append(one); document.body.insertAdjacentHTML("beforeend", "<b onclick='window.slipped = 1'>b</b>");
        document.body.lastChild.click(); }"""
    )
    assert page.evaluate("window.slipped") is None
    page.close()


@pytest.mark.slow
def test_ten_thousand_rows_open_sort_and_filter(visit, demo):
    some = [v.model_copy(update={"recommended": False}) for v in demo.gate.variants]
    many = [some[i % 9].model_copy(update={"recipe": f"r{i}", "p": 0.0}) for i in range(10_000)]
    path = demo.run / "many.html"
    path.write_text(html_of(demo.gate.model_copy(update={"variants": many}), demo.run, ""), encoding="utf-8")
    assert path.stat().st_size < 25e6
    page = visit(path)
    status = page.get_by_role("status")
    assert status.text_content() == "200 of 10,000 rows shown"
    took = page.evaluate(
        """() => { const start = performance.now(); document.querySelectorAll(".sort")[0].click();
        const name = document.getElementById("name"); name.value = "r999"; name.dispatchEvent(new Event("input"));
        return document.body.offsetHeight && performance.now() - start; }"""
    )
    assert took < 5000, "ms, where a fraction of a second is usual"
    assert names(page) == ["r999", *(f"r999{i}" for i in range(10))]
    last = page.get_by_role("button", name="r9998")
    last.click()
    region = page.get_by_role("region", name="Evidence for r9998 on")
    region.wait_for()
    assert "S1 after r9998, seed 0" in region.inner_text()
    page.get_by_role("searchbox").fill("r")
    page.get_by_role("button", name="Show more rows").click()
    assert page.locator("tr.row").count() == 400
    assert page.evaluate("document.activeElement.textContent") == names(page)[200]
