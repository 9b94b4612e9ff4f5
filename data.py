# SPDX-License-Identifier: MIT
"""The data side of VLM2Rec: one format on disk, its reader, the leave-one-out split, the evaluation's negatives.

A domain is a folder. Whoever writes these three things has one:

    items.csv          item_id,title,image         image: a path relative to the folder
    interactions.csv   user_id,item_id,timestamp   in any order; the timestamp is a number that grows with time
    images/...

Below the reader stand the producers: the sample world, which writes such a folder, and the tiny model, which writes an
ordinary Qwen2.5-VL checkpoint folder. Nothing that reads either can tell it from the real thing.
"""
from __future__ import annotations

import argparse
import ast
import collections
import colorsys
import concurrent.futures
import contextlib
import csv
import gzip
import hashlib
import html
import http.client
import io
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Callable, Iterator, NamedTuple

from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

CORE = 5                    # every user and every item has at least so many interactions (Section 5.1.1)
NEGATIVES = 100             # ranked beside the target (Section 5.1.3)
VALIDATION_USERS = 2000     # at most so many are scored after each epoch; the paper does not say
MAX_PIXELS = 40_000_000     # a larger picture is not decoded
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")  # nor is one that would start another program, such as EPS
FROM_THE_END = {"test": 1, "valid": 2, "train": 3}  # leave-one-out: a split's target, counted from the sequence's end


class InputError(Exception):
    """The user's mistake, told in one line: what is wrong, where, and how to mend it."""


# ----------------------------------------------------------------------------------------------------------------------
# The reader
# ----------------------------------------------------------------------------------------------------------------------

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
    digest: str                  # of all of the above and of the bytes of the pictures


def read_csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple]:
    """Yield (line number, value of each of `columns`) per row of an RFC 4180 file; further columns are ignored.

    Raises InputError, with file and line, for a file that is missing, empty, not UTF-8 or not well-formed.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            header = next(rows, [])
            for name in columns:
                if header.count(name) != 1:
                    raise InputError(f"{path}, line 1: {'more than one' if name in header else 'no'} column {name}; "
                                     f"the header has to name {','.join(columns)}")
            where = [header.index(name) for name in columns]
            for row in rows:
                if row and len(row) != len(header):
                    raise InputError(f"{path}, line {rows.line_num}: {len(row)} fields where the header has "
                                     f"{len(header)}; put a field that holds a comma into double quotes")
                if row:
                    yield (rows.line_num, *(row[k].strip() for k in where))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; it has to hold the columns {','.join(columns)}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason}, byte {error.start}); save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: {error}; quote fields as RFC 4180 says") from None


def read_items(folder: Path) -> dict[str, tuple[str, Path]]:
    """items.csv as {item_id: (title, path of its picture)}. Raises InputError for an id that is empty or stands twice,
    or for a picture outside the folder."""
    roots = [folder.resolve(), (folder / "images").resolve()]  # images/ may be a link, but no picture may lead out
    items = {}
    for line, item, title, image in read_csv(folder / "items.csv", ("item_id", "title", "image")):
        if not item or item in items:
            raise InputError(f"{folder / 'items.csv'}, line {line}: item_id {item!r} is "
                             + ("there twice; keep one row for each item" if item else "empty; give every item an id"))
        try:
            inside = any((folder / image).resolve().is_relative_to(root) for root in roots)
        except (ValueError, OSError, RuntimeError):  # a null byte, a name too long, a loop of links
            inside = False
        if not inside:
            raise InputError(f"{folder / 'items.csv'}, line {line}: the picture {image[:200]!r} is not a path inside "
                             f"{folder}; copy it there and name it relative to that folder")
        items[item] = (" ".join(title.split()), folder / image)
    return items


def read_interactions(folder: Path, items: dict) -> dict[str, list[tuple[str, float]]]:
    """interactions.csv as {user_id: [(item_id, timestamp), oldest first]}. The sort is stable: rows with equal
    timestamps keep the order of the file. Raises InputError for an unknown item or a timestamp that is no number."""
    path, users = folder / "interactions.csv", {}
    for line, user, item, timestamp in read_csv(path, ("user_id", "item_id", "timestamp")):
        if not user:
            raise InputError(f"{path}, line {line}: the user_id is empty")
        if item not in items:
            raise InputError(f"{path}, line {line}: item_id {item!r} is not in items.csv; add it there or drop the row")
        try:
            when = float(timestamp)
        except ValueError:
            when = math.nan
        if not math.isfinite(when):
            raise InputError(f"{path}, line {line}: timestamp {timestamp!r} is not a number; use seconds since 1970")
        users.setdefault(user, []).append((item, when))
    for events in users.values():
        events.sort(key=lambda event: event[1])
    return users


def load_picture(file: Path | io.BytesIO) -> Image.Image:
    """Decode a picture's first frame to RGB, upright, on white where it is transparent. Raises OSError or ValueError if
    it is damaged or has over MAX_PIXELS."""
    with Image.open(file, formats=FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels are over {MAX_PIXELS:,}")
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):  # 16 bits of grey, of which convert() would make white
            picture = picture.point(lambda value: value / 256)
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def picture_digest(path: Path) -> str:
    """The digest of a picture's bytes, or "" if there is no file or it cannot be decoded."""
    try:
        content = path.read_bytes()
        load_picture(io.BytesIO(content))
    except Exception:  # which error a damaged file raises is up to the decoder; all mean: no picture
        return ""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def earliest(events: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """A user's (item, time) events, oldest first, without the repetitions of an item."""
    kept = {}
    for event in events:
        kept.setdefault(event[0], event)
    return list(kept.values())


def core(users: dict[str, list], k: int = CORE) -> dict[str, list]:
    """Drop users and items with fewer than k interactions until none is left (k-core, at its fixed point)."""
    while True:
        counts = collections.Counter(item for events in users.values() for item, _ in events)
        kept = {user: [event for event in events if counts[event[0]] >= k] for user, events in users.items()}
        kept = {user: events for user, events in kept.items() if len(events) >= k}
        if kept == users:
            return users
        users = kept


def read_domain(folder: str | Path) -> Domain:
    """Read a domain folder: drop items without a title or a decodable picture, keep the earliest of a repeated
    (user, item), then 5-core. Raises InputError for malformed files and if nothing is left."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; a domain is a folder with items.csv, interactions.csv and images/")
    items = read_items(folder)
    events = read_interactions(folder, items)
    titled = [item for item, (title, _) in items.items() if title]
    with concurrent.futures.ThreadPoolExecutor() as pool, warnings.catch_warnings():  # Pillow decodes without the GIL
        warnings.simplefilter("ignore")  # of huge pictures: load_picture refuses them
        checks = pool.map(picture_digest, (items[item][1] for item in titled))
        digests = dict(zip(titled, tqdm(checks, "check pictures", len(titled), leave=False, disable=None)))
    usable = {item for item, digest in digests.items() if digest}
    shown = {user: [event for event in row if event[0] in usable] for user, row in events.items()}
    first = {user: earliest(row) for user, row in shown.items()}
    users = core(first)
    size = lambda table: sum(map(len, table.values()))
    dropped = {"items without a title": len(items) - len(titled),
               "items without a decodable picture": len(titled) - len(usable),
               "interactions with such items": size(events) - size(shown),
               "repeated interactions": size(shown) - size(first),
               "interactions outside the 5-core": size(first) - size(users)}
    if not users:
        raise InputError(f"{folder}: nothing is left after {CORE}-core filtering; dropped "
                         + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()))
    return index_domain(folder.resolve().name, items, digests, users, dropped)


def index_domain(name: str, items: dict, digests: dict, users: dict, dropped: dict) -> Domain:
    """Number what the reader kept. Raises InputError if a user's negatives would not find NEGATIVES items."""
    bought = {item for events in users.values() for item, _ in events}
    item_ids = [item for item in items if item in bought]
    index = {item: number for number, item in enumerate(item_ids)}
    sequences = [[index[item] for item, _ in events] for events in users.values()]
    longest = max(map(len, sequences))
    if len(item_ids) < longest + NEGATIVES:
        raise InputError(f"{name}: {len(item_ids)} items are too few: the longest sequence has {longest}, and another "
                         f"{NEGATIVES} are ranked beside the target; bring at least {longest + NEGATIVES}")
    tied = [events[-1][1] == events[-2][1] for events in users.values()]
    content = [[(item, items[item][0], digests[item]) for item in item_ids], list(users), sequences, tied]
    return Domain(name, item_ids, [items[item][0] for item in item_ids], [items[item][1] for item in item_ids],
                  list(users), sequences, tied, dropped,
                  hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest())


def describe(domain: Domain) -> str:
    """What was read and what was dropped, for people."""
    events = sum(map(len, domain.sequences))
    lost = ", ".join(f"{count:,} {reason}" for reason, count in domain.dropped.items() if count) or "nothing"
    return (f"{domain.name}: {len(domain.user_ids):,} users, {len(domain.item_ids):,} items, {events:,} interactions, "
            f"mean length {events / len(domain.user_ids):.1f}\n  dropped: {lost}\n"
            f"  test item decided by a tie in time: {sum(domain.tied) / len(domain.tied):.1%} of the users")


# ----------------------------------------------------------------------------------------------------------------------
# The split and the negatives (Sections 5.1.1, 5.1.3)
# ----------------------------------------------------------------------------------------------------------------------

def leave_one_out(sequence: list[int], split: str, length: int = 10) -> tuple[list[int], int]:
    """(history, target) of a user. The test target is the last item, validation's the second to last, training's the
    third to last; the history is what comes before the target, its latest `length` items."""
    at = len(sequence) - FROM_THE_END[split]
    return sequence[max(0, at - length):at], sequence[at]


def draw_negatives(user_id: str, sequence: list[int], items: int, split: str, seed: int) -> list[int]:
    """NEGATIVES distinct items outside the user's whole sequence, uniform. They depend on (seed, split, user) alone, so
    that every method ranks the same candidates. Raises ValueError if there are not enough items."""
    bought = set(sequence)
    draw = random.Random(f"{seed} {split} {user_id}").sample(range(items), NEGATIVES + len(bought))
    return [item for item in draw if item not in bought][:NEGATIVES]


def validation_users(users: int, seed: int) -> list[int]:
    """The users that are scored after each epoch: all, or VALIDATION_USERS of them, fixed by the seed."""
    return sorted(random.Random(f"{seed} validation users").sample(range(users), min(users, VALIDATION_USERS)))


# ----------------------------------------------------------------------------------------------------------------------
# Producers: whatever writes a domain folder or a checkpoint folder
# ----------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place if the block ends well, and vanishes if it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.exists():  # if it does, another process was first, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path: Path, tag: str = "") -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if the block ends well, and vanishes if it does not."""
    partial = path.with_name(f"{path.name}{tag}.part")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:  # a write that fails does not say where
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def prepare_domain(domain: str, data_dir: Path, mirror: str = "") -> Path:
    """The folder of a domain: a path if `domain` has a separator, else data_dir/domain, made if we know how.
    Raises InputError if it is not there and cannot be made."""
    if os.sep in domain or "/" in domain:
        return Path(domain)
    folder = data_dir / domain
    if (folder / "items.csv").exists():
        return folder
    if domain in WORLDS:
        write_sample_world(folder, **WORLDS[domain])
    elif domain in AMAZON:
        prepare_amazon(domain, folder, data_dir / "amazon2014", mirror.rstrip("/"))
    else:
        raise InputError(f"{folder / 'items.csv'} is missing; write items.csv, interactions.csv and images/ there, "
                         f"give the path of another folder, or take one of {', '.join([*WORLDS, *AMAZON])}")
    return folder


def prepare_model(model: str, data_dir: Path) -> str:
    """What `from_pretrained` takes for a model: a hub name or a folder as it is; `tiny` is written under data_dir."""
    if model != "tiny":
        return model
    folder = data_dir / "tiny-qwen2.5-vl"
    if not folder.exists():
        write_tiny_model(folder)
    return str(folder)


NOUNS = ["lantern", "kettle", "puzzle", "scarf", "drum", "kite", "clock", "basket"]   # one for each category
BRANDS = ["Arvo", "Belka", "Corin", "Dasha", "Elmo", "Fjord", "Gusto", "Halma"]       # one for each style
SHAPES = ["disc", "square", "triangle", "cross", "ring", "bars", "diamond", "checks"]  # one for each category
WORLDS = {"sample": {}, "lopsided": {"brand": 1.0, "shape": 0.3}}  # in the second one, the title says everything


def write_sample_world(folder: Path, seed: int = 0, users: int = 1200, per_cell: int = 8,
                       brand: float = 0.7, shape: float = 0.7) -> None:
    """Write a synthetic domain in which each modality is clear about one thing and vague about another.

    An item has one of 8 categories and one of 8 styles; each of the 64 cells holds `per_cell` items, whose popularity
    is log-normal. The title is a brand, a noun and a number. The noun names the category; the brand is the style's in a
    share `brand` of the items, else a random one. The picture shows one shape of one colour. The hue shows the style;
    the shape is the category's in a share `shape`, else a random one; place, size and shade vary.

    A user starts in a random cell and takes 5 to 10 steps. At each step the category stays (50 %), moves on to the next
    one (35 %) or is drawn anew (15 %); independently, the style stays (60 %), moves on (25 %) or is drawn anew (15 %).
    In the new cell the user takes an item not taken before, by popularity. Between two steps pass 0 days (20 %) or 1 to
    9; timestamps are whole days, and the file is in the order of the items, as Amazon's is.
    """
    rng = random.Random(f"sample world {seed}")
    cells = {(category, style): [f"{category}{style}{k:02}" for k in range(per_cell)]
             for category in range(8) for style in range(8)}
    popularity = {item: rng.lognormvariate(0, 0.7) for items in cells.values() for item in items}
    blur = lambda value, share: value if rng.random() < share else rng.randrange(8)
    move = lambda value, *odds: rng.choices([value, (value + 1) % 8, rng.randrange(8)], odds)[0]
    with whole_folder(folder) as partial:
        (partial / "images").mkdir()
        rows = []
        for (category, style), items in cells.items():
            for item in items:
                title = f"{BRANDS[blur(style, brand)]} {NOUNS[category]} {rng.randrange(100)}"
                rows.append([item, title, image := f"images/{item}.png"])
                draw_item(rng, SHAPES[blur(category, shape)], style / 8).save(partial / image)
        write_csv(partial / "items.csv", ["item_id", "title", "image"], rows)
        events = []
        for user in range(users):
            category, style, day, taken = rng.randrange(8), rng.randrange(8), 16000 + rng.randrange(365), set()
            for _ in range(rng.randint(5, 10)):
                category, style = move(category, 0.5, 0.35, 0.15), move(style, 0.6, 0.25, 0.15)
                if free := [item for item in cells[category, style] if item not in taken]:
                    day += rng.randint(1, 9) if rng.random() < 0.8 else 0
                    taken.add(item := rng.choices(free, [popularity[item] for item in free])[0])
                    events.append([f"u{user:04}", item, day * 86400])
        events.sort(key=lambda row: row[1])
        write_csv(partial / "interactions.csv", ["user_id", "item_id", "timestamp"], events)


def draw_item(rng: random.Random, shape: str, hue: float, size: int = 84) -> Image.Image:
    """Draw one shape in one colour on a pale ground; place, size and shade come from `rng`."""
    shade = lambda s, v: tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue % 1, s, v))
    colour, ground = shade(rng.uniform(0.7, 1), rng.uniform(0.6, 0.95)), (rng.randint(225, 255),) * 3
    picture = Image.new("RGB", (size, size), ground)
    draw, r = ImageDraw.Draw(picture), rng.randint(size // 4, size // 3)
    x, y = rng.randint(r + 2, size - r - 2), rng.randint(r + 2, size - r - 2)
    box, third = (x - r, y - r, x + r, y + r), 2 * r // 3
    if shape in ("disc", "ring"):
        draw.ellipse(box, fill=colour if shape == "disc" else ground, outline=colour, width=max(1, r // 3))
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
    elif shape == "diamond":
        draw.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=colour)
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
    """Write a checkpoint folder as `save_pretrained` does: a Qwen2.5-VL of a quarter of a million random parameters and
    a byte-level tokenizer. It is the same every time."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLModel
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    marks = ["<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    symbols = marks + sorted(pre_tokenizers.ByteLevel.alphabet())  # a token for every byte, no merges
    ids = {symbol: number for number, symbol in enumerate(symbols)}
    bytes_only = Tokenizer(models.BPE(vocab=ids, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, pad_token=marks[0], eos_token=marks[1],
                                        additional_special_tokens=marks[2:])
    text = dict(vocab_size=len(symbols), hidden_size=64, intermediate_size=160, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
                bos_token_id=None, eos_token_id=ids[marks[1]],
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]})
    vision = dict(depth=2, hidden_size=48, intermediate_size=128, num_heads=3, out_hidden_size=64,
                  fullatt_block_indexes=[1])
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"],
                              video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
                              vision_end_token_id=ids["<|vision_end|>"])
    with whole_folder(folder) as partial, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2_5_VLModel(config).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        Qwen2VLImageProcessorPil().save_pretrained(partial)


# ----------------------------------------------------------------------------------------------------------------------
# Amazon 2014 (McAuley et al., SIGIR 2015): reviews and metadata, then the pictures
# ----------------------------------------------------------------------------------------------------------------------

class Category(NamedTuple):
    """A name in Amazon's files, and the published counts of its 5-core."""
    name: str
    users: int
    items: int
    interactions: int


AMAZON = {"toys": Category("Toys_and_Games", 19_412, 11_924, 167_597),
          "beauty": Category("Beauty", 22_363, 12_101, 198_502),
          "clothing": Category("Clothing_Shoes_and_Jewelry", 39_387, 23_033, 278_677),
          "sports": Category("Sports_and_Outdoors", 35_598, 18_357, 296_337)}
ARCHIVES = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"  # answered in September 2026
PICTURES = "https://m.media-amazon.com"  # serves today what the metadata's hosts served
PICTURE_HOSTS = {"ecx.images-amazon.com", "g-ecx.images-amazon.com",
                 "images-na.ssl-images-amazon.com", "m.media-amazon.com"}
WORKERS = 16               # pictures fetched at once
TRIES, BACK_OFF = 4, 1.0   # attempts, and the seconds before the second one; they double from there
TIMEOUT = 20.0             # seconds without a byte after which an attempt has failed
MAX_SECONDS, MAX_BYTES = 60.0, 10_000_000  # a picture that takes longer or is larger is given up


class FetchError(Exception):
    """Why an address gives no usable content. It begins with "no answer" where trying later may help."""


class CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to http or https on one of `hosts`."""

    def __init__(self, hosts: set[str]):
        self.hosts = hosts

    def redirect_request(self, request, file, code, message, headers, address):
        """Called by urllib for each redirect. Raises FetchError for a host that is not ours."""
        target = urllib.parse.urlsplit(address)
        if target.scheme not in ("http", "https") or target.netloc not in self.hosts:
            raise FetchError("redirected to another host")
        return super().redirect_request(request, file, code, message, headers, address)


def fetch(address: str, hosts: set[str], receive: Callable, offset: Callable[[], int] = lambda: 0):
    """Return receive(response). Network errors, 429 and 5xx are tried again, later and later or when the server asks
    for it, from byte offset() on. Raises FetchError with the reason."""
    opener = urllib.request.build_opener(CheckedRedirects(hosts))
    for attempt in range(TRIES):
        wait = BACK_OFF * 2 ** attempt
        try:
            headers = {"User-Agent": "vlm2rec"} | ({"Range": f"bytes={offset()}-"} if offset() else {})
            with opener.open(urllib.request.Request(address, headers=headers), timeout=TIMEOUT) as response:
                return receive(response)
        except urllib.error.HTTPError as error:
            reason, after = f"HTTP {error.code}", error.headers.get("Retry-After", "")
            if error.code != 429 and error.code < 500:
                raise FetchError(reason) from None
            wait = min(float(after), 60.0) if after.isdigit() else wait
        except ValueError as error:  # a redirect or a header that makes no sense
            raise FetchError(f"malformed answer: {error}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        if attempt + 1 < TRIES:
            sleep(wait)
    raise FetchError(f"no answer: {reason}")


def chunks(response, seconds: float = math.inf, most: float = math.inf) -> Iterator[bytes]:
    """The body of a response. Raises FetchError if it has over `most` bytes, OSError if it is cut off or takes over
    `seconds`."""
    length, got, end = response.headers.get("Content-Length"), 0, monotonic() + seconds
    while chunk := response.read1(1 << 16):
        got += len(chunk)
        if got > most:
            raise FetchError(f"over {most:,} bytes")
        if monotonic() > end:
            raise TimeoutError(f"not done after {seconds:g} seconds")
        yield chunk
    if length and got != int(length):
        raise ConnectionError(f"cut off after {got:,} of {length} bytes")


def fetch_archive(address: str, path: Path, hosts: set[str]) -> None:
    """Download to `path`, which appears when it is whole; continues what an earlier attempt or run left."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = lambda: part.stat().st_size if part.exists() else 0

    def receive(response):
        """Append what the server sends, or begin anew if it sends all."""
        kept = have() if response.status == 206 else 0  # 206: the server sends only what we lack
        total = int(response.headers.get("Content-Length") or 0) + kept
        with open(part, "ab" if kept else "wb") as file, tqdm(
                desc=path.name, total=total or None, initial=kept, unit="B", unit_scale=True, disable=None) as bar:
            for chunk in chunks(response):
                file.write(chunk)
                bar.update(len(chunk))

    try:
        fetch(address, hosts, receive, have)
    except FetchError as error:
        if str(error) != "HTTP 416":  # nothing comes after what we have: a run was killed just before the next line
            raise
    os.replace(part, path)


def read_lines(path: Path, parse: Callable) -> Iterator:
    """Yield parse(line) of a gzipped file. Raises InputError, naming the file, if it is damaged or a line malformed."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = tqdm(file, path.name, unit=" lines", unit_scale=True, leave=False, disable=None)
            for number, line in enumerate(lines, 1):
                try:
                    yield parse(line)
                except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
                    raise InputError(f"{path}, line {number}: {type(error).__name__}: {error}; delete the file to "
                                     "fetch it anew") from None
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise InputError(f"{path} is cut off or damaged ({error}); delete it to fetch it anew") from None


def parse_review(line: str) -> tuple[str, str, int]:
    """(user, item, time) of a line of reviews_*.json.gz, which is JSON."""
    row = json.loads(line)
    return row["reviewerID"], row["asin"], int(row["unixReviewTime"])


def parse_metadata(line: str, wanted: set[str]) -> tuple[str, str, str] | None:
    """(item, title, picture's address) of a line of meta_*.json.gz, which is a Python literal, or None if the item is
    not wanted: most lines are not, and reading the literal is what takes time."""
    start = re.match(r"\{'asin': '(\w+)'", line)
    if start and start[1] not in wanted:
        return None
    row = ast.literal_eval(line)
    title = " ".join(html.unescape(row.get("title") or "").split())
    title = title.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # halves of a character
    return (row["asin"], title, row.get("imUrl") or "") if row["asin"] in wanted else None


def picture_address(item: str, title: str, address: str, base: str) -> tuple[str, str]:
    """(address that serves the picture today, "") or ("", the reason why the item is dropped)."""
    try:
        url = urllib.parse.urlsplit(address)
    except ValueError:
        return "", "malformed address"
    if not title:
        return "", "no title"
    if not re.fullmatch(r"[A-Za-z0-9]{1,20}", item):  # it becomes a file's name
        return "", "odd item id"
    if not address:
        return "", "no picture"
    if "no-img" in address:
        return "", "placeholder picture"
    if url.scheme not in ("http", "https") or url.netloc not in PICTURE_HOSTS:
        return "", "picture on an unknown host"
    return base + urllib.parse.quote(url.path, safe="/%+,"), ""


def fetch_picture(address: str, path: Path, hosts: set[str]) -> str:
    """Download a picture to `path`, which appears when it is whole and decodes. Returns "", or why it does not."""
    if path.exists():
        return ""
    try:
        content = fetch(address, hosts, lambda response: b"".join(chunks(response, MAX_SECONDS, MAX_BYTES)))
    except FetchError as error:
        return str(error)
    try:
        picture = load_picture(io.BytesIO(content))
    except Exception as error:  # whatever a decoder raises: it is no picture
        return "too many pixels" if "pixels" in str(error) else "not a picture"
    if min(picture.size) < 2:
        return "picture of a single pixel"
    with whole_file(path) as partial:
        partial.write_bytes(content)
    return ""


def fetch_pictures(addresses: dict[str, str], folder: Path, hosts: set[str]) -> dict[str, str]:
    """Download {item: address} to `folder`/item.jpg. Returns {item: reason} of those that failed. Raises InputError if
    most failed, or over 1 % had no answer: then it is the network, not the links, and a later run can do better."""
    folder.mkdir(parents=True, exist_ok=True)
    pool, failed = concurrent.futures.ThreadPoolExecutor(WORKERS), {}
    try:
        jobs = {pool.submit(fetch_picture, address, folder / f"{item}.jpg", hosts): item
                for item, address in addresses.items()}
        done = concurrent.futures.as_completed(jobs)
        for count, job in enumerate(tqdm(done, "pictures", len(jobs), disable=None), 1):
            if not (reason := job.result()):
                continue
            failed[jobs[job]] = reason
            silent = sum(why.startswith("no answer") for why in failed.values())
            if len(failed) > max(50, count / 2) or silent > max(5, len(jobs) / 100):
                raise InputError(f"{len(failed)} of {count} pictures failed, {silent} without an answer, the last one "
                                 f"{addresses[jobs[job]]} ({reason}); check the network, then run again: it goes on")
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def get_archive(name: str, companion: str, archives: Path, base: str) -> Path:
    """The path of an archive, downloaded unless it is there. Raises InputError that says what to fetch by hand."""
    path = archives / name
    if not path.exists():
        try:
            fetch_archive(f"{base}/{name}", path, {urllib.parse.urlsplit(base).netloc})
        except FetchError as error:
            raise InputError(f"cannot fetch {base}/{name} ({error}); run again, try --mirror, or put it and "
                             f"{companion}, fetched by other means, into {archives}") from None
    return path


def prepare_amazon(domain: str, folder: Path, archives: Path, mirror: str = "") -> None:
    """Make one of the four Amazon domains from nothing: download, filter to the 5-core, fetch the pictures, drop items
    without title or picture, filter again, write. Interrupted at any moment, it goes on when called again."""
    if mirror and not re.match(r"https?://[\w.:-]+(/|$)", mirror):
        raise InputError(f"--mirror {mirror}: it has to be an address such as https://example.org/amazon")
    category, base = AMAZON[domain], mirror or ARCHIVES
    names = f"reviews_{category.name}_5.json.gz", f"meta_{category.name}.json.gz"
    reviews = list(read_lines(get_archive(*names, archives, base), parse_review))
    metadata = get_archive(*names[::-1], archives, base)
    wanted = {item for _, item, _ in reviews}
    about = {item: ("", "") for item in wanted}  # title, picture's address
    about |= {row[0]: row[1:] for row in read_lines(metadata, lambda line: parse_metadata(line, wanted)) if row}

    five_core = keep_core(reviews, wanted)
    addresses = {item: picture_address(item, *about[item], mirror or PICTURES) for item in sorted(wanted)}
    reasons = {item: reason for item, (_, reason) in addresses.items() if reason}
    candidates = {item for _, item, _ in keep_core(reviews, wanted - set(reasons))}
    hosts = {urllib.parse.urlsplit(mirror).netloc} if mirror else PICTURE_HOSTS
    reasons |= fetch_pictures({item: addresses[item][0] for item in sorted(candidates)}, folder / "images", hosts)
    final = keep_core(reviews, candidates - set(reasons))
    print(amazon_table(domain, reviews, five_core, final, reasons))

    for part in (folder / "images").glob("*.part"):  # of a killed run
        part.unlink()
    dropped = [[item, reason, about[item][1]] for item, reason in sorted(reasons.items())]
    items = [[item, about[item][0], f"images/{item}.jpg"] for item in sorted({item for _, item, _ in final})]
    write_csv(folder / "dropped.csv", ["item_id", "reason", "address"], dropped)
    write_csv(folder / "interactions.csv", ["user_id", "item_id", "timestamp"], final)  # in the archive's order
    write_csv(folder / "items.csv", ["item_id", "title", "image"], items)  # last: where it is, the domain is whole


def keep_core(reviews: list[tuple], items: set[str]) -> list[tuple]:
    """The reviews of the 5-core of `items`, in their order."""
    users = {}
    for user, item, when in reviews:
        if item in items:
            users.setdefault(user, []).append((item, when))
    kept = {(user, item) for user, events in core(users).items() for item, _ in events}
    return [row for row in reviews if row[:2] in kept]


def amazon_table(domain: str, reviews: list, five_core: list, final: list, reasons: dict[str, str]) -> str:
    """Users, items and interactions at each step beside the published counts, and what was lost why."""
    count = lambda rows: (len({user for user, _, _ in rows}), len({item for _, item, _ in rows}), len(rows))
    rows = {"": ("users", "items", "interactions"), "published 5-core": AMAZON[domain][1:],
            "reviews as fetched": count(reviews), "their 5-core": count(five_core),
            "with title and picture, 5-core": count(final)}
    text = lambda value: f"{value:,}" if isinstance(value, int) else value
    lost = [f"{number:,} {reason}" for reason, number in collections.Counter(reasons.values()).most_common()]
    return "\n".join([f"{domain}, Amazon 2014", *(f"  {name:32}" + "".join(f"{text(value):>14}" for value in values)
                                                  for name, values in rows.items()),
                      f"  items dropped: {', '.join(lost) or 'none'}"])


def main() -> int:
    """Prepare a domain without training: `python data.py toys`."""
    parser = argparse.ArgumentParser(description="Prepare a domain: download, filter and write it, without training.")
    parser.add_argument("domain", choices=[*WORLDS, *AMAZON])
    parser.add_argument("--data-dir", default="domains", help="it goes to DATA_DIR/DOMAIN (default: domains)")
    parser.add_argument("--mirror", default="", help="address of archives and pictures, instead of their own")
    args = parser.parse_args()
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
