"""What mkdocs.yml cannot say: pages from outside docs/, the package as it is installed, `<X, v>`."""

import posixpath
import re
import tempfile
from pathlib import Path
from typing import Any

from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Pages that lie elsewhere in the repository, where a reader of the code looks for them; notebooks are
# served as files.
ELSEWHERE = (
    "CHANGELOG.md",
    *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("benchmarks/*.md")),
    *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("notebooks/*.ipynb")),
)
LINK = re.compile(r"(?<=\]\()\.\./(?=[^)\s]+)")

_installed = tempfile.TemporaryDirectory(prefix="funcprobe-docs-")


class PlainText(Extension):
    """No raw HTML: <X, v> in a docstring is an inner product, which a browser would hide as a tag."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.deregister("html_block")
        md.inlinePatterns.deregister("html")


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """adapters/ is installed as funcprobe.adapters, which mkdocstrings cannot see in the repository."""
    package = Path(_installed.name) / "funcprobe"
    if not package.exists():
        package.mkdir()
        for path in (*(ROOT / "funcprobe").iterdir(), ROOT / "adapters"):
            (package / path.name).symlink_to(path)
    handlers: dict[str, Any] = config.plugins["mkdocstrings"].config.handlers
    handlers["python"]["paths"] = [_installed.name]
    config.markdown_extensions.append(PlainText())  # type: ignore[arg-type]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages from elsewhere, under the paths that they have in the repository."""
    for name in ELSEWHERE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links that leave docs/ in the repository (../benchmarks/RESULTS.md) stay inside the site."""
    here = posixpath.dirname(page.file.src_uri)
    if here or page.file.src_uri in ELSEWHERE:
        return markdown.replace("](../docs/", "](../").replace("](docs/", "](")
    return LINK.sub("", markdown)
