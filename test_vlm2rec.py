# SPDX-License-Identifier: MIT
"""Tests that teach: every equation against a slow transcription, the protocol by hand, the encoder
against ten models' own forward passes, the data, runs and whatever people do to them."""
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests hide a GPU
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import contextlib
import csv
import errno
import functools
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
import subprocess
import sys
import threading
import time
import tracemalloc
import unicodedata
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock, patch

import numpy
import peft
import pytest
import safetensors
import tokenizers
import torch
import transformers
from PIL import Image, features
from pytest import approx
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import data
import vlm2rec

each = pytest.mark.parametrize  # a test of each row
TINY = "domains/tiny-qwen2.5-vl"
RUN = "few/vlm2rec-seed0"

@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A folder with a domain of few users (domains/few) and the tiny model, made once."""
    folder = tmp_path_factory.mktemp("home")
    write_few(folder / "domains/few")
    data.prepare_model("tiny", folder / "domains")
    return folder

def command(folder, *flags):
    """vlm2rec.main on few, a domain of `folder`, results in folder/runs: the exit code. A string
    holds flags with their values, a path is a value."""
    flags = ["--domain few --model tiny --data-dir", folder / "domains", "--out", folder / "runs",
             *flags]
    words = [flag.split() if isinstance(flag, str) else [str(flag)] for flag in flags]
    return vlm2rec.main(sum(words, []))

def open_few(few, **settings):
    """An opened run on it; settings as of vlm2rec.Config."""
    paths = {"domain": "few", "data_dir": str(few / "domains"), "out": str(few / "runs")}
    return vlm2rec.open_run(vlm2rec.Config(**{**paths, "model": "tiny", **settings}))

def refused(words):
    """That a user's mistake gets a message which matches these words."""
    return pytest.raises(data.InputError, match=words)

# ---- The equations, transcribed: floats and loops ----

TAU, TAU_CRTR, LAM = 0.3, 0.2, 0.5
MODALITIES = ("text", "vision")

def loop_cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

def loop_sim(z, e):
    return [[loop_cosine(user, item) for item in e] for user in z]

def loop_contrast(z, e, mask, weight):
    """Eq. 10; with all weights 1 it is Eq. 3. Mean over the batch."""
    total = 0.0
    for u, row in enumerate(loop_sim(z, e)):
        negative = sum(math.exp(row[j] / TAU) for j in range(len(e)) if mask[u][j])
        positive = math.exp(row[u] / TAU)
        total -= math.log(positive / (positive + weight[u] * negative))
    return total / len(z)

def loop_margins(z, e, mask):
    """Eq. 6."""
    margins = []
    for u, row in enumerate(loop_sim(z, e)):
        others = [row[j] for j in range(len(e)) if mask[u][j]]
        margins.append(row[u] - sum(others) / len(others) if others else 0.0)
    return margins

def loop_softmax(row, tau):
    return [math.exp(s / tau) / sum(math.exp(r / tau) for r in row) for s in row]

def loop_topology(text, vision):
    """Eqs. 11-13."""
    total = 0.0
    for rows in zip(text, vision):
        p, q = (loop_softmax(row, TAU_CRTR) for row in rows)
        for j in range(len(p)):
            total += p[j] * math.log(p[j] / q[j]) + q[j] * math.log(q[j] / p[j])
    return total / (2 * len(text))

def loop_teacher(e_text, e_vision):
    """SDA: whom an item is near, on average over its two modalities."""
    pairs = zip(loop_sim(e_text, e_text), loop_sim(e_vision, e_vision))
    return [loop_softmax([(t + v) / 2 for t, v in zip(*rows)], TAU) for rows in pairs]

def loop_alignment(e_text, e_vision, teacher):
    """SDA's CMSA: cross-entropy from vision to text and back, halved, from a fixed teacher."""
    total = 0.0
    across = loop_sim(e_vision, e_text)
    for student in (across, zip(*across)):
        for p, row in zip(teacher, student):
            q = loop_softmax(row, TAU)
            total -= sum(p[j] * math.log(q[j]) for j in range(len(q)))
    return total / (2 * len(teacher))

def loop_weights(t, mask, strong):
    """Eqs. 7-9: each user's gap and weight."""
    text, vision = (loop_margins(t["z_" + m], t["e_" + m], mask) for m in MODALITIES)
    gap = [s - min(pair) for s, *pair in zip(strong or map(max, text, vision), text, vision)]
    return gap, [1 + t["beta"] * math.log(1 + math.exp(t["alpha"] * g)) for g in gap]

def loop_value(name, t, mask, held):
    """A method's loss, or the batch's mean gap or weight. Through what is `held` no gradient goes:
    M_strong, the batch's mean weight, SDA's teacher."""
    gap, weight = loop_weights(t, mask, name != "no-stopgrad" and held["strong"])
    ones = [1.0] * len(gap)
    z = numpy.add(t["z_text"], t["z_vision"]).tolist()  # Eq. 2
    e = numpy.add(t["e_text"], t["e_vision"]).tolist()
    text, vision = (loop_contrast(t["z_" + m], t["e_" + m], mask, ones) for m in MODALITIES)
    infonce = loop_contrast(z, e, mask, ones)
    wpcl = loop_contrast(z, e, mask, weight)
    blind = loop_contrast(z, e, mask, [held["weight"]] * len(z))
    crtr = LAM * loop_topology(*(loop_sim(t["z_" + m], t["e_" + m]) for m in MODALITIES))
    cmsa = LAM * loop_alignment(t["e_text"], t["e_vision"], held["teacher"])
    own = LAM * (text + vision)
    return {"gap": sum(gap) / len(gap), "weight": sum(weight) / len(weight), "sft": infonce,
            "vlm2rec": wpcl + crtr, "no-wpcl": crtr, "no-penalty": infonce + crtr,
            "no-stopgrad": wpcl + crtr, "no-crtr": wpcl, "sda": infonce + cmsa, "text": text,
            "vision": vision, "no-gap": blind + crtr, "unimodal": infonce + own,
            "vlm2rec+unimodal": wpcl + crtr + own}[name]

def fast_value(name, t, mask):
    """The same by vlm2rec: a step of VLM2Rec whose encoder gives these embeddings."""
    method = name if name in vlm2rec.METHODS else "vlm2rec"
    model = untrained_model(method=method, tau=TAU, tau_crtr=TAU_CRTR, lam=LAM)
    spaces = [name] if name in MODALITIES else MODALITIES
    z, e = (vlm2rec.fuse({m: t[f"{side}_{m}"] for m in spaces}) for side in "ze")
    model.forward = lambda batch: (z, e, mask)
    model.penalty.forward = lambda: (t["alpha"], t["beta"])
    return model.terms([])[name if name in ("gap", "weight") else "loss"]

@pytest.fixture
def five_users():
    """Five users in four dimensions, the last without a negative; float64 tests the formula."""
    torch.manual_seed(7)
    drawn = torch.randn(4, 5, 4, dtype=torch.float64)
    tensors = dict(zip(("z_text", "z_vision", "e_text", "e_vision"), drawn))
    tensors |= {"alpha": torch.tensor(1.3).double(), "beta": torch.tensor(0.7).double()}
    mask = [[0, 1, 1, 0, 1], [1, 0, 0, 1, 1], [1, 1, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    return tensors, torch.tensor(mask).bool()

@each("name", [
    "gap", "weight", "sft", "vlm2rec", "text", "vision", "no-wpcl", "no-penalty", "no-stopgrad",
    "no-crtr", "no-gap", "unimodal", "vlm2rec+unimodal", "sda"])
def test_losses_and_gradients_equal_the_loops(five_users, name):
    """Eqs. 3, 6-14, Table 5, controls, SDA: value, and gradient by central differences."""
    tensors, mask = five_users
    values = {key: tensor.tolist() for key, tensor in tensors.items()}
    text, vision = (loop_margins(values["z_" + m], values["e_" + m], mask) for m in MODALITIES)
    assert {t > v for t, v in zip(text[:4], vision)} == {True, False}  # each is weak for some
    held = {"strong": [max(pair) for pair in zip(text, vision)],
            "weight": numpy.mean(loop_weights(values, mask, None)[1]),
            "teacher": loop_teacher(values["e_text"], values["e_vision"])}
    for tensor in tensors.values():
        tensor.requires_grad_()
    loss = fast_value(name, tensors, mask)
    assert loss.item() == approx(loop_value(name, values, mask, held), abs=1e-9)
    loss.backward()
    for key, tensor in tensors.items():
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for k in range(tensor.numel()):
            slope = 0.0
            for step in (1e-5, -1e-5):
                moved = tensor.detach().clone()
                moved.view(-1)[k] += step
                value = loop_value(name, values | {key: moved.tolist()}, mask, held)
                slope += value / (2 * step)
            assert gradient.view(-1)[k].item() == approx(slope, abs=1e-6), (key, k)

def test_topology_by_hand_and_in_both_directions():
    """P = (3/4, 1/4), Q = (1/2, 1/2): KL(P || Q) = .1308 and KL(Q || P) = .1438."""
    one = TAU * torch.tensor([[0.75, 0.25], [0.25, 0.75]]).log()
    other = torch.zeros(2, 2)
    topology = vlm2rec.relational_topology
    assert topology(one, other, TAU).item() == approx((0.1308 + 0.1438) / 2, abs=1e-4)
    assert topology(other, one, TAU) == approx(topology(one, other, TAU))
    assert topology(one, one + 3, TAU).item() == approx(0, abs=1e-5)  # equal geometries
    assert topology(other, other - 1, TAU) == 0  # two constant spaces: the loss's shortcut

def untrained_model(**settings):
    """A model whose encoder is none: for what needs its settings alone."""
    encoder = Mock(**{"vlm.parameters.return_value": [], "device": "cpu"})
    return vlm2rec.VLM2Rec(encoder, vlm2rec.Config(**settings))

@each("alpha", [1, 5])
def test_alpha_and_beta_start_at_1_and_only_ever_fall(alpha):
    """Or alpha where --alpha says."""
    penalty = untrained_model(alpha=float(alpha)).penalty
    optimizer = torch.optim.SGD(penalty.parameters(), lr=0.5)
    values = []
    for _ in range(20):
        values.append([value.item() for value in penalty()])
        weight = vlm2rec.penalty_weight(torch.rand(2), *penalty())
        optimizer.zero_grad()
        vlm2rec.weighted_info_nce(torch.rand(2, 2), OFF_DIAGONAL, weight, 0.1).backward()
        optimizer.step()
    assert values[0] == approx([alpha, 1])
    for falling in zip(*values):
        assert min(falling) > 0 and list(falling) == sorted(set(falling), reverse=True)

def test_cosines_are_computed_in_float32_at_least():
    """In bfloat16 many different items would tie."""
    z, e = torch.randn(2, 40, 8).bfloat16()
    expected = torch.tensor(loop_sim(z.tolist(), e.tolist()))
    assert_close(vlm2rec.cosine(z, e), expected, rtol=0, atol=1e-6)
    assert vlm2rec.cosine(z.double(), e.double()).dtype == torch.float64

def test_negative_mask_by_hand():
    """Users 0 and 1 share target 4. User 2 bought 6 before, user 3's target."""
    targets = torch.tensor([4, 4, 5, 6])
    earlier = [[1, 2], [3], [6, 1], []]
    assert vlm2rec.negative_mask(targets, earlier).int().tolist() == [
        [0, 0, 1, 1],  # target 4 again is no negative
        [0, 0, 1, 1],
        [1, 1, 0, 0],  # nor is 6, bought before
        [1, 1, 1, 0]]  # but 5 is, which user 3 buys later: training must not know

OFF_DIAGONAL = ~torch.eye(2, dtype=torch.bool)
SIM, THREE, ONE = torch.rand(2, 2), torch.rand(3), torch.tensor(1.0)
PIECES = {  # every function that a reader may want to copy, with arguments
    "last_token": (torch.rand(2, 5, 3), torch.tensor([4, 1])),
    "fuse": ({"text": SIM, "vision": SIM},), "cosine": (torch.rand(3, 4), torch.rand(2, 4)),
    "negative_mask": (torch.tensor([1, 2]), [[3], [1]]),
    "weighted_info_nce": (SIM, OFF_DIAGONAL, torch.tensor([1.0, 2.0]), 0.1),
    "discriminative_margin": (SIM, OFF_DIAGONAL), "modality_gap": (THREE, THREE.flip(0)),
    "penalty_weight": (THREE, ONE, ONE), "kl_divergence": (SIM.log(), SIM.T.log()),
    "relational_topology": (SIM, SIM.T, 0.1),
    "objective": (SIM, SIM, SIM.T, OFF_DIAGONAL, ONE, ONE),
    "leave_one_out": ([1, 2, 3, 4, 5], "test", 2),
    "target_rank": (THREE, torch.rand(3, 5)), "hits_and_ndcg": (torch.tensor([1.0, 12.5]),),
    "structural_alignment": (torch.rand(3, 4), torch.rand(3, 4), 0.1)}
NEEDS = {  # what else of ours a piece calls
    "structural_alignment": ["cosine"], "relational_topology": ["kl_divergence"],
    "objective": ["kl_divergence", "relational_topology", "discriminative_margin", "modality_gap",
                  "penalty_weight", "weighted_info_nce"]}

@each("name", PIECES)
def test_each_piece_runs_when_pasted_alone_beside_torch(name):
    pieces = [inspect.getsource(getattr(vlm2rec, piece)) for piece in [*NEEDS.get(name, []), name]]
    pasted = {}
    exec("import torch\n" + "\n".join(pieces), pasted)
    expected = getattr(vlm2rec, name)(*PIECES[name])
    assert_close(pasted[name](*PIECES[name]), expected)

# ---- Methods and settings, as literals ----

WEIGHTED = "gap weight alpha beta wpcl"
METHODS = {  # what its passes read; the terms of its loss in the log; None: it does not train
    "vlm2rec": ("text vision", f"{WEIGHTED} crtr"),
    "sft": ("text vision", "infonce"),
    "vanilla": ("text vision", None),
    "text": ("text", "infonce"),
    "vision": ("vision", "infonce"),
    "internal": ("interleaved", "infonce"),
    "internal-vanilla": ("interleaved", None),
    "no-wpcl": ("text vision", "crtr"),
    "no-penalty": ("text vision", "infonce crtr"),
    "no-stopgrad": ("text vision", f"{WEIGHTED} crtr"),
    "no-crtr": ("text vision", WEIGHTED),
    "no-gap": ("text vision", f"{WEIGHTED} crtr"),
    "unimodal": ("text vision", "infonce unimodal"),
    "vlm2rec+unimodal": ("text vision", f"{WEIGHTED} crtr unimodal"),
    "sda": ("text vision", "infonce cmsa"),
    "sasrec": ("", ""),
    "gru4rec": ("", "")}

def test_the_defaults_are_the_papers():
    """Section 5.1.1; and those of the tiny model, which give way to flags."""
    papers = dict(
        domain="toys", method="vlm2rec", model="Qwen/Qwen2.5-VL-3B-Instruct", revision="main",
        adapter="", embeddings="", seed=0, device="auto", data_dir="domains", out="runs", epochs=3,
        batch=8, history=10, image_size=168, lr=1e-5, alpha=1.0, penalty_lr=1e-5, tau=0.1,
        tau_crtr=1.0, lam=0.5, lora_rank=16, lora_alpha=32, lora_dropout=0.2, checkpointing="on",
        train_users=None, log_every=50, save_every=200)
    tiny = papers | {"model": "tiny", "image_size": 56, "lr": 1e-3, "checkpointing": "off"}
    for flags, expected in (("--domain toys", papers), ("--domain toys --model tiny", tiny),
                            ("", tiny | {"domain": "sample"}),
                            ("--lr 1 --image-size 84 --checkpointing on", tiny | dict(
                                domain="sample", lr=1, image_size=84, checkpointing="on"))):
        [config], history = vlm2rec.parse_config(flags.split())
        assert vars(config) == expected and history is None

def test_several_methods_and_seeds_are_runs_of_their_own():
    configs, _ = vlm2rec.parse_config("--method sft vlm2rec --seed 3 --seeds 2".split())
    assert [(config.method, config.seed) for config in configs] == [
        ("sft", 3), ("sft", 4), ("vlm2rec", 3), ("vlm2rec", 4)]

# ---- The protocol ----

def by_hand(sequences, items):
    """A domain in memory, of users 0, 1, ... with these sequences of items 0, 1, ..."""
    ids = [str(item) for item in range(items)]
    users = [str(user) for user in range(len(sequences))]
    return data.Domain("hand", ids, ids, [], users, sequences, [], {}, [], [], "digest")

def test_leave_one_out_on_a_user_with_five_items():
    split = vlm2rec.leave_one_out
    sequence = [10, 11, 12, 13, 14]
    assert split(sequence, "train") == ([10, 11], 12, [10, 11])
    assert split(sequence, "valid") == ([10, 11, 12], 13, [10, 11, 12])
    assert split(sequence, "test") == ([10, 11, 12, 13], 14, [10, 11, 12, 13])
    long = list(range(20))
    assert split(long, "test") == (long[9:19], 19, long[:19])
    assert split(long, "train", 3) == ([14, 15, 16], 17, long[:17])

def test_negatives_are_new_to_the_user_and_depend_on_seed_split_and_user():
    sequence = list(range(0, 60, 3))
    def draw(user="u", split="test", seed=0):
        return vlm2rec.draw_negatives(user, sequence, 130, split, seed)
    assert len(set(draw())) == len(draw()) == 100 and not set(draw()) & set(sequence)
    others = [draw(), draw(user="v"), draw(split="valid"), draw(seed=1)]
    assert draw() == draw() and len(set(map(tuple, others))) == 4
    assert draw()[:4] == [26, 89, 120, 122]  # published ranks hang on these
    drawn = [vlm2rec.draw_negatives(str(u), [0], 201, "test", 0) for u in range(2000)]
    counts = numpy.bincount(numpy.ravel(drawn), minlength=201)
    assert counts[0] == 0 and abs(counts[1:] - 1000).max() < 120  # standard deviation 22

def test_validation_scores_everybody_or_2000_fixed_by_the_seed():
    def users(count, seed):
        domain = by_hand([[user, 3000, 3001, 3002, 3003] for user in range(count)], items=3200)
        return [own[0] for own in vlm2rec.make_evaluation(domain, "valid", 10, seed).sequences]
    assert users(5, 0) == [0, 1, 2, 3, 4]
    some = users(3000, 0)
    assert len(set(some)) == 2000 and some == sorted(some)
    assert users(3000, 0) == some != users(3000, 1)

class Walker(torch.nn.ParameterList):
    """A model that goes one down in each step, takes notes, and is scored as it was told."""
    def __init__(self, batch, epochs, patience=math.inf, scores=itertools.repeat(0.0)):
        super().__init__([torch.zeros(1)])
        self.groups = [{"params": self.parameters(), "lr": 1.0}]
        self.batch, self.epochs, self.patience = batch, epochs, patience
        self.scores = iter(scores)
        self.seen, self.noise, self.watched = [], [], []
    def terms(self, batch):
        self.seen.append(batch)
        self.noise.append(torch.rand(1).item())
        return {"loss": self[0].sum()}
    def walk(self, domain, folder, **settings):
        """What `train` returns of a training from the first step on."""
        def validate(model, valid, batch):
            self.watched.append(batch)
            return {"N@10": next(self.scores)}
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        config = vlm2rec.Config(**{"save_every": 10**6, **settings})
        with patch.object(vlm2rec, "validate", validate):
            return vlm2rec.train(self, domain, None, config, folder)

def test_training_batches_by_hand(tmp_path):
    domain = by_hand([list(range(13)), [20, 21, 22, 23, 24], *3 * [[30, 31, 32, 33, 34]]], 60)
    model = Walker(2, 3)
    model.walk(domain, tmp_path, history=4)
    assert [len(batch) for batch in model.seen] == [2, 2, 2, 2, 2, 2]  # the fifth user waits
    samples = sum(model.seen, [])
    assert ([6, 7, 8, 9], 10, list(range(10))) in samples  # 11 and 12 are unseen
    assert ([20, 21], 22, [20, 21]) in samples
    assert len(set(model.noise)) == 6  # dropout is another one in each step

def test_the_seed_decides_the_users_and_their_order(tmp_path):
    domain = by_hand([[user, 100, 101, 102, 103] for user in range(50)], items=104)
    def users(seed, count):  # of two epochs in batches of three, in order
        model = Walker(3, 2)
        model.walk(domain, tmp_path, train_users=count, seed=seed)
        order = [earlier[0] for _, _, earlier in sum(model.seen, [])]
        return order[:len(order) // 2], order[len(order) // 2:]
    first, second = users(0, 7)
    assert len(set(first)) == len(set(second)) == 6 and len({*first, *second}) <= 7
    assert first != second and users(0, 7) == (first, second)
    assert {*users(0, 6)[0]} != {*users(1, 6)[0]} and users(0, None) != users(1, None)

@each("scores, kept", [
    ([.4, .3, .2], 0),         # the untrained model is a candidate; two epochs without a gain
    ([.1, .1, .1], 0),         # an equal score is no gain
    ([.1, .3, .2, .2], -2),    # the first epoch, two steps down
    ([.1, .2, .3, .4, .5], -8)])
def test_the_best_epoch_on_validation_is_kept(scores, kept, tmp_path):
    domain = by_hand([[user, 5, 6, 7, 8] for user in range(4)], 9)
    model = Walker(2, 4, patience=2, scores=scores)  # four epochs of two steps
    found = model.walk(domain, tmp_path)
    assert model[0].item() == approx(kept, abs=1e-4) and not list(model.scores)
    best = {0: 0, -2: 1, -8: 4}[kept]
    assert found == ([{"N@10": score} for score in scores], best)
    assert model.watched == model.watched[:1] * len(scores)  # Fig. 1b's batch stays the same

@each("log_every, words", [
    (9, "by step 3 a weight is not finite; lower --lr"),
    (1, "step 3: the loss is not finite; lower --lr")])
def test_what_is_not_finite_leaves_the_last_good_checkpoint(log_every, words, tmp_path):
    model = Walker(2, 2)
    def terms(batch, own=model.terms):
        loss = own(batch)["loss"]
        return {"loss": loss * math.inf if len(model.seen) == 3 else loss}
    model.terms = terms
    domain = by_hand(8 * [[0, 1, 2, 3, 4]], 5)
    with pytest.raises(FloatingPointError, match=words):
        model.walk(domain, tmp_path, save_every=1, log_every=log_every)
    [weights, _, progress] = torch.load(tmp_path / "checkpoint.pt")
    assert weights["0"].item() == approx(-2, abs=1e-4) and progress["step"] == 2

def test_ranks_by_hand_a_tie_counts_half_and_nan_or_inf_stops():
    target = torch.full((3,), 0.5)
    others = torch.tensor([[0.9, 0.3, 0.1], [0.5, 0.5, 0.1], [0.5, 0.5, 0.5]])
    assert vlm2rec.target_rank(target, others).tolist() == [2, 2, 2.5]
    others[:, 0] = -math.inf  # the first candidate is left out
    assert vlm2rec.target_rank(target, others).tolist() == [1, 1.5, 2]
    for bad in (math.nan, math.inf):
        for one, other in ((0.5, bad), (bad, 0.5)):
            with pytest.raises(FloatingPointError, match="not finite"):
                vlm2rec.target_rank(torch.tensor([one]), torch.tensor([[0.1, other]]))

def test_hits_and_ndcg_by_hand():
    for ranks, expected in (([2.0], (1, 0.6309, 1, 0.6309)),  # 1 / log2(3)
                            ([1.0, 11.0, 21.0], (1 / 3, 1 / 3, 2 / 3, (1 + 0.2789) / 3))):
        found = vlm2rec.hits_and_ndcg(torch.tensor(ranks))
        assert found == approx(dict(zip(CHANCE, expected)), abs=1e-4)
    assert vlm2rec.hits_and_ndcg(torch.tensor([10.0, 10.5]))["H@10"] == 0.5

def random_spaces(users):
    torch.manual_seed(0)
    e = vlm2rec.fuse({"text": torch.randn(130, 8), "vision": torch.randn(130, 8)})
    sequences = [torch.randperm(130)[:3].tolist() for _ in range(users)]
    return e, vlm2rec.make_evaluation(by_hand(sequences, 130), "test", 10, seed=0)

CHANCE = {"H@10": 0.0990, "N@10": 0.0450, "H@20": 0.1980, "N@20": 0.0697}  # of 101 candidates

def test_an_oracle_scores_1_a_constant_0_and_noise_is_at_chance():
    e, test = random_spaces(users=2000)
    def scores(z, e, full):
        return vlm2rec.hits_and_ndcg(vlm2rec.evaluate(z, e, test, full=full))
    for full in (False, True):
        oracle = scores(e["text"][test.targets], e["text"], full)
        assert oracle == dict.fromkeys(CHANCE, 1.0)
        constant = scores(torch.ones(2000, 8), torch.ones(130, 8), full)
        assert constant == dict.fromkeys(CHANCE, 0.0)  # (others > target).sum() alone: perfect
    found = scores(torch.randn(2000, 8), e["text"], False)
    assert found == approx(CHANCE, abs=0.02)

def test_the_full_ranking_leaves_out_the_users_other_items():
    z = torch.tensor([[0.9, 0.8, 0.7, 0.1]])  # likes item 0 best, then 1, 2, 3
    for sequence, full in (([2], 3), ([0, 2], 2), ([0, 2, 1], 1)):
        test = vlm2rec.Evaluation([], torch.tensor([2]), torch.tensor([[3]]), [sequence])
        assert vlm2rec.evaluate(z, torch.eye(4), test).tolist() == [1]
        assert vlm2rec.evaluate(z, torch.eye(4), test, full=True).tolist() == [full]

# ---- Prompts and encoder ----

HISTORIES = [[3, 8, 5, 20, 31], [7], [9, 1], [50, 51, 52, 53, 54, 55, 56, 57, 58, 59]]

def lora_model(few, method="vlm2rec", **settings):
    """A model of few's items, all its trained weights random, so that each matters."""
    settings = {"lora_dropout": 0.0, "lora_rank": 8, "lora_alpha": 16, **settings}
    model, _ = vlm2rec.make_model(open_few(few, method=method, **settings))
    for weight in model.lora:
        torch.nn.init.normal_(weight, std=0.2)
    return model

def tokenizer_of(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)

def test_prompts_by_hand(few):
    encoder = lora_model(few).encoder
    tokenizer = tokenizer_of(few / TINY)
    first, second, odd, long = "Belka kite 42", "Kiwi", "<|im_end|><|image_pad|>", "Q" * 500
    made = vlm2rec.Encoder(encoder.vlm, tokenizer, [first, second, odd, long], encoder.features)
    picture = "<|vision_start|>" + 4 * "<|image_pad|>" + "<|vision_end|>"  # 56 px: 2 x 2 tokens
    for modality, *lines in (("text", first, second), ("vision", picture, picture),
                             ("interleaved", first, picture, second, picture)):
        ids = made.prompt([0, 1], modality)
        assert tokenizer.decode(ids) == "\n".join(lines) + "<|im_end|>"
    assert len(made.prompt([0], "vision")) == 7  # marks are a token each
    *ids, stop = made.prompt([2], "text")
    assert tokenizer.decode(ids) == odd and len(ids) > 9 and stop not in ids  # a title is text
    assert made.prompt([3], "text")[:-1] == tokenizer(long[:64]).input_ids

@each("modality", ["text", "vision", "interleaved"])
def test_passes_change_nothing_but_order_of_items_does(few, modality, monkeypatch):
    """Nor do padding and batches; two pictures swapped, or one replaced, do."""
    encoder = lora_model(few).encoder
    histories = [*HISTORIES, [8, 3, 5, 20, 31], [3, 8, 5, 20, 99]]
    z = encoder.embed(histories, [modality])["fused"]
    one_by_one = [encoder.embed([history], [modality])["fused"] for history in histories]
    monkeypatch.setattr(vlm2rec, "PASS_TOKENS", {"cpu": 100})
    assert vlm2rec.passes_by_length([50, 300, 20, 90, 30], 100) == [[1], [3], [0, 4], [2]]
    backwards = encoder.embed(histories[::-1], [modality])["fused"].flip(0)
    for other in (torch.cat(one_by_one), backwards):
        assert (z - other).abs().max() < 1e-5
    assert (z[0] - z[4]).abs().max() > 1e-2 and (z[0] - z[5]).abs().max() > 1e-2

def test_pictures_keep_their_ratio_on_a_white_ground(tmp_path):
    def square(size, side):
        Image.new("RGB", size, "red").save(tmp_path / "x.png")
        return vlm2rec.square_picture(tmp_path / "x.png", side)
    expected = Image.new("RGB", (28, 28), "white")
    expected.paste("red", (0, 7, 28, 21))
    assert square((56, 28), 28).tobytes() == expected.tobytes()
    assert square((30, 20), 0).size == (30, 30)  # a tower that scales by itself
    assert square((500, 8000), 0).size == (1024, 1024)

def test_a_step_is_four_forward_passes_of_one_modality_each(few):
    """Users 0 and 2 share a target, and user 0 had user 1's before: no negatives."""
    model = lora_model(few)
    expected = [model.encoder.embed(histories, MODALITIES)
                for histories in ([[3, 8], [7], [4]], [[5], [9], [5]])]
    passes = []
    def note(vlm, args, inputs):
        passes.append(("mm_encoder_outputs" in inputs, *inputs["input_ids"].shape))
    model.encoder.vlm.register_forward_pre_hook(note, with_kwargs=True)
    z, e, mask = model([([3, 8], 5, [9, 3, 8]), ([7], 9, [7]), ([4], 5, [4])])
    assert model.encoder.vlm.training  # with dropout
    assert passes == [(False, 3, 8), (True, 3, 14), (False, 3, 4), (True, 3, 7)]  # has pictures
    assert mask.int().tolist() == [[0, 0, 0], [1, 0, 1], [0, 1, 0]]
    assert_close([z, e], expected, atol=1e-4, rtol=0)

def fit_batches(model, batches):
    """The loss before each step."""
    optimizer = torch.optim.AdamW(model.groups, weight_decay=0.0)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        losses.append(model.terms(batch)["loss"])
        losses[-1].backward()
        optimizer.step()
    return losses

def test_one_batch_can_be_overfitted_at_two_learning_rates(few):
    model, _ = vlm2rec.make_model(open_few(few, lr=3e-3, lora_dropout=0.0, lam=0.1))
    batch = [([k, k + 1, k + 2], k + 20, [k, k + 1, k + 2]) for k in range(6)]
    losses = fit_batches(model, 40 * [batch])
    assert losses[0] > 1.5 and losses[-1] < 0.2
    assert all(1 - 40 * 1e-5 < value < 1 for value in model.penalty())

def test_a_prompt_beyond_the_context_is_refused(few, own_model, monkeypatch):
    """The longest has 5 times 4 + 2 tokens, 4 newlines and the end: 35."""
    run = open_few(few, method="vision", history=5, model=str(own_model), image_size=56)
    text = (own_model / "config.json").read_text()
    def build(context):
        (own_model / "config.json").write_text(text.replace(": 8192", f": {context}"))
        return vlm2rec.build_encoder(run)
    encoder = build(35)
    monkeypatch.setattr(data, "prepare", None)  # the catalogue is not encoded before
    too_long = "has 35 tokens, the model holds 34: .*--history"
    with refused(too_long):
        build(34)
    encoder.vlm.config.get_text_config().max_position_embeddings = 34
    encoder.embed([4 * [7]], ["vision"])
    with refused(too_long):  # of a new history
        encoder.embed([5 * [7]], ["vision"])

# ---- Ten families of models: tiny checkpoints with random weights ----

BOS = "<|video_pad|>"  # what opens a prompt; our tokenizer has no other mark to spare
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=0)
LLAMA, QWEN2 = {"model_type": "llama"}, {"model_type": "qwen2"}
EYES = SMALL | dict(num_attention_heads=2, image_size=56, patch_size=14)
SIGLIP = EYES | {"model_type": "siglip_vision_model", "vision_use_head": False}
LINEAR = dict(layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8,
              linear_num_key_heads=2, linear_value_head_dim=8, linear_num_value_heads=4)
GEMMA = {"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2}
PINS = {"image_grid_pinpoints": [[56, 56], [56, 112], [112, 56], [112, 112]]}
SQUARE = {"size": {"height": 56, "width": 56}}
QWEN_EYES = dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32)
PLACED = QWEN_EYES | {"num_position_embeddings": 16}  # of Qwen3's tower

class Family(NamedTuple):
    """How a family's prompt shows a picture; the settings of its tiny checkpoint's parts."""
    shown: str       # what stands around a picture's tokens
    tokens: int      # of a picture
    text: dict
    vision: dict
    processor: dict  # of the images
    both: dict = {}
    opening: str = ""

def qwen(text, vision, patch):
    return Family("<|vision_start|>{}<|vision_end|>", 4, text, vision, {"patch_size": patch})

IDEFICS = Family("<fake_token_around_image><global-img>{}<fake_token_around_image>", 4, LLAMA, EYES,
                 {"max_image_size": {"longest_edge": 56}}, {"scale_factor": 2}, BOS)
FAMILIES = {
    "qwen2_vl": qwen({}, dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2), 14),
    "qwen2_5_vl": qwen({}, QWEN_EYES | {"fullatt_block_indexes": [1]}, 14),
    "qwen3_vl": qwen({}, PLACED | {"deepstack_visual_indexes": [0, 1]}, 16),
    "qwen3_5": qwen(LINEAR, PLACED, 16),
    "internvl": Family("<img>{}</img>", 4, QWEN2, EYES | {"patch_size": [14, 14],
                       "image_size": [56, 56]}, SQUARE | {"crop_to_patches": True}),
    "llava": Family("{}", 16, LLAMA, EYES | {"model_type": "clip_vision_model"},
                    {"size": {"shortest_edge": 56}, "crop_size": SQUARE["size"]}, opening=BOS),
    "llava_onevision": Family("{}", 17, QWEN2, SIGLIP, SQUARE | PINS, PINS),
    "smolvlm": IDEFICS, "idefics3": IDEFICS,
    "gemma3": Family("\n\n<start_of_image>{}<end_of_image>\n\n", 4, GEMMA, SIGLIP, SQUARE,
                     {"mm_tokens_per_image": 4}, BOS)}
SHORT = [[3, 8, 5, 2, 11], [9, 1], [10, 0, 6, 4]]  # LLaVA-OneVision would tile a lone picture

def family_encoder(family, folder, few):
    """Write a checkpoint of the family, with its head; build an encoder of twelve items on it."""
    made = FAMILIES[family]
    tokenizer = tokenizer_of(few / TINY)
    if made.opening:
        tokenizer.bos_token = BOS
        mark = [(BOS, tokenizer.bos_token_id)]
        template = tokenizers.processors.TemplateProcessing(f"{BOS} $A", special_tokens=mark)
        tokenizer.backend_tokenizer.post_processor = template
    marks = re.findall("<[^|>]+>", made.shown)
    tokenizer.add_tokens(marks, special_tokens=True)
    text = made.text
    if "qwen" in family:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        text = text | {"rope_parameters": rope | {"mrope_interleaved": "qwen3" in family}}
    text = SMALL | dict(vocab_size=len(tokenizer), head_dim=8, max_position_embeddings=4096) | text
    config = transformers.AutoConfig.for_model(
        family, text_config=text, vision_config=made.vision, **made.both)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    for weight in model.parameters():
        if weight.ndim > 1 or not weight.any():  # wide: everything matters
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names = transformers.models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES
    getattr(transformers, names[family]["pil"])(**made.processor).save_pretrained(folder)
    run = open_few(few, model=str(folder), out=str(folder / "runs"), lora_dropout=0.0,
                     image_size=4 * made.processor.get("patch_size", 14))
    lists = {name: getattr(run.domain, name)[:12] for name in ("item_ids", "titles", "pictures")}
    run = run._replace(domain=replace(run.domain, sequences=[list(range(12))], **lists))
    return run, vlm2rec.build_encoder(run)

@torch.no_grad()
def own_state(vlm, processor, run, ids, items):
    """The last state of a prompt as the family's model itself gives it, from pixels."""
    ids = torch.tensor([ids])
    inputs = {}
    if items:
        side = "patch_size" in FAMILIES[vlm.config.model_type].processor and run.config.image_size
        pictures = [vlm2rec.square_picture(run.domain.pictures[item], side) for item in items]
        inputs = dict(processor(images=[pictures], do_resize=not side, return_tensors="pt"))
        types = (ids == vlm.config.image_token_id).int()
        inputs |= {"mm_token_type_ids": types, "token_type_ids": types}
    known = inspect.signature(vlm.forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in known}
    return vlm(input_ids=ids, use_cache=False, **inputs).last_hidden_state[0, -1]

@each("family", FAMILIES)
def test_each_family_equals_its_own_forward_on_pixels_and_trains(family, few, tmp_path):
    run, encoder = family_encoder(family, tmp_path, few)
    vlm, decoder = encoder.vlm, encoder.vlm.get_decoder()
    whole, tokenizer, processor = vlm2rec.load_vlm(str(tmp_path), "main", "cpu")
    made = FAMILIES[family]
    picture = made.shown.format(made.tokens * "<|image_pad|>")
    expected = f"{made.opening}{run.domain.titles[3]}\n{picture}<|im_end|>"
    assert tokenizer.decode(encoder.prompt([3], "interleaved")) == expected
    vlm2rec.add_lora(vlm, run.config)
    lora = [weight for weight in vlm.parameters() if weight.requires_grad]
    for weight in lora:
        torch.nn.init.normal_(weight, std=0.1)
    linear = [name for name, layer in decoder.named_modules()
              if isinstance(layer, torch.nn.Linear) and "lora_" not in name]
    assert all(name.endswith(".base_layer") for name in linear)
    assert len(lora) == 2 * len(linear)  # A and B in each, and none elsewhere
    setattr(whole, "text_model" if hasattr(whole, "text_model") else "language_model", decoder)
    for modality in ("text", "vision", "interleaved"):
        for items, ours in zip(SHORT, encoder(SHORT, modality)):
            ids = encoder.prompt(items, modality)
            theirs = own_state(whole, processor, run, ids, modality != "text" and items)
            assert (ours - theirs).abs().max() < 1e-5
    vlm.train()
    def gradients():
        states = [encoder(SHORT, modality) for modality in MODALITIES]
        return torch.autograd.grad(sum(state.square().sum() for state in states), lora)
    checkpointed = gradients()
    assert decoder.is_activation_checkpointing
    decoder.activation_checkpointing_disable()
    for ours, theirs in zip(checkpointed, gradients()):
        assert ours.abs().max() > 0 and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)

def test_the_features_are_of_this_size_these_pictures_and_this_tower(few, own_model, tmp_path):
    """They are computed once, and taken from the cache by whatever makes the same."""
    run = open_few(few, out=str(tmp_path))
    def features(domain=run.domain, **settings):
        config = replace(run.config, **settings)
        return vlm2rec.build_encoder(run._replace(config=config, domain=domain)).features
    first = features()
    [path] = tmp_path.rglob("features-*.safetensors")
    when = path.stat().st_mtime_ns
    assert_close(features(), first, rtol=0, atol=0)
    assert path.stat().st_mtime_ns == when and first.shape == (130, 1, 4, 64)
    assert features(image_size=84).shape == (130, 1, 9, 64)
    pictures = run.domain.pictures[:1] + run.domain.pictures[:0:-1]  # the first is the same
    other = replace(run.domain, pictures=pictures, digest="other")
    assert_close(features(other)[1:], first[1:].flip(0))
    tensors(lambda w: {k: w[k] * (1 + ("visual" in k)) for k in w})(own_model / "model.safetensors")
    assert (features(model=str(own_model)) - first).abs().max() > 0.1

def test_a_language_model_serves_where_no_picture_is_read(few, own_model, tmp_path, capsys, told):
    """The paper's LLM rows, by a tiny Qwen2."""
    own = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=434, **SMALL)).eval()
    own.save_pretrained(own_model)
    flags = ["--model", own_model, "--out", tmp_path]
    assert command(few, *flags, "--method text --lr 1e-9 --epochs 1") == 0
    _, e = vectors_of(tmp_path / "few/text-seed0", "item")
    tokenizer = tokenizer_of(own_model)  # Qwen2's splits numbers
    ids = tokenizer("Fjord kettle 77<|im_end|>", return_tensors="pt").input_ids
    expected = own.model(ids).last_hidden_state[0, -1].detach()
    assert_close(e["fused"][77], expected, atol=1e-5, rtol=0)
    capsys.readouterr()
    told(command(few, *flags), "--model is of type qwen2")

@each("family, text, adapted, note", [
    ("llava", {"model_type": "phi3", "bos_token_id": 1, "eos_token_id": 1},
     "qkv_proj o_proj gate_up_proj down_proj", ""),  # fused
    ("internvl", {"model_type": "qwen3_moe", "num_experts": 4}, "q_proj k_proj v_proj o_proj",
     "note: without LoRA: experts.down_proj, experts.gate_up_proj, gate.weight\n")])
def test_layers_get_lora_and_what_stays_without_is_named(family, text, adapted, note, capsys):
    text = SMALL | {"vocab_size": 99, "moe_intermediate_size": 16} | text
    config = transformers.AutoConfig.for_model(
        family, text_config=text, vision_config=FAMILIES[family].vision)
    vlm = transformers.AutoModel.from_config(config).requires_grad_(False)
    vlm.commit = None  # it is from no hub
    vlm2rec.add_lora(vlm, vlm2rec.Config(model="tiny"))
    found = {name.split(".")[-4] for name, _ in vlm.named_parameters() if "lora_A" in name}
    said = "".join(re.findall("note: .*\n", capsys.readouterr().out))
    assert found == set(adapted.split()) and said == note

def test_moda_is_the_sum_over_its_experts_by_the_passs_modality(few):
    """In gradients, too, when passes of the other modality came since."""
    model = lora_model(few, "sda")  # --checkpointing is on, and must not matter
    layer = model.encoder.vlm.language_model.layers[1].mlp.down_proj
    a, b = layer.lora_A["default"], layer.lora_B["default"].weight
    x = torch.randn(2, 5, layer.in_features)
    for number, modality in enumerate(MODALITIES):
        model.encoder.embed([[3]], [modality])
        expected = layer.base_layer(x)
        shares = a.gates[number].softmax(dim=0)
        for k in range(4):  # each expert has two of the eight ranks; alpha / rank is 2
            ranks = slice(2 * k, 2 * k + 2)
            expected = expected + 2 * shares[k] * (x @ a.weight[ranks].T @ b[:, ranks].T)
        assert_close(layer(x), expected)
    gates = [weight for weight in model.lora if weight.shape == (2, 4)]
    def gradients(state):
        return torch.autograd.grad(state.square().sum(), gates)
    model.encoder.vlm.train()
    alone = [gradients(model.encoder(HISTORIES, modality)) for modality in MODALITIES]
    states = [model.encoder(HISTORIES, modality) for modality in MODALITIES]
    for number, state in enumerate(states):
        together = gradients(state)  # the text's after a pass of pictures
        assert all(g[number].all() and not g[1 - number].any() for g in together)
        assert_close(together, alone[number])

# ---- Collapse, Task 2, significance ----

def test_geometry_equals_the_loops():
    users = range(1100)  # more than the 1,024 that are done at once
    e, test = random_spaces(1100)
    z = torch.randn(1100, 8)
    square = [[2 - 2 * s for s in row] for row in loop_sim(z.tolist(), e["text"].tolist())]
    a_pos = sum(square[u][test.targets[u]] for u in users) / 1100
    a_neg = sum(square[u][i] for u in users for i in test.negatives[u].tolist()) / 110_000
    near = sum(math.exp(-2 * d) for row in square for d in row) / 143_000
    expected = {"A_pos": a_pos, "A_neg": a_neg, "S": a_neg / a_pos, "U": math.log(near)}
    assert vlm2rec.geometry(z, e["text"], test) == approx(expected, rel=1e-5)

def test_fig_1b_compares_each_modalitys_gradient_with_the_losss(few):
    """With a dropout that they share, and a user without a negative."""
    model = lora_model(few, lora_dropout=0.2)
    batch = [([3, 8], 5, [9, 3, 8]), ([7], 9, [7, 5]), ([4], 12, [4]), ([2], 6, [12, 9, 5])]
    assert model.terms(batch)["loss"] != model.terms(batch)["loss"]  # there is dropout
    def loss(space):
        if space == "fused":
            return model.terms(batch)["loss"]
        z, e, mask = model(batch)
        sim = vlm2rec.cosine(z[space], e[space])
        return vlm2rec.weighted_info_nce(sim, mask, torch.ones(4), 0.1)
    def gradient(space):
        torch.manual_seed(0)
        parts = torch.autograd.grad(loss(space), list(model.lora))
        return torch.cat([part.flatten() for part in parts])
    whole, *parts = map(gradient, ("fused", *MODALITIES))
    expected = [torch.cosine_similarity(whole, own, dim=0).item() for own in parts]
    found = vlm2rec.gradient_cosines(model, batch)
    assert [*found] == ["cos_text", "cos_vision"] and max(expected) < 0.99
    assert [*found.values()] == approx(expected, abs=1e-4)
    assert all(weight.grad is None for weight in model.parameters())

@each("kind", ["sasrec", "gru4rec"])
@each("vectors", [None, 3 * torch.eye(120)])
def test_downstream_models_learn_a_walk(kind, vectors):
    domain = by_hand([[(7 * u + k) % 120 for k in range(5 + u % 7)] for u in range(120)], 120)
    torch.manual_seed(0)
    model = vlm2rec.SequenceRecommender(vlm2rec.Config(method=kind), domain, vectors)
    assert vectors is None or torch.equal(model.table, torch.eye(120))  # of norm 1, trained
    samples = [vlm2rec.leave_one_out(sequence, "train") for sequence in domain.sequences]
    model.groups[0]["lr"] = 5e-3
    fit_batches(model, 40 * [samples[::2], samples[1::2]])
    test = vlm2rec.make_evaluation(domain, "test", 10, 0)
    assert vlm2rec.validate(model, test)["N@10"] > 0.9  # chance is .045
    states, _ = model(torch.tensor([[3, 3, 5], [3, 3, 9]]))
    assert_close(states[0, :2], states[1, :2])  # which see nothing that comes later
    assert (states[0, 0] - states[0, 1]).abs().max() > 1e-3  # but where they are
    model.train = lambda *_: model  # it stays as it was validated: without dropout
    losses = []  # of each item that follows another, padding nowhere
    for rows in ([3, 5, 7], [9, 2], [0, 4, 0, 8]):
        states, items = model(torch.tensor([rows[:-1]]))
        scores = (states[0] @ items.T).log_softmax(dim=1)
        losses += [-scores[place, item] for place, item in enumerate(rows[1:])]
    batch = [([3, 5], 7, []), ([9], 2, []), ([0, 4, 0], 8, [])]
    assert_close(model.terms(batch)["loss"], torch.stack(losses).mean())

def test_item_vectors_of_any_type_and_order_are_read_or_refused(few, tmp_path):
    """items.csv has more items than the 5-core: vectors are matched by item id."""
    run = open_few(few)
    ids = list(data.read_items(run.source))
    x = torch.randint(-99, 99, (len(ids), 3))
    expected = x[[ids.index(item) for item in run.domain.item_ids]].float()
    def read(path):
        return vlm2rec.read_vectors(str(path), run.domain, run.source)
    def save(name, rows, item_ids=None, **more):
        metadata = item_ids and {"item_ids": json.dumps(item_ids)}
        save_file({"fused": rows, **more}, tmp_path / f"{name}.safetensors", metadata)
    for dtype in ("float16", "float64", "int8"):
        numpy.save(tmp_path / f"{dtype}.npy", x.numpy().astype(dtype))
    numpy.save(tmp_path / "fortran.npy", numpy.asfortranarray(x.numpy()))
    save_file({"x": x.bfloat16()}, tmp_path / "bf16.safetensors")
    save("two", x, another=x + 1)
    save("backwards", x.flip(0), ids[::-1])
    right = set(tmp_path.iterdir())
    for path in right:
        found = read(path)
        assert found.dtype == torch.float32 and torch.equal(found, expected), path
    for value in (math.nan, math.inf):
        numpy.save(tmp_path / f"{value}.npy", x.float().index_fill(0, torch.tensor(5), value))
    numpy.save(tmp_path / "short.npy", x[1:])
    numpy.save(tmp_path / "objects.npy", x.numpy().astype(object))
    save("twice", torch.cat([x, x[:1]]), [*ids, ids[0]])
    save("lost", x, [f"not {item}" for item in ids])
    numpy.savez(tmp_path / "x.npz", x=x)
    torch.save(x, tmp_path / "x.pt")
    words = {"nan.npy": "row 5, item 'i4', holds nan", "inf.npy": "row 5, item 'i4', holds inf",
             "objects.npy": ".*allow_pickle=False"}  # a pickle may hold any code
    for path in set(tmp_path.iterdir()) - right:
        with refused(f"^--embeddings {path} does not fit: {words.get(path.name, '.+')}"):
            read(path)

# ---- The data: a small domain, the k-core, the reader ----

HERE = Path(__file__).parent
ITEMS = "items.csv"
EVENTS = "interactions.csv"

def default_items():
    return [[f"i{k}", f"title {k}", f"images/{k}.png"] for k in range(120)]

def default_events():
    return [[f"u{u}", f"i{(u * 2 + 5 * k) % 120}", 1000 + k] for u in range(60) for k in range(12)]

def write_tables(folder, items=None, events=None):
    """120 items, 60 users with 12 items each, so that every item has 6 users; or what is given."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, header, rows in ((ITEMS, "item_id,title,image", items or default_items()),
                               (EVENTS, "user_id,item_id,timestamp", events or default_events())):
        data.write_csv(folder / name, header.split(","), rows)
    return folder

def write_domain(folder, items=None, events=None):
    """The same, with pictures."""
    write_tables(folder, items, events)
    for k in range(120):
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

def test_five_core_reaches_its_fixed_point():
    """At k = 2 user c (one item) goes, so item z (then one user), so user b (then one item)."""
    rows = [("a", "x"), ("a", "y"), ("d", "x"), ("d", "y"), ("b", "x"), ("b", "z"), ("c", "z")]
    assert data.core(rows, 2) == rows[:4]
    rows = rows[:4] + [("b", "x"), ("b", "y"), ("b", "z"), ("c", "z")]
    assert data.core(rows[:-1], 1, room=1) == []  # b has all; without z, a and d have all
    assert data.core(rows, 1, room=1) == rows[:4] + rows[-1:]

def test_one_customer_with_nearly_everything_is_left_out(tmp_path):
    """20 of 120 items leave 100; 21 do not."""
    folder = write_domain(tmp_path / "d")
    def read(more, items=None):
        return data.read_domain(write_tables(folder, items, default_events() + more))
    most = [["reseller", f"i{k}", k] for k in range(21)]
    assert read(most[:20]).user_ids[-1] == "reseller"
    told = "1 users with too many items for 100 negatives ['reseller']"
    assert told in data.describe(read(most))
    more = [[user, "i120", 99] for user in ("u0", "u1", "u2", "aaron", "reseller")]
    more += [["aaron", f"i{k}", k] for k in range(4)]  # goes only because i120 goes with another
    domain = read(most + more, [*default_items(), ["i120", "title 120", "images/0.png"]])
    assert "aaron" not in domain.user_ids and told in data.describe(domain)

def test_the_reader_sorts_by_time_and_keeps_the_files_order_on_ties(tmp_path):
    """Of what is repeated it keeps the earliest."""
    times = ((5, 30), (9, 10), (7, 20), (4, 30), (4, 40), (8, 5), (3, 2e1))
    mine = [["u0", f"i{k}", when] for k, when in times]
    others = [row for row in default_events() if row[0] != "u0"]
    domain = data.read_domain(write_domain(tmp_path / "d", None, mine + others))
    got = [domain.item_ids[item] for item in domain.sequences[0]]
    assert domain.user_ids[0] == "u0" and got == ["i8", "i9", "i7", "i3", "i5", "i4"]
    assert domain.tied[0] and sum(domain.tied) == 1  # i5 and i4 have one timestamp
    assert domain.dropped["repeated interactions"] == 1

def test_dates_are_utc_unless_they_name_a_zone(monkeypatch):
    """2024-05-01 began 1,714,521,600 seconds after 1970, in UTC; this clock is in Tokyo."""
    monkeypatch.setenv("TZ", "JST-9")
    time.tzset()
    noon = 1714521600 + 12 * 3600
    assert data.parse_time("2024-05-01") == (True, noon - 43200)
    assert data.parse_time("20240501T1200") == data.parse_time("2024-05-01T12:00Z") == (True, noon)
    assert data.parse_time("2024-05-01 12:00:00.250-05:30") == (True, noon + 5.5 * 3600 + 0.25)
    monkeypatch.undo()
    time.tzset()
    assert data.parse_time("20240501") == (False, 20240501)

def edit(folder, name, old, new, count=1):
    text = (folder / name).read_text("utf-8")
    assert old in text
    (folder / name).write_text(text.replace(old, new, count), "utf-8")

def put(folder, name, content):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)

def make_fifo(folder, name):
    put(folder, name, None)
    os.mkfifo(folder / name)

def set_times(folder, *by_place):  # of each user's first, second ... event; the last for the rest
    times = [*by_place, *[by_place[-1]] * 12]
    rows = [[user, item, times[k % 12]] for k, (user, item, _) in enumerate(default_events())]
    write_tables(folder, None, rows)

def rename_items(folder, make):
    items = [[make(k), *row[1:]] for k, row in enumerate(default_items())]
    events = [[user, make(int(item[1:])), when] for user, item, when in default_events()]
    write_tables(folder, items, events)

def link_away(folder, *names):  # as the hub, DVC and git-annex do
    for name in names:
        target = folder.parent / name.replace("/", "-")
        (folder / name).rename(target)
        (folder / name).symlink_to(target)

def recode(folder, name, encoding, form="NFC"):
    text = (folder / name).read_bytes().decode().replace("title 4", "t\u00eftle 4")
    put(folder, name, unicodedata.normalize(form, text).encode(encoding))

def separate(folder, sign):
    for name in (ITEMS, EVENTS):
        edit(folder, name, ",", sign, -1)

def use_two_unicode_forms(folder):
    rename_items(folder, lambda k: f"caf\u00e9{k}")
    recode(folder, EVENTS, "utf-8", form="NFD")

def save_as_an_old_mac(folder):
    edit(folder, ITEMS, "title ", "&lt;&quot;&gt; ", -1)
    put(folder, ITEMS, (folder / ITEMS).read_bytes().replace(b"\n", b"\r"))

def write_without_quoting(folder, sign):
    separate(folder, sign)
    edit(folder, ITEMS, "title 4", '"title 4')
    edit(folder, ITEMS, "title 7", 'title 7"')

def sort_days(folder, key, reverse=False):
    rows = [[user, item, (when - 999) // 2 * 86400] for user, item, when in default_events()]
    write_tables(folder, None, sorted(rows, key=key, reverse=reverse))

def copy_picture(folder):
    for k in range(5, 14):
        shutil.copy(folder / PICTURE, folder / f"images/{k}.png")

def name_a_file_as_a_mac_does(folder):
    edit(folder, ITEMS, "images/4.", "images/\u00e9.")
    (folder / "images/4.png").rename(folder / "images/e\u0301.png")

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1048576\n"
PICTURE = "images/4.png"
GONE = "interactions with such items"
ONE_LOST = {"items without a decodable picture": 1, GONE: 6}
DAY = 1714521600
ODD = ["NA", "nan", "1", "01", "1.0", "1e5", "1E+05", "100000", "-1", "1.25E+02", "true"]
BY_ID = "NOTE: 300 of 300 neighbours of one time are as if sorted by item id"
NO_NOTE = r"(?s)^(?!.*NOTE)"
INPUTS = {  # words of a refusal or NOTE, or what is dropped; what is done to a good domain
    "no items.csv": ("items.csv is missing .*item_id,title,image", put, ITEMS, None),
    "empty file": ("items.csv, line 1: .*item_id,title,image", put, ITEMS, b""),
    "only a header": ("left: .*100 others", put, EVENTS, b"user_id,item_id,timestamp\n"),
    "column twice": ("line 1: .*'item_id,title,image,ti", edit, ITEMS, ",image", ",image,title"),
    "a product that is not sold now": ({"interactions with items that items.csv lacks ['no']": 1},
                                       edit, EVENTS, "u0,i5,", "u0,no,"),
    "another table's ids": ("line 2: item_id 'i0' is not .*'p0'", edit, ITEMS, "\ni", "\np", -1),
    "100 items": ("left: 100 items; more than 100 and a user's own", write_tables,
                  default_items()[:100]),
    "pictures elsewhere": ("left: 120 of 120 items cannot be shown, .* 'i0': no file 'img/0.png'",
                           edit, ITEMS, "images/", "img/", -1),
    "no item": ("interactions.csv, line 3: id '' is empty", edit, EVENTS, "u0,i5,", "u0,,"),
    "item twice but for spaces": ("line 6: .*'i3' is there twice", edit, ITEMS, "i4,", " i3 ,"),
    "rounded items": ("line 2: id '6.20386E.12' .*rounded by a spreadsheet",
                      rename_items, lambda k: f"{6203859599501 + k:.5E}"),
    "odd ids": ({}, rename_items, lambda k: ODD[k] if k < len(ODD) else f"i{k}"),
    "ids in two Unicode forms": ({}, use_two_unicode_forms),
    "bad time": ("line 3: timestamp '2024-02-30' is no number", edit, EVENTS, "1001", "2024-02-30"),
    "rounded times": ("line 2: time '1.60E.12' was rounded", set_times, "1.60E+12", "1.61E+12"),
    "rounded, of another country": ("line 2: time '1,7E.9' was rounded", set_times, "1,7E+9"),
    "times of numpy": ({}, set_times, f"{DAY:.18e}", f"{DAY + 1:.18e}"),
    "times of R": ({}, set_times, "99999", "1e+05", "100001"),
    "nanoseconds as floats": ({}, set_times, "1.71072e+18", "1.7e+18"),
    "unknown times are 0": ({}, set_times, "0", "-3600", "32400", "45000", "-1", DAY),
    "days, then seconds": (f"has {DAY}, but .*has 19844: .*two units", set_times, 19800, 19844,
                           DAY),
    "a spreadsheet's days": (f"has {DAY}, but .*line 2 has 45413.5: ", set_times, 45413.5, DAY),
    "milliseconds, then seconds": (f"has {DAY}000, but .* has {DAY}: .*two units",
                                   set_times, DAY * 1000, DAY),
    "basic dates": ({}, set_times, "20240501", "20240502"),
    "basic dates and times": ("two units", set_times, "20240501T0900", "20240501"),
    "no title": ({"items without a title": 1, GONE: 6}, edit, ITEMS, "title 4,", "  ,"),
    "a long cell": ({}, edit, ITEMS, "title 4,", "long " * 30_000 + ","),
    "path out": ("line 6: '../../4.png' .*copy it", edit, ITEMS, PICTURE, "../../4.png"),
    "path out of Windows": ("line 6: .* has a root or ..", edit, ITEMS, PICTURE, r"..\..\4.png"),
    "absolute path": ("line 6: '/etc/passwd' has a root", edit, ITEMS, PICTURE, "/etc/passwd"),
    "path of Windows": ({}, edit, ITEMS, PICTURE, r"Images\4.PNG"),
    "absolute path of Windows": (ONE_LOST, edit, ITEMS, PICTURE, r"\etc\passwd"),
    "files that are links": ({}, link_away, ITEMS, EVENTS, PICTURE, "images/5.png"),
    "a FIFO": (ONE_LOST, make_fifo, PICTURE),
    "file names of a Mac": ({}, name_a_file_as_a_mac_does),
    "pointer for items.csv": ("items.csv is only a pointer; .*git lfs pull", put, ITEMS, POINTER),
    "semicolons": ({}, separate, ";"),
    "spaces around each comma": ({}, separate, " , "),
    "a title of two lines": ({}, edit, ITEMS, "title 4", '"a, b\nc, d"'),
    "an old Mac": ({}, save_as_an_old_mac),
    "tabs without quoting": ("line 6: a quote .*write it twice", write_without_quoting, "\t"),
    "commas without quoting": ("line 6: a quote .*write it twice", write_without_quoting, ","),
    "too many fields": ("line 6: 4 fields.* double quotes", edit, ITEMS, "title 4,", "title, 4,"),
    "a quote never closed": ("line 9: unexpected end", edit, ITEMS, "title 7,", '"title 7,'),
    "latin-1": ("items.csv is not UTF-8", recode, ITEMS, "latin-1"),
    "CRLF and BOM": ({}, recode, ITEMS, "utf-8-sig"),
    "50 megapixels": (ONE_LOST, put, PICTURE, plain("1", (10_000, 5_000), "PNG")),
    "a tracking pixel": (ONE_LOST, put, PICTURE, plain("L", (1, 1), "PNG")),
    "a divider": (ONE_LOST, put, PICTURE, plain("L", (1200, 8), "PNG")),
    "a pencil": ({}, put, PICTURE, plain("L", (200, 10), "PNG")),
    "one time": ("NOTE: ALL TIMES of each user are equal", set_times, 0),
    "sorted by id": (BY_ID, sort_days, lambda row: row[1]),
    "sorted by number": (BY_ID, sort_days, lambda row: int(row[1][1:])),
    "sorted backwards": (BY_ID, sort_days, lambda row: row[1], True),
    "sorted by nothing": (NO_NOTE, sort_days, lambda row: random.Random(str(row)).random()),
    "a placeholder": ("NOTE: 10 items have one and the same picture, .*images/4.png", copy_picture),
    "HTML": ("NOTE: 1 titles have .* as 'A &amp; 4'", edit, ITEMS, "title 4,", "A &amp; 4,"),
    "no HTML": (NO_NOTE, edit, ITEMS, "title 4,", "AT&T; R&D,"),
}

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_domain(tmp_path_factory.mktemp("good") / "shop")

@each("case", INPUTS)
def test_what_is_valid_is_read_and_what_is_not_gets_one_line(case, good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "shop")
    expected, change, *arguments = INPUTS[case]
    change(folder, *arguments)
    before = sorted(folder.rglob("*"))
    if isinstance(expected, str) and "NOTE" not in expected:
        with refused(expected) as error:
            data.read_domain(folder)
        assert "\n" not in str(error.value) and len(str(error.value)) < 900
    else:
        with warnings.catch_warnings(action="error"):
            domain = data.read_domain(folder)
        dropped = {reason: count for reason, count in domain.dropped.items() if count}
        if isinstance(expected, str):
            assert re.search(expected, data.describe(domain)) and not dropped
        else:
            assert dropped == expected
        assert {item for item, *_ in domain.dropped_items} <= {"i4"}
    assert sorted(folder.rglob("*")) == before  # nothing is ever written there

def test_ids_titles_and_dropped_items_are_as_they_were_written(tmp_path):
    items = default_items()
    items[0][1] = 'a "quoted", two-\nline  title'
    items[3][2] = "https://example.org/3.png"
    items[4][2] = "data:image/png;base64," + "4" * 5000
    domain = data.read_domain(write_domain(tmp_path / "shop", items))
    assert domain.item_ids[:4] == ["i0", "i1", "i2", "i5"] and domain.user_ids[:2] == ["u0", "u1"]
    assert domain.titles[0] == 'a "quoted", two- line title'
    assert domain.dropped_items == [("i3", "no file", "https://example.org/3.png"),
                                    ("i4", "no file", items[4][2][:100])]
    said = data.describe(domain)
    assert "'i3': no file 'https://example.org/3.png'" in said and "shop: 60 users, 118" in said

def test_the_digest_is_of_all_on_which_a_number_depends_and_no_more(tmp_path):
    items = [[f"i{k}", f"title {k}", "4.bmp"] for k in range(120)]
    folder = write_tables(tmp_path / "shop", items)
    (folder / "4.bmp").write_bytes(plain(kind="BMP"))
    first = "5489c146e06cef52cb30c307a0629277"
    assert data.read_domain(folder).digest == first  # published runs hang on it
    (folder / "4.bmp").rename(folder / "5.bmp")
    edit(folder, ITEMS, "4.bmp", "5.bmp", -1)
    edit(folder, EVENTS, "u0,i55,1011", "u0,i55,2011")  # it is the last one still
    assert data.read_domain(folder).digest == first
    digests = {first}
    for name, old, new in ((ITEMS, "title 5,", "title five,"), (EVENTS, "u0,i5,1001", "u0,i5,1003"),
                           (EVENTS, "u0,i55,2011", "u0,i55,1010"), (EVENTS, "u0,", "v0,")):
        edit(folder, name, old, new, -1)  # a title, an order, a tie, a user
        digests.add(data.read_domain(folder).digest)
    (folder / "5.bmp").write_bytes(plain(kind="PNG"))
    assert len({*digests, data.read_domain(folder).digest}) == 6

def test_many_rows_take_little_memory(tmp_path):
    """A row is a tuple, a time and what the file has of it; 680 bytes were taken once."""
    rows = [[f"u{n % 2000}", f"i{(n * 7 + n // 2000) % 120}", 10**9 + n] for n in range(30_000)]
    folder = write_domain(tmp_path / "d", None, rows)
    data.read_domain(folder)  # Python's table of strings and what is loaded grow once
    tracemalloc.start()
    data.read_domain(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / 30_000 < 200

def test_a_domain_has_the_name_by_which_it_was_given(good, tmp_path, monkeypatch):
    (tmp_path / "mytoys").symlink_to(good)
    monkeypatch.chdir(good)
    for path, name in ((tmp_path / "mytoys", "mytoys"), (".", "shop"), ("images/..", "shop")):
        assert data.read_domain(path).name == name

@each("name", ["3.png", EVENTS])
def test_what_cannot_be_read_is_not_damaged_but_stops(good, monkeypatch, name):
    def failing(path, read=Path.read_bytes):
        if path.name == name:
            raise OSError(errno.EIO, "broken disk")
        return read(path)
    monkeypatch.setattr(Path, "read_bytes", failing)
    with refused(f"{name} cannot be read: broken disk"):
        data.read_domain(good)

def python(*arguments, **options):
    return subprocess.Popen([sys.executable, "-B", *arguments], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)

def test_a_locale_without_utf_8_gets_one_line(tmp_path):
    items = [[f"i{k}", f"title {k}", f"images/\u5199{k}.png"] for k in range(120)]
    write_domain(tmp_path / "domains/sample", items)
    env = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    process = python(HERE / "data.py", "sample", env=env, cwd=tmp_path)
    _, error = process.communicate()
    assert process.returncode == 2 and error.count("\n") == 1
    assert "'i0': no file 'images/\\u51990.png'" in error

# ---- Pictures ----

def load(content):
    return data.load_picture(io.BytesIO(content))

MODES = [("RGB", "PNG"), ("L", "PNG"), ("P", "GIF"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"),
         ("PA", "TIFF"), ("1", "PNG"), ("CMYK", "JPEG"), ("YCbCr", "JPEG"), ("RGBA", "WEBP")]

@each("mode, kind", MODES)
def test_pictures_of_any_mode_become_rgb_on_white(mode, kind, monkeypatch):
    noise = numpy.random.default_rng(0).integers(0, 256, (20, 40, 4)).astype("uint8")
    source = Image.fromarray(noise)
    if mode not in ("RGBA", "LA", "PA"):
        source = source.convert("RGB")
    content = encoded(source.convert("LA" if mode == "PA" else mode).convert(mode), kind)
    read = Image.open(io.BytesIO(content)).convert("RGBA")
    slow = Image.alpha_composite(Image.new("RGBA", (40, 20), "white"), read).convert("RGB")
    shown = load(content)
    assert shown.mode == "RGB" and shown.tobytes() == slow.tobytes()
    if "A" not in mode:  # a layer for what has none takes three times the memory
        monkeypatch.delattr(Image, "alpha_composite")
        assert load(content).tobytes() == slow.tobytes()

@each("error", [MemoryError(), OSError("out of memory when reading image file")])
def test_memory_that_runs_out_is_no_pictures_fault(good, monkeypatch, error):
    monkeypatch.setattr(data, "load_picture", Mock(side_effect=error))
    with pytest.raises(MemoryError, match="out of memory while decoding images/"):
        data.read_domain(good)
    monkeypatch.setattr(data, "load_picture", Mock(side_effect=EOFError()))
    assert data.flaw(b"", "x") == "EOFError"
    with refused("120 of 120 .*'i0': not decodable 'EOFError'"):
        data.read_domain(good)

def test_checking_takes_as_many_threads_as_cores(good, monkeypatch):
    monkeypatch.setattr(data, "ThreadPool", Mock(wraps=data.ThreadPool))
    for cores, threads in ((3, 3), (64, 16)):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        data.read_domain(good)
        data.ThreadPool.assert_called_with(threads)

def grey(dtype, kind, value=40_000):
    return encoded(Image.fromarray(numpy.full((30, 40), value, dtype)), kind)

def moving(kind):
    red, blue = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    return encoded(red, kind, save_all=True, append_images=[blue])

def clear(mode):
    """All of it is of the colour that means transparent; without that it would be green or grey."""
    picture = Image.new(mode, (40, 30), 1)
    if mode == "P":
        picture.putpalette([255, 0, 0, 0, 255, 0])
    return encoded(picture, transparency=1)

UPRIGHT = Image.Exif()
UPRIGHT[0x0112] = 6  # to be turned by 90 degrees
BROKEN = b"\0\x08\0\x02\x01\x12\0\x03"  # browsers show it
RED, WHITE, GREY = (255, 0, 0), (255, 255, 255), (40_000 // 256,) * 3

PICTURES = {  # a file's bytes; its pixels or size as they are shown, or words of a refusal
    "transparent in a palette": (clear("P"), WHITE), "transparent grey": (clear("L"), WHITE),
    "first of WebP": (moving("WEBP"), RED), "first of PNG": (moving("PNG"), RED),
    "first of GIF": (moving("GIF"), RED), "16 bits, PNG": (grey("<u2", "PNG"), GREY),
    "16 bits, TIFF": (grey("<u2", "TIFF"), GREY), "big-endian": (grey(">u2", "TIFF"), GREY),
    "32 bits": (grey("i4", "TIFF"), "deep"), "floats": (grey("f4", "TIFF"), "deep"),
    "upright": (encoded(Image.new("RGB", (40, 30)), "JPEG", exif=UPRIGHT), "(30, 40)"),
    "broken EXIF": (encoded(Image.new("RGB", (40, 30)), exif=BROKEN), "(40, 30)"),
    "would call Ghostscript": (plain(kind="EPS"), "cannot identify")}
if features.check("avif"):
    PICTURES["AVIF"] = (plain(kind="AVIF"), "(40, 30)")

@each("name", PICTURES)
def test_what_is_shown_of_a_picture_or_why_it_is_not(name):
    content, expected = PICTURES[name]
    try:
        picture = load(content)
        found = (picture.size, picture.getpixel((5, 5)))
    except (OSError, ValueError) as error:
        found = error
    if isinstance(expected, str):
        assert expected in str(found)
    else:
        assert numpy.abs(numpy.subtract(found[1], expected)).max() < 15  # WebP loses some

# ---- What is prepared ----

def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path):
    path = tmp_path / "new/run"
    def run(code):
        code = f"import data, pathlib, time\npath = pathlib.Path({str(path)!r})\n{code}"
        return python("-c", code, cwd=HERE)
    process = run("with data.lock(path):\n print('held', flush=True)\n time.sleep(60)")
    assert process.stdout.readline() == "held\n"
    waiting = run("with data.lock(path, True):\n print('mine')")
    assert waiting.stdout.readline().startswith("waiting for another process, which is preparing")
    assert path.with_name(".run.lock").stat().st_mode & 0o777 == 0o666  # for a colleague, too
    process.kill()
    assert waiting.communicate(timeout=30)[0] == "mine\n" and waiting.returncode == 0

@each("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_one_is_told_and_nobody_waits(tmp_path, monkeypatch, number, capsys):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(number, os.strerror(number))))
    (tmp_path / ".run.lock").write_text("123\nanother-node\n")  # left by a run that was killed
    with data.lock(tmp_path / "run"):
        pass
    assert re.fullmatch(f"note: .*{tmp_path}/run has no locks.*\n", capsys.readouterr().out)

def test_a_file_appears_when_it_is_whole_with_the_usual_mode(tmp_path, monkeypatch):
    with data.whole_file(tmp_path / "x") as partial:
        partial.write_text("x")
        partial.chmod(0o600)  # as safetensors does
        assert not (tmp_path / "x").exists()
    data.write_text(tmp_path / "y", "\u00e9\n")
    data.prepare_model("tiny", tmp_path)
    assert len({(tmp_path / path).stat().st_mode for path in files_of(tmp_path)}) == 1
    with pytest.raises(OSError, match="No space.*y'"), data.whole_file(tmp_path / "y"):
        raise OSError(errno.ENOSPC, "No space left")
    assert (tmp_path / "y").read_bytes() == b"\xc3\xa9\n" and not list(tmp_path.glob("*.part"))
    monkeypatch.setattr(Path, "chmod", Mock(side_effect=PermissionError(errno.EPERM, "no modes")))
    data.write_csv(tmp_path / "y", ["a", "b"], [[1, "2,3"]])
    assert (tmp_path / "y").read_bytes() == b'a,b\r\n1,"2,3"\r\n'
    data.write_tiny_model(tmp_path / "second")
    assert files_of(tmp_path / "second") == files_of(tmp_path / "tiny-qwen2.5-vl")

def test_what_another_process_has_made_is_not_written_again(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def lock(path, wait):
        assert path == tmp_path and wait
        (tmp_path / "made").touch()  # by the other process
        yield
    monkeypatch.setattr(data, "lock", lock)
    data.prepare(tmp_path / "made", tmp_path, Mock(side_effect=AssertionError("written again")))

def test_where_nothing_can_be_written_the_way_out_is_data_dir(tmp_path):
    (tmp_path / "file").touch()
    for call, name in ((data.prepare_model, "tiny"), (data.prepare_domain, "sample")):
        with refused("cannot write .*another --data-dir or --out$"):
            call(name, tmp_path / "file/domains")

def test_an_unknown_domain_is_refused_and_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tables(Path("domains/my-shop"))
    before = sorted(tmp_path.rglob("*"))
    for name in ("sampel", "./sample", "domains/my-shop/items.csv", ""):
        with refused("items.csv is missing; .*sample, toys"):
            data.prepare_domain(name, Path("domains"))
    for known in ("toys", "my-shop", "./domains/my-shop"):
        assert data.check_domain(known, Path("domains")).name == Path(known).name
    assert sorted(tmp_path.rglob("*")) == before

def test_the_sample_world_is_the_papers_situation(tmp_path, monkeypatch):
    """The noun tells the category and the hue the style, always; the brand nine times of ten the
    style, the shape the category as often as is said; id and order tell nothing."""
    draw = Mock(wraps=data.draw_item)
    monkeypatch.setattr(data, "draw_item", draw)
    data.write_sample_world(tmp_path, users=300, per_cell=6, shape=0.3)
    rows = rows_of(tmp_path, ITEMS)
    assert [row[0] for row in rows] == [f"{k:04}" for k in range(384)]
    assert rows[0] == ["0000", "Elmo kettle 63", "images/0000.png"]  # published results hang on it
    brands, nouns, _ = zip(*[row[1].split() for row in rows])
    _, drawn, hues = zip(*[call.args for call in draw.call_args_list])
    category = numpy.array([data.NOUNS.index(noun) for noun in nouns])
    style = numpy.array([round(8 * hue) for hue in hues])
    brand = numpy.array([data.BRANDS.index(name) for name in brands])
    shape = numpy.array([data.SHAPES.index(name) for name in drawn])
    assert numpy.bincount(8 * category + style).tolist() == [6] * 64
    assert abs((brand == style).mean() - (0.9 + 0.1 / 8)) < 0.05  # standard deviation .015
    assert abs((shape == category).mean() - (0.3 + 0.7 / 8)) < 0.1
    for kind in (category, style):
        assert abs(numpy.corrcoef(kind, range(384))[0, 1]) < 0.15  # that of ids by kind is .99
    for row, expected in zip(rows[:64], style):
        colours = Image.open(tmp_path / row[2]).convert("HSV").getcolors(9999)
        hue = max(colours, key=lambda colour: (colour[1][1] > 99, colour[0]))[1][0]
        assert abs(hue - 256 * expected / 8) < 4  # of the most frequent vivid colour
    events = [(user, int(when), item) for user, item, when in rows_of(tmp_path, EVENTS)]
    assert sorted(events, key=lambda event: event[1]) == events  # as it happened
    events.sort(key=lambda event: event[0])
    tied = [a < b for (user, start, a), (other, end, b) in itertools.pairwise(events)
            if (user, start) == (other, end)]
    assert len(tied) > 200 and abs(numpy.mean(tied) - 0.5) < 0.12  # in no order of ids
    assert not data.read_domain(tmp_path).remarks

# ---- Amazon 2014, from a server on the loopback address that speaks the real format ----

class Shop(http.server.ThreadingHTTPServer):
    """140 items and 70 users in Amazon's format. `faults`: {path: answers before the good one}."""
    daemon_threads = True
    request_queue_size = 64
    def __init__(self):
        super().__init__(("127.0.0.1", 0), ShopHandler)
        self.faults, self.log, self.delay, self.pauses = {}, [], 0.0, []
        self.items = [f"B{k:05}" for k in range(140)]
        self.files = {f"/images/I/{item}.jpg": plain() for item in self.items}
        bought = [(f"U{u}", self.items[(u * 2 + 5 * k) % 140], 86400 * (k // 2))
                  for u in range(70) for k in range(12)]
        bought += [(f"U{u}", "../../odd", 0) for u in range(9)]
        bought += [("five", self.items[k], 0) for k in (0, 40, 50, 60, 70)]
        bought.sort(key=lambda row: row[1])  # as the real file is
        reviews = [{"reviewerID": user, "asin": item, "reviewText": "\u00e9",
                    "unixReviewTime": when} for user, item, when in bought]
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
    server = Shop()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(data, "sleep", server.pauses.append)
    monkeypatch.setattr(data, "TIMEOUT", 0.5)
    yield server
    server.shutdown()
    server.server_close()

def answer(number, content=b"", **options):
    return lambda handler: handler.answer(number, content, **options)

PATH = "/images/I/B{:05}.jpg".format  # of item k's picture

FAULTS = {  # of item k: what comes before its picture; what dropped.csv says if it never comes
    0: ([answer(404)], "HTTP 404"),
    1: ([answer(500)], ""),
    2: ([answer(429, **{"Retry-After": 7})], ""),
    3: ([lambda handler: time.sleep(1)] * 4, "no answer: TimeoutError timed out"),
    4: ([answer(200, plain(size=(50, 50)), cut=400)], ""),  # replaced before it is begun anew
    5: ([answer(200, b"<html>")], "no answer: no picture, cannot identify image file"),
    6: ([answer(200, plain("P", (1, 1), "GIF"))], "(1, 1) P: too large, small, thin or deep"),
    7: ([answer(503)] * 4, "no answer: HTTP 503"),
    9: ([answer(302, Location=PATH(8))], ""),
    10: ([answer(503)] * 4, "no answer: HTTP 503"),
    12: ([answer(200, plain(), cut=100), answer(200, plain(), whole=True)], ""),
    13: ([answer(200, b"0" * 9999)], "over 9,000 bytes"),
    14: ([answer(302, Location="http://localhost" + PATH(8))], "no answer: HTTP 302"),
    19: ([answer(503, **{"Retry-After": 9999})], "")}

def test_amazon_from_nothing_with_every_fault(shop, tmp_path, capsys, monkeypatch):
    assert (data.MAX_BYTES, data.MAX_SECONDS) == (10_000_000, 60)
    monkeypatch.setattr(data, "MAX_BYTES", 9000)
    shop.faults = {PATH(k): list(answers) for k, (answers, _) in FAULTS.items()}
    reviews, metadata = shop.archives
    shop.faults[reviews] = [answer(200, shop.files[reviews], cut=1000)]
    shop.meta[15].pop("title")
    shop.meta[16].pop("imUrl")
    shop.meta[17]["imUrl"] = "http://g-ecx.images-amazon.com/images/G/01/no-img-lg.gif"
    shop.meta[18]["imUrl"] = "http://localhost/private.jpg"
    shop.put(metadata, map(repr, shop.meta))
    domain = shop.prepare(tmp_path)
    bare = "no title, no picture or an odd id"
    dropped = {k: reason for k, (_, reason) in FAULTS.items() if reason}
    dropped |= dict.fromkeys(range(15, 19), bare)
    listed = {row[0]: row[1] for row in rows_of(tmp_path / "toys", "dropped.csv")}
    assert listed.pop("../../odd") == bare  # it would be a file's name
    assert listed == {shop.items[k]: reason for k, reason in dropped.items()}
    assert domain.item_ids == [item for k, item in enumerate(shop.items) if k not in dropped]
    assert domain.titles[0] == f"Toy & Game {shop.items[1]}"
    mine = [domain.item_ids[item] for item in domain.sequences[domain.user_ids.index("U63")]]
    assert mine == [shop.items[k] for k in (126, 131, 1, 136, 11, 21, 26, 31, 36, 41)]  # two a day
    assert (reviews, "bytes=1000-") in shop.log  # the cut download went on
    assert not any(start for path, start in shop.log if path.endswith(".jpg"))
    assert 7 in shop.pauses and max(shop.pauses) == 30  # as the server asked, within reason
    for k in (4, 9, 12):
        assert (tmp_path / f"toys/images/{shop.items[k]}.jpg").read_bytes() == plain()
    buyers = {row[0] for row in rows_of(tmp_path / "toys", EVENTS)}
    assert len(buyers) == 70 and "five" not in buyers  # without B00000 that one has four
    said = capsys.readouterr().out
    counts = "71 users, 141 items, 854 events, published [19412, 11924, 167597]; 13 items lost"
    assert counts in said
    assert f"5 of them gave no answer; to try again, delete {tmp_path}/toys/items.csv" in said
    (tmp_path / "toys/items.csv").unlink()
    assert len(shop.prepare(tmp_path).item_ids) == 136  # all came, but four without an address

def test_what_is_there_is_not_fetched_again(shop, tmp_path, monkeypatch):
    (tmp_path / "amazon2014").mkdir()
    first, second = shop.archives  # put there by hand; lacks only its final name
    (tmp_path / f"amazon2014{first}").write_bytes(shop.files.pop(first))
    (tmp_path / f"amazon2014{second}.part").write_bytes(shop.files[second])
    write = Mock(wraps=data.write_csv)
    monkeypatch.setattr(data, "write_csv", write)
    shop.prepare(tmp_path)
    written = [call.args[0].name for call in write.call_args_list]
    assert written == ["dropped.csv", EVENTS, ITEMS]  # where items.csv is, the domain is whole
    assert dict(shop.log)[second] == f"bytes={len(shop.files[second])}-"
    assert sorted(path for path, _ in shop.log) == sorted(shop.files)
    (tmp_path / "toys" / ITEMS).unlink()
    (tmp_path / "toys/images/B00003.jpg").write_bytes(b"")  # a power cut
    shop.prepare(tmp_path)
    assert [path for path, _ in shop.log[len(shop.files):]] == ["/images/I/B00003.jpg"]

def start(shop, folder, asked=math.inf):
    """Prepare toys in a process, and come back when it has asked for so much, or has ended."""
    shop.log.clear()
    process = python(HERE / "data.py", "toys", "--data-dir", folder, "--mirror", shop.url,
                     preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    # Ctrl-C reaches it, even if ours is in the background.
    while len(shop.log) < asked and process.poll() is None:
        time.sleep(0.005)
    return process

def test_a_preparation_killed_at_any_moment_ends_the_same(shop, tmp_path):
    shop.delay = 0.02
    for asked in (1, 2, 40):
        process = start(shop, tmp_path / "killed", asked)
        process.kill()
        process.communicate()
    for folder in ("killed", "calm"):
        assert start(shop, tmp_path / folder).returncode == 0
    assert files_of(tmp_path / "calm") == files_of(tmp_path / "killed")

EVIL = gzip.compress(b"{'asin': 'B00001', 'title': __import__('os').getcwd()}\n")
OF_2023 = gzip.compress(b'{"user_id": "A", "parent_asin": "B00001", "timestamp": 1600000000000}\n')
OF_2018 = gzip.compress(b'{"reviewerID": "A", "asin": "B00001", "unixReviewTime": 1500000000}\n')
META_2018 = gzip.compress(b'{"asin": "B00001", "title": "x", "imageURL": ["https://x.org"]}\n')

@each("which, content", [
    (1, EVIL[:40]), (1, b"\0" * 100), (1, EVIL), (1, b""), (1, META_2018), (0, b""), (0, OF_2018),
    (0, OF_2023)])
def test_an_archive_that_is_damaged_or_of_another_year_is_named(shop, tmp_path, which, content):
    name = shop.archives[which]
    right, shop.files[name] = shop.files[name], content
    with refused(f"amazon2014{name} .*; 2014's reviews .*; delete"):
        shop.prepare(tmp_path)
    assert not (tmp_path / "toys").exists()
    shop.files[name] = right
    (tmp_path / f"amazon2014{name}").unlink()
    assert len(shop.prepare(tmp_path).item_ids) == 140

def test_without_a_network_one_line_says_where_to_put_what(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "sleep", lambda seconds: None)
    for mirror in ("http://127.0.0.1:9", "nonsense"):
        with refused(f"cannot fetch {mirror}/reviews_Beauty_5.json.gz .*"
                     f"{tmp_path}/amazon2014.*python data.py DOMAIN --mirror URL"):
            data.prepare_domain("beauty", tmp_path, mirror)

AGAIN = "check the network, run again"

@each("count, expected, fault", [
    (26, 114, answer(404)), (26, 114, answer(410)), (5, 135, answer(503)), (6, AGAIN, answer(503)),
    (6, AGAIN, answer(403)), (6, AGAIN, answer(200, b"<html>")), (6, AGAIN, answer(200)),
    (140, AGAIN, answer(404)), (45, "nothing is left; lost: 45 items: HTTP 404, 1 ", answer(404))])
def test_an_outage_does_not_shrink_the_domain_for_good(shop, tmp_path, count, expected, fault):
    """What is not there is left out, even if it comes first; what is refused is fetched later."""
    shop.faults = {path: [fault] * 4 for path in list(shop.files)[:count]}
    if isinstance(expected, str):
        with refused(expected):
            shop.prepare(tmp_path)
        assert not list((tmp_path / "toys").glob("*.csv"))
        shop.faults = {}
        expected = 140
    assert len(shop.prepare(tmp_path).item_ids) == expected

def test_a_picture_that_comes_drop_by_drop_is_given_up(shop, monkeypatch):
    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(40):
            handler.wfile.write(b"x")
            time.sleep(0.1)
    monkeypatch.setattr(data, "MAX_SECONDS", 0.5)
    shop.faults = {"/slow": [drip] * 4}
    content = io.BytesIO()
    assert data.fetch(f"{shop.url}/slow", content, small=True) == "no answer: TimeoutError too slow"
    assert len(shop.log) == 1 and len(content.getvalue()) < 9

def test_ctrl_c_ends_in_one_line_at_once(shop, tmp_path):
    shop.faults = {path: [lambda _: time.sleep(60)] for path in list(shop.files)[:140]}  # silent
    process = start(shop, tmp_path, asked=18)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=4)
    assert process.returncode == 130
    assert err.strip() == "stopped; the same command goes on from here"

# ---- A run and its files ----

COLOUR = lambda k: (k, 5 * k % 256, 255 - k)  # of item k's picture, but for a corner
LONG = "Halma basket 7 " * 30  # 90 words of the tiny model, each of them a token

def bought(n):
    """The items of few's user n, oldest first."""
    return [(20 * n + j) * 7 % 130 for j in range(20)]

def negatives_of(n, split="test", seed=0):
    drawn = random.Random(f"{seed} {split} u{n}").sample(range(130), 120)
    return [item for item in drawn if item not in bought(n)][:100]

def write_few(folder):
    """A domain of 33 users with 20 of 130 items each: a run takes a second."""
    ids = [f"i{k}" if k != 14 else "-b14" for k in range(130)]  # ids may begin with a dash
    titles = [f"{data.BRANDS[k % 8]} {data.NOUNS[k // 8 % 8]} {k % 100}" for k in range(130)]
    titles[123:126] = [f"{LONG} kite", f"{LONG} drum", f"Arvo {LONG}"]  # two begin alike
    items = [[item, titles[k], f"images/{k}.png"] for k, item in enumerate(ids)]
    events = [[f"u{n}", ids[item], j] for n in range(33) for j, item in enumerate(bought(n))]
    write_tables(folder, [["lost", "Arvo kite", "none.png"], *items], events)
    for k in range(130):
        picture = Image.new("RGB", (84, 84), COLOUR(k))
        picture.paste("black", (0, 0, 20 + k % 9, 30))  # so that how it is scaled matters
        picture.save(folder / f"images/{k}.png")

BRIEF = ("--epochs 2 --lr 2e-3 --history 6 --revision v2 "
         "--log-every 1 --save-every 3")  # 8 steps, checkpoints at 3 and 6

@pytest.fixture
def own_model(few, tmp_path):
    """A copy of the tiny model, which a test may spoil."""
    return shutil.copytree(few / TINY, tmp_path / "m")

@pytest.fixture(scope="session")
def finished(few):
    """The folder of a finished run of vlm2rec; what it printed is in few/printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:  # as a notebook's: no reconfigure()
        assert command(few, BRIEF) == 0
    (few / "printed").write_text(printed.getvalue())
    return few / "runs" / RUN

@pytest.fixture
def copied(finished, few, tmp_path):
    """A home with the finished run, which a test may spoil."""
    shutil.copytree(few, tmp_path, dirs_exist_ok=True)
    return tmp_path

def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())

@pytest.fixture
def told(capsys):
    """That exit code 2, or 130 after Ctrl-C, came with one line, which holds these words."""
    def check(code, *words):
        error = capsys.readouterr().err.strip()
        assert re.fullmatch("error: .*", error), error
        assert code == (130 if "stopped" in error else 2)
        assert all(word in error for word in words), error
    return check

def log_of(folder, word="loss"):
    """The lines of training steps, or of validations, which have an "epoch"."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if word in line]

def vectors_of(path, kind):
    """(ids, {space: vectors}) of items.safetensors or users.safetensors."""
    with safetensors.safe_open(path / f"{kind}s.safetensors", "pt") as file:
        ids = json.loads(file.metadata()[f"{kind}_ids"])
        return ids, {name: file.get_tensor(name) for name in file.keys()}

def test_a_run_writes_what_the_design_says(finished, few):
    files = ("adapter config.json dropped.csv items.safetensors log.jsonl metrics.json ranks.csv "
             "recommendations.png table.md users.safetensors")
    assert sorted(os.listdir(finished)) == files.split()
    assert len({path.stat().st_mode for path in (finished / "adapter").iterdir()}) == 1
    assert "\nlost,no file,none.png" in (finished / "dropped.csv").read_text()
    assert [line["step"] for line in log_of(finished)] == list(range(1, 9))
    printed = (few / "printed").read_text()
    assert (finished / "table.md").read_text() in printed
    assert (finished.parent / "table.md").read_text() in printed
    assert "4 tokens; 3 titles have 64 or more, and are cut: 2 of these differ" in printed
    assert "note: --model tiny has random weights" in printed

def test_each_epochs_figures_are_logged_kept_and_printed(finished, few):
    metrics = metrics_of(finished)
    first, *epochs = metrics["epochs"]
    assert " ".join(first) == "H@10 N@10 H@20 N@20 f2f t2f v2f t2t v2v cos_text cos_vision"
    assert first["f2f"] == first["N@10"]
    lines = log_of(finished, "epoch")
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 4), (2, 8)]
    for line, scores in zip(lines, epochs, strict=True):
        assert line.items() >= scores.items()
    printed = re.findall("^validation: (.*)", (few / "printed").read_text(), re.M)
    assert printed == [", ".join(f"{name} {value:.4f}" for name, value in scores.items())
                       for scores in metrics["epochs"]]
    assert metrics["untrained"] == first
    assert metrics["valid"] == max(metrics["epochs"], key=lambda scores: scores["N@10"])
    for end, scores in (("first", first), ("last", epochs[-1])):
        assert metrics["gradient"][end] == {m: scores[f"cos_{m}"] for m in MODALITIES}
    known = ("domain", "method", "seed", "model", "commit")
    assert [metrics[name] for name in known] == ["few", "vlm2rec", 0, "tiny", None]

def test_the_runs_table_shows_the_metrics_as_they_are(finished):
    table = (finished / "table.md").read_text()
    metrics = metrics_of(finished)
    shown = {row: metrics[row] for row in ("test", "popularity", "chance", "test_full", "valid",
             "untrained", "test_untied", "target seen 0 to 4 times")}
    shown |= {"N@10": metrics["queries"]["N@10"], **metrics["geometry"], **metrics["gradient"]}
    for row, values in shown.items():
        cells = [f"{value:.4f}" for value in values.values()][:4 if "H@10" in values else None]
        assert f"\n| {row} | {' | '.join(cells)} |\n" in table

def ranks_of(z, e, candidates, place=-1):
    """Of few's users (33, D) and items (130, D): the ranks of what each bought in this place."""
    ranks = []
    for n in range(33):
        scores = torch.cosine_similarity(z[[n]], e)
        ranks.append(1 + (scores[candidates[n]] > scores[bought(n)[place]]).sum())
    return torch.stack(ranks)

def scores_of(*given):
    return vlm2rec.hits_and_ndcg(ranks_of(*given))

def test_the_metrics_are_those_of_the_exported_files(finished):
    """What the metrics are of ranks and of distances is held by hand and by loops above."""
    item_ids, e = vectors_of(finished, "item")
    user_ids, z = vectors_of(finished, "user")
    own = [bought(n) for n in range(33)]
    negatives = [negatives_of(n) for n in range(33)]
    others = [sorted({*range(130)} - {*items}) for items in own]
    metrics = metrics_of(finished)
    ranks = [ranks_of(z["fused"], e["fused"], candidates) for candidates in (negatives, others)]
    for name, found in zip(("test", "test_full"), ranks):
        assert metrics[name] == approx(vlm2rec.hits_and_ndcg(found))
    rows = data.read_csv(finished / "ranks.csv", ("user_id", "item_id", "rank", "rank_full"))
    for n, (_, user, item, *found) in enumerate(rows):
        assert (user, user_ids[n], item) == (f"u{n}", f"u{n}", item_ids[own[n][-1]])
        assert list(map(float, found)) == [ranks[0][n], ranks[1][n]]
    spaces = {"f": "fused", "t": "text", "v": "vision"}
    assert [*metrics["queries"]["N@10"]] == ["f2f", "t2f", "v2f", "t2t", "v2v"]
    for (query, _, items), value in metrics["queries"]["N@10"].items():
        found = scores_of(z[spaces[query]], e[spaces[items]], negatives)
        assert value == approx(found["N@10"])
    targets = torch.tensor([items[-1] for items in own])
    test = vlm2rec.Evaluation([], targets, torch.tensor(negatives), own)
    for space in spaces.values():
        expected = vlm2rec.geometry(z[space], e[space], test)
        assert metrics["geometry"][space] == approx(expected, rel=1e-4)

def test_mean_pool_by_hand_with_a_seed_of_its_own(few, tmp_path):
    """Means of the six latest vectors before the target, of the last purchase or the one before."""
    numpy.save(tmp_path / "v.npy", numpy.random.default_rng(0).normal(size=(131, 9)))
    flags = ["--method mean-pool --seed 1 --history 6 --out", tmp_path]
    assert command(few, *flags, "--embeddings", tmp_path / "v.npy") == 0
    [folder] = (tmp_path / "few").glob("mean-pool*-seed1")
    e = vectors_of(folder, "item")[1]["fused"]
    metrics = metrics_of(folder)
    for split, place in (("valid", -2), ("test", -1)):
        z = torch.stack([e[bought(n)[place - 6:place]].mean(dim=0) for n in range(33)])
        negatives = [negatives_of(n, split, seed=1) for n in range(33)]
        assert metrics[split] == approx(scores_of(z, e, negatives, place))
    assert_close(vectors_of(folder, "user")[1]["fused"], z)
    assert not {"queries", "geometry", "gradient", "untrained"} & set(metrics)

def test_the_code_of_the_adapters_card_gives_the_item_embeddings_back(finished, few):
    """By transformers and peft alone, from pixels; the base is that of --revision."""
    folder = finished / "adapter"
    card = (folder / "README.md").read_text().replace("the path of this folder", str(folder))
    code = [line.strip() for line in card.splitlines() if line.startswith("    ")]
    assert 'revision="v2"' in code[0] and "as --method vlm2rec on few" in card
    names = {"transformers": transformers, "peft": peft}
    exec("\n".join(code), names)
    vlm = names["vlm"].eval().get_base_model()
    processor = transformers.AutoImageProcessor.from_pretrained(few / TINY, backend="pil")
    def last(prompt, items):
        ids = tokenizer_of(few / TINY)(f"{prompt}<|im_end|>").input_ids
        return own_state(vlm, processor, open_few(few), ids, items)
    text = last("Fjord kettle 77", [])
    vision = last(f"<|vision_start|>{4 * '<|image_pad|>'}<|vision_end|>", [77])
    _, e = vectors_of(finished, "item")
    for space, expected in vlm2rec.fuse({"text": text, "vision": vision}).items():
        assert_close(e[space][77], expected, atol=1e-5, rtol=0)
    # A run that learnt nothing would pass by the base alone: LoRA's B begins as 0.
    assert all(map(torch.any, load_file(folder / "adapter_model.safetensors").values()))

@each("method", METHODS)
def test_each_method_is_what_its_name_says_and_leaves_nothing_alive(
        method, few, tmp_path, monkeypatch):
    alive, passes = [], set()
    call = vlm2rec.Encoder.__call__
    def noted(encoder, histories, modality):
        alive.append(weakref.ref(encoder.vlm))
        passes.add(modality)
        return call(encoder, histories, modality)
    monkeypatch.setattr(vlm2rec.Encoder, "__call__", noted)
    gc.disable()  # what dies then dies by itself, or by what main does
    code = command(few, "--epochs 1 --batch 4 --train-users 4 --log-every 1",
                   f"--method {method} --out", tmp_path)
    kept = {reference() for reference in alive}
    gc.enable()
    modalities, terms = METHODS[method]
    modalities = set(modalities.split())
    assert code == 0 and passes == modalities and kept == ({None} if modalities else set())
    folder = tmp_path / "few" / f"{method}-seed0"
    metrics = metrics_of(folder)
    assert all(map(math.isfinite, metrics["test"].values()))
    assert set(load_file(folder / "users.safetensors")) == {*modalities, "fused"}
    trained = terms is not None
    assert trained == ("untrained" in metrics) == (folder / "log.jsonl").exists()
    assert ("gradient" in metrics) == (trained and len(modalities) == 2)
    assert (folder / "adapter").exists() == (trained and len(modalities) > 0)
    if trained:
        others = {"step", "loss", "seconds", "minutes_left", "epoch", *metrics["valid"]}
        assert set(log_of(folder)[0]) - others == set(terms.split())

def test_what_only_watches_changes_no_byte(finished, few, tmp_path, monkeypatch):
    """Fig. 1b, checkpoints; nor do activations that are computed again."""
    monkeypatch.setattr(vlm2rec, "gradient_cosines", lambda *_: dict(cos_text=0, cos_vision=0))
    assert command(few, BRIEF, "--checkpointing on --save-every 1 --out", tmp_path) == 0
    files, before = files_of(tmp_path / RUN), files_of(finished)
    for name in ("adapter/adapter_model.safetensors", "items.safetensors", "ranks.csv"):
        assert files[Path(name)] == before[Path(name)]

def test_an_adapter_is_evaluated_without_training(finished, few, tmp_path, monkeypatch):
    monkeypatch.delattr(vlm2rec, "train")
    assert command(few, BRIEF, "--adapter", finished / "adapter", "--out", tmp_path) == 0
    folder = next((tmp_path / "few").glob("vlm2rec+*adapter-seed0"))
    assert (folder / "ranks.csv").read_bytes() == (finished / "ranks.csv").read_bytes()
    assert "untrained" not in metrics_of(folder)

@each("method", ["vlm2rec", "sasrec"])
def test_a_seed_gives_the_same_weights_and_another_one_others(method, few):
    def weights(seed):
        model, _ = vlm2rec.make_model(open_few(few, method=method, seed=seed))
        return torch.cat([weight.flatten() for weight in model.groups[0]["params"]])
    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))

# ---- Killed, stopped, started twice ----

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["vlm2rec"])

def in_a_process(flags, module, function, call):
    real = getattr(sys.modules[module], function)
    calls = itertools.count(1)
    def fatal(*arguments):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    setattr(sys.modules[module], function, fatal)
    sys.stdout = open(os.devnull, "w")
    sys.exit(command(*flags))

def process(*flags, kill=("os", "replace", 0)):
    """`command` in a process, killed as it calls a module's function for the n-th time."""
    child = FORKS.Process(target=in_a_process, args=(flags, *kill))
    child.start()
    child.join()
    return child.exitcode

SASREC = "--method sasrec --batch 4 --train-users 4 --log-every 1 --save-every 1"

@each("flags, moments", [
    # in step 7, saved was 6; then as log, epoch's checkpoint, ranks.csv, table.md would be there
    (BRIEF, [("vlm2rec", "log_step", 7), *[("os", "replace", n) for n in (3, 4, 8, 10)]]),
    (SASREC, [("vlm2rec", "validate", 4), ("os", "replace", 5), ("vlm2rec", "log_step", 9)])])
def test_a_run_killed_at_any_moment_ends_in_the_same_bytes(flags, moments, finished, few, tmp_path):
    assert command(few, flags) == 0
    name = "few/sasrec-seed0" if "sasrec" in flags else RUN
    folder = tmp_path / name
    folder.mkdir(parents=True)
    for left in ("config.json", "log.jsonl"):  # of a run that came to nothing, in a power cut
        (folder / left).write_text('{"step": 1}\n\0\0}\n{"lr": 7}\n{"st')
    (folder / "notes.txt").write_text("mine")
    for moment in moments:
        assert process(few, flags, "--out", tmp_path, kill=moment) == -signal.SIGKILL
        assert not (folder / "table.md").exists()
    assert process(few, flags, "--out", tmp_path) == 0
    files = files_of(few / "runs" / name) | {Path("notes.txt"): b"mine"}
    files[Path("log.jsonl")] = (folder / "log.jsonl").read_bytes()  # has times
    assert files_of(folder) == files
    logs = [log_of(run, "step") for run in (folder, few / "runs" / name)]
    for line in itertools.chain(*logs):
        for clock in {"seconds", "minutes_left"} & set(line):
            del line[clock]
    assert logs[0] == logs[1]  # each step once

def test_a_full_disk_leaves_the_last_checkpoint(few, tmp_path, told):
    flags = [BRIEF, "--out", tmp_path]
    path = tmp_path / RUN / "checkpoint.pt"
    assert process(few, *flags, kill=("vlm2rec", "log_step", 4)) == -signal.SIGKILL
    kept = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # a limit on a file stands for the disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, limits[1]))
    code = command(few, *flags)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told(code, "File too large", str(path))
    assert path.read_bytes() == kept and not list(tmp_path.rglob("*.part"))

def test_of_two_runs_in_one_folder_the_second_gets_one_line(few, tmp_path, told):
    with data.lock(tmp_path / RUN):
        told(command(few, BRIEF, "--out", tmp_path),
             f"error: {tmp_path / RUN}: another run is at work there")

def test_an_old_finished_run_is_shown_compared_and_asked(copied, monkeypatch, capsys, told):
    """Its files lack what is written today; made on another device, in a folder that cannot be
    written now. Nothing is done again."""
    folder = copied / "runs" / RUN
    more = {"device": "cuda", "python": "3.9", "train_users": 0}
    for name, change in (("config.json", more), ("metrics.json", {})):
        old = json.loads((folder / name).read_text()) | change
        for key in {"alpha", "paths", "code", "users"} & set(old):
            del old[key]
        (folder / name).write_text(json.dumps(old))
    before = files_of(copied)
    monkeypatch.delattr(data, "lock")
    monkeypatch.delattr(data, "whole_file")
    assert command(copied, BRIEF, "--save-every 9 --checkpointing off") == 0
    printed = capsys.readouterr().out
    assert f"{folder} is finished since " in printed and "| test, runs in " in printed
    assert "left out" not in printed
    assert command(copied, BRIEF, "--recommend i1") == 0
    told(command(copied, BRIEF, "--method vlm2rec sft --recommend i1"),
         "sft-seed0 holds no finished run")
    assert files_of(copied) == before

def test_a_finished_run_outlives_its_models_folder(few, own_model, tmp_path, capsys):
    flags = ["--method vanilla --image-size 56 --model", own_model, "--out", tmp_path]
    assert command(few, *flags) == 0
    own_model.rename(tmp_path / "elsewhere")
    assert command(few, *flags) == 0
    assert "vanilla-seed0 is finished since" in capsys.readouterr().out

def test_what_differs_from_a_run_is_named_and_the_run_left_alone(copied, told):
    folder = copied / "runs" / RUN
    before = files_of(copied)
    for name in ("table.md", "checkpoint.pt"):  # finished, or not
        (folder / "table.md").rename(folder / name)
        told(command(copied, BRIEF, "--epochs 3 --tau 1"),
             f"{folder} holds a run with epochs 2, tau 0.1: remove it or take another --out")
    (folder / "checkpoint.pt").rename(folder / "table.md")
    assert files_of(copied) == before
    Image.new("RGB", (40, 40), "red").save(copied / "domains/few/images/9.png")
    told(command(copied, BRIEF), "holds a run with another catalogue ")
    told(command(copied, BRIEF, "--recommend i1"), "its catalogue has changed since")
    for width in (8, 9):
        numpy.save(copied / "v.npy", numpy.eye(131, width))
        code = command(copied, "--method mean-pool --embeddings", copied / "v.npy")
    told(code, "holds a run with embeddings ")

@each("left", ["table.md", "checkpoint.pt"])
@each("name", ["source", "transformers"])
def test_other_code_is_told_and_blocks_half_a_run_of_another_transformers(
        left, name, few, tmp_path):
    run = open_few(few)._replace(folder=tmp_path)
    code = run.settings["code"]
    assert (code["torch"], code["transformers"]) == (torch.__version__, transformers.__version__)
    for module in (vlm2rec, data):  # the source is known by its content
        with patch.object(module, "__file__", few / "domains/few" / ITEMS):
            assert vlm2rec.run_settings(run.config)["code"]["source"] != code["source"]
    before = run.settings | {"code": code | {name: "another"}}
    (tmp_path / "config.json").write_text(json.dumps(before))
    (tmp_path / left).touch()
    if (left, name) == ("checkpoint.pt", "transformers"):
        with refused("was begun with transformers another: go on"):
            vlm2rec.check_folder(run)
    else:
        note = f"note: {tmp_path} was made with other code: {name} another\n"
        assert vlm2rec.check_folder(run) == note

@each("name, path", [
    ("model", TINY), ("adapter", f"runs/{RUN}/adapter"),
    ("embeddings", f"runs/{RUN}/items.safetensors")])
def test_what_is_given_is_known_by_its_content(name, path, copied, few):
    def settings(home):
        method = "mean-pool" if name == "embeddings" else "vlm2rec"
        return vlm2rec.run_settings(vlm2rec.Config(method=method, **{name: str(home / path)}))
    assert vlm2rec.differences(settings(few), settings(copied)) == ""
    file = next((copied / path).glob("*.safetensors"), copied / path)
    file.write_bytes(file.read_bytes() + b" ")
    assert vlm2rec.differences(settings(few), settings(copied)).startswith(f"{name} ")

@each("name, content, flags, words", [
    ("config.json", b"{", "", "config.json is missing or damaged"),
    ("checkpoint.pt", b"PK, half of it", "",
     "checkpoint.pt cannot be resumed from; remove it to begin anew"),
    ("items.safetensors", b"half", "--recommend i1", "is missing or damaged"),
    ("adapter", None, "--recommend i1", "vlm2rec-seed0/adapter is missing"),
    ("../features-*", b"half", "--method vanilla", "is damaged; remove it")])
def test_a_damaged_file_of_a_run_is_named(name, content, flags, words, copied, told):
    folder = copied / "runs" / RUN
    if name == "checkpoint.pt":
        (folder / "table.md").rename(folder / name)
    [path] = folder.glob(name)
    path.rename(copied / "away")
    if content:
        path.write_bytes(content)
    told(command(copied, BRIEF, flags), path.name, words)

@pytest.fixture
def hub(few, tmp_path, monkeypatch):
    """A hub's cache with acme/tinyvl; moves its branch main to commit 000... or 111..."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub/models--acme--tinyvl"
    for number in "01":
        commit = folder / "snapshots" / (number * 40)
        shutil.copytree(few / TINY, commit)
    tensors(lambda w: {k: 1.1 * w[k] for k in w})(commit / "model.safetensors")
    def move(number):
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs/main").write_text(number * 40)
    move("0")
    return move

def test_a_model_that_changed_under_its_name_is_told(hub, few, tmp_path, capsys, told):
    flags = ["--model acme/tinyvl --image-size 56 --epochs 1 --batch 2 --train-users 6",
             "--save-every 1 --log-every 1 --out", tmp_path]
    folder = tmp_path / RUN
    assert command(few, *flags) == command(few, *flags, "--recommend i1") == 0
    assert metrics_of(folder)["commit"] == "0" * 40
    capsys.readouterr()
    def stop(folder, step, *rest):
        if step == 2:
            raise KeyboardInterrupt
    with patch.object(vlm2rec, "log_step", stop):
        told(command(few, *flags, "--method sft"), "the same command goes on")
    hub("1")
    told(command(few, *flags, "--recommend i1"),
         f"--model acme/tinyvl has changed since: give --revision {'0' * 40}")
    told(command(few, *flags, "--method sft"), f"its commit was {'0' * 40}")
    for number, notes in (("1", 1), ("0", 0)):
        hub(number)
        out = ["--adapter", folder / "adapter", "--out", tmp_path / number]
        assert command(few, *flags, *out) == 0
        assert capsys.readouterr().out.count("was trained on acme/tinyvl, 000") == notes

# ---- What is shown: tables, recommendations, drawings ----

def write_run(folder, name, seed, score, ranks, **settings):
    """A finished run as far as `comparison` reads it; `ranks` of users a, b, ... of 1, 3 or 11."""
    run = folder / f"{name}-seed{seed}"
    run.mkdir()
    test = dict.fromkeys(("H@10", "H@20", "N@20"), score)
    test["N@10"] = sum({1: 1, 3: 0.5, 11: 0}[rank] for rank in ranks) / len(ranks)
    metrics = {"test": test, "users": len(ranks)}
    if name not in ("text", "vision"):
        metrics["queries"] = {"N@10": {"f2f": 0, "t2t": score, "v2v": score / 2}}
    rows = [[user, rank] for user, rank in zip("abcd", ranks)]
    random.shuffle(rows)  # the users are matched by their ids
    data.write_csv(run / "ranks.csv", ["user_id", "rank"], rows)
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "config.json").write_text(json.dumps({"method": name, "seed": seed} | settings))
    (run / "table.md").touch()

def test_the_comparison_by_hand(tmp_path):
    """A user's N@10 is 1 at rank 1, 1 / log2(4) = .5 at rank 3 and 0 beyond rank 10."""
    settings = {"lr": 0.1, "data": "d", "adapter": "", "embeddings": ""}
    ones = [1, 1, 1, 1]
    for name, seed, score, ranks in [
            ("vlm2rec", 0, 0.1, ones), ("vlm2rec", 1, 0.3, ones), ("vlm2rec", 3, 0.3, ones),
            ("sft", 0, 0.1, [3, 3, 1, 1]),    # .5 .5 0 0 below
            ("sft", 1, 0.2, [3, 11, 3, 11]),  # .5 1 .5 1: each user's mean .5 .75 .25 .5
            ("no-crtr", 0, 0.1, [3, 3, 1, 1]),    # .25 below on average
            ("no-crtr", 1, 0.1, [3, 11, 3, 11]),  # .75
            ("no-crtr", 3, 0.1, ones),            # 0: 1/3 ± .382 / 3 ** .5
            ("text", 1, 0.2, [3, 1, 11, 3]),  # .5 0 1 .5: ± .408 / 2
            ("text", 2, 0.2, ones),
            ("vision", 7, 0.123456, ones)]:   # seeds 2 and 7 are not vlm2rec's
        write_run(tmp_path, name, seed, score, ranks, **settings)
    write_run(tmp_path, "sda", 0, 0.5, ones, **settings | {"lr": 0.2})
    write_run(tmp_path, "vlm2rec", 9, 0.5, ones, **settings | {"data": "older"})
    write_run(tmp_path, "sft", 9, 0.5, [3, 3, 3], **settings | {"data": "old"})
    (tmp_path / "unfinished-seed0").mkdir()
    cut = [("metrics.json", None), ("metrics.json", "{}"), ("metrics.json", '{"test": '),
           ("config.json", "{"), ("ranks.csv", None), ("ranks.csv", "user_id,rank\na,1\n")]
    for number, (name, content) in enumerate(cut):
        write_run(tmp_path, f"cut{number}", 0, 0.1, ones, **settings)
        put(tmp_path / f"cut{number}-seed0", name, content and content.encode())
    lines = vlm2rec.comparison(tmp_path, settings).splitlines()
    for number, line in enumerate(lines[-6:]):
        assert line.startswith(f"left out, as it is damaged: {tmp_path}/cut{number}-seed0 (")
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert rows[0][1:] == [
        "seeds", "H@10", "N@10", "H@20", "N@20", "t2t", "v2v", "vlm2rec above it, N@10"]
    def row(name, seeds, score, ndcg, v2v, above):
        t2t = "-" if v2v == "-" else score
        return [name, str(seeds), score, ndcg, score, score, t2t, v2v, above]
    assert rows[2:] == [
        row("no-crtr", 3, "0.1000 ± 0.0000", "0.6667 ± 0.3819", "0.0500 ± 0.0000",
            "+0.3333 ± 0.2205 over 3 seeds"),
        row("sft", 2, "0.1500 ± 0.0707", "0.5000 ± 0.3536", "0.0750 ± 0.0354",
            "+0.5000 ± 0.1021 over 4 users"),
        row("text", 2, "0.2000 ± 0.0000", "0.7500 ± 0.3536", "-",
            "+0.5000 ± 0.2041 over 4 users"),
        row("vision", 1, "0.1235", "1.0000", "-", "-"),
        row("vlm2rec", 3, "0.2333 ± 0.1155", "1.0000 ± 0.0000", "0.1167 ± 0.0577", "-"),
        row("sft (another catalogue old)", 1, "0.5000", "0.5000", "0.2500", "-"),
        row("vlm2rec (another catalogue older)", 1, "0.5000", "1.0000", "0.2500", "-"),
        row("sda (lr 0.2)", 1, "0.5000", "1.0000", "0.2500", "-")]

def test_vectors_of_one_file_name_are_rows_of_one_table(few, tmp_path, monkeypatch, told):
    def alone(folder, settings, made=vlm2rec.comparison):
        """Else, of two runs that end together, one may write a table without the other."""
        with pytest.raises(data.InputError), data.lock(folder / "table.md"):
            pass
        return made(folder, settings)
    monkeypatch.setattr(vlm2rec, "comparison", alone)
    (tmp_path / "toys").symlink_to(few / "domains/few")  # whose name is that of the link
    paths = [tmp_path / name / "emb.npy" for name in ("bert", "clip", "x" * 200)]
    for k, path in enumerate(paths):
        path.parent.mkdir()
        numpy.save(path, numpy.eye(131, 5 + k))
    flags = ["--domain", tmp_path / "toys", "--out", tmp_path / "o",
             "--method mean-pool --embeddings", *paths]
    assert command(few, *flags) == 0
    table = (tmp_path / "o/toys/table.md").read_text()
    assert all(f"{name}-emb | 1 |" in table for name in ("bert", "clip", "xxx"))
    told(command(few, *flags, "--recommend i1"), "mean-pool has no encoder")

@pytest.fixture
def unwritten(few, tmp_path):
    """A run that has written nothing yet, and its test split."""
    run = open_few(few)._replace(folder=tmp_path)
    return run, vlm2rec.make_evaluation(run.domain, "test", 10, 0)

@each("first, rank, verdict", [
    (33, 1.0, "1.0000, is above that of chance, 0.0450: +0.9550"),
    (0, 1e6 + .5, "0.0000, is BELOW that of chance, 0.0450: -0.0450"),
    (3, 99.0, "0.0909, is not distinguishable from that of chance, 0.0450: +0.0459 ± 0.0508 (")])
def test_ranks_are_written_in_full_and_the_verdict_may_be_no(first, rank, verdict, unwritten):
    """Of 33 ranks some are 1, the others as said; .0508 is .2919 / 33 ** .5."""
    run, test = unwritten
    ranks = torch.tensor(first * [1.0] + (33 - first) * [rank], dtype=torch.double)
    nothing = "On validation, no epoch was better than the untrained model: nothing was learnt."
    for gain, more in ((0.0009, nothing), (0.0011, "")):
        scores = {"untrained": CHANCE, "valid": CHANCE | {"N@10": CHANCE["N@10"] + gain}}
        text = vlm2rec.write_results(run, test, (ranks, ranks), scores, {})
        assert text.startswith(f"The test's N@10, {verdict}") and "nan" not in text
        assert text.splitlines()[1] == more
    assert f",{rank},{rank}\n" in (run.folder / "ranks.csv").read_text()

def test_popularity_and_each_row_of_the_metrics_by_hand(few, tmp_path):
    """Items 0 to 5 were bought by 4, 5, 9, 10, 19 and 20 users before validation: the targets of
    users 30 to 35. Nobody bought the other targets before. Items 0 and 99 are most users' choice
    in validation, which counts for nothing."""
    sequences = []
    for user in range(30):
        early = [item for item, seen in enumerate([4, 5, 9, 10, 19, 20]) if user < seen]
        sequences.append([*early, 100, 101, 99 if user < 4 else 0, 40 + user])
    sequences += [[100, 101, 99, item] for item in range(6)]
    tied = 30 * [False] + 2 * [True] + 4 * [False]
    domain = replace(by_hand(sequences, 240), tied=tied)
    negatives = torch.tensor([100, 101, 99, *range(140, 237)])  # two that all have bought
    test = vlm2rec.make_evaluation(domain, "test", 10, 0)._replace(negatives=negatives.tile(36, 1))
    run = open_few(few)._replace(folder=tmp_path, domain=domain)
    ranks = [torch.tensor(30 * [50.0] + [1, 1, 3, 1, 11, 3]), torch.full((36,), 2.0)]
    text = vlm2rec.write_results(run, test, ranks, {}, {})
    metrics = metrics_of(tmp_path)
    found = {name: row["N@10"] for name, row in metrics.items() if isinstance(row, dict)}
    # By popularity users 30 to 35 have rank 3, a gain of .5, and the others rank 52.
    assert "of popularity, 0.0833: +0.0278 ± 0.0278 (" in text  # 1 / 36 ± (1 / 36) ** .5 / 6
    assert found == approx({
        "test": 4 / 36, "test_full": 0.6309, "chance": 0.0450, "popularity": 6 * 0.5 / 36,
        "test_untied": 2 / 34,  # without users 30 and 31
        "target seen 0 to 4 times": 1 / 31, "target seen 5 to 9 times": (1 + 0.5) / 2,
        "target seen 10 to 19 times": (1 + 0) / 2, "target seen 20 to 36 times": 0.5}, abs=1e-4)

def test_recommended_are_the_ten_best_items_that_one_has_not(finished, few, capsys, told):
    """No flag of the training is given, not even the model."""
    def recommend(*history):
        flags = ["--domain", "few", "--data-dir", few / "domains", "--out", few / "runs"]
        return vlm2rec.main([*map(str, flags), "--recommend", *history])
    run = open_few(few)
    item_ids, e = vectors_of(finished, "item")
    _, z = vectors_of(finished, "user")
    scores = torch.cosine_similarity(z["fused"][:1], e["fused"])
    owned = [14, *scores.topk(10).indices.tolist(), *bought(0)[13:19]]
    scores[owned] = -1  # what u0 likes best, then u0's latest six: the history of z
    best = [(item_ids[item], run.domain.titles[item], score.item())
            for score, item in zip(*scores.topk(10))]
    history = [item_ids[item] for item in owned]
    assert recommend(*history) == 0
    printed = capsys.readouterr().out
    assert "after -b14 Gusto kettle 14, " in printed
    assert printed.splitlines()[-10:] == [
        f"{rank:2}  {score:.4f}  {item}  {title[:70]}"
        for rank, (item, title, score) in enumerate(best, 1)]
    assert len(vlm2rec.recommend(run, ["i1"], k=3)) == 3
    told(recommend("i1", "nosuch"), "few lacks nosuch (")
    told(recommend(), "at least one item id")

def test_drawings_tell_titles_apart(few):
    domain = open_few(few).domain
    def drawn(title, item):
        same = {"titles": [title] * 130, "pictures": domain.pictures[:1] * 130}
        sheet = vlm2rec.draw(replace(domain, **same), {"row": [item]})
        return sheet.tobytes()
    assert drawn("\u6905\u5b50", 1) != drawn("\u673a\u4e0a", 2)  # their ids are drawn
    assert drawn("Arvo kite", 1) == drawn("Arvo kite", 2)

def test_the_picture_shows_the_protocol(unwritten):
    """Users 0 and 16, told by the colours of few's pictures. Their targets are the first by title,
    so a hit is seen; by picture they are where chance has put them."""
    run, test = unwritten
    torch.manual_seed(0)
    e = vlm2rec.fuse({m: torch.randn(130, 8) for m in MODALITIES})
    z = vlm2rec.fuse({"text": e["text"][test.targets], "vision": torch.randn(33, 8)})
    vlm2rec.draw_users(run, test, z, e, vlm2rec.cosine)
    sheets = Image.open(run.folder / "recommendations.png")
    for left, n in ((0, 0), (590, 16)):
        *_, target = bought(n)
        expected = {"history, and\nbought next": bought(n)[-5:]}
        for space, name in (("text", "title"), ("vision", "picture"), ("fused", "both")):
            candidates = [target, *negatives_of(n)]
            scores = torch.cosine_similarity(z[space][[n]], e[space][candidates])
            order = [candidates[place] for place in scores.argsort(descending=True)]
            expected[f"by {name}:\nrank {1 + order.index(target)} of 101"] = order[:5]
        _, by_title, by_picture, _ = expected.values()
        assert by_title[0] == target != by_picture[0]
        found = vlm2rec.protocol_rows(run, test, z, e, vlm2rec.cosine, n)
        assert found == (expected, target) and [*found[0]] == [*expected]
        for row, shown in enumerate(expected.values()):
            for column, item in enumerate(shown):
                x, y = left + 106 + 96 * column, 24 + 116 * row + 6
                assert sheets.getpixel((x + 36, y + 36)) == COLOUR(item)
                framed = sheets.getpixel((x - 1, y - 1)) == (0, 128, 0)
                assert framed == (item == target)

# ---- Bad input ----

OUT_OF_RANGE = """--seed -1, --seed 99999999999999, --epochs 0, --batch 1, --history 0, --tau 0,
--tau nan, --tau-crtr 0, --lam inf, --lr 0, --lr -1.0, --save-every 0, --log-every 0,
--lora-rank 0, --lora-alpha 0, --lora-dropout 1, --image-size 0, --train-users 0"""

@each("flags, words", [
    *[(flags, flags) for flags in re.split(r",\s", OUT_OF_RANGE)],
    ("--method sasrec --adapter a", "sasrec does not read a"), ("--embeddings v", "not read v"),
    ("--method sda --lora-rank 6", "--lora-rank in multiples of 4"),
    ("--method mean-pool", "--embeddings"),
    ("--method sft mean-pool --model tiny", "--embeddings"),
    ("--seeds 0", "--seeds 0: out of range"), ("--device cuda", "--device cpu can"),
    ("--model ./nope", "--model ./nope: there is no such folder"),
    ("--model Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct (7.5 GB) takes days "
     "without CUDA: --model tiny tries your files"),
    ("--image-size 57", "--image-size 57: take a multiple of 28"),
    ("--method sft vision --image-size 57", "a multiple of 28"),
    ("--adapter nowhere", "--adapter nowhere: there is no"),
    ("--embeddings no.npy --method mean-pool", "--embeddings no.npy: there is no"),
    ("--domain nowhere", "nowhere/items.csv is missing"),
    ("--recommend", "vlm2rec-seed0 holds no finished run")])
def test_what_is_wrong_by_itself_is_told_before_anything_is_fetched(
        flags, words, few, tmp_path, monkeypatch, told):
    fetched = Mock(side_effect=OSError("the download began"))
    monkeypatch.setattr(data, "prepare_domain", fetched)
    told(command(few, "--domain toys --out", tmp_path, flags), words)
    assert not fetched.called and not list(tmp_path.iterdir())

@each("flags, words", [
    ("--batch 34", "take --batch <= --train-users <= 33, all"), ("--train-users 7", "take --batch"),
    ("--train-users 34", "--train-users <= 33"), ("--out /dev/null", "/dev/null"),
    ("--model nobody/nothing", "--model nobody/nothing does not load")])
def test_what_does_not_fit_the_domain_gets_one_line(flags, words, few, tmp_path, told):
    told(command(few, "--out", tmp_path, flags), words)
    assert not list(tmp_path.rglob("table.md"))

def test_all_runs_are_checked_before_the_first_is_trained(copied, monkeypatch, told):
    monkeypatch.delattr(vlm2rec, "execute")
    told(command(copied, BRIEF, "--method sft vlm2rec --lr 7e-3"),
         "vlm2rec-seed0 holds a run with lr 0.002")

def tensors(change):
    """Writes what `change` makes of a file's tensors."""
    def spoil(path):
        changed = change(load_file(path))
        save_file({name: w.contiguous() for name, w in changed.items()}, path, {"format": "pt"})
    return spoil

def empty_tokenizer(path):
    """As transformers makes one where a class is named, and no file of it is there."""
    path.unlink()
    edit(path.parent, "tokenizer_config.json", "TokenizersBackend", "Qwen2Tokenizer")

def rename_a_mark(path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        edit(path.parent, name, "vision_start", "another", -1)

def tuned(places):
    """An adapter that was trained where ours would not be used."""
    def write(path):
        model, _, _ = vlm2rec.load_vlm(str(path.parent.with_name("m")), "main", "cpu")
        lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=places))
        lora.save_pretrained(path.parent)
    return write

def add_token(word):
    def add(path):
        tokenizer = tokenizer_of(path.parent)
        tokenizer.add_tokens([word])
        tokenizer.save_pretrained(path.parent)
    return add

@each("file, spoil, words", [
    ("m/model.safetensors", lambda path: path.write_text("version https://git"), "git-lfs p"),
    ("m/model.safetensors", tensors(lambda w: {k: w[k] for k in w if "visual.blocks.0" not in k}),
     "lack ['visual.blocks.0"),
    ("m/tokenizer.json", Path.unlink, "does not load"),
    ("m/tokenizer.json", empty_tokenizer, "m lacks words, an end or "),
    ("m/tokenizer_config.json", lambda path: edit(
        path.parent, path.name, '"eos_token"', '"eos"', -1), "m lacks words, an end or "),
    ("m/tokenizer.json", rename_a_mark, "an end or ['<|vision_start|>']"),
    ("m/tokenizer.json", add_token("kite"), "m has 434 tokens, its tokenizer gives number 434"),
    ("m/adapter_config.json", lambda path: path.write_text("{}"), "merge it, or give it as --ada"),
    ("m/config.json", lambda path: transformers.LlavaConfig(
        vision_config={"model_type": "pixtral"}).to_json_file(path), "its pictures vary in size"),
    ("a/adapter_model.safetensors", tensors(lambda w: {k: w[k][:4] for k in w}), "does not fit"),
    ("a/adapter_model.safetensors", tensors(lambda w: dict(list(w.items())[1:])), "other tensors"),
    ("a/adapter_model.safetensors", tensors(lambda w: w | {"x": torch.ones(1)}), "other tensors"),
    ("a/adapter_model.safetensors", tensors(lambda w: {k: w[k] * math.nan for k in w}), "finite"),
    ("a/adapter_config.json", tuned(["attn.qkv"]),
     "does not fit --model and --method: visual.blocks.0.attn.qkv.lora_A.default.weight would not"),
    ("a/adapter_config.json", tuned(r"visual.merger.*mlp\.0"),
     "does not fit --model and --method: visual.merger.mlp.0.lora_A.default.weight would not be"),
    ("a/adapter_config.json", lambda path: peft.PromptTuningConfig(
        num_virtual_tokens=2).save_pretrained(path.parent), "PROMPT_TUNING would not be used")])
def test_a_model_or_adapter_that_does_not_fit(
        file, spoil, words, finished, few, own_model, tmp_path, told):
    shutil.copytree(finished / "adapter", tmp_path / "a")
    spoil(tmp_path / file)
    flags = ["--model", own_model, "--image-size 56 --adapter", tmp_path / "a", "--out", tmp_path]
    told(command(few, BRIEF, *flags), words)

def test_an_adapter_in_a_models_folder_is_refused(finished, own_model):
    shutil.copytree(finished / "adapter", own_model, dirs_exist_ok=True)
    with refused("an adapter is in its folder: merge it"):
        vlm2rec.load_vlm(str(own_model), "main", "cpu")

def test_a_token_that_no_prompt_uses_may_be_beyond_the_models(few, own_model):
    add_token("rhododendron")(own_model / "tokenizer.json")
    vlm2rec.build_encoder(open_few(few, model=str(own_model)))

def test_an_adapter_trained_elsewhere_is_named(few, tmp_path, capsys):
    base = str(few / TINY)
    def load():
        return vlm2rec.load_vlm(base, "main", "cpu")[0]
    elsewhere = peft.LoraConfig(target_modules=r"language_model.*q_proj")
    peft.get_peft_model(load(), elsewhere).save_pretrained(tmp_path)
    for name, note in ((base, ""), ("another/base", "was trained on another/base, ")):
        edit(tmp_path, "adapter_config.json", base, name)
        vlm2rec.add_lora(load(), vlm2rec.Config(model=base, adapter=str(tmp_path)))
        said = capsys.readouterr().out
        assert note in said and ("was trained on" in said) == bool(note)

def test_qwen_saved_by_its_class_with_a_head_loads(few, own_model):
    """As transformers 5 names its tensors: model.visual.*, model.language_model.*, lm_head."""
    def rename(w):
        language = re.compile(r"^model\.(?=layers|embed|norm)")
        new = {f"model.{language.sub('language_model.', key)}": w[key] for key in w}
        return new | {"lm_head.weight": new["model.language_model.embed_tokens.weight"].clone()}
    tensors(rename)(own_model / "model.safetensors")
    one, other = (vlm2rec.load_vlm(str(path), "main", "cpu")[0].state_dict()
                  for path in (few / TINY, own_model))
    assert_close(other, one, rtol=0, atol=0)

def test_the_language_model_of_a_vision_language_model_loads(few, tmp_path):
    """Saved by itself, Qwen3.5's keeps the names model.language_model.*, which are mapped twice."""
    family_encoder("qwen3_5", tmp_path / "whole", few)
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    alone.save_pretrained(tmp_path / "alone")
    tokenizer_of(few / TINY).save_pretrained(tmp_path / "alone")
    assert "model.language_model.norm.weight" in load_file(tmp_path / "alone/model.safetensors")
    vlm, _, processor = vlm2rec.load_vlm(str(tmp_path / "alone"), "main", "cpu")
    assert processor is None
    assert_close(vlm.state_dict(), alone.model.state_dict(), rtol=0, atol=0)

@each("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory: try"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), "try --checkpointing on"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "out of memory: try"),
    (MemoryError(), "out of memory: try"),
    (KeyboardInterrupt(), "the same command goes on from the last checkpoint"),
    (safetensors.SafetensorError("I/O error: File too large"), "File too large"),
    (FloatingPointError("a score\nis not"), "a score is not"), (RuntimeError("shapes"), None)])
def test_a_defect_keeps_its_traceback_all_else_is_told(error, words, few, monkeypatch, told):
    monkeypatch.setattr(vlm2rec, "execute", Mock(side_effect=error))
    with contextlib.nullcontext() if words else pytest.raises(type(error)):
        told(command(few, BRIEF), words)

@each("error", [MemoryError(), torch.OutOfMemoryError("x"),
                                   torch.AcceleratorError("an illegal address")])
def test_what_is_not_the_files_fault_passes_through_readable(error):
    with pytest.raises(type(error)), vlm2rec.readable("a file"):
        raise error
    with refused("a file: KeyError"), vlm2rec.readable("a file"):
        raise KeyError()

def test_a_gpu_that_cannot_be_used_gets_one_line(few, monkeypatch, told):
    def fail(*shape, device):
        raise RuntimeError(f"no kernel image for {device}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", fail)
    told(command(few, BRIEF), "--device cpu can: no kernel image for cuda")

def test_output_can_be_followed_in_any_terminal_or_none(finished, few, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "argv", ["data.py", "few", "--data-dir", str(few / "domains")])
    for stdout in (terminal, io.StringIO(), None):  # a notebook's has no reconfigure(); None: >&-
        for main in (lambda: command(few, BRIEF), data.main):
            monkeypatch.setattr(sys, "stdout", stdout)
            monkeypatch.setattr(sys, "stderr", stdout and sys.stderr)
            assert main() == 0
    terminal.write("\u00b1\n")  # without a flush
    assert terminal.buffer.getvalue().endswith(b"\\xb1\n")

def test_a_tilde_that_the_shell_left_is_the_home_folder(few, monkeypatch):
    for vectors, method in (("adapter", "sft"), ("embeddings", "mean-pool")):
        flags = ["domain", "model", vectors, "data-dir", "out"]
        given = [f"--{flag}=~/{flag}" for flag in flags]
        monkeypatch.setenv("HOME", "/me")
        [config], _ = vlm2rec.parse_config(["--method", method, *given])
        assert all(getattr(config, flag.replace("-", "_")) == f"/me/{flag}" for flag in flags)
    monkeypatch.setenv("HOME", str(few))
    monkeypatch.setattr(sys, "argv", ["data.py", "few", "--data-dir=~/domains"])
    assert data.main() == 0

def test_help_names_every_flag_and_no_other_one_is_taken(few, capsys):
    with pytest.raises(SystemExit, match="0"):
        vlm2rec.main(["--help"])
    text = capsys.readouterr().out
    flags = [name.replace("_", "-") for name in vars(vlm2rec.Config())]
    assert all(f"--{flag} " in text for flag in [*flags, "seeds", "recommend"])
    assert set(vlm2rec.METHODS) == {*METHODS, "mean-pool"}  # none is without a test
    assert all(method in "".join(text.split()) for method in [*METHODS, "mean-pool"])
    assert "rank of LoRA (16)" in text
    for flags in ("--epochs x", "--nosuch 1", "--method best", "--epoch 1"):
        with pytest.raises(SystemExit, match="2"):
            command(few, flags)

def test_importing_has_no_effect(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = torch.manual_seed(7).get_state()
    spec = importlib.util.spec_from_file_location("again", Path(vlm2rec.__file__).resolve())
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert torch.equal(state, torch.get_rng_state()) and not any(capsys.readouterr())
    assert not any(tmp_path.iterdir())

# ---- The README ----

README = Path(__file__).with_name("README.md").read_text("utf-8")

def test_the_readmes_examples_run(finished, few, tmp_path, monkeypatch, capsys):
    """The loss pasted, a ranking for a new history, any model's title vectors as items."""
    loss, ranking, vectors = re.findall(r"```python\n(.*?)```", README, re.S)
    pasted = dict(vars(vlm2rec))
    exec(loss, pasted)
    assert 0.5 < pasted["loss"].item() < 20
    config = {"domain": "few", "data_dir": str(few / "domains"), "out": str(few / "runs")}
    ranking = ranking.replace('domain="sample"', "**config").replace('"0000"', '"i5"')
    exec(ranking.replace('"0302", "0405"', '"i17", "i42"'), {"config": config})
    ids = [line.split()[0] for line in capsys.readouterr().out.splitlines()[-5:]]
    run = open_few(few)
    assert len(set(ids)) == 5 and set(ids) < set(run.domain.item_ids) - {"i5", "i17", "i42"}
    monkeypatch.chdir(tmp_path)
    tiny = str(few / TINY)
    exec(vectors.replace("sentence-transformers/all-MiniLM-L6-v2", tiny).replace(
        "my-shop", str(run.source)), {})
    found = vlm2rec.read_vectors("titles.safetensors", run.domain, run.source)
    tokens = tokenizer_of(tiny)(run.domain.titles[77])
    model = transformers.AutoModel.from_pretrained(tiny)
    with torch.no_grad():
        states = model(torch.tensor([tokens.input_ids])).last_hidden_state[0]
    assert_close(found[77], states.mean(dim=0), atol=1e-5, rtol=0)

def test_the_readme_names_what_there_is():
    tests = set(re.findall(r"`(test_\w+_\w+_\w+)`", README))
    assert len(tests) > 5 and tests <= set(globals())
    flags = {f"--{name.replace('_', '-')}" for name in vars(vlm2rec.Config())}
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert said <= flags | {"--seeds", "--recommend", "--mirror", "--help"}
    rows = "".join(re.findall(r"^\| (?:Eq|Section).*?\| (.*?) \|", README, re.M))
    names = re.findall(r"`([\w.]+)`", rows)
    assert len(names) == 15
    for name in names:
        assert functools.reduce(getattr, name.split("."), vlm2rec)
