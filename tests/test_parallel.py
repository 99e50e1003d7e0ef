"""run/processes.py: micro-batches and processes give the step of one big batch, for the ratio too;
half precision is close.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assembled, rows, tensors
from torch import nn

import train
from algorithm import Batch, Run, algorithm_1
from files.devices import resolve_dtype
from objectives import adaptation_loss, mi_gain, objective
from run.processes import Parallel, Processes, pull_back
from settings import Settings

ROOT = Path(train.__file__).parent
LAM = 4.0


class Toy(Run):
    """e = (W x)^2 of images x (6,) in float64, and an attacker on it."""

    def __init__(self, settings):
        self.settings = settings
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(12, 6, generator=g, dtype=torch.float64))
        self.parameters = [self.weight]
        self.h = nn.Sequential(nn.Flatten(), nn.Linear(12, 2).double(), nn.LogSoftmax(1))
        self.attacker_optimizer = torch.optim.SGD(self.h.parameters())

    def error(self, b):
        """(B, 3, 2, 2)."""
        return ((b.z0 @ self.weight.T) ** 2).view(-1, 3, 2, 2)

    def value(self, method, e):
        return objective(method, adaptation_loss(e), mi_gain(self.h(e)), LAM).total


class Parts(Parallel, Toy):
    """The same in micro-batches."""


@pytest.mark.parametrize("method", ["lora", "mp", "smp", "smp-detached"])
@pytest.mark.parametrize(("size", "images"), [(8, 8), (4, 8), (2, 8), (2, 16)])
def test_parts_give_the_gradient_of_the_whole(method, size, images):
    """Against autograd through all images at once; a plain mean of the parts' gradients is wrong
    for the ratio.  A batch with each image twice goes through in as many parts.
    """
    settings, processes = Settings(batch_size=size, accumulate=8 // size), Processes()
    toy = Parts(settings, processes=processes)
    x = torch.randn(images, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    b = Batch(torch.arange(images), *[x] * 5)
    (want,) = torch.autograd.grad(toy.value(method, Toy.error(toy, b)), [toy.weight])
    assert [p.stop - p.start for p in toy.parts(b)] == [size * images // 8] * (8 // size)
    with torch.no_grad():
        assert torch.equal(toy.error(b), Toy.error(toy, b))
    value = toy.value(method, toy.error(b))
    (first,) = toy.gradients(value, keep_graph=True)
    (got,) = toy.gradients(value)
    assert torch.equal(first, got)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    naive = [
        torch.autograd.grad(toy.value(method, Toy.error(toy, b[part])), toy.weight)[0]
        for part in toy.parts(b)
    ]
    equal = torch.allclose(sum(naive) / len(naive), want, rtol=1e-10, atol=1e-13)
    assert equal == (method in ("lora", "mp") or size == 8)


def test_a_batch_that_cannot_be_shared():
    """Such as the fixed one of --hessian-every: each process sends all of it through."""
    processes = Processes()
    processes.count = 2
    toy, x = Parts(Settings(batch_size=1), processes=processes), torch.ones(3, 6).double()
    b = Batch(torch.arange(3), *[x] * 5)
    with torch.no_grad():
        assert torch.equal(toy.error(b), Toy.error(toy, b))


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


def settings(small, out, **more):
    """Of a run of five steps, with the calibrated attacker where nothing else is said."""
    calibrated = {"proxy": "calibrated", "lam": LAM, "steps": 5, "norms_every": 3, "samples": 0}
    return small(out, **calibrated | more)


def assert_same_trajectory(a, b, tolerance=2e-4):
    """The numbers of the rows and the adapters."""
    names = ("adaptation_loss", "mi_gain", "objective", "grad_norm", "attacker_loss")
    one, two = rows(a)[1:], rows(b)[1:]
    for name in (*names, "grad_norm_gain"):
        want, got = (np.array([r[name] for r in found if name in r]) for found in (one, two))
        np.testing.assert_allclose(got, want, rtol=tolerance, err_msg=name)
    x, y = tensors(a), tensors(b)
    for key in x:
        assert not key.startswith("adapter/") or (x[key] - y[key]).abs().max() < 1e-4, key


@pytest.fixture(scope="module")
def big_batch(small, tmp_path_factory):
    """Run folders of one process with batches of 4, per method."""
    tmp = tmp_path_factory.mktemp("big")
    train.train(settings(small, tmp / "smp"))
    train.train(settings(small, tmp / "mp", method="mp", proxy="pooled"))
    return tmp


@pytest.mark.parametrize(("method", "proxy"), [("smp", "calibrated"), ("mp", "pooled")])
def test_accumulated_run_is_the_big_batch_run(small, tmp_path, big_batch, method, proxy):
    """Two forwards of two images a step, checkpointed, follow one forward of four."""
    more = {"batch_size": 2, "accumulate": 2, "method": method, "proxy": proxy}
    train.train(settings(small, tmp_path / "r", gradient_checkpointing=True, **more))
    assert_same_trajectory(big_batch / method, tmp_path / "r")


def test_two_processes_follow_one(small, tmp_path, big_batch):
    """`torchrun` with two gloo processes of half the batch; the weights they hold at the end are
    the same bits.
    """
    flags = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in vars(settings(small, tmp_path / "r", batch_size=2)).items()
        if v not in (None, False)
    ]
    script = tmp_path / "two.py"  # train.py, and what each process is left with
    script.write_text(
        f"import sys, torch; sys.path.insert(0, {str(ROOT)!r}); torch.set_num_threads(1)\n"
        "import train, settings\nfrom command import flags\n"
        "from run import keeper, snapshot\n"
        "made = []; init = keeper.Keeper.__init__\n"
        "def made_by(self, run, processes):\n"
        "    init(self, run, processes); made.append((run, processes.rank))\n"
        "keeper.Keeper.__init__ = made_by\n"
        f"train.train(flags.parse(settings.Settings, '', argv={flags!r}))\n"
        "run, rank = made[0]\n"
        f"torch.save(snapshot.tensors_of(run), {str(tmp_path)!r} + f'/{{rank}}.pt')\n"
    )
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *launcher, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_trajectory(big_batch / "smp", tmp_path / "r")
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one.keys() == two.keys() and len(one) > 30
    assert not [name for name in one if not torch.equal(one[name], two[name])]
    assert done.stdout.count("files:") == 1
    assert json.loads((tmp_path / "r" / "config.json").read_text())["processes"] == 2


def test_one_process_where_several_were_asked_for(capsys, monkeypatch):
    """As `accelerate launch --cpu --num_processes 2` does."""
    for name in ("WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    Processes()
    assert not capsys.readouterr().out
    monkeypatch.setenv("MASTER_PORT", "29500")
    Processes()
    assert "accelerate has started one process" in capsys.readouterr().out


# ---- precision ----


def gradient(small, dtype, **more):
    """That of A and B in the second step, after weights that have moved."""
    run = assembled(settings(small, "unused", dtype=dtype, attacker_lr=1e-12, **more))
    with torch.no_grad():  # B is zero at first, and so then is the gradient of A
        for p in run.parameters:
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    next(algorithm_1(run, [2]))
    dtypes = {p.dtype for p in run.parameters} | {p.grad.dtype for p in run.parameters}
    assert dtypes == {torch.float32} and run.base.unet.dtype == getattr(torch, dtype)
    return torch.cat([p.grad.flatten() for p in run.parameters])


@pytest.mark.parametrize("method", ["lora", "smp"])
@pytest.mark.parametrize("dtype, angle", [("bfloat16", 0.02), ("float16", 0.002)])
def test_half_precision_gradient(small, method, dtype, angle):
    """The base in half precision, adapter and attacker in float32: the gradient points where
    float32's does.

    With the raw proxy: the pooled one has quantiles of e, whose slope sits on single elements, and
    rounding moves it from one to its neighbour (cosine 0.80 in bfloat16, 0.99 in float16 on these
    256 elements).
    """
    more = {"method": method, "proxy": "raw", "clip": 1e9}
    got, want = (gradient(small, d, **more) for d in (dtype, "float32"))
    assert 1 - torch.nn.functional.cosine_similarity(got, want, dim=0) < angle
    assert got.norm() == pytest.approx(want.norm().item(), rel=0.1)


def test_checkpointed_gradient(small):
    """Computing activations twice changes nothing."""
    got, want = (gradient(small, "float32", gradient_checkpointing=c) for c in (True, False))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


def test_auto_dtype(monkeypatch):
    """float32 on a CPU, bfloat16 or else float16 on a GPU; a name stays."""
    assert (resolve_dtype("auto", "cpu"), resolve_dtype("float16", "cpu")) == ("float32", "float16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capable, want in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, c=capable: c)
        assert resolve_dtype("auto", "cuda:1") == want
