# SPDX-License-Identifier: MIT
"""The data side of VLM2Rec: one format on disk and its reader; below them what writes this format
(the sample world, Amazon 2014) and the tiny model. A domain is a folder:
    items.csv          item_id,title,image         image: a path relative to the folder
    interactions.csv   user_id,item_id,timestamp   in any order; all numbers or all ISO 8601 dates
"""
import argparse
import ast
import colorsys
import csv
import errno
import gzip
import hashlib
import html
import io
import json
import math
import os
import random
import re
import sys
import urllib.request
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby, pairwise, product
from multiprocessing.pool import ThreadPool
from pathlib import Path
from time import monotonic, sleep
from unicodedata import normalize

import filelock
import numpy
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

CORE = 5                 # the least interactions of a user and of an item (Section 5.1.1)
NEGATIVES = 100          # ranked beside the target (Section 5.1.3)
MAX_PIXELS = 40_000_000  # a larger picture is not decoded
MAX_RATIO = 20           # nor one so many times longer than wide: it would vanish
UNFIT = "too large, small, thin or deep"  # what could be decoded, but is not shown
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")  # EPS would start a program
ITEMS = ("item_id", "title", "image")
EVENTS = ("user_id", "item_id", "timestamp")

class InputError(Exception):
    """The user's mistake, told in one line: what is wrong, where, and how to mend it."""

# ---- The reader ----
@dataclass
class Domain:
    """A domain in memory. Items and users are indices into these lists, in the files' order."""
    name: str
    item_ids: list[str]
    titles: list[str]
    pictures: list[Path]
    user_ids: list[str]
    sequences: list[list[int]]  # per user the items, oldest first
    tied: list[bool]            # per user: was the test item decided by a tie in time?
    dropped: dict[str, int]     # reason: how many
    dropped_items: list[tuple]  # items that cannot be shown: item_id, reason, detail
    remarks: list[str]          # what is odd, though it can be used
    digest: str                 # of what is kept and of the bytes of the pictures

def read_file(path: Path) -> bytes | None:
    """The bytes of a regular file, if there is one."""
    try:
        if not path.is_file():  # a FIFO would be waited for
            return None
        content = path.read_bytes()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # a picture's bytes, not its path
            return None
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if content.startswith((b"version https://git-lfs", b"/annex/objects/")):
        raise InputError(f"{path} is only a pointer; run: git lfs pull, or git annex get")
    return content

def read_csv(path: Path, columns: tuple):
    """Yield ("path, line n", values of `columns`...) per row; semicolons or tabs may divide."""
    needs = f"it needs {','.join(columns)}, and double quotes around a field with a comma"
    content = read_file(path)
    if content is None:
        raise InputError(f"{path} is missing or not a regular file; {needs}")
    file = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline="")
    csv.field_size_limit(2**31 - 1)
    line = 1  # where the row begins
    try:
        sign = max(",;\t", key=file.readline().count)
        file.seek(0)
        rows = csv.reader(file, delimiter=sign, skipinitialspace=True, strict=True)
        header = [name.strip() for name in next(rows, [])]
        if any(header.count(name) != 1 for name in columns):
            raise csv.Error(f"the header is {','.join(header)[:200]!r}")
        places = [header.index(name) for name in columns]
        line = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                raise csv.Error(f"{len(row)} fields where the header has {len(header)}")
            if rows.line_num > line and holds_rows(row, sign):
                raise csv.Error("a quote opens here and closes in a later row; write it twice, or "
                                "take the line breaks out")
            if row:
                yield f"{path}, line {line}", *(row[place].strip() for place in places)
            line = rows.line_num + 1
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8; save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: {error}; {needs}") from None

def holds_rows(row, sign):
    """Is a row of several lines made of whole rows? Its quotes then belong to two titles."""
    lines = re.split("\r\n?|\n", sign.join(row))
    fewest = 3 if sign == "," else 2  # a title of two lines may well have a comma in each
    return len(lines) >= fewest and all(line.count(sign) == len(row) - 1 for line in lines)

def read_items(folder: Path) -> dict:
    """items.csv as {item_id: (title, path)}. A path may not lead out of the folder, a link may."""
    items = {}
    listings = {}
    for where, item, title, image in read_csv(folder / "items.csv", ITEMS):
        item = read_id(item, where)
        if item in items:
            raise InputError(f"{where}: item_id {item!r} is there twice; drop a row")
        if Path(image).is_absolute() or ".." in re.split(r"[/\\]", image):
            raise InputError(f"{where}: {image[:200]!r} has a root or .. in it; copy it into "
                             f"{folder}, and write its path from there")
        if not os.path.exists(folder / image):
            image = find_file(folder, image, listings)
        items[item] = (" ".join(title.split()), image)
    return items

def find_file(folder, image, listings):
    """The path of a file that Windows or a Mac named: by \\, in other case, its accents apart."""
    def fold(name):
        return normalize("NFC", name).casefold()
    path = folder
    for part in re.split(r"[/\\]", image):
        if path not in listings:
            names = sorted(os.listdir(path)) if os.path.isdir(path) else []
            listings[path] = {fold(name): name for name in names}
        path = path / listings[path].get(fold(part), part)
    return str(path.relative_to(folder)) if os.path.exists(path) else image

def read_id(text, where):
    """An id in Unicode's form NFC, unless it is empty or a number that lost digits."""
    rounded = re.fullmatch(r"-?\d[.,](\d+)[eE]\+(\d{1,3})", text)  # such as 6.20386E+12
    if not text or rounded and len(rounded[1]) < int(rounded[2]):
        raise InputError(f"{where}: id {text!r} is empty, or rounded by a spreadsheet; mend it")
    return sys.intern(normalize("NFC", text))  # one string, however many rows have it

def read_interactions(folder, items):
    """interactions.csv as (user_id, item_id, time), by user, oldest first, and {item_id that
    items.csv lacks: rows}."""
    path = folder / "interactions.csv"
    users = {}  # in the file's order
    rows = []
    units = {}  # is it a date?: the first such time
    unknown = Counter()
    stranger = None
    for where, user, item, timestamp in read_csv(path, EVENTS):
        user = read_id(user, where)
        item = read_id(item, where)
        is_date, when = parse_time(timestamp)
        if re.fullmatch(r"-?\d([.,]\d{0,6})?E\+?(0?[89]|[1-9]\d)", timestamp):  # e is Python's
            raise InputError(f"{where}: time {timestamp!r} was rounded by a spreadsheet; mend it")
        if not math.isfinite(when):
            raise InputError(f"{where}: timestamp {timestamp!r} is no number and no ISO 8601 date")
        if is_date not in units:
            units[is_date] = f"{where} has {timestamp}"
        users.setdefault(user, len(users))
        if item in items:
            rows.append((user, item, when))
        else:
            stranger = stranger or f"{where}: item_id {item!r}"
            unknown[item] += 1
    if unknown.total() > len(rows):
        raise InputError(f"{stranger} is not in items.csv, nor are those of most rows; "
                         f"{[*items][:2]} are")
    if True not in units:
        units = find_units(path, rows)
    if len(units) > 1:
        told = ", but ".join(reversed(units.values()))
        raise InputError(f"{told}: times of two units; write all in one")
    rows.sort(key=lambda row: row[2])  # twice, as pairs for keys would take 40 bytes a row
    rows.sort(key=lambda row: users[row[0]])
    return rows, unknown

def find_units(path, rows):
    """{time: its line} of two that cannot be of one unit, such as days and seconds, if any."""
    times = numpy.unique([when for _, _, when in rows])
    times = times[(abs(times) > 86400) | (times % 900 > 0)]  # without 0, "unknown", in any zone
    low, high = times[:-1], times[1:]
    gap = (low > 9000) & (high > 1e8) & (high > 30 * low)  # 9000 days after 1970 it was 1994
    if not gap.any():
        return {}
    found = {low[gap][0]: "", high[gap][0]: ""}
    for where, *_, timestamp in read_csv(path, EVENTS):  # again: all lines would fill memory
        when = parse_time(timestamp)[1]
        if when in found:
            found[when] = found[when] or f"{where} has {timestamp}"
    return found

def parse_time(timestamp):
    """(is it a date?, the number, or seconds since 1970; UTC if it names no zone; else NaN)."""
    with suppress(ValueError):
        return False, float(timestamp)
    with suppress(ValueError):
        date = datetime.fromisoformat(timestamp)
        return True, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    return False, math.nan

def load_picture(file: Path | io.BytesIO) -> Image.Image:
    """Decode a picture's first frame to RGB, upright, on white; or raise what is wrong with it."""
    with Image.open(file, formats=FORMATS) as picture:
        short, long = sorted(picture.size)
        thin = short < 2 or long > MAX_RATIO * short
        if thin or short * long > MAX_PIXELS or picture.mode in ("I", "F"):  # of no known range
            raise ValueError(f"{picture.size} {picture.mode}: {UNFIT}")
        picture.load()
        with suppress(Exception):  # broken EXIF does not say how it was turned
            picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):  # 16 bits of grey, of which convert() would make white
            picture = Image.fromarray((numpy.asarray(picture) // 256).astype("uint8"))
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        return picture.convert("RGB")

def flaw(content: bytes, name: str) -> str:
    """Why a picture cannot be shown, or "". That memory runs out is not the picture's fault."""
    try:
        load_picture(io.BytesIO(content))
    except Exception as error:  # which one a damaged file raises is up to its decoder
        said = re.sub(r" <.*?>|\s", " ", str(error))[:100]
        if isinstance(error, MemoryError) or "memory" in said:  # Pillow has words of its own
            raise MemoryError(f"out of memory while decoding {name}") from error
        return said.strip() or type(error).__name__
    return ""

def in_threads(work, inputs, name, threads):
    """Yield work(input) of each input, in their order, with a bar; Ctrl-C ends it at once."""
    with warnings.catch_warnings(action="ignore"), ThreadPool(threads) as pool:  # Pillow's warnings
        yield from tqdm(pool.imap(work, inputs), name, len(inputs), leave=False, disable=None)

def core(rows, k=CORE, room=0):
    """The k-core of (user, item, ...) rows, in which each user leaves `room` other items."""
    while True:
        users = Counter(row[0] for row in rows)
        items = Counter(row[1] for row in rows)
        most = len(items) - room
        kept = [row for row in rows if k <= users[row[0]] <= most and items[row[1]] >= k]
        if len(kept) == len(rows):
            return kept
        rows = kept

def check_item(folder, title, image):
    """(digest of the picture, "", ""), or ("", why the item cannot be shown, detail)."""
    content = read_file(folder / image)
    if not title or content is None:
        return "", "no file" if title else "no title", image[:100]
    reason = flaw(content, image)
    if reason:
        return "", "not decodable", reason
    return hashlib.blake2b(content, digest_size=16).hexdigest(), "", ""

def read_domain(folder: str | Path) -> Domain:
    """Read a domain folder: drop what cannot be shown and all but the first of a repeat; 5-core."""
    folder = Path(folder)
    items = read_items(folder)
    rows, unknown = read_interactions(folder, items)
    threads = min(16, os.cpu_count())  # each takes a picture's memory
    checked = in_threads(lambda item: check_item(folder, *items[item]), items, "check pictures",
                         threads)
    checks = dict(zip(items, checked))
    lost = [(item, *why) for item, (_, *why) in checks.items() if why[0]]
    untitled = [reason for _, reason, _ in lost].count("no title")
    shown = [row for row in rows if checks[row[1]][0]]
    first = []
    for _, events in groupby(shown, lambda row: row[0]):
        earliest = {}
        for row in events:
            earliest.setdefault(row[1], row)
        first += earliest.values()
    dense = core(first)
    kept = core(dense, room=NEGATIVES)
    dropped = {"items without a title": untitled,
               "items without a decodable picture": len(lost) - untitled,
               "interactions with such items": len(rows) - len(shown),
               f"interactions with items that items.csv lacks {[*unknown][:3]}": unknown.total(),
               "repeated interactions": len(shown) - len(first)}
    most = len({item for _, item, _ in dense}) - NEGATIVES
    if not kept:
        cause = f"a user needs {CORE} items and {NEGATIVES} others, an item {CORE} users"
        if dense:
            cause = f"{most + NEGATIVES} items; more than {NEGATIVES} and a user's own are needed"
        if len(shown) < len(rows) / 2:
            item, reason, detail = lost[0]
            cause = (f"{len(lost)} of {len(items)} items cannot be shown, such as {item!r}: "
                     f"{reason} {detail!r}")
        gone = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)
        raise InputError(f"{folder}: nothing is left: {cause}; dropped: {gone or 'nothing yet'}")
    crowded = sorted(user for user, n in Counter(row[0] for row in dense).items() if n > most)
    dropped |= {
        f"users with too many items for {NEGATIVES} negatives {crowded[:3]}": len(crowded),
        "interactions outside the 5-core, or of such users": len(first) - len(kept)}
    return index_domain(folder, items, checks, kept, dropped, lost)

def index_domain(folder, items, checks, rows, dropped, lost):
    """Number what the reader kept."""
    used = {item for _, item, _ in rows}
    item_ids = [item for item in items if item in used]
    index = {item: number for number, item in enumerate(item_ids)}
    titles = [items[item][0] for item in item_ids]
    pictures = [folder / items[item][1] for item in item_ids]
    shown = [checks[item][0] for item in item_ids]
    users = []
    sequences = []
    tied = []
    for user, events in groupby(rows, lambda row: row[0]):
        events = list(events)
        users.append(user)
        sequences.append([index[item] for _, item, _ in events])
        tied.append(events[-2][2] == events[-1][2])
    digest = hashlib.blake2b(digest_size=16)
    parts = [item_ids, titles, shown, users, sequences, tied]
    for piece in json.JSONEncoder().iterencode(parts):  # at once it takes 70 bytes an event
        digest.update(piece.encode())
    name = Path(os.path.abspath(folder)).name  # as it was given, not a link's target
    remarks = [*remark_items(titles, pictures, shown), *remark_ties(rows)]
    return Domain(name, item_ids, titles, pictures, users, sequences, tied, dropped, lost, remarks,
                  digest.hexdigest())

def remark_items(titles, pictures, shown):
    """Yield what is odd about items that can be shown."""
    picture, count = Counter(shown).most_common(1)[0]
    if count > max(5, len(shown) / 100):
        path = pictures[shown.index(picture)]
        yield f"{count:,} items have one and the same picture, {path}: is it a placeholder?"
    coded = [title for title in titles if ";" in title and html.unescape(title) != title]
    if coded:
        yield f"{len(coded):,} titles have HTML in them, such as {coded[0]!r:.60}: unescape it"

def remark_ties(rows):
    """Yield what is odd about neighbours in a user's sequence that have one time."""
    neighbours = tied = words = numbers = 0
    for (user, before, start), (other, after, end) in pairwise(rows):
        neighbours += user == other
        if user == other and start == end:
            tied += 1
            words += before < after
            numbers += (len(before), before) < (len(after), after)
    if tied == neighbours:
        yield "ALL TIMES of each user are equal: what comes last is up to the order of the file"
    sorted_by_id = max(words, tied - words, numbers, tied - numbers)
    if tied >= 20 and sorted_by_id >= 0.95 * tied:
        yield (f"{sorted_by_id:,} of {tied:,} neighbours of one time are as if sorted by item id, "
               "which no customer does but a model learns: shuffle interactions.csv")

def describe(domain: Domain) -> str:
    """What was read and what was dropped, for people."""
    users = len(domain.user_ids)
    events = sum(map(len, domain.sequences))
    lost = [f"{count:,} {reason}" for reason, count in domain.dropped.items() if count]
    lost += [f"{row[0]!r:.20}: {row[1]} {row[2]!r:.40}" for row in domain.dropped_items[:3]]
    return (f"{domain.name}: {users:,} users, {len(domain.item_ids):,} items, {events:,} "
            f"interactions, mean length {events / users:.1f}\n"
            f"  dropped: {', '.join(lost) or 'nothing'}\n"
            f"  test item decided by a tie in time: {sum(domain.tied) / users:.1%} of the users"
            + "".join(f"\n  NOTE: {remark}" for remark in domain.remarks))

# ---- What is prepared where it is missing: a domain or the tiny model ----
@contextmanager
def lock(path: Path, wait: bool = False):
    """Hold the lock of `path`, which dies with its process; if another has it, wait or raise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False,
                              mode=0o666)  # others may share the folder
    try:
        held.acquire(blocking=False)
    except filelock.Timeout:
        if not wait:
            raise InputError(f"{path}: another run is at work there; wait, or give another --out")
        print(f"waiting for another process, which is preparing {path}", flush=True)
        held.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"note: the file system of {path} has no locks; start one run at a time", flush=True)
    try:
        yield
    finally:
        held.release()

def set_mode(path: Path, mode: int) -> None:
    """Give a file the usual mode: safetensors makes it 0600. Some mounts know no modes."""
    with suppress(OSError):
        path.chmod(mode)

@contextmanager
def whole_file(path: Path):
    """A temporary path beside `path`, which takes its place when the block ends well."""
    partial = path.with_name(f"{path.name}.part")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        set_mode(partial, mode)
        os.replace(partial, path)
    except OSError as error:  # a write that fails does not say where
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)

def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, which appears when it is whole."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")

def write_csv(path: Path, header, rows) -> None:
    """Write an RFC 4180 file in UTF-8, which appears when it is whole."""
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])

def check_domain(domain: str, data_dir: Path) -> Path:
    """The folder of a domain, which is there or KNOWN: a path if it has a /, else in data_dir."""
    folder = Path(domain) if "/" in domain else data_dir / domain
    if domain not in KNOWN and not (folder / "items.csv").exists():
        raise InputError(f"{folder}/items.csv is missing; is it ./{domain}, or {', '.join(KNOWN)}?")
    return folder

def prepare(last, folder, write, *arguments):
    """Call write(*arguments), which makes `last` at its end, unless that is there; others wait."""
    try:
        if not last.exists():
            with lock(folder, wait=True):
                if not last.exists():  # if it does, another process was first
                    write(*arguments)
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error}); give another --data-dir or --out")

def prepare_domain(domain: str, data_dir: Path, mirror: str = "") -> Path:
    """The folder of a domain, which is made first if it is missing and KNOWN."""
    folder = check_domain(domain, data_dir)
    last = folder / "items.csv"
    if domain == "sample":
        prepare(last, folder, write_sample_world, folder)
    if domain in AMAZON:
        prepare(last, folder, prepare_amazon, domain, folder, data_dir / "amazon2014", mirror)
    return folder

def prepare_model(model: str, data_dir: Path) -> str:
    """What `from_pretrained` takes: a name or a folder as it is; `tiny` is made."""
    if model != "tiny":
        return model
    folder = data_dir / "tiny-qwen2.5-vl"
    prepare(folder, folder, write_tiny_model, folder)
    return str(folder)

NOUNS = "lantern kettle puzzle scarf drum kite clock basket".split()         # by category
BRANDS = "Arvo Belka Corin Dasha Elmo Fjord Gusto Halma".split()             # by style
SHAPES = "disc square triangle cross ring bars diamond checks".split()       # by category

def write_sample_world(folder: Path, seed=0, users=1200, per_cell=8, brand=0.9, shape=0.7) -> None:
    """The paper's situation in small: titles tell nearly everything, so that clicks can be learnt
    without pictures. Of each of 8 categories and 8 styles there are `per_cell` items: the noun
    shows the category and the hue the style, always; the brand the style, and the shape the
    category, in these shares. Ids and the files' order tell neither."""
    rng = random.Random(f"sample world {seed}")
    kinds = per_cell * list(product(range(8), range(8)))  # (category, style) by item
    rng.shuffle(kinds)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (category, style) in enumerate(kinds):
        named = style if rng.random() < brand else rng.randrange(8)
        drawn = category if rng.random() < shape else rng.randrange(8)
        title = f"{BRANDS[named]} {NOUNS[category]} {rng.randrange(100)}"
        image = f"images/{number:04}.png"
        draw_item(rng, SHAPES[drawn], style / 8).save(folder / image)
        rows.append([f"{number:04}", title, image])
    popularity = [rng.lognormvariate(0, 0.7) for _ in kinds]
    events = [[f"u{user:04}", f"{item:04}", time]
              for user in range(users) for item, time in walk(rng, kinds, popularity)]
    events.sort(key=lambda event: event[2])  # as they happened; a user's ties stay in their order
    write_csv(folder / "interactions.csv", EVENTS, events)
    write_csv(folder / "items.csv", ITEMS, rows)  # last: where it is, the world is whole

def walk(rng, kinds, popularity):
    """Yield (item, time) of a user: category and style stay, go on or jump; popular items lead."""
    category, style = rng.randrange(8), rng.randrange(8)
    day = 16000 + rng.randrange(365)
    free = list(range(len(kinds)))
    for _ in range(rng.randint(5, 10)):
        category = rng.choices([category, (category + 1) % 8, rng.randrange(8)], [50, 35, 15])[0]
        style = rng.choices([style, (style + 1) % 8, rng.randrange(8)], [60, 25, 15])[0]
        cell = [item for item in free if kinds[item] == (category, style)]
        if cell:
            day += rng.randint(1, 9) if rng.random() < 0.8 else 0
            item = rng.choices(cell, [popularity[item] for item in cell])[0]
            free.remove(item)
            yield item, day * 86400

def draw_item(rng, shape, hue):
    """One shape in one colour on a pale ground; its place, size and shade come from `rng`."""
    vivid = colorsys.hsv_to_rgb(hue, rng.uniform(0.7, 1), rng.uniform(0.6, 0.95))
    colour = tuple(int(255 * part) for part in vivid)
    ground = (rng.randint(225, 255),) * 3
    picture = Image.new("RGB", (84, 84), ground)
    draw = ImageDraw.Draw(picture)
    r = rng.randint(21, 28)
    x, y = rng.randint(r + 2, 82 - r), rng.randint(r + 2, 82 - r)
    corners = {"square": [(-r, -r), (r, -r), (r, r), (-r, r)],
               "triangle": [(0, -r), (-r, r), (r, r)],
               "diamond": [(0, -r), (r, 0), (0, r), (-r, 0)]}
    grid = {"cross": (1, 3, 4, 5, 7), "bars": (0, 3, 6, 2, 5, 8), "checks": (0, 2, 4, 6, 8)}
    third = 2 * r // 3
    if shape in corners:
        draw.polygon([(x + right, y + down) for right, down in corners[shape]], fill=colour)
    if shape in ("disc", "ring"):
        inside = colour if shape == "disc" else ground
        draw.circle((x, y), r, inside, colour, width=r // 3)
    for cell in grid.get(shape, ()):  # of 3 x 3
        left, top = x - r + cell % 3 * third, y - r + cell // 3 * third
        draw.rectangle((left, top, left + third - 1, top + third - 1), fill=colour)
    return picture

def write_tiny_model(folder: Path) -> None:
    """Write a Qwen2.5-VL of 277,000 random parameters, to which each of our words is a token."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLModel,
                              Qwen2VLImageProcessorPil)
    marks = ["<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
             "<|video_pad|>"]
    words = BRANDS + [f"\u0120{word}" for word in [*NOUNS, *range(100)]]  # \u0120: a space's byte
    merges = {(word[:k], word[k]): word[:k + 1]  # letter by letter
              for word in words for k in range(1, len(word))}
    symbols = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet()), *merges.values()]
    ids = {symbol: number for number, symbol in enumerate(symbols)}
    bpe = Tokenizer(models.BPE(vocab=ids, merges=list(merges)))  # the library's trainer varies
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=marks[0],
                                        eos_token=marks[1], additional_special_tokens=marks[2:])
    text = dict(vocab_size=len(ids), hidden_size=64, intermediate_size=160, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
                rope_parameters={"rope_theta": 1e4, "mrope_section": [2, 3, 3]},
                bos_token_id=None, eos_token_id=1)
    vision = dict(depth=2, hidden_size=48, intermediate_size=128, num_heads=3, out_hidden_size=64,
                  fullatt_block_indexes=[1])
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, vision_start_token_id=2,
                              vision_end_token_id=3, image_token_id=4, video_token_id=5)
    partial = folder.with_name(f"{folder.name}.part")  # over what a killed run left there
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2_5_VLModel(config).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    Qwen2VLImageProcessorPil().save_pretrained(partial)
    set_mode(partial / "model.safetensors", (partial / "config.json").stat().st_mode)
    os.replace(partial, folder)

# ---- Amazon 2014 (McAuley et al., SIGIR 2015): reviews and metadata, then the pictures ----
AMAZON = {  # name in the files; the published 5-core's users, items and interactions
    "toys": ("Toys_and_Games", 19_412, 11_924, 167_597),
    "beauty": ("Beauty", 22_363, 12_101, 198_502),
    "clothing": ("Clothing_Shoes_and_Jewelry", 39_387, 23_033, 278_677),
    "sports": ("Sports_and_Outdoors", 35_598, 18_357, 296_337)}
KNOWN = ["sample", *AMAZON]  # domains that we know how to make
ARCHIVES = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
PICTURES = "https://m.media-amazon.com"  # serves today what the metadata's hosts served
TIMEOUT = 20  # an attempt fails after so many seconds without a byte
MAX_BYTES, MAX_SECONDS = 10_000_000, 60  # of a picture, all attempts together
LOOKS = ("2014's reviews are JSON with reviewerID, asin, unixReviewTime (until July 2014), its "
         "metadata Python dicts with asin, title, imUrl; delete it, run again")

class SameHost(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, address):
        """Follow a redirect within its host; another one is an error, as it may lead anywhere."""
        if urllib.parse.urlsplit(address).netloc == request.host:
            return super().redirect_request(request, file, code, message, headers, address)

def fetch(address, file, small=False):
    """Append to `file` what it lacks of `address`; what is small has limits and is begun anew after
    a failure. Returns "", or why it failed, which begins with "no answer" where time may help."""
    end = monotonic() + (MAX_SECONDS if small else math.inf)
    wait = 0
    for pause in (1, 2, 4, 0):  # seconds, before the next attempt
        sleep(wait)
        if monotonic() > end:
            break
        wait = pause
        try:
            receive(address, file, small, end)
            return ""
        except urllib.error.HTTPError as error:
            if error.code == 416 and file.tell():  # nothing comes after what we have
                return ""
            reason = f"HTTP {error.code}"
            if error.code in (400, 404, 410):
                return reason
            if error.code < 500 and error.code != 429:
                break
            after = error.headers.get("Retry-After", "")
            if after.isdecimal():
                wait = max(pause, min(int(after), 30))
        except ValueError as error:  # too large, or no address
            return str(error)
        except Exception as error:  # a network's failures have many names
            reason = f"{type(error).__name__} {error}"
    return f"no answer: {reason}"

def receive(address, file, small, end):
    """Ask once, for what `file` lacks; raise if it does not come whole or is beyond a limit."""
    if small:  # the rest may be of another picture
        file.seek(0)
        file.truncate()
    start = file.tell()
    request = urllib.request.Request(address, headers={"User-Agent": "vlm2rec"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with urllib.request.build_opener(SameHost).open(request, timeout=TIMEOUT) as response:
        if response.status != 206:  # it sends what we have, too
            response.read(start)
        whole = file.tell() + (getattr(response, "length", 0) or 0)  # it need not say
        for chunk in iter(lambda: response.read1(1 << 16), b""):
            file.write(chunk)
            if small and file.tell() > MAX_BYTES:
                raise ValueError(f"over {MAX_BYTES:,} bytes")
            if monotonic() > end:
                raise TimeoutError("too slow")
    if file.tell() < whole:
        raise ConnectionError("cut off")

def read_archive(path, mirror, parse):
    """Yield parse(line) for each line of a gzipped file, which is fetched unless it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    address = f"{mirror or ARCHIVES}/{path.name}"
    if not path.exists():
        print(f"fetching {address}", flush=True)
        part = path.with_name(f"{path.name}.part")  # goes on where an earlier run left it
        with open(part, "ab") as file:
            reason = fetch(address, file)
        if reason:
            raise InputError(f"cannot fetch {address} ({reason}); run again, put it into "
                             f"{path.parent}, or try: python data.py DOMAIN --mirror URL")
        os.replace(part, path)
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = tqdm(file, path.name, unit=" lines", leave=False, disable=None)
            for number, line in enumerate(lines, 1):
                yield parse(line)
        if not number:
            raise EOFError("empty")
    except Exception as error:  # damage has many names
        raise InputError(f"{path} is cut off or damaged, or of another year, after line {number} "
                         f"({type(error).__name__} {error}); {LOOKS}") from None

def read_review(line):
    """(user, item, time)"""
    row = json.loads(line)
    if row["unixReviewTime"] > 1.41e9:
        raise ValueError("a later review")
    return row["reviewerID"], row["asin"], row["unixReviewTime"]

def read_metadata(line):
    """(item, (title, address of its picture))"""
    row = ast.literal_eval(line)
    title = " ".join(html.unescape(row.get("title") or "").split())
    title = title.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return row["asin"], (title, row.get("imUrl") or "")

def fetch_pictures(addresses, folder):
    """Fetch {item: address} to `folder`/item.jpg, if it decodes. Returns {item: "", or why not}."""
    folder.mkdir(parents=True, exist_ok=True)
    def get(item):
        """Fetch one: "", or why not."""
        path = folder / f"{item}.jpg"
        if path.exists() and not flaw(path.read_bytes(), path):  # a power cut leaves empty files
            return ""
        file = io.BytesIO()
        reason = fetch(addresses[item], file, small=True)
        if reason:
            return reason
        reason = flaw(file.getvalue(), path)
        if not reason:
            with whole_file(path) as partial:
                partial.write_bytes(file.getvalue())
        elif not reason.endswith(UNFIT):  # such as a page that asks whether we are human
            reason = f"no answer: no picture, {reason}"
        return reason
    reasons = {}
    silent = failed = 0
    for item, reason in zip(addresses, in_threads(get, addresses, "pictures", 16)):
        reasons[item] = reason
        failed += reason != ""
        silent += reason.startswith("no answer")
        if silent > max(5, len(addresses) / 100) or failed > max(25, len(addresses) / 2):
            raise InputError(f"{failed} of {len(addresses)} pictures failed ({reason}); "
                             "check the network, run again: it goes on from here; or --mirror")
    return reasons

def prepare_amazon(domain: str, folder: Path, archives: Path, mirror: str = "") -> None:
    """Write the 5-core of what has a title and a picture; a run that was killed is gone on with."""
    category, *published = AMAZON[domain]
    mirror = mirror.rstrip("/")
    metadata = archives / f"meta_{category}.json.gz"
    reviews = list(read_archive(archives / f"reviews_{category}_5.json.gz", mirror, read_review))
    about = {item: ("", "") for _, item, _ in reviews}  # title, picture's address
    entries = read_archive(metadata, mirror, read_metadata)
    about |= {item: entry for item, entry in entries if item in about}
    if not any(title and address for title, address in about.values()):
        raise InputError(f"{metadata} tells no reviewed item's title and picture; {LOOKS}")
    reasons = {}
    paths = {}  # of pictures, on any host
    for item, (title, address) in sorted(about.items()):
        known = re.match("https?://[^/]*amazon.com(?!.*no-img)(/[^?#]*)", address)
        if title and known and item.isalnum():  # the id becomes a file's name
            paths[item] = urllib.parse.quote(known[1], safe="/%+,")
        reasons[item] = "" if item in paths else "no title, no picture or an odd id"
    shown = core([row for row in reviews if row[1] in paths])
    needed = sorted({item for _, item, _ in shown})
    addresses = {item: (mirror or PICTURES) + paths[item] for item in needed}
    reasons |= fetch_pictures(addresses, folder / "images")
    final = core([row for row in shown if not reasons[row[1]]])
    left = sorted({item for _, item, _ in final})
    items = [[item, about[item][0], f"images/{item}.jpg"] for item in left]
    lost = [[item, reason, about[item][1]] for item, reason in reasons.items() if reason]
    users = len({user for user, _, _ in reviews})
    print(f"{domain}: {users:,} users, {len(about):,} items, {len(reviews):,} events, published "
          f"{published}; {len(lost)} items lost")
    if not core(final, room=NEGATIVES):
        causes = Counter(reason for _, reason, _ in lost).most_common(3)
        told = ", ".join(f"{count} items: {reason}" for reason, count in causes)
        raise InputError(f"{folder}: nothing is left; lost: {told}")
    later = [item for item, reason, _ in lost if reason.startswith("no answer")]
    if later:
        print(f"{len(later)} of them gave no answer; to try again, delete {folder}/items.csv first")
    write_csv(folder / "dropped.csv", ["item_id", "reason", "address"], lost)
    write_csv(folder / "interactions.csv", EVENTS, final)
    write_csv(folder / "items.csv", ITEMS, items)  # last: where it is, the domain is whole

def main() -> int:
    """Prepare or check a domain without training: `python data.py ./my-shop`."""
    parser = argparse.ArgumentParser(description="Download, filter and write a domain.")
    parser.add_argument("domain", help="a folder, or " + ", ".join(KNOWN))
    parser.add_argument("--data-dir", default="domains", type=os.path.expanduser)
    parser.add_argument("--mirror", default="", help="address of archives and pictures")
    args = parser.parse_args()
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal shows what it can
    sys.stderr = sys.stderr or open(os.devnull, "w")  # a daemon may have none
    try:
        print(describe(read_domain(prepare_domain(args.domain, Path(args.data_dir), args.mirror))))
    except (InputError, OSError, MemoryError) as error:
        print(f"error: {str(error) or 'out of memory'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
