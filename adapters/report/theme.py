"""Colours and type of every chart: of the page where it is in one, light where it is a file."""

from typing import Any, NamedTuple


class Colour(NamedTuple):
    """A colour by its role. `placeholder` stands in a chart; a page replaces it by `var(--name)`."""

    name: str
    placeholder: str
    light: str
    dark: str


# Okabe and Ito's colours, which colour-blind readers tell apart, darker or lighter where the contrast
# with the page needs it. The placeholders are no colour that a chart would have by itself.
COLOURS = (
    Colour("ink", "#010101", "#1a1c1f", "#e7e9ec"),
    Colour("muted", "#010102", "#5a6068", "#a3abb5"),
    Colour("rule", "#010103", "#d5d9de", "#3a4048"),
    Colour("page", "#010104", "#ffffff", "#16181b"),
    Colour("predicted", "#010105", "#0072b2", "#56b4e9"),
    Colour("measured", "#010106", "#b84a00", "#f0a36b"),
    Colour("other", "#010107", "#00785a", "#2fc79b"),
    Colour("fourth", "#010108", "#a0558a", "#dc9cc6"),
    Colour("falls", "#010109", "#b84a00", "#f0a36b"),
    Colour("rises", "#01010a", "#0072b2", "#56b4e9"),
    Colour("band", "#01010b", "#eef1f4", "#22262b"),
)
BY_NAME = {colour.name: colour.placeholder for colour in COLOURS}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def config() -> dict[str, Any]:
    """Vega-Lite's `config` in these colours."""
    ink, muted, rule = (BY_NAME[name] for name in ("ink", "muted", "rule"))
    return {
        "background": "transparent",
        "font": FONT,
        "view": {"stroke": None},
        "axis": {
            "domainColor": muted,
            "gridColor": rule,
            "tickColor": muted,
            "labelColor": ink,
            "titleColor": ink,
            "titleFontWeight": "normal",
            "labelFontSize": 12,
            "titleFontSize": 12,
        },
        "legend": {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12},
        "header": {"labelColor": ink, "titleColor": ink},
        "title": {"color": ink},
        "text": {"color": ink},
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
