"""Running the demos."""

import pytest

from vrwkv.engine import cli


@pytest.fixture
def run_demo(tmp_path, monkeypatch, capfd):
    """Run a demo on a config in ``tmp_path/work``; return the output of it and of its tools."""

    def run(demo, config, *options):
        argv = [f'{demo.__name__}.py', str(config), '--work-dir', str(tmp_path / 'work')]
        argv += options
        monkeypatch.setattr('sys.argv', argv)
        demo.main()
        return capfd.readouterr().out

    return run


@pytest.fixture
def tool_calls(load_script, monkeypatch):
    """Run the tools of demos in this process; return the names of those that ran.

    Importing OpenMMLab's packages in a new process would take longer than the trainings.
    """
    calls = []

    def run_tool(name, *args, log=None):
        calls.append(name)
        getattr(cli, name.removesuffix('.py'))([str(arg) for arg in args])

    monkeypatch.setattr(load_script('demo/demo_tools.py'), 'run_tool', run_tool)
    return calls
