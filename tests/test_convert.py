"""files/convert.py: an adapter into kohya's form, and what cannot be converted."""

import json
import re

import pytest
from safetensors.torch import load_file

import lora
from command.errors import UserError
from files import adapters
from files.bases import load_base
from files.convert import Flags, convert


@pytest.fixture
def adapter(tiny_base, tmp_path):
    """The folder of an adapter of the tiny base."""
    unet = load_base(tiny_base).unet
    adapters.save(lora.inject(unet, "attention", 2, 4.0), tmp_path / "adapter", {})
    return tmp_path / "adapter"


def test_a_run_folder_knows_its_base(adapter, tiny_base):
    """The file lies beside the adapter and has a tensor of each kind for every layer."""
    run = adapter.parent
    (run / "config.json").write_text(json.dumps({"settings": {"model": tiny_base}}))
    file = convert(Flags([str(run)]))
    assert file.parent == run / "kohya"
    found, ours = load_file(file), load_file(adapter / "pytorch_lora_weights.safetensors")
    assert len(found) == len(ours) // 2 * 3
    assert all(key.startswith("lora_unet_") and "." in key for key in found)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "name one run folder or adapter"),
        ({"adapters": ["{}", "{}"]}, "name one run folder or adapter"),
        ({"adapters": ["{}"]}, "is not a run folder: name its base with --model"),
        ({"adapters": ["{}/nowhere"], "model": "BASE"}, "there is no"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(adapter, tiny_base, given, words):
    given = {k: [x.format(adapter) for x in v] if k == "adapters" else v for k, v in given.items()}
    if "model" in given:
        given["model"] = tiny_base
    with pytest.raises(UserError, match=re.escape(words)) as told:
        convert(Flags(**given))
    assert "\n" not in str(told.value)
    assert not list(adapter.parent.rglob("kohya*"))
