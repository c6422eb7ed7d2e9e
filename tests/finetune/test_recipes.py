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
    for (family, kind), row in recipes.RECIPES.items():
        users = [c for n, c in configs.items() if kind in (n, registry.method(n).family)]
        assert family in families and users and row["source"]
        for key in set(row) - {"source"}:
            assert any(key in recipes._fields(c) for c in users), (family, kind, key)


def test_auto_is_the_recipe_of_the_teachers_family(tmp_path, capsys):
    import train_dmd
    import train_lcm
    import tyro
    folder = str(tiny_a.build("sdxl", tmp_path / "sdxl"))
    cfg = parse(train_dmd.Config, ["--recipe", "auto", "--teacher", folder, "--batch", "16"], tyro)
    assert (cfg.lr, cfg.critic_updates, cfg.guidance, cfg.batch, cfg.time_budget) == (5e-7, 5, 8.0, 16, 0.0)
    said = capsys.readouterr().err
    assert "recipe auto: DMD2" in said and "deviates: batch = 16 (recipe 128)" in said
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
    assert "shift" in recipes._fields(train_rcm.Config) and "flow_shift" not in recipes.published("flux", "rcm", recipes._fields(train_rcm.Config))


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
