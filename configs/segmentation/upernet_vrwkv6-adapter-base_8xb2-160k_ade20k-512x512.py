_base_ = [
    '../_base_/recipes/upernet_160k_ade20k-512x512.py',
    '../_base_/models/vrwkv6_adapter/base.py',
]

model = dict(
    backbone=_base_.pop('backbone'),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)

optim_wrapper = dict(
    type='OptimWrapper',  # upstream trains VRWKV6 in float32
    optimizer=dict(lr=6e-5, weight_decay=0.01),
    paramwise_cfg=dict(layer_decay_rate=0.8),
)
