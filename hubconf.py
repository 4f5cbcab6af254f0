"""Entry points of ``torch.hub``, such as ``torch.hub.load(REPOSITORY, 'vrwkv_tiny')``.

Each takes the arguments of :func:`vrwkv.create_model`, without the name. Without an installed
``vrwkv_ops``, its PyTorch kernels serve, from this checkout.
"""

# torch.hub.list shows every function whose name does not begin with an underscore.
import sys
from functools import partial as _partial
from functools import update_wrapper as _update_wrapper
from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path

dependencies = ['torch', 'numpy']

_spec = _find_spec('vrwkv_ops')
if _spec is None or _spec.origin is None:  # the folder vrwkv_ops counts as an empty package
    sys.modules.pop('vrwkv_ops', None)
    sys.path.insert(0, str(_Path(__file__).resolve().parent / 'vrwkv_ops/src'))

from vrwkv import create_model, list_models  # noqa: E402, F401
from vrwkv.variants import SHORT_NAMES  # noqa: E402

for _name in SHORT_NAMES:
    globals()[_name.replace('-', '_')] = _update_wrapper(
        _partial(create_model, _name), create_model
    )
