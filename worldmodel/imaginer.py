"""The predictor's step laid out for speed: the same numbers, frame by frame, for a planner's many candidates.

Imagination is the planner's time, and much of that would go into moving numbers about. Here patches stay merged to the end,
what all candidates share is computed once, keys and values lie in a ring that attention reads as it is, and one product
tells the modulations of all blocks.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.encoder import Mlp, Rotation, fast_in_bfloat16
from worldmodel.interface import Features
from worldmodel.predictor import Cache, Predictor, PredictorConfig, merged, repeated, turns, unmerged


class Imaginer:
    """Imagines with a copy of a predictor, in a dtype of its own, without gradients."""

    @torch.no_grad()
    def __init__(self, predictor: Predictor, dtype: torch.dtype) -> None:
        config = self.config = predictor.config
        self.predictor, self.halves = twin(predictor, dtype), halves_of(config).to(predictor.place.device)
        self.qkv = [packed(_linear(*turning(block.attn.qkv, config)).to(dtype)) for block in predictor.blocks]
        said = ((block.modulate.weight, block.modulate.bias) for block in predictor.blocks)
        self.modulate = packed(_linear(*(torch.cat(parts) for parts in zip(*said))).to(dtype))

    def laid(self, cache: Cache | None) -> Cache | None:
        """What is cached of past frames, as `rollout` reads it."""
        return cache

    @torch.no_grad()
    def rollout(self, now: Features, cache: Cache | None, start: int, actions: Tensor, noise: Tensor) -> Features:
        """What follows frame `start` of B problems under M courses of H actions each.

        now: patches [B, P, D] and proprio [B, S]; cache of the frames before, from its own `predictor`; actions [B, M, H, A]; noise
        [B, M, H, Z] that the prior maps to z -> patches [B, M, H, P, D] and proprio [B, M, H, S].
        """
        model, config, dtype = self.predictor, self.config, self.predictor.dtype
        (b, m, horizon), past = actions.shape[:3], cache[0][0].shape[2] // model.tokens if cache else 0
        actions, noise = actions.flatten(0, 1), noise.flatten(0, 1)
        squares = merged(now.patches[:, None], config.grid, config.merge)[:, 0].float()  # of all courses of a problem, at first
        proprio, shown, felt = repeated(model.normalise(now.proprio), m), [], []
        rings = self._rings(cache, m, b * m, min(past + horizon, config.window))
        for h in range(horizon):
            times = 1 if h else m  # from the first step on each course has squares of its own
            action, seen = actions[:, h], squares.to(dtype)
            prior = model.prior.told(repeated(self._squeezed(seen), times), torch.cat((proprio, action), -1).to(dtype))
            condition = torch.cat((action, proprio, prior.sample(noise[:, h])), -1).to(dtype)
            x = torch.cat((model.proprio_embed(proprio.to(dtype))[:, None], repeated(model.embed(seen) + model.place, times)), 1)
            x = model.norm(self._blocks(x, condition, turns(config, start + h, 1, dtype, x.device), rings, past + h))
            squares = model.after(repeated(squares, times), model.to_features(x[:, 1:].contiguous()))
            proprio = proprio + model.to_proprio(x[:, 0].contiguous())
            shown.append(squares)
            felt.append(proprio)
        patches = unmerged(torch.stack(shown, 1), config.grid, config.merge)
        proprio = (torch.stack(felt, 1) * model.proprio_std + model.proprio_mean).float()
        return Features(patches.unflatten(0, (b, m)), proprio.unflatten(0, (b, m)))

    def _squeezed(self, squares: Tensor) -> Tensor:
        """What the prior keeps of squares [R, P / merge^2, merge^2 * D], in the order of patches that it knows: [R, 8 * P]."""
        small = self.predictor.prior.squeeze(squares.unflatten(-1, (self.config.merge**2, -1)))
        return unmerged(small.flatten(-2)[:, None], self.config.grid, self.config.merge).flatten(1)

    def _rings(self, cache: Cache | None, times: int, rows: int, frames: int) -> list[Tensor]:
        """For each block its keys and values, [2, rows, heads, frames * L, head_dim], which begin with what is cached, each `times` times."""
        config, rings = self.config, []
        for i in range(config.depth):
            size = 2, rows, config.num_heads, frames * self.predictor.tokens, len(self.halves)
            rings.append(self.predictor.place.new_empty(size))
            if cache:
                for own, known in zip(rings[i], (cache[i][0][..., self.halves], cache[i][1])):
                    own[:, :, : known.shape[2]].unflatten(0, (-1, times)).copy_(known[:, None])
        return rings

    @torch.inference_mode()  # where most of the views are, which cost less so
    def _blocks(self, x: Tensor, condition: Tensor, turn: Rotation, rings: list[Tensor], frame: int) -> Tensor:
        """All blocks over the tokens x [R, L, dim] of the frame that is the rings' `frame`th, condition [R, C]."""
        (rows, tokens, dim), heads, window = x.shape, self.config.num_heads, self.config.window
        cos, sin = halved(turn)
        own, seen = slice(frame % window * tokens, (frame % window + 1) * tokens), min(frame + 1, window) * tokens
        modulations = self.modulate(F.silu(self.predictor.condition(condition)))[:, None].unflatten(-1, (-1, 6, dim))
        modulations = modulations + self.predictor.blocks[0].rest
        turned = x.new_empty(2, rows, heads, tokens, len(self.halves))  # queries and keys
        low, high = turned.chunk(2, -1)
        for block, qkv, modulation, ring in zip(self.predictor.blocks, self.qkv, modulations.unbind(2), rings):
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(2)  # [R, 1, dim]
            y = torch.addcmul(shift1, block.norm1(x), scale1)
            both, value = qkv(y).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).split((2, 1))
            first, second = both.chunk(2, -1)
            torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
            torch.mul(second, cos, out=high).addcmul_(first, sin)
            ring[0, :, :, own], ring[1, :, :, own] = turned[1], value[0]
            keys, values = ring[:, :, :, :seen].flatten(1, 2).unbind()
            shares = (turned[0].flatten(0, 1) @ keys.transpose(1, 2)).softmax(-1, dtype=torch.float32).to(x.dtype)
            y = (shares @ values).unflatten(0, (rows, heads)).transpose(1, 2).flatten(2)
            x = torch.addcmul(x, gate1, block.attn.proj(y))
            y = torch.addcmul(shift2, block.norm2(x), scale2)
            x = torch.addcmul(x, gate2, block.mlp(y))
        return x


def twin(predictor: Predictor, dtype: torch.dtype) -> Predictor:
    """A copy for what has been seen, all frames of that at once; in a dtype of its own, but for millimetres, which count."""
    own = copy.deepcopy(predictor).to(dtype)
    own.proprio_mean, own.proprio_std = predictor.proprio_mean, predictor.proprio_std
    pack(own)
    return own


def halves_of(config: PredictorConfig) -> Tensor:
    """The first entries of all pairs of a head that turn together, then the second ones: halves turn as a whole. [head_dim]"""
    head = torch.arange(config.embed_dim // config.num_heads)
    return torch.cat((head[::2], head[1::2]))


def halved(turn: Rotation) -> Rotation:
    """Cosines and sines of the pairs, [1, 1, L, head_dim / 2]."""
    return turn[0][..., ::2], turn[1][..., 1::2]


def turning(qkv: nn.Linear, config: PredictorConfig) -> tuple[Tensor, Tensor]:
    """Weights and biases that map to queries and keys in halves, and to values as they are."""
    rows = torch.arange(3 * config.embed_dim, device=qkv.weight.device).unflatten(0, (3, config.num_heads, -1))
    rows = torch.cat((rows[:2, :, halves_of(config)], rows[2:])).flatten()
    return qkv.weight[rows], qkv.bias[rows]


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear map of these."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias.contiguous())
    return linear


class Packed(nn.Module):
    """A linear map whose weights lie as oneDNN reads them, with GELU after it if asked for: for a processor, without gradients.

    A plain one has them brought into that order at each call. The operators are those that torch.compile uses.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias, self.after = linear.bias.detach(), "gelu" if gelu else "none"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.after, [], "none")


def packed(linear: nn.Linear, gelu: bool = False) -> nn.Module:
    """The map, with GELU after it if asked for: packed, if it is for a processor that knows its precision, and torch has the operators."""
    weight, known = linear.weight, all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    fast = weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and fast_in_bfloat16(weight.device)
    if known and fast and weight.device.type == "cpu":
        return Packed(linear, gelu)
    return nn.Sequential(linear, nn.GELU()) if gelu else linear


def pack(module: nn.Module) -> None:
    """Exchange all linear maps in a module for packed ones."""
    for name, child in list(module.named_children()):
        if isinstance(child, Mlp):
            child.fc1, child.fc2, child.act = packed(child.fc1, gelu=True), packed(child.fc2), nn.Identity()
        elif isinstance(child, nn.Linear):
            setattr(module, name, packed(child))
        else:
            pack(child)
