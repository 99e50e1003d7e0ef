"""The report on made-up images and scores: rates against loops, what a parser and a browser see."""

import base64
import csv
import io
import itertools
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from attacks import quality
from curves import roc
from diffusion import Encoded
from files.images import PARTS, SIDES
from report import figures
from report import page as report

SIZES = {"member": (14, 6, 10), "nonmember": (14, 6, 20)}
NAN = float("nan")
NASTY = {
    0: ("=cmd|' /C calc'!A0.png", "<script>document.title = 'broken'</script>"),
    1: ('"><img src=x onerror=alert(1)>.png', '=HYPERLINK("http://example.com")'),
    2: ("-1+2 \udcff.png", "\t@SUM(1) {{ 7 * 7 }} </style></title><script src=//x.org></script>"),
    3: (f"{'long' * 80}.png", "\u202egnirts & 'quotes' &lt;b&gt;\nnext line, \"quoted\""),
}  # the most exposed members
ORDINARY = {3: ("d.png", "a word")}


def measured(rng, member, leak: float, pictures: np.ndarray | None, seed: int):
    """What is measured of a model: members score `leak` higher by three attacks; the third knows
    no aux.
    """
    scores = {n: rng.normal(size=len(member)) + leak * member for n in ("loss", "SimA", "black")}
    scores["black"][: SIZES["member"][0]] = NAN
    generator = torch.Generator().manual_seed(seed)
    found = None if pictures is None else torch.rand(len(pictures), 6, generator=generator)
    return SimpleNamespace(scores=scores, pictures=pictures, features=found, record={})


def made_up(pictures: int | None = 8, names: dict = ORDINARY, size: int = 16):
    """(examination, adapted, base, record) of 70 images; four members stand out."""
    rng, start, roles = np.random.default_rng(0), 0, {}
    for side, part in itertools.product(SIDES, range(3)):
        roles[f"{side}_{PARTS[part]}"] = list(range(start, start + SIZES[side][part]))
        start += SIZES[side][part]
    titles = {i: (f"{i:02d}.png", f"picture {i}") for i in range(start)} | names
    pixels = rng.integers(0, 256, (start, size, size, 3), np.uint8)
    data = Encoded(*map(list, zip(*titles.values(), strict=True)), pixels, None, None, roles)
    member = np.isin(np.arange(start), data.members())
    made = None if pictures is None else rng.integers(0, 256, (pictures, size, size, 3), np.uint8)
    adapted, base = (measured(rng, member, leak, made, k) for k, leak in enumerate((1.5, 0)))
    adapted.scores["SimA"][:4] = 30 - np.arange(4)
    for model in (adapted, base):
        model.record = leakage(data, model.scores)
    record = {
        "run": "runs/<b>x</b>",
        "step": 4,
        "shadows": 0,
        "promise": None,
        "method": "smp",
        "verdict": "It <i>leaks</i>.",
    }
    record |= {"images": {role: len(index) for role, index in roles.items()}}
    record |= {"adapted": adapted.record, "base": base.record}
    record["blind"] = base.record["attacks"]["loss"]
    held_out = rng.integers(0, 256, (9, size, size, 3), np.uint8)
    real = {"members": torch.rand(30, 6), "held_out": torch.rand(9, 6)} if pictures else {}
    said = [f"held out {i}" for i in range(9)]
    images = SimpleNamespace(data=data, real=real, held_out=held_out, held_out_captions=said)
    return images, adapted, base, record


def leakage(data, scores) -> dict:
    """What eval.json holds of a model, as far as the report reads it."""
    found = {n: roc.summary(*data.pair(s, "test"), 0.0) for n, s in scores.items()}
    headline = {"attack": "SimA"} | found["SimA"]
    areas = {"50": 0.6, "500": 0.7}
    return {"attacks": found, "headline": headline, "null": 0.6, "auc_by_timestep": areas}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, examination, adapted) of a report with hostile names and captions."""
    folder = tmp_path_factory.mktemp("report")
    examination, adapted, base, record = made_up(names=NASTY)
    figures.evaluation(examination, adapted, base, "smp", folder / "figures")
    report.write(examination, adapted, base, record, folder)
    return folder, examination, adapted


class Page(HTMLParser):
    """Tags with their attributes, and the text, as a browser would read them."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def images(self) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def read(folder) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------
# Rates and order


def test_false_alarms_are_counted():
    """Against a loop over non-members, with ties, infinite scores and NaN on both sides."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        score, nonmember = rng.integers(0, 6, 15).astype(float), rng.integers(0, 6, 9).astype(float)
        score[:3], nonmember[0] = (NAN, np.inf, -np.inf), NAN
        known = [other for other in nonmember if other == other]
        loop = [sum(o >= s for o in known) / len(known) if s == s else NAN for s in score]
        np.testing.assert_array_equal(report.false_alarms(score, nonmember), loop)
    assert np.isnan(report.false_alarms(np.zeros(2), np.array([NAN]))).all()


@pytest.mark.parametrize("count", [1, 10, 20, 40, 200])
def test_caught_at_five_percent_is_the_true_positive_rate(count):
    """The share of members at a rate of at most 5 % is roc.tpr_at, rounding and ties included."""
    rng = np.random.default_rng(count)
    for scale in (3, 1000):
        member, nonmember = (rng.integers(0, scale, n).astype(float) for n in (50, count))
        caught = (report.false_alarms(member, nonmember) <= report.FPR).mean()
        assert caught == roc.tpr_at(member, nonmember, report.FPR)


@pytest.mark.parametrize("count", [1, 19, 20, 50, 200])
def test_chance_is_a_member_at_every_place(count):
    """If nothing leaks, a member is equally likely at each place among the non-members."""
    places = report.false_alarms(np.arange(count + 1) - 0.5, np.arange(count))
    assert report.chance(count) == pytest.approx((places <= report.FPR).mean())


def test_rates_in_words():
    """A bound where nobody scores as high, then one in so many, then per cent."""
    words = {0: "< 1 in 200", 1: "1 in 200", 3: "1 in 67", 17: "1 in 12", 40: "1 in 5"}
    words |= {41: "20 %", 70: "35 %", 200: "100 %"}
    assert {k: report.in_words(k / 200, 200) for k in words} == words


def test_the_most_exposed_come_first():
    """Rates rise; of equal rates the higher score is first; equals keep order; NaN is last."""
    score = np.array([1.0, NAN, 9.0, 5.0, 9.5, 1.0, -2.0, NAN])
    order = report.ranked(score, list(range(8)))
    assert order == [4, 2, 3, 0, 5, 6, 1, 7]
    rates = report.false_alarms(score[order], np.array([0.0, 2.0, 4.0]))[:6]
    assert rates.tolist() == sorted(rates)


# --------------------------------------------------------------------------------------------------
# exposure.csv


def test_exposure_table(written):
    """Read back: every image with a role once, members first, most exposed first, rates, blanks."""
    folder, examination, adapted = written
    data = examination.data
    with open(folder / "exposure.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", "caption", "side", "part", "SimA", "loss", "black"]
    sides = [row[2] for row in rows]
    assert sides == ["member"] * 30 + ["nonmember"] * 40
    assert {row[0] for row in rows[4:]} == set(data.names[4:])
    rates = [float(row[4]) for row in rows]
    assert rates[:30] == sorted(rates[:30]) and rates[30:] == sorted(rates[30:])
    for row in rows[4:]:
        i = data.names.index(row[0])
        assert row[1] == data.captions[i] and i in data.roles[f"{row[2]}_{row[3]}"]
        for name, cell in zip(header[4:], row[4:], strict=True):
            score, others = adapted.scores[name][i], data.pair(adapted.scores[name], "test")[1]
            expected = "" if np.isnan(score) else f"{(others >= score).mean():.6g}"
            assert cell == expected


def test_exposure_table_holds_no_formula(written):
    """What begins one, also behind blanks, has an apostrophe; nothing else about a text changes."""
    with open(written[0] / "exposure.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    for row, (name, caption) in zip(rows, NASTY.values(), strict=False):
        assert not any(cell.lstrip().startswith(("=", "+", "-", "@")) for cell in row[:2])
        assert row[0].removeprefix("'") == name.replace("\udcff", "\\udcff")
        assert row[1].removeprefix("'") == caption
    assert report.guarded("a = b") == "a = b" and report.guarded(" +1") == "' +1"


# --------------------------------------------------------------------------------------------------
# report.html


def test_names_and_captions_are_text(written):
    """No script, handler or element comes from a name or caption, which stand there as they are."""
    page = read(written[0])
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"script", "link", "iframe", "object", "embed", "base", "form", "i", "a"}
    assert not [name for _, given in page.tags for name in given if name.startswith("on")]
    text = "".join(page.texts)
    for name, caption in NASTY.values():
        assert report.brief(name.replace("\udcff", "\\udcff")) in text and caption in text
    assert "It <i>leaks</i>." in text and "runs/<b>x</b>" in text


def test_the_page_is_alone(written):
    """Nothing is loaded: addresses are data, styles name none; charset, language, title, alts."""
    page, html = read(written[0]), (written[0] / "report.html").read_text(encoding="utf-8")
    for _, given in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster", "background"):
            assert given.get(name, "#").startswith(("data:image/png;base64,", "#"))
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert ("html", {"lang": "en"}) in page.tags and ("meta", {"charset": "utf-8"}) in page.tags
    assert page.tags.count(("title", {})) == 1 and all(image["alt"] for image in page.images)


def test_every_image_decodes(written):
    """24 members, three figures, 8 samples and 8 nearest pictures in threes."""
    images = read(written[0]).images
    assert len(images) == 24 + 3 + 8 * 3 + 8 * 3
    for image in images:
        with Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))) as png:
            png.load()
            if image.get("width"):  # a thumbnail and no figure
                assert png.size == (16, 16)
    assert images[0]["src"] == report.thumbnail(written[1].data.pixels[0])


def test_what_the_list_is_held_against(written):
    """Members caught at 5 % false alarms and the number that chance gives, over all and over test
    images; the rest is said to be in the table.
    """
    folder, examination, adapted = written
    data, score = examination.data, adapted.scores["SimA"]
    others = np.sort(data.pair(score, "test")[1])
    caught = score > others[-2]  # one of 20 may be above
    text = " ".join("".join(read(folder).texts).split())
    test = int(caught[data.roles["member_test"]].sum())
    chance = 2 / 21
    assert f"{test} of 10 test members are caught at a false-alarm rate of 5 %." in text
    assert f"Without a leak it would be {10 * chance:.1f} on average." in text
    assert f"coloured: {caught[data.members()].sum()} of all 30 members." in text
    assert f"Without a leak it would be {30 * chance:.1f} on average." in text
    assert "6 more members are in exposure.csv" in text


def test_members_without_a_score_are_counted(tmp_path):
    """An attack that scores no auxiliary image leaves those members out, and the page says so."""
    examination, adapted, base, record = made_up()
    record["adapted"]["headline"]["attack"] = "black"
    report.write(examination, adapted, base, record, tmp_path)
    page = read(tmp_path)
    shown = [i["alt"] for i in page.images if i["alt"].startswith("private image")]
    assert len(shown) - 8 == 16  # 8 are samples
    assert "14 members have no score by black" in "".join(page.texts)


def test_parts_without_pictures_are_absent(tmp_path):
    """No generated pictures, no figures: no headings of them, and nothing broken."""
    examination, adapted, base, record = made_up(pictures=None)
    record["step"] = None
    report.write(examination, adapted, base, record, tmp_path)
    page = read(tmp_path)
    assert len(page.images) == 24
    text = "".join(page.texts)
    for words in ("What it draws", "nearest", "Where it leaks", "None", "Step"):
        assert words not in text
    figures.evaluation(examination, adapted, base, "smp", tmp_path / "figures")
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"roc.png", "scores.png", "timesteps.png"}


def test_the_page_stays_small(tmp_path):
    """Noise of 256 px, which no PNG makes smaller: thumbnails keep the page below 5 MB."""
    report.write(*made_up(pictures=30, size=256), tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5e6
    image = read(tmp_path).images[0]
    with Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))) as png:
        assert png.size == (96, 96)


# --------------------------------------------------------------------------------------------------
# What two figures choose


def test_closest_pictures_against_a_loop():
    """By features: the smallest cosine distances to a member, and the nearest of both sets."""
    generator = torch.Generator().manual_seed(0)
    real = {n: torch.randn(k, 5, generator=generator) for n, k in (("members", 7), ("held_out", 9))}
    made = torch.randn(12, 5, generator=generator)
    made[4] = 3 * real["members"][2]
    order, near = figures.closest(real, made, 5)

    def distances(name, i):
        a = made[i].double().numpy()
        pairs = ((a, b.double().numpy()) for b in real[name])
        return [1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]

    expected = sorted(range(12), key=lambda i: min(distances("members", i)))[:5]
    assert order.tolist() == expected and order[0] == 4
    for name, (far, at) in near.items():
        every = [distances(name, i) for i in order]
        assert at.tolist() == [int(np.argmin(row)) for row in every]
        np.testing.assert_allclose(far, np.min(every, axis=1), atol=1e-6)
    nearer = [min(distances("members", i)) < min(distances("held_out", i)) for i in range(12)]
    assert report.nearer(real, made) == sum(nearer)


@pytest.mark.parametrize(("members", "count"), [(5, 12), (12, 5), (30, 30), (1, 4)])
def test_samples_lie_beside_their_captions(members, count):
    """Position i was drawn from the caption of np.resize(members, count)[i]; no member twice."""
    names = list(range(100, 100 + members))
    chosen, images = figures.spread(names, count, 8)
    assert [np.resize(names, count)[i] for i in chosen] == images.tolist()
    assert len(set(images)) == len(images) == min(8, members, count)


def test_nearest_pictures_stand_beside_each_other():
    """Generated, the member and the held-out picture nearest to it by features, each with its own
    caption and distance; the closest first.
    """
    examination, adapted, base, _ = made_up()
    row = report.nearest(examination, adapted, base)["rows"][0]
    data = examination.data
    far, index = quality.nearest(examination.real["members"], adapted.features)
    best = far.argmin()
    far_held, index_held = quality.nearest(examination.real["held_out"], adapted.features)
    member, held_out = data.members()[index[best]], index_held[best]
    assert row == {
        "generated": report.thumbnail(adapted.pictures[best]),
        "member": report.pictured(data, member) | {"distance": f"{far[best]:.3f}"},
        "held_out": {
            "image": report.thumbnail(examination.held_out[held_out]),
            "distance": f"{far_held[best]:.3f}",
            "caption": examination.held_out_captions[held_out],
        },
    }


# --------------------------------------------------------------------------------------------------
# In a browser

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
COUNT = """<script>
const images = [...document.images], broken = images.filter(i => i.naturalWidth === 0).length
document.title = [images.length, broken, document.scripts.length].join(" ")
</script>"""


@pytest.mark.skipif(not BROWSER, reason="no chromium or google-chrome")
def test_in_a_browser(written, tmp_path):
    """Every image is drawn and the only script is the test's, which the page itself refuses."""
    html = (written[0] / "report.html").read_text(encoding="utf-8") + COUNT
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', html).group()
    found = []
    for text in (html, html.replace(policy, "")):
        page = tmp_path / "page.html"
        page.write_text(text, encoding="utf-8")
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom "
        flags += "--disable-background-networking --disable-component-update --disable-sync"
        command = [BROWSER, *flags.split(), f"--user-data-dir={tmp_path}/profile", page.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        found.append(re.search(r"<title>(.*?)</title>", dom).group(1))
    assert found == ["What runs/&lt;b&gt;x&lt;/b&gt; leaks", f"{24 + 3 + 8 * 3 + 8 * 3} 0 1"]


def test_with_few_non_members_no_picture_is_marked(tmp_path, monkeypatch):
    """With nineteen the page says so and counts nobody as caught; with twenty it counts."""
    monkeypatch.setitem(SIZES, "nonmember", (14, 6, 19))
    few = made_up(pictures=None)
    monkeypatch.setitem(SIZES, "nonmember", (14, 6, 20))
    enough = made_up(pictures=None)
    pages = [report.page(*found, tmp_path) for found in (few, enough)]
    marked = [page.count('<li class="caught"') for page in pages]
    assert marked[0] == 0 < marked[1]
    told = ["too few to say which members are caught" in page for page in pages]
    assert told == [True, False] and "are caught at 5 % false alarms" not in pages[0]


def test_a_promise_is_on_the_page(tmp_path):
    """And more shadows than eight are advised where there are many images for a member; none for an
    adapter that nobody knows how to train again.
    """
    examination, adapted, base, record = made_up(pictures=None)
    plain = report.page(examination, adapted, base, record, tmp_path)
    assert "Guaranteed" not in plain and "use evaluate.py --shadow 8" in plain
    images = record["images"] | {"nonmember_test": 400}
    other = record | {"promise": "epsilon 8", "images": images}
    page = report.page(examination, adapted, base, other, tmp_path)
    assert "Guaranteed: epsilon 8." in page and "use evaluate.py --shadow 30" in page
    foreign = report.page(examination, adapted, base, record | {"method": "adapter"}, tmp_path)
    assert "--shadow" not in foreign
