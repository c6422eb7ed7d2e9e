"""A small Fashion-MNIST classifier: are class-conditional samples of the class they were asked for?

LeNet-sized; its weights ship with the package and are made by `train_scripts/make_classifier.py`.
"""
from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent.parent / "assets" / "fashion" / "classifier.safetensors"


class Classifier(nn.Module):
    """Images [B, 1, 32, 32] in [-1, 1] (28x28 padded by 2 with -1) to logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()

        def block(i: int, o: int) -> list[nn.Module]:
            return [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]

        self.trunk = nn.Sequential(*block(1, 16), *block(16, 32), *block(32, 64), nn.Flatten(),
                                   nn.Linear(64 * 4 * 4, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """The penultimate layer, [B, 64], non-negative."""
        return self.trunk(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def load() -> Classifier:
    """The trained classifier on the CPU, in evaluation mode and without gradients to its weights."""
    net = Classifier()
    net.load_state_dict(load_file(WEIGHTS))
    return net.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Share of images [N, 1, 32, 32] that `net` gives their label [N] (int), between 0 and 1."""
    guess = torch.cat([net(x).argmax(1) for x in images.split(batch)])
    return (guess == labels.to(guess.device)).float().mean().item()
