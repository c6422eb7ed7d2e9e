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
@pytest.mark.parametrize("script, flags", [("dmd", {"gan": 1e-3}), ("dmd", {"lora": 4, "gradient_checkpointing": True}), ("lcm", {})], ids=["gan", "lora", "lcm"])
def test_a_simulated_step_takes_what_a_real_one_takes(bench, script, flags):
    simulated, real = peaks(bench, script, (bench.DMD if script == "dmd" else {}) | flags)
    assert abs(simulated / real - 1) < 0.05, (simulated, real)


def test_a_checkpointed_network_is_counted_with_its_largest_block():
    from zoo import denoiser, plan
    from zoo.process import RectifiedFlow

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x)))

    class Net(nn.Module):
        func = None

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(16), Block(1024), Block(16)])

        def enable_gradient_checkpointing(self, gradient_checkpointing_func):
            self.func = gradient_checkpointing_func

        def forward(self, x):
            for block in self.blocks:
                x = block(x) if self.func is None else self.func(block, x)
            return x

    def counted(checkpointed):
        net = Net()
        if checkpointed:
            denoiser.checkpoint_activations(net)
        return plan.activation_bytes(denoiser.Denoiser(net, RectifiedFlow(), "velocity", lambda m, x, t, c: m(x)), (8,), {})
    plain, saving = counted(False), counted(True)
    # One sample: every block keeps its input of 8, and inside it relu's result, of the block's width (the largest
    # twice: its gradient); a few bytes are the times.
    assert 0 <= plain - 4 * (3 * 8 + 16 + 1024 + 16) < 64 and 0 <= saving - 4 * (3 * 8 + 2 * 1024) < 64
    assert denoiser.LOOKING == []


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
