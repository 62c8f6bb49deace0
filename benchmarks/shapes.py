"""The parameter shapes of two models, in the order of their `parameters()`: the lists of tensors that the ops are measured on."""

Shape = tuple[int, ...]

RESNET50_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))  # blocks, width; a block's output is four times as wide
BERT_HIDDEN, BERT_INNER, BERT_LAYERS = 768, 3072, 12
BERT_EMBEDDINGS = (30522, 512, 2)  # words, positions, token types


def _convolution(outputs: int, inputs: int, kernel: int) -> list[Shape]:
    """Weight, and weight and bias of the batch norm behind it."""
    return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]


def resnet50() -> list[Shape]:
    """161 tensors, 25,557,032 weights; 54 tensors with 25,502,912 weights have 2 or more dims."""
    shapes = _convolution(64, 3, 7)
    inputs = 64
    for blocks, width in RESNET50_STAGES:
        for block in range(blocks):
            shapes += _convolution(width, inputs, 1) + _convolution(width, width, 3) + _convolution(4 * width, width, 1)
            if block == 0:
                shapes += _convolution(4 * width, inputs, 1)  # of the shortcut
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def _linear(outputs: int, inputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def bert_base() -> list[Shape]:
    """199 tensors, 109,482,240 weights, embeddings and pooler included; 76 tensors have 2 dims."""
    hidden, inner = BERT_HIDDEN, BERT_INNER
    norm = [(hidden,), (hidden,)]
    attention = [*(4 * _linear(hidden, hidden)), *norm]
    layer = [*attention, *_linear(inner, hidden), *_linear(hidden, inner), *norm]
    return [*((rows, hidden) for rows in BERT_EMBEDDINGS), *norm, *(BERT_LAYERS * layer), *_linear(hidden, hidden)]


MODELS = {"ResNet-50": resnet50, "BERT-base": bert_base}


def shrink(shapes: list[Shape]) -> list[Shape]:
    """The same model about 64 times smaller: dims of 64 and more are divided by 8."""
    return [tuple(dim // 8 if dim >= 64 else dim for dim in shape) for shape in shapes]
