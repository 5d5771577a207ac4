"""What a bug report needs: a program that builds anew what failed, and fails in the same way."""

import json
import platform
import re
from typing import Any

import torch
from torch import fx, nn

from .copies import copy_of
from .documents import DIGEST
from .inputs import Spec, convert, describe
from .running import call_model, first_of, tensors_of

#: Characters of a program at most. What does not fit is left to be filled in, and a line says so.
LIMIT = 4000

#: What asks for a report.
REQUEST = (
    "this is a bug in polarfast: please report it on the project's issues page, with this message, "
    "what `polarfast info` prints, and this program, which shows it"
)
HEAD = """\
# torch {torch}, Python {python}
import torch
from torch import nn
import polarfast as pf

"""
NETWORK = """\
LAYERS = {{
{layers}
}}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        for name, layer in LAYERS.items():
            owner, (*path, last) = self, name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            setattr(owner, last, layer)

{forward}

torch.manual_seed(0)
model = Net().eval()
"""
MISSING = """\
# TO BE FILLED IN: the code that makes the network ({kind}), of which these are the first layers.
{layers}
model = ...
"""
INPUTS = """\
for module in model.modules():  # as in a trained network
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
        nn.init.uniform_(module.weight, 0.5, 1.0), nn.init.normal_(module.bias)
x = {inputs}
"""
PLAN = "plan = pf.PruningPlan.from_json('''{plan}''')\n"
#: Where it does not fit.
PLAN_FILE = """\
# TO BE ATTACHED: the plan, written by open("plan.json", "w").write(plan.to_json())
plan = pf.PruningPlan.from_json(open("plan.json").read())
"""


def request(model: nn.Module, example_inputs: Any, call: str, plan: str | None = None) -> str:
    """The end of an error message for what cannot be the user's: it asks for a report, and has the
    program to go with it, at most `LIMIT` characters.

    The network is rebuilt from torch's own layers where its code can be followed (`torch.fx`) and
    the outcome computes the same; its weights are random ones. Else the program says what is to be
    filled in.

    Args:
        model: the network, on any device; left as it is.
        example_inputs: as for `polarfast.plan`.
        call: the call that fails, on `model`, `x` and `plan`.
        plan: the plan's text.
    """
    head = HEAD.format(torch=torch.__version__, python=platform.python_version())
    inputs = INPUTS.format(inputs=_made(describe(first_of(example_inputs))))
    network = _network(model, example_inputs)
    ends = [f"{call}\n"]
    if plan is not None:
        # Short, and a reader may change it.
        fields = {name: part for name, part in json.loads(plan).items() if name != DIGEST}
        plan = json.dumps(fields, separators=(",", ":"))
        ends = [f"{each}{call}\n" for each in (PLAN.format(plan=plan), PLAN_FILE)]
    for known in (network, None):
        for end in ends:
            room = LIMIT - len(head) - len(inputs) - len(end)
            part = _left_out(model, room) if known is None else known
            if len(part) <= room:
                return f"{REQUEST}:\n\n{head}{part}{inputs}{end}"
    return f"{REQUEST}:\n\n{head}{_left_out(model, 0)}x = ...\n{ends[-1]}"


def _made(spec: Spec) -> str:
    """Code that makes inputs like those described."""
    if "value" in spec:
        return repr(spec["value"])
    if "named" in spec:
        items = (f"{key!r}: {_made(part)}" for key, part in spec["named"].items())
        return f"{{{', '.join(items)}}}"
    for key, opening, closing in (("list", "[", "]"), ("items", "(", ",)")):
        if key in spec:
            return f"{opening}{', '.join(map(_made, spec[key]))}{closing}"
    shape, dtype, (low, high) = spec["shape"], spec["dtype"], spec.get("range", (0, 0))
    if "float" not in dtype:
        made = f"torch.randint({int(low)}, {int(high) + 1}, {shape})"
        return made if dtype == "int64" else f"{made}.to(torch.{dtype})"
    drawn = f"torch.rand({shape}) * {high - low:.4g} + {low:.4g}"
    return drawn if low < high else f"torch.randn({shape})"  # in the dtype of new layers


def _left_out(model: nn.Module, room: int) -> str:
    """A line to be filled in for the network, and as many of its layers as there is room for."""
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    text = MISSING.format(kind=kind, layers="#")
    lines: list[str] = []
    for name, module in model.named_modules():
        line = f"#   {name}: {type(module).__name__}({module.extra_repr()})"
        if not module._parameters or "\n" in line:
            continue
        room -= len(line) + 1
        if room < len(text):
            break
        lines.append(line)
    return MISSING.format(kind=kind, layers="\n".join(lines or ["#"]))


def _network(model: nn.Module, example_inputs: Any) -> str | None:
    """Code that builds this network from torch's own layers; None where that does not work."""
    try:
        own = copy_of(model).double().eval()
        traced = fx.symbolic_trace(own)
        if len(traced.graph.nodes) > LIMIT // 30:  # characters that one takes at least
            return None
        layers = {
            node.target: _layer(own, node.target)
            for node in traced.graph.nodes
            if node.op in ("call_module", "get_attr")
        }
        lines = "\n".join(f"    {name!r}: {code}," for name, code in layers.items())
        code = traced.graph.python_code("self").src.strip()
        code = re.sub(r";\s+(\w+ = )+None", "", code)  # which only frees memory
        forward = "\n".join(f"    {line}" for line in code.splitlines())
        text = NETWORK.format(layers=lines, forward=forward)
        return text if _same(text, own, example_inputs) else None
    except Exception:  # what the network's code raises on a stand-in for its input: anything
        return None


def _layer(model: nn.Module, name: str) -> str:
    """Code that makes a layer, or a parameter or buffer, like the one of that name."""
    owner, _, attribute = name.rpartition(".")
    part = getattr(model.get_submodule(owner), attribute)
    if isinstance(part, torch.Tensor):
        made = f"torch.randn({list(part.shape)})"
        return f"nn.Parameter({made})" if isinstance(part, nn.Parameter) else f"nn.Buffer({made})"
    code = f"nn.{part!r}"
    for option in re.findall(r", \w+=(?:\([^)]*\)|[^,()]+)", code):
        shorter = code.replace(option, "", 1)
        if _makes(shorter, part):
            code = shorter
    return code


def _makes(code: str, module: nn.Module) -> bool:
    """Whether code without some options makes a module that reads the same."""
    try:
        with torch.device("meta"):
            return repr(eval(code, {"nn": nn})) == repr(module)
    except TypeError:  # an argument is needed
        return False


def _same(text: str, model: nn.Module, example_inputs: Any) -> bool:
    """Whether the network that a text builds computes what this one does."""
    names: dict[str, Any] = {"torch": torch, "nn": nn}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        exec(text, names)  # made of the network's own layers and operators
        built = names["model"].double()
        built.load_state_dict(model.state_dict())
        x = convert(first_of(example_inputs), device=torch.device("cpu"), dtype=torch.float64)
        wanted, found = (tensors_of(call_model(each, x)) for each in (model.cpu(), built))
    return len(wanted) == len(found) and all(map(torch.allclose, wanted, found))
