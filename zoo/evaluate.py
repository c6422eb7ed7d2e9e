"""`zoo eval`: a student on a list of prompts, measured with what is installed; what is not is skipped, and the report says so.

    kid_<space>      kernel distance to reference pictures, in the features of zoo.metrics (no network needed)
    fid              by torch-fidelity, to reference pictures
    clip_score       by torchmetrics; hpsv2 by hpsv2; image_reward by ImageReward: agreement with the prompt and preference
    diversity_<space>  how different the pictures of one prompt are (zoo.metrics.diversity)
    ms_*             milliseconds per picture in the text encoders, the denoiser, the decoder of the VAE (those it has), and the rest"""
from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from . import calls, data, metrics, registry
from .errors import UserError

# Prompt sets of the Hub: repository, split, column (of a list, its first entry).
SETS = {"partiprompts": ("nateraw/parti-prompts", "train", "Prompt"), "coco": ("phiyodr/coco2017", "validation", "captions")}
SKIPPED = "-"


def evaluate(student: str | Path, prompts: str | Path | Sequence[str] | None = None, *, limit: int | None = None, seeds: int = 2,
             steps: int | None = None, reference: str | None = None,
             progress: Callable = lambda items, what: items, repeats: int = 3, **options) -> dict:
    """Sample `student` on `prompts` (a list, a file, partiprompts or coco) and measure the pictures.

    prompts: of class-conditional students classes, by default all; of unconditional ones none. limit: only the first prompts; seeds:
    pictures of each; steps: a count of its contract; reference: folder, file or Hub id of real pictures; options: of `zoo.load`.
    Returns what was done and `rows` of metric, value and note.
    Raises UserError for a student that draws no pictures, for counts outside the contract, and for prompts that cannot be read."""
    from .loading import load
    for name, count in (("seeds", seeds), ("limit", limit)):
        if count is not None and count < 1:
            raise UserError(f"--{name} {count}: give at least 1")
    refuse_video(student)
    texts = None if prompts is None else read_prompts(prompts)
    with calls.without_remarks():
        pipe = calls.open_stock(load(student, **options), str(student), "eval")
    if calls.is_video(pipe):
        raise UserError(f"eval measures pictures and {student} makes videos: watch some with `zoo sample {student} PROMPT`")
    steps = calls.steps_in(pipe._terms, steps, str(student))
    if limit and calls.takes(pipe) == "nothing":
        raise UserError(f"--limit {limit} is of prompts and {student} draws without: --seeds N is how many pictures")
    texts = (asked(pipe) if texts is None else texts)[:limit]
    wanted = [(calls.condition(pipe, text), seed) for text in texts for seed in range(seeds)]        # a wrong class among them stops here
    pipe.set_progress_bar_config(disable=True)
    first, *others = wanted
    pictures = [draw(pipe, *first, steps)]
    real = None if reference is None else references(reference, pictures[0].size)
    pictures += [draw(pipe, call, seed, steps) for call, seed in progress(others, "sampling")]
    images = to_tensor(pictures)
    named = [t for t in texts for _ in range(seeds)]
    rows = [*against(images, real), *with_prompts(pipe, images, pictures, named, progress), spread(images, len(texts), seeds),
            *latency(pipe, first[0], steps, repeats)]
    return {"student": str(student), "prompts": str(prompts) if isinstance(prompts, (str, Path)) else f"{len(texts)} given", "pictures": len(images),
            "seeds": seeds, "steps": steps, "size": list(images.shape[-2:]), "device": str(pipe.device), "rows": rows}


def refuse_video(student: str | Path) -> None:
    """Say so before a registered student of many gigabytes is fetched for nothing."""
    if any(s.name == str(student) and s.modality == "video" for s in registry.STUDENTS):
        raise UserError(f"eval measures pictures and {student} makes videos: watch some with `zoo sample {student} PROMPT`")


def asked(pipe) -> list[str]:
    """What is drawn where nothing was asked for: every class once, or just pictures. Raises UserError where prompts are needed."""
    kind = calls.takes(pipe)
    if kind == "prompt":
        raise UserError(f"this student draws what prompts say: give --prompts FILE (one a line), or --prompts {' or '.join(SETS)}")
    return [str(i) for i in range(calls.classes(pipe))] if kind == "class" else [""]


def references(reference: str, size: tuple[int, int]) -> Tensor:
    """Reference pictures [N, 3, S, S] of the student's size. Raises UserError when they cannot be read."""
    if size[0] != size[1]:
        raise UserError(f"--reference: pictures of {size[0]} x {size[1]} are not square, and references are read as squares: leave it out")
    return data.images(reference, size[0], 3)


# ------------------------------------------------------------------------------------------------------------- prompts
def read_prompts(spec: str | Path | Sequence[str]) -> list[str]:
    """Prompts of a list, a file with one a line, or a set by name. Raises UserError when there are none."""
    if not isinstance(spec, (str, Path)):
        texts = list(spec)
    elif str(spec) in SETS:
        texts = _set(str(spec))
    elif Path(spec).is_file():
        try:
            texts = [line.strip() for line in Path(spec).read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts {spec} is no text file: give one prompt a line, in UTF-8") from error
    else:
        raise UserError(f"--prompts {spec}: give a text file of one prompt a line, or {' or '.join(SETS)}")
    if not texts:
        raise UserError(f"--prompts {spec} holds no prompt")
    return texts


def _set(name: str) -> list[str]:
    from datasets import load_dataset
    repo, split, column = SETS[name]
    try:
        table = load_dataset(repo, split=split)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"the prompts {name} come from the Hub ({repo}) and could not be fetched ({type(error).__name__}: {reason}): "
                        "go online once, or give a text file of one prompt a line") from error
    return [str(v[0] if isinstance(v, (list, tuple)) else v) for v in table[column]]


# ------------------------------------------------------------------------------------------------------------ pictures
def draw(pipe, call: dict, seed: int, steps: int | None):
    """One PIL picture of what `call` asks for."""
    return calls.frames(calls.draw(pipe, call, steps, seed))[0]


def to_tensor(pictures: list) -> Tensor:
    """PIL pictures as [N, 3, H, W] in [-1, 1]."""
    from diffusers.image_processor import VaeImageProcessor
    arrays = VaeImageProcessor.pil_to_numpy([p.convert("RGB") for p in pictures])
    return VaeImageProcessor.numpy_to_pt(arrays) * 2 - 1


# ------------------------------------------------------------------------------------------------------------- metrics
def row(metric: str, value, note: str = "") -> dict:
    return {"metric": metric, "value": round(value, 4) if isinstance(value, float) else value, "note": note}


def tried(metric: str, package: str | None, run: Callable[[], tuple], install: str = "") -> dict:
    """A row of `run() -> (value, note)`; skipped, with the reason, when its package is not installed, fails, or cannot have its network.

    Whatever a package raises is its own affair (versions that do not fit, weights that are gone); without one, a bug of ours is a bug."""
    if package and importlib.util.find_spec(package) is None:
        return row(metric, SKIPPED, f"skipped: {package} is not installed ({install or 'pip install ' + package})")
    try:
        return row(metric, *run())
    except (UserError, OSError) as error:      # offline, most of all
        return row(metric, SKIPPED, f"skipped: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")
    except Exception as error:
        if package is None:
            raise
        return row(metric, SKIPPED, f"skipped: {package} failed ({type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]})")


def against(images: Tensor, real: Tensor | None) -> list[dict]:
    """Distances to reference pictures."""
    space = metrics.default_feature_space()
    if real is None:
        return [row(m, SKIPPED, "skipped: no --reference pictures") for m in ("fid", f"kid_{space}")]
    features = metrics.feature_space(space)

    def kid():
        value = metrics.kid(features(images), features(real))
        return value.value, f"95 % {value.low:.4g} to {value.high:.4g}; {len(images)} pictures, {len(real)} references"

    def fid():
        from .metrics.network import network_metrics
        return network_metrics(images, reference=real)["fid"], f"biased by the count: {len(images)} pictures, {len(real)} references"
    return [tried("fid", "torch_fidelity", fid, "pip install torch-fidelity"), tried(f"kid_{space}", None, kid)]


def with_prompts(pipe, images: Tensor, pictures: list, texts: list[str], progress: Callable = lambda items, what: items) -> list[dict]:
    """Agreement with the prompts, and what people would prefer."""
    if calls.takes(pipe) != "prompt":
        return [row(m, SKIPPED, "skipped: it does not draw prompts") for m in ("clip_score", "hpsv2", "image_reward")]
    pairs = list(zip(pictures, texts))

    def clip():
        from .metrics.network import CLIP, network_metrics
        return network_metrics(images, prompts=texts)["clip_score"], CLIP

    def hpsv2():
        import hpsv2
        return statistics.fmean(float(hpsv2.score(p, t, hps_version="v2.1")[0]) for p, t in progress(pairs, "hpsv2")), "v2.1"

    def reward():
        import ImageReward
        model = ImageReward.load("ImageReward-v1.0")
        return statistics.fmean(float(model.score(t, p)) for p, t in progress(pairs, "image_reward")), "v1.0"
    return [tried("clip_score", "torchmetrics", clip), tried("hpsv2", "hpsv2", hpsv2), tried("image_reward", "ImageReward", reward,
                                                                                             "pip install image-reward")]


def spread(images: Tensor, prompts: int, seeds: int) -> dict:
    space = metrics.default_feature_space()
    if seeds < 2:
        return row(f"diversity_{space}", SKIPPED, "skipped: needs at least 2 seeds of a prompt")
    features = metrics.feature_space(space)(images)
    return row(f"diversity_{space}", metrics.diversity(features.reshape(prompts, seeds, -1)), f"{seeds} seeds of {prompts} prompts")


# ------------------------------------------------------------------------------------------------------------- latency
def latency(pipe, call: dict, steps: int | None, repeats: int = 3) -> list[dict]:
    """Milliseconds of one picture, by part the pipeline has: median of `repeats` calls after one that is not counted."""
    def once():
        return calls.draw(pipe, call, steps, 0)
    once()
    parts: dict[str, list[float]] = {part: [] for part in dict.fromkeys(part for _, _, part in watch_points(pipe))}
    totals, count = [], 0
    for _ in range(repeats):
        with stopwatch(pipe) as spent:
            start = _now(pipe.device)
            once()
            totals.append(_now(pipe.device) - start)
        count = spent["calls"]
        for name, values in parts.items():
            values.append(spent[name])
    rows = [row(f"ms_{name}", 1e3 * statistics.median(values), f"{count} call{'s' * (count != 1)} of the network" if name == "denoiser" else "")
            for name, values in parts.items()]
    rest = statistics.median(t - sum(values[i] for values in parts.values()) for i, t in enumerate(totals))
    return [*rows, row("ms_rest", 1e3 * rest, "scheduler, tokenizer, conversion"), row("ms_total", 1e3 * statistics.median(totals),
                                                                                       f"one picture on {_device_name(pipe.device)}")]


def watch_points(pipe) -> list[tuple[torch.nn.Module, str, str]]:
    """(module, method, part) of what is timed: text encoders, denoisers, the decoder, in this order."""
    found = []
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            if name.startswith("text_encoder"):
                found.append((0, module, "forward", "text_encoder"))
            elif name in ("unet", "transformer", "transformer_2"):
                found.append((1, module, "forward", "denoiser"))
            elif name == "vae":
                found.append((2, module, "decode", "vae"))
    return [point for _, *point in sorted(found, key=lambda f: f[0])]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


@contextmanager
def stopwatch(pipe):
    """Seconds spent inside the text encoders, the denoiser and the decoder of `pipe` while it runs, and the denoiser's calls."""
    spent = {"text_encoder": 0.0, "denoiser": 0.0, "vae": 0.0, "calls": 0}
    undo = []

    def watch(owner, method: str, part: str):
        original, own = getattr(owner, method), owner.__dict__.get(method)

        def timed(*args, **kwargs):
            start = _now(pipe.device)
            out = original(*args, **kwargs)
            spent[part] += _now(pipe.device) - start
            spent["calls"] += part == "denoiser"
            return out
        setattr(owner, method, timed)
        undo.append((owner, method, own))
    for point in watch_points(pipe):
        watch(*point)
    try:
        yield spent
    finally:
        for owner, method, own in undo:
            if own is None:
                delattr(owner, method)      # the class's shows again
            else:
                setattr(owner, method, own)
