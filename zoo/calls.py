"""What a student is asked for: a prompt, a class by number or name, or nothing. One place for `zoo sample`, `zoo eval` and `zoo export`."""
from __future__ import annotations

import contextlib
import inspect
from pathlib import Path

from .errors import UserError


def open_stock(pipe, student: str, command: str):
    """`pipe`, when it is a pipeline of diffusers; students that no stock pipeline can feed are refused with what to use instead."""
    from .pipelines.causal_video import CausalVideoPipeline
    from .pipelines.two_time import SlotPipeline
    from .pipelines.unmask import UnmaskPipeline
    if isinstance(pipe, SlotPipeline):
        raise UserError(f"{student} is a student of the toy teacher, whose samples are points, not pictures: "
                        f"draw them with zoo.load({str(student)!r})(class_labels=[0]).images")
    if isinstance(pipe, (UnmaskPipeline, CausalVideoPipeline)):
        what = "writes text" if isinstance(pipe, UnmaskPipeline) else "streams video"
        raise UserError(f"zoo {command} is for pipelines of diffusers and {student} {what}: "
                        + (f"see samples with `zoo sample {student} PROMPT`, and its card for the numbers of its run" if command == "eval" else
                           "its folder is what zoo.load opens and zoo push publishes, in no other format"))
    return pipe


def device_here(name: str | None) -> str:
    """The device of that name; by default a GPU if there is one, else the CPU. Raises UserError for one that cannot be used."""
    import torch
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}): give cpu, or leave it out") from error
    return device


@contextlib.contextmanager
def without_remarks():
    """Inside, diffusers says nothing but errors: what it remarks on opening (keys for servers in model_index.json, LoRA files without a text
    encoder's part) is as it should be."""
    from diffusers.utils import logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def takes(pipe) -> str:
    """What a stock pipeline is conditioned on: "prompt", "class" or "nothing"."""
    accepts = inspect.signature(type(pipe).__call__).parameters
    if "prompt" in accepts:
        return "prompt"
    return "class" if "class_labels" in accepts and classes(pipe) else "nothing"


def classes(pipe) -> int:
    """How many classes it draws, without the null class."""
    if hasattr(pipe, "transformer"):                                  # DiT: the null class comes after them
        return pipe.transformer.config.num_embeds_ada_norm
    known = pipe.unet.config.num_class_embeds or 0
    return max(known - (getattr(pipe, "_contract", None) is not None), 0)      # our pixel teachers keep their last class for "any"


def class_names(pipe) -> dict[str, int]:
    """Names of classes, where they have some: those in the pipeline's configuration, or of Fashion-MNIST for students of that teacher."""
    if getattr(pipe, "labels", None):
        return dict(pipe.labels)
    from .hub.record import RECORD, read_record
    folder = getattr(pipe, "name_or_path", None)
    if folder and (Path(folder) / RECORD).exists() and read_record(folder)[1].get("teacher") == "fashion":
        from .data.fashion_mnist import CLASSES
        return {name: i for i, name in enumerate(CLASSES)}
    return {}


def class_number(pipe, word: str) -> int:
    """The class `word` names, by number or by name. Raises UserError with those there are."""
    names, n = class_names(pipe), classes(pipe)
    if word.isdigit() and int(word) < n:
        return int(word)
    if word in names:
        return names[word]
    from difflib import get_close_matches
    listed = names if len(names) <= 20 else get_close_matches(word, names)
    raise UserError(f"this student draws classes, not prompts, and {word!r} is none: give a number from 0 to {n - 1}"
                    + (f", or {', '.join(listed)}" if listed else ""))


def condition(pipe, text: str | None) -> dict:
    """The arguments of a call that say what to draw. Raises UserError for a prompt that is missing, unknown, or of no effect."""
    kind = takes(pipe)
    if kind == "nothing":
        if text:
            raise UserError(f"this student draws without a prompt, and {text!r} would have no effect: leave it out")
        return {}
    if not text:
        raise UserError("this student draws what a prompt says: give one, such as \"a red heart\"" if kind == "prompt" else
                        f"this student draws classes: give one, by number from 0 to {classes(pipe) - 1}"
                        + (" or by name, such as " + next(iter(class_names(pipe))) if class_names(pipe) else ""))
    return {"prompt": text} if kind == "prompt" else {"class_labels": [class_number(pipe, text)]}


def steps_in(terms, steps: int | None, student: str) -> int:
    """The step count of a call. terms: a contract, or `zoo.loading.Terms`. Raises UserError for one the student was not trained for."""
    if steps is None:
        return getattr(terms, "usual", None) or max(terms.knots)
    if steps not in terms.steps:
        raise UserError(f"--steps {steps} is not in the contract of {student}: it was trained for {', '.join(map(str, sorted(terms.steps)))}")
    return steps


def guidance_in(pipe, guidance: float | None, student: str) -> dict:
    """The guidance argument of a call. Raises UserError for a scale the student was not trained for, or where it takes none."""
    if guidance is None:
        return {}
    terms = getattr(pipe, "_terms", None)
    if terms is None or terms.argument not in inspect.signature(type(pipe).__call__).parameters:
        raise UserError(f"{student} takes no guidance scale: leave --guidance out")
    if not terms.fits(guidance):
        trained = f"{terms.guidance:g}" if terms.low is None else f"{terms.low:g} to {terms.high:g}"
        raise UserError(f"--guidance {guidance:g}: {student} was trained for {trained}")
    return {terms.argument: guidance}


def is_video(pipe) -> bool:
    """Whether its samples have several frames."""
    from .pipelines.causal_video import CausalVideoPipeline
    return isinstance(pipe, CausalVideoPipeline) or hasattr(pipe, "video_processor")


def draw(pipe, call: dict, steps: int | None, seed: int, **options):
    """A pipeline's output for `call`, the same for the same seed: a few stock pipelines (DiT) let their scheduler take its noise from
    torch's own generator, which is seeded too, apart from the first noise, and left as it was."""
    import torch
    device = torch.device(getattr(pipe, "device", "cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + 1_000_003)
        return pipe(**call, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **options)


def frames(out) -> list:
    """Frames of the first sample of a pipeline's output, as PIL images: one for a picture."""
    from PIL import Image
    found = [out.images[0]] if hasattr(out, "images") else out.frames[0]
    return [f if isinstance(f, Image.Image) else Image.fromarray((f * 255).round().clip(0, 255).astype("uint8")) for f in found]
