"""Running the demos and two processes; small configs of the three tasks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

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


@pytest.fixture
def two_processes(free_port, tmp_path):
    """Run tools in turn in the same two processes, which import OpenMMLab's packages once."""
    script = tmp_path / 'two_processes.py'
    script.write_text("""
import json, sys
import mmengine.config.config
from vrwkv.engine import cli
mmengine.config.config.FormatCode = lambda text, **kwargs: (text, True)
for tool, *arguments in json.loads(sys.argv[1]):
    getattr(cli, tool)([*arguments, '--launcher', 'pytorch'])
""")

    def run(*commands):
        torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2']
        arguments = [f'--master_port={free_port}', str(script), json.dumps(commands, default=str)]
        result = subprocess.run(
            [*torchrun, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stdout + result.stderr

    return run


@pytest.fixture(scope='session')
def tiny_config():
    """Read a config of a task, and make its model small; for images of 64 pixels or less."""
    configs = Path(__file__).resolve().parents[2] / 'configs'

    def tiny_config(task, name='mask-rcnn_vrwkv-adapter-tiny_fpn_1x_coco'):
        backbone = dict(embed_dims=24, depth=4, init_cfg=None)
        adapter = dict(conv_inplane=8, interaction_indexes=None, norm_cfg=dict(type='BN'))
        if task == 'classification':
            cfg = Config.fromfile(configs / 'classification/vrwkv-nano_1xb64_digits.py')
            cfg.model.backbone.update(backbone)
            cfg.model.head.in_channels = 24
        elif task == 'detection':
            cfg = Config.fromfile(configs / f'detection/{name}.py')
            cfg.model.backbone.update(backbone, **(adapter if 'adapter' in name else {}))
            if 'vit' in name:
                blocks = [0, 1, 2] if 'window' in name else []
                cfg.model.backbone.window_block_indexes = blocks
            cfg.model.neck.update(
                in_channels=4 * [24] if 'adapter' in name else 24, out_channels=16
            )
            cfg.model.rpn_head.update(in_channels=16, feat_channels=16)
            for kind in ('bbox', 'mask'):
                cfg.model.roi_head[f'{kind}_roi_extractor'].out_channels = 16
                cfg.model.roi_head[f'{kind}_head'].update(in_channels=16, num_classes=2)
            cfg.model.roi_head.bbox_head.fc_out_channels = 32
            cfg.model.roi_head.mask_head.conv_out_channels = 16
            resize = next(t for t in cfg.test_pipeline if t['type'] == 'Resize')
            resize['scale'] = cfg.test_dataloader.dataset.pipeline[1]['scale'] = (64, 64)
        else:
            name = 'upernet_vrwkv-adapter-tiny_8xb2-160k_ade20k-512x512.py'
            cfg = Config.fromfile(configs / 'segmentation' / name)
            cfg.model.backbone.update(backbone, **adapter)
            cfg.model.decode_head.update(in_channels=4 * [24], channels=16, num_classes=5)
            cfg.model.auxiliary_head.update(in_channels=24, channels=8, num_classes=5)
            cfg.model.data_preprocessor.size = (64, 64)
            cfg.model.test_cfg = dict(mode='whole')
            for pipeline in (cfg.test_pipeline, cfg.test_dataloader.dataset.pipeline):
                next(t for t in pipeline if t['type'] == 'Resize')['scale'] = (64, 64)
        return cfg

    return tiny_config
