"""The ways to a goal: that they are found in data, that a model keeps them, and that a search begins with them."""

import numpy as np
import torch

from planners.agent import Agent
from planners.interface import Plan
from worldmodel import data
from worldmodel.data import Frames
from worldmodel.encoder import EncoderConfig, VideoEncoder
from worldmodel.energy import GoalEnergy
from worldmodel.guide import NEAR, WIDER, Guide, Way, fit_guide
from worldmodel.interface import Features
from worldmodel.model import LatentModel, load
from worldmodel.predictor import Predictor, PredictorConfig
from worldmodel.propose import ProposalConfig, fit_way, judge_way, ways

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
    found, waypoint = guide(torch.zeros(3), goal, 4)
    assert torch.equal(waypoint, goal)
    assert torch.allclose(found, torch.tensor([[1.0, -0.4], [1.0, 0.0], [0.4, 0.0], [0.0, 0.0]]), atol=0.05)
    assert guide(torch.zeros(2, 5, 3), torch.ones(2, 5, 3), 2)[0].shape == (2, 5, 2, 2)


def test_the_learned_way_is_that_of_demonstrations(tmp_path):
    """Hands that go along x and then along y to a place, where straight ahead is aslant; episodes that failed do not count."""
    rng = np.random.default_rng(0)
    for i in range(200):
        at, goal = np.array([0.0, 0.0, 0.0, 0.08]), np.array([*rng.uniform(0.1, 0.3, 2), 0.0, 0.08])
        proprio, actions = [at], []
        while np.abs(goal - at).max() > 1e-6:
            left = (goal - at)[:2]
            actions.append(np.clip([left[0] / 0.05, 0.0 if abs(left[0]) > 1e-6 else left[1] / 0.05, 0.0], -1, 1))
            at = at + np.append(0.05 * actions[-1], 0.0)
            proprio.append(at)
        failed = i % 4 == 3
        told = -np.array(actions, np.float32) if failed else np.array(actions, np.float32)
        arrays = {"pixels": np.zeros((len(proprio), 1, 1, 3), np.uint8), "proprio": np.array(proprio, np.float32), "actions": told}
        data.write_episode(data.episode_path(tmp_path, i), {**arrays, "success": np.bool_(not failed)})
    paths = [data.episode_path(tmp_path, i) for i in range(200)]
    data.write_recipe(tmp_path, "this test", {}, 200, [data.checksum(path) for path in paths])
    every = data.Dataset.open(tmp_path).load(keys=("proprio", "actions"))
    index, ahead = ways(every)
    assert (index < ahead).all() and set(ahead) == {end - 1 for i, end in enumerate(every.offsets[1:]) if i % 4 != 3}
    way, again = (fit_way(every, ProposalConfig(way_steps=600)) for _ in range(2))
    assert judge_way(way, every) < 0.08
    assert all(torch.equal(a, b) for a, b in zip(way.state_dict().values(), again.state_dict().values(), strict=True))


def learned() -> Guide:
    """A way whose action is always the first dimension's, and a straight one that is not."""
    guide = Guide(4, 2, Way(4, 2))
    for parameter in guide.way.parameters():
        torch.nn.init.zeros_(parameter)
    guide.way.net[-1].bias.data[:] = torch.tensor([1.0, 0.0])
    guide.effect[0, 0] = 0.05
    guide.inverse[1, 1] = 10.0
    return guide


def test_the_learned_way_is_for_what_is_far_and_no_wider_open():
    now, goal = torch.zeros(4), torch.tensor([0.0, 0.1, 0.0, -0.03])
    actions, waypoint = learned()(now, goal, 2)
    assert torch.equal(actions, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert torch.allclose(waypoint, torch.tensor([0.1, 0.0, 0.0, -0.03]))  # where it leads, with the goal's opening
    for other in (torch.tensor([0.0, NEAR - 1e-3, 0.0, 0.0]), torch.tensor([0.0, 0.1, 0.0, WIDER + 1e-3])):
        actions, waypoint = learned()(now, other, 2)
        assert (actions[:, 0] == 0).all() and torch.equal(waypoint, other)
    both = learned()(torch.zeros(2, 4), torch.stack((goal, other)), 2)
    assert torch.equal(both[0][1], actions) and torch.equal(both[1][1], other) and both[0][0, 0, 0] == 1


def model(guide: Guide | None) -> LatentModel:
    sizes = EncoderConfig(image_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=1)
    dims = 3 if guide is None else len(guide.inverse)
    predictor = Predictor(PredictorConfig(12, (2, 2), dims, 2, embed_dim=12, depth=1, num_heads=1))
    return LatentModel(VideoEncoder(sizes), predictor, guide=guide)


def test_a_model_keeps_it(tmp_path):
    guide = fit_guide(frames())
    model(guide).save(tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path / "model.safetensors").guide.inverse, guide.inverse)
    model(learned()).save(tmp_path / "way.safetensors")
    again = load(tmp_path / "way.safetensors").guide.way
    assert all(torch.equal(a, b) for a, b in zip(learned().way.state_dict().values(), again.state_dict().values(), strict=True))
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
    """It begins with the learned way, and a plan that stays on it costs less than one straight to the goal."""

    class Both:
        def plan(self, cost, warm_start, generator):
            straight = torch.tensor([[[0.0, 1.0]] * 2])
            self.start, self.costs = warm_start, cost(torch.stack((warm_start, straight), 1))[0]
            return Plan(warm_start, self.costs[:1], torch.zeros_like(warm_start))

    class Moves:
        """Imagines proprioception alone: each action's own."""

        action_dim, latent_dim, max_context = 2, 1, 1

        def __init__(self, guide):
            self.known = model(guide)

        def encode(self, obs):
            return Features(torch.zeros(1, 1), torch.from_numpy(obs["proprio"]))

        def suggest(self, now, goal, horizon):
            return self.known.suggest(now, goal, horizon)

        def sample_z(self, shape, generator):
            return torch.zeros(*shape, 1)

        def rollout(self, context, actions, z):
            moved = 0.05 * torch.nn.functional.pad(actions, (0, 2)).cumsum(2)[:, :, None].expand(-1, -1, z.shape[2], -1, -1)
            return Features(torch.zeros(*moved.shape[:-1], 1, 1), context.features.proprio[:, None, None, -1:] + moved)

    def energy(goal):
        return lambda imagined, actions: (imagined.proprio[..., -1, :3] - goal.proprio[..., :3]).norm(dim=-1)

    seen = {"pixels": np.zeros((16, 16, 3), np.uint8), "proprio": np.zeros(4, np.float32)}
    planner = Both()
    agent = Agent(Moves(learned()), planner, energy)
    agent.reset(seen | {"proprio": np.array([0.0, 0.1, 0.0, 0.0], np.float32)})
    assert np.array_equal(agent.act(seen), [1.0, 0.0])
    assert planner.costs[0] < 1e-6 < planner.costs[1]
    assert np.isclose(agent.last.energy, np.hypot(0.1, 0.1))  # of the goal itself
