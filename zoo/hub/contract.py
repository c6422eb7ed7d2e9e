"""The sampling contract: what a student was trained for, written once by the trainer and read by every consumer.

It travels in `scheduler/scheduler_config.json` under `_fewstep` (diffusers carries the key silently through loading and saving),
in `fewstep.json`, on the card and in the registry."""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch

from ..errors import UserError
from ..process import VP, Process

SCHEMA = 1
Sampler = Literal["renoise", "ode", "jump", "unmask", "causal"]
STOCK_GUIDANCE = 7.5      # what a stock Stable Diffusion pipeline uses when nothing is said


@dataclass(frozen=True)
class Contract:
    """How to sample a student.

    sampler: rule between knots (rollout.sample); knots: number of steps -> the stock scheduler's timesteps, noise to data;
    guidance: the value to pass to the stock call; guidance_range: scales a guidance-embedding student was trained on;
    prediction: reading of the network in diffusers' words; scheduler: stock class serving it; lora_scale: weight of the LoRA file;
    layout: causal video students, the fields of rollout_causal.Layout and the shape [F, C, H, W] of the clips it was trained on."""

    knots: dict[int, tuple[float, ...]]
    sampler: Sampler = "renoise"
    guidance: float = 1.0
    prediction: str = "v_prediction"
    scheduler: str = "LCMScheduler"
    dtype: str = "float32"
    lora_scale: float = 1.0
    shift: float = 1.0
    guidance_range: tuple[float, float] | None = None
    layout: dict | None = None
    schema: int = SCHEMA

    def to_json(self) -> dict:
        """Plain data for JSON; keys of `knots` become strings."""
        return asdict(self) | {"knots": {str(k): list(v) for k, v in self.knots.items()},
                               "guidance_range": list(self.guidance_range) if self.guidance_range else None}

    @classmethod
    def from_json(cls, data: dict) -> "Contract":
        """Inverse of `to_json`; keys that are no field are ignored. Raises UserError for another schema."""
        if data.get("schema") != SCHEMA:
            raise UserError(f"this student's contract has schema {data.get('schema')!r} and this version reads {SCHEMA}: upgrade the package")
        known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        known["knots"] = {int(k): tuple(v) for k, v in known["knots"].items()}
        if known.get("guidance_range"):
            known["guidance_range"] = tuple(known["guidance_range"])
        return cls(**known)

    @property
    def steps(self) -> list[int]:
        """Step counts it was trained for, ascending."""
        return sorted(self.knots)

    def check(self, num_inference_steps: int) -> None:
        """Raise UserError unless the student was trained for this many steps."""
        if num_inference_steps not in self.knots:
            raise UserError(f"trained for {', '.join(map(str, self.steps))} step{'s' * (self.steps != [1])}, not {num_inference_steps}")

    def times(self, num_inference_steps: int, process: Process) -> torch.Tensor:
        """The knots as process times [k] (float64), for rollout.sample."""
        self.check(num_inference_steps)
        return process.from_timestep(torch.tensor(self.knots[num_inference_steps], dtype=torch.float64))


def knots_for(times, process: Process, rule: Sampler = "renoise", multiple_of: int = 1) -> dict[int, tuple[float, ...]]:
    """Knots of a student trained at process times `times` (noise to data, e.g. (1, .75, .5, .25)): the whole list and every
    even subsampling of it, so n times give an entry for each divisor of n that is a multiple of `multiple_of` (the phases of a
    student that jumps no further than their ends).

    On VP, timesteps are table rows (integers). With rule "jump" the times of VP are the stock timesteps 1000/n apart, whatever
    process the student was trained in: it knows all times, and only this grid is served by a stock scheduler."""
    n = len(times)
    if not n or any(a <= b for a, b in zip(list(times), list(times)[1:])):
        raise UserError(f"student times {tuple(times)} must fall from noise to data")
    if rule == "jump" and isinstance(process, VP):
        numbers = [process.steps - i * process.steps / n - 1 for i in range(n)]
    else:
        numbers = process.timestep(torch.as_tensor(list(times), dtype=torch.float64)).tolist()
    numbers = [round(x) if isinstance(process, VP) else round(x, 6) for x in numbers]
    return {k: tuple(numbers[:: n // k]) for k in range(n, 0, -1) if n % k == 0 and k % multiple_of == 0}


def scheduler_for(contract: Contract, teacher_config: dict):
    """The stock scheduler that samples by the contract, by configuration alone: LCMScheduler re-noises on its own training grid
    and refuses a larger step count; DDIMScheduler is the deterministic rule. Carries the contract as `_fewstep`.

    Raises UserError when its timesteps would not be the knots, for any step count of the contract."""
    import diffusers

    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    table = {k: teacher_config[k] for k in keys if k in teacher_config}
    common = {**table, "prediction_type": contract.prediction, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1}
    if contract.scheduler == "LCMScheduler":
        # The boundary scalings of consistency models vanish in float at this timestep scaling: c_skip = 0, c_out = 1.
        scheduler = diffusers.LCMScheduler(**common, original_inference_steps=max(contract.knots), timestep_scaling=1e6)
    elif contract.scheduler == "DDIMScheduler":
        scheduler = diffusers.DDIMScheduler(**common, timestep_spacing="trailing")
    else:
        raise UserError(f"no stock configuration of {contract.scheduler} is known: use LCMScheduler (renoise, jump) or DDIMScheduler (ode)")
    for k, knots in contract.knots.items():
        scheduler.set_timesteps(k)
        got = tuple(scheduler.timesteps.tolist())
        # DDIM steps by num_train_timesteps // k, so its last intervals are right only when k divides the table.
        if got != knots or math.fmod(scheduler.config.num_train_timesteps, k):
            raise UserError(f"{contract.scheduler} samples {k} steps at {got}, the student was trained at {knots}: "
                            "use student times evenly spaced from 1, their number dividing 1000 (such as 1, 2, 4, 5 or 8)")
    scheduler.set_timesteps(max(contract.knots))
    scheduler.register_to_config(_fewstep=contract.to_json())
    return scheduler


SCHEDULERS = {"renoise": "LCMScheduler", "jump": "LCMScheduler", "ode": "DDIMScheduler", "unmask": "none", "causal": "FlowMatchLCMScheduler"}


def contract_for(model, times, rule: Sampler = "renoise", process: Process | None = None, multiple_of: int = 1, **fields) -> Contract:
    """The contract of a student of Backbone `model` trained at `times` of `process` (by default the model's; another one is
    mapped by equal angle), checked against the stock scheduler now rather than at export. `fields`: guidance, guidance_range ..."""
    if process is not None and process is not model.process and rule != "jump":
        times = model.process.time(process.angle(torch.as_tensor(list(times), dtype=torch.float64))).tolist()
    prediction = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}.get(model.pred, model.pred)
    contract = Contract(knots_for(times, model.process, rule, multiple_of), rule, prediction=prediction, scheduler=SCHEDULERS[rule], **fields)
    if isinstance(model.process, VP):
        scheduler_for(contract, model.pipe.scheduler.config)
    return contract
