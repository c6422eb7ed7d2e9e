"""Captioned clips of one sprite moving on a white canvas, and closed-form measurement of clips somebody generated.

    clips = Sprites()                                # ten emoji, 16 frames of 32x32
    video, captions = clips[torch.arange(8)]         # [8, 16, 3, 32, 32] in [-1, 1], "rocket moving up left fast" ...
    clips.measure(generated, captions)               # does each sprite go where physics says?

A clip is a function of its index: a caption (sprite, direction, speed) and a start. Velocity is constant between elastic walls, so
the true position at any time is closed-form, however long the video. Videos are [B, F, C, H, W], positions (y, x) of the sprite's
upper left corner in pixels."""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

WHITE = 1.0
EMOJI = ("red heart", "sunflower", "frog", "soccer ball", "red apple", "rocket", "pizza", "ghost", "butterfly", "penguin")     # Noto, Apache-2.0
SHAPES = ("disk", "cross", "ring", "square")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0),
              "up left": (-1, -1), "up right": (-1, 1), "down left": (1, -1), "down right": (1, 1)}
SPEEDS = {"slowly": 1.0, "": 1.5, "fast": 2.0}       # pixels a frame


@dataclass(frozen=True)
class State:
    """What a clip is made from: sprite [B] (its number), start and velocity [B, 2] in pixels and pixels a frame."""
    sprite: Tensor
    start: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class Sprites:
    """names: sprites, of EMOJI or SHAPES; side: their size in pixels; channels: 3, or 1 for grey; directions: how many of DIRECTIONS;
    speeds: word -> pixels a frame. 65,536 clips."""
    frames: int = 16
    size: int = 32
    side: int = 12
    channels: int = 3
    names: tuple[str, ...] = EMOJI
    directions: int = 8
    speeds: tuple[tuple[str, float], ...] = tuple(SPEEDS.items())
    seed: int = 0

    def __len__(self):
        return 65_536

    # -------------------------------------------------------------------------------------------------------------- clips
    @cached_property
    def captions(self) -> list[str]:
        """Every caption; clip i has caption i modulo their number."""
        moves = product(self.names, list(DIRECTIONS)[: self.directions], [word for word, _ in self.speeds])
        return [f"{name} moving {direction} {word}".strip() for name, direction, word in moves]

    @cached_property
    def templates(self) -> Tensor:
        """The sprites on white, [K, C, side, side] in [-1, 1]."""
        return torch.stack([_shape(n, self.side).expand(self.channels, -1, -1) if n in SHAPES else _emoji(n, self.side, self.channels) for n in self.names])

    @cached_property
    def _starts(self) -> Tensor:
        return torch.rand(len(self), 2, generator=torch.Generator().manual_seed(self.seed))

    def states(self, captions: list[str], start: Tensor) -> State:
        """What those captions say, from `start` [B, 2]."""
        number = torch.tensor([self.captions.index(c) for c in captions])
        per_sprite = self.directions * len(self.speeds)
        way = torch.tensor(list(DIRECTIONS.values())[: self.directions], dtype=torch.float32)
        way = way / way.norm(dim=1, keepdim=True)
        speed = torch.tensor([v for _, v in self.speeds])
        turn = number % per_sprite
        return State(number // per_sprite, start, way[turn // len(self.speeds)] * speed[turn % len(self.speeds), None])

    def positions(self, state: State, frames: int) -> Tensor:
        """[B, frames, 2]: straight lines folded at the walls."""
        room = self.size - self.side
        line = state.start[:, None] + state.velocity[:, None] * torch.arange(frames, device=state.start.device)[:, None]
        return room - ((line % (2 * room)) - room).abs()

    def render(self, sprite: Tensor, positions: Tensor) -> Tensor:
        """Videos [B, F, C, size, size] of sprites [B] at positions [B, F, 2], moved by bilinear interpolation."""
        b, f = positions.shape[:2]
        ink = F.pad(WHITE - self.templates.to(positions.device)[sprite], (1, 1, 1, 1))        # interpolates to nothing outside
        ink = ink.repeat_interleave(f, 0)
        pixels = torch.arange(self.size, device=positions.device, dtype=positions.dtype)
        place = (pixels - positions.flatten(0, 1)[..., None] + 1) / (self.side + 1) * 2 - 1                # [B F, 2, size]
        y, x = place[:, 0, :, None].expand(-1, -1, self.size), place[:, 1, None].expand(-1, self.size, -1)
        drawn = F.grid_sample(ink, torch.stack([x, y], -1), align_corners=True)
        return (WHITE - drawn).unflatten(0, (b, f))

    def __getitem__(self, index: Tensor) -> tuple[Tensor, list[str]]:
        """The clips of these indices [B] and their captions."""
        captions = [self.captions[i % len(self.captions)] for i in index.tolist()]
        state = self.states(captions, self._starts[index] * (self.size - self.side))
        return self.render(state.sprite, self.positions(state, self.frames)), captions

    # -------------------------------------------------------------------------------------------------------------- measurement
    def track(self, video: Tensor, sprite: Tensor) -> tuple[Tensor, Tensor]:
        """Where each frame shows sprite [B], positions [B, F, 2], and how well, normalised correlation [B, F] in [-1, 1].

        The best whole pixel by correlation, then the centre of the ink around it; exact for a clean sprite."""
        b, f = video.shape[:2]
        ink = (WHITE - video.float()).flatten(0, 1)
        template = (WHITE - self.templates.to(video.device))[sprite].repeat_interleave(f, 0)
        n, s = len(ink), self.side
        inner = F.conv2d(ink.flatten(0, 1)[None], template, groups=n)[0]                        # [B F, room + 1, room + 1]
        energy = F.avg_pool2d(ink.square().sum(1, keepdim=True), s, 1)[:, 0] * s * s
        score = inner / (energy.clamp(min=1e-3 * s * s).sqrt() * template.flatten(1).norm(dim=1)[:, None, None])
        best, where = score.flatten(1).max(1)
        corner = torch.stack([where // score.shape[2], where % score.shape[2]], 1)
        pixels = torch.arange(self.size, device=video.device)
        near = ((pixels >= corner[..., None] - 1) & (pixels <= corner[..., None] + s)).float()      # [B F, 2, size]
        mass = ink.sum(1).clamp(min=0) * near[:, 0, :, None] * near[:, 1, None]
        centre = lambda m: torch.stack([(m.sum(2) * pixels[: m.shape[1]]).sum(1),
                                        (m.sum(1) * pixels[: m.shape[2]]).sum(1)], 1) / m.sum((1, 2)).clamp(min=1e-6)[:, None]
        found = torch.where(mass.sum((1, 2))[:, None] > 1e-3, centre(mass) - centre(template.sum(1)), corner.float())
        return found.unflatten(0, (b, f)), best.unflatten(0, (b, f))

    def measure(self, video: Tensor, captions: list[str], chunk: int = 0) -> dict[str, float]:
        """Means over videos [B, F, C, H, W] of

        track     distance to the true path, pixels, frame 0 giving the start and the caption the velocity
        lasts     frames until it is lost: further than size / 8 from the path, or matching worse than 0.6
        match     correlation with the captioned sprite;  named: share of frames in which it matches best
        psnr      of a frame against a clean sprite where it stands, dB
        motion    path length over the true one (0: frozen);  still: share of steps shorter than 0.1 pixel
        flicker   high-pass energy of the second difference in time; with `chunk`, seam: its value at chunk borders over inside"""
        video = video.float().clamp(-1, 1)
        frames = video.shape[1]
        state = self.states(captions, torch.zeros(len(captions), 2))
        state = State(*(v.to(video.device) for v in (state.sprite, state.start, state.velocity)))
        found, match = self.track(video, state.sprite)
        true = self.positions(State(state.sprite, found[:, 0].clamp(0, self.size - self.side), state.velocity), frames)
        off = (found - true).norm(dim=2)
        lost = (off > self.size / 8) | (match < 0.6)
        others = torch.stack([self.track(video, (state.sprite + k) % len(self.names))[1] for k in range(1, len(self.names))])
        error = (video - self.render(state.sprite, found)).square().flatten(2).mean(2)
        step, true_step = (p.diff(dim=1).norm(dim=2) for p in (found, true))
        out = {"track": off[:, 1:].mean(), "lasts": torch.where(lost.any(1), lost.float().argmax(1), frames).float().mean(),
               "match": match.mean(), "named": (match > others.max(0).values).float().mean(),
               "psnr": (10 * torch.log10(4 / error.clamp(min=1e-9))).mean(),
               "motion": step.sum() / true_step.sum().clamp(min=1e-6), "still": (step < 0.1).float().mean()}
        if frames > 2:
            flat = video.flatten(0, 1)
            sharp = (flat - F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), 3, 1)).view_as(video)
            jump = sharp.diff(dim=1).diff(dim=1).square().flatten(2).mean((0, 2))                   # [F - 2], about frame 1 .. F - 2
            out["flicker"] = jump.mean()
            if chunk:
                after = torch.arange(1, frames - 1) % chunk
                border = (after == 0) | (after == chunk - 1)
                if border.any() and not border.all():
                    out["seam"] = jump[border.to(jump.device)].mean() / jump[~border.to(jump.device)].mean().clamp(min=1e-9)
        return {k: float(v) for k, v in out.items()}

    def drift(self, video: Tensor, captions: list[str], segments: int = 5) -> dict[str, float]:
        """Slopes over `segments` equal parts of a long video of brightness, sharpness, match and motion, each in standard deviations
        of its value over clean clips from one end of the video to the other, and `drift`, the mean of their magnitudes."""
        def traits(v, names):
            sprite = self.states(names, torch.zeros(len(names), 2)).sprite.to(v.device)
            sharp = v.diff(dim=3).square().flatten(2).mean(2)[:, 1:] + v.diff(dim=4).square().flatten(2).mean(2)[:, 1:]
            return {"brightness": v.flatten(2).mean(2)[:, 1:], "sharpness": sharp, "match": self.track(v, sprite)[1][:, 1:],
                    "motion": v.diff(dim=1).abs().flatten(2).mean(2)}
        x = torch.linspace(-0.5, 0.5, segments)
        clean = traits(*self[torch.arange(256)])
        out = {}
        for name, value in traits(video.float().clamp(-1, 1), captions).items():
            parts = torch.stack([part.mean() for part in value.cpu().tensor_split(segments, 1)])
            out[name] = float((x * parts).sum() / x.square().sum() / clean[name].std().clamp(min=1e-3))
        return out | {"drift": sum(map(abs, out.values())) / len(out)}


def _shape(name: str, side: int) -> Tensor:
    """A black figure on white, antialiased, [1, side, side]."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    radius, wide = (x**2 + y**2).sqrt(), torch.maximum(x.abs(), y.abs())
    depth = {"disk": 0.95 - radius, "ring": 0.3 - (radius - 0.65).abs(), "square": 0.8 - wide,
             "cross": torch.minimum(0.3 - torch.minimum(x.abs(), y.abs()), 0.95 - wide)}[name]
    return WHITE - 2 * (depth * side / 2 + 0.5).clamp(0, 1)[None]


def _emoji(name: str, side: int, channels: int) -> Tensor:
    """The Noto emoji of that name on white, [channels, side, side]."""
    import numpy as np

    from . import emoji
    table = emoji("all")
    picture = table[table["caption"][:].index(f"noto {name}")]["image"]
    pixels = torch.from_numpy(np.array(picture.convert("RGB" if channels == 3 else "L"))).float() / 127.5 - 1
    pixels = pixels.permute(2, 0, 1) if channels == 3 else pixels[None]
    return F.interpolate(pixels[None], (side, side), mode="bilinear", antialias=True)[0]
