"""Every attack on a model that is known to leak: an adapter over-fitted to few images of the embedded model, beside the
embedded model itself.  What the formulas promise (tests/test_attacks.py) happens on a real UNet and real pictures.
"""

import pytest

import evaluate
import train
from settings import Settings

pytestmark = pytest.mark.timeout(900)  # a training and two evaluations in earnest

# the AUC that each attack reaches at least; the trained ones have 24 images of a side to learn from
LEAST = {"proxy-raw-1": 0.6, "proxy-raw": 0.7, "SecMI-stat": 0.6, "PIAN": 0.6, "black-box": 0.6}
OTHERS = 0.8


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """eval.json of plain LoRA after 40 passes over 48 Twemoji pictures; 19 members and 60 non-members are tested."""
    out = str(tmp_path_factory.mktemp("runs") / "lora")
    small = {"members": 48, "steps": 240, "samples": 0, "lr": 1.5e-3, "save_every": 240, "state_every": 240}
    train.train(Settings(method="lora", out=out, **small))
    (record,) = evaluate.evaluate(evaluate.Settings(runs=[out], nonmembers=60, pictures=0, bootstrap=200))
    return record


def test_every_attack_separates_members_of_an_over_fitted_adapter(record):
    """Each AUC is high; the worst case is far beyond what permuted labels reach."""
    found = {name: round(figures["auc"], 2) for name, figures in record["adapted"]["attacks"].items()}
    print("\nAUC on the over-fitted adapter:", found)
    assert len(found) == 13
    assert not {name: auc for name, auc in found.items() if auc < LEAST.get(name, OTHERS)}
    worst = record["adapted"]["worst"]
    assert worst["auc"] > 0.9 > worst["null"]


def test_no_attack_separates_them_on_the_base_model(record):
    """The adapter never ran: the worst of twelve attacks stays about where permuted labels reach."""
    found = {name: round(figures["auc"], 2) for name, figures in record["base"]["attacks"].items()}
    print("\nAUC on the embedded model:", found)
    assert len(found) == 12
    assert record["base"]["worst"]["auc"] < record["base"]["worst"]["null"] + 0.05
    assert 0.3 < record["blind"]["auc"] < 0.7
