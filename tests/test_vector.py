"""Agents that decide at once do what each would do alone, and ask the model as one."""

import threading
import time

import gymnasium as gym
import numpy as np
import pytest
import torch

from planners.agent import Agent, AgentConfig
from planners.interface import Verdict
from planners.sampling import SamplingConfig, SamplingPlanner
from planners.vector import VectorAgent, _Turn
from worldmodel.encoder import EncoderConfig, VideoEncoder
from worldmodel.energy import GoalEnergy
from worldmodel.guide import Guide
from worldmodel.model import LatentModel
from worldmodel.policy import Policy
from worldmodel.predictor import Predictor, PredictorConfig


@pytest.fixture(scope="module")
def world() -> LatentModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = VideoEncoder(EncoderConfig(patch_size=24, embed_dim=24, depth=1, num_heads=1))
        predictor = Predictor(PredictorConfig(24, (4, 4), embed_dim=24, depth=1, num_heads=1))
        torch.nn.init.normal_(predictor.to_features.weight, std=0.3)
        return LatentModel(encoder, predictor)


def make(model, **parts) -> Agent:
    planner = SamplingPlanner(SamplingConfig(samples=8, iterations=2, elites=3))
    return Agent(model, planner, GoalEnergy, AgentConfig(patience=None), **parts)


class Fussy:
    """Refuses what goes far along the first dimension."""

    def judge(self, plan, imagined, seen):
        far = float(plan.actions[0, 0, 0].abs())
        return Verdict(far <= 0.3, far, 0.3, "far")


def pictures(count: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"pixels": rng.integers(255, size=(count, 96, 96, 3), dtype=np.uint8), "proprio": rng.normal(size=(count, 7)).astype(np.float32)}


def row(obs, i):
    return {key: value[i] for key, value in obs.items()}


def suggesting(world, begin) -> LatentModel:
    """The same model with a policy, a guide, or neither."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        policy = Policy(16, 24, 7, 4, 8) if begin in ("policy", "detour") else None
        guide = Guide(7, 4) if begin == "guide" else None
        careful = Policy(16, 24, 7, 4, 8) if begin == "detour" else None
    if guide is not None:
        guide.inverse[:3, :3] = 5 * torch.eye(3)
    return LatentModel(world.encoder, world.predictor, guide=guide, policy=policy, careful=careful)


@pytest.mark.parametrize("begin", ["policy", "guide", "nothing", "detour"])
def test_each_decides_as_it_would_alone(world, begin):
    world, parts = suggesting(world, begin), {"gate": Fussy()} if begin == "detour" else {}
    goals, several = pictures(3, 0), VectorAgent(lambda shared: make(shared, **parts), world, 3)
    alone = [make(world, **parts) for _ in range(3)]
    several.reset(goals)
    for i, agent in enumerate(alone):
        agent.reset(row(goals, i), seed=i)
    for t in range(4):
        if t == 2:  # one begins anew, so that the contexts differ in length
            several.reset(goals, where=np.array([False, True, False]))
            alone[1].reset(row(goals, 1), seed=4)  # the fifth episode's
        obs = pictures(3, t + 1)
        actions = several.act(obs)
        assert actions.shape == (3, 4) and actions.dtype == np.float32
        for i, agent in enumerate(alone):
            np.testing.assert_allclose(actions[i], agent.act(row(obs, i)), atol=1e-4)
            assert several.agents[i].last.energy == pytest.approx(agent.last.energy, rel=1e-4)
            assert several.agents[i].last.answer == agent.last.answer


def test_the_model_is_asked_once_for_all(world):
    asked = []

    class Counted(LatentModel):
        def encode(self, obs):
            asked.append(("encode", len(obs["pixels"])))
            return super().encode(obs)

        def rollout(self, context, actions, z):
            asked.append(("rollout", len(actions)))
            return super().rollout(context, actions, z)

    counted = Counted(world.encoder, world.predictor)
    several = VectorAgent(make, counted, 5)
    several.reset(pictures(5, 0))
    asked.clear()
    threads = torch.get_num_threads()
    several.act(pictures(5, 1))
    assert torch.get_num_threads() == threads
    assert {count for _, count in asked} == {5} and [kind for kind, _ in asked].count("encode") == 1
    rollouts = len(asked)
    one = VectorAgent(make, counted, 1)
    one.reset(pictures(1, 0))
    asked.clear()
    one.act(pictures(1, 1))
    assert len(asked) == rollouts


def test_what_goes_wrong_in_one_is_raised(world):
    several = VectorAgent(make, world, 2)
    with pytest.raises(RuntimeError, match="call reset"):
        several.act(pictures(2, 0))
    several.reset(pictures(2, 0))
    bad = pictures(2, 1)
    bad["proprio"][1, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        several.act(bad)
    with pytest.raises(ValueError, match="for 2 agents"):
        several.act(pictures(3, 0))
    with pytest.raises(ValueError, match="1 goals for 2 agents"):
        several.reset([row(pictures(1, 0), 0)])
    with pytest.raises(ValueError, match=r"where as bool \[2\], got int64 \[1\]"):
        several.reset(pictures(2, 0), where=np.array([1]))
    with pytest.raises(ValueError, match="at least 1"):
        VectorAgent(make, world, 0)


def test_goals_of_gym_vector_say_which_have_proprioception(world):
    several, given = VectorAgent(make, world, 2), pictures(2, 0)
    given["proprio"][1] = 0.0  # as Gymnasium fills up
    several.reset(given | {"_proprio": np.array([True, False]), "_pixels": np.ones(2, bool)}, seeds=np.arange(2))
    assert [agent._known for agent in several.agents] == [[True], [False]]
    assert several.act(pictures(2, 1)).shape == (2, world.action_dim)
    with pytest.raises(ValueError, match="have none; give the goal as pixels alone"):
        several.act(pictures(2, 1) | {"proprio": None})


def test_a_turn_has_no_name_of_its_thread():
    """Else a process that forks, as asynchronous environments may, calls what is not its own."""
    turn = _Turn(lambda: None)
    assert not turn.go_on()
    assert not (set(vars(turn)) - set(vars(threading.Thread()))) & set(dir(threading.Thread))


def test_an_interrupt_leaves_no_thread_behind(world):
    class Interrupted(LatentModel):
        def rollout(self, context, actions, z):
            raise KeyboardInterrupt

    several, threads, before = VectorAgent(make, Interrupted(world.encoder, world.predictor), 3), torch.get_num_threads(), threading.active_count()
    several.reset(pictures(3, 0))
    with pytest.raises(KeyboardInterrupt):
        several.act(pictures(3, 1))
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before and torch.get_num_threads() == threads


def test_all_rehearse_at_once(world):
    answers = []
    for rehearsed in (False, True):
        several = VectorAgent(make, world, 2)
        several.reset(pictures(2, 0))
        if rehearsed:
            several.rehearse(pictures(2, 3))
        answers.append(several.act(pictures(2, 1)))
    assert np.array_equal(*answers)


def test_what_is_held_is_told_of_each(world):
    told = []

    class Told(LatentModel):
        def rollout(self, context, actions, z):
            told.append(context.held)
            return super().rollout(context, actions, z)

    several = VectorAgent(make, Told(world.encoder, world.predictor), 2)
    several.reset(pictures(2, 0))
    several.act(pictures(2, 1))
    assert told.pop() is None
    closed = np.array([0, 0, 0, -1], np.float32)
    for agent, ran in zip(several.agents, (closed, 0 * closed)):
        agent._answer = ran
    obs = pictures(2, 1)
    several.act(pictures(2, 2))
    assert np.allclose(told[-1][0], obs["proprio"][0]) and told[-1][1].isnan().all()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_it_plays_in_vector_environments(world, mode):
    """Episodes begin anew by themselves, each when it is over."""
    envs = gym.make_vec("envs:PandaPickPlace-v0", num_envs=2, vectorization_mode=mode, max_steps=2)
    try:
        agent = VectorAgent(make, world, envs.num_envs)
        obs, info = envs.reset(seed=100)
        agent.reset(info["goal"])
        over = np.zeros(envs.num_envs, bool)
        for t in range(4):
            obs, _, terminated, truncated, info = envs.step(agent.act(obs))
            agent.reset([goal[-1] for goal in info["subgoals"]], where=over)
            assert all((one.last is None) == (t == 2) for one in agent.agents)
            over = terminated | truncated
            assert over.all() == over.any() == (t == 1)
    finally:
        envs.close()
