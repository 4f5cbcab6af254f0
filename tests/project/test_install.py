"""The installer behind make: the machines it refuses, and the environments it makes."""

import shutil
import sys
from pathlib import Path

import pytest


@pytest.fixture
def installer(load_script):
    return load_script('requirements/install.py')


@pytest.fixture
def make(installer, monkeypatch, tmp_path):
    """Return a function that installs for a purpose and returns the files asked of uv.

    Commands are recorded in ``make.commands`` instead of being run; of their results only mmcv's
    files are made.
    """
    monkeypatch.setattr(installer, 'check_disk', lambda folder: None)
    monkeypatch.setattr(installer, 'check_compiler', lambda python_headers=False: None)
    commands = []

    def call(self, *arguments, python=None, log=None):
        commands.append(arguments)
        if any(argument in make.broken for argument in arguments):
            raise installer.InstallError('broken')
        if arguments[:2] == ('-m', 'venv'):
            self.site.mkdir(parents=True)
        for file in map(Path, arguments):
            name = {'mmcv': 'mmcv', 'mmcv-lite': 'mmcv_lite'}.get(file.stem)
            if name and file.suffix == '.txt' and 'install' in arguments:
                name = 'onedl_mmcv' if self.flavour == 'onedl' else name
                (self.site / f'{name}-2.1.0.dist-info').mkdir()
                (self.site / 'mmcv').mkdir()
                (self.site / 'mmcv' / ('_ext.so' if file.stem == 'mmcv' else 'lite')).touch()
        if 'uninstall' in arguments:
            for folder in self.site.glob('*mmcv*.dist-info'):
                folder.rmdir()

    def make(purpose, flavour='openmmlab'):
        commands.clear()
        environment = make.environment = installer.Environment(tmp_path / 'venv', flavour)
        installer.install(environment, purpose)
        files = [
            Path(command[index + 1]).stem
            for command in commands
            for index, argument in enumerate(command)
            if argument == '-r'
        ]
        return [name for name in files if name not in ('bootstrap', 'checkout')]

    monkeypatch.setattr(installer.Environment, 'call', call)
    make.commands = commands
    make.broken = ()
    return make


def test_each_purpose_installs_its_requirements_and_mmcv_without_operators(make):
    demo = ['base', 'demo', 'classification']
    assert make('lint') == ['test']
    assert make('demo') == [*demo, 'mmcv-lite']
    assert make('dense') == [*demo, 'dense']
    assert make('test') == [*demo, 'dense', 'deployment', 'test']


@pytest.mark.parametrize('flavour', ['openmmlab', 'onedl'])
def test_compiled_mmcv_stays_until_the_other_build_is_asked_for(make, flavour):
    def installed():
        return [path.name for path in (make.environment.site / 'mmcv').iterdir()]

    make('test', flavour)
    assert installed() == ['lite']
    assert 'mmcv' in make('mmcv', flavour)
    assert installed() == ['_ext.so']
    for purpose in ('test', 'mmcv'):
        assert not {'mmcv', 'mmcv-lite'} & set(make(purpose, flavour))
    assert 'mmcv-lite' in make('mmcv-lite', flavour)
    assert installed() == ['lite']


def test_two_builds_of_mmcv_at_once_are_replaced(make):
    make('mmcv')
    (make.environment.site / 'mmcv_lite-2.2.0.dist-info').mkdir()
    assert 'mmcv-lite' in make('demo')
    assert make.environment.mmcv() == ({'mmcv_lite'}, False)


def test_an_environment_is_made_once_and_anew_after_an_interruption(make, installer):
    def made():
        return any(command[:2] == ('-m', 'venv') for command in make.commands)

    make('demo')
    assert made()
    half_written = make.environment.site / 'half_written.py'
    half_written.touch()
    make('test')
    assert not made()
    assert half_written.exists()

    make.broken = ('--no-build-isolation',)
    with pytest.raises(installer.InstallError, match='broken'):
        make('test')
    make.broken = ()
    make('demo')
    assert made()
    assert not half_written.exists()
    make('demo', 'onedl')
    assert made()


def test_a_folder_that_make_did_not_make_is_left_alone(make, installer, tmp_path):
    precious = tmp_path / 'venv' / 'pyvenv.cfg'
    precious.parent.mkdir()
    precious.touch()
    with pytest.raises(installer.InstallError, match=r'make did not make .*VENV='):
        make('demo')
    assert precious.exists()


def test_a_full_disk_is_reported_before_anything_is_written(installer, monkeypatch, tmp_path):
    usage = type(shutil.disk_usage(tmp_path))(2**40, 2**40, 2**30)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(installer.InstallError, match=r'1\.0 GiB are free under .* needs about'):
        installer.Environment(tmp_path / 'venv', 'openmmlab').open()
    assert not (tmp_path / 'venv').exists()


@pytest.mark.parametrize(
    ('setting', 'message'),
    [
        ('no-such-compiler', r'No C\+\+ compiler was found .*VRWKV_OPS_SKIP_BUILD=1 make demo'),
        (shutil.which('false'), r'cannot compile C\+\+17'),
    ],
)
def test_a_compiler_that_is_missing_or_broken(installer, monkeypatch, setting, message):
    monkeypatch.setenv('CXX', setting)
    with pytest.raises(installer.InstallError, match=message):
        installer.check_compiler()


def test_missing_python_headers_matter_for_mmcv_only(installer, monkeypatch, tmp_path):
    monkeypatch.setattr(installer.sysconfig, 'get_path', lambda name: str(tmp_path))
    installer.check_compiler()
    with pytest.raises(installer.InstallError, match='python3-dev'):
        installer.check_compiler(python_headers=True)


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('platform', 'win32', r'64-bit Python on win32.*pip install \./vrwkv_ops'),
        ('maxsize', 2**31 - 1, r'32-bit Python on linux'),
    ],
)
def test_a_machine_that_make_cannot_install_on(installer, monkeypatch, name, value, message):
    installer.check_machine()
    monkeypatch.setattr(installer.sys, name, value)
    with pytest.raises(installer.InstallError, match=message):
        installer.check_machine()


def test_a_python_without_venv(installer, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ensurepip', None)
    with pytest.raises(installer.InstallError, match='apt install python3-venv'):
        installer.check_machine()


def test_progress_comes_from_ninja_and_a_failure_shows_the_end_of_the_log(
    installer, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(installer, 'HEARTBEAT_SECONDS', 0.05)
    environment = installer.Environment(tmp_path, 'openmmlab')
    environment.state.mkdir()
    code = (
        'import time; print("DEBUG [3/77] c++ a.cpp", flush=True); time.sleep(0.5); '
        'raise SystemExit("the last words")'
    )
    with pytest.raises(installer.InstallError, match='check the network'):
        environment.call('-c', code, python=sys.executable, log='mmcv.log')
    output = capsys.readouterr().out
    assert 'Building (mmcv): 3 of 77 files' in output
    assert output.endswith('the last words\n\n')
