_base_ = ['./tiny.py']

backbone = dict(
    embed_dims=384,
    init_values=1e-5,
    post_norm=True,
    drop_path_rate=0.2,
    init_cfg=dict(
        checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_s_in1k_224.pth'
    ),
)
