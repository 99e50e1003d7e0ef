"""Which of these pictures was an adapter trained on?  For someone who has the adapter, knows how it
was trained, and does not know its members.

    python evaluate.py --adapter FILE --model BASE --trained-with HOW.json \\
        --data CANDIDATES --nonmembers OTHERS --shadow 16

OTHERS are pictures of the same kind that it was surely not trained on.  Shadow adapters train on
random halves of candidates and others together, and LiRA pooled gives every picture a score.
Nothing tells a candidate that is no member from the others, so among them it has any rank with the
same probability.  With n others

    p = (1 + number of others that score as high) / (n + 1)

is therefore a valid p-value, however the adapter was trained in truth and however many candidates
are members (conformal, Vovk et al. 2005; Bates et al. 2023).  Of the candidates in a list that ends
at rank k a share of at most q is wrong, on average, if it is cut where q is small enough:

    q_(k) = min over j >= k of  m0 p_(j) / j    m0 = 2 (1 + number of p above 1/2), at most m

for m candidates (Benjamini & Hochberg 1995; m0, how many are no members, is Storey's estimate,
2002, which is valid with these p-values).

Tested in tests/test_candidates.py, by simulation and on planted answers.
"""

import csv
import io
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

import lora
from attacks import audit_plan, audit_tasks, lira, shadows, workers
from command import progress
from command.errors import UserError
from command.flags import checked
from command.whole_files import read_json, write_json, write_whole
from diffusion import Base
from files import adapters as files
from files.bases import load_base
from files.images import Images, distinct, load_images, parts
from run import identity
from run.folder import provenance
from run.resolve import resolve
from settings import Settings

WRONG = 0.1  # expected share of wrong ones in the list that is named
LEAST_OTHERS = 20  # below them hardly anything could be named
SHOWN = 20  # candidates on the screen
OUT = "runs/evaluation"


# --------------------------------------------------------------------------------------------------
# From scores to a list


def p_values(score: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(m,) of candidates with `score` (m,), where `others` (n,) are surely no members."""
    as_high = len(others) - np.searchsorted(np.sort(others), score)
    return (1 + as_high) / (len(others) + 1)


def wrong_shares(p: np.ndarray) -> np.ndarray:
    """(m,) the least q at which each candidate is in the list."""
    order = np.argsort(p, kind="stable")
    no_members = min(len(p), 2 * (1 + (p > 0.5).sum()))
    share = no_members * p[order] / np.arange(1, len(p) + 1)
    found = np.empty(len(p))
    found[order] = np.minimum.accumulate(share[::-1])[::-1].clip(max=1)
    return found


# --------------------------------------------------------------------------------------------------
# The search


def search(s, train: audit_tasks.Train) -> dict:
    """Train the shadows, rank the candidates, write candidates.csv and candidates.json; returns the
    record.  `s` are the settings of evaluate.py, `train` is train.train_adapter.  Raises UserError.
    """
    trained = as_trained(s)
    base = load_base(s.model, s.device, trained.dtype, trained.size)
    adapter, _ = files.load(base, Path(s.adapter))
    lora.remove(base.unet, adapter)
    if trained.method != "dp" and trained.target != "full":
        rank, alpha = adapter.rank_and_alpha()
        trained = replace(trained, rank=rank, alpha=alpha, target=adapter.target)
    images = load_images(s.data, base.size, s.caption, s.nonmembers)
    plan = deal(images, replace(trained, size=base.size), s)
    plan = replace(plan, identity=identity.of(plan.settings, base))
    jobs = s.jobs or (os.cpu_count() if s.device == "cpu" else 1)
    audit_tasks.train_all(plan, train, workers.processes(jobs), "shadows")
    own = sum(i < images.private for i in plan.images)
    with progress.stage("asking the adapter"):
        score = scores(plan, base, s.adapter)
    return written(plan, score, own, Path(s.out or OUT))


def as_trained(s) -> Settings:
    """The settings of one shadow, from the file that says how the adapter was trained.

    Raises UserError for a file that does not.
    """
    path = Path(s.trained_with)
    stated = read_json(path)
    if isinstance(stated, dict):
        stated = stated.get("settings", stated)
    if not isinstance(stated, dict):
        raise UserError(f"{path} does not hold flags of train.py, as config.json of a run does")
    found = Settings(**checked(Settings, stated, path))
    places = {"model": s.model, "data": s.data, "nonmembers": s.nonmembers, "caption": s.caption}
    places["out"] = str(Path(s.out or OUT) / "shadows")  # not the run's own, which is finished
    dtype = s.dtype or ("float32" if found.dtype == "auto" else found.dtype)
    seed = found.seed + shadows.SEED
    here = {"device": s.device, "dtype": dtype, "seed": seed, "size": found.size}
    return replace(resolve(replace(found, **places)), **shadows.UNSEEN, **here)


def deal(images: Images, trained: Settings, s) -> audit_plan.Plan:
    """Who of the shadows trains on which pictures: each on half of them, or on as many as the
    adapter was trained on, if that is fewer.  Raises UserError for too few pictures.
    """
    every, first = len(images.names), images.private
    kept = distinct(images, [*range(first, every), *range(first)])  # of two, the other stays
    others = sum(i >= first for i in kept)
    if others < LEAST_OTHERS or others == len(kept):
        raise UserError(
            f"{len(kept) - others} candidates and {others} pictures in {s.nonmembers}: "
            f"at least one and {LEAST_OTHERS} are needed, none a copy of another"
        )
    members = min(trained.members or every, len(kept) // 2)
    batch = trained.batch_size * trained.accumulate
    steps = trained.steps or -(-trained.epochs * members // batch)
    settings = replace(trained, members=members, steps=steps)
    aux, val, test = parts(members)
    sizes = {"member_aux": aux, "member_val": val, "member_test": test}
    rest = len(kept) - members - aux - 2 * val
    sizes |= {"nonmember_aux": aux, "nonmember_val": 2 * val, "nonmember_test": rest}
    if s.shadow < (least := shadows.fewest(len(kept), members)):
        raise UserError(f"--shadow {s.shadow} is too few for these pictures: take {least}")
    orders = shadows.blocks(len(kept), members, s.shadow, settings.seed)
    roles = [shadows.shadow_roles(sizes, order) for order in orders]
    chosen = images.take(kept)
    digest = audit_plan.hash_of(chosen)
    key = identity.digest_of([identity.decided(settings), digest, roles, steps])
    out = str(Path(s.out or OUT) / f"shadows-{key[:8]}")
    pool = kept, len(kept), roles, [], [], chosen.names, chosen.captions, digest
    return audit_plan.Plan(settings, out, *pool, steps=[steps])


def scores(plan: audit_plan.Plan, base: Base, adapter: str) -> np.ndarray:
    """(P,) of LiRA pooled on all statistics, the adapter as the last of N + 1."""
    data = audit_tasks.subject(plan)[1]
    held, _ = files.load(base, Path(adapter))
    try:
        answers = audit_tasks.ask(base, data, plan, held)
    finally:
        lora.remove(base.unet, held)
    return shadows.scores(data, plan, answers)[lira.HEADLINE]


def written(plan: audit_plan.Plan, score: np.ndarray, own: int, folder: Path) -> dict:
    """The list, on disk and on the screen."""
    p = p_values(score[:own], score[own:])
    wrong = wrong_shares(p)
    order = np.lexsort([-score[:own], wrong])
    rows = [(plan.names[i], score[i], p[i], wrong[i], plan.captions[i]) for i in order]
    listed = [plan.names[i] for i in order if wrong[i] <= WRONG]
    found = sentence(len(listed), own)
    record = {"candidates": own, "others": plan.pool - own, "shadows": len(plan)}
    record |= {"shadow_members": plan.settings.members, "wrong_share": WRONG}
    record |= {"listed": listed, "sentence": found, "provenance": provenance()}
    write_whole(folder / "candidates.csv", table(rows).encode())
    write_json(folder / "candidates.json", record)
    print("\nwrong share    score  image")
    for name, z, _, q, _ in rows[:SHOWN]:
        print(f"{q:11.2f} {z:+8.2f}  {name}")
    print(f"\n{found}\nfiles:    {folder}/candidates.csv, candidates.json")
    return record


def sentence(listed: int, candidates: int) -> str:
    """What was found, in words."""
    if not listed:
        return (
            f"None of the {candidates} candidates is named: in any list more than {WRONG:.0%} "
            "may be wrong."
        )
    wrong = max(1, math.ceil(WRONG * listed))
    return (
        f"{listed} of the {candidates} candidates are named as members.  On average at most "
        f"{WRONG:.0%} of such a list are wrong: {wrong} of these {listed}."
    )


def table(rows: list[tuple]) -> str:
    """The ranking as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "score", "p", "wrong_share", "caption"])
    writer.writerows([name, f"{z:.4f}", f"{p:.4f}", f"{q:.4f}", c] for name, z, p, q, c in rows)
    return text.getvalue()
