_base_ = ['./adapter.py']

# From scratch, for the digits and the photographs. A config adds sizes, width, heads and norm.
backbone = dict(
    depth=4,
    init_values=1.0,
    drop_path_rate=0.0,
    conv_inplane=32,
    deform_ratio=1.0,
    interaction_indexes=[[0, 0], [1, 1], [2, 2], [3, 3]],
    init_cfg=None,
)
