_base_ = ['./classifier.py']

model = dict(
    # The image size of the pre-training; forward resizes the position embedding.
    backbone=dict(
        img_size=192, embed_dims=1024, depth=24, init_values=1e-5, post_norm=True, key_norm=True
    ),
    head=dict(
        type='StackedLinearClsHead',
        in_channels=1024,
        mid_channels=[3072],
        act_cfg=dict(type='Tanh'),
    ),
)
