"""The sampling contract: what a student was trained for, written once by the trainer and read by every consumer.

It travels in `scheduler/scheduler_config.json` under `_fewstep` (diffusers carries the key silently through loading and saving),
in `fewstep.json`, on the card and in the registry. Reading one needs no torch."""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Literal, get_args

from ..errors import UserError

if TYPE_CHECKING:
    import torch

    from ..process import Process

SCHEMA = 2
Sampler = Literal["renoise", "ode", "jump", "tcd", "unmask", "causal"]
STOCK_GUIDANCE = 7.5      # what a stock Stable Diffusion pipeline uses when nothing is said
GRID_ARGUMENTS = ("sigmas", "timesteps")          # of a stock call: they name the times, and mean nothing for another number of steps
CALL = {*GRID_ARGUMENTS, "eta", "guidance_scale", "true_cfg_scale", "max_sequence_length", "height", "width", "num_frames"}    # what `call` may hold
FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "FlowMapEulerDiscreteScheduler"}


@dataclass(frozen=True)
class Contract:
    """How to sample a student.

    sampler: rule between knots (rollout.sample; "tcd": a deterministic move past the next knot, then noise back up to it);
    knots: number of steps -> the stock scheduler's timesteps, noise to data; guidance: the value to pass to the stock call;
    guidance_range: scales a guidance-embedding student was trained on; prediction: reading of the network in diffusers' words;
    scheduler: stock class serving it; dtype: what it is opened in; lora_scale: weight of the LoRA file; shift: of a flow scheduler;
    grid: who makes the stock timesteps, the "scheduler" from the number of steps, or the "pipeline", which hands linspace(1, 1/k, k) to it;
    call: number of steps -> what a stock call must be given besides that number (sigmas, eta), where a plain one would be wrong;
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
    grid: Literal["scheduler", "pipeline"] = "scheduler"
    call: dict[int, dict] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> dict:
        """Plain data for JSON; keys of `knots` and `call` become strings."""
        return asdict(self) | {"knots": {str(k): list(v) for k, v in self.knots.items()}, "call": {str(k): dict(v) for k, v in self.call.items()},
                               "guidance_range": list(self.guidance_range) if self.guidance_range else None}

    @classmethod
    def from_json(cls, data: dict) -> "Contract":
        """Inverse of `to_json`, older schemas included (`MIGRATIONS`); keys that are no field are ignored. Raises UserError for a newer schema."""
        try:
            data = migrated(data)
            known = {f.name: data[f.name] for f in fields(cls) if f.name in data}
            known["knots"] = {int(k): tuple(v) for k, v in known["knots"].items()}
            known["call"] = {int(k): dict(v) for k, v in known["call"].items()}
            if known.get("guidance_range"):
                known["guidance_range"] = tuple(map(float, known["guidance_range"]))
            contract = cls(**known)
            complaint = contract._complaint()
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"this student's contract cannot be read ({type(error).__name__}: {error}): export it again") from error
        if complaint:
            raise UserError(f"this student's contract {complaint}, which no export writes: export it again, or do not trust it")
        return contract

    def _complaint(self) -> str | None:
        """What no trainer would have written: a contract may come from a stranger's repository, and its values reach a call."""
        if not self.knots or any(k < 1 or len(v) != k or any(a <= b for a, b in zip(v, v[1:])) for k, v in self.knots.items()):
            return f"has knots {self.knots}"
        if self.sampler not in get_args(Sampler):
            return f"has the sampler {self.sampler!r}"
        if self.sampler == "causal" and not (isinstance(self.layout, dict) and {"shape", "chunk", "sink", "window", "slots"} <= self.layout.keys()):
            return f"has the layout {self.layout!r}"
        if self.dtype not in ("float32", "float16", "bfloat16"):
            return f"has the dtype {self.dtype!r}"
        numbers = [self.guidance, self.lora_scale, self.shift, *(self.guidance_range or ()), *(x for v in self.knots.values() for x in v)]
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
            return f"holds a number that is none ({numbers})"
        if strange := sorted({key for told in self.call.values() for key in told} - CALL):
            return f"tells its calls {', '.join(map(str, strange))}"
        return None

    @property
    def steps(self) -> list[int]:
        """Step counts it was trained for, ascending."""
        return sorted(self.knots)

    def check(self, num_inference_steps: int) -> None:
        """Raise UserError unless the student was trained for this many steps."""
        if num_inference_steps not in self.knots:
            raise UserError(f"{self._trained()}, not {num_inference_steps}")

    def times(self, num_inference_steps: int, process: Process) -> torch.Tensor:
        """The knots as process times [k] (float64), for rollout.sample."""
        import torch
        self.check(num_inference_steps)
        return process.from_timestep(torch.tensor(self.knots[num_inference_steps], dtype=torch.float64))

    def times_for(self, num_inference_steps: int, process: Process) -> torch.Tensor:
        """`times` of a count it was trained for; of another count k, k times spaced as the knots are (even, or even and shifted), for pipelines
        that warn and do as they are told. Raises UserError where the knots are spaced by no such rule, or for no steps at all."""
        import torch

        from ..process import VP
        k, most = num_inference_steps, max(self.knots)
        if k in self.knots:
            return self.times(k, process)
        if k < 1:
            raise UserError(f"num_inference_steps={k}: give at least 1 ({self._trained()})")
        if isinstance(process, VP):
            knots = [round(process.steps * (1 - i / k)) - 1 for i in range(k)]
            rule = [round(process.steps * (1 - i / most)) - 1 for i in range(most)]
        else:
            s = flow_shift(self.knots[most]) or 1.0
            shifted = lambda u: 1000 * s * u / (1 + (s - 1) * u)
            knots, rule = [shifted(u) for u in even(k)], [shifted(u) for u in even(most)]
        if max(abs(a - b) for a, b in zip(rule, self.knots[most])) > 0.51:
            raise UserError(f"{self._trained()}, at times ({', '.join(f'{x:g}' for x in self.knots[most])}) that give no grid of {k}")
        return process.from_timestep(torch.tensor(knots, dtype=torch.float64))

    def _trained(self) -> str:
        return f"trained for {', '.join(map(str, self.steps))} step{'s' * (self.steps != [1])}"

    def stock_call(self, num_inference_steps: int) -> dict:
        """Arguments that make a stock pipeline sample this many steps as trained."""
        self.check(num_inference_steps)
        return {"num_inference_steps": num_inference_steps, **self.call.get(num_inference_steps, {})}

    @property
    def raises(self) -> bool:
        """Whether the stock scheduler refuses more steps than were trained: then the default call of a stock pipeline cannot be quietly wrong."""
        return self.scheduler in ("LCMScheduler", "TCDScheduler")


def _from_1(data: dict) -> dict:
    """Schema 1 knew no students whose stock call needs more than the number of steps."""
    return data | {"grid": "scheduler", "call": {}}


MIGRATIONS = {1: _from_1}      # schema -> function to the next one


def migrated(data: dict) -> dict:
    """A contract's data in the present schema. Raises UserError for a newer one, or none."""
    schema = data.get("schema")
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        raise UserError(f"this student's contract has schema {schema!r} and this version reads 1 to {SCHEMA}: upgrade the package")
    for old in range(schema, SCHEMA):
        data = MIGRATIONS[old](data) | {"schema": old + 1}
    return data


def knots_for(times, process: Process, rule: Sampler = "renoise", multiple_of: int = 1) -> dict[int, tuple[float, ...]]:
    """Knots of a student trained at process times `times` (noise to data, e.g. (1, .75, .5, .25)): the whole list and every
    even subsampling of it, so n times give an entry for each divisor of n that is a multiple of `multiple_of` (the phases of a
    student that jumps no further than their ends).

    On VP, timesteps are table rows (integers). With rule "jump" the times of VP are the stock timesteps 1000/n apart, whatever
    process the student was trained in: it knows all times, and only this grid is served by a stock scheduler."""
    import torch

    from ..process import VP
    n = len(times)
    if not n or any(a <= b for a, b in zip(list(times), list(times)[1:])):
        raise UserError(f"student times {tuple(times)} must fall from noise to data")
    if rule == "jump" and isinstance(process, VP):
        numbers = [process.steps - i * process.steps / n - 1 for i in range(n)]
    else:
        numbers = process.timestep(torch.as_tensor(list(times), dtype=torch.float64)).tolist()
    numbers = [round(x) if isinstance(process, VP) else round(x, 6) for x in numbers]
    return {k: tuple(numbers[:: n // k]) for k in range(n, 0, -1) if n % k == 0 and k % multiple_of == 0}


# ------------------------------------------------------------------------------------------------------- stock schedulers
def scheduler_for(contract: Contract, teacher_config: dict):
    """The stock scheduler that samples by the contract, by configuration alone, carrying it as `_fewstep`.

    VP: LCMScheduler re-noises on its own training grid and refuses a larger step count; TCDScheduler with call-time eta; DDIMScheduler
    is the deterministic rule. Flow: FlowMatchLCMScheduler re-noises; FlowMatchEulerDiscreteScheduler and FlowMapEulerDiscreteScheduler
    (whose own grid is even) are the deterministic rule. Raises UserError when its timesteps would not be the knots, for any step count."""
    scheduler = _flow_scheduler(contract) if contract.scheduler in FLOW else _vp_scheduler(contract, teacher_config)
    complaint = disagreement(scheduler, contract)
    # DDIM steps by num_train_timesteps // k, so its last intervals are right only when k divides the table.
    uneven = [k for k in contract.knots if contract.scheduler not in FLOW and math.fmod(scheduler.config.num_train_timesteps, k)]
    if complaint or uneven:
        raise UserError(f"{complaint or f'{contract.scheduler} has no {uneven[0]} even steps'}: "
                        "use student times evenly spaced from 1, their number dividing 1000 (such as 1, 2, 4, 5 or 8)")
    scheduler.set_timesteps(max(contract.knots))
    scheduler.register_to_config(_fewstep=contract.to_json())
    return scheduler


def disagreement(scheduler, contract: Contract) -> str | None:
    """How a stock scheduler would sample otherwise than the contract says, None when it would not. It is left set to one of its step counts."""
    if type(scheduler).__name__ != contract.scheduler:
        return f"the scheduler is {type(scheduler).__name__}, the student was trained for {contract.scheduler}"
    if scheduler.config.get("prediction_type", contract.prediction) != contract.prediction:
        return f"{contract.scheduler} reads the network as {scheduler.config.prediction_type}, the student was trained as {contract.prediction}"
    for k, knots in contract.knots.items():
        try:
            got = stock_timesteps(scheduler, contract, k)
        except (ValueError, TypeError) as error:            # its own refusal of that many steps
            return f"{contract.scheduler} does not sample {k} steps ({error})"
        if len(got) != len(knots) or max(abs(a - b) for a, b in zip(got, knots)) >= (1e-3 if contract.scheduler in FLOW else 1e-9):
            return f"{contract.scheduler} samples {k} steps at {got}, the student was trained at {knots}"
    return None


def stock_timesteps(scheduler, contract: Contract, k: int) -> tuple[float, ...]:
    """The timesteps a stock pipeline's call with `contract.stock_call(k)` runs through."""
    sigmas = contract.call.get(k, {}).get("sigmas")
    if sigmas is None and contract.grid == "pipeline":
        sigmas = even(k)
    scheduler.set_timesteps(**({"num_inference_steps": k} if sigmas is None else {"sigmas": list(sigmas)}))
    return tuple(scheduler.timesteps.tolist())


def even(k: int) -> list[float]:
    """k flow times from 1 to 1/k."""
    return [1 - i / k for i in range(k)]


def _vp_scheduler(contract: Contract, teacher_config: dict):
    import diffusers

    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    table = {k: teacher_config[k] for k in keys if k in teacher_config}
    common = {**table, "prediction_type": contract.prediction, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1}
    if contract.scheduler == "LCMScheduler":
        # The boundary scalings of consistency models vanish in float at this timestep scaling: c_skip = 0, c_out = 1.
        return diffusers.LCMScheduler(**common, original_inference_steps=max(contract.knots), timestep_scaling=1e6)
    if contract.scheduler == "TCDScheduler":
        return diffusers.TCDScheduler(**common, original_inference_steps=max(contract.knots))
    if contract.scheduler == "DDIMScheduler":
        return diffusers.DDIMScheduler(**common, timestep_spacing="trailing")
    raise UserError(f"no stock configuration of {contract.scheduler} is known: use LCMScheduler (renoise, jump), TCDScheduler (tcd) or DDIMScheduler (ode)")


def _flow_scheduler(contract: Contract):
    import diffusers

    common = {"num_train_timesteps": 1000, "shift": contract.shift}
    if contract.scheduler == "FlowMapEulerDiscreteScheduler":
        return diffusers.FlowMapEulerDiscreteScheduler(**common)
    k = max(contract.knots)
    told = any("sigmas" in call for call in contract.call.values())
    if contract.grid == "scheduler" and not told and k > 1:      # stretch its grid, which would spend the last step at 0.001
        common["shift_terminal"] = contract.knots[k][-1] / 1000
    return getattr(diffusers, contract.scheduler)(**common)


def flow_shift(knots: tuple[float, ...]) -> float | None:
    """The shift s with knots = 1000 s u / (1 + (s - 1) u) at even u = 1 ... 1/k, or None when there is none."""
    u, k = even(len(knots)), [x / 1000 for x in knots]
    if abs(k[0] - 1) > 1e-6:
        return None
    s = 1.0 if len(k) == 1 else k[1] * (1 - u[1]) / (u[1] * (1 - k[1]))
    fits = all(abs(s * a / (1 + (s - 1) * a) - b) < 1e-6 for a, b in zip(u, k))
    return (round(s) if abs(s - round(s)) < 1e-6 else s) if fits else None


def stretched_shift(s: float, k: int) -> float:
    """The shift z with which k steps of a flow scheduler's own grid, linspace(1, z(0.001), k), shifted by z and stretched to end at the last
    knot, are the knots s u / (1 + (s - 1) u) at u = 1 ... 1/k. Of both, 1 - sigma is i / (1 - c i) up to a factor in step number i, with
    c = (1 - 1/s) / k for the knots and (1 - 1/z) (1 - e) / (k - 1) for the grid that ends at e; z follows from equal c."""
    if s == 1 or k == 1:
        return float(s)
    z = s
    for _ in range(50):
        e = 0.001 * z / (1 + 0.001 * (z - 1))
        z = 1 / (1 - (1 - 1 / s) * (k - 1) / (k * (1 - e)))
    return z


def pipeline_grid(pipe) -> str:
    """ "pipeline" when the class of a stock flow pipeline hands linspace(1, 1/k, k) to its scheduler (Flux, Qwen-Image, Z-Image ...), else
    "scheduler" (SD3, Sana, Wan, PixArt): read from its source, so that a class this package has not heard of is right too."""
    import inspect
    source = inspect.getsource(type(pipe).__call__)
    signs = ("linspace(1.0, 1 / num_inference_steps", "linspace(1.0, 1.0 / num_inference_steps", "get_default_z_image_sigmas(")
    return "pipeline" if any(sign in source for sign in signs) else "scheduler"


def _served(knots: dict, rule: Sampler, pipe) -> dict:
    """The largest step count alone where the pipeline makes its own grid and takes no sigmas (Wan): only one can then be right by configuration."""
    import inspect
    most = max(knots)
    alone = (rule != "ode" and pipeline_grid(pipe) == "scheduler" and flow_shift(knots[most]) is not None
             and "sigmas" not in inspect.signature(type(pipe).__call__).parameters)
    return {most: knots[most]} if alone else knots


def _flow_terms(knots: dict, rule: Sampler, pipe) -> dict:
    """Scheduler, shift, grid and call of a student on a flow teacher: by configuration alone where that is exact, else with sigmas in the call."""
    import inspect
    grid, most = pipeline_grid(pipe), max(knots)
    shift = flow_shift(knots[most])
    name = "FlowMatchEulerDiscreteScheduler" if rule == "ode" else "FlowMatchLCMScheduler"
    if grid == "pipeline" and shift is not None:
        return {"scheduler": name, "shift": float(shift), "grid": grid}
    if rule == "ode" and grid == "scheduler" and shift is not None:
        return {"scheduler": "FlowMapEulerDiscreteScheduler", "shift": float(shift)}
    if shift is not None and list(knots) == [most]:   # one step count: the scheduler's own grid, stretched to end at the last knot
        return {"scheduler": name, "shift": stretched_shift(shift, most)}
    if "sigmas" not in inspect.signature(type(pipe).__call__).parameters:
        raise UserError(f"{type(pipe).__name__} takes no sigmas, and no stock configuration samples {list(knots)} steps at {knots[most]} by the rule {rule}: "
                        "train one step count evenly spaced from 1, or open the student with zoo.load")
    unshifted = 1.0 if shift is None else float(shift)
    back = lambda x: x if unshifted == 1 else x / (unshifted - (unshifted - 1) * x)
    return {"scheduler": name, "shift": unshifted, "grid": grid, "call": {k: {"sigmas": [round(back(x / 1000), 9) for x in v]} for k, v in knots.items()}}


SCHEDULERS = {"renoise": "LCMScheduler", "jump": "LCMScheduler", "ode": "DDIMScheduler", "tcd": "TCDScheduler", "unmask": "none",
              "causal": "FlowMatchLCMScheduler"}


def contract_for(model, times, rule: Sampler = "renoise", process: Process | None = None, multiple_of: int = 1, eta: float | None = None, **fields) -> Contract:
    """The contract of a student of Backbone `model` trained at `times` of `process` (by default the model's; another one is
    mapped by equal angle), checked against the stock scheduler now rather than at export. eta: noise of rule "tcd", in [0, 1];
    `fields`: guidance, guidance_range ..."""
    import torch

    from ..process import VP, RectifiedFlow
    if (rule == "tcd") != (eta is not None) or eta is not None and not 0 <= eta <= 1:
        raise UserError(f"rule {rule} with eta {eta}: the rule tcd needs one in [0, 1], the others none")
    if process is not None and process is not model.process and rule != "jump":
        times = model.process.time(process.angle(torch.as_tensor(list(times), dtype=torch.float64))).tolist()
    prediction = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "velocity"}.get(model.pred, model.pred)
    knots = knots_for(times, model.process, rule, multiple_of)
    terms = {"scheduler": SCHEDULERS[rule], "call": {k: {"eta": eta} for k in knots} if eta is not None else {}}
    stock_flow = isinstance(model.process, RectifiedFlow) and hasattr(model, "pipe") and rule in ("renoise", "jump", "ode")
    if stock_flow:
        knots = _served(knots, rule, model.pipe)
        terms = _flow_terms(knots, rule, model.pipe)
    told = getattr(model, "stock_call", {})            # what any stock call of this family's students must be told, guidance off first of all
    if told:
        terms["call"] = {k: dict(told) | terms.get("call", {}).get(k, {}) for k in knots}
        if "guidance_scale" in told and not fields.get("guidance_range"):
            fields["guidance"] = told["guidance_scale"]
    contract = Contract(knots, rule, prediction=prediction, **terms, **fields)
    if isinstance(model.process, VP) or stock_flow:
        scheduler_for(contract, model.pipe.scheduler.config)
    return contract
