"""A style LoRA as part of the teacher (--teacher base --teacher_lora style.safetensors).

It is added to the frozen weights, once, when the run begins, so that teacher, student and critic still share one base and no call pays for
it. What a LoRA student learns is then an adapter *beside* the style: its file on the plain base is the few-step base, the same file with the
style LoRA on top is the student that was trained, since low-rank terms add. (Kept inside the exported file, the style could not be taken out
or scaled, and loading the style LoRA besides would count it twice.) The exported folder holds all three summed."""
from __future__ import annotations

import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..errors import UserError
from .checks import is_student, unreadable

NAME = "style"
WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREDICTIONS = {"epsilon": "eps", "v": "v", "v_prediction": "v"}      # modelspec.prediction_type of a safetensors header


@dataclass
class Style:
    """The LoRA in a teacher's weights. source: as the user gave it; file: the safetensors file it was read from; repo, revision: on the
    Hub; scale: what the teacher was built with; now: what the weights hold at this moment."""
    source: str
    file: Path
    repo: str
    scale: float
    now: float = 0.0
    layers: dict[str, list[tuple[str, nn.Module]]] = field(default_factory=dict)      # part of the pipeline -> (path, peft's layer)

    @property
    def revision(self) -> str:
        """The commit it was read from, where the client's cache names it."""
        parts = self.file.parts
        return parts[parts.index("snapshots") + 1] if self.repo and "snapshots" in parts else ""

    @property
    def parts(self) -> list[str]:
        """The parts of the pipeline that it changes."""
        return [part for part, layers in self.layers.items() if layers]

    def facts(self) -> dict:
        """What the record and the card keep; a local file only by its name."""
        known = {"name": self.file.name if not self.repo else self.repo, "file": self.file.name, "repo": self.repo, "revision": self.revision,
                 "scale": self.scale, "parts": self.parts}
        return {k: v for k, v in known.items() if v not in ("", None)}

    @torch.no_grad()
    def set(self, model, scale: float) -> None:
        """Make the teacher's weights hold the LoRA `scale` times (in place: every role on the shared base moves along)."""
        for part, layers in self.layers.items():
            root = getattr(model.pipe, part)
            for path, layer in layers:
                target = root.get_submodule(path)
                weight = getattr(target, "base_layer", target).weight
                weight += ((scale - self.now) * layer.get_delta_weight(NAME)).to(weight)
        self.now = scale


def add_style(model, source: str, scale: float = 1.0) -> Style:
    """Add the LoRA `source` (file, folder, Hub id, or a file in a Hub repository as user/name/file.safetensors) to the teacher of Backbone
    `model`, `scale` times; diffusers' and peft's formats, and those diffusers converts. A model that has it already is left alone.

    Raises UserError for a file that cannot be found or read, one made for other networks, a few-step adapter, and forms that are no sum."""
    if (old := model.style) is not None:
        if (old.source, old.scale) != (source, scale):
            raise UserError(f"the teacher {model.name} holds the LoRA {old.source} at scale {old.scale:g} already: load it anew for another")
        return old
    if getattr(model, "pipe", None) is None:
        raise UserError(f"--teacher_lora needs a teacher that is a diffusers pipeline, and {model.name} is none: merge the LoRA into your network")
    file, repo = _find(source)
    _refuse_others(model, source, file)
    style = Style(source, file, repo, float(scale))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)        # peft's about layers that differ: said here, in one line
            style.layers = _peft_layers(model, file) if file.name == PEFT_WEIGHTS else _diffusers_layers(model, file)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--teacher_lora {source} does not fit {model.name}, a model of the {model.family} family ({_mismatch(error)}): "
                        "give a LoRA made for this base model") from error
    _check(model, style)
    style.set(model, style.scale)
    model.style = style
    return style


# -------------------------------------------------------------------------------------------------------------- finding the file
def _find(source: str) -> tuple[Path, str]:
    """(safetensors file, Hub id or "")."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"--teacher_lora {source} is no safetensors file, and pickles can run code: convert it to safetensors")
        return path, ""
    if path.is_dir():
        return path / _choose(source, [p.name for p in path.iterdir() if p.is_file()]), ""
    parts = source.split("/")
    if len(parts) < 2 or source.startswith((".", "/", "~")) or len(parts) > 2 and not source.endswith(".safetensors"):
        raise UserError(f"--teacher_lora {source} does not exist: give a safetensors file, a folder, a Hub id such as user/name, or user/name/file.safetensors")
    repo, name = "/".join(parts[:2]), "/".join(parts[2:])
    from huggingface_hub import HfApi, hf_hub_download
    try:
        if not name:
            try:
                name = _choose(source, HfApi().list_repo_files(repo))
            except OSError:                   # no network: what the client's cache has under the usual name
                name = WEIGHTS
        if name == PEFT_WEIGHTS:
            hf_hub_download(repo, PEFT_CONFIG)
        return Path(hf_hub_download(repo, name)), repo
    except UserError:
        raise
    except Exception as error:
        raise unreadable(f"--teacher_lora {source}", repo, error) from error


def _choose(source: str, names: list[str]) -> str:
    """The LoRA's file among the names of a folder."""
    found = [n for n in names if n.endswith(".safetensors") and "/" not in n]
    for usual in (PEFT_WEIGHTS if PEFT_CONFIG in names else "", WEIGHTS):
        if usual in found:
            return usual
    if len(found) != 1:
        what = f"holds {len(found)} safetensors files ({', '.join(sorted(found)[:6])})" if found else "holds no safetensors file"
        raise UserError(f"--teacher_lora {source} {what}: name the file, as {source}/FILE.safetensors")
    return found[0]


def _header(file: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """(shapes by name, metadata) of a safetensors file."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, "pt") as f:
            return {k: f.get_slice(k).get_shape() for k in f.keys()}, f.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"--teacher_lora {file.name} cannot be read ({error}): download it again") from error


def _refuse_others(model, source: str, file: Path) -> None:
    """A whole model, a few-step adapter, and a LoRA trained for another reading of the network are named before anything is loaded."""
    shapes, metadata = _header(file)
    if not any("lora" in k.lower() or "lokr" in k.lower() for k in shapes):
        raise UserError(f"--teacher_lora {source} holds no LoRA (its first weight is {next(iter(shapes), 'none')}): a whole model goes to --teacher")
    if why := is_student(source, file.parent):
        raise UserError(f"--teacher_lora {source} is a few-step adapter ({why}): it is the result of a distillation, not a style; leave it out")
    said = PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""))
    if said and said != model.pred and model.pred in ("eps", "v"):
        raise UserError(f"--teacher_lora {source} was trained for prediction {metadata['modelspec.prediction_type']} (its header says so) and {model.name} "
                        f"predicts {model.pred} (its scheduler says so): give a LoRA of the same base, or correct prediction_type in scheduler_config.json")


# -------------------------------------------------------------------------------------------------------------- reading it
def _layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    return [(path, layer) for path, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]


def _diffusers_layers(model, file: Path) -> dict:
    """Through the pipeline's own loader, which also converts what other trainers write; the pipeline is left as it was."""
    pipe = model.pipe
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"{type(pipe).__name__} has no LoRA loader in diffusers: give {model.name}'s LoRA as a peft folder ({PEFT_CONFIG} and {PEFT_WEIGHTS}), "
                        "or fuse it into a folder for --teacher")
    try:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=NAME, use_safetensors=True)
        return {part: _layers(module) for part in pipe._lora_loadable_modules if isinstance(module := getattr(pipe, part, None), nn.Module)}
    finally:
        pipe.unload_lora_weights()


def _peft_layers(model, file: Path) -> dict:
    """A folder that peft saved, for the network alone."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    config, module = PeftConfig.from_pretrained(str(file.parent)), model.module
    if config.peft_type != "LORA":
        raise UserError(f"--teacher_lora {file.parent.name} is a {config.peft_type} adapter: give a LoRA")
    state = {k.removeprefix("base_model.model."): v for k, v in load_file(file).items()}
    try:
        inject_adapter_in_model(config, module, adapter_name=NAME)
        set_peft_model_state_dict(module, state, NAME)
        return {model.part: _layers(module)}
    finally:
        recurse_remove_peft_layers(module)
        module.__dict__.pop("peft_config", None)
        for p in module.parameters():
            p.requires_grad_(False)


def _check(model, style: Style) -> None:
    """Something was loaded, most of the file was, and it is a sum of low-rank terms on floating-point weights."""
    shapes, _ = _header(style.file)
    layers = [pair for part in style.layers.values() for pair in part]
    held = sum(p.numel() for _, layer in layers for n, p in layer.named_parameters() if f".{NAME}." in n)
    wanted = sum(torch.Size(s).numel() for k, s in shapes.items() if len(s) > 1)
    first = next(iter(shapes))
    if held < 0.5 * wanted:
        share = "none" if not held else "only a part"
        raise UserError(f"--teacher_lora {style.source} does not fit {model.name}, a model of the {model.family} family "
                        f"({share} of its weights has a place there; its first is {first} {list(shapes[first])}): give a LoRA made for this base model")
    if held < 0.99 * wanted:
        print(f"note: {1 - held / wanted:.0%} of the weights of --teacher_lora {style.source} have no place in {model.name} and are left out", file=sys.stderr)
    for path, layer in layers:
        base = layer.get_base_layer()
        if getattr(layer, "use_dora", {}).get(NAME) or getattr(layer, "lora_variant", {}).get(NAME) or getattr(layer, "lora_bias", {}).get(NAME):
            raise UserError(f"--teacher_lora {style.source} is no plain LoRA at {path} (DoRA, or with biases): "
                            "fuse it with its own tools into a folder for --teacher")
        if not base.weight.is_floating_point() or hasattr(base.weight, "quant_state"):
            raise UserError(f"--teacher_lora cannot be added to the quantised weights of {model.name}: "
                            "load the base unquantised, or fuse the LoRA into a folder for --teacher")


def _mismatch(error: Exception) -> str:
    """The layer and shapes of an error of loading, or its first line."""
    text = str(error)
    if found := re.search(r"size mismatch for (\S+): .*?torch\.Size\((\[[^\]]*\])\).*?torch\.Size\((\[[^\]]*\])\)", text, re.S):
        return f"{found[1].replace(f'.{NAME}', '')} is {found[2]} in the file and {found[3]} there"
    if found := re.search(r"[Tt]arget modules? (.{0,80}?)not found", text, re.S):
        return f"layers {' '.join(found[1].split())} are not there"
    return f"{type(error).__name__}: {' '.join(text.split())[:160]}"
