"""Sample grids: labelled rows of images on the same noise, as one PNG."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def to_uint8(images: Tensor):
    """[B, C, H, W] in [-1, 1] -> uint8 array [B, H, W, 3]."""
    images = images.detach().float().cpu().clamp(-1, 1)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def grid(rows: list[tuple[str, Tensor]], path: Path | str | None = None, columns: list[str] | None = None, cell: int = 64):
    """One labelled row per entry (label, images [n, C, H, W] in [-1, 1]); returns the PIL image, saved at `path` if given."""
    from PIL import Image, ImageDraw, ImageFont

    n = max(len(images) for _, images in rows)
    font = ImageFont.load_default()
    margin, top = 8 + max(int(font.getlength(label)) for label, _ in rows), 16 if columns else 4
    canvas = Image.new("RGB", (margin + n * (cell + 2), top + len(rows) * (cell + 2)), "white")
    draw = ImageDraw.Draw(canvas)
    for j, name in enumerate((columns or [])[:n]):
        while font.getlength(name) > cell and len(name) > 1:
            name = name[:-1]
        draw.text((margin + j * (cell + 2), 2), name, fill="black", font=font)
    for i, (label, images) in enumerate(rows):
        y = top + i * (cell + 2)
        draw.text((4, y + cell // 2 - 6), label, fill="black", font=font)
        for j, image in enumerate(to_uint8(images)):
            canvas.paste(Image.fromarray(image).resize((cell, cell), Image.LANCZOS if image.shape[0] > cell else Image.NEAREST),
                         (margin + j * (cell + 2), y))
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        canvas.save(path)
    return canvas
