"""FID and CLIP score for users who have the packages and a network: both download their networks on first
use.

Wires to torch-fidelity (Inception-v3 as in the original FID code, with its resize) and to torchmetrics'
CLIPScore with transformers' CLIP. Imports are lazy; `pip install torch-fidelity torchmetrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zoo.errors import UserError

CLIP = "openai/clip-vit-base-patch16"


def as_uint8(images: Tensor) -> Tensor:
    """[N, 1 or 3, H, W] in [-1, 1] -> uint8 RGB on the CPU, rounded as when saved to PNG."""
    x = images.detach().float().cpu().clamp(-1, 1).expand(-1, 3, -1, -1)
    return ((x + 1) * 127.5).round().to(torch.uint8)


class _Images(torch.utils.data.Dataset):
    def __init__(self, images: Tensor):
        self.images = as_uint8(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


def fid(images: Tensor, reference: Tensor, *, batch: int = 64, feature_extractor: str | None = None,
        weights: str | None = None) -> float:
    """Frechet Inception distance by torch-fidelity. It is biased by the sample count: state it, use 10k or
    more.

    `weights`: local path of the Inception weights (else downloaded); `feature_extractor`: another extractor
    registered with torch-fidelity (the result is then not FID: name it accordingly).
    """
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
        raise UserError("FID needs torch-fidelity and the torchvision that matches this torch: "
                        f"pip install torch-fidelity ({error})") from error
    result = torch_fidelity.calculate_metrics(
        input1=_Images(images), input2=_Images(reference), fid=True, batch_size=batch,
        cuda=torch.cuda.is_available(), feature_extractor=feature_extractor,
        feature_extractor_weights_path=weights, save_cpu_ram=True, verbose=False)
    return float(result["frechet_inception_distance"])


def _clip(name: str):
    """Model and processor as torchmetrics wants them: embeddings as tensors, captions cut to the model's
    length."""
    from transformers import CLIPModel, CLIPProcessor

    # transformers >= 5 returns the whole output where torchmetrics 1.9 expects the tensor
    class Embeddings(CLIPModel):
        def get_image_features(self, *args, **kwargs):
            out = super().get_image_features(*args, **kwargs)
            return out if isinstance(out, Tensor) else out.pooler_output

        def get_text_features(self, *args, **kwargs):
            out = super().get_text_features(*args, **kwargs)
            return out if isinstance(out, Tensor) else out.pooler_output

    return Embeddings.from_pretrained(name, use_safetensors=True), CLIPProcessor.from_pretrained(name)


@torch.no_grad()
def clip_score(images: Tensor, prompts: Sequence[str], *, model: str = CLIP, batch: int = 64) -> float:
    """Mean of 100 cos(image, text), floored at 0 (Hessel et al., EMNLP 2021), by torchmetrics.

    `model`: a CLIP repository or local folder; always name it beside the score.
    """
    try:
        from torchmetrics.multimodal.clip_score import CLIPScore
    except ImportError as error:
        raise UserError(f"CLIP score needs torchmetrics: pip install torchmetrics ({error})") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    metric = CLIPScore(lambda: _clip(model)).to(device)
    pictures = as_uint8(images)
    for i in range(0, len(pictures), batch):
        metric.update(pictures[i:i + batch].to(device), list(prompts[i:i + batch]))
    return float(metric.compute())


def network_metrics(images: Tensor, reference: Tensor | None = None, prompts: Sequence[str] | None = None, *,
                    clip: str = CLIP) -> dict[str, float]:
    """`fid` where reference images are given, `clip_score` where prompts are. Raises UserError naming the
    package that is missing, or the network failure of a download."""
    jobs: dict[str, Callable[[], float]] = {}
    if reference is not None:
        jobs["fid"] = lambda: fid(images, reference)
    if prompts is not None:
        jobs["clip_score"] = lambda: clip_score(images, prompts, model=clip)
    results = {}
    for name, job in jobs.items():
        try:
            results[name] = job()
        except OSError as error:  # urllib's and huggingface_hub's failures are OSErrors
            message = f"{name} could not fetch its network (offline?): {error}"
            raise UserError(message.splitlines()[0]) from error
    return results
