"""Every image method's `main` at guidance 2 on a labelled world whose guided law is known exactly, and its other loss terms one at a time.

The closed-form tests beside this file prove the functions; what `main` hands them (which score, which condition, which sign) shows here."""
import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch

from zoo import critics, plan, registry
from zoo.backbones.toy import Toy
from zoo.data import pairs
from zoo.process import RectifiedFlow
from zoo.run import Run, Trainee
from zoo.toy import Mixture, ToyNet, sliced_wasserstein
from zoo.watch import Watcher

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train_scripts"))

CLASSES, SPREAD, W = 4, 0.4, 2.0


class Towns(Mixture):
    """Classes N(mu_c, S^2 I) with mu_c on the unit circle, and a null class N(0, S^2 I) of its own. All scores have one slope, so that
    D_u + w (D_c - D_u) is the denoiser of N(w mu_c, S^2 I) itself: the guided flow ends there, at every w."""

    def __init__(self, process):
        angle = torch.arange(CLASSES, dtype=torch.float64) * 2 * torch.pi / CLASSES
        means = torch.cat([torch.stack([angle.cos(), angle.sin()], 1), torch.zeros(1, 2, dtype=torch.float64)])
        super().__init__(means, torch.full((CLASSES + 1,), SPREAD), process=process)
        self.spread = SPREAD                 # of what is drawn

    def denoise(self, x, t, label=None):
        alpha, sigma, _, _ = (c.double()[:, None] for c in self.process.coeffs(t))
        mean, var = self.means[label], SPREAD**2
        return mean + alpha * var / (alpha**2 * var + sigma**2) * (x.double() - alpha * mean)

    def sample(self, n, seed=0, label=None):
        g = torch.Generator().manual_seed(seed)
        label = torch.randint(CLASSES, (n,), generator=g) if label is None else label
        return (self.means[label] + self.spread * torch.randn(n, 2, generator=g, dtype=torch.float64)).float(), label


class Town(Toy):
    """The backbone of `Towns`: students and critics start as its unguided, labelled teacher. Data: its unguided classes, or with `data` that
    many times as far out."""

    def __init__(self, data=1.0):
        self.name, self.data, self.process = "toy", "toy", RectifiedFlow()
        self.mixture, self.null, self.out = Towns(self.process), CLASSES, data
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.module = ToyNet(2, CLASSES, 64)
            self._fit(300)
        self.module.requires_grad_(False)

    def batches(self, images=False):
        source = super().batches(images)
        get = source.get
        def moved(index):
            fields = get(index)
            if images:
                fields["x0"] = fields["x0"] + (self.out - 1) * self.mixture.means[fields["cond"]["label"]].float()
            return fields
        source.get = moved
        return source


FITTED = []


def town(data=1.0):
    if not FITTED:
        FITTED.append(Town())
    made = copy.deepcopy(FITTED[0])          # a discriminator leaves its hooks on the network
    made.out = data
    return made


@pytest.fixture(autouse=True)
def nothing_beside(monkeypatch):
    """No teacher samples for grids, no export, no estimate of memory: other tests are about those."""
    for name in ("begin", "finish"):
        monkeypatch.setattr(Watcher, name, lambda self: None)
    monkeypatch.setattr(plan, "_activations", lambda *_: 0)


@pytest.fixture
def rows(monkeypatch):
    """What every minimize of a run logged, by trainee."""
    rows, minimize = {}, Run.minimize
    def kept(run, trainee, loss, data):
        out = minimize(run, trainee, loss, data)
        rows.setdefault(trainee.name, []).append({k: v.item() for k, v in out.items()})
        return out
    monkeypatch.setattr(Run, "minimize", kept)
    return rows


def away(run, far=W):
    """Mean over classes of the sliced Wasserstein distance to N(far mu_c, S^2 I), by the fewest steps the student serves. Between
    the unguided law (far = 1) and the guided one (far = 2) it is .64."""
    model, n = run.model, 500
    examples = model.examples(CLASSES, n)
    label = examples.cond["label"]
    with torch.no_grad():
        x = run.watcher.sample(min(run.watcher.trained), CLASSES * n, examples)
    truth = model.mixture.sample(CLASSES * n, seed=3, label=label)[0] + (far - 1) * model.mixture.means[label].float()
    return sum(sliced_wasserstein(x[label == c], truth[label == c]) for c in range(CLASSES)) / CLASSES


def go(name, folder, data=1.0, model=None, **options):
    script = importlib.import_module(f"train_{name}")
    common = dict(teacher=model or town(data), batch=64, guidance=W, lr=2e-3, time_budget=0, measure_every=0, sample_every=0, checkpoint_every=0,
                  mixed_precision="no", export="last", ema=0.9, output_dir=str(folder))
    if hasattr(script.Config, "critic_lr"):
        common["critic_lr"] = 4e-3
    return script.main(script.Config(**common | options))


def test_the_world_is_what_it_says():
    """Guiding the teacher's denoiser is the denoiser of the moved class, at any time and scale."""
    from zoo import losses
    world = town().mixture
    x, t, label = torch.randn(64, 2, dtype=torch.float64), torch.rand(64, dtype=torch.float64) * 0.9 + 0.05, torch.arange(64) % CLASSES
    for w in (0.5, 2.0, 3.0):
        moved = copy.deepcopy(world)
        moved.means[:CLASSES] *= w
        guided = losses.guided(world, x, t, {"label": label}, {"label": 0 * label + CLASSES}, w)
        assert (guided - moved(x, t, {"label": label})).abs().max() < 1e-12
    assert (world(x, t, {"label": label}) - moved(x, t, {"label": label})).abs().max() > 0.5


# ------------------------------------------------------------------------------------------------------------- the guided law
ONE = dict(student_times=(1.0,))
MORE = pytest.mark.slow
# Options beside the common ones. The distance reached is below .25, of .64 between the guided law and the one each student starts with; a swapped
# condition or a flipped sign ends beyond .64. Terms that could stand in for one another are trained alone.
GUIDED = [
    ("dmd", dict(steps=100, betas=(0.0, 0.99), **ONE), ""),
    ("decoupled_dmd", dict(steps=120, **ONE), ""),
    ("tdm", dict(steps=100, student_times=(1.0, 0.5)), ""),
    ("sid", dict(steps=100, lr=1e-3, critic_updates=2, **ONE), ""),
    ("swiftbrush", dict(steps=130), ""),
    ("swiftbrush", dict(steps=130, guidance_range=(1.0, 3.0)), "-range"),
    ("dmd_pairs", dict(steps=100, regression=0.0, pairs=64, pair_steps=4), ""),
    ("ladd", dict(steps=200, lr=4e-3, critic_lr=8e-3, synthetic=512, synthetic_steps=8, easy_steps=0, time_weights=(1.0,), **ONE), ""),
    ("lcm", dict(steps=150, grid=20, target_decay=0.8), ""),
    ("lcm", dict(steps=200, grid=20, target_decay=0.8, guidance_range=(1.0, 3.0)), "-range"),
    ("meanflow", dict(steps=120), ""),
    ("scm", dict(steps=140, tangent_c=1.0, tangent_warmup=10, sigma_data=0.5, std=1.0), ""),
    ("rcm", dict(steps=60, dmd=0.0, dmd_after=1000, tangent_c=1.0), "-consistency-alone"),
    ("rcm", dict(steps=80, dmd=10.0, tangent_c=1e6, rollout_steps=2), "-score-alone"),
    ("flow_map", dict(steps=120), ""),
    ("split_meanflow", dict(steps=150), ""),
    ("arcflow", dict(steps=80), ""),
    ("progressive", dict(steps=180, lr=4e-3, guided_steps=80, first=2, last=1, phase_steps=25), ""),
    ("reflow", dict(steps=100, pairs=512, pair_steps=10), ""),
    ("reflow", dict(steps=80, pairs=512, pair_steps=10, stage="distill"), "-distill"),
    ("tscd", dict(steps=150, segments=2, stage_steps=50, grid=20, target_decay=0.8, student_steps=2), ""),
]
SLOW = ("ladd", "rcm", "progressive", "split_meanflow", "scm", "lcm")      # and a few of the others' options


@pytest.mark.parametrize("name,options", [pytest.param(n, o, id=n + more, marks=MORE if n in SLOW or more else ()) for n, o, more in GUIDED])
def test_main_ends_at_the_guided_law(tmp_path, name, options):
    run = go(name, tmp_path / "run", **options)
    reached = away(run)
    print(f"{name}: {reached:.3f} to the guided law, {away(run, 1.0):.3f} to the unguided one")
    assert reached < 0.25


def test_every_method_that_follows_a_guided_teacher_is_here():
    """TwinFlow, which has none, is below."""
    assert {n for n, _, _ in GUIDED} | {"twinflow"} == {m.name for m in registry.methods() if m.modality == "image"}


def test_guidance_on_both_scores_of_swiftbrush_leaves_the_unguided_law(tmp_path):
    run = go("swiftbrush", tmp_path / "run", steps=60, critic_guidance=0.0)
    assert away(run, 1.0) < 0.2 and away(run) > 0.45


def test_the_regression_of_dmd_pairs_reaches_the_guided_law_alone(tmp_path, monkeypatch):
    """Without its matching term, which would end there too."""
    script = importlib.import_module("train_dmd_pairs")
    monkeypatch.setattr(script, "matching_direction", lambda x, *_: (0 * x, {}))
    assert away(go("dmd_pairs", tmp_path / "run", steps=60, pairs=512, pair_steps=10)) < 0.25


# ------------------------------------------------------------------------------------------------------------- data, not a teacher
@MORE
@pytest.mark.parametrize("name,options", [("dmd", dict(steps=150, lr=1e-3, betas=(0.0, 0.99), gan=1e3, gan_critic=1.0, **ONE)),
                                          ("flow_map", dict(steps=120, velocity="data"))], ids=["dmd-gan-alone", "flow_map-data"])
def test_main_ends_at_the_data(tmp_path, name, options):
    """The data are twice as far out as the teacher's classes."""
    assert away(go(name, tmp_path / "run", data=2.0, guidance=1.0, **options), 2.0) < 0.25


@MORE
def test_twinflow_guides_itself_and_follows_the_data(tmp_path):
    assert away(go("twinflow", tmp_path / "guided", steps=150, target_decay=0.9)) < 0.25
    assert away(go("twinflow", tmp_path / "data", data=2.0, guidance=1.0, steps=150, target_decay=0.9)) < 0.25


# ------------------------------------------------------------------------------------------------------------- stop-gradients
SMALL = {"dmd_pairs": dict(pairs=64, pair_steps=2), "reflow": dict(pairs=64, pair_steps=2), "flow_map": dict(velocity="data"),
         "progressive": dict(guided_steps=2, first=2, last=1, phase_steps=2), "split_meanflow": dict(target_decay=0.9)}


@pytest.mark.parametrize("name", [m.name for m in registry.methods() if m.modality == "image"])
def test_the_student_is_given_constants(tmp_path, monkeypatch, name):
    """What a student's loss differentiates is one call on a constant input: nothing of the way there (earlier steps, its own samples) carries
    a gradient, and no other network of the run has one in its turn."""
    call, minimize, graded = Trainee.__call__, Run.minimize, []
    def seen(self, x, t, cond, **options):
        if self.name == "student" and torch.is_grad_enabled():
            graded.append(x.requires_grad)
        return call(self, x, t, cond, **options)
    def alone(run, trainee, loss, data):
        def checked(batch):
            out = loss(batch)
            for other in run.trainees.values():
                assert other is trainee or not any(p.requires_grad for p in other.params.values())
            return out
        return minimize(run, trainee, checked, data)
    monkeypatch.setattr(Trainee, "__call__", seen)
    monkeypatch.setattr(Run, "minimize", alone)
    go(name, tmp_path / "run", steps=5, batch=8, **SMALL.get(name, {}))
    assert graded and not any(graded)


# ------------------------------------------------------------------------------------------------------------- terms, one at a time
def test_terms_of_tscd(tmp_path, rows, monkeypatch):
    """The discriminator is told that the target is real and the student's jump is not; the student pays gan softplus(-its own logit)."""
    script = importlib.import_module("train_tscd")
    asked = {"discriminator": [], "generator": []}
    monkeypatch.setattr(script, "segment_target", lambda target, real, x_t, *_: torch.full_like(x_t, 7.0))
    monkeypatch.setattr(script, "noised", lambda process, x, s, g, eps: x)
    zero = lambda net: 0 * sum(p.sum() for p in net.params.values())
    monkeypatch.setattr(critics, "logits", lambda net, samples, cond: [x.mean(1) + zero(net) for x, _ in samples])
    for name, calls in asked.items():
        plain = getattr(critics, name)
        monkeypatch.setattr(critics, name, lambda *logits, plain=plain, calls=calls: calls.append((logits, plain(*logits))) or calls[-1][1])
    go("tscd", tmp_path / "run", steps=2, gan=0.3)
    for (real, fake), _ in asked["discriminator"]:
        assert (real == 7).all() and (fake != 7).all()
    for ((mine,), value), row in zip(asked["generator"], rows["student"], strict=True):
        assert (mine != 7).all() and value > 0 and abs(row["loss"] - row["consistency"] - 0.3 * value.item()) < 1e-4


def test_terms_of_ladd(tmp_path, rows, monkeypatch):
    """The approximate R1 term is added to the critic's loss, and taken at the data: their logits, and those of the data moved."""
    script, asked = importlib.import_module("train_ladd"), []
    r1 = script.approximate_r1
    monkeypatch.setattr(script, "approximate_r1", lambda real, moved: asked.append((real, moved, r1(real, moved))) or asked[-1][2])
    go("ladd", tmp_path / "run", steps=3, r1=0.7)
    for (real, moved, value), row in zip(asked, rows["critic"], strict=True):
        assert value > 0 and abs(row["loss"] - row["adversarial"] - 0.7 * value.item()) < 1e-5
        assert row["real"] == real[-1].mean() != row["fake"] and not torch.equal(real[-1], moved[-1])
    asked.clear()
    go("ladd", tmp_path / "still", steps=2, r1_noise=0.0)
    assert len(asked) == 2 and all(torch.equal(a, b) for real, moved, _ in asked for a, b in zip(real, moved, strict=True))


def test_ladd_judges_both_sides_alike(tmp_path, rows, monkeypatch):
    """A student that returns the data themselves: equal logits to the bit, as time, noise, condition and student time are shared (sheet)."""
    model = town()
    model.mixture.spread = 0.0               # the data are their class's mean
    means = model.mixture.means.float()
    monkeypatch.setattr(Trainee, "__call__", lambda self, x, t, cond: means[cond["label"]] + 0 * sum(p.sum() for p in self.params.values()))
    go("ladd", tmp_path / "run", model=model, steps=3)
    assert all(row["real"] == row["fake"] and row["adversarial"] >= 1.3862 for row in rows["critic"])


def test_ladd_begins_with_the_late_times(tmp_path, monkeypatch):
    script, drawn = importlib.import_module("train_ladd"), []
    chosen = script.chosen
    monkeypatch.setattr(script, "chosen", lambda u, weights: drawn.append(list(weights)) or chosen(u, weights))
    go("ladd", tmp_path / "run", steps=3, easy_steps=2)
    assert drawn == 4 * [[0, 0, 0.1, 0.1]] + 2 * [[0.7, 0.1, 0.1, 0.1]]


def test_tdm_noises_its_own_noise_on_from_the_next_knot(tmp_path, monkeypatch):
    """In both turns: from s, a knot below the student's time t = s + 1/2, on to u between them, with the student's eps, not the fresh draw."""
    script, calls = importlib.import_module("train_tdm"), []
    noised = script.noised_on
    monkeypatch.setattr(script, "noised_on", lambda process, eps, s, u, n: calls.append((eps, s, u, n)) or noised(process, eps, s, u, n))
    go("tdm", tmp_path / "run", steps=1, critic_updates=1, student_times=(1.0, 0.5))
    for eps, s, u, n in calls:
        assert set(s.tolist()) == {0.5, 0.0} and (u >= s).all() and (u <= s + 0.5).all() and u[s == 0].max() > 0.4
    assert [eps.requires_grad for eps, *_ in calls] == [False, True] and not any(n.requires_grad for *_, n in calls)


def test_scores_of_sid_are_read_as_its_option_says(tmp_path, monkeypatch):
    """k1: the critic in training; k4: the teacher, k2: the critic, in the student's loss; the prompt is the condition, the empty one the other."""
    script, calls = importlib.import_module("train_sid"), []
    monkeypatch.setattr(script, "scales", lambda cfg, guidance: (1.25, 1.5, 1.75))
    at_scale = script.at_scale
    def asked(net, x_t, t, cond, uncond, k, **to):
        who = "critic" if isinstance(net, Trainee) else "teacher"
        calls.append((who, k, (cond["label"] < CLASSES).all().item(), (uncond["label"] == CLASSES).all().item()))
        return at_scale(net, x_t, t, cond, uncond, k, **to)
    monkeypatch.setattr(script, "at_scale", asked)
    go("sid", tmp_path / "run", steps=1, critic_updates=1, prompt_drop=0.0)
    assert calls == [("critic", 1.25, True, True), ("teacher", 1.75, True, True), ("critic", 1.5, True, True)]


def test_the_scale_of_sid_is_a_constant(tmp_path, rows, monkeypatch):
    """With an identity that does not depend on the samples nothing is left to learn, unless the scale that divides it has a gradient."""
    script = importlib.import_module("train_sid")
    monkeypatch.setattr(script, "score_identity", lambda x, x_real, x_fake, alpha: 1 + 0 * x)
    run = go("sid", tmp_path / "run", steps=2, log_every=0)
    assert all(norm == 0 for norm in run._logged["student/grad_norm"])


def test_scm_moves_the_network_and_not_its_velocity(tmp_path, monkeypatch):
    """What is moved along the bounded tangent is F = v / sigma_data: the loss' value would not show another scale, nor would Adam."""
    script, made, moved = importlib.import_module("train_scm"), [], []
    call, along = Trainee.__call__, script.losses.along
    def velocity(*args, **options):
        out = call(*args, **options)
        if out.requires_grad:
            made.append(out)
        return out
    monkeypatch.setattr(Trainee, "__call__", velocity)
    monkeypatch.setattr(script.losses, "along", lambda x, direction: moved.append((x, direction)) or along(x, direction))
    go("scm", tmp_path / "run", steps=2, sigma_data=0.5)
    assert made and all(torch.equal(x, v / 0.5) and (g.norm(dim=1) < 1).all() for v, (x, g) in zip(made, moved, strict=True))


def test_segments_of_arcflow(tmp_path, monkeypatch):
    """A later segment starts where the student's own Euler step ends, and the states lie inside it, a window above its end."""
    script, calls, lengths = importlib.import_module("train_arcflow"), [], []
    call, intervals = Trainee.__call__, script.intervals
    def seen(self, x, t, cond, **options):
        out = call(self, x, t, cond, **options)
        calls.append((x, t, out))
        return out
    monkeypatch.setattr(Trainee, "__call__", seen)
    monkeypatch.setattr(script, "intervals", lambda mine, teachers, length, rho: lengths.append(length) or intervals(mine, teachers, length, rho))
    go("arcflow", tmp_path / "run", steps=6)
    later = [k for k, (_, t, _) in enumerate(calls) if (t == 0.5).all()]
    assert len(later) >= 2 and all((calls[k - 1][1] == 1).all() for k in later)
    assert all(torch.allclose(calls[k][0], calls[k - 1][0] - 0.5 * calls[k - 1][2], atol=1e-6) for k in later)
    assert len(lengths) == 6 and all(torch.allclose(length, torch.full_like(length, 0.5 - 3 / 128)) for length in lengths)


def test_terms_of_twinflow(tmp_path, rows, monkeypatch):
    """A student whose one step lands at 3 from anywhere, whose twin's velocity is .25 and whose real one is 0: the twin learns the flow of
    those samples, eps - 3, and the one-step jump F is corrected to F - (.25 - 0), at the same samples noised."""
    script, asked, pairs_of = importlib.import_module("train_twinflow"), [], []
    def student(self, x, t, cond, *, r, to):
        asked.append((x, t, r))
        known = torch.where(r < 0, 0.25, torch.where(r == t, 0.0, torch.nan))[:, None]
        return torch.where(known.isnan(), (x - 3) / t[:, None], known) + 0 * sum(p.sum() for p in self.params.values())
    plain = script.distance
    monkeypatch.setattr(Trainee, "__call__", student)
    monkeypatch.setattr(script, "distance", lambda F, y: pairs_of.append((F, y)) or plain(F, y))
    go("twinflow", tmp_path / "run", steps=1, rectify=0.7, guidance=1.0)
    (_, (x_t, t, r), (x_s, s, minus), (again, _, plus)), ((F, y), (jump, corrected)) = asked, pairs_of
    assert not any(v.requires_grad for v in (x_t, x_s, y, corrected))
    twin, one = r < 0, (t == 1) & (r == 0)
    assert 4 < twin.sum() < 32 and 4 < one.sum() < 32 and torch.equal(r[twin], -t[twin])
    assert torch.allclose(y[twin], ((x_t - 3) / t[:, None])[twin], atol=1e-4)
    assert torch.equal(jump, F[one]) and torch.allclose(corrected, jump - 0.25, atol=1e-6)
    assert torch.equal(x_s, again) and torch.equal(minus, -s) and torch.equal(plus, s)
    assert abs(((x_s - 3 * (1 - s)[:, None]) / s[:, None]).mean()) < 0.7             # noise alone
    row, = rows["student"]
    assert abs(row["loss"] - row["flow"] - 0.7 * 4 * plain(jump, corrected).sum().item() / 64) < 1e-5 and row["rectification"] > 0


@pytest.mark.parametrize("weight,bound", [(1e3, 0.2), pytest.param(0.5, None)], ids=["alone", "beside"])
def test_terms_of_reflow(tmp_path, rows, monkeypatch, weight, bound):
    """rf++: (1 - t) H + perceptual P / t, P of the clean prediction and the pair's end; with P a plain square it reaches the guided law alone."""
    plain = pairs.distance
    square = lambda x, y: (x - y).square().mean(1)
    monkeypatch.setattr(pairs, "distance", lambda model, metric: square if metric == "perceptual" else plain(model, metric))
    run = go("reflow", tmp_path / "run", steps=100 if bound else 3, pairs=256, pair_steps=8, perceptual=weight)
    for row in rows["student"]:
        rest = row["loss"] - weight * row["perceptual"]
        assert row["perceptual"] > 0 and (bound or 0.2 * row["plain"] < rest < 0.8 * row["plain"])
    assert bound is None or away(run) < bound
