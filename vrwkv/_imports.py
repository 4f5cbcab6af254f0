"""Errors for packages that are missing or do not fit, each with the line to type."""

from collections.abc import Iterator
from contextlib import contextmanager

from .mmcv_ops import (
    EXTENSION,
    how_to_compile,
    how_to_install,
    installed,
    require_one_mmcv,
    torchvision_error,
)

ONEDL = 'onedl-mmengine onedl-mmcv onedl-mmpretrain onedl-mmdetection onedl-mmsegmentation'


@contextmanager
def explain_missing(package: str, extra: str, brings: tuple[str, ...]) -> Iterator[None]:
    """Say how to install a package whose import fails in the block, if this project knows it.

    Args:
        package: The package or class that imports.
        extra: The extra of this project's distribution that it needs.
        brings: The packages that come with the extra.

    Raises:
        ImportError: If an import fails, or installed packages do not fit each other.
    """
    require_one_mmcv()
    try:
        yield
    except ImportError as error:
        if error.name == EXTENSION:
            raise ImportError(
                f'{package} needs mmcv, whose compiled operators do not load ({error}): they were '
                f'compiled for another PyTorch. Compile them again: {how_to_compile()}, or work '
                f'without them: {how_to_install()}',
                name=error.name,
            ) from error
        # In the root of the checkout, the folder vrwkv_ops counts as an empty package of that name.
        remedies = {
            **dict.fromkeys(brings, f"pip install -e '.[{extra}]'"),
            'vrwkv_ops': 'pip install ./vrwkv_ops',
        }
        if 'onedl-mmcv' in installed():  # the extra would install the original packages over these
            for name in brings:
                remedies[name] = f'pip install {ONEDL if name.startswith("mm") else name}'
        if error.name not in remedies:
            raise
        raise ImportError(
            f'{package} needs the package {error.name!r}, which is not installed ({error}). '
            f'In the root of the Vision-RWKV checkout: {remedies[error.name]}',
            name=error.name,
        ) from error
    except AssertionError as error:  # of mmdet, mmseg or mmpretrain
        if 'is used but incompatible' not in str(error):
            raise
        raise ImportError(f'{package}: {error} Type: {how_to_install()}') from error
    except RuntimeError as error:
        if 'torchvision::' not in str(error):
            raise
        raise torchvision_error(error) from error
