"""The step of a difference in time: chosen by how fast the teacher changes, in full precision."""
from types import SimpleNamespace

import pytest
import torch

from zoo import backbones, calculus
from zoo.calculus import FINE, STIFF, full_precision, stiffness, time_step
from zoo.process import RectifiedFlow, TrigFlow, view


class Rippled:
    """The toy's exact denoiser, and a ripple of the embedding's highest frequency on it; `bits`: rounded as a network kept in few bits is."""

    def __init__(self, size=0.0, bits=None):
        self.net = backbones.load("toy").teacher
        self.process, self.size, self.bits = self.net.process, size, bits

    def __call__(self, x, t, cond, *, r=None, to="x0", logits=False):
        x0 = self.net(x, t, cond) + self.size * torch.sin(1000 * t)[:, None]
        return self.process.convert(x0.to(self.bits).float() if self.bits else x0, x, t, "x0", to)


def ratio(net, flow=TrigFlow(), n=4):
    toy = backbones.load("toy")
    return stiffness(view(net, flow), flow, toy.examples(n).cond, toy.shape, coarse=1e-2)


def test_a_smooth_teacher_is_not_stiff_and_ripples_make_it_so():
    assert abs(ratio(Rippled()) - 1) < 0.01 and abs(ratio(Rippled(), RectifiedFlow()) - 1) < 0.05
    assert ratio(Rippled(0.01)) > STIFF and ratio(Rippled(0.01), RectifiedFlow()) > STIFF
    assert ratio(Rippled(1e-5)) < 1.1                                  # a ripple that is there, and small
    assert ratio(Rippled(0.01)) == ratio(Rippled(0.01))
    assert ratio(Rippled(bits=torch.bfloat16), n=500) > STIFF                 # differences over 2e-4 of rounded values are noise


def test_the_step_follows_the_teacher(tmp_path, capsys):
    run = lambda net, **cfg: SimpleNamespace(model=SimpleNamespace(teacher=net, examples=backbones.load("toy").examples, shape=(2,)), rank=0,
                                             cfg=SimpleNamespace(**{"dry_run": False, **cfg}))
    flow = TrigFlow()
    assert time_step(run(Rippled()), flow, 0.0, 1e-2) == FINE and "step 0.0002" in capsys.readouterr().err
    assert time_step(run(Rippled()), flow, 0.0, 1e-2, fine=1e-4) == 1e-4
    assert time_step(run(Rippled(0.01)), flow, 0.0, 1e-2) == 1e-2 and "step 0.01 (" in capsys.readouterr().err
    assert time_step(run(None), flow, 3e-3, 1e-2) == 3e-3              # given: nothing is measured
    assert time_step(run(None, dry_run=True), flow, 0.0, 1e-2) == 0.0


def test_full_precision_gives_back_what_it_found():
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [s.allow_tf32 for s in settings]
    try:
        for s in settings:
            s.allow_tf32 = True
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(KeyError), full_precision("cpu"):
            assert not any(s.allow_tf32 for s in settings) and not torch.is_autocast_enabled("cpu")
            raise KeyError
        assert all(s.allow_tf32 for s in settings)
    finally:
        for s, value in zip(settings, before):
            s.allow_tf32 = value


@pytest.mark.parametrize("how", ["jvp", "fd"])
def test_derivatives_of_a_network_on_its_fine_step(how):
    """The fine step is as good as forward mode in float32 where the ripple is of the embedding's highest frequency."""
    net, flow = Rippled(0.01), TrigFlow()
    seen, toy = view(net, flow), backbones.load("toy")
    cond, g = toy.examples(16).cond, torch.Generator().manual_seed(0)
    x, t = torch.randn(16, 2, generator=g), 0.2 + torch.rand(16, generator=g)
    fn = lambda x, t: seen(x, t, cond, to="velocity")
    exact = calculus.total_derivative(fn, (x, t), (x, torch.ones_like(t)), "jvp")[1]
    value = calculus.total_derivative(fn, (x, t), (x, torch.ones_like(t)), how, FINE)[1]
    assert (value - exact).norm() < 0.02 * exact.norm()
    if how == "fd":
        coarse = calculus.total_derivative(fn, (x, t), (x, torch.ones_like(t)), how, 1e-2)[1]
        assert (coarse - exact).norm() > 0.3 * exact.norm()


@pytest.mark.parametrize("kernel", ["_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
                                    "_scaled_dot_product_attention_math"])
def test_plain_attention_alone_has_a_forward_mode(kernel):
    """Why `total_derivative` forces it, on a GPU too: torch's fused kernels refuse before a device is asked. One that has learnt it is worth
    measuring (benchmarks/training_step/README.md says it is not there)."""
    from torch.autograd import forward_ad
    attend, draw = getattr(torch.ops.aten, kernel), lambda: torch.empty(1, 2, 16, 32, device="meta", dtype=torch.float16)
    more = () if kernel.endswith(("flash_attention", "math")) else (None, False)              # bias, statistics for a backward pass
    with forward_ad.dual_level():
        call = lambda: forward_ad.unpack_dual(attend(forward_ad.make_dual(draw(), draw()), draw(), draw(), *more)[0]).tangent
        if kernel.endswith("math"):
            assert call() is not None
        else:
            with pytest.raises(NotImplementedError, match="forward AD"):
                call()
