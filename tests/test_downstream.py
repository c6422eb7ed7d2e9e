"""Uses besides the plain call, on a tiny student: what runs, what the stock call refuses, and that the card says it."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import tiny
from zoo.backbones import load
from zoo.errors import UserError
from zoo.hub import card, downstream
from zoo.hub.contract import contract_for
from zoo.hub.export import LORA_WEIGHTS, export_student

TIMES = (1.0, 0.75, 0.5, 0.25)


@pytest.mark.slow
def test_image_to_image_and_a_lora(tmp_path):
    teacher = tiny.tiny_sd(tmp_path / "teacher")
    model = load(str(teacher))
    contract = contract_for(model, TIMES)
    folder = export_student(model, model.make("student"), tmp_path / "student", contract, extra=lambda f: card.write_card(f, model, {"method": "dmd", "prompts": ["red heart", "blue star"]}))
    styled = model.make("style", lora=4)
    for p in styled.trainable().values():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    style = export_student(model, styled, tmp_path / "style", contract, lora_rank=4) / LORA_WEIGHTS
    downstream.main([str(folder), "--teacher", str(teacher), "--guidance", "1", "--lora", str(style)])
    rows = json.loads((folder / "fewstep.json").read_text())["card"]["downstream"]
    calls = {(r["use"], r["steps"]): r["stock call"] for r in rows}
    assert calls["image to image, strength 0.5", 1] == "refused" and calls["image to image, strength 0.5", 2] == calls["image to image, strength 0.75", 4] == "runs"
    assert all(math.isfinite(r["distance"]) and 0 <= r["distance"] <= 1 for r in rows if "distance" in r)
    loras = [r for r in rows if "follows" in r]
    assert len(loras) == 2 and all(-1.001 <= r["follows"] <= 1.001 for r in loras)
    # a pipeline is moved as it is moved itself
    from types import SimpleNamespace

    from diffusers import DiffusionPipeline
    twins = [DiffusionPipeline.from_pretrained(teacher) for _ in range(2)]
    same = downstream._lora(*twins, ["red heart"], SimpleNamespace(knots={downstream.MANY: ()}), 1.0, {"guidance_scale": 1.0}, style)
    assert all(r["follows"] == pytest.approx(1, abs=1e-3) and r["size beside the teacher's"] == pytest.approx(1, abs=1e-3) for r in same)
    text = (folder / "README.md").read_text()
    assert "## Beyond the plain call" in text and "refused" in text and "ControlNet and IP-Adapter: not measured" in text


def test_other_families_are_refused(tmp_path):
    from zoo.hub.contract import Contract
    folder = Path(tmp_path)
    (folder / "fewstep.json").write_text(json.dumps({**Contract({1: (999,)}).to_json(), "student": {"family": "pixel", "teacher": "fashion"}}))
    with pytest.raises(UserError, match="pixel family"):
        downstream.measure(folder, "x", ["a"], 1.0)
