"""FSDP2: networks cut over ranks, for what one GPU does not hold together with its gradients and optimiser.

    accelerate launch --config_file train_scripts/accelerate/8gpu_fsdp2.yaml train_scripts/train_dmd.py ...

What is cut depends on the run:

    full weights    every trainee's own copy, with its gradients, optimiser states and averages, and the frozen teacher
    LoRA            the one frozen base; adapters are small, whole on every rank and averaged over ranks as without sharding

A rank holds rows of each parameter (`torch.chunk` along the first axis). Calling a cut network gathers it block by block, which all ranks
must do together: every rank makes the same calls in the same order (`together`). Files hold whole tensors, so that a checkpoint does not
know how many ranks wrote it. The first FSDP is refused: it flattens what trainees share. DeepSpeed, for methods with one trainee, is in
zoo/deepspeed.py; what its ZeRO-3 cut is read here as well: a rank holds one of equal pieces of each flattened parameter, the last one padded."""
from __future__ import annotations

import copy
import gc
import os
from contextlib import contextmanager
from typing import Iterable

import torch
from torch import Tensor, nn

from .errors import UserError

CONFIGS = "train_scripts/accelerate"
# Methods whose ranks make different numbers of calls, and would wait for one another for ever.
REFUSED = {"twinflow": "it calls the network only on ranks whose batch holds samples of a kind",
           "self_forcing": "its chunk-by-chunk rollout keeps and reads keys and values outside the network's own call"}


# ------------------------------------------------------------------------------------------------------- what was asked for
def asked() -> bool:
    """Whether accelerate was configured for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")


def settings(method: str):
    """accelerate's FSDP plugin, as the configuration filled it. Raises UserError for what cannot be honoured."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    instead = f"use {CONFIGS}/8gpu_fsdp2.yaml"
    if method in REFUSED:
        raise UserError(f"{method} does not run under FSDP: {REFUSED[method]}; use {CONFIGS}/8gpu_ddp.yaml with --lora 64 or --gradient_checkpointing")
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"FSDP of version {version} flattens parameters that trainees share: set fsdp_version: 2, or {instead}")
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"      # on by default, it leaves other ranks' encoders without their weights
    plugin = FullyShardedDataParallelPlugin()
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() in ("true", "1"):
        raise UserError(f"fsdp_offload_params is not supported: {instead}, and --offload_averages or --optimizer adamw8bit to save memory")
    if plugin.activation_checkpointing:
        raise UserError("fsdp_activation_checkpointing recomputes with the wrong adapter: switch it off and give --gradient_checkpointing")
    return plugin


# ------------------------------------------------------------------------------------------------------- cutting a network
def blocks(module: nn.Module, names: Iterable[str] = ()) -> list[nn.Module]:
    """What is gathered at once: modules of the classes `names`, or else the members of the outermost `ModuleList`s."""
    if names:
        return [m for m in module.modules() if type(m).__name__ in names and m is not module]
    found: list[nn.Module] = []

    def look(parent):
        for child in parent.children():
            if isinstance(child, nn.ModuleList):
                found.extend(m for m in child if any(True for _ in m.parameters()))
            else:
                look(child)
    look(module)
    return found


def cut(module: nn.Module, plugin, device, whole: set[nn.Parameter] = frozenset()) -> None:
    """Cut `module` over all ranks, the parameters in `whole` excepted (they stay as they are).

    Raises UserError for quantised weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mark(module)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    common = dict(mesh=mesh, ignored_params=set(whole))
    names = plugin.transformer_cls_names_to_wrap or ()
    for block in reversed(blocks(module, names)):          # inner ones first
        fully_shard(block, reshard_after_forward=plugin.reshard_after_forward, **common)
    fully_shard(module, reshard_after_forward=False, **common)      # heads may go back through it without touching its output
    for part in _parts(module):
        if device.type == "cpu":
            part.set_force_sum_reduction_for_comms(True)            # gloo cannot average


def mark(module: nn.Module) -> None:
    """Note that `module` is about to be cut, and its outline. Raises UserError for quantised weights."""
    odd = next((n for n, p in module.named_parameters() if not p.is_floating_point() or type(p.data) is not Tensor), None)
    if odd is not None:
        raise UserError(f"the quantised weights of {odd} cannot be cut over ranks: use {CONFIGS}/8gpu_ddp.yaml, or load the base unquantised")
    module.__dict__["_zoo_outline"] = _outline(module)
    module.__dict__["_zoo_cut"] = True


def _outline(module: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes and no data, for `assembled`."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo)


def _parts(module: nn.Module) -> list:
    from torch.distributed.fsdp import FSDPModule
    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def is_cut(module: nn.Module) -> bool:
    return "_zoo_cut" in module.__dict__


def together(net) -> bool:
    """Whether all ranks must call `net` (or what a Trainee or View calls) together, in equal numbers of calls."""
    while "net" in getattr(net, "__dict__", {}):
        net = net.net
    module = getattr(net, "module", None)
    return module is not None and is_cut(module)


def of_rows(module: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether `weights` are this rank's rows of the parameters of those names (FSDP2 leaves adapters whole, ZeRO-3 cuts them too)."""
    p = module.get_parameter(next(iter(weights)))
    return own(p) is not p


def called(net, going: Tensor) -> Tensor | None:
    """Which rows of a batch to call `net` on, those of `going` [B] being wanted: None when there are none. A cut network is called all the same,
    on one row, since other ranks may want some; its result is of length 1 and vanishes in an assignment to no rows."""
    if going.any():
        return going
    return torch.arange(len(going), device=going.device) == 0 if together(net) else None


def settle(module: nn.Module) -> None:
    """Drop gathered parameters, so that the next call reads this rank's present values and flags."""
    for part in _parts(module) if is_cut(module) else []:
        part.reshard()
    for p in module.parameters():
        if flat(p) and p.numel():
            p.partition()


def rest(module: nn.Module) -> None:
    """`settle`, between updates: forget the calls that no backward pass followed too."""
    settle(module)
    if is_cut(module) and hasattr(module, "reset_iter_state") and module._get_fsdp_state()._is_root:       # None before its first call
        module.reset_iter_state()


def release_groups() -> None:
    """After the group of ranks was destroyed: drop what cut networks and torch's caches still hold of it. Threads of gloo end with the last
    reference; those alive when the interpreter ends abort the process now and then."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo

    for held in gc.get_objects():
        if isinstance(held, DeviceMesh):
            held.__dict__.get("_pg_registry", {}).clear()
        elif isinstance(held, FSDPMeshInfo):
            held.shard_process_group = None


# ------------------------------------------------------------------------------------------------------- tensors
def own(p: Tensor) -> Tensor:
    """This rank's rows of a parameter or gradient (without graph, same memory); the tensor itself when it is whole."""
    return p.ds_tensor if flat(p) else p.detach().to_local() if _spread(p) else p


def _spread(p: Tensor) -> bool:
    return getattr(p, "device_mesh", None) is not None


def flat(p: Tensor) -> bool:
    """Whether ZeRO-3 cut it."""
    return hasattr(p, "ds_tensor")


def count(p: Tensor) -> int:
    """Numbers of the whole parameter."""
    return p.ds_numel if flat(p) else p.numel()


def rows(value: Tensor, p: Tensor) -> Tensor:
    """This rank's rows of the whole tensor `value`, as parameter `p` is cut."""
    if flat(p):
        n, rank = p.ds_tensor.numel(), torch.distributed.get_rank()
        part = value.flatten()[rank * n : (rank + 1) * n]
        return nn.functional.pad(part, (0, n - part.numel()))
    if not _spread(p):
        return value
    chunks, rank = value.chunk(p.device_mesh.size()), p.device_mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else value[:0]


def whole_state(value: Tensor, p: Tensor) -> Tensor:
    """`whole` of a parameter or of an optimiser's state for it; states of other shapes than the rows (step counts) are equal on all ranks."""
    return whole(value, p) if own(p) is not p and value.shape == own(p).shape and value.ndim else value


def whole(part: Tensor, p: Tensor) -> Tensor:
    """The whole tensor of which the ranks hold `part`, cut as parameter `p` is. All ranks call it."""
    if flat(p):
        pieces = [part.new_empty(part.shape, device=p.device) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(pieces, part.to(p.device))
        return torch.cat(pieces)[: p.ds_numel].view(p.ds_shape)
    if not _spread(p):
        return part
    from torch.distributed.tensor import DTensor
    spread = DTensor.from_local(part.to(p.device), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
    return spread.full_tensor()


def norm(grads: dict[str, Tensor], params: dict[str, Tensor]) -> Tensor:
    """Two-norm of a gradient of which this rank holds `grads`, each cut as its parameter is. All ranks call it."""
    square = lambda names: sum((grads[n].float().square().sum() for n in names), torch.zeros((), device=next(iter(grads.values())).device))
    there = square(n for n in grads if _spread(params[n]))
    torch.distributed.all_reduce(there)
    return (there + square(n for n in grads if not _spread(params[n]))).sqrt()


@contextmanager
def holding(module: nn.Module, weights: dict[str, Tensor]):
    """Inside, the cut `module` has the values `weights` (this rank's rows, by name). Without gradients: a backward pass would gather the
    values that come back afterwards."""
    if torch.is_grad_enabled():
        raise RuntimeError("an average of a cut network is read under torch.no_grad only")
    settle(module)
    params = dict(module.named_parameters())
    mine = {n: own(params[n]) for n in weights}
    before = {n: v.clone() for n, v in mine.items()}
    for n, v in mine.items():
        v.copy_(weights[n])
    try:
        yield
    finally:
        settle(module)
        for n, v in mine.items():
            v.copy_(before[n])


def assembled(net, lead: bool):
    """`net` (a Denoiser or a View of one) with whole weights on the CPU, for export: on the leading rank, None elsewhere. All ranks call it."""
    inner = getattr(net, "net", net)
    settle(inner.module)
    state = {}
    weights = inner.weights or {}
    for n, p in inner.module.named_parameters(remove_duplicate=False):
        value = whole(weights.get(n, own(p)), p).detach()
        if lead:
            state[n] = value.cpu().clone()
    if not lead:
        return None
    other = object.__new__(type(inner))
    other.__dict__.update(inner.__dict__)
    other.module, other.weights = copy.deepcopy(inner.module.__dict__["_zoo_outline"]), None
    other.module.load_state_dict(state, strict=False, assign=True)
    return type(net)(other, net.process) if inner is not net else other


@contextmanager
def outlined(model):
    """Inside, the teacher's network is its outline, of the stock class and with its config: what writing a folder needs of it."""
    module = model.module
    model.module = module.__dict__.get("_zoo_outline", module)
    try:
        yield
    finally:
        model.module = module
