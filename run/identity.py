"""What a run is: base model, files and settings by their content, wherever they lie.  Its images
and their captions have hashes of their own, see files/images.py.

    now = of(settings, base)                 # {"model": SHA-256, ...}, written when a run begins
    require(known, now, settings, "runs/smp was started with")    # known: what was written then

Compared by train.py --resume, by evaluate.py, and by audit.py, of whose answers it is a part of the
key.  Tested in tests/test_identity.py.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

from command.errors import UserError, shown
from files import contents
from settings import FREE, LOOKS, PLACES, Settings

FOLDS = "by thumbnails"  # how methods/distill.py cuts the members
FILES = ("init", "directions")  # settings that name files


def of(s: Settings, base) -> dict[str, str | None]:
    """The hashes of the base model, of the files that settings name, and of the other settings."""
    from files import bases

    return {
        "model": bases.content(base),
        **{name: _content(name, getattr(s, name)) for name in FILES},
        "public": "none" if s.method == "distill" else None,  # once a flag: older audits go on
        "settings": digest_of(decided(s)),
    }


def _content(name: str, value: str | None) -> str | None:
    if value is None:
        return None
    return contents.of_adapter(value) if name == "init" else contents.of(value)


def decided(s: Settings) -> dict:
    """The settings that decide what an adapter becomes, without PLACES: what lies there counts, not
    where.

    A run from before --crop goes on, but for a distillation, whose folds were others.
    """
    found = {k: v for k, v in asdict(s).items() if k not in {*FREE, *LOOKS, *PLACES}}
    if not s.crop:
        del found["crop"]
    return found | ({"folds": FOLDS} if s.method == "distill" else {})


def digest_of(facts: object) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def require(known: Mapping, now: Mapping, s: Settings, what: str) -> None:
    """Raises UserError for the first thing that is not what `what` says, such as "RUN was started
    with".  What was not known then is not compared.
    """
    for name, digest in now.items():
        if known.get(name, digest) == digest:
            continue
        if name == "settings":
            older = (
                ", or an older version of this code cut the folds" if s.method == "distill" else ""
            )
            raise UserError(f"the settings are not those that {what}{older}: put config.json back")
        place = shown(getattr(s, name))
        raise UserError(f"what lies at --{name} {place} is not what {what}: put it back")
