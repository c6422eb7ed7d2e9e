"""What people do with a student besides the plain call, measured on the exported folder with stock pipelines: image to image, and a LoRA,
a ControlNet and an IP-Adapter made for its teacher.

    python -m zoo.hub.downstream outputs/dmd-emoji/student                       # image to image
    python -m zoo.hub.downstream outputs/dmd-emoji/student --lora style.safetensors --controlnet FOLDER --ip_adapter FOLDER

Every row compares one call of three: the student, the teacher with as few steps, the teacher with many; on the same noise. The rows are
kept in the folder's record and shown on its card."""
from __future__ import annotations

import argparse
import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from ..calls import device_here
from ..errors import UserError
from .card import refresh
from .record import RECORD, read_record

STRENGTHS = (0.5, 0.75)
SCALES = (0.5, 1.0)
MANY = 25                                    # teacher steps of the reference
SEEDS = 4
IP_WEIGHTS = "ip_adapter.safetensors"        # in the folder of an IP-Adapter, beside image_encoder/
REFUSED = "refused"


@dataclass(frozen=True)
class Adapters:
    """What was made for the teacher. lora: a safetensors file in the stock layout, or "" (so are all); controlnet: folder of a ControlNetModel
    whose control is the silhouette of a picture on white; ip_adapter: folder of IP_WEIGHTS and image_encoder/ (CLIPVisionModelWithProjection);
    style: distance of pictures [..., H, W, 3] from the LoRA's style, 0 for a picture that is in it."""
    lora: str | Path = ""
    controlnet: str | Path = ""
    ip_adapter: str | Path = ""
    style: Callable | None = None

    def check(self) -> None:
        wanted = {"lora": ("", "a safetensors file"), "controlnet": ("config.json", "a ControlNetModel folder"),
                  "ip_adapter": (IP_WEIGHTS, f"a folder of {IP_WEIGHTS} and image_encoder/")}
        for flag, (file, what) in wanted.items():
            path = getattr(self, flag)
            if path and not (Path(path) / file).is_file():
                raise UserError(f"--{flag} {path} is not there: give {what} made for the teacher")


class Bench:
    """A student and its teacher as stock pipelines, and the calls that are compared.

    prompts: P of them; guidance: of the teacher. Pictures are arrays [P, seeds, H, W, 3] in [0, 1]."""

    def __init__(self, folder: str | Path, teacher: str | Path, prompts: list[str], guidance: float, device: str = "cpu", seeds: int = SEEDS):
        from diffusers import DDIMScheduler, DiffusionPipeline
        self.contract, record = read_record(folder)
        if record["family"] != "sd":
            raise UserError(f"{folder} is a student of the {record['family']} family: these uses are measured on Stable Diffusion pipelines")
        self.prompts, self.guidance, self.device, self.seeds = prompts, guidance, device, seeds
        self.student, self.teacher = (self._quiet(DiffusionPipeline.from_pretrained(f, use_safetensors=True)) for f in (folder, teacher))
        self.teacher.scheduler = DDIMScheduler.from_config(self.teacher.scheduler.config, timestep_spacing="trailing")

    def _quiet(self, pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device)

    @property
    def next_prompts(self) -> list[str]:
        return self.prompts[1:] + self.prompts[:1]

    def call(self, pipe, steps: int) -> dict:
        """Arguments of a plain call of one of the two."""
        if pipe is self.teacher:
            return {"num_inference_steps": steps, "guidance_scale": self.guidance}
        return self.contract.stock_call(steps) | ({"guidance_scale": self.contract.guidance} if self.contract.guidance_range else {})

    def draw(self, pipe, steps: int, prompts=None, given: Callable | None = None, through=None, **call):
        """Pictures of `prompts` (default: this bench's): the same noise at every call. through: another pipeline class around the same networks;
        given(i): further arguments of prompt i."""
        import numpy as np
        import torch
        out = []
        for i, prompt in enumerate(prompts or self.prompts):
            generators = [torch.Generator().manual_seed(1000 * i + s) for s in range(self.seeds)]
            more = given(i) if given else {}
            out.append((through or pipe)([prompt] * self.seeds, generator=generators, output_type="np", **self.call(pipe, steps) | more | call).images)
        return np.stack(out)

    def around(self, pipe, kind, **parts):
        """The networks of `pipe` in another stock pipeline."""
        return self._quiet(kind(**pipe.components, **parts, requires_safety_checker=False))

    def rows(self, use: str, measure: str, score: Callable, without: Callable | None = None) -> list[dict]:
        """One row for each step count. score, without: functions of (pipeline, steps) giving a number, None where there is nothing to say,
        or REFUSED."""
        many = score(self.teacher, MANY)
        return [{"use": use, "measure": measure, "steps": k, "student": score(self.student, k), "teacher, as few steps": score(self.teacher, k),
                 f"teacher, {MANY} steps": many, "student without it": without(self.student, k) if without else None} for k in self.contract.steps]

    # ------------------------------------------------------------------------ the uses: functions of (pipeline, steps) that give pictures
    def turned(self, images, strength: float) -> Callable:
        """Image to image: every picture of `images` [P, S, H, W, 3] is asked to become the next prompt's. None where the stock call refuses."""
        import torch
        from diffusers import StableDiffusionImg2ImgPipeline
        through = {id(p): self.around(p, StableDiffusionImg2ImgPipeline) for p in (self.student, self.teacher)}
        begin = lambda i: {"image": torch.from_numpy(images[i]).permute(0, 3, 1, 2)}

        def draw(pipe, k):
            try:
                return self.draw(pipe, k, self.next_prompts, begin, through[id(pipe)], strength=strength)
            except (ValueError, RuntimeError):
                if int(k * strength) >= 1:               # else so few steps leave none of this strength
                    raise
                return None
        return draw

    @contextmanager
    def styled(self, path: str | Path):
        """Inside, both pipelines carry the LoRA: gives a function of its scale."""
        path, both = Path(path), (self.student, self.teacher)

        def at(scale: float) -> Callable:
            def draw(pipe, k):
                pipe.set_adapters(["downstream"], [scale])
                return self.draw(pipe, k)
            return draw
        try:
            for pipe in both:
                pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="downstream", use_safetensors=True)
            yield at
        finally:
            for pipe in both:
                pipe.unload_lora_weights()

    def controlled(self, folder: str | Path, images, scale: float = 1.0, words: bool = True) -> Callable:
        """A ControlNet given the silhouettes of `images` [P, H, W, 3], each with the next prompt or (not words) with none."""
        import torch
        from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
        net = ControlNetModel.from_pretrained(folder, use_safetensors=True).to(self.device)
        through = {id(p): self.around(p, StableDiffusionControlNetPipeline, controlnet=net) for p in (self.student, self.teacher)}
        shapes = torch.from_numpy(silhouette(images)).float()
        control = lambda i: {"image": shapes[i].expand(self.seeds, 3, -1, -1)}
        prompts = self.next_prompts if words else [""] * len(images)
        return lambda pipe, k: self.draw(pipe, k, prompts, control, through[id(pipe)], controlnet_conditioning_scale=scale)

    @contextmanager
    def shown(self, folder: str | Path, images):
        """Inside, both pipelines carry the IP-Adapter, are shown `images` [P, H, W, 3] and told nothing: gives a function of its scale."""
        from PIL import Image
        both = (self.student, self.teacher)
        given = [Image.fromarray((image * 255).round().astype("uint8")) for image in images]

        def at(scale: float) -> Callable:
            def draw(pipe, k):
                pipe.set_ip_adapter_scale(scale)
                return self.draw(pipe, k, [""] * len(given), lambda i: {"ip_adapter_image": [[given[i]] * self.seeds]})
            return draw
        try:
            for pipe in both:
                pipe.load_ip_adapter(str(folder), subfolder="", weight_name=IP_WEIGHTS)
            yield at
        finally:
            for pipe in both:
                pipe.unload_ip_adapter()

    # ------------------------------------------------------------------------------------------------ their rows
    def image_to_image(self, images) -> list[dict]:
        out = []
        for strength in STRENGTHS:
            draw = self.turned(images, strength)
            goal = draw(self.teacher, MANY)

            def score(pipe, k):
                if pipe is self.teacher and k == MANY:
                    return 0.0
                got = draw(pipe, k)
                return REFUSED if got is None else _distance(got, goal)
            out += self.rows(f"image to image, strength {strength:g}", "distance", score)
        return out

    def lora(self, path: str | Path, style: Callable | None = None) -> list[dict]:
        """Whether a LoRA changes the student's pictures as it changes the teacher's (`follows`) and brings them into its style (`in style`)."""
        path, calls = Path(path), [(self.teacher, MANY), *((p, k) for p in (self.teacher, self.student) for k in self.contract.steps)]
        name, out = path.parent.name if path.stem == "pytorch_lora_weights" else path.stem, []
        before = {(id(p), k): self.draw(p, k) for p, k in calls}
        with self.styled(path) as at:
            for scale in SCALES:
                draw, use = at(scale), f"LoRA {name}, scale {scale:g}"
                after = {(id(p), k): draw(p, k) for p, k in calls}
                moved = {key: after[key] - before[key] for key in after}
                out += self.rows(use, "follows", lambda p, k: follows(moved[id(p), k], moved[id(self.teacher), MANY]))
                if style:
                    out += self.rows(use, "in style", lambda p, k: 1 - style(after[id(p), k]) / max(style(before[id(p), k]), 1e-9))
        return out

    def controlnet(self, folder: str | Path, images) -> list[dict]:
        """Overlap of the result's silhouette with its control, without words and against the words of another prompt."""
        wanted, out = silhouette(images)[:, None], []
        score = lambda scale, words: lambda pipe, k: overlap(silhouette(self.controlled(folder, images, scale, words)(pipe, k)), wanted)
        for use, words in (("ControlNet of silhouettes, no words", False), ("ControlNet of silhouettes, another prompt's words", True)):
            out += self.rows(use, "overlap", score(1.0, words), score(0.0, words))
        return out

    def ip_adapter(self, folder: str | Path, images) -> list[dict]:
        """How often the result is nearest to its own picture among those shown."""
        with self.shown(folder, images) as at:
            score = lambda scale: lambda pipe, k: finds(at(scale)(pipe, k), images)
            return self.rows("IP-Adapter, no words", "found", score(1.0), score(0.0))


def measure(folder: str | Path, teacher: str | Path, prompts: list[str], guidance: float, adapters: Adapters = Adapters(), images=None,
            device: str = "cpu", seeds: int = SEEDS) -> list[dict]:
    """Rows (use, measure, steps, student, teacher as few steps, teacher many steps, student without it) of every use at each step count of
    the student; what the measures mean stands on the card.

    teacher: its stock folder or Hub id; images: pictures [P, H, W, 3] in [0, 1] for ControlNet and IP-Adapter (default: one of the teacher's
    own for each prompt). Raises UserError for a student that is no Stable Diffusion pipeline and for adapters that are not there."""
    adapters.check()
    bench = Bench(folder, teacher, prompts, guidance, device, seeds)
    start = bench.draw(bench.teacher, MANY)
    images = start[:, 0] if images is None else images
    rows = bench.image_to_image(start)
    if adapters.lora:
        rows += bench.lora(adapters.lora, adapters.style)
    if adapters.controlnet:
        rows += bench.controlnet(adapters.controlnet, images)
    if adapters.ip_adapter:
        rows += bench.ip_adapter(adapters.ip_adapter, images)
    return rows


# ------------------------------------------------------------------------------------------------------- the numbers
def _distance(a, b) -> float:
    return float(abs(a - b).mean())


def follows(moved, goal) -> float:
    """Cosine between two changes of pictures; 0 where nothing changed."""
    length = float((moved**2).sum() * (goal**2).sum()) ** 0.5
    return float((moved * goal).sum()) / length if length > 1e-9 else 0.0


def silhouette(images):
    """What is not the white ground: pictures [..., H, W, 3] in [0, 1] -> bool [..., H, W]."""
    return (1 - images).max(-1) > 0.12


def overlap(a, b) -> float:
    """Mean intersection over union of masks [..., H, W] (they broadcast); two empty ones overlap wholly."""
    both, either = (a & b).sum((-1, -2)), (a | b).sum((-1, -2))
    return float(((both + (either == 0)) / (either + (either == 0))).mean())


def finds(pictures, references) -> float:
    """Share of pictures [P, S, H, W, 3] whose nearest of references [P, H, W, 3] is their own, by colours and steps on coarse grids
    (`metrics.pixels`, of which the references' mean is taken off): 1/P by chance."""
    import torch

    from ..metrics import pixels
    p, s = pictures.shape[:2]
    look = lambda x: pixels(torch.from_numpy(x).float().permute(0, 3, 1, 2) * 2 - 1)
    known = look(references)
    centre = known.mean(0)
    unit = lambda x: torch.nn.functional.normalize(x - centre, dim=1)
    nearest = (unit(look(pictures.reshape(-1, *pictures.shape[2:]))) @ unit(known).T).argmax(1)
    return float((nearest == torch.arange(p).repeat_interleave(s)).float().mean())


def record(folder: str | Path, rows: list[dict], prompts: int, seeds: int) -> str:
    """Keep `rows`, measured on this many prompts with so many pictures of each, in the folder's record and write its card again; returns the
    card's path."""
    refresh(folder)                            # a record without facts gets them before a row is added
    path = Path(folder) / RECORD
    data = json.loads(path.read_text(encoding="utf-8"))
    data["card"] |= {"downstream": rows, "downstream_on": [prompts, seeds]}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return refresh(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m zoo.hub.downstream", description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--teacher", default="", help="its folder or Hub id (default: what the record names)")
    parser.add_argument("--guidance", type=float, default=0.0, help="teacher guidance scale (default: the teacher's own)")
    parser.add_argument("--prompts", nargs="*", default=[])
    parser.add_argument("--lora", default="", help="LoRA file made for the teacher")
    parser.add_argument("--controlnet", default="", help="folder of a ControlNetModel made for the teacher, its control a silhouette on white")
    parser.add_argument("--ip_adapter", default="", help=f"folder of an IP-Adapter made for the teacher: {IP_WEIGHTS} and image_encoder/")
    parser.add_argument("--device", default="", help="where to sample (default: a GPU if there is one)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"pictures of each prompt (default {SEEDS})")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: give at least 1")
    device = device_here(args.device)
    from ..backbones import ASSETS, BUILT_IN
    named = args.teacher or read_record(args.folder)[1]["teacher"]
    known = BUILT_IN.get(named, {})
    refresh(args.folder)
    facts = json.loads((Path(args.folder) / RECORD).read_text(encoding="utf-8"))["card"]
    prompts = args.prompts or (facts.get("prompts") or ["fluent red heart"])[:4]
    rows = measure(args.folder, str(ASSETS / known["folder"]) if known else named, prompts, args.guidance or known.get("guidance", 7.5),
                   Adapters(args.lora, args.controlnet, args.ip_adapter), device=device, seeds=args.seeds)
    print(record(args.folder, rows, len(prompts), args.seeds))
    for row in rows:
        print("  " + "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if v is not None))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
