"""Scaled residual branches (muP) without a multiplication in the layers.

A model whose every branch is multiplied by s, x <- x + s * branch(norm(x)), keeps y = x / s here:
y <- y + branch(norm(y)). RMSNorm does not see the scale, but for its epsilon: with mean(x^2) + eps
= s^2 * (mean(y^2) + eps / s^2). So only the embedding and the epsilons change.
"""

from nsa_serve.config import ModelConfig


def stream_scales(config: ModelConfig) -> tuple[float, float]:
    """Return what embeddings are multiplied by, and the epsilon of every norm, of the stream y."""
    scale = config.residual_scale
    return config.embedding_scale / scale, config.rms_norm_eps / scale**2
