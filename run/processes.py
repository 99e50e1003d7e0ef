"""One batch, cut over processes and micro-batches, with exactly the gradient it has in one piece.

Started by `accelerate launch train.py ...` or `torchrun`, every process draws the same whole batch
and takes its own part; adapter and attacker stay the same everywhere.  An objective J such as the
ratio (Eq. 10) is no mean over images, so the mean of the parts' gradients is not its gradient.  But
J is a function of the error maps e alone, hence

    dJ / d(A, B) = sum over parts of (de_part / d(A, B))^T  dJ / de_part

The maps are small: they are gathered whole, J and dJ/de are computed on all of them, and each
part's slice of dJ/de is pulled back through the UNet.  Micro-batches cost one more forward without
gradient, since dJ/de needs all of e first.  Tested in tests/test_parallel.py against one big batch
in one process.
"""

import os

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather, reduce
from torch import distributed
from torch.nn import Parameter

from algorithm import Batch, Run
from command.errors import UserError
from run.precheck import launched


class Processes:
    """The processes of a run: one, unless a launcher says otherwise in the environment."""

    def __init__(self, device: str = "cpu"):
        (self.count, _), self.rank, self.device = launched(), 0, device
        if self.count > 1:
            try:
                group = PartialState(cpu=device == "cpu")
            except ValueError as error:  # WORLD_SIZE without the rest of what a launcher sets
                raise UserError(
                    f"WORLD_SIZE is {self.count} but no launcher has set the rest ({error}): "
                    "unset it, or start with accelerate launch or torchrun"
                ) from None
            self.count, self.rank = group.num_processes, group.process_index
            self.device = str(group.device)
        asked = {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys()
        if asked and "WORLD_SIZE" not in os.environ:  # what accelerate does with --cpu
            print("note: accelerate has started one process; torchrun --nproc_per_node N starts N")
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.main and precision != "no":
            print(f"note: accelerate's mixed precision {precision} is not used; --dtype is")

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def parts(self, total: int, size: int) -> list[slice]:
        """This process's share of `total` images, in micro-batches of `size`."""
        share = total // self.count
        start, end = self.rank * share, (self.rank + 1) * share
        return [slice(i, min(i + size, end)) for i in range(start, end, size)]

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        """The shares of all processes, joined along the first axis in the order of `parts`."""
        if self.count == 1:
            return mine
        return gather(mine.contiguous())

    def sum(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Sums over processes, in one exchange."""
        if self.count == 1:
            return tensors
        flat = reduce(torch.cat([t.flatten() for t in tensors]), "sum")
        parts = flat.split([t.numel() for t in tensors])
        return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]

    def same(self, module: torch.nn.Module) -> None:
        """Give every process the first one's weights; rounding on several GPUs would drift
        apart.
        """
        if self.count > 1:
            with torch.no_grad():
                broadcast(list(module.state_dict().values()))

    def any(self, flag: bool) -> bool:
        """Whether the flag is raised in any process."""
        raised = self.sum([torch.tensor([float(flag)], device=self.device)])[0]
        return bool(raised)

    def close(self) -> None:
        """Leave the group."""
        if self.count > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


class Parallel(Run):
    """A run over several processes, with --accumulate, or on a base in half precision."""

    def __init__(self, *given, processes: Processes, **more):
        self.processes = processes
        super().__init__(*given, **more)
        self.attacker_optimizer.register_step_post_hook(lambda *_: processes.same(self.h))

    @property
    def size(self) -> int:
        """Members in one step, over all forwards and processes."""
        s = self.settings
        return s.batch_size * s.accumulate * self.processes.count

    def parts(self, b: Batch) -> list[slice]:
        """What this process sends through the UNet of a batch: as many forwards for any batch."""
        return self.processes.parts(len(b), self.settings.batch_size * (len(b) // self.size))

    def error(self, b: Batch) -> torch.Tensor:
        """The error maps of the whole batch; with gradient they are a leaf, and `gradients` goes on
        from it.
        """
        one_forward = super().error
        if not torch.is_grad_enabled():
            if len(b) % self.processes.count:  # too few to share: each process does all
                return one_forward(b)
            parts = self.processes.parts(len(b), 2 * self.settings.batch_size)
            return self.processes.gather(torch.cat([one_forward(b[part]) for part in parts]))
        self.outer_batch, parts = b, self.parts(b)
        if len(parts) == 1:
            self.mine = one_forward(b[parts[0]])  # with its graph: no other forward is needed
        else:
            with torch.no_grad():
                self.mine = torch.cat([one_forward(b[part]) for part in parts])
        self.whole = self.processes.gather(self.mine.detach()).requires_grad_()
        return self.whole

    def gradients(self, value: torch.Tensor, keep_graph: bool = False) -> list[torch.Tensor]:
        """d value / d(A, B) for a function of the error maps of the last `error` with gradient."""
        (slope,) = torch.autograd.grad(value, self.whole, retain_graph=keep_graph)  # (B, C, h, w)
        b, parts, total = self.outer_batch, self.parts(self.outer_batch), None
        for part in parts:
            error = self.mine if len(parts) == 1 else super().error(b[part])
            pulled = pull_back(error, slope[part], self.parameters, keep_graph and len(parts) == 1)
            if total is None:
                total = pulled
            else:
                total = [a.add_(g) for a, g in zip(total, pulled, strict=True)]
        return self.processes.sum(total)


def pull_back(
    error: torch.Tensor, slope: torch.Tensor, parameters: list[Parameter], keep_graph: bool = False
) -> list[torch.Tensor]:
    """(de / d parameters)^T slope.

    A mean over a latent has slopes near 1e-5, which half precision rounds to nothing on its way
    through the UNet: the largest is scaled to about 1 by a power of two, which changes no digit,
    and the gradients are scaled back.
    """
    scale = 2.0 ** -torch.frexp(slope.abs().max().float())[1].item()
    grads = torch.autograd.grad(error, parameters, slope * scale, retain_graph=keep_graph)
    return [g / scale for g in grads]
