# Shared by all sizes. Configs take it with `_base_.pop('backbone')`, since mmengine does not merge
# the `model` of two bases.
backbone = dict(
    type='VRWKVAdapter',
    img_size=224,
    patch_size=16,
    depth=12,
    conv_inplane=64,
    n_points=4,
    cffn_ratio=0.25,
    interaction_indexes=[[0, 2], [3, 5], [6, 8], [9, 11]],
    init_cfg=dict(type='Pretrained', prefix='backbone.'),
)
