"""Checks of constructor arguments, with errors that name the argument."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from numbers import Real


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Require one of some strings.

    Args:
        name: The argument's name, for the message.
        value: The given value.
        choices: The accepted strings.

    Raises:
        ValueError: If ``value`` is not among ``choices``. The message suggests a similar one.
    """
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    raise ValueError(f'{name} must be one of {", ".join(map(repr, choices))}, got {value!r}.{hint}')


def check_int(name: str, value: object, minimum: int) -> None:
    """Require an integer that is at least ``minimum``.

    Args:
        name: The argument's name, for the message.
        value: The given value.
        minimum: The smallest accepted value.

    Raises:
        TypeError: If ``value`` is not an integer.
        ValueError: If it is smaller than ``minimum``.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f'{name} must be an integer, got {value!r}')
    if value < minimum:
        raise ValueError(f'{name} must be at least {minimum}, got {value}')


def check_number(name: str, value: object) -> None:
    """Require a real number.

    Args:
        name: The argument's name, for the message.
        value: The given value.

    Raises:
        TypeError: If ``value`` is not a number.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f'{name} must be a number, got {value!r}')


def hidden_channels(name: str, ratio: object, embed_dims: int) -> int:
    """Return the hidden channels of a feed-forward network, at least one.

    Args:
        name: The ratio's name, for the message.
        ratio: Hidden channels per channel.
        embed_dims: Channels of a token.

    Raises:
        TypeError: If ``ratio`` is not a number.
        ValueError: If it leaves no hidden channel.
    """
    check_number(name, ratio)
    channels = int(ratio * embed_dims)
    if channels < 1:
        raise ValueError(
            f'{name} must leave at least one hidden channel of embed_dims={embed_dims}, '
            f'got {ratio!r}'
        )
    return channels


def check_rate(name: str, value: object) -> None:
    """Require a probability.

    Args:
        name: The argument's name, for the message.
        value: The given value.

    Raises:
        TypeError: If ``value`` is not a number.
        ValueError: If it lies outside [0, 1].
    """
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f'{name} must lie in [0, 1], got {value}')


def check_heads(embed_dims: int, num_heads: object) -> None:
    """Require a number of heads that divides the channels.

    Args:
        embed_dims: Channels of a token.
        num_heads: Number of heads.

    Raises:
        TypeError: If ``num_heads`` is not an integer.
        ValueError: If it is smaller than 1 or does not divide ``embed_dims``.
    """
    check_int('num_heads', num_heads, 1)
    if embed_dims % num_heads:
        raise ValueError(f'num_heads must divide embed_dims={embed_dims}, got {num_heads}')


def check_channel_gamma(channel_gamma: object, embed_dims: int) -> None:
    """Require a fraction with which each group of a token shift has at least one channel.

    Args:
        channel_gamma: Fraction of the channels in each of the (up to four) groups.
        embed_dims: Channels of a token.

    Raises:
        TypeError: If ``channel_gamma`` is not a number.
        ValueError: If it lies outside (0, 1/4], or ``embed_dims`` is too small for it.
    """
    check_number('channel_gamma', channel_gamma)
    if not 0 < channel_gamma <= 1 / 4:
        raise ValueError(f'channel_gamma must lie in (0, 1/4], got {channel_gamma}')
    if int(embed_dims * channel_gamma) < 1:
        raise ValueError(
            f'embed_dims={embed_dims} is too small for a token shift with '
            f'channel_gamma={channel_gamma}: a group of channels would be empty. It must be at '
            f'least 1 / channel_gamma = {1 / channel_gamma:g}'
        )
