"""Several agents that decide at once: for `gym.vector`, and wherever one model plans for many.

    agents = VectorAgent(lambda shared: Agent(shared, SamplingPlanner(), GoalEnergy), model, envs.num_envs)
    agents.reset({"pixels": info["goal"]["pixels"]}, where=begins)
    obs, _, terminated, truncated, info = envs.step(agents.act(obs))
    begins, over = over, terminated | truncated  # Gymnasium's default autoreset: the step after the last one begins the next

Each is an `Agent` that knows nothing of the others. They run by turns, each until it asks the model to encode or to imagine;
then the model answers all of them as one batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planners.agent import Agent
from worldmodel.interface import Context, Features, Obs, Suggestion, WorldModel


class VectorAgent:
    """`count` agents of one model, as `make(shared)` makes each of what stands for it; its `agents` are there to be looked at.

    The seconds of their decisions are those until all have decided. An agent's `chunk` bounds its own futures, of which there
    are `count` times as many.
    """

    def __init__(self, make: Callable[[WorldModel], Agent], model: WorldModel, count: int) -> None:
        if count < 1:
            raise ValueError(f"count is {count}: expected at least 1, the number of environments")
        self._model, self._episodes = _Shared(model), 0
        self.agents = [make(self._model) for _ in range(count)]

    def reset(
        self, goals: Sequence[Obs | Sequence[Obs]] | Mapping[str, np.ndarray], seeds: Sequence[int] | None = None,
        where: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Start an episode of each, or of those `where` bool [n] says so, towards goals as `Agent.reset` takes them.

        A mapping is n goals in one, as in `gym.vector`'s info["goal"], where "_proprio" bool [n] says which have one.
        seeds [n] are the planners', by default new ones for each episode. Raises ValueError for another number of goals or seeds, or a `where` of another kind.
        """
        count = len(self.agents)
        if isinstance(goals, Mapping):
            has = np.ones(count, bool) if "_proprio" not in goals else np.asarray(goals["_proprio"])
            goals = _each({key: goals[key] for key in ("pixels", "proprio") if key in goals}, count, "goals")
            goals = [own if known else {"pixels": own["pixels"]} for own, known in zip(goals, has)]
        if seeds is None:
            seeds = range(self._episodes, self._episodes + count)
        self._episodes += count
        where = np.ones(count, bool) if where is None else np.asarray(where)
        if where.dtype != bool or where.shape != (count,):
            raise ValueError(f"expected where as bool [{count}], got {where.dtype} {list(where.shape)}; say of each agent whether it begins")
        for name, given in (("goals", goals), ("seeds", seeds)):
            if len(given) != count:
                raise ValueError(f"got {len(given)} {name} for {count} agents; expected one for each")
        for i in np.flatnonzero(where):
            self.agents[i].reset(goals[i], seeds[i])

    def rehearse(self, obs: Mapping[str, np.ndarray]) -> None:
        """`Agent.rehearse` of all, for observations as `act` takes them."""
        self._together(lambda agent, own: agent.rehearse(own), obs)

    def act(self, obs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Actions float32 [n, A] for observations {"pixels": uint8 [n, h, w, 3], "proprio": float32 [n, S]}.

        Raises as `Agent.act` does; the others have decided then, so `reset` all.
        """
        return np.stack(self._together(lambda agent, own: agent.act(own), obs))

    def _together(self, what: Callable[[Agent, Obs], Any], obs: Mapping[str, np.ndarray]) -> list[Any]:
        """What each agent makes of its observation, the model asked once for all."""
        each = _each({key: obs[key] for key in ("pixels", "proprio") if obs.get(key) is not None}, len(self.agents), "observations")
        return self._model.together([lambda a=a, o=o: what(a, o) for a, o in zip(self.agents, each)])


def _each(obs: Mapping[str, np.ndarray], count: int, what: str) -> list[dict[str, np.ndarray]]:
    """Rows of arrays [n, ...]; raises ValueError where these are not `count`."""
    for key, value in obs.items():
        if len(value) != count:
            raise ValueError(f"got {len(value)} {what} of {key} for {count} agents; expected one for each")
    return [{key: value[i] for key, value in obs.items()} for i in range(count)]


class _Turn(threading.Thread):
    """A task that runs only while it has its turn: until it asks for something, or is over."""

    own = threading.local()

    def __init__(self, task: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._task, self._going, self._stopped = task, threading.Semaphore(0), threading.Semaphore(0)
        self.question: tuple | None = None
        self.answer, self.result, self.error, self._given_up = None, None, None, None
        self.start()

    def run(self) -> None:
        _Turn.own.turn = self
        torch.set_num_threads(1)  # of this thread; a team of its own for its small products takes longer than they do
        self._going.acquire()
        try:
            if self._given_up is not None:
                raise self._given_up
            self.result = self._task()
        except BaseException as error:  # whatever it is, it is raised where the turns are given
            self.error = error
        self._stopped.release()

    def go_on(self) -> bool:
        """Give it its turn; whether it asks for something now."""
        self.question = None
        self._going.release()
        self._stopped.acquire()
        return self.question is not None

    def give_up(self, error: BaseException) -> None:
        """Have it raise an error where it waits, or asks next."""
        self._given_up = error
        self._going.release()

    def ask(self, *question: Any) -> Any:
        """Inside the task: end the turn with a question, and return its answer; what went wrong with that is raised."""
        if self._given_up is None:
            self.question = question
            self._stopped.release()
            self._going.acquire()
        answer = self.answer if self._given_up is None else self._given_up
        if isinstance(answer, BaseException):
            raise answer
        return answer


class _Shared:
    """A world model that answers what tasks ask at the same time as one batch; otherwise the model itself."""

    def __init__(self, model: WorldModel) -> None:
        self._model = model
        self._joint: dict[tuple[int, ...], tuple[list[Context], Context]] = {}  # of contexts, by their ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode(self, obs: Obs) -> Features:
        turn = getattr(_Turn.own, "turn", None)
        return self._model.encode(obs) if turn is None else turn.ask("encode", obs)

    def rollout(self, context: Context, actions: Tensor, z: Tensor) -> Features:
        turn = getattr(_Turn.own, "turn", None)
        return self._model.rollout(context, actions, z) if turn is None else turn.ask("rollout", context, actions, z)

    def suggest(self, now: Features, goals: Sequence[Features], horizon: int) -> Suggestion | None:
        return self._way("suggest", now, goals, horizon)

    def detour(self, now: Features, goals: Sequence[Features], horizon: int) -> Suggestion | None:
        return self._way("detour", now, goals, horizon)

    def _way(self, which: str, now: Features, goals: Sequence[Features], horizon: int) -> Suggestion | None:
        if not hasattr(self._model, which):
            return None
        turn = getattr(_Turn.own, "turn", None)
        return getattr(self._model, which)(now, goals, horizon) if turn is None else turn.ask(which, now, goals, horizon)

    def together(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        """Results of tasks that ask this model; raises the first error of any once all are over."""
        self._joint.clear()
        threads = torch.get_num_threads()
        turns: list[_Turn] = []
        try:
            turns.extend(_Turn(task) for task in tasks)
            asking = [turn for turn in turns if turn.go_on()]
            while asking:
                alike: dict[tuple, list[_Turn]] = {}
                for turn in asking:
                    alike.setdefault(_shape(turn.question), []).append(turn)
                for group in alike.values():
                    self._answer(group)
                asking = [turn for turn in asking if turn.go_on()]
        except BaseException as error:  # an interrupt, as a rule: no task is left behind, waiting
            for turn in turns:
                turn.give_up(error)
            raise
        finally:
            torch.set_num_threads(threads)  # which new threads take over
        for turn in turns:
            if turn.error is not None:
                raise turn.error
        return [turn.result for turn in turns]

    def _answer(self, group: list[_Turn]) -> None:
        """Answer questions of the same kind and shape."""
        try:
            (kind, *_), questions = group[0].question, [turn.question[1:] for turn in group]
            with torch.no_grad():
                if kind == "encode":
                    whole = self._model.encode({key: np.stack([obs[key] for (obs,) in questions]) for key in questions[0][0]})
                    answers = [whole.map(lambda x, i=i: x[i]) for i in range(len(group))]
                elif kind in ("suggest", "detour"):
                    nows, goals, (horizon, *_) = zip(*questions)
                    whole = getattr(self._model, kind)(_stacked(nows), [_stacked(each) for each in zip(*goals)], horizon)
                    answers = [None if whole is None else _row(whole, i) for i in range(len(group))]
                else:
                    contexts, actions, z = zip(*questions)
                    sizes = [len(a) for a in actions]
                    whole = self._model.rollout(self._joined(contexts), torch.cat(actions), torch.cat(z))
                    parts = [[None] * len(group) if x is None else x.split(sizes) for x in whole]
                    answers = [Features(*own) for own in zip(*parts)]
        except Exception as error:  # whose it is, and what to do about it, is for those who asked
            answers = [error] * len(group)
        for turn, answer in zip(group, answers):
            turn.answer = answer

    def _joined(self, contexts: Sequence[Context]) -> Context:
        """One context of several, the same one for the same ones: a model may remember what it made of it."""
        key = tuple(map(id, contexts))
        if key not in self._joint:
            patches, proprio = zip(*(c.features for c in contexts))
            unknown = next((torch.full_like(c.held, torch.nan) for c in contexts if c.held is not None), None)
            held = None if unknown is None else torch.cat([unknown[:1].expand(len(c.actions), -1) if c.held is None else c.held for c in contexts])
            features = Features(torch.cat(patches), None if proprio[0] is None else torch.cat(proprio))
            self._joint[key] = list(contexts), Context(features, torch.cat([c.actions for c in contexts]), held)
        return self._joint[key][1]


def _stacked(features: Sequence[Features]) -> Features:
    """Features of each as rows of one."""
    return Features(*(None if x[0] is None else torch.stack(x) for x in zip(*features)))


def _row(suggestion: Suggestion, i: int) -> Suggestion:
    """What is suggested to one of several."""
    return Suggestion(suggestion.actions[i], suggestion.waypoint.map(lambda x: x[i]), suggestion.chooses)


def _shape(question: tuple) -> tuple:
    """What questions must have in common to be one batch."""
    kind, first, *others = question
    if kind == "encode":
        return kind, *((key, np.shape(first[key])) for key in sorted(first))
    if kind in ("suggest", "detour"):
        goals, horizon = others
        return kind, horizon, *((x.patches.shape, x.proprio is None) for x in (first, *goals))
    proprio = None if first.features.proprio is None else first.features.proprio.shape[1:]
    return kind, first.features.patches.shape[1:], proprio, *(x.shape[1:] for x in others)
