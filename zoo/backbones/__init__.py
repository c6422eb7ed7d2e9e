"""Backbones: everything a method needs of one pretrained family and nothing else. `load(name_or_repo)` picks the family."""
from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from ..errors import UserError
from .base import Backbone, Examples, Source
from .custom import Custom

ASSETS = Path(__file__).parent.parent / "assets"
# Built-in teachers: folder under zoo/assets, default guidance (chosen by the scans in benchmarks/teacher), default data.
BUILT_IN = {"emoji": {"folder": "emoji/teacher", "guidance": 2.0, "data": "emoji"},
            "fashion": {"folder": "fashion/teacher", "guidance": 2.0, "data": "fashion"}}
# Pipeline class of a folder -> "module:class" of its adapter: a family is one file here and its lines in this table.
FAMILIES = {
    "StableDiffusionPipeline": "sd:StableDiffusion",
    "LatentConsistencyModelPipeline": "sd:StableDiffusion",
    "StableDiffusionXLPipeline": "sdxl:StableDiffusionXL",
    "PixArtAlphaPipeline": "pixart:PixArt",
    "PixArtSigmaPipeline": "pixart:PixArt",
    "SanaPipeline": "sana:Sana",
    "DiTPipeline": "dit:DiT",
    "ConsistencyModelPipeline": "pixel:Pixel",
    "DDPMPipeline": "pixel:Pixel",
    "DDIMPipeline": "pixel:Pixel",
    "StableDiffusion3Pipeline": "sd3:StableDiffusion3",
    "FluxPipeline": "flux:Flux",
    "Flux2KleinPipeline": "flux2:Flux2Klein",
    "QwenImagePipeline": "qwen_image:QwenImage",
    "ZImagePipeline": "zimage:ZImage",
    "WanPipeline": "wan:wan",
    "CogVideoXPipeline": "cogvideox:CogVideoX",
    "LTXPipeline": "ltx:LTX",
}

__all__ = ["Backbone", "Custom", "Examples", "Source", "load"]


def load(teacher, data: str = "", guidance: float = 0.0) -> Backbone:
    """A Backbone from a built-in name (emoji, fashion, toy, toy-video), a diffusers folder or a Hub id; a Backbone is returned as it is.

    data: see RunConfig.data; guidance: teacher scale w, 0 for the teacher's own default.
    Raises UserError for unknown names, folders without model_index.json, families without an adapter, and guidance of what has none."""
    if isinstance(teacher, Backbone):
        model = teacher
    elif teacher == "toy":
        from .toy import Toy
        model = Toy()
    elif teacher == "toy-video":
        from .toy_video import ToyVideo
        model = ToyVideo()
    else:
        folder, known = _locate(teacher)
        kind = _pipeline_class(folder, teacher)
        family = adapter(kind, teacher)
        model = family(folder, name=teacher, data=known.get("data", ""), guidance=known.get("guidance", 0.0))
    if data and teacher in ("toy", "toy-video"):
        raise UserError(f"--data {data}: {teacher} draws its own data; drop --data, or give another --teacher")
    if data:
        model.data = data
    if guidance not in (0, 1) and not model.takes_guidance:
        raise UserError(f"--guidance {guidance:g}: {model.name} has no unconditional half and no input to be guided by: leave it out, "
                        "or give --guidance 1 beside a --recipe that sets it")
    if guidance:
        model.guidance = guidance
    return model


def adapter(kind: str, name: str = "") -> type[Backbone]:
    """The Backbone class serving pipelines of class `kind`; `name` is what the user asked for. Raises UserError naming the supported ones."""
    if kind not in FAMILIES:
        raise UserError(f"{name or 'the teacher'} is a {kind}, which has no adapter yet: supported are {', '.join(sorted(FAMILIES))}")
    module, _, cls = FAMILIES[kind].partition(":")
    return getattr(import_module(f".{module}", __name__), cls)


def _locate(teacher: str) -> tuple[str, dict]:
    if teacher in BUILT_IN:
        known = BUILT_IN[teacher]
        return str(ASSETS / known["folder"]), known
    if Path(teacher).is_dir():
        return teacher, {}
    if "/" not in teacher or teacher.startswith((".", "/", "~")):
        raise UserError(f"unknown teacher {teacher!r}: give {', '.join(BUILT_IN)}, toy, toy-video, an existing diffusers folder, or a Hub id such as user/name")
    return teacher, {}


def _pipeline_class(folder: str, teacher: str) -> str:
    path = Path(folder) / "model_index.json"
    if not Path(folder).is_dir():
        from huggingface_hub import hf_hub_download

        from .checks import unreadable
        try:
            path = Path(hf_hub_download(folder, "model_index.json"))
        except Exception as error:
            raise unreadable(f"--teacher {teacher}", folder, error) from error
    if not path.exists():
        raise UserError(f"{folder} has no model_index.json: a teacher is a diffusers pipeline folder (pipe.save_pretrained)")
    return json.loads(path.read_text())["_class_name"]
