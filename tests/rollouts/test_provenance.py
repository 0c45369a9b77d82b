"""A file's own step is checked and used; the same responses as E and U are said to be the same."""

from pathlib import Path

import pytest

from funcprobe.adapters.config.schema import RolloutsConfig
from funcprobe.adapters.rollouts import Rollouts, load_rollouts, save_rollouts
from funcprobe.adapters.rollouts.provenance import TrainingRun, is_next_batch, require_own
from funcprobe.types import InputError

FILES = RolloutsConfig(eval="e.parquet", update="u.parquet")
ONE = Rollouts(
    prompt_index=[0, 0, 1, 1],
    prompt=[""] * 4,
    response=[""] * 4,
    prompt_ids=[[1], [1], [2], [2]],
    response_ids=[[3], [4, 5], [3], [4]],
    finish_reason=["unknown"] * 4,
    temperature=1.0,
    reward=[1.0, 0.0, 1.0, 0.0],
)
LOGP = [[-1.0], [-1.0, -2.0], [-1.0], [-1.0]]


def after(steps: int | None, **loss: object) -> TrainingRun:
    return TrainingRun(Path("checkpoint-5"), steps, loss, {})


def of_step(step: int | None, **changes: object) -> Rollouts:
    return ONE._replace(step=step, **changes)


OTHER = ONE._replace(response_ids=[[6], [7], [8], [9]])


def test_the_step_of_u_must_be_the_next() -> None:
    assert require_own(FILES, None, of_step(6), after(5)) == []
    assert require_own(FILES, None, of_step(None), after(5)) == []
    for step in (3, 5, 7):  # also the step that made the checkpoint: its policy was the one before
        with pytest.raises(InputError, match=f"u.parquet is of step {step}, .* has taken 5: give") as e:
            require_own(FILES, None, of_step(step), after(5))
        assert "the file of step 6" in str(e.value)
        assert "\n" not in str(e.value)
    (line,) = require_own(FILES, None, of_step(6), after(None))
    assert "only if these are 5" in line


def test_the_step_of_e_must_be_the_next_unless_it_has_ratios() -> None:
    assert require_own(FILES, of_step(6), None, after(5)) == []
    with pytest.raises(InputError, match=r"e\.parquet is of step 3.*sampler_logp"):
        require_own(FILES, of_step(3), None, after(5))
    assert require_own(FILES, of_step(3, sampler_logp=LOGP), None, after(5)) == []


def test_the_same_responses_are_said_to_be_the_same() -> None:
    (line,) = require_own(FILES, ONE, ONE, after(5))
    assert "E and U are the same responses" in line
    first = {k: v[:3] for k, v in ONE._asdict().items() if isinstance(v, list)}
    assert require_own(FILES, ONE._replace(**first), ONE, after(5)) == [line]  # a part of the other
    assert require_own(FILES, ONE, ONE._replace(**first), after(5)) == [line]
    assert require_own(FILES, OTHER, ONE, after(5)) == []
    twice = ONE._replace(response_ids=[[3], [3], [3], [3]])  # of the four only two are in ONE
    assert require_own(FILES, twice, ONE, after(5)) == []


def test_u_is_the_next_batch_where_all_of_it_is_known_to_be() -> None:
    assert is_next_batch(of_step(6), after(5))
    assert is_next_batch(of_step(6), after(5, generation_batch_size=4))
    assert not is_next_batch(of_step(6), after(5, generation_batch_size=8))  # half of it
    # Of 8 generated responses, or of 2 generations of 2, a step has 4; what is used twice is no step's.
    steps = {"gradient_accumulation_steps": 2, "steps_per_generation": 4}
    assert is_next_batch(of_step(6), after(5, generation_batch_size=8, **steps))
    assert not is_next_batch(of_step(6), after(5, generation_batch_size=4, **steps))
    steps = {"gradient_accumulation_steps": 4, "steps_per_generation": 2}
    assert is_next_batch(of_step(6), after(5, generation_batch_size=2, **steps))
    assert not is_next_batch(of_step(6), after(5, generation_batch_size=4, **steps))
    twice = after(5, generation_batch_size=4, num_iterations=2)
    assert not is_next_batch(of_step(6), twice)
    assert is_next_batch(of_step(6, microbatch=[0] * 4), twice)  # recorded, so that it is one step's
    assert not is_next_batch(of_step(6, microbatch=[0] * 4), after(5, generation_batch_size=8))
    assert not is_next_batch(of_step(6), after(5, generation_batch_size="4"))
    assert not is_next_batch(of_step(5), after(5))
    assert not is_next_batch(of_step(6), after(None))
    assert not is_next_batch(of_step(None), after(5))
    assert not is_next_batch(None, after(5))


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_the_step_comes_back_and_is_one(tmp_path, ending) -> None:
    path = tmp_path / f"r.{ending}"
    save_rollouts(of_step(6), path)
    assert load_rollouts(path, 10, rewards=True) == of_step(6)
    save_rollouts(of_step(0), path)
    with pytest.raises(InputError, match="has step 0"):
        load_rollouts(path, 10, rewards=True)
    if ending == "jsonl":
        save_rollouts(of_step(6), path)
        lines = path.read_text().splitlines()
        lines[2] = lines[2].replace('"step": 6', '"step": 7')
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(InputError, match="line 3 has step 7, the first row 6"):
            load_rollouts(path, 10, rewards=True)
