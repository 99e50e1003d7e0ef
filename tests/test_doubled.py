"""Canaries that come twice: who trains on what, and a whole row."""

import numpy as np
import pytest

import audit
from attacks import audit_tasks
from attacks.audit_plan import hash_of
from attacks.lira import HEADLINE
from command.whole_files import read_json
from files.images import Images
from studies import defences, doubled

pytestmark = pytest.mark.usefixtures("elsewhere")
POOL = 20


@pytest.fixture
def flags(tiny_base, image_folder, tmp_path):
    """Flags of four adapters of two steps."""
    small = {"model": tiny_base, "data": image_folder, "adapters": 4, "pool": POOL, "steps": 2}
    small |= {"rank": 2, "alpha": 2.0, "batch_size": 2, "target": "attention", "jobs": 1}
    return small | {"out": str(tmp_path / "study")}


def test_the_plan(flags):
    """Each adapter has half of the other images, and half of the canaries with their copies; its
    complement has the rest.  A copy is the canary to the bit.
    """
    whole = audit.make_plan(audit.complete(audit.Audit(**flags, canaries=POOL // 4)))
    plan = doubled.doubled(whole)
    assert plan.pool == 15 and plan.canaries == [10, 11, 12, 13, 14]
    assert plan.key(0) != whole.key(0) and len(plan.images) == len(whole.images)
    pairs = [(i, i + 5) for i in plan.canaries]
    for here, there in pairs:
        assert plan.images[here] == plan.images[there]
        assert plan.captions[here] == plan.captions[there]
    assert plan.captions[10:15] == [whole.captions[i] for i in whole.canaries]
    assert set(plan.images[:POOL]) < set(whole.images[:POOL])
    sets = []
    for index, roles in enumerate(plan.roles):
        members = [i for part in ("aux", "val", "test") for i in roles[f"member_{part}"]]
        assert len(members) == len(set(members)) and all(i < POOL for i in members)
        assert {here in members for here, _ in pairs} == {True, False}
        assert all((here in members) == (there in members) for here, there in pairs)
        assert not set(members) & set(roles["nonmember_aux"])
        assert plan.members()[index].tolist() == [i in members for i in range(15)]
        sets.append(set(members))
    assert all(sets[k] | sets[k + 1] == set(range(POOL)) for k in (0, 2))
    assert not sets[0] & sets[1] and sets[0] != sets[2]
    _, data = audit_tasks.subject(plan)  # which loads the images anew, and compares
    pixels, copies = data.pixels[10:15], data.pixels[15:20]
    np.testing.assert_array_equal(pixels, copies)
    assert hash_of(Images(plan.names, plan.captions, data.pixels)) == plan.digest


def test_a_row(flags, in_thread, capsys):
    """An audit whose record has both groups; once more it trains nothing."""
    s = defences.Study(rows=["lora-shorter"], **flags)
    text = doubled.study(s)
    record = read_json(f"{flags['out']}/lora-shorter/audit.json")
    assert record["settings"]["canaries"] == 5 and record["pool"] == 15
    (line,) = text.splitlines()[-1:]
    step = record["steps"]["75"]
    for group in ("canaries", "attacks"):
        assert f"{step[group][HEADLINE]['auc']:.2f}".lstrip("0") in line
    assert text == doubled.study(s)
    assert "lora-shorter, 75" in capsys.readouterr().out
