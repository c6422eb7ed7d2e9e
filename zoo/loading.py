"""`zoo.load`: a student whose plain call is right, because its contract fills in what was not said."""
from __future__ import annotations

import functools
import inspect
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import registry
from .errors import UserError
from .hub.contract import Contract
from .hub.record import LORA_WEIGHTS, RECORD, SLOT_FOLDERS, WEIGHTS, read_record
from .rows import Student

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
INDEX = "model_index.json"


@dataclass(frozen=True)
class Terms:
    """What a call uses where nothing is said, and what the student was trained for.

    steps: counts it was trained for; usual: the count of a call without one; guidance, low, high: the scale to pass to
    `argument`, and those it was trained for; timesteps: by step count, where the call must name them; extra: other arguments,
    and per_step: by step count."""
    steps: tuple[int, ...]
    usual: int
    guidance: float = 1.0
    argument: str = "guidance_scale"
    low: float | None = None
    high: float | None = None
    timesteps: dict[int, tuple[float, ...]] = field(default_factory=dict)
    extra: dict = field(default_factory=dict)
    per_step: dict[int, dict] = field(default_factory=dict)

    @classmethod
    def of_contract(cls, contract: Contract) -> "Terms":
        low, high = contract.guidance_range or (None, None)
        return cls(tuple(contract.steps), max(contract.knots), contract.guidance, low=low, high=high,
                   per_step={int(k): dict(v) for k, v in (getattr(contract, "call", None) or {}).items()})

    @classmethod
    def of_row(cls, row: Student) -> "Terms":
        low, high = row.guidance_range or (None, None)
        return cls(tuple(sorted(row.steps)), row.usual_steps, row.guidance, row.guidance_argument, low, high, dict(row.timesteps), dict(row.call))

    def fits(self, guidance: float) -> bool:
        """Whether it was trained for this scale. 0 and 1 both mean no classifier-free guidance."""
        if self.low is not None and self.low <= guidance <= self.high:
            return True
        return guidance == self.guidance or (guidance in (0, 1) and self.guidance in (0, 1))


def load(name: str | Path, two_time: bool = False, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, *,
         revision: str | None = None, allow_unverified: bool = False):
    """The student `name` (registered name, folder or Hub id) as a pipeline: `load(name)("a red heart").images[0]`.

    Steps and guidance default to the contract's; others warn once. dtype: by default float32, and for students of others on an
    accelerator the one of their row. revision: branch, tag or commit of a Hub id. allow_unverified: open a registered student
    although its sampling could not be checked against its makers' word.
    two_time: the network with its extra scalar input (second time, guidance) where the folder has one, as a
    `pipelines.two_time.SlotPipeline`. A toy student always is one.
    A text student is a `pipelines.unmask.UnmaskPipeline`: `load(name)("in the ").texts`. A causal video student is a
    `pipelines.causal_video.CausalVideoPipeline`: `load(name)("a frog moving left").frames`, or frames as they come from its `stream`.
    Remote code is never trusted, and weights are read from safetensors only.
    Raises UserError when `name` is no student, has no such network, or holds its weights as pickles."""
    row = _community_row(str(name))
    if row is not None:
        if two_time:
            raise UserError(f"{row.name} has no network with an extra input here: load it without two_time")
        return open_row(row, device, dtype, revision=revision, allow_unverified=allow_unverified)
    folder = _folder(str(name), revision)
    dtype = dtype or torch.float32
    if not (folder / RECORD).exists():
        return _pipeline(folder, _scheduler_contract(folder), dtype).to(device)
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
    if not (folder / INDEX).exists() and (folder / LORA_WEIGHTS).exists():
        return _adapter(folder, contract, record, dtype).to(device)
    return _pipeline(folder, contract, dtype).to(device)


# --------------------------------------------------------------------------------------------------------- finding it
def _community_row(name: str) -> Student | None:
    """The row of a student of others: by its name, or by the Hub id of a whole pipeline."""
    for row in registry.STUDENTS:
        if row.kind == "community" and (name == row.name or (name == row.source and row.parts == "pipeline" and not Path(name).is_dir())):
            return row
    return None


def _folder(name: str, revision: str | None = None) -> Path:
    if (Path(name) / RECORD).exists() or _has_contract(Path(name)):
        return Path(name)
    known = {s.name: s for s in registry.STUDENTS}
    if name in known:
        row = known[name]
        local = [place / row.source for place in (Path(__file__).parent, Path.cwd()) if (place / row.source).is_dir()]
        if local:
            return local[0]
        if row.kind == "rebuilt":
            raise UserError(f"{name} is not shipped: `zoo make {name}` trains it again into {row.source}")
        if row.source.startswith("assets/"):
            raise UserError(f"{name} is not in this installation ({row.source} is missing): install the package again")
        name, revision = row.source, revision or row.revision
    if Path(name).is_dir():
        _refuse_pickles(Path(name))
        raise UserError(f"{name} has no {RECORD}: it was not exported by a run of these scripts; open it with DiffusionPipeline.from_pretrained")
    if "/" not in name or name.startswith((".", "/", "~")):
        hint = f"; {registry.nearest(name, known)}" if known else ""
        raise UserError(f"unknown student {name!r}: give an exported folder, a Hub id such as user/name, or a registered name{hint}")
    folder = Path(_hub(lambda: _snapshot(name, revision), name))
    if not any(folder.rglob("*.safetensors")):
        raise UserError(f"{name} holds no safetensors weights{_pickles_at(name, revision)}: pickles are not opened; ask its owner for safetensors")
    if not (folder / RECORD).exists() and not _has_contract(folder):
        raise UserError(f"{name} has no {RECORD} and no contract in its scheduler's configuration: open it with DiffusionPipeline.from_pretrained")
    return folder


def _snapshot(name: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download
    return snapshot_download(name, revision=revision, ignore_patterns=[*PICKLES, *(f"*/{p}" for p in PICKLES)])


def _hub(fetch, name: str):
    """fetch(), its failures as one line."""
    try:
        return fetch()
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("Invalid filename"):        # the client's word for it
            raise UserError(f"{name} holds a path that leaves its folder, and is not opened ({error})") from error
        # The Hub's refusals and the network's failures; anything else is a bug, or a file that does not fit, and keeps its own words.
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests"):
            raise
        text = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"could not fetch {name} from the Hub ({type(error).__name__}: {text}): "
                        "check the id, log in for private or gated repositories, or give a local folder") from error


def _pickles_at(name: str, revision: str | None) -> str:
    """" (it holds a.bin)" for a repository's pickles; nothing when they cannot be listed."""
    from huggingface_hub import HfApi
    try:
        names = [f for f in HfApi().list_repo_files(name, revision=revision) if any(Path(f).match(p) for p in PICKLES)]
    except Exception:
        return ""
    return f" (only {', '.join(names[:3])})" if names else ""


def _refuse_pickles(folder: Path) -> None:
    """Raise UserError when the only weights of a local folder are pickles."""
    if any(folder.rglob("*.safetensors")):
        return
    pickles = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if any(p.match(x) for x in PICKLES))
    if pickles:
        raise UserError(f"{folder} holds its weights as pickles ({', '.join(pickles[:3])}), which are not opened: save them as safetensors")


def _scheduler_config(folder: Path) -> dict:
    import json
    path = folder / "scheduler" / "scheduler_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _has_contract(folder: Path) -> bool:
    """A pipeline folder whose scheduler's configuration carries a contract, such as one that was saved again."""
    return (folder / INDEX).exists() and "_fewstep" in _scheduler_config(folder)


def _scheduler_contract(folder: Path) -> Contract:
    return Contract.from_json(_scheduler_config(folder)["_fewstep"])


# --------------------------------------------------------------------------------------------------------- opening it
def _in(dtype: torch.dtype) -> dict:
    """The argument of diffusers' loaders: its name changed in 0.42."""
    import diffusers
    return {"dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype": dtype}


def _pipeline(folder: Path, contract: Contract, dtype: torch.dtype):
    from diffusers import DiffusionPipeline
    _refuse_pickles(folder)
    return with_terms(DiffusionPipeline.from_pretrained(str(folder), use_safetensors=True, **_in(dtype)), Terms.of_contract(contract), contract)


def _adapter(folder: Path, contract: Contract, record: dict, dtype: torch.dtype):
    """A LoRA alone: put on its teacher, with the scheduler that lies beside it."""
    import diffusers

    from .backbones import _locate
    teacher = record["teacher"]
    pipe = _hub(lambda: diffusers.DiffusionPipeline.from_pretrained(_locate(teacher)[0], use_safetensors=True, **_in(dtype)), f"the teacher {teacher}")
    config = _scheduler_config(folder)
    if config:
        pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    put_lora(pipe, str(folder), LORA_WEIGHTS, contract.lora_scale)
    return with_terms(pipe, Terms.of_contract(contract), contract)


def put_lora(pipe, source: str, file: str, scale: float, second: str = "", **options) -> None:
    """Add a LoRA file to the weights of `pipe`, `scale` times (a style LoRA loaded later then adds to the student)."""
    pipe.load_lora_weights(source, weight_name=file, adapter_name="student", **options)
    parts = {}
    if second:
        pipe.load_lora_weights(source, weight_name=second, adapter_name="student_2", load_into_transformer_2=True, **options)
        parts = {"components": ["transformer", "transformer_2"]}
    pipe.fuse_lora(lora_scale=scale, **parts)
    pipe.unload_lora_weights()


def open_row(row: Student, device="cpu", dtype: torch.dtype | None = None, *, revision: str | None = None, allow_unverified: bool = False):
    """The community student of `row`: its parts on the base model, its scheduler, its terms. Raises UserError for pickles, for a row
    that is not verified, and for what the Hub refuses."""
    if row.status != "verified" and not allow_unverified:
        raise UserError(f"{row.name} is not verified ({row.note}): pass allow_unverified=True to open it all the same")
    if row.pickle:
        raise UserError(f"{row.name}: {row.source} has its weights as a pickle only ({row.pickle}), which is not opened; its contract: `zoo show {row.name}`")
    import diffusers
    if not hasattr(diffusers, row.pipeline):
        raise UserError(f"{row.name} needs {row.pipeline}, which diffusers {diffusers.__version__} does not have: upgrade diffusers")
    on_cpu = torch.device(device).type == "cpu"
    dtype = dtype or (torch.float32 if on_cpu and row.dtype == "float16" else getattr(torch, row.dtype))
    pipe = _hub(lambda: _assemble(row, dtype, revision or row.revision), row.source)
    if row.scheduler:
        kind = getattr(diffusers, row.scheduler)
        pipe.scheduler = kind.from_config(row.scheduler_config if row.scheduler_alone else pipe.scheduler.config,
                                          **({} if row.scheduler_alone else row.scheduler_config))
    return with_terms(pipe, Terms.of_row(row)).to(device)


def _assemble(row: Student, dtype: torch.dtype, revision: str):
    """The pipeline's weights, by diffusers' own loaders."""
    import diffusers
    kind = getattr(diffusers, row.pipeline)
    common = {"use_safetensors": True} | _in(dtype)
    if row.variant and dtype == torch.float16:
        common["variant"] = row.variant
    if row.parts == "pipeline":
        return kind.from_pretrained(row.source, revision=revision, **common)
    if row.parts == "single-file":
        return kind.from_single_file(str(_file(row, revision)), config=row.teacher, **_in(dtype))
    if row.parts == "component":
        return kind.from_pretrained(row.teacher, **{row.component: _component(row, dtype, revision)}, **common)
    pipe = kind.from_pretrained(row.teacher, **common)
    local = Path(row.source).is_dir()
    put_lora(pipe, row.source, row.file or LORA_WEIGHTS, row.lora_scale, row.second_file, **({} if local else {"revision": revision}))
    return pipe


def _file(row: Student, revision: str) -> Path:
    from huggingface_hub import hf_hub_download
    return Path(row.source) / row.file if Path(row.source).is_dir() else Path(hf_hub_download(row.source, row.file, revision=revision))


def _component(row: Student, dtype: torch.dtype, revision: str):
    """The student's network: a model folder of its own, or a file of weights for the base model's configuration."""
    import diffusers
    from safetensors.torch import load_file
    names = diffusers.DiffusionPipeline.load_config(row.teacher)
    kind = getattr(diffusers, names[row.component][1])
    if not row.file:
        extra = {"variant": row.variant} if row.variant and dtype == torch.float16 else {}
        return kind.from_pretrained(row.source, revision=revision, use_safetensors=True, **_in(dtype), **extra)
    path = _file(row, revision)
    module = kind.from_config(kind.load_config(row.teacher, subfolder=row.component))
    module.load_state_dict(load_file(path))
    return module.to(dtype).eval()


# ----------------------------------------------------------------------------------------------------- its plain call
def with_terms(pipe, terms: Terms, contract: Contract | None = None):
    """`pipe` with a call that falls back on `terms`."""
    pipe.__class__ = _contracted(type(pipe))
    pipe._terms, pipe._contract, pipe._warned = terms, contract, set()
    return pipe


def _contracted(stock: type) -> type:
    """A stock pipeline class whose call falls back on the terms. It keeps its name, so that it saves as the stock class."""
    accepts = inspect.signature(stock.__call__).parameters

    @functools.wraps(stock.__call__)          # its signature too: diffusers and others ask it what a pipeline takes
    def __call__(self, *args, num_inference_steps=None, **kwargs):
        terms: Terms = self._terms
        own_grid = any(kwargs.get(k) is not None for k in ("timesteps", "sigmas"))
        steps = terms.usual if num_inference_steps is None else num_inference_steps
        if steps not in terms.steps and not own_grid:
            _once(self, "steps", f"this student was trained for {', '.join(map(str, terms.steps))} step{'s' * (terms.steps != (1,))}, not {steps}")
        if steps in terms.timesteps and not own_grid and "timesteps" in accepts:
            kwargs["timesteps"] = list(terms.timesteps[steps])
        if terms.argument in accepts:
            guidance = kwargs.setdefault(terms.argument, terms.guidance)
            if guidance is not None and not terms.fits(guidance):
                trained = f"{terms.guidance:g}" if terms.low is None else f"{terms.low:g} to {terms.high:g}"
                _once(self, "guidance", f"this student was trained for {terms.argument}={trained}, not {guidance:g}")
        for key, value in (terms.extra | ({} if own_grid else terms.per_step.get(steps, {}))).items():
            if key in accepts:
                kwargs.setdefault(key, value)
        return stock.__call__(self, *args, num_inference_steps=steps, **kwargs)

    return type(stock.__name__, (stock,), {"__call__": __call__, "__module__": stock.__module__, "__doc__": stock.__doc__})


def _once(pipe, kind: str, text: str) -> None:
    if kind not in pipe._warned:
        pipe._warned.add(kind)
        warnings.warn(text, stacklevel=3)


def _slotted(folder: Path, contract: Contract, record: dict):
    from safetensors.torch import load_file

    from .backbones import load as backbone
    if record["slot_weights"] not in SLOT_FOLDERS.values():
        raise UserError(f"{folder} has no second network: this student has no second time; load it without two_time")
    model = backbone(str(folder))
    model.add_slot(model.module)
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
