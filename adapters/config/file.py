"""The configuration as a file: TOML, `--set` overrides, and the commented file written by `init`."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import ValidationError

from funcprobe.types import InputError

from . import toml
from .paths import resolve
from .schema import Config, Section

_WITH_SECRETS = {"server.url", "server.api_key_env"}  # where a password or key may be by mistake


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """TOML file and `section.key=value` overrides -> Config; InputError, one line, if invalid.

    Paths in the file are relative to its folder, those of the overrides to the current directory.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path} cannot be read ({reason}): give the path of a TOML file; funcprobe init writes one"
        ) from error
    try:
        tables = toml.parse(text)
    except ValueError as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    tables = resolve(tables, path.parent, written_in=str(path))
    for override in overrides:
        _set(tables, override)
    try:
        return Config.model_validate(tables)
    except ValidationError as error:
        where = f"{path} with --set" if overrides else path
        raise InputError(f"{where}: {_one_line(error)}") from error


def commented_config() -> str:
    """A TOML file with every key at its default, and its description; unset keys are commented out."""
    document = tomlkit.document()
    for name, section in Config.model_fields.items():
        model = section.annotation
        assert isinstance(model, type) and issubclass(model, Section)  # noqa: PT018  for the type checker
        table = tomlkit.table()
        table.comment((model.__doc__ or "").strip().splitlines()[0])
        for key, field in model.model_fields.items():
            table.add(tomlkit.comment(field.description or ""))
            if field.default is None:
                example = [tomlkit.item(value).as_string() for value in field.examples or ()]
                table.add(tomlkit.comment(" = ".join([key, *example[:1]])))
            else:
                table.add(key, _item(field.default))
        document.add(name, table)
    return tomlkit.dumps(document)


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML, valid in any folder; keys that are unset are left out."""
    tables = config.model_dump(exclude_none=True, mode="json")
    return tomlkit.dumps(resolve(tables, Path.cwd(), written_in="the configuration"))


def _item(default: Any) -> Any:
    """As tomlkit takes it; a table, always empty by default, stays on its line."""
    if isinstance(default, dict):
        return tomlkit.inline_table()
    return list(default) if isinstance(default, tuple) else default


def _set(tables: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) not in (2, 3) or not all(parts):
        raise InputError(
            f'--set {override}: expected section.key=value, such as "sampling.B_E=64", or of a table '
            '"objective.settings.beta=0.04"'
        )
    try:
        parsed = toml.parse(f"value = {text}")
    except ValueError:
        parsed = {}
    # An unquoted word is a string, so that shells need no nested quotes; so is text of several lines.
    value = parsed["value"] if len(parsed) == 1 else text.strip()
    table = tables
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {override}: {part} is not a table")
    table[parts[-1]] = value


def _one_line(error: ValidationError) -> str:
    first, *rest = error.errors()
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        message = f"unknown key {where}{_nearest(first['loc'])}"
    else:
        reason = first["msg"].removeprefix("Value error, ").replace("\n", " ")
        if first["type"] == "tuple_type":
            reason = "a list is expected, such as [1e-5, 1e-4]"
        found = first["input"]
        show = isinstance(found, str | int | float | bool) and where not in _WITH_SECRETS
        shown = f" (found {found!r})" if show else ""
        message = f"{where}: {reason}{shown}" if where else reason
    return message + (f"; and {len(rest)} more" if rest else "")


def _nearest(loc: tuple[int | str, ...]) -> str:
    section = Config.model_fields.get(str(loc[0])) if len(loc) > 1 else None
    model = section.annotation if section else Config
    known = list(getattr(model, "model_fields", {}))
    folded = {key.casefold(): key for key in known}
    close = difflib.get_close_matches(str(loc[-1]).casefold(), folded, n=1, cutoff=0.5)
    if close:
        return f": did you mean {folded[close[0]]}?"
    for name, other in Config.model_fields.items():
        if loc[-1] in getattr(other.annotation, "model_fields", {}):
            return f": did you mean {name}.{loc[-1]}?"
    return f": known keys are {', '.join(known)}"
