"""The page for scripts: named endpoints for gradio_client, on the same queue as the page.

    from gradio_client import Client

    client = Client("http://127.0.0.1:7860")
    print(client.predict(api_name="/students"))
    student, teacher, facts = client.predict("emoji-dmd", "fluent red heart", 0, 4, api_name="/race")     # two PNG files and a dict
"""
from __future__ import annotations

import traceback

import gradio as gr

import board
import racing
import takehome
from tabs import BROKEN, MACHINE
from zoo.errors import UserError


def _said(fn):
    """Mistakes of the caller as gradio errors with their words; bugs without their traceback."""
    try:
        return fn()
    except UserError as error:
        raise gr.Error(racing.words(error), print_exception=False) from None
    except gr.Error:          # of ZeroGPU, in its own words
        raise
    except Exception:
        traceback.print_exc()
        raise gr.Error(BROKEN, print_exception=False) from None


def _last(states):
    state = None
    for state in states:
        pass
    return state


def _sheet(rows: list[list]):
    """Pictures (None: blank) in rows, as one."""
    from PIL import Image
    width, height = next(i.size for row in rows for i in row if i)
    sheet = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            if image:
                sheet.paste(image, (x * width, y * height))
    return sheet


def students() -> list:
    """Every student here: name, method, teacher, steps it was trained for, classes ([] for prompts), license, modality."""
    return _said(lambda: [{"name": r.name, "method": r.method, "teacher": racing.called(r.teacher), "steps": list(r.steps), "classes": list(r.classes), "license": r.license,
                           "modality": "video" if r.family in racing.FILMS else "other" if r.family in racing.NO_RACE else "image"} for r in racing.roster().values()])


def race(student: str, prompt: str, seed: float, steps: float):
    """A student and its teacher on the same noise: the student's picture, the teacher's, and a dict with both lanes' network calls and
    seconds, the speed-up and the link. prompt: words, or a class by name or number; steps: a count the student was trained for."""
    def go():
        r = _last(racing.race(racing.order(student, prompt, seed, steps)))
        return r.lanes[0].images[0], r.lanes[-1].images[0] if r.lanes[-1].images else None, r.facts()
    return _said(go)


def diversity(student: str, prompt: str, seed: float, steps: float):
    """Eight seeds of one prompt: a picture (student above teacher, one column a seed) and a dict with the measured diversity of both."""
    def go():
        s = _last(racing.strip(racing.order(student, prompt, seed, steps)))
        return _sheet([r.images for r in s.rows]), s.facts()
    return _said(go)


def ladder(student: str, prompt: str, seed: float):
    """The student at 1, 2, 4 and 8 network calls (blank where it was not trained for them) above its teacher at the same budgets; the last
    column is the teacher at leisure. A picture and a dict."""
    def go():
        who = racing.racer(student)
        l = _last(racing.ladder(racing.order(student, prompt, seed, max(who.steps))))
        first = lambda d: d.images[0] if d else None
        return _sheet([[first(s) for s, _ in l.rungs.values()], [*(first(t) for _, t in l.rungs.values()), first(l.reference)]]), l.facts()
    return _said(go)


def leaderboard(name: str):
    """Rows of a board (its name, or "" for the first), averaged over seeds, best first; [] when none has been measured."""
    def go():
        found = board.boards()
        if name and name not in found:
            raise UserError(f"unknown board {name[:40]!r}: there is {', '.join(found) or 'none'}")
        return board.rows(found[name] if name else next(iter(found.values()))) if found else []
    return _said(go)


def snippets(student: str, prompt: str, seed: float, steps: float):
    """Lines that draw the student's picture elsewhere: a dict with `diffusers`, `zoo`, `train` (a command) and `cite` (BibTeX)."""
    return _said(lambda: takehome.snippets(racing.order(student, prompt, seed, steps)))


def endpoints():
    """Hidden components that give each function above an endpoint of its name."""
    with gr.Row(visible=False):
        who, prompt = gr.Textbox(label="student"), gr.Textbox(label="prompt")
        seed, steps = gr.Number(0, label="seed", precision=0), gr.Number(4, label="steps", precision=0)
        name = gr.Textbox(label="board")
        first, second = gr.Image(format="png", type="pil", label="student's picture"), gr.Image(format="png", type="pil", label="teacher's picture")
        facts = gr.JSON(label="facts")
        button = gr.Button()
    for fn, inputs, outputs, draws in ((students, None, facts, False), (race, [who, prompt, seed, steps], [first, second, facts], True),
                                       (diversity, [who, prompt, seed, steps], [first, facts], True), (ladder, [who, prompt, seed], [first, facts], True),
                                       (leaderboard, name, facts, False), (snippets, [who, prompt, seed, steps], facts, False)):
        button.click(fn, inputs, outputs, api_name=fn.__name__, **(MACHINE if draws else {}))
