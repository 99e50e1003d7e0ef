"""How much a reader has to read: the definitions that one call passes through, by file.

    python -m bench.reading       # a step of SMP, the paper's evaluation, the local smoothness

The call is made, and every function of this repository that it enters is noted.  What counts is the
whole function, or the whole class of a method, with its docstring and comments: a lower figure per
method would hide what a reader sees.
"""

import ast
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent


def entered(call: Callable[[], object]) -> set[tuple[str, int]]:
    """(file, first line) of every function of ours that `call` enters."""
    found = set()

    def note(frame, event, argument) -> None:
        code = frame.f_code
        file = code.co_filename
        if event == "call" and file.startswith(f"{ROOT}/") and "/site-packages/" not in file:
            found.add((file, code.co_firstlineno))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def definitions(functions: set[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """{file: {definition: lines}}: the top-level functions and classes that these are in."""
    found: dict[str, dict[str, int]] = {}
    for file in sorted({name for name, _ in functions}):
        lines = {line for name, line in functions if name == file}
        for node in ast.parse(Path(file).read_text()).body:
            inside = {
                min([f.lineno, *(d.lineno for d in f.decorator_list)])
                for f in ast.walk(node)
                if isinstance(f, ast.FunctionDef)
            }
            if inside & lines:
                name = str(Path(file).relative_to(ROOT))
                found.setdefault(name, {})[node.name] = node.end_lineno - node.lineno + 1
    return found


def smp_step() -> Callable[[], object]:
    """The second step of SMP with the embedded model, with gradient norms of L and G."""
    from algorithm import algorithm_1
    from methods.assembly import assemble
    from run.processes import Processes
    from run.resolve import resolve
    from settings import Settings

    s = Settings(method="smp", out="/nowhere", norms_every=1, steps=3, schedule="constant")
    base, data = images()
    rows = algorithm_1(assemble(resolve(s), base, data, Processes()), range(1, 4))
    next(rows)
    return lambda: next(rows)


def images() -> tuple:
    """(the embedded model, twenty random images)."""
    import torch

    from diffusion import Encoded
    from files.bases import load_base
    from settings import EMBEDDED

    base = load_base(EMBEDDED, "cpu", "float32", None)
    latents, text = torch.randn(20, *base.latent_shape), torch.randn(20, 16, 128)
    roles = {"member_aux": [*range(8)], "member_val": [8], "member_test": [9]}
    roles |= {"nonmember_aux": [*range(10, 18)], "nonmember_val": [18], "nonmember_test": [19]}
    return base, Encoded([""] * 20, [""] * 20, None, latents, text, roles)


def paper_evaluation() -> Callable[[], object]:
    """The paper's evaluation of a model: fresh attacker, held-out loss, pictures."""
    import torch

    from attacks import paper, quality

    base, data = images()
    network = quality.load_network("embedded")
    real = {"members": torch.randn(4, 320)}

    def call():
        paper.EPOCHS = 2
        return paper.evaluation(base, data, 0, network, real, pictures=2, steps=2)

    return call


def local_smoothness() -> Callable[[], object]:
    """Hessian norms of L, G and J at one point, the decomposition and the bound."""
    import torch
    from torch import nn

    import smoothness
    from objectives import objective

    w = nn.Parameter(torch.randn(6))

    def terms():
        return objective("smp", (w**4).mean(), -(w**2).mean() - 1, 0.5)

    return lambda: smoothness.measure("smp", terms, [w], 0.5)


def table(title: str, found: dict[str, dict[str, int]]) -> str:
    """A block of text: lines, definitions and files, then the files."""
    total = sum(sum(named.values()) for named in found.values())
    count = sum(map(len, found.values()))
    rows = [f"{title}: {total} lines, {count} definitions in {len(found)} files"]
    for file, named in found.items():
        rows.append(f"  {sum(named.values()):4}  {file}: {', '.join(named)}")
    return "\n".join(rows)


def main() -> None:
    """Print the tables."""
    print(table("one step of SMP", definitions(entered(smp_step()))))
    print(table("the paper's evaluation", definitions(entered(paper_evaluation()))))
    print(table("local smoothness", definitions(entered(local_smoothness()))))


if __name__ == "__main__":
    main()
