"""Vision-RWKV in mmpretrain: importing this package registers the models there.

A config does so with ``custom_imports = dict(imports=['vrwkv_cls'], allow_failed_imports=False)``.
"""

try:
    import vrwkv.engine  # noqa: F401 (safe checkpoint loading, onedl)

    from . import checks, hub, mae, models  # noqa: F401

    hub.register_models()
except ImportError as error:
    _INSTALL = {
        'vrwkv_ops': 'pip install ./vrwkv_ops',
        'vrwkv': 'pip install -e .',
        'mmpretrain': "pip install -e '.[classification]'",
        'mmcv': "pip install -e '.[classification]'",
    }
    # In the root of the checkout, the folder vrwkv_ops counts as an empty package of that name.
    if error.name not in _INSTALL:
        raise
    raise ImportError(
        f'vrwkv_cls needs the package {error.name!r}, which is not installed ({error}). '
        f'In the root of the Vision-RWKV checkout: {_INSTALL[error.name]}',
        name=error.name,
    ) from error
