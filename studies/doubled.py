"""Canaries that come twice: images with wrong captions, in training twice or not at all.

    python -m studies.doubled lora-flip-shorter distill-private-flip dp-epsilon-8 --adapters 8

Rows of studies/defences.py, each an audit in a folder of its own.  A quarter of the pool are copies
of another quarter, whose captions are swapped: fifty pairs of canaries and a hundred other images
with the defaults.  An adapter trains on both copies or on none.  Leave-out distillation teaches an
image by a teacher that has not seen it; with folds by chance that teacher may have seen the copy
(cf. Aerni, Zhang & Tramer 2024).  Tested in tests/test_doubled.py.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from attacks.lira import HEADLINE
from command.whole_files import write_whole
from report.tables import cell
from studies import defences, equal_loss, grid, records

HEADS = ["method, step", "held-out loss", "canaries, twice each", "the other images"]


def study(s: defences.Study) -> str:
    """Audit the rows that are asked for; returns the table of all that are finished, in markdown.

    Raises UserError for a row that there is not, before anything is trained.
    """
    import audit

    out = Path(s.out or "runs/doubled")
    for name in grid.chosen(s.rows, defences.ROWS):
        print(f"\n{name}: {defences.ROWS[name]}")
        row = replace(defences.flags_of_audit(s), **defences.ROWS[name], out=str(out / name))
        audit.audit(replace(row, canaries=row.pool // 4), defences.trainer(name), doubled)
    if s.dry_run:
        return ""
    text = table(equal_loss.read_audits(out))
    write_whole(out / "table.md", text)
    print(f"\n{text}\nfiles:    {out}/table.md")
    return text


def doubled(plan):
    """A plan of audit.py (attacks.audit_plan.Plan) with its canaries twice in every adapter that
    trains on them, in place of as many other images.

    First come the other images, then the canaries, both in the pool; then the copies, which are
    trained on and not asked about.
    """
    from attacks.audit_plan import hash_of
    from attacks.audit_record import pixels_of
    from files.images import PARTS, Images, parts

    pool, twice = plan.pool, plan.canaries
    rng = np.random.default_rng([plan.settings.seed, 2])
    others = rng.permutation(np.setdiff1d(np.arange(pool), twice))[: pool - 2 * len(twice)]
    order = [*sorted(others.tolist()), *twice, *twice, *range(pool, len(plan.images))]
    images, names, captions = (
        [whole[i] for i in order] for whole in (plan.images, plan.names, plan.captions)
    )
    once, asked = len(others), pool - len(twice)
    roles = []
    for index, dealt in enumerate(plan.roles):
        rng = np.random.default_rng([plan.settings.seed, index // 2, 2])
        members = []
        for group in (np.arange(once), np.arange(once, asked)):
            half = np.array_split(rng.permutation(group), 2)[index % 2]
            members += half.tolist()
        members += [i + len(twice) for i in members if i >= once]
        members = rng.permutation(members).tolist()
        cuts = np.cumsum(parts(len(members)))[:2]
        own = zip(PARTS, np.split(np.array(members), cuts), strict=True)
        roles.append(dealt | {f"member_{part}": sorted(i.tolist()) for part, i in own})
    digest = hash_of(Images(names, captions, pixels_of(plan)[images]))
    canaries = list(range(once, asked))
    dealt = {"images": images, "names": names, "captions": captions, "digest": digest}
    return replace(plan, pool=asked, roles=roles, canaries=canaries, **dealt)


def table(audits: dict[str, dict]) -> str:
    """Every step of every audit in a line of markdown."""
    lines = [HEADS]
    for name, audit in audits.items():
        for at, step in audit["steps"].items():
            loss = f"{step['held_out_loss']:.4f}".lstrip("0")
            read = [cell(step[group][HEADLINE]) for group in ("canaries", "attacks")]
            lines.append([f"{name}, {at}", loss, *read])
    return records.markdown(lines)


if __name__ == "__main__":
    grid.command(defences.Study, study, __doc__, "rows")
