"""mmengine's ``BaseModule`` for the plain models, where mmengine is installed."""

from __future__ import annotations

import copy

try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != 'mmengine':
        raise
    from torch.nn import Module as BaseModule

    HAS_MMENGINE = False
else:
    from mmengine.model import BaseModule

    HAS_MMENGINE = True

__all__ = ['BaseModule', 'WithInitCfg']


class WithInitCfg:
    """Add mmengine's ``init_cfg`` to a plain model.

    Put it before the model among the bases of a class, and ``BaseModule`` after it. Without
    mmengine, ``BaseModule`` is :class:`torch.nn.Module`.

    Args:
        *args: As for the model.
        init_cfg: mmengine's initialisation config, such as ``dict(type='Pretrained',
            checkpoint=..., prefix='backbone.')``.
        **kwargs: As for the model.

    Raises:
        ImportError: If there is an ``init_cfg``, and mmengine is not installed.
    """

    def __init__(self, *args, init_cfg: dict | list[dict] | None = None, **kwargs) -> None:
        if init_cfg is not None and not HAS_MMENGINE:
            raise ImportError(
                f'init_cfg={init_cfg!r} needs mmengine, which is not installed: type "pip install '
                'mmengine", or load the weights with load_state_dict',
                name='mmengine',
            )
        super().__init__(*args, **kwargs)
        self.init_cfg = copy.deepcopy(init_cfg)
