"""What holds for the repository as a whole."""

import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest depends on it there

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = sorted((ROOT / 'requirements').rglob('*.txt'))


def own_files():
    """Files of the checkout that git does not ignore."""
    command = ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '-z']
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in listed.split('\0') if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_registry_host():
    """Packages come from the registry that a user's own pip or uv is set up for."""
    hosts = ('pypi', 'org'), ('pythonhosted', 'org'), ('download.pytorch', 'org')
    hosts += ('download.openmmlab', 'com/mmcv'), ('npmjs', 'org'), ('debian', 'org')
    names = [f'{name}.{domain}'.encode() for name, domain in hosts]
    found = [
        f'{path.relative_to(ROOT)}: {name.decode()}'
        for path in own_files()
        for name in names
        if name in path.read_bytes()
    ]
    assert found == []


def requirement_lines(path):
    lines = (line.partition('#')[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


@pytest.mark.parametrize('path', REQUIREMENTS, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_every_direct_dependency_is_pinned(path):
    lines = requirement_lines(path)
    assert lines
    if path.stem not in ('excludes', 'checkout'):
        assert [line for line in lines if '==' not in line.partition(';')[0]] == []


def test_both_flavours_have_the_same_files():
    names = [
        {path.name for path in (ROOT / 'requirements' / flavour).iterdir()}
        for flavour in ('openmmlab', 'onedl')
    ]
    assert names[0] == names[1]


def test_vrwkv_ops_is_asked_of_no_registry():
    """It is published nowhere: a package of its name would be a stranger's."""
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    lists = [project['dependencies'], *project['optional-dependencies'].values()]
    lists += [requirement_lines(path) for path in REQUIREMENTS]
    named = [line for lines in lists for line in lines if line.lower().startswith('vrwkv')]
    assert named == []


def test_ci_runs_the_command_that_the_readme_names():
    assert '\nmake test ' in (ROOT / 'README.md').read_text()
    assert (ROOT / '.ci/run').read_text().splitlines()[-1] == 'make test'
    workflow = (ROOT / '.github/workflows/ci.yml').read_text()
    assert '- run: .ci/run\n' in workflow
    assert "python: ['3.10', '3.13']" in workflow


def test_each_version_stands_in_one_file():
    """Build metadata reads it there: dynamic, from the package's ``__version__``."""
    for folder, package in (('.', 'vrwkv'), ('vrwkv_ops', 'vrwkv_ops')):
        settings = tomllib.loads((ROOT / folder / 'pyproject.toml').read_text())
        assert settings['project']['dynamic'] == ['version']
        assert settings['tool']['setuptools']['dynamic']['version'] == {
            'attr': f'{package}.__version__'
        }
    assert '\nversion:' not in (ROOT / 'CITATION.cff').read_text()
