"""The stochastic latent z of one transition: a learned prior, a posterior, and what limits its information.

The prior p(z | h, s, a) is what sampling uses; the posterior q(z | h, s, a, h') sees the outcome and exists for
training and for judging what has already happened. Information is limited by the KL divergence with free bits
(Kingma et al., arXiv 1606.04934, section C.8) and KL balancing (DreamerV2, arXiv 2010.02193, section 2.2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Gaussian(NamedTuple):
    """Independent normals."""

    mean: Tensor  # [..., Z]
    log_std: Tensor  # [..., Z]

    def sample(self, noise: Tensor) -> Tensor:
        """The value that standard noise [..., Z] stands for."""
        return self.mean + self.log_std.exp() * noise

    def detach(self) -> Gaussian:
        """The same without gradient."""
        return Gaussian(self.mean.detach(), self.log_std.detach())


def divergence(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) in nats per latent dimension: [..., Z]."""
    ratio = (2 * (q.log_std - p.log_std)).exp()
    shift = ((q.mean - p.mean) / p.log_std.exp()).square()
    return 0.5 * (ratio + shift - 1) - (q.log_std - p.log_std)


def information_loss(q: Gaussian, p: Gaussian, free_nats: float, balance: float = 0.8) -> tuple[Tensor, Tensor]:
    """KL loss above `free_nats` per transition, and the KL itself; both scalars in nats.

    The prior moves towards the posterior with weight `balance`, the posterior towards the prior with the rest.
    """
    to_prior = divergence(q.detach(), p).sum(-1)
    to_posterior = divergence(q, p.detach()).sum(-1)
    loss = balance * to_prior.mean().clamp_min(free_nats) + (1 - balance) * to_posterior.mean().clamp_min(free_nats)
    return loss, to_posterior.detach().mean()


class LatentHead(nn.Module):
    """A Gaussian over z from patch features (one frame for the prior, two for the posterior) and a condition."""

    def __init__(self, features: int, patches: int, frames: int, condition: int, latent: int, hidden: int = 192) -> None:
        super().__init__()
        self.squeeze = nn.Linear(features, 8)
        self.hidden = nn.Linear(8 * patches * frames + condition, hidden)
        self.out = nn.Linear(hidden, 2 * latent)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, frames: tuple[Tensor, ...], condition: Tensor) -> Gaussian:
        """frames: each [..., P, D]; condition [..., C] -> Gaussian over [..., Z]."""
        squeezed = [self.squeeze(f).flatten(-2) for f in frames]
        hidden = F.gelu(self.hidden(torch.cat((*squeezed, condition), -1)))
        mean, log_std = self.out(hidden).float().chunk(2, -1)
        return Gaussian(mean, log_std.clamp(-4, 2))
