"""The `zoo` command. A mistake of the user is one line and exit code 2."""
from __future__ import annotations

import argparse
import runpy
import sys

from . import __version__, registry
from .errors import UserError


def train(name: str, flags: list[str]) -> None:
    """Run a method's script in this process; `accelerate launch $(zoo where NAME)` runs it on several devices."""
    path = str(registry.method(name).path)
    sys.argv = [path, *flags]
    runpy.run_path(path, run_name="__main__")


def list_methods() -> None:
    rows = [("NAME", "FAMILY", "TRAINS ON", "PAPER")] + [(m.name, m.family, m.needs, m.url) for m in registry.methods()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip())


def sample(folder: str, prompt: str, steps: int | None, seeds: int, out: str) -> None:
    """One picture per seed 0 .. seeds - 1, side by side, in a PNG."""
    import torch
    from PIL import Image

    from . import load
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: give at least 1")
    pipe = load(folder)
    pictures = []
    for seed in range(seeds):
        options = {"generator": torch.Generator("cpu").manual_seed(seed)}
        if steps is not None:
            options["num_inference_steps"] = steps
        pictures.append(pipe(prompt, **options).images[0])
    sheet = Image.new(pictures[0].mode, (sum(p.width for p in pictures), pictures[0].height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i * picture.width, 0))
    sheet.save(out)
    print(out)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="zoo", description="Few-step diffusion students: train, sample, look up.")
    top.add_argument("--version", action="version", version=f"fewstep {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    p = commands.add_parser("train", help="run a method's script: zoo train dmd --teacher fashion", add_help=False)
    p.add_argument("name")
    p.add_argument("flags", nargs=argparse.REMAINDER)
    commands.add_parser("methods", help="list the methods")
    for name, what in (("show", "print a script's docstring: algorithm, departures, launch lines"),
                       ("where", "print a script's path, for `accelerate launch $(zoo where dmd)`"),
                       ("cite", "print BibTeX")):
        commands.add_parser(name, help=what).add_argument("name")
    p = commands.add_parser("sample", help="sample a student: zoo sample outputs/dmd-emoji \"fluent red heart\" --steps 4")
    p.add_argument("folder", help="an exported folder or a Hub id")
    p.add_argument("prompt")
    p.add_argument("--steps", type=int, help="a count of the student's contract (default: the pipeline's)")
    p.add_argument("--seeds", type=int, default=4, help="pictures, of seeds 0, 1, ... (default 4)")
    p.add_argument("--out", default="sample.png")
    return top


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        match args.command:
            case "train":
                train(args.name, args.flags)
            case "methods":
                list_methods()
            case "show":
                print(registry.method(args.name).doc)
            case "where":
                print(registry.method(args.name).path)
            case "cite":
                print(registry.cite(args.name))
            case "sample":
                sample(args.folder, args.prompt, args.steps, args.seeds, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
