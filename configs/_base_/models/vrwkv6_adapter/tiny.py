_base_ = ['../vrwkv_adapter/tiny.py']

backbone = dict(
    type='VRWKV6Adapter',
    num_heads=3,
    init_cfg=dict(
        checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv6_t_in1k_224.pth'
    ),
)
