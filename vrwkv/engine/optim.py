"""Mixed precision on a CPU."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Mixed-precision training under ``torch.autocast('cpu', torch.bfloat16)``.

    mmengine's ``AmpOptimWrapper`` refuses a machine without an accelerator. bfloat16 has float32's
    range, so the loss is not scaled. ``tools/train.py --amp`` picks this class where there is no
    GPU.

    Args:
        **kwargs: As for :class:`mmengine.optim.OptimWrapper`.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run the forward pass in mixed precision.

        Args:
            model (nn.Module): The training model.

        Raises:
            RuntimeError: If an operator cannot run in bfloat16 on a CPU.
        """
        with (
            super().optim_context(model),
            torch.autocast('cpu', torch.bfloat16),
            _explain_bfloat16(),
        ):
            yield

    def backward(self, loss: Tensor, **kwargs) -> None:
        """Back-propagate, as :meth:`mmengine.optim.OptimWrapper.backward`.

        Args:
            loss (Tensor): The loss of the current iteration, of shape ().
            **kwargs: Passed to :meth:`torch.Tensor.backward`.

        Raises:
            RuntimeError: If an operator cannot run in bfloat16 on a CPU.
        """
        with _explain_bfloat16():
            super().backward(loss, **kwargs)


@contextmanager
def _explain_bfloat16() -> Iterator[None]:
    """Extend the error of an operator without bfloat16 by a remedy."""
    try:
        yield
    except (RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
        if not re.search('bfloat16', str(error), re.IGNORECASE):
            raise
        raise RuntimeError(
            f'An operator cannot run in mixed precision on a CPU: {error}\n'
            'Train without --amp (and without a mixed-precision optim_wrapper), or keep the module '
            "that calls it in float32: with torch.autocast('cpu', enabled=False), on float inputs."
        ) from error
