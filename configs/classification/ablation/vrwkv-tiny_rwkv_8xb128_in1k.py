# Table 5, "RWKV": RWKV's own token shift and causal attention.
_base_ = ['../vrwkv-tiny_8xb128_in1k.py']

model = dict(backbone=dict(shift_mode='single_shift', causal=True))
