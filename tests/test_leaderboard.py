"""Counting network calls, and the leaderboard's pure pieces on tiny data; the guard itself is slow."""
import csv
import dataclasses
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "train_scripts"), str(ROOT / "benchmarks" / "leaderboard")]
import measures  # noqa: E402
import pages  # noqa: E402
import train_dmd  # noqa: E402
import train_lcm  # noqa: E402
import train_meanflow  # noqa: E402
from tiny import tiny_pixel  # noqa: E402

from zoo import backbones, calculus, health, losses, metrics, registry, rollout  # noqa: E402
from zoo.denoiser import CALLS  # noqa: E402
from zoo.errors import UserError  # noqa: E402
from zoo.process import view  # noqa: E402
from zoo.run import Run, RunConfig  # noqa: E402


def load(name):
    """benchmarks/leaderboard/<name>.py under a name of its own: other benchmarks have a run.py too."""
    spec = importlib.util.spec_from_file_location(f"leaderboard_{name}", ROOT / "benchmarks" / "leaderboard" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


run, curves, other = load("run"), load("curves"), load("other")


# ------------------------------------------------------------------------------------------------------- counting calls
@pytest.fixture(scope="module")
def pixel(tmp_path_factory):
    return str(tiny_pixel(tmp_path_factory.mktemp("teacher") / "pixel"))


@pytest.fixture(scope="module")
def toy():
    return backbones.load("toy")          # fitted once; every role is a copy


def counted(fn) -> int:
    before = CALLS.total
    fn()
    return CALLS.total - before


def test_a_call_counts_its_samples_once_thrice_or_twice(toy):
    model = toy
    net, cond = model.make("student"), {"label": torch.arange(5)}
    x, t = torch.randn(5, 2), torch.full((5,), 0.5)
    call = lambda: net(x, t, cond)
    assert counted(call) == 15                                        # its parameters are trained
    with torch.no_grad():
        assert counted(call) == 5
    net.module.requires_grad_(False)
    assert counted(call) == 5                                         # a constant net of constant inputs
    assert counted(lambda: net(x.clone().requires_grad_(), t, cond)) == 15
    net.module.requires_grad_(True)
    assert counted(lambda: view(net, model.process)(x, t, cond)) == 15
    from zoo.process import TrigFlow
    assert counted(lambda: view(net, TrigFlow())(x, t, cond)) == 15   # a view is not a second call
    assert counted(lambda: model.teacher(x, t, cond)) == 5            # the closed form stands for a network
    along = lambda how: calculus.total_derivative(lambda x, t: net(x, t, cond), (x, t), (x, t * 0 + 1), how)
    assert counted(lambda: along("jvp")) == 10 and counted(lambda: along("fd")) == 15
    knots = torch.tensor([1.0, 0.75, 0.5, 0.25])
    assert counted(lambda: rollout.backward_simulation(net, x, cond, knots, 3, lambda: x)) == 15
    assert counted(lambda: losses.guided(model.teacher, x, t, cond, {"label": cond["label"] * 0 + 8}, 3.0)) == 10


CHEAP = dict(batch=8, time_budget=0, sample_every=0, measure_every=0, checkpoint_every=1, mixed_precision="no")
# Calls per sample of one step, by hand, with a guided teacher (a guided call is two): DMD, one student time, two critic updates of
# x = G (1), fake trained (3); then G trained (3), guided teacher (2), fake (1). LCM: guided teacher (2), average (1), f trained (3).
# MeanFlow: guided teacher (2), central difference alone, without its middle (2), u trained (3).
BY_HAND = {"dmd": 2 * (1 + 3) + 3 + 2 + 1, "lcm": 2 + 1 + 3, "meanflow": 2 + 2 + 3}
SCRIPTS = {"dmd": train_dmd, "lcm": train_lcm, "meanflow": train_meanflow}


def config(name, out, teacher, **options):
    return SCRIPTS[name].Config(teacher=teacher, output_dir=str(out), **{**CHEAP, "student_times": (1.0,), **options})


def calls(out) -> int:
    return json.loads((out / "measured.json").read_text())["calls"]


@pytest.mark.parametrize("name", BY_HAND)
def test_one_step_by_hand(tmp_path, pixel, name):
    from PIL import Image
    for i in range(16):
        (tmp_path / f"images/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 16 * i).save(tmp_path / f"images/{i % 2}/{i}.png")
    out = tmp_path / "run"
    done = SCRIPTS[name].main(config(name, out, pixel, steps=1, guidance=2.0, data=str(tmp_path / "images")))
    assert done.calls == calls(out) == 8 * BY_HAND[name]              # sampling and measuring are not training
    assert [json.loads(r)["calls"] for r in (out / "metrics.jsonl").read_text().splitlines()] == [done.calls]


def test_one_step_by_hand_on_the_toy(tmp_path, toy):
    """The toy's teacher is unguided: one call less."""
    for name in BY_HAND:
        done = SCRIPTS[name].main(config(name, tmp_path / name, toy, steps=1))
        assert done.calls == 8 * (BY_HAND[name] - 1), name
    jvp = train_meanflow.main(config("meanflow", tmp_path / "jvp", toy, steps=1, derivative="jvp"))
    assert jvp.calls == 8 * (1 + 2 + 3)
    gan = train_dmd.main(config("dmd", tmp_path / "gan", toy, steps=1, gan=0.01))
    assert gan.calls == 8 * (2 * (1 + 3 + 3 + 3) + 3 + 1 + 3)         # the discriminator reads x_t and y_t, the student's loss x_t, for score and logit at once


def test_a_resumed_run_goes_on_counting_and_a_budget_of_calls_stops_it(tmp_path, toy):
    out, per_step = tmp_path / "run", 8 * (BY_HAND["lcm"] - 1)
    train_lcm.main(config("lcm", out, toy, steps=2))
    resumed = train_lcm.main(config("lcm", out, toy, steps=100, max_calls=4 * per_step - 1))
    assert resumed.step == 4 and resumed.calls == calls(out) == 4 * per_step
    rows = [json.loads(r) for r in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(r["calls"] == r["step"] * per_step for r in rows)


def test_micro_batches_add_up(tmp_path, toy):
    assert train_lcm.main(config("lcm", tmp_path / "run", toy, steps=1, accumulate=2)).calls == 8 * (BY_HAND["lcm"] - 1)


def test_what_is_prepared_before_the_loop_counts_once(tmp_path, toy):
    """Stored pairs cost calls too; a resumed run that makes them again does not pay twice. The estimate before step 1 is free."""
    def prepare(steps):
        model = toy
        r = Run(train_lcm.Config(teacher=toy, output_dir=str(tmp_path / "run"), steps=steps, **CHEAP), model)
        G, data = r.train("student", model.make("student"), 1e-3), model.batches()
        model.teacher(torch.randn(100, 2), torch.full((100,), 0.5), {"label": torch.zeros(100, dtype=torch.long)})
        for _ in r.loop():
            r.minimize(G, lambda b: {"loss": G(b.randn(), b.rand(), b.cond).square().mean()}, data)
        return r
    assert prepare(1).calls == 100 + 24
    assert prepare(3).calls == 100 + 3 * 24
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0 and first["calls"] == 100 and first["prepared_seconds"] > 0


# ------------------------------------------------------------------------------------------------------- measures
LINE = lambda *v: torch.tensor(v, dtype=torch.float32)[:, None]


def test_precision_recall_density_coverage_by_hand():
    """Data 0 1 2 10 have balls of 1 1 1 8 to their nearest neighbour, samples .5 3.5 20 of 3 3 16.5.
    .5 lies in the balls of 0 and 1, 3.5 in that of 10 (6.5 away), 20 in none; 0 1 2 lie in the ball of .5, and 10 in that of 20."""
    real, fake = LINE(0, 1, 2, 10), LINE(0.5, 3.5, 20)
    assert measures.manifold(real, fake, k=1) == pytest.approx({"precision": 2 / 3, "recall": 1.0, "density": 3 / 3, "coverage": 3 / 4})
    swapped = measures.manifold(fake, real, k=1)
    assert (swapped["precision"], swapped["recall"]) == pytest.approx((1.0, 2 / 3))          # a mutation: the roles exchanged is another answer
    assert measures.manifold(real, fake, k=2)["precision"] == pytest.approx(2 / 3)           # 20 is 10 from 10, whose second neighbour is 9 away
    assert measures.manifold(real, LINE(0.5, 3.5, 18.5), k=2)["precision"] == 1.0            # the ball of k = 2 is 9, that of k = 1 is 8
    assert measures.manifold(real, LINE(0.5, 3.5, 18.5), k=1)["precision"] == pytest.approx(2 / 3)


def test_precision_and_recall_tell_collapse_from_noise():
    g = torch.Generator().manual_seed(0)
    draw = lambda n, std=1.0: torch.randn(n, 8, generator=g) * std
    real = draw(300)
    same, collapsed, noisy = (measures.manifold(real, x) for x in (draw(300), draw(300, 0.2), draw(300, 5.0)))
    assert same["precision"] > 0.5 and same["recall"] > 0.5
    assert collapsed["precision"] > 0.9 and collapsed["recall"] < 0.1 and collapsed["coverage"] < 0.5
    assert noisy["precision"] < 0.05


def test_paired_distance_is_unbiased_for_shared_noise_where_the_plain_one_is_not():
    g = torch.Generator().manual_seed(0)
    gaps, plain = [], []
    for _ in range(200):
        x = torch.randn(20, 6, generator=g)
        y = 0.95 * x + (1 - 0.95**2) ** 0.5 * torch.randn(20, 6, generator=g)     # the same law, nearly the same points
        gaps.append(measures.paired_kid(x, y).value)
        plain.append(metrics.kid(x, y).value)
    mean = torch.tensor(gaps).mean().item()
    assert abs(mean) < 3 * torch.tensor(gaps).std().item() / 200**0.5
    assert torch.tensor(plain).mean() < -100 < mean                   # the mutation: counting the pairs reads far too low
    x, y = torch.randn(40, 6, generator=g), 2 + torch.randn(40, 6, generator=g)
    far = measures.paired_kid(x, y)
    assert far.low < far.value < far.high and far.value == pytest.approx(metrics.kid(x, y).value, rel=0.1)
    by_hand = sum(k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i in range(40) for j in range(40) if i != j) / (40 * 39)
    assert far.value == pytest.approx(1000 * by_hand.item(), rel=1e-5)


def k(a, b):
    return (a.double() @ b.double() / len(a) + 1) ** 3


def test_endpoint_error_is_in_units_of_seed_diversity():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 400, 1, 4, 4, generator=g)
    unit = metrics.diversity(torch.stack([a, b], 1))
    assert measures.endpoint_error(a, a, unit) == 0 and measures.endpoint_error(a, b, unit) == pytest.approx(1, abs=0.01)


# ------------------------------------------------------------------------------------------------------- the board
def row(steps, kid, sampler="renoise", calls=None, **more):
    return {"sampler": sampler, "steps": steps, "calls": calls or steps, "kid_efflite0": kid, "kid_low": kid - 1, "kid_high": kid + 1, "kid_teacher": kid,
            **dict.fromkeys(("precision", "recall", "density", "coverage", "agreement", "diversity"), 0.5), "ode_error": None, **more}


JOB = {"training_seconds": 1.0, "training_calls": 2_000_000, "training_steps": 3, "peak_memory_gb": 0.5, "parameters": 10, "trained_parameters": 20,
       "budget_used": 1.0, "warnings": [], "hardware": "test", "sampler": "renoise", "steps": [1, 2, 4], "slot": None}


def entry(who, seed, rows, kind="method", **more):
    return {"who": who, "kind": kind, "family": "trajectory" if kind == "method" else "", "seed": seed, "job": JOB if kind == "method" else None, "rows": rows, **more}


ENTRIES = [entry("teacher", None, [row(50, 100.0, "ode", 100), row(1, 900.0, "ode", 2)], "teacher"), entry("untrained", None, [row(1, 1500.0)], "untrained"),
           entry("dmd", 0, [row(1, 300.0), row(4, 200.0)]), entry("dmd", 1, [row(1, 340.0), row(4, 240.0)]), entry("dmd", 2, [row(1, 380.0), row(4, 280.0)]),
           entry("meanflow", 0, [row(1, 500.0), row(4, 450.0, "jump", ode_error=0.25)]), entry("lcm", 0, [], error="error: no images", job=None)]
FACTS = {"teacher": "fashion", "samples": 200, "time_budget": 120.0, "max_calls": 0, "reference_steps": 50, "flags": "", "hardware": "test", "guidance": 2.0}


def test_seeds_are_averaged_with_their_spread():
    rows = {(r["who"], r["sampler"], r["calls"]): r for r in pages.average(pages.flat(ENTRIES))}
    assert rows["dmd", "renoise", 1]["kid_efflite0"] == pytest.approx((340, 40)) and rows["dmd", "renoise", 1]["seeds"] == 3
    assert rows["meanflow", "renoise", 1]["kid_efflite0"] == (500, None)
    assert [g[0]["who"] for g in pages.by_student(list(rows.values()))] == ["dmd", "meanflow", "untrained", "teacher", "meanflow"]


def test_seconds_are_the_median_over_seeds():
    waited = [entry("dmd", s, [row(1, 300.0)]) | {"job": JOB | {"training_seconds": took, "training_steps": took}} for s, took in ((0, 2655.5), (1, 150.0), (2, 130.0))]
    found, = pages.average(pages.flat(waited))
    assert found["training_seconds"] == (150.0, None) and found["training_steps"][0] == pytest.approx(978.5)
    text = pages.markdown(waited, FACTS)
    assert "| median seconds |" in text and "| 150 |" in text


def test_ode_error_is_that_of_the_row_shown():
    told = lambda *rows, kind="method": pages.markdown([entry("lcm", 0, list(rows), kind)], FACTS).split("nearest to real images:")[1].splitlines()[-1].split("|")[10].strip()
    few, many = row(1, 900.0, "ode", 2, ode_error=6.85), row(50, 100.0, "ode", 100)
    assert told(few, many, kind="teacher") == ""                                   # at its many steps it is the reference itself
    assert told(few, row(2, 90.0, "ode", ode_error=1.25)) == "1.25" and told(row(1, 80.0, ode_error=4.2), row(4, 90.0)) == "4.20"
    assert told(row(1, 800.0, ode_error=4.2), row(4, 90.0)) == ""


def test_picture_labels_are_the_network_calls_of_its_halves():
    guided = [entry("teacher", None, [row(k, 100.0 + k, "ode", 2 * k) for k in (1, 4, 50)], "teacher"), entry("unipc", None, [row(k, 90.0, "solver", 2 * k) for k in (4, 8)], "solver"),
              entry("untrained", None, [row(k, 90.0) for k in (1, 4, 8)], "untrained"), entry("lcm", 0, [row(k, 90.0) for k in (1, 2, 4)]),
              entry("tdm", 0, [row(4, 90.0, "ode")]), entry("arcflow", 0, [row(2, 90.0, "ode")])]
    found = {label: halves for label, *halves in pages.strips(guided)}
    assert set(found) == {"teacher: 100 calls", "teacher: 2 | 8 calls", "unipc: 8 | 16 calls", "untrained: 1 | 4 calls", "lcm renoise: 1 | 4 calls", "tdm ode: 4 calls", "arcflow ode: 2 calls"}
    assert found["teacher: 2 | 8 calls"] == [("teacher", "ode", 1), ("teacher", "ode", 4)] and found["unipc: 8 | 16 calls"][1] == ("unipc", "solver", 8)
    assert found["tdm ode: 4 calls"] == [None, ("tdm", "ode", 4)] and found["arcflow ode: 2 calls"] == [("arcflow", "ode", 2), None]


def test_table_is_a_row_per_seed_and_count_and_an_error_is_a_row(tmp_path):
    pages.table(ENTRIES, tmp_path / "t.csv")
    rows = list(csv.DictReader(open(tmp_path / "t.csv")))
    assert len(rows) == 12 and [r["error"] for r in rows if r["who"] == "lcm"] == ["error: no images"]
    assert {(r["seed"], r["calls"]) for r in rows if r["who"] == "dmd"} == {(s, c) for s in "012" for c in "14"}


def test_markdown_and_markers(tmp_path):
    text = pages.markdown(ENTRIES, FACTS)
    assert "| dmd | trajectory | renoise | 340 ± 40 |  | 240 ± 40 |  |  |" in text
    assert "| teacher | baseline | ode |  | 900 |  |  | 100 at 100 |" in text
    assert "Failed: lcm seed 0: error: no images." in text and "meanflow (jump)" in text and "0.25" in text
    widths = {line.count("|") for line in text.split("Each where it is nearest to real images:")[1].splitlines() if line.startswith("|")}
    assert len(widths) == 1
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- leaderboard:begin -->\nold\n<!-- leaderboard:end -->\nafter\n")
    assert pages.between(page, "leaderboard", pages.short(ENTRIES, FACTS))
    assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n") and "old" not in page.read_text()
    assert page.read_text().index("| dmd | 340 ± 40 |  | 240 ± 40 |") < page.read_text().index("| meanflow") < page.read_text().index("| untrained")
    assert not pages.between(tmp_path / "none.md", "leaderboard", "x")


def test_a_star_marks_who_ended_before_the_budget_in_every_table():
    done = entry("progressive", 0, [row(4, 190.0)]) | {"job": JOB | {"budget_used": 0.7, "training_calls": 41_600}}
    for text in (pages.markdown([*ENTRIES, done], FACTS), pages.short([*ENTRIES, done], FACTS)):
        assert text.count("| progressive* |") == text.count("| progressive") > 0 and "| dmd* |" not in text
        assert "\\* reached its script's own `--steps` before the budget was spent (progressive: 41,600 calls)." in text
    assert "*" not in pages.short(ENTRIES, FACTS)


def test_more_calls_than_a_student_was_trained_for_are_shown_and_never_its_best():
    rows = [row(1, 300.0), row(4, 200.0), row(8, 100.0)]
    text = pages.markdown([ENTRIES[0], entry("lcm", 0, rows), entry("untrained", None, rows, "untrained")], FACTS)
    assert "| lcm | trajectory | renoise | 300 |  | 200 | 100° |  |" in text and "| 300 |  | 200 | 100 |  |" in text          # the untrained one has no contract
    assert text.count("° more calls than the student was trained for") == 1 and "°" not in pages.markdown(ENTRIES, FACTS)
    best = text.split("nearest to real images:")[1]
    assert "| lcm | 4 | 200 |" in best and "| untrained | 8 | 100 |" in best
    assert ("lcm renoise: 1 | 4 calls", ("lcm", "renoise", 1), ("lcm", "renoise", 4)) in pages.strips([entry("lcm", 0, rows)])
    assert [r["beyond"] for r in pages.flat([entry("lcm", 0, rows)])] == [1, None, None]


def test_seeds_and_costs_are_told_from_the_rows():
    trained = lambda who, *seeds, seconds=100.0: [entry(who, s, [row(1, 300.0)]) | {"job": JOB | {"training_seconds": seconds + s}} for s in seeds]
    assert pages.seeds(trained("dmd", 0)) == "one seed" and pages.seeds(trained("dmd", 0, 1, 2)) == "three seeds"
    assert pages.seeds(trained("dmd", 0, 1, 2) + trained("lcm", 0)) == "one to three seeds"
    assert pages.seeds([*trained("dmd", 0), entry("dmd", 1, [], error="error: x")]) == "one seed"        # a failed one is none
    text = pages.so_far([("a", trained("dmd", 0), FACTS), ("b", trained("dmd", *range(5)), FACTS | {"teacher": "emoji", "hardware": "1 threads, x"})])
    assert text == "So far: one seed on fashion, five seeds on emoji (half of the trainings took 101 to 103 s); 1 thread, x and test, beside other work."
    assert "one seed (0), teacher" in pages.markdown(trained("dmd", 0), FACTS) and "two seeds (0, 1; mean ± spread over them)" in pages.markdown(trained("dmd", 0, 1), FACTS)


def test_students_beside_the_training_free_solvers():
    solvers = [entry(who, None, [row(4, kid, "solver", 8), row(8, 100.0, "solver", 16)], "solver") for who, kid in (("unipc", 300.0), ("dpmsolver++", 320.0))]
    seeds = [entry("sid", s, [row(4, kid)]) for s, kid in ((0, 260.0), (1, 300.0))]                      # within its own spread of 28
    told = pages.against_solvers(pages.by_student(pages.average(pages.flat([*solvers, *seeds, *(entry(who, 0, [row(4, kid)]) for who, kid in
                                                                           (("tscd", 298.0), ("dmd", 322.0), ("lcm", 320.5)))]))))
    assert told == "Students at 4 calls beside dpmsolver++ and unipc at 8 (300 and 320): ahead: tscd; level: lcm, sid; behind: dmd."
    assert pages.against_solvers([]) == ""


# ------------------------------------------------------------------------------------------------------- what is committed
@pytest.fixture(scope="module")
def committed():
    """The boards of the small budget, which the pages speak of: {teacher: entries}."""
    return {facts["teacher"]: rows for _, rows, facts in pages.known(pages.HERE) if facts["max_calls"] == 60_000}


def test_the_tables_are_those_of_the_committed_rows(tmp_path):
    """`python benchmarks/leaderboard/pages.py` makes them again."""
    for (page, name), text in pages.tables(pages.HERE).items():
        assert f"<!-- {name}:begin -->\n{text}\n<!-- {name}:end -->" in (ROOT / page).read_text(encoding="utf-8"), (page, name)
    for name, rows, _ in pages.known(pages.HERE):
        pages.table(rows, tmp_path / "t.csv")
        assert (tmp_path / "t.csv").read_text() == (pages.HERE / name / "leaderboard.csv").read_text(), name


def test_every_method_of_a_plot_can_be_told_apart(committed):
    """In one panel no two methods share colour and marker (ten of them), and every method stands in one panel."""
    for rows in committed.values():
        groups = pages.panels(pages.by_student(pages.average(pages.flat(rows))))
        names = [{g[0]["who"] for g in group} for group in groups.values()]
        assert all(len(n) <= 10 for n in names) and sum(map(len, names)) == len(set().union(*names)) == len({e["who"] for e in rows if e["kind"] == "method"})


def test_two_commands_may_write_one_file(tmp_path, monkeypatch):
    replace, others = os.replace, [{"of": "another"}]

    def after_another(temp, path):
        if others:
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: -1)
                run.write(path, others.pop())
        replace(temp, path)
    monkeypatch.setattr(os, "replace", after_another)
    run.write(tmp_path / "board.json", {"of": "this"})
    assert json.loads((tmp_path / "board.json").read_text()) == {"of": "this"} and not others and len(list(tmp_path.iterdir())) == 1


def test_the_drift_of_dmd_is_told_as_it_was_measured():
    page = " ".join((pages.HERE / "README.md").read_text(encoding="utf-8").split())
    told = {"rates-default": "in 1 / 2 / 4 steps, ends at {}, with", "rates-quarter": "a quarter of both rates beside them at {} (`drift/`"}
    board = json.loads((pages.HERE / "fashion-0.06Mcalls/rows/dmd-seed0.json").read_text())["rows"]
    assert f"four times the calls seed 0 of `dmd`, on the board {' / '.join(str(round(r['kid_efflite0'])) for r in board[:3])} in 1 / 2 / 4 steps" in page
    assert {p.stem for p in (pages.HERE / "drift").glob("*.json")} == set(told)
    for name, sentence in told.items():
        kept = json.loads((pages.HERE / "drift" / f"{name}.json").read_text())
        kid = {r["calls"]: round(r["kid_efflite0"]) for r in kept["rows"]}
        assert sentence.format(f"{kid[1]} / {kid[2]} / {kid[4]}") in page, (name, kid)
        assert kept["job"]["training_calls"] > 4 * 60_000 and ("--lr 1.25e-5 --critic_lr 5e-5" in kept["command"]) == (name == "rates-quarter")


def test_drawings_are_those_of_the_committed_rows():
    """`python benchmarks/leaderboard/pages.py` draws them again."""
    from PIL import Image
    for name, rows, _ in pages.known(pages.HERE):
        drawn = pages.digest(pages.points(pages.by_student(pages.average(pages.flat(rows)))))
        assert Image.open(pages.HERE / name / "plot.png").text["Drawn from"] == drawn, name
    board = pages.HERE / curves.REFERENCE
    entries = curves.load(board)
    assert Image.open(ROOT / "docs/curves.png").text["Drawn from"] == pages.digest(curves.curves(entries))
    assert f"<!-- curves:begin -->\n{curves.caption(entries, board)}\n<!-- curves:end -->" in (ROOT / "docs/symptoms.md").read_text(encoding="utf-8")


def test_what_is_read_off_the_curves():
    calls = [1, 2, 3]
    series = {"lcm": {"measure/score": [[calls, [3.0, 2.0, 1.0]]] * 2}, "tdm": {"measure/score": [[calls, [1.0, 5.0, 2.0]], [calls, [3.0, 2.0, 1.0]]]},
              "sid": {"measure/score": [[[1], [2.0]]]}, "meanflow": {"student/loss": [[calls, [0.9999, 1.0, 0.9999]]], "measure/score": [[calls, [3.0, 2.0, 1.0]]]}}
    text = curves.reading(series)
    assert "falls in every seed of 2 of 3 methods; it ends higher for `tdm` in 1 of 2 seeds." in text
    assert "`sid`: so few updates" in text and "`meanflow`: the loss is constant" in text and "`lcm`" not in text


def test_what_the_pages_say_of_the_boards_is_so(committed):
    """The sentences of README.md and benchmarks/leaderboard/README.md that name methods, on the rows there are."""
    mean = {t: {(r["who"], r["sampler"], r["calls"]): r for r in pages.average(pages.flat(rows))} for t, rows in committed.items()}
    best = lambda t, who, key, calls: min((r[key][0] for (w, _, c), r in mean[t].items() if w == who and c == calls and r[key]), default=math.inf)
    students = lambda t: {w for (w, _, _), r in mean[t].items() if r["kind"] == "method"}
    solvers = lambda t, calls: [r["kid_efflite0"][0] for (_, _, c), r in mean[t].items() if r["kind"] == "solver" and c == calls]
    # Fashion-MNIST
    kid = lambda who, calls: best("fashion", who, "kid_efflite0", calls)
    assert min(students("fashion"), key=lambda w: kid(w, 1)) == "reflow"
    for who in ("split_meanflow", "tscd", "progressive"):
        assert kid(who, 4) < min(solvers("fashion", 8)), who
    for who in ("dmd", "decoupled_dmd", "sid"):
        assert kid(who, 2) > max(solvers("fashion", 8)) and (who == "sid" or kid(who, 4) > max(solvers("fashion", 8))), who
    assert kid("sid", 4) < max(solvers("fashion", 8)) and kid("ladd", 4) > kid("dmd", 4)
    wide = lambda t: {w for (w, _, _), r in mean[t].items() if (s := r["kid_efflite0"][1]) and s / r["kid_efflite0"][0] > 0.1 and not r["beyond"]}
    assert wide("fashion") == {"scm", "rcm", "decoupled_dmd", "dmd", "meanflow", "sid", "tdm"}
    # both
    more = {t: {(w, s): mean[t][w, s, 8]["kid_efflite0"][0] / r["kid_efflite0"][0] for (w, s, c), r in mean[t].items()
                if c == 4 and r["kind"] == "method" and (w, s, 8) in mean[t]} for t in mean}
    assert all(len(more[t]) >= 18 and sum(r < 1 for r in more[t].values()) > 0.7 * len(more[t]) for t in more)
    nearer = {("dmd", "renoise"), ("reflow", "ode"), ("tdm", "ode"), ("ladd", "renoise"), ("split_meanflow", "renoise"), ("flow_map", "renoise"), ("meanflow", "jump")}
    assert {key for key, r in more["fashion"].items() if r < 0.9} == nearer
    assert more["fashion"]["sid", "renoise"] > 2 and 1.1 < more["fashion"]["flow_map", "jump"] < 1.3
    # emoji
    assert wide("emoji") == {"scm"}
    scores = [[round(v) for *_, v in e["curve"]["measure/score"]] for e in committed["emoji"] if e["who"] == "scm"]
    assert [(min(s), s[-1]) for s in scores] == [(1303, 1536), (1362, 1521), (1456, 3481)]
    kid, taught = (lambda who, calls, key=key: best("emoji", who, key, calls) for key in ("kid_efflite0", "kid_teacher"))
    assert all(sum(kid(w, c) < kid("untrained", c) for w in students("emoji")) <= 2 for c in (1, 2, 4))
    assert kid("teacher", 100) > kid("untrained", 2)
    began, free = min(taught("untrained", c) for c in (1, 2, 4, 8)), min(r["kid_teacher"][0] for (_, _, c), r in mean["emoji"].items() if r["kind"] == "solver" and c == 8)
    for who, calls in (("reflow", (1, 2, 4)), ("arcflow", (2,)), ("flow_map", (1, 2, 4)), ("tscd", (4,)), ("split_meanflow", (4,)), ("dmd_pairs", (1,))):
        assert all(taught(who, c) < min(began, free) for c in calls), who
    for who in ("dmd", "sid", "rcm", "swiftbrush"):
        assert all(taught(who, c) > taught("untrained", c) for c in (1, 2, 4) if taught(who, c) < math.inf), who
    learned = {e["who"] for e in committed["emoji"] if e["family"] == "trajectory"} | {"dmd_pairs"}
    assert sum(any(taught(w, c) < min(began, free) for c in (1, 2, 4)) for w in learned) > len(learned) / 2


def test_ci_reruns_two_methods_with_one_seed():
    """The guard below is in what .ci/run's second test stage selects."""
    marks = {m.name for m in test_quick_two_methods_beat_the_untrained_student.pytestmark}
    assert marks == {"slow"} and re.search(r"^pytest .*-m slow$", (ROOT / ".ci" / "run").read_text(), re.M)
    quick = run.settle(run.Config(quick=True, results="x", work="y"))
    assert len(quick.methods) == 2 and len(quick.seeds) == 1


def test_the_readme_has_its_markers():
    text = (ROOT / "benchmarks/leaderboard/README.md").read_text()
    assert text.count("<!-- leaderboard:begin -->") == text.count("<!-- leaderboard:end -->") == 1


def test_pictures_and_curves_from_a_board(tmp_path):
    from PIL import Image
    for e in ENTRIES:
        for r in e["rows"]:
            pages.keep_strip(tmp_path, e["who"], r, torch.rand(8, 1, 16, 16) * 2 - 1)
    one = torch.rand(8, 1, 16, 16) * 2 - 1
    pages.keep_strip(tmp_path, "dmd", row(1, 0.0), one)
    assert torch.allclose(pages.read_strip(pages.strip_path(tmp_path, "dmd", "renoise", 1))[:, :1], one, atol=0.01)
    pages.picture(ENTRIES, tmp_path, tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").height > 5 * 48
    before = (tmp_path / "samples.png").read_bytes()
    pages.strip_path(tmp_path, "dmd", "renoise", 1).unlink()
    pages.picture(ENTRIES, tmp_path, tmp_path / "samples.png")
    assert (tmp_path / "samples.png").read_bytes() == before          # a strip is gone: the picture stays
    rows = [{"step": i, "calls": 10 * i, "student/loss": 1 / i, "warning": "x"} for i in range(1, 200)] + [{"step": 200, "calls": 2000, "student/loss": math.nan}]
    thin = run.curve(rows)
    assert len(thin["student/loss"]) == 60 and thin["student/loss"][0] == [1, 10, 1.0] and thin["student/loss"][-1][0] == 199
    drawn = curves.curves([entry("dmd", s, [], curve=thin) for s in (0, 1)])
    assert list(drawn) == ["dmd"] and len(drawn["dmd"]["student/loss"]) == 2
    pytest.importorskip("matplotlib")
    curves.draw(drawn, tmp_path / "curves.png")
    assert pages.plot(ENTRIES, FACTS, tmp_path / "plot.png") and (tmp_path / "curves.png").stat().st_size > 1000


def test_why_a_script_failed_is_one_line():
    assert run.reason("noise\nerror: no images: set X\ntrailing\n", 2) == "error: no images: set X"
    assert run.reason("Traceback\n  File\nValueError: no\n", 1) == "ValueError: no"
    assert "memory" in run.reason("", -signal.SIGKILL)


def test_a_student_is_measured_where_its_contract_serves_it():
    assert run.variants(JOB) == [("renoise", 1), ("renoise", 2), ("renoise", 4), ("renoise", 8)]
    assert run.variants(JOB | {"sampler": "ode", "steps": [3, 8]}) == [("ode", 8)]
    assert run.variants(JOB | {"steps": [1]}) == [("renoise", 1)] and run.variants(JOB | {"steps": [2]}) == [("renoise", 2)]      # nothing was learnt between
    assert run.variants(JOB | {"slot": "r"})[4:] == [("jump", 2), ("jump", 4), ("jump", 8)]
    assert run.variants(JOB | {"slot": "r", "sampler": "jump"})[0] == ("renoise", 1)


class Still:
    """A world whose samples and measures cost nothing."""
    per_step = 2

    def __init__(self, work):
        self.work = work

    def measure(self, images, deterministic):
        return {"kid_efflite0": images.mean().item()}


def board(tmp_path, **options):
    cfg = run.settle(run.Config(samples=20, results=str(tmp_path / "board"), work=str(tmp_path / "work"), **options))
    return cfg, run.Board(cfg)


def test_rows_that_are_there_are_not_repeated_and_errors_are_rows(tmp_path, monkeypatch):
    cfg, b = board(tmp_path, methods=("dmd", "lcm"), seeds=(0,))
    trained, drawn = [], []
    def train(cfg, name, seed):
        trained.append(name)
        if name == "lcm":
            raise run.Failed("error: no images")
        (tmp_path / "work" / f"{name}-seed{seed}" / "student").mkdir(parents=True, exist_ok=True)
        return dict(JOB), {"student/loss": [[1, 10, 0.5]]}
    def images(world, folder, sampler, steps):
        drawn.append(steps)
        if steps == broken:
            raise ValueError("bad knots")
        if steps == killed:
            raise KeyboardInterrupt
        return torch.full((8, 1, 4, 4), 1.0 / steps)
    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(run, "student", images)
    Still.images = lambda self, draw: draw
    world = lambda: Still(tmp_path / "work")
    broken, killed = 0, 2
    with pytest.raises(KeyboardInterrupt):                            # killed in the middle of the second row
        run.method(cfg, b, world, "dmd", 0)
    broken, killed = 4, 0
    run.method(cfg, b, world, "dmd", 0)
    assert trained == ["dmd"] and drawn == [1, 2, 2, 4, 8]            # the first row was kept, and so was the training
    run.method(cfg, b, world, "dmd", 0)
    run.method(cfg, b, world, "lcm", 0)
    run.method(cfg, b, world, "lcm", 0)
    assert trained == ["dmd", "lcm"] and drawn == [1, 2, 2, 4, 8]
    rows = {e["who"]: e for e in b.entries()}
    assert rows["lcm"]["error"] == "error: no images" and rows["lcm"]["rows"] == []
    assert [r.get("error") for r in rows["dmd"]["rows"]] == [None, None, "ValueError: bad knots", None]
    broken = 0
    run.method(dataclasses.replace(cfg, retry=True), b, world, "dmd", 0)
    assert drawn[-1] == 4 and all("error" not in r for r in b.load("dmd", "method", seed=0)["rows"]) and trained == ["dmd", "lcm"]


def test_a_board_holds_one_comparison(tmp_path):
    board(tmp_path)
    with pytest.raises(UserError, match=r"samples: 20 -> 40.*--results"):
        run.Board(run.settle(run.Config(samples=40, results=str(tmp_path / "board"))))
    for options, word in (({"teacher": "toy"}, "fashion and emoji"), ({"samples": 33}, "multiple of 10"), ({"methods": ("dmdd",)}, "did you mean")):
        with pytest.raises(UserError, match=word):
            run.settle(run.Config(**options))


def test_methods_are_the_image_methods_with_a_script():
    names = run.settle(run.Config(results="x", work="y")).methods
    assert {"dmd", "lcm", "meanflow"} <= set(names) and all(registry.method(n).modality == "image" for n in names)


def test_every_method_trains_under_one_budget():
    cfg = run.settle(run.Config(max_calls=5000, flags="--batch 8", results="x", work="y"))
    words = run.command(cfg, "dmd", 1, Path("out"))
    at = lambda flag: words[words.index(flag) + 1]
    assert (at("--max_calls"), at("--time_budget"), at("--seed"), at("--batch"), at("--export")) == ("5000", "0.0", "1", "8", "last")


@pytest.mark.slow
def test_a_killed_training_continues(tmp_path, monkeypatch):
    """SIGKILL of the leaderboard: its child saves and stops; the same call goes on from there, and the cost is that of one run."""
    flags = "--teacher toy --steps 100000 --log_every 1 --checkpoint_every 100000"
    code = ("import sys, runpy; sys.argv = ['x']\n"
            f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'benchmarks/leaderboard')!r}]\n"
            f"import run; cfg = run.settle(run.Config(max_calls=10**9, flags={flags!r}, measure_every=0, results='x', work={str(tmp_path)!r}))\n"
            "run.train(cfg, 'lcm', 0)")
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log, saved = tmp_path / "lcm-seed0" / "metrics.jsonl", tmp_path / "lcm-seed0" / "checkpoints"
    deadline = time.time() + 60
    while not (log.exists() and log.read_text().count("\n") > 20):
        assert parent.poll() is None and time.time() < deadline, parent.stderr.read()[-2000:]
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    if run.LIBC is None:
        pytest.skip("the child of a killed process is told only on Linux")
    while not list(saved.glob("step-*")):
        assert time.time() < deadline
        time.sleep(0.05)
    step = int(list(saved.glob("step-*"))[0].name[5:])
    per_step = 32 * (BY_HAND["lcm"] - 1)
    monkeypatch.setattr(run, "load_file", lambda path: {})            # the toy has no unet folder
    cfg = run.settle(run.Config(max_calls=(step + 5) * per_step, flags=flags, measure_every=0, results="x", work=str(tmp_path)))
    job, curve = run.train(cfg, "lcm", 0)
    assert job["training_steps"] == step + 5 and job["training_calls"] == (step + 5) * per_step and job["budget_used"] == 1
    assert [p[0] for p in curve["student/loss"]] == sorted(p[0] for p in curve["student/loss"]) and job["steps"] == [1, 2, 4]


def test_the_guard_speaks_of_every_problem():
    good = [entry("dmd", 0, [row(1, 300.0)]), entry("untrained", None, [row(1, 900.0)], "untrained"), entry("teacher", None, [row(1, 200.0, "ode", 2)], "teacher")]
    run.check(good, ("dmd",))
    for bad, word in ((entry("dmd", 0, [row(1, 950.0)]), "950"), (entry("dmd", 0, [row(1, 300.0, recall=math.nan)]), "recall is nan"),
                      (entry("dmd", 0, [], error="error: x"), "error: x"), (entry("dmd", 0, [row(2, 300.0)]), "not measured at one step")):
        with pytest.raises(SystemExit, match=word):
            run.check([bad, *good[1:]], ("dmd",))


@pytest.mark.slow
def test_quick_two_methods_beat_the_untrained_student(tmp_path):
    """Calls, not seconds, so that a slow machine trains as far as a fast one."""
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks/leaderboard/run.py"), "--quick", "--results", str(tmp_path / "board"), "--work", str(tmp_path / "work")],
                          capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    rows = (tmp_path / "board" / "leaderboard.csv").read_text().splitlines()
    assert {r.split(",")[0] for r in rows[1:]} == {"teacher", "untrained", "dpmsolver++", "unipc", "dmd", "lcm"}
    assert (tmp_path / "board" / "samples.png").exists() and "| dmd |" in (tmp_path / "board" / "table.md").read_text()


def test_the_table_of_steps_is_that_of_its_rows():
    steps = load("steps")
    page = (steps.HERE / "README.md").read_text(encoding="utf-8")
    assert all(f"<!-- {name}:begin -->\n{made()}\n<!-- {name}:end -->" in page for name, made in (("steps", steps.table), ("stiffness", steps.teachers)))
    assert all(steps.kept(*case).exists() for case in steps.CASES) and len(steps.table().splitlines()) == 2 + len(steps.CASES) + 8


# ------------------------------------------------------------------------------------------------------- docs/symptoms.md
def test_symptoms_name_every_warning_and_only_flags_that_exist():
    page = (ROOT / "docs" / "symptoms.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.*)$", page, re.M)
    for name in health.REMEDIES:
        assert sum(f"`{name}`" in s for s in sections) == 1, name        # one section is about it
    named = {n for s in sections for n in re.findall(r"`([^`]+)`", s)}
    assert named <= set(health.REMEDIES), named - set(health.REMEDIES)   # and none about a warning that is no more
    known = {f.name for f in dataclasses.fields(RunConfig)}
    for m in registry.METHODS:
        if m.path.is_file():
            known |= {f.name for f in dataclasses.fields(importlib.import_module(m.path.stem).Config)}
    flags = set(re.findall(r"--(\w+)", page))
    assert flags and flags <= known, flags - known
    anchors = {re.sub(r"[^\w -]", "", s.lower()).replace(" ", "-") for s in sections}
    links = set(re.findall(r"\]\(#([^)]*)\)", page))
    assert links and links <= anchors, links - anchors
    assert page.count("<!-- curves:begin -->") == page.count("<!-- curves:end -->") == 1


# ------------------------------------------------------------------------------------------------------- what stands beside the boards
def test_every_method_has_a_line_about_its_papers_number():
    with open(ROOT / "benchmarks/leaderboard/paper_numbers.csv", encoding="utf-8", newline="") as file:
        rows = {r["method"]: r for r in csv.DictReader(file)}
    assert set(rows) == {m.name for m in registry.METHODS}
    told = pages.tables(pages.HERE)["benchmarks/leaderboard/README.md", "papers"]
    assert all(f"\n| {name} | " in told for name in rows)
    for row in rows.values():
        assert row["source"] and bool(row["metric"]) == bool(row["value"]) == bool(row["dataset"]) == bool(row["calls"]), row


def test_small_tables_hold_the_teacher_once_and_every_student(tmp_path, monkeypatch):
    measured = [{"who": "teacher", "steps": 8, "calls": 8, "entropy": 2.5}, {"who": "student", "steps": 4, "calls": 4, "entropy": 2.25}]
    entry = {"command": "python x", "hardware": "h", "seconds": 12.0, "steps": 3, "calls": 2_000_000, "measured": measured}
    monkeypatch.setattr(other, "HERE", tmp_path)
    assert other.table(("a", "b")) == "Not measured yet."
    (tmp_path / "other").mkdir()
    for name in ("a", "b"):
        (tmp_path / "other" / f"{name}.json").write_text(json.dumps(entry))
    lines = other.table(("a", "b")).splitlines()
    assert lines[0] == "| model | steps | network calls | entropy |"
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["teacher", "a", "b"] and "| 4 | 4 | 2.25 |" in lines[4]
    assert "2.00 M calls in 12 s" in lines[-1]
