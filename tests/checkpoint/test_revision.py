"""The revision of the base: a branch, tag or commit of a hub repository, here in a cache of its own."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from funcprobe.adapters.checkpoint.model import load_policy
from funcprobe.adapters.checkpoint.skeleton import skeleton
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.types import InputError
from support.checkpoints import edit_json

HUB = "acme/tiny"
COMMITS = {"main": "a" * 40, "step-7": "b" * 40}


@pytest.fixture
def hub(damaged, tmp_path, monkeypatch, offline):
    """The base as a repository with two revisions: at step-7 the last norm is twice as large."""
    repository = tmp_path / "hub" / f"models--{HUB.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    for ref, commit in COMMITS.items():
        folder = repository / "snapshots" / commit
        shutil.copytree(damaged.base, folder)
        (repository / "refs" / ref).write_text(commit)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for place in (
        "huggingface_hub.constants.HF_HUB_CACHE",
        "transformers.utils.hub.constants.HF_HUB_CACHE",
    ):
        monkeypatch.setattr(place, str(tmp_path / "hub"))
    edit_json(damaged.adapter / "adapter_config.json", base_model_name_or_path=HUB, revision="step-7")
    for path in damaged.adapter.glob("token*"):
        path.unlink()  # so that the tokenizer, too, is the base's at its revision
    return damaged


def load(checkpoint, **given):
    config = PolicyConfig(checkpoint=str(checkpoint.adapter), **given)
    policy = load_policy(config, torch.device("cpu"))
    norm = dict(policy.model.named_parameters())["base_model.model.model.norm.weight"]
    return policy, float(norm.detach().mean())


def test_the_revision_of_the_adapters_base_is_loaded(hub) -> None:
    policy, norm = load(hub)
    assert norm == 2.0
    assert (policy.base, policy.revision, policy.commit) == (HUB, "step-7", COMMITS["step-7"])
    assert f"base {HUB} at revision step-7: " in policy.lines[0]
    edit_json(hub.adapter / "adapter_config.json", revision=None)
    policy, norm = load(hub)
    assert norm == 1.0
    assert (policy.revision, policy.commit) == (None, COMMITS["main"])
    assert skeleton(hub.adapter, None, "default").base == HUB


def test_the_tokenizer_is_of_that_revision(hub, tmp_path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for path in (tmp_path / "hub").rglob(f"{COMMITS['main']}/{name}"):
            path.unlink()
    assert len(load(hub)[0].tokenizer) == 14
    with pytest.raises(InputError, match="tokenizer"):
        load(hub, revision="main")


def test_policy_revision_replaces_the_adapters(hub) -> None:
    policy, norm = load(hub, revision="main")
    assert norm == 1.0
    assert policy.revision == "main"
    assert any("was saved with revision step-7 of its base" in line for line in policy.lines)
    edit_json(hub.adapter / "adapter_config.json", revision=None)
    assert load(hub, revision=COMMITS["step-7"])[1] == 2.0


def test_the_adapters_own_base_set_again_keeps_its_revision(hub) -> None:
    assert load(hub, base=HUB)[1] == 2.0


def test_another_base_does_not_get_the_adapters_revision(hub, tmp_path) -> None:
    other = tmp_path / "hub" / "models--acme--other"
    shutil.copytree(tmp_path / "hub" / "models--acme--tiny", other)
    policy, norm = load(hub, base="acme/other")
    assert norm == 1.0
    assert policy.revision is None
    note = f"note: the adapter was saved with another base, {HUB} at revision step-7"
    assert note in policy.lines
    assert load(hub, base="acme/other", revision="step-7")[1] == 2.0


def test_a_folder_has_no_revisions(hub) -> None:
    policy, norm = load(hub, base=str(hub.base))
    assert norm == 1.0
    assert policy.revision is None
    edit_json(hub.adapter / "adapter_config.json", base_model_name_or_path=str(hub.base))
    policy, norm = load(hub)
    assert norm == 1.0
    assert any("revision step-7 in adapter_config.json is ignored" in line for line in policy.lines)
    with pytest.raises(InputError, match=r"policy.revision = main, but the base is the folder"):
        load(hub, revision="main")


def test_a_revision_that_does_not_exist_is_named(hub) -> None:
    with pytest.raises(InputError, match=f"from {HUB} at revision nowhere .*set policy.base"):
        load(hub, revision="nowhere")


@pytest.mark.slow
def test_the_manifest_records_it(hub, probe, tmp_path) -> None:
    probe("one", of=hub)
    found = json.loads((tmp_path / "runs" / "one" / "manifest.json").read_text())["inputs"]["policy"]
    assert found["revision"] == "step-7"
    assert found["base"] == f"{HUB} at {COMMITS['step-7']}"
