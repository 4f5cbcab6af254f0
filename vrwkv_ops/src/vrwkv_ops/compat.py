"""The names by which projects call their copies of upstream's CUDA kernels, on every device.

Replace the ``load(...)`` of the CUDA file and the autograd class by an import from here;
docs/ecosystem.md shows the lines. There is no largest T.
"""

import torch
from torch import Tensor

from vrwkv_ops.ops import bi_wkv, bi_wkv6


def RUN_CUDA(*args: Tensor | int) -> Tensor:  # noqa: N802
    """Run :func:`vrwkv_ops.bi_wkv` with upstream's arguments, old or new.

    Args:
        *args: ``(w, u, k, v)``, or ``(B, T, C, w, u, k, v)``. ``w`` and ``u`` of shape (C,) are
            divided by T already; ``k`` and ``v`` have shape (B, T, C).

    Returns:
        A tensor of the shape of ``k``, with the wider dtype of ``k`` and ``v``.

    Raises:
        TypeError: If the number or the type of arguments does not fit.
        ValueError: If a shape does not fit.
    """
    if len(args) not in (4, 7):
        raise TypeError(f'RUN_CUDA takes (w, u, k, v) or (B, T, C, w, u, k, v), got {len(args)}')
    *sizes, w, u, k, v = args
    _check('RUN_CUDA', sizes, 'k', w=w, u=u, k=k, v=v)
    k, v = _one_dtype(k, v)
    return bi_wkv(w, u, k, v)


RUN_BiWKV4 = RUN_CUDA


def RUN_CUDA_RWKV6(  # noqa: N802
    B: int,
    T: int,
    C: int,
    H: int,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
) -> Tensor:
    """Run :func:`vrwkv_ops.bi_wkv6` with upstream's arguments.

    Args:
        B: Number of images.
        T: Number of tokens.
        C: Number of channels.
        H: Number of heads.
        r: Receptances, shape (B, T, C).
        k: Keys, shape (B, T, C).
        v: Values, shape (B, T, C).
        w: Raw decays, shape (B, T, C).
        u: Bonus, shape (H, C / H) or (C,).

    Returns:
        A tensor of the shape of ``v``, in the widest dtype of ``r``, ``k`` and ``v``.

    Raises:
        TypeError: If the type of an argument does not fit.
        ValueError: If a shape does not fit.
    """
    _check('RUN_CUDA_RWKV6', (B, T, C), 'v', r=r, k=k, v=v, w=w, u=u)
    if H < 1 or u.numel() != C or C % H:
        raise ValueError(
            f'RUN_CUDA_RWKV6: {H} heads must divide C = {C}, and u must have C values, got '
            f'{tuple(u.shape)}'
        )
    r, k, v = _one_dtype(r, k, v)
    return bi_wkv6(r, k, v, w, u.reshape(H, C // H))


def _check(name: str, sizes: tuple | list, of: str, **tensors: Tensor) -> None:
    for key, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: '{key}' must be a torch.Tensor, got {type(x).__name__}")
    shape = tuple(tensors[of].shape)
    if sizes and tuple(sizes) != shape:
        raise ValueError(f"{name}: B, T, C are {tuple(sizes)}, but '{of}' is {shape}")


def _one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Convert to the widest dtype: these projects mix float32 with half types."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in tensors]
