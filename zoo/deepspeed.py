"""DeepSpeed's ZeRO-2 and ZeRO-3, for methods that train one network: each rank keeps its part of the gradients and of Adam's states.

    accelerate launch --config_file train_scripts/accelerate/deepspeed_zero2.yaml train_scripts/train_lcm.py ...

Under ZeRO-2 parameters, averages and the frozen teacher stay whole on every rank, so that networks are called, sampled and exported as on one;
under ZeRO-3 they are in parts too (`Engine3`). DeepSpeed's engine averages gradients over ranks, clips and steps; `Run` keeps the loop,
precision (autocast), micro-batches and files. Checkpoints are those of a run without DeepSpeed. accelerate's own DeepSpeed integration is
passed by: it would cast and wrap the network it prepares."""
from __future__ import annotations

import gc
import importlib.util
import logging
import os
from contextlib import contextmanager
from typing import Callable

import torch
from torch import Tensor, nn

from . import sharding
from .errors import UserError
from .sharding import CONFIGS

INSTEAD = f"use --config_file {CONFIGS}/8gpu_fsdp2.yaml"
BUCKET = 50_000_000          # numbers reduced at once
COPIES = "it copies its student into a second network, parameter by parameter"
REFUSED = sharding.REFUSED | {"progressive": COPIES, "sdtt": COPIES, "arcflow": "it reads parameters past the network's call"}          # under ZeRO-3


# ------------------------------------------------------------------------------------------------------- what was asked for
def asked() -> int:
    """The stage of ZeRO accelerate was configured for; 0 without DeepSpeed."""
    used = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")) if used else 0


def check(cfg) -> None:
    """Raises UserError for what cannot be honoured: settings of accelerate's file, flags, or no DeepSpeed."""
    told = lambda name, *nothing: os.environ.get(f"ACCELERATE_{name}", "none").lower() not in ("none", "auto", *nothing)
    if told("DEEPSPEED_CONFIG_FILE"):
        raise UserError("deepspeed_config_file is not read, a run makes DeepSpeed's settings from its own flags: "
                        f"use --config_file {CONFIGS}/deepspeed_zero2.yaml")
    stage, whole = asked(), f"use {CONFIGS}/deepspeed_zero2.yaml"
    if stage not in ENGINES:
        raise UserError(f"zero_stage {stage} is not supported, only 2 and 3: {whole}")
    if stage == 3 and cfg.method in REFUSED:
        raise UserError(f"{cfg.method} does not run under ZeRO-3: {REFUSED[cfg.method]}; {whole}")
    if stage == 3 and getattr(cfg, "derivative", "") == "jvp":
        raise UserError(f"--derivative jvp does not run under ZeRO-3, whose hooks have no forward mode: use --derivative fd, or {whole}")
    for name in ("OPTIMIZER", "PARAM"):
        if told(f"DEEPSPEED_OFFLOAD_{name}_DEVICE"):
            raise UserError(f"offload_{name.lower()}_device is not supported: leave it out of the file, and save memory with --offload_averages or --lora 64")
    if told("GRADIENT_ACCUMULATION_STEPS", "1"):
        raise UserError("gradient_accumulation_steps of the file is not read: leave it out and give --accumulate")
    if told("GRADIENT_CLIPPING"):
        raise UserError("gradient_clipping of the file is not read: leave it out and give --max_grad_norm")
    if cfg.optimizer != "adamw":
        raise UserError(f"--optimizer {cfg.optimizer} keeps states of whole parameters, and DeepSpeed steps flat parts of them: "
                        f"use adamw, or {CONFIGS}/8gpu_ddp.yaml")
    imported()


def imported() -> None:
    """Import DeepSpeed, before the group of ranks is made: its functions would keep that as a default argument. UserError where it is missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"DeepSpeed is not installed: pip install 'deepspeed>=0.19,<0.20', or {INSTEAD}")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if os.environ.get("DS_ACCELERATOR") == "cpu":        # gloo does: its own sums in shared memory would be compiled at every first run, for a minute
        deepspeed.ops.__compatible_ops__ = {}


def refuse_second(method: str, trained: list[str]) -> None:
    """Raises UserError for a run that trains more than one network (trainees at rate 0 are copies that nothing trains)."""
    if len(trained) > 1:
        raise UserError(f"{method} trains {' and '.join(trained)} here, and DeepSpeed's engine owns one network and its optimiser: {INSTEAD}")


@contextmanager
def hidden():
    """Inside, accelerate does not see that DeepSpeed was asked for: its Accelerator is that of whole networks on many ranks."""
    before = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = before


# ------------------------------------------------------------------------------------------------------- the engine
class Engine:
    """DeepSpeed's engine over the parameters of one Trainee, whose torch.optim.AdamW then steps this rank's part of them, as one flat tensor.

    micro: samples of a micro-batch; accumulate: micro-batches of a step; clip: largest norm of the gradient; teacher: the network of the frozen
    teacher, which ZeRO-3 cuts too. All ranks make the same calls.
    Raises UserError for parameters that are not float32."""

    stage = 2

    def __init__(self, trainee, micro: int, accumulate: int, clip: float, teacher: nn.Module):
        odd = next((n for n, p in trainee.params.items() if p.dtype != torch.float32), None)
        if odd is not None:
            raise UserError(f"{odd} of the {trainee.name} is {trainee.params[odd].dtype}, and under DeepSpeed float32 is trained: "
                            f"load the base in float32, or {INSTEAD}")
        numel = sum(p.numel() for p in trainee.params.values())
        self.trainee, self.accumulate, self.micro = trainee, accumulate, 0
        self.before = {n: set(vars(p)) for n, p in trainee.params.items()}
        self.rank = torch.distributed.get_rank()
        self.bucket = min(BUCKET, numel + numel % 2)
        self.settings = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulate, "gradient_clipping": clip,
                         "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
                         "zero_optimization": {"stage": self.stage, "overlap_comm": False, "contiguous_gradients": True, "round_robin_gradients": False,
                                               "reduce_bucket_size": self.bucket, "allgather_bucket_size": self.bucket,
                                               "stage3_param_persistence_threshold": 0}}
        self._start(teacher)

    def _own(self, modules: nn.Module) -> None:
        """Make DeepSpeed's engine over `modules`; networks are called past it."""
        import deepspeed
        self.engine = deepspeed.initialize(model=modules, optimizer=self.trainee.optimizer, config=self.settings, dist_init_required=False)[0]

    def _start(self, _teacher) -> None:
        import deepspeed
        trainee = self.trainee
        self._own(nn.ParameterList(trainee.params.values()))
        zero = self.engine.optimizer
        [flat], [self.part] = zero.bit16_groups_flat, zero.single_partition_of_fp32_groups
        self.begin = self.rank * self.part.numel()
        size = flat.element_size()
        self.offsets = {n: (p.data_ptr() - flat.data_ptr()) // size for n, p in trainee.params.items()}      # parameters are views of `flat`
        if not all(0 <= at <= flat.numel() - trainee.params[n].numel() for n, at in self.offsets.items()):
            raise RuntimeError(f"DeepSpeed {deepspeed.__version__} does not lay parameters out in one flat tensor")

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch, whose share of the step's loss is `loss`; averaged over ranks and kept in parts."""
        self.micro += 1
        self.engine.set_gradient_accumulation_boundary(self.micro == self.accumulate)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> Tensor:
        """Clip, step, clear; returns the gradient's norm before clipping. A gradient that is not finite changes nothing and has norm inf."""
        self.micro = 0
        for group in self.trainee.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32)

    # --------------------------------------------------------------------------------------------------- checkpoints
    def _mine(self, name: str) -> tuple[slice, slice]:
        """Where this rank's numbers of a parameter are: in the flattened parameter, and in `part`."""
        begin, n = self.offsets[name], self.trainee.params[name].numel()
        low, high = max(begin, self.begin), min(begin + n, self.begin + self.part.numel())
        high = max(low, high)
        return slice(low - begin, high - begin), slice(low - self.begin, high - self.begin)

    def states(self) -> dict[str, Tensor]:
        """{parameter::state: whole tensor} as `optimizers.tensors` has them, on the CPU of the first rank ({} elsewhere). All ranks call it."""
        out = {}
        for name, p in self.trainee.params.items():
            inside, here = self._mine(name)
            for key, value in self.trainee.optimizer.state.get(self.part, {}).items():
                if value.shape == self.part.shape:
                    full = torch.zeros(p.numel(), dtype=value.dtype, device=value.device)
                    full[inside] = value[here]
                    torch.distributed.reduce(full, 0)            # the others' parts are zero: exact
                    value = full.view(p.shape)
                if self.rank == 0:
                    out[f"{name}::{key}"] = value.detach().cpu().clone()
        return out

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Put `states` back, on any number of ranks, after the parameters were. Steps are counted for all parameters together."""
        self.engine.optimizer.refresh_fp32_params()
        state: dict[str, Tensor] = {}
        for full, value in saved.items():
            name, key = full.rsplit("::", 1)
            if value.shape != self.trainee.params[name].shape or key == "step":
                value = value.to(self.part.device)               # where fused kernels read it
                state[key] = torch.maximum(state[key], value) if key in state else value
                continue
            inside, here = self._mine(name)
            state.setdefault(key, torch.zeros_like(self.part, requires_grad=False))[here] = value.flatten()[inside].to(self.part.device)
        optimizer = self.trainee.optimizer
        if optimizer.param_groups[0].get("fused") and "step" in state:          # as in optimizers.restore
            state["step"] = state["step"].to(self.part.device)
        optimizer.state.clear()
        if state:
            optimizer.state[self.part] = state

    # --------------------------------------------------------------------------------------------------- the plan
    def planned(self, role: dict[str, int], state_bytes: Callable[[tuple[int, ...]], int]) -> dict[str, int]:
        """Bytes of a trainee's role (see plan.Estimate) as ZeRO-2 holds them: gradients are this rank's part and the bucket being reduced."""
        size = self.part.element_size()
        return role | {"weights": role["weights"] + size * self.part.numel(), "optimizer": state_bytes(tuple(self.part.shape)),
                       "gradient": size * (self.part.numel() + self.bucket)}

    def release(self) -> None:
        """End the engine and take what it hung on the parameters off them; they keep their values."""
        self.engine.destroy()
        for n, p in self.trainee.params.items():
            for name in vars(p).keys() - self.before[n]:
                delattr(p, name)
        self.engine = None


class Engine3(Engine):
    """The same with parameters in parts, the teacher's too. DeepSpeed's hooks gather what a layer needs while it is called, in whatever role, so that
    all ranks call a network together; zoo/sharding.py reads and writes parts. The trainee's `own` and its averages become this rank's parts."""
    stage = 3

    def _start(self, teacher) -> None:
        self.linear = nn.functional.linear                     # DeepSpeed puts its own there, which keeps no gathered weight for the backward pass
        networks = list(dict.fromkeys((self.trainee.net.module, teacher)))
        for module in networks:
            sharding.mark(module)
        self._own(nn.ModuleList(networks))
        self.trainee.own = {n: nn.Parameter(p.ds_tensor, requires_grad=False) for n, p in self.trainee.params.items()}
        for _, average in self.trainee.averages:
            for n, value in average.items():                              # in place: nets that read it keep reading it
                value.data = sharding.rows(value, self.trainee.params[n]).clone()

    def backward(self, loss: Tensor) -> None:
        self.engine.optimizer.clear_backward_seen_flag()                  # counts micro-batches; left to calls of the engine, there would be none
        super().backward(loss)

    def step(self, lr: float) -> Tensor:
        norm = super().step(lr)
        self.engine.optimizer.grad_partitions_flat_buffer.zero_()         # or a parameter that a step does not use is stepped by its last gradient
        return norm

    def _place(self, name: str) -> tuple[Tensor, slice]:
        """The flat tensor that is stepped for a parameter, and where in it this rank's part is."""
        zero = self.engine.optimizer
        group, begin, n = zero.grad_position[zero.get_param_id(self.trainee.params[name])]
        return zero.fp32_partitioned_groups_flat[group], slice(begin, begin + n)

    def states(self) -> dict[str, Tensor]:
        """{parameter::state: this rank's part}, as `optimizers.tensors` has them under FSDP2."""
        out = {}
        for name in self.trainee.params:
            flat, here = self._place(name)
            for key, value in self.trainee.optimizer.state.get(flat, {}).items():
                out[f"{name}::{key}"] = value[here] if value.shape == flat.shape else value.clone()
        return out

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Put whole states back, on any number of ranks, after the parameters were. Steps are counted for all parameters together."""
        optimizer = self.trainee.optimizer
        optimizer.state.clear()
        for name, p in self.trainee.own.items():                          # DeepSpeed steps a copy
            flat, here = self._place(name)
            flat.data[here] = p.data.flatten()
        for full, value in saved.items():
            name, key = full.rsplit("::", 1)
            p, (flat, here) = self.trainee.params[name], self._place(name)
            state = optimizer.state[flat]
            if value.shape != p.ds_shape or key == "step":
                value = value.to(flat.device) if optimizer.param_groups[0].get("fused") else value          # as in optimizers.restore
                state[key] = torch.maximum(state[key], value) if key in state else value
            else:
                state.setdefault(key, torch.zeros_like(flat, requires_grad=False))[here] = sharding.rows(value, p).to(flat.device)

    def planned(self, role: dict[str, int], state_bytes: Callable[[tuple[int, ...]], int]) -> dict[str, int]:
        """Parts of weights, averages and optimiser are counted already; of weights and gradient a copy is stepped."""
        copy = sum(flat.numel() * flat.element_size() for flat in self.engine.optimizer.fp32_partitioned_groups_flat)
        return role | {"weights": role["weights"] + copy, "gradient": 2 * role["gradient"] + 4 * self.bucket}

    def release(self) -> None:
        """End the engine; parts stay parts, what else it hung on networks goes."""
        from deepspeed.runtime.zero import parameter_offload
        self.engine.destroy()
        for module in self.engine.module.modules():
            module.pre_bwd_fn = module.post_bwd_fn = None
        for p in self.engine.module.parameters():
            for name in vars(p).keys() - {"ds_tensor", "ds_numel", "ds_shape"}:
                delattr(p, name)
        parameter_offload.FWD_MODULE_STACK.remove(self.engine.module)
        self.engine, nn.functional.linear = None, self.linear


ENGINES = {2: Engine, 3: Engine3}


def release_groups() -> None:
    """After the group of ranks was destroyed: drop what DeepSpeed still holds of it (why: sharding.release_groups)."""
    from deepspeed.utils import groups
    getattr(groups, "_release_process_group_references", lambda: None)()
    gc.collect()
    group = lambda v: isinstance(v, torch.distributed.ProcessGroup) or isinstance(v, list) and any(map(group, v))
    for held in gc.get_objects():                                          # what ZeRO-3 of earlier runs of this process left
        if str(type(held).__module__).startswith("deepspeed."):
            for name in [n for n, v in getattr(held, "__dict__", {}).items() if group(v)]:
                held.__dict__[name] = None
