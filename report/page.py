"""One evaluation for people: report.html, a page that needs nothing else, and exposure.csv.

    report.write(examination, adapted, base, record, target.folder)  # eval.json and figures exist

The page shows private pictures and captions; it holds no script and loads nothing.  Names and
captions are untrusted: the template report.html.jinja escapes them.  Tested in
tests/test_report.py, also in a browser.
"""

import base64
import csv
import io
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from attacks import shadows
from command.whole_files import write_whole
from diffusion import Encoded
from files.images import PARTS, SIDES
from report import figures

SHOWN = 24  # members on the page; exposure.csv holds all
SAMPLES = 12  # generated pictures beside the private image
CLOSEST = 12  # generated pictures closest to a member
THUMBNAIL = 96  # pixels of the longer side
CAPTION = 140  # letters of a caption on the page
FIGURES = ("roc", "scores", "timesteps")  # on the page
FEW = 20  # test non-members: with fewer no rate of 5 % can be told
FPR = 0.05  # false alarms at which members are counted as caught; the page says 5 %
FORMULA = tuple("=+-@＝＋－＠")  # what a spreadsheet takes for the beginning of a formula


def write(examination, adapted, base, record: dict, folder: Path) -> None:
    """report.html and exposure.csv of one evaluated adapter, each written whole into `folder`.

    `examination` has the images, `adapted` and `base` what was measured of the adapter and of the
    base model, `record` is what eval.json holds, with its sentence `verdict`.  The figures lie in
    folder/figures.
    """
    table = exposure(examination.data, adapted.scores, record["adapted"]["headline"]["attack"])
    texts = {
        "exposure.csv": table,
        "report.html": page(examination, adapted, base, record, folder),
    }
    for name, text in texts.items():  # bytes of a file name that are not UTF-8 are spelled out
        write_whole(folder / name, text)


# --------------------------------------------------------------------------------------------------
# How exposed an image is


def false_alarms(score: np.ndarray, nonmember: np.ndarray) -> np.ndarray:
    """(N,) in [0, 1]: the false-alarm rate at which an attack would catch each image.

    It is the share of the non-members' scores (M,) that are at least as high as the image's score
    (N,): low is exposed, 0 is above them all.  NaN where the score is NaN; a non-member's NaN does
    not count, and if all are NaN, so is every rate.
    """
    score, known = np.asarray(score, float), np.asarray(nonmember, float)
    known = np.sort(known[~np.isnan(known)])
    if not len(known):
        return np.full(len(score), np.nan)
    rates = (len(known) - np.searchsorted(known, score, side="left")) / len(known)
    return np.where(np.isnan(score), np.nan, rates)


def chance(nonmembers: int, fpr: float = FPR) -> float:
    """The share of members, in [0, 1], whose false-alarm rate is at most `fpr` if nothing leaks.

    A member's place among N non-members is then equally likely to be any of N + 1, of which
    floor(fpr N) + 1 are caught: a little more than `fpr`, since N is finite; less if scores tie.
    """
    return (int(np.floor(fpr * nonmembers + 1e-9)) + 1) / (nonmembers + 1)


def ranked(score: np.ndarray, index: list[int]) -> list[int]:
    """`index` sorted by falling score (N,), the most exposed first; equal scores stay in their
    order, NaN comes last.
    """
    return sorted(index, key=lambda i: (np.isnan(score[i]), -score[i]))


def parts(data: Encoded, side: str) -> dict[int, str]:
    """{image: "aux", "val" or "test"} of the images of one side."""
    return {i: part for part in PARTS for i in data.roles[f"{side}_{part}"]}


def in_words(rate: float, nonmembers: int) -> str:
    """A false-alarm rate as people say it: "< 1 in 200", "1 in 12", "35 %"."""
    if rate == 0:
        return f"< 1 in {nonmembers}"
    return f"1 in {1 / rate:.0f}" if rate <= 0.2 else f"{rate:.0%}".replace("%", " %")


def exposure(data: Encoded, scores: dict[str, np.ndarray], headline: str) -> str:
    """exposure.csv: one row per image with a role, members first, the most exposed first.

    The columns are name, caption, side, part, and per attack the false-alarm rate of
    `false_alarms`, the headline's first, blank where it has none.  A test non-member counts
    itself.  A name or caption that a spreadsheet would take for a formula, beginning with =, +, -
    or @, gets a leading apostrophe.
    """
    scores = {headline: scores[headline]} | scores
    rates = {n: false_alarms(s, data.pair(s, "test")[1]) for n, s in scores.items()}
    out = io.StringIO(newline="")
    table = csv.writer(out)
    table.writerow(["name", "caption", "side", "part", *rates])
    for side in SIDES:
        part = parts(data, side)
        for i in ranked(scores[headline], sorted(part)):
            cells = ["" if np.isnan(rate[i]) else f"{rate[i]:.6g}" for rate in rates.values()]
            texts = map(guarded, (data.names[i], data.captions[i]))
            table.writerow([*texts, side, part[i], *cells])
    return out.getvalue()


def guarded(text: str) -> str:
    """`text` with an apostrophe before what a spreadsheet would take for a formula."""
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text


# --------------------------------------------------------------------------------------------------
# The page


def page(examination, adapted, base, record: dict, folder: Path) -> str:
    """report.html; arguments as for `write`."""
    data, areas = examination.data, record["adapted"]["auc_by_timestep"]
    loader = FileSystemLoader(Path(__file__).parent)
    rules = {"autoescape": True, "undefined": StrictUndefined}  # names and captions are untrusted
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, **rules)
    environment.filters["brief"] = brief
    drawn = [folder / "figures" / f"{name}.png" for name in FIGURES]
    return environment.get_template("report.html.jinja").render(
        record=record,
        shadows=shadows.advised(record),
        exposed=exposed(data, adapted.scores, record),
        attacks=attacks(record),
        figures={path.stem: data_uri(path.read_bytes()) for path in drawn if path.is_file()},
        leakiest=max(areas, key=areas.get),
        samples=samples(data, adapted, base),
        nearest=nearest(examination, adapted, base),
        side=THUMBNAIL,
        pixelated=data.pixels.shape[1] < THUMBNAIL,
    )


def brief(text: str) -> str:
    """At most CAPTION letters of a text."""
    return text if len(text) <= CAPTION else text[: CAPTION - 1] + "…"


def exposed(data: Encoded, scores: dict[str, np.ndarray], record: dict) -> dict:
    """The most exposed members by the headline attack, and what to hold the list against."""
    score = scores[record["adapted"]["headline"]["attack"]]
    nonmember = data.pair(score, "test")[1]
    count, rates = int((~np.isnan(nonmember)).sum()), false_alarms(score, nonmember)
    part = parts(data, "member")
    order = [i for i in ranked(score, sorted(part)) if not np.isnan(rates[i])]
    sets = {"test": [i for i in order if part[i] == "test"], "all": order}
    members = []
    for i in order[:SHOWN]:
        rate = {"rate": in_words(rates[i], count), "caught": rates[i] <= FPR}
        members.append(pictured(data, i) | {"part": part[i]} | rate)
    if count < FEW:
        members = [member | {"caught": False} for member in members]
    return {
        "few": count < FEW,
        "members": members,
        "caught": {name: (rates[index] <= FPR).sum() for name, index in sets.items()},
        "of": {name: len(index) for name, index in sets.items()},
        "chance": {name: len(index) * chance(count) for name, index in sets.items()},
        "unscored": len(part) - len(order),
        "nonmembers": count,
    }


def pictured(data: Encoded, i: int) -> dict:
    """An image on the page: its name, caption and thumbnail."""
    image = thumbnail(data.pixels[i])
    return {"name": data.names[i], "caption": data.captions[i], "image": image}


def thumbnail(pixels: np.ndarray) -> str:
    """A picture uint8 (H, W, 3), at most THUMBNAIL pixels wide and high, as a data URI."""
    image, content = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    image.save(content, "PNG", optimize=True)
    return data_uri(content.getvalue())


def data_uri(png: bytes) -> str:
    """A PNG as the address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def attacks(record: dict) -> list[dict]:
    """Rows of the table: every attack, the highest AUC first."""
    adapted, base = record["adapted"], record["base"]["attacks"]
    head, rows = adapted["headline"]["attack"], []
    for name, found in sorted(adapted["attacks"].items(), key=lambda item: -item[1]["auc"]):
        rows.append(found | {"name": name, "headline": name == head, "base": base.get(name)})
    return rows


def samples(data: Encoded, adapted, base) -> list[dict]:
    """Generated pictures beside the private image whose caption they were drawn from."""
    if adapted.pictures is None:
        return []
    chosen, members = figures.spread(data.members(), len(adapted.pictures), SAMPLES)
    rows = []
    for k, i in zip(chosen, members, strict=True):
        row = pictured(data, i) | {"adapted": thumbnail(adapted.pictures[k])}
        if base.pictures is not None:
            row["base"] = thumbnail(base.pictures[k])
        rows.append(row)
    return rows


def nearest(examination, adapted, base) -> dict | None:
    """The generated pictures closest to a member, with the nearest pictures of both kinds, and how
    often a member is the nearer one.
    """
    if adapted.features is None:
        return None
    data, real, rows = examination.data, examination.real, []
    order, near = figures.closest(real, adapted.features, CLOSEST)
    members = data.members()
    for k, d, i, e, j in zip(order, *near["members"], *near["held_out"], strict=True):
        held_out = {"image": thumbnail(examination.held_out[j]), "distance": f"{e:.3f}"}
        row = {"generated": thumbnail(adapted.pictures[k])}
        row["member"] = pictured(data, members[i]) | {"distance": f"{d:.3f}"}
        row["held_out"] = held_out | {"caption": examination.held_out_captions[j]}
        rows.append(row)
    return {
        "rows": rows,
        "sizes": {name: len(features) for name, features in real.items()},
        "pictures": len(adapted.pictures),
        "nearer": nearer(real, adapted.features),
        "base": None if base.features is None else nearer(real, base.features),
    }


def nearer(real: dict, made) -> int:
    """How many of the made pictures' features (P, F) are closer to a member than to any held-out
    picture.
    """
    _, near = figures.closest(real, made, len(made))
    return int((near["members"][0] < near["held_out"][0]).sum())
