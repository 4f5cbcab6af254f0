_base_ = ['../vrwkv_adapter/base.py']

backbone = dict(
    type='VRWKV6Adapter',
    num_heads=12,
    init_cfg=dict(
        checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv6_b_in1k_224.pth'
    ),
)
