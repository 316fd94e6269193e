"""Maximum mean discrepancy between two sets of samples.

Shapes: `B` samples in each set, `N` numbers in a sample.
"""

import torch
from torch import Tensor


def gaussian_mmd(
    first_BN: Tensor, second_BN: Tensor, n_kernels: int = 5, multiplier: float = 2.0
) -> Tensor:
    """Compute the squared MMD under a sum of Gaussian kernels, as in RepNoise.

        MMD = mean_ij [k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j)]
        k(a, b) = sum_(m = 0 .. n_kernels - 1) exp(-||a - b||^2 / s_m)
        s_m = multiplier^(m - n_kernels // 2) * (mean of ||a - b||^2 over all pairs of different
        samples of both sets)

    Long et al. 2015 (arXiv 1502.02791), with the bandwidths of Rosati et al. 2024 (arXiv
    2405.14577, released code), which depend on the samples but get no gradient. The means include
    the pairs (i, i), so this is the biased estimate: 0 for equal sets, and never below 0.

    Args:
        first_BN: One sample per row.
        second_BN: The same number of samples of the other set.
        n_kernels: Number of bandwidths.
        multiplier: Ratio of one bandwidth to the next.

    Returns:
        A scalar without unit, in [0, 2 * n_kernels).

    Raises:
        ValueError: the sets do not have the same shape ``B x N``.
    """
    if first_BN.shape != second_BN.shape or first_BN.dim() != 2:
        raise ValueError(
            f"MMD of sets shaped {tuple(first_BN.shape)} and {tuple(second_BN.shape)}: give two"
            " sets of the same shape B x N"
        )
    samples = torch.cat([first_BN, second_BN])
    samples = samples.to(torch.promote_types(samples.dtype, torch.float32))
    n = len(samples)
    # cdist without its matrix product, which loses small distances; explicit differences would need
    # n x n x N numbers.
    distances = torch.cdist(samples, samples, compute_mode="donot_use_mm_for_euclid_dist").square()
    mean_distance = distances.detach().sum() / (n * n - n)
    # If all samples are equal, the mean distance is 0; any bandwidth is right, as the MMD is 0.
    widest = mean_distance.clamp_min(torch.finfo(distances.dtype).tiny * 2.0**n_kernels)
    kernels = torch.stack(
        [
            torch.exp(-distances / (widest * multiplier ** (m - n_kernels // 2)))
            for m in range(n_kernels)
        ]
    ).sum(0)
    half = len(first_BN)
    return (
        kernels[:half, :half]
        + kernels[half:, half:]
        - kernels[:half, half:]
        - kernels[half:, :half]
    ).mean()
