"""The operators in Triton, for GPUs without compiled kernels.

The modules of this package import Triton, which may not be installed; this file does not.
"""

import functools
from collections.abc import Callable, Mapping

import torch

from vrwkv_ops import backends

_FOR_GOOD = []  # a library that is garbage-collected removes its kernels


def serve(dispatch_key: str, fallbacks: Mapping[str, Callable]) -> None:
    """Register the Triton kernels for a dispatch key: 'CUDA', or 'CPU' for Triton's interpreter.

    Nothing is imported or compiled before the first call on a device. If Triton does not work
    there, one warning says why, and the fallbacks run instead.

    Args:
        dispatch_key: Selects the tensors that the kernels serve.
        fallbacks: For each operator of ``vrwkv_ops``, a function for devices without Triton.
    """
    library = torch.library.Library('vrwkv_ops', 'IMPL')
    _FOR_GOOD.append(library)
    for name, fallback in fallbacks.items():
        library.impl(name, _kernel(name, fallback), dispatch_key)


def _kernel(name: str, fallback: Callable) -> Callable:
    def kernel(*args):
        tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
        if not works_on(tensor.device):
            return fallback(*args)
        return _operators()[name](*args)

    return kernel


@functools.cache
def _operators() -> dict[str, Callable]:
    from vrwkv_ops.triton import bi_wkv, bi_wkv6, ms_deform_attn, pointwise, token_shift

    return {
        'bi_wkv_forward': bi_wkv.forward,
        'bi_wkv_backward': bi_wkv.backward,
        'bi_wkv6_forward': bi_wkv6.forward,
        'bi_wkv6_backward': bi_wkv6.backward,
        'q_shift': token_shift.q_shift,
        'token_shift_forward': token_shift.forward,
        'token_shift_backward': token_shift.backward,
        'ms_deform_attn': ms_deform_attn.ms_deform_attn,
        'ms_deform_attn_backward': ms_deform_attn.ms_deform_attn_backward,
        'squared_relu': pointwise.squared_relu,
        'squared_relu_backward': pointwise.squared_relu_backward,
        'sigmoid_gate': pointwise.sigmoid_gate,
        'sigmoid_gate_backward': pointwise.sigmoid_gate_backward,
    }


@functools.cache
def works_on(device: torch.device) -> bool:
    """Return whether Triton compiles and runs a kernel on a device; tried once."""
    try:
        # Q-Shift on a grid of 1 x 2 with one channel per group: only the first channel moves.
        x = torch.tensor([[[1.0, 0, 0, 0], [0, 0, 0, 0]]], device=device)
        shifted = _operators()['q_shift'](x, 1, 2, 1, 1 / 4, False)
        if shifted.tolist() != [[[0, 0, 0, 0], [1, 0, 0, 0]]]:
            raise RuntimeError(f'a test kernel gave {shifted.tolist()}')
    # Triton, its compilers and the driver raise exceptions of many types.
    except Exception as error:
        backends.triton_failed(f'{type(error).__name__}: {error}'.splitlines()[0])
        return False
    return True
