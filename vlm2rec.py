# SPDX-License-Identifier: MIT
"""VLM2Rec in one file: a vision-language model becomes an embedder for sequential recommendation (arXiv 2603.17450).

A user's history is encoded twice, as titles and as pictures, and so is every item; the last token's state is the
embedding, and the two modalities are added. Fine-tuning that sum on clicks alone lets one modality collapse. VLM2Rec
weighs a user's negatives more, the further one modality lags behind, and keeps both modalities' neighbourhoods alike.

    python vlm2rec.py --domain sample        # CPU, no download, about a minute
    python vlm2rec.py --domain toys          # the paper: Qwen2.5-VL-3B, LoRA, one CUDA GPU

The first command prints, among other tables,

    | test | H@10 | N@10 | H@20 | N@20 |
    | chance | 0.0990 | 0.0450 | 0.1980 | 0.0697 |
    | popularity | 0.1876 | 0.0893 | 0.3415 | 0.1284 |
    | vlm2rec | 0.7023 | 0.4033 | 0.8368 | 0.4379 |

The protocol, leave-one-out (data.py):
    target        test: the last item of a user's sequence; validation: the second to last; training: the third to last,
                  and no other: one sample a user
    history       the latest 10 items before the target
    negatives     training: the batch's other targets, unless the user has them already; evaluation: 100 different items
                  outside the user's whole sequence, drawn once from a generator seeded by (seed, split, user)

Glossary, code -> paper:
    z, e          z_u, e_i: embeddings of histories, of items (targets or catalogue); in dicts "text", "vision", "fused"
    sim           s(z_u, e_j), cosine similarity of a batch's users and targets; the diagonal holds the positives
    mask          N_u: which of the batch's targets are negatives for which user
    gap, weight   Delta_u,gap, w_u,pen
    tau           tau and tau_WPCL;  tau_crtr: tau_CRTR;  lam: lambda
    B, U, N       users in a batch, users and items in a ranking;  L, P: tokens of a prompt, of a picture;  D: width

We take means for sums over the batch (Eqs. 3, 10), so that lam does not depend on B. What the paper leaves open is
marked at its line and listed in the README. The method ends with the evaluation; behind it comes what runs it.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import re
import signal
import statistics
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

if __name__ == "__main__":  # Ctrl-C during the next seconds, while torch is imported, ends without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import mpmath
import numpy
import peft
import PIL
import safetensors.torch
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import data
from data import Domain, InputError

TITLE_TOKENS = 64  # a longer title is cut; the paper does not say
BOTH = ("text", "vision")


# Settings (Section 5.1.1) ---------------------------------------------------------------------------------------------

class Method(NamedTuple):
    """What `--method` chooses. Without a contrast and without topology the encoder is not trained."""
    modalities: tuple[str, ...]  # encoded one by one, then added; none: a downstream model, without an encoder
    contrast: str = ""           # "wpcl" (Eq. 10), "infonce" (Eq. 3) or ""
    topology: bool = False       # with lam * CRTR (Eq. 13)?
    stop_gradient: bool = True   # in Eq. 8
    sda: bool = False            # another system's answer: with lam * CMSA, and MoDA in place of plain LoRA

METHODS = {
    "vlm2rec": Method(BOTH, "wpcl", topology=True),
    "sft": Method(BOTH, "infonce"),
    "vanilla": Method(BOTH),
    "text": Method(("text",), "infonce"),
    "vision": Method(("vision",), "infonce"),
    "internal": Method(("interleaved",), "infonce"),  # each title with its picture, in one prompt
    "no-wpcl": Method(BOTH, topology=True),           # nothing pulls to the targets; with it, Table 5's ablations
    "no-penalty": Method(BOTH, "infonce", topology=True),
    "no-stopgrad": Method(BOTH, "wpcl", topology=True, stop_gradient=False),
    "no-crtr": Method(BOTH, "wpcl"),
    "sda": Method(BOTH, "infonce", sda=True),         # Structural and Disentangled Adaptation (2025)
    "sasrec": Method(()),                             # downstream models: ids, or the item vectors of --embeddings
    "gru4rec": Method(()),
    "mean-pool": Method(()),                          # a history is the mean of its items' vectors
}

def option(default, help: str, least: float | None = None, most: float = 2**31 - 1, **argument):
    """A field of Config with its line in --help, the values that it may take, and more for argparse."""
    return dataclasses.field(default=default, metadata={"help": help, "range": (least, most), "argument": argument})

@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. The defaults are the paper's unless the line says that it does not tell."""
    domain: str = option("sample", "a domain under --data-dir, or a path to a folder (with a separator in it)")
    method: str = option("vlm2rec", "one or more: vlm2rec; vanilla (no training); sft, text, vision, internal (Eq. 3); "
                         "the ablations no-wpcl, no-penalty, no-stopgrad, no-crtr; sda, another system; sasrec, "
                         "gru4rec, mean-pool (see --embeddings)", choices=list(METHODS), nargs="+", metavar="name")
    model: str = option("Qwen/Qwen2.5-VL-3B-Instruct", "hub name or folder of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL, "
                        "Qwen3.5, InternVL, LLaVA, LLaVA-OneVision, SmolVLM, Idefics3 or Gemma 3; tiny: random weights")
    revision: str = option("main", "branch, tag or commit of a model on the hub")
    seed: int = option(0, "of LoRA's start, dropout, the users' order and choice, the evaluation's negatives", 0)
    data_dir: str = option("domains", "where the domains lie; toys, beauty, clothing and sports are fetched into it")
    mirror: str = option("", "address to fetch Amazon's archives and pictures from, instead of their own")
    out: str = option("runs", "results go to OUT/DOMAIN/METHOD-seedSEED")
    device: str = option("auto", "auto takes CUDA if there is one", choices=["auto", "cuda", "cpu"])
    epochs: int = option(3, "passes over the users; the best on validation N@10 is kept, untrained (0) included", 1)
    batch: int = option(8, "users in a step (B); each one's target is a negative for the others", 2)
    history: int = option(10, "latest items of a user in the prompt", 1)
    image_size: int = option(168, "side of a picture in pixels, for Qwen times 28 or 32; not the paper's", 28, 1120)
    lr: float = option(1e-5, "AdamW's learning rate for LoRA, constant", 1e-12, 1e30)
    penalty_lr: float = option(1e-5, "the same for alpha and beta, whatever LoRA's is; 0 freezes them", 0)
    tau: float = option(0.1, "temperature of the contrastive loss; paper: .05, .1, .5 or 1", 1e-6)
    tau_crtr: float = option(1.0, "temperature of the topology loss; paper: .001, .01, .1 or 1", 1e-6)
    lam: float = option(0.5, "weight of the topology loss (and of sda's alignment); paper: .1, .5 or 1", 0)
    lora_rank: int = option(16, "LoRA's rank", 1)
    lora_alpha: int = option(32, "LoRA's scale: its update is multiplied by alpha / rank", 1)
    lora_dropout: float = option(0.2, "dropout in front of LoRA", 0, most=0.99)
    checkpointing: str = option("on", "off: same results, a third less work, more memory", choices=["on", "off"])
    train_users: int = option(0, "train on so many users, drawn by the seed (Table 7); 0: on all", 0)
    adapter: str = option("", "folder of an adapter to evaluate instead of training: from another domain (Table 6); "
                          "{method} and {seed} in it are the run's, here and below")
    embeddings: str = option("", "one or more: item vectors for sasrec and gru4rec (Task 2; without any or for '': "
                             "ids) or mean-pool (Task 1); .safetensors or .npy, in the order of items.csv",
                             nargs="+", metavar="name")
    gradients_every: int = option(0, "steps between two measurements of the gradients' angles (Fig. 1b); 0: none", 0)
    log_every: int = option(50, "steps between two lines of the log", 1)
    save_every: int = option(200, "steps between two checkpoints; another is written at the end of an epoch", 1)
    restart: bool = option(False, "replace an earlier run, or what is left of it, instead of going on with it")


# Prompts (Section 2.2.1) ----------------------------------------------------------------------------------------------

class Prompt(NamedTuple):
    """Token ids, and the items whose pictures fill the placeholders among them, in order."""
    ids: list[int]
    pictures: list[int]

class PromptBuilder:
    """Builds P_T and P_V: the titles or the pictures in order, a newline between two, one closing token, for LLaMA and
    Gemma an opening one too; for an item the same with one entry. The paper's template is missing from the text that we
    have; this is the least that "minimal prompt construction" can mean."""

    def __init__(self, tokenizer, titles: list[str], config, picture_tokens: int):
        encode = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=True)  # titles are text
        before, after = (tokenizer(mark, add_special_tokens=False).input_ids for mark in FAMILIES[config.model_type])
        self.titles = encode(titles, truncation=True, max_length=TITLE_TOKENS).input_ids
        self.picture = [*before, *[config.image_token_id] * picture_tokens, *after]
        self.opening = [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id]
        self.newline = encode("\n").input_ids
        self.closing = [tokenizer.eos_token_id]

    def __call__(self, items: list[int], modality: str) -> Prompt:
        """The prompt of `items` (a history, or a list of one item) in the modality text, vision or interleaved."""
        entry = {"text": lambda item: self.titles[item], "vision": lambda item: self.picture,
                 "interleaved": lambda item: self.titles[item] + self.newline + self.picture}[modality]
        ids = self.opening + entry(items[0])
        for item in items[1:]:
            ids += self.newline + entry(item)
        return Prompt(ids + self.closing, [] if modality == "text" else list(items))


# Encoder (Sections 2.2.2, 2.3) ----------------------------------------------------------------------------------------

class Encoder:
    """Phi of Eq. 1: prompts in, the last token's state out. It takes a model of FAMILIES without its head, with LoRA or
    without, its tokenizer, the titles of the N items, and (N, P, D) of `encode_pictures`, not the tower itself."""

    def __init__(self, vlm, tokenizer, titles: list[str], features: torch.Tensor):
        self.vlm, self.features, self.device = vlm, features, vlm.get_decoder().device
        self.prompt = PromptBuilder(tokenizer, titles, vlm.config, features.shape[1])
        self.catalogue = [[item] for item in range(len(titles))]  # an item is encoded as a history of one
        self.tokens = 0                                           # encoded so far, for the log

    def __call__(self, prompts: list[Prompt], bar_title: str = "") -> torch.Tensor:
        """Embeddings (n, D), float32, of n prompts (Eq. 1), in the forward passes that `batches_by_length` makes."""
        passes = list(batches_by_length([len(prompt.ids) for prompt in prompts], PASS_TOKENS[self.device.type]))
        visible = bar(passes, bar_title, unit="pass", disable=None if bar_title else True)
        states = torch.cat([self.forward_pass([prompts[row] for row in rows]) for rows in visible])
        order = torch.tensor(list(itertools.chain(*passes))).argsort()
        return states[to_device(order, self.device)]                                               # as they came

    def forward_pass(self, prompts: list[Prompt]) -> torch.Tensor:
        """Embeddings (B, D), float32, of B prompts, padded to the longest."""
        lm, device, arguments = self.vlm.get_decoder(), self.device, {}
        ids = pad([prompt.ids for prompt in prompts], 0)                                           # (B, L)
        last = to_device(torch.tensor([len(prompt.ids) - 1 for prompt in prompts]), device)        # (B,)
        pictures = [item for prompt in prompts for item in prompt.pictures]
        self.tokens += sum(len(prompt.ids) for prompt in prompts)
        self.shows = to_device(torch.tensor([bool(prompt.pictures) for prompt in prompts]), device)  # (B,), for MoDA
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            states = self.vlm.get_input_embeddings()(to_device(ids, device))                       # (B, L, D)
            if pictures:  # they take the placeholders
                is_picture = to_device(ids == self.vlm.config.image_token_id, device)              # (B, L)
                features, *deep = to_device(self.features[pictures], device).split(states.shape[-1], dim=-1)
                states = states.masked_scatter(is_picture[..., None], features)
                lm, arguments = family_arguments(self.vlm, ids, is_picture, features, deep)
            # Padding is on the right and attention is causal: no token that counts sees it, so no mask is needed.
            states = lm(inputs_embeds=states, use_cache=False, **arguments).last_hidden_state
        return last_token(states, last)                                                            # (B, D)

    @torch.no_grad()
    def embed(self, histories: list[list[int]], modalities: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Each modality's embeddings (n, D) and "fused", their sum (Eq. 2), on the CPU, without dropout, of any number
        of histories; an item is a history of one."""
        self.vlm.eval()
        parts = {}
        with folded_lora(self.vlm):
            for modality in modalities:
                prompts = [self.prompt(items, modality) for items in histories]
                parts[modality] = self(prompts, f"embed {modality}").cpu()
        return fuse(parts)

def last_token(states: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The state of each prompt's last token, as its embedding (Eq. 1): (B, D), float32, from the final layer's states
    (B, L, D) and the places (B,) of the last tokens."""
    return states[torch.arange(len(last), device=states.device), last].float()

def fuse(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """z = z_T + z_V (Eq. 2), or the one modality there is, as "fused"."""
    return {**parts, "fused": sum(parts.values())}


# Losses (Sections 2.4, 4.2): pure functions of tensors that need nothing but torch ------------------------------------
# sim (B, B) is s(z_u, e_j) with the positives on its diagonal, mask (B, B) marks the negatives, tau is a temperature.

def cosine(z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """s(z, e): cosine similarity of every row of z (n, D) with every row of e (m, D): (n, m), at least float32."""
    z, e = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (z, e))
    return torch.nn.functional.normalize(z, dim=-1) @ torch.nn.functional.normalize(e, dim=-1).T

def negative_mask(targets: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    """N_u as a mask (B, B): which of the batch's targets (B,) are negatives for which user; the diagonal is False. The
    paper does not say. We leave out what the user has by then: an equal target, or one of `earlier` (B, H), all items
    before it, padded with -1; not what is bought later, which training must not know."""
    owned = torch.cat([targets[:, None], earlier], dim=1)                 # (B, 1 + H)
    return ~(owned[:, :, None] == targets[None, None, :]).any(dim=1)      # (B, B)

def info_nce(sim: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor, tau: float) -> torch.Tensor:
    """L_WPCL (Eq. 10) or, with weights (B,) of 1, L_SFT (Eq. 3): InfoNCE whose negatives count `weight` times, as a
    mean over the batch; a user without a negative adds 0."""
    log_weight = torch.where(mask, weight.log()[:, None], -torch.inf)         # w * exp(x) = exp(x + log w)
    logits = sim / tau + log_weight.fill_diagonal_(0)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(sim), device=sim.device))

def discriminative_margin(sim: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """M_u,m (Eq. 6): how far the modality of `sim` sets each user's target above the mean of the negatives: (B,); 0
    for a user without a negative."""
    count = mask.sum(dim=1)
    mean = (sim * mask).sum(dim=1) / count.clamp(min=1)
    return torch.where(count > 0, sim.diagonal() - mean, 0.0)

def modality_gap(margin_text: torch.Tensor, margin_vision: torch.Tensor, stop_gradient: bool = True) -> torch.Tensor:
    """Delta_u,gap = sg[M_strong] - M_weak (Eqs. 7, 8): (B,), at least 0, from the margins (B,) of both modalities. The
    weak one is found in each step for each user. The stop-gradient leaves this loss one way to close the gap:
    raise the weak margin, not lower the strong one."""
    strong = torch.maximum(margin_text, margin_vision)
    weak = torch.minimum(margin_text, margin_vision)
    return (strong.detach() if stop_gradient else strong) - weak

def penalty_weight(gap: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """w_u,pen = 1 + beta * softplus(alpha * gap) (Eq. 9): (B,) from a gap (B,) and positive scalars alpha and beta."""
    return 1 + beta * torch.nn.functional.softplus(alpha * gap)

def relational_topology(sim_text: torch.Tensor, sim_vision: torch.Tensor, tau: float) -> torch.Tensor:
    """L_CRTR (Eqs. 11-13): the mean over the batch of (KL(P_T || P_V) + KL(P_V || P_T)) / 2, P_m the softmax of a
    user's row of sim_m / tau. Its trivial minimum is two constant spaces. At tau .1 a model goes there, text's constant
    opposite to vision's: they cancel in Eq. 2, and the rests rank. A_neg near 0 and `mean_cosine` near -1 show it."""
    log_p_text = (sim_text / tau).log_softmax(dim=1)      # Eq. 12, in log space: never log(p / q)
    log_p_vision = (sim_vision / tau).log_softmax(dim=1)
    both_kl = (log_p_text.exp() - log_p_vision.exp()) * (log_p_text - log_p_vision)
    return both_kl.sum(dim=1).mean() / 2

def mean_cosine(e_text: torch.Tensor, e_vision: torch.Tensor) -> torch.Tensor:
    """The cosine of the mean text and the mean vision embedding of items (n, D); near -1 they cancel in Eq. 2."""
    return torch.cosine_similarity(e_text.mean(dim=0), e_vision.mean(dim=0), dim=0)

def objective(method: Method, z: dict, e: dict, mask: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor,
              tau: float, tau_crtr: float, lam: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L = L_WPCL + lam * L_CRTR (Eq. 14) or, by `method`, a part of it (Table 5), from the embeddings z of the users'
    histories and e of their targets, {"text", "vision", "fused"}: (B, D). Returns it and, for the log, its terms."""
    sim = {space: cosine(z[space], e[space]) for space in z}
    weight, terms, loss = torch.ones_like(sim["fused"][0]), {}, 0.0
    if method.contrast == "wpcl":
        margins = [discriminative_margin(sim[modality], mask) for modality in BOTH]
        gap = modality_gap(*margins, method.stop_gradient)
        weight = penalty_weight(gap, alpha, beta)
        terms = {"gap": gap.mean(), "weight": weight.mean(), "alpha": alpha, "beta": beta}
    if method.contrast:
        loss = terms[method.contrast] = info_nce(sim["fused"], mask, weight, tau)
    if method.topology:
        terms["crtr"] = relational_topology(sim["text"], sim["vision"], tau_crtr)
        loss = loss + lam * terms["crtr"]
    if method.sda:
        terms["cmsa"] = structural_alignment(e["text"], e["vision"], tau)
        loss = loss + lam * terms["cmsa"]
    return loss, {"loss": loss, **terms}


# Training (Sections 4.2.3, 5.1.1) -------------------------------------------------------------------------------------

class Penalty(torch.nn.Module):
    """The learnable alpha and beta of Eq. 9; we keep them positive through softplus and start them at 1. They only
    fall: a user's loss, log(1 + w R) with R = sum exp(negative) / exp(positive), grows with w, and w with both."""

    def __init__(self):
        super().__init__()
        self.raw = torch.nn.Parameter(torch.full((2,), math.log(math.e - 1)))  # softplus of it is 1

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha, beta: positive scalars."""
        return torch.nn.functional.softplus(self.raw).unbind()

def add_lora(encoder: Encoder, rank: int, alpha: int, dropout: float, checkpointing: bool) -> peft.PeftModel:
    """Put LoRA into the language layers: with alpha and beta all that is trained, since `load_vlm` freezes the rest."""
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_LAYERS)
    adapted = peft.get_peft_model(encoder.vlm, config)
    for layer in lora_layers(adapted) if dropout else []:
        layer.lora_dropout["default"] = Dropout(dropout)
    if checkpointing:
        encoder.vlm.get_decoder().activation_checkpointing_enable()
    return adapted

def training_samples(domain: Domain, length: int, most: int, seed: int) -> list[tuple[list[int], int, list[int]]]:
    """(history, target, all items before the target) of each user or, unless `most` is 0, of so many (Table 7)."""
    sequences = domain.sequences
    if most:
        sequences = random.Random(f"{seed} train users").sample(sequences, min(most, len(sequences)))
    return [(*data.leave_one_out(sequence, "train", length), sequence[:-3]) for sequence in sequences]

def shuffled_batches(users: int, batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The users of an epoch in random order, B at a time; the last, incomplete batch is dropped."""
    order = torch.randperm(users, generator=torch.Generator().manual_seed(seed * 1000 + epoch)).tolist()
    return [order[k:k + batch] for k in range(0, users - batch + 1, batch)]

def batch_loss(encoder: Encoder, method: Method, batch: list[tuple], alpha: torch.Tensor, beta: torch.Tensor,
               tau: float, tau_crtr: float, lam: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Encode the histories and the targets of B `training_samples` in each modality; `objective`'s loss and terms."""
    histories, targets, earlier = zip(*batch)
    prompts = [encoder.prompt(items, modality) for modality in method.modalities
               for items in (*histories, *([target] for target in targets))]
    states = encoder(prompts).view(len(method.modalities), 2, len(batch), -1)           # (modalities, z and e, B, D)
    z = fuse(dict(zip(method.modalities, states[:, 0])))                                           # (B, D) each
    e = fuse(dict(zip(method.modalities, states[:, 1])))
    mask = to_device(negative_mask(torch.tensor(targets), pad(earlier, -1)), encoder.device)       # (B, B)
    loss, terms = objective(method, z, e, mask, alpha, beta, tau, tau_crtr, lam)
    if "text" in z and "vision" in z:  # Eq. 2 adds raw vectors: the longer one speaks louder
        terms["norm_ratio"] = z["text"].norm(dim=1).mean() / z["vision"].norm(dim=1).mean()
        terms["mean_cosine"] = mean_cosine(e["text"], e["vision"])
    return loss, terms

def train(encoder: Encoder, lora: torch.nn.Module, domain: Domain, valid: "Evaluation", config: Config,
          folder: Path) -> tuple[dict, dict]:
    """Train the encoder's parameters `lora`, from the checkpoint in `folder` on if there is one; leave them as they
    were after the epoch with the best validation N@10. Returns its scores and those of the untrained model."""
    method, penalty = METHODS[config.method], Penalty().to(encoder.device)
    optimizer = torch.optim.AdamW([{"params": lora.parameters(), "lr": config.lr},
                                   {"params": penalty.parameters(), "lr": config.penalty_lr}], weight_decay=0.0)
    samples = training_samples(domain, config.history, config.train_users, config.seed)
    taus_and_lam, steps = (config.tau, config.tau_crtr, config.lam), len(samples) // config.batch  # steps in an epoch
    plan = ((epoch, users) for epoch in range(1, config.epochs + 1)
            for users in shuffled_batches(len(samples), config.batch, config.seed, epoch))
    state = {"optimizer": optimizer, "lora": lora, "penalty": penalty}
    if (progress := load_checkpoint(folder, state)) is None:
        scores = validate(encoder, method, valid)                                          # epoch 0
        progress = {"step": 0, "untrained": scores, "best": scores, "kept": copy.deepcopy(lora.state_dict())}
    plan, log = itertools.islice(enumerate(plan, 1), progress["step"], None), Log(folder / LOG, encoder, config, steps)
    with stop_requests() as stop:  # Ctrl-C: end the step, save, leave
        for step, (epoch, users) in bar(plan, "train", config.epochs * steps, initial=progress["step"], unit="step"):
            encoder.vlm.train()
            batch, (alpha, beta) = [samples[user] for user in users], penalty()
            loss, terms = batch_loss(encoder, method, batch, alpha, beta, *taus_and_lam)
            loss.backward()
            terms["grad_norm"] = torch.nn.utils.get_total_norm([weight.grad for weight in lora.parameters()])
            optimizer.step()
            optimizer.zero_grad()
            if config.gradients_every and step % config.gradients_every == 0:
                log.append({"step": step} | gradient_cosines(encoder, method, batch, *penalty(), *taus_and_lam))
            log.add(step, epoch, terms)
            if step % steps == 0:
                scores = validate(encoder, method, valid)
                if scores["N@10"] > progress["best"]["N@10"]:
                    progress |= {"best": scores, "kept": copy.deepcopy(lora.state_dict())}
            if step % steps == 0 or step % config.save_every == 0 or stop.is_set():
                log.write()
                save_checkpoint(folder, state, progress | {"step": step})
            if stop.is_set():
                raise KeyboardInterrupt
    lora.load_state_dict(progress["kept"])
    return progress["best"], progress["untrained"]


# Evaluation (Section 5.1.3): leave-one-out, 100 negatives -------------------------------------------------------------

def target_rank(target: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The target's rank (U,), 1 is best, from its score (U,) and those of the others (U, C), of which -inf does not
    compete. A tie counts half: a constant score gets rank 51 of 101, no hit. Raises FloatingPointError if a score is
    NaN or infinite: it must not pass for a hit."""
    if not (target.isfinite().all() and (others < torch.inf).all()):
        raise FloatingPointError("a score is not finite: the model has diverged; lower --lr or raise --tau")
    return 1 + (others > target[:, None]).sum(dim=1) + (others == target[:, None]).sum(dim=1) / 2

def hits_and_ndcg(ranks: torch.Tensor) -> dict[str, float | None]:
    """H@k and N@k for k = 10, 20 from ranks (U,), 1 is best; None if there are no users. With one target, the ideal DCG
    is 1, so NDCG is the gain 1 / log2(1 + rank) of the target if it is among the first k."""
    table = {}
    for k in (10, 20):
        hit = (ranks <= k).double()
        table[f"H@{k}"] = hit.mean().item() if len(ranks) else None
        table[f"N@{k}"] = (hit / (1 + ranks.double()).log2()).mean().item() if len(ranks) else None
    return table

class Evaluation(NamedTuple):
    """Histories, targets and candidates of a split's U users: the same for every method with the same seed."""
    histories: list[list[int]]
    targets: torch.Tensor      # (U,)
    negatives: torch.Tensor    # (U, 100)
    sequences: list[list[int]]

    def rank(self, z: torch.Tensor, e: torch.Tensor, dot: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The ranks (U,) of the targets against the negatives, and (U,) against the catalogue without the user's other
        items, by cosine similarity or inner product (`dot`) of z (U, D) and e (N, D)."""
        ranks, full = [], []
        for rows in torch.arange(len(z)).split(1024):
            scores = z[rows] @ e.T if dot else cosine(z[rows], e)                                  # (1024, N)
            target = scores.gather(1, self.targets[rows, None]).squeeze(1)                         # (1024,)
            ranks.append(target_rank(target, scores.gather(1, self.negatives[rows])))
            for row, user in enumerate(rows.tolist()):
                scores[row, self.sequences[user]] = -torch.inf
            full.append(target_rank(target, scores))
        return torch.cat(ranks), torch.cat(full)

def make_evaluation(domain: Domain, split: str, length: int, seed: int) -> Evaluation:
    """All users for "test", at most 2,000 for "valid"."""
    everyone = range(len(domain.user_ids))
    users = data.validation_users(len(everyone), seed) if split == "valid" else everyone
    sequences = [domain.sequences[user] for user in users]
    histories, targets = zip(*(data.leave_one_out(sequence, split, length) for sequence in sequences))
    negatives = [data.draw_negatives(domain.user_ids[user], sequence, len(domain.item_ids), split, seed)
                 for user, sequence in zip(users, sequences)]
    return Evaluation(list(histories), torch.tensor(targets), torch.tensor(negatives), sequences)

def validate(encoder: Encoder, method: Method, valid: Evaluation) -> dict[str, float]:
    """Embed the catalogue and the validation histories with the encoder as it is; H@k and N@k."""
    e = encoder.embed(encoder.catalogue, method.modalities)
    z = encoder.embed(valid.histories, method.modalities)
    scores = hits_and_ndcg(valid.rank(z["fused"], e["fused"])[0])
    tqdm.write(f"validation on {len(valid.targets):,} users: N@10 {scores['N@10']:.4f}, H@10 {scores['H@10']:.4f}")
    return scores


# Loading and speed ----------------------------------------------------------------------------------------------------

PASS_TOKENS = {"cuda": 16_384, "cpu": 2_048}  # at most in a forward pass: fill a GPU, stay in a CPU's cache
PADDING = 256                                 # tokens of padding in a forward pass that cost as much as another pass
GOOD_MODEL = "give a folder written by save_pretrained, a name on the hub, or tiny"
FAMILIES = {  # of vision-language models: what stands before and after a picture's tokens; the model tells the rest
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), ("<|vision_start|>", "<|vision_end|>")),
    **dict.fromkeys(("smolvlm", "idefics3"), ("<fake_token_around_image><global-img>", "<fake_token_around_image>")),
    **dict.fromkeys(("llava", "llava_onevision"), ("", "")), "internvl": ("<img>", "</img>"),
    "gemma3": ("\n\n<start_of_image>", "<end_of_image>\n\n")}
DECODER = r".*(language|text)_model\."  # bare names would put LoRA into the vision tower too
LORA_LAYERS = DECODER + r".*\.(q|k|v|o|gate|up|down|in|out)_proj\w*"
EXPERTS = 4  # in LoRA's rank, for sda

bar = functools.partial(tqdm, leave=False, disable=None)  # no bars where the output is not a terminal

@contextlib.contextmanager
def readable(what: str, remedy: str) -> Iterator[None]:
    """Turn whatever the block raises into one InputError, "what: why; remedy": a damaged file has many ways to fail."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{what}: {reason}; {remedy}") from None

def check_model(model: str, revision: str, image_size: int) -> int:
    """The side in pixels to scale pictures to, 0 for the tower's own. Raises InputError if the model does not fit."""
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise InputError(f"--model {model}: there is no such folder; {GOOD_MODEL}")
    with readable(f"--model {model} cannot be loaded", GOOD_MODEL):
        config = transformers.PreTrainedConfig.get_config_dict(model, revision=revision)[0]
        family = config.get("model_type", "unknown") + "+pixtral" * ("pixtral" in str(config))  # tokens vary
        if family not in FAMILIES:
            raise InputError(f"--model {model} is of the family {family}; these fit: {', '.join(FAMILIES)}")
        vision = transformers.AutoConfig.from_pretrained(model, revision=revision).vision_config
    if not hasattr(vision, "spatial_merge_size"):
        return 0
    if image_size % (side := vision.patch_size * vision.spatial_merge_size):
        raise InputError(f"--image-size {image_size}: a token covers {side} pixels, take a multiple such as {6 * side}")
    return image_size

def load_vlm(model: str, revision: str = "main", device: str = "cpu"):
    """(vlm without lm_head, tokenizer, image processor) of one of FAMILIES; bfloat16 on CUDA, float32 on a CPU. Raises
    InputError if there is no such model or a part of it is missing."""
    print(f"loading {model}")
    hub, dtype = {"revision": revision, "trust_remote_code": False}, torch.bfloat16 if device == "cuda" else torch.float
    with readable(f"--model {model} cannot be loaded", GOOD_MODEL):
        vlm, report = transformers.AutoModel.from_pretrained(model, dtype=dtype, use_safetensors=True,
                                                             output_loading_info=True, **hub)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, **hub)
        processor = transformers.AutoImageProcessor.from_pretrained(model, backend="pil", **hub)  # needs no torchvision
        if report["missing_keys"]:  # transformers would go on with random weights
            raise ValueError(f"its weights lack {len(report['missing_keys'])}, such as {min(report['missing_keys'])}")
        if tokenizer.eos_token_id is None or vlm.config.image_token_id not in tokenizer.get_added_vocab().values():
            raise ValueError("its tokenizer has no end token, or another picture token than its config")
    vars(processor).update(crop_to_patches=False, do_image_splitting=False, do_pan_and_scan=False)  # no tiles
    if device == "cpu" and vlm.num_parameters() > 3e8:
        print("note: without a CUDA GPU a model of this size takes hours; --model tiny is made for a CPU")
    return vlm.to(device).eval().requires_grad_(False), tokenizer, processor

def family_arguments(vlm, ids: torch.Tensor, is_picture: torch.Tensor, features: torch.Tensor, deep: Sequence) -> tuple:
    """What takes the embeddings of ids (B, L) with n pictures (n, P, D), mostly the decoder, and its other inputs."""
    lm, arguments = vlm.get_decoder(), {}
    if hasattr(vlm, "get_rope_index"):  # Qwen: a picture's tokens have positions in time, height and width
        side = vlm.config.vision_config.spatial_merge_size * math.isqrt(features.shape[1])         # in patches
        types, grid = (ids == vlm.config.image_token_id).int(), torch.tensor([[1, side, side]] * len(features))
        positions, _ = vlm.get_rope_index(ids, types, grid)                                        # (3, B, L)
        arguments["position_ids"] = to_device(positions, features.device)
    if deep:  # Qwen3-VL's DeepStack: they are added after the first layers
        arguments |= {"visual_pos_masks": is_picture, "deepstack_visual_embeds": [x.flatten(0, 1) for x in deep]}
    if "token_type_ids" in inspect.signature(vlm.forward).parameters:
        lm, arguments["token_type_ids"] = vlm, is_picture.int()  # Gemma 3: a picture's tokens see each other
    return lm, arguments

def build_encoder(domain: Domain, model: str, image_size: int, cache: str | Path, revision: str = "main",
                  device: str = "cpu", history: int = 10, modalities: tuple[str, ...] = BOTH) -> Encoder:
    """An Encoder for a domain; `cache` keeps its pictures' features. Raises InputError if a prompt is too long."""
    size, (vlm, tokenizer, processor) = check_model(model, revision, image_size), load_vlm(model, revision, device)
    with readable(f"--model {model} cannot read a picture", "does its preprocessor_config.json belong to it?"):
        encoder = Encoder(vlm, tokenizer, domain.titles, encode_pictures(vlm, processor, domain.pictures[:1], size))
    tokens, context = encoder.features.shape[1], vlm.config.get_text_config().max_position_embeddings
    print(f"a picture takes {tokens} tokens" + (f"; {vlm.config.model_type} ignores --image-size" if not size else ""))
    history = min(history, max(map(len, domain.sequences)) - 1)
    longest = max(encoder.catalogue, key=lambda item: len(encoder.prompt(item, "text").ids)) * history
    if (length := max(len(encoder.prompt(longest, modality).ids) for modality in modalities)) > context:
        raise InputError(f"{history} items can take {length:,} tokens, more than the {context:,} that {model} holds: "
                         "take a shorter --history" + (" or a smaller --image-size" if size else ""))
    encoder.features = cached_features(Path(cache), vlm, processor, domain, size)
    vlm.get_encoder(modality="image").to("meta")  # not needed again: its memory is free
    return encoder

def load_adapter(encoder: Encoder, folder: str | Path) -> None:
    """Put a trained adapter into the encoder. Raises InputError if there is none, it is damaged or does not fit."""
    path = Path(folder, "adapter_model.safetensors")
    with readable(f"--adapter {folder} does not fit", "give the folder adapter/ of a run with the same --model"):
        if not path.exists() or peft.PeftConfig.from_pretrained(folder).peft_type != "LORA":
            raise ValueError("there is no LoRA in it, as adapter_config.json and adapter_model.safetensors")
        adapted, tensors = peft.PeftModel.from_pretrained(encoder.vlm, folder), safetensors.torch.load_file(path)
        if any(name.endswith(".gates") for name in tensors):  # of MoDA, which PEFT does not know
            add_gates(encoder, checkpointing=False)
            peft.set_peft_model_state_dict(adapted, tensors)
        if set(tensors) != set(peft.get_peft_model_state_dict(adapted)):
            raise ValueError("it lacks tensors of the model's layers, or has others")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("it holds values that are not finite")

def square_picture(path: Path, side: int) -> Image.Image:
    """A picture of side x side pixels or, for 0, of its own longer side; its ratio kept by white margins."""
    picture = data.load_picture(path)
    return ImageOps.pad(picture, [side or max(picture.size)] * 2, color="white")

@torch.no_grad()
def encode_pictures(vlm, processor, paths: list[Path], image_size: int, batch: int = 16) -> torch.Tensor:
    """The vision tower's features of N pictures, P tokens each: (N, P, D) on the CPU; for Qwen3-VL (N, P, K D), with
    the K - 1 levels of DeepStack beside them. For an `image_size` of 0, the processor scales to the tower's own."""
    accepted = inspect.signature(vlm.get_image_features).parameters
    for k in bar(range(0, len(paths), batch), "encode pictures"):
        pictures = [square_picture(path, image_size) for path in paths[k:k + batch]]
        pictures *= 1 + (len(pictures) == 1)  # LLaVA-OneVision would cut one that is alone into tiles
        pixels = processor(images=[pictures], do_resize=not image_size, return_tensors="pt").to(vlm.device)
        encoded = vlm.get_image_features(**{name: pixels[name] for name in accepted if name in pixels})
        levels = [encoded.pooler_output, *(getattr(encoded, "deepstack_features", None) or [])]
        levels = torch.cat([torch.cat(list(level)) for level in levels], dim=-1).unflatten(0, (len(pictures), -1))
        if k == 0:
            features = torch.empty(len(paths), *levels.shape[1:], dtype=vlm.dtype)
        features[k:k + batch] = levels[:len(paths) - k].cpu()
    return features

def cached_features(folder: Path, vlm, processor, domain: Domain, image_size: int) -> torch.Tensor:
    """`encode_pictures` of a domain, once for all methods and seeds: kept in `folder`/features-<key>.safetensors and
    mapped from there. The key covers the weights outside the decoder, which are frozen, the processor, the domain."""
    key = hashlib.blake2b(f"{domain.digest} {image_size} padded {processor.to_json_string()}".encode(), digest_size=8)
    for name, weight in vlm.state_dict().items():
        if not re.match(DECODER, name):
            key.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    path = folder / f"features-{key.hexdigest()}.safetensors"
    if not path.exists():
        with data.lock(path, wait=True):  # of several runs that start together, one encodes
            if not path.exists():
                features = encode_pictures(vlm, processor, domain.pictures, image_size)
                with data.whole_file(path) as partial:
                    safetensors.torch.save_file({"features": features}, partial)
    with readable(f"{path} is damaged", "delete it"):
        return safetensors.torch.load_file(path)["features"]

def batches_by_length(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Yield the indices of prompts of similar length, so many that the padded batch has at most `budget` tokens, and
    at most PADDING of them are padding."""
    rows, tokens = [], 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = (len(rows) + 1) * lengths[row]
        if rows and (padded > budget or padded - tokens - lengths[row] > PADDING):
            yield rows
            rows, tokens = [], 0
        rows.append(row)
        tokens += lengths[row]
    if rows:
        yield rows

def pad(sequences: Sequence[list[int]], value: int) -> torch.Tensor:
    """(B, L) from B lists, padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, sequences)), batch_first=True, padding_value=value)

def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on `device`, without waiting for what the device is still computing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

class Dropout(torch.nn.Dropout):
    """Dropout at a quarter of the cost on a CPU, where torch draws a number for each element: 16 bits decide."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x with a share p of its elements set to 0 and the others divided by 1 - p; x itself in evaluation."""
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        kept = bits[:x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return x * kept / (1 - self.p)

def lora_layers(vlm) -> list[torch.nn.Module]:
    return [layer for layer in vlm.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]

@contextlib.contextmanager
def folded_lora(vlm) -> Iterator[None]:
    """While the block runs, LoRA's updates are part of the weights, and cost nothing; after it they are as before, to
    the bit. Not in bfloat16, which would round small updates away."""
    with contextlib.ExitStack() as undo:
        for layer in lora_layers(vlm):
            gated = hasattr(layer.lora_A["default"], "gates")  # MoDA's update differs between the modalities
            if layer.weight.dtype == torch.float32 and not layer.disable_adapters and not gated:
                undo.callback(setattr, layer.weight, "data", layer.weight.data)
                undo.callback(layer.unmerge)  # before the line above: the last one is undone first
                layer.weight.data = layer.weight.data.clone()
                layer.merge()
        yield


# The command line -----------------------------------------------------------------------------------------------------

BRINGS = {("domain", "sample"): {"model": "tiny"},  # what the choice of a domain or a model brings along; a flag wins
          ("model", "tiny"): {"lr": 1e-3, "image_size": 56}}

def flag(name: str) -> str:
    return "--" + name.replace("_", "-")

def is_trained(method: Method) -> bool:
    return bool(method.contrast or method.topology)

def parse_config(argv: list[str] | None = None) -> tuple[list[Config], list[str]]:
    """The command line as a Config for each method, --embeddings and seed, and the item ids of --recommend."""
    notes = [f"{choice} brings " + ", ".join(f"{flag(name)} {value}" for name, value in row.items())
             for (_, choice), row in BRINGS.items()]
    notes.append("sasrec, gru4rec, mean-pool ignore the flags for encoder and training but --history and --train-users")
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[1], epilog="; ".join(notes))
    for field in dataclasses.fields(Config):
        text, argument = f"{field.metadata['help']} (default: {field.default})", field.metadata["argument"]
        metavar = None if "choices" in argument else field.type.__name__
        kind = {"action": "store_true"} if field.type is bool else {"type": field.type, "metavar": metavar, **argument}
        default = [field.default] if "nargs" in argument else field.default
        parser.add_argument(flag(field.name), default=default, help=text, **kind)
    parser.add_argument("--seeds", type=int, default=1, metavar="int", help="so many from --seed on (default: 1)")
    parser.add_argument("--recommend", nargs="+", default=[], metavar="item_id",
                        help="with the flags of a finished run: its top ten after this history, oldest first")
    for (name, choice), row in BRINGS.items():
        if getattr(parser.parse_args(argv), name) == choice:
            parser.set_defaults(**row)
    flags, configs = vars(parser.parse_args(argv)), []
    history, count = flags.pop("recommend"), flags.pop("seeds")
    if count < 1:
        raise InputError(f"--seeds {count}: it has to be at least 1")
    seeds = range(flags["seed"], flags["seed"] + count)
    for method, file, seed in itertools.product(flags["method"], flags["embeddings"], seeds):
        fill = lambda path: path.replace("{method}", method).replace("{seed}", str(seed))
        paths = {"embeddings": fill(file), "adapter": fill(flags["adapter"])}
        configs.append(check_config(Config(**flags | paths | {"method": method, "seed": seed})))
    return list(dict.fromkeys(configs)), history

def check_config(config: Config) -> Config:
    """The same. Raises InputError, with the flag's name, for values that make no sense alone or together."""
    for field in dataclasses.fields(Config):
        value, (least, most) = getattr(config, field.name), field.metadata["range"]
        if least is not None and not least <= value <= most:
            raise InputError(f"{flag(field.name)} {value}: it has to be at least {least} and at most {most}")
    method = METHODS[config.method]
    if config.method == "mean-pool" and not config.embeddings:
        raise InputError("--method mean-pool needs item vectors: --embeddings FILE")
    if config.embeddings and method.modalities:
        raise InputError(f"--embeddings is for sasrec, gru4rec and mean-pool, not for --method {config.method}")
    if method.sda and config.lora_rank % EXPERTS:
        raise InputError(f"--lora-rank {config.lora_rank}: the {EXPERTS} experts of sda share it, take a multiple")
    if config.adapter and not is_trained(method):
        raise InputError(f"--adapter is for a method that trains one, not for --method {config.method}")
    return config


# A run: its log, its checkpoint, its folder ---------------------------------------------------------------------------

CHANCE = hits_and_ndcg(torch.arange(1, data.NEGATIVES + 2))  # what a random order of the candidates scores on average
CARD = """---\nbase_model: {config.model}\nlibrary_name: peft\n---
LoRA of VLM2Rec (arXiv 2603.17450), method {config.method}, for {config.model}, trained on {name}. To load it:
`peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained("{config.model}"), "this folder")`.
The last token's state embeds a prompt: opening token, titles or pictures, a newline between two, end token."""
GATES = "\nNot this one: PEFT would drop the gates of SDA's MoDA without a word. Take `load_adapter` of vlm2rec.py."
LOG, CHECKPOINT, TABLE = "log.jsonl", "checkpoint.pt", "table.md"
RUN_FILES = [LOG, CHECKPOINT, TABLE, "config.json", "metrics.json", "ranks.csv", "dropped.csv", "items.safetensors",
             "users.safetensors", "recommendations.png", "recommended.png", "adapter/adapter_model.safetensors",
             "adapter/adapter_config.json", "adapter/README.md"]
FREE = {"domain", "data_dir", "mirror", "out", "restart", "log_every", "save_every", "checkpointing", "source_digest"}
WAY_OUT = "--restart replaces it, another --out leaves it alone"

class Run:
    """One method with one seed on one domain: `--method`, `--seed` and the rest as `config`."""

    def __init__(self, config: Config):
        """Check, prepare and read what the run needs, and say what it is."""
        if config.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no CUDA GPU; install a CUDA build of torch, or --device cpu")
        self.config, self.method, data_dir = config, METHODS[config.method], Path(config.data_dir)
        self.device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
        data.check_domain(config.domain, data_dir)
        self.model = model = data.prepare_model(config.model, data_dir)
        if self.method.modalities:  # before the data, which may take hours to fetch
            self.config = dataclasses.replace(config, image_size=check_model(model, config.revision, config.image_size))
        self.source = data.prepare_domain(config.domain, data_dir, config.mirror)
        self.domain = domain = data.read_domain(self.source)
        print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}; "
              f"{self.device}, {config.method}, seed {config.seed}\n{data.describe(domain)}")
        if (users := min(config.train_users or math.inf, len(domain.user_ids))) < config.batch:
            raise InputError(f"{domain.name}: {users} users to train on, less than one --batch of {config.batch}")
        self.name = config.method + ("+zero-shot" if config.adapter else "")  # in a table
        if config.embeddings:
            path = Path(config.embeddings).resolve()
            self.name += "+" + re.sub(r"-seed\d+$", "", path.parent.name if path.stem == "items" else path.stem)
        self.folder = Path(config.out, domain.name, f"{self.name}-seed{config.seed}")

    @functools.cached_property
    def settings(self) -> dict:
        """config.json: every setting, versions, and digests of the data, the source and a given adapter or vectors."""
        def digest(paths) -> str:
            content = b"".join(path.read_bytes() for path in sorted(paths) if path.is_file())
            return hashlib.blake2b(content, digest_size=16).hexdigest()

        adapter, vectors = Path(self.config.adapter).glob("adapter_*"), [Path(self.config.embeddings)]
        return {**dataclasses.asdict(self.config), "device": self.device, "python": sys.version.split()[0],
                **{package.__name__: package.__version__ for package in (torch, transformers, peft, PIL)},
                "data_digest": self.domain.digest, "source_digest": digest([Path(__file__), Path(data.__file__)]),
                "given_digest": digest(adapter if self.config.adapter else vectors)}

    def is_begun(self) -> bool:
        """Is it in its folder, to go on with or to show? Raises InputError, which names what differs, if one with other
        settings is there, apart from FREE ones, which change no number."""
        path, there = self.folder / "config.json", [name for name in RUN_FILES if (self.folder / name).exists()]
        if there and not path.exists():
            raise InputError(f"{self.folder} holds {there[0]} but no config.json, which tells whose it is. {WAY_OUT}")
        if not {CHECKPOINT, TABLE} & set(there):
            return False  # nothing, or what came to nothing
        with readable(f"{path} is damaged", WAY_OUT):
            before = {**json.loads(path.read_text("utf-8"))}
        differing = {name: f"{name} was {before.get(name)!r}, now {value!r}"
                     for name, value in self.settings.items() if before.get(name) != value}
        if "source_digest" in differing:
            print(f"note: {self.folder} was begun with another version of vlm2rec.py or data.py")
        encoded = ["items.safetensors", "users.safetensors"] if self.method.modalities else []
        if TABLE in there and (lost := {"metrics.json", "ranks.csv", *encoded} - set(there)):
            raise InputError(f"{self.folder} is finished, but {min(lost)} is gone. {WAY_OUT}")
        if told := [text for name, text in differing.items() if name not in FREE]:
            raise InputError(f"{self.folder} holds a run with other settings: {'; '.join(told)}. {WAY_OUT}")
        return True

    def encoder(self, adapter: str | Path) -> Encoder:
        """The model for the items of the domain, with an adapter unless it is ""."""
        encoder = build_encoder(self.domain, self.model, self.config.image_size, self.folder.parent,
                                self.config.revision, self.device, self.config.history, self.method.modalities)
        if adapter:
            load_adapter(encoder, adapter)
            if self.method.sda != hasattr(lora_layers(encoder.vlm)[0].lora_A["default"], "gates"):
                raise InputError(f"--adapter {adapter} was {'not ' * self.method.sda}trained by --method sda")
        return encoder

def execute(run: Run) -> None:
    """Train and evaluate, or go on with it, or show its tables if they are there already."""
    config, folder = run.config, run.folder
    with data.lock(folder):
        goes_on = not config.restart and run.is_begun()
        if goes_on and (table := folder / TABLE).exists():  # the last file that a run writes
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(table.stat().st_mtime))
            print(f"\n{table.read_text('utf-8')}\n{folder} is finished since {when}; --restart repeats it")
            return
        encoder = run.encoder(config.adapter) if run.method.modalities else None
        vectors = read_vectors(Path(config.embeddings), run.domain, run.source) if config.embeddings else None
        if not goes_on:
            for name in RUN_FILES:
                (folder / name).unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            data.write_csv(folder / "dropped.csv", ["item_id", "reason", "detail"], run.domain.dropped_items)
        write_text(folder / "config.json", json.dumps(run.settings, indent=1))
        splits = [make_evaluation(run.domain, split, config.history, config.seed) for split in ("test", "valid")]
        tables = run_embedder(run, *splits, encoder) if encoder else run_downstream(run, *splits, vectors)
        write_text(folder / TABLE, tables)
        (folder / CHECKPOINT).unlink(missing_ok=True)
    print(f"\n{tables}\n\nwrote {folder}")

def run_embedder(run: Run, test: Evaluation, valid: Evaluation, encoder: Encoder) -> str:
    """Train if the method does and no adapter was given, score the test split, write the results, return the tables."""
    config, domain, folder, method = run.config, run.domain, run.folder, run.method
    if config.adapter or not is_trained(method):
        scores, untrained = validate(encoder, method, valid), None
    else:
        torch.manual_seed(config.seed)
        checkpointing = config.checkpointing == "on"
        adapted = add_lora(encoder, config.lora_rank, config.lora_alpha, config.lora_dropout, checkpointing)
        if method.sda:
            add_gates(encoder, checkpointing)
        print(f"trainable parameters: {adapted.get_nb_trainable_parameters()[0]:,}, all LoRA in the language layers")
        lora = torch.nn.ParameterList(weight for weight in adapted.parameters() if weight.requires_grad)
        scores, untrained = train(encoder, lora, domain, valid, config, folder)
        adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
        (folder / "adapter" / "adapter_model.safetensors").chmod((folder / "config.json").stat().st_mode)  # not 0600
        write_text(folder / "adapter" / "README.md", CARD.format(config=config, name=domain.name) + GATES * method.sda)
    clock = time.perf_counter()
    e = encoder.embed(encoder.catalogue, method.modalities)
    print(f"{time.perf_counter() - clock:.1f} s to embed the {len(domain.item_ids):,} items, "
          f"peak memory {peak_gib():.2f} GiB")
    z = encoder.embed(test.histories, method.modalities)
    for name, spaces, ids in (("item", e, domain.item_ids), ("user", z, domain.user_ids)):
        tensors = {space: spaces[space] for space in (*BOTH, "fused") if space in spaces}
        with data.whole_file(folder / f"{name}s.safetensors") as partial:
            safetensors.torch.save_file(tensors, partial, {f"{name}_ids": json.dumps(ids)})
    contact_sheet(folder / "recommendations.png", domain, test, z, e)
    tables = write_results(run, test, test.rank(z["fused"], e["fused"]), scores, untrained)
    if len(method.modalities) == 2:
        shape = {space: geometry(z[space], e[space], test.targets, test.negatives) for space in z}
        means = f"cosine of the items' mean text and mean vision: {mean_cosine(e['text'], e['vision']):.2f}"
        tables += "\n\n".join(["", as_table({"N@10 of": queries(z, e, test)}), as_table(shape), f"{means}\n{LEGEND}"])
    return tables

def run_downstream(run: Run, test: Evaluation, valid: Evaluation, vectors: torch.Tensor | None) -> str:
    """`run_embedder` for a model of item ids or of given item vectors."""
    config, domain = run.config, run.domain
    if config.method == "mean-pool":
        pooled = lambda split: torch.stack([vectors[history].mean(dim=0) for history in split.histories])
        ranks, scores = test.rank(pooled(test), vectors), hits_and_ndcg(valid.rank(pooled(valid), vectors)[0])
    else:
        samples = training_samples(domain, config.history, config.train_users, config.seed)
        torch.manual_seed(config.seed)
        model = SequenceRecommender(config.method, len(domain.item_ids), vectors, config.history).to(run.device)
        scores, ranks = train_downstream(model, samples, valid, config.seed), model.rank(test)
    return write_results(run, test, ranks, scores)

def write_results(run: Run, test: Evaluation, ranks: tuple, valid: dict, untrained: dict | None = None) -> str:
    """Write ranks.csv and metrics.json, as README.md describes them; return the verdict and the tables."""
    config, domain, name = run.config, run.domain, run.name
    columns = ([f"{rank:g}" for rank in column.tolist()] for column in ranks)
    targets = [domain.item_ids[item] for item in test.targets]
    data.write_csv(run.folder / "ranks.csv", ["user_id", "item_id", "rank", "rank_full"],
                   zip(domain.user_ids, targets, *columns))
    untied, seen = ~torch.tensor(domain.tied), training_counts(domain)
    popularity = hits_and_ndcg(target_rank(seen[test.targets], seen[test.negatives]))
    scores = dict(zip(("test", "test_full", "test_untied"), map(hits_and_ndcg, (*ranks, ranks[0][untied]))))
    write_text(run.folder / "metrics.json", json.dumps({
        "domain": domain.name, "method": name, "seed": config.seed, "model": config.model,
        "users": len(domain.user_ids), "items": len(domain.item_ids), **scores, "valid": valid,
        "popularity": popularity, "untrained": untrained}, indent=1))
    rows = {"chance": CHANCE, "popularity": popularity,
            name: scores["test"], f"{name}, the {int(untied.sum()):,} users without a tie": scores["test_untied"],
            f"{name}, against all {len(domain.item_ids):,} items": scores["test_full"],
            "before training, validation": untrained, f"{name}, validation": valid}
    return "\n\n".join([verdict(name, scores["test"], popularity, valid, untrained), as_table(rows, "test"),
                        as_table(by_frequency(seen[test.targets], ranks[0]))])

def verdict(name: str, test: dict, popularity: dict, valid: dict, untrained: dict | None) -> str:
    """Did the run learn something? In one or two lines, by N@10."""
    ratios = {"popularity": test["N@10"] / (popularity["N@10"] or math.nan)}
    if untrained:
        ratios["the untrained model (validation)"] = valid["N@10"] / (untrained["N@10"] or math.nan)
    line = f"{name}: N@10 {test['N@10']:.4f}, " + ", ".join(f"{ratio:.2f} times {of}" for of, ratio in ratios.items())
    if not all(ratio > 1 for ratio in ratios.values()):
        line += "\nwarning: no better than that; usual reasons: random weights, too few users, an unfit --lr"
    return line

def training_counts(domain: Domain) -> torch.Tensor:
    """(N,) how many users have each item before their validation target."""
    items = torch.tensor([item for sequence in domain.sequences for item in sequence[:-2]])
    return items.bincount(minlength=len(domain.item_ids)).float()

def by_frequency(seen: torch.Tensor, ranks: torch.Tensor) -> dict[str, dict]:
    """H@k and N@k by how often each target was seen before the users' last two items (Fig. 3), both (U,)."""
    rows = {}
    for low, high, words in ((0, 4, "0 to 4"), (5, 9, "5 to 9"), (10, 19, "10 to 19"), (20, 1e9, "20 times or more")):
        inside = (low <= seen) & (seen <= high)
        rows[f"targets seen {words} ({int(inside.sum()):,} users)"] = hits_and_ndcg(ranks[inside])
    return rows

def as_table(rows: dict[str, dict | None], title: str = "") -> str:
    """Named rows of scores as Markdown, without those that are None; a single score that is None is a dash."""
    text = lambda cell: "-" if cell is None else cell if isinstance(cell, str) else f"{cell:.4f}"
    columns = list(next(iter(rows.values())))
    lines = [[title, *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *map(text, row.values())] for name, row in rows.items() if row]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

def write_text(path: Path, text: str) -> None:
    with data.whole_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")

class Log:
    """log.jsonl: a line every --log-every steps and at the end of an epoch, with the mean of each term since the last
    one. Until then the values stay on the device, so that no step waits for them."""

    def __init__(self, path: Path, encoder: Encoder, config: Config, steps: int):
        self.path, self.encoder, self.config, self.steps = path, encoder, config, steps  # steps in an epoch
        self.pending, self.clock, self.tokens = [], time.perf_counter(), encoder.tokens

    def add(self, step: int, epoch: int, terms: dict[str, torch.Tensor]) -> None:
        """Note a step's terms (scalars), and write a line if one is due."""
        self.step, self.epoch, self.names = step, epoch, list(terms)
        self.pending.append(torch.stack([value.detach() for value in terms.values()]))
        if step % self.config.log_every == 0 or step % self.steps == 0:
            self.write()

    def write(self) -> None:
        """Write the line, restart the clock. Raises FloatingPointError, with the first bad step, if there is any."""
        if self.pending:
            values = torch.stack(self.pending).cpu()                                               # (steps, terms)
            if not (finite := values.isfinite().all(dim=1)).all():
                first = int(finite.int().argmin())
                raise FloatingPointError(f"step {self.step - len(values) + first + 1} is the first that is not finite: "
                                         f"{dict(zip(self.names, values[first].tolist()))}; lower --lr or raise --tau")
            means = {name: round(value, 6) for name, value in zip(self.names, values.mean(dim=0).tolist())}
            seconds = (time.perf_counter() - self.clock) / len(values)                             # for a step
            users, left = self.config.batch / seconds, seconds * (self.config.epochs * self.steps - self.step) / 60
            self.append({"step": self.step, "epoch": self.epoch, **means, "users_per_s": round(users, 2),
                         "tokens_per_s": round((self.encoder.tokens - self.tokens) / len(values) / seconds),
                         "peak_gib": round(peak_gib(), 3),
                         "epoch_minutes": round(seconds * self.steps / 60, 3), "minutes_left": round(left, 1)})
            tqdm.write(f"epoch {self.epoch}, step {self.step} of {self.config.epochs * self.steps}: "
                       f"loss {means['loss']:.4f}, {users:.3g} users/s, {left:.1f} minutes left")
        self.pending, self.clock, self.tokens = [], time.perf_counter(), self.encoder.tokens

    def append(self, line: dict[str, float]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

def save_checkpoint(folder: Path, state: dict, progress: dict) -> None:
    """Write all that a killed run needs to go on to the same numbers, on a CPU to the bit; whole or not at all."""
    content = io.BytesIO()  # a full disk has to show in our own write, as an OSError
    torch.save({"state": {name: part.state_dict() for name, part in state.items()}, "progress": progress,
                "log": (folder / LOG).stat().st_size, "random": torch.get_rng_state(),
                "random_gpu": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None}, content)
    with data.whole_file(folder / CHECKPOINT) as partial:
        partial.write_bytes(content.getbuffer())

def load_checkpoint(folder: Path, state: dict) -> dict | None:
    """Go back to the checkpoint and return its progress, None if there is none. Raises InputError if it is damaged."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    with readable(f"{path} is damaged", "--restart begins anew"):
        saved = torch.load(path, weights_only=True, map_location="cpu")
        for name, part in state.items():
            part.load_state_dict(saved["state"][name])
        torch.set_rng_state(saved["random"])
        if saved["random_gpu"] is not None:
            torch.cuda.set_rng_state(saved["random_gpu"])
        os.truncate(folder / LOG, saved["log"])
        print(f"going on after step {saved['progress']['step']}")
    return saved["progress"]

@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """While the block runs, Ctrl-C and SIGTERM set this event; a second one stops at once."""
    stop = threading.Event()
    with contextlib.ExitStack() as undo:
        def request(number, frame):
            stop.set()
            undo.close()  # from here on a second one stops at once
        for number in (signal.SIGINT, signal.SIGTERM):
            undo.callback(signal.signal, number, signal.signal(number, request))
        yield stop

def peak_gib() -> float:
    """The most memory held so far in GiB, on the GPU if it is in use, or by this process; NaN where it is not known."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return math.nan


# The paper's evidence: methods over seeds (Tables 2, 5), collapse (Section 3), vectors of others, Task 2 (Table 4) ----

LEGEND = """t2f: text histories look for fused items, v: vision; A_pos, A_neg: mean squared distance of
histories to targets and to negatives; U: uniformity, lower is more spread; S = A_neg / A_pos"""

def paired_t_test(a: list[float], b: list[float]) -> float:
    """The two-sided p of a paired t-test; NaN for fewer than two pairs, 1 if no pair differs."""
    if len(a) < 2:
        return math.nan
    if a == b:
        return 1.0
    differences, df = [x - y for x, y in zip(a, b)], len(a) - 1
    noise, effect = df * statistics.variance(differences), len(a) * statistics.mean(differences)**2
    return float(mpmath.betainc(df / 2, 0.5, 0, noise / (noise + effect), regularized=True))

def write_comparison(runs: dict[str, list[Path]]) -> None:
    """Print the tables over methods and seeds, and write them beside the runs."""
    results = {method: [read_result(folder) for folder in folders] for method, folders in runs.items()}
    numbers = [result["seed"] for result in next(iter(results.values()))]
    seeds = f"seed{numbers[0]}" + (f"-{numbers[-1]}" if len(numbers) > 1 else "")
    text = "\n\n".join([*(comparison(results, part, seeds) for part in ("test", "test_full", "valid")),
                        "mean ± standard deviation over the seeds; the best is bold, the second underlined;\n"
                        "* better than the second with p < .05 in a paired t-test over the seeds",
                        differences(results)]).strip()
    path = next(iter(runs.values()))[0].parent / f"{'-'.join(runs)}-{seeds}.md"
    write_text(path, text)
    print(f"\n{text}\n\nwrote {path}")

def read_result(folder: Path) -> dict:
    """metrics.json of a run and, as "gains", each test user's N@10 in the order of ranks.csv."""
    with readable(f"{folder} is damaged", WAY_OUT):
        ranks = [float(rank) for _, rank in data.read_csv(folder / "ranks.csv", ("rank",))]
        metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
        if len(ranks) != metrics["users"]:
            raise ValueError(f"ranks.csv has {len(ranks)} rows for {metrics['users']} users")
    return metrics | {"gains": [1 / math.log2(1 + rank) if rank <= 10 else 0.0 for rank in ranks]}

def comparison(results: dict[str, list[dict]], part: str, seeds: str) -> str:
    """The methods over the same seeds, as mean ± standard deviation (ddof 1), below what they have to beat."""
    columns = lambda row, part: {metric: [result[part][metric] for result in row] for metric in CHANCE}
    scores = {method: columns(row, part) for method, row in results.items()}
    rows = {method: {metric: spread(values) for metric, values in row.items()} for method, row in scores.items()}
    for metric in CHANCE:
        best, *others = sorted(scores, key=lambda method: -statistics.mean(scores[method][metric]))
        rows[best][metric] = f"**{rows[best][metric]}**"
        if others:
            p = paired_t_test(scores[best][metric], scores[others[0]][metric])
            rows[best][metric] += " *" * (p < 0.05)
            rows[others[0]][metric] = f"<u>{rows[others[0]][metric]}</u>"
    beaten = {"test": "popularity", "valid": "untrained"}.get(part)
    if known := [row for row in results.values() if row[0].get(beaten)]:
        rows = {beaten: {metric: spread(values) for metric, values in columns(known[0], beaten).items()}} | rows
    return as_table({"chance": CHANCE} | rows if part == "test" else rows, f"{part}, {seeds}")

def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"

def differences(results: dict[str, list[dict]]) -> str:
    """vlm2rec, or else the best method, against each other one, in N@10: the mean difference per user with its standard
    error, and p in paired t-tests over the users and over the seeds."""
    seeds = {method: [result["test"]["N@10"] for result in row] for method, row in results.items()}
    users = {method: list(map(statistics.mean, zip(*(result["gains"] for result in row))))
             for method, row in results.items()}
    ours = "vlm2rec" if "vlm2rec" in results else max(seeds, key=lambda method: statistics.mean(seeds[method]))
    lines = []
    for method in (method for method in results if method != ours):
        gains = [our - their for our, their in zip(users[ours], users[method])]
        better, worse = (sum(sign * gain > 0 for gain in gains) / len(gains) for sign in (1, -1))
        p = max(paired_t_test(users[ours], users[method]), 1e-9)  # smaller ones are rounding
        lines.append(f"- {ours} against {method}, N@10 per user: {statistics.mean(gains):+.4f} ± "
                     f"{statistics.stdev(gains) / math.sqrt(len(gains)):.4f} (standard error, {len(gains):,} users), "
                     f"better for {better:.0%}, worse for {worse:.0%}; p = {p:.1g} over the users, "
                     f"{paired_t_test(seeds[ours], seeds[method]):.2g} over the seeds")
    return "\n".join(lines).replace("p = 1e-09", "p < 1e-9").replace(", nan over the seeds", "")

def queries(z: dict, e: dict, test: Evaluation) -> dict[str, float]:
    """N@10 when the histories of one space look for the items of another (Fig. 1a: f2f, t2f, v2f), and each modality
    by itself (t2t, v2v)."""
    spaces = {"f": "fused", "t": "text", "v": "vision"}
    return {f"{query}2{item}": hits_and_ndcg(test.rank(z[spaces[query]], e[spaces[item]])[0])["N@10"]
            for query, item in ("ff", "tf", "vf", "tt", "vv")}

def geometry(z: torch.Tensor, e: torch.Tensor, targets: torch.Tensor, negatives: torch.Tensor) -> dict[str, float]:
    """A_pos, A_neg, U and S (Table 1, Eqs. 4, 5) of a space of users z (U, D) and items e (N, D), on unit vectors: mean
    squared distances to the targets (U,) and to the negatives (U, 100), our P_n; the logarithm of the mean of
    exp(-2 distance^2) over all pairs of a user and an item, our P_u; and A_neg / A_pos."""
    parts = []
    for rows in torch.arange(len(z)).split(1024):
        distance = 2 - 2 * cosine(z[rows], e)                                                  # squared, (1024, N)
        parts.append(torch.stack([distance.gather(1, targets[rows, None]).squeeze(1),
                                  distance.gather(1, negatives[rows]).mean(dim=1),
                                  (-2 * distance).exp().mean(dim=1)]))
    a_pos, a_neg, near = torch.cat(parts, dim=1).mean(dim=1).tolist()
    return {"A_pos": a_pos, "A_neg": a_neg, "U": math.log(near), "S": a_neg / (a_pos + 1e-12)}

def gradient_cosines(encoder: Encoder, method: Method, batch: list[tuple], *args) -> dict[str, float]:
    """cos(g_total, g_T) and cos(g_total, g_V) (Fig. 1b): the method's gradient beside that of InfoNCE on one modality
    alone, for the batch that was just trained on, without dropout, over all of LoRA. `args` are batch_loss's last."""
    for layer in encoder.vlm.modules():  # eval() would switch checkpointing off too
        if isinstance(layer, torch.nn.Dropout):
            layer.eval()
    lora, gradients = [weight for weight in encoder.vlm.parameters() if weight.requires_grad], []
    for of in (method, *(METHODS[modality] for modality in BOTH)):
        loss, _ = batch_loss(encoder, of, batch, *args)
        gradients.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, lora)]))
    encoder.vlm.train()
    return {f"cos_{modality}": torch.cosine_similarity(gradients[0], gradient, dim=0).item()
            for modality, gradient in zip(BOTH, gradients[1:])}

def structural_alignment(e_text: torch.Tensor, e_vision: torch.Tensor, tau: float) -> torch.Tensor:
    """SDA's CMSA on the embeddings (B, D) of a batch's targets: who is near whom within the modalities teaches who is
    near whom across them, by cross-entropy in both directions, on unit vectors: on others it is plain InfoNCE."""
    teacher = ((cosine(e_vision, e_vision) + cosine(e_text, e_text)) / (2 * tau)).softmax(dim=1).detach()
    logits = cosine(e_vision, e_text) / tau
    return torch.nn.functional.cross_entropy(torch.cat([logits, logits.T]), teacher.repeat(2, 1))

def add_gates(encoder: Encoder, checkpointing: bool) -> None:
    """SDA's MoDA: LoRA's rank becomes blocks, the experts, and each layer learns how much each one counts for text and
    for vision. A checkpointed layer is recomputed after other passes, and has to see its own modalities again."""
    def scale(a, _, x):
        shares = a.gates.softmax(dim=1).repeat_interleave(x.shape[-1] // EXPERTS, dim=1)           # (2, r)
        return x * shares[encoder.shows.int()][:, None]                                            # (B, L, r)

    @contextlib.contextmanager
    def again(shows):
        encoder.shows = shows
        yield
    for a in (layer.lora_A["default"] for layer in lora_layers(encoder.vlm)):
        a.gates = torch.nn.Parameter(torch.zeros(2, EXPERTS, device=encoder.device))
        a.register_forward_hook(scale)
    if checkpointing:
        contexts = lambda: (contextlib.nullcontext(), again(encoder.shows))  # of a layer's pass, of its recomputation
        encoder.vlm.get_decoder().activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})

def read_vectors(path: Path, domain: Domain, folder: Path) -> torch.Tensor:
    """Item vectors (N, D), float32, from .safetensors (its tensor "fused", or the only one) or .npy. They stand in the
    order of the metadata's item_ids or else of items.csv in `folder`. Raises InputError if they do not fit."""
    with readable(f"--embeddings {path} cannot be read", "give a .safetensors or .npy file"):
        if path.suffix == ".npy":
            tensor, ids = torch.from_numpy(numpy.load(path, allow_pickle=False)), None
        else:
            with safetensors.safe_open(path, "pt") as file:
                names, ids = list(file.keys()), json.loads((file.metadata() or {}).get("item_ids", "null"))
                if len(names) > 1 and "fused" not in names:
                    raise ValueError(f"none of its tensors {', '.join(sorted(names))} is called fused")
                tensor = file.get_tensor("fused" if "fused" in names else names[0])
        place = {str(item): row for row, item in enumerate(ids or data.read_items(folder))}
        if tensor.ndim != 2 or len(tensor) != len(place):
            raise ValueError(f"it has the shape {tuple(tensor.shape)}; one row for each of the {len(place)} items is "
                             f"needed, in the order of {'its item_ids' if ids else folder / 'items.csv'}")
        if lacking := [item for item in domain.item_ids if item not in place]:
            raise ValueError(f"it has no vector for item {lacking[0]!r}: is it of another domain?")
        if not tensor.isfinite().all():
            raise ValueError("it holds values that are not finite")
        return tensor[[place[item] for item in domain.item_ids]].float()

class SequenceRecommender(torch.nn.Module):
    """SASRec or GRU4Rec over item ids (Table 2) or, given item vectors (N, D), initialised with them through one linear
    adapter to d (Task 2, Table 4). The paper does not say more; we make the vectors' norm 1, and train them too."""

    def __init__(self, kind: str, items: int, vectors: torch.Tensor | None = None, length: int = 10):
        super().__init__()
        d, self.kind, self.dropout = 128, kind, torch.nn.Dropout(0.5)
        self.table, self.adapter = torch.nn.Embedding(items, d), torch.nn.Identity()
        if vectors is None:
            torch.nn.init.normal_(self.table.weight, std=0.02 if kind == "sasrec" else d ** -0.5)  # by validation
        else:
            self.table = torch.nn.Embedding.from_pretrained(torch.nn.functional.normalize(vectors, dim=1), freeze=False)
            self.adapter = torch.nn.Linear(vectors.shape[1], d)
        if kind == "sasrec":
            self.position = torch.nn.Embedding(length, d)
            torch.nn.init.normal_(self.position.weight, std=0.02)
            layer = torch.nn.TransformerEncoderLayer(d, 2, d, 0.5, "gelu", batch_first=True, norm_first=True)
            self.body = torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(d), enable_nested_tensor=False)
        else:
            self.body = torch.nn.GRU(d, d, batch_first=True)

    def items(self) -> torch.Tensor:
        """(N, d): what scores are inner products with."""
        return self.adapter(self.table.weight)

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        """(B, L, d): the state after each item of (B, L) items, padded on the right with anything."""
        states = self.adapter(self.table(sequences))
        if self.kind == "gru4rec":
            return self.body(self.dropout(states))[0]
        states = states + self.position.weight[:sequences.shape[1]]
        mask = torch.nn.Transformer.generate_square_subsequent_mask(sequences.shape[1], device=sequences.device)
        return self.body(self.dropout(states), mask=mask, is_causal=True)

    @torch.no_grad()
    def rank(self, evaluation: Evaluation) -> tuple[torch.Tensor, torch.Tensor]:
        """Both ranks of a split's targets (see Evaluation.rank), by inner product."""
        self.eval()
        states = self(pad(evaluation.histories, 0).to(self.table.weight.device))
        z = last_token(states, torch.tensor([len(history) - 1 for history in evaluation.histories])).cpu()
        return evaluation.rank(z, self.items().cpu(), dot=True)

def train_downstream(model: SequenceRecommender, samples: list[tuple], valid: Evaluation, seed: int, epochs: int = 200,
                     lr: float = 1e-3, batch: int = 32) -> dict[str, float]:
    """Train on the histories and targets of `training_samples`, by cross-entropy over the catalogue after every item,
    until 20 epochs bring nothing. Leaves the model as after its best epoch on validation; returns its scores there."""
    device, best, waited = model.table.weight.device, {"N@10": -1.0}, 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    sequences = [[*history, target] for history, target, _ in samples]
    for epoch in bar(range(1, epochs + 1), f"train {model.kind}"):
        model.train()
        for users in shuffled_batches(len(sequences), min(batch, len(sequences)), seed, epoch):
            rows = pad([sequences[user] for user in users], -1).to(device)                        # (B, 1 + L)
            real = rows[:, 1:] >= 0                                                                # (B, L)
            logits = model(rows[:, :-1].clamp(min=0))[real] @ model.items().T                      # (items, N)
            loss = torch.nn.functional.cross_entropy(logits, rows[:, 1:][real])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scores, waited = hits_and_ndcg(model.rank(valid)[0]), waited + 1
        if scores["N@10"] > best["N@10"]:
            best, kept, waited = scores, copy.deepcopy(model.state_dict()), 0
        if waited == 20:
            break
    model.load_state_dict(kept)
    return best

def nearest_items(z: torch.Tensor, e: torch.Tensor, owned: list[int], k: int) -> tuple[list[float], list[int]]:
    """The k best scores and items (N, D) for a user z (1, D), without what is owned."""
    scores = cosine(z, e)[0]
    scores[owned] = -torch.inf
    best = scores.topk(k)
    return best.values.tolist(), best.indices.tolist()

def contact_sheet(path: Path, domain: Domain, test: Evaluation, z: dict, e: dict) -> None:
    """Draw two users: history, the item bought next, and each space's top five among what they did not buy before."""
    sheets = []
    for user in (0, len(test.targets) // 2):
        target = int(test.targets[user])
        rows = {"history": test.histories[user][-5:], "bought next": [target]}
        for space in (space for space in z if space != "fused" or len(z) != 2):  # of two, it is the other again
            owned = [item for item in test.sequences[user] if item != target]
            _, best = nearest_items(z[space][user:user + 1], e[space], owned, 5)
            rows[f"by {'both' if space == 'fused' else space}"] = best
        sheets.append(draw(domain, rows, target))
    with data.whole_file(path) as partial:
        Image.fromarray(numpy.hstack(sheets)).save(partial, "PNG")

def draw(domain: Domain, rows: dict[str, list[int]], target: int | None = None) -> Image.Image:
    """Rows of at most five items: a history, with an arrow of time, what was bought next, rankings; a hit is framed."""
    side, wide, high, font = 72, 96, 120, ImageFont.load_default(11)
    sheet = Image.new("RGB", (100 + 5 * wide, len(rows) * high), "white")
    pen = ImageDraw.Draw(sheet)
    pen.line((86, 4, 536, 4), "grey", 2)
    pen.regular_polygon((536, 4, 5), 3, 270, "grey")
    for y, (name, items) in enumerate(rows.items()):
        top = y * high + 10
        pen.text((6, top + side // 2), name, "black", font)
        for rank, item in enumerate(items, 1):
            x, number = rank * wide - 10, f"{rank}. " if name.startswith("by") else ""
            sheet.paste(square_picture(domain.pictures[item], side), (x, top))
            label = textwrap.fill(number + domain.titles[item], 15, max_lines=2)
            pen.text((x, top + side + 3), label, "black", font)
            if number and item == target:
                pen.rectangle((x - 3, top - 3, x + side + 2, top + side + 2), outline="green", width=4)
    return sheet

def recommend(run: Run, history: list[str]) -> None:
    """Print and draw the ten items that a finished run recommends after a history of item ids, oldest first."""
    domain, folder = run.domain, run.folder
    if not run.method.modalities or not (folder / TABLE).exists() or not run.is_begun():
        raise InputError(f"--recommend needs a finished run of an encoder in {folder}; without it, it makes one")
    place = {item: number for number, item in enumerate(domain.item_ids)}
    if unknown := [item for item in history if item not in place]:
        raise InputError(f"--recommend {unknown[0]}: {domain.name} has no such item, or it was dropped")
    encoder = run.encoder(run.config.adapter or (folder / "adapter" if is_trained(run.method) else ""))
    items = [place[item] for item in history]
    z = encoder.embed([items[-run.config.history:]], run.method.modalities)["fused"]
    with readable(f"{folder / 'items.safetensors'} is damaged", WAY_OUT):
        e = safetensors.torch.load_file(folder / "items.safetensors")["fused"]
    scores, best = nearest_items(z, e, items, 10)
    for rank, (score, item) in enumerate(zip(scores, best), 1):
        print(f"{rank:2}  {score:.4f}  {domain.item_ids[item]}  {domain.titles[item][:70]}")
    sheet = draw(domain, {"history": items[-5:], "1 to 5": best[:5], "6 to 10": best[5:]})
    with data.whole_file(folder / "recommended.png") as partial:
        sheet.save(partial, "PNG")


# The command ----------------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake that the message tells how to mend, 1 for a run that diverged, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that knows no "±" gets its number
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers|peft")
    try:
        runs, (configs, history) = {}, parse_config(argv)
        for run in map(Run, configs):
            if history:
                recommend(run, history)
            else:
                execute(run)
                runs.setdefault(run.name, []).append(run.folder)
        if len(configs) > 1 and runs:
            write_comparison(runs)
        return 0
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (InputError, OSError, safetensors.SafetensorError) as error:
        message, code = f"error: {error}", 2
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        message, code = (f"error: out of memory, at a peak of {peak_gib():.1f} GiB; these need less: --checkpointing "
                         "on (no other results), a smaller --image-size (less of each picture), a shorter --history "
                         "(less of each user), a smaller --batch (fewer negatives)"), 2
    except FloatingPointError as error:
        message, code = f"error: {error}; what was saved before it stays", 1
    except KeyboardInterrupt:
        message, code = "\nstopped; the same command goes on (with sasrec, gru4rec and mean-pool it begins again)", 130
    print(message, file=sys.stderr)
    return code

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # KeyboardInterrupt, as main() expects
    sys.exit(main())
