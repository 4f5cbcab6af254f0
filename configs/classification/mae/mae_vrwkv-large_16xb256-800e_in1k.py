# Neither the paper nor upstream's code has a learning rate for Large. This one is ours: the rate of
# Base, since MAE has one rate for all sizes.
_base_ = ['../../_base_/recipes/mae_800e_in1k.py']

model = dict(
    backbone=dict(embed_dims=1024, depth=24),
    neck=dict(embed_dims=1024),
)

train_dataloader = dict(batch_size=256)

optim_wrapper = dict(optimizer=dict(lr=1.5e-4 * 4096 / 256, weight_decay=0.05))
