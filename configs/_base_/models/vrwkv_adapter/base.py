_base_ = ['./adapter.py']

backbone = dict(
    embed_dims=768,
    init_values=1e-5,
    post_norm=True,
    drop_path_rate=0.3,
    deform_num_heads=12,
    deform_ratio=0.5,
    init_cfg=dict(
        checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_b_in1k_224.pth'
    ),
)
