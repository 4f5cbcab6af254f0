"""The base class of the models, with and without mmengine."""

from __future__ import annotations

from torch import nn

try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != 'mmengine':
        raise

    class BaseModule(nn.Module):
        """Stand in for mmengine's ``BaseModule``: without mmengine there is no ``init_cfg``."""

        def __init__(self, init_cfg: dict | list[dict] | None = None) -> None:
            if init_cfg is not None:
                raise ImportError(
                    f'init_cfg={init_cfg!r} needs mmengine, which is not installed: type "pip '
                    'install mmengine", or load the weights with load_state_dict',
                    name='mmengine',
                )
            super().__init__()

else:
    from mmengine.model import BaseModule

__all__ = ['BaseModule']
