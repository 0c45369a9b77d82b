"""On a GPU no microbatch waits for it: `pytest --device cuda -m device tests/test_device_waits.py`."""

from functools import partial
from typing import Any

import pytest
import torch

import funcprobe
from funcprobe.passes import microbatches
from support.policies import random_batch, random_like, tiny_policy


@pytest.mark.device
def test_no_microbatch_waits_for_the_gpu(request, monkeypatch) -> None:
    """Of rows that are packed, as transformers looks at the positions of others.

    What waits on a device of Python's own is counted in test_device_mixing.
    """
    device = torch.device(request.config.getoption("--device"))
    if device.type != "cuda":
        pytest.skip("a CPU is not waited for")
    probe = funcprobe.bind(tiny_policy(dtype=torch.float32).to(device), max_tokens=24)
    batch = random_batch([(i // 3, 2 + i // 3, 1 + (5 * i) % 7) for i in range(14)])
    ones_NR, v = funcprobe.response_mask(batch).double(), random_like(probe.params)
    assert len(funcprobe.policy.layout.microbatches(batch, 24, probe.forward.layout)) > 2
    calls = {
        "token_stats": partial(probe.token_stats, probe.params, batch),
        "weighted_grad": partial(probe.weighted_grad, probe.params, batch, ones_NR, ones_NR),
        "tangents": partial(probe.tangents, probe.params, batch, v),
    }
    within = microbatches._unless_out_of_memory

    def guarded(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")  # whatever waits raises
        try:
            return within(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for call in calls.values():
        call()  # what is loaded at the first one may wait
    monkeypatch.setattr(microbatches, "_unless_out_of_memory", guarded)
    waited = {}
    for name, call in calls.items():
        try:
            call()
        except RuntimeError as error:
            waited[name] = str(error)
    assert not waited
