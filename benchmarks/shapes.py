"""The parameter shapes of models, in the order of their `parameters()`: the lists of tensors that the ops are measured on."""

import math
import os
from pathlib import Path

Shape = tuple[int, ...]

RESNET50_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))  # blocks, width; a block's output is four times as wide
BERT_HIDDEN, BERT_INNER, BERT_LAYERS = 768, 3072, 12
BERT_EMBEDDINGS = (30522, 512, 2)  # words, positions, token types
VIT_PATCH, VIT_TOKENS, CLASSES = 16, 197, 1000
BILLION = "1 B list"
LLAMA_HIDDEN, LLAMA_INNER, LLAMA_LAYERS, LLAMA_KEYS, LLAMA_WORDS = 2048, 5632, 22, 256, 32000
PEAK = 64  # bytes a weight of a list that a benchmark holds at a time: the tensors of the op, those of its check, the copies


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


def vit_base() -> list[Shape]:
    """152 tensors, 86,567,656 weights; 52 tensors have 2 or more dims."""
    hidden, inner = BERT_HIDDEN, BERT_INNER
    norm = [(hidden,), (hidden,)]
    layer = [*norm, *_linear(3 * hidden, hidden), *_linear(hidden, hidden), *norm, *_linear(inner, hidden), *_linear(hidden, inner)]
    head = [*norm, *_linear(CLASSES, hidden)]
    return [(1, 1, hidden), (1, VIT_TOKENS, hidden), (hidden, 3, VIT_PATCH, VIT_PATCH), (hidden,), *(BERT_LAYERS * layer), *head]


def billion(device: str) -> list[Shape]:
    """A language model of 1.1 G weights in the form of TinyLlama, with as many of its 22 layers as half of the free memory holds."""
    hidden, inner = LLAMA_HIDDEN, LLAMA_INNER
    keys = [(LLAMA_KEYS, hidden)] * 2
    layer = [(hidden, hidden), *keys, (hidden, hidden), (inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
    ends = [(LLAMA_WORDS, hidden), (hidden,), (LLAMA_WORDS, hidden)]
    fitting = (free_memory(device) // 2 // PEAK - numel(ends)) // numel(layer)
    return [*ends[:1], *(max(1, min(LLAMA_LAYERS, fitting)) * layer), *ends[1:]]


def numel(shapes: list[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def free_memory(device: str) -> int:
    """Bytes."""
    if device != "cpu":
        import torch

        return torch.cuda.mem_get_info()[0]
    try:
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


MODELS = {"ResNet-50": resnet50, "BERT-base": bert_base, "ViT-B": vit_base}


def shrink(shapes: list[Shape]) -> list[Shape]:
    """The same model about 64 times smaller: dims of 64 and more are divided by 8."""
    return [tuple(dim // 8 if dim >= 64 else dim for dim in shape) for shape in shapes]
