"""From what `--data` names to training items: prompts and pictures encoded by the teacher's own parts, each once.

    source = feed(model, images=True)      # items cond, uncond and x0, by global sample number (Run.micro_batches)
    source = labelled(model, 10, conditions)      # the same of pictures with class numbers, conditions(numbers [B]) giving cond and uncond

Every prompt and picture is encoded by itself: in a batch, what stands beside it would show in the last bit, and a run that resumes, or
has another number of ranks, would not repeat itself.
`model` is a backbone: encode(pictures), shape, pipe, storage; where it is prompted conditions(list of prompts) and unconditional(). One
without an autoencoder (`pipe.vae` missing or None) has pictures as its samples; they are kept as bytes."""
from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from . import buckets, clips
from .ahead import before_network
from .cache import digest, digest_of, fingerprint, open_cache
from .spec import Spec, parse
from .streams import Stream, open_stream
from .tables import Lines
from .tally import Tally

PART = 64                      # prompts between two looks at the cache's limit
FORMAT = 1                     # of what is cached; counts up when the same facts would give other tensors
PROBE = "A Cat, 3 naïve hearts: (red) and 4K"        # what a tokenizer makes of it tells it from others of the same name
SETTINGS = ("force_zeros_for_empty_prompt", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "batch_norm_eps")
UNCONDITIONAL = digest("", "unconditional")
UNKNOWN = 2**31                # nominal length of a stream before its first epoch has ended
if TYPE_CHECKING:
    from ..backbones.base import Source


def feed(model, images: bool = False):
    """A Source of the model's --data. Raises UserError when there is none, and for captions or pictures that are not there."""
    from ..backbones.base import Source
    if not model.data:
        raise UserError(f"{model.name} comes without {'captioned images' if images else 'prompts'}: give --data {'FOLDER' if images else 'prompts.txt'}")
    spec, texts = parse(model.data), model.texts
    if spec.buckets and not images:
        raise UserError("this method reads prompts alone, and buckets are for pictures: drop ?buckets=yes from --data")
    if images:
        items = Pictures(model, spec)
        if items.captions is not None:        # those of a stream are not known
            texts.prepare(items.captions)
        return _source(items, lambda index: fields(texts, *items(index.tolist())))
    stream = _stream(model, spec, "")
    if stream is not None:
        get = lambda index: fields(texts, [row["caption"] for row in _complete(stream, index.tolist())])
        source = Source(stream.n or UNKNOWN, get, lambda numbers, seed, batch: stream.order(numbers, seed))
        source.identity = f"stream {model.data}{_sizes(spec)}"
        return source
    captions = _prompts(model)
    if Path(spec.place).is_dir() and not spec.tables and model.storage.rank == 0:
        print(f"note: this method trains on prompts alone; of {spec.place} it reads the {len(captions)} captions", file=sys.stderr)
    texts.prepare(captions)
    source = Source(len(captions), lambda index: fields(texts, [captions[i] for i in index.tolist()]))
    source.identity = f"{len(captions)} prompts {digest_of(captions)}"
    return source


def labelled(model, classes: int, conditions: Callable[[Tensor], dict]) -> Source:
    """A Source of the pictures of the model's --data with their class numbers below `classes` (0: pictures alone). Raises UserError when there
    is no data, and for labels that are not there or of other classes."""
    if not model.data:
        raise UserError(f"{model.name} comes without {'labelled ' * bool(classes)}pictures: give --data FOLDER")
    items = Pictures(model, parse(model.data), "label" if classes else "", classes)

    def get(index):
        labels, x0 = items(index.tolist())
        return conditions(torch.tensor(labels)) | {"x0": x0}
    return _source(items, get)


def _source(items: "Pictures", get: Callable[[Tensor], dict]) -> Source:
    from ..backbones.base import Source
    source = Source((items.stream.n if items.stream else items.n) or UNKNOWN, get, items.order)
    source.cache = items.cache
    return source


def some_prompts(model, most: int = 1000) -> Sequence[str]:
    """Prompts of the model's --data, all of a list or the first of a stream."""
    if not model.data:
        raise UserError(f"{model.name} comes without prompts: give --data prompts.txt")
    stream = _stream(model, parse(model.data), "")
    if stream is None:
        return _prompts(model)
    found, at = [], 0
    while len(found) < most and at < 4 * most and (stream.n is None or at < stream.n):
        found += [row["caption"] for row in stream.rows(list(range(at, at + 100))) if not _wrong("caption", row["caption"])]
        at += 100
    if not found:
        raise UserError(f"none of the first {at} rows of {stream.name} has a caption (column {stream.columns['caption']}): name the column of texts, as in "
                        f"--data '{stream.name}?caption=COLUMN'")
    return found[:most]


def fields(texts: "Texts", captions: list[str], x0: Tensor | None = None) -> dict:
    """An item of these captions, with x0 where given."""
    found = {"cond": texts(captions), "uncond": {k: v.expand(len(captions), *v.shape[1:]) for k, v in texts.empty().items()}}
    return found | ({} if x0 is None else {"x0": x0})


def _prompts(model) -> Sequence[str]:
    from . import lines_of
    return lines_of(model.data, "video" if len(model.shape) == 4 else "image")


def _sizes(spec: Spec) -> str:
    """Names and sizes of the local files of a stream: shards of the same name may be others."""
    files = spec.shards or spec.tables
    return "".join(f" {p.name} {p.stat().st_size}" for p in files)


def _stream(model, spec: Spec, column: str, beside: str = "caption") -> Stream | None:
    """The stream that `spec` is, or None for what is read as a whole. column: "image", "video" or "" for neither; beside: what its rows must
    have besides, if anything."""
    from . import is_local
    if not (spec.stream if spec.stream is not None else bool(spec.shards) or not is_local(spec.place)):
        return None
    notes = model.storage.notes
    stream = open_stream(spec, notes and Path(notes) / f"rows-{digest(spec.place, spec.config, _sizes(spec))}.json", column, beside)
    missing = sorted({beside, column} - set(stream.columns) - {""})
    if missing:
        raise UserError(f"--data {spec.place} has no column for the {' and the '.join(missing)}: it has {', '.join(stream.names)}; "
                        f"name it, as in --data '{spec.place}?{missing[0]}=COLUMN'")
    stream.empty = Tally(f"{beside}s of {spec.place}")
    return stream


def _complete(stream: Stream, positions: list[int], beside: str = "caption", classes: int = 0) -> list[dict]:
    """The rows at `positions`, each without a caption (or label) that can be used replaced by the next that has one."""
    rows = stream.rows(positions)
    stream.empty.read(len(rows))
    for i, row in enumerate(rows):
        p = positions[i]
        while wrong := _wrong(beside, row.get(beside), classes):
            stream.empty.skip(p, row["name"] or f"row {p}", wrong)
            p += 1
            row = stream.rows([p])[0]
            stream.empty.read()
        rows[i] = row
    return rows


def _wrong(beside: str, value, classes: int = 0) -> str:
    """What is wrong with the caption or the label of a picture; "" for a good one."""
    if beside == "caption":
        return "" if isinstance(value, str) and value.strip() else "no text"
    if beside == "label" and not 0 <= _number(value) < (classes or math.inf):
        return f"label {value!r:.40} is none of the classes 0 to {classes - 1}" if classes else f"label {value!r:.40} is no class number"
    return ""


def _number(value) -> int:
    """The class number that a label is, also as text or as a whole float; -1 for anything else."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return -1
    return int(found) if found.is_integer() else -1


# ------------------------------------------------------------------------------------------------ prompts
class Texts:
    """Conditions of prompts [n, ...], on the CPU, from the cache or the teacher's own encoders."""

    def __init__(self, model):
        self.model, self.storage, self.resting = model, model.storage, False
        self.encoders: dict[str, nn.Module] = {k: v for k, v in model.pipe.components.items() if k.startswith("text_encoder") and isinstance(v, nn.Module)}
        self.cache = open_cache(self.storage, "text", str(model.name), self.facts() if self.storage.folder else {})
        self._empty: dict[str, Tensor] | None = None

    def facts(self) -> dict:
        """What decides the encoding of a prompt."""
        pipe = self.model.pipe
        tokenizers = {k: v for k, v in pipe.components.items() if k.startswith("tokenizer") and v is not None}
        return {"model": str(self.model.name), "revision": revision(self.model), "weights": fingerprint(self.encoders), "style": _style(self.model),
                "precision": {k: str(next(v.parameters()).dtype) for k, v in self.encoders.items()},
                "length": getattr(self.model, "length", {k: v.model_max_length for k, v in tokenizers.items()}),
                "settings": settings(pipe), "tokens": {k: digest(str(v(PROBE, verbose=False)["input_ids"])) for k, v in tokenizers.items()},
                "family": getattr(self.model, "text_family", self.model.family), "format": FORMAT}

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        keys = [digest(p) for p in prompts]
        known = self.cache.get(keys)
        known |= self._encode({k: p for k, p in zip(keys, prompts) if k not in known})
        return {f: torch.stack([known[k][f] for k in keys]) for f in known[keys[0]]}

    def empty(self) -> dict[str, Tensor]:
        """Conditions [1, ...] of the unguided half, where the network is."""
        if self._empty is None:
            found = self.cache.get([UNCONDITIONAL]).get(UNCONDITIONAL)
            if found is None:
                with self._awake(), torch.no_grad():
                    found = {k: v[0].cpu() for k, v in self.model.unconditional().items()}
                self.cache.put({UNCONDITIONAL: found})
            self._empty = {k: v[None].to(self.model.module.device) for k, v in found.items()}
        return self._empty

    def _encode(self, wanted: dict[str, str]) -> dict[str, dict[str, Tensor]]:
        """key -> fields of the prompts `wanted`, encoded now."""
        made = {}
        if wanted:
            with self._awake(), torch.no_grad():
                made = {key: {k: v[0].cpu() for k, v in self.model.conditions([p]).items()} for key, p in wanted.items()}
        self.cache.put(made)
        return made

    # ------------------------------------------------------------------------------------------------ encoders at rest
    def prepare(self, captions: Sequence[str]) -> None:
        """With a folder for the cache: encode all `captions` that are not in it, the ranks sharing them; then the encoders leave the
        accelerator. They stay where the cache has no room for all."""
        if not self.storage.folder:
            return
        self.empty()
        from tqdm import tqdm
        keys, wanted = distinct(captions)
        key = lambda i: keys[i].tobytes().hex()
        mine = [i for i in wanted[self.storage.rank:: self.storage.world] if key(i) not in self.cache]       # of all: ranks may see different caches
        for at in tqdm(range(0, len(mine), PART), desc=f"prompts ({PART} each)", disable=self.storage.rank != 0 or not mine):
            if self.cache.full:
                break
            self._encode({key(i): captions[i] for i in mine[at: at + PART]})
        self.cache.flush()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        self.cache.refresh()
        if all(key(i) in self.cache for i in wanted):
            self.rest()

    def rest(self) -> None:
        """Move the encoders to the CPU; a prompt that is not cached brings them back for as long as it takes."""
        if not self.resting and self.model.module.device.type != "cpu" and self.storage.rank == 0:
            held = sum(p.numel() * p.element_size() for e in self.encoders.values() for p in e.parameters())
            print(f"all prompts are cached: {held / 1e9:.2f} GB of text encoders left the accelerator", file=sys.stderr)
        self.resting = True
        self._move("cpu")

    def _move(self, device) -> None:
        for encoder in self.encoders.values():
            encoder.to(device)

    @contextmanager
    def _awake(self):
        before_network()
        if self.resting:
            self._move(self.model.module.device)
        try:
            yield
        finally:
            if self.resting:
                self._move("cpu")


def distinct(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The digests of all texts, and the first place of each that differs, in order: 24 bytes a text, that millions fit beside a network."""
    raw = bytearray()
    for text in texts:
        raw += bytes.fromhex(digest(text))
    keys = np.frombuffer(raw, "V16")
    return keys, np.sort(np.unique(keys, return_index=True)[1])


def _style(model) -> str:
    """The style LoRA in the teacher's weights, which may reach its encoders."""
    return f"{model.style.source} x {model.style.scale}" if getattr(model, "style", None) else ""


def settings(part) -> dict:
    """What the config of a pipeline or an autoencoder says of how it encodes, beside its weights."""
    found = {k: part.config[k] for k in SETTINGS if part.config.get(k) is not None}
    return {k: digest(str(list(v))) if isinstance(v, (list, tuple)) else v for k, v in found.items()}


def revision(model) -> str:
    """The commit of a teacher from the Hub; "" for a folder, whose weights speak for themselves."""
    if Path(model.folder).is_dir():
        return ""
    from huggingface_hub import try_to_load_from_cache
    found = try_to_load_from_cache(str(model.folder), "model_index.json")
    return Path(found).parent.name if isinstance(found, str) else ""


# ------------------------------------------------------------------------------------------------ pictures
class Pictures:
    """Pictures or clips of a set as samples [B, ...], with their captions: called with positions, gives (captions, samples).

    A picture that cannot be decoded is counted, and the next one that can stands in for it. beside: the column that goes with it, caption or
    label, or "" for none (it is 0 then); classes: how many there are of labels (0: any, of whole sets); captions: that column of a whole
    set, None for a stream."""

    def __init__(self, model, spec: Spec, beside: str = "caption", classes: int = 0):
        self.model, self.spec, self.moving, self.beside, self.classes = model, spec, len(model.shape) == 4, beside, classes
        self.raw, self.channels = getattr(model.pipe, "vae", None) is None, getattr(model, "picture_channels", 3)
        if self.channels not in (1, 3):
            raise UserError(f"{model.name} makes pictures of {self.channels} channels, and files hold 1 or 3: use a method that needs no pictures")
        if spec.buckets and (self.moving or not getattr(model, "any_size", False) or model.shape[-2] != model.shape[-1]):
            raise UserError(f"the {model.family} family takes pictures of one size: drop ?buckets=yes from --data")
        self.column, other = ("video", "image") if self.moving else ("image", "video")
        for option in [other] * bool(getattr(spec, other)) + ["fps"] * (spec.fps > 0 and not self.moving):
            raise UserError(f"the {model.family} family reads {self.column}s: leave ?{option}= out of --data {spec.place}")
        self.stream = _stream(model, spec, self.column, beside) if beside != "label" or classes else None
        self.keys: dict = {}                         # position, or (position, shape) where that is not its own -> key
        self.ready: dict[str, Tensor] = {}           # decoded ahead (data.ahead), not yet encoded
        workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        self.each = ThreadPoolExecutor(workers).map if workers > 1 else map
        if spec.place.endswith(".txt"):
            wanted = f"{ {'caption': 'captioned ', 'label': 'labelled '}.get(beside, '')}{'clips' if self.moving else 'images'}"
            raise UserError(f"--data {spec.place} holds prompts alone, and this method trains on {wanted}: give a folder of them")
        self.captions, self.n = None, None
        if self.stream is None:
            self._open_set()
        self.tally = Tally(f"{'clips' if self.moving else 'images'} of {spec.place}", self.n)
        if beside and self.stream is None:
            self._check_beside()
        if self.moving:
            frame = model.stock_size
            self.frames, self.size = frame["num_frames"], (frame["height"], frame["width"])
        else:
            self.size = tuple(n * (getattr(model, "scale", 0) or model.pipe.vae_scale_factor) for n in model.shape[-2:])
        self.shapes, self.bucket = [self.size], None
        if spec.buckets:
            self._open_buckets()
        self.cache = open_cache(model.storage, "pixels" if self.raw else "latents", str(model.name), self.facts() if model.storage.folder else {})
        if self.stream is None:          # reading the first rows of a stream would be in the way of one that resumes
            self._read(list(range(min(self.n, 4))))      # a set that is no set of pictures stops before step 1

    def facts(self) -> dict:
        """What decides what is kept of a picture."""
        if self.raw:
            return {"model": str(self.model.name), "size": self.shapes, "channels": self.channels, "frames": [self.frames, self.spec.fps] if self.moving else 1,
                    "format": FORMAT}
        vae = self.model.pipe.vae
        return {"model": str(self.model.name), "revision": revision(self.model), "weights": fingerprint({"vae": vae}), "settings": settings(vae),
                "family": self.model.family,
                "precision": str(next(vae.parameters()).dtype), "size": self.shapes, "frames": [self.frames, self.spec.fps] if self.moving else 1,
                "format": FORMAT}

    @property
    def order(self):
        """order(numbers, seed, batch) where sample numbers are not simply shuffled (see backbones.Source)."""
        if self.stream is not None:
            return lambda numbers, seed, batch: self.stream.order(numbers, seed)
        return self.bucket and buckets.Order(torch.tensor(self.bucket))

    def _open_set(self) -> None:
        from . import open_dataset
        table, place, beside = open_dataset(self.model.data, self.column), self.spec.place, self.beside
        if beside and beside not in table.column_names:
            usual = {"caption": "caption, text or prompt", "label": "label or class"}[beside]
            folder = Path(place).is_dir() and not self.spec.tables
            beside_files = {"caption": "put a .txt file beside each, ", "label": "sort them into one subfolder per class, "}[beside] * folder
            raise UserError(f"--data {place} has no {beside} column ({usual}) beside its {self.column}s: it has {', '.join(table.column_names)}; {beside_files}"
                            f"{'or ' * bool(beside_files)}name it, as in --data '{place}?{beside}=COLUMN'")
        self.n, self.table = len(table), _undecoded(table, self.column)
        self.captions = Lines(table, beside) if beside else [0] * self.n

    def _check_beside(self) -> None:
        """Of a whole set: an item without a caption, or with a label that is none of the teacher's classes, is left out as if it could not be
        read. Labels become class numbers."""
        place, bad = self.spec.place, {i: why for i, value in enumerate(self.captions) if (why := _wrong(self.beside, value, self.classes))}
        if len(bad) > 0.01 * self.n and self.beside == "label":
            raise UserError(f"--data {place}: {len(bad)} of {self.n} labels do not fit {self.model.name}, the first is: {next(iter(bad.values()))}; "
                            f"name the column of its class numbers, as in --data '{place}?label=COLUMN'")
        if len(bad) > 0.01 * self.n:
            raise UserError(f"--data {place}: {len(bad)} of {self.n} {self.column}s have no caption (allowed: 1 %), "
                            f"the first is {self._rows([next(iter(bad))])[0]['name'] or f'item {next(iter(bad))}'}: "
                            f"caption or remove them, or name the column of captions, as in --data '{place}?caption=COLUMN'")
        for i, why in bad.items():
            self.tally.skip(i, self._rows([i])[0]["name"] or f"item {i}", why)
        text = lambda value: "" if _wrong("caption", value) else value
        self.captions = [_number(value) for value in self.captions] if self.beside == "label" else Lines(self.captions.table, "caption", read=text)

    def _open_buckets(self) -> None:
        if self.stream is not None:
            raise UserError(f"buckets need the sizes of all pictures, and {self.spec.place} is a stream: add &stream=no, or drop buckets")
        least = self.model.pipe.vae_scale_factor * 2        # the networks cut latents in patches of 2, or halve them
        step = -(-self.size[0] // 16 // least) * least if self.size[0] >= 16 * least else least
        self.shapes = buckets.shapes(self.size[0], step)
        found = list(self.each(self._size, range(self.n)))
        self.bucket = [buckets.nearest(*size, self.shapes) if size else 0 for size in found]

    def _size(self, position: int) -> tuple[int, int] | None:
        """(height, width) of a picture as it is meant to be seen, from its header; None where it has none."""
        import io

        import PIL.Image
        try:
            entry = self._entry(position)
            with PIL.Image.open(io.BytesIO(entry["bytes"]) if entry["bytes"] else entry["path"]) as image:       # of a file no more than its head
                width, height = image.size
                return (width, height) if image.getexif().get(0x0112, 1) >= 5 else (height, width)
        except Exception:        # what it is will be said when it is decoded
            return None

    # ------------------------------------------------------------------------------------------------ reading
    def __call__(self, positions: list[int]) -> tuple[list[str], Tensor]:
        items = self._read(positions)
        known = self.cache.get([key for key, _, _ in items])
        fresh = {}
        for key, (entry, shape, pixels), _ in items:
            if key not in known and key not in fresh:
                fresh[key] = self._decode(entry(), shape) if pixels is None else pixels       # None: it went from the cache just now
        known |= self._encode(fresh)
        x0 = torch.stack([known[key]["x0"] for key, _, _ in items])
        return [beside for _, _, beside in items], self.model.encode(_signed(x0)) if self.raw else x0

    def _read(self, positions: list[int]) -> list[tuple]:
        """(key, (function giving the entry, shape, pixels or None where cached), caption) of what stands at the positions. What stands in for an
        item is cut to that one's shape, which is that of its batch."""
        out, shapes, todo = [None] * len(positions), [self._shape(p) for p in positions], list(enumerate(positions))
        self.tally.read(len(positions))
        while todo:
            later, new = [], []
            for slot, p in todo:
                key = self.keys.get(self._at(p, shapes[slot]))
                if key in self.cache:                # is not read again
                    out[slot] = key, (partial(self._entry, p), shapes[slot], None), self.captions[p]
                else:
                    new.append((slot, p))
            rows = self._rows([p for _, p in new])
            for (slot, p), row, item in zip(new, rows, self.each(self._open, [p for _, p in new], rows, [shapes[slot] for slot, _ in new])):
                if isinstance(item, Exception | str):
                    if item != "known":
                        self.tally.skip(p, row["name"] or f"item {p}", item)
                    later.append((slot, (p + 1) % self.n if self.n else p + 1))
                else:
                    out[slot] = (*item, row["beside"])
            todo = later
        return out

    def _rows(self, positions: list[int]) -> list[dict]:
        if self.stream is not None:
            found = _complete(self.stream, positions, self.beside, self.classes)
            beside = {"label": _number}.get(self.beside, lambda value: value)
            return [{"image": row["image"], "beside": beside(row[self.beside]) if self.beside else 0, "name": row["name"]} for row in found]
        entries = self.table[positions][self.column] if positions else []
        path = lambda e: e if isinstance(e, str) else e.get("path") or "" if isinstance(e, dict) else ""
        return [{"image": e, "beside": self.captions[p], "name": Path(path(e)).name} for p, e in zip(positions, entries)]

    def _entry(self, position: int):
        return self.table[position][self.column]

    def _shape(self, position: int) -> tuple[int, int]:
        return self.shapes[self.bucket[position]] if self.bucket else self.size

    def _at(self, position: int, shape: tuple[int, int]):
        return position if shape == self._shape(position) else (position, shape)

    def _open(self, position: int, row: dict, shape: tuple[int, int]):
        """(key, (function giving the entry, shape, pixels or None)) of one row, or what is wrong with it; runs in a thread."""
        if position in self.tally.bad:
            return "known"
        try:
            at = self._at(position, shape)
            key = self.keys.get(at)
            if key is None:
                key = digest(_bytes(row["image"]), f"{shape} {self.frames if self.moving else 1} {self.spec.fps}")
                if self.stream is None:
                    self.keys[at] = key
            pixels = None if key in self.cache else self.ready.get(key)
            return key, (lambda: row["image"], shape, self._decode(row["image"], shape) if pixels is None and key not in self.cache else pixels)
        except UserError:
            raise
        except Exception as error:  # Pillow and PyAV raise OSError, SyntaxError, struct.error and more
            return error

    def _decode(self, entry: dict, shape: tuple[int, int]) -> Tensor:
        """uint8 [3 or 1, H, W], or [3 or 1, F, H, W] of a clip."""
        from . import _decode
        if self.moving:
            return clips.decode(_bytes(entry), self.frames, shape, self.spec.fps, self.channels)
        return torch.from_numpy(_decode(entry, shape, self.channels).copy()).permute(2, 0, 1)

    def _encode(self, fresh: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """key -> {"x0": latents} of the pictures, encoded now; the pictures themselves where there is no encoder."""
        if fresh and not self.raw:
            self.ready = fresh
            before_network()
            self.ready = {}
        picture = lambda pixels: pixels if self.raw else self.model.encode(_signed(pixels[None]))[0].cpu()
        made = {key: {"x0": picture(pixels)} for key, pixels in fresh.items()}
        self.cache.put(made)
        return made


def _signed(pixels: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def _undecoded(table, column: str):
    """The table with entries {"bytes", "path"} in its column."""
    from datasets import Image, Video
    table = table.select_columns(column)
    kind = type(table.features[column])                # animated pictures are clips, too
    return table.cast_column(column, kind(decode=False)) if kind in (Image, Video) else table


def _bytes(entry) -> bytes:
    """The file behind an entry of a table: {"bytes", "path"}, a path, or the bytes themselves."""
    if isinstance(entry, bytes):
        return entry
    if isinstance(entry, str):
        return Path(entry).read_bytes()
    if entry is None:
        raise ValueError("no picture in this row")
    return entry["bytes"] or Path(entry["path"]).read_bytes()
