"""`zoo eval`: what is measured is what was drawn, parts of the time add up, and what is missing is said."""
from __future__ import annotations

import importlib.util
import json
import sys
import time
import types

import pytest
import torch

import tiny
from zoo import cli, evaluate, metrics
from zoo.backbones import load
from zoo.errors import UserError
from zoo.hub.contract import contract_for
from zoo.hub.export import export_student


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    out = {}
    for name, folder in (("sd", tiny.tiny_sd(root / "teacher-sd")), ("pixel", tiny.tiny_pixel(root / "teacher-pixel", channels=1))):
        model = load(str(folder))
        out[name] = export_student(model, model.make("student"), root / name, contract_for(model, (1.0, 0.75, 0.5, 0.25)))
    return out


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("red heart\n\nblue star\nsmiling face\n")
    return path


def rows(report):
    return {r["metric"]: r for r in report["rows"]}


def test_report(students, prompts, tmp_path):
    """Distances to the references are those of zoo.metrics on the same pictures; diversity sees the seeds."""
    from PIL import Image
    (tmp_path / "real").mkdir()
    g = torch.Generator().manual_seed(0)
    for i in range(6):
        Image.fromarray((torch.rand(16, 16, 3, generator=g) * 255).byte().numpy()).save(tmp_path / "real" / f"{i}.png")
    report = evaluate.evaluate(students["sd"], prompts, seeds=2, reference=str(tmp_path / "real"), repeats=1)
    assert report["pictures"] == 6 and report["steps"] == 4 and report["size"] == [16, 16] and json.dumps(report)
    space = metrics.default_feature_space()
    import zoo
    pipe = zoo.load(students["sd"])
    pictures = evaluate.to_tensor([evaluate.draw(pipe, {"prompt": t}, s, None) for t in ("red heart", "blue star", "smiling face") for s in (0, 1)])
    features = metrics.feature_space(space)
    from zoo.data import images
    expected = metrics.kid(features(pictures), features(images(str(tmp_path / "real"), 16, 3))).value
    found = rows(report)
    assert found[f"kid_{space}"]["value"] == pytest.approx(expected, abs=1e-3)
    assert found[f"diversity_{space}"]["value"] == pytest.approx(metrics.diversity(features(pictures).reshape(3, 2, -1)), abs=1e-3)


def test_what_is_not_installed_is_skipped_and_said(students, prompts, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in ("hpsv2", "ImageReward", "torchmetrics",
                                                                                       "torch_fidelity") else find(name, *a))
    found = rows(evaluate.evaluate(students["sd"], prompts, limit=1, seeds=1, repeats=1))
    assert {m for m, r in found.items() if r["value"] == evaluate.SKIPPED} >= {"fid", "clip_score", "hpsv2", "image_reward"}
    assert "pip install image-reward" in found["image_reward"]["note"] and "at least 2 seeds" in found[f"diversity_{metrics.default_feature_space()}"]["note"]


def test_preference_models_get_each_picture_with_its_prompt(students, prompts, monkeypatch):
    """Stand-ins for the packages: the score of a picture is looked up by its prompt."""
    heard = []
    score = {"red heart": 0.25, "blue star": 0.35}

    def hps(picture, prompt, hps_version):
        heard.append((picture.size, prompt, hps_version))
        return [score[prompt]]
    reward = types.SimpleNamespace(load=lambda name: types.SimpleNamespace(score=lambda prompt, picture: 10 * score[prompt]))
    monkeypatch.setitem(sys.modules, "hpsv2", types.SimpleNamespace(score=hps, __spec__=object()))
    monkeypatch.setitem(sys.modules, "ImageReward", types.SimpleNamespace(load=reward.load, __spec__=object()))
    found = rows(evaluate.evaluate(students["sd"], prompts, limit=2, seeds=2, repeats=1))
    assert found["hpsv2"]["value"] == pytest.approx(0.3) and found["image_reward"]["value"] == pytest.approx(3.0)
    assert heard == [((16, 16), p, "v2.1") for p in ("red heart", "red heart", "blue star", "blue star")]


def test_a_metric_that_cannot_fetch_its_network_is_skipped():
    def offline():
        raise OSError("cannot reach the Hub\nlong story")
    assert evaluate.tried("clip_score", None, offline) == {"metric": "clip_score", "value": evaluate.SKIPPED, "note": "skipped: cannot reach the Hub"}
    with pytest.raises(KeyError):               # a bug stays a bug
        evaluate.tried("x", None, lambda: {}["missing"])


@pytest.mark.parametrize("error", [AttributeError("no attribute 'clip'\nmore"), ImportError("no torchvision"), KeyError("weights"), AssertionError(),
                                   RuntimeError("ops")])
def test_a_package_that_fails_inside_is_a_skipped_row(students, prompts, monkeypatch, error):
    """Whatever HPSv2 or ImageReward raise while scoring or loading, the other rows stand and the reason is said."""
    def broken(*a, **k):
        raise error
    monkeypatch.setitem(sys.modules, "hpsv2", types.SimpleNamespace(score=broken, __spec__=object()))
    monkeypatch.setitem(sys.modules, "ImageReward", types.SimpleNamespace(load=broken, __spec__=object()))
    found = rows(evaluate.evaluate(students["sd"], prompts, limit=1, seeds=1, repeats=1, steps=1))
    for metric, package in (("hpsv2", "hpsv2"), ("image_reward", "ImageReward")):
        assert found[metric]["value"] == evaluate.SKIPPED and found[metric]["note"].startswith(f"skipped: {package} failed ({type(error).__name__}: ")
        assert "\n" not in found[metric]["note"]
    assert found["ms_total"]["value"] > 0


def test_latency_by_part(students):
    """A slow part is found in its own row; the network is called once a step, and the modules are left as they were."""
    import zoo
    pipe = zoo.load(students["sd"])
    pipe.set_progress_bar_config(disable=True)
    forward = type(pipe.unet).forward

    def slow(self, *a, **k):
        time.sleep(0.02)
        return forward(self, *a, **k)
    pipe.unet.forward = types.MethodType(slow, pipe.unet)
    kept = pipe.unet.__dict__["forward"]
    found = rows({"rows": evaluate.latency(pipe, {"prompt": "red heart"}, 4, repeats=1)})
    assert found["ms_denoiser"]["value"] >= 80 and found["ms_denoiser"]["note"].startswith("4 calls")
    assert found["ms_text_encoder"]["value"] > 0 and found["ms_vae"]["value"] > 0
    parts = sum(found[f"ms_{p}"]["value"] for p in ("text_encoder", "denoiser", "vae", "rest"))
    assert parts == pytest.approx(found["ms_total"]["value"], rel=0.02)
    assert "forward" not in pipe.text_encoder.__dict__ and "decode" not in pipe.vae.__dict__
    assert pipe.unet.__dict__.get("forward") is kept


def test_classes_are_prompts_too(students, tmp_path):
    (tmp_path / "classes.txt").write_text("1\n3\n")
    found = rows(evaluate.evaluate(students["pixel"], tmp_path / "classes.txt", seeds=2, steps=2, repeats=1))
    assert "does not draw prompts" in found["clip_score"]["note"] and "ms_text_encoder" not in found and "ms_vae" not in found
    assert found["ms_denoiser"]["note"].startswith("2 calls")
    every = evaluate.evaluate(students["pixel"], seeds=1, steps=1, repeats=1)             # four classes and the null class
    assert every["pictures"] == 4 and evaluate.evaluate(students["pixel"], seeds=1, steps=1, repeats=1, limit=3)["pictures"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl", "dit", "sd3", "flux", "flux2", "qwen_image", "zimage", "sana"])
def test_latency_of_every_family(family, tmp_path):
    """Whatever a pipeline has of text encoders, denoiser and decoder is timed in its own row."""
    from pathlib import Path

    import zoo
    from zoo import calls
    sys.path.insert(0, str(Path(__file__).parent / "backbones"))
    import tiny_a
    import tiny_b
    (tiny_a if family in tiny_a.BUILDERS else tiny_b).build(family, tmp_path / "teacher")
    model = load(str(tmp_path / "teacher"))
    pipe = zoo.load(export_student(model, model.make("student"), tmp_path / "student", contract_for(model, (1.0, 0.75, 0.5, 0.25))))
    pipe.set_progress_bar_config(disable=True)
    found = rows({"rows": evaluate.latency(pipe, calls.condition(pipe, "1" if family == "dit" else "red heart"), 4, repeats=1)})
    parts = ["denoiser", "vae"] + ["text_encoder"] * (family != "dit")
    assert all(found[f"ms_{p}"]["value"] > 0 for p in parts) and found["ms_denoiser"]["note"].startswith("4 calls")
    assert {m for m in found} == {f"ms_{p}" for p in (*parts, "rest", "total")}


@pytest.mark.parametrize("name, repo", [("partiprompts", "nateraw/parti-prompts"), ("coco", "phiyodr/coco2017")])
def test_prompt_sets_of_the_hub(name, repo, monkeypatch):
    """Named sets are read with `datasets`; offline is one line that says what to do."""
    import datasets
    with pytest.raises(UserError, match=f"come from the Hub .{repo}.*text file of one prompt a line"):
        evaluate.read_prompts(name)
    table = {"Prompt": ["a corgi", "a fox"], "captions": [["a cat on a mat", "a mat"], ["a dog"]]}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda repo, split: asked.append((repo, split)) or table)
    assert evaluate.read_prompts(name) == {"partiprompts": ["a corgi", "a fox"], "coco": ["a cat on a mat", "a dog"]}[name]
    assert asked == [(repo, {"partiprompts": "train", "coco": "validation"}[name])]


def test_a_video_student_is_refused_before_it_is_fetched(monkeypatch):
    from zoo import registry
    name = next(s.name for s in registry.STUDENTS if s.modality == "video")
    monkeypatch.setattr("zoo.loading.load", lambda *a, **k: pytest.fail("it was fetched"))
    with pytest.raises(UserError, match="makes videos"):
        evaluate.evaluate(name, ["a fox"])


def test_mistakes(students, prompts, tmp_path):
    for call, match in ((dict(prompts=tmp_path / "none.txt"), "one prompt a line"), (dict(prompts=[]), "holds no prompt"),
                        (dict(prompts=prompts, steps=3), "trained for 1, 2, 4"),
                        (dict(prompts=prompts, seeds=0), "at least 1"), (dict(prompts=prompts, limit=0), "--limit 0: give at least 1"),
                        (dict(prompts=prompts, limit=-1), "--limit -1: give at least 1"), (dict(), "give --prompts FILE")):
        with pytest.raises(UserError, match=match):
            evaluate.evaluate(students["sd"], **call)


def test_from_the_command_line(students, prompts, tmp_path, capsys):
    cli.main(["eval", str(students["sd"]), "--prompts", str(prompts), "--limit", "1", "--seeds", "1", "--steps", "1", "--out", str(tmp_path / "r.json")])
    lines = capsys.readouterr().out.splitlines()
    assert "steps 1" in lines[0] and lines[1].split()[:2] == ["METRIC", "VALUE"] and any(x.startswith("ms_denoiser") for x in lines)
    assert json.loads((tmp_path / "r.json").read_text())["steps"] == 1
