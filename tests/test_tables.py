"""What a person reads after an evaluation: one sentence, and tables within 80 columns."""

import numpy as np
import pytest

from attacks import comparisons
from curves import roc
from report import tables


def record(name="runs/lora @400", shift=2.0, nonmembers=200, shadows=0, quality=True):
    """A record as in eval.json, of made-up scores."""
    rng = np.random.default_rng(0)
    scores = {
        attack: (rng.normal(strength * shift, 1, 40), rng.normal(0, 1, nonmembers))
        for attack, strength in (("loss", 0.5), ("LiRA offline, gradient", 0.8), ("combined", 1))
    }
    found = {
        "attacks": {a: roc.summary(*pair, 0.0) for a, pair in scores.items()},
        "headline": comparisons.headline(scores, scores),
        "null": 0.6,
        "held_out_loss": 0.1234,
    }
    if quality:
        found["quality"] = {"frechet_members": 626.4, "frechet_held_out": 12345.6}
    sizes = {"member_test": 40, "nonmember_test": nonmembers}
    blind = roc.summary(np.arange(40) % 20, np.arange(nonmembers) % 20, 0.0)  # at chance
    return {"run": name, "images": sizes, "adapted": found, "base": found, "blind": blind} | {
        "shadows": shadows
    }


@pytest.mark.parametrize("nonmembers", [50, 200, 1000, 10000])
@pytest.mark.parametrize("quality", [True, False])
def test_tables_are_80_columns_wide(nonmembers, quality, capsys):
    """Whatever the length of a run's name, the number of runs and the FPRs that are stated."""
    long = "runs/a-very-long-name-of-a-run-that-a-person-gave-to-it-with-many-words/lora @1600"
    runs = [record("runs/lora @400", nonmembers=nonmembers, quality=quality)]
    runs += [record(long, 0.0, nonmembers, quality=quality), record(long + "0", -2.0, nonmembers)]
    tables.print_tables(runs if quality else runs[:2])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert ("TPR at 5 % FPR" in printed) == (nonmembers == 200)
    assert ("TPR at 1 % FPR" in printed) == (nonmembers == 1000)
    assert ("12346" in printed) == quality
    assert "AUC below 0.5 for loss" in printed or not quality


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (2.0, "This adapter leaks which images"),
        (0.45, "leaks a little about which images"),
        (0.0, "do not find the training images"),
        (-2.0, "with the sign reversed"),
    ],
)
def test_verdict(shift, words):
    """One sentence, whose figures are those of the headline attack."""
    given = record(shift=shift)
    sentence, head = tables.verdict(given), given["adapted"]["headline"]
    assert words in sentence and sentence.endswith(".") and sentence.count(". ") == 0
    assert f"the {head['attack']} attack" in sentence
    assert f"{head['auc']:.2f}"[2:].lstrip("0") + " % of the time" in sentence
    share = given["adapted"]["attacks"][head["attack"]]["tpr_at_5_fpr"]
    assert (
        f"one false alarm in twenty it finds {round(100 * round(share, 2))} % of the members"
        in sentence
    )
    assert "false alarm" not in tables.verdict(record(shift=shift, nonmembers=50))
    assert "one false alarm in a hundred" in tables.verdict(record(shift=shift, nonmembers=1000))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.50"),
        (0.9849, "0.98"),
        (0.9961, ".996"),
        (0.9994, ".999"),
        (1.0, "1.00"),
        (0, "0.00"),
    ],
)
def test_near_one_there_is_a_third_digit(value, text):
    """1.00 [1.00, 1.00] would say that nothing else is possible."""
    assert tables.rounded(value) == text
    assert tables.cell({"auc": value, "auc_interval": [value, 1]}) == f"{text} [{text}, 1.00]"


def test_sets_that_differ_in_kind(capsys):
    """What a classifier without any model tells apart is not the adapter's leak: said in the
    verdict, unless the attack finds more than it and than the base, and below the table.
    """
    given = record(shift=2.0)
    apart = roc.summary(np.arange(40) + 30, np.arange(200) % 50, 0.0)
    for blind, base, words in (
        (given["blind"], given["base"], "This adapter leaks"),
        (apart, given["base"], "differ in kind, which shows without any model (blind AUC 0.9"),
        (apart | {"auc_interval": [0.51, 0.6]}, record(shift=0.0)["base"], "This adapter leaks"),
    ):
        found = given | {"blind": blind, "base": base}
        assert words in tables.verdict(found), blind["auc"]
        tables.print_tables([found | {"verdict": ""}])
        printed = " ".join(capsys.readouterr().out.split())
        assert ("warning: the test members and non-members differ in kind" in printed) == (
            blind["auc_interval"][0] > 0.5
        )
