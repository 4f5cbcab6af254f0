"""PEP 517 backend: setuptools', with the torch of the target environment in sight.

pip builds in an isolated environment: it starts the target's Python with ``PYTHONPATH`` set to an
overlay that hides the site-packages. The kernels need the very torch that they will run with, so
those folders are appended again, behind the overlay. (uv builds with another Python, whose
site-packages hold no torch: use ``--no-build-isolation`` there.)
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
