"""The verdicts on C1 to C7: their rules on made-up records, and the command on made-up folders."""

from pathlib import Path

import numpy as np
import pytest

from attacks.decisions import Decisions
from attacks.lira import HEADLINE
from command.errors import UserError
from command.whole_files import write_json
from studies import claims, verdicts
from studies.claims import Part, Results
from studies.seeds import Estimate
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
    """An audit: step -> (held-out loss, AUC, half of its interval over eight adapters)."""
    found = {}
    for at, (loss, auc, half) in steps.items():
        figures = {"auc": auc, "auc_by_adapter": [auc] * 8}
        figures["auc_t_interval"] = [auc - half, auc + half]
        found[at.removeprefix("at")] = {"held_out_loss": loss, "attacks": {HEADLINE: figures}}
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
    assert claims.at_chance(Estimate(0.5, interval, [0])) == says


def test_how_parts_make_a_verdict():
    """All, any, or better in one and worse in none."""

    def parts(*sides):
        return [Part("", "", "", side) for side in sides]

    assert [claims.every(parts(*x)) for x in ((1, 1), (1, 0), (1, -1), (None, -1), (None, 1))] == [
        1,
        0,
        -1,
        -1,
        None,
    ]
    assert [claims.some(parts(*x)) for x in ((1, -1), (0, -1), (None, 1), (None,))] == [
        1,
        0,
        1,
        None,
    ]
    assert [claims.better(parts(*x)) for x in ((1, 0), (1, -1), (0, 0), (-1, 0), (1, None))] == [
        1,
        0,
        0,
        -1,
        None,
    ]


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
    found = claims.at_equal_loss({"lora": [lora], "smp": [smp]})
    half = np.hypot(0.03, 0.03)  # the middle of .02 and .04
    assert found.here == f"+0.05 [{0.05 - half:+.2f}, {0.05 + half:+.2f}]" and found.side == -1
    higher = audit(at10=(0.12, 0.9, 0.02), at30=(0.10, 0.9, 0.02))
    assert claims.at_equal_loss({"lora": [higher, lora], "smp": [smp]}) == found
    # beyond LoRA's best loss its best step is the nearest
    ahead = claims.at_equal_loss({"lora": [lora], "smp": [audit(at50=(0.08, 0.7, 0.01))]})
    assert ahead.here.startswith("-0.20") and ahead.side == 1
    # where one audit of LoRA reached the loss and another did not, the first counts
    far = audit(at10=(0.12, 0.6, 0.02), at50=(0.115, 0.65, 0.02))
    assert claims.at_equal_loss({"lora": [far, lora], "smp": [smp]}) == found
    # LoRA was first asked when its loss was lower than SMP's: it has been there before
    late = audit(at30=(0.10, 0.8, 0.04), at50=(0.09, 0.9, 0.02))
    assert claims.at_equal_loss({"lora": [late], "smp": [smp]}).side is None
    assert claims.at_equal_loss({"lora": [late, lora], "smp": [smp]}) == found


def test_a_step_as_audits_write_it():
    """Its AUC, within an interval over adapters."""
    rng = np.random.default_rng(0)
    member = np.tile([True, False], (4, 15))
    figures = Decisions(member).figures(rng.normal(size=member.shape) + member)
    found = claims.of_step({"attacks": {HEADLINE: figures}})
    assert found.value == figures["auc"] and found.seeds == [0, 1, 2, 3]
    assert found.interval == pytest.approx(
        [figures["auc_t_interval"][0], min(figures["auc_t_interval"][1], 1)]
    )


# ---- the command ----


@pytest.fixture
def results(tmp_path):
    """Run folders of three seeds, evaluated, an audit and a study of curvature."""

    def run(name, method, lam, weight, at="", **figures):
        for seed in SEEDS:
            folder = tmp_path / f"{name}-{seed}"
            (folder / at).mkdir(parents=True, exist_ok=True)
            settings = {"method": method, "lam": lam, "seed": seed, "steps": 4, "out": name}
            summary = {"lambda_effective_mean": weight}
            write_json(folder / "config.json", {"settings": settings, "summary": summary})
            write_json(folder / at / "eval.json", record(seed, **figures))

    run("lora", "lora", 4.0, 0.0, **LORA)
    run("lora", "lora", 4.0, 0.0, at="at-best", combined=0.7, pictures=650.0)
    run("smp", "smp", 4.0, 0.125, pictures=610.0)
    run("mp", "mp", 4.0, 4.0, **RUINED)
    run("matched", "mp", 0.13, 0.13, pictures=700.0)
    (tmp_path / "audit").mkdir()
    made = audit(at50=(0.10, 0.75, 0.02)) | {"settings": {"method": "smp"}}
    write_json(tmp_path / "audit" / "audit.json", made)
    (tmp_path / "curves").mkdir()
    groups = curvature("paper", 0.8, 0.02)
    write_json(tmp_path / "curves" / "smoothness.json", {"groups": groups, "runs": []})
    return tmp_path


def test_the_command(results, capsys):
    """Folders say themselves what they are; every claim has its line, and the file is the table."""
    names = ["lora", "smp", "mp", "matched"]
    folders = [str(results / f"{name}-{seed}") for name in names for seed in SEEDS]
    folders += [str(results / "audit"), str(results / "curves")]
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


def test_a_study_is_read_too(results):
    """seed-S/RUN, as studies.paper leaves them."""
    for seed in SEEDS:
        place = results / "study" / f"seed-{seed}"
        place.mkdir(parents=True)
        for name in ("lora", "smp"):
            (results / f"{name}-{seed}").rename(place / name)
    found = verdicts.gather([results / "study", results / "mp-0"])
    assert {role: list(r) for role, r in found.runs.items()} == {
        "lora": [0, 1, 2], "lora-best": [0, 1, 2], "smp": [0, 1, 2], "mp": [0]
    }  # fmt: skip


def test_each_seed_may_have_its_own_weight(results):
    """The matched MP of a seed is held to SMP's weight of that seed; nothing else may differ."""
    folders = [results / f"{name}-{seed}" for name in ("smp", "matched") for seed in SEEDS]
    config = {"settings": {"method": "mp", "lam": 0.2, "seed": 1, "steps": 4, "out": "matched"}}
    write_json(results / "matched-1" / "config.json", config)
    assert list(verdicts.gather(folders).runs["mp-matched"]) == [0, 1, 2]
    config["settings"]["steps"] = 5
    write_json(results / "matched-1" / "config.json", config)
    with pytest.raises(UserError, match="both mp-matched and differ in --steps"):
        verdicts.gather(folders)


def test_folders_that_are_refused(results):
    """Without results; twice of a seed; of other flags; MP that is no control."""
    smp = [results / f"smp-{seed}" for seed in SEEDS]
    with pytest.raises(UserError, match="holds no results"):
        verdicts.gather([results])
    with pytest.raises(UserError, match="smp-0 are both smp of seed 0"):
        verdicts.gather([smp[0], smp[0]])
    (results / "smp-1" / "eval.json").unlink()
    with pytest.raises(UserError, match="smp-1 has not been evaluated"):
        verdicts.gather(smp)
    config = {"settings": {"method": "smp", "lam": 4.0, "seed": 2, "steps": 5}}
    write_json(results / "smp-2" / "config.json", config | {"summary": None})
    with pytest.raises(UserError, match="differ in --steps"):
        verdicts.gather([smp[0], smp[2]])
    config = {"method": "mp", "lam": 1.0, "seed": 0}
    write_json(results / "matched-0" / "config.json", {"settings": config, "summary": {}})
    with pytest.raises(UserError, match="nor near its mean weight"):
        verdicts.gather([smp[0], results / "matched-0"])


def test_the_table_of_the_docs_is_that_of_its_records():
    """Word for word, of the folders that its command names."""
    root = Path(__file__).parent.parent
    page = (root / "docs" / "results.md").read_text()
    command = page.split("python -m studies.verdicts ")[1].splitlines()[0]
    found = verdicts.gather([root / folder for folder in command.split()])
    assert verdicts.table(found) in page
