"""Aspect-ratio buckets: shapes, which picture goes where, batches of one shape on any number of ranks, and which networks take them."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "backbones")]
import tiny_a  # noqa: E402
import tiny_b  # noqa: E402

from zoo import backbones  # noqa: E402
from zoo.data import buckets  # noqa: E402
from zoo.data.cache import Storage  # noqa: E402
from zoo.errors import UserError  # noqa: E402

TAKES = dict.fromkeys(("sd15", "sdxl", "pixart_sigma", "sana"), tiny_a) | dict.fromkeys(("sd3", "flux", "flux2", "qwen_image", "zimage"), tiny_b)
FAST = ("sd15", "flux")


def test_shapes_have_one_area_and_ratios_up_to_two():
    found = buckets.shapes(1024, 64)
    assert found[0] == (1024, 1024) and len(found) == len(set(found))
    assert {(832, 1216), (1216, 832), (896, 1152), (768, 1344)} <= set(found)
    assert all(h % 64 == w % 64 == 0 and 0.9 * 1024**2 < h * w <= 1024**2 and 0.5 <= h / w <= 2 for h, w in found)
    assert {(w, h) for h, w in found} == set(found)


def test_a_picture_goes_where_its_ratio_is_nearest():
    among = buckets.shapes(1024, 64)
    for height, width in ((50, 50), (3000, 2000), (10, 400), (720, 1280), (1281, 720)):
        number = buckets.nearest(height, width, among)
        distance = [abs(np.log(h / w) - np.log(height / width)) for h, w in among]
        assert distance[number] == min(distance)


def test_every_global_batch_is_of_one_bucket_and_every_item_is_seen():
    bucket = torch.tensor([0] * 10 + [2] * 3 + [1] * 7)
    order = buckets.Order(bucket)
    epoch = (3 + 1 + 2) * 4                                     # batches of 4: 10 items make 3, 3 make 1, 7 make 2
    items = order(torch.arange(2 * epoch), 0, 4)
    for batch in items.split(4):
        assert len(bucket[batch].unique()) == 1
    for part in items.split(epoch):
        assert set(part.tolist()) == set(range(20))
    assert items[:epoch].tolist() != items[epoch:].tolist() and len(bucket[items[:epoch:4]].unique()) == 3
    assert torch.equal(items, torch.cat([order(torch.arange(i, i + 2), 0, 4) for i in range(0, 2 * epoch, 2)]))       # ranks and micro-batches
    assert not torch.equal(items, order(torch.arange(2 * epoch), 1, 4))


@pytest.fixture
def folder(tmp_path):
    """Nine pictures: square, wide and tall ones, one tall only by its EXIF flag."""
    made = tmp_path / "images"
    made.mkdir()
    g = np.random.default_rng(0)
    for i, (h, w) in enumerate([(40, 40)] * 3 + [(30, 60)] * 3 + [(60, 30)] * 2):
        Image.fromarray(g.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(made / f"{i}.png")
    turned = Image.fromarray(g.integers(0, 255, (30, 60, 3), dtype=np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(made / "8.jpg", exif=exif)
    for i in range(9):
        (made / f"{i}.txt").write_text(f"a red {'heart' if i % 2 else 'cat'}")
    return made


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in FAST else pytest.mark.slow) for f in TAKES])
def test_families_that_take_any_size_train_on_batches_of_each_shape(family, folder, tmp_path):
    model = backbones.load(str(TAKES[family].build(family, tmp_path / family)), data=f"{folder}?buckets=yes")
    source = model.batches(images=True)
    seen = {}
    for tick in range(12):
        index = source.order(tick * 4 + torch.arange(4), 0, 4)
        batch = source.get(index)
        shape = tuple(batch["x0"].shape)
        if shape in seen:
            continue
        seen[shape] = set(index.tolist())
        n = min(2, len(index))
        x, t = batch["x0"][:n], torch.full((n,), 0.5)
        out = model.teacher(x, t, {k: v[:n] for k, v in batch["cond"].items()}, to="x0")
        assert out.shape == x.shape and out.isfinite().all()
    side = model.shape[-1]
    sizes = {s[2:] for s in seen}
    assert (side, side) in sizes and len(sizes) == 3 and {(w, h) for h, w in sizes} == sizes
    tall = next(items for s, items in seen.items() if s[2] > s[3])
    assert tall <= {6, 7, 8}                                    # the turned photograph among them
    assert all(h * w <= side * side for h, w in sizes)


@pytest.mark.parametrize("cached", [False, True])
def test_what_stands_in_for_a_broken_picture_has_the_shape_of_its_batch(tmp_path, cached):
    model = backbones.load(str(tiny_a.build("sd15", tmp_path / "sd")))
    folder, g = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for i in range(120):                                        # the broken one is the only wide picture: no other is of its bucket
        size = (30, 60, 3) if i == 5 else (40, 40, 3) if i % 2 else (60, 30, 3)
        Image.fromarray(g.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{i:03}.jpg")
        (folder / f"{i:03}.txt").write_text(f"red heart {i}")
    broken = folder / "005.jpg"
    broken.write_bytes(broken.read_bytes()[:-400])
    model.data, model.storage = f"{folder}?buckets=yes", Storage(str(tmp_path / "cache") if cached else "")
    source, shapes, following = model.batches(images=True), [], None
    with pytest.warns(UserWarning, match=r"skipped 1 of 120 images .*005\.jpg"):
        for part in source.order(torch.arange(2 * 124), 0, 4).split(4):
            got = source.get(part)["x0"]
            shapes.append(tuple(got.shape[2:]))
            following = got[part.tolist().index(6)] if 6 in part and following is None else following
            assert 5 not in part or torch.equal(got[0], got[3])
    assert len(set(shapes)) == 3 and shapes.count(max(shapes, key=lambda s: s[1])) == 2
    assert tuple(following.shape[1:]) == min(shapes, key=lambda s: s[1])         # what stood in keeps its own shape in its own batch


def test_a_batch_draws_noise_of_its_own_shape(folder, tmp_path):
    import train_lcm
    from zoo.run import Run
    model = backbones.load(str(tiny_a.build("sd15", tmp_path / "sd")), data=f"{folder}?buckets=yes")
    run = Run(train_lcm.Config(teacher="x", batch=4, accumulate=2, mixed_precision="no", output_dir=str(tmp_path / "run")), model)
    data, shapes = model.batches(images=True), set()
    for run.tick in range(8):
        batches = list(run.micro_batches(data))
        assert len({b.x0.shape for b in batches}) == 1 and all(b.randn().shape == b.x0.shape for b in batches)
        shapes.add(tuple(batches[0].x0.shape[1:]))
    assert len(shapes) == 3


def test_families_of_one_size_and_methods_without_pictures_refuse(folder, tmp_path):
    model = backbones.load(str(tiny_a.build("sd15", tmp_path / "sd")), data=f"{folder}?buckets=yes")
    with pytest.raises(UserError, match="buckets are for pictures"):
        model.batches()
    model.any_size = False
    with pytest.raises(UserError, match="the sd family takes pictures of one size"):
        model.batches(images=True)
    for family, build in (("dit", tiny_a), ("ddpm", tiny_a)):
        other = backbones.load(str(build.build(family, tmp_path / family)), data=f"{folder}?buckets=yes")
        with pytest.raises(UserError, match="one size: drop .buckets=yes"):
            other.batches(images=True)
    video = backbones.load(str(tiny_b.build("wan", tmp_path / "wan")), data=f"{folder}?buckets=yes")
    with pytest.raises(UserError, match="wan family takes"):
        video.batches(images=True)
    model.any_size, model.storage = True, Storage()
    model.data = f"{folder}?buckets=yes&stream=yes"
    with pytest.raises(UserError):
        model.batches(images=True)
