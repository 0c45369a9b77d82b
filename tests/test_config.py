"""The configuration file: defaults, overrides, the round trip, and every refusal in one line."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funcprobe.adapters.config.file import commented_config, read_config, to_toml
from funcprobe.adapters.config.schema import Config
from funcprobe.types import InputError


def read(tmp_path: Path, text: str = "", *overrides: str) -> Config:
    (tmp_path / "c.toml").write_text(text, encoding="utf-8")
    return read_config(tmp_path / "c.toml", overrides)


def refusal(tmp_path: Path, text: str = "", *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_empty_file_is_the_defaults(tmp_path) -> None:
    assert read(tmp_path) == Config()


def test_the_commented_file_is_the_defaults_and_names_every_key(tmp_path) -> None:
    text = commented_config()
    assert read(tmp_path, text) == Config()
    uncommented = {line.removeprefix("# ").split(" =")[0] for line in text.splitlines() if " =" in line}
    for name, field in Config.model_fields.items():
        for key, of_section in field.annotation.model_fields.items():
            assert key in uncommented, f"{name}.{key}"
            assert of_section.description, f"{name}.{key} has no description"
            assert of_section.description in text


def test_a_file_reaches_its_keys(tmp_path) -> None:
    config = read(
        tmp_path, '[sampling]\nB_E = 7\n[policy]\ndtype = "float64"\n[measure]\netas = [1e-3]'
    )
    assert (config.sampling.B_E, config.policy.dtype, config.measure.etas) == (7, "float64", (1e-3,))


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        ("run.name=one", "run", "name", "one"),  # a bare word
        ('run.name="two"', "run", "name", "two"),
        ("sampling.B_E = 64", "sampling", "B_E", 64),
        ("sampling.temperature=0.5", "sampling", "temperature", 0.5),
        ("sampling.temperature=2", "sampling", "temperature", 2.0),
        ("prompts.chat=true", "prompts", "chat", True),
        ("measure.etas=[1e-7, 1]", "measure", "etas", (1e-7, 1.0)),
        ("optimizer.betas=[0.8, 0.9]", "optimizer", "betas", (0.8, 0.9)),
        ("prompts.template=a = {prompt}", "prompts", "template", "a = {prompt}"),
        ('prompts.template="a\\nb"', "prompts", "template", "a\nb"),
        ("prompts.template=1\nx = 2", "prompts", "template", "1\nx = 2"),  # not two keys of TOML
        ("policy.checkpoint=/a/b c", "policy", "checkpoint", "/a/b c"),
    ],
)
def test_set_takes_values_of_every_kind(tmp_path, override, section, key, expected) -> None:
    found = getattr(getattr(read(tmp_path, "", override), section), key)
    assert found == expected
    assert type(found) is type(expected)


def test_the_last_override_wins_over_the_file(tmp_path) -> None:
    config = read(tmp_path, "[run]\nseed = 1\nname = 'kept'", "run.seed=2", "run.seed=3")
    assert (config.run.seed, config.run.name) == (3, "kept")


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=50)
@given(
    etas=st.lists(st.floats(1e-12, 1e3), min_size=1, max_size=5, unique=True),
    template=st.none() | TEXT,
    source=TEXT,
    seed=st.integers(0, 2**63),
    lr=st.none() | st.floats(1e-12, 1e3),
)
def test_what_is_written_reads_back(tmp_path_factory, etas, template, source, seed, lr) -> None:
    config = Config.model_validate(
        {
            "measure": {"etas": etas},
            "prompts": {"template": template, "source": source},
            "run": {"seed": seed},
            "optimizer": {"lr": lr},
        }
    )
    assert read(tmp_path_factory.mktemp("round"), to_toml(config)) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[sampling]\ntemprature = 1", "sampling.temprature: did you mean temperature?"),
        ("[sampling]\nb_e = 1", "did you mean B_E?"),
        ("[sampeling]\nG = 3", "unknown key sampeling: did you mean sampling?"),
        ("[run]\nqqqqqq = 3", "known keys are name, folder, seed"),
        (
            "[sampling]\ntop_p = 0.9",
            "top_p = 0.9, top_k = 0: E must be sampled with top_p = 1",
        ),
        ("[sampling]\ntop_k = 5", "wrong distribution"),
        ("[measure]\netas = [1e-5, 0.0]", "eta is 0, a positive"),
        ("[measure]\netas = [-1e-5]", "eta is -1e-05, a positive"),
        ("[measure]\netas = [1e-5, 0.00001]", "eta 1e-05 occurs twice"),
        ("[sampling]\ntemperature = 0", "sampling.temperature"),
        ("[measure]\netas = []", "the list is empty"),
        ("[measure]\netas = [inf]", "finite number (found inf)"),
        ("[measure]\netas = [nan]", "finite number (found nan)"),
        ("[sampling]\nB_E = 1", "sampling.B_E: Input should be greater than or equal to 2 (found 1)"),
        ("[policy]\ndtype = 'int8'", "'float64' (found 'int8')"),
        ("[optimizer]\nbetas = [0.9, 1.5]", "less than 1 (found 1.5)"),
        ("[optimizer]\nbetas = [-0.1, 0.9]", "greater than or equal to 0"),
        ("[run]\nname = '..'", "run.name"),
        ("[run]\nname = '.stages'", "run.name"),
        ("[run]\nname = 'a/b'", "run.name"),
        ("[run]\nfolder = ''", "run.folder"),
        ('[policy]\ncheckpoint = "a\\u0000b"', "NUL"),
        ("[policy]\nadapter = '..'", "policy.adapter"),
        ("[policy]\nadapter = ''", "policy.adapter"),
        ("[optimizer]\nstate = ''", "optimizer.state"),
        ("[entropy]\nclip = 0.5", "entropy.clip"),
        ("[run]\nseed = -1\ndevice = 3", "; and 1 more"),
        ("run = 3", "run"),
        ("[[[", "is not TOML"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, text, said) -> None:
    message = refusal(tmp_path, text)
    assert said in message
    assert "c.toml" in message


@pytest.mark.parametrize("override", ["zork", "a=b", "a.b.c=1", "=1", "run.=1", ".x=1", "run.seed", ""])
def test_an_override_of_another_form(tmp_path, override) -> None:
    assert f"--set {override}: expected section.key=value" in refusal(tmp_path, "", override)


def test_an_override_below_what_is_no_section(tmp_path) -> None:
    assert "run is not a section" in refusal(tmp_path, "run = 3", "run.seed=1")


def test_top_p_is_allowed_where_E_is_brought(tmp_path) -> None:
    config = read(tmp_path, "[sampling]\ntop_p = 0.9\n[rollouts]\neval = 'e.parquet'")
    assert config.sampling.top_p == 0.9


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read(tmp_path, content) -> None:
    path = tmp_path / "c.toml"
    if content is not None:
        path.write_bytes(content)
    for place in (path, tmp_path):  # the second: a folder
        with pytest.raises(InputError, match="cannot be read") as caught:
            read_config(place)
        assert str(place) in str(caught.value)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().run.seed = 3


def test_a_named_precision_is_a_dtype(tmp_path) -> None:
    for name, dtype in (("fast", "float32"), ("standard", "float32"), ("reference", "float64")):
        found = read(tmp_path, "", f"policy.precision={name}").policy
        assert (found.precision, found.dtype) == (name, dtype)
        assert read(tmp_path, "", f"policy.precision={name}", f"policy.dtype={dtype}").policy == found
    assert read(tmp_path, "", "policy.dtype=bfloat16").policy.precision is None
    said = refusal(tmp_path, "", "policy.precision=reference", "policy.dtype=float32")
    assert 'precision = "reference" implies dtype = "float64", found "float32": set one' in said
