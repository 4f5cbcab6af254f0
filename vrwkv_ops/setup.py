"""Add the compiled kernels to what pyproject.toml states."""

import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / 'build_tools'))
from kernels import BuildKernels, Wheel

setup(
    ext_modules=[Extension('vrwkv_ops.kernels', [])],  # makes setuptools run BuildKernels
    cmdclass={'build_ext': BuildKernels, 'bdist_wheel': Wheel},
)
