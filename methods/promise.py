"""What Gaussian noise promises: mu-Gaussian differential privacy (Dong, Roth & Su 2019, arXiv
1905.02383), and what it means to the people whose images were used.

    mu = mu_for(epsilon=8.0, delta=1e-3)
    print(Promise(8.0, 1e-3, mu, sigma))

Telling whether an image was used is as hard as telling N(0, 1) from N(mu, 1), or harder, whatever
the attack.  Tested in tests/test_dp.py against closed forms and a library.
"""

import math
from dataclasses import dataclass

from scipy.special import log_ndtr, ndtr, ndtri


def delta_of(epsilon: float, mu: float) -> float:
    """The delta at which mu-Gaussian-DP is (epsilon, delta)-DP (Dong et al. 2019, Corollary 2.13):

    Phi(-epsilon / mu + mu / 2) - e^epsilon Phi(-epsilon / mu - mu / 2).
    """
    first = log_ndtr(-epsilon / mu + mu / 2)
    second = epsilon + log_ndtr(-epsilon / mu - mu / 2)
    return float(math.exp(first) - math.exp(second))


def mu_for(epsilon: float, delta: float) -> float:
    """The largest mu whose Gaussian DP is within (epsilon, delta), by bisection from below."""
    low, high = 1e-6, 1e3
    for _ in range(200):
        middle = math.sqrt(low * high)
        if delta_of(epsilon, middle) <= delta:
            low = middle
        else:
            high = middle
    return low


def epsilon_for(mu: float, delta: float) -> float:
    """The epsilon at which mu-Gaussian-DP has this delta, by bisection; 0 where it has less."""
    low, high = 0.0, 1e4
    if mu <= 0 or delta_of(0.0, mu) <= delta:
        return 0.0
    for _ in range(200):
        middle = (low + high) / 2
        if delta_of(middle, mu) > delta:
            low = middle
        else:
            high = middle
    return high


@dataclass
class Promise:
    """(epsilon, delta) of the adapter after all steps, for adding or removing one image with its
    caption, the number of members being known.
    """

    epsilon: float
    delta: float
    sigma: float
    mu: float

    LIMITS = (
        "It holds for adding or removing one of the members with its caption; their number is "
        "public. For replacing one, double the mu. Which images are members is dealt anew when an "
        "image is added to the folder, unless --nonmembers makes all of them members. It does not "
        "cover several images of one person or near-copies together; the pictures, captions, "
        "scores and losses in the run folder; a choice among several runs on the same images; or "
        "what the public pictures and the base model already know."
    )

    def caught(self, fpr: float, changes: int = 1) -> float:
        """The most members that any attack names at a false-alarm rate: Phi(Phi^-1(fpr) + mu).

        With 2 `changes`, where a member is not left out but replaced, mu is doubled.
        """
        return float(ndtr(ndtri(fpr) + changes * self.mu))

    def facts(self) -> dict[str, float]:
        """For the summary of a run."""
        found = {"epsilon": self.epsilon, "delta": self.delta, "mu": self.mu}
        return found | {"noise_multiplier": self.sigma, "promise": str(self)}

    def __str__(self) -> str:
        left_out, replaced = (math.ceil(100 * self.caught(0.01, n)) for n in (1, 2))
        return (
            f"epsilon {self.epsilon:g} at delta {self.delta:.3g}: no attack on the adapter finds "
            f"more than {left_out}% of the members at one false alarm in a hundred, or {replaced}% "
            "where another image would have taken a member's place; this holds for one image with "
            "its caption, and for the adapter alone"
        )
