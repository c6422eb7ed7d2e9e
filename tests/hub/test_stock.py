"""What the cards say of stock pipelines holds for the installed diffusers."""
from __future__ import annotations

import functools
import importlib.util
import json
import re
from pathlib import Path

import pytest

from zoo.backbones import FAMILIES
from zoo.hub import card
from zoo.hub.contract import Contract

SOURCES = Path(importlib.util.find_spec("diffusers").submodule_search_locations[0]) / "pipelines"


@functools.cache
def sources() -> dict[str, str]:
    """Pipeline class -> the text of its module, none of them imported."""
    texts = [p.read_text() for p in SOURCES.rglob("pipeline_*.py")]
    return {kind: text for text in texts for kind in re.findall(r"^class (\w+)\(", text, re.M)}


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_card_says_where_generator_does_not_reach_the_scheduler(kind, tmp_path):
    """A re-noising student draws noise at every step: repeatable by `generator` alone only where the pipeline hands it on."""
    calls = re.findall(r"scheduler\.step\((?:[^()]|\([^()]*\))*\)", sources()[kind])
    hands_on = bool(calls) and all("generator" in c or "extra_step_kwargs" in c for c in calls)
    flow = bool(re.match("StableDiffusion3|Flux|Qwen|ZImage|Wan|LTX|Sana", kind))
    for sampler, told in (("renoise", not hands_on), ("ode", False)):
        contract = Contract({2: (1000, 500) if flow else (999, 499)}, sampler, prediction="velocity" if flow else "epsilon",
                            scheduler="FlowMatchLCMScheduler" if flow else "LCMScheduler")
        record = contract.to_json() | {"student": {"family": "other", "teacher": "x/y", "slot": None, "slot_weights": None, "lora_rank": 0},
                                       "card": {"stock": True, "pipeline": kind, "title": "t", "license": {"license": "mit"}}}
        (tmp_path / "fewstep.json").write_text(json.dumps(record))
        assert ("torch.manual_seed" in card.render(tmp_path)) == told, (kind, calls)


@functools.cache
def bases() -> dict[str, tuple[str, list[str]]]:
    """Pipeline class -> (what it inherits, arguments of its call)."""
    out = {}
    for kind, text in sources().items():
        at = re.search(rf"^class {kind}\((.*?)\):", text, re.M | re.S)
        call = re.search(r"def __call__\((.*?)\n    \)", text[at.end():], re.S)
        out[kind] = (at[1], re.findall(r"^\s+(\w+):", call[1], re.M) if call else [])
    return out


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_a_card_says_what_stock_diffusers_has_for_its_family(kind, tmp_path):
    """Image to image by strength, LoRA, ControlNet, IP-Adapter: each is named where there is one and said to be missing where there is none."""
    image, lora, control, adapter = card.STOCK_USES[kind]
    stem = kind.removesuffix("Pipeline")
    assert lora == ("LoraLoaderMixin" in bases()[kind][0]) and adapter == ("ip_adapter_image" in bases()[kind][1])
    others = [f"{stem}{end}Pipeline" for end in ("Img2Img", "VideoToVideo")] + [kind.replace("Pipeline", "Img2ImgPipeline")]
    known = {k for k in others if k in bases() and "strength" in bases()[k][1]}
    assert known == ({image} if image else set()), known
    control_known = {f"{stem}ControlNetPipeline"} & bases().keys()
    assert control_known == ({control} if control else set())
    contract = Contract({2: (999, 499)})
    record = contract.to_json() | {"student": {"family": "other", "teacher": "x/y", "slot": None, "slot_weights": None, "lora_rank": 0},
                                   "card": {"stock": True, "pipeline": kind, "title": "t", "license": {"license": "mit"}}}
    (tmp_path / "fewstep.json").write_text(json.dumps(record))
    part = re.search(r"## Beyond the plain call\n\n(.*?)\n\n## ", card.render(tmp_path), re.S)[1]
    if image or lora or control or adapter:
        assert part.startswith("Not measured for this student.")
        for use, name in zip(card.USES, (image, lora and "load_lora_weights", control, adapter and "load_ip_adapter")):
            there, _, missing = part.partition("it has no ")
            assert f"{use} (`{name}`)" in there if name else use in missing, (use, part)
    else:
        assert part.startswith(f"The student is a {kind}: stock diffusers has no")
    assert "## Limitations" in card.render(tmp_path)


def test_flow_schedulers_take_a_generator_where_they_are_given_one():
    import inspect

    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, LCMScheduler
    for kind in (FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, LCMScheduler):
        assert "generator" in inspect.signature(kind.step).parameters
