"""The way to a goal: that it is found in data, that a model keeps it, and that a search begins with it."""

import numpy as np
import torch

from planners.agent import Agent, AgentConfig
from planners.interface import Plan
from worldmodel.data import Frames
from worldmodel.encoder import EncoderConfig, VideoEncoder
from worldmodel.energy import GoalEnergy
from worldmodel.guide import Guide, fit_guide
from worldmodel.interface import Features, Suggestion
from worldmodel.model import LatentModel, load
from worldmodel.predictor import Predictor, PredictorConfig

STEP = np.array([[0.05, 0.0, 0.0], [0.0, 0.05, 0.0]])  # what an action changes; the third number is noise


def frames(episodes: int = 20, length: int = 15) -> Frames:
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (episodes, length, 2)).astype(np.float32)
    actions[:, -1] = 0
    moves = np.concatenate((np.zeros((episodes, 1, 3)), actions[:, :-1] @ STEP), 1) + rng.normal(0, 1e-3, (episodes, length, 3)) * [0, 0, 1]
    arrays = {"proprio": moves.cumsum(1).reshape(-1, 3).astype(np.float32), "actions": actions.reshape(-1, 2)}
    return Frames(arrays, np.arange(episodes + 1) * length, tuple(range(episodes)))


def test_it_leads_straight_to_the_goal():
    guide = fit_guide(frames())
    goal = torch.tensor([0.12, -0.02, 0.0])
    found = guide(torch.zeros(3), goal, 4)
    assert torch.allclose(found, torch.tensor([[1.0, -0.4], [1.0, 0.0], [0.4, 0.0], [0.0, 0.0]]), atol=0.05)
    assert guide(torch.zeros(2, 5, 3), torch.ones(2, 5, 3), 2).shape == (2, 5, 2, 2)


def model(guide: Guide | None) -> LatentModel:
    sizes = EncoderConfig(image_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=1)
    dims = 3 if guide is None else len(guide.inverse)
    predictor = Predictor(PredictorConfig(12, (2, 2), dims, 2, embed_dim=12, depth=1, num_heads=1))
    return LatentModel(VideoEncoder(sizes), predictor, guide=guide)


def test_a_model_keeps_it(tmp_path):
    guide = fit_guide(frames())
    model(guide).save(tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path / "model.safetensors").guide.inverse, guide.inverse)
    model(None).save(tmp_path / "without.safetensors")
    assert load(tmp_path / "without.safetensors").guide is None


def test_a_search_begins_with_it_but_for_choices():
    class Noted:
        choices = (-1,)

        def plan(self, cost, warm_start, generator):
            self.start = warm_start
            return Plan(warm_start, cost(warm_start[:, None])[:, 0], torch.zeros_like(warm_start))

    seen = {"pixels": np.random.default_rng(0).integers(255, size=(16, 16, 3), dtype=np.uint8), "proprio": np.zeros(3, np.float32)}
    for guide, first in ((fit_guide(frames()), 1.0), (None, 0.0)):
        planner = Noted()
        agent = Agent(model(guide), planner, GoalEnergy)
        agent.reset(seen | {"proprio": np.array([0.2, 0.2, 0.0], np.float32)})
        agent.act(seen)
        assert planner.start.shape == (1, 2, 2)
        assert np.allclose(planner.start[0, :, 0], first, atol=0.05) and (planner.start[..., 1] == 0).all()


def test_a_search_looks_for_what_lies_on_the_way():
    """It begins with what is suggested on the way to the goals ahead, and a plan that stays on it costs less than one straight there."""

    class Both:
        choices = (-1,)

        def plan(self, cost, warm_start, generator):
            straight = torch.tensor([[[0.0, 1.0]] * 2])
            self.start, self.costs = warm_start, cost(torch.stack((warm_start, straight), 1))[0]
            return Plan(warm_start, self.costs[:1], torch.zeros_like(warm_start))

    class Moves:
        """Imagines proprioception alone: each action's own; suggests to move along the first dimension, and what the second does."""

        action_dim, latent_dim, max_context = 2, 1, 1

        def encode(self, obs):
            return Features(torch.zeros(1, 1), torch.from_numpy(obs["proprio"]))

        def suggest(self, now, goals, horizon):
            self.ahead = [goal.proprio.tolist() for goal in goals]
            there = now.proprio + torch.tensor([0.05 * horizon, 0.0])
            return Suggestion(torch.tensor([[1.0, -1.0]] * horizon), Features(now.patches, there), self.chooses)

        def sample_z(self, shape, generator):
            return torch.zeros(*shape, 1)

        def rollout(self, context, actions, z):
            moved = (0.05 * actions * torch.tensor([1.0, 0.0])).cumsum(2)[:, :, None].expand(-1, -1, z.shape[2], -1, -1)
            return Features(torch.zeros(*moved.shape[:-1], 1, 1), context.features.proprio[:, None, None, -1:] + moved)

    def energy(goal):
        return lambda imagined, actions: (imagined.proprio[..., -1, :] - goal.proprio).norm(dim=-1)

    seen = {"pixels": np.zeros((16, 16, 3), np.uint8), "proprio": np.zeros(2, np.float32)}
    goals = [seen | {"proprio": np.array([0.0, y], np.float32)} for y in (0.25, 0.5)]
    for chooses, moves in ((True, [1.0, -1.0]), (False, [1.0, 0.0])):
        planner, moving = Both(), Moves()
        moving.chooses = chooses
        agent = Agent(moving, planner, energy, AgentConfig(subgoal_steps=(1, 9)))
        agent.reset(goals)
        assert np.array_equal(agent.act(seen), moves)
        assert moving.ahead == [[0.0, 0.25], [0.0, 0.5]]
        assert planner.costs[0] < 1e-6 < planner.costs[1]
        assert np.isclose(agent.last.energy, np.hypot(0.1, 0.25))  # of the next goal itself
        agent.act(seen)
        assert moving.ahead == [[0.0, 0.5]]
