"""Install this checkout as docs/install.md says, under several Pythons, and run each task once.

Every combination of a Python, versions of packages (pinned here, or the newest that resolve) and
OpenMMLab flavour gets an environment, which is removed afterwards. Nothing is trained or
downloaded but packages. The table replaces the one in docs/install.md.
"""

import datetime
import itertools
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / 'requirements'
PAGE = ROOT / 'docs' / 'install.md'
PYTHONS = ('3.10', '3.11', '3.12', '3.13')
VERSIONS = ('pinned', 'newest')
ONEDL = ['onedl-mmengine', 'onedl-mmcv', 'onedl-mmpretrain', 'onedl-mmdetection']
FLAVOURS = {
    'openmmlab': ['-e', '.[all]'],
    'onedl': [*ONEDL, 'onedl-mmsegmentation', '-e', '.'],
}
SHOWN = ('torch', 'numpy', 'opencv-python', 'setuptools')
IMAGE = 'import numpy, torch; image = numpy.full((96, 96, 3), 127, numpy.uint8); '
TASKS = {
    'classification': f"""{IMAGE}
import vrwkv_cls
from mmpretrain import get_model, inference_model
result = inference_model(get_model('vrwkv-tiny_8xb128_in1k', device='cpu'), image)
assert len(result['pred_scores']) == 1000, result
import vrwkv_ops.backends
assert any(b.available for b in vrwkv_ops.backends.diagnose() if 'CPU' in b.name), 'no kernels'
""",
    'detection': f"""{IMAGE}
import vrwkv_det
from mmdet.apis import inference_detector, init_detector
config = 'configs/detection/mask-rcnn_vrwkv-adapter-nano_fpn_1xb8-10e_digit-scenes.py'
result = inference_detector(init_detector(config, device='cpu'), image).pred_instances
assert result.bboxes.shape[1:] == (4,) and result.masks.shape[1:] == (96, 96), result
""",
    'segmentation': f"""{IMAGE}
import vrwkv_seg
from mmseg.apis import inference_model, init_model
config = 'configs/segmentation/upernet_vrwkv-adapter-nano_1xb8-1k_digit-scenes-96x96.py'
result = inference_model(init_model(config, device='cpu'), image).pred_sem_seg.data
assert result.shape == (1, 96, 96), result
""",
}


def run(*command):
    """Run a command in the checkout; return an empty text, or the reason why it fails."""
    line = [str(part) for part in command]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return ''
    words = [re.sub(r'^\W+', '', text) for text in done.stderr.splitlines() if text.strip()]
    errors = [text for text in words if re.search('error|failed|no interpreter', text, re.I)]
    return (errors[-1:] or words[-1:] or [f'exit status {done.returncode}'])[0]


def install(python, versions, flavour, folder, wheels):
    """Make an environment in `folder`; return why that fails, or an empty text.

    vrwkv_ops is compiled once for each release of torch: its wheel serves all Pythons.
    """
    uv = [sys.executable, '-m', 'uv']
    names = ('base', 'demo', f'{flavour}/classification', f'{flavour}/dense')
    here = ['--python', folder / 'bin' / 'python']
    pip = [*uv, 'pip', 'install', *here]
    if versions == 'pinned':
        pip += [f'--constraints={REQUIREMENTS / name}.txt' for name in names]
    build = ['torch', 'torchvision', 'setuptools', 'wheel', 'ninja']
    problem = run(*uv, 'venv', '--python', python, folder) or run(*pip, *build)
    [torch] = [path.name for path in folder.glob('lib/python3*/site-packages/torch-*')] or ['none']
    wheel = wheels / torch
    if not problem and not any(wheel.glob('*.whl')):
        line = [*uv, 'build', '--wheel', '--no-build-isolation', *here, '--out-dir', wheel]
        problem = run(*line, ROOT / 'vrwkv_ops')
    return problem or run(*pip, *wheel.glob('*.whl')) or run(*pip, *FLAVOURS[flavour])


def row(python, versions, flavour, wheels):
    """Install one combination, run all tasks, and return the row of the table."""
    with tempfile.TemporaryDirectory(prefix='matrix-') as name:
        folder = Path(name)
        problem = install(python, versions, flavour, folder, wheels)
        if problem:
            return [python, versions, flavour, '', f'not installed: {problem}', '', '']
        found = {path.name for path in folder.glob('lib/python3*/site-packages/*.dist-info')}
        shown = [
            f'{package} {entry.removesuffix(".dist-info").split("-")[1]}'
            for package in SHOWN
            for entry in sorted(found)
            if entry.startswith(f'{package.replace("-", "_")}-')
        ]
        results = [run(folder / 'bin' / 'python', '-c', code) or 'runs' for code in TASKS.values()]
    return [python, versions, flavour, ', '.join(shown), *results]


def write_table(rows):
    """Replace the table in the installation page."""
    header = [['Python', 'packages', 'flavour', 'versions', *TASKS], ['---'] * (4 + len(TASKS))]
    lines = [' | '.join(cell.replace('|', '\\|') for cell in cells) for cells in header + rows]
    table = '\n'.join(f'| {line} |' for line in lines)
    title = f'Results of `make matrix` ({datetime.date.today()}, {sys.platform}, CPU):'
    before, _, rest = PAGE.read_text().partition('<!-- matrix -->\n')
    end = '<!-- end of matrix -->'
    PAGE.write_text(f'{before}<!-- matrix -->\n{title}\n\n{table}\n\n{end}{rest.partition(end)[2]}')


def main():
    """Run all combinations and write the table."""
    rows = []
    with tempfile.TemporaryDirectory(prefix='matrix-') as folder:
        for combination in itertools.product(PYTHONS, VERSIONS, FLAVOURS):
            start = time.monotonic()
            rows.append(row(*combination, Path(folder)))
            write_table(rows)  # after each row, so that an interrupted run leaves a table
            print(f'{time.monotonic() - start:.0f} s:', *rows[-1], sep=' | ', flush=True)


if __name__ == '__main__':
    main()
