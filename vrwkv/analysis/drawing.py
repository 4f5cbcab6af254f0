"""One style for all pictures; needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

#: Okabe and Ito's colours, which colour-blind readers can distinguish; black is first.
COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#F0E442')
#: Markers to use with the colours, for prints in black and white.
MARKERS = 'osD^vPX*'

_STYLE = {
    'figure.facecolor': 'white',
    'figure.dpi': 120,
    'figure.constrained_layout.use': True,
    'font.size': 11,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': '#e0e0e0',
    'axes.prop_cycle': mpl.cycler(color=COLOURS[1:]),
    'legend.frameon': False,
}


@contextmanager
def picture(path: str | os.PathLike, *args, **kwargs) -> Iterator[tuple[mpl.figure.Figure, object]]:
    """Create a figure in the common style and write it at the end.

    Args:
        path: The PNG file; its folder is created.
        *args: As for :func:`matplotlib.pyplot.subplots`.
        **kwargs: Likewise.

    Yields:
        The figure and its axes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STYLE):
        # Without interactive mode pyplot opens no window.
        with plt.ioff():
            fig, axes = plt.subplots(*args, **kwargs)
        try:
            yield fig, axes
            fig.savefig(path)
        finally:
            plt.close(fig)
