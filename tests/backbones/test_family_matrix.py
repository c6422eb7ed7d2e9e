"""The command behind the README's table of families: its cases, its log and what the table says of it."""
from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from zoo import backbones
from zoo.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("families_run", ROOT / "benchmarks/families/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(teacher, script, form, outcome="ok", **more):
    return {"teacher": teacher, "script": script, "form": form, "outcome": outcome, "torch": "2", "diffusers": "0", "slot": False, "video": False, **more}


@pytest.mark.slow
def test_every_adapter_has_a_tiny_teacher(matrix, tmp_path):
    """A family that is registered without a builder would be missing from the matrix unseen."""
    world = matrix.World(tmp_path)
    served = {backbones.FAMILIES[json.loads((Path(world.teacher(name)) / "model_index.json").read_text())["_class_name"]] for name in world.known}
    assert set(backbones.FAMILIES.values()) - served == set()


def test_cases_begin_with_two_scripts_for_every_teacher(matrix):
    cases = [(t, m.name, f) for t, m, f in matrix.cases([], [])]
    assert len(set(cases)) == len(cases) == len(matrix.teachers()) * len(matrix.methods()) * 2
    assert {c[1] for c in cases[: 4 * len(matrix.teachers())]} == {"dmd", "meanflow"}
    assert [(t, m.name, f) for t, m, f in matrix.cases(["dit"], ["lcm"])] == [("dit", "lcm", "lora"), ("dit", "lcm", "full")]


def test_the_table_says_what_failed_and_what_is_not_supported(matrix):
    rows = [row("dit", "dmd", "lora"), row("dit", "dmd", "full"), row("dit", "meanflow", "full", slot=True), row("sdxl", "dmd", "lora"),
            row("sdxl", "arcflow", "lora", "unsupported", why="UserError: no last layer"), row("ltx", "dmd", "full", "failed", why="RuntimeError: x"),
            row("wan", "dmd", "full", video=True)]
    table = matrix.refresh(f"before\n{matrix.BEGIN}\nold\n{matrix.END}\nafter", rows)
    assert table.startswith("before\n") and table.endswith(f"{matrix.END}\nafter") and "old" not in table
    for line in ("| dit | all 1 | all 2 | all 1 | all 2 | – |", "| sdxl | 1 of 2 | – | – | 1 of 2 | – |", "| ltx | – | no | – | no | – |",
                 "| wan | – | all 1 | – | all 1 | yes |", "- not supported, arcflow (lora) (sdxl): no last layer",
                 "- fails, dmd (full) (ltx): RuntimeError: x"):
        assert line in table.splitlines()
    with pytest.raises(SystemExit, match="families:begin"):
        matrix.refresh("no markers", rows)


def test_the_table_says_which_adapters_stock_diffusers_does_not_load(matrix):
    loads = row("sdxl", "dmd", "lora", lora_file="load_lora_weights")
    assert matrix.adapters([loads, row("sdxl", "meanflow", "full", slot=True), row("dit", "dmd", "full")]) == []
    said = matrix.adapters([loads, row("sdxl", "meanflow", "lora", slot=True), row("dit", "meanflow", "lora", slot=True), row("dit", "dmd", "lora")])
    assert len(said) == 2 and said[0].startswith("- LoRA students of meanflow: ") and "two_time=True" in said[0]
    assert said[1].startswith("- no `load_lora_weights` in the stock pipeline of dit: ")


def test_outcomes(matrix):
    assert matrix.outcome(UserError("no")) == "unsupported" and matrix.outcome(ValueError("no")) == "failed"


def test_one_case_is_run_logged_and_not_repeated(matrix, tmp_path, monkeypatch, capsys):
    """`run` with a life that fails once: the log holds it, --check counts it, --again repeats it alone."""
    import argparse
    lives = []

    def life(world, name, method, form, out):
        lives.append((name, method.name, form))
        if len(lives) == 1:
            raise RuntimeError("broken\nsecond line")
        return {"family": name, "slot": False, "video": False}
    monkeypatch.setattr(matrix, "life", life)
    monkeypatch.setattr(matrix, "LOG", tmp_path / "log.jsonl")
    args = argparse.Namespace(families=["dit"], scripts=["lcm"], limit=0, again=False, check=False, raise_=False)
    matrix.run(args)
    assert [r["outcome"] for r in matrix.read().values()] == ["ok", "failed"] and matrix.read()["dit", "lcm", "lora"]["why"] == "RuntimeError: broken"
    matrix.run(args)
    assert len(lives) == 2 and matrix.check(args) == 1
    args.again = True
    matrix.run(args)
    assert lives[2:] == [("dit", "lcm", "lora")] and matrix.check(args) == 0
    capsys.readouterr()
