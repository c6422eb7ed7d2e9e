"""SDTT and masked consistency against closed forms (the sheets' toy checks with their reference numbers), mutations that must fail,
and the whole life of a text student."""
import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train_scripts"))
import make_text_teacher  # noqa: E402
import train_sdtt  # noqa: E402

from zoo import UserError, tokens  # noqa: E402
from zoo.backbones import text  # noqa: E402
from zoo.data import text as texts  # noqa: E402
from zoo.denoiser import CALLS  # noqa: E402
from zoo.hub.card import lint  # noqa: E402
from zoo.metrics import text as metrics  # noqa: E402
from zoo.tokens import HIDDEN, Masked, subs  # noqa: E402
from zoo.toy_tokens import Chain, copy, divergences, sampler_law, states  # noqa: E402

D = torch.float64
SEVENTY = torch.tensor([0.7, 0.3], dtype=D)
PAIR = copy(SEVENTY)                                                  # two equal tokens, 0 with probability 0.7; the mask is 2


def knots(k):
    return 1 - torch.arange(k, dtype=D) / k


def uniform(g):
    return lambda *shape: torch.rand(*shape, generator=g, dtype=D)


# --------------------------------------------------------------------------------------------------------- the process
def normal_schedule(a, k):
    """alpha(a) of the Gaussian whose shadow masking is: P(a + eps_0 > max of k - 1 other eps), by quadrature."""
    z = torch.linspace(-9, 12, 20_001, dtype=D)
    return torch.trapezoid(torch.exp(-0.5 * (z - a) ** 2) / math.sqrt(2 * math.pi) * torch.special.ndtr(z) ** (k - 1), z).item()


@pytest.mark.parametrize("k,at_half,at_nine_tenths", [(27, 1.9733, 3.4222), (256, 2.8195, 4.2047)])
def test_masking_is_the_shadow_of_a_gaussian(k, at_half, at_nine_tenths):
    """MCD, toy check a: levels a with alpha(a) = .5 and .9; at a = 0 a token survives with probability 1/K."""
    for alpha, reference in ((0.5, at_half), (0.9, at_nine_tenths)):
        low, high = -6.0, 12.0
        while high - low > 1e-7:
            middle = (low + high) / 2
            low, high = (middle, high) if normal_schedule(middle, k) < alpha else (low, middle)
        assert abs(low - reference) < 5e-5
    assert abs(normal_schedule(0.0, k) - 1 / k) < 1e-6


def test_uniform_and_gaussian_masks_agree_and_are_nested():
    """MCD, toy check b, on 4e5 tokens: rates within .003, masks nested, P(masked at s | masked at t) = (1 - alpha_s)/(1 - alpha_t)."""
    n, k, process = 400_000, 27, Masked(27)
    x0, u = torch.zeros(1, n, dtype=torch.long), uniform(torch.Generator().manual_seed(0))(1, n)
    t, s = torch.tensor([0.7], dtype=D), torch.tensor([0.3], dtype=D)
    at_t, at_s = (process.mask(x0, u, time) == 27 for time in (t, s))
    assert (at_t | ~at_s).all()
    assert abs(at_t.double().mean() - 0.7) < 3e-3 and abs(at_s.double().mean() - 0.3) < 3e-3
    assert abs(at_s[at_t].double().mean() - 0.3 / 0.7) < 3e-3 and abs(process.remains(t, s) - 0.4286) < 1e-4
    g = torch.Generator().manual_seed(1)
    eps = torch.randn(n, k, generator=g)
    tau = eps[:, 1:].max(1).values - eps[:, 0]                        # visible iff a > tau
    assert abs((tau > 1.9733).double().mean() - 0.5) < 3e-3
    other = process.mask(x0, uniform(torch.Generator().manual_seed(2))(1, n), s) == 27
    assert not (at_t | ~other).all()                                  # mutation: fresh noise at s breaks the nesting


def test_subs_never_gives_the_mask_and_copies_what_is_visible():
    z, logits = torch.tensor([[2, 0, 2]]), torch.randn(1, 3, 3, dtype=D)
    p = subs(logits, z, 2).exp()
    assert torch.allclose(p.sum(-1), torch.ones(1, 3, dtype=D)) and p[..., 2].max() == 0
    assert torch.equal(p[0, 1], torch.tensor([1.0, 0, 0], dtype=D))
    with pytest.raises(ValueError, match="read as x0"):
        Masked(2).convert(logits, z, None, "logits", "eps")


def test_sampler_follows_its_exact_law_with_one_call_a_step():
    chain = Chain(SEVENTY, torch.tensor([[0.9, 0.1], [0.3, 0.7]]), 3)
    n, draw = 40_000, uniform(torch.Generator().manual_seed(0))
    for k in (1, 3):
        before = CALLS.total
        x = tokens.sample(chain, chain.process.prior(n, 3), {}, knots(k), lambda: draw(n, 3))
        assert CALLS.total - before == k * n                          # exactly k network calls per sample
        assert (x < 2).all()                                          # the last step leaves no mask
        seen = torch.bincount((x * torch.tensor([4, 2, 1])).sum(1), minlength=8).double() / n
        assert divergences(seen, sampler_law(chain, knots(k), 2, 3))["tv"] < 0.01
    start = chain.process.prior(500, 3)
    start[:, 1] = 1
    assert (tokens.sample(chain, start, {}, knots(3), lambda: draw(500, 3))[:, 1] == 1).all()      # visible tokens never change


def test_rare_symbols_are_reached_and_float32_is_refused():
    """Inverse CDF at the last 5e-10 of the unit interval draws the symbol of probability 1e-9; a float32 number cannot say so."""
    process, one, zero = Masked(2), torch.ones(1, dtype=D), torch.zeros(1, dtype=D)
    log_p = torch.tensor([[[1 - 1e-9, 1e-9, 0.0]]], dtype=D).log().clamp(min=HIDDEN)
    u = torch.tensor([[1 - 5e-10]], dtype=D)
    assert process.step(process.prior(1, 1), log_p, one, zero, u).item() == 1
    assert u.float().item() == 1.0                                    # outside [0, 1)
    with pytest.raises(ValueError, match="float64"):
        process.step(process.prior(1, 1), log_p, one, zero, u.float())
    edge = torch.tensor([[math.nextafter(1.0, 0.0)]], dtype=D)        # the largest number below 1 draws no forbidden symbol
    assert process.step(process.prior(1, 1), log_p, torch.tensor([0.9], dtype=D), zero, edge).item() == 1


# --------------------------------------------------------------------------------------------------------- three facts
@pytest.mark.parametrize("k", [2, 4])
def test_factorisation_floor(k):
    """Core, fact 1: one step from all masks on copy data is 1 - 1/K away in total variation; n steps, 1/n of it."""
    chain = copy(torch.full((k,), 1 / k))
    for n in (1, 2, 4):
        assert abs(divergences(sampler_law(chain, knots(n), k, 2), chain.law())["tv"] - (1 - 1 / k) / n) < 1e-9


def expected_gradient(target, direction):
    """Gradient at the all-mask state of the script's expected loss on 70/30 pairs, at a student that is the exact teacher: every
    outcome of the random numbers is enumerated with its probability. t = 0.8, dt = 0.3, so a mask stays with probability 5/8."""
    p, process = PAIR, PAIR.process
    z, t, stay = process.prior(1, 2), torch.tensor([0.8], dtype=D), 0.625
    logits = p.posterior(z).log().requires_grad_()
    log_q = subs(torch.nn.functional.pad(logits, (0, 1)), z, 2)
    cells = [(0.5 * stay, stay)]                                      # (a number in the cell, its probability): stays, 0, 1
    cells += [(stay + (1 - stay) * middle, (1 - stay) * mass) for middle, mass in ((0.35, 0.7), (0.85, 0.3))]
    total = 0
    if target == "teacher":
        for u1, w1 in cells:
            for u2, w2 in cells:
                draws = iter([torch.tensor([[u1, u2]], dtype=D), torch.full((1, 2), 0.5, dtype=D)])
                targets = train_sdtt.teacher_targets(p, z, t, 0.3, 2, {}, lambda: next(draws))
                total = total + w1 * w2 * train_sdtt.kl(log_q, targets, 1e-300, direction).mean()
    else:
        for symbol, mass in ((0, 0.7), (1, 0.3)):                     # u >= 0.2 is masked at t, u >= 0.5 at s
            for (u1, w1), (u2, w2) in [(a, b) for a in ((0.3, 0.375), (0.7, 0.625)) for b in ((0.3, 0.375), (0.7, 0.625))]:
                x0 = torch.full((1, 2), symbol)
                targets, z_s = train_sdtt.shared_noise_targets(p, x0, torch.tensor([[u1, u2]], dtype=D), t, 0.3, {})
                each = torch.where(z_s != 2, train_sdtt.cross_entropy(log_q, x0), train_sdtt.kl(log_q, targets, 1e-300, direction))
                total = total + mass * w1 * w2 * each.mean()
    return torch.autograd.grad(total, logits)[0].abs().max().item()


@pytest.mark.parametrize("target", ["teacher", "shared_noise"])
def test_forward_kl_leaves_the_teacher_where_it_is(target):
    """Core, fact 2 and MCD, toy check c: E p(. | z_s) = p(. | z_t), so the exact teacher is stationary; under reverse KL it is not."""
    assert expected_gradient(target, "forward") < 1e-12
    assert expected_gradient(target, "reverse") > 1e-2


def test_reverse_kl_sharpens_to_the_closed_form():
    """MCD, toy check d: 70/30 pairs whose partner is visible at s, floor 1e-3: q(0) = .94, validity .58 -> .89, entropy .61 -> .23."""
    process, draw = PAIR.process, uniform(torch.Generator().manual_seed(0))
    def fit(direction):
        logits = torch.zeros(2, dtype=D, requires_grad=True)
        opt = torch.optim.Adam([logits], lr=0.1)
        for _ in range(100):
            x0 = torch.where(draw(1024, 1) < 0.7, 0, 1).expand(-1, 2)
            z = process.prior(1024, 2)
            # the first token stays masked (u = .9), the second is shown (u = .3) at s = .5 and not at t = .8
            targets, z_s = train_sdtt.shared_noise_targets(PAIR, x0, torch.tensor([[0.9, 0.3]], dtype=D).expand(1024, 2),
                                                           torch.full((1024,), 0.8, dtype=D), 0.3, {})
            assert (z_s[:, 0] == 2).all() and torch.equal(z_s[:, 1], x0[:, 1])
            log_q = subs(torch.nn.functional.pad(logits, (0, 1)).expand(1024, 2, 3), z, 2)
            each = train_sdtt.kl(log_q, targets, 1e-3, direction)[:, :1]
            opt.zero_grad()
            train_sdtt.masked_mean(each, z[:, :1] == 2).backward()
            opt.step()
        return logits.softmax(0)[0].item()
    q = fit("reverse")
    assert abs(q - 0.94) < 0.02
    entropy = lambda q: -q * math.log(q) - (1 - q) * math.log(1 - q)
    assert abs(q**2 + (1 - q) ** 2 - 0.89) < 0.03 and abs(0.7**2 + 0.3**2 - 0.58) < 1e-9
    assert abs(entropy(q) - 0.23) < 0.05 and abs(entropy(0.7) - 0.61) < 1e-2
    assert abs(fit("forward") - 0.7) < 0.02                           # mutation: the other direction keeps the teacher


def test_reverse_kl_of_laws_prefers_one_mode():
    """Core, fact 3: products against 50/50 pairs whose law is cut at 1e-3: log 2 = .69 on one mode, 2.4 spread out."""
    truth = copy(torch.tensor([0.5, 0.5])).law().clamp(min=1e-3)
    def product(logits):
        net = lambda z, t, cond: subs(torch.tensor([*logits, 0.0], dtype=D).expand(len(z), 2, 3), z, 2)
        net.process = Masked(2)
        return divergences(sampler_law(net, knots(1), 2, 2), truth)["reverse_kl"]
    assert abs(product([0.0, 0.0]) - 2.4) < 0.05 and abs(product([40.0, 0.0]) - math.log(2)) < 1e-6


# --------------------------------------------------------------------------------------------------------- the targets
class Counting:
    """Says at call number i that symbol 0 has probability 0.1 i."""
    process = Masked(2)

    def __init__(self):
        self.calls = 0

    def __call__(self, z, t, cond):
        self.calls += 1
        p = torch.tensor([0.1 * self.calls, 1 - 0.1 * self.calls, 0], dtype=D)
        return subs(p.log().clamp(min=HIDDEN).expand(*z.shape, 3), z, 2)


def test_a_target_comes_from_the_sub_step_that_reveals_its_token():
    """Three tokens: revealed at the first sub-step, at the second, never; the fourth was visible. Two calls in all."""
    z = torch.tensor([[2, 2, 2, 1]])
    draws = iter([torch.tensor([[0.9, 0.1, 0.1, 0.9]], dtype=D), torch.tensor([[0.0, 0.9, 0.1, 0.9]], dtype=D)])
    net = Counting()
    targets = train_sdtt.teacher_targets(net, z, torch.tensor([0.8], dtype=D), 0.2, 2, {}, lambda: next(draws)).exp()[0, :, 0]
    assert net.calls == 2 and torch.allclose(targets, torch.tensor([0.1, 0.2, 0.2, 0.0], dtype=D))
    net = Counting()                                                  # at most m sub-steps down, and never below t = 0
    late = train_sdtt.teacher_targets(net, z, torch.tensor([0.1], dtype=D), 0.2, 2, {}, lambda: torch.zeros(1, 4, dtype=D)).exp()[0, :, 0]
    assert torch.allclose(late, torch.tensor([0.1, 0.1, 0.1, 0.0], dtype=D))


def test_visible_tokens_never_enter_the_loss():
    each, hidden = torch.tensor([[1.0, 100.0, 3.0]]), torch.tensor([[True, False, True]])
    assert train_sdtt.masked_mean(each, hidden) == 2 and train_sdtt.masked_mean(each, hidden & False) == 0


def test_rounds_halve_the_steps():
    where = lambda step: train_sdtt.rounds(step, 32, 8, 100, 2)
    assert [where(s) for s in (0, 99, 100, 199, 200, 10**6)] == [(32, 0), (32, 0), (16, 100), (16, 100), (8, 200), (8, 200)]
    assert train_sdtt.rounds(100, 27, 3, 50, 3) == (3, 100)


# --------------------------------------------------------------------------------------------------------- convergence
def run_toy(folder, model="toy", **changes):
    options = dict(batch=256, lr=0.02, ema=0.9, first=8, last=2, steps=240, round_steps=80) | changes
    return train_sdtt.main(train_sdtt.Config(teacher=model, time_budget=0, output_dir=str(folder), measure_every=0, sample_every=0,
                                             checkpoint_every=0, **options))


@pytest.mark.parametrize("target", ["teacher", "shared_noise"])
def test_the_students_exact_law_comes_closer_to_the_chain(tmp_path, target):
    """Exact divergences (no sampling) of few-step samplers on the noisy cycle: before, those of the exact teacher."""
    run = run_toy(tmp_path / "run", target=target)
    chain, net = run.model.chain, run.watcher.net
    for k, tv_before, tv_after, kl_before, kl_after in ((8, 0.1433, 0.095, 0.0756, 0.040), (4, 0.2707, 0.235, 0.2772, 0.20)):
        before, after = (divergences(sampler_law(n, knots(k), 3, 5), chain.law()) for n in (chain, net))
        assert abs(before["tv"] - tv_before) < 1e-3 and abs(before["reverse_kl"] - kl_before) < 1e-3
        assert after["tv"] < tv_after and after["reverse_kl"] < kl_after, (k, after)
        assert after["entropy"] < before["entropy"] and after["entropy"] > 0.95 * after["entropy_of_truth"]


def test_forward_kl_teaches_nothing(tmp_path):
    """The mutation of the test above: under the forward KL the student's few-step law stays the teacher's, up to the noise of training."""
    run = run_toy(tmp_path / "run", divergence="forward")
    after = divergences(sampler_law(run.watcher.net, knots(8), 3, 5), run.model.chain.law())
    assert after["tv"] > 0.12 and after["reverse_kl"] > 0.06, after


def test_copies_of_length_eight_become_valid(tmp_path):
    """MCD, toy check e: eight equal tokens in 2 steps, valid more often than the teacher's; the entropy paid for it is printed."""
    chain = copy(SEVENTY, 8)
    run = run_toy(tmp_path / "run", text.ToyText(chain), target="shared_noise", steps=90, round_steps=30, floor=1e-3)
    draw, said = uniform(torch.Generator().manual_seed(0)), {}
    for who, net in (("teacher", chain), ("student", run.watcher.net)):
        x = tokens.sample(net, chain.process.prior(2000, 8), {}, knots(2), lambda: draw(2000, 8))
        share = (x == 0).double().mean().item()
        said[who] = ((x == x[:, :1]).all(1).double().mean().item(), -share * math.log(share) - (1 - share) * math.log(1 - share))
    print({who: f"validity {v:.2f}, entropy of a token {h:.2f} nats" for who, (v, h) in said.items()})
    assert said["student"][0] > said["teacher"][0] + 0.1 and said["student"][1] < said["teacher"][1]


# --------------------------------------------------------------------------------------------------------- metrics
def test_ngram_model_is_normalised_and_counts_right():
    ids = torch.tensor([0, 1, 0, 1, 1, 0, 2, 0, 1, 0, 0, 1])
    model = metrics.NGram(ids, 3, order=3)
    assert abs(model.log_prob(states(3, 4)).exp().sum() - 1) < 1e-12
    # p_1(0) = (6 + 3 / 3) / (12 + 3); after 2 comes one 0 and nothing else: p_2(0 | 2) = (1 + p_1(0)) / (1 + 1)
    first = (6 + 1) / 15
    assert abs(model.log_prob(torch.tensor([[0]])).exp() - first) < 1e-12
    second = (1 + first) / 2
    assert abs(model.log_prob(torch.tensor([[2, 0]])).exp() - (1 + 1) / 15 * second) < 1e-12


def test_measures_of_diversity():
    x = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1]])
    assert metrics.entropy(x) == 0.5                                  # 0 bits and 1 bit
    assert metrics.ngram_js(x, x, 3) == 0 and abs(metrics.ngram_js(x[:1], torch.ones(1, 4, dtype=torch.long), 3) - 1) < 1e-12
    assert metrics.distinct(x, 3, n=4) == 1 and metrics.distinct(x[:1].repeat(4, 1), 3, n=4) == 0.25
    assert metrics.known_words(["of the lord god"], {"the", "lord"}) == 1 and math.isnan(metrics.known_words(["a b"], set()))


# --------------------------------------------------------------------------------------------------------- the life of a student
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two tiny masked language models with rotary or learnt positions, and a text."""
    from transformers import BertConfig, BertForMaskedLM
    root = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    tokenizer = make_text_teacher.make_tokenizer(16)
    modern = make_text_teacher.build(make_text_teacher.Config(width=32, layers=1, length=16))
    bert = BertForMaskedLM(BertConfig(vocab_size=34, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                                      max_position_embeddings=16))
    for name, module in (("modern", modern), ("bert", bert)):
        for p in module.parameters():
            p.data += 0.05 * torch.randn_like(p)
        module.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "text.txt").write_text(texts.read("text:heldout")[:20_000])
    return root


def config(world, folder, name="modern", **changes):
    return train_sdtt.Config(**dict(teacher=str(world / name), data=str(world / "text.txt"), batch=4, steps=4, time_budget=0, first=8, last=2, round_steps=2,
                                    output_dir=str(folder), sample_every=0, measure_every=0, checkpoint_every=0, mixed_precision="no") | changes)


@pytest.mark.parametrize("lora,target", [(0, "teacher"), (4, "shared_noise")])
def test_killed_and_resumed_is_bit_equal_across_rounds(world, tmp_path, lora, target):
    options = dict(lora=lora, target=target)
    whole = train_sdtt.main(config(world, tmp_path / "whole", steps=5, **options))
    train_sdtt.main(config(world, tmp_path / "parts", steps=2, **options))        # ends exactly at the border of a round
    train_sdtt.main(config(world, tmp_path / "parts", steps=3, **options))
    parts = train_sdtt.main(config(world, tmp_path / "parts", steps=5, **options))
    assert parts.step == 5 and train_sdtt.rounds(4, 8, 2, 2, 2) == (2, 4)
    for name, trainee in whole.trainees.items():
        other = parts.trainees[name]
        assert all(torch.equal(p, other.params[n]) for n, p in trainee.params.items()), name
        assert all(torch.equal(v, other.averages[i][1][n]) for i, (_, a) in enumerate(trainee.averages) for n, v in a.items())


def test_the_round_teacher_is_the_student_at_the_border(world, tmp_path):
    cfg = config(world, tmp_path / "run", steps=2)
    first = train_sdtt.main(cfg)
    base = dict(first.model.module.named_parameters())
    student = {n: p.clone() for n, p in first.trainees["student"].params.items()}
    assert all(torch.equal(p, base[n]) for n, p in first.trainees["round_teacher"].params.items())      # round 0: the given model
    second = train_sdtt.main(dataclasses.replace(cfg, steps=3))
    assert all(torch.equal(p, student[n]) for n, p in second.trainees["round_teacher"].params.items())  # round 1: the student then
    assert not all(torch.equal(p, student[n]) for n, p in second.trainees["student"].params.items())


@pytest.mark.parametrize("name,lora", [("modern", 0), ("bert", 4)])
def test_life(world, tmp_path, name, lora):
    """Train, measure, export; the folder is stock, samples as the trainer did, carries a fit card, and starts another run."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    import zoo
    cfg = config(world, tmp_path / "run", name, lora=lora, sample_every=2, measure_every=2, checkpoint_every=2, gradient_checkpointing=bool(lora))
    run = train_sdtt.main(cfg)
    pristine = AutoModelForMaskedLM.from_pretrained(world / name).state_dict()
    base = {k.replace(".base_layer", ""): v for k, v in run.model.module.state_dict().items() if "lora_" not in k}
    assert all(torch.equal(base[k], v) for k, v in pristine.items())                                    # the frozen base kept its bits
    out, student = tmp_path / "run", tmp_path / "run" / "student"
    assert "student 2 steps" in (out / "samples/step-0000004.txt").read_text() and lint(student) == []
    rows = json.loads((out / "measured.json").read_text())["measured"]
    assert {(r["who"], r["steps"]) for r in rows} == {("data", None), *(("teacher", k) for k in (1, 2, 4, 8, 16)), *(("student", k) for k in (1, 2, 4, 8))}
    assert all(r["calls"] == (r["steps"] or 0) and {"ngram_js", "bits_per_token", "entropy", "distinct", "known_words"} <= r.keys() for r in rows)
    stock, z = AutoModelForMaskedLM.from_pretrained(student).eval(), run.model.process.prior(2, 16)
    z[:, :5] = 7
    mine = run.watcher.net(z, torch.ones(2), {})
    assert torch.allclose(subs(stock(input_ids=z).logits, z, AutoTokenizer.from_pretrained(student).mask_token_id), mine, atol=1e-4)
    pipe = zoo.load(student)
    assert pipe.contract.sampler == "unmask" and pipe.contract.steps == [2, 4, 8]
    if not lora:                                                                                        # merging LoRA rounds
        for k in pipe.contract.steps:
            x = pipe(num_inference_steps=k, num_samples=run.watcher.n, generator=torch.Generator().manual_seed(2026)).tokens
            assert torch.equal(x, run.watcher.sample(k, run.watcher.n))
    begun = pipe("the lord", num_samples=3)
    assert len(begun.texts) == 3 and all(text.startswith("the lord") and len(text) == 16 for text in begun.texts)
    with pytest.warns(UserWarning, match="trained for 2, 4, 8 steps, not 3"):
        pipe(num_inference_steps=3)
    again = train_sdtt.main(dataclasses.replace(cfg, steps=1, output_dir=str(tmp_path / "again"), init_student=str(student)))
    assert json.loads((tmp_path / "again/student/fewstep.json").read_text())["student"]["chain"] and again.step == 1


def test_toy_life(tmp_path, capsys):
    import zoo
    from zoo import cli
    run = run_toy(tmp_path / "run", steps=3, round_steps=1)
    pipe = zoo.load(tmp_path / "run/student")
    x = pipe(num_inference_steps=4, num_samples=2048, generator=torch.Generator().manual_seed(2026)).tokens
    assert torch.equal(x, run.watcher.sample(4, 2048)) and lint(tmp_path / "run/student") == []
    cli.main(["sample", str(tmp_path / "run/student"), "ab", "--steps", "2", "--seeds", "3"])
    printed = capsys.readouterr().out.split()
    assert len(printed) == 3 and all(len(w) == 5 and w.startswith("ab") for w in printed)


def test_checkpointed_gradients_equal_plain_ones(world):
    grads = {}
    for checkpointing in (False, True):
        model = text.load(str(world / "modern"), str(world / "text.txt"))
        net = model.make("student", gradient_checkpointing=checkpointing)
        z = model.process.prior(2, 16)
        net(z, torch.ones(2), {}).clamp(min=-20).square().mean().backward()
        grads[checkpointing] = [p.grad for p in net.trainable().values()]
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(grads[False], grads[True])) and max(g.abs().max() for g in grads[True]) > 0


def test_mistakes_are_one_line(world, tmp_path):
    main = lambda **changes: train_sdtt.main(config(world, tmp_path / "run", **changes))
    for changes, said in ((dict(guidance=2.0), "unconditional"), (dict(last=3), "--first 8 does not come down"), (dict(substeps=1), "does not come down"),
                          (dict(teacher="emoji"), "unknown text teacher"), (dict(length=17), "reads at most 16"), (dict(data=""), "give --data FILE.txt"),
                          (dict(data="no.txt"), "does not exist"), (dict(data="x.csv"), "no text at"), (dict(teacher="toy"), "leave --data")):
        with pytest.raises(UserError, match=said):
            main(**changes)
    with pytest.raises(UserError, match="a table"):
        main(teacher="toy", data="", lora=4)


def test_the_embedded_teacher_reads_held_out_text():
    """Its bound on 64 windows of the held-out books, in bits per character; letter frequencies alone give 4.1."""
    model = text.load("text")
    ids = torch.tensor(model.encode(texts.read("text:heldout")[: 64 * 64])).reshape(64, 64)
    t, u = (torch.arange(64) + 0.5) / 64, uniform(torch.Generator().manual_seed(0))(64, 64)
    with torch.no_grad():
        assert make_text_teacher.bound(model.module, ids, t, u).item() / math.log(2) < 3.0
