"""Optimisers of trainees, all from libraries, and their states as tensors for a checkpoint.

    adamw        torch.optim.AdamW, the fused kernel (one pass over parameter, gradient and states): two states of the parameters' size
    adamw8bit    bitsandbytes.optim.AdamW8bit: two states of one byte a number (parameters below 4096 numbers keep 32 bits)
    adafactor    transformers.optimization.Adafactor: a row and a column per matrix, no momentum, at the absolute rate --lr

`Trainee.own` is what they step: parameters, or this rank's rows of them (zoo/sharding.py)."""
from __future__ import annotations

import torch
from torch import Tensor

from . import sharding
from .errors import UserError

NAMES = ("adamw", "adamw8bit", "adafactor")
NUMBER = "::number"          # ends the name of a state that is a Python number
# Where AdamW's fused kernel is used; the tensor-list implementation (foreach) elsewhere. On a CPU its step takes 0.3
# of the time (benchmarks/training_step, `optimizers`); on a GPU it also needs no memory for intermediate lists, and waits to be measured.
FUSED = {"cpu", "cuda"}


def make(name: str, trainee, device, *, lr: float, betas: tuple[float, float], weight_decay: float, **options) -> torch.optim.Optimizer:
    """The optimiser `name` of a Trainee's own tensors. Raises UserError where its library is missing or it cannot step what it is given."""
    params = list(trainee.own.values())
    cut = any(trainee.own[n] is not p for n, p in trainee.params.items())
    if name == "adamw":
        how = {"fused": True} if all(p.device.type in FUSED for p in params) else {"foreach": True}
        return torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=weight_decay, **how, **options)
    if cut and name in NAMES:
        raise UserError(f"--optimizer {name} keeps states of whole parameters, and FSDP leaves each rank rows of them: use adamw, or train with --lora")
    if name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError("--optimizer adamw8bit needs a package that is not installed: pip install bitsandbytes, or use --optimizer adafactor") from error
        return AdamW8bit(params, lr=lr, betas=betas, weight_decay=weight_decay, **options)
    if name == "adafactor":
        from transformers.optimization import Adafactor
        return Adafactor(params, lr=lr, weight_decay=weight_decay, scale_parameter=False, relative_step=False, warmup_init=False, **options)
    raise UserError(f"unknown --optimizer {name!r}: use {', '.join(NAMES)}")


def state_bytes(name: str, shape: tuple[int, ...], itemsize: int = 4) -> int:
    """Bytes of the states of one parameter, as the library allocates them (counted against it in the tests)."""
    n = 1
    for size in shape:
        n *= size
    if name == "adamw8bit" and n >= 4096:
        return 2 * n + 2 * 4 * -(-n // 256)          # a scale per 256 numbers
    if name == "adafactor":
        return itemsize * (n // shape[-1] + n // shape[-2]) if len(shape) >= 2 else itemsize * n
    return 2 * itemsize * n


def tensors(trainee) -> dict[str, Tensor]:
    """{parameter::state: tensor} of the trainee's optimiser, no two sharing memory; numbers are marked, to come back as numbers."""
    out, seen = {}, set()
    for name, p in trainee.own.items():
        for key, value in trainee.optimizer.state.get(p, {}).items():
            if not torch.is_tensor(value):
                out[f"{name}::{key}{NUMBER}"] = torch.tensor(value)
                continue
            place = value.untyped_storage().data_ptr()
            out[f"{name}::{key}"] = value.clone() if place in seen else value       # bitsandbytes shares its code tables
            seen.add(place)
    return out


def restore(trainee, saved: dict[str, Tensor]) -> None:
    """Put `tensors` back, on any number of ranks."""
    for full, value in saved.items():
        name, key = full.removesuffix(NUMBER).rsplit("::", 1)
        p = trainee.own[name]
        if full.endswith(NUMBER):
            trainee.optimizer.state[p][key] = value.item()
        elif key == "step":              # a tensor of no dimensions, which fused kernels read where the parameter is
            trainee.optimizer.state[p][key] = value.to(p.device) if trainee.optimizer.param_groups[0].get("fused") else value
        else:
            whole = trainee.params[name]
            trainee.optimizer.state[p][key] = (sharding.rows(value, whole) if value.shape == whole.shape else value).to(p.device)
