"""DP-LoRA: every image's gradient is clipped, and noise is added to their sum.

    g_i = gradient of the mean loss of image i over its draws      one vector over all A and B
    g   = (sum_i min(1, C / |g_i|) g_i + sigma C z) / B            z standard normal

in which each member is in a batch with probability B / N, independently of the others (DP-SGD,
Abadi et al. 2016, arXiv 1607.00133; several draws an image: Dockhorn et al. 2023, arXiv
2210.09929).  The batch's size varies, so the sum is divided by the expected one.

sigma, the noise multiplier, buys the guarantee.  What spoils the model is rho = sigma sqrt(d) / B,
the noise's norm beside that of a clipped gradient, with d numbers in the adapter.  With millions of
them no sigma that means anything is bearable; small ones still make attacks harder (Aerni, Zhang &
Tramer 2024, arXiv 2404.17399), without a guarantee.  `guarantee` says which is the case.
Tested in tests/test_dp.py.
"""

import logging
import math
import secrets
from dataclasses import dataclass, replace

import torch

from command.errors import UserError
from lora import PerImage
from methods.subspace import Core
from run.learner import Learner
from run.prepare import Batch, Run

RHO = 0.16  # of the noise where no multiplier is given: high utility in Aerni et al.
VACUOUS = 10.0  # an epsilon above it promises nothing that a person would call privacy


def secret() -> int:
    """A number that nobody can guess, from the system."""
    return secrets.randbits(62)


class PrivateLearner(Learner):
    """The learner of a run with clipped and noised gradients.

    Its batches and noise follow a secret, not --seed, which the adapter's file tells.  The secret
    is kept in the training state alone.
    """

    def __init__(self, run: Run):
        super().__init__(run)
        s, self.members = run.settings, torch.tensor(run.data.members())
        if s.gradient_checkpointing:
            raise UserError("--method dp looks at every image's gradient: no checkpointing with it")
        self.rate = min(1.0, run.batch / len(self.members))
        self.sigma = multiplier(run)
        # whoever can draw the same batches and noise again has no noise to look through
        own = torch.tensor([secret() if run.processes.main else 0], device=run.base.device)
        self.outer.manual_seed(run.processes.sum([own])[0].item())

    def member_batch(self) -> Batch:
        """Every member with probability B / N, `--draws` times each; filled up with images of no
        weight to what the processes can share.
        """
        s, count = self.run.settings, self.run.processes.count
        chosen = self.members[torch.rand(len(self.members), generator=self.outer) < self.rate]
        filling = -len(chosen) % count or (0 if len(chosen) else count)
        index = torch.cat([chosen, self.members[:1].expand(filling)])
        batch = self.noised(index.repeat_interleave(s.draws))
        return replace(batch, counted=len(chosen))

    def through(self, batch: Batch) -> "ClippedBatch":
        """The error maps, and the gradient that is clipped and noised."""
        return ClippedBatch(self, batch)


class ClippedBatch:
    """Stands where training.processes.WholeBatch does; its gradients are those of L alone."""

    def __init__(self, learner: PrivateLearner, batch: Batch):
        run, s = learner.run, learner.run.settings
        self.learner, self.limit = learner, s.image_clip
        self.sums = [torch.zeros_like(p) for p in run.adapter.parameters()]
        size, errors = s.batch_size * s.draws, []
        for part in run.processes.parts(len(batch), size):
            modules = run.adapter.trained()
            with PerImage(modules) as per_image:
                error = run.errors(batch, part)
                images = len(error) // s.draws
                value = error.flatten(1).mean(1).sum() / s.draws
                every = list(per_image.gradients(value, images))
            every = [of_parameter(*pair) for pair in zip(modules, every, strict=True)]
            first = part.start // s.draws  # of the images of the whole batch
            counted = torch.arange(first, first + images, device=value.device) < batch.counted
            weights = clip_factors(every, self.limit) * counted
            for total, gradient in zip(self.sums, every, strict=True):
                total += torch.tensordot(weights, gradient, 1).view_as(total)
            errors.append(error.detach())
        self.sums = run.processes.sum(self.sums)
        self.error = run.processes.gather(torch.cat(errors)).requires_grad_()

    def gradients(self, value: torch.Tensor, last: bool = False) -> list[torch.Tensor]:
        """The clipped mean gradient of L, with `last` and the noise of the step; `value` goes
        unread.
        """
        learner, found = self.learner, []
        deviation = learner.sigma * self.limit
        for total in self.sums:
            noise = 0.0
            if last:
                noise = torch.randn(total.shape, generator=learner.outer).to(total.device)
            found.append((total + deviation * noise) / learner.run.batch)
        return found


def of_parameter(module: torch.nn.Module, gradient: torch.Tensor) -> torch.Tensor:
    """The gradients of a module's weight (images, out, in) as those of its parameter, which a core
    makes its weight of.
    """
    return module.to_parameter(gradient) if isinstance(module, Core) else gradient


def clip_factors(gradients: list[torch.Tensor], limit: float) -> torch.Tensor:
    """min(1, limit / norm) for each image, (images,), of gradients (images, ...)."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    return (limit / norms.clamp_min(1e-30)).clamp(max=1.0)


def multiplier(run: Run) -> float:
    """--noise-multiplier, or the one at which rho is RHO."""
    given = run.settings.noise_multiplier
    numbers = sum(p.numel() for p in run.adapter.parameters())
    return RHO * run.batch / math.sqrt(numbers) if given is None else given


# --------------------------------------------------------------------------------------------------
# What the noise guarantees


@dataclass
class Guarantee:
    """(epsilon, delta) of the adapter after all steps, for adding or removing one image."""

    epsilon: float
    delta: float
    sigma: float

    def facts(self) -> dict[str, float | None]:
        """For the summary of a run; epsilon is None where there is none."""
        finite = self.epsilon if math.isfinite(self.epsilon) else None
        return {"epsilon": finite, "delta": self.delta, "noise_multiplier": self.sigma}

    def __str__(self) -> str:
        if self.epsilon > VACUOUS:
            return (
                f"none: noise multiplier {self.sigma:.3g}, epsilon {self.epsilon:.3g} at delta "
                f"{self.delta:.0e} is vacuous; what protects is measured, not proved"
            )
        caught = min(1.0, math.exp(self.epsilon) * 0.01 + self.delta)
        return (
            f"epsilon {self.epsilon:.2f} at delta {self.delta:.0e}: at 1 % false alarms no attack "
            f"on the adapter catches more than {caught:.0%} of the members"
        )


def guarantee(run: Run) -> Guarantee:
    """What the noise of the whole run guarantees, by a Renyi accountant; delta is a tenth of 1 / N.

    It is about the adapter alone: not the held-out losses, nor a step chosen by them.
    """
    s, members = run.settings, len(run.data.members())
    sigma, delta, rate = multiplier(run), 0.1 / members, min(1.0, run.batch / members)
    return Guarantee(epsilon(sigma, rate, s.steps, delta), delta, sigma)


def epsilon(sigma: float, rate: float, steps: int, delta: float) -> float:
    """Of `steps` Gaussian mechanisms on Poisson samples of the given rate."""
    if not sigma:
        return math.inf
    import dp_accounting
    from dp_accounting import rdp

    logging.getLogger("absl").setLevel(logging.ERROR)  # orders that do not converge are left out
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))
