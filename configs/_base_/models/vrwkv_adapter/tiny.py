_base_ = ['./adapter.py']

backbone = dict(
    embed_dims=192,
    init_values=1.0,
    drop_path_rate=0.1,
    deform_num_heads=6,
    deform_ratio=1.0,
    init_cfg=dict(
        checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_t_in1k_224.pth'
    ),
)
