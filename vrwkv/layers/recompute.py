"""Training that keeps less: the backward pass computes cheap results again."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .pieces import is_traced


class Recompute:
    """Calls functions whose results autograd shall not keep, and functions that use them.

    Autograd keeps the inputs of the cheap functions and calls these again in the backward pass, to
    the same bits. Hooks on saved tensors do this, so that it holds for whatever uses the results: a
    linear layer, or the one that replaced it. Where other hooks are set, as by
    ``torch.utils.checkpoint``, those decide what is kept, and a compiler decides for itself.

    Example:
        >>> recompute = Recompute(x)
        >>> hidden = recompute.cheap(squared_relu, x)
        >>> y = recompute.use(linear, hidden)  # keeps x and not hidden

    Args:
        x: The first input. Nothing is recomputed in inference and while PyTorch traces it.
    """

    def __init__(self, x: Tensor) -> None:
        self.enabled = torch.is_grad_enabled() and not is_traced(x) and _hooks_are_free()
        self.known = {}

    def cheap(self, function: Callable, *inputs: Tensor) -> Any:
        """Return ``function(*inputs)``, a tensor or a tuple of tensors, to be computed again."""
        results = self.use(function, *inputs)
        if not self.enabled or _is_customised(function):
            return results
        step = _Step(function, [self._find(x) or _Kept(x) for x in inputs], inputs[0].device)
        for index, x in enumerate((results,) if isinstance(results, Tensor) else results):
            self.known[_storage(x)] = weakref.ref(x), _Result(step, index)
        return results

    def use(self, function: Callable, *inputs: Tensor) -> Any:
        """Return ``function(*inputs)``; autograd keeps no cheap result for it."""
        if not self.known or not any(map(self._find, inputs)):
            return function(*inputs)
        with saved_tensors_hooks(self._pack, _unpack):
            return function(*inputs)

    def _find(self, x: Tensor) -> _Result | None:
        """Find the cheap result that shares memory with a tensor."""
        reference, result = self.known.get(_storage(x), (None, None))
        # If the result is gone, another tensor has its memory.
        alive = reference is not None and reference() is not None
        return result if alive and reference().dtype == x.dtype else None

    def _pack(self, x: Tensor) -> _Kept | _Result:
        result = self._find(x)
        if result is None:
            return _Kept(x)
        result.step.saved += 1
        result.step.left += 1
        return _Result(result.step, result.index, (x.shape, x.stride(), x.storage_offset()))


def _unpack(packed: _Kept | _Result) -> Tensor:
    return packed.take()


def _hooks_are_free() -> bool:
    # There is no public way to ask. Without it (torch < 2.7) nothing is recomputed.
    top = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
    enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # torch.func disables them
    return top is not None and enabled() and top(False) is None


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype to which autocast converts on a device, or None where it is off."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _is_customised(function: Callable) -> bool:
    # What replaced a norm layer, and hooks, may be random or have a state.
    if not isinstance(function, nn.Module):
        return False
    return type(function) is not nn.LayerNorm or bool(
        function._forward_hooks or function._forward_pre_hooks
    )


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _Kept:
    """A tensor that autograd keeps, and a check that nobody has changed it since."""

    __slots__ = ('version', 'x')

    def __init__(self, x: Tensor) -> None:
        # Detached: a node of the graph that kept its own result would never be freed.
        self.x, self.version = x.detach(), x._version

    def get(self) -> Tensor:
        if self.x._version != self.version:
            raise RuntimeError(
                'one of the variables needed for gradient computation has been modified by an '
                f'inplace operation: a tensor of shape {tuple(self.x.shape)} is at version '
                f'{self.x._version}, expected version {self.version}'
            )
        return self.x

    take = get


class _Step:
    """A function that is called again for its results.

    They are kept from the first request on until each place that saved one has taken it.
    """

    __slots__ = ('autocast', 'device', 'function', 'inputs', 'left', 'results', 'saved')

    def __init__(
        self, function: Callable, inputs: list[_Kept | _Result], device: torch.device
    ) -> None:
        self.function, self.inputs = function, inputs
        self.device, self.autocast = device, autocast_dtype(device)
        self.saved = self.left = 0
        self.results = None

    def compute(self) -> tuple[Tensor, ...]:
        if self.results is not None:
            return self.results
        inputs = [x.get() for x in self.inputs]
        with torch.no_grad(), self._autocast():
            results = self.function(*inputs)
        results = (results,) if isinstance(results, Tensor) else results
        if self.left:
            self.results = results
        return results

    def _autocast(self) -> contextlib.AbstractContextManager:
        if autocast_dtype(self.device) == self.autocast:
            return contextlib.nullcontext()
        enabled = self.autocast is not None
        return torch.autocast(self.device.type, self.autocast, enabled)


class _Result:
    """A result of a step, as it is or as a view."""

    __slots__ = ('index', 'step', 'view')

    def __init__(self, step: _Step, index: int, view: tuple | None = None) -> None:
        self.step, self.index, self.view = step, index, view

    def get(self) -> Tensor:
        return self.step.compute()[self.index]

    def take(self) -> Tensor:
        x = self.get().as_strided(*self.view)
        self.step.left -= 1
        if not self.step.left:  # a second backward pass takes all of them again
            self.step.results, self.step.left = None, self.step.saved
        return x
