"""A checkpoint's own files: configurations of adapter and base, weights, tokenizer, template."""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from funcprobe.adapters.checkpoint.adapter import open_adapter
from funcprobe.adapters.checkpoint.base import load_tokenizer
from funcprobe.adapters.checkpoint.lora import read_weights
from funcprobe.adapters.checkpoint.skeleton import skeleton
from funcprobe.adapters.config.schema import PolicyConfig
from funcprobe.adapters.rollouts.gradients import load_gradient
from funcprobe.adapters.sampling.encoding import encode_prompts
from funcprobe.adapters.sampling.prompts import Example, render_prompts
from support.checkpoints import Checkpoint, make_checkpoint

from .codecs import json_text, safetensors, tensor, torch_file
from .target import Target, pair, written


@cache
def _made() -> Checkpoint:
    return make_checkpoint(Path(tempfile.mkdtemp(prefix="fuzz-checkpoint-")))


def _copied(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, whose own files stay; those that a target changes it writes."""
    made = _made()
    if not (folder / "adapter").is_dir():
        shutil.copytree(made.adapter, folder / "adapter")
        shutil.copytree(made.base, folder / "base")
        text = (folder / "adapter/adapter_config.json").read_text()
        text = json.dumps(json.loads(text) | {"base_model_name_or_path": str(folder / "base")})
        (folder / "adapter/adapter_config.json").write_text(text)
    return made._replace(adapter=folder / "adapter", base=folder / "base")


def _with(place: str, read: Any) -> Any:
    """read(checkpoint) with a file of it replaced by the data, and put back."""

    def changed(data: bytes, folder: Path) -> None:
        found = _copied(folder)
        path = folder / place
        before = path.read_bytes() if path.is_file() else None
        path.write_bytes(data)
        try:
            read(found)
        finally:
            path.unlink()
            if before is not None:
                path.write_bytes(before)

    return changed


def _adapter(found: Checkpoint) -> None:
    config = PolicyConfig(checkpoint=str(found.adapter), base=str(found.base))
    open_adapter(config)
    skeleton(found.adapter, str(found.base), "default")


def _base(found: Checkpoint) -> None:
    skeleton(found.adapter, str(found.base), "default")


def _weights(found: Checkpoint) -> None:
    read_weights(str(found.adapter), None)


def _bin(found: Checkpoint) -> None:
    safe = found.adapter / "adapter_model.safetensors"
    hidden = safe.rename(safe.with_suffix(".hidden"))
    try:
        read_weights(str(found.adapter), None)
    finally:
        hidden.rename(safe)


def _tokenizer(found: Checkpoint) -> None:
    read = load_tokenizer([str(found.adapter)], version=None, trust_remote_code=False)
    given = [Example("3+4=", {}), Example("5+4=", {})]
    prompts, _ = render_prompts(given, read)
    encode_prompts(prompts, read)


def _gradient(data: bytes, folder: Path) -> None:
    like = load_file(_made().adapter / "adapter_model.safetensors")
    load_gradient(written(folder, "step-000003.safetensors", data), like)


def _header(names: dict[str, Any], *prefixes: str) -> dict[str, Any]:
    metadata = {"format": "funcprobe gradients 1", "step": "3", "moment_norm": "0.5"}
    found: dict[str, Any] = {"__metadata__": metadata | {"max_grad_norm": "none"}}
    at = 0
    for prefix in prefixes:
        for name, value in names.items():
            size = value.numel() * 4
            span = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [at, at + size]}
            found[prefix + name] = span
            at += size
    return found


def _seed(place: str) -> Any:
    made = _made()
    return json.loads((made.adapter.parent / place).read_text())


def targets() -> list[Target]:
    made = _made()
    adapter = made.adapter.name
    weights = load_file(made.adapter / "adapter_model.safetensors")
    configuration = _seed(f"{adapter}/adapter_config.json")
    patterns = {"rank_pattern": {".*q_proj": 2}, "target_modules": r".*\.(q|v)_proj"}
    templates = (
        b"{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}",
        b"{% set n = namespace(x='3') %}{% for i in '4' %}{% set n.x = n.x ~ i %}{% endfor %}{{ n.x }}",
        b"{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ 2 * 3 }}",
    )
    return [
        *pair(
            "adapter_config",
            _with("adapter/adapter_config.json", _adapter),
            [configuration, configuration | patterns],
            json_text,
        ),
        *pair("config.json", _with("base/config.json", _base), [_seed("base/config.json")], json_text),
        *pair(
            "safetensors",
            _with("adapter/adapter_model.safetensors", _weights),
            [_header(weights, "")],
            safetensors,
        ),
        *pair(
            "adapter_model.bin",
            _with("adapter/adapter_model.bin", _bin),
            [{name: tensor(tuple(value.shape)) for name, value in weights.items()}],
            torch_file,
        ),
        *pair("gradients", _gradient, [_header(weights, "gradient/", "param/")], safetensors),
        *pair(
            "tokenizer.json",
            _with("adapter/tokenizer.json", _tokenizer),
            [_seed(f"{adapter}/tokenizer.json")],
            json_text,
        ),
        *pair(
            "tokenizer_config",
            _with("adapter/tokenizer_config.json", _tokenizer),
            [_seed(f"{adapter}/tokenizer_config.json")],
            json_text,
        ),
        Target(
            "chat_template",
            _with("adapter/chat_template.jinja", _tokenizer),
            lambda: templates,
            memory=1 << 30,
        ),
    ]
