"""How uncertain the network is at a noise level, learned beside it."""

import torch
from torch import Tensor, nn


class Uncertainty(nn.Module):
    """u(t) = a linear layer on random Fourier features of -log SNR / 8, 0 at first (arXiv:2312.02696, appendix B).

    On EDM that is c_noise, as published.

    Minimising w e / exp(u) + u makes exp(u) the expected w e, so that all noise levels count alike.

    Args:
        channels: the number of Fourier features.
        bandwidth: the standard deviation of their frequencies.
    """

    frequency: Tensor
    phase: Tensor

    def __init__(self, channels: int = 128, bandwidth: float = 1.0):
        super().__init__()
        if channels < 1 or not bandwidth > 0:
            raise ValueError(f"objective.uncertainty: channels={channels} and bandwidth={bandwidth} must be positive")
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequency", 2 * torch.pi * bandwidth * torch.randn(channels, generator=generator))
        self.register_buffer("phase", 2 * torch.pi * torch.rand(channels, generator=generator))
        self.linear = nn.Linear(channels, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, log_snr: Tensor) -> Tensor:
        """Log SNR (B,) -> u (B,)."""
        noise = -log_snr.float().clamp(-40, 40) / 8
        features = 2**0.5 * (noise[:, None] * self.frequency + self.phase).cos()  # (B, channels)
        return self.linear(features)[:, 0]
