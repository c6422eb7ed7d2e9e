"""`zoo.load`: a student whose plain call is right, because its contract fills in what was not said."""
from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import torch

from .errors import UserError
from .hub.contract import Contract
from .hub.export import RECORD, SLOT_FOLDERS, WEIGHTS, read_record
from .registry import students


def load(name: str | Path, two_time: bool = False, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
    """The student `name` (registered name, folder or Hub id) as a pipeline: `load(name)("a red heart").images[0]`.

    Steps and guidance default to the contract's; other step counts warn once. two_time: the network with its extra scalar input
    (second time, guidance) where the folder has one, as a `pipelines.two_time.SlotPipeline`. A toy student always is one.
    A text student is a `pipelines.unmask.UnmaskPipeline`: `load(name)("in the ").texts`. A causal video student is a
    `pipelines.causal_video.CausalVideoPipeline`: `load(name)("a frog moving left").frames`, or frames as they come from its `stream`.
    Raises UserError when `name` is no student or has no such network."""
    folder = _folder(str(name))
    contract, record = read_record(folder)
    if record["family"] == "toy":
        return _toy(folder, contract, record, two_time).to(device)
    if record["family"] in ("text", "toy-text"):
        from .pipelines.unmask import open_student
        return open_student(folder, contract, record).to(device)
    if record["family"] == "video":
        from .pipelines.causal_video import CausalVideoPipeline
        return CausalVideoPipeline.from_pretrained(str(folder), use_safetensors=True).to(device, dtype)
    if two_time:
        return _slotted(folder, contract, record).to(device)

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(str(folder), use_safetensors=True)
    pipe.__class__ = _contracted(type(pipe))
    pipe._contract, pipe._warned = contract, False
    return pipe.to(device, dtype)


def _folder(name: str) -> Path:
    if (Path(name) / RECORD).exists():
        return Path(name)
    known = {s.name: s.source for s in students()}
    if name in known:
        packaged = Path(__file__).parent / known[name]
        if packaged.is_dir():
            return packaged
        name = known[name]
    if Path(name).is_dir():
        raise UserError(f"{name} has no {RECORD}: it was not exported by a run of these scripts; open it with DiffusionPipeline.from_pretrained")
    if "/" not in name or name.startswith((".", "/", "~")):
        raise UserError(f"unknown student {name!r}: give an exported folder, a Hub id such as user/name" + (f", or one of {', '.join(sorted(known))}" if known else ""))
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name))
    except Exception as error:
        raise UserError(f"could not fetch {name} from the Hub ({type(error).__name__}: {str(error).splitlines()[0]}): "
                        "check the id, log in for private repositories, or give a local folder") from error


def _contracted(stock: type) -> type:
    """A stock pipeline class whose call falls back on the contract. It keeps its name, so that it saves as the stock class."""
    accepts = inspect.signature(stock.__call__).parameters

    def __call__(self, *args, num_inference_steps=None, **kwargs):
        contract: Contract = self._contract
        custom = kwargs.get("timesteps") is not None
        steps = max(contract.knots) if num_inference_steps is None else num_inference_steps
        if steps not in contract.knots and not custom and not self._warned:
            warnings.warn(f"this student was trained for {', '.join(map(str, contract.steps))} steps, not {steps}", stacklevel=2)
            self._warned = True
        if "guidance_scale" in accepts:
            kwargs.setdefault("guidance_scale", contract.guidance)
        return stock.__call__(self, *args, num_inference_steps=steps, **kwargs)

    return type(stock.__name__, (stock,), {"__call__": __call__, "__module__": stock.__module__, "__doc__": stock.__doc__})


def _slotted(folder: Path, contract: Contract, record: dict):
    from safetensors.torch import load_file

    from .backbones import load as backbone
    from .denoiser import add_slot
    if record["slot_weights"] not in SLOT_FOLDERS.values():
        raise UserError(f"{folder} has no second network: this student has no second time; load it without two_time")
    model = backbone(str(folder))
    add_slot(model.module)
    model.module.load_state_dict(load_file(folder / record["slot_weights"] / WEIGHTS))
    model.module.requires_grad_(False)
    return _sampler(model, contract, record, "jump" if record["slot"] == "r" else contract.sampler)


def _toy(folder: Path, contract: Contract, record: dict, two_time: bool):
    from safetensors.torch import load_file

    from .pipelines.two_time import ToyModel
    if two_time and record["slot"] != "r":
        raise UserError(f"{folder} has no second time: load it without two_time")
    return _sampler(ToyModel(load_file(folder / "toy.safetensors")), contract, record, "jump" if two_time else contract.sampler)


def _sampler(model, contract: Contract, record: dict, rule: str):
    from .denoiser import Denoiser
    from .pipelines.two_time import SlotPipeline
    net = Denoiser(model.module, model.process, model.pred, model.forward, slot=record["slot"])
    return SlotPipeline(model, net, contract, record["process"], rule)
