# The paper's Tiny. Configs of all tasks take it with `_base_.pop('backbone')`: mmengine does not
# merge the `model` of two bases.
backbone = dict(
    type='VRWKVAdapter',
    img_size=224,
    patch_size=16,
    embed_dims=192,
    depth=12,
    init_values=1.0,
    drop_path_rate=0.1,
    conv_inplane=64,
    n_points=4,
    deform_num_heads=6,
    deform_ratio=1.0,
    cffn_ratio=0.25,
    interaction_indexes=[[0, 2], [3, 5], [6, 8], [9, 11]],
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_t_in1k_224.pth',
        prefix='backbone.',
    ),
)
