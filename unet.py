"""A small U-Net after Ho et al. 2020, App. B (arXiv 2006.11239): eps for ddpm_min.py.

    model = UNet(channels=3, width=32, classes=10)
    eps = model(x_t, t, y)              # x_t (B, 3, H, W), t and y int64 (B,)

Beside App. B: space-to-depth stands for the finest level, there is one block a level on
the way down and one in the middle, AdaGN scales and shifts where t's embedding is added
there, attention with several heads sits at H/4 only, pixel shuffle resamples upwards,
norms have 8 groups, and there is no dropout.
"""
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import nn


class ResBlock(nn.Module):
    """x (B, c_in, H, W), emb (B, c_emb) -> (B, c_out, H, W); c_in, c_out % 8 == 0.
    emb scales and shifts: AdaGN (Dhariwal & Nichol 2021, Sec. 3.1)."""

    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb):
        emb = self.emb(emb)[:, :, None, None]
        scale, shift = emb.chunk(2, 1)
        h = F.silu(self.norm1(x))
        h = self.conv1(h)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(F.silu(h))
        return self.shortcut(x) + h


class UNet(nn.Module):
    """eps (B, channels, H, W) of x (B, channels, H, W), H and W divisible by 4, at t,
    int64 (B,). y: int64 (B,), labels below classes; -1, or no y, is the null label.
    width: of the finest level, a multiple of 8. ValueError for what does not fit, but
    not for values of y on a GPU, where CUDA stops."""

    def __init__(self, channels=1, width=48, classes=0):
        super().__init__()
        if not isinstance(channels, Integral) or channels < 1:
            raise ValueError(f"want channels an int above 0, got {channels!r:.40}")
        if not isinstance(width, Integral) or width < 8 or width % 8:
            raise ValueError(f"want width a multiple of 8, got {width!r:.40}")
        if not isinstance(classes, Integral) or classes < 0:
            raise ValueError(f"want classes an int, 0 or more, got {classes!r:.40}")
        self.channels = channels = int(channels)
        self.classes = classes = int(classes)
        w = int(width)
        c_emb = 4 * w
        self.time1 = nn.Linear(64, c_emb)
        self.time2 = nn.Linear(c_emb, c_emb)
        self.label = nn.Embedding(classes + 1, c_emb)           # row 0: null
        self.stem = nn.Conv2d(4 * channels, w, 3, padding=1)
        self.encode1 = ResBlock(w, w, c_emb)
        self.down = nn.Conv2d(w, 2 * w, 3, stride=2, padding=1)
        self.encode2 = ResBlock(2 * w, 2 * w, c_emb)
        self.attention_norm = nn.GroupNorm(8, 2 * w)
        self.attention = nn.MultiheadAttention(2 * w, w // 8, batch_first=True)
        self.middle = ResBlock(2 * w, 2 * w, c_emb)
        self.decode2 = ResBlock(4 * w, 2 * w, c_emb)
        self.up = nn.Conv2d(2 * w, 4 * w, 1)
        self.decode1 = ResBlock(2 * w, w, c_emb)
        self.decode0 = ResBlock(2 * w, w, c_emb)
        self.norm_out = nn.GroupNorm(8, w)
        self.out = nn.Conv2d(w, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.attention.out_proj.weight)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def embed(self, t, y):
        """t and y, int64 (B,), as one vector each, (B, 4 width)."""
        # Sines and cosines of t (Vaswani et al. 2017, Sec. 3.5). Always in float32:
        # bfloat16 cannot tell t = 999 from 1000.
        exponent = torch.arange(32, dtype=torch.float32, device=t.device) / 32
        angle = t[:, None] / 10000**exponent
        waves = torch.cat([angle.sin(), angle.cos()], 1)        # (B, 64)
        h = F.silu(self.time1(waves.to(self.out.weight.dtype)))
        try:
            label = self.label(y + 1)
        except IndexError as error:
            raise ValueError(f"want y in -1..{self.classes - 1}") from error
        return F.silu(self.time2(h) + label)

    def forward(self, x, t, y=None):
        self._check(x, t, t if y is None else y)
        y = torch.full_like(t, -1) if y is None else y
        emb = self.embed(t, y)
        h0 = self.stem(F.pixel_unshuffle(x.to(emb.dtype), 2))   # (B, w, H/2, W/2)
        h1 = self.encode1(h0, emb)
        h2 = self.encode2(self.down(h1), emb)                   # (B, 2w, H/4, W/4)
        tokens = self.attention_norm(h2).flatten(2)             # (B, 2w, HW/16)
        tokens = tokens.transpose(1, 2)
        tokens, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        h = h2 + tokens.transpose(1, 2).reshape(h2.shape)
        h = self.middle(h, emb)
        h = self.decode2(torch.cat([h, h2], 1), emb)
        h = F.pixel_shuffle(self.up(h), 2)                      # (B, w, H/2, W/2)
        h = self.decode1(torch.cat([h, h1], 1), emb)
        h = self.decode0(torch.cat([h, h0], 1), emb)
        h = F.silu(self.norm_out(h))
        h = self.out(h)                                         # (B, 4C, H/2, W/2)
        return F.pixel_shuffle(h, 2).to(x.dtype)                # (B, C, H, W)

    def _check(self, x, t, y):
        """ValueError unless x, t and y fit the network and each other."""
        if not torch.is_tensor(x) or x.dim() != 4 or not x.is_floating_point():
            raise ValueError("want x a tensor of floats (B, C, H, W)")
        B, C, H, W = x.shape
        if C != self.channels or H % 4 or W % 4 or not x.numel():
            want = f"(B, {self.channels}, H, W), H and W divisible by 4"
            raise ValueError(f"want x {want}, got {tuple(x.shape)}")
        for name, value in (("t", t), ("y", y)):
            int64 = torch.is_tensor(value) and value.dtype == torch.int64
            if not int64 or value.shape != (B,):
                raise ValueError(f"want {name} int64 ({B},), got {value!r:.60}")
