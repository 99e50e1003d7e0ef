"""run/identity.py: a run whose base, files or settings are exchanged does not go on, is not
evaluated and does not mix with others in an audit; what is only moved is the same.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import audit
import train
from attacks import audit_tasks, examination
from attacks.target import read_run
from command.errors import UserError
from files import bases
from methods import directions
from run import identity, state
from settings import Settings


def rewrite(path: Path) -> None:
    """Change a weight; size and names stay."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    next(t for t in tensors.values() if t.is_floating_point()).flatten()[0] += 0.25
    save_file(tensors, path, metadata)


@pytest.fixture
def places(tiny_base, image_folder, small, no_pictures, tmp_path):
    """Copies of what a run is made of: base, an adapter, directions."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    train.train(small(tmp_path / "first", method="lora", steps=1, samples=0))
    given = {"model": tiny_base, "target": "all", "steps": 1, "directions": 2, "lr": 0.01}
    out = str(tmp_path / "directions.safetensors")
    directions.make(directions.Flags(data=[image_folder], out=out, batch_size=4, **given))
    return {
        "model": base,
        "init": tmp_path / "first" / "adapter",
        "directions": Path(out),
    }


UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
LORA = "pytorch_lora_weights.safetensors"
DP = {"method": "dp", "target": None, "proxy": None, "alpha": None, "rank": None}
CASES = [  # setting, what lies there and is changed, settings of the run
    ("model", UNET, {"method": "lora"}),
    ("model", TEXT, {"method": "lora"}),
    ("model", "tokenizer/vocab.json", {"method": "lora"}),
    ("init", LORA, {"method": "lora"}),
    ("directions", "", DP),
]


@pytest.mark.parametrize(("name", "inside", "more"), CASES)
def test_what_is_exchanged_is_refused(small, places, unfinished, tmp_path, name, inside, more):
    """By --resume, and in what an audit goes by; put back, the run goes on."""
    given = {"model": str(places["model"]), name: str(places[name])}
    unfinished(small(tmp_path / "run", **given, **more))
    changed, again = places[name] / inside, Settings(out=str(tmp_path / "run"), resume=True)
    before = changed.read_bytes()
    settings = small(tmp_path / "run", **given, **more)
    base = bases.load_base(given["model"])
    kept = identity.of(settings, base)
    if changed.suffix == ".safetensors":
        rewrite(changed)
    else:
        changed.write_bytes(before.replace(b" ", b"  ", 1))
    assert {k for k, v in identity.of(settings, base).items() if v != kept[k]} == {name}
    with pytest.raises(
        UserError, match=f"what lies at --{name} .* is not what .* was started with"
    ):
        train.train(again)
    changed.write_bytes(before)
    train.train(again)
    assert "summary" in json.loads((tmp_path / "run" / "config.json").read_text())


def test_settings_that_were_edited_are_refused(small, no_pictures, unfinished, tmp_path):
    """In config.json; what may change on --resume and what is only looked at does not count."""
    unfinished(small(tmp_path / "run", method="lora"))
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"settings": config["settings"] | {"lr": 0.02}}))
    with pytest.raises(UserError, match=r"settings are not those .* config\.json"):
        train.train(Settings(out=str(tmp_path / "run"), resume=True))
    free = {"norms_every": 3, "state_every": 9}
    path.write_text(json.dumps(config | {"settings": config["settings"] | free}))
    train.train(Settings(out=str(tmp_path / "run"), resume=True))


def test_what_is_moved_is_the_same(small, places, tiny_base, tmp_path):
    """And so is what no weight depends on: another dtype, a card, a variant that is not loaded."""
    base = bases.load_base(str(places["model"]))
    s = small("x", model=str(places["model"]), init=str(places["init"]))
    kept, moved = identity.of(s, base), tmp_path / "moved"
    places["model"].rename(moved)
    shutil.copy(moved / UNET, moved / UNET.replace(".", ".fp16.", 1))
    (moved / "README.md").write_text("another")
    (places["init"] / "README.md").write_text("another")
    base = bases.load_base(str(moved), dtype="bfloat16")
    assert identity.of(replace(s, model=str(moved), samples=9), base) == kept
    assert identity.of(s, bases.load_base(tiny_base)) == kept
    assert identity.of(replace(s, lr=0.02), base)["settings"] != kept["settings"]


def test_evaluation_wants_the_base_of_the_run(small, places, no_pictures, tmp_path):
    train.train(small(tmp_path / "run", method="lora", model=str(places["model"])))
    target = read_run(str(tmp_path / "run"))
    assert target.identity["model"] == bases.content(examination.prepare(target).base)
    rewrite(places["model"] / UNET)
    with pytest.raises(UserError, match=r"is not the one that .* was trained on"):
        examination.prepare(target)


def test_an_audit_has_one_base_and_one_method(small, places, image_folder, tmp_path):
    """Answers that are there are refused where the base, a file or a setting is another."""
    few = {"rank": 2, "alpha": 4.0, "batch_size": 4, "steps": 1, "pool": 20, "adapters": 4}
    few |= {"method": "lora", "target": "attention", "out": str(tmp_path / "audit"), "jobs": 1}
    given = {"model": str(places["model"]), "init": str(places["init"]), "lr": 0.01}

    def plan(**other):
        flags = audit.Audit(data=image_folder, **few | given | other)
        return audit.make_plan(audit.complete(flags))

    first = plan()
    audit_tasks.work(first, 0, train.train_adapter)
    assert audit_tasks.missing(plan()) == [1, 2, 3]
    for other in ({"lr": 0.02}, {"init": None}, {"accumulate": 2}):
        with pytest.raises(UserError, match="other settings, images, base model or files"):
            audit_tasks.missing(plan(**other))
    for changed in (places["init"] / LORA, places["model"] / TEXT):
        before = changed.read_bytes()
        rewrite(changed)
        with pytest.raises(UserError, match="other settings, images, base model or files"):
            audit_tasks.missing(plan())
        audit_tasks._loaded.clear()
        with pytest.raises(UserError, match="is not what the audit was started with"):
            audit_tasks.work(first, 1, train.train_adapter)
        changed.write_bytes(before)
    assert audit_tasks.missing(plan()) == [1, 2, 3]


def test_no_bit_of_the_facts_of_a_state_may_flip(tmp_path):
    """Step, seconds and checksum are in the header: a state with another bit is damaged."""
    from torch import zeros

    path = state.save(tmp_path, 6, {"w": zeros(2)}, {"seconds": 12.5}, keep=1)
    content = path.read_bytes()
    start, step = content.index(b'\\"step\\"'), content.index(b"6", content.index(b"step"))
    end = content.index(b"}", start)
    assert state.load(tmp_path)[0] == 6 and start < step < end
    for i in range(start, end):
        for bit in (1, 2, 4, 16):
            flipped = bytes([content[i] ^ bit])
            path.write_bytes(content[:i] + flipped + content[i + 1 :])
            try:
                found = state.load(tmp_path)
            except UserError:
                continue
            assert found[0] == 6 and found[2] == {"seconds": 12.5}, (i, flipped)


def test_a_run_from_before_crop_goes_on_but_a_distillation_does_not():
    """Its teachers would answer for images that they have seen; what was hashed then had neither
    --crop nor how the members are cut.
    """
    for method in ("lora", "distill"):
        s = Settings(method=method)
        now = identity.decided(s)
        older = {k: v for k, v in now.items() if k not in ("crop", "folds")}
        facts = [{"settings": identity.digest_of(found)} for found in (older, now)]
        if method == "lora":
            identity.require(*facts, s, "runs/x was started with")
            continue
        with pytest.raises(UserError, match="older version of this code cut the folds"):
            identity.require(*facts, s, "runs/x was started with")
    assert identity.decided(replace(s, crop=True)) == now | {"crop": True}
