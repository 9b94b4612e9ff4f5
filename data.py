# SPDX-License-Identifier: MIT
"""The data side of VLM2Rec: one format on disk, its reader, the leave-one-out split, the evaluation's negatives.

A domain is a folder. Whoever writes these three things has one:

    items.csv          item_id,title,image         image: a path relative to the folder
    interactions.csv   user_id,item_id,timestamp   in any order; a timestamp is a number or an ISO 8601 date
    images/...

Below the reader stand the producers: the sample world and Amazon 2014, which write such a folder, and the tiny model,
which writes an ordinary Qwen2.5-VL checkpoint folder. Nothing that reads them can tell one from the other.
"""
import argparse
import ast
import colorsys
import contextlib
import csv
import difflib
import gzip
import hashlib
import html
import http.client
import io
import itertools
import json
import math
import operator
import os
import random
import re
import sys
import textwrap
import warnings
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from multiprocessing.pool import ThreadPool
from pathlib import Path
from time import monotonic, sleep
from typing import Callable, Collection, Iterator
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import filelock
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

CORE = 5                    # every user and every item has at least so many interactions (Section 5.1.1)
NEGATIVES = 100             # ranked beside the target (Section 5.1.3)
VALIDATION_USERS = 2000     # at most so many are scored after each epoch; the paper does not say
MAX_PIXELS = 40_000_000     # a larger picture is not decoded
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")  # nor is one that would start other programs (EPS)

class InputError(Exception):
    """The user's mistake, told in one line: what is wrong, where, and how to mend it."""


# The reader -----------------------------------------------------------------------------------------------------------

@dataclass
class Domain:
    """A domain in memory. Items and users are indices into these lists, in the order of the files."""
    name: str
    item_ids: list[str]
    titles: list[str]
    pictures: list[Path]
    user_ids: list[str]
    sequences: list[list[int]]   # per user the items, oldest first
    tied: list[bool]             # per user: have the last two items one timestamp? Then file order made the test item
    dropped: dict[str, int]      # reason: how many
    dropped_items: list[tuple[str, str, str]]  # of those without a title or a usable picture: item_id, reason, detail
    digest: str                  # of what is kept and of the bytes of the pictures

def read_csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield ("path, line number", the value of each of `columns`) per row of an RFC 4180 file."""
    names = ",".join(columns)
    if os.path.exists(path) and not os.path.isfile(path):  # a FIFO would be waited for
        raise InputError(f"{path} is not a regular file; it has to hold the columns {names}")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            header = next(rows, [])
            for name in columns:
                if header.count(name) != 1:
                    raise csv.Error(f"{'more than one' if name in header else 'no'} column {name}")
            for row in filter(None, rows):
                if len(row) != len(header):
                    raise csv.Error(f"{len(row)} fields where the header has {len(header)}")
                yield f"{path}, line {rows.line_num}", *(row[header.index(name)].strip() for name in columns)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; it has to hold the columns {names}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason}, byte {error.start}); save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}, line {max(1, rows.line_num)}: {error}; the header has to name {names}, and a field "
                         "that holds a comma or a quote stands in double quotes (RFC 4180)") from None

def read_items(folder: Path) -> dict[str, tuple[str, str]]:
    """items.csv as {item_id: (title, path of its picture)}; no picture may lie outside of `folder` or its images/."""
    roots = os.path.realpath(folder), os.path.realpath(folder / "images")  # the latter may be a link
    items = {}
    for where, item, title, image in read_csv(folder / "items.csv", ("item_id", "title", "image")):
        if not item:
            raise InputError(f"{where}: the item_id is empty; give every item an id")
        if item in items:
            raise InputError(f"{where}: item_id {item!r} is there twice; keep one row for each item")
        target = Path(os.path.realpath(folder / image.replace("\0", "?")))
        if not any(target.is_relative_to(root) for root in roots):
            raise InputError(f"{where}: the picture {image[:200]!r} is not a path inside {folder}; copy it there")
        items[item] = (" ".join(title.split()), image)
    return items

def read_interactions(folder: Path, items: dict) -> list[tuple[str, str, float]]:
    """interactions.csv as (user_id, item_id, timestamp), user by user, each oldest first, ties in the file's order."""
    users = {}
    for where, user, item, timestamp in read_csv(folder / "interactions.csv", ("user_id", "item_id", "timestamp")):
        if not user:
            raise InputError(f"{where}: the user_id is empty")
        if item not in items:
            raise InputError(f"{where}: item_id {item!r} is not in items.csv; add it there or drop the row")
        if not math.isfinite(when := parse_time(timestamp)):
            raise InputError(f"{where}: timestamp {timestamp!r} is neither a number, such as seconds since 1970, nor "
                             "an ISO 8601 date, such as 2024-05-01 or 2024-05-01T12:00:00Z")
        users.setdefault(user, []).append((user, item, when))
    return [row for rows in users.values() for row in sorted(rows, key=lambda row: row[2])]

def parse_time(timestamp: str) -> float:
    """A number as it is, an ISO 8601 date as seconds since 1970, in UTC if it names no zone; NaN for all else."""
    with contextlib.suppress(ValueError):
        return float(timestamp)
    with contextlib.suppress(ValueError):
        date = datetime.fromisoformat(timestamp)
        return (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp()
    return math.nan

def load_picture(file: Path | io.BytesIO) -> Image.Image:
    """Decode a picture's first frame to RGB, upright, on white where it is transparent. Raises whatever its decoder
    does if it is damaged, and ValueError if it has over MAX_PIXELS."""
    with Image.open(file, formats=FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels are over {MAX_PIXELS:,}")
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):  # 16 bits of grey, of which convert() would make white
            picture = picture.point(lambda value: value / 256)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")

def check_item(title: str, path: str, folder: Path) -> tuple[str, str, str]:
    """(digest of its picture's bytes, "", "") of an item that can be shown, else ("", the reason, a detail)."""
    if not os.path.isfile(folder / path) or not title:  # nor is a FIFO opened, which would be waited for
        reasons = {"no title": not title, "no picture": not path, "a URL, not a path": "://" in path,
                   "not a regular file": os.path.exists(folder / path), "a path with backslashes": "\\" in path}
        return "", next((reason for reason, holds in reasons.items() if holds), "no file"), path[:100]
    try:
        content = (folder / path).read_bytes()
        load_picture(io.BytesIO(content))
    except Exception as error:  # which one a damaged file raises is up to its decoder
        said = re.sub(" <.*?>", "", " ".join(str(error).split()))  # without an address in memory
        return "", "too many pixels" if "pixels" in said else "not decodable", said[:100]
    return hashlib.blake2b(content, digest_size=16).hexdigest(), "", ""

def in_threads(work: Callable, inputs: Collection, name: str, threads: int | None) -> Iterator:
    """Yield work(input) of each input, in their order, with a bar. Whatever ends it, Ctrl-C too, ends it at once."""
    with ThreadPool(threads) as pool:
        yield from tqdm(pool.imap(work, inputs), name, len(inputs), leave=False, disable=None)

def core(rows: list[tuple], k: int = CORE) -> list[tuple]:
    """The k-core of (user, item, ...) rows: drop users and items with fewer than k of them until there are none."""
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        kept = [row for row in rows if users[row[0]] >= k and items[row[1]] >= k]
        if len(kept) == len(rows):
            return rows
        rows = kept

def read_domain(folder: str | Path) -> Domain:
    """Read a domain folder: drop items without a title or a decodable picture, keep the earliest of a repeated
    (user, item), then 5-core. This and what it calls raise InputError for malformed files and if too little is left."""
    folder = Path(folder)
    items = read_items(folder)
    rows = read_interactions(folder, items)
    with warnings.catch_warnings(action="ignore"):  # of huge pictures: load_picture refuses them
        check = lambda item: check_item(*item, folder)
        checks = dict(zip(items, in_threads(check, items.values(), "check pictures", os.cpu_count())))
    digests = {item: digest for item, (digest, _, _) in checks.items() if digest}
    dropped_items = [(item, *why) for item, (_, *why) in checks.items() if item not in digests]
    untitled = sum(reason == "no title" for _, reason, _ in dropped_items)
    shown = [row for row in rows if row[1] in digests]
    first = {}
    for row in shown:
        first.setdefault(row[:2], row)
    kept = core(list(first.values()))
    dropped = {"items without a title": untitled,
               "items without a decodable picture": len(dropped_items) - untitled,
               "interactions with such items": len(rows) - len(shown),
               "repeated interactions": len(shown) - len(first),
               "interactions outside the 5-core": len(first) - len(kept)}
    if not kept:
        raise InputError(f"{folder}: nothing is left after {CORE}-core filtering; dropped "
                         + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
                         + f"; first unusable items: {examples(dropped_items) or 'none'}")
    return index_domain(folder, items, digests, kept, dropped, dropped_items)

def index_domain(folder: Path, items: dict, digests: dict, rows: list[tuple], dropped: dict, lost: list) -> Domain:
    """Number what the reader kept."""
    name, kept = folder.resolve().name, {item for _, item, _ in rows}
    item_ids = [item for item in items if item in kept]
    titles, pictures = [items[item][0] for item in item_ids], [folder / items[item][1] for item in item_ids]
    index = {item: number for number, item in enumerate(item_ids)}
    users = {user: list(events) for user, events in itertools.groupby(rows, key=lambda row: row[0])}
    sequences = [[index[item] for _, item, _ in events] for events in users.values()]
    tied = [events[-1][2] == events[-2][2] for events in users.values()]
    if len(item_ids) < (least := max(map(len, sequences)) + NEGATIVES):
        raise InputError(f"{name}: {len(item_ids)} items are too few to rank {NEGATIVES} outside the longest sequence "
                         f"beside the target; bring at least {least}")
    content = [list(zip(item_ids, titles, map(digests.get, item_ids))), list(users), sequences, tied]
    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
    return Domain(name, item_ids, titles, pictures, list(users), sequences, tied, dropped, lost, digest)

def examples(dropped_items: list[tuple[str, str, str]]) -> str:
    """The first three of the dropped items with their reasons, short; "" if there are none."""
    named = ", ".join(f"{item!r:.20} ({reason})" for item, reason, _ in dropped_items[:3])
    return textwrap.shorten(named, 74, placeholder=" ...")

def describe(domain: Domain) -> str:
    """What was read and what was dropped, for people, in lines of at most 100 characters."""
    users, events = len(domain.user_ids), sum(map(len, domain.sequences))
    lost = ", ".join(f"{count:,} {reason}" for reason, count in domain.dropped.items() if count) or "nothing"
    named = examples(domain.dropped_items)
    lines = [f"{domain.name}: {users:,} users, {len(domain.item_ids):,} items, {events:,} interactions, mean length "
             f"{events / users:.1f}", f"  dropped: {lost}", f"  first unusable items: {named}" if named else "",
             f"  test item decided by a tie in time: {sum(domain.tied) / users:.1%} of the users"]
    return "\n".join(textwrap.fill(line, 100, subsequent_indent="    ") for line in lines if line)


# The split and the negatives (Sections 5.1.1, 5.1.3) ------------------------------------------------------------------

def leave_one_out(sequence: list[int], split: str, length: int = 10) -> tuple[list[int], int]:
    """(history, target) of a user. The test target is the last item, validation's the second to last, training's the
    third to last; the history is what comes before the target, its latest `length` items."""
    at = len(sequence) - {"test": 1, "valid": 2, "train": 3}[split]
    return sequence[max(0, at - length):at], sequence[at]

def draw_negatives(user_id: str, sequence: list[int], items: int, split: str, seed: int) -> list[int]:
    """NEGATIVES distinct items outside the user's whole sequence, uniform. They depend on (seed, split, user) alone, so
    that every method ranks the same candidates."""
    own = set(sequence)
    draw = random.Random(f"{seed} {split} {user_id}").sample(range(items), NEGATIVES + len(own))
    return [item for item in draw if item not in own][:NEGATIVES]

def validation_users(users: int, seed: int) -> list[int]:
    """The users that are scored after each epoch: all, or VALIDATION_USERS of them, fixed by the seed."""
    return sorted(random.Random(f"{seed} validation users").sample(range(users), min(users, VALIDATION_USERS)))


# Producers: whatever writes a domain folder or a checkpoint folder ----------------------------------------------------

@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes that ask for the same `path` out while the block runs, by a file beside it; it dies with the
    process. If another one has it, `wait`, which says so, or raise InputError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        held.acquire(blocking=False)
    except filelock.Timeout:
        if not wait:
            raise InputError(f"{path}: another run is at work there; let it end, or take another --out") from None
        print(f"waiting for another process, which is preparing {path}", flush=True)
        held.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows refuses, and filelock removes it after the release
            os.unlink(held.lock_file)  # while it is held: who waits sees that the file has no name any more, asks anew
        held.release()

@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if the block ends well, and vanishes if it does not."""
    partial = path.with_name(f"{path.name}.part")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # the usual one; safetensors makes it 0600
        yield partial
        partial.chmod(mode)
        os.replace(partial, path)
    except OSError as error:  # a write that fails does not say where
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)

def check_domain(domain: str, data_dir: Path) -> Path:
    """The folder of a domain: a path if it has a separator, else data_dir/domain. Raises InputError, at once, unless
    it is there or can be made."""
    folder = data_dir / domain
    if os.sep in domain or "/" in domain:
        if not os.path.isdir(domain):
            raise InputError(f"{domain} is no folder; a domain is one with items.csv, interactions.csv and images/")
        return Path(domain)
    if domain not in KNOWN and not (folder / "items.csv").exists():
        there = [path.parent.name for path in sorted(data_dir.glob("*/items.csv"))]
        close = [f"./{domain}"] if os.path.isdir(domain or "?") else difflib.get_close_matches(domain, KNOWN + there, 1)
        near = "".join(f"did you mean {name}? " for name in close)
        raise InputError(f"{folder / 'items.csv'} is missing. {near}Write items.csv, interactions.csv and images/ "
                         f"there, give the path of another folder, or take one of {', '.join(KNOWN)}")
    return folder

def prepare_domain(domain: str, data_dir: Path, mirror: str = "") -> Path:
    """`check_domain`, and the domain is made if it is one that we know how to make and not there yet."""
    folder = check_domain(domain, data_dir)
    last = folder / "items.csv"  # of the files that are written: where it is, the domain is whole
    if domain in KNOWN and not last.exists():
        with lock(folder, wait=True):
            if domain == "sample" and not last.exists():  # if it does, another process was first
                write_sample_world(folder)
            if domain in AMAZON and not last.exists():
                prepare_amazon(domain, folder, data_dir / "amazon2014", mirror.rstrip("/"))
    return folder

def prepare_model(model: str, data_dir: Path) -> str:
    """What `from_pretrained` takes for a model: a hub name or a folder as it is; `tiny` is written under data_dir."""
    if model != "tiny":
        return model
    folder, partial = data_dir / "tiny-qwen2.5-vl", data_dir / "tiny-qwen2.5-vl.part"
    if not folder.exists():
        with lock(folder, wait=True):
            if not folder.exists():  # if it does, another process was first
                write_tiny_model(partial)  # over what a killed run left there
                os.replace(partial, folder)
    return str(folder)

NOUNS = ["lantern", "kettle", "puzzle", "scarf", "drum", "kite", "clock", "basket"]   # one for each category
BRANDS = ["Arvo", "Belka", "Corin", "Dasha", "Elmo", "Fjord", "Gusto", "Halma"]       # one for each style
SHAPES = ["disc", "square", "triangle", "cross", "ring", "bars", "diamond", "checks"]  # one for each category

def write_sample_world(folder: Path, seed: int = 0, users: int = 1200, per_cell: int = 8,
                       brand: float = 0.7, shape: float = 0.7) -> None:
    """Write a synthetic domain in which each modality is clear about one thing and vague about another.

    Items have a category and a style, 8 of each, `per_cell` items of log-normal popularity in every cell. The title's
    noun names the category; its brand is the style's in a share `brand` of the items, else a random one. The picture's
    hue shows the style; its shape is the category's in a share `shape`, else a random one; place, size and shade vary.
    A user starts in a random cell and takes 5 to 10 steps: at each the category stays (50 %), moves on to the next one
    (35 %) or is drawn anew (15 %), and so does the style (60, 25, 15 %); the user takes a new item of that cell by
    popularity. Between two steps pass 0 days (20 %) or 1 to 9. The file is in the order of the items, as Amazon's is.
    """
    rng = random.Random(f"sample world {seed}")
    cells = {(category, style): [f"{category}{style}{k:02}" for k in range(per_cell)]
             for category in range(8) for style in range(8)}
    popularity = {item: rng.lognormvariate(0, 0.7) for items in cells.values() for item in items}
    blur = lambda value, share: value if rng.random() < share else rng.randrange(8)
    move = lambda value, *odds: rng.choices([value, (value + 1) % 8, rng.randrange(8)], odds)[0]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows, events = [], []
    for (category, style), items in cells.items():
        for item in items:
            title = f"{BRANDS[blur(style, brand)]} {NOUNS[category]} {rng.randrange(100)}"
            rows.append([item, title, f"images/{item}.png"])
            draw_item(rng, SHAPES[blur(category, shape)], style / 8).save(folder / "images" / f"{item}.png")
    for user in range(users):
        category, style, day, taken = rng.randrange(8), rng.randrange(8), 16000 + rng.randrange(365), set()
        for _ in range(rng.randint(5, 10)):
            category, style = move(category, 0.5, 0.35, 0.15), move(style, 0.6, 0.25, 0.15)
            if free := [item for item in cells[category, style] if item not in taken]:
                day += rng.randint(1, 9) if rng.random() < 0.8 else 0
                taken.add(item := rng.choices(free, [popularity[item] for item in free])[0])
                events.append([f"u{user:04}", item, day * 86400])
    write_csv(folder / "interactions.csv", ["user_id", "item_id", "timestamp"], sorted(events, key=lambda row: row[1]))
    write_csv(folder / "items.csv", ["item_id", "title", "image"], rows)  # last: where it is, the domain is whole

def draw_item(rng: random.Random, shape: str, hue: float, size: int = 84) -> Image.Image:
    """Draw one shape in one colour on a pale ground; place, size and shade come from `rng`."""
    saturated = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.7, 1), rng.uniform(0.6, 0.95))
    colour, ground = tuple(int(255 * part) for part in saturated), (rng.randint(225, 255),) * 3
    picture = Image.new("RGB", (size, size), ground)
    draw, r = ImageDraw.Draw(picture), rng.randint(size // 4, size // 3)
    x, y = rng.randint(r + 2, size - r - 2), rng.randint(r + 2, size - r - 2)
    box, third = (x - r, y - r, x + r, y + r), 2 * r // 3
    if shape in ("disc", "ring"):
        draw.ellipse(box, fill=colour if shape == "disc" else ground, outline=colour, width=max(1, r // 3))
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape in ("triangle", "diamond"):
        lower = [(x - r, y + r), (x + r, y + r)] if shape == "triangle" else [(x + r, y), (x, y + r), (x - r, y)]
        draw.polygon([(x, y - r), *lower], fill=colour)
    else:  # on a grid of 3 x 3: cross, bars, checks
        filled = {"cross": (1, 3, 4, 5, 7), "bars": (0, 3, 6, 2, 5, 8), "checks": (0, 2, 4, 6, 8)}[shape]
        for row, column in (divmod(cell, 3) for cell in filled):
            left, top = x - r + column * third, y - r + row * third
            draw.rectangle((left, top, left + third - 1, top + third - 1), fill=colour)
    return picture

def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    """Write an RFC 4180 file in UTF-8, which appears when it is whole."""
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])

def write_tiny_model(folder: Path) -> None:
    """Write a checkpoint folder: a Qwen2.5-VL with the same 250,000 random parameters every time, and a BPE to which
    each of the sample world's words is a token, as common words are to a real one; others it spells out by bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLModel
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    marks = ["<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = [*BRANDS, *(f"\u0120{word}" for word in [*NOUNS, *range(100)])]  # \u0120 is a space, to the bytes' alphabet
    merges = list(dict.fromkeys((word[:k], word[k]) for word in words for k in range(1, len(word))))  # letter by letter
    symbols = marks + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    ids = {symbol: number for number, symbol in enumerate(symbols)}
    bpe = Tokenizer(models.BPE(vocab=ids, merges=merges))  # by hand: the library's trainer differs from run to run
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=marks[0], eos_token=marks[1],
                                        additional_special_tokens=marks[2:])
    text = dict(vocab_size=len(ids), hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=8192, bos_token_id=None, eos_token_id=ids[marks[1]],
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]})
    vision = dict(depth=2, hidden_size=48, intermediate_size=128, num_heads=3, out_hidden_size=64,
                  fullatt_block_indexes=[1])
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, vision_start_token_id=ids["<|vision_start|>"],
                              vision_end_token_id=ids["<|vision_end|>"], image_token_id=ids["<|image_pad|>"],
                              video_token_id=ids["<|video_pad|>"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2_5_VLModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # it would be 0600


# Amazon 2014 (McAuley et al., SIGIR 2015): reviews and metadata, then the pictures ------------------------------------

AMAZON = {"toys": ("Toys_and_Games", 19_412, 11_924, 167_597),  # name in the files; the published 5-core's users,
          "beauty": ("Beauty", 22_363, 12_101, 198_502),        # items and interactions
          "clothing": ("Clothing_Shoes_and_Jewelry", 39_387, 23_033, 278_677),
          "sports": ("Sports_and_Outdoors", 35_598, 18_357, 296_337)}
KNOWN = ["sample", *AMAZON]  # domains that we know how to make
ARCHIVES = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"  # answered in September 2026
PICTURES = "https://m.media-amazon.com"  # serves today what the metadata's hosts served
PICTURE_HOSTS = {"ecx.images-amazon.com", "g-ecx.images-amazon.com",
                 "images-na.ssl-images-amazon.com", "m.media-amazon.com"}
WORKERS = 16               # pictures fetched at once
TRIES, BACK_OFF = 4, 1.0   # attempts, and the seconds before the second one; they double from there
TIMEOUT, MAX_SECONDS = 20.0, 60.0  # an attempt fails after so long without a byte, at a picture after so long in all
MAX_BYTES = 10_000_000     # nor is a larger picture taken

class FetchError(Exception):
    """Why an address gives no usable content. It begins with "no answer" where trying later may help."""

class CheckedRedirects(HTTPRedirectHandler):
    """Follows a redirect only by http or https, and only to the same host or one of PICTURE_HOSTS."""
    def redirect_request(self, request, file, code, message, headers, address):
        """What urllib asks for each redirect."""
        url = urlsplit(address)
        if url.scheme not in ("http", "https") or url.netloc not in {request.host, *PICTURE_HOSTS}:
            raise FetchError("redirected to another host")
        return super().redirect_request(request, file, code, message, headers, address)

def fetch(address: str, start: int = 0, name: str = "", seconds: float = math.inf) -> Iterator[bytes]:
    """Yield what lies at `address` from byte `start` on. After a network error, a cut-off, 429, 5xx or `seconds` it
    asks for the rest, later and later or when the server says. A `name` shows a bar. Raises FetchError, with why."""
    for attempt in range(TRIES):
        wait = BACK_OFF * 2 ** attempt
        headers = {"User-Agent": "vlm2rec"} | ({"Range": f"bytes={start}-"} if start else {})
        try:
            request = Request(address, headers=headers)
            with build_opener(CheckedRedirects).open(request, timeout=TIMEOUT) as response:
                for chunk in receive(response, start, name, monotonic() + seconds):
                    start += len(chunk)
                    yield chunk
            return
        except HTTPError as error:
            if error.code == 416 and start:  # nothing comes after what we have
                return
            if error.code != 429 and error.code < 500:
                raise FetchError(f"HTTP {error.code}") from None
            reason, after = f"HTTP {error.code}", error.headers.get("Retry-After", "")
            wait = min(float(after), 60.0) if after.isdigit() else wait
        except ValueError as error:  # a redirect or a header that makes no sense
            raise FetchError(f"malformed answer: {error}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        if attempt + 1 < TRIES:
            sleep(wait)
    raise FetchError(f"no answer: {reason}")

def receive(response: http.client.HTTPResponse, start: int, name: str, end: float) -> Iterator[bytes]:
    """Yield what a response sends from byte `start` on. Raises OSError if it is cut off or goes on after `end`."""
    if response.status != 206:  # 206: the server sends only what we lack
        response.read(start)
    total = start + response.length if response.length else None
    with tqdm(desc=name, total=total, initial=start, unit="B", unit_scale=True, disable=not name or None) as bar:
        while chunk := response.read1(1 << 16):
            if monotonic() > end:
                raise TimeoutError("it takes too long")
            bar.update(len(chunk))
            yield chunk
    if response.length:
        raise ConnectionError(f"cut off, {response.length:,} bytes are missing")

def get_archives(names: list[str], folder: Path, base: str) -> list[Path]:
    """The archives' paths in `folder`, downloaded unless they are there; what an earlier run left is continued."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in names]
    for path in paths:
        if path.exists():
            continue
        part = path.with_name(f"{path.name}.part")
        try:
            with open(part, "ab") as file:
                file.writelines(fetch(f"{base}/{path.name}", file.tell(), path.name))
        except FetchError as error:
            raise InputError(f"cannot fetch {base}/{path.name} ({error}); run again, try --mirror, or put "
                             f"{' and '.join(names)}, fetched by other means, into {folder}") from None
        os.replace(part, path)
    return paths

def read_lines(path: Path, parse: Callable) -> Iterator:
    """Yield parse(line) for each line of a gzipped file."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = tqdm(file, path.name, unit=" lines", unit_scale=True, leave=False, disable=None)
            for number, line in enumerate(lines, 1):
                yield parse(line)
    except Exception as error:  # damage has many names
        raise InputError(f"{path} is cut off or damaged, line {number}: {type(error).__name__}: {error}; delete it to "
                         "fetch it anew") from None

def parse_metadata(line: str, items: set[str]) -> tuple[str, str, str] | None:
    """(item, title, picture's address) of a line of meta_*.json.gz, which is a Python literal, or None if it is not
    about one of `items`: most lines are not, and reading the literal is what takes time."""
    start = re.match(r"\{'asin': '(\w+)'", line)
    if start and start[1] not in items:
        return None
    row = ast.literal_eval(line)
    title = " ".join(html.unescape(row.get("title") or "").split())
    title = title.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # halves of a character
    return (row["asin"], title, row.get("imUrl") or "") if row["asin"] in items else None

def obstacle(item: str, title: str, address: str) -> str:
    """Why an item cannot be shown, whatever its picture's server says, or ""."""
    host = re.match(r"https?://([^/?#]*)", address)
    reasons = {"no title": not title,
               "odd item id": not re.fullmatch(r"[A-Za-z0-9]{1,20}", item),  # it becomes a file's name
               "no picture": not address, "placeholder picture": "no-img" in address,
               "picture on an unknown host": not host or host[1] not in PICTURE_HOSTS}
    return next((reason for reason, holds in reasons.items() if holds), "")

def fetch_picture(address: str, path: Path) -> str:
    """Download a picture to `path`, which appears when it is whole and decodes. Returns "", or why it does not."""
    if path.exists():
        return ""
    content = b""
    try:
        for chunk in fetch(address, seconds=MAX_SECONDS):
            content += chunk
            if len(content) > MAX_BYTES:
                return f"over {MAX_BYTES:,} bytes"
        picture = load_picture(io.BytesIO(content))
    except FetchError as error:
        return str(error)
    except Exception as error:  # whatever a decoder raises: it is no picture
        return "too many pixels" if "pixels" in str(error) else "not a picture"
    if min(picture.size) < 2:
        return "picture of a single pixel"
    with whole_file(path) as partial:
        partial.write_bytes(content)
    return ""

def fetch_pictures(addresses: dict[str, str], folder: Path) -> dict[str, str]:
    """Download {item: address} to `folder`/item.jpg. Returns {item: reason} of those that failed. Raises InputError if
    most failed, or over 1 % had no answer: then it is the network, not the links, and a later run can do better."""
    folder.mkdir(parents=True, exist_ok=True)
    get = lambda item: fetch_picture(addresses[item], folder / f"{item}.jpg")
    failed, silent = {}, 0
    for count, (item, reason) in enumerate(zip(addresses, in_threads(get, addresses, "pictures", WORKERS)), 1):
        if reason:
            failed[item] = reason
            silent += reason.startswith("no answer")
        if len(failed) > max(50, count / 2) or silent > max(5, len(addresses) / 100):
            raise InputError(f"{len(failed)} of {count} pictures failed, {silent} without an answer, the last one "
                             f"{addresses[item]} ({reason}); check the network, then run again: it goes on")
    return failed

def prepare_amazon(domain: str, folder: Path, archives: Path, mirror: str = "") -> None:
    """Make one of the four Amazon domains from nothing: download, filter to the 5-core, fetch the pictures, drop items
    without title or picture, filter again, write. Interrupted at any moment, it goes on when called again."""
    if mirror and not re.match(r"https?://[\w.:-]+(/|$)", mirror):
        raise InputError(f"--mirror {mirror}: it has to be an address such as https://example.org/amazon")
    names = [f"reviews_{AMAZON[domain][0]}_5.json.gz", f"meta_{AMAZON[domain][0]}.json.gz"]
    paths = get_archives(names, archives, mirror or ARCHIVES)
    triple = operator.itemgetter("reviewerID", "asin", "unixReviewTime")  # user, item, time
    reviews = list(read_lines(paths[0], lambda line: triple(json.loads(line))))
    reviewed = {item for _, item, _ in reviews}
    about = dict.fromkeys(reviewed, ("", ""))  # title, picture's address
    about |= {row[0]: row[1:] for row in read_lines(paths[1], lambda line: parse_metadata(line, reviewed)) if row}
    reasons = {item: reason for item in sorted(about) if (reason := obstacle(item, *about[item]))}
    shown = core([row for row in reviews if row[1] not in reasons])
    addresses = {item: (mirror or PICTURES) + quote(urlsplit(about[item][1]).path, safe="/%+,")
                 for item in sorted({item for _, item, _ in shown})}
    reasons |= fetch_pictures(addresses, folder / "images")
    final = core([row for row in shown if row[1] not in reasons])
    print(amazon_table(domain, reviews, core(reviews), final, reasons))
    dropped = [[item, reason, about[item][1]] for item, reason in sorted(reasons.items())]
    items = [[item, about[item][0], f"images/{item}.jpg"] for item in sorted({item for _, item, _ in final})]
    write_csv(folder / "dropped.csv", ["item_id", "reason", "address"], dropped)
    write_csv(folder / "interactions.csv", ["user_id", "item_id", "timestamp"], final)  # in the archive's order
    write_csv(folder / "items.csv", ["item_id", "title", "image"], items)  # last: where it is, the domain is whole

def amazon_table(domain: str, reviews: list, five_core: list, final: list, reasons: dict[str, str]) -> str:
    """Users, items and interactions at each step beside the published counts, and what was lost why."""
    count = lambda rows: (len({user for user, _, _ in rows}), len({item for _, item, _ in rows}), len(rows))
    steps = {"published 5-core": AMAZON[domain][1:], "reviews as fetched": count(reviews),
             "their 5-core": count(five_core), "with title and picture, 5-core": count(final)}
    lines = [f"  {name:32}" + "".join(f"{number:>14,}" for number in counts) for name, counts in steps.items()]
    lost = [f"{number:,} {reason}" for reason, number in Counter(reasons.values()).most_common()]
    return "\n".join([f"{domain}, Amazon 2014", f"  {'':32}{'users':>14}{'items':>14}{'interactions':>14}", *lines,
                      f"  items dropped: {', '.join(lost) or 'none'}"])

def main() -> int:
    """Prepare a domain without training: `python data.py toys`."""
    parser = argparse.ArgumentParser(description="Prepare a domain: download, filter and write it, without training.")
    parser.add_argument("domain", choices=KNOWN)
    parser.add_argument("--data-dir", default="domains", help="it goes to DATA_DIR/DOMAIN (default: domains)")
    parser.add_argument("--mirror", default="", help="address of archives and pictures, instead of their own")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal shows what it can
    try:
        print(describe(read_domain(prepare_domain(args.domain, Path(args.data_dir), args.mirror))))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
