"""Sections of settings files, and what somebody who wrote one wrongly is told."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from .errors import ConfigError


class Section(BaseModel):
    """Keys and values; frozen, and no other keys than those declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


_SIZE = re.compile(r"auto|\d*\.?\d+\s*[a-z]*", re.IGNORECASE | re.ASCII)


def _size(value: object, read: ValidatorFunctionWrapHandler) -> Any:
    return _read_size(value, read, '"64GiB", 0 or "auto"')


def _bytes(value: object, read: ValidatorFunctionWrapHandler) -> Any:
    return _read_size(value, read, '"64MiB" or a number of bytes')


def _read_size(value: object, read: ValidatorFunctionWrapHandler, wanted: str) -> Any:
    """Pydantic would take True for one byte, and "5%" for five."""
    no_size = ValueError(f"{value!r} is no size; give {wanted}")
    if isinstance(value, bool) or (isinstance(value, str) and not _SIZE.fullmatch(value.strip())):
        raise no_size
    try:
        return read(value)
    except ValidationError as error:
        if error.errors()[0]["type"] in ("greater_than_equal", "less_than"):
            raise
        raise no_size from error


Size = Annotated[Literal["auto"] | ByteSize, WrapValidator(_size)]
Bytes = Annotated[ByteSize, WrapValidator(_bytes)]


def switched(value: object) -> object:
    """`true` and `false` for a section that is there or not."""
    return {"enabled": value} if isinstance(value, bool) else value


def explain(error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """The first mistake, in the words of who made it; a misspelt key before what is missed for it.

    Args:
        model: that was to be read.
    """
    found = error.errors()
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    key = _key(first["loc"])
    match first["type"]:
        case "extra_forbidden":
            return ConfigError(key, _unknown(key, keys_of(model)))
        case "missing":
            return ConfigError(key, "it is missing; give it")
        case "tuple_type":
            return ConfigError(key, f"{first['input']!r} is no list; give one, in brackets")
        case "model_type":
            inside = [name[len(key) + 1 :] for name in keys_of(model) if name.startswith(f"{key}.")]
            return ConfigError(key, f"{first['input']!r} is no mapping of {', '.join(inside)}")
        case "value_error":  # of a validator of ours, which says what was given and what is wanted
            return ConfigError(key, str(first["ctx"]["error"]))
    return ConfigError(key, f"{first['msg']} (given: {first['input']!r})")


def keys_of(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All keys that may be written, as in ``peers[].address``."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for section, brackets in _sections(field.annotation):
            keys += keys_of(section, f"{prefix}{name}{brackets}.")
    return keys


def _sections(annotation: object, brackets: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """Sections in a field's type: itself, or one or none, or any number."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, brackets
    origin_is_tuple = getattr(annotation, "__origin__", None) is tuple
    for inner in get_args(annotation):
        yield from _sections(inner, "[]" if origin_is_tuple else brackets)


def _key(where: tuple[int | str, ...]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return "".join(parts).removeprefix(".")


def _unknown(key: str, valid: list[str]) -> str:
    general = re.sub(r"\[\d+\]", "[]", key.lower())
    near = difflib.get_close_matches(general, valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(valid)}"
    return f"there is no such key; {hint}"
