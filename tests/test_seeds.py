"""Figures over seeds, against sums by hand and scipy."""

import numpy as np
import pytest
from scipy.stats import t as student

from command.whole_files import write_json
from studies import records
from studies.records import ASR, COMBINED, LOSS, PICTURES, Estimate


def record(seed, auc, half=0.1, loss=0.1, frechet=None):
    """What an eval.json has of the attacks that are read here."""
    figures = {"auc": auc, "auc_interval": [auc - half, auc + 2 * half]}
    figures |= {"asr": auc - 0.1, "asr_interval": [auc - 0.2, auc]}
    adapted = {"attacks": dict.fromkeys(("combined", "proxy-raw-1"), figures)}
    adapted |= {"held_out_loss": loss}
    adapted |= {"quality": {"frechet_members": frechet}} if frechet else {}
    return {"seed": seed, "adapted": adapted}


def test_a_mean_includes_the_seeds():
    """By t where they differ by more than their own intervals say; of one seed its own."""
    three = {k: record(k, auc) for k, auc in enumerate((0.6, 0.7, 0.95))}
    found, values = records.mean(three, COMBINED), np.array([0.6, 0.7, 0.95])
    half = student.ppf(0.975, 2) * values.std(ddof=1) / np.sqrt(3)
    assert found.value == pytest.approx(0.75) and found.seeds == [0, 1, 2]
    assert found.interval == pytest.approx([0.75 - half, 1.0])  # a share
    assert records.mean({0: three[0]}, COMBINED).interval == pytest.approx([0.5, 0.8])
    assert records.mean({0: record(0, 0.6)}, LOSS).interval is None
    assert records.mean({0: record(0, 0.6)}, PICTURES) is None and records.mean({}, LOSS) is None


def test_a_difference_is_taken_seed_by_seed():
    """Seeds that scatter alike are told apart, on those that both have."""
    first = {k: record(k, auc, 0.001) for k, auc in enumerate((0.6, 0.7, 0.95))}
    second = {k: record(k, auc, 0.001) for k, auc in enumerate((0.5, 0.61, 0.84, 0.9))}
    found, change = records.difference(first, second, COMBINED), np.array([0.1, 0.09, 0.11])
    half = student.ppf(0.975, 2) * 0.01 / np.sqrt(3)
    assert found.value == pytest.approx(change.mean()) and found.seeds == [0, 1, 2]
    assert found.interval == pytest.approx([0.1 - half, 0.1 + half]) and found.side() == 1
    assert records.difference(second, first, COMBINED).side() == -1
    assert found.side(0.1) == 0 and found.side(0.2) == -1
    assert records.difference({5: first[0]}, second, COMBINED) is None
    assert records.difference(first, second, COMBINED, ASR).value == pytest.approx(0.2)


def test_seeds_that_agree_by_chance():
    """The figures' own intervals still say how little each knows: .1 below the one, .2 above the
    other.
    """
    first, second = ({k: record(k, auc) for k in range(2)} for auc in (0.6, 0.5))
    found, low = records.difference(first, second, COMBINED), np.hypot(0.1, 0.2) / np.sqrt(2)
    assert found.value == pytest.approx(0.1)
    assert found.interval == pytest.approx([0.1 - low, 0.1 + low])  # .2 above, .1 below


def test_one_seed():
    """The figures' own intervals, joined; without them there is none, and nothing is told."""
    first, second = {0: record(0, 0.9, 0.03, frechet=9)}, {0: record(0, 0.5, 0.04, frechet=5)}
    found = records.difference(first, second, COMBINED)
    low, high = np.hypot(0.03, 0.08), np.hypot(0.06, 0.04)  # auc - half, auc + 2 half
    assert found.interval == pytest.approx([0.4 - low, 0.4 + high])
    pictures = records.difference(first, second, PICTURES)
    assert pictures == (4, None, [0]) and pictures.side() == 0
    middle = [(1.0, first, PICTURES), (-0.5, second, PICTURES), (-0.5, first, PICTURES)]
    assert records.weighted(middle).value == 2


def test_cells():
    """A share, a difference, a distance without an interval, and nothing."""
    assert COMBINED.cell(Estimate(0.5, [0.4, 0.61], [0, 1])) == "0.50 [0.40, 0.61]"
    assert COMBINED.cell(Estimate(-0.5, [-0.61, 0.4], [0]), signed=True) == "-0.50 [-0.61, +0.40]"
    assert PICTURES.cell(Estimate(704.2, None, [0])) == "704"
    assert LOSS.cell(Estimate(0.11, [0.1, 0.12], [0]), signed=True) == "+0.1100 [+0.1000, +0.1200]"
    assert LOSS.cell(None) == "-"


def test_reading(tmp_path):
    """Runs that are evaluated, at the adapter that is asked for."""
    for seed, name in ((0, "smp"), (1, "smp"), (1, "lora")):
        folder = tmp_path / f"seed-{seed}" / name
        folder.mkdir(parents=True)
        write_json(folder / "config.json", {"settings": {"steps": seed}, "summary": {}})
    assert records.read(tmp_path, "smp") == {}
    write_json(tmp_path / "seed-1" / "smp" / "eval.json", record(1, 0.5))
    (tmp_path / "seed-0" / "smp" / "at-best").mkdir()
    write_json(tmp_path / "seed-0" / "smp" / "at-best" / "eval.json", record(0, 0.5))
    assert list(records.read(tmp_path, "smp")) == [1]
    assert list(records.read(tmp_path, "smp", "at-best")) == [0]
    assert records.read(tmp_path, "smp")[1]["settings"] == {"steps": 1}
