"""--method dp: differential privacy in a small public subspace, a bound for every attack.

    g_i = gradient of the mean loss of image i over its draws      one vector over all cores
    g   = (sum_i min(1, C / |g_i|) g_i + sigma C z) / N            z standard normal

All N members are in every step, so nothing is subsampled.  The sum changes by at most C when one
image is added or removed, and each step is a Gaussian mechanism of noise multiplier sigma.  T steps
are mu-Gaussian-DP with mu = sqrt(T) / sigma, exactly (Dong, Roth & Su 2019, arXiv 1905.02383,
Corollary 3.3); `promise` finds the sigma of a promised (epsilon, delta).

The noise has norm sigma C sqrt(d) beside the clipped sum, so d must be small: of every layer only a
k x k core between public directions is trained (Yu et al. 2021, arXiv 2102.12677).  C is far below
the gradients' norms, so that each image says only a direction.  Each image has several draws of
(t, eps), averaged before clipping (Dockhorn et al. 2023, arXiv 2210.09929).  Clipping and noise are
DP-SGD's (Abadi et al. 2016, arXiv 1607.00133).  Tested in tests/test_dp.py.
"""

import math
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from algorithm import Batch, Run, Shuffled
from command.errors import UserError
from diffusion import Base
from methods import subspace
from methods.promise import Promise, mu_for
from run.processes import Parallel

CORE = 4  # k: numbers of a layer are k x k
DRAWS = 4  # (t, eps) of an image in a step
CLIP = 0.01  # C
BETAS = (0.9, 0.99)  # of Adam


WORDS = 624  # of 32 bits, the state of torch's Mersenne Twister


def secret() -> torch.Tensor:
    """WORDS numbers that nobody can guess, from the system."""
    words = torch.frombuffer(bytearray(secrets.token_bytes(4 * WORDS)), dtype=torch.int32)
    return words.long() & 0xFFFFFFFF


def begin(stream: torch.Generator, words: torch.Tensor) -> None:
    """Let a stream of the CPU go on from these words.

    Of a seed torch's stream takes 32 bits alone, and who tries them all has the noise.  Raises
    RuntimeError where a version of torch keeps its state in another form.
    """
    state = stream.manual_seed(WORDS).get_state()
    kept = state[24 : 24 + 8 * WORDS].view(torch.int64)  # behind three counters
    if kept[0] != WORDS or not ((kept >= 0) & (kept < 2**32)).all():
        raise RuntimeError("this version of torch keeps the state of its streams in another form")
    kept.copy_(words)
    stream.set_state(state)


def new_adapter(s, base: Base) -> subspace.CoreAdapter:
    """Cores at their public start in the base; raises UserError for directions of other layers."""
    directions, target = subspace.load(s.directions)
    first = {name: of_layer.leading(CORE) for name, of_layer in directions.items()}
    try:
        return subspace.inject(base.unet, first, target)
    except ValueError as error:
        raise UserError(f"{s.model} cannot be adapted along {s.directions}: {error}") from None


class Everyone(Shuffled):
    """All members in every batch, DRAWS times each, and behind them images of no weight that fill
    the batch up to what the processes can share.
    """

    filling = 0

    def draw(self) -> torch.Tensor:
        """Indices; those of an image follow one another."""
        index = torch.cat([self.indices, self.indices[:1].expand(self.filling)])
        return index.repeat_interleave(DRAWS)


class Private(Parallel):
    """A run whose gradient is the noised sum of clipped gradients of single images.

    Its draws and noise follow a secret, not --seed, which others may know.  The secret is kept in
    the training state alone, which is deleted when the run is finished.
    """

    counted = None  # members in a step, where these are not all

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        s, processes, members = self.settings, self.processes, self.data.members()
        self.D_tr = Everyone(members, len(members), self.outer)
        self.D_tr.filling = -len(members) % processes.count
        self.optimizer = torch.optim.Adam(self.parameters, lr=s.lr, betas=BETAS)
        self.sigma = promise(self).sigma
        # whoever could draw the same noise again could subtract it
        own = secret() if processes.main else torch.zeros(WORDS, dtype=torch.int64)
        begin(self.outer, processes.sum([own.to(self.base.device)])[0].cpu())

    @property
    def size(self) -> int:
        """Members in one step: all."""
        return self.counted or len(self.data.members())

    @contextmanager
    def one_forward(self) -> Iterator[float]:
        """Inside, a step is of as many members as go through the UNet together, for a dry run;
        yields how many such a step has.
        """
        whole, members = self.D_tr, self.data.members()
        few = members[: self.settings.batch_size * self.processes.count]
        self.D_tr = Everyone(few, len(few), self.outer)
        self.D_tr.filling, self.counted = -len(few) % self.processes.count, len(few)
        yield len(members) / len(few)
        self.D_tr, self.counted = whole, None

    def error(self, b: Batch) -> torch.Tensor:
        """The error maps of the whole batch; with gradient the clipped gradients are summed on the
        way, --batch-size images at a time.
        """
        if not torch.is_grad_enabled():
            return super().error(b)
        self.sums = [torch.zeros_like(p) for p in self.parameters]
        errors = []
        with self.adapter.folded(), subspace.EachImage(self.adapter) as each:
            for part in self.processes.parts(len(b), self.settings.batch_size * DRAWS):
                error = Run.error(self, b[part])  # one forward
                images = len(error) // DRAWS
                # the slopes of a mean over a latent would vanish in half precision
                scale = 2.0 ** math.frexp(error[0].numel() * DRAWS)[1]
                value = scale * error.flatten(1).mean(1).sum() / DRAWS
                every = [g / scale for g in each.gradients(value, images)]
                first = part.start // DRAWS  # of the images of the whole batch
                counted = torch.arange(first, first + images, device=value.device) < self.size
                weights = clip_factors(every, CLIP) * counted
                for total, gradient in zip(self.sums, every, strict=True):
                    total += torch.tensordot(weights, gradient, 1)
                errors.append(error.detach())
        self.sums = self.processes.sum(self.sums)
        return self.processes.gather(torch.cat(errors))

    def gradients(self, value: torch.Tensor, keep_graph: bool = False) -> list[torch.Tensor]:
        """The mean of the clipped gradients of L, whatever `value` is.

        Only the gradient that the step descends along, asked for without `keep_graph`, is noised:
        the others are norms for the log, which stay in the run folder.
        """
        found = []
        for total in self.sums:
            noise = 0.0
            if not keep_graph:
                noise = torch.randn(total.shape, generator=self.outer).to(total.device)
            found.append((total + self.sigma * CLIP * noise) / self.size)
        return found


def clip_factors(gradients: list[torch.Tensor], limit: float) -> torch.Tensor:
    """min(1, limit / norm) for each image, (images,), of gradients (images, ...)."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    return (limit / norms.clamp_min(1e-30)).clamp(max=1.0)


def promised_delta(run: Run) -> float:
    """--delta-dp, or a tenth of 1 / N.

    Raises UserError for 1 / N and above, with which the whole of one image could be published.
    """
    asked, members = run.settings.delta_dp, len(run.data.members())
    if asked is not None and asked * members >= 1:
        raise UserError(
            f"--delta-dp {asked:g} guarantees nothing to {members} images: give one below 1 / N"
        )
    return asked or 0.1 / members


def promise(run: Run) -> Promise:
    """What the noise of the whole run promises; raises UserError as `promised_delta`."""
    s, delta = run.settings, promised_delta(run)
    mu = mu_for(s.epsilon, delta)
    return Promise(s.epsilon, delta, math.sqrt(s.steps) / mu, mu)
