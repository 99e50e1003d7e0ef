"""Near-copies under a method: what does a picture leak whose edited copy may be a member too?

    python -m studies.copies --method distill --adapters 6 --save-every 200

An audit (audit.py) of a set in which every image has an edited copy, cropped and scaled up again,
under the same caption.  Of some images of the pool the copy is in the pool as well, each a member
or not by itself.  copies.md in --out tells these apart from those that are alone, and says whether
a copy in training makes an image look like a member that never was one.  Tested in
tests/test_copies.py.
"""

import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import progress
from audit import Audit
from cli import one_line_errors, option, parse


@dataclass
class Study(Audit):
    """Flags of audit.py."""

    images: int = option(350, "images of --data that are taken, each with a copy", group="audit")


if __name__ == "__main__":
    SETTINGS = parse(Study, __doc__)
    progress.speak()

import numpy as np
from PIL import Image

import audit
import roc
from base_files import load_base
from cli import UserError, write_whole
from data import load_images, near_duplicates
from evaluation.decisions import Decisions
from evaluation.lira import HEADLINE
from evaluation.tables import cell

CROP = 1 / 8  # of each side, which the copy lacks on the right and below
COPY = "-copy"  # behind the name of its original


def study(s: Study) -> str:
    """Audit the set with copies; returns the table, in markdown."""
    out = Path(s.out or f"runs/copies-{s.method}")
    each = {f.name: getattr(s, f.name) for f in fields(Audit)}
    each |= {"data": str(with_copies(s, out / "images")), "out": str(out / "audit")}
    audit.audit(Audit(**each))
    with np.load(out / "audit" / "scores.npz") as scores:
        kept = {name: scores[name] for name in scores.files}
    text = table(kept)
    write_whole(out / "copies.md", text)
    print(f"\n{text}\nfiles:    {out}/copies.md, audit/")
    return text


def with_copies(s: Study, folder: Path) -> Path:
    """The folder of `s.images` images of --data, at the size of the model, and their copies; made
    if it is not there.

    Images whose copy would count as a repetition and be left out of training are not taken.
    Raises UserError if there are too few others.
    """
    if folder.is_dir():
        return folder
    images = load_images(s.data, load_base(s.model, "cpu", "float32", s.size).size, s.caption)
    edited = np.stack([copy_of(pixels) for pixels in images.pixels])
    first, count = near_duplicates(np.concatenate([images.pixels, edited])), len(edited)
    apart = [i for i in range(count) if first[i] == i and first[count + i] == count + i]
    if len(apart) < s.images:
        raise UserError(f"--images {s.images} is more than the {len(apart)} that can be copied")
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # what a kill has left
    aside.mkdir(parents=True)
    for i in np.random.default_rng(s.seed).permutation(apart)[: s.images]:
        for pixels, mark in ((images.pixels[i], ""), (edited[i], COPY)):
            file = aside / f"{i:06d}{mark}.png"
            Image.fromarray(pixels).save(file)
            file.with_suffix(".txt").write_text(images.captions[i] + "\n", encoding="utf-8")
    os.replace(aside, folder)
    return folder


def copy_of(pixels: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) without CROP of each side, scaled to its size again."""
    image = Image.fromarray(pixels)
    part = image.crop((0, 0, *(round(side * (1 - CROP)) for side in image.size)))
    return np.asarray(part.resize(image.size, Image.Resampling.BICUBIC))


def twins(names: list[str]) -> np.ndarray:
    """(P,) position of each image's original or copy in the pool, -1 where it is not there."""
    stems = [Path(name).stem for name in names]
    at = {stem: i for i, stem in enumerate(stems)}
    other = (s.removesuffix(COPY) if s.endswith(COPY) else s + COPY for s in stems)
    return np.array([at.get(stem, -1) for stem in other])


def table(scores: dict[str, np.ndarray]) -> str:
    """What the strongest attacker reads of each kind of image, in markdown."""
    member, twin = scores["member"], twins(scores["names"].tolist())
    lines = [["step", "images", "how many", f"{HEADLINE}: AUC"], ["---"] * 4]
    for key in (name for name in scores if name.endswith(f"/{HEADLINE}")):
        step, score = key.split("/")[0], scores[key]
        for says, group in (("alone", twin < 0), ("with a copy in the pool", twin >= 0)):
            found = cell(Decisions(member[:, group]).figures(score[:, group]))
            lines.append([step, says, str(group.sum()), found])
        both = twin >= 0
        never, beside = ~member[:, both], member[:, twin[both]]
        x = score[:, both]
        pair = x[never & beside], x[never & ~beside]
        low, high = roc.auc_interval(*pair)
        lines.append(
            [
                step,
                "no member: is its copy one?",
                str(both.sum()),
                cell({"auc": roc.auc(*pair), "auc_interval": [low, high]}),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    with one_line_errors():
        study(SETTINGS)
