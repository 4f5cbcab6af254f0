_base_ = ['./adapter.py']

backbone = dict(
    # The image size of the pre-training on ImageNet-22K; forward resizes the position embedding.
    img_size=192,
    embed_dims=1024,
    depth=24,
    init_values=1e-5,
    post_norm=True,
    key_norm=True,
    drop_path_rate=0.4,
    deform_num_heads=16,
    deform_ratio=0.5,
    interaction_indexes=[[0, 5], [6, 11], [12, 17], [18, 23]],
    init_cfg=dict(
        checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_l_in22k_192.pth'
    ),
)
