"""From words on a command line to a sub-command's Config, and from its result or error to streams and exit code."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import importlib
import importlib.util
import io
import json
import logging
import math
import os
import shlex
import sys
import traceback
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]  # of the packages worldmodel, planners, envs and assets
OURS = tuple(str(ROOT / package) + os.sep for package in ("worldmodel", "planners", "envs"))
PRESETS = ROOT / "assets" / "presets"

DRAWING = tuple(os.path.join("mujoco", part) + os.sep for part in ("egl", "osmesa", "rendering"))
NO_GL = "cannot draw: no usable GL library; install libegl1 (or libosmesa6) and set MUJOCO_GL=egl (or osmesa)"

COMMANDS = {
    "collect": "run scripted experts in the simulator and keep their episodes",
    "pretrain": "pretrain the video encoder on episodes",
    "train": "train the predictor on features of a frozen encoder",
    "imitate": "train a policy that sees a goal, where a model's search for a plan begins",
    "hazard": "train a model's judgement of what goes wrong on steps of those who ask it",
    "probe": "measure what an encoder's features know of the scene",
    "examine": "measure what a model imagines, and where its energy is low",
    "calibrate": "find the safety gate's limits from a planner's own decisions",
    "speed": "measure what decisions cost on this machine, and where their time goes",
    "bench": "let a policy act in a task and count its successes",
    "convert": "turn weights of V-JEPA 2 into files of this project, and back",
    "energy": "draw the energy around a recorded robot action",
    "show": "make pictures of datasets, episodes, trainings and benchmarks",
}
SHARED = """\
Shared by all commands:
  --preset NAME      take the fields' values from assets/presets/COMMAND/NAME.yaml, or of a whole pipeline, a file of
                     any name that ends in .yaml or assets/presets/NAME.yaml, what stands under COMMAND and env; flags override them
  --json             print the result as one JSON object on stdout, and nothing else
  --debug-traceback  show where a bad input was noticed (also: WORLDMODEL_TRACEBACK=1)

Exit codes: 0 success, 2 bad input, 1 failure."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a sub-command and return its exit code: 0 success, 2 bad input, 1 failure."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        (sys.stdout if args else sys.stderr).write(_overview() + "\n")
        return 0 if args else 2
    shared, rest = shared_flags(args[1:])
    _keep_memory()
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    for package in ("worldmodel", "planners", "envs"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        module = _module(args[0])
        if "-h" in rest or "--help" in rest:
            return _help(args[0], module)
        config = parse(args[0], module, rest, shared.preset)
        with _stdout_to_stderr():
            result = module.run(config)
    except KeyboardInterrupt as error:
        sys.stderr.write(f"worldmodel {args[0]}: interrupted {error}".rstrip() + "\n")
        return 1
    except Exception as error:
        return _fail(f"worldmodel {args[0]}", error, shared.debug_traceback)
    sys.stdout.write((json.dumps(_jsonable(result)) if shared.json else module.report(result)) + "\n")
    return 0


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send to stderr whatever libraries print, environments of others, and processes that start meanwhile: stdout is for the result."""
    out, libc = sys.stdout, _libc()
    out.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        out.flush()  # what went into it, or into C's, meanwhile
        if libc is not None:
            libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _keep_memory() -> None:
    """Let glibc keep freed buffers: giving each back and faulting it in again costs up to half of a training's time."""
    libc = _libc()
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD, bytes


def parse(command: str, module: ModuleType, flags: Sequence[str], preset: str | None = None):
    """The Config of a command, from its defaults, a preset and flags; raises ValueError in one line."""
    import tyro

    known = _fields(module.Config)
    words = _preset_flags(command, preset, known) + list(flags)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config = tyro.cli(module.Config, prog=f"worldmodel {command}", args=words)
    except SystemExit:
        title, _, text = _unbox(errors.getvalue()).partition(": ")
        text = text.removeprefix("Error parsing Config: ")
        if title == "Unrecognized options":
            text += f"; known are {', '.join('--' + name for name in known)}"
        raise ValueError(text) from None
    for name, value in _flat(dataclasses.asdict(config)).items():
        if any(isinstance(number, float) and math.isnan(number) for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name} is nan, expected a number")
    return config


def shared(config, recipe: type) -> dict[str, typing.Any]:
    """The values of a command's Config that a recipe has fields for."""
    names = {field.name for field in dataclasses.fields(recipe)} & {field.name for field in dataclasses.fields(config)}
    return {name: getattr(config, name) for name in names}


def told(command: str, fields: dict[str, typing.Any]) -> str:
    """The line that gives a command these fields; those of a nested Config as a dictionary."""
    return shlex.join(["worldmodel", command, *_flags(_flat(fields))])


def presets(command: str) -> list[str]:
    """Names of a command's presets, those of whole pipelines that have a part for it included."""
    pipelines = [path for path in PRESETS.glob("*.yaml") if command in read_yaml(path)]
    return sorted(path.stem for path in [*(PRESETS / command).glob("*.yaml"), *pipelines])


def _overview() -> str:
    lines = [f"  {name:10}{line}" for name, line in COMMANDS.items() if _exists(name)]
    return "\n".join(
        ["usage: worldmodel COMMAND [--preset NAME] [--json] [flags]", "", "Commands (each has --help):", *lines, "", SHARED]
    )


def _exists(command: str) -> bool:
    return importlib.util.find_spec(f"worldmodel.commands.{command}") is not None


def _module(command: str) -> ModuleType:
    if command not in COMMANDS or not _exists(command):
        raise ValueError(f"unknown command; known are {', '.join(filter(_exists, COMMANDS))}")
    return importlib.import_module(f"worldmodel.commands.{command}")


def shared_flags(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """What words after a command say of it all, preset, json and debug_traceback, and the others."""
    parser = argparse.ArgumentParser(prog="worldmodel", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--debug-traceback", action="store_true", default=bool(os.environ.get("WORLDMODEL_TRACEBACK")))
    return parser.parse_known_args(words)


def _help(command: str, module: ModuleType) -> int:
    import tyro

    names = ", ".join(presets(command)) or "none"
    description = f"{module.__doc__}\n\n{SHARED}\n\nPresets of {command}: {names}"
    with contextlib.suppress(SystemExit):
        tyro.cli(module.Config, prog=f"worldmodel {command}", description=description, args=["--help"])
    return 0


def _fields(config: type, prefix: str = "") -> dict[str, type]:
    """Flags of a Config and their types; those of a nested one are named outer.inner."""
    hints, fields = typing.get_type_hints(config), {}
    for field in dataclasses.fields(config):
        name, kind = prefix + field.name.replace("_", "-"), hints[field.name]
        fields.update(_fields(kind, name + ".") if dataclasses.is_dataclass(kind) else {name: kind})
    return fields


def _preset_flags(command: str, preset: str | None, known: dict[str, type]) -> list[str]:
    """A preset as the flags that say the same."""
    if preset is None:
        return []
    path, whole = PRESETS / command / f"{preset}.yaml", Path(preset)
    if whole.suffix != ".yaml":
        whole = PRESETS / f"{preset}.yaml"
    if path.is_file():
        values = read_yaml(path)
    elif whole.is_file():
        path, values = whole, _part(command, whole, known)
    else:
        raise ValueError(f"unknown preset {preset!r}; known are {', '.join(presets(command)) or 'none'}, and paths of .yaml files")
    flat = _flat(values)
    for name in flat:
        if name not in known:
            raise ValueError(f"{path} has unknown key {name.replace('-', '_')!r}; known are "
                             f"{', '.join(known).replace('-', '_')}")  # fmt: skip
        if isinstance(flat[name], bool) and "on" in typing.get_args(known[name]):  # which YAML takes for true
            flat[name] = "on" if flat[name] else "off"
    return _flags(flat)


def _flags(values: dict[str, object]) -> list[str]:
    """Values by the names of flags, those of a nested Config as outer.inner, as the flags that say so."""
    flags = []
    for name, value in values.items():
        if isinstance(value, bool):
            head, dot, last = name.rpartition(".")
            flags.append(f"--{head}{dot}{last if value else f'no-{last}'}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return flags


def _part(command: str, path: Path, known: dict[str, type]) -> dict:
    """What the preset of a whole pipeline says to a command: what stands under its name, and `env` if it has environments."""
    values = read_yaml(path)
    if strange := [str(key) for key in values if key != "env" and key not in COMMANDS]:
        raise ValueError(f"{path} has unknown key {strange[0]!r}; expected env, and commands: {', '.join(COMMANDS)}")
    own = values.get(command)
    if not isinstance(own, dict):
        raise ValueError(f"{path} has no part for {command}: expected {command!r} with the fields' values under it")
    shared = {"env": values["env"]} if "env" in values and any(name.startswith("env.") for name in known) else {}
    return shared | own


def read_yaml(path: Path) -> dict:
    """Keys and values of a file. Raises ValueError where it holds something else."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, expected keys and values")
    return values


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in values.items():
        name = prefix + str(key).replace("_", "-")
        flat.update(_flat(value, name + ".") if isinstance(value, dict) else {name: value})
    return flat


def _unbox(text: str) -> str:
    """The title and first paragraph of one of tyro's framed messages, as one line."""
    lines = [line.strip("│ ").strip() for line in text.splitlines()]
    title = lines[0].strip("╭─╮ ") if lines else "Error"
    body = []
    for line in lines[1:]:
        if line.startswith(("──", "╰")):
            break
        body.append(line)
    return f"{title}: {' '.join(body)}"


def _jsonable(value):
    """The same with what JSON lacks replaced: numpy's numbers, tuples, paths; NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) or hasattr(value, "tolist"):
        value = value.tolist() if hasattr(value, "tolist") else value
        return [_jsonable(item) for item in value] if isinstance(value, (list, tuple)) else _jsonable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, str, bool, type(None))) else str(value)


def noticed(file: str, line: str | None) -> bool:
    """Whether an error that a line of a file brought up is bad input that our code noticed: it says `raise`, and is no mistake of ours."""
    return file.startswith(OURS) and (line or "raise").startswith("raise")


def _fail(who: str, error: Exception, show: bool) -> int:
    """Say what went wrong: a bad input in one line, anything else with its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [frame.filename for frame in frames]
    message = " ".join(str(error).split())
    bad_input = isinstance(error, (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError))
    bad_input |= isinstance(error, ValueError) and noticed(frames[-1].filename, frames[-1].line)
    if message.startswith("cannot draw"):
        bad_input = True
    elif any(part in file for file in files for part in DRAWING):
        bad_input, message = True, NO_GL
    if show or not bad_input:
        traceback.print_exception(error)
    if bad_input:
        sys.stderr.write(f"{who}: {message}\n")
    return 2 if bad_input else 1
