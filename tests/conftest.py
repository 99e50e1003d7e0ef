"""A tiny Stable Diffusion folder with random weights and a folder of pictures, each built once per
test run.
"""

import json
import os
import random
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import time; no test needs the network
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # also of the processes and notebooks that tests start

COLOURS = ("red", "green", "blue", "orange", "purple", "black", "grey", "pink", "brown", "cyan")
SHAPES = ("circle", "square", "triangle", "ring")
CAPTIONS = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]


@pytest.fixture(scope="session", autouse=True)
def interrupts():
    """SIGINT reaches the processes that tests start, also where a shell's `&` has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The tensors here are too small to gain from a second thread."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def one_picture():
    """Of each caption, for the black-box attack: the tiny base draws nothing worth a second."""
    from attacks import model

    model.PICTURES = 1


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Away from the runs/ of whoever tests: default folders are taken there."""
    monkeypatch.chdir(tmp_path)


class InThread:
    """An executor that does a task when it is given."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *given):
        """A future that is done."""
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*given))
        return future


@pytest.fixture
def in_thread(monkeypatch):
    """What studies and audits would do in processes is done here, where a patch is seen."""
    from attacks import workers

    monkeypatch.setattr(workers, "processes", lambda _: InThread())


def tiny_vae(scaling_factor):
    """A random VAE of 32 px pictures and (4, 8, 8) latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=scaling_factor,
    )


def save_tiny_base(folder, linear_projection=False, prediction="epsilon"):
    """A StableDiffusionPipeline folder of 32 px pictures: (4, 8, 8) latents, 16 tokens of width 32,
    seed 0.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from embedded.base_model import build_text_encoder, build_tokenizer, pipeline

    tokenizer = build_tokenizer(CAPTIONS, folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
            use_linear_projection=linear_projection,
        )
        vae = tiny_vae(0.7)
        text_encoder = build_text_encoder(tokenizer, width=32, layers=1)
    pipeline(vae, text_encoder, tokenizer, unet, prediction).save_pretrained(
        folder, safe_serialization=True
    )
    return str(folder)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Path of the tiny base model; its proj_in and proj_out are 1x1 convolutions, as in Stable
    Diffusion 1.x.
    """
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny_base_linear(tmp_path_factory):
    """The same with linear proj_in and proj_out, as in Stable Diffusion 2.x."""
    return save_tiny_base(tmp_path_factory.mktemp("base_linear"), linear_projection=True)


@pytest.fixture(scope="session")
def tiny_base_v(tmp_path_factory):
    """The same weights as `tiny_base`, declared to predict v."""
    return save_tiny_base(tmp_path_factory.mktemp("base_v"), prediction="v_prediction")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Path of 40 distinct 32 px pictures `00.png` ... beside their captions `00.txt` ..."""
    from PIL import Image, ImageDraw

    folder, rng = tmp_path_factory.mktemp("images"), random.Random(0)
    for i, caption in enumerate(CAPTIONS):
        _, colour, shape = caption.split()
        image = Image.new("RGB", (32, 32), "white")
        draw = ImageDraw.Draw(image)
        x, y, r = rng.randint(11, 21), rng.randint(11, 21), rng.randint(5, 10)
        box = (x - r, y - r, x + r, y + r)
        if shape == "square":
            draw.rectangle(box, fill=colour)
        elif shape == "triangle":
            draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
        else:
            draw.ellipse(box, outline=colour, width=3, fill=colour if shape == "circle" else None)
        image.save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(caption + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def subject(tiny_base, image_folder):
    """(base, encoded images): the tiny base, twelve members and twelve others."""
    from files.bases import load_base
    from files.encode import encode
    from files.images import load_images

    base, images = load_base(tiny_base), load_images(image_folder, 32)
    roles, start = {"fresh": []}, 0
    for side in ("member", "nonmember"):
        for part, count in {"aux": 6, "val": 1, "test": 5}.items():
            roles[f"{side}_{part}"] = list(range(start, start + count))
            start += count
    return base, encode(base, images, roles)


# --------------------------------------------------------------------------------------------------
# Small runs

SMALL = {
    "members": 20, "rank": 2, "alpha": 4.0, "batch_size": 4, "target": "attention",
    "proxy": "pooled", "lr": 0.01, "attacker_lr": 0.01, "schedule": "constant", "samples": 1,
    "save_every": 1000, "steps": 3,
}  # fmt: skip


@pytest.fixture(scope="session")
def small(tiny_base, image_folder):
    """A function: the settings of a small run into a folder, changed by keywords."""
    from settings import Settings

    common = {"model": tiny_base, "data": image_folder} | SMALL
    return lambda out, **more: Settings(**common | {"out": str(out)} | more)


def assembled(settings):
    """The run of some settings, ready to train, as train.py makes it."""
    from methods.assembly import assemble
    from run import prepare
    from run.precheck import precheck
    from run.processes import Processes

    settings = prepare.on_device(precheck(settings)[0])
    processes = Processes(settings.device)
    settings, base, data = prepare.load(settings, processes)
    return assemble(settings, base, data, processes)


def rows(out):
    """The rows of metrics.jsonl, without the seconds that a step took."""
    lines = Path(out, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def tensors(out):
    """The tensors of the adapter, and of the attacker if there is one."""
    from safetensors.torch import load_file

    files = sorted(Path(out).glob("a*/*.safetensors"))
    return {f"{file.parent.name}/{k}": t for file in files for k, t in load_file(file).items()}


def assert_same_run(one, two, steps):
    """Two run folders hold the same rows and weights, bit for bit."""
    import torch

    assert rows(one) == rows(two) and len(rows(one)) == steps + 1
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys() and len(a) >= 8
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture
def no_pictures(monkeypatch):
    """They take most of a tiny run's time."""
    from run import pictures

    monkeypatch.setattr(pictures, "sample_grid", lambda *_: None)
    monkeypatch.setattr(pictures, "training_curves", lambda *_: None)


@pytest.fixture
def unfinished():
    """A function: trains, and stops when all steps are done, as if killed before the end."""
    import train
    from run import watch

    def run(settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(watch, "finish", lambda *_: {})
            train.train(settings)

    return run


@pytest.fixture
def stopped_and_gone_on_with():
    """A function: begins a run by `begin(folder)`, stops it after the row of its n-th step, those
    of teachers counted, and before the state of that step; then goes on with it by `flags`.
    """
    import torch

    import train
    from run.keeper import Keeper
    from settings import Settings

    def run(begin, folder, n=2, **flags) -> None:
        honest, steps = Keeper.state_due, []

        def state_due(*given):
            steps.append(1)
            if len(steps) == n:
                raise KeyboardInterrupt
            return honest(*given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Keeper, "state_due", state_due)
            with pytest.raises(KeyboardInterrupt):
                begin(folder)
        torch.manual_seed(5)  # another process would be elsewhere in the global stream
        train.train(Settings(out=str(folder), resume=True, **flags))

    return run
