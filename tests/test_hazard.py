"""The hazard head learns what is unsafe, is honest about it, and keeps a planner away from it."""

import numpy as np
import pytest
import torch

from planners.imagine import imagine, tail
from planners.sampling import SamplingConfig, SamplingPlanner
from worldmodel.data import Frames
from worldmodel.hazard import LOOKED, auroc, calibration_error, fit_hazard, held_in, judge_hazard, looks, moments, moments_before
from worldmodel.interface import Context, Features
from worldmodel.probe import AttentiveProbe


def steps(seed: int, episodes: int = 160, length: int = 25):
    """Episodes in which a step is unsafe where the action pushes down although the hand, proprio 0, is low."""
    rng = np.random.default_rng(seed)
    frames = episodes * length
    proprio = rng.uniform(0, 1, (frames, 3)).astype(np.float32)
    actions = rng.uniform(-1, 1, (frames, 2)).astype(np.float32)
    features = rng.normal(size=(frames, 4, 6)).astype(np.float16)
    unsafe = np.zeros(frames, int)
    unsafe[1:] = (proprio[1:, 0] < 0.3) & (actions[:-1, 0] < 0)
    offsets = np.arange(0, frames + 1, length)
    return features, proprio, Frames({"proprio": proprio, "actions": actions}, offsets, (None,) * episodes), unsafe


@pytest.fixture(scope="module")
def head():
    return fit_hazard(*steps(0), epochs=20, batch=128)


def test_it_learns_what_is_unsafe(head):
    scores = judge_hazard(head, *steps(1))
    assert scores["hazard_auroc"] > 0.95 and scores["hazard_ece"] < 0.1
    assert 0.1 < scores["hazard_rate"] < 0.2


def test_training_is_repeatable_and_leaves_the_generators_alone(head):
    before = torch.get_rng_state()
    again = fit_hazard(*steps(0), epochs=20, batch=128)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), again.state_dict().values(), strict=True))


def test_it_may_see_as_others_have_learned_to():
    torch.manual_seed(0)
    look = AttentiveProbe(4, 6, 5)
    before = {name: x.clone() for name, x in look.state_dict().items()}
    features, told, frames, unsafe = steps(0, episodes=8)
    head = fit_hazard(features, told, frames, unsafe, epochs=1, look=look)
    seen = torch.from_numpy(features).float()
    own, theirs = head.look(seen), look(seen)
    assert torch.allclose(own, LOOKED * (theirs - theirs.mean(0)) / theirs.std(0), atol=1e-3)
    assert all(torch.equal(x, before[name]) for name, x in look.state_dict().items())


def test_a_planner_keeps_away_from_it(head):
    """A model whose hand goes where it is told, and a goal that lies where it is unsafe to push."""

    class World:
        max_context = action_dim = 2
        latent_dim = 1

        def sample_z(self, shape, generator):
            return torch.zeros(*shape, 1)

        def rollout(self, context, actions, z):
            b, n, h, _ = actions.shape
            proprio = torch.full((b, n, 1, h, 3), 0.2)
            return Features(torch.zeros(b, n, 1, h, 4, 6), proprio)

    context = Context(Features(torch.zeros(1, 1, 4, 6), torch.full((1, 1, 3), 0.2)), torch.zeros(1, 0, 2))
    energy = lambda imagined, actions: (1 + actions[..., 0].mean(-1))[:, :, None]  # noqa: E731  the lower, the better
    found = {}
    for weight in (0.0, 5.0):
        cost = imagine(World(), context, energy, 1, None, hazard=head, risk_weight=weight)
        planner = SamplingPlanner(SamplingConfig(gripper="gaussian"))
        found[weight] = planner.plan(cost, torch.zeros(1, 1, 2), torch.Generator().manual_seed(0)).actions[0, 0, 0]
    assert found[0.0] < -0.9 < -0.3 < found[5.0]


def test_it_is_asked_about_plans_as_it_was_trained_on_steps():
    """The steps of a plan that is imagined as it really went are those of the data, from whichever step it is made on."""
    features, told, frames, _ = steps(2, episodes=3)
    frames.actions[:, -1] = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], len(frames))
    held = held_in(frames)
    for start in (25, 26, 31):  # of the second episode
        past, ahead = slice(max(25, start - 2), start + 1), slice(start + 1, start + 4)
        tensors = [torch.from_numpy(x.astype(np.float32))[None] for x in (features, told, frames.actions, held)]
        patches, proprio, actions, grips = tensors
        context = Context(Features(patches[:, past], proprio[:, past]), actions[:, past][:, :-1], grips[:, start])
        future = Features(patches[:, ahead][:, None, None], proprio[:, ahead][:, None, None])
        asked = moments(context, future, actions[:, start : start + 3][:, None])
        known = moments_before(told, frames, held, np.arange(start + 1, start + 4))
        for a, b in zip(asked, known):
            assert torch.equal(a[0, 0, 0].nan_to_num(-9), b.nan_to_num(-9))


def test_a_plan_that_goes_as_imagined_is_as_likely_to_go_wrong_as_its_steps_in_the_data(head):
    """The head sees the same pictures before the same steps, whoever asks."""
    features, told, frames, _ = steps(2, episodes=3)
    held, start = held_in(frames), 26
    patches, proprio, actions, grips = (torch.from_numpy(x.astype(np.float32))[None] for x in (features, told, frames.actions, held))
    context = Context(Features(patches[:, 25:27], proprio[:, 25:27]), actions[:, 25:26], grips[:, start])
    future = Features(patches[:, None, None, 27:30], proprio[:, None, None, 27:30])
    asked = head(context, future, actions[:, None, start : start + 3])[0, 0, 0]
    after = np.arange(start + 1, start + 4)
    known = head.log_odds(looks(head, features)[torch.from_numpy(after - 1)], moments_before(told, frames, held, after)).sigmoid()
    assert torch.allclose(asked, known, atol=1e-5) and asked.std() > 0


def test_what_is_held_is_known_until_the_gripper_opens():
    _, _, frames, _ = steps(0, episodes=1, length=6)
    frames.actions[:, -1] = [0, -1, 0, -1, 1, 0]
    held = held_in(frames)
    assert np.isnan(held[[0, 1, 5]]).all() and (held[2:5] == frames.proprio[1]).all()


def test_the_tail_is_the_worse_half():
    assert tail(torch.tensor([[[0.1, 0.9, 0.5, 0.3]]])).tolist() == [[pytest.approx(0.7)]]
    assert tail(torch.tensor([[[0.4]]])).tolist() == [[pytest.approx(0.4)]]


def test_measures():
    assert auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])) == 0.75
    assert auroc(np.full(4, 0.5), np.array([True, False, True, False])) == 0.5
    assert np.isnan(auroc(np.ones(3), np.ones(3, bool)))
    assert calibration_error(np.array([0.25, 0.25, 0.25, 0.25]), np.array([True, False, False, False])) == 0.0
    assert calibration_error(np.array([0.9, 0.9]), np.array([False, False])) == pytest.approx(0.9)
