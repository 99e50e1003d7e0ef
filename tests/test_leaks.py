"""Every attack on a model that is known to leak: an adapter over-fitted to few images of the
embedded model, beside the embedded model itself.  What the formulas promise (tests/test_attacks.py)
happens on a real UNet and real pictures.
"""

import pytest

import evaluate
import train
from settings import Settings

# the AUC that each attack reaches at least; the trained ones have 8 images of a side to learn from
LEAST = {"proxy-raw-1": 0.6, "proxy-raw": 0.7, "SecMI-stat": 0.6, "PIAN": 0.6, "black-box": 0.6}
OTHERS = 0.8


@pytest.mark.timeout(900)  # a training and two evaluations in earnest
def test_attacks_separate_members_of_an_over_fitted_adapter_and_not_of_the_base(tmp_path):
    """Plain LoRA, 30 passes over 16 pictures: each AUC is high.  Without the adapter none is beyond
    permuted labels.
    """
    out, steps = str(tmp_path / "lora"), 60
    small = {"members": 16, "samples": 0, "lr": 1.5e-3, "save_every": steps, "state_every": steps}
    small["schedule"] = "constant"
    train.train(Settings(method="lora", out=out, seed=1, steps=steps, **small))
    (record,) = evaluate.evaluate(evaluate.Settings(runs=[out], test_nonmembers=16, pictures=0))
    adapted, base = record["adapted"], record["base"]
    for name, model in (("over-fitted adapter", adapted), ("embedded model", base)):
        print(
            f"AUC on the {name}:",
            {attack: round(f["auc"], 2) for attack, f in model["attacks"].items()},
        )
    assert len(adapted["attacks"]) == 15 and len(base["attacks"]) == 14
    assert not {
        a: f["auc"] for a, f in adapted["attacks"].items() if f["auc"] < LEAST.get(a, OTHERS)
    }
    assert adapted["headline"]["auc"] > 0.9 > adapted["null"]
    assert max(f["auc"] for f in base["attacks"].values()) < base["null"] + 0.05
    assert 0.3 < record["blind"]["auc"] < 0.7
