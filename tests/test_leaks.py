"""Every attack on a model that is known to leak: an adapter over-fitted to few images of the embedded model, beside the
embedded model itself.  What the formulas promise (tests/test_attacks.py) happens on a real UNet and real pictures.
"""

import pytest

import evaluate
import train
from settings import Settings

# at least so much AUC of each attack on the over-fitted adapter
LEAST = {}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """eval.json of plain LoRA on 48 Twemoji pictures, 50 passes over them; 19 members and 40 non-members are tested."""
    out = str(tmp_path_factory.mktemp("runs") / "lora")
    small = {"members": 48, "steps": 300, "samples": 0, "lr": 1.5e-3, "save_every": 300, "state_every": 300}
    train.train(Settings(method="lora", out=out, **small))
    (record,) = evaluate.evaluate(evaluate.Settings(runs=[out], nonmembers=40, pictures=0, bootstrap=200))
    return record


def test_print(record):
    for name, f in record["adapted"]["attacks"].items():
        print(
            name,
            round(f["auc"], 3),
            [round(x, 2) for x in f["auc_interval"]],
            round(record["base"]["attacks"].get(name, {"auc": 0})["auc"], 3),
        )
