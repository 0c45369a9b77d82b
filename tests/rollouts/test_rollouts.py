"""Rollouts on disk: every column comes back; what cannot be probed is refused by row or line."""

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from funcprobe.adapters.rollouts import (
    SCHEMA,
    Rollouts,
    load_rollouts,
    loss_inputs,
    sampler_logp,
    save_rollouts,
    to_batch,
)
from funcprobe.adapters.rollouts.files import files_of, of_rank
from funcprobe.adapters.sampling.advantages import groups_of_zero, update_advantages
from funcprobe.losses.loss import require_inputs
from funcprobe.policy.layout import response_mask
from funcprobe.types import InputError

FULL = Rollouts(
    prompt_index=[4, 4, 1],
    prompt=["one", "one", "zwei\n"],
    response=["a", "", "ü\u2028"],
    prompt_ids=[[1, 2], [1, 2], [3]],
    response_ids=[[5, 6, 7], [8], [9, 0]],
    finish_reason=["stop", "length", "unknown"],
    temperature=0.7,
    reward=[1.0, 0.25, -3.0],
    advantage=[0.5, -0.5, 0.1],
    sampler_logp=[[-0.1, -2.0, -1e-9], [0.0], [-3.5, -30.0]],
    step=3,
    old_logp=[[-0.2, -2.5, -1e-8], [-0.0], [-3.25, -29.0]],
    ref_logp=[[-0.5, -1.5, -2.0], [-1.0], [-4.0, -20.0]],
    loss_mask=[[True, False, True], [True], [False, True]],
    microbatch=[1, 0, 1],
    process=[0, 1, 1],
    generated_tokens=[37.0, 41.0, 37.0],  # of micro-batches 1, 0, 1
    entropy_coef=-0.25,
)
BARE = Rollouts(
    prompt_index=[0, 1],
    prompt=["", ""],
    response=["", ""],
    prompt_ids=[[1], [2]],
    response_ids=[[3], [4]],
    finish_reason=["unknown", "unknown"],
    temperature=1.0,
)
NAN, INF = float("nan"), float("inf")


def columns(**changes: list | None) -> dict[str, list]:
    found = FULL._asdict() | {"temperature": [0.7] * 3, "finish_reason": ["stop", "length", None]}
    found |= {k: [found[k]] * 3 for k in ("step", "entropy_coef")}
    return {k: v for k, v in (found | changes).items() if v is not None}


def write(path: Path, values: dict[str, list]) -> None:
    """As another program may: by pyarrow's own types, or with Python's json and null for None."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table(values), path)
    else:
        rows = zip(*values.values(), strict=True)
        path.write_text("".join(json.dumps(dict(zip(values, row, strict=True))) + "\n" for row in rows))


def refusal(path: Path, vocabulary: int = 10, **needs) -> str:
    with pytest.raises(InputError) as caught:
        load_rollouts(path, vocabulary, **({"rewards": True} | needs))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What comes back


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "json"])
@pytest.mark.parametrize("rollouts", [FULL, BARE])
def test_every_column_comes_back(tmp_path, rollouts, ending) -> None:
    path = tmp_path / f"r.{ending}"
    save_rollouts(rollouts, path)
    assert load_rollouts(path, 10, rewards=False) == rollouts
    if rollouts is FULL:
        assert load_rollouts(path, 10, rewards=True) == rollouts
    if ending == "parquet":
        assert pq.read_schema(path).equals(SCHEMA)
    else:
        assert [set(json.loads(x)) <= set(SCHEMA.names) for x in path.read_text().splitlines()]


def test_every_column_says_what_it_means() -> None:
    assert set(SCHEMA.names) == set(Rollouts._fields)
    for field in SCHEMA:
        assert len(field.metadata[b"about"]) > 30


finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def any_rollouts(draw) -> Rollouts:
    prompts = draw(
        st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=3)
    )
    numbers = draw(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, min_size=3, max_size=3))
    which = draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=4))
    count = len(which)
    responses = draw(
        st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=count, max_size=count)
    )

    def column(one):
        return st.lists(one, min_size=count, max_size=count)

    logp = st.floats(max_value=0, allow_nan=False, allow_infinity=False)

    def of_tokens(one):
        rows = st.tuples(*(st.lists(one, min_size=len(y), max_size=len(y)) for y in responses))
        return st.none() | rows.map(list)

    sampler = draw(of_tokens(logp))
    microbatch = draw(st.none() | column(st.integers(0, 2**63 - 1)))
    calls = microbatch or [0] * count
    of_call = {call: draw(st.floats(0, allow_nan=False, allow_infinity=False)) for call in set(calls)}
    return Rollouts(
        prompt_index=[numbers[i] for i in which],
        prompt=draw(column(text)),
        response=draw(column(text)),
        prompt_ids=[prompts[i] for i in which],
        response_ids=responses,
        finish_reason=draw(column(st.sampled_from(["stop", "length", "unknown"]))),
        temperature=draw(st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False)),
        reward=draw(st.none() | column(finite)),
        advantage=draw(st.none() | column(finite)),
        sampler_logp=sampler,
        old_logp=None if sampler is None else draw(of_tokens(logp)),
        ref_logp=draw(of_tokens(logp)),
        loss_mask=draw(of_tokens(st.booleans())),
        microbatch=microbatch,
        process=draw(st.none() | column(st.integers(0, 2**63 - 1))),
        generated_tokens=draw(st.sampled_from([None, [of_call[call] for call in calls]])),
        entropy_coef=draw(st.none() | finite),
    )


@settings(max_examples=60)
@given(any_rollouts(), st.sampled_from(["parquet", "jsonl"]))
def test_any_rollouts_come_back_to_the_last_bit(rollouts, ending) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"r.{ending}"
        save_rollouts(rollouts, path)
        found = load_rollouts(path, 10, rewards=False)
        if rollouts.reward is not None:
            assert load_rollouts(path, 10, rewards=True) == rollouts
    assert found == rollouts
    # == does not tell 0.0 from -0.0.
    assert repr(found.reward) == repr(rollouts.reward)


def test_the_needed_columns_are_enough_in_any_integer_type(tmp_path) -> None:
    """As another program may write them: int32, large lists, a column more, another order."""
    table = pa.table(
        {
            "temperature": pa.array([1.0, 1.0], pa.float32()),
            "response_ids": pa.array([[3], [4]], pa.large_list(pa.int32())),
            "prompt_ids": pa.array([[1], [2]], pa.list_(pa.int32())),
            "prompt_index": pa.array([0, 1], pa.int16()),
            "mine": ["x", "y"],
        }
    )
    pq.write_table(table, tmp_path / "r.parquet")
    assert load_rollouts(tmp_path / "r.parquet", 10, rewards=False) == BARE


def test_json_lines_as_others_write_them(tmp_path) -> None:
    """A byte order mark, blank lines, Windows' line ends, no last one; integers where floats go."""
    rows = [
        '{"prompt_index": 0, "prompt_ids": [1], "response_ids": [3], "temperature": 1, "reward": 2}',
        "",
        '{"reward": -1e-1, "temperature": 1.0, "response_ids": [4], "prompt_ids": [2], '
        '"prompt_index": 1, "prompt": null, "mine": {"a": []}, "response": "a\u2028b"}',
    ]
    (tmp_path / "r.jsonl").write_bytes("\r\n".join(rows).encode("utf-8-sig"))
    found = load_rollouts(tmp_path / "r.jsonl", 10, rewards=True)
    assert found == BARE._replace(reward=[2.0, -0.1], response=["", "a\u2028b"])
    assert type(found.temperature) is float


def test_the_batch_keeps_rows_and_units_apart() -> None:
    batch = to_batch(FULL)
    assert batch.prompt_N.tolist() == [4, 4, 1]
    assert batch.tokens_NL.tolist() == [[1, 2, 5, 6, 7], [1, 2, 8, 0, 0], [3, 9, 0, 0, 0]]
    assert batch.response_length_N.tolist() == [3, 1, 2]
    expected = torch.tensor([[-0.1, -2.0, -1e-9], [0, 0, 0], [-3.5, -30.0, 0]], dtype=torch.float64)
    assert torch.equal(sampler_logp(FULL, batch), expected)
    assert sampler_logp(BARE, to_batch(BARE)) is None


def test_what_a_loss_depends_on_besides_the_policy() -> None:
    batch, advantage_N = to_batch(FULL), torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    found = loss_inputs(FULL, batch, advantage_N)
    assert found.advantage_N is advantage_N
    assert found.mask_NR.tolist() == [[True, False, True], [True, False, False], [False, True, False]]
    assert found.prompt_N.tolist() == [4, 4, 1]
    assert (found.microbatch_N.tolist(), found.process_N.tolist()) == ([1, 0, 1], [0, 1, 1])
    for name in ("sampler_logp", "old_logp", "ref_logp"):
        expected = [[*row, 0, 0][:3] for row in getattr(FULL, name)]
        found_NR = getattr(found, f"{name}_NR")
        assert torch.equal(found_NR, torch.tensor(expected, dtype=torch.float64))
    assert found.generated_tokens_N.tolist() == [37.0, 41.0, 37.0]
    assert found.generated_tokens_N.dtype == torch.float64
    require_inputs(batch, found)
    batch = to_batch(BARE)
    bare = loss_inputs(BARE, batch, advantage_N[:2])
    assert torch.equal(bare.mask_NR, response_mask(batch))
    assert bare.microbatch_N.tolist() == bare.process_N.tolist() == [0, 0]
    assert [x for x in bare if x is None] == [None] * 4
    require_inputs(batch, bare)


# What is refused


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"response_ids": None}, "has no column response_ids: prompt_index"),
        ({"response_ids": None}, "its columns are: prompt_index, prompt, response, prompt_ids, finish"),
        ({"reward": None}, "has no column reward"),
        (
            {"prompt_index": None, "group": [4, 4, 1]},
            "no column prompt_index but a column group: rename",
        ),
        ({"response_ids": None, "completion_ids": [[5], [8], [9]]}, "but a column completion_ids: ren"),
        ({"sampler_logp": None, "logprobs": [[0], [0], [0]]}, "but a column logprobs: rename it, or"),
        ({"advantage": None, "advantages": [1.0, 0.0, 0.0]}, "but a column advantages: rename it"),
        ({"response_ids": [[5, 6, 7], [], [9, 0]]}, "@1 has a response of zero tokens"),
        ({"response_ids": [[5, 6, 7], None, [9, 0]]}, "@1 has no response_ids"),
        ({"prompt_ids": [[1, 2], [1, 2], [10]]}, "@2 has a token id outside the model's 10"),
        ({"prompt_ids": [[1, 2], [1, 2], [-3]]}, "@2 has a token id outside the model's 10"),
        ({"prompt_ids": [[1, 2], [1, 2], []]}, "@2 has a prompt of zero tokens"),
        ({"response_ids": [[5, 6, 10], [8], [9, 0]]}, "@0 has a token id outside the model's 10"),
        ({"response_ids": [[5, 6, 7], [-1], [9, 0]]}, "@1 has a token id outside"),
        ({"response_ids": [[5, None, 7], [8], [9, 0]]}, "@0 has None in response_ids, a list of integ"),
        ({"response_ids": [["a"], ["b"], ["c"]]}, "@0 has 'a' in response_ids, a list of integers is"),
        ({"response_ids": [[5.0], [8.0], [9.0]]}, "@0 has 5.0 in response_ids, a list of integers"),
        ({"response_ids": [5, 8, 9]}, "@0 has 5 in response_ids, a list of integers"),
        ({"prompt_index": ["a", "b", "c"]}, "@0 has 'a' in prompt_index, an integer is expected"),
        ({"prompt_index": [[4], [4], [1]]}, "@0 has [4] in prompt_index, an integer is expected"),
        ({"prompt_index": [True, True, False]}, "@0 has True in prompt_index, an integer"),
        ({"prompt_index": [4, None, 1]}, "@1 has no prompt_index"),
        ({"prompt_index": [4, 4, 4]}, "@2 has another prompt than the rows before it"),
        ({"temperature": [0.7, 1.0, 0.7]}, "temperature 0.7, 1: one positive number"),
        ({"temperature": [0.0, 0.0, 0.0]}, "temperature 0: one positive number"),
        ({"temperature": [0.7, None, 0.7]}, "@1 has no temperature"),
        (
            {"reward": [1.0, None, 0.0]},
            '@1 has no reward: drop the row, or set objective.advantage = "',
        ),
        ({"reward": [True, False, True]}, "@0 has True in reward, a number is expected"),
        ({"reward": ["1", "0", "1"]}, "@0 has '1' in reward, a number is expected"),
        ({"advantage": [1.0, None, 0.0]}, "@1 has no advantage: fill it in"),
        ({"prompt": [1, 2, 3]}, "@0 has 1 in prompt, Unicode text is expected"),
        ({"finish_reason": ["stop", "eos", None]}, "@1 has finish_reason 'eos', stop, length or null"),
        ({"sampler_logp": [[-0.1, -2.0], [0.0], [-3.5, -3.0]]}, "@0 has 2 sampler_logp for 3"),
        ({"sampler_logp": [[-0.1, -2.0, -1.0], None, [-3.5, -3.0]]}, "@1 has no sampler_logp: fill"),
        (
            {"sampler_logp": [[-0.1, None, -1.0], [0.0], [-3.5, -3.0]]},
            "None in sampler_logp, a list of n",
        ),
        ({"sampler_logp": [[-0.1, -2.0, -1.0], [0.3], [-3.5, -3.0]]}, "@1 has sampler_logp that"),
        ({"old_logp": [[-0.1, -2.0], [0.0], [-3.5, -3.0]]}, "@0 has 2 old_logp for 3 response tokens"),
        ({"old_logp": [[-0.1, -2.0, -1.0], [0.3], [-3.5, -3.0]]}, "@1 has old_logp that is not a log-"),
        (
            {"ref_logp": [[-0.1, -2.0, -1.0], None, [-3.5, -3.0]]},
            "@1 has no ref_logp: fill it in, or d",
        ),
        (
            {"old_logp": None, "old_per_token_logps": [[0], [0], [0]]},
            "but a column old_per_token_logps",
        ),
        ({"old_logp": None, "old_logps": [[0], [0], [0]]}, "no column old_logp but a column old_logps"),
        ({"ref_logp": None, "ref_logps": [[0], [0], [0]]}, "no column ref_logp but a column ref_logps"),
        ({"loss_mask": [[1, 0, 1], [1], [0, 0]]}, "@0 has 1 in loss_mask, a list of true and false is"),
        (
            {"loss_mask": [[True, True, True], [True, True], [True, True]]},
            "@1 has 2 loss_mask for 1 res",
        ),
        ({"microbatch": [0, -1, 0]}, "@1 has microbatch -1: they count from 0"),
        ({"process": [0, 0, -2]}, "@2 has process -2: they count from 0"),
        ({"process": [0, None, 1]}, "@1 has no process: fill it in, or drop the whole column"),
        (
            {"generated_tokens": [37, 41, 38]},
            "@2 has generated_tokens 38, the first row of its micro-batch 37: one finite number, at",
        ),
        (
            {"generated_tokens": [37, 41, 37], "microbatch": None},
            "@1 has generated_tokens 41, the first row of its micro-batch 37",
        ),
        (
            {"generated_tokens": [37, None, 37]},
            "@1 has no generated_tokens: fill it in, or drop the",
        ),
        (
            {"generated_tokens": [1.0, -1.0, 1.0]},
            "@1 has generated_tokens -1, the first row of its",
        ),
        ({"generated_tokens": [1.0, INF, 1.0]}, "@1 has generated_tokens inf"),
        ({"generated_tokens": [1.0, NAN, 1.0]}, "@1 has generated_tokens nan"),
        ({"entropy_coef": [0.1, 0.1, 0.2]}, "@2 has entropy_coef 0.2, the first row 0.1: one finite"),
        ({"entropy_coef": [NAN] * 3}, "@0 has entropy_coef nan"),
        ({"entropy_coef": [INF] * 3}, "@0 has entropy_coef inf"),
        ({"old_logp": [[-0.1, NAN, -1.0], [0.0], [-3.5, -3.0]]}, "@0 has old_logp that is not"),
    ],
)
def test_what_cannot_be_probed(tmp_path, ending, changes, said) -> None:
    path = tmp_path / f"r.{ending}"
    write(path, columns(**changes))
    # Rows of Parquet count from 0, lines of a file from 1.
    place = {f"@{i}": f"row {i}" if ending == "parquet" else f"line {i + 1}" for i in range(3)}
    of_U = "sampler_logp" not in changes  # which is read of E alone
    assert said.replace(said[:2], place.get(said[:2], said[:2])) in refusal(path, rewards=of_U)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": [NAN, NAN, NAN]}, "temperature nan"),
        ({"reward": [1.0, NAN, 0.0]}, "row 1 has reward nan, a finite number"),
        ({"reward": [1.0, 0.0, INF]}, "row 2 has reward inf"),
        ({"advantage": [1.0, 0.0, -INF]}, "row 2 has advantage -inf"),
        ({"sampler_logp": [[-0.1, NAN, -1.0], [0.0], [-3.5, -3.0]]}, "not a log-probability"),
        ({"sampler_logp": [[-0.1, -INF, -1.0], [0.0], [-3.5, -3.0]]}, "not a log-probability"),
    ],
)
def test_what_is_no_number(tmp_path, changes, said) -> None:
    of_U = "sampler_logp" not in changes  # which is read of E alone
    for ending, place in (("parquet", "row"), ("jsonl", "line")):
        path = tmp_path / f"r.{ending}"
        write(path, columns(**changes))
        if ending == "jsonl":  # whose lines count from 1
            said = said.replace("row 2", "line 3").replace("row 1", "line 2").replace("row", place)
        assert said in refusal(path, rewards=of_U)
        if not of_U and NAN in changes["sampler_logp"][0]:  # of U a sampler need not know all
            assert load_rollouts(path, 10, rewards=True).reward == FULL.reward
        elif not of_U:
            assert said in refusal(path, rewards=True)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_nan_in_a_column_that_nobody_reads_does_no_harm(tmp_path, ending) -> None:
    path = tmp_path / f"r.{ending}"
    extra = {"acc": [NAN, 1.0, INF], "info": [{"kl": NAN}, {"kl": 1.0}, {"kl": -INF}]}
    write(path, columns(**extra))
    assert load_rollouts(path, 10, rewards=True) == FULL
    assert load_rollouts(path, 10, rewards=False) == FULL
    write(path, columns(**extra, reward=[NAN, 0.5, NAN]))  # with advantages, the reward is not read
    assert math.isnan(load_rollouts(path, 10, rewards=False, advantages=True).reward[0])
    assert "has reward nan" in refusal(path)


def test_rewards_and_advantages_are_asked_for_only_where_they_are_needed(tmp_path) -> None:
    path = tmp_path / "r.parquet"
    write(path, columns(reward=[NAN, None, 1.0], advantage=[None, None, 1.0]))
    found = load_rollouts(path, 10, rewards=False)
    assert str(found.reward) == str(found.advantage) == "[nan, nan, 1.0]"
    write(path, columns(reward=None, advantage=None, score=[1, 2, 3]))  # of no concern to E
    assert load_rollouts(path, 10, rewards=False).reward is None
    assert "no column advantage" in refusal(path, rewards=False, advantages=True)
    write(path, columns(reward=[None, 2.0, 1.0]))
    taken = load_rollouts(path, 10, rewards=False, advantages=True)
    assert taken.advantage == FULL.advantage
    assert [math.isnan(r) for r in taken.reward] == [True, False, False]
    write(path, columns(advantage=[None, 2.0, 1.0]))
    assert "row 0 has no advantage" in refusal(path, rewards=False, advantages=True)
    write(path, columns(advantage=[INF, 2.0, 1.0]))
    assert "row 0 has advantage inf" in refusal(path, rewards=False, advantages=True)


@pytest.mark.parametrize(
    ("changes", "eos_ids", "said"),
    [
        ({}, (7, 0), None),
        ({}, (0, 7, 99), None),
        ({}, (), None),
        ({"finish_reason": None}, (3,), None),
        ({}, (0,), "row 0 has finish_reason stop but no end-of-sequence token at its end (0): append"),
        (
            {},
            (7, 8),
            "row 1 has finish_reason length but ends in an end-of-sequence token: remove it if",
        ),
        ({}, (7, 9), "row 2 has tokens after its first end-of-sequence token (padding?)"),
        ({"finish_reason": None}, (6,), "row 0 has tokens after its first"),
    ],
)
def test_the_end_is_what_finish_reason_says(tmp_path, changes, eos_ids, said) -> None:
    path = tmp_path / "r.parquet"
    write(path, columns(**changes))
    if said is None:
        assert load_rollouts(path, 10, rewards=True, eos_ids=eos_ids).response_ids == FULL.response_ids
    else:
        assert said in refusal(path, eos_ids=eos_ids)


def test_a_tool_may_write_after_an_end_of_the_policy(tmp_path) -> None:
    """7 ends a turn of the policy, what follows is not in the loss; then the policy goes on."""
    path = tmp_path / "r.parquet"
    made = {"response_ids": [[7, 2, 7], [8], [9, 0]], "finish_reason": ["stop", None, None]}
    write(path, columns(**made))  # the mask is true, false, true
    assert load_rollouts(path, 10, rewards=True, eos_ids=(7,)).response_ids == made["response_ids"]
    assert "row 0 has tokens after its first end" in refusal(path, rewards=False, eos_ids=(7,))
    write(path, columns(**made, loss_mask=[[True, True, True], [True], [True, True]]))
    assert "row 0 has tokens after its first end" in refusal(path, eos_ids=(7,))


def test_e_of_an_earlier_policy_needs_ratios(tmp_path) -> None:
    path = tmp_path / "r.parquet"
    write(path, columns(sampler_logp=None))
    assert "rename old_logp to sampler_logp" in refusal(path, rewards=False)
    assert load_rollouts(path, 10, rewards=True).sampler_logp is None


def test_the_files_of_all_ranks_are_one(tmp_path) -> None:
    path = tmp_path / "step[1]-000006.parquet"  # of its name nothing is a pattern
    halves = [
        {k: v[part] if isinstance(v, list) else v for k, v in FULL._asdict().items()}
        for part in (slice(1), slice(1, 3))
    ]
    save_rollouts(Rollouts(**halves[1]), of_rank(path, 1, 2))
    assert "of the files of 2 ranks, 0 are missing" in refusal(path)
    assert "rank-00000-of-00002.parquet" in refusal(path)
    save_rollouts(Rollouts(**halves[0]), of_rank(path, 0, 2))
    assert files_of(path) == [of_rank(path, 0, 2), of_rank(path, 1, 2)]
    assert load_rollouts(path, 10, rewards=True) == FULL
    assert load_rollouts(of_rank(path, 1, 2), 10, rewards=True).prompt_index == [4, 1]
    assert "no such file" in refusal(path.with_suffix(".jsonl"))
    bad = halves[1] | {"prompt_ids": [[1, 9], [3]]}
    save_rollouts(Rollouts(**bad), of_rank(path, 1, 2))
    assert "row 0 of rank 1 has another prompt than the rows before it with prompt_i" in refusal(path)
    save_rollouts(FULL, of_rank(path, 3, 4))
    assert "files of ranks of 2 and of 4 processes" in refusal(path)
    save_rollouts(BARE._replace(reward=[0.0, 1.0]), path)  # a whole file is read alone
    assert load_rollouts(path, 10, rewards=True).response_ids == BARE.response_ids


def test_files_that_are_no_rollouts(tmp_path) -> None:
    assert "no such file" in refusal(tmp_path / "absent.parquet")
    (tmp_path / "folder.parquet").mkdir()
    assert "is a folder: give the file in it" in refusal(tmp_path / "folder.parquet")
    (tmp_path / "r.csv").write_text("prompt_index\n1\n")
    assert "expected a file that ends in .parquet, .jsonl, .json" in refusal(tmp_path / "r.csv")
    (tmp_path / "text.parquet").write_text("prompt_index\n1\n")
    assert "cannot be read as Parquet" in refusal(tmp_path / "text.parquet")
    pq.write_table(SCHEMA.empty_table(), tmp_path / "empty.parquet")
    assert "has no rows" in refusal(tmp_path / "empty.parquet")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "has no rows" in refusal(tmp_path / "empty.jsonl")
    twice = pa.Table.from_arrays([pa.array([1])] * 2, names=["prompt_index"] * 2)
    pq.write_table(twice, tmp_path / "twice.parquet")
    assert "Multiple matches" in refusal(tmp_path / "twice.parquet")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (rb'{"\ud800": 1}', "line 2 cannot be read (key '\\ud800' is not Unicode text)"),
        (b"[1]", "line 2 is list, one JSON object per line is expected"),
        (b"{'prompt_index': 1}", "line 2 cannot be read (Expecting property name"),
        (b'{"reward": 1, "reward": 2}', "line 2 cannot be read (key 'reward' occurs twice)"),
        (b'{"reward": ' + b"9" * 5000 + b"}", "line 2 cannot be read (Exceeds the limit"),
        (b"[" * 100_000, "line 2 cannot be read (maximum recursion"),
        (b'{"prompt": "\xff"}', "expected UTF-8 text"),
    ],
)
def test_lines_that_are_no_json(tmp_path, line, said) -> None:
    path = tmp_path / "r.jsonl"
    save_rollouts(FULL, path)
    first, second, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, third]))
    assert said in refusal(path)
    path.write_bytes(b"\n".join([first, second.replace(b"0.25", b"1e400"), third]))
    assert "line 2 has reward inf" in refusal(path)
    path.write_bytes(b"\n".join([first, second.replace(b"0.25", b"9007199254740993"), third]))
    assert "line 2 has 9007199254740993 in reward, a number is expected" in refusal(path)
    path.write_bytes(
        b"\n".join([first, second.replace(b'"prompt": "one"', rb'"prompt": "\ud800"'), third])
    )
    assert "line 2 has '\\ud800' in prompt, Unicode text is expected" in refusal(path)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_file_that_was_cut_anywhere(tmp_path, ending) -> None:
    """Refused wherever it ends inside a row; JSON lines that end between rows are whole rows."""
    path = tmp_path / f"r.{ending}"
    save_rollouts(FULL, path)
    data = path.read_bytes()
    whole = {i for i in range(len(data) + 1) if ending == "jsonl" and data[i : i + 1] in {b"\n", b""}}
    whole |= {i + 1 for i in whole}
    for i in range(1, len(data), 7 if ending == "jsonl" else 97):
        if i not in whole:
            path.write_bytes(data[:i])
            assert "cannot be read" in refusal(path)


def test_a_number_that_json_lacks_is_not_written(tmp_path) -> None:
    with pytest.raises(InputError, match="row 1 contains a number that is not finite"):
        save_rollouts(FULL._replace(reward=[0.0, INF, 0.0]), tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


# Advantages


def update(reward, advantage=None, group=(0, 0, 0, 1, 1, 1)) -> Rollouts:
    return Rollouts(list(group), [], [], [[1]] * 6, [[2]] * 6, ["unknown"] * 6, 1.0, reward, advantage)


def test_advantages_are_made_of_rewards_unless_told() -> None:
    reward = [1.0, 0.0, 0.0, 2.0, 2.0, 2.0]
    made = [2 / 3, -1 / 3, -1 / 3, 0, 0, 0]
    advantage_N, lines = update_advantages(update(reward), "mean")
    assert advantage_N.tolist() == pytest.approx(made, abs=1e-15)
    assert lines == []
    # As float32 has it: no warning.
    rounded = torch.tensor(made, dtype=torch.float32).tolist()
    assert update_advantages(update(reward, rounded), "mean")[1] == []
    off = [*made[:5], 0.0007]  # 1.05e-3 of the largest
    advantage_N, lines = update_advantages(update(reward, off), "mean")
    assert advantage_N.tolist() == pytest.approx(made, abs=1e-15)
    assert len(lines) == 1
    assert "(up to 0.667) differ by up to 0.0007" in lines[0]
    assert 'objective.advantage = "rollouts"' in lines[0]
    taken_N, lines = update_advantages(update(reward, off), "rollouts")
    assert (taken_N.tolist(), lines) == (off, [])
    taken_N, _ = update_advantages(update(None, off), "rollouts")
    assert taken_N.tolist() == off
    assert taken_N.dtype == torch.float64
    assert update_advantages(update(reward, [0.0] * 6), "mean")[1]  # not those of these rewards


@pytest.mark.parametrize("mode", ["mean", "mean_std", "leave_one_out"])
def test_rewards_whose_squares_overflow_are_not_called_equal(mode) -> None:
    with pytest.raises(InputError, match="a reward of U has magnitude 1e\\+200, at most 1e\\+150"):
        update_advantages(update([-1e200, NAN, 0.5, 0.0, 1.0, 2.0]), mode)
    advantage_N, _ = update_advantages(update([1e150, 0.0, -1e150, 0.0, 1.0, 2.0]), mode)
    assert bool(advantage_N.isfinite().all())
    assert groups_of_zero(advantage_N, torch.tensor([0, 0, 0, 1, 1, 1])) == 0


def test_a_response_without_reward_is_out_of_its_group() -> None:
    made_N, _ = update_advantages(update([1.0, NAN, 0.5, 3.0, NAN, NAN]), "mean")
    assert made_N.tolist() == [0.25, 0.0, -0.25, 0.0, 0.0, 0.0]
    with pytest.raises(InputError, match="prompt 7 has one response"):
        update_advantages(update([1.0, NAN, 0.5, 0.0, 1.0, 2.0], group=(0, 0, 0, 0, 0, 7)), "mean")


def test_groups_without_a_say_are_those_of_advantage_0() -> None:
    prompt_N = torch.tensor([5, 5, 1, 1, 2, 2])
    advantage_N = torch.tensor([0.5, 0.5, 0, 0, 0, -1e-9])
    assert groups_of_zero(advantage_N, prompt_N) == 1  # equal and not 0 is a gradient all the same
    assert groups_of_zero(0 * advantage_N, prompt_N) == 3
