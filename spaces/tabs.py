"""The page's tabs. Each is a function under `@tab(id, title, applies)` that builds its components and returns what others need of it."""
from __future__ import annotations

import os
import re
import time
import traceback
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import gradio as gr

import board
import distil
import looks
import racing
import takehome
from gpu import ZERO_GPU
from racing import Order, Race, Racer
from zoo.errors import UserError

EXAMPLES, EXAMPLE_SEED = 6, 0
HISTORY = 12
FRAMES = 8, 128           # of a video
PAUSE = 0.08              # seconds between two pictures on the way that are sent to the page
BROKEN = "Something broke here; the page goes on. What happened is in the log of the Space."
MACHINE = {"concurrency_limit": 1, "concurrency_id": "machine"}      # drawing: one at a time, the others queue
HIDDEN = {"api_visibility": "private"}
# After a race the address bar holds it; on huggingface.co the page around the Space is told.
SYNC = """() => { const link = document.querySelector('#fs-link'); if (!link) return;
const q = new URLSearchParams(link.getAttribute('href')); const theme = new URLSearchParams(location.search).get('__theme');
if (window.parent !== window) window.parent.postMessage({queryString: q.toString(), hash: ''}, 'https://huggingface.co');
if (theme) q.set('__theme', theme); history.replaceState(null, '', '?' + q.toString()); }"""
# The button says what came of it. Browsers hand out a clipboard on https and localhost alone; elsewhere an old command does it.
COPY = """async () => { const button = document.querySelector('#fs-copy'), link = document.querySelector('#fs-link');
const say = words => { button.innerText = words; setTimeout(() => { button.innerText = 'Copy link'; }, 1500); };
if (!link) return say('No race yet');
const text = new URL(link.getAttribute('href'), location.href).href;
try { await navigator.clipboard.writeText(text); } catch (refused) {
  const box = Object.assign(document.createElement('textarea'), {value: text}); document.body.append(box); box.select();
  const copied = document.execCommand('copy'); box.remove(); if (!copied) return say('Not allowed'); }
say('Copied'); }"""


# A header that is pressed sorts its table: upwards, then downwards; empty cells stay below.
SORT = """() => { document.addEventListener('click', event => { const head = event.target.closest('.fs-table thead button')?.parentElement; if (!head) return;
const at = [...head.parentElement.children].indexOf(head), body = head.closest('table').tBodies[0], up = head.getAttribute('aria-sort') !== 'ascending';
const value = row => row.children[at].dataset.value, number = head.classList.contains('fs-number');
const order = (a, b) => (value(a) === '') - (value(b) === '') || (up ? 1 : -1) * (number ? value(a) - value(b) : (value(a) > value(b)) - (value(a) < value(b)));
for (const other of head.parentElement.children) other.removeAttribute('aria-sort');
head.setAttribute('aria-sort', up ? 'ascending' : 'descending'); body.append(...[...body.rows].sort(order)); }); }"""


@dataclass(frozen=True)
class Tab:
    """id: its name in the page; build(wish) makes the components; applies() says whether it is shown here; draws: it uses the panel above."""
    id: str
    title: str
    build: Callable[["Wish"], Any]
    applies: Callable[[], bool]
    draws: bool


TABS: list[Tab] = []


def tab(id: str, title: str, applies: Callable[[], bool] = lambda: True, draws: bool = True):
    def register(build):
        TABS.append(Tab(id, title, build, applies, draws))
        return build
    return register


def place(tab: Tab, wish: "Wish", shelf, demo):
    with gr.Tab(tab.title, id=tab.id, elem_id=f"fs-tab-{tab.id}") as item:
        made = tab.build(wish)
    item.select(lambda: gr.update(visible=tab.draws), None, wish.box, queue=False, show_progress="hidden", **HIDDEN)
    if made and made.get("opened"):
        fn, inputs, outputs = made["opened"]
        item.select(fn, inputs, outputs, show_progress="hidden", **HIDDEN)
    return made or {}


# ------------------------------------------------------------------------------------------------------- the panel
@dataclass
class Wish:
    """The components of the panel: what to draw, and by whom."""
    box: Any
    student: Any
    rival: Any
    prompt: Any
    klass: Any
    seed: Any
    dice: Any
    steps: Any
    chips: list

    @property
    def inputs(self) -> list:
        return [self.student, self.rival, self.prompt, self.klass, self.seed, self.steps]

    @property
    def outputs(self) -> list:
        return [*self.inputs, *self.chips]


def panel() -> Wish:
    first = next(iter(racing.racers().values()), None)
    with gr.Column(elem_id="fs-panel", elem_classes="fs-panel") as box:
        with gr.Row(elem_classes="fs-row"):
            prompt = gr.Textbox(label="Prompt", lines=1, max_lines=3, placeholder="what to draw", scale=5, min_width=220, elem_id="fs-prompt", submit_btn=False)
            klass = gr.Dropdown([], label="Class", scale=5, min_width=220, elem_id="fs-class", visible=False)
            seed = gr.Number(EXAMPLE_SEED, label="Seed", precision=0, scale=1, min_width=90, elem_id="fs-seed")
            dice = gr.Button("New seed", scale=0, min_width=100, elem_id="fs-dice", variant="secondary")
        with gr.Row(elem_classes="fs-chips"):
            chips = [gr.Button("", size="sm", visible=False, min_width=60, elem_classes="fs-chip") for _ in range(EXAMPLES)]
        with gr.Row(elem_classes="fs-row"):
            student = gr.Dropdown([], label="Student", scale=3, min_width=150, elem_id="fs-student")
            rival = gr.Dropdown([], label="Rival student", scale=3, min_width=150, elem_id="fs-rival", visible=False)
            steps = gr.Radio([], label="Steps (the counts it was trained for)", scale=3, min_width=200, elem_id="fs-steps")
    wish = Wish(box, student, rival, prompt, klass, seed, dice, steps, chips)
    dice.click(None, None, seed, js=f"() => Math.floor(Math.random() * {racing.MAX_SEED})", **HIDDEN)
    student.input(switch, wish.inputs, wish.outputs, queue=False, show_progress="hidden", **HIDDEN)
    if first is None:
        box.visible = False
    return wish


def best_steps(who: Racer) -> int:
    """Four where the student has it, else its largest count."""
    return 4 if 4 in who.steps else max(who.steps)


def fill(who: Racer, subject: str | None = None, seed: int = EXAMPLE_SEED, steps: int | None = None, rival: str = "") -> list:
    """Updates of the panel for a student; by default its first example."""
    everyone = racing.racers()
    rivals = [r.name for r in everyone.values() if r.teacher == who.teacher and r.name != who.name and r.family == who.family]
    subject = subject if subject is not None else (who.examples or ("",))[0]
    chips = [gr.update(value=e, visible=True) for e in who.examples[:EXAMPLES]]
    chips += [gr.update(visible=False)] * (EXAMPLES - len(chips))
    return [gr.update(choices=list(everyone), value=who.name),
            gr.update(choices=[("none", ""), *rivals], value=rival if rival in rivals else "", visible=bool(rivals)),
            gr.update(value=subject if who.takes_prompt else "", visible=who.takes_prompt),
            gr.update(choices=list(who.classes), value=subject if subject in who.classes else None, visible=bool(who.classes)),
            gr.update(value=seed), gr.update(choices=[(str(k), k) for k in who.steps], value=steps if steps in who.steps else best_steps(who)), *chips]


def switch(student, rival, prompt, klass, seed, steps) -> list:
    """Updates of the panel for another student: what suits it stays. The event also comes when the keyboard merely passes the list, and
    an update of the list itself would then open it again."""
    who = racing.racer(student)
    foreign = {e for r in racing.racers().values() if r.teacher != who.teacher for e in r.examples}
    if who.takes_prompt:
        subject = prompt if prompt and prompt not in foreign else None
    else:
        subject = klass if klass in who.classes else None
    return [gr.skip(), *fill(who, subject, seed, steps, rival or "")[1:]]


def order_of(student, rival, prompt, klass, seed, steps) -> Order:
    """The order of the panel's values. Raises UserError."""
    who = racing.racer(student)
    return racing.order(student, prompt if who.takes_prompt else klass, seed, steps, rival or "")


def told(error: Exception) -> str:
    """What to show for an error; a bug goes to the log."""
    if isinstance(error, UserError):
        return racing.words(error)
    if isinstance(error, gr.Error):          # of ZeroGPU: no quota, no machine; it writes links
        return re.sub("<[^>]*>", "", str(error.message))
    traceback.print_exception(error)
    return BROKEN


def stop_with(button, html: str, view, events: list):
    """`button` ends `events` and shows `html`, at once and again when the step that was under way has had its say: until then it holds
    the machine, and the second word queues behind it."""
    quiet = dict(show_progress="hidden", **HIDDEN)
    button.click(lambda: html, None, view, cancels=events, queue=False, **quiet).then(lambda: html, None, view, **MACHINE, **quiet)


# ------------------------------------------------------------------------------------------------------- race
_cache: dict[str, Race] = {}


def _is_example(o: Order) -> bool:
    return o.rival is None and o.student.name not in racing.FRESH and o.seed == EXAMPLE_SEED and o.subject in o.student.examples[:EXAMPLES] and o.steps == best_steps(o.student)


def cache_examples():
    """Draw examples before the first visitor, for at most about FEWSTEP_SPACE_EXAMPLE_SECONDS (20); the others are kept when first asked for."""
    began, budget = time.perf_counter(), float(os.environ.get("FEWSTEP_SPACE_EXAMPLE_SECONDS", 20))
    here = [who for who in racing.racers().values() if who.local]
    if ZERO_GPU:                             # no GPU before a visitor comes; every lease then finds these models loaded
        for who in here:
            racing.garage.student(who)
            racing.absent_teacher(who)
        return
    for i in range(EXAMPLES):
        for who in here:
            if i < len(who.examples) and time.perf_counter() - began < budget:
                for _ in _race(racing.order(who.name, who.examples[i], EXAMPLE_SEED, best_steps(who))):
                    pass


def _race(o: Order) -> Iterator[Race]:
    key = o.query + o.student.source
    if _is_example(o) and key in _cache:
        yield _cache[key]
        return
    r = None
    for r in racing.race(o):
        yield r
    if _is_example(o) and r.speedup:
        _cache[key] = Race(r.order, r.lanes, cached=True)


def run_race(make: Callable[[], Order | None], entries: list) -> Iterator[tuple]:
    """(board, history, history shown) again and again while a race goes on; make() gives the order, or None for no race."""
    keep = gr.skip(), gr.skip()
    try:
        o = make()
        if o is None:
            yield looks.race_board(None), *keep
            return
        r, sent = None, 0.0
        for r in _race(o):
            if time.perf_counter() - sent >= PAUSE and not (r.lanes[-1].finished or r.cached):
                sent = time.perf_counter()
                yield looks.race_board(r, running=True), *keep
        entries = [looks.history_entry(r), *(e for e in entries if e["query"] != o.query)][:HISTORY]
        yield looks.race_board(r), entries, looks.history(entries)
    except Exception as error:
        yield looks.race_board(None, message=told(error)), *keep


@tab("race", "Race")
def race_tab(wish: Wish) -> dict:
    with gr.Row(elem_classes="fs-actions"):
        go = gr.Button("Race", variant="primary", elem_id="fs-race", scale=0, min_width=160)
        stop = gr.Button("Stop", elem_id="fs-stop", scale=0, min_width=90)
        copy = gr.Button("Copy link", elem_id="fs-copy", scale=0, min_width=110)
    with gr.Row(elem_classes="fs-stage"):
        with gr.Column(scale=5, min_width=320):
            view = gr.HTML(looks.race_board(None), elem_id="fs-race-board")
        with gr.Column(scale=1, min_width=190):
            past = gr.HTML(looks.history([]), elem_id="fs-past")
    entries = gr.State([], time_to_live=3600)          # seconds; of visitors who leave nothing stays
    pending = gr.State({}, time_to_live=3600)
    outputs = [view, entries, past]

    def click(student, rival, prompt, klass, seed, steps, entries):
        yield from run_race(lambda: order_of(student, rival, prompt, klass, seed, steps), entries)

    def arrive(pending, entries):
        """A visitor comes with a link, or with nothing."""
        def make():
            if pending.get("unknown"):
                raise UserError(pending["unknown"])
            return racing.order(*pending["order"]) if pending.get("order") else None
        yield from run_race(make, entries)

    sync = dict(fn=None, inputs=None, outputs=None, js=SYNC, **HIDDEN)
    quiet = dict(show_progress="hidden", **HIDDEN)
    started = [gr.on([go.click, wish.prompt.submit], click, [*wish.inputs, entries], outputs, trigger_mode="once", **MACHINE, **quiet)]
    started[0].then(**sync)
    for chip in wish.chips:
        def choose(text, student):
            return fill(racing.racer(student), text)
        event = chip.click(choose, [chip, wish.student], wish.outputs, queue=False, **quiet).then(click, [*wish.inputs, entries], outputs, **MACHINE, **quiet)
        event.then(**sync)
        started.append(event)
    copy.click(None, None, None, js=COPY, **HIDDEN)

    def stopping(others: list):
        """Stop ends whatever race this visitor has going, those that tabs and links started too."""
        stop_with(stop, looks.race_board(None, message="Stopped. Press Race to start again."), view, [*started, *others])
    return {"pending": pending, "arrive": (arrive, [pending, entries], outputs, sync), "stopping": stopping}


def read_link(query: dict) -> tuple[list, dict]:
    """Updates of the panel and what is to be raced, from the page's address."""
    everyone = racing.racers()
    if not everyone:
        return [gr.skip()] * (6 + EXAMPLES), {"unknown": told(_nobody())}
    first = next(iter(everyone.values()))
    asked = {k: query[k] for k in ("student", "prompt", "seed", "steps", "rival") if k in query}
    if not asked:
        example = (first.name, (first.examples or ("",))[0], EXAMPLE_SEED, best_steps(first))
        cached = racing.order(*example).query + first.source in _cache if first.examples else False
        return fill(first), {"order": example} if cached else {}
    try:
        who = racing.racer(asked.get("student", first.name))
    except UserError as error:
        return fill(first), {"unknown": told(error)}
    number = lambda key, other: int(asked[key]) if re.fullmatch("-?[0-9]{1,15}", asked.get(key, "")) else other
    prompt = asked.get("prompt", (who.examples or ("",))[0])
    updates = fill(who, prompt[: racing.MAX_PROMPT + 1], number("seed", EXAMPLE_SEED), number("steps", None), asked.get("rival", ""))
    return updates, {"order": (who.name, prompt, asked.get("seed", EXAMPLE_SEED), asked.get("steps", best_steps(who)), asked.get("rival", ""))}


def _nobody() -> UserError:
    try:
        racing.racer("")
    except UserError as error:
        return error


# ------------------------------------------------------------------------------------------------------- diversity
def streamed(races: Callable[[Order], Iterator], show: Callable, empty: Callable[[str], str]):
    """A handler that draws `races(order)` and shows each state."""
    def handler(student, rival, prompt, klass, seed, steps):
        try:
            o = order_of(student, "", prompt, klass, seed, steps)
            state = None
            for state in races(o):
                yield show(state, True)
            yield show(state, False)
        except Exception as error:
            yield empty(told(error))
    return handler


def drawing_tab(wish: Wish, label: str, name: str, races, show, empty):
    with gr.Row(elem_classes="fs-actions"):
        go = gr.Button(label, variant="primary", elem_id=f"fs-{name}-go", scale=0, min_width=160)
        stop = gr.Button("Stop", elem_id=f"fs-{name}-stop", scale=0, min_width=90)
    view = gr.HTML(empty(""), elem_id=f"fs-{name}-board")
    event = go.click(streamed(races, show, empty), wish.inputs, view, trigger_mode="once", show_progress="hidden", **MACHINE, **HIDDEN)
    stop_with(stop, empty("Stopped. Press the button to start again."), view, [event])


@tab("diversity", "Diversity")
def diversity_tab(wish: Wish):
    drawing_tab(wish, "Draw eight seeds", "diversity", racing.strip, lambda s, running: looks.strip_board(s, running=running), lambda m: looks.strip_board(None, m))


@tab("ladder", "Steps ladder")
def ladder_tab(wish: Wish):
    drawing_tab(wish, "Climb", "ladder", racing.ladder, lambda l, running: looks.ladder_board(l, running=running), lambda m: looks.ladder_board(None, message=m))


# ------------------------------------------------------------------------------------------------------- leaderboard
def show_board(name: str | None, quality: str, cost: str) -> tuple[str, str, str]:
    """(words above, table, plots) of a board. Never raises: what is wrong with the file is said above."""
    found = board.boards()
    if not found:
        return f'<p class="fs-headline"><b>No leaderboard yet.</b></p><p class="fs-note">{looks.escape(board.MISSING).replace("`", "")}</p>', "", ""
    path = found.get(name) or next(iter(found.values()))
    try:
        rows = board.rows(path)
    except (OSError, ValueError, KeyError) as error:
        return looks.alert(f"{path.name} cannot be read: {racing.words(error)}"), "", ""
    if not rows:
        return f'<p class="fs-headline"><b>The leaderboard is empty.</b></p><p class="fs-note">{looks.escape(path.parent.name)} has no measured row yet.</p>', "", ""
    headers, cells = board.table(rows)
    log = quality == "kid_efflite0"
    style = dict(log_y=log, lower=log, order=board.FAMILIES)
    plots = looks.scatter(board.against_calls(rows, quality), "network calls per picture", quality, "Quality against network calls", joined=True, named=6, **style)
    plots += looks.scatter(board.against_cost(rows, quality, cost), board.COST[cost], quality, "Best at no more than 4 calls, against the cost of training", named=40, **style)
    best = next((r for r in rows if r["kind"] == "method"), rows[0])
    spread = best.get("kid_efflite0" + board.SPREAD)
    score = f'{best["kid_efflite0"]:.0f}' + (f" &plusmn; {spread:.0f}" if spread else "")
    head = (f'<p class="fs-headline"><b>{len({r["who"] for r in rows})} models.</b> <span>Best student: {looks.escape(best["who"])}, kid_efflite0 {score} '
            f'at {looks.plural(best["calls"], "call")}. Press a column to sort.</span></p><p class="fs-note">{looks.escape(board.facts(path))}</p>')
    return head, looks.table(headers, cells, "Leaderboard"), f'<div class="fs-plots">{plots}</div>'


@tab("leaderboard", "Leaderboard", draws=False)
def leaderboard_tab(wish: Wish):
    found = [(board.label(path), name) for name, path in board.boards().items()]
    head = gr.HTML(elem_id="fs-leaderboard-head")
    with gr.Row(visible=bool(found), elem_classes="fs-row"):
        name = gr.Dropdown(found, value=found[0][1] if found else None, label="Board", min_width=150, elem_id="fs-board-name")
        quality = gr.Dropdown([(v, k) for k, v in board.QUALITY.items()], value="kid_efflite0", label="Quality", min_width=150, elem_id="fs-board-quality")
        cost = gr.Dropdown([(v, k) for k, v in board.COST.items()], value=board.telling_cost(next(iter(board.boards().values()))) if found else "training_calls", label="Cost", min_width=150, elem_id="fs-board-cost")
    plots = gr.HTML(elem_id="fs-plots")
    rows = gr.HTML(elem_id="fs-leaderboard")
    for choice in (name, quality, cost):
        choice.input(show_board, [name, quality, cost], [head, rows, plots], queue=False, show_progress="hidden", **HIDDEN)
    return {"opened": (show_board, [name, quality, cost], [head, rows, plots])}


# ------------------------------------------------------------------------------------------------------- take it home
@tab("home", "Take it home")
def home_tab(wish: Wish):
    message = gr.HTML(elem_id="fs-home-message")
    with gr.Row(elem_classes="fs-columns"):
        with gr.Column(min_width=300):
            stock = gr.Code(language="python", label="With diffusers alone", interactive=False, lines=1, wrap_lines=True, show_line_numbers=False, elem_id="fs-code-diffusers")
            ours = gr.Code(language="python", label="With zoo", interactive=False, lines=1, wrap_lines=True, show_line_numbers=False, elem_id="fs-code-zoo")
            train = gr.Code(language="shell", label="Train one like it", interactive=False, lines=1, wrap_lines=True, show_line_numbers=False, elem_id="fs-code-train")
            cite = gr.Code(language="latex", label="Cite the method", interactive=False, lines=1, wrap_lines=True, show_line_numbers=False)
        with gr.Column(min_width=300, elem_classes="fs-card"):
            picture = gr.HTML()
            text = gr.Markdown(elem_id="fs-card", line_breaks=False)

    def show(*values):
        try:
            o = order_of(values[0], "", *values[2:])
            lines, (card, grid) = takehome.snippets(o), takehome.card(o.student)
            head = '<p class="fs-headline"><b>The same picture, on your machine.</b> <span>These lines draw what the panel above says.</span></p>'
            if o.student.name in racing.FRESH:
                head += looks.note("The folder of a student that was trained here is deleted when the page ends: copy it first.")
            return head, lines["diffusers"], lines["zoo"], lines["train"], lines["cite"], grid, card
        except Exception as error:
            return looks.alert(told(error)), *[gr.skip()] * 6
    outputs = [message, stock, ours, train, cite, picture, text]
    gr.on([wish.student.input, wish.steps.input, wish.prompt.blur, wish.klass.input, wish.seed.blur], show, wish.inputs, outputs, queue=False, show_progress="hidden", **HIDDEN)
    return {"opened": (show, wish.inputs, outputs)}


# ------------------------------------------------------------------------------------------------------- distil
CURVES = {"measure/score": "distance to the teacher (measured)", "student/loss": "student loss", "critic/denoising": "critic loss", "student/relative": "student: correction, relative"}


def training_board(v: distil.View, message: str = "") -> str:
    stage = ("Starting takes a while: the teacher draws what the student is measured against." if not v.step else
             "Now it is measured and exported." if v.budget and v.seconds >= v.budget else "")
    said = {"idle": "<b>Nothing is running.</b> <span>Start the quick start: a student of 1, 2 and 4 steps in minutes.</span>",
            "running": f"<b>{looks.seconds(v.seconds)}</b> <span>of {looks.seconds(v.budget)} of training on {looks.escape(v.teacher)}, student step {v.step}. {stage}</span>",
            "stopped": "<b>Stopped.</b> <span>A stopped run leaves no student.</span>", "failed": "<b>The run failed.</b>",
            "done": f"<b>Done.</b> <span>{looks.escape(v.student)} is ready to race.</span>"}[v.state]
    share = min(100.0, 100 * v.seconds / v.budget) if v.budget else 0
    picture = "<div class='fs-blank fs-tall'><span>sample grids of teacher and student appear here</span></div>"
    if v.grid is not None:
        from PIL import Image
        try:
            with Image.open(v.grid) as image:
                picture = f'<img src="{looks.data_uri(image.convert("RGB"))}" alt="Teacher and student on the same noise, training step {v.step}" width="{image.width}" height="{image.height}">'
        except OSError:          # half written: the next look has it
            pass
    health = "".join(f"<li>{looks.escape(w)}</li>" for w in v.warnings) or "<li class='fs-ok'>no warning so far</li>" if v.state != "idle" else "<li>no run yet</li>"
    curves = "".join(looks.curve(v.curves.get(k, []), title) for k, title in CURVES.items())
    trouble = message or (v.message if v.state == "failed" else "")
    return (f'<section class="fs-board" aria-label="Training">{looks.alert(trouble)}<p class="fs-headline">{said}</p>'
            f'<div class="fs-meter fs-student" role="progressbar" aria-valuenow="{share:.0f}" aria-valuemin="0" aria-valuemax="100" aria-label="training time"><i style="width:{share:.1f}%"></i></div>'
            f'<div class="fs-train"><div class="fs-curves">{curves}</div><div class="fs-watch">{picture}<h3>Health</h3><ul class="fs-health">{health}</ul></div></div></section>')


@tab("distil", "Distil", applies=distil.allowed, draws=False)
def distil_tab(wish: Wish) -> dict:
    with gr.Row(elem_classes="fs-row"):
        teacher = gr.Radio(list(distil.TEACHERS), value=distil.TEACHERS[0], label="Teacher", elem_id="fs-distil-teacher", min_width=160)
        budget = gr.Slider(30, 600, value=150, step=10, label="Training time, seconds", elem_id="fs-distil-seconds", min_width=220)
    with gr.Row(elem_classes="fs-actions"):
        start = gr.Button("Distil on this machine", variant="primary", elem_id="fs-distil-go", scale=0, min_width=200)
        stop = gr.Button("Stop", elem_id="fs-distil-stop", scale=0, min_width=90)
        fresh = gr.Button("Race the fresh student", elem_id="fs-distil-race", visible=False, scale=0, min_width=200)
    view = gr.HTML(training_board(distil.View()), elem_id="fs-distil-board")
    timer = gr.Timer(2.0, active=False)
    outputs = [view, timer, fresh]

    def look(message: str = ""):
        try:
            v = distil.view()
            return training_board(v, message), gr.Timer(active=v.state == "running"), gr.update(visible=v.state == "done")
        except Exception as error:
            return training_board(distil.View(), told(error)), gr.skip(), gr.skip()          # the next look may do better

    def attempt(fn, *args):
        try:
            fn(*args)
            return look()
        except Exception as error:
            return look(told(error))

    quiet = dict(show_progress="hidden", **HIDDEN)
    start.click(lambda t, s: attempt(distil.start, t, s), [teacher, budget], outputs, **quiet)
    stop.click(lambda: attempt(distil.stop), None, outputs, **quiet)
    timer.tick(lambda: look(), None, outputs, queue=False, **quiet)
    return {"opened": (lambda: look(), None, outputs), "fresh": fresh}


# ------------------------------------------------------------------------------------------------------- video
@tab("video", "Video", applies=lambda: bool(racing.videos()), draws=False)
def video_tab(wish: Wish):
    everyone = racing.videos()
    first = next(iter(everyone.values()))
    with gr.Row(elem_classes="fs-row"):
        student = gr.Dropdown(list(everyone), value=first.name, label="Student", min_width=150)
        prompt = gr.Textbox((first.examples or ("",))[0], label="Prompt", scale=3, min_width=220, elem_id="fs-video-prompt")
        seed = gr.Number(EXAMPLE_SEED, label="Seed", precision=0, min_width=90)
        frames = gr.Slider(*FRAMES, value=32, step=8, label="Frames", min_width=160, elem_id="fs-video-frames")
    with gr.Row(elem_classes="fs-actions"):
        go = gr.Button("Stream", variant="primary", elem_id="fs-video-go", scale=0, min_width=160)
        stop = gr.Button("Stop", elem_id="fs-video-stop", scale=0, min_width=90)
    view = gr.HTML(film_board([], 0, "", 0), elem_id="fs-video-board")

    def stream(name, prompt, seed, frames):
        made: list = []
        try:
            who = racing.racer(name, racing.videos())
            what, number, wanted = racing.subject(who, prompt), racing.whole(seed, "seed", 0, racing.MAX_SEED), racing.whole(frames, "number of frames", *FRAMES)
            began = time.perf_counter()
            for chunk in racing.film(who, what, number, wanted):
                made += chunk
                yield film_board(made, time.perf_counter() - began, what, wanted, running=True)
            yield film_board(made, time.perf_counter() - began, what, wanted)
        except Exception as error:
            yield film_board([], 0, "", 0, message=told(error))

    event = go.click(stream, [student, prompt, seed, frames], view, trigger_mode="once", show_progress="hidden", **MACHINE, **HIDDEN)
    stop_with(stop, film_board([], 0, "", 0, message="Stopped. Press Stream to start again."), view, [event])


def film_board(frames: list, seconds: float, what: str, wanted: int, message: str = "", running: bool = False) -> str:
    """The newest frame large, the last ones small; at the end the whole video as an animation."""
    import io
    if frames and not running:
        out = io.BytesIO()
        frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], duration=125, loop=0, lossless=True)
        import base64
        big = (f'<div class="fs-frame"><img class="fs-pixels" src="data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}" '
               f'alt="video of {len(frames)} frames: {looks.escape(looks.shown(what))}" width="{frames[0].width}" height="{frames[0].height}"></div>')
    else:
        big = looks.frame(frames[-1] if frames else None, f"frame {len(frames)}: {looks.shown(what)}", waiting="press Stream", busy=running)
    cells = "".join(f"<figure>{looks.frame(looks.small(f), f'frame {len(frames) - len(frames[-8:]) + i + 1}')}</figure>" for i, f in enumerate(frames[-8:]))
    head = f"<b>{len(frames) / seconds:.1f} frames a second</b> <span>frame {len(frames)} of {wanted}</span>" if frames else "<b>Frames as they are made.</b> <span>Chunk after chunk through a key-value cache.</span>"
    return (f'<section class="fs-board" aria-label="Video">{looks.alert(message)}<p class="fs-headline">{head}</p>'
            f'<div class="fs-film fs-student">{big}</div><div class="fs-cells fs-eight">{cells}</div></section>')


# ------------------------------------------------------------------------------------------------------- what spans tabs
def connect(demo: gr.Blocks, wish: Wish, shelf, made: dict[str, dict]):
    """The page's address at the start; the way from training to racing."""
    race = made["race"]
    arrive, inputs, outputs, sync = race["arrive"]

    def opened(request: gr.Request):
        updates, pending = read_link(dict(request.query_params))
        return [*updates, pending]

    quiet = dict(show_progress="hidden", **HIDDEN)
    arrivals = [demo.load(opened, None, [*wish.outputs, race["pending"]], queue=False, **quiet).then(arrive, inputs, outputs, **MACHINE, **quiet)]
    if "distil" in made:
        def take():
            v = distil.view()
            if v.state != "done":
                return [gr.skip()] * (len(wish.outputs) + 2)
            who = racing.racer(v.student)
            return [*fill(who), {"order": (who.name, (who.examples or ("",))[0], EXAMPLE_SEED, best_steps(who))}, gr.Tabs(selected="race")]
        fresh = made["distil"]["fresh"].click(take, None, [*wish.outputs, race["pending"], shelf], queue=False, **quiet)
        arrivals.append(fresh.then(arrive, inputs, outputs, **MACHINE, **quiet))
    for arrival in arrivals:
        arrival.then(**sync)
    demo.load(None, None, None, js=SORT, **HIDDEN)
    race["stopping"](arrivals)
