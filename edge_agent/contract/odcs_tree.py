"""What every level of an ODCS document has: lists, custom properties, texts, numbers, truths. All raise ContractError for another shape."""

from __future__ import annotations

from typing import Any

from edge_agent.contract.errors import ContractError


def items(tree: dict[Any, Any], name: str) -> list[Any]:
    """The list called `name`; empty if it is not there."""
    found = tree.get(name) or []
    if not isinstance(found, list):
        raise ContractError(f"{name} {found!r} is not a list")
    return found


def custom_properties(tree: dict[Any, Any]) -> dict[str, Any]:
    """The customProperties of an element, by name."""
    return {str(p.get("property")): p.get("value") for p in items(tree, "customProperties") if isinstance(p, dict)}


def string(tree: dict[Any, Any], name: str) -> str:
    """The text called `name`; empty if it is not there, or there without a value."""
    value = tree.get(name)
    return "" if value is None else str(value)


def truth(tree: dict[Any, Any], name: str) -> bool:
    """The truth called `name`; false if it is not there. Of a text nobody knows what it means: "false" would count as true."""
    value = tree.get(name) or False
    if not isinstance(value, bool):
        raise ContractError(f"{name} {value!r} is not true or false; write it without quotes")
    return value


def number(tree: dict[Any, Any], name: str, default: float) -> float:
    """The number called `name`."""
    value = tree.get(name, default)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ContractError(f"{name} {value!r} is not a number") from None
