"""TensorBoard: event files, by the writer that comes with torch."""

from pathlib import Path

from .logged import PREFIX, Logged


def prepare() -> None:
    """Nothing but a folder is needed."""


def write(run: Logged, folder: Path) -> str:
    """Scalars in double precision, headline and table as text, figures as images, at the run's step."""
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:  # type: ignore[no-untyped-call]
        for key, value in run.scalars.items():
            number = np.float64(value)
            writer.add_scalar(key, number, run.step, new_style=True, double_precision=True)  # type: ignore[no-untyped-call]
        texts = {
            "headline": _verbatim(run.headline),
            "sweep": _table(run),
            "report": _verbatim("\n".join(str(path) for path in run.files)),
        }
        for name, text in texts.items():
            writer.add_text(f"{PREFIX}/{name}", text, run.step)  # type: ignore[no-untyped-call]
        for picture in run.pictures:
            with Image.open(picture.file) as image:
                pixels = np.asarray(image.convert("RGB"))
            name = f"{PREFIX}/{picture.name}"
            writer.add_image(name, pixels, run.step, dataformats="HWC")  # type: ignore[no-untyped-call]
    return f"tensorboard --logdir {folder}"


def _verbatim(text: str) -> str:
    """Text of prompts has marks of its own, which the program would read as Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _table(run: Logged) -> str:
    rows = [run.columns, ["---"] * len(run.columns), *([_cell(x) for x in row] for row in run.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.6g}"
