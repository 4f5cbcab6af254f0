"""Fixtures for the model tests: upstream's numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

GOLDEN_DIR = Path(__file__).parents[1] / 'data' / 'golden'


class Golden:
    """One golden file, see ``tests/data/golden/README.md``."""

    def __init__(self, name: str) -> None:
        data = torch.load(GOLDEN_DIR / f'{name}.pt', weights_only=True)
        self.config: dict = data['config']
        self.state_dict: dict[str, Tensor] = data['state_dict']
        self.input: Tensor = data['input']
        self.outputs: list[Tensor] = data['outputs']
        self.grads: dict[str, Tensor] = data['grads']

    def check(self, outputs: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Compare outputs, then the gradient of the README's loss for every parameter.

        2e-5 of each tensor's largest element. Float32 on both sides gives up to 5e-6; a layer norm
        with a wrong eps, 1e-6, gives 7e-5.
        """
        assert len(outputs) == len(self.outputs)
        for index, (output, expected) in enumerate(zip(outputs, self.outputs, strict=True)):
            self._check_close(f'output {index}', output, expected)
        loss = sum(o.double().square().mean() + o.double().mean() for o in outputs)
        loss.backward()
        assert set(parameters) == set(self.grads)
        for name, expected in self.grads.items():
            assert parameters[name].grad is not None, f'{name} has no gradient'
            self._check_close(name, parameters[name].grad, expected)

    @staticmethod
    def _check_close(name: str, value: Tensor, expected: Tensor) -> None:
        assert value.shape == expected.shape, name
        error = ((value - expected).abs().max() / expected.abs().max()).item()
        assert error < 2e-5, f'{name} is off by {error:.1e} of its largest element'


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    """Load a golden file by its name without suffix."""
    return Golden
