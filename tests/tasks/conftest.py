"""Running the demos."""

import pytest

from vrwkv.engine import cli


@pytest.fixture
def run_demo(tmp_path, monkeypatch, capfd):
    """Run a demo on a config, in ``tmp_path/work``; returns what it and its tools print."""

    def run(demo, config):
        argv = [f'{demo.__name__}.py', str(config), '--work-dir', str(tmp_path / 'work')]
        monkeypatch.setattr('sys.argv', argv)
        demo.main()
        return capfd.readouterr().out

    return run


@pytest.fixture
def tool_calls(load_script, monkeypatch):
    """Names of the tools that demos run, which they do in this process.

    Importing OpenMMLab's packages for each would take longer than the trainings.
    """
    calls = []

    def run_tool(name, *args):
        calls.append(name)
        getattr(cli, name.removesuffix('.py'))([str(arg) for arg in args])

    monkeypatch.setattr(load_script('demo/digits_demo.py'), 'run_tool', run_tool)
    return calls
