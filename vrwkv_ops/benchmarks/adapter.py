"""Times a whole VRWKV-Adapter with our deformable attention and with mmcv's PyTorch function.

Inference and a training step (forward and backward) of one image. The maps and the loss of both
must agree; otherwise no time is printed and the exit status is 1.

  python vrwkv_ops/benchmarks/adapter.py --resolutions 512
"""

import sys

import torch

from vrwkv.backbones import VRWKVAdapter
from vrwkv.layers import adapter
from vrwkv.mmcv_ops import serve_mmcv_ops
from vrwkv_ops import ms_deform_attn
from vrwkv_ops.benchmarking import (
    ArgumentParser,
    describe_environment,
    keep_freed_memory,
    markdown_table,
    time_calls,
    write_json,
)

serve_mmcv_ops()
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch  # noqa: E402

KERNELS = {'vrwkv_ops': ms_deform_attn, 'mmcv': multi_scale_deformable_attn_pytorch}
# Float32 through twelve layers and four exchanges.
BAR = 1e-3


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the results; return the exit status."""
    parser = ArgumentParser(__doc__, 'benchmarks')
    args = parser.parse_args(argv)
    facts = describe_environment(args.device)
    rows = []
    for resolution in args.resolutions:
        torch.manual_seed(0)
        model = VRWKVAdapter(
            img_size=512,
            embed_dims=192,
            depth=12,
            init_values=1.0,
            init_values_inject=0.5,
            deform_num_heads=6,
            norm_cfg=dict(type='BN'),
        ).to(args.device)
        x = torch.randn(args.batch_size, 3, resolution, resolution, device=args.device)

        def infer(function, model=model, x=x):
            adapter.ms_deform_attn = function
            model.eval()
            with torch.no_grad():
                return model(x)

        def train(function, model=model, x=x):
            adapter.ms_deform_attn = function
            model.train().zero_grad()
            loss = sum(y.square().mean() for y in model(x))
            loss.backward()
            return [loss.detach()]

        for name, run in (('inference', infer), ('training', train)):
            results = {kernel: run(function) for kernel, function in KERNELS.items()}
            for ours, theirs in zip(*results.values(), strict=True):
                if not (ours - theirs).norm() <= BAR * theirs.norm():
                    sys.stderr.write(f'{name} at {resolution}: the results differ; no time\n')
                    return 1
            calls = {
                kernel: lambda function=function, run=run: run(function)
                for kernel, function in KERNELS.items()
            }
            seconds = time_calls(calls, args.device, args.repeats, patience=5.0)
            rows.append((resolution, name, seconds['mmcv'], seconds['vrwkv_ops']))
    header = ('pixels', 'pass', "mmcv's PyTorch (ms)", 'vrwkv_ops (ms)', 'gain')
    cells = [
        (str(r), name, f'{1e3 * a:.1f}', f'{1e3 * b:.1f}', f'{a / b:.2f}') for r, name, a, b in rows
    ]
    sys.stdout.write('\n'.join(f'{k}: {v}' for k, v in facts.items()) + '\n\n')
    sys.stdout.write(markdown_table(header, cells) + '\n')
    write_json(args.out / 'adapter.json', dict(environment=facts, rows=rows))
    return 0


if __name__ == '__main__':
    keep_freed_memory()
    sys.exit(main())
