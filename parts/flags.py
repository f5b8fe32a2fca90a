"""How a flag gets its value: the script's table says it; for train.py the model's train.json, then
the resumed run's config.json, go over that; the command line goes over all."""

import os
from pathlib import Path

from parts.common import Parser, UserError, read_json
from parts.weights import TOY, read_train_json, resolve_model

# paths that exist are made absolute, so that --resume works from any folder
PATHS = ("model", "prompts", "pairs", "weights", "preview_decoder", "cache_dir")
NOT_WITH_PAIRS = ("num_children", "first_step", "threshold", "eta", "sample_batch_size")


def build_parser(flags, description):
    """flags: {name: (default, range or choices, what it is)}."""
    parser = Parser(description=description)
    for name, (default, allowed, text) in flags.items():
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true", help=text)
            continue
        kind = type(default)
        if default is None:
            kind = float if allowed else str
        if name in PATHS:
            kind = whole_path
        shown = "" if default in (None, "") else " (default: %(default)s)"
        text = text.replace("%", "%%") + shown
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    return parser


def whole_path(word):
    """auto, toy, a hub id and the like stay as they are."""
    is_path = os.path.exists(word) and word not in ("auto", "toy", "hpdv2")
    return os.path.abspath(word) if is_path else word


def parse(argv, description, flags, sections, free_on_resume):
    """(args, why this model), or UserError. sections: {flag: defaults of a run with it}, which a
    model's train.json may have, too. free_on_resume: flags that a resumed run may change."""
    parser = build_parser(flags, description)
    first, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    where, why = resolve_model(first.model)
    own = read_train_json(where)
    defaults = {name: value for name, value in own.items() if name not in sections}
    for name, section in sections.items():
        if getattr(first, name):
            defaults |= section | own.get(name, {})
    unknown = defaults.keys() - flags.keys()
    if unknown:
        raise UserError(f"{where}/train.json: {min(unknown)} is no flag of train.py")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.model = "toy" if where == TOY else where
    if args.output_dir is None:
        name = Path(where).name.removesuffix(".safetensors")
        alpha = f"{args.alpha:g}" if args.alpha is not None else ""
        pairs = "-pairs" if args.pairs else ""
        args.output_dir = f"out/{name}-{args.div}{alpha}{pairs}"
    if args.resume:
        args = resumed_args(parser, argv, args.output_dir, flags, free_on_resume)
        why = "the run's own"
    elif os.path.exists(f"{args.output_dir}/config.json"):
        fix = "--resume goes on with it, another --output_dir starts anew"
        raise UserError(f"{args.output_dir!r} already holds a run: {fix}")
    for name in NOT_WITH_PAIRS:
        if args.pairs and getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name} is about sampling pairs: drop it, or drop --pairs")
    of_run = f" (of {args.output_dir}/config.json)" if args.resume else ""
    check_ranges(flags, args, of_run)
    return args, why


def resumed_args(parser, argv, output_dir, flags, free_on_resume):
    """The settings of the run in output_dir. Raises UserError if a typed flag contradicts them."""
    fix = "nothing to resume; drop --resume, or give the run's folder"
    saved = read_json(f"{output_dir}/config.json", fix)["args"]
    if saved.keys() != flags.keys():
        raise UserError(f"{output_dir!r} was written by another version of this code: start anew")
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    for name in saved.keys() - set(free_on_resume):
        if getattr(args, name) == "auto":  # the run says what that was
            setattr(args, name, saved[name])
    changed = [k for k in saved if k not in free_on_resume and getattr(args, k) != saved[k]]
    if changed:
        what = ", ".join(f"{k} was {saved[k]}, now {getattr(args, k)}" for k in changed)
        raise UserError(f"--resume with different settings: {what}; leave them out")
    args.resume, args.output_dir = True, output_dir
    return args


def check_ranges(flags, args, where=""):
    """Raises UserError, naming the first flag whose value is not allowed, and where it stands."""
    for name, (_, allowed, _) in flags.items():
        check_range(name + where, getattr(args, name), allowed)


def check_range(name, value, allowed):
    """allowed: None, a tuple of choices, or an interval such as "[1, inf)"."""
    if allowed is None or value is None:
        return
    if isinstance(allowed, tuple):
        if value not in allowed:
            raise UserError(f"--{name}: unknown {value!r}: choose one of {', '.join(allowed)}")
        return
    low, high = (float(end) for end in allowed[1:-1].split(", "))
    above = value >= low if allowed[0] == "[" else value > low
    below = value <= high if allowed[-1] == "]" else value < high
    if not (above and below):  # NaN fails here too
        raise UserError(f"--{name} must lie in {allowed}, got {value}")
