"""Size of report.html, seconds to make it, and how it scrolls, filters and searches in Chromium.

    python benchmarks/report.py runs/quickstart [--tokens 300 1000] [--seconds 10] [--browser FILE]

Of the run itself, and of runs made up from its numbers with 512 responses in U (64 prompts with 8
each) and 512 in E, of so many tokens each. The page is scrolled by 60 pixels a frame, some six screens
in two seconds, with every response unfolded; frames are those of requestAnimationFrame, 60 a second at
most. Other work on the machine shows in all figures but sizes: the load is printed, too.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from funcprobe.adapters.report.charts import figures
from funcprobe.adapters.report.page import report_html
from funcprobe.adapters.report.responses import responses
from funcprobe.adapters.results.saved import load_run

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.saved_runs import enlarged

SCROLL = """
(seconds) => new Promise((done) => {
  const frames = [];
  const start = performance.now();
  const step = (now) => {
    frames.push(now);
    window.scrollBy({ top: 60, behavior: "instant" });
    if (now - start < 1000 * seconds) requestAnimationFrame(step);
    else done(frames);
  };
  requestAnimationFrame(step);
})
"""
# Milliseconds from an input to the frame after its result, for a control of U's responses.
CHANGE = """
([control, value]) => new Promise((done) => {
  const status = document.querySelector("#responses-U .status");
  const input = document.querySelector(`#responses-U [data-control=${control}]`);
  status.textContent = "";
  const start = performance.now();
  new MutationObserver((_, watch) => {
    if (!status.textContent) return;
    watch.disconnect();
    const end = () => done([performance.now() - start, status.textContent]);
    requestAnimationFrame(() => setTimeout(end));
  }).observe(status, { childList: true });
  input.value = value;
  input.dispatchEvent(new Event("input", { bubbles: true }));
})
"""
CHANGES = (("search", "sum of"), ("search", ""), ("order", "file"), ("prompt", "3"), ("prompt", ""))


def main() -> None:
    """Print one block a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, nargs="*", default=[300, 1000])
    parser.add_argument("--seconds", type=float, default=10.0, help="of scrolling")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folders = {f"{given.run}": given.run}
        for tokens in given.tokens:
            target = Path(temporary) / str(tokens)
            folders[f"2 x 512 responses of {tokens} tokens"] = enlarged(
                given.run, target, prompts=64, responses=8, tokens=tokens
            )
        for name, folder in folders.items():
            page = Path(temporary) / "report.html"
            print(f"{name} (load {os.getloadavg()[0]:.1f})")
            _say(made(folder, page))
            _say(looked_at(page, given.seconds, given.browser))


def made(folder: Path, page: Path) -> Iterable[tuple[str, str]]:
    """Size and seconds, of the second time: the first loads libraries."""
    for again in (False, True):
        run = load_run(folder)
        clocks = [_clocks()]
        text = responses(run)
        clocks.append(_clocks())
        charts = figures(run)
        html = report_html(run, charts)
        clocks.append(_clocks())
        if again:
            page.write_text(html, encoding="utf-8")
            yield "page", f"{len(html.encode()) / 1e6:.2f} MB, {_between(clocks[1], clocks[2])}"
            yield "responses", f"{len(text.html.encode()) / 1e6:.2f} MB, {_between(*clocks[:2])}"


def looked_at(page: Path, seconds: float, browser: str) -> Iterable[tuple[str, str]]:
    """In Chromium, 1,280 pixels wide."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        seen = chromium.new_page(viewport={"width": 1280, "height": 900})
        seen.goto(page.resolve().as_uri())
        times = seen.evaluate("performance.getEntriesByType('navigation')[0].toJSON()")
        yield "loaded after", f"{times['loadEventEnd']:.0f} ms"
        for control, value in CHANGES:
            after, status = seen.evaluate(CHANGE, [control, value])
            yield f"{control} '{value}'", f"{after:.0f} ms, 100 of them waiting for a pause: {status}"
        seen.evaluate("document.querySelectorAll('.rest').forEach((one) => { one.open = true })")
        seen.evaluate("document.querySelector('#responses-U').scrollIntoView({ behavior: 'instant' })")
        seen.wait_for_timeout(500)
        session = seen.context.new_cdp_session(seen)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        start = _metrics(session)["TaskDuration"]
        frames = np.diff(seen.evaluate(SCROLL, seconds))
        work = 1000 * (_metrics(session)["TaskDuration"] - start) / len(frames)
        yield "scrolling", _frames(frames)
        yield "", f"{work:.1f} ms of the main thread's processor time a frame, whatever the load"
        seen.locator("#responses-E .tokens").first.focus()
        start = time.perf_counter()
        seen.locator(".token-numbers:not([hidden])").wait_for()
        yield "numbers of the first token", f"{1000 * (time.perf_counter() - start):.0f} ms after focus"
        yield "memory", _memory(_metrics(session))
        chromium.close()


def _frames(milliseconds: Any) -> str:
    late = float((milliseconds > 20.0).mean())
    quantiles = ", ".join(
        f"{name} {np.quantile(milliseconds, q):.1f}"
        for name, q in (("median", 0.5), ("95 %", 0.95), ("99 %", 0.99), ("longest", 1.0))
    )
    rate = 1000 / milliseconds.mean()
    return f"{rate:.1f} frames a second; ms between: {quantiles}; {late:.1%} over 20 ms"


def _metrics(session: Any) -> dict[str, float]:
    return {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}


def _memory(found: dict[str, float]) -> str:
    tabs = [p for p in psutil.Process().children(recursive=True) if "--type=renderer" in p.cmdline()]
    resident = max(process.memory_info().rss for process in tabs)
    return (
        f"{found['JSHeapUsedSize'] / 1e6:.0f} MB of scripts, {found['Nodes']:,.0f} nodes, "
        f"{resident / 1e6:.0f} MB resident"
    )


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _between(start: tuple[float, float], end: tuple[float, float]) -> str:
    return f"{end[0] - start[0]:.2f} s ({end[1] - start[1]:.2f} s of the processor)"


def _say(lines: Iterable[tuple[str, str]]) -> None:
    for name, text in lines:
        print(f"  {name:32} {text}", flush=True)


if __name__ == "__main__":
    main()
