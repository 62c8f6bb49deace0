"""A dense layer or network under ONNX Runtime, with as many threads as torch has."""

import io
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn


def session_of(model: nn.Module, x: Tensor) -> tuple[onnxruntime.InferenceSession, dict[str, Any]]:
    """The session and its input. A Linear or Conv2d is written node by node, a network by torch's exporter."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    content = _layer(model, x) if isinstance(model, (nn.Linear, nn.Conv2d)) else _network(model, x)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session, {session.get_inputs()[0].name: x.numpy()}


def _layer(layer: nn.Linear | nn.Conv2d, x: Tensor) -> bytes:
    with torch.no_grad():
        y = layer(x)
    initializers = [numpy_helper.from_array(p.detach().numpy(), name) for name, p in layer.named_parameters()]
    names = ["x", *(i.name for i in initializers)]
    if isinstance(layer, nn.Linear):
        node = helper.make_node("Gemm", names, ["y"], transB=1)
    else:
        pads = [*layer.padding, *layer.padding]
        node = helper.make_node("Conv", names, ["y"], kernel_shape=layer.kernel_size, strides=layer.stride, pads=pads)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(t.shape)) for name, t in (("x", x), ("y", y))]
    graph = helper.make_graph([node], "layer", ends[:1], ends[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _network(model: nn.Module, x: Tensor) -> bytes:
    buffer = io.BytesIO()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    program.save(buffer)
    return buffer.getvalue()
