"""The benchmark of whole models: what it runs, what it says of what fails, and its files."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vrwkv.layers import mix
from vrwkv_ops.reference import bi_wkv_reference

TOOL = 'analysis_tools/benchmark_resolution.py'
PLAIN, FLASH = 'DeiT, plain attention', 'DeiT, flash attention'


@pytest.fixture
def tool(load_script):
    return load_script(f'tools/{TOOL}')


@pytest.fixture
def args(tool, tmp_path):
    return tool.parse_args(['--device', 'cpu', '--resolutions', '32', '64', '--out', str(tmp_path)])


@pytest.mark.parametrize(('model', 'holds'), [(PLAIN, True), (FLASH, False)])
def test_plain_attention_holds_all_pairs_of_tokens(tool, model, holds):
    """A matrix of 3 heads x 400 x 400 tokens. The largest other tensor is in the MLP: 400 x 768."""
    network = tool.build(model, 'tiny', 320).eval()
    images = torch.randn(1, 3, 320, 320)
    with (
        torch.no_grad(),
        tool.attention_of(model),
        torch.profiler.profile(profile_memory=True) as profile,
    ):
        network(images)
    events = profile.profiler.kineto_results.events()
    largest = max(e.nbytes() for e in events if e.name() == '[memory]')
    assert (largest >= 3 * 400 * 400 * 4) is holds
    assert largest == 400 * 768 * 4 or holds


def test_models_are_of_one_size(tool):
    """The paper's Table 2: 6.2M and 5.7M without their heads of 0.2M; VRWKV6: upstream's 7.6M."""
    for model, millions in ((tool.OURS, 6.0), (tool.SIX, 7.4), (PLAIN, 5.5)):
        count = sum(p.numel() for p in tool.build(model, 'tiny', 224).parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(
    ('factor', 'refused'), [(1.0, False), (1.0001, True), (float('nan'), True)]
)
def test_a_wrong_peer_is_refused(tool, args, factor, refused):
    ours = mix.bi_wkv
    peer = SimpleNamespace(function=lambda *inputs: bi_wkv_reference(*inputs) * factor)
    network = tool.build(tool.OURS, 'tiny', 32).eval()
    why = tool.refusal(args, network, torch.randn(1, 3, 32, 32), peer)
    assert why.startswith('refused') if refused else not why
    assert mix.bi_wkv is ours


@pytest.mark.parametrize(
    ('outcome', 'note'),
    [
        ((1, "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory"), 'out of'),
        ((1, 'torch.OutOfMemoryError: CUDA out of memory. Tried'), 'out of memory'),
        ((-9, ''), 'out of memory'),
        ((1, 'Traceback\nKeyError: 3'), 'failed: KeyError: 3'),
        (None, 'more than 120 s'),
    ],
)
def test_what_fails_is_said_and_not_tried_again(tool, args, monkeypatch, outcome, note):
    tried = []

    def run(command, **options):
        size, model, resolution = command[-3:]
        tried.append((model, resolution))
        if model == PLAIN:
            if outcome is None:
                raise subprocess.TimeoutExpired(command, 1)
            return subprocess.CompletedProcess(command, outcome[0], '', outcome[1])
        row = json.dumps(vars(tool.Row(size, model, int(resolution), 2.0, 2**20)))
        return subprocess.CompletedProcess(command, 0, f'noise\n{tool.MARK}{row}\n', '')

    monkeypatch.setattr(subprocess, 'run', run)
    rows = tool.run(args)
    assert [(r.model, r.resolution) for r in rows] == [
        (model, resolution) for resolution in (32, 64) for model in (tool.OURS, PLAIN, FLASH)
    ]
    plain = [r for r in rows if r.model == PLAIN]
    assert note in plain[0].note and plain[1].note == 'not tried after 32'
    assert (PLAIN, '64') not in tried and len(tried) == 5
    assert all(r.images_per_second == 2 for r in rows if r.model != PLAIN)
    table = tool.table(rows)
    assert note in table and table.count('\n') == 7


def test_rounds_take_turns_and_the_fastest_counts(tool, args, monkeypatch):
    speeds, measured = iter([5.0, 2.0, 1.0, 4.0, 3.0, 6.0]), []

    def measure_apart(args, size, model, resolution):
        measured.append(model)
        return tool.Row(size, model, resolution, next(speeds), 2**20)

    monkeypatch.setattr(tool, 'measure_apart', measure_apart)
    args.rounds, args.resolutions = 2, [32]
    rows = tool.run(args)
    assert measured == [tool.OURS, PLAIN, FLASH] * 2
    assert [(r.model, r.images_per_second) for r in rows] == [
        (tool.OURS, 5.0),
        (PLAIN, 3.0),
        (FLASH, 6.0),
    ]


def test_table_json_and_plot(tool, monkeypatch, tmp_path, capsys):
    """All of it in small, the figures in this process."""
    monkeypatch.setattr(tool, 'measure_apart', tool.measure)
    arguments = ['--device', 'cpu', '--resolutions', '32', '48', '--repeats', '1', '--train']
    arguments += ['--vrwkv6', '--memory-limit', '0', '--out', str(tmp_path)]
    assert tool.main(arguments) == 0
    content = json.loads((tmp_path / 'resolution.json').read_text())
    assert [row['model'] for row in content['rows']] == ['VRWKV', 'VRWKV6', PLAIN, FLASH] * 2
    assert all(row['images_per_second'] > 0 for row in content['rows'])
    assert content['settings']['step'] == 'training step'
    assert capsys.readouterr().out.count('| tiny |') == 8
    assert (tmp_path / 'resolution.png').stat().st_size > 10000


@pytest.mark.parametrize('runtime', ['compile', 'aotinductor'])
def test_compiled_models_are_right(tool, runtime):
    network, x = nn.Linear(3, 2).eval(), torch.randn(4, 3)
    with torch.no_grad():
        torch.testing.assert_close(tool.compiled(network, x, runtime)(x), network(x))


def test_a_figure_from_a_process_of_its_own(tool, args):
    """A model of 6M parameters in float32 takes 23 MiB, however large this process is."""
    args.repeats = 1
    _ = torch.ones(2**28)  # 1 GiB
    row = tool.measure_apart(args, 'tiny', tool.OURS, 32)
    assert row.images_per_second > 0 and not row.note
    assert 20 * 2**20 < row.memory < 2**30


@pytest.mark.parametrize(('timeout', 'figure'), [(100, 1), (40, 1 / 4)])
def test_two_passes_warm_up(tool, args, monkeypatch, timeout, figure):
    """The figure is the median of the passes after them, or the last of all if they take long."""
    passes = iter([8.0, 4.0, 1.0, 1.0])
    monkeypatch.setattr(tool, 'seconds', lambda *_: next(passes))
    monkeypatch.setattr(tool, 'keep_freed_memory', lambda: None)
    args.repeats, args.timeout = 2, timeout
    assert tool.measure(args, 'tiny', tool.OURS, 32).images_per_second == figure


def test_too_little_memory(tool, tmp_path):
    """The limit holds in the process of the figure, which says what happened."""
    arguments = ['--device', 'cpu', '--memory-limit', '0.01', '--out', str(tmp_path)]
    row = tool.measure_apart(tool.parse_args(arguments), 'tiny', tool.OURS, 224)
    assert row.note == 'out of memory' and row.images_per_second is None


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--resolutions', '8'], 'start at 16'),
        (['--sizes', 'huge'], 'invalid choice'),
        (['--peer', 'x=nowhere.py:f'], 'there is no file'),
        (['--runtime', 'aotinductor', '--train'], 'forward pass only'),
    ],
)
def test_wrong_arguments(tool, capsys, arguments, message):
    with pytest.raises(SystemExit):
        tool.main(arguments)
    assert message in capsys.readouterr().err
