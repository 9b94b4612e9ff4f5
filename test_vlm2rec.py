# SPDX-License-Identifier: MIT
"""Tests that teach: every equation against a slow transcription, the protocol by hand, the encoder
against ten models' own forward passes, the data, runs and whatever people do to them."""
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests hide a GPU
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import contextlib
import csv
import dataclasses
import errno
import gc
import gzip
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import math
import multiprocessing
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import warnings
import weakref
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy
import peft
import pytest
import safetensors
import safetensors.torch
import tokenizers
import torch
import transformers
from PIL import Image, features
from safetensors.torch import load_file, save_file

import data
import vlm2rec

@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with a small sample world (domains/small: 240 users) and the tiny model, made once."""
    folder = tmp_path_factory.mktemp("home")
    data.write_sample_world(folder / "domains" / "small", users=240, per_cell=4)
    data.prepare_model("tiny", folder / "domains")
    return folder

def command(folder, *flags):
    """vlm2rec.main with a domain of `folder`, results in folder/runs: the exit code."""
    paths = ["--data-dir", str(folder / "domains"), "--out", str(folder / "runs"), "--model", "tiny"]
    return vlm2rec.main([*paths, *map(str, flags)])

def open_small(home, **settings):
    """An opened run on the small world; settings as of vlm2rec.Config."""
    paths = {"domain": "small", "data_dir": str(home / "domains"), "out": str(home / "runs")}
    return vlm2rec.open_run(vlm2rec.Config(**{**paths, "model": "tiny", **settings}))

# The equations, transcribed: floats, loops and `math`, nothing else ------------------------------

def loop_cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

def loop_sim(z, e):
    return [[loop_cosine(z[u], e[j]) for j in range(len(e))] for u in range(len(z))]

def loop_contrast(z, e, mask, tau, weight):
    """Eq. 10; with all weights 1 it is Eq. 3. Mean over the batch."""
    sim = loop_sim(z, e)
    total = 0.0
    for u in range(len(z)):
        positive = math.exp(sim[u][u] / tau)
        negative = sum(math.exp(sim[u][j] / tau) for j in range(len(e)) if mask[u][j])
        total -= math.log(positive / (positive + weight[u] * negative))
    return total / len(z)

def loop_margins(z, e, mask):
    """Eq. 6."""
    sim = loop_sim(z, e)
    margins = []
    for u in range(len(z)):
        others = [sim[u][j] for j in range(len(e)) if mask[u][j]]
        margins.append(sim[u][u] - sum(others) / len(others) if others else 0.0)
    return margins

def loop_topology(z_text, e_text, z_vision, e_vision, tau):
    """Eqs. 11-13."""
    total = 0.0
    for row_text, row_vision in zip(loop_sim(z_text, e_text), loop_sim(z_vision, e_vision)):
        p = loop_softmax(row_text, tau)
        q = loop_softmax(row_vision, tau)
        total += sum(p[j] * math.log(p[j] / q[j]) for j in range(len(p)))
        total += sum(q[j] * math.log(q[j] / p[j]) for j in range(len(p)))
    return total / (2 * len(z_text))

def loop_softmax(row, tau):
    return [math.exp(s / tau) / sum(math.exp(r / tau) for r in row) for s in row]

def loop_teacher(e_text, e_vision, tau):
    """SDA: whom an item is near, on average over its two modalities."""
    text = loop_sim(e_text, e_text)
    vision = loop_sim(e_vision, e_vision)
    return [loop_softmax([(t + v) / 2 for t, v in zip(*rows)], tau) for rows in zip(text, vision)]

def loop_alignment(e_text, e_vision, tau, teacher):
    """SDA's CMSA: cross-entropy from vision to text and back, halved, from a fixed teacher."""
    total = 0.0
    across = loop_sim(e_vision, e_text)
    for student in (across, list(zip(*across))):
        for p, row in zip(teacher, student):
            q = loop_softmax(row, tau)
            total -= sum(p[j] * math.log(q[j]) for j in range(len(q)))
    return total / (2 * len(teacher))

TAU, TAU_CRTR, LAM = 0.3, 0.2, 0.5

def loop_value(name, t, mask, strong, teacher):
    """A loss by its name, from a dict of nested lists. A stop-gradient is no more than a number
    that stays: `strong` for sg[M_strong], `teacher` for SDA's."""
    text = loop_margins(t["z_text"], t["e_text"], mask)
    vision = loop_margins(t["z_vision"], t["e_vision"], mask)
    if name == "no-stopgrad":
        strong = [max(pair) for pair in zip(text, vision)]
    gap = [s - min(pair) for s, *pair in zip(strong, text, vision)]
    weight = [1 + t["beta"] * math.log(1 + math.exp(t["alpha"] * g)) for g in gap]
    each = {"margin": text, "gap": gap, "weight": weight}
    if name in each:
        return sum(k * value for k, value in enumerate(each[name], 1))
    z = [[x + y for x, y in zip(*rows)] for rows in zip(t["z_text"], t["z_vision"])]
    e = [[x + y for x, y in zip(*rows)] for rows in zip(t["e_text"], t["e_vision"])]
    infonce = loop_contrast(z, e, mask, TAU, [1.0] * len(z))
    wpcl = loop_contrast(z, e, mask, TAU, weight)
    crtr = loop_topology(t["z_text"], t["e_text"], t["z_vision"], t["e_vision"], TAU_CRTR)
    cmsa = loop_alignment(t["e_text"], t["e_vision"], TAU, teacher)
    return {"sft": infonce, "no-crtr": wpcl, "no-wpcl": LAM * crtr, "sda": infonce + LAM * cmsa,
            "no-penalty": infonce + LAM * crtr, "no-stopgrad": wpcl + LAM * crtr,
            "vlm2rec": wpcl + LAM * crtr}[name]

def fast_value(name, t, mask):
    """The same by vlm2rec: a method's total (Eq. 14), or the users' values, weighted 1, 2, ..."""
    z = vlm2rec.fuse({"text": t["z_text"], "vision": t["z_vision"]})
    e = vlm2rec.fuse({"text": t["e_text"], "vision": t["e_vision"]})
    if name in vlm2rec.METHODS:
        scalars = (t["alpha"], t["beta"], TAU, TAU_CRTR, LAM)
        return vlm2rec.objective(vlm2rec.METHODS[name], z, e, mask, *scalars)["loss"]
    text, vision = (vlm2rec.discriminative_margin(vlm2rec.cosine(z[space], e[space]), mask)
                    for space in ("text", "vision"))
    gap = vlm2rec.modality_gap(text, vision)
    weight = vlm2rec.penalty_weight(gap, t["alpha"], t["beta"])
    each = {"margin": text, "gap": gap, "weight": weight}[name]
    return (each * torch.arange(1, len(each) + 1)).sum()

@pytest.fixture
def batch():
    """Five users in four dimensions, the last without a negative; float64, to test the formula."""
    generator = torch.Generator().manual_seed(7)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    tensors = {name: make(5, 4) for name in ("z_text", "z_vision", "e_text", "e_vision")}
    for name, value in (("alpha", 1.3), ("beta", 0.7)):
        tensors[name] = torch.tensor(value, dtype=torch.float64)
    mask = torch.rand(5, 5, generator=generator) < 0.7
    mask[-1] = False
    mask.fill_diagonal_(False)
    assert mask.any(dim=1).tolist() == [True, True, True, True, False]
    return tensors, mask

# The losses --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["margin", "gap", "weight", "sft", "vlm2rec", "no-wpcl",
                                  "no-penalty", "no-stopgrad", "no-crtr", "sda"])
def test_losses_and_gradients_equal_the_loops(batch, name):
    """Eqs. 3, 6-14, Table 5 and SDA: the value, and the gradient by central differences."""
    tensors, mask = batch
    values = {key: tensor.tolist() for key, tensor in tensors.items()}
    text = loop_margins(values["z_text"], values["e_text"], mask)
    vision = loop_margins(values["z_vision"], values["e_vision"], mask)
    assert {t > v for t, v in zip(text[:4], vision)} == {True, False}  # each is some user's weak one
    strong = [max(pair) for pair in zip(text, vision)]
    teacher = loop_teacher(values["e_text"], values["e_vision"], TAU)
    for tensor in tensors.values():
        tensor.requires_grad_()
    loss = fast_value(name, tensors, mask)
    expected = loop_value(name, values, mask, strong, teacher)
    assert loss.item() == pytest.approx(expected, abs=1e-9)
    loss.backward()
    for key, tensor in tensors.items():
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for k in range(tensor.numel()):
            sides = []
            for step in (1e-5, -1e-5):
                moved = tensor.detach().clone()
                moved.view(-1)[k] += step
                changed = values | {key: moved.tolist()}
                sides.append(loop_value(name, changed, mask, strong, teacher))
            slope = (sides[0] - sides[1]) / 2e-5
            assert gradient.view(-1)[k].item() == pytest.approx(slope, abs=1e-6), (key, k)

def test_the_stop_gradient_leaves_the_strong_modality_alone():
    """Eq. 8: user 0 has strong text, user 1 strong vision."""
    text = torch.tensor([0.9, 0.1], requires_grad=True)
    vision = torch.tensor([0.2, 0.6], requires_grad=True)
    gap = vlm2rec.modality_gap(text, vision)
    assert gap.tolist() == pytest.approx([0.7, 0.5])
    gap.sum().backward()
    assert text.grad.tolist() == [0, -1]  # descent raises the weak margin
    assert vision.grad.tolist() == [-1, 0]

def test_a_user_without_a_negative_has_margin_0_and_adds_no_loss():
    sim = torch.tensor([[0.9, 0.4], [0.2, 0.6]], requires_grad=True)
    mask = torch.tensor([[False, True], [False, False]])
    assert vlm2rec.discriminative_margin(sim, mask).tolist() == pytest.approx([0.5, 0])
    loss = vlm2rec.info_nce(sim, mask, torch.tensor([2.0, 3.0]), 0.5)
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(-1)) / 2)  # a mean over both
    loss.backward()
    assert sim.grad[1].tolist() == [0, 0]
    weight = vlm2rec.penalty_weight(torch.zeros(1), torch.tensor(1.0), torch.tensor(0.7))
    assert weight.item() == pytest.approx(1 + 0.7 * math.log(2))  # Eq. 9 at gap 0: not 1

def test_a_step_logs_the_terms_that_its_method_has(batch):
    tensors, mask = batch
    z = vlm2rec.fuse({"text": tensors["z_text"], "vision": tensors["z_vision"]})
    e = vlm2rec.fuse({"text": tensors["e_text"], "vision": tensors["e_vision"]})
    scalars = (tensors["alpha"], tensors["beta"], TAU, TAU_CRTR, LAM)
    names = {"vlm2rec": "loss gap weight alpha beta wpcl crtr", "sft": "loss infonce",
             "no-wpcl": "loss crtr", "no-penalty": "loss infonce crtr", "sda": "loss infonce cmsa",
             "no-crtr": "loss gap weight alpha beta wpcl"}
    for method, expected in names.items():
        terms = vlm2rec.objective(vlm2rec.METHODS[method], z, e, mask, *scalars)
        assert list(terms) == expected.split()
    text = loop_margins(z["text"].tolist(), e["text"].tolist(), mask)
    vision = loop_margins(z["vision"].tolist(), e["vision"].tolist(), mask)
    gap = [abs(t - v) for t, v in zip(text, vision)]
    weight = [1 + 0.7 * math.log(1 + math.exp(1.3 * g)) for g in gap]
    assert terms["gap"].item() == pytest.approx(sum(gap) / 5)
    assert terms["weight"].item() == pytest.approx(sum(weight) / 5)

def test_topology_by_hand_and_in_both_directions():
    """P = (3/4, 1/4), Q = (1/2, 1/2): KL(P || Q) = .1308 and KL(Q || P) = .1438."""
    tau = 0.1
    one = tau * torch.tensor([[0.75, 0.25], [0.25, 0.75]]).log()
    other = torch.zeros(2, 2)
    topology = vlm2rec.relational_topology
    assert topology(one, other, tau).item() == pytest.approx((0.1308 + 0.1438) / 2, abs=1e-4)
    assert topology(other, one, tau) == pytest.approx(topology(one, other, tau))
    assert topology(one, one + 3, tau).item() == pytest.approx(0, abs=1e-5)  # relations, not values
    assert topology(other, other - 1, tau) == 0  # two constant spaces: the loss's shortcut
    assert topology(one / tau, other, 0.001).isfinite()  # the paper's smallest temperature

def test_alpha_and_beta_start_at_1_and_only_ever_fall():
    penalty = vlm2rec.Penalty()
    optimizer = torch.optim.SGD(penalty.parameters(), lr=0.5)
    assert [value.item() for value in penalty()] == pytest.approx([1, 1])
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        before = torch.stack(penalty()).detach()
        weight = vlm2rec.penalty_weight(torch.rand(5, generator=generator), *penalty())
        sim = torch.rand(5, 5, generator=generator)
        vlm2rec.info_nce(sim, ~torch.eye(5, dtype=torch.bool), weight, 0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        after = torch.stack(penalty()).detach()
        assert (0 < after).all() and (after < before).all()

def test_negative_mask_by_hand():
    """Users 0 and 1 share target 4. User 2 bought 6 before, user 3's target; 3 buys 5 later on."""
    targets = torch.tensor([4, 4, 5, 6])
    earlier = [[1, 2], [3], [6, 1], []]
    assert vlm2rec.negative_mask(targets, earlier).int().tolist() == [
        [0, 0, 1, 1],  # target 4 again is no negative
        [0, 0, 1, 1],
        [1, 1, 0, 0],  # nor is 6, bought before
        [1, 1, 1, 0]]  # but 5 is: training must not know what comes later

OFF_DIAGONAL = ~torch.eye(2, dtype=torch.bool)
PIECES = {  # every function that a reader may want to copy, with arguments
    "last_token": (torch.rand(2, 5, 3), torch.tensor([4, 1])),
    "fuse": ({"text": torch.rand(2, 3), "vision": torch.rand(2, 3)},),
    "cosine": (torch.rand(3, 4), torch.rand(2, 4)),
    "negative_mask": (torch.tensor([1, 2]), [[3], [1]]),
    "info_nce": (torch.rand(2, 2), OFF_DIAGONAL, torch.tensor([1.0, 2.0]), 0.1),
    "discriminative_margin": (torch.rand(2, 2), OFF_DIAGONAL),
    "modality_gap": (torch.rand(3), torch.rand(3)),
    "penalty_weight": (torch.rand(3), torch.tensor(1.0), torch.tensor(1.0)),
    "relational_topology": (torch.rand(2, 2), torch.rand(2, 2), 0.1),
    "target_rank": (torch.rand(3), torch.rand(3, 5)),
    "hits_and_ndcg": (torch.tensor([1.0, 12.5]),),
    "structural_alignment": (torch.rand(3, 4), torch.rand(3, 4), 0.1),  # with `cosine`
}

@pytest.mark.parametrize("name", PIECES)
def test_each_piece_runs_when_pasted_alone_beside_torch(name):
    source = "import torch\n" + inspect.getsource(getattr(vlm2rec, name))
    if name == "structural_alignment":
        source += inspect.getsource(vlm2rec.cosine)
    pasted = {}
    exec(compile(source, name, "exec", dont_inherit=True), pasted)
    expected = getattr(vlm2rec, name)(*PIECES[name])
    torch.testing.assert_close(pasted[name](*PIECES[name]), expected)

# The protocol ------------------------------------------------------------------------------------

def by_hand(sequences, items):
    """A domain in memory, of users 0, 1, ... with these sequences of items 0, 1, ..."""
    ids = [f"i{item}" for item in range(items)]
    users = [f"u{user}" for user in range(len(sequences))]
    tied = [False] * len(users)
    return data.Domain("hand", ids, ids, [], users, sequences, tied, {}, [], "digest")

def test_training_batches_by_hand():
    others = [[30 + k, 40 + k, 50, 51, 52] for k in range(3)]
    domain = by_hand([list(range(13)), [20, 21, 22, 23, 24], *others], items=60)
    config = vlm2rec.Config(history=4)
    batches = vlm2rec.training_batches(domain, 2, 3, config)
    steps = [(step, epoch, len(batch)) for step, epoch, batch in batches]
    assert steps == [(1, 1, 2), (2, 1, 2), (3, 2, 2), (4, 2, 2), (5, 3, 2), (6, 3, 2)]
    found = {tuple(earlier): (history, target) for _, _, batch in batches
             for history, target, earlier in batch}
    assert found[tuple(range(10))] == ([6, 7, 8, 9], 10)  # the third to last; 11 and 12 are unseen
    assert found[20, 21] == ([20, 21], 22)

def test_the_seed_decides_the_users_and_their_order():
    domain = by_hand([[user, 100, 101, 102, 103] for user in range(50)], items=104)
    def epochs(seed):
        """The users of four epochs, in order, in batches of three, of seven users."""
        config = vlm2rec.Config(train_users=7, seed=seed)
        users = {}
        for _, epoch, batch in vlm2rec.training_batches(domain, 3, 4, config):
            users.setdefault(epoch, []).extend(earlier[0] for _, _, earlier in batch)
        return list(users.values())
    users = epochs(0)
    assert [len(set(epoch)) for epoch in users] == [6, 6, 6, 6]  # of seven, one is left over
    assert len(set(itertools.chain(*users))) == 7  # the same seven in all epochs
    assert users[0] != users[1] and users == epochs(0) != epochs(1)

def test_an_evaluation_by_hand():
    domain = by_hand([[0, 1, 2, 3, 4], [9, 8, 7, 6, 5]], items=120)
    test = vlm2rec.make_evaluation(domain, "test", 3, seed=0)
    assert list(test.histories) == [[1, 2, 3], [8, 7, 6]] and test.targets.tolist() == [4, 5]
    assert test.sequences == domain.sequences
    valid = vlm2rec.make_evaluation(domain, "valid", 3, seed=0)
    assert list(valid.histories) == [[0, 1, 2], [9, 8, 7]] and valid.targets.tolist() == [3, 6]
    assert not torch.equal(valid.negatives, test.negatives)
    for sequence, negatives in zip(domain.sequences, test.negatives.tolist()):
        assert len(set(negatives) - set(sequence)) == 100

def test_ranks_by_hand_a_tie_counts_half():
    target = torch.tensor([0.5, 0.5, 0.5])
    others = torch.tensor([[0.9, 0.3, 0.1], [0.5, 0.5, 0.1], [0.5, 0.5, 0.5]])
    assert vlm2rec.target_rank(target, others).tolist() == [2, 2, 2.5]
    others[:, 0] = -math.inf  # the first candidate is left out
    assert vlm2rec.target_rank(target, others).tolist() == [1, 1.5, 2]

@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_stops(bad):
    with pytest.raises(FloatingPointError, match="not finite"):
        vlm2rec.target_rank(torch.tensor([0.5]), torch.tensor([[0.1, bad, 0.2]]))
    with pytest.raises(FloatingPointError, match="not finite"):
        vlm2rec.target_rank(torch.tensor([0.5, bad]), torch.zeros(2, 3))

def test_hits_and_ndcg_by_hand():
    second = {"H@10": 1, "N@10": 0.6309, "H@20": 1, "N@20": 0.6309}
    assert vlm2rec.hits_and_ndcg(torch.tensor([2.0])) == pytest.approx(second, abs=1e-4)
    expected = {"H@10": 1 / 3, "N@10": 1 / 3, "H@20": 2 / 3, "N@20": (1 + 0.2789) / 3}
    found = vlm2rec.hits_and_ndcg(torch.tensor([1.0, 11.0, 21.0]))  # 1 / log2(12) = .2789
    assert found == pytest.approx(expected, abs=1e-4)
    assert vlm2rec.hits_and_ndcg(torch.tensor([10.0, 10.5]))["H@10"] == 0.5

CHANCE = {"H@10": 0.0990, "N@10": 0.0450, "H@20": 0.1980, "N@20": 0.0697}  # of 101 candidates

def test_an_oracle_is_perfect_a_constant_no_better_than_chance_a_random_order_at_chance():
    torch.manual_seed(0)
    e = torch.randn(400, 64)
    users = [[user % 400] for user in range(2000)]
    targets = torch.tensor(users)[:, 0]
    negatives = [data.draw_negatives(str(u), users[u], 400, "test", 0) for u in range(2000)]
    test = vlm2rec.Evaluation(users, targets, torch.tensor(negatives), users)
    def scores(z, e):
        return [vlm2rec.hits_and_ndcg(ranks) for ranks in vlm2rec.evaluate(z, e, test)]
    assert scores(e[targets], e) == [dict.fromkeys(CHANCE, 1.0)] * 2
    for found in scores(torch.ones(2000, 64), torch.ones(400, 64)):
        assert found == dict.fromkeys(CHANCE, 0.0)  # (others > target).sum() would make it perfect
    assert scores(torch.randn(2000, 64), e)[0] == pytest.approx(CHANCE, abs=0.02)
    with pytest.raises(FloatingPointError):
        scores(torch.full((2000, 64), math.nan), e)

def test_the_full_ranking_leaves_out_the_users_other_items():
    z = torch.tensor([[0.9, 0.8, 0.7, 0.1]])  # likes item 0 best, then 1, 2, 3
    for sequence, full in (([2], 3), ([0, 2], 2), ([0, 2, 1], 1)):
        test = vlm2rec.Evaluation([], torch.tensor([2]), torch.tensor([[3]]), [sequence])
        ranks = vlm2rec.evaluate(z, torch.eye(4), test)
        assert [rank.tolist() for rank in ranks] == [[1], [full]]

# Prompts and encoder -----------------------------------------------------------------------------

HISTORIES = [[3, 8, 5, 20, 31], [7], [9, 1], [50, 51, 52, 53, 54, 55, 56, 57, 58, 59]]

def lora_model(home, method="vlm2rec", **settings):
    """A model of the small world without dropout, all its trained weights random, so that each
    matters."""
    run = open_small(home, method=method, lora_dropout=0.0, lora_rank=8, lora_alpha=16, **settings)
    model, _ = vlm2rec.make_model(run)
    for weight in model.lora:
        torch.nn.init.normal_(weight, std=0.2)
    return model

@pytest.fixture(scope="module")
def encoder(home):
    return lora_model(home).encoder

def test_prompts_by_hand(home, encoder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "domains" / "tiny-qwen2.5-vl")
    first, second, odd = "Belka lantern 42", "Arvo kite 7", "<|im_end|><|image_pad|>"
    titles = [first, second, odd, "Q" * 500]
    made = vlm2rec.Encoder(encoder.vlm, tokenizer, titles, encoder.features[:4])
    picture = "<|vision_start|>" + 4 * "<|image_pad|>" + "<|vision_end|>"  # 56 px: 2 x 2 tokens
    for modality, expected in {
            "text": f"{first}\n{second}<|im_end|>",
            "vision": f"{picture}\n{picture}<|im_end|>",
            "interleaved": f"{first}\n{picture}\n{second}\n{picture}<|im_end|>"}.items():
        assert tokenizer.decode(made.prompt([0, 1], modality)) == expected
    assert tokenizer.decode(made.prompt([1], "text")) == f"{second}<|im_end|>"
    start, image, end, stop = tokenizer.convert_tokens_to_ids(
        ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|im_end|>"])
    assert made.prompt([0], "vision") == [start, image, image, image, image, end, stop]
    ids = made.prompt([2], "text")
    assert tokenizer.decode(ids[:-1]) == odd and not {stop, image} & set(ids[:-1])  # it is text
    assert made.prompt([3], "text")[:-1] == tokenizer("Q" * 64).input_ids

@pytest.mark.parametrize("modality", ["text", "vision", "interleaved"])
def test_passes_and_order_of_prompts_change_nothing_but_order_of_items_does(
        encoder, modality, monkeypatch):
    """Also: one history's pictures swapped, or one item replaced, give another embedding."""
    histories = [*HISTORIES, [8, 3, 5, 20, 31], [3, 8, 5, 20, 30]]
    z = encoder.embed(histories, [modality])[modality]
    one_by_one = [encoder.embed([history], [modality])[modality] for history in histories]
    backwards = encoder.embed(histories[::-1], [modality])["fused"].flip(0)
    monkeypatch.setattr(vlm2rec, "PASS_TOKENS", 100)
    for other in (torch.cat(one_by_one), backwards, encoder.embed(histories, [modality])["fused"]):
        assert (z - other).abs().max() < 1e-5
    assert (z[0] - z[4]).abs().max() > 1e-2 and (z[0] - z[5]).abs().max() > 1e-2

def test_both_modalities_are_added_and_passes_keep_to_their_tokens(encoder, monkeypatch):
    parts = encoder.embed(HISTORIES, ("text", "vision"))
    assert torch.equal(parts["fused"], parts["text"] + parts["vision"])  # Eq. 2
    monkeypatch.setattr(vlm2rec, "PASS_TOKENS", 20)
    assert vlm2rec.passes_by_length([5, 30, 2, 9, 9, 1]) == [[1], [3, 4], [0, 2, 5]]

def test_pictures_keep_their_ratio_on_a_white_ground(tmp_path):
    wide = vlm2rec.Image.new("RGB", (56, 28), "red")
    wide.save(tmp_path / "wide.png")
    expected = vlm2rec.Image.new("RGB", (28, 28), "white")
    expected.paste("red", (0, 7, 28, 21))
    assert vlm2rec.square_picture(tmp_path / "wide.png", 28).tobytes() == expected.tobytes()

def test_a_step_is_four_forward_passes_of_one_modality_each(home):
    for method, expected in (("vlm2rec", [("text", 2), ("vision", 2), ("text", 2), ("vision", 2)]),
                             ("vision", [("vision", 2), ("vision", 2)])):
        model = lora_model(home, method)
        passes = []
        def note(vlm, args, inputs):
            modality = "vision" if "mm_encoder_outputs" in inputs else "text"
            passes.append((modality, len(inputs["input_ids"])))
        model.encoder.vlm.register_forward_pre_hook(note, with_kwargs=True)
        model.terms([([3, 8], 5, [3, 8]), ([7], 9, [7])])
        assert passes == expected

def test_a_step_uses_the_embeddings_and_masks_of_its_batch(home):
    """Against embed(): user 0 has user 1's target; two users' targets are the same."""
    model = lora_model(home)
    batch = [([3, 8], 5, [9, 3, 8]), ([7], 9, [7]), ([4], 5, [4])]
    z = model.encoder.embed([[3, 8], [7], [4]], ("text", "vision"))
    e = model.encoder.embed([[5], [9], [5]], ("text", "vision"))
    mask = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 1, 0]]).bool()
    one = torch.tensor(1.0)
    expected = vlm2rec.objective(model.method, z, e, mask, one, one, 0.1, 1.0, 0.5)
    for name, value in model.terms(batch).items():
        assert value.item() == pytest.approx(expected[name].item(), abs=1e-4)

def test_one_batch_can_be_overfitted_while_alpha_and_beta_keep_their_own_rate(home):
    run = open_small(home, lr=3e-3, lora_dropout=0.0, lam=0.1)
    model, _ = vlm2rec.make_model(run)
    optimizer = torch.optim.AdamW(model.groups, weight_decay=0.0)
    batch = [([k, k + 1, k + 2], k + 20, [k, k + 1, k + 2]) for k in range(6)]
    losses = []
    for step in range(40):
        loss = model.terms(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 1.5 and losses[-1] < 0.2
    for value in model.penalty():
        assert 1 - 40 * 1e-5 < value < 1

def test_what_does_not_fit_the_model_is_refused_in_one_line(home, encoder, monkeypatch):
    with pytest.raises(data.InputError, match="--image-size 60: take a multiple of 28"):
        vlm2rec.make_model(open_small(home, image_size=60))
    context = encoder.vlm.config.get_text_config()
    longest = len(encoder.prompt(HISTORIES[3], "vision"))
    monkeypatch.setattr(context, "max_position_embeddings", longest)
    encoder.embed(HISTORIES, ["vision"])
    monkeypatch.setattr(context, "max_position_embeddings", longest - 1)
    with pytest.raises(data.InputError, match=f"has {longest} tokens, the model holds {longest - 1}"):
        encoder.embed(HISTORIES, ["vision"])

# Ten families of models: tiny checkpoints with random weights ------------------------------------

QWEN_EYES = dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32)
EYES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            image_size=56, patch_size=14)
SIGLIP = EYES | {"model_type": "siglip_vision_model", "vision_use_head": False}
LINEAR = dict(layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8,
              linear_num_key_heads=2, linear_value_head_dim=8, linear_num_value_heads=4)
SLIDING = {"model_type": "gemma3_text", "sliding_window": 8,
           "layer_types": ["sliding_attention", "full_attention"]}
PINS = {"image_grid_pinpoints": [[56, 56], [56, 112], [112, 56], [112, 112]]}
SQUARE = {"size": {"height": 56, "width": 56}}
SHRUNK = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
QWEN_SHOWS = "<|vision_start|>{}<|vision_end|>"
IDEFICS_SHOWS = "<fake_token_around_image><global-img>{}<fake_token_around_image>"
GEMMA_SHOWS = "\n\n<start_of_image>{}<end_of_image>\n\n"
BOS = "<|video_pad|>"  # what opens a prompt; our tokenizer has no other mark to spare
FAMILIES = {  # opening, a picture, its tokens; settings: text, vision, both, image processor
    "qwen2_vl": ("", QWEN_SHOWS, 4, {}, dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2),
                 {}, {"patch_size": 14}),
    "qwen2_5_vl": ("", QWEN_SHOWS, 4, {}, QWEN_EYES | {"fullatt_block_indexes": [1]},
                   {}, {"patch_size": 14}),
    "qwen3_vl": ("", QWEN_SHOWS, 4, {}, QWEN_EYES | {"deepstack_visual_indexes": [0, 1],
                 "num_position_embeddings": 16}, {}, {"patch_size": 16}),
    "qwen3_5": ("", QWEN_SHOWS, 4, LINEAR, QWEN_EYES | {"num_position_embeddings": 16},
                {}, {"patch_size": 16}),
    "internvl": ("", "<img>{}</img>", 4, {"model_type": "qwen2"},
                 EYES | {"image_size": [56, 56], "patch_size": [14, 14]},
                 {}, SQUARE | {"crop_to_patches": True}),
    "llava": (BOS, "{}", 16, {"model_type": "llama"}, EYES | {"model_type": "clip_vision_model"},
              {}, {"size": {"shortest_edge": 56}, "crop_size": SQUARE["size"]}),
    "llava_onevision": ("", "{}", 17, {"model_type": "qwen2"}, SIGLIP, PINS, SQUARE | PINS),
    "smolvlm": (BOS, IDEFICS_SHOWS, 4, {"model_type": "llama"}, EYES, {"scale_factor": 2}, SHRUNK),
    "idefics3": (BOS, IDEFICS_SHOWS, 4, {"model_type": "llama"}, EYES, {"scale_factor": 2}, SHRUNK),
    "gemma3": (BOS, GEMMA_SHOWS, 4, SLIDING, SIGLIP, {"mm_tokens_per_image": 4}, SQUARE),
}
SHORT = [[3, 8, 5, 2, 11], [7], [9, 1], [10, 0, 6, 4]]

def family_encoder(family, folder, home):
    """Write a checkpoint of the family, with its head; build an encoder of twelve items on it."""
    opening, _, _, text, vision, both, processor = FAMILIES[family]
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "domains" / "tiny-qwen2.5-vl")
    if opening:
        tokenizer.bos_token = opening
        marks = [(opening, tokenizer.bos_token_id)]
        template = tokenizers.processors.TemplateProcessing(f"{opening} $A", special_tokens=marks)
        tokenizer.backend_tokenizer.post_processor = template
    rope = {"rope_type": "default", "rope_theta": 1e4}
    if family.startswith("qwen"):
        rope |= {"mrope_section": [2, 1, 1], "mrope_interleaved": family.startswith("qwen3")}
        text = text | {"rope_parameters": rope}
    text = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                max_position_embeddings=4096, pad_token_id=0) | text
    config = transformers.AutoConfig.for_model(
        family, text_config=text, vision_config=vision, **both)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    for weight in model.parameters():
        if weight.ndim > 1 or not weight.any():  # wide: everything matters
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names = transformers.models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES
    getattr(transformers, names[family]["pil"])(**processor).save_pretrained(folder)
    side = 4 * processor.get("patch_size", 14)
    run = open_small(home, model=str(folder), out=str(folder / "runs"), image_size=side,
                     lora_dropout=0.0)
    domain = run.domain
    few = dataclasses.replace(domain, item_ids=domain.item_ids[:12], titles=domain.titles[:12],
                              pictures=domain.pictures[:12])
    run = run._replace(domain=few)
    return run, vlm2rec.build_encoder(run)

def own_state(vlm, processor, run, ids, items):
    """The last state of a prompt as the family's model itself gives it, from pixels."""
    ids = torch.tensor([ids])
    inputs = {}
    if items:
        side = "patch_size" in FAMILIES[vlm.config.model_type][-1] and run.config.image_size
        pictures = [vlm2rec.square_picture(run.domain.pictures[item], side) for item in items]
        alone = len(items) == 1 and vlm.config.model_type == "llava_onevision"  # it would be tiled
        pictures += pictures[:alone]
        inputs = dict(processor(images=[pictures], do_resize=not side, return_tensors="pt"))
        if alone:
            inputs = {name: inputs[name][:1] for name in ("pixel_values", "image_sizes")}
            inputs["batch_num_images"] = torch.tensor([2])
        types = (ids == vlm.config.image_token_id).int()
        inputs |= {"mm_token_type_ids": types, "token_type_ids": types}
    known = inspect.signature(vlm.forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in known}
    output = vlm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs)
    return output.last_hidden_state[0, -1]

@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_equals_its_own_forward_on_pixels_and_trains_its_language_layers(
        family, home, tmp_path):
    run, encoder = family_encoder(family, tmp_path, home)
    vlm = encoder.vlm
    whole, tokenizer, processor = vlm2rec.load_vlm(str(tmp_path), "main", "cpu")
    opening, shown, tokens, *_ = FAMILIES[family]
    shown = shown.format(tokens * "<|image_pad|>")
    titles = run.domain.titles
    assert tokenizer.decode(encoder.prompt([3, 7], "interleaved")) == (
        f"{opening}{titles[3]}\n{shown}\n{titles[7]}\n{shown}<|im_end|>")
    vlm2rec.add_lora(vlm, run.config)
    lora = [weight for weight in vlm.parameters() if weight.requires_grad]
    for weight in lora:
        torch.nn.init.normal_(weight, std=0.1)
    decoder = vlm.get_decoder()
    linear = [layer for name, layer in decoder.named_modules() if name.endswith("base_layer")]
    others = [name for name, layer in decoder.named_modules() if "base_layer" not in name
              and "lora_" not in name and type(layer) is torch.nn.Linear]
    assert not others and len(lora) == 2 * len(linear) >= 2 * 14
    for part in decoder.parameters():
        assert part.requires_grad == any(part is weight for weight in lora)

    name = "text_model" if family in ("smolvlm", "idefics3") else "language_model"
    setattr(whole, name, decoder)
    for modality in ("text", "vision", "interleaved"):
        with torch.no_grad():
            ours = encoder(SHORT, modality)
            theirs = [own_state(whole, processor, run, encoder.prompt(items, modality),
                                items if modality != "text" else []) for items in SHORT]
        assert (ours - torch.stack(theirs)).abs().max() < 1e-5
    vlm.train()
    def gradients():
        states = [encoder(SHORT, modality) for modality in ("text", "vision")]
        return torch.autograd.grad(sum(state.square().sum() for state in states), lora)
    checkpointed = gradients()
    assert decoder.is_activation_checkpointing
    decoder.activation_checkpointing_disable()
    for ours, theirs in zip(checkpointed, gradients()):
        assert ours.abs().max() > 0 and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("family, special", [
    ("qwen2_5_vl", "position_ids"), ("qwen3_5", "position_ids"), ("qwen3_vl", "deepstack"),
    ("gemma3", "token_type_ids")])
def test_each_special_case_matters(family, special, home, tmp_path, monkeypatch):
    """Without it, embeddings of pictures would be far from what they are."""
    _, encoder = family_encoder(family, tmp_path, home)
    picture_inputs = vlm2rec.picture_inputs
    def without(*arguments):
        inputs = picture_inputs(*arguments)
        if special == "deepstack":
            output = inputs["mm_encoder_outputs"]["image"]
            output.deepstack_features = [torch.zeros_like(torch.stack(level)).unbind()
                                         for level in output.deepstack_features]
        else:
            del inputs[special]
        return inputs
    with torch.no_grad():
        right = encoder(SHORT, "vision")
        monkeypatch.setattr(vlm2rec, "picture_inputs", without)
        assert (encoder(SHORT, "vision") - right).abs().max() > 0.1

HERE = Path(__file__).parent
ITEMS = "items.csv"
EVENTS = "interactions.csv"

def write_domain(folder, items=None, interactions=None, pictures=True):
    """A small domain: 120 items, 60 users with 12 items each, so that every item has 6 users."""
    folder.mkdir(parents=True, exist_ok=True)
    items = items or [[f"i{k}", f"title {k}", f"images/{k}.png"] for k in range(120)]
    interactions = interactions or [[f"u{u}", f"i{(u * 2 + 5 * k) % 120}", 1000 + k]
                                    for u in range(60) for k in range(12)]
    data.write_csv(folder / ITEMS, ["item_id", "title", "image"], items)
    data.write_csv(folder / EVENTS, ["user_id", "item_id", "timestamp"], interactions)
    (folder / "images").mkdir(exist_ok=True)
    for k in range(120 if pictures else 0):
        Image.new("RGB", (30, 30), (k, 255 - k, 2 * k)).save(folder / "images" / f"{k}.png")
    return folder

def rows_of(folder, name):
    with open(folder / name, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]

def files_of(folder):
    return {path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}

def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()

def plain(mode="RGB", size=(40, 30), kind="JPEG"):
    return encoded(Image.new(mode, size), kind)

# The split and the negatives ----------------------------------------------------------------------

def test_leave_one_out_on_a_user_with_five_items():
    sequence = [10, 11, 12, 13, 14]
    assert data.leave_one_out(sequence, "train") == ([10, 11], 12)
    assert data.leave_one_out(sequence, "valid") == ([10, 11, 12], 13)
    assert data.leave_one_out(sequence, "test") == ([10, 11, 12, 13], 14)
    assert data.leave_one_out(list(range(20)), "test", 10) == (list(range(9, 19)), 19)
    assert data.leave_one_out(list(range(20)), "train", 3) == ([14, 15, 16], 17)

def test_negatives_are_distinct_new_to_the_user_and_depend_on_seed_split_and_user_alone():
    sequence = list(range(0, 60, 3))

    def draw(user="u", split="test", seed=0):
        return data.draw_negatives(user, sequence, 130, split, seed)
    assert len(set(draw())) == len(draw()) == 100 and not set(draw()) & set(sequence)
    assert set(draw()) < set(range(130))
    assert draw() == draw() and draw() != draw(user="v") != draw(split="valid") != draw(seed=1)
    assert draw()[:4] == [26, 89, 120, 122]  # published ranks hang on these
    drawn = [data.draw_negatives(str(u), [0], 201, "test", 0) for u in range(2000)]
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=201)
    assert counts[0] == 0 and (counts[1:] - 1000).abs().max() < 120  # standard deviation 22

def test_validation_scores_everybody_or_2000_fixed_by_the_seed():
    assert data.validation_users(5, 0) == [0, 1, 2, 3, 4]
    some = data.validation_users(3000, 0)
    assert len(set(some)) == 2000 and some == sorted(some) == data.validation_users(3000, 0)
    assert some != data.validation_users(3000, 1)

def test_five_core_reaches_its_fixed_point():
    """At k = 2 dropping user c (one item) leaves item z with one user, whose loss leaves user b
    with one item. With room for 1 other item, b, who has all three, goes first."""
    rows = [("a", "x"), ("a", "y"), ("d", "x"), ("d", "y"), ("b", "x"), ("b", "z"), ("c", "z")]
    assert data.core(rows, 2) == rows[:4]
    assert data.core(rows[:1], 2) == []
    rows = [("a", "x"), ("a", "y"), ("d", "y"), ("d", "x"), ("b", "x"), ("b", "y"), ("b", "z")]
    assert data.core(rows, 1, room=1) == []  # without b's z, x and y are all
    rows += [("c", "z")]
    assert data.core(rows, 1, room=1) == rows[:4] + rows[-1:]

def test_one_customer_with_nearly_everything_is_left_out_by_name(tmp_path):
    events = [[f"u{u}", f"i{(u * 2 + 5 * k) % 120}", k] for u in range(60) for k in range(12)]
    more = [["reseller", f"i{k}", k] for k in range(21)]
    domain = data.read_domain(write_domain(tmp_path / "d", None, events + more))
    assert len(domain.user_ids) == 60 and len(domain.item_ids) == 120
    assert "1 users with too many items for 100 negatives ['reseller']" in data.describe(domain)
    assert domain.dropped["interactions outside the 5-core"] == 21
    events += more[:20]  # 20 of 120 leave 100
    domain = data.read_domain(write_domain(tmp_path / "d", None, events))
    assert domain.user_ids[-1] == "reseller" and len(domain.user_ids) == 61

# The reader ---------------------------------------------------------------------------------------

def test_the_reader_sorts_by_time_keeps_file_order_on_ties_and_the_earliest_of_a_repeat(tmp_path):
    folder = write_domain(tmp_path / "d")
    rows = [row for row in rows_of(folder, EVENTS) if row[0] != "u0"]
    times = ((5, 30), (9, 10), (7, 20), (4, 30), (4, 40), (8, 5), (3, 2e1))
    mine = [["u0", f"i{k}", when] for k, when in times]
    domain = data.read_domain(write_domain(folder, None, mine + rows))
    got = [domain.item_ids[item] for item in domain.sequences[0]]
    assert domain.user_ids[0] == "u0" and got == ["i8", "i9", "i7", "i3", "i5", "i4"]
    assert domain.tied[0] and sum(domain.tied) == 1  # i5 and i4 have one timestamp
    assert domain.dropped["repeated interactions"] == 1

def test_dates_are_utc_unless_they_name_a_zone(monkeypatch):
    """2024-05-01 began 1,714,521,600 seconds after 1970, in UTC; this clock is in Tokyo."""
    monkeypatch.setenv("TZ", "JST-9")
    time.tzset()
    noon = 1714521600 + 12 * 3600
    for date, seconds in {"2024-05-01": noon - 43200, "1969-12-31": -86400,
                          "2024-05-01T12:00:00Z": noon, "2024-05-01 12:00": noon,
                          "2024-05-01T12:00:00+02:00": noon - 7200, "20240501T1200": noon,
                          "2024-05-01T12:00:00.250-05:30": noon + 5.5 * 3600 + 0.25}.items():
        assert data.parse_time(date) == (True, seconds)
    monkeypatch.undo()
    time.tzset()
    assert data.parse_time("20240501") == (False, 20240501)
    for nothing in ("01.05.2024", "2024-02-30", "noon", ""):
        assert numpy.isnan(data.parse_time(nothing)[1])

def edit(name, old, new, count=1):
    """A change of a file of the domain."""
    def change(folder):
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new, count), encoding="utf-8")
    return change

def put(name, content):
    """Another content of a file, None for none, or a function of the old one."""
    def change(folder):
        path = folder / name
        now = content(path.read_bytes()) if callable(content) else content
        path.unlink()
        if now is not None:
            path.write_bytes(now)
    return change

def times(*by_place):
    """Other timestamps: each user's k-th one is the k-th of these, or the last of them."""
    def change(folder):
        rows = rows_of(folder, EVENTS)
        for k, row in enumerate(rows):
            row[2] = by_place[min(k % 12, len(by_place) - 1)]
        write_domain(folder, None, rows, pictures=False)
    return change

def picture(mode, size):
    return put("images/4.png", plain(mode, size, "PNG"))

def ids(make):
    """Other item ids, in both files."""
    def change(folder):
        items = [[make(k), *row[1:]] for k, row in enumerate(rows_of(folder, ITEMS))]
        rows = [[row[0], make(int(row[1][1:])), row[2]] for row in rows_of(folder, EVENTS)]
        write_domain(folder, items, rows, pictures=False)
    return change

def elsewhere(*names):
    """The files lie outside; links lead there, as the hub, DVC and git-annex leave them."""
    def change(folder):
        for name in names:
            target = folder.parent / name.replace("/", "-")
            (folder / name).rename(target)
            (folder / name).symlink_to(target)
    return change

def instead(name, make):
    def change(folder):
        (folder / name).unlink()
        make(folder / name)
    return change

def recode(name, encoding, newline="\r\n", form="NFC"):
    def change(content):
        text = content.decode().replace("\r\n", newline).replace("title 4", "t\u00eftle 4")
        return unicodedata.normalize(form, text).encode(encoding)
    return put(name, change)

def separated(sign):
    def change(folder):
        for name in (ITEMS, EVENTS):
            edit(name, ",", sign, -1)(folder)
    return change

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1048576\n"
LOST, GONE = "items without a decodable picture", "interactions with such items"
ONE = {LOST: 1, GONE: 6}
DAY = 1714521600
INPUTS = {  # what is done to a good domain; words of the refusal, or what is counted as dropped
    "as it is": (lambda folder: None, {}),
    "no items.csv": (put(ITEMS, None), "items.csv is missing .*item_id,title,image"),
    "empty file": (put(ITEMS, b""), "items.csv, line 1: .*item_id,title,image"),
    "only a header": (put(EVENTS, b"user_id,item_id,timestamp\n"), "nothing is left"),
    "column twice": (edit(ITEMS, ",image", ",image,title"), "line 1: .*'item_id,title,image,ti"),
    "unknown item": (edit(EVENTS, "u0,i5,", "u0,no,"), "line 3: item_id 'no' .*'i0', 'i1'. are"),
    "float ids": (edit(EVENTS, ",1", ".0,1", -1), "line 2: item_id 'i0.0' is not in .*'i0'"),
    "no item": (edit(EVENTS, "u0,i5,", "u0,,"), "interactions.csv, line 3: id '' is empty"),
    "item twice but for spaces": (edit(ITEMS, "i4,", " i3 ,"), "line 6: .*'i3' is there twice"),
    "rounded items": (ids(lambda k: f"{6203859599501 + k:.5E}"), "line 2: id '6.20386E.12' is .* rounded"),
    "odd ids": (ids(lambda k: ["NA", "nan", "1", "01", "1.0", "1e5", "1E+05", "100000", "-1",
                               "1.25E+02", "true"][k] if k < 11 else f"i{k}"), {}),
    "odd user": (edit(EVENTS, "u0,", '" u, ""0""\n",', 99), {}),
    "ids in two Unicode forms": (lambda folder: (ids(lambda k: f"caf\u00e9{k}")(folder), recode(
        EVENTS, "utf-8", form="NFD")(folder)), {}),
    "bad time": (edit(EVENTS, "1001", "May 1st"), "line 3: timestamp 'May 1st' is no number"),
    "unknown times are 0": (times("0", "-3600", "32400", DAY), {}),
    "milliseconds, then seconds": (times(DAY * 1000, DAY),
                                   f"has {DAY}000, but .* has {DAY}: .*two units"),
    "basic dates": (times("20240501", "20240502"), {}),
    "basic dates and times": (times("20240501T0900", "20240501"), "two units"),
    "few items": (lambda folder: write_domain(folder, None, [
        [f"u{u}", f"i{k}", k] for u in range(9) for k in range(50)]), "nothing is left: .* 100 "
        "others, .*9 users with too many items .*'u0', 'u1', 'u2'"),
    "no title": (edit(ITEMS, "title 4,", "  ,"), {"items without a title": 1, GONE: 6}),
    "long title": (edit(ITEMS, "title 4,", "long " * 30_000 + ","), {}),
    "a long cell in another column": (lambda folder: [edit(ITEMS, *change)(folder) for change in (
        ("image\n", "image,html\n"), (".png\n", f".png,{'<p>' * 50_000}\n", -1))], {}),
    "no image": (edit(ITEMS, "images/4.png", ""), ONE),
    "path out": (edit(ITEMS, "images/4.png", "../../4.png"), "line 6: '../../4.png' .*copy it"),
    "absolute path": (edit(ITEMS, "images/4.png", "/etc/passwd"), "line 6: '/etc/passwd'"),
    "images is a link": (elsewhere("images"), {}),
    "each file is a link": (elsewhere(ITEMS, EVENTS, *(f"images/{k}.png" for k in range(9))), {}),
    "a link that leads nowhere": (instead("images/4.png", lambda p: p.symlink_to("no")), ONE),
    "a folder": (instead("images/4.png", Path.mkdir), ONE),
    "a FIFO": (instead("images/4.png", os.mkfifo), ONE),
    "a table that is a FIFO": (instead(EVENTS, os.mkfifo), "interactions.csv .*not a regular file"),
    "file names of a Mac": (lambda folder: (edit(ITEMS, "images/4.", "images/\u00e9.")(folder), (
        folder / "images/4.png").rename(folder / "images/e\u0301.png")), {}),
    "pointer for items.csv": (put(ITEMS, POINTER), "items.csv is only a pointer; .*git lfs pull"),
    "pointer for a picture": (put("images/4.png", POINTER), "images/4.png is only a pointer"),
    "semicolons": (separated(";"), {}),
    "tabs": (separated("\t"), {}),
    "spaces around each comma": (separated(" , "), {}),
    "too few fields": (edit(ITEMS, "i4,title 4,", "i4,"), "items.csv, line 6: 2 fields"),
    "too many fields": (edit(ITEMS, "title 4,", "title, 4,"), "line 6: 4 fields.* double quotes"),
    "stray quote": (edit(ITEMS, "title 4,", '"title" 4,'), "items.csv, line 6: "),
    "a quote never closed": (edit(ITEMS, "title 7,", '"title 7,'), "line 9: unexpected end"),
    "a row of two lines before": (lambda folder: [edit(ITEMS, *change)(folder) for change in (
        ("title 2,", '"title\n2",'), ("i7,", ","))], "items.csv, line 10: id '' is empty"),
    "latin-1": (recode(ITEMS, "latin-1"), "items.csv is not UTF-8"),
    "CRLF and BOM": (recode(ITEMS, "utf-8-sig"), {}),
    "50 megapixels": (picture("1", (10_000, 5_000)), ONE),
    "a tracking pixel": (picture("L", (1, 1)), ONE),
    "a divider": (picture("L", (1200, 8)), ONE),
    "a pencil": (picture("L", (200, 10)), {}),
}

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_domain(tmp_path_factory.mktemp("good") / "shop")

@pytest.mark.parametrize("case", INPUTS)
def test_what_is_valid_is_read_and_what_is_not_gets_one_line(case, good, tmp_path):
    folder = tmp_path / "shop"
    subprocess.run(["cp", "-r", good, folder], check=True)
    change, expected = INPUTS[case]
    change(folder)
    before = sorted(folder.rglob("*"))
    if isinstance(expected, str):
        with pytest.raises(data.InputError, match=expected) as error:
            data.read_domain(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 900
    else:
        with warnings.catch_warnings(action="error"):
            domain = data.read_domain(folder)
        assert {reason: count for reason, count in domain.dropped.items() if count} == expected
        assert len(domain.item_ids) == 120 - len(domain.dropped_items)
        assert [item for item, *_ in domain.dropped_items] == ["i4"] * len(domain.dropped_items)
    assert sorted(folder.rglob("*")) == before  # nothing is ever written there

def test_ids_titles_and_dropped_items_are_as_they_were_written(tmp_path):
    items = [[f"i{k}", f"title {k}", f"images/{k}.png"] for k in range(120)]
    items[0] = ["001", 'a "quoted", two-\nline  title', "images/0.png"]
    items[3][2] = "https://example.org/3.png"
    rows = [[f"u{u}", items[(u * 2 + 5 * k) % 120][0], k] for u in range(60) for k in range(12)]
    folder = write_domain(tmp_path / "shop", items, rows)
    domain = data.read_domain(folder)
    assert domain.item_ids[:2] == ["001", "i1"] and domain.user_ids[:2] == ["u0", "u1"]
    assert domain.titles[0] == 'a "quoted", two- line title'
    assert domain.dropped_items == [("i3", "no file", "https://example.org/3.png")]
    said = data.describe(domain)
    assert "'i3': no file 'https://example.org/3.png'" in said and "shop: 60 users, 119" in said
    assert "decided by a tie in time: 0.0%" in said
    digest = data.read_domain(folder).digest
    assert digest == domain.digest
    Image.new("RGB", (30, 30)).save(folder / "images" / "7.png")  # another picture: other data
    assert data.read_domain(folder).digest != digest

def test_a_domain_has_the_name_by_which_it_was_given(tmp_path, monkeypatch):
    write_domain(tmp_path / "toys" / "v1")
    (tmp_path / "mytoys").symlink_to("toys/v1")
    assert data.read_domain(tmp_path / "mytoys").name == "mytoys"
    monkeypatch.chdir(tmp_path / "toys" / "v1" / "images")
    assert data.read_domain("..").name == "v1"
    monkeypatch.chdir(tmp_path / "toys" / "v1")
    assert data.read_domain(".").name == "v1"

@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("name", ["3.png", EVENTS])
def test_what_cannot_be_read_is_not_damaged_but_stops(good, monkeypatch, number, name):
    read = Path.read_bytes

    def failing(path):
        if path.name == name:
            raise OSError(number, os.strerror(number))
        return read(path)
    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(data.InputError, match=f"{name} cannot be read: {os.strerror(number)}"):
        data.read_domain(good)

def test_a_locale_without_utf_8_gets_one_line(tmp_path):
    items = [[f"i{k}", f"title {k}", f"images/\u5199{k}.png"] for k in range(120)]
    write_domain(tmp_path / "domains" / "sample", items)
    env = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    process = subprocess.run([sys.executable, "-B", HERE / "data.py", "sample"], env=env,
                             cwd=tmp_path, capture_output=True)
    assert process.returncode == 2 and process.stderr.count(b"\n") == 1
    assert b"'i0', 'no file', 'images/\\u51990.png'" in process.stderr

# Pictures -----------------------------------------------------------------------------------------

def load(content):
    return data.load_picture(io.BytesIO(content))

@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "LA"])
def test_pictures_of_any_mode_become_rgb(mode):
    white = Image.new("RGB", (40, 20), (255, 255, 255)).convert(mode)
    shown = load(encoded(white, "JPEG" if mode == "CMYK" else "PNG"))
    assert shown.mode == "RGB" and shown.size == (40, 20) and min(shown.getpixel((5, 5))) > 250

def test_transparent_is_white_and_of_several_frames_the_first_is_shown():
    assert load(encoded(Image.new("RGBA", (40, 20)))).getpixel((5, 5)) == (255, 255, 255)
    palette = Image.new("P", (40, 20), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert load(encoded(palette, transparency=1)).getpixel((5, 5)) == (255, 255, 255)
    red, blue = (Image.new("RGB", (40, 20), colour) for colour in ("red", "blue"))
    for kind in ("WEBP", "PNG", "GIF"):
        moving = encoded(red, kind, save_all=True, append_images=[blue])
        assert load(moving).getpixel((5, 5))[0] > 240, kind

def test_a_format_that_starts_programs_is_not_opened():
    with pytest.raises(OSError, match="cannot identify"):  # Pillow would call Ghostscript
        load(plain(kind="EPS"))

def test_16_bits_of_grey_stay_grey_and_pixels_without_a_range_are_refused():
    for dtype, kind in (("<u2", "PNG"), ("<u2", "TIFF"), (">u2", "TIFF")):
        grey = Image.fromarray(numpy.full((20, 40), 40_000, dtype))
        assert load(encoded(grey, kind)).getpixel((5, 5)) == (40_000 // 256,) * 3
    for dtype in ("i4", "f4"):
        with pytest.raises(ValueError, match="deep"):
            load(encoded(Image.fromarray(numpy.ones((20, 40), dtype)), "TIFF"))

def test_a_camera_held_upright_gives_an_upright_picture_and_broken_exif_none_turned():
    upright = Image.Exif()
    upright[0x0112] = 6  # to be turned by 90 degrees
    assert load(encoded(Image.new("RGB", (40, 20)), "JPEG", exif=upright)).size == (20, 40)
    content = plain(kind="PNG")
    exif = b"eXIf\0\x08\0\x02\x01\x12\0\x03"  # garbage; browsers show it
    chunk = struct.pack(">I", len(exif) - 4) + exif + struct.pack(">I", zlib.crc32(exif))
    assert load(content[:33] + chunk + content[33:]).size == (40, 30)

@pytest.mark.skipif(not features.check("avif"), reason="this build of Pillow has no AVIF")
def test_avif_is_a_picture():
    assert load(encoded(Image.new("RGB", (40, 20), "red"), "AVIF")).getpixel((5, 5))[0] > 240

# What is prepared ---------------------------------------------------------------------------------

def python(code, folder, **options):
    """A process that runs `code` in `folder`, with data.py at hand."""
    command = [sys.executable, "-B", "-c", "import data, pathlib, sys, time\n" + code]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": str(HERE)}, **options)

def at_once(count, code, folder):
    """What `count` processes that run `code` from one moment on say, once all have ended well."""
    start = "print('ready', flush=True)\nsys.stdin.read()\n"
    processes = [python(start + code, folder, stdin=subprocess.PIPE) for _ in range(count)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * count
    for process in processes:
        process.stdin.close()
        process.stdin = None
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, said
    return said

def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path):
    hold = "with data.lock(pathlib.Path('new/run')):\n print('held', flush=True)\n time.sleep(60)"
    process, path = python(hold, tmp_path), tmp_path / "new" / "run"
    assert process.stdout.readline() == "held\n"
    with pytest.raises(data.InputError, match=f"^{path}: another run is"), data.lock(path):
        pass
    wait = "with data.lock(pathlib.Path('new/run'), wait=True):\n    print('mine')"
    waiting = python(wait, tmp_path)
    assert waiting.stdout.readline().startswith("waiting for another process, which is preparing")
    process.kill()
    assert waiting.communicate(timeout=30)[0] == "mine\n" and waiting.returncode == 0
    with data.lock(path):  # the file is there, the lock free
        with pytest.raises(data.InputError), data.lock(path):
            pass

@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_nobody_waits(
        tmp_path, monkeypatch, number, capsys):
    def flock(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr("fcntl.flock", flock)
    (tmp_path / ".run.lock").write_text("123\nanother-node\n")  # left by a run that was killed
    with data.lock(tmp_path / "run"):
        pass
    assert re.fullmatch(f"note: .*{tmp_path}/run is where there are no locks.*\n", capsys.readouterr().out)

def test_a_file_appears_when_it_is_whole_with_the_usual_mode_where_there_are_modes(
        tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        with data.whole_file(tmp_path / "x") as partial:
            partial.write_text("x")
            partial.chmod(0o600)  # as safetensors does
            assert not (tmp_path / "x").exists()
        data.write_text(tmp_path / "y", "\u00e9\n")
        data.prepare_model("tiny", tmp_path)
    finally:
        os.umask(before)
    modes = {oct((tmp_path / path).stat().st_mode & 0o777) for path in files_of(tmp_path)}
    assert modes == {"0o640"} and (tmp_path / "y").read_bytes() == b"\xc3\xa9\n"
    with pytest.raises(OSError, match="No space.*y'"), data.whole_file(tmp_path / "y"):
        raise OSError(errno.ENOSPC, "No space left")
    assert (tmp_path / "y").read_bytes() == b"\xc3\xa9\n" and not list(tmp_path.glob("*.part"))

    def refused(*_, **__):
        raise PermissionError(errno.EPERM, "no modes here")
    monkeypatch.setattr(Path, "chmod", refused)
    data.write_csv(tmp_path / "y", ["a", "b"], [[1, "2,3"]])
    assert (tmp_path / "y").read_bytes() == b'a,b\r\n1,"2,3"\r\n'
    data.write_tiny_model(tmp_path / "second")
    assert files_of(tmp_path / "second") == files_of(tmp_path / "tiny-qwen2.5-vl")

def test_processes_that_miss_the_same_sample_world_write_it_once(tmp_path):
    at_once(3, """world = data.write_sample_world
def slowly(folder):
    open('written', 'a').write('x')
    time.sleep(1)
    world(folder, users=200, per_cell=2)
data.write_sample_world = slowly
data.prepare_domain('sample', pathlib.Path('domains'))""", tmp_path)
    assert (tmp_path / "written").read_text() == "x"
    data.write_sample_world(tmp_path / "calm", users=200, per_cell=2)
    assert files_of(tmp_path / "domains" / "sample") == files_of(tmp_path / "calm")

def test_what_is_there_needs_no_lock(tmp_path, monkeypatch):
    """A folder of prepared data may be read-only."""
    write_domain(tmp_path / "sample", pictures=False)
    (tmp_path / "tiny-qwen2.5-vl").mkdir()
    monkeypatch.delattr(data, "lock")
    assert data.prepare_domain("sample", tmp_path) == tmp_path / "sample"
    assert data.prepare_model("tiny", tmp_path) == str(tmp_path / "tiny-qwen2.5-vl")
    assert data.prepare_model("org/name", tmp_path) == "org/name"

def test_where_nothing_can_be_written_the_way_out_is_data_dir(tmp_path):
    (tmp_path / "file").touch()
    for call, name in ((data.prepare_model, "tiny"), (data.prepare_domain, "sample")):
        with pytest.raises(data.InputError, match="cannot write .*give another --data-dir or --out$"):
            call(name, tmp_path / "file" / "domains")

def test_a_tilde_that_the_shell_left_is_home(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_domain(tmp_path / "d" / "sample")
    monkeypatch.setattr(sys, "argv", ["data.py", "sample", "--data-dir=~/d"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert data.main() == 0 and not Path("~").exists()

def test_an_unknown_domain_is_refused_at_once_and_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_domain(Path("domains", "my-shop"), pictures=False)
    before = sorted(tmp_path.rglob("*"))
    for name in ("sampel", "amazon2014", "./sample", "domains/my-shop/items.csv", ""):
        for call in (data.check_domain, data.prepare_domain):
            with pytest.raises(data.InputError, match="items.csv is missing; .*sample, toys"):
                call(name, Path("domains"))
    for known in ("sample", "toys", "my-shop", "./domains/my-shop"):
        assert data.check_domain(known, Path("domains")).name == Path(known).name
    assert sorted(tmp_path.rglob("*")) == before

def test_in_the_sample_world_each_modality_is_clear_about_one_thing(tmp_path, monkeypatch):
    """An item_id starts with its category and its style."""
    shapes, draw = [], data.draw_item
    monkeypatch.setattr(data, "draw_item", lambda rng, shape, hue: shapes.append(shape)
                        or draw(rng, shape, hue))
    data.write_sample_world(tmp_path, users=300, per_cell=3, shape=0.3)
    rows = rows_of(tmp_path, ITEMS)
    assert all(row[1].split()[1] == data.NOUNS[int(row[0][0])] for row in rows)
    brand = sum(row[1].split()[0] == data.BRANDS[int(row[0][1])] for row in rows) / 192
    shape = sum(shape == data.SHAPES[int(row[0][0])] for row, shape in zip(rows, shapes)) / 192
    assert brand == pytest.approx(0.7 + 0.3 / 8, abs=0.1)
    assert shape == pytest.approx(0.3 + 0.7 / 8, abs=0.1)
    for row in rows:
        colours = Image.open(tmp_path / row[2]).convert("HSV").getcolors(9999)
        hue = max(colours, key=lambda colour: (colour[1][1] > 99, colour[0]))[1][0]
        assert abs(hue - 256 * int(row[0][1]) / 8) < 4  # of the most frequent vivid colour
    events = rows_of(tmp_path, EVENTS)
    assert len({row[0] for row in events}) == 300 and events == sorted(events, key=lambda e: e[1])

# Amazon 2014, from a server on the loopback address that speaks the real format -------------------

class Shop(http.server.ThreadingHTTPServer):
    """140 items and 70 users in Amazon's format. `faults` maps a path to answers that come before
    the good one; `log` has every (path, Range header)."""
    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), ShopHandler)
        self.faults, self.log, self.delay = {}, [], 0.0
        self.items = [f"B{k:05}" for k in range(140)]
        self.files = {f"/images/I/{item}.jpg": plain() for item in self.items}
        reviews = [{"reviewerID": f"U{u}", "asin": self.items[(u * 2 + 5 * k) % 140],
                    "reviewText": "\u00e9", "unixReviewTime": 86400 * (k // 2)}
                   for u in range(70) for k in range(12)]
        reviews += [reviews[0] | {"reviewerID": f"U{u}", "asin": "../../odd"} for u in range(9)]
        reviews += [reviews[0] | {"reviewerID": "five", "asin": self.items[k]}
                    for k in (0, 40, 50, 60, 70)]
        reviews.sort(key=lambda row: row["asin"])  # as the real file is
        self.meta = [{"asin": item, "title": f"Toy &amp;  Game {item}", "price": 1.5,
                      "imUrl": f"http://ecx.images-amazon.com/images/I/{item}.jpg"}
                     for item in [*self.items, "never-reviewed", "../../odd"]]
        self.put("/reviews_Toys_and_Games_5.json.gz", map(json.dumps, reviews))
        self.put("/meta_Toys_and_Games.json.gz", map(repr, self.meta))
        self.archives = list(self.files)[-2:]
        self.url = f"http://127.0.0.1:{self.server_port}"

    def put(self, name, lines):
        self.files[name] = gzip.compress("".join(line + "\n" for line in lines).encode(), mtime=0)

    def prepare(self, folder):
        return data.read_domain(data.prepare_domain("toys", folder, self.url + "/"))

class ShopHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        shop = self.server
        shop.log.append((self.path, self.headers.get("Range")))
        time.sleep(shop.delay)
        if shop.faults.get(self.path):
            return shop.faults[self.path].pop(0)(self)
        self.answer(200, shop.files[self.path])

    def answer(self, code, content, cut=None, **headers):
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if start >= len(content) > 0:
            code, content = 416, b""
        elif code == 200 and not headers.pop("whole", False):
            code, content = 206, content[start:]
        self.send_response(code)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content[:cut])
        self.close_connection = True

@pytest.fixture
def shop(monkeypatch):
    """A running Shop; waiting is noted in shop.waits, not done."""
    server = Shop()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.waits = []
    monkeypatch.setattr(data, "sleep", server.waits.append)
    monkeypatch.setattr(data, "TIMEOUT", 0.5)
    yield server
    server.shutdown()
    server.server_close()

def answer(number, content=b"", **options):
    return lambda handler: handler.answer(number, content, **options)

def test_amazon_from_nothing_with_every_fault(shop, tmp_path, capsys):
    """Each fault is handled: tried again, or the item dropped, listed with its reason, counted."""
    def at(k):
        return f"/images/I/{shop.items[k]}.jpg"
    good = shop.files[at(0)]
    shop.faults = {
        at(0): [answer(404)], at(1): [answer(500)], at(2): [answer(429)],
        at(3): [lambda handler: time.sleep(1)] * 4, at(4): [answer(200, good, cut=100)],
        at(5): [answer(200, b"<html>sorry</html>")],
        at(6): [answer(200, plain("P", (1, 1), "GIF"))],
        at(7): [answer(200, plain("1", (10_000, 5_000), "PNG"))], at(8): [answer(200, plain("L"))],
        at(9): [answer(302, Location="http://example.org/x.jpg")],
        at(10): [answer(302, Location="file:///etc/passwd")], at(11): [answer(503)] * 4,
        at(12): [answer(200, good, cut=100), answer(200, good, whole=True)],
        shop.archives[0]: [answer(200, shop.files[shop.archives[0]], cut=1000)]}
    shop.meta[15].pop("title")
    shop.meta[16].pop("imUrl")
    shop.meta[17]["imUrl"] = "http://g-ecx.images-amazon.com/images/G/01/no-img-lg.gif"
    shop.meta[18]["imUrl"] = "http://localhost/private.jpg"
    shop.put(shop.archives[1], map(repr, shop.meta))
    domain = shop.prepare(tmp_path)
    bad = "not a picture, or too large, small or thin"
    odd = "no title, no picture or an odd id"
    dropped = {0: "HTTP 404", 3: "no answer: TimeoutError timed out", 5: bad, 6: bad, 7: bad,
               9: "HTTP 302", 10: "HTTP 302", 11: "no answer: HTTP 503",
               15: odd,
               16: odd, 17: odd, 18: odd}
    listed = {row[0]: row[1] for row in rows_of(tmp_path / "toys", "dropped.csv")}
    assert listed.pop("../../odd") == odd  # it would be a file's name
    assert listed == {shop.items[k]: reason for k, reason in dropped.items()}
    assert domain.item_ids == [item for k, item in enumerate(shop.items) if k not in dropped]
    assert domain.titles[0] == f"Toy & Game {shop.items[1]}"
    mine = [domain.item_ids[item] for item in domain.sequences[domain.user_ids.index("U63")]]
    assert mine == [shop.items[k] for k in (126, 131, 1, 136, 21, 26, 31, 36, 41)]  # two a day
    assert shop.waits.count(4) == 2  # at 3 and 11, after 1 and 2
    assert (shop.archives[0], "bytes=1000-") in shop.log  # the cut download went on
    for k in (4, 12):  # the rest or all came later
        path = tmp_path / "toys" / "images" / f"{shop.items[k]}.jpg"
        assert path.read_bytes() == good
    buyers = {row[0] for row in rows_of(tmp_path / "toys", EVENTS)}
    assert len(buyers) == 70 and "five" not in buyers  # without B00000 that one has four
    said = capsys.readouterr().out
    assert "[71, 141, 854], published [19412, 11924, 167597]" in said and "'HTTP 404': 1" in said
    assert not list(tmp_path.rglob("*.part"))

def test_what_is_there_is_not_fetched_again(shop, tmp_path, monkeypatch):
    """One archive was put there by hand; another one lacks only its final name; then a run was
    killed before its end."""
    (tmp_path / "amazon2014").mkdir()
    first, second = shop.archives
    (tmp_path / "amazon2014" / first[1:]).write_bytes(shop.files.pop(first))
    (tmp_path / "amazon2014" / f"{second[1:]}.part").write_bytes(shop.files[second])
    written = []
    write = data.write_csv
    monkeypatch.setattr(data, "write_csv", lambda path, *rest: written.append(path.name)
                        or write(path, *rest))
    shop.prepare(tmp_path)
    assert written == ["dropped.csv", EVENTS, ITEMS]  # where items.csv is, the domain is whole
    assert dict(shop.log)[second] == f"bytes={len(shop.files[second])}-"
    assert sorted(path for path, _ in shop.log) == sorted(shop.files)
    (tmp_path / "toys" / ITEMS).unlink()
    shop.prepare(tmp_path)
    assert len(shop.log) == len(shop.files)

def test_a_preparation_killed_at_any_moment_goes_on_and_ends_the_same(shop, tmp_path):
    shop.delay = 0.02

    def run(where):
        command = [sys.executable, HERE / "data.py", "toys", "--data-dir", tmp_path / where]
        return subprocess.Popen([*command, "--mirror", shop.url], stdout=subprocess.DEVNULL)
    assert run("calm").wait() == 0
    for asked in (1, 2, 40):
        shop.log.clear()
        process = run("killed")
        while len(shop.log) < asked and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert run("killed").wait() == 0
    assert files_of(tmp_path / "calm") == files_of(tmp_path / "killed")

EVIL = gzip.compress(b"{'asin': 'B00001', 'title': __import__('os').getcwd()}\n")

@pytest.mark.parametrize("spoil", [lambda content: content[:len(content) // 2],
                                   lambda content: b"\0" * 100, lambda content: EVIL])
def test_a_damaged_archive_is_named_and_none_is_run(shop, tmp_path, spoil):
    name = shop.archives[1]
    shop.files[name] = spoil(shop.files[name])
    with pytest.raises(data.InputError, match=f"amazon2014{name} is cut off or dam.*delete it"):
        shop.prepare(tmp_path)
    assert not (tmp_path / "toys" / ITEMS).exists()

def test_without_a_network_one_line_says_where_to_put_what(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "sleep", lambda seconds: None)
    for mirror in ("http://127.0.0.1:9", "nonsense"):
        with pytest.raises(data.InputError, match=f"cannot fetch {mirror}/reviews_Beauty_5.json.gz "
                           f".*put it into {tmp_path / 'amazon2014'}"):
            data.prepare_domain("beauty", tmp_path, mirror)

@pytest.mark.parametrize("number, share", [(403, 1.0), (503, 0.1)])
def test_when_most_pictures_fail_or_many_give_no_answer_it_is_the_network(
        shop, tmp_path, number, share):
    """A link that is dead stays dead, but an outage must not shrink the domain for good."""
    paths = [path for path in shop.files if "images" in path]
    shop.faults = {path: [answer(number)] * 4 for path in paths[:int(share * len(paths))]}
    with pytest.raises(data.InputError, match="check the network, run again"):
        shop.prepare(tmp_path)
    assert not list((tmp_path / "toys").glob("*.csv"))

def test_ctrl_c_ends_in_one_line_at_once(shop, tmp_path):
    """While a server keeps silent, for all 16 threads."""
    shop.faults = {path: [lambda _: time.sleep(60)] for path in shop.files if "imag" in path}
    code = ("import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"sys.argv = ['data.py', 'toys', '--data-dir', '.', '--mirror', {shop.url!r}]\n"
            "sys.exit(data.main())")
    process = python(code, tmp_path, stderr=subprocess.PIPE)
    began = time.monotonic()
    while len(shop.log) < 18 and time.monotonic() < began + 20:
        time.sleep(0.02)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        _, err = process.communicate(timeout=20)
    process.kill()
    assert process.returncode == 2 and time.monotonic() - began < 4
    assert err.strip() == "stopped; the same command goes on from here"

# A run and its files -----------------------------------------------------------------------------

LONG = "Halma basket 7 " * 30  # 90 words of the tiny model, each of them a token

def write_few(folder):
    """A domain of 33 users with 20 of 130 items each: a run takes a second."""
    (folder / "images").mkdir(parents=True)
    ids = [f"i{k}" for k in range(130)]
    ids[14] = "-14"  # ids may begin with a dash
    items = []
    for k, item in enumerate(ids):
        title = f"{data.BRANDS[k % 8]} {data.NOUNS[k // 8 % 8]} {k % 100}"
        if k in (3, 4, 5):
            title = f"{LONG} {k // 4}" if k < 5 else f"Arvo {LONG}"  # 3 and 4 begin alike
        Image.new("RGB", (40, 40), (k, 5 * k % 256, 255 - k)).save(folder / f"images/{k}.png")
        items.append([item, title, f"images/{k}.png"])
    events = [[f"u{n // 20}", ids[n * 7 % 130], n] for n in range(660)]
    data.write_csv(folder / "items.csv", data.ITEMS, [*items, ["lost", "Arvo kite", "none.png"]])
    data.write_csv(folder / "interactions.csv", data.EVENTS, events)

BRIEF = ["--domain", "few", "--epochs", 2, "--lr", 3e-3, "--history", 6, "--revision", "v2",
         "--log-every", 1, "--save-every", 3]  # 4 steps an epoch; checkpoints at 3, 4, 6, 8

@pytest.fixture(scope="session")
def few(home):
    """The home, with domains/few."""
    write_few(home / "domains" / "few")
    return home

@pytest.fixture(scope="session")
def finished(few):
    """A finished run of vlm2rec: its folder, and what it printed, as into a notebook's stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:  # has no reconfigure()
        assert command(few, *BRIEF) == 0
    folder = few / "runs" / "few" / "vlm2rec-seed0"
    return SimpleNamespace(folder=folder, printed=printed.getvalue())

@pytest.fixture
def copied(finished, few, tmp_path):
    """The finished run in a home of its own, which a test may spoil."""
    shutil.copytree(few / "domains" / "few", tmp_path / "domains" / "few")
    (tmp_path / "domains" / "tiny-qwen2.5-vl").symlink_to(few / "domains" / "tiny-qwen2.5-vl")
    shutil.copytree(finished.folder, tmp_path / "runs" / "few" / "vlm2rec-seed0")
    for path in finished.folder.parent.glob("features-*"):
        shutil.copy(path, tmp_path / "runs" / "few")
    return tmp_path

def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def numbers(folder):
    """The bytes that hold a run's numbers, by file."""
    files = ["metrics.json", "ranks.csv", "items.safetensors", "users.safetensors", "config.json"]
    if (folder / "adapter").exists():
        files.append("adapter/adapter_model.safetensors")
    return {name: (folder / name).read_bytes() for name in files}

def told(capsys, code, *words):
    """The one line of an exit code 2; it holds these words."""
    error = capsys.readouterr().err.strip()
    assert code == 2 and len(error.splitlines()) == 1 and error.startswith("error: "), error
    for word in words:
        assert word in error
    return error

def vectors_of(path, kind):
    """(ids, {space: vectors}) of items.safetensors or users.safetensors."""
    with safetensors.safe_open(path / f"{kind}s.safetensors", "pt") as file:
        ids = json.loads(file.metadata()[f"{kind}_ids"])
        return ids, {name: file.get_tensor(name) for name in file.keys()}

def test_a_run_writes_what_the_design_says(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {"adapter", "config.json", "dropped.csv", "items.safetensors", "log.jsonl",
                     "metrics.json", "ranks.csv", "recommendations.png", "table.md",
                     "users.safetensors"}
    metrics = json.loads((finished.folder / "metrics.json").read_text())
    splits = {"test", "test_full", "test_untied", "valid", "popularity", "untrained"}
    assert splits < set(metrics)
    assert metrics["popularity"]["H@20"] == 0  # what comes last had been seen by nobody
    dropped = (finished.folder / "dropped.csv").read_text().splitlines()
    assert dropped == ["item_id,reason,detail", "lost,no file,none.png"]
    log = [json.loads(line) for line in (finished.folder / "log.jsonl").open()]
    assert [line["step"] for line in log] == list(range(1, 9))
    shared = (finished.folder.parent / "table.md").read_text()
    assert shared.startswith("| test, runs in ") and "| vlm2rec | 1 | " in shared
    own = (finished.folder / "table.md").read_text()
    assert own.startswith("The test's N@10 is ") and "| queries | f2f" in own
    assert own in finished.printed and shared in finished.printed
    assert Image.open(finished.folder / "recommendations.png").size == (1160, 600)

def test_titles_that_are_cut_are_told(finished):
    assert "a picture takes 4 tokens; 3 titles are cut at 64, to 2 different ones" in finished.printed

def test_the_metrics_are_those_of_the_exported_files(finished, few):
    """H@k and N@k by hand from interactions.csv, items and users.safetensors."""
    item_ids, e = vectors_of(finished.folder, "item")
    user_ids, z = vectors_of(finished.folder, "user")
    bought = {}
    for _, user, item in data.read_csv(few / "domains/few/interactions.csv", data.EVENTS[:2]):
        bought.setdefault(user, []).append(item_ids.index(item))
    metrics = json.loads((finished.folder / "metrics.json").read_text())
    rows = list(data.read_csv(finished.folder / "ranks.csv", ("user_id", "item_id", "rank",
                                                              "rank_full")))
    assert [row[1] for row in rows] == user_ids == list(bought)
    for split in ("test", "test_full"):
        hits, gain = 0, 0.0
        for number, (_, user, target, rank, rank_full) in enumerate(rows):
            own = set(bought[user])
            assert target == item_ids[bought[user][-1]]
            others = [item for item in range(130) if item not in own]
            if split == "test":
                drawn = random.Random(f"0 test {user}").sample(range(130), 100 + len(own))
                others = [item for item in drawn if item not in own][:100]
            candidates = e["fused"][[bought[user][-1], *others]]
            scores = torch.cosine_similarity(z["fused"][number:number + 1], candidates)
            place = 1 + int((scores[1:] > scores[0]).sum())
            assert float(rank if split == "test" else rank_full) == place
            hits += place <= 20
            gain += 1 / math.log2(1 + place) if place <= 20 else 0
        assert metrics[split]["H@20"] == pytest.approx(hits / len(rows))
        assert metrics[split]["N@20"] == pytest.approx(gain / len(rows))
    assert metrics["test"]["H@20"] > 0

def test_the_code_of_the_adapters_card_gives_the_item_embeddings_back(finished, few):
    """With transformers, peft and pixels alone; the base is that of --revision."""
    folder = finished.folder / "adapter"
    card = (folder / "README.md").read_text()
    code = [line.strip() for line in card.splitlines() if line.startswith("    ")]
    assert 'revision="v2"' in code[0] and "--method vlm2rec, trained on few" in card
    names = {"transformers": transformers, "peft": peft}
    exec("\n".join(code).replace("the path of this folder", str(folder)), names)
    vlm = names["vlm"].eval()
    base = few / "domains" / "tiny-qwen2.5-vl"
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    processor = transformers.AutoImageProcessor.from_pretrained(base, backend="pil")
    item_ids, stored = vectors_of(finished.folder, "item")
    picture = Image.open(few / "domains/few/images/77.png").resize((56, 56))
    pixels = processor(images=[picture], do_resize=False, return_tensors="pt")
    shown = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|><|im_end|>"
    shown = tokenizer(shown, return_tensors="pt").input_ids
    title = tokenizer("Fjord kettle 77<|im_end|>", return_tensors="pt").input_ids
    with torch.no_grad():
        e_text = vlm(input_ids=title).last_hidden_state[0, -1]
        e_vision = vlm(input_ids=shown, mm_token_type_ids=(shown == shown[0, 1]).int(),
                       **pixels).last_hidden_state[0, -1]
    for space, e in (("text", e_text), ("vision", e_vision), ("fused", e_text + e_vision)):
        torch.testing.assert_close(stored[space][item_ids.index("i77")], e, atol=1e-5, rtol=0)
    trained = load_file(folder / "adapter_model.safetensors")
    assert all(weight.any() for weight in trained.values())  # LoRA's B begins as 0

TERMS = {  # what a method writes to its log, beside the loss
    "vlm2rec": "gap weight alpha beta wpcl crtr", "sft": "infonce", "vanilla": None,
    "text": "infonce", "vision": "infonce", "internal": "infonce", "no-wpcl": "crtr",
    "no-penalty": "infonce crtr", "no-stopgrad": "gap weight alpha beta wpcl crtr",
    "no-crtr": "gap weight alpha beta wpcl", "sda": "infonce cmsa", "sasrec": "", "gru4rec": "",
    "mean-pool": None}

@pytest.mark.parametrize("method", vlm2rec.METHODS)
def test_each_method_runs_and_nothing_of_its_model_stays_alive(method, few, tmp_path, monkeypatch):
    alive = []
    make = vlm2rec.make_model
    def watched(run):
        model, lora = make(run)
        alive.extend(weakref.ref(part) for part in (model, lora) if isinstance(part, torch.nn.Module))
        return model, lora
    monkeypatch.setattr(vlm2rec, "make_model", watched)
    numpy.save(tmp_path / "v.npy", numpy.eye(131, 8, dtype="f4"))
    flags = ["--embeddings", tmp_path / "v.npy"] if method == "mean-pool" else []
    gc.disable()
    code = command(few, "--domain", "few", "--method", method, "--epochs", 1, "--batch", 4,
                   "--train-users", 4, "--log-every", 1, "--out", tmp_path, *flags)
    gc.enable()
    assert code == 0 and not any(reference() for reference in alive)
    folder = next(tmp_path.glob(f"few/{method}*-seed0"))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert all(map(math.isfinite, metrics["test"].values()))
    spaces = {*vlm2rec.METHODS[method].modalities, "fused"}
    assert set(load_file(folder / "users.safetensors")) == spaces
    assert ("geometry" in metrics) == (len(spaces) == 3)
    assert ("untrained" in metrics) == (folder / "log.jsonl").exists() == (TERMS[method] is not None)
    if TERMS[method] is not None:
        line = json.loads((folder / "log.jsonl").open().readline())
        assert set(line) == {"step", "loss", "seconds", "minutes_left", *TERMS[method].split()}

def test_an_adapter_is_evaluated_without_training(finished, few, tmp_path, monkeypatch):
    monkeypatch.delattr(vlm2rec, "train")
    assert command(few, *BRIEF, "--adapter", finished.folder / "adapter", "--out", tmp_path) == 0
    folder = next((tmp_path / "few").glob("vlm2rec+*adapter-seed0"))
    assert numbers(folder)["ranks.csv"] == numbers(finished.folder)["ranks.csv"]
    assert "untrained" not in json.loads((folder / "metrics.json").read_text())

@pytest.mark.parametrize("method", ["vlm2rec", "sasrec"])
def test_a_seed_gives_the_same_weights_and_another_one_others(method, home):
    def weights(seed):
        model, _ = vlm2rec.make_model(open_small(home, method=method, seed=seed))
        return torch.cat([weight.flatten() for _, weight in model.named_parameters()
                          if weight.requires_grad])
    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))

# Training: what is kept, what is drawn -----------------------------------------------------------

class Walker(torch.nn.Module):
    """A model that goes one down in each step; four epochs, patience two."""
    def __init__(self):
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(1))
        self.groups = [{"params": [self.place], "lr": 1.0}]
        self.schedule = (110, 4, 2)  # half of the small world's 220 users: two steps an epoch

    def terms(self, batch):
        return {"loss": self.place.sum()}

@pytest.mark.parametrize("scores, kept, looks", [
    ([.4, .3, .2], 0, 3),          # the untrained model is a candidate; two epochs without a gain
    ([.1, .1, .1], 0, 3),          # an equal score is no gain
    ([.1, .3, .2, .2], -2, 4),     # the first epoch, two steps down
    ([.1, .2, .3, .4, .5], -8, 5)])
def test_the_best_epoch_on_validation_is_kept(scores, kept, looks, home, tmp_path, monkeypatch):
    seen = []
    def scripted(model, valid):
        seen.append(scores[len(seen)])
        return {"N@10": seen[-1]}
    monkeypatch.setattr(vlm2rec, "validate", scripted)
    run = open_small(home)
    model = Walker()
    found = vlm2rec.train(model, run.domain, None, run.config, tmp_path)
    assert model.place.item() == pytest.approx(kept, abs=1e-4) and len(seen) == looks
    assert found == {"untrained": {"N@10": scores[0]}, "valid": {"N@10": max(scores)}}

def test_dropout_is_another_one_in_each_step(home, tmp_path, monkeypatch):
    run = open_small(home, lr=1e-30, log_every=1, batch=2, epochs=1)
    model, _ = vlm2rec.make_model(run)
    for weight in model.lora:
        torch.nn.init.normal_(weight, std=0.1)
    [(_, _, batch), *_] = vlm2rec.training_batches(run.domain, 2, 1, run.config)
    same = [(step, 1, batch) for step in (1, 2)]
    monkeypatch.setattr(vlm2rec, "training_batches", lambda *_: same)
    monkeypatch.setattr(vlm2rec, "validate", lambda *_: {"N@10": 0.0})
    vlm2rec.train(model, run.domain, None, run.config, tmp_path)
    first, second = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").open()]
    assert first != second

# Killed, stopped, started twice ------------------------------------------------------------------

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["vlm2rec"])

def in_a_process(folder, flags, module="", function="", call=0, limit=0, errors=os.devnull):
    """The body of `process`."""
    sys.stdout = open(os.devnull, "w")
    sys.stderr = open(errors, "w")
    if function:
        module = sys.modules[module]
        real = getattr(module, function)
        calls = []
        def fatal(*arguments):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)
        setattr(module, function, fatal)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(command(folder, *flags))

def process(*arguments, **options):
    """The exit code of `command` in a process of its own, which kills itself in the n-th `call` of
    a module's function, or can write no file over a `limit`."""
    child = FORKS.Process(target=in_a_process, args=arguments, kwargs=options)
    child.start()
    child.join()
    return child.exitcode

SASREC = ["--domain", "few", "--method", "sasrec", "--batch", 4, "--train-users", 4,
          "--log-every", 1, "--save-every", 1]

@pytest.mark.parametrize("flags, moments", [
    (BRIEF, [("vlm2rec", "log_step", 5),  # in step 5, saved was 4
             ("os", "replace", 3),        # before the checkpoint of step 6 takes its place
             ("os", "replace", 5),        # before the adapter does,
             ("os", "replace", 8),        # ranks.csv,
             ("os", "replace", 10)]),     # table.md
    (SASREC, [("vlm2rec", "validate", 4), ("os", "replace", 5), ("vlm2rec", "log_step", 9)])])
def test_a_run_killed_at_any_moment_ends_in_the_same_bytes(flags, moments, finished, few, tmp_path):
    method = "sasrec" if "sasrec" in flags else "vlm2rec"
    calm = few / "runs" / "few" / f"{method}-seed0"
    if not calm.exists():
        assert command(few, *flags) == 0
    for moment in moments:
        assert process(few, [*flags, "--out", tmp_path], *moment) == -signal.SIGKILL
        assert not (tmp_path / "few" / calm.name / "table.md").exists()
    assert process(few, [*flags, "--out", tmp_path]) == 0
    assert numbers(tmp_path / "few" / calm.name) == numbers(calm)
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("checkpoint.pt"))

def test_a_full_disk_gets_one_line_and_leaves_the_last_checkpoint(few, tmp_path):
    """A limit on a file's size stands for the disk."""
    flags = [*BRIEF, "--out", tmp_path / "out"]
    checkpoint = tmp_path / "out" / "few" / "vlm2rec-seed0" / "checkpoint.pt"
    assert process(few, flags, "vlm2rec", "log_step", 4) == -signal.SIGKILL
    kept = checkpoint.read_bytes()
    errors = tmp_path / "errors"
    assert process(few, flags, limit=len(kept) // 2, errors=errors) == 2
    assert [line.split(":")[0] for line in errors.read_text().splitlines()] == ["error"]
    assert checkpoint.read_bytes() == kept and not list(tmp_path.rglob("*.part"))

def test_of_two_runs_in_one_folder_the_second_gets_one_line(few, tmp_path, capsys):
    with data.lock(tmp_path / "few" / "sft-seed0"):
        code = command(few, "--domain", "few", "--method", "sft", "--out", tmp_path)
    told(capsys, code, "sft-seed0: another run is at work there; wait, or give")

def test_a_finished_run_is_shown_wherever_it_was_written(copied, monkeypatch, capsys):
    """On another device, in a folder that cannot be written; nothing is done again."""
    folder = copied / "runs" / "few" / "vlm2rec-seed0"
    config = json.loads((folder / "config.json").read_text()) | {"device": "cuda", "python": "3.9"}
    (folder / "config.json").write_text(json.dumps(config))
    before = contents(copied)
    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")
    for name in ("lock", "whole_file"):
        monkeypatch.setattr(data, name, refuse)
    assert command(copied, *BRIEF) == 0
    printed = capsys.readouterr().out
    assert f"{folder} is finished since " in printed and "| test, runs in " in printed
    assert command(copied, *BRIEF, "--recommend", "i1") == 0
    assert contents(copied) == before

@pytest.mark.parametrize("flags, named", [
    (["--lr", 0.5], "holds a run with lr 0.003: remove it"),
    (["--epochs", 3, "--tau", 1], "holds a run with epochs 2, tau 0.1: remove it")])
@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_a_run_with_other_settings_is_named_and_left_alone(flags, named, state, copied, capsys):
    folder = copied / "runs" / "few" / "vlm2rec-seed0"
    if state == "unfinished":
        (folder / "table.md").rename(folder / "checkpoint.pt")
    before = contents(copied)
    told(capsys, command(copied, *BRIEF, *flags), named)
    assert contents(copied) == before

def test_changed_data_and_changed_vectors_are_named(copied, capsys):
    vectors = copied / "v.npy"
    pool = ["--domain", "few", "--method", "mean-pool", "--embeddings", vectors]
    numpy.save(vectors, numpy.eye(131, 8))
    assert command(copied, *pool) == 0
    numpy.save(vectors, numpy.eye(131, 9))
    before = contents(copied / "runs")
    told(capsys, command(copied, *pool), "holds a run with embeddings ")
    Image.new("RGB", (40, 40), "red").save(copied / "domains/few/images/9.png")
    vlm2rec.read_domain.cache_clear()
    told(capsys, command(copied, *BRIEF), "holds a run with data ")
    told(capsys, command(copied, *BRIEF, "--recommend", "i1"), "few has changed since that run")
    assert contents(copied / "runs") == before

def test_what_changes_no_number_blocks_nothing_nor_does_a_run_that_came_to_nothing(copied):
    assert command(copied, *BRIEF, "--save-every", 9, "--checkpointing", "off", "--device", "cpu") == 0
    folder = copied / "runs" / "few" / "gru4rec-seed0"
    folder.mkdir()
    (folder / "config.json").write_text('{"lr": 7}')  # no checkpoint beside it
    (folder / "notes.txt").write_text("mine")
    assert command(copied, *SASREC, "--method", "gru4rec") == 0
    assert (folder / "notes.txt").read_text() == "mine"

@pytest.mark.parametrize("name, content, words", [
    ("config.json", b"{", ["config.json is missing or damaged"]),
    ("config.json", None, ["config.json is missing or damaged"]),
    ("metrics.json", b"", ["metrics.json is missing or damaged"]),
    ("ranks.csv", None, ["ranks.csv is missing"])])
def test_a_finished_run_with_a_damaged_file_says_so(name, content, words, copied, capsys):
    shutil.copytree(copied / "runs/few/vlm2rec-seed0", copied / "runs/few/sft-seed0")
    path = copied / "runs" / "few" / "vlm2rec-seed0" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    told(capsys, command(copied, *BRIEF), str(path.parent), *words)

def test_a_damaged_checkpoint_is_named(copied, capsys):
    folder = copied / "runs" / "few" / "vlm2rec-seed0"
    (folder / "table.md").unlink()
    for content in (b"PK and half of it", None):
        torch.save([{}, {}, {"step": 1}], folder / "checkpoint.pt")  # of another model
        if content:
            (folder / "checkpoint.pt").write_bytes(content)
        told(capsys, command(copied, *BRIEF), "checkpoint.pt is damaged; remove it to begin anew")

# The table of all runs ---------------------------------------------------------------------------

def plant(folder, name, seed, score, ranks, settings):
    """A finished run with this H@k and N@k, and these ranks of its users."""
    run = folder / f"{name}-seed{seed}"
    run.mkdir()
    columns = dict.fromkeys(("H@10", "N@10", "H@20", "N@20"), score)
    (run / "table.md").touch()
    (run / "metrics.json").write_text(json.dumps({"test": columns}))
    (run / "config.json").write_text(json.dumps(settings | {"method": name, "seed": seed}))
    rows = [[f"u{k}", "i", rank, rank] for k, rank in enumerate(ranks)]
    data.write_csv(run / "ranks.csv", ["user_id", "item_id", "rank", "rank_full"], rows)

def test_the_comparison_by_hand(tmp_path):
    """A user's N@10 is 1 at rank 1, 1 / log2(4) = .5 at rank 3 and 0 beyond rank 10."""
    settings = {"lr": 0.1, "data": "d", "adapter": "", "embeddings": ""}
    plant(tmp_path, "vlm2rec", 0, 0.1, [1, 1, 1, 1], settings)
    plant(tmp_path, "vlm2rec", 1, 0.3, [1, 1, 1, 1], settings)
    plant(tmp_path, "sft", 0, 0.1, [3, 3, 1, 1], settings)    # .25 below
    plant(tmp_path, "sft", 1, 0.2, [3, 11, 3, 11], settings)  # .75 below: t = 2, one degree
    plant(tmp_path, "text", 1, 0.2, [3, 1, 11, 3], settings)  # users .5 0 1 .5: t = 6 ** .5, three
    plant(tmp_path, "text", 2, 0.2, [1, 1, 1, 1], settings)   # not a seed of vlm2rec's
    plant(tmp_path, "vision", 7, 0.123456, [1, 1, 1, 1], settings)
    plant(tmp_path, "sda", 0, 0.5, [1, 1, 1, 1], settings | {"lr": 0.2})
    (tmp_path / "unfinished-seed0").mkdir()
    rows = [line.strip("| ").split(" | ")
            for line in vlm2rec.comparison(tmp_path, settings).splitlines()]
    four = ["0.2000 ± 0.1414"] * 4
    assert rows[0] == [f"test, runs in {tmp_path}", "seeds", "H@10", "N@10", "H@20", "N@20",
                       "vlm2rec above it, N@10"]
    assert rows[2:] == [
        ["sft", "2", *["0.1500 ± 0.0707"] * 4, "+0.5000, p 0.3 (2 seeds)"],
        ["text", "2", *["0.2000 ± 0.0000"] * 4, "+0.5000, p 0.092 (4 users)"],
        ["vision", "1", *["0.1235"] * 4, "-"],
        ["vlm2rec", "2", *four, "-"],
        ["sda (lr 0.2)", "1", *["0.5000"] * 4, "-"]]

def test_vectors_of_one_file_name_are_rows_of_one_table(few, tmp_path, capsys):
    paths = [tmp_path / name / "emb.npy" for name in ("bert", "clip", "x" * 200)]
    for k, path in enumerate(paths):
        path.parent.mkdir()
        numpy.save(path, numpy.eye(131, 5 + k))
    pool = ["--domain", "few", "--method", "mean-pool", "--out", tmp_path / "o", "--embeddings"]
    assert command(few, *pool, *paths) == 0
    table = (tmp_path / "o" / "few" / "table.md").read_text()
    assert "bert-emb | 1 |" in table and "clip-emb | 1 |" in table and "xxx-emb | 1 |" in table
    assert table in capsys.readouterr().out

def test_two_linked_domains_of_one_name_have_two_folders(few, tmp_path):
    folders = []
    for name in ("toys", "beauty"):
        (tmp_path / name).symlink_to(few / "domains" / "few")
        folders.append(open_small(few, data_dir=str(tmp_path), domain=name).folder)
    assert [folder.parent.name for folder in folders] == ["toys", "beauty"]

def test_ranks_are_written_in_full_and_the_verdict_may_be_no(few, tmp_path):
    run = open_small(few, domain="few")._replace(folder=tmp_path)
    test = vlm2rec.make_evaluation(run.domain, "test", 10, 0)
    full = torch.full((33,), 123456.5)
    for rank, verdict in ((1.0, "The test's N@10 is above popularity's"),
                          (50.0, "The test's N@10 is NOT above popularity's")):
        text = vlm2rec.write_results(run, test, (torch.full((33,), rank), full), {}, {})
        assert text.startswith(verdict) and "nan" not in text
    rows = list(data.read_csv(tmp_path / "ranks.csv", ("rank", "rank_full")))
    assert rows[0][1:] == ("50.0", "123456.5")

# Recommendations ---------------------------------------------------------------------------------

def recommended(few, *history):
    """Rows of --recommend, without a flag of the training, the model included."""
    flags = ["--domain", "few", "--data-dir", few / "domains", "--out", few / "runs"]
    return vlm2rec.main([*map(str, flags), "--recommend", *history])

def test_recommended_are_the_ten_best_items_that_one_has_not(finished, few, capsys):
    item_ids, e = vectors_of(finished.folder, "item")
    _, z = vectors_of(finished.folder, "user")
    owned = [item_ids[n * 7 % 130] for n in range(19)]  # u0's, but for the last
    assert owned[2] == "-14"
    assert recommended(few, *owned[2:], *owned[:2], *owned[2:]) == 0
    shown = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()[-10:]]
    scores = torch.cosine_similarity(z["fused"][:1], e["fused"])  # u0's latest items are the same
    scores[[item_ids.index(item) for item in owned]] = -1
    best = scores.topk(10)
    assert [row[2] for row in shown] == [item_ids[item] for item in best.indices]
    assert [float(row[1]) for row in shown] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert [row[0] for row in shown] == [str(rank) for rank in range(1, 11)]
    told(capsys, recommended(few, "i1", "nosuch"), "--recommend", "has no item nosuch")

def test_drawings_tell_titles_apart_and_frame_the_target(few):
    domain = open_small(few, domain="few").domain
    def drawn(title, item, target=None):
        titles = list(domain.titles)
        titles[item] = title
        other = SimpleNamespace(**vars(domain) | {"titles": titles, "pictures": [domain.pictures[0]] * 130})
        return numpy.asarray(vlm2rec.draw(other, {"row": [item]}, target))
    assert (drawn("\u6905\u5b50", 1) != drawn("\u673a\u4e0a", 2)).any()  # their ids are drawn
    assert (drawn("Arvo kite", 1) == drawn("Arvo kite", 2)).all()
    green = (drawn("Arvo kite", 1, target=1) == (0, 128, 0)).all(axis=2).sum()
    assert green > 800 and not (drawn("Arvo kite", 1, target=2) == (0, 128, 0)).all(axis=2).any()

# Bad input ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ("--seed -1", "--seed -1: take a larger one"), ("--epochs 0", "--epochs 0"),
    ("--batch 1", "--batch 1"), ("--history 0", "--history 0"), ("--tau 0", "--tau 0"),
    ("--tau-crtr 0", "--tau-crtr 0"), ("--tau nan", "--tau nan"), ("--lam inf", "--lam inf"),
    ("--lr -1", "--lr -1"), ("--save-every 0", "--save-every 0"),
    ("--log-every 0", "--log-every 0"), ("--batch 34", "--batch 34 is more than there are users"),
    ("--train-users 7", "--batch 8 is more"), ("--domain nowhere", "nowhere/items.csv is missing"),
    ("--domain ./nowhere", "nowhere/items.csv is missing"), ("--device cuda", "--device cpu can"),
    ("--embeddings no.npy --method mean-pool", "no.npy"),
    ("--method mean-pool", "--embeddings"), ("--adapter nowhere", "nowhere"),
    ("--model ./nope", "--model ./nope does not load"), ("--image-size 57", "a multiple of 28"),
    ("--model nobody/nothing", "--model nobody/nothing does not load"),
    ("--lora-rank 0", "LoRA, or --adapter"), ("--lora-dropout 2", "LoRA, or --adapter"),
    ("--method sda --lora-rank 6", "LoRA, or --adapter"), ("--lr 1e30", "not finite; lower --lr"),
    ("--method sasrec --recommend i1", "error"), ("--recommend i1", "config.json is missing")])
def test_a_bad_flag_gets_one_line(flags, words, few, tmp_path, capsys):
    flags = ["--domain", "few", "--out", tmp_path, "--log-every", "1", *flags.split()]
    told(capsys, command(few, *flags), words)
    assert not list(tmp_path.rglob("table.md"))

@pytest.mark.parametrize("flags", ["--epochs x", "--nosuch 1", "--method best", "--epoch 1"])
def test_a_flag_that_there_is_not_is_refused(flags, few):
    with pytest.raises(SystemExit, match="2"):
        command(few, *flags.split())

def spoilt_model(few, folder, change):
    """A copy of the tiny model, its weights or its configuration changed."""
    shutil.copytree(few / "domains" / "tiny-qwen2.5-vl", folder)
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if change == "a pointer":
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1048576\n"
        (folder / "model.safetensors").write_text(pointer)
    elif change == "weights missing":
        kept = {name: w for name, w in weights.items() if "visual.blocks.0" not in name}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
    elif change == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif change == "another family":
        config = {"model_type": "bert"}
    elif change == "a short context":
        config["text_config"]["max_position_embeddings"] = 20
    (folder / "config.json").write_text(json.dumps(config))

@pytest.mark.parametrize("change, words", [
    ("a pointer", "git-lfs pointers"), ("weights missing", "lack ['visual.blocks.0"),
    ("no tokenizer", "does not load"), ("another family", "does not load"),
    ("a short context", "tokens, the model holds 20: shorten --history")])
def test_a_model_that_does_not_fit_gets_one_line(change, words, few, tmp_path, capsys):
    spoilt_model(few, tmp_path / "m", change)
    told(capsys, command(few, *BRIEF, "--out", tmp_path, "--model", tmp_path / "m", "--image-size",
                         56), words)

def of_rank_4(weights):
    return {name: weight[:4] if "lora_A" in name else weight[:, :4]
            for name, weight in weights.items()}

@pytest.mark.parametrize("spoil, words", [
    (of_rank_4, "does not fit"),
    (lambda weights: dict(list(weights.items())[::2]), "it has other tensors"),
    (lambda weights: weights | {"more": torch.ones(1)}, "it has other tensors"),
    (lambda weights: {name: weight * math.nan for name, weight in weights.items()}, "not finite")])
def test_an_adapter_of_another_shape_gets_one_line(spoil, words, finished, few, tmp_path, capsys):
    shutil.copytree(finished.folder / "adapter", tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: w.contiguous() for name, w in spoil(load_file(path)).items()}, path)
    told(capsys, command(few, *BRIEF, "--out", tmp_path, "--adapter", tmp_path / "a"), words)

def test_a_folder_that_cannot_be_written_gets_one_line(few, tmp_path, capsys):
    (tmp_path / "file").touch()
    told(capsys, command(few, *BRIEF, "--out", tmp_path / "file"), str(tmp_path / "file"))

@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")])
def test_memory_that_runs_out_gets_one_line(error, few, monkeypatch, capsys):
    def fail(run):
        raise error
    monkeypatch.setattr(vlm2rec, "execute", fail)
    told(capsys, command(few, *BRIEF), "out of memory: try --checkpointing on")

def test_a_defect_of_ours_keeps_its_traceback_and_ctrl_c_has_none(few, monkeypatch, capsys):
    def fail(run):
        raise error
    monkeypatch.setattr(vlm2rec, "execute", fail)
    for error in (RuntimeError("shapes differ"), KeyError("x"), AttributeError()):
        with pytest.raises(type(error)):
            command(few, *BRIEF)
    error = KeyboardInterrupt()
    told(capsys, command(few, *BRIEF), "the same command goes on from the last checkpoint")

@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("x"),
                                   torch.AcceleratorError("an illegal address")])
def test_what_is_not_the_files_fault_passes_through_readable(error):
    with pytest.raises(type(error)), vlm2rec.readable("a file"):
        raise error
    with pytest.raises(data.InputError, match="a file: KeyError"), vlm2rec.readable("a file"):
        raise KeyError()

@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), AssertionError("no CUDA")])
def test_a_gpu_that_cannot_be_used_gets_one_line(error, few, monkeypatch, capsys):
    def fail(*shape, device):
        assert device == "cuda"
        raise error
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch, "zeros", fail)
        code = command(few, *BRIEF)
    told(capsys, code, "--device cuda cannot be used, --device cpu can", str(error))

def test_output_can_be_followed_in_any_terminal_or_none(finished, few, monkeypatch):
    """A line appears when it is whole, letters that ASCII lacks are spelt out."""
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    for stdout in (terminal, None):  # None: >&-
        monkeypatch.setattr(sys, "stdout", stdout)
        assert command(few, *BRIEF) == 0
    terminal.write("\u00b1\n")
    assert terminal.buffer.getvalue().endswith(b"\\xb1\n")

def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/me")
    flags = ["domain", "model", "adapter", "embeddings", "data-dir", "out"]
    [config], _ = vlm2rec.parse_config([f"--{flag}=~/{flag}" for flag in flags])
    assert [getattr(config, flag.replace("-", "_")) for flag in flags] == [
        f"/me/{flag}" for flag in flags]

def test_help_names_every_flag_and_method(capsys):
    with pytest.raises(SystemExit, match="0"):
        vlm2rec.main(["--help"])
    text = capsys.readouterr().out
    names = [option.name for option in vlm2rec.fields(vlm2rec.Config)] + ["seeds", "recommend"]
    for name in names:
        assert f"--{name.replace('_', '-')} " in text
    text = "".join(text.split())
    assert all(method in text for method in vlm2rec.METHODS) and "%" not in text

def test_importing_has_no_effect(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state(), torch.get_default_dtype(), dict(os.environ)
    spec = importlib.util.spec_from_file_location("again", Path(vlm2rec.__file__).resolve())
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert torch.equal(state[0], torch.get_rng_state()) and not any(capsys.readouterr())
    assert state[1:] == (torch.get_default_dtype(), dict(os.environ)) and not any(tmp_path.iterdir())
