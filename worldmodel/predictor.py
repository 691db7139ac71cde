"""The action-conditioned predictor: h', s' = f(h, s, a, z), block-causal over time.

Each frame is one proprioception token and P / merge^2 tokens, each of merge x merge neighbouring patches: CEM's time is
the predictor's, and its time is its tokens'. A frame looks at itself and at the frames before it
(V-JEPA 2-AC, arXiv 2506.09985, section 3.1); action and z modulate every layer (AdaLN, DiT, arXiv 2212.09748, which
JEPA-WMs, arXiv 2512.24497, found best for this); positions are rotary. The next features are the present ones plus a
learned change, layer-normed, so that standing still costs nothing. A change has no more dimensions than a token, fewer than the
features of its patches, and so cannot take away all that was there: a `gated` predictor tells of each patch how much stays.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.encoder import Attention, Mlp, Rotation, initialise, positions, rotation
from worldmodel.interface import Features
from worldmodel.latent import Latent, LatentHead, PooledHead

Cache = list[tuple[Tensor, Tensor]]  # keys and values of past frames, per block: [B, heads, L, head_dim]


@dataclass(frozen=True)
class PredictorConfig:
    """Sizes of a Predictor."""

    feature_dim: int = 192
    grid: tuple[int, int] = (8, 8)  # patch rows and columns
    proprio_dim: int = 7
    action_dim: int = 4
    latent_dim: int = 8
    codes: bool = False  # z is one of latent_dim codes, not so many normals
    merge: int = 2  # a token holds merge x merge patches
    embed_dim: int = 256
    depth: int = 4
    num_heads: int = 4
    mlp_ratio: float = 4.0
    window: int = 3  # frames that a frame sees, itself included
    rope_base: float = 100.0
    hidden: int = 0  # units of a layer between a token's features and its embedding, and back; 0: linear maps
    gated: bool = False  # how much of each patch stays is told, beside what comes
    pooled: bool = False  # attention pools what z's posterior knows of an outcome

    @property
    def context(self) -> int:
        """The most frames that a planner need remember."""
        return self.window

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))  # JSON has lists only
        if min(self.depth, self.window, self.latent_dim, self.action_dim, self.proprio_dim) < 1:
            raise ValueError(f"expected depth, window and dimensions of at least 1, got {self}")
        if self.grid[0] % self.merge or self.grid[1] % self.merge:
            raise ValueError(f"merge {self.merge} does not divide the grid of patches {self.grid}; give --merge 1, or pictures of other sizes")
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(f"embed_dim {self.embed_dim} does not split into {self.num_heads} heads of an even size")


class ModulatedBlock(nn.Module):
    """Pre-norm transformer block whose norms and residuals are scaled and shifted per frame."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, mlp_ratio)
        self.modulate = nn.Linear(dim, 6 * dim)
        self.register_buffer("rest", torch.tensor([0.0, 1.0, 1.0] * 2)[:, None], persistent=False)  # shift, scale, gate of no modulation

    def forward(
        self, x: Tensor, condition: Tensor, by: Rotation, mask: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, T, L, dim], condition [B, T, 1, dim] -> the same shape as x, and keys and values of past and x."""
        modulation = self.modulate(condition).unflatten(-1, (6, -1)) + self.rest
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(-2)
        y = torch.addcmul(shift1, self.norm1(x), scale1)
        q, k, v = self.attn.heads(y.flatten(1, 2), by)  # [B, heads, T * L, head_dim]
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        scores = q @ k.transpose(2, 3)  # spelled out: for so few tokens it beats the fused kernel
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        shares = scores.softmax(-1, dtype=torch.float32).to(v.dtype)  # which is faster than in bfloat16, too
        y = (shares @ v).transpose(1, 2).flatten(2)
        x = torch.addcmul(x, gate1, self.attn.proj(y).unflatten(1, x.shape[1:3]))
        y = torch.addcmul(shift2, self.norm2(x), scale2)
        return torch.addcmul(x, gate2, self.mlp(y)), (k, v)


class Predictor(nn.Module):
    """One step of imagination, for all frames of a window at once or frame by frame with a cache."""

    def __init__(self, config: PredictorConfig = PredictorConfig()) -> None:
        super().__init__()
        self.config = config
        dim, patches, merged = config.embed_dim, config.grid[0] * config.grid[1], config.merge**2
        self.patches, self.tokens = patches, patches // merged + 1  # of one frame
        self.wide = config.feature_dim * merged  # numbers in a token's patches
        self.embed = mapping(self.wide, config.hidden, dim)
        self.place = nn.Parameter(torch.zeros(self.tokens - 1, dim))  # where a token is: the camera does not move
        self.proprio_embed = nn.Linear(config.proprio_dim, dim)
        condition = config.action_dim + config.proprio_dim
        self.condition = nn.Sequential(nn.Linear(condition + config.latent_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(
            ModulatedBlock(dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.to_features = mapping(dim, config.hidden, self.wide + merged * config.gated)
        self.to_proprio = nn.Linear(dim, config.proprio_dim)
        initialise(self)
        nn.init.trunc_normal_(self.place, std=0.02)
        last = self.to_features[-1] if config.hidden else self.to_features
        for head in (last, self.to_proprio, *(block.modulate for block in self.blocks)):
            nn.init.zeros_(head.weight)
        self.prior = LatentHead(config.feature_dim, patches, 1, condition, config.latent_dim, config.codes)
        head = PooledHead if config.pooled else LatentHead
        self.posterior = head(config.feature_dim, patches, 2, condition, config.latent_dim, config.codes)
        # z is heard, and says something, from the start: a predictor that has learned to do without it does not go back. One that
        # is mostly signal need not be loud, and what is loud before it tells anything is soon not listened to.
        if not config.pooled:
            nn.init.normal_(self.posterior.out.weight, std=0.3)
        nn.init.normal_(self.condition[0].weight[:, -config.latent_dim :], std=0.02 if config.pooled else 0.2)
        # Proprioception is normalised inside, by the mean and deviation of the training data.
        self.register_buffer("proprio_mean", torch.zeros(config.proprio_dim))
        self.register_buffer("proprio_std", torch.ones(config.proprio_dim))

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights; what `forward` takes and gives is float32 whatever it is."""
        return self.place.dtype

    def normalise(self, proprio: Tensor) -> Tensor:
        """Proprioception [..., S] in units of the training data's deviation."""
        return (proprio - self.proprio_mean) / self.proprio_std

    def prior_of(self, now: Features, actions: Tensor) -> Latent:
        """p(z | h, s, a) for features [..., P, D], actions [..., A]."""
        condition = torch.cat((self.normalise(now.proprio), actions), -1).to(self.dtype)
        return self.prior((now.patches.to(self.dtype),), condition)

    def posterior_of(self, now: Features, actions: Tensor, after: Tensor) -> Latent:
        """q(z | h, s, a, h'): `after` is the next frame's patches [..., P, D]."""
        condition = torch.cat((self.normalise(now.proprio), actions), -1).to(self.dtype)
        return self.posterior((now.patches.to(self.dtype), (after - now.patches).to(self.dtype)), condition)

    def forward(
        self, now: Features, actions: Tensor, z: Tensor, cache: Cache | None = None, start: int = 0
    ) -> tuple[Features, Cache]:
        """The frames after `now`.

        now: patches [B, T, P, D] and proprio [B, T, S], frames `start` .. `start + T - 1` of the sequence; actions
        [B, T, A] taken there; z [B, T, Z]; cache of the frames before. Row t of the result is frame t + 1. A frame
        sees `window` frames; the returned cache is cut to what the next one may see.
        """
        config, steps, dtype = self.config, actions.shape[1], self.dtype
        proprio = self.normalise(now.proprio)
        condition = F.silu(self.condition(torch.cat((actions, proprio, z), -1).to(dtype)))[:, :, None]  # [B, T, 1, dim]
        squares = merged(now.patches.float(), config.grid, config.merge)
        x = torch.cat((self.proprio_embed(proprio.to(dtype))[:, :, None], self.embed(squares.to(dtype)) + self.place), 2)
        before = cache[0][0].shape[2] // self.tokens if cache else 0
        by = turns(config, start, steps, dtype, x.device)
        mask = causal(before, steps, self.tokens, config.window, x.device)
        kept, keep = [], (config.window - 1) * self.tokens
        for i, block in enumerate(self.blocks):
            x, (k, v) = block(x, condition, by, mask, cache[i] if cache else None)
            kept.append((k[:, :, -keep:], v[:, :, -keep:]) if keep else (k[:, :, :0], v[:, :, :0]))
        x = self.norm(x)
        patches = unmerged(self.after(squares, self.to_features(x[:, :, 1:].contiguous())), config.grid, config.merge)
        moved = proprio + self.to_proprio(x[:, :, 0].contiguous())
        return Features(patches, (moved * self.proprio_std + self.proprio_mean).float()), kept

    def after(self, squares: Tensor, told: Tensor) -> Tensor:
        """The next squares of patches, float32 [..., merge^2 * D], by the present ones and what `to_features` tells of them."""
        size = self.config.feature_dim
        change, now = told[..., : self.wide].float().unflatten(-1, (-1, size)), squares.unflatten(-1, (-1, size))
        if self.config.gated:
            now = now * (1 + told[..., self.wide :].float())[..., None]
        return F.layer_norm(change + now, (size,)).flatten(-2)


def mapping(inside: int, hidden: int, outside: int) -> nn.Module:
    """A map of features, over a layer of hidden units if there are any."""
    return nn.Sequential(nn.Linear(inside, hidden), nn.GELU(), nn.Linear(hidden, outside)) if hidden else nn.Linear(inside, outside)


@functools.lru_cache(64)
def turns(config: PredictorConfig, start: int, steps: int, dtype: torch.dtype, device: torch.device) -> Rotation:
    """Rotary angles of the tokens of frames start .. start + steps - 1; a planner asks for the same few all the time.

    Scaled, so that products of what they turn are the scores of attention.
    """
    grid, head_dim = (config.grid[0] // config.merge, config.grid[1] // config.merge), config.embed_dim // config.num_heads
    by = rotation(frame_places(start, steps, grid, device), head_dim, config.rope_base)
    cos, sin = (x * head_dim**-0.25 for x in by)
    return cos.to(dtype), sin.to(dtype)


def causal(before: int, steps: int, tokens: int, window: int, device: torch.device) -> Tensor | None:
    """[T * L, (before + T) * L] of frames of L tokens: each sees itself and window - 1 frames before; None: all it has."""
    if steps == 1:
        if before >= window:
            raise ValueError(f"the cache holds {before} frames, expected fewer than the window of {window}")
        return None
    row = torch.arange(before, before + steps, device=device)[:, None]
    column = torch.arange(before + steps, device=device)[None]
    seen = (column <= row) & (column > row - window)
    return seen[:, None, :, None].expand(-1, tokens, -1, tokens).flatten(2).flatten(0, 1)


def merged(patches: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """Patches [B, T, P, D] in squares of size x size: [B, T, P / size^2, size^2 * D]."""
    (rows, columns), m = grid, size
    x = patches.unflatten(2, (rows // m, m, columns // m, m)).transpose(3, 4)
    return x.flatten(4).flatten(2, 3)  # [B, T, r, c, m * m * D] -> tokens


def unmerged(tokens: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """The inverse of `merged`."""
    (rows, columns), m = grid, size
    x = tokens.unflatten(3, (m, m, -1)).unflatten(2, (rows // m, columns // m))
    return x.transpose(3, 4).flatten(2, 5)


def frame_places(start: int, steps: int, grid: tuple[int, int], device: torch.device, own: int = 1) -> Tensor:
    """Where the tokens of frames start .. start + steps - 1 are: float32 [1, steps * (own + rows * columns), 3].

    The first `own` of each frame, proprioception's for one, have a time but no place.
    """
    where = positions(steps, grid, device).unflatten(0, (steps, -1))
    time = F.pad(torch.arange(steps, dtype=torch.float32, device=device)[:, None, None], (0, 2))
    where = torch.cat((time.expand(-1, own, -1), where), 1).flatten(0, 1)
    where[:, 0] += start
    return where[None]


def expand(cache: Cache, times: int) -> Cache:
    """The cache of B problems repeated for `times` candidates each: batch B * times, candidates fastest."""
    return [(repeated(k, times), repeated(v, times)) for k, v in cache]


def repeated(x: Tensor, times: int) -> Tensor:
    """Rows of x [B, ...], each `times` times in a row: [B * times, ...]; without a copy where there is but one."""
    return x[:, None].expand(-1, times, *x.shape[1:]).flatten(0, 1)
