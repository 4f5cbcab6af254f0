"""Checks of constructor arguments, so that a mistake is named where it is made."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from numbers import Real


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Require one of some strings.

    Args:
        name: The argument's name, for the message.
        value: What was given.
        choices: What is accepted.

    Raises:
        ValueError: If ``value`` is none of ``choices``; the message suggests the nearest.
    """
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise ValueError(
        f'{name} must be one of {", ".join(map(repr, choices))}, got {value!r}.{hint}'
    )


def check_int(name: str, value: object, minimum: int) -> None:
    """Require an integer that is at least ``minimum``.

    Args:
        name: The argument's name, for the message.
        value: What was given.
        minimum: The smallest accepted value.

    Raises:
        TypeError: If ``value`` is not an integer.
        ValueError: If it is smaller than ``minimum``.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f'{name} must be an integer, got {value!r}')
    if value < minimum:
        raise ValueError(f'{name} must be at least {minimum}, got {value}')


def check_rate(name: str, value: object) -> None:
    """Require a probability.

    Args:
        name: The argument's name, for the message.
        value: What was given.

    Raises:
        TypeError: If ``value`` is not a number.
        ValueError: If it lies outside [0, 1].
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f'{name} must be a number in [0, 1], got {value!r}')
    if not 0 <= value <= 1:
        raise ValueError(f'{name} must lie in [0, 1], got {value}')
