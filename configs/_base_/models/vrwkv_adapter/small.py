_base_ = ['./adapter.py']

backbone = dict(
    embed_dims=384,
    init_values=1e-5,
    post_norm=True,
    drop_path_rate=0.2,
    deform_num_heads=6,
    deform_ratio=1.0,
    init_cfg=dict(
        checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_s_in1k_224.pth'
    ),
)
