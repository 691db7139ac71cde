"""The checks that are shipped pass on what is ours, and teach where something is broken."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from planners.check import check_gate, check_planner
from planners.gate import Limits, SafetyGate
from planners.interface import OpenGate, Plan, Verdict
from planners.sampling import VJEPA2_AC, SamplingConfig, SamplingPlanner
from worldmodel import model
from worldmodel.check import check_world_model
from worldmodel.interface import Features

OBS = {"pixels": np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8), "proprio": np.array([0.5, 0, 0.2, 0, 0, 0, 0.08], np.float32)}


@pytest.mark.parametrize("method", ["cem", "icem", "mppi"])
def test_our_planners_pass(method):
    check_planner(SamplingPlanner(SamplingConfig(method)))
    check_planner(SamplingPlanner(replace(VJEPA2_AC, samples=32, iterations=2)), action_dim=7, horizon=1)


def test_our_gate_and_model_pass():
    check_gate(SafetyGate(Limits(doubt=5.0)))
    check_world_model(model.load(), OBS)


def test_a_planner_that_is_broken_is_told_so():
    class Wild:
        def plan(self, cost, warm, generator):
            return Plan(3 * torch.randn(warm.shape), torch.zeros(len(warm)), warm)

    class Liar:
        def plan(self, cost, warm, generator):
            return Plan(warm, torch.full((len(warm),), -1.0), warm)

    class Random:
        def plan(self, cost, warm, generator):
            actions = torch.rand(1)[0] * 1e-3 + warm
            return Plan(actions, cost(actions[:, None])[:, 0].clamp_max(cost(warm[:, None])[:, 0]), warm)

    for broken, words in ((Wild(), "clamp them"), (Liar(), "return what would run"), (SimpleNamespace(plan=lambda *a: None), "NoneType")):
        with pytest.raises(AssertionError, match=words):
            check_planner(broken)

    class Narrow:
        def plan(self, cost, warm, generator):
            return Plan(warm, cost(warm[:, None])[:, 0], warm[:, 0])

    with pytest.raises(AssertionError, match="elite_std is"):
        check_planner(Narrow())
    with torch.random.fork_rng(), pytest.raises(AssertionError):
        check_planner(Random())


def test_a_gate_that_is_broken_is_told_so():
    with pytest.raises(AssertionError, match="NaN were let go"):
        check_gate(OpenGate())
    mute = SimpleNamespace(judge=lambda plan, imagined, seen: Verdict(True, 0.0, 1.0, ""))
    with pytest.raises(AssertionError, match="why is empty"):
        check_gate(mute)
    careless = SimpleNamespace(judge=lambda plan, imagined, seen: Verdict(bool(torch.isfinite(imagined.patches).all()), 0.0, 0.0, "because"))
    with pytest.raises(AssertionError, match="actions of NaN were let go|score"):
        check_gate(careless)
    odd = SimpleNamespace(judge=lambda plan, imagined, seen: Verdict(True, 2.0, 1.0, "because"))
    with pytest.raises(AssertionError, match="score 2.0 and limit 1.0"):
        check_gate(odd)


def test_a_model_that_is_broken_is_told_so():
    class Model:
        action_dim, latent_dim, max_context = 4, 1, 1

        def encode(self, obs):
            proprio = obs.get("proprio")
            return Features(torch.ones(np.shape(obs["pixels"])[:-3] + (5, 6)), None if proprio is None else torch.as_tensor(proprio))

        def sample_z(self, shape, generator):
            return torch.zeros(*shape, 1) if generator is None else torch.randn(*shape, 1, generator=generator)

        def rollout(self, context, actions, z):
            b, n, h, _ = actions.shape
            peek = actions.sum((2, 3))[:, :, None, None, None, None]  # of the whole plan
            return Features(context.features.patches[:, :, None, None] * 0 + peek.expand(b, n, z.shape[2], h, 5, 6), None)

    with pytest.raises(AssertionError, match="depends on a later action"):
        check_world_model(Model(), OBS)
    moody, rash, single = Model(), Model(), Model()
    moody.sample_z = lambda shape, generator: torch.randn(*shape, 1, generator=generator)
    with torch.random.fork_rng(), pytest.raises(AssertionError, match="without a generator differs"):
        check_world_model(moody, OBS)
    still = lambda context, actions, z: context.features.patches[:, :, None, None].expand(-1, actions.shape[1], z.shape[2], actions.shape[2], -1, -1)  # noqa: E731
    rash.rollout = lambda context, actions, z: Features(still(context, actions.zero_(), z))
    with pytest.raises(AssertionError, match="changed the actions"):
        check_world_model(rash, OBS)
    single.rollout = lambda context, actions, z: Features(still(context, actions, z) + actions[0, 0, 0, 0])
    with pytest.raises(AssertionError, match="depends on the plans beside it"):
        check_world_model(single, OBS)
    single.rollout = lambda context, actions, z: Features(still(context, actions, z) + actions[:1].sum() * (len(actions) > 1))
    with pytest.raises(AssertionError, match="depend on the problem beside it"):
        check_world_model(single, OBS)
    needy = Model()
    needy.encode = lambda obs: Features(torch.ones(np.shape(obs["pixels"])[:-3] + (5, 6)), torch.as_tensor(obs["proprio"]))
    with pytest.raises(AssertionError, match="goals may be pictures alone"):
        check_world_model(needy, OBS)
    wrong = Model()
    wrong.encode = lambda obs: Features(torch.ones(np.shape(obs["pixels"])[:-3] + (5, 6)), torch.ones(np.shape(obs["pixels"])[:-3] + (2,)))
    with pytest.raises(AssertionError, match=r"expected \[S\] = \[7\]"):
        check_world_model(wrong, OBS)
    flat = Model()
    flat.encode = lambda obs: Features(torch.ones(30), None)
    with pytest.raises(AssertionError, match=r"expected \[P, D\]"):
        check_world_model(flat, OBS)
