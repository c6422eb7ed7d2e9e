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
    from diffusers import ConsistencyModelPipeline, DiffusionPipeline
    from PIL import Image

    from . import load
    from .pipelines.causal_video import CausalVideoPipeline
    from .pipelines.unmask import UnmaskPipeline
    pipe = load(folder)
    if isinstance(pipe, CausalVideoPipeline):
        return sample_video(pipe, prompt, steps, seeds, out)
    if isinstance(pipe, UnmaskPipeline):
        return sample_text(pipe, folder, prompt, steps, seeds)
    if not isinstance(pipe, DiffusionPipeline):
        raise UserError(f"{folder} is a student of the toy teacher: its samples are points, not pictures")
    known = pipe._contract.steps
    if steps is not None and steps not in known:
        raise UserError(f"--steps {steps} is not in the contract of {folder}: it was trained for {', '.join(map(str, known))}")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: give at least 1")
    what = {"class_labels": [class_number(prompt)]} if isinstance(pipe, ConsistencyModelPipeline) else {"prompt": prompt}
    pictures = [pipe(**what, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)).images[0] for seed in range(seeds)]
    sheet = Image.new(pictures[0].mode, (sum(p.width for p in pictures), pictures[0].height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i * picture.width, 0))
    try:
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --out {out} ({error}): give a writable path such as sample.png") from error
    print(out)


def sample_text(pipe, folder: str, prompt: str, steps: int | None, seeds: int) -> None:
    """One text per seed, printed; `prompt` is how each begins."""
    import torch
    if steps is not None and steps not in pipe.contract.steps:
        raise UserError(f"--steps {steps} is not in the contract of {folder}: it was trained for {', '.join(map(str, pipe.contract.steps))}")
    for seed in range(seeds):
        print(pipe(prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)).texts[0])


def sample_video(pipe, prompt: str, steps: int | None, seeds: int, out: str) -> None:
    """One video per seed, side by side, as an animation (.gif, .webp, or an animated .png)."""
    import torch
    from PIL import Image
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: give at least 1")
    videos = [pipe(prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)).frames[0] for seed in range(seeds)]
    width, height = videos[0][0].size
    sheets = [Image.new("RGB", (seeds * width, height)) for _ in videos[0]]
    for i, video in enumerate(videos):
        for sheet, frame in zip(sheets, video):
            sheet.paste(frame, (i * width, 0))
    try:
        sheets[0].save(out, save_all=True, append_images=sheets[1:], duration=125, loop=0)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write --out {out} ({error}): give a writable path such as sample.gif") from error
    print(out)


def class_number(prompt: str) -> int:
    """A class by number, or by its Fashion-MNIST name."""
    from .data.fashion_mnist import CLASSES
    if prompt.isdigit():
        return int(prompt)
    if prompt in CLASSES:
        return CLASSES.index(prompt)
    raise UserError(f"this student draws classes, not prompts, and {prompt!r} is none: give a number, or {', '.join(CLASSES)}")


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
    p = commands.add_parser("sample", help="sample a student: zoo sample outputs/dmd-emoji/student \"fluent red heart\" --steps 4")
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
