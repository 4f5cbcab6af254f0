_base_ = ['./classifier.py']

model = dict(
    backbone=dict(embed_dims=768, depth=12, drop_path_rate=0.5, init_values=1e-5, post_norm=True),
    head=dict(in_channels=768),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
