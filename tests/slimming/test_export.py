"""Slim models as exported programs and ONNX files: as their eager selves, on sizes that the export
has not seen, and without polarfast.
"""

import copy
import io

import pytest
import torch
from support.export import CASES, distance, make

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore")  # of deprecations inside the exporters
@pytest.mark.parametrize("name", CASES)
def test_export_and_onnx(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    case, (exact, _) = CASES[name], make(name)
    slim = copy.deepcopy(exact).float()
    example, *others = [torch.randn(shape) for shape in case.shapes()]
    program = torch.export.export(slim, (example,), dynamic_shapes=(case.dynamic(),))
    assert not [node for node in program.graph.nodes if "polarfast" in str(node.target)]
    file = io.BytesIO()
    onnx = torch.onnx.export(program, dynamo=True, input_names=["images"], verbose=False)
    onnx.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    exported = program.module()
    for images in (example, *others):
        with torch.no_grad():
            expected = exact(images.double())
            assert distance(exported(images), expected) < 1e-5
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert distance(torch.from_numpy(found), expected) < 1e-4
