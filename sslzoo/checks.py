"""What input must satisfy, said in one line that names the fix. Importable without torch."""

from __future__ import annotations

from difflib import get_close_matches


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a ``value`` of ``key`` that is not among ``allowed``."""
    require(value in allowed, f"{key} must be one of {', '.join(allowed)}; got {value!r}")


def closest(name: str, known: list[str]) -> str:
    """``'; did you mean X?'``, or nothing where no known name is near."""
    match = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""
