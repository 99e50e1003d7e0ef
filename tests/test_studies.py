"""The study of defences on the tiny model: rows that are finished stay, and make the table."""

import pytest

import audit
from cli import UserError
from settings import METHODS, Settings, resolve
from studies import defences
from studies.defences import Study


@pytest.fixture(scope="module")
def small(tiny_base, image_folder, tmp_path_factory):
    """Flags of four adapters of two steps."""
    small = {"model": tiny_base, "data": image_folder, "adapters": 4, "pool": 10, "steps": 2}
    small |= {"rank": 2, "alpha": 2.0, "batch_size": 2, "target": "attention", "jobs": 1}
    return small | {"out": str(tmp_path_factory.mktemp("study"))}


def test_rows_join_the_table(small, monkeypatch, capsys):
    """One row, then another: the first is not trained again, both stand in the table."""
    monkeypatch.setattr(defences, "ROWS", {k: {"method": k} for k in ("lora", "distill", "dp")})
    monkeypatch.setattr(audit.workers, "processes", lambda _: InThread())
    first = defences.study(Study(rows=["distill"], **small))
    assert [line.split()[1] for line in first.splitlines()[2:]] == ["distill"] * 2
    trained, honest = [], audit.train_adapter

    def seen(base, data, s):
        trained.append(s.method)
        return honest(base, data, s)

    monkeypatch.setattr(audit, "train_adapter", seen)
    both = defences.study(Study(rows=["lora", "distill"], **small))
    assert trained == ["lora"] * 4 and set(first.splitlines()) < set(both.splitlines())
    assert len({line.count("|") for line in both.splitlines()}) == 1


class InThread:
    """An executor that does a task when it is given."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *given):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*given))
        return future


def test_an_unknown_row_is_refused(small):
    """Before anything is trained."""
    with pytest.raises(UserError, match="no row lorax"):
        defences.study(Study(rows=["lora", "lorax"], **small))


@pytest.mark.parametrize("name", defences.ROWS)
def test_every_row_is_a_method_that_can_be(name):
    """Flags that resolve on the embedded model."""
    s = resolve(Settings(**defences.ROWS[name]))
    assert s.method in METHODS


def test_costs_by_hand():
    """In trainings of plain LoRA: 400 steps of 8 images, three passes each."""

    def settings(**flags):
        return vars(resolve(Settings(**flags)))

    assert defences.cost(settings(method="lora"), 400) == 1
    # micro-batches go through twice, the first time without gradient
    assert defences.cost(settings(method="lora", accumulate=4), 100) == pytest.approx(4 / 3)
    assert defences.cost(settings(method="smp"), 400) == pytest.approx(5 / 3)
    assert defences.cost(settings(method="dp", draws=2), 400) == 2
    distill = settings(method="distill", steps=200)
    # five teachers of 50 steps; 200 steps of 16 images, each once more through its teacher
    assert defences.cost(distill, 200) == pytest.approx((5 * 50 * 24 + 200 * 64) / 9600)
    alone = settings(method="distill", steps=200, public="none")
    assert defences.cost(alone, 200) == pytest.approx((5 * 50 * 24 + 200 * 32) / 9600)


def test_what_a_row_uses():
    """Non-members for an attacker, public pictures for a student or a subspace."""
    found = {n: defences.uses(vars(resolve(Settings(**f)))) for n, f in defences.ROWS.items()}
    assert found["lora"] == found["dp"] == found["distill-private"] == "-"
    assert found["smp"] == "non-members" and found["distill"] == "public pictures"
    assert found["subspace-smp"] == "non-members, public pictures"
