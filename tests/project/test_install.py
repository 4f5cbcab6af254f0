"""The installer behind make: what it refuses, what it skips, and what it repairs."""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def installer(load_script):
    return load_script('requirements/install.py')


@pytest.fixture
def environment(installer, tmp_path):
    """An environment that is complete as far as stamps tell, and records what uv is asked for."""

    class Recorder(installer.Environment):
        broken = ()

        def uv(self, command, *arguments, progress=None):
            self.calls.append((command, *arguments))

        def imports(self, code):
            return 'ImportError: no' if code in self.broken else None

    environment = Recorder(tmp_path / 'venv', 'openmmlab')
    environment.calls = []
    environment.state.mkdir(parents=True)
    environment.site.mkdir(parents=True)
    return environment


def requirement(call):
    return Path(call[call.index('-r') + 1]).stem


def add_distribution(site, name, files):
    info = site / f'{name}-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
    record = []
    for path, content in files.items():
        (site / path).parent.mkdir(exist_ok=True)
        (site / path).write_text(content)
        record.append(f'{path},,{len(content)}\n')
    (info / 'RECORD').write_text(''.join(record) + f'{info.name}/RECORD,,\n')
    return info


def test_a_step_is_done_once_and_again_when_its_requirements_change(
    installer, environment, monkeypatch, tmp_path
):
    monkeypatch.setattr(installer, 'ROOT', tmp_path)
    file = tmp_path / 'some.txt'
    monkeypatch.setattr(installer, 'REQUIREMENTS', tmp_path)
    (tmp_path / 'excludes.txt').touch()
    for content, calls in (('a==1', 1), ('a==1', 1), ('a==2', 2)):
        file.write_text(content)
        environment.step('some', [file], 'import a')
        assert len(environment.calls) == calls


def test_a_step_whose_result_does_not_import_is_not_complete(installer, environment):
    environment.broken = ('import sklearn',)
    file = ROOT / 'requirements/demo.txt'
    for _ in range(2):
        with pytest.raises(installer.InstallError, match='demo was installed but does not work'):
            environment.step('demo', [file], 'import sklearn')
    assert len(environment.calls) == 2
    assert environment.changing.exists()


def test_mmcv_replaces_mmcv_lite_and_serves_classification(installer, environment):
    leftover = environment.site / 'mmcv' / 'leftover.py'

    installer.install_mmcv(environment, operators=False)
    assert [requirement(call) for call in environment.calls if call[0] == 'install'] == [
        'mmcv-lite'
    ]

    leftover.parent.mkdir()
    leftover.touch()
    environment.calls.clear()
    installer.install_mmcv(environment, operators=True)
    assert [call[0] for call in environment.calls] == ['uninstall', 'install']
    assert 'mmcv-lite' in environment.calls[0]
    assert requirement(environment.calls[1]) == 'mmcv'
    assert not leftover.exists()

    environment.calls.clear()
    installer.install_mmcv(environment, operators=False)
    installer.install_mmcv(environment, operators=True)
    assert environment.calls == []


def test_mmcv_without_operators_does_not_pass_for_mmcv(installer, environment):
    environment.broken = ('import mmcv.ops',)
    with pytest.raises(installer.InstallError, match=r'`import mmcv\.ops` fails'):
        installer.install_mmcv(environment, operators=True)
    installer.install_mmcv(environment, operators=False)
    assert requirement(environment.calls[-1]) == 'mmcv-lite'


def test_repair_finds_missing_and_cut_off_files_and_missing_records(environment):
    add_distribution(environment.site, 'whole', {'whole/a.py': 'a = 1'})
    add_distribution(environment.site, 'cut', {'cut/a.py': 'a = 1', 'cut/b.py': 'b = 1'})
    add_distribution(environment.site, 'gone', {'gone/a.py': 'a = 1'})
    unrecorded = add_distribution(environment.site, 'unrecorded', {'unrecorded/a.py': 'a = 1'})
    (environment.site / 'cut/b.py').write_text('b')
    shutil.rmtree(environment.site / 'gone')
    (unrecorded / 'RECORD').unlink()
    for step in ('environment', 'base'):
        environment.stamp(step, 'key')

    environment.repair()

    [call] = environment.calls
    assert call[0] == 'uninstall'
    assert set(call[1:]) == {'cut', 'gone'}
    assert not unrecorded.exists()
    assert environment.stamped('environment') == 'key'
    assert environment.stamped('base') is None


def test_repair_leaves_whole_packages_and_their_stamps(environment):
    add_distribution(environment.site, 'whole', {'whole/a.py': 'a = 1'})
    environment.stamp('base', 'key')
    environment.repair()
    assert environment.calls == []
    assert environment.stamped('base') == 'key'


def test_a_folder_that_is_no_environment_is_left_alone(installer, tmp_path):
    precious = tmp_path / 'thesis.tex'
    precious.touch()
    with pytest.raises(installer.InstallError, match='is not a virtual environment'):
        installer.Environment(tmp_path, 'openmmlab').create()
    assert precious.exists()


def test_a_new_environment_has_pip_install_uv_and_is_made_once(installer, monkeypatch, tmp_path):
    runs = []
    environment = installer.Environment(tmp_path / 'venv', 'openmmlab')

    def run(command, **options):
        runs.append(command[2])
        environment.python.parent.mkdir(exist_ok=True)
        environment.python.touch()

    monkeypatch.setattr(installer, 'check_disk', lambda folder: None)
    monkeypatch.setattr(installer.subprocess, 'run', run)
    for _ in range(2):
        environment.create()
        assert runs == ['venv', 'pip']
    assert not environment.changing.exists()

    environment.python.unlink()
    environment.create()
    assert runs == ['venv', 'pip'] * 2


def test_a_full_disk_is_told_before_anything_is_written(installer, monkeypatch, tmp_path):
    usage = type(shutil.disk_usage(tmp_path))(2**40, 2**40, 2**30)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(installer.InstallError, match=r'1\.0 GiB are free under .* needs about'):
        installer.Environment(tmp_path / 'venv', 'openmmlab').create()
    assert not (tmp_path / 'venv').exists()


@pytest.mark.parametrize(
    ('setting', 'message'),
    [
        ('no-such-compiler', 'No C.. compiler was found'),
        (shutil.which('false'), r'cannot compile C\+\+17'),
    ],
)
def test_a_compiler_that_is_missing_or_broken(installer, monkeypatch, setting, message):
    monkeypatch.setenv('CXX', setting)
    with pytest.raises(installer.InstallError, match=message):
        installer.check_compiler()


def test_missing_python_headers(installer, monkeypatch, tmp_path):
    installer.check_compiler()
    monkeypatch.setattr(installer.sysconfig, 'get_path', lambda name: str(tmp_path))
    with pytest.raises(installer.InstallError, match='python3-dev'):
        installer.check_compiler()


def test_a_python_without_venv(installer, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ensurepip', None)
    with pytest.raises(installer.InstallError, match='python3-venv'):
        installer.check_venv_module()


def test_progress_comes_from_ninja_and_a_failure_shows_the_end_of_the_log(
    installer, environment, monkeypatch, capsys
):
    monkeypatch.setattr(installer, 'HEARTBEAT_SECONDS', 0)
    code = 'print("DEBUG [3/77] c++ a.cpp"); print("the last words"); raise SystemExit(3)'
    assert environment.watch([sys.executable, '-c', code], None, 'mmcv') == 3
    output = capsys.readouterr().out
    assert 'mmcv: 3 of 77 files compiled' in output
    assert output.endswith('the last words\n')
