"""Encoded prompts and pictures kept on disk, found again by content.

    cache = open_cache(storage, "text", "user/model", facts)       # <folder>/text-user--model/
    cache.put({key: {"prompt": tensor, "pooled": tensor}});  cache.get([key, ...])  ->  {key: {...}} of those that are there

A key is the hash of what was encoded (`digest`), so that equal prompts and equal pictures are stored once. What the encoder was is
written beside (cache.json: model, revision, weights, precision, length, size); another encoder under the same name is refused. Tensors
are stored without loss: in bfloat16 where that holds every value, without zero rows at their end. Files are safetensors, written whole
or not at all, by any number of processes at once.

The limit counts every file under the folder. When it is reached, files that no present run has used go, the longest unused first; a set
larger than the limit keeps what came first and is encoded anew for the rest. That is on purpose: an epoch comes back to an item after
about as many others as there are, so that throwing out the least recently used of the share f of a set finds only f + (1 - f) log(1 - f)
of it (0.15 for a half), and writes all the time; keeping what is there finds f."""
from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import socket
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError

FILE_BYTES = 64 * 2**20       # a file is written when this much waits, or has waited this long
FILE_SECONDS = 60.0
OPEN_FILES = 256              # mapped at once
BEGAN = time.time()           # of this process: all its caches share one folder and its limit
AGAIN = 60.0                  # seconds after which a file that is still read is marked as used again
RECENT = 2 * AGAIN            # what was used that recently is in use by another run that began before this one
MEMORY_BYTES = 4 * 2**30      # without a folder
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16, "f64": torch.float64, "bool": torch.bool, "u8": torch.uint8,
          "i32": torch.int32, "i64": torch.int64}
SHORT = {v: k for k, v in DTYPES.items()}


@dataclass(frozen=True)
class Storage:
    """Where a run may keep what it encodes. folder: "" for memory alone; gigabytes: the limit of the folder; notes: a folder
    of the run's own (None: nothing is written); rank, world: of this process."""
    folder: str = ""
    gigabytes: float = 100.0
    notes: Path | None = None
    rank: int = 0
    world: int = 1


def digest(*parts: bytes | str) -> str:
    """32 hexadecimal digits of what is given."""
    return digest_of(parts)


def digest_of(parts: Iterable[bytes | str]) -> str:
    """`digest` of parts that come one by one."""
    made = hashlib.blake2b(digest_size=16)
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        made.update(len(part).to_bytes(8, "little") + part)
    return made.hexdigest()


def fingerprint(modules: dict[str, torch.nn.Module]) -> str:
    """Of weights: names, shapes, precisions and up to 64 values of every tensor, evenly spaced. A fine-tune changes it, an adapter beside
    the weights does not."""
    parts = []
    for name, module in sorted(modules.items()):
        state = {k.replace(".base_layer", ""): v for k, v in module.state_dict().items() if "lora_" not in k and torch.is_tensor(v)}
        for key, value in sorted(state.items()):
            flat = value.detach().flatten()
            some = flat[:: max(1, flat.numel() // 64)].cpu().double().numpy().tobytes()
            parts += [f"{name}.{key} {tuple(value.shape)} {value.dtype}", some]
    return digest(*parts)


def open_cache(storage: Storage, kind: str, model: str, facts: dict) -> "Cache | Memory":
    """The cache of one encoder. facts: plain data that decides its output. Raises UserError when the folder holds another's."""
    if not storage.folder:
        return Memory(MEMORY_BYTES)
    name = re.sub(r"[^\w.-]+", "--", model).strip("-") or "model"
    return Cache(Path(storage.folder) / f"{kind}-{name}", facts, int(storage.gigabytes * 1e9), Path(storage.folder))


def size(fields: dict[str, Tensor]) -> int:
    return sum(v.numel() * v.element_size() for v in fields.values())


class Memory:
    """The same, in memory and gone with the process: what came first up to `limit` bytes."""

    full = False

    def __init__(self, limit: int = MEMORY_BYTES):
        self.limit, self.bytes, self.kept = limit, 0, {}

    def __contains__(self, key: str) -> bool:
        return key in self.kept

    def get(self, keys: list[str]) -> dict[str, dict[str, Tensor]]:
        return {k: dict(unpack(v, label) for label, v in self.kept[k].items()) for k in keys if k in self.kept}

    def put(self, items: dict[str, dict[str, Tensor]]) -> None:
        for key, fields in items.items():
            packed = dict(pack(k, v) for k, v in fields.items())
            if self.bytes + size(packed) > self.limit:
                self.full = True
                return
            if key not in self.kept:
                self.kept[key] = packed
                self.bytes += size(packed)

    def flush(self) -> None:
        """Nothing waits in memory."""

    refresh = flush


def pack(name: str, value: Tensor) -> tuple[str, Tensor]:
    """(name with what `unpack` needs, tensor to store): bfloat16 where lossless, without the zeros at the end of the first axis."""
    value = value.detach().cpu()
    short = value
    if value.is_floating_point() and value.dtype != torch.bfloat16:
        low = value.bfloat16()
        short = low if torch.equal(low.to(value.dtype), value) else value
    rows = len(short) if short.ndim > 1 else 0
    while rows > 1 and not short[rows - 1].any():
        rows -= 1
    label = f"{name}:{SHORT[value.dtype]}:{len(value) if short.ndim > 1 else 0}"
    return label, (short[:rows] if short.ndim > 1 else short).clone().contiguous()


def unpack(value: Tensor, label: str) -> tuple[str, Tensor]:
    """(name, tensor) as they were."""
    name, dtype, rows = label.rsplit(":", 2)
    value = value.to(DTYPES[dtype])
    missing = int(rows) - len(value) if int(rows) else 0
    return name, torch.cat([value, value.new_zeros(missing, *value.shape[1:])]) if missing else value


class Cache:
    """See the module. folder: of this encoder; limit: bytes of everything under `root`."""

    def __init__(self, folder: Path, facts: dict, limit: int, root: Path):
        self.folder, self.limit, self.root, self.full = folder, limit, root, False
        self.started, self.flushed = BEGAN, time.monotonic()
        self.where: dict[str, str] = {}              # key -> file
        self.held: dict[str, list[str]] = {}         # file -> keys, the same objects
        self.labels: dict[str, tuple[str, ...]] = {} # key -> names of its tensors in the file, equal ones one object: there are millions
        self.kinds: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.files: set[str] = set()
        self.touched: dict[str, float] = {}          # file -> when it was last marked as used
        self.open: OrderedDict = OrderedDict()
        self.waiting: dict[str, dict[str, Tensor]] = {}
        self.waiting_bytes = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("*.safetensors.*"):          # of a process that was killed while it wrote
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink(missing_ok=True)
            self._check(facts)
        except OSError as error:
            raise UserError(f"--cache {root} cannot be written ({error}): give a folder on a disk with room") from error
        self.refresh()
        atexit.register(_flush_if_alive, weakref.ref(self))

    def _check(self, facts: dict) -> None:
        record = self.folder / "cache.json"
        mine = json.loads(json.dumps(facts))
        if not record.exists():
            temp = record.with_name(f"cache.json.{_mine()}")
            temp.write_text(json.dumps(mine, indent=1, sort_keys=True))
            os.replace(temp, record)
        try:
            theirs = dict(json.loads(record.read_text()))
        except (ValueError, TypeError):                  # a machine that went down while it was written
            raise UserError(f"{record} cannot be read, so that nothing says what {self.folder} was encoded by: give another --cache folder, "
                            "or delete this one") from None
        wrong = [f"{k}: {theirs.get(k)!r} there, {mine.get(k)!r} here" for k in sorted(mine | theirs) if theirs.get(k) != mine.get(k)]
        if wrong:
            raise UserError(f"{self.folder} was encoded by another model or setting ({'; '.join(wrong)}): "
                            "give another --cache folder, or delete this one")

    # ------------------------------------------------------------------------------------------------ reading
    def refresh(self) -> None:
        """Learn of files that other processes wrote or removed."""
        there = {p.name for p in self.folder.glob("*.safetensors")}
        for name in sorted(there - self.files):
            handle = self._handle(name)
            if handle is not None:
                found: dict[str, list[str]] = {}
                for full in handle.keys():
                    key, _, label = full.partition("/")
                    found.setdefault(key, []).append(label)
                for key, labels in found.items():
                    if key not in self.where:
                        self._learn(key, name, labels)
        for name in self.files - there:
            self._forget(name)
        self.files = there

    def _learn(self, key: str, name: str, labels) -> None:
        self.held.setdefault(name, []).append(key)
        self.where[key], self.labels[key] = name, self.kinds.setdefault(tuple(labels), tuple(labels))

    def _handle(self, name: str):
        """The mapped file, or None when it is gone or broken (a broken one is removed: what it held is encoded again)."""
        from safetensors import SafetensorError, safe_open
        if name not in self.open:
            path = self.folder / name
            try:
                self.open[name] = safe_open(path, framework="pt")
            except FileNotFoundError:
                return None
            except SafetensorError as error:
                warnings.warn(f"{path} is broken ({error}) and was removed from the cache", stacklevel=2)
                path.unlink(missing_ok=True)
                return None
            if len(self.open) > OPEN_FILES:
                self.open.popitem(last=False)
        self.open.move_to_end(name)
        return self.open[name]

    def _forget(self, name: str) -> None:
        self.open.pop(name, None)
        for key in self.held.pop(name, ()):
            if self.where.get(key) == name:
                del self.where[key], self.labels[key]

    def __contains__(self, key: str) -> bool:
        return key in self.where or key in self.waiting

    def get(self, keys: list[str]) -> dict[str, dict[str, Tensor]]:
        """Those of `keys` that are there."""
        out = {}
        for key in dict.fromkeys(keys):
            if key in self.waiting:
                out[key] = dict(unpack(v, label) for label, v in self.waiting[key].items())
            elif key in self.where:
                name = self.where[key]
                handle = self._handle(name)
                if handle is None:
                    self._forget(name)
                    continue
                now = time.monotonic()
                if now - self.touched.get(name, -AGAIN) >= AGAIN:          # a mark now and then keeps the file from going while runs use it
                    self.touched[name] = now
                    _touch(self.folder / name)
                out[key] = dict(unpack(handle.get_tensor(f"{key}/{label}"), label) for label in self.labels[key])
        return out

    # ------------------------------------------------------------------------------------------------ writing
    def put(self, items: dict[str, dict[str, Tensor]]) -> None:
        """Keep them, unless the limit is reached."""
        for key, fields in items.items():
            if key not in self and not self.full:
                self.waiting[key] = dict(pack(k, v) for k, v in fields.items())
                self.waiting_bytes += size(self.waiting[key])
                if self.waiting_bytes >= FILE_BYTES:
                    self.flush()
        if self.waiting and time.monotonic() - self.flushed > FILE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits, one file; nothing when there is no room for it."""
        from safetensors.torch import save_file
        if not self.waiting:
            return
        name = f"{digest(*sorted(self.waiting))}.safetensors"
        temp = self.folder / f"{name}.{_mine()}"
        try:
            save_file({f"{key}/{label}": v for key, fields in self.waiting.items() for label, v in fields.items()}, temp)
            if self._make_room(temp.stat().st_size):
                os.replace(temp, self.folder / name)
                self.files.add(name)
                self.touched[name] = time.monotonic()
                for key, fields in self.waiting.items():
                    self._learn(key, name, fields)
            else:
                self.full = True
                warnings.warn(f"the cache {self.root} is full ({self.limit / 1e9:g} GB) with what this run uses: the rest is encoded whenever it is "
                              "needed; give a larger --cache_gb to keep it all", stacklevel=2)
        except Exception as error:
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                raise UserError(f"could not write to the cache {self.root} ({error}): free some space or give a smaller --cache_gb") from error
            raise
        finally:
            temp.unlink(missing_ok=True)
        self.waiting, self.waiting_bytes, self.flushed = {}, 0, time.monotonic()

    def _make_room(self, wanted: int) -> bool:
        """Whether `wanted` bytes fit, after removing files that nobody has used since this run began, or recently."""
        found = []
        for path in self.root.rglob("*.safetensors"):
            try:
                state = path.stat()
            except FileNotFoundError:          # another process made room
                continue
            found.append((state.st_mtime, state.st_size, path))
        total = sum(s for _, s, _ in found)
        for used, s, path in sorted(found):
            if total + wanted <= self.limit or used >= min(self.started, time.time() - RECENT):
                break
            path.unlink(missing_ok=True)
            total -= s
            if path.parent == self.folder:
                self._forget(path.name)
                self.files.discard(path.name)
        return total + wanted <= self.limit


def _flush_if_alive(reference) -> None:
    cache = reference()
    if cache is not None:
        cache.flush()


def _mine() -> str:
    """Ends the name of a file that only this process writes, on whichever machine."""
    return f"{socket.gethostname()}-{os.getpid()}"


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:                            # gone or read-only: its age is then that of its writing
        pass
