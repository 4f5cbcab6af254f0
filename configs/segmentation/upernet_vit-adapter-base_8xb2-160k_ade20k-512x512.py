_base_ = [
    './upernet_vit-adapter-small_8xb2-160k_ade20k-512x512.py',
    '../_base_/models/vit_adapter/base.py',
]

model = dict(
    backbone=_base_.pop('backbone'),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.8))
