"""What msgspec found wrong with data from outside, as a sentence that names the field and says what it must be.

Not responsible for raising anything.
"""

import re

_KINDS = {
    "int": "a whole number", "float": "a number", "str": "a string", "bool": "true or false", "array": "a list",
    "object": "an object", "null": "null",
}  # fmt: skip
_RELATIONS = {">=": "at least", ">": "more than", "<=": "at most", "<": "less than"}

_WHERE = re.compile(r" - at (`key` in )?`\$(.*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_KIND = re.compile(r"Expected `([\w |]+)`, got `(\w+)`")
_RANGE = re.compile(r"Expected `\w+` (>=|>|<=|<) (\S+)")


def sentence(error: Exception) -> tuple[str, str | None]:
    """A sentence for msgspec's ValidationError, and the field it is about, like `stop[1]`."""
    said = str(error)
    found = _WHERE.search(said)
    field = found[2].removeprefix(".").replace("[...]", "") if found else ""
    what = said[: found.start()] if found else said
    if missing := _MISSING.match(what):
        name = f"{field}.{missing[1]}" if field else missing[1]
        return f"'{name}' is required", name
    if unknown := _UNKNOWN.match(what):
        return f"'{unknown[1]}' is not known{f' in {field!r}' if field else ''}", field or unknown[1]
    of = ("each key of " if found and found[1] else "each value of " if found and "[...]" in found[2] else "") + (
        f"'{field}'" if field else "this"
    )
    return f"{of} {_must(what)}", field or None


def _must(what: str) -> str:
    if kind := _KIND.match(what):
        return f"must be {_either(kind[1])}, not {_KINDS.get(kind[2], kind[2])}"
    if limit := _RANGE.match(what):
        return f"must be {_RELATIONS[limit[1]]} {limit[2].removesuffix('.0')}"
    if what.startswith("Invalid enum value "):
        return f"cannot be {what.removeprefix('Invalid enum value ')}"
    return f"is wrong: {what}"


def _either(kinds: str) -> str:
    names = [name for name in kinds.split(" | ") if name != "null"]
    if "float" in names:
        names = [name for name in names if name != "int"]
    return " or ".join(_KINDS.get(name, name) for name in names) or "null"
