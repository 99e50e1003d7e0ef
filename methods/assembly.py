"""Which classes a run is made of, by its settings: `algorithm.Run`, and before it those that attach
what goes beyond the paper.
"""

import torch

from algorithm import Run
from command.errors import UserError
from diffusion import Base, Encoded
from lora import Adapter, remove
from methods import dp
from methods.calibrated import Calibrated
from methods.distill import Student
from run import prepare
from run.processes import Parallel, Processes
from run.regularised import Scheduled, Views
from run.watch import Curved
from settings import Settings


def assemble(
    s: Settings, base: Base, data: Encoded, processes: Processes, extra: tuple[type, ...] = ()
) -> Run:
    """The run, ready to train, with a new adapter in the base; the classes of `extra` come first.

    Raises UserError for an adapter that cannot be used; the base is then as it was.
    """
    adapter = (dp if s.method == "dp" else prepare).new_adapter(s, base)
    try:
        return _around(adapter, s, base, data, processes, extra)
    except UserError:
        remove(base.unet, adapter)
        raise


def _around(
    adapter: Adapter,
    s: Settings,
    base: Base,
    data: Encoded,
    processes: Processes,
    extra: tuple[type, ...],
) -> Run:
    """The run of an adapter that is in the base."""
    s = prepare.complete(s, adapter, data, processes.count)
    if s.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    kinds, given = [*extra], {}
    if s.method == "distill":
        kinds.append(Student)
    if s.hessian_every:
        kinds.append(Curved)
    if s.proxy == "calibrated":
        kinds.append(Calibrated)  # before Views, whose images the base is to see
    if s.flip or s.crop:
        kinds.append(Views)
    if s.schedule != "constant":
        kinds.append(Scheduled)
    if s.method == "dp":
        kinds.append(dp.Private)
    in_parts = processes.count * s.accumulate > 1 or base.unet.dtype != torch.float32
    if in_parts or s.method in ("distill", "dp"):
        given["processes"] = processes
        kinds.append(Parallel)
    return type("Assembled", (*kinds, Run), {})(s, base, data, adapter, **given)
