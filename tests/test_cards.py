"""Cards without torch: what they say, what the linter finds, and that the shipped ones are what the runs measured."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

sys.path[:0] = [str(Path(__file__).parent / "hub")]
from clients import folder
from zoo.errors import UserError
from zoo.hub import card, lint, model_cards
from zoo.hub.contract import Contract
from zoo.run import RunConfig

ROOT = Path(__file__).parents[1]

MEASURED = [{"who": "teacher", "steps": 25, "calls": 50, "kid_x": 0.1, "diversity": 1.0, "seconds_per_image": 0.5},
            {"who": "student", "steps": 4, "calls": 4, "kid_x": 0.25, "diversity": 0.9, "seconds_per_image": 0.04},
            {"who": "student", "steps": 1, "calls": 1, "kid_x": float("nan"), "diversity": 0.7, "seconds_per_image": 0.01}]
FACTS = {"title": "emoji-dmd", "method": "dmd", "license": {"license": "mit"}, "base_model": "me/teacher", "stock": True, "pipeline": "StableDiffusionPipeline",
         "prompts": ["a red heart"], "measured": MEASURED, "command": "accelerate launch train_dmd.py --steps 3", "seconds": 7200.0, "steps": 300,
         "exported_step": 200,
         "device": "1 x GPU", "samples": 64, "calls": 12_000_000, "trained": {"student": 34_000_000}, "peak_memory_gb": 11.2, "seed": 3,
         "data_id": "me/prompts", "data": "prompts",
         "versions": {"fewstep": "0.1", "torch": "2.13"}}


def made(tmp_path, contract=None, facts=None, record=None, name="student") -> Path:
    """A student's folder with its facts, as a run leaves it."""
    at = folder("student", tmp_path / name)
    contract = contract or Contract({4: (999, 749, 499, 249), 2: (999, 499), 1: (999,)})
    data = {**contract.to_json(), "student": {"family": "sd", "teacher": "me/teacher", "slot": None, "slot_weights": None, "lora_rank": 0,
                                              "method": "dmd", **(record or {})},
            "card": FACTS | (facts or {})}
    (at / "fewstep.json").write_text(json.dumps(data))
    card.refresh(at)
    return at


def parts(at: Path):
    return lint.front_matter((at / "README.md").read_text())


def test_a_card_says_everything(tmp_path):
    at = made(tmp_path)
    assert lint.lint(at) == []
    data, body, _ = parts(at)
    assert data["license"] == "mit" and data["base_model"] == "me/teacher" and data["base_model_relation"] == "finetune" and data["datasets"] == ["me/prompts"]
    assert data["pipeline_tag"] == "text-to-image" and {"few-step", "distillation", "dmd", "1-step", "2-step", "4-step"} <= set(data["tags"])
    four = data["model-index"][0]["results"][0]
    assert {m["type"]: m["value"] for m in four["metrics"]} == {"kid_x": 0.25, "diversity": 0.9, "seconds_per_image": 0.04}
    assert four["metrics"][0]["args"] == {"num_inference_steps": 4, "nfe": 4} and four["dataset"]["type"] == "prompts"
    assert "kid_x" not in [m["type"] for m in data["model-index"][0]["results"][1]["metrics"]]          # not a number: measured nothing
    for text in ("999, 749, 499, 249", FACTS["command"], "7200 s (2 h)", "1 x GPU", "12 M", "34 M", "11 GB", "energy: not measured", "torch 2.13",
                 "seed: 3", "@article",
                 "zoo.load(", "DiffusionPipeline.from_pretrained(", "<Gallery />", "num_inference_steps=4", "## Limitations", "`diversity` is the spread"):
        assert text in body, text
    assert "Read this first" not in body                    # the wrong default call raises


def test_refreshing_changes_nothing_and_needs_neither_run_nor_torch(tmp_path):
    at = made(tmp_path)
    before = (at / "README.md").read_text()
    (at / "README.md").unlink()
    script = "import sys; from zoo.hub.card import refresh; print(refresh(sys.argv[1])); "\
             "assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script, str(at)], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and done.stdout.strip() == str(at / "README.md"), done.stderr
    assert (at / "README.md").read_text() == before


def test_a_student_exported_before_facts_were_kept(tmp_path):
    """Its own card is read; rendering it again keeps what it said."""
    at = made(tmp_path)
    data = json.loads((at / "fewstep.json").read_text())
    full = data.pop("card")
    (at / "fewstep.json").write_text(json.dumps(data))
    once = Path(card.refresh(at)).read_text()
    assert once == Path(card.refresh(at)).read_text() and lint.lint(at) == []
    for text in ("| student | 4 | 4 | 0.25 | 0.9 | 0.04 |", full["command"], "64 samples", "1 x GPU", "license: mit"):
        assert text in once
    kept = json.loads((at / "fewstep.json").read_text())
    assert kept.pop("card")["command"] == full["command"]          # from now on in the record
    (at / "fewstep.json").write_text(json.dumps(kept))
    (tmp_path / "measured.json").write_text(json.dumps({"measured": [{"who": "student", "steps": 4, "calls": 4, "kid_x": 0.123}], "peak_memory_gb": 3.0}))
    again = Path(card.refresh(at)).read_text()
    assert "0.123" in again and "peak memory: 3 GB" in again


# what the stock pipeline gets wrong without a word is said before anything else
WARNED = {
    "sigmas": (Contract({2: (1000, 500)}, prediction="velocity", scheduler="FlowMatchLCMScheduler", call={2: {"sigmas": [1.0, 0.5], "guidance_scale": 1.0}}),
               "StableDiffusion3Pipeline", ["sigmas=[1.0, 0.5]", "guidance_scale=1.0", "torch.manual_seed"]),
    "any number": (Contract({2: (1000, 500)}, "ode", prediction="velocity", scheduler="FlowMatchEulerDiscreteScheduler", grid="pipeline", shift=3.0),
                   "FluxPipeline", ["accepts any number of steps"]),
    "ddim": (Contract({2: (999, 499)}, "ode", scheduler="DDIMScheduler"), "StableDiffusionPipeline", ["accepts any number of steps", "num_inference_steps=2"]),
    "tcd": (Contract({2: (999, 499)}, "tcd", scheduler="TCDScheduler", call={2: {"eta": 0.3}}), "StableDiffusionPipeline", ["last step differs slightly"]),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_a_stock_call_gets_wrong_is_said_first(tmp_path, name):
    contract, pipeline, words = WARNED[name]
    at = made(tmp_path, contract, {"pipeline": pipeline}, {"family": "other" if "Flux" in pipeline or "3" in pipeline else "sd"})
    _, body, _ = parts(at)
    first = body.strip().split("\n\n")[1]
    assert first.startswith("> **Read this first.**") and all(w in first for w in words), first
    assert lint.lint(at) == []
    if contract.call:
        assert all(f"{k}={v!r}" in body for k, v in contract.call[2].items())


def test_lora_card_pins_its_base(tmp_path):
    at = made(tmp_path, Contract({4: (999, 749, 499, 249)}, lora_scale=0.125), {"base_revision": "a" * 40, "lora_loads": True}, {"lora_rank": 8})
    from clients import safetensors
    safetensors(at / "pytorch_lora_weights.safetensors", "a", metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 8}'})
    card.refresh(at)
    data, body, _ = parts(at)
    assert data["base_model_relation"] == "adapter" and "lora" in data["tags"] and lint.lint(at) == []
    for text in (f'from_pretrained("me/teacher", revision="{"a" * 40}")', "lora_scale=0.125", "weight_name=", "guidance_scale=1"):
        assert text in body
    (at / "model_index.json").unlink()
    assert "template:sd-lora" in yaml.safe_load(card.render(at).split("---\n")[1])["tags"]


def test_a_teacher_of_the_package_is_on_no_hub_and_the_card_says_where_it_is(tmp_path):
    """Metadata names no repository that does not exist, and the usage lines open the teacher where it lies."""
    import zoo
    from clients import safetensors
    facts = {"base_model": "fewstep/emoji-teacher", "base_revision": None, "lora_loads": True}
    at = made(tmp_path, facts=facts, record={"teacher": "emoji", "lora_rank": 4})
    safetensors(at / "pytorch_lora_weights.safetensors", "a", metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 4}'})
    card.refresh(at)
    data, body, _ = parts(at)
    assert "base_model" not in data and "base_model_relation" not in data and lint.lint(at) == [] and "fewstep/" not in body
    assert "it is in the package, at `zoo/assets/emoji/teacher`" in body
    line = re.search(r"from_pretrained\((zoo\..*)\)", body)[1]
    assert Path(eval(line, {"zoo": zoo})) == card.home(at) and (card.home(at) / "model_index.json").exists()
    for name, (license, where, _) in card.BUILT_IN.items():
        assert license in lint.LICENSES and (Path(zoo.__path__[0]) / where).is_dir(), name
    mine = made(tmp_path, facts=facts | {"built_in": False, "base_model": "me/emoji"}, record={"teacher": "emoji"},
                name="mine")     # a folder that is only called so
    assert parts(mine)[0]["base_model"] == "me/emoji" and card.home(mine) is None and "in the package" not in parts(mine)[1]


def test_what_a_run_did_not_keep_is_said_to_be_so(tmp_path):
    at = made(tmp_path, facts={"seed": None, "versions": None, "command": None, "data": None})
    data = json.loads((at / "fewstep.json").read_text())
    data["card"] = {k: v for k, v in data["card"].items() if v is not None}
    (at / "fewstep.json").write_text(json.dumps(data))
    text = Path(card.refresh(at)).read_text()
    for line in ("- command: not recorded", "- data: not recorded; the method takes prompts", "- seed: not recorded",
                 "- versions: fewstep not recorded, torch not recorded, diffusers not recorded", "- energy: not measured (the run did not record it)"):
        assert line in text, line
    full = made(tmp_path, facts={"energy": {"joules": 7200.0, "of": ["GPU"]}}, name="full")
    assert "energy: 7.2 kJ (0.002 kWh), by the counters of GPU" in parts(full)[1] and "- data: `prompts`; the method takes prompts" in parts(full)[1]


HOSTILE = "<img src=x onerror=alert(1)> `x` | [a](javascript:alert(1)) ```"


def test_nothing_a_run_was_given_becomes_markup(tmp_path):
    at = made(tmp_path, facts={"prompts": [HOSTILE], "device": HOSTILE, "command": HOSTILE, "chain": [HOSTILE], "title": HOSTILE, "data": HOSTILE,
                               "texts": HOSTILE + "\n```\n<script>"},
              record={"teacher": HOSTILE})
    data, body, _ = parts(at)
    assert lint.lint(at) == [] and data["widget"][0]["text"] == HOSTILE
    outside = re.sub(r"^```.*?^```|`[^`\n]*`", "", body, flags=re.S | re.M)
    assert "<img" not in outside and "<script" not in outside and not re.search(r"(?<!\\)\]\(javascript", outside)
    assert len(re.findall(r"^```", body, re.M)) % 2 == 0
    assert card.plain("a|b <b>") == r"a\|b &lt;b&gt;"


def poisoned(value):
    """Every word of a JSON value made hostile, keys that are no fields too."""
    if isinstance(value, dict):
        return {k if k in NAMES else HOSTILE: poisoned(v) for k, v in value.items()}
    return [poisoned(v) for v in value] if isinstance(value, list) else HOSTILE + "\n```\n<script>" if isinstance(value, str) else value


NAMES = {*FACTS, "license", "repo", "file", "parts", "scale", "name", "texts", "teacher_lora", "downstream", "report", "verdict", "rule", "text",
         "ok", "energy", "joules",
         "of", "place", "chain", "lora_loads", "who", "steps"}


@pytest.mark.parametrize("given", [{}, {"license": {"license": "mit", "tags": "evil"}}, {"downstream": [{"use": "x", "measure": "y", "steps": 1}]},
                                   {"energy": {"joules": 1.0, "of": ["GPU"]}}, {"chain": ["dmd at x"], "texts": "x", "place": "me/x", "lora_loads": True},
                                   {"teacher_lora": {"name": "s", "repo": "a/b", "file": "f.safetensors", "parts": ["unet"], "scale": 1.0}},
                                   {"report": {"verdict": "go: x", "rule": "r", "parts": {"quality": {"ok": True, "text": "t"}}}}])
def test_a_strangers_record_cannot_inject_markup(tmp_path, given):
    """Every name and word of the record is hostile: the card is rendered without markup of theirs, or refused."""
    from clients import safetensors
    at = made(tmp_path, facts=given, record={"lora_rank": 4})
    safetensors(at / "pytorch_lora_weights.safetensors", "a", metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 4}'})
    data = json.loads((at / "fewstep.json").read_text())
    data["card"], data["student"]["teacher"], data["student"]["method"] = poisoned(data["card"]), HOSTILE, HOSTILE
    data["call"] = {"4": {"sigmas": "`" + HOSTILE}}
    data["scheduler"] = data["prediction"] = HOSTILE + "\n```\n<script>"
    (at / "fewstep.json").write_text(json.dumps(data))
    text = card.render(at)
    front, body, complaint = lint.front_matter(text)
    assert not complaint and set(front) <= lint.KEYS and "evil" not in str(front)
    outside = lint.CODE.sub("", body)
    assert not re.search(r"<img|<script", outside) and not re.search(r"(?<!\\)\]\(javascript", outside), outside
    for fence in re.findall(r"^```python\n(.*?)^```", body, re.S | re.M):
        compile(fence, "card", "exec")                              # and the usage lines are still Python


def test_a_record_of_another_shape_is_refused(tmp_path):
    at = made(tmp_path)
    data = json.loads((at / "fewstep.json").read_text())
    for wrong in ("text", {"license": 3}, {"measured": "fast"}, {"title": "t", "license": {"license": "mit"}, "trained": {"student": "many"}}):
        (at / "fewstep.json").write_text(json.dumps(data | {"card": wrong}))
        with pytest.raises(UserError, match="cannot be rendered"):
            card.render(at)


def test_tokens_never_reach_a_card(tmp_path):
    at = made(tmp_path, facts={"command": "train.py --token hf_abcdefghijkl"})
    assert "hf_abc" not in (at / "README.md").read_text() and "hf_***" in (at / "README.md").read_text()


# ------------------------------------------------------------------------------------------------------- the linter
@pytest.mark.parametrize("old, new, complaint", [
    ("license: mit", "license: free", "no license id"), ("license: mit", "liscense: mit", "'liscense' is no key"),
    ("license: mit", "license: other", "needs license_name"),
    ("base_model: me/teacher", "base_model: a/b/c", "'a/b/c' is no Hub id"), ("- me/prompts", "- not an id", "no Hub id"),
    ("relation: finetune", "relation: distilled", "'distilled' is none of"), ("relation: finetune", "relation: adapter", "needs the tag lora"),
    ("url: grid.png", "url: ../grid.png", "is not in the folder"), ("value: 0.25", "value: fast", "has no number"),
    ("](grid.png)", "](gone.png)", "gone.png is not in the folder"),
    ("## Limitations", "<script>x</script>\n## Limitations", "active markup"), ("type: prompts\n", "", "needs task.type"),
    ("tags:\n", "tags:\n- 3\n", "list of words"),
    ("pipeline_tag: text-to-image", "pipeline_tag: pictures", "is none of")])
def test_lint_finds(tmp_path, old, new, complaint):
    at = made(tmp_path)
    text = (at / "README.md").read_text()
    assert old in text
    (at / "README.md").write_text(text.replace(old, new, 1))
    assert any(complaint in line for line in lint.lint(at)), lint.lint(at)


@pytest.mark.parametrize("key", ["license", "license_name", "tags", "base_model", "base_model_relation", "pipeline_tag", "library_name", "datasets",
                                 "widget", "model-index"])
def test_lint_finds_every_other_shape(tmp_path, key):
    """Metadata is a stranger's when a repository is verified: whatever is there, the linter answers in lines."""
    at = made(tmp_path)
    data, body, _ = parts(at)
    for value in (3, "x", [], [3], ["x"], {}, {"x": 1}, [{"x": 1}], [{"output": "x"}], [{"name": "n", "results": 3}], [{"name": "n", "results": ["x"]}],
                  [{"name": "n", "results": [{"task": "x", "dataset": [], "metrics": "x"}]}], True):
        (at / "README.md").write_text(f"---\n{yaml.safe_dump(data | {key: value})}---\n{body}")
        found = lint.lint(at)
        may_be_empty = ("license_name", "tags", "widget", "model-index", "base_model", "datasets", "library_name")
        assert isinstance(found, list) and (found or key in may_be_empty), (key, value)
    (at / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff\xfe")
    assert lint.lint(at) == ["README.md is not text in UTF-8"]


@pytest.mark.parametrize("body", ["\\`<script>x</script>\\`", "``` `\n<script>x</script>\n```", "text\n<iframe src=x>"])
def test_what_only_looks_like_code_is_still_markup(tmp_path, body):
    at = made(tmp_path)
    (at / "README.md").write_text((at / "README.md").read_text() + "\n" + body + "\n")
    assert lint.lint(at) == ["the card holds active markup"]


@pytest.mark.parametrize("base, own, fits", [
    ({"license": "cc-by-nc-4.0"}, {"license": "mit"}, False), ({"license": "cc-by-nc-4.0"}, {"license": "cc-by-nc-sa-4.0"}, True),
    ({"license": "other", "license_name": "flux-1-dev-non-commercial-license"}, {"license": "apache-2.0"}, False),
    ({"license": "other", "license_name": "flux-1-dev-non-commercial-license"},
     {"license": "other", "license_name": "flux-1-dev-non-commercial-license"}, True),
    ({"license": "openrail++"}, {"license": "mit"}, True)])
def test_a_non_commercial_base_makes_a_non_commercial_student(tmp_path, base, own, fits):
    at = made(tmp_path, facts={"license": own})
    assert any("a student inherits it" in line for line in lint.lint(at, base_license=base)) != fits
    if fits and lint.non_commercial(own):
        assert "non-commercial" in parts(at)[0]["tags"] and "forbids commercial use" in parts(at)[1]


def test_data_cards(tmp_path):
    at = folder("dataset", tmp_path / "pairs")
    (at / "README.md").unlink()
    assert card.refresh(at) == str(at / "README.md") and lint.lint(at, "dataset") == []
    assert "stored teacher pairs" in (at / "README.md").read_text() and "F32" in (at / "README.md").read_text()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not an exported student"):
        card.refresh(tmp_path / "empty")


@pytest.mark.parametrize("path, fine", [("a/b.json", True), ("../a", False), ("/a", False), ("a/../b", False), ("a\\b", False), ("c:x", False),
                                        ("~/a", False), ("", False)])
def test_paths_of_a_repository(path, fine):
    assert lint.inside(path) == fine


# ------------------------------------------------------------------------------------------------------- model_cards/
def test_model_cards_are_fresh():
    assert model_cards.stale() == [], "run: python -m zoo.hub.model_cards"


@pytest.mark.parametrize("folder", [pytest.param(p, id=p.name) for p in model_cards.folders()])
def test_shipped_students_say_seed_versions_and_data(folder):
    """And say what their own files and the logs of their runs say."""
    facts, text = json.loads((folder / "fewstep.json").read_text())["card"], (folder / "README.md").read_text()
    data, body, _ = lint.front_matter(text)
    assert "base_model" not in data and not re.search(r"[`(\"/]fewstep/", text)
    assert facts["versions"]["diffusers"] == json.loads((folder / "model_index.json").read_text())["_diffusers_version"]
    log = ROOT / "benchmarks" / "students" / f"{folder.name}.config.json"
    if log.exists():
        config = json.loads(log.read_text())
        assert facts["seed"] == config["seed"] and config["method"] == facts["method"]
        assert f"--teacher {config['teacher']}" in facts["command"] and config["data"] == ""
    else:
        assert facts["seed"] == RunConfig.seed and "--seed" not in facts["command"]
    assert f"- seed: {facts['seed']}" in body and "- data: the teacher's own (`" in body and "- energy: " in body
    torch = facts["versions"].get("torch", "not recorded")
    assert f"torch {torch}, diffusers {facts['versions']['diffusers']}" in body


def test_model_cards_command(tmp_path):
    students, pages = tmp_path / "students", tmp_path / "pages"
    students.mkdir()
    assert model_cards.stale(students, pages) == [str(pages / "README.md")]            # none yet: an index that says so
    model_cards.write(students, pages)
    assert model_cards.stale(students, pages) == [] and "None is shipped" in (pages / "README.md").read_text()
    made(students, name="dmd.emoji-4step")
    model_cards.write(students, pages)
    page = (pages / "dmd.emoji-4step.md").read_text()
    assert model_cards.stale(students, pages) == []
    assert 'zoo.load("dmd.emoji-4step")' in page and "](../students/dmd.emoji-4step/grid.png)" in page and not page.startswith("---")
    assert "[dmd.emoji-4step](dmd.emoji-4step.md)" in (pages / "README.md").read_text() and "0.25 `kid_x, 4 steps` | 0.9 |" in (pages / "README.md").read_text()
    data = json.loads((students / "dmd.emoji-4step" / "fewstep.json").read_text())
    data["card"]["seconds"] = 1.0
    (students / "dmd.emoji-4step" / "fewstep.json").write_text(json.dumps(data))
    assert len(model_cards.stale(students, pages)) == 2                                 # its README and its page
    shutil.rmtree(students / "dmd.emoji-4step")
    assert str(pages / "dmd.emoji-4step.md") in model_cards.stale(students, pages)
    model_cards.write(students, pages)
    assert not (pages / "dmd.emoji-4step.md").exists()
