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

# Two steps of every method, whole on each rank; self_forcing's are one of its initialisation and one of its rollouts.
QUICK = dict(batch=8, steps=2, export="last")
WHOLE = {"sdtt": dict(teacher="toy", first=8, last=4, round_steps=1),
         "rcm": dict(derivative="jvp"),        # its differences over 1e-4 are at the last bits of the network's values
         "self_forcing": dict(teacher="toy-video", batch=4, ode_steps=1, ode_substeps=1, lr=2e-5, critic_lr=2e-5)}


def options(folder, teachers: Path, name: str, more: dict, **others) -> dict:
    """Options of a run, the tiny pipeline in place of the teacher "sd"."""
    out = QUIET | {"teacher": "toy"} | more | others | {"output_dir": str(folder / name)}
    if out["teacher"] == "sd":
        out |= {"teacher": str(teachers / "sd"), "data": str(teachers / "prompts.txt"), "batch": 4, "mixed_precision": "no"}
    return out


def short_runs() -> dict[str, tuple[str, dict]]:
    """name -> (method, options): every registered method; DMD2 with adapters, GAN head, micro-batches and shared samples, and of a pipeline."""
    from tiny import TINY
    runs = {m.name: (m.name, QUICK | (TINY | WHOLE).get(m.name, {})) for m in registry.methods()}
    return runs | {"lora": ("dmd", QUICK | dict(lora=4, gan=0.01, share_sample=True, accumulate=2)),
                   "blocks": ("dmd", QUICK | dict(teacher="sd", lora=2, gradient_checkpointing=True))}


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


@pytest.fixture(scope="module")
def single(teachers, tmp_path_factory):
    """Files of the checkpoint that one rank leaves, by the name of a short run."""
    folder, left = tmp_path_factory.mktemp("single"), {}

    def of(name: str) -> dict:
        if name not in left:
            method, more = short_runs()[name]
            alone(method, options(folder, teachers, name, more))
            left[name] = files(folder / name)
        return left[name]
    return of


def launched(config: str, jobs: list[dict]) -> set[str]:
    """Names of the runs that ended on two ranks (many_runs.py asserts their number)."""
    rows = (json.loads(line[5:]) for line in torchrun(config, jobs).splitlines() if line.startswith("done "))
    return {Path(row["run"]).name for row in rows}


@pytest.mark.slow
def test_every_method_on_two_ranks_is_the_one_of_one_rank(tmp_path, teachers, single):
    """The DDP configuration's environment: two steps of each registered method at equal global batch leave the same checkpoint (see `distance`).
    A checkpoint of two ranks goes on on one, and that one's on two."""
    runs = short_runs()
    job = lambda name, **more: {"method": runs[name][0], "sharded": False, "options": options(tmp_path, teachers, name, runs[name][1], **more)}
    assert launched("8gpu_ddp.yaml", [job(name) for name in runs]) == set(runs) > {"self_forcing", "sdtt", "twinflow"}
    apart = {name: distance(single(name), files(tmp_path / name)) for name in runs}
    assert all(d < 2e-4 for d in apart.values()), apart
    method, more = runs["lora"]
    alone(method, options(tmp_path, teachers, "lora", more, steps=4))
    launched("8gpu_ddp.yaml", [job("lora", steps=6)])
    alone(method, options(tmp_path / "one", teachers, "lora", more, steps=6))
    assert distance(files(tmp_path / "one/lora"), files(tmp_path / "lora")) < 2e-4


@pytest.mark.slow
def test_every_other_method_cut_is_the_one_of_one_rank(tmp_path, teachers, single):
    """The same two steps of each registered method that FSDP2 takes, networks kept gathered between forward and backward (its other configuration)."""
    seen = {m for _, m, _ in COMPARED} | set(REFUSED)
    runs = {name: how for name, how in short_runs().items() if how[0] not in seen}
    jobs = [{"method": method, "sharded": True, "options": options(tmp_path, teachers, name, more)} for name, (method, more) in runs.items()]
    jobs.append({"method": "lcm", "sharded": True, "options": options(tmp_path, teachers, "bf16", dict(grid=10, mixed_precision="bf16"), steps=2)})
    assert launched("8gpu_fsdp2_keep.yaml", jobs) == {*runs, "bf16"} and len(jobs) >= 14
    apart = {name: distance(single(name), files(tmp_path / name)) for name in runs}
    assert all(d < 2e-4 for d in apart.values()), apart
