"""The scripts that made what ships: each says what it is for, and those that train do, at their smallest, and go on where they stopped."""
import gzip
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "train_scripts").glob("make_*.py"))
MOMENT = 1e-6        # minutes: one step, since time is looked at between steps

pytestmark = pytest.mark.slow
sys.path.insert(0, str(ROOT / "train_scripts"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """Forty rows of the shipped set, held-out ones among them."""
    from datasets import concatenate_datasets, load_dataset
    table = load_dataset("parquet", data_files=str(ROOT / "zoo/assets/emoji/emoji.parquet"), split="train")
    split = np.array(table["split"][:])
    path = tmp_path_factory.mktemp("emoji") / "emoji.parquet"
    concatenate_datasets([table.select(np.flatnonzero(split == s)[:n]) for s, n in (("train", 32), ("heldout", 8))]).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """A folder of idx files: 256 training images and 20 others, of noise."""
    folder = tmp_path_factory.mktemp("fashion")
    g = np.random.default_rng(0)
    for name, n in (("train", 256), ("t10k", 20)):
        head = lambda *shape: bytes([0, 0, 8, len(shape)]) + b"".join(k.to_bytes(4, "big") for k in shape)
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head(n, 28, 28) + g.integers(0, 255, n * 784, dtype=np.uint8).tobytes()))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head(n) + (np.arange(n) % 10).astype(np.uint8).tobytes()))
    return folder


def test_autoencoder_and_emoji_teacher(emoji, tmp_path):
    import make_autoencoder
    import make_teacher
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    vae, log = tmp_path / "vae", tmp_path / "log.jsonl"
    make_autoencoder.main(make_autoencoder.Config(data=emoji, out=vae, log=log, minutes=MOMENT, decoder_minutes=MOMENT, batch=4))
    done = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["phase"] for r in done] == ["joint done", "decoder done"]
    assert all(r["latent_cov_error"] < 1 for r in done)                     # whitened on 32 of the 40 pictures it is measured on
    assert AutoencoderKL.from_pretrained(vae).config.scaling_factor == 1.0
    cfg = make_teacher.Config(data=emoji, vae=vae, out=tmp_path / "teacher", checkpoint=tmp_path / "state.safetensors", log=log, minutes=MOMENT, batch=4)
    step = lambda: int(safe_open(cfg.checkpoint, "pt").metadata()["step"])
    make_teacher.main(cfg)
    assert step() == 1
    seconds = float(safe_open(cfg.checkpoint, "pt").metadata()["seconds"])
    cfg.minutes = seconds / 60 + MOMENT
    make_teacher.main(cfg)
    assert step() == 2
    pipe = StableDiffusionPipeline.from_pretrained(cfg.out, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(pipe("noto red heart", num_inference_steps=1, guidance_scale=1.0, output_type="np").images).all()


def test_fashion_teacher_and_classifier(fashion, tmp_path, capsys):
    import make_classifier
    import make_fashion
    from diffusers import ConsistencyModelPipeline
    cfg = make_fashion.Config(data=str(fashion), out=str(tmp_path / "teacher"), run=str(tmp_path / "run"), log=str(tmp_path / "log.jsonl"),
                              minutes=0.003, batch=4, width=8)
    make_fashion.main(cfg)
    state = lambda: load_file(tmp_path / "run" / "state.safetensors")
    first = state()["step"].item()
    cfg.minutes = 2 * cfg.minutes + state()["seconds"].item() / 60
    make_fashion.main(cfg)
    assert 0 < first < state()["step"].item()
    pipe = ConsistencyModelPipeline.from_pretrained(cfg.out)
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(pipe(class_labels=3, num_inference_steps=1, output_type="np").images).all()
    make_classifier.main(make_classifier.Config(data=str(fashion), out=tmp_path / "classifier.safetensors", epochs=1, batch=128))
    assert "test accuracy" in capsys.readouterr().out and load_file(tmp_path / "classifier.safetensors")


def test_text_teacher(tmp_path):
    import make_text_teacher
    from transformers import AutoModelForMaskedLM
    cfg = make_text_teacher.Config(out=str(tmp_path / "teacher"), run=str(tmp_path / "run"), log=str(tmp_path / "log.jsonl"), minutes=1.0, stop=0.003,
                                   batch=4, width=32, layers=1)
    steps = []
    for _ in range(2):
        make_text_teacher.main(cfg)
        steps.append(load_file(tmp_path / "run" / "state.safetensors")["step"].item())
    assert 0 < steps[0] < steps[1]
    assert AutoModelForMaskedLM.from_pretrained(cfg.out)(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize("toy", [True, False])
def test_video_teacher(tmp_path, toy):
    import make_video_teacher
    cfg = make_video_teacher.Config(out=tmp_path / "teacher", run=tmp_path / "run", minutes=MOMENT, toy=toy, frames=4, size=16, side=6, layers=1, batch=2)
    step = lambda: int(safe_open(cfg.run / "state.safetensors", "pt").metadata()["step"])
    make_video_teacher.main(cfg)
    assert step() == 1 and (cfg.out / "model_index.json").exists()
    cfg.minutes = float(safe_open(cfg.run / "state.safetensors", "pt").metadata()["seconds"]) / 60 + MOMENT
    make_video_teacher.main(cfg)
    assert step() == 2


def test_avatars_without_node_says_what_to_do(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["make_avatars.py"])
    with pytest.raises(SystemExit, match="^error: node and npm not found: install Node.js"):
        runpy.run_path(str(ROOT / "train_scripts" / "make_avatars.py"), run_name="__main__")
