_base_ = 'cascade-mask-rcnn_slide-pvt-mini_fpn_mini-coco.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmslide.TwinsSVT',
        arch=dict(
            embed_dims=[48, 96, 160, 256],
            depths=[2, 2, 2, 2],
            num_heads=[2, 4, 5, 8],
            mlp_ratios=[4, 4, 4, 4],
            sr_ratios=[8, 4, 2, 1],
        ),
        drop_path_rate=0.0,
        init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform'),
    )
)
