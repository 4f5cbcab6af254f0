_base_ = ['./vrwkv-nano_1xb50-100e_digits-100.py']

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/mae_vrwkv-nano_1xb64-30e_digits/epoch_30.pth',
            prefix='backbone.',
        ),
    ),
)
