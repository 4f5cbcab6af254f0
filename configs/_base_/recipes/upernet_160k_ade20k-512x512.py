# UperNet on ADE20K: 160,000 iterations, batches of 16 crops of 512 x 512 pixels. A config adds the
# backbone, the learning rate, the weight decay and the layer decay.
_base_ = [
    '../models/upernet_adapter.py',
    '../datasets/ade20k_512x512.py',
    '../schedules/schedule_160k_adamw_layer-decay.py',
    '../default_runtime_seg.py',
]
