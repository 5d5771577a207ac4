"""Every operator of torch's own database of operators and sample inputs, with channels along each
dimension of each argument: what the tracer says is never less than the truth, which is found by
changing one channel after the other, and by leaving channels out.

`operators.txt` lists what becomes of each operator's channels: `follows` (the tracer keeps them
apart wherever they stay apart), `pins` (not everywhere: it says more than the truth, and why),
`mixes` (nowhere do they stay apart), `none` (no sample has channels) or `skipped`. To write anew:

    POLARFAST_OPERATORS=write pytest tests/tracing/test_operator_database.py -k list
"""

import os
from collections import defaultdict
from pathlib import Path

import pytest
from support.operator_cases import ask, cases, cut, less, stays_apart
from torch import Tensor

LIST = Path(__file__).parent / "operators.txt"
SHARDS = 8
#: Some of the samples in the quick form; more in the slow one.
FEW, MANY = 2, 12

SKIPPED = {
    **dict.fromkeys(("empty_like", "new_empty", "new_empty_strided"), "its values are not set"),
    "to_sparse": "its results are sparse",
    "bmm_triton_optimized": "compiles kernels",
}
#: Draw random numbers, in the order of the elements.
RANDOM = ("rand", "bernoulli", "dropout", "rrelu", "normal", "uniform", "cauchy", "exponential")
#: Read past arguments that are too short, so they are never given fewer channels where these are
#: pinned.
UNCHECKED = ("native_batch_norm", "_batch_norm_with_update", "_scaled_dot_product_flash_attention")
#: torch compares sizes although it reads nothing.
SIZES_ONLY = {"diff": lambda case: case.leaves[1] == 0}


def operators():
    module = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    return module.op_db


def named(op):
    """(name, whether in place) of an operator's forms."""
    yield op.formatted_name, False
    if op.inplace_variant is not None and not op.formatted_name.endswith("_"):
        yield f"{op.formatted_name}_", True


def works(case):
    """Whether the operator takes these arguments, and returns anything."""
    try:
        _, results = case.run()
    except Exception:  # whatever a sample is refused with
        return False
    own = len(results) - sum(isinstance(leaf, Tensor) for leaf in case.leaves)
    return any(result.numel() for result in results[:own])


def wrong(name, case, said, most):
    """Where the tracer says less than the truth."""
    if said.reads or not said.classes:
        return None
    values = not any(word in name for word in RANDOM)
    return less(case, said) or cut(case, said, most, values)


def check(op, count, most):
    """Lines of what is wrong; and the operator's status, by name."""
    errors, status = [], {}
    for name, in_place in named(op):
        if name in SKIPPED:
            status[name] = f"skipped: {SKIPPED[name]}"
            continue
        seen = defaultdict(set)
        for case in cases(op, in_place, count):
            if not works(case) or SIZES_ONLY.get(name, lambda case: False)(case):
                continue
            said = ask(case)
            problem = wrong(name, case, said, most)
            if problem:
                errors.append(f"{name} with channels {case.channels}: {problem}")
            if said.classes or said.reads:
                seen["follows"].add("")
            elif (
                len(case.channels) == 1
                and not any(word in name for word in UNCHECKED)
                and count > FEW
                and stays_apart(case)
            ):
                seen["pins"].update(said.reasons)
            else:
                seen["mixes"].add("")
        status[name] = next((kind for kind in ("pins", "follows", "mixes") if kind in seen), "none")
        if status[name] == "pins":
            status[name] += f": {'; '.join(sorted(seen['pins']))}"
    return errors, status


@pytest.mark.parametrize("shard", range(SHARDS))
def test_never_less_than_the_truth(shard):
    errors = []
    for op in operators()[shard::SHARDS]:
        errors += check(op, FEW, 2)[0]
    assert not errors, "\n".join(errors)


def read_list():
    lines = LIST.read_text().splitlines() if LIST.exists() else []
    return dict(line.split(" ", 1) for line in lines if line)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_the_list_is_what_the_tracer_does(shard):
    """And with more samples the tracer says no less than the truth."""
    errors, status = [], {}
    for op in operators()[shard::SHARDS]:
        problems, found = check(op, MANY, 6)
        errors += problems
        status |= found
    listed = read_list()
    if os.environ.get("POLARFAST_OPERATORS") == "write":
        lines = (f"{name} {what}" for name, what in sorted({**listed, **status}.items()))
        LIST.write_text("\n".join(lines) + "\n")
        listed |= status
    errors += [
        f"{name} is listed as {listed[name]!r}, and is {what!r} now"
        for name, what in status.items()
        if name in listed and (listed[name] == "follows") != (what == "follows")
    ]
    assert not errors, "\n".join(errors)
