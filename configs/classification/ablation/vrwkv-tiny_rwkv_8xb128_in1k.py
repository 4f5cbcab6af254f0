# Table 5, "RWKV": the previous token of the sequence only, in the shift and in attention.
_base_ = ['../vrwkv-tiny_8xb128_in1k.py']

model = dict(backbone=dict(shift_mode='single_shift', causal=True))
