_base_ = ['./classifier.py']

model = dict(backbone=dict(embed_dims=192, depth=12), head=dict(in_channels=192))
