"""The next step of every loss of TRL, in every layout of a step, of one process and of two."""

import pytest

from support.trl_cases import CASES, GENERAL, LAYOUTS, TYPES
from support.trl_comparison import require_the_step
from support.trl_processes import LAYOUTS as LAYOUTS_OF_TWO
from support.trl_processes import train_on_two
from support.trl_training import Step, train

pytestmark = pytest.mark.slow

# Some divide by the tokens of a generation, which may be more than a step's.
PARTS_OF_A_GENERATION = (*TYPES, "kl", "entropy", "quantile", "truncated", "vllm")
PAIRS = [
    (case, layout)
    for case in CASES
    for layout in LAYOUTS
    if not layout.startswith("half") or case in PARTS_OF_A_GENERATION
]
PAIRS_OF_TWO = [
    (case, layout)
    for case in (*TYPES, "kl", "entropy", "adaptive entropy", "quantile", "truncated", "vllm")
    for layout in LAYOUTS_OF_TWO
]


@pytest.mark.parametrize(("case", "layout"), PAIRS)
def test_next_step_is_the_one_trl_takes(case, layout, checkpoint, tmp_path):
    settings, seen, prepare = CASES[case]
    step = train(checkpoint, tmp_path, prepare, **(settings | LAYOUTS[layout]))
    require_the_step(step, seen if layout == GENERAL else [])


@pytest.fixture(scope="module")
def of_two(checkpoint, tmp_path_factory) -> dict[tuple[str, str], Step]:
    return train_on_two(checkpoint, tmp_path_factory.mktemp("two"), PAIRS_OF_TWO)


@pytest.mark.parametrize("pair", PAIRS_OF_TWO, ids=", ".join)
def test_next_step_of_two_processes_is_the_one_trl_takes(pair, of_two):
    case, layout = pair
    step = of_two[pair]
    assert {call.process for call in step.calls} == {0, 1}
    require_the_step(step, CASES[case].seen if layout == GENERAL else [])
