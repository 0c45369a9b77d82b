"""The token scores of papers beside the exact shares of a run's own update."""

from typing import TYPE_CHECKING, NamedTuple

from funcprobe.types import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from .saved import SavedRun


class ProxyTable(NamedTuple):
    """Scores of every token of U that J counts, and how they order the tokens beside the shares."""

    tokens: "pa.Table"
    """prompt_index, sequence, position, text, advantage, share, marginal, and a column a score, by its
    name in `funcprobe.attribution.proxies.PROXIES`: in a unit of its own, negative where it predicts
    that the token lowers the entropy."""
    spearman: dict[str, float | None]
    """Score -> Spearman's rank correlation with `share` over these tokens; None: one of the two is the
    same for all of them. `marginal` is among the scores here."""
    same_sign: dict[str, float | None]
    """Score -> share of the tokens, of those where neither is 0, at which both have one sign."""


def proxy_table(run: "SavedRun") -> ProxyTable | None:
    """Computed from tokens.parquet's l, h and advantages; None without it, or if U was not passed.

    The scores that need the whole next-token distribution (`tabular`) are not among them.
    """
    import pyarrow.compute as pc
    import torch

    from funcprobe.attribution.proxies import PROXIES
    from funcprobe.types import TokenStats

    table = run.table("tokens")
    if table is None:
        return None
    table = table.filter(pc.equal(table["batch"], "U"))
    table = table.filter(_counted(run, table))
    if not len(table) or table["logp"].null_count or table["advantage"].null_count:
        return None

    def column(name: str) -> torch.Tensor:
        return torch.tensor(table[name].to_numpy())[None]

    stats = TokenStats(column("logp"), column("entropy"))
    mask_1T = torch.ones_like(stats.logp_NR, dtype=torch.bool)
    scores = {name: f(stats, column("advantage"), mask_1T)[0] for name, f in PROXIES.items()}
    kept = ("prompt_index", "sequence", "position", "text", "advantage", "share", "marginal")
    tokens = table.select([name for name in kept if name in table.column_names])
    for name, score_T in scores.items():
        tokens = tokens.append_column(name, [score_T.numpy()])
    share_T = column("share")[0]
    scores["marginal"] = column("marginal")[0]
    return ProxyTable(
        tokens,
        {name: _spearman(score_T, share_T) for name, score_T in scores.items()},
        {name: _same_sign(score_T, share_T) for name, score_T in scores.items()},
    )


def _counted(run: "SavedRun", table: "pa.Table") -> "pa.Array":
    """Which of U's tokens are in the loss: all of them where the rollouts have no mask."""
    import pyarrow as pa

    rollouts = run.rollouts("update")
    if "loss_mask" not in rollouts.column_names or rollouts["loss_mask"].null_count:
        return pa.array([True] * len(table))
    masks = rollouts["loss_mask"].to_pylist()
    found = pa.array([counted for mask in masks for counted in mask], type=pa.bool_())
    if len(found) != len(table) or found.null_count:
        raise InputError(
            f"{run.folder}: tokens.parquet has {len(table)} tokens of U, loss_mask of rollouts/"
            f"update.parquet is of {len(found)}: they are of different runs; repeat the run"
        )
    return found


def _spearman(a_T: "Tensor", b_T: "Tensor") -> float | None:
    from scipy.stats import spearmanr

    if len(a_T) < 2 or any(bool(x_T.min() == x_T.max()) for x_T in (a_T, b_T)):
        return None
    return float(spearmanr(a_T.numpy(), b_T.numpy()).statistic)


def _same_sign(a_T: "Tensor", b_T: "Tensor") -> float | None:
    moved_T = (a_T != 0) & (b_T != 0)
    return float((a_T.sign() == b_T.sign())[moved_T].double().mean()) if moved_T.any() else None
