_base_ = ['../vrwkv_adapter/small.py']

backbone = dict(
    type='VRWKV6Adapter',
    num_heads=6,
    init_cfg=dict(
        checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv6_s_in1k_224.pth'
    ),
)
