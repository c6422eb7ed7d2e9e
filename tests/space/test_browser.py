"""The page in a real browser: Debian's chromium, driven by playwright. Skipped where either is missing (`apt-get install chromium`,
`pip install -e ".[browser]"`). Screenshots of every tab go to outputs/space/, which is not committed. Nothing here waits for a time:
what is waited for is what the page shows."""
from __future__ import annotations

import base64
import io
import re
import shutil
import time
from contextlib import contextmanager
from urllib.parse import parse_qs, urlencode, urlsplit

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from space_server import FILMED, ROOT
from test_space import pixels, taught

import zoo

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")]
SHOTS = ROOT / "outputs" / "space"
GONE = "reading 'getBoundingClientRect'"        # gradio's list of options, asked where it stands a moment after its tab was left; nobody sees it
PATIENCE = 60_000            # milliseconds until something is given up; nothing takes that long on an idle machine


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
    page.set_default_timeout(PATIENCE)
    page.errors = []
    page.on("pageerror", lambda e: None if GONE in str(e) else page.errors.append(str(e)))
    yield page
    assert page.errors == []
    context.close()


@contextmanager
def page_here(monkeypatch):
    """The page in this process, where what it calls can be replaced; its address."""
    import app
    monkeypatch.setattr("tabs.cache_examples", lambda: None)
    demo, (_, url, _) = app.serve(prevent_thread_lock=True)
    try:
        yield url
    finally:
        demo.close()


def visit(page, server, query=""):
    page.goto(f"{server[0]}/{query}")
    page.wait_for_selector("#fs-link, [role=alert]")


def wish(**what) -> str:
    return "?" + urlencode(what)


def turn(page, title: str):
    page.get_by_role("tab", name=title).click()


def says(page, where: str, words: str):
    """Wait until the place shows the words."""
    page.wait_for_function("([where, words]) => document.querySelector(where)?.innerText.includes(words)", arg=[where, words])


def choose(page, where: str, name: str):
    """Take an option of a list, as a visitor does."""
    page.locator(f"{where} input").click()
    page.get_by_role("option", name=name, exact=True).click()


def pictures(page, board: str = "#fs-race-board .fs-lane") -> list[str]:
    return page.eval_on_selector_all(f"{board} img", "all => all.map(i => i.src)")


def seen(src: str) -> np.ndarray:
    """Pixels of a picture on the page."""
    return pixels(Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))))


def race(page):
    """Press Race and wait until the new race is over."""
    page.evaluate("document.querySelector('#fs-link')?.remove()")
    page.click("#fs-race")
    page.wait_for_selector("#fs-link")


# ------------------------------------------------------------------------------------------------------- racing
def test_race_change_steps_and_reload_the_link(page, server):
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


@pytest.mark.parametrize("name, what, call", [("dmd.emoji-4step", "noto hospital", {"prompt": "noto hospital"}),
                                              ("dmd.fashion-4step", "sneaker", {"class_labels": [7]})])
def test_a_shipped_student_races_its_teacher_and_goes_home(here, page, server, name, what, call, tmp_path, monkeypatch):
    """The page shows what zoo.load makes of the seed, beside what its teacher makes of the same noise; and the lines it hands out draw that again."""
    visit(page, server, wish(student=name, prompt=what, seed=3, steps=4))
    student, teacher = map(seen, pictures(page))
    alone = zoo.load(name)(**call, num_inference_steps=4, generator=torch.Generator().manual_seed(3)).images[0]
    assert np.array_equal(student, pixels(alone)) and np.array_equal(teacher, taught(here, here.order(name, what, 3, 4)))
    assert "4 network calls" in page.inner_text("#fs-race-board .fs-student") and "step 25 of 25" in page.inner_text("#fs-race-board .fs-teacher")
    turn(page, "Take it home")
    says(page, "#fs-code-zoo", f'zoo.load("{name}")')
    says(page, "#fs-home-message", "The same picture, on your machine")
    says(page, "#fs-code-train", "train_dmd.py")
    page.wait_for_function("document.querySelector('#fs-card')?.innerText.length > 500")
    monkeypatch.chdir(tmp_path)
    for place in ("zoo", "diffusers"):
        exec(compile("\n".join(page.locator(f"#fs-code-{place} .cm-line").all_inner_texts()), place, "exec"), {})
        assert np.array_equal(pixels(Image.open("student.png")), student), place


def test_two_students_race_one_teacher(page, server):
    visit(page, server, "?student=tiny-words&prompt=red+heart&seed=5&steps=4")
    alone = pictures(page)
    choose(page, "#fs-rival", "tiny-rival")
    race(page)
    both = pictures(page)
    assert page.locator("#fs-race-board h3").all_inner_texts() == ["tiny-words", "tiny-rival", "sd-teacher"]
    assert len(both) == 3 and [both[0], both[2]] == alone and both[1] != both[0]
    assert parse_qs(page.get_attribute("#fs-link", "href")[1:])["rival"] == ["tiny-rival"]
    page.reload()
    page.wait_for_selector("#fs-link")
    assert pictures(page) == both and page.input_value("#fs-rival input") == "tiny-rival"
    choose(page, "#fs-rival", "none")
    race(page)
    assert pictures(page) == alone


def test_the_link_is_copied_and_draws_the_race_again(page, server):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.goto(server[0])
    page.click("#fs-copy")
    says(page, "#fs-copy", "No race yet")
    visit(page, server, "?student=tiny-classes&prompt=class+2&seed=9&steps=2")
    drawn = pictures(page)
    page.click("#fs-copy")
    says(page, "#fs-copy", "Copied")
    link = page.evaluate("navigator.clipboard.readText()")
    assert parse_qs(urlsplit(link).query) == {"student": ["tiny-classes"], "prompt": ["class 2"], "seed": ["9"], "steps": ["2"]} and link.startswith(server[0])
    says(page, "#fs-copy", "Copy link")                              # the button is itself again
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")          # a page that is neither on https nor on localhost
    page.click("#fs-copy")
    says(page, "#fs-copy", "Copied")
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector("#fs-link")
    assert pictures(page) == drawn


def test_nothing_jumps_while_pictures_arrive(page, server):
    visit(page, server, "?student=tiny-words&prompt=red+heart&seed=6&steps=2")
    page.evaluate("""() => { window.heights = new Set(); const look = () => { const b = document.querySelector('#fs-race-board .fs-lanes');
        if (b) window.heights.add(Math.round(b.getBoundingClientRect().height)); requestAnimationFrame(look); }; look(); }""")
    race(page)
    heights = page.evaluate("[...window.heights]")
    assert max(heights) - min(heights) <= 2, heights


def test_two_visitors_at_once(browser, server):
    contexts = [browser.new_context() for _ in range(2)]
    pages = [c.new_page() for c in contexts]
    for p, seed in zip(pages, (21, 22)):
        p.goto(f"{server[0]}/?student=tiny-words&prompt=blue+star&seed={seed}&steps=4", wait_until="commit")
    for p in pages:
        p.wait_for_selector("#fs-link", timeout=PATIENCE)
    assert "seed=21" in pages[0].get_attribute("#fs-link", "href") and "seed=22" in pages[1].get_attribute("#fs-link", "href")
    assert pictures(pages[0])[0] != pictures(pages[1])[0]
    assert [p.locator("#fs-past a").count() for p in pages] == [1, 1]                # each sees its own history alone
    for c in contexts:
        c.close()


def test_fifty_races_leave_no_memory_behind(page, server):
    process = psutil.Process(server[1])
    visit(page, server, "?student=tiny-classes&prompt=class+1&seed=1&steps=1")
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


# ------------------------------------------------------------------------------------------------------- mistakes
HTML = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
BAD = {"prompt is empty": dict(student="tiny-words", prompt=""), "10,000 characters": dict(student="tiny-words", prompt="x" * 10_000),
       "seed -3 is out of range": dict(student="tiny-words", prompt="a", seed=-3),
       "seed 99999999999 is out of range": dict(student="tiny-words", prompt="a", seed=99999999999),
       "seed '²' is no whole number": dict(student="tiny-words", prompt="a", seed="²"),
       "trained for 1, 2, 4 steps, not 3": dict(student="tiny-words", prompt="a", steps=3),
       "'class 9' is none": dict(student="tiny-classes", prompt="class 9"), "cannot race tiny-words": dict(student="tiny-words", prompt="a", rival="tiny-ode"),
       "unknown student 'nobody'": dict(student="nobody"), "unknown student '<img": dict(student=HTML)}


def test_bad_links_say_so_and_the_page_goes_on(page, server):
    for said, what in BAD.items():
        visit(page, server, wish(**what))
        shown = page.inner_text("[role=alert]")
        assert said in shown and "Traceback" not in shown, (said, shown)
        words = page.locator("#fs-prompt textarea, #fs-prompt input").first
        if words.is_visible():
            words.fill("red heart")
        else:
            choose(page, "#fs-class", "class 1" if what["student"] == "tiny-classes" else "sneaker")
        page.locator("#fs-seed input").fill("1")
        race(page)
        assert page.locator("[role=alert]").count() == 0 and len(pictures(page)) == 2, said
    assert page.evaluate("window.hacked") is None


def test_bad_words_typed_in(page, server):
    visit(page, server, "?student=tiny-words&prompt=red+heart&seed=1&steps=1")
    box, seed = page.locator("#fs-prompt textarea, #fs-prompt input").first, page.locator("#fs-seed input")
    for place, words, said, mend in ((box, "", "prompt is empty", "red heart"), (box, "x" * 10_000, "10,000 characters", "red heart"),
                                     (seed, "-3", "seed -3 is out of range", "1"),
                                     (seed, "99999999999", "out of range", "1"), (seed, "", "no whole number", "1")):
        place.fill(words)
        page.click("#fs-race")
        says(page, "[role=alert]", said)
        place.fill(mend)
        race(page)
        assert page.locator("[role=alert]").count() == 0
    turn(page, "Diversity")                                           # the same words there
    box.fill("")
    page.click("#fs-diversity-go")
    says(page, "#fs-diversity-board [role=alert]", "prompt is empty")
    turn(page, "Race")
    box.fill(HTML + " ${window.hacked=1} {{window.hacked=1}}")
    race(page)
    assert "plain text" in page.inner_text("#fs-race-board [role=status]")
    assert HTML[:50] in page.get_attribute("#fs-race-board .fs-student img", "alt") and page.evaluate("window.hacked") is None
    visit(page, server, page.get_attribute("#fs-link", "href"))       # and as a link
    assert "plain text" in page.inner_text("#fs-race-board [role=status]") and page.evaluate("window.hacked") is None


def test_a_card_that_means_ill_is_shown_as_words(page, server):
    visit(page, server, "?student=tiny-rival&prompt=red+heart&seed=1&steps=1")
    assert "<img src=x" in page.inner_text(".fs-chips")               # an example of the card, as a button
    turn(page, "Take it home")
    says(page, "#fs-card", "said the card")
    says(page, "#fs-code-train", "--teacher <b>me</b>")
    for link in page.locator("#fs-card a").all():
        assert not (link.get_attribute("href") or "").startswith("javascript:")
    assert page.locator("#fs-card script, #fs-card iframe, #fs-card [onerror], #fs-card [onload]").count() == 0
    page.locator(".fs-chips button").first.click()
    turn(page, "Race")
    says(page, "#fs-race-board [role=status]", "plain text")
    page.wait_for_selector("#fs-link")
    assert page.evaluate("window.hacked") is None


# ------------------------------------------------------------------------------------------------------- other tabs
def test_eight_seeds_and_the_ladder_are_drawn(page, server):
    visit(page, server, "?student=tiny-classes&prompt=class+2&seed=5&steps=4")
    raced = [seen(p) for p in pictures(page)]
    turn(page, "Diversity")
    page.click("#fs-diversity-go")
    page.wait_for_function("document.querySelector('#fs-diversity-board .fs-headline').innerText.match(/(%|times) .*variety/)")
    strip = [seen(p) for p in pictures(page, "#fs-diversity-board")]
    assert len(strip) == 16 and page.locator("#fs-diversity-board figcaption").all_inner_texts() == [str(s) for s in range(5, 13)] * 2
    for got, alone in ((strip[0], raced[0]), (strip[8], raced[1])):                  # a seed is a seed, alone or among eight
        assert np.abs(got.astype(int) - alone).max() <= 1
    assert len(re.findall(r"diversity \d\.\d{3}", page.inner_text("#fs-diversity-board"))) == 2
    turn(page, "Steps ladder")
    page.click("#fs-ladder-go")
    page.wait_for_function("document.querySelectorAll('#fs-ladder-board img').length === 8")          # 3 + 4 + the teacher at leisure
    rungs = [seen(p) for p in pictures(page, "#fs-ladder-board")]
    assert np.array_equal(rungs[2], raced[0]) and np.array_equal(rungs[7], raced[1])
    assert "not trained for 8 steps" in page.inner_text("#fs-ladder-board")
    assert page.eval_on_selector_all("img", "all => all.filter(i => !i.alt).length") == 0


def test_the_leaderboard_is_sorted_and_changed(page, server):
    import board
    page.goto(server[0])
    turn(page, "Leaderboard")
    page.wait_for_selector(ROWS)
    (first, *others), path = board.boards(), next(iter(board.boards().values()))
    best = board.rows(path)
    says(page, "#fs-leaderboard-head", next(r["who"] for r in best if r["kind"] == "method"))
    headers = board.table(best)[0]
    column = lambda name: page.eval_on_selector_all(f"{ROWS} > :nth-child({headers.index(name) + 1})", "all => all.map(c => c.innerText)")
    press = lambda name: page.locator("#fs-leaderboard thead button", has_text=re.compile(f"^{re.escape(name)}")).first.click()
    assert len(column("model")) == len(best) and column("model")[0] == best[0]["who"]
    for name in ("training s", "model"):                              # numbers, with empty cells, and words
        press(name)
        up = [v for v in column(name) if v]
        assert page.locator("#fs-leaderboard th[aria-sort=ascending]").inner_text() == name
        page.keyboard.press("Enter")                                  # the other way, by keyboard
        down = [v for v in column(name) if v]
        assert page.locator("#fs-leaderboard th[aria-sort=descending]").inner_text() == name and page.locator("#fs-leaderboard th[aria-sort]").count() == 1
        plain = (lambda v: float(v.replace(",", ""))) if name != "model" else (lambda v: v)
        assert [plain(v) for v in up] == sorted(map(plain, up)) and [plain(v) for v in down] == sorted(map(plain, down), reverse=True) and len(set(up)) > 2
        assert "" not in column(name)[: len(up)]                      # what is empty stays below
    assert "recall" not in page.inner_text("#fs-plots")
    page.locator("#fs-board-quality input").click()
    page.get_by_role("option", name="recall").click()
    says(page, "#fs-plots", "recall")
    page.locator("#fs-board-cost input").click()
    page.get_by_role("option", name=board.COST["training_calls"]).click()
    says(page, "#fs-plots", board.COST["training_calls"])
    assert others, "one board alone: nothing to change to"
    choose(page, "#fs-board-name", board.label(board.boards()[others[0]]))
    says(page, "#fs-leaderboard-head", board.facts(board.boards()[others[0]])[:40])
    assert page.locator("#fs-plots svg[role=img]").count() == 2 and first != others[0]


def test_a_streaming_student_has_a_tab(page, server):
    page.goto(server[0])
    turn(page, "Video")
    words = page.locator("#fs-video-prompt textarea, #fs-video-prompt input").first
    words.fill("")
    page.click("#fs-video-go")
    says(page, "#fs-video-board [role=alert]", "prompt is empty")
    words.fill(FILMED)
    page.click("#fs-video-go")
    says(page, "#fs-video-board .fs-headline", "frame 32 of 32")
    page.wait_for_selector("#fs-video-board .fs-film img[src^='data:image/webp']")
    film = Image.open(io.BytesIO(base64.b64decode(page.get_attribute("#fs-video-board .fs-film img", "src").partition(",")[2])))
    assert film.n_frames == 32 and FILMED in page.get_attribute("#fs-video-board .fs-film img", "alt")
    assert page.locator("#fs-video-board [role=alert]").count() == 0


def test_a_student_is_distilled_watched_and_raced(here, page, folder, monkeypatch):
    """With a tiny teacher and few steps; the rest is the tab as it is. Stop leaves no process."""
    import distil
    monkeypatch.setattr(distil, "TEACHERS", (str(folder / "pixel-teacher"),))
    monkeypatch.setattr(distil, "FLAGS", ("--steps", "120", "--batch", "4", "--sample_every", "40", "--measure_every", "40", "--log_every", "10",
                                          "--checkpoint_every", "1000"))
    monkeypatch.setattr(distil, "_jobs", [])
    with page_here(monkeypatch) as url:
        page.goto(url)
        turn(page, "Distil")
        says(page, "#fs-distil-board", "Nothing is running")
        page.click("#fs-distil-stop")
        says(page, "#fs-distil-board [role=alert]", "no training is running")
        page.click("#fs-distil-go")
        says(page, "#fs-distil-board", "of training on pixel-teacher")
        page.click("#fs-distil-go")
        says(page, "#fs-distil-board [role=alert]", "already running")
        page.click("#fs-distil-stop")
        says(page, "#fs-distil-board", "A stopped run leaves no student")
        assert not distil._jobs[-1].running
        page.evaluate("""() => { window.live = new Set(); new MutationObserver(() => { const board = document.querySelector('#fs-distil-board');
            if (board.innerText.includes('of training on'))
                for (const svg of board.querySelectorAll('svg')) window.live.add(svg.getAttribute('aria-label').split(',')[0]); })
            .observe(document.querySelector('#fs-distil-board'), {childList: true, subtree: true, characterData: true, attributes: true}); }""")
        page.click("#fs-distil-go")
        page.wait_for_selector("#fs-distil-race", timeout=3 * PATIENCE)          # a niced process, that shares what cores there are
        says(page, "#fs-distil-board", "is ready to race")
        assert {"student loss", "critic loss"} <= set(page.evaluate("[...window.live]"))          # while it ran
        assert page.locator("#fs-distil-board polyline").count() >= 2 and page.locator("#fs-distil-board .fs-health li").count() >= 1
        assert "Teacher and student" in page.get_attribute("#fs-distil-board .fs-watch img", "alt")
        page.click("#fs-distil-race")
        page.wait_for_selector("#fs-link")
        name = parse_qs(page.get_attribute("#fs-link", "href")[1:])["student"][0]
        assert re.fullmatch(r"fresh-pixel-teacher-\d+", name) and len(pictures(page)) == 2 and page.locator("#fs-race").is_visible()
        o = here.order(name, "class 0", 0, 4)
        assert np.array_equal(seen(pictures(page)[0]), pixels(here.draw(o.student, o.subject, [0], 4).images[0]))
        turn(page, "Take it home")
        says(page, "#fs-home-message", "deleted when the page ends")
    for job in distil._jobs:
        job.forget()


def test_stop_and_leaving_end_what_is_drawn(here, browser, monkeypatch):
    """With a teacher that takes its time and counts. Whether it has ended is seen by a count that stays."""
    count, teach = {"steps": 0}, here.teach

    def slow(*args, **kwargs):
        for drawn in teach(*args, **kwargs):
            count["steps"] += 1
            time.sleep(0.25)
            yield drawn
    here.warm(here.racer("tiny-words"))
    monkeypatch.setattr(here, "teach", slow)

    def ended() -> bool:
        """It stays, long before the teacher's last step."""
        limit = time.monotonic() + 20
        while time.monotonic() < limit:
            before = count["steps"]
            time.sleep(1.5)
            if count["steps"] == before:
                return before < here.TEACHER_STEPS
        return False

    def under_way(page):
        limit = time.monotonic() + 40
        while count["steps"] < 2 and time.monotonic() < limit:
            page.wait_for_timeout(50)
        assert count["steps"] >= 2

    with page_here(monkeypatch) as url:
        def begin():
            page = browser.new_context().new_page()
            count["steps"] = 0
            page.goto(f"{url}?student=tiny-words&prompt=red+heart&seed=8&steps=1", wait_until="commit")
            under_way(page)
            return page

        page = begin()
        page.context.close()                  # a visitor who leaves
        assert ended(), count
        page = begin()
        page.click("#fs-stop")                # a race that the link started
        assert ended(), count
        says(page, "#fs-race-board [role=alert]", "Stopped")
        for title, name in (("Race", "race"), ("Diversity", "diversity"), ("Steps ladder", "ladder")):          # and what the buttons start
            turn(page, title)
            count["steps"] = 0
            page.click("#fs-race" if name == "race" else f"#fs-{name}-go")
            under_way(page)
            page.click("#fs-stop" if name == "race" else f"#fs-{name}-stop")
            assert ended(), (name, count)
            says(page, f"#fs-{name}-board [role=alert]", "Stopped")
        for name in ("race", "diversity", "ladder"):                  # nothing that was under way spoke after that
            assert page.locator(f"#fs-{name}-board").evaluate("board => board.textContent").count("Stopped") == 1
        page.context.close()


# ------------------------------------------------------------------------------------------------------- looks
ROWS = "#fs-leaderboard tbody tr"
TABS = {"Race": "race", "Diversity": "diversity", "Steps ladder": "ladder", "Leaderboard": "leaderboard", "Take it home": "home", "Distil": "distil",
        "Video": "video"}
# Controls and headings whose words do not fit into them, and whatever sticks out of the page without a scroll bar of its own.
CUT = """width => { const shown = e => e.offsetParent && getComputedStyle(e).visibility !== 'hidden' && e.getBoundingClientRect().width > 2;
const scrolls = e => { for (let p = e.parentElement; p; p = p.parentElement)
                           if (/auto|scroll/.test(getComputedStyle(p).overflowX)) return true; return false; };
const said = e => (e.id || e.className.toString().slice(0, 30)) + ': ' + e.innerText.slice(0, 40);
const cut = [...document.querySelectorAll('button, label, label > span, h1, h2, h3, .fs-headline, .fs-calls, figcaption, [role=tab]')].filter(e => shown(e)
    && e.innerText && e.scrollWidth > e.clientWidth + 1
    && getComputedStyle(e).display !== 'inline' && !scrolls(e)).map(said);
const out = [...document.querySelectorAll('#fs-panel *, #fs-tabs *, .fs-header *')].filter(e => shown(e) && !scrolls(e)
    && (e.getBoundingClientRect().right > width + 1 || e.getBoundingClientRect().left < -1)).map(said);
return [...cut, ...out]; }"""


@pytest.mark.parametrize("width, height", [(1280, 1000), (390, 844)])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_tab_fits_and_is_photographed(page, server, width, height, theme):
    page.set_viewport_size({"width": width, "height": height})
    visit(page, server, f"?__theme={theme}&" + ("student=dmd.emoji-4step&prompt=noto+hospital&seed=1&steps=4" if (width == 390) == (theme == "dark") else
                                               "student=dmd.fashion-4step&prompt=sneaker&seed=1&steps=4"))
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 19, 17)") == (theme == "dark")
    assert [t.strip() for t in page.get_by_role("tab").all_inner_texts()] == list(TABS)
    SHOTS.mkdir(parents=True, exist_ok=True)
    for title, name in TABS.items():
        turn(page, title)
        page.wait_for_selector({"home": "#fs-card h1, #fs-card h2", "leaderboard": ROWS}.get(name, f"#fs-{name}-board"))
        if name in ("diversity", "ladder"):
            page.click(f"#fs-{name}-go")
            page.wait_for_function("([board, n]) => document.querySelectorAll(`${board} img[src^='data:image/png']`).length === n",
                                   arg=[f"#fs-{name}-board", {"diversity": 16, "ladder": 8}[name]])
        assert page.evaluate("document.documentElement.scrollWidth") <= width, title
        assert page.evaluate(CUT, width) == [], title
        assert page.eval_on_selector_all("img", "all => all.filter(i => !i.alt && i.offsetParent).length") == 0, title
        if name == "race":                                            # a long name moves no picture
            tops = {round(frame.bounding_box()["y"]) for frame in page.locator("#fs-race-board .fs-frame").all()}
            assert len(tops) == 1, tops
        if name == "home":                                            # side by side only where there is room
            assert page.locator("#fs-code-diffusers").bounding_box()["width"] > 320
        page.screenshot(path=SHOTS / f"{name}-{width}-{theme}.png", full_page=True)


# What has the focus: its own place, whether it can be seen, and its name.
FOCUS = """() => { const e = document.activeElement; if (!e || e === document.body) return null;
const ring = e => { const s = getComputedStyle(e); return s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2 || s.boxShadow !== 'none'; };
let seen = false; for (let p = e, i = 0; p && i < 3; p = p.parentElement, i++) seen = seen || ring(p);
return [e.closest('[id^=fs-]')?.id || '', seen, e.tagName + ' ' + (e.getAttribute('aria-label') || e.innerText || e.className).slice(0, 40)]; }"""


def test_everything_by_keyboard(page, server):
    """Every control can be reached, left and seen where it has the focus; passing them changes nothing."""
    visit(page, server, "?student=tiny-words&prompt=red+heart&seed=1&steps=2")
    for title, name in TABS.items():
        page.get_by_role("tab", name=title).focus()
        page.keyboard.press("Enter")
        page.wait_for_selector({"home": "#fs-card", "leaderboard": ROWS}.get(name, f"#fs-{name}-board"))
        page.evaluate("() => { const top = document.querySelector('.fs-header'); top.tabIndex = -1; top.focus(); }")          # from the top of the page
        passed = []
        while len(passed) < 80:
            page.keyboard.press("Tab")
            now = page.evaluate(FOCUS)
            if now is None:
                break
            passed.append(now)
        assert 5 < len(passed) < 80, (title, passed)
        unseen = [what for _, ring, what in passed if not ring]
        assert not unseen, (title, unseen)
        wanted = {"race": {"fs-prompt", "fs-seed", "fs-dice", "fs-student", "fs-rival", "fs-steps", "fs-race", "fs-stop", "fs-copy"},
                  "diversity": {"fs-diversity-go", "fs-diversity-stop"},
                  "ladder": {"fs-ladder-go"}, "leaderboard": {"fs-board-name", "fs-board-quality", "fs-board-cost"}, "home": {"fs-student"},
                  "distil": {"fs-distil-teacher", "fs-distil-seconds", "fs-distil-go"}, "video": {"fs-video-prompt", "fs-video-go"}}[name]
        assert wanted <= {place for place, _, _ in passed}, (title, passed)
    page.get_by_role("tab", name="Race").focus()
    page.keyboard.press("Enter")
    page.locator("#fs-race").focus()
    page.evaluate("document.querySelector('#fs-link')?.remove()")
    page.keyboard.press("Enter")
    page.wait_for_selector("#fs-link")
    assert page.get_attribute("#fs-link", "href") == "?student=tiny-words&prompt=red+heart&seed=1&steps=2"
