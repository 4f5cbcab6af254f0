"""demo/quickstart.ipynb: its code cells run from the first to the last, shortened."""

import json

import matplotlib as mpl
import numpy as np
import pytest
import torch


@pytest.fixture
def cells(repository):
    """Return the code cells as Python: IPython's commands, which install packages, are left out."""
    notebook = json.loads((repository / 'demo/quickstart.ipynb').read_text())
    code = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
    assert all(cell['outputs'] == [] and cell['execution_count'] is None for cell in code)
    lines = [''.join(cell['source']).splitlines() for cell in code]
    return [
        '\n'.join('    pass' if line.lstrip().startswith('%') else line for line in cell)
        for cell in lines
    ]


def test_installs_without_a_compiler(cells, repository):
    source = (repository / 'demo/quickstart.ipynb').read_text()
    assert source.count('%pip install') == 3
    assert '%env VRWKV_OPS_SKIP_BUILD=1' in source
    assert '    pass' in cells[0]


@pytest.mark.usefixtures('training_environment')
def test_cells(cells, repository, tmp_path, monkeypatch):
    """Eight images, two epochs; it starts in its folder, like Jupyter, here in an empty one."""
    (tmp_path / 'demo').mkdir()
    monkeypatch.chdir(tmp_path / 'demo')
    (tmp_path / 'configs').symlink_to(repository / 'configs')
    (tmp_path / 'demo/digit_scenes.py').symlink_to(repository / 'demo/digit_scenes.py')
    source = '\n'.join(cells)
    assert source.count('IMAGES, EPOCHS = 200, 6') == 1
    source = source.replace('IMAGES, EPOCHS = 200, 6', 'IMAGES, EPOCHS = 8, 2')
    names = {}
    with mpl.rc_context({'backend': 'Agg'}):
        exec(compile(source, 'quickstart.ipynb', 'exec'), names)
        mpl.pyplot.close('all')
    assert names['cost'].parameters == pytest.approx(6.2e6, rel=0.01)
    assert [m.shape for m in names['maps']] == [torch.Size([1, 192, 26, 40])] * 3
    assert names['runner'].epoch == 2
    assert (tmp_path / 'work_dirs/quickstart/epoch_2.pth').is_file()
    assert [image.shape for image in names['drawn']] == [(128, 128, 3)] * 4
    pixels = np.stack(names['drawn'])
    assert pixels.std() > 10
