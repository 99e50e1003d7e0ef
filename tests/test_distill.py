"""Leave-out distillation: no target for an image comes from weights that have seen it, the student
learns what its teachers say, and a killed run goes on to the same bits."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora
import train
from algorithm import Run, algorithm_1
from command.errors import UserError
from diffusion import Base, Encoded, predict
from methods import distill
from methods.assembly import assemble
from run import state
from run.folder import RunFolder
from run.keeper import Keeper
from run.processes import Processes
from run.resolve import resolve
from settings import Settings

pytestmark = pytest.mark.usefixtures("elsewhere")


def settings(tiny_base, **flags):
    """Three teachers of three steps, six of the student."""
    small = {"rank": 2, "alpha": 2.0, "target": "attention", "batch_size": 4, "lr": 0.01}
    small |= {"method": "distill", "teachers": 3, "teacher_steps": 3, "steps": 6}
    small |= {"model": tiny_base, "norms_every": 10**6, "out": "/nowhere/run"}
    return resolve(Settings(**(small | flags)))


def taught(subject, s):
    """The run of a student whose teachers are trained; the adapter stays in the base until
    `lora.remove`.
    """
    run = assemble(s, *subject, Processes())
    for teacher in run.lessons():
        for _ in algorithm_1(teacher, range(1, teacher.settings.steps + 1)):
            pass
    return run


def equal(a, b):
    """Whether two lists of tensors have the same bits."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def noise(*shape):
    """Pictures that are like no other, (*shape, 24, 24, 3)."""
    return np.random.default_rng(0).integers(0, 256, (*shape, 24, 24, 3), np.uint8)


@pytest.mark.parametrize("n", [5, 6, 13, 27, 60, 101])
def test_folds_are_a_partition(n):
    """Disjoint, complete, of about one size, also of pictures that are all one; another seed deals
    them otherwise.
    """
    members = list(range(3, 3 + n))
    for pixels in (noise(n + 3), np.zeros((n + 3, 24, 24, 3), np.uint8)):
        found = distill.folds(members, pixels, 5, 0)
        assert sorted(i for fold in found for i in fold) == members
        sizes = [len(fold) for fold in found]
        assert min(sizes) > 0 and max(sizes) - min(sizes) <= 2
        assert found == distill.folds(members, pixels, 5, 0) != distill.folds(members, pixels, 5, 1)


@pytest.mark.parametrize(("pictures", "alike"), [(50, 5), (20, 2), (7, 2)])
def test_like_pictures_are_in_one_fold(pictures, alike):
    """Near-copies of some pictures among as many others that are like none."""
    pixels = noise(2 * pictures)
    copied = pictures // alike * alike
    faint = pixels[:copied] // 16
    pixels[:copied] = pixels[:copied:alike].repeat(alike, 0) // 16 * 15 + faint
    order = np.random.default_rng(1).permutation(len(pixels))
    found = distill.folds(list(range(len(pixels))), pixels[order], 5, 0)
    for k in range(copied // alike):
        near = {int(at) for at in np.flatnonzero(order // alike == k)}
        assert any(near <= {*fold} for fold in found)


def test_teachers_and_student_draw_for_themselves(subject, tiny_base):
    """Other noise, timesteps and start of the order in each: torch knows 32 bits of a seed."""
    run, drawn = assemble(settings(tiny_base), *subject, Processes()), []
    for each in [*run.lessons(), run]:
        drawn.append(torch.randn(8, generator=each.outer))
        drawn.append(torch.randn(8, generator=each.inner))
    lora.remove(subject[0].unet, run.adapter)
    assert len({tuple(d.tolist()) for d in drawn}) == len(drawn) == 8


def test_lessons_left_alone_do_not_touch_the_global_stream(subject, tiny_base):
    """A run that was stopped within a teacher is thrown away at any time, as within another."""
    run = assemble(settings(tiny_base), *subject, Processes())
    lessons = run.lessons()
    next(lessons)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    lessons.close()
    lora.remove(subject[0].unet, run.adapter)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_teacher_never_sees_its_fold(subject, tiny_base):
    """A planted canary: whatever stands in place of an image, the teacher of its fold keeps every
    bit, and each of the others moves.
    """
    base, data = subject
    image = data.members()[4]
    planted = replace(data, latents=data.latents.clone())
    planted.latents[image] += 3 * torch.randn(data.latents[image].shape)
    found = []
    for images in (data, planted):
        run = taught((base, images), settings(tiny_base, teacher_steps=6))
        lora.remove(base.unet, run.adapter)
        found.append(run.teachers)
    for fold, before, after in zip(run.folds, *found, strict=True):
        assert equal(before, after) == (image in fold)


def test_the_target_is_the_answer_of_the_teacher_left_out(subject, tiny_base):
    """The student's errors, from forwards by hand with each teacher's weights in the adapter: a
    member's is that of its own fold.
    """
    base, _ = subject
    run, seen = taught(subject, settings(tiny_base)), set()
    for _ in range(6):
        b, targets = run.batch(run.D_tr), []
        found = run.error(b).detach()
        with torch.no_grad():
            own, before = predict(base, b.z0, b.c, b.t, b.eps), distill.weights_of(run.adapter)
            for weights in run.teachers:
                distill.hold(run.adapter, weights)
                targets.append(predict(base, b.z0, b.c, b.t, b.eps))
            distill.hold(run.adapter, before)
        for i, image in enumerate(b.index.tolist()):
            every = [(own[i] - target[i]) ** 2 for target in targets]
            near = [k for k, e in enumerate(every) if torch.allclose(e, found[i], 1e-3, 1e-5)]
            (k,) = near
            assert image in run.folds[k]
            seen.add(k)
    assert seen == {0, 1, 2}
    lora.remove(base.unet, run.adapter)


class Linear(nn.Module):
    """A UNet that is one matrix over channels: f = (W + B A) z."""

    def __init__(self, channels):
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(channels, channels, bias=False)})
        self.config, self.dtype = SimpleNamespace(in_channels=channels), torch.float32

    def forward(self, z, timesteps, encoder_hidden_states, return_dict=False):
        return (self.attn["to_q"](z.movedim(1, -1)).movedim(-1, 1),)


def test_a_linear_student_is_the_closed_form():
    """Of all draws together: W* = (sum_i W_k(i) S_i) (sum_i S_i)^-1, S_i the second moments of what
    the student sees of draw i and k(i) its teacher; there the gradient vanishes, and only there.
    """
    torch.manual_seed(0)
    channels, members = 3, 12
    abar = torch.linspace(0.99, 0.05, 50)
    pipeline = SimpleNamespace(vae_scale_factor=8)
    base = Base("linear", pipeline, Linear(channels), abar, "epsilon", 16, torch.device("cpu"))
    latents = torch.randn(members, channels, 2, 2) + torch.arange(members).view(-1, 1, 1, 1) / 4
    roles = {"member_aux": [0, 1, 2, 3], "member_val": [4], "member_test": list(range(5, members))}
    roles |= {"nonmember_aux": [0, 1]}  # asked by nobody
    names, pixels = [str(i) for i in range(members)], np.zeros((members, 16, 16, 3), np.uint8)
    data = Encoded(names, names, pixels, latents, torch.zeros(members, 1, 1), roles)
    run = assemble(settings("linear", rank=3), base, data, Processes())
    (layer,) = run.adapter.layers.values()
    run.teachers = [
        [torch.randn(3, channels), torch.randn(channels, 3)] for _ in range(run.settings.teachers)
    ]
    batches = [run.batch(run.D_tr) for _ in range(40)]
    folds = [{*fold} for fold in run.folds]
    moments, mixed = torch.zeros(channels, channels), torch.zeros(channels, channels)
    for batch in batches:
        a = abar[batch.t].view(-1, 1, 1, 1)
        z = a.sqrt() * batch.z0 + (1 - a).sqrt() * batch.eps
        for image, z_i in zip(batch.index.tolist(), z.movedim(1, -1), strict=True):
            (k,) = (k for k, fold in enumerate(folds) if image in fold)
            first, second = run.teachers[k]
            matrix = layer.base.weight + layer.alpha / layer.rank * second @ first
            square = z_i.reshape(-1, channels).T @ z_i.reshape(-1, channels)
            moments, mixed = moments + square, mixed + matrix.detach() @ square

    def slope():
        total = sum(Run.error(run, batch).sum() for batch in batches)
        return torch.autograd.grad(total, run.parameters)

    start = max(g.abs().max().item() for g in slope())
    with torch.no_grad():
        wanted = mixed @ torch.linalg.inv(moments) - layer.base.weight
        layer.lora_A.weight.copy_(torch.eye(3))
        layer.lora_B.weight.copy_(wanted * layer.rank / layer.alpha)
    assert max(g.abs().max().item() for g in slope()) < 1e-4 * start
    with torch.no_grad():
        layer.lora_B.weight[0, 0] += 0.1
    assert max(g.abs().max().item() for g in slope()) > 1e-2 * start


def test_micro_batches_have_the_gradient_of_one_batch(subject, tiny_base):
    """The same draws through one forward and through two, each with its own teacher forward."""
    found = []
    for flags in ({"batch_size": 4}, {"batch_size": 2, "accumulate": 2}):
        run = taught(subject, settings(tiny_base, teacher_steps=1, **flags))
        run.teachers = [
            [torch.full_like(w, 0.01 * (k + 1)) for w in weights]
            for k, weights in enumerate(run.teachers)
        ]
        b = run.batch(run.D_tr)
        assert len(run.parts(b)) == flags.get("accumulate", 1)
        found.append([g.clone() for g in run.gradients(run.error(b).mean())])
        lora.remove(subject[0].unet, run.adapter)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-3)


# --------------------------------------------------------------------------------------------------
# A whole run


@pytest.fixture(scope="module")
def whole(tiny_base, image_folder, tmp_path_factory):
    """The settings of a run, its folder after it, and the metrics of every teacher's step."""
    out = tmp_path_factory.mktemp("distilled") / "run"
    flags = {"data": image_folder, "members": 12, "samples": 1, "state_every": 2}
    s = settings(tiny_base, out=str(out), flip=True, **flags)
    train.train(s)
    return s, RunFolder(out)


def result(folder):
    """The adapter, and the rows without times."""
    (file,) = (folder.path / "adapter").glob("*.safetensors")
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in folder.rows()]
    return list(load_file(file).values()), rows


def test_a_run_leaves_the_student_alone(whole):
    """No teacher and no state stays; the rows are the student's."""
    s, folder = whole
    assert [row["step"] for row in folder.rows()] == list(range(s.steps + 1))
    assert not folder.state.exists() and not list(folder.path.rglob("teacher*"))
    assert "summary" in folder.config() and not (folder.path / "attacker").exists()


@pytest.mark.parametrize("teacher", [True, False])
def test_stopped_and_gone_on_with(whole, tmp_path, monkeypatch, teacher):
    """Inside the second teacher, and inside the student: the same files and metrics."""
    s, folder = whole
    out = str(tmp_path / "run")
    if teacher:
        saved, honest = [], state.save

        def save(where, *rest, **more):
            path = honest(where, *rest, **more)
            saved.append(where.name)
            if saved.count("teacher-1") == 1:
                raise KeyboardInterrupt
            return path

        monkeypatch.setattr(state, "save", save)
    else:
        honest = Keeper.record

        def record(keeper, row, *rest):
            honest(keeper, row, *rest)
            if row["step"] == 5:
                raise KeyboardInterrupt

        monkeypatch.setattr(Keeper, "record", record)
    with pytest.raises(KeyboardInterrupt):
        train.train(replace(s, out=out))
    monkeypatch.undo()
    torch.manual_seed(5)  # another process would be elsewhere in the global stream
    train.train(Settings(out=out, resume=True))
    (adapter, rows), (whole_adapter, whole_rows) = result(RunFolder(out)), result(folder)
    assert equal(adapter, whole_adapter) and rows == whole_rows


def test_dry_run_says_what_the_teachers_cost(whole, tmp_path, capsys):
    """Nothing is written."""
    s, _ = whole
    train.train(replace(s, out=str(tmp_path / "run"), dry_run=True))
    printed = capsys.readouterr().out
    assert "3 of 3 steps at" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"hessian_every": 2}, "leave it out with --method distill"),
        ({"method": "lora", "epsilon": 1.0}, "guarantee nothing without --method dp"),
        ({"method": "smp", "delta_dp": 1e-4}, "guarantee nothing without --method dp"),
        ({"teachers": 1}, "--teachers must be 2 or more"),
        ({"teachers": 0}, "--teachers must be"),
        ({"teacher_steps": 0}, "--teacher-steps must be"),
    ],
)
def test_what_cannot_be_is_refused(tiny_base, flags, words):
    """In one sentence, before anything is loaded."""
    with pytest.raises(UserError, match=words):
        settings(tiny_base, **flags)


def test_more_teachers_than_members(subject, tiny_base):
    """Known only once the images are."""
    base, data = subject
    with pytest.raises(UserError, match="more than the 12 members"):
        assemble(settings(tiny_base, teachers=13), base, data, Processes())


def test_defaults(tiny_base):
    """Half the passes, since a step of the student costs more."""
    embedded, other = resolve(Settings(method="distill")), resolve(Settings(method="lora"))
    assert (embedded.epochs, other.epochs) == (16, 32)
