"""Adapters for the emoji teacher, as people make them for a big one: a style LoRA, a ControlNet and an IP-Adapter, trained on the embedded
set and on the teacher alone. Whether they serve its few-step student is what `run.py` measures.

    python benchmarks/downstream/make_adapters.py                      # all of them; the same line resumes, and does nothing when done
    python benchmarks/downstream/make_adapters.py --only lora --chunk 120

lora         a LoRA (peft) on pictures painted blue on white (`parts.delft`), saved as stock pytorch_lora_weights.safetensors
controlnet   a stock ControlNetModel begun from the teacher's UNet; its control is the silhouette of the picture
encoder      a small CLIPVisionModelWithProjection that learns the picture in thumbnail and the meaning of its caption, then is frozen
ip_adapter   keys and values for four image tokens beside the words, in the layout `pipe.load_ip_adapter` reads (needs the encoder)

Only pictures of split "train" are used. The loss is the teacher's own: |v - (alpha eps - sigma x0)|^2, times drawn denser towards noise,
where layout and colours are decided. Everything lies under outputs/downstream; checkpoints and results are safetensors."""
from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import parts
from zoo.hub.downstream import IP_WEIGHTS, silhouette

SECONDS = {"lora": 90.0, "controlnet": 110.0, "encoder": 60.0, "ip_adapter": 70.0}      # of training, over all resumed parts


@dataclass
class Config:
    only: tuple[str, ...] = tuple(SECONDS)
    seconds: float = 0.0           # of training of each instead of SECONDS
    chunk: float = 0.0             # stop after so many seconds of this call; the same line goes on (0: when done)
    batch: int = 48
    seed: int = 0
    threads: int = 1
    out: Path = parts.MADE


class Teacher:
    """The frozen teacher and its data: latents, prompts and pictures of the training split."""

    def __init__(self, cfg: Config):
        from diffusers.models.attention_processor import AttnProcessor

        from zoo import data
        from zoo.backbones import load
        self.cfg, self.model = cfg, load("emoji")
        self.pipe, self.unet = self.model.pipe, self.model.module
        self.unet.set_attn_processor(AttnProcessor())              # its backward pass is the faster one on a CPU for so few tokens
        pixels, table = data.load("emoji", 64, 3)
        self.pixels, self.captions = pixels[list(range(len(table)))], list(table["caption"])
        self.words = torch.cat([self.model.encode_prompts(self.captions[i:i + 256]) for i in range(0, len(table), 256)])
        self.empty = self.model.encode_prompts([""])
        table = self.pipe.scheduler.alphas_cumprod
        self.alpha, self.sigma = table.sqrt(), (1 - table).sqrt()

    @cached_property
    def latents(self) -> Tensor:
        return self._kept("plain", lambda: self.pixels)

    @cached_property
    def styled(self) -> Tensor:
        return self._kept("delft", lambda: torch.from_numpy(parts.delft((self.pixels.permute(0, 2, 3, 1).numpy() + 1) / 2)).float().permute(0, 3, 1, 2) * 2 - 1)

    @cached_property
    def silhouettes(self) -> Tensor:
        """[N, 3, 64, 64], 0 or 1."""
        return torch.from_numpy(silhouette((self.pixels.permute(0, 2, 3, 1).numpy() + 1) / 2)).float()[:, None].expand(-1, 3, -1, -1)

    def _kept(self, name: str, make) -> Tensor:
        path = self.cfg.out / f"latents-{name}.safetensors"
        if not path.exists():
            save_file({"x0": self.model.encode(make()).contiguous()}, path)
        return load_file(path)["x0"]

    def draw(self, latents: Tensor, drop: float) -> dict:
        """A batch: item numbers, x_t, t, target v, and words of which a share `drop` is emptied."""
        n = self.cfg.batch
        i, eps = torch.randint(len(latents), (n,)), torch.randn(n, *latents.shape[1:])
        t = (999 * (1 - torch.rand(n) ** 2)).round().long()
        a, s = self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)
        words = torch.where(torch.rand(n, 1, 1) < drop, self.empty, self.words[i])
        return {"i": i, "x": a * latents[i] + s * eps, "t": t, "v": a * eps - s * latents[i], "words": words}


def lora(teacher: Teacher):
    """(parameters, loss, export, learning rate) of the style LoRA."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    unet = teacher.unet
    latents = teacher.styled
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv1", "conv2"]))

    def loss():
        b = teacher.draw(latents, 0.1)
        return F.mse_loss(unet(b["x"], b["t"], b["words"]).sample.float(), b["v"])

    def export():
        StableDiffusionPipeline.save_lora_weights(teacher.cfg.out / "delft", unet_lora_layers=get_peft_model_state_dict(unet),
                                                  **_collate_lora_metadata({"unet": unet}))
    return [p for p in unet.parameters() if p.requires_grad], loss, export, 1e-3


def controlnet(teacher: Teacher):
    from diffusers import ControlNetModel
    from diffusers.models.attention_processor import AttnProcessor
    net = ControlNetModel.from_unet(teacher.unet, conditioning_embedding_out_channels=(8, 16, 32))      # two halvings: 64 pixels to 16 latents
    net.set_attn_processor(AttnProcessor())
    net.requires_grad_(True)
    # The stock class begins with zeros on both ends of the side network; zeros at its exit alone keep the teacher as it was and learn sooner.
    net.controlnet_cond_embedding.conv_out.reset_parameters()
    latents, shapes = teacher.latents, teacher.silhouettes

    def loss():
        b = teacher.draw(latents, 0.8)        # told the caption, the teacher knows its picture, and nothing is learnt from the control
        down, mid = net(b["x"], b["t"], b["words"], shapes[b["i"]], return_dict=False)
        v = teacher.unet(b["x"], b["t"], b["words"], down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
        return F.mse_loss(v.float(), b["v"])
    return list(net.parameters()), loss, lambda: net.save_pretrained(teacher.cfg.out / "controlnet"), 2e-3


def make_encoder():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    return CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                                                          image_size=64, patch_size=8, projection_dim=128))


def as_clip(pixels: Tensor) -> Tensor:
    """Pictures in [-1, 1] as the stock CLIPImageProcessor gives them."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((pixels + 1) / 2 - mean) / std


def encoder(teacher: Teacher):
    """What a CLIP would bring along, learnt here from nothing: its embedding must tell the thumbnail and, among the batch, the caption."""
    net, meaning = make_encoder(), teacher.words.mean(1)
    meaning = F.normalize(meaning - meaning.mean(0), dim=1)
    thumbnails = F.adaptive_avg_pool2d(teacher.pixels, 8).flatten(1)
    head = torch.nn.ModuleDict({"thumbnail": torch.nn.Linear(128, thumbnails.shape[1]), "meaning": torch.nn.Linear(128, meaning.shape[1])})

    def loss():
        i = torch.randint(len(meaning), (2 * teacher.cfg.batch,))
        found = net(as_clip(teacher.pixels[i])).image_embeds.float()
        said = 10 * F.normalize(head["meaning"](found), dim=1) @ meaning[i].T
        return F.mse_loss(head["thumbnail"](found), thumbnails[i]) + 0.05 * F.cross_entropy(said, torch.arange(len(i)))
    return [*net.parameters(), *head.parameters()], loss, lambda: net.save_pretrained(teacher.cfg.out / "ip_adapter/image_encoder"), 1e-3


def ip_adapter(teacher: Teacher):
    from diffusers.models.attention_processor import AttnProcessor, IPAdapterAttnProcessor
    from transformers import CLIPVisionModelWithProjection
    folder, unet, width = teacher.cfg.out / "ip_adapter", teacher.unet, teacher.words.shape[-1]
    eyes = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").eval()
    with torch.no_grad():
        seen = torch.cat([eyes(as_clip(part)).image_embeds for part in teacher.pixels.split(256)])
    # The layout of the file: "image_proj.*", and "ip_adapter.N.to_k_ip.weight" with N = 1, 3, 5 ... over the cross-attentions.
    start = {"proj.weight": 0.05 * torch.randn(4 * width, seen.shape[1]), "proj.bias": torch.zeros(4 * width),
             "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    # Values of zero: it begins as the teacher it is put on.
    crossed = [n for n in unet.attn_processors if n.endswith("attn2.processor")]
    keys = {}
    for n, name in enumerate(crossed):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        keys |= {f"{2 * n + 1}.to_k_ip.weight": attention.to_k.weight.detach().clone(), f"{2 * n + 1}.to_v_ip.weight": torch.zeros_like(attention.to_v.weight)}
    unet._load_ip_adapter_weights([{"image_proj": start, "ip_adapter": keys}], low_cpu_mem_usage=False)
    for name, processor in list(unet.attn_processors.items()):        # the kind with the faster backward pass, with the same parameters
        if name in crossed:
            plain = IPAdapterAttnProcessor(processor.hidden_size, processor.cross_attention_dim, processor.num_tokens, 1.0)
            plain.load_state_dict(processor.state_dict())
            unet.get_submodule(name.removesuffix(".processor")).processor = plain
        else:
            unet.get_submodule(name.removesuffix(".processor")).processor = AttnProcessor()
    project, read = unet.encoder_hid_proj.image_projection_layers[0], [unet.attn_processors[n] for n in crossed]
    owned, latents = torch.nn.ModuleList([project, *read]).requires_grad_(True), teacher.latents

    def loss():
        b = teacher.draw(latents, 0.5)
        given = torch.where(torch.rand(len(b["i"]), 1) < 0.1, torch.zeros(()), seen[b["i"]])       # the stock unguided half sees zeros
        v = unet(b["x"], b["t"], b["words"], added_cond_kwargs={"image_embeds": [given[:, None]]}).sample
        return F.mse_loss(v.float(), b["v"])

    def export():
        state = {f"image_proj.{k.replace('image_embeds', 'proj')}": v for k, v in project.state_dict().items()}
        for n, processor in enumerate(read):
            state |= {f"ip_adapter.{2 * n + 1}.to_{x}_ip.weight": getattr(processor, f"to_{x}_ip")[0].weight for x in "kv"}
        save_file({k: v.detach().contiguous().clone() for k, v in state.items()}, folder / IP_WEIGHTS)
    return list(owned.parameters()), loss, export, 2e-3


def train(name: str, cfg: Config, until: float) -> bool:
    """Train one adapter for its seconds, or until the clock says `until`; whether it is done."""
    path, wanted = cfg.out / f"{name}.state.safetensors", cfg.seconds or SECONDS[name]
    step, spent = 0, 0.0
    if path.exists():
        with safe_open(path, "pt") as f:
            step, spent = int(f.metadata()["step"]), float(f.metadata()["seconds"])
    if spent >= wanted:
        return True
    torch.manual_seed(cfg.seed + step)
    parameters, loss, export, lr = globals()[name](Teacher(cfg))          # a teacher of its own: each adapter changes the network it is on
    optimizer = torch.optim.Adam(parameters, lr, betas=(0.9, 0.99))
    if path.exists():
        state = load_file(path)
        for i, p in enumerate(parameters):
            p.data.copy_(state[f"{i}.value"])
            optimizer.state[p] = {k: state[f"{i}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
    losses, clock = [], time.time()
    while spent < wanted and time.time() < until:
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * spent / wanted)) / 2
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step, now = step + 1, time.time()
        spent, clock = spent + now - clock, now
        losses.append(value.item())
        if step % 50 == 0 or spent >= wanted:
            record = {"adapter": name, "step": step, "seconds": round(spent, 1), "loss": round(sum(losses) / len(losses), 4), "batch": cfg.batch,
                      "parameters": sum(p.numel() for p in parameters)}
            losses.clear()
            print(record, flush=True)
            with open(cfg.out / "log.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")
    state = {f"{i}.{k}": v for i, p in enumerate(parameters) for k, v in ({"value": p.detach()} | dict(optimizer.state[p])).items()}
    save_file({k: v.contiguous().clone() for k, v in state.items()}, path.with_suffix(".new"), {"step": str(step), "seconds": str(spent)})
    os.replace(path.with_suffix(".new"), path)
    export()
    return spent >= wanted


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    cfg.out.mkdir(parents=True, exist_ok=True)
    until = time.time() + cfg.chunk if cfg.chunk else math.inf
    for name in cfg.only:
        done = train(name, cfg, until)
        print(f"{name}: {'done' if done else 'to be continued'}")
        if not done:
            return


if __name__ == "__main__":
    main(tyro.cli(Config))
