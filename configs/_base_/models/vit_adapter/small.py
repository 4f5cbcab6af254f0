_base_ = ['./adapter.py']

backbone = dict(
    embed_dims=384,
    num_heads=6,
    drop_path_rate=0.2,
    deform_num_heads=6,
    deform_ratio=1.0,
    init_cfg=dict(
        checkpoint='https://download.openmmlab.com/mmclassification/v0/deit/deit-small_pt-4xb256_in1k_20220218-9425b9bb.pth'
    ),
)
