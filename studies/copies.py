"""Near-copies under a method: what does a picture leak whose edited copy may be a member too?

    python -m studies.copies --method distill --adapters 6 --save-every 200

An audit (audit.py) of a set in which every image has an edited copy, cropped and scaled up again,
under the same caption.  Of some images of the pool the copy is in the pool as well, each a member
or not by itself.  copies.md in --out tells these apart from those that are alone, and says whether
a copy in training makes an image look like a member that never was one.  Tested in
tests/test_copies.py.
"""

import hashlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from PIL import Image

from attacks import roc
from attacks.decisions import Decisions
from attacks.lira import HEADLINE
from audit import Audit
from command import progress
from command.errors import UserError, one_line_errors
from command.flags import option, parse
from command.whole_files import write_whole
from report.tables import cell
from studies.records import markdown

CROP = 1 / 8  # of each side, which the copy lacks on the right and below
COPY = "-copy"  # behind the name of its original


@dataclass
class Study(Audit):
    """Flags of audit.py."""

    images: int = option(350, "images of --data that are taken, each with a copy", group="audit")


def study(s: Study) -> str:
    """Audit the set with copies; returns the table, in markdown."""
    import audit

    out = Path(s.out or f"runs/copies-{s.method}")
    own = Audit(**{f.name: getattr(s, f.name) for f in fields(Audit)})
    audit.audit(replace(own, data=str(with_copies(s, out)), out=str(out / "audit")))
    if s.dry_run:
        return ""
    with np.load(out / "audit" / "scores.npz") as scores:
        text = table(dict(scores))
    write_whole(out / "copies.md", text)
    print(f"\n{text}\nfiles:    {out}/copies.md, audit/")
    return text


def with_copies(s: Study, folder: Path) -> Path:
    """The folder of `s.images` images of --data, at the size of the model, and their copies; made
    in `folder` if it is not there.

    Images whose copy would count as a repetition and be left out of training are not taken.
    Raises UserError if there are too few others.
    """
    from files.images import near_duplicates
    from studies import image_sets

    facts = [s.data, s.model, s.size, s.caption, s.images, s.seed]
    folder = folder / f"images-{hashlib.sha256(str(facts).encode()).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    images = image_sets.read(s, s.caption)
    copies = np.stack([copy_of(pixels) for pixels in images.pixels])
    first, count = near_duplicates(np.concatenate([images.pixels, copies])), len(copies)
    apart = [i for i in range(count) if first[i] == i and first[count + i] == count + i]
    if not 0 < s.images <= len(apart):
        raise UserError(f"--images must be 1 to {len(apart)}, which can be copied, not {s.images}")
    files = []
    for i in np.random.default_rng(s.seed).permutation(apart)[: s.images]:
        files.append((f"{i:06d}", images.pixels[i], images.captions[i]))
        files.append((f"{i:06d}{COPY}", copies[i], images.captions[i]))
    image_sets.write(folder, files)
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
    """What the strongest attacker reads of each kind of image, in markdown.

    `scores` are the arrays of an audit's scores.npz: names (P,), member and scores (adapters, P).
    """
    member, twin = scores["member"], twins(scores["names"].tolist())
    lines = [["step", "images", "how many", f"{HEADLINE}: AUC"]]
    both = twin >= 0
    for key in (name for name in scores if name.endswith(f"/{HEADLINE}")):
        step, score = key.split("/")[0], scores[key]
        for says, group in (("alone", ~both), ("with a copy in the pool", both)):
            found = Decisions(member[:, group]).figures(score[:, group])
            lines.append([step, says, str(group.sum()), cell(found)])
        never, beside, x = ~member[:, both], member[:, twin[both]], score[:, both]
        pair = x[never & beside], x[never & ~beside]
        found = {"auc": roc.auc(*pair), "auc_interval": roc.auc_interval(*pair)}
        lines.append([step, "no member: is its copy one?", str(both.sum()), cell(found)])
    return markdown(lines)


def main() -> None:
    """The command."""
    settings = parse(Study, __doc__)
    with one_line_errors():
        progress.start()
        study(settings)


if __name__ == "__main__":
    main()
