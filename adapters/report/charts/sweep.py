"""Predicted and measured change of the entropy against the learning rate."""

from ...results.saved import SavedRun
from ..figure import Figure


def sweep(run: SavedRun) -> Figure | None:
    """Predicted and measured change against eta, with their intervals."""
    import altair as alt

    rows = run.results.sweep
    data = alt.InlineData(
        values=[
            {"eta": row.eta, "kind": kind, "change": change}
            for row in rows
            for kind, change in (("predicted", row.predicted.value), ("measured", row.measured.value))
        ]
    )
    unit = run.results.entropy.unit
    chart = (
        alt.Chart(data)
        .mark_line(point=True)
        .encode(
            x=alt.X("eta:Q", scale=alt.Scale(type="log"), title="learning rate eta"),
            y=alt.Y("change:Q", title=f"change of the entropy, {unit}"),
            color=alt.Color("kind:N", title=None, sort=["predicted", "measured"]),
        )
        .properties(width=640, height=300)
    )
    return Figure(
        "sweep",
        "Predicted and measured change of the entropy",
        f"{len(rows)} learning rates.",
        f"{len(rows)} learning rates.",
        chart.to_dict(),
    )
