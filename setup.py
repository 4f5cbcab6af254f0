"""Puts configs, tools and model index into the installed package, as OpenMMLab's packages do.

They lie in ``vrwkv/.mim``, where ``mim search``, ``mim download`` and the model index look for
them. An editable install reads them where they are. Everything else is in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Builds the packages, and ``vrwkv/.mim`` unless the install is editable."""

    def run(self) -> None:
        """Copy the files."""
        super().run()
        if self.editable_mode:
            return
        root, mim = Path(__file__).resolve().parent, Path(self.build_lib, 'vrwkv/.mim')
        shutil.rmtree(mim, ignore_errors=True)  # of an earlier build
        for folder in ('configs', 'tools'):
            ignore = shutil.ignore_patterns('__pycache__')
            shutil.copytree(root / folder, mim / folder, ignore=ignore)
        shutil.copy(root / 'model-index.yml', mim)


setup(cmdclass={'build_py': BuildPy})
