"""Published configurations by family, and the times of a flow teacher moved by its shift."""
from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/backbones"), str(ROOT / "train_scripts")]
import tiny_a  # noqa: E402
import tiny_b  # noqa: E402

from zoo import backbones, recipes, registry, rollout, times  # noqa: E402
from zoo.errors import UserError  # noqa: E402
from zoo.hub.contract import contract_for, scheduler_for, stock_timesteps, stretched_shift  # noqa: E402
from zoo.process import RectifiedFlow, TrigFlow, view  # noqa: E402
from zoo.run import parse  # noqa: E402


# ------------------------------------------------------------------------------------------------------- recipes
def test_every_row_serves_a_script_and_names_its_source():
    families = {value.partition(":")[0] for value in backbones.FAMILIES.values()}
    configs = {m.name: importlib.import_module(m.path.stem).Config for m in registry.methods() if m.modality in ("image", "video")}
    assert families - recipes.SIZES.keys() == {"ltx"} and recipes.SIZES.keys() <= families
    for (family, kind), row in recipes.RECIPES.items():
        users = [c for n, c in configs.items() if kind in (n, registry.method(n).family)]
        row = users[0].recipes[row] if isinstance(row, str) else row
        assert family in families and users and row["source"]
        for key in set(row) - {"source"}:
            assert any(key in recipes._fields(c) for c in users), (family, kind, key)


def test_auto_is_the_recipe_of_the_teachers_family(tmp_path, capsys):
    import train_dmd
    import train_lcm
    import tyro
    folder = str(tiny_a.build("sdxl", tmp_path / "sdxl"))
    cfg = parse(train_dmd.Config, ["--recipe", "auto", "--teacher", folder, "--batch", "16"], tyro)
    assert (cfg.lr, cfg.lora, cfg.critic_updates, cfg.guidance, cfg.batch, cfg.accumulate, cfg.time_budget) == (5e-5, 64, 5, 8.0, 16, 4, 0.0)
    said = capsys.readouterr().err
    assert "recipe auto: DMD2" in said and "deviates: batch = 16 (recipe 128)" in said and "  lora = 64: published" in said
    cfg = parse(train_lcm.Config, [f"--teacher={folder}", "--recipe=auto"], tyro)
    assert (cfg.lora, cfg.lr, cfg.steps) == (64, 1e-4, 1000)
    wan = str(tiny_b.build("wan", tmp_path / "wan"))
    assert parse(train_dmd.Config, ["--recipe", "auto", "--teacher", wan], tyro).flow_shift == 8.0
    for teacher in ("emoji", str(tiny_b.build("ltx", tmp_path / "ltx"))):
        with pytest.raises(UserError, match="no published configuration"):
            parse(train_dmd.Config, ["--recipe", "auto", "--teacher", teacher], tyro)


def test_a_run_without_a_recipe_is_told_what_was_published(tmp_path, capsys):
    import train_dmd
    model = backbones.load(str(tiny_a.build("pixart_sigma", tmp_path / "pixart")))
    capsys.readouterr()
    recipes.suggest(train_dmd.Config(lr=1e-5), model)
    said = capsys.readouterr().err
    assert "lora 64 (here 0)" in said and "flash_pixart.yaml" in said and ": lr" not in said and ", lr" not in said
    recipes.suggest(train_dmd.Config(recipe="auto"), model)
    recipes.suggest(train_dmd.Config(), backbones.load("fashion"))
    assert "published" not in capsys.readouterr().err


def test_a_script_that_moves_its_own_times_is_not_moved_twice():
    import train_rcm
    assert "shift" in recipes._fields(train_rcm.Config) and "flow_shift" not in recipes.published("flux", train_rcm.Config)


# ------------------------------------------------------------------------------------------------------- one GPU
def resolved(script, folder, *words):
    import tyro
    config = importlib.import_module(f"train_{script}").Config
    return parse(config, ["--recipe", "auto", "--teacher", str(folder), *words], tyro)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a tiny teacher, as it is asked for; and of prompts, pictures and clips."""
    root = tmp_path_factory.mktemp("recipes")

    def folder(name):
        built = tiny_a if name in tiny_a.BUILDERS else tiny_b
        return root / name if (root / name).exists() else built.build(name, root / name)
    (root / "prompts.txt").write_text("a red heart\na blue cat\na green tree\na star\n")
    return folder, root


def test_auto_is_the_scripts_own_recipe_of_the_same_source(tiny, capsys):
    import train_dmd
    (folder, root), own = tiny, train_dmd.Config.recipes
    resolved("dmd", folder("sd15"))
    said = capsys.readouterr().err
    assert "  batch = 2048: published" in said and "  accumulate = 256: ours: 8 at a time" in said and "batch x steps are 8.0 million samples" in said
    for name, recipe in (("sd15", "sd15"), ("sdxl", "sdxl-4step-lora")):
        cfg = resolved("dmd", folder(name))
        assert all(getattr(cfg, k) == v for k, v in own[recipe].items() if k != "source")
    cfg = resolved("arcflow", folder("qwen_image"))
    assert (cfg.batch, cfg.lora, cfg.flow_shift, cfg.student_times, cfg.steps) == (16, 256, 3.2, (1.0, 0.5), 15_000)
    # Prompts are no pictures: the term that needs them is left out, and said to be.
    capsys.readouterr()
    assert resolved("dmd", folder("sdxl"), "--data", str(root / "prompts.txt")).gan == 0
    assert "  gan = 0.0: ours: published: 0.005, which needs pictures, and --data holds prompts alone" in capsys.readouterr().err
    (root / "prompts.csv").write_text("caption\na red heart\n")
    assert recipes.prompts_only(str(root / "prompts.csv")) and not recipes.prompts_only(str(root)) and not recipes.prompts_only("user/name")


def test_what_is_not_published_is_said_to_be_ours(tiny, monkeypatch, capsys):
    """Qwen-Image-Lightning publishes its shift alone; Wan's published rate is for full weights, which do not fit."""
    folder, _ = tiny
    cfg = resolved("dmd", folder("qwen_image"))
    said = capsys.readouterr().err.splitlines()
    assert (cfg.flow_shift, cfg.lora, cfg.base_bits, cfg.gradient_checkpointing, cfg.time_budget, cfg.accumulate) == (3.0, 64, 8, True, 0.0, cfg.batch)
    whose = {line.split(" = ")[0].strip(): line.split(": ", 1)[1] for line in said if " = " in line}
    assert whose.pop("flow_shift") == "published" and "guidance" in whose
    assert all(whose.pop(k).startswith("ours: ") for k in ("batch", "lr", "critic_lr", "critic_updates", "steps", "lora", "base_bits", "accumulate"))
    resolved("dmd", folder("sd3"))
    assert "flow_shift = 0.0: the teacher's own scheduler" in capsys.readouterr().err
    cfg = resolved("dmd", folder("wan"))
    assert (cfg.lora, cfg.lr, cfg.batch, cfg.accumulate) == (64, recipes.LORA_RATE, 6, 6)
    assert "lr = 5e-05: ours: for the LoRA; published for full weights: 2e-06" in capsys.readouterr().err
    monkeypatch.setattr(recipes, "memory", lambda: (141.0, "a larger one"))
    cfg = resolved("dmd", folder("wan"))
    assert (cfg.lora, cfg.lr, cfg.base_bits) == (0, 2e-6, 0)


def test_flags_are_what_they_are(tiny, monkeypatch):
    """Settings that follow from others follow from those of the command line, and from the number of ranks."""
    folder, _ = tiny
    cfg = resolved("dmd", folder("sd15"), "--lora=32")
    assert (cfg.lora, cfg.lr, cfg.batch, cfg.accumulate) == (32, recipes.LORA_RATE, 2048, 256)
    cfg = resolved("dmd", folder("sdxl"), "--batch", "6", "--lora", "0", "--gradient_checkpointing")
    assert (cfg.lora, cfg.batch, cfg.accumulate) == (0, 6, 2)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert resolved("dmd", folder("sdxl")).accumulate == 4
    monkeypatch.setattr(recipes, "memory", lambda: (24.0, "a smaller one"))
    cfg = resolved("dmd", folder("sd15"))
    assert (cfg.lora, cfg.accumulate) == (64, 2048 // 8 // 2)


# Teachers for which a script's own recipes are; the first of a family for `auto`.
TEACHERS = {"sd": "sd15", "pixart": "pixart_sigma", "pixel": "ddpm"}
OWN = {"dmd": {"sdxl-4step": "sdxl", "sdxl-4step-lora": "sdxl"}, "arcflow": {"qwen-image": "qwen_image", "flux": "flux"}, "decoupled_dmd": {"cdm": "sd3"},
       "flow_map": {"cifar10": "ddpm"}, "ladd": {"fastgen": "wan", "gdd-ffhq": "ddpm"}, "meanflow": {"imagenet-b4": "dit"}, "progressive": {"cifar10": "ddpm"},
       "rcm": {"wan-1.3b": "wan"}, "reflow": {"cifar10": "ddpm", "cifar10-rf++": "ddpm"}, "scm": {"cifar10": "ddpm"}, "self_forcing": {"wan": "wan"},
       "tscd": {"pcm-sdxl": "sdxl"}, "twinflow": {"sd35": "sd3"}}
METHODS = [m for m in registry.methods() if m.modality in ("image", "video")]
EVERY = [(m.name, r, OWN.get(m.name, {}).get(r, "sd15")) for m in METHODS for r in importlib.import_module(m.path.stem).Config.recipes]
EVERY += [(name, "auto", TEACHERS.get(family, family)) for (family, kind), row in recipes.RECIPES.items() if not isinstance(row, str) or family != "sd"
          for name in [kind if kind in [m.name for m in METHODS] else "dmd" if kind == "distribution matching" else "arcflow" if family == "flux" else "lcm"]]
EVERY += [("meanflow", "auto", "flux")]         # two times, which no shift moves
FAST = {("arcflow", "qwen-image", "qwen_image"), ("dmd", "auto", "sd15")}


@pytest.mark.parametrize("script,recipe,teacher", [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in dict.fromkeys(EVERY)])
def test_every_recipe_runs_dry_on_its_family(tiny, tmp_path, capsys, script, recipe, teacher):
    """All of a recipe is accepted by the script, the family and the run, up to step 1."""
    import tyro
    folder, root = tiny
    method = registry.method(script)
    seen = method.needs.startswith("images") or "gan" in recipe or recipe.startswith("sdxl")
    data = pictures(root, teacher in ("wan", "cogvideox")) if seen else root / "prompts.txt"
    module = importlib.import_module(f"train_{script}")
    words = ["--teacher", str(folder(teacher)), "--recipe", recipe, "--output_dir", str(tmp_path / "run"), "--dry_run", "--mixed_precision", "no"]
    words += ["--data", str(data)] * (teacher not in ("ddpm", "dit") or method.needs.startswith("images"))
    words += SMALL.get((script, recipe), []) + (["--guidance", "1"] if teacher == "ddpm" else [])
    cfg = parse(module.Config, words, tyro)
    preset = recipes.automatic(module.Config, words) if recipe == "auto" else module.Config.recipes[recipe]
    given = recipes._given(words)
    assert all(getattr(cfg, k) == v for k, v in preset.items() if k not in ("source", "origins", *given))
    run = module.main(cfg)
    assert run.step == 0 and f"global batch {cfg.batch}" in capsys.readouterr().out


SMALL = {("self_forcing", "wan"): ["--chunk", "1"], ("self_forcing", "auto"): ["--chunk", "1"]}


def pictures(root, moving):
    """A folder of captioned, labelled pictures, or clips."""
    import json

    import numpy as np
    from PIL import Image
    folder = root / ("clips" if moving else "images")
    if not folder.exists():
        folder.mkdir()
        g, rows = np.random.default_rng(0), []
        for i in range(6):
            frames = [Image.fromarray(g.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(17 if moving else 1)]
            name = f"{i}.{'gif' if moving else 'png'}"
            frames[0].save(folder / name, **dict(save_all=True, append_images=frames[1:], duration=100) if moving else {})
            rows.append({"file_name": name, "caption": f"a red tree {i}", "label": i % 5})
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


# ------------------------------------------------------------------------------------------------------- the shift
@pytest.mark.parametrize("k", [1.0, 3.0, 8.0])
def test_a_shifted_flow_is_the_same_path_counted_otherwise(k):
    """float64: its sigma is times.shifted, its velocity the derivative of its path, its inverse exact, and a flow network read on it is itself."""
    process, t = RectifiedFlow(k), torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    x0, eps = torch.randn(2, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = process.coeffs(t)[1]
    torch.testing.assert_close(sigma, times.shifted(t, k))
    torch.testing.assert_close(process.time(process.angle(t)), t)
    torch.testing.assert_close(process.from_timestep(process.timestep(t)), t)
    h = 1e-6
    slope = (process.noise(x0, eps, t + h) - process.noise(x0, eps, t - h)) / (2 * h)
    torch.testing.assert_close(process.velocity(x0, eps, t), slope, atol=1e-8, rtol=1e-6)
    x = process.noise(x0, eps, t)
    for dst, truth in (("x0", x0), ("eps", eps), ("velocity", slope)):
        torch.testing.assert_close(process.convert(eps - x0, x, t, "flow", dst), truth, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("family", ["sd3", "flux", "qwen_image", "wan"])
def test_contract_and_stock_schedule_follow_the_shift(tmp_path, family):
    """The teacher is the same network at the same noise level; evenly spaced student times leave as the shifted timesteps, and the stock scheduler
    of the contract runs through exactly them."""
    folder = str(tiny_b.build(family, tmp_path / family))
    plain, moved = backbones.load(folder), backbones.load(folder)
    moved.shift_times(3.0)
    x, t = torch.randn(1, *plain.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.4])
    with torch.no_grad():
        cond = plain.conditions(["a red heart"])
        seen = moved.teacher(x, t, cond)
        torch.testing.assert_close(seen, plain.teacher(x, times.shifted(t, 3.0), cond), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(seen, plain.teacher(x, t, cond), atol=1e-3)
        trig = TrigFlow()                                          # any other reading of it agrees
        both = [view(m.teacher, trig)(x, torch.tensor([0.9]), cond) for m in (moved, plain)]
        torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)
    for rule in ("renoise", "ode"):
        contract = contract_for(moved, (1.0, 0.75, 0.5, 0.25), rule)
        assert contract.prediction == "velocity" and contract.knots[4] == pytest.approx((1000, 900, 750, 500), abs=1e-3)
        for k in contract.knots:
            assert stock_timesteps(scheduler_for(contract, {}), contract, k) == pytest.approx(contract.knots[k], abs=1e-2)
    ends = [rollout.sample(m.teacher, x, cond, contract.times(4, m.process), "ode") for m in (plain, moved)]
    torch.testing.assert_close(*ends, atol=1e-4, rtol=1e-4)


def test_stretched_shift_solves_for_the_grid():
    assert stretched_shift(1.0, 4) == 1.0 and stretched_shift(5.0, 1) == 5.0
    assert stretched_shift(3.0, 4) == pytest.approx(2.0, abs=0.02)       # (1 - 1/z) / 3 = (2/3) / 4 but for the thousandth at the end


def test_the_shift_is_refused_where_times_are_others(tmp_path):
    with pytest.raises(UserError, match="flow-matching teachers"):
        backbones.load(str(tiny_a.build("sd15", tmp_path / "sd"))).shift_times(3.0)
    model = backbones.load(str(tiny_b.build("sd3", tmp_path / "sd3")))
    model.shift_times(3.0)
    with pytest.raises(UserError, match="draws its two times itself"):
        model.make("student", two_time=True)
    model.make("critic", two_time=True)


@pytest.mark.slow
def test_life_with_a_shift(tmp_path, monkeypatch):
    """Two steps on a flow teacher, resumed, exported: the folder samples the shifted timesteps."""
    import train_dmd
    from diffusers import DiffusionPipeline

    from zoo import watch
    monkeypatch.setattr(watch, "TEACHER_STEPS", 2)
    monkeypatch.setattr(backbones.Backbone, "watched", (4, 2))
    folder = tiny_b.build("wan", tmp_path / "wan")
    (tmp_path / "prompts.txt").write_text("a red heart\na blue cat\na green tree\na star\n")
    cfg = train_dmd.Config(teacher=str(folder), data=str(tmp_path / "prompts.txt"), batch=2, steps=1, lora=2, time_budget=0, flow_shift=5.0, measure_every=0,
                           sample_every=0, output_dir=str(tmp_path / "run"), mixed_precision="no", critic_updates=1, guidance=2.0)
    train_dmd.main(cfg)
    run = train_dmd.main(dataclasses.replace(cfg, steps=2))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run/student")
    pipe.set_progress_bar_config(disable=True)
    contract, seen = run.watcher.contract, []
    pipe("a red heart", output_type="np", callback_on_step_end=lambda _p, _i, t, kw: seen.append(float(t)) or kw, **contract.stock_call(4))
    assert seen == pytest.approx([1000, 15000 / 16, 5000 / 6, 625], abs=1e-2)
