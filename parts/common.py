"""What every command shares: one error boundary, files written whole, prompts, grids, progress."""

import argparse
import csv
import io
import json
import os
import re
import sys
import textwrap
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from tqdm import TqdmWarning, tqdm


class UserError(ValueError):
    """Bad input. Every command prints it as one line and exits with code 2; it names the fix."""


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line like every other bad input, not a page of usage."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")


def run_cli(main):
    """Runs a command. Bad input is one line on stderr and exit code 2; Ctrl-C one line and 130."""
    name = os.path.basename(sys.argv[0])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name or a sign that it cannot show stops nothing
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # | head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError, SafetensorError) as error:
        if os.environ.get("DEBUG"):  # DEBUG=1 python train.py ...: where it came from
            raise
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        how_to_go_on = str(stop) or "what is written stays, the same command begins again"
        print(f"\n{name}: stopped; {how_to_go_on}", file=sys.stderr)
        sys.exit(130)


def pick_device(name):
    """The device called name; "auto": cuda if there is one, else cpu. Raises UserError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    known = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", name)
    if not known:
        raise UserError(f"unknown device {name!r}: say auto, cpu, cuda or cuda:0")
    if known[1] == "cuda" and int(known[2] or 0) >= torch.cuda.device_count():
        raise UserError(f"{name}: torch sees {torch.cuda.device_count()} GPUs: use --device cpu")
    return name


def peak_gb(device):
    """Peak memory so far: of CUDA's allocator, or of this process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1e9 if sys.platform == "darwin" else 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def progress_bar(total=None, **options):
    """tqdm on a terminal; into a log file, a line every 20 seconds. Fractions of a unit count."""
    if total is not None:
        count = "{n:.0f}/{total} {unit} [{elapsed}<{remaining}]{postfix}"
        options["bar_format"] = "{l_bar}{bar}| " + count
    # rounded fractions sum to a hair more than the total
    warnings.filterwarnings("ignore", category=TqdmWarning)
    return tqdm(total=total, mininterval=0.2 if sys.stderr.isatty() else 20, **options)


def write_file(path, data):
    """data: bytes, text, or a function that writes to the open file it is given. To a temporary
    name, then renamed: a kill leaves the old file whole, and so does a full disk (a UserError)."""
    temporary = f"{path}.{os.getpid()}.tmp"  # another process may write the same file
    try:
        with open(temporary, "wb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        Path(temporary).unlink(missing_ok=True)
        # torch.save wraps what the disk says in a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        fix = "free some space or choose another --output_dir; what was saved before is whole"
        raise UserError(f"cannot write {path} ({cause.strerror}): {fix}") from error


def make_folder(path, flag="--output_dir", only_look=False):
    """Creates a folder, or only looks whether it could. Raises UserError, naming the flag, if it
    cannot be written to."""
    try:
        there = path
        while only_look and not os.path.lexists(there):
            there = os.path.dirname(os.path.abspath(there))
        os.makedirs(there, exist_ok=True)
        if not os.access(there, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        why = f"cannot write to {path!r} ({error.strerror}): choose another {flag}"
        raise UserError(why) from error


def csv_text(header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def write_csv(path, header, rows):
    write_file(path, csv_text(header, rows))


def markdown(rows):
    """A table; the first of the rows is its header."""
    lines = [f"| {' | '.join(map(str, row))} |\n" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|\n")
    return "".join(lines)


def read_json(path, fix):
    """The object that a JSON file holds, or the list of those that the lines of a .jsonl hold.
    Raises UserError, which ends with `fix`, also where a key is looked up that is not there."""

    class Settings(dict):
        def __missing__(self, key):
            raise UserError(f"{path} lacks {key!r}: {fix}")

    try:
        text, kind = Path(path).read_text("utf-8"), dict
        if Path(path).suffix == ".jsonl":  # a line stays one: the error names it
            text, kind = f"[{text.strip()}]".replace("\n", ",\n"), list
        content = json.loads(text, object_hook=Settings)
        if not isinstance(content, kind):
            raise ValueError("no object in braces")
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as JSON ({error}): {fix}") from error


def write_png(image, path):
    write_file(path, lambda file: image.save(file, "PNG"))


def save_figure(figure, path):
    write_file(path, lambda file: figure.savefig(file, dpi=130))


PROMPT_COLUMNS = ("caption", "prompt", "prompts", "text")  # whatever their case


def read_prompts(path, numbered=False):
    """Prompts of a file, of which read_rows says what it may be. numbered: the prompt's place
    counts, and a blank line is refused. Raises UserError, naming the file and what is wrong."""
    try:
        prompts = [" ".join(prompt_of(item).split()) for item in read_rows(path)]
        text = "".join(prompts)
        text.encode()  # half a surrogate pair, which JSON can hold, is no text
        if "\0" in text:
            raise ValueError("a zero byte")
    except Exception as error:  # of the disk, UTF-8, JSON, csv and pyarrow
        fix = "give UTF-8 text, a prompt a line, a .json list, or a table with caption or prompt"
        raise UserError(f"cannot read prompts file {path!r} ({error}): {fix}") from error
    while prompts and not prompts[-1]:
        prompts.pop()
    if numbered and "" in prompts:
        line = prompts.index("") + 1
        raise UserError(f"{path!r}: prompt {line} is blank, and images are numbered by their line")
    if not any(prompts):
        raise UserError(f"prompts file {path!r} is empty: give one prompt a line")
    return [prompt for prompt in prompts if prompt]


def prompt_of(item):
    """A string, or that of an object with one of PROMPT_COLUMNS."""
    prompt = cell_of(item, PROMPT_COLUMNS) if isinstance(item, dict) else item
    if not isinstance(prompt, str):
        raise TypeError("a prompt that is no text")
    return prompt


def read_rows(path, blank=None):
    """Yields {column: cell} of a .csv, .tsv or .parquet, the items of a .json list or of a .jsonl's
    lines, or any other text's lines. blank: what a short row of a .csv is filled up with."""
    kind = Path(path).suffix.lower()
    is_table = kind in (".csv", ".tsv")
    with open(path, "rb") as file:
        # Windows' mark in front; lines end at newlines alone, not at U+2028, \v and others
        text = io.TextIOWrapper(file, "utf-8-sig", newline="" if is_table else "\n")
        if kind == ".parquet":
            from pyarrow.parquet import ParquetFile

            for batch in ParquetFile(file).iter_batches(16):
                yield from batch.to_pylist()
        elif is_table:
            tab = "\t" if kind == ".tsv" else ","
            rows = csv.DictReader(text, restval=blank, delimiter=tab)
            for row in rows:
                if None in row:
                    raise ValueError(f"line {rows.line_num}: no column for {row[None]}: quote text")
                yield row
        elif kind == ".jsonl":
            yield from (json.loads(line) for line in text if line.strip())
        elif kind == ".json":
            items = json.load(text)
            if not isinstance(items, list):
                raise TypeError("not a list")
            yield from items
        else:
            lines = list(text)
            if re.match(r'\s*(\[\s*[{"]|\{\s*")', "".join(lines)):  # its lines would be no prompts
                raise ValueError("JSON: name it .json or .jsonl")
            yield from lines


def cell_of(row, names):
    """The cell of the first of these columns that a row has, whatever its case."""
    cells = {column.strip().lower(): cell for column, cell in row.items()}
    for name in names:
        if name in cells:
            return cells[name]
    raise ValueError(f"its columns are {', '.join(row)}")


def hold_out(prompts, count):
    """(training prompts, held-out prompts): `count` held out evenly through the list, at most half.
    The same whatever the seed, so that runs compare."""
    prompts = list(dict.fromkeys(prompts))  # a prompt given twice must not be on both sides
    if len(prompts) == 1:
        print("one prompt: none is held out, the table at the end is about the training prompt")
        return prompts, prompts
    count = min(count, len(prompts) // 2)
    held = {round(i * len(prompts) / count) for i in range(count)}
    training = [p for i, p in enumerate(prompts) if i not in held]
    return training, [prompts[i] for i in sorted(held)]


def to_8_bits(images):
    """(..., 3, H, W) in [0, 1], a little outside perhaps -> uint8 (..., H, W, 3) on the CPU."""
    pixels = (images.float() * 255).round().clamp(0, 255)
    return pixels.byte().movedim(-3, -1).cpu()


def to_pil(image):
    """(3, H, W) in [0, 1] -> 8-bit PIL image."""
    return Image.fromarray(to_8_bits(image).numpy())


def labelled_grid(rows, path, cell=128, captions=None):
    """A PNG of rows [(label, images (n, 3, H, W))], each image scaled to `cell` pixels of width.
    captions: of the columns, above them."""
    font, pad, head = ImageFont.load_default(14), 4, 22
    _, first = rows[0]
    smooth = first.shape[-1] > cell  # small pictures keep their pixels when enlarged
    resample = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    height = round(cell * first.shape[2] / first.shape[3])
    most = max(len(images) for _, images in rows)
    widest_label = max(int(font.getlength(label)) for label, _ in rows)
    width = max(most * (cell + pad) + pad, widest_label + 2 * pad)
    captions = [textwrap.fill(caption, cell // 7) for caption in captions or []]
    above = 20 * max((caption.count("\n") + 1 for caption in captions), default=0)
    sheet = Image.new("RGB", (width, above + len(rows) * (height + head + pad) + pad), "white")
    pen = ImageDraw.Draw(sheet)
    for j, caption in enumerate(captions):
        pen.text((pad + j * (cell + pad), pad), caption, fill="black", font=font)
    for i, (label, images) in enumerate(rows):
        top = above + pad + i * (height + head + pad)
        pen.text((pad, top + 2), label, fill="black", font=font)
        for j, image in enumerate(images):
            small = to_pil(image).resize((cell, height), resample)
            sheet.paste(small, (pad + j * (cell + pad), top + head))
    write_png(sheet, path)
