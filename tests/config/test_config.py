"""The configuration file: defaults, overrides, the round trip, and every refusal in one line."""

import os
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
    found = read(tmp_path, text)
    assert found.run.folder == str(tmp_path / "runs")  # written in the file, so relative to its folder
    assert found.model_copy(update={"run": Config().run}) == Config()
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
    source=TEXT.filter(lambda text: not text.startswith("~")),  # a user's home
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
    found = read(tmp_path_factory.mktemp("round"), to_toml(config))
    # Whatever looks like a path is that from the current directory, in any folder.
    assert found.run == config.run.model_copy(update={"folder": str(Path.cwd() / "runs")})
    assert found.prompts.source in (source, str(Path.cwd() / os.path.expanduser(source)))
    same = {"run": found.run, "prompts": found.prompts}
    assert found == config.model_copy(update=same)
    assert found.prompts.template == template


def test_every_example_of_the_commented_file_is_valid(tmp_path) -> None:
    lines = commented_config().splitlines()
    section, seen = "", 0
    for line in lines:
        section = line.split("]")[0].removeprefix("[") if line.startswith("[") else section
        key, equals, value = line.removeprefix("# ").partition(" = ")
        model = Config.model_fields[section].annotation if section else None
        field = model.model_fields.get(key) if model and line.startswith("# ") and equals else None
        if field is None:
            continue
        seen += 1
        assert value, f"{section}.{key}"
        found = getattr(getattr(read(tmp_path, f"[{section}]\n{key} = {value}"), section), key)
        assert found is not None
    unset = [f for s in Config.model_fields.values() for f in s.annotation.model_fields.values()]
    assert seen == sum(field.default is None for field in unset)


# Paths: relative to where they are written.

PATHS = """
[run]
folder = "out"
[policy]
checkpoint = "run/checkpoint-8"
base = "models/base"
[optimizer]
state = "run/optimizer.pt"
[prompts]
source = "data.jsonl"
[reward]
function = "rewards.py:score"
[rollouts]
eval = "e.parquet"
update = "u.parquet"
"""


def test_paths_are_relative_to_the_file_they_are_written_in(tmp_path, monkeypatch) -> None:
    place = tmp_path / "configs"
    (place / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (place / "c.toml").write_text(PATHS)
    for file in (Path("configs/c.toml"), place / "c.toml"):
        found, folder = read_config(file), file.parent
        assert found.run.folder == str(folder / "out")
        assert found.policy.checkpoint == str(folder / "run/checkpoint-8")
        assert found.policy.base == str(
            folder / "models/base"
        )  # it would be a hub id, were it not there
        assert found.optimizer.state == str(folder / "run/optimizer.pt")
        assert found.prompts.source == str(folder / "data.jsonl")
        assert found.reward.function == f"{folder / 'rewards.py'}:score"
        assert found.rollouts.eval == str(folder / "e.parquet")
        assert found.rollouts.update == str(folder / "u.parquet")
    # What a run writes is the same from anywhere.
    monkeypatch.chdir(place)
    written = to_toml(read_config(Path("c.toml")))
    (tmp_path / "elsewhere").mkdir()
    again = read(tmp_path / "elsewhere", written)
    absolute = read_config(place / "c.toml")
    assert again == absolute


def test_what_is_set_or_is_the_default_is_relative_to_the_current_directory(tmp_path) -> None:
    found = read(tmp_path, "[prompts]\nsource = 'a.jsonl'", "prompts.source=b.jsonl")
    assert (found.prompts.source, found.run.folder) == ("b.jsonl", "runs")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("prompts", "source", "toy"),
        ("prompts", "source", "openai/gsm8k:main"),
        ("prompts", "source", "imdb"),
        ("policy", "checkpoint", "toy"),
        ("policy", "base", "Qwen/Qwen2.5-0.5B"),
        ("policy", "base", "gpt2"),
        ("reward", "function", "numeric"),
        ("reward", "function", "package.module:score"),
    ],
)
def test_what_is_no_path_stays_as_it_is(tmp_path, section, key, value) -> None:
    found = read(tmp_path, f"[{section}]\n{key} = '{value}'")
    assert getattr(getattr(found, section), key) == value


@pytest.mark.parametrize(
    ("section", "key", "value", "there"),
    [
        ("prompts", "source", "data/p.jsonl", "data/p.jsonl"),
        ("prompts", "source", "data", "data"),
        ("policy", "checkpoint", "data", "data"),
        ("reward", "function", "data/r.py:f", "data/r.py"),
        ("optimizer", "state", "data/p.jsonl", "data/p.jsonl"),
    ],
)
def test_a_path_from_the_current_directory_is_pointed_out(
    tmp_path, monkeypatch, section, key, value, there
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "p.jsonl").touch()
    (tmp_path / "data" / "r.py").touch()
    (tmp_path / "configs").mkdir()
    said = refusal(tmp_path / "configs", f"[{section}]\n{key} = '{value}'")
    assert f"{section}.{key} = {there}: a path in a configuration is relative to its folder" in said
    assert f'set it to "../{there}"' in said
    corrected = value.replace(there, f"../{there}")
    read(tmp_path / "configs", f"[{section}]\n{key} = '{corrected}'")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = read(tmp_path, PATHS.replace(' = "', ' = "~/'))
    home = str(tmp_path / "home")
    assert found.run.folder == f"{home}/out"
    assert found.policy.base == f"{home}/models/base"
    assert found.reward.function == f"{home}/rewards.py:score"


def test_a_byte_order_mark_is_no_error(tmp_path) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf[run]\nseed = 4\n")
    assert read_config(tmp_path / "c.toml").run.seed == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[sampling]\ntemprature = 1", "sampling.temprature: did you mean temperature?"),
        ("[sampling]\nb_e = 1", "did you mean B_E?"),
        ("[sampeling]\nG = 3", "unknown key sampeling: did you mean sampling?"),
        ("[run]\nqqqqqq = 3", "known keys are name, folder, seed"),
        ("B_E = 3", "unknown key B_E: did you mean sampling.B_E?"),
        ("[sampling]\nmax_grad_norm = 1.0", "did you mean optimizer.max_grad_norm?"),
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
        (
            "[policy]\ndevice_map = 'atuo'",
            "policy.device_map: \"auto\", or a table of modules and GPUs, is expected (found 'atuo')",
        ),
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('url = "http://me:hunter2@host"', "has a user or a password: name an environment variable"),
        ('url = "http://host/?key=hunter2"', "has a query or a fragment"),
        ('api_key_env = "sk-hunter2"', "server.api_key_env: String should match pattern"),
        ('url = "http://host:99999/hunter2"', "Port out of range"),
        ('url = "http://host/\\u001bhunter2"', "a character that cannot be printed: remove it"),
        ('url = "http://a host"', "has a space"),
    ],
)
def test_an_address_or_a_key_in_the_wrong_place_is_not_repeated(tmp_path, text, said) -> None:
    message = refusal(tmp_path, f"[server]\n{text}")
    assert said in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "override", ["zork", "a=b", "a.b.c.d=1", "=1", "run.=1", ".x=1", "run.seed", ""]
)
def test_an_override_of_another_form(tmp_path, override) -> None:
    assert f"--set {override}: expected section.key=value" in refusal(tmp_path, "", override)


def test_an_override_below_what_is_no_section(tmp_path) -> None:
    assert "run is not a table" in refusal(tmp_path, "run = 3", "run.seed=1")


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


def test_a_name_that_is_too_long_for_a_file_is_a_name(tmp_path) -> None:
    """256 bytes and more, of which the file system raises an error; it may be a hub id."""
    assert read(tmp_path, f'[prompts]\nsource = "{"a" * 300}"').prompts.source == "a" * 300
