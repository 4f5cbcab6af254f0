# Table 5, "Variant 2": bidirectional attention with RWKV's own token shift.
_base_ = ['../vrwkv-tiny_8xb128_in1k.py']

model = dict(backbone=dict(shift_mode='single_shift'))
