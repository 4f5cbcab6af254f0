"""A quiet screen: progress and results are shown; everything else goes to the log file only."""

from __future__ import annotations

import io
import logging
import os
import re
import warnings
from contextlib import AbstractContextManager, ExitStack, redirect_stdout
from pathlib import Path

import vrwkv
import vrwkv_ops

#: Lines of the libraries that are shown: progress, results, checkpoints.
_SHOWN = re.compile(
    r'\s*((Epoch|Iter)\(\w+\)|Saving checkpoint|The best checkpoint with|Load checkpoint from'
    r'|per class results|\+-+|Average (Precision|Recall))'
)
#: Warnings of the libraries that are not.
_NOISE = re.compile(
    r'deprecated|Failed to search registry|requires_grad=False|recommended to use'
    r'|has no metainfo|init_weights|(save|resume)_param_scheduler|Resumed iteration number is'
    r'|prefix is not set in metric'
)
_HERE = str(Path(__file__).parent)
_OURS = tuple(str(Path(package.__file__).parent) + os.sep for package in (vrwkv, vrwkv_ops))


class QuietScreen(AbstractContextManager):
    """Keep everything but progress, results, warnings and errors off the screen.

    While it is open, loggers that :meth:`attach` gets show little, and printed text and Python's
    warnings of other packages go to the log file. Errors are always shown.

    Args:
        verbose: Change nothing.
    """

    _open: list[QuietScreen] = []  # noqa: RUF012

    def __init__(self, verbose: bool = False) -> None:
        self.verbose = verbose
        self._logger: logging.Logger | None = None
        self._pending: list[tuple] = []

    def __enter__(self) -> QuietScreen:
        self._stack = ExitStack()
        if not self.verbose:
            self._stack.enter_context(warnings.catch_warnings())
            warnings.showwarning = self._warn
            self._open.append(self)
            self._stack.callback(self._open.remove, self)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @classmethod
    def attach(cls, logger: logging.Logger) -> None:
        """Show little of a logger on the screen if a quiet screen is open.

        Args:
            logger: The logger, with its handlers.
        """
        for screen in cls._open[-1:]:
            for handler in logger.handlers:
                if not isinstance(handler, logging.FileHandler):
                    handler.addFilter(_is_shown)
                    handler.setFormatter(_Short())
            screen._logger = logger
            screen._stack.enter_context(redirect_stdout(_Printed(screen)))
            while screen._pending:
                screen._log(*screen._pending.pop(0))

    def _log(self, text: str, level: int = logging.INFO, only_file: bool = True) -> None:
        if self._logger is None:
            self._pending.append((text, level, only_file))
        else:
            self._logger.log(level, text, extra=dict(only_file=only_file))

    def _warn(self, message, category, filename, lineno, file=None, line=None) -> None:
        if filename.startswith(_OURS):
            self._log(str(message), logging.WARNING, only_file=False)
        else:
            self._log(f'{filename}:{lineno}: {category.__name__}: {message}')


class _Printed(io.TextIOBase):
    """A stream whose lines go to the log file."""

    def __init__(self, screen: QuietScreen) -> None:
        self._screen = screen
        self._line = ''

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split('\n')
        for line in filter(str.strip, lines):
            self._screen._log(line)
        return len(text)


class _Short(logging.Formatter):
    """The message alone, after the level if it is not INFO."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno == logging.INFO else f'{record.levelname}: {text}'


def _is_shown(record: logging.LogRecord) -> bool:
    """Say whether a record is shown on the quiet screen."""
    if record.levelno >= logging.ERROR:
        return True
    if getattr(record, 'only_file', False):
        return False
    if record.levelno >= logging.WARNING:
        return not _NOISE.search(record.getMessage())
    return record.pathname.startswith(_HERE) or bool(_SHOWN.match(record.getMessage()))
