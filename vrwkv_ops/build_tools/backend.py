"""PEP 517 backend: setuptools' own, which also finds the torch of the target environment.

pip builds in an isolated environment: it starts the target's Python with ``PYTHONPATH`` set to an
overlay that hides the site-packages. The kernels must be compiled for the torch that they will run
with, so this backend appends the hidden folders to ``sys.path``. uv builds with another Python,
from which the target cannot be found; there the build fails and asks for ``--no-build-isolation``.
"""

import importlib.util
import json
import os
import subprocess
import sys

from setuptools.build_meta import *  # noqa: F403 (the hooks that pip and uv call)


def _show_target_environment() -> None:
    if importlib.util.find_spec('torch') is not None:
        return
    hidden_by = ('PYTHONPATH', 'PYTHONNOUSERSITE')
    environment = {name: value for name, value in os.environ.items() if name not in hidden_by}
    answer = subprocess.run(
        [sys.executable, '-c', 'import json, sys; print(json.dumps(sys.path[1:]))'],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    sys.path.extend(path for path in json.loads(answer.stdout) if path not in sys.path)


_show_target_environment()
