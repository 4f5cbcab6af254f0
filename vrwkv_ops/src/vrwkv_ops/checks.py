"""Argument checks that all implementations share."""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_KEY = 1e8  # Bi-WKV takes larger keys as this; a key of -inf hides its token
MAX_HEAD = 64  # channels of a head of Bi-WKV6
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DTYPE_NAMES = ', '.join(str(dtype).removeprefix('torch.') for dtype in FLOAT_DTYPES)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_float_tensor(op: str, name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: '{name}' must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: '{name}' has dtype {value.dtype}; accepted are {_DTYPE_NAMES}. "
            f'Convert it first, e.g. {name}.float()'
        )


def _check_device(op: str, tensors: dict[str, Tensor], like: str) -> None:
    for name, value in tensors.items():
        if value.device != tensors[like].device:
            raise ValueError(
                f"{op}: '{name}' is on {value.device} but '{like}' is on {tensors[like].device}; "
                'move all arguments to one device'
            )


def _autocast_unifies(k: Tensor, v: Tensor) -> bool:
    """Return whether autocast converts ``k`` and ``v`` to one dtype (float64 is not converted)."""
    if torch.float64 in (k.dtype, v.dtype):
        return False
    kind = k.device.type
    # PyTorch cannot say whether it is enabled for a device that has none, such as meta.
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def check_bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """Check the arguments of :func:`vrwkv_ops.bi_wkv`.

    Raises:
        TypeError: If an argument is not a tensor, has a dtype that is not accepted, or if ``k`` and
            ``v`` differ in dtype, or if ``causal`` is not a bool.
        ValueError: If a rank, shape or device does not fit.
    """
    op = 'bi_wkv'
    tensors = dict(w=w, u=u, k=k, v=v)
    for name, value in tensors.items():
        _check_float_tensor(op, name, value)
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: 'causal' must be a bool, got {type(causal).__name__}")
    if k.dim() != 3:
        raise ValueError(f"{op}: 'k' must have shape (B, T, C), got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(
            f"{op}: 'v' must have the shape of 'k', {tuple(k.shape)}, got {tuple(v.shape)}"
        )
    tokens, channels = k.shape[1], k.shape[2]
    if tokens < 1 or channels < 1:
        raise ValueError(
            f"{op}: 'k' of shape (B, T, C) needs T >= 1 and C >= 1, got {tuple(k.shape)}"
        )
    for name, value in (('w', w), ('u', u)):
        if value.dim() != 1 or value.shape[0] != channels:
            raise ValueError(
                f"{op}: '{name}' must have shape (C,) = ({channels},) to match 'k' of shape "
                f'{tuple(k.shape)}, got {tuple(value.shape)}'
            )
    _check_device(op, tensors, 'k')
    if v.dtype != k.dtype and not _autocast_unifies(k, v):
        raise TypeError(
            f"{op}: 'k' and 'v' must have one dtype, got {k.dtype} and {v.dtype}; convert one"
        )


def check_bi_wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, causal: bool) -> None:
    """Check the arguments of :func:`vrwkv_ops.bi_wkv6`.

    Raises:
        TypeError: If an argument is not a tensor, has a dtype that is not accepted, or if ``r``,
            ``k`` and ``v`` differ in dtype, or if ``causal`` is not a bool.
        ValueError: If a rank, shape, head size or device does not fit.
    """
    op = 'bi_wkv6'
    tensors = dict(r=r, k=k, v=v, w=w, u=u)
    for name, value in tensors.items():
        _check_float_tensor(op, name, value)
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: 'causal' must be a bool, got {type(causal).__name__}")
    if r.dim() != 3:
        raise ValueError(f"{op}: 'r' must have shape (B, T, C), got {tuple(r.shape)}")
    for name in 'kvw':
        if tensors[name].shape != r.shape:
            raise ValueError(
                f"{op}: '{name}' must have the shape of 'r', {tuple(r.shape)}, got "
                f'{tuple(tensors[name].shape)}'
            )
    tokens, channels = r.shape[1:]
    if tokens < 1 or channels < 1:
        raise ValueError(
            f"{op}: 'r' of shape (B, T, C) needs T >= 1 and C >= 1, got {tuple(r.shape)}"
        )
    if u.dim() != 2 or u.shape[0] < 1 or u.shape[0] * u.shape[1] != channels:
        raise ValueError(
            f"{op}: 'u' must have shape (heads, channels of a head) with {channels} channels in "
            f"all, to match 'r' of shape {tuple(r.shape)}, got {tuple(u.shape)}"
        )
    if u.shape[1] > MAX_HEAD or u.shape[1] % 8:
        raise ValueError(
            f'{op}: heads must have at most {MAX_HEAD} channels, a multiple of 8, got '
            f"{u.shape[1]} ('u' of shape {tuple(u.shape)})"
        )
    _check_device(op, tensors, 'r')
    if len({r.dtype, k.dtype, v.dtype}) > 1 and not (
        _autocast_unifies(r, k) and _autocast_unifies(k, v)
    ):
        raise TypeError(
            f"{op}: 'r', 'k' and 'v' must have one dtype, got {r.dtype}, {k.dtype} and {v.dtype}; "
            'convert them'
        )


def check_pointwise(op: str, **tensors: Tensor) -> None:
    """Check that the arguments of an element-wise operator have one shape and device.

    Raises:
        TypeError: If one is not a tensor or has a dtype that is not accepted.
        ValueError: If shapes or devices differ.
    """
    for name, value in tensors.items():
        _check_float_tensor(op, name, value)
    (first, like), *others = tensors.items()
    for name, value in others:
        if value.shape != like.shape:
            raise ValueError(
                f"{op}: '{name}' must have the shape of '{first}', {tuple(like.shape)}, got "
                f'{tuple(value.shape)}'
            )
    _check_device(op, tensors, first)


MAX_LEVELS = 16


def check_ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> None:
    """Check the arguments of :func:`vrwkv_ops.ms_deform_attn`.

    Raises:
        TypeError: If an argument has a type or dtype that is not accepted.
        ValueError: If a shape, a value or a device does not fit.
    """
    op = 'ms_deform_attn'
    tensors = dict(
        value=value, sampling_locations=sampling_locations, attention_weights=attention_weights
    )
    for name, tensor in tensors.items():
        _check_float_tensor(op, name, tensor)
    _check_device(op, tensors, 'value')
    is_sequence = isinstance(spatial_shapes, (tuple, list))
    if not is_sequence or not all(isinstance(shape, (tuple, list)) for shape in spatial_shapes):
        raise TypeError(
            f"{op}: 'spatial_shapes' must be a sequence of pairs of ints (height, width), got "
            f'{type(spatial_shapes).__name__}; convert a tensor with tolist()'
        )
    for shape in spatial_shapes:
        if len(shape) != 2 or not all(map(_is_int, shape)):
            raise TypeError(
                f"{op}: 'spatial_shapes' must hold pairs of ints (height, width), got "
                f'{tuple(shape)!r}'
            )
        if shape[0] < 1 or shape[1] < 1:
            raise ValueError(f"{op}: 'spatial_shapes' must be positive, got {tuple(shape)!r}")
    if not 1 <= len(spatial_shapes) <= MAX_LEVELS:
        raise ValueError(
            f"{op}: 'spatial_shapes' must have 1 to {MAX_LEVELS} levels, got {len(spatial_shapes)}"
        )
    if value.dim() != 4 or not value.shape[2] or not value.shape[3]:
        raise ValueError(
            f"{op}: 'value' must have shape (B, S, H, D) with H >= 1 and D >= 1, got "
            f'{tuple(value.shape)}'
        )
    total = sum(height * width for height, width in spatial_shapes)
    if total != value.shape[1]:
        raise ValueError(
            f"{op}: 'spatial_shapes' {tuple(spatial_shapes)} hold {total} values but 'value' of "
            f'shape {tuple(value.shape)} has S = {value.shape[1]}'
        )
    batch, _, heads, _ = value.shape
    levels = len(spatial_shapes)
    shape = tuple(sampling_locations.shape)
    if len(shape) != 6 or (shape[0], *shape[2:4], shape[5]) != (batch, heads, levels, 2):
        raise ValueError(
            f"{op}: 'sampling_locations' must have shape (B, Q, H, L, P, 2) with B = {batch}, "
            f'H = {heads} and L = {levels}, got {shape}'
        )
    if attention_weights.shape != sampling_locations.shape[:5]:
        raise ValueError(
            f"{op}: 'attention_weights' must have shape (B, Q, H, L, P) = {shape[:5]}, got "
            f'{tuple(attention_weights.shape)}'
        )


SHIFT_MODES = ('q_shift', 'single_shift', 'double_shift')
MAX_MIXES = 3


def check_q_shift(
    x: Tensor, resolution: tuple[int, int], shift_pixel: int, channel_gamma: float, heads: int
) -> None:
    """Check the arguments of :func:`vrwkv_ops.q_shift`.

    Raises:
        TypeError: If ``x`` is not a tensor of an accepted dtype, ``resolution`` not a pair of ints,
            ``shift_pixel`` or ``heads`` not an int or ``channel_gamma`` not a number.
        ValueError: If a shape or value does not fit.
    """
    _check_shift('q_shift', x, resolution, shift_pixel, channel_gamma, 'q_shift', heads)


def check_token_shift(
    x: Tensor,
    mixes: Tensor | Sequence[Tensor],
    resolution: tuple[int, int] | None,
    shift_pixel: int,
    channel_gamma: float | None,
    mode: str,
    heads: int,
) -> None:
    """Check the arguments of :func:`vrwkv_ops.token_shift`.

    Raises:
        TypeError: If an argument has a type or dtype that is not accepted.
        ValueError: If a shape, a value or a device does not fit, or ``mode`` is unknown.
    """
    op = 'token_shift'
    if mode not in SHIFT_MODES:
        raise ValueError(
            f"{op}: 'mode' must be one of {', '.join(map(repr, SHIFT_MODES))}, got {mode!r}"
        )
    _check_shift(op, x, resolution, shift_pixel, channel_gamma, mode, heads)
    channels = x.shape[2]
    if isinstance(mixes, Tensor):
        if mixes.dim() != 2:
            raise ValueError(
                f"{op}: 'mixes' must be a tensor of shape (n, C) or a sequence of tensors, got one "
                f'tensor of shape {tuple(mixes.shape)}'
            )
    elif not isinstance(mixes, (tuple, list)):
        raise TypeError(
            f"{op}: 'mixes' must be a tensor of shape (n, C) or a sequence of tensors, got "
            f'{type(mixes).__name__}'
        )
    if not 1 <= len(mixes) <= MAX_MIXES:
        raise ValueError(f"{op}: 'mixes' must hold 1 to {MAX_MIXES} mixes, got {len(mixes)}")
    for i, mix in enumerate(mixes):
        name = f'mixes[{i}]'
        _check_float_tensor(op, name, mix)
        if tuple(mix.shape) not in ((channels,), (1, 1, channels)):
            raise ValueError(
                f"{op}: '{name}' must have shape (C,) or (1, 1, C) with C = {channels} to match "
                f"'x' of shape {tuple(x.shape)}, got {tuple(mix.shape)}"
            )
        _check_device(op, {'x': x, name: mix}, 'x')


def _check_shift(
    op: str,
    x: Tensor,
    resolution: tuple[int, int] | None,
    shift_pixel: int,
    channel_gamma: float | None,
    mode: str,
    heads: int,
) -> None:
    """Check the arguments of all token shifts; arguments that a mode does not use are ignored."""
    _check_float_tensor(op, 'x', x)
    if mode == 'q_shift':
        _check_grid_type(op, resolution)
    for name, value in (('shift_pixel', shift_pixel), ('heads', heads)):
        if not _is_int(value):
            raise TypeError(f"{op}: '{name}' must be an int, got {type(value).__name__}")
    if shift_pixel < 0:
        raise ValueError(f"{op}: 'shift_pixel' must be >= 0, got {shift_pixel}")
    if mode != 'single_shift':
        _check_channel_gamma(op, channel_gamma)
    if x.dim() != 3:
        shape = '(B, H*W, C)' if mode == 'q_shift' else '(B, T, C)'
        raise ValueError(f"{op}: 'x' must have shape {shape}, got {tuple(x.shape)}")
    if mode == 'q_shift':
        height, width = resolution
        if height < 1 or width < 1:
            raise ValueError(f"{op}: 'resolution' must be positive, got ({height}, {width})")
        if height * width != x.shape[1]:
            raise ValueError(
                f"{op}: 'resolution' ({height}, {width}) has {height * width} tokens but 'x' of "
                f'shape {tuple(x.shape)} has T = {x.shape[1]}; pass the (H, W) of the token grid'
            )
    if heads < 1 or x.shape[2] % heads:
        raise ValueError(
            f"{op}: 'heads' must be at least 1 and divide the C = {x.shape[2]} channels of 'x', "
            f'got {heads}'
        )
    if mode != 'single_shift':
        groups = 4 if mode == 'q_shift' else 2
        bounds = shift_bounds(x.shape[2] // heads, channel_gamma, mode)
        if any(bounds[n] == bounds[n + 1] for n in range(groups)):
            names = {2: 'two', 4: 'four'}
            where = 'channels' if heads == 1 else f'channels in each of {heads} heads'
            raise ValueError(
                f"{op}: 'x' has C = {x.shape[2] // heads} {where}, too few for {names[groups]} "
                f'groups of {channel_gamma} * C (a group would be empty); '
                f'C >= {1 / channel_gamma:g} serves'
            )


def _check_grid_type(op: str, resolution: object) -> None:
    if not isinstance(resolution, (tuple, list)):
        raise TypeError(
            f"{op}: 'resolution' must be a pair of ints (H, W), got {type(resolution).__name__}"
        )
    if len(resolution) != 2:
        raise ValueError(
            f"{op}: 'resolution' must be a pair of ints (H, W), got {len(resolution)} values"
        )
    for side in resolution:
        if not _is_int(side):
            raise TypeError(
                f"{op}: 'resolution' must be a pair of ints (H, W), got {tuple(resolution)!r}"
            )


def _check_channel_gamma(op: str, channel_gamma: object) -> None:
    if isinstance(channel_gamma, bool) or not isinstance(channel_gamma, (int, float)):
        raise TypeError(
            f"{op}: 'channel_gamma' must be a float, got {type(channel_gamma).__name__}"
        )
    if not 0 < channel_gamma <= 1 / 4:
        raise ValueError(
            f"{op}: 'channel_gamma' must be in (0, 1/4] (the groups share the channels), "
            f'got {channel_gamma}'
        )


def _is_int(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def shift_bounds(channels: int, channel_gamma: float, mode: str = 'q_shift') -> list[int]:
    """Return the bounds of a head's groups of channels: n covers ``bounds[n-1]:bounds[n]``.

    Group 1 takes the token to the left, 2 to the right, 3 above and 4 below; channels past the
    groups are not shifted. The one-dimensional modes have a grid of one row and empty groups.
    """
    if mode == 'single_shift':
        return [0] + [channels] * 4
    bounds = [int(channels * channel_gamma * n) for n in range(5)]
    return bounds[:3] + [bounds[2]] * 2 if mode == 'double_shift' else bounds
