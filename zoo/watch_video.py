"""Watching a causal video student: as a student of pictures, its clips shown as mosaics of frames, and measured where the truth is known."""
from __future__ import annotations

import dataclasses

import torch

from . import rollout_causal
from .watch import Watcher


class VideoWatcher(Watcher):
    """Made by `Run.watch` for rule "causal". layout: how the student is rolled out."""

    opened_by = "zoo.load"
    cell = 128

    def __init__(self, run, student, times, rule: str, layout: rollout_causal.Layout):
        super().__init__(run, student, times, rule)
        self.layout = layout
        self.contract = dataclasses.replace(self.contract, layout={"shape": list(run.model.shape), **dataclasses.asdict(layout)})

    @torch.no_grad()
    def sample(self, k, n, examples):
        """Student clips [n, F, C, H, W] with k steps a chunk, fixed noise."""
        noise, fresh = self._noise(n)
        draws = iter([lambda: noise, *[fresh] * k])
        with self.run.accelerator.autocast():
            return rollout_causal.clip(self.net, self._conditions(n, examples)[0], self.trained[k], self.layout, lambda: next(draws)())

    def extra(self, latents):
        return self.run.model.measure(latents, self.examples.names[: len(latents)])
