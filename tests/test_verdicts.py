"""The verdicts on C1 to C7: their rules on made-up records, and the command on made-up folders."""

import numpy as np
import pytest

from attacks.decisions import Decisions
from attacks.lira import HEADLINE
from bench import equal_loss as simulated
from command.errors import UserError
from command.whole_files import read_json, write_json
from studies import claims, equal_loss, verdicts
from studies.claims import Part, Results
from studies.records import Estimate
from studies.verdicts import Verdicts

SEEDS = (0, 1, 2)


def record(seed, proxy=0.5, combined=0.5, pictures=600.0, loss=0.1, **more):
    """What an evaluation says of a run; seeds differ a little, alike in all runs."""
    shift = 0.01 * (seed - 1)
    attacks = {
        name: {"auc": auc + shift, "auc_interval": [auc + shift - 0.05, auc + shift + 0.05]}
        for name, auc in {"proxy-raw-1": proxy, "combined": combined, **more}.items()
    }
    adapted = {"attacks": attacks, "held_out_loss": loss + shift / 100 + seed**2 * 1e-5}
    adapted["quality"] = {"frechet_members": pictures + seed**2}
    return {"seed": seed, "adapted": adapted}


def runs(**figures):
    """Three seeds."""
    return {seed: record(seed, **figures) for seed in SEEDS}


def audit(**steps):
    """An audit: step -> (held-out loss, AUC, half of its interval over eight adapters), or with a
    list of the adapters' AUCs and one of their losses.
    """
    found = {}
    for at, (loss, auc, half, *by_adapter) in steps.items():
        aucs, losses = by_adapter or ([auc] * 8, [loss] * 8)
        figures = {"auc": auc, "auc_by_adapter": aucs, "tpr_at_1_fpr": auc / 2}
        figures["auc_t_interval"] = [auc - half, auc + half]
        step = {"held_out_loss": loss, "held_out_loss_by_adapter": losses}
        found[at.removeprefix("at")] = step | {"attacks": {HEADLINE: figures}}
    return {"steps": found}


def curvature(row, smp, mp, error=0.1):
    """Groups of smoothness.json: r of each, with the error of Fisher's z."""
    return [
        {"row": row, "method": m, "seeds": [0, 1], "norms": norms}
        for m, r in (("mp", mp), ("smp", smp))
        for norms in [{"z": np.arctanh(r), "error": error, "runs": 2, "effective_points": 20.0}]
    ]


LORA = {"proxy": 0.75, "combined": 0.95}
RUINED = {"pictures": 1000.0, "loss": 0.15}


def said(found):
    """{claim: verdict}"""
    return {claim.name: claim.verdict for claim in claims.claims(found)}


def test_nothing_is_measured():
    """Then no claim is judged."""
    assert set(said(Results()).values()) == {"not measured"}


def test_a_paper_that_is_right():
    """Records as the paper would have them."""
    runs_ = {"lora": runs(**LORA), "mp": runs(**RUINED), "smp": runs(pictures=610.0)}
    runs_ |= {"mp-matched": runs(pictures=700.0), "lora-best": runs(combined=0.7, pictures=650.0)}
    audits = {"lora": [audit(at50=(0.10, 0.9, 0.02))], "smp": [audit(at50=(0.10, 0.5, 0.02))]}
    found = Results(runs_, audits, curvature("paper", 0.8, 0.02))
    # the paper has no shadow attack; SMP is at chance in this one
    assert said(found) == {f"C{i}": "holds" for i in range(1, 8)}


def test_a_paper_that_is_wrong():
    """An attack beside the paper's reads SMP, curvature is alike, early stopping wins."""
    smp = {"proxy": 0.5, "combined": 0.8, "pictures": 900.0, "loss": 0.14}
    runs_ = {"lora": runs(proxy=0.5, combined=0.52), "mp": runs(combined=0.9), "smp": runs(**smp)}
    runs_ |= {"mp-matched": runs(combined=0.7), "lora-best": runs(combined=0.7)}
    audits = {"lora": [audit(at50=(0.10, 0.6, 0.02))], "smp": [audit(at50=(0.10, 0.8, 0.02))]}
    found = Results(runs_, audits, curvature("paper", 0.8, 0.85))
    assert said(found) == {f"C{i}": "does not hold" for i in range(1, 8)}


def test_what_the_data_do_not_say():
    """Wide intervals, and trades, are not told apart."""
    wide = {k: record(k, combined=0.4 + 0.3 * k) for k in SEEDS}
    trade = runs(combined=0.4, pictures=900.0)
    runs_ = {"lora": wide, "smp": trade, "mp-matched": runs(), "lora-best": runs()}
    audits = {"smp": [audit(at50=(0.10, 0.6, 0.1))]}
    found = said(Results(runs_, audits, curvature("raw", 0.5, 0.3, error=0.5)))
    assert found == {
        "C1": "not told apart",
        "C2": "not measured",
        "C3": "not measured",  # MP is missing
        "C4": "not told apart",
        "C5": "not told apart",
        "C6": "not told apart",
        "C7": "not told apart",
    }


@pytest.mark.parametrize(
    "interval, says",
    [([0.45, 0.55], 1), ([0.4, 0.6], 1), ([0.61, 0.8], -1), ([0.1, 0.3], -1), ([0.5, 0.7], 0)],
)
def test_at_chance(interval, says):
    """Also an attack whose sign is turned gives members away."""
    found = Estimate(0.5, interval, [0])
    assert claims.at_chance(found) == says and claims.leaks(found) == -says
    assert claims.at_chance(Estimate(0.5, None, [0])) is None


@pytest.mark.parametrize(
    "rule, sides, says",
    [
        (claims.every, (1, 1), 1),
        (claims.every, (1, 0), 0),
        (claims.every, (1, -1), -1),
        (claims.every, (None, -1), -1),
        (claims.every, (None, 1), None),
        (claims.some, (1, -1), 1),
        (claims.some, (0, -1), 0),
        (claims.some, (None, 1), 1),
        (claims.some, (None,), None),
        (claims.better, (1, 0), 1),
        (claims.better, (1, -1), 0),
        (claims.better, (0, 0), 0),
        (claims.better, (-1, 0), -1),
        (claims.better, (1, None), None),
    ],
)
def test_how_parts_make_a_verdict(rule, sides, says):
    """All, any, or better in one and worse in none."""
    assert rule([Part("", "", "", side) for side in sides]) == says


def test_curvature_in_several_settings():
    """It must follow in each; SMP's above MP's is not enough where MP's follows too."""
    groups = curvature("pooled", 0.9, 0.6) + curvature("paper", 0.8, 0.02)
    found = claims.claims(Results(smoothness=groups))[3]
    assert [part.side for part in found.parts] == [-1, 1] and found.verdict == "does not hold"
    assert (
        found.parts[1].here.startswith("SMP 0.80 [0.7") and "MP 0.02 [-0.17" in found.parts[1].here
    )
    few = curvature("raw", 0.8, 0.02)
    few[0]["norms"]["runs"] = 0
    assert claims.claims(Results(smoothness=few))[3].verdict == "not measured"


def test_audits_at_the_same_loss():
    """LoRA's AUC is read off its way down, not off its way up; of two audits the lower one."""
    lora = audit(
        at10=(0.12, 0.6, 0.02), at30=(0.10, 0.8, 0.04), at50=(0.09, 0.9, 0.02), at99=(0.12, 1, 0)
    )
    smp = audit(at50=(0.11, 0.75, 0.03), at99=(0.14, 0.55, 0.1))
    part = claims.equal_loss(Results(audits={"lora": [lora], "smp": [smp]}))
    assert part.here == "+0.05 [+0.05, +0.05]" and part.side == -1 and part.over == "4 pairs"

    def at_loss(loss, *loras):
        (step,) = audit(at50=(loss, 0.75, 0.03))["steps"].values()
        found = equal_loss.at_equal_loss(step, list(loras))
        assert found is None or found.tpr == pytest.approx(found.auc / 2)
        return found and pytest.approx(found.auc)

    assert at_loss(0.11, lora) == 0.7
    higher = audit(at10=(0.12, 0.9, 0.02), at30=(0.10, 0.9, 0.02))
    assert at_loss(0.11, higher, lora) == 0.7
    assert at_loss(0.08, lora) == 0.9  # beyond LoRA's best loss its best step is the nearest
    # where one audit of LoRA reached the loss and another did not, the first counts
    far = audit(at10=(0.12, 0.6, 0.02), at50=(0.115, 0.65, 0.02))
    assert at_loss(0.11, far, lora) == 0.7
    # LoRA was first asked when its loss was lower than SMP's: it has been there before
    late = audit(at30=(0.10, 0.8, 0.04), at50=(0.09, 0.9, 0.02))
    assert at_loss(0.11, late) is None and at_loss(0.11, late, lora) == 0.7
    assert at_loss(0.11) is None


def test_the_interval_at_equal_loss_by_hand():
    """Student's over pairs of what each is ahead of the line, its loss carried by the slope; with
    other numbers of adapters of both sets apart.
    """
    ones = [(0.61, 0.121), (0.59, 0.119), (0.62, 0.120), (0.58, 0.120)]
    twos = [(0.83, 0.101), (0.77, 0.099), (0.80, 0.100), (0.80, 0.100)]
    mine = [(0.76, 0.111), (0.74, 0.109), (0.72, 0.112), (0.78, 0.108)]
    lists = [[list(column) for column in zip(*rows, strict=True)] for rows in (ones, twos, mine)]
    lora = audit(at10=(0.12, 0.6, 0.0, *lists[0]), at30=(0.10, 0.8, 0.0, *lists[1]))
    (step,) = audit(at50=(0.11, 0.75, 0.0, *lists[2]))["steps"].values()
    found = equal_loss.at_equal_loss(step, [lora]).change
    slope, ahead = (0.8 - 0.6) / (0.10 - 0.12), []
    for k in (0, 2):
        auc, loss = (
            [sum(rows[i][c] for i in (k, k + 1)) / 2 for rows in (ones, twos, mine)] for c in (0, 1)
        )
        off = [x[2] - (x[0] + x[1]) / 2 for x in (auc, loss)]
        ahead.append(off[0] - slope * off[1])
    half = 12.706 * np.std(ahead, ddof=1) / np.sqrt(2)  # t of one degree of freedom
    assert found.value == pytest.approx(0.05)
    assert found.interval == pytest.approx([0.05 - half, 0.05 + half], rel=1e-3)
    six = [[*column, *column[:2]] for column in lists[2]]
    (more,) = audit(at50=(0.11, 0.75, 0.0, *six))["steps"].values()
    assert equal_loss.at_equal_loss(more, [lora]) is None  # its attacker has other shadows


@pytest.mark.parametrize("adapters", [6, 8, 16])
def test_what_is_the_same_is_told_apart_as_often_as_an_interval_says(adapters):
    """In 3 to 7 % of simulations."""
    error = 3 * np.sqrt(0.05 * 0.95 / 1000)
    assert 0.03 - error < simulated.told_apart(adapters, 1000) < 0.07 + error


def test_a_step_as_audits_write_it():
    """Its AUC, within an interval over adapters."""
    rng = np.random.default_rng(0)
    member = np.tile([True, False], (4, 15))
    figures = Decisions(member).figures(rng.normal(size=member.shape) + member)
    found = equal_loss.of_step({"attacks": {HEADLINE: figures}})
    assert found.value == figures["auc"] and found.seeds == [0, 1, 2, 3]
    low, high = figures["auc_t_interval"]
    assert found.interval == pytest.approx([low, min(high, 1)])


# ---- the command ----


@pytest.fixture
def results(tmp_path):
    """A study of three seeds, evaluated, an audit and a study of curvature."""

    def run(name, lam, weight, at="", **figures):
        for seed in SEEDS:
            folder = tmp_path / "study" / f"seed-{seed}" / name
            (folder / at).mkdir(parents=True, exist_ok=True)
            settings = {"method": name.split("-")[0], "lam": lam, "seed": seed, "steps": 4}
            summary = {"lambda_effective_mean": weight}
            write_json(folder / "config.json", {"settings": settings, "summary": summary})
            write_json(folder / at / "eval.json", record(seed, **figures))

    run("lora", 4.0, 0.0, **LORA)
    run("lora", 4.0, 0.0, at="at-best", combined=0.7, pictures=650.0)
    run("smp", 4.0, 0.125, pictures=610.0)
    run("mp", 4.0, 4.0, **RUINED)
    run("mp-matched", 0.13, 0.13, pictures=700.0)
    (tmp_path / "audit").mkdir()
    made = audit(at50=(0.10, 0.75, 0.02)) | {"settings": {"method": "smp"}}
    write_json(tmp_path / "audit" / "audit.json", made)
    (tmp_path / "curves").mkdir()
    groups = curvature("paper", 0.8, 0.02)
    write_json(tmp_path / "curves" / "smoothness.json", {"groups": groups, "runs": []})
    return tmp_path


def test_the_command(results, capsys):
    """Folders say themselves what they are; every claim has its line, and the file is the table."""
    folders = [str(results / name) for name in ("study", "audit", "curves")]
    out = results / "new" / "verdicts.md"
    found = verdicts.verdicts(Verdicts(folders, str(out)))
    assert out.read_text() == found and found in capsys.readouterr().out
    bold = [[c.strip(" *") for c in x.split("|")[1:-1]] for x in found.splitlines() if "| **" in x]
    assert [line[0] for line in bold] == [f"C{i}" for i in range(1, 8)]
    assert [line[-1] for line in bold] == ["holds"] * 6 + ["does not hold"]
    assert bold[0][2] == "ASR 82.3 %, folded AUC 0.73"
    rows = [line for line in found.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert "| combined attack, AUC |  | 0.95 [0.92, 0.98] | 3 seeds | holds |" in found


def test_folders_that_are_refused(results):
    """Without results; a seed twice; MP that is no control, or beside its name."""
    study = results / "study"

    def change(name, seed, **settings):
        path = study / f"seed-{seed}" / name / "config.json"
        config = read_json(path)
        write_json(path, config | {"settings": config["settings"] | settings})

    with pytest.raises(UserError, match="holds no results"):
        verdicts.gather([results])
    with pytest.raises(UserError, match="has lora of seed 0 once more"):
        verdicts.gather([study, study])
    change("mp-matched", 1, lam=0.2)  # each seed may have its own weight
    assert list(verdicts.gather([study]).runs["mp-matched"]) == [0, 1, 2]
    change("mp-matched", 1, lam=1.0)
    with pytest.raises(UserError, match="lambda 1, not near smp's mean weight"):
        verdicts.gather([study])
    change("mp-matched", 1, lam=0.13)
    for seed in SEEDS:
        change("mp", seed, lam=0.13)
    with pytest.raises(UserError, match="is it mp-matched"):
        verdicts.gather([study])
    for seed in SEEDS:
        change("mp", seed, lam=4.0)
    change("smp", 1, steps=5)
    with pytest.raises(UserError, match="smp of seed 0 and of seed 1 differ in --steps"):
        verdicts.gather([study])
