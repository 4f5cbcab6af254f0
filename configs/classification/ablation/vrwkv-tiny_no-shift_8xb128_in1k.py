# Table 5, "Variant 1": bidirectional attention without a token shift.
_base_ = ['../vrwkv-tiny_8xb128_in1k.py']

model = dict(backbone=dict(shift_mode='none'))
