_base_ = [
    './upernet_vrwkv-adapter-tiny_8xb2-160k_ade20k-512x512.py',
    '../_base_/models/vrwkv6_adapter/tiny.py',
]

model = dict(backbone=_base_.pop('backbone'))
optim_wrapper = dict(type='OptimWrapper')  # upstream trains VRWKV6 in float32
