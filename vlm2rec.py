# SPDX-License-Identifier: MIT
"""VLM2Rec (arXiv 2603.17450): a vision-language model as embedder for sequential recommendation.

A user's history is encoded twice, as titles and as pictures, and so is every item; the last
token's state is the embedding, and the two modalities are added. Fine-tuning that sum on clicks
alone lets one modality collapse. VLM2Rec weighs a user's negatives more, the further one modality
lags behind, and keeps both modalities' neighbourhoods alike.

    python vlm2rec.py --domain sample    # CPU, no download, about a minute
    python vlm2rec.py --domain toys      # the paper: Qwen2.5-VL-3B, LoRA, one CUDA GPU

Task 1 ranks items by the cosine of their embeddings with a history's. In Task 2 the items'
embeddings are the input of another recommender, SASRec or GRU4Rec. Protocol, leave-one-out:
    target      test: a user's last item; validation: the one before; training: the one before
                that alone (Task 2: the items of its history too)
    history     the latest 10 items before the target
    negatives   training: the batch's other targets, except what the user has by then;
                evaluation: 100 items outside the user's sequence, by seed, split and user

A training step makes four forward passes: histories and targets, each as text and as pictures.
Validation chooses the epoch; the test split is scored once, after training.

Glossary, code -> paper:
    z, e          z_u, e_i: embeddings of histories, of items; dicts "text", "vision", "fused"
    sim, mask     s(z_u, e_j) of a batch's users and targets; N_u: which are negatives for whom
    gap, weight   Delta_u,gap and w_u,pen
    tau           tau and tau_WPCL; tau_crtr: tau_CRTR; lam: lambda
    shapes        B users of a batch, U of a ranking; n histories of a call; N items, C candidates
                  of a user; L tokens of a prompt, P of a picture; D width of an embedding
"""
import argparse
import contextlib
import copy
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import sys
import textwrap
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy
import peft
import safetensors
import torch
import transformers
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import data
from data import Domain, InputError

PAPERS_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
TITLE_TOKENS = 64  # a longer title is cut; the paper does not say
VALIDATION_USERS = 2000  # at most so many are scored after each epoch; the paper does not say
PASS_TOKENS = {"cpu": 1024, "cuda": 8192}  # at most, with padding, in a pass while embedding
bar = functools.partial(tqdm, leave=False, disable=None)  # none where stderr is a file

# ---- Settings (Section 5.1.1) ----

class Method(NamedTuple):
    """What --method chooses; a row of METHODS says only what the method has."""
    modalities: tuple = ()  # encoded one by one, then added; none: Task 2
    trains: bool = True
    loss: dict = {}         # switches of `objective`; the paper's where none is given
    more: tuple = ()        # terms of the loss that are not the paper's: MORE_TERMS

BOTH = ("text", "vision")
SFT = {"weighted": False, "topology": False}  # Eq. 3
METHODS = {
    "vlm2rec": Method(BOTH),
    "sft": Method(BOTH, loss=SFT),
    "vanilla": Method(BOTH, trains=False),
    "text": Method(("text",), loss=SFT),
    "vision": Method(("vision",), loss=SFT),
    "internal": Method(("interleaved",), loss=SFT),  # both in one prompt
    "internal-vanilla": Method(("interleaved",), trains=False),
    "no-wpcl": Method(BOTH, loss={"contrast": False}),  # these four: Table 5
    "no-penalty": Method(BOTH, loss={"weighted": False}),
    "no-stopgrad": Method(BOTH, loss={"stop_gradient": False}),
    "no-crtr": Method(BOTH, loss={"topology": False}),
    "no-gap": Method(BOTH, loss={"gap": False}),  # controls that the paper lacks
    "unimodal": Method(BOTH, loss=SFT, more=("unimodal",)),
    "vlm2rec+unimodal": Method(BOTH, more=("unimodal",)),
    "sda": Method(BOTH, loss=SFT, more=("cmsa",)),  # another system's answer
    "sasrec": Method(), "gru4rec": Method(),
    "mean-pool": Method(trains=False),
}

def setting(default, help, **flag):
    """A field of Config; `help` and `flag` are argparse's, for `parse_config`."""
    shown = f"{help} ({default})" if default not in (None, "") else help
    return field(default=default, metadata={"help": shown, **flag})

@dataclass
class Config:
    """A run's settings, the paper's unless a line says otherwise; None depends: see `complete`."""
    domain: str = setting("sample", "a path or, under --data-dir, also " + ", ".join(data.KNOWN))
    method: str = setting("vlm2rec", ", ".join(METHODS), nargs="+", choices=METHODS, metavar="NAME")
    model: str = setting(None, f"hub name or folder; sample: tiny; else {PAPERS_MODEL}")
    revision: str = setting("main", "branch, tag or commit of a model on the hub")
    adapter: str = setting("", "folder of an adapter to evaluate instead of training (Table 6)")
    embeddings: str = setting("", "vectors in place of item ids: .safetensors, .npy", nargs="+")
    seed: int = setting(0, "of LoRA, dropout, the users' order, the negatives")
    device: str = setting("auto", "auto: CUDA if it is there", choices=["auto", "cuda", "cpu"])
    data_dir: str = setting("domains", "where the domains lie")
    out: str = setting("runs", "results go to OUT/DOMAIN/METHOD-seedSEED")
    epochs: int = setting(3, "the best on validation is kept")
    batch: int = setting(8, "users in a step (B)")
    history: int = setting(10, "latest items of a user in the prompt")
    image_size: int = setting(None, "side of a picture in pixels; tiny: 56; else 168, ours")
    lr: float = setting(None, "AdamW's, constant, no decay; tiny: 1e-3; else 1e-5")
    alpha: float = setting(1.0, "its start, ours: nearly even weights; 5 lifts vision, costs text")
    penalty_lr: float = setting(1e-5, "AdamW's for alpha and beta; 0: frozen")
    tau: float = setting(0.1, "temperature of the contrastive loss; paper: .05, .1, .5 or 1")
    tau_crtr: float = setting(1.0, "and of the topology loss; paper: .001, .01, .1 or 1")
    lam: float = setting(0.5, "weight of the topology loss; paper: .1, .5 or 1")
    lora_rank: int = setting(16, "rank of LoRA")
    lora_alpha: int = setting(32, "LoRA's update is multiplied by alpha / rank")
    lora_dropout: float = setting(0.2, "dropout in front of LoRA")
    checkpointing: str = setting(None, "of activations; tiny: off; else on", choices=["on", "off"])
    train_users: int = setting(None, "train on so many users (Table 7); else all")
    log_every: int = setting(50, "steps between two lines of the log")
    save_every: int = setting(200, "steps between two checkpoints")

    def __post_init__(self):
        complete(self)

# ---- Prompts and encoder (Section 2.2) ----

def pad(rows, value):
    """(B, L) from B lists, padded on the right."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)

def passes_by_length(lengths, tokens):
    """The indices of prompts, similar lengths together, in passes of at most so many tokens."""
    rows = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    passes = []
    while rows:
        size = max(1, tokens // lengths[rows[0]])  # the first is the longest
        passes.append(rows[:size])
        rows = rows[size:]
    return passes

def picture_inputs(vlm, features, ids):
    """What a pass takes in place of pixels: the tower's features (n, levels, P, D) of n pictures,
    which transformers puts where ids (B, L) have the pictures' tokens, in order."""
    device = vlm.get_decoder().device
    first, *deep = features.to(device).unbind(dim=1)  # (n, P, D) each
    if vlm.config.model_type not in ("internvl", "gemma3"):  # these take a tensor, not a tuple
        first = first.unbind()
    output = SimpleNamespace(
        pooler_output=first, deepstack_features=[level.unbind() for level in deep])
    inputs = {"mm_encoder_outputs": {"image": output}}
    is_picture = (ids == vlm.config.image_token_id).int()  # (B, L)
    if vlm.config.model_type == "gemma3":  # a picture's tokens see each other
        inputs["token_type_ids"] = is_picture.to(device)
    if hasattr(vlm, "get_rope_index"):  # Qwen's positions in time, height and width
        side = vlm.config.vision_config.spatial_merge_size * math.isqrt(features.shape[2])
        grid = torch.tensor([[1, side, side]] * len(features))  # in patches
        positions, _ = vlm.get_rope_index(ids, is_picture, grid)  # (3, B, L), on the CPU
        inputs["position_ids"] = positions.to(device)
    return inputs

class Encoder:
    """Phi of Eq. 1: histories in one modality in, the last tokens' states out.
    The prompts P_T and P_V are the titles or the pictures in order, a newline between two, and one
    closing token; an item is a history of one. Our copy of the paper lacks its template. Only LoRA
    learns. Vision tower and projector are frozen, so what they make of the items' pictures, the
    features (N, levels, P, D), is computed once; Qwen3-VL's DeepStack has several levels."""
    def __init__(self, vlm, tokenizer, titles, features):
        self.vlm = vlm
        self.features = features
        self.device = vlm.get_decoder().device
        plain = {"add_special_tokens": False, "split_special_tokens": True}  # "<|im_end|>" is text
        self.titles = tokenizer(titles, truncation=True, max_length=TITLE_TOKENS, **plain).input_ids
        self.newline = tokenizer("\n", **plain).input_ids
        marks = list(AROUND_A_PICTURE.get(vlm.config.model_type, ("", "")))
        before, after = tokenizer(marks, add_special_tokens=False).input_ids
        image = [getattr(vlm.config, "image_token_id", None)] * features.shape[2]
        self.picture = before + image + after
        self.opening = [id for id in tokenizer("").input_ids if id == tokenizer.bos_token_id]
        self.closing = [tokenizer.eos_token_id]

    def prompt(self, history, modality):
        """Token ids of a history as text, vision or interleaved (title, picture, title, ...)."""
        ids = list(self.opening)
        for place, item in enumerate(history):
            if place > 0:
                ids += self.newline
            if modality == "text":
                ids += self.titles[item]
            elif modality == "vision":
                ids += self.picture
            else:
                ids += self.titles[item] + self.newline + self.picture
        return ids + self.closing

    def __call__(self, histories, modality):
        """One forward pass: embeddings (B, D), float32, of B histories."""
        prompts = [self.prompt(history, modality) for history in histories]
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])  # (B,)
        ids = pad(prompts, 0)  # (B, L)
        pictures = {}
        if modality != "text":
            items = [item for history in histories for item in history]
            pictures = picture_inputs(self.vlm, self.features[items], ids)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            # Padding is on the right and attention is causal: no token that counts sees it.
            output = self.vlm(input_ids=ids.to(self.device), use_cache=False, **pictures)
        return last_token(output.last_hidden_state, last.to(self.device))

    @torch.no_grad()
    def embed(self, histories, modalities):
        """Embeddings (n, D) of n histories in each modality and fused (Eq. 2), on the CPU."""
        self.vlm.eval()
        parts = {}
        for modality in modalities:
            lengths = [len(self.prompt(history, modality)) for history in histories]
            check_context(self.vlm, max(lengths))
            passes = passes_by_length(lengths, PASS_TOKENS[self.device.type])
            states = [self([histories[row] for row in rows], modality)
                      for rows in bar(passes, f"embed {modality}")]
            order = torch.tensor([row for rows in passes for row in rows])
            parts[modality] = torch.cat(states).cpu()[order.argsort()]  # (n, D)
        return fuse(parts)

def last_token(states, last):
    """The state of each prompt's last token (Eq. 1): (B, D) from (B, L, D) and the places (B,)."""
    return states[torch.arange(len(last), device=states.device), last].float()

def fuse(parts):
    """z = z_T + z_V (Eq. 2), or the one modality there is, as "fused"."""
    return {**parts, "fused": sum(parts.values())}

# ---- Losses (Sections 2.4, 4.2): pure functions of tensors, which need nothing but torch ----
# sim (B, B) is s(z_u, e_j) with the positives on its diagonal, mask (B, B) marks the negatives.
# Any two modalities do, say text and sound, as long as histories and targets both have both.

def cosine(z, e):
    """s(z, e): the cosine of every row of z (n, D) with every row of e (m, D): (n, m)."""
    exact = torch.promote_types(z.dtype, torch.float32)  # in bfloat16 many would tie
    z = torch.nn.functional.normalize(z.to(exact), dim=-1)
    e = torch.nn.functional.normalize(e.to(exact), dim=-1)
    return z @ e.T

def negative_mask(targets, earlier):
    """N_u as a mask (B, B): which of the batch's targets (B,) are negatives for which user.
    The paper does not say. We leave out what the user has by then: the target itself, and all items
    before it (`earlier`). Later ones stay in: training must not know them."""
    mask = targets[:, None] != targets[None, :]
    for user, items in enumerate(earlier):
        mask[user] &= ~torch.isin(targets, torch.tensor(items, dtype=targets.dtype))
    return mask

def weighted_info_nce(sim, mask, weight, tau):
    """L_WPCL (Eq. 10) or, with weights (B,) of 1, L_SFT (Eq. 3): the mean over the batch of

        -log( exp(s+ / tau) / (exp(s+ / tau) + w * sum over negatives of exp(s- / tau)) )

    a cross-entropy, since w * exp(x) = exp(x + log w). A user without a negative adds 0."""
    positive = torch.eye(len(sim), dtype=torch.bool, device=sim.device)  # (B, B)
    logits = sim / tau
    logits = torch.where(positive, logits, logits + weight.log()[:, None])
    logits = logits.masked_fill(~mask & ~positive, -torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(sim), device=sim.device))

def discriminative_margin(sim, mask):
    """M_u,m (Eq. 6): the target's similarity above the negatives' mean: (B,); 0 without any."""
    count = mask.sum(dim=1)  # (B,)
    mean = (sim * mask).sum(dim=1) / count.clamp(min=1)
    return torch.where(count > 0, sim.diagonal() - mean, 0.0)

def modality_gap(margin_text, margin_vision, stop_gradient=True):
    """Delta_u,gap = sg[M_strong] - M_weak (Eqs. 7, 8): (B,), at least 0, of margins (B,).
    Weak is the modality of the smaller margin, for each user in each step. The stop-gradient leaves
    the loss one way to close the gap: raise the weak margin, not lower the strong one."""
    strong = torch.maximum(margin_text, margin_vision)
    weak = torch.minimum(margin_text, margin_vision)
    if stop_gradient:
        strong = strong.detach()
    return strong - weak

def penalty_weight(gap, alpha, beta):
    """w_u,pen = 1 + beta * softplus(alpha * gap) (Eq. 9): (B,); 1 + beta log 2 in balance."""
    return 1 + beta * torch.nn.functional.softplus(alpha * gap)

def kl_divergence(log_p, log_q):
    """KL(P || Q) of rows of log-probabilities (B, C), the mean over the B rows."""
    return ((log_p - log_q) * log_p.exp()).sum() / len(log_p)

def relational_topology(sim_text, sim_vision, tau):
    """L_CRTR (Eqs. 11-13): the mean over the batch of (KL(P_T || P_V) + KL(P_V || P_T)) / 2.
    P_m is the softmax of a user's row of sim_m / tau: how the user ranks all of the batch's targets
    within one modality. It does not ask that a title lie near its picture: the spaces may stay
    apart, only their neighbourhoods agree. Two constant spaces agree too: README, "shortcut"."""
    log_p_text = (sim_text / tau).log_softmax(dim=1)  # (B, B)
    log_p_vision = (sim_vision / tau).log_softmax(dim=1)
    return (kl_divergence(log_p_text, log_p_vision) + kl_divergence(log_p_vision, log_p_text)) / 2

def objective(sim, sim_text, sim_vision, mask, alpha, beta, tau=0.1, tau_crtr=1.0, lam=0.5,
              contrast=True, weighted=True, topology=True, stop_gradient=True, gap=True):
    """L = L_WPCL + lam * L_CRTR (Eq. 14): {"loss": ..., and its terms}, all scalars.
    sim, sim_text, sim_vision (B, B) are s(z_u, e_j) of the fused embeddings and of each modality's.
    Switches leave out a part: contrast L_WPCL, weighted its weights, topology L_CRTR; without gap
    every user has the batch's mean weight, a number: as much pressure, blind to the gap."""
    loss = 0.0
    terms = {}
    weight = torch.ones_like(sim[0])  # (B,)
    if contrast and weighted:
        margin_text = discriminative_margin(sim_text, mask)  # (B,)
        margin_vision = discriminative_margin(sim_vision, mask)
        difference = modality_gap(margin_text, margin_vision, stop_gradient)
        weight = penalty_weight(difference, alpha, beta)
        if not gap:
            weight = weight.mean().detach().expand_as(weight)
        terms = {"gap": difference.mean(), "weight": weight.mean(), "alpha": alpha, "beta": beta}
    if contrast:
        loss = weighted_info_nce(sim, mask, weight, tau)
        terms["wpcl" if weighted else "infonce"] = loss
    if topology:
        terms["crtr"] = relational_topology(sim_text, sim_vision, tau_crtr)
        loss = loss + lam * terms["crtr"]
    return {"loss": loss, **terms}

class Penalty(nn.Module):
    """The learnable alpha and beta of Eq. 9, positive through softplus; beta starts at 1.
    At alpha 1 the weights are nearly even, 1.7 to 2.1. Both can only fall: a user's loss is
    log(1 + w R), R = sum exp(s- / tau) / exp(s+ / tau), which grows with w, and w with both. A high
    learning rate would switch the method off; so they have their own, the paper's 1e-5."""
    def __init__(self, alpha=1.0):
        super().__init__()
        self.raw = nn.Parameter(torch.tensor([alpha, 1.0]).expm1().log())  # before the softplus

    def forward(self):
        return torch.nn.functional.softplus(self.raw).unbind()

# ---- Evaluation (Section 5.1.3): leave-one-out, 100 negatives ----

def leave_one_out(sequence, split, length=10):
    """(the latest `length` items before the target, the target, all items before it)."""
    place = len(sequence) - {"test": 1, "valid": 2, "train": 3}[split]
    earlier = sequence[:place]
    return earlier[-length:], sequence[place], earlier

def draw_negatives(user_id, sequence, items, split, seed):
    """100 of `items` items that the user never had, uniform; the same whatever the method."""
    own = set(sequence)
    rng = random.Random(f"{seed} {split} {user_id}")
    drawn = rng.sample(range(items), data.NEGATIVES + len(own))
    return [item for item in drawn if item not in own][:data.NEGATIVES]

class Evaluation(NamedTuple):
    """Histories, targets and candidates of a split's U users, the same for every method."""
    histories: list[list[int]]
    targets: torch.Tensor       # (U,)
    negatives: torch.Tensor     # (U, 100)
    sequences: list[list[int]]  # whole

def make_evaluation(domain, split, length, seed):
    """All users for "test", at most 2,000 for "valid"; histories of the latest `length` items."""
    users = range(len(domain.user_ids))
    if split == "valid" and len(users) > VALIDATION_USERS:
        users = sorted(random.Random(f"{seed} validation users").sample(users, VALIDATION_USERS))
    sequences = [domain.sequences[user] for user in users]
    histories, targets, _ = zip(*[leave_one_out(own, split, length) for own in sequences])
    negatives = [draw_negatives(domain.user_ids[user], own, len(domain.item_ids), split, seed)
                 for user, own in zip(users, sequences)]
    return Evaluation(histories, torch.tensor(targets), torch.tensor(negatives), sequences)

def target_rank(target, others):
    """The target's rank (U,), 1 is best, from its score (U,) and those of the others (U, C).
    A tie counts half: a constant score gets rank 51 of 101, no hit. Others at -inf are left out.
    Raises FloatingPointError if a score is not finite."""
    if not (target.isfinite().all() and (others < torch.inf).all()):
        raise FloatingPointError("a score is not finite: lower --lr or raise --tau")
    above = (others > target[:, None]).sum(dim=1)
    tied = (others == target[:, None]).sum(dim=1)
    return 1 + above + tied.double() / 2

def hits_and_ndcg(ranks):
    """H@k and N@k, k = 10, 20. With one target the ideal DCG is 1: NDCG is 1 / log2(1 + rank)."""
    scores = {}
    for k in (10, 20):
        hit = (ranks <= k).double()
        scores[f"H@{k}"] = hit.mean().item()
        scores[f"N@{k}"] = (hit / (1 + ranks.double()).log2()).mean().item()
    return scores

def evaluate(z, e, cases, score=cosine, full=False):
    """Ranks (U,) of the targets, by score(z, e) of z (U, D) and e (N, D), among their 100
    negatives or, in full, among all items outside the user's sequence."""
    ranks = []
    for users in torch.arange(len(z)).split(1024):
        scores = score(z[users], e)  # (1024, N)
        target = scores.gather(1, cases.targets[users, None]).squeeze(1)
        if full:
            others = scores
            for row, user in enumerate(users.tolist()):
                others[row, cases.sequences[user]] = -torch.inf
        else:
            others = scores.gather(1, cases.negatives[users])
        ranks.append(target_rank(target, others))
    return torch.cat(ranks)

# ---- Training (Sections 4.2.3, 5.1.1) ----

class VLM2Rec(nn.Module):
    """The method. Its state is LoRA, alpha and beta: the encoder, no Module, stays out."""
    score = staticmethod(cosine)
    def __init__(self, encoder, config):
        super().__init__()
        self.encoder = encoder
        self.config = config
        self.method = METHODS[config.method]
        self.lora = nn.ParameterList(w for w in encoder.vlm.parameters() if w.requires_grad)
        self.penalty = Penalty(config.alpha).to(encoder.device)
        self.groups = [{"params": self.lora, "lr": config.lr},
                       {"params": self.penalty.parameters(), "lr": config.penalty_lr}]
        self.batch = config.batch
        self.epochs = config.epochs
        self.patience = math.inf

    def forward(self, batch):
        """A step's four forward passes, histories and targets in each modality: z and e, (B, D) in
        each space, and the mask of the negatives (B, B)."""
        self.encoder.vlm.train()
        histories, targets, earlier = zip(*batch)
        items = [[target] for target in targets]
        modalities = self.method.modalities
        z = fuse({modality: self.encoder(histories, modality) for modality in modalities})
        e = fuse({modality: self.encoder(items, modality) for modality in modalities})
        return z, e, negative_mask(torch.tensor(targets), earlier).to(self.encoder.device)

    def terms(self, batch):
        """A step's loss and its terms."""
        z, e, mask = self(batch)
        alpha, beta = self.penalty()
        config = self.config
        sim = {space: cosine(z[space], e[space]) for space in z}  # (B, B) each
        terms = objective(sim["fused"], sim.get("text"), sim.get("vision"), mask, alpha, beta,
                          config.tau, config.tau_crtr, config.lam, **self.method.loss)
        for name in self.method.more:  # not the paper's
            terms[name] = MORE_TERMS[name](sim, e, mask, config.tau)
            terms["loss"] = terms["loss"] + config.lam * terms[name]
        return terms

    def embed(self, histories):
        """z of n histories and e of the catalogue: (n, D) and (N, D) in each space."""
        catalogue = [[item] for item in range(len(self.encoder.titles))]
        return (self.encoder.embed(histories, self.method.modalities),
                self.encoder.embed(catalogue, self.method.modalities))

def validate(model, valid, batch=None):
    """H@k, N@k and, with two modalities, Fig. 1a's figures and Fig. 1b's, always on one batch."""
    z, e = model.embed(valid.histories)
    scores = hits_and_ndcg(evaluate(z["fused"], e["fused"], valid, model.score))
    if set(BOTH) <= set(z):
        scores |= queries(z, e, valid) | gradient_cosines(model, batch)
    print("validation:", ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    return scores

def train(model, domain, valid, config, folder):
    """Train a model, from the checkpoint in `folder` on if there is one; leave it as it was after
    the best epoch on validation, 0 (untrained) included. Returns each epoch's scores, the best."""
    users = domain.sequences
    if config.train_users:
        users = random.Random(f"{config.seed} train users").sample(users, config.train_users)
    samples = [leave_one_out(sequence, "train", config.history) for sequence in users]
    steps = len(samples) // model.batch  # in an epoch, without its incomplete batch
    optimizer = torch.optim.AdamW(model.groups, weight_decay=0.0, fused=True)
    progress = load_checkpoint(folder, model, optimizer)
    if not progress:
        scores = validate(model, valid, samples[:model.batch])
        progress = {"step": 0, "epoch": 0, "seconds": 0.0, "scores": [scores], "best": 0,
                    "kept": copy.deepcopy(model.state_dict())}
    trim_log(folder, progress["step"])
    for epoch in range(progress["epoch"] + 1, model.epochs + 1):
        if epoch > progress["best"] + model.patience:
            break
        shuffle = torch.Generator().manual_seed(config.seed * 1000 + epoch)
        order = torch.randperm(len(samples), generator=shuffle).split(model.batch)
        for step in range(progress["step"] + 1, epoch * steps + 1):
            batch = [samples[user] for user in order[(step - 1) % steps]]
            start = time.perf_counter()
            torch.manual_seed(config.seed * 1_000_000 + step)  # dropout, also of a resumed run
            terms = model.terms(batch)
            terms["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            progress["step"] = step
            progress["seconds"] += time.perf_counter() - start
            left = model.epochs * steps - step
            if step % config.log_every == 0 and step < epoch * steps:
                log_step(folder, step, left, terms, progress["seconds"])
            if step % config.save_every == 0 and step < epoch * steps:
                save_checkpoint(folder, model, optimizer, progress)
        scores = validate(model, valid, samples[:model.batch])
        log_step(folder, step, left, terms, progress["seconds"], {"epoch": epoch, **scores})
        if scores["N@10"] > progress["scores"][progress["best"]]["N@10"]:
            progress |= {"best": epoch, "kept": copy.deepcopy(model.state_dict())}
        progress |= {"epoch": epoch, "scores": [*progress["scores"], scores]}
        save_checkpoint(folder, model, optimizer, progress)
    model.load_state_dict(progress["kept"])
    return progress["scores"], progress["best"]

# ---- The method ends here. What follows runs it; `add_lora` says which weights are trained. ----

def complete(config):
    """Fill in what depends on other settings; InputError for what is out of range or not read."""
    if config.model is None:
        config.model = "tiny" if config.domain == "sample" else PAPERS_MODEL
    depends = {"lr": 1e-5, "image_size": 168, "checkpointing": "on"}
    if config.model == "tiny":  # random weights need a larger rate, and no large pictures
        depends = {"lr": 1e-3, "image_size": 56, "checkpointing": "off"}
    for name, value in depends.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    least = {"seed": 0, "lr": 1e-30, "alpha": 1e-6, "penalty_lr": 0, "tau": 1e-6, "tau_crtr": 1e-6,
             "lam": 0, "lora_dropout": 0, "batch": 2}  # of all others 1
    for name, value in asdict(config).items():
        below = 1 if name == "lora_dropout" else 2**31
        if isinstance(value, (int, float)) and not least.get(name, 1) <= value < below:
            raise InputError(f"--{name.replace('_', '-')} {value}: out of range")
    unread = config.embeddings if METHODS[config.method].modalities else config.adapter
    if unread:
        raise InputError(f"--method {config.method} does not read {unread}")
    if config.method == "mean-pool" and not config.embeddings:
        raise InputError("--method mean-pool needs --embeddings")
    if config.method == "sda" and config.lora_rank % EXPERTS:
        raise InputError(f"--method sda needs a --lora-rank in multiples of {EXPERTS}")

# ---- Collapse (Section 3): what Fig. 1a and Table 1 measure ----

def queries(z, e, test):
    """N@10 when a modality's histories look for fused items (Fig. 1a), or for its own."""
    spaces = {"f": "fused", "t": "text", "v": "vision"}
    scores = {}
    for name in ("f2f", "t2f", "v2f", "t2t", "v2v"):
        query, items = [spaces[letter] for letter in name.split("2")]
        if query in z and items in z:
            scores[name] = hits_and_ndcg(evaluate(z[query], e[items], test))["N@10"]
    return scores

def gradient_cosines(model, batch):
    """Fig. 1b: the cosine of the gradient of each modality's own InfoNCE with that of the method's
    loss, over LoRA's weights, on a batch, if there is one."""
    if not batch:
        return {}

    def gradient(loss):
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, [*model.lora])])

    torch.manual_seed(0)  # the same dropout each time
    whole = gradient(model.terms(batch)["loss"])
    cosines = {}
    for modality in BOTH:
        torch.manual_seed(0)
        z, e, mask = model(batch)
        sim = cosine(z[modality], e[modality])  # (B, B)
        own = gradient(weighted_info_nce(sim, mask, torch.ones_like(sim[0]), model.config.tau))
        cosines[f"cos_{modality}"] = torch.cosine_similarity(whole, own, dim=0).item()
    return cosines

def geometry(z, e, test):
    """Mean squared distances A_pos to the targets and A_neg to the negatives, S = A_neg / A_pos,
    and uniformity (Table 1, Eqs. 4, 5) of users z (U, D) and items e (N, D), on unit vectors."""
    means = []
    for users in torch.arange(len(z)).split(1024):
        distance = 2 - 2 * cosine(z[users], e)  # squared, (1024, N)
        parts = [distance.gather(1, test.targets[users, None]),
                 distance.gather(1, test.negatives[users]), (-2 * distance).exp()]
        means.append(torch.stack([part.mean(dim=1) for part in parts]))  # (3, 1024)
    a_pos, a_neg, near = torch.cat(means, dim=1).mean(dim=1).tolist()
    return {"A_pos": a_pos, "A_neg": a_neg, "S": a_neg / (a_pos + 1e-12), "U": math.log(near)}

def measure_collapse(z, e, test, epochs):
    """What Section 3 shows of a run, as tables; none without a modality."""
    tables = {}
    if len(z) > 1:
        tables["queries"] = {"N@10": queries(z, e, test)}
        tables["geometry"] = {space: geometry(z[space], e[space], test) for space in z}
    if epochs and "cos_text" in epochs[0]:
        ends = {"first": epochs[0], "last": epochs[-1]}
        tables["gradient"] = {name: {"text": scores["cos_text"], "vision": scores["cos_vision"]}
                              for name, scores in ends.items()}
    return tables

# ---- Loading: any of ten families by one path ----

QWEN = ("<|vision_start|>", "<|vision_end|>")
IDEFICS = ("<fake_token_around_image><global-img>", "<fake_token_around_image>")
AROUND_A_PICTURE = {  # model family: what stands before and after a picture's tokens
    "qwen2_vl": QWEN, "qwen2_5_vl": QWEN, "qwen3_vl": QWEN, "qwen3_5": QWEN, "smolvlm": IDEFICS,
    "idefics3": IDEFICS, "internvl": ("<img>", "</img>"), "llava": ("", ""),
    "llava_onevision": ("", ""),
    "gemma3": ("\n\n<start_of_image>", "<end_of_image>\n\n"),
}
ADAPTER_INSIDE = "an adapter is in its folder: merge it, or give it as --adapter"
EXPERTS = 4  # into which SDA's MoDA cuts LoRA's rank

@contextlib.contextmanager
def readable(what):
    """Whatever the block raises about a file becomes an InputError: what, why."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        raise InputError(f"{what}: {str(error) or type(error).__name__}") from None

def token_side(config):
    """The side of a picture's token in pixels; 0 where the tower scales to a size of its own."""
    merged = getattr(config.vision_config, "spatial_merge_size", 0)  # patches
    return merged and merged * config.vision_config.patch_size

def check_model(config, device):
    """InputError if a model cannot serve, by its config.json alone, before weights are loaded."""
    if config.model == PAPERS_MODEL and config.device == "auto" and device == "cpu":
        raise InputError(f"{PAPERS_MODEL} (7.5 GB) takes days without CUDA: --model tiny tries "
                         "your files, --device cpu insists")
    path = data.prepare_model(config.model, Path(config.data_dir))
    if path.startswith((".", "/")) and not os.path.exists(path):
        raise InputError(f"--model {path}: there is no such folder")
    with readable(f"--model {path} does not load"):
        if os.path.exists(f"{path}/adapter_config.json"):
            raise ValueError(ADAPTER_INSIDE)
        known = transformers.AutoConfig.from_pretrained(
            path, revision=config.revision, trust_remote_code=False)
    if METHODS[config.method].modalities == ("text",) and not hasattr(known, "vision_config"):
        return  # a language model will do
    if known.model_type not in AROUND_A_PICTURE or known.vision_config.model_type == "pixtral":
        raise InputError(f"--model is of type {known.model_type}, or its pictures vary in size; "
                         f"take one of {', '.join(AROUND_A_PICTURE)}")
    side = token_side(known)
    if side and config.image_size % side:
        raise InputError(f"--image-size {config.image_size}: take a multiple of {side}")

def load_vlm(model, revision, device):
    """(model without its head, tokenizer, image processor; None for a language model's); bfloat16
    on CUDA, float32 on a CPU."""
    print(f"loading {model}")
    hub = {"revision": revision, "trust_remote_code": False}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    load = functools.partial(transformers.AutoModel.from_pretrained, model, dtype=dtype,
                             use_safetensors=True, output_loading_info=True, **hub)
    with readable(f"--model {model} does not load (is it whole, not git-lfs pointers?)"):
        vlm, report = load()
        if report["missing_keys"]:  # perhaps saved with its head, as transformers 5 names it
            vlm, report = load(key_mapping={r"^model\.(visual|language_model)\.": r"\1."})
        if report["missing_keys"]:  # transformers goes on with random weights
            raise ValueError(f"its weights lack {sorted(report['missing_keys'])[:3]}")
        if getattr(vlm, "_hf_peft_config_loaded", False):  # ours would replace it in silence
            raise ValueError(ADAPTER_INSIDE)
        file = transformers.utils.cached_file(model, "config.json", local_files_only=True, **hub)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, **hub)
        processor = None
        if hasattr(vlm.config, "vision_config"):
            processor = transformers.AutoImageProcessor.from_pretrained(model, backend="pil", **hub)
            processor.crop_to_patches = False  # no family's pictures are cut into tiles
            processor.do_image_splitting = False
            processor.do_pan_and_scan = False
    commit = re.search("/snapshots/([^/]+)/", file)  # in the hub's cache
    vlm.commit = commit and commit[1]
    return vlm.to(device).eval().requires_grad_(False), tokenizer, processor

def square_picture(path, side):
    """A picture of side x side pixels (0: its own longer side, at most 1,024), its ratio kept by
    white margins."""
    picture = data.load_picture(path)
    side = side or min(1024, max(picture.size))
    return ImageOps.pad(picture, (side, side), color="white")

@torch.no_grad()
def encode_pictures(vlm, processor, image_size, paths, batch=32):
    """The frozen vision tower's features of N pictures: (N, levels, P, D), on the CPU. Qwen's take
    any size; for the others, the processor scales to the tower's own."""
    side = image_size if token_side(vlm.config) else 0
    known = inspect.signature(vlm.get_image_features).parameters
    features = None
    for k in bar(range(0, len(paths), batch), "encode pictures"):
        pictures = [square_picture(path, side) for path in paths[k:k + batch]]
        pictures.append(pictures[0])  # LLaVA-OneVision cuts a picture that is alone into tiles
        pixels = processor(images=[pictures], do_resize=side == 0, return_tensors="pt")
        inputs = {name: pixels[name].to(vlm.device) for name in pixels if name in known}
        encoded = vlm.get_image_features(**inputs)
        if len({len(picture) for picture in encoded.pooler_output}) > 1:
            raise ValueError("its pictures vary in tokens")
        levels = [encoded.pooler_output, *(getattr(encoded, "deepstack_features", None) or [])]
        levels = [torch.cat(list(level)).unflatten(0, (len(pictures), -1)) for level in levels]
        levels = torch.stack(levels, dim=1)[:-1].cpu()  # (batch, levels, P, D)
        if features is None:
            features = levels.new_empty(len(paths), *levels.shape[1:])
        features[k:k + batch] = levels
    return features

def build_encoder(run):
    """The encoder of a domain's items; InputError if the model does not fit. The file of features
    is named by a digest of the data and of what the tower makes of the first picture, so it can
    never be another tower's."""
    model = data.prepare_model(run.config.model, Path(run.config.data_dir))
    vlm, tokenizer, processor = load_vlm(model, run.config.revision, run.device)
    encode = functools.partial(encode_pictures, vlm, processor, run.config.image_size)
    first = torch.empty(1, 1, 0, 0)  # where no picture is read
    if run.method.modalities != ("text",):
        with readable(f"--model {model} reads no pictures"):
            first = encode(run.domain.pictures[:1])
    encoder = Encoder(vlm, tokenizer, run.domain.titles, first)
    check_prompts(encoder, tokenizer, run)
    if run.method.modalities == ("text",):
        return encoder
    key = hashlib.sha256(run.domain.digest.encode() + first.float().numpy().tobytes())
    path = run.folder.parent / f"features-{key.hexdigest()[:16]}.safetensors"
    data.prepare(path, path, lambda: save_tensors(path, {"features": encode(run.domain.pictures)}))
    with readable(f"{path} is damaged; remove it"):
        encoder.features = load_file(path)["features"]
    for weight in vlm.get_encoder(modality="image").parameters():
        weight.data = weight.data.new_empty(0)  # the tower is not needed again: frees its memory
    return encoder

def check_context(vlm, length):
    """InputError if a prompt of so many tokens exceeds what the model holds."""
    context = vlm.config.get_text_config().max_position_embeddings
    if length > context:
        raise InputError(f"a prompt has {length} tokens, the model holds {context}: shorten "
                         "--history, or --image-size")

def check_prompts(encoder, tokenizer, run):
    """Say what a picture and a long title take. InputError if the tokenizer lacks what a prompt
    needs, or a prompt exceeds the context."""
    vlm = encoder.vlm
    marks = re.findall("<[^<>]+>", "".join(AROUND_A_PICTURE.get(vlm.config.model_type, "")))
    lost = sorted(set(marks) - set(tokenizer.get_vocab()))
    if run.method.modalities == ("text",):  # no prompt has them
        lost = []
    if lost or not all([*encoder.titles, encoder.newline, tokenizer.eos_token]):
        raise InputError(f"the tokenizer of --model {run.config.model} lacks words, an end or "
                         f"{lost}: is tokenizer.json there?")
    most = max(set().union(encoder.picture, encoder.prompt([], "text"), *encoder.titles))
    rows = len(vlm.get_input_embeddings().weight)
    if most >= rows:
        raise InputError(f"--model {run.config.model} has {rows} tokens, its tokenizer gives "
                         f"number {most}: they do not belong together")
    for split, sequence in itertools.product(("train", "valid", "test"), run.domain.sequences):
        history, _, _ = leave_one_out(sequence, split, run.config.history)
        for modality in run.method.modalities:
            check_context(vlm, len(encoder.prompt(history, modality)))
    cut = [tuple(ids) for ids in encoder.titles if len(ids) == TITLE_TOKENS]
    scaled = hasattr(vlm.config, "vision_config") and not token_side(vlm.config)
    print(f"a picture takes {encoder.features.shape[2]} tokens"
          f"{', whatever --image-size' if scaled else ''}; {len(cut)} titles have "
          f"{TITLE_TOKENS} or more, and are cut: {len(set(cut))} of these differ")

def add_lora(vlm, config):
    """Put LoRA into the language model, new or --adapter's; InputError if it does not fit."""
    decoder = vlm.get_decoder()
    place = next(name for name, module in vlm.named_modules() if module is decoder)
    revision = vlm.commit or config.revision
    settings = peft.LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        target_modules=rf"{re.escape(place)}.*_proj\w*", revision=revision)
    with readable(f"LoRA, or --adapter {config.adapter}, does not fit --model and --method"):
        if config.adapter:
            settings = peft.PeftConfig.from_pretrained(config.adapter)
            trained_on = f"{settings.base_model_name_or_path}, {settings.revision or revision}"
            if trained_on != f"{vlm.config._name_or_path}, {revision}":
                print(f"note: {config.adapter} was trained on {trained_on}")
            settings.inference_mode = False  # else no weight of it would count as trained
        if settings.peft_type != "LORA":
            raise ValueError(f"{settings.peft_type} would not be used")
        lora = peft.get_peft_model(vlm, settings)
        check_layers(vlm, place)
        if config.method == "sda":
            add_gates(vlm)
        elif config.checkpointing == "on":
            decoder.activation_checkpointing_enable()
        if config.adapter:
            tensors = load_file(f"{config.adapter}/adapter_model.safetensors")
            if set(tensors) != set(peft.get_peft_model_state_dict(lora)):
                raise ValueError("it has other tensors")
            peft.set_peft_model_state_dict(lora, tensors)
    for layer in lora.modules():
        layer.cast_input_dtype_enabled = False  # LoRA's: autocast does it, in fewer launches
    lora.print_trainable_parameters()
    return lora

def check_layers(vlm, place):
    """ValueError if LoRA is outside the decoder, which has this place: no pass comes by there.
    Say which of the decoder's matrices are without."""
    bare = set()
    for name, weight in vlm.named_parameters():
        inside = name.startswith(place)
        if weight.requires_grad and not inside:
            raise ValueError(f"{name} would not be used: features are made before it")
        if inside and weight.ndim > 1 and not re.search("lora_|base_layer|embed", name):
            bare.add(".".join(name.split(".")[-2:]))
    if bare:
        print(f"note: without LoRA: {', '.join(sorted(bare))}")

# ---- A run: its folder, its log, its tables ----

class Run(NamedTuple):
    """One method with one seed on one domain."""
    config: Config
    method: Method
    device: str     # "cuda" or "cpu"
    source: Path    # the domain's folder
    domain: Domain
    folder: Path    # of the results
    settings: dict  # what the numbers depend on, for config.json

def run_folder(config):
    """Where a run's results go: OUT/DOMAIN/METHOD-seedSEED, with the name of what is given."""
    source = os.path.abspath(data.check_domain(config.domain, Path(config.data_dir)))
    name = config.method
    given = config.adapter or config.embeddings
    if given:
        words = re.sub(r"-seed\d+|\.\w+$", "", given)
        name += "+" + re.sub(r"\W+", "-", words).strip("-")[-60:]
    return Path(config.out, os.path.basename(source), f"{name}-seed{config.seed}")

def open_run(config, first=None):
    """Prepare and read what a run needs, or take it from the `first` run of a command; what is
    wrong by itself is refused before. Raises InputError."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} cannot be used, --device cpu can: {error}") from None
    folder = run_folder(config)
    if METHODS[config.method].modalities and not (folder / "table.md").exists():
        check_model(config, device)
    settings = run_settings(config, first)
    source = data.prepare_domain(config.domain, Path(config.data_dir))
    domain = first.domain if first else data.read_domain(source)
    settings["data"] = domain.digest
    users = len(domain.user_ids)
    if not config.batch <= (config.train_users or users) <= users:
        raise InputError(f"take --batch <= --train-users <= {users}, all users")
    return Run(config, METHODS[config.method], device, source, domain, folder, settings)

def identity(path):
    """A file, or what a model or an adapter is loaded from in its folder, is known by its content,
    wherever it lies; all else, such as a model on the hub, by its name."""
    if path == "tiny" or not os.path.exists(path):
        return path
    files = [path]
    if os.path.isdir(path):
        files = sorted(file for file in Path(path).iterdir()
                       if file.suffix in (".json", ".safetensors", ".model", ".txt"))
    content = hashlib.sha256()
    for name in files:
        with open(name, "rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
    return content.hexdigest()[:16]

def run_settings(config, first=None):
    """What a run's numbers depend on. "paths" and "code", beside it, tell no runs apart."""
    settings = asdict(config)
    for free in ("domain", "data_dir", "out", "device", "checkpointing", "log_every", "save_every"):
        del settings[free]  # change nothing but rounding
    settings["paths"] = {name: settings[name] for name in ("model", "adapter", "embeddings")}
    for name, path in settings["paths"].items():
        if name != "model" and path and not os.path.exists(path):
            raise InputError(f"--{name} {path}: there is no such file or folder")
        known = first and path == first.settings["paths"][name]
        settings[name] = first.settings[name] if known else identity(path)
    settings["code"] = {"source": identity(__file__) + identity(data.__file__),
                        "torch": torch.__version__, "transformers": transformers.__version__}
    return settings

def differences(before, now, aside=()):
    """The settings of one run that another has not: "lr 0.001, epochs 1"; or ""."""
    aside = {*aside, "paths", "code"}
    names = [name for name in now if name not in aside and before.get(name) != now[name]]
    words = {"data": "another catalogue"}
    return ", ".join(words.get(name, name) + f" {before.get(name)}" for name in names)

def check_folder(run):
    """InputError if a run's folder holds another run; a note, or "", if other code made it."""
    folder = run.folder
    finished = (folder / "table.md").exists()
    if not finished and not (folder / "checkpoint.pt").exists():
        return ""
    before = read_settings(folder)
    path = before["paths"]["model"]
    gone = path == run.config.model and before["model"] != path and not os.path.exists(path)
    other = differences(before, run.settings, ["model"] if finished and gone else [])
    if other:
        raise InputError(f"{folder} holds a run with {other}: remove it or take another --out")
    code = differences(before.get("code", {}), run.settings["code"])
    if "transformers" in code and not finished:
        raise InputError(f"{folder} was begun with {code}: go on with that, or remove it")
    return f"note: {folder} was made with other code: {code}\n" if code else ""

def read_json(path):
    with readable(f"{path} is missing or damaged"):
        return dict(json.loads(path.read_text("utf-8")))

def read_settings(folder):
    """A run's config.json; what an earlier version did not write is as it was then."""
    settings = {"alpha": 1.0, **read_json(folder / "config.json")}
    settings["train_users"] = settings.get("train_users") or None
    settings.setdefault("paths", {"model": settings.get("model")})
    return settings

def save_tensors(path, tensors, metadata=None):
    with data.whole_file(path) as partial, readable(f"{path} cannot be written"):
        save_file(tensors, partial, metadata)

def commit_of(model):
    """The commit on the hub of the model under a recommender, if it is from there, or None."""
    return model.encoder.vlm.commit if isinstance(model, VLM2Rec) else None

def trim_log(folder, step):
    """Leave in log.jsonl the lines up to a step: what follows it is done again."""
    path = folder / "log.jsonl"
    path.touch()
    kept = ""
    for line in path.read_text("utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a power cut's
            if json.loads(line)["step"] <= step:
                kept += f"{line}\n"
    data.write_text(path, kept)

def log_step(folder, step, left, terms, seconds, scores={}):
    """A line on the screen and, with validation's scores at an epoch's end, in log.jsonl; `left`
    more steps are to come. FloatingPointError if the loss is not finite."""
    line = {"step": step, **{name: value.item() for name, value in terms.items()},
            "seconds": seconds, "minutes_left": seconds / step * left / 60}
    if not math.isfinite(line["loss"]):
        raise FloatingPointError(f"step {step}: the loss is not finite; lower --lr or raise --tau")
    if torch.cuda.is_initialized():
        line["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(", ".join(f"{name} {value:.4g}" for name, value in line.items()))
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(line | scores) + "\n")

def save_checkpoint(folder, model, optimizer, progress):
    """All that a killed run needs to go on to the same bytes, as order and dropout are seeded;
    whole or not at all. FloatingPointError, and the last one stays, if a weight is not finite."""
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise FloatingPointError(f"by step {progress['step']} a weight is not finite; lower --lr")
    progress["commit"] = commit_of(model)
    content = io.BytesIO()  # on a full disk, torch's own write would not raise an OSError
    torch.save([model.state_dict(), optimizer.state_dict(), progress], content)
    with data.whole_file(folder / "checkpoint.pt") as partial:
        partial.write_bytes(content.getbuffer())

def load_checkpoint(folder, model, optimizer):
    """Take up a checkpoint, if there is one; its progress, or {}."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return {}
    with readable(f"{path} cannot be resumed from; remove it to begin anew"):
        weights, moments, progress = torch.load(path, weights_only=True, map_location="cpu")
        if progress["commit"] != commit_of(model):
            raise ValueError(f"--model has changed since, its commit was {progress['commit']}")
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        print(f"going on after step {progress['step']}")
        return progress

CARD = """LoRA of VLM2Rec (arXiv 2603.17450), run as --method {} on {}:

    base = transformers.AutoModel.from_pretrained("{}", revision="{}")
    vlm = peft.PeftModel.from_pretrained(base, "the path of this folder")

PEFT drops the gates of --method sda; `add_lora` takes them.
"""

def save_adapter(run, lora):
    """adapter/ in PEFT's own format, with a card that tells how to load it."""
    folder = run.folder / "adapter"
    with readable(f"{folder}/adapter_model.safetensors cannot be written"):
        lora.save_pretrained(folder, save_embedding_layers=False)  # else it would ask the hub
    mode = (folder / "adapter_config.json").stat().st_mode
    data.set_mode(folder / "adapter_model.safetensors", mode)
    settings = lora.peft_config["default"]
    data.write_text(folder / "README.md", CARD.format(
        run.config.method, run.domain.name, settings.base_model_name_or_path, settings.revision))

def make_model(run):
    """VLM2Rec and its LoRA, or another model, with embed() and score, and None."""
    config = run.config
    if run.method.modalities:
        encoder = build_encoder(run)
        torch.manual_seed(config.seed)
        lora = add_lora(encoder.vlm, config) if run.method.trains or config.adapter else None
        return VLM2Rec(encoder, config), lora
    vectors = None
    if config.embeddings:
        vectors = read_vectors(config.embeddings, run.domain, run.source)
    if config.method == "mean-pool":
        return MeanPool(vectors), None
    torch.manual_seed(config.seed)
    return SequenceRecommender(config, run.domain, vectors).to(run.device), None

def run_method(run):
    """Train if the method does, embed items and test users, write all; return the tables."""
    config = run.config
    domain = run.domain
    model, lora = make_model(run)
    valid = make_evaluation(domain, "valid", config.history, config.seed)
    if run.method.trains and not config.adapter:
        epochs, best = train(model, domain, valid, config, run.folder)
        scores = {"valid": epochs[best], "untrained": epochs[0], "epochs": epochs}
    else:
        scores = {"valid": validate(model, valid)}
    if lora:
        save_adapter(run, lora)
    test = make_evaluation(domain, "test", config.history, config.seed)
    z, e = model.embed(test.histories)
    save_tensors(run.folder / "items.safetensors", e, {"item_ids": json.dumps(domain.item_ids)})
    save_tensors(run.folder / "users.safetensors", z, {"user_ids": json.dumps(domain.user_ids)})
    draw_users(run, test, z, e, model.score)
    collapse = measure_collapse(z, e, test, scores.get("epochs"))
    scores["commit"] = commit_of(model)
    ranks = [evaluate(z["fused"], e["fused"], test, model.score, full) for full in (False, True)]
    return write_results(run, test, ranks, scores, collapse)

def write_results(run, test, ranks, scores, collapse):
    """Write ranks.csv and, with validation's `scores`, metrics.json; return the tables."""
    domain = run.domain
    targets = [domain.item_ids[item] for item in test.targets]
    rows = zip(domain.user_ids, targets, ranks[0].tolist(), ranks[1].tolist())
    data.write_csv(run.folder / "ranks.csv", ["user_id", "item_id", "rank", "rank_full"], rows)
    before = torch.tensor([item for sequence in domain.sequences for item in sequence[:-2]])
    seen = before.bincount(minlength=len(domain.item_ids))  # by how many users, before validation
    often = seen[test.targets]
    popular = target_rank(often, seen[test.negatives])
    scores |= {"test": hits_and_ndcg(ranks[0]), "popularity": hits_and_ndcg(popular),
               "chance": hits_and_ndcg(torch.arange(1, 102)), "test_full": hits_and_ndcg(ranks[1])}
    parts = {"test_untied": ~torch.tensor(domain.tied)}
    for low, high in ((0, 4), (5, 9), (10, 19), (20, len(domain.user_ids))):  # Fig. 3
        parts[f"target seen {low} to {high} times"] = (low <= often) & (often <= high)
    for name, users in parts.items():
        scores[name] = hits_and_ndcg(ranks[0][users]) if users.any() else None
    about = {"domain": domain.name, "method": run.config.method, "seed": run.config.seed,
             "model": run.config.model, "users": len(targets)}
    data.write_text(run.folder / "metrics.json", json.dumps(about | scores | collapse, indent=1))
    return verdict(gains(ranks[0]), popular, scores) + report(run.folder.name, scores, collapse)

def gains(ranks):
    """What each user adds to N@10: (U,), of ranks (U,)."""
    return (ranks <= 10) / (1 + ranks.double()).log2()

def mean_and_error(values):
    """"+0.0063 ± 0.0019": the mean of paired differences and its standard error."""
    return f"{values.mean():+.4f} ± {values.std() / math.sqrt(len(values)):.4f}"

def verdict(ours, popular, scores):
    """A run in words: its users' gains (U,) against those of popularity or, if better, chance."""
    name = max(("popularity", "chance"), key=lambda name: scores[name]["N@10"])
    above = ours - (gains(popular) if name == "popularity" else scores["chance"]["N@10"])
    word = "above" if above.mean() > 0 else "BELOW"
    if above.mean().abs() <= 2 * above.std() / math.sqrt(len(above)):
        word = "not distinguishable from"
    text = (f"The test's N@10, {scores['test']['N@10']:.4f}, is {word} that of {name}, "
            f"{scores[name]['N@10']:.4f}: {mean_and_error(above)} (standard error, over users).\n")
    if "untrained" in scores and scores["valid"]["N@10"] < scores["untrained"]["N@10"] + 0.001:
        text += "On validation, no epoch was better than the untrained model: nothing was learnt.\n"
    return text

EXPLAINED = {  # what stands under each table
    "": "H@k: share of users whose next item is among the first k; N@k: more for a higher place",
    "beside it": "valid, untrained: validation after the best epoch, before the first step; "
                 "test_full: among all items; test_untied: without users whose last item was "
                 "decided by a tie; seen: by users before validation",
    "queries": "x2y: histories as x look for items as y; f fused, t text, v vision (Fig. 1a)",
    "geometry": "A_pos, A_neg: mean squared distance of a history to its target, to the negatives; "
                "S = A_neg / A_pos; U: uniformity, lower is more even (Table 1)",
    "gradient": "cosine of each modality's own gradient with the loss's, before the first step and "
                "after the last (Fig. 1b)",
}

def report(name, scores, collapse):
    """The tables of a run, each with its columns explained."""
    first = ("test", "popularity", "chance")
    rest = {row: values for row, values in scores.items()
            if row not in first and isinstance(values, dict)}
    tables = {name: {row: scores[row] for row in first}, "beside it": rest, **collapse}
    return "".join(f"\n{table(title, rows)}\n{EXPLAINED.get(title, EXPLAINED[''])}\n"
                   for title, rows in tables.items())

def table(title, rows):
    """Named rows of scores as Markdown, with the columns of the last."""
    columns = list(next(reversed(rows.values()), []))
    lines = [[title, *columns], ["---"] * (1 + len(columns))]
    for name, row in rows.items():
        cells = [row[column] for column in columns]
        lines.append([name] + [cell if isinstance(cell, str) else f"{cell:.4f}" for cell in cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

def execute(run):
    """Begin, go on, or show what is finished; InputError if the folder holds another run."""
    print(check_folder(run), end="")
    folder = run.folder
    tables = folder / "table.md"
    if tables.exists():
        others = comparison(folder.parent, run.settings)
    else:
        folder.resolve().mkdir(parents=True, exist_ok=True)  # a link may lead nowhere
        with data.lock(folder):
            data.write_text(folder / "config.json", json.dumps(run.settings, indent=1))
            header = ["item_id", "reason", "detail"]
            data.write_csv(folder / "dropped.csv", header, run.domain.dropped_items)
            data.write_text(tables, run_method(run))
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        shared = folder.parent / "table.md"
        with data.lock(shared, wait=True):
            others = comparison(folder.parent, run.settings)
            data.write_text(shared, others)
    when = time.ctime(tables.stat().st_mtime)
    print(f"\n{folder} is finished since {when}\n\n{tables.read_text('utf-8')}\n{others}")

# ---- All finished runs of a domain beside one another (Tables 2, 5) ----

class Finished(NamedTuple):
    """A finished run, as its files tell."""
    settings: dict
    test: dict           # H@k, N@k and, of its modalities, t2t and v2v
    gains: torch.Tensor  # (U,), of the users in their ids' order

def read_finished(folder):
    """A finished run; InputError, which names the file, if it is damaged."""
    scores = read_json(folder / "metrics.json")
    rows = data.read_csv(folder / "ranks.csv", ("user_id", "rank"))
    ranks = [float(rank) for _, user, rank in sorted(rows, key=lambda row: row[1])]
    users = scores.get("users", len(ranks))
    if len(ranks) != users:
        raise InputError(f"{folder}/ranks.csv has {len(ranks)} of {users} users")
    test = scores.get("queries", {"N@10": {}})["N@10"] | scores["test"]
    return Finished(read_settings(folder), test, gains(torch.tensor(ranks)))

def against(ours, theirs):
    """Ours above theirs, {seed: Finished}, in N@10: over three or more shared seeds, or over the
    users, whose spread is not that of another training."""
    seeds = set(ours) & set(theirs)
    if not seeds or ours is theirs:
        return "-"
    above = torch.stack([ours[seed].gains - theirs[seed].gains for seed in seeds])  # (seeds, U)
    if len(seeds) >= 3:
        return f"{mean_and_error(above.mean(dim=1))} over {len(seeds)} seeds"
    return f"{mean_and_error(above.mean(dim=0))} over {above.shape[1]:,} users"

def comparison(folder, settings):
    """Mean ± standard deviation over each method's seeds, and vlm2rec against each. Runs whose
    other settings are not these are rows of their own, with what differs; the damaged are named."""
    groups = {}
    lost = ""
    for path in sorted(folder.glob("*/table.md")):
        try:
            run = read_finished(path.parent)
            seed = run.settings["seed"]
            other = differences(run.settings, settings, ("method", "seed", "adapter", "embeddings"))
            name = path.parent.name.removesuffix(f"-seed{seed}")
            groups.setdefault((other, name), {})[seed] = run
        except (InputError, KeyError, ValueError) as error:
            lost += f"left out, as it is damaged: {path.parent} ({error})\n"
    rows = {}
    for (other, name), runs in sorted(groups.items()):
        row = {"seeds": str(len(runs))}
        for column in ("H@10", "N@10", "H@20", "N@20", "t2t", "v2v"):
            values = torch.tensor([run.test.get(column, math.nan) for run in runs.values()])
            spread = f" ± {values.std():.4f}" if len(runs) > 1 else ""
            row[column] = "-" if values.isnan().any() else f"{values.mean():.4f}{spread}"
        row["vlm2rec above it, N@10"] = against(groups.get((other, "vlm2rec"), {}), runs)
        rows[f"{name} ({other})" if other else name] = row
    text = "t2t, v2v: what titles, pictures rank by themselves, N@10; ±: over the seeds\n"
    return table(f"test, runs in {folder}", rows) + "\n" + text + lost

# ---- Terms that the paper's loss has not: the simplest control there is, and SDA's ----
# SDA (Structural and Disentangled Adaptation, 2025) is another answer: CMSA, and MoDA's gates.

def unimodal(sim, e, mask, tau):
    """Each modality's own InfoNCE on the batch's similarities sim (B, B), added."""
    weight = torch.ones_like(sim["text"][0])
    return sum(weighted_info_nce(sim[modality], mask, weight, tau) for modality in BOTH)

def structural_alignment(e_text, e_vision, tau):
    """SDA's CMSA on items (B, D): who is near whom within the modalities teaches it across them."""
    within = (cosine(e_vision, e_vision) + cosine(e_text, e_text)) / 2  # (B, B)
    teacher = (within / tau).softmax(dim=1).detach()
    across = cosine(e_vision, e_text) / tau
    loss = torch.nn.functional.cross_entropy
    return (loss(across, teacher) + loss(across.T, teacher)) / 2

def cmsa(sim, e, mask, tau):
    return structural_alignment(e["text"], e["vision"], tau)

MORE_TERMS = {"unimodal": unimodal, "cmsa": cmsa}

def add_gates(vlm):
    """SDA's MoDA: blocks of LoRA's rank, the experts, count by gates of a pass's modality.
    Recomputed after other passes, a layer would take their gates: sda is not checkpointed."""
    now = {"modality": 0}  # 1: the pass has pictures

    def notice(vlm, args, inputs):
        now["modality"] = int("mm_encoder_outputs" in inputs)

    def weigh(layer, args, x):  # (B, L, r)
        gates = layer.gates[now["modality"]].softmax(dim=0)  # (EXPERTS,)
        return x * gates.repeat_interleave(x.shape[-1] // EXPERTS)

    vlm.register_forward_pre_hook(notice, with_kwargs=True)
    for name, layer in vlm.named_modules():
        if name.endswith("lora_A.default"):
            layer.gates = nn.Parameter(layer.weight.new_zeros(2, EXPERTS))
            layer.register_forward_hook(weigh)

# ---- Task 2: downstream models over ids or given item vectors (Tables 2, 4) ----

def read_vectors(path, domain, source):
    """Item vectors (N, D) of a .npy or .safetensors (its only tensor, or "fused"), in the order of
    its item_ids or else of items.csv. Raises InputError if they do not fit."""
    with readable(f"--embeddings {path} does not fit"):
        ids = list(data.read_items(source))
        if path.endswith(".npy"):
            vectors = torch.from_numpy(numpy.load(path, allow_pickle=False))
        else:
            with safetensors.safe_open(path, "pt") as file:
                names = list(file.keys())
                vectors = file.get_tensor("fused" if len(names) > 1 else names[0])
                known = file.metadata() or {}
                if "item_ids" in known:
                    ids = json.loads(known["item_ids"])
        row = {str(item): number for number, item in enumerate(ids)}
        if vectors.ndim != 2 or not len(vectors) == len(ids) == len(row):
            raise ValueError(f"shape {tuple(vectors.shape)} for {len(row)} different item ids")
        vectors = vectors[[row[item] for item in domain.item_ids]].float()
        wrong = (~vectors.isfinite()).nonzero()
        if len(wrong):
            item = domain.item_ids[wrong[0, 0]]
            raise ValueError(f"row {row[item]}, item {item!r}, holds {vectors[tuple(wrong[0])]}")
        return vectors

class MeanPool(NamedTuple):
    """A history is the mean of its items' vectors (N, V)."""
    vectors: torch.Tensor
    score = staticmethod(cosine)

    def embed(self, histories):
        means = [self.vectors[history].mean(dim=0) for history in histories]
        return {"fused": torch.stack(means)}, {"fused": self.vectors}

class SequenceRecommender(nn.Module):
    """SASRec or GRU4Rec over ids or, given vectors (N, V), over these through a linear adapter. The
    paper does not say more; we make the vectors' norm 1, and train them too."""
    score = staticmethod(torch.inner)

    def __init__(self, config, domain, vectors=None):
        super().__init__()
        d = 128
        self.kind = config.method
        self.dropout = nn.Dropout(0.5)
        self.adapter = nn.Identity()
        scale = 0.02 if self.kind == "sasrec" else d ** -0.5  # by validation
        self.table = nn.Parameter(scale * torch.randn(len(domain.item_ids), d))
        if vectors is not None:
            self.table = nn.Parameter(torch.nn.functional.normalize(vectors))
            self.adapter = nn.Linear(vectors.shape[1], d)
        if self.kind == "gru4rec":
            self.body = nn.GRU(d, d, batch_first=True)
        else:
            self.position = nn.Parameter(0.02 * torch.randn(config.history, d))
            layer = nn.TransformerEncoderLayer(
                d, 2, d, 0.5, "gelu", batch_first=True, norm_first=True)
            self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(d), enable_nested_tensor=False)
        self.groups = [{"params": self.parameters(), "lr": 1e-3}]
        users = config.train_users or len(domain.user_ids)
        self.batch = min(users, max(32, min(256, users // 64)))  # some 64 steps in an epoch
        self.epochs = 200
        self.patience = 20  # epochs without a gain

    def forward(self, sequences):
        """States (B, L, d) after each of the items (B, L), padded on the right, and the items
        (N, d), whose inner products with a state score what comes next."""
        items = self.adapter(self.table)
        if self.kind == "gru4rec":
            return self.body(self.dropout(items[sequences]))[0], items
        length = sequences.shape[1]
        states = self.dropout(items[sequences] + self.position[:length])
        mask = nn.Transformer.generate_square_subsequent_mask(length, items.device)
        return self.body(states, mask=mask, is_causal=True), items

    def terms(self, batch):
        """Cross-entropy over the catalogue after every item of the B histories."""
        self.train()
        rows = pad([[*history, target] for history, target, _ in batch], -1)  # (B, 1 + L)
        following = rows[:, 1:].flatten()
        places = (following >= 0).nonzero()[:, 0]  # without padding
        device = self.table.device
        states, items = self(rows[:, :-1].clamp(min=0).to(device))
        logits = states.flatten(0, 1)[places.to(device)] @ items.T  # (places, N)
        return {"loss": torch.nn.functional.cross_entropy(logits, following[places].to(device))}

    @torch.no_grad()
    def embed(self, histories):
        """The last states (n, d) and the items (N, d), on the CPU."""
        self.eval()
        states, items = self(pad(histories, 0).to(self.table.device))
        last = torch.tensor([len(history) - 1 for history in histories])
        return {"fused": last_token(states.cpu(), last)}, {"fused": items.cpu()}

# ---- Recommendations to look at ----

def draw(domain, rows, target=None):
    """Rows of at most five items and their titles, or ids where the font has no such letters."""
    sheet = Image.new("RGB", (590, 116 * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    glyph = pen.getfont().getmask
    blank = bytes(glyph("\uffff"))  # what the font has for a letter that it lacks
    for row, (name, items) in enumerate(rows.items()):
        top = 116 * row + 6
        pen.text((6, top + 24), name, "black")
        for column, item in enumerate(items):
            left = 106 + 96 * column
            sheet.paste(square_picture(domain.pictures[item], 72), (left, top))
            words = domain.titles[item]
            if blank in [bytes(glyph(letter)) for letter in words]:
                words = domain.item_ids[item]
            pen.text((left, top + 76), textwrap.fill(words, 15, max_lines=2), "black")
            if item == target:
                pen.rectangle((left - 2, top - 2, left + 73, top + 73), outline="green", width=3)
    return sheet

def protocol_rows(run, test, z, e, score, user):
    """What `draw` shows of a user: the latest history and what was bought next; then by each space
    the five best of the 101 candidates, and the rank of what was bought."""
    target = test.targets[user].item()
    rows = {"history, and\nbought next": [*test.histories[user][-4:], target]}
    candidates = torch.cat([test.targets[user, None], test.negatives[user]])  # (101,)
    names = {"text": "by title", "vision": "by picture", "fused": "by both"}
    if len(z) < 3:
        names = {"fused": f"by {run.config.method}"}
    for space, name in names.items():
        scores = score(z[space][user:user + 1], e[space])[0, candidates]  # (101,)
        rank = target_rank(scores[:1], scores[None, 1:]).item()
        rows[f"{name}:\nrank {rank:g} of 101"] = candidates[scores.topk(5).indices].tolist()
    return rows, target

def draw_users(run, test, z, e, score):
    """recommendations.png: two users, the same for every method of a domain."""
    sheets = []
    for user in (0, len(test.targets) // 2):
        sheet = draw(run.domain, *protocol_rows(run, test, z, e, score, user))
        sheet = ImageOps.expand(sheet, (0, 24, 0, 0), "white")
        words = f"{run.config.method}, user {run.domain.user_ids[user]}; green: bought next"
        ImageDraw.Draw(sheet).text((6, 8), words, "black")
        sheets.append(sheet)
    with data.whole_file(run.folder / "recommendations.png") as partial:
        Image.fromarray(numpy.hstack(sheets)).save(partial, "PNG")

def recommend(run, history, k=10):
    """The k best items for a history of item ids, oldest first, by a finished run of an encoder:
    [(item id, title, score)]. Its settings are read from its folder. Raises InputError."""
    before = read_settings(run.folder)
    ids = run.domain.item_ids
    unknown = [item for item in history if item not in ids]
    adapter = run.folder / "adapter"
    wrong = {
        f"--method {run.config.method} has no encoder": not run.method.modalities,
        "its catalogue has changed since": before["data"] != run.domain.digest,
        f"{adapter} is missing": run.method.trains and not adapter.exists(),
        "give at least one item id, the oldest first": not history,
        f"{run.domain.name} lacks {' '.join(unknown)} (--recommend comes last)": unknown}
    for why in filter(wrong.get, wrong):
        raise InputError(f"{run.folder} cannot recommend: {why}")
    name = run.config.model
    if run.settings["model"] != before["model"]:  # it is not given, or has changed
        name = before["paths"]["model"]
        if identity(name) != before["model"]:
            raise InputError(f"the files of --model {name} have changed since {run.folder}")
    known = {flag: before[flag] for flag in asdict(run.config) if flag in before}
    known |= {"model": name, "adapter": str(adapter) if adapter.exists() else ""}
    run = run._replace(config=replace(run.config, **known))
    path = run.folder / "items.safetensors"
    with readable(f"{path} is missing or damaged"):
        e = load_file(path)["fused"]
    model, _ = make_model(run)
    commit = read_json(run.folder / "metrics.json").get("commit")
    if commit != commit_of(model):
        raise InputError(f"--model {name} has changed since: give --revision {commit}")
    items = [ids.index(item) for item in history]
    z = model.encoder.embed([items[-run.config.history:]], run.method.modalities)["fused"]
    scores = cosine(z, e)[0].index_fill(0, torch.tensor(items), -torch.inf)  # (N,)
    best = zip(*scores.topk(k))
    return [(ids[item], run.domain.titles[item], score.item()) for score, item in best]

# ---- The command ----

def parse_config(argv):
    """A Config for each method, file of --embeddings and seed; the items of --recommend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1], allow_abbrev=False,
                                     usage="python vlm2rec.py [--flag value ...]")
    for option in fields(Config):
        flag = "--" + option.name.replace("_", "-")
        kind = os.path.expanduser if option.type is str else option.type  # --out=~/x
        default = [option.default] if "nargs" in option.metadata else option.default
        parser.add_argument(flag, type=kind, default=default, **option.metadata)
    parser.add_argument("--seeds", type=int, default=1, help="so many runs, from --seed on (1)")
    parser.add_argument("--recommend", nargs=argparse.REMAINDER, metavar="ITEM",
                        help="last: a finished run's top ten after these items, oldest first")
    flags = vars(parser.parse_args(argv))
    history = flags.pop("recommend")
    count = flags.pop("seeds")
    if count < 1:
        raise InputError(f"--seeds {count}: out of range")
    seeds = range(flags["seed"], flags["seed"] + count)
    configs = []
    for method, vectors, seed in itertools.product(flags["method"], flags["embeddings"], seeds):
        configs.append(Config(**flags | {"method": method, "embeddings": vectors, "seed": seed}))
    return configs, history

def show_recommendations(config, history):
    """Print what a finished run recommends; nothing is prepared where there is none."""
    folder = run_folder(config)
    if not (folder / "table.md").exists():
        raise InputError(f"{folder} holds no finished run; train it without --recommend first")
    run = open_run(config)
    best = recommend(run, history)
    titles = dict(zip(run.domain.item_ids, run.domain.titles))
    print(f"{folder}, after " + ", ".join(f"{item} {titles[item][:40]}" for item in history))
    for rank, (item, title, score) in enumerate(best, 1):
        print(f"{rank:2}  {score:.4f}  {item}  {title[:70]}")

def run_all(configs):
    """Check all runs, then do one after the other."""
    first = open_run(configs[0])
    runs = [first] + [open_run(config, first) for config in configs[1:]]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {first.device}\n"
          f"{data.describe(first.domain)}")
    if first.config.model == "tiny" and first.config.domain != "sample" and first.method.modalities:
        print("note: --model tiny has random weights and knows the sample world's words only: it "
              "tries your files, not the method")
    for run in runs:
        check_folder(run)
    for run in runs:
        execute(run)

def main(argv=None):
    """The exit code: 0; 2 after one line on what the user can mend; 130 after Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.stderr = sys.stderr or open(os.devnull, "w")  # tqdm needs one
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers|peft")
    code = 2
    try:
        configs, history = parse_config(argv)
        if history is None:
            run_all(configs)
        else:
            for config in configs:
                show_recommendations(config, history)
        return 0
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, OSError, FloatingPointError, safetensors.SafetensorError) as error:
        message = str(error)
    except (RuntimeError, MemoryError) as error:
        if not re.search("out of memory|ALLOC_FAILED|allocate memory|MemoryError", repr(error)):
            raise
        message = "out of memory: try --checkpointing on, a smaller --image-size or --batch"
    except KeyboardInterrupt:
        message = "stopped; the same command goes on from the last checkpoint, if there is one"
        code = 130
    print("error:", " ".join(message.split())[:500], file=sys.stderr)
    return code

if __name__ == "__main__":
    sys.exit(main())
