"""train.py and evaluate.py from the command line, on the tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from run.learner import Batches, Learner
from safetensors.torch import load_file

import evaluate
import train
from command.errors import one_line_errors
from command.flags import parse
from run.resolve import resolve

ROOT = Path(train.__file__).parent
SMALL = [
    "--save-every",
    1000,
    "--members",
    20,
    "--rank",
    2,
    "--alpha",
    4,
    "--batch-size",
    4,
    "--target",
    "attention",
    "--lr",
    0.01,
    "--attacker-lr",
    0.01,
    "--samples",
    1,
]


def call(module, argv):
    """Run a command in this process as its `__main__` does; returns what it returns."""
    positional = "runs" if module is evaluate else None
    with one_line_errors():
        settings = parse(module.Settings, module.__doc__, positional, [str(a) for a in argv])
        return module.train(settings) if module is train else module.evaluate(settings)


def small_run(tiny_base, image_folder, out, *more):
    call(train, ["--model", tiny_base, "--data", image_folder, "--out", out, *SMALL, *more])
    return Path(out)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


KINDS = [("lora", "pooled"), ("mp", "raw"), ("mp", "pooled"), ("smp", "raw"), ("smp", "pooled")]


@pytest.mark.parametrize(("method", "proxy"), KINDS)
def test_six_steps(tiny_base, image_folder, tmp_path, capsys, method, proxy):
    """A run folder holds everything that a run needs to be understood; once by a command of its
    own.
    """
    out = tmp_path / "run"
    flags = ["--method", method, "--proxy", proxy, "--steps", 6, "--norms-every", 3]
    flags += ["--model", tiny_base, "--data", image_folder, "--out", out, *SMALL, "--save-every", 3]
    if (method, proxy) == ("smp", "pooled"):
        command = [sys.executable, ROOT / "train.py", *map(str, flags)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        call(train, flags)
        printed = capsys.readouterr().out
    last = [line.split(":")[0] for line in printed.splitlines()[-4:]]
    assert last == ["quality", "leakage", "audited", "files"]
    for name in ("config.json", "splits.json", "curves.png", "samples/step-000006.png"):
        assert (out / name).stat().st_size > 0
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000003", "step-000006"]
    left = {p.name for p in (out / "adapter").iterdir()}
    assert left == {"README.md", "pytorch_lora_weights.safetensors"}
    assert (out / "attacker" / "attacker.safetensors").exists() == (method != "lora")
    metrics = rows(out)
    assert [m["step"] for m in metrics] == list(range(7))
    assert all(m["grad_norm"] > 0 for m in metrics[1:])
    if method == "smp":
        for m in metrics[1:]:
            assert m["denominator"] == pytest.approx(1 - m_lam(out) * m["mi_gain"] + 1e-5, rel=1e-5)
            assert m["objective"] == pytest.approx(
                m["adaptation_loss"] / m["denominator"], rel=1e-5
            )
            assert m["lambda_effective"] == pytest.approx(m_lam(out) * m["objective"], rel=1e-5)
    if method == "mp":
        assert all(
            m["objective"]
            == pytest.approx(m["adaptation_loss"] + m_lam(out) * m["mi_gain"], rel=1e-5)
            for m in metrics[1:]
        )
    assert ("grad_norm_gain" in metrics[3]) == (
        method != "lora"
    ) and "grad_norm_loss" not in metrics[2]
    assert {"versions", "settings", "git_commit", "summary"} <= set(
        json.loads((out / "config.json").read_text())
    )


def m_lam(run):
    return json.loads((run / "config.json").read_text())["settings"]["lam"]


def test_same_seed_same_bits(tiny_base, image_folder, tmp_path):
    """Two runs with one seed are bit-equal on the CPU, and another seed is not."""
    runs = [
        small_run(tiny_base, image_folder, tmp_path / n, "--steps", 5, "--seed", s)
        for n, s in (("a", 3), ("b", 3), ("c", 4))
    ]
    a, b, c = (load_file(r / "adapter" / "pytorch_lora_weights.safetensors") for r in runs)
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)
    drop = [[{k: v for k, v in m.items() if k != "seconds"} for m in rows(r)] for r in runs]
    assert drop[0] == drop[1] != drop[2]


def test_methods_share_batches_and_noise(tiny_base, image_folder, tmp_path):
    """The first step's loss is the same for every method: only the objective differs between
    them.
    """
    first = [
        rows(small_run(tiny_base, image_folder, tmp_path / m, "--steps", 1, "--method", m))[1][
            "adaptation_loss"
        ]
        for m in ("lora", "mp", "smp")
    ]
    assert first[0] == first[1] == first[2]


def test_training_lowers_the_loss(tiny_base, image_folder, tmp_path):
    """Sixty steps fit the members better than none."""
    run = small_run(
        tiny_base,
        image_folder,
        tmp_path / "r",
        "--method",
        "lora",
        "--steps",
        60,
        "--rank",
        16,
        "--target",
        "all",
    )
    held = [m["member_val_loss"] for m in rows(run) if "member_val_loss" in m]
    assert held[-1] < 0.95 * held[0]


def test_separate_norms_do_not_change_the_run(tiny_base, image_folder, tmp_path):
    """The extra backward passes are only looked at."""
    losses = []
    for every in (1, 100):
        run = small_run(
            tiny_base, image_folder, tmp_path / str(every), "--steps", 4, "--norms-every", every
        )
        losses.append([m["objective"] for m in rows(run)[1:]])
    assert losses[0] == losses[1]


def test_reused_members_are_those_of_the_last_outer_step(
    tiny_base, image_folder, tmp_path, monkeypatch
):
    """--attacker-members reused: the attacker steps on errors that are there already and on half as
    many non-members; the adapter's batches and noise are those of any other run.
    """
    seen, shown, real, keep = [], [], train.attacker_step, Learner.keep

    def step(attacker, optimizer, member, nonmember):
        seen.append((*member, *nonmember))
        return real(attacker, optimizer, member, nonmember)

    def kept(learner, batch, error):
        keep(learner, batch, error)
        shape = learner.base.latent_shape
        assert learner.reused[0].shape[1:] == shape and not learner.reused[0].requires_grad
        shown.append(learner.reused)

    monkeypatch.setattr(train, "attacker_step", step)
    monkeypatch.setattr(Learner, "keep", kept)
    reused = small_run(
        tiny_base, image_folder, tmp_path / "r", "--steps", 6, "--attacker-members", "reused"
    )
    with_members = [pair for pair in shown[:-1] if len(pair[0])]
    assert len(seen) == len(with_members) > 2
    assert {len(errors) for errors, _ in shown} != {4}  # not all of a batch are auxiliary
    for (errors, timesteps, others, _), (before, at) in zip(seen, with_members, strict=True):
        assert torch.equal(errors, before) and torch.equal(timesteps, at) and len(others) == 2
    monkeypatch.undo()
    drawn = small_run(tiny_base, image_folder, tmp_path / "d", "--steps", 6)
    assert rows(reused)[1]["adaptation_loss"] == rows(drawn)[1]["adaptation_loss"]


def test_reused_members_outlive_a_kill(tiny_base, image_folder, tmp_path):
    """They are part of the training state: the attacker of a resumed run steps on the same
    errors.
    """
    flags = ["--model", tiny_base, "--data", image_folder, "--out", tmp_path / "r", *SMALL]
    flags += ["--attacker-members", "reused", "--dtype", "float32", "--steps", 9]
    settings = resolve(parse(train.Settings, "", None, [str(a) for a in flags]))
    run = train.prepare(settings, train.Processes("cpu"))
    first, second = Learner(run), Learner(run)
    next(train.algorithm_1(run, first, [1]))
    kept = {name: tensor.clone() for name, tensor in first.tensors().items()}
    batch = train.auxiliary_batch(run, first)
    second.restore(kept)
    again = train.auxiliary_batch(run, second)
    assert len(second.reused[0])
    for one, two in zip((*batch[0], *batch[1]), (*again[0], *again[1]), strict=True):
        assert torch.equal(one, two)


def test_batches_cover_every_index_once_per_pass():
    """Whatever the batch size, each pass visits every index exactly once."""
    batches = Batches(list(range(10)), 4, torch.Generator().manual_seed(0))
    drawn = torch.cat([batches.draw() for _ in range(5)])
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_imports_nothing_heavy(script):
    """`--help` answers at once because torch is not loaded for it."""
    code = (
        f"import runpy, sys; sys.argv = ['{script}', '--help']\n"
        f"try: runpy.run_path('{script}', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--device" in done.stdout, done.stderr


def bad(base, images, tmp):
    """(name, argv, words the message must have) of every documented bad input."""
    (tmp / "empty").mkdir()
    (tmp / "corrupt").mkdir()
    (tmp / "corrupt" / "x.png").write_bytes(b"not a picture")
    (tmp / "corrupt" / "x.txt").write_text("a caption")
    (tmp / "bare").mkdir()
    for i in range(3):
        (tmp / "bare" / f"{i}.png").write_bytes((Path(images) / f"{i:02d}.png").read_bytes())
    (tmp / "used").mkdir()
    (tmp / "used" / "config.json").write_text("{}")
    good = ["--model", base, "--data", images, "--out", tmp / "out", *SMALL, "--steps", 2]
    return {
        "method": ([*good, "--method", "gan"], "--method"),
        "option": ([*good, "--epsilon", "3"], "--epsilon"),
        "number": ([*good, "--rank", "many"], "--rank"),
        "rank": ([*good, "--rank", "0"], "--rank"),
        "steps": ([*good, "--steps", "-1"], "--steps"),
        "lam": ([*good, "--lam", "-1"], "--lam"),
        "lam nan": ([*good, "--lam", "nan"], "--lam"),
        "seed": ([*good, "--seed", "-1"], "--seed"),
        "device": ([*good, "--device", "toaster"], "toaster"),
        "no model": ([*good, "--model", "nobody/no-such-model"], "no-such-model"),
        "not a model": ([*good, "--model", tmp / "empty"], "model_index.json"),
        "no data": ([*good, "--data", tmp / "nowhere"], "nowhere"),
        "no images": ([*good, "--data", tmp / "empty"], "empty"),
        "corrupt": ([*good, "--data", tmp / "corrupt"], "x.png"),
        "no caption": ([*good, "--data", tmp / "bare"], "0.png"),
        "too few": ([*good, "--data", tmp / "bare", "--caption", "a thing"], "--members"),
        "used": ([*good, "--out", tmp / "used"], "used"),
        "nan": ([*good, "--lr", "1e30", "--steps", "5", "--method", "lora"], "finite"),
        "out is a file": ([*good, "--out", Path(images) / "00.png"], "00.png"),
    }


CASES = [
    "method",
    "option",
    "number",
    "rank",
    "steps",
    "lam",
    "lam nan",
    "seed",
    "device",
    "no model",
    "not a model",
    "no data",
    "no images",
    "corrupt",
    "no caption",
    "too few",
    "used",
    "nan",
    "out is a file",
]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_exit_2(tiny_base, image_folder, tmp_path, case, capsys):
    """One sentence on stderr that names the culprit, exit code 2, and no half-made run."""
    argv, words = bad(tiny_base, image_folder, tmp_path)[case]
    with pytest.raises(SystemExit) as stop:
        call(train, argv)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2
    assert len(errors) == 1 and words in errors[0]
    assert not (tmp_path / "out" / "adapter").exists()
    assert case == "nan" or not (tmp_path / "out").exists()


def test_every_bad_input_is_listed(tiny_base, image_folder, tmp_path):
    """The list above and the table it indexes are the same."""
    assert list(bad(tiny_base, image_folder, tmp_path)) == CASES


@pytest.mark.parametrize(
    "argv,words",
    [
        ([], "name run folders"),
        (["/nowhere"], "not a run folder"),
        (["RUN", "--at", "7"], "step 7"),
    ],
)
def test_bad_input_to_evaluate(tiny_base, image_folder, tmp_path, argv, words, capsys):
    """The same for evaluate.py."""
    run = small_run(tiny_base, image_folder, tmp_path / "r", "--method", "lora", "--steps", 1)
    with pytest.raises(SystemExit) as stop:
        call(evaluate, [run if a == "RUN" else a for a in argv])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_evaluate_refuses_changed_data(tiny_base, image_folder, tmp_path):
    """A run whose images are gone is not scored on others."""
    import shutil

    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    run = small_run(tiny_base, str(folder), tmp_path / "r", "--method", "lora", "--steps", 1)
    (folder / "00.png").unlink()
    with pytest.raises(SystemExit):
        call(evaluate, [run])
    assert np.all([not (run / "eval.json").exists()])
