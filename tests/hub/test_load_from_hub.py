"""`zoo.load` over the wire: every shipped student, a LoRA of a stranger on a stranger's base model, and what is said when it cannot be had.
Fresh processes with empty caches and the real client; nothing of the Hub is stood in for but the Hub."""
from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import tiny
import zoo
from clients import environment
from loopback import Loopback
from zoo import registry
from zoo.hub import model_cards
from zoo.hub.record import read_record

# Opens a name, after registering what is given of a community row under it, and keeps the picture of the plainest call.
OPEN = """
import json, sys
from dataclasses import replace
import numpy as np
import torch
import zoo
from zoo import registry
from zoo.errors import UserError
out, name, what, changes, options = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:6])
if changes:
    registry.STUDENTS = (replace(registry.student(name), **changes),)
try:
    pipe = zoo.load(name, **options)
except UserError as error:
    print("refused:", error)
else:
    pipe.set_progress_bar_config(disable=True)
    np.save(out, pipe(**what, generator=torch.Generator().manual_seed(0), output_type="np").images)
"""


def opened(hub, home: Path, name: str, what: dict, changes: dict | None = None, options: dict | None = None, token="hf_reader", **more):
    """The picture drawn by a fresh process, or the words with which it was refused."""
    home.mkdir(exist_ok=True)
    out = home / "out.npy"
    out.unlink(missing_ok=True)
    arguments = [str(out), name, *(json.dumps(x or {}) for x in (what, changes, options))]
    done = subprocess.run([sys.executable, "-c", OPEN, *arguments], env=environment(hub, home, token, **more), cwd=home,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert token not in done.stdout + done.stderr
    return np.load(out) if out.exists() else done.stdout


def sent(hub, repo: str, folder: Path) -> None:
    """A repository whose files were put there by its owner."""
    hub.make(f"models/{repo}")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            hub.write(f"models/{repo}", path.relative_to(folder).as_posix(), path.read_bytes(), repo.split("/")[0])


@pytest.mark.slow
@pytest.mark.parametrize("shipped", [pytest.param(p, id=p.name) for p in model_cards.folders()])
def test_a_shipped_student_by_its_hub_id(shipped, tmp_path):
    """Pushed, then `zoo.load("me/shipped")(what)` elsewhere: the picture the folder itself gives here; and again without a network."""
    contract, record = read_record(shipped)
    if not (shipped / "model_index.json").exists() or contract.sampler == "causal":
        pytest.skip("no pipeline of pictures")
    what = {"class_labels": [3]} if record["family"] == "pixel" else {"prompt": "fluent red heart"}
    pipe = zoo.load(shipped)
    pipe.set_progress_bar_config(disable=True)
    ours = pipe(**what, generator=torch.Generator().manual_seed(0), output_type="np").images
    with Loopback() as hub:
        (tmp_path / "push").mkdir()
        script = "import sys; from zoo.hub.publish import push; push(sys.argv[1], 'me/shipped', sample=False)"
        subprocess.run([sys.executable, "-c", script, str(shipped)], env=environment(hub, tmp_path / "push"), check=True, timeout=300)
        theirs = opened(hub, tmp_path / "load", "me/shipped", what)
        assert np.array_equal(theirs, ours) and ours.std() > 0.01 and hub.secrets == []
        requests = len(hub.log)
        assert np.array_equal(opened(hub, tmp_path / "load", "me/shipped", what, HF_HUB_OFFLINE="1"), ours) and len(hub.log) == requests


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Folders of a base model, and of a LoRA made for it."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file
    root = tmp_path_factory.mktemp("strangers")
    base = tiny.tiny_sd(root / "base")
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]))
    g = torch.Generator().manual_seed(1)
    state = {f"unet.{k}": 0.2 * torch.randn(v.shape, generator=g) for k, v in get_peft_model_state_dict(pipe.unet).items()}
    (root / "lora").mkdir()
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 4, "unet.target_modules": ["to_q", "to_v"]})}
    save_file(state, root / "lora" / "few.safetensors", metadata)
    (root / "lora" / "few.bin").write_bytes(b"\x80\x02never opened")
    return base, root / "lora"


@pytest.mark.slow
def test_a_community_lora_on_its_base_model(strangers, tmp_path, monkeypatch):
    """A row of the registry with its two repositories on the Hub: the same picture as from the two folders; no pickle is fetched; a revision
    that is not there, and a base model one may not see, are said in one line."""
    base, lora = strangers
    name, what = "hyper-sd.sd15-4step", {"prompt": "red heart"}
    monkeypatch.setattr(registry, "STUDENTS", (replace(registry.student(name), teacher=str(base), source=str(lora), file="few.safetensors"),))
    pipe = zoo.load(name)
    pipe.set_progress_bar_config(disable=True)
    ours = pipe(**what, generator=torch.Generator().manual_seed(0), output_type="np").images
    changes = {"teacher": "them/base", "source": "them/lora", "file": "few.safetensors"}
    with Loopback() as hub:
        sent(hub, "them/base", base)
        sent(hub, "them/lora", lora)
        changes["revision"] = hub.repos["models/them/lora"].branches["main"]
        hub.write("models/them/lora", "few.safetensors", b"of a later commit", "them")                # the row keeps to the one it was read at
        theirs = opened(hub, tmp_path / "a", name, what, changes)
        assert np.array_equal(theirs, ours)
        assert "no safetensors one" in opened(hub, tmp_path / "a", name, what, changes, {"revision": "main"})
        assert any("/them/lora/resolve/" in p and p.endswith("few.safetensors") for _, p in hub.log) and not any(p.endswith(".bin") for _, p in hub.log)
        plain = opened(hub, tmp_path / "a", name, what, changes | {"lora_scale": 0.0})
        assert not np.array_equal(plain, ours)                                        # the LoRA was in the picture
        said = opened(hub, tmp_path / "a", name, what, changes, {"revision": "none"})
        assert said.startswith("refused: could not fetch them/lora from the Hub") and len(said.strip().splitlines()) == 1
        hub.repos["models/them/base"].private = True
        said = opened(hub, tmp_path / "b", name, what, changes)
        assert said.startswith("refused: could not fetch them/lora") and "private" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../../outside.json", "/outside.json", "unet/../../../outside.json"])
def test_a_path_that_leaves_the_cache_is_not_written(tmp_path, name):
    """A repository whose listing holds such a path is refused in one line, and nothing is written beside its own place in the cache."""
    with Loopback() as hub:
        hub.make("models/me/escape")
        hub.write("models/me/escape", "fewstep.json", b"{}")
        hub.write("models/me/escape", "unet/a.safetensors", b"")
        hub.write("models/me/escape", name, b"{}")
        said = opened(hub, tmp_path / "home", "me/escape", {})
        assert isinstance(said, str) and said.startswith("refused: me/escape holds a path that leaves its folder"), said
        assert not list(tmp_path.rglob("outside.json")) and not Path("/outside.json").exists()


# Opens one name after another; prints what was said of each.
OPEN_ALL = """
import sys, warnings
import zoo
from zoo.errors import UserError
for name in sys.argv[1:]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            pipe = zoo.load(name)
            print(name, "opened", type(pipe).__name__, *(w.message for w in said if "pickles" in str(w.message)))
        except UserError as error:
            print(name, "refused:", error)
"""


@pytest.mark.slow
def test_what_a_strangers_repository_may_hold(tmp_path):
    """Pickles beside safetensors are neither fetched nor read; one that would be needed is refused by its name; a record names no folder
    of the reader's machine; what is no student, and what is registered under other names, is not downloaded."""
    shipped = next(p for p in model_cards.folders() if p.name == "reflow.fashion-4step")
    (tmp_path / "home").mkdir()
    (tmp_path / "lora" / "scheduler").mkdir(parents=True)
    data = json.loads((shipped / "fewstep.json").read_text())
    (tmp_path / "lora" / "fewstep.json").write_text(json.dumps(data | {"student": data["student"] | {"teacher": str(shipped), "lora_rank": 2}}))
    (tmp_path / "lora" / "scheduler" / "scheduler_config.json").write_text((shipped / "scheduler" / "scheduler_config.json").read_text())
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes((shipped / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    names = ["them/beside", "them/needed", "them/lora", "them/other", "ByteDance/Hyper-SD"]
    with Loopback() as hub:
        for name, folder in zip(names, [shipped, shipped, tmp_path / "lora"]):
            sent(hub, name, folder)
        for name, path in (("beside", "unet/diffusion_pytorch_model.bin"), ("beside", "old/optimizer.JOBLIB"), ("needed", "unet/weights.ckpt")):
            hub.write(f"models/them/{name}", path, b"\x80\x02never opened", "them")
        del hub.repos["models/them/needed"].tree("main")["unet/diffusion_pytorch_model.safetensors"]
        for name in names[3:]:
            hub.make(f"models/{name}")
            hub.write(f"models/{name}", "unet/diffusion_pytorch_model.safetensors", b"", name.split("/")[0])
        done = subprocess.run([sys.executable, "-c", OPEN_ALL, *names], env=environment(hub, tmp_path / "home", "hf_reader"), cwd=tmp_path / "home",
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        beside, needed, lora, other, registered = done.stdout.strip().splitlines()
        assert beside.startswith("them/beside opened ConsistencyModelPipeline") and "old/optimizer.JOBLIB, unet/diffusion_pytorch_model.bin" in beside
        assert needed.startswith("them/needed refused:") and "pickles only (unet/weights.ckpt)" in needed
        assert lora.startswith("them/lora refused:") and f"names '{shipped}' as its base model" in lora
        assert "them/other has no fewstep.json" in other and "DiffusionPipeline" in other
        assert "hyper-sd.sdxl-2step" in registered
        fetched = [p for method, p in hub.log if method == "GET" and "/resolve/" in p]
        assert not any(p.lower().endswith((".bin", ".joblib", ".ckpt")) for p in fetched)
        assert not any(p.endswith(".safetensors") for p in fetched if "/them/other/" in p or "/Hyper-SD/" in p)
