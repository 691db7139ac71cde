"""The agent in a loop, on a point that moves in a plane and whose picture shows where it is."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from planners.agent import Agent, AgentConfig
from planners.imagine import imagine
from planners.gate import Limits, SafetyGate
from planners.interface import Plan, Verdict
from planners.sampling import SamplingConfig, SamplingPlanner
from worldmodel.energy import GoalEnergy
from worldmodel.interface import Context, Features, Suggestion

STEP = 0.1  # of the plane's side, that an action of 1 moves


def picture(position) -> dict[str, np.ndarray]:
    """Red and green tell the position, in [0, 1]."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[..., :2] = np.round(255 * np.clip(position, 0, 1))
    return {"pixels": pixels, "proprio": np.asarray(position, np.float32)}


class Plane:
    """The world: a point in the unit square."""

    def __init__(self, position=(0.1, 0.1)):
        self.position = np.array(position)

    def step(self, action):
        assert action.shape == (2,) and action.dtype == np.float32 and np.abs(action).max() <= 1
        self.position = np.clip(self.position + STEP * action, 0, 1)
        return picture(self.position)


@dataclass
class PlaneModel:
    """Knows the plane; z [2] is a push, of `push` in standard deviations."""

    push: float = 0.0
    broken: bool = False
    action_dim = 2
    latent_dim = 2
    max_context = 3

    def __post_init__(self):
        self.contexts, self.widest = [], 0

    def encode(self, obs):
        assert not any(key.startswith("privileged/") for key in obs)
        patches = torch.from_numpy(obs["pixels"][..., :1, :1, :2] / np.float32(255)).squeeze(-3)
        return Features(patches, None if obs.get("proprio") is None else torch.from_numpy(obs["proprio"]))

    def sample_z(self, shape, generator):
        if generator is None:
            return torch.zeros(*shape, 2)
        return torch.randn(*shape, 2, generator=generator)

    def rollout(self, context, actions, z):
        self.contexts.append(context)
        self.widest = max(self.widest, z.shape[1] * z.shape[2])
        start = context.features.patches[:, -1, 0][:, None, None, None]
        moved = (STEP * actions[:, :, None] + self.push * z).cumsum(3)
        patches = (start + moved).unsqueeze(-2)
        return Features(patches * (torch.nan if self.broken else 1), (start + moved))


def planner(**fields) -> SamplingPlanner:
    return SamplingPlanner(SamplingConfig(gripper="gaussian", samples=64, elites=8, iterations=4, **fields))


def agent_of(model=None, config=AgentConfig(), **parts) -> Agent:
    return Agent(model or PlaneModel(), planner(), GoalEnergy, config, **parts)


def go(agent, world, steps, goal=None, seed=0):
    """Actions and decisions of `steps` steps."""
    if goal is not None:
        agent.reset(goal, seed)
    obs, decisions = picture(world.position), []
    for _ in range(steps):
        obs = world.step(agent.act(obs))
        decisions.append(agent.last)
    return decisions


@pytest.mark.parametrize("goal", [picture((0.8, 0.5)), {"pixels": picture((0.8, 0.5))["pixels"]}])
def test_reaches_a_goal_with_and_without_proprioception(goal):
    world = Plane()
    decisions = go(agent_of(), world, 10, goal)
    assert np.abs(world.position - (0.8, 0.5)).max() < 0.03
    assert decisions[-1].observed < 0.03 < 0.3 < decisions[0].observed


class Reading(PlaneModel):
    """Reads where the point is off its picture, by a tenth wrong: the camera is not where it was."""

    def read(self, patches):
        return patches[..., 0, :] + 0.1

    def encode(self, obs):
        seen = super().encode(obs)
        return seen if seen.proprio is not None else seen._replace(proprio=self.read(seen.patches))


def test_what_a_reading_is_off_now_is_taken_off_the_goals():
    goal = {"pixels": picture((0.8, 0.5))["pixels"]}
    agent = agent_of(Reading(), AgentConfig())
    go(agent, Plane(), 3, goal)
    assert torch.allclose(agent._pursued[0].proprio, torch.tensor([0.8, 0.5]), atol=5e-3)
    go(agent, Plane(), 1, picture((0.8, 0.5)))  # told, not read
    assert torch.equal(agent._pursued[0].proprio, torch.tensor([0.8, 0.5]))
    agent = agent_of(Reading(), AgentConfig(readings=0))
    go(agent, Plane(), 3, goal)
    assert torch.allclose(agent._pursued[0].proprio, torch.tensor([0.9, 0.6]), atol=5e-3)  # not asked to


def test_a_decision_tells_what_was_imagined():
    agent, world = agent_of(PlaneModel(push=0.02), AgentConfig(horizon=3, looks=5)), Plane()
    decision = go(agent, world, 1, picture((0.9, 0.9)))[0]
    assert decision.plan.actions.shape == (1, 3, 2) and decision.imagined.patches.shape == (5, 3, 1, 2)
    assert np.array_equal(decision.action, decision.plan.actions[0, 0].numpy())
    assert decision.energies.shape == (5,) and decision.energy == pytest.approx(decision.energies.mean().item())
    assert decision.spread == pytest.approx(0.02 * 3**0.5, rel=0.8) and decision.seconds > 0
    assert decision.verdict.go and decision.subgoal == 0
    certain = go(agent_of(PlaneModel(push=0.0)), Plane(), 1, picture((0.9, 0.9)))[0]
    assert certain.spread == 0


def test_same_seed_same_actions_and_no_global_randomness():
    state = torch.get_rng_state()
    runs = [
        np.stack([d.action for d in go(agent_of(PlaneModel(push=0.05), AgentConfig(samples_z=2)), Plane(), 4, picture((0.5, 0.9)), seed)])
        for seed in (0, 0, 1)
    ]
    assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_reset_leaves_no_residue():
    agent = agent_of()
    first = [d.action for d in go(agent, Plane(), 3, picture((0.5, 0.9)), 3)]
    go(agent, Plane((0.9, 0.2)), 4, [picture((0.1, 0.9)), picture((0.3, 0.3))], 5)
    again = [d.action for d in go(agent, Plane(), 3, picture((0.5, 0.9)), 3)]
    assert np.array_equal(first, again)


def test_context_holds_the_last_frames_and_the_actions_between():
    model = PlaneModel()
    agent, world, positions, actions = agent_of(model), Plane(), [], []
    agent.reset(picture((0.9, 0.9)))
    obs = picture(world.position)
    for t in range(5):
        positions.append(obs["proprio"])
        model.contexts.clear()
        actions.append(agent.act(obs))
        context = model.contexts[-1]
        frames = min(t + 1, 3)
        assert context.features.patches.shape == (1, frames, 1, 2) and context.actions.shape == (1, frames - 1, 2)
        assert np.array_equal(context.features.proprio[0], positions[-frames:])
        assert np.array_equal(context.actions[0], np.reshape(actions[-frames:][: frames - 1], (-1, 2)))
        obs = world.step(actions[-1])


def test_a_plan_is_run_for_the_replanning_interval():
    decisions = go(agent_of(config=AgentConfig(horizon=3, replan=2)), Plane(), 4, picture((0.9, 0.9)))
    assert decisions[0].plan is decisions[1].plan and decisions[1].plan is not decisions[2].plan
    assert np.array_equal(decisions[1].action, decisions[0].plan.actions[0, 1].numpy())
    assert decisions[1].observed < decisions[0].observed


def test_a_plan_goes_on_while_nobody_decides():
    agent, world = agent_of(config=AgentConfig(horizon=4, replan=4)), Plane()
    plan = go(agent, world, 1, picture((0.9, 0.9)))[0].plan
    between = plan.actions[0, 1].numpy()
    agent.watch(picture(world.position))
    obs = world.step(between)
    assert np.array_equal(agent.act(obs, between), plan.actions[0, 2].numpy()) and agent.last.plan is plan
    assert np.array_equal(agent.last.asked[0], agent.last.action)


def test_steps_without_a_decision_use_up_the_budget():
    agent, world, turns = agent_of(config=AgentConfig(subgoal_steps=(4, 10, 4))), Plane(), []
    agent.reset(FAR)
    obs = picture(world.position)
    for t in range(18):
        if t % 3:
            agent.watch(obs, np.zeros(2, np.float32))
        else:
            obs = world.step(agent.act(obs))
            turns.append(agent.last.subgoal)
    assert turns == [0, 0, 1, 1, 1, 2]  # at steps 0, 3, 6, 9, 12, 15
    holding = agent_of(config=AgentConfig(subgoal_steps=(2, 1, 1)), gate=Refusing())
    holding.reset(FAR)
    holding.act(obs)
    for _ in range(5):
        holding.watch(obs, np.zeros(2, np.float32))
    holding.act(obs)
    assert holding.last.subgoal == 0



def test_the_last_plan_is_the_next_warm_start():
    starts = []

    @dataclass(frozen=True)
    class Watching:
        inner: SamplingPlanner

        def plan(self, cost, warm_start, generator):
            starts.append(warm_start)
            return self.inner.plan(cost, warm_start, generator)

    agent = Agent(PlaneModel(), Watching(planner()), GoalEnergy, AgentConfig(horizon=3))
    decisions = go(agent, Plane(), 2, picture((0.9, 0.9)))
    assert (starts[0] == 0).all()
    assert torch.equal(starts[1][:, :2], decisions[0].plan.actions[:, 1:]) and (starts[1][:, 2] == 0).all()


FAR = [picture(p) for p in ((0.9, 0.1), (0.9, 0.9), (0.1, 0.9))]


@pytest.mark.parametrize("goals, steps, turns", [
    (FAR, (), [0] * 4 + [1] * 10 + [2] * 8),  # V-JEPA 2-AC's budget
    (FAR, (2, 1, 1), [0] * 2 + [1] + [2] * 19),
    (FAR[:2], (), [0] * 8 + [1] * 14),
    (FAR[:1], (), [0] * 22),
    (FAR[0], (5,), [0] * 22),
])  # fmt: skip
def test_subgoals_take_turns_by_budget(goals, steps, turns):
    decisions = go(agent_of(config=AgentConfig(subgoal_steps=steps)), Plane(), 22, goals)
    assert [d.subgoal for d in decisions] == turns


def test_subgoals_take_turns_by_energy():
    config = AgentConfig(subgoal_steps=(50, 50, 50), switch_energy=0.02)
    world = Plane()
    decisions = go(agent_of(config=config), world, 30, FAR)
    turns = [d.subgoal for d in decisions]
    assert turns == sorted(turns) and turns[0] == 0 and turns[-1] == 2
    assert 8 <= turns.index(1) <= 10 and np.abs(world.position - (0.1, 0.9)).max() < 0.03


def test_a_countdown_looks_ahead_a_step_less_each_time():
    config = AgentConfig(horizon=4, countdown=True, least_horizon=2, subgoal_steps=(6, 9, 9))
    decisions = go(agent_of(config=config), Plane(), 9, FAR)
    assert [d.plan.actions.shape[1] for d in decisions] == [4, 3, 2, 2, 2, 2, 4, 3, 2]


def test_subgoals_take_turns_where_it_is_stuck():
    config = AgentConfig(subgoal_steps=(50, 50, 50), patience=2, progress=0.02)
    world = Plane()
    turns = [d.subgoal for d in go(agent_of(config=config), world, 40, FAR)]
    assert turns == sorted(turns) and 8 <= turns.index(1) <= 14 and turns[-1] == 2
    assert np.abs(world.position - (0.1, 0.9)).max() < 0.03


def test_a_failed_subgoal_is_tried_again_from_the_first():
    class Walled(Plane):
        """The upper half cannot be entered, which the model does not know; after 30 steps it can."""

        steps = 0

        def step(self, action):
            self.steps += 1
            obs = super().step(action)
            if self.steps <= 30:
                self.position[1] = min(self.position[1], 0.5)
                obs = picture(self.position)
            return obs

    class Honest(PlaneModel):
        """Knows of the wall."""

        def rollout(self, context, actions, z):
            imagined = super().rollout(context, actions, z)
            limit = torch.tensor([1.0, 0.5 if world.steps < 30 else 1.0])
            return Features(imagined.patches.minimum(limit), imagined.proprio.minimum(limit))

    world = Walled()
    config = AgentConfig(subgoal_steps=(50, 50, 50), patience=2, progress=0.02, retry=0.3)
    decisions = go(agent_of(Honest(), config), world, 40, [FAR[0], FAR[1], FAR[1]])
    turns = [d.subgoal for d in decisions]
    assert 0 in turns[turns.index(1) :] and turns[-1] == 2
    for given in ({"retry": 0.3}, {}):  # where a budget ends it has failed as well
        world = Walled()
        budgets = AgentConfig(subgoal_steps=(12, 6, 50), **given)
        turns = [d.subgoal for d in go(agent_of(Honest(), budgets), world, 25, [FAR[0], FAR[1], FAR[1]])]
        assert (0 in turns[turns.index(1) :]) == ("retry" in given)
    once = AgentConfig(subgoal_steps=(12, 6, 50), retry=0.3, retries=0)
    world = Walled()
    turns = [d.subgoal for d in go(agent_of(Honest(), once), world, 25, [FAR[0], FAR[1], FAR[1]])]
    assert turns == sorted(turns)
    never = AgentConfig(subgoal_steps=(50, 50, 50), patience=2, progress=0.02)
    world = Walled()
    turns = [d.subgoal for d in go(agent_of(Honest(), never), world, 30, FAR)]
    assert turns == sorted(turns)


def test_a_first_subgoal_that_is_still_far_keeps_its_turn():
    for retry, first in ((None, 3), (0.1, 6)):
        config = AgentConfig(subgoal_steps=(3, 9, 9), retry=retry, retries=1)
        assert [d.subgoal for d in go(agent_of(config=config), Plane(), 8, FAR)].index(1) == first


def test_a_new_subgoal_is_planned_for_at_once():
    config = AgentConfig(horizon=4, replan=4, subgoal_steps=(2, 9, 9))
    decisions = go(agent_of(config=config), Plane(), 3, FAR)
    assert decisions[1].plan is decisions[0].plan and decisions[2].plan is not decisions[1].plan


class Refusing:
    """A gate that never opens."""

    def judge(self, plan, imagined, seen):
        return Verdict(False, 1.0, 0.0, "always")


def test_a_closed_gate_yields_only_fallback_actions():
    world = Plane()
    decisions = go(agent_of(gate=Refusing()), world, 4, picture((0.9, 0.9)))
    assert all((d.action == 0).all() and not d.verdict.go for d in decisions) and (world.position == 0.1).all()
    back = go(agent_of(gate=Refusing(), fallback=np.array([0.5, 0.0])), Plane(), 2, picture((0.9, 0.9)))
    assert all(np.array_equal(d.action, [0.5, 0.0]) for d in back)
    assert [d.answer for d in go(agent_of(config=AgentConfig(refusals=3), gate=Refusing()), Plane(), 4, FAR)] == ["hold"] * 2 + ["hand over"] * 2


def test_a_camera_that_stands_still_is_refused_to_the_end():
    agent = agent_of(config=AgentConfig(refusals=3), gate=SafetyGate(Limits(), sampled=False))
    agent.reset(FAR)
    seen = picture((0.1, 0.1))
    answers = []
    for _ in range(8):
        agent.act(seen)  # always the same picture
        answers.append(agent.last.answer)
    assert answers[:2] == ["plan"] * 2 and answers[2:] == ["hold"] * 2 + ["hand over"] * 4


def test_a_robot_that_is_held_up_is_not_taken_for_a_camera_that_stands_still():
    for trembles, last in ((1e-6, "plan"), (0.01, "hold")):
        agent = agent_of(gate=SafetyGate(Limits(), sampled=False))
        agent.reset(FAR)
        for t in range(4):
            seen = picture((0.1, 0.1))
            seen["proprio"] = seen["proprio"] + np.float32(trembles * t)
            agent.act(seen)
        assert agent.last.answer == last


def test_what_is_no_goal_is_named():
    with pytest.raises(ValueError, match="got NoneType; pass info"):
        agent_of().reset(None)
    agent_of().reset(FAR, seed=np.int64(3))


def test_each_camera_is_watched():
    for views, last in ((1, "plan"), (2, "hold")):
        model = PlaneModel()
        model.views = views
        agent = agent_of(model, gate=SafetyGate(Limits(), sampled=False))
        agent.reset(FAR)
        for t in range(4):
            seen = picture((0.1, 0.1))
            seen["pixels"][:, : seen["pixels"].shape[1] // 2] += np.uint8(t)  # one of two goes on
            agent.act(seen)
        assert agent.last.answer == last


def test_every_step_of_a_plan_is_judged():
    class Second:
        """Refuses the second time."""

        asked = 0

        def judge(self, plan, imagined, seen):
            self.asked += 1
            return Verdict(self.asked != 2, float(self.asked == 2), 0.0, "second")

    gate = Second()
    decisions = go(agent_of(config=AgentConfig(horizon=4, replan=4), gate=gate), Plane(), 3, FAR)
    assert decisions[1].plan is not decisions[0].plan and decisions[2].plan is decisions[1].plan and gate.asked == 4


def test_a_hold_uses_up_no_budget():
    agent = agent_of(config=AgentConfig(subgoal_steps=(2, 2), refusals=99), gate=Refusing())
    decisions = go(agent, Plane(), 6, [picture((0.5, 0.5)), picture((0.9, 0.9))])
    assert [d.subgoal for d in decisions] == [0] * 6


def test_a_refused_plan_is_answered_with_a_safer_one():
    class Limited:
        """Lets small steps pass."""

        def __init__(self, limit):
            self.limit = limit

        def judge(self, plan, imagined, seen):
            size = float(plan.actions.abs().max())
            return Verdict(size <= self.limit, size, self.limit, "size")

    hazard = lambda context, imagined, actions: (actions[:, :, None].abs().amax(-1) > 0.3).float()  # noqa: E731
    agent = agent_of(config=AgentConfig(risk_weight=0.0), gate=Limited(0.5))
    agent.hazard = hazard
    cautious = go(agent, Plane(), 1, FAR)[0]
    assert cautious.answer == "cautious plan" and 0 < np.abs(cautious.action).max() <= 0.5
    smaller = go(agent_of(gate=Limited(0.6)), Plane(), 1, FAR)[0]
    assert smaller.answer == "smaller step" and 0.3 < np.abs(smaller.action).max() <= 0.6
    assert smaller.verdict.go
    least = go(agent_of(gate=Limited(0.3)), Plane(), 1, FAR)[0]
    assert least.answer == "smaller step" and 0.1 < np.abs(least.action).max() <= 0.3
    back = AgentConfig(retreat=(-0.1, 0.0))
    assert [d.answer for d in go(agent_of(config=back, gate=Limited(0.2)), Plane(), 2, FAR)] == ["retreat"] * 2
    assert np.array_equal(go(agent_of(config=back, gate=Limited(0.2)), Plane(), 1, FAR)[0].action, np.float32([-0.1, 0.0]))
    assert go(agent_of(config=back, gate=Limited(0.05)), Plane(), 1, FAR)[0].answer == "hold"


def test_where_a_plan_is_refused_a_cautious_planner_is_asked_once():
    class Two:
        """A planner with another for refusals."""

        cautious = SamplingPlanner(SamplingConfig(gripper="gaussian", samples=8, elites=2, iterations=1))

        def plan(self, cost, warm_start, generator):
            actions = torch.full_like(warm_start, -0.9)
            return Plan(actions, cost(actions[:, None])[:, 0], actions)

    class First:
        """Refuses what the first of them wants."""

        def judge(self, plan, imagined, seen):
            return Verdict(bool((plan.actions != -0.9).any()), 0.0, 0.0, "-0.9")

    agent = agent_of(gate=First())
    agent.planner, agent.hazard = Two(), lambda context, imagined, actions: torch.zeros(*imagined.patches.shape[:4])
    assert go(agent, Plane(), 1, FAR)[0].answer == "cautious plan"


@dataclass
class Detouring(PlaneModel):
    """Knows a slow way along the second dimension, too."""

    speed: float = 0.2

    def detour(self, now, goals, horizon):
        return Suggestion(torch.tensor([[0.0, self.speed]]).expand(horizon, 2), goals[0], True)


def test_once_a_plan_is_near_the_limit_it_goes_by_the_detour_to_the_end():
    class Sideways:
        """Scores motion along the first dimension, refuses what goes too far along either."""

        def __init__(self, limit):
            self.limit = limit

        def judge(self, plan, imagined, seen):
            score = float(plan.actions[0, 0].abs().max())
            return Verdict(score <= self.limit, score, self.limit, "far")

    def answers(model, limit, **config):
        agent = agent_of(model, AgentConfig(**config), gate=Sideways(limit), hazard=lambda _, imagined, __: torch.zeros(*imagined.patches.shape[:4]))
        return go(agent, Plane(), 4, FAR)

    refused = answers(Detouring(), 0.5)
    assert [d.answer for d in refused] == ["detour", "plan", "plan", "plan"] and all(np.allclose(d.action, [0.0, 0.2]) for d in refused)
    assert not refused[0].asked[1].go and refused[0].verdict.go and refused[1].asked[1].go
    near = answers(Detouring(), 1.5)
    assert [d.answer for d in near] == ["detour", "plan", "plan", "plan"] and near[0].asked[1].go
    assert all(np.abs(d.action).max() > 0.5 for d in answers(Detouring(), 1.5, worry=0.9)[:2])  # far from the limit it is not asked
    shorter = answers(Detouring(), 0.15)
    assert [d.answer for d in shorter] == ["smaller step"] * 4 and all(np.allclose(d.action, [0.0, 0.1]) for d in shorter)
    idle = answers(Detouring(speed=0.1), 0.5)
    assert "detour" not in [d.answer for d in idle] and idle[0].answer != "plan"
    assert [d.answer for d in go(agent_of(Detouring()), Plane(), 2, FAR)] == ["plan"] * 2  # no gate


@pytest.mark.parametrize(("hazard", "first"), [(0.04, "plan"), (0.3, "detour")])
def test_only_hazard_worries_a_gate_that_lets_go(hazard, first):
    likely = lambda _, imagined, actions: hazard * actions[:, :, None, :, 0].abs().expand(imagined.patches.shape[:4])  # noqa: E731
    gate = SafetyGate(Limits(hazard=0.5, surprise=0.4, novelty=1.5), likely, lambda patches: torch.ones(()), sampled=False)
    agent = agent_of(Detouring(), gate=gate, hazard=likely)
    decision = go(agent, Plane(), 1, FAR)[0]
    assert decision.verdict.go and decision.answer == first and decision.verdict.score > 0.6  # of novelty


def test_a_plan_that_may_run_is_not_given_up_for_a_detour_that_may_not():
    class Straight:
        """Knows of a risk along the first dimension, and lets nothing go along the second."""

        def judge(self, plan, imagined, seen):
            aside = float(plan.actions[0, 0, 1].abs()) > 0.15
            return Verdict(not aside, float(aside), 0.5, "aside", risk=0.1 if aside else 0.6)

    assert go(agent_of(Detouring(), gate=Straight()), Plane(), 1, FAR)[0].answer == "plan"


def test_where_the_model_breaks_a_gate_holds_and_goes_on_after():
    class Breaking(PlaneModel):
        def encode(self, obs):
            seen = super().encode(obs)
            return seen if len(answers) != 2 else seen._replace(patches=seen.patches * torch.nan)

        def suggest(self, now, goals, horizon):
            way = (goals[-1].patches - now.patches)[0] / STEP
            return Suggestion(way.clamp(-1, 1).expand(horizon, 2), goals[-1], True)

    answers = []
    agent, world = agent_of(Breaking(), AgentConfig(), gate=SafetyGate(Limits(), sampled=False)), Plane()
    agent.reset(FAR)
    obs = picture(world.position)
    for _ in range(8):
        action = agent.act(obs)
        answers.append((agent.last.answer, agent.last.verdict.why))
        assert np.isfinite(action).all() and (answers[-1][0] == "plan" or not action.any())
        obs = world.step(action)
    names = [answer for answer, _ in answers]
    assert names[:3] == ["plan", "plan", "hold"] and "NaN or infinity" in answers[2][1] and names[-1] == "plan"
    with pytest.raises(ValueError, match="imagines NaN or infinity"):
        go(agent_of(PlaneModel(broken=True)), Plane(), 1, FAR)  # nobody refuses it
    held = go(agent_of(PlaneModel(broken=True), gate=SafetyGate(Limits(), sampled=False)), Plane(), 2, FAR)
    assert [decision.answer for decision in held] == ["hold"] * 2


def test_a_cautious_plan_looks_at_several_futures():
    model = PlaneModel(push=0.05)
    refuses = type("Refuses", (), {"judge": lambda self, plan, imagined, seen: Verdict(False, 1.0, 0.0, "no")})()
    go(agent_of(model, AgentConfig(looks=4), gate=refuses, hazard=lambda _, imagined, __: torch.zeros(*imagined.patches.shape[:4])), Plane(), 1, FAR)
    assert model.widest == 64 * 4  # candidates and futures


def test_a_rehearsal_asks_for_what_an_episode_does_and_leaves_that_as_it_is():
    class Watched(Detouring):
        def detour(self, now, goals, horizon):  # stays where it is at the goal
            way = super().detour(now, goals, horizon)
            return way._replace(actions=way.actions * float((now.patches - goals[-1].patches).abs().max() > 0))

        def rollout(self, context, actions, z):
            asked.add((*actions.shape[:3], z.shape[2]))
            return super().rollout(context, actions, z)

    runs, asked = [], set()
    for rehearsed in (False, True):
        agent, world = agent_of(Watched(push=0.05), AgentConfig(horizon=2, samples_z=3)), Plane()
        agent.reset(FAR, 3)
        if rehearsed:
            asked.clear()
            agent.rehearse(picture((0.3, 0.3)))
            before = set(asked)
        runs.append([agent.act(picture(world.position)) for _ in range(3)])
    assert np.array_equal(*runs)
    assert asked == before and (1, 1, 2, 3) in before  # a plan as it is told, too


def test_imagination_in_chunks_costs_the_same_and_bounds_what_is_held():
    context = Context(Features(torch.rand(2, 1, 1, 2)), torch.zeros(2, 0, 2))
    energy, actions = GoalEnergy(Features(torch.rand(2, 1, 2))), torch.rand(2, 50, 4, 2)
    costs = []
    for chunk in (1, 64, 10_000):
        model = PlaneModel(push=0.1)
        generator = torch.Generator().manual_seed(0)
        cost = imagine(model, context, energy, 4, generator, samples_z=3, chunk=chunk)
        costs.append(cost(actions))
        assert model.widest * 2 <= max(chunk, 6)
        assert torch.equal(cost(actions), costs[-1])
    assert costs[0].shape == (2, 50) and all(torch.equal(c, costs[0]) for c in costs)
    still = imagine(PlaneModel(push=0.1), context, energy, 4)(actions)
    assert torch.equal(still, imagine(PlaneModel(), context, energy, 4)(actions))  # the prior's mean


def test_same_candidates_cost_the_same_whatever_z():
    """Candidates differ by their actions alone."""
    context = Context(Features(torch.zeros(1, 1, 1, 2)), torch.zeros(1, 0, 2))
    cost = imagine(PlaneModel(push=0.5), context, GoalEnergy(Features(torch.ones(1, 2))), 3, torch.Generator(), 2)
    costs = cost(torch.zeros(1, 10, 3, 2))
    assert (costs == costs[0, 0]).all()


def test_act_before_reset_is_refused():
    with pytest.raises(RuntimeError, match="call reset"):
        agent_of().act(picture((0, 0)))


@pytest.mark.parametrize("goal, words", [
    ([], "empty list"),
    ({"proprio": np.zeros(2)}, "'pixels'"),
    (np.zeros((4, 4, 3), np.uint8), "expected a goal with 'pixels'"),
    ({"pixels": np.zeros((4, 4, 3), np.float32)}, "uint8 in 0..255, got float32"),
    ({"pixels": np.zeros((4, 4), np.uint8)}, r"\[h, w, 3\], got \[4, 4\]"),
    ([picture((0, 0)), {"pixels": np.zeros((8, 4, 3), np.uint8)}], r"\[4, 4, 3\] as of the first goal, got \[8, 4, 3\]"),
    ({**picture((0, 0)), "proprio": np.array([np.nan, 0])}, "finite numbers"),
])  # fmt: skip
def test_bad_goals_are_refused(goal, words):
    with pytest.raises(ValueError, match=words):
        agent_of().reset(goal)


def test_a_reset_that_fails_leaves_the_episode_as_it_was():
    agent, alone = agent_of(config=AgentConfig(subgoal_steps=(1, 2))), agent_of()
    for one in (agent, alone):
        one.reset(FAR[0])
    with pytest.raises(ValueError, match="2 entries for 3"):
        agent.reset(FAR)
    assert np.array_equal(agent.act(picture((0.1, 0.1))), alone.act(picture((0.1, 0.1)))) and agent.last.energy == alone.last.energy
    new = agent_of(config=AgentConfig(subgoal_steps=(1, 2)))
    with pytest.raises(ValueError, match="2 entries for 3"):
        new.reset(FAR)
    with pytest.raises(RuntimeError, match="call reset"):
        new.act(picture((0, 0)))


def test_bad_observations_and_imaginations_are_refused():
    agent = agent_of()
    agent.reset(picture((0.5, 0.5)))
    with pytest.raises(ValueError, match=r"of the observation of shape \[4, 4, 3\]"):
        agent.act({"pixels": np.zeros((5, 5, 3), np.uint8)})
    with pytest.raises(ValueError, match="proprio of the observation as finite"):
        agent.act({**picture((0, 0)), "proprio": np.array([np.inf, 0])})
    broken = agent_of(PlaneModel(broken=True))
    broken.reset(picture((0.5, 0.5)))
    with pytest.raises(ValueError, match="model imagines NaN"):
        broken.act(picture((0, 0)))


def test_bad_configs_are_refused():
    for fields in ({"horizon": 0}, {"replan": 3, "horizon": 2}, {"looks": 0}, {"subgoal_steps": (4, 0)}, {"samples_z": -1}, {"progress": np.nan}, {"retry": -1}):
        with pytest.raises(ValueError, match="expected"):
            AgentConfig(**fields)
    with pytest.raises(ValueError, match="2 entries for 3 sub-goals"):
        agent_of(config=AgentConfig(subgoal_steps=(1, 2))).reset(FAR)
    with pytest.raises(ValueError, match="retreat"):
        agent_of(config=AgentConfig(retreat=(1.0,)))
    with pytest.raises(ValueError, match="fallback"):
        agent_of(fallback=np.zeros(3))


def test_it_plans_for_where_the_actions_under_way_will_have_led():
    """Two agents, one of them told that an action is still running: it decides as the other does a step later."""
    world, told = Plane(), agent_of()
    told.reset(picture((0.9, 0.9)))
    running = np.array([1.0, 0.2], np.float32)
    told.act(picture(world.position), under_way=[running])
    ahead = told.model.contexts[-1].features.patches[0, -1, 0]
    assert torch.allclose(ahead, torch.from_numpy(world.step(running)["proprio"]), atol=0.01)
    later = agent_of()
    later.reset(picture((0.9, 0.9)))
    later.act(picture(world.position))
    assert abs(later.last.observed - told.last.observed) < 0.01


def test_what_really_ran_is_remembered():
    agent, world = agent_of(), Plane()
    agent.reset(picture((0.9, 0.9)))
    obs = picture(world.position)
    agent.act(obs)
    ran = [np.array([0.1, 0.0], np.float32), np.array([0.0, -0.3], np.float32)]
    agent.watch(world.step(ran[0]), ran[0])
    agent.act(world.step(ran[1]), ran[1])
    context = agent.model.contexts[-1]
    assert context.features.patches.shape[1] == 3 and torch.allclose(context.actions[0], torch.from_numpy(np.stack(ran)))


def test_actions_from_outside_are_checked_before_anything_is_decided():
    agent, world = agent_of(), Plane()
    agent.reset(picture((0.9, 0.9)))
    for given in ({"under_way": np.zeros(2)}, {"under_way": [np.full(2, np.nan)]}, {"ran": np.zeros(3)}):
        with pytest.raises(ValueError, match="2 finite numbers"):
            agent.act(picture(world.position), **given)
        assert agent.last is None
    assert agent.act(picture(world.position), under_way=np.zeros((2, 2))).shape == (2,)  # an array of them will do


def test_without_proprioception_it_plans_ahead_as_well():
    agent = agent_of()
    agent.reset({"pixels": picture((0.9, 0.9))["pixels"]})
    agent.act({"pixels": picture((0.2, 0.2))["pixels"]}, under_way=[np.ones(2, np.float32)])
    assert agent.model.contexts[-1].features.proprio is None
