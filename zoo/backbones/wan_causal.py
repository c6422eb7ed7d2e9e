"""A stock Wan transformer called causally: its own weights, modules and forward pass, with another self-attention processor.

Everything a call needs (positions, mask, cached keys) travels as one `Call` through the argument that carries the rotary tables."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from ..errors import UserError
from ..rollout_causal import Layout


class Call:
    """What every self-attention layer needs of one causal call. The rotary module returns it in place of its tables, so the blocks hand
    it on, and activation checkpointing keeps it for the recomputation.

    tables: the stock cosines and sines [1, frames * tokens, 1, dim]; own, seen: rotary positions (frame numbers) of the frames of x and
    of all that is attended to; mask: frames x frames, bool, or None for everything; past: `Cache.layers`; fresh: filled with this
    call's keys and values per layer when it is a dict."""

    def __init__(self, tables, tokens: int, own: Tensor, seen: Tensor, mask: Tensor | None = None, past: dict | None = None, fresh: dict | None = None):
        rows = lambda at: tuple(t.unflatten(1, (-1, tokens))[:, at].flatten(1, 2) for t in tables)
        self.queries, self.keys, self.past, self.fresh = rows(own), rows(seen), past or {}, fresh
        self.mask = None if mask is None else mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)

    def attend(self, layer: int, attn: nn.Module, x: Tensor) -> Tensor:
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        if self.fresh is not None:
            self.fresh[layer] = k, v
        if layer in self.past:
            k, v = (torch.cat([old.to(new), new], 1) for old, new in zip(self.past[layer], (k, v)))
        q, k, v = (y.unflatten(2, (attn.heads, -1)) for y in (q, k, v))
        q, k = rotate(q, *self.queries), rotate(k, *self.keys)
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), attn_mask=self.mask)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2).type_as(x)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs: (a, b) -> (a cos - b sin, b cos + a sin); tables repeat each value for its pair."""
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    return (x * cos + turned * sin).type_as(x)


class CausalAttention(WanAttnProcessor):
    """The stock processor of a self-attention layer, but for calls that carry a `Call`."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if isinstance(rotary_emb, Call):
            return rotary_emb.attend(self.layer, attn, hidden_states)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


def open_attention(module: nn.Module) -> None:
    """Let a stock Wan transformer be called causally (`with_call`); otherwise it stays what it is. No-op the second time."""
    if "causal_call" not in module.rope.__dict__:
        module.rope.causal_call = None
        module.rope.register_forward_hook(lambda rope, _args, tables: rope.causal_call or tables)
        for i, block in enumerate(module.blocks):
            block.attn1.set_processor(CausalAttention(i))


def with_call(module: nn.Module, call: Call, *args) -> Tensor:
    """The module's own forward pass, its self-attention by `call`."""
    module.rope.causal_call = call
    try:
        return module(*args, return_dict=False)[0]
    finally:
        module.rope.causal_call = None


def rope_tables(module: nn.Module, x: Tensor, frames: int):
    """The module's rotary tables for frames 0 .. frames - 1 of the size of x [B, C, F, H, W]."""
    longest = module.rope.max_seq_len
    if frames > longest:
        raise UserError(f"frame {frames} is beyond the {longest} this network has positions for: train with --slots, or start a new video")
    return module.rope(x.new_empty(()).expand(1, x.shape[1], frames, *x.shape[3:]))


def causal_forward(layout: Layout, module: nn.Module, x: Tensor, timestep: Tensor, cond: dict) -> Tensor:
    """Wan's raw output for the frames x [B, f, C, H, W], seeing what `layout` lets them see: of x itself, or with cond["cache"] (a
    `Cache`) of the frames before x, and all of x, which is then the next chunk. timestep [B], or [B, f]: a level per frame."""
    cache, z, frames = cond.get("cache"), x.transpose(1, 2).to(module.patch_embedding.weight.dtype), x.shape[1]
    _, height, width = module.config.patch_size
    tokens = (x.shape[3] // height) * (x.shape[4] // width)
    own = torch.arange(frames, device=x.device)
    if cache is None:
        seen, mask, past, fresh = own, layout.sees(own, own), {}, None
    else:
        seen = torch.cat([torch.tensor(cache.frames, dtype=torch.long, device=x.device), own + cache.next])
        seen = torch.arange(len(seen), device=x.device) if layout.slots else seen
        mask, past, fresh = None, cache.layers, {} if cond.get("write") else None
    call = Call(rope_tables(module, z, int(seen[-1]) + 1), tokens, seen[-frames:], seen, mask, past, fresh)
    out = with_call(module, call, z, per_token(timestep, tokens), cond["prompt"].to(z.dtype))
    if fresh:
        cache.append(fresh, frames)
    return out.transpose(1, 2)


def per_token(timestep: Tensor, tokens: int) -> Tensor:
    """Levels per frame [B, F] as Wan takes them, [B, F * tokens]; levels per sample [B] as they are."""
    return timestep.repeat_interleave(tokens, 1) if timestep.ndim == 2 else timestep
