"""Folders to push and processes that push them: the real client with a loopback endpoint, a cache of its own and short waits."""
from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Pushes (or pulls) and prints one line of JSON: {"url"} or {"error"}, and how long it was asked to wait. Only back-off sleeps are shortened.
CHILD = """
import json, sys
import huggingface_hub.utils._http as http
from types import SimpleNamespace
from zoo.errors import UserError
from zoo.hub import publish, retry
waits = []
retry.pause = waits.append
http.time = SimpleNamespace(**{k: getattr(http.time, k) for k in dir(http.time) if not k.startswith("_")} | {"sleep": waits.append})
job = json.loads(sys.argv[1])
out = {}
try:
    if job.get("pull"):
        from huggingface_hub import snapshot_download
        out["folder"] = snapshot_download(job["pull"], repo_type=job.get("type"), revision=job.get("revision"))
    else:
        out["url"] = publish.push(job["folder"], job["repo"], sample=False, **job.get("options", {}))
except UserError as error:
    out["error"] = str(error)
print("RESULT " + json.dumps(out | {"waits": waits, "torch": "torch" in sys.modules}))
"""


def environment(hub, home: Path, token: str = "hf_any", **more) -> dict:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return keep | {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1",
                   "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "DIFFUSERS_DISABLE_REMOTE_CODE": "1", "PYTHONPATH": str(ROOT),
                   "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "3",
                   "HF_XET_CLIENT_RETRY_BASE_DELAY": "50ms", **({} if hub.xet else {"HF_HUB_DISABLE_XET": "1"}), **more}


class Client:
    """One user's machine: a cache of its own."""

    def __init__(self, hub, home: Path, token: str = "hf_any"):
        self.hub, self.home, self.token = hub, home, token
        home.mkdir(parents=True, exist_ok=True)

    def start(self, script: str = CHILD, *arguments, **more) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], env=environment(self.hub, self.home, self.token, **more), cwd=self.home,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def result(self, process) -> dict:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        assert self.token not in out + err, "a token was printed"
        return json.loads(out.splitlines()[-1].removeprefix("RESULT "))

    def begin(self, folder, repo, env=None, **options):
        return self.start(CHILD, json.dumps({"folder": str(folder), "repo": repo, "options": options}), **(env or {}))

    def push(self, folder, repo, **options) -> dict:
        return self.result(self.begin(folder, repo, **options))

    def pull(self, repo, type="model", revision=None, **more) -> dict:
        return self.result(self.start(CHILD, json.dumps({"pull": repo, "type": type, "revision": revision}), **more))


# ------------------------------------------------------------------------------------------------------- folders
def safetensors(path: Path, seed: str, size: int = 60_000, metadata: dict | None = None):
    """A safetensors file of one tensor, made without any library."""
    data = b"".join(hashlib.sha256(f"{seed}{i}".encode()).digest() for i in range(size // 32))
    header = {"w": {"dtype": "F32", "shape": [len(data) // 4], "data_offsets": [0, len(data)]}} | ({"__metadata__": metadata} if metadata else {})
    head = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


CONTRACT = {"knots": {"2": [999, 499], "1": [999]}, "sampler": "renoise", "guidance": 1.0, "prediction": "epsilon", "scheduler": "LCMScheduler",
            "dtype": "float32",
            "lora_scale": 1.0, "shift": 1.0, "guidance_range": None, "layout": None, "grid": "scheduler", "call": {}, "schema": 2}
KINDS = ("student", "lora", "pipeline", "card", "dataset")


def folder(kind: str, at: Path, seed: str = "a") -> Path:
    """A folder of every kind that is pushed, its content depending on `seed`: student (full weights), lora, pipeline (a scheduler with its
    own configuration, no record), card, dataset (prompts and stored pairs)."""
    at.mkdir(parents=True)
    front = "license: mit\n" if kind == "dataset" else "license: mit\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags: [few-step, lora]\n"
    gallery = "widget:\n- text: a heart\n  output: {url: grid.png}\n" if kind in ("student", "lora") else ""
    (at / "README.md").write_text(f"---\n{front}{gallery}---\n\n# {seed}\n\n`from_pretrained(\"path/to/student\")`\n")
    if gallery:
        (at / "grid.png").write_bytes(b"\x89PNG" + seed.encode() * 10)
    scheduler = {"_class_name": "LCMScheduler", "prediction_type": "epsilon", "original_inference_steps": 2, "_fewstep": CONTRACT}
    if kind in ("student", "pipeline", "lora"):
        (at / "scheduler").mkdir()
        (at / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    if kind in ("student", "pipeline"):
        (at / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "LCMScheduler"]}))
        safetensors(at / "unet" / "diffusion_pytorch_model.safetensors", seed)
    if kind == "student":
        safetensors(at / "vae" / "diffusion_pytorch_model.safetensors", "shared")
        (at / "fewstep.json").write_text(json.dumps(CONTRACT | {"student": {"family": "sd", "teacher": "emoji", "slot": None, "lora_rank": 0}}))
    if kind == "lora":
        safetensors(at / "pytorch_lora_weights.safetensors", seed,
                    metadata={"format": "pt", "lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 4})})
    if kind == "dataset":
        (at / "prompts.jsonl").write_text(json.dumps({"prompt": f"a red heart {seed}"}) + "\n")
        safetensors(at / "pairs" / "00000000.safetensors", seed)
    return at


def whole(hub, key: str, folder: Path, revision: str = "main") -> bool:
    """Whether the repository's tree holds exactly our files there, besides those of others."""
    tree, repo = hub.repos[key].tree(revision), key.split("/", 1)[1]
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes().replace(b"path/to/student", repo.encode()) if path.name == "README.md" else path.read_bytes()
            name = path.relative_to(folder).as_posix()
            if name not in tree or tree[name].sha256 != hashlib.sha256(data).hexdigest():
                return False
    return True


def same_files(a: Path, b: Path, repo: str) -> bool:
    """Whether pulled folder `b` holds every file of `a`."""
    read = lambda root, p: (root / p).read_bytes()
    names = [p.relative_to(a).as_posix() for p in a.rglob("*") if p.is_file()]
    return all((b / n).exists() and read(a, n).replace(b"path/to/student", repo.encode()) == read(b, n) for n in names)
