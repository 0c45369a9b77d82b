"""What docs/architectures.md says of every causal class of transformers."""

import runpy
from pathlib import Path

import pytest
import transformers

from support.every_architecture import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, model_types
from support.verdicts import Verdict

pytestmark = pytest.mark.no_cover  # of other models, what others of this folder cover

GENERATOR = Path(__file__).parents[2] / "docs" / "generate_architectures.py"
PAGE = GENERATOR.with_name("architectures.md")
# A scale of logits and a window; chunks, and a backbone of another name; fused experts with LoRA on
# them; a decoder within the base model; layers with a state.
FEW = ["cohere2", "llama4_text", "mixtral", "opt", "qwen3_5_text"]

TRAINED = """
    qwen2 qwen2_moe qwen3 qwen3_moe qwen3_5_text qwen3_next llama llama4_text gemma gemma2 gemma3_text
    gemma4_text mistral mixtral phi3 olmo2 olmo3 smollm3 granite cohere2 deepseek_v2 deepseek_v3 gpt_oss
    glm4 falcon gpt_neox gpt2
"""


def on_the_page() -> dict[str, list[str]]:
    """{model_type: the other cells of its row}."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    rows = [[cell.strip(" `") for cell in line.strip("| ").split(" | ")] for line in lines[1:]]
    return {name: cells for name, *cells in rows}


@pytest.fixture(scope="module")
def generator():
    return runpy.run_path(str(GENERATOR))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in model_types()]
)
def test_every_class_is_as_the_page_says(generator, name):
    """Raises where a number is neither right nor refused, whatever the page says."""
    found = generator["answer"](name)
    answer = ("right" if found.right else "refused") if isinstance(found, Verdict) else "not tried"
    _, said, *_ = on_the_page()[name]
    assert answer == said
    assert answer == "right" or name not in FEW


def test_the_page_has_every_class_that_is_installed():
    text = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," not in text:
        pytest.skip("the page is of another version of transformers")
    page = on_the_page()
    assert set(page) == set(model_types())
    # One model_type for every class, and every class has one.
    classes = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in model_types()}
    assert classes == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    assert len(classes) == len(page)


def test_what_people_train_is_right():
    """The families that the project promises, whatever else a page generated anew would say."""
    page = on_the_page()
    kinds = {cells[0]: cells[1] for cells in page.values()}
    of_trained = {n: kinds[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[n]] for n in TRAINED.split()}
    assert set(of_trained.values()) == {"right"}, of_trained
    assert sum(cells[1] == "right" for cells in page.values()) >= 50
