"""What a model's z knows: in steps that really branch, and in steps that do not.

A step branches where what no picture tells decides how it ends. Each step of an episode is tried in the simulator from the
same state and with the same action, with several draws of the hidden mass and grip, of which those go on to the next step
that agree with what came: how far apart the object then is says whether it branches. What the model imagines of the step
that was taken is compared with what came, where the tries of a step that branches look different: that is a tenth of the
patches, and in the others no knowledge of the outcome would help.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from envs import experts
from envs.forks import forked
from worldmodel.commands.dynamics import environment, object_of
from worldmodel.encoder import autocast
from worldmodel.interface import Context, Features
from worldmodel.latent import divergence
from worldmodel.model import LatentModel

LEVEL = "slips"  # of randomisation
TRIES = 16  # draws at the start of an episode
BRANCHES, STEADY = 0.015, 0.0005  # m, deviation of the object's place over the tries: above, below
DIFFERS = 0.25  # of the deviation over the tries of the patch that has most of it: a patch above looks different
SAMPLES = 16  # of the prior


@dataclass(frozen=True)
class Step:
    """A step as the model sees it, after T frames of context, and how far its tries lie apart."""

    before: Features  # patches [T, P, D], proprio [T, S]
    actions: Tensor  # [T, A], the last one is the step's
    after: Tensor  # [P, D]
    apart: float  # m
    where: Tensor  # bool [P], patches in which the tries look different; all of a step that does not branch
    draws: float = 0.0  # L1 of the tries from their median in those patches: what remains to whom all but the draw is known


def steps_of(world: LatentModel, cameras: tuple[str, ...], seed: int) -> list[Step]:
    """All steps of an expert's episode."""
    env = environment(object_of(seed), world.encoder.config.image_size, cameras, world.action_dim, False, LEVEL)
    policy = experts.make_policy("varied", env.config, np.random.default_rng((seed, 1)))
    episode, forks = forked(env, policy, seed, TRIES)
    seen = world.encode({"pixels": env.scene.film(episode.obs["qpos"]), "proprio": episode.obs["proprio"]})
    actions, first = torch.from_numpy(episode.actions), world.max_context - 1
    windows = [slice(max(0, t - first), t + 1) for t in range(len(actions))]
    alike = torch.ones(len(seen.patches[0]), dtype=torch.bool), 0.0
    looks = [_different(world, env.scene.film(np.array([obs["qpos"] for obs in fork.obs]))) if fork.apart > BRANCHES else alike for fork in forks]
    return [
        Step(Features(*(x[w] for x in seen)), actions[w], seen.patches[w.stop], fork.apart, *look)
        for w, fork, look in zip(windows, forks, looks)
    ]


def _different(world: LatentModel, pictures: np.ndarray) -> tuple[Tensor, float]:
    """Patches, bool [P], in which pictures [n, h, w, 3] differ, and the L1 of their features from the median there."""
    patches = world.encode({"pixels": pictures}).patches.float()
    apart = patches.std(0, correction=0).mean(-1)
    where = apart > DIFFERS * apart.max()
    return where, float((patches - patches.median(0).values)[:, where].abs().mean())


@torch.no_grad()
def judge(world: LatentModel, steps: list[Step], seed: int = 0) -> dict[str, dict[str, float]]:
    """Of steps that branch and of steady ones, of which no more count: means of what z carries and of L1 errors of features.

    `nats`: of the posterior over the prior. `draws`: what the draws alone leave open. Errors of the prior's mean, the best of
    SAMPLES of the prior, the posterior's mean, and the posterior's of another such step, in `patches` on average. `spread`:
    deviation over the samples, of all.
    """
    generator, out = torch.Generator().manual_seed(seed), {}
    some = [s for s in steps if s.apart > BRANCHES]
    steady = [s for s in steps if s.apart < STEADY]
    evenly = np.linspace(0, len(steady) - 1, min(len(steady), max(100, len(some)))).astype(int)
    for name, group in (("branching", some), ("steady", [steady[i] for i in evenly])):
        if len(group) < 2:
            continue
        told = [_told(world, step) for step in group]  # nats, and noise that stands for the posterior's mean
        rows = []
        for step, (nats, noise), (_, other) in zip(group, told, (*told[1:], told[0])):
            samples = torch.randn(SAMPLES, len(noise), generator=generator)
            z = torch.cat((samples, torch.zeros(1, len(noise)), noise[None], other[None]))
            imagined = _imagined(world, step, z)
            error = (imagined - step.after)[:, step.where].abs().mean((-2, -1))
            spread = imagined[:SAMPLES].std(0, correction=0).mean()
            rows.append([step.where.sum(), nats, step.draws, error[SAMPLES], error[:SAMPLES].min(), error[SAMPLES + 1], error[SAMPLES + 2], spread])
        names = ("patches", "nats", "draws", "mean", "best", "posterior", "shuffled", "spread")
        out[name] = {"steps": len(group)} | dict(zip(names, np.array(rows, float).mean(0).tolist()))
    return out


def _told(world: LatentModel, step: Step) -> tuple[float, Tensor]:
    """What the outcome says beyond the prior: nats, and the posterior's mean as noise [Z] of the prior."""
    now, action = Features(*(x[None, -1:] for x in step.before)), step.actions[None, -1:]
    with autocast(action.device):
        prior = world.predictor.prior_of(now, action)
        posterior = world.predictor.posterior_of(now, action, step.after[None, None])
    return float(divergence(posterior, prior)), prior.noise_of(posterior.mean)[0, 0]


def _imagined(world: LatentModel, step: Step, z: Tensor) -> Tensor:
    """Patches [K, P, D] after a step under noise [K, Z]."""
    context = Context(Features(*(x[None] for x in step.before)), step.actions[None, :-1])
    return world.rollout(context, step.actions[None, None, -1:], z[None, None, :, None]).patches[0, 0, :, 0].float()
