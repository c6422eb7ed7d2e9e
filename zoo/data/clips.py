"""Video files as frames: PyAV for films, Pillow for animated pictures."""
from __future__ import annotations

import io

import torch
from torch import Tensor

from ..errors import UserError

FILMS = {".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v"}
ANIMATED = {".gif", ".webp", ".apng"}
VIDEO_TYPES = FILMS | ANIMATED


class TooShort(ValueError):
    """A clip with fewer frames than a sample of the model has. said: what a count of bad items says of it."""

    @property
    def said(self) -> str:
        return str(self)


def decode(raw: bytes, frames: int, size: tuple[int, int], fps: float = 0.0, channels: int = 3) -> Tensor:
    """uint8 [channels, frames, H, W] of the file in `raw`, in colour (3) or grey (1): consecutive frames from its beginning, scaled to cover
    `size` = (H, W) and cropped at the centre. fps > 0: the frames shown at 0, 1/fps, 2/fps ... seconds. Raises ValueError for clips that are too
    short or no clips at all."""
    import numpy as np
    from PIL import Image, ImageOps
    chosen, shown, count = [], None, 0
    for time, picture in _frames(raw):
        count += 1
        if not fps:
            chosen.append(picture)
        else:
            while shown is not None and len(chosen) < frames and len(chosen) / fps < time - 1e-6:
                chosen.append(shown)
            shown = picture
        if len(chosen) >= frames:
            break
    if fps and shown is not None and len(chosen) < frames and len(chosen) / fps <= time + 1e-6:
        chosen.append(shown)
    if len(chosen) < frames:
        raise TooShort(f"{count} frames{f', {len(chosen)} at {fps:g} a second' if fps else ''}; {frames} are needed")
    fitted = [np.asarray(ImageOps.fit(p.convert("L" if channels == 1 else "RGB"), size[::-1], Image.Resampling.LANCZOS)) for p in chosen]
    return torch.from_numpy(np.stack(fitted).reshape(frames, *size, channels)).permute(3, 0, 1, 2)


def on_white(picture):
    """A Pillow image, its transparency as white."""
    from PIL import Image
    if not picture.has_transparency_data:
        return picture
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


def _frames(raw: bytes):
    """(seconds, picture) one after another."""
    if _animated(raw):
        from PIL import Image
        with Image.open(io.BytesIO(raw)) as film:
            seconds = 0.0
            for i in range(getattr(film, "n_frames", 1)):
                film.seek(i)
                yield seconds, on_white(film).convert("RGB")
                seconds += film.info.get("duration", 0) / 1000 or 0.1
        return
    try:
        import av
    except ImportError:
        raise UserError("reading films needs PyAV, which is not installed: pip install fewstep[video], or give animated .gif or .webp files") from None
    with av.open(io.BytesIO(raw)) as film:
        start = None
        for frame in film.decode(video=0):
            start = frame.time if start is None else start
            picture = frame.to_image()
            yield (frame.time or 0.0) - (start or 0.0), picture.rotate(frame.rotation, expand=True) if frame.rotation else picture     # held upright


def _animated(raw: bytes) -> bool:
    return raw[:4] == b"GIF8" or raw[:8] == b"\x89PNG\r\n\x1a\n" or raw[:4] == b"RIFF" and raw[8:12] == b"WEBP"
