"""Who acts in a benchmark, and one episode of it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import nn

import envs
from envs import run
from envs.base import ACTION_DIMS
from envs.control import STEP_SECONDS
from envs.foreign import make as make_foreign
from envs.foreign import policy as foreign_policy
from envs.experts import make_policy
from planners.agent import Agent, AgentConfig
from planners.gate import Limits, SafetyGate
from planners.interface import Gate, OpenGate
from planners.sampling import SamplingConfig, SamplingPlanner
from worldmodel import model
from worldmodel.checkpoint import MAKERS, read_header, sha256_of
from worldmodel.commands.abstention import HIGHEST
from worldmodel.commands.actors import Imitator, Paced, RandomGate
from worldmodel.commands.film import Film
from worldmodel.commands.simulator import SimulatorModel
from worldmodel.density import Density, load_calibration
from worldmodel.encoder import usable
from worldmodel.energy import EnergyConfig, GoalEnergy
from worldmodel.hub import load_encoder
from worldmodel.interface import WorldModel

SCRIPTED = ("expert", "random", "nothing")
log = logging.getLogger(__name__)
NOT_JUDGED = (  # what a calibration does not depend on
    "out", "episodes", "seed", "video", "workers", "threads", "gate", "calibration", "abstain", "trajectory", "record", "suite", "draw", "realtime",
)  # fmt: skip
SHIFTS = "randomization", "object"  # where a calibration may be asked about what it does not come from
PROPRIO_SCALE = (0.1, 0.1, 0.1, 0.5, 0.5, 0.5, 0.08)  # m, rad and m of opening that count as much as features do


class Player:
    """Plays episodes of a benchmark; `config` is that of `worldmodel bench`, with every field filled in."""

    def __init__(self, config) -> None:
        self.config = config
        torch.set_num_threads(config.threads)
        self.model = None if config.policy in SCRIPTED else load(config.model, config.policy, config.begin).to(usable(config.device))
        self.env = _environment(config, self.model)
        self.agent = None if self.model is None else self.make_agent(self.model)
        self._rehearsed = False

    def begin(self, seed: int) -> None:
        """Start the episode of a seed; raises ValueError where environment, model and goals do not go together."""
        _, info = self.env.reset(seed=seed)
        if self.agent is not None:
            self.agent.reset(goals(self.config)(info), seed)

    def play(self, seed: int, steps: list[dict[str, Any]] | None = None) -> tuple[dict[str, Any], Film, run.Record]:
        """Play the episode of a seed: what results.json says of it, its film, and itself. What was decided is added to `steps`."""
        steps = [] if steps is None else steps
        act = self._scripted(seed, steps) if self.agent is None else self._planned(seed, steps)
        record = run.rollout(self.env, act, seed)
        return _entry(self.config, record, steps), _film(self.config, record, steps), record

    def close(self) -> None:
        """Free what the environments hold."""
        self.env.close()
        if isinstance(getattr(self.agent, "model", None), SimulatorModel):
            self.agent.model.close()

    def _scripted(self, seed: int, steps: list) -> run.Act:
        # Another stream of numbers than the scene's.
        rng = np.random.default_rng((seed, 1))
        foreign = self.config.env.id
        policy = foreign_policy(self.config.policy, self.env, rng) if foreign else make_policy(self.config.policy, self.env.config, rng)

        def act(obs, info):
            start = time.perf_counter()
            action = policy(info)
            steps.append({"seconds": time.perf_counter() - start, "subgoal": 0, "energy": None})
            return action

        return act

    def _planned(self, seed: int, steps: list) -> run.Act:
        agent, goals_of = self.agent, goals(self.config)
        if self.config.gate == "random":  # whoever plays the episode
            agent.gate = RandomGate(self.config.abstain, seed)

        decide, begun = Paced(agent, STEP_SECONDS) if self.config.realtime else agent.act, False

        def act(obs, info):
            nonlocal begun
            if not begun:
                agent.reset(goals_of(info), seed)
                if self.config.realtime and not self._rehearsed:
                    agent.rehearse(obs)
                    self._rehearsed = True
                begun = True
            action = decide(obs)
            last = agent.last
            judged, decides = getattr(last, "verdict", None), getattr(decide, "decides", True)
            answer = getattr(last, "answer", "plan")
            waits = getattr(decide, "begins", 0)  # what does not run at once cannot be tried at once
            spared = self._would_go_wrong(last.asked[0]) if answer != "plan" and last.asked and not waits else None
            steps.append({"seconds": last.seconds if decides else None, "late": getattr(decide, "late", False), "subgoal": last.subgoal,
                          "energy": last.observed if decides else None, "verdict": judged, "answer": answer, "asked": getattr(last, "asked", None),
                          "begins": waits, "spared": spared})  # fmt: skip
            return action

        return act

    def _would_go_wrong(self, action: np.ndarray) -> bool | None:
        """Whether a step that does not run would have had an unsafe event: tried, and taken back. None where it cannot be tried."""
        if self.config.env.id:
            return None
        state = self.env.get_state()
        info = self.env.step(action)[-1]
        self.env.set_state(state)
        return bool(info["unsafe"])

    def make_agent(self, world: WorldModel) -> Agent | Imitator:
        """An agent as the config says, of this player's model, or of what acts for it."""
        config = self.config
        if config.policy == "imitation":
            return Imitator(world, config.subgoal_steps, draws=config.draw, stray=config.stray)
        scale = PROPRIO_SCALE
        if config.env.id:  # where nobody has said what counts as much as features do: what the data spreads over
            if not hasattr(self.model, "predictor"):
                raise ValueError(f"{config.model} is an encoder: of {config.env.id} give a model, which knows how proprioception spreads")
            scale = tuple((2 * self.model.predictor.proprio_std).tolist())
        energy = EnergyConfig(config.distance, config.energy, proprio_weight=config.proprio_weight, proprio_scale=scale)
        names = ("samples", "iterations", "elites", "std", "fine", "hold", "margin", "eager_margin", "gripper")
        planner = SamplingPlanner(SamplingConfig(config.planner, **{name: getattr(config, name) for name in names}))
        simulated = config.policy == "simulator"
        if simulated:
            known = isinstance(self.model, model.LatentModel)
            encoder = self.model.encoder if known else self.model
            judged = getattr(self.model, "hazard", None) is not None  # each step, by the cost or by a gate, which `calibrate` puts in later
            drawn = "last" if config.energy == "last" and not judged else "all"
            world = SimulatorModel(encoder, self.env, drawn, self.model if known else None)
        look = AgentConfig(
            horizon=config.horizon, countdown=config.countdown, replan=config.replan,
            samples_z=0 if simulated else config.samples_z, looks=1 if simulated else 8, subgoal_steps=config.subgoal_steps, switch_energy=config.switch_energy, patience=config.patience,
            progress=config.progress, retry=config.retry, risk_weight=config.risk_weight, readings=config.readings,
            retreat=() if config.gate == "off" or config.env.id else (0.0, 0.0, 0.5) + (0.0,) * (world.action_dim - 3),  # up
        )  # fmt: skip
        hazard = getattr(self.model, "hazard", None)
        gate = self._make_gate()
        return Agent(world, planner, lambda goal: GoalEnergy(goal, energy), look, gate, hazard=hazard)

    def _make_gate(self) -> Gate:
        config = self.config
        if config.gate != "on":
            return OpenGate()
        limits, density = limits_of(config.calibration, config, getattr(self.model, "imagined_by", None))
        return self.gate_of(limits, density)

    def gate_of(self, limits: Limits, density: Density | None = None) -> SafetyGate:
        """The safety gate of this player's model."""
        hazard = getattr(self.model, "hazard", None)
        sampled = self.config.policy == "planner" and self.model.latent_dim > 0
        if sampled and getattr(self.model.predictor.config, "codes", False):  # of which all samples may be the same
            sampled = False
        return SafetyGate(limits, hazard, density, sampled)


def load(path: Path, policy: str, begin: str | None = None) -> nn.Module:
    """The model of a file, with what a search is to begin with; for the simulator an encoder's file will do."""
    if policy == "simulator" and read_header(path, *MAKERS)[0] == "encoder":
        return load_encoder(path)
    world = model.load(path)
    if begin in ("guide", "careful", "nothing"):
        world.policy = world.careful if begin == "careful" else None
    if begin == "nothing":
        world.guide = None
    return world


def _environment(config, world: nn.Module | None) -> gym.Env:
    """The environment of a benchmark, of pictures that the model knows."""
    if not config.env.id:
        return envs.make(env_config(config, world))
    env = make_foreign(config.env, 96 if world is None else world.encoder.config.image_size, config.max_steps)
    if world is not None and world.action_dim != env.action_space.shape[0]:
        raise ValueError(f"{config.model} plans actions of {world.action_dim} numbers, {config.env.id} takes {env.action_space.shape[0]}")
    return env


def env_config(config, world: nn.Module | None) -> envs.EnvConfig:
    """The environment that shows what a model was trained on, or the default one. Raises ValueError where none does."""
    made = envs.EnvConfig(
        config.task, config.object, cameras=config.cameras, max_steps=config.max_steps, randomization=config.randomization
    )
    if world is None:
        return made
    encoder = getattr(world, "encoder", world).config
    if encoder.views != len(config.cameras):
        raise ValueError(f"{config.model} looks through {encoder.views} cameras, got {', '.join(config.cameras)}; name as many, --cameras")
    made = replace(made, image_size=encoder.image_size)
    if (planned := getattr(world, "action_dim", made.action_dim)) not in ACTION_DIMS:
        raise ValueError(
            f"{config.model} plans actions of {planned} numbers, and is of another robot than this project's: play in its environment, "
            "`worldmodel bench --env.id`"
        )
    if planned != made.action_dim:
        made = replace(made, action_dim=planned)
    return made


def calibrated_for(config) -> dict[str, Any]:
    """What a calibration is of: task, model and planner of a benchmark's config, as JSON gives it back."""
    fields = {name: value for name, value in asdict(config).items() if name not in (*NOT_JUDGED, "model")}
    fields["model_sha256"] = sha256_of(config.model)
    return json.loads(json.dumps(fields))


def limits_of(path: Path, config, imagined_by: str | None) -> tuple[Limits, Density]:
    """What a calibration file holds. Raises ValueError where it is of another task, model or planner than a config's.

    Warns where it is of another object or randomization, over which no limit need carry, and where another library imagined: the
    numbers are the same but for rounding, which a limit may lie between.
    """
    found, here = load_calibration(path), calibrated_for(config)
    others = {name: f"{name} {found.of.get(name)} instead of {here[name]}" for name in here if found.of.get(name) != here[name]}
    shifted = [others.pop(name) for name in SHIFTS if name in others]
    if others:
        raise ValueError(f"{path} was calibrated for {', '.join(others.values())}; calibrate with the same flags: `worldmodel calibrate`")
    if shifted:
        log.warning("%s was calibrated for %s: its risk does not hold here, calibrate with the same flags for one that does", path, ", ".join(shifted))
    if (theirs := found.of.get("imagined_by", imagined_by)) != imagined_by:
        log.warning("%s tells what %s imagined, and here %s does, which rounds otherwise: to be sure, calibrate here", path, theirs, imagined_by)
    return Limits(**found.limits), found.usual


def goals(config) -> Callable[[dict], list[dict]]:
    """What a policy is told of an info: the goal or the sub-goals, as pictures alone unless goal_proprio."""
    keys = ("pixels", "proprio") if config.goal_proprio else ("pixels",)

    def goals_of(info):
        wanted = info["subgoals"] if config.goal == "subgoals" else [info["goal"]]
        if config.goal_proprio and not all("proprio" in goal for goal in wanted):
            raise ValueError(f"a goal of {config.env.id} is a picture alone; leave out --goal-proprio")
        return [{key: goal[key] for key in keys} for goal in wanted]

    return goals_of


def distance(task: str, info: dict) -> float | None:
    """What remains, in metres: of the hand to its target in reach, else of the object to its own. None where only a picture tells."""
    if "privileged/target_pos" not in info:  # an environment of others that nobody here knows
        return round(info["distance"], 4) if "distance" in info else None
    thing = info["privileged/tcp_pos" if task == "reach" else "privileged/object_pos"]
    return round(float(np.linalg.norm(thing - info["privileged/target_pos"])), 4)


def _entry(config, record: run.Record, steps: list[dict]) -> dict[str, Any]:
    """What results.json says of an episode."""
    unsafe = [
        {"step": t, "event": event, "value": round(float(value), 4)}
        for t, info in enumerate(record.infos)
        for event, value in info["unsafe"].items()
    ]
    return {
        "seed": record.seed,
        "task": config.env.id or config.task,
        "object": "" if config.env.id else config.object,
        "success": bool(record.success),
        "steps": len(record.actions),
        "initial_distance": distance(config.task, record.infos[0]),
        "final_distance": distance(config.task, record.infos[-1]),
        "grasped": bool(any(info.get("privileged/grasped", False) for info in record.infos)),
        "unsafe": unsafe,
        "subgoal": [step["subgoal"] for step in steps],
        "energy": [None if step["energy"] is None or not np.isfinite(step["energy"]) else round(step["energy"], 5) for step in steps],
        "decision_seconds": [round(step["seconds"], 5) for step in steps if step["seconds"] is not None],
        **({"late": sum(step["late"] for step in steps)} if config.realtime else {}),
        **_judgements(config, record, steps),
    }


def _judgements(config, record: run.Record, steps: list[dict]) -> dict[str, Any]:
    """What the gate said at each step, where there is one; `asked` as in `abstention`."""
    if config.gate == "off":
        return {}
    asked, decided = [], [(t, step) for t, step in enumerate(steps) if step["seconds"] is not None]
    for t, step in decided:
        ran = record.infos[t + 1 + step["begins"] :][:1]  # empty: the episode ended before it began
        wrong = step["spared"] if step["answer"] != "plan" else bool(ran[0]["unsafe"]) if ran else False
        if step["asked"]:
            verdict = step["asked"][1]
            asked.append([round(min(verdict.score, HIGHEST), 5), int(verdict.go), None if wrong is None else int(wrong)])
    return {
        "asked": asked,
        "answers": [step["answer"] for _, step in decided],
        "refused": [step["verdict"].why for _, step in decided if not step["verdict"].go],
    }


def _film(config, record: run.Record, steps: list[dict]) -> Film:
    told = config.goal == "subgoals" and config.policy not in SCRIPTED
    goals = record.subgoals if told else [record.goal]
    return Film(
        record.obs["pixels"],
        [goal["pixels"] for goal in goals],
        [step["subgoal"] for step in steps],
        [step["energy"] for step in steps],
        f"seed {record.seed}",
        "success" if record.success else "failed",
    )
