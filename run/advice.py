"""What a method was found to leak, in a sentence for the end of a run; docs/defences.md holds the
same sentences with what they are from.
"""

AUDITED = {
    "lora": "plain LoRA reads .90 after 50 steps and 1.00 after 400",
    "smp": "SMP reads .84 after 50 steps and .96 after 400",
    "mp": "MP reads .57 after 400 steps, at a median held-out loss of .192",
    "distill": "leave-out distillation reads .74 after 200 steps, with --flip .72, LoRA there .82",
    "subspace": "the public subspace reads .89 after 100 steps, no less than LoRA at the same loss",
    "dp": "DP-LoRA with noise that promises nothing reads .94 after 100 steps, LoRA there .88",
}


def sentence(method: str) -> str:
    """AUC of an attacker with adapters of his own, LiRA pooled, on the embedded model."""
    return f"{AUDITED[method]} (audit.py, embedded model; docs/defences.md)"
