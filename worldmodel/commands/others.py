"""How long things take, and predictors of others' sizes, with random weights, to time beside ours."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

LEWM_BUDGET = (300, 10, 5)  # candidates, iterations, steps
AC_BUDGET = (800, 10, 1)


def timed(work: Callable, least: int = 5, seconds: float = 0.5, best: bool = False) -> float:
    """Seconds that `work()` takes after a first call: the median, or the best, of `least` calls, and more for so many seconds."""
    work()
    taken: list[float] = []
    while len(taken) < least or sum(taken) < seconds:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken) if best else float(np.median(taken))


def precision_used() -> str:
    """The precision of the models' matrix products here."""
    import torch

    from worldmodel.encoder import autocast

    with autocast("cpu"):
        return "bfloat16" if torch.is_autocast_enabled("cpu") else "float32"


def lewm() -> dict:
    """Seconds of a plan with a predictor of LeWM's size (arXiv 2603.19312): one 192-wide token a frame, three frames.

    Six blocks, 16 heads of 64, 2048 hidden units, modulated by the action: 10.8M parameters.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    from worldmodel.encoder import autocast

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(192, 3 * 1024), nn.Linear(1024, 192)
            self.up, self.down = nn.Linear(192, 2048), nn.Linear(2048, 192)
            self.modulate = nn.Linear(192, 6 * 192)

        def forward(self, x, condition):
            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(F.silu(condition)).chunk(6, -1)
            y = F.layer_norm(x, (192,)) * (1 + scale1) + shift1
            q, k, v = self.qkv(y).unflatten(-1, (3, 16, 64)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + gate1 * self.out(y)
            y = F.layer_norm(x, (192,)) * (1 + scale2) + shift2
            return x + gate2 * self.down(F.gelu(self.up(y)))

    candidates, iterations, steps = LEWM_BUDGET
    blocks = nn.ModuleList(Block() for _ in range(6))
    history, actions = torch.randn(candidates, 3, 192), torch.randn(candidates, 3, 192)

    @torch.no_grad()
    def iteration():
        x = history
        for _ in range(steps):
            y = x
            for block in blocks:
                y = block(y, actions)
            x = torch.cat((x[:, 1:], y[:, -1:]), 1).float()

    with autocast("cpu"):
        seconds = iterations * timed(iteration, least=3)
    return {"lewm": {"parameters": sum(p.numel() for p in blocks.parameters()), "plan_seconds": seconds}}


def vjepa2_ac() -> dict:
    """Seconds of a plan with V-JEPA 2-AC's predictor: one step of one of four candidates, times all of a plan."""
    import torch

    from worldmodel.interface import Features
    from worldmodel.vjepa2_ac import ACConfig, ACPredictor

    config, dtype = ACConfig(), getattr(torch, precision_used())
    predictor = ACPredictor(config).to(dtype).eval().requires_grad_(False)
    now = Features(torch.randn(4, 1, predictor.patches, config.feature_dim, dtype=dtype), torch.randn(4, 1, 7, dtype=dtype))
    actions, z = torch.zeros(4, 1, 7, dtype=dtype), torch.zeros(4, 1, 0, dtype=dtype)
    seconds = timed(lambda: predictor(now, actions, z), least=2) / 4
    return {
        "vjepa2_ac": {
            "parameters": sum(p.numel() for p in predictor.parameters()),
            "candidate_step_seconds": seconds,
            "plan_seconds": seconds * float(np.prod(AC_BUDGET)),
        }
    }
