"""Who can race, and the races: students and their teachers on the same noise. Nothing here knows of the page.

A student is called as a user would call it, `zoo.load(...)(prompt, generator=seed)`; its teacher is sampled by the deterministic
rule from the same first noise, and every step's estimate of the clean picture can be looked at."""
from __future__ import annotations

import difflib
import functools
import gc
import json
import os
import re
import sys
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Iterator

import psutil
import torch

import zoo
from gpu import ZERO_GPU, gpu
from zoo import losses, metrics, rollout
from zoo.errors import UserError
from zoo.grid import to_uint8
from zoo.hub.export import read_record
from zoo.hub.space import raceable

TEACHER_STEPS = 25            # what students are measured against during training
LADDER = (1, 2, 4, 8)
SEEDS = 8                     # of the diversity strip
MAX_SEED = 2**31 - 1
MAX_PROMPT = 300
PREVIEWS = 12                 # pictures on the teacher's way
DEVICE = "cuda" if torch.cuda.is_available() or ZERO_GPU else "cpu"
KEPT_ON = "cpu" if ZERO_GPU else DEVICE      # on ZeroGPU this process has no GPU, the leased one has
FILMS = ("video", "wan", "cogvideox", "ltx", "toy-video")                   # families of clips; those that stream have a tab of their own
NO_RACE = (*FILMS, "text", "toy", "toy-text", "custom")                      # families that race not
PHOTOS = ("a red fox in the snow", "a lighthouse in a storm", "a bowl of ramen, close-up", "an astronaut in a meadow")
EMOJI = ("noto hospital", "fluent red heart", "twemoji megaphone", "fluent tokyo tower", "noto pizza", "twemoji rocket")


# ------------------------------------------------------------------------------------------------------- who there is
@dataclass(frozen=True)
class Racer:
    """A student: what is known of it without loading it. source: a folder or a Hub id; load: what `zoo.load` is given;
    classes: names of what it draws, () for prompts; streams: whether it makes a video chunk by chunk."""
    name: str
    method: str
    teacher: str
    source: str
    steps: tuple[int, ...]
    license: str = ""
    family: str = ""
    classes: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    load: str = ""
    streams: bool = False

    @property
    def local(self) -> bool:
        return Path(self.source).is_dir()

    @property
    def takes_prompt(self) -> bool:
        return self.family != "pixel"


FRESH: dict[str, Racer] = {}         # trained on this page


def roster() -> dict[str, Racer]:
    """Every student by name: those in the package, those of FEWSTEP_SPACE_STUDENTS, those trained here and, where there is a GPU for
    them or FEWSTEP_SPACE_HUB=1 asks for them, the registry's students of others on the Hub."""
    found = [_from_row(row) for row in zoo.students()]
    for entry in filter(None, os.environ.get("FEWSTEP_SPACE_STUDENTS", "").split(os.pathsep)):
        source, _, teacher = entry.partition("=")
        found.append(_from_folder(Path(source), teacher))
    return {r.name: r for r in sorted(filter(None, found), key=lambda r: not r.local)} | FRESH


def racers() -> dict[str, Racer]:
    """Those that draw single pictures."""
    return {name: r for name, r in roster().items() if r.family not in NO_RACE}


def videos() -> dict[str, Racer]:
    """Those that make videos chunk by chunk: what their contract says, whatever their family."""
    return {name: r for name, r in roster().items() if r.streams}


def _from_row(row) -> Racer | None:
    packaged = Path(zoo.__file__).parent / row.source
    folder = packaged if packaged.is_dir() else Path(row.source)
    if folder.is_dir():
        made = _from_folder(folder, row.teacher)
        return made and replace(made, name=row.name, license=row.license, load=row.name)
    if not raceable(row) or not (DEVICE == "cuda" or os.environ.get("FEWSTEP_SPACE_HUB") == "1"):
        return None
    return Racer(row.name, row.method, row.teacher, row.source, tuple(sorted(row.steps)), row.license, "sd", (), PHOTOS, row.name)


def _from_folder(folder: Path, teacher: str = "") -> Racer | None:
    """The student exported at `folder`; None, said on stderr, when there is none."""
    try:
        contract, record = read_record(folder)
    except (UserError, OSError, ValueError, KeyError) as error:
        _leave_out(f"the page leaves out {folder}: {error}")
        return None
    name = folder.resolve().parent.name if folder.name == "student" else folder.name
    teacher = teacher or record["teacher"]
    return Racer(name, record.get("method") or "", teacher, str(folder), tuple(contract.steps), _card(folder).get("license", ""),
                 record["family"], _classes(folder, teacher) if record["family"] == "pixel" else (), _examples(folder, teacher, record["family"]), str(folder), contract.sampler == "causal")


@functools.lru_cache(100)
def _leave_out(words: str):
    """Said once, not at every look."""
    print(words, file=sys.stderr)


def _classes(folder: Path, teacher: str) -> tuple[str, ...]:
    from zoo.data.fashion_mnist import CLASSES
    n = json.loads((folder / "unet" / "config.json").read_text()).get("num_class_embeds")
    if not n:
        return ()
    return tuple(CLASSES) if teacher == "fashion" and n == len(CLASSES) + 1 else tuple(f"class {i}" for i in range(n - 1))


def _card(folder: Path) -> dict:
    import yaml
    try:
        return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1]) or {}
    except (OSError, IndexError, yaml.YAMLError):
        return {}


def _examples(folder: Path, teacher: str, family: str) -> tuple[str, ...]:
    if family == "pixel":
        return _classes(folder, teacher)[:6]
    if teacher == "emoji":
        return EMOJI
    shown = [w.get("text", "") for w in _card(folder).get("widget") or [] if isinstance(w, dict)]
    return tuple(p.strip() for p in ", ".join(shown).split(",") if p.strip())[:6]


def called(who: str) -> str:
    """A model's name without the folders before it; Hub ids stay whole."""
    return Path(who).name if Path(who).is_absolute() else who


def words(error: Exception | str) -> str:
    """What an error says, without the folders of this machine: visitors learn names, not where things lie."""
    return re.sub(r"""(?<![\w:/.~<-])/(?:[^\s/'"<>]+/)+([^\s/'"<>]*)""", r"\1", str(error))


# ------------------------------------------------------------------------------------------------------- what is asked for
@dataclass(frozen=True)
class Order:
    """One valid wish. subject: the prompt, or the name of a class ("" for a student without either)."""
    student: Racer
    subject: str
    seed: int
    steps: int
    rival: Racer | None = None

    @property
    def query(self) -> str:
        from urllib.parse import urlencode
        wish = {"student": self.student.name, "prompt": self.subject, "seed": self.seed, "steps": self.steps}
        return "?" + urlencode(wish | ({"rival": self.rival.name} if self.rival else {}))

    @property
    def note(self) -> str:
        return "HTML in the prompt is read as plain text." if re.search(r"<[a-zA-Z/!]", self.subject) else ""


def racer(name: str, among: dict[str, Racer] | None = None) -> Racer:
    """The student of that name. Raises UserError naming what there is."""
    among = racers() if among is None else among
    if not among:
        raise UserError("no student is installed here: name exported folders in FEWSTEP_SPACE_STUDENTS, or train one in the tab Distil")
    name = str(name or "")
    if name not in among:
        near = difflib.get_close_matches(name, among, cutoff=0.4) or sorted(among)
        raise UserError(f"unknown student {name[:60]!r}: did you mean {' or '.join(near[:3])}?")
    return among[name]


def order(student: str, prompt: str, seed, steps, rival: str = "") -> Order:
    """A checked wish. Raises UserError with what to change for an empty or endless prompt, a class, a seed or a step count that is not there."""
    who = racer(student)
    other = racer(rival) if rival else None
    if other and (other.teacher != who.teacher or other == who):
        raise UserError(f"{other.name} cannot race {who.name}: the rival must be another student of the teacher {called(who.teacher)}")
    return Order(who, subject(who, prompt), whole(seed, "seed", 0, MAX_SEED), count(who, steps), other)


def subject(who: Racer, prompt: str) -> str:
    prompt = " ".join(str(prompt or "").split())
    if who.takes_prompt:
        if not prompt:
            hint = f", such as {who.examples[0]!r}" if who.examples else ""
            raise UserError(f"the prompt is empty: say what to draw{hint}")
        if len(prompt) > MAX_PROMPT:
            raise UserError(f"the prompt has {len(prompt):,} characters: give at most {MAX_PROMPT}")
        return prompt
    if not who.classes:
        return ""
    if re.fullmatch("[0-9]{1,4}", prompt) and int(prompt) < len(who.classes):
        return who.classes[int(prompt)]
    if prompt.lower() not in who.classes:
        raise UserError(f"{who.name} draws classes and {prompt[:40]!r} is none: choose {', '.join(who.classes)}")
    return prompt.lower()


def whole(value, what: str, low: int, high: int) -> int:
    try:
        number = int(value)
        if number != float(value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"the {what} {str(value)[:40]!r} is no whole number: give one from {low} to {high:,}") from None
    if not low <= number <= high:
        raise UserError(f"the {what} {str(number)[:24]} is out of range: give one from {low} to {high:,}")
    return number


def count(who: Racer, steps) -> int:
    k = whole(steps, "number of steps", 1, 1000)
    if k not in who.steps:
        raise UserError(f"{who.name} was trained for {', '.join(map(str, who.steps))} step{'s' * (who.steps != (1,))}, not {k}: choose one of these")
    return k


# ------------------------------------------------------------------------------------------------------- models in memory
def _bytes(*modules) -> int:
    return sum(t.numel() * t.element_size() for m in modules for t in (*m.parameters(), *m.buffers()))


def _limit() -> int:
    """FEWSTEP_SPACE_MEMORY_GB, else 60 % of the GPU's memory or 40 % of what the machine has."""
    if os.environ.get("FEWSTEP_SPACE_MEMORY_GB"):
        return int(float(os.environ["FEWSTEP_SPACE_MEMORY_GB"]) * 2**30)
    if ZERO_GPU or DEVICE == "cpu":
        return int(0.4 * psutil.virtual_memory().total)
    return int(0.6 * torch.cuda.get_device_properties(0).total_memory)


class Garage:
    """Loaded students and teachers; beyond `limit` bytes of weights the least recently used leave."""

    def __init__(self, limit: int):
        self.limit, self.kept, self.lock = limit, OrderedDict(), threading.RLock()

    def __len__(self):
        return len(self.kept)

    @property
    def size(self) -> int:
        return sum(size for _, size in self.kept.values())

    def get(self, key, load):
        """What `load()` gives, a pair (model, its torch modules), kept under `key`."""
        with self.lock:
            if key not in self.kept:
                model, modules = load()
                self.kept[key] = model, _bytes(*modules)
                while self.size > self.limit and len(self.kept) > 1:
                    self.kept.popitem(last=False)
                    gc.collect()
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
            self.kept.move_to_end(key)
            return self.kept[key][0]

    def drop(self, who: Racer):
        """Forget a student whose files are gone."""
        with self.lock:
            self.kept.pop(("student", who.source), None)

    def student(self, who: Racer):
        """Its pipeline, as zoo.load opens it."""
        def load():
            pipe = zoo.load(who.load, device=KEPT_ON, dtype=torch.float32)      # half precision would draw other noise than the teacher
            pipe.set_progress_bar_config(disable=True)
            return pipe, [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
        return self.get(("student", who.source), load)

    def teacher(self, name: str):
        """Its backbone. Raises UserError when this machine cannot get it."""
        from zoo import backbones

        def load():
            model = backbones.load(name).to(KEPT_ON)
            return model, [m for m in model.pipe.components.values() if isinstance(m, torch.nn.Module)]
        return self.get(("teacher", name), load)


garage = Garage(_limit())


def placed(model):
    """`model` where it is to draw. On ZeroGPU, inside a lease, it goes from the CPU to the GPU."""
    return model if KEPT_ON == DEVICE else model.to(DEVICE)


# ------------------------------------------------------------------------------------------------------- drawing
@dataclass
class Drawn:
    """What one model made: images (PIL, one a seed), network calls and seconds for one image, steps done of steps."""
    who: str
    role: str                      # "student" or "teacher"
    steps: int
    images: list = field(default_factory=list)
    calls: float = 0.0
    seconds: float = 0.0
    done: int = 0
    note: str = ""

    @property
    def finished(self) -> bool:
        return bool(self.images) and self.done == self.steps

    def facts(self) -> dict:
        return {"who": called(self.who), "role": self.role, "steps": self.steps, "network_calls": self.calls, "seconds": round(self.seconds, 4)}


class Calls:
    """Counts what passes a network: samples, divided by the images drawn."""

    def __init__(self, module, images: int):
        self.module, self.images, self.samples = module, images, 0

    def __enter__(self):
        def count(_module, args, kwargs):
            x = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
            self.samples += len(x)
        self.hook = self.module.register_forward_pre_hook(count, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.hook.remove()

    @property
    def each(self) -> float:
        return self.samples / self.images


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pil(images: torch.Tensor) -> list:
    from PIL import Image
    return [Image.fromarray(x) for x in to_uint8(images)]


def draw(who: Racer, what: str, seeds: list[int], steps: int) -> Drawn:
    """The student's pictures, one a seed, by its pipeline's plain call."""
    pipe = placed(garage.student(who))
    n = len(seeds)
    call = {"prompt": [what] * n} if who.takes_prompt else {"batch_size": n} | ({"class_labels": [who.classes.index(what)] * n} if who.classes else {})
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    with Calls(getattr(pipe, "unet", None) or pipe.transformer, n) as calls:
        began = _clock()
        images = pipe(**call, num_inference_steps=steps, generator=generators).images
        seconds = (_clock() - began) / n
    return Drawn(who.name, "student", steps, [i.convert("RGB") for i in images], calls.each, seconds, steps)


def conditions(model, what: str, n: int) -> tuple[dict, dict]:
    """cond and uncond of a backbone, for n samples of one subject."""
    if model.family != "pixel":
        return model.conditions([what] * n), {k: v.expand(n, *v.shape[1:]) for k, v in model.unconditional().items()}
    classes = model.classes and model.classes - 1
    label = 0
    if classes:
        from zoo.data.fashion_mnist import CLASSES
        label = CLASSES.index(what) if what in CLASSES else int(what.rpartition(" ")[2])
    pair = model._conditions(torch.full((n,), label, device=DEVICE))
    return pair["cond"], pair["uncond"]


@torch.no_grad()
def teach(name: str, what: str, seeds: list[int], steps: int = TEACHER_STEPS, guided: bool = True, previews: int = PREVIEWS) -> Iterator[Drawn]:
    """The teacher on the students' noise, step after step; `images` are its estimates of the clean pictures, renewed `previews`
    times on the way. The clock runs for the prompt, the steps and the last decoding, not for the pictures on the way."""
    model = placed(garage.teacher(name))
    n, net, process = len(seeds), model.teacher, model.process
    drawn = Drawn(name, "teacher", steps)
    noise = torch.stack([torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(s))[0] for s in seeds]).to(DEVICE)
    knots = process.t_max * (1 - torch.arange(steps, dtype=torch.float64) / steps)
    shown = {round((i + 1) * steps / previews) for i in range(previews)}
    with Calls(model.module, n) as calls:
        began = _clock()
        cond, uncond = conditions(model, what, n)
        x = rollout.start(process, noise, rollout.expand(knots[0], noise))
        for i, knot in enumerate(knots):
            t = rollout.expand(knot, noise)
            v = losses.guided(net, x, t, cond, uncond, model.guidance, to="v") if guided else net(x, t, cond, to="v")
            x0, eps = process.pair(v, x, t, "v")
            last = i + 1 == steps
            if not last:
                x = process.noise(x0, eps, rollout.expand(knots[i + 1], noise))
            pixels = model.decode(x0) if last else None
            drawn.seconds += (_clock() - began) / n
            drawn.done, drawn.calls = i + 1, calls.each
            if last or i + 1 in shown:
                drawn.images = pil(pixels if last else model.decode(x0))
            yield replace(drawn)
            began = _clock()


def warm(who: Racer):
    """Load a student and its teacher and call each once, so that no visitor's clock sees a first call."""
    fresh = ("student", who.source) not in garage.kept or ("teacher", who.teacher) not in garage.kept
    garage.student(who)
    garage.teacher(who.teacher)
    if fresh and not ZERO_GPU:        # there the main process has no GPU to call on
        what = who.classes[0] if who.classes else "" if not who.takes_prompt else "a"
        draw(who, what, [0], min(who.steps))
        for _ in teach(who.teacher, what, [0], 1):
            pass


def absent_teacher(who: Racer) -> str:
    """Why this machine cannot get the student's teacher; empty when it can."""
    try:
        garage.teacher(who.teacher)
    except UserError as error:
        return words(error)
    return ""


def lease(seconds: int):
    """Seconds of GPU for a call whose first argument is the order: students of others are a thousand times larger, and are moved first."""
    return lambda o, *_: seconds if o.student.local else 4 * seconds


# ------------------------------------------------------------------------------------------------------- races
@dataclass
class Race:
    order: Order
    lanes: list[Drawn]
    cached: bool = False

    @property
    def speedup(self) -> float | None:
        """Seconds of the teacher over those of the first student, when both have arrived."""
        student, teacher = self.lanes[0], self.lanes[-1]
        return teacher.seconds / student.seconds if student.finished and teacher.role == "teacher" and teacher.finished else None

    def facts(self) -> dict:
        o = self.order
        return {"student": o.student.name, "teacher": called(o.student.teacher), "prompt": o.subject, "seed": o.seed, "steps": o.steps,
                "lanes": [d.facts() for d in self.lanes if d.finished], "speedup": self.speedup and round(self.speedup, 2), "link": o.query}


def rival_steps(o: Order) -> int:
    """The rival's own count nearest to what was asked for."""
    return min(o.rival.steps, key=lambda k: (abs(k - o.steps), k))


def race(o: Order) -> Iterator[Race]:
    """Students first, then the teacher's estimates as they come; a teacher that cannot be had leaves a note in its lane.
    Raises UserError when a student cannot be had."""
    lanes = [Drawn(o.student.name, "student", o.steps)]
    lanes += [Drawn(o.rival.name, "student", rival_steps(o))] if o.rival else []
    lanes += [Drawn(o.student.teacher, "teacher", TEACHER_STEPS)]
    yield Race(o, list(lanes))
    trouble = absent_teacher(o.student)
    for who in filter(None, (o.student, o.rival)):
        garage.student(who) if trouble else warm(who)
    lanes[-1].note = trouble
    for i, drawn in _run(o, not trouble):
        lanes[i] = drawn
        yield Race(o, list(lanes))


@gpu(lease(15))
def _run(o: Order, with_teacher: bool) -> Iterator[tuple[int, Drawn]]:
    yield 0, draw(o.student, o.subject, [o.seed], o.steps)
    if o.rival:
        yield 1, draw(o.rival, o.subject, [o.seed], rival_steps(o))
    for drawn in teach(o.student.teacher, o.subject, [o.seed]) if with_teacher else ():
        yield (2 if o.rival else 1), drawn


# ------------------------------------------------------------------------------------------------------- diversity
@dataclass
class Strip:
    order: Order
    rows: list[Drawn]
    diversity: dict[str, float] = field(default_factory=dict)      # role -> zoo.metrics.diversity of its pictures

    @property
    def kept(self) -> float | None:
        """The student's share of its teacher's variety."""
        if len(self.diversity) < 2 or not self.diversity["teacher"]:
            return None
        return self.diversity["student"] / self.diversity["teacher"]

    def facts(self) -> dict:
        o = self.order
        return {"student": o.student.name, "teacher": called(o.student.teacher), "prompt": o.subject, "seeds": seeds_of(o), "steps": o.steps,
                "diversity": {k: round(v, 4) for k, v in self.diversity.items()}, "kept": self.kept and round(self.kept, 3), "rows": [r.facts() for r in self.rows]}


def seeds_of(o: Order) -> list[int]:
    return [(o.seed + i) % (MAX_SEED + 1) for i in range(SEEDS)]


def varied(images: list) -> float:
    """zoo.metrics.diversity of pictures of one subject: root-mean-square difference of two of them, on values in [-1, 1]."""
    import numpy as np
    x = torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return metrics.diversity(x[None])


def strip(o: Order) -> Iterator[Strip]:
    """Eight seeds from o.seed on: the student, then its teacher."""
    rows = [Drawn(o.student.name, "student", o.steps), Drawn(o.student.teacher, "teacher", TEACHER_STEPS)]
    yield Strip(o, list(rows))
    warm(o.student)
    measured = {}
    for i, drawn in _run_strip(o):
        rows[i] = drawn
        if drawn.finished:
            measured[drawn.role] = varied(drawn.images)
        yield Strip(o, list(rows), dict(measured))


@gpu(lease(30))
def _run_strip(o: Order) -> Iterator[tuple[int, Drawn]]:
    yield 0, draw(o.student, o.subject, seeds_of(o), o.steps)
    for drawn in teach(o.student.teacher, o.subject, seeds_of(o), previews=6):
        if drawn.finished or drawn.done % 4 == 0:
            yield 1, drawn


# ------------------------------------------------------------------------------------------------------- ladder
@dataclass
class Ladder:
    """rungs: network calls -> (student or None where its contract has no such count, teacher at no more calls)."""
    order: Order
    rungs: dict[int, tuple[Drawn | None, Drawn | None]]
    reference: Drawn | None = None

    def facts(self) -> dict:
        o = self.order
        rungs = {str(k): {"student": s and s.facts(), "teacher": t and t.facts()} for k, (s, t) in self.rungs.items()}
        return {"student": o.student.name, "teacher": called(o.student.teacher), "prompt": o.subject, "seed": o.seed, "rungs": rungs,
                "reference": self.reference and self.reference.facts()}


def ladder(o: Order) -> Iterator[Ladder]:
    """The student at 1, 2, 4 and 8 network calls beside its teacher at the same budgets, then the teacher at leisure."""
    rungs: dict[int, tuple] = {k: (None, None) for k in LADDER}
    yield Ladder(o, dict(rungs))
    warm(o.student)
    reference = None
    for k, drawn in _run_ladder(o):
        if k:
            rungs[k] = (drawn, rungs[k][1]) if drawn.role == "student" else (rungs[k][0], drawn)
        else:
            reference = drawn
        yield Ladder(o, dict(rungs), reference)


@gpu(lease(20))
def _run_ladder(o: Order) -> Iterator[tuple[int, Drawn]]:
    for k in LADDER:
        if k in o.student.steps:
            yield k, draw(o.student, o.subject, [o.seed], k)
    cost = 1 if garage.teacher(o.student.teacher).guidance == 1 else 2      # network calls of a guided step
    for k in LADDER:
        for drawn in teach(o.student.teacher, o.subject, [o.seed], max(1, k // cost), guided=k >= cost, previews=1):
            if drawn.finished:
                yield k, drawn
    for drawn in teach(o.student.teacher, o.subject, [o.seed], previews=1):
        if drawn.finished:
            yield 0, drawn


# ------------------------------------------------------------------------------------------------------- video
def film(who: Racer, prompt: str, seed: int, frames: int) -> Iterator[list]:
    """A streaming student's video: the frames of each chunk (PIL) as they are made, about `frames` in all."""
    garage.student(who)
    yield from _run_film(who, prompt, seed, frames)


@gpu(60)
def _run_film(who: Racer, prompt: str, seed: int, frames: int) -> Iterator[list]:
    made = 0
    for chunk in placed(garage.student(who)).stream(prompt, generator=torch.Generator().manual_seed(seed)):
        pictures = pil(chunk[0] * 2 - 1)[: frames - made]
        made += len(pictures)
        yield pictures
        if made >= frames:
            return
