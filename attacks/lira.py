"""Likelihood-ratio attacks with shadow adapters (LiRA, Carlini et al. 2022, arXiv 2112.03570).

N adapters were trained on random halves of a pool, 2k and 2k + 1 on complementary halves.  Each is
the target once; for an image x and a statistic phi that is higher for members,

    offline    (phi(target) - mean_out) / sd_out
    online     log N(phi(target); mean_in, var_in) - log N(phi(target); mean_out, var_out)
    pooled     (phi(target) - (mean_in + mean_out) / 2)' S^-1 d

with means over the shadows that trained on x (in) and those that did not (out).  In the last line
d, the shift that membership makes, and the covariance S are pooled over images: with few shadows
that is worth more than a shift of each image's own.

Before anything else every adapter is levelled.  One that is worse on all images, or steeper over
hard ones, would otherwise count among the in-shadows of some images and the out-shadows of others
as if membership had moved them.  For a method that ends at a different loss each time this decides
the figure: eight SMP adapters after 400 steps read .52 as they are, .63 levelled, .69 pooled as
well.

In an audit the shadows of a target are the adapters of the other pairs: its own partner is left
out.  With the partner, an image would have N/2 - 1 in-shadows where the target trained on it and
N/2 where it did not, and the noise of the means alone would tell which.  So every image has
n = N/2 - 1 of each.  A single run is attacked in the same way, as the last of N + 1 adapters, N
even, which has no partner (attacks/shadows.py).

Variances: V is pooled over images, v_i is one image's own from n - 1 degrees of freedom, and

    var_i = (PRIOR V + (n - 1) v_i) / (PRIOR + n - 1)

With N = 4 a side has one shadow and no freedom, so V alone is left, with the partner in it: V is
the same for every image and tells nothing of one.  Pure numpy; tested in tests/test_lira.py against
loops written by hand, and on labels without signal.
"""

from collections.abc import Callable, Iterable

import numpy as np

PRIOR = 4.0  # degrees of freedom that the pooled variance counts for
SHRINK = 0.1  # share of the pooled covariance's off-diagonal that is taken away
LEAST = 1e-12  # of a variance
THRESHOLD, HEADLINE = "loss threshold", "LiRA pooled, all"  # the reference; for comparisons


def shadows(count: int, target: int) -> list[int]:
    """The adapters of all pairs but the target's own."""
    return [k for k in range(count) if k // 2 != target // 2]


def side_means(x: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means (P, ...) of answers x (S, P, ...) over the shadows with and without each image.

    inside (S, P) says which shadow trained on which image.
    """
    weights = inside.astype(np.float64)
    with_it = np.einsum("sp,sp...->p...", weights, x)
    without = np.einsum("sp,sp...->p...", 1 - weights, x)
    count, shape = weights.sum(0), (-1,) + (1,) * (x.ndim - 2)
    return with_it / count.reshape(shape), without / (len(x) - count).reshape(shape)


def residuals(x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """x (S, P, ...) minus the mean of its side, in or out, for each image."""
    with_it, without = side_means(x, inside)
    return x - np.where(inside.reshape(*inside.shape, *(1,) * (x.ndim - 2)), with_it, without)


def level(x: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """Answers x (N, P, F), each adapter's less its own line on how hard the images are, (N, P, F).

    How hard an image is is the middle of its two means over the target's shadows; every adapter's
    answers are regressed on it, feature by feature.  Nobody's labels but the shadows' are read.
    """
    others = shadows(len(x), target)
    hard = sum(side_means(x[others], member[others])) / 2
    hard = hard - hard.mean(0)  # (P, F)
    centred = x - x.mean(1, keepdims=True)
    slope = (centred * hard).sum(1, keepdims=True) / np.maximum((hard**2).sum(0), LEAST)
    return centred - slope * hard


def still(x: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """Predictions x (N, P, K, D) less the middle of each image's two means, and less what an
    adapter then has in common over all images.
    """
    others = shadows(len(x), target)
    away = x.astype(np.float32)
    away = away - (sum(side_means(away[others], member[others])) / 2).astype(np.float32)
    return away - away.mean(1, keepdims=True)


def pooled_covariance(x: np.ndarray, member: np.ndarray, target: int, side: bool) -> np.ndarray:
    """(F, F) covariance of x (N, P, F) on one side about each image's mean, pooled over images."""
    rest = shadows(len(x), target) if len(x) > 4 else [k for k in range(4) if k != target]
    inside = member[rest]
    rows = residuals(x[rest], inside)[inside == side]
    freedom = ((inside == side).sum(0) - 1).sum()
    return rows.T @ rows / freedom


def variances(x: np.ndarray, member: np.ndarray, target: int, side: bool) -> np.ndarray:
    """(P, F) variances on one side, each image's own shrunk to the pooled one."""
    pooled = np.diag(pooled_covariance(x, member, target, side))
    others = shadows(len(x), target)
    inside = member[others]
    squares = residuals(x[others], inside) ** 2
    own = np.where((inside == side)[:, :, None], squares, 0).sum(0)  # (n - 1) v_i
    freedom = (inside == side).sum(0)[:, None] - 1  # (P, 1)
    return ((PRIOR * pooled + own) / (PRIOR + freedom)).clip(LEAST)


def offline(x: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """(phi - mean_out) / sd_out for every image, summed over F: x (N, P, F) -> (P,)."""
    others = shadows(len(x), target)
    _, mean = side_means(x[others], member[others])
    return ((x[target] - mean) / np.sqrt(variances(x, member, target, False))).sum(1)


def online(x: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """Log-likelihood ratio of two Gaussians, summed over F as if independent: (N, P, F) -> (P,)."""
    others = shadows(len(x), target)
    means = side_means(x[others], member[others])
    logs = []
    for mean, side in zip(means, (True, False), strict=True):
        variance = variances(x, member, target, side)
        logs.append(-0.5 * (np.log(variance) + (x[target] - mean) ** 2 / variance))
    return (logs[0] - logs[1]).sum(1)


def joint(x: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """Log-likelihood ratio of two Gaussians in F dimensions: x (N, P, F) -> (P,).

    Covariances are pooled over images, their off-diagonals shrunk by SHRINK.
    """
    others = shadows(len(x), target)
    means = side_means(x[others], member[others])
    logs = []
    for mean, side in zip(means, (True, False), strict=True):
        covariance = shrunk(pooled_covariance(x, member, target, side))
        away = x[target] - mean
        distance = (away * np.linalg.solve(covariance, away.T).T).sum(1)
        logs.append(-0.5 * (np.linalg.slogdet(covariance)[1] + distance))
    return logs[0] - logs[1]


def shrunk(covariance: np.ndarray) -> np.ndarray:
    """(F, F) with SHRINK of its off-diagonals taken away."""
    return (1 - SHRINK) * covariance + SHRINK * np.diag(np.diag(covariance).clip(LEAST))


def pooled(x: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """Log-likelihood ratio of two Gaussians about the middle of each image's means, whose distance
    and covariance are those of all images: (N, P, F) -> (P,), up to a constant.
    """
    others = shadows(len(x), target)
    with_it, without = side_means(x[others], member[others])
    sides = (pooled_covariance(x, member, target, side) for side in (True, False))
    shift = (with_it - without).mean(0)
    return (x[target] - (with_it + without) / 2) @ np.linalg.solve(shrunk(sum(sides) / 2), shift)


def projected(x: np.ndarray, member: np.ndarray, target: int) -> np.ndarray:
    """<x - (mean_in + mean_out) / 2, mean_in - mean_out> over the predicted noise, (P,).

    x (N, P, K, D) are predictions at K fixed (t, eps).  Each of the K is divided by its variance
    about the means, pooled over images and dimensions, which makes the sum the log-likelihood ratio
    of two Gaussians with equal, isotropic noise.  Wants at least two in- and two out-shadows.
    """
    others = shadows(len(x), target)
    asked, inside = x[others].astype(np.float32), member[others]
    means = side_means(asked, inside)
    variance = (residuals(asked, inside) ** 2).mean((0, 1, 3)).clip(LEAST)  # (K,)
    away, axis = x[target] - (means[0] + means[1]) / 2, means[0] - means[1]
    return ((away * axis).sum(2) / variance).sum(1)


# --------------------------------------------------------------------------------------------------
# The attacks on what the adapters answered at one step


def statistics(answers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """phi (N, P, F) by name, higher for members: minus logs, averaged over draws.

    answers: losses (N, P, T, K), sima (N, P, C) and, if asked for, gradient (N, P), which is a log.
    """
    losses = -np.log(answers["losses"].astype(np.float64)).mean(3)  # (N, P, T)
    found = {
        "loss": losses.mean(2, keepdims=True),
        "SimA": -np.log(answers["sima"].astype(np.float64)).mean(2, keepdims=True),
    }
    if "gradient" in answers:
        found["gradient"] = -answers["gradient"].astype(np.float64)[:, :, None]
    found["timesteps"] = losses
    single = [phi for name, phi in found.items() if name not in ("loss", "timesteps")]
    return found | {"all": np.concatenate([losses, *single], axis=2)}


def attacks(
    answers: dict[str, np.ndarray], member: np.ndarray, targets: Iterable[int] | None = None
) -> dict[str, np.ndarray]:
    """Scores (N, P) of every attack, row k with adapter k as the target; or of `targets` alone.

    member (N, P) is true where an adapter trained on an image.  `answers` as in `statistics`, and
    predictions (N, P, K, D).
    """
    phi = statistics(answers)
    targets = list(range(len(member)) if targets is None else targets)

    def every(attack: Callable, x: np.ndarray, levelled: Callable = level) -> np.ndarray:
        found = [attack(levelled(x, member, target), member, target) for target in targets]
        return np.stack(found)  # (targets, P)

    scores = {THRESHOLD: phi["loss"][targets, :, 0]}
    for name in ("loss", "SimA", "gradient"):
        if name in phi:
            scores[f"LiRA offline, {name}"] = every(offline, phi[name])
            scores[f"LiRA online, {name}"] = every(online, phi[name])
    scores["LiRA online, timesteps"] = every(joint, phi["timesteps"])
    scores["LiRA online, all"] = every(joint, phi["all"])
    scores["LiRA pooled, loss"] = every(pooled, phi["loss"])
    scores["LiRA pooled, all"] = every(pooled, phi["all"])
    if len(member) >= 6:  # two shadows on each side
        scores["projected prediction"] = every(projected, answers["predictions"], still)
    return scores
