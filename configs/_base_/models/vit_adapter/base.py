_base_ = ['./adapter.py']

backbone = dict(
    embed_dims=768,
    num_heads=12,
    drop_path_rate=0.3,
    deform_num_heads=12,
    deform_ratio=0.5,
    init_cfg=dict(
        checkpoint='https://download.openmmlab.com/mmclassification/v0/deit/deit-base_pt-16xb64_in1k_20220216-db63c16c.pth'
    ),
)
