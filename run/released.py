"""What the authors' code does and their paper does not, as names for --as-released.

    order          the adapter's step first, then the attacker's           train.algorithm_1
    half           G without the 1/2 of Eq. 5, in the outer step           Settings.weight
    lambda         alpha = beta = 1 in L / (beta + alpha CE + delta)       run/resolve.py
    forward        the batch is noised once more for G                     Learner.member_batch
    dropout        the attacker's dropout is on in the outer step          Learner.judge
    text-encoder   a LoRA on the text encoder too, at a tenth of --lr      files/text_encoder.py

docs/paper-and-code.md explains each.  Held by tests/test_released.py to steps written out by hand.
"""

NAMES = ("order", "half", "lambda", "forward", "dropout", "text-encoder")
FLAG = "--as-released"


def chosen(flag: str | None) -> tuple[str, ...]:
    """The names in the flag; all of them for "all"."""
    return NAMES if flag == "all" else tuple(flag.split(",")) if flag else ()


def problems(s) -> dict[str, bool]:
    """What is wrong with the flag in complete settings: {sentence: whether it is so}."""
    names = chosen(s.as_released)
    unknown = ", ".join(sorted({*names} - {*NAMES}))
    on_attacker = ",".join(n for n in names if n != "text-encoder")
    text, whole = "text-encoder" in names, s.as_released == "all"
    return {
        f"{FLAG} has no {unknown}: take some of {', '.join(NAMES)}, or all": bool(unknown),
        f"{FLAG} {on_attacker} is of the attacker, which --method {s.method} has not": bool(
            on_attacker
        )
        and not s.attacked,
        f"{FLAG} lambda makes lambda 1: leave --lam out": "lambda" in names and s.lam != 1,
        f"{FLAG} dropout needs --proxy raw: the pooled attacker has no dropout": "dropout" in names
        and s.proxy != "raw"
        and not whole,
        f"{FLAG} forward draws for the attacker: leave --attacker-members reused out": "forward"
        in names
        and s.attacker_members == "reused",
        f"{FLAG} text-encoder trains a LoRA beside the UNet's: leave --init, --subspace, --target "
        "full and --method dp out": text
        and bool(s.init or s.subspace or s.target == "full" or s.method == "dp"),
    }
