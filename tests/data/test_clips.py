"""Clips: frames of animated pictures and films, too short ones, and the latents that video families make of them."""
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "backbones")]
import tiny_b  # noqa: E402

from zoo import backbones, data  # noqa: E402
from zoo.data import clips  # noqa: E402
from zoo.data.cache import Storage  # noqa: E402
from zoo.errors import UserError  # noqa: E402


def animation(n, size=(24, 16), kind="webp", milliseconds=100) -> bytes:
    """n frames (W, H), frame i of grey 20 i."""
    frames = [Image.new("RGB", size, (20 * i,) * 3) for i in range(n)]
    out = io.BytesIO()
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(out, {"apng": "png"}.get(kind, kind), save_all=True, append_images=frames[1:], duration=milliseconds, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["webp", "gif", "apng"])
def test_frames_come_in_order_and_cover_the_size(kind):
    clip = clips.decode(animation(6, kind=kind), 4, (8, 8))
    assert clip.shape == (3, 4, 8, 8) and clip.dtype == torch.uint8
    assert [clip[0, i, 4, 4].item() for i in range(4)] == [0, 20, 40, 60]
    wide = clips.decode(animation(3, size=(48, 16), kind=kind), 3, (16, 16))
    assert wide.shape == (3, 3, 16, 16) and (wide[:, 2] == 40).all()               # scaled to cover, cropped: nothing added


def test_a_rate_thins_the_frames():
    raw = animation(10, milliseconds=100)                                          # ten a second
    assert [int(v) // 20 for v in clips.decode(raw, 5, (8, 8), fps=5)[0, :, 0, 0]] == [0, 2, 4, 6, 8]
    assert [int(v) // 20 for v in clips.decode(raw, 10, (8, 8), fps=10)[0, :, 0, 0]] == list(range(10))
    with pytest.raises(clips.TooShort, match="10 frames, 5 at 5 a second; 6 are needed"):
        clips.decode(raw, 6, (8, 8), fps=5)
    with pytest.raises(clips.TooShort, match="3 frames; 4 are needed"):
        clips.decode(animation(3), 4, (8, 8))


def test_films_are_read_by_pyav_or_its_absence_is_said(monkeypatch, tmp_path):
    try:
        import av
    except ImportError:
        with pytest.raises(UserError, match=r"pip install fewstep\[video\]"):
            clips.decode(b"\x00\x00\x00\x20ftypisom", 4, (8, 8))
        pytest.skip("PyAV is not installed")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(8):
            picture = np.full((48, 64, 3), 25 * i, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                film.mux(packet)
        for packet in stream.encode():
            film.mux(packet)
    got = clips.decode(path.read_bytes(), 8, (16, 16))
    assert got.shape == (3, 8, 16, 16) and (got[0, :, 8, 8].int() - 25 * torch.arange(8)).abs().max() < 8
    thin = clips.decode(path.read_bytes(), 4, (16, 16), fps=5)
    assert (thin[0, :, 8, 8].int() - 50 * torch.arange(4)).abs().max() < 8
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install fewstep\[video\]"):
        clips.decode(path.read_bytes(), 4, (8, 8))


@pytest.mark.parametrize("family", ["wan", pytest.param("cogvideox", marks=pytest.mark.slow), pytest.param("ltx", marks=pytest.mark.slow)])
def test_video_families_train_on_latents_that_decode_to_the_clip(family, tmp_path):
    model = backbones.load(str(tiny_b.build(family, tmp_path / family)))
    model.data, model.storage = str(tmp_path / "clips"), Storage(str(tmp_path / "cache"))
    size = model.stock_size
    (tmp_path / "clips").mkdir()
    for i in range(3):
        (tmp_path / "clips" / f"{i}.webp").write_bytes(animation(size["num_frames"] + i, (size["width"], size["height"])))
        (tmp_path / "clips" / f"{i}.txt").write_text(f"a red {i}")
    got = model.batches(images=True).get(torch.tensor([2, 0]))
    assert got["x0"].shape == (2, *model.shape) and got["x0"].isfinite().all()
    pixels = torch.stack([clips.decode((tmp_path / "clips" / f"{i}.webp").read_bytes(), size["num_frames"], (size["height"], size["width"])) for i in (2, 0)])
    pixels = pixels.float().div(127.5).sub(1)
    raw, vae = {}, model.pipe.vae                  # a random autoencoder decodes nothing: what reaches it must be what it made
    decode = vae.decode
    vae.decode = lambda z, *a, **k: (raw.setdefault("z", z), decode(z, *a, **k))[1]
    model.decode_video(got["x0"][:1])
    want = vae.encode(pixels[:1]).latent_dist.mode()
    assert torch.allclose(raw["z"], want, atol=1e-4)


def test_clips_that_are_too_short_are_counted_and_named(tmp_path):
    model = backbones.load(str(tiny_b.build("wan", tmp_path / "wan")))
    (tmp_path / "clips").mkdir()
    frames, width, height = (model.stock_size[k] for k in ("num_frames", "width", "height"))
    for i in range(5):
        (tmp_path / "clips" / f"{i}.gif").write_bytes(animation(2 if i == 3 else frames, (width, height), "gif"))
        (tmp_path / "clips" / f"{i}.txt").write_text("a red cat")
    model.data = str(tmp_path / "clips")
    with pytest.raises(UserError, match=rf"1 of 5 clips .*3\.gif \(2 frames; {frames} are needed\)"):
        model.batches(images=True)
    with pytest.raises(UserError, match="holds no videos"):
        (tmp_path / "none").mkdir()
        data.open_dataset(tmp_path / "none", "video")
    model.data = f"{tmp_path}/x.jsonl?stream=yes"
    (tmp_path / "x.jsonl").write_text('{"caption": "a", "image": "b"}')
    with pytest.raises(UserError, match="clips are read from a folder"):
        model.batches(images=True)
