"""`--compile`: torch.compile for the blocks that a network repeats, in place, so that no name of a parameter or module changes.

What is compiled is a block's own call, nothing around it: adapters are switched outside (`denoiser.role_active`) and activation checkpointing
wraps the block, so that one and the same compiled call serves teacher, student and critic. torch guards on what a call read, the layers' active
adapter included: another role, grad mode, precision or batch shape gets code of its own the first time it is seen (seconds to a minute each).

Left as they are: blocks that a hook reads or sits in (GAN taps), calls inside a forward-mode derivative, copies made afterwards."""
from __future__ import annotations

import importlib.util
import os
import shutil
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd import forward_ad

from . import sharding
from .errors import UserError

MARK = "_zoo_compiled"
# Kinds of call one block may see before torch falls back to the plain one: roles x grad modes x widths x batch sizes. torch's own limit is 8.
LIMIT = 128
REFUSED = {"self_forcing": "its blocks read and write a cache of keys and values between calls"}


def check(cfg, cut: bool, device) -> None:
    """Raises UserError where `--compile` cannot be honoured. cut: whether FSDP or DeepSpeed own the parameters."""
    if cut:
        raise UserError("--compile is not supported under FSDP and DeepSpeed, whose hooks sit in the blocks it would compile: leave it out, or use "
                        f"{sharding.CONFIGS}/8gpu_ddp.yaml")
    if cfg.method in REFUSED:
        raise UserError(f"--compile does not fit {cfg.method}: {REFUSED[cfg.method]}; leave it out")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs Triton on a GPU: pip install triton, or leave it out")
    if device.type == "cpu" and not has_compiler():
        raise UserError("--compile needs a C++ compiler on a CPU: install g++ (or name one in CXX), or leave it out")


def has_compiler() -> bool:
    """Whether torch finds a C++ compiler to build CPU code with."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks of `module` to compile: those that its diffusers class names as repeated, or else the members of its outermost lists of blocks;
    without those that a hook reads. Raises UserError where there are none."""
    names = getattr(module, "_repeated_blocks", None) or ()
    # Stages of a UNet are unequal, and checkpoint inside themselves: they are no blocks.
    found = sharding.blocks(module, names) if names or not hasattr(module, "down_blocks") else []
    if not found:
        raise UserError(f"--compile: {type(module).__name__} has no blocks that repeat, which is what is compiled: leave it out")
    return [b for b in found if not any(m._forward_hooks or m._forward_pre_hooks for m in b.modules())]


def networks(run, **options) -> int:
    """Compile the networks of a Run, after every role was made and before its first step; `options` go to torch.compile. Returns how many
    blocks were compiled. Raises UserError for a network without any."""
    every = {id(m): m for m in (run.model.module, *(t.net.module for t in run.trainees.values()))}
    return sum(compile_blocks(m, **options) for m in every.values() if isinstance(m, nn.Module))


def compile_blocks(module: nn.Module, **options) -> int:
    """Compile the blocks of one network in place; returns how many."""
    found = blocks(module)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LIMIT)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 8 * LIMIT)
    for block in found:
        block.compile(**options)
    module.__dict__[MARK] = True
    return len(found)


@contextmanager
def fitting(module: nn.Module):
    """Around a call of `module`: inside a forward-mode derivative (torch.func.jvp, for which compiled code has no rules) the plain blocks run."""
    if MARK in module.__dict__ and forward_ad._current_level >= 0:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
