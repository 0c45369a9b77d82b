"""benchmarks/gpu.py: a step that fails, hangs or dies costs that step alone; kernels are told apart."""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def script(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu")


@pytest.fixture
def step(script, tmp_path) -> Any:
    """The step that this code is, run with a limit; it can report as steps do."""
    path = tmp_path / "passes.json"
    head = f"""
import sys
from pathlib import Path
sys.path.insert(0, {BENCHMARKS!r})
from gpu import Report
Report(Path({str(path)!r})).row("Passes", name="forward", seconds=0.5)
"""

    def run(code: str, limit: float = 60) -> dict[str, Any]:
        with (tmp_path / "log.txt").open("a") as log:
            found = script.run_step([sys.executable, "-c", head + code], path, limit, log)
        assert json.loads(path.read_text()) == found, "what the file says"
        return found

    return run


def test_what_was_found_before_the_end_stays(script, step):
    ended = {
        "passed": step("pass"),
        "failed": step("raise ValueError('no such kernel')"),
        "stopped": step("print('begun', flush=True); import time; time.sleep(60)", limit=2),
        "died": step("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
    }
    for found in ended.values():
        assert found["tables"]["Passes"] == [{"name": "forward", "seconds": 0.5}]
    assert ended["passed"]["status"] == "passed"
    assert ended["failed"]["status"] == "failed, exit status 1"
    assert ended["failed"]["error"] == "ValueError: no such kernel"
    assert ended["stopped"]["status"] == "stopped at its limit of 2 s"
    assert ended["stopped"]["error"] == "begun"
    assert ended["died"]["status"] == "failed, exit status -9"
    text = script.summary(ended, script.Place(Path(), "cuda", False))
    assert "ValueError: no such kernel" in text
    assert text.count("| forward | 0.5 |") == 4


def test_what_a_step_started_ends_with_it(step, tmp_path):
    mark = tmp_path / "child"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    step(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", limit=3)
    number = int(mark.read_text())
    for _ in range(100):  # until whoever adopted it has taken note
        stat = Path(f"/proc/{number}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(number, 9)
    raise AssertionError("the child went on")


def test_without_time_no_step_is_begun(script, tmp_path):
    place = script.Place(tmp_path, "cuda", False)
    assert not script.run_all(place, ["tests", "published"], whole=script.LEAST - 1)
    content = json.loads((tmp_path / "published.json").read_text())
    assert content["status"] == "not begun: no time was left"
    assert (tmp_path / "GPU.md").read_text().count("not begun") == 2


def test_it_ends_in_eight_minutes_and_leaves_eight_files(script):
    assert script.WHOLE <= 480
    assert len(script.SECONDS) + 2 <= 8  # a file each, GPU.md, log.txt


def test_kernels_by_what_they_do(script):
    profile = importlib.import_module("gpu_profile")
    names = {
        "products": [
            "sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x32",
            "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT",
            "void cutlass::Kernel2<cutlass_80_simt_sgemm_128x64_8x5_tn_align1>(...)",
            "void gemv2T_kernel_val<int, int, float, ...>",
            "void cublasLt::splitKreduce_kernel<32, 16, int, float, ...>",
        ],
        "attention": [
            "fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>)",
            "void pytorch_flash::flash_fwd_kernel<...>",
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128",
        ],
        "copies": ["Memcpy DtoH (Device -> Pageable)", "Memset (Device)"],
        "other": [
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>"
        ],
    }
    for kind, some in names.items():
        assert {profile.kind(name) for name in some} == {kind}, kind
    events = [profile.Event(name, 2, 0.1, True) for some in names.values() for name in some]
    events += [
        profile.Event("cudaLaunchKernel", 9, 0.5, False),
        profile.Event("cuLaunchKernelEx", 1, 0.5, False),
        profile.Event("cudaStreamSynchronize", 3, 0.5, False),
        profile.Event("aten::_local_scalar_dense", 4, 0.5, False),
        profile.Event("aten::mm", 7, 0.5, False),
    ]
    found = profile.totals(events, seconds=2.2)
    assert found["busy"] == pytest.approx(0.5)
    assert found["products"] == pytest.approx(5 / 11)
    assert [found[k] for k in ("launches", "waits", "items", "copies back")] == [10, 3, 4, 2]
    assert profile.longest(events, 3)[0]["share"] == pytest.approx(1 / 11)
