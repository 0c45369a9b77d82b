"""Colours and type of every chart: of the page where it is in one, light where it is a file."""

from typing import Any, NamedTuple


class Colour(NamedTuple):
    """A colour by its role. `placeholder` stands in a chart; a page replaces it by `var(--name)`."""

    name: str
    placeholder: str
    light: str
    dark: str


STEPS = 5
"""Of a diverging scale on either side of the page's own colour, the last is the strongest."""
_PAGE = ("#ffffff", "#16181b")
_FALLS = ("#b84a00", "#f0a36b")
_RISES = ("#0072b2", "#56b4e9")


def _mixed(page: str, end: str, part: float) -> str:
    """The colour `part` of the way from the page to the end, in sRGB."""
    pairs = ((int(page[i : i + 2], 16), int(end[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in pairs)


def _step(name: str, ends: tuple[str, str], step: int) -> tuple[str, str, str]:
    part = step / STEPS
    return f"{name}-{step}", _mixed(_PAGE[0], ends[0], part), _mixed(_PAGE[1], ends[1], part)


# Okabe and Ito's colours, which colour-blind readers tell apart, darker or lighter where the contrast
# with the page needs it.
_ROLES = (
    ("ink", "#1a1c1f", "#e7e9ec"),
    ("muted", "#5a6068", "#a3abb5"),
    ("rule", "#d5d9de", "#3a4048"),
    ("page", *_PAGE),
    ("predicted", *_RISES),
    ("measured", *_FALLS),
    ("other", "#00785a", "#2fc79b"),
    ("fourth", "#a0558a", "#dc9cc6"),
    ("falls", *_FALLS),
    ("rises", *_RISES),
    ("band", "#eef1f4", "#22262b"),
    *(_step("falls", _FALLS, step) for step in range(1, STEPS + 1)),
    *(_step("rises", _RISES, step) for step in range(1, STEPS + 1)),
)
# The placeholders are no colour that a chart would have by itself.
COLOURS = tuple(
    Colour(name, f"#0101{number:02x}", light, dark)
    for number, (name, light, dark) in enumerate(_ROLES, start=1)
)
BY_NAME = {colour.name: colour.placeholder for colour in COLOURS}
DIVERGING = (
    *(BY_NAME[f"falls-{step}"] for step in range(STEPS, 0, -1)),
    BY_NAME["page"],
    *(BY_NAME[f"rises-{step}"] for step in range(1, STEPS + 1)),
)
"""From the strongest fall over the page's own colour to the strongest rise."""
FONT = "'Liberation Sans', Arial, Helvetica, sans-serif"
"""Of the renderer itself, so that files look the same wherever they are made; Arial is as wide."""
TEXT = 13  # pixels of every text in a chart


def config() -> dict[str, Any]:
    """Vega-Lite's `config` in these colours."""
    ink, muted, rule = (BY_NAME[name] for name in ("ink", "muted", "rule"))
    title = {"titleColor": ink, "titleFontSize": TEXT, "titleFontWeight": "normal"}
    label = {"labelColor": ink, "labelFontSize": TEXT}
    return {
        "aria": False,  # the figure is one image, with a description of its own
        "background": BY_NAME["page"],
        "font": FONT,
        "padding": 4,
        "view": {"stroke": None},
        "concat": {"spacing": 14},
        "facet": {"spacing": 14},
        "axis": {
            "domainColor": muted,
            "gridColor": rule,
            "tickColor": muted,
            "tickSize": 4,
            "labelPadding": 4,
            "titlePadding": 6,
            **label,
            **title,
        },
        "legend": {**label, **title, "symbolStrokeColor": muted, "symbolBaseFillColor": muted},
        "header": {**label, **title, "labelAnchor": "start", "labelFontWeight": "normal"},
        "title": {"color": ink, "fontSize": TEXT, "fontWeight": "normal", "anchor": "start"},
        "text": {"color": ink, "fontSize": TEXT},
        "mark": {"color": BY_NAME["predicted"]},
        "rule": {"color": muted},
        "range": {"category": [BY_NAME[n] for n in ("predicted", "measured", "other", "fourth")]},
    }


def css_variables() -> str:
    """The colours as custom properties: light; dark where the reader prefers it, but not in print."""
    light, dark = (
        " ".join(f"--{colour.name}: {getattr(colour, mode)};" for colour in COLOURS)
        for mode in ("light", "dark")
    )
    return (
        f":root {{ color-scheme: light; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; {dark} }} }}\n"
    )
