"""train.py from the command line on the tiny model: what a run leaves, what it says, and how it
refuses what cannot work.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, assert_same_run, rows, tensors

import train
from algorithm import Shuffled
from command.errors import one_line_errors
from command.flags import parse
from run import precheck, watch
from settings import Settings

ROOT = Path(train.__file__).parent
COLUMNS = ["step", "grad_norm", "adaptation_loss", "mi_gain", "objective", "denominator"]
COLUMNS += ["lambda_effective"]
ATTACKER = ["attacker_loss", "attacker_accuracy"]
KINDS = [("lora", "pooled"), ("mp", "raw"), ("mp", "pooled"), ("smp", "raw"), ("smp", "pooled")]


def flags(model, data, out, *more):
    """Of a small run, as they are typed."""
    typed = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    return [*typed, "--model", model, "--data", data, "--out", str(out), *map(str, more)]


def call(argv):
    """Train in this process as the command does."""
    with one_line_errors():
        return train.train(parse(Settings, train.__doc__, argv=[str(a) for a in argv]))


@pytest.mark.parametrize(("method", "proxy"), KINDS)
def test_six_steps(tiny_base, image_folder, tmp_path, capsys, method, proxy):
    """A run folder holds everything that a run needs to be understood; once by a command of its
    own, whose log names each piece of work.
    """
    out = tmp_path / "run"
    typed = flags(tiny_base, image_folder, out, "--method", method, "--proxy", proxy)
    typed += ["--steps", "6", "--norms-every", "3", "--save-every", "3"]
    if (method, proxy) == ("smp", "pooled"):
        command = [sys.executable, ROOT / "train.py", *typed]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        printed, stages = done.stdout, done.stderr.splitlines()
        assert stages == [
            *("loading the libraries", "loading the base model", "reading images"),
            *("encoding images", "encoding captions", "held-out losses", "pictures of step 0"),
            *("smp", "pictures of step 6", "curves", "verdict"),
        ]
    else:
        call(typed)
        printed = capsys.readouterr().out
    last = [line.split(":")[0] for line in printed.splitlines()[-3:]]
    assert last == ["quality", "leakage", "files"]
    for name in ("splits.json", "curves.png", "samples/step-000006.png"):
        assert (out / name).stat().st_size > 0
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000003", "step-000006"]
    left = {p.name for p in (out / "adapter").iterdir()}
    assert left == {"README.md", "pytorch_lora_weights.safetensors"}
    assert (out / "attacker" / "attacker.safetensors").exists() == (method != "lora")
    config = json.loads((out / "config.json").read_text())
    assert {"versions", "settings", "git_commit", "summary"} <= set(config)
    check_rows(rows(out), method, config["settings"]["lam"])


def check_rows(metrics, method, lam):
    """The columns of the rows of six steps, and how they hang together."""
    losses, separate = {"member_val_loss", "nonmember_val_loss"}, {"grad_norm_loss"}
    usual, attacked = set(COLUMNS), method != "lora"
    if attacked:
        usual |= set(ATTACKER)
        separate |= {"grad_norm_gain", "grad_cosine"}
    more = {0: losses, 1: separate, 3: separate | losses, 6: separate | losses}
    for step, row in enumerate(metrics):
        assert set(row) == (usual if step else {"step"}) | more.get(step, set())
    assert [m["step"] for m in metrics] == list(range(7))
    for m in metrics[1:]:
        loss, gain = m["adaptation_loss"], m["mi_gain"] or 0.0
        want = {"lora": loss, "mp": loss + lam * gain, "smp": loss / (1 - lam * gain + 1e-5)}
        d = 1 - lam * gain + 1e-5 if method == "smp" else 1
        weight = {"lora": 0, "mp": lam, "smp": lam * want["smp"]}[method]
        found = m["objective"], m["denominator"], m["lambda_effective"]
        assert found == pytest.approx((want[method], d, weight), rel=1e-5)
        assert m["grad_norm"] > 0 and (m["mi_gain"] is None) == (not attacked)


def test_same_seed_same_bits(small, tmp_path, no_pictures):
    """Two runs with one seed are bit-equal on the CPU, and another seed is not."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train.train(small(tmp_path / name, steps=5, seed=seed))
    assert_same_run(tmp_path / "a", tmp_path / "b", 5)
    assert rows(tmp_path / "a") != rows(tmp_path / "c")
    a, c = tensors(tmp_path / "a"), tensors(tmp_path / "c")
    assert not any(torch.equal(a[k], c[k]) for k in a if k.startswith("adapter"))


def test_methods_share_batches_and_noise(small, tmp_path, no_pictures):
    """The first step's loss is the same for every method: only the objective differs between
    them.
    """
    for method in ("lora", "mp", "smp"):
        train.train(small(tmp_path / method, steps=1, method=method))
    first = {rows(folder)[1]["adaptation_loss"] for folder in tmp_path.iterdir()}
    assert len(first) == 1


def test_training_lowers_the_loss(small, tmp_path, no_pictures):
    """Sixty steps fit the members better than none."""
    train.train(small(tmp_path / "r", method="lora", steps=60, rank=16, target="all"))
    held = [m["member_val_loss"] for m in rows(tmp_path / "r") if "member_val_loss" in m]
    assert held[-1] < 0.95 * held[0]


def test_separate_norms_do_not_change_the_run(small, tmp_path, no_pictures):
    """The extra backward passes are only looked at."""
    for every in (1, 100):
        train.train(small(tmp_path / str(every), steps=4, norms_every=every))
    one, other = ([m.get("objective") for m in rows(folder)] for folder in tmp_path.iterdir())
    assert one == other


def test_batches_cover_every_index_once_per_pass():
    """Whatever the batch size, each pass visits every index exactly once."""
    batches = Shuffled(list(range(10)), 4, torch.Generator().manual_seed(0))
    drawn = torch.cat([batches.draw() for _ in range(5)])
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()


# ---- what cannot work ----


@pytest.mark.parametrize(
    ("script", "argv", "code"),
    [
        ("train.py", ["--help"], 0),
        ("evaluate.py", ["--help"], 0),
        ("train.py", ["--data", "/no/such"], 2),
        ("train.py", ["--rank", "0"], 2),
    ],
)
def test_answers_that_need_no_torch(tmp_path, script, argv, code):
    """--help, and what cannot work, are answered at once: nothing heavy is loaded for them, and
    nothing is written.
    """
    program = (
        f"import runpy, sys; sys.argv = {[script, *argv]!r}; sys.path.insert(0, {str(ROOT)!r})\n"
        f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        f"except SystemExit as stop: assert (stop.code or 0) == {code}\n"
        "assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--device" in done.stdout if code == 0 else done.stderr.count("error:") == 1
    assert not list(tmp_path.iterdir())


BAD = {  # name: (flags, words that the message must have)
    "method": (["--method", "gan"], "--method"),
    "option": (["--epsilom", "3"], "--epsilon"),
    "retired": (["--ema", "0.9"], "0db7ef9"),
    "number": (["--rank", "many"], "--rank"),
    "rank": (["--rank", "0"], "--rank"),
    "steps": (["--steps", "-1"], "--steps"),
    "size": (["--size", "20"], "not a multiple"),
    "accumulate": (["--accumulate", "0"], "--accumulate"),
    "lam": (["--lam", "-1"], "--lam"),
    "lam nan": (["--lam", "nan"], "--lam"),
    "seed": (["--seed", "-1"], "--seed"),
    "device": (["--device", "toaster"], "toaster"),
    "no model": (["--model", "nobody/no-such-model"], "no-such-model"),
    "not a model": (["--model", "TMP/empty"], "model_index.json"),
    "no data": (["--data", "TMP/nowhere"], "nowhere"),
    "no images": (["--data", "TMP/empty"], "empty"),
    "corrupt": (["--data", "TMP/corrupt"], "x.png"),
    "no caption": (["--data", "TMP/bare"], "0.png"),
    "too few": (["--data", "TMP/bare", "--caption", "a thing"], "--members"),
    "used": (["--out", "TMP/used"], "used"),
    "nan": (["--lr", "1e30", "--steps", "5", "--method", "lora"], "finite"),
    "track": (["--track", "tensorboard"], "pip install tensorboard"),
    "out is not UTF-8": (["--out", "TMP/\udcff"], "is not UTF-8"),
    "hessian": (["--hessian-every", "2", "--gradient-checkpointing"], "--gradient-checkpointing"),
    "out is a file": (["--out", "TMP/bare/0.png"], "0.png"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_2(
    tiny_base, image_folder, tmp_path, case, capsys, monkeypatch
):
    """One sentence on stderr that names the culprit, exit code 2, and no half-made run."""
    monkeypatch.setattr(precheck, "find_spec", lambda _: None)  # no tensorboard
    for name in ("empty", "corrupt", "bare", "used"):
        (tmp_path / name).mkdir()
    (tmp_path / "corrupt" / "x.png").write_bytes(b"not a picture")
    (tmp_path / "corrupt" / "x.txt").write_text("a caption")
    for i in range(3):
        picture = Path(image_folder, f"{i:02d}.png").read_bytes()
        (tmp_path / "bare" / f"{i}.png").write_bytes(picture)
    (tmp_path / "used" / "config.json").write_text("{}")
    argv, words = BAD[case]
    argv = [a.replace("TMP", str(tmp_path)) for a in argv]
    with pytest.raises(SystemExit) as stop:
        call(flags(tiny_base, image_folder, tmp_path / "out", *argv))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2
    assert len(errors) == 1 and words in errors[0]
    assert not (tmp_path / "out" / "adapter").exists()
    assert case == "nan" or not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [0.5, 1.5])
def test_a_base_far_above_one_is_noted(small, tmp_path, no_pictures, monkeypatch, capsys, limit):
    """Its prediction type may be wrong: the tiny base, which answers noise, is at about 1.05."""
    monkeypatch.setattr(watch, "TOO_FAR", limit)
    train.train(small(tmp_path / "run", method="lora", steps=1))
    assert ("prediction type (now epsilon)" in capsys.readouterr().out) == (limit < 1)
