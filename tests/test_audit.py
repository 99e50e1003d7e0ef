"""The audit: its plan, its figures against curves/roc.py and scipy, a whole one on the tiny base,
killed and gone on with, with a process killed, and two compared."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import InThread
from scipy.stats import binomtest

import audit
import lora
import train
from attacks import audit_plan, audit_record, audit_tasks, decisions, lira, quality, workers
from bench import coverage
from command.errors import UserError
from command.flags import parse
from curves import roc
from diffusion import GRID_SEED, TIMESTEPS, encode_captions, encode_images, loss_grid, sample
from files import lora_files
from files.bases import load_base
from files.images import ROLES, Images, load_images
from methods.promise import mu_for
from report import audit_page
from run.regularised import view
from settings import Settings

ROOT = Path(audit.__file__).parent
SMALL = {"rank": 2, "alpha": 4.0, "batch_size": 4, "lr": 0.02, "steps": 8, "pool": 20}


def flags(tiny_base, image_folder, out, **other):
    """The settings of an audit of four adapters on the tiny base, in two processes."""
    given = {"method": "lora", "adapters": 4, "jobs": 2, "model": tiny_base, "data": image_folder}
    return audit.Audit(**SMALL | given | {"out": str(out)} | other)


@pytest.fixture(scope="module")
def audited(tiny_base, image_folder, tmp_path_factory):
    """A whole audit, in this process: its folder and its record."""
    out = tmp_path_factory.mktemp("audits") / "lora"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "processes", lambda _: InThread())
        return out, audit.audit(flags(tiny_base, image_folder, out))


def make_plan(tiny_base, image_folder, out="x", **other):
    """The plan of such an audit."""
    return audit.make_plan(audit.complete(flags(tiny_base, image_folder, out, **other)))


# --------------------------------------------------------------------------------------------------
# The plan


def test_pictures_are_from_other_captions_for_every_adapter(tiny_base, image_folder):
    """Of held-out images, in turn; without them the key is as it was."""
    plain = make_plan(tiny_base, image_folder)
    plan = make_plan(tiny_base, image_folder, pictures=5)
    assert plan.drawn(0) == plan.held_out[:5] and plan.drawn(1) == plan.held_out[5:10]
    assert plan.drawn(2) == plan.held_out[10:] + plan.held_out[:2]  # of thirteen
    assert plain.drawn(3) == [] and plan.key(0) != plain.key(0)


def test_the_frechet_distance_is_of_all_pictures(tiny_base, image_folder, tmp_path, in_thread):
    """As attacks/quality.py has it, of pictures drawn again from the adapters that were kept."""
    few = {"pictures": 3, "steps": 2, "save_every": 2}
    record = audit.audit(flags(tiny_base, image_folder, tmp_path, **few))
    plan = make_plan(tiny_base, image_folder, tmp_path, **few)
    images, every = load_images(image_folder, 32), []
    for index in range(4):
        base = load_base(tiny_base)
        lora_files.load(base.unet, plan.folder(index) / "adapter")
        text = encode_captions(base, [plan.captions[i] for i in plan.drawn(index)])
        streams = [torch.Generator().manual_seed(GRID_SEED + i) for i in plan.drawn(index)]
        noise = torch.stack([torch.randn(base.latent_shape, generator=g) for g in streams])
        pictures = sample(base, text, encode_captions(base, [""]), noise)
        every.append(quality.features(quality.load_network("embedded"), pictures))
    real = images.pixels[[plan.images[i] for i in plan.held_out]]
    features = quality.features(quality.load_network("embedded"), real)
    want = quality.frechet_distance(features, torch.cat(every))
    assert record["steps"]["2"]["frechet_held_out"] == pytest.approx(want, rel=0.02)
    assert record["steps"]["2"]["frechet_pool"] > 0


def test_halves(tiny_base, image_folder):
    """Pairs are complementary, every image is in for half, roles are disjoint; more adapters do
    not change the first ones."""
    plan = make_plan(tiny_base, image_folder, adapters=6)
    assert plan.roles[:4] == make_plan(tiny_base, image_folder, adapters=4).roles
    member = plan.members()
    assert (member.sum(0) == 3).all() and (member.sum(1) == 10).all()
    assert (member[0::2] ^ member[1::2]).all()
    assert len({tuple(row) for row in member}) == 6
    for index in range(4):
        roles = plan.roles[index]
        assert list(roles) == list(ROLES)
        used = [i for positions in roles.values() for i in positions]
        assert len(used) == len(set(used))
        members = {i for r in ROLES[:3] for i in roles[r]}
        assert members == set(np.flatnonzero(member[index]))
        assert [len(roles[r]) for r in ROLES] == [5, 1, 4, 5, 2, 13, 0]
        assert not {i for r in ROLES[3:] for i in roles[r]} & set(range(20))
    images = load_images(image_folder, 32)
    assert plan.names == [images.names[i] for i in plan.images]
    assert plan.captions == [images.captions[i] for i in plan.images]
    assert len(plan.names) == len(set(plan.names))


def test_every_attacker_has_other_nonmembers():
    """Drawn from four times as many, none of them in the pool or among the held-out images, which
    are the same for all; the pool is that of a smaller set of images.
    """
    rng = np.random.default_rng(0)
    names = [str(i) for i in range(300)]
    pictures = Images(names, names, rng.integers(0, 256, (300, 16, 16, 3), np.uint8))
    settings = Settings(method="lora", members=10, out="x")
    plan = audit_plan.deal(pictures, settings, 8, 20, 0, "x")
    assert len(plan.images) == 20 + 100 + 4 * 7 and plan.held_out == list(range(27, 127))
    others = set(range(20, 148)) - set(plan.held_out)
    taken = [r["nonmember_aux"] + r["nonmember_val"] for r in plan.roles]
    assert all(len(t) == len(set(t)) == 7 and set(t) <= others for t in taken)
    assert len({tuple(sorted(t)) for t in taken}) == 8 and len(set().union(*taken)) > 20
    assert all(r["nonmember_test"] == plan.held_out for r in plan.roles)
    assert audit_plan.deal(pictures, settings, 4, 20, 0, "x").roles == plan.roles[:4]


def test_canaries_change_captions(tiny_base, image_folder):
    """Among themselves and nobody else's; the images stay, the key does not."""
    plain = make_plan(tiny_base, image_folder)
    plan = make_plan(tiny_base, image_folder, canaries=5)
    assert plan.names == plain.names and plan.key(0) != plain.key(0) and len(plan.canaries) == 5
    pairs = enumerate(zip(plan.captions, plain.captions, strict=True))
    assert [i for i, (one, other) in pairs if one != other] == plan.canaries
    assert sorted(plan.captions) == sorted(plain.captions)


def test_due(tiny_base, image_folder):
    """An eighth, a quarter, half, all; or every so many and the last."""
    assert make_plan(tiny_base, image_folder).due() == [1, 2, 4, 8]
    assert make_plan(tiny_base, image_folder, save_every=3).due() == [3, 6, 8]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"adapters": 3}, "even number of 4"),
        ({"adapters": 2}, "even number of 4"),
        ({"pool": 8}, "even number of 10"),
        ({"canaries": 1}, "2 to 20"),
        ({"jobs": 0}, "1 or more"),
        ({"pictures": -1}, "0 or more"),
        ({"pool": 40}, "there are 40"),
        ({"cluster": "tcp://127.0.0.1:1"}, "distributed|scheduler"),
    ],
)
def test_refusals(tiny_base, image_folder, tmp_path, other, words):
    """One sentence, before anything is trained or written."""
    with pytest.raises(UserError, match=words):
        audit.audit(flags(tiny_base, image_folder, tmp_path / "x", **other))
    assert not list(tmp_path.glob("x/adapters/*/answers.npz"))


# --------------------------------------------------------------------------------------------------
# The flags


def parsed(*words):
    """The settings of a command line."""
    return parse(audit.Audit, audit.__doc__, "audits", [str(word) for word in words])


def test_help_has_no_flag_without_effect_and_loads_nothing_heavy():
    """As a command; a flag of train.py that says nothing here is unknown."""
    heavy = "torch", "numpy", "diffusers", "matplotlib"
    code = "import sys, audit\ntry: audit.main()\n"
    code += f"finally: print([m for m in {heavy} if m in sys.modules])"
    run = {"capture_output": True, "text": True, "cwd": ROOT}
    answer = subprocess.run([sys.executable, "-c", code, "--help"], **run)
    words = {word.strip(",") for word in answer.stdout.split() if word.startswith("--")}
    assert {"--adapters", "--lam", "--save-every", "--flip"} <= words
    assert not {"--members", "--split", "--stop", "--nonmembers", "--samples", "--resume"} & words
    assert answer.returncode == 0 and answer.stdout.endswith("[]\n")
    answer = subprocess.run([sys.executable, "-c", code, "--members", "5"], **run)
    assert answer.returncode == 2 and answer.stdout == "[]\n"
    assert "--members" in answer.stderr and answer.stderr.count("\n") == 1


def test_the_config_of_a_run(tmp_path, capsys):
    """Its method is taken and what says nothing here is dropped; what an audit would do in another
    way is one line; flags win.  The record of an audit is such a file too.
    """
    config, run = tmp_path / "config.json", {"method": "mp", "members": 30, "rank": 3, "samples": 9}
    config.write_text(json.dumps({"settings": run | {"stop": "last", "out": "runs/x"}}))
    found = parsed("--config", config)
    assert (found.method, found.rank, found.pool, found.out) == ("mp", 3, 60, None)
    assert parsed("--config", config, "--pool", 20).pool == 20
    for name, value in {"stop": "best", "nonmembers": "openmoji"}.items():
        config.write_text(json.dumps({"settings": run | {name: value}}))
        with pytest.raises(SystemExit) as stop:
            parsed("--config", config)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and f"an audit has no {name}, here {value}" in error
    stored = parsed("--config", ROOT / "docs/records/audit-smp/audit.json")
    assert (stored.method, stored.adapters, stored.pool, stored.lam) == ("smp", 16, 200, 4.0)


def test_dry_run(audited, tiny_base, image_folder, tmp_path, capsys):
    """Says hours, gigabytes and memory, and how many adapters are missing; writes nothing."""
    out, _ = audited
    found = audit.audit(flags(tiny_base, image_folder, tmp_path / "x", dry_run=True))
    text = capsys.readouterr().out
    assert "4 of 4 to train, 8 steps each, 2 in parallel" in text and not list(tmp_path.iterdir())
    assert all(word in text for word in ("time:", "of queries", "disk:", " GB", "memory:", "GiB"))
    files = [f.stat().st_size for f in out.glob("adapters/*/**/*") if f.name != "progress"]
    assert found["bytes"] == pytest.approx(sum(files) / 4, rel=0.25)


def test_the_cost_of_an_adapter(tiny_base, image_folder, monkeypatch):
    """A clock that the steps and the queries turn: every step, those of teachers, every round."""
    plan = make_plan(tiny_base, image_folder, method="distill", teachers=3, teacher_steps=7)
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    adapter = SimpleNamespace(state_dict=lambda: {"A": torch.zeros(5)})

    def steps(base, data, s):
        assert s.teacher_steps == 1 and data.roles == plan.roles[0]
        for step in (1, 2):
            clock.now += {"distill": 3, "lora": 2}[s.method] if step == 2 else 100
            yield step, adapter

    def ask(*_):
        clock.now += 10
        return {"losses": np.zeros(6, np.float32)}

    monkeypatch.setattr(audit_tasks, "time", clock)
    monkeypatch.setattr(audit_tasks, "ask", ask)
    found = audit_tasks.cost(plan, steps)
    assert found["training"] == 8 * 3 + 3 * 7 * 2
    assert found["queries"] == 4 * 10
    assert found["bytes"] == 5 * 4 + 4 * 6 * 4


# --------------------------------------------------------------------------------------------------
# The figures


def scored(seed=0, adapters=4, images=60):
    """Decisions with some signal and ties."""
    rng = np.random.default_rng(seed)
    inside = [rng.permutation(images) < images // 2 for _ in range(adapters // 2)]
    member = np.array([side for i in inside for side in (i, ~i)])
    return np.round(rng.normal(size=member.shape) + member, 1), member


def test_perfect_separation_has_an_interval_of_some_width():
    """The bootstrap of it has none; that of independent decisions, which is wider, is taken."""
    _, member = scored()
    found = decisions.Decisions(member).figures(member + np.linspace(0, 0.1, member.shape[1]))
    assert found["auc"] == 1 and 0.9 < found["auc_interval"][0] < 0.9999
    rate = binomtest(120, 120).proportion_ci(0.95, "exact")
    assert found["tpr_at_5_fpr_interval"] == pytest.approx([rate.low, 1.0])


def test_figures_against_roc():
    """AUC and TPR as curves/roc.py has them on the same decisions, ties and all."""
    score, member = scored()
    found = decisions.Decisions(member).figures(score)
    pair = score[member], score[~member]
    assert found["auc"] == pytest.approx(roc.auc(*pair))
    assert found["tpr_at_5_fpr"] == pytest.approx(roc.tpr_at(*pair, 0.05))
    assert found["tpr_at_1_fpr"] is None  # 120 non-members
    by_adapter = [roc.auc(s[m], s[~m]) for s, m in zip(score, member, strict=True)]
    assert found["auc_by_adapter"] == pytest.approx(by_adapter)
    assert found["auc_sd"] == pytest.approx(np.std(by_adapter, ddof=1))
    low, high = found["auc_t_interval"]
    half = 3.182446305 * np.std(by_adapter, ddof=1) / 2  # t of three degrees of freedom
    assert (low + high) / 2 == pytest.approx(np.mean(by_adapter))
    assert (high - low) / 2 == pytest.approx(half)


def test_bootstrap_draws_images():
    """A round is the AUC of the decisions of the images drawn, each as often; and the interval is
    wider than one over decisions where images agree with themselves."""
    score, member = scored()
    drawn = decisions.Decisions(member, seed=3)
    for r in (0, 1, 7):
        index = np.repeat(np.arange(60), drawn.weights[r])
        s, m = score[:, index], member[:, index]
        assert drawn.auc(score)[r] == pytest.approx(roc.auc(s[m], s[~m]))
    rng = np.random.default_rng(0)
    member = np.array([np.arange(100) % 2 == k % 2 for k in range(20)])
    same = np.where(member, 1, -1) * rng.normal(0.3, 1, 100)
    low, high = decisions.Decisions(member).figures(same + 0 * member)["auc_interval"]
    m, n = same[member], same[~member]
    a, b = roc.auc_interval(m, n)  # as if all decisions were of different images
    assert high - low > 2 * (b - a)


def test_ten_at_once():
    """Near the AUC of the mean scores of sets drawn at random; one at once is the AUC of normal
    scores; of forty pools most intervals hold the truth.
    """
    score, member = scored(images=200)
    found, rng = decisions.Decisions(member).together(score), np.random.default_rng(0)
    sets = [
        [x[rng.permutation(np.flatnonzero(side))[:10]].mean() for _ in range(400)]
        for x, m in zip(score, member, strict=True)
        for side in (m, ~m)
    ]
    inside, outside = np.ravel(sets[::2]), np.ravel(sets[1::2])
    assert found["auc"] == pytest.approx(roc.auc(inside, outside), abs=0.02)
    assert found["auc_interval"][0] < found["auc"] < found["auc_interval"][1]
    score = rng.normal(size=member.shape) + member
    assert coverage.together_coverage(0.66, 0.6, 8, 40) >= 0.85
    one = decisions.Decisions(member).together(score, 1)["auc"]
    assert one == pytest.approx(roc.auc(score[member], score[~member]), abs=0.02)


def test_the_bound_on_mu_is_one():
    """Scores of the Gaussian mechanism itself, which no attack beats: of forty audits hardly one
    claims more than its mu, and most claim half of it; one without signal claims nothing.
    """
    rng = np.random.default_rng(0)
    for mu, least in ((0.0, 0.0), (1.0, 0.6), (2.0, 1.4)):
        found = []
        for _ in range(40):
            halves = [rng.permutation(200) < 100 for _ in range(4)]
            member = np.concatenate([[half, ~half] for half in halves])
            score = rng.normal(size=member.shape) + mu * member
            found.append(decisions.mu_bound(score, member))
        assert np.mean(np.array(found) > mu) <= 0.05
        assert np.median(found) >= least
    member = np.array([[True, False] * 20, [False, True] * 20])
    assert 0 < decisions.mu_bound(member * 1.0, member) < 10  # told apart wholly: still finite


def test_what_was_promised_is_beside_what_is_shown(capsys):
    """The bound on mu as an epsilon at the promised delta, of the pool and of the canaries."""
    settings = {"epsilon": 8.0, "delta_dp": None}
    shown = {lira.HEADLINE: {"mu_bound": 2 * mu_for(0.5, 1e-3)}}
    last = {"attacks": shown, "canaries": {lira.HEADLINE: {"mu_bound": 0.0}}}
    audit_page.print_promise({"settings": settings, "pool": 200}, last)
    said = capsys.readouterr().out
    assert "guaranteed: epsilon at most 8 at delta 0.001\n" in said
    assert "attacked:   epsilon at least 0.5 on the pool, 0 on the canaries (" in said


def test_steps_that_are_named_are_the_ones_asked(tiny_base, image_folder):
    """With --at; one beyond the last is refused."""
    flags = {"model": tiny_base, "data": image_folder, "method": "lora", "steps": 6, "pool": 20}
    asked = audit.complete(audit.Audit(**flags, at=["5", "2"]))
    assert audit.make_plan(asked).due() == [2, 5]
    for at in ("7", "0", "x"):
        with pytest.raises(UserError, match="--at takes steps from 1 to 6"):
            audit.complete(audit.Audit(**flags, at=[at]))


def test_caught():
    """How often an image's memberships score above all but 1 % of the others, and how often it is
    among these; one that merely scatters is told by its false alarms.
    """
    score, member = scored(images=100)
    score = score + 10.0 * (np.arange(100) == 7) * member + 10.0 * (np.arange(100) == 8)
    caught, alarms = decisions.Decisions(member).caught(score)
    cut = np.sort(score[~member])[-3]
    assert caught[7] == 2 and alarms[7] == 0 and alarms[8] == 2
    assert caught.sum() == (score[member] > cut).sum()
    assert alarms.sum() == (score[~member] > cut).sum() == 2
    assert audit_record.often(member, caught) == (caught >= 1).sum()


# --------------------------------------------------------------------------------------------------
# The tasks


def test_predictions_are_those_of_the_loss_grid(tiny_base):
    """The same noise and losses as diffusion.loss_grid, for an epsilon-prediction model."""
    base = load_base(tiny_base)
    latents, text = torch.randn(5, 4, 8, 8), torch.randn(5, 16, 32)
    losses, kept = audit_tasks.predict(base, latents, text, TIMESTEPS, 2, range(2))
    want = loss_grid(base, latents, text, draws=2).numpy()
    np.testing.assert_allclose(losses, want, rtol=1e-4)
    assert kept.shape == (5, 4, 256) and kept.dtype == np.float16


def test_thorough(tiny_base, image_folder):
    """Eight timesteps with eight draws, of the loss grid; another question, so another key."""
    flags = {"model": tiny_base, "data": image_folder, "pool": 10, "adapters": 4}
    plan = audit.make_plan(audit.complete(audit.Audit(**flags, thorough=True)))
    assert plan.key(0) != audit.make_plan(audit.complete(audit.Audit(**flags))).key(0)
    assert replace(plan, trainer="another").key(0) != plan.key(0)
    base, data = audit_tasks.subject(plan)
    adapter = lora.inject(base.unet, "all", 2, 4.0, torch.Generator().manual_seed(0))
    losses = audit_tasks.ask(base, data, plan, adapter)["losses"]
    want = loss_grid(base, data.latents[:10], data.text[:10], range(50, 401, 50), 8).numpy()
    assert losses.shape == (10, 8, 8)
    np.testing.assert_allclose(losses, want, rtol=1e-4)


def test_with_flip_the_attacker_asks_about_mirror_images(tiny_base, image_folder):
    """Side by side with the images: the answers on images mirrored beforehand, at other noise, so
    that they are as many as without.
    """
    plan = make_plan(tiny_base, image_folder, flip=True)
    base, data = audit_tasks.subject(plan)
    adapter = lora.inject(base.unet, "all", 2, 4.0, torch.Generator().manual_seed(0))
    for layer in adapter.layers.values():
        torch.nn.init.normal_(layer.lora_B.weight, generator=torch.Generator().manual_seed(1))
    both = audit_tasks.ask(base, data, plan, adapter)
    plain = replace(plan, settings=replace(plan.settings, flip=False))
    assert plain.key(0) != plan.key(0)
    pixels = data.pixels[:, :, ::-1].copy()
    mirrored = replace(data, pixels=pixels, latents=encode_images(base, pixels))
    one = audit_tasks.ask(base, data, plain, adapter)
    other = audit_tasks.ask(base, mirrored, plain, adapter)
    assert np.abs(one["losses"] - other["losses"]).max() > 1e-3
    np.testing.assert_array_equal(both["losses"][:, :, 0], one["losses"][:, :, 0])
    np.testing.assert_array_equal(both["losses"][:, :, 1], other["losses"][:, :, 1])
    np.testing.assert_array_equal(both["sima"], np.concatenate([one["sima"], other["sima"]], 1))
    half = len(one["predictions"][0])
    np.testing.assert_array_equal(both["predictions"][:, :half], one["predictions"])
    twice = replace(plain, noises=1)  # the mirror image's prediction is at its own noise
    first = audit_tasks.ask(base, mirrored, twice, adapter)["predictions"]
    assert np.abs(both["predictions"][:, half:] - first).max() > 0.01
    assert both["losses"].shape == one["losses"].shape
    np.testing.assert_array_equal(both["held_out"], one["held_out"])


def test_with_crop_the_attacker_asks_about_crops(tiny_base, image_folder):
    """Seven of every image beside the image, each at noise of its own; training shows them too."""
    plan = make_plan(tiny_base, image_folder, crop=True, flip=True)
    base, data = audit_tasks.subject(plan)
    adapter = lora.inject(base.unet, "all", 2, 4.0, torch.Generator().manual_seed(0))
    found = audit_tasks.ask(base, data, plan, adapter)
    pool = len(plan.names[: plan.pool])
    assert found["losses"].shape == (pool, len(TIMESTEPS), 8) and found["sima"].shape == (pool, 8)
    assert found["predictions"].shape[:2] == (pool, 2 * len(TIMESTEPS))
    for k in (0, 6):
        pixels = [view(x, k, True, True) for x in data.pixels[:pool]]
        latents = encode_images(base, np.stack(pixels))
        losses = loss_grid(base, latents, data.text[:pool], draws=8).numpy()
        np.testing.assert_allclose(found["losses"][:, :, k + 1], losses[:, :, k + 1], rtol=1e-4)
    losses = loss_grid(base, data.latents[:pool], data.text[:pool], draws=8).numpy()
    np.testing.assert_allclose(found["losses"][:, :, 0], losses[:, :, 0], rtol=1e-4)
    thorough = replace(plan, timesteps=(100, 200), noises=8)
    assert thorough.ways == plan.ways == 8


def test_a_whole_audit(audited, capsys):
    """Every step and attack, as written; figures that can be taken again from the scores."""
    out, record = audited
    assert json.loads((out / "audit.json").read_text()) == record
    assert list(record["steps"]) == ["1", "2", "4", "8"] and record["adapters"] == 4
    last = record["steps"]["8"]
    assert set(last["attacks"]) == {lira.THRESHOLD, *lira.ATTACKS}
    assert len({step["held_out_loss"] for step in record["steps"].values()}) == 4
    with np.load(out / "scores.npz") as scores:
        member, score = scores["member"], scores[f"8/{lira.HEADLINE}"]
    area = roc.auc(score[member], score[~member])
    assert last["attacks"][lira.HEADLINE]["auc"] == pytest.approx(area)
    assert last["together"] == decisions.Decisions(member).together(score)
    for name, least in {"roc.png": 5000, "frontier.png": 5000, "exposed.png": 2000}.items():
        assert (out / name).stat().st_size > least
    assert len(record["exposed"]) == 20 and all(e["of"] == 2 for e in record["exposed"])
    names = audit_record.load_images(record["settings"]["data"], 32).names
    assert all(names[e["image"]] == e["name"] for e in record["exposed"])
    assert sum(e["alarms"] for e in record["exposed"]) <= 0.01 * 2 * record["pool"]
    for index in range(4):
        assert (out / f"adapters/{index:02d}/adapter/pytorch_lora_weights.safetensors").is_file()
    audit_page.print_record(record)
    text = capsys.readouterr().out
    assert lira.HEADLINE in text and max(map(len, text.splitlines())) <= 80
    assert "10 images at once" in text


def test_an_adapter_is_the_same_in_any_process(audited, tiny_base, image_folder):
    """Whatever was done there before: adapter 3 alone, in_thread, has the same bits."""
    out, _ = audited
    plan = make_plan(tiny_base, image_folder, out)
    path = plan.folder(3) / "answers.npz"
    with np.load(path) as found:
        before = dict(found)
    path.unlink()
    audit_tasks.work(plan, 3, train.train_adapter)
    with np.load(path) as found:
        for name in ("losses", "predictions", "sima", "held_out"):
            np.testing.assert_array_equal(found[name], before[name])


def test_going_on(audited, tiny_base, image_folder, in_thread, tmp_path, monkeypatch):
    """A finished audit trains nothing; other settings are refused; more adapters only add, and the
    record says which code trained.
    """
    out, record = audited
    shutil.copytree(out, tmp_path / "copy")
    answers = [tmp_path / f"copy/adapters/{k:02d}/answers.npz" for k in range(4)]
    given = tiny_base, image_folder, tmp_path / "copy"
    with monkeypatch.context() as patched:
        patched.setattr(audit_tasks, "work", None)
        again = audit.audit(flags(*given))
    assert again["steps"] == record["steps"]
    with pytest.raises(UserError, match="other settings, images, base model or files"):
        audit.audit(flags(*given, lr=0.01))
    done = [path.stat().st_mtime_ns for path in answers]
    monkeypatch.setattr(audit_tasks, "git_commit", lambda: "next")
    more = audit.audit(flags(*given, adapters=6))
    assert {*more["provenance"]["trained_at"]} == {*record["provenance"]["trained_at"], "next"}
    assert "projected prediction" in more["steps"]["8"]["attacks"]
    assert done == [path.stat().st_mtime_ns for path in answers]


@pytest.mark.timeout(600)
def test_stopped_and_gone_on_with(tiny_base, image_folder, tmp_path, in_thread):
    """After Ctrl-C and after SIGKILL no process is left; what was finished is not trained again."""
    out = tmp_path / "smp"
    given = {k: str(v) for k, v in SMALL.items()} | {"method": "smp", "steps": "24"}
    given |= {"adapters": "4", "jobs": "1", "model": tiny_base, "data": image_folder}
    command = [sys.executable, str(ROOT / "audit.py"), "--out", str(out)]
    for name, value in given.items():
        command += [f"--{name.replace('_', '-')}", value]
    written = []
    for index, number in enumerate((signal.SIGINT, signal.SIGKILL)):
        process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)
        path = out / f"adapters/0{index}/answers.npz"
        wait_for(path.exists)
        process.send_signal(number)
        _, text = process.communicate(timeout=30)
        assert process.returncode == {signal.SIGINT: 130}.get(number, -number), text
        assert "Traceback" not in text and ("to continue: " in text) == (number == signal.SIGINT)
        time.sleep(0.5)
        steps = [p.read_text() for p in out.glob("adapters/*/progress")]
        time.sleep(0.5)
        assert steps == [p.read_text() for p in out.glob("adapters/*/progress")]
        written.append((path, path.stat().st_mtime_ns))
    assert len(list(out.glob("adapters/*/answers.npz"))) < 4
    record = audit.audit(flags(tiny_base, image_folder, out, method="smp", steps=24))
    assert all(path.stat().st_mtime_ns == before for path, before in written)
    assert record["adapters"] == len(list(out.glob("adapters/*/answers.npz"))) == 4


def wait_for(condition, seconds=240):
    """Until it holds, or fail."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


@pytest.mark.timeout(600)
def test_a_killed_process(tiny_base, image_folder, tmp_path):
    """One of two is killed in the middle of its second adapter: what was finished stays, all
    adapters are there in the end, and no process is left.
    """
    plan = make_plan(tiny_base, image_folder, tmp_path / "x", steps=10)
    tasks = {index: (plan, index, train.train_adapter) for index in range(4)}
    killed, kept = [], {}

    def show():
        answers = [plan.folder(index) / "answers.npz" for index in range(4)]
        there = {path: path.stat().st_mtime_ns for path in answers if path.exists()}
        begun = [p for p in answers if (p.parent / "progress").exists() and p not in there]
        if not killed and there and begun:
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)
            kept.update(there)

    with workers.processes(2) as executor:
        workers.complete(executor, audit_tasks.work, tasks, show)
    assert killed and 0 < len(kept) < 4
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert all(audit_tasks.finished(plan, index) for index in range(4))
    assert not multiprocessing.active_children()


def test_a_task_that_always_dies():
    """Is given up after three tries, with one sentence."""
    with pytest.raises(UserError, match="died 3 times"), workers.processes(1) as executor:
        workers.complete(executor, os._exit, {5: (1,)}, lambda: None)


def test_errors_of_a_task_come_through(tiny_base, image_folder, tmp_path, in_thread):
    """Numbers that are no longer finite are one sentence."""
    with pytest.raises(UserError, match="finite"):
        audit.audit(flags(tiny_base, image_folder, tmp_path / "x", lr=1e30, clip=1e30))


# --------------------------------------------------------------------------------------------------
# Several audits


def test_compare(audited, tiny_base, image_folder, in_thread, capsys):
    """Paired differences against the first, equal to those of the figures; canaries apart."""
    out, _ = audited
    other = out.parent / "weak"
    weak = audit.audit(flags(tiny_base, image_folder, other, lr=1e-6, canaries=6))
    assert set(weak["steps"]["8"]["canaries"]) == set(weak["steps"]["8"]["attacks"])
    assert sum(e["canary"] for e in weak["exposed"]) == 6
    capsys.readouterr()
    found = audit.audit(audit.Audit(audits=[str(out), str(other)]))
    text = capsys.readouterr().out
    table = [line for line in text.splitlines() if not line.startswith("files:")]  # paths vary
    assert max(map(len, table)) <= 80
    assert found["audits"] == ["lora", "weak"]
    assert [change["at"] for change in found["differences"]] == ["last", "best"]
    change = found["differences"][0]
    with np.load(out / "scores.npz") as a, np.load(other / "scores.npz") as b:
        keep = ~b["canary"]
        m = a["member"][:, keep]
        weak, strong = (x[f"8/{lira.HEADLINE}"][:, keep] for x in (b, a))
    areas = [roc.auc(s[m], s[~m]) for s in (weak, strong)]
    assert change["auc"] == pytest.approx(areas[0] - areas[1])
    assert change["auc_interval"][0] <= change["auc"] <= change["auc_interval"][1]
    assert (out.parent / "comparison.png").exists()
    assert "asked other things" not in " ".join(text.split())
    content = (other / "audit.json").read_text()
    (other / "audit.json").write_text(json.dumps(json.loads(content) | {"asked": "less"}))
    audit.audit(audit.Audit(audits=[str(out), str(other)]))
    assert "these audits asked other things" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="no finished audit"):
        audit.audit(audit.Audit(audits=[str(out), str(out.parent)]))


def spoil(path: Path, how: str) -> None:
    """Cut a file of an audit, make it a pipe, leave an array out, or write another text to it."""
    content = path.read_bytes()
    path.unlink()
    if how == "a pipe":
        os.mkfifo(path)
    elif how == "less":
        with np.load(io.BytesIO(content)) as arrays:
            kept = {name: a for name, a in arrays.items() if name not in ("member", "sima")}
        np.savez(path, **kept)
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_text(how)


@pytest.mark.parametrize("how", ["cut", "a pipe", "less", "", "null", "PK"])
@pytest.mark.parametrize("name", ["audit.json", "scores.npz", "adapters/01/answers.npz"])
def test_damaged_files(audited, tiny_base, image_folder, tmp_path, name, how):
    """One sentence that names the file."""
    if name == "audit.json" and how == "less":
        how = json.dumps(audited[1] | {"steps": {"8": {"held_out_loss": 1.0}}})
    out = Path(shutil.copytree(audited[0], tmp_path / "lora"))
    spoil(out / name, how)
    answers = name.startswith("adapters")
    plan = replace(make_plan(tiny_base, image_folder, audited[0]), out=str(out))
    with pytest.raises(UserError, match=name) as told:
        audit_tasks.collect(plan) if answers else audit.audit(audit.Audit(audits=[str(out)]))
    assert "\n" not in str(told.value)
    if answers and how not in ("a pipe", "less"):
        with pytest.raises(UserError, match=name):
            audit_tasks.missing(plan)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "null", "3", '{"steps": {}}', '{"steps": {"8": null}}']
)
def test_records_that_are_none(tmp_path, text):
    (tmp_path / "audit.json").write_text(text)
    with pytest.raises(UserError, match=r"audit\.json is damaged"):
        audit.audit(audit.Audit(audits=[str(tmp_path)]))


def test_compared_under_names_that_are_not_utf8(tmp_path):
    """On a console that cannot show them either."""
    names = [os.fsencode(tmp_path) + b"/\xff$_-" + name for name in (b"lora", b"smp")]
    for name in names:
        shutil.copytree(os.fsencode(ROOT) + b"/docs/records/audit-" + name[-4:].strip(b"-"), name)
    command = [sys.executable, str(ROOT / "audit.py"), *names]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert r"\udcff$_-smp" in done.stdout and (tmp_path / "comparison.png").exists()


def test_records_of_before_are_compared(tmp_path, capsys):
    """Those in docs/records, which have no scores: a line for each step and a picture."""
    names = ["audit-lora", "audit-smp", "audit-mp"]
    for name in names:
        shutil.copytree(ROOT / "docs" / "records" / name, tmp_path / name)
    found = audit.audit(audit.Audit(audits=[str(tmp_path / name) for name in names]))
    assert found == {"audits": names, "differences": []}
    records = {name: json.loads((tmp_path / name / "audit.json").read_text()) for name in names}
    lines = [line for line in capsys.readouterr().out.splitlines() if "not compared" not in line]
    said = [line.split()[:2] for line in lines if line.startswith("audit-")]
    assert said == [[name, at] for name, record in records.items() for at in record["steps"]]
    assert (tmp_path / "comparison.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"pool": 60}, "--pool 60 is more than the 40 images in"),
        ({"device": "toaster"}, "--device must be auto, cpu"),
    ],
)
def test_refused_before_anything_is_loaded(tiny_base, image_folder, flags, words):
    """The folder is listed, no picture is opened."""
    with pytest.raises(UserError, match=words):
        audit.complete(audit.Audit(model=tiny_base, data=image_folder, **flags))
