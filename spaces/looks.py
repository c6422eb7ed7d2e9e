"""What the page shows, as HTML and SVG. Every word that comes from a visitor, a row or a card passes `escape`."""
from __future__ import annotations

import base64
import io
import math
from html import escape as _escape
from typing import Sequence

from racing import LADDER, SEEDS, TEACHER_STEPS, Drawn, Ladder, Order, Race, Strip, called, seeds_of


def escape(text) -> str:
    return _escape(str(text), quote=True)


def data_uri(image, final: bool = True) -> str:
    """PNG of a finished picture, WebP of one on the way."""
    out = io.BytesIO()
    image.save(out, "PNG") if final else image.save(out, "WEBP", quality=80)
    return f"data:image/{'png' if final else 'webp'};base64,{base64.b64encode(out.getvalue()).decode()}"


def alert(message: str) -> str:
    return f'<div class="fs-alert" role="alert"><b>That does not work.</b> {escape(message)}</div>' if message else ""


def note(message: str) -> str:
    return f'<p class="fs-note" role="status">{escape(message)}</p>' if message else ""


def seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


def number(value: float) -> str:
    return f"{value:g}"


def plural(n: float, word: str) -> str:
    return f"{number(n)} {word}" + ("s" if n != 1 else "")


def shown(subject: str) -> str:
    return subject if len(subject) <= 60 else subject[:57] + "..."


# ------------------------------------------------------------------------------------------------------- pictures
def small(image):
    """At most 96 pixels a side."""
    copy = image.copy()
    copy.thumbnail((96, 96))
    return copy


def frame(image, alt: str, *, final: bool = True, waiting: str = "", busy: bool = False) -> str:
    """A square of fixed size, with a picture or with what it waits for. Small pictures keep their pixels."""
    if image is None:
        return f'<div class="fs-frame fs-empty{" fs-busy" * busy}"><span>{escape(waiting)}</span></div>'
    pixelated = "fs-pixels" if image.width <= 96 else ""
    return (f'<div class="fs-frame{" fs-busy" * (not final)}"><img class="{pixelated}" src="{data_uri(image, final)}" alt="{escape(alt)}" '
            f'width="{image.width}" height="{image.height}" decoding="sync"></div>')


def meter(drawn: Drawn, most: float) -> str:
    """Network calls as a bar, in proportion to the lane with the most."""
    share = 100 * drawn.calls / most if most else 0
    return f'<div class="fs-meter" aria-hidden="true"><i style="width:{max(share, 1 if drawn.calls else 0):.1f}%"></i></div>'


def lane(drawn: Drawn, o: Order, most: float, running: bool) -> str:
    role = "teacher" if drawn.role == "teacher" else "student"
    image = drawn.images[0] if drawn.images else None
    if drawn.note:
        waiting = "not on this machine"
    else:
        waiting = "getting ready" if running else "waiting for the flag"
    state = "" if drawn.finished else f", estimate after {drawn.done} of {drawn.steps} steps"
    alt = f"{shown(o.subject) or 'sample'}, drawn by the {role} {called(drawn.who)} from seed {o.seed}{state}"
    clock = seconds(drawn.seconds) if drawn.done else "&ndash;"
    progress = f'{plural(drawn.calls, "network call")}' if drawn.done else plural(drawn.steps, "step")
    return (f'<article class="fs-lane fs-{role}"><header><span class="fs-role">{role}</span><h3 title="{escape(called(drawn.who))}">{escape(called(drawn.who))}</h3></header>'
            f'{frame(image, alt, final=drawn.finished, waiting=waiting, busy=running and not drawn.finished and not drawn.note)}'
            f'<p class="fs-clock">{clock}</p>{meter(drawn, most)}'
            f'<p class="fs-calls"><b>{progress}</b> <span>step {drawn.done} of {drawn.steps}</span></p>'
            f'{note(drawn.note)}</article>')


def headline(r: Race) -> str:
    student, teacher = r.lanes[0], r.lanes[-1]
    if r.speedup is None:
        if student.finished:
            return f'<p class="fs-headline"><b>{seconds(student.seconds)}</b> and the student is done. <span>The teacher is still at it.</span></p>'
        return '<p class="fs-headline"><b>On your marks.</b> <span>Both start from the same noise.</span></p>'
    faster = f"{r.speedup:.1f}" if r.speedup < 10 else f"{r.speedup:.0f}"
    return (f'<p class="fs-headline"><b>{faster}&times; faster</b> <span>{plural(student.calls, "network call")} instead of {number(teacher.calls)}, '
            "from the same noise.</span></p>")


def race_board(r: Race | None, o: Order | None = None, message: str = "", running: bool = False) -> str:
    """The lanes of a race; with a message, what was wrong with the wish, above empty lanes."""
    if r is None:
        lanes = [Drawn("a few-step student", "student", 4), Drawn("its teacher", "teacher", TEACHER_STEPS)]
        cells = "".join(lane(d, Order(None, "", 0, 4), 0, False) for d in lanes)
        return (f'<section class="fs-board" aria-label="Race">{alert(message)}'
                '<p class="fs-headline"><b>Ready.</b> <span>Choose what to draw and press Race.</span></p>'
                f'<div class="fs-lanes fs-two">{cells}</div><p class="fs-foot">&nbsp;</p></section>')
    o = r.order
    most = max([d.calls for d in r.lanes] + [2 * TEACHER_STEPS if running else 0])
    cells = "".join(lane(d, o, most, running) for d in r.lanes)
    told = "Drawn when the page was started; the times are from then. " if r.cached else ""
    running_now = f'<a id="fs-link" href="{escape(o.query)}">Link to this race</a>' if not running else "&nbsp;"
    return (f'<section class="fs-board" aria-label="Race" aria-busy="{str(running).lower()}">{alert(message)}{note(o.note)}{headline(r)}'
            f'<div class="fs-lanes fs-{("two", "three")[len(r.lanes) == 3]}">{cells}</div>'
            f'<p class="fs-foot">{running_now} <span>{told}Wall time of one picture on this machine, models in memory; pictures on the way are not on the clock.</span></p></section>')


def history(entries: Sequence[dict]) -> str:
    """Finished races, newest first; each a link that draws it again."""
    title = '<h2 class="fs-h2">Races so far</h2>'
    if not entries:
        return f'{title}<div class="fs-history"><p class="fs-note">Races you finish stay here, each with a link that draws it again.</p></div>'
    cells = "".join(f'<a href="{escape(e["query"])}" title="{escape(e["title"])}"><img src="{e["image"]}" alt="{escape(e["title"])}" width="64" height="64">'
                    f'<span>{escape(e["caption"])}</span></a>' for e in entries)
    return f'{title}<nav class="fs-history" aria-label="Races so far">{cells}</nav>'


def history_entry(r: Race) -> dict:
    o, d = r.order, r.lanes[0]
    speed = f"{r.speedup:.0f}x" if r.speedup else ""
    return {"query": o.query, "title": f"{shown(o.subject)}, {o.student.name}, seed {o.seed}, {plural(o.steps, 'step')}", "image": data_uri(small(d.images[0])),
            "caption": f"{plural(o.steps, 'step')} {speed}".strip()}


# ------------------------------------------------------------------------------------------------------- diversity
def strip_board(s: Strip | None, message: str = "", running: bool = False) -> str:
    blank = [Drawn("the student", "student", 1), Drawn("the teacher", "teacher", TEACHER_STEPS)]
    rows, o = (s.rows, s.order) if s else (blank, None)
    seeds = seeds_of(o) if o else list(range(SEEDS))
    parts = []
    for d in rows:
        cells = "".join(f'<figure>{frame(d.images[i] if d.images else None, f"seed {seed} by the {d.role}", final=d.finished, waiting="", busy=running and not d.finished)}'
                        f"<figcaption>{seed}</figcaption></figure>" for i, seed in enumerate(seeds))
        value = s.diversity.get(d.role) if s else None
        figure = f"diversity <b>{value:.3f}</b>" if value is not None else "diversity <b>&ndash;</b>"
        parts.append(f'<div class="fs-strip fs-{d.role}"><p><span class="fs-role">{d.role}</span> {escape(called(d.who))}, {plural(d.steps, "step")} <span class="fs-right">{figure}</span></p>'
                     f'<div class="fs-cells fs-eight">{cells}</div></div>')
    if s and s.kept is not None and s.kept > 1.02:
        head = (f'<p class="fs-headline"><b>{s.kept:.1f} times</b> <span>the teacher&rsquo;s variety. '
                "Mistakes that differ from seed to seed count as variety too: look at the pictures.</span></p>")
    elif s and s.kept is not None:
        head = (f'<p class="fs-headline"><b>{100 * s.kept:.0f} %</b> <span>of the teacher&rsquo;s variety is left. '
                "A student that drew one picture from every seed would keep none.</span></p>")
    else:
        head = '<p class="fs-headline"><b>One subject, eight seeds.</b> <span>Few-step students pay for speed with variety: see how much.</span></p>'
    return (f'<section class="fs-board" aria-label="Diversity">{alert(message)}{note(o.note if o else "")}{head}{"".join(parts)}'
            '<p class="fs-foot"><span>Diversity: root-mean-square difference of two pictures of the subject, mean over all pairs, pixel values in [-1, 1].</span></p></section>')


# ------------------------------------------------------------------------------------------------------- ladder
def ladder_board(l: Ladder | None, trained: Sequence[int] = (), message: str = "", running: bool = False) -> str:
    o = l.order if l else None
    rungs = l.rungs if l else {k: (None, None) for k in LADDER}
    served = o.student.steps if o else trained
    def cell(d, alt, waiting, busy):
        picture = frame(d.images[0] if d else None, alt, waiting=waiting, busy=busy)
        said = f"{plural(d.calls, 'call')} &middot; {seconds(d.seconds)}" if d else "&nbsp;"
        return f"<figure>{picture}<figcaption>{said}</figcaption></figure>"
    rows = []
    for i, role in enumerate(("student", "teacher")):
        cells = ""
        for k in LADDER:
            d = rungs[k][i]
            outside = role == "student" and served and k not in served
            waiting = f"not trained for {plural(k, 'step')}" if outside else ""
            cells += cell(d, f"{role}, {plural(d.steps, 'step')}, {plural(d.calls, 'network call')}" if d else "", waiting, running and not d and not outside)
        if role == "teacher":
            r = l.reference if l else None
            cells += cell(r, f"teacher at leisure, {TEACHER_STEPS} steps" if r else "", "", running and not r)
        else:
            cells += "<figure></figure>"
        rows.append(f'<div class="fs-strip fs-{role}"><p><span class="fs-role">{role}</span> {escape(called(o.student.name if role == "student" else o.student.teacher) if o else "")}</p>'
                    f'<div class="fs-cells fs-five">{cells}</div></div>')
    heads = "".join(f"<span>{plural(k, 'call')}</span>" for k in LADDER) + "<span>at leisure</span>"
    return (f'<section class="fs-board" aria-label="Steps ladder">{alert(message)}{note(o.note if o else "")}'
            '<p class="fs-headline"><b>What a step buys.</b> <span>Student and teacher with the same number of network calls, on the same noise.</span></p>'
            f'<div class="fs-cells fs-five fs-heads" aria-hidden="true">{heads}</div>{"".join(rows)}'
            '<p class="fs-foot"><span>A guided teacher step is two network calls; with one call it goes unguided.</span></p></section>')


# ------------------------------------------------------------------------------------------------------- tables
def table(headers: Sequence[str], rows: Sequence[Sequence], label: str) -> str:
    """Rows under headers that sort them when pressed (tabs.SORT). A column of numbers has as many decimals in every row."""
    columns = list(zip(*rows))
    numeric = [all(isinstance(v, (int, float)) for v in column if v is not None) for column in columns]
    decimals = [max((len(f"{v!r}".partition(".")[2]) for v in column if isinstance(v, float)), default=0) if n else 0 for column, n in zip(columns, numeric)]

    def cell(i, value):
        said = "" if value is None else f"{value:,.{decimals[i]}f}" if numeric[i] else escape(value)
        tag = "th" if i == 0 else "td"
        return f'<{tag}{" scope=row" * (i == 0)}{" class=fs-number" * numeric[i]} data-value="{escape("" if value is None else value)}">{said}</{tag}>'
    head = "".join(f'<th scope="col"{" class=fs-number" * numeric[i]}><button type="button">{escape(h)}</button></th>' for i, h in enumerate(headers))
    body = "".join(f'<tr>{"".join(cell(i, v) for i, v in enumerate(row))}</tr>' for row in rows)
    return f'<div class="fs-scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table class="fs-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


# ------------------------------------------------------------------------------------------------------- plots
MARKS = ("circle", "square", "triangle", "diamond", "cross", "plus")


def _mark(kind: str, x: float, y: float) -> str:
    r = 4.5
    if kind == "square":
        return f'<rect x="{x - r + .5:.1f}" y="{y - r + .5:.1f}" width="{2 * r - 1}" height="{2 * r - 1}"/>'
    if kind == "diamond":
        return f'<path d="M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l-{r + 1} {r + 1}l-{r + 1} -{r + 1}z"/>'
    if kind == "triangle":
        return f'<path d="M{x:.1f} {y - r:.1f}l{r} {2 * r - 1}h-{2 * r}z"/>'
    if kind == "cross":
        return f'<path class="fs-stroke" d="M{x - r:.1f} {y - r:.1f}l{2 * r} {2 * r}m0 -{2 * r}l-{2 * r} {2 * r}"/>'
    if kind == "plus":
        return f'<path class="fs-stroke" d="M{x - r - 1:.1f} {y:.1f}h{2 * r + 2}m-{r + 1} -{r + 1}v{2 * r + 2}"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        for round_ones in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            found = [m * 10.0**e for e in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1) for m in round_ones]
            found = [t for t in found if low * 0.999 <= t <= high * 1.001]
            if len(found) >= 3:
                return found
    step = 10.0 ** math.floor(math.log10((high - low) or 1))
    step = step / 2 if (high - low) / step < 3 else step
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _short(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def scatter(series: dict[str, list[tuple]], x: str, y: str, title: str, *, log_x: bool = True, log_y: bool = False, joined: bool = False,
            named: int = 0, lower: bool = False, order: Sequence[str] = ()) -> str:
    """Points (x, y, name, spread of y) by group, as SVG that follows the page's colours. Groups differ by colour and by mark, a group of
    `order` always the same; a spread above 0 is a bar of that length both ways. joined: a line through the points of a name; named: how
    many names, best first (lower: small y is), stand beside their best point where there is room."""
    points = [p for group in series.values() for p in group]
    if not points:
        return f'<p class="fs-note">{escape(title)}: nothing to plot.</p>'
    width, height, left, bottom, top, right = 520, 300, 52, 40, 14, 14
    log_y = log_y and min(p[1] for p in points) > 0
    log_x = log_x and min(p[0] for p in points) > 0
    low = lambda p: max(p[1] - p[3], p[1] / 2) if log_y else p[1] - p[3]         # a bar has no end at zero on a logarithmic axis
    reach = lambda v, log: (min(v) / 1.15, max(v) * 1.15) if log else (min(v) - 0.06 * (max(v) - min(v) or 1), max(v) + 0.06 * (max(v) - min(v) or 1))
    (x0, x1), (y0, y1) = reach([p[0] for p in points], log_x), reach([v for p in points for v in (low(p), p[1] + p[3])], log_y)
    place = lambda v, a, b, log: (math.log(v / a) / math.log(b / a)) if log else (v - a) / (b - a)
    at_x = lambda v: left + place(v, x0, x1, log_x) * (width - left - right)
    at_y = lambda v: height - bottom - place(v, y0, y1, log_y) * (height - bottom - top)
    parts = [f'<line class="fs-grid" x1="{left}" x2="{width - right}" y1="{at_y(t):.1f}" y2="{at_y(t):.1f}"/><text x="{left - 6}" y="{at_y(t) + 4:.1f}" text-anchor="end">{_short(t)}</text>'
             for t in _ticks(y0, y1, log_y)]
    used = -99.0
    for t in _ticks(x0, x1, log_x):
        if at_x(t) - used > 30:
            used = at_x(t)
            parts.append(f'<text x="{used:.1f}" y="{height - bottom + 16}" text-anchor="middle">{_short(t)}</text>')
    known = [name for name in order if name in series] + [name for name in series if name not in order]
    slot = lambda name: (order.index(name) if name in order else len(order) + known.index(name)) % len(MARKS)
    for name in known:
        group, marks = series[name], ""
        if joined:
            by: dict[str, list] = {}
            for p in group:
                by.setdefault(p[2], []).append(p)
            for run in by.values():
                marks += f'<polyline points="{" ".join(f"{at_x(p[0]):.1f},{at_y(p[1]):.1f}" for p in sorted(run))}"/>'
        for p in group:
            bar = f'<line class="fs-bar" x1="{at_x(p[0]):.1f}" x2="{at_x(p[0]):.1f}" y1="{at_y(low(p)):.1f}" y2="{at_y(p[1] + p[3]):.1f}"/>' if p[3] else ""
            said = f"{p[1]:.3g}" + (f" ± {p[3]:.2g}" if p[3] else "")
            marks += f"<g>{bar}{_mark(MARKS[slot(name)], at_x(p[0]), at_y(p[1]))}<title>{escape(p[2])}: {_short(round(p[0], 3))} {escape(x)}, {said} {escape(y)}</title></g>"
        parts.append(f'<g class="fs-series fs-s{slot(name)}">{marks}</g>')
    taken = [(at_x(p[0]) - 4, at_x(p[0]) + 4, at_y(p[1])) for p in points]
    written: set[str] = set()
    for p in sorted(points, key=lambda p: p[1] if lower else -p[1]):
        if p[2] not in written and len(written) < named:
            wide = 5.8 * len(p[2])
            for start, anchor in ((at_x(p[0]) + 8, "start"), (at_x(p[0]) - 8 - wide, "end")):
                box = start, start + wide, at_y(p[1])
                if box[0] > left and box[1] < width and not any(box[0] < b and a < box[1] and abs(c - box[2]) < 11 for a, b, c in taken):
                    taken.append(box)
                    parts.append(f'<text class="fs-name" x="{box[0] if anchor == "start" else box[1]:.1f}" y="{box[2] + 3.5:.1f}" text-anchor="{anchor}">{escape(p[2])}</text>')
                    break
            written.add(p[2])
    parts.append(f'<text class="fs-axis" x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{escape(x)}</text>'
                 f'<text class="fs-axis" transform="translate(12 {(height - bottom + top) / 2}) rotate(-90)" text-anchor="middle">{escape(y)}</text>')
    keys = "".join(f'<li><svg width="14" height="14" aria-hidden="true"><g class="fs-series fs-s{slot(name)}">{_mark(MARKS[slot(name)], 7, 7)}</g></svg>{escape(name)}</li>'
                   for name in known)
    return (f'<figure class="fs-plot"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}: {len(points)} points; the table below has their values">'
            f'{"".join(parts)}</svg><ul>{keys}</ul></figure>')


def curve(points: list[tuple[float, float]], title: str) -> str:
    """One quantity over training steps: a line that ends in a dot; the first measurement is the dot alone."""
    if not points:
        return f'<figure class="fs-plot fs-curve"><figcaption>{escape(title)} <b>&ndash;</b></figcaption><div class="fs-blank"></div></figure>'
    width, height, pad = 300, 90, 8
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    at = lambda v, a, b, n: pad + ((v - a) / (b - a) if b > a else 0.5) * (n - 2 * pad)
    spots = [(at(a, min(xs), max(xs), width), height - at(b, min(ys), max(ys), height)) for a, b in points]
    line = f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in spots)}"/>' if len(spots) > 1 else ""
    said = f"from {ys[0]:.4g} to {ys[-1]:.4g}" if line else f"{ys[0]:.4g} at step {xs[0]:g}, the first value"
    return (f'<figure class="fs-plot fs-curve"><figcaption>{escape(title)} <b>{ys[-1]:.4g}</b></figcaption><svg viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(title)}, {said}"><g class="fs-series fs-s0">{line}<circle cx="{spots[-1][0]:.1f}" cy="{spots[-1][1]:.1f}" r="3.5"/></g></svg></figure>')
