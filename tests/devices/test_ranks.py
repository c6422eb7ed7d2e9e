"""Runs on two ranks in the environments of the shipped configurations: DDP and FSDP2 against one rank, checkpoints that change hands."""
import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import torchrun
from safetensors.torch import load_file

from zoo import registry
from zoo.sharding import REFUSED

QUIET = dict(batch=32, time_budget=0, sample_every=0, measure_every=0, checkpoint_every=4, steps=6)
# (name, method, options): what is cut, a GAN head outside the cut network, an average read every step, forward-mode derivatives, taps.
COMPARED = [("full", "dmd", dict(gan=0.01, accumulate=2, batch=8)), ("lora", "dmd", dict(lora=4, gan=0.01)), ("lcm", "lcm", dict(grid=10)),
            ("jvp", "meanflow", dict(derivative="jvp")), ("taps", "ladd", dict()), ("blocks", "dmd", dict(teacher="sd")),
            ("blocks-lora", "dmd", dict(teacher="sd", lora=2, gradient_checkpointing=True))]


def options(folder, teachers: Path, name: str, more: dict, **others) -> dict:
    """Options of a run, the tiny pipeline in place of the teacher "sd"."""
    out = QUIET | {"teacher": "toy"} | more | others | {"output_dir": str(folder / name)}
    if out["teacher"] == "sd":
        out |= {"teacher": str(teachers / "sd"), "data": str(teachers / "prompts.txt"), "batch": 4, "mixed_precision": "no"}
    return out


def alone(method: str, options: dict):
    """The same run on this one process."""
    script = importlib.import_module(f"train_{method}")
    return script.main(script.Config(**options))


def files(folder) -> dict:
    last = sorted((Path(folder) / "checkpoints").glob("step-*"))[-1]
    return {p.name: load_file(p) for p in last.glob("*.safetensors")}


def distance(one: dict, two: dict) -> float:
    """Largest difference of two checkpoints' parameters, or a fiftieth of that of their optimiser states relative to their size (some of these
    are at the last bits of the gradients they average). Names and shapes must agree."""
    assert one.keys() == two.keys()
    worst = 0.0
    for f in one:
        assert one[f].keys() == two[f].keys(), f
        for k, a in one[f].items():
            b = two[f][k]
            assert a.shape == b.shape, (f, k)
            if a.numel():
                apart = (a - b).abs().max().item()
                worst = max(worst, apart / max(a.abs().max().item(), 1e-6) / 50 if "optimizer" in f else apart)
    return worst


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    """What leaves is compared, not how good it is: little is sampled, as in many_runs.py."""
    monkeypatch.setattr("zoo.backbones.Backbone.watched", (2, 2))
    monkeypatch.setattr("zoo.watch.TEACHER_STEPS", 4)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    from tiny import tiny_sd
    folder = tmp_path_factory.mktemp("teachers")
    tiny_sd(folder / "sd")
    (folder / "prompts.txt").write_text("red heart\nblue star\nsmiling face\nred star\n")
    return folder


@pytest.mark.slow
def test_networks_cut_over_two_ranks_train_as_on_one(tmp_path, teachers):
    """FSDP2 in the environment of its configuration: equal parameters, averages and optimiser states at equal global batch; the same student
    leaves; a checkpoint of two ranks goes on on one, and back."""
    one, two = tmp_path / "one", tmp_path / "two"
    planned = {name: alone(method, options(one, teachers, name, more)).estimate.roles for name, method, more in COMPARED}
    shutil.copytree(one / "full", two / "back")              # six steps of one rank, to go on on two
    jobs = [{"method": m, "sharded": True, "options": options(two, teachers, n, more)} for n, m, more in COMPARED]
    jobs += [{"method": "dmd", "sharded": True, "options": options(two, teachers, "back", COMPARED[0][2], steps=8)}]
    out = torchrun("8gpu_fsdp2.yaml", jobs)
    done = {Path(row["run"]).name: row["roles"] for row in (json.loads(line[5:]) for line in out.splitlines() if line.startswith("done "))}
    assert len(done) == len(jobs)
    for name, _, _ in COMPARED:
        for role, whole in planned[name].items():             # half the samples and, of what is cut, half the rows (and the odd one)
            half = done[name][role]
            assert half["activations"] == pytest.approx(whole["activations"] / 2, rel=0.02), (name, role)
            assert half["gradient"] <= whole["gradient"] * (1 if "lora" in name or name == "taps" else 0.6), (name, role)
        assert distance(files(one / name), files(two / name)) < 2e-4, name
        students = [load_file(next((folder / name / "student").rglob("*.safetensors"))) for folder in (one, two)]
        assert students[0].keys() == students[1].keys() and all(torch.allclose(v, students[1][k], atol=2e-4) for k, v in students[0].items()), name
    for where in (one, two):
        alone("dmd", options(where, teachers, "full", COMPARED[0][2], steps=8))
    assert distance(files(one / "full"), files(two / "full")) < 2e-4
    assert distance(files(one / "full"), files(two / "back")) < 2e-4


@pytest.mark.slow
def test_whole_networks_on_two_ranks(tmp_path, teachers):
    """The DDP configuration's environment: a checkpoint of one rank goes on on two."""
    one, two = tmp_path / "one", tmp_path / "two"
    alone("dmd", options(one, teachers, "lora", COMPARED[1][2], steps=4))
    shutil.copytree(one / "lora", two / "lora")
    torchrun("8gpu_ddp.yaml", [{"method": "dmd", "sharded": False, "options": options(two, teachers, "lora", COMPARED[1][2], steps=8)}])
    alone("dmd", options(one, teachers, "lora", COMPARED[1][2], steps=8))
    assert distance(files(one / "lora"), files(two / "lora")) < 2e-4


@pytest.mark.slow
def test_every_other_method_runs_cut(tmp_path, teachers):
    """Two steps of each registered method, its networks kept gathered between forward and backward (the other FSDP2 configuration)."""
    from tiny import TINY
    seen = {m for _, m, _ in COMPARED}
    jobs = []
    for method in registry.methods():
        if method.name in seen or method.name in REFUSED or method.name == "sdtt":
            continue
        jobs.append({"method": method.name, "sharded": True, "options": options(tmp_path, teachers, method.name, TINY.get(method.name, {}), steps=2, export="last")})
    jobs.append({"method": "sdtt", "sharded": True, "options": options(tmp_path, teachers, "sdtt", dict(first=8, last=4, round_steps=1), steps=2, export="last")})
    jobs.append({"method": "lcm", "sharded": True, "options": options(tmp_path, teachers, "bf16", dict(grid=10, mixed_precision="bf16"), steps=2)})
    assert len(jobs) >= 14
    assert torchrun("8gpu_fsdp2_keep.yaml", jobs).count("done") == len(jobs)
