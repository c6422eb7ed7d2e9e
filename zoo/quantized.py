"""`--base_bits 16|8|4`: the frozen base that teacher, student and critic share, kept in few bits; what is trained are adapters beside it.

Packed are the linear layers inside the blocks that a network repeats (down, mid and up stages of a UNet), each by itself when the run begins, as
bitsandbytes packs them: rows of int8 with a scale, or blocks of 64 numbers of 4 bits (NF4, scales of 8 bits). 16 is bfloat16, without a library: what
bf16 autocast computes with anyway, so that such a run's numbers are those of one without the flag (derivatives in time, taken
in float32, are of the rounded weights). Convolutions, norms, biases, time embeddings, the first and the last layer stay as they were loaded: they
are few, or are read and changed by what the methods add. The teacher is then an approximation too; `benchmarks/quantized` says how near.

Packed on loading (`quantization_config` of diffusers) the same layers would need a GPU for every test, and a LoRA could not be merged back exactly.
So they are packed after it, and an exported student holds the weights as they were published, plus its adapter."""
from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError

MARK = "_zoo_packed"
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)        # which peft imports where it is there: it asks for optional CPU kernels, unused here


@dataclass
class Packed:
    """What was packed in one network. layers: their paths; kept: bytes of its parameters and scales now; before: as loaded; error: of the packed
    weights, root mean square relative to theirs; source: (class, folder or Hub id, subfolder) to read the weights from again."""
    bits: int
    layers: list[str]
    error: float
    before: int
    kept: int
    source: tuple[type, str, str]

    def holds(self, name: str) -> bool:
        """Whether the entry `name` of a state dict belongs to a packed layer."""
        return name.startswith(tuple(f"{path}." for path in self.layers))

    def published(self) -> dict[str, Tensor]:
        """Weights and biases of the packed layers as the teacher's files have them, float32 on the CPU."""
        kind, folder, part = self.source
        options = dict(subfolder=part, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True)      # a Hub id: what was read before
        try:
            network = kind.from_pretrained(folder, **options)
        except (OSError, ValueError):
            network = kind.from_pretrained(folder, variant="fp16", **options)
        return {k: v for k, v in network.state_dict().items() if self.holds(k)}


def of(module: nn.Module) -> Packed | None:
    """What is packed in `module`."""
    return module.__dict__.get(MARK)


# ------------------------------------------------------------------------------------------------------------ before it
def check(cfg, model, cut: bool) -> None:
    """Raises UserError where --base_bits cannot be honoured. cut: whether FSDP or DeepSpeed own the parameters."""
    flag = f"--base_bits {cfg.base_bits}"
    if not cfg.lora:
        raise UserError(f"{flag} keeps a frozen base in few bits, and weights that are trained are not frozen: add --lora 64, or leave it out")
    if not (getattr(model, "pipe", None) is not None and getattr(model, "folder", "")):
        raise UserError(f"{flag} packs the network of a diffusers folder or Hub id, which {model.name} is not: leave it out")
    if cut:
        raise UserError(f"{flag}: packed weights cannot be cut over ranks: use train_scripts/accelerate/8gpu_ddp.yaml, or leave it out")
    if cfg.teacher_lora:
        raise UserError(f"{flag}: the style's scale is moved in the weights to measure how the student stacks, and packed weights do not move: fuse "
                        f"{cfg.teacher_lora} into a folder (pipe.fuse_lora, pipe.unload_lora_weights, pipe.save_pretrained) and give that as --teacher")
    if cfg.compile:
        raise UserError(f"{flag}: --compile was never tried on packed layers: leave one of the two out")
    if cfg.base_bits == 16:
        return
    if getattr(cfg, "derivative", "") == "jvp":
        raise UserError(f"{flag}: packed layers have no forward-mode derivative: use --derivative fd, or leave it out")
    library()


def library():
    """bitsandbytes. Raises UserError where it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("--base_bits 8 and 4 need a package that is not installed: pip install 'bitsandbytes>=0.46', or use --base_bits 16") from error
    return bitsandbytes


# ------------------------------------------------------------------------------------------------------------ packing
def layers(module: nn.Module, apart: tuple[str, ...] = ()) -> list[str]:
    """Paths of the linear layers of `module` that are packed: those inside its lists of blocks and its mid block, but not under `apart`."""
    inside = tuple(f"{path}." for path, part in module.named_modules() if isinstance(part, nn.ModuleList) or path == "mid_block")
    left = tuple(f"{path}." for path in apart)
    return [path for path, part in module.named_modules() if type(part) is nn.Linear and path.startswith(inside) and not f"{path}.".startswith(left)]


@torch.no_grad()
def quantize(model, bits: int, device, dtype: torch.dtype = torch.float32) -> None:
    """Pack the base of Backbone `model` into `bits` (16, 8 or 4; 0: nothing) on `device`, before any role is made of it.

    dtype: what its layers compute in under mixed precision (float32 without); biases are kept in it. A base that has these bits already is left
    alone; raises UserError for one that has others, that has adapters, or that has no layers to pack."""
    module, held = model.module, getattr(model, "bits", 0)
    if bits == held:
        return
    if held or any(".lora_" in name for name, _ in module.named_parameters()):
        raise UserError(f"the base of {model.name} {f'is kept in {held} bits' if held else 'has adapters'} already: load it anew for "
                        + (f"--base_bits {bits}" if bits else "a run without --base_bits"))
    found = layers(module, model.time_embeddings)
    if not found:
        raise UserError(f"--base_bits {bits}: {type(module).__name__} has no linear layers in its blocks, which is what is packed: leave it out")
    bnb, before, change, size = None if bits == 16 else library(), weight_bytes(module), 0.0, 0.0
    for path in found:
        whole = module.get_submodule(path)
        packed = Half(whole, device) if bits == 16 else _four(bnb, whole, device, dtype) if bits == 4 else _eight(bnb, whole, device, dtype)
        weight = whole.weight.to(device).float()
        change, size = change + float((values(packed).float() - weight).square().sum()), size + float(weight.square().sum())
        module.set_submodule(path, packed.train(whole.training))
    if bits < 16:
        setattr(module, f"is_loaded_in_{bits}bit", True)     # by which peft chooses its adapters' layers
    model.bits = bits
    module.__dict__[MARK] = Packed(bits, found, (change / max(size, 1e-30)) ** 0.5, before, weight_bytes(module), (type(module), str(model.folder), model.part))


class Half(nn.Linear):
    """A linear layer whose weight is held in bfloat16, its bias as it was, and which computes in what a plain one would."""

    def __init__(self, whole: nn.Linear, device):
        super().__init__(whole.in_features, whole.out_features, whole.bias is not None, device="meta")
        self.weight = nn.Parameter(whole.weight.to(device, torch.bfloat16), requires_grad=False)
        if whole.bias is not None:
            self.bias = nn.Parameter(whole.bias.to(device), requires_grad=False)

    def forward(self, x):
        kind = _precision(x)
        return F.linear(x.to(kind), self.weight.to(kind), None if self.bias is None else self.bias.to(kind))


def _four(bnb, whole: nn.Linear, device, dtype):
    layer = _classes(bnb)[4](whole.in_features, whole.out_features, whole.bias is not None, quant_type="nf4", device="meta")
    # As one row: on a CPU the library (0.50.2) unpacks blocks wrongly that go over the end of a row.
    layer.weight = bnb.nn.Params4bit(whole.weight.to(dtype).reshape(1, -1), requires_grad=False, quant_type="nf4", module=layer).to(device)
    return _biased(layer, whole, device, dtype)


def _eight(bnb, whole: nn.Linear, device, dtype):
    layer = _classes(bnb)[8](whole.in_features, whole.out_features, whole.bias is not None, has_fp16_weights=False, device="meta")
    codes, scale, _ = bnb.functional.int8_vectorwise_quant(whole.weight.to(device, torch.float16))
    layer.weight = nn.Parameter(codes, requires_grad=False)
    layer.register_buffer("scale", scale, persistent=False)           # of each row
    return _biased(layer, whole, device, dtype)


def _biased(layer, whole, device, dtype):
    if whole.bias is not None:
        layer.bias = nn.Parameter(whole.bias.to(device, dtype, copy=True), requires_grad=False)
    return layer


def values(layer) -> Tensor:
    """The weights [out, in] that a packed layer computes with."""
    if isinstance(layer, Half):
        return layer.weight.data
    from bitsandbytes import functional
    if isinstance(layer, _made[8]):
        return functional.int8_vectorwise_dequant(layer.weight.data, layer.scale)
    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).reshape(layer.out_features, layer.in_features)


def _precision(x: Tensor) -> torch.dtype:
    """What a plain linear layer would compute `x` in here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Product(torch.autograd.Function):
    """x [..., in] times the weights of a packed layer. Nothing but the layer is kept for the backward pass, which unpacks it again. (The library's
    own product of 8 bits also rounds what it reads, which no difference of nearby values survives, and keeps it past activation checkpointing; that of
    4 bits lays the weights out anew on some CPUs for calls without gradient, and the next call with one would read them wrongly.)"""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, values(layer).to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ values(ctx.layer).to(grad.dtype), None


_made: dict[int, type] = {}


def _classes(bnb) -> dict[int, type]:
    """The library's layers, by which peft knows what it adapts, with the product above: {4: class, 8: class}."""
    if not _made:
        def forward(self, x):
            out = _Product.apply(x.to(_precision(x)), self)
            return out if self.bias is None else out + self.bias.to(out.dtype)
        _made.update({4: type("Linear4", (bnb.nn.Linear4bit,), {"forward": forward}), 8: type("Linear8", (bnb.nn.Linear8bitLt,), {"forward": forward})})
    return _made


# ------------------------------------------------------------------------------------------------------------ afterwards
def weight_bytes(module: nn.Module) -> int:
    """Bytes of the parameters of `module`, packed ones with their scales and code tables."""
    return sum(p.numel() * p.element_size() for p in module.parameters()) + scale_bytes(module)


def scale_bytes(module: nn.Module) -> int:
    """Bytes of what packed layers keep beside their codes, which is no parameter."""
    found: dict[int, int] = {}
    for layer in module.modules():
        if not isinstance(layer, tuple(_made.values())):
            continue
        if isinstance(layer, _made[8]):
            parts = [layer.scale]
        else:
            state = layer.weight.quant_state
            parts = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        found |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parts}
    return sum(found.values())


def said(model) -> str:
    """One line about what was packed."""
    p = of(model.module)
    unit, name = (1024**3, "GB") if p.before > 1024**3 else (1024**2, "MB")
    return (f"base of {model.name} in {p.bits} bits: {len(p.layers)} linear layers, {p.kept / unit:.2f} {name} instead of {p.before / unit:.2f} {name}; "
            f"packed weights differ by {p.error:.1%} (root mean square): teacher, samples and measurements of this run are the packed network's")
