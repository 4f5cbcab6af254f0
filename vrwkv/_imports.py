"""What a task package says where a package that it needs is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

_MMCV = (
    'pip uninstall -y mmcv-lite mmcv && pip install --no-build-isolation mmcv==2.1.0 '
    '(mmcv-lite installs the same folder without the operators; see docs/install.md)'
)


@contextmanager
def explain_missing(package: str, extra: str, brings: tuple[str, ...]) -> Iterator[None]:
    """Say how to install what an import in the block lacks, if this project knows it.

    Args:
        package: The package that imports.
        extra: The extra of the distribution that it needs.
        brings: The packages that come with the extra.

    Raises:
        ImportError: If an import fails.
    """
    try:
        yield
    except ImportError as error:
        remedies = {
            'vrwkv_ops': 'pip install ./vrwkv_ops',
            'mmcv': _MMCV,
            'mmcv._ext': _MMCV,
            **dict.fromkeys(brings, f"pip install -e '.[{extra}]'"),
        }
        # In the root of the checkout, the folder vrwkv_ops counts as an empty package of that name.
        if error.name not in remedies:
            raise
        raise ImportError(
            f'{package} needs the package {error.name!r}, which is not installed ({error}). '
            f'In the root of the Vision-RWKV checkout: {remedies[error.name]}',
            name=error.name,
        ) from error
