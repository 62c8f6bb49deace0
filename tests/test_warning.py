"""Warnings of the package have a class of their own and point at the user's line."""

import warnings

import torch
from torch import nn

import cram_kernels
from cram_kernels.params import embedding_tables
from cram_kernels.warning import warn


def test_a_warning_points_at_the_line_outside_of_the_package() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("look at this")
    assert [(w.category, str(w.message), w.filename) for w in caught] == [(cram_kernels.CrAMWarning, "look at this", __file__)]


def test_frames_of_torch_are_passed_over() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.no_grad()(warn)("look at this")
    assert [w.filename for w in caught] == [__file__]


def test_embedding_tables_are_found_tied_ones_too() -> None:
    layers = {"table": nn.Embedding(8, 4), "bag": nn.EmbeddingBag(8, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 8, bias=False)}
    model = nn.ModuleDict(layers)
    model["head"].weight = model["table"].weight
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in embedding_tables(model)]
    assert names == ["table.weight", "bag.weight", "head.weight"]


def test_a_file_beside_the_package_is_the_users() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        beside = cram_kernels.__path__[0] + "_demo.py"
        exec(compile("warn('look at this')", beside, "exec"), {"warn": warn})
    assert [w.filename for w in caught] == [beside]
