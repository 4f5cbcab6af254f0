"""Layer-wise decay of the learning rate, for any backbone that knows its layers."""

from __future__ import annotations

import inspect

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Give each layer a learning rate that falls with its distance from the output.

    A parameter of depth d among n depths gets ``lr * layer_decay_rate ** (n - 1 - d)``. Modules
    with a method ``get_layer_depth(name, prefix) -> (depth, depths)``, such as
    :class:`~vrwkv.backbones.VRWKV` and mmpretrain's backbones, define the depth of their
    parameters; all other parameters, those of necks and heads, keep the full rate. Norm layers,
    biases and other 1-d tensors get no weight decay, unless ``paramwise_cfg`` says otherwise.

    An optimizer without ``lr`` or ``weight_decay`` in its config has its class's defaults.

    Args:
        optim_wrapper_cfg (dict): As for :class:`mmengine.optim.DefaultOptimWrapperConstructor`.
        paramwise_cfg (dict): ``layer_decay_rate``, above 0 and at most 1, and what mmengine's
            constructor takes. ``norm_decay_mult``, ``bias_decay_mult`` and ``flat_decay_mult``
            default to 0.

    Raises:
        ValueError: If ``layer_decay_rate`` is missing or out of its range, if there is no learning
            rate, or, when called, if no module of the model has ``get_layer_depth``.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        optimizer = _with_defaults(optim_wrapper_cfg['optimizer'])
        no_decay = {}
        if optimizer.get('weight_decay') is not None:
            no_decay = dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0)
        super().__init__(
            {**optim_wrapper_cfg, 'optimizer': optimizer}, {**no_decay, **(paramwise_cfg or {})}
        )
        self.layer_decay_rate = self.paramwise_cfg.get('layer_decay_rate')
        if not (isinstance(self.layer_decay_rate, (int, float)) and 0 < self.layer_decay_rate <= 1):
            raise ValueError(
                'paramwise_cfg needs a layer_decay_rate above 0 and at most 1, such as '
                f'dict(layer_decay_rate=0.85), got {self.layer_decay_rate!r}'
            )
        if self.base_lr is None:
            raise ValueError(
                'layer decay scales a learning rate, and this optimizer has none: set lr in '
                f"optim_wrapper's optimizer, got {optim_wrapper_cfg['optimizer']}"
            )

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs) -> None:
        """Add the groups of a module's parameters, merging those of equal settings.

        Args:
            params: The groups so far; changed in place.
            module: The module; at the first call, the model.
            prefix: What precedes the module's parameters in their names.
            **kwargs: As for mmengine's constructor.
        """
        super().add_params(params, module, prefix, **kwargs)
        if prefix:  # mmengine calls this for every child
            return
        scales = self._scales(module)
        merged: dict[tuple, dict] = {}
        for group in params:
            (param,) = group['params']
            group['lr'] = group.get('lr', self.base_lr) * scales[param]
            settings = {key: value for key, value in group.items() if key != 'params'}
            key = tuple(sorted(settings.items()))
            merged.setdefault(key, {**settings, 'params': []})['params'].append(param)
        params[:] = merged.values()

    def _scales(self, model: nn.Module) -> dict[nn.Parameter, float]:
        """Return each parameter's factor of the learning rate."""
        scales = dict.fromkeys(model.parameters(), 1.0)
        found = False
        # A classifier of mmpretrain has the method too, and only passes the question on.
        for prefix, module in model.named_modules():
            if not prefix or not hasattr(module, 'get_layer_depth'):
                continue
            found = True
            for name, param in module.named_parameters(prefix=prefix):
                depth, depths = module.get_layer_depth(name, f'{prefix}.')
                scales[param] = self.layer_decay_rate ** (depths - 1 - depth)
        if not found:
            raise ValueError(
                f'no module of {type(model).__name__} has a get_layer_depth method, so its '
                'learning rate cannot decay by layers: use a backbone that has one, or leave out '
                "optim_wrapper's constructor and paramwise_cfg's layer_decay_rate"
            )
        return scales


def _with_defaults(optimizer: dict) -> dict:
    """Return an optimizer's config with the learning rate and weight decay that it will have."""
    kind = optimizer['type']
    if isinstance(kind, str):
        kind = OPTIMIZERS.get(kind)
    parameters = inspect.signature(kind).parameters if kind is not None else {}
    defaults = {
        name: parameters[name].default
        for name in ('lr', 'weight_decay')
        if name in parameters and isinstance(parameters[name].default, (int, float))
    }
    return {**defaults, **optimizer}
