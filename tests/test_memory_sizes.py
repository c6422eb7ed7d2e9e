"""The memory estimate before step 1, and the benchmark that counts what a step takes without a GPU."""
from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
HERE = ROOT / "benchmarks" / "memory"
sys.path[:0] = [str(HERE), str(ROOT / "train_scripts")]

from zoo.errors import UserError  # noqa: E402


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("memory_run", HERE / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_run"] = module
    spec.loader.exec_module(module)
    return module


def test_pretended_tensors_are_counted_while_they_live(bench):
    memory = bench.Pretend()
    with memory:
        with memory.networks():
            layer = nn.Linear(1000, 500, bias=False)             # 2 MB
        assert memory.live == 2_000_000
        x = torch.ones(10, 1000)                                  # real, and not counted
        y = layer(x)                                              # 20 kB
        view = y[:5]
        assert memory.live == 2_020_000 and tuple(view.shape) == (5, 500)
        z = torch.relu(y.detach()) + 1                            # one of the two stays
        del y, view
        assert memory.live == 2_020_000 and memory.peak == 2_060_000
        loss = layer(z[:, :1].expand(10, 1000)).square().mean()
        loss.backward()
        assert memory.live >= 4_000_000                           # the gradient
        assert loss.item() == 1.0 and bool(torch.isfinite(loss))
    big = nn.Linear(4, 4)
    assert torch.equal(big.to(torch.float64).weight, big.weight) and big.weight.dtype is torch.float64       # modules move again


def test_masks_pick_the_rows_they_pick(bench):
    memory = bench.Pretend()
    with memory:
        with memory.networks():
            layer = nn.Linear(3, 4)
        x, going = torch.ones(6, 3), torch.tensor([True, False, True, False, False, False])
        assert layer(x)[going].shape == (2, 4) and layer(x[going]).shape == (2, 4)
        assert x.sum().item() == 18


def peaks(bench, script, flags):
    """(simulated, counted on real tensors) of the tiny network, bytes."""
    out = []
    for everything in (False, True):
        memory = bench.Pretend(everything)
        with memory, bench.gpu_precision():
            out.append(bench.measure("tiny", script, flags | {"batch": 2}, memory)["peak"])
    return out


@pytest.mark.slow
@pytest.mark.parametrize("script, flags", [("dmd", {"gan": 1e-3}), ("dmd", {"lora": 4, "gradient_checkpointing": True}), ("lcm", {})],
                         ids=["gan", "lora", "lcm"])
def test_a_simulated_step_takes_what_a_real_one_takes(bench, script, flags):
    simulated, real = peaks(bench, script, (bench.DMD if script == "dmd" else {}) | flags)
    assert abs(simulated / real - 1) < 0.05, (simulated, real)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Blocks of these widths, that may be checkpointed, on vectors of 8."""
    func = None

    def __init__(self, *widths):
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, widths))

    def enable_gradient_checkpointing(self, gradient_checkpointing_func):
        self.func = gradient_checkpointing_func

    def forward(self, x, timestep=None):
        for block in self.blocks:
            x = block(x) if self.func is None else self.func(block, x)
        return x


def test_a_checkpointed_network_is_counted_with_its_largest_block():
    from zoo import denoiser, plan
    from zoo.process import RectifiedFlow

    def counted(checkpointed):
        net = Net(16, 1024, 16)
        if checkpointed:
            denoiser.checkpoint_activations(net)
        return plan.activation_bytes(denoiser.Denoiser(net, RectifiedFlow(), "velocity", lambda m, x, t, c: m(x)), (8,), {})
    plain, saving = counted(False), counted(True)
    # One sample: every block keeps its input of 8, and inside it relu's result, of the block's width (the largest
    # twice: its gradient); a few bytes are the times.
    assert 0 <= plain - 4 * (3 * 8 + 16 + 1024 + 16) < 64 and 0 <= saving - 4 * (3 * 8 + 2 * 1024) < 64
    assert denoiser.LOOKING == []


def begun(out, *widths, **fields):
    """A Run of such a network, with a micro-batch of 4, and its student."""
    import train_dmd

    from zoo.backbones.custom import Custom
    from zoo.run import Run
    model = Custom(Net(*widths), {"x0": torch.zeros(4, 8)}, shape=(8,))
    run = Run(train_dmd.Config(teacher=model, output_dir=str(out / "run"), batch=8, accumulate=2, **fields), model)
    return run, run.train("student", model.make("student", gradient_checkpointing=run.cfg.gradient_checkpointing), 1e-3)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_activations_are_those_of_a_micro_batch_in_the_runs_precision(tmp_path, precision, checkpointed):
    """Under bf16 half of them, and the weights it has cast, which are there once whatever the batch."""
    from zoo.plan import plan
    run, _ = begun(tmp_path, 512, mixed_precision=precision, gradient_checkpointing=checkpointed)
    size, low = (4, False) if precision == "no" else (2, True)
    inside = 512 * size                                             # relu's result, of one sample
    casts = 8 * 512 * 2 * low                                       # of the second matrix: no gradient goes through the first
    if checkpointed:                                                # its input is kept, the rest made again, with a gradient of the largest part
        wanted = 4 * (8 * 4 + inside + 8 * 2 * low) + casts + (casts if low else 4 * inside)
    else:
        wanted = 4 * (8 * size + inside) + casts
    found = plan(run).roles["student"]["activations"]
    assert 0 <= found - wanted < 4 * 64, (found, wanted)            # a few numbers a sample are the times


@pytest.mark.parametrize("offload", [False, True])
def test_an_estimate_adds_what_is_there_at_once(tmp_path, monkeypatch, offload):
    """Every optimiser's states, and of gradient and activations those of the trainee that has the most: they go with its step."""
    from zoo import plan
    from zoo.denoiser import Denoiser
    from zoo.process import RectifiedFlow
    run, student = begun(tmp_path, 64, mixed_precision="no", offload_averages=offload)
    critic = run.train("critic", Denoiser(Net(4), RectifiedFlow(), "velocity", lambda m, x, t, c: m(x)), 1e-3)
    for decay in (0.9, 0.99):
        run.average(student, decay)
    large, small = (4 * sum(p.numel() for p in t.params.values()) for t in (student, critic))
    base = 4 * sum(p.numel() for p in run.model.module.parameters())
    assert large == base == 4 * (2 * 8 * 64 + 64 + 8) and small == 4 * (2 * 8 * 4 + 4 + 8)
    states, averages = 2 * (large + small), 2 * large
    for of_large, of_small, once in ((100, 9000, small + 4 * 9000), (900, 1000, large + 4 * 900)):      # either may be the larger
        sizes = {student.net: of_large, critic.net: of_small}
        monkeypatch.setattr(plan, "_activations", lambda run, net, cond, micro: sizes[net] * micro)
        estimate = plan.plan(run)
        assert estimate.needed == states + once
        assert estimate.held == base + large + small + (0 if offload else averages)
        role = estimate.roles["student"]
        assert role == {"weights": large, "gradient": large, "optimizer": 2 * large, "activations": 4 * of_large,
                        "averages": averages * (not offload), "host_averages": averages * offload}
    estimate.free = estimate.needed
    estimate.refuse_if_too_large()
    estimate.free -= 1
    with pytest.raises(UserError, match="micro-batch is 4"):
        estimate.refuse_if_too_large()


def test_the_estimate_leaves_nothing_behind():
    """Hooks on saved tensors that give them back as they are keep alive what saves its own output (relu, attention)."""
    import gc
    import weakref

    from zoo import denoiser, plan
    from zoo.process import RectifiedFlow
    made = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            h = torch.relu(self.layer(x))[:, None]
            made.append(weakref.ref(h))
            return nn.functional.scaled_dot_product_attention(h, h, h)[:, 0]
    plan.activation_bytes(denoiser.Denoiser(Net(), RectifiedFlow(), "velocity", lambda m, x, t, c: m(x)), (8,), {})
    gc.collect()
    assert len(made) == 1 and made[0]() is None


def test_the_log_is_within_ten_per_cent_and_within_what_was_asked(bench):
    """`python benchmarks/memory/run.py` makes it again."""
    found = json.loads((HERE / "log.json").read_text())["found"]
    assert set(found) == set(bench.CASES)
    for name, row in found.items():
        row, limit = row["simulated"], bench.CASES[name][3]
        assert abs(row["predicted"] / row["peak"] - 1) < 0.10, (name, row["predicted"], row["peak"])
        assert limit is None or row["peak"] < limit, name
    assert bench.table(found) in (HERE / "README.md").read_text()
