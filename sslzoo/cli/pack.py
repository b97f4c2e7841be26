"""Pack a folder of images into a few large files, from which they are read faster, with checksums.

  sslzoo pack /data/imagenet /scratch/packed                      the files as they are: training gives the same numbers
  sslzoo pack /data/imagenet /scratch/packed --raw                decoded: the same numbers, fastest, most space
  sslzoo pack /data/imagenet /scratch/small --short-side 256      reduced to 256 pixels and encoded again
  sslzoo pack --verify /scratch/packed                            compare everything with its checksums

Without --raw and --short-side files are copied undecoded: a damaged image is noticed only in training. With one
of them every image is decoded, and those that cannot be are counted and named.

Recipes then use it by data.dataset=packed data.root=DST, or by data.root=DST alone if they name the data set. The same
command continues after an interruption.

exit codes: 0 done; 1 disk full, too many images that cannot be read, damaged data or another error at run time; 2
invalid folders or options; 75 stopped by a signal; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sslzoo.recipe.sections import DataConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", metavar="SRC", help="folder of images")
    parser.add_argument("dest", nargs="?", metavar="DST", help="folder to write, outside SRC")
    parser.add_argument(
        "--raw", action="store_true", help="store decoded pixels: nothing is decoded in training"
    )
    parser.add_argument(
        "--short-side",
        type=int,
        metavar="PIXELS",
        help="reduce images whose shorter side is longer (bilinear, antialiased), and encode them as JPEG of quality "
        "95; with --raw not encoded",
    )
    parser.add_argument(
        "--channels",
        type=int,
        choices=(1, 3),
        help="channels of images that are decoded, with --raw or --short-side (default: 3)",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="imagefolder, folder, imagenet1k, imagenet100, tiny_imagenet, webdataset or huggingface (default: guessed "
        "from the layout)",
    )
    parser.add_argument(
        "--split",
        action="append",
        metavar="NAME",
        help="pack this split, may be repeated (default: all that are found)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that read and decode (default: one per processor)"
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        metavar="F",
        help="stop if a larger fraction of a split's images cannot be read, as data.max_bad_fraction does in training "
        f"(default: {DataConfig.max_bad_fraction})",
    )
    parser.add_argument("--verify", metavar="DST", help="instead: compare packed data with its checksums")


def run(args: argparse.Namespace) -> int:
    problem = _problem(args)
    if problem:
        print(f"sslzoo pack: {problem}", file=sys.stderr)
        return 2

    from sslzoo.data.disk import DataError, legible
    from sslzoo.data.loading import processors
    from sslzoo.data.pack_writer import PackOptions
    from sslzoo.exits import ExitCode, Preempted
    from sslzoo.run.pack import pack, verify

    try:
        if args.verify is not None:
            return 0 if verify(Path(args.verify)) else 1
        pack(
            Path(args.source),
            Path(args.dest),
            dataset=args.dataset,
            splits=args.split or (),
            options=PackOptions(raw=args.raw, short_side=args.short_side, channels=args.channels or 3),
            max_bad_fraction=(
                DataConfig.max_bad_fraction if args.max_bad_fraction is None else args.max_bad_fraction
            ),
            workers=processors() if args.workers is None else args.workers,
        )
    except ValueError as error:
        print(f"sslzoo pack: {legible(error)}", file=sys.stderr)
        return ExitCode.USAGE
    except (DataError, OSError) as error:
        print(f"sslzoo pack: {legible(error)}", file=sys.stderr)
        return ExitCode.FAILURE
    except (Preempted, KeyboardInterrupt) as error:
        then = "; the same command continues" if args.verify is None else ""
        print(f"sslzoo pack: {str(error) or 'interrupted'}{then}", file=sys.stderr)
        return ExitCode.PREEMPTED if isinstance(error, Preempted) else ExitCode.INTERRUPT
    return ExitCode.DONE


def _problem(args: argparse.Namespace) -> str:
    """What is wrong with the options; empty if nothing is."""
    if "" in (args.source, args.dest, args.verify):
        return "the name of a folder is empty; . is the working directory"
    bad = args.max_bad_fraction
    options = (args.source, args.short_side, args.channels, args.dataset, args.split, args.workers, bad)
    if args.verify is not None:
        return "--verify DST takes nothing else" if args.raw or any(x is not None for x in options) else ""
    if args.source is None or args.dest is None:
        return "give the folder of images and the folder to write: sslzoo pack SRC DST"
    if args.short_side is not None and args.short_side < 1:
        return f"--short-side must be positive, got {args.short_side}"
    if args.channels is not None and not args.raw and args.short_side is None:
        return "--channels needs --raw or --short-side: otherwise nothing is decoded"
    for split in args.split or ():
        if split in ("", ".", "..") or "/" in split:
            return f"--split must be the name of a split, such as train, got {split!r}"
    if bad is not None and not 0 <= bad <= 1:
        return f"--max-bad-fraction must lie in [0, 1], got {bad}"
    if args.workers is not None and args.workers < 0:
        return f"--workers must not be negative, got {args.workers}"
    return ""
