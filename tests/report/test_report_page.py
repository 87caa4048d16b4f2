"""The report in a real browser: what a colleague sees, filters and reaches by keyboard; and that nothing is fetched."""

import os
import shutil

import pytest
from report_runs import HARM, rollout, write_run

from mechreward.report.page import page
from mechreward.report.runs import find

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("MECHREWARD_CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """2,000 rollouts of two arms with two seeds; of 40 tokens each."""
    root = tmp_path_factory.mktemp("runs")
    for arm in ("outcome", "sum"):
        for seed in range(2):
            trace = [written(arm, seed, row) for row in range(500)]
            write_run(root, arm, seed, {0: [0] * 20, 2: [1, seed] * 10}, trace)
    out = root / "report.html"
    out.write_text(page(find([root]), title=f"A <b>title</b> {HARM}"), encoding="utf-8")
    return out


def written(arm, seed, row):
    """Every fifth is wrong; every 50th is flagged; the reward grows with the row."""
    tokens = [f" w{(row * 7 + t) % 97}" for t in range(39)] + ["<eos>"]
    if row == 3:
        tokens[1:4] = [HARM, "\n", "\u202e"]
    flags = [f"repetition: {row} % of 4-grams repeat"] if row % 50 == 0 else []
    return rollout(row // 50, row, row % 5 != 0, row / 100, tokens, flags=flags, gold=f"gold {row}")


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    if not os.path.exists(CHROMIUM):
        pytest.fail("Chromium is not installed: apt-get install chromium, or set MECHREWARD_CHROMIUM to its path.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, file):
    """``opened(width, scheme)``: the page, which must neither complain nor ask for anything."""
    contexts, complaints, asked = [], [], []

    def open_page(width=1280, scheme="light"):
        context = chromium.new_context(
            viewport={"width": width, "height": 850}, color_scheme=scheme, reduced_motion="reduce"
        )
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(60_000)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.as_uri())
        tab.wait_for_selector("body[data-ready]")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert set(asked) == {file.as_uri()}


def rewards(tab):
    return [float(text.removeprefix("reward ")) for text in tab.locator(".card .head b:nth-child(2)").all_inner_texts()]


def count(tab):
    return tab.locator("#count").inner_text()


def test_the_most_rewarded_wrong_answers_come_first(opened):
    tab = opened()
    assert count(tab) == "1 to 10 of 2,000"
    assert rewards(tab) == [4.95] * 4 + [4.9] * 4 + [4.85] * 2  # rows 495, 490, 485 of four runs
    assert tab.locator(".card.wrong").count() == 10
    assert tab.locator(".card").first.get_by_text("gold 495").count() == 1


def test_filters_and_sorting(opened):
    tab = opened()
    tab.select_option("#f-arm", "sum")
    assert count(tab).endswith("of 1,000")
    tab.select_option("#f-seed", "1")
    tab.select_option("#f-right", "right")
    assert count(tab).endswith("of 400")
    tab.select_option("#f-right", "")
    tab.select_option("#f-flag", "=repetition")
    assert count(tab) == "1 to 10 of 10"
    assert tab.locator(".flags").first.inner_text().startswith("⚑ repetition: ")
    tab.fill("#f-from", "2")
    tab.fill("#f-to", "3")
    assert count(tab) == "1 to 2 of 2"
    tab.click("#clear")
    tab.select_option("#f-sort", "-reward")
    assert rewards(tab) == [0.0] * 4 + [0.01] * 4 + [0.02] * 2
    tab.fill("#f-text", "QUESTION 77?")
    assert count(tab) == "1 to 4 of 4"
    tab.fill("#f-text", "nobody wrote this")
    assert count(tab) == "No rollout is like that." and tab.locator(".card").count() == 0
    assert tab.locator("#next").is_disabled()


def test_tokens_are_shaded_by_the_chosen_reading(opened):
    tab = opened()
    tab.select_option("#f-feature", label="feature_7 (weight 1.5)")
    tokens = tab.locator(".card").first.locator(".tokens span")
    classes = [tokens.nth(t).get_attribute("class") or "" for t in range(40)]
    assert ["up" in c for c in classes[:39]] == [t % 3 == 0 for t in range(39)] and "unread" in classes[39]
    tokens.nth(3).hover()
    said = tab.locator(".card").first.locator(".value")
    assert "token 4 of 40" in said.inner_text() and "feature_7 = 2" in said.inner_text()
    assert "feature_9 3" in said.inner_text()  # the largest of the others
    tokens.nth(39).hover()
    assert said.inner_text().endswith("not read")
    tab.select_option("#f-feature", "")
    assert tab.locator(".tokens .up").count() == 0


def test_keyboard_alone(opened):
    tab = opened()
    tab.keyboard.press("j")
    said = tab.locator(".card").first.locator(".value")
    assert said.inner_text().startswith("token 1 of 40")
    for key, place in (
        ("ArrowRight", 2),
        ("ArrowRight", 3),
        ("ArrowLeft", 2),
        ("End", 40),
        ("ArrowRight", 40),
        ("Home", 1),
    ):
        tab.keyboard.press(key)
        assert said.inner_text().startswith(f"token {place} of 40")
    tab.keyboard.press("j")
    assert tab.locator(".card").nth(1).locator(".tokens").evaluate("box => box === document.activeElement")
    tab.keyboard.press("n")
    assert count(tab) == "11 to 20 of 2,000"
    tab.keyboard.press("p")
    tab.keyboard.press("/")
    tab.keyboard.type("njp/")  # typed, not obeyed
    assert tab.locator("#f-text").input_value() == "njp/"
    tab.keyboard.press("Tab")
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_what_means_harm_is_text(opened):
    tab = opened()
    tab.fill("#f-text", "onerror=")
    assert count(tab) == "1 to 4 of 4"
    assert HARM in tab.locator(".card .tokens").first.inner_text()
    assert "\ufffd" in tab.locator(".card .tokens").first.inner_text()  # what turns the writing direction
    assert HARM in tab.locator("h1").inner_text()
    assert tab.evaluate("window.harmed") is None


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "dark")])
def test_phone_and_dark_mode(opened, width, scheme):
    tab = opened(width, scheme)
    for details in tab.locator("details").all():
        details.evaluate("element => (element.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = tab.evaluate(
        "() => [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    light = [sum(map(int, c.removeprefix("rgb(").removesuffix(")").split(","))) for c in (ink, paper)]
    assert (light[0] > light[1]) is (scheme == "dark")


def test_charts_are_drawn_when_they_come_into_view_and_arms_can_be_hidden(opened):
    tab = opened()
    chart = tab.locator('.chart:has(small:text-is("kl")) .plot, .chart:has(h4:has-text("KL to the")) .plot').first
    chart.scroll_into_view_if_needed()
    chart.locator(".scatterlayer .trace").first.wait_for(state="attached")
    assert chart.locator(".scatterlayer .trace").count() == 4  # a line and a band for each of two arms
    tab.locator("#arms input").nth(1).uncheck()
    assert chart.locator(".scatterlayer .trace").count() == 2
    tab.locator("#packs").scroll_into_view_if_needed()
    plot = tab.locator('.plot[data-what="quantiles"]').first
    plot.scroll_into_view_if_needed()
    plot.locator(".scatterlayer .trace").first.wait_for(state="attached")


def test_two_thousand_rollouts_stay_smooth(opened):
    """The time from a change of filter to the new list, in the browser, on whatever machine this is."""
    tab, spent = opened(), []
    for arm, sort in (("sum", "reward"), ("", "reading"), ("outcome", "hacking"), ("", "length"), ("", "hacking")):
        tab.select_option("#f-arm", arm)
        tab.select_option("#f-sort", sort)
        spent.append(float(tab.evaluate("document.body.dataset.milliseconds")))
    print(f"filter and sort of 2,000 rollouts: {sorted(spent)[2]:.0f} ms (median of {len(spent)})")
    assert sorted(spent)[2] < 500
