"""Stored stages with a right checksum and other contents: computed again and said."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from funcprobe.adapters.stages.kl import _groups
from funcprobe.adapters.stages.microbatch import Size, _size
from funcprobe.adapters.stages.peaks import Curve
from funcprobe.adapters.store.sealed import ENTRY, seal
from support.checkpoints import sets

pytestmark = pytest.mark.usefixtures("offline")

GIVEN: dict[str, Any] = {
    "measure.etas": [1e-5, 30.0],  # the second is resampled
    "measure.next_lr": False,
    "measure.resample": True,
    "measure.second_order": "exact",
    "measure.observables": ["length", "kl_base", "kl_base_sampled"],
    "attribution.influence": 2,
    "run.max_tokens": 40,
}
Tensors = dict[str, torch.Tensor]


def _json(value: Any) -> Tensors:
    return {"file": torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)}


def _half(found: Tensors) -> Tensors:
    """Of a file, since Parquet is read from its end."""
    return {n: x[: len(x) // 2] if n == "file" else x for n, x in found.items()}


def _other_prompts(found: Tensors) -> Tensors:
    table = pq.read_table(io.BytesIO(found["file"].numpy().tobytes()))
    place = table.column_names.index("prompt_index")
    index = pa.array([i + 1000 for i in table["prompt_index"].to_pylist()], pa.int64())
    stream = io.BytesIO()
    pq.write_table(table.set_column(place, table.field("prompt_index"), index), stream)
    return {"file": torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)}


def _not_finite(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, torch.nan) if x.is_floating_point() else torch.zeros_like(x)


FORGED: dict[str, Callable[[Tensors], Tensors]] = {
    "longer": lambda found: {n: torch.cat([x, x]) for n, x in _half(found).items()},
    "another dtype": lambda found: {n: x.to(torch.float16) for n, x in found.items()},
    "not finite": lambda found: {n: _not_finite(x) for n, x in found.items()},
    "a list": lambda _: _json([[[]]]),
    "words": lambda _: _json([["a"], [{"name": 1}], "b"]),
}


def forge(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[ENTRY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path.write_bytes(seal(change(tensors), {n: x for n, x in about.items() if n != "sha256"}))


def numbers(run: Path) -> dict[str, Any]:
    results = json.loads((run / "results.json").read_text())
    del results["cost"]
    return results


@pytest.mark.slow
def test_forged_stages(command, checkpoint) -> None:
    Path("c.toml").touch()
    words = sets(checkpoint.settings() | GIVEN)
    assert command("run", "c.toml", *words).status == 0
    expected, folder = numbers(Path("runs/probe")), Path("runs/.stages")
    whole = {path: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
    names = {path.name.rpartition("-")[0] for path in whole}
    assert names == {
        *("rollouts-E", "rollouts-U", "gradient", "first-order", "marginals", "influence", "moved"),
        *("rounding", "second-order", "rollouts-fresh", "fresh", "kl", "kl-etas", "base", "checks"),
    }
    again = command("run", "c.toml", *words)
    assert "computed again" not in again.err
    for path in (path for path in whole if "rollouts-E" in path.name or "rollouts-U" in path.name):
        forge(path, _other_prompts)
    outcome = command("run", "c.toml", *words)
    assert (outcome.status, outcome.err.count("it has other prompts")) == (0, 2), outcome.err
    assert numbers(Path("runs/probe")) == expected
    for how, change in FORGED.items():
        for path, content in whole.items():
            path.write_bytes(content)
            forge(path, change)
        outcome = command("run", "c.toml", *words)
        assert outcome.status == 0, (how, outcome.err)
        assert numbers(Path("runs/probe")) == expected, how
        said = {n for n in names if f"/{n}-" in outcome.err}
        # Etas that are none are read as no etas: KL is computed under a name of the same etas.
        assert said >= names - {"kl-etas"}, how


@pytest.mark.parametrize(
    "stored",
    [
        *(7, [], [1, 2, 3], [40, 1, [1, 2, 3]]),
        *([n, False, [1, 2, 3, 4]] for n in (9, math.inf, "x")),
        [40, False, [math.nan, 2, 3, 4]],
    ],
)
def test_a_forged_size(stored) -> None:
    assert _size(stored, 10) is None
    assert _size([40, False, [1, 2, 3, 4]], 10) == Size(40, False, Curve(1.0, 2.0, 3.0, 4))


@pytest.mark.parametrize("stored", [7, {}, [[]], [7], [["x"]], [[math.inf]], [[True]]])
def test_forged_etas(stored) -> None:
    assert _groups(stored) == []
    assert _groups([[1e-3, 2.0], [0.5]]) == [(1e-3, 2.0), (0.5,)]
