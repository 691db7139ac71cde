"""The stochastic latent z of one transition: a learned prior, a posterior, and what limits its information.

The prior p(z | h, s, a) is what sampling uses; the posterior q(z | h, s, a, h') sees the outcome and exists for
training and for judging what has already happened. z is a vector of normals, or one code of a small book, written one-hot.
Information is limited by the KL divergence with free bits (Kingma et al., arXiv 1606.04934, section C.8) and KL balancing
(DreamerV2, arXiv 2010.02193, section 2.2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


SQUEEZED = 8  # numbers that a head keeps of a patch
LOG_STD = -4.0, 2.0  # between which that of a normal is
LOGIT = 5.0  # of a code, at most: none is ever out of question


class Gaussian(NamedTuple):
    """Independent normals."""

    mean: Tensor  # [..., Z]
    log_std: Tensor  # [..., Z]

    def sample(self, noise: Tensor) -> Tensor:
        """The value that standard noise [..., Z] stands for."""
        return self.mean + self.log_std.exp() * noise

    def noise_of(self, value: Tensor) -> Tensor:
        """The noise that a value [..., Z] comes from."""
        return (value - self.mean) / self.log_std.exp()

    def detach(self) -> Gaussian:
        """The same without gradient."""
        return Gaussian(self.mean.detach(), self.log_std.detach())


class Codes(NamedTuple):
    """One of Z codes, as a one-hot vector."""

    logits: Tensor  # [..., Z]

    @property
    def mean(self) -> Tensor:
        """The likeliest code, which plays the mean's part: a mixture of codes is none."""
        return self._one_hot(self.logits)

    def sample(self, noise: Tensor) -> Tensor:
        """The code that standard noise [..., Z] stands for, the likeliest for zeros; gradients as of the probabilities.

        Gumbel-max (Maddison et al., arXiv 1411.0030), and the straight-through estimator of DreamerV2's section 2.2.
        """
        uniform = (0.5 * (1 + torch.erf(noise.float() / 2**0.5))).clamp(1e-7, 1 - 1e-7)
        drawn, share = self._one_hot(self.logits - torch.log(-torch.log(uniform))), self.logits.softmax(-1)
        return drawn + share - share.detach() if share.requires_grad else drawn

    def noise_of(self, value: Tensor) -> Tensor:
        """Noise that a code [..., Z] comes from."""
        return 12 * value - 6

    def detach(self) -> Codes:
        """The same without gradient."""
        return Codes(self.logits.detach())

    def _one_hot(self, scores: Tensor) -> Tensor:
        return F.one_hot(scores.argmax(-1), scores.shape[-1]).to(self.logits)


Latent = Gaussian | Codes


def divergence(q: Latent, p: Latent) -> Tensor:
    """KL(q || p) in nats: [...]."""
    if isinstance(q, Codes):
        known, asked = q.logits.log_softmax(-1), p.logits.log_softmax(-1)
        return (known.exp() * (known - asked)).sum(-1)
    ratio = (2 * (q.log_std - p.log_std)).exp()
    shift = ((q.mean - p.mean) / p.log_std.exp()).square()
    return (0.5 * (ratio + shift - 1) - (q.log_std - p.log_std)).sum(-1)


def information_loss(q: Latent, p: Latent, free_nats: float, balance: float = 0.8) -> tuple[Tensor, Tensor]:
    """KL loss above `free_nats` per transition, and the KL itself; both scalars in nats.

    The prior moves towards the posterior with weight `balance`, the posterior towards the prior with the rest.
    """
    to_prior = divergence(q.detach(), p)
    to_posterior = divergence(q, p.detach())
    loss = balance * to_prior.mean().clamp_min(free_nats) + (1 - balance) * to_posterior.mean().clamp_min(free_nats)
    return loss, to_posterior.detach().mean()


class LatentHead(nn.Module):
    """A distribution over z from patch features (one frame for the prior, two for the posterior) and a condition."""

    def __init__(
        self, features: int, patches: int, frames: int, condition: int, latent: int, codes: bool = False, hidden: int = 192
    ) -> None:
        super().__init__()
        self.codes = codes
        self.squeeze = nn.Linear(features, SQUEEZED)
        self.hidden = nn.Linear(SQUEEZED * patches * frames + condition, hidden)
        self.out = nn.Linear(hidden, latent if codes else 2 * latent)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, frames: tuple[Tensor, ...], condition: Tensor) -> Latent:
        """frames: each [..., P, D]; condition [..., C] -> a distribution over [..., Z]."""
        return self.told(torch.cat([self.squeeze(f).flatten(-2) for f in frames], -1), condition)

    def told(self, squeezed: Tensor, condition: Tensor) -> Latent:
        """The same from what `squeeze` keeps of all patches, [..., 8 * P * frames]."""
        hidden = F.gelu(self.hidden(torch.cat((squeezed, condition), -1)))
        return _latent(self.out(hidden).float(), self.codes)


class PooledHead(nn.Module):
    """As `LatentHead`, but attention pools the patches: what becomes of a thing is known wherever on the table it happens."""

    def __init__(
        self, features: int, patches: int, frames: int, condition: int, latent: int, codes: bool = False, heads: int = 16, hidden: int = 256
    ) -> None:
        super().__init__()
        self.codes, self.heads, wide = codes, heads, features * frames
        self.place = nn.Parameter(0.02 * torch.randn(patches, wide))
        self.score = nn.Linear(wide, heads)
        self.value = nn.Linear(wide, 16 * heads)
        self.pooled, self.condition = nn.Linear(16 * heads, hidden), nn.Linear(condition, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.hidden = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, latent if codes else 2 * latent)
        nn.init.normal_(self.out.weight, std=0.06)
        nn.init.zeros_(self.out.bias)
        if not codes:  # of less noise than signal from the start: a z that is mostly noise is not listened to
            with torch.no_grad():
                self.out.weight[latent:] *= 0.1
                self.out.bias[latent:] = -2.0

    def forward(self, frames: tuple[Tensor, ...], condition: Tensor) -> Latent:
        """frames: each [..., P, D]; condition [..., C] -> a distribution over [..., Z]."""
        x = torch.cat(frames, -1) + self.place
        share = self.score(x).softmax(-2).transpose(-1, -2)[..., None, :]  # [..., heads, 1, P]
        values = self.value(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3)  # [..., heads, P, 16]
        y = self.norm(self.pooled((share @ values).flatten(-3)) + self.condition(condition))
        return _latent(self.out(y + F.gelu(self.hidden(F.gelu(y)))).float(), self.codes)


def _latent(out: Tensor, codes: bool) -> Latent:
    """The distribution that a head's numbers tell."""
    if codes:
        return Codes(LOGIT * torch.tanh(out / LOGIT))
    mean, log_std = out.chunk(2, -1)
    return Gaussian(mean, log_std.clamp(*LOG_STD))
