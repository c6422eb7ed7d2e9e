"""The command line: what it prints, for people and for machines, and how it ends."""
from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

import zoo
from zoo import cli, registry
from zoo.errors import UserError


def run(capsys, *words):
    cli.main(list(words))
    return capsys.readouterr().out


def fails(capsys, code, *words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(words))
    assert stopped.value.code == code
    return capsys.readouterr().err


def test_methods(capsys):
    lines = run(capsys, "methods", "*flow*").splitlines()
    assert lines[0].split()[:2] == ["NAME", "FAMILY"] and [x.split()[0] for x in lines[1:]] == [m.name for m in zoo.methods("*flow*")]
    data = json.loads(run(capsys, "methods", "--json"))
    assert [m["name"] for m in data] == [m.name for m in zoo.methods()] and data[0]["url"].startswith("https://arxiv.org/abs/")


def test_students(capsys):
    lines = run(capsys, "students", "--method", "dmd2", "--base", "sdxl").splitlines()
    assert [x.split()[0] for x in lines[1:]] == ["dmd2.sdxl-4step", "dmd2.sdxl-4step-lora", "dmd2.sdxl-1step"]
    data = json.loads(run(capsys, "students", "hyper-sd.*", "--steps", "8", "--json"))
    assert all(8 in s["steps"] and s["name"].startswith("hyper-sd.") and s["facts"] for s in data) and data
    assert json.loads(run(capsys, "students", "--status", "unverified",
                          "--json")) == json.loads(json.dumps([cli.as_dict(s) for s in zoo.students(status="unverified")]))
    assert run(capsys, "students", "no-such*").splitlines()[0].startswith("NAME")


def test_counts():
    assert cli.counts((8, 7, 6, 5, 4, 3, 2)) == "2-8" and cli.counts((4, 2, 1)) == "1, 2, 4" and cli.counts((4,)) == "4"


def test_show_a_student(capsys):
    text = run(capsys, "show", "hyper-sd.flux-8step")
    for part in ("ByteDance/Hyper-SD", "Hyper-FLUX.1-dev-8steps-lora.safetensors", "0.125", "guidance_scale=3.5", "verified"):
        assert part in text
    data = json.loads(run(capsys, "show", "dmd2.sdxl-4step", "--json"))
    assert data["timesteps"] == {"4": [999, 749, 499, 249]} and data["metrics"][0]["source"]


def test_show_a_method_with_its_recipes(capsys):
    text = run(capsys, "show", "dmd", "--recipes")
    assert text.startswith(registry.method("dmd").doc.splitlines()[0])
    assert "--recipe sdxl-4step" in text and "Yin et al. 2024" in text and "guidance = 8.0" in text
    import train_dmd
    assert cli.read_recipes(registry.method("dmd")) == train_dmd.Config.recipes


@pytest.mark.parametrize("name", [m.name for m in registry.METHODS])
def test_recipes_are_read_as_the_script_has_them(name):
    import importlib
    assert cli.read_recipes(registry.method(name)) == importlib.import_module(registry.method(name).path.stem).Config.recipes


def test_show_answers_with_the_nearest_of_both_kinds(capsys):
    assert "did you mean sdxl-turbo" in fails(capsys, 2, "show", "sdxl-turb")
    assert "did you mean dmd" in fails(capsys, 2, "show", "dmmd")


def test_a_row_cannot_bring_markup(capsys, monkeypatch):
    row = replace(registry.student("sdxl-turbo"), name="[red]x.y[/red]", license="[link=https://evil]mit[/link]")
    monkeypatch.setattr(registry, "STUDENTS", (row,))
    text = run(capsys, "students")
    assert "[red]x.y[/red]" in text and "[link=https://evil]mit[/link]" in text


@pytest.mark.parametrize("words", [("show", "dmmd"), ("cite", "dmmd"), ("make", "hyper-sd.sdxl-4stp"), ("sample", "hyper-sd.sdxl-4stp", "a fox"),
                                   ("where", "dmmd")])
def test_mistakes_are_one_line_and_exit_code_2(capsys, words):
    err = fails(capsys, 2, *words)
    assert err.startswith("error: ") and err.count("\n") == 1


def test_the_hub_commands_pass_their_flags_on(capsys, monkeypatch):
    said = {}

    def push(folder, repo_id, **options):
        said.update(folder=folder, repo_id=repo_id, **options)
        return "https://hub/commit/1"
    monkeypatch.setattr("zoo.hub.publish.push", push)
    out = run(capsys, "push", "outputs/x/student", "user/x", "--private", "--revision", "next", "--create_pr", "--tag", "v1")
    assert out.strip() == "https://hub/commit/1"
    assert said == {"folder": "outputs/x/student", "repo_id": "user/x", "private": True, "revision": "next", "create_pr": True, "tag": "v1",
                    "collection": None}
    run(capsys, "push", "outputs/x/student", "user/x")
    assert said["private"] is None and said["create_pr"] is False        # nothing said: the Hub's own default


def test_verify_ends_with_1_when_something_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr("zoo.hub.verify.verify", lambda source, revision=None: [f"{source}@{revision}: README.md is missing"])
    with pytest.raises(SystemExit) as stopped:
        cli.main(["verify", "user/x", "--revision", "v1"])
    assert stopped.value.code == 1 and "user/x@v1: README.md is missing" in capsys.readouterr().out
    monkeypatch.setattr("zoo.hub.verify.verify", lambda source, revision=None: [])
    assert json.loads(run(capsys, "verify", "user/x", "--json")) == {"source": "user/x", "problems": []}


def rebuilt_row(value, tolerance=0.1):
    return registry.rebuilt("dmd.toy-2step", "dmd", "toy", (4, 2, 1), "mit", "--teacher toy --steps 2", 3, {"torch": "0.0.1"},
                            (registry.Metric("conditional_kid_flat", value, 4, "toy", "measured.json", tolerance),))


def test_make_repeats_the_command_and_holds_it_against_the_row(capsys, monkeypatch, tmp_path):
    """The exact flags and the seed reach the script; a metric outside its tolerance ends with exit code 1."""
    heard = []

    def train(name, flags):
        heard.append((name, flags))
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "measured.json").write_text(json.dumps({"measured": [{"who": "teacher", "steps": 4, "conditional_kid_flat": 9},
                                                                       {"who": "student", "steps": 4, "conditional_kid_flat": 0.45}]}))
    monkeypatch.setattr(cli, "train", train)
    monkeypatch.setattr(registry, "STUDENTS", (rebuilt_row(0.4),))
    report = json.loads(run(capsys, "make", "dmd.toy-2step", "--out", str(tmp_path / "run"), "--json"))
    assert heard == [("dmd", ["--teacher", "toy", "--steps", "2", "--seed", "3", "--output_dir", str(tmp_path / "run")])]
    assert report == [{"metric": "conditional_kid_flat", "steps": 4, "here": 0.45, "row": 0.4, "tolerance": 0.1, "verdict": "agrees"}]
    monkeypatch.setattr(registry, "STUDENTS", (rebuilt_row(0.2),))
    err = fails(capsys, 1, "make", "dmd.toy-2step", "--out", str(tmp_path / "run"))
    assert "made with torch 0.0.1" in err
    monkeypatch.setattr(registry, "STUDENTS", (registry.student("dmd.toy-2step"), registry.shipped("dmd.x", "dmd", "toy", (4,), "mit")))
    assert "is shipped" in fails(capsys, 2, "make", "dmd.x")


@pytest.mark.slow
def test_make_really_trains(capsys, monkeypatch, tmp_path):
    """A row's command through the method's own script, to a student that opens by the row's name."""
    import torch
    row = replace(rebuilt_row(1.0, tolerance=1e9), command="--teacher toy --steps 2 --batch 8")
    monkeypatch.setattr(registry, "STUDENTS", (row,))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["zoo"])
    cli.main(["make", row.name])
    capsys.readouterr()
    points = zoo.load(row.name)(class_labels=[0, 1], generator=torch.Generator().manual_seed(0)).images
    assert points.shape == (2, 2) and torch.isfinite(points).all()


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """An exported tiny text-to-image student."""
    import tiny
    from zoo.backbones import load
    from zoo.hub.contract import contract_for
    from zoo.hub.export import export_student
    root = tmp_path_factory.mktemp("cli")
    model = load(str(tiny.tiny_sd(root / "teacher")))
    return export_student(model, model.make("student"), root / "student", contract_for(model, (1.0, 0.75, 0.5, 0.25)))


def test_sample_draws_a_row_of_pictures(capsys, student, tmp_path):
    from PIL import Image
    out = tmp_path / "a.png"
    assert run(capsys, "sample", str(student), "red heart", "--steps", "2", "--seeds", "3", "--out", str(out)).strip() == str(out)
    assert Image.open(out).size == (48, 16)
    assert "trained for 1, 2, 4" in fails(capsys, 2, "sample", str(student), "red heart", "--steps", "3")
    assert "give a writable path" in fails(capsys, 2, "sample", str(student), "red heart", "--seeds", "1", "--out", str(tmp_path / "no" / "a.png"))


def test_errors_that_are_bugs_keep_their_traceback(monkeypatch):
    def broken(args):
        raise RuntimeError("a bug")
    monkeypatch.setattr(cli, "list_methods", broken)
    with pytest.raises(RuntimeError):
        cli.main(["methods"])
    assert issubclass(UserError, ValueError)
