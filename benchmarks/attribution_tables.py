"""Tables of attribution_study.py from its lines, one for each U."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.stats import t as student

Row = dict[str, Any]


def print_tables(rows: Sequence[Row]) -> None:
    first = rows[0]
    print(
        f"\n{len(rows)} updates, eta {first['eta']:.3g}; per U {_mean(rows, lambda r: r['tokens'], 0)} "
        f"tokens with an advantage, {_mean(rows, lambda r: r['dropped'], 1)} dropped; clipped: "
        f"{sum(r['clip'] < 1 for r in rows)} of {len(rows)}"
    )
    print_spread(rows)
    print_compared(rows)
    print_dropped(rows)
    print_predictors(rows)


def print_spread(rows: Sequence[Row]) -> None:
    whole = [sum(r["parts"].values()) for r in rows]
    values = {
        "predicted change of the step": [r["eta"] * w for r, w in zip(rows, whole, strict=True)],
        "of it momentum": [r["parts"]["momentum"] / w for r, w in zip(rows, whole, strict=True)],
        "sum of shares": [r["eta"] * r["sums"]["share of L"] for r in rows],
        "sum of marginals": [r["eta"] * r["sums"]["marginal of L"] for r in rows],
        "sum of absolute shares in their top 5 %": [r["in_top"]["share of L"] for r in rows],
    }
    print("\n| on L, over U | mean | sd | least | greatest |\n|---|---|---|---|---|")
    for name, numbers in values.items():
        x = torch.tensor(numbers, dtype=torch.float64)
        print(f"| {name} | {x.mean():.3g} | {x.std():.2g} | {x.min():.3g} | {x.max():.3g} |")


def print_compared(rows: Sequence[Row]) -> None:
    exact = ["share", "share of L", "marginal of L"]
    columns = [f"{kind}, {key}" for key in exact for kind in ("Spearman", "sign")]
    print(f"\n| score | {' | '.join(map(_shown, columns))} |\n|---|{'---|' * len(columns)}")
    for name in rows[0]["compared"]:
        cells = [_mean(rows, lambda r, c=c, n=name: r["compared"][n][c], 2) for c in columns]
        print(f"| {_shown(name)} | {' | '.join(cells)} |")


def print_dropped(rows: Sequence[Row]) -> None:
    """Effects are those of the step without the tokens less those of the whole step."""
    columns = (
        "measured",
        "+- over U",
        "+- over F",
        "less random",
        "+- over U",
        "U above random",
        "predicted on F",
        "on L",
        "on E",
    )
    print("\nChange of the entropy by leaving out, 1e-4 nats per token.")
    print(f"\n| left out by | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in dict.fromkeys(_name(s) for s in rows[0]["sets"]):
        predicted = [f"{1e4 * _effects(rows, name, f'predicted_{b}').mean():.3g}" for b in "FLE"]
        print(f"| {_shown(name)} | {' | '.join(_measured_cells(rows, name) + predicted)} |")


def _measured_cells(rows: Sequence[Row], name: str) -> list[str]:
    """Without a measurement the difference from random is of what is predicted on F."""
    is_measured = any("measured" in s for s in rows[0]["sets"] if _name(s) == name)
    key = "measured" if is_measured else "predicted_F"
    found = _effects(rows, name, key)
    less = found - _effects(rows, "random", key)
    cells = [f"{1e4 * found.mean():.3g}", f"{1e4 * _half(found):.2g}"]
    cells += [f"{1e4 * _over_F(rows, name):.2g}"] if is_measured else []
    against = [
        f"{1e4 * less.mean():.3g}",
        f"{1e4 * _half(less):.2g}",
        f"{int((less > 0).sum())} of {len(rows)}",
    ]
    return (cells if is_measured else ["", "", ""]) + (against if name != "random" else ["", "", ""])


def print_predictors(rows: Sequence[Row]) -> None:
    """How far each quantity is from the effect of dropping, over all sets and U."""
    pairs = [(r, s) for r in rows for s in r["sets"] if "measured" in s]
    exact = {
        batch: _vector([r["eta"] * (s[key] - r["whole"][key]) for r, s in pairs])
        for batch in "ELF"
        for key in [f"predicted_{batch}"]
    }
    measured = _vector([s["measured"] - r["whole"]["measured"] for r, s in pairs])
    sums = {key: _vector([r["eta"] * s[key] for r, s in pairs]) for key in pairs[0][0]["sums"]}
    print(
        "\n| predictor of leaving out | of | correlation | slope | rms error / rms "
        "| sign right |\n|---|---|---|---|---|---|"
    )
    for name, x, target, y in (
        ("- sum of shares of L", sums["share of L"], "exact on L", exact["L"]),
        ("- sum of marginals of L", sums["marginal of L"], "exact on L", exact["L"]),
        ("half of each", (sums["share of L"] + sums["marginal of L"]) / 2, "exact on L", exact["L"]),
        ("- sum of shares of E", sums["share"], "measured on F", measured),
        ("- sum of shares of L", sums["share of L"], "measured on F", measured),
        ("- sum of marginals of L", sums["marginal of L"], "measured on F", measured),
        ("exact on E", exact["E"], "measured on F", measured),
        ("exact on L", exact["L"], "measured on F", measured),
        ("exact on F", exact["F"], "measured on F", measured),
    ):
        correlation = torch.corrcoef(torch.stack([x, y]))[0, 1]
        slope = (x * y).sum() / x.square().sum()
        error = ((x - y).square().mean() / y.square().mean()).sqrt()
        right = (x.sign() == y.sign()).double().mean()
        print(f"| {name} | {target} | {correlation:.3f} | {slope:.2f} | {error:.2f} | {right:.2f} |")


def _vector(numbers: Sequence[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _shown(name: str) -> str:
    return f"{name} of E" if name.endswith("share") else name


def _name(dropped: Row) -> str:
    name = str(dropped["name"])
    return "random" if name.startswith("random") else name  # its draws count as one


def _effects(rows: Sequence[Row], name: str, key: str) -> torch.Tensor:
    """Of dropping, for every U; predictions are per unit of eta in the file."""
    scale = [1.0 if key == "measured" else r["eta"] for r in rows]
    means = [
        s * sum(d[key] - r["whole"][key] for d in own) / len(own)
        for r, s in zip(rows, scale, strict=True)
        for own in [[d for d in r["sets"] if _name(d) == name]]
    ]
    return torch.tensor(means, dtype=torch.float64)


def _over_F(rows: Sequence[Row], name: str) -> float:
    """Half-width of the 95 % interval of the mean effect over draws of F, U given."""
    each = [
        torch.tensor(d["influence"]) - torch.tensor(r["whole"]["influence"])
        for r in rows
        for d in r["sets"]
        if _name(d) == name
    ]
    influence_N = torch.stack(each).double().mean(0)
    n = len(influence_N)  # influence values sum to the error
    se = math.sqrt(n / (n - 1) * float(influence_N.square().sum()))
    return float(student.ppf(0.975, n - 1)) * se


def _half(x: torch.Tensor) -> float:
    """Half-width of Student's 95 % interval of a mean over U."""
    n = len(x)
    return float(student.ppf(0.975, n - 1)) * float(x.std()) / math.sqrt(n) if n > 1 else math.nan


def _mean(rows: Sequence[Row], of: Callable[[Row], float], digits: int) -> str:
    x = torch.tensor([float(of(r)) for r in rows], dtype=torch.float64)
    return f"{x.mean():.{digits}f} +- {_half(x):.{digits}f}"
