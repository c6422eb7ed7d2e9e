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


def test_flow_schedulers_take_a_generator_where_they_are_given_one():
    import inspect

    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, LCMScheduler
    for kind in (FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, LCMScheduler):
        assert "generator" in inspect.signature(kind.step).parameters
