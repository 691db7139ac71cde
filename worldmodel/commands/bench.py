"""Let a policy act in a task and count its successes.

An episode succeeds, and ends, at the first step at which the task's strict criterion holds; it fails after --max-steps.
Episode i has seed + i. Writes OUT/results.json (config, episodes, summary) when all are done; until then finished ones lie
in OUT/episodes.jsonl, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from envs.foreign import Foreign
from worldmodel import data, files
from worldmodel.commands import abstention, cli, suite
from worldmodel.commands.collect import Level, Task, check_environment
from worldmodel.commands.episodes import Log, path_of, played, recorded

BUDGETS = {  # samples, iterations, elites, horizon, std, fine
    "planner": (40, 3, 8, 2, 0.6, 1.0),
    "simulator": (48, 3, 8, 2, 0.6, 1.0),
}
GUIDED = {  # the same where the model suggests the way
    "planner": (24, 1, 4, 2, 0.3, 0.1),
    "simulator": (24, 2, 6, 2, 0.3, 0.1),
}
TOLD = (*BUDGETS, "imitation")  # policies that see goals, with what a file holds
SUBGOAL_STEPS = {"pick-place": (12, 16, 12), "pick-place-fragile": (12, 16, 12), "grasp": (12, 8)}  # long enough for every start of the task
FOREIGN = ("planner", "imitation", "random", "nothing")  # policies that can act in an environment of others
RECORDING = ("out", "trajectory", "model", "policy", "seed", "threads", "samples", "iterations", "elites")  # fields that --trajectory heeds
NOT_OF_THE_RUN = ("out", "workers")  # fields that no number depends on


@dataclass(frozen=True)
class Config:
    """What to play, who plays, and where the results go."""

    out: Path
    """folder of the results; one that holds a part of the same run is completed"""
    task: Task = "pick-place"
    """what to do"""
    object: Literal["box", "cup", "can"] = "box"
    """what to do it with"""
    goal: Literal["final", "subgoals"] = "final"
    """what a planning policy is shown: a picture of the goal alone, or of all sub-goals on the way to it"""
    begin: Literal["policy", "guide", "careful", "nothing"] | None = None
    """where the search for a plan begins; policy: with what the model's policy would do; guide: on the straight way; careful: with what
    its careful policy would do, which takes a step or two longer and hurts less; nothing: with what is left of the last plan
    (default: the first of these that the model has; reach: guide)"""
    policy: Literal["planner", "simulator", "imitation", "expert", "random", "nothing"] = "planner"
    """who acts; planner: with the world model; simulator: the same with the true dynamics; imitation: the
    policy that `worldmodel imitate` trained, alone; expert: scripted"""
    episodes: int = 20
    """number of episodes"""
    seed: int = 10_000
    """seed of the first episode"""
    model: Path | None = None
    """model.safetensors; for the simulator an encoder.safetensors will do (default: the shipped weights)"""
    goal_proprio: bool = False
    """also tell the proprioception of the goals"""
    video: int = 0
    """how many episodes to show as animated WebP beside the results"""
    record: bool = False
    """also keep the episodes as a dataset in OUT/data, to train on what a planner sees and does"""
    draw: bool = False
    """--policy imitation draws the gripper's choice, instead of the likeliest, which a search begins with: what else may come of it, for --record"""
    stray: float = 0.0
    """share of the steps at which --policy imitation does something else than it would, shorter, aside or up, for --record: what a
    hazard head must know to judge other plans than a policy's own (0 to 1)"""
    workers: int = 1
    """number of processes; changes no result, but where the clock counts: --realtime"""
    threads: int = 1
    """processor threads of each"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the model is: cpu, cuda"""
    max_steps: int = 40
    """steps of 0.2 s until an episode has failed"""
    cameras: tuple[str, ...] = ("front",)
    """views, as the model was trained with"""
    randomization: Level = "none"
    """how much cameras, light and distractors vary between episodes (mild), what no picture tells, mass and grip, as well
    (hidden), a grip that holds or does not (slips), colours, mass and friction as well (strong), or one thing: the shifts"""
    planner: Literal["cem", "icem", "mppi"] = "cem"
    """how to search; icem differs from cem over 3 steps or more, and from the second iteration on"""
    samples: int | None = None
    """candidate plans per iteration (default: 24; where the search begins with nothing, or of an environment that nobody here knows, 40; simulator: 24, or 48)"""
    iterations: int | None = None
    """refinements of a plan (default: 1, or 3; simulator: 2, or 3)"""
    elites: int | None = None
    """candidates that are refined (default: 4, or 8; simulator: 6, or 8)"""
    horizon: int | None = None
    """length of a plan (steps) (default: 2)"""
    countdown: bool = False
    """arrive --horizon steps after a sub-goal's start: look ahead a step less at each, down to 1"""
    replan: int = 1
    """actions that are run of a plan (steps)"""
    std: float | None = None
    """of the first candidates, in units of an action (default: 0.3, or 0.6)"""
    fine: float | None = None
    """noise of a candidate is scaled by a factor from here to 1, log-uniform (default: 0.1, or 1)"""
    hold: float = 0.6
    """probability that the first candidates move the gripper at a step as the search began"""
    margin: float = 0.2
    """share of its energy that a plan must gain by moving the gripper otherwise than the search began"""
    eager_margin: float = 0.1
    """the same where the last steps brought no progress"""
    gripper: Literal["categorical", "gaussian"] | None = None
    """how the last action, a gripper's, is drawn: as a choice of close, hold, open, or like the others (default: categorical; of an environment
    that nobody here knows, gaussian)"""
    samples_z: int = 0
    """imagined futures of each candidate; 0: the one of the prior's mean"""
    energy: Literal["last", "sum"] | None = None
    """of the last imagined frame, or of all of them (default: last where the search begins with a policy, else sum)"""
    distance: Literal["l1", "l2", "cosine"] = "l1"
    """of features"""
    proprio_weight: float | None = None
    """of proprioception in the energy: the goal's own with --goal-proprio, else what the model reads off its picture (default: 2; reach: 0.5)"""
    risk_weight: float | None = None
    """of the probability that a step goes wrong, in a plan's cost (default: 0.2 where the model has a hazard head, else 0)"""
    readings: int = 5
    """where goals are pictures alone: last pictures by which the hand's place, as read off a goal's, is mended, since what a
    reading is off now it is off there too; 0: none"""
    subgoal_steps: tuple[int, ...] = ()
    """steps until the next sub-goal's turn (default: 12 16 12 in pick-place, 12 8 in grasp; 4 10 4 is V-JEPA 2-AC's)"""
    switch_energy: float | None = None
    """energy at which the next sub-goal's turn comes; it belongs to a model (default: none)"""
    patience: int | None = 2
    """steps without progress after which it looks ahead anew, and moves on if that promises none; None: any number"""
    progress: float = 0.005
    """what counts as progress, as a share of the highest energy on the way to a sub-goal"""
    retry: float | None = 0.16
    """share of an episode's highest energy above which a sub-goal has failed, and the first one's turn comes again; None: never"""
    realtime: bool = False
    """the simulator does not wait: a decision's action begins one step after its picture, or later where decisions take longer
    than a step's 0.2 s, and until then the last plan runs on. A gate judges a plan's first step when it is decided, and not by
    surprise: what it had imagined was of a later picture; further steps, where the next decision is late, run unjudged"""
    trajectory: Path | None = None
    """a recorded robot trajectory (.npz, as `worldmodel energy` takes it) instead of episodes: every step is planned from its
    picture to the next, one step ahead, and compared with what was recorded"""
    gate: Literal["off", "on", "random"] = "off"
    """whether plans are judged before they run, by what --calibration says; random: refuses by chance, to compare with"""
    calibration: Path | None = None
    """calibration.safetensors of `worldmodel calibrate`, for this task, model and planner"""
    abstain: float = 0.0
    """share of the decisions that --gate random holds (0 to 1)"""
    suite: str | None = None
    """instead of one benchmark all those of assets/suites/SUITE.yaml, as one table in OUT/table.md; takes --seed, --workers and --threads"""
    env: Foreign = Foreign()
    """an environment of others instead of the robot; planner, imitation, random or nothing act there, and where `envs.peers` knows it, expert and simulator.
    Of one that `envs.adapt` has made already, give the id alone"""

    def __post_init__(self):
        for name in ("episodes", "workers", "threads", "max_steps", "samples", "iterations", "elites", "horizon", "replan"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', '-')} is {value}, expected at least 1")
        for name in ("seed", "video", "samples_z", "readings", "proprio_weight", "risk_weight"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name.replace('_', '-')} is {getattr(self, name)}, expected at least 0")
        if (self.gate == "on") != (self.calibration is not None):
            raise ValueError("--gate on needs --calibration, which nothing else takes")
        if (self.gate == "random") != (self.abstain > 0) or not 0 <= self.abstain <= 1:
            raise ValueError(f"--gate random needs --abstain, more than 0 and at most 1, which nothing else takes; got {self.abstain}")
        if self.begin and self.policy not in BUDGETS:
            raise ValueError(f"--begin {self.begin} is for policies that search for plans; {self.policy} makes none")
        if self.draw and self.policy != "imitation":
            raise ValueError(f"--draw is for --policy imitation; {self.policy} has no choice to draw")
        if self.stray and (self.policy != "imitation" or not 0 < self.stray <= 1):
            raise ValueError(f"stray is {self.stray}: expected 0 to 1, and --policy imitation")
        if self.gate != "off" and self.policy not in BUDGETS:
            raise ValueError(f"--gate {self.gate} judges plans; {self.policy} makes none")
        if self.realtime and self.replan > 1:
            raise ValueError(f"replan is {self.replan}: with --realtime plans are made as often as they can be; leave it at 1")
        if self.realtime and (self.policy != "planner" or self.gate == "random" or self.env.id or self.trajectory):
            raise ValueError("--realtime is for the planner in the robot's tasks, and takes no gate that refuses by chance")
        if self.record and self.trajectory:
            raise ValueError("--record keeps episodes, and --trajectory plays none; leave one out")
        if self.device != "cpu" and (self.policy != "planner" or self.trajectory):
            raise ValueError(f"--device {self.device} is for the planner; {self.policy} runs on the processor, and so does --trajectory")
        others = [f.name for f in dataclasses.fields(self) if f.name not in RECORDING and getattr(self, f.name) != f.default]
        if self.trajectory and others:
            raise ValueError(f"--trajectory takes --{', --'.join(RECORDING[2:])}, and no --{others[0].replace('_', '-')}: each step is planned one step ahead")
        able = FOREIGN + (("expert", "simulator") if self.env.ready else ())
        if self.env.id and self.policy not in able:
            raise ValueError(f"in {self.env.id} {', '.join(able)} can act, not {self.policy}")
        check_environment(self, ("task", "object", "cameras", "randomization"))
        if self.env.id and self.policy in TOLD and self.model is None:
            raise ValueError(f"the shipped model knows nothing of {self.env.id}; train one, and give it as --model")


def run(config: Config) -> dict:
    """Play what is missing, and return the config and the summary."""
    from worldmodel.commands.policies import Player

    if config.suite is not None:
        return suite.run(config, sys.modules[__name__])
    if config.trajectory is not None:
        return _offline(config)
    given, config = config, resolved(config)
    player = Player(config)
    player.begin(config.seed)  # notices what is wrong before anything is written
    identity = _identity(config)
    if config.policy in BUDGETS:
        identity["imagined_by"] = getattr(player.model, "imagined_by", None)  # whose numbers are equal but for rounding, in bfloat16 to half a millimetre
    with files.owned(config.out, "bench") as folder:
        log = Log.open(folder / "episodes.jsonl", identity)
        if config.record:
            (folder / "data").mkdir(exist_ok=True)
            files.remove_leftovers(folder / "data")
        seeds = range(config.seed, config.seed + config.episodes)
        missing = [seed for seed in seeds if seed not in log.episodes or config.record and not recorded(config, seed)]
        bar = tqdm(total=config.episodes, initial=config.episodes - len(missing), desc=f"bench {config.policy}", unit="episode")
        with bar, contextlib.closing(played(config, player, missing)) as finished:
            for episode in finished:
                log.append(episode)
                bar.update()
                successes = sum(e["success"] for e in log.episodes.values())
                bar.set_postfix_str(f"{successes} of {len(log.episodes)} successes")
        player.close()
        episodes = [log.episodes[seed] for seed in seeds]
        result = {"config": identity, "episodes": episodes, "summary": summary(config, episodes)}
        if config.record:
            checksums = [data.checksum(path_of(config, seed)) for seed in seeds]
            recipe = {key: value for key, value in identity.items() if key != "model"}  # its hash says which, wherever it is
            data.write_recipe(folder / "data", _command(given), recipe, config.episodes, checksums, out="..")
        with files.replacing(folder / "results.json") as file:
            file.write(json.dumps(result, indent=1).encode())
        if config.gate != "off":
            abstention.plot(episodes, folder / "risk.png")
    return result["summary"]


def _command(config: Config) -> str:
    """The command that plays these episodes, but for --out."""
    fields, usual = dataclasses.asdict(config), dataclasses.asdict(Config(out=config.out))
    own = {name: value for name, value in fields.items() if value != usual[name]}
    if config.env.id:
        own["env"] = {name: value for name, value in fields["env"].items() if value != usual["env"][name]}
    return cli.told("bench", own)


def _offline(config: Config) -> dict:
    """Plan the steps of a recording, and return how far from the recorded actions that was."""
    import torch

    from planners.sampling import VJEPA2_AC, SamplingConfig, SamplingPlanner
    from worldmodel import hub, model
    from worldmodel.commands import energy

    torch.set_num_threads(config.threads)
    world = hub.load_any(config.model or model.shipped())
    if config.policy != "planner" or not hasattr(world, "rollout"):
        raise ValueError("a recording is planned by a world model: give its file as --model, and leave --policy")
    pixels, states = energy.recorded(config.trajectory)
    samples, iterations, elites, *_ = BUDGETS["planner"]
    budget = {"samples": config.samples or samples, "iterations": config.iterations or iterations}
    budget["elites"] = config.elites or min(elites, budget["samples"])
    meta = world.latent_dim == 0
    planner = SamplingPlanner(dataclasses.replace(VJEPA2_AC if meta else SamplingConfig(gripper="gaussian"), **budget))
    with files.fresh(config.out, "bench") as folder:
        steps = energy.offline(world, pixels, states, planner, config.seed)
        errors, still = ([step[key] for step in steps] for key in ("error_mm", "no_motion_error_mm"))
        summary = {
            "trajectory": str(config.trajectory), "steps": len(steps), "error_mm": float(np.median(errors)),
            "no_motion_error_mm": float(np.median(still)), "seconds": float(np.median([step["seconds"] for step in steps])),
            "out": str(config.out),
        }  # fmt: skip
        with files.replacing(folder / "results.json") as file:
            file.write(json.dumps({"config": {**budget, "seed": config.seed}, "steps": steps, "summary": summary}, indent=1).encode())
    return summary


def report(result: dict) -> str:
    """The same for people."""
    if "table" in result:
        return f"{result['table']}\n{result['out']}/table.md"
    if "trajectory" in result:
        return (
            f"{result['steps']} recorded steps of {result['trajectory']}: planned translations are {result['error_mm']:.0f} mm from the "
            f"recorded ones (median; no motion: {result['no_motion_error_mm']:.0f}), {result['seconds']:.2f} s each; {result['out']}/results.json"
        )
    low, high = result["success_ci95"]
    seconds = result["decision_seconds"]
    rows = {
        "task": ", ".join(filter(None, (result["task"], result["object"]))),
        "policy": result["policy"],
        "goal": result["goals"],
        "success": f"{result['success_rate']:.1%}  [{low:.1%}, {high:.1%}]  {result['successes']} of {result['episodes']}",
        "unsafe": f"{result['unsafe_rate']:.1%} of the episodes  "
        + ", ".join(f"{name} {count}" for name, count in result["unsafe_events"].items()),
        "gate": ""
        if result["abstention_rate"] is None
        else f"refused {_percent(result['refusal_rate'])} of the plans, {_percent(result['false_alarm_rate'])} of those that would have gone well; "
        f"let go {_percent(result['let_go_and_wrong'])} that went wrong, {_percent(result['episode_risk'])} of an episode's in the mean; "
        f"held at {result['abstention_rate']:.1%} of the steps; "
        f"AUROC {'-' if result['auroc'] is None else format(result['auroc'], '.2f')}"
        + ("" if result["let_go_and_wrong"] is None else f"; {result['out']}/risk.png"),
        "steps": f"{result['steps_to_success']:.1f} to success" if result["successes"] else "",
        "distance": ""
        if result["final_distance"] is None
        else f"{result['final_distance']:.3g} at the end, of {result['initial_distance']:.3g} (medians{'; m' if result['object'] else ''})",
        "decision": f"{seconds['median']:.3f} s median, {seconds['p95']:.3f} s 95th percentile"
        + ("" if result["late_rate"] is None else f"; one at {result['decided_rate']:.1%} of the steps; {result['late_rate']:.1%} began while one was late"),
        "out": result["out"],
    }
    return "\n".join(f"{name:10}{text}".rstrip() for name, text in rows.items() if text)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def resolved(config: Config) -> Config:
    """The config with the defaults that depend on the policy, and the file of the model."""
    from worldmodel import model

    names = ("samples", "iterations", "elites", "horizon", "std", "fine")
    unknown = config.env.id and config.env.ready is None
    path = config.model or model.shipped()
    begin = _begin(config, path) if config.policy in BUDGETS else None
    guided = begin in ("policy", "careful", "guide") and not unknown
    budget = dict(zip(names, (GUIDED if guided else BUDGETS).get(config.policy, BUDGETS["planner"])))
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    filled = {"begin": begin, **budget, **given}
    if "elites" not in given:
        filled["elites"] = min(filled["elites"], filled["samples"])
    if config.policy == "imitation" and config.goal_proprio:
        raise ValueError("--policy imitation takes goals as pictures alone; leave out --goal-proprio")
    if config.policy == "imitation" and not model.holds(path, "policy"):
        raise ValueError(f"{path} has no policy that imitates: make one with `worldmodel imitate`")
    if config.gripper is None:
        filled["gripper"] = "gaussian" if unknown else "categorical"
    cautious = config.policy in BUDGETS and model.holds(path, "hazard")
    if config.risk_weight and not cautious:
        raise ValueError(f"--risk-weight needs a planning policy, and a model with a hazard head, of `worldmodel train`; got {path}")
    if config.risk_weight is None:
        filled["risk_weight"] = 0.2 if cautious else 0.0
    if config.energy is None:
        filled["energy"] = "last" if begin in ("policy", "careful") else "sum"
    if config.proprio_weight is None:
        filled["proprio_weight"] = 0.5 if config.task == "reach" else 2.0
    config = dataclasses.replace(config, **filled, model=path)
    if not config.subgoal_steps and config.goal == "subgoals":
        steps = SUBGOAL_STEPS.get(config.task, ()) if not config.env.id else config.env.ready.subgoal_steps if config.env.ready else ()
        config = dataclasses.replace(config, subgoal_steps=steps)
    return config


def _begin(config: Config, path: Path) -> str:
    """Where the search for a plan begins. Raises ValueError where the config asks for what the model of a file has not."""
    from worldmodel import model

    able = [part for part in ("policy", "guide", "careful") if model.holds(path, part)] + ["nothing"]
    if config.begin and config.begin not in able:
        raise ValueError(f"--begin {config.begin}: {path} has none; expected one of {', '.join(able)} (`worldmodel imitate` makes policies)")
    reaches = config.task == "reach" and not config.env.id
    return config.begin or ("guide" if reaches and "guide" in able else able[0])


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a rate (Wilson 1927)."""
    rate, n = successes / trials, trials
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return middle - half if successes else 0.0, middle + half if successes < trials else 1.0  # by rounding the ends come out beside these


def summary(config: Config, episodes: list[dict]) -> dict:
    """The figures over all episodes."""
    successes = [e for e in episodes if e["success"]]
    seconds = np.concatenate([e["decision_seconds"] for e in episodes])
    events = [u["event"] for e in episodes for u in e["unsafe"]]
    shown = "pictures and proprioception" if config.goal_proprio else "pictures alone"
    return {
        "task": config.env.id or config.task,
        "object": "" if config.env.id else config.object,
        "policy": config.policy,
        "goals": f"{config.goal}, {shown}" if config.policy in TOLD else "privileged state" if config.policy == "expert" else "none",
        "episodes": len(episodes),
        "successes": len(successes),
        "success_rate": len(successes) / len(episodes),
        "success_ci95": list(wilson(len(successes), len(episodes))),
        "unsafe_rate": sum(bool(e["unsafe"]) for e in episodes) / len(episodes),
        "unsafe_events": {name: events.count(name) for name in sorted(set(events))},
        **abstention.rates(episodes),
        "grasp_rate": sum(e["grasped"] for e in episodes) / len(episodes),
        "steps_to_success": float(np.mean([e["steps"] for e in successes])) if successes else None,
        **{name: _median([e[name] for e in episodes]) for name in ("initial_distance", "final_distance")},
        "decision_seconds": {"median": float(np.median(seconds)), "p95": float(np.percentile(seconds, 95))},
        "decided_rate": len(seconds) / sum(e["steps"] for e in episodes) if config.realtime else None,
        "late_rate": sum(e["late"] for e in episodes) / sum(e["steps"] for e in episodes) if config.realtime else None,
        "out": str(config.out),
    }


def _median(values: list[float | None]) -> float | None:
    return None if None in values else float(np.median(values))


def _identity(config: Config) -> dict:
    """What the results depend on, as JSON gives it back."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_OF_THE_RUN}
    if not config.env.id:
        del fields["env"]
    del fields["trajectory"], fields["suite"]
    if config.realtime:  # how often a decision is late depends on who shares the processor
        fields["workers"] = config.workers
    from worldmodel.checkpoint import sha256_of

    told = config.policy in TOLD
    fields["model"] = str(config.model) if told else None
    fields["model_sha256"] = sha256_of(config.model) if told else None
    fields["calibration"] = config.calibration and sha256_of(config.calibration)
    return json.loads(json.dumps(fields))
