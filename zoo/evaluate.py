"""`zoo eval`: a student on a list of prompts, measured with what is installed; what is not is skipped, and the report says so.

    kid_<space>      kernel distance to reference pictures, in the features of zoo.metrics (no network needed)
    fid              by torch-fidelity, to reference pictures
    clip_score       by torchmetrics; hpsv2 by hpsv2; image_reward by ImageReward: agreement with the prompt and preference
    diversity_<space>  how different the pictures of one prompt are (zoo.metrics.diversity)
    ms_*             milliseconds per picture in the text encoders, the denoiser, the decoder of the VAE, and the rest"""
from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from . import data, metrics
from .errors import UserError

# Prompt sets of the Hub: repository, split, column (of a list, its first entry).
SETS = {"partiprompts": ("nateraw/parti-prompts", "train", "Prompt"), "coco": ("phiyodr/coco2017", "validation", "captions")}
SKIPPED = "-"


def evaluate(student: str | Path, prompts: str | Path | Sequence[str], *, limit: int = 0, seeds: int = 2, steps: int | None = None,
             reference: str | None = None,
             progress: Callable = lambda items, what: items, repeats: int = 3, **options) -> dict:
    """Sample `student` on `prompts` (a list, a file, partiprompts or coco) and measure the pictures.

    limit: only the first prompts; seeds: pictures of each; steps: a count of its contract; reference: folder, file or Hub id of real
    pictures; options: of `zoo.load`. Returns what was done and `rows` of metric, value and note.
    Raises UserError for a student that draws no pictures, for counts outside the contract, and for prompts that cannot be read."""
    from .loading import load
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: give at least 1")
    texts = read_prompts(prompts, limit)
    pipe = load(student, **options)
    terms = getattr(pipe, "_terms", None)
    if terms is None:
        raise UserError(f"{student} is a {type(pipe).__name__}: eval measures students that draw pictures")
    if steps is not None and steps not in terms.steps:
        raise UserError(f"--steps {steps} is not in the contract of {student}: it was trained for {', '.join(map(str, terms.steps))}")
    pipe.set_progress_bar_config(disable=True)
    pictures = [draw(pipe, text, seed, steps) for text, seed in progress([(t, s) for t in texts for s in range(seeds)], "sampling")]
    images = to_tensor(pictures)
    named = [t for t in texts for _ in range(seeds)]
    rows = [*against(images, reference), *with_prompts(pipe, images, pictures, named), spread(images, len(texts), seeds),
            *latency(pipe, texts[0], steps, repeats)]
    return {"student": str(student), "prompts": str(prompts) if isinstance(prompts, (str, Path)) else f"{len(texts)} given", "pictures": len(images),
            "seeds": seeds, "steps": steps or terms.usual, "size": list(images.shape[-2:]), "device": str(pipe.device), "rows": rows}


# ------------------------------------------------------------------------------------------------------------- prompts
def read_prompts(spec: str | Path | Sequence[str], limit: int = 0) -> list[str]:
    """Prompts of a list, a file with one a line, or a set by name. Raises UserError when there are none."""
    if not isinstance(spec, (str, Path)):
        texts = list(spec)
    elif str(spec) in SETS:
        texts = _set(str(spec))
    elif Path(spec).is_file():
        texts = [line.strip() for line in Path(spec).read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        raise UserError(f"--prompts {spec}: give a text file of one prompt a line, or {' or '.join(SETS)}")
    if not texts:
        raise UserError(f"--prompts {spec} holds no prompt")
    return texts[:limit] if limit else texts


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
def draw(pipe, text: str, seed: int, steps: int | None):
    """One PIL picture."""
    out = pipe(**what(pipe, text), num_inference_steps=steps, generator=torch.Generator().manual_seed(seed))
    if not hasattr(out, "images"):
        raise UserError(f"a {type(pipe).__name__} makes no pictures: eval measures images")
    return out.images[0]


def what(pipe, text: str) -> dict:
    """The condition of a call: a prompt, or a class by number or name."""
    from diffusers import ConsistencyModelPipeline
    if isinstance(pipe, ConsistencyModelPipeline):
        from .cli import class_number
        return {"class_labels": [class_number(text)]} if pipe.unet.config.num_class_embeds else {}
    return {"prompt": text}


def to_tensor(pictures: list) -> Tensor:
    """PIL pictures as [N, 3, H, W] in [-1, 1]."""
    from diffusers.image_processor import VaeImageProcessor
    arrays = VaeImageProcessor.pil_to_numpy([p.convert("RGB") for p in pictures])
    return VaeImageProcessor.numpy_to_pt(arrays) * 2 - 1


# ------------------------------------------------------------------------------------------------------------- metrics
def row(metric: str, value, note: str = "") -> dict:
    return {"metric": metric, "value": round(value, 4) if isinstance(value, float) else value, "note": note}


def tried(metric: str, package: str | None, run: Callable[[], tuple], install: str = "") -> dict:
    """A row of `run() -> (value, note)`; skipped, with the reason, when its package is not installed or its network cannot be had."""
    if package and importlib.util.find_spec(package) is None:
        return row(metric, SKIPPED, f"skipped: {package} is not installed ({install or 'pip install ' + package})")
    try:
        return row(metric, *run())
    except (UserError, OSError, ImportError, RuntimeError) as error:      # offline, a torchvision of another torch ...
        return row(metric, SKIPPED, f"skipped: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")


def against(images: Tensor, reference: str | None) -> list[dict]:
    """Distances to reference pictures, resized to the student's size."""
    space = metrics.default_feature_space()
    if not reference:
        return [row("fid", SKIPPED, "skipped: no --reference pictures"), row(f"kid_{space}", SKIPPED, "skipped: no --reference pictures")]
    if images.shape[-1] != images.shape[-2]:
        return [row("fid", SKIPPED, "skipped: the pictures are not square"), row(f"kid_{space}", SKIPPED, "skipped: the pictures are not square")]
    real = data.images(reference, images.shape[-1], 3)
    features = metrics.feature_space(space)

    def kid():
        value = metrics.kid(features(images), features(real))
        return value.value, f"95 % {value.low:.4g} to {value.high:.4g}; {len(images)} pictures, {len(real)} references"

    def fid():
        from .metrics.network import network_metrics
        return network_metrics(images, reference=real)["fid"], f"biased by the count: {len(images)} pictures, {len(real)} references"
    return [tried("fid", "torch_fidelity", fid, "pip install torch-fidelity"), tried(f"kid_{space}", None, kid)]


def with_prompts(pipe, images: Tensor, pictures: list, texts: list[str]) -> list[dict]:
    """Agreement with the prompts, and what people would prefer."""
    from diffusers import ConsistencyModelPipeline
    if isinstance(pipe, ConsistencyModelPipeline):
        return [row(m, SKIPPED, "skipped: it draws classes, not prompts") for m in ("clip_score", "hpsv2", "image_reward")]

    def clip():
        from .metrics.network import CLIP, network_metrics
        return network_metrics(images, prompts=texts)["clip_score"], CLIP

    def hpsv2():
        import hpsv2
        return statistics.fmean(float(hpsv2.score(p, t, hps_version="v2.1")[0]) for p, t in zip(pictures, texts)), "v2.1"

    def reward():
        import ImageReward
        model = ImageReward.load("ImageReward-v1.0")
        return statistics.fmean(float(model.score(t, p)) for p, t in zip(pictures, texts)), "v1.0"
    return [tried("clip_score", "torchmetrics", clip), tried("hpsv2", "hpsv2", hpsv2), tried("image_reward", "ImageReward", reward,
                                                                                             "pip install image-reward")]


def spread(images: Tensor, prompts: int, seeds: int) -> dict:
    space = metrics.default_feature_space()
    if seeds < 2:
        return row(f"diversity_{space}", SKIPPED, "skipped: needs at least 2 seeds of a prompt")
    features = metrics.feature_space(space)(images)
    return row(f"diversity_{space}", metrics.diversity(features.reshape(prompts, seeds, -1)), f"{seeds} seeds of {prompts} prompts")


# ------------------------------------------------------------------------------------------------------------- latency
def latency(pipe, text: str, steps: int | None, repeats: int = 3) -> list[dict]:
    """Milliseconds of one picture, by part: median of `repeats` calls after one that is not counted."""
    def call():
        return pipe(**what(pipe, text), num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
    call()
    parts = {"text_encoder": [], "denoiser": [], "vae": []}
    totals, calls = [], 0
    for _ in range(repeats):
        with stopwatch(pipe) as spent:
            start = _now(pipe.device)
            call()
            totals.append(_now(pipe.device) - start)
        calls = spent["calls"]
        for name, values in parts.items():
            values.append(spent[name])
    rows = [row(f"ms_{name}", 1e3 * statistics.median(values), f"{calls} calls of the network" if name == "denoiser" else "") for name,
            values in parts.items()]
    rest = statistics.median(t - sum(values[i] for values in parts.values()) for i, t in enumerate(totals))
    return [*rows, row("ms_rest", 1e3 * rest, "scheduler, tokenizer, conversion"), row("ms_total", 1e3 * statistics.median(totals),
                                                                                       f"one picture on {_device_name(pipe.device)}")]


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
    for name, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        if name.startswith("text_encoder"):
            watch(module, "forward", "text_encoder")
        elif name in ("unet", "transformer", "transformer_2"):
            watch(module, "forward", "denoiser")
        elif name == "vae":
            watch(module, "decode", "vae")
    try:
        yield spent
    finally:
        for owner, method, own in undo:
            if own is None:
                delattr(owner, method)      # the class's shows again
            else:
                setattr(owner, method, own)
