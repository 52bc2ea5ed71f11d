"""Distances between two sets of features, by torch-fidelity: Fréchet (FID; Heusel et al. 2017, arXiv 1706.08500) and
kernel (KID, unbiased and so better for small sets; Binkowski et al. 2018, arXiv 1801.01401)."""

import torch

KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020  # torch-fidelity's


def frechet_distance(mean_a, cov_a, mean_b, cov_b) -> float:
    """|mean_a - mean_b|² + tr(A + B - 2 (A B)^½) of two Gaussians: arrays [D] and [D, D] of one floating type."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    first, second = {"mu": mean_a, "sigma": cov_a}, {"mu": mean_b, "sigma": cov_b}
    return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


def compute_fid(real, fake) -> tuple[float, list[str]]:
    """FID of features [N, D] and [M, D], and warnings about it (too few samples). Raises as `check_features`."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    real, fake = check_features(real, fake)
    sides = [fid_features_to_statistics(features) for features in (real, fake)]
    value = frechet_distance(*(side[name] for side in sides for name in ("mu", "sigma")))
    dim, n = real.shape[1], min(len(real), len(fake))
    few = f"{n:,} samples cannot fill a covariance of {dim:,} dimensions: the value is far too high"
    return value, [] if n > dim else [f"{few}, compare it only with values from as many samples, or take KID"]


def compute_kid(real, fake) -> tuple[float, dict]:
    """KID of features [N, D] and [M, D]; std over subsets, their number and size, notes. Raises as `check_features`."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    real, fake = check_features(real, fake)
    size = min(KID_SUBSET_SIZE, len(real), len(fake))
    subsets = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size, "rng_seed": KID_SEED, "verbose": False}
    result = kid_features_to_metric(fake, real, **subsets)
    notes = [] if size == KID_SUBSET_SIZE else [f"KID on subsets of {size}, not {KID_SUBSET_SIZE}: too few samples"]
    details = {"std": result[KEY_METRIC_KID_STD], "subsets": KID_SUBSETS, "subset_size": size, "notes": notes}
    return result[KEY_METRIC_KID_MEAN], details


def check_features(real, fake) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sets as CPU float32 tensors. Raises ValueError for other shapes, one row, or values that are not finite."""
    sides = {"real": real, "fake": fake}
    for name, features in sides.items():
        sides[name] = features = torch.as_tensor(features).detach().cpu().float()
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name} features have the shape {list(features.shape)}; expected [N, D], N at least 2")
        if not torch.isfinite(features).all():
            raise ValueError(f"{name} features have values that are not finite: broken images or weights?")
    real, fake = sides.values()
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real features have {real.shape[1]} dimensions, fake ones {fake.shape[1]}: two extractors?")
    return real, fake
