"""`zoo.load`: a student whose plain call is right, because its contract fills in what was not said."""
from __future__ import annotations

import functools
import inspect
import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import registry
from .errors import UserError
from .hub import stage
from .hub.contract import GRID_ARGUMENTS, Contract, disagreement
from .hub.record import LORA_WEIGHTS, RECORD, SLOT_FOLDERS, WEIGHTS, base_revision, member, read_record
from .rows import Student

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Terms:
    """What a call uses where nothing is said, and what the student was trained for.

    steps: counts it was trained for; usual: the count of a call without one; guidance, low, high: the scale to pass to
    `argument`, and those it was trained for; timesteps: by step count, where the call must name them; knots: those it was trained at, as
    far as they are known; extra: other arguments of any
    call, and per_step: those of one step count (its sigmas)."""
    steps: tuple[int, ...]
    usual: int
    guidance: float = 1.0
    argument: str = "guidance_scale"
    low: float | None = None
    high: float | None = None
    timesteps: dict[int, tuple[float, ...]] = field(default_factory=dict)
    knots: dict[int, tuple[float, ...]] = field(default_factory=dict)
    extra: dict = field(default_factory=dict)
    per_step: dict[int, dict] = field(default_factory=dict)

    @classmethod
    def of_contract(cls, contract: Contract) -> "Terms":
        low, high = contract.guidance_range or (None, None)
        told = contract.call.get(max(contract.knots), {})      # size, length and guidance hold for any count, the grid for its own
        return cls(tuple(contract.steps), max(contract.knots), contract.guidance, low=low, high=high, knots=contract.knots,
                   extra={k: v for k, v in told.items() if k not in GRID_ARGUMENTS},
                   per_step={k: {a: v for a, v in call.items() if a in GRID_ARGUMENTS} for k, call in contract.call.items()})

    @classmethod
    def of_row(cls, row: Student) -> "Terms":
        low, high = row.guidance_range or (None, None)
        return cls(tuple(sorted(row.steps)), row.usual_steps, row.guidance, row.guidance_argument, low, high, dict(row.timesteps), dict(row.timesteps),
                   dict(row.call))

    def fits(self, guidance: float) -> bool:
        """Whether it was trained for this scale. 0 and 1 both mean no classifier-free guidance."""
        if self.low is not None and self.low <= guidance <= self.high:
            return True
        return guidance == self.guidance or (guidance in (0, 1) and self.guidance in (0, 1))


def load(name: str | Path, two_time: bool = False, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, *,
         revision: str | None = None, allow_unverified: bool = False):
    """The student `name` (registered name, folder or Hub id) as a pipeline: `load(name)("a red heart").images[0]`.

    Steps and guidance default to the contract's; others warn once. dtype: by default the contract's (float32), and for students of
    others on an accelerator the one of their row; toys, text students and networks with an extra input compute in float32 alone.
    revision: branch, tag or commit of a Hub id (a registered student of others has one of its own). allow_unverified: open a registered
    student although its sampling could not be checked against its makers' word.
    two_time: the network with its extra scalar input (second time, guidance) where the folder has one, as a
    `pipelines.two_time.SlotPipeline`. A toy student always is one.
    A text student is a `pipelines.unmask.UnmaskPipeline`: `load(name)("in the ").texts`. A causal video student is a
    `pipelines.causal_video.CausalVideoPipeline`: `load(name)("a frog moving left").frames`, or frames as they come from its `stream`.
    Remote code is never trusted, weights are read from safetensors only, and nothing outside the student's folder or repository is
    opened but the base model that a LoRA names.
    Raises UserError when `name` is no student, has no such network, needs a pickle, or leaves its folder."""
    row = _community_row(str(name))
    if row is not None:
        if two_time:
            raise UserError(f"{row.name} has no network with an extra input here: load it without two_time")
        return open_row(row, device, dtype, revision=revision, allow_unverified=allow_unverified)
    folder, pulled = _folder(str(name), revision)
    if not (folder / RECORD).exists():
        if two_time:
            raise UserError(f"{name} has no {RECORD}, and so no second network: load it without two_time")
        contract = _scheduler_contract(folder)
        return _pipeline(folder, contract, dtype or getattr(torch, contract.dtype)).to(device)
    contract, record = read_record(folder)
    family, adapter = record["family"], not (folder / INDEX).exists() and (folder / LORA_WEIGHTS).exists()
    bare = family in ("toy", "text", "toy-text")
    if (bare or two_time) and dtype not in (None, torch.float32):
        raise UserError(f"dtype={dtype}: {name} computes in float32 alone{'' if bare else ' with its extra input'}; leave dtype out")
    dtype = dtype or getattr(torch, contract.dtype)
    if family == "toy":
        return _toy(folder, contract, record, two_time).to(device)
    if two_time:
        return _slotted(folder, contract, record).to(device)
    if bare:
        from .pipelines.unmask import open_student
        return open_student(folder, contract, record).to(device)
    if family == "video":
        from .pipelines.causal_video import CausalVideoPipeline
        pipe = _parts(folder, CausalVideoPipeline, dtype)
        if pipe.contract != contract:
            raise UserError(f"{folder} does not hold to its contract: the one in its scheduler's configuration is another; export it again")
        return pipe.to(device)
    if adapter:
        return _adapter(folder, contract, record, dtype, pulled).to(device)
    return _pipeline(folder, contract, dtype).to(device)


# --------------------------------------------------------------------------------------------------------- finding it
def _community_row(name: str) -> Student | None:
    """The row of a student of others: by its name, or by the Hub id of a whole pipeline."""
    for row in registry.STUDENTS:
        if row.kind == "community" and (name == row.name or (name == row.source and row.parts == "pipeline" and not Path(name).is_dir())):
            return row
    return None


def _folder(name: str, revision: str | None = None) -> tuple[Path, bool]:
    """The folder of a student, and whether it came from the Hub: looked through, so that what is opened after lies in it and is no pickle."""
    if folder := _local(name):
        if revision:
            raise UserError(f"revision={revision!r} is of Hub ids, and {name} is a folder here: leave it out")
        _look_through(folder, name)
        return folder, False
    row = next((s for s in registry.STUDENTS if s.name == name), None)
    if row is not None:
        name, revision = row.source, revision or row.revision
    if "/" not in name or name.startswith((".", "/", "~")):
        hint = f"; {registry.nearest(name, [s.name for s in registry.STUDENTS])}" if registry.STUDENTS else ""
        raise UserError(f"unknown student {name!r}: give an exported folder, a Hub id such as user/name, or a registered name{hint}")
    folder = _hub(lambda: _fetch(name, revision), name)
    _look_through(folder, name, _names_at(name, folder.name))
    return folder, True


def _local(name: str) -> Path | None:
    """The folder on this machine that `name` means; None for what is to be had from the Hub. Raises UserError for a folder of something else."""
    if (Path(name) / RECORD).exists() or _has_contract(Path(name)):
        return Path(name)
    row = next((s for s in registry.STUDENTS if s.name == name), None)
    if row is not None:
        local = [place / row.source for place in (Path(__file__).parent, Path.cwd()) if (place / row.source).is_dir()]
        if local:
            return local[0]
        if row.kind == "rebuilt":
            raise UserError(f"{name} is not shipped: `zoo make {name}` trains it again into {row.source}")
        if row.source.startswith("assets/"):
            raise UserError(f"{name} is not in this installation ({row.source} is missing): install the package again")
    elif Path(name).is_dir():
        _refuse_pickles(name, _names_in(Path(name)), _parts_of(Path(name)))
        raise UserError(f"{name} has no {RECORD}: it was not exported by a run of these scripts; open it with DiffusionPipeline.from_pretrained")
    return None


def _fetch(name: str, revision: str | None) -> Path:
    """The repository in the client's cache, without its pickles; what makes it a student first, so that another one is not downloaded."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    def has(file: str, key: str = "") -> bool:
        try:
            return key in Path(hf_hub_download(name, file, revision=revision)).read_text(encoding="utf-8", errors="replace")
        except RemoteEntryNotFoundError:
            return False

    try:
        known = has(RECORD) or has(SCHEDULER, "_fewstep")
    except LocalEntryNotFoundError:                    # no network: what the cache has of it, which may lack a file that is not there
        known = None
    if known is False:
        rows = [row.name for row in registry.STUDENTS if row.source == name]
        raise UserError(f"{name} has no {RECORD} and no contract in its scheduler's configuration: "
                        + (f"open it by a name of the registry, {' or '.join(rows[:8])}" if rows else "open it with DiffusionPipeline.from_pretrained"))
    any_case = ["*" + "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in suffix) for suffix in stage.PICKLES]
    folder = Path(snapshot_download(name, revision=revision, ignore_patterns=any_case))
    if not (folder / RECORD).exists() and not _has_contract(folder):
        raise UserError(f"{name} has no {RECORD} in this machine's cache: connect to the network, or give a local folder")
    return folder


def _hub(fetch, name: str):
    """fetch(), its failures as one line."""
    try:
        return fetch()
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("Invalid filename"):        # the client's word for it
            raise UserError(f"{name} holds a path that leaves its folder, and is not opened ({error})") from error
        if type(error).__name__ == "SafetensorError":
            raise UserError(f"{name} holds a file that is no safetensors one under that name, and is not opened ({error})") from error
        # The Hub's refusals and the network's failures; anything else is a bug, or a file that does not fit, and keeps its own words.
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests"):
            raise
        text = (str(error).strip().splitlines() or [""])[0]
        if "necessary `safetensors`" in text:                   # diffusers' word for a part that has pickles alone
            raise UserError(f"{name} has a part without safetensors weights, and pickles are not opened ({text})") from error
        raise UserError(f"could not fetch {name} from the Hub ({type(error).__name__}: {text}): "
                        "check the id, log in for private or gated repositories, or give a local folder") from error


def _names_at(name: str, revision: str) -> list[str]:
    """Files of a repository; none when they cannot be listed (no network): then what was fetched is looked at alone."""
    from huggingface_hub import HfApi
    try:
        return HfApi().list_repo_files(name, revision=revision)
    except Exception:
        return []


def _names_in(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


# ------------------------------------------------------------------------------------------------- what may be opened
def _look_through(folder: Path, name: str, names: list[str] = ()) -> None:
    """Raise UserError for a folder that must not be opened. names: of the whole repository, where it is one."""
    if found := stage.unsafe(folder):
        raise UserError(f"{name} is not opened: {'; '.join(found[:3])}")
    index = _json(folder / INDEX) if (folder / INDEX).exists() else {}
    if not isinstance(index.get("_class_name", ""), str):
        raise UserError(f"{name} brings the code of its own pipeline ({index['_class_name']}), which is not trusted")
    for part, told in index.items():
        if isinstance(told, list) and told and told[0] and not _stock_module(told[0]):
            raise UserError(f"{name} names a class outside diffusers and transformers for its {part} ({told[0]}), which is not trusted")
    _refuse_pickles(name, names or _names_in(folder), _parts_of(folder))


def _stock_module(name) -> bool:
    """Whether an entry of model_index.json names a library, or pipeline folder of diffusers, whose classes may be loaded."""
    import diffusers
    return name in ("diffusers", "transformers") or isinstance(name, str) and re.fullmatch(r"\w+", name) and hasattr(diffusers.pipelines, name)


def _parts_of(folder: Path) -> list[str]:
    index = _json(folder / INDEX) if (folder / INDEX).exists() else {}
    return [part for part, told in index.items() if isinstance(told, list) and told and told[0]] or ["."]


def _refuse_pickles(name: str, names, parts) -> None:
    """Raise UserError naming the pickles that opening would need; those that only lie there are said once, and never read."""
    needed, beside = stage.pickles(names, parts)
    if needed:
        raise UserError(f"{name} has weights as pickles only ({', '.join(needed[:3])}), which are not opened: opening one can run code; "
                        "save them as safetensors, or ask its owner to")
    if beside:
        warnings.warn(f"{name} holds pickles too ({', '.join(beside[:3])}{' ...' if beside[3:] else ''}), which are not opened", stacklevel=5)


def _json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): fetch or export it again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no table of settings: fetch or export it again")
    return data


def _scheduler_config(folder: Path) -> dict:
    path = folder / SCHEDULER
    return _json(member(folder, SCHEDULER)) if path.exists() else {}


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


def _parts(folder: Path, kind, dtype: torch.dtype):
    """A pipeline of class `kind` from the parts in a folder."""
    try:
        return kind.from_pretrained(str(folder), use_safetensors=True, **_in(dtype))
    except OSError as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{folder} cannot be opened ({text}): it needs every part its {INDEX} names, as safetensors") from error


def _pipeline(folder: Path, contract: Contract, dtype: torch.dtype):
    from diffusers import DiffusionPipeline
    return _agreed(_parts(folder, DiffusionPipeline, dtype), folder, contract)


def _agreed(pipe, folder: Path, contract: Contract):
    """`pipe` under its contract. Raises UserError where its scheduler would sample otherwise."""
    told = pipe.scheduler.config.get("_fewstep")
    complaint = "the contract in its scheduler's configuration is another" if told and Contract.from_json(told) != contract else None
    if complaint := complaint or disagreement(pipe.scheduler, contract):
        raise UserError(f"{folder} does not hold to its contract: {complaint}; export it again")
    return with_terms(pipe, Terms.of_contract(contract), contract)


def _adapter(folder: Path, contract: Contract, record: dict, dtype: torch.dtype, pulled: bool):
    """A LoRA alone: put on its teacher, with the scheduler that lies beside it. The record of a repository names no folder of this machine."""
    import diffusers

    from .backbones import _locate
    teacher = record["teacher"]
    if pulled:
        refuse_local_base(teacher)
    source, _ = _locate(teacher)
    pin = {"revision": base_revision(folder)} if not Path(source).is_dir() and base_revision(folder) else {}
    pipe = _hub(lambda: diffusers.DiffusionPipeline.from_pretrained(source, use_safetensors=True, **pin, **_in(dtype)), f"the teacher {teacher}")
    config = _scheduler_config(folder)
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise UserError(f"{folder} has no scheduler of diffusers beside its LoRA ({SCHEDULER}): push or export it again")
    pipe.scheduler = kind.from_config(config)
    put_lora(pipe, str(folder), LORA_WEIGHTS, contract.lora_scale)
    return _agreed(pipe, folder, contract)


def refuse_local_base(teacher: str) -> None:
    """Raise UserError for a base model, named by the record of a repository, that would be read from this machine's folders."""
    from .backbones import BUILT_IN
    if teacher not in BUILT_IN and (Path(teacher).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", teacher)):
        raise UserError(f"the record of this student names {teacher!r} as its base model, which is no Hub id, or a folder of this machine: "
                        "it is not opened for a repository; download the student and give its folder")


def put_lora(pipe, source: str, file: str, scale: float, second: str = "", **options) -> None:
    """Add a LoRA file to the weights of `pipe`, `scale` times (a style LoRA loaded later then adds to the student).

    Raises UserError when the file holds nothing for this pipeline: diffusers only logs that, and the base model would be left as it is."""
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"{type(pipe).__name__} has no LoRA loader in diffusers: {file} cannot be put on it")
    # Without use_safetensors, a file that is no safetensors one is opened as a pickle, whatever its name.
    load = functools.partial(pipe.load_lora_weights, source, use_safetensors=True, **options)
    parts = {"components": ["transformer", "transformer_2"]} if second else {}
    try:
        load(weight_name=file, adapter_name="student")
        if second:
            load(weight_name=second, adapter_name="student_2", load_into_transformer_2=True)
    except ValueError as error:
        if "Invalid LoRA" not in str(error):
            raise
        raise UserError(f"{source}: {file} is no LoRA that diffusers reads for a {type(pipe).__name__} ({error})") from error
    there = {name for names in pipe.get_list_adapters().values() for name in names}
    for name, held in (("student", file), ("student_2", second)):
        if held and name not in there:
            raise UserError(f"{source}: {held} holds no LoRA weights for a {type(pipe).__name__}: it is of another base model")
    pipe.fuse_lora(lora_scale=scale, **parts)
    pipe.unload_lora_weights()


def open_row(row: Student, device="cpu", dtype: torch.dtype | None = None, *, revision: str | None = None, allow_unverified: bool = False):
    """The community student of `row`: its parts on the base model, its scheduler, its terms. Raises UserError for pickles, for a row
    that is not verified, and for what the Hub refuses."""
    if row.pickle:
        raise UserError(f"{row.name}: {row.source} has its weights as a pickle only ({row.pickle}), which is not opened; its contract: `zoo show {row.name}`")
    if row.status != "verified" and not allow_unverified:
        raise UserError(f"{row.name} is not verified ({row.note}): pass allow_unverified=True to open it all the same")
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
    pin = {} if Path(row.source).is_dir() else {"revision": revision}
    if row.parts == "pipeline":
        return kind.from_pretrained(row.source, **pin, **common)
    if row.parts == "component":
        return kind.from_pretrained(row.teacher, **{row.component: _component(row, dtype, pin)}, **common)
    pipe = kind.from_pretrained(row.teacher, **common)
    put_lora(pipe, row.source, row.file or LORA_WEIGHTS, row.lora_scale, row.second_file, **pin)
    return pipe


def _component(row: Student, dtype: torch.dtype, pin: dict):
    """The student's network: a model folder of its own, or a file of weights for the base model's configuration."""
    import diffusers
    from safetensors.torch import load_file
    names = diffusers.DiffusionPipeline.load_config(row.teacher)
    kind = getattr(diffusers, names[row.component][1])
    if not row.file:
        extra = {"variant": row.variant} if row.variant and dtype == torch.float16 else {}
        return kind.from_pretrained(row.source, use_safetensors=True, **pin, **_in(dtype), **extra)
    if pin:
        from huggingface_hub import hf_hub_download
        path = Path(hf_hub_download(row.source, row.file, **pin))
    else:
        path = Path(row.source) / row.file
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
    accepts = list(inspect.signature(stock.__call__).parameters)[1:]

    @functools.wraps(stock.__call__)          # its signature too: diffusers and others ask it what a pipeline takes
    def __call__(self, *args, **kwargs):
        terms: Terms = self._terms
        kwargs = dict(zip(accepts, args)) | kwargs
        grid = next((kwargs[k] for k in GRID_ARGUMENTS if kwargs.get(k) is not None), None)
        steps = kwargs.pop("num_inference_steps", None)
        steps = len(grid) if grid is not None else terms.usual if steps is None else steps
        if steps not in terms.steps:
            _once(self, "steps", f"this student was trained for {', '.join(map(str, terms.steps))} step{'s' * (terms.steps != (1,))}, not {steps}")
        elif kwargs.get("timesteps") is not None and steps in terms.knots and tuple(map(float, grid)) != tuple(map(float, terms.knots[steps])):
            _once(self, "timesteps", f"this student was trained at timesteps {list(terms.knots[steps])}, not {list(grid)}")
        if steps in terms.timesteps and grid is None and "timesteps" in accepts:
            kwargs["timesteps"] = list(terms.timesteps[steps])
        if terms.argument in accepts:
            guidance = kwargs.setdefault(terms.argument, terms.guidance)
            if guidance is not None and not terms.fits(guidance):
                trained = f"{terms.guidance:g}" if terms.low is None else f"{terms.low:g} to {terms.high:g}"
                _once(self, "guidance", f"this student was trained for {terms.argument}={trained}, not {guidance:g}")
        for key, value in (terms.extra | (terms.per_step.get(steps, {}) if grid is None else {})).items():
            if key in accepts:
                kwargs.setdefault(key, value)
        return stock.__call__(self, num_inference_steps=steps, **kwargs)

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
    model.module.load_state_dict(load_file(member(folder, Path(record["slot_weights"], WEIGHTS))))
    model.module.requires_grad_(False)
    return _sampler(model, contract, record, "jump" if record["slot"] == "r" else contract.sampler)


def _toy(folder: Path, contract: Contract, record: dict, two_time: bool):
    from safetensors.torch import load_file

    from .pipelines.two_time import ToyModel
    if two_time and record["slot"] != "r":
        raise UserError(f"{folder} has no second time: load it without two_time")
    return _sampler(ToyModel(load_file(member(folder, "toy.safetensors"))), contract, record, "jump" if two_time else contract.sampler)


def _sampler(model, contract: Contract, record: dict, rule: str):
    from .denoiser import Denoiser
    from .pipelines.two_time import SlotPipeline
    net = Denoiser(model.module, model.process, model.pred, model.forward, slot=record["slot"])
    return SlotPipeline(model, net, contract, record["process"], rule)
