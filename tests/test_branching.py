"""Steps that branch, and what z tells of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import envs
from envs import experts, forks, run
from worldmodel.commands import branching, collect
from worldmodel.encoder import EncoderConfig, VideoEncoder
from worldmodel.interface import Features
from worldmodel.model import LatentModel
from worldmodel.predictor import Predictor, PredictorConfig


@pytest.fixture(scope="module")
def world() -> LatentModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = VideoEncoder(EncoderConfig(patch_size=24, embed_dim=24, depth=1, num_heads=1))
        predictor = Predictor(PredictorConfig(24, (4, 4), embed_dim=24, depth=1, num_heads=1))
        torch.nn.init.zeros_(predictor.posterior.out.weight)  # as the prior's
        return LatentModel(encoder, predictor)


def test_steps_branch_where_grip_decides_and_not_before_the_grasp(world):
    steps = branching.steps_of(world, ("front",), 1)
    assert len(steps) == 30
    closes = next(t for t, step in enumerate(steps) if step.actions[-1, -1] < -0.5)
    apart = np.array([step.apart for step in steps])
    assert (apart[: closes - 1] < branching.STEADY).all() and apart[closes:].max() > branching.BRANCHES
    assert [len(step.actions) for step in steps[:4]] == [1, 2, 3, 3] and steps[3].before.patches.shape == (3, 16, 24)
    assert all(bool(step.where.all()) == (step.apart < branching.BRANCHES) and step.where.any() for step in steps)
    assert all((step.draws > 0) == (step.apart > branching.BRANCHES) for step in steps)


def test_trying_a_step_leaves_no_trace():
    env = envs.make(envs.EnvConfig(randomization="hidden", render_goals=False, render_observations=False))
    _, info = env.reset(seed=1)
    policy = experts.make_policy("varied", env.config, np.random.default_rng(0))
    for _ in range(8):
        action = policy(info)
        before, fields = env.get_state(), env.variation.fields
        draws = [env.randomizer.redraw_physics(before.variation, "hidden", np.random.default_rng(i)) for i in range(3)]
        fork = forks.tried(env, action, draws)
        assert fork.places.shape == (3, 3) and all(obs["qpos"].shape == (env.scene.model.nq,) for obs in fork.obs)
        after = env.get_state()
        assert np.array_equal(before.physics, after.physics) and before.rng == after.rng
        assert np.array_equal(env.scene.model.geom_friction, fields["geom_friction"])
        *_, info = env.step(action)


def test_ends_of_a_step_have_its_past_and_the_object_in_other_places():
    env = envs.make(envs.EnvConfig("grasp", max_steps=12, randomization="slips", render_goals=False, render_observations=False, stop_on_success=False))
    policy = lambda: experts.make_policy("varied", env.config, np.random.default_rng((1, 1)))  # noqa: E731
    episode, found = forks.forked(env, policy(), 1, 8)
    alone = run.rollout(env, lambda obs, info, act=policy(): act(info), 1)
    assert np.array_equal(episode.obs["qpos"], alone.obs["qpos"]) and len(found) == 12  # trying changed nothing
    for t, fork in enumerate(found):
        assert np.array_equal(fork.obs[0]["qpos"], episode.obs["qpos"][t + 1]) and len(fork.infos) <= (8 if t == 0 else len(found[t - 1].infos))
    at = 3 + int(np.argmax([fork.apart for fork in found[3:]]))
    assert found[at].apart > 0.004
    ends = [forks.outcome(episode, found, which, 3) for which in range(len(found[at].infos) + 1)]
    for end in ends:
        assert len(end.infos) == 5 and np.array_equal(end.actions, episode.actions[at - 3 : at + 1])
        assert np.array_equal(end.obs["qpos"][:4], episode.obs["qpos"][at - 3 : at + 1])
    assert np.array_equal(ends[0].obs["qpos"][4], episode.obs["qpos"][at + 1]) and np.array_equal(ends[-1].obs["qpos"], ends[0].obs["qpos"])
    assert not np.array_equal(ends[1].obs["qpos"][4], ends[0].obs["qpos"][4])
    with pytest.raises(ValueError, match="an episode of 12 steps has none with 12 before it"):
        forks.outcome(episode, found, 0, 12)


def test_each_end_of_a_step_is_an_episode_by_itself(tmp_path):
    config = collect.Config(tmp_path, "grasp", randomization="slips", policy="varied", max_steps=10, forks=2, seed=4, stop_on_success=False, visibility=True)
    ends = [collect.record(config, seed) for seed in (4, 5, 6)]
    for end, seed in zip(ends, (4, 4, 5)):
        assert end["pixels"].shape == (5, 96, 96, 3) and end["actions"].shape == (4, 4) and end["seed"] == seed
        assert (end["privileged/fork"] == seed).all() and end["privileged/object_pixels"].shape[0] == 5
    assert np.array_equal(ends[0]["pixels"][:4], ends[1]["pixels"][:4]) and not np.array_equal(ends[0]["pixels"][4], ends[1]["pixels"][4])
    collect._forked.cache_clear()
    again = collect.record(config, 5)  # whoever records it, and whatever came before
    assert all(np.array_equal(again[key], ends[1][key]) for key in again)


@pytest.mark.parametrize(("changes", "told"), [
    ({"forks": 1}, "forks is 1, expected 2 to 8"), ({"forks": 9}, "forks is 9"), ({"max_steps": 3}, "max-steps above 3, got 3"),
    ({"randomization": "mild"}, "nothing branches under --randomization mild"), ({}, "give --no-stop-on-success"),
])  # fmt: skip
def test_forks_that_cannot_be_are_refused(tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        collect.Config(tmp_path, **{"randomization": "slips", "forks": 4} | changes)


def test_another_draw_of_the_physics_looks_the_same():
    env = envs.make(envs.EnvConfig(randomization="hidden"))
    obs, _ = env.reset(seed=3)
    state = env.get_state()
    other = env.randomizer.redraw_physics(state.variation, "hidden", np.random.default_rng(0))
    env.set_state(replace(state, variation=other))
    assert np.array_equal(env.observe()["pixels"], obs["pixels"])
    for name in ("body_mass", "geom_friction"):
        assert not np.array_equal(other.fields[name], state.variation.fields[name])


def test_a_posterior_that_is_the_prior_carries_nothing(world):
    def step(seed: int, apart: float) -> branching.Step:
        g = torch.Generator().manual_seed(seed)
        before = Features(torch.randn(2, 16, 24, generator=g), torch.randn(2, 7, generator=g))
        return branching.Step(before, torch.zeros(2, 4), torch.randn(16, 24, generator=g), apart, torch.arange(16) < 4)

    steps = [step(seed, apart) for seed, apart in enumerate((0.02, 0.02, 0.02, 0.0, 0.0, 0.002))]
    told = branching.judge(world, steps)
    assert {name: row["steps"] for name, row in told.items()} == {"branching": 3, "steady": 2}
    for row in told.values():
        assert row["patches"] == 4 and abs(row["nats"]) < 1e-4 and abs(row["posterior"] - row["mean"]) < 1e-3 and row["best"] <= row["mean"] + 1e-3
    assert branching.judge(world, steps[:1]) == {}
