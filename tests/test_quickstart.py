"""The quick start's measurement: what the plain command and --fresh do (on a stand-in for models and training), and that README says what its logs hold."""
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from zoo import registry
from zoo.errors import UserError

ROOT = Path(__file__).parent.parent


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


run, ship = load("benchmarks/quickstart/run.py", "quickstart_run"), load("benchmarks/students/ship.py", "students_ship")
SHIPPED = {s.name: s for s in registry.OURS if s.kind == "shipped" and s.teacher in run.PICTURES}


# ------------------------------------------------------------------------------------------------------- what is committed
def test_readme_is_what_the_logs_say():
    """Rewrite it with `python benchmarks/quickstart/run.py`, which measures what is missing."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"<!-- results:begin -->\n{run.page(*run.logs())}<!-- results:end -->" in page
    states, took = run.logs()
    assert {s["teacher"] for s in states} == {"emoji", "fashion"} and took["install_seconds"] > 0
    for s in states:
        assert not any(run.missing(s, who) for who in ("teacher", *s["jobs"])) and set(run.shipped(s["teacher"])) | {"student"} == set(s["jobs"])


def test_shipped_students_were_measured_as_they_are_shipped():
    """The rows are of the weights in the package, and so is the log of what halving did to their pictures."""
    halved = json.loads(ship.LOG.read_text())
    jobs = {name: job for s in run.logs()[0] for name, job in s["jobs"].items() if name != "student"}
    assert set(jobs) == set(SHIPPED) == set(halved)
    for name, row in SHIPPED.items():
        here = run.fingerprint(ROOT / "zoo" / row.source)
        assert jobs[name]["weights"] == here == halved[name]["weights"] != halved[name]["exported_weights"], name
        assert set(halved[name]["changed"]) == {str(k) for k in row.steps} and all(v["max"] < 0.01 for v in halved[name]["changed"].values()), name


def test_commands_of_shipped_students_are_those_of_their_cards():
    """README and card give one command each, the run's own."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, row in SHIPPED.items():
        command = json.loads((ROOT / "zoo" / row.source / "fewstep.json").read_text())["card"]["command"]
        assert f"`{command}`" in page and f"- command: `{command}`" in (ROOT / "model_cards" / f"{name}.md").read_text(encoding="utf-8")
    assert len(re.findall(r"train_reflow\.py --", page)) == 1


def test_what_readme_says_of_the_results_is_so():
    closed = {who: {int(k): v for k, v in gaps.items()} for s in run.logs()[0] for who, gaps in s["gap_closed"].items() if who != "student"}
    kid = {(s["teacher"], r["who"], r["steps"]): r for s in run.logs()[0] for r in s["rows"]}
    emoji, reflow, dmd = closed["dmd.emoji-4step"], closed["reflow.fashion-4step"], closed["dmd.fashion-4step"]
    assert kid["emoji", "student", 4]["low"] < kid["emoji", "teacher", 50]["kid_efflite0"] < kid["emoji", "student", 4]["high"]
    assert emoji[2] > 0.9 and emoji[1] > 0.8                          # nearly all, most
    assert reflow[1] > 0.8 and reflow[2] > 0.8 and reflow[4] > 0.5
    assert dmd[1] > 0.3 and abs(dmd[2]) < 0.1 and dmd[4] < 0
    own = {s["teacher"]: s["jobs"]["student"]["own"]["gap_closed"] for s in run.logs()[0]}
    assert abs(own["emoji"]["4"]) < 0.1
    untrained = {r["calls"]: r["kid_efflite0"]
                 for r in json.loads((ROOT / "benchmarks/leaderboard/fashion-0.06Mcalls/rows/untrained.json").read_text())["rows"]}
    teacher = {k: kid["fashion", "teacher", k]["kid_efflite0"] for k in (1, 2, 4)}
    assert 0.85 * teacher[1] < untrained[1] < teacher[1] and untrained[2] > teacher[2] and untrained[4] > teacher[4]


def test_readme_names_only_options_the_command_has():
    import dataclasses
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    given = [words for line in page.splitlines() if "benchmarks/quickstart/run.py" in line for words in re.findall(r"--(\w+)", line.partition("#")[0])]
    assert given == ["fresh"] and set(given) <= {f.name for f in dataclasses.fields(run.Config)}


# ------------------------------------------------------------------------------------------------------- what the command does
class Stand:
    """A bench whose rows and times cost nothing, and count."""
    net, model = "teacher's", SimpleNamespace(guidance=2.0, bf16_on_cpu=True)

    def __init__(self, teacher, n):
        done.append("loaded")

    def student(self, folder):
        return folder, "renoise"

    def row(self, who, net, steps, rule):
        if (who, steps) == killed:
            raise KeyboardInterrupt
        done.append((who, steps))
        return {"who": who, "steps": steps, "calls": steps, "samples": 2000, "kid_efflite0": 100.0 + steps, "low": 0.0, "high": 300.0,
                "class_accuracy": 0.5, "diversity": 0.5}

    def milliseconds(self, net, steps, rule):
        timed.append(net)
        return 1.0


done, timed, trained, killed = [], [], [], None
OWN = {"space": "fashionnet", "samples": 64,
       "measured": [{"who": w, "steps": k, "conditional_kid_fashionnet": 10.0 * k} for w in ("teacher", "student") for k in (8, 4, 2, 1)]}


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """An empty clone: no logs, no runs, one shipped student."""
    def launch(command, **_):
        out = Path(command[command.index("--output_dir") + 1])
        (out / "student").mkdir(parents=True)
        (out / "measured.json").write_text(json.dumps(OWN | {"seconds": 1.0, "steps": 3, "exported_step": 3}))
        trained.append(out.name)
    global killed
    killed = None
    for kept in (done, timed, trained):
        kept.clear()
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "weights.safetensors").write_bytes(b"one")
    (tmp_path / "zoo" / "fewstep.json").write_text(json.dumps({"card": OWN | {"command": "x", "seconds": 1.0, "steps": 3, "exported_step": 3, "device": "d"}}))
    (tmp_path / "README.md").write_text("a\n<!-- results:begin -->\n<!-- results:end -->\nb\n")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "Bench", Stand)
    monkeypatch.setattr(run, "picture", lambda b, net, rule, teacher: done.append("picture"))
    monkeypatch.setattr(run, "shipped", lambda teacher: {"x.fashion-4step": tmp_path / "zoo"})
    monkeypatch.setattr(run, "install", lambda: done.append("installed") or {"install_seconds": 1.0})
    monkeypatch.setattr(run, "subprocess", SimpleNamespace(run=launch))
    return tmp_path


def measure(**options):
    for kept in (done, timed, trained):
        kept.clear()
    run.main(run.Config(teachers=("fashion",), output_dir="outputs/quickstart", **options))


ALL = {*(("teacher", k) for k in run.TEACHER_STEPS), *((who, k) for who in ("student", "x.fashion-4step") for k in run.STUDENT_STEPS)}


def test_plain_command_measures_what_is_missing_and_nothing_twice(clone):
    measure()
    assert set(done) == ALL | {"loaded", "picture", "installed"} and trained == ["fashion"] and len(timed) == len(ALL)
    assert "| student | 4 |" in (clone / "README.md").read_text() and "batch of 16" in (clone / "README.md").read_text()
    measure()
    assert not done and not timed and not trained                     # nothing is loaded either
    (clone / "zoo" / "weights.safetensors").write_bytes(b"two")       # other weights are shipped: their rows alone
    measure()
    assert {d for d in done if d != "loaded"} == {("x.fashion-4step", k) for k in run.STUDENT_STEPS} and not trained and len(timed) == len(ALL)


def test_fresh_trains_and_measures_everything_in_new_folders(clone):
    measure()
    first = json.loads((clone / "results-fashion.json").read_text())
    measure(fresh=True)
    assert set(done) == ALL | {"loaded", "picture", "installed"} and trained == ["fashion-2"]
    again = json.loads((clone / "results-fashion.json").read_text())
    assert again["jobs"]["student"]["folder"] == "outputs/quickstart/fashion-2/student" != first["jobs"]["student"]["folder"]


def test_a_measurement_that_was_cut_short_continues(clone):
    global killed
    measure()
    killed = ("student", 1)
    with pytest.raises(KeyboardInterrupt):
        measure(fresh=True)
    assert trained == ["fashion-2"]
    killed = None
    before = [d for d in done if isinstance(d, tuple)]
    measure()
    assert trained == [] and {d for d in done if isinstance(d, tuple)} == ALL - set(before) and "installed" in done


def test_rows_of_one_student_are_of_one_run(clone):
    """The clone of somebody else has the log but not the run: where one of its rows is missing, all are measured on a new run."""
    import shutil
    measure()
    shutil.rmtree(clone / "outputs")
    measure()
    assert not done and not trained
    measure(timing=True)
    rows = json.loads((clone / "results-fashion.json").read_text())["rows"]
    assert len(timed) == len(ALL) - 3 and [("ms_per_image" in r) for r in rows] == [r["who"] != "student" for r in rows] and not trained
    state = json.loads((clone / "results-fashion.json").read_text())
    state["rows"] = [r for r in rows if (r["who"], r["steps"]) != ("student", 2)]
    (clone / "results-fashion.json").write_text(json.dumps(state))
    measure()
    assert trained == ["fashion"] and {d for d in done if isinstance(d, tuple)} == {("student", k) for k in run.STUDENT_STEPS}


def test_another_number_of_samples_is_another_measurement(clone):
    measure()
    with pytest.raises(UserError, match="2000 samples, not 500: add --fresh"):
        measure(samples=500)
    measure(samples=500, fresh=True)
    assert json.loads((clone / "results-fashion.json").read_text())["samples"] == 500
    with pytest.raises(UserError, match="at least 24"):
        measure(samples=10)
