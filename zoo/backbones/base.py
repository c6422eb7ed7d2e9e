"""What every backbone shares: roles made from one teacher module, and data indexed by item."""
from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn

from ..critics import GanHead, Heads
from ..data.cache import Storage
from ..denoiser import SLOT_DIM, Denoiser, SlotEmbedding, SlotSequence, add_adapter, add_slot, checkpoint_activations
from ..errors import UserError
from ..process import Pred, Process, RectifiedFlow


@dataclass
class Examples:
    """Fixed conditions to look at and to measure on: names [n], cond and uncond dicts of tensors [n, ...]."""
    names: list[str]
    cond: dict[str, Tensor]
    uncond: dict[str, Tensor]


class Source:
    """`len(source)` items; `get(index [B])` gives a dict of cond, uncond and, where asked for, x0.

    order(numbers, seed, batch): item of each global sample number, where they are not simply shuffled (streams, buckets);
    identity: of its conditions, by which stored pairs know their data; cache: where its latents are kept, if anywhere."""

    identity, cache = "", None

    def __init__(self, n: int, get: Callable[[Tensor], dict], order: Callable[[Tensor, int, int], Tensor] | None = None):
        self.n, self.get, self.order = n, get, order

    def __len__(self):
        return self.n


class Backbone:
    """A teacher and what can be made from it. Subclasses set the attributes below in __init__ and give `batches`,
    `examples`, `decode` and `export_module`.

    name: as the user gave it; module: the teacher's network; process, pred: how its output is read;
    shape: one sample [C, H, W]; guidance: default teacher scale w; tap: submodule feeding a GAN head;
    lora_targets: regular expression of the layers that get adapters; time_embeddings: paths of the network's diffusers
    `TimestepEmbedding`s (or sequences of layers that do the same), where a second scalar is added;
    shift: the stock scheduler's k of `times.shifted` (flow matching);
    folds_guidance: the stock pipelines leave guidance alone when the network has `time_cond_proj_dim` (Stable Diffusion);
    stock_call: what a stock call must be told besides the number of steps, e.g. {"guidance_scale": 1.0};
    pipeline_tag: the task of its students on the Hub; style: the LoRA in the teacher's weights (style.add_style), if any;
    bits: of the packed layers of the base (zoo.quantized), 0 where all are as loaded."""

    name: str
    family: str
    module: nn.Module
    process: Process
    pred: Pred
    shape: tuple[int, ...]
    guidance: float
    data: str
    tap = "mid_block"
    part = "unet"             # subfolder of the network in an exported folder
    watched: tuple[int, int] | None = None      # prompts and seeds of each that a run samples to measure (None: as many as pictures take)
    last: str | None = "conv_out"                # the output layer
    patch: tuple[int, ...] = ()                 # of networks whose output layer makes tokens: places of a sample that one covers, per axis
    time_embeddings: tuple[str, ...] = ("time_embedding",)
    shift: float = 1.0
    folds_guidance = False
    stock_call: dict = {}
    pipeline_tag = "unconditional-image-generation"
    style = None
    bits = 0
    takes_guidance = True     # whether there is an unconditional half, or an input for the scale
    storage = Storage()       # where encoded prompts and pictures are kept; a run sets its own
    bf16_on_cpu = False       # whether bf16 autocast is faster on a CPU (measured: convolutional UNets gain, a small MLP loses)
    lora_targets = (r".*(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2|conv_shortcut|conv|"
                    r"time_emb_proj|linear_1|linear_2|cond_proj)")

    def forward(self, module: nn.Module, x: Tensor, timestep: Tensor, cond: dict) -> Tensor:
        """Call the family's network; returns its raw prediction."""
        raise NotImplementedError

    @property
    def teacher(self) -> Denoiser:
        """The frozen teacher: the bare base weights, whatever adapters were added since."""
        return Denoiser(self.module, self.process, self.pred, self.forward)

    def make(self, role: str, *, lora: int = 0, two_time: bool = False, guidance_embedding: bool = False,
             head: bool | Callable[[nn.Module, int], nn.Module] = False, init: str = "", gradient_checkpointing: bool = False,
             frozen: str = "") -> Denoiser:
        """A trainable network that starts as the teacher.

        lora: rank of an adapter on the shared frozen base (0: a full copy); two_time / guidance_embedding: add a second
        scalar input, zero at start; head: GAN head on the mid-block, or a function of the network's output layer and the number of its
        outputs that are one sample (of a place, or a token) that makes a module reading what that layer reads (its `maps` come with
        logits=True, it is trained with the network and never exported);
        init: folder of a student to start from; frozen: regular expression of parameters that are not trained."""
        if two_time and guidance_embedding:
            raise UserError("a network has one extra scalar input: choose two_time or guidance_embedding")
        if two_time and role == "student" and getattr(self.process, "shift", 1.0) != 1:       # its pipeline counts its second time unshifted
            raise UserError("--flow_shift moves the times of one-time students; this method draws its two times itself: leave it out")
        if self.bits and not lora:
            raise UserError(f"the base of {self.name} is kept in {self.bits} bits, which are not trained: give a LoRA rank (--lora 64)")
        module = self.module if lora else copy.deepcopy(self.module)
        slot = "r" if two_time else "guidance" if guidance_embedding else None
        if slot:
            self.add_slot(module)
        if lora:
            add_adapter(module, role, lora, self.lora_targets)
        else:
            module.requires_grad_(True)
        if gradient_checkpointing:
            checkpoint_activations(module)
        if init:
            self.load_student(module, role if lora else None, init, slot)
        if frozen:
            left = [p for n, p in module.named_parameters() if re.search(frozen, n)]
            if not left:
                raise UserError(f"{self.name} has none of the layers that were to be frozen ({frozen}): train all of it")
            for p in left:
                p.requires_grad_(False)
        if callable(head) and self.last is None:
            raise UserError(f"this method adds outputs to the network's last layer, and which one that is in the {self.family} family is not known: "
                            "choose another method (of your own network, set the attribute `last` to its name)")
        if callable(head):
            tap, made, maps = self.last, head(module.get_submodule(self.last), self.shape[0] * math.prod(self.patch)), self.maps
        else:
            tap, made, maps = self.tap, GanHead(*self.head_shape()) if head else None, None
        module.eval()         # dropout and batch statistics stay off in every role; gradients do not depend on the mode
        return Denoiser(module, self.process, self.pred, self.forward, role=role if lora else None,
                        slot=slot, tap=tap, head=made, frozen=frozen, maps=maps)

    def maps(self, out: Tensor, x: Tensor) -> Tensor:
        """What a head on the last layer made, [B, n * C, *space] or of tokens [B, N, n * width], as n samples each: [B, n, *x.shape[1:]].

        Tokens stand in rows from the first on (any more of them are padding); the order within one is the head's own."""
        if not self.patch:
            return out.unflatten(1, (-1, x.shape[1]))
        patch = (1,) * (x.ndim - 2 - len(self.patch)) + tuple(self.patch)
        grid = [n // p for n, p in zip(x.shape[2:], patch)]
        out = out[:, : math.prod(grid)].unflatten(2, (-1, x.shape[1], *patch)).unflatten(1, grid)        # [B, *grid, n, C, *patch]
        d = len(grid)
        places = [axis for i in range(d) for axis in (1 + i, 3 + d + i)]
        return out.permute(0, 1 + d, 2 + d, *places).reshape(len(out), -1, *x.shape[1:])

    @property
    def taps(self) -> list[str]:
        """Submodules feeding a discriminator of several depths, in the order in which they run."""
        return [f"down_blocks.{i}" for i in range(len(getattr(self.module, "down_blocks", ())))] + [self.tap]

    def discriminator(self, told: bool = False) -> Denoiser:
        """Heads at several depths (`taps`) of the frozen teacher network: call `judge`; only the heads are trained.

        told: they are given a number besides. Make it after the roles that copy the teacher's module, since its hooks stay on it."""
        if not all(self.taps):
            raise UserError(f"{self.name} has no submodule to feed a discriminator: give it tap=SUBMODULE")
        shapes = []
        keep = lambda _module, _inputs, out: shapes.append(tuple((out[0] if isinstance(out, tuple) else out).shape[1:]))
        hooks = [self.module.get_submodule(name).register_forward_hook(keep) for name in self.taps]
        x = torch.zeros(1, *self.shape, device=next(self.module.parameters()).device)
        with torch.no_grad():
            self.forward(self.module, x, self.process.timestep(torch.full_like(x.flatten()[:1], 0.5)),
                         {k: v.to(x.device) for k, v in self.examples(1).cond.items()})
        for hook in hooks:
            hook.remove()
        # A role without an adapter of its own reads the bare weights, and owns none of them.
        return Denoiser(self.module, self.process, self.pred, self.forward, role="discriminator", tap=self.taps, head=Heads(shapes, SLOT_DIM * told))

    @property
    def takes_second_scalar(self) -> bool:
        """Whether `make(two_time=True)` is possible: the network has a diffusers time embedding to add a second scalar to."""
        return all(_has(self.module, path) for path in self.time_embeddings)

    def add_slot(self, module: nn.Module) -> None:
        """Give `module` a second scalar input, zero at start, in each of `time_embeddings`; no-op if it has one. `Denoiser` sets it
        through `module.time_embedding`, which on networks that have no such part is a plain attribute (`Slots`) outside the weights."""
        if not self.takes_second_scalar:
            raise UserError(f"{self.name} has no time embedding to add a second scalar to ({', '.join(self.time_embeddings)}): "
                            f"methods of two times and guidance embeddings do not work with the {self.family} family")
        if self.time_embeddings == ("time_embedding",):
            return add_slot(module)
        for path in self.time_embeddings:
            if not hasattr(module.get_submodule(path), "condition"):
                part = module.get_submodule(path)
                module.set_submodule(path, (SlotSequence if isinstance(part, nn.Sequential) else SlotEmbedding)(part))
        module.__dict__["time_embedding"] = Slots([module.get_submodule(path) for path in self.time_embeddings])

    def constant_of_time(self) -> Tensor:
        """[width] combination of the network's time features that is 1 at every timestep. Families whose time embedding has no biases give
        it: a second scalar that is fixed at export stays in the weights through it."""
        raise NotImplementedError

    def student_pipeline(self, module: nn.Module, scheduler):
        """The teacher's own pipeline around another network and scheduler."""
        return type(self.pipe)(**self.pipe.components | {self.part: module, "scheduler": scheduler})

    moved = False             # whether `shift_times` was called

    @property
    def takes_shift(self) -> bool:
        """Whether `shift_times` is possible: the times of a flow-matching teacher."""
        return isinstance(self.process, RectifiedFlow) and self.pred in ("velocity", "flow") and self.family != "video"

    def shift_times(self, k: float) -> None:
        """Count the times of a flow teacher so that uniform draws and evenly spaced knots are moved towards noise by k (`times.shifted`), before
        any role is made. The path, the network and what leaves are the same; the contract's timesteps follow. Raises UserError elsewhere."""
        if not self.takes_shift:
            raise UserError(f"--flow_shift moves the times of flow-matching teachers, and {self.name} ({self.family}) counts its own: leave it out")
        self.process, self.pred, self.moved = RectifiedFlow(k), "flow", True

    def head_shape(self) -> tuple[int, int | None]:
        """(channels, side) of the tapped feature map."""
        raise NotImplementedError

    def batches(self, images: bool = False) -> Source:
        """Training items: cond and uncond, and x0 (data in the network's space) when `images`."""
        raise NotImplementedError

    def examples(self, n: int, seeds: int = 1) -> Examples:
        """n fixed conditions, each repeated `seeds` times in a row."""
        raise NotImplementedError

    def decode(self, x: Tensor) -> Tensor:
        """Samples [B, *shape] to images [B, 3 or 1, H, W] in [-1, 1]."""
        raise NotImplementedError

    def load_student(self, module: nn.Module, role: str | None, folder: str, slot: str | None) -> None:
        """Copy an exported student's weights (folder/unet, or its LoRA file for a LoRA run) into `module`."""
        from ..hub.export import read_record, read_student
        from .checks import refuse_other_prediction
        if read_record(folder)[1]["family"] == self.family:        # of another family: read_student says so
            refuse_other_prediction(self, Path(folder))
        read_student(self, module, role, Path(folder), slot)

    def to(self, device) -> "Backbone":
        self.module.to(device)
        return self


def _has(module: nn.Module, path: str) -> bool:
    try:
        return isinstance(module.get_submodule(path), nn.Module)
    except AttributeError:
        return False


class Slots:
    """The second scalar of a network that embeds its time in other places than `time_embedding`, all set together."""

    def __init__(self, parts: list[SlotEmbedding]):
        self.parts = parts

    @property
    def condition(self) -> Tensor | None:
        return self.parts[0].condition

    @condition.setter
    def condition(self, value: Tensor | None):
        for part in self.parts:
            part.condition = value


class Blocks:
    """Where a discriminator reads a transformer of equal blocks: the middle one, or a quarter, half and three quarters of the way."""

    blocks = "transformer_blocks"
    last = "proj_out"

    @property
    def patch(self) -> tuple[int, int]:
        return 2 * (self.module.config.patch_size,)

    @property
    def tap(self) -> str:
        return f"{self.blocks}.{len(self.module.get_submodule(self.blocks)) // 2}"

    @property
    def taps(self) -> list[str]:
        n = len(self.module.get_submodule(self.blocks))
        return [f"{self.blocks}.{i}" for i in sorted({n * k // 4 for k in (1, 2, 3)})]

    def head_shape(self):
        return self.module.config.num_attention_heads * self.module.config.attention_head_dim, None


def open_pipeline(folder: str, name: str, precision, **parts):
    """The stock pipeline of a folder or Hub id, its weights as plain safetensors or, where it has none, as the fp16 variant that many fine-tunes
    are published as. Raises UserError for what diffusers cannot open."""
    from diffusers import DiffusionPipeline
    options = dict(torch_dtype=precision, use_safetensors=True, **parts)
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, **options)
    except (ValueError, OSError) as error:
        try:
            pipe = DiffusionPipeline.from_pretrained(folder, variant="fp16", **options)
        except (ValueError, OSError):
            raise UserError(f"{name} cannot be opened as a pipeline ({type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:200]}): it needs "
                            "every part its model_index.json names, as safetensors") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Latent(Backbone):
    """A pipeline of diffusers with an autoencoder. A family sets part, family and stock_guidance, calls `open` in its __init__ and gives
    `forward`, `batches` and `examples`."""

    stock_guidance = 7.5
    large_encoders: tuple[str, ...] = ()       # billions of parameters: bf16 on a GPU, as their model cards run them

    def open(self, folder: str, name: str, data: str, guidance: float, **parts) -> None:
        """Load the pipeline, float32 and frozen (`parts` replace components); sets pipe, module, folder, name, data and guidance."""
        self.folder, self.name, self.data = folder, name, data
        self.guidance = guidance or self.stock_guidance
        precision = {"default": torch.float32} | {part: torch.bfloat16 for part in self.large_encoders if torch.cuda.is_available()}
        self.pipe = open_pipeline(folder, name, precision, **parts)
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        self.module = getattr(self.pipe, self.part)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to scaled latents (mode)."""
        vae = self.pipe.vae
        latents = torch.cat([vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode() for part in images.split(32)])
        return (latents.float() - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, x):
        vae = self.pipe.vae
        z = x.float() / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        return torch.cat([vae.decode(part.to(vae.dtype), return_dict=False)[0] for part in z.split(32)]).float().clamp(-1, 1)

    def to(self, device):
        self.pipe.to(device)
        return self


class Prompted(Latent):
    """A text-to-image pipeline: prompts and pictures of --data, encoded by the pipeline's own parts. A family gives `forward` and `conditions`."""

    pipeline_tag = "text-to-image"

    def conditions(self, prompts: list[str]) -> dict[str, Tensor]:
        """What `forward` reads as cond, each [n, ...] in float32, exactly as the stock pipeline encodes the prompts."""
        raise NotImplementedError

    def unconditional(self) -> dict[str, Tensor]:
        """The conditions [1, ...] of the stock pipeline's unguided half."""
        return self.conditions([""])

    any_size = True           # whether the network takes pictures of any shape (buckets)

    @property
    def texts(self):
        """Conditions of prompts, each encoded once (data.feed.Texts)."""
        from ..data.feed import Texts
        if self._texts is None or self._texts.storage != self.storage:
            self._texts = Texts(self)
        return self._texts

    _texts = None

    def batches(self, images=False):
        from ..data.feed import feed
        return feed(self, images)

    def examples(self, n, seeds=1):
        from ..data.feed import some_prompts
        captions = sorted(set(some_prompts(self)))
        pick = torch.randperm(len(captions), generator=torch.Generator().manual_seed(7))[:n].tolist()
        names = [captions[i] for i in pick for _ in range(seeds)]
        cond = {k: v.to(self.module.device) for k, v in self.texts(names).items()}
        return Examples(names, cond, _repeat(self.texts.empty(), len(names)))


def _repeat(cond: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    return {k: v.expand(n, *v.shape[1:]) for k, v in cond.items()}
