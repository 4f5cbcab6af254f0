_base_ = ['./small.py']

model = dict(
    backbone=dict(embed_dims=768, drop_path_rate=0.5, init_values=1e-5),
    head=dict(in_channels=768),
)
