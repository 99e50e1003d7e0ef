"""What a run works on: model, images and who is a member, the adapter, complete settings."""

from dataclasses import replace

import torch

import lora
from command.errors import UserError
from diffusion import PARTS, Base, Encoded
from files import EMBEDDED_SETS, lora_files, whole
from files import roles as dealing
from files.bases import load_base
from files.devices import resolve_device, resolve_dtype
from files.encode import encode
from files.images import Images, load_images
from run.folder import RunFolder
from run.processes import Processes
from settings import Settings, most_members


def load(s: Settings, processes: Processes) -> tuple[Settings, Base, Encoded]:
    """Settings with --members filled in, the model, and the images encoded; a few of them for a dry
    run.

    Raises UserError for a model or images that cannot be used.
    """
    torch.manual_seed(s.seed)  # attacker initialisation and dropout
    base = load_base(s.model, processes.device, s.dtype, s.size)
    images = load_images(s.data, base.size, s.caption, s.nonmembers)
    s, images, roles = deal(s, images, processes.main)
    return s, base, encode(base, images, roles, few=s.dry_run)


def deal(s: Settings, images: Images, speak: bool) -> tuple[Settings, Images, dict[str, list[int]]]:
    """Who among the images is a member, said in a line; settings with --members filled in, and the
    images that are needed.

    Raises UserError if there are too few.
    """
    roles = dealing.split(images, s.seed, s.members, most=most_members(s))
    if images.private is not None:
        images, roles = dealing.only_dealt(images, roles)
    if speak:
        dealing.say(roles, s.nonmembers, own=s.data not in EMBEDDED_SETS and not images.folders)
    count = sum(len(roles[f"member_{part}"]) for part in PARTS)
    return replace(s, members=s.members or count), images, roles


def complete(s: Settings, adapter: lora.Adapter, data: Encoded, count: int) -> Settings:
    """The settings with steps and, where a flag gives them, with rank, alpha and target of the
    adapter; `count` processes train.
    """
    size = s.batch_size * s.accumulate * count
    steps = s.steps or -(-s.epochs * len(data.members()) // size)
    teacher_steps = s.teacher_steps or -(-steps // 4)
    if s.method != "dp":  # whose directions give them
        rank, alpha = adapter.rank_and_alpha()
        s = replace(s, rank=rank, alpha=alpha, target=adapter.target)
    return replace(s, steps=steps, teacher_steps=teacher_steps)


def new_adapter(s: Settings, base: Base) -> lora.Adapter:
    """A fresh adapter in the base, or that of --init.

    Raises UserError for a file that does not fit and for a base that cannot be adapted so.
    """
    full = s.target == "full"
    if s.init:
        if full != whole.is_one(s.init):
            kind = "no whole UNet" if full else "a whole UNet"
            raise UserError(f"--init {s.init} is {kind}: --target full goes with one")
        return (whole if full else lora_files).load(base.unet, s.init)[0]
    if full:
        return whole.WholeUNet(base.unet)
    generator = torch.Generator().manual_seed(s.seed)
    try:
        return lora.inject(base.unet, s.target, s.rank, s.alpha, generator)
    except ValueError as error:
        raise UserError(f"{s.model} cannot be adapted so: {error}") from None


def on_device(s: Settings) -> Settings:
    """The settings with the device and the dtype that "auto" stands for here."""
    before = RunFolder(s.out).device() if s.resume else None
    device = resolve_device(s.device, before)
    if before not in (None, device) and s.device == "auto":
        print(f"note: {s.out} was started on {before}, which is not here: it continues on {device}")
    return replace(s, device=device, dtype=resolve_dtype(s.dtype, device))
