"""Errors that would be easy to make, planted in a copy of the source: the suite finds each twice."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from support.paths import ROOT

pytestmark = pytest.mark.slow


class Fault(NamedTuple):
    """`text` stands once in funcprobe/`file`; with `planted` in its place, `tests` have to fail."""

    file: str
    text: str
    planted: str
    tests: tuple[str, ...]


ESTIMATORS = ("statistics/test_estimators.py",)
OBJECTIVE = ("step/test_objective.py",)
MODEL = ("passes/test_tangents.py",)
ADAM = ("step/test_adam.py", "test_run.py::test_the_direction_is_what_torchs_adamw_does")
RESPONSE = ("step/test_response.py",)

FAULTS = {
    # Weights and sums
    "the weight of k holds k itself": Fault(
        "statistics/weights.py",
        "return torch.cat([torch.zeros_like(x_NR[:, :1]), inclusive_NR[:, :-1]], dim=1)",
        "return inclusive_NR",
        ESTIMATORS,
    ),
    "the weight of k lacks k - 1": Fault(
        "statistics/weights.py",
        "return torch.cat([torch.zeros_like(x_NR[:, :1]), inclusive_NR[:, :-1]], dim=1)",
        "return torch.cat([torch.zeros_like(x_NR[:, :2]), inclusive_NR[:, :-2]], dim=1)",
        ESTIMATORS,
    ),
    "the score of j takes k = j": Fault(
        "statistics/weights.py",
        "return torch.cat([suffix_NR[:, 1:], torch.zeros_like(y_NR[:, :1])], dim=1)",
        "return suffix_NR",
        ESTIMATORS,
    ),
    "a response that ended counts no more": Fault(
        "statistics/weights.py",
        'return weight_NR * (mask_NR if entropy.per == "token" else torch.ones_like(mask_NR))',
        "return weight_NR * mask_NR",
        ESTIMATORS,
    ),
    "sequences of one prompt are taken to be independent": Fault(
        "statistics/weights.py",
        "units, index_N = unit_N.unique(return_inverse=True)",
        "units = index_N = torch.arange(len(unit_N))",
        ESTIMATORS,
    ),
    # The estimators
    "wrong sign of the score term, forward": Fault(
        "statistics/estimators.py",
        "weight_NR * dz_NR + dweight_NR * z_NR, dweight_NR)",
        "weight_NR * dz_NR - dweight_NR * z_NR, -dweight_NR)",
        ESTIMATORS,
    ),
    "wrong sign of the score term, reverse": Fault(
        "statistics/estimators.py",
        "score_NR = prefix_sum_transposed(moving_NR, entropy) * mask_NR",
        "score_NR = -prefix_sum_transposed(moving_NR, entropy) * mask_NR",
        ESTIMATORS,
    ),
    "the derivative lacks its normaliser's": Fault(
        "statistics/estimators.py", "return (dN - N / D * dD) / D\n", "return dN / D\n", ESTIMATORS
    ),
    "the gradient lacks its normaliser's": Fault(
        "statistics/estimators.py", "(z_NR - N_g / D_g) / D_g", "z_NR / D_g", ESTIMATORS
    ),
    "the measured change lacks its normaliser's": Fault(
        "statistics/estimators.py",
        "return (dN - N / D * dD) / (D + dD)",
        "return dN / (D + dD)",
        ESTIMATORS,
    ),
    "a standard error without the normaliser's noise": Fault(
        "statistics/estimators.py",
        "(dn_Ng - R * dd_Ng - dD / D * (n_Ng - R * d_Ng) - F * d_Ng) / D",
        "(dn_Ng - F * d_Ng) / D",
        ESTIMATORS,
    ),
    # Adam
    "no bias correction of exp_avg": Fault(
        "step/adam.py",
        "per_moment = 1 / ((1 - group.beta1**step) * denominator)",
        "per_moment = 1 / denominator",
        ADAM,
    ),
    "no bias correction of exp_avg_sq": Fault(
        "step/adam.py",
        "return nu / (1 - group.beta2**step)",
        "return nu",
        ADAM,
    ),
    "no bias correction of the preconditioner": Fault(
        "step/adam.py",
        "(1 - group.beta2**step if step else 1.0)",
        "1.0",
        ADAM,
    ),
    "bias correction of the step before": Fault(
        "step/adam.py",
        "group_of[name], adam_state.step[name] + 1",
        "group_of[name], max(adam_state.step[name], 1)",
        ADAM,
    ),
    "momentum of the other sign": Fault(
        "step/adam.py", "momentum[name] = -group.beta1", "momentum[name] = group.beta1", ADAM
    ),
    # The step's derivative, and the attribution
    "the second moment does not answer": Fault(
        "step/response.py",
        "return direction.scale[name] - moving * slope / (nu_hat.sqrt() + group.eps)",
        "return direction.scale[name]",
        RESPONSE,
    ),
    "clipping enters the second moment once": Fault(
        "step/response.py", "slope = clip**2 *", "slope = clip *", RESPONSE
    ),
    "clipping takes nothing": Fault(
        "step/response.py", "if direction.clip_coefficient == 1:", "if True:", RESPONSE
    ),
    "shares of U lack the entropy's coefficients": Fault(
        "attribution/token_shares.py",
        "if update.entropy_coef_NR is not None:",
        "if False:",
        ("attribution/test_attribute.py",),
    ),
    # The objective
    "a response is compared with itself, too": Fault(
        "step/objective.py",
        "r_N - (sum_M[group_N] - r_N) / (size_M[group_N] - 1)",
        "r_N - sum_M[group_N] / size_M[group_N]",
        OBJECTIVE,
    ),
    "every response weighs as much as every other": Fault(
        "step/objective.py", "return T_N.sum() * ones_N", "return N * T_N * ones_N", OBJECTIVE
    ),
    "the error over U takes the divisor of J as fixed": Fault(
        "statistics/estimators.py",
        "t_N.sum() * normaliser_N / normaliser_N.sum()",
        "t_N.mean()",
        ("statistics/test_update_error.py",),
    ),
    # The model
    "the probability of the token before": Fault(
        "policy/rows.py",
        "target_T=tokens_NL[row_T, token_T]",
        "target_T=tokens_NL[row_T, token_T - 1]",
        ("policy/test_rows.py",),
    ),
    "the temperature is left out": Fault(
        "policy/forward.py",
        "return call(Head(model, path), given, hidden_TD) / temperature",
        "return call(Head(model, path), given, hidden_TD)",
        ("passes/test_tangents.py", "policy/test_forward.py"),
    ),
    "the entropy of the token that was sampled": Fault(
        "passes/head.py",
        "-(logp_TV.exp() * logp_TV).sum(-1)",
        "-logp_T",
        ("policy/test_readout.py", *MODEL),
    ),
    "h' without the entropy": Fault(
        "policy/readout.py",
        "-_mean(at.plogp_nV, da_nV) - at.entropy_n * mean_n\n        return logp_n",
        "-_mean(at.plogp_nV, da_nV)\n        return logp_n",
        ("policy/test_readout.py", *MODEL),
    ),
    "a response sees the other responses to its prompt": Fault(
        "policy/blocks.py",
        "(key_n1K <= query_nQ1) & self.reach.sees",
        "(key_n1K < HIDDEN) & self.reach.sees",
        ("policy/test_rows.py",),
    ),
    "positions go on from one response to the next": Fault(
        "policy/rows.py",
        "position_S = begin[of_S] + offset_S",
        "position_S = torch.arange(len(of_S))",
        ("policy/test_rows.py",),
    ),
    "attention's normaliser has no derivative": Fault(
        "autodiff/attention_along.py",
        "torch.addcmul(moved_out, mean, block.queries_of(out_grouped), value=-1)",
        "moved_out",
        ("autodiff/test_forward_mode.py", *MODEL),
    ),
    "a product of two jets has its cross term once": Fault(
        "autodiff/taylor_rules.py",
        "torch.mul(2 * a.first, b.first)",
        "a.first * b.first",
        ("autodiff/test_taylor.py",),
    ),
    "a narrow layer's cross term has the other sign": Fault(
        "autodiff/taylor_rules.py", ", 2 * cross]", ", -2 * cross]", ("autodiff/test_taylor.py",)
    ),
    "the direction of a trained layer is left out": Fault(
        "autodiff/forward_mode.py",
        "torch.cat([w, dw], 1)",
        "torch.cat([w, 0 * dw], 1)",
        ("autodiff/test_forward_mode.py", *MODEL),
    ),
    "a halved microbatch loses the others": Fault(
        "passes/microbatches.py",
        "    if waiting:\n",
        "    if not waiting:\n",
        ("passes/test_halving.py", "policy/test_layout.py"),
    ),
}


def run(folder: Path, tests: tuple[str, ...]) -> tuple[set[str], int]:
    """(test functions that failed, be it at their set-up, test cases that ran) of `tests`, against the
    copy in `folder`."""
    report = folder / "report.xml"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "imported"),
            *("-m", "not slow", f"--junitxml={report}", *(f"tests/{name}" for name in tests)),
        ],
        cwd=folder,
        # CI: hypothesis takes the same examples every time.
        env=os.environ | {"PYTHONPATH": str(folder), "CI": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"imported {folder / 'funcprobe'}" in done.stdout, done.stdout + done.stderr
    cases = ElementTree.parse(report).getroot()[0].findall("testcase")
    # What cannot be imported is no fault found; a fixture that binds a policy may well find one.
    errors = [str(e.get("message")) for c in cases for e in c.findall("error")]
    assert all(message.startswith("failed on setup") for message in errors), done.stdout
    found = (c for c in cases if c.find("failure") is not None or c.find("error") is not None)
    failed = {str(c.get("name")).split("[")[0] for c in found}
    assert done.returncode == (1 if failed else 0), done.stdout
    return failed, len(cases)


def copy(folder: Path) -> Path:
    """funcprobe/ as it is installed, tests/ beside it, and a plugin that says what is imported."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "funcprobe", folder / "funcprobe", ignore=ignore)
    shutil.copytree(ROOT / "adapters", folder / "funcprobe" / "adapters", ignore=ignore)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignore)
    (folder / "pytest.ini").write_text(
        "[pytest]\nmarkers = slow\npythonpath = tests\naddopts = --import-mode=importlib\n",
        encoding="utf-8",
    )
    (folder / "imported.py").write_text(
        "from pathlib import Path\n"
        "def pytest_terminal_summary(terminalreporter):\n"
        "    import funcprobe\n"
        "    terminalreporter.write_line(f'imported {Path(funcprobe.__file__).parent}')\n",
        encoding="utf-8",
    )
    return folder


def test_the_copy_as_it_is_passes(tmp_path):
    tests = sorted({name for fault in FAULTS.values() for name in fault.tests})
    failed, ran = run(copy(tmp_path), tuple(tests))
    assert not failed
    assert ran > 100


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_fails_two_tests(fault, tmp_path):
    source = copy(tmp_path) / "funcprobe" / fault.file
    text = source.read_text(encoding="utf-8")
    assert text.count(fault.text) == 1, "the source has changed: plant the fault anew"
    source.write_text(text.replace(fault.text, fault.planted), encoding="utf-8")
    failed, _ = run(tmp_path, fault.tests)
    assert len(failed) >= 2, failed
