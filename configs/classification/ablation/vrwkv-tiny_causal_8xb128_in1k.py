# Table 5, "Variant 3": Q-Shift with RWKV's own, causal attention.
_base_ = ['../vrwkv-tiny_8xb128_in1k.py']

model = dict(backbone=dict(causal=True))
