"""The `zoo` command. A mistake of the user is one line and exit code 2; a check that fails is exit code 1."""
from __future__ import annotations

import argparse
import dataclasses
import json
import runpy
import sys
from pathlib import Path

from . import __version__, registry
from .errors import UserError


# ------------------------------------------------------------------------------------------------------------ printing
def table(columns: list[str], rows: list[list]) -> None:
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
    print("\n".join(line.rstrip() for line in printed.get().splitlines()))


def _plain(text: str) -> str:
    """Text of a registry row or a repository, never markup."""
    from rich.markup import escape
    return escape(text)


def show_json(data) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False))


def progress(items, what: str):
    """`items` with a bar on stderr where someone watches."""
    if not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track
    return track(list(items), description=what, console=Console(stderr=True), transient=True)


def as_dict(row) -> dict:
    """A row of the registry as data for JSON."""
    data = dataclasses.asdict(row)
    return data | ({"url": row.url} if row.url else {}) | ({"script": str(row.path)} if isinstance(row, registry.Method) else {})


# ------------------------------------------------------------------------------------------------------------ look-ups
def list_methods(args) -> None:
    rows = registry.methods(args.pattern)
    if args.json:
        return show_json([as_dict(m) for m in rows])
    table(["NAME", "FAMILY", "TRAINS ON", "SAMPLER", "STATUS", "PAPER"], [[m.name, m.family, m.needs, m.sampler, m.status, m.url] for m in rows])


def list_students(args) -> None:
    given = {k: getattr(args, k) for k in ("method", "steps", "kind", "status", "modality") if getattr(args, k) is not None}
    rows = registry.students(args.pattern, base=args.base, **given)
    if args.json:
        return show_json([as_dict(s) for s in rows])
    table(["NAME", "METHOD", "BASE MODEL", "STEPS", "GUIDANCE", "LICENSE", "STATUS"],
          [[s.name, s.method, s.teacher, counts(s.steps), f"{s.guidance:g}", s.license, s.status] for s in rows])
    if not rows:
        print("no student matches", file=sys.stderr)


def counts(steps: tuple[int, ...]) -> str:
    """(8, 7, ..., 1) as 1-8, (4, 2, 1) as 1, 2, 4."""
    low, high = min(steps), max(steps)
    return f"{low}-{high}" if len(steps) > 2 and len(steps) == high - low + 1 else ", ".join(map(str, sorted(steps)))


def show(args) -> None:
    """A method's docstring, with --recipes its published settings and their sources; or a student's row."""
    if args.name in {s.name for s in registry.STUDENTS}:
        row = registry.student(args.name)
        return show_json(as_dict(row)) if args.json else show_student(row)
    if args.name not in {m.name for m in registry.METHODS} | registry.METHOD_ALIASES.keys():
        names = [m.name for m in registry.METHODS] + [s.name for s in registry.STUDENTS]
        raise UserError(f"unknown {'student' if '.' in args.name or '-' in args.name else 'method'} {args.name!r}: {registry.nearest(args.name, names)}")
    row = registry.method(args.name)
    recipes = read_recipes(row) if args.recipes or args.json else {}
    if args.json:
        return show_json(as_dict(row) | {"docstring": row.doc, "recipes": recipes})
    print(row.doc)
    for name, settings in recipes.items():
        print(f"\n--recipe {name}   [{settings['source']}]")
        print("\n".join(f"    {k} = {v}" for k, v in settings.items() if k != "source"))


def read_recipes(row: registry.Method) -> dict[str, dict]:
    """The published settings of a script, each with its source, read without importing it."""
    import ast
    for node in ast.walk(ast.parse(row.path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "recipes" and isinstance(node.value, ast.Dict):
            return {ast.literal_eval(k): {w.arg: ast.literal_eval(w.value) for w in v.keywords} for k, v in zip(node.value.keys, node.value.values)}
    return {}


def show_student(row: registry.Student) -> None:
    facts = {"source": row.url or row.source, "revision": row.revision if row.kind == "community" else "",
             "base model": f"{row.teacher} ({row.base_license})",
             "license": row.license, "method": row.method, "holds": " ".join(filter(None, (row.parts, row.file, row.second_file))),
             "LoRA scale": f"{row.lora_scale:g}" if row.is_lora else "", "pipeline": row.pipeline,
             "scheduler": row.scheduler or ("as the base model's" if row.kind == "community" else "in its folder"),
             "its settings": json.dumps(row.scheduler_config) if row.scheduler_config else "",
             "steps": f"{counts(row.steps)} (plain call: {row.usual_steps})", "timesteps": "; ".join(f"{k}: {list(v)}" for k, v in row.timesteps.items()),
             "guidance": f"{row.guidance_argument}={row.guidance:g}",
             "trained for guidance": f"{row.guidance_range[0]:g} to {row.guidance_range[1]:g}" if row.guidance_range else "",
             "other arguments": json.dumps(row.call) if row.call else "", "status": row.status, "note": row.note,
             "made by": f"zoo make {row.name}" if row.kind == "rebuilt" else "",
             "metrics": "; ".join(f"{m.name} {m.value:g} at {m.steps} steps on {m.dataset} [{m.source}]" for m in row.metrics),
             "facts from": " ".join(row.facts)}
    table([row.name, ""], [[k, v] for k, v in facts.items() if v])


# ------------------------------------------------------------------------------------------------------------ training
def train(name: str, flags: list[str]) -> None:
    """Run a method's script in this process; `accelerate launch $(zoo where NAME)` runs it on several devices."""
    path = str(registry.method(name).path)
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


def make(args) -> None:
    """Train a student of the registry again by its exact command, and hold what was measured against its row."""
    import shlex
    from importlib.metadata import PackageNotFoundError, version
    row = registry.student(args.name)
    if row.kind != "rebuilt":
        raise UserError(f"{row.name} is {row.kind}, and only rebuilt students are made again: open it with zoo.load({row.name!r})")
    for package, made_with in row.versions.items():
        try:
            here = version(package).split("+")[0]
        except PackageNotFoundError:
            here = "missing"
        if here != made_with.split("+")[0]:
            print(f"note: made with {package} {made_with}, here is {here}: numbers may differ", file=sys.stderr)
    out = Path(args.out or Path(row.source).parent)
    train(row.method, [*shlex.split(row.command), "--seed", str(row.seed), "--output_dir", str(out)])
    report = compare(row, json.loads((out / "measured.json").read_text()))
    if args.json:
        show_json(report)
    else:
        table(["METRIC", "STEPS", "HERE", "ROW", "TOLERANCE", "VERDICT"], [[r["metric"], r["steps"], r["here"], r["row"], r["tolerance"],
                                                                            r["verdict"]] for r in report])
    if any(r["verdict"] != "agrees" for r in report):
        raise SystemExit(1)


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
def options(args) -> dict:
    """Arguments of zoo.load that were given."""
    import torch
    given = {"allow_unverified": True} if args.allow_unverified else {}
    device = args.device or ("cuda" if torch.cuda.is_available() else None)
    if device:
        given["device"] = device
    if args.dtype:
        given["dtype"] = getattr(torch, args.dtype)
    return given


def sample(args) -> None:
    """One picture (text, video) per seed 0 .. seeds - 1; pictures side by side in a PNG."""
    from diffusers import DiffusionPipeline

    from . import loading
    from .pipelines.causal_video import CausalVideoPipeline
    from .pipelines.unmask import UnmaskPipeline
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: give at least 1")
    pipe = loading.load(args.student, **options(args))
    if isinstance(pipe, UnmaskPipeline):
        return sample_text(pipe, args)
    if not isinstance(pipe, DiffusionPipeline):
        raise UserError(f"{args.student} is a student of the toy teacher: its samples are points, not pictures")
    known = pipe.contract.steps if isinstance(pipe, CausalVideoPipeline) else (getattr(pipe, "_terms", None) or pipe._contract).steps
    check_steps(args, known)
    made = [draw(pipe, args, seed) for seed in progress(range(args.seeds), "sampling")]
    save(made, args.out)
    print(args.out)


def check_steps(args, known) -> None:
    if args.steps is not None and args.steps not in known:
        raise UserError(f"--steps {args.steps} is not in the contract of {args.student}: it was trained for {', '.join(map(str, known))}")


def draw(pipe, args, seed: int) -> list:
    """Frames of one sample: one for a picture."""
    import torch
    from diffusers import ConsistencyModelPipeline
    what = {"class_labels": [class_number(args.prompt)]} if isinstance(pipe, ConsistencyModelPipeline) else {"prompt": args.prompt}
    out = pipe(**what, num_inference_steps=args.steps, generator=torch.Generator().manual_seed(seed))
    return [out.images[0]] if hasattr(out, "images") else as_pictures(out.frames[0])


def as_pictures(frames) -> list:
    """Frames as PIL images; some pipelines give arrays in [0, 1]."""
    from PIL import Image
    return [f if isinstance(f, Image.Image) else Image.fromarray((f * 255).round().clip(0, 255).astype("uint8")) for f in frames]


def save(videos: list[list], out: str) -> None:
    """Samples side by side: a picture, or an animation (.gif, .webp, .png) where they have several frames."""
    from PIL import Image
    first = videos[0][0]
    sheets = []
    for frames in zip(*videos):
        sheet = Image.new(first.mode, (sum(f.width for f in frames), first.height))
        for i, frame in enumerate(frames):
            sheet.paste(frame, (i * first.width, 0))
        sheets.append(sheet)
    motion = {"save_all": True, "append_images": sheets[1:], "duration": 125, "loop": 0} if len(sheets) > 1 else {}
    try:
        sheets[0].save(out, **motion)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --out {out} ({error}): give a writable path such as sample.{'gif' if motion else 'png'}") from error


def sample_text(pipe, args) -> None:
    """One text per seed, printed; the prompt is how each begins."""
    import torch
    check_steps(args, pipe.contract.steps)
    for seed in range(args.seeds):
        print(pipe(args.prompt, num_inference_steps=args.steps, generator=torch.Generator().manual_seed(seed)).texts[0])


def class_number(prompt: str) -> int:
    """A class by number, or by its Fashion-MNIST name."""
    from .data.fashion_mnist import CLASSES
    if prompt.isdigit():
        return int(prompt)
    if prompt in CLASSES:
        return CLASSES.index(prompt)
    raise UserError(f"this student draws classes, not prompts, and {prompt!r} is none: give a number, or {', '.join(CLASSES)}")


# ------------------------------------------------------------------------------------------------------------- the Hub
def card(args) -> None:
    """Render the card of an exported folder again from what it holds."""
    from .hub.card import refresh
    print(refresh(args.folder))


def push(args) -> None:
    from .hub.publish import push as publish
    print(publish(args.folder, args.repo, private=True if args.private else None, revision=args.revision, create_pr=args.create_pr, tag=args.tag,
                  collection=args.collection))


def verify(args) -> None:
    """Exit code 1 when a repository or folder is not what it says."""
    from .hub.verify import verify as check
    found = check(args.source, revision=args.revision)
    if args.json:
        show_json({"source": args.source, "problems": found})
    else:
        print("\n".join(found) if found else f"{args.source}: nothing wrong found")
    if found:
        raise SystemExit(1)


def export(args) -> None:
    from .hub.convert import convert
    report = convert(args.folder, args.to, args.out, rank=args.rank, allow_unverified=args.allow_unverified)
    if args.json:
        show_json(report)
    else:
        table(["EXPORT", ""], [[k.replace("_", " "), v] for k, v in report.items()])


def evaluate(args) -> None:
    from .evaluate import evaluate as measure
    report = measure(args.student, args.prompts, limit=args.limit, seeds=args.seeds, steps=args.steps, reference=args.reference, progress=progress,
                     **options(args))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    if args.json:
        return show_json(report)
    table(["METRIC", "VALUE", "NOTE"], [[r["metric"], r["value"], r["note"]] for r in report["rows"]])


# -------------------------------------------------------------------------------------------------------- command line
def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="zoo", description="Few-step diffusion students: find, sample, train, publish, measure.")
    top.add_argument("--version", action="version", version=f"fewstep {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, help: str, *positional: str, as_json: bool = False, **more):
        p = commands.add_parser(name, help=help, **more)
        p.set_defaults(run=run)
        for word in positional:
            p.add_argument(word)
        if as_json:
            p.add_argument("--json", action="store_true", help="print JSON")
        return p

    def opened(p):
        p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")
        p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the student's")
        p.add_argument("--allow_unverified", action="store_true", help="open a registered student whose sampling was not checked")

    p = command("methods", list_methods, "list the methods", as_json=True)
    p.add_argument("pattern", nargs="?", default="*", help="shell pattern of names, such as \"*flow*\"")
    p = command("students", list_students, "list the students: zoo students --method dmd2 --base sdxl", as_json=True)
    p.add_argument("pattern", nargs="?", default="*", help="shell pattern of names")
    for flag, text in (("--method", "dmd2, lcm, ..."), ("--base", "part of the base model's name, or sdxl, sd15, sd3, flux"),
                       ("--kind", "shipped, rebuilt, community"),
                       ("--status", "verified, unverified"), ("--modality", "image, video, text")):
        p.add_argument(flag, help=text)
    p.add_argument("--steps", type=int, help="serves this step count")
    p = command("show", show, "print a method's docstring (algorithm, departures, launch lines) or a student's row", "name", as_json=True)
    p.add_argument("--recipes", action="store_true", help="and the published settings of the method, with their sources")
    command("where", lambda a: print(registry.method(a.name).path), "print a script's path, for `accelerate launch $(zoo where dmd)`", "name")
    command("cite", lambda a: print(registry.cite(a.name)), "print BibTeX of a method or student", "name")
    p = command("train", lambda a: train(a.name, a.flags), "run a method's script: zoo train dmd --teacher fashion", "name", add_help=False)
    p.add_argument("flags", nargs=argparse.REMAINDER)
    p = command("make", make, "train a student of the registry again and compare it with its row", "name", as_json=True)
    p.add_argument("--out", help="folder of the run (default: outputs/NAME)")
    p = command("sample", sample, "sample a student: zoo sample outputs/dmd-emoji/student \"fluent red heart\" --steps 4")
    p.add_argument("student", help="a registered name, an exported folder or a Hub id")
    p.add_argument("prompt")
    p.add_argument("--steps", type=int, help="a count of the student's contract (default: the pipeline's)")
    p.add_argument("--seeds", type=int, default=4, help="samples, of seeds 0, 1, ... (default 4)")
    p.add_argument("--out", default="sample.png")
    opened(p)
    command("card", card, "render the card of an exported folder again", "folder")
    p = command("push", push, "publish a folder: zoo push outputs/dmd-emoji/student user/name", "folder", "repo")
    for flag, text in (("--private", "make the repository private"), ("--create_pr", "open a pull request instead of committing")):
        p.add_argument(flag, action="store_true", help=text)
    for flag, text in (("--revision", "branch to commit to"), ("--tag", "tag the commit"), ("--collection", "add to a collection of this title")):
        p.add_argument(flag, help=text)
    p = command("verify", verify, "check a repository or folder: card, files, contract, samples in a fresh process", "source", as_json=True)
    p.add_argument("--revision", help="branch, tag or commit")
    p = command("export", export, "convert a student for other programs; the export is reloaded and its error printed", "folder", as_json=True)
    p.add_argument("--to", required=True, choices=("lora", "fused", "comfyui", "single-file", "fp8"))
    p.add_argument("--out", required=True, help="file or folder to write")
    p.add_argument("--rank", type=int, default=64, help="of a LoRA taken from full weights (default 64)")
    p.add_argument("--allow_unverified", action="store_true", help="open a registered student whose sampling was not checked")
    p = command("eval", evaluate, "measure a student on prompts; what is not installed is skipped and said", as_json=True)
    p.add_argument("student", help="a registered name, an exported folder or a Hub id")
    p.add_argument("--prompts", required=True, help="a text file of one prompt a line, partiprompts, or coco")
    p.add_argument("--limit", type=int, default=0, help="use the first N prompts")
    p.add_argument("--seeds", type=int, default=2, help="pictures of each prompt (default 2; diversity needs 2)")
    p.add_argument("--steps", type=int, help="a count of the student's contract")
    p.add_argument("--reference", help="folder, file or Hub id of real pictures, for FID and KID")
    p.add_argument("--out", help="write the report as JSON to this file too")
    opened(p)
    return top


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:            # `zoo methods | head`
        sys.stderr.close()


if __name__ == "__main__":
    main()
