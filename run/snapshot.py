"""All that changes while a run trains, as named tensors: weights, optimisers, random streams, the
order of the data.

    tensors = tensors_of(run)                  # what a training state holds
    restore(run, tensors)                      # the run goes on to the same bits

Tested in tests/test_checkpoint.py, which kills a run twenty times.
"""

from types import ModuleType

import torch

from algorithm import Run, Shuffled

# not there before their first use
LATER = ("optimizer", "attacker_optimizer")


def queues(run: Run) -> list[Shuffled]:
    """The sets that batches come from."""
    return [run.D_tr, run.D_m, run.D_n]


def tensors_of(run: Run) -> dict[str, torch.Tensor]:
    """{"<group>/<name>": tensor}; random streams as the bytes of their state."""
    groups = {
        "adapter": run.adapter.tensors(),
        "optimizer": optimizer_tensors(run.optimizer),
        "attacker": run.h.state_dict(),
        "attacker_optimizer": optimizer_tensors(run.attacker_optimizer),
        "random": {"outer": run.outer.get_state(), "inner": run.inner.get_state()},
        "queue": {str(i): D.queue for i, D in enumerate(queues(run))},
    }
    groups["random"]["cpu"] = torch.get_rng_state()
    if (device := run.base.device).type != "cpu":
        streams, at = device_streams(device)
        groups["random"]["device"] = streams.get_rng_state(*at)
    return {
        f"{group}/{name}": tensor
        for group, named in groups.items()
        for name, tensor in named.items()
    }


def restore(run: Run, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `tensors_of`; nothing of the given tensors is kept.

    Raises ValueError, before anything has changed, unless they are as this run has them.
    """
    _require_fit(run, tensors)
    groups: dict[str, dict[str, torch.Tensor]] = {name: {} for name in LATER}
    for name, tensor in tensors.items():
        group, _, key = name.partition("/")
        # cloned: a view into a file may lie where the processor sums in another order
        groups.setdefault(group, {})[key] = tensor.clone()
    with torch.no_grad():
        for name, weight in run.adapter.tensors().items():
            weight.copy_(groups["adapter"][name])
    run.h.load_state_dict(groups["attacker"])
    restore_optimizer(run.optimizer, groups["optimizer"])
    restore_optimizer(run.attacker_optimizer, groups["attacker_optimizer"])
    run.outer.set_state(groups["random"]["outer"])
    run.inner.set_state(groups["random"]["inner"])
    torch.set_rng_state(groups["random"]["cpu"])
    device = run.base.device
    if "device" in groups["random"] and device.type != "cpu":
        streams, at = device_streams(device)
        streams.set_rng_state(groups["random"]["device"], *at)
    for i, D in enumerate(queues(run)):
        D.queue = groups["queue"][str(i)]


def _require_fit(run: Run, tensors: dict[str, torch.Tensor]) -> None:
    """Names, dtypes and shapes of `tensors` against those that a state of this run has."""
    want = {k: v for k, v in tensors_of(run).items() if k.split("/")[0] not in LATER}
    want |= moments("optimizer", run.parameters)
    if any(name.startswith("attacker_optimizer/") for name in tensors):
        want |= moments("attacker_optimizer", list(run.h.parameters()))
    mine, given = layout(want), layout(tensors)
    for name in sorted(mine.keys() | given.keys()):
        if mine.get(name) != given.get(name):
            raise ValueError(f"{name} is not what this run has: {given.get(name, 'nothing')}")


def layout(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """{name: (dtype, shape)}, without the lengths that change as a run goes on, and without the
    stream of the device, which may change with --resume.
    """
    return {
        name: (t.dtype, tuple(t.shape[1:] if name.startswith("queue/") else t.shape))
        for name, t in tensors.items()
        if name != "random/device"
    }


def device_streams(device: torch.device) -> tuple[ModuleType, tuple]:
    """(torch.cuda or the like, arguments that name this device of that kind)."""
    return getattr(torch, device.type), (device,) if device.type == "cuda" else ()


# --------------------------------------------------------------------------------------------------
# Optimisers as flat dictionaries of tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """{"<parameter index>.<name>": tensor}: moments and step counts of an Adam-like optimiser."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, slots in state.items() for name, value in slots.items()}


def moments(name: str, parameters: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `optimizer_tensors` of an Adam over `parameters` has after a step, with "<name>/" before
    each; of the values only dtypes and shapes count.
    """
    slots = {"step": torch.tensor(0.0), "exp_avg": None, "exp_avg_sq": None}
    return {
        f"{name}/{i}.{slot}": parameter if value is None else value
        for i, parameter in enumerate(parameters)
        for slot, value in slots.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse; learning rate and the like stay as the optimiser was made."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    for parameter, slots in optimizer.state.items():
        for name, value in slots.items():
            if value.shape == parameter.shape:  # a step then goes through memory as before
                slots[name] = torch.empty_like(parameter.detach()).copy_(value)
