import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmcv.cnn.bricks.scale import LayerScale
from mmengine.model import BaseModule
from torch import Tensor, nn


class PatchEmbed(BaseModule):
    """Non-overlapping patch embedding with norm and dropout: (B, H, W, C) to (B, H', W', embed_dims).

    Args:
        pad: whether to zero-pad sides that are not divisible by patch_size at the right and bottom; otherwise they are
            cropped.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dims: int,
        patch_size: int,
        pad: bool,
        norm_cfg: dict,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.stride = patch_size
        self.pad = pad
        self.projection = nn.Conv2d(in_channels, embed_dims, kernel_size=patch_size, stride=patch_size)
        self.norm = build_norm_layer(norm_cfg, embed_dims)[1]
        self.drop = nn.Dropout(drop_rate)

    def embed(self, x: Tensor) -> Tensor:
        if self.pad:
            x = pad_to_patches(x, self.stride)
        return self.norm(self.projection(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.embed(x))


class OverlappedPatchEmbed(BaseModule):
    """Overlapping patch embedding by a convolution on the zero-padded map, with norm and dropout.

    (B, H, W, in_channels) to (B, H', W', embed_dims) with H' = ⌊(H + 2 padding - kernel_size) / stride⌋ + 1.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dims: int,
        kernel_size: int,
        stride: int,
        padding: int,
        norm_cfg: dict,
        bias: bool = True,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.projection = nn.Conv2d(in_channels, embed_dims, kernel_size, stride, padding, bias=bias)
        self.norm = build_norm_layer(norm_cfg, embed_dims)[1]
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.projection(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))


class PatchMerging(BaseModule):
    """Swin's downsampling (arXiv 2103.14030, section 3.1): (B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, out_channels).

    The four pixels of a patch are concatenated column by column, as in the authors' code. Odd sides are padded with
    zeros.
    """

    stride = 2

    def __init__(self, in_channels: int, out_channels: int, norm_cfg: dict = dict(type='LN')) -> None:
        super().__init__()
        self.norm = build_norm_layer(norm_cfg, 4 * in_channels)[1]
        self.reduction = nn.Linear(4 * in_channels, out_channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # (B, H/2, row, W/2, column, C) to (B, H/2, W/2, column, row, C)
        patches = pad_to_patches(x, 2).unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(patches))


class Block(BaseModule):
    """A pre-norm transformer block around a token mixer: (B, H, W, C) to the same.

    Args:
        mixer: attention on (B, H, W, C).
        mlp: called with the map and the norm before it, see `MLP`.
        drop_path_rate: probability of dropping each of the two branches, drawn once per branch and image.
        layer_scale: initial value of a learned factor for each branch and channel (arXiv 2103.17239, section 2.1); 0
            for none.
    """

    def __init__(
        self,
        mixer: nn.Module,
        mlp: nn.Module,
        embed_dims: int,
        drop_path_rate: float = 0.0,
        norm_cfg: dict = dict(type='LN'),
        layer_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = build_norm_layer(norm_cfg, embed_dims)[1]
        self.attn = mixer
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = build_norm_layer(norm_cfg, embed_dims)[1]
        self.ffn = mlp
        self.scale1, self.scale2 = (
            LayerScale(embed_dims, scale=layer_scale) if layer_scale else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.scale1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.ffn(x, self.norm2)))


def pad_to_patches(x: Tensor, size: int) -> Tensor:
    """Pads (B, H, W, C) with zeros at the right and bottom to multiples of `size`."""
    # Not -W % size: with this form, PyTorch can prove divisibility when a dynamic size is exported.
    height, width = ((side + size - 1) // size * size for side in x.shape[1:3])
    return F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
