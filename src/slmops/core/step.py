"""Steps and their keys: what decides whether a result may be reused.

A step's key is the SHA-256 of everything that can change its result: method and method version, parameters, the digests
of its inputs, the seed, and the locked environment (package versions, threads, machine) where the method says that it
matters. `explain` compares two sets of key parts in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slmops.core.digest import digest_json
from slmops.core.method import Declaration

KeyParts = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One planned piece of work.

    Attributes:
        id: unique in a plan; what users see and name.
        method: `room.file`.
        params: the method's parameters as JSON values.
        inputs: input name to the id of the step that makes it.
        sources: input name to a path outside the store (a data file or a model folder of the user).
        seed: seeds the method.
        threads: CPU threads the step may use; 0 means all of the machine's.
        about: a few words for people.
    """

    id: str
    method: str
    params: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    threads: int = 0
    about: str = ""


def _without(params: Mapping[str, Any], neutral: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        if path not in neutral:
            kept[name] = _without(value, neutral, f"{path}.") if isinstance(value, dict) else value
    return kept


def key_parts(
    step: Step, declaration: Declaration, digests: Mapping[str, str], environment: Mapping[str, str]
) -> KeyParts:
    """Everything that the step's key is made of, as JSON.

    Args:
        digests: input or source name to content digest; must name every input and source of the step.
        environment: versions and machine facts that this method says can change its result.
    """
    missing = (set(step.inputs) | set(step.sources)) - set(digests)
    if missing:
        raise ValueError(f"step {step.id}: no digest for {', '.join(sorted(missing))}")
    return {
        "method": declaration.name,
        "version": declaration.version,
        "seed": step.seed,
        "params": _without(step.params, declaration.neutral),
        "inputs": dict(digests),
        "environment": dict(environment),
    }


def key_of(parts: KeyParts) -> str:
    """64 hex digits."""
    return digest_json(parts).removeprefix("sha256:")


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        out: dict[str, Any] = {}
        for name, inner in value.items():
            out.update(_flat(inner, f"{path}.{name}" if path else str(name)))
        return out
    return {path: value}


def explain(old: KeyParts | None, new: KeyParts) -> list[str]:
    """What changed between two sets of key parts, one line each; empty if nothing did."""
    if old is None:
        return ["it has not run before"]
    before, after = _flat(old), _flat(new)
    lines: list[str] = []
    for path in sorted(before.keys() | after.keys()):
        was, now = before.get(path), after.get(path)
        if was == now:
            continue
        area, _, rest = path.partition(".")
        if area == "inputs":
            if was is None or now is None:
                lines.append(f"input {rest} was {'added' if was is None else 'removed'}")
            else:
                lines.append(f"input {rest} has other content ({was[7:15]} → {now[7:15]})")
        elif area == "params":
            lines.append(f"{rest} changed: {_short(was)} → {_short(now)}")
        elif area == "environment":
            lines.append(f"environment: {rest} changed: {was} → {now}")
        elif area == "version":
            lines.append(f"the method {new['method']} itself changed: version {was} → {now}")
        else:
            lines.append(f"{path} changed: {_short(was)} → {_short(now)}")
    return lines


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "…"
