"""Measurement against closed forms, known labels and planted differences."""

import math
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zoo import metrics
from zoo.errors import UserError
from zoo.metrics import efflite0, network

needs_efflite0 = pytest.mark.skipif(not efflite0.available(), reason="needs fewstep[metrics]")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- kernel distance ------------------------------------------------------------------------------------


def moments(mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    second = torch.outer(mean, mean) + cov
    mixed = torch.einsum("i,jk->ijk", mean, cov)
    mixed = mixed + mixed.permute(1, 0, 2) + mixed.permute(1, 2, 0)
    third = torch.einsum("i,j,k->ijk", mean, mean, mean) + mixed
    return mean, second, third


def mean_kernel(p, q) -> float:
    """E (x . y / d + 1)^3 of independent Gaussians x, y: the binomial sum of inner products of their
    moments."""
    d = len(p[0])
    return 1 + sum(c * (a * b).sum().item() / d**k for c, k, a, b in zip((3, 3, 1), (1, 2, 3), p, q))


def gaussians(d: int = 3):
    root = torch.randn(d, d, dtype=torch.float64, generator=generator(3)) * 0.4
    mx, my = torch.full((d,), 0.6, dtype=torch.float64), torch.full((d,), 0.2, dtype=torch.float64)
    cov = root @ root.T + 0.3 * torch.eye(d, dtype=torch.float64)
    p, q = moments(mx, cov), moments(my, 0.5 * torch.eye(d, dtype=torch.float64))
    exact = 1e3 * (mean_kernel(p, p) + mean_kernel(q, q) - 2 * mean_kernel(p, q))
    chol = torch.linalg.cholesky(cov)

    def draw(n, m, seed):
        g = generator(seed)
        return (mx + torch.randn(n, d, dtype=torch.float64, generator=g) @ chol.T,
                my + torch.randn(m, d, dtype=torch.float64, generator=g) * 0.5**0.5)

    return exact, draw


def test_kid_is_unbiased_and_its_interval_covers():
    exact, draw = gaussians()
    results = [metrics.kid(*draw(60, 40, seed)) for seed in range(300)]
    values = torch.tensor([r.value for r in results])
    error = values.std().item() / len(values) ** 0.5
    assert abs(values.mean().item() - exact) < 3.5 * error
    assert error < 0.05 * exact                                # so the biased estimate (below) would be seen
    covered = sum(r.low <= exact <= r.high for r in results) / len(results)
    assert 0.87 < covered < 0.99


def test_kid_of_equal_distributions_is_centred_on_zero():
    _, draw = gaussians()
    pairs = [(draw(50, 3, i)[0], draw(50, 3, 1000 + i)[0]) for i in range(200)]
    values = torch.tensor([metrics.kid(x, y).value for x, y in pairs])
    assert abs(values.mean()) < 3.5 * values.std() / 200**0.5
    assert (values < 0).any()


def test_kid_matches_the_written_out_sum_and_the_jackknife_loop():
    _, draw = gaussians()
    x, y = draw(7, 5, 0)

    def plain(x, y):
        def k(a, b):
            return (a @ b.T / a.shape[1] + 1) ** 3
        off = [(k(a, a).sum() - k(a, a).diagonal().sum()) / (len(a) * (len(a) - 1)) for a in (x, y)]
        return 1e3 * (off[0] + off[1] - 2 * k(x, y).mean()).item()

    def without(a, i):
        return torch.cat([a[:i], a[i + 1:]])

    left_x = torch.tensor([plain(without(x, i), y) for i in range(7)], dtype=torch.float64)
    left_y = torch.tensor([plain(x, without(y, i)) for i in range(5)], dtype=torch.float64)
    error = (6 * left_x.var(unbiased=False) + 4 * left_y.var(unbiased=False)).sqrt().item()
    result = metrics.kid(x, y)
    assert result.value == pytest.approx(plain(x, y), rel=1e-9)
    assert result.high - result.value == pytest.approx(1.96 * error, rel=1e-9)


def test_kid_ignores_order_blocks_and_rotation():
    _, draw = gaussians()
    x, y = draw(1500, 1100, 0)
    value = metrics.kid(x, y)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator(1)))[0]
    assert metrics.kid(x.flip(0), y.flip(0)) == pytest.approx(value, rel=1e-9)
    assert metrics.kid(x @ turn, y @ turn) == pytest.approx(value, rel=1e-9)
    assert metrics.kid(y, x) == pytest.approx(value, rel=1e-9)
    assert metrics.kid(x.float(), y.float()).value == pytest.approx(value.value, rel=1e-3)


def test_kid_says_what_is_wrong():
    with pytest.raises(UserError, match="at least 3"):
        metrics.kid(torch.rand(2, 4), torch.rand(9, 4))
    with pytest.raises(UserError, match="different spaces"):
        metrics.kid(torch.rand(5, 4), torch.rand(5, 3))


# -- feature spaces -------------------------------------------------------------------------------------


def pictures(n: int = 24, seed: int = 0, size: int = 32) -> Tensor:
    """Coloured discs on white: something with edges."""
    g = generator(seed)
    at = torch.linspace(-1, 1, size)
    centre, radius = torch.rand(n, 2, generator=g) - 0.5, 0.3 + 0.3 * torch.rand(n, 1, 1, generator=g)
    down, across = at[None, :, None] - centre[:, :1, None], at[None, None] - centre[:, 1:, None]
    disc = (down**2 + across**2).sqrt() < radius
    colour = 2 * torch.rand(n, 3, 1, 1, generator=g) - 1
    return torch.where(disc[:, None], colour, torch.ones(()))


def blur(x: Tensor, k: int) -> Tensor:
    return torch.nn.functional.avg_pool2d(x, k, 1, k // 2, count_include_pad=False)


@pytest.mark.parametrize("name", [pytest.param("efflite0", marks=needs_efflite0), "pixels"])
def test_a_feature_space_orders_damage(name):
    space = metrics.feature_space(name)
    real = space(pictures(seed=0))
    other = pictures(seed=1)
    noise = 0.3 * torch.randn(other.shape, generator=generator(2))
    clean, slight, strong, grain = (metrics.kid(space(x), real).value
                                    for x in (other, blur(other, 5), blur(other, 15), other + noise))
    assert clean < slight < strong
    assert clean < grain


@pytest.mark.parametrize("name", [pytest.param("efflite0", marks=needs_efflite0), "pixels"])
def test_features_do_not_depend_on_the_batch_and_repeat_grey(name):
    space = metrics.feature_space(name)
    x = pictures(5)
    assert torch.allclose(space(x)[3:4], space(x[3:4]), atol=1e-4)
    grey = x.mean(1, keepdim=True)
    assert torch.equal(space(grey), space(grey.repeat(1, 3, 1, 1)))
    assert not space(x).requires_grad


def test_pixels_has_the_stated_size_on_any_image():
    assert metrics.pixels(pictures(2)).shape == (2, 391)
    assert metrics.pixels(torch.zeros(2, 1, 28, 28)).shape == (2, 391)


def test_default_space_follows_the_extra():
    assert metrics.default_feature_space(True) == "efflite0"
    assert metrics.default_feature_space(False) == "pixels"


def test_unknown_space_and_missing_package(monkeypatch):
    with pytest.raises(UserError, match="unknown feature space 'inception'"):
        metrics.feature_space("inception")
    monkeypatch.setattr(efflite0, "PACKAGE", "no_such_package")
    efflite0.load.cache_clear()
    with pytest.raises(UserError, match=r"pip install fewstep\[metrics\]"):
        metrics.feature_space("efflite0")
    assert metrics.default_feature_space() == "pixels"


@needs_efflite0
def test_efflite0_recognises_a_photograph():
    matplotlib = pytest.importorskip("matplotlib")
    from PIL import Image

    path = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
    pixels = torch.frombuffer(bytearray(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8)
    photo = pixels.view(1, 600, 512, 3).permute(0, 3, 1, 2) / 127.5 - 1
    logits = efflite0.load()(efflite0.prepare(photo, 224))
    assert logits.argmax().item() == 652                       # ImageNet: military uniform
    assert logits.softmax(1).max() > 0.3


def test_efflite0_input_scaling():
    ends = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    assert efflite0.prepare(ends, 4)[:, :, 0, 0].tolist() == [[-127 / 128] * 3, [1.0] * 3]


@needs_efflite0
def test_same_padding_puts_the_odd_pixel_right_and_below():
    conv = efflite0.SameConv2d(1, 1, 3, stride=2)
    torch.nn.init.ones_(conv.weight)
    picture = torch.arange(16.0).view(1, 1, 4, 4)
    assert conv(picture).flatten().tolist() == [45.0, 39.0, 66.0, 50.0]


@needs_efflite0
def test_perceptual_grows_with_damage_and_has_a_gradient():
    x = pictures(4)
    assert metrics.perceptual(x, x).abs().max() == 0
    slight, strong = metrics.perceptual(x, blur(x, 3)), metrics.perceptual(x, blur(x, 15))
    assert slight.shape == (4,) and (slight > 0).all() and (slight < strong).all()
    y = blur(x, 3).requires_grad_()
    metrics.perceptual(x, y).sum().backward()
    assert y.grad.norm() > 0


def test_perceptual_is_lpips_where_package_and_weights_are_installed(tmp_path, monkeypatch):
    """A stand-in for the package: it is used only beside its weights' file, and nothing else is asked for."""
    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "vgg"
            self.weight = torch.nn.Parameter(torch.tensor(7.0))

        def forward(self, x, y):
            assert x.shape == (2, 3, 96, 96) and not self.weight.requires_grad
            return self.weight * (x - y).square().mean((1, 2, 3), keepdim=True)
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metrics.lpips_network.cache_clear()
    try:
        assert metrics.perceptual_name() == "perceptual_efflite0"                  # no weights: nothing is downloaded
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "vgg16-397923af.pth").touch()
        metrics.lpips_network.cache_clear()
        assert metrics.perceptual_name() == "lpips_vgg"
        x, y = torch.zeros(2, 1, 28, 28), torch.full((2, 1, 28, 28), 0.5).requires_grad_()
        found = metrics.perceptual(x, y)
        assert torch.allclose(found, torch.full((2,), 7 * 0.25)) and torch.autograd.grad(found.sum(), y)[0].norm() > 0
        monkeypatch.setitem(sys.modules, "lpips", None)                            # weights without the package
        metrics.lpips_network.cache_clear()
        assert metrics.perceptual_name() == "perceptual_efflite0"
    finally:
        metrics.lpips_network.cache_clear()


# -- retrieval, labels, diversity, time -----------------------------------------------------------------


def test_retrieval_counts_ranks():
    data = torch.randn(40, 16, generator=generator())
    target = torch.arange(40)
    assert metrics.retrieval(data, data, target) == {"retrieval@1": 1.0, "retrieval@5": 1.0}
    shifted = metrics.retrieval(data, data, (target + 1) % 40)
    assert shifted["retrieval@1"] == 0 and shifted["retrieval@5"] < 0.5
    about_the_mean = 3 * data - 2 * data.mean(0)
    assert metrics.retrieval(about_the_mean, data, target)["retrieval@1"] == 1
    assert metrics.retrieval(data + 100, data + 100, target)["retrieval@1"] == 1    # and an offset


def test_retrieval_gives_a_collapsed_sampler_no_credit():
    data = torch.randn(40, 16, generator=generator())
    collapsed = data.mean(0).repeat(40, 1)
    assert metrics.retrieval(collapsed, data, torch.arange(40))["retrieval@5"] < 0.5
    twins = torch.cat([data, data])                            # exact duplicates in the data cost nothing
    assert metrics.retrieval(data, twins, torch.arange(40))["retrieval@1"] == 1


def test_nearest_label():
    data = torch.randn(30, 8, generator=generator())
    styles = ["noto", "fluent", "twemoji"] * 10
    noisy = data + 0.05 * torch.randn(30, 8, generator=generator(1))
    assert metrics.nearest(noisy, data).tolist() == list(range(30))
    assert metrics.nearest_label_accuracy(noisy, data, styles, styles) == 1
    assert metrics.nearest_label_accuracy(noisy, data, styles, styles[1:] + styles[:1]) == 0


def test_diversity_of_gaussian_seeds():
    centre = torch.randn(6, 1, 3, 16, 16, generator=generator())
    noise = torch.randn(6, 8, 3, 16, 16, generator=generator(1))
    assert metrics.diversity(centre + 0.2 * noise) == pytest.approx(0.2 * math.sqrt(2), rel=0.02)
    assert metrics.diversity(centre.repeat(1, 8, 1, 1, 1)) < 1e-3      # between prompts does not count
    with pytest.raises(UserError, match="seeds"):
        metrics.diversity(noise[:, :1])


def test_wall_time_counts_images_and_skips_the_first_call():
    calls = []

    def fn():
        calls.append(0)
        time.sleep(0.2 if len(calls) == 1 else 0.02)

    assert 0.0019 < metrics.wall_time_per_image(fn, 10, repeats=3) < 0.01
    assert len(calls) == 4


def test_class_accuracy_on_the_shipped_test_images():
    classifier = pytest.importorskip("zoo.metrics.classifier")
    if not classifier.WEIGHTS.exists():
        pytest.skip("the classifier is not built")
    from zoo.data.fashion_mnist import arrays

    images, labels = (torch.from_numpy(a[:300].copy()) for a in arrays("test"))
    x = torch.nn.functional.pad(images[:, None] / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    assert metrics.class_accuracy(x, labels.long()) > 0.8
    assert metrics.class_accuracy(x, (labels.long() + 1) % 10) < 0.1
    space = metrics.feature_space("fashionnet")
    real, blurred, rest = space(x[:150]), space(blur(x[:150], 5)), space(x[150:])
    assert metrics.kid(real, rest).value < metrics.kid(blurred, rest).value


# -- the optional network metrics -----------------------------------------------------------------------


@pytest.mark.parametrize("package, call", [
    ("torch_fidelity", lambda x: network.network_metrics(x, reference=x)),
    ("torchmetrics", lambda x: network.network_metrics(x, prompts=["a disc"] * len(x))),
])
def test_a_missing_package_is_named(monkeypatch, package, call):
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package.replace('_', '-')}"):
        call(pictures(3))


def test_a_failed_download_is_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("name resolution failed\nand a page of advice")

    monkeypatch.setattr(network, "fid", offline)
    with pytest.raises(UserError, match="fid could not fetch its network") as error:
        network.network_metrics(pictures(3), reference=pictures(3))
    assert "\n" not in str(error.value)


def test_fid_goes_through_torch_fidelity_with_a_stub_extractor():
    torch_fidelity = pytest.importorskip("torch_fidelity")

    class Mean(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("mean",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "mean"

        def forward(self, images):
            assert images.dtype == torch.uint8
            return (images.double().mean((2, 3)),)

    torch_fidelity.register_feature_extractor("mean-colour", Mean)
    x, y = pictures(64, 0), 0.5 * pictures(64, 1)
    fx, fy = (network.as_uint8(v).double().mean((2, 3)) for v in (x, y))
    cx, cy = fx.T.cov(), fy.T.cov()
    expected = (fx.mean(0) - fy.mean(0)).square().sum() + (cx + cy).trace() \
        - 2 * torch.linalg.eigvals(cx @ cy).sqrt().real.sum()
    assert network.fid(x, y, feature_extractor="mean-colour") == pytest.approx(expected.item(), rel=1e-6)


def test_uint8_is_what_a_png_would_hold():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5)
    assert network.as_uint8(x)[0, 2, 0].tolist() == [0, 0, 128, 255, 255]
