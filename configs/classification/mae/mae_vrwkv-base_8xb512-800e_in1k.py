_base_ = ['../../_base_/recipes/mae_800e_in1k.py']

model = dict(
    backbone=dict(embed_dims=768, depth=12),
    neck=dict(embed_dims=768),
)

optim_wrapper = dict(optimizer=dict(lr=1.5e-4 * 4096 / 256, weight_decay=0.05))
