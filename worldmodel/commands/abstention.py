"""What a gate was worth in a benchmark: what it refused, how often for nothing, and what it let go.

Of every decision the first plan counts, with what its first step came to: the step that ran, or where the plan was
refused, the step tried in the simulator and taken back.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from worldmodel.hazard import auroc

HIGHEST = 1e9  # stands for a score of infinity, which JSON lacks


def rates(episodes: list[dict]) -> dict:
    """Rates over all decisions of episodes as results.json has them; None where there was no gate, or nothing to tell from.

    `refusal_rate` of first plans; `abstention_rate`, of steps at which nothing safer was found either; `false_alarm_rate`, of
    first plans that would have gone well; `let_go_and_wrong`, of all decisions; `auroc` of the score for what went wrong.
    """
    answers = [answer for e in episodes for answer in e.get("answers", ())]
    asked = np.array([pair for e in episodes for pair in e.get("asked", ())], float).reshape(-1, 3)
    score, go, wrong = asked[:, 0], asked[:, 1] == 1, asked[:, 2] == 1
    share = lambda part, whole: float(part.sum() / whole.sum()) if whole.any() else None  # noqa: E731
    ranked = auroc(score, wrong) if len(wrong) else np.nan
    return {
        "refusal_rate": sum(a != "plan" for a in answers) / len(answers) if answers else None,
        "abstention_rate": sum(a in ("hold", "hand over") for a in answers) / len(answers) if answers else None,
        "false_alarm_rate": share(~go & ~wrong, ~wrong),
        "let_go_and_wrong": share(go & wrong, np.ones_like(go)),
        "auroc": None if np.isnan(ranked) else ranked,
    }


def risk_coverage(episodes: list[dict]) -> np.ndarray:
    """The risk-coverage curve [M, 2]: with ever higher limits, the share of decisions let go, and of those the share that is wrong."""
    asked = np.array([pair for e in episodes for pair in e.get("asked", ())], float).reshape(-1, 3)
    wrong = asked[np.argsort(asked[:, 0], kind="stable"), 2]
    let_go = np.arange(1, len(wrong) + 1)
    return np.column_stack((let_go / max(1, len(wrong)), np.cumsum(wrong) / let_go))


def plot(episodes: list[dict], path: Path) -> None:
    """Draw the risk-coverage curve, and where the gate's limit was."""
    from matplotlib.figure import Figure

    curve = risk_coverage(episodes)
    go = np.mean([pair[1] for e in episodes for pair in e["asked"]])
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*curve.T, label="by the gate's score")
    axes.axhline(curve[-1, 1], color="0.6", linestyle=":", label="by chance")
    axes.axvline(go, color="0.6", linewidth=1, label="the limit")
    axes.set(xlabel="share of the decisions that is let go", ylabel="share of those that goes wrong", xlim=(0, 1), ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
