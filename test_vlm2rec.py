# SPDX-License-Identifier: MIT
"""Tests that teach: what each equation and each rule of the protocol means, in plain Python.

    python -m pytest -q test_vlm2rec.py

No network, no GPU; everything is made in temporary folders. The losses come first, then the evaluation, the data, the
encoder and whole runs.
"""
import contextlib
import csv
import gzip
import http.server
import importlib
import inspect
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import numpy
import peft
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from PIL import Image, features

import data
import vlm2rec

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about a name in transformers


@pytest.fixture(autouse=True)
def seeded():
    """torch would start from another seed in each process."""
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------------------------------------------
# The equations, transcribed: floats, loops and `math`, nothing else
# ----------------------------------------------------------------------------------------------------------------------

def loop_cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def loop_sim(z, e):
    return [[loop_cosine(z[u], e[j]) for j in range(len(e))] for u in range(len(z))]


def loop_contrast(z, e, negatives, tau, weight):
    """Eq. 10; with all weights 1 it is Eq. 3. Mean over the batch."""
    sim, total = loop_sim(z, e), 0.0
    for u in range(len(z)):
        positive = math.exp(sim[u][u] / tau)
        negative = sum(math.exp(sim[u][j] / tau) for j in range(len(e)) if negatives[u][j])
        total -= math.log(positive / (positive + weight[u] * negative))
    return total / len(z)


def loop_margin(z, e, negatives):
    """Eq. 6."""
    sim, margins = loop_sim(z, e), []
    for u in range(len(z)):
        others = [sim[u][j] for j in range(len(e)) if negatives[u][j]]
        margins.append(sim[u][u] - sum(others) / len(others) if others else 0.0)
    return margins


def loop_weight(z_text, z_vision, e_text, e_vision, negatives, alpha, beta, strong=None):
    """Eqs. 7-9. `strong` holds sg[M_strong] fixed: that is all a stop-gradient is."""
    text, vision = loop_margin(z_text, e_text, negatives), loop_margin(z_vision, e_vision, negatives)
    strong = strong or [max(t, v) for t, v in zip(text, vision)]
    gaps = [s - min(t, v) for s, t, v in zip(strong, text, vision)]
    return [1 + beta * math.log(1 + math.exp(alpha * gap)) for gap in gaps]


def loop_topology(z_text, z_vision, e_text, e_vision, tau):
    """Eqs. 11-13."""
    total = 0.0
    for row_text, row_vision in zip(loop_sim(z_text, e_text), loop_sim(z_vision, e_vision)):
        p = [math.exp(s / tau) / sum(math.exp(r / tau) for r in row_text) for s in row_text]
        q = [math.exp(s / tau) / sum(math.exp(r / tau) for r in row_vision) for s in row_vision]
        total += sum(a * math.log(a / b) for a, b in zip(p, q)) + sum(b * math.log(b / a) for a, b in zip(p, q))
    return total / (2 * len(z_text))


B, D, TAU, TAU_CRTR, LAM = 5, 4, 0.3, 0.2, 0.5
SPACE = ("z_text", "z_vision", "e_text", "e_vision")


@pytest.fixture
def batch():
    """Five users in four dimensions; the last user has no negative. float64, so that 1e-6 tests the formula."""
    generator = torch.Generator().manual_seed(7)
    tensors = {name: torch.randn(B, D, generator=generator, dtype=torch.float64) for name in SPACE}
    tensors |= {"alpha": torch.tensor(1.3, dtype=torch.float64), "beta": torch.tensor(0.7, dtype=torch.float64)}
    negatives = (torch.rand(B, B, generator=generator) < 0.7) & ~torch.eye(B, dtype=torch.bool)
    negatives[-1] = False
    assert negatives[:-1].any(dim=1).all()
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}, negatives


def add(a, b):
    return [[x + y for x, y in zip(p, q)] for p, q in zip(a, b)]


def loop_loss(name, t, negatives, strong):
    """One of the losses by name, or the total of an ablation, from a dict of nested lists."""
    z, e = add(t["z_text"], t["z_vision"]), add(t["e_text"], t["e_vision"])
    space = [t[key] for key in SPACE]
    weight = loop_weight(*space, negatives, t["alpha"], t["beta"], None if name == "no-stopgrad" else strong)
    infonce, wpcl = loop_contrast(z, e, negatives, TAU, [1.0] * B), loop_contrast(z, e, negatives, TAU, weight)
    crtr = loop_topology(*space, TAU_CRTR)
    return {"infonce": infonce, "wpcl": wpcl, "crtr": crtr, "vlm2rec": wpcl + LAM * crtr, "no-wpcl": LAM * crtr,
            "no-penalty": infonce + LAM * crtr, "no-stopgrad": wpcl + LAM * crtr, "no-crtr": wpcl}[name]


def fast_loss(name, t, negatives):
    """The same through vlm2rec."""
    method = {"infonce": "sft", "wpcl": "vlm2rec", "crtr": "vlm2rec"}.get(name, name)
    z = vlm2rec.fuse({"text": t["z_text"], "vision": t["z_vision"]})
    e = vlm2rec.fuse({"text": t["e_text"], "vision": t["e_vision"]})
    loss, terms = vlm2rec.objective(vlm2rec.METHODS[method], z, e, negatives, t["alpha"], t["beta"], TAU, TAU_CRTR, LAM)
    return loss if name == method else terms[name]


@pytest.mark.parametrize("name", ["infonce", "wpcl", "crtr", "vlm2rec",
                                  "no-wpcl", "no-penalty", "no-stopgrad", "no-crtr"])
def test_losses_and_gradients_equal_the_loops(batch, name):
    """Eqs. 3, 10, 13, 14 and the ablations of Table 5: the value, and the gradient by central differences with the
    strong margin fixed, except where the stop-gradient is what is left out."""
    tensors, negatives = batch
    values = {key: tensor.tolist() for key, tensor in tensors.items()}
    text = loop_margin(values["z_text"], values["e_text"], negatives)
    vision = loop_margin(values["z_vision"], values["e_vision"], negatives)
    strong = [max(pair) for pair in zip(text, vision)]
    assert len({t > v for t, v in zip(text[:-1], vision)}) == 2    # each modality is the weak one of some user
    loss = fast_loss(name, tensors, negatives)
    assert loss.item() == pytest.approx(loop_loss(name, values, negatives, strong), abs=1e-9)

    loss.backward()
    for key, tensor in tensors.items():
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for k in range(tensor.numel()):
            def shifted(step):
                moved = tensor.detach().clone()
                moved.view(-1)[k] += step
                return loop_loss(name, values | {key: moved.tolist()}, negatives, strong)
            slope = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
            assert gradient.view(-1)[k].item() == pytest.approx(slope, abs=1e-6), (key, k)


def test_cosine_margin_and_weight_equal_the_loops(batch):
    """Eqs. 6-9 one by one."""
    tensors, negatives = batch
    t = {key: tensor.detach() for key, tensor in tensors.items()}
    values = {key: tensor.tolist() for key, tensor in t.items()}
    sim = vlm2rec.cosine(t["z_text"], t["e_text"])
    assert torch.allclose(sim, torch.tensor(loop_sim(values["z_text"], values["e_text"]), dtype=torch.float64))
    margins = [vlm2rec.discriminative_margin(vlm2rec.cosine(t[f"z_{m}"], t[f"e_{m}"]), negatives)
               for m in ("text", "vision")]
    assert margins[0].tolist() == pytest.approx(loop_margin(values["z_text"], values["e_text"], negatives))
    weight = vlm2rec.penalty_weight(vlm2rec.modality_gap(*margins), t["alpha"], t["beta"])
    expected = loop_weight(*(values[key] for key in SPACE), negatives, values["alpha"], values["beta"])
    assert weight.tolist() == pytest.approx(expected)
    assert margins[0][-1] == margins[1][-1] == 0                   # a user without a negative has margin 0, so gap 0,
    assert weight[-1].item() == pytest.approx(1 + 0.7 * math.log(2))  # and there Eq. 9 gives 1 + beta * ln 2, not 1


def test_the_gap_pulls_up_the_weak_modality_and_leaves_the_strong_one_alone():
    """Eq. 8: user 0 has strong text, user 1 strong vision."""
    text, vision = torch.tensor([0.9, 0.1], requires_grad=True), torch.tensor([0.2, 0.6], requires_grad=True)
    gap = vlm2rec.modality_gap(text, vision)
    assert gap.tolist() == pytest.approx([0.7, 0.5])
    gap.sum().backward()
    assert text.grad.tolist() == [0, -1] and vision.grad.tolist() == [-1, 0]  # descent raises the weak margin


def test_topology_is_zero_for_equal_geometries_symmetric_and_positive():
    one, other = torch.rand(2, B, B).unbind()
    assert vlm2rec.relational_topology(one, one, 0.1).item() == pytest.approx(0, abs=1e-7)
    assert vlm2rec.relational_topology(one, one + 3, 0.1).item() == pytest.approx(0, abs=1e-5)  # relations, not values
    assert vlm2rec.relational_topology(one, other, 0.1) == pytest.approx(vlm2rec.relational_topology(other, one, 0.1))
    assert vlm2rec.relational_topology(one, other, 0.1) > 0
    assert vlm2rec.relational_topology(one, other, 0.001).isfinite()  # the smallest temperature of the paper's grid


def test_the_topology_losss_shortcut_two_constant_spaces_that_point_apart():
    """Both spaces nearly constant, in opposite directions: loss 0 and gap 0, so that nothing pulls back; their sum
    keeps what little differs, and still ranks. A_neg and the cosine of the means show it."""
    small, constant = 1e-3 * torch.eye(B), torch.ones(B)
    z = vlm2rec.fuse({"text": constant + small, "vision": -constant + small})
    sim = {space: vlm2rec.cosine(z[space], z[space]) for space in z}
    assert vlm2rec.relational_topology(sim["text"], sim["vision"], 0.1).item() == pytest.approx(0, abs=1e-6)
    mask = ~torch.eye(B, dtype=torch.bool)
    margins = [vlm2rec.discriminative_margin(sim[modality], mask) for modality in ("text", "vision")]
    assert vlm2rec.modality_gap(*margins).max() < 1e-5
    assert vlm2rec.discriminative_margin(sim["fused"], mask).min() == pytest.approx(1)            # a perfect ranking
    assert (2 - 2 * sim["text"]).max() < 1e-5                                                     # A_neg
    assert vlm2rec.mean_cosine(z["text"], z["vision"]).item() == pytest.approx(-1, abs=1e-5)


def test_losses_are_float32_for_bfloat16_embeddings():
    z = torch.randn(B, D).bfloat16()
    assert vlm2rec.cosine(z, z).dtype == torch.float32
    assert vlm2rec.cosine(z, z).diagonal().tolist() == pytest.approx([1.0] * B)


def test_negative_mask_by_hand():
    """Users 0 and 1 share target 4. User 2 (target 5) bought 6 before, which is user 3's target."""
    targets = torch.tensor([4, 4, 5, 6])
    bought = torch.tensor([[1, 2], [3, -1], [6, 1], [7, 8]])
    assert vlm2rec.negative_mask(targets, bought).int().tolist() == [
        [0, 0, 1, 1],   # target 4 again is no negative
        [0, 0, 1, 1],
        [1, 1, 0, 0],   # nor is 6, bought before
        [1, 1, 1, 0]]
    assert not vlm2rec.negative_mask(torch.tensor([4, 4]), torch.tensor([[1], [2]])).any()


def test_a_single_negative_is_enough_for_a_margin_and_a_loss():
    sim, mask = torch.tensor([[0.9, 0.4], [0.2, 0.6]]), torch.tensor([[False, True], [False, False]])
    assert vlm2rec.discriminative_margin(sim, mask).tolist() == pytest.approx([0.5, 0])
    loss = vlm2rec.info_nce(sim, mask, torch.tensor([2.0, 2.0]), 0.5)
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(-1)) / 2)    # a mean over both users


def test_the_logged_gap_and_weight_are_means_over_the_batch(batch):
    tensors, mask = batch
    z, e = ({name: tensors[f"{side}_{name}"] for name in ("text", "vision")} for side in "ze")
    _, terms = vlm2rec.objective(vlm2rec.METHODS["vlm2rec"], vlm2rec.fuse(z), vlm2rec.fuse(e), mask,
                                 tensors["alpha"], tensors["beta"], TAU, TAU_CRTR, LAM)
    margins = [vlm2rec.discriminative_margin(vlm2rec.cosine(z[m], e[m]), mask) for m in ("text", "vision")]
    gaps = [abs(t - v) for t, v in zip(margins[0].tolist(), margins[1].tolist())]
    assert terms["gap"].item() == pytest.approx(sum(gaps) / B)
    assert terms["weight"].item() == pytest.approx(sum(1 + 0.7 * math.log(1 + math.exp(1.3 * g)) for g in gaps) / B)


def test_users_without_negatives_add_no_loss_and_no_gradient():
    sim, weight = torch.rand(2, 2, requires_grad=True), torch.tensor([2.0, 3.0], requires_grad=True)
    loss = vlm2rec.info_nce(sim, torch.zeros(2, 2, dtype=torch.bool), weight, 0.1)
    loss.backward()
    assert loss.item() == 0 and sim.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_alpha_and_beta_start_at_1_and_only_ever_fall():
    """What FACTS proves: any step of gradient descent on WPCL lowers both; softplus keeps them positive."""
    penalty = vlm2rec.Penalty()
    optimizer = torch.optim.SGD(penalty.parameters(), lr=0.5)
    assert [value.item() for value in penalty()] == pytest.approx([1, 1])
    for step in range(20):
        before = torch.stack(penalty()).detach()
        sim = torch.rand(B, B)
        weight = vlm2rec.penalty_weight(torch.rand(B), *penalty())
        vlm2rec.info_nce(sim, ~torch.eye(B, dtype=torch.bool), weight, 0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        after = torch.stack(penalty()).detach()
        assert (after < before).all() and (after > 0).all()


CASES = {  # every function that a reader may want to copy, with arguments
    "cosine": (torch.rand(3, 4), torch.rand(2, 4)),
    "negative_mask": (torch.tensor([1, 2]), torch.tensor([[3], [4]])),
    "info_nce": (torch.rand(2, 2), ~torch.eye(2, dtype=torch.bool), torch.tensor([1.0, 2.0]), 0.1),
    "discriminative_margin": (torch.rand(2, 2), ~torch.eye(2, dtype=torch.bool)),
    "modality_gap": (torch.rand(3), torch.rand(3)),
    "penalty_weight": (torch.rand(3), torch.tensor(1.0), torch.tensor(1.0)),
    "relational_topology": (torch.rand(2, 2), torch.rand(2, 2), 0.1),
    "last_token": (torch.rand(2, 5, 3), torch.tensor([4, 1])),
    "target_rank": (torch.rand(3), torch.rand(3, 5)),
    "hits_and_ndcg": (torch.tensor([1.0, 12.5]),),
}


@pytest.mark.parametrize("name", CASES)
def test_each_piece_runs_when_pasted_alone_beside_torch(name):
    function = getattr(vlm2rec, name)
    namespace = {"torch": torch}
    exec(compile(inspect.getsource(function), name, "exec", dont_inherit=True), namespace)
    expected, found = function(*CASES[name]), namespace[name](*CASES[name])
    assert torch.equal(expected, found) if isinstance(expected, torch.Tensor) else expected == found


# ----------------------------------------------------------------------------------------------------------------------
# The evaluation
# ----------------------------------------------------------------------------------------------------------------------

def test_ranks_by_hand_with_ties_in_the_middle():
    others = torch.tensor([[0.9, 0.3, 0.1], [0.5, 0.5, 0.1], [0.5, 0.5, 0.5]])
    assert vlm2rec.target_rank(torch.tensor([0.5, 0.5, 0.5]), others).tolist() == [2, 2, 2.5]
    others[:, 0] = -math.inf  # the first candidate is out
    assert vlm2rec.target_rank(torch.tensor([0.5, 0.5, 0.5]), others).tolist() == [1, 1.5, 2]
    for bad in (math.nan, math.inf):
        with pytest.raises(FloatingPointError):
            vlm2rec.target_rank(torch.tensor([0.5]), torch.tensor([[0.1, bad, 0.2]]))
        with pytest.raises(FloatingPointError):
            vlm2rec.target_rank(torch.tensor([0.5, bad]), torch.zeros(2, 3))


def test_hits_and_ndcg_by_hand():
    second = {"H@10": 1, "N@10": 0.6309, "H@20": 1, "N@20": 0.6309}
    assert vlm2rec.hits_and_ndcg(torch.tensor([2.0])) == pytest.approx(second, abs=1e-4)
    # ranks 1, 11, 21: one hit of three at 10, two at 20; 1 / log2(12) = 0.2789
    expected = {"H@10": 1 / 3, "N@10": 1 / 3, "H@20": 2 / 3, "N@20": (1 + 0.2789) / 3}
    assert vlm2rec.hits_and_ndcg(torch.tensor([1.0, 11.0, 21.0])) == pytest.approx(expected, abs=1e-4)
    assert vlm2rec.hits_and_ndcg(torch.tensor([10.5]))["H@10"] == 0
    assert vlm2rec.hits_and_ndcg(torch.tensor([]))["N@10"] is None


def score(kind, users=2000, items=400):
    """Both rankings of `users` whose embeddings are an oracle's, constant, random or NaN."""
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(items, 64, generator=generator)
    targets = torch.randint(items, (users,), generator=generator).tolist()
    z = {"oracle": e[targets], "constant": torch.ones(users, 64), "random": torch.randn(users, 64, generator=generator),
         "nan": torch.full((users, 64), math.nan)}[kind]
    e = torch.ones_like(e) if kind == "constant" else e
    negatives = torch.tensor([data.draw_negatives(str(u), [t], items, "test", 0) for u, t in enumerate(targets)])
    ranks, full = vlm2rec.Evaluation([], torch.tensor(targets), negatives, [[t] for t in targets]).rank(z, e)
    return vlm2rec.hits_and_ndcg(ranks), vlm2rec.hits_and_ndcg(full)


def test_an_oracle_is_perfect_and_a_random_order_is_at_chance():
    assert all(value == 1 for table in score("oracle") for value in table.values())
    assert vlm2rec.CHANCE == pytest.approx({"H@10": 0.0990, "N@10": 0.0450, "H@20": 0.1980, "N@20": 0.0697}, abs=5e-5)
    assert score("random")[0] == pytest.approx(vlm2rec.CHANCE, abs=0.02)  # 3 standard errors at 2,000 users


def test_a_constant_scorer_is_no_better_than_chance_and_nan_stops():
    """A `(others > target).sum()` would put both at the top."""
    for table in score("constant"):
        assert all(value <= vlm2rec.CHANCE[name] for name, value in table.items())
    with pytest.raises(FloatingPointError, match="not finite"):
        score("nan")


def test_the_verdict_says_how_many_times_better_or_warns():
    score = lambda value: {"N@10": value}
    good = vlm2rec.verdict("sft", score(0.4), score(0.1), score(0.3), score(0.06))
    assert good == "sft: N@10 0.4000, 4.00 times popularity, 5.00 times the untrained model (validation)"
    for test, valid in ((0.09, 0.3), (0.4, 0.06)):
        said = vlm2rec.verdict("sft", score(test), score(0.1), score(valid), score(0.06))
        assert "\nwarning: no better than that; usual reasons: random weights, too few users, an unfit --lr" in said
    assert "warning" not in vlm2rec.verdict("sasrec", score(0.2), score(0.1), score(0.2), None)


def test_the_full_ranking_leaves_out_the_users_other_items():
    e = torch.eye(4)
    z = torch.tensor([[0.9, 0.8, 0.7, 0.1]])       # likes item 0 best, then 1, 2, 3
    rank = lambda sequence: vlm2rec.Evaluation([], torch.tensor([2]), torch.tensor([[3]]), [sequence]).rank(z, e)
    assert [ranks.tolist() for ranks in rank([2])] == [[1], [3]]
    assert [ranks.tolist() for ranks in rank([0, 2])] == [[1], [2]]                    # 0 was bought before


# ----------------------------------------------------------------------------------------------------------------------
# The data
# ----------------------------------------------------------------------------------------------------------------------

def test_leave_one_out_on_a_user_with_five_items():
    sequence = [10, 11, 12, 13, 14]
    assert data.leave_one_out(sequence, "train") == ([10, 11], 12)
    assert data.leave_one_out(sequence, "valid") == ([10, 11, 12], 13)
    assert data.leave_one_out(sequence, "test") == ([10, 11, 12, 13], 14)
    assert data.leave_one_out(list(range(20)), "test", 10) == (list(range(9, 19)), 19)
    assert data.leave_one_out(list(range(20)), "train", 3) == ([14, 15, 16], 17)


def test_negatives_are_distinct_new_to_the_user_and_depend_on_seed_split_and_user_alone():
    sequence = list(range(0, 60, 3))
    draw = lambda user="u", split="test", seed=0: data.draw_negatives(user, sequence, 130, split, seed)
    assert len(set(draw())) == len(draw()) == 100 and not set(draw()) & set(sequence) and set(draw()) < set(range(130))
    assert draw() == draw() and draw() != draw(user="v") != draw(split="valid") != draw(seed=1)
    drawn = torch.tensor([data.draw_negatives(str(u), [0], 201, "test", 0) for u in range(2000)])
    counts = torch.bincount(drawn.flatten(), minlength=201)
    assert counts[0] == 0 and (counts[1:] - 1000).abs().max() < 120  # uniform: standard deviation 22


def test_five_core_reaches_its_fixed_point():
    """At k = 2: dropping user c (one item) leaves item z with one user, whose loss leaves user b with one item."""
    rows = [("a", "x"), ("a", "y"), ("d", "x"), ("d", "y"), ("b", "x"), ("b", "z"), ("c", "z")]
    assert data.core(rows, 2) == rows[:4]
    assert data.core(rows[:1], 2) == []


def write_domain(folder, items=None, interactions=None, pictures=True):
    """A small domain: 120 items, 60 users with 12 items each, so that every item has 6 users. Rows may be replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    items = items or [[f"i{k}", f"title {k}", f"images/{k}.png"] for k in range(120)]
    interactions = interactions or [[f"u{u}", f"i{(u * 2 + 5 * k) % 120}", 1000 + k]
                                    for u in range(60) for k in range(12)]
    data.write_csv(folder / "items.csv", ["item_id", "title", "image"], items)
    data.write_csv(folder / "interactions.csv", ["user_id", "item_id", "timestamp"], interactions)
    (folder / "images").mkdir(exist_ok=True)
    for k in range(120 if pictures else 0):
        Image.new("RGB", (30, 30), (k, 255 - k, 2 * k)).save(folder / "images" / f"{k}.png")
    return folder


def rows_of(folder, name):
    with open(folder / name, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def test_the_reader_sorts_by_time_keeps_file_order_on_ties_and_the_earliest_of_a_repeat(tmp_path):
    folder = write_domain(tmp_path / "d")
    rows = [row for row in rows_of(folder, "interactions.csv") if row[0] != "u0"]
    mine = [["u0", f"i{k}", time] for k, time in ((5, 30), (9, 10), (7, 20), (9, 40), (4, 30), (8, 5), (3, 2e1))]
    domain = data.read_domain(write_domain(folder, interactions=mine + rows))
    user = domain.user_ids.index("u0")
    assert [domain.item_ids[item] for item in domain.sequences[user]] == ["i8", "i9", "i7", "i3", "i5", "i4"]
    assert domain.tied[user] and sum(domain.tied) == 1      # i5 and i4 have one timestamp
    assert domain.dropped["repeated interactions"] == 1


def test_the_reader_drops_and_counts_what_it_cannot_use(tmp_path):
    items = [[f"i{k}", "" if k == 3 else f"title {k}", f"images/{k}.png"] for k in range(120)]
    folder = write_domain(tmp_path / "d", items + [["spare", "never bought", "images/0.png"]])
    content = (folder / "images" / "7.png").read_bytes()
    (folder / "images" / "7.png").write_bytes(content[:len(content) // 2])   # truncated
    (folder / "images" / "8.png").unlink()                                   # missing
    (folder / "images" / "9.png").write_text("<html>404</html>")
    domain = data.read_domain(folder)
    assert not {"i3", "i7", "i8", "i9", "spare"} & set(domain.item_ids) and len(domain.item_ids) == 116
    assert domain.dropped["items without a title"] == 1 and domain.dropped["items without a decodable picture"] == 3
    assert domain.dropped["interactions with such items"] == 24
    assert "3 items without a decodable picture" in data.describe(domain)


def test_the_format_takes_quotes_bom_crlf_newlines_and_further_columns(tmp_path):
    folder = write_domain(tmp_path / "d")
    rows = rows_of(folder, "items.csv")
    rows[0][1] = 'a "quoted", two-\nline  title'
    text = "\ufeffprice,title,image,item_id\r\n"
    for item, title, image in rows:
        text += '1,"' + title.replace('"', '""') + f'",{image},{item}\r\n'
    (folder / "items.csv").write_bytes(text.encode())
    assert data.read_domain(folder).titles[0] == 'a "quoted", two- line title'


def test_images_may_be_a_link_but_no_single_picture_may_lead_out(tmp_path):
    folder = write_domain(tmp_path / "d")
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    assert len(data.read_domain(folder).item_ids) == 120
    outside = tmp_path / "outside.png"
    Image.new("RGB", (30, 30)).save(outside)
    (tmp_path / "elsewhere" / "4.png").unlink()
    (tmp_path / "elsewhere" / "4.png").symlink_to(outside)
    with pytest.raises(data.InputError, match="line 6.*images/4.png"):
        data.read_domain(folder)


def test_transparent_is_white_and_other_programs_are_not_started(tmp_path):
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(tmp_path / "p.png")
    assert data.load_picture(tmp_path / "p.png").getpixel((5, 5)) == (255, 255, 255)
    Image.new("RGB", (40, 20)).save(tmp_path / "p.eps")   # Pillow would call Ghostscript
    with pytest.raises(OSError):
        data.load_picture(tmp_path / "p.eps")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
def test_pictures_of_any_mode_become_rgb(tmp_path, mode):
    path = tmp_path / ("p.jpg" if mode == "CMYK" else "p.png")
    Image.new("RGB", (40, 20), (255, 255, 255)).convert(mode).save(path)
    picture = data.load_picture(path)
    assert picture.mode == "RGB" and picture.size == (40, 20) and min(picture.getpixel((5, 5))) > 250


def test_16_bits_of_grey_stay_grey_and_a_camera_held_upright_gives_an_upright_picture(tmp_path):
    Image.new("I;16", (40, 20), 40_000).save(tmp_path / "p.png")
    assert data.load_picture(tmp_path / "p.png").getpixel((5, 5)) == (40_000 // 256,) * 3
    upright = Image.Exif()
    upright[0x0112] = 6                                              # Orientation: to be turned by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "p.jpg", exif=upright)
    assert data.load_picture(tmp_path / "p.jpg").size == (20, 40)


def test_only_regular_files_are_read(tmp_path):
    """A FIFO would be waited for, for ever: so the reading is done in a process that may take 30 seconds."""
    folder = write_domain(tmp_path / "d")
    for k in (4, 5, 6):
        (folder / "images" / f"{k}.png").unlink()
    os.mkfifo(folder / "images" / "4.png")
    os.mkfifo(folder / "images" / "fifo")
    (folder / "images" / "5.png").symlink_to("fifo")
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(folder):
        server.bind("images/6.png")
    code = "try:\n    print(data.read_domain('d').dropped_items)\nexcept data.InputError as error:\n    print(error)"
    said = python(code, tmp_path).communicate(timeout=30)[0]
    assert said == f"{[(f'i{k}', 'not a regular file', f'images/{k}.png') for k in (4, 5, 6)]}\n"
    for name in ("interactions.csv", "items.csv"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        said = python(code, tmp_path).communicate(timeout=30)[0]
        assert said.startswith(f"d/{name} is not a regular file; ") and said.count("\n") == 1


def test_images_linked_to_itself_gets_one_line(tmp_path):
    folder = write_domain(tmp_path / "d", pictures=False)
    (folder / "images").rmdir()
    (folder / "images").symlink_to("images")
    with pytest.raises(data.InputError, match=r"nothing is left.*120 items without a decod.*'i0' \(no file\)") as error:
        data.read_domain(folder)
    assert "\n" not in str(error.value)


def test_each_unusable_item_is_named_with_its_reason(tmp_path):
    images = {3: "", 4: "https://example.org/4.png", 5: "images\\5.png", 6: "images/gone.png", 7: "images/folder",
              8: "images/text.png", 9: "images/large.png", 10: "images/larger.png", 11: "images/half.png"}
    items = [[f"i{k}", f"title {k}", images.get(k, f"images/{k}.png")] for k in range(120)]
    rows = [[f"u{u}", f"i{(u + 5 * k) % 120}", k] for u in range(120) for k in range(9)]
    folder = write_domain(tmp_path / "d", items, rows)
    (folder / "images" / "folder").mkdir()
    (folder / "images" / "text.png").write_text("<html>404</html>")
    Image.new("1", (10_000, 5_000)).save(folder / "images" / "large.png")
    Image.new("1", (20_000, 10_000)).save(folder / "images" / "larger.png")  # which Pillow itself refuses
    (folder / "images" / "half.png").write_bytes((folder / "images" / "8.png").read_bytes()[:60])
    items[2][1] = " "
    items += [["new", "never bought", "x" * 5000]]
    domain = data.read_domain(write_domain(folder, items, rows, pictures=False))
    assert [row[:2] for row in domain.dropped_items] == [
        ("i2", "no title"), ("i3", "no picture"), ("i4", "a URL, not a path"), ("i5", "a path with backslashes"),
        ("i6", "no file"), ("i7", "not a regular file"), ("i8", "not decodable"), ("i9", "too many pixels"),
        ("i10", "too many pixels"), ("i11", "not decodable"), ("new", "no file")]
    details = [row[2] for row in domain.dropped_items]
    assert details[2:6] == [images[k] for k in (4, 5, 6, 7)] and details[-1] == "x" * 100
    assert details[6] == "cannot identify image file" and details[7].startswith("10000 x 5000 pixels")
    assert domain.dropped["items without a title"] == 1
    assert domain.dropped["items without a decodable picture"] == 10
    assert data.read_domain(write_domain(folder, items[:-1], rows, pictures=False)).digest == domain.digest


def test_what_is_printed_names_three_unusable_items_in_short_lines(tmp_path):
    items = [["an id \x1b[2J of very many characters" if k == 3 else f"i{k}", "" if 2 < k < 9 else f"title {k}",
              f"images/{k}.png"] for k in range(120)]
    rows = [[f"u{u}", items[(u * 2 + 5 * k) % 120][0], k] for u in range(60) for k in range(12)]
    folder = write_domain(tmp_path / ("long " * 30), items, rows + rows[:9])
    (folder / "images" / "90.png").unlink()
    said = data.describe(data.read_domain(folder)).splitlines()
    assert max(map(len, said)) <= 100
    assert r"  first unusable items: 'an id \x1b[2J of ve (no title), 'i4' (no title), 'i5' (no title)" in said
    assert "unusable" not in data.describe(data.read_domain(write_domain(tmp_path / "d")))


@pytest.mark.skipif(not features.check("avif"), reason="this build of Pillow has no AVIF")
def test_avif_is_a_picture(tmp_path):
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "p.jpg", "AVIF")
    red, green, blue = data.load_picture(tmp_path / "p.jpg").getpixel((5, 5))
    assert red > 240 and green < 15 and blue < 15


@pytest.fixture
def tokyo(monkeypatch):
    """This machine's clock is 9 hours ahead of UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "JST-9")
        time.tzset()
        yield
    time.tzset()


def test_a_timestamp_is_a_number_or_a_date(tmp_path, tokyo):
    """2024-05-01 began 1,714,521,600 seconds after 1970, in UTC."""
    noon = 1714521600 + 12 * 3600
    assert data.parse_time("2024-05-01") == 1714521600 and data.parse_time("1969-12-31") == -86400
    assert data.parse_time("2024-05-01T12:00:00Z") == data.parse_time("2024-05-01 12:00") == noon
    assert data.parse_time("2024-05-01T12:00:00+02:00") == noon - 7200
    assert data.parse_time("2024-05-01T12:00:00.250-05:30") == noon + 5.5 * 3600 + 0.25
    assert data.parse_time("20240501") == 20240501                   # as ever
    assert math.isnan(data.parse_time("01.05.2024")) and math.isnan(data.parse_time("2024-02-30"))
    folder = write_domain(tmp_path / "d")
    times = {7: "2024-05-01T23:30:00-01:00", 8: "2024-05-02", 9: "1714521600.5", 10: "2024-05-01", 11: "1.7145e9"}
    rows = [[*row[:2], times.get(place % 12, row[2])] for place, row in enumerate(rows_of(folder, "interactions.csv"))]
    rows[-1][2] = "May 1st"
    with pytest.raises(data.InputError, match="'May 1st' is neither a number.*seconds.*nor an ISO 8601 date.*2024"):
        data.read_domain(write_domain(folder, None, rows))
    rows[-1][2] = "1e9"
    domain = data.read_domain(write_domain(folder, None, rows))
    order = [0, 1, 2, 3, 4, 5, 6, 11, 10, 9, 8, 7]
    assert [domain.item_ids[item] for item in domain.sequences[0]] == [f"i{5 * k}" for k in order]


@pytest.mark.parametrize("name, expected", [
    ("sampel", "did you mean sample?"), ("toy", "did you mean toys?"), ("my-shp", "did you mean my-shop?"),
    ("qqqq", "is missing. Write"), ("amazon201", "is missing. Write"), ("./sample", "./sample is no folder"),
    ("domains/my-shop/items.csv", "is no folder")])
def test_a_misspelt_domain_is_refused_at_once_with_the_nearest_name(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    write_domain(Path("domains", "my-shop"), pictures=False)
    Path("domains", "amazon2014").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for call in (data.check_domain, data.prepare_domain):
        with pytest.raises(data.InputError, match=re.escape(expected)) as error:
            call(name, Path("domains"))
        assert "\n" not in str(error.value) and ("/" in name or "one of sample, toys" in str(error.value))
    for known in ("sample", "toys", "my-shop", "./domains/my-shop", str(tmp_path)):
        data.check_domain(known, Path("domains"))
    assert sorted(tmp_path.rglob("*")) == before                     # nothing was made


def test_files_get_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        data.write_sample_world(tmp_path / "world", users=20, per_cell=1)
        data.prepare_model("tiny", tmp_path)
        with data.whole_file(tmp_path / "x.safetensors") as partial:  # safetensors writes files for its user alone
            safetensors.torch.save_file({"x": torch.ones(1)}, partial)
    finally:
        os.umask(before)
    modes = {path: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    assert all(mode == ("0o750" if path.is_dir() else "0o640") for path, mode in modes.items()), modes


def test_an_ascii_terminal_shows_what_it_can(tmp_path):
    assert Path(data.__file__).read_bytes().isascii()
    items = [[f"i{k}", f"title {k}", f"images/{k}.png"] for k in range(120)]
    items[3][:2] = "é 日本", ""
    rows = [[f"u{u}", items[(u * 2 + 5 * k) % 120][0], k] for u in range(60) for k in range(12)]
    write_domain(tmp_path / "dömains" / "sample", items, rows)
    process = subprocess.run([sys.executable, "-B", HERE / "data.py", "sample", "--data-dir", tmp_path / "dömains"],
                             env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert process.returncode == 0, process.stderr
    assert rb"first unusable items: '\xe9 \u65e5\u672c' (no title)" in process.stdout


def test_the_sample_world_is_the_same_every_time_and_each_modality_is_clear_about_one_thing(tmp_path):
    for name in "ab":
        data.write_sample_world(tmp_path / name, users=300, per_cell=3)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 2 + 192
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    rows = rows_of(tmp_path / "a", "items.csv")                     # an item_id starts with its category and its style
    assert all(row[1].split()[1] == data.NOUNS[int(row[0][0])] for row in rows)
    brand_is_right = sum(row[1].split()[0] == data.BRANDS[int(row[0][1])] for row in rows) / len(rows)
    assert brand_is_right == pytest.approx(0.7 + 0.3 / 8, abs=0.1)
    for row in rows:
        colours = Image.open(tmp_path / "a" / row[2]).convert("HSV").getcolors(9999)
        hue = max(colours, key=lambda colour: (colour[1][1] > 99, colour[0]))[1][0]  # the most frequent vivid one
        assert abs(hue - 256 * int(row[0][1]) / 8) < 4


def test_the_shares_say_how_often_the_brand_names_the_style_and_the_shape_shows_the_category(tmp_path, monkeypatch):
    shapes = []
    monkeypatch.setattr(data, "draw_item", lambda rng, shape, hue: shapes.append(shape) or Image.new("RGB", (8, 8)))
    data.write_sample_world(tmp_path / "world", brand=1.0, shape=0.3)
    rows = rows_of(tmp_path / "world", "items.csv")
    assert all(row[1].split()[0] == data.BRANDS[int(row[0][1])] for row in rows)
    shape_is_right = [shape == data.SHAPES[int(row[0][0])] for row, shape in zip(rows, shapes)]
    assert sum(shape_is_right) / len(rows) == pytest.approx(0.3 + 0.7 / 8, abs=0.07)


def python(code, folder, **options):
    """A process that runs `code` in `folder`, with data.py at hand."""
    command = [sys.executable, "-B", "-c", "import data, pathlib, sys, time\n" + code]
    return subprocess.Popen(command, cwd=folder, text=True, env=os.environ | {"PYTHONPATH": str(HERE)},
                            stdout=subprocess.PIPE, **options)


def at_once(count, code, folder):
    """What `count` processes that run `code` from the same moment on say, once all have ended well."""
    options = dict(stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    start = "print('ready', flush=True)\nsys.stdin.read()\n"
    processes = [python(start + code, folder, **options) for _ in range(count)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * count
    for process in processes:
        process.stdin.close()
        process.stdin = None
    said = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, said
    return [out for out, _ in said]


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_lock_keeps_others_out_outlives_no_process_and_leaves_nothing(tmp_path):
    hold = "with data.lock(pathlib.Path('new/run')):\n    print('held', flush=True)\n    time.sleep(60)"
    process, path = python(hold, tmp_path), tmp_path / "new" / "run"
    assert process.stdout.readline() == "held\n"
    with pytest.raises(data.InputError, match=f"^{path}: another run is at work there; let it end"), data.lock(path):
        pass
    waiting = python("with data.lock(pathlib.Path('new/run'), wait=True):\n    print('mine')", tmp_path)
    assert waiting.stdout.readline() == "waiting for another process, which is preparing new/run\n"
    process.kill()
    assert waiting.communicate(timeout=30)[0] == "mine\n" and waiting.returncode == 0
    with data.lock(path):
        with pytest.raises(data.InputError), data.lock(path):                # nor does the same process get it twice
            pass
    assert list((tmp_path / "new").iterdir()) == []


def test_a_lock_admits_one_at_a_time_however_many_come_and_go(tmp_path):
    """Whoever removes the lock's file must not let two in: one that waited for it, and one that made it anew."""
    at_once(3, """for _ in range(100):
        with data.lock(pathlib.Path('run'), wait=True):
            pathlib.Path('inside').mkdir()       # fails if it is there
            time.sleep(0.001)
            pathlib.Path('inside').rmdir()""", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_processes_that_miss_the_same_sample_world_or_model_write_it_once(tmp_path):
    """Three at once. Each notes that it writes, and takes its time."""
    code = """def noting(write):
        def slowly(folder):
            with open('written', 'a') as file:
                file.write(write.__name__ + ' ')
            time.sleep(1)
            write(folder)
        return slowly
world = data.write_sample_world
def small_world(folder):
    world(folder, users=200, per_cell=2)
data.write_sample_world, data.write_tiny_model = noting(small_world), noting(data.write_tiny_model)
data.prepare_domain('sample', pathlib.Path('domains'))
data.prepare_model('tiny', pathlib.Path('domains'))"""
    at_once(3, code, tmp_path)
    assert (tmp_path / "written").read_text() == "small_world write_tiny_model "
    data.write_sample_world(tmp_path / "calm" / "sample", users=200, per_cell=2)
    data.prepare_model("tiny", tmp_path / "calm")
    assert files_of(tmp_path / "domains") == files_of(tmp_path / "calm")


def test_what_is_there_needs_no_lock(tmp_path, monkeypatch):
    """A folder of prepared data may be read-only."""
    write_domain(tmp_path / "sample")
    (tmp_path / "tiny-qwen2.5-vl").mkdir()
    monkeypatch.delattr(data, "lock")
    assert data.prepare_domain("sample", tmp_path) == tmp_path / "sample"
    assert data.prepare_model("tiny", tmp_path) == str(tmp_path / "tiny-qwen2.5-vl")


def test_importing_does_nothing(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(HERE)!r}); import data; assert 'torch' not in sys.modules; "
            "import vlm2rec, torch; assert not torch.cuda.is_initialized()")
    subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, check=True)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Amazon 2014, from a server on the loopback address that speaks the real format
# ----------------------------------------------------------------------------------------------------------------------

def picture(mode="RGB", size=(40, 30), kind="JPEG"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


class Shop(http.server.ThreadingHTTPServer):
    """140 items and 70 users in Amazon's format. `faults` maps a path to answers that come before the good one;
    `log` has every (path, Range header)."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), ShopHandler)
        self.faults, self.log, self.delay = {}, [], 0.0
        self.items = [f"B{k:05}" for k in range(140)]
        self.files = {f"/images/I/{item}.jpg": picture() for item in self.items}
        reviews = [{"reviewerID": f"U{u}", "asin": self.items[(u * 2 + 5 * k) % 140], "reviewText": "é, \"good\"",
                    "overall": 5.0, "unixReviewTime": 86400 * (k // 2)} for u in range(70) for k in range(12)]
        reviews.sort(key=lambda row: row["asin"])                            # as the real file is
        self.meta = [{"asin": item, "title": f"Toy &amp;  Game {item}", "price": 1.5, "related": {"also_bought": []},
                      "imUrl": f"http://ecx.images-amazon.com/images/I/{item}.jpg"} for item in self.items]
        self.meta += [{"asin": "B99999", "title": "never reviewed", "imUrl": "http://ecx.images-amazon.com/x.jpg"}]
        self.put("reviews", [json.dumps(row) for row in reviews])
        self.put("meta", map(repr, self.meta))
        self.url = f"http://127.0.0.1:{self.server_port}"

    def put(self, kind, lines):
        name = {"reviews": "/reviews_Toys_and_Games_5.json.gz", "meta": "/meta_Toys_and_Games.json.gz"}[kind]
        self.files[name] = gzip.compress("".join(line + "\n" for line in lines).encode(), mtime=0)


class ShopHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        shop, first = self.server, self.headers.get("Range")
        shop.log.append((self.path, first))
        time.sleep(shop.delay)
        if shop.faults.get(self.path):
            return shop.faults[self.path].pop(0)(self)
        self.answer(200, shop.files[self.path])

    def answer(self, code, content, cut=None, **headers):
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if start >= len(content) > 0:
            code, content = 416, b""
        elif start and code == 200:
            code, content = 206, content[start:]
        self.send_response(code)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
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
    yield server
    server.shutdown()
    server.server_close()


def code(number, content=b"", **headers):
    return lambda handler: handler.answer(number, content, **headers)


def test_amazon_from_nothing_with_every_fault(shop, tmp_path, monkeypatch, capsys):
    """Each fault is handled: tried again, or the item dropped, listed with its reason and counted."""
    monkeypatch.setattr(data, "TIMEOUT", 0.5)
    monkeypatch.setattr(data, "MAX_SECONDS", 1.0)
    monkeypatch.setattr(data, "MAX_BYTES", 100_000)
    at = lambda k: f"/images/I/{shop.items[k]}.jpg"
    good, bomb = shop.files[at(0)], picture("1", (10_000, 5_000), "PNG")     # 50 megapixels in a few kilobytes

    def drip(handler):
        """A byte every .3 seconds: never silent, never done."""
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(20):
                handler.wfile.write(b"x")
                time.sleep(0.3)

    def whole(handler):
        """All of it, whatever was asked for."""
        del handler.headers["Range"]
        handler.answer(200, good)

    shop.faults = {at(0): [code(404)], at(1): [code(500)], at(2): [code(429, Retry_After=7)],
                   at(3): [lambda handler: time.sleep(1.5)] * 4, at(4): [code(200, good, cut=100)],
                   at(5): [code(200, b"<html>sorry</html>")], at(6): [code(200, picture("P", (1, 1), "GIF"))],
                   at(7): [code(200, bomb)], at(8): [code(200, picture("L"))], at(9): [code(200, picture("CMYK"))],
                   at(10): [code(302, Location="http://example.org/x.jpg")],
                   at(11): [code(302, Location=shop.url + at(12))],
                   at(13): [code(302, Location="file:///etc/passwd")], at(14): [code(503)] * 4,
                   at(19): [drip] * 4, at(20): [code(200, good + bytes(200_000))],
                   at(21): [code(200, good, cut=100), whole],
                   "/reviews_Toys_and_Games_5.json.gz": [lambda handler: handler.answer(
                       200, shop.files["/reviews_Toys_and_Games_5.json.gz"], cut=1000)]}
    shop.meta[15].pop("title")
    shop.meta[16].pop("imUrl")
    shop.meta[17]["imUrl"] = "http://g-ecx.images-amazon.com/images/G/01/x-site/icons/no-img-lg._V192198674_.gif"
    shop.meta[18]["imUrl"] = "http://localhost/private.jpg"
    shop.put("meta", map(repr, shop.meta))
    domain = data.read_domain(data.prepare_domain("toys", tmp_path, shop.url))
    dropped = {0: "HTTP 404", 3: "no answer: timed out", 5: "not a picture", 6: "picture of a single pixel",
               7: "too many pixels", 10: "redirected to another host", 13: "HTTP 302", 14: "no answer: HTTP 503",
               15: "no title", 16: "no picture", 17: "placeholder picture", 18: "picture on an unknown host",
               19: "no answer: it takes too long", 20: "over 100,000 bytes"}
    listed = {row[0]: row[1] for row in rows_of(tmp_path / "toys", "dropped.csv")}
    assert listed == {shop.items[k]: reason for k, reason in dropped.items()}
    assert domain.item_ids == [item for k, item in enumerate(shop.items) if k not in dropped]
    assert domain.titles[0] == f"Toy & Game {shop.items[1]}"
    assert 7.0 in shop.waits and 1.0 in shop.waits                           # Retry-After, and the first back-off
    assert ("/reviews_Toys_and_Games_5.json.gz", "bytes=1000-") in shop.log  # the cut download went on where it was
    assert len([1 for path, _ in shop.log if path == at(4)]) == 2
    for k in (4, 21):                                                        # cut: the rest, or all of it, came later
        assert (tmp_path / "toys" / "images" / f"{shop.items[k]}.jpg").read_bytes() == good
    table = capsys.readouterr().out
    for text in ("published 5-core", "19,412", "167,597", "1 redirected to another host", "1 HTTP 404"):
        assert text in table
    assert not list(tmp_path.rglob("*.part"))


def test_equal_timestamps_keep_the_archives_order_which_is_by_item(shop, tmp_path):
    domain = data.read_domain(data.prepare_domain("toys", tmp_path, shop.url))
    sequence = [shop.items[(5 * k) % 140] for k in range(12)]                  # U0 buys two items a day
    days = [sorted(sequence[k:k + 2]) for k in range(0, 12, 2)]
    assert [domain.item_ids[item] for item in domain.sequences[domain.user_ids.index("U0")]] == sum(days, [])


def test_archives_put_there_by_hand_are_used_and_pictures_are_fetched_once(shop, tmp_path):
    (tmp_path / "amazon2014").mkdir()
    for name in list(shop.files)[-2:]:
        (tmp_path / "amazon2014" / name[1:]).write_bytes(shop.files.pop(name))
    data.prepare_domain("toys", tmp_path, shop.url)
    assert sorted(path for path, _ in shop.log) == sorted(shop.files)
    (tmp_path / "toys" / "items.csv").unlink()
    data.prepare_domain("toys", tmp_path, shop.url)
    assert len(shop.log) == len(shop.files)                                  # nothing was fetched again


def test_archives_that_an_earlier_run_left_in_part_go_on_where_they_were(shop, tmp_path):
    """One is cut after 1,000 bytes; of the other one all is there, only the name is not final."""
    (tmp_path / "amazon2014").mkdir()
    sizes = {name: 1000 if "reviews" in name else len(shop.files[name]) for name in list(shop.files)[-2:]}
    for name, size in sizes.items():
        (tmp_path / "amazon2014" / f"{name[1:]}.part").write_bytes(shop.files[name][:size])
    data.prepare_domain("toys", tmp_path, shop.url)
    assert {name: have for name, have in shop.log if name in sizes} == {name: f"bytes={size}-"
                                                                        for name, size in sizes.items()}
    for name in sizes:
        assert (tmp_path / "amazon2014" / name[1:]).read_bytes() == shop.files[name]


def test_a_preparation_killed_at_any_moment_goes_on_and_ends_the_same(shop, tmp_path):
    """SIGKILL, five times, at moments spread over the whole run."""
    shop.delay = 0.03
    run = lambda where: subprocess.Popen([sys.executable, HERE / "data.py", "toys", "--data-dir", tmp_path / where,
                                          "--mirror", shop.url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert run("calm").wait() == 0
    for moment in (0.3, 0.4, 0.5, 0.6, 0.7):
        process = run("killed")
        time.sleep(moment)
        process.kill()
        process.wait()
        have = {path.name for path in (tmp_path / "killed").rglob("*") if path.suffix in (".gz", ".jpg")}
        shop.log.clear()
    assert run("killed").wait() == 0
    assert not have & {path.rpartition("/")[2] for path, _ in shop.log}
    assert files_of(tmp_path / "calm") == files_of(tmp_path / "killed")


def test_two_processes_that_start_on_the_same_domain_fetch_nothing_twice_and_both_end_well(shop, tmp_path):
    shop.delay = 0.03
    said = at_once(2, f"data.prepare_domain('toys', pathlib.Path('both'), {shop.url!r})", tmp_path)
    assert sorted(path for path, _ in shop.log) == sorted(shop.files)        # each file once
    assert sum("waiting for another process, which is preparing both/toys" in text for text in said) == 1
    assert sum("published 5-core" in text for text in said) == 1             # and is prepared once
    data.prepare_domain("toys", tmp_path / "calm", shop.url)
    assert files_of(tmp_path / "both") == files_of(tmp_path / "calm")


@pytest.mark.parametrize("spoil, expected", [
    (lambda content: content[:len(content) // 2], "is cut off or damaged"),
    (lambda content: b"\0" * 100, "is cut off or damaged"),
    (lambda content: gzip.compress(b"{'asin': 'B00001', 'title': __import__('os').getcwd()}\n"), "line 1: ValueError"),
])
def test_a_damaged_archive_is_named(shop, tmp_path, spoil, expected):
    name = "/meta_Toys_and_Games.json.gz"
    shop.files[name] = spoil(shop.files[name])
    with pytest.raises(data.InputError, match=expected) as error:
        data.prepare_domain("toys", tmp_path, shop.url)
    assert str(tmp_path / "amazon2014" / name[1:]) in str(error.value) and "delete" in str(error.value)
    assert not (tmp_path / "toys" / "items.csv").exists()


def test_without_a_network_one_line_says_what_to_fetch_and_where_to_put_it(tmp_path, capsys):
    process = subprocess.run([sys.executable, HERE / "data.py", "beauty", "--data-dir", tmp_path, "--mirror",
                              "http://127.0.0.1:9"], capture_output=True, text=True)
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 2 and len(lines) == 1
    for text in ("http://127.0.0.1:9/reviews_Beauty_5.json.gz", "meta_Beauty.json.gz", str(tmp_path / "amazon2014")):
        assert text in lines[0]


def test_a_picture_that_cannot_be_written_whole_is_not_there(shop, tmp_path, monkeypatch):
    def full(path, content):
        path.touch()
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left.*p.jpg"):
        data.fetch_picture(f"{shop.url}/images/I/{shop.items[0]}.jpg", tmp_path / "p.jpg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number, share", [(403, 1.0), (503, 0.1)])
def test_when_most_pictures_fail_or_many_give_no_answer_it_is_the_network(shop, tmp_path, number, share):
    """A link that is dead stays dead, but an outage must not shrink the domain for good."""
    paths = [path for path in shop.files if "images" in path]
    shop.faults = {path: [code(number)] * 4 for path in paths[:int(share * len(paths))]}
    with pytest.raises(data.InputError, match="run again: it goes on"):
        data.prepare_domain("toys", tmp_path, shop.url)
    assert not list((tmp_path / "toys").glob("*.csv"))


@pytest.mark.parametrize("where", ["archives", "pictures", "checks"])
def test_ctrl_c_ends_in_one_line_at_once(shop, tmp_path, where):
    """While a server keeps silent, for 16 threads too, and while pictures are checked that take 10 seconds each."""
    silent = lambda handler: time.sleep(60)
    if where == "checks":
        write_domain(tmp_path / "toys")
    else:
        shop.faults = {path: [silent] * 4 for path in shop.files if ("images" in path) == (where == "pictures")}
    main = "data.load_picture = lambda file: time.sleep(10)\n" if where == "checks" else ""
    main += f"sys.argv = ['data.py', 'toys', '--data-dir', '.', '--mirror', {shop.url!r}]\nsys.exit(data.main())"
    start = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nprint('ready', flush=True)\n"
    process = python(start + main, tmp_path, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    until, asked = time.monotonic() + 20, {"archives": 1, "pictures": 2 + data.WORKERS, "checks": 0}[where]
    while len(shop.log) < asked and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and time.monotonic() - began < 4
    assert err.strip() == "stopped; the same command goes on from here"


# ----------------------------------------------------------------------------------------------------------------------
# The encoder
# ----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small sample world and the tiny model, as `python vlm2rec.py` leaves them."""
    folder = tmp_path_factory.mktemp("home")
    data.write_sample_world(folder / "domains" / "sample", users=240, per_cell=2)
    data.prepare_model("tiny", folder / "domains")
    return folder


@pytest.fixture
def encoder(home):
    """A fresh encoder of the small world."""
    domain = data.read_domain(home / "domains" / "sample")
    return vlm2rec.build_encoder(domain, str(home / "domains" / "tiny-qwen2.5-vl"), 56, home / "cache")


def with_lora(encoder, dropout=0.0, checkpointing=False):
    """LoRA whose B is not zero, so that it matters."""
    torch.manual_seed(1)
    adapted = vlm2rec.add_lora(encoder, 4, 8, dropout, checkpointing)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return adapted


def prompts(encoder, histories, modality):
    return [encoder.prompt(history, modality) for history in histories]


HISTORIES = [[3, 8, 5, 20, 31], [7], [9, 1], [50, 51, 52, 53, 54, 55, 56, 57, 58, 59]]


def test_the_tiny_models_tokenizer_knows_the_worlds_words_and_spells_out_others(home, tmp_path):
    folder = home / "domains" / "tiny-qwen2.5-vl"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    titles = [row[1] for row in rows_of(home / "domains" / "sample", "items.csv")]
    assert all(len(tokenizer.tokenize(title)) == 3 for title in titles)         # brand, noun, number
    for text in ("Belka lantern 42\nArvo kite 7", "The Lego Movie (2014)", "na\u00efve \U0001f600", "Belkaa 421"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    code = "import data, pathlib, sys; data.write_tiny_model(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, tmp_path / "again"], cwd=HERE, check=True, capture_output=True,
                   env=os.environ | {"PYTHONHASHSEED": "7"})
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}


def test_prompts_by_hand(encoder, home):
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "domains" / "tiny-qwen2.5-vl")
    domain = data.read_domain(home / "domains" / "sample")
    assert tokenizer.decode(encoder.prompt([3, 8], "text").ids) == f"{domain.titles[3]}\n{domain.titles[8]}<|im_end|>"
    assert tokenizer.decode(encoder.prompt([3], "text").ids) == f"{domain.titles[3]}<|im_end|>"
    shown = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"       # 56 px: 2 x 2 tokens
    assert tokenizer.decode(encoder.prompt([3, 8], "vision").ids) == f"{shown}\n{shown}<|im_end|>"
    assert encoder.prompt([3, 8], "vision").pictures == [3, 8] and encoder.prompt([3, 8], "text").pictures == []
    both = encoder.prompt([3, 8], "interleaved")
    assert tokenizer.decode(both.ids) == f"{domain.titles[3]}\n{shown}\n{domain.titles[8]}\n{shown}<|im_end|>"
    assert both.pictures == [3, 8]
    odd = vlm2rec.PromptBuilder(tokenizer, ["x" * 500, "a <|image_pad|> title"], encoder.vlm.config, 4)
    assert len(odd([0], "text").ids) == vlm2rec.TITLE_TOKENS + 1
    assert odd.picture[1] not in odd([1], "text").ids               # what a title says is text, never a token of ours


@pytest.mark.parametrize("modality", ["text", "vision", "interleaved"])
def test_the_encoder_equals_the_models_own_forward_pass(encoder, home, modality):
    """Against the usual recipe: pixels through the vision tower, padding on the left with a mask, the last state."""
    with_lora(encoder)
    folder = str(home / "domains" / "tiny-qwen2.5-vl")
    domain = data.read_domain(home / "domains" / "sample")
    with torch.no_grad():
        ours = encoder(prompts(encoder, HISTORIES, modality))
    whole, _, processor = vlm2rec.load_vlm(folder)                 # this one has its vision tower
    whole.language_model = encoder.vlm.language_model
    batch = prompts(encoder, HISTORIES, modality)
    longest = max(len(prompt.ids) for prompt in batch)
    ids = torch.tensor([[0] * (longest - len(prompt.ids)) + prompt.ids for prompt in batch])
    mask = torch.tensor([[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch])
    inputs = {}
    if modality != "text":
        pictures = [Image.open(domain.pictures[item]).resize((56, 56)) for history in HISTORIES for item in history]
        inputs = dict(processor(images=pictures, do_resize=False, return_tensors="pt"),
                      mm_token_type_ids=(ids == whole.config.image_token_id).int())
    with torch.no_grad():
        theirs = whole(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).last_hidden_state[:, -1]
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_padding_batch_size_and_order_change_no_embedding(encoder, modality, monkeypatch):
    with_lora(encoder)
    embed = lambda histories: encoder.embed(histories, (modality,))["fused"]
    together = embed(HISTORIES)
    alone = torch.cat([embed([history]) for history in HISTORIES])
    monkeypatch.setitem(vlm2rec.PASS_TOKENS, "cpu", 100)
    backwards = embed(HISTORIES[::-1]).flip(0)
    both = encoder(prompts(encoder, HISTORIES, "text") + prompts(encoder, HISTORIES, "vision")).detach()
    mixed = both[:4] if modality == "text" else both[4:]
    for other in (alone, backwards, mixed):
        assert (together - other).abs().max() < 1e-5


def test_batches_by_length_keep_to_the_budget_pad_little_and_miss_nothing(monkeypatch):
    lengths = [5, 30, 2, 9, 9, 1, 400]
    for padding in (256, 3):
        monkeypatch.setattr(vlm2rec, "PADDING", padding)
        batches = list(vlm2rec.batches_by_length(lengths, 20))
        assert sorted(sum(batches, [])) == list(range(7))
        padded = [len(rows) * max(lengths[row] for row in rows) for rows in batches]
        assert all(len(rows) == 1 or size <= 20 for rows, size in zip(batches, padded))
        assert all(size - sum(lengths[row] for row in rows) <= padding for rows, size in zip(batches, padded))
    assert list(vlm2rec.batches_by_length([7] * 5, 1000)) == [[0, 1, 2, 3, 4]]


def test_lora_folded_into_the_weights_gives_the_same_embeddings_and_leaves_no_trace(encoder):
    adapted = with_lora(encoder)
    weights = encoder.vlm.language_model.state_dict
    before = {name: weight.clone() for name, weight in weights().items()}
    with torch.no_grad():
        beside = encoder(prompts(encoder, HISTORIES, "vision"))
        with vlm2rec.folded_lora(encoder.vlm):
            changed = [name for name, weight in weights().items() if not torch.equal(weight, before[name])]
            assert len(changed) == 7 * encoder.vlm.config.text_config.num_hidden_layers
            inside = encoder(prompts(encoder, HISTORIES, "vision"))
        with adapted.disable_adapter(), vlm2rec.folded_lora(encoder.vlm):
            without = encoder(prompts(encoder, HISTORIES, "vision"))
    assert (beside - inside).abs().max() < 1e-5 < (beside - without).abs().max()
    assert all(torch.equal(weight, before[name]) for name, weight in weights().items())


def test_order_and_content_change_an_embedding(encoder):
    with_lora(encoder)
    for modality in ("text", "vision"):
        z = encoder.embed([[3, 8, 5], [8, 3, 5], [3, 8, 6]], (modality,))["fused"]
        assert (z[0] - z[1]).abs().max() > 1e-3 and (z[0] - z[2]).abs().max() > 1e-3


def test_lora_is_in_every_language_layer_and_nowhere_else(encoder, home):
    folder = str(home / "domains" / "tiny-qwen2.5-vl")
    encoder.vlm.visual = vlm2rec.load_vlm(folder)[0].visual       # the tower is there, and has layers of the same names
    adapted = vlm2rec.add_lora(encoder, 4, 8, 0.0, False)
    names = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert len(names) == 2 * 7 * encoder.vlm.config.text_config.num_hidden_layers
    assert all("lora_" in name and "language_model.layers" in name and "visual" not in name for name in names)
    assert any("gate_proj" in name for name, _ in encoder.vlm.visual.named_parameters())


def one_step(encoder, adapted, dropout_seed=5):
    """Gradients of every LoRA tensor for one batch of the whole objective."""
    encoder.vlm.train()
    torch.manual_seed(dropout_seed)
    z = vlm2rec.fuse({m: encoder(prompts(encoder, HISTORIES, m)) for m in ("text", "vision")})
    e = vlm2rec.fuse({m: encoder(prompts(encoder, [[2], [4], [6], [10]], m)) for m in ("text", "vision")})
    one, negatives = torch.tensor(1.0), ~torch.eye(4, dtype=torch.bool)
    loss, _ = vlm2rec.objective(vlm2rec.METHODS["vlm2rec"], z, e, negatives, one, one, 0.1, 0.1, 0.5)
    adapted.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in adapted.named_parameters() if weight.requires_grad}


def test_every_lora_tensor_gets_a_gradient_and_checkpointing_does_not_change_it(encoder):
    adapted, calls = with_lora(encoder, dropout=0.2), []
    encoder.vlm.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain, passes = one_step(encoder, adapted), len(calls)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in plain.values())
    encoder.vlm.language_model.activation_checkpointing_enable()
    checkpointed = one_step(encoder, adapted)
    assert len(calls) == 3 * passes                                # each pass is computed again in backward
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)


def test_dropout_keeps_the_share_and_the_mean_and_is_off_when_it_should_be():
    x = torch.ones(1001, 999, requires_grad=True)
    for p in (0.2, 0.5):
        dropout = vlm2rec.Dropout(p)
        y = dropout(x)
        assert y.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
        assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.002)         # 4 standard deviations
        columns = (y == 0).float().mean(dim=0)
        assert (columns - p).abs().max() < 6 * math.sqrt(p * (1 - p) / 1001)         # no place is favoured
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y) and not torch.equal(dropout(x), y)
        assert torch.equal(dropout.eval()(x), x)


def test_add_lora_switches_checkpointing_and_dropout_on(encoder):
    vlm2rec.add_lora(encoder, 4, 8, 0.3, checkpointing=True)
    assert encoder.vlm.language_model.is_activation_checkpointing
    dropouts = [module for module in encoder.vlm.modules() if isinstance(module, vlm2rec.Dropout) and module.p == 0.3]
    assert len(dropouts) == 7 * encoder.vlm.config.text_config.num_hidden_layers


def test_features_are_computed_once_and_again_when_the_pictures_change(home, tmp_path, monkeypatch):
    folder = str(home / "domains" / "tiny-qwen2.5-vl")
    domain = data.read_domain(home / "domains" / "sample")
    vlm, _, processor = vlm2rec.load_vlm(folder)
    features = vlm2rec.cached_features(tmp_path, vlm, processor, domain, 56)
    direct = vlm2rec.encode_pictures(vlm, processor, domain.pictures, 56, batch=5)
    assert features.shape == (len(domain.item_ids), 4, 64) and (features - direct).abs().max() < 1e-6
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]

    def killed_while_saving(tensors, path):
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", killed_while_saving)
        assert torch.equal(vlm2rec.cached_features(tmp_path, vlm, processor, domain, 56), features)  # nothing to save
        domain.digest = "other content"
        with pytest.raises(KeyboardInterrupt):
            vlm2rec.cached_features(tmp_path, vlm, processor, domain, 56)
    assert torch.equal(vlm2rec.cached_features(tmp_path, vlm, processor, domain, 56), features)  # half of it is not it


def test_of_several_processes_that_want_the_same_features_one_encodes(home, tmp_path, monkeypatch, capsys):
    """Threads stand for processes: each has its own handle of the lock's file."""
    domain, calls, encode = data.read_domain(home / "domains" / "sample"), [], vlm2rec.encode_pictures
    vlm, _, processor = vlm2rec.load_vlm(str(home / "domains" / "tiny-qwen2.5-vl"))
    monkeypatch.setattr(vlm2rec, "encode_pictures", lambda *args: (calls.append(1), time.sleep(0.5), encode(*args))[2])
    threads = [threading.Thread(target=vlm2rec.cached_features, args=(tmp_path, vlm, processor, domain, 56))
               for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and capsys.readouterr().out.count("waiting for another process") == 2
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_pictures_keep_their_ratio_on_a_white_ground(home, tmp_path):
    vlm, _, processor = vlm2rec.load_vlm(str(home / "domains" / "tiny-qwen2.5-vl"))
    wide, square = Image.new("RGB", (56, 28), "red"), Image.new("RGB", (56, 56), "white")
    square.paste(wide, (0, 14))
    for name, picture in (("wide", wide), ("square", square), ("squashed", wide.resize((56, 56)))):
        picture.save(tmp_path / f"{name}.png")
    encode = lambda name: vlm2rec.encode_pictures(vlm, processor, [tmp_path / f"{name}.png"], 56)
    assert torch.equal(encode("wide"), encode("square")) and not torch.equal(encode("wide"), encode("squashed"))


def test_a_large_model_on_a_cpu_is_announced(home, monkeypatch, capsys):
    folder = str(home / "domains" / "tiny-qwen2.5-vl")
    vlm2rec.load_vlm(folder)
    assert "takes hours" not in capsys.readouterr().out
    monkeypatch.setattr(transformers.PreTrainedModel, "num_parameters", lambda self: 3_750_000_000)
    vlm2rec.load_vlm(folder)
    assert f"loading {folder}\nnote: without a CUDA GPU a model of this size takes hours" in capsys.readouterr().out


def test_one_batch_can_be_overfitted(encoder):
    adapted, one, losses = vlm2rec.add_lora(encoder, 8, 16, 0.0, False), torch.tensor(1.0), []
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
    batch = [([k, k + 1, k + 2], k + 20, [k, k + 1, k + 2]) for k in range(8)]
    for step in range(80):
        loss, _ = vlm2rec.batch_loss(encoder, vlm2rec.METHODS["sft"], batch, one, one, 0.1, 0.1, 0.5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 1.5 and losses[-1] < 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs
# ----------------------------------------------------------------------------------------------------------------------

def command(*args):
    """vlm2rec's main; returns its exit code."""
    return vlm2rec.main([str(arg) for arg in args])


BRIEF = ("--epochs", "2", "--lr", "3e-3", "--log-every", "10")  # enough to be better than untrained in the small world


@pytest.fixture(scope="module")
def finished(home):
    """The sample run as the README gives it, but brief, and in the small world."""
    with contextlib.chdir(home):
        assert command("--domain", "sample", *BRIEF) == 0
    return home / "runs" / "sample" / "vlm2rec-seed0"


def test_a_run_writes_what_the_design_says(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "adapter", "config.json", "dropped.csv", "items.safetensors", "log.jsonl", "metrics.json", "ranks.csv",
        "recommendations.png", "table.md", "users.safetensors"]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert list(metrics) == ["domain", "method", "seed", "model", "users", "items",
                             "test", "test_full", "test_untied", "valid", "popularity", "untrained"]
    assert (metrics["domain"], metrics["method"], metrics["seed"], metrics["model"]) == ("sample", "vlm2rec", 0, "tiny")
    rows = rows_of(finished, "ranks.csv")
    assert len(rows) == metrics["users"]
    for column, key in ((2, "test"), (3, "test_full")):
        assert vlm2rec.hits_and_ndcg(torch.tensor([float(row[column]) for row in rows])) == pytest.approx(metrics[key])
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    epoch = metrics["users"] // 8                                    # 27 steps; a line every ten, and at its end
    assert [line["step"] for line in log] == sorted({*range(10, 2 * epoch, 10), epoch, 2 * epoch})
    weights = safetensors.torch.load_file(finished / "adapter" / "adapter_model.safetensors")
    assert all(weight.any() for weight in weights.values())         # the second epoch is better than no training
    for line in log:
        assert {"gap", "weight", "alpha", "beta", "norm_ratio", "grad_norm", "users_per_s", "tokens_per_s", "peak_gib",
                "mean_cosine", "epoch_minutes", "minutes_left"} < set(line)
        assert line["loss"] == pytest.approx(line["wpcl"] + 0.5 * line["crtr"], abs=1e-4)
    config = json.loads((finished / "config.json").read_text())
    assert config["image_size"] == 56 and config["lora_rank"] == 16
    assert {"torch", "transformers", "peft", "data_digest", "source_digest"} < set(config)
    assert len(list(finished.parent.glob("features-*.safetensors"))) == 1
    table, items = (finished / "table.md").read_text(), safetensors.torch.load_file(finished / "items.safetensors")
    assert table.startswith(f"vlm2rec: N@10 {metrics['test']['N@10']:.4f}, ")
    means = [tensor.mean(dim=0) for tensor in map(items.get, ("text", "vision"))]
    cosine = torch.cosine_similarity(*means, dim=0).item()
    assert f"cosine of the items' mean text and mean vision: {cosine:.2f}" in table
    for row in ("| chance | 0.0990 ", "| popularity |", "| before training, validation |", "| vlm2rec, validation |"):
        assert row in table
    mode = (finished / "config.json").stat().st_mode                # what the umask allows, for others too
    assert all(path.stat().st_mode == mode for path in finished.parent.rglob("*") if path.is_file())
    assert "PeftModel.from_pretrained" in (finished / "adapter" / "README.md").read_text()


def test_users_safetensors_holds_the_test_histories(finished):
    """Whoever has both files can score: the cosines give ranks.csv."""
    with safetensors.safe_open(finished / "users.safetensors", "pt") as file:
        z, users = file.get_tensor("fused"), json.loads(file.metadata()["user_ids"])
    with safetensors.safe_open(finished / "items.safetensors", "pt") as file:
        e, items = file.get_tensor("fused"), json.loads(file.metadata()["item_ids"])
    for row in rows_of(finished, "ranks.csv")[::50]:
        scores = vlm2rec.cosine(z[users.index(row[0])][None], e)[0]
        better = int((scores > scores[items.index(row[1])]).sum())
        assert float(row[3]) <= 1 + better <= float(row[3]) + 12    # the full rank leaves out the user's other items


def test_the_target_is_the_users_last_item_and_in_no_history(finished, home):
    domain = data.read_domain(home / "domains" / "sample")
    for row in rows_of(finished, "ranks.csv"):
        sequence = domain.sequences[domain.user_ids.index(row[0])]
        assert row[1] == domain.item_ids[sequence[-1]]
    for split in ("valid", "test"):
        for history, target, negatives in zip(*vlm2rec.make_evaluation(domain, split, 10, 0)[:3]):
            assert target not in history and not {int(target), *history} & set(negatives.tolist())


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(finished, home, tmp_path):
    with contextlib.chdir(home):
        for seed in (0, 1):
            assert command(*BRIEF, "--seed", seed, "--out", tmp_path) == 0
    files = [(tmp_path / "sample" / f"vlm2rec-seed{seed}" / "metrics.json").read_bytes() for seed in (0, 1)]
    assert files[0] == (finished / "metrics.json").read_bytes() != files[1]
    assert (tmp_path / "sample" / "vlm2rec-seed0" / "ranks.csv").read_bytes() == (finished / "ranks.csv").read_bytes()


@pytest.mark.parametrize("method", [name for name, method in vlm2rec.METHODS.items()
                                    if name != "vlm2rec" and method.modalities])
def test_the_other_methods(home, finished, method, capsys):
    with contextlib.chdir(home):
        assert command("--method", method, "--epochs", 1) == 0
    folder = finished.with_name(f"{method}-seed0")
    items = safetensors.torch.load_file(folder / "items.safetensors")
    assert set(items) == {"text": {"text", "fused"}, "vision": {"vision", "fused"}, "internal": {"fused"}}.get(
        method, {"text", "vision", "fused"})
    assert (folder / "adapter").exists() == (method != "vanilla")
    table = capsys.readouterr().out
    for row in ("| chance | 0.0990 | 0.0450 |", "| popularity |", f"| {method} |", "wrote runs"):
        assert row in table
    assert max(map(len, table.splitlines())) <= 100
    if method != "vanilla":
        terms = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
        assert {"infonce", "wpcl", "crtr", "alpha", "cmsa"} & set(terms) == {
            "no-wpcl": {"crtr"}, "no-penalty": {"infonce", "crtr"}, "no-stopgrad": {"wpcl", "crtr", "alpha"},
            "no-crtr": {"wpcl", "alpha"}, "sda": {"infonce", "cmsa"}}.get(method, {"infonce"})


def test_peft_and_transformers_alone_reproduce_the_item_embeddings(finished, home):
    """adapter/ is plain PEFT: AutoModel and the usual pixels give items.safetensors."""
    folder = home / "domains" / "tiny-qwen2.5-vl"
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, finished / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    with safetensors.safe_open(finished / "items.safetensors", "pt") as file:
        item_ids = json.loads(file.metadata()["item_ids"])
        stored = {name: file.get_tensor(name) for name in file.keys()}
    sample = home / "domains" / "sample"
    rows = {row[0]: row for row in rows_of(sample, "items.csv")}
    last = lambda **inputs: model(**inputs).last_hidden_state[0, -1]
    for k in (0, 17, len(item_ids) - 1):
        _, title, image = rows[item_ids[k]]
        text = tokenizer(title + tokenizer.eos_token, return_tensors="pt").input_ids
        shown = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>" + tokenizer.eos_token
        shown = tokenizer(shown, return_tensors="pt").input_ids
        types = (shown == model.config.image_token_id).int()
        picture = Image.open(sample / image).resize((56, 56))
        pixels = processor(images=[picture], do_resize=False, return_tensors="pt")
        with torch.no_grad():
            e_text, e_vision = last(input_ids=text), last(input_ids=shown, mm_token_type_ids=types, **pixels)
        for name, e in (("text", e_text), ("vision", e_vision), ("fused", e_text + e_vision)):
            assert stored[name].dtype == torch.float32 and (stored[name][k] - e).abs().max() < 1e-5


def contents(folder):
    """Every file of a run's folder; of config.json without --out, of log.jsonl without what clock and machine say."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files["config.json"] = {key: value for key, value in json.loads(files["config.json"]).items() if key != "out"}
    timeless = lambda line: {key: value for key, value in json.loads(line).items()
                             if key not in ("users_per_s", "tokens_per_s", "peak_gib", "epoch_minutes", "minutes_left")}
    return files | {"log.jsonl": [timeless(line) for line in files["log.jsonl"].splitlines()]}


def test_a_finished_run_is_shown_and_not_repeated(finished, home, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with contextlib.chdir(home):
        assert command("--domain", "sample", *BRIEF) == 0
    shown = capsys.readouterr().out
    assert "is finished since 20" in shown and (finished / "table.md").read_text() in shown
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_other_settings_are_named_and_nothing_is_touched_until_restart(finished, home, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "sample" / finished.name)
    folder = tmp_path / "sample" / finished.name
    before, flags = contents(folder), [*BRIEF, "--out", tmp_path, "--lam", 0.25]
    with contextlib.chdir(home):
        assert command(*flags) == 2
        error = capsys.readouterr().err.strip()
        assert "lam was 0.5, now 0.25. --restart replaces it" in error and "\n" not in error
        assert contents(folder) == before
        (folder / "config.json").write_text((folder / "config.json").read_text().replace("data_digest", "odd"))
        assert command(*flags) == 2 and "data_digest was None, now" in capsys.readouterr().err
        assert command(*flags, "--restart") == 0
    assert contents(folder)["metrics.json"] != before["metrics.json"] and set(contents(folder)) == set(before)


def test_another_version_of_the_source_is_said_and_blocks_nothing(finished, home, capsys):
    config = finished / "config.json"
    before = config.read_text()
    try:
        config.write_text(re.sub(r'"source_digest": "\w+"', '"source_digest": "of an older file"', before))
        with contextlib.chdir(home):
            assert command("--domain", "sample", *BRIEF) == 0
    finally:
        config.write_text(before)
    shown = capsys.readouterr().out
    assert "begun with another version of vlm2rec.py" in shown and "is finished since 20" in shown


def test_the_best_epoch_is_kept_and_the_untrained_model_is_a_candidate(home, tmp_path, monkeypatch):
    """Validation says .3, then .2, then .4: after two epochs the second is kept; after one, what was there before."""
    def weights_after(epochs, scores):
        monkeypatch.setattr(vlm2rec, "validate", lambda *args: dict.fromkeys(vlm2rec.CHANCE, scores.pop(0)))
        with contextlib.chdir(home):
            assert command("--epochs", epochs, "--train-users", 80, "--method", "sft",
                           "--out", tmp_path / str(epochs)) == 0
        folder = tmp_path / str(epochs) / "sample" / "sft-seed0"
        assert json.loads((folder / "metrics.json").read_text())["valid"]["N@10"] == {1: 0.3, 2: 0.4}[epochs]
        weights = safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
        return [weight for name, weight in weights.items() if "lora_B" in name]
    assert not any(weight.any() for weight in weights_after(1, [0.3, 0.2]))    # LoRA's B is 0 before the first step
    assert all(weight.any() for weight in weights_after(2, [0.3, 0.2, 0.4]))


def start(home, out, *flags):
    """The finished run as a process of its own, in another folder of results."""
    command = [sys.executable, HERE / "vlm2rec.py", "--epochs", "2", "--lr", "3e-3", "--log-every", "3", "--save-every",
               "10", "--gradients-every", "10", "--out", out, *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, command)), cwd=home, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def calm(home, tmp_path_factory):
    """A run of two epochs that nobody disturbs: its files, and how long it took."""
    out, began = tmp_path_factory.mktemp("calm"), time.monotonic()
    assert start(home, out).wait() == 0
    return contents(out / "sample" / "vlm2rec-seed0"), time.monotonic() - began


def test_a_run_killed_again_and_again_ends_with_the_same_files(calm, home, tmp_path):
    """SIGKILL at moments spread over the run: adapter, ranks, metrics and log are equal."""
    files, seconds = calm
    for share in (0.6, 0.7, 0.8):
        process = start(home, tmp_path)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=share * seconds)
        process.kill()
        process.communicate()
    assert start(home, tmp_path).wait() == 0
    assert contents(tmp_path / "sample" / "vlm2rec-seed0") == files
    assert {path.name for path in (tmp_path / "sample").iterdir() if path.suffix != ".safetensors"} == {"vlm2rec-seed0"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_the_step_and_the_same_command_goes_on(calm, home, tmp_path, number):
    folder = tmp_path / "sample" / "vlm2rec-seed0"
    process = start(home, tmp_path, "--save-every", "1000")          # so that only the signal can have saved
    while not (folder / "log.jsonl").exists():                       # step 3 is behind it
        time.sleep(0.01)
    process.send_signal(number)
    assert "the same command goes on" in process.communicate()[1] and process.returncode == 130
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["progress"]["step"]
    assert 3 <= step < 40
    process = start(home, tmp_path, "--save-every", "1000")
    assert f"going on after step {step}\n" in process.communicate()[0] and process.returncode == 0
    for name in ("metrics.json", "ranks.csv", "adapter/adapter_model.safetensors"):
        assert contents(folder)[name] == calm[0][name]


def test_of_two_runs_in_one_folder_the_second_leaves_the_first_alone(finished, home, capsys):
    before = contents(finished)
    with contextlib.chdir(home), data.lock(finished):
        assert command(*BRIEF, "--restart") == 2
    assert "another run is at work there" in capsys.readouterr().err and contents(finished) == before


def test_of_processes_that_start_on_one_run_together_one_makes_it(calm, home, tmp_path):
    """The others are refused, and touch nothing: what comes out is what a single one makes."""
    processes = [start(home, tmp_path) for _ in range(3)]
    said = [process.communicate()[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2, 2]
    assert sum("another run is at work there" in text for text in said) == 2
    assert contents(tmp_path / "sample" / "vlm2rec-seed0") == calm[0]


def test_only_what_a_run_writes_is_ever_replaced(finished, home, tmp_path, capsys):
    folder = tmp_path / "sample" / finished.name
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    flags = ["--method", "vlm2rec", *BRIEF, "--out", tmp_path]
    with contextlib.chdir(home):
        assert command(*flags) == 0 and (folder / "notes.txt").read_text() == "mine"
        metrics, config = (folder / "metrics.json").read_bytes(), (folder / "config.json").read_bytes()
        (folder / "config.json").unlink()
        assert command(*flags) == 2 and "no config.json" in capsys.readouterr().err
        assert (folder / "metrics.json").read_bytes() == metrics
        (folder / "config.json").write_text("null")
        assert command(*flags) == 2 and "config.json is damaged" in capsys.readouterr().err
        (folder / "config.json").write_bytes(config)
        (folder / "adapter" / "mine.txt").write_text("too")
        assert command(*flags, "--restart", "--epochs", 1) == 0
    assert (folder / "notes.txt").exists() and (folder / "adapter" / "mine.txt").exists()


def test_what_changes_no_number_does_not_block_a_resume_nor_does_a_run_that_came_to_nothing(
        calm, home, tmp_path, monkeypatch, capsys):
    batch_loss, calls = vlm2rec.batch_loss, []
    folder = tmp_path / "sample" / "vlm2rec-seed0"

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return batch_loss(*args)
    flags = ["--epochs", 2, "--out", tmp_path, "--method", "sft", "--log-every"]
    folder = tmp_path / "sample" / "sft-seed0"
    with contextlib.chdir(home):
        monkeypatch.setattr(vlm2rec, "batch_loss", interrupted)
        assert command(*flags, 3, "--lr", "3e-3") == 130             # no checkpoint was due
        assert len((folder / "log.jsonl").read_text().splitlines()) == 4
        calls.clear()
        assert command(*flags, 5, "--lr", "2e-3", "--save-every", 10) == 130
        assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [5, 10]
        assert command(*flags, 5, "--lr", "1e-3", "--save-every", 10) == 2      # now there is something to lose
        assert "lr was 0.002, now 0.001" in capsys.readouterr().err
        monkeypatch.setattr(vlm2rec, "batch_loss", batch_loss)
        assert command(*flags, 4, "--lr", "2e-3", "--save-every", 20, "--checkpointing", "off") == 0
    assert "going on after step 10" in capsys.readouterr().out


def test_ctrl_c_while_torch_is_imported_ends_without_a_traceback(tmp_path):
    for seconds in (0.3, 1.0, 2.0):
        process = subprocess.Popen([sys.executable, HERE / "vlm2rec.py"], cwd=tmp_path, text=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate()[1] and process.returncode == 130


def test_a_terminal_that_knows_ascii_only_gets_the_tables(finished, home, tmp_path):
    process = subprocess.run([sys.executable, HERE / "vlm2rec.py", "--method", "mean-pool", "--embeddings",
                              finished / "items.safetensors", "--seeds", "2", "--out", tmp_path], cwd=home,
                             capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0 and rb"\xb1" in process.stdout


@pytest.mark.parametrize("spoil, expected", [
    (lambda weights: dict(list(weights.items())[::2]), "lacks tensors"),
    (lambda weights: weights | {"base_model.model.language_model.layers.9.lora_A.weight": torch.ones(1)}, "has others"),
    (lambda weights: {name: weight * math.nan for name, weight in weights.items()}, "not finite"),
    (None, "no LoRA in it"),
    ("IA3", "no LoRA in it"),
])
def test_an_adapter_that_is_damaged_or_of_another_kind_gets_one_line(spoil, expected, finished, home, tmp_path, capsys):
    shutil.copytree(finished / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    if callable(spoil):
        safetensors.torch.save_file(spoil(safetensors.torch.load_file(path)), path, {"format": "pt"})
    elif spoil:
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(
            {"peft_type": spoil, "target_modules": config["target_modules"], "feedforward_modules": []}))
    else:
        torch.save({"pickled": object}, path.with_suffix(".bin"))     # a pickle is never opened
        path.unlink()
    with contextlib.chdir(home):
        assert command("--adapter", tmp_path / "adapter", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip()
    assert expected in error and len(error.splitlines()) == 1


def test_damaged_files_of_a_run_are_named_with_a_remedy(finished, home, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished.parent, tmp_path / "sample")
    features = next((tmp_path / "sample").glob("features-*"))
    features.write_bytes(features.read_bytes()[:1000])
    with contextlib.chdir(home):
        assert command("--method", "vanilla", "--out", tmp_path, "--restart") == 2
    assert f"{features} is damaged: " in (error := capsys.readouterr().err) and "; delete it" in error
    assert len(error.strip().splitlines()) == 1
    folder = tmp_path / "sample" / finished.name
    (folder / "table.md").unlink()                                    # as if it had not ended
    torch.save({"weights": torch.ones(3)}, folder / "checkpoint.pt")  # of something else
    features.unlink()
    with contextlib.chdir(home):
        assert command(*BRIEF, "--out", tmp_path) == 2
    assert "checkpoint.pt is damaged: " in (error := capsys.readouterr().err) and len(error.strip().splitlines()) == 1


def test_a_finished_run_that_lost_a_file_says_so_wherever_it_is_used(finished, home, tmp_path, capsys):
    shutil.copytree(finished.parent, tmp_path / "sample")
    folder = tmp_path / "sample" / finished.name
    keep = {name: (folder / name).read_bytes() for name in ("metrics.json", "ranks.csv", "items.safetensors")}

    def refused(*flags):
        with contextlib.chdir(home):
            assert command(*BRIEF, "--out", tmp_path, *flags) == 2
        error = capsys.readouterr().err.strip()
        assert len(error.splitlines()) == 1 and str(folder) in error
        return error
    for name, content in keep.items():
        (folder / name).unlink()
        assert f"{name} is gone. --restart" in refused()
        (folder / name).write_bytes(content)
    (folder / "items.safetensors").write_bytes(keep["items.safetensors"][:1000])
    assert "items.safetensors is damaged" in refused("--recommend", "0000")
    (folder / "items.safetensors").write_bytes(keep["items.safetensors"])
    shutil.rmtree(folder / "adapter")
    assert "adapter does not fit: there is no LoRA in it" in refused("--recommend", "0000")
    shutil.copytree(finished / "adapter", folder / "adapter")
    (folder / "config.json").write_text("[]")
    assert "config.json is damaged" in refused()
    cut = b"\r\n".join(keep["ranks.csv"].split(b"\r\n")[:50])      # at the end of a line: it reads well
    for name, content in (("ranks.csv", cut), ("metrics.json", b"x")):
        (folder / name).write_bytes(content)
        with pytest.raises(data.InputError, match="is damaged"):
            vlm2rec.read_result(folder)
        (folder / name).write_bytes(keep[name])
    assert len(vlm2rec.read_result(folder)["gains"]) == json.loads(keep["metrics.json"])["users"]


def test_output_into_head_ends_quietly(finished, home):
    process = subprocess.run(f"{sys.executable} {HERE / 'vlm2rec.py'} {' '.join(BRIEF)} | head -1", shell=True,
                             cwd=home, capture_output=True, text=True)
    assert process.stdout.startswith("torch ") and "Broken" not in process.stderr and "Traceback" not in process.stderr


def test_recommend_gives_the_ten_nearest_new_items_of_a_finished_run(finished, home, tmp_path, capsys):
    with safetensors.safe_open(finished / "items.safetensors", "pt") as file:
        e, ids = file.get_tensor("fused"), json.loads(file.metadata()["item_ids"])
    history = [ids[5], ids[17], ids[42]]
    with contextlib.chdir(home):
        assert command(*BRIEF, "--recommend", *history) == 0
        shown = [line.split() for line in capsys.readouterr().out.splitlines()[-10:]]
        assert command(*BRIEF, "--recommend", "no-such-item") == 2
        assert "--recommend no-such-item: sample has no such item" in capsys.readouterr().err
        assert command(*BRIEF, "--recommend", *history, "--out", tmp_path) == 2
        assert "--recommend needs a finished run" in capsys.readouterr().err
        domain = data.read_domain("domains/sample")
        encoder = vlm2rec.build_encoder(domain, "domains/tiny-qwen2.5-vl", 56, "cache")
        vlm2rec.load_adapter(encoder, finished / "adapter")
    scores = vlm2rec.cosine(encoder.embed([[5, 17, 42]], ("text", "vision"))["fused"], e)[0]
    scores[[5, 17, 42]] = -1
    assert [row[2] for row in shown] == [ids[item] for item in scores.topk(10).indices]
    assert [float(row[1]) for row in shown] == pytest.approx(scores.topk(10).values.tolist(), abs=1e-4)
    assert Image.open(finished / "recommended.png").size[0] > 400
    (finished / "recommended.png").unlink()


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_later(calm, home, tmp_path):
    """A limit on the size of a file stands for the disk: the second checkpoint does not fit, the first one stays."""
    folder = tmp_path / "sample" / "vlm2rec-seed0"
    process = start(home, tmp_path)
    while not (folder / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    kept = (folder / "checkpoint.pt").read_bytes()
    code = (f"import resource, sys; sys.path.insert(0, {str(HERE)!r}); import vlm2rec; "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); sys.exit(vlm2rec.main(sys.argv[1:]))")
    process = subprocess.run([sys.executable, "-c", code, "--epochs", "2", "--lr", "3e-3", "--log-every", "3",
                              "--save-every", "10", "--gradients-every", "10", "--out", tmp_path], cwd=home,
                             capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.strip().endswith(f"File too large: '{folder / 'checkpoint.pt'}'")
    assert (folder / "checkpoint.pt").read_bytes() == kept and not list(tmp_path.rglob("*.part"))
    assert start(home, tmp_path).wait() == 0
    assert contents(folder) == calm[0]


def test_a_damaged_checkpoint_and_a_folder_that_cannot_be_written_get_one_line(home, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    with contextlib.chdir(home):
        assert command("--epochs", 1, "--out", tmp_path / "file") == 2
        error = capsys.readouterr().err.strip()
        assert "Not a directory" in error and str(tmp_path / "file") in error
        with monkeypatch.context() as patch:
            patch.setattr(vlm2rec, "batch_loss", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
            assert command("--epochs", 1, "--out", tmp_path) == 130
        (tmp_path / "sample" / "vlm2rec-seed0" / "checkpoint.pt").write_bytes(b"PK half of it")
        assert command("--epochs", 1, "--out", tmp_path) == 2
    assert re.search(r"checkpoint.pt is damaged: .*; --restart begins anew", capsys.readouterr().err)


def test_out_of_memory_gets_one_line(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vlm2rec.Encoder, "forward_pass", lambda *args: torch.empty(10**15))
    with contextlib.chdir(home):
        assert command("--epochs", 1, "--out", tmp_path) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    for text in ("out of memory, at a peak of ", "--checkpointing on", "--batch (fewer negatives)"):
        assert text in error


def test_a_gradient_that_is_not_finite_stops_at_its_step_and_keeps_the_last_good_checkpoint(
        home, tmp_path, monkeypatch, capsys):
    """The loss stays finite: only the slope of a square root at 0 is not."""
    calls, objective = [], vlm2rec.objective

    def spoilt(method, z, *args):
        loss, terms = objective(method, z, *args)
        calls.append(1)
        return loss + ((z["text"].sum() * 0).sqrt() if len(calls) == 13 else 0), terms
    monkeypatch.setattr(vlm2rec, "objective", spoilt)
    with contextlib.chdir(home):
        assert command("--epochs", 1, "--out", tmp_path, "--save-every", 10, "--log-every", 50) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: step 13 is the first that is not finite: {'loss': ") and "'grad_norm': nan" in error
    saved = torch.load(tmp_path / "sample" / "vlm2rec-seed0" / "checkpoint.pt", weights_only=True)
    assert saved["progress"]["step"] == 10
    assert all(weight.isfinite().all() for weight in saved["state"]["lora"].values())


def test_a_diverged_run_stops_with_its_first_bad_step(home, tmp_path, capsys):
    with contextlib.chdir(home):
        assert command("--epochs", 1, "--lr", "1e30", "--out", tmp_path) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"error: step \d+ is the first that is not finite: .*lower --lr.*", error)
    assert not (tmp_path / "sample" / "vlm2rec-seed0" / "table.md").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Any family of vision-language models: tiny random checkpoints, saved with their heads and loaded as from the hub
# ----------------------------------------------------------------------------------------------------------------------

SHOWN = {  # how each family's own Processor shows a picture, and what it opens a prompt with
    **dict.fromkeys(["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"], ("", "<|vision_start|>{}<|vision_end|>")),
    **dict.fromkeys(["smolvlm", "idefics3"],
                    ("<bos>", "<fake_token_around_image><global-img>{}<fake_token_around_image>")),
    "llava": ("<bos>", "{}"), "llava_onevision": ("", "{}"), "internvl": ("", "<img>{}</img>"),
    "gemma3": ("<bos>", "\n\n<start_of_image>{}<end_of_image>\n\n")}
SIZES = {"qwen2_vl": 56, "qwen2_5_vl": 56, "qwen3_vl": 64, "qwen3_5": 64}  # for 4 tokens a picture; 0: the tower's own
SHORT = [[3, 8, 5, 2, 11], [7], [9, 1], [10, 0, 6, 4]]


def family_settings(family, ids):
    """Text and vision settings, the rest of the config, and the image processor's name and settings."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    tower = dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, initializer_range=0.2)
    eyes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2,
                image_size=56, patch_size=14)
    siglip, square = eyes | {"model_type": "siglip_vision_model"}, {"height": 56, "width": 56}
    pins, image = [[56, 56], [56, 112], [112, 56], [112, 112]], {"image_token_id": ids["<image>"]}
    if family in SIZES:
        rest = dict(image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
                    vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])
        linear = dict(layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8, linear_num_key_heads=2,
                      linear_value_head_dim=8, linear_num_value_heads=4)
        text, vision, patch = {
            "qwen2_vl": ({}, dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2,
                                  initializer_range=0.2), 14),
            "qwen2_5_vl": ({}, tower | {"fullatt_block_indexes": [1]}, 14),
            "qwen3_vl": ({}, tower | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}, 16),
            "qwen3_5": (linear, tower | {"num_position_embeddings": 16}, 16)}[family]
        rope |= {"mrope_interleaved": True} if patch == 16 else {}
        return text | {"rope_parameters": rope}, vision, rest, "qwen2_vl.Qwen2VL", {"patch_size": patch}
    return {
        "internvl": ({"model_type": "qwen2"}, eyes | {"image_size": [56, 56], "patch_size": [14, 14]}, image,
                     "got_ocr2.GotOcr2", {"size": square, "crop_to_patches": True}),
        "llava": ({"model_type": "llama"}, eyes | {"model_type": "clip_vision_model"},
                  {"image_token_index": ids["<image>"]}, "clip.CLIP",
                  {"size": {"shortest_edge": 56}, "crop_size": square}),
        "llava_onevision": ({"model_type": "qwen2"}, siglip | {"vision_use_head": False},
                            {"image_token_index": ids["<image>"], "video_token_index": ids["<video>"],
                             "image_grid_pinpoints": pins}, "llava_onevision.LlavaOnevision",
                            {"size": square, "image_grid_pinpoints": pins}),
        "smolvlm": ({"model_type": "llama"}, eyes, image | {"scale_factor": 2}, "smolvlm.SmolVLM",
                    {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}),
        "idefics3": ({"model_type": "llama"}, eyes, image | {"scale_factor": 2}, "idefics3.Idefics3",
                     {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}),
        "gemma3": ({"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"],
                    "sliding_window": 8}, siglip | {"vision_use_head": False},
                   {"image_token_index": ids["<image>"], "mm_tokens_per_image": 4}, "gemma3.Gemma3", {"size": square}),
    }[family]


def write_family(family, folder, home, context=4096):
    """A checkpoint with the family's own head, tower, marks and image processor, and wide weights: all matter."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "domains" / "tiny-qwen2.5-vl")
    marks = re.findall("<.+?>", "".join(shown for _, shown in SHOWN.values())) + ["<image>", "<video>", "<bos>"]
    marks = list(dict.fromkeys(marks + ["<|image_pad|>", "<|video_pad|>"]))
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks}
    if SHOWN[family][0]:
        tokenizer.bos_token = "<bos>"
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    text, vision, rest, processor, settings = family_settings(family, ids)
    text |= dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.2,
                 pad_token_id=0)
    config = transformers.AutoConfig.for_model(family, text_config=text, vision_config=vision, **rest)
    module, name = processor.split(".")
    module = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    model = transformers.AutoModelForImageTextToText.from_config(config)
    for weight in model.parameters():
        if not weight.any():  # such as Gemma's projector
            torch.nn.init.normal_(weight, std=0.2)
    with contextlib.redirect_stderr(io.StringIO()):  # a bar
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    getattr(module, f"{name}ImageProcessorPil")(**settings).save_pretrained(folder)


@pytest.fixture
def few(home):
    """The small world with twelve items."""
    domain = data.read_domain(home / "domains" / "sample")
    domain.titles, domain.pictures, domain.item_ids = domain.titles[:12], domain.pictures[:12], domain.item_ids[:12]
    return domain


def own_forward(vlm, processor, prompt, domain, size):
    """The last state of a prompt as the family's model itself gives it, from pixels."""
    ids, inputs = torch.tensor([prompt.ids]), {}
    if prompt.pictures:
        pictures = [vlm2rec.square_picture(domain.pictures[item], size) for item in prompt.pictures]
        alone = len(pictures) == 1 and vlm.config.model_type == "llava_onevision"  # it would be cut into tiles
        inputs = dict(processor(images=[pictures * (2 if alone else 1)], do_resize=not size, return_tensors="pt"))
        if alone:
            inputs = {name: inputs[name][:1] for name in ("pixel_values", "image_sizes")}
            inputs["batch_num_images"] = torch.tensor([2])
        types = (ids == vlm.config.image_token_id).int()
        inputs |= {"mm_token_type_ids": types, "token_type_ids": types}
    accepted = inspect.signature(vlm.forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in accepted}
    return vlm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs).last_hidden_state[0, -1]


@pytest.fixture
def one_pass(monkeypatch):
    """All prompts in one padded batch, however long they are."""
    monkeypatch.setitem(vlm2rec.PASS_TOKENS, "cpu", 10**6)
    monkeypatch.setattr(vlm2rec, "PADDING", 10**6)


@pytest.mark.parametrize("family", SHOWN)
def test_each_family_equals_its_own_forward_pass_and_is_trained_in_its_language_layers(
        family, home, few, tmp_path, one_pass, capsys):
    size = SIZES.get(family, 0)
    write_family(family, tmp_path, home)
    encoder = vlm2rec.build_encoder(few, str(tmp_path), size or 28, tmp_path / "cache")
    tokens, tokenizer = encoder.features.shape[1], transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokens == {"llava": 16, "llava_onevision": 17}.get(family, 4)                  # no tiles
    ignored = f"; {family} ignores --image-size" if not size else ""
    assert f"a picture takes {tokens} tokens{ignored}\n" in capsys.readouterr().out
    opening, shown = SHOWN[family]
    shown = shown.format(tokens * tokenizer.decode(encoder.vlm.config.image_token_id))
    assert tokenizer.decode(encoder.prompt([3, 7], "interleaved").ids) == (
        f"{opening}{few.titles[3]}\n{shown}\n{few.titles[7]}\n{shown}<|im_end|>")
    assert all(weight.device.type == "meta" for weight in encoder.vlm.get_encoder(modality="image").parameters())

    adapted, decoder = with_lora(encoder), encoder.vlm.get_decoder()
    batch = [encoder.prompt(history, modality) for modality in ("text", "vision", "interleaved") for history in SHORT]
    whole, _, processor = vlm2rec.load_vlm(str(tmp_path))
    setattr(whole, "text_model" if family in ("smolvlm", "idefics3") else "language_model", decoder)
    with torch.no_grad():
        ours, theirs = encoder(batch), torch.stack([own_forward(whole, processor, p, few, size) for p in batch])
    assert (ours - theirs).abs().max() < 1e-5
    with torch.no_grad():
        one, other = encoder(prompts(encoder, [[2, 7], [4, 7]], "vision"))
    assert (one - other).abs().max() > 0.1                                                # pictures matter

    linear = {name for name, layer in decoder.named_modules() if isinstance(layer, torch.nn.Linear)}
    linear = {name.removesuffix(".base_layer") for name in linear if "lora_" not in name}
    assert {name for name, layer in decoder.named_modules() if hasattr(layer, "lora_A")} == linear
    assert len(vlm2rec.lora_layers(encoder.vlm)) == len(linear)                           # and none anywhere else
    plain = gradients(encoder, adapted, batch)
    assert all(gradient.abs().max() > 0 for gradient in plain)
    decoder.activation_checkpointing_enable()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(plain, gradients(encoder, adapted, batch)))


def gradients(encoder, adapted, batch):
    encoder.vlm.train()
    lora = [weight for weight in adapted.parameters() if weight.requires_grad]
    return torch.autograd.grad(encoder(batch).square().sum(), lora)


@pytest.mark.parametrize("family, gone", [("qwen2_vl", "position_ids"), ("qwen3_5", "position_ids"),
                                          ("qwen3_vl", "deepstack_visual_embeds"), ("gemma3", "token_type_ids")])
def test_each_special_case_matters(family, gone, home, few, tmp_path, one_pass, monkeypatch):
    """Leave it out, and the embeddings of pictures are far from the model's own."""
    write_family(family, tmp_path, home)
    encoder = vlm2rec.build_encoder(few, str(tmp_path), SIZES.get(family, 0), tmp_path / "cache")
    batch, whole = prompts(encoder, SHORT, "vision"), vlm2rec.family_arguments

    def without(*args):
        lm, arguments = whole(*args)
        del arguments[gone]
        return lm, arguments
    with torch.no_grad():
        right = encoder(batch)
        monkeypatch.setattr(vlm2rec, "family_arguments", without)
        assert (encoder(batch) - right).abs().max() > 0.1


def test_features_are_made_again_when_any_weight_outside_the_decoder_changes(home, few, tmp_path):
    write_family("llava_onevision", tmp_path, home)
    vlm, _, processor = vlm2rec.load_vlm(str(tmp_path))
    files = lambda: [vlm2rec.cached_features(tmp_path / "cache", vlm, processor, few, 0) is None,
                     len(list((tmp_path / "cache").glob("features-*")))][1]
    assert files() == 1
    for count, weight in enumerate([vlm.image_newline, vlm.multi_modal_projector.linear_1.weight,
                                    next(vlm.vision_tower.parameters())], 2):
        weight.data += 0.01
        assert files() == count
    vlm.language_model.layers[0].mlp.up_proj.weight.data += 0.01
    assert files() == 4                                                                   # it sees no picture


def test_a_model_that_does_not_fit_or_cannot_hold_the_prompts_is_refused_in_one_line(home, few, tmp_path, capsys):
    refused = lambda *args: (command("--data-dir", home / "domains", "--out", tmp_path / "runs", *args) == 2,
                             capsys.readouterr().err)[1]
    write_family("llava", tmp_path / "llava", home, context=100)
    longest = max(map(len, few.sequences)) - 1                                            # no user has 20
    llava = refused("--model", tmp_path / "llava", "--history", "20")
    assert llava == (f"error: {longest} items can take {17 * longest + 1} tokens, more than the 100 that "
                     f"{tmp_path / 'llava'} holds: take a shorter --history\n")
    assert not list((tmp_path / "runs").rglob("features-*"))                              # before hours of encoding
    write_family("qwen3_vl", tmp_path / "qwen3", home, context=200)
    qwen = refused("--model", tmp_path / "qwen3", "--image-size", "56")
    assert qwen == "error: --image-size 56: a token covers 32 pixels, take a multiple such as 192\n"
    qwen = refused("--model", tmp_path / "qwen3", "--image-size", "192", "--method", "internal")
    assert qwen.endswith("take a shorter --history or a smaller --image-size\n")
    shutil.copy(tmp_path / "llava" / "preprocessor_config.json", tmp_path / "qwen3")
    qwen = refused("--model", tmp_path / "qwen3", "--image-size", "64")
    assert "cannot read a picture: " in qwen and qwen.endswith("does its preprocessor_config.json belong to it?\n")
    for family, config in {"bert": {}, "internvl_chat": {"auto_map": {"AutoConfig": "code.OfTheirs"}},
                           "llava+pixtral": {"vision_config": {"model_type": "pixtral"}}}.items():
        (tmp_path / family).mkdir()
        config["model_type"] = family.removesuffix("+pixtral")
        (tmp_path / family / "config.json").write_text(json.dumps(config))
        assert refused("--model", tmp_path / family) == (
            f"error: --model {tmp_path / family} is of the family {family}; these fit: {', '.join(vlm2rec.FAMILIES)}\n")


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_a_whole_run_of_another_family(family, home, tmp_path, monkeypatch, capsys):
    """Train, evaluate, resume; the adapter loads with PEFT alone."""
    write_family(family, tmp_path / "model", home)
    flags = ("--data-dir", home / "domains", "--model", tmp_path / "model", "--image-size", "64", *BRIEF)
    run = lambda out: command(*flags, "--train-users", "80", "--save-every", "5", "--out", tmp_path / out)
    assert run("calm") == 0

    def save_and_die(*args):
        save(*args)
        raise KeyboardInterrupt
    save = vlm2rec.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(vlm2rec, "save_checkpoint", save_and_die)
        assert run("stopped") == 130
    assert run("stopped") == 0 and "going on after step 5\n" in capsys.readouterr().out
    calm = tmp_path / "calm" / "sample" / "vlm2rec-seed0"
    assert contents(tmp_path / "stopped" / "sample" / "vlm2rec-seed0") == contents(calm)
    metrics = json.loads((calm / "metrics.json").read_text())
    assert metrics["valid"]["N@10"] > metrics["untrained"]["N@10"]
    shown = command(*flags, "--train-users", "80", "--image-size", "96", "--out", tmp_path / "calm")
    assert shown == (2 if family in SIZES else 0)                                         # it is ignored, or it is not

    model = transformers.AutoModel.from_pretrained(tmp_path / "model", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, calm / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    domain = data.read_domain(home / "domains" / "sample")
    stored = safetensors.torch.load_file(calm / "items.safetensors")["text"]
    ids = tokenizer(domain.titles[5] + tokenizer.eos_token, return_tensors="pt").input_ids
    with torch.no_grad():
        assert (model(input_ids=ids).last_hidden_state[0, -1] - stored[5]).abs().max() < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# SDA: CMSA in the loss, MoDA in the adapter
# ----------------------------------------------------------------------------------------------------------------------

def loop_teacher(e_text, e_vision, tau):
    vision, text = loop_sim(e_vision, e_vision), loop_sim(e_text, e_text)
    rows = [[math.exp((v + t) / (2 * tau)) for v, t in zip(*pair)] for pair in zip(vision, text)]
    return [[cell / sum(row) for cell in row] for row in rows]


def loop_alignment(e_text, e_vision, tau, teacher):
    """The mean cross-entropy of both directions, halved, from a fixed teacher."""
    total, across = 0.0, loop_sim(e_vision, e_text)
    for student in (across, list(zip(*across))):
        for p, row in zip(teacher, student):
            normaliser = sum(math.exp(s / tau) for s in row)
            total -= sum(q * math.log(math.exp(s / tau) / normaliser) for q, s in zip(p, row))
    return total / (2 * len(teacher))


def test_cmsa_equals_the_loops_and_no_gradient_goes_through_the_teacher(batch):
    tensors, negatives = batch
    e_text, e_vision = tensors["e_text"], tensors["e_vision"]
    values = {"e_text": e_text.tolist(), "e_vision": e_vision.tolist()}
    teacher = loop_teacher(**values, tau=TAU)
    loss = vlm2rec.structural_alignment(e_text, e_vision, TAU)
    assert loss.item() == pytest.approx(loop_alignment(**values, tau=TAU, teacher=teacher), abs=1e-9)
    loss.backward()
    for key in values:
        for row, column in ((0, 1), (2, 3), (4, 0)):
            def shifted(step):
                moved = tensors[key].detach().clone()
                moved[row, column] += step
                return loop_alignment(**values | {key: moved.tolist()}, tau=TAU, teacher=teacher)
            slope = (shifted(1e-5) - shifted(-1e-5)) / 2e-5
            assert tensors[key].grad[row, column].item() == pytest.approx(slope, abs=1e-6)


def test_sda_is_sft_and_cmsa(batch):
    tensors, negatives = batch
    z = vlm2rec.fuse({"text": tensors["z_text"], "vision": tensors["z_vision"]})
    e = vlm2rec.fuse({"text": tensors["e_text"], "vision": tensors["e_vision"]})
    loss = lambda method: vlm2rec.objective(vlm2rec.METHODS[method], z, e, negatives, None, None, TAU, TAU_CRTR, LAM)[0]
    cmsa = vlm2rec.structural_alignment(e["text"], e["vision"], TAU)
    assert loss("sda").item() == pytest.approx((loss("sft") + LAM * cmsa).item())


def with_gates(encoder, checkpointing=False):
    """MoDA whose B and gates are not zero, so that they matter."""
    torch.manual_seed(1)
    adapted = vlm2rec.add_lora(encoder, 8, 16, 0.0, checkpointing)
    vlm2rec.add_gates(encoder, checkpointing)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name or name.endswith("gates"):
            torch.nn.init.normal_(weight, std=0.5)
    return adapted


def test_moda_is_the_sum_over_its_experts_for_each_modality(encoder):
    with_gates(encoder)
    layer = encoder.vlm.language_model.layers[1].mlp.down_proj
    a, b, x = layer.lora_A["default"], layer.lora_B["default"].weight, torch.randn(2, 5, layer.in_features)
    with torch.no_grad():
        for number, modality in enumerate(("text", "vision")):
            encoder.shows = torch.tensor([bool(number)] * 2)
            expected, shares = layer.base_layer(x), a.gates[number].softmax(dim=0)
            for expert in range(4):                                # each has two of the eight ranks; alpha / rank is 2
                ranks = slice(2 * expert, 2 * expert + 2)
                expected = expected + 2 * shares[expert] * (x @ a.weight[ranks].T @ b[:, ranks].T)
            assert (layer(x) - expected).abs().max() < 1e-6 * expected.abs().max()


def test_modas_gates_are_those_of_the_prompts_own_modality_when_embedding_too(encoder):
    """A pass of titles is what plain LoRA gives with the shares of text in its A, one of pictures with vision's."""
    adapted = with_gates(encoder)
    both = encoder.embed(HISTORIES, ("text", "vision"))
    gated = [layer.lora_A["default"] for layer in vlm2rec.lora_layers(adapted)]
    weights = [a.weight.data for a in gated]
    for number, modality in enumerate(("text", "vision")):
        for a, weight in zip(gated, weights):
            a.weight.data = 4 * weight * a.gates[number].detach().softmax(dim=0).repeat_interleave(2)[:, None]
        for a in gated:
            a.shares, a.gates.data = a.gates.data, torch.zeros_like(a.gates)               # a quarter each, times 4
        assert (encoder.embed(HISTORIES, (modality,))[modality] - both[modality]).abs().max() < 1e-5
        for a in gated:
            a.gates.data = a.shares


def test_modas_gradients_agree_with_checkpointing_of_mixed_passes_and_reach_each_expert_and_gate(encoder, home):
    histories = [(history, modality) for history in HISTORIES for modality in ("text", "vision")]

    def gradients_of(encoder, adapted):
        encoder.vlm.train()
        mixed = encoder([encoder.prompt(*history) for history in histories])               # both in a pass
        text = encoder([encoder.prompt(history, "text") for history in HISTORIES])         # the last one, text alone
        loss = mixed.sin().sum() + text.cos().sum()
        names, lora = zip(*((n, w) for n, w in adapted.named_parameters() if w.requires_grad))
        return dict(zip(names, torch.autograd.grad(loss, lora)))
    plain = gradients_of(encoder, with_gates(encoder))
    domain = data.read_domain(home / "domains" / "sample")
    again = vlm2rec.build_encoder(domain, str(home / "domains" / "tiny-qwen2.5-vl"), 56, home / "cache")
    checkpointed = gradients_of(again, with_gates(again, checkpointing=True))
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-5) for name in plain)
    for name, gradient in plain.items():
        blocks = gradient.T if "lora_B" in name else gradient      # a row for each rank, or for each modality's gates
        assert blocks.abs().amax(dim=1).min() > 0, name
        if name.endswith("gates"):
            assert gradient.abs().min() > 0


def test_sdas_adapter_says_what_it_is_and_is_loaded_whole(home, tmp_path, capsys):
    run = ("--data-dir", home / "domains", "--method", "sda", *BRIEF, "--out")
    assert command(*run, tmp_path / "runs", "--epochs", "1") == 0
    folder = tmp_path / "runs" / "sample" / "sda-seed0"
    assert "PEFT would drop the gates" in (folder / "adapter" / "README.md").read_text()
    tensors = safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
    gates = [tensor for name, tensor in tensors.items() if name.endswith("gates")]
    assert len(gates) == 14 and all(tensor.shape == (2, 4) and tensor.abs().max() > 0 for tensor in gates)
    assert command(*run, tmp_path / "again", "--adapter", folder / "adapter") == 0
    first, second = (safetensors.torch.load_file(path / "items.safetensors")
                     for path in (folder, tmp_path / "again" / "sample" / "sda+zero-shot-seed0"))
    assert all(torch.equal(first[name], second[name]) for name in first)

    def refused(method, adapter):
        capsys.readouterr()
        assert command("--data-dir", home / "domains", "--method", method, "--adapter", adapter, "--out", tmp_path) == 2
        return capsys.readouterr().err
    assert refused("sft", folder / "adapter") == f"error: --adapter {folder / 'adapter'} was trained by --method sda\n"
    shutil.copytree(folder / "adapter", tmp_path / "cut")
    safetensors.torch.save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("gates")},
                                tmp_path / "cut" / "adapter_model.safetensors")
    assert refused("sda", tmp_path / "cut") == f"error: --adapter {tmp_path / 'cut'} was not trained by --method sda\n"
    capsys.readouterr()
    assert command(*run, tmp_path / "runs", "--lora-rank", "6") == 2
    assert capsys.readouterr().err == "error: --lora-rank 6: the 4 experts of sda share it, take a multiple\n"


# ----------------------------------------------------------------------------------------------------------------------
# The paper's evidence
# ----------------------------------------------------------------------------------------------------------------------

def test_the_paired_t_test_by_the_tables_and_by_its_closed_form():
    """The differences d have the mean t * sd / sqrt(n), so that t is the statistic."""
    def p(t, df):
        d = torch.arange(df + 1.0, dtype=torch.float64)
        d = (d - d.mean()) / d.std() + t / math.sqrt(df + 1)
        return vlm2rec.paired_t_test(d.tolist(), [0.0] * (df + 1))
    for t, df in ((12.706, 1), (4.303, 2), (3.182, 3), (2.776, 4), (2.571, 5), (2.228, 10), (2.042, 30), (1.962, 1000)):
        assert p(t, df) == pytest.approx(p(-t, df)) == pytest.approx(0.05, abs=1e-4)
    for t in (0.5, 1.0, 3.0):
        u = t / math.sqrt(1 + t * t / 4)
        assert p(t, 4) == pytest.approx(2 * (1 - (1 / 2 + 3 / 8 * u * (1 - u * u / 12))))
    assert vlm2rec.paired_t_test([1, 2, 3], [1, 2, 3]) == 1 and math.isnan(vlm2rec.paired_t_test([1], [2]))
    assert vlm2rec.paired_t_test([2, 3], [1, 2]) == 0                          # equal differences that are not 0
    # differences 1 and 3: mean 2, standard deviation sqrt(2), t = 2, one degree of freedom: p = 1 - 2/pi * atan(2)
    assert vlm2rec.paired_t_test([2, 5], [1, 2]) == pytest.approx(1 - 2 / math.pi * math.atan(2))
    # differences 1, 2, 3: mean 2, standard deviation 1, t = 2 * sqrt(3), p = 1 - t / sqrt(2 + t^2)
    assert vlm2rec.paired_t_test([2, 4, 6], [1, 2, 3]) == pytest.approx(1 - math.sqrt(12 / 14))


def fake_runs(folder, method, scores, ranks):
    """Folders of runs with these N@10 in every column, and these ranks of three users."""
    folders = []
    for seed, value in enumerate(scores):
        folders.append(folder / f"{method}-seed{seed}")
        folders[-1].mkdir(parents=True)
        columns = dict.fromkeys(vlm2rec.CHANCE, value)
        (folders[-1] / "metrics.json").write_text(json.dumps({"seed": seed, "users": len(ranks), "test": columns}))
        data.write_csv(folders[-1] / "ranks.csv", ["user_id", "item_id", "rank", "rank_full"],
                       [[f"u{k}", "i", rank, rank] for k, rank in enumerate(ranks)])
    return folders


def compared(runs):
    """The table on the test split, and the comparison user by user."""
    results = {method: [vlm2rec.read_result(folder) for folder in folders] for method, folders in runs.items()}
    return vlm2rec.comparison(results, "test", "seed0-2"), vlm2rec.differences(results)


def test_the_comparison_by_hand(tmp_path):
    runs = {"sft": fake_runs(tmp_path, "sft", [0.1, 0.2, 0.3], [1, 2, 50]),
            "vlm2rec": fake_runs(tmp_path, "vlm2rec", [0.2, 0.31, 0.4], [1, 1, 50]),
            "text": fake_runs(tmp_path, "text", [0.0, 0.0, 0.0], [1, 2, 50])}
    rows = [row.split(" | ") for row in compared(runs)[0].splitlines()]
    assert rows[0] == ["| test, seed0-2", *list(vlm2rec.CHANCE)[:3], "N@20 |"]
    assert rows[2][:2] == ["| chance", "0.0990"]
    assert rows[3][:2] == ["| sft", "<u>0.2000 ± 0.1000</u>"] and rows[5][:2] == ["| text", "0.0000 ± 0.0000"]
    assert rows[4][:2] == ["| vlm2rec", "**0.3033 ± 0.1002** *"]               # differences .1 .11 .1: p = .001
    against_sft = compared(runs)[1].splitlines()[0]
    difference = (1 - 1 / math.log2(3)) / 3                                    # one user of three is better
    assert f"{difference:+.4f} ± {difference:.4f}" in against_sft and "better for 33%, worse for 0%" in against_sft
    assert against_sft.endswith("over the users, 0.001 over the seeds")
    del runs["vlm2rec"]                                                        # then the best is the reference
    assert [line.partition(",")[0] for line in compared(runs)[1].splitlines()] == ["- sft against text"]
    assert "| **0.2000 ± 0.1000** | " in compared(runs)[0]                     # p = .07: no star
    worse = {"vlm2rec": fake_runs(tmp_path / "w", "vlm2rec", [0.1, 0.2, 0.3], [1, 2]),   # a star is for the best
             "sft": fake_runs(tmp_path / "w", "sft", [0.2, 0.31, 0.4], [1, 2])}
    rows = [row.split(" | ") for row in compared(worse)[0].splitlines()]
    assert rows[3][1] == "<u>0.2000 ± 0.1000</u>" and rows[4][1] == "**0.3033 ± 0.1002** *"
    close = {"vlm2rec": fake_runs(tmp_path / "c", "vlm2rec", [0.2, 0.31, 0.4], [1, 2]),    # it is far above text alone
             "sft": fake_runs(tmp_path / "c", "sft", [0.21, 0.2, 0.42], [1, 2]),
             "text": fake_runs(tmp_path / "c", "text", [0.0, 0.0, 0.0], [1, 2])}
    assert compared(close)[0].splitlines()[3].split(" | ")[1] == "**0.3033 ± 0.1002**"
    runs = {"sft": fake_runs(tmp_path / "many", "sft", [0.1], [9] * 99 + [8]),
            "text": fake_runs(tmp_path / "many", "text", [0.0], [50] * 100)}
    assert compared(runs)[1].endswith("; p < 1e-9 over the users")     # and nothing of a single seed


def spaces(users=50, items=130, seed=0):
    generator = torch.Generator().manual_seed(seed)
    e = {name: torch.randn(items, 8, generator=generator) for name in ("text", "vision")}
    targets = torch.randint(items, (users,), generator=generator).tolist()
    negatives = torch.tensor([data.draw_negatives(str(u), [t], items, "test", 0) for u, t in enumerate(targets)])
    histories = [[t] for t in targets]
    return e, vlm2rec.Evaluation(histories, torch.tensor(targets), negatives, histories)


def test_geometry_equals_the_loops_and_knows_the_constant_and_the_perfect_space():
    e, test = spaces(users=1030)                                    # more than the 1,024 that are done at once
    z, e = torch.randn(1030, 8), e["text"]
    whole = 2 - 2 * vlm2rec.cosine(z, e)
    found = vlm2rec.geometry(z, e, test.targets, test.negatives)
    assert found["A_pos"] == pytest.approx(whole[range(1030), test.targets].mean().item(), rel=1e-5)
    assert found["A_neg"] == pytest.approx(whole.gather(1, test.negatives).mean().item(), rel=1e-5)
    assert found["U"] == pytest.approx((-2 * whole).exp().mean().log().item(), rel=1e-5)
    e, test = spaces()
    z, e = torch.randn(50, 8), e["text"]
    found = vlm2rec.geometry(z, e, test.targets, test.negatives)
    square = lambda u, i: 2 - 2 * loop_cosine(z[u].tolist(), e[i].tolist())
    a_pos = sum(square(u, test.targets[u]) for u in range(50)) / 50
    a_neg = sum(square(u, i) for u in range(50) for i in test.negatives[u].tolist()) / 5000
    uniformity = math.log(sum(math.exp(-2 * square(u, i)) for u in range(50) for i in range(130)) / 6500)
    assert found == pytest.approx({"A_pos": a_pos, "A_neg": a_neg, "U": uniformity, "S": a_neg / a_pos}, rel=1e-5)
    constant = vlm2rec.geometry(torch.ones(50, 8), torch.ones(130, 8), test.targets, test.negatives)
    assert constant["A_pos"] == pytest.approx(0, abs=1e-6) and constant["U"] == pytest.approx(0, abs=1e-5)
    perfect = vlm2rec.geometry(e[test.targets], e, test.targets, test.negatives)
    assert perfect["A_pos"] == pytest.approx(0, abs=1e-6) and perfect["S"] > 1e5


def test_queries_tell_the_modality_that_knows_the_target_from_the_one_that_does_not():
    """Text histories know the target's text, vision histories its fused embedding."""
    e, test = spaces(users=400)
    z = {"text": e["text"][test.targets], "vision": vlm2rec.fuse(e)["fused"][test.targets]}
    found = vlm2rec.queries(vlm2rec.fuse(z), vlm2rec.fuse(e), test)
    assert list(found) == ["f2f", "t2f", "v2f", "t2t", "v2v"] and found["t2t"] == found["v2f"] == 1
    assert max(found["f2f"], found["t2f"], found["v2v"]) < 1


def test_gradient_cosines_against_plain_backward_passes(encoder):
    adapted, one = with_lora(encoder, dropout=0.2, checkpointing=True), torch.tensor(1.0)
    batch = [([k, k + 1, k + 2], k + 20, [k, k + 1, k + 2]) for k in range(6)]
    gradients, forward = {}, []
    encoder.vlm.eval()
    for name in ("sft", "text", "vision"):
        adapted.zero_grad()
        vlm2rec.batch_loss(encoder, vlm2rec.METHODS[name], batch, one, one, 0.1, 0.1, 0.5)[0].backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in adapted.parameters() if p.requires_grad])
    state = torch.get_rng_state()
    encoder.vlm.train()
    encoder.vlm.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: forward.append(1))
    found = vlm2rec.gradient_cosines(encoder, vlm2rec.METHODS["sft"], batch, one, one, 0.1, 0.1, 0.5)
    assert torch.equal(state, torch.get_rng_state())                # the run goes on as if nothing had been
    assert all(module.training for module in encoder.vlm.language_model.modules())
    calls = len(forward)
    for name in ("sft", "text", "vision"):
        vlm2rec.batch_loss(encoder, vlm2rec.METHODS[name], batch, one, one, 0.1, 0.1, 0.5)
    assert calls == 2 * (len(forward) - calls)                      # checkpointed: backward repeats forward
    for name in ("text", "vision"):
        a, b = gradients["sft"], gradients[name]
        assert found[f"cos_{name}"] == pytest.approx((a @ b / a.norm() / b.norm()).item(), abs=1e-5)
    alone = vlm2rec.gradient_cosines(encoder, vlm2rec.METHODS["text"], batch, one, one, 0.1, 0.1, 0.5)
    assert alone["cos_text"] == pytest.approx(1, abs=1e-5) and alone["cos_vision"] < 0.99


def walkers(tmp_path, steps=8):
    """A domain in which item k + 1 follows item k, for everybody."""
    return data.read_domain(write_domain(tmp_path / "walk", None, [
        [f"u{u}", f"i{(7 * u + k) % 120}", k] for u in range(120) for k in range(steps)]))


@pytest.mark.parametrize("kind", ["sasrec", "gru4rec"])
@pytest.mark.parametrize("vectors", [None, 3 * torch.eye(120)])
def test_downstream_models_learn_a_walk_from_ids_and_from_vectors(tmp_path, kind, vectors):
    domain = walkers(tmp_path)
    valid, test = (vlm2rec.make_evaluation(domain, split, 10, 0) for split in ("valid", "test"))
    samples = vlm2rec.training_samples(domain, 10, 0, 0)
    model = vlm2rec.SequenceRecommender(kind, 120, vectors)
    best = vlm2rec.train_downstream(model, samples, valid, 0, epochs=100, lr=5e-3)
    assert best["N@10"] > 0.9 and vlm2rec.hits_and_ndcg(model.rank(test)[0])["N@10"] > 0.9  # chance is .045
    assert isinstance(model.adapter, torch.nn.Linear) == (vectors is not None) and model.items().shape == (120, 128)
    if vectors is not None:                                         # they start at norm 1, and are trained
        start = vlm2rec.SequenceRecommender(kind, 120, vectors).table.weight
        assert torch.equal(start, torch.eye(120)) and not torch.equal(model.table.weight, start)
    rows = torch.tensor([[3, 4, 5, 6], [3, 4, 9, 9]])
    with torch.no_grad():
        assert torch.allclose(model(rows)[0, :2], model(rows)[1, :2], atol=1e-5)   # no state sees what comes later


def test_downstream_models_train_on_the_latest_items_before_the_last_two(tmp_path, monkeypatch):
    """Each item but the first of the latest 1 + 4 is once to be predicted, for the users that were drawn."""
    domain = data.read_domain(write_domain(tmp_path / "walk", None, [
        [f"u{u}", f"i{(7 * u + k) % 120}", k] for u in range(120) for k in range(6 + u % 5)]))
    asked, cross_entropy = [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda logits, targets: (
        asked.append(sorted(targets.tolist())), cross_entropy(logits, targets))[1])
    config = vlm2rec.Config(method="gru4rec", history=4, train_users=32, device="cpu", out=tmp_path,
                            domain=f"{tmp_path}/walk")
    run = vlm2rec.Run(config)
    run.folder.mkdir(parents=True)
    vlm2rec.run_downstream(run, *(vlm2rec.make_evaluation(domain, split, 4, 0) for split in ("test", "valid")), None)
    samples = vlm2rec.training_samples(domain, 4, 32, seed=0)
    sequences = [[*earlier, target] for _, target, earlier in samples]
    assert len(samples) == 32 and all(sequence in [s[:-2] for s in domain.sequences] for sequence in sequences)
    assert asked[0] == asked[-1] == sorted(item for sequence in sequences for item in sequence[-5:][1:])


def test_targets_are_counted_in_training_only(tmp_path):
    domain = walkers(tmp_path, steps=11)                            # 120 users x 9 of 11 items, evenly over 120 items
    test = vlm2rec.make_evaluation(domain, "test", 10, 0)
    table = vlm2rec.by_frequency(vlm2rec.training_counts(domain)[test.targets], torch.ones(120))
    assert [name.partition(" (")[0] for name in table] == ["targets seen 0 to 4", "targets seen 5 to 9",
                                                           "targets seen 10 to 19", "targets seen 20 times or more"]
    assert list(table)[1] == "targets seen 5 to 9 (120 users)"
    assert [row["N@10"] for row in table.values()] == [None, 1, None, None]


def test_item_vectors_of_others(finished, home, tmp_path, capsys):
    """Two tables of vectors in one command, in both formats; a run's own; and what they are compared by."""
    domain, sample = data.read_domain(home / "domains" / "sample"), home / "domains" / "sample"
    order = [row[0] for row in rows_of(sample, "items.csv")]
    numpy.save(tmp_path / "one.npy", torch.eye(len(order)).numpy())
    safetensors.torch.save_file({"x": torch.ones(len(order), 3)}, tmp_path / "constant.safetensors")
    items = finished / "items.safetensors"
    flags = ["--method", "mean-pool", "--seeds", 2, "--out", tmp_path]
    with contextlib.chdir(home):
        assert command(*flags, "--embeddings", tmp_path / "one.npy", tmp_path / "constant.safetensors", items) == 0
        assert "| mean-pool+constant | 0.0000 ± 0.0000" in capsys.readouterr().out              # all tied: rank 51
        assert {path.name for path in (tmp_path / "sample").glob("*-seed?")} == {
            f"mean-pool+{name}-seed{seed}" for name in ("one", "constant", "vlm2rec") for seed in (0, 1)}
        numpy.save(tmp_path / "one.npy", torch.eye(len(order)).numpy()[::-1])
        assert command(*flags, "--embeddings", tmp_path / "one.npy") == 2                       # not the old result
        assert "given_digest was" in capsys.readouterr().err
    assert torch.equal(vlm2rec.read_vectors(items, domain, sample), safetensors.torch.load_file(items)["fused"])
    assert len(order) > len(domain.item_ids)                        # some items are not in the 5-core: rows are matched
    numpy.save(tmp_path / "one.npy", torch.eye(len(order)).numpy())
    found = vlm2rec.read_vectors(tmp_path / "one.npy", domain, sample)
    assert [order[row] for row in found.argmax(dim=1)] == domain.item_ids


@pytest.mark.parametrize("content, expected", [
    (None, "cannot be read"),
    (b"", "cannot be read"),
    (numpy.eye(3), "(3, 3); one row for each of the 128 items is needed, in the order of"),
    (numpy.full((128, 2), numpy.nan), "not finite"),
    ({"text": torch.ones(128, 2), "vision": torch.ones(128, 2)}, "none of its tensors text, vision is called fused"),
    (({"fused": torch.ones(2, 2)}, ["a", "b"]), "no vector for item '0000': is it of another domain?"),
    (({"fused": torch.ones(2, 2)}, 7), "cannot be read"),
    (({"fused": torch.ones(2, 2)}, [1, 2]), "no vector for item '0000': is it of another domain?"),
    (({"fused": torch.ones(3, 2)}, ["a", "b"]), "the 2 items is needed, in the order of its item_ids"),
])
def test_item_vectors_that_do_not_fit_get_one_clear_line(content, expected, home, tmp_path, capsys):
    path = tmp_path / ("vectors.npy" if isinstance(content, (bytes, numpy.ndarray)) else "vectors.safetensors")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, numpy.ndarray):
        numpy.save(path, content)
    elif content:
        tensors, ids = content if isinstance(content, tuple) else (content, None)
        safetensors.torch.save_file(tensors, path, ids and {"item_ids": json.dumps(ids)})
    with contextlib.chdir(home):
        assert command("--method", "sasrec", "--embeddings", path, "--out", tmp_path / "out") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and expected in errors[0] and str(path) in errors[0], errors


def test_a_perfect_a_constant_and_a_random_embedding_give_what_they_must_in_every_table(tmp_path):
    """20 clubs of 6 items; each of their 50 members buys all six, in an order of their own. Who knows the club knows
    the next item. The others: all tied, and chance."""
    domain = data.read_domain(write_domain(tmp_path / "clubs", None, [
        [f"u{club}-{member}", f"i{6 * club + item}", when] for club in range(20) for member in range(50)
        for when, item in enumerate(random.Random(member).sample(range(6), 6))]))
    club = torch.tensor([int(item[1:]) // 6 for item in domain.item_ids])
    e = {"perfect": torch.eye(20)[club], "constant": torch.ones(120, 20), "random": torch.randn(120, 20)}
    valid, test = (vlm2rec.make_evaluation(domain, split, 10, 0) for split in ("valid", "test"))
    expected = {"perfect": [1, 1, 1, 1], "constant": [0, 0, 0, 0], "random": list(vlm2rec.CHANCE.values())}
    runs, tolerance = {}, {"perfect": 0, "constant": 0, "random": 0.09}   # three standard errors of 120 targets
    for name, vectors in e.items():                                                   # Task 1
        run = vlm2rec.Run(vlm2rec.Config(method="mean-pool", embeddings=f"{name}.npy", out=tmp_path,
                                         domain=f"{tmp_path}/clubs"))
        runs[name] = [run.folder]
        run.folder.mkdir(parents=True)
        table = vlm2rec.run_downstream(run, test, valid, vectors)
        ours = [row for row in table.splitlines() if f"+{name} " in row or "20 times or more" in row]
        assert len(ours) == 2                                                          # the test split, by frequency
        for row in ours:
            scores = [float(score) for score in row.strip("| ").split(" | ")[1:]]
            assert scores == pytest.approx(expected[name], abs=tolerance[name]), row
    best, last = compared(runs)[0].splitlines()[4:6]               # below chance and popularity
    assert best.count("**1.0000**") == 4 and last.count(" 0.0000") == 4
    z = {name: torch.stack([vectors[history].mean(dim=0) for history in test.histories]) for name, vectors in e.items()}
    for name in e:                                                                     # Section 3
        same = (dict.fromkeys(("text", "vision", "fused"), vectors[name]) for vectors in (z, e))
        found = list(vlm2rec.queries(*same, test).values())
        assert found == pytest.approx([expected[name][1]] * 5, abs=tolerance[name])
    shape = {name: vlm2rec.geometry(z[name], e[name], test.targets, test.negatives) for name in e}
    assert shape["perfect"]["A_pos"] < 1e-6 and shape["perfect"]["A_neg"] == pytest.approx(2)   # at right angles
    assert shape["constant"]["A_neg"] < 1e-6 and shape["constant"]["U"] == pytest.approx(0, abs=1e-6)
    assert shape["random"]["S"] == pytest.approx(1, abs=0.1) and shape["random"]["U"] < -3
    for kind in ("sasrec", "gru4rec"):                                                 # Task 2, too short for ids
        samples = vlm2rec.training_samples(domain, 10, 0, 0)
        models = {name: vlm2rec.SequenceRecommender(kind, 120, e[name]) for name in e}
        for model in models.values():
            vlm2rec.train_downstream(model, samples, valid, 0, epochs=2, batch=128)
        found = {name: vlm2rec.hits_and_ndcg(model.rank(test)[0])["N@10"] for name, model in models.items()}
        assert found["perfect"] > 0.95 and found["random"] < 0.3 and found["constant"] < 0.1


def test_an_adapter_of_another_domain_is_evaluated_without_training(finished, home, tmp_path, capsys):
    """On its own domain it has to give what its run gave."""
    with contextlib.chdir(home):
        assert command("--adapter", finished / "adapter", "--out", tmp_path) == 0
        assert command("--adapter", home / "domains", "--out", tmp_path / "none") == 2
        assert "there is no LoRA in it" in capsys.readouterr().err
        shutil.copytree(finished / "adapter", tmp_path / "other")
        weights = safetensors.torch.load_file(tmp_path / "other" / "adapter_model.safetensors")
        wider = {name: torch.zeros(weight.shape[0] + 8, weight.shape[1]) for name, weight in weights.items()}
        safetensors.torch.save_file(wider, tmp_path / "other" / "adapter_model.safetensors", {"format": "pt"})
        assert command("--adapter", tmp_path / "other", "--out", tmp_path / "none") == 2
    error = capsys.readouterr().err.strip()
    assert "does not fit" in error and len(error.splitlines()) == 1
    there, here = (json.loads(path.read_text()) for path in (
        finished / "metrics.json", tmp_path / "sample" / "vlm2rec+zero-shot-seed0" / "metrics.json"))
    assert here["test"] == pytest.approx(there["test"], abs=1e-4)


def test_the_names_of_given_files_are_filled_in_for_each_run():
    configs, _ = vlm2rec.parse_config(shlex.split(
        '--method sft vlm2rec --seed 3 --seeds 2 --adapter "a/{method}-{seed}"'))
    assert [config.adapter for config in configs] == ["a/sft-3", "a/sft-4", "a/vlm2rec-3", "a/vlm2rec-4"]
    configs, _ = vlm2rec.parse_config(shlex.split('--method sasrec gru4rec --embeddings "" "v-{seed}.npy"'))
    assert [(config.method, config.embeddings) for config in configs] == [
        ("sasrec", ""), ("sasrec", "v-0.npy"), ("gru4rec", ""), ("gru4rec", "v-0.npy")]


def test_several_methods_and_seeds_end_in_a_comparison(home, tmp_path, capsys):
    with contextlib.chdir(home):
        assert command("--method", "vanilla", "vlm2rec", "--seeds", 2, "--epochs", 1, "--train-users", 40,
                       "--gradients-every", 2, "--out", tmp_path) == 0
    table = (tmp_path / "sample" / "vanilla-vlm2rec-seed0-1.md").read_text()
    assert table.strip() in capsys.readouterr().out
    for row in ("| chance | 0.0990 |", "| popularity | ", "| untrained | ", "* better than the second with p < .05"):
        assert row in table
    assert "| test, seed0-1 | H@10 |" in table and "vlm2rec against vanilla, N@10 per user" in table
    assert {path.name for path in (tmp_path / "sample").glob("*-seed?")} == {
        f"{method}-seed{seed}" for method in ("vanilla", "vlm2rec") for seed in (0, 1)}
    log = [json.loads(line) for line in (tmp_path / "sample/vlm2rec-seed1/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 4, 5]              # 40 users are five steps; two lines for Fig. 1b
    assert {"step", "cos_text", "cos_vision"} == set(log[0]) == set(log[1])


def test_the_contact_sheet_frames_the_hits(home, finished, tmp_path):
    domain = data.read_domain(home / "domains" / "sample")
    test = vlm2rec.make_evaluation(domain, "test", 10, 0)
    e = torch.eye(len(domain.item_ids))
    green = lambda path: sum(count for count, colour in Image.open(path).getcolors(10**6) if colour == (0, 128, 0))
    vlm2rec.contact_sheet(tmp_path / "hit.png", domain, test, {"fused": e[test.targets]}, {"fused": e})
    vlm2rec.contact_sheet(tmp_path / "miss.png", domain, test, {"fused": -e[test.targets]}, {"fused": e})
    assert green(tmp_path / "hit.png") > 1000 + green(tmp_path / "miss.png")
    vlm2rec.contact_sheet(tmp_path / "text.png", domain, test, *({"text": x, "fused": x} for x in (e[test.targets], e)))
    assert Image.open(tmp_path / "text.png").size == Image.open(tmp_path / "hit.png").size    # the same is shown once
    assert Image.open(finished / "recommendations.png").size == (1160, 600)     # two users side by side


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: exit code 2 and one line that names file, row and fix
# ----------------------------------------------------------------------------------------------------------------------

def edit(name, old, new, count=1):
    """A change of a file of the domain."""
    def change(folder):
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new, count), encoding="utf-8")
    return change


def replace(name, content):
    return lambda folder: (folder / name).write_bytes(content) if content is not None else (folder / name).unlink()


def recode(name, encoding, newline="\n"):
    """A change of a file's encoding, and of the ends of its lines."""
    def change(folder):
        text = (folder / name).read_text(encoding="utf-8").replace("\r\n", "\n").replace("title 4", "tïtle 4")
        (folder / name).write_bytes(text.replace("\n", newline).encode(encoding))
    return change


def draw(mode, size=(30, 30), kind="PNG", name="images/4.png", colour=None, **options):
    """Another picture of item 4, whatever its name says."""
    return lambda folder: Image.new(mode, size, colour or 0).save(folder / name, kind, **options)


def animate(folder):
    Image.new("P", (30, 30)).save(folder / "images/4.png", "GIF", save_all=True,
                                  append_images=[Image.new("P", (30, 30), k) for k in (1, 2)])


def a_folder_instead(folder):
    (folder / "images/4.png").unlink()
    (folder / "images/4.png").mkdir()


PICTURES, LOST = "items without a decodable picture", "interactions with such items"
ITEMS, EVENTS = "items.csv", "interactions.csv"
EVERYONE_BUYS_50 = [[f"u{u}", f"i{k}", k] for u in range(9) for k in range(50)]
INPUTS = {  # what is done to a good domain, and what the error has to name, or what is counted as dropped
    "no items.csv": (replace(ITEMS, None), ["items.csv is missing", "item_id,title,image"]),
    "no interactions.csv": (replace(EVENTS, None), ["interactions.csv is missing"]),
    "empty file": (replace(ITEMS, b""), ["items.csv, line 1: no column item_id", "item_id,title,image"]),
    "a null byte": (edit(EVENTS, "1001", "10\0001"), ["interactions.csv, line 3"]),
    "only a header": (replace(EVENTS, b"user_id,item_id,timestamp\n"), ["nothing is left"]),
    "no column": (edit(ITEMS, "title", "name"), ["items.csv, line 1: no column title"]),
    "no image column": (edit(ITEMS, "image", "picture"), ["items.csv, line 1: no column image"]),
    "no user column": (edit(EVENTS, "user_id", "user"), ["interactions.csv, line 1: no column user_id"]),
    "no timestamp": (edit(EVENTS, "timestamp", "when"), ["interactions.csv, line 1: no column timestamp"]),
    "column twice": (edit(ITEMS, ",image", ",image,title"), ["items.csv, line 1: more than one column title"]),
    "unknown item": (edit(EVENTS, "u0,i5,", "u0,no,"), ["interactions.csv, line 3", "'no' is not"]),
    "no item": (edit(EVENTS, "u0,i5,", "u0,,"), ["interactions.csv, line 3", "'' is not"]),
    "bad timestamp": (edit(EVENTS, "1001", "noon"), ["interactions.csv, line 3: timestamp 'noon'"]),
    "no time": (edit(EVENTS, "1001", ""), ["interactions.csv, line 3: timestamp ''"]),
    "nan timestamp": (edit(EVENTS, "1001", "nan"), ["interactions.csv, line 3: timestamp 'nan'"]),
    "infinite timestamp": (edit(EVENTS, "1001", "1e999"), ["interactions.csv, line 3: timestamp '1e999'"]),
    "huge timestamp": (edit(EVENTS, "1001", "1e300"), {}),
    "negative timestamp": (edit(EVENTS, "1001", "-86400.5"), {}),
    "empty user": (edit(EVENTS, "u0,i5,", ",i5,"), ["interactions.csv, line 3", "user_id is empty"]),
    "odd user": (edit(EVENTS, "u0,", '" u, ""0""\n",', 99), {}),
    "row twice": (edit(EVENTS, "u0,i5,1001", "u0,i5,1001\r\nu0,i5,1001"), {"repeated interactions": 1}),
    "user with one item": (edit(EVENTS, "u0,i5,", "new,i5,"), {"interactions outside the 5-core": 1}),
    "empty item": (edit(ITEMS, "i4,", ","), ["items.csv, line 6", "empty"]),
    "item twice": (edit(ITEMS, "i4,", "i3,"), ["items.csv, line 6", "'i3' is there twice"]),
    "item twice but for spaces": (edit(ITEMS, "i4,", " i3 ,"), ["items.csv, line 6", "'i3' is there twice"]),
    "no title": (edit(ITEMS, "title 4,", "  ,"), {"items without a title": 1, LOST: 6}),
    "title twice": (edit(ITEMS, "title 4,", "title 3,"), {}),
    "odd title": (edit(ITEMS, "title 4,", '"a ""b"", c\n<|image_pad|> \u202e\U0001f600",'), {}),
    "long title": (edit(ITEMS, "title 4,", "long " * 20_000 + ","), {}),
    "endless title": (edit(ITEMS, "title 4,", "long " * 30_000 + ","), ["items.csv, line 6: field larger than"]),
    "no image": (edit(ITEMS, "images/4.png", ""), {PICTURES: 1, LOST: 6}),
    "image twice": (edit(ITEMS, "images/4.png", "images/3.png"), {}),
    "path out": (edit(ITEMS, "images/4.png", "../../4.png"), ["items.csv, line 6", "../../4.png", "copy it"]),
    "absolute path": (edit(ITEMS, "images/4.png", "/etc/passwd"), ["items.csv, line 6", "/etc/passwd"]),
    "endless path": (edit(ITEMS, "images/4.png", "x" * 5000), {PICTURES: 1, LOST: 6}),
    "too few fields": (edit(ITEMS, "i4,title 4,images/4.png", "i4,title 4"), ["items.csv, line 6: 2 fields"]),
    "too many fields": (edit(ITEMS, "title 4,", "title, 4,"), ["items.csv, line 6: 4 fields", "double quotes"]),
    "stray quote": (edit(ITEMS, "title 4,", '"title" 4,'), ["items.csv, line 6"]),
    "open quote": (edit(EVENTS, "u0,i5,", '"u0,i5,'), ["interactions.csv, line"]),
    "latin-1": (recode(ITEMS, "latin-1"), ["items.csv is not UTF-8"]),
    "utf-16": (recode(EVENTS, "utf-16"), ["interactions.csv is not UTF-8"]),
    "BOM": (recode(EVENTS, "utf-8-sig"), {}),
    "CRLF and BOM": (recode(ITEMS, "utf-8-sig", "\r\n"), {}),
    "CR": (recode(ITEMS, "utf-8", "\r"), {}),
    "few items": (lambda folder: write_domain(folder, None, EVERYONE_BUYS_50), ["50 items are too few"]),
    "no core": (lambda folder: write_domain(folder, None, [["u1", "i1", 1]]), ["nothing is left after 5-core"]),
    "picture gone": (replace("images/4.png", None), {PICTURES: 1, LOST: 6}),
    "picture of no bytes": (replace("images/4.png", b""), {PICTURES: 1, LOST: 6}),
    "truncated picture": (replace("images/4.png", picture(kind="PNG")[:60]), {PICTURES: 1, LOST: 6}),
    "picture is a folder": (a_folder_instead, {PICTURES: 1, LOST: 6}),
    "50 megapixels": (draw("1", (10_000, 5_000)), {PICTURES: 1, LOST: 6}),
    "100 megapixels": (draw("1", (10_000, 10_000)), {PICTURES: 1, LOST: 6}),
    "animation": (animate, {}),
    "palette": (draw("P"), {}),
    "CMYK": (draw("CMYK", kind="JPEG"), {}),
    "16 bits": (draw("I;16", colour=40_000), {}),
    "one pixel": (draw("L", (1, 1)), {}),
    "a line of pixels": (draw("L", (5000, 1)), {}),
}


@pytest.mark.parametrize("case", INPUTS)
def test_what_is_valid_works_and_what_is_not_gets_one_clear_line(case, tmp_path, home, capsys):
    folder = write_domain(tmp_path / "shop")
    change, expected = INPUTS[case]
    change(folder)
    before = sorted(folder.rglob("*"))
    code = command("--domain", folder, "--model", "tiny", "--data-dir", home / "domains", "--out", tmp_path / "out",
                   "--method", "vanilla", "--image-size", 28)
    errors = capsys.readouterr().err.strip().splitlines()
    assert sorted(folder.rglob("*")) == before                      # nothing is ever written there
    if isinstance(expected, dict):
        dropped = {reason: count for reason, count in data.read_domain(folder).dropped.items() if count}
        assert (code, errors, dropped) == (0, [], expected)
    else:
        assert code == 2 and not (tmp_path / "out").exists()        # nothing half written
        assert len(errors) == 1 and errors[0].startswith("error: ")
        assert all(part in errors[0] for part in expected), errors


def damage(folder, rng):
    """Flip, cut, swap or repeat some bytes of one of the domain's files."""
    path = rng.choice([folder / ITEMS, folder / EVENTS, rng.choice(sorted((folder / "images").iterdir()))])
    content, (i, j) = bytearray(path.read_bytes()), (0, 0)
    i, j = sorted(rng.sample(range(len(content)), 2))
    kind = rng.choice(["flip", "flip many", "cut", "swap", "repeat", "zero"])
    if kind.startswith("flip"):
        for k in [i] if kind == "flip" else rng.sample(range(len(content)), min(20, len(content))):
            content[k] ^= 1 << rng.randrange(8)
    else:
        content = {"cut": content[:i], "swap": content[j:] + content[i:j] + content[:i], "zero": content[:i] + bytes(9),
                   "repeat": content[:j] + content[i:]}[kind]
    path.write_bytes(content)
    return f"{kind} {i} {j} of {path.name}"


def test_randomly_damaged_files_get_an_error_or_a_score(tmp_path, home, capsys):
    """Never a traceback, never a hang. MUTATIONS in the environment asks for more of them."""
    for number in range(int(os.environ.get("MUTATIONS", 20))):
        folder = tmp_path / "shop"
        write_domain(folder)
        said, began = damage(folder, random.Random(number)), time.monotonic()
        code = command("--domain", folder, "--model", "tiny", "--data-dir", home / "domains", "--out", tmp_path / "out",
                       "--method", "vanilla", "--image-size", 28, "--restart")
        out, err = capsys.readouterr()
        assert code in (0, 2) and time.monotonic() - began < 30, said
        if code:
            assert len(err.strip().splitlines()) == 1 and str(folder) in err or "shop:" in err, (said, err)
        else:
            assert "dropped: " in out and "| vanilla |" in out, said
        shutil.rmtree(folder)


@pytest.mark.parametrize("flags, expected", [
    (["--domain", "nowhere", "--model", "tiny"], "domains/nowhere/items.csv is missing"),
    (["--seed", "-1"], "--seed -1: it has to be at least 0"),
    (["--epochs", "99999999999"], "--epochs 99999999999: it has to be at least 1 and at most"),
    (["--lam", "inf"], "--lam inf: it has to be at least 0 and at most"),
    (["--tau", "nan"], "--tau nan: it has to be"),
    (["--image-size", "10024"], "--image-size 10024: it has to be at least 28 and at most 1120"),
    (["--model", "./nope"], "--model ./nope: there is no such folder"),
    (["--domain", "sampel"], "did you mean sample?"),
    (["--domain", "beauty", "--model", "tiny", "--mirror", "http://["], "--mirror http://["),
    (["--model", "./mute"], "--model ./mute cannot be loaded: its tokenizer has no end token"),
    (["--domain", "./nowhere", "--model", "tiny"], "nowhere is no folder"),
    (["--model", "nobody/nothing"], "--model nobody/nothing cannot be loaded"),
    (["--model", "./bert"], "--model ./bert is of the family bert"),
    (["--model", "./weightless"], "--model ./weightless cannot be loaded"),
    (["--model", "./mute-too"], "--model ./mute-too cannot be loaded: "),
    (["--model", "./blind"], "--model ./blind cannot be loaded: Can't load image processor"),
    (["--model", "./runs/sample/vlm2rec-seed0/adapter"], "vlm2rec-seed0/adapter is of the family unknown; these fit: "),
    (["--model", "./half"], "--model ./half cannot be loaded: its weights lack 30, such as visual.blocks.0."),
    (["--batch", "1"], "--batch 1: it has to be at least 2"),
    (["--batch", "999"], "222 users to train on, less than one --batch of 999"),
    (["--train-users", "7"], "7 users to train on, less than one --batch of 8"),
    (["--method", "sft", "--embeddings", "x.npy"], "--embeddings is for sasrec, gru4rec and mean-pool"),
    (["--method", "sasrec", "--adapter", "x"], "--adapter is for a method that trains one"),
    (["--method", "vanilla", "--adapter", "x"], "--adapter is for a method that trains one"),
    (["--method", "mean-pool"], "needs item vectors"),
    (["--seeds", "0"], "--seeds 0: it has to be at least 1"),
    (["--image-size", "100"], "--image-size 100"),
    (["--lr", "inf"], "--lr inf: it has to be at least 1e-12 and at most 1e+30"),
    (["--tau", "0"], "--tau"),
    pytest.param(["--device", "cuda"], "torch sees no CUDA GPU",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")),
])
def test_a_bad_flag_gets_one_clear_line(flags, expected, home, finished, tmp_path, capsys):
    with contextlib.chdir(home):
        Path("bert").mkdir(exist_ok=True)
        Path("bert/config.json").write_text('{"model_type": "bert"}')
        for name in ("weightless", "half"):
            Path(name).mkdir(exist_ok=True)
            for path in Path("domains/tiny-qwen2.5-vl").glob("*.json"):
                Path(name, path.name).write_bytes(path.read_bytes())
        shutil.copytree("domains/tiny-qwen2.5-vl", "mute", dirs_exist_ok=True)
        for name, missing in (("mute-too", "tokenizer*"), ("blind", "*processor*")):
            shutil.copytree("domains/tiny-qwen2.5-vl", name, dirs_exist_ok=True)
            for path in Path(name).glob(missing):
                path.unlink()
        tokenizer = json.loads(Path("mute/tokenizer_config.json").read_text())
        Path("mute/tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": None}))
        weights = safetensors.torch.load_file("domains/tiny-qwen2.5-vl/model.safetensors")
        weights = {name: weight for name, weight in weights.items() if "visual" not in name}
        safetensors.torch.save_file(weights, "half/model.safetensors", {"format": "pt"})
        assert command(*flags, "--out", tmp_path / "out") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and expected in errors[0], errors
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))


def test_help_explains_each_flag_and_what_the_downstream_models_ignore(capsys):
    with pytest.raises(SystemExit):
        command("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert all(field.metadata["help"][:30] in text for field in vlm2rec.dataclasses.fields(vlm2rec.Config))
    assert "tiny brings --lr 0.001, --image-size 56" in text
    assert "mean-pool ignore the flags for encoder and training but --history and --train-users" in text


# ----------------------------------------------------------------------------------------------------------------------
# The README
# ----------------------------------------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")


def test_the_readmes_five_lines_rank_the_catalogue_for_a_new_history(finished, home, monkeypatch, capsys):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "load_adapter" in block)
    monkeypatch.chdir(home)
    exec(code, {})
    domain = data.read_domain("domains/sample")
    titles = capsys.readouterr().out.strip().splitlines()[-5:]
    assert len(titles) == 5 and set(titles) <= set(domain.titles)
    assert not {domain.titles[item] for item in (5, 17, 42)} & set(titles)     # what the user has is not recommended


def test_the_readmes_catalogue_of_ones_own_is_a_domain(tmp_path, monkeypatch):
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "my-shop" in block)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    domain = data.read_domain("my-shop")
    assert len(domain.item_ids) == 150 and len(domain.user_ids) == 300 and not domain.dropped_items


def test_the_readmes_recipe_for_bert_and_clip(home, tmp_path, monkeypatch):
    """On tiny random models; each vector is that of its item alone."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "bert-base" in block)
    assert len(code.splitlines()) <= 12
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "domains" / "tiny-qwen2.5-vl")
    tokenizer.model_input_names, end = ["input_ids", "attention_mask"], tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", end)])
    small = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=2, initializer_range=0.2)
    eyes = small | {"image_size": 56, "patch_size": 14}
    monkeypatch.chdir(tmp_path)
    bert = transformers.BertModel(transformers.BertConfig(**small)).eval()
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=small | {"eos_token_id": end}, vision_config=eyes,
                                                          projection_dim=32)).eval()
    for model, folder in ((bert, "google-bert/bert-base-uncased"), (clip, "openai/clip-vit-base-patch32")):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    module = importlib.import_module("transformers.models.clip.image_processing_pil_clip")
    processor = module.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor.save_pretrained("openai/clip-vit-base-patch32")
    shutil.copytree(home / "domains" / "sample", "domains/toys")
    exec(code, {})

    domain, item = data.read_domain("domains/toys"), 70
    words = tokenizer(domain.titles[item], return_tensors="pt")
    with torch.no_grad():
        both = clip(**words, **processor(data.load_picture(domain.pictures[item]), return_tensors="pt"))
        expected = {"bert": bert(**words).last_hidden_state[0, 0], "clip": (both.text_embeds + both.image_embeds)[0]}
    for name, vector in expected.items():
        assert (safetensors.torch.load_file(f"{name}.safetensors")["fused"][item] - vector).abs().max() < 1e-5
    assert command("--domain", "./domains/toys", "--method", "mean-pool", "sasrec", "--train-users", "40",
                   "--embeddings", "bert.safetensors", "clip.safetensors") == 0
    assert {path.name for path in Path("runs/toys").glob("*-seed0")} == {
        f"{method}+{name}-seed0" for method in ("mean-pool", "sasrec") for name in ("bert", "clip")}


def test_the_readmes_commands_and_names_exist():
    commands = re.findall(r"python vlm2rec\.py (--[^#\n`|;]*)", README)
    reproduce = re.search(r"## Reproduce the paper.*?## ", README, re.S)[0]
    commands += ["--domain toys " + flags for flags in re.findall(r"^\|[^|]*\| `(--[^`]*)`", reproduce, re.M)]
    assert len(commands) > 12
    for line in (re.sub(r"\$\w+", "1", command) for command in commands):
        if "--help" not in line:
            vlm2rec.parse_config(shlex.split(line))
    table = re.search(r"\| in the paper .*?\n\n", README, re.S)[0]
    for name in re.findall(r"`(\w+)`", table):
        assert name in globals() if name.startswith("test_") else hasattr(vlm2rec, name), name
    assert not re.search(r"@[A-Z]+@", README + vlm2rec.__doc__)                # a place that was to be filled in
    flags = {"--" + field.replace("_", "-") for field in vlm2rec.Config.__dataclass_fields__}
    assert set(re.findall(r"--[a-z][a-z-]+", README)) - {"--help", "--version", "--seeds", "--recommend"} <= flags
