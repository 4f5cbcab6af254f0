"""Runs the Triton kernels in Triton's interpreter, on CPU tensors, for backends.py.

The interpreter takes some 10 ms a program whatever its tile holds: tiles are small here.
"""

import functools
import io
import os
import sys
from multiprocessing.connection import Connection

import numpy as np
import torch

if os.environ.get('TRITON_INTERPRET') != '1':
    raise RuntimeError('Set TRITON_INTERPRET=1 before Python starts')

import triton.language as tl
from triton.runtime import interpreter

from vrwkv_ops import triton as backend
from vrwkv_ops.triton import bi_wkv, bi_wkv6, ms_deform_attn, pointwise, token_shift

CHOOSE_TILING = bi_wkv.choose_tiling


def use_tiles(*tiling: int) -> None:
    """Sets a tile's tokens and channels and how many tiles join at a time; none: real ones."""
    bi_wkv.choose_tiling = (lambda *_: bi_wkv.Tiling(*tiling)) if tiling else CHOOSE_TILING


def behave_like_gpus() -> None:
    """Rounds to the nearest bfloat16, and lets min and max pass over NaN.

    The interpreter cuts off the bits that do not fit, and its min and max of NaN are NaN. That the
    compiler rounds to nearest is shown by test_triton.py.
    """
    cut = interpreter._convert_float

    def convert(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut(data, source, target, mode)
        return torch.from_numpy(data.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = convert
    for name, function in (('create_minnumf', np.fmin), ('create_maxnumf', np.fmax)):
        operation = functools.partialmethod(interpreter.InterpreterBuilder.binary_op, op=function)
        setattr(interpreter.InterpreterBuilder, name, operation)


def save_time() -> None:
    """Replaces the slowest parts of the interpreter.

    It patches Triton's language at each call of a helper, although the launch did so already, and
    scans element by element. GPUs scan in a tree, which shows whether joining is associative;
    giving it the later element first shows whether it is commutative.
    """

    def scan(self, inputs):
        parts = [x.handle.data for x in inputs]
        row = np.arange(len(parts[0]))[:, None]
        for step in (1 << i for i in range((len(row) - 1).bit_length())):
            earlier, later = (
                [self.to_tensor(part, x.dtype) for part, x in zip(side, inputs, strict=True)]
                for side in ([np.roll(part, step, axis=0) for part in parts], parts)
            )
            joined = self.combine_fn.fn(*later, *earlier)
            parts = [
                np.where(row < step, part, x.handle.data)
                for part, x in zip(parts, joined, strict=True)
            ]
        return [self.to_tensor(part, x.dtype) for part, x in zip(parts, inputs, strict=True)]

    # The language, through a kernel's globals, and its core, through those of tl.sum.
    for function in (bi_wkv.join_tiles, tl.sum):
        interpreter._patch_lang(function.fn)
    interpreter.ScanOps.generic_scan = scan
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(
        *args, **kwargs
    )


def serve(connection: Connection) -> None:
    """Answers calls until the other side closes the connection."""
    functions = {**backend._operators(), 'use_tiles': use_tiles}
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        name, args, is_deterministic = torch.load(io.BytesIO(request), weights_only=True)
        torch.use_deterministic_algorithms(is_deterministic)  # then new memory is full of NaN
        try:
            answer = ('result', functions[name](*args))
        except Exception as error:  # the caller raises it
            answer = (type(error).__name__, str(error))
        reply = io.BytesIO()
        torch.save(answer, reply)
        connection.send_bytes(reply.getvalue())


if __name__ == '__main__':
    behave_like_gpus()
    save_time()
    use_tiles(8, 4, 2)
    token_shift._BLOCKS = dict(BLOCK_T=8, BLOCK_C=16)
    pointwise._BLOCK = 64
    bi_wkv6._CHUNK = 2
    ms_deform_attn._ELEMENTS = 512
    serve(Connection(int(sys.argv[1])))
