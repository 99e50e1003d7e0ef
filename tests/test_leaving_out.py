"""The rows that no flag makes: leave-out distillation with another who answers and with no student
at all."""

from dataclasses import replace

import pytest
import torch

import lora
from algorithm import algorithm_1
from methods.assembly import assemble
from methods.distill import weights_of
from run.processes import Processes
from run.resolve import resolve
from settings import Settings
from studies import defences, leaving_out

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def s(tiny_base):
    """Three teachers of three steps, two of the student."""
    small = {"rank": 2, "alpha": 2.0, "target": "attention", "batch_size": 4, "lr": 0.01}
    small |= {"method": "distill", "teachers": 3, "teacher_steps": 3, "steps": 2}
    return resolve(Settings(**small, model=tiny_base, norms_every=10**6, out="/nowhere/run"))


def test_seen_asks_a_teacher_that_trained_on_the_image(s, subject):
    """Of every member; the plain student asks one that did not."""
    for extra, seen in (((), False), ((leaving_out.Seen,), True)):
        run = assemble(s, *subject, Processes(), extra)
        trained_on = [set(lesson.data.members()) for lesson in run.lessons()]
        lora.remove(subject[0].unet, run.adapter)
        assert {i in trained_on[k] for i, k in run.left_out.items()} == {seen}
        assert set(run.left_out) == set(run.data.members())


def test_a_seen_student_learns_other_answers(s, subject):
    """From the same start and batches, another adapter."""
    found = []
    for train in (leaving_out.train_seen, leaving_out.train_adapter):
        *_, (step, adapter) = ((at, weights_of(a)) for at, a in train(*subject, s))
        found.append(adapter)
    assert step == 2 and not all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_soup_is_the_mean_of_the_teachers(s, subject):
    """Of the same teachers that a student has."""
    torch.manual_seed(s.seed)
    run = assemble(s, *subject, Processes())
    for teacher in run.lessons():
        list(algorithm_1(teacher, range(1, 4)))
    lora.remove(subject[0].unet, run.adapter)
    found = [(at, weights_of(a)) for at, a in leaving_out.train_soup(*subject, s)]
    assert [at for at, _ in found] == [1, 2]
    for parts in zip(found[-1][1], *run.teachers, strict=True):
        torch.testing.assert_close(parts[0], sum(parts[1:]) / 3)


def test_their_rows_are_audited_with_them():
    """And no other row; a soup has the teachers of the student that it is compared with."""
    trainers = {name: defences.trainer(name) for name in defences.ROWS}
    assert {name: train for name, train in trainers.items() if train} == {
        "distill-seen": leaving_out.train_seen,
        "distill-soup": leaving_out.train_soup,
    }
    student, soup = (
        resolve(Settings(**defences.ROWS[name]))
        for name in ("distill-private-flip", "distill-soup")
    )
    assert replace(soup, steps=student.steps, teacher_steps=student.teacher_steps) == student
    steps = student.epochs * 100 // student.batch_size  # of an audit's 100 members
    assert soup.teacher_steps == steps // 4 == 50
