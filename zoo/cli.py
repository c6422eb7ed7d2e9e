"""The `zoo` command. Exit codes: 0 fine, 1 a check that failed, 2 a mistake of the user (one line on stderr), 130 stopped by Ctrl-C.

Every command gives back an `Answer`; `main` alone prints it, as text or with --json as JSON, and nothing else reaches stdout then."""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import json
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

from . import __version__, registry
from .errors import UserError


@dataclass
class Answer:
    """What a command found. data: for --json; text: for people; code: exit code."""
    data: dict | list
    text: str
    code: int = 0


# ------------------------------------------------------------------------------------------------------------ printing
def table(columns: list[str], rows: list[list]) -> str:
    """One line per row under a line of titles, as wide as it needs to be where nobody watches."""
    from rich.console import Console
    from rich.table import Table
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=1000)
    sheet = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    for name in columns:
        sheet.add_column(_plain(name), overflow="fold", no_wrap=name == columns[0])
    for row in rows:
        sheet.add_row(*(_plain(str(cell)) for cell in row))
    with console.capture() as printed:
        console.print(sheet)
    return "\n".join(line.rstrip() for line in printed.get().splitlines())


def _plain(text: str) -> str:
    """Text of a registry row or a repository, never markup."""
    from rich.markup import escape
    return escape(text)


def watched(args) -> bool:
    """Whether a person follows on a terminal, so that bars are of use."""
    return sys.stderr.isatty() and not args.json


def progress(args):
    """A function (items, what) -> items with a bar on stderr while someone watches."""
    from tqdm import tqdm
    return lambda items, what: tqdm(list(items), desc=what, leave=False, disable=not watched(args))


@contextlib.contextmanager
def stages(args, total: int):
    """A function to be told what is done now: one of `total` stages of a bar while someone watches."""
    from tqdm import tqdm
    with tqdm(total=total, leave=False, disable=not watched(args), bar_format="{desc} {bar:20} {n}/{total} [{elapsed}]") as bar:
        def now(what: str) -> None:
            bar.set_description_str(what, refresh=False)
            bar.update()
            bar.refresh()
        yield now


@contextlib.contextmanager
def without_bars():
    """Inside, no library draws a bar: diffusers, transformers, the Hub's client and the scripts all use tqdm."""
    from tqdm.std import tqdm
    drawn = tqdm.__init__

    @functools.wraps(drawn)
    def silent(self, *args, **kwargs):
        drawn(self, *args, **kwargs | {"disable": True})
    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = drawn


def as_dict(row) -> dict:
    """A row of the registry as data for JSON."""
    data, paper = dataclasses.asdict(row), registry.paper(row) if isinstance(row, registry.Student) else None
    data |= {"published": {"title": paper.title, "url": paper.url}} if paper else {}
    return data | ({"url": row.url} if row.url else {}) | ({"script": str(row.path)} if isinstance(row, registry.Method) else {})


# ------------------------------------------------------------------------------------------------------- what was given
def writable(path: str | Path, folder: bool = False, flag: str = "--out") -> Path:
    """`path`, where a file (or a folder) can be written. Raises UserError before any work is done for it."""
    path = Path(path)
    if not folder and path.is_dir():
        raise UserError(f"{flag} {path} is a folder: give a file in it")
    if folder and path.exists() and not path.is_dir():
        raise UserError(f"{flag} {path} is a file: give a folder")
    parent = path.absolute().parent
    while folder and not parent.exists():              # folders are made with their parents
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{flag} {path}: {parent} is {'a file' if parent.exists() else 'not there'}: give a writable path, or make that folder first")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise UserError(f"{flag} {path} may not be written: give a writable path")
    return path


def local(name: str, command: str) -> str:
    """`name`; for a registered student the folder it is in here, if it is one of ours. Raises UserError for a file, and for a name that is
    nothing, with the nearest ones."""
    known = {s.name: s for s in registry.STUDENTS}
    if Path(name).is_file():
        raise UserError(f"{name} is a file: give the folder of an exported student")
    if name in known and not Path(name).exists():
        if known[name].kind == "community":
            raise UserError(f"{name} was made by others, and zoo {command} is for folders exported here: its repository is {known[name].source}")
        from .loading import _local
        return str(_local(name))
    if not Path(name).exists() and "/" not in name:
        raise UserError(f"there is no folder {name!r}: give an exported folder; {registry.nearest(name, [s.name for s in registry.OURS])}")
    return name


def opened(args) -> dict:
    """Arguments of zoo.load that were given. Raises UserError for a device that is not here."""
    import torch

    from .calls import device_here
    given = {"device": device_here(args.device)} | ({"allow_unverified": True} if args.allow_unverified else {})
    if args.dtype:
        given["dtype"] = getattr(torch, args.dtype)
    return given


# ------------------------------------------------------------------------------------------------------------ look-ups
def list_methods(args) -> Answer:
    rows = registry.methods(args.pattern)
    if not rows:
        raise UserError(f"no method matches {args.pattern!r}: {registry.nearest(args.pattern.strip('*?'), [m.name for m in registry.METHODS])}")
    return Answer([as_dict(m) for m in rows], table(["NAME", "FAMILY", "TRAINS ON", "SAMPLER", "STATUS", "PAPER"],
                                                    [[m.name, m.family, m.needs, m.sampler, m.status, m.url] for m in rows]))


def list_students(args) -> Answer:
    given = {k: getattr(args, k) for k in ("method", "base", "steps", "kind", "status", "modality") if getattr(args, k) is not None}
    rows = registry.students(args.pattern, **given)
    if not rows:
        raise no_student(args.pattern, given)
    return Answer([as_dict(s) for s in rows], students_table(rows))


def students_table(rows: list[registry.Student]) -> str:
    return table(["NAME", "METHOD", "BASE MODEL", "STEPS", "GUIDANCE", "LICENSE", "STATUS"],
                 [[s.name, s.method, s.teacher, counts(s.steps), f"{s.guidance:g}", s.license, s.status] for s in rows])


def no_student(pattern: str, given: dict) -> UserError:
    """Why no student matches: the pattern or filter that none has, with the nearest values, or all of them together."""
    if not registry.students(pattern):
        return UserError(f"no student is called {pattern!r}: {registry.nearest(pattern.strip('*?'), [s.name for s in registry.STUDENTS])}")
    for name, value in given.items():
        if registry.students(**{name: value}):
            continue
        if name == "steps":
            return UserError(f"no student has --steps {value}: there are {', '.join(map(str, sorted({k for s in registry.STUDENTS for k in s.steps})))}")
        known = {s.teacher if name == "base" else getattr(s, name) for s in registry.STUDENTS} | (registry.BASE_ALIASES.keys() if name == "base" else set())
        return UserError(f"no student has --{name} {value}: {registry.nearest(value, known)}")
    words = " ".join(([] if pattern == "*" else [pattern]) + [f"--{k} {v}" for k, v in given.items()])
    return UserError(f"no student matches {words} together: leave one out")


def counts(steps: tuple[int, ...]) -> str:
    """(8, 7, ..., 1) as 1-8, (4, 2, 1) as 1, 2, 4."""
    low, high = min(steps), max(steps)
    return f"{low}-{high}" if len(steps) > 2 and len(steps) == high - low + 1 else ", ".join(map(str, sorted(steps)))


def show(args) -> Answer:
    """A method's docstring, with --recipes its published settings and their sources; a student's row; or a family's paper and students."""
    if args.name in {s.name for s in registry.STUDENTS}:
        row = registry.student(args.name)
        if args.recipes:
            raise UserError(f"{row.name} is a student, and recipes are a method's: zoo show METHOD --recipes, such as zoo show dmd --recipes")
        return Answer(as_dict(row), describe(row))
    methods = {m.name for m in registry.METHODS}
    if registry.METHOD_ALIASES.get(args.name, args.name) not in methods and not args.recipes and (kin := registry.relatives(args.name)):
        papers = dict.fromkeys(f"{p.title}: {p.url}" for row in kin if (p := registry.paper(row)))
        return Answer([as_dict(row) for row in kin], "\n".join([*papers, students_table(kin)]))
    if args.name not in methods | registry.METHOD_ALIASES.keys():
        names = [m.name for m in registry.METHODS] + [s.name for s in registry.STUDENTS]
        raise UserError(f"unknown {'student' if '.' in args.name or '-' in args.name else 'method'} {args.name!r}: {registry.nearest(args.name, names)}")
    row = registry.method(args.name)
    if not args.recipes:
        return Answer(as_dict(row) | {"docstring": row.doc}, row.doc)
    recipes = read_recipes(row)
    lines = [f"\n--recipe {name}   [{settings['source']}]\n" + "\n".join(f"    {k} = {v}" for k, v in settings.items() if k != "source")
             for name, settings in recipes.items()]
    return Answer(as_dict(row) | {"docstring": row.doc, "recipes": recipes}, "\n".join([row.doc, *(lines or ["\nno published settings are known"])]))


def read_recipes(row: registry.Method) -> dict[str, dict]:
    """The published settings of a script, each with its source, read without importing it."""
    import ast
    for node in ast.walk(ast.parse(row.path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "recipes" and isinstance(node.value, ast.Dict):
            return {ast.literal_eval(k): {w.arg: ast.literal_eval(w.value) for w in v.keywords} for k, v in zip(node.value.keys, node.value.values)}
    return {}


def describe(row: registry.Student) -> str:
    """A student's row, as a table."""
    paper = registry.paper(row)
    facts = {"source": row.url or row.source, "revision": row.revision if row.kind == "community" else "",
             "base model": f"{row.teacher} ({row.base_license})",
             "license": row.license, "method": row.method, "paper": f"{paper.title}: {paper.url}" if paper else "",
             "holds": " ".join(filter(None, (row.parts, row.file, row.second_file))),
             "LoRA scale": f"{row.lora_scale:g}" if row.is_lora else "", "pipeline": row.pipeline,
             "scheduler": row.scheduler or ("as the base model's" if row.kind == "community" else "in its folder"),
             "its settings": json.dumps(row.scheduler_config) if row.scheduler_config else "",
             "steps": f"{counts(row.steps)} (plain call: {row.usual_steps})", "timesteps": "; ".join(f"{k}: {list(v)}" for k, v in row.timesteps.items()),
             "guidance": f"{row.guidance_argument}={row.guidance:g}",
             "trained for guidance": f"{row.guidance_range[0]:g} to {row.guidance_range[1]:g}" if row.guidance_range else "",
             "other arguments": json.dumps(row.call) if row.call else "", "status": row.status, "note": row.note,
             "made by": f"zoo make {row.name}" if row.kind == "rebuilt" else ""}
    measured: dict[tuple, list] = {}
    for m in row.metrics:
        measured.setdefault((m.name, m.dataset, m.source), []).append(f"{m.value:g} at {m.steps}")
    rows = [[k, v] for k, v in facts.items() if v]
    rows += [[name, f"{', '.join(values)} steps; {dataset} [{source}]"] for (name, dataset, source), values in measured.items()]
    return table([row.name, ""], rows + ([["facts from", " ".join(row.facts)]] if row.facts else []))


def where(args) -> Answer:
    path = str(registry.method(args.name).path)
    return Answer({"name": registry.method(args.name).name, "path": path}, path)


def cite(args) -> Answer:
    text = registry.cite(args.name)
    return Answer({"name": args.name, "bibtex": text}, text)


# ------------------------------------------------------------------------------------------------------------ training
def train(name: str, flags: list[str]) -> None:
    """Run a method's script in this process; `accelerate launch $(zoo where NAME)` runs it on several devices."""
    path = str(registry.method(name).path)
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


def make(args) -> Answer:
    """Train a student of the registry again by its exact command, and hold what was measured against its row."""
    import shlex
    from importlib.metadata import PackageNotFoundError, version
    row = registry.student(args.name)
    if row.kind != "rebuilt":
        raise UserError(f"{row.name} is {row.kind}, and only rebuilt students are made again: open it with zoo.load({row.name!r})")
    out = writable(args.out or Path(row.source).parent, folder=True)
    for package, made_with in row.versions.items():
        try:
            here = version(package).split("+")[0]
        except PackageNotFoundError:
            here = "missing"
        if here != made_with.split("+")[0]:
            print(f"note: made with {package} {made_with}, here is {here}: numbers may differ", file=sys.stderr)
    train(row.method, [*shlex.split(row.command), "--seed", str(row.seed), "--output_dir", str(out)])
    if not (out / "measured.json").is_file():
        raise UserError(f"{out} holds no measured.json, so the run did not end: the same command resumes it")
    report = compare(row, json.loads((out / "measured.json").read_text()))
    columns = ("metric", "steps", "here", "row", "tolerance", "verdict")
    return Answer({"student": row.name, "folder": str(out / "student"), "seed": row.seed, "metrics": report},
                  f"{out / 'student'}\n" + table([c.upper() for c in columns], [[r[c] for c in columns] for r in report]),
                  int(any(r["verdict"] != "agrees" for r in report)))


def compare(row: registry.Student, measured: dict) -> list[dict]:
    """Each metric of the row beside what a rebuild measured: agrees, differs, or not measured."""
    students = {r["steps"]: r for r in measured["measured"] if r["who"] == "student"}
    out = []
    for m in row.metrics:
        here = students.get(m.steps, {}).get(m.name)
        verdict = "not measured" if here is None else "agrees" if abs(here - m.value) <= m.tolerance else "differs"
        out.append({"metric": m.name, "steps": m.steps, "here": here, "row": m.value, "tolerance": m.tolerance, "verdict": verdict})
    return out


# ------------------------------------------------------------------------------------------------------------ sampling
def sample(args) -> Answer:
    """One picture (text, video) per seed; of several seeds, one PNG with all of them."""
    from . import calls, loading
    from .pipelines.causal_video import CausalVideoPipeline
    from .pipelines.unmask import UnmaskPipeline
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: give at least 1")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: give 0 or more")
    if args.out:
        picture_format(writable(args.out))
    with calls.without_remarks():
        pipe = loading.load(args.student, **opened(args))
    if isinstance(pipe, UnmaskPipeline):
        return sample_text(pipe, args)
    if not isinstance(pipe, CausalVideoPipeline):
        calls.open_stock(pipe, args.student, "sample")
    steps = calls.steps_in(getattr(pipe, "_terms", None) or pipe.contract, args.steps, args.student)
    call = calls.condition(pipe, args.prompt) | calls.guidance_in(pipe, args.guidance, args.student)
    out = writable(args.out or ("sample.gif" if calls.is_video(pipe) else "sample.png"))
    picture_format(out, calls.is_video(pipe))
    seeds = list(range(args.seed, args.seed + args.seeds))
    pipe.set_progress_bar_config(disable=not (watched(args) and len(seeds) == 1), leave=False)       # of several samples one bar
    made = [calls.frames(calls.draw(pipe, call, steps, seed)) for seed in (progress(args)(seeds, "sampling") if len(seeds) > 1 else seeds)]
    sheets = [sheet(frames) for frames in zip(*made)]
    motion = {"save_all": True, "append_images": sheets[1:], "duration": 125, "loop": 0} if len(sheets) > 1 else {}
    sheets[0].save(out, **motion)
    return Answer({"student": args.student, "prompt": args.prompt, "steps": steps, "seeds": seeds, "out": str(out), "size": list(made[0][0].size),
                   "frames": len(sheets)}, str(out))


def picture_format(out: Path, moving: bool = False) -> None:
    """Raise UserError when no picture (no animation) is written under this name."""
    from PIL import Image
    kind = Image.registered_extensions().get(out.suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f"--out {out}: pictures are not written as {out.suffix or 'a name without ending'}: give a path such as {out.with_suffix('.png')}")
    if moving and kind not in ("GIF", "PNG", "WEBP"):
        raise UserError(f"--out {out}: this student makes videos: give a path such as {out.with_suffix('.gif')} (.gif, .webp or .png)")


def sheet(pictures: tuple):
    """Pictures of one size as one: side by side up to four, more in a square."""
    from PIL import Image
    columns = len(pictures) if len(pictures) <= 4 else int(len(pictures) ** 0.5 + 0.999)
    width, height = pictures[0].size
    out = Image.new(pictures[0].mode, (columns * width, -(-len(pictures) // columns) * height), "white")
    for i, picture in enumerate(pictures):
        out.paste(picture, (i % columns * width, i // columns * height))
    return out


def sample_text(pipe, args) -> Answer:
    """One text per seed; the prompt is how each begins."""
    import torch

    from .calls import guidance_in, steps_in
    if args.out:
        raise UserError(f"--out {args.out} is for pictures and {args.student} writes text, which is printed: drop --out and write > {args.out}")
    guidance_in(pipe, args.guidance, args.student)
    steps = steps_in(pipe.contract, args.steps, args.student)
    seeds = list(range(args.seed, args.seed + args.seeds))
    texts = [pipe(args.prompt or "", num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)).texts[0]
             for seed in progress(args)(seeds, "sampling")]
    return Answer({"student": args.student, "prompt": args.prompt or "", "steps": steps, "seeds": seeds, "texts": texts}, "\n".join(texts))


# ------------------------------------------------------------------------------------------------------------- the Hub
def card(args) -> Answer:
    """Render the card of an exported folder again from what it holds."""
    from .hub.card import refresh
    path = str(refresh(local(args.folder, "card")))
    return Answer({"folder": str(Path(path).parent), "card": path}, path)


def push(args) -> Answer:
    from .hub.publish import push as publish
    folder = local(args.folder, "push")
    with stages(args, 4) as now:
        url = publish(folder, args.repo, private=True if args.private else None, revision=args.revision, create_pr=args.create_pr, tag=args.tag,
                      collection=args.collection, say=now)
    head, _, last = url.rpartition("/")
    return Answer({"folder": folder, "repo": args.repo, "url": url, "commit": last if head.endswith("/commit") else None,
                   "pull_request": int(last) if head.endswith("/discussions") else None, "revision": args.revision, "tag": args.tag}, url)


def verify(args) -> Answer:
    """Exit code 1 when a repository or folder is not what it says."""
    from .hub.verify import verify as check
    source = local(args.source, "verify")
    if args.revision and Path(source).is_dir():
        raise UserError(f"--revision {args.revision} is of a repository and {source} is a folder, which has none: leave it out")
    found = check(source, revision=args.revision)
    return Answer({"source": args.source, "revision": args.revision, "problems": found}, "\n".join(found) or f"{args.source}: nothing wrong found",
                  int(bool(found)))


def export(args) -> Answer:
    from .hub.convert import convert
    writable(args.out, folder=Path(args.out).suffix != ".safetensors")
    with stages(args, 3) as now:
        report = convert(args.folder, args.to, args.out, rank=args.rank, teacher=args.teacher, allow_unverified=args.allow_unverified, say=now)
    return Answer(report, table(["EXPORT", ""], [[k.replace("_", " "), readable(v)] for k, v in report.items()]))


def readable(value) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{k} {v}" for k, v in value.items())
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def evaluate(args) -> Answer:
    from .evaluate import evaluate as measure
    out = writable(args.out) if args.out else None
    report = measure(args.student, args.prompts, limit=args.limit, seeds=args.seeds, steps=args.steps, reference=args.reference, progress=progress(args),
                     **opened(args))
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")
    head = f"{report['student']}: pictures {report['pictures']} ({' x '.join(map(str, report['size']))}), steps {report['steps']}, on {report['device']}"
    rows = [[r["metric"], f"{r['value']:.4g}" if isinstance(r["value"], float) else r["value"], r["note"]] for r in report["rows"]]
    return Answer(report, head + "\n" + table(["METRIC", "VALUE", "NOTE"], rows))


# -------------------------------------------------------------------------------------------------------- command line
class Parser(argparse.ArgumentParser):
    """One whose errors are one line, as all others."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="zoo", description="Few-step diffusion students: find, sample, train, publish, measure.")
    top.add_argument("--version", action="version", version=f"fewstep {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, help: str, *positional: str):
        p = commands.add_parser(name, help=help, description=help)
        p.set_defaults(run=run)
        for word in positional:
            p.add_argument(word)
        p.add_argument("--json", action="store_true", help="print JSON, and nothing else on stdout")
        return p

    def opening(p):
        p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")
        p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the student's")
        p.add_argument("--allow_unverified", action="store_true", help="open a registered student whose sampling was not checked")

    p = command("methods", list_methods, "list the methods")
    p.add_argument("pattern", nargs="?", default="*", help="shell pattern of names, such as \"*flow*\"")
    p = command("students", list_students, "list the students: zoo students --method dmd2 --base sdxl")
    p.add_argument("pattern", nargs="?", default="*", help="shell pattern of names")
    for flag, text in (("--method", "dmd2, lcm, ..."), ("--base", "part of the base model's name, or sdxl, sd15, sd3, flux"),
                       ("--kind", "shipped, rebuilt, community"),
                       ("--status", "verified, unverified"), ("--modality", "image, video, text")):
        p.add_argument(flag, help=text)
    p.add_argument("--steps", type=int, help="serves this step count")
    p = command("show", show, "print a method's docstring (algorithm, departures, launch lines) or a student's row", "name")
    p.add_argument("--recipes", action="store_true", help="and the published settings of the method, with their sources")
    command("where", where, "print a script's path, for `accelerate launch $(zoo where dmd)`", "name")
    command("cite", cite, "print BibTeX of a method or student", "name")
    p = commands.add_parser("train", add_help=False, help="run a method's script: zoo train dmd --teacher fashion; all flags are the script's")
    p.set_defaults(run=lambda a: train(a.name, a.flags), json=False)
    p.add_argument("name")
    p.add_argument("flags", nargs=argparse.REMAINDER)
    p = command("make", make, "train a student of the registry again and compare it with its row", "name")
    p.add_argument("--out", help="folder of the run (default: outputs/NAME)")
    p = command("sample", sample, "sample a student: zoo sample outputs/dmd-emoji/student \"fluent red heart\" --steps 4")
    p.add_argument("student", help="a registered name, an exported folder or a Hub id")
    p.add_argument("prompt", nargs="?", help="what to draw; of class-conditional students a class by number or name; how a text begins")
    p.add_argument("--steps", type=int, help="a count of the student's contract (default: its usual one)")
    p.add_argument("--guidance", type=float, help="a scale the student was trained for (default: its usual one)")
    p.add_argument("--seed", type=int, default=0, help="seed of the sample, or the first of several (default 0)")
    p.add_argument("--seeds", type=int, default=1, help="how many samples, each of the next seed, side by side in one picture (default 1)")
    p.add_argument("--out", help="picture to write (default: sample.png; of videos sample.gif)")
    opening(p)
    command("card", card, "render the card of an exported folder again", "folder")
    p = command("push", push, "publish a folder: zoo push outputs/dmd-emoji/student user/name", "folder", "repo")
    for flag, text in (("--private", "make the repository private"), ("--create_pr", "open a pull request instead of committing")):
        p.add_argument(flag, action="store_true", help=text)
    for flag, text in (("--revision", "branch to commit to"), ("--tag", "tag the commit"), ("--collection", "add to a collection of this title")):
        p.add_argument(flag, help=text)
    p = command("verify", verify, "check a repository or folder: card, files, contract, samples in a fresh process", "source")
    p.add_argument("--revision", help="branch, tag or commit of a repository")
    p = command("export", export, "convert a student for other programs; the export is reloaded and its error printed")
    p.add_argument("folder", metavar="student", help="a registered name, an exported folder or a Hub id")
    p.add_argument("--to", required=True, choices=("lora", "fused", "comfyui", "single-file", "fp8"))
    p.add_argument("--out", required=True, help="file or folder to write")
    p.add_argument("--rank", type=int, help="of a LoRA taken from full weights (default 64)")
    p.add_argument("--teacher", help="of a LoRA: where its teacher is, when the student's record names a folder that is not here")
    p.add_argument("--allow_unverified", action="store_true", help="open a registered student whose sampling was not checked")
    p = command("eval", evaluate, "measure a student on prompts; what is not installed is skipped and said")
    p.add_argument("student", help="a registered name, an exported folder or a Hub id")
    p.add_argument("--prompts", help="a text file of one prompt a line, partiprompts, or coco; of class-conditional students classes (default: all)")
    p.add_argument("--limit", type=int, help="use the first N prompts")
    p.add_argument("--seeds", type=int, default=2, help="pictures of each prompt (default 2; diversity needs 2)")
    p.add_argument("--steps", type=int, help="a count of the student's contract")
    p.add_argument("--reference", help="folder, file or Hub id of real pictures, for FID and KID")
    p.add_argument("--out", help="write the report as JSON to this file too")
    opening(p)
    return top


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        code = run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:            # `zoo methods | head`
        sys.stderr.close()
        return
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.filename or 'a file'} cannot be used ({error.strerror}): check its permissions and the free space", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    if code:
        raise SystemExit(code)


def run(args) -> int:
    """Run a command and print its answer; returns the exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")        # its remarks on image processors are no concern of who samples
    with contextlib.ExitStack() as inside:
        if args.command != "train" and not watched(args):
            inside.enter_context(without_bars())
        if args.json:                  # what libraries and scripts print is not part of the JSON
            inside.enter_context(contextlib.redirect_stdout(sys.stderr))
        answer = args.run(args)
    if answer is None:                 # a script printed by itself
        return 0
    print(json.dumps(answer.data, indent=1, ensure_ascii=False) if args.json else answer.text, flush=True)
    return answer.code


if __name__ == "__main__":
    main()
