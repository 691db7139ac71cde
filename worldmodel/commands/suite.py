"""Several benchmarks as one table: rows that a file in assets/suites names, each what one would type after `worldmodel bench`."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from types import ModuleType

from worldmodel import files
from worldmodel.commands import cli

SUITES = cli.ROOT / "assets" / "suites"
TAKEN = ("out", "workers", "threads", "seed", "suite")  # fields of the config that hold for all rows


def run(config, bench: ModuleType) -> dict:
    """Play all rows by `bench`, each in a folder of OUT, and write OUT/table.md; what is finished is not played again.

    Raises ValueError where the config says more than a suite takes, or a row is none.
    """
    given = [f.name for f in dataclasses.fields(config) if f.name not in TAKEN and getattr(config, f.name) != f.default]
    if given:
        raise ValueError(
            f"--suite {config.suite} takes --{', --'.join(TAKEN[:-1])}, and says itself what to play: leave --{given[0].replace('_', '-')}"
        )
    rows, results = rows_of(config.suite), []
    own = [parsed(row, config.out / slug(row), bench) for row in rows]  # notices what is wrong before anything is played
    for row in own:
        for path in (row.model, row.calibration):
            if path is not None and not path.exists():
                raise FileNotFoundError(f"{path}, which a row of {config.suite} is of, is not there; make it first, as the suite's file says")
    for row in own:
        same = {name: getattr(config, name) for name in ("workers", "threads", "seed")}
        minutes = _minutes(row.model) if row.policy in bench.TOLD else None
        results.append(bench.run(dataclasses.replace(row, **same)) | {"minutes": minutes})
    text = table(rows, results)
    with files.replacing(config.out / "table.md") as file:
        file.write((text + "\n").encode())
    return {"rows": dict(zip(rows, results)), "table": text, "out": str(config.out)}


def rows_of(name: str) -> list[str]:
    """The rows of a suite. Raises ValueError where there is none of this name, or it holds something else."""
    path, known = SUITES / f"{name}.yaml", sorted(p.stem for p in SUITES.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"unknown suite {name!r}; known are {', '.join(known)}")
    rows = cli.read_yaml(path).get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, str) for row in rows):
        raise ValueError(f"{path} has no rows: expected a list of what stands after `worldmodel bench`")
    return rows


def slug(row: str) -> str:
    """A row as the name of a folder."""
    return re.sub(r"[^a-z0-9.]+", "-", row.replace("--preset", "").lower()).strip("-")


def table(rows: list[str], results: list[dict]) -> str:
    """The table in Markdown: success with Wilson intervals, unsafe episodes, seconds of a decision, minutes of training."""
    head = ("row", "episodes", "success", "95 %", "unsafe", "decision", "training")
    lines = [head, ["---"] * len(head)]
    for row, result in zip(rows, results):
        low, high = result["success_ci95"]
        minutes = "-" if result["minutes"] is None else f"{result['minutes']:.0f} min"
        lines.append([
            f"`{row}`", str(result["episodes"]), f"{result['success_rate']:.1%}", f"{low:.0%} to {high:.0%}", f"{result['unsafe_rate']:.1%}",
            f"{result['decision_seconds']['median']:.3f} s", minutes,
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def parsed(row: str, out: Path, bench: ModuleType):
    """The config of a row that writes to a folder. Raises ValueError where it says what holds for all rows, or plays no episodes."""
    words = shlex.split(row)
    for word in words:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name in (*TAKEN, "trajectory"):
            raise ValueError(f"the row {row!r} has --{name}: expected episodes to play; --{', --'.join(TAKEN[:-1])} stand beside --suite")
    shared, rest = cli.shared_flags(words)
    return cli.parse("bench", bench, [*rest, "--out", str(out)], shared.preset)


def _minutes(path: Path | None) -> float | None:
    """What the trainings of a model's predictor and policy took, where it tells; None where it does not."""
    from worldmodel import model
    from worldmodel.checkpoint import read_header

    _, _, about = read_header(path or model.shipped(), "model")
    told = [about.get("minutes"), about.get("policy", {}).get("minutes")]
    return sum(known) if (known := [minutes for minutes in told if minutes is not None]) else None
