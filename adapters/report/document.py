"""One self-contained HTML document: no network, scripts and styles only by their hash."""

import base64
import hashlib
import json
import re
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .typeset import typeset
from .visible import finalized, sentence

ENVIRONMENT = Environment(
    loader=PackageLoader("funcprobe.adapters.report", "assets"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=finalized,
    trim_blocks=True,
    lstrip_blocks=True,
)
"""Templates of this package; every value is made visible (`visible`) and escaped unless it is Markup
that this package made."""
ENVIRONMENT.filters["sentence"] = sentence
ENVIRONMENT.filters["typeset"] = typeset

SURROGATE = re.compile("[\ud800-\udfff]")  # alone, as in file names that are not UTF-8


def document(title: str, body: Markup, *, styles: str, script: str = "") -> str:
    """A page with `body`, a style sheet and at most one script, under a strict content policy.

    default-src 'none'; the script and the style sheet by their SHA-256, so that nothing else that a
    text might smuggle in runs or loads. No inline handlers, no style attributes, no eval; no text
    becomes HTML by the script (trusted types).
    """
    for text in (styles, script):  # of this package; the element would end early, or the hash differ
        assert "</s" not in text.lower()
        assert "\r" not in text
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src '{_hash(styles)}'",
            f"script-src '{_hash(script)}'" if script else "script-src 'none'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )
    template = ENVIRONMENT.get_template("document.html.j2")
    return template.render(
        title=title, policy=policy, body=body, styles=Markup(styles), script=Markup(script)
    )


def asset(name: str) -> str:
    """A file of assets/, as text."""
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def data_block(name: str, content: Any) -> Markup:
    """JSON for the script, in an element that is never executed, whatever its texts contain."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    text = SURROGATE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)
    return Markup('<script type="application/json" id="{}">{}</script>').format(name, Markup(text))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
