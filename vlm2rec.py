# SPDX-License-Identifier: MIT
"""VLM2Rec in one file: a vision-language model becomes an embedder for sequential recommendation (arXiv 2603.17450).

A user's history is encoded twice, as titles and as pictures, and so is every item; the last token's state is the
embedding, and the two modalities are added. Fine-tuning that sum on clicks alone lets one modality collapse. VLM2Rec
weighs the negatives more for users with one weak modality, and keeps the neighbourhoods of both modalities alike.

    python vlm2rec.py --domain sample        # CPU, no download, about a minute
    python vlm2rec.py --domain toys          # the paper: Qwen2.5-VL-3B, LoRA, one CUDA GPU
    python vlm2rec.py --help

The first command prints, among other tables,

    | test | H@10 | N@10 | H@20 | N@20 |
    | chance | 0.0990 | 0.0450 | 0.1980 | 0.0697 |
    | popularity | 0.1876 | 0.0893 | 0.3415 | 0.1284 |
    | before training | 0.1581 | 0.0733 | 0.2910 | 0.1067 |
    | vlm2rec | 0.6535 | 0.3855 | 0.7872 | 0.4195 |

and ends with

    wrote runs/sample/vlm2rec-seed0: adapter, config.json, items.safetensors, log.jsonl, metrics.json, ranks.csv,
    recommendations.png, table.md

Glossary, code -> paper:
    z, e          z_u, e_i: embedding of a user's history, of an item; z["text"], z["vision"] and z["fused"]
    sim           s(z_u, e_j), cosine similarity of a batch's users and targets; the diagonal holds the positives
    negatives     N_u as a mask: which of the batch's targets are negatives for which user
    gap, weight   Delta_u,gap, w_u,pen
    tau           tau and tau_WPCL;  tau_crtr: tau_CRTR;  lam: lambda
    B, L, D       users in a batch, tokens in a prompt, width of an embedding
    N, C, P       items, candidates in a ranking (101), tokens of a picture

Where we differ: means for sums over the batch (Eqs. 3, 10), so that lam does not depend on B; alpha and beta positive
through softplus. What the paper leaves open is marked at its line and listed in the README.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import json
import logging
import math
import os
import platform
import random
import re
import shutil
import signal
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy
import peft
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import safetensors.torch
import torch
import transformers
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

import data
from data import Domain, InputError

LORA_LAYERS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # bare names would reach into the vision tower too
TITLE_TOKENS = 64      # a longer title is cut; the paper does not say
PASS_TOKENS = {"cuda": 16_384, "cpu": 2_048}  # at most in a forward pass: fill a GPU, stay in a CPU's cache
PADDING = 256          # tokens of padding in a forward pass that cost as much as another pass

CHECKPOINT, TABLE = "checkpoint.pt", "table.md"  # in the folder of a run

bar = functools.partial(tqdm, leave=False, disable=None)  # no bars where the output is not a terminal


# ----------------------------------------------------------------------------------------------------------------------
# Settings (Section 5.1.1)
# ----------------------------------------------------------------------------------------------------------------------

class Method(NamedTuple):
    """What `--method` chooses. Without a contrast and without topology the language model is not trained."""
    modalities: tuple[str, ...]  # encoded one by one, then added; none: a downstream model, without an encoder
    contrast: str = ""           # "wpcl" (Eq. 10), "infonce" (Eq. 3) or ""
    topology: bool = False       # with lam * CRTR (Eq. 13)?
    stop_gradient: bool = True   # in Eq. 8


BOTH = ("text", "vision")
METHODS = {
    "vlm2rec": Method(BOTH, "wpcl", topology=True),
    "sft": Method(BOTH, "infonce"),
    "vanilla": Method(BOTH),
    "text": Method(("text",), "infonce"),
    "vision": Method(("vision",), "infonce"),
    "internal": Method(("interleaved",), "infonce"),  # each title with its picture, in one prompt
    "no-wpcl": Method(BOTH, topology=True),           # from here on: the ablations of Table 5
    "no-penalty": Method(BOTH, "infonce", topology=True),
    "no-stopgrad": Method(BOTH, "wpcl", topology=True, stop_gradient=False),
    "no-crtr": Method(BOTH, "wpcl"),
    "sasrec": Method(()),                             # downstream models: ids, or the item vectors of --embeddings
    "gru4rec": Method(()),
    "mean-pool": Method(()),                          # a history is the mean of its items' vectors
}

DOMAIN_DEFAULTS = {"sample": {"model": "tiny"}, "lopsided": {"model": "tiny"}}  # what the choice of a domain or of a
MODEL_DEFAULTS = {"tiny": {"lr": 1e-3, "image_size": 56}}                       # model brings along; a flag wins


def option(default, help: str, **kwargs):
    """A field of Config with its line in --help."""
    return dataclasses.field(default=default, metadata={"help": help, **kwargs})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. The defaults are the paper's unless the line says that it does not tell."""
    domain: str = option("sample", "a domain under --data-dir, or a path to a folder (with a separator in it)")
    method: str = option("vlm2rec", "one or more: vlm2rec; vanilla (no training); sft, text, vision, internal (Eq. 3); "
                         "the ablations no-wpcl, no-penalty, no-stopgrad, no-crtr; sasrec, gru4rec, mean-pool (see "
                         "--embeddings)", choices=list(METHODS))
    model: str = option("Qwen/Qwen2.5-VL-3B-Instruct", "hub name or folder of a Qwen2.5-VL, or tiny: random weights")
    revision: str = option("main", "branch, tag or commit of a model on the hub")
    seed: int = option(0, "of LoRA's start, dropout, the order of the users and the evaluation's negatives")
    data_dir: str = option("domains", "where the domains lie; toys, beauty, clothing and sports are fetched into it")
    mirror: str = option("", "address to fetch Amazon's archives and pictures from, instead of their own")
    out: str = option("runs", "results go to OUT/DOMAIN/METHOD-seedSEED")
    device: str = option("auto", "auto takes CUDA if there is one", choices=["auto", "cuda", "cpu"])
    epochs: int = option(3, "passes over the users; the best on validation N@10 is kept")
    batch: int = option(8, "users in a step (B); each one's target is a negative for the others")
    history: int = option(10, "latest items of a user in the prompt")
    image_size: int = option(168, "side of a picture in pixels, a multiple of 28; not in the paper")
    lr: float = option(1e-5, "AdamW's learning rate for LoRA, constant")
    penalty_lr: float = option(1e-5, "the same for alpha and beta, whatever LoRA's is; 0 freezes them")
    tau: float = option(0.1, "temperature of the contrastive loss; paper: .05, .1, .5 or 1")
    tau_crtr: float = option(0.1, "temperature of the topology loss; paper: .001, .01, .1 or 1")
    lam: float = option(0.5, "weight of the topology loss; paper: .1, .5 or 1")
    lora_rank: int = option(16, "LoRA's rank")
    lora_alpha: int = option(32, "LoRA's scale: its update is multiplied by alpha / rank")
    lora_dropout: float = option(0.2, "dropout in front of LoRA")
    checkpointing: str = option("on", "gradient checkpointing; off: same results, a third less work, more memory",
                                choices=["on", "off"])
    train_users: int = option(0, "train on so many users, drawn by the seed (Table 7); 0: on all")
    adapter: str = option("", "folder of an adapter to evaluate instead of training: from another domain (Table 6); "
                          "{method} and {seed} in it are the run's, here and below")
    embeddings: str = option("", "one or more: item vectors for sasrec and gru4rec (Task 2; without any or for '': "
                             "ids) or mean-pool (Task 1); .safetensors or .npy, in the order of items.csv")
    gradients_every: int = option(0, "steps between two measurements of the gradients' directions (Fig. 1b); 0: none")
    log_every: int = option(50, "steps between two lines of the log")
    save_every: int = option(200, "steps between two checkpoints; another is written at the end of an epoch")
    restart: bool = option(False, "replace an earlier run, or what is left of it, instead of going on with it")

    def __post_init__(self):
        for name, least in dict(epochs=1, batch=2, history=1, lora_rank=1, lora_alpha=1, log_every=1, save_every=1,
                                seed=0, train_users=0, gradients_every=0).items():
            if not least <= getattr(self, name) < 2**31:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: it has to be at least {least}")
        if self.image_size < 28 or self.image_size % 28:
            raise InputError(f"--image-size {self.image_size}: a token covers 28 pixels, take a multiple such as 168")
        if not (self.tau > 0 and self.tau_crtr > 0 and self.lr > 0):
            raise InputError("--tau, --tau-crtr and --lr have to be positive")
        if self.method == "mean-pool" and not self.embeddings:
            raise InputError("--method mean-pool needs item vectors: --embeddings FILE")
        if self.embeddings and METHODS[self.method].modalities:
            raise InputError(f"--embeddings is for sasrec, gru4rec and mean-pool, not for --method {self.method}")
        if self.adapter and not (METHODS[self.method].contrast or METHODS[self.method].topology):
            raise InputError(f"--adapter is for a method that trains one, not for --method {self.method}")
        if not (self.penalty_lr >= 0 and self.lam >= 0 and 0 <= self.lora_dropout < 1):
            raise InputError("--penalty-lr and --lam have to be at least 0, --lora-dropout in [0, 1)")


def parse_config(argv: list[str] | None = None) -> list[Config]:
    """The command line as a Config for each method and seed. A flag wins over what the model brings along, that over
    what the domain does."""
    flag = lambda name: "--" + name.replace("_", "-")
    brought = (f"{choice} brings " + ", ".join(f"{flag(name)} {value}" for name, value in row.items())
               for choice, row in [*DOMAIN_DEFAULTS.items(), *MODEL_DEFAULTS.items()])
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False,
                                     description=__doc__.split("\n\n")[1], epilog="; ".join(brought))
    for field in dataclasses.fields(Config):
        choices = field.metadata.get("choices")
        kind = dict(action="store_true") if field.type == "bool" else dict(
            type={"str": str, "int": int, "float": float}[field.type], choices=choices,
            metavar=None if choices else field.type)
        if field.name in ("method", "embeddings"):
            kind |= dict(nargs="+", metavar="name")
        parser.add_argument(flag(field.name), help=f"{field.metadata['help']} (default: {field.default})", **kind)
    parser.add_argument("--seeds", type=int, metavar="int", help="so many seeds in a row, from --seed on (default: 1)")
    given = vars(parser.parse_args(argv))
    methods, seeds = given.pop("method", [Config.method]), given.pop("seeds", 1)
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: it has to be at least 1")
    by_domain = DOMAIN_DEFAULTS.get(given.get("domain", Config.domain), {})
    by_model = MODEL_DEFAULTS.get((by_domain | given).get("model"), {})
    first, adapter, files = given.pop("seed", Config.seed), given.pop("adapter", ""), given.pop("embeddings", [""])
    fill = lambda path, method, seed: path.replace("{method}", method).replace("{seed}", str(seed))
    return [Config(**by_domain | by_model | given, method=method, seed=seed, adapter=fill(adapter, method, seed),
                   embeddings=fill(file, method, seed))
            for method in dict.fromkeys(methods) for file in dict.fromkeys(files)
            for seed in range(first, first + seeds)]


# ----------------------------------------------------------------------------------------------------------------------
# Prompts (Section 2.2.1)
# ----------------------------------------------------------------------------------------------------------------------

class Prompt(NamedTuple):
    """Token ids, and the items whose pictures fill the placeholders among them, in order."""
    ids: list[int]
    pictures: list[int]


class PromptBuilder:
    """Builds P_T and P_V: the titles or the pictures in order, a newline between two, one closing token.

    An item's prompt is the same with one entry. The formula of the template is missing from the text of the paper that
    we have; this is the least that "minimal prompt construction" can mean. Every title is tokenised once.
    """

    def __init__(self, tokenizer, titles: list[str], picture_tokens: int):
        token = tokenizer.convert_tokens_to_ids
        encode = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=True)  # titles are text
        self.titles = encode(titles, truncation=True, max_length=TITLE_TOKENS).input_ids
        start, pad, end = map(token, ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"))
        self.picture = [start, *[pad] * picture_tokens, end]
        self.newline = encode("\n").input_ids
        self.closing = [tokenizer.eos_token_id]

    def __call__(self, items: list[int], modality: str) -> Prompt:
        """The prompt of `items` (a history, or a list of one item) in the modality text, vision or interleaved."""
        entry = {"text": lambda item: self.titles[item], "vision": lambda item: self.picture,
                 "interleaved": lambda item: self.titles[item] + self.newline + self.picture}[modality]
        ids = list(entry(items[0]))
        for item in items[1:]:
            ids += self.newline + entry(item)
        return Prompt(ids + self.closing, [] if modality == "text" else list(items))


# ----------------------------------------------------------------------------------------------------------------------
# Encoder (Sections 2.2.2, 2.3)
# ----------------------------------------------------------------------------------------------------------------------

def check_model(model: str, revision: str = "main") -> None:
    """Raise InputError if `model` cannot be found or is of another family; fetches its config only."""
    try:
        family = transformers.AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False).model_type
    except (OSError, ValueError, KeyError) as error:
        raise unloadable(model, error) from None
    if family != "qwen2_5_vl":
        raise InputError(f"--model {model} is of the family {family}; take a Qwen2.5-VL, such as {Config.model}")


def unloadable(model: str, error: Exception) -> InputError:
    """The one line for a checkpoint that cannot be loaded."""
    return InputError(f"--model {model} cannot be loaded: {' '.join(str(error).split())[:300]}; "
                      "give a folder written by save_pretrained, a name on the hub, or tiny")


def load_vlm(model: str, revision: str = "main", device: str = "cpu"):
    """(vlm without lm_head, tokenizer, image processor) of a Qwen2.5-VL; bfloat16 on CUDA, float32 on a CPU.

    Raises InputError if there is no such model, it is of another family or a part of it is missing.
    """
    check_model(model, revision)
    where = dict(revision=revision, trust_remote_code=False)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        vlm, report = transformers.AutoModel.from_pretrained(
            model, dtype=dtype, use_safetensors=True, output_loading_info=True, **where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, **where)
        processor = transformers.AutoImageProcessor.from_pretrained(model, backend="pil", **where)  # no torchvision
        if report["missing_keys"]:  # transformers would go on with random weights
            raise ValueError(f"its weights lack {len(report['missing_keys'])} tensors")
        pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        if tokenizer.eos_token_id is None or pad != vlm.config.image_token_id:
            raise ValueError("its tokenizer has no end token, or another picture token than its config")
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise unloadable(model, error) from None
    return vlm.to(device).eval().requires_grad_(False), tokenizer, processor


@torch.no_grad()
def encode_pictures(vlm, processor, paths: list[Path], image_size: int, batch: int = 16) -> torch.Tensor:
    """The vision tower's features of N pictures: (N, P, D) on the CPU, with P = (image_size / 28)^2 tokens each."""
    features = torch.empty(len(paths), (image_size // 28) ** 2, vlm.config.text_config.hidden_size, dtype=vlm.dtype)
    for k in bar(range(0, len(paths), batch), "encode pictures"):
        pictures = [data.load_picture(path).resize((image_size, image_size)) for path in paths[k:k + batch]]
        pixels = processor(images=pictures, do_resize=False, return_tensors="pt").to(vlm.device)
        encoded = vlm.get_image_features(pixels.pixel_values, pixels.image_grid_thw).pooler_output
        features[k:k + batch] = torch.stack(list(encoded)).cpu()
    return features


def cached_features(folder: Path, vlm, processor, domain: Domain, image_size: int) -> torch.Tensor:
    """`encode_pictures` of a domain, kept in `folder`/features-<key>.safetensors and mapped from there.

    The vision tower is frozen, so they are computed once, for every method and seed. The key covers the tower's
    weights, the processor, the size and the domain's content.
    """
    key = hashlib.blake2b(f"{domain.digest} {image_size} {processor.to_json_string()}".encode(), digest_size=8)
    for weight in vlm.visual.state_dict().values():
        key.update(weight.cpu().contiguous().view(torch.uint8).numpy())
    path = folder / f"features-{key.hexdigest()}.safetensors"
    if not path.exists():
        features = encode_pictures(vlm, processor, domain.pictures, image_size)
        folder.mkdir(parents=True, exist_ok=True)
        with data.whole_file(path, f".{os.getpid()}") as partial:  # another run may be at it too
            safetensors.torch.save_file({"features": features}, partial)
    return safetensors.torch.load_file(path)["features"]


class Encoder:
    """Phi of Eq. 1: prompts in, the last token's state out.

    Args:
        vlm: a Qwen2_5_VLModel; adapters may be put into it before or after.
        tokenizer: the model's.
        titles: of the N items.
        features: (N, P, D) of the N pictures; the vision tower itself is not used.
    """

    def __init__(self, vlm, tokenizer, titles: list[str], features: torch.Tensor):
        self.vlm, self.features, self.device = vlm, features, vlm.language_model.device
        self.prompt = PromptBuilder(tokenizer, titles, features.shape[1])
        side = vlm.config.vision_config.spatial_merge_size * math.isqrt(features.shape[1])
        self.grid = torch.tensor([[1, side, side]])  # time, height and width of a picture, in patches
        self.tokens = 0                              # encoded so far, for the log

    def __call__(self, prompts: list[Prompt]) -> torch.Tensor:
        """Embeddings (n, D), float32, of n prompts of any length and modality (Eq. 1), in passes of similar length."""
        passes = list(batches_by_length([len(prompt.ids) for prompt in prompts], PASS_TOKENS[self.device.type]))
        states = torch.cat([self.forward_pass([prompts[row] for row in rows]) for rows in passes])
        return states[to_device(torch.tensor(sum(passes, [])).argsort(), self.device)]             # as they came

    def forward_pass(self, prompts: list[Prompt]) -> torch.Tensor:
        """Embeddings (B, D), float32, of B prompts, padded to the longest."""
        lm, device = self.vlm.language_model, self.device
        ids = pad([prompt.ids for prompt in prompts], 0)                                           # (B, L)
        last = to_device(torch.tensor([len(prompt.ids) - 1 for prompt in prompts]), device)        # (B,)
        shown = [item for prompt in prompts for item in prompt.pictures]
        self.tokens += sum(len(prompt.ids) for prompt in prompts)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            states, positions = lm.embed_tokens(to_device(ids, device)), None                      # (B, L, D)
            if shown:  # pictures take the placeholders; their tokens have positions in time, height and width
                is_picture = ids == self.vlm.config.image_token_id                                 # (B, L)
                states = states.masked_scatter(to_device(is_picture[..., None], device),
                                               to_device(self.features[shown], device))
                positions = self.vlm.get_rope_index(ids, is_picture.int(), self.grid.expand(len(shown), 3))[0]
                positions = to_device(positions, device)                                           # (3, B, L)
            # Padding is on the right and attention is causal: no token that counts sees it, so no mask is needed.
            states = lm(inputs_embeds=states, position_ids=positions, use_cache=False).last_hidden_state
        return last_token(states, last)                                                            # (B, D)

    @torch.no_grad()
    def embed(self, histories: list[list[int]], modality: str) -> torch.Tensor:
        """Embeddings (n, D) on the CPU of any number of histories (a single item: a list of one), without dropout."""
        self.vlm.eval()
        prompts = [self.prompt(items, modality) for items in histories]
        out = torch.empty(len(prompts), self.vlm.config.text_config.hidden_size, device=self.device)
        with folded_lora(self.vlm), bar(total=len(prompts), desc=f"embed {modality}") as progress:
            for rows in batches_by_length([len(prompt.ids) for prompt in prompts], PASS_TOKENS[self.device.type]):
                out[to_device(torch.tensor(rows), self.device)] = self.forward_pass([prompts[row] for row in rows])
                progress.update(len(rows))
        return out.cpu()

    def embed_fused(self, histories: list[list[int]], modalities: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Each modality's embeddings (n, D) and, as "fused", their sum (Eq. 2)."""
        return fuse({modality: self.embed(histories, modality) for modality in modalities})


def last_token(states: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The state of each prompt's last token, as its embedding (Eq. 1): (B, D), float32, from the final layer's states
    (B, L, D) and the places (B,) of the last tokens."""
    return states[torch.arange(len(last), device=states.device), last].float()


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


@contextlib.contextmanager
def folded_lora(vlm) -> Iterator[None]:
    """While the block runs, LoRA's updates are part of the weights, and cost nothing; after it they are as before, to
    the bit. Not in bfloat16, which would round small updates away."""
    layers = [layer for layer in vlm.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)
              and not layer.disable_adapters and layer.weight.dtype == torch.float32]
    weights = [layer.weight.data for layer in layers]
    for layer in layers:
        layer.weight.data = layer.weight.data.clone()
        layer.merge()
    try:
        yield
    finally:
        for layer, weight in zip(layers, weights):
            layer.unmerge()
            layer.weight.data = weight


def fuse(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """z = z_T + z_V (Eq. 2), or the one modality there is, as "fused"."""
    return {**parts, "fused": sum(parts.values())}


def build_encoder(domain: Domain, model: str, image_size: int, cache: str | Path, revision: str = "main",
                  device: str = "cpu") -> Encoder:
    """An Encoder for the items of a domain; their pictures' features are kept in the folder `cache`."""
    vlm, tokenizer, processor = load_vlm(model, revision, device)
    features = cached_features(Path(cache), vlm, processor, domain, image_size)
    vlm.visual.to("meta")  # not needed again: its memory is free
    return Encoder(vlm, tokenizer, domain.titles, features)


# ----------------------------------------------------------------------------------------------------------------------
# Losses (Sections 2.4, 4.2): pure functions of tensors that need nothing but torch
# ----------------------------------------------------------------------------------------------------------------------

def cosine(z: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """s(z, e): cosine similarity of every row of z (n, D) with every row of e (m, D): (n, m), at least float32."""
    z, e = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (z, e))
    return torch.nn.functional.normalize(z, dim=-1) @ torch.nn.functional.normalize(e, dim=-1).T


def in_batch_negatives(targets: torch.Tensor, bought: torch.Tensor) -> torch.Tensor:
    """N_u: which of the batch's targets are negatives for which user.

    The paper does not say. We leave out items that the user did buy: an equal target, or one bought before it.

    Args:
        targets: (B,) each user's target item.
        bought: (B, H) the items that each user bought before the target, padded with -1.
    Returns:
        (B, B) bool; the diagonal is False.
    """
    known = torch.cat([targets[:, None], bought], dim=1)                  # (B, 1 + H)
    return ~(known[:, :, None] == targets[None, None, :]).any(dim=1)      # (B, B)


def info_nce(sim: torch.Tensor, negatives: torch.Tensor, tau: float) -> torch.Tensor:
    """L_SFT (Eq. 3), as a mean over the batch.

    Args:
        sim: (B, B) s(z_u, e_j); the diagonal holds the positives.
        negatives: (B, B) bool, N_u; a user without any adds 0.
        tau: temperature.
    """
    positive = torch.eye(len(sim), dtype=torch.bool, device=sim.device)
    logits = (sim / tau).masked_fill(~(positive | negatives), -torch.inf)
    return (logits.logsumexp(dim=1) - logits.diagonal()).mean()


def discriminative_margin(sim: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """M_u,m (Eq. 6): how far a modality sets a user's target above the mean of the negatives.

    Args:
        sim: (B, B) s(z_u^m, e_j^m) of one modality; the diagonal holds the positives.
        negatives: (B, B) bool, N_u.
    Returns:
        (B,); 0 for a user without a negative.
    """
    count = negatives.sum(dim=1)
    mean = (sim * negatives).sum(dim=1) / count.clamp(min=1)
    return torch.where(count > 0, sim.diagonal() - mean, 0.0)


def modality_gap(margin_text: torch.Tensor, margin_vision: torch.Tensor, stop_gradient: bool = True) -> torch.Tensor:
    """Delta_u,gap = sg[M_strong] - M_weak (Eqs. 7, 8). Both margins and the gap are (B,); the gap is at least 0.

    The stop-gradient leaves one way to close the gap: raise the weak modality, not lower the strong one.
    """
    strong = torch.maximum(margin_text, margin_vision)
    weak = torch.minimum(margin_text, margin_vision)
    return (strong.detach() if stop_gradient else strong) - weak


def penalty_weight(gap: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """w_u,pen = 1 + beta * softplus(alpha * gap) (Eq. 9): (B,) from a gap (B,) and positive scalars alpha and beta."""
    return 1 + beta * torch.nn.functional.softplus(alpha * gap)


def wpcl(sim: torch.Tensor, negatives: torch.Tensor, weight: torch.Tensor, tau: float) -> torch.Tensor:
    """L_WPCL (Eq. 10), as a mean over the batch: InfoNCE whose negatives count w_u,pen times.

    Args:
        sim: (B, B) s(z_u, e_j) of the fused embeddings; the diagonal holds the positives.
        negatives: (B, B) bool, N_u; a user without any adds 0.
        weight: (B,) w_u,pen, positive.
        tau: temperature.
    """
    positive = torch.eye(len(sim), dtype=torch.bool, device=sim.device)
    logits = sim / tau + torch.where(positive, 0.0, weight.log()[:, None])  # w * exp(x) = exp(x + log w)
    logits = logits.masked_fill(~(positive | negatives), -torch.inf)
    return (logits.logsumexp(dim=1) - logits.diagonal()).mean()


def relational_topology(sim_text: torch.Tensor, sim_vision: torch.Tensor, tau: float) -> torch.Tensor:
    """L_CRTR (Eqs. 11-13): both modalities should rank the batch's targets alike for each user.

    Args:
        sim_text, sim_vision: (B, B) s(z_i^m, e_j^m).
        tau: temperature.
    Returns:
        The mean over the batch of (KL(P_T || P_V) + KL(P_V || P_T)) / 2.
    """
    log_p_text = (sim_text / tau).log_softmax(dim=1)      # Eq. 12, in log space: never log(p / q)
    log_p_vision = (sim_vision / tau).log_softmax(dim=1)
    kl = torch.nn.functional.kl_div                       # kl(log q, log p) is KL(p || q)
    return (kl(log_p_vision, log_p_text, reduction="batchmean", log_target=True)
            + kl(log_p_text, log_p_vision, reduction="batchmean", log_target=True)) / 2


def objective(method: Method, z: dict, e: dict, negatives: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor,
              tau: float, tau_crtr: float, lam: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L = L_WPCL + lam * L_CRTR (Eq. 14) or, by `method`, a part of it (Table 5).

    Args:
        z, e: {"text", "vision", "fused"}: (B, D), the users' histories and their targets.
        negatives: (B, B) bool.
    Returns:
        The loss and, for the log, its terms.
    """
    sim = {space: cosine(z[space], e[space]) for space in z}
    terms, loss = {}, 0.0
    if method.contrast == "wpcl":
        margins = [discriminative_margin(sim[modality], negatives) for modality in BOTH]
        gap = modality_gap(*margins, method.stop_gradient)
        weight = penalty_weight(gap, alpha, beta)
        terms |= {"wpcl": wpcl(sim["fused"], negatives, weight, tau), "gap": gap.mean(), "weight": weight.mean()}
        loss = terms["wpcl"]
    elif method.contrast == "infonce":
        loss = terms["infonce"] = info_nce(sim["fused"], negatives, tau)
    if method.topology:
        terms["crtr"] = relational_topology(sim["text"], sim["vision"], tau_crtr)
        loss = loss + lam * terms["crtr"]
    return loss, {"loss": loss, **terms}


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation (Section 5.1.3): leave-one-out, 100 negatives
# ----------------------------------------------------------------------------------------------------------------------

def target_rank(target: torch.Tensor, others: torch.Tensor, competes: torch.Tensor | None = None) -> torch.Tensor:
    """The target's rank among others, 1 is best; a tie counts half, so that a constant score is a middling one.

    Args:
        target: (U,) scores of the targets, float32.
        others: (U, C) scores of the other candidates.
        competes: (U, C) bool, which of the others count; all, if None.
    Returns:
        (U,) ranks. Raises FloatingPointError if a score is not finite: NaN must not pass for a hit.
    """
    if not (target.isfinite().all() and others.isfinite().all()):
        raise FloatingPointError("a score is not finite: the model has diverged; lower --lr or raise --tau")
    better, tied = others > target[:, None], others == target[:, None]
    if competes is not None:
        better, tied = better & competes, tied & competes
    return 1 + better.sum(dim=1) + tied.sum(dim=1) / 2


def hits_and_ndcg(ranks: torch.Tensor) -> dict[str, float | None]:
    """H@k and N@k for k = 10, 20 from ranks (U,), 1 is best; None if there are no users. With one target, the ideal DCG
    is 1, so NDCG is the gain 1 / log2(1 + rank) of the target if it is among the first k."""
    table = {}
    for k in (10, 20):
        hit = (ranks <= k).double()
        table[f"H@{k}"] = hit.mean().item() if len(ranks) else None
        table[f"N@{k}"] = (hit / (1 + ranks.double()).log2()).mean().item() if len(ranks) else None
    return table


def rank_users(z: torch.Tensor, e: torch.Tensor, targets: list[int], negatives: torch.Tensor, bought: list[list[int]],
               dot: bool = False, chunk: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank each user's target by cosine similarity, against the negatives and against the whole catalogue.

    Args:
        z, e: (U, D) users, (N, D) items.
        targets: U items; negatives: (U, 100) items.
        bought: per user the whole sequence; it does not compete in the full ranking.
        dot: by inner product instead.
    Returns:
        (U,) ranks against the negatives, (U,) ranks against all items that the user did not buy.
    """
    ranks, full = [], []
    for start in range(0, len(z), chunk):
        part = slice(start, start + chunk)
        scores = z[part] @ e.T if dot else cosine(z[part], e)                                  # (chunk, N)
        target = scores.gather(1, torch.tensor(targets[part])[:, None]).squeeze(1)
        ranks.append(target_rank(target, scores.gather(1, negatives[part])))
        competes = torch.ones_like(scores, dtype=torch.bool)
        rows = [row for row, items in enumerate(bought[part]) for _ in items]
        competes[rows, [item for items in bought[part] for item in items]] = False
        full.append(target_rank(target, scores, competes))
    return torch.cat(ranks), torch.cat(full)


class Evaluation(NamedTuple):
    """Histories, targets and candidates of a split: the same for every method with the same seed."""
    users: list[int]
    histories: list[list[int]]
    targets: list[int]
    negatives: torch.Tensor    # (U, 100)
    bought: list[list[int]]    # whole sequences


def make_evaluation(domain: Domain, split: str, length: int, seed: int) -> Evaluation:
    """All users for "test", at most 2,000 for "valid"."""
    everyone = range(len(domain.user_ids))
    users = data.validation_users(len(everyone), seed) if split == "valid" else list(everyone)
    bought = [domain.sequences[user] for user in users]
    histories, targets = zip(*(data.leave_one_out(sequence, split, length) for sequence in bought))
    negatives = [data.draw_negatives(domain.user_ids[user], domain.sequences[user], len(domain.item_ids), split, seed)
                 for user in users]
    return Evaluation(users, list(histories), list(targets), torch.tensor(negatives), bought)


def embed_items(encoder: Encoder, modalities: tuple[str, ...], domain: Domain) -> dict[str, torch.Tensor]:
    """The catalogue's embeddings: {"text", "vision", "fused"}: (N, D)."""
    return encoder.embed_fused([[item] for item in range(len(domain.item_ids))], modalities)


def evaluate(encoder: Encoder, modalities: tuple[str, ...], items: dict,
             evaluation: Evaluation) -> tuple[torch.Tensor, torch.Tensor]:
    """Both ranks of a split's targets (see rank_users), given the catalogue's embeddings (see embed_items)."""
    z = encoder.embed_fused(evaluation.histories, modalities)
    return rank_users(z["fused"], items["fused"], evaluation.targets, evaluation.negatives, evaluation.bought)


def chance(candidates: int = 1 + data.NEGATIVES) -> dict[str, float]:
    """What a random order of the candidates scores on average."""
    return hits_and_ndcg(torch.arange(1, candidates + 1))


def popularity(domain: Domain, evaluation: Evaluation) -> dict[str, float]:
    """What it scores to rank by the number of interactions before the validation target."""
    count = training_counts(domain)
    return hits_and_ndcg(target_rank(count[evaluation.targets], count[evaluation.negatives]))


def training_counts(domain: Domain) -> torch.Tensor:
    """(N,) how many users have each item before their validation target."""
    count = torch.zeros(len(domain.item_ids))
    for sequence in domain.sequences:
        count[sequence[:-2]] += 1
    return count


# ----------------------------------------------------------------------------------------------------------------------
# Training (Sections 4.2.3, 5.1.1)
# ----------------------------------------------------------------------------------------------------------------------

class Penalty(torch.nn.Module):
    """The learnable alpha and beta of Eq. 9. Every gradient step lowers both (README, "Open questions"), so they stay
    positive through softplus; they start at 1, which the paper does not say."""

    def __init__(self):
        super().__init__()
        self.raw = torch.nn.Parameter(torch.full((2,), math.log(math.e - 1)))  # softplus of it is 1

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, beta = torch.nn.functional.softplus(self.raw)
        return alpha, beta


class Dropout(torch.nn.Dropout):
    """Dropout whose mask costs a quarter as much on a CPU, where torch draws one number at a time: 16 bits of it decide
    an element here."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x with a share p of its elements set to 0 and the others divided by 1 - p."""
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        kept = bits[:x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return x * kept / (1 - self.p)


def add_lora(encoder: Encoder, rank: int, alpha: int, dropout: float, checkpointing: bool) -> peft.PeftModel:
    """Put LoRA into the language layers, not the vision tower; from now on the encoder encodes with it."""
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_LAYERS)
    adapted = peft.get_peft_model(encoder.vlm, config)
    for layer in adapted.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer) and dropout:
            layer.lora_dropout["default"] = Dropout(dropout)
    print(f"trainable parameters: {adapted.get_nb_trainable_parameters()[0]:,}, all LoRA in the language layers")
    if checkpointing:
        encoder.vlm.language_model.activation_checkpointing_enable()
    return adapted


def training_users(users: int, most: int, seed: int) -> list[int]:
    """The users to train on (Table 7): at most `most`, drawn by the seed; all of them if it is 0."""
    return random.Random(f"{seed} train users").sample(range(users), min(most, users)) if most else list(range(users))


def shuffled_batches(users: int, batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The users of an epoch in random order, B at a time; the last, incomplete batch is dropped."""
    order = torch.randperm(users, generator=torch.Generator().manual_seed(seed * 1000 + epoch)).tolist()
    return [order[k:k + batch] for k in range(0, users - batch + 1, batch)]


def batch_loss(encoder: Encoder, method: Method, batch: list[tuple], alpha: torch.Tensor, beta: torch.Tensor,
               tau: float, tau_crtr: float, lam: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Encode a batch of (history, target, all items bought before the target) and score it: the loss and, for the log,
    its terms (scalars)."""
    histories, targets, bought = zip(*batch)
    prompts = [encoder.prompt(items, modality) for modality in method.modalities
               for items in (*histories, *([target] for target in targets))]
    states = encoder(prompts).view(len(method.modalities), 2, len(batch), -1)                      # (2, 2, B, D)
    z = fuse(dict(zip(method.modalities, states[:, 0])))                                           # (B, D) each
    e = fuse(dict(zip(method.modalities, states[:, 1])))
    negatives = in_batch_negatives(torch.tensor(targets), pad(bought, -1))                         # (B, B)
    negatives = to_device(negatives, encoder.device)
    loss, terms = objective(method, z, e, negatives, alpha, beta, tau, tau_crtr, lam)
    if "text" in z and "vision" in z:  # Eq. 2 adds raw vectors: the longer one speaks louder
        terms["norm_ratio"] = z["text"].norm(dim=1).mean() / z["vision"].norm(dim=1).mean()
    return loss, terms


def train_epoch(encoder: Encoder, method: Method, penalty: Penalty, optimizer, samples: list[tuple],
                batches: list[list[int]], after_step, tau: float, tau_crtr: float, lam: float) -> None:
    """One pass over the batches; `samples` holds what batch_loss takes, per user. After each step comes
    after_step(terms, users)."""
    encoder.vlm.train()
    for users in batches:
        alpha, beta = penalty()
        loss, terms = batch_loss(encoder, method, [samples[user] for user in users], alpha, beta, tau, tau_crtr, lam)
        loss.backward()
        terms["grad_norm"] = torch.nn.utils.get_total_norm(
            [weight.grad for weight in optimizer.param_groups[0]["params"]])
        optimizer.step()
        optimizer.zero_grad()
        if method.contrast == "wpcl":
            terms |= {"alpha": alpha, "beta": beta}
        after_step(terms, users)


def train(encoder: Encoder, adapted: peft.PeftModel, domain: Domain, config: Config, folder: Path) -> dict[str, float]:
    """Train as `config` says, from the checkpoint in `folder` if there is one; leave the epoch with the best validation
    N@10 in the encoder and return its scores."""
    method, penalty = METHODS[config.method], Penalty().to(encoder.device)
    penalty.requires_grad_(config.penalty_lr > 0)
    lora = torch.nn.ParameterList(weight for weight in adapted.parameters() if weight.requires_grad)
    optimizer = torch.optim.AdamW([{"params": lora.parameters(), "lr": config.lr},
                                   {"params": penalty.parameters(), "lr": config.penalty_lr}], weight_decay=0.0)
    samples = [(*data.leave_one_out(sequence, "train", config.history), sequence[:-3]) for sequence in domain.sequences]
    samples = [samples[user] for user in training_users(len(samples), config.train_users, config.seed)]
    valid = make_evaluation(domain, "valid", config.history, config.seed)
    steps = len(samples) // config.batch  # in an epoch
    log = Log(folder / "log.jsonl", config.log_every, config.epochs * steps, lambda: encoder.tokens)
    checkpoint = Checkpoint(folder / CHECKPOINT, config.save_every, log, optimizer, lora, penalty)

    def after_step(terms: dict[str, torch.Tensor], users: list[int]) -> None:
        """Fig. 1b's cosines when they are due, then the checkpoint, which has to find their line in the log."""
        if config.gradients_every and (log.step + 1) % config.gradients_every == 0:
            log.append({"step": log.step + 1} | gradient_cosines(encoder, method, [samples[user] for user in users],
                                                                 *penalty(), config.tau, config.tau_crtr, config.lam))
        checkpoint.after_step(terms, users)

    for epoch in range(max(1, math.ceil(log.step / steps)), config.epochs + 1):
        batches = shuffled_batches(len(samples), config.batch, config.seed, epoch)[log.step - (epoch - 1) * steps:]
        log.start(epoch)
        with checkpoint.stopping_after_a_step():
            train_epoch(encoder, method, penalty, optimizer, samples, batches, after_step,
                        config.tau, config.tau_crtr, config.lam)
        checkpoint.save()
        ranks, _ = evaluate(encoder, method.modalities, embed_items(encoder, method.modalities, domain), valid)
        scores = hits_and_ndcg(ranks)
        tqdm.write(f"epoch {epoch}: validation on {len(valid.users):,} users  {format_scores(scores)}")
        if scores["N@10"] > checkpoint.best["N@10"]:
            checkpoint.best, checkpoint.kept = scores, copy.deepcopy(lora.state_dict())
    log.bar.close()
    if log.seconds:
        print(f"{sum(log.seconds) / len(log.seconds) * steps / 60:.3g} minutes per epoch of training")
    lora.load_state_dict(checkpoint.kept)
    return checkpoint.best


# ----------------------------------------------------------------------------------------------------------------------
# A run: from a command line to a folder of results
# ----------------------------------------------------------------------------------------------------------------------

class Log:
    """log.jsonl and the progress bar: a line every `every` steps, with the mean of each term since the last one.

    The values stay on the device until a line is due, so that no step waits for them. Raises FloatingPointError then,
    with the first bad step, if one of them is not finite.
    """

    def __init__(self, path: Path, every: int, steps: int, count_tokens: Callable[[], int]):
        self.path, self.every, self.steps, self.count_tokens = path, every, steps, count_tokens
        self.step, self.pending, self.seconds = 0, [], []
        self.bar = bar(total=steps, desc="train", unit="step")

    def start(self, epoch: int) -> None:
        """A new epoch: time outside of the epochs is not counted."""
        self.epoch, self.users, self.tokens, self.clock = epoch, 0, self.count_tokens(), time.perf_counter()

    def __call__(self, terms: dict[str, torch.Tensor], users: list[int]) -> None:
        """Note a step's terms (scalars) and its users."""
        self.pending.append(torch.stack([value.detach() for value in terms.values()]))
        self.names, self.step, self.users = list(terms), self.step + 1, self.users + len(users)
        self.bar.update(self.step - self.bar.n)
        if self.step % self.every == 0:
            self.write()

    def write(self) -> None:
        """Write the line for the steps since the last one, if there are any."""
        if not self.pending:
            return
        values = torch.stack(self.pending).cpu()                                      # (steps, terms)
        if (bad := ~values.isfinite().all(dim=1)).any():
            at = int(bad.int().argmax())
            raise FloatingPointError(f"step {self.step - len(values) + at + 1} is the first that is not finite: "
                                     f"{dict(zip(self.names, values[at].tolist()))}; lower --lr or raise --tau")
        seconds, device = time.perf_counter() - self.clock, self.pending[0].device.type
        self.seconds += [seconds / len(values)] * len(values)                        # of each step
        means = {name: round(value, 6) for name, value in zip(self.names, values.mean(dim=0).tolist())}
        line = {"step": self.step, "epoch": self.epoch, **means, "users_per_s": round(self.users / seconds, 2),
                "tokens_per_s": round((self.count_tokens() - self.tokens) / seconds),
                "peak_gib": round(peak_gib(device), 3),
                "minutes_left": round((self.steps - self.step) * self.seconds[-1] / 60, 1)}
        self.append(line)
        self.pending = []
        self.start(self.epoch)

    def append(self, line: dict[str, float]) -> None:
        """Write and print a line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in line.items()))


class Checkpoint:
    """A file with all that a killed run needs to go on to the same numbers, on a CPU to the bit.

    It is written whole or not at all; the one before it stays until then. If there is one, it is taken up at once.
    """

    def __init__(self, path: Path, every: int, log: Log, optimizer, lora: torch.nn.Module, penalty: torch.nn.Module):
        self.path, self.every, self.log, self.stop = path, every, log, False
        self.parts = {"optimizer": optimizer, "lora": lora, "penalty": penalty}
        self.best, self.kept = {"N@10": -1.0}, {}  # the best epoch's scores on validation, and its LoRA
        if path.exists():
            self.restore()

    def after_step(self, terms: dict[str, torch.Tensor], users: list[int]) -> None:
        """Log a step; save when it is time to, or when the run is to stop."""
        self.log(terms, users)
        if self.stop or self.log.step % self.every == 0:
            self.save()

    def save(self) -> None:
        """Write the checkpoint; raise KeyboardInterrupt then if the run is to stop. Raises FloatingPointError instead
        if a step since the last checkpoint was not finite."""
        self.log.write()
        content, gpu = io.BytesIO(), torch.cuda.is_initialized()
        torch.save({name: part.state_dict() for name, part in self.parts.items()} | {
            "best": self.best, "kept": self.kept, "step": self.log.step, "log": self.log.path.stat().st_size,
            "random": torch.get_rng_state(), "random_gpu": torch.cuda.get_rng_state() if gpu else None}, content)
        with data.whole_file(self.path) as partial:
            partial.write_bytes(content.getbuffer())
        if self.stop:
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Go back to the checkpoint. Raises InputError if it is damaged."""
        try:
            saved = torch.load(self.path, weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged zip file has many ways to fail
            raise InputError(f"{self.path} is damaged ({type(error).__name__}); --restart begins anew") from None
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.best, self.kept, self.log.step = saved["best"], saved["kept"], saved["step"]
        os.truncate(self.log.path, saved["log"])
        torch.set_rng_state(saved["random"])
        if saved["random_gpu"] is not None:
            torch.cuda.set_rng_state(saved["random_gpu"])
        print(f"going on after step {self.log.step} of {self.log.steps}")

    @contextlib.contextmanager
    def stopping_after_a_step(self) -> Iterator[None]:
        """While the block runs, Ctrl-C and SIGTERM let the step end and be saved."""
        def ask(number, frame):
            self.stop = True
        handlers = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def peak_gib(device: str) -> float:
    """The most memory held so far in GiB, on the GPU or by this process; NaN where it is not known."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def format_scores(scores: dict[str, float | None]) -> str:
    """H@10 .1234  N@10 .0678 ..."""
    return "  ".join(f"{name} {'-' if value is None else f'{value:.4f}'}" for name, value in scores.items())


def write_text(path: Path, text: str) -> None:
    """Write lines of UTF-8, which appear when they are whole."""
    with data.whole_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    """Write readable JSON, which appears when it is whole."""
    write_text(path, json.dumps(content, indent=1))


def settings(config: Config, domain: Domain, device: str) -> dict:
    """config.json: every setting, versions, and digests of the data, the source and a given adapter or vectors."""
    given = Path(config.adapter).glob("adapter_*") if config.adapter else [Path(config.embeddings)]
    digest = lambda paths: hashlib.blake2b(
        b"".join(path.read_bytes() for path in sorted(paths) if path.is_file()), digest_size=16).hexdigest()
    versions = {"python": platform.python_version(), "pillow": PIL.__version__,
                **{package.__name__: package.__version__ for package in (torch, transformers, peft)}}
    return {**dataclasses.asdict(config), "device": device, **versions, "data_digest": domain.digest,
            "source_digest": digest([Path(__file__), Path(data.__file__)]), "given_digest": digest(given)}


def write_results(folder: Path, config: Config, domain: Domain, test: Evaluation, ranks: torch.Tensor,
                  full: torch.Tensor, valid: dict, rows: dict[str, dict]) -> str:
    """Write ranks.csv and metrics.json, as README.md describes them; return the tables, `rows` among them."""
    lines = [[domain.user_ids[user], domain.item_ids[item], f"{rank:g}", f"{rank_full:g}"]
             for user, item, rank, rank_full in zip(test.users, test.targets, ranks.tolist(), full.tolist())]
    data.write_csv(folder / "ranks.csv", ["user_id", "item_id", "rank", "rank_full"], lines)
    untied, name = ~torch.tensor(domain.tied), run_name(config)
    scores = {"test": hits_and_ndcg(ranks), "test_full": hits_and_ndcg(full),
              "test_untied": hits_and_ndcg(ranks[untied])}
    about = {"domain": domain.name, "method": name, "seed": config.seed, "model": config.model,
             "users": len(domain.user_ids), "items": len(domain.item_ids)}
    write_json(folder / "metrics.json", {**about, **scores, "valid": valid})
    return as_table({"chance": chance(), "popularity": popularity(domain, test)} | rows | {
        name: scores["test"],
        f"{name}, the {int(untied.sum()):,} users without a tie": scores["test_untied"],
        f"{name}, against all {len(domain.item_ids):,} items": scores["test_full"]}, "test") + "\n\n" + as_table(
        by_frequency(domain, test, ranks))


def as_table(rows: dict[str, dict], title: str = "") -> str:
    """Named rows of scores as Markdown; a score that does not exist is a dash."""
    columns = list(next(iter(rows.values())))
    text = lambda value: "-" if value is None else f"{value:.4f}"
    lines = [[title, *columns], ["---"] * (1 + len(columns)),
             *([name, *(text(scores[column]) for column in columns)] for name, scores in rows.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def set_up(config: Config) -> tuple[Domain, Path, str, str]:
    """The domain, its folder, the model and the device that `config` asks for, made if need be; says what they are."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA GPU; install a CUDA build of torch or take --device cpu")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    model = data.prepare_model(config.model, Path(config.data_dir))
    if METHODS[config.method].modalities:
        check_model(model, config.revision)  # before the data, which may take hours to fetch
    folder = data.prepare_domain(config.domain, Path(config.data_dir), config.mirror)
    domain = data.read_domain(folder)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}; {device}, "
          f"{config.method}, seed {config.seed}\n{data.describe(domain)}")
    if (users := min(config.train_users or math.inf, len(domain.user_ids))) < config.batch:
        raise InputError(f"{domain.name}: {users} users to train on, less than one --batch of {config.batch}")
    return domain, folder, model, device


def run_name(config: Config) -> str:
    """What tells a run's folder and its row in a table from others of its domain."""
    name = config.method + ("+zero-shot" if config.adapter else "")
    if config.embeddings:
        path = Path(config.embeddings).resolve()
        name += "+" + re.sub(r"-seed\d+$", "", path.parent.name if path.stem == "items" else path.stem)
    return name


def run(config: Config) -> Path:
    """Train and evaluate one method with one seed, or go on with it, or show its table if that is there already; return
    its folder. Raises InputError, which names what differs, if the folder holds a run with other settings."""
    domain, source, model, device = set_up(config)
    folder = Path(config.out, domain.name, f"{run_name(config)}-seed{config.seed}")
    wanted = settings(config, domain, device)
    with locked(folder):
        made = {} if config.restart else earlier_settings(folder, wanted)
        if made and (table := folder / TABLE).exists():  # the last file that a run writes
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(table.stat().st_mtime))
            print(f"\n{folder} is finished since {when}; --restart repeats it\n\n{table.read_text('utf-8')}")
            return folder
        if METHODS[config.method].modalities:
            encoder = build_encoder(domain, model, config.image_size, folder.parent, config.revision, device)
            if config.adapter:
                load_adapter(encoder, config.adapter)
            train_and_test = functools.partial(train_and_test_embedder, config, domain, encoder)
        else:
            vectors = read_vectors(Path(config.embeddings), domain, source) if config.embeddings else None
            train_and_test = functools.partial(train_and_test_downstream, config, domain, vectors, device)
        if not made:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_json(folder / "config.json", wanted)
        table = train_and_test(folder)
        write_text(folder / TABLE, table)
        (folder / CHECKPOINT).unlink(missing_ok=True)
    print(f"\n{table}\n\nwrote {folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))
    return folder


def earlier_settings(folder: Path, wanted: dict) -> dict:
    """The settings of the run in `folder`, {} if there is none. Raises InputError if they are not those `wanted`, apart
    from where things lie."""
    try:
        made = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        made = {}
    differing = [f"{name} was {made.get(name)!r}, now {wanted[name]!r}" for name in wanted
                 if made.get(name) != wanted[name] and name not in ("domain", "data_dir", "mirror", "out", "restart")]
    if differing:
        raise InputError(f"{folder} holds a run with other settings: {'; '.join(differing)}. --restart replaces it, "
                         "another --out leaves it alone")
    return made


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder if need be and keep other processes that ask for the same out of it while the block runs; the lock
    dies with the process. Raises InputError if another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(f"{folder}: another run is at work there; let it end, or take another --out") from None
    finally:
        if fcntl:
            os.close(handle)
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing was written


def train_and_test_embedder(config: Config, domain: Domain, encoder: Encoder, folder: Path) -> str:
    """Train if the method does and no adapter was given, score the test split, write the results into `folder` and
    return their tables."""
    method, rows, valid = METHODS[config.method], {}, None
    test = make_evaluation(domain, "test", config.history, config.seed)
    if not config.adapter and (method.contrast or method.topology):
        torch.manual_seed(config.seed)
        adapted = add_lora(encoder, config.lora_rank, config.lora_alpha, config.lora_dropout,
                           config.checkpointing == "on")
        valid = train(encoder, adapted, domain, config, folder)
        adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
        with adapted.disable_adapter():
            items = embed_items(encoder, method.modalities, domain)
            rows["before training"] = hits_and_ndcg(evaluate(encoder, method.modalities, items, test)[0])
    clock = time.perf_counter()
    items = embed_items(encoder, method.modalities, domain)
    print(f"{time.perf_counter() - clock:.1f} s to embed the {len(domain.item_ids):,} items, "
          f"peak memory {peak_gib(encoder.device.type):.2f} GiB")
    if not valid:
        untrained = make_evaluation(domain, "valid", config.history, config.seed)
        valid = hits_and_ndcg(evaluate(encoder, method.modalities, items, untrained)[0])
    spaces = {name: items[name] for name in (*BOTH, "fused") if name in items}
    safetensors.torch.save_file(spaces, folder / "items.safetensors", {"item_ids": json.dumps(domain.item_ids)})
    z = encoder.embed_fused(test.histories, method.modalities)
    ranks = rank_users(z["fused"], items["fused"], test.targets, test.negatives, test.bought)
    table = write_results(folder, config, domain, test, *ranks, valid, rows)
    contact_sheet(folder / "recommendations.png", domain, test, z, items)
    if len(method.modalities) == 2:
        table += "\n\n" + as_table({"N@10 of": queries(z, items, test)}) + "\n\n" + as_table(
            {space: geometry(z[space], items[space], test.targets, test.negatives) for space in z})
    return table


def train_and_test_downstream(config: Config, domain: Domain, vectors: torch.Tensor | None, device: str,
                              folder: Path) -> str:
    """train_and_test_embedder for a model of item ids or of given item vectors."""
    test, valid = (make_evaluation(domain, split, config.history, config.seed) for split in ("test", "valid"))
    if config.method != "mean-pool":
        model, scores = train_downstream(config.method, domain, valid, vectors, device, config.seed, config.history,
                                         config.train_users)
        return write_results(folder, config, domain, test, *model.rank(test), scores, {})
    ranks = [rank_users(torch.stack([vectors[history].mean(dim=0) for history in split.histories]), vectors,
                        split.targets, split.negatives, split.bought) for split in (test, valid)]
    return write_results(folder, config, domain, test, *ranks[0], hits_and_ndcg(ranks[1][0]), {})


# ----------------------------------------------------------------------------------------------------------------------
# The paper's evidence: tables over methods and seeds (Tables 2, 5), modality collapse (Section 3), downstream models
# (Table 4), other embeddings, cold start (Fig. 3)
# ----------------------------------------------------------------------------------------------------------------------

def read_vectors(path: Path, domain: Domain, folder: Path) -> torch.Tensor:
    """Item vectors (N, D), float32, from .safetensors (its tensor "fused", or the only one) or .npy. They stand in the
    order of the metadata's item_ids or else of items.csv in `folder`. Raises InputError if they do not fit."""
    try:
        if path.suffix == ".npy":
            tensor, ids = torch.from_numpy(numpy.load(path, allow_pickle=False)), None
        else:
            with safetensors.safe_open(path, "pt") as file:
                name, *others = sorted(file.keys(), key=lambda name: name != "fused")
                if others and name != "fused":
                    raise ValueError(f"none of its tensors {', '.join([name, *others])} is called fused")
                tensor, ids = file.get_tensor(name), json.loads((file.metadata() or {}).get("item_ids", "null"))
        place = {item: row for row, item in enumerate(ids or data.read_items(folder))}
    except InputError:
        raise
    except Exception as error:  # a damaged file has many ways to fail
        raise InputError(f"--embeddings {path} cannot be read: {' '.join(str(error).split())[:300]}; give a "
                         ".safetensors or .npy file") from None
    if tensor.ndim != 2 or len(tensor) != len(place):
        raise InputError(f"--embeddings {path} has the shape {tuple(tensor.shape)}; one row for each of the "
                         f"{len(place)} items is needed, in the order of "
                         f"{'its item_ids' if ids else folder / 'items.csv'}")
    if lacking := [item for item in domain.item_ids if item not in place]:
        raise InputError(f"--embeddings {path} has no vector for item {lacking[0]!r}: is it of another domain?")
    tensor = tensor[[place[item] for item in domain.item_ids]].float()
    if not tensor.isfinite().all():
        raise InputError(f"--embeddings {path} holds values that are not finite")
    return tensor


def load_adapter(encoder: Encoder, folder: str) -> None:
    """Put a trained adapter into the encoder. Raises InputError if there is none or it is of another model."""
    try:
        if not Path(folder, "adapter_config.json").exists():
            raise ValueError("there is no adapter_config.json in it")
        peft.PeftModel.from_pretrained(encoder.vlm, folder)
    except (ValueError, KeyError, RuntimeError, OSError, safetensors.SafetensorError) as error:
        raise InputError(f"--adapter {folder} does not fit: {' '.join(str(error).split())[:300]}; give the folder "
                         "adapter/ of a run with the same --model") from None


def two_sided_p(t: float, df: int) -> float:
    """P(|T| > t) of Student's t with df degrees of freedom, exact (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta, odd = math.atan2(abs(t), math.sqrt(df)), df % 2
    term, total = math.cos(theta) if odd else 1.0, 0.0
    for n in range(2 + odd, df + 1, 2):
        total, term = total + term, term * (n - 1) / n * math.cos(theta) ** 2
    inside = 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
    return max(0.0, 1 - inside)


def paired_t_test(a: list[float], b: list[float]) -> float:
    """The two-sided p of a paired t-test; NaN for fewer than two pairs, 1 if no pair differs."""
    if len(a) < 2:
        return math.nan
    differences = [x - y for x, y in zip(a, b)]
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    if spread == 0:
        return 1.0 if mean == 0 else 0.0
    return two_sided_p(mean / spread * math.sqrt(len(a)), len(a) - 1)


def reference(runs: dict[str, list[Path]]) -> str:
    """The method that a table compares with the others: vlm2rec or, without it, the one with the best N@10."""
    return "vlm2rec" if "vlm2rec" in runs else max(runs, key=lambda method: statistics.mean(
        score["N@10"] for score in read_scores(runs[method])))


def read_scores(folders: list[Path], part: str = "test") -> list[dict[str, float]]:
    """A part of each run's metrics.json."""
    return [json.loads((folder / "metrics.json").read_text("utf-8"))[part] for folder in folders]


def comparison(runs: dict[str, list[Path]], part: str = "test") -> str:
    """Several methods over the same seeds, as Markdown: mean ± standard deviation (ddof 1), the best of a column in
    bold, the second underlined, a star where the reference (see there) differs from the best other method with p < .05
    in a paired t-test over the seeds."""
    scores, ours = {method: read_scores(folders, part) for method, folders in runs.items()}, reference(runs)
    cells = {method: [] for method in runs}
    for name in chance():
        values = {method: [score[name] for score in rows] for method, rows in scores.items()}
        ranked = sorted(values, key=lambda method: -statistics.mean(values[method]))
        rival = next((method for method in ranked if method != ours), None)
        for method, row in values.items():
            text = f"{statistics.mean(row):.4f}" + (f" ± {statistics.stdev(row):.4f}" if len(row) > 1 else "")
            text = text.join({0: ("**", "**"), 1: ("<u>", "</u>")}.get(ranked.index(method), ("", "")))
            if method == ours and rival and paired_t_test(row, values[rival]) < 0.05:
                text += " *"
            cells[method].append(text)
    lines = [f"| {part}, {seed_range(runs)} | " + " | ".join(chance()) + " |", "|" + "---|" * (1 + len(chance()))]
    return "\n".join(lines + [f"| {method} | " + " | ".join(row) + " |" for method, row in cells.items()])


def seed_range(runs: dict[str, list[Path]]) -> str:
    """The seeds that a table is over, as its heading and its file name say it."""
    first, last = (next(iter(runs.values()))[k].name.rpartition("-")[2] for k in (0, -1))
    return first if first == last else f"{first}-{last.removeprefix('seed')}"


def user_gains(folders: list[Path]) -> dict[str, float]:
    """Each test user's N@10, as a mean over the runs in `folders`."""
    gains = collections.defaultdict(list)
    for folder in folders:
        for _, user, rank in data.read_csv(folder / "ranks.csv", ("user_id", "rank")):
            gains[user].append(1 / math.log2(1 + float(rank)) if float(rank) <= 10 else 0.0)
    return {user: statistics.mean(values) for user, values in gains.items()}


def differences(runs: dict[str, list[Path]]) -> str:
    """The reference against each other method, in N@10: the mean difference per user with its standard error, and p in
    paired t-tests over the users and over the seeds."""
    ours, lines = reference(runs), []
    gains = {method: user_gains(folders) for method, folders in runs.items()}
    seeds = {method: [score["N@10"] for score in read_scores(folders)] for method, folders in runs.items()}
    for method in (method for method in runs if method != ours):
        difference = [gain - gains[method][user] for user, gain in gains[ours].items()]
        error = statistics.stdev(difference) / math.sqrt(len(difference))
        better, worse = (sum(sign * d > 0 for d in difference) / len(difference) for sign in (1, -1))
        p = max(paired_t_test(difference, [0.0] * len(difference)), 1e-9)  # smaller ones are rounding
        lines.append(f"- {ours} against {method}, N@10 per user: {statistics.mean(difference):+.4f} ± {error:.4f} "
                     f"(standard error, {len(difference):,} users), better for {better:.0%}, worse for {worse:.0%}; "
                     f"p = {p:.1g} over the users, {paired_t_test(seeds[ours], seeds[method]):.2g} over the seeds")
    return "\n".join(lines).replace("p = 1e-09", "p < 1e-9").replace(", nan over the seeds", "")


def write_comparison(runs: dict[str, list[Path]]) -> None:
    """Print the tables over methods and seeds, and write them beside the runs."""
    text = "\n\n".join([comparison(runs), comparison(runs, "test_full"), comparison(runs, "valid"),
                        differences(runs)]).strip()
    path = next(iter(runs.values()))[0].parent / f"{'-'.join(runs)}-{seed_range(runs)}.md"
    write_text(path, text)
    print(f"\n{text}\n\nwrote {path}")


def queries(z: dict, e: dict, test: Evaluation) -> dict[str, float]:
    """N@10 when the histories of one space look for the items of another (Fig. 1a: f2f, t2f, v2f), and each modality
    by itself (t2t, v2v)."""
    pairs = {"f2f": ("fused", "fused"), "t2f": ("text", "fused"), "v2f": ("vision", "fused"),
             "t2t": ("text", "text"), "v2v": ("vision", "vision")}
    rank = lambda query, item: rank_users(z[query], e[item], test.targets, test.negatives, test.bought)[0]
    return {name: hits_and_ndcg(rank(query, item))["N@10"] for name, (query, item) in pairs.items()}


def geometry(z: torch.Tensor, e: torch.Tensor, targets: list[int], negatives: torch.Tensor) -> dict[str, float]:
    """A_pos, A_neg, U and S of a space on unit vectors (Table 1, Eqs. 4, 5).

    Args:
        z: (U, D) users; e: (N, D) items; targets: U items; negatives: (U, 100) items, the sampler P_n.
    Returns:
        Mean squared distances to the target and to the negatives, the logarithm of the mean of exp(-2 distance^2) over
        all pairs of a user and an item (P_u), and A_neg / A_pos.
    """
    positive, negative, near = [], [], []
    for start in range(0, len(z), 1024):
        part = slice(start, start + 1024)
        distance = 2 - 2 * cosine(z[part], e)                                                  # squared, (chunk, N)
        positive.append(distance.gather(1, torch.tensor(targets[part])[:, None]).flatten())
        negative.append(distance.gather(1, negatives[part]).mean(dim=1))
        near.append((-2 * distance).exp().mean(dim=1))
    a_pos, a_neg, uniformity = (torch.cat(values).mean().item() for values in (positive, negative, near))
    return {"A_pos": a_pos, "A_neg": a_neg, "U": math.log(uniformity), "S": a_neg / (a_pos + 1e-12)}


def gradient_cosines(encoder: Encoder, method: Method, batch: list[tuple], alpha: torch.Tensor, beta: torch.Tensor,
                     tau: float, tau_crtr: float, lam: float) -> dict[str, float]:
    """cos(g_total, g_T) and cos(g_total, g_V) (Fig. 1b): the method's gradient beside that of InfoNCE on one modality
    alone, for the batch that was just trained on, without dropout, over all of LoRA."""
    for layer in encoder.vlm.modules():  # eval() would switch checkpointing off too
        if isinstance(layer, torch.nn.Dropout):
            layer.eval()
    lora = [weight for weight in encoder.vlm.parameters() if weight.requires_grad]

    def gradient(of: Method) -> torch.Tensor:
        loss, _ = batch_loss(encoder, of, batch, alpha, beta, tau, tau_crtr, lam)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, lora)])
    total = gradient(method)
    cosines = {f"cos_{modality}": torch.cosine_similarity(total, gradient(METHODS[modality]), dim=0).item()
               for modality in BOTH}
    encoder.vlm.train()
    return cosines


def by_frequency(domain: Domain, test: Evaluation, ranks: torch.Tensor) -> dict[str, dict]:
    """H@k and N@k by how often the target occurs in the training split: all but the last two items of each user, also
    of those who were not trained on (Fig. 3)."""
    often = training_counts(domain)[test.targets]
    edges = [(0, 4), (5, 9), (10, 19), (20, None)]
    rows = {}
    for low, high in edges:
        these = (often >= low) & (often <= (high or often.max()))
        rows[f"targets seen {low}{f' to {high}' if high else ' times or more'} ({int(these.sum()):,} users)"] = (
            hits_and_ndcg(ranks[these]))
    return rows


class SequenceRecommender(torch.nn.Module):
    """SASRec (self-attention) or GRU4Rec over item ids (Table 2), or, given item vectors (N, D), initialised with them
    through one linear adapter to d (Task 2, Table 4). The paper does not say more; we make the vectors' norm 1, and
    train them too."""

    def __init__(self, kind: str, items: int, vectors: torch.Tensor | None = None, d: int = 128, length: int = 10,
                 dropout: float = 0.5):
        super().__init__()
        if vectors is None:
            self.table, self.adapter = torch.nn.Embedding(items, d), torch.nn.Identity()
            torch.nn.init.normal_(self.table.weight, std=0.02 if kind == "sasrec" else d ** -0.5)  # by validation
        else:
            self.table = torch.nn.Embedding.from_pretrained(torch.nn.functional.normalize(vectors, dim=1), freeze=False)
            self.adapter = torch.nn.Linear(vectors.shape[1], d)
        self.dropout, self.kind = torch.nn.Dropout(dropout), kind
        if kind == "sasrec":
            self.position = torch.nn.Embedding(length, d)
            torch.nn.init.normal_(self.position.weight, std=0.02)
            layer = torch.nn.TransformerEncoderLayer(d, 2, d, dropout, "gelu", batch_first=True, norm_first=True)
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
        places = torch.arange(sequences.shape[1], device=sequences.device)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(len(places), device=sequences.device)
        return self.body(self.dropout(states + self.position(places)), mask=mask, is_causal=True)

    @torch.no_grad()
    def rank(self, evaluation: Evaluation) -> tuple[torch.Tensor, torch.Tensor]:
        """Both ranks of a split's targets, as rank_users gives them, by inner product."""
        self.eval()
        states = self(pad(evaluation.histories, 0).to(self.table.weight.device))
        z = last_token(states, torch.tensor([len(history) - 1 for history in evaluation.histories])).cpu()
        return rank_users(z, self.items().cpu(), evaluation.targets, evaluation.negatives, evaluation.bought, dot=True)


def train_downstream(kind: str, domain: Domain, valid: Evaluation, vectors: torch.Tensor | None, device: str,
                     seed: int = 0, length: int = 10, train_users: int = 0, epochs: int = 200, patience: int = 20,
                     lr: float = 1e-3, batch: int = 32) -> tuple:
    """Train a SequenceRecommender on the latest `length` + 1 items before each user's last two, by cross-entropy over
    the catalogue. Returns it after the epoch with the best validation N@10, and that epoch's scores."""
    torch.manual_seed(seed)
    model = SequenceRecommender(kind, len(domain.item_ids), vectors, length=length).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    sequences = [domain.sequences[user][:-2][-length - 1:]
                 for user in training_users(len(domain.sequences), train_users, seed)]
    best, waited = {"N@10": -1.0}, 0
    for epoch in bar(range(1, epochs + 1), f"train {kind}"):
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
        if waited == patience:
            break
    model.load_state_dict(kept)
    return model, best


def contact_sheet(path: Path, domain: Domain, test: Evaluation, z: dict, e: dict, users: int = 4,
                  side: int = 72) -> None:
    """A picture of recommendations: for some users the latest items of the history and the one bought next, then the
    top five of each space among all items that the user did not buy before; a hit is framed."""
    font, rows = PIL.ImageFont.load_default(11), []
    for row in range(0, len(test.users), max(1, len(test.users) // users))[:users]:
        rows.append(("history", test.histories[row][-5:], None))
        rows.append(("bought next", [test.targets[row]], None))
        for space in (space for space in z if space != "fused" or len(z) != 2):  # of two, it is the other again
            scores = cosine(z[space][row:row + 1], e[space])[0]
            scores[[item for item in test.bought[row] if item != test.targets[row]]] = -torch.inf
            rows.append((f"top 5, {space}", scores.topk(5).indices.tolist(), test.targets[row]))
    height = side + 30
    sheet = PIL.Image.new("RGB", (110 + 5 * (side + 60), height * len(rows)), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for y, (name, items, target) in enumerate(rows):
        draw.text((6, y * height + side // 2), name, "black", font)
        if name == "history":
            draw.line((0, y * height, sheet.width, y * height), "grey", 2)
        for x, item in enumerate(items):
            left, top = 110 + x * (side + 60), y * height + 6
            sheet.paste(data.load_picture(domain.pictures[item]).resize((side, side)), (left, top))
            title = domain.titles[item] if len(domain.titles[item]) <= 22 else domain.titles[item][:21] + "…"
            draw.text((left, top + side + 3), title, "black", font)
            if item == target:
                draw.rectangle((left - 3, top - 3, left + side + 2, top + side + 2), outline="green", width=4)
    with data.whole_file(path) as partial:
        sheet.save(partial, "PNG")


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake that the message tells how to mend, 1 for a run that diverged, 130 for Ctrl-C."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    try:
        runs, configs = {}, parse_config(argv)
        for config in configs:
            runs.setdefault(run_name(config), []).append(run(config))
        if len(configs) > 1:
            write_comparison(runs)
    except (InputError, OSError, safetensors.SafetensorError) as error:
        message, code = str(error), 2
    except (RuntimeError, MemoryError) as error:
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        if not (on_gpu or isinstance(error, MemoryError) or "allocate memory" in str(error)):
            raise
        peak = peak_gib("cuda" if on_gpu else "cpu")
        message, code = (f"out of memory, at a peak of {peak:.1f} GiB; these need less: --checkpointing on (no other "
                         "results), a smaller --image-size (less of each picture), a shorter --history (less of each "
                         "user), a smaller --batch (fewer negatives)"), 2
    except FloatingPointError as error:
        message, code = f"{error}; the last good checkpoint stays", 1
    except KeyboardInterrupt:
        message, code = "stopped; the same command goes on", 130
    else:
        return 0
    print(f"error: {message}" if code != 130 else f"\n{message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    sys.exit(main())
