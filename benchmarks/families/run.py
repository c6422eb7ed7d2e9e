"""Every family of backbones with every script: the whole life on tiny teachers, one line per case in log.jsonl, and the README's table from it.

    python benchmarks/families/run.py                            # what is missing in the log; stop it at any time, the same command goes on
    python benchmarks/families/run.py --families sdxl dit --scripts dmd lcm --limit 150
    python benchmarks/families/run.py --again                    # run once more what failed or was not supported
    python benchmarks/families/run.py --check                    # exit 1 when a case is missing or failed
    python benchmarks/families/run.py --readme README.md         # rewrite the table between its markers

A case is a teacher, a script and a form (LoRA or full weights). It trains two steps, resumes for a third, exports, opens the folder with
stock diffusers, samples finite pictures with every step count of the contract and, for a LoRA, loads the adapter on the stock teacher
where the stock pipeline can. Outcomes: ok; unsupported (the script said so, in one line, before training); failed (anything else: a bug).

Teachers are the BUILDERS of tests/backbones/tiny_*.py, saved by build(NAME, folder) there; CALLS[NAME] holds what a stock call needs besides a prompt."""
from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import json
import os
import re
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

for variable, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                        "ZOO_KEEP_THREADS": "1"}.items():
    os.environ.setdefault(variable, value)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LOG = HERE / "log.jsonl"
sys.path[:0] = [str(p) for p in (ROOT, ROOT / "train_scripts", ROOT / "tests", ROOT / "tests/backbones")]
FORMS = {"lora": 4, "full": 0}
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"


def teachers() -> dict[str, tuple]:
    """name -> (builder, arguments of a stock call)."""
    found = {}
    for path in sorted((ROOT / "tests/backbones").glob("tiny_*.py")):
        module = importlib.import_module(path.stem)
        found |= {name: (partial(module.build, name), getattr(module, "CALLS", {}).get(name, {})) for name in module.BUILDERS}
    return found


def methods() -> list:
    from zoo import registry
    return [m for m in registry.methods() if m.modality in ("image", "video")]


VIDEO = ("wan", "cogvideox", "ltx")


class World:
    """Folders of the teachers, prompts and pictures, made when asked for."""

    def __init__(self, root: Path):
        self.root, self.known = root, teachers()

    def teacher(self, name: str) -> str:
        folder = self.root / "teachers" / name
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            self.known[name][0](folder)
        return str(folder)

    def clips(self) -> str:
        """Animated pictures with captions, long enough for every tiny video teacher."""
        folder = self.root / "clips"
        if not folder.exists():
            import numpy as np
            from PIL import Image
            folder.mkdir()
            g, rows = np.random.default_rng(0), []
            for i in range(6):
                frames = [Image.fromarray(g.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(17)]
                frames[0].save(folder / f"{i}.gif", save_all=True, append_images=frames[1:], duration=100)
                rows.append({"file_name": f"{i}.gif", "caption": f"a red tree {i}"})
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(folder)

    def data(self, images: bool) -> str:
        if not images:
            path = self.root / "prompts.txt"
            path.write_text("a red heart\nblue cat\na star\na blue tree\n")
            return str(path)
        folder = self.root / "images"
        if not folder.exists():
            import numpy as np
            from PIL import Image
            folder.mkdir()
            g, rows = np.random.default_rng(0), []
            for i in range(12):
                Image.fromarray(g.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
                rows.append({"file_name": f"{i:03d}.png", "caption": f"a red tree {i}", "label": i % 5})
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(folder)


def life(world: World, name: str, method, form: str, out: Path) -> dict:
    """One case; returns facts for its row. Raises what the script raises."""
    import torch
    from diffusers import DiffusionPipeline
    from tiny import TINY
    from zoo import backbones, watch
    watch.TEACHER_STEPS, backbones.Backbone.watched = 2, (4, 2)         # its references are not what is tried here
    script = importlib.import_module(Path(method.script).stem)
    images = method.needs.startswith("images")
    prompted = "prompt" in _call(world, name, _stock_class(world, name))
    cfg = script.Config(teacher=world.teacher(name), data=(world.clips() if images and name in VIDEO else world.data(images)) if images or prompted else "", batch=2, steps=2, lora=FORMS[form],
                        output_dir=str(out), sample_every=0, measure_every=2, checkpoint_every=1, mixed_precision="no",
                        guidance=0.0 if name == "ddpm" else 2.0,               # unconditional: there is none
                        **{"time_budget": 0, **TINY.get(method.name, {})})
    run = script.main(cfg)
    resumed = script.main(dataclasses.replace(cfg, steps=3))
    assert (run.step, resumed.step) == (2, 3), "the run was not resumed"
    contract, student = resumed.watcher.contract, out / "student"
    facts = {"family": resumed.model.family, "slot": bool(getattr(resumed.watcher.net, "slot", None) or getattr(resumed.watcher, "two_time", False)),
             "video": len(resumed.model.shape) > 3, "steps": contract.steps, "loads": "stock diffusers"}
    if contract.sampler == "causal":                     # no stock class has its cache
        import zoo
        pipe, facts["loads"] = zoo.load(student), "zoo.load"
        sampled = [pipe("a red heart", output_type="pt").frames]
        assert all(torch.isfinite(torch.as_tensor(s)).all() for s in sampled), "pictures are not finite"
        return facts
    pipe = DiffusionPipeline.from_pretrained(student)
    pipe.set_progress_bar_config(disable=True)
    call = {**_call(world, name, type(pipe)), **getattr(resumed.model, "stock_call", {})}
    for k in contract.steps:
        made = pipe(**call | contract.stock_call(k), generator=torch.Generator().manual_seed(0))
        assert all(torch.isfinite(torch.as_tensor(x)).all() for x in (made.frames if hasattr(made, "frames") else made.images)), "pictures are not finite"
    weights = student / "pytorch_lora_weights.safetensors"
    if form == "lora" and weights.exists() and hasattr(type(pipe), "load_lora_weights"):
        teacher = DiffusionPipeline.from_pretrained(world.teacher(name))
        teacher.load_lora_weights(student, weight_name=weights.name)
        facts["lora_file"] = "load_lora_weights"
    return facts


def _stock_class(world: World, name: str) -> type:
    import diffusers
    return getattr(diffusers, json.loads((Path(world.teacher(name)) / "model_index.json").read_text())["_class_name"])


def _call(world: World, name: str, cls: type) -> dict:
    """Arguments of a stock call of pipelines of class `cls`: a prompt where it takes one, arrays out, and what the teacher needs."""
    import inspect
    accepts = inspect.signature(cls.__call__).parameters
    what = {"prompt": "a red heart"} if "prompt" in accepts else {}
    return {**what, "output_type": "np", **{k: v for k, v in world.known[name][1].items() if k in accepts}}


def outcome(error: Exception) -> str:
    from zoo.errors import UserError
    return "unsupported" if isinstance(error, UserError) else "failed"


def read() -> dict[tuple, dict]:
    rows = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    return {(r["teacher"], r["script"], r["form"]): r for r in rows}


def write(rows: dict[tuple, dict]):
    temp = LOG.with_suffix(".tmp")
    temp.write_text("".join(json.dumps(r) + "\n" for _, r in sorted(rows.items())))
    os.replace(temp, LOG)


def cases(families, scripts) -> list[tuple]:
    """(teacher, method, form) in the order in which they run: every teacher with two scripts first, then script by script."""
    first = ("dmd", "meanflow")
    every = [(t, m, f) for t in teachers() if not families or t in families for m in methods() if not scripts or m.name in scripts for f in FORMS]
    return sorted(every, key=lambda c: (c[1].name not in first, c[1].name))


def run(args) -> int:
    import diffusers
    import torch
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    began, done = time.perf_counter(), read()
    todo = [c for c in cases(args.families, args.scripts) if (key := (c[0], c[1].name, c[2])) not in done or args.again and done[key]["outcome"] != "ok"]
    with tempfile.TemporaryDirectory() as temp:
        world = World(Path(temp))
        for i, (name, method, form) in enumerate(todo):
            if args.limit and time.perf_counter() - began > args.limit:
                print(f"stopped after {args.limit} s with {len(todo) - i} cases left; the same command goes on", file=sys.stderr)
                break
            start, row = time.perf_counter(), {"teacher": name, "script": method.name, "form": form}
            try:
                with warnings.catch_warnings(), redirect_stdout(said := io.StringIO()), redirect_stderr(said):
                    warnings.simplefilter("ignore")
                    facts = {"outcome": "ok", **life(world, name, method, form, Path(temp) / f"run-{i}")}
            except Exception as error:
                facts = {"outcome": outcome(error), "why": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300].replace(temp, "...")}
                if args.raise_ and facts["outcome"] == "failed":
                    raise
            row |= facts | {"seconds": round(time.perf_counter() - start, 1), "torch": torch.__version__.split("+")[0], "diffusers": diffusers.__version__}
            done = read() | {(name, method.name, form): row}
            write(done)
            print(f"{i + 1}/{len(todo)} {name} {method.name} {form}: {row['outcome']} {row.get('why', '')} ({row['seconds']} s)", file=sys.stderr)
    return check(args) if args.check else 0


def check(args) -> int:
    done = read()
    bad = [(t, m.name, f) for t, m, f in cases(args.families, args.scripts) if done.get((t, m.name, f), {}).get("outcome", "failed") == "failed"]
    print(f"{len(bad)} cases missing or failed" + "".join(f"\n  {' '.join(b)}" for b in bad))
    return int(bool(bad))


# ------------------------------------------------------------------------------------------------------------- the table
def markdown(rows: list[dict]) -> str:
    """family x {LoRA, full, two-time, data-free, video}: scripts that work, of those tried; what is not supported below it."""
    needs_images = {m.name for m in methods() if m.needs.startswith("images")}

    def cell(chosen):
        tried = list(chosen)
        works = sum(r["outcome"] == "ok" for r in tried)
        return "–" if not tried else "no" if not works else f"{works} of {len(tried)}" if works < len(tried) else f"all {works}"
    lines = ["| family | LoRA | full weights | two times | data-free | video |", "|---|---|---|---|---|---|"]
    two = {r["script"] for r in rows if r.get("slot")}
    for name in sorted({r["teacher"] for r in rows}):
        mine = [r for r in rows if r["teacher"] == name]
        forms = [cell(r for r in mine if r["form"] == f) for f in FORMS]
        lines.append(f"| {name} | {forms[0]} | {forms[1]} | {cell(r for r in mine if r['script'] in two)} "
                     f"| {cell(r for r in mine if r['script'] not in needs_images)} | {'yes' if any(r.get('video') for r in mine) else '–'} |")
    scripts = sorted({r["script"] for r in rows})
    why: dict[tuple, dict[str, list]] = {}
    for r in rows:
        if r["outcome"] != "ok":
            text = re.sub(r"(--teacher )?\.\.\./teachers/\w+", "the teacher", r["why"].replace("UserError: ", ""))      # one line for all that say the same
            text = re.sub(r"the \w+ family", "its family", text)
            why.setdefault((r["outcome"], text), {}).setdefault(r["teacher"], {}).setdefault(r["script"], []).append(r["form"])
    notes = [f"- {note(kind, where)}: {text}" for (kind, text), where in sorted(why.items())] + adapters(rows)
    versions = sorted({f"torch {r['torch']}, diffusers {r['diffusers']}" for r in rows})
    tried, every = len(rows), len(cases([], []))
    head = ("Cells count cases (a script with LoRA or with full weights) that lived their whole life on a tiny randomly initialised teacher: "
            f"{f'all {tried}' if tried >= every else f'{tried} of {every}'} cases, {len(scripts)} scripts ({'; '.join(versions)}).")
    return "\n".join([head, "", *lines, *([""] + notes if notes else [])])


def adapters(rows: list[dict]) -> list[str]:
    """Which LoRA students leave no file that a stock `load_lora_weights` reads, and what reads them instead."""
    works = [r for r in rows if r["form"] == "lora" and r["outcome"] == "ok"]
    loads = [r for r in works if r.get("lora_file")]
    teachers, scripts = ({r[k] for r in loads} for k in ("teacher", "script"))
    second = sorted({r["script"] for r in works if r.get("slot") and r["teacher"] in teachers} - scripts)
    bare = sorted({r["teacher"] for r in works} - teachers)
    lines = []
    if second:
        lines.append(f"- LoRA students of {', '.join(second)}: stock diffusers opens the folder (fused, second time 0), but not the adapter, which has a layer "
                     "for the second time and lies in `two_time/`: `zoo.load(folder, two_time=True)` gives the network with both times, `--init_student` "
                     "goes on from it")
    if bare and loads:
        lines.append(f"- no `load_lora_weights` in the stock pipeline of {', '.join(bare)}: LoRA students are the fused folder, the adapter is in peft's names")
    return lines


def note(kind: str, where: dict[str, dict[str, list]]) -> str:
    """where: {teacher: {script: forms}}; teachers of which the same is said stand together, a form is named where it is not both."""
    alike: dict[str, list] = {}
    for teacher, scripts in sorted(where.items()):
        alike.setdefault(", ".join(s if len(forms) == len(FORMS) else f"{s} ({forms[0]})" for s, forms in sorted(scripts.items())), []).append(teacher)
    said = {"unsupported": "not supported", "failed": "fails"}
    return f"{said[kind]}, " + "; ".join(f"{scripts} ({', '.join(teachers)})" for scripts, teachers in alike.items())


def refresh(text: str, rows: list[dict]) -> str:
    """`text` with what stands between its markers rewritten."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"the file has no {BEGIN} and {END}: put both where the table belongs")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{markdown(rows)}\n{END}{rest.split(END)[1]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=[], help="names of tiny teachers")
    parser.add_argument("--scripts", nargs="*", default=[], help="names of methods")
    parser.add_argument("--limit", type=float, default=0, help="start no case after this many seconds")
    parser.add_argument("--again", action="store_true", help="repeat what failed or was not supported")
    parser.add_argument("--check", action="store_true", help="run nothing; exit 1 when a case is missing or failed")
    parser.add_argument("--raise", dest="raise_", action="store_true", help="stop with the traceback of the first failure")
    parser.add_argument("--readme", default="", help="file whose table to rewrite")
    args = parser.parse_args()
    for given, known in ((args.families, teachers()), (args.scripts, [m.name for m in methods()])):
        if unknown := set(given) - set(known):
            raise SystemExit(f"unknown {', '.join(sorted(unknown))}: there are {', '.join(sorted(known))}")
    if args.readme:
        path = Path(args.readme)
        path.write_text(refresh(path.read_text(encoding="utf-8"), list(read().values())), encoding="utf-8")
    elif args.check:
        raise SystemExit(check(args))
    else:
        raise SystemExit(run(args))


if __name__ == "__main__":
    main()
