"""What memory a stage took, and what is free."""

import pytest
import torch

from funcprobe.adapters.console import Narrator
from funcprobe.adapters.machine import memory
from funcprobe.adapters.results.cost import cost_section


@pytest.mark.skipif(not memory.reset_peaks(), reason="/proc/self/clear_refs cannot be written here")
def test_the_peak_is_the_stages_own() -> None:
    narrator = Narrator()
    size = 256 * 2**20
    with narrator.phase("large"):
        before = memory.process_now()
        torch.ones(size, dtype=torch.uint8)
    with narrator.phase("small"):
        pass
    large, small = narrator.costs["large"], narrator.costs["small"]
    assert large.peak_of_stage
    # Other threads hold and free a few MiB meanwhile.
    assert large.process_peak - before == pytest.approx(size, rel=0.1)
    assert large.process_peak - small.process_peak == pytest.approx(size, rel=0.1)


@pytest.mark.skipif(not memory.reset_peaks(), reason="/proc/self/clear_refs cannot be written here")
def test_the_meter_has_the_peak_since_its_last_call() -> None:
    size = 128 * 2**20
    held = torch.ones(size, dtype=torch.uint8)
    peak = memory.peak_meter(held.device)
    for count in (2, 1):
        torch.ones(count * size, dtype=torch.uint8)
        assert peak() == pytest.approx(count * size, rel=0.1)
    assert peak() < size / 10
    del held


def test_of_several_devices_the_fullest_counts(monkeypatch) -> None:
    gpus = [torch.device("cuda", i) for i in range(2)]
    held, peaks, left = [5, 1], [7, 11], [100, 40]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda d: held[d.index])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda d: held[d.index] + 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: peaks[d.index])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (left[d.index], 200))
    assert memory.free(*gpus) == 42 < memory.free(gpus[0]) == 102
    assert memory.now(*gpus) == 5
    assert memory.can_measure(*gpus)
    assert memory.peak_meter(*gpus)() == 10 > memory.peak_meter(gpus[0])() == 2


def test_where_the_peak_cannot_be_reset_it_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    narrator = Narrator()
    with narrator.phase("one"):
        pass
    (row,) = cost_section(narrator.costs.values(), {}).stages
    assert row.process_peak_of == "the process since its start"
    assert row.process_peak_bytes >= memory.process_now() // 2
    assert not memory.can_measure(torch.device("cpu"))


def test_free_memory_is_what_the_containers_limit_leaves(tmp_path, monkeypatch) -> None:
    limit, used = tmp_path / "limit", tmp_path / "used"
    monkeypatch.setattr(memory, "CGROUPS", ((str(limit), str(used)),))
    cpu = torch.device("cpu")
    whole = memory.free(cpu)
    assert whole > 2**24
    limit.write_text("max\n")
    used.write_text("5000\n")
    assert memory.free(cpu) == pytest.approx(whole, rel=0.5)
    limit.write_text("15000\n")
    assert memory.free(cpu) == 10_000
    # Files that were read are given up where memory is needed; cgroup v1 has its own alone, and all.
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 3000\nactive_file 1000\n")
    assert memory.free(cpu) == 13_000
    (tmp_path / "memory.stat").write_text("inactive_file 3000\ntotal_inactive_file 4000\n")
    assert memory.free(cpu) == 14_000
