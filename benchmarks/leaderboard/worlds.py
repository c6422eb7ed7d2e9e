"""Worlds of a teacher folder of one's own: what it is asked for, which real pictures are held out, and how its samples are told apart.

    avatars     a text-to-image teacher that `make_teacher.py` trained on avatars: are the attributes of a caption in the picture, also where
                no training caption had this combination of them?
    cifar10     a class-conditional pixel teacher that `make_fashion.py --images` trained on CIFAR-10: are the pictures of the class asked for?

Each is made from a `run.World` (cfg, model, n, device, features, kept) and has `names`; `cond` and `uncond` of n samples and, for avatars,
of more seeds; `groups` [P, S], samples of one condition; `real_images`, held out; `agree(images, features)`, measures of the n samples;
`facts(features of the real images)`, for board.json: what real pictures get in those measures, by the classifier that is fitted here."""
from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch

from zoo import data
from zoo.data.spec import parse
from zoo.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "train_scripts"))
from make_avatars import split_of  # noqa: E402
from measures import Classifier, Palette  # noqa: E402

LEARN = 4000          # training pictures that a classifier of attributes is fitted on
LEARN_CLASSES = 10_000
SEEDS, FIRST = 4, 24  # more seeds of the first captions, for diversity
NO_ATTRIBUTES = ("image", "caption", "split", "seed")
SHIPPED = data.ASSETS / "avatars" / "avatars.parquet"
CIFAR = ("the parquet files of https://huggingface.co/datasets/uoft-cs/cifar10 (folder plain_text) hold it, as in "
         "--data 'train-00000-of-00001.parquet?image=img' --test 'test-00000-of-00001.parquet?image=img'; folders with one subfolder a class do too")


def settle(world: str, place: str, test: str) -> tuple[str, str]:
    """(--data, --test) with absolute paths. Raises UserError for what a world cannot work with, before anything is trained."""
    if world == "avatars":
        if test:
            raise UserError(f"--test {test}: avatars hold out their own test pictures, one combination of attributes in five; leave it out")
        place = place or str(SHIPPED)
        if Path(place).suffix != ".parquet" or not Path(place).is_file():
            raise UserError(f"--data {place}: no such parquet file; leave it out for the shipped avatars, or make more with train_scripts/make_avatars.py")
        return str(Path(place).resolve()), ""
    for flag, value in (("--data", place), ("--test", test)):
        if not value or not Path(parse(value).place).exists():
            raise UserError(f"--world {world} needs training and test pictures, and there are none at {flag} {value or '(not given)'}: {CIFAR}")
    absolute = lambda text: text.replace(parse(text).place, str(Path(parse(text).place).resolve()), 1)
    return absolute(place), absolute(test)


def digest(place: str) -> str:
    """Of a file, or of the names and sizes in a folder: rows measured on other pictures do not compare."""
    path = Path(parse(place).place)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    listed = [f"{p.relative_to(path).as_posix()} {p.stat().st_size}" for p in sorted(path.rglob("*")) if p.is_file()]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()[:12]


def parts_of(table) -> tuple[list[int], list[int]]:
    """Rows of the training and of the held-out captions of a table of avatars: no combination of attributes is in both."""
    split = [split_of(caption) for caption in table["caption"]]
    return tuple([i for i, s in enumerate(split) if s == part] for part in ("train", "heldout"))


def training(world: str, place: str, work: Path) -> str:
    """The --data of the students. Held-out avatars are not in it, so what a method reads of a file, pictures or captions, is the teacher's."""
    if world != "avatars":
        return place
    path = work / f"train-{digest(place)}.parquet"
    if not path.exists():
        table = data.open_dataset(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        table.select(parts_of(table)[0]).to_parquet(path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    return str(path)


def numbered(column: list[str]) -> torch.Tensor:
    """Labels [N] of words."""
    words = sorted(set(column))
    return torch.tensor([words.index(word) for word in column])


class Avatars:
    """Of the n samples every other one has a training caption, the rest captions of combinations that are in none."""

    def __init__(self, world, g: torch.Generator):
        model, n = world.model, world.n
        if not hasattr(model, "encode_prompts"):
            raise UserError(f"--world avatars needs a text-to-image teacher (make_teacher.py), and {model.name} is a {model.family}")
        table = data.open_dataset(world.cfg.data)
        self.attributes = [name for name in table.column_names if name not in NO_ATTRIBUTES]
        if "caption" not in table.column_names or not self.attributes:
            raise UserError(f"{world.cfg.data} is not a table of avatars: it has no caption or no columns of attributes (train_scripts/make_avatars.py)")
        train, held = (torch.tensor(rows) for rows in parts_of(table))
        if min(len(train), len(held)) < 20:
            raise UserError(f"{world.cfg.data} has {len(train)} training and {len(held)} held-out avatars: 20 of each are needed")
        draw = lambda rows: rows[torch.randperm(len(rows), generator=g)]
        train, held = draw(train), draw(held)
        again = lambda rows: rows[torch.arange(n // 2) % len(rows)]
        rows = torch.stack([again(train), again(held)], 1).flatten()
        self.new = torch.arange(n) % 2 == 1
        self.groups = n + torch.arange(FIRST * SEEDS).reshape(FIRST, SEEDS)
        rows = torch.cat([rows, rows[torch.arange(FIRST) % n].repeat_interleave(SEEDS)])
        self.names = [table["caption"][i] for i in rows.tolist()]
        self.cond = {"prompt": model.encode_prompts(self.names)}
        self.uncond = {"prompt": model.encode_prompts([""]).expand(len(rows), -1, -1)}

        side = model.shape[-1] * 2 ** (len(model.pipe.vae.config.block_out_channels) - 1)
        read = lambda rows: data.images(table.select(rows.tolist()), side, 3)
        self.real_images = read(held[: max(n, 2000)])
        truth = torch.stack([numbered(list(table[name])) for name in self.attributes], 1)
        self.asked, self.shown = truth[rows[:n]], truth[held[: len(self.real_images)]]
        self.model, self.device, pictures = model, world.device, read(train[:LEARN])
        self.palette = Palette(pictures)
        self.guess = Classifier(self.palette(pictures), truth[train[:LEARN]])

    def right(self, images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """[N, attributes]: 1 where the picture is seen to have the attribute it should have."""
        return torch.cat([self.guess(self.palette(x)) == y for x, y in zip(images.split(500), truth.split(500))]).double()

    @torch.no_grad()
    def facts(self, real) -> dict:
        coded = torch.cat([self.model.decode(self.model.encode(x.to(self.device))).cpu() for x in self.real_images.split(100)])
        commonest = torch.stack([(column == column.mode().values).double() for column in self.shown.T], 1)
        named = lambda right: {f"agreement_{k}": round(v, 4) for k, v in zip(self.attributes, right.mean(0).tolist())}
        told = lambda right: {"agreement": round(right.mean().item(), 4)} | named(right)
        return {"agreement": "attribute accuracy", "credit": "Avatars in DiceBear's pixel-art style (CC0 1.0).",
                "real": {"held-out real pictures": told(self.right(self.real_images, self.shown)),
                         "the same through the autoencoder": told(self.right(coded, self.shown)),
                         "always the commonest answer": told(commonest)}}

    def agree(self, images, features) -> dict[str, float]:
        right = self.right(images, self.asked)
        named = {f"agreement_{name}": value for name, value in zip(self.attributes, right.mean(0).tolist())}
        return {"agreement": right.mean().item(), "agreement_trained": right[~self.new].mean().item(), "agreement_new": right[self.new].mean().item()} | named


class Classes:
    """Class accuracy, of a linear classifier on the features that the distances are measured in."""

    def __init__(self, world, g: torch.Generator):
        model, n = world.model, world.n
        if model.family != "pixel" or not model.classes:
            raise UserError(f"--world {world.cfg.world} needs a class-conditional pixel teacher (make_fashion.py --images), and {model.name} is none")
        classes, (channels, side, _) = model.classes - 1, model.shape
        self.label = torch.arange(n) % classes
        self.cond, self.uncond = {"label": self.label}, {"label": torch.full((n,), classes)}
        self.groups = torch.arange(n // classes * classes).reshape(-1, classes).T
        if self.groups.shape[1] < 2:
            raise UserError(f"--samples {n}: give at least two for each of {classes} classes")
        self.names = [f"class {i}" for i in self.label.tolist()]

        def read(place: str, at_most: int) -> tuple[torch.Tensor, torch.Tensor]:
            """Pictures drawn from the set, and their class numbers."""
            table = data.open_dataset(place)
            labels = list(table["label"]) if "label" in table.column_names else []
            if not labels or not all(isinstance(i, int) and 0 <= i < classes for i in labels):
                raise UserError(f"{place} has no class numbers from 0 to {classes - 1}, as the teacher knows them: {CIFAR}")
            images, rows = data.load(table.select(torch.randperm(len(labels), generator=g)[:at_most].tolist()), side, channels)
            return images, torch.tensor(list(rows["label"]))
        (train, labels), (self.real_images, self.shown) = read(world.cfg.data, LEARN_CLASSES), read(world.cfg.test, max(n, 2000))
        self.guess = Classifier(world.kept("features-train", lambda: world.features(train)), labels)

    def facts(self, real: torch.Tensor) -> dict:
        right = (self.guess(real)[:, 0] == self.shown).double().mean().item()
        return {"agreement": "class accuracy", "credit": "CIFAR-10 (Krizhevsky 2009).", "real": {"held-out real pictures": {"agreement": round(right, 4)}}}

    def agree(self, images, features) -> dict[str, float]:
        return {"agreement": (self.guess(features)[:, 0] == self.label).double().mean().item()}


WORLDS = {"avatars": Avatars, "cifar10": Classes}
