"""The life of a run: launch, kill, resume, ranks, accumulation, bad input. Children are real processes."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zoo.errors import UserError
from zoo.run import Batch, Run, RunConfig, _epoch_indices

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "train_scripts"
sys.path.insert(0, str(SCRIPTS))
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
TOY = ["--teacher", "toy", "--batch", "64", "--checkpoint_every", "4", "--sample_every", "0", "--measure_every", "0", "--time_budget", "0"]


def launch(script, out, *flags, ranks=1, wait=True, toy=True):
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(29500 + os.getpid() % 400)]
    command += [str(SCRIPTS / f"train_{script}.py"), *(TOY if toy else []), "--output_dir", str(out), *flags]
    if not wait:
        return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)


def last(out, suffix=".safetensors"):
    folder = sorted((Path(out) / "checkpoints").glob("step-*"))[-1]
    return {p.name: load_file(p) for p in folder.glob(f"*{suffix}")}, json.loads((folder / "state.json").read_text())


def same(a, b):
    return a.keys() == b.keys() and all(a[f].keys() == b[f].keys() and all(torch.equal(a[f][k], b[f][k]) for k in a[f]) for f in a)


@pytest.mark.parametrize("script,flags", [
    pytest.param("dmd", ["--gan", "0.01", "--lora", "4"], id="dmd-gan-lora", marks=pytest.mark.slow),
    pytest.param("meanflow", ["--derivative", "jvp"], id="meanflow")])
def test_kill_at_any_moment_and_resume_is_bit_equal(tmp_path, script, flags):
    """The process itself, by the system; every script is killed in a step, and resumed, in tests/test_life.py."""
    child = launch(script, tmp_path / "killed", "--steps", "100000", *flags, wait=False)
    deadline = time.time() + 120
    while not list((tmp_path / "killed" / "checkpoints").glob("step-0000004*")):
        assert child.poll() is None and time.time() < deadline, child.stderr.read()[-2000:]
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    step = last(tmp_path / "killed")[1]["step"]
    end = step + 4
    whole = launch(script, tmp_path / "whole", "--steps", str(end), *flags)
    assert whole.returncode == 0, whole.stderr[-2000:]
    resumed = launch(script, tmp_path / "killed", "--steps", str(end), *flags)
    assert resumed.returncode == 0 and "resumed from" in resumed.stderr, resumed.stderr[-2000:]
    a, b = last(tmp_path / "whole"), last(tmp_path / "killed")
    assert a[1]["step"] == b[1]["step"] == end and same(a[0], b[0])
    steps = [json.loads(row)["step"] for row in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)                       # no row of the repeated steps stands twice


def until_it_trains(child, folder):
    log = folder / "metrics.jsonl"
    while not log.exists() or not log.read_text():
        assert child.poll() is None, child.stderr.read()[-2000:]
        time.sleep(0.05)


def test_terminate_saves_the_current_step(tmp_path):
    child = launch("dmd", tmp_path / "run", "--steps", "100000", "--checkpoint_every", "100000", wait=False)
    until_it_trains(child, tmp_path / "run")
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM and "the same command resumes" in err
    assert last(tmp_path / "run")[1]["step"] >= 1


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_resumes_bit_exactly(tmp_path):
    """Asked twice in a row, as by a launcher that passes on the Ctrl-C its children had too."""
    child = launch("dmd", tmp_path / "run", "--steps", "100000", "--checkpoint_every", "100000", wait=False)
    until_it_trains(child, tmp_path / "run")
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in err, err[-2000:]
    assert err.splitlines()[-1].startswith("stopped at step") and "the same command resumes" in err.splitlines()[-1]
    end = last(tmp_path / "run")[1]["step"] + 4
    resumed = launch("dmd", tmp_path / "run", "--steps", str(end), "--checkpoint_every", "100000")
    assert resumed.returncode == 0 and "resumed from" in resumed.stderr, resumed.stderr[-2000:]
    whole = launch("dmd", tmp_path / "whole", "--steps", str(end), "--checkpoint_every", "100000")
    assert whole.returncode == 0, whole.stderr[-2000:]
    a, b = last(tmp_path / "whole"), last(tmp_path / "run")
    assert a[1]["step"] == b[1]["step"] == end and same(a[0], b[0])


@pytest.mark.slow
def test_accumulation_agrees_with_the_whole_batch(tmp_path):
    """Noise, times and data are indexed by global sample number: the same run, up to the order of sums. Two ranks: tests/devices/test_ranks.py."""
    import train_dmd
    for name, n in (("one", 1), ("accumulated", 2)):
        train_dmd.main(train_dmd.Config(teacher="toy", batch=32, steps=6, gan=0.01, accumulate=n, time_budget=0, sample_every=0, measure_every=0,
                                        export="last", output_dir=str(tmp_path / name)))
    one, theirs = (last(tmp_path / name)[0] for name in ("one", "accumulated"))
    assert one.keys() == theirs.keys()
    for f in one:
        if "optimizer" not in f:
            assert all(torch.allclose(one[f][k], theirs[f][k], atol=2e-4) for k in one[f]), f


RANKS = '''
import torch, train_dmd, sys
from zoo import run as R
import accelerate
R.Run.watch = lambda self, *a, **k: None
accelerate.Accelerator.end_training = lambda self: None      # it would close the process group the check below needs
r = train_dmd.main(train_dmd.Config(teacher="toy", steps=3, batch=64, gan=0.01, accumulate=2, output_dir=sys.argv[1],
                                    time_budget=0, measure_every=0, sample_every=0))
assert r.world == 2, r.world
for t in r.trainees.values():
    mine = torch.cat([p.detach().flatten() for p in t.params.values()]).double()
    both = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(both, mine)
    assert torch.equal(*both), t.name
print("equal on both ranks", flush=True)
'''


def test_every_trainee_is_equal_on_all_ranks(tmp_path):
    """In the fast suite; with adapters, and of every method: tests/devices/many_runs.py."""
    (tmp_path / "ranks.py").write_text(RANKS)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(29900 + os.getpid() % 90),
                           str(tmp_path / "ranks.py"), str(tmp_path / "out")],
                          env={**ENV, "PYTHONPATH": f"{ROOT}:{SCRIPTS}"}, capture_output=True, text=True, timeout=300)
    assert done.stdout.count("equal on both ranks") == 2, done.stdout + done.stderr[-3000:]


def make_run(tmp_path, **options):
    import train_dmd
    from zoo import backbones
    cfg = train_dmd.Config(teacher="toy", batch=16, output_dir=str(tmp_path / "run"), time_budget=0, **options)
    model = backbones.load("toy")
    return cfg, model, Run(cfg, model)


@pytest.mark.parametrize("lora", [0, 4])
def test_one_trainee_moves_and_the_others_keep_their_bits(tmp_path, lora):
    cfg, model, run = make_run(tmp_path)
    base = {k: v.clone() for k, v in model.module.state_dict().items()}
    G = run.train("student", model.make("student", lora=lora), 1e-2)
    critic = run.train("critic", model.make("critic", lora=lora, head=True), 1e-2)
    data = model.batches()
    before = {n: {k: p.detach().clone() for k, p in t.params.items()} for n, t in run.trainees.items()}
    def through_the_critic(batch):
        x = G(batch.randn(), batch.rand() * 0.9 + 0.05, batch.cond)
        return {"loss": critic(x, batch.rand() * 0.9 + 0.05, batch.cond, logits=True)[1].mean()}
    run.minimize(G, through_the_critic, data)
    moved = {n: any(not torch.equal(p, before[n][k]) for k, p in t.params.items()) for n, t in run.trainees.items()}
    assert moved == {"student": True, "critic": False}       # a gradient reached the student through the critic
    assert all(p.requires_grad for t in run.trainees.values() for p in t.params.values())
    after = {k.replace(".base_layer", ""): v for k, v in model.module.state_dict().items() if "lora_" not in k}
    assert all(torch.equal(base[k], after[k]) for k in base)


def test_batches_are_indexed_by_global_sample():
    whole = Batch({}, (3,), (1, 5), 8, slice(0, 8), "cpu")
    half = Batch({}, (3,), (1, 5), 8, slice(4, 8), "cpu")
    for draw in ("randn", "rand", "randn"):
        assert torch.equal(getattr(whole, draw)()[4:], getattr(half, draw)())
    again, first = half.whole(), Batch({}, (3,), (1, 5), 8, slice(0, 8), "cpu")              # what all ranks drew, from the first draw on
    assert all(torch.equal(again.rand(2), first.rand(2)) for _ in range(2)) and half._count == 3
    index = _epoch_indices(10, torch.arange(30), 3)
    assert all(sorted(index[i:i + 10].tolist()) == list(range(10)) for i in (0, 10, 20))
    assert index[:10].tolist() != index[10:20].tolist()


def test_a_nan_stops_with_the_step_and_the_last_checkpoint(tmp_path):
    cfg, model, run = make_run(tmp_path, steps=50, checkpoint_every=5, measure_every=0, sample_every=0)
    G = run.train("student", model.make("student"), 1e-3)
    data = model.batches()
    def loss(batch):
        return {"loss": G(batch.randn(), batch.rand(), batch.cond).square().mean() * (float("nan") if run.step == 12 else 1)}
    with pytest.raises(UserError, match=r"step 12.*step-0000010"):
        for _ in run.loop():
            run.minimize(G, loss, data)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-0000005", "step-0000010"]


class Breaks(torch.nn.Module):
    """A teacher's velocity that turns NaN when told."""
    broken = False

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(2))

    def forward(self, x, timestep, label):
        return x * self.w * (float("nan") if Breaks.broken else 1)


def test_a_teacher_that_turns_nan_ends_the_script_and_the_run_goes_on_from_before(tmp_path, monkeypatch):
    import train_dmd
    from zoo import backbones
    def go():
        teacher = backbones.Custom(Breaks(), {"label": torch.arange(4)}, shape=(2,))
        return train_dmd.main(train_dmd.Config(teacher=teacher, output_dir=str(tmp_path / "run"), batch=8, steps=14, checkpoint_every=5, time_budget=0,
                                               measure_every=0, sample_every=0))
    save = Run.save
    def break_later(run):
        save(run)
        Breaks.broken = run.step >= 10
    with monkeypatch.context() as m:
        m.setattr(Run, "save", break_later)
        try:
            with pytest.raises(UserError, match=r"not finite at step 10; the last good checkpoint is .*step-0000010"):
                go()
        finally:
            Breaks.broken = False
    assert not (tmp_path / "run" / "student").exists()
    assert go().step == 14 and json.loads((tmp_path / "run/measured.json").read_text())["exported_step"] == 14
    assert all(v.isfinite().all() for v in load_file(tmp_path / "run/student/custom.safetensors").values())


@pytest.mark.parametrize("export", ["best", "last"])
def test_the_best_student_by_the_score_is_exported_or_the_last_on_demand(tmp_path, export):
    """A run that is ruined after its first measurement."""
    cfg, model, run = make_run(tmp_path, steps=8, checkpoint_every=4, measure_every=4, sample_every=0, export=export, ema=0)
    G = run.train("student", model.make("student"), 0.05)
    run.watch(G, torch.tensor([1.0]))
    data = model.batches()
    def loss(batch):
        return {"loss": G(batch.randn(), batch.rand() * 0.9 + 0.05, batch.cond).square().mean() * (run.step >= 4)}
    for _ in run.loop():
        run.minimize(G, loss, data)
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    scores = {r["step"]: r["measure/score"] for r in rows if "measure/score" in r}
    assert scores[8] > 2 * scores[4]
    facts, step = json.loads((tmp_path / "run/measured.json").read_text()), {"best": 4, "last": 8}[export]
    assert facts["exported_step"] == step and facts["score"] == scores[step] and facts["steps"] == 8
    left = load_file(tmp_path / "run/student/toy.safetensors")
    same_as = lambda weights: all(torch.equal(left[k], v) for k, v in weights.items() if k in left)
    assert same_as(model.module.state_dict()) is (export == "best")          # nothing had moved at step 4
    assert [p.name for p in (tmp_path / "run/best").iterdir()] == ["step-0000004.safetensors"]


def test_going_back_to_an_older_checkpoint_forgets_what_was_best_later(tmp_path):
    _, model, run = make_run(tmp_path, steps=4, checkpoint_every=2, measure_every=2, sample_every=0)
    def go(run):
        G = run.train("student", model.make("student"), 1e-3)
        run.watch(G, torch.tensor([1.0]))
        data = model.batches()
        for _ in run.loop():
            run.minimize(G, lambda b: {"loss": G(b.randn(), b.rand() * 0.9 + 0.05, b.cond).square().mean()}, data)
    go(run)
    (tmp_path / "run" / "best" / f"step-{run.best[1]:07d}.safetensors").unlink()
    again = Run(run.cfg, model)
    again.cfg.steps = 6
    go(again)
    assert again.step == 6 and again.best[1] == 6


def test_the_bar_shows_when_the_nearest_limit_ends_the_run(tmp_path, capfd):
    """A million steps would take days; the time budget ends after a second, or the calls after a few hundred steps."""
    cfg, model, run = make_run(tmp_path, steps=10**6, checkpoint_every=0, measure_every=0, sample_every=0)
    cfg.time_budget = 1.0
    G = run.train("student", model.make("student"), 1e-3)
    data = model.batches()
    ends = []
    for _ in run.loop():
        run.minimize(G, lambda b: {"loss": G(b.randn(), b.rand() * 0.9 + 0.05, b.cond).square().mean()}, data)
        time.sleep(0.02)
        ends.append(run._last_step(0, 0.0, 0))
    assert all(0.7 * run.step < end < 1.4 * run.step for end in ends[20:]), (run.step, ends)
    shown = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("dmd: ") and "it/s" in line]
    assert shown.pop(0).startswith("dmd: 0it") and shown and all("<00:0" in line for line in shown) and f"{run.step}/{run.step} " in shown[-1], shown
    run.cfg.time_budget, run.cfg.max_calls, calls = 0.0, 2 * run.calls, run.calls
    assert calls and run._last_step(0, 0.0, 0) == 2 * run.step
    run.cfg.steps = run.step + 1
    assert run._last_step(0, 0.0, 0) == run.step + 1


def test_a_run_killed_before_its_first_checkpoint_begins_its_rows_anew(tmp_path):
    _, model, run = make_run(tmp_path)
    run.log({"student/loss": 1.0})
    again = Run(run.cfg, model)
    again.log({"student/loss": 2.0})
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["student/loss"] for r in rows] == [2.0]


@pytest.mark.parametrize("flag,least", [("accumulate", 1), ("keep_checkpoints", 1), ("checkpoint_every", 0)])
def test_numbers_below_their_least_are_refused(tmp_path, flag, least):
    with pytest.raises(UserError, match=f"--{flag} {least - 1}: give {least} or more"):
        make_run(tmp_path, **{flag: least - 1})


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    cfg, model, run = make_run(tmp_path, steps=50, checkpoint_every=5, measure_every=0, sample_every=0)
    G = run.train("student", model.make("student"), 1e-3)
    data = model.batches()
    import zoo.run
    real = zoo.run.save_tensors
    def full(tensors, path):
        if run.step > 5:
            path.write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        real(tensors, path)
    monkeypatch.setattr(zoo.run, "save_tensors", full)
    with pytest.raises(UserError, match="No space left.*step-0000005"):
        for _ in run.loop():
            run.minimize(G, lambda b: {"loss": G(b.randn(), b.rand(), b.cond).square().mean()}, data)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000005"]
    load_file(tmp_path / "run" / "checkpoints" / "step-0000005" / "student.safetensors")


# ------------------------------------------------------------------------------------------------------ bad input
CASES = '''
import contextlib, io, json, resource, runpy, sys
sys.path.insert(0, sys.argv[2])
from zoo import run as R
save = R.Run.save

def room_for_one(run):                     # the disk, as far as this process sees it, is full after the first checkpoint
    save(run)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))

for name, method, flags, full in json.loads(sys.argv[1]):
    R.Run.save = room_for_one if full else save
    sys.argv[0], sys.argv[1:] = "train.py", flags
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_path(f"{sys.path[0]}/train_{method}.py", run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sys.argv[1:] = []
    print(json.dumps([name, code, err.getvalue().replace("\\r", "\\n").splitlines()]), flush=True)
'''


@pytest.mark.slow
def test_bad_input_of_the_whole_script_is_one_last_line_and_exit_code_2(tmp_path):
    """Whole scripts, one after another in one child: nothing is stood in for, the full disk is a limit of the process that the kernel keeps."""
    (tmp_path / "empty.txt").write_text("\n \n")
    images = tmp_path / "images"
    for i in range(14):                                                        # one of the class folders' pictures is cut off
        (images / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
        (images / f"class {i % 2}" / f"{i:02d}.png").write_bytes(picture(i)[: 60 if i == 12 else None])
    run = lambda name, *flags: [*TOY, "--output_dir", str(tmp_path / name), *flags]
    for name, holds in (("nothing", None), ("kandinsky", "KandinskyPipeline"), ("flux", "FluxPipeline")):
        (tmp_path / name).mkdir()
        if holds:
            (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": holds}))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("!")
    of = lambda teacher, *flags: ["--teacher", str(teacher), "--output_dir", str(tmp_path / "none"), *flags]
    cases = {
        "unknown": ("dmd", of("emojii"), "emoji, fashion"),
        "nothing": ("dmd", of(tmp_path / "nothing"), "no model_index.json"),
        "family": ("dmd", of(tmp_path / "kandinsky"), "supported are"),
        "parts": ("dmd", of(tmp_path / "flux"), "cannot be opened"),
        "data": ("dmd", of("emoji", "--data", str(tmp_path / "missing.txt")), "missing.txt does not exist"),
        "recipe": ("dmd", of("emoji", "--recipe", "nope"), "unknown --recipe"),
        "micro": ("dmd", of("toy", "--batch", "31", "--accumulate", "2"), "not divisible"),
        "foreign": ("dmd", ["--teacher", "toy", "--output_dir", str(tmp_path / "foreign")], "not a run of ours"),
        "prompts": ("dmd", ["--data", str(tmp_path / "empty.txt"), "--output_dir", str(tmp_path / "a")], "empty.txt"),
        "images": ("ladd", ["--teacher", "fashion", "--data", str(images), "--output_dir", str(tmp_path / "b"), "--batch", "4", "--steps", "4"],
                   "1 of 14 images"),
        "memory": ("dmd", run("c", "--batch", "2000000000"), "smaller --batch"),
        "first": ("dmd", run("d", "--steps", "4"), ""),
        "changed": ("dmd", run("d", "--steps", "8", "--critic_updates", "5", "--lr", "0.5"), "critic_updates: 2 -> 5"),
        "explodes": ("dmd", run("e", "--steps", "1000", "--lr", "1e6", "--checkpoint_every", "1", "--log_every", "1"), "the last good checkpoint is"),
        "disk": ("dmd", run("f", "--steps", "20"), "step-0000004. Free some space"),
        "again": ("dmd", run("f", "--steps", "8"), ""),
        "best": ("dmd", run("g", "--steps", "8", "--measure_every", "6"), "could not write"),
    }
    done = subprocess.run([sys.executable, "-c", CASES, json.dumps([[n, m, f, n in ("disk", "best")] for n, (m, f, _) in cases.items()]), str(SCRIPTS)],
                          env=ENV, capture_output=True, text=True, timeout=300)
    found = {name: (code, lines) for name, code, lines in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == cases.keys(), done.stderr[-2000:]
    for name, (_, _, needle) in cases.items():
        code, lines = found[name]
        if not needle:
            assert code == 0, (name, found)
            continue
        assert code == 2 and lines[-1].startswith("error: ") and needle in lines[-1], (name, code, lines[-3:])
        assert sum(line.startswith("error: ") for line in lines) == 1 and not any("Traceback" in line for line in lines), name
    assert "lr: 5e-05 -> 0.5" in found["changed"][1][-1]
    assert not (tmp_path / "c" / "checkpoints").exists()                       # refused before step 1
    assert any("resumed from" in line and "step-0000004" in line for line in found["again"][1])
    assert [p.name for p in sorted((tmp_path / "f" / "checkpoints").iterdir())] == ["step-0000004", "step-0000008"]


def picture(i: int) -> bytes:
    """A PNG of grey."""
    import io

    from PIL import Image
    out = io.BytesIO()
    Image.new("L", (32, 32), 10 * i).save(out, "PNG")
    return out.getvalue()


@pytest.mark.slow
def test_under_accelerate_launch_the_error_is_the_last_line_before_the_launchers_trace(tmp_path):
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", str(SCRIPTS / "train_dmd.py"), "--teacher", "emojii", "--output_dir",
                           str(tmp_path / "run")],
                          env=ENV, capture_output=True, text=True, timeout=120)
    lines = done.stderr.splitlines()
    trace = lines.index("Traceback (most recent call last):")
    assert done.returncode != 0 and lines[trace - 1].startswith("error: ") and "emoji, fashion" in lines[trace - 1], lines
    assert "exit status 2" in lines[-1], lines[-1]


def test_a_tracker_that_is_missing_is_said_so(tmp_path, monkeypatch):
    import importlib.util

    import train_dmd
    from zoo import backbones
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else real(name, *a))
    with pytest.raises(UserError, match="pip install wandb"):
        Run(train_dmd.Config(teacher="toy", output_dir=str(tmp_path), report_to="wandb"), backbones.load("toy"))


@pytest.mark.slow
def test_a_run_reports_to_trackio(tmp_path):
    """Without network: trackio keeps its numbers in a folder of this machine. Stopped and resumed, it has the rows of both parts."""
    pytest.importorskip("trackio")
    home = {**ENV, "HF_HOME": str(tmp_path / "home"), "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, str(SCRIPTS / "train_dmd.py"), *TOY, "--output_dir", str(tmp_path / "run"), "--report_to", "trackio", "--log_every",
               "2", "--steps"]
    for steps in ("4", "8"):
        done = subprocess.run([*command, steps], env=home, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
    stored = [p for p in (tmp_path / "trackio").rglob("*") if p.is_file() and p.suffix in (".db", ".parquet")]
    assert stored, sorted((tmp_path / "trackio").rglob("*"))
    import sqlite3
    logged = [json.loads(row[0]) for row in sqlite3.connect(next(p for p in stored if p.suffix == ".db")).execute("SELECT metrics FROM metrics ORDER BY step")]
    assert sum("student/loss" in row for row in logged) >= 5          # steps 1, 2, 4, 6, 8


def test_resuming_with_another_configuration_shows_the_difference(tmp_path):
    import train_dmd
    from zoo import backbones
    model = backbones.load("toy")
    Run(train_dmd.Config(teacher="toy", output_dir=str(tmp_path)), model)
    with pytest.raises(UserError, match=r"critic_updates: 2 -> 5"):
        Run(train_dmd.Config(teacher="toy", output_dir=str(tmp_path), critic_updates=5), model)
    Run(train_dmd.Config(teacher="toy", output_dir=str(tmp_path), steps=9), model)       # more steps is a resumption
    import train_lcm
    with pytest.raises(UserError, match="another method"):
        Run(train_lcm.Config(teacher="toy", output_dir=str(tmp_path)), model)


def test_an_estimate_above_free_memory_is_refused_before_step_1(tmp_path, monkeypatch):
    import psutil
    import train_dmd
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 10_000})())
    with pytest.raises(UserError, match="smaller --batch"):
        train_dmd.main(train_dmd.Config(teacher="toy", output_dir=str(tmp_path / "run")))


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys, monkeypatch):
    """And leaves the group of ranks as a run does, whose threads would outlive it."""
    import train_dmd
    left, leave = [], Run._leave
    monkeypatch.setattr(Run, "_leave", lambda run: (left.append(run), leave(run)))
    train_dmd.main(train_dmd.Config(teacher="toy", output_dir=str(tmp_path / "run"), dry_run=True))
    text = capsys.readouterr().out
    for needle in ("guidance = ", "student: ", "critic: ", "trainable parameters", "global batch 32", "GB more at the peak"):
        assert needle in text
    assert not (tmp_path / "run").exists() and len(left) == 1


def test_recipe_fills_defaults_and_deviations_are_printed(capsys):
    import tyro

    import train_dmd
    from zoo.run import parse
    cfg = parse(train_dmd.Config, ["--recipe", "sdxl-4step", "--batch", "16", "--gan", "0"], tyro)
    assert cfg.critic_updates == 5 and cfg.batch == 16
    text = capsys.readouterr().err
    assert text.index("batch = 16 (recipe 128)") < text.index("gan = 0")


def test_learning_rate_is_a_pure_function_of_the_step(tmp_path):
    _, model, run = make_run(tmp_path, warmup=10)
    t = run.train("student", model.make("student"), 1e-2)
    assert [round(t.lr(s) / 1e-2, 6) for s in (0, 4, 9, 50)] == [0.1, 0.5, 1.0, 1.0]
    assert RunConfig().ema == 0.98
