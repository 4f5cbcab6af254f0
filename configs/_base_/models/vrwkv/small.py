_base_ = ['./classifier.py']

model = dict(
    backbone=dict(embed_dims=384, depth=12, drop_path_rate=0.3, init_values=1, post_norm=True),
    head=dict(in_channels=384),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
