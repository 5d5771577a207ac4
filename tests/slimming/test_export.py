"""Slim models as exported programs and ONNX files: as their eager selves, on sizes that the export
has not seen, and without polarfast.
"""

import copy
import io

import pytest
import torch
from support.export import CASES, distance, make
from support.nets import Residual, X, prepared

import polarfast as pf

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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fused", [False, True])
def test_put_backs_through_the_exporter_of_old(fused):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, scales = prepared(Residual, "expand")
    slim = pf.slim(model, pf.plan(model, X, scales, "fixed")).float()
    slim = pf.fuse(slim, X.float()) if fused else slim
    file, images = io.BytesIO(), torch.randn(5, *X.shape[1:])
    names = {"input_names": ["images"], "dynamic_axes": {"images": {0: "batch"}}}
    torch.onnx.export(slim, (X.float(),), file, dynamo=False, **names)
    (found,) = onnxruntime.InferenceSession(file.getvalue()).run(None, {"images": images.numpy()})
    assert distance(torch.from_numpy(found), slim(images)) < 1e-4
