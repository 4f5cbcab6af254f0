"""The CUDA kernels, run on the CPU by an emulator: what a machine without a GPU can show.

It compiles csrc/*/cuda.cu for the CPU, with cuda_emulator.h in the place of CUDA's headers and its
launches replaced. Threads, barriers, shared memory and its limits are those of CUDA; times, warps
and races within a phase are not.
"""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from vrwkv_ops import bi_wkv, pointwise, shift

from .dense_bi_wkv import dense_with_gradients

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / 'vrwkv_ops' / 'csrc'
HEADERS = (
    *('ATen/cuda/CUDAContext.h', 'c10/cuda/CUDAException.h', 'c10/cuda/CUDAGuard.h'),
    'cuda_pipeline.h',
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
NAMES = ('y', 'gw', 'gu', 'gk', 'gv')
H100 = 227  # KiB of shared memory for a block


def emulated(source: str) -> str:
    """The source of kernels with what no macro can express replaced."""
    source, launches = re.subn(
        r'([\w:]+(?:<[^;<>]*>)?)<<<(.*?)>>>\((.*?)\);',
        r'emulator::launch(\2, [&] { \1(\3); });',
        source,
        flags=re.DOTALL,
    )
    assert launches and '<<<' not in source
    source = source.replace(
        'extern __shared__ __align__(16) unsigned char memory[];',
        'auto* const memory = emulator::dynamic_memory;',
    )
    careful = r'__device__ __noinline__ (void careful_\w+\(.*?\) \{)'
    source = re.sub(careful, r'\1 ++emulator::careful_calls;', source)
    return '#include "cuda_emulator.h"\n' + source


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    """The operators of csrc/*/cuda.cu, for tensors on the CPU."""
    folder = tmp_path_factory.mktemp('emulated')
    for name in HEADERS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#include "cuda_emulator.h"\n')
    sources = {HERE / 'cuda_emulator.cpp': CSRC}  # and the folder of their headers
    for source in sorted(CSRC.glob('*/cuda.cu')):
        copy = folder / f'{source.parent.name}.cpp'
        copy.write_text(emulated(source.read_text()))
        sources[copy] = source.parent
    compiler = cpp_extension.get_cxx_compiler()
    paths = (folder, HERE, *cpp_extension.include_paths())
    # CUDA fuses multiply-adds, which exponents rely on.
    flags = ['-std=c++20', '-O1', '-fPIC', '-w', '-DVRWKV_HAS_FMA=1']
    flags += [f'-I{path}' for path in paths]

    def compile_file(source: Path) -> str:
        headers = f'-I{sources[source]}'
        target = str(folder / f'{source.stem}.o')
        command = [compiler, *flags, headers, '-c', str(source), '-o', target]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        return command[-1]

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_file, sources))
    file = str(folder / 'emulated.so')
    libraries = [*(f'-L{path}' for path in cpp_extension.library_paths()), '-ltorch_cpu', '-lc10']
    subprocess.run([compiler, '-shared', *objects, *libraries, '-o', file], check=True)
    torch.ops.load_library(file)
    return torch.ops.vrwkv_emulated


@pytest.fixture(autouse=True)
def device(library):
    """Set the device's shared memory in KiB, and the order of threads; an H100's to begin with."""

    def set_device(kib=H100, is_reversed=False):
        library.set_device(kib << 10, is_reversed)

    set_device()
    library.take_counts()
    return set_device


def run(library, w, u, k, v, gy, causal=False):
    """Output and gradients of w, u, k and v, as vrwkv_ops.bi_wkv computes them on CUDA.

    Also whether the careful way was taken, forward and backward.
    """
    y, residual, z = library.bi_wkv_forward(w, u, k, v, causal, True)
    forward, _ = library.take_counts()
    gw, gu, gk, gv = library.bi_wkv_backward(gy, w, u, k, v, y, residual, z, causal)
    backward, _ = library.take_counts()
    return (y, gw, gu, gk, gv), (forward > 0, backward > 0)


def make_inputs(shape, dtype=torch.float32, k_max=3.0, w_total=5.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v, gy = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    k = (k * k_max / 3).clamp(-k_max, k_max)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    w = torch.tensor([1.0, 0.0, -0.5]).repeat(shape[2])[: shape[2]] * w_total / shape[1]
    u = torch.randn(shape[2], generator=generator)
    return w.to(accumulation), u.to(accumulation), *(x.to(dtype) for x in (k, v, gy))


def cpu_errors(w, u, k, v, gy, causal, truths):
    """Norms of the errors of the CPU kernels."""
    leaves = [x.clone().requires_grad_() for x in (w, u, k, v)]
    y = bi_wkv(*leaves, causal=causal)
    results = (y.detach(), *torch.autograd.grad(y, leaves, gy))
    errors = ((x.double() - truth).norm() for x, truth in zip(results, truths, strict=True))
    return dict(zip(NAMES, errors, strict=True))


def check(results, inputs, causal):
    """The bars of test_bi_wkv.py: float32's, and rounding once for half types."""
    dtype, gy = inputs[2].dtype, inputs[4]
    truths = dense_with_gradients(*inputs, causal)
    of_cpu = cpu_errors(*inputs, causal, truths)
    for name, got, expected in zip(NAMES, results, truths, strict=True):
        rounding = (expected.to(got.dtype).double() - expected).norm()
        bar = 1e-5 if dtype.itemsize == 4 or name in ('y', 'gv') else 3e-5
        if dtype == torch.float64:
            bar = 1e-12
        # A sum may be 0.
        bar = bar * max(expected.norm(), 0.1 * gy.double().norm() if gy.shape[1] <= 2 else 0)
        if name in ('gw', 'gu'):  # sums that may cancel: as far as float32 leaves the CPU's
            bar = max(bar, 2 * of_cpu[name])
        assert (got.double() - expected).norm() <= 1.001 * rounding + bar, name


# Tokens, largest key, decay over the sequence, KiB of shared memory, and whether weights lie too
# far apart for one exponent, in the forward pass and in the backward one (None: in one direction).
CASES = {
    'shorter chunk': (31, 8, 8, H100, (False, False)),
    'one tile': (196, 8, 5, H100, (False, False)),
    'full tile': (256, 8, -5, H100, (False, False)),
    'shorter tile': (261, 3, 5, H100, (False, False)),
    'one warp': (45, 3, -5, 12, (False, False)),
    'more tiles than segments': (1100, 8, 30, 24, (False, False)),
    'growth': (1024, 8, -30, 99, (False, False)),
    'far keys': (1000, 30, 30, H100, (True, False)),
    'far keys, growth': (33, 30, -30, H100, (True, None)),
}


@pytest.mark.parametrize('causal', [False, True], ids=['bi', 'causal'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize(('tokens', 'k_max', 'w_total', 'kib', 'is_far'), CASES.values(), ids=CASES)
def test_equals_dense(library, device, tokens, k_max, w_total, kib, is_far, dtype, causal):
    if dtype != torch.float32:  # as in test_bi_wkv.py
        w_total = max(min(w_total, 8), -8)
    device(kib)
    inputs = make_inputs((2, tokens, 3), dtype, k_max, w_total)
    results, careful = run(library, *inputs, causal)
    assert all(took is far for took, far in zip(careful, is_far, strict=True) if far is not None)
    check(results, inputs, causal)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('causal', [False, True], ids=['bi', 'causal'])
@pytest.mark.parametrize(
    'shape',
    [
        *((1, 1, 1), (3, 2, 7), (1, 33, 31), (2, 197, 33)),
        # Whole blocks of 32 channels in aligned rows, a tile and one token more, a rest of 8.
        *((2, 196, 64), (1, 257, 32), (1, 300, 40)),
    ],
)
def test_sizes(library, shape, dtype, causal):
    inputs = make_inputs(shape, dtype, w_total=0.5)
    check(run(library, *inputs, causal)[0], inputs, causal)


def _transposed(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _every_second(x):
    return x.repeat_interleave(2, 2)[..., ::2]


def _off_by_one(x):
    """Contiguous, but no address is a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize('layout', [_transposed, _every_second, _off_by_one])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
def test_layouts_do_not_matter(library, layout, dtype):
    w, u, *dense = make_inputs((2, 100, 64), dtype)
    expected, _ = run(library, w, u, *dense)
    results, _ = run(library, w, u, *map(layout, dense))
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize('k_max', [3, 100], ids=['fast', 'careful'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
def test_order_of_threads_does_not_matter(library, device, dtype, k_max):
    """A barrier that is missing lets a thread read what another has not written yet."""
    inputs = make_inputs((2, 600, 40), dtype, k_max)
    expected, _ = run(library, *inputs)
    device(is_reversed=True)
    results, _ = run(library, *inputs)
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize(('tokens', 'kernels'), [(196, 1), (256, 1), (257, 3)])
def test_a_short_sequence_takes_one_kernel(library, tokens, kernels):
    """And one that makes the table of decays."""
    w, u, k, v, gy = make_inputs((2, tokens, 32))
    y, residual, z = library.bi_wkv_forward(w, u, k, v, False, True)
    assert library.take_counts()[1] == 1 + kernels
    library.bi_wkv_backward(gy, w, u, k, v, y, residual, z, False)
    assert library.take_counts()[1] == 1 + kernels


EXTREMES = {
    'fast decay': (500, 3, 2000, 0, (True, True)),
    'fast growth': (500, 3, -2000, 0, (True, True)),
    'at the limits of one exponent': (256, 3, 330, 0, (False, False)),
    'growth at the limits of one exponent': (256, 3, -330, 0, (False, False)),
    'large bonus': (196, 3, 5, 30, (False, True)),
    'small bonus': (196, 3, 5, -20, (False, False)),
}


@pytest.mark.parametrize('causal', [False, True], ids=['bi', 'causal'])
@pytest.mark.parametrize(
    ('tokens', 'k_max', 'w_total', 'bonus', 'is_far'), EXTREMES.values(), ids=EXTREMES
)
def test_equals_cpu_kernels(library, device, tokens, k_max, w_total, bonus, is_far, causal):
    """Beyond the range in which errors are held to 1e-5, they grow no faster than exponents."""
    device(48)
    w, u, k, v, gy = make_inputs((2, tokens, 3), k_max=k_max, w_total=w_total)
    inputs = w, u + bonus, k, v, gy
    results, careful = run(library, *inputs, causal)
    assert careful == is_far
    check_like_cpu(results, inputs, causal)


def test_jump_of_keys(library):
    """Products of e^k and e^(-z) that no float holds, of tokens that do not see each other."""
    w, u, k, v, gy = make_inputs((1, 45, 3))
    inputs = w, u, k + torch.where(torch.arange(45) < 7, -60.0, 60.0).view(1, -1, 1), v, gy
    results, careful = run(library, *inputs, causal=True)
    assert careful == (True, True)
    check_like_cpu(results, inputs, True)


@pytest.mark.parametrize('causal', [False, True], ids=['bi', 'causal'])
@pytest.mark.parametrize('w_step', [0.5, 0.05, -0.5, -1.3])
@pytest.mark.parametrize(('first', 'last'), [(30, 70), (43, 51), (0, 100), (20, 21)])
def test_both_ways_meet(library, device, first, last, w_step, causal):
    """States pass between the fast way and the careful one, within a tile and between tiles."""
    w, u, k, v, gy = make_inputs((2, 140, 3), k_max=10)
    k[:, first:last] += 40
    inputs = w * 0 + torch.tensor([1.0, 0.3, -0.2]) * w_step, u, k, v, gy
    for kib in (H100, 24):
        device(kib)
        results, _ = run(library, *inputs, causal)
        check_like_cpu(results, inputs, causal)


def check_like_cpu(results, inputs, causal):
    truths = dense_with_gradients(*inputs, causal)
    of_cpu = cpu_errors(*inputs, causal, truths)
    w, _, k, *_ = inputs
    far = max(1, k.abs().max() / 30, w.abs().max() * k.shape[1] / 30)
    for name, got, expected in zip(NAMES, results, truths, strict=True):
        # What exponents of this size allow; more for gw, a sum over all pairs that cancels.
        bar = max(2 * of_cpu[name], far * (3e-5 if name == 'gw' else 1e-5) * expected.norm())
        assert (got.double() - expected).norm() <= bar, name


def test_long_sequence(library):
    """Many tiles in each segment; against the CPU kernels, which others hold to float64."""
    inputs = make_inputs((1, 20000, 2))
    results, careful = run(library, *inputs)
    assert careful == (False, False)
    *leaves, gy = inputs
    leaves = [x.requires_grad_() for x in leaves]
    y = bi_wkv(*leaves)
    for got, want in zip(results, (y, *torch.autograd.grad(y, leaves, gy)), strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize('which', [2, 3], ids=['k', 'v'])
def test_not_a_number(library, which):
    """A NaN comes out of its own channel only."""
    inputs = make_inputs((1, 40, 3))
    inputs[which][0, 7, 1] = torch.nan
    (y, _, _, gk, gv), _ = run(library, *inputs)
    for x in (y, gk, gv):
        assert x[..., [0, 2]].isfinite().all()
        assert x[..., 1].isnan().all() or (which == 3 and x is gv)  # which v does not enter


def test_largest_values(library):
    """Sums of nearly the largest floats stay finite; equal values come out as they are."""
    k, gy = torch.zeros(2, 1, 300, 3)
    v = torch.full_like(k, 0.99 * torch.finfo(torch.float32).max)
    w, u = torch.tensor([0.01, -0.05, -1.3]), torch.tensor([0.0, 20.0, 0.0])
    (y, *_), careful = run(library, w, u, k, v, gy)
    assert not careful[0]
    # A few roundings of the sums.
    torch.testing.assert_close(y, v, rtol=2e-6, atol=0)


# --- Token shifts and element-wise functions --------------------------------------------------


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(
    ('channels', 'layout'),
    [(64, torch.clone), (64, _off_by_one), (64, _every_second), (10, torch.clone)],
    ids=['wide', 'off by one', 'strided', 'few'],
)
@pytest.mark.parametrize(
    ('height', 'width', 'step', 'mode'),
    [
        (5, 7, 1, 'q_shift'),
        (9, 9, 3, 'q_shift'),
        (1, 30, 1, 'single_shift'),
        (1, 30, 2, 'double_shift'),
    ],
)
def test_token_shift(library, height, width, step, mode, channels, layout, dtype):
    """Against PyTorch's slices in float64, rounded once."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(4, 3, height * width, channels, generator=generator, dtype=torch.float64)
    x, *grads = (layout(t.to(dtype)) for t in dense)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    mixes = torch.rand(3, channels, generator=generator).to(accumulation)
    grid = (height, width, step, 0.25, mode)
    results = [
        *library.token_shift(x, mixes, *grid),
        *library.token_shift_backward(grads, x, mixes, *grid),
    ]
    wide = x.double(), mixes.double()
    truths = [
        *shift.forward(*wide, *grid),
        *shift.backward([grad.double() for grad in grads], *wide, *grid),
    ]
    for got, expected in zip(results, truths, strict=True):
        rounding = (expected.to(got.dtype).double() - expected).norm()
        bar = 1e-14 if dtype == torch.float64 else 1e-6  # a few roundings of the accumulation type
        assert (got.double() - expected).norm() <= 1.001 * rounding + bar * expected.norm()
    if mode == 'q_shift':
        moved = library.q_shift(x, height, width, step, 0.25, False)
        assert torch.equal(moved, shift.shift_slices(x, *grid))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('count', [1, 1003])
@pytest.mark.parametrize('layout', [torch.clone, _off_by_one], ids=['aligned', 'off by one'])
def test_pointwise(library, count, layout, dtype):
    """Against PyTorch's operators in float64, rounded once."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(3, count, generator=generator, dtype=torch.float64)
    grad, r, x = (layout(t.to(dtype)) for t in dense)
    wide = [t.double() for t in (grad, r, x)]
    results = [
        library.squared_relu(x),
        library.squared_relu_backward(grad, x),
        library.sigmoid_gate(r, x),
        *library.sigmoid_gate_backward(grad, r, x),
    ]
    truths = [
        pointwise.squared_relu(wide[2]),
        pointwise.squared_relu_backward(wide[0], wide[2]),
        pointwise.sigmoid_gate(*wide[1:]),
        *pointwise.sigmoid_gate_backward(*wide),
    ]
    for got, expected in zip(results, truths, strict=True):
        rounding = (expected.to(dtype).double() - expected).norm()
        bar = 1e-14 if dtype == torch.float64 else 1e-6
        assert (got.double() - expected).norm() <= 1.001 * rounding + bar * expected.norm()
