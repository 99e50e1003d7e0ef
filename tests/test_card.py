"""The model card: the hub's own reader takes it, nothing private is in it, edits stay."""

import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import train
from attacks.lira import HEADLINE
from command.whole_files import read_json
from files import lora_files
from files.bases import load_base
from run import card
from settings import Settings
from studies import equal_loss

DOCS = Path(train.__file__).parent / "docs"
RECORD = {
    "verdict": "This adapter gives away a little.",
    "images": {"member_test": 40, "nonmember_test": 200},
    "shadows": 0,
    "adapted": {
        "held_out_loss": 0.1234,
        "headline": {"attack": "SimA", "auc": 0.61, "auc_interval": [0.5, 0.7]},
        "quality": {"frechet_members": 600.4, "frechet_held_out": 700.6},
    },
    "base": {
        "held_out_loss": 0.2,
        "attacks": {"SimA": {"auc": 0.52}},
        "quality": {"frechet_members": 650.0, "frechet_held_out": 650.0},
    },
}


@pytest.fixture(scope="module")
def made(tiny_base, image_folder, tmp_path_factory):
    """(folder of the adapter, its run's splits and captions as words that must not be told)."""
    out = tmp_path_factory.mktemp("card") / "secret run"
    flags = {"model": tiny_base, "data": image_folder, "members": 20, "rank": 2, "alpha": 4.0}
    flags |= {"batch_size": 2, "target": "attention", "proxy": "pooled", "steps": 2, "samples": 0}
    train.train(Settings(**flags, normalise=True, prompt=["a secret prompt"], out=str(out)))
    captions = [path.read_text().strip() for path in Path(image_folder).glob("*.txt")]
    names = [path.name for path in Path(image_folder).iterdir()]
    return out / "adapter", [*captions, *names, image_folder, str(out.parent), "secret"]


def test_the_hub_reads_it(made, tiny_base):
    """Front matter as it wants it; counts, settings and losses as the run has them."""
    found = ModelCard.load(made[0] / "README.md")
    data = found.data.to_dict()
    assert data["base_model"] == Path(tiny_base).name and data["library_name"] == "diffusers"
    assert {"lora", "text-to-image", "diffusers", "stable-diffusion"} <= set(data["tags"])
    assert data["pipeline_tag"] == "text-to-image"
    rows = {tuple(c.strip() for c in line.split("|")[1:-1]) for line in found.text.splitlines()}
    assert {
        ("member_aux", "10"),
        ("method", "smp"),
        ("--rank", "2"),
        ("--normalise", "True"),
    } <= rows
    assert ("--seed", "0") in rows and ("--lam", "4.0") not in rows  # of another model
    assert not {"--flip", "--init", "--data"} & {row[0] for row in rows if row}
    assert "Trained on 20 images, 2 steps of 2." in found.text and "Held-out loss " in found.text


def test_nothing_private_is_in_it(made):
    """No name, caption, prompt or path."""
    text = (made[0] / "README.md").read_text()
    assert not [word for word in made[1] if word in text]


def test_an_evaluation_is_filled_in(made, tmp_path):
    """Between the marks, as often as there is one; what its owner has written stays."""
    folder = tmp_path / "adapter"
    shutil.copytree(made[0], folder)
    path = folder / "README.md"
    before = path.read_text()
    edited = before.replace("## Load it", "## Load it\n\nMy words.") + "\nMore of mine.\n"
    path.write_text(edited)
    card.evaluated(folder, RECORD)
    text = path.read_text()
    start, end = edited.index(card.BEGIN), edited.index(card.END)
    assert text.startswith(edited[:start]) and text.endswith(edited[end:])
    assert RECORD["verdict"] in text and "0.61 [0.50, 0.70] | 0.52 |" in text
    assert "held-out images | 701 | 650 |" in text and "members | 600 | 650 |" in text
    assert card.NOT_YET not in text
    bare = RECORD["base"] | {"attacks": {}}
    card.evaluated(folder, RECORD | {"verdict": "Other.", "shadows": 8, "base": bare})
    text = path.read_text()
    assert RECORD["verdict"] not in text and "Other." in text and "8 shadow adapters" in text
    assert "0.61 [0.50, 0.70] | - |" in text
    assert ModelCard(text).data.library_name == "diffusers"


@pytest.mark.parametrize("content", [None, b"# my own card\n", b"\xff\xfe no text"])
def test_others_cards_are_left_alone(made, tmp_path, content):
    """None is made, none without our marks is touched."""
    path = tmp_path / "README.md"
    if content is not None:
        path.write_bytes(content)
    card.evaluated(tmp_path, RECORD)
    assert (path.read_bytes() if path.exists() else None) == content


def test_loaders_do_not_stumble(made, tiny_base):
    """Ours, and diffusers' as the card says it."""
    base = load_base(tiny_base)
    adapter, _ = lora_files.load(base.unet, made[0])
    assert adapter.rank_and_alpha() == (2, 4.0)
    pipeline = load_base(tiny_base).pipeline
    pipeline.load_lora_weights(str(made[0]))
    assert pipeline.get_active_adapters()


@pytest.mark.parametrize(
    ("index", "name"),
    [
        ('{"_name_or_path": "owner/model-v1"}', "owner/model-v1"),
        ('{"_name_or_path": "/home/me/model"}', "folder"),
        ("[", "folder"),
    ],
)
def test_the_base_is_named_as_the_hub_names_it(tmp_path, index, name):
    """Where the folder knows; the way to it is private."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model_index.json").write_text(index)
    assert card.base_name(str(folder)) == name
    assert card.base_name("owner/other") == "owner/other"


DISTILLED = ("distill-private", "distill-private-flip", "distill-crop")
# the audit that a figure of a sentence is from, and its step
AUDITS = {
    "lora": [("audit-lora", 50), ("audit-lora", 400)]
    + [(f"defences/{row}", 75) for row in ("lora-shorter", "lora-flip-shorter", "lora-crop")],
    "smp": [("audit-smp", 50), ("audit-smp", 400)],
    "mp": [("audit-mp", 400)],
    "distill": [(f"defences/{row}", 200) for row in DISTILLED],  # then at equal loss
    "dp": [(f"defences/dp-epsilon-{epsilon}", 6) for epsilon in (8, 3, 1)],
}


def test_what_was_audited_is_said_as_the_records_say_it():
    """A sentence for every method that was audited, word for word in docs/defences.md, with the
    figures of its audits in their order.
    """
    page = " ".join((DOCS / "defences.md").read_text().split())
    assert set(card.AUDITED) == set(AUDITS)
    for method, sentence in card.AUDITED.items():
        assert sentence in page, method
        said = re.findall(r"\d?\.\d\d", sentence)
        for figure, (audit, step) in zip(said, AUDITS[method], strict=False):
            record = read_json(DOCS / "records" / audit / "audit.json")
            found = record["steps"][str(step)]["attacks"][HEADLINE]["auc"]
            assert float(figure) == pytest.approx(found, abs=0.00501), (method, audit)
    kept = equal_loss.read_audits(DOCS / "records/defences")
    there = (
        equal_loss.at_equal_loss(kept[f"dp-epsilon-{epsilon}"]["steps"]["6"], [kept[lora]]).auc
        for epsilon, lora in ((1, "lora-flip-early"), (8, "lora-flip-shorter"))
    )
    low, high = (f"{auc:.2f}".lstrip("0") for auc in there)
    assert card.AUDITED["dp"].endswith(f"LoRA --flip there {low} to {high}")
    twice = {}
    for row, at in (("distill-private-flip", "200"), ("lora-flip-shorter", "38")):
        step = read_json(DOCS / "records/doubled" / row / "audit.json")["steps"][at]
        twice[row] = f"{step['canaries'][HEADLINE]['auc']:.2f}".lstrip("0")
    mine, loras = twice.values()
    said = f"come twice read {mine} with --flip, LoRA --flip {loras}"
    assert card.AUDITED["distill"].endswith(said)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, True),
        ({"method": "smp-detached"}, False),
        ({"target": "full"}, False),
        ({"model": "runwayml/stable-diffusion-v1-5"}, False),
    ],
)
def test_audits_are_said_of_the_embedded_model_alone(changed, said):
    """Another model leaks otherwise, and so do a whole UNet and a method that was not audited."""
    assert bool(card.audited(Settings(**{"method": "lora"} | changed))) == said
