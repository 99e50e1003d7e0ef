"""parallel.py: micro-batches and processes give the step of one big batch, for the ratio too; half
precision is close.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from run.learner import Learner
from safetensors.torch import load_file
from torch import nn

import train
from files.bases import resolve_dtype
from objectives import adaptation_loss, mi_gain, objective
from run.processes import Processes, WholeBatch, pull_back
from settings import Settings

ROOT = Path(train.__file__).parent
LAM = 4.0


class Toy:
    """e = (W x)^2 of eight images in float64, and an attacker on it."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(8, 6, generator=g, dtype=torch.float64)
        self.weight = nn.Parameter(torch.randn(12, 6, generator=g, dtype=torch.float64))
        self.attacker = nn.Sequential(nn.Flatten(), nn.Linear(12, 2).double(), nn.LogSoftmax(1))
        self.timesteps = torch.arange(8)

    def forward(self, part):
        return ((self.x[part] @ self.weight.T) ** 2).view(-1, 3, 2, 2)

    def value(self, method, error, part=slice(None)):
        gain = mi_gain(lambda e, t: self.attacker(e), error, self.timesteps[part])
        return objective(method, adaptation_loss(error), gain, LAM).total


@pytest.mark.parametrize("method", ["lora", "mp", "smp", "smp-detached"])
@pytest.mark.parametrize("size", [8, 4, 2])
def test_parts_give_the_gradient_of_the_whole(method, size):
    """Against autograd through all images at once; a plain mean of the parts' gradients is wrong
    for the ratio.
    """
    toy, processes = Toy(), Processes()
    (want,) = torch.autograd.grad(toy.value(method, toy.forward(slice(None))), [toy.weight])
    parts = processes.parts(8, size)
    batch = WholeBatch(toy.forward, parts, [toy.weight], processes)
    value = toy.value(method, batch.error)
    (first,) = batch.gradients(value)
    (got,) = batch.gradients(value, last=True)
    assert torch.equal(first, got)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    naive = [
        torch.autograd.grad(toy.value(method, toy.forward(part), part), toy.weight)[0]
        for part in parts
    ]
    mean = sum(naive) / len(parts)
    equal = torch.allclose(mean, want, rtol=1e-10, atol=1e-13)
    assert equal == (method in ("lora", "mp") or size == 8)


def test_small_slopes_survive_half_precision():
    """Slopes of 1e-9 are nothing in float16; scaled to 1 on the way they give the float32
    gradient.
    """
    g = torch.Generator().manual_seed(0)
    x, slope = torch.randn(5, 4, generator=g), 1e-9 * torch.randn(5, 3, generator=g)
    weight = nn.Parameter(torch.randn(3, 4, generator=g))
    error = (x.half() @ weight.half().T).float()
    (got,) = pull_back(error, slope, [weight], keep_graph=True)
    want = slope.T @ x
    assert (got - want).norm() < 2e-3 * want.norm()
    (naive,) = torch.autograd.grad(error, [weight], slope)
    assert naive.abs().max() == 0
    (scaled,) = pull_back((x @ weight.T), 2.0**-20 * slope, [weight])
    assert torch.equal(scaled, 2.0**-20 * torch.autograd.grad(x @ weight.T, [weight], slope)[0])


# ---- whole runs ----


def settings(model, images, out, **more):
    return Settings(
        **{
            "model": model,
            "data": images,
            "out": str(out),
            "members": 20,
            "rank": 2,
            "alpha": 4.0,
            "target": "attention",
            "proxy": "pooled" if more.get("method") == "mp" else "calibrated",
            "lr": 0.01,
            "attacker_lr": 0.01,
            "schedule": "constant",
            "steps": 5,
            "save_every": 1000,
            "norms_every": 3,
            "lam": LAM,
            **more,
        }
    )


def losses(out):
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()][1:]
    names = (
        "adaptation_loss",
        "mi_gain",
        "objective",
        "grad_norm",
        "attacker_loss",
        "grad_norm_gain",
    )
    return {n: np.array([r[n] for r in rows if r.get(n) is not None]) for n in names}


def adapter(out):
    return load_file(Path(out) / "adapter" / "pytorch_lora_weights.safetensors")


def assert_same_trajectory(a, b, tolerance=2e-4):
    one, two = losses(a), losses(b)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=tolerance, err_msg=name)
    x, y = adapter(a), adapter(b)
    for key in x:
        assert (x[key] - y[key]).abs().max() < 1e-4, key


@pytest.fixture(scope="module")
def big_batch(tiny_base, image_folder, tmp_path_factory):
    """Run folders of one process with batches of 4, per method."""
    tmp = tmp_path_factory.mktemp("big")
    for method in ("smp", "mp"):
        train.train(settings(tiny_base, image_folder, tmp / method, batch_size=4, method=method))
    return tmp


@pytest.mark.parametrize("method", ["smp", "mp"])
def test_accumulated_run_is_the_big_batch_run(tiny_base, image_folder, tmp_path, big_batch, method):
    """Two forwards of two images a step, checkpointed, follow one forward of four."""
    more = {"batch_size": 2, "accumulate": 2, "method": method, "gradient_checkpointing": True}
    train.train(settings(tiny_base, image_folder, tmp_path / "r", **more))
    assert_same_trajectory(big_batch / method, tmp_path / "r")


def test_two_processes_follow_one(tiny_base, image_folder, tmp_path, big_batch):
    """`torchrun` with two gloo processes of half the batch; the weights they hold at the end are
    the same bits.
    """
    flags = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in vars(settings(tiny_base, image_folder, tmp_path / "r", batch_size=2)).items()
        if v not in (None, False)
    ]
    script = tmp_path / "two.py"  # train.py, and what each process is left with
    script.write_text(
        f"import sys, torch; sys.path.insert(0, {str(ROOT)!r}); torch.set_num_threads(1)\n"
        "import train, settings\nfrom command import flags\n"
        "from run import learner\n"
        "made = []; init = learner.Learner.__init__\n"
        "def made_by(self, run):\n    init(self, run); made.append((self, run.processes.rank))\n"
        "learner.Learner.__init__ = made_by\n"
        f"train.train(flags.parse(settings.Settings, '', argv={flags!r}))\n"
        "me, rank = made[0]\n"
        "kept = [t.clone() for t in me.tensors().values()]\n"
        f"torch.save(kept, {str(tmp_path)!r} + f'/{{rank}}.pt')\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",  # a free port, found by torchrun
        "--nproc-per-node",
        "2",
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_trajectory(big_batch / "smp", tmp_path / "r")
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(one) == len(two) > 30 and all(
        torch.equal(a, b) for a, b in zip(one, two, strict=True)
    )
    assert (
        done.stdout.count("files:") == 1
        and json.loads((tmp_path / "r" / "config.json").read_text())["processes"] == 2
    )


# ---- precision ----


@pytest.fixture(scope="module")
def float_gradient(tiny_base, image_folder):
    return gradient(tiny_base, image_folder, "float32")


def gradient(model, images, dtype, **more):
    run = train.prepare(
        settings(model, images, "unused", dtype=dtype, batch_size=4, attacker_lr=1e-12, **more),
        Processes(),
    )
    learner = Learner(run)
    with torch.no_grad():  # B is zero at first, and so then is the gradient of A
        for p in learner.parameters:
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    next(train.algorithm_1(run, learner, [2]))
    assert (
        {p.dtype for p in learner.parameters}
        == {p.grad.dtype for p in learner.parameters}
        == {torch.float32}
    )
    assert next(run.base.unet.parameters()).dtype == getattr(torch, dtype)
    return torch.cat([p.grad.flatten() for p in learner.parameters])


@pytest.mark.parametrize("method", ["lora", "smp"])
@pytest.mark.parametrize("dtype, angle", [("bfloat16", 0.02), ("float16", 0.002)])
def test_half_precision_gradient(tiny_base, image_folder, method, dtype, angle):
    """The base in half precision, adapter and attacker in float32: the gradient points where
    float32's does.

    With the raw proxy: the pooled one has quantiles of e, whose slope sits on single elements, and
    rounding moves it from one to its neighbour (cosine 0.80 in bfloat16, 0.99 in float16 on these
    256 elements).
    """
    got, want = (
        gradient(tiny_base, image_folder, d, method=method, proxy="raw", clip=1e9)
        for d in (dtype, "float32")
    )
    assert 1 - torch.nn.functional.cosine_similarity(got, want, dim=0) < angle
    assert got.norm() == pytest.approx(want.norm().item(), rel=0.1)


def test_checkpointed_gradient(tiny_base, image_folder, float_gradient):
    """Computing activations twice changes nothing."""
    got = gradient(tiny_base, image_folder, "float32", gradient_checkpointing=True)
    torch.testing.assert_close(got, float_gradient, rtol=1e-5, atol=1e-8)


def test_auto_dtype(monkeypatch):
    """float32 on a CPU, bfloat16 or else float16 on a GPU; a name stays."""
    assert (resolve_dtype("auto", "cpu"), resolve_dtype("float16", "cpu")) == ("float32", "float16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capable, want in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, c=capable: c)
        assert resolve_dtype("auto", "cuda:1") == want
