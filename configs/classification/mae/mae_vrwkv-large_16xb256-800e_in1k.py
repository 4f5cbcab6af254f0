# The rate is ours: neither paper nor upstream's code has one for Large. It is that of Base, as MAE
# has one for all sizes.
_base_ = ['./mae_vrwkv-base_8xb512-800e_in1k.py']

model = dict(
    backbone=dict(embed_dims=1024, depth=24),
    neck=dict(embed_dims=1024),
)

train_dataloader = dict(batch_size=256)
