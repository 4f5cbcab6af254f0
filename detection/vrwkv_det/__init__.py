"""Vision-RWKV in mmdet: importing this package registers the models there.

A config does so with ``custom_imports = dict(imports=['vrwkv_det'], allow_failed_imports=False)``.
"""

try:
    import vrwkv.engine  # noqa: F401 (safe checkpoint loading, onedl)

    from . import datasets, models, precision  # noqa: F401
except ImportError as error:
    _MMCV = (
        'pip uninstall -y mmcv-lite mmcv && pip install --no-build-isolation mmcv==2.1.0 '
        '(mmcv-lite installs the same folder without the operators; see docs/install.md)'
    )
    _INSTALL = {
        'vrwkv_ops': 'pip install ./vrwkv_ops',
        'vrwkv': 'pip install -e .',
        'mmdet': "pip install -e '.[detection]'",
        'mmcv': _MMCV,
        'mmcv._ext': _MMCV,
    }
    # In the root of the checkout, the folder vrwkv_ops counts as an empty package of that name.
    if error.name not in _INSTALL:
        raise
    raise ImportError(
        f'vrwkv_det needs the package {error.name!r}, which is not installed ({error}). '
        f'In the root of the Vision-RWKV checkout: {_INSTALL[error.name]}',
        name=error.name,
    ) from error
