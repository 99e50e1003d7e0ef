"""Differential privacy: clipped gradients against a loop over images, sensitivity, the noise's
deviation, the accountant against closed forms and a library, and a run that is gone on with.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import dp_accounting
import pytest
import torch
from dp_accounting import pld
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.stats import norm

import lora
import train
from algorithm import Run, algorithm_1
from command.errors import UserError
from command.flags import _read_config, checked
from methods import directions, dp, promise
from methods.assembly import assemble
from run import state
from run.folder import RunFolder
from run.keeper import Keeper
from run.processes import Processes
from run.resolve import resolve
from settings import Settings

NOT_CLIPPED = 1e9


@pytest.fixture(scope="module")
def file(tiny_base, image_folder, tmp_path_factory):
    """Two directions of every layer of the tiny base."""
    out = tmp_path_factory.mktemp("directions") / "d.safetensors"
    flags = {"model": tiny_base, "target": "all", "steps": 2, "batch_size": 4, "directions": 2}
    directions.make(directions.Flags(data=[image_folder], out=str(out), lr=0.01, **flags))
    return str(out)


def settings(tiny_base, file, **flags):
    """Of four steps, three images in a forward."""
    small = {"method": "dp", "directions": file, "batch_size": 3, "steps": 4, "lr": 0.05}
    small |= {"model": tiny_base, "norms_every": 10**6, "out": "/nowhere/run"}
    return resolve(Settings(**(small | flags)))


def known(number):
    """A secret that differs from others in its last word alone."""
    return torch.tensor([*range(1, dp.WORDS), number])


@pytest.fixture
def run(subject, tiny_base, file, request):
    """A run with the given flags, whose cores have left their start."""
    flags = getattr(request, "param", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dp, "secret", lambda: known(5))
        found = assemble(settings(tiny_base, file, **flags), *subject, Processes())
    with torch.no_grad():
        for i, p in enumerate(found.parameters):
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(i))
    yield found
    lora.remove(subject[0].unet, found.adapter)


def one_by_one(run, b, limit):
    """Gradients of every image's mean loss over its draws, by autograd, clipped and summed."""
    sums = [torch.zeros_like(p) for p in run.parameters]
    for i in range(run.size):
        error = Run.error(run, b[slice(i * dp.DRAWS, (i + 1) * dp.DRAWS)])
        gradient = torch.autograd.grad(error.mean(), run.parameters)
        length = math.sqrt(sum(g.square().sum().item() for g in gradient))
        for total, g in zip(sums, gradient, strict=True):
            total += g * min(1.0, limit / length)
    return sums


def close(found, wanted):
    """Two lists of tensors, to rounding."""
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5 * b.abs().max().item() + 1e-9)


def distance(one, two):
    """L2 norm of the difference of two lists of tensors."""
    gaps = ((a - b).square().sum().item() for a, b in zip(one, two, strict=True))
    return math.sqrt(sum(gaps))


@pytest.mark.parametrize("limit", [dp.CLIP, NOT_CLIPPED])
@pytest.mark.parametrize(
    "run", [{}, {"flip": True, "crop": True, "batch_size": 5}], indirect=True, ids=str
)
def test_clipped_gradients_equal_the_loop_over_images(run, monkeypatch, limit):
    """In micro-batches, with several draws, mirrored crops or not, all clipped or none."""
    monkeypatch.setattr(dp, "CLIP", limit)
    b = run.batch(run.D_tr)
    assert sorted(set(b.index.tolist())) == run.data.members()
    assert len(b) == dp.DRAWS * run.size
    run.error(b)
    close(run.sums, one_by_one(run, b, limit))
    close(run.gradients(None, keep_graph=True), [g / run.size for g in run.sums])


def test_without_noise_and_clip_it_is_the_full_gradient(run, monkeypatch):
    """Of the adaptation loss on all members."""
    monkeypatch.setattr(dp, "CLIP", NOT_CLIPPED)
    run.sigma = 0.0
    b = run.batch(run.D_tr)
    e = run.error(b)
    plain = Run.error(run, b)
    torch.testing.assert_close(e, plain, rtol=1e-4, atol=1e-6)
    close(run.gradients(e.mean()), torch.autograd.grad(plain.mean(), run.parameters))


@pytest.mark.parametrize("run", [{}, {"flip": True}], indirect=True, ids=str)
@pytest.mark.parametrize("image", [0, 5, 11])
def test_one_image_moves_the_sum_by_at_most_the_clip(run, image):
    """Whatever the image is: as it is, enormous, or nothing.  The others' draws are the same."""
    b = run.batch(run.D_tr)
    rows = slice(image * dp.DRAWS, (image + 1) * dp.DRAWS)
    run.error(b)
    sums = [g.clone() for g in run.sums]
    others = [i for i in range(len(b)) if not rows.start <= i < rows.stop]
    run.counted = run.size - 1  # one image fewer counts
    run.error(b[others])
    without, run.counted = run.sums, None
    assert 0 < distance(sums, without) <= dp.CLIP * (1 + 1e-4)
    b.z0[rows] *= 1e3
    run.error(b)
    assert distance(run.sums, without) <= dp.CLIP * (1 + 1e-4)


def test_two_processes_have_the_sum_of_one(run):
    """Each sends its share; a set that cannot be shared is filled with images of no weight."""
    b = run.batch(run.D_tr)
    run.error(b)
    want, shares, processes = run.sums, [], run.processes
    processes.gather = lambda mine: mine
    processes.sum = lambda tensors: tensors
    processes.count = 5
    filled = b[[*range(len(b)), *range(3 * dp.DRAWS)]]  # 12 members and 3 that fill
    for processes.rank in range(5):
        run.error(filled)
        shares.append(run.sums)
    close([sum(parts) for parts in zip(*shares, strict=True)], want)


def test_filling_up_to_what_processes_share(subject, tiny_base, file):
    """Five processes and twelve members: three more, the first, behind them."""
    processes = Processes()
    processes.count, processes.sum = 5, lambda tensors: tensors
    run = assemble(settings(tiny_base, file), *subject, processes)
    lora.remove(subject[0].unet, run.adapter)
    index = run.D_tr.draw()
    assert len(index) == 15 * dp.DRAWS and set(index[12 * dp.DRAWS :].tolist()) == {0}


def test_a_dry_run_times_one_forward(run):
    """Of three of twelve members; afterwards all are in a step again."""
    with run.one_forward() as count:
        assert count == 4 and len(run.batch(run.D_tr)) == 3 * dp.DRAWS
        assert [row["step"] for row in algorithm_1(run, (1, 2))] == [1, 2]
    assert len(run.batch(run.D_tr)) == 12 * dp.DRAWS and run.size == 12


def test_the_noise_has_its_deviation(run):
    """sigma C / N on every number; none in the norms that are logged."""
    run.error(run.batch(run.D_tr))
    exact, again = (run.gradients(None, keep_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(exact, again, strict=True))
    noises = []
    for _ in range(60):
        noised = run.gradients(None)
        noises += [(a - b).flatten() for a, b in zip(noised, exact, strict=True)]
    noise = torch.cat(noises)
    deviation = run.sigma * dp.CLIP / run.size
    assert len(noise) > 5000
    assert noise.std().item() == pytest.approx(deviation, rel=0.05)
    assert abs(noise.mean().item()) < 0.05 * deviation


def test_no_seed_of_32_bits_has_the_noise():
    """Every word of the secret counts, in the first draws; torch itself forgets half of a seed."""
    first, second = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5 + 2**32)
    assert torch.equal(torch.randn(9, generator=first), torch.randn(9, generator=second))
    words, stream, drawn = dp.secret(), torch.Generator(), []
    assert words.shape == (dp.WORDS,) and words.min() >= 0 and 2**31 < words.max() < 2**32
    assert not torch.equal(words, dp.secret())
    for at in (None, 1, 300, dp.WORDS - 1):
        changed = words.clone()
        if at is not None:
            changed[at] ^= 1 << 7
        dp.begin(stream, changed)
        drawn.append(torch.randint(2**31, (2 * dp.WORDS,), generator=stream))
    again = stream.get_state()
    dp.begin(stream, changed)
    assert torch.equal(torch.randint(2**31, (2 * dp.WORDS,), generator=stream), drawn[-1])
    assert torch.equal(stream.get_state(), again)
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])


def test_another_form_of_the_streams_state_is_refused(monkeypatch):
    """Rather than noise that can be guessed."""
    stream = SimpleNamespace(get_state=lambda: torch.zeros(5056, dtype=torch.uint8))
    stream.manual_seed = lambda _: stream
    with pytest.raises(RuntimeError, match="another form"):
        dp.begin(stream, dp.secret())


# --------------------------------------------------------------------------------------------------
# What is promised


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("steps", [1, 20])
def test_the_accountant_against_a_library(epsilon, steps):
    """The noise multiplier that is found keeps the promise by the privacy loss distribution of
    dp-accounting, and little less noise would not.
    """
    delta = 1e-3
    sigma = math.sqrt(steps) / promise.mu_for(epsilon, delta)

    def library(multiplier):
        accountant = pld.PLDAccountant()
        event = dp_accounting.GaussianDpEvent(multiplier)
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, steps))
        return accountant.get_epsilon(delta)

    assert library(sigma) == pytest.approx(epsilon, abs=1e-3 * max(1, epsilon))
    assert library(0.98 * sigma) > epsilon


def test_the_closed_form_of_mu():
    """delta(epsilon) of mu-Gaussian-DP by scipy's own distribution; more noise is a smaller mu."""
    for epsilon, mu in ((0.5, 1.0), (3.0, 1.0), (8.0, 2.0)):
        want = norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * norm.cdf(
            -epsilon / mu - mu / 2
        )
        assert promise.delta_of(epsilon, mu) == pytest.approx(want, rel=1e-6)
        assert promise.mu_for(epsilon, want) == pytest.approx(mu, rel=1e-6)
        assert promise.epsilon_for(mu, want) == pytest.approx(epsilon, rel=1e-6)
    assert promise.epsilon_for(0.0, 1e-3) == promise.epsilon_for(1e-3, 1e-3) == 0.0
    assert promise.mu_for(1.0, 1e-5) < promise.mu_for(1.0, 1e-3) < promise.mu_for(3.0, 1e-3)


def test_delta_is_a_tenth_of_one_by_n_or_what_was_asked(subject, tiny_base, file):
    """A promise with 1 / N would let one image out whole, and is refused."""
    for delta in (None, 0.02):
        s = settings(tiny_base, file, delta_dp=delta, epsilon=2.0)
        run = assemble(s, *subject, Processes())
        lora.remove(subject[0].unet, run.adapter)
        found = dp.promise(run)
        assert found.delta == pytest.approx(delta or 0.1 / 12)
        assert found.sigma == run.sigma == pytest.approx(2 / promise.mu_for(2.0, found.delta))
    with pytest.raises(UserError, match="give one below 1 / N"):
        assemble(replace(s, delta_dp=1 / 12), *subject, Processes())
    assert not any(isinstance(m, lora.LoRALinear) for m in subject[0].unet.modules())


def test_a_config_of_the_method_before_is_refused():
    """It had another dp, which would be a silent change."""
    old = {"method": "dp", "image_clip": 0.1, "epsilon": 8.0}
    with pytest.raises(UserError, match="its --method dp is gone; commit 0db7ef9"):
        checked(Settings, old, Path("config.json"))
    assert checked(Settings, old | {"method": "lora"}, Path("config.json"))["method"] == "lora"


def test_what_an_attack_catches_at_most():
    """The likelihood ratio of N(0, 1) and N(mu, 1), which no attack beats, by drawing them."""
    found = promise.Promise(8.0, 1e-3, 2.0, 2.0)
    g = torch.Generator().manual_seed(0)
    out, inside = torch.randn(2, 400_000, generator=g) + torch.tensor([[0.0], [2.0]])
    threshold = out.quantile(0.99)
    assert found.caught(0.01) == pytest.approx((inside > threshold).float().mean().item(), abs=0.01)
    replaced = (torch.randn(400_000, generator=g) + 4 > threshold).float().mean().item()
    assert found.caught(0.01, 2) == pytest.approx(replaced, abs=0.01)
    words = r"epsilon 8 at delta 0.001: .* finds more than 38% of the members .*, or 96% where an"
    assert re.search(words, str(found))
    odd = promise.Promise(8.0, 0.1 / 67, 2.0, 2.0)
    assert "delta 0.00149:" in str(odd)


def test_a_run_says_what_it_promises_and_tells_no_secret(
    tiny_base, file, image_folder, tmp_path, monkeypatch, capsys
):
    """Stopped and gone on with it has the same adapter.  The secret is in the state alone, and
    gone with it; whoever knows the seed has not the noise.
    """
    flags = {"data": image_folder, "members": 12, "samples": 0, "state_every": 1, "epsilon": 3.0}
    s, honest = settings(tiny_base, file, **flags), Keeper.record
    secrets = map(known, [5, 5, 7])
    monkeypatch.setattr(dp, "secret", lambda: next(secrets))
    whole, part, other = (tmp_path / name for name in ("whole", "part", "other"))
    train.train(replace(s, out=str(whole)))
    printed = capsys.readouterr().out
    assert "guarantee: epsilon 3 at delta 0.00833: no attack on the" in printed

    def record(keeper, row, *rest):
        honest(keeper, row, *rest)
        if row["step"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "record", record)
        with pytest.raises(KeyboardInterrupt):
            train.train(replace(s, out=str(part)))
    assert state.files(part / "state")
    monkeypatch.setattr(dp, "secret", lambda: known(11))  # the state has the secret
    train.train(Settings(out=str(part), resume=True))
    monkeypatch.setattr(dp, "secret", lambda: known(7))
    train.train(replace(s, out=str(other)))
    name = "adapter/pytorch_lora_weights.safetensors"
    one, two, three = (load_file(folder / name) for folder in (whole, part, other))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], three[k]) for k in one)
    summary = RunFolder(whole).config()["summary"]
    assert summary["epsilon"] == 3.0 and summary["delta"] == pytest.approx(0.1 / 12)
    assert not (whole / "state").exists() and not (part / "state").exists()
    again = resolve(Settings(**_read_config(Settings, whole / "config.json")))  # --config
    assert again.epsilon == 3.0 and again.rank is None
    assert summary["promise"].startswith("epsilon 3 at delta 0.00833: no attack on the")
    card = (whole / "adapter" / "README.md").read_text()
    assert "no attack on the adapter finds" in card and "It does not cover several images" in card
    assert "--seed" not in card and "Loss attack on" not in card
    with safe_open(whole / name, "pt") as saved:  # the seed deals the members
        assert "seed" not in saved.metadata() and saved.metadata()["method"] == "dp"


def test_the_norms_of_a_row_are_finite_and_the_held_out_losses_see_no_member(run):
    """A step; the loss that --stop best goes by is of validation non-members."""
    rows = list(algorithm_1(run, range(1, 3)))
    assert all(math.isfinite(row["grad_norm"]) for row in rows)
    assert not {*run.data.roles["nonmember_val"]} & {*run.data.members()}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"target": "full"}, "leave --target out"),
        ({"rank": 4}, "leave --rank out"),
        ({"init": "adapter.safetensors"}, "leave --init out"),
        ({"gradient_checkpointing": True}, "leave --gradient-checkpointing out"),
        ({"directions": None}, "needs --directions FILE"),
        ({"epsilon": 0.0}, "--epsilon must be above 0"),
        ({"method": "lora"}, "--directions goes with --method dp"),
    ],
)
def test_what_cannot_be_promised_is_refused(tiny_base, file, flags, words):
    """In one sentence, before anything is loaded."""
    with pytest.raises(UserError, match=words):
        settings(tiny_base, file, **flags)


def test_the_embedded_defaults():
    """Directions, steps, rate and schedule of the embedded model."""
    s = resolve(Settings(method="dp"))
    assert (s.steps, s.lr, s.schedule, s.epsilon) == (6, 0.08, "linear", 8.0)
    assert Path(s.directions).is_file()
