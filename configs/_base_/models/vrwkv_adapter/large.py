_base_ = ['./base.py']

backbone = dict(
    # Of the pre-training on ImageNet-22K; the position embedding is resized in forward.
    img_size=192,
    embed_dims=1024,
    depth=24,
    key_norm=True,
    drop_path_rate=0.4,
    deform_num_heads=16,
    interaction_indexes=[[0, 5], [6, 11], [12, 17], [18, 23]],
    init_cfg=dict(
        checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_l_in22k_192.pth'
    ),
)
