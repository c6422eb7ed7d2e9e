"""The kinds of rows of the registry: plain data, nothing imported."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Paper:
    """A paper: what `cite` needs."""
    name: str
    title: str
    authors: tuple[str, ...]
    arxiv: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"


@dataclass(frozen=True)
class Metric:
    """A number somebody measured: at so many steps, on such data, and where it is written. tolerance: by how much a rebuild may differ."""
    name: str
    value: float
    steps: int
    dataset: str
    source: str
    tolerance: float = 0.0


@dataclass(frozen=True)
class Student:
    """A trained student, and how it is to be called.

    name: `name.tag`; method: a Method or Paper of the registry, or "undisclosed"; teacher: its base model; source: a folder inside
    the package or a Hub id; steps: counts it was trained for, falling; license: its own.
    kind: "shipped" (in the package), "rebuilt" (`zoo make` trains it again) or "community" (of others, on the Hub).
    revision: the commit of `source` that was read, "main" (said in the note) where no source names one; paper: a Method or Paper of the
    registry, where it is another than its method's.
    parts: what `source` holds: "pipeline" (a whole one), "lora" or "component" (to put on, or into, the teacher's pipeline).
    file: its name there; second_file: LoRA of the second transformer.
    scheduler, scheduler_config: class and what differs from the teacher's configuration ("" keeps the scheduler as it is;
    scheduler_alone: the configuration stands by itself); timesteps: by step count, where they must be passed to the call.
    guidance: the value to pass as guidance_argument; guidance_range: scales it was trained for; call: other arguments.
    variant: file variant of the teacher's float16 weights; dtype: what to load it in on an accelerator.
    status: "verified" against `facts` (addresses): place, files and how it is called; or "unverified". A licence that no source
    states is "unknown", and the note says so. note: what a reader should know.
    command, seed, versions: how a rebuilt student is made (flags after the script's name); metrics carry the tolerance."""
    name: str
    method: str
    teacher: str
    source: str
    steps: tuple[int, ...]
    license: str
    kind: str = "shipped"
    base_license: str = ""
    revision: str = "main"
    paper: str = ""
    pipeline: str = ""
    parts: str = "pipeline"
    component: str = ""
    file: str = ""
    second_file: str = ""
    lora_scale: float = 1.0
    scheduler: str = ""
    scheduler_config: dict = field(default_factory=dict)
    scheduler_alone: bool = False
    timesteps: dict[int, tuple[int, ...]] = field(default_factory=dict)
    default_steps: int = 0
    guidance: float = 1.0
    guidance_argument: str = "guidance_scale"
    guidance_range: tuple[float, float] | None = None
    call: dict = field(default_factory=dict)
    variant: str = ""
    dtype: str = "float32"
    modality: str = "image"
    metrics: tuple[Metric, ...] = ()
    status: str = "verified"
    facts: tuple[str, ...] = ()
    note: str = ""
    command: str = ""
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def pickle(self) -> str:
        """The file that cannot be loaded because it is a pickle, else nothing."""
        return next((f for f in (self.file, self.second_file) if f and PurePosixPath(f).suffix != ".safetensors"), "")

    @property
    def is_lora(self) -> bool:
        return self.parts == "lora"

    @property
    def usual_steps(self) -> int:
        """The count of a call that names none."""
        return self.default_steps or self.steps[0]

    @property
    def url(self) -> str:
        """Where a person finds it."""
        return f"https://huggingface.co/{self.source}" if self.kind == "community" else ""
