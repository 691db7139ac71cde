"""The law of planners: bounds, warm start, reproducibility, optima, NaN; and the noise and choices they draw."""

import random

import numpy as np
import pytest
import torch

from planners.sampling import SamplingConfig, SamplingPlanner, _noise

METHODS = "cem", "icem", "mppi"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planner(method: str, **fields) -> SamplingPlanner:
    return SamplingPlanner(SamplingConfig(**{"method": method, "gripper": "gaussian", "samples": 64, **fields}))


def quadratic(optimum: torch.Tensor):
    """Squared distance to an optimum [B, H, A]."""
    return lambda actions: (actions - optimum[:, None]).square().sum((-2, -1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dims", [1, 2, 7])
def test_reaches_the_optimum_of_a_quadratic(method, dims):
    optimum = 1.2 * torch.rand(3, 2, dims, generator=seeded(1)) - 0.6
    search = planner(method, samples=400, iterations=12, elites=30, min_std=0.01)
    plan = search.plan(quadratic(optimum), torch.zeros(3, 2, dims), seeded())
    assert (plan.actions - optimum).abs().max() < 0.05


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gripper", ["gaussian", "categorical"])
def test_actions_stay_inside_the_bounds(method, gripper):
    seen = []

    def cost(actions):
        seen.append(actions)
        return -actions.sum((-2, -1))

    plan = planner(method, std=3.0, gripper=gripper).plan(cost, torch.full((2, 4, 3), 5.0), seeded())
    assert all(actions.abs().max() <= 1 for actions in seen)
    assert (plan.actions == 1).all()  # the optimum is a corner


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("horizon", [1, 3])
def test_one_candidate_is_what_there_was(method, horizon):
    start = torch.full((2, horizon, 4), 0.3)
    plan = planner(method, samples=1, elites=1).plan(quadratic(torch.zeros_like(start)), start, seeded())
    assert (plan.actions == start).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gripper", ["gaussian", "categorical"])
def test_cost_of_a_plan_is_the_cost_of_its_actions(method, gripper):
    weight = torch.randn(2 * 4, 5, generator=seeded(3))

    def cost(actions):
        return (actions.flatten(2) @ weight).tanh().sum(-1)

    plan = planner(method, gripper=gripper).plan(cost, torch.zeros(3, 2, 4), seeded())
    assert torch.allclose(plan.cost, cost(plan.actions[:, None])[:, 0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gripper", ["gaussian", "categorical"])
def test_never_worse_than_the_warm_start(method, gripper):
    for seed in range(20):
        start = 2 * torch.rand(2, 3, 4, generator=seeded(seed)) - 1
        cost = quadratic(start + 1e-3)  # the start is all but optimal
        plan = planner(method, samples=8, iterations=2, elites=2, gripper=gripper).plan(cost, start, seeded(seed))
        assert (plan.cost <= cost(start[:, None])[:, 0]).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gripper", ["gaussian", "categorical"])
def test_the_generator_is_the_only_randomness(method, gripper):
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    args = quadratic(torch.full((2, 3, 4), 0.3)), torch.zeros(2, 3, 4)
    search = planner(method, gripper=gripper, samples=32, elites=4)
    first, second, other = (search.plan(*args, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.actions, second.actions) and torch.equal(first.cost, second.cost)
    assert not torch.equal(first.actions, other.actions)
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state))


@pytest.mark.parametrize("method", METHODS)
def test_nan_costs_lose(method):
    optimum = torch.full((1, 2, 2), 0.5)

    def cost(actions):  # undefined on half of the space, which seems cheap
        value = quadratic(optimum)(actions)
        return torch.where(actions[..., 0, 0] < 0.2, torch.nan, value)

    plan = planner(method, samples=400, iterations=10).plan(cost, torch.zeros(1, 2, 2), seeded())
    assert torch.isfinite(plan.cost).all() and (plan.actions - optimum).abs().max() < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_without_any_finite_cost_the_warm_start_stays(method):
    start = torch.full((1, 2, 2), 0.25)
    plan = planner(method).plan(lambda actions: torch.full(actions.shape[:2], torch.nan), start, seeded())
    assert torch.equal(plan.actions, start) and plan.cost.isinf().all()


def test_problems_do_not_see_each_other():
    """A problem without finite costs, and one far away, leave the others' optimum where it is."""
    optimum = torch.stack([torch.full((2, 2), 0.5), torch.full((2, 2), -0.5), torch.zeros(2, 2)])

    def cost(actions):
        value = quadratic(optimum)(actions)
        return torch.stack([value[0], 1e6 * value[1], torch.full_like(value[2], torch.nan)])

    plan = planner("cem", iterations=10).plan(cost, torch.zeros(3, 2, 2), seeded())
    assert (plan.actions - optimum)[:2].abs().max() < 0.1 and (plan.actions[2] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_gripper_is_a_choice(method):
    """Full open and full close are cheap, the middle is not: a Gaussian averages, a choice decides, step by step."""
    want = torch.tensor([1.0, -1.0, 0.0])

    def cost(actions):
        arm = (actions[..., :3] - 0.3).square().sum((-2, -1))
        return arm + (actions[..., 3] - want).abs().clamp_max(0.3).sum(-1)

    plan = planner(method, gripper="categorical", samples=300, iterations=6).plan(cost, torch.zeros(1, 3, 4), seeded())
    assert torch.equal(plan.actions[0, :, 3], want)
    assert (plan.actions[..., :3] - 0.3).abs().max() < 0.15


def test_a_gripper_moves_as_late_as_it_may():
    """Of motions that cost the same the latest is taken; with a deadline, the latest before it."""
    for deadline in (4, 2, 1):

        def cost(actions):  # shut from the deadline on, whenever it closed
            opening = (1 + actions[..., 3].cumsum(-1)).clamp(0, 1)
            return 1e-3 * (actions[..., :3] - 0.3).square().sum((-2, -1)) + opening[..., deadline - 1 :].sum(-1) + 1e-3

        plan = planner("cem", gripper="categorical", samples=200).plan(cost, torch.zeros(1, 4, 4), seeded())
        assert plan.actions[0, :, 3].nonzero().flatten().tolist() == [deadline - 1]


def test_a_gripper_stays_where_it_is_unless_that_pays():
    def cost(actions):  # closing is worth 2 %, which is less than the margin
        return 1 + (actions[..., :3] - 0.3).square().sum((-2, -1)) + 0.02 * actions[:, :, 0, 3]

    still = planner("cem", gripper="categorical", margin=0.05).plan(cost, torch.zeros(1, 2, 4), seeded())
    eager = planner("cem", gripper="categorical", margin=0.0).plan(cost, torch.zeros(1, 2, 4), seeded())
    assert (still.actions[..., 3] == 0).all() and eager.actions[0, 0, 3] == -1


def test_a_gripper_moves_as_the_warm_start_has_it_unless_another_way_pays():
    def plan(costs, begun):  # of closing, holding and opening at the first step; a hold at the second
        def cost(actions):
            moved = actions[..., -1].round().long()
            return torch.tensor(costs)[moved[:, :, 0] + 1] + 9.0 * (moved[:, :, 1] != 0)

        start = torch.zeros(1, 2, 4)
        start[0, 0, -1] = begun
        return planner("cem", gripper="categorical", margin=0.2).plan(cost, start, seeded()).actions[0, :, -1].tolist()

    assert plan([1.1, 1.0, 1.05], -1.0) == [-1.0, 0.0]  # holding and opening gain too little
    assert plan([1.5, 1.0, 1.1], -1.0) == [0.0, 0.0]  # holding pays, and opening gains nothing over it
    assert plan([1.5, 1.4, 1.0], -1.0) == [1.0, 0.0]
    assert plan([1.1, 1.0, 1.05], 0.4) == [0.0, 0.0]  # what is no choice is a hold


@pytest.mark.parametrize("method", METHODS)
def test_fine_candidates_lie_near_the_warm_start_and_others_far(method):
    seen = []
    search = planner(method, std=1.0, fine=0.01, iterations=1)
    search.plan(lambda a: seen.append(a) or a.sum((-2, -1)), torch.zeros(1, 1, 2), seeded())
    size = seen[0][0, 1:].norm(dim=-1).flatten()
    assert (size < 0.05).float().mean() > 0.2 and (size > 0.5).float().mean() > 0.1


def test_choices_are_drawn_and_none_dies_out():
    drawn = []

    def cost(actions):
        drawn.append(actions[:, 1:, :, -1])
        return actions[..., -1].sum(-1)

    planner("cem", gripper="categorical", iterations=5, hold=0.5).plan(cost, torch.zeros(1, 1, 2), seeded())
    share = [[float((d == value).float().mean()) for value in (-1, 0, 1)] for d in drawn[:5]]
    assert all(sum(s) == pytest.approx(1) for s in share)
    assert share[0] == pytest.approx([0.25, 0.5, 0.25], abs=0.1)
    assert share[-1][0] > 0.8 and min(share[-1]) > 0.01


@pytest.mark.parametrize("horizon", [1, 2, 5, 8])
def test_coloured_noise_has_unit_variance_and_is_smooth(horizon):
    noise = _noise((20000, horizon), 2.0, seeded())
    assert noise.shape == (20000, horizon)
    assert noise.std().item() == pytest.approx(1, abs=0.02) and abs(noise.mean().item()) < 0.02
    if horizon > 2:
        assert (noise[:, 1:] * noise[:, :-1]).mean() > 0.2


def test_std_for_each_dimension():
    seen = []
    search = planner("cem", std=(0.5, 0.001), iterations=1, min_std=1e-4)
    search.plan(lambda a: seen.append(a) or a.sum((-2, -1)), torch.zeros(1, 1, 2), seeded())
    assert seen[0][..., 0].std() > 0.3 and seen[0][..., 1].std() < 0.01


@pytest.mark.parametrize("fields, words", [
    ({"method": "sgd"}, "expected one of cem, icem, mppi"),
    ({"gripper": "maybe"}, "expected one of categorical, gaussian"),
    ({"samples": 0}, "samples is 0: expected at least 1"),
    ({"iterations": -1}, "iterations is -1"),
    ({"elites": 20, "samples": 10}, "elites is 20 of 10 samples"),
    ({"std": -0.1}, "expected more than 0"),
    ({"momentum": 1.0}, "momentum is 1.0"),
    ({"fine": 0.0}, "fine is 0.0"),
    ({"margin": -0.1}, "margin is -0.1"),
])  # fmt: skip
def test_bad_configs_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        SamplingConfig(**fields)


def test_bad_warm_starts_and_costs_are_refused():
    search = SamplingPlanner()
    cost = quadratic(torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match=r"\[B, H, A\], got \[2, 4\]"):
        search.plan(cost, torch.zeros(2, 4), seeded())
    with pytest.raises(ValueError, match="NaN"):
        search.plan(cost, torch.full((1, 2, 4), torch.nan), seeded())
    with pytest.raises(ValueError, match=r"expected \[B, N\]"):
        search.plan(lambda actions: actions.sum(), torch.zeros(1, 2, 4), seeded())
    with pytest.raises(ValueError, match="std has 3 entries"):
        SamplingPlanner(SamplingConfig(std=(1.0, 1.0, 1.0))).plan(cost, torch.zeros(1, 2, 4), seeded())
    with pytest.raises(ValueError, match="gripper_dims"):
        SamplingPlanner(SamplingConfig(gripper_dims=(9,))).plan(cost, torch.zeros(1, 2, 4), seeded())


def test_a_plan_that_costs_nan_never_runs_where_another_does_not():
    """Whatever leaves the gripper alone costs NaN, the warm start too."""

    def cost(actions):
        return torch.where(actions[..., -1].abs().amax(2) < 0.5, torch.nan, actions[..., 0].mean(2))

    plan = planner("cem").plan(cost, torch.zeros(2, 2, 4), seeded())
    assert torch.isfinite(plan.cost).all() and torch.isfinite(cost(plan.actions[:, None])).all()


def test_a_cautious_planner_searches_longer_and_no_further_off():
    config = SamplingPlanner(SamplingConfig(samples=10, iterations=1, elites=2, std=0.3, fine=0.1)).cautious.config
    least = SamplingConfig()
    assert (config.samples, config.iterations, config.elites) == (least.samples, least.iterations, least.elites)
    assert (config.std, config.fine) == (0.3, 0.1)
    assert SamplingPlanner(SamplingConfig(samples=90)).cautious.config.samples == 90
