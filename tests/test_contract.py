"""The sampling contract: its schemas, and that stock schedulers configured by it sample what `rollout.sample` samples, on closed forms.

Tolerance: 2e-5 on samples of unit size (stock schedulers compute in float32)."""
from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from zoo import rollout
from zoo.errors import UserError
from zoo.hub import contract as contracts
from zoo.hub.contract import Contract, contract_for, flow_shift, knots_for, migrated, scheduler_for, stock_timesteps
from zoo.process import VP, RectifiedFlow, per_sample
from zoo.times import shifted

TABLE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EVEN = (1.0, 0.75, 0.5, 0.25)


class Gaussian:
    """The exact network of data N(mean, spread^2): E[x0 | x_t], and the exact flow map's average velocity when asked for a second time."""

    mean = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)

    def __init__(self, process, spread=0.6):
        self.process, self.spread = process, spread

    def size(self, t, x):
        alpha, sigma, _, _ = (per_sample(c, x) for c in self.process.coeffs(t))
        return alpha, sigma, (alpha**2 * self.spread**2 + sigma**2).sqrt()

    def __call__(self, x, t, cond, *, r=None, to="x0", logits=False):
        alpha, sigma, size = self.size(t, x)
        off = x - alpha * self.mean
        if r is not None:                                 # a Gaussian's flow map rescales what is not the mean
            alpha_r, _, size_r = self.size(r, x)
            return (x - alpha_r * self.mean - off * size_r / size) / per_sample(t - r, x)
        x0 = self.mean + alpha * self.spread**2 / size**2 * off
        return self.process.read(x0, sigma / size**2 * off, t, to)


class Even:
    """Calls its scheduler as Flux does."""
    scheduler = SimpleNamespace(config={})

    def __call__(self, prompt=None, num_inference_steps=28, sigmas=None):
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps) if sigmas is None else sigmas


class Own:
    """Leaves the times to its scheduler, as SD3 does."""
    scheduler = SimpleNamespace(config={})

    def __call__(self, prompt=None, num_inference_steps=28, sigmas=None):
        pass


class Closed:
    """The same and takes no times, as Wan."""
    scheduler = SimpleNamespace(config={})

    def __call__(self, prompt=None, num_inference_steps=50):
        pass


def vp_model(pred="v"):
    from diffusers import DDIMScheduler
    stock = DDIMScheduler(**TABLE)
    return SimpleNamespace(process=VP(stock.alphas_cumprod), pred=pred, pipe=SimpleNamespace(scheduler=SimpleNamespace(config=TABLE)))


def flow_model(pipe):
    return SimpleNamespace(process=RectifiedFlow(), pred="velocity", pipe=pipe())


def stock_samples(contract, model, k, noise, seed, two_time=False):
    """A stock pipeline's loop: its scheduler, our closed-form network read as the contract says."""
    scheduler = scheduler_for(contract, model.pipe.scheduler.config)
    stock_timesteps(scheduler, contract, k)
    net, generator, x = Gaussian(model.process), torch.Generator().manual_seed(seed), noise.clone()
    to = {"v_prediction": "v", "epsilon": "eps", "sample": "x0"}.get(contract.prediction, "velocity")
    more = {n: v for n, v in contract.call.get(k, {}).items() if n == "eta"}
    if "generator" in scheduler.step.__code__.co_varnames:
        more["generator"] = generator
    for i, timestep in enumerate(scheduler.timesteps):
        t = model.process.from_timestep(timestep.double()).expand(len(x))
        r = scheduler.sigmas[i + 1].double().expand(len(x)) if two_time else None
        x = scheduler.step(net(x.double(), t, {}, r=r, to=to).float(), timestep, x, **more).prev_sample
    return x


# name -> (model, times, rule, further fields)
CASES = {
    "vp renoise v": (lambda: vp_model("v"), EVEN, "renoise", {}),
    "vp renoise eps": (lambda: vp_model("eps"), EVEN, "renoise", {}),
    "vp consistency x0": (lambda: vp_model("x0"), (1.0, 0.5), "renoise", {}),
    "vp ode": (lambda: vp_model("v"), EVEN, "ode", {}),
    "flow renoise, even": (lambda: flow_model(Even), EVEN, "renoise", {}),
    "flow renoise, even shifted": (lambda: flow_model(Even), tuple(shifted(torch.tensor(EVEN, dtype=torch.float64), 3.0).tolist()), "renoise", {}),
    "flow renoise, own grid": (lambda: flow_model(Own), EVEN, "renoise", {}),
    "flow renoise, own grid shifted": (lambda: flow_model(Own), tuple(shifted(torch.tensor(EVEN, dtype=torch.float64), 3.0).tolist()), "renoise", {}),
    "flow renoise, any times": (lambda: flow_model(Own), (1.0, 0.8, 0.33, 0.1), "renoise", {}),
    "flow renoise, one count": (lambda: flow_model(Own), EVEN, "renoise", {"multiple_of": 4}),
    "flow renoise, takes no times": (lambda: flow_model(Closed), EVEN, "renoise", {"multiple_of": 4}),
    "flow ode, even": (lambda: flow_model(Even), EVEN, "ode", {}),
    "flow ode, own grid shifted": (lambda: flow_model(Own), tuple(shifted(torch.tensor(EVEN, dtype=torch.float64), 5.0).tolist()), "ode", {}),
    "flow ode, takes no times": (lambda: flow_model(Closed), EVEN, "ode", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_stock_schedulers_sample_what_the_trainer_samples(name):
    make, times, rule, more = CASES[name]
    model = make()
    contract = contract_for(model, times, rule, **more)
    assert set(contract.knots) == ({4} if more else {4, 2, 1} if len(times) == 4 else {2, 1})
    noise = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for k in contract.knots:
        g = torch.Generator().manual_seed(1)
        fresh = lambda: torch.randn(noise.shape, generator=g)
        ours = rollout.sample(Gaussian(model.process), noise.double(), {}, contract.times(k, model.process), rule, fresh)
        theirs = stock_samples(contract, model, k, noise, 1)
        assert ours.std() > 0.1
        torch.testing.assert_close(theirs.double(), ours, atol=2e-5, rtol=0)


def test_a_flow_map_of_two_times_on_the_stock_scheduler():
    """FlowMapEulerDiscreteScheduler with the second time fed to the network; the exact map lands on the exact point in any number of steps."""
    model = flow_model(Own)
    contract = Contract(knots_for(EVEN, model.process), "jump", prediction="velocity", scheduler="FlowMapEulerDiscreteScheduler")
    noise = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for k in (1, 2, 4):
        ours = rollout.sample(Gaussian(model.process), noise.double(), {}, contract.times(k, model.process), "jump")
        torch.testing.assert_close(ours, Gaussian.mean + 0.6 * noise.double(), atol=1e-12, rtol=0)
        torch.testing.assert_close(stock_samples(contract, model, k, noise, 1, two_time=True).double(), ours, atol=2e-5, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd(eta):
    """The stock rule against its own words: by DDIM to floor((1 - eta) next), then noise up to next; at eta 0 it is the ODE rule but for the end."""
    model = vp_model("eps")
    contract = contract_for(model, EVEN, "tcd", eta=eta)
    assert contract.scheduler == "TCDScheduler" and contract.stock_call(4) == {"num_inference_steps": 4, "eta": eta} and contract.raises
    noise = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for k, knots in contract.knots.items():
        g, x, net, process = torch.Generator().manual_seed(1), noise.double(), Gaussian(model.process), model.process
        abar = lambda step: process.coeffs(process.from_timestep(torch.tensor([float(step)], dtype=torch.float64)))[0] ** 2
        for i, knot in enumerate(knots):
            after = knots[i + 1] if i + 1 < len(knots) else 0
            s = int((1 - eta) * after)
            t = process.from_timestep(torch.full((6,), float(knot), dtype=torch.float64))
            x0, eps = net(x, t, {}), net(x, t, {}, to="eps")
            x = abar(s).sqrt() * x0 + (1 - abar(s)).sqrt() * eps
            if eta and i + 1 < len(knots):
                keep = abar(after) / abar(s)
                x = keep.sqrt() * x + (1 - keep).sqrt() * torch.randn(noise.shape, generator=g)
        torch.testing.assert_close(stock_samples(contract, model, k, noise, 1).double(), x, atol=5e-5, rtol=0)


def test_the_default_grid_of_flow_schedulers_would_waste_the_last_step():
    """What the contract guards against: asked for a number of steps alone, FlowMatchLCM ends at 0.001."""
    from diffusers import FlowMatchLCMScheduler
    plain = FlowMatchLCMScheduler(shift=1.0)
    plain.set_timesteps(4)
    assert plain.timesteps[-1] < 2
    contract = contract_for(flow_model(Own), EVEN)
    assert contract.call[4] == {"sigmas": [1.0, 0.75, 0.5, 0.25]} and not contract.raises
    assert contract_for(flow_model(Even), EVEN).call == {} and contract_for(flow_model(Closed), EVEN).knots == {4: (1000.0, 750.0, 500.0, 250.0)}


@pytest.mark.parametrize("times", [(1.0, 0.8, 0.33, 0.1), (0.9, 0.5)])
def test_times_no_stock_call_can_name_are_refused_before_training(times):
    with pytest.raises(UserError, match="takes no sigmas"):
        contract_for(flow_model(Closed), times)


def test_rules_and_eta_go_together():
    for rule, eta in (("tcd", None), ("tcd", 1.5), ("renoise", 0.3)):
        with pytest.raises(UserError, match="eta"):
            contract_for(vp_model(), EVEN, rule, eta=eta)


def test_flow_shift():
    assert flow_shift((1000.0, 750.0, 500.0, 250.0)) == 1
    for s in (2.0, 3.0, 6.5):
        assert flow_shift(tuple((1000 * shifted(torch.tensor(EVEN, dtype=torch.float64), s)).tolist())) == pytest.approx(s)
    assert flow_shift((1000.0, 800.0, 330.0, 100.0)) is None and flow_shift((900.0, 450.0)) is None


# ------------------------------------------------------------------------------------------------------- other counts
def test_times_of_a_count_that_was_not_trained():
    """Spaced as the knots are: even on a table, even and shifted on a flow; what follows no rule has none."""
    vp, flow = vp_model().process, RectifiedFlow()
    even_vp, shifted_flow = contract_for(vp_model(), EVEN), Contract(knots_for(shifted(torch.tensor(EVEN, dtype=torch.float64), 5.0), flow))
    assert vp.timestep(even_vp.times_for(5, vp)).round().tolist() == [999, 799, 599, 399, 199]
    torch.testing.assert_close(shifted_flow.times_for(5, flow), shifted(1 - torch.arange(5, dtype=torch.float64) / 5, 5.0), atol=1e-6, rtol=0)
    for contract, process in ((even_vp, vp), (shifted_flow, flow)):
        for k in contract.knots:
            assert torch.equal(contract.times_for(k, process), contract.times(k, process))
        with pytest.raises(UserError, match="at least 1 .trained for 1, 2, 4 steps."):
            contract.times_for(0, process)
    with pytest.raises(UserError, match="trained for 1, 2, 4 steps, at times .1000, 800, 330, 100. that give no grid of 3"):
        Contract(knots_for((1.0, 0.8, 0.33, 0.1), flow)).times_for(3, flow)


def test_a_scheduler_against_its_contract():
    from diffusers import DDIMScheduler
    contract = contract_for(vp_model(), EVEN)
    stock = scheduler_for(contract, TABLE)
    assert contracts.disagreement(stock, contract) is None
    assert "DDIMScheduler" in contracts.disagreement(DDIMScheduler(), contract)
    assert "does not sample 4 steps" in contracts.disagreement(type(stock).from_config(stock.config, original_inference_steps=2), contract)
    assert "samples 4 steps at (999" in contracts.disagreement(type(stock).from_config(stock.config, original_inference_steps=50), contract)
    assert "reads the network as epsilon" in contracts.disagreement(type(stock).from_config(stock.config, prediction_type="epsilon"), contract)


# ------------------------------------------------------------------------------------------------------- schemas
FIRST = {"knots": {"2": [999, 499], "1": [999]}, "sampler": "renoise", "guidance": 1.0, "prediction": "epsilon", "scheduler": "LCMScheduler",
         "dtype": "float32",
         "lora_scale": 1.0, "shift": 1.0, "guidance_range": [1.0, 8.0], "layout": None, "schema": 1, "student": {"family": "sd"}}


def test_an_older_contract_is_migrated():
    before = json.dumps(FIRST)
    contract = Contract.from_json(FIRST)
    assert contract.schema == contracts.SCHEMA == 2 and contract.knots == {2: (999, 499), 1: (999,)} and contract.guidance_range == (1.0, 8.0)
    assert contract.grid == "scheduler" and contract.call == {} and contract.stock_call(2) == {"num_inference_steps": 2}
    assert json.dumps(FIRST) == before                      # what was read is not changed
    assert Contract.from_json(contract.to_json()) == contract


def test_every_schema_has_its_way_up():
    assert sorted(contracts.MIGRATIONS) == list(range(1, contracts.SCHEMA))
    assert migrated(FIRST)["schema"] == contracts.SCHEMA


@pytest.mark.parametrize("schema", [contracts.SCHEMA + 1, 0, None, "2"])
def test_a_newer_contract_or_none_is_refused(schema):
    with pytest.raises(UserError, match="upgrade the package"):
        Contract.from_json(FIRST | {"schema": schema})


def test_the_call_survives_json():
    contract = contract_for(flow_model(Own), EVEN)
    assert Contract.from_json(json.loads(json.dumps(contract.to_json()))) == contract


@pytest.mark.slow
def test_which_stock_pipelines_make_their_own_times():
    """Read from the installed classes; a new diffusers that changes a pipeline shows here."""
    import diffusers
    grid = lambda name: contracts.pipeline_grid(object.__new__(getattr(diffusers, name)))
    assert {grid(n) for n in ("FluxPipeline", "Flux2Pipeline", "QwenImagePipeline", "ZImagePipeline", "LTXPipeline")} == {"pipeline"}
    assert {grid(n) for n in ("StableDiffusion3Pipeline", "SanaPipeline", "WanPipeline", "PixArtSigmaPipeline")} == {"scheduler"}
