"""The times of a flow teacher lie where its own scheduler puts them, unless the run, its recipe or its method says otherwise."""
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "train_scripts")]
import tiny_a  # noqa: E402
import tiny_b  # noqa: E402

from zoo import backbones  # noqa: E402
from zoo.errors import UserError  # noqa: E402
from zoo.hub.contract import contract_for  # noqa: E402
from zoo.run import Run  # noqa: E402

EVEN = (1.0, 0.75, 0.5, 0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the tiny teacher `name` is, made when asked for."""
    root = tmp_path_factory.mktemp("shift")

    def of(name):
        if not (root / name).exists():
            (tiny_a if name in tiny_a.BUILDERS else tiny_b).build(name, root / name)
        return str(root / name)
    return of


def begun(model, out, script="dmd", dry_run=True, **fields) -> Run:
    """A run of `script` up to where its roles would be made."""
    config = importlib.import_module(f"train_{script}").Config
    return Run(config(teacher=model, output_dir=str(out / "run"), mixed_precision="no", dry_run=dry_run, **fields), model)


@pytest.mark.parametrize("family,k", [("sd3", 3.0), ("zimage", 3.0), *(pytest.param(f, 3.0, marks=pytest.mark.slow) for f in ("wan", "sana"))])
def test_a_run_takes_the_shift_of_the_teachers_scheduler(folder, tmp_path, family, k):
    model = backbones.load(folder(family))
    run = begun(model, tmp_path)
    assert (model.shift, model.process.shift, run.describe()["flow_shift"]) == (k, k, k)
    most = contract_for(model, EVEN, "ode").knots[4]
    assert most == pytest.approx([1000 * k * t / (1 + (k - 1) * t) for t in EVEN], abs=1e-3)


@pytest.mark.parametrize("family", ["flux", pytest.param("zimage", marks=pytest.mark.slow)])
def test_student_times_are_the_stock_pipelines_own(folder, tmp_path, family):
    """The shift that follows the size of the picture: 4 even student times are the 4 steps of the stock call, and so are the teacher's references."""
    model = backbones.load(folder(family))
    begun(model, tmp_path)
    call = model.stock_call | {"prompt": "a red heart", "num_inference_steps": 4, "output_type": "latent"}
    model.pipe(**call)
    assert model.process.shift > 1.1
    assert contract_for(model, EVEN).knots[4] == pytest.approx(model.pipe.scheduler.timesteps.tolist(), abs=2e-3)


def test_what_a_run_or_its_method_says_instead(folder, tmp_path):
    """1 is no shift; methods of two times and those with a shift of their own keep theirs, also on a teacher that another run has moved."""
    model = backbones.load(folder("sd3"))
    for script, fields, k in (("dmd", {}, 3.0), ("dmd", {"flow_shift": 1.0}, 1.0), ("dmd", {"flow_shift": 5.0}, 5.0), ("meanflow", {}, 1.0),
                              ("lcm", {}, 3.0), ("rcm", {}, 1.0), ("flow_map", {}, 1.0), ("split_meanflow", {}, 1.0), ("twinflow", {}, 1.0)):
        run = begun(model, tmp_path, script, **fields)
        assert (model.process.shift, run.describe()["flow_shift"]) == (k, 0.0 if k == 1 else k), (script, fields)
    model.make("student", two_time=True)
    begun(model, tmp_path, "meanflow", flow_shift=3.0)
    with pytest.raises(UserError, match="draws its two times itself"):
        model.make("student", two_time=True)


@pytest.mark.parametrize("name", ["emoji", "fashion", "toy", "toy-video"])
def test_teachers_that_count_their_own_times_are_left_alone(tmp_path, name):
    model = backbones.load(name)
    process, pred = model.process, model.pred
    assert begun(model, tmp_path).describe()["flow_shift"] == 0.0
    assert model.process is process and model.pred == pred
    assert not model.takes_shift or model.shift == 1.0
    if name == "emoji":
        with pytest.raises(UserError, match="flow-matching teachers"):
            begun(model, tmp_path, flow_shift=3.0)


def test_a_run_from_before_goes_on_unmoved_when_told_so(folder, tmp_path):
    """Its record says 0: the default would be another run, which is said; --flow_shift 1 is the same run."""
    model = backbones.load(folder("sd3"))
    fields = dict(dry_run=False, sample_every=0, measure_every=0)
    begun(model, tmp_path, **fields)
    begun(model, tmp_path, **fields)                           # what it wrote is its own
    record = tmp_path / "run/config.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"flow_shift": 0.0}))
    with pytest.raises(UserError, match=r"flow_shift: 0.0 -> 3.0"):
        begun(model, tmp_path, **fields)
    begun(model, tmp_path, flow_shift=1.0, **fields)


def test_two_times_is_said_by_the_scripts_that_have_them():
    """`two_times` is set where a student is made with two times, and nowhere else."""
    scripts = Path(__file__).parents[2] / "train_scripts"
    found = {p.stem for p in scripts.glob("train_*.py") if 'make("student"' in (text := p.read_text(encoding="utf-8")) and "run.watch(" in text
             and any("two_time=True" in line for line in text.splitlines() if 'make("student"' in line)}
    said = {p.stem for p in scripts.glob("train_*.py") if importlib.import_module(p.stem).Config.two_times}
    assert found == said and len(said) == 4
    assert all("two_times" not in {f.name for f in dataclasses.fields(importlib.import_module(s).Config)} for s in said)
