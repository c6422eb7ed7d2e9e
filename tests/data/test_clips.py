"""Clips: frames of animated pictures and films, too short ones, and the latents that video families make of them."""
import io
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "backbones"), str(ROOT / "train_scripts")]
import tiny_b  # noqa: E402

from zoo import backbones, data  # noqa: E402
from zoo.data import clips  # noqa: E402
from zoo.data.cache import Storage  # noqa: E402
from zoo.data.spec import parse  # noqa: E402
from zoo.data.streams import open_stream  # noqa: E402
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
    with pytest.raises(UserError, match="no column for the video: it has caption, image; name it"):
        model.batches(images=True)


# ------------------------------------------------------------------------------------------------ causal students
@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return str(tiny_b.build("wan", tmp_path_factory.mktemp("teacher") / "wan"))


def causal(wan, where, cache="", **options):
    """The tiny Wan as train_self_forcing.py opens it; `asked` collects the prompts its encoder is given."""
    model = backbones.load(wan, data=str(where)).causal()
    model.storage, model.asked = Storage(str(cache), **options), []
    conditions = model.conditions
    model.conditions = lambda prompts: (model.asked.extend(prompts), conditions(prompts))[1]
    return model


def films(root, frames=5, captions=True, size=(32, 32)):
    root.mkdir()
    for i in range(3):
        (root / f"{i}.webp").write_bytes(animation(frames + i, size))
        if captions:
            (root / f"{i}.txt").write_text(f"a red {'cat' if i else 'heart'}")
    return root


def test_causal_students_read_prompts_through_the_cache_of_the_wan_family(wan, tmp_path):
    (tmp_path / "p.txt").write_text("red heart\nblue cat\nred heart\na green tree\n")
    first = causal(wan, tmp_path / "p.txt")
    got = first.batches().get(torch.tensor([1, 3, 0]))
    assert torch.equal(got["cond"]["prompt"], torch.cat([first.encode_prompts([p]) for p in ("blue cat", "a green tree", "red heart")]))
    assert torch.equal(got["uncond"]["prompt"][0], first.encode_prompts([""])[0]) and "x0" not in got
    whole = backbones.load(wan, data=str(tmp_path / "p.txt"))                   # the family of bidirectional students fills it
    whole.storage = Storage(str(tmp_path / "cache"))
    whole.batches()
    again = causal(wan, tmp_path / "p.txt", tmp_path / "cache")
    cached = again.batches().get(torch.tensor([1, 3, 0]))
    assert again.asked == [] and again.texts.resting and torch.equal(cached["cond"]["prompt"], got["cond"]["prompt"])
    shown = again.examples(5, 2)
    assert again.asked == [] and len(shown.names) == 10 == len(shown.cond["prompt"]) == len(shown.uncond["prompt"]) and len(set(shown.names)) == 3
    with torch.no_grad():
        next(again.pipe.text_encoder.parameters()).mul_(1.01)
    again._texts = None
    with pytest.raises(UserError, match="weights: .*give another --cache"):
        again.batches()
    table = tmp_path / "p.jsonl"
    table.write_text('{"prompt": "red star"}\n{"prompt": "blue star"}\n')
    streamed = causal(wan, f"{table}?stream=yes&buffer=2")
    assert streamed.batches().get(torch.tensor([1]))["cond"]["prompt"].shape == got["cond"]["prompt"][:1].shape and streamed.asked[0] == "blue star"


def test_a_folder_of_clips_gives_its_captions_or_says_that_there_are_none(wan, tmp_path, capsys):
    model = causal(wan, films(tmp_path / "clips"))
    source = model.batches()
    assert len(source) == 3 and "prompts alone; of" in capsys.readouterr().err
    assert torch.equal(source.get(torch.tensor([0]))["cond"]["prompt"], model.encode_prompts(["a red heart"]))
    assert set(model.examples(4).names) == {"a red heart", "a red cat"}
    with pytest.raises(UserError, match="holds no prompts, since it has no column .*it has video; put a .txt file with its caption beside each video") as error:
        causal(wan, films(tmp_path / "bare", captions=False)).batches()
    assert "\n" not in str(error.value)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none holds no images or videos to read captions of: give a file of prompts"):
        causal(wan, tmp_path / "none").batches()
    empty = causal(wan, "x")
    empty.data = ""
    for ask in (empty.batches, lambda: empty.examples(1)):
        with pytest.raises(UserError, match="comes without prompts: give --data prompts.txt"):
            ask()


def test_clips_are_the_latents_of_the_wan_family_frames_first(wan, tmp_path):
    size = backbones.load(wan).stock_size
    place = films(tmp_path / "clips", size["num_frames"], size=(size["width"], size["height"]))
    model = causal(wan, place)
    assert model.stock_size == size
    bidirectional = backbones.load(wan, data=str(place))
    index = torch.tensor([2, 0])
    mine, theirs = (m.batches(images=True).get(index)["x0"] for m in (model, bidirectional))
    assert mine.shape == (2, *model.shape) and torch.equal(mine, theirs.transpose(1, 2))


def test_clips_of_a_teacher_without_autoencoder_are_its_samples(tmp_path):
    from zoo.backbones.toy_video import small_pipeline
    from zoo.data.sprites import Sprites
    sprites = Sprites(frames=4, size=8, side=4, channels=1, names=("disk", "cross"), directions=2, speeds=(("", 1.0),))
    small_pipeline(sprites, patch=4, heads=2, head_dim=12, layers=1, guidance=1.0).save_pretrained(tmp_path / "small", safe_serialization=True)
    model = backbones.load(str(tmp_path / "small"), data=str(films(tmp_path / "clips", 4, size=(8, 8))))
    model.storage = Storage(str(tmp_path / "cache"))
    for _ in range(2):                                       # read, and from the cache
        got = model.batches(images=True).get(torch.tensor([1, 0]))
        assert got["x0"].shape == (2, 4, 1, 8, 8) and torch.equal(got["x0"][0, :, 0, 3, 3], torch.arange(4.0) * 20 / 127.5 - 1)
    model.data = "sprites"
    numbers = torch.tensor([0, 5])
    assert torch.equal(model.batches(images=True).get(numbers)["x0"], sprites[numbers][0])
    model.data = str(tmp_path / "short")
    films(tmp_path / "short", 2, size=(8, 8))
    with pytest.raises(UserError, match=r"1 of 3 clips .*0\.webp \(2 frames; 4 are needed\)"):
        model.batches(images=True)


def test_shards_of_clips_give_the_items_that_a_folder_of_the_same_gives(wan, tmp_path, monkeypatch):
    """Streamed and as a whole, found by the members' extension; films are handed to their decoder as bytes."""
    size = backbones.load(wan).stock_size
    folder = films(tmp_path / "clips", size["num_frames"], size=(size["width"], size["height"]))
    raw = {p.stem: p.read_bytes() for p in sorted(folder.glob("*.webp"))}
    plain = backbones.load(wan, data=str(folder)).batches(images=True).get(torch.arange(3))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    for extension in ("webp", "mp4", "webm"):                    # what datasets takes for pictures, for films, and for bytes
        with tarfile.open(tmp_path / f"{extension}.tar", "w") as tar:
            for stem, picture in raw.items():
                for name, content in ((f"{stem}.{extension}", picture), (f"{stem}.txt", (folder / f"{stem}.txt").read_bytes())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        for how in ("", "?stream=no"):
            model = backbones.load(wan, data=f"{tmp_path}/{extension}.tar{how}")
            model.storage = Storage(notes=tmp_path / "notes")
            got = model.batches(images=True).get(torch.arange(3))
            assert torch.equal(got["x0"], plain["x0"]) and torch.equal(got["cond"]["prompt"], plain["cond"]["prompt"])
        assert model.batches().get(torch.arange(3))["cond"]["prompt"].shape == plain["cond"]["prompt"].shape
    (tmp_path / "t.csv").write_text("file,caption\n" + "".join(f"clips/{stem}.webp,{(folder / f'{stem}.txt').read_text()}\n" for stem in raw))
    got = backbones.load(wan, data=f"{tmp_path}/t.csv?stream=yes&video=file").batches(images=True).get(torch.arange(3))
    assert torch.equal(got["x0"], plain["x0"])
    assert open_stream(parse(f"{tmp_path}/webp.tar"), column="video").window == 64 and open_stream(parse(f"{tmp_path}/webp.tar"), column="").window == 1024


def test_transparency_is_white_and_films_are_held_upright(tmp_path):
    frames = [Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.new("RGBA", (8, 8), (255, 0, 0, 255))]
    out = io.BytesIO()
    frames[0].save(out, "webp", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    clip = clips.decode(out.getvalue(), 2, (8, 8))
    assert (clip[:, 0] == 255).all() and clip[:, 1, 4, 4].tolist() == [255, 0, 0]
    av = pytest.importorskip("av")
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        picture = np.zeros((32, 64, 3), np.uint8)
        picture[:, :32] = 255                                                      # white on the left, which a turn to the right brings up
        for packet in (p for frame in (*[av.VideoFrame.from_ndarray(picture, format="rgb24")] * 2, None) for p in stream.encode(frame)):
            film.mux(packet)
    raw = bytearray(path.read_bytes())
    at = raw.find(b"tkhd") + 44                                                    # the display matrix of the track: a quarter turn clockwise
    one = 1 << 16
    raw[at: at + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 32 * one, 0, 1 << 30)
    clip = clips.decode(bytes(raw), 1, (64, 32))[0, 0].float()
    assert clip[8].mean() > 200 and clip[56].mean() < 50


@pytest.mark.slow
def test_self_forcing_on_the_captions_of_clips_resumes_to_the_same_bits(wan, tmp_path, monkeypatch):
    """A Wan teacher, from --data to the student: a folder of clips, killed once, with an embedding cache and without."""
    import train_self_forcing as script
    from safetensors.torch import load_file
    from zoo.backbones.video import Video
    monkeypatch.setattr(Video, "watched", (2, 1))
    place = films(tmp_path / "clips")

    def trained(name, steps, cache=""):
        script.main(script.Config(teacher=wan, data=str(place), batch=2, steps=steps, ode_steps=1, ode_substeps=1, critic_updates=1, chunk=1, time_budget=0,
                                  checkpoint_every=1, keep_checkpoints=9, sample_every=0, measure_every=0, mixed_precision="no",
                                  output_dir=str(tmp_path / name),
                                  cache=cache and str(tmp_path / cache)))
        folder = tmp_path / name / "checkpoints" / f"step-{steps:07d}"
        return {f.name + k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    whole = trained("whole", 4)
    trained("resumed", 2, "cache")
    resumed = trained("resumed", 4, "cache")
    assert whole.keys() == resumed.keys() and len(whole) > 10 and all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert any((tmp_path / "cache").rglob("*.safetensors"))
