"""Likelihood-ratio attacks with shadow adapters (LiRA, Carlini et al. 2022, arXiv 2112.03570).

N adapters were trained on random halves of a pool, 2k and 2k + 1 on complementary halves.  Each is
the target once.  For an image x and a statistic phi that is higher for members, an attack compares
phi(target) with the shadows that trained on x (in) and those that did not (out):

    offline    (phi - mean_out) / sd_out                                    Carlini et al., offline
    online     log N(phi; mean_in, var_in) - log N(phi; mean_out, var_out)  Carlini et al., Alg. 1
    pooled     (phi - (mean_in + mean_out) / 2)' S^-1 d                     Fisher's discriminant
    scaled     the same over its deviation at this image

In the last lines d, the mean of mean_in - mean_out, and the covariance S are pooled over images.
With few shadows that is worth more than a shift of each image's own.

Shadows.  The partner of the target, which trained on the other half, is left out.  With it an image
would have N/2 - 1 in-shadows where the target trained on it and N/2 where it did not, and the noise
of the means alone would tell which.  So every image has n = N/2 - 1 shadows on each side.  A single
run is attacked as the last of N + 1 adapters, which has no partner (attacks/shadows.py).

Adapters differ.  One that is worse on all images, or steeper over hard ones, would look like an
effect of membership.  So every adapter's own line over the difficulty of the images is subtracted
first.  Eight SMP adapters after 400 steps read .52 without that, .63 with it, .69 pooled as well.

Variances.  V is pooled over images, v_i is one image's own from n - 1 degrees of freedom, and

    var_i = (PRIOR V + (n - 1) v_i) / (PRIOR + n - 1)    V as PRIOR earlier draws, a conjugate prior

With N = 4 there is one shadow a side, and V, the same for every image, is taken with the partner.

Tested in tests/test_lira.py against loops written by hand, and on labels without signal.
"""

from collections.abc import Callable, Iterable

import numpy as np

PRIOR = 4.0  # degrees of freedom that the pooled variance counts for
SHRINK = 0.1  # share of the pooled covariance's off-diagonal that is taken away
MIN_VARIANCE = 1e-12
THRESHOLD, HEADLINE = "loss threshold", "LiRA pooled, all"  # the reference; for comparisons


# --------------------------------------------------------------------------------------------------
# Means and variances of the shadows


def shadows(count: int, target: int) -> list[int]:
    """The adapters of all pairs but the target's own."""
    return [k for k in range(count) if k // 2 != target // 2]


def side_means(x: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean_in, mean_out), each (P, ...), of answers x (S, P, ...); inside (S, P) says which shadow
    trained on which image.
    """
    weights = inside.astype(np.float64)
    total_in = np.einsum("sp,sp...->p...", weights, x)
    total_out = np.einsum("sp,sp...->p...", 1 - weights, x)
    count = weights.sum(0).reshape(-1, *(1,) * (x.ndim - 2))
    return total_in / count, total_out / (len(x) - count)


def means(x: np.ndarray, member: np.ndarray, target: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean_in, mean_out) of answers x (N, P, ...) over the target's shadows; member (N, P)."""
    others = shadows(len(x), target)
    return side_means(x[others], member[others])


def residuals(x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """x (S, P, ...) minus the mean of its side, in or out, for each image."""
    mean_in, mean_out = side_means(x, inside)
    return x - np.where(inside.reshape(*inside.shape, *(1,) * (x.ndim - 2)), mean_in, mean_out)


def pooled_covariance(x: np.ndarray, member: np.ndarray, target: int, side: bool) -> np.ndarray:
    """(F, F) covariance of x (N, P, F) on one side about each image's mean, pooled over images."""
    others = shadows(len(x), target) if len(x) > 4 else [k for k in range(4) if k != target]
    inside = member[others]
    rows = residuals(x[others], inside)[inside == side]
    freedom = ((inside == side).sum(0) - 1).sum()
    return rows.T @ rows / freedom


def shrunk(covariance: np.ndarray) -> np.ndarray:
    """(F, F) with SHRINK of its off-diagonals taken away."""
    return (1 - SHRINK) * covariance + SHRINK * np.diag(np.diag(covariance).clip(MIN_VARIANCE))


def variances(x: np.ndarray, member: np.ndarray, target: int, side: bool) -> np.ndarray:
    """(P, F) variances var_i on one side."""
    pooled = np.diag(pooled_covariance(x, member, target, side))
    others = shadows(len(x), target)
    inside = member[others]
    squares = residuals(x[others], inside) ** 2
    own = np.where((inside == side)[:, :, None], squares, 0).sum(0)  # (n - 1) v_i
    freedom = (inside == side).sum(0)[:, None] - 1  # (P, 1)
    return ((PRIOR * pooled + own) / (PRIOR + freedom)).clip(MIN_VARIANCE)


# --------------------------------------------------------------------------------------------------
# What adapters differ in, subtracted


def without_difficulty(x: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """Answers x (N, P, F), minus each adapter's own line over the difficulty of the images.

    The difficulty of an image is (mean_in + mean_out) / 2 over the target's shadows.  Every
    adapter's answers are regressed on it, feature by feature.  Only the shadows' labels are read.
    """
    difficulty = sum(means(x, member, target)) / 2
    difficulty = difficulty - difficulty.mean(0)  # (P, F)
    centred = x - x.mean(1, keepdims=True)
    square = np.maximum((difficulty**2).sum(0), MIN_VARIANCE)
    slope = (centred * difficulty).sum(1, keepdims=True) / square
    return centred - slope * difficulty


def without_middle(x: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """Predictions x (N, P, K, D), minus (mean_in + mean_out) / 2 of each image, and then minus what
    an adapter has in common over all images.
    """
    x = x.astype(np.float32)
    x = x - (sum(means(x, member, target)) / 2).astype(np.float32)
    return x - x.mean(1, keepdims=True)


# --------------------------------------------------------------------------------------------------
# The attacks: scores (P,) of the target's answers, higher = member


def offline(x: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """(phi - mean_out) / sd_out, summed over F: x (N, P, F) -> (P,)."""
    _, mean_out = means(x, member, target)
    return ((x[target] - mean_out) / np.sqrt(variances(x, member, target, False))).sum(1)


def online(x: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """Log-likelihood ratio of two Gaussians, summed over F as if independent: (N, P, F) -> (P,)."""
    logs = []
    for mean, side in zip(means(x, member, target), (True, False), strict=True):
        variance = variances(x, member, target, side)
        logs.append(-0.5 * (np.log(variance) + (x[target] - mean) ** 2 / variance))
    return (logs[0] - logs[1]).sum(1)


def pooled(x: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """(phi - (mean_in + mean_out) / 2)' S^-1 d, S the mean of both sides' covariances: x (N, P, F)
    -> (P,).
    """
    middle = sum(means(x, member, target)) / 2
    return (x[target] - middle) @ discriminant(x, member, target)


def scaled(x: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """`pooled` over its own deviation at each image, from the shadows: some images' answers scatter
    more than others'.
    """
    y = (x @ discriminant(x, member, target))[:, :, None]
    variance = sum(variances(y, member, target, side) for side in (True, False)) / 2
    return ((y[target] - sum(means(y, member, target)) / 2) / np.sqrt(variance))[:, 0]


def discriminant(x: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """S^-1 d, (F,)."""
    mean_in, mean_out = means(x, member, target)
    covariance = sum(pooled_covariance(x, member, target, side) for side in (True, False)) / 2
    return np.linalg.solve(shrunk(covariance), (mean_in - mean_out).mean(0))


def projected(x: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """<x - (mean_in + mean_out) / 2, mean_in - mean_out> over the predicted noise, (P,).

    x (N, P, K, D) are predictions at K fixed (t, eps).  Each of the K is divided by its variance
    about the means, pooled over images and dimensions, which makes the sum the log-likelihood ratio
    of two Gaussians with equal, isotropic noise.  Wants two in- and two out-shadows at least.
    """
    others = shadows(len(x), target)
    asked, inside = x[others].astype(np.float32), member[others]
    mean_in, mean_out = side_means(asked, inside)
    variance = (residuals(asked, inside) ** 2).mean((0, 1, 3)).clip(MIN_VARIANCE)  # (K,)
    away = x[target] - (mean_in + mean_out) / 2
    return ((away * (mean_in - mean_out)).sum(2) / variance).sum(1)


# --------------------------------------------------------------------------------------------------
# All of them, on what the adapters answered at one step

ATTACKS = {
    "LiRA offline, loss": (offline, "loss"),
    "LiRA online, loss": (online, "loss"),
    "LiRA pooled, loss": (pooled, "loss"),
    HEADLINE: (pooled, "all"),
    "LiRA scaled, all": (scaled, "all"),
}  # name: attack and statistic


def statistics(answers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """phi (N, P, F), higher for members: "loss" (F = 1), and "all", minus the logs of T losses and
    of SimA.

    answers: losses (N, P, T, K) and sima (N, P, C), averaged over K draws and over C ways to show
    the image.  The gradient's norm, which cost as much as all this, added nothing in 21 audits.
    """
    losses = -np.log(answers["losses"].astype(np.float64)).mean(3)  # (N, P, T)
    sima = -np.log(answers["sima"].astype(np.float64)).mean(2, keepdims=True)
    every = np.concatenate([losses, sima], axis=2)
    return {"loss": losses.mean(2, keepdims=True), "all": every}


def attacks(
    answers: dict[str, np.ndarray], member: np.ndarray, targets: Iterable[int] | None = None
) -> dict[str, np.ndarray]:
    """Scores (N, P) of every attack, row k with adapter k as the target; or of `targets` alone.

    member (N, P) is true where an adapter trained on an image.  `answers` as in `statistics`, and
    predictions (N, P, K, D).
    """
    phi = statistics(answers)
    targets = list(range(len(member)) if targets is None else targets)

    def scores_of(attack: Callable, x: np.ndarray, subtract: Callable) -> np.ndarray:
        found = [attack(subtract(x, member, target), member, target) for target in targets]
        return np.stack(found)  # (targets, P)

    scores = {THRESHOLD: phi["loss"][targets, :, 0]}
    for name, (attack, statistic) in ATTACKS.items():
        scores[name] = scores_of(attack, phi[statistic], without_difficulty)
    if len(member) >= 6:  # two shadows on each side
        predictions = answers["predictions"]
        scores["projected prediction"] = scores_of(projected, predictions, without_middle)
    return scores
