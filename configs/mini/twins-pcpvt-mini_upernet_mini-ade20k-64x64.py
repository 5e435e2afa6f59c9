_base_ = 'slide-swin-mini_upernet_mini-ade20k-64x64.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmslide.TwinsPCPVT',
        arch=dict(
            embed_dims=[32, 64, 128, 192],
            depths=[1, 1, 2, 2],
            num_heads=[1, 2, 4, 6],
            mlp_ratios=[4, 4, 4, 4],
            sr_ratios=[8, 4, 2, 1],
        ),
        drop_path_rate=0.0,
        init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform'),
    )
)
