"""What a gate was worth in a benchmark: what it refused, how often for nothing, and what it let go.

Of every decision the first plan counts, with what its first step came to: the step that ran, or where the plan was
refused, the step tried in the simulator and taken back. results.json has them as `asked`: score, whether the gate let it
go, and whether its step went wrong, which is null where it could not be tried.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from worldmodel.hazard import auroc

HIGHEST = 1e9  # stands for a score of infinity, which JSON lacks


def rates(episodes: list[dict]) -> dict:
    """Rates over all decisions of episodes as results.json has them; None where there was no gate, or nothing to tell from.

    `refusal_rate` of first plans; `abstention_rate`, of steps at which nothing safer was found either; `false_alarm_rate`, of
    first plans that would have gone well; `let_go_and_wrong`, of all decisions; `episode_risk`, of an episode's decisions, meaned over
    episodes, which is what `calibrate --risk` bounds; `auroc` of the score for what went wrong.
    """
    answers = [answer for e in episodes for answer in e.get("answers", ())]
    score, go, wrong = _asked(episodes)
    let_go, known = go == 1, not np.isnan(wrong).any()
    bad = wrong == 1
    ranked = auroc(score, bad) if len(score) and known else np.nan
    shares = [np.mean((own[1] == 1) & (own[2] == 1)) for own in (_asked([e]) for e in episodes) if own.size]
    return {
        "refusal_rate": _share(~let_go, np.ones_like(let_go)),
        "abstention_rate": sum(a in ("hold", "hand over") for a in answers) / len(answers) if answers else None,
        "false_alarm_rate": _share(~let_go & ~bad, ~bad) if known else None,
        "let_go_and_wrong": _share(let_go & bad, np.ones_like(bad)) if known else None,
        "episode_risk": float(np.mean(shares)) if shares and known else None,
        "auroc": None if np.isnan(ranked) else ranked,
    }


def risk_coverage(episodes: list[dict]) -> np.ndarray:
    """The risk-coverage curve [M, 2]: with ever higher limits, the share of decisions let go, and of those the share that is wrong."""
    score, _, wrong = _asked(episodes)
    wrong = wrong[np.argsort(score, kind="stable")]
    let_go = np.arange(1, len(wrong) + 1)
    return np.column_stack((let_go / max(1, len(wrong)), np.cumsum(wrong) / let_go))


def plot(episodes: list[dict], path: Path) -> None:
    """Draw the risk-coverage curve, and where the gate's limit was; nothing where it is not known what went wrong."""
    from matplotlib.figure import Figure

    _, go, wrong = _asked(episodes)
    if not len(go) or np.isnan(wrong).any():
        return
    curve = risk_coverage(episodes)
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*curve.T, label="by the gate's score")
    axes.axhline(curve[-1, 1], color="0.6", linestyle=":", label="by chance")
    axes.axvline(go.mean(), color="0.6", linewidth=1, label="the limit")
    axes.set(xlabel="share of the decisions that is let go", ylabel="share of those that goes wrong", xlim=(0, 1), ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _asked(episodes: list[dict]) -> np.ndarray:
    """Scores, let go, went wrong, of all decisions: [3, M], NaN for what is not known."""
    return np.array([one for e in episodes for one in e.get("asked", ())], float).reshape(-1, 3).T


def _share(part: np.ndarray, whole: np.ndarray) -> float | None:
    return float(part.sum() / whole.sum()) if whole.any() else None
