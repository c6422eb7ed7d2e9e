"""The page in a real browser: Debian's chromium, driven by playwright. Skipped where either is missing (`apt-get install chromium`,
`pip install -e ".[browser]"`). Screenshots go to outputs/space/, which is not committed."""
from __future__ import annotations

import shutil
import time

import psutil
import pytest
from space_server import ROOT

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")]
SHOTS = ROOT / "outputs" / "space"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--enable-precise-memory-info"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(45_000)
    page.errors = []
    page.on("pageerror", lambda e: page.errors.append(str(e)))
    yield page
    assert page.errors == []
    context.close()


def visit(page, server, query=""):
    page.goto(f"{server[0]}/{query}")
    page.wait_for_selector("#fs-link, [role=alert]")


def pictures(page) -> list[str]:
    return page.eval_on_selector_all("#fs-race-board .fs-lane img", "all => all.map(i => i.src)")


def race(page):
    """Press Race and wait until the new race is over."""
    page.evaluate("document.querySelector('#fs-link')?.remove()")
    page.click("#fs-race")
    page.wait_for_selector("#fs-link")


def test_race_change_steps_and_reload_the_link(page, server):
    page.goto(server[0])
    page.wait_for_selector("#fs-race-board .fs-lane")
    assert page.get_by_role("tab").count() >= 6
    visit(page, server, "?student=tiny-words&prompt=red+heart&seed=5&steps=4")
    assert page.locator("#fs-steps label").all_inner_texts() == ["1", "2", "4"]
    four = pictures(page)
    page.locator("#fs-steps label", has_text="1").click()
    race(page)
    one = pictures(page)
    assert "1 network call" in page.inner_text("#fs-race-board .fs-student") and "50 network calls" in page.inner_text("#fs-race-board .fs-teacher")
    assert one[0] != four[0] and one[1] == four[1]                   # other steps, same noise
    page.wait_for_function("location.search.includes('steps=1')")
    assert "seed=5" in page.url and "faster" in page.inner_text("#fs-race-board .fs-headline")
    assert page.locator("#fs-past a").count() == 2
    page.reload()
    page.wait_for_selector("#fs-link")
    assert pictures(page) == one


def test_nothing_jumps_while_pictures_arrive(page, server):
    visit(page, server, "?student=tiny-words&prompt=red+heart&seed=6&steps=2")
    page.evaluate("""() => { window.heights = new Set(); const look = () => { const b = document.querySelector('#fs-race-board .fs-lanes');
        if (b) window.heights.add(Math.round(b.getBoundingClientRect().height)); requestAnimationFrame(look); }; look(); }""")
    race(page)
    heights = page.evaluate("[...window.heights]")
    assert max(heights) - min(heights) <= 2, heights


BAD = {"": "", "?student=nobody": "unknown student 'nobody'", "?student=tiny-words&prompt=": "prompt is empty", "?student=tiny-words&prompt=" + "x" * 6000: "give at most 300",
       "?student=tiny-words&prompt=a&seed=-3": "seed -3 is out of range", "?student=tiny-words&prompt=a&seed=99999999999": "out of range",
       "?student=tiny-words&prompt=a&steps=3": "trained for 1, 2, 4 steps, not 3", "?student=%3Cscript%3E": "unknown student '<script>'"}


@pytest.mark.parametrize("query", [q for q in BAD if q], ids=[v for v in BAD.values() if v])
def test_a_bad_link_says_so_and_the_page_goes_on(page, server, query):
    visit(page, server, query)
    said = page.inner_text("[role=alert]")
    assert BAD[query] in said and "Traceback" not in said
    race_on = page.locator("#fs-prompt textarea, #fs-prompt input").first
    if race_on.is_visible():
        race_on.fill("red heart")
    page.locator("#fs-seed input").fill("1")
    race(page)
    assert page.locator("[role=alert]").count() == 0 and len(pictures(page)) == 2


def test_bad_words_typed_in(page, server):
    visit(page, server, "?student=tiny-words&prompt=red+heart&seed=1&steps=1")
    box = page.locator("#fs-prompt textarea, #fs-prompt input").first
    for words, said in (("", "prompt is empty"), ("x" * 10_000, "10,000 characters")):
        box.fill(words)
        page.click("#fs-race")
        page.wait_for_function("said => document.querySelector('[role=alert]')?.innerText.includes(said)", arg=said)
    box.fill("<img src=x onerror=\"window.hacked=1\"><script>window.hacked=1</script>")
    page.click("#fs-race")
    page.wait_for_selector("#fs-race-board [role=status]")
    page.wait_for_selector("#fs-link")
    assert "plain text" in page.inner_text("#fs-race-board [role=status]") and page.evaluate("window.hacked") is None


def test_two_visitors_at_once(browser, server):
    contexts = [browser.new_context() for _ in range(2)]
    pages = [c.new_page() for c in contexts]
    for p, seed in zip(pages, (21, 22)):
        p.goto(f"{server[0]}/?student=tiny-words&prompt=blue+star&seed={seed}&steps=4", wait_until="commit")
    for p in pages:
        p.wait_for_selector("#fs-link", timeout=45_000)
    assert "seed=21" in pages[0].get_attribute("#fs-link", "href") and "seed=22" in pages[1].get_attribute("#fs-link", "href")
    assert pictures(pages[0])[0] != pictures(pages[1])[0]
    for c in contexts:
        c.close()


def test_fifty_races_leave_no_memory_behind(page, server):
    process = psutil.Process(server[1])
    visit(page, server, "?student=tiny-words&prompt=red+heart&seed=1&steps=1")
    sizes = []
    for i in range(60):
        page.locator("#fs-seed input").fill(str(100 + i))
        race(page)
        assert f"seed={100 + i}" in page.get_attribute("#fs-link", "href")
        if i in (9, 59):
            page.wait_for_timeout(500)
            page.request_gc()
            sizes.append((process.memory_info().rss / 2**20, page.evaluate("performance.memory.usedJSHeapSize") / 2**20))
    (served, shown), (served_after, shown_after) = sizes
    assert served_after - served < 40 and shown_after - shown < 20, f"MB of (server, page) after 10 and after 60 races: {sizes}"
    assert page.locator("#fs-past a").count() == 12


def test_a_race_and_the_other_tabs_by_keyboard(page, server):
    visit(page, server, "?student=tiny-words&prompt=red+heart&seed=1&steps=2")
    page.locator("#fs-prompt textarea, #fs-prompt input").first.focus()
    passed = []
    while not passed or passed[-1] != "fs-race":                     # every control in between can be reached, and left
        page.keyboard.press("Tab")
        passed.append(page.evaluate("document.activeElement.closest('[id^=fs-]')?.id"))
        assert len(passed) < 40, passed
    assert {"fs-seed", "fs-dice", "fs-student", "fs-steps"} <= set(passed), passed
    page.evaluate("document.querySelector('#fs-link')?.remove()")
    page.keyboard.press("Enter")
    page.wait_for_selector("#fs-link")
    assert page.get_attribute("#fs-link", "href") == "?student=tiny-words&prompt=red+heart&seed=1&steps=2"          # passing them changed nothing
    page.get_by_role("tab", name="Diversity").focus()
    page.keyboard.press("Enter")
    page.locator("#fs-diversity-go").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#fs-diversity-board .fs-headline').innerText.match(/(%|times) .*variety/)")
    assert page.locator("#fs-diversity-board img").count() == 16
    page.get_by_role("tab", name="Steps ladder").click()
    page.click("#fs-ladder-go")
    page.wait_for_function("document.querySelectorAll('#fs-ladder-board img').length === 8")          # 3 + 4 + the teacher at leisure
    assert "not trained for 8 steps" in page.inner_text("#fs-ladder-board")
    page.get_by_role("tab", name="Take it home").click()
    page.wait_for_function("document.querySelector('#fs-code-diffusers').innerText.includes('num_inference_steps=2')")
    page.get_by_role("tab", name="Leaderboard").click()
    page.wait_for_selector("#fs-leaderboard-head .fs-headline")
    page.get_by_role("tab", name="Distil").click()
    page.wait_for_function("document.querySelector('#fs-distil-board')?.innerText.includes('Nothing is running')")
    unnamed = page.eval_on_selector_all("img", "all => all.filter(i => !i.alt && i.offsetParent).length")
    assert unnamed == 0


@pytest.mark.parametrize("width, height", [(1280, 1000), (390, 844)])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_and_is_photographed(browser, server, width, height, theme):
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    visit(page, server, f"?__theme={theme}&student=tiny-words&prompt=red+heart&seed=1&steps=2")
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") in ("rgb(21, 19, 17)",)
    assert dark == (theme == "dark")
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"race-{width}-{theme}.png", full_page=True)
    context.close()


def test_stop_and_leaving_end_a_race(here, browser, monkeypatch):
    """The page in this process, with a teacher that takes its time and counts."""
    import app
    count, teach = {"steps": 0}, here.teach

    def slow(*args, **kwargs):
        for drawn in teach(*args, **kwargs):
            count["steps"] += 1
            time.sleep(0.3)
            yield drawn
    here.warm(here.racer("tiny-words"))
    monkeypatch.setattr("tabs.cache_examples", lambda: None)
    monkeypatch.setattr(here, "teach", slow)
    demo, (_, url, _) = app.serve(prevent_thread_lock=True)
    try:
        def begin():
            context = browser.new_context()
            page = context.new_page()
            count["steps"] = 0
            page.goto(f"{url}?student=tiny-words&prompt=red+heart&seed=8&steps=1", wait_until="commit")
            limit = time.monotonic() + 40
            while count["steps"] < 3 and time.monotonic() < limit:
                page.wait_for_timeout(100)
            assert count["steps"] >= 3
            return context, page

        def ended():
            time.sleep(2.5)                   # what was under way may finish its step
            before = count["steps"]
            time.sleep(2.0)
            return count["steps"] == before < here.TEACHER_STEPS

        context, page = begin()
        context.close()
        assert ended(), count
        context, page = begin()
        said = "document.querySelector('[role=alert]')?.innerText.includes('Stopped')"
        page.click("#fs-stop")                # a race that the link started
        page.wait_for_function(said)
        assert ended() and page.evaluate(said), count
        count["steps"] = 0
        page.click("#fs-race")                # and one that the button started
        page.wait_for_timeout(2500)
        page.click("#fs-stop")
        page.wait_for_function(said)
        assert count["steps"] >= 1 and ended() and page.evaluate(said), count
        context.close()
    finally:
        demo.close()
